//! A Linux guest in a lab: booted, listened to, powered off.
//!
//! Guests boot from what `scripts/guest-image` made, by `scripts/guest-run`; `scripts/guest/job.sh` says how they speak.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use crate::lab::{Lab, bound, eventually, image_folder};

/// How long a guest may be silent. Emulated on a busy machine, it boots in some ten seconds at worst.
const GUEST_DEADLINE: Duration = Duration::from_secs(120);
/// A kernel that has not started after this long does not start any more: it takes two seconds.
const BOOT_DEADLINE: Duration = Duration::from_secs(30);
const BOOTS: u32 = 3;

/// How to start a guest.
pub struct Setup<'a> {
    pub cpus: usize,
    pub reboots: bool,
    /// Socket in the lab's folder, then properties as `scripts/guest-run` takes them.
    pub disks: &'a [&'a str],
    /// More arguments of `scripts/guest-run`.
    pub more: &'a [&'a str],
    /// QEMU may say lines with these words.
    pub complaints: &'a [&'a str],
    /// How long the job may go on without an answer that the test waits for.
    pub deadline: Duration,
    /// The job after its first line.
    pub job: &'a str,
}

impl<'a> Setup<'a> {
    pub fn new(disks: &'a [&'a str], job: &'a str) -> Self {
        Setup {
            cpus: 4,
            reboots: false,
            disks,
            more: &[],
            complaints: &[],
            deadline: GUEST_DEADLINE,
            job,
        }
    }
}

/// A virtual machine that runs a job.
pub struct Guest {
    qemu: Child,
    console: Receiver<String>,
    qemu_log: PathBuf,
    complaints: Vec<String>,
    deadline: Duration,
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
        command.args(setup.more);
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
            complaints: setup
                .complaints
                .iter()
                .map(|words| (*words).to_owned())
                .collect(),
            deadline: setup.deadline,
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
        let status = eventually(self.deadline, "QEMU ends", || self.qemu.try_wait().unwrap());
        assert!(status.success(), "QEMU ended with {status}");
        let words = fs::read_to_string(&self.qemu_log).unwrap();
        let expected = |line: &&str| self.complaints.iter().any(|words| line.contains(words));
        let unexpected: Vec<&str> = words.lines().filter(|line| !expected(line)).collect();
        assert!(unexpected.is_empty(), "QEMU complains: {unexpected:#?}");
        std::mem::take(&mut self.facts)
    }

    #[track_caller]
    fn listen<T>(&mut self, mut wanted: impl FnMut(&Guest, &str) -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            let line = match self
                .console
                .recv_timeout(self.deadline.saturating_sub(start.elapsed()))
            {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    panic!("the guest did not get there within {:?}", self.deadline)
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
            // A file's lines are one fact, under its name.
            if let Some(text) = line.strip_prefix("TANDEM-FILE ") {
                let (key, text) = text.split_once(' ').unwrap_or((text, ""));
                let fact = self.facts.entry(key.to_owned()).or_default();
                *fact += text;
                *fact += "\n";
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
