//! The control queue of a SCSI host: task management, and how it waits for the lanes whose commands it is about.
//!
//! A function that aborts or resets ends only when every command that the guest had sent before it has ended: none of them
//! can touch the guest's memory any more, and their answers are in the used rings. Other cores poll those rings, so they
//! are asked through a [`Barrier`]. A lane that sees that it is behind takes what its ring held, lets it all end, and says
//! so; then it goes on.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

use super::scsi;
use super::side::{SideConfig, SideRing};
use crate::scsi::{Address, Nexus, Tasks};
use crate::virtio::scsi::{Control, ResponsePlace, finish_control, parse_control, response, task};
use crate::virtio::virtqueue::HeadIndex;

/// Control requests that are taken in one turn.
const FETCH_BUDGET: u16 = 8;

/// Where the lanes of all hosts of a device are waited for: by control queues, each for the lanes of its host, and by lanes,
/// for those that have a logical unit.
///
/// Whoever waits takes a number and tells it to the lanes. A lane says two things: up to which number all commands have
/// ended, and up to which none is at the device. They differ while it has a command that itself waits for others: task
/// management has to wait for that one, and those others must not.
#[derive(Debug)]
pub struct Barrier {
    numbers: AtomicU64,
    lanes: Box<[Stand]>,
    /// For a lane that the barrier does not know.
    nobody: OwnedFd,
}

/// Where a lane stands. In a cache line of its own: it looks at it in each turn.
#[derive(Debug)]
#[repr(align(64))]
struct Stand {
    /// The last number that it was told.
    wanted: AtomicU64,
    /// All commands from before this number have ended; the highest where there is no lane.
    ended: AtomicU64,
    /// The same, of all but the commands that wait for the clerk.
    swept: AtomicU64,
    /// None from before this number is at the device; likewise.
    quiet: AtomicU64,
    /// An eventfd that wakes its poller, should that sleep. Nobody reads it: it is watched edge-triggered.
    waker: OwnedFd,
}

impl Barrier {
    /// For `lanes` lanes, none of which is there yet.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(lanes: usize) -> io::Result<Barrier> {
        let waker = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK);
        let stand = || {
            Ok(Stand {
                wanted: AtomicU64::new(0),
                ended: AtomicU64::new(u64::MAX),
                swept: AtomicU64::new(u64::MAX),
                quiet: AtomicU64::new(u64::MAX),
                waker: waker()?,
            })
        };
        Ok(Barrier {
            numbers: AtomicU64::new(0),
            lanes: (0..lanes).map(|_| stand()).collect::<io::Result<_>>()?,
            nobody: waker()?,
        })
    }

    /// For how many lanes it is.
    #[must_use]
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    pub(super) fn waker(&self, lane: usize) -> BorrowedFd<'_> {
        let stand = self.lanes.get(lane);
        stand.map_or(&self.nobody, |stand| &stand.waker).as_fd()
    }

    /// The last number that a lane was told.
    #[inline(always)]
    pub(super) fn wanted(&self, lane: usize) -> u64 {
        // Pairs with the release in `ask`: what the guest had put into any ring before its function is there to be seen,
        // and what a lane did before it asked.
        self.lanes
            .get(lane)
            .map_or(0, |stand| stand.wanted.load(Ordering::Acquire))
    }

    /// A lane begins, with nothing in flight. It is known by now to those who ask lanes that it may be one of.
    pub(super) fn enter(&self, lane: usize) -> u64 {
        let wanted = self.wanted(lane);
        // Whoever has taken a number and not found this lane yet does not wait for it: pairs with `ask`.
        let begun = self.numbers.load(Ordering::SeqCst);
        self.stand_at(lane, wanted.max(begun));
        // Who asks from now on sees that the lane is there, or the lane sees that it is asked, and by then what was changed
        // before. Pairs with the fence in `ask`.
        fence(Ordering::SeqCst);
        wanted
    }

    fn stand_at(&self, lane: usize, number: u64) {
        if let Some(stand) = self.lanes.get(lane) {
            for word in [&stand.ended, &stand.swept, &stand.quiet] {
                word.store(number, Ordering::Release);
            }
        }
    }

    /// All that a lane had in flight has ended, and its guest can see that. It may be further already: a lane that has come
    /// later need not pass numbers from before, though it may be told one.
    pub(super) fn pass(&self, lane: usize, number: u64) {
        self.sweep(lane, number);
        if let Some(stand) = self.lanes.get(lane) {
            // Pairs with the acquire in `are_past`: the used ring first, then this, then the control queue's used ring.
            stand.ended.fetch_max(number, Ordering::Release);
        }
    }

    /// The same, but for commands that the clerk has.
    pub(super) fn sweep(&self, lane: usize, number: u64) {
        if let Some(stand) = self.lanes.get(lane) {
            stand.swept.fetch_max(number, Ordering::Release);
            stand.quiet.fetch_max(number, Ordering::Release);
        }
    }

    /// A lane has nothing at the device, but commands that wait.
    pub(super) fn be_quiet(&self, lane: usize) {
        let wanted = self.wanted(lane);
        if let Some(stand) = self.lanes.get(lane) {
            stand.quiet.fetch_max(wanted, Ordering::Release);
        }
    }

    /// Wakes the poller of a lane, should it sleep.
    pub(in crate::datapath) fn wake(&self, lane: usize) {
        if let Some(stand) = self.lanes.get(lane) {
            // A counter at its limit has been told of already.
            let _ = rustix::io::write(&stand.waker, &1_u64.to_ne_bytes());
        }
    }

    /// A lane has ended.
    pub(super) fn leave(&self, lane: usize) {
        self.stand_at(lane, u64::MAX);
    }

    /// The number that `lanes` have to pass; `lanes` is asked for after it was taken.
    pub fn ask<I: Iterator<Item = usize>>(&self, lanes: impl FnOnce() -> I) -> u64 {
        let number = self.numbers.fetch_add(1, Ordering::SeqCst) + 1;
        // Pairs with `enter`: a lane that is not found among `lanes` finds this number taken.
        fence(Ordering::SeqCst);
        for lane in lanes() {
            if let Some(stand) = self.lanes.get(lane) {
                stand.wanted.fetch_max(number, Ordering::Release);
                self.wake(lane);
            }
        }
        number
    }

    fn are_past(
        &self,
        mut lanes: impl Iterator<Item = usize>,
        number: u64,
        word: impl Fn(&Stand) -> &AtomicU64,
    ) -> bool {
        lanes.all(|lane| {
            let stand = self.lanes.get(lane);
            stand.is_none_or(|stand| word(stand).load(Ordering::Acquire) >= number)
        })
    }

    /// All commands of `lanes` from before a number have ended.
    #[must_use]
    pub fn have_ended(&self, lanes: impl Iterator<Item = usize>, number: u64) -> bool {
        self.are_past(lanes, number, |stand| &stand.ended)
    }

    /// No command of `lanes` from before a number is at the device.
    pub(super) fn are_quiet(&self, lanes: impl Iterator<Item = usize>, number: u64) -> bool {
        self.are_past(lanes, number, |stand| &stand.quiet)
    }
}

/// The request queues of one host at the barrier.
#[derive(Debug)]
pub struct HostTasks {
    /// Where.
    pub barrier: Arc<Barrier>,
    /// Their numbers.
    pub lanes: Range<usize>,
}

/// For the initiator that preempts this one: its commands have ended that can touch blocks or the guest's memory. Those
/// that the clerk has, that one among them perhaps, are carried out when their turn comes, by an initiator that is no
/// longer registered.
impl Tasks for HostTasks {
    fn ask(&self) -> u64 {
        self.barrier.ask(|| self.lanes.clone())
    }

    fn have_ended(&self, number: u64) -> bool {
        self.barrier
            .are_past(self.lanes.clone(), number, |stand| &stand.swept)
    }
}

/// What the lane of a control queue is made of.
#[derive(Debug)]
pub struct ControlConfig {
    /// The ring and the guest.
    pub side: SideConfig,
    /// The guest as an initiator, and what it reaches.
    pub nexus: Arc<Nexus>,
    /// Where its host's lanes are waited for.
    pub barrier: Arc<Barrier>,
    /// Their numbers.
    pub lanes: Range<usize>,
}

/// What is done with the requests of a control queue.
#[derive(Debug)]
pub(super) struct TaskManager {
    nexus: Arc<Nexus>,
    barrier: Arc<Barrier>,
    lanes: Range<usize>,
    waiting: Option<Waiting>,
}

/// A function that waits for commands to end.
#[derive(Debug)]
struct Waiting {
    head: HeadIndex,
    place: ResponsePlace,
    number: u64,
    address: Address,
    function: u32,
}

impl TaskManager {
    pub(super) fn new(nexus: Arc<Nexus>, barrier: Arc<Barrier>, lanes: Range<usize>) -> Self {
        TaskManager {
            nexus,
            barrier,
            lanes,
            waiting: None,
        }
    }

    /// Other lanes do not tell when they have let a function pass.
    pub(super) fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    #[inline]
    pub(super) fn wants(&self, ring: &SideRing) -> bool {
        self.waits() || self.nexus.successor().is_some() || ring.has_request()
    }

    /// Takes requests from the ring, one after the other: a function that waits holds up those behind it.
    #[cold]
    pub(super) fn fetch(&mut self, ring: &mut SideRing) -> bool {
        while let Some(next) = self.nexus.successor().map(Arc::clone) {
            self.nexus = next;
        }
        let mut busy = self.waiting.is_some();
        for _ in 0..FETCH_BUDGET {
            if !self.go_on(ring) || !ring.pop() {
                break;
            }
            busy = true;
            self.start(ring);
        }
        busy
    }

    /// Ends the function that waits, if it need not any longer. Whether none waits.
    fn go_on(&mut self, ring: &mut SideRing) -> bool {
        match self.waiting.take() {
            Some(waiting)
                if self.barrier.have_ended(self.lanes.clone(), waiting.number)
                    && self.attend(&waiting) =>
            {
                answer(ring, waiting.head, &waiting.place, response::OK);
                true
            }
            waiting => {
                self.waiting = waiting;
                self.waiting.is_none()
            }
        }
    }

    /// What was reset says so with its next command (SAM-5, 5.14). `false` when the next turn is to try again.
    fn attend(&self, waiting: &Waiting) -> bool {
        let nexus = &self.nexus;
        match waiting.function {
            task::LOGICAL_UNIT_RESET => nexus
                .find(waiting.address)
                .is_none_or(|unit| nexus.reset_unit(unit)),
            task::I_T_NEXUS_RESET => nexus.reset_target(waiting.address),
            _ => true,
        }
    }

    fn start(&mut self, ring: &mut SideRing) {
        let head = ring.chain.head();
        let Some((control, place)) = parse_control(&mut ring.chain) else {
            return ring.give_back_malformed(head);
        };
        let (function, lun) = match control {
            Control::Task { function, lun } => (Some(function), lun),
            Control::Notification { lun } => (None, lun),
        };
        let nexus = &self.nexus;
        let address = scsi::address(lun).filter(|address| nexus.has_target(*address));
        let Some(address) = address else {
            return answer(ring, head, &place, response::BAD_TARGET);
        };
        let absent = matches!(address, Address::Unit { .. }) && nexus.find(address).is_none();
        // The reset of a nexus is about a target, whatever the LUN.
        if absent && function != Some(task::I_T_NEXUS_RESET) {
            return answer(ring, head, &place, response::INCORRECT_LUN);
        }
        match function {
            Some(
                function @ (task::ABORT_TASK
                | task::ABORT_TASK_SET
                | task::CLEAR_TASK_SET
                | task::I_T_NEXUS_RESET
                | task::LOGICAL_UNIT_RESET
                // When they have waited, no command is there: FUNCTION COMPLETE.
                | task::QUERY_TASK
                | task::QUERY_TASK_SET),
            ) => {
                ring.counters.tasks += 1;
                self.waiting = Some(Waiting {
                    head,
                    place,
                    number: self.barrier.ask(|| self.lanes.clone()),
                    address,
                    function,
                });
            }
            Some(_) => answer(ring, head, &place, response::FUNCTION_REJECTED),
            None => answer(ring, head, &place, response::OK),
        }
    }
}

fn answer(ring: &mut SideRing, head: HeadIndex, place: &ResponsePlace, response: u8) {
    let written = finish_control(place, response);
    ring.queue.push_used(head, written);
}
