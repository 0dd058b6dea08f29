//! What runs on the core: turns of pollers, now and then the mailbox, and in adaptive mode the way to sleep and back.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::channel::Sender;
use nvme_driver::transport::Armed;

use super::idle::{Idle, Step};
use super::pause::Pause;
use super::wake::{Source, WakeSet, Woken};
use super::{MAILBOX, Mailbox, Message, Mode, PollerId, ReactorHandle};
use crate::datapath::{Lane, LaneId, Poll, Waker};

/// The mailbox is looked at every so many turns.
const MAILBOX_INTERVAL: u32 = 32;
/// A sleep while something can only be found by looking: a ring without a kick, commands without an interrupt.
const NAP: Duration = Duration::from_millis(1);
/// A sleep with commands at the device: their age is told in steps of this.
const WATCH: Duration = Duration::from_millis(250);
/// Any sleep. Nothing depends on it: a guest that was to kick and did not only waits the longer.
const LONGEST: Duration = Duration::from_secs(1);

/// Time, and ways to let it pass.
pub trait Rest {
    /// Since some moment.
    fn now(&mut self) -> Duration;
    /// Waits for about so long, between two turns.
    fn relax(&mut self, about: Duration);
    /// Sleeps until something of `set` happens, or `timeout` has passed.
    fn sleep(&mut self, set: &WakeSet, timeout: Duration) -> Woken;
}

/// The time on the wall.
#[derive(Debug)]
pub struct Wall {
    start: Instant,
    pause: Pause,
}

impl Wall {
    /// From now on.
    #[must_use]
    pub fn new() -> Wall {
        Wall {
            start: Instant::now(),
            pause: Pause::of_this_core(),
        }
    }
}

impl Default for Wall {
    fn default() -> Wall {
        Wall::new()
    }
}

impl Rest for Wall {
    fn now(&mut self) -> Duration {
        self.start.elapsed()
    }

    fn relax(&mut self, about: Duration) {
        self.pause.about(about);
    }

    fn sleep(&mut self, set: &WakeSet, timeout: Duration) -> Woken {
        set.wait(timeout)
    }
}

/// A poller here.
struct Resident {
    id: PollerId,
    poller: Box<dyn Poll>,
    /// Commands at its device, after the last turn that found something.
    outstanding: u16,
    /// The first command on its way to an idle device: when it was sent, and how many had completed before.
    probe: Option<(Duration, u64)>,
}

/// What only a reactor that sleeps needs.
struct Adaptive {
    set: WakeSet,
    idle: Idle,
}

/// A reactor without its thread.
pub struct Core<R: Rest> {
    mailbox: Arc<Mailbox>,
    residents: Vec<Resident>,
    /// Lanes that were asked for and have not drained yet.
    leaving: VecDeque<(LaneId, Sender<Lane>)>,
    /// Pollers that are lent, and what was asked of them since.
    lent: Vec<PollerId>,
    deferred: VecDeque<Message>,
    lanes: usize,
    turns: u32,
    adaptive: Option<Adaptive>,
    /// Time.
    pub rest: R,
}

impl<R: Rest> std::fmt::Debug for Core<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Core({} pollers)", self.residents.len())
    }
}

impl<R: Rest> Core<R> {
    /// One that has nothing yet, and the control threads' end of it.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(core: usize, mode: Mode, rest: R) -> io::Result<(ReactorHandle, Core<R>)> {
        let mailbox = Mailbox::new(mode)?;
        let adaptive = match &mailbox.bell {
            None => None,
            Some(bell) => {
                let set = WakeSet::new()?;
                if !set.watch(bell, Source::Message) {
                    return Err(io::Error::other("its eventfd cannot be watched"));
                }
                let idle = Idle::new();
                Some(Adaptive { set, idle })
            }
        };
        let handle = ReactorHandle {
            core,
            mailbox: Arc::clone(&mailbox),
        };
        let core = Core {
            mailbox,
            residents: Vec::with_capacity(64),
            leaving: VecDeque::with_capacity(64),
            lent: Vec::with_capacity(64),
            deferred: VecDeque::with_capacity(MAILBOX),
            lanes: 0,
            turns: 0,
            adaptive,
            rest,
        };
        Ok((handle, core))
    }

    /// Runs until it is told to stop, on the thread that is to be the reactor.
    pub(super) fn run(mut self) {
        self.mailbox.stats.begin();
        self.mailbox.thread.get_or_init(std::thread::current);
        match self.adaptive {
            Some(_) => while self.round() {},
            None => self.run_always(),
        }
        self.mailbox.stats.end();
    }

    fn run_always(&mut self) {
        loop {
            for _ in 0..MAILBOX_INTERVAL {
                for resident in &mut self.residents {
                    resident.poller.turn();
                }
            }
            if !self.read_mail() {
                return;
            }
            if self.lanes == 0 && self.mailbox.messages.is_empty() {
                // Returns at once when a message came in between: `send` unparks after its push.
                std::thread::park();
            }
        }
    }

    /// One turn of every poller in adaptive mode, and what follows from it: a look at the mailbox, a pause, a sleep. `false`
    /// when it is to stop.
    pub fn round(&mut self) -> bool {
        let mut busy = false;
        for at in 0..self.residents.len() {
            if self.residents[at].poller.turn() {
                busy = true;
                self.note_load(at);
            }
        }
        let Some(adaptive) = &mut self.adaptive else {
            return self.read_mail();
        };
        if busy {
            adaptive.idle.busy();
            self.turns = self.turns.wrapping_add(1);
            return !self.turns.is_multiple_of(MAILBOX_INTERVAL) || self.read_mail();
        }
        if !self.mailbox.messages.is_empty() {
            adaptive.idle.busy();
            return self.read_mail();
        }
        if !self.leaving.is_empty() {
            self.return_drained();
        }
        let waits = self.residents.iter().any(|one| one.outstanding > 0);
        let now = self.rest.now();
        let Some(adaptive) = &mut self.adaptive else {
            return true;
        };
        match adaptive.idle.next(now, waits) {
            Step::Look => {}
            Step::Relax(about) => self.rest.relax(about),
            Step::Sleep => self.sleep(waits),
        }
        true
    }

    /// How long the device took for the first command that it got while it had none: what the others had to wait for in its
    /// queue is not counted in.
    #[inline]
    fn note_load(&mut self, at: usize) {
        let resident = &mut self.residents[at];
        let load = resident.poller.load();
        let completed = load.submitted.wrapping_sub(load.outstanding.into());
        match resident.probe {
            Some((sent, before)) if completed != before => {
                let took = self.rest.now().saturating_sub(sent);
                if let Some(adaptive) = &mut self.adaptive {
                    adaptive.idle.learn(took);
                }
                resident.probe = None;
            }
            None if resident.outstanding == 0 && load.outstanding > 0 => {
                resident.probe = Some((self.rest.now(), completed));
            }
            _ => {}
        }
        resident.outstanding = load.outstanding;
    }

    /// Asks everybody to wake it, looks once more, and sleeps if there is still nothing to do.
    #[cold]
    fn sleep(&mut self, waits: bool) {
        let Core {
            mailbox,
            residents,
            rest,
            adaptive: Some(Adaptive { set, idle }),
            ..
        } = self
        else {
            return;
        };
        let Some(bell) = &mailbox.bell else {
            return;
        };
        for resident in residents.iter_mut() {
            resident.poller.show();
        }
        let mut longest = if waits { WATCH } else { LONGEST };
        if mailbox.stats.is_deaf() {
            longest = NAP;
        }
        let longest = std::cell::Cell::new(longest);
        let pending = || {
            for resident in residents.iter_mut() {
                match resident.poller.arm() {
                    Armed::Pending => return true,
                    Armed::Never => longest.set(NAP),
                    Armed::Yes => {}
                }
            }
            !mailbox.messages.is_empty()
        };
        let woken = bell
            .attention()
            .doze(pending, || rest.sleep(set, longest.get()));
        for resident in residents.iter_mut() {
            resident.poller.disarm();
        }
        mailbox.stats.count_sleep(woken, idle.expected());
        idle.slept(woken.is_none_or(Woken::any));
    }

    /// `false` when it is to stop.
    fn read_mail(&mut self) -> bool {
        if !self.leaving.is_empty() {
            self.return_drained();
        }
        while let Some(message) = self.mailbox.messages.pop() {
            if !self.handle(message) {
                return false;
            }
        }
        true
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
                self.watch(&*poller);
                let outstanding = poller.load().outstanding;
                self.residents.push(Resident {
                    id,
                    poller,
                    outstanding,
                    probe: None,
                });
                self.lent.retain(|lent| *lent != id);
                // Those for pollers that are still away are deferred again.
                for _ in 0..self.deferred.len() {
                    if let Some(message) = self.deferred.pop_front() {
                        self.handle(message);
                    }
                }
            }
            Message::Attach(id, lane) => {
                if let Some(at) = self.residents.iter().position(|one| one.id == id) {
                    lane.wakers().for_each(|waker| self.watch_kick(Some(waker)));
                    self.residents[at].poller.attach(lane);
                    self.lanes += 1;
                }
            }
            Message::Detach(id, lane, reply) => {
                if self.poller(id).is_some_and(|poller| poller.detach(lane)) {
                    self.leaving.push_back((lane, reply));
                }
            }
            Message::Retire(id, reply) => {
                let idle = |one: &Resident| one.id == id && one.poller.lanes() == 0;
                if let Some(place) = self.residents.iter().position(idle) {
                    let poller = self.residents.remove(place).poller;
                    self.forget(&*poller);
                    let _ = reply.send(poller);
                }
            }
            Message::Lend(id, reply) => {
                if let Some(place) = self.residents.iter().position(|one| one.id == id) {
                    let poller = self.residents.remove(place).poller;
                    self.forget(&*poller);
                    self.lanes -= poller.lanes();
                    self.lent.push(id);
                    // Nobody waits any longer: it goes on as before.
                    if let Err(refused) = reply.send(poller) {
                        self.handle(Message::Adopt(id, refused.into_inner()));
                    }
                }
            }
            Message::Kick(id, lane, kick) => self.replace_kick(id, lane, kick),
            Message::Resize(id, lane, blocks, reply) => {
                if let Some(poller) = self.poller(id) {
                    poller.resize(lane, blocks);
                    // Nobody waits any longer: it is in force all the same.
                    let _ = reply.send(());
                }
            }
            Message::Stop => return false,
        }
        true
    }

    fn poller(&mut self, id: PollerId) -> Option<&mut Box<dyn Poll>> {
        self.residents
            .iter_mut()
            .find(|one| one.id == id)
            .map(|one| &mut one.poller)
    }

    fn watch(&self, poller: &dyn Poll) {
        let Some(Adaptive { set, .. }) = &self.adaptive else {
            return;
        };
        poller.wakers(&mut |waker| {
            let watched = match waker {
                Waker::Kick(file) => set.watch(file, Source::Kick),
                Waker::Interrupt(file) => set.watch(file, Source::Interrupt),
            };
            if !watched {
                self.mailbox.stats.set_deaf();
            }
        });
    }

    fn forget(&self, poller: &dyn Poll) {
        if let Some(Adaptive { set, .. }) = &self.adaptive {
            poller.wakers(&mut |waker| match waker {
                Waker::Kick(file) | Waker::Interrupt(file) => set.forget(file),
            });
        }
    }

    fn watch_kick(&self, kick: Option<BorrowedFd<'_>>) {
        if let (Some(Adaptive { set, .. }), Some(kick)) = (&self.adaptive, kick)
            && !set.watch(kick, Source::Kick)
        {
            self.mailbox.stats.set_deaf();
        }
    }

    fn replace_kick(&mut self, id: PollerId, lane: LaneId, kick: Option<OwnedFd>) {
        self.watch_kick(kick.as_ref().map(AsFd::as_fd));
        let former = self
            .poller(id)
            .and_then(|poller| poller.replace_kick(lane, kick));
        if let (Some(Adaptive { set, .. }), Some(former)) = (&self.adaptive, &former) {
            set.forget(former.as_fd());
        }
    }

    #[cold]
    fn return_drained(&mut self) {
        for resident in &mut self.residents {
            while let Some(lane) = resident.poller.take_drained() {
                self.lanes -= 1;
                if let Some(Adaptive { set, .. }) = &self.adaptive {
                    lane.wakers().for_each(|waker| set.forget(waker));
                }
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
