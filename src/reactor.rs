//! A reactor: one pinned core that polls. It owns its pollers by value; the control threads reach it only through
//! its mailbox, and lanes and pollers come back through the channel that the message carried.
//!
//! While it has lanes it never sleeps, allocates, locks or formats (I9). Without lanes it parks.

use std::collections::VecDeque;
use std::sync::Arc;
use std::thread::{JoinHandle, Thread};

use crossbeam::channel::{Receiver, Sender, bounded};
use crossbeam::queue::ArrayQueue;

use crate::datapath::{Lane, LaneId, Poll};

/// Messages that wait for one reactor. Control threads wait for room, never the reactor.
const MAILBOX: usize = 256;
/// The mailbox is looked at every so many turns.
const MAILBOX_INTERVAL: u32 = 32;

/// Names a poller within its reactor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PollerId(pub u32);

enum Message {
    Adopt(PollerId, Box<dyn Poll>),
    Attach(PollerId, Lane),
    Detach(PollerId, LaneId, Sender<Lane>),
    Retire(PollerId, Sender<Box<dyn Poll>>),
    Lend(PollerId, Sender<Box<dyn Poll>>),
    Stop,
}

impl Message {
    /// The poller that it is for and that must be there.
    fn addressee(&self) -> Option<PollerId> {
        match self {
            Message::Attach(id, _)
            | Message::Detach(id, ..)
            | Message::Retire(id, _)
            | Message::Lend(id, _) => Some(*id),
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
    thread: Thread,
}

struct Mailbox(ArrayQueue<Message>);

impl std::fmt::Debug for Mailbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Mailbox({} messages)", self.0.len())
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
        while let Err(back) = self.mailbox.0.push(message) {
            message = back;
            std::thread::yield_now();
        }
        self.thread.unpark();
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
    pub fn start(core: usize) -> Result<Reactor, ReactorError> {
        let mailbox = Arc::new(Mailbox(ArrayQueue::new(MAILBOX)));
        let inbox = Arc::clone(&mailbox);
        let (pinned, is_pinned) = bounded(1);
        let thread = std::thread::Builder::new()
            .name(format!("reactor-{core}"))
            .spawn(move || {
                let ok = core_affinity::set_for_current(core_affinity::CoreId { id: core });
                let _ = pinned.send(ok);
                if ok {
                    Loop::new(inbox).run();
                }
            })
            .map_err(|error| ReactorError::Spawn { core, error })?;
        if is_pinned.recv() != Ok(true) {
            return Err(ReactorError::Pin { core });
        }
        let handle = ReactorHandle {
            core,
            mailbox,
            thread: thread.thread().clone(),
        };
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

/// What runs on the core.
struct Loop {
    mailbox: Arc<Mailbox>,
    pollers: Vec<(PollerId, Box<dyn Poll>)>,
    /// Lanes that were asked for and have not drained yet.
    leaving: VecDeque<(LaneId, Sender<Lane>)>,
    /// Pollers that are lent, and what was asked of them since.
    lent: Vec<PollerId>,
    deferred: VecDeque<Message>,
    lanes: usize,
}

impl Loop {
    fn new(mailbox: Arc<Mailbox>) -> Loop {
        Loop {
            mailbox,
            pollers: Vec::with_capacity(64),
            leaving: VecDeque::with_capacity(64),
            lent: Vec::with_capacity(64),
            deferred: VecDeque::with_capacity(MAILBOX),
            lanes: 0,
        }
    }

    fn run(mut self) {
        loop {
            for _ in 0..MAILBOX_INTERVAL {
                for (_, poller) in &mut self.pollers {
                    poller.turn();
                }
            }
            if !self.leaving.is_empty() {
                self.return_drained();
            }
            while let Some(message) = self.mailbox.0.pop() {
                if !self.handle(message) {
                    return;
                }
            }
            if self.lanes == 0 && self.mailbox.0.is_empty() {
                // Returns at once when a message came in between: `send` unparks after its push.
                std::thread::park();
            }
        }
    }

    fn handle(&mut self, message: Message) -> bool {
        if message
            .addressee()
            .is_some_and(|id| self.lent.contains(&id))
        {
            self.deferred.push_back(message);
            return true;
        }
        match message {
            Message::Adopt(id, poller) => {
                self.lanes += poller.lanes();
                self.pollers.push((id, poller));
                self.lent.retain(|lent| *lent != id);
                // Those for pollers that are still away are deferred again.
                for _ in 0..self.deferred.len() {
                    if let Some(message) = self.deferred.pop_front() {
                        self.handle(message);
                    }
                }
            }
            Message::Attach(id, lane) => {
                if let Some(poller) = self.poller(id) {
                    poller.attach(lane);
                    self.lanes += 1;
                }
            }
            Message::Detach(id, lane, reply) => {
                if self.poller(id).is_some_and(|poller| poller.detach(lane)) {
                    self.leaving.push_back((lane, reply));
                }
            }
            Message::Retire(id, reply) => {
                let idle = |(other, poller): &(PollerId, Box<dyn Poll>)| {
                    *other == id && poller.lanes() == 0
                };
                if let Some(place) = self.pollers.iter().position(idle) {
                    let _ = reply.send(self.pollers.remove(place).1);
                }
            }
            Message::Lend(id, reply) => {
                if let Some(place) = self.pollers.iter().position(|(other, _)| *other == id) {
                    let (_, poller) = self.pollers.remove(place);
                    self.lanes -= poller.lanes();
                    self.lent.push(id);
                    // Nobody waits any longer: it goes on as before.
                    if let Err(refused) = reply.send(poller) {
                        self.handle(Message::Adopt(id, refused.into_inner()));
                    }
                }
            }
            Message::Stop => return false,
        }
        true
    }

    fn poller(&mut self, id: PollerId) -> Option<&mut Box<dyn Poll>> {
        self.pollers
            .iter_mut()
            .find(|(other, _)| *other == id)
            .map(|(_, poller)| poller)
    }

    #[cold]
    fn return_drained(&mut self) {
        for (_, poller) in &mut self.pollers {
            while let Some(lane) = poller.take_drained() {
                self.lanes -= 1;
                if let Some(place) = self.leaving.iter().position(|(id, _)| *id == lane.id())
                    && let Some((_, reply)) = self.leaving.remove(place)
                {
                    // Nobody waits any longer (its deadline passed): the lane ends here.
                    let _ = reply.send(lane);
                }
            }
        }
    }
}
