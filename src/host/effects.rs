//! The seam between what setup decides and the machine: each way to change something, and the few ways to ask that are
//! not plain reading. [`System`] does it, [`DryRun`] says what it would do, and a test plays the kernel.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// How long a program that is run may take: `modprobe` and `wipefs` wait for devices.
const PROGRAM_DEADLINE: Duration = Duration::from_secs(30);

/// A device or a lock that is held until this is dropped.
#[derive(Debug)]
pub struct Held {
    _file: Option<File>,
}

impl Held {
    /// Of a stand-in: nothing is held.
    #[must_use]
    pub fn nothing() -> Held {
        Held { _file: None }
    }

    fn file(file: File) -> Held {
        Held { _file: Some(file) }
    }
}

/// How a program ended.
#[derive(Clone, Debug)]
pub struct Ran {
    /// It ended with 0.
    pub success: bool,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error, or how it ended.
    pub complaint: String,
}

/// What setup does to the machine. The first four ask, the others change.
pub trait Effects {
    /// The user may see and do everything.
    fn is_root(&self) -> bool;

    /// Steps are taken: what they lead to can be looked for.
    fn acts(&self) -> bool;

    /// Runs a program that only looks.
    ///
    /// # Errors
    /// `NotFound` when there is no such program, `TimedOut` when it does not end.
    fn look(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran>;

    /// Opens a block device exclusively (O_EXCL), without writing: the kernel refuses it while anything has claimed
    /// the device or a part of it, and refuses all others until the result is dropped.
    ///
    /// # Errors
    /// `ResourceBusy` when it is claimed.
    fn claim(&mut self, node: &Path) -> io::Result<Held>;

    /// Waits until no other process holds this lock file; created if needed.
    ///
    /// # Errors
    /// `WouldBlock` when another process has it.
    fn lock(&mut self, path: &Path) -> io::Result<Held>;

    /// Writes to a file that is there, in one call, such as an attribute in sysfs.
    ///
    /// # Errors
    /// As the kernel answers.
    fn write(&mut self, path: &Path, value: &str) -> io::Result<()>;

    /// Runs a program that changes something.
    ///
    /// # Errors
    /// As [`look`](Effects::look).
    fn run(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran>;

    /// Gives a file to a user.
    ///
    /// # Errors
    /// As the kernel answers.
    fn chown(&mut self, path: &Path, user: u32) -> io::Result<()>;

    /// Replaces a file's text in one step; makes its folder.
    ///
    /// # Errors
    /// As the kernel answers.
    fn save(&mut self, path: &Path, text: &str) -> io::Result<()>;

    /// Removes a file; one that is not there is none the worse.
    ///
    /// # Errors
    /// As the kernel answers.
    fn remove(&mut self, path: &Path) -> io::Result<()>;

    /// Lets time pass. Who waits counts: there is no other clock.
    fn pause(&mut self, time: Duration);

    /// What would have been done since the last call, a line each. Empty where it is done.
    fn steps(&mut self) -> Vec<String> {
        Vec::new()
    }
}

/// This machine.
#[derive(Debug, Default)]
pub struct System;

impl Effects for System {
    fn is_root(&self) -> bool {
        rustix::process::geteuid().is_root()
    }

    fn acts(&self) -> bool {
        true
    }

    fn look(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran> {
        self.run(program, arguments)
    }

    fn claim(&mut self, node: &Path) -> io::Result<Held> {
        let file = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_NONBLOCK)
            .open(node)?;
        Ok(Held::file(file))
    }

    fn lock(&mut self, path: &Path) -> io::Result<Held> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let file = File::create(path)?;
        match file.try_lock() {
            Ok(()) => Ok(Held::file(file)),
            Err(TryLockError::WouldBlock) => Err(ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        OpenOptions::new()
            .write(true)
            .open(path)?
            .write_all(value.as_bytes())
    }

    fn run(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran> {
        // What only root uses is in these folders, which are not in everyone's PATH.
        let path = std::env::var("PATH").unwrap_or_default();
        let mut child = Command::new(program)
            .args(arguments)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > PROGRAM_DEADLINE {
                // It may be stuck in the kernel, so its end is not waited for.
                let _ = child.kill();
                return Err(io::Error::new(
                    ErrorKind::TimedOut,
                    format!("it did not end within {} s", PROGRAM_DEADLINE.as_secs()),
                ));
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let text = |pipe: Option<&mut dyn Read>| {
            let mut bytes = Vec::new();
            if let Some(pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let stdout = text(child.stdout.as_mut().map(|pipe| -> &mut dyn Read { pipe }));
        let stderr = text(child.stderr.as_mut().map(|pipe| -> &mut dyn Read { pipe }));
        let complaint = match stderr.trim() {
            "" => status.to_string(),
            stderr => stderr.to_owned(),
        };
        Ok(Ran {
            success: status.success(),
            stdout,
            complaint,
        })
    }

    fn chown(&mut self, path: &Path, user: u32) -> io::Result<()> {
        std::os::unix::fs::chown(path, Some(user), None)
    }

    fn save(&mut self, path: &Path, text: &str) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let draft = path.with_extension("new");
        fs::write(&draft, text)?;
        fs::rename(&draft, path)
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn pause(&mut self, time: Duration) {
        std::thread::sleep(time);
    }
}

/// Asks the machine behind it and changes nothing: each change becomes a line of [`steps`](Effects::steps).
#[derive(Debug)]
pub struct DryRun<E> {
    machine: E,
    steps: Vec<String>,
}

impl<E> DryRun<E> {
    /// Nothing is done to `machine`.
    pub fn of(machine: E) -> DryRun<E> {
        DryRun {
            machine,
            steps: Vec::new(),
        }
    }

    fn step(&mut self, text: String) -> io::Result<()> {
        self.steps.push(text);
        Ok(())
    }
}

impl<E: Effects> Effects for DryRun<E> {
    fn is_root(&self) -> bool {
        self.machine.is_root()
    }

    fn acts(&self) -> bool {
        false
    }

    fn look(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran> {
        self.machine.look(program, arguments)
    }

    fn claim(&mut self, node: &Path) -> io::Result<Held> {
        self.machine.claim(node)
    }

    fn lock(&mut self, _path: &Path) -> io::Result<Held> {
        Ok(Held::nothing())
    }

    fn write(&mut self, path: &Path, value: &str) -> io::Result<()> {
        self.step(format!("write {} {}", path.display(), shown(value)))
    }

    fn run(&mut self, program: &str, arguments: &[&str]) -> io::Result<Ran> {
        self.step(format!("run {program} {}", arguments.join(" ")))?;
        Ok(Ran {
            success: true,
            stdout: String::new(),
            complaint: String::new(),
        })
    }

    fn chown(&mut self, path: &Path, user: u32) -> io::Result<()> {
        self.step(format!("chown {} {user}", path.display()))
    }

    fn save(&mut self, path: &Path, text: &str) -> io::Result<()> {
        self.step(format!("save {} {}", path.display(), shown(text)))
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        self.step(format!("remove {}", path.display()))
    }

    fn pause(&mut self, _time: Duration) {}

    fn steps(&mut self) -> Vec<String> {
        std::mem::take(&mut self.steps)
    }
}

/// On one line: a new line, which clears driver_override, shows as `\n`.
fn shown(value: &str) -> String {
    match value {
        "\n" => "\\n".to_owned(),
        _ => value.trim_end().replace('\n', "\\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn run_of_a_program_that_is_not_there_is_not_found() {
        let error = System.run("tandem-no-such-program", &[]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NotFound);
    }

    #[test]
    fn run_of_a_program_that_fails_keeps_what_it_said() {
        let ran = System
            .run("sh", &["-c", "echo out; echo why >&2; exit 3"])
            .unwrap();
        assert!(!ran.success);
        assert_eq!(
            (ran.stdout.as_str(), ran.complaint.as_str()),
            ("out\n", "why")
        );
    }

    #[test]
    fn write_to_a_file_that_is_not_there_creates_none() {
        let path = std::env::temp_dir().join(format!("tandem-effects-{}", std::process::id()));
        assert_eq!(
            System.write(&path, "x").unwrap_err().kind(),
            ErrorKind::NotFound
        );
        assert!(!path.exists());
    }
}
