//! The built program as its users start it: what it prints, when it refuses, how it ends.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

fn tandem() -> Command {
    Command::new(env!("CARGO_BIN_EXE_tandem"))
}

/// A folder of its own for each test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path =
            std::env::temp_dir().join(format!("tandem-serve-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn blk(&self, name: &str, more: &str) -> String {
        format!("path={}{more}", self.0.join(name).display())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A server that said that it is ready; killed when a test fails.
struct Serving(Child);

impl Serving {
    fn start(command: &mut Command) -> Serving {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        let mut out = BufReader::with_capacity(1, child.stdout.as_mut().unwrap());
        out.read_line(&mut line).unwrap();
        assert_eq!(line, "tandem: ready\n");
        Serving(child)
    }

    fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.0.id()).unwrap();
        // SAFETY: sends a signal to a child that was not waited for yet.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// SIGTERM: what it printed since, its exit code, and how long it took.
    fn end(mut self) -> (String, Option<i32>, Duration) {
        let start = Instant::now();
        self.signal(libc::SIGTERM);
        let mut text = String::new();
        self.0
            .stdout
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        let status = self.0.wait().unwrap();
        (text, status.code(), start.elapsed())
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A front-end that was answered: GET_FEATURES, with VIRTIO_BLK_F_MQ among them.
fn attach(path: &Path) -> UnixStream {
    let mut socket = UnixStream::connect(path).unwrap();
    socket
        .write_all(&[1_u32, 1, 0].map(u32::to_le_bytes).concat())
        .unwrap();
    let mut answer = [0; 20];
    socket.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..12], [1_u32, 5, 8].map(u32::to_le_bytes).concat());
    assert_ne!(answer[13] & 1 << 4, 0, "{answer:?}");
    socket
}

fn refused(output: &Output, what: &str) {
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains(what), "{what}: {error}");
    assert!(output.stdout.is_empty(), "it started something");
    assert!(!error.contains("panicked"), "{error}");
}

fn serve(args: &[&str]) -> Command {
    let mut command = tandem();
    command.arg("serve").args(args);
    command
}

const RAM: [&str; 4] = ["--device", "model:ram,size=64M", "--cores", "0"];

#[test]
fn serve_that_cannot_start_says_why_exits_2_and_leaves_nothing() {
    let folder = Folder::new();
    let (a, b) = (folder.blk("a", ""), folder.blk("b", ""));
    let taken = folder.blk("taken", "");
    let _listener = UnixListener::bind(folder.0.join("taken")).unwrap();
    std::fs::write(folder.0.join("file"), "precious").unwrap();
    let file = folder.blk("file", "");
    let absent = folder.blk("no/such/folder/a", "");
    let cases: &[(&[&str], &str)] = &[
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                &a,
                "--cores",
                "4000",
            ],
            "4000",
        ),
        (
            &["--device", "pci:ff:1f.7", "--blk", &a, "--cores", "0"],
            "cannot claim 0000:ff:1f.7: there is no such PCI function",
        ),
        (
            &[
                "--device",
                "pci:serial=NO-SUCH-SSD",
                "--blk",
                &a,
                "--cores",
                "0",
            ],
            "no SSD with serial number NO-SUCH-SSD is bound to vfio-pci",
        ),
        (
            &["--device", "floppy:a", "--blk", &a, "--cores", "0"],
            "floppy",
        ),
        (
            &[
                "--device",
                "model:file,path=/no/such/disk.img",
                "--blk",
                &a,
                "--cores",
                "0",
            ],
            "/no/such/disk.img",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M,colour=red",
                "--blk",
                &a,
                "--cores",
                "0",
            ],
            "colour",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                &taken,
                "--cores",
                "0",
            ],
            "another process",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                &file,
                "--cores",
                "0",
            ],
            "not a socket",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                &absent,
                "--cores",
                "0",
            ],
            "no/such/folder",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                "fd=777",
                "--cores",
                "0",
            ],
            "777",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                &a,
                "--blk",
                &b,
                "--cores",
                "0",
            ],
            "namespace",
        ),
        (
            &[
                "--device",
                "model:ram,size=64M",
                "--blk",
                &a,
                "--cores",
                "0",
                "--config",
                "/no/such.toml",
            ],
            "/no/such.toml",
        ),
    ];
    for (args, what) in cases {
        refused(&serve(args).output().unwrap(), what);
        for name in ["a", "b"] {
            assert!(
                !folder.0.join(name).exists(),
                "{args:?} left a socket behind"
            );
        }
    }
    assert_eq!(std::fs::read(folder.0.join("file")).unwrap(), b"precious");
    assert!(folder.0.join("taken").exists());
}

#[test]
fn later_socket_that_cannot_be_had_removes_the_earlier_one() {
    let folder = Folder::new();
    let _listener = UnixListener::bind(folder.0.join("taken")).unwrap();
    let (a, taken) = (folder.blk("a", ",ns=1"), folder.blk("taken", ",ns=2"));
    let device = "model:ram,size=64M,namespaces=2";
    let args = [
        "--device", device, "--blk", &a, "--blk", &taken, "--cores", "0",
    ];
    refused(&serve(&args).output().unwrap(), "another process");
    assert!(!folder.0.join("a").exists());
}

#[test]
fn dry_run_prints_the_plan_and_touches_nothing() {
    let folder = Folder::new();
    let blk = folder.blk("a", ",queues=4");
    let image = folder.0.join("disk.img");
    let device = format!("model:file,path={},size=64M", image.display());
    let args = [
        "--device",
        &device,
        "--blk",
        &blk,
        "--cores",
        "0",
        "--dry-run",
    ];
    let output = serve(&args).output().unwrap();
    let plan = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(0));
    assert!(plan.contains("queue@core: 0@0 1@0 2@0 3@0"), "{plan}");
    assert!(!image.exists() && !folder.0.join("a").exists());
}

#[test]
fn null_device_is_served_with_a_warning_that_data_written_is_lost() {
    let folder = Folder::new();
    let blk = folder.blk("a", "");
    let args = [
        "--device",
        "model:null,size=1T",
        "--blk",
        &blk,
        "--cores",
        "0",
    ];
    let plan = serve(&[&args[..], &["--dry-run"]].concat())
        .output()
        .unwrap();
    let plan = String::from_utf8(plan.stdout).unwrap();
    assert!(plan.contains("null: data written is lost, 1T"), "{plan}");
    let mut server = Serving::start(serve(&args).stderr(Stdio::piped()));
    drop(attach(&folder.0.join("a")));
    let mut errors = server.0.stderr.take().unwrap();
    assert_eq!(server.end().1, Some(0));
    let mut log = String::new();
    errors.read_to_string(&mut log).unwrap();
    let warns = |line: &str| line.contains("WARN") && line.contains("data written is lost");
    assert!(log.lines().any(warns), "{log}");
    let text = identify("model:null,size=1T", &[]);
    assert!(text.contains("Tandem null (keeps no data)"), "{text}");
}

#[test]
fn sigusr1_prints_the_counters_and_sigterm_ends_within_a_second_with_a_client_attached() {
    let folder = Folder::new();
    let blk = folder.blk("a", ",queues=3");
    let mut serving = Serving::start(serve(&RAM).args(["--blk", &blk]));
    let mut front_end = attach(&folder.0.join("a"));
    serving.signal(libc::SIGUSR1);
    let mut out = BufReader::with_capacity(1, serving.0.stdout.as_mut().unwrap());
    let mut report = String::new();
    while !report.contains("iommu violations 0") {
        assert_ne!(out.read_line(&mut report).unwrap(), 0, "{report}");
    }
    assert_eq!(report.matches("\ntotal").count(), 2, "{report}");
    let (text, code, took) = serving.end();
    assert!(
        text.contains("iommu violations 0, driver errors 0"),
        "{text}"
    );
    assert_eq!(code, Some(0));
    assert!(took < Duration::from_secs(1), "{took:?}");
    assert!(!folder.0.join("a").exists());
    assert_eq!(front_end.read(&mut [0]).unwrap(), 0, "still connected");
}

#[test]
fn socket_that_is_handed_over_is_served_and_stays() {
    let folder = Folder::new();
    let path = folder.0.join("handed");
    let listener = UnixListener::bind(&path).unwrap();
    let fd = listener.as_raw_fd();
    let mut command = serve(&RAM);
    command.args(["--blk", "fd=9,queues=2"]);
    // SAFETY: both are async-signal-safe; they hand the socket over under a number that survives exec, also when it has
    // that number already: then dup2 alone would leave it to be closed.
    unsafe {
        command.pre_exec(move || match libc::dup2(fd, 9) {
            9 if libc::fcntl(9, libc::F_SETFD, 0) == 0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        });
    }
    let serving = Serving::start(&mut command);
    let _front_end = attach(&path);
    assert_eq!(serving.end().1, Some(0));
    assert!(path.exists(), "the socket belongs to whoever bound it");
}

#[test]
fn image_in_use_by_another_server_is_refused() {
    let folder = Folder::new();
    let image = folder.0.join("disk.img");
    let device = format!("model:file,path={},size=64M", image.display());
    let args = |blk: &str| {
        let mut command = serve(&["--device", &device, "--cores", "0"]);
        command.args(["--blk", blk]);
        command
    };
    let serving = Serving::start(&mut args(&folder.blk("a", "")));
    refused(
        &args(&folder.blk("b", "")).output().unwrap(),
        "another process",
    );
    assert_eq!(serving.end().1, Some(0));
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 64 << 20);
    let again = Serving::start(&mut args(&folder.blk("b", "")));
    assert_eq!(again.end().1, Some(0));
}

fn identify(spec: &str, more: &[&str]) -> String {
    let output = tandem()
        .args(["identify", "--device", spec])
        .args(more)
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn identify_tells_what_the_controller_was_made_of_as_json_and_text() {
    let spec = "model:ram,size=96M,namespaces=3,block=4096,queues=5,serial=S4EWNX0R";
    let json: serde_json::Value = serde_json::from_str(&identify(spec, &["--json"])).unwrap();
    assert_eq!(json["controller"]["sn"], "S4EWNX0R");
    assert_eq!(json["controller"]["nn"], 3);
    assert_eq!(json["controller"]["tnvmcap"], 96 << 20);
    assert_eq!(json["controller"]["sqes"], 0x66);
    let namespaces = json["namespaces"].as_array().unwrap();
    assert_eq!(namespaces.len(), 3);
    for (i, namespace) in namespaces.iter().enumerate() {
        assert_eq!(namespace["nsid"], i + 1);
        assert_eq!(namespace["nsze"], (32 << 20) / 4096);
        assert_eq!(namespace["lbafs"][0]["ds"], 12);
        assert_eq!(namespace["nguid"].as_str().unwrap().len(), 32);
    }
    let text = identify(spec, &[]);
    assert!(text.contains("sn        : S4EWNX0R"), "{text}");
    assert!(text.contains("lbads:12 rp:0x0 (in use)"), "{text}");
}

#[test]
fn identify_of_nothing_is_refused() {
    for (spec, what) in [
        (
            "pci:ff:1f.7",
            "cannot claim 0000:ff:1f.7: there is no such PCI function",
        ),
        ("model:file,path=/no/such/disk.img", "/no/such/disk.img"),
    ] {
        let output = tandem()
            .args(["identify", "--device", spec])
            .output()
            .unwrap();
        refused(&output, what);
    }
    assert!(!Path::new("/no/such/disk.img").exists());
}
