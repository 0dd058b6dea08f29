//! `tandem list` and `tandem setup-vfio` on machines made of files: each reason to refuse, each write, each way back.
//!
//! A [`Machine`] is a folder with `sys`, `proc`, `dev`, `run` and `etc` in it, and a kernel that does to it what Linux
//! does when drivers are unbound and bound. What the program did to the machine is in the order in which it did it.
#![allow(clippy::unwrap_used)]

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command as Program;
use std::rc::Rc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use clap::Parser;
use serde_json::Value;
use tandem::cli::{Cli, Command};
use tandem::host::Host;
use tandem::host::command::{self, Console};
use tandem::host::effects::{Effects, Held, Ran};

// ---- the machine ----

/// A PID that no process has: the kernel's largest is 4194304.
const PID: u32 = 5_000_000;

const A: &str = "0000:5e:00.0";
const B: &str = "0000:5f:00.0";

/// An SSD as the kernel's driver shows it while it has it.
#[derive(Clone)]
struct Ssd {
    address: &'static str,
    group: u32,
    node: i32,
    controller: &'static str,
    serial: &'static str,
    /// Names of disks and of their partitions. A path of native multipath brings its disk along.
    disks: Vec<(&'static str, Vec<&'static str>)>,
    /// Seconds that a controller takes to become live, and then to show its disks.
    slow: u32,
    /// A controller that never becomes live is in this state.
    stuck: Option<&'static str>,
}

fn ssd_a() -> Ssd {
    Ssd {
        address: A,
        group: 12,
        node: 0,
        controller: "nvme0",
        serial: "S4EWA",
        disks: vec![("nvme0n1", vec!["nvme0n1p1", "nvme0n1p2"])],
        slow: 0,
        stuck: None,
    }
}

fn ssd_b() -> Ssd {
    Ssd {
        address: B,
        group: 13,
        node: 1,
        controller: "nvme1",
        serial: "S4EWB",
        disks: vec![("nvme1n1", vec![])],
        ..ssd_a()
    }
}

#[derive(Default)]
struct Kernel {
    root: PathBuf,
    ssds: BTreeMap<&'static str, Ssd>,
    log: Vec<String>,
    /// Programs that are not there, or what they print and whether they succeed.
    missing: Vec<&'static str>,
    wipefs: BTreeMap<&'static str, (&'static str, bool)>,
    failing_programs: Vec<&'static str>,
    /// Writes to paths that end so fail.
    failing_writes: Vec<&'static str>,
    failing_chown: bool,
    /// Drivers that refuse every device.
    refusing_drivers: Vec<&'static str>,
    claimed: Vec<&'static str>,
    /// A second claim of the same disk is refused, as Linux does.
    claims_once: bool,
    locked: bool,
    not_root: bool,
    huge_pages_left: Option<u64>,
    ticks: u32,
    /// When each SSD that is on its way becomes live.
    starting: BTreeMap<&'static str, u32>,
}

/// The machine's `/` and its kernel; removed at the end.
struct Machine {
    root: PathBuf,
    kernel: Rc<RefCell<Kernel>>,
}

#[derive(Clone)]
struct Handle(Rc<RefCell<Kernel>>);

fn write(path: PathBuf, text: &str) {
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
}

fn link(to: impl AsRef<Path>, at: PathBuf) {
    fs::create_dir_all(at.parent().unwrap()).unwrap();
    let _ = fs::remove_file(&at);
    symlink(to, at).unwrap();
}

/// Block device numbers, from a name: the tests need them different, and the same in mountinfo.
fn minor(name: &str) -> u32 {
    name.bytes()
        .fold(7, |sum, byte| (sum * 31 + u32::from(byte)) % 100_000)
}

fn number(name: &str) -> String {
    let major = if name.starts_with("nvme") { 259 } else { 253 };
    format!("{major}:{}", minor(name))
}

impl Kernel {
    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn function(&self, address: &str) -> PathBuf {
        self.at("sys/devices/pci0000:00").join(address)
    }

    fn add_function(&self, address: &str, class: &str, group: Option<u32>) {
        let folder = self.function(address);
        write(folder.join("class"), class);
        write(folder.join("driver_override"), "(null)\n");
        write(folder.join("numa_node"), "-1\n");
        link(&folder, self.at("sys/bus/pci/devices").join(address));
        if let Some(group) = group {
            let group = self.at("sys/kernel/iommu_groups").join(group.to_string());
            link(&folder, group.join("devices").join(address));
            link(&group, folder.join("iommu_group"));
        }
    }

    fn set_driver(&self, address: &str, driver: &str) {
        let folder = self.at("sys/bus/pci/drivers").join(driver);
        fs::create_dir_all(&folder).unwrap();
        write(folder.join("bind"), "");
        write(folder.join("unbind"), "");
        link(&folder, self.function(address).join("driver"));
    }

    fn driver(&self, address: &str) -> Option<String> {
        let to = fs::read_link(self.function(address).join("driver")).ok()?;
        Some(to.file_name().unwrap().to_str().unwrap().to_owned())
    }

    fn add_block(&self, folder: &Path, name: &str, sectors: u64) {
        write(folder.join("dev"), &number(name));
        write(folder.join("size"), &sectors.to_string());
        fs::create_dir_all(folder.join("holders")).unwrap();
        link(folder, self.at("sys/class/block").join(name));
        write(self.at("dev").join(name), "");
    }

    fn start_controller(&self, ssd: &Ssd) {
        let folder = self.function(ssd.address).join("nvme").join(ssd.controller);
        write(folder.join("model"), "Fine SSD 3.8 TB                  \n");
        write(
            folder.join("serial"),
            &format!("{}          \n", ssd.serial),
        );
        write(folder.join("state"), ssd.stuck.unwrap_or("connecting"));
        write(folder.join("dev"), "242:0");
        write(self.at("dev").join(ssd.controller), "");
    }

    fn show_disks(&self, ssd: &Ssd) {
        let controller = self.function(ssd.address).join("nvme").join(ssd.controller);
        write(controller.join("state"), "live\n");
        for (name, partitions) in &ssd.disks {
            let mut folder = controller.join(name);
            let mut name = (*name).to_owned();
            if let Some((subsystem, rest)) = name.split_once('c') {
                // A hidden path; the disk is the subsystem's.
                write(folder.join("hidden"), "1\n");
                name = format!("{subsystem}n{}", rest.split_once('n').unwrap().1);
                folder = self
                    .at("sys/devices/virtual/nvme-subsystem/nvme-subsys0")
                    .join(&name);
            }
            self.add_block(&folder, &name, 8_000_000);
            for partition in partitions {
                let below = folder.join(partition);
                self.add_block(&below, partition, 1_000_000);
                write(below.join("partition"), "1\n");
            }
        }
    }

    fn bind(&mut self, address: &str, driver: &str) -> io::Result<()> {
        let (address, ssd) = match self.ssds.get_key_value(address) {
            Some((address, ssd)) => (*address, ssd.clone()),
            None => return Err(ErrorKind::NotFound.into()),
        };
        if self.refusing_drivers.contains(&driver) {
            return Err(io::Error::other("no such device or address"));
        }
        self.set_driver(address, driver);
        match driver {
            "nvme" => {
                self.start_controller(&ssd);
                if ssd.slow == 0 && ssd.stuck.is_none() {
                    self.show_disks(&ssd);
                } else if ssd.stuck.is_none() {
                    self.starting.insert(address, self.ticks + ssd.slow * 10);
                }
            }
            "vfio-pci" => write(self.at("dev/vfio").join(ssd.group.to_string()), ""),
            _ => {}
        }
        Ok(())
    }

    fn unbind(&self, address: &str) {
        fs::remove_file(self.function(address).join("driver")).unwrap();
        let _ = fs::remove_dir_all(self.function(address).join("nvme"));
        let ssd = &self.ssds[address];
        let _ = fs::remove_file(self.at("dev/vfio").join(ssd.group.to_string()));
        for (disk, partitions) in &ssd.disks {
            for name in partitions.iter().chain([disk]) {
                let _ = fs::remove_file(self.at("sys/class/block").join(name));
                let _ = fs::remove_file(self.at("dev").join(name));
            }
        }
    }

    /// What Linux does when someone writes to a file in sysfs.
    fn written(&mut self, path: &str, value: &str) -> io::Result<()> {
        let over = |kernel: &Kernel| {
            let text = fs::read_to_string(kernel.function(value).join("driver_override")).unwrap();
            text.trim().to_owned()
        };
        match path.strip_prefix("sys/bus/pci/drivers/") {
            Some(end) if end.ends_with("/unbind") => {
                if self.driver(value).as_deref() != end.strip_suffix("/unbind") {
                    return Err(ErrorKind::NotFound.into());
                }
                self.unbind(value);
            }
            Some(end) if end.ends_with("/bind") => {
                let driver = end.strip_suffix("/bind").unwrap();
                if self.driver(value).is_some()
                    || !["", "(null)", driver].contains(&over(self).as_str())
                {
                    return Err(ErrorKind::NotFound.into());
                }
                self.bind(value, driver)?;
            }
            _ if path == "sys/bus/pci/drivers_probe" => {
                let driver = match over(self).as_str() {
                    "" | "(null)" => "nvme".to_owned(),
                    driver => driver.to_owned(),
                };
                // A driver that refuses is no error of this write.
                let _ = self.bind(value, &driver);
            }
            _ if path.ends_with("nr_hugepages") => {
                let wanted: u64 = value.parse().unwrap();
                let given = wanted.min(self.huge_pages_left.unwrap_or(u64::MAX));
                fs::write(self.at(path), given.to_string()).unwrap();
            }
            _ => fs::write(self.at(path), value).unwrap(),
        }
        Ok(())
    }

    fn relative(&self, path: &Path) -> String {
        path.strip_prefix(&self.root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    }
}

impl Effects for Handle {
    fn is_root(&self) -> bool {
        !self.0.borrow().not_root
    }

    fn acts(&self) -> bool {
        true
    }

    fn look(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran> {
        let kernel = self.0.borrow();
        if program == "udevadm" {
            assert_eq!(arguments, ["settle", "--timeout=10"]);
            return Err(ErrorKind::NotFound.into());
        }
        assert_eq!(
            (program, &arguments[..2]),
            ("wipefs", &["-J", "--no-act"][..])
        );
        if kernel.missing.contains(&program) {
            return Err(ErrorKind::NotFound.into());
        }
        let node = kernel.relative(Path::new(arguments[2]));
        let (stdout, success) = kernel
            .wipefs
            .get(node.as_str())
            .copied()
            .unwrap_or(("", true));
        Ok(Ran {
            success,
            stdout: stdout.to_owned(),
            complaint: "Input/output error".to_owned(),
        })
    }

    fn claim(&mut self, node: &Path) -> io::Result<Held> {
        let mut kernel = self.0.borrow_mut();
        fs::metadata(node)?;
        if kernel.claims_once {
            kernel.claimed.push("nvme0n1");
            if kernel.claimed.len() == 1 {
                return Ok(Held::nothing());
            }
        }
        if kernel.claimed.iter().any(|name| node.ends_with(name)) {
            return Err(ErrorKind::ResourceBusy.into());
        }
        Ok(Held::nothing())
    }

    fn lock(&mut self, _path: &Path) -> io::Result<Held> {
        match self.0.borrow().locked {
            true => Err(ErrorKind::WouldBlock.into()),
            false => Ok(Held::nothing()),
        }
    }

    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        let path = kernel.relative(path);
        if kernel.failing_writes.iter().any(|end| path.ends_with(end)) {
            return Err(io::Error::other("the kernel says no"));
        }
        fs::metadata(kernel.at(&path))?;
        kernel
            .log
            .push(format!("write {path} {}", value.escape_default()));
        kernel.written(&path, value)
    }

    fn run(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran> {
        let mut kernel = self.0.borrow_mut();
        if kernel.missing.contains(&program) {
            return Err(ErrorKind::NotFound.into());
        }
        kernel
            .log
            .push(format!("run {program} {}", arguments.join(" ")));
        let success = !kernel.failing_programs.contains(&program);
        if program == "modprobe" && success {
            let module = kernel.at("sys/module").join(arguments[0]);
            fs::create_dir_all(module).unwrap();
            for file in ["bind", "unbind"] {
                write(
                    kernel
                        .at("sys/bus/pci/drivers")
                        .join(arguments[0])
                        .join(file),
                    "",
                );
            }
        }
        Ok(Ran {
            success,
            stdout: String::new(),
            complaint: "no such module".to_owned(),
        })
    }

    fn chown(&mut self, path: &Path, user: u32) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        if kernel.failing_chown {
            return Err(ErrorKind::PermissionDenied.into());
        }
        fs::metadata(path)?;
        let line = format!("chown {} {user}", kernel.relative(path));
        kernel.log.push(line);
        Ok(())
    }

    fn save(&mut self, path: &Path, text: &str) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        let line = format!(
            "save {} {}",
            kernel.relative(path),
            text.trim_end().replace('\n', "\\n")
        );
        kernel.log.push(line);
        write(path.to_owned(), text);
        Ok(())
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        let mut kernel = self.0.borrow_mut();
        let line = format!("remove {}", kernel.relative(path));
        kernel.log.push(line);
        fs::remove_file(path)
    }

    fn pause(&mut self, time: Duration) {
        assert_eq!(time, Duration::from_millis(100));
        let mut kernel = self.0.borrow_mut();
        kernel.ticks += 1;
        let due: Vec<&str> = kernel
            .starting
            .iter()
            .filter(|(_, tick)| **tick <= kernel.ticks)
            .map(|(address, _)| *address)
            .collect();
        for address in due {
            kernel.starting.remove(address);
            kernel.show_disks(&kernel.ssds[address].clone());
        }
    }
}

/// What a command said and how it ended.
#[derive(Debug, PartialEq, Eq)]
struct Said {
    code: u8,
    out: String,
    err: String,
}

impl Said {
    /// It succeeded, and this is all that it said.
    #[track_caller]
    fn is(self, out: &str) {
        assert_eq!(
            (self.code, self.out.as_str(), self.err.as_str()),
            (0, out, "")
        );
    }

    /// It failed, and this is all that it said.
    #[track_caller]
    fn failed(self, err: &str) {
        assert_eq!(
            (self.code, self.out.as_str(), self.err.as_str()),
            (1, "", err)
        );
    }

    /// It refused to touch A for this one reason.
    #[track_caller]
    fn refused(self, reason: &str) {
        self.failed(&format!("{A}: refused: {reason}\n"));
    }
}

impl Machine {
    fn with(ssds: &[Ssd]) -> Machine {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let root = std::env::temp_dir().join(format!("tandem-host-{}-{count}", std::process::id()));
        let mut kernel = Kernel {
            root: root.clone(),
            ..Kernel::default()
        };
        for file in ["sys/bus/pci/drivers_probe", "proc/self/mountinfo"] {
            write(root.join(file), "");
        }
        write(
            root.join("proc/swaps"),
            "Filename\tType\tSize\tUsed\tPriority\n",
        );
        write(
            root.join("etc/passwd"),
            "root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n",
        );
        link("mnt:[1]", root.join("proc/self/ns/mnt"));
        fs::create_dir_all(root.join("sys/bus/pci/devices")).unwrap();
        for node in 0..2 {
            let pool = root.join(format!(
                "sys/devices/system/node/node{node}/hugepages/hugepages-2048kB"
            ));
            write(pool.join("nr_hugepages"), "0\n");
            write(pool.join("free_hugepages"), "0\n");
        }
        for ssd in ssds {
            kernel.add_function(ssd.address, "0x010802\n", Some(ssd.group));
            let folder = kernel.function(ssd.address);
            write(folder.join("numa_node"), &format!("{}\n", ssd.node));
            for (name, text) in [
                ("current_link_speed", "8.0 GT/s PCIe\n"),
                ("current_link_width", "4\n"),
                ("max_link_speed", "16.0 GT/s PCIe\n"),
                ("max_link_width", "4\n"),
                ("reset", ""),
                ("reset_method", "flr bus\n"),
            ] {
                write(folder.join(name), text);
            }
            kernel.ssds.insert(ssd.address, ssd.clone());
            kernel.set_driver(ssd.address, "nvme");
            kernel.start_controller(ssd);
            kernel.show_disks(ssd);
        }
        Machine {
            root,
            kernel: Rc::new(RefCell::new(kernel)),
        }
    }

    /// With vfio-pci loaded.
    fn with_vfio(ssds: &[Ssd]) -> Machine {
        let machine = Machine::with(ssds);
        for file in ["bind", "unbind"] {
            write(machine.at("sys/bus/pci/drivers/vfio-pci").join(file), "");
            write(
                machine.at("sys/module/vfio_iommu_type1").join("refcnt"),
                "0",
            );
        }
        machine
    }

    /// With SSD A bound to vfio-pci by us, and the log empty.
    fn bound() -> Machine {
        let machine = Machine::with_vfio(&[ssd_a()]);
        assert_eq!(machine.setup(&["bind", A]).code, 0);
        machine.kernel().log.clear();
        machine
    }

    fn kernel(&self) -> std::cell::RefMut<'_, Kernel> {
        self.kernel.borrow_mut()
    }

    fn at(&self, path: &str) -> PathBuf {
        self.root.join(path)
    }

    fn driver(&self, address: &str) -> Option<String> {
        self.kernel().driver(address)
    }

    fn log(&self) -> Vec<String> {
        self.kernel().log.clone()
    }

    fn run(&self, words: &[&str]) -> Said {
        let arguments = Cli::try_parse_from(["tandem"].iter().chain(words)).unwrap();
        let host = Host::at(&self.root);
        let (mut out, mut err) = (Vec::new(), Vec::new());
        let mut console = Console {
            out: &mut out,
            err: &mut err,
        };
        let mut handle = Handle(self.kernel.clone());
        let code = match arguments.command {
            Command::List(args) => command::list(&host, &mut handle, &args, &mut console),
            Command::SetupVfio(args) => command::setup(&host, handle, &args, &mut console),
            other => panic!("{other:?}"),
        };
        let text = |bytes: Vec<u8>| {
            let text = String::from_utf8(bytes).unwrap();
            // Paths are shown as on a real machine.
            text.replace(self.root.to_str().unwrap(), "")
        };
        Said {
            code,
            out: text(out),
            err: text(err),
        }
    }

    fn setup(&self, words: &[&str]) -> Said {
        self.run(&[&["setup-vfio"], words].concat())
    }

    #[track_caller]
    fn untouched(&self) {
        assert_eq!(self.log(), [""; 0]);
    }

    // ---- what users of a disk do ----

    fn mount(&self, process: &str, device: &str, source: &str, at: &str) {
        let path = self.at("proc").join(process).join("mountinfo");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        text.push_str(&format!(
            "30 1 {device} / {at} rw,relatime shared:1 - ext4 {source} rw\n"
        ));
        write(path, &text);
    }

    fn mount_here(&self, name: &str, at: &str) {
        self.mount("self", &number(name), &format!("/dev/{name}"), at);
    }

    fn process(&self, pid: u32, command: &str, namespace: u32) -> PathBuf {
        let folder = self.at("proc").join(pid.to_string());
        write(folder.join("comm"), &format!("{command}\n"));
        write(folder.join("maps"), "");
        write(folder.join("mountinfo"), "");
        link(format!("mnt:[{namespace}]"), folder.join("ns/mnt"));
        fs::create_dir_all(folder.join("fd")).unwrap();
        folder
    }

    fn open(&self, pid: u32, command: &str, node: &str) {
        let folder = self.process(pid, command, 1);
        link(self.at("dev").join(node), folder.join("fd/3"));
        link("/tmp/a file", folder.join("fd/4"));
        link("socket:[1234]", folder.join("fd/5"));
    }

    /// A device above another.
    fn hold(&self, name: &str, holder: &str, files: &[(&str, &str)]) {
        let kernel = self.kernel();
        let folder = kernel.at("sys/devices/virtual/block").join(holder);
        if !folder.exists() {
            kernel.add_block(&folder, holder, 1000);
        }
        for (file, text) in files {
            write(folder.join(file), text);
        }
        link(
            &folder,
            kernel
                .at("sys/class/block")
                .join(name)
                .join("holders")
                .join(holder),
        );
    }

    fn lvm(&self, name: &str, holder: &str, volume: &str) {
        self.hold(
            name,
            holder,
            &[("dm/name", volume), ("dm/uuid", "LVM-abcdef\n")],
        );
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.root);
    }
}

const BOUND: &str = "0000:5e:00.0: bound to vfio-pci (before: nvme): /dev/vfio/12\n";
const RECORD: &str = r#"{"address":"0000:5e:00.0","driver":"nvme","model":"Fine SSD 3.8 TB","serial":"S4EWA","size":4096000000,"namespaces":["nvme0n1"]}"#;

fn bind_steps() -> Vec<String> {
    vec![
        format!("save run/tandem/vfio/{A}.json {RECORD}"),
        format!("write sys/bus/pci/devices/{A}/driver_override vfio-pci"),
        format!("write sys/bus/pci/drivers/nvme/unbind {A}"),
        format!("write sys/bus/pci/drivers_probe {A}"),
    ]
}

fn unbind_steps() -> Vec<String> {
    vec![
        format!("write sys/bus/pci/devices/{A}/driver_override \\n"),
        format!("write sys/bus/pci/drivers/vfio-pci/unbind {A}"),
        format!("write sys/bus/pci/drivers/nvme/bind {A}"),
        format!("remove run/tandem/vfio/{A}.json"),
    ]
}

// ---- bind ----

#[test]
fn bind_of_a_free_ssd_records_it_and_writes_override_unbind_probe() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.setup(&["bind", "5e:00.0"]).is(BOUND);
    assert_eq!(machine.log(), bind_steps());
    assert_eq!(machine.driver(A).as_deref(), Some("vfio-pci"));
}

#[test]
fn bind_without_the_driver_loads_it_first() {
    let machine = Machine::with(&[ssd_a()]);
    machine.setup(&["bind", A]).is(BOUND);
    let mut steps = bind_steps();
    steps.insert(1, "run modprobe vfio-pci".to_owned());
    steps.insert(2, "run modprobe vfio_iommu_type1".to_owned());
    assert_eq!(machine.log(), steps);
}

#[test]
fn bind_of_one_leaves_every_other_alone() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    machine.setup(&["bind", A]).is(BOUND);
    assert_eq!(machine.driver(B).as_deref(), Some("nvme"));
    assert!(machine.log().iter().all(|line| !line.contains(B)));
}

#[test]
fn bind_again_says_already_bound_and_writes_nothing() {
    let machine = Machine::bound();
    machine
        .setup(&["bind", A, "5e:00.0"])
        .is("0000:5e:00.0: already bound to vfio-pci: /dev/vfio/12\n");
    machine.untouched();
}

#[test]
fn bind_while_another_process_holds_the_bound_device_is_still_already_bound() {
    let machine = Machine::bound();
    machine.open(PID, "tandem", "vfio/12");
    machine
        .setup(&["bind", A])
        .is("0000:5e:00.0: already bound to vfio-pci: /dev/vfio/12\n");
}

#[test]
fn bind_by_serial_finds_the_ssd_also_when_it_is_bound() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    machine.setup(&["bind", "serial=S4EWA"]).is(BOUND);
    machine
        .setup(&["bind", "serial=S4EWA"])
        .is("0000:5e:00.0: already bound to vfio-pci: /dev/vfio/12\n");
}

#[test]
fn bind_by_a_serial_that_is_not_there_names_those_that_are() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    machine.setup(&["bind", "serial=S4EW"]).failed(
        "serial=S4EW: no NVMe controller has this serial number; known are: S4EWA, S4EWB\n",
    );
    machine.untouched();
}

#[test]
fn bind_by_a_serial_that_two_have_asks_for_an_address() {
    let mut twin = ssd_b();
    twin.serial = "S4EWA";
    let machine = Machine::with_vfio(&[ssd_a(), twin]);
    machine.setup(&["bind", "serial=S4EWA"]).failed(
        "serial=S4EWA: several have this serial number, name one: 0000:5e:00.0, 0000:5f:00.0\n",
    );
    machine.untouched();
}

#[test]
fn bind_of_a_function_that_is_no_nvme_controller_is_refused_with_its_class() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine
        .kernel()
        .add_function("0000:00:1f.2", "0x010601\n", Some(3));
    machine
        .setup(&["bind", "00:1f.2"])
        .failed("0000:00:1f.2: refused: it is no NVMe controller (its class is 0x010601)\n");
    for command in ["unbind", "reset"] {
        assert_eq!(machine.setup(&[command, "00:1f.2"]).code, 1);
    }
    machine.untouched();
}

#[test]
fn bind_of_an_address_with_no_function_says_so() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine
        .setup(&["bind", "7f:00.0"])
        .failed("0000:7f:00.0: there is no PCI function at this address\n");
}

#[test]
fn bind_of_two_of_which_one_is_in_use_binds_the_other_and_fails() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    machine.mount_here("nvme1n1", "/data");
    let said = machine.setup(&["bind", A, B]);
    assert_eq!(
        said,
        Said {
            code: 1,
            out: BOUND.to_owned(),
            err: "0000:5f:00.0: refused: nvme1n1 is mounted at /data\n".to_owned(),
        }
    );
    assert_eq!(machine.log(), bind_steps());
}

// ---- in use ----

#[test]
fn bind_of_the_root_disk_is_refused_naming_partition_and_place() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.mount_here("nvme0n1p2", "/");
    machine
        .setup(&["bind", A])
        .refused("nvme0n1p2 is mounted at /");
    machine.untouched();
}

#[test]
fn bind_names_everything_that_uses_the_disk() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.mount_here("nvme0n1p1", "/boot");
    machine.mount_here("nvme0n1p2", r"/my\040data");
    machine.open(PID, "dd", "nvme0n1p2");
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1p1 is mounted at /boot\n{A}: refused: nvme0n1p2 is mounted at /my data\n\
         {A}: refused: /dev/nvme0n1p2 is open in pid {PID} (dd)\n"
    ));
}

#[test]
fn bind_is_refused_through_lvm_on_crypt_on_a_partition() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.hold(
        "nvme0n1p2",
        "dm-0",
        &[
            ("dm/name", "secret\n"),
            ("dm/uuid", "CRYPT-LUKS2-1-secret\n"),
        ],
    );
    machine.lvm("dm-0", "dm-1", "vg-root");
    machine.mount("self", &number("dm-1"), "/dev/mapper/vg-root", "/");
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1p2 > dm-0 (CRYPT secret) > dm-1 (LVM vg-root) is mounted at /\n\
         {A}: refused: nvme0n1p2 is part of dm-0 (CRYPT secret)\n\
         {A}: refused: nvme0n1p2 > dm-0 (CRYPT secret) is part of dm-1 (LVM vg-root)\n"
    ));
    machine.untouched();
}

#[test]
fn bind_is_refused_while_a_logical_volume_stands_on_it_that_nobody_mounted() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.lvm("nvme0n1", "dm-0", "vg-data");
    machine
        .setup(&["bind", A])
        .refused("nvme0n1 is part of dm-0 (LVM vg-data)");
}

#[test]
fn bind_of_a_raid_member_is_refused_and_the_raids_partitions_are_followed() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    for disk in ["nvme0n1", "nvme1n1"] {
        machine.hold(disk, "md0", &[("md/level", "raid1\n")]);
    }
    let part = machine.at("sys/devices/virtual/block/md0/md0p1");
    machine.kernel().add_block(&part, "md0p1", 500);
    write(part.join("partition"), "1\n");
    machine.mount_here("md0p1", "/srv");
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1 > md0p1 is mounted at /srv\n{A}: refused: nvme0n1 is part of md0 (md raid1)\n"
    ));
}

#[test]
fn bind_ends_when_holders_go_in_a_circle() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.lvm("nvme0n1", "dm-0", "a");
    machine.lvm("dm-0", "dm-1", "b");
    machine.lvm("dm-1", "dm-0", "a");
    assert_eq!(machine.setup(&["bind", A]).code, 1);
}

#[test]
fn bind_of_swap_space_is_refused() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.lvm("nvme0n1p1", "dm-0", "vg-swap");
    write(
        machine.at("proc/swaps"),
        "Filename\tType\tSize\n/dev/nvme0n1p2                          partition\t1\n/dev/dm-0 partition 1\n/dev/sda2 partition 1\n",
    );
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1p2 is swap space\n\
         {A}: refused: nvme0n1p1 > dm-0 (LVM vg-swap) is swap space\n\
         {A}: refused: nvme0n1p1 is part of dm-0 (LVM vg-swap)\n"
    ));
}

#[test]
fn bind_is_refused_while_a_loop_device_uses_it() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    let folder = machine.at("sys/devices/virtual/block/loop3");
    machine.kernel().add_block(&folder, "loop3", 9);
    write(folder.join("loop/backing_file"), "/dev/nvme0n1p1\n");
    machine.mount_here("loop3", "/mnt");
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1p1 > loop3 (loop device) is mounted at /mnt\n\
         {A}: refused: nvme0n1p1 is part of loop3 (loop device)\n"
    ));
}

#[test]
fn bind_of_the_second_device_of_a_btrfs_is_refused() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    // btrfs makes up a device number and names only its first device.
    machine.mount("self", "0:45", "/dev/nvme1n1", "/pool");
    for disk in ["nvme0n1p1", "nvme1n1"] {
        link("x", machine.at("sys/fs/btrfs/11-22/devices").join(disk));
    }
    machine
        .setup(&["bind", A])
        .refused("nvme0n1p1 is part of the mounted btrfs file system 11-22");
    machine.setup(&["bind", B]).failed(&format!(
        "{B}: refused: nvme1n1 is mounted at /pool\n\
         {B}: refused: nvme1n1 is part of the mounted btrfs file system 11-22\n"
    ));
}

#[test]
fn bind_is_refused_while_the_kernels_nvme_target_exports_a_partition_or_the_controller() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    let target = machine.at("sys/kernel/config/nvmet/subsystems/shelf");
    for (place, device, enable) in [
        ("namespaces/1", "/dev/nvme0n1p1", "1\n"),
        ("namespaces/2", "/dev/nvme0n1p2", "0\n"),
        ("passthru", "/dev/nvme0", "1\n"),
    ] {
        write(
            target.join(place).join("device_path"),
            &format!("{device}\n"),
        );
        write(target.join(place).join("enable"), enable);
    }
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1p1 is part of the kernel's NVMe target shelf\n\
         {A}: refused: nvme0 is part of the kernel's NVMe target shelf\n"
    ));
    machine.untouched();
}

#[test]
fn bind_is_refused_for_a_mount_in_another_namespace_naming_its_process() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.process(PID, "containerd", 2);
    machine.mount(
        &PID.to_string(),
        &number("nvme0n1p1"),
        "/dev/whatever",
        "/data",
    );
    machine.setup(&["bind", A]).refused(&format!(
        "nvme0n1p1 is mounted at /data in the mount namespace of pid {PID} (containerd)"
    ));
}

#[test]
fn bind_names_a_mount_once_that_many_namespaces_share() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.mount_here("nvme0n1p1", "/");
    for (pid, namespace) in [(PID, 1), (PID + 1, 2), (PID + 2, 2), (PID + 3, 3)] {
        machine.process(pid, "service", namespace);
        machine.mount(
            &pid.to_string(),
            &number("nvme0n1p1"),
            "/dev/nvme0n1p1",
            "/",
        );
    }
    machine.setup(&["bind", A]).refused(&format!(
        "nvme0n1p1 is mounted at /, also in 2 other mount namespaces, one of them of pid {} (service)",
        PID + 1
    ));
}

#[test]
fn bind_is_refused_for_each_sort_of_open_device_file() {
    for node in ["nvme0n1", "nvme0n1p2", "nvme0", "ng0n1"] {
        let machine = Machine::with_vfio(&[ssd_a()]);
        machine.open(PID, "smartd", node);
        machine
            .setup(&["bind", A])
            .refused(&format!("/dev/{node} is open in pid {PID} (smartd)"));
        machine.untouched();
    }
}

#[test]
fn bind_is_refused_for_a_device_that_is_only_mapped_or_deleted_from_dev() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    let dev = machine.at("dev/nvme0n1");
    let mapper = machine.process(PID, "db", 1);
    write(
        mapper.join("maps"),
        &format!("7f00-7f01 rw-s 00000000 00:05 300      {}\n", dev.display()),
    );
    let opener = machine.process(PID + 1, "old", 1);
    link(format!("{} (deleted)", dev.display()), opener.join("fd/0"));
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: /dev/nvme0n1 is open in pid {PID} (db)\n{A}: refused: /dev/nvme0n1 is open in pid {} (old)\n",
        PID + 1
    ));
}

#[test]
fn bind_sees_files_of_threads_whose_first_thread_has_ended() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.process(PID, "db", 1);
    for thread in [PID, PID + 7] {
        let folder = machine.process(PID, "db", 1).join(format!("task/{thread}"));
        fs::create_dir_all(folder.join("fd")).unwrap();
        write(folder.join("maps"), "");
        link("mnt:[1]", folder.join("ns/mnt"));
    }
    let fd = machine.at(&format!("proc/{PID}/task/{}/fd/3", PID + 7));
    link(machine.at("dev/nvme0n1"), fd);
    machine
        .setup(&["bind", A])
        .refused(&format!("/dev/nvme0n1 is open in pid {PID} (db)"));
}

#[test]
fn bind_while_a_process_cannot_be_looked_into_is_refused() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    let folder = machine.process(PID, "hidden", 1);
    fs::remove_dir(folder.join("fd")).unwrap();
    write(folder.join("fd"), "");
    machine.setup(&["bind", "--force-data", A]).refused(&format!(
        "the open files of 1 processes cannot be seen (the first is pid {PID}): run this as root, with CAP_SYS_PTRACE"
    ));
    machine.untouched();
    // One that ends meanwhile hides nothing.
    fs::remove_file(folder.join("fd")).unwrap();
    machine.setup(&["bind", A]).is(BOUND);
}

#[test]
fn bind_while_the_kernel_claims_the_disk_for_what_no_table_shows_is_refused() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().claimed = vec!["nvme0n1"];
    machine.setup(&["bind", "--force-data", A]).refused(
        "the kernel has nvme0n1 claimed for something that /proc and /sys do not show (a ZFS pool, a SCSI \
         target, a mount namespace without a process)",
    );
    machine.untouched();
}

#[test]
fn bind_with_force_data_still_refuses_what_is_in_use() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.mount_here("nvme0n1p1", "/a");
    machine.lvm("nvme0n1p2", "dm-0", "vg");
    machine.open(PID, "dd", "nvme0n1");
    write(
        machine.at("proc/swaps"),
        "Filename\n/dev/nvme0n1p2 partition\n",
    );
    let said = machine.setup(&["bind", "--force-data", A]);
    assert_eq!(
        (said.code, said.err.lines().count()),
        (1, 4),
        "{}",
        said.err
    );
    machine.untouched();
}

#[test]
fn bind_of_native_multipath_looks_at_the_subsystems_disk() {
    let mut ssd = ssd_a();
    ssd.disks = vec![("nvme0c0n1", vec!["nvme0n1p1"])];
    let machine = Machine::with_vfio(std::slice::from_ref(&ssd));
    machine.mount_here("nvme0n1p1", "/data");
    machine
        .setup(&["bind", A])
        .refused("nvme0n1p1 is mounted at /data");

    // Another controller keeps the disk.
    let free = Machine::with_vfio(&[ssd]);
    free.setup(&["bind", A]).is(&format!(
        "{BOUND}{A}: beware: the kernel still has nvme0n1 through another controller of the same SSD\n"
    ));
    assert!(
        free.log()[0].contains(r#""namespaces":["nvme0n1"]"#),
        "{:?}",
        free.log()
    );
}

#[test]
fn bind_of_both_controllers_of_one_disk_claims_it_once() {
    let mut first = ssd_a();
    first.disks = vec![("nvme0c0n1", vec![])];
    let mut second = ssd_b();
    second.disks = vec![("nvme0c1n1", vec![])];
    let machine = Machine::with_vfio(&[first, second]);
    machine.kernel().claims_once = true;
    assert_eq!(machine.setup(&["bind", A, B]).code, 0);
}

#[test]
fn bind_of_a_controller_that_shows_no_paths_looks_at_all_disks_of_its_subsystem() {
    let mut ssd = ssd_a();
    ssd.disks = vec![];
    let machine = Machine::with_vfio(&[ssd]);
    let subsystem = machine.at("sys/devices/virtual/nvme-subsystem/nvme-subsys0");
    machine
        .kernel()
        .add_block(&subsystem.join("nvme0n1"), "nvme0n1", 1000);
    link(machine.at("x"), subsystem.join("nvme0"));
    link(
        &subsystem,
        machine.at("sys/class/nvme-subsystem/nvme-subsys0"),
    );
    machine.mount_here("nvme0n1", "/data");
    machine
        .setup(&["bind", A])
        .refused("nvme0n1 is mounted at /data");
}

// ---- data ----

const EXT4: &str = r#"{"signatures": [{"device":"nvme0n1p1","offset":"0x438","type":"ext4","uuid":"1","label":"data"}]}"#;
const GPT: &str = r#"{"signatures": [{"device":"nvme0n1","offset":"0x200","type":"gpt","uuid":null,"label":null}]}"#;

#[test]
fn bind_of_a_disk_with_signatures_is_refused_naming_them_and_force_data_takes_it() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().wipefs = BTreeMap::from([
        ("dev/nvme0n1", (GPT, true)),
        ("dev/nvme0n1p1", (EXT4, true)),
    ]);
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1 holds gpt (--force-data: take it all the same)\n\
         {A}: refused: nvme0n1p1 holds ext4 \"data\" (--force-data: take it all the same)\n"
    ));
    machine.untouched();
    machine.setup(&["bind", "--force-data", A]).is(BOUND);
}

#[test]
fn bind_without_wipefs_is_refused_naming_it() {
    let machine = Machine::with_vfio(&[ssd_b()]);
    machine.kernel().missing = vec!["wipefs"];
    machine.setup(&["bind", B]).failed(&format!(
        "{B}: refused: the program `wipefs` is missing (package util-linux), so whether it holds data cannot be told \
         (--force-data: take it all the same)\n"
    ));
    machine.untouched();
}

#[test]
fn bind_when_wipefs_fails_or_babbles_is_refused() {
    for (answer, reason) in [
        (
            ("", false),
            "wipefs cannot look at /dev/nvme1n1: Input/output error",
        ),
        (
            ("what?", true),
            "wipefs said of /dev/nvme1n1 what is not understood: expected value at line 1 column 1",
        ),
    ] {
        let machine = Machine::with_vfio(&[ssd_b()]);
        machine.kernel().wipefs = BTreeMap::from([("dev/nvme1n1", answer)]);
        machine.setup(&["bind", B]).failed(&format!(
            "{B}: refused: {reason}, so whether it holds data cannot be told (--force-data: take it all the same)\n"
        ));
        machine.untouched();
    }
}

#[test]
fn bind_of_a_disk_that_nobody_can_look_at_is_refused() {
    let machine = Machine::with_vfio(&[ssd_b()]);
    let tail = "so whether it holds data cannot be told (--force-data: take it all the same)\n";
    write(machine.at("sys/class/block/nvme1n1/size"), "0\n");
    machine.setup(&["bind", B]).failed(&format!(
        "{B}: refused: nvme1n1 has a format that the kernel cannot read, {tail}"
    ));
    let state = machine.kernel().function(B).join("nvme/nvme1/state");
    write(state, "dead\n");
    machine.setup(&["bind", B]).failed(&format!(
        "{B}: refused: the kernel's controller is dead, {tail}"
    ));
    machine.kernel().unbind(B);
    machine
        .setup(&["bind", B])
        .failed(&format!("{B}: refused: no driver has it, {tail}"));
    machine.kernel().set_driver(B, "uio_pci_generic");
    machine.setup(&["bind", B]).failed(&format!(
        "{B}: refused: the driver uio_pci_generic has it, {tail}"
    ));
    machine.untouched();
}

// ---- the IOMMU ----

#[test]
fn bind_without_an_iommu_says_how_to_enable_it() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    fs::remove_file(machine.kernel().function(A).join("iommu_group")).unwrap();
    machine.setup(&["bind", A]).refused(
        "it is in no IOMMU group: no IOMMU is on; put intel_iommu=on (Intel) or `amd_iommu=on iommu=pt` (AMD) on the \
         kernel command line, and enable VT-d (Intel) or AMD-Vi (AMD, often called IOMMU) in the firmware; or, at the \
         risk of all memory of this machine, load the module vfio with enable_unsafe_noiommu_mode=1 and give \
         --unsafe-noiommu",
    );
    machine.untouched();
    let list = machine.run(&["list"]).out;
    assert!(
        list.contains(
            "-> cannot: it is in no IOMMU group: no IOMMU is on\nFor an IOMMU, put intel_iommu=on"
        ),
        "{list}"
    );
}

#[test]
fn bind_in_no_iommu_mode_is_refused_also_when_it_is_bound_already() {
    let reason = "its IOMMU group is of VFIO's no-IOMMU mode: the SSD could write to any memory of the machine";
    let machine = Machine::with_vfio(&[ssd_a()]);
    write(
        machine.at("sys/kernel/iommu_groups/12/name"),
        "vfio-noiommu\n",
    );
    machine.setup(&["bind", A]).refused(reason);
    machine.kernel().set_driver(A, "vfio-pci");
    machine.setup(&["bind", A]).refused(reason);
    machine.untouched();
    let list = machine.run(&["list"]).out;
    let serve = format!(
        "  {reason}\n  -> serve it: --device pci:{A} --unsafe-noiommu, at the risk of all memory\n"
    );
    assert!(list.contains(&serve), "{list}");
    // Whoever insists has it bound already.
    let said = machine.setup(&["bind", "--unsafe-noiommu", A]).out;
    assert!(
        said.contains(&format!("{A}: already bound to vfio-pci: "))
            && said.contains("noiommu-12\n")
            && said.contains(&format!("{A}: UNSAFE, NO IOMMU: ")),
        "{said}"
    );
}

#[test]
fn bind_without_an_iommu_for_those_who_insist_says_what_is_missing_in_the_kernel() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    fs::remove_file(machine.kernel().function(A).join("iommu_group")).unwrap();
    let bind = |reason: &str| {
        let reason = format!("it is in no IOMMU group: no IOMMU is on, and {reason}");
        machine
            .setup(&["bind", "--unsafe-noiommu", A])
            .refused(&reason);
    };
    let module = machine.at("sys/module/vfio");
    let parameter = module.join("parameters/enable_unsafe_noiommu_mode");
    bind("VFIO's no-IOMMU mode is not on: modprobe vfio enable_unsafe_noiommu_mode=1");
    fs::create_dir_all(module.join("parameters")).unwrap();
    bind("this kernel's VFIO has no mode without one (it was built without CONFIG_VFIO_NOIOMMU)");
    write(parameter.clone(), "N\n");
    bind(
        "VFIO's no-IOMMU mode is off: write 1 to /sys/module/vfio/parameters/enable_unsafe_noiommu_mode",
    );
    machine.untouched();
    // On: the checks that remain are the others.
    write(parameter, "Y\n");
    let said = machine
        .setup(&["bind", "--unsafe-noiommu", "--dry-run", A])
        .out;
    assert!(
        said.contains("driver_override vfio-pci") && said.contains("drivers_probe"),
        "{said}"
    );
    // A user without root could not open it.
    let words = [
        "tandem",
        "setup-vfio",
        "bind",
        "--unsafe-noiommu",
        "--user",
        "root",
        A,
    ];
    assert!(Cli::try_parse_from(words).is_err());
}

#[test]
fn bind_with_a_sibling_in_use_names_its_address_driver_and_disks() {
    let mut sibling = ssd_b();
    sibling.group = 12;
    let machine = Machine::with_vfio(&[ssd_a(), sibling]);
    let kernel = machine.kernel();
    kernel.add_function("0000:5d:00.0", "0x060400\n", Some(12));
    kernel.set_driver("0000:5d:00.0", "pcieport");
    kernel.add_function("0000:60:00.0", "0x020000\n", Some(12));
    kernel.set_driver("0000:60:00.0", "vfio-pci");
    kernel.add_function("0000:61:00.0", "0x020000\n", Some(12));
    kernel.set_driver("0000:61:00.0", "ixgbe");
    kernel.add_function("0000:62:00.0", "0x020000\n", Some(12));
    kernel.set_driver("0000:62:00.0", "pci-stub");
    kernel.add_function("0000:63:00.0", "0x020000\n", Some(12));
    drop(kernel);
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: IOMMU group 12 also has {B}, which the driver nvme uses (nvme1n1): VFIO takes a group only whole\n\
         {A}: refused: IOMMU group 12 also has 0000:61:00.0, which the driver ixgbe uses: VFIO takes a group only whole\n"
    ));
    machine.untouched();
}

fn two_in_one_group() -> Machine {
    let mut sibling = ssd_b();
    sibling.group = 12;
    Machine::with_vfio(&[ssd_a(), sibling])
}

#[test]
fn bind_of_all_ssds_of_a_group_at_once_binds_them() {
    let machine = two_in_one_group();
    let said = machine.setup(&["bind", B, A]);
    said.is(&format!(
        "{BOUND}{B}: bound to vfio-pci (before: nvme): /dev/vfio/12\n"
    ));
}

#[test]
fn bind_of_all_ssds_of_a_group_when_one_is_in_use_binds_none() {
    let machine = two_in_one_group();
    machine.mount_here("nvme1n1", "/data");
    machine.setup(&["bind", A, B]).failed(&format!(
        "{A}: refused: IOMMU group 12 also has {B}, which the driver nvme uses (nvme1n1): VFIO takes a group only whole\n\
         {B}: refused: nvme1n1 is mounted at /data\n"
    ));
    machine.untouched();
}

#[test]
fn bind_of_all_ssds_of_a_group_when_one_fails_takes_the_other_back() {
    let machine = two_in_one_group();
    machine.kernel().ssds.get_mut(B).unwrap().group = 99; // its /dev/vfio file appears under another name
    machine.setup(&["bind", B, A]).failed(&format!(
        "{A}: {B} of the same IOMMU group stayed with nvme, so this one goes back\n\
         {A}: rolled back: its driver is nvme\n\
         {B}: vfio-pci has it, but /dev/vfio/12 did not appear\n{B}: rolled back: its driver is nvme\n"
    ));
}

// ---- roll-back ----

#[test]
fn bind_that_vfio_refuses_goes_back_to_the_driver_before() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    machine.kernel().refusing_drivers = vec!["vfio-pci"];
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: vfio-pci did not take it: its driver is none (dmesg says why)\n{A}: rolled back: its driver is nvme\n"
    ));
    let mut steps = bind_steps();
    steps.extend([
        format!("write sys/bus/pci/devices/{A}/driver_override \\n"),
        format!("write sys/bus/pci/drivers/nvme/bind {A}"),
        format!("remove run/tandem/vfio/{A}.json"),
    ]);
    assert_eq!(machine.log(), steps);
    assert_eq!(machine.driver(A).as_deref(), Some("nvme"));
}

#[test]
fn bind_whose_every_write_may_fail_ends_with_the_driver_before() {
    for (failing, why) in [
        ("drivers/nvme/unbind", "/sys/bus/pci/drivers/nvme/unbind"),
        ("drivers_probe", "/sys/bus/pci/drivers_probe"),
    ] {
        let machine = Machine::with_vfio(&[ssd_a()]);
        machine.kernel().failing_writes = vec![failing];
        machine.setup(&["bind", A]).failed(&format!(
            "{A}: cannot write {A} to {why}: the kernel says no\n{A}: rolled back: its driver is nvme\n"
        ));
        assert_eq!(machine.driver(A).as_deref(), Some("nvme"));
        assert!(!machine.at(&format!("run/tandem/vfio/{A}.json")).exists());
    }
}

#[test]
fn bind_whose_override_cannot_be_written_leaves_the_driver() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().failing_writes = vec!["driver_override"];
    let path = format!("/sys/bus/pci/devices/{A}/driver_override");
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: cannot write vfio-pci to {path}: the kernel says no\n\
         {A}: while rolling back: cannot write \\n to {path}: the kernel says no\n\
         {A}: rolled back: its driver is nvme\n"
    ));
}

#[test]
fn bind_without_the_module_touches_no_driver() {
    let machine = Machine::with(&[ssd_a()]);
    machine.kernel().failing_programs = vec!["modprobe"];
    let said = machine.setup(&["bind", A]);
    assert!(
        said.err.starts_with(&format!(
            "{A}: cannot load the module vfio-pci: no such module\n"
        )),
        "{}",
        said.err
    );
    assert_eq!((said.code, machine.driver(A).as_deref()), (1, Some("nvme")));
    assert!(machine.log().iter().all(|line| !line.contains("unbind")));
}

#[test]
fn bind_that_can_go_neither_on_nor_back_says_what_to_do_and_keeps_the_record() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().refusing_drivers = vec!["vfio-pci", "nvme"];
    let said = machine.setup(&["bind", A]);
    assert!(
        said.err.ends_with(&format!(
            "{A}: not rolled back: its driver is none, try: scripts/setup-vfio unbind {A}\n"
        )),
        "{}",
        said.err
    );
    machine.kernel().refusing_drivers.clear();
    machine.setup(&["unbind", A]).is(&format!(
        "{A}: bound to nvme: nvme0 is live, its disks: /dev/nvme0n1\n"
    ));
}

#[test]
fn bind_of_what_was_lost_half_way_keeps_the_record_of_where_it_belongs() {
    let machine = Machine::bound();
    machine.kernel().unbind(A);
    assert_eq!(machine.setup(&["bind", "--force-data", A]).code, 0);
    machine.setup(&["unbind", A]).is(&format!(
        "{A}: bound to nvme: nvme0 is live, its disks: /dev/nvme0n1\n"
    ));
}

#[test]
fn bind_that_fails_leaves_a_rule_of_before() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    let before = format!("{}\n", rule(A));
    write(machine.at(RULES), &before);
    machine.kernel().refusing_drivers = vec!["vfio-pci"];
    assert_eq!(machine.setup(&["bind", A]).code, 1);
    assert_eq!(fs::read_to_string(machine.at(RULES)).unwrap(), before);
}

#[test]
fn bind_names_siblings_besides_users() {
    let machine = two_in_one_group();
    machine.mount_here("nvme0n1p1", "/data");
    machine.setup(&["bind", A]).failed(&format!(
        "{A}: refused: nvme0n1p1 is mounted at /data\n\
         {A}: refused: IOMMU group 12 also has {B}, which the driver nvme uses (nvme1n1): VFIO takes a group only whole\n"
    ));
}

// ---- --all-unused ----

#[test]
fn bind_all_unused_binds_the_unused_and_says_why_it_left_the_others() {
    let mut with_data = ssd_b();
    with_data.address = "0000:60:00.0";
    with_data.group = 14;
    with_data.controller = "nvme2";
    with_data.serial = "S4EWC";
    with_data.disks = vec![("nvme2n1", vec![])];
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b(), with_data]);
    machine.mount_here("nvme1n1", "/data");
    machine.kernel().wipefs = BTreeMap::from([("dev/nvme2n1", (GPT, true))]);
    machine.setup(&["bind", "--all-unused"]).is(&format!(
        "{BOUND}{B}: left alone: nvme1n1 is mounted at /data\n\
         0000:60:00.0: left alone: nvme2n1 holds gpt (--force-data: take it all the same)\n"
    ));
    assert_eq!(machine.log(), bind_steps());
}

#[test]
fn bind_all_unused_that_fails_on_the_way_is_a_failure() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().refusing_drivers = vec!["vfio-pci"];
    assert_eq!(machine.setup(&["bind", "--all-unused"]).code, 1);
}

// ---- --dry-run ----

#[test]
fn bind_dry_run_prints_the_steps_that_bind_takes_and_takes_none() {
    let machine = Machine::with(&[ssd_a()]);
    let said = machine.setup(&["bind", "--dry-run", "--user", "alice", A]);
    machine.untouched();
    assert_eq!(machine.driver(A).as_deref(), Some("nvme"));
    assert_eq!(machine.setup(&["bind", "--user", "alice", A]).code, 0);
    let taken: String = machine
        .log()
        .iter()
        .map(|line| format!("would {line}\n"))
        .collect();
    // The log has no slash before paths.
    said.is(&[" sys/", " run/", " dev/", " etc/"]
        .iter()
        .fold(taken, |text, folder| {
            text.replace(folder, &folder.replace(' ', " /"))
        }));
}

#[test]
fn bind_dry_run_refuses_what_bind_refuses() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.mount_here("nvme0n1p2", "/");
    machine
        .setup(&["bind", "--dry-run", A])
        .refused("nvme0n1p2 is mounted at /");
}

#[test]
fn unbind_dry_run_prints_the_steps_that_unbind_takes() {
    let machine = Machine::bound();
    let steps: String = unbind_steps()
        .iter()
        .map(|line| {
            format!(
                "would {}\n",
                line.replace(" sys/", " /sys/").replace(" run/", " /run/")
            )
        })
        .collect();
    machine.setup(&["unbind", "--dry-run", A]).is(&steps);
    machine.untouched();
}

// ---- unbind ----

#[test]
fn unbind_restores_the_driver_and_says_which_disks_came_back() {
    let machine = Machine::bound();
    machine.setup(&["unbind", A]).is(&format!(
        "{A}: bound to nvme: nvme0 is live, its disks: /dev/nvme0n1\n"
    ));
    assert_eq!(machine.log(), unbind_steps());
}

#[test]
fn unbind_again_says_already_bound_and_writes_nothing() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine
        .setup(&["unbind", A])
        .is(&format!("{A}: already bound to nvme\n"));
    machine.untouched();
}

#[test]
fn unbind_of_what_went_back_by_itself_clears_what_bind_left() {
    let machine = Machine::bound();
    {
        let mut kernel = machine.kernel();
        kernel.unbind(A);
        kernel.bind(A, "nvme").unwrap();
    }
    machine
        .setup(&["unbind", A])
        .is(&format!("{A}: already bound to nvme\n"));
    assert_eq!(
        machine.log(),
        [
            format!("write sys/bus/pci/devices/{A}/driver_override \\n"),
            format!("remove run/tandem/vfio/{A}.json"),
        ]
    );
}

#[test]
fn unbind_while_a_process_holds_the_group_names_it_and_refuses() {
    let machine = Machine::bound();
    machine.open(PID, "qemu-system-x86", "vfio/12");
    machine.setup(&["unbind", A]).refused(&format!(
        "/dev/vfio/12 is open in pid {PID} (qemu-system-x86)"
    ));
    machine.untouched();
}

#[test]
fn unbind_while_a_process_kept_only_the_device_names_it_and_refuses() {
    let machine = Machine::bound();
    let folder = machine.process(PID, "tandem", 1);
    link("anon_inode:[vfio-device]", folder.join("fd/9"));
    machine.setup(&["unbind", A]).refused(&format!(
        "a VFIO device, maybe this one, is open in pid {PID} (tandem)"
    ));
    write(
        folder.join("fdinfo/9"),
        &format!("pos:\t0\nvfio-device-syspath: /sys/devices/pci0000:5d/{A}\n"),
    );
    machine.setup(&["unbind", A]).refused(&format!(
        "the VFIO device {A} is open in pid {PID} (tandem)"
    ));
    write(
        folder.join("fdinfo/9"),
        &format!("vfio-device-syspath: /sys/devices/pci0000:5d/{B}\n"),
    );
    assert_eq!(machine.setup(&["unbind", A]).code, 0);
}

#[test]
fn unbind_while_a_process_has_another_groups_device_is_done() {
    let machine = Machine::bound();
    machine.open(PID, "tandem", "vfio/13");
    link(
        "anon_inode:[vfio-device]",
        machine.at(&format!("proc/{PID}/fd/9")),
    );
    assert_eq!(machine.setup(&["unbind", A]).code, 0);
}

#[test]
fn unbind_without_a_record_gives_it_to_nvme() {
    let machine = Machine::bound();
    fs::remove_file(machine.at(&format!("run/tandem/vfio/{A}.json"))).unwrap();
    machine.setup(&["unbind", A]).is(&format!(
        "{A}: bound to nvme: nvme0 is live, its disks: /dev/nvme0n1\n"
    ));
}

#[test]
fn unbind_with_a_record_that_is_damaged_refuses_to_guess() {
    let machine = Machine::bound();
    write(machine.at(&format!("run/tandem/vfio/{A}.json")), "{");
    let said = machine.setup(&["unbind", A]);
    assert!(
        said.err.contains("cannot read /run/tandem/vfio"),
        "{}",
        said.err
    );
    assert_eq!(
        (said.code, machine.driver(A).as_deref()),
        (1, Some("vfio-pci"))
    );
}

#[test]
fn unbind_restores_exactly_the_driver_or_the_lack_of_one() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    machine.kernel().unbind(A);
    machine.kernel().set_driver(A, "uio_pci_generic");
    machine.kernel().unbind(B);
    assert_eq!(machine.setup(&["bind", "--force-data", A, B]).code, 0);
    machine.setup(&["unbind", A, B]).is(&format!(
        "{A}: bound to uio_pci_generic\n{B}: released from vfio-pci; it has no driver, as before\n"
    ));
    assert_eq!(machine.driver(A).as_deref(), Some("uio_pci_generic"));
    assert_eq!(machine.driver(B), None);
}

#[test]
fn unbind_of_what_another_driver_has_is_refused() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().set_driver(A, "uio_pci_generic");
    machine.setup(&["unbind", A]).refused(
        "its driver is uio_pci_generic, neither vfio-pci nor nvme: whoever bound it there must release it",
    );
    machine.untouched();
}

#[test]
fn unbind_waits_for_a_slow_controller_and_its_disks() {
    let machine = Machine::bound();
    machine.kernel().ssds.get_mut(A).unwrap().slow = 12;
    machine.setup(&["unbind", A]).is(&format!(
        "{A}: bound to nvme: nvme0 is live, its disks: /dev/nvme0n1\n"
    ));
    assert_eq!(machine.kernel().ticks, 120);
}

#[test]
fn unbind_of_a_controller_that_never_comes_ends_after_30_seconds() {
    let machine = Machine::bound();
    machine.kernel().ssds.get_mut(A).unwrap().stuck = Some("connecting");
    machine.setup(&["unbind", A]).failed(&format!(
        "{A}: bound to nvme, but after 30 s nvme0 is connecting, its disks: none (before: nvme0n1)\n"
    ));
    assert_eq!(machine.kernel().ticks, 300);
}

#[test]
fn unbind_of_a_controller_that_the_kernel_gives_up_says_so_at_once() {
    let machine = Machine::bound();
    machine.kernel().ssds.get_mut(A).unwrap().stuck = Some("dead");
    machine.setup(&["unbind", A]).failed(&format!(
        "{A}: bound to nvme, but the kernel gave nvme0 up: it is dead (see dmesg)\n"
    ));
    assert_eq!(machine.kernel().ticks, 0);
}

#[test]
fn unbind_misses_a_disk_that_was_there_before() {
    let machine = Machine::bound();
    machine.kernel().ssds.get_mut(A).unwrap().disks.clear();
    machine.setup(&["unbind", A]).failed(&format!(
        "{A}: bound to nvme, but after 30 s nvme0 is live, its disks: none (before: nvme0n1)\n"
    ));
}

// ---- reset ----

#[test]
fn reset_of_a_free_ssd_writes_1_and_says_how() {
    let machine = Machine::bound();
    machine
        .setup(&["reset", A])
        .is(&format!("{A}: reset (flr)\n"));
    assert_eq!(
        machine.log(),
        [format!("write sys/bus/pci/devices/{A}/reset 1")]
    );
    let kernels = Machine::with(&[ssd_a()]);
    kernels
        .setup(&["reset", A])
        .is(&format!("{A}: reset (flr): nvme0 is live\n"));
}

#[test]
fn reset_of_what_is_in_use_by_anyone_is_refused() {
    let mounted = Machine::with(&[ssd_a()]);
    mounted.mount_here("nvme0n1p1", "/data");
    mounted
        .setup(&["reset", A])
        .refused("nvme0n1p1 is mounted at /data");
    mounted.untouched();

    let claimed = Machine::with(&[ssd_a()]);
    claimed.kernel().claimed = vec!["nvme0n1"];
    assert_eq!(claimed.setup(&["reset", A]).code, 1);
    claimed.untouched();

    let served = Machine::bound();
    served.open(PID, "tandem", "vfio/12");
    served
        .setup(&["reset", A])
        .refused(&format!("/dev/vfio/12 is open in pid {PID} (tandem)"));
    served.untouched();
}

#[test]
fn reset_of_what_cannot_be_reset_is_refused() {
    let machine = Machine::bound();
    fs::remove_file(machine.kernel().function(A).join("reset")).unwrap();
    machine
        .setup(&["reset", A])
        .refused("the kernel knows no way to reset it (it has no reset attribute)");
}

// ---- --user ----

const RULES: &str = "etc/udev/rules.d/70-tandem-vfio.rules";

fn rule(address: &str) -> String {
    format!(
        "SUBSYSTEM==\"vfio\", TEST==\"/sys/kernel/iommu_groups/%k/devices/{address}\", OWNER=\"alice\", MODE=\"0600\""
    )
}

#[test]
fn bind_for_a_user_hands_the_group_over_now_and_by_a_rule() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    write(
        machine.at("etc/security/limits.conf"),
        "# alice hard memlock 1\nbob hard memlock 2\n*  soft memlock 65536 # all\nalice hard nofile 3\n",
    );
    let said = machine.setup(&["bind", "--user", "alice", A]);
    assert_eq!((said.code, said.err.as_str()), (0, ""));
    assert!(said.out.starts_with(&format!(
        "{BOUND}{A}: /dev/vfio/12 belongs to alice now, and whenever it is bound (/{RULES})\n"
    )));
    for line in [
        "alice: /etc/security/limits.conf has: * soft memlock 65536\n",
        "alice: for sessions, in /etc/security/limits.d/tandem.conf:  alice - memlock unlimited\n",
        "alice: for a systemd service, in its [Service] section:  LimitMEMLOCK=infinity\n",
        "alice: huge pages need no hand-over: memfd_create with MFD_HUGETLB takes free ones from any user\n",
    ] {
        assert!(said.out.contains(line), "{line} is not in {}", said.out);
    }
    assert!(!said.out.contains("memlock 1\n") && !said.out.contains("bob"));
    let log = machine.log();
    assert_eq!(
        log[log.len() - 2..],
        ["run udevadm control --reload", "chown dev/vfio/12 1000"]
    );
    let rules = fs::read_to_string(machine.at(RULES)).unwrap();
    assert_eq!(rules.lines().skip(1).collect::<Vec<_>>(), [rule(A)]);
}

#[test]
fn bind_for_a_user_again_writes_the_rule_once_and_unbind_takes_it_out() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    assert_eq!(machine.setup(&["bind", "--user", "alice", A]).code, 0);
    let once = fs::read_to_string(machine.at(RULES)).unwrap();
    machine.kernel().log.clear();
    assert_eq!(machine.setup(&["bind", "--user", "alice", A]).code, 0);
    assert_eq!(machine.log(), ["chown dev/vfio/12 1000"]);
    assert_eq!(machine.setup(&["bind", "--user", "1000", B]).code, 0);
    assert_eq!(machine.setup(&["unbind", B]).code, 0);
    assert_eq!(fs::read_to_string(machine.at(RULES)).unwrap(), once);
    assert_eq!(machine.setup(&["unbind", A]).code, 0);
    assert!(!machine.at(RULES).exists());
}

#[test]
fn bind_for_a_user_that_is_not_there_touches_nothing() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.setup(&["bind", "--user", "mallory", A]).failed(
        "setup-vfio: user `mallory` is not in /etc/passwd (of a user that is elsewhere, give the number: id -u \
         mallory)\n",
    );
    machine.untouched();
}

#[test]
fn bind_for_a_user_whose_group_cannot_be_handed_over_is_rolled_back() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().failing_chown = true;
    machine.setup(&["bind", "--user", "alice", A]).failed(&format!(
        "{A}: cannot give /dev/vfio/12 to alice: permission denied\n{A}: rolled back: its driver is nvme\n"
    ));
    assert!(!machine.at(RULES).exists());
    assert_eq!(machine.driver(A).as_deref(), Some("nvme"));
}

#[test]
fn bind_for_a_user_without_udev_still_hands_over() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().missing = vec!["udevadm"];
    assert_eq!(machine.setup(&["bind", "--user", "alice", A]).code, 0);
    assert_eq!(machine.log().last().unwrap(), "chown dev/vfio/12 1000");
}

// ---- huge pages ----

fn pages(node: u32) -> String {
    format!("sys/devices/system/node/node{node}/hugepages/hugepages-2048kB/nr_hugepages")
}

#[test]
fn hugepages_go_to_the_nodes_of_bound_ssds() {
    let machine = Machine::bound();
    machine
        .setup(&["hugepages", "512"])
        .is("hugepages: node 0: 512 huge pages of 2 MiB (before: 0)\n");
    assert_eq!(machine.log(), [format!("write {} 512", pages(0))]);
}

#[test]
fn hugepages_without_a_bound_ssd_are_spread_over_all_nodes() {
    let machine = Machine::with(&[ssd_a()]);
    assert_eq!(machine.setup(&["hugepages", "5"]).code, 0);
    assert_eq!(
        machine.log(),
        [
            format!("write {} 3", pages(0)),
            format!("write {} 2", pages(1))
        ]
    );
}

#[test]
fn hugepages_on_a_node_go_there_and_an_unknown_node_is_refused() {
    let machine = Machine::bound();
    assert_eq!(machine.setup(&["hugepages", "5", "--node", "1"]).code, 0);
    assert_eq!(machine.log(), [format!("write {} 5", pages(1))]);
    machine
        .setup(&["hugepages", "5", "--node", "7"])
        .failed("hugepages: there is no NUMA node 7 with huge pages of 2 MiB; there is: 0, 1\n");
}

#[test]
fn hugepages_that_the_kernel_gives_short_are_a_failure_that_says_how_many() {
    let machine = Machine::bound();
    machine.kernel().huge_pages_left = Some(300);
    machine.setup(&["hugepages", "512"]).failed(
        "hugepages: node 0: asked for 512 huge pages of 2 MiB, the kernel gave 300: its memory is in use or in pieces \
         (try again after a reboot, or put hugepages=512 on the kernel command line)\n",
    );
}

#[test]
fn hugepages_of_a_machine_without_nodes_are_set_in_proc() {
    let machine = Machine::bound();
    fs::remove_dir_all(machine.at("sys/devices/system/node")).unwrap();
    write(machine.at("proc/sys/vm/nr_hugepages"), "0\n");
    machine
        .setup(&["hugepages", "16"])
        .is("hugepages: this machine: 16 huge pages of 2 MiB (before: 0)\n");
    assert_eq!(machine.log(), ["write proc/sys/vm/nr_hugepages 16"]);
}

#[test]
fn hugepages_dry_run_writes_nothing() {
    let machine = Machine::bound();
    machine
        .setup(&["hugepages", "512", "--dry-run"])
        .is(&format!("would write /{} 512\n", pages(0)));
    machine.untouched();
}

// ---- status and list ----

#[test]
fn status_shows_a_table_with_disks_and_their_users() {
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b()]);
    assert_eq!(machine.setup(&["bind", B]).code, 0);
    machine.open(PID, "tandem", "vfio/13");
    machine.mount_here("nvme0n1p2", "/");
    write(machine.at(&pages(0)), "64\n");
    machine.setup(&["status"]).is(&format!(
        "\
ADDRESS       MODEL            SERIAL  SIZE    DRIVER    GROUP  NODE  LINK
0000:5e:00.0  Fine SSD 3.8 TB  S4EWA   4.0 GB  nvme      12     0     8.0 GT/s x4 (max 16.0 GT/s x4)
  disk nvme0n1 (nvme0n1p1, nvme0n1p2)
  nvme0n1p2 is mounted at /
0000:5f:00.0  Fine SSD 3.8 TB  S4EWB   4.0 GB  vfio-pci  13     1     8.0 GT/s x4 (max 16.0 GT/s x4)
  /dev/vfio/13 is open in pid {PID} (tandem)
Huge pages of 2 MiB: 0 free of 64 on node 0, 0 free of 0 on node 1
"
    ));
}

#[test]
fn status_of_an_ssd_that_others_bound_has_no_name() {
    let machine = Machine::bound();
    fs::remove_dir_all(machine.at("run/tandem")).unwrap();
    let out = machine.setup(&["status"]).out;
    let row = "0000:5e:00.0  -      -       -     vfio-pci  12     0     8.0 GT/s x4 (max 16.0 GT/s x4)\n";
    assert!(out.contains(row), "{out}");
}

#[test]
fn status_json_has_the_same() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.mount_here("nvme0n1p2", "/");
    let value: Value = serde_json::from_str(&machine.setup(&["status", "--json"]).out).unwrap();
    let device = &value["devices"][0];
    for (field, expected) in [
        ("address", Value::from(A)),
        ("model", "Fine SSD 3.8 TB".into()),
        ("serial", "S4EWA".into()),
        ("size", 4_096_000_000_u64.into()),
        ("driver", "nvme".into()),
        ("iommu_group", 12.into()),
        ("numa_node", 0.into()),
        ("link", "8.0 GT/s x4".into()),
        ("link_max", "16.0 GT/s x4".into()),
    ] {
        assert_eq!(device[field], expected, "{field}");
    }
    assert_eq!(device["uses"][0]["use"], "mounted");
    assert_eq!(device["uses"][0]["at"], "/");
    assert_eq!(device["namespaces"][0]["partitions"][1], "nvme0n1p2");
    assert_eq!(value["hugepages"][1]["node"], 1);
}

#[test]
fn list_says_what_can_be_done_with_each() {
    let mut third = ssd_b();
    (third.address, third.group, third.controller) = ("0000:60:00.0", 14, "nvme2");
    (third.serial, third.disks) = ("S4EWC", vec![("nvme2n1", vec![])]);
    let mut fourth = third.clone();
    (fourth.address, fourth.group, fourth.controller) = ("0000:61:00.0", 15, "nvme3");
    (fourth.serial, fourth.disks) = ("S4EWD", vec![("nvme3n1", vec![])]);
    let machine = Machine::with_vfio(&[ssd_a(), ssd_b(), third, fourth]);
    assert_eq!(machine.setup(&["bind", A]).code, 0);
    machine.mount_here("nvme1n1", "/");
    machine.kernel().wipefs = BTreeMap::from([("dev/nvme2n1", (GPT, true))]);
    let said = machine.run(&["list"]);
    let verdicts: Vec<&str> = said
        .out
        .lines()
        .filter(|line| line.contains("->"))
        .collect();
    assert_eq!(
        verdicts,
        [
            "  -> serve it: --device pci:0000:5e:00.0",
            "  -> cannot: nvme1n1 is mounted at /",
            "  -> cannot: nvme2n1 holds gpt (if nobody needs that: scripts/setup-vfio bind --force-data 0000:60:00.0)",
            "  -> bind it first: scripts/setup-vfio bind 0000:61:00.0",
        ]
    );
    let value: Value = serde_json::from_str(&machine.run(&["list", "--json"]).out).unwrap();
    let can: Vec<&Value> = (0..4)
        .map(|index| &value["devices"][index]["can"])
        .collect();
    assert_eq!(can, ["serve", "no", "no", "bind"]);
    assert_eq!(value["devices"][0]["how"], "--device pci:0000:5e:00.0");
}

#[test]
fn list_offers_ssds_of_one_group_together_and_not_one_that_is_bound_alone() {
    let machine = two_in_one_group();
    let said = machine.run(&["list"]).out;
    assert!(
        said.contains(&format!(
            "-> bind it first: scripts/setup-vfio bind {A} {B}\n"
        )),
        "{said}"
    );
    let mut kernel = machine.kernel();
    kernel.unbind(A);
    kernel.bind(A, "vfio-pci").unwrap();
    drop(kernel);
    let said = machine.run(&["list"]).out;
    assert!(
        said.contains("-> cannot: IOMMU group 12 also has 0000:5f:00.0"),
        "{said}"
    );
}

#[test]
fn list_on_a_machine_without_ssds_says_so() {
    let machine = Machine::with(&[]);
    let said = machine.run(&["list"]);
    assert_eq!(said.code, 0);
    assert!(
        said.out
            .starts_with("There is no NVMe controller on this machine's PCI buses.\n")
    );
    fs::remove_dir_all(machine.at("sys/bus/pci")).unwrap();
    assert_eq!(machine.run(&["list"]).code, 0);
}

#[test]
fn status_where_namespaces_cannot_be_told_apart_counts_no_mount_twice() {
    let machine = Machine::with(&[ssd_a()]);
    machine.mount_here("nvme0n1p1", "/");
    for pid in [PID, PID + 1] {
        let folder = machine.process(pid, "service", 1);
        fs::remove_file(folder.join("ns/mnt")).unwrap();
        for (name, at) in [("nvme0n1p1", "/"), ("nvme0n1p2", "/data")] {
            machine.mount(&pid.to_string(), &number(name), &format!("/dev/{name}"), at);
        }
    }
    let out = machine.setup(&["status"]).out;
    let mounts: Vec<&str> = out
        .lines()
        .filter(|line| line.contains("mounted"))
        .collect();
    assert_eq!(
        mounts,
        [
            "  nvme0n1p1 is mounted at /".to_owned(),
            format!(
                "  nvme0n1p2 is mounted at /data in the mount namespace of pid {PID} (service)"
            ),
        ]
    );
}

// ---- who may, and how it is called ----

#[test]
fn bind_as_an_ordinary_user_is_refused_and_status_is_not() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().not_root = true;
    machine
        .setup(&["bind", A])
        .failed("setup-vfio: this needs root (--dry-run shows what it would do)\n");
    assert_eq!(machine.setup(&["status"]).code, 0);
    machine.untouched();
}

#[test]
fn bind_while_another_setup_is_at_work_is_refused() {
    let machine = Machine::with_vfio(&[ssd_a()]);
    machine.kernel().locked = true;
    machine
        .setup(&["bind", A])
        .failed("setup-vfio: another setup-vfio is at work\n");
    machine.untouched();
}

#[test]
fn arguments_that_make_no_sense_are_usage_errors() {
    for words in [
        &["bind"][..],
        &["bind", "sda"],
        &["bind", "serial="],
        &["bind", "--all-unused", "5e:00.0"],
        &["bind", "--all-unused", "--force-data"],
        &["unbind"],
        &["reset"],
        &["hugepages"],
        &["hugepages", "many"],
        &["hugepages", "-1"],
        &["bnid", "5e:00.0"],
        &[],
    ] {
        let words = [&["tandem", "setup-vfio"], words].concat();
        let error = Cli::try_parse_from(&words).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{words:?}");
    }
}

#[test]
fn the_program_itself_ends_with_2_on_a_usage_error_and_1_on_a_refusal() {
    let run = |words: &[&str]| {
        let output = Program::new(env!("CARGO_BIN_EXE_tandem"))
            .arg("setup-vfio")
            .args(words)
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, err) = run(&["bind", "sda"]);
    assert_eq!(code, Some(2));
    assert!(err.contains("`sda` is not a PCI address: write it as lspci does, 0000:5e:00.0 or 5e:00.0, or serial=..."), "{err}");
    // No machine has this one.
    let (code, err) = run(&["bind", "--dry-run", "fffffff0:ff:1f.7"]);
    assert_eq!(code, Some(1));
    assert!(
        err.contains("fffffff0:ff:1f.7: there is no PCI function at this address\n"),
        "{err}"
    );
}

#[test]
fn the_script_becomes_the_program_that_is_built_or_installed() {
    let folder = std::env::temp_dir().join(format!("tandem-script-{}", std::process::id()));
    let program = |path: &str, says: &str| {
        let path = folder.join(path);
        write(path.clone(), &format!("#!/bin/sh\necho \"{says}: $*\"\n"));
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(path, mode).unwrap();
    };
    let script = || {
        let output = Program::new(concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/setup-vfio"))
            .args(["bind", "a b"])
            .env("CARGO_TARGET_DIR", folder.join("target"))
            .env(
                "PATH",
                format!("{}:/usr/bin:/bin", folder.join("bin").display()),
            )
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stdout).unwrap() + &String::from_utf8(output.stderr).unwrap(),
        )
    };
    fs::create_dir_all(&folder).unwrap();
    let nothing = script();
    program("bin/tandem", "installed");
    let installed = script();
    program("target/release/tandem", "built");
    let built = script();
    fs::remove_dir_all(&folder).unwrap();
    assert_eq!(nothing.0, Some(1));
    assert!(
        nothing.1.contains("build it: cargo build --release"),
        "{}",
        nothing.1
    );
    assert_eq!(
        installed,
        (Some(0), "installed: setup-vfio bind a b\n".to_owned())
    );
    assert_eq!(built, (Some(0), "built: setup-vfio bind a b\n".to_owned()));
}
