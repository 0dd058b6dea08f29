//! The control queue of a SCSI host: task management, and how it waits for the lanes whose commands it is about.
//!
//! A function that aborts or resets ends only when every command that it is about has ended: none of them can touch the
//! guest's memory any more, and their answers are in the used rings. Other cores poll those rings, so they are told through
//! a [`Barrier`]. A lane that finds an [`Order`] takes what its ring held, asks for the end of the commands that are meant,
//! those at the device by NVMe's Abort, and says so when they have ended. It goes on meanwhile.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};

use rustix::event::{EventfdFlags, eventfd};

use super::scsi;
use super::side::{SideConfig, SideRing};
use crate::scsi::{Address, LogicalUnit, Nexus, Tasks};
use crate::virtio::scsi::{Control, ResponsePlace, finish_control, parse_control, response, task};
use crate::virtio::virtqueue::HeadIndex;

/// Control requests that are taken in one turn.
const FETCH_BUDGET: u16 = 8;

/// Where the lanes of all hosts are waited for: by control queues, each for the lanes of its host, and by lanes,
/// for those that have a logical unit.
///
/// Whoever waits takes a number and tells it to the lanes. A lane says up to which number it has carried out the orders of
/// task management; up to which all commands have ended; and up to which none is at the device. The last two differ while it
/// has a command that itself waits for others, which must not wait for it.
#[derive(Debug)]
pub struct Barrier {
    numbers: AtomicU64,
    lanes: Box<[Stand]>,
    /// By lane: the one that it gets its commands from, which is itself if it has the guest's ring.
    fronts: Box<[usize]>,
    /// What control queues want done, by the first lane of their host.
    orders: Box<[OrderPlace]>,
    /// For a lane that the barrier does not know.
    nobody: OwnedFd,
}

/// Where a lane stands. In a cache line of its own: it looks at it in each turn.
#[derive(Debug)]
#[repr(align(64))]
struct Stand {
    /// The last number that it was told.
    wanted: AtomicU64,
    /// The same, of an order.
    ordered: AtomicU64,
    /// All orders up to this number are carried out; the highest where there is no lane.
    obeyed: AtomicU64,
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
                ordered: AtomicU64::new(0),
                obeyed: AtomicU64::new(u64::MAX),
                ended: AtomicU64::new(u64::MAX),
                swept: AtomicU64::new(u64::MAX),
                quiet: AtomicU64::new(u64::MAX),
                waker: waker()?,
            })
        };
        Ok(Barrier {
            numbers: AtomicU64::new(0),
            lanes: (0..lanes).map(|_| stand()).collect::<io::Result<_>>()?,
            fronts: (0..lanes).collect(),
            orders: (0..lanes).map(|_| OrderPlace::default()).collect(),
            nobody: waker()?,
        })
    }

    /// The lane that each gets its commands from, which is itself if it has the guest's ring.
    #[must_use]
    pub fn with_fronts(self, fronts: impl IntoIterator<Item = usize>) -> Barrier {
        Barrier {
            fronts: fronts.into_iter().collect(),
            ..self
        }
    }

    /// For how many lanes it is.
    #[must_use]
    pub fn lanes(&self) -> usize {
        self.lanes.len()
    }

    /// The eventfd that wakes a lane's poller.
    pub fn waker(&self, lane: usize) -> BorrowedFd<'_> {
        let stand = self.lanes.get(lane);
        stand.map_or(&self.nobody, |stand| &stand.waker).as_fd()
    }

    /// The last number that a lane was told, and that of the last order.
    #[inline(always)]
    pub(super) fn asked(&self, lane: usize) -> (u64, u64) {
        // Pairs with the release in `ask` and in `order`: what the guest had put into any ring before its function is there
        // to be seen, and what a lane did before it asked.
        self.lanes.get(lane).map_or((0, 0), |stand| {
            let wanted = stand.wanted.load(Ordering::Acquire);
            (wanted, stand.ordered.load(Ordering::Acquire))
        })
    }

    /// A lane begins, with nothing in flight. It is known by now to those who ask lanes that it may be one of. What it was
    /// told and ordered by then.
    pub(super) fn enter(&self, lane: usize) -> (u64, u64) {
        let (wanted, ordered) = self.asked(lane);
        // Whoever has taken a number and not found this lane yet does not wait for it: pairs with `ask`.
        let begun = self.numbers.load(Ordering::SeqCst);
        self.stand_at(lane, wanted.max(ordered).max(begun));
        // Who asks from now on sees that the lane is there, or the lane sees that it is asked, and by then what was changed
        // before. Pairs with the fence in `ask`.
        fence(Ordering::SeqCst);
        (wanted, ordered)
    }

    fn stand_at(&self, lane: usize, number: u64) {
        if let Some(stand) = self.lanes.get(lane) {
            for word in [&stand.obeyed, &stand.ended, &stand.swept, &stand.quiet] {
                word.store(number, Ordering::Release);
            }
        }
    }

    /// A lane has carried out its orders: the commands that they were about have ended, and its guest can see that. It may be
    /// further already: a lane that has come later need not obey orders from before, though it may be told of one.
    pub(super) fn obey(&self, lane: usize, number: u64) {
        if let Some(stand) = self.lanes.get(lane) {
            // Pairs with the acquire in `are_past`: the used ring first, then this, then the control queue's used ring.
            stand.obeyed.fetch_max(number, Ordering::Release);
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
        let (wanted, _) = self.asked(lane);
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

    /// Gives an order to `lanes`; `lanes` is asked for after its number was taken. The one before from the same host must
    /// have been carried out.
    fn order<I: Iterator<Item = usize>>(&self, order: &Order, lanes: impl FnOnce() -> I) -> u64 {
        let number = self.numbers.fetch_add(1, Ordering::SeqCst) + 1;
        if let Some(place) = self.orders.get(order.host.start) {
            place.set(number, order);
        }
        // As in `ask`.
        fence(Ordering::SeqCst);
        for lane in lanes() {
            // A lane that gets its commands from another one has all that were there before once that one says so.
            let front = self.fronts.get(lane).copied().unwrap_or(lane);
            self.forward(front, number);
        }
        number
    }

    /// Tells a lane of an order.
    pub(super) fn forward(&self, lane: usize, number: u64) {
        if let Some(stand) = self.lanes.get(lane) {
            stand.ordered.fetch_max(number, Ordering::Release);
            self.wake(lane);
        }
    }

    /// The orders for a lane with numbers behind `after` and up to `last`; with each, where to say that a command that it
    /// asks for was found.
    pub(super) fn orders(
        &self,
        lane: usize,
        after: u64,
        last: u64,
    ) -> impl Iterator<Item = (Order, &AtomicBool)> {
        let orders = self.orders.iter().filter_map(move |place| {
            let (number, order) = place.get()?;
            (number > after && number <= last).then_some((order, &place.found))
        });
        orders.filter(move |(order, _)| order.is_shared() || order.host.contains(&lane))
    }

    /// Whether a lane has found the command that the last order of a host asks for.
    fn has_found(&self, host: usize) -> bool {
        let place = self.orders.get(host);
        // Relaxed: what the lane did before it obeyed was acquired there.
        place.is_some_and(|place| place.found.load(Ordering::Relaxed))
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

/// What a control queue wants of commands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// [`task`]'s.
    pub(super) function: u32,
    /// The logical unit: see [`LogicalUnit::identity`].
    pub(super) unit: usize,
    /// The target, of [`task::I_T_NEXUS_RESET`].
    pub(super) target: u8,
    /// The tag, of functions that are about one command.
    pub(super) id: u64,
    /// The lanes of the host.
    pub(super) host: Range<usize>,
}

impl Order {
    /// Whether it is about the commands of all hosts that have the logical unit.
    fn is_shared(&self) -> bool {
        matches!(
            self.function,
            task::LOGICAL_UNIT_RESET | task::CLEAR_TASK_SET
        )
    }

    /// Whether it only asks.
    pub(super) fn is_query(&self) -> bool {
        matches!(self.function, task::QUERY_TASK | task::QUERY_TASK_SET)
    }

    /// Whether a command for `unit`, which is at `target`, is meant.
    pub(super) fn means(
        &self,
        unit: &LogicalUnit,
        target: impl FnOnce() -> Option<u8>,
        id: u64,
    ) -> bool {
        match self.function {
            task::I_T_NEXUS_RESET => target() == Some(self.target),
            task::ABORT_TASK | task::QUERY_TASK => unit.identity() == self.unit && id == self.id,
            _ => unit.identity() == self.unit,
        }
    }

    /// Whether the initiator of `lane` is to be told that somebody else has ended its commands.
    pub(super) fn clears_others(&self, lane: usize) -> bool {
        self.function == task::CLEAR_TASK_SET && !self.host.contains(&lane)
    }

    /// How such a command is answered that ends because of it. A driver sends again what was reset.
    pub(super) fn response(&self, lane: usize) -> u8 {
        match self.function {
            task::I_T_NEXUS_RESET | task::LOGICAL_UNIT_RESET => response::RESET,
            _ if self.host.contains(&lane) => response::ABORTED,
            // It is not its own initiator that wanted it.
            _ => response::RESET,
        }
    }
}

/// An [`Order`], for lanes on other cores. Lanes that it is for read it while it stays as it is: the control queue waits for
/// them. Others, which may find it half written, see that it has changed.
#[derive(Debug, Default)]
struct OrderPlace {
    /// 0 while it is written.
    number: AtomicU64,
    function_and_target: AtomicU64,
    unit: AtomicUsize,
    id: AtomicU64,
    host: [AtomicUsize; 2],
    found: AtomicBool,
}

impl OrderPlace {
    fn set(&self, number: u64, order: &Order) {
        self.number.store(0, Ordering::Relaxed);
        // Pairs with the fence in `get`: who sees anything of what follows sees the 0, or the number below.
        fence(Ordering::Release);
        let target = u64::from(order.target) << 32;
        let function = u64::from(order.function) | target;
        self.function_and_target.store(function, Ordering::Relaxed);
        self.unit.store(order.unit, Ordering::Relaxed);
        self.id.store(order.id, Ordering::Relaxed);
        self.host[0].store(order.host.start, Ordering::Relaxed);
        self.host[1].store(order.host.end, Ordering::Relaxed);
        self.found.store(false, Ordering::Relaxed);
        self.number.store(number, Ordering::Release);
    }

    fn get(&self) -> Option<(u64, Order)> {
        let number = self.number.load(Ordering::Acquire);
        let [function, _, _, _, target, ..] = self
            .function_and_target
            .load(Ordering::Relaxed)
            .to_le_bytes();
        let order = Order {
            function: function.into(),
            unit: self.unit.load(Ordering::Relaxed),
            target,
            id: self.id.load(Ordering::Relaxed),
            host: self.host[0].load(Ordering::Relaxed)..self.host[1].load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let same = self.number.load(Ordering::Relaxed) == number;
        (number != 0 && same).then_some((number, order))
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

/// The target that an address is about.
fn target_of(address: Address) -> u8 {
    match address {
        Address::Unit { target, .. } | Address::WellKnown { target } => target,
        Address::Controller => 0,
    }
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
            Some(waiting) if self.have_obeyed(&waiting) && self.attend(&waiting) => {
                let found = match waiting.function {
                    task::QUERY_TASK | task::QUERY_TASK_SET => {
                        self.barrier.has_found(self.lanes.start)
                    }
                    _ => false,
                };
                let response = match found {
                    true => response::FUNCTION_SUCCEEDED,
                    false => response::OK,
                };
                answer(ring, waiting.head, &waiting.place, response);
                true
            }
            waiting => {
                self.waiting = waiting;
                self.waiting.is_none()
            }
        }
    }

    /// Whether the lanes of a function have carried it out.
    fn have_obeyed(&self, waiting: &Waiting) -> bool {
        let barrier = &self.barrier;
        let are_past = |lanes: &mut dyn Iterator<Item = usize>| {
            barrier.are_past(lanes, waiting.number, |stand| &stand.obeyed)
        };
        match self.shared_unit(waiting.function, waiting.address) {
            Some(unit) => are_past(&mut unit.lock().taken()),
            None => are_past(&mut self.lanes.clone()),
        }
    }

    /// The logical unit that a function is about whoever's the commands are: other hosts may have it too.
    fn shared_unit(&self, function: u32, address: Address) -> Option<&LogicalUnit> {
        let shared = matches!(function, task::LOGICAL_UNIT_RESET | task::CLEAR_TASK_SET);
        self.unit_at(address).filter(|_| shared)
    }

    fn unit_at(&self, address: Address) -> Option<&LogicalUnit> {
        let nexus = &self.nexus;
        nexus.target().units().get(nexus.find(address)?)
    }

    /// Has the lanes carry a function out; the number of the order.
    fn order(&self, function: u32, address: Address, id: u64) -> u64 {
        let barrier = &self.barrier;
        let order = Order {
            function,
            // A well-known logical unit has no commands that take any time.
            unit: self.unit_at(address).map_or(0, LogicalUnit::identity),
            target: target_of(address),
            id,
            host: self.lanes.clone(),
        };
        match self.shared_unit(function, address) {
            Some(unit) => barrier.order(&order, || unit.lock().taken()),
            None => barrier.order(&order, || self.lanes.clone()),
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
        let (function, lun, id) = match control {
            Control::Task { function, lun, id } => (Some(function), lun, id),
            Control::Notification { lun } => (None, lun, 0),
        };
        let nexus = &self.nexus;
        let address = scsi::address(lun).filter(|address| nexus.has_target(*address));
        let Some(address) = address else {
            return answer(ring, head, &place, response::BAD_TARGET);
        };
        let absent = matches!(address, Address::Unit { .. }) && nexus.find(address).is_none();
        match function {
            // The reset of a nexus is about a target, whatever the LUN.
            Some(task::I_T_NEXUS_RESET) => {}
            Some(_) if absent => return answer(ring, head, &place, response::INCORRECT_LUN),
            // Its answers have no code of their own (virtio 1.2, 5.6.6.2): there is nobody at that address.
            None if absent => return answer(ring, head, &place, response::BAD_TARGET),
            _ => {}
        }
        match function {
            Some(
                function @ (task::ABORT_TASK
                | task::ABORT_TASK_SET
                | task::CLEAR_TASK_SET
                | task::I_T_NEXUS_RESET
                | task::LOGICAL_UNIT_RESET
                | task::QUERY_TASK
                | task::QUERY_TASK_SET),
            ) => {
                ring.counters.tasks += 1;
                self.waiting = Some(Waiting {
                    head,
                    place,
                    number: self.order(function, address, id),
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
