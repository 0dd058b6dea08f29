//! Wakes a thread that sleeps, and costs whoever wakes it a system call only while it does.
//!
//! ```text
//!  the sleeper                               who has something for it
//!  1 asleep = true                           1 publishes it
//!  2 full fence                              2 full fence
//!  3 looks for something once more           3 asleep? then wakes it
//!  4 nothing: waits until it is woken
//! ```
//! Of the two fences one comes first: either the look in 3 finds what was published, or the other sees `asleep`. The order
//! of the steps and both fences are what it takes; `scripts/loom-rings` removes each and expects a wake-up to get lost.
//! Knows nothing of what is published, nor of queues.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

#[cfg(all(test, loom))]
use loom::sync::atomic::{AtomicBool, fence};
#[cfg(not(all(test, loom)))]
use std::sync::atomic::{AtomicBool, fence};

use rustix::event::{EventfdFlags, eventfd};

use crate::canary::canary;

#[cfg(loom)]
#[cfg(test)]
mod tests;

/// Whether one thread has to be woken.
#[derive(Debug, Default)]
pub struct Attention(AtomicBool);

impl Attention {
    /// The sleeper: calls `wait` unless `pending` says that there is something to do, and says what came of it.
    /// Everything that others may have for it is looked at in `pending`.
    pub fn doze<R>(
        &self,
        mut pending: impl FnMut() -> bool,
        wait: impl FnOnce() -> R,
    ) -> Option<R> {
        let late = canary("look-before-asleep");
        let before = late && pending();
        self.listen();
        let waited = if before || (!late && pending()) {
            None
        } else {
            Some(wait())
        };
        self.ignore();
        waited
    }

    /// The sleeper: wants to be woken from now on. What was published before it must look for after this.
    pub fn listen(&self) {
        self.0.store(true, Relaxed);
        // Pairs with the fence in `is_wanted`.
        if !canary("no-asleep-fence") {
            fence(SeqCst);
        }
    }

    /// The sleeper: is awake.
    pub fn ignore(&self) {
        self.0.store(false, Relaxed);
    }

    /// Who has published something: has the sleeper to be woken?
    #[must_use]
    pub fn is_wanted(&self) -> bool {
        // Pairs with the fence in `listen`.
        if !canary("no-wake-fence") {
            fence(SeqCst);
        }
        self.0.load(Relaxed)
    }
}

/// An eventfd that is written to while its owner sleeps.
///
/// Nobody reads it: whoever waits for it is told of each write (edge-triggered), and its counter has room for more than
/// will ever be.
#[derive(Debug)]
pub struct Bell {
    attention: Attention,
    event: OwnedFd,
}

impl Bell {
    /// A bell that nobody listens to yet.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Bell> {
        Ok(Bell {
            attention: Attention::default(),
            event: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// Whether its owner sleeps.
    #[must_use]
    pub fn attention(&self) -> &Attention {
        &self.attention
    }

    /// Wakes the owner if it sleeps. To be called after something was published for it.
    pub fn ring(&self) {
        if self.attention.is_wanted() {
            // A counter at its limit (EAGAIN) has told of it already.
            let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
        }
    }
}

impl AsFd for Bell {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}
