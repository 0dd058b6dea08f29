//! A place to try the built server with Linux guests in QEMU: [`Lab`], and in it any number of [`Server`]s and [`Guest`]s.
//!
//! Labs stand one at a time, since a polled core and an emulated machine leave no room for more. Every wait has a
//! deadline. Nothing stays when a test ends, however it ends: processes are killed when they are dropped and by the kernel
//! when the thread that started them dies, and the lab's folder goes last. A test that fails prints what they all said.
//!
//! Guests boot from what `scripts/guest-image` made, by `scripts/guest-run`; `scripts/guest/job.sh` says how they speak.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long the server may take to be ready, to report and to end.
const SERVER_DEADLINE: Duration = Duration::from_secs(15);
/// How long a guest may be silent. Emulated on a busy machine, it boots in some ten seconds at worst.
const GUEST_DEADLINE: Duration = Duration::from_secs(120);
/// A kernel that has not started after this long does not start any more: it takes two seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);
const BOOTS: u32 = 3;

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// A folder for sockets, images and logs, and the right to run guests.
pub struct Lab {
    folder: PathBuf,
    /// Dropped last.
    _turn: MutexGuard<'static, ()>,
}

impl Lab {
    /// Waits for its turn. Fails if there is nothing that a guest could boot from.
    pub fn new(name: &str) -> Lab {
        let turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
        assert!(
            image_folder().join("stamp").exists(),
            "{} is not there: guests have nothing to boot from. Run scripts/dev test",
            image_folder().display()
        );
        // Short: a socket's path has at most 107 bytes.
        let folder = std::env::temp_dir().join(format!("tandem-{name}-{}", std::process::id()));
        fs::create_dir(&folder).unwrap();
        Lab {
            folder,
            _turn: turn,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A log file, numbered, since several of a kind may run.
    fn log(&self, kind: &str) -> PathBuf {
        let number = fs::read_dir(&self.folder).unwrap().count();
        self.path(&format!("{number}-{kind}.log"))
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let entries = fs::read_dir(&self.folder).into_iter().flatten().flatten();
            let mut logs: Vec<PathBuf> = entries.map(|entry| entry.path()).collect();
            logs.retain(|path| path.extension().is_some_and(|extension| extension == "log"));
            logs.sort();
            for path in logs {
                let text =
                    String::from_utf8_lossy(&fs::read(&path).unwrap_or_default()).into_owned();
                let lines: Vec<&str> = text.lines().collect();
                let tail = lines[lines.len().saturating_sub(40)..].join("\n  | ");
                eprintln!("{}, its end:\n  | {tail}", path.display());
            }
        }
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// Beside the other things that a build makes, where `scripts/guest-image` puts it.
fn image_folder() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    target.join("guest")
}

/// The server under test: the one that cargo built for this test, or the optimised one of `scripts/dev test`.
fn server_binary() -> PathBuf {
    match std::env::var_os("TANDEM_SERVER") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_tandem").into(),
    }
}

/// A command that dies with the thread that starts it.
fn bound(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(program)
        .stdin(Stdio::null());
    command
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Polls until `condition` gives something.
#[track_caller]
pub fn eventually<T>(
    deadline: Duration,
    what: &str,
    mut condition: impl FnMut() -> Option<T>,
) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(
            start.elapsed() < deadline,
            "not within {deadline:?}: {what}"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}

// ---- the server ----

/// `tandem serve`, in the lab's folder.
pub struct Server {
    process: Child,
    out: PathBuf,
    log: PathBuf,
    devices: usize,
}

/// How a server ended.
pub struct End {
    pub status: ExitStatus,
    pub after: Duration,
    pub report: Report,
}

impl Server {
    /// Starts it on core 0 and waits until it is ready.
    pub fn start(lab: &Lab, arguments: &[&str]) -> Server {
        let (out, log) = (lab.log("server-out"), lab.log("server"));
        let mut command = bound(&server_binary());
        command
            .args(["serve", "--cores", "0"])
            .args(arguments)
            .current_dir(&lab.folder);
        command
            .stdout(File::create(&out).unwrap())
            .stderr(File::create(&log).unwrap());
        let process = command.spawn().unwrap();
        let devices = arguments
            .iter()
            .filter(|argument| **argument == "--device")
            .count();
        let mut server = Server {
            process,
            out,
            log,
            devices,
        };
        eventually(SERVER_DEADLINE, "the server is ready", || {
            assert_eq!(
                server.process.try_wait().unwrap(),
                None,
                "the server ended at once"
            );
            server.output().starts_with("tandem: ready\n").then_some(())
        });
        server
    }

    fn output(&self) -> String {
        fs::read_to_string(&self.out).unwrap()
    }

    /// What it logged so far.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Its counters now (SIGUSR1).
    pub fn report(&self) -> Report {
        let before = self.output().len();
        signal(&self.process, Signal::USR1);
        eventually(SERVER_DEADLINE, "a report", || {
            Report::parse(&self.output()[before..], self.devices)
        })
    }

    /// Ends it (SIGTERM).
    pub fn end(mut self) -> End {
        let before = self.output().len();
        let start = Instant::now();
        signal(&self.process, Signal::TERM);
        let status = eventually(SERVER_DEADLINE, "the server ends", || {
            self.process.try_wait().unwrap()
        });
        let after = start.elapsed();
        let report =
            Report::parse(&self.output()[before..], self.devices).expect("a report at the end");
        End {
            status,
            after,
            report,
        }
    }

    /// Kills it at once, as a crash would.
    pub fn crash(mut self) {
        self.process.kill().unwrap();
        self.process.wait().unwrap();
    }

    /// Ends it, with everything as it should be: exit code 0, no access outside guest memory, no error.
    #[track_caller]
    pub fn end_well(self) -> Report {
        let end = self.end();
        assert!(end.status.success(), "the server ended with {}", end.status);
        assert_eq!(
            (end.report.iommu_violations, end.report.driver_errors),
            (0, 0)
        );
        for counter in ["errors", "malformed", "unsupp"] {
            assert_eq!(
                end.report.total(counter),
                0,
                "{counter} of {:?}",
                end.report
            );
        }
        end.report
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// What a server prints of its virtqueues.
#[derive(Debug)]
pub struct Report {
    pub queues: Vec<Queue>,
    pub iommu_violations: u64,
    pub driver_errors: u64,
}

/// One row: a disk by its socket, and every counter by the name in its column.
#[derive(Debug)]
pub struct Queue {
    pub disk: String,
    counters: HashMap<String, u64>,
}

impl Queue {
    #[track_caller]
    pub fn get(&self, counter: &str) -> u64 {
        let value = self.counters.get(counter);
        *value.unwrap_or_else(|| panic!("no counter {counter} in {self:?}"))
    }
}

impl Report {
    #[track_caller]
    pub fn total(&self, counter: &str) -> u64 {
        self.queues.iter().map(|queue| queue.get(counter)).sum()
    }

    /// `None` while it is not complete.
    fn parse(text: &str, devices: usize) -> Option<Report> {
        let (tables, trailer) = text.split_at(text.find("\ndevice ")? + 1);
        if !trailer.ends_with('\n') || trailer.lines().count() < devices {
            return None;
        }
        let mut queues: Vec<Queue> = Vec::new();
        for table in tables.split("\n\n") {
            let lines: Vec<Vec<char>> = table.lines().map(|line| line.chars().collect()).collect();
            // Names of counters contain spaces, so columns are cut where the cells of the rows end.
            let ends = cell_ends(&lines[1]);
            for (index, line) in lines[1..lines.len() - 1].iter().enumerate() {
                let disk: String = line.iter().take_while(|char| **char != ' ').collect();
                if queues.len() <= index {
                    queues.push(Queue {
                        disk,
                        counters: HashMap::new(),
                    });
                }
                for (&end, &begin) in ends[1..].iter().zip(&ends) {
                    let name = if begin == ends[0] {
                        "vq".to_owned()
                    } else {
                        cell(&lines[0], begin, end)
                    };
                    let value = cell(line, begin, end).replace(',', "");
                    // "idle" is a share, not a count.
                    if let Ok(value) = value.parse() {
                        queues[index].counters.insert(name, value);
                    }
                }
            }
        }
        let sum = |what: &str| trailer.lines().map(|line| number_after(line, what)).sum();
        Some(Report {
            queues,
            iommu_violations: sum("iommu violations "),
            driver_errors: sum("driver errors "),
        })
    }
}

fn cell_ends(line: &[char]) -> Vec<usize> {
    let ends = (0..line.len())
        .filter(|&at| line[at] != ' ' && line.get(at + 1).is_none_or(|next| *next == ' '));
    ends.map(|at| at + 1).collect()
}

fn cell(line: &[char], begin: usize, end: usize) -> String {
    line[begin..end]
        .iter()
        .collect::<String>()
        .trim()
        .to_owned()
}

fn number_after(line: &str, what: &str) -> u64 {
    let (_, rest) = line
        .split_once(what)
        .unwrap_or_else(|| panic!("no `{what}` in {line:?}"));
    rest.split(|char: char| !char.is_ascii_digit())
        .next()
        .unwrap()
        .parse()
        .unwrap()
}

// ---- the guest ----

/// How to start a guest.
pub struct Setup<'a> {
    pub cpus: usize,
    pub reboots: bool,
    /// Socket in the lab's folder, then properties as `scripts/guest-run` takes them.
    pub disks: &'a [&'a str],
    /// The job after its first line.
    pub job: &'a str,
}

impl<'a> Setup<'a> {
    pub fn new(disks: &'a [&'a str], job: &'a str) -> Self {
        Setup {
            cpus: 4,
            reboots: false,
            disks,
            job,
        }
    }
}

/// A virtual machine that runs a job.
pub struct Guest {
    qemu: Child,
    console: Receiver<String>,
    qemu_log: PathBuf,
    /// A server that is restarted under it is something that QEMU has words for.
    reconnects: bool,
    facts: HashMap<String, String>,
}

impl Guest {
    /// Boots a guest. The emulator now and then locks all virtual CPUs up while the kernel starts (stop_machine under
    /// multi-threaded TCG), before any driver of ours is loaded: then the guest is booted anew.
    pub fn boot(lab: &Lab, setup: &Setup<'_>) -> Guest {
        for _ in 0..BOOTS {
            let mut guest = Guest::power_on(lab, setup);
            if guest.comes_up() {
                return guest;
            }
            eprintln!("the guest's kernel did not start within {BOOT_DEADLINE:?}: booted again");
        }
        panic!("the guest's kernel did not start {BOOTS} times in a row");
    }

    /// Waits for init's first words. QEMU's early end is for others to notice.
    fn comes_up(&mut self) -> bool {
        let start = Instant::now();
        loop {
            let left = BOOT_DEADLINE.saturating_sub(start.elapsed());
            match self.console.recv_timeout(left) {
                Ok(line) if line.contains("TANDEM-UP") => return true,
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => return false,
                Err(RecvTimeoutError::Disconnected) => return true,
            }
        }
    }

    fn power_on(lab: &Lab, setup: &Setup<'_>) -> Guest {
        let (log, qemu_log) = (lab.log("console"), lab.log("qemu"));
        let job = log.with_extension("job");
        fs::write(&job, format!(". /job.sh\n{}", setup.job)).unwrap();
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts");
        let mut command = bound(&scripts.join("guest-run"));
        command
            .args(["--cpus", &setup.cpus.to_string(), "--job"])
            .arg(job);
        command.args(setup.reboots.then_some("--reboots"));
        for disk in setup.disks {
            command.args(["--disk", disk]);
        }
        // The script finds the images where the build is.
        command.env("CARGO_TARGET_DIR", image_folder().parent().unwrap());
        command
            .current_dir(&lab.folder)
            .stdout(Stdio::piped())
            .stderr(File::create(&qemu_log).unwrap());
        let mut qemu = command.spawn().unwrap();
        let mut output = BufReader::new(qemu.stdout.take().unwrap());
        let mut log = File::create(log).unwrap();
        let (sender, console) = channel();
        // Ends with QEMU, which is the only writer.
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while output
                .read_until(b'\n', &mut line)
                .is_ok_and(|length| length > 0)
            {
                let _ = log.write_all(&line);
                let _ = sender.send(String::from_utf8_lossy(&line).trim_end().to_owned());
                line.clear();
            }
        });
        Guest {
            qemu,
            console,
            qemu_log,
            reconnects: setup.disks.iter().any(|disk| disk.contains("reconnect=")),
            facts: HashMap::new(),
        }
    }

    /// Waits until the guest tells `key`, and returns the value. Fails if the guest ends or fails first.
    #[track_caller]
    pub fn tells(&mut self, key: &str) -> String {
        match self.facts.get(key) {
            Some(value) => value.clone(),
            None => self.listen(|guest, _| guest.facts.get(key).cloned()),
        }
    }

    /// Waits until the job ended well and the machine is off, and returns all facts. QEMU must not have complained.
    #[track_caller]
    pub fn ends_well(mut self) -> HashMap<String, String> {
        self.listen(|_, line| (line == "TANDEM-RESULT ok").then_some(()));
        let status = eventually(GUEST_DEADLINE, "QEMU ends", || {
            self.qemu.try_wait().unwrap()
        });
        assert!(status.success(), "QEMU ended with {status}");
        let words = fs::read_to_string(&self.qemu_log).unwrap();
        assert!(
            self.reconnects || words.is_empty(),
            "QEMU complains: {words}"
        );
        std::mem::take(&mut self.facts)
    }

    /// Kills QEMU at once, as a crash would.
    pub fn crash(mut self) {
        self.qemu.kill().unwrap();
        self.qemu.wait().unwrap();
    }

    #[track_caller]
    fn listen<T>(&mut self, mut wanted: impl FnMut(&Guest, &str) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let line = match self
                .console
                .recv_timeout(GUEST_DEADLINE.saturating_sub(start.elapsed()))
            {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the guest did not get there within {GUEST_DEADLINE:?}")
                }
                Err(RecvTimeoutError::Disconnected) => {
                    panic!("QEMU ended before the guest got there")
                }
            };
            if let Some((key, value)) = line
                .strip_prefix("TANDEM ")
                .and_then(|fact| fact.split_once('='))
            {
                self.facts.insert(key.to_owned(), value.to_owned());
            }
            let failed = ["TANDEM-STEP fail", "TANDEM-RESULT fail", "Kernel panic"];
            if failed.iter().any(|failed| line.contains(failed)) {
                // What follows explains it.
                while self.console.recv_timeout(Duration::from_secs(2)).is_ok() {}
                panic!("the guest failed: {line}");
            }
            if let Some(found) = wanted(self, &line) {
                return found;
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// Whether the guest's driver negotiated a feature, from the `features` that the guest told.
pub fn has_feature(facts: &HashMap<String, String>, disk: &str, bit: usize) -> bool {
    facts[&format!("{disk}.features")].as_bytes()[bit] == b'1'
}
