//! A place to try the built server with Linux guests in QEMU: [`Lab`], and in it any number of servers (server.rs) and
//! guests (guest.rs).
//!
//! Labs stand one at a time, since a polled core and an emulated machine leave no room for more. Every wait has a
//! deadline. Nothing stays when a test ends, however it ends: processes are killed when they are dropped and by the kernel
//! when the thread that started them dies, and the lab's folder goes last. A test that fails prints what they all said.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A folder for sockets, images and logs, and the right to run guests.
pub struct Lab {
    pub folder: PathBuf,
    /// A locked file: other tests may be other processes. Dropped last.
    _turn: File,
}

impl Lab {
    /// Waits for its turn. Fails if there is nothing that a guest could boot from.
    pub fn new(name: &str) -> Lab {
        let turn = File::create(Path::new(env!("CARGO_TARGET_TMPDIR")).join("lab")).unwrap();
        turn.lock().unwrap();
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
    pub fn log(&self, kind: &str) -> PathBuf {
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
pub fn image_folder() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    target.join("guest")
}

/// A command that dies with the thread that starts it.
pub fn bound(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL"])
        .arg(program)
        .stdin(Stdio::null());
    command
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
