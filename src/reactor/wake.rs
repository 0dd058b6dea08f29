//! What a sleeping reactor is woken by: its mailbox, the kicks of guests, the interrupts of devices. One epoll instance,
//! edge-triggered: each write to an eventfd is told once, whatever its counter says, so that nobody reads any of them. (To
//! read one that a front-end shares could block.) What was told while nobody slept ends the next sleep at once.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{Timespec, epoll};

/// Files told of by one sleep. The others end the next one.
const EVENTS: usize = 64;

/// Which sort of file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    Message = 0,
    Kick = 1,
    Interrupt = 2,
}

/// What ended a sleep. Nothing: its time was up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Woken {
    /// Somebody wrote to the mailbox.
    pub message: bool,
    /// A guest kicked.
    pub kick: bool,
    /// A device completed a command.
    pub interrupt: bool,
}

impl Woken {
    /// By anything?
    #[must_use]
    pub fn any(self) -> bool {
        self.message || self.kick || self.interrupt
    }
}

/// The files that wake one reactor.
#[derive(Debug)]
pub struct WakeSet {
    epoll: OwnedFd,
}

impl WakeSet {
    /// # Errors
    /// When the process has no file descriptor left.
    pub(super) fn new() -> io::Result<WakeSet> {
        Ok(WakeSet {
            epoll: epoll::create(epoll::CreateFlags::CLOEXEC)?,
        })
    }

    /// From now on each write to `file` is told. `false` when the kernel refuses to watch it.
    pub(super) fn watch(&self, file: impl AsFd, source: Source) -> bool {
        let flags = epoll::EventFlags::IN | epoll::EventFlags::ET;
        let data = epoll::EventData::new_u64(source as u64);
        epoll::add(&self.epoll, file, data, flags).is_ok()
    }

    /// `file` is about to leave. One that was never watched is no error.
    pub(super) fn forget(&self, file: BorrowedFd<'_>) {
        let _ = epoll::delete(&self.epoll, file);
    }

    /// Sleeps until a file was written to, or `timeout` has passed.
    pub fn wait(&self, timeout: Duration) -> Woken {
        let mut events = [MaybeUninit::<epoll::Event>::uninit(); EVENTS];
        let timeout = Timespec::try_from(timeout).ok();
        let mut woken = Woken::default();
        // A signal that interrupts it ends the sleep early, and nothing else.
        if let Ok((events, _)) = epoll::wait(&self.epoll, &mut events, timeout.as_ref()) {
            for event in events {
                match event.data.u64() {
                    0 => woken.message = true,
                    1 => woken.kick = true,
                    _ => woken.interrupt = true,
                }
            }
        }
        woken
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::event::{EventfdFlags, eventfd};

    fn kick(file: &OwnedFd) {
        rustix::io::write(file, &1_u64.to_ne_bytes()).unwrap();
    }

    #[test]
    fn wait_tells_each_write_once_though_nobody_reads() {
        let set = WakeSet::new().unwrap();
        let [file, other] = [(); 2].map(|()| eventfd(0, EventfdFlags::NONBLOCK).unwrap());
        assert!(set.watch(&file, Source::Kick) && set.watch(&other, Source::Interrupt));
        let wait = || set.wait(Duration::ZERO);
        assert!(!wait().any());
        for _ in 0..3 {
            kick(&file);
            kick(&file);
            let expected = Woken {
                kick: true,
                ..Woken::default()
            };
            assert_eq!((wait(), wait()), (expected, Woken::default()));
        }
        kick(&other);
        assert!(wait().interrupt);
        set.forget(file.as_fd());
        kick(&file);
        assert!(!wait().any());
    }

    #[test]
    fn wait_on_a_file_that_was_written_to_before_it_was_watched_tells_it() {
        let set = WakeSet::new().unwrap();
        let file = eventfd(0, EventfdFlags::NONBLOCK).unwrap();
        kick(&file);
        set.watch(&file, Source::Message);
        assert!(set.wait(Duration::ZERO).message);
    }
}
