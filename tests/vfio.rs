//! The built server on real VFIO: in a machine (scripts/guest-run --ssd) with an IOMMU, the kernel's own vfio-pci, and
//! NVMe controllers that nobody here wrote. What runs inside is a job in the shell and tests/machine/agent.rs.
//!
//! Machines are emulated; each test is one. `scripts/dev vm` gives the same machine to try things by hand.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/guest.rs"]
mod guest;
#[path = "common/lab.rs"]
mod lab;
#[path = "machine/load.rs"]
mod load;
#[path = "common/report.rs"]
mod report;
#[path = "common/rng.rs"]
mod rng;
#[path = "common/server.rs"]
mod server;

use std::collections::{HashMap, HashSet};
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::OnceLock;
use std::time::Duration;

use guest::{Guest, Setup};
use lab::{Lab, bound, eventually};
use load::{Compared, Load, Oracle, SECTOR};
use report::Report;
use serde_json::Value;
use server::{Server, Sleeps, server_binary};

type Facts = HashMap<String, String>;

// ---- the machine ----

/// The program that runs inside, as of now: cargo builds no examples when it is asked for one test only.
fn agent_binary() -> &'static PathBuf {
    static AGENT: OnceLock<PathBuf> = OnceLock::new();
    AGENT.get_or_init(|| {
        let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
        let target = target.parent().unwrap();
        let built = Command::new(env!("CARGO"))
            .args([
                "build",
                "--quiet",
                "--profile",
                "test",
                "--example",
                "agent",
            ])
            .arg("--target-dir")
            .arg(target)
            .current_dir(env!("CARGO_MANIFEST_DIR"))
            .status()
            .unwrap();
        assert!(built.success(), "the agent was not built: {built}");
        target.join("debug/examples/agent")
    })
}

/// The module vfio with its no-IOMMU mode, beside what guests boot from.
fn noiommu_module() -> PathBuf {
    let module = lab::image_folder()
        .with_file_name("noiommu")
        .join("vfio.ko");
    assert!(
        module.exists(),
        "{} is not there. Run scripts/dev test, or scripts/noiommu-module",
        module.display()
    );
    module
}

/// A disk with the server, the agent, the scripts and a module. Made once for all tests, while a lab is held.
fn payload() -> &'static str {
    static PAYLOAD: OnceLock<String> = OnceLock::new();
    PAYLOAD.get_or_init(|| {
        let image = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("payload.img");
        let script = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("scripts/payload");
        let made = Command::new(script)
            .arg(&image)
            .args([&noiommu_module(), &server_binary(), agent_binary()])
            .status()
            .unwrap();
        assert!(made.success(), "scripts/payload ended with {made}");
        image.to_str().unwrap().to_owned()
    })
}

/// An SSD's medium of `mib` MiB in the lab.
fn medium(lab: &Lab, name: &str, mib: u64) {
    let file = File::create(lab.path(name)).unwrap();
    file.set_len(mib << 20).unwrap();
}

/// Runs a job in a machine with these SSDs (arguments of scripts/guest-run) to its end.
#[track_caller]
fn machine(lab: &Lab, ssds: &[&str], job: &str) -> Facts {
    start(lab, ssds, &[], job).ends_well()
}

/// The same, running; QEMU may complain with some words.
fn start(lab: &Lab, ssds: &[&str], complaints: &[&str], job: &str) -> Guest {
    // What is emulated twice takes minutes even on an idle machine.
    let minutes = if ssds.contains(&"--chain") { 20 } else { 5 };
    let more = [&["--memory", "1G", "--payload", payload()], ssds].concat();
    let setup = Setup {
        cpus: 2, // the server polls one
        more: &more,
        complaints,
        deadline: Duration::from_secs(60 * minutes),
        ..Setup::new(&[], job)
    };
    Guest::boot(lab, &setup)
}

/// The image holds exactly what the load wrote.
#[track_caller]
fn assert_image_holds(lab: &Lab, image: &str, load: Load) -> Compared {
    let file = File::open(lab.path(image)).unwrap();
    let mut total = Compared::default();
    for queue in 0..load.queues {
        let mut oracle = Oracle::new(&load);
        load.plan(queue).for_each(|action| oracle.apply(&action));
        let mut bytes = vec![0; (load.sectors() * SECTOR) as usize];
        file.read_exact_at(&mut bytes, load.first_sector(queue) * SECTOR)
            .unwrap();
        match oracle.compare(0, &bytes) {
            Ok(compared) => {
                total.sectors += compared.sectors;
                total.discarded += compared.discarded;
            }
            Err(wrong) => panic!("{image}, part of queue {queue} of {load:?}: {wrong}"),
        }
    }
    assert!(
        total.sectors > load.requests,
        "hardly anything was compared: {total:?}"
    );
    total
}

#[track_caller]
fn report_of(facts: &Facts, key: &str) -> Report {
    let text = &facts[key];
    let text = &text[text.find("disk ").unwrap_or(0)..];
    let report = Report::parse(text).unwrap_or_else(|| panic!("no report in {text}"));
    for counter in ["errors", "malformed", "unsupp"] {
        assert_eq!(report.total(counter), 0, "{counter} of {report:?}");
    }
    report
}

fn queue_pairs(report: &Report) -> usize {
    let pairs: HashSet<u64> = report.queues.iter().map(|queue| queue.get("qp")).collect();
    pairs.len()
}

// ---- tests ----

const LOAD: &str = "seed=7,queues=4,requests=600,mib=8,block=512";

const EMBEDDED: [&str; 4] = [
    "--device",
    "model:file,path=disk.img,size=64M",
    "--blk",
    "path=vm0.sock,queues=4",
];

/// The client and its oracle, without a machine: on the embedded controller.
#[test]
fn load_on_the_embedded_controller_is_what_its_image_holds() {
    let lab = Lab::new("load");
    let server = Server::start(&lab, &EMBEDDED);
    let before = server.report().total("commands");
    let output = agent(&lab, &["load", LOAD, "vm0.sock"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    eventually(Duration::from_secs(10), "the client is gone", || {
        server
            .log()
            .contains("front-end disconnected")
            .then_some(())
    });
    let report = server.end_well();
    assert_eq!((before, queue_pairs(&report)), (0, 4));
    let compared = assert_image_holds(&lab, "disk.img", Load::parse(LOAD));
    assert!(compared.discarded > 0, "{compared:?}");
}

/// Commands of an image file end on worker threads, which wake the reactor.
#[test]
fn load_on_a_server_that_sleeps_is_what_its_image_holds() {
    let lab = Lab::new("sleeps");
    let server = Server::start(&lab, &[&["--poll", "adaptive"], &EMBEDDED[..]].concat());
    let output = agent(&lab, &["load", LOAD, "vm0.sock"]).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    eventually(Duration::from_secs(10), "the client is gone", || {
        server
            .log()
            .contains("front-end disconnected")
            .then_some(())
    });
    let before = server.cpu_time();
    std::thread::sleep(Duration::from_secs(5));
    let used = server.cpu_time() - before;
    assert!(
        used <= Duration::from_millis(100),
        "{used:?} in 5 s of nothing"
    );
    server.report();
    let sleeps = server.sleeps();
    assert!(
        sleeps.sleeps > 0 && sleeps.kicks > 0 && sleeps.interrupts > 0 && sleeps.messages > 0,
        "{sleeps:?}"
    );
    assert_eq!(queue_pairs(&server.end_well()), 4);
    assert_image_holds(&lab, "disk.img", Load::parse(LOAD));
}

#[test]
fn server_killed_under_load_leaves_what_was_flushed_on_the_embedded_controller_too() {
    let lab = Lab::new("crash");
    let server = Server::start(&lab, &EMBEDDED);
    let client = agent(&lab, &["survive", "30", "vm0.sock"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    eventually(Duration::from_secs(20), "something was flushed", || {
        (server.report().total("flushes") > 20).then_some(())
    });
    server.crash();
    let server = Server::start(&lab, &EMBEDDED);
    let output = client.wait_with_output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_was_flushed(&facts_in(&String::from_utf8_lossy(&output.stdout)));
    let end = server.end();
    assert!(
        end.status.success() && end.after < Duration::from_secs(5),
        "{} after {:?}",
        end.status,
        end.after
    );
}

#[track_caller]
fn assert_was_flushed(facts: &Facts) {
    for (what, least) in [("flushes", 8), ("durable", 64), ("in-flight", 1)] {
        let number: u64 = facts[&format!("survive.{what}")].parse().unwrap();
        assert!(number >= least, "{what}: {facts:?}");
    }
}

/// The agent in the lab, without a machine.
fn agent(lab: &Lab, arguments: &[&str]) -> Command {
    let mut command = bound(agent_binary());
    command.args(arguments).current_dir(&lab.folder);
    command
}

fn facts_in(text: &str) -> Facts {
    let facts = text
        .lines()
        .filter_map(|line| line.strip_prefix("TANDEM ")?.split_once('='));
    facts
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .collect()
}

/// Two namespaces, one of 4096-byte blocks, with identifiers.
const TWO_NAMESPACES: [&str; 6] = [
    "--ssd",
    "none,max_ioqpairs=8,mdts=7",
    "--namespace",
    "a.img,nsid=1,eui64=0x0123456789abcdef",
    "--namespace",
    "b.img,nsid=2,logical_block_size=4096,physical_block_size=4096,uuid=5f0f3c1a-7a0e-4b63-9a53-6f3cfb1ce1f0",
];

#[test]
fn ssd_says_to_us_what_it_says_to_the_kernel_and_comes_back_with_its_files() {
    let lab = Lab::new("same");
    medium(&lab, "a.img", 128);
    medium(&lab, "b.img", 64);
    let job = "
        . /machine.sh
        nvme id-ctrl -o json /dev/nvme0 >/tmp/ctrl
        tells ctrl /tmp/ctrl
        for n in 1 2; do
            nvme id-ns -o json /dev/nvme0n$n >/tmp/ns
            tells ns$n /tmp/ns
            nvme ns-descs -o json -n $n /dev/nvme0 >/tmp/descriptors
            tells descriptors$n /tmp/descriptors
        done
        step mkfs mkfs.ext4 -q /dev/nvme0n1
        step mount mount -t ext4 /dev/nvme0n1 /mnt
        step write sh -c 'mkdir /mnt/f && for i in $(seq 16); do dd if=/dev/urandom of=/mnt/f/$i bs=64k count=$i; done'
        step sums sh -c 'cd /mnt/f && sha256sum * >/mnt/sums'
        step 'in use: refused' sh -c '! tandem setup-vfio bind --force-data 0000:00:05.0 && test -b /dev/nvme0n1'
        step umount umount /mnt
        step 'holds data: refused' sh -c '! tandem setup-vfio bind 0000:00:05.0 && test -b /dev/nvme0n1'

        step bind bind 0000:00:05.0
        step 'the kernel has it no more' sh -c '! test -e /dev/nvme0 && ! test -e /dev/nvme0n1'
        step identify sh -c 'tandem identify --device pci:0000:00:05.0 --json >/tmp/ours'
        tells ours /tmp/ours
        step serve serve a --device pci:0000:00:05.0 --blk path=/tmp/vm0.sock,queues=4,ns=1
        step 'it has one owner' refuses 'open already' --device pci:0000:00:05.0 --blk path=/tmp/vm1.sock
        step finish finish a
        step bench sh -c 'tandem bench --device pci:0000:00:05.0 --iodepth 4 --numjobs 2 --runtime 1s >/tmp/bench'
        tells bench /tmp/bench

        step unbind unbind 0000:00:05.0
        step 'the kernel has it again' within 10 test -b /dev/nvme0n1
        step 'not bound' refuses 'setup-vfio bind 0000:00:05.0' --device pci:0000:00:05.0 --blk path=/tmp/vm1.sock
        step fsck e2fsck -fn /dev/nvme0n1
        step 'mount again' mount -t ext4 -o ro /dev/nvme0n1 /mnt
        step check sh -c 'cd /mnt/f && sha256sum -c /mnt/sums'
        step 'no faults' no_faults";
    let facts = machine(&lab, &TWO_NAMESPACES, job);

    let parse = |key: &str| -> Value { serde_json::from_str(&facts[key]).unwrap() };
    let ours = parse("ours");
    let compared = same_fields("controller", &ours["controller"], &parse("ctrl"));
    assert!(compared >= 40, "{compared} fields of the controller");
    let namespaces = ours["namespaces"].as_array().unwrap();
    assert_eq!(namespaces.len(), 2);
    for (namespace, kernel) in namespaces.iter().zip(["ns1", "ns2"]) {
        let compared = same_fields(kernel, namespace, &parse(kernel));
        assert!(compared >= 18, "{compared} fields of {kernel}");
    }
    assert_eq!(namespaces[0]["eui64"], "0123456789abcdef");
    let bench = &facts["bench"];
    for wanted in [
        "A  pci:0000:00:05.0: ",
        "    read : IOPS=",
        "queue 1: IOPS=",
        " doorbells, ",
    ] {
        assert!(bench.contains(wanted), "{wanted}: {bench}");
    }
    let uuid = namespaces[1]["uuid"].as_str().unwrap();
    assert!(
        facts["descriptors2"].contains(uuid),
        "{uuid}: {}",
        facts["descriptors2"]
    );
}

/// Every field of ours that the kernel's tool has as well is the same there. It pads text, and writes numbers of 128 bits
/// as text. Says how many there were.
#[track_caller]
fn same_fields(what: &str, ours: &Value, kernel: &Value) -> usize {
    let plain = |value: &Value| match value {
        Value::String(text) => text.trim().to_owned(),
        Value::Array(_) => value.to_string(),
        other => other.to_string(),
    };
    let mut compared = 0;
    for (key, value) in ours.as_object().unwrap() {
        let Some(other) = kernel.get(key) else {
            assert!(
                key == "nsid" || key == "uuid",
                "{what}: nvme-cli has no {key}"
            );
            continue;
        };
        assert_eq!(plain(value), plain(other), "{what}: {key}");
        compared += 1;
    }
    compared
}

#[test]
fn four_virtqueues_on_four_hardware_queue_pairs_lose_nothing_and_reach_nothing_else() {
    let lab = Lab::new("four");
    medium(&lab, "a.img", 64);
    medium(&lab, "b.img", 16);
    let job = format!(
        "
        . /machine.sh
        step bind bind 0000:00:05.0
        step 'bind another' bind 0000:00:06.0
        step serve serve a --device pci:0000:00:05.0 --blk path=/tmp/vm0.sock,queues=4
        told load taskset 2 agent load {LOAD} /tmp/vm0.sock
        step finish finish a
        tells report /tmp/a.out
        step 'no faults' no_faults
        told control agent fault 0000:00:06.0
        dmesg | grep 'DMAR:.*fault addr' >/tmp/faults
        tells faults /tmp/faults"
    );
    let ssds = ["--ssd", "a.img,max_ioqpairs=8,mdts=4", "--ssd", "b.img"];
    // What QEMU says of the faults.
    let complaints = ["dev=00:06:00", "vtd_iova_to_slpte", "fault is not recorded"];
    let facts = start(&lab, &ssds, &complaints, &job).ends_well();

    let report = report_of(&facts, "report");
    assert_eq!((report.queues.len(), queue_pairs(&report)), (4, 4));
    for queue in &report.queues {
        for counter in [
            "commands", "reads", "writes", "flushes", "discards", "zeroes", "split", "bounced",
        ] {
            assert!(queue.get(counter) > 0, "{counter} of {queue:?}");
        }
    }
    let compared = assert_image_holds(&lab, "a.img", Load::parse(LOAD));
    assert!(
        compared.discarded > 0,
        "no discard has reached the medium: {compared:?}"
    );

    // An access outside would have been seen: the same kernel reports the two that were made on purpose, and only those.
    // The kernel's log is all there is to see it by: QEMU's controller calls a read a success whose data was blocked.
    let faults: Vec<&str> = facts["faults"].lines().collect();
    for name in ["unmapped", "never-mapped"] {
        let (iova, _) = facts[&format!("fault.{name}")].split_once(", ").unwrap();
        let seen = faults
            .iter()
            .any(|line| line.contains("00:06.0") && line.contains(iova));
        assert!(seen, "{name} {iova} is not in {faults:#?}");
    }
    assert!(
        facts["fault.mapped"].contains("Successful Completion"),
        "{}",
        facts["fault.mapped"]
    );
    assert!(
        faults.iter().all(|line| line.contains("00:06.0")),
        "{faults:#?}"
    );
}

/// Completions that take long are told by MSI-X, and a server with nothing to do leaves its core alone.
#[test]
fn server_that_sleeps_is_woken_by_the_interrupts_of_its_ssd_and_loses_nothing() {
    let lab = Lab::new("asleep");
    medium(&lab, "a.img", 64);
    let job = format!(
        "
        . /machine.sh
        step bind bind 0000:00:05.0
        step serve serve a --poll adaptive --device pci:0000:00:05.0 --blk path=/tmp/vm0.sock,queues=4
        told load taskset 2 agent load {LOAD} /tmp/vm0.sock
        sleep 1
        fact cpu.before $(cpu a)
        sleep 10
        fact cpu.after $(cpu a)
        told 'load again' taskset 2 agent load {LOAD} /tmp/vm0.sock
        step finish finish a
        tells report /tmp/a.out
        step 'no faults' no_faults"
    );
    let facts = machine(&lab, &["--ssd", "a.img,max_ioqpairs=8,mdts=4"], &job);
    let report = report_of(&facts, "report");
    assert_eq!((report.queues.len(), queue_pairs(&report)), (4, 4));
    let line = facts["report"].split("core 0: ").nth(1).unwrap();
    let sleeps = Sleeps::parse(line);
    assert!(
        sleeps.interrupts > 0 && sleeps.kicks > 0 && sleeps.messages > 0,
        "{sleeps:?}"
    );
    let cpu = |when: &str| facts[&format!("cpu.{when}")].parse::<u64>().unwrap();
    let used = cpu("after") - cpu("before");
    assert!(
        used <= 20,
        "{used} centiseconds of CPU time in 10 s of nothing"
    );
    assert_image_holds(&lab, "a.img", Load::parse(LOAD));
}

#[test]
fn controllers_of_many_shapes_are_served_or_refused_with_the_reason() {
    const SMALL: &str = "seed=3,queues=4,requests=150,mib=4,block=4096";
    let lab = Lab::new("shapes");
    let images = [
        "one", "mdts", "4096", "ns1", "ns2", "ns3", "cmb", "meta", "plain", "zoned",
    ];
    for image in images {
        medium(&lab, image, 32);
    }
    let ssds = [
        "--ssd one,max_ioqpairs=1",
        "--ssd mdts,mdts=1",
        "--ssd 4096,logical_block_size=4096,physical_block_size=4096",
        "--ssd none --namespace ns1,nsid=1 --namespace ns2,nsid=2 --namespace ns3,nsid=7",
        "--ssd cmb,cmb_size_mb=64",
        "--ssd none --namespace meta,nsid=1,ms=8 --namespace plain,nsid=2",
        "--ssd none --namespace zoned,zoned=on,zoned.zone_size=4M",
    ]
    .join(" ");
    let ssds: Vec<&str> = ssds.split(' ').collect();
    let job = format!(
        "
        . /machine.sh
        # one BDF NAME NAMESPACE
        one() {{
            step \"$2: bind\" bind \"$1\"
            step \"$2: serve\" serve \"$2\" --device \"pci:$1\" --blk \"path=/tmp/$2.sock,queues=4,ns=$3\"
            told \"$2: load\" taskset 2 agent load {SMALL} \"/tmp/$2.sock\"
            step \"$2: finish\" finish \"$2\"
            tells \"$2.report\" \"/tmp/$2.out\"
            tells \"$2.log\" \"/tmp/$2.log\"
        }}
        one 0000:00:05.0 one 1
        one 0000:00:06.0 mdts 1
        one 0000:00:07.0 4096 1

        step 'three: bind' bind 0000:00:08.0
        step 'three: serve' serve three --device pci:0000:00:08.0 --blk path=/tmp/1.sock,queues=4,ns=1 \\
            --blk path=/tmp/2.sock,queues=4,ns=2 --blk path=/tmp/3.sock,queues=4,ns=7
        told 'three: load' taskset 2 agent load {SMALL} /tmp/1.sock /tmp/2.sock /tmp/3.sock
        step 'three: finish' finish three
        tells three.report /tmp/three.out

        one 0000:00:09.0 cmb 1

        step 'meta: bind' bind 0000:00:0a.0
        step 'meta: refused' refuses '8 bytes of metadata' --device pci:0000:00:0a.0 --blk path=/tmp/m.sock,ns=1
        one 0000:00:0a.0 plain 2

        step 'zoned: bind' bind 0000:00:0b.0
        step 'zoned: refused' refuses '[Zz]oned' --device pci:0000:00:0b.0 --blk path=/tmp/z.sock,ns=1
        step 'zoned: identify' tandem identify --device pci:0000:00:0b.0
        step 'no faults' no_faults"
    );
    let facts = machine(&lab, &ssds, &job);
    let load = Load::parse(SMALL);
    for name in ["one", "mdts", "4096", "cmb", "plain"] {
        let report = report_of(&facts, &format!("{name}.report"));
        let pairs = if name == "one" { 1 } else { 4 };
        assert_eq!(
            (report.queues.len(), queue_pairs(&report)),
            (4, pairs),
            "{name}"
        );
        assert!(
            report.queues.iter().all(|queue| queue.get("commands") > 0),
            "{name}: {report:?}"
        );
        let says = facts[&format!("{name}.log")].contains("more virtqueues than queue pairs");
        assert_eq!(says, name == "one", "{}", facts[&format!("{name}.log")]);
        assert_image_holds(&lab, name, load);
    }
    // 8 KiB at most: most requests take several commands.
    let report = report_of(&facts, "mdts.report");
    assert!(
        report.total("split") > report.total("writes") / 4,
        "{report:?}"
    );
    let report = report_of(&facts, "three.report");
    assert_eq!((report.queues.len(), queue_pairs(&report)), (12, 12));
    for (disk, name) in (0..).zip(["ns1", "ns2", "ns3"]) {
        let socket = format!("/tmp/{}.sock", disk + 1);
        let queues = report.queues.iter().filter(|queue| queue.disk == socket);
        assert_eq!(
            queues.filter(|queue| queue.get("commands") > 0).count(),
            4,
            "{report:?}"
        );
        assert_image_holds(&lab, name, load.with_seed_of(disk));
    }
    for name in ["meta", "zoned"] {
        let untouched = fs::read(lab.path(name))
            .unwrap()
            .iter()
            .all(|byte| *byte == 0);
        assert!(untouched, "{name} was refused, and written");
    }
}

#[test]
fn two_clients_with_the_same_addresses_never_see_each_other_nor_the_one_before() {
    let lab = Lab::new("apart");
    medium(&lab, "a.img", 64);
    medium(&lab, "b.img", 64);
    let job = format!(
        "
        . /machine.sh
        step bind bind 0000:00:05.0
        step serve serve a --device pci:0000:00:05.0 \\
            --blk path=/tmp/a.sock,queues=4,ns=1 --blk path=/tmp/b.sock,queues=4,ns=2
        told load taskset 2 agent load {LOAD} /tmp/a.sock /tmp/b.sock
        told vanish taskset 2 agent vanish 16 /tmp/a.sock
        step finish finish a
        tells log /tmp/a.log
        step 'no faults' no_faults"
    );
    let ssds = [
        "--ssd",
        "none,max_ioqpairs=8,mdts=7",
        "--namespace",
        "a.img,nsid=1,iops=2000", // so that its requests are in flight for a while
        "--namespace",
        "b.img,nsid=2",
    ];
    let facts = machine(&lab, &ssds, &job);
    let number = |key: &str| facts[key].parse::<u64>().unwrap();
    // Half of 16 rounds of 128, had they all been sent in time.
    assert!(number("vanish.in-flight") >= 16 * 64, "{facts:?}");
    assert_eq!(
        facts["log"]
            .matches("front-end disconnected disk=/tmp/a.sock")
            .count(),
        33,
        "{}",
        facts["log"]
    );
    // The second disk holds what its client wrote, whatever the others did with the first.
    assert_image_holds(&lab, "b.img", Load::parse(LOAD).with_seed_of(1));
}

#[test]
fn server_killed_under_load_leaves_what_was_flushed_and_the_next_one_starts() {
    let job = "
        . /machine.sh
        step bind bind 0000:00:05.0
        step serve serve a --device pci:0000:00:05.0 --blk path=/tmp/vm0.sock,queues=2
        taskset 2 agent survive 60 /tmp/vm0.sock >/tmp/agent 2>&1 &
        agent=$!
        step 'something was flushed' within 60 grep -q survive.warm /tmp/agent
        kill -KILL $(cat /tmp/a.pid)
        wait $(cat /tmp/a.pid)
        step 'serve again' serve b --device pci:0000:00:05.0 --blk path=/tmp/vm0.sock,queues=2
        finished() {
            wait $agent || { cat /tmp/agent; return 1; }
        }
        step 'everything is there' finished
        grep '^TANDEM ' /tmp/agent
        told 'and the load goes on' taskset 2 agent load seed=1,queues=2,requests=100,mib=8,block=512 /tmp/vm0.sock
        step finish finish b
        tells report /tmp/b.out
        step 'no faults' no_faults";
    let number = |facts: &Facts, key: &str| facts[key].parse::<u64>().unwrap();
    let attempt = || {
        let lab = Lab::new("killed");
        medium(&lab, "a.img", 64);
        let facts = machine(&lab, &["--ssd", "a.img"], job);
        let [flushes, durable] =
            ["flushes", "durable"].map(|key| number(&facts, &format!("survive.{key}")));
        assert!(flushes > 8 && durable > 64, "{facts:?}");
        facts
    };
    // A server may die in a moment when it has nothing to do.
    let mut attempts = (0..4).map(|_| attempt());
    let facts = attempts.find(|facts| number(facts, "survive.in-flight") > 0);
    let facts = facts.expect("no server had anything in flight when it was killed");
    report_of(&facts, "report");
}

#[test]
fn user_with_the_group_and_a_memory_limit_serves_and_one_with_too_little_is_told() {
    const LOAD: &str = "seed=5,queues=2,requests=200,mib=8,block=512";
    let lab = Lab::new("user");
    medium(&lab, "a.img", 64);
    // The limit is inherited; the server does not run as root and has no capabilities.
    let job = format!(
        "
        . /machine.sh
        step bind bind 0000:00:05.0
        mkdir /tmp/user
        chown 1000:1000 /tmp/user
        as_user() {{
            (
                ulimit -l \"$1\"
                shift
                exec /tools/bin/setpriv --reuid 1000 --regid 1000 --clear-groups \"$@\"
            )
        }}
        serve_as_user() {{
            as_user \"$1\" tandem serve --cores 0 --device pci:0000:00:05.0 --blk path=/tmp/user/vm0.sock,queues=2
        }}
        not_permitted() {{
            serve_as_user 65536 >/tmp/refused 2>&1 && return 1
            cat /tmp/refused
            grep -q 'setup-vfio bind 0000:00:05.0 --user' /tmp/refused
        }}
        step 'not permitted' not_permitted
        step 'permit it' bind 0000:00:05.0 --user user
        too_little() {{
            serve_as_user 64 >/tmp/refused 2>&1 && return 1
            cat /tmp/refused
            grep -q RLIMIT_MEMLOCK /tmp/refused
        }}
        step 'too little' too_little

        # Enough for the server's own buffers, not for this guest's memory: the guest is turned away, the server stays.
        serve_as_user 20480 >/tmp/s.out 2>/tmp/s.log &
        echo $! >/tmp/s.pid
        step 'serve with little' within 30 served s
        too_much() {{
            taskset 2 agent load {LOAD} /tmp/user/vm0.sock && return 1
            cat /tmp/s.log
            grep -q 'RLIMIT_MEMLOCK' /tmp/s.log && kill -0 $(pidof tandem)
        }}
        step 'too much memory' too_much
        kill -TERM $(pidof tandem)
        step 'finish with little' wait $(cat /tmp/s.pid)

        serve_as_user 1048576 >/tmp/u.out 2>/tmp/u.log &
        echo $! >/tmp/u.pid
        step serve within 30 served u
        step 'no root' sh -c \"grep -q '^Uid:.1000.1000.1000.1000' /proc/$(pidof tandem)/status\"
        step 'no capabilities' sh -c \"grep -q '^CapEff:.0000000000000000' /proc/$(pidof tandem)/status\"
        told load taskset 2 agent load {LOAD} /tmp/user/vm0.sock
        kill -TERM $(pidof tandem)
        step finish wait $(cat /tmp/u.pid)
        tells report /tmp/u.out
        step 'no faults' no_faults"
    );
    let facts = machine(&lab, &["--ssd", "a.img"], &job);
    report_of(&facts, "report");
    assert_image_holds(&lab, "a.img", Load::parse(LOAD));
}

/// Guest driver, QEMU, tandem, vfio-pci, SSD: nothing in between is simulated, and all of it is emulated twice. It takes
/// minutes when the machine is busy.
#[test]
fn linux_guest_within_the_machine_has_its_disk_on_the_ssd() {
    let lab = Lab::new("chain");
    medium(&lab, "a.img", 64);
    let ssds = ["--ssd", "a.img,max_ioqpairs=8,mdts=7", "--chain"];
    let facts = machine(&lab, &ssds, include_str!("../scripts/guest/chain-job"));
    assert_eq!(facts["sum"], facts["sum.on-ssd"]);
    assert_eq!(facts["vda.bytes"], (64 << 20).to_string());
    let report = report_of(&facts, "report");
    assert!(
        report.total("writes") > 0 && report.total("flushes") > 0,
        "{report:?}"
    );
    // The guest sleeps until it is signalled.
    assert!(report.total("notifications") > 0, "{report:?}");
}

/// A machine without an IOMMU, in which VFIO is allowed to do without: refused by default; with the flag the same as
/// elsewhere, for guests on huge pages, wherever these are in physical memory.
#[test]
fn ssd_without_an_iommu_is_refused_until_it_is_asked_for_and_then_serves_guests_on_huge_pages() {
    let lab = Lab::new("noiommu");
    medium(&lab, "a.img", 64);
    medium(&lab, "b.img", 64);
    let job = format!(
        "
        . /machine.sh
        nvme id-ctrl -o json /dev/nvme0 >/tmp/ctrl
        tells ctrl /tmp/ctrl
        # says TEXT COMMAND...: it fails, and says so.
        says() {{
            says_text=$1
            shift
            \"$@\" >/tmp/said 2>&1 && return 1
            cat /tmp/said
            grep -Fq -e \"$says_text\" /tmp/said
        }}
        step 'bind: no IOMMU' says 'or, at the risk of all memory of this machine' bind 0000:00:05.0
        step 'bind: no module' says 'modprobe vfio enable_unsafe_noiommu_mode=1' bind --unsafe-noiommu 0000:00:05.0
        step 'load the module' insmod /payload/modules/vfio.ko
        step 'bind: switched off' says 'write 1 to' bind --unsafe-noiommu 0000:00:05.0
        step 'switch it on' sh -c 'echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode'
        step 'bind: not asked for' says 'it is in no IOMMU group' bind 0000:00:05.0
        step 'the kernel has it still' test -b /dev/nvme0n1
        step 'bind, which says what it means' \\
            sh -c 'tandem setup-vfio bind --force-data --unsafe-noiommu 0000:00:05.0 | grep \"UNSAFE, NO IOMMU\"'
        step 'bind another' bind --unsafe-noiommu 0000:00:06.0
        fact node \"$(ls /dev/vfio/noiommu-*)\"
        tandem list >/tmp/list
        tells list /tmp/list

        device=pci:0000:00:05.0
        step 'serve: not asked for' refuses 'no-IOMMU mode, in which the SSD could.* --unsafe-noiommu' \
            --device $device --blk path=/tmp/vm0.sock
        identify_status=0
        tandem identify --device $device >/tmp/identify 2>&1 || identify_status=$?
        fact identify.status $identify_status
        tells identify /tmp/identify
        step 'no huge pages' refuses 'setup-vfio hugepages' --unsafe-noiommu --device $device --blk path=/tmp/vm0.sock
        step 'huge pages' tandem setup-vfio hugepages 128
        step identify sh -c \"tandem identify --device $device --unsafe-noiommu --json >/tmp/ours 2>/tmp/warning\"
        tells ours /tmp/ours
        tells warning /tmp/warning

        free() {{ cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages; }}
        fact free.before $(free)
        step serve serve a --unsafe-noiommu --device $device --blk path=/tmp/vm0.sock,queues=4
        told 'load, pages scattered' taskset 2 agent load-huge scattered {LOAD} /tmp/vm0.sock
        step 'a guest on ordinary pages is turned away' says 'SET_MEM_TABLE' \
            taskset 2 agent load {LOAD} /tmp/vm0.sock
        step 'and told what it needs' grep -q 'memory-backend-memfd,hugetlb=on' /tmp/a.log
        told 'a page that is given back' taskset 2 agent hole /tmp/vm0.sock
        told 'load, pages gathered' taskset 2 agent load-huge gathered {LOAD} /tmp/vm0.sock
        step finish finish a
        tells report /tmp/a.out
        tells log /tmp/a.log
        fact free.after $(free)

        # Killed with requests at the SSD: the kernel takes the device and the pages back.
        step 'serve the other' serve b --device pci:0000:00:06.0,unsafe_noiommu=on --blk path=/tmp/vm1.sock,queues=4
        taskset 2 agent load-huge scattered {LOAD} /tmp/vm1.sock >/tmp/load 2>&1 &
        load=$!
        step 'it is loaded' within 60 grep -q load.crossings /tmp/load
        sleep 0.3
        kill -KILL $(cat /tmp/b.pid) $load
        wait $(cat /tmp/b.pid) $load
        all_free() {{ [ $(free) -eq 128 ]; }}
        step 'the pages are free' within 30 all_free
        # 96 KiB: every other one or so of 21 in 2 MiB crosses into the next page.
        step bench tandem bench --device pci:0000:00:06.0 --unsafe-noiommu --rw randrw --bs 96k --size 48M \
            --iodepth 64 --runtime 1 --verify crc32c --overwrite-data --cpus_allowed 0
        fact free.end $(free)

        step unbind unbind 0000:00:05.0
        step 'unbind the other' unbind 0000:00:06.0
        step 'the kernel has it again' within 10 test -b /dev/nvme0n1
        step 'no group is left' sh -c '! ls /dev/vfio/noiommu-*'
        fact tainted $(cat /proc/sys/kernel/tainted)"
    );
    let ssds = [
        "--no-iommu",
        "--ssd",
        "a.img,max_ioqpairs=8,mdts=7",
        "--ssd",
        "b.img,max_ioqpairs=8,mdts=7",
    ];
    let facts = machine(&lab, &ssds, &job);
    let number = |key: &str| facts[key].parse::<u64>().unwrap();

    assert_eq!(number("identify.status"), 2);
    assert!(
        facts["identify"].contains("say that this risk is yours: --unsafe-noiommu"),
        "{}",
        facts["identify"]
    );
    for said in ["warning", "log"] {
        assert!(facts[said].contains("UNSAFE, NO IOMMU"), "{}", facts[said]);
    }
    assert!(
        facts["list"].contains("-> serve it: --device pci:0000:00:05.0 --unsafe-noiommu"),
        "{}",
        facts["list"]
    );
    let parse = |key: &str| -> Value { serde_json::from_str(&facts[key]).unwrap() };
    let compared = same_fields("controller", &parse("ours")["controller"], &parse("ctrl"));
    assert!(compared >= 40, "{compared} fields of the controller");

    // What the client shared, and in how many pieces it was: once without neighbours, once with as many as there are.
    let runs: Vec<u64> = facts["log"]
        .lines()
        .filter(|line| line.contains("guest memory by its physical addresses"))
        .filter_map(|line| line.split_once("runs=")?.1.trim().parse().ok())
        .collect();
    let pages = number("load.bytes") >> 21;
    assert!(pages >= 8, "{pages} huge pages");
    // The second is the one that gives a page back.
    let [scattered, _, gathered] = runs[..] else {
        panic!("{runs:?}: {}", facts["log"]);
    };
    assert!(scattered > pages / 2, "{scattered} runs of {pages} pages");
    // The server's own pages lie in between.
    assert!(
        gathered <= pages * 2 / 3,
        "{gathered} runs of {pages} pages"
    );
    assert!(number("load.crossings") >= 8, "{facts:?}");
    let report = report_of(&facts, "report");
    assert_eq!((report.queues.len(), queue_pairs(&report)), (4, 4));
    assert_image_holds(&lab, "a.img", Load::parse(LOAD));

    assert_eq!(
        number("hole.given-back"),
        0,
        "a page that the SSD may write to"
    );
    assert_eq!(number("hole.after"), 1);
    for free in ["free.before", "free.after", "free.end"] {
        assert_eq!(number(free), 128, "{free}");
    }
    // TAINT_USER.
    assert_ne!(number("tainted") & 1 << 6, 0);
}

/// What tests of removal build upon: the root port, the monitor, and the kernel's side of it.
#[test]
fn ssd_behind_a_port_is_removed_and_added_by_the_monitor_and_identified_again() {
    let lab = Lab::new("port");
    medium(&lab, "a.img", 16);
    let job = "
        . /machine.sh
        step there within 10 test -b /dev/nvme0n1
        step bind bind 0000:01:00.0
        step identify tandem identify --device pci:0000:01:00.0
        fact ready yes
        step gone within 30 sh -c '! test -e /sys/bus/pci/devices/0000:01:00.0'
        fact gone yes
        step 'there again' within 30 test -c /dev/nvme0
        step 'bind again' bind 0000:01:00.0
        step 'identify again' sh -c 'tandem identify --device pci:0000:01:00.0 | grep again'
        step 'no faults' no_faults";
    let ssds = [
        "--ssd",
        "none,port=on",
        "--namespace",
        "a.img",
        "--monitor",
        "monitor",
    ];
    let mut guest = start(&lab, &ssds, &[], job);
    guest.tells("ready");
    monitor(&lab, "device_del ssd0");
    guest.tells("gone");
    monitor(&lab, "device_add nvme,id=ssd1,bus=port-ssd0,serial=again");
    guest.ends_well();
}

#[test]
fn controller_reset_under_load_by_somebody_else_costs_no_request() {
    const LOAD: &str = "seed=11,queues=4,requests=5000,mib=8,block=512";
    let lab = Lab::new("reset");
    medium(&lab, "a.img", 64);
    medium(&lab, "b.img", 16);
    let job = format!(
        "
        . /machine.sh
        step bind bind 0000:00:05.0
        step 'bind another' bind 0000:00:06.0
        command_register() {{ dd if=/sys/bus/pci/devices/0000:00:06.0/config bs=1 skip=4 count=2 2>/dev/null | od -An -tx1; }}
        fact command.before $(command_register)
        step hugepages tandem setup-vfio hugepages 32
        step serve serve a --device pci:serial=ssd1 --blk path=/tmp/vm0.sock,queues=4
        fact command.serving $(command_register)
        fact hugepages.free $(cat /sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages)
        taskset 2 agent load {LOAD} /tmp/vm0.sock >/tmp/load 2>&1 &
        load=$!
        for resets in 1 2 3; do
            sleep 1
            if kill -0 $load; then echo 1 >/sys/bus/pci/devices/0000:00:06.0/reset; fi
        done
        step load wait $load
        tells load /tmp/load
        step finish finish a
        fact command.after $(command_register)
        tells log /tmp/a.log
        tells report /tmp/a.out
        step 'no faults' no_faults"
    );
    // The second by address is the one with that serial number.
    let ssds = ["--ssd", "b.img", "--ssd", "a.img,max_ioqpairs=8"];
    let facts = machine(&lab, &ssds, &job);
    // Memory and bus mastering on, INTx off; afterwards as before.
    assert_ne!(facts["command.serving"], facts["command.before"]);
    assert_eq!(facts["command.after"], facts["command.before"]);
    // PRP lists of four queue pairs, of two pages each, and their bounce buffers.
    let free: u64 = facts["hugepages.free"].parse().unwrap();
    assert!((1..=24).contains(&free), "{free} huge pages are free");
    report_of(&facts, "report");
    let device = facts["report"]
        .lines()
        .find(|line| line.starts_with("device d0:"));
    let numbers: Vec<u64> = device
        .unwrap()
        .split([' ', ','])
        .filter_map(|word| word.parse().ok())
        .collect();
    let [resets, resent, strays] = numbers[..] else {
        panic!("{device:?}")
    };
    assert!(
        (1..=3).contains(&resets) && resent > 0 && strays == 0,
        "{device:?}"
    );
    assert!(
        facts["log"].contains("someone has reset it"),
        "{}",
        facts["log"]
    );
    assert_image_holds(&lab, "a.img", Load::parse(LOAD));
}

/// The kernel asks for the SSD back (somebody pressed the button of its slot); the server drains and lets go, holds the
/// guest's requests, and goes on when the SSD is in its slot and bound again. The other SSD never notices.
#[test]
fn ssd_removed_under_load_and_put_back_goes_on_where_it_was() {
    const LOAD: &str = "seed=12,queues=2,requests=6000,mib=8,block=512";
    let lab = Lab::new("removal");
    medium(&lab, "a.img", 32);
    medium(&lab, "b.img", 32);
    let job = format!(
        "
        . /machine.sh
        step bind bind 0000:01:00.0
        step 'bind another' bind 0000:00:06.0
        step serve serve a --device pci:0000:01:00.0,name=goes,on_device_loss=hold --device pci:0000:00:06.0,name=stays \
            --blk path=/tmp/goes.sock,queues=2,device=goes --blk path=/tmp/stays.sock,queues=2,device=stays
        taskset 2 agent endure {LOAD} /tmp/goes.sock >/tmp/endure 2>&1 &
        endure=$!
        taskset 2 agent load {LOAD} /tmp/stays.sock >/tmp/load 2>&1 &
        load=$!
        sleep 1
        fact loading yes
        step lost within 60 grep -q 'device lost: requests wait' /tmp/a.log
        step gone within 30 sh -c '! test -e /sys/bus/pci/devices/0000:01:00.0'
        fact gone yes
        step 'there again' within 30 test -e /sys/bus/pci/devices/0000:01:00.0
        step 'bind again' bind 0000:01:00.0
        step back within 30 grep -q 'device is back: requests go on' /tmp/a.log
        step load wait $load
        step endure wait $endure
        tells load /tmp/load
        tells endure /tmp/endure
        step finish finish a
        tells log /tmp/a.log
        step 'no faults' no_faults"
    );
    let ssds = [
        "--ssd",
        "a.img,port=on",
        "--ssd",
        "b.img",
        "--monitor",
        "monitor",
    ];
    let mut guest = start(&lab, &ssds, &[], &job);
    guest.tells("loading");
    monitor(&lab, "device_del ssd0");
    guest.tells("gone");
    monitor(
        &lab,
        "device_add nvme,id=ssd2,bus=port-ssd0,drive=ssd0-disk,serial=ssd0",
    );
    let facts = guest.ends_well();
    assert!(
        facts["log"].contains("the system wants it back"),
        "{}",
        facts["log"]
    );
    assert!(!facts["log"].contains("device=stays"), "{}", facts["log"]);
    for image in ["a.img", "b.img"] {
        assert_image_holds(&lab, image, Load::parse(LOAD));
    }
}

/// Each mapping takes an entry of the container, and there are only so many: the session whose memory does not fit is told
/// so and ends; the one that is served goes on.
#[test]
fn session_without_an_entry_for_its_memory_is_refused_and_the_other_goes_on() {
    let lab = Lab::new("entries");
    medium(&lab, "a.img", 32);
    // 5 of the controller, 4 of each queue pair, and one guest with its one region.
    let job = "
        . /machine.sh
        step bind bind 0000:00:05.0
        step limit sh -c 'echo 14 >/sys/module/vfio_iommu_type1/parameters/dma_entry_limit'
        step serve serve a --device pci:0000:00:05.0 --blk path=/tmp/one.sock --blk path=/tmp/two.sock,ns=2
        taskset 2 agent load seed=5,queues=1,requests=20000,mib=16,block=512 /tmp/one.sock >/tmp/load 2>&1 &
        load=$!
        step connected within 30 grep -q 'front-end connected' /tmp/a.log
        sleep 0.5
        refused() {
            timeout 60 agent load seed=5,queues=1,requests=1,mib=8,block=512 /tmp/two.sock >/tmp/second 2>&1
            cat /tmp/second
            grep 'dma_entry_limit of the module vfio_iommu_type1' /tmp/a.log
        }
        step refused refused
        step 'still loading' kill -0 $load
        step load wait $load
        tells load /tmp/load
        step finish finish a
        tells log /tmp/a.log";
    let ssds = [
        "--ssd",
        "none",
        "--namespace",
        "a.img,nsid=1",
        "--namespace",
        "b.img,nsid=2",
    ];
    medium(&lab, "b.img", 16);
    let facts = machine(&lab, &ssds, job);
    assert!(
        facts["log"].contains("connection closed"),
        "{}",
        facts["log"]
    );
    assert_image_holds(
        &lab,
        "a.img",
        Load::parse("seed=5,queues=1,requests=20000,mib=16,block=512"),
    );
}

/// One command to QEMU's monitor (scripts/guest-run --monitor).
fn monitor(lab: &Lab, command: &str) {
    let mut socket = UnixStream::connect(lab.path("monitor")).unwrap();
    socket.write_all(format!("{command}\n").as_bytes()).unwrap();
    socket
        .set_read_timeout(Some(Duration::from_secs(1)))
        .unwrap();
    // Its prompt comes again when it has been done.
    let (mut said, mut prompts, mut byte) = (String::new(), 0, [0]);
    while prompts < 2 {
        socket
            .read_exact(&mut byte)
            .unwrap_or_else(|error| panic!("{command}: {error}: {said}"));
        said.push(char::from(byte[0]));
        prompts = said.matches("(qemu) ").count();
    }
    assert!(!said.contains("Error"), "{command}: {said}");
}
