//! `tandem serve` in a lab: started, asked for its counters, ended.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::lab::{Lab, bound, eventually};
use crate::report::Report;

/// How long the server may take to be ready, to report and to end.
const SERVER_DEADLINE: Duration = Duration::from_secs(15);

/// The server under test: the one that cargo built for this test, or the optimised one of `scripts/dev test`.
pub fn server_binary() -> PathBuf {
    match std::env::var_os("TANDEM_SERVER") {
        Some(path) => path.into(),
        None => env!("CARGO_BIN_EXE_tandem").into(),
    }
}

fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

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
    /// Of all devices.
    pub iommu_violations: u64,
    pub driver_errors: u64,
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

    /// `None` while it is not complete: a line for each device is the last of it.
    fn report_since(&self, before: usize) -> Option<Report> {
        let output = &self.output()[before..];
        let complete =
            output.ends_with('\n') && output.matches("iommu violations ").count() >= self.devices;
        Report::parse(output).filter(|_| complete)
    }

    /// Its counters now (SIGUSR1).
    pub fn report(&self) -> Report {
        let before = self.output().len();
        signal(&self.process, Signal::USR1);
        eventually(SERVER_DEADLINE, "a report", || self.report_since(before))
    }

    /// CPU time so far, to a hundredth of a second.
    pub fn cpu_time(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.process.id())).unwrap();
        // The name, which may contain anything, ends with the last parenthesis; user and system time are 11 further on.
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ');
        let ticks = fields
            .skip(11)
            .take(2)
            .map(|field| field.parse::<u64>().unwrap());
        Duration::from_millis(ticks.sum::<u64>() * 10)
    }

    /// What it printed last of its reactor's sleeps.
    #[track_caller]
    pub fn sleeps(&self) -> Sleeps {
        let output = self.output();
        Sleeps::parse(output.rsplit("\ncore 0: ").next().unwrap())
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
        let output = self.output();
        let report = self.report_since(before).expect("a report at the end");
        let sum = |what: &str| {
            let lines = output[before..].lines();
            let devices = lines.filter(|line| line.contains(what));
            devices.map(|line| number_after(line, what)).sum()
        };
        End {
            status,
            after,
            report,
            iommu_violations: sum("iommu violations "),
            driver_errors: sum("driver errors "),
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
        assert_eq!((end.iommu_violations, end.driver_errors), (0, 0));
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

/// How a reactor in adaptive mode slept.
#[derive(Debug)]
pub struct Sleeps {
    pub sleeps: u64,
    pub kicks: u64,
    pub interrupts: u64,
    pub messages: u64,
}

impl Sleeps {
    /// Of its line in a report.
    #[track_caller]
    pub fn parse(text: &str) -> Sleeps {
        Sleeps {
            sleeps: number_after(text, "sleeps "),
            kicks: number_after(text, "by kick "),
            interrupts: number_after(text, "interrupt "),
            messages: number_after(text, "message "),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
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
