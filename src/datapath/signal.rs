//! An eventfd of the front-end's that we write to: a virtqueue's call or error notification.
//!
//! The file behind it may be replaced at any time by the control thread while a reactor writes: the descriptor
//! number stays, `dup3` swaps the file behind it atomically. Never blocks: a full counter already means "signalled".

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::event::{EventfdFlags, eventfd};

/// A replaceable eventfd.
#[derive(Debug)]
pub struct Signal {
    fd: OwnedFd,
    armed: AtomicBool,
}

impl Signal {
    /// Not connected: signals go nowhere.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Signal> {
        Ok(Signal {
            fd: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            armed: AtomicBool::new(false),
        })
    }

    /// Connects to the front-end's eventfd, or to nothing.
    ///
    /// # Errors
    /// When `file` is not an eventfd (a pipe or a file could block the reactor), or cannot be duplicated.
    pub fn replace(&self, file: Option<File>) -> io::Result<()> {
        let Some(file) = file else {
            self.armed.store(false, Ordering::Relaxed);
            return Ok(());
        };
        require_eventfd(&file)?;
        // The flag belongs to the open file, which the front-end shares: it opens its eventfds non-blocking as well.
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags | rustix::fs::OFlags::NONBLOCK)?;
        // SAFETY: both descriptors are open; the old file behind `self.fd` is closed atomically by dup3, and
        // `self.fd` goes on owning its number.
        if unsafe { libc::dup3(file.as_raw_fd(), self.fd.as_raw_fd(), libc::O_CLOEXEC) } < 0 {
            return Err(io::Error::last_os_error());
        }
        self.armed.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Adds 1 to the counter. The one system call of a reactor (I9). `false` when nobody is connected.
    #[inline]
    pub fn signal(&self) -> bool {
        if !self.armed.load(Ordering::Relaxed) {
            return false;
        }
        // A counter at its limit (EAGAIN) has been signalled already, and there is nobody to tell of other errors.
        let _ = rustix::io::write(&self.fd, &1_u64.to_ne_bytes());
        true
    }
}

/// Refuses anything but an eventfd.
///
/// # Errors
/// [`io::ErrorKind::InvalidInput`], naming what the descriptor is.
pub fn require_eventfd(file: &File) -> io::Result<()> {
    let target = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
    if target.to_string_lossy() == "anon_inode:[eventfd]" {
        return Ok(());
    }
    let what = format!(
        "the notification descriptor is {}, not an eventfd",
        target.display()
    );
    Err(io::Error::new(io::ErrorKind::InvalidInput, what))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counter(file: &File) -> u64 {
        let mut bytes = [0; 8];
        rustix::io::read(file, &mut bytes).map_or(0, |_| u64::from_ne_bytes(bytes))
    }

    fn new_eventfd() -> (File, File) {
        let file = File::from(eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        (file.try_clone().unwrap(), file)
    }

    #[test]
    fn signal_after_replace_reaches_the_new_eventfd_only() {
        let signal = Signal::new().unwrap();
        assert!(!signal.signal());
        let (old_view, old) = new_eventfd();
        let (new_view, new) = new_eventfd();
        signal.replace(Some(old)).unwrap();
        assert!(signal.signal());
        signal.replace(Some(new)).unwrap();
        signal.signal();
        signal.signal();
        assert_eq!((counter(&old_view), counter(&new_view)), (1, 2));
        signal.replace(None).unwrap();
        assert!(!signal.signal());
    }

    #[test]
    fn signal_with_a_full_counter_does_not_block() {
        let signal = Signal::new().unwrap();
        let file = File::from(eventfd(0, EventfdFlags::empty()).unwrap()); // a blocking one
        rustix::io::write(&file, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        signal.replace(Some(file)).unwrap();
        assert!(signal.signal());
    }

    #[test]
    fn replace_with_a_regular_file_is_refused() {
        let error = Signal::new()
            .unwrap()
            .replace(Some(File::open("/proc/self/exe").unwrap()))
            .unwrap_err();
        assert!(error.to_string().contains("not an eventfd"), "{error}");
    }
}
