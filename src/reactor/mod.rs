//! A reactor: one pinned core that polls. It owns its pollers by value; the control threads reach it only through
//! its mailbox, and lanes and pollers come back through the channel that the message carried.
//!
//! While it has lanes it never allocates, locks or formats (I9), and it never sleeps ([`Mode::Always`]; without lanes it
//! parks) or only once nothing has happened for a while ([`Mode::Adaptive`]):
//!
//! ```text
//!  turns find something --> turns find nothing: twice the device's time with commands there, else 50 us
//!    ^                        --> turns with pauses between them: 200 us                                  (idle, pause)
//!    |                              --> 1 others write its eventfd when they have a message
//!    |                                  2 pollers ask guests for kicks, devices for interrupts
//!    |                                  3 a look at rings, completions and mailbox: still nothing?
//!    +-- a kick, an interrupt,          4 it sleeps; everything that may happen now wakes it              (wake)
//!        a message, a time-out <--------+
//! ```
//! Each of the three parties has a loom test of its half of 1 to 4 (`scripts/loom-rings`): kicks in `virtio`, interrupts in
//! the driver's queue pair, messages in the driver's [`Bell`]. Start at [`Core::round`].

mod core;
mod idle;
mod pause;
mod stats;
mod wake;

use std::os::fd::OwnedFd;
use std::sync::{Arc, OnceLock};
use std::thread::{JoinHandle, Thread};

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::queue::ArrayQueue;
use nvme_driver::transport::Bell;

use crate::datapath::{Lane, LaneId, Poll};

pub use self::core::{Core, Rest, Wall};
pub use stats::ReactorStats;
pub use wake::{WakeSet, Woken};

/// Messages that wait for one reactor. Control threads wait for room, never the reactor.
const MAILBOX: usize = 256;

/// Whether a reactor that has lanes sleeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Never.
    #[default]
    Always,
    /// When nothing has happened for a while.
    Adaptive,
}

/// Names a poller within its reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PollerId(pub u32);

enum Message {
    Adopt(PollerId, Box<dyn Poll>),
    Attach(PollerId, Lane),
    Detach(PollerId, LaneId, Sender<Lane>),
    Retire(PollerId, Sender<Box<dyn Poll>>),
    Lend(PollerId, Sender<Box<dyn Poll>>),
    Kick(PollerId, LaneId, Option<OwnedFd>),
    Resize(PollerId, LaneId, u64, Sender<()>),
    Stop,
}

impl Message {
    /// The poller that it is for and that must be there.
    fn addressee(&self) -> Option<PollerId> {
        match self {
            Message::Attach(id, _)
            | Message::Detach(id, ..)
            | Message::Retire(id, _)
            | Message::Lend(id, _)
            | Message::Kick(id, ..)
            | Message::Resize(id, ..) => Some(*id),
            Message::Adopt(..) | Message::Stop => None,
        }
    }
}

/// Why a reactor could not be started.
#[derive(Debug, thiserror::Error)]
pub enum ReactorError {
    /// The thread could not be made.
    #[error("cannot start the reactor of core {core}: {error}")]
    Spawn {
        /// The core.
        core: usize,
        /// What the system said.
        error: std::io::Error,
    },
    /// There is nothing that it could sleep on.
    #[error("cannot make what the reactor of core {core} sleeps on: {error}")]
    Sleep {
        /// The core.
        core: usize,
        /// What the system said.
        error: std::io::Error,
    },
    /// The thread could not be pinned.
    #[error(
        "cannot pin a reactor to core {core}: the kernel refused (is the core online and in this process's cpuset?)"
    )]
    Pin {
        /// The core.
        core: usize,
    },
}

/// The control threads' end of a reactor. Clones reach the same one.
#[derive(Clone, Debug)]
pub struct ReactorHandle {
    core: usize,
    mailbox: Arc<Mailbox>,
}

struct Mailbox {
    messages: ArrayQueue<Message>,
    /// In adaptive mode.
    bell: Option<Bell>,
    /// The reactor's, while it has one.
    thread: OnceLock<Thread>,
    stats: ReactorStats,
}

impl Mailbox {
    fn new(mode: Mode) -> std::io::Result<Arc<Mailbox>> {
        let adaptive = mode == Mode::Adaptive;
        Ok(Arc::new(Mailbox {
            messages: ArrayQueue::new(MAILBOX),
            bell: adaptive.then(Bell::new).transpose()?,
            thread: OnceLock::new(),
            stats: ReactorStats::new(adaptive),
        }))
    }
}

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mailbox({} messages)", self.messages.len())
    }
}

impl ReactorHandle {
    /// The core that it polls on.
    #[must_use]
    pub fn core(&self) -> usize {
        self.core
    }

    fn send(&self, message: Message) {
        let mut message = message;
        // The reactor empties its mailbox every few turns, so this waits for microseconds at most.
        while let Err(back) = self.mailbox.messages.push(message) {
            message = back;
            std::thread::yield_now();
        }
        match (&self.mailbox.bell, self.mailbox.thread.get()) {
            (Some(bell), _) => bell.ring(),
            (None, Some(thread)) => thread.unpark(),
            (None, None) => {}
        }
    }

    /// Whether it may sleep, and wants to be told of kicks.
    #[must_use]
    pub fn mode(&self) -> Mode {
        match self.mailbox.bell {
            Some(_) => Mode::Adaptive,
            None => Mode::Always,
        }
    }

    /// How it slept, and what it took from its core.
    #[must_use]
    pub fn stats(&self) -> &ReactorStats {
        &self.mailbox.stats
    }

    /// Hands a poller over.
    pub fn adopt(&self, id: PollerId, poller: Box<dyn Poll>) {
        self.send(Message::Adopt(id, poller));
    }

    /// Hands a lane to one of its pollers.
    pub fn attach(&self, poller: PollerId, lane: Lane) {
        self.send(Message::Attach(poller, lane));
    }

    /// Asks for a lane back. It arrives when it has drained; the channel closes without one if it is not there.
    #[must_use]
    pub fn detach(&self, poller: PollerId, lane: LaneId) -> Receiver<Lane> {
        let (reply, lane_back) = bounded(1);
        self.send(Message::Detach(poller, lane, reply));
        lane_back
    }

    /// Asks for a poller with all its lanes, to be [adopted](ReactorHandle::adopt) again: meanwhile its guests' requests
    /// wait, and so does whatever is asked of it. The channel closes without one if it is not there.
    #[must_use]
    pub fn lend(&self, poller: PollerId) -> Receiver<Box<dyn Poll>> {
        let (reply, poller_back) = bounded(1);
        self.send(Message::Lend(poller, reply));
        poller_back
    }

    /// A lane that it has gets another kick eventfd, or none.
    pub fn replace_kick(&self, poller: PollerId, lane: LaneId, kick: Option<OwnedFd>) {
        self.send(Message::Kick(poller, lane, kick));
    }

    /// The disk of a lane that it has gets another number of blocks. The channel says so when that is in force, and closes without a word
    /// if the lane's poller is not there.
    #[must_use]
    pub fn resize(&self, poller: PollerId, lane: LaneId, blocks: u64) -> Receiver<()> {
        let (reply, in_force) = bounded(1);
        self.send(Message::Resize(poller, lane, blocks, reply));
        in_force
    }

    /// Asks for a poller back. The channel closes without one while it still has lanes.
    #[must_use]
    pub fn retire(&self, poller: PollerId) -> Receiver<Box<dyn Poll>> {
        let (reply, poller_back) = bounded(1);
        self.send(Message::Retire(poller, reply));
        poller_back
    }
}

/// A running reactor thread. Stops and joins at [`Reactor::stop`].
#[derive(Debug)]
pub struct Reactor {
    handle: ReactorHandle,
    thread: JoinHandle<()>,
}

impl Reactor {
    /// Starts a thread named `reactor-CORE`, pinned to `core`.
    ///
    /// # Errors
    /// [`ReactorError`].
    pub fn start(core: usize, mode: Mode) -> Result<Reactor, ReactorError> {
        let (handle, looper) = Core::new(core, mode, Wall::new())
            .map_err(|error| ReactorError::Sleep { core, error })?;
        let (pinned, is_pinned) = bounded(1);
        let thread = std::thread::Builder::new()
            .name(format!("reactor-{core}"))
            .spawn(move || {
                let ok = core_affinity::set_for_current(core_affinity::CoreId { id: core });
                let _ = pinned.send(ok);
                if ok {
                    looper.run();
                }
            })
            .map_err(|error| ReactorError::Spawn { core, error })?;
        if is_pinned.recv() != Ok(true) {
            return Err(ReactorError::Pin { core });
        }
        Ok(Reactor { handle, thread })
    }

    /// The control threads' end.
    #[must_use]
    pub fn handle(&self) -> &ReactorHandle {
        &self.handle
    }

    /// Ends the thread. Its pollers were retired before; one that was not is dropped with it.
    pub fn stop(self) {
        self.handle.send(Message::Stop);
        if self.thread.join().is_err() {
            tracing::error!(core = self.handle.core, "a reactor panicked");
        }
    }
}
