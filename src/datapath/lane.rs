//! One guest virtqueue in service: its ring, its memory, its requests. A lane is made by the session, moves by value
//! to the [`Poller`](super::Poller) whose queue pair it rides with, and comes back by value when it has drained:
//! then no command names its memory any more (I2) and its session may unmap it.
//!
//! A request that one NVMe command carries out goes straight to the submission queue. Everything else (a transfer
//! beyond MDTS, data that PRPs cannot describe, several ranges) becomes `Work`: it is issued piece by piece as slots
//! and bounce buffers come free, and the lane fetches nothing new meanwhile, so that one request at a time is enough.

mod blk;
mod control;
mod events;
mod scsi;
mod side;

use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nvme_driver::MAX_ENTRIES;
use nvme_driver::spec::{Cid, LbaRange, MAX_BLOCKS, Nsid, Status, SubmissionEntry};
use nvme_driver::transport::{Armed, Iova, Transport};
use nvme_driver::{DataSegment, PrpError, QueuePair, SubmitError};

use super::abort::Aborts;
use super::bounce::{BouncePool, CHUNK_SIZE, ChunkId};
use super::poller::PairHealth;
use super::signal::Signal;
use crate::block::{Against, BlockRange, RangeList};
use crate::stats::{QueueCounters, SharedCounters, StageTimes};
use crate::virtio::chain::Chain;
use crate::virtio::memory::{GuestMemory, Segment, StatusByte};
use crate::virtio::virtqueue::{HeadIndex, RingError, Virtqueue};
use blk::Blk;
use scsi::Scsi;
use side::SideLane;

pub use blk::LaneConfig;
pub use control::{Barrier, ControlConfig, HostTasks};
pub use events::{EventConfig, Events, Happening, WantedEvents};
pub use scsi::{MediumId, ScsiLaneConfig, WayConfig};
pub use side::SideConfig;

/// Requests that one lane takes from its ring in one turn. The fewer, the earlier do the device and the guest get to work
/// again: were it all 32 that a guest has in flight, each of the three would wait for the others. The more, the fewer
/// doorbells.
const FETCH_BUDGET: u16 = 16;

/// Pieces of guest memory that one request may consist of: its descriptors, and the region boundaries they cross.
pub(super) fn max_segments(queue_size: u16) -> usize {
    usize::from(queue_size) + 64
}

/// Names a lane among all that the process ever had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LaneId(pub u64);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running,
    /// Fetches nothing; leaves when nothing is in flight.
    Draining,
    /// The ring is broken (NR): fetches nothing; requests in flight still complete.
    Broken,
}

/// What a lane looks at in each turn: what [`State`] and [`Work`] come to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Attention {
    /// New requests.
    Ring,
    /// The same, and the guest's signal, which the last turn left to this one.
    Signal,
    /// The work at hand.
    Work,
    /// Completions alone.
    Nothing,
}

/// A request between pop and used ring, at its head's place.
#[derive(Clone, Copy, Debug)]
struct Request<P> {
    /// Where the answer goes; `None` while nothing is in flight here.
    place: Option<P>,
    /// Bytes of data that the guest gets on success.
    data_in: u32,
    /// Commands outstanding, plus one while the request is still being issued.
    pending: u32,
    /// What the first command that failed came to.
    failure: Option<Status>,
}

/// What became of a command.
#[derive(Clone, Copy, Debug)]
pub(super) struct Failure {
    pub(super) status: Status,
    /// Of a comparison: which byte of the request's data is not the same.
    pub(super) differs: Option<u64>,
    /// The blocks among which the one at fault is.
    pub(super) blocks: Option<LbaRange>,
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Failure {
            status,
            differs: None,
            blocks: None,
        }
    }
}

/// The namespace that a request is for.
#[derive(Clone, Copy, Debug)]
struct Medium {
    nsid: Nsid,
    block_shift: u32,
    /// What is written is durable when the request completes.
    durable: bool,
}

impl Medium {
    #[inline]
    fn transfer(&self, write: bool, slba: u64, blocks: u32) -> SubmissionEntry {
        let range = LbaRange { slba, blocks };
        if write {
            SubmissionEntry::write(self.nsid, range, self.durable)
        } else {
            SubmissionEntry::read(self.nsid, range)
        }
    }
}

/// A request that takes several commands, and how far it has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Work {
    head: HeadIndex,
    medium: Medium,
    step: Step,
    /// What follows, each when everything that was issued has ended well.
    then: Then,
}

type Then = [Option<Step>; 2];

const NOTHING_MORE: Then = [None; 2];

#[derive(Clone, Copy, Debug)]
enum Step {
    /// `left` blocks from `lba`; `offset` bytes of the data segments are behind us.
    Transfer {
        write: bool,
        lba: u64,
        left: u32,
        offset: u64,
    },
    /// `left` blocks from `lba` of range `range`; ranges after it follow.
    WriteZeroes {
        range: usize,
        done: u32,
    },
    /// All ranges from `range` on.
    Discard {
        range: usize,
    },
    /// The block in the data segments, or zeroes, to each of `left` blocks from `lba` on.
    Same {
        lba: u64,
        left: u32,
    },
    /// `left` blocks from `lba` are read and compared; `offset` bytes of the data segments are behind us.
    Verify {
        lba: u64,
        left: u32,
        offset: u64,
        against: Against,
        /// From the medium: what a cache holds may be fine, and the medium not.
        fua: bool,
    },
    /// `left` blocks from `lba` are read, each by itself, until one cannot be; see [`Front::investigate`].
    Probe {
        lba: u64,
        left: u32,
    },
    /// `done` blocks of the ranges that begin at `range` are copied; at most `most` at a time, one after the other.
    Copy {
        range: usize,
        done: u32,
        most: u32,
    },
    Flush,
    /// Something that is not for the device to do; see [`Front::wait`].
    Wait(Wait),
    /// Everything was issued.
    Done,
}

/// What a request waits for that is about logical units which others use too. `unit` is its index.
#[derive(Clone, Copy, Debug)]
enum Wait {
    /// The lock of a range of blocks.
    Lock { unit: usize, lba: u64, count: u32 },
    /// Commands of other lanes that were at the device before `number`.
    Others { unit: usize, number: u64 },
    /// A turn among those who want the lock, after others who hold blocks of the step that follows: whoever looked for a
    /// moment without a lock might never find one.
    Turn { unit: usize },
}

/// How far a step has come.
pub(super) enum Progress {
    Issued,
    /// Another step begins.
    Next,
    /// No slot or no bounce buffer: go on after a completion.
    Blocked,
    Finished,
    Failed,
}

/// What a command belongs to, by CID: the lane's place in the poller, the request's head, and how much of the request
/// the command is. 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum CommandContext {
    /// All of it: where the answer begins, and the bytes of data that the guest gets on success.
    Whole {
        lane: u16,
        head: HeadIndex,
        data_in: u32,
        answer: StatusByte,
    },
    /// A part, perhaps through a bounce buffer; the lane remembers the request.
    Part {
        lane: u16,
        head: HeadIndex,
        bounce: Option<ChunkId>,
    },
}

const _: () = assert!(size_of::<CommandContext>() == 16);

/// What the lanes of one poller share: the queue pair and what belongs to its commands.
#[derive(Debug)]
pub(super) struct Pair<T: Transport> {
    pub(super) queue: QueuePair<T>,
    /// By CID: place for every one that there can be.
    pub(super) commands: Box<[CommandContext; MAX_ENTRIES as usize]>,
    pub(super) bounce: BouncePool,
    pub(super) aborts: Aborts,
    pub(super) health: Arc<PairHealth>,
}

impl<T: Transport> Pair<T> {
    /// What an outstanding command belongs to.
    #[inline(always)]
    pub(super) fn context(&mut self, cid: Cid) -> &mut CommandContext {
        // The modulo changes nothing (the driver's own identifiers) and spares a bounds check.
        let place = cid.index() % self.commands.len();
        &mut self.commands[place]
    }

    /// A bounce buffer for a command that there is room for.
    fn take_chunk(&mut self) -> Option<ChunkId> {
        match self.queue.room() {
            0 => None,
            _ => self.bounce.take(),
        }
    }

    /// Asks for the end of the commands of a lane whose requests `which` chooses.
    #[cold]
    fn abort(&mut self, slot: u16, which: impl Fn(HeadIndex) -> bool) {
        let commands = &self.commands;
        let chosen = self.queue.outstanding_cids().filter(|cid| {
            let context = commands.get(cid.index());
            matches!(context, Some(CommandContext::Part { lane, head, .. }) if *lane == slot && which(*head))
        });
        self.aborts.ask(self.health.aborts(), chosen);
    }

    /// A command has completed, as any other or because it was aborted: which Abort it is may not be over.
    #[cold]
    pub(super) fn was_to_be_aborted(&mut self, cid: Cid) {
        if self.aborts.completed(self.health.aborts(), cid) {
            self.queue.keep(cid);
        }
    }

    /// Identifiers are free again whose Aborts the controller has answered.
    pub(super) fn look_at_aborts(&mut self) {
        while self.aborts.any()
            && let Some(cid) = self.aborts.answered(self.health.aborts())
        {
            self.queue.give_back(cid);
        }
    }

    /// The controller that knew of Aborts is gone, or was reset.
    pub(super) fn forget_aborts(&mut self) {
        self.health.aborts().clear();
        self.look_at_aborts();
    }
}

/// What the requests of a virtqueue are, and how they are answered. What is the same for all is in [`RequestLane`].
pub(super) trait Front: fmt::Debug + Sized {
    /// Where an answer goes.
    type Place: Copy + fmt::Debug;

    /// Whether requests may be taken from the ring now.
    #[inline(always)]
    fn may_fetch(_lane: &mut RequestLane<Self>) -> bool {
        true
    }

    /// New requests may not be taken now: is there anything to do at the device instead?
    fn held_up<T: Transport>(_lane: &mut RequestLane<Self>, _pair: &mut Pair<T>) {}

    /// Whether there is anything to do that nothing would tell a sleeping poller of.
    fn is_wanted(_lane: &RequestLane<Self>) -> bool {
        false
    }

    /// Takes up to `most` requests from the ring and starts them.
    fn fetch<T: Transport>(lane: &mut RequestLane<Self>, pair: &mut Pair<T>, most: u16);

    /// Takes up to `most` requests from the ring and answers that there is no device.
    fn fail(lane: &mut RequestLane<Self>, most: u16);

    /// Writes the answer, and returns the used length.
    fn finish(
        &mut self,
        head: HeadIndex,
        place: Self::Place,
        data_in: u32,
        failure: Option<Status>,
    ) -> u32;

    /// Whether a request that ends so has failed.
    fn is_error(_place: &Self::Place, _status: Status) -> bool {
        true
    }

    /// The request at `head` fails, and this is why; of several commands that failed the `first` one, or another.
    fn explain(&mut self, _head: HeadIndex, _failure: Failure, _first: bool) {}

    /// All commands of the request at `head` have ended, and one has failed. `true` when it became work again, which finds out
    /// more: it is not over then.
    fn investigate(_lane: &mut RequestLane<Self>, _head: HeadIndex) -> bool {
        false
    }

    /// Whether the block at fault is known.
    fn is_explained(&self, _head: HeadIndex) -> bool {
        true
    }

    /// Goes on with a request that waits, if it need not any longer.
    fn wait(_lane: &mut RequestLane<Self>, _work: &mut Work) -> Progress {
        Progress::Failed
    }

    /// Whether the work at hand keeps others waiting: then it is not over before its commands have ended.
    fn keeps_others_waiting(&self) -> bool {
        false
    }

    /// The work at hand is over.
    fn work_ended(&mut self) {}

    /// Everything that was finished is visible to the guest.
    #[inline(always)]
    fn published(_lane: &mut RequestLane<Self>) {}

    /// The poller wants to sleep: whoever else has something for this lane is to say so. Whether there is something already.
    fn arm(&mut self) -> bool {
        false
    }

    /// The poller is awake.
    fn disarm(&mut self) {}

    /// Whether there is a file beside the kick's that tells of requests.
    fn has_waker(&self) -> bool {
        false
    }

    /// The poller wants the lane back. `true` when requests are to be taken all the same, until [`Self::is_over`].
    fn recall(&mut self) -> bool {
        false
    }

    /// [`Self::recall`] said `true`.
    fn is_recalled(&self) -> bool {
        false
    }

    /// And no more requests will come.
    fn is_over(&self) -> bool {
        false
    }

    /// The device came back without its cache: the next flush cannot keep its promise.
    fn lose_cache(&mut self);

    /// Nor can one that was at the device.
    fn doubts_flushes(&self) -> bool;
}

/// A virtqueue with requests that become NVMe commands.
#[derive(Debug)]
pub(super) struct RequestLane<F: Front> {
    queue: Virtqueue,
    chain: Chain,
    requests: Box<[Request<F::Place>]>,
    work: Option<Work>,
    state: State,
    attention: Attention,
    /// The guest's signal may wait for the next turn: the guest goes on sending, so it is awake, and one signal tells of
    /// what two turns have finished.
    may_hold: bool,
    /// Its place in the poller.
    slot: u16,
    counters: QueueCounters,
    ranges: RangeList,
    front: F,
    config: LaneParts,
}

/// What every lane with requests has, whatever they are.
#[derive(Debug)]
struct LaneParts {
    id: LaneId,
    memory: Arc<GuestMemory>,
    /// Flush means something: the controller has a volatile write cache.
    volatile_cache: bool,
    /// Discards reach the device (Dataset Management is supported).
    deallocate: bool,
    call: Arc<Signal>,
    error: Arc<Signal>,
    kick: Option<OwnedFd>,
    shared: Arc<SharedCounters>,
}

/// One guest virtqueue in service.
#[derive(Debug)]
pub struct Lane(pub(super) Kind);

/// What a virtqueue carries.
#[derive(Debug)]
pub(super) enum Kind {
    /// Requests of a block device.
    Blk(Box<RequestLane<Blk>>),
    /// Commands of a SCSI host.
    Scsi(Box<RequestLane<Scsi>>),
    /// The task management of a SCSI host, or its events. It has no NVMe commands.
    Side(Box<SideLane>),
}

// SAFETY: the pointers in a lane lead to guest memory that its `Arc<GuestMemory>` keeps mapped; one thread at a time
// owns the lane (I7), and what the guest does to those bytes meanwhile is data, never a reference (I1).
unsafe impl Send for Lane {}

/// The same for every kind of lane.
macro_rules! on_lane {
    ($lane:expr, $name:ident => $do:expr) => {
        match $lane {
            Kind::Blk($name) => $do,
            Kind::Scsi($name) => $do,
            Kind::Side($name) => $do,
        }
    };
}

impl Lane {
    /// A lane of a block device that has fetched nothing yet. Allocates all that it will ever need.
    #[must_use]
    pub fn new(config: LaneConfig) -> Lane {
        Lane(Kind::Blk(Box::new(RequestLane::<Blk>::new(config))))
    }

    /// The same for commands of a SCSI host.
    #[must_use]
    pub fn scsi(config: ScsiLaneConfig) -> Lane {
        Lane(Kind::Scsi(Box::new(RequestLane::<Scsi>::new(config))))
    }

    /// The same for the control queue of a SCSI host.
    #[must_use]
    pub fn control(config: ControlConfig) -> Lane {
        Lane(Kind::Side(Box::new(SideLane::control(config))))
    }

    /// The same for its event queue.
    #[must_use]
    pub fn events(config: EventConfig) -> Lane {
        Lane(Kind::Side(Box::new(SideLane::events(config))))
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> LaneId {
        on_lane!(&self.0, lane => lane.id())
    }

    /// Where the ring stands, for GET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u32 {
        on_lane!(&self.0, lane => lane.base())
    }

    pub(super) fn set_slot(&mut self, slot: u16) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.slot = slot,
            Kind::Scsi(lane) => lane.slot = slot,
            Kind::Side(_) => {}
        }
    }

    pub(super) fn drain(&mut self) {
        on_lane!(&mut self.0, lane => lane.drain());
    }

    pub(super) fn is_draining(&self) -> bool {
        on_lane!(&self.0, lane => lane.is_draining())
    }

    pub(super) fn is_drained(&self) -> bool {
        on_lane!(&self.0, lane => lane.is_drained())
    }

    /// The files that wake a poller for it, of which [`Lane::kick`] is one.
    pub fn wakers(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let other = match &self.0 {
            Kind::Scsi(lane) => Some(lane.waker()),
            Kind::Side(lane) => lane.waker(),
            Kind::Blk(_) => None,
        };
        self.kick().into_iter().chain(other)
    }

    /// The kick eventfd. Nobody reads it: it is watched edge-triggered.
    #[must_use]
    pub fn kick(&self) -> Option<BorrowedFd<'_>> {
        on_lane!(&self.0, lane => lane.kick())
    }

    pub(super) fn replace_kick(&mut self, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        on_lane!(&mut self.0, lane => lane.replace_kick(kick))
    }

    /// The disk has so many blocks. A SCSI host is told by its nexus.
    pub(super) fn resize(&mut self, blocks: u64) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.resize(blocks),
            Kind::Scsi(_) | Kind::Side(_) => {}
        }
    }

    /// The poller wants to sleep: asks the guest for a kick. What is it that nothing would tell of?
    pub(super) fn arm(&mut self) -> Armed {
        on_lane!(&mut self.0, lane => lane.arm())
    }

    /// The poller is awake.
    pub(super) fn disarm(&mut self) {
        on_lane!(&mut self.0, lane => lane.disarm());
    }

    /// [`Self::publish`], and when it did what: when the guest could see it, and when it had its signal if it wanted one.
    #[cold]
    pub(super) fn publish_timed(&mut self) -> (Instant, Option<Instant>) {
        on_lane!(&mut self.0, lane => lane.publish_timed())
    }

    pub(super) fn stages(&self) -> &StageTimes {
        on_lane!(&self.0, lane => lane.stages())
    }

    /// It leaves its poller, drained.
    pub(super) fn leave(&mut self) {
        self.publish();
        self.publish_counters();
        if let Kind::Scsi(lane) = &mut self.0 {
            lane.leave();
        }
    }

    pub(super) fn cache_was_lost(&mut self) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.cache_was_lost(),
            Kind::Scsi(lane) => lane.cache_was_lost(),
            Kind::Side(_) => {}
        }
    }

    pub(super) fn doubt_flush(&mut self, head: HeadIndex) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.doubt_flush(head),
            Kind::Scsi(lane) => lane.doubt_flush(head),
            Kind::Side(_) => {}
        }
    }

    pub(super) fn counters_mut(&mut self) -> &mut QueueCounters {
        on_lane!(&mut self.0, lane => lane.counters_mut())
    }

    pub(super) fn publish_counters(&self) {
        on_lane!(&self.0, lane => lane.publish_counters());
    }

    /// Is there anything to do that does not wait for the device? At a glance: [`Lane::fetch`] knows better.
    #[inline(always)]
    pub(super) fn wants(&self) -> bool {
        match &self.0 {
            Kind::Blk(lane) => lane.wants(),
            other => other.wants_for_host(),
        }
    }

    /// Takes new requests from the ring and submits their commands; no doorbell. `true` when anything was done.
    #[inline(always)]
    pub(super) fn fetch<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        match &mut self.0 {
            Kind::Blk(lane) => lane.fetch(pair),
            other => other.fetch_for_host(pair),
        }
    }

    /// There is no device: what was not sent yet never will be.
    pub(super) fn give_up_work(&mut self) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.give_up_work(),
            Kind::Scsi(lane) => lane.give_up_work(),
            Kind::Side(_) => {}
        }
    }

    /// There is no device: takes new requests from the ring and, if `fail`, fails those that want one. `true` when anything
    /// was done.
    #[cold]
    pub(super) fn do_without(&mut self, fail: bool) -> bool {
        match &mut self.0 {
            Kind::Blk(lane) => fail && lane.fail_new(),
            // One that is wanted back has nobody else who would answer what comes by its relay.
            Kind::Scsi(lane) => {
                lane.collect() || ((fail || lane.front.is_recalled()) && lane.fail_new())
            }
            Kind::Side(lane) => lane.fetch(),
        }
    }

    /// A command of the request at `head` has completed.
    pub(super) fn command_done(&mut self, head: HeadIndex, failure: Option<Failure>) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.command_done(head, failure),
            Kind::Scsi(lane) => lane.command_done(head, failure),
            // It has no commands.
            Kind::Side(_) => {}
        }
    }

    /// Makes finished requests visible to the guest, and tells it once if it wants to know.
    #[inline]
    pub(super) fn publish(&mut self) {
        on_lane!(&mut self.0, lane => lane.publish());
    }

    /// [`Lane::publish`] at the end of a turn: a signal may be held back, and the next turn looks at it then.
    #[inline]
    pub(super) fn publish_turn(&mut self) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.publish_turn(),
            other => other.publish_for_host(),
        }
    }

    /// Makes finished requests visible to the guest. [`Lane::publish`] tells it.
    #[inline]
    pub(super) fn publish_used(&mut self) {
        match &mut self.0 {
            Kind::Blk(lane) => lane.publish_used(),
            // All at once, with the signal.
            Kind::Scsi(_) | Kind::Side(_) => {}
        }
    }
}

/// What the hot calls of [`Lane`] do for a SCSI host: apart, so that a block device's lane, which most are, is found by one
/// comparison.
impl Kind {
    #[inline(never)]
    fn wants_for_host(&self) -> bool {
        match self {
            Kind::Blk(_) => false,
            Kind::Scsi(lane) => lane.wants(),
            Kind::Side(lane) => lane.wants(),
        }
    }

    #[inline(never)]
    fn fetch_for_host<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        match self {
            Kind::Blk(_) => false,
            Kind::Scsi(lane) => lane.fetch(pair),
            Kind::Side(lane) => lane.fetch(),
        }
    }

    #[inline(never)]
    fn publish_for_host(&mut self) {
        match self {
            Kind::Blk(_) => {}
            Kind::Scsi(lane) => lane.publish_turn(),
            Kind::Side(lane) => lane.publish(),
        }
    }
}

impl<F: Front> RequestLane<F> {
    fn with_front(mut queue: Virtqueue, config: LaneParts, front: F) -> RequestLane<F> {
        let size = queue.size();
        let idle = Request {
            place: None,
            data_in: 0,
            pending: 0,
            failure: None,
        };
        // After a (re)start the guest may wait for an interrupt that its last server owed it: one spurious signal.
        queue.request_signal();
        queue.suppress_kicks();
        RequestLane {
            queue,
            chain: Chain::new(max_segments(size)),
            requests: vec![idle; usize::from(size)].into_boxed_slice(),
            work: None,
            state: State::Running,
            attention: Attention::Ring,
            may_hold: false,
            slot: 0,
            counters: config.shared.snapshot(),
            ranges: RangeList::new(),
            front,
            config,
        }
    }

    fn id(&self) -> LaneId {
        self.config.id
    }

    #[inline]
    fn counters_mut(&mut self) -> &mut QueueCounters {
        &mut self.counters
    }

    fn base(&self) -> u32 {
        self.queue.base()
    }

    fn drain(&mut self) {
        if self.front.recall() {
            return;
        }
        self.set_state(State::Draining);
        // There may be no turn that looks at it.
        self.publish();
    }

    fn is_draining(&self) -> bool {
        self.state == State::Draining || self.front.is_recalled()
    }

    /// Writes that were completed and not flushed may be gone.
    fn cache_was_lost(&mut self) {
        if self.config.volatile_cache {
            self.front.lose_cache();
        }
    }

    /// A flush that was at the device when its cache was lost: what it was to keep may be gone.
    fn doubt_flush(&mut self, head: HeadIndex) {
        if self.front.doubts_flushes() {
            self.fail_request(head, Status::INTERNAL_ERROR);
        }
    }

    fn is_drained(&self) -> bool {
        let is_over = self.state == State::Draining || self.front.is_over();
        is_over && self.queue.in_flight() == 0 && self.work.is_none()
    }

    fn kick(&self) -> Option<BorrowedFd<'_>> {
        self.config.kick.as_ref().map(AsFd::as_fd)
    }

    fn replace_kick(&mut self, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        std::mem::replace(&mut self.config.kick, kick)
    }

    fn arm(&mut self) -> Armed {
        if self.front.arm() || F::is_wanted(self) {
            return Armed::Pending;
        }
        if self.attention == Attention::Signal {
            return Armed::Pending;
        }
        // Work that is being issued waits for completions, and so does a lane that fetches nothing.
        if self.state != State::Running || self.work.is_some() {
            return Armed::Yes;
        }
        match self.queue.request_kicks() {
            Ok(true) => Armed::Pending,
            Ok(false) if self.config.kick.is_none() && !self.front.has_waker() => Armed::Never,
            Ok(false) => Armed::Yes,
            Err(error) => {
                self.break_ring(&error);
                Armed::Yes
            }
        }
    }

    fn disarm(&mut self) {
        self.front.disarm();
        self.queue.suppress_kicks();
    }

    fn publish_counters(&self) {
        self.config.shared.publish(&self.counters);
    }

    fn wants(&self) -> bool {
        match self.attention {
            Attention::Ring => self.queue.has_request() || F::is_wanted(self),
            Attention::Signal | Attention::Work => true,
            Attention::Nothing => F::is_wanted(self),
        }
    }

    /// Nothing but new requests could be to do, and there are none.
    #[inline(always)]
    pub(super) fn is_quiet(&self) -> bool {
        self.attention == Attention::Ring && !self.queue.has_request()
    }

    fn set_state(&mut self, state: State) {
        self.state = state;
        self.attend();
    }

    fn set_work(&mut self, work: Option<Work>) {
        self.work = work;
        self.attend();
    }

    /// After every change of what [`Attention`] is made of.
    fn attend(&mut self) {
        self.attention = match (self.work, self.state) {
            (Some(_), _) => Attention::Work,
            (None, State::Running) => Attention::Ring,
            (None, _) => Attention::Nothing,
        };
        // Nor must a signal that was held back be forgotten: this turn decides.
        self.may_hold = false;
    }

    #[inline(always)]
    fn fetch<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        self.may_hold = false;
        if !F::may_fetch(self) {
            F::held_up(self, pair);
            // That is something to be published.
            return true;
        }
        let owes = self.attention == Attention::Signal;
        if !owes && self.attention != Attention::Ring {
            return self.fetch_work(pair);
        }
        // The one look of a turn at the ring.
        let available = match self.queue.available() {
            // A signal is something to be published.
            Ok(0) => return owes,
            Ok(available) => available.min(FETCH_BUDGET),
            Err(error) => {
                self.break_ring(&error);
                return true;
            }
        };
        self.may_hold = !owes;
        let most = available.min(pair.queue.room());
        F::fetch(self, pair, most);
        true
    }

    /// Goes on with the work at hand, if there is any. New requests wait for the next turn.
    #[cold]
    fn fetch_work<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        let commands = self.counters.commands;
        let done = self.work.is_some() && self.continue_work(pair);
        self.count_doorbell(commands);
        // What was sent must be rung, also when it could not go on after that.
        done || self.counters.commands != commands
    }

    /// Lanes that share a queue pair share its doorbells too: each is told of every one it caused.
    #[inline(always)]
    fn count_doorbell(&mut self, commands: u64) {
        let rung = u64::from(self.counters.commands != commands);
        self.counters.sq_doorbells = self.counters.sq_doorbells.wrapping_add(rung);
    }

    #[inline]
    fn count_transfer(&mut self, write: bool, len: u32) {
        let bytes = u64::from(len);
        let counters = &mut self.counters;
        if write {
            counters.writes = counters.writes.wrapping_add(1);
            counters.bytes_written = counters.bytes_written.wrapping_add(bytes);
        } else {
            counters.reads = counters.reads.wrapping_add(1);
            counters.bytes_read = counters.bytes_read.wrapping_add(bytes);
        }
    }

    /// A request that may take several commands. One is counted for the issuing itself, or is the only one.
    fn remember(&mut self, head: HeadIndex, place: F::Place, data_in: u32) {
        self.requests[usize::from(head.get())] = Request {
            place: Some(place),
            data_in,
            pending: 1,
            failure: None,
        };
    }

    fn begin_work<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        head: HeadIndex,
        medium: Medium,
        (step, then): (Step, Then),
    ) {
        self.set_work(Some(Work {
            head,
            medium,
            step,
            then,
        }));
        self.continue_work(pair);
    }

    /// Issues as much of the current work as there is room for. `true` when none is left.
    #[cold]
    fn continue_work<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        let Some(mut work) = self.work else {
            return true;
        };
        // Each round issues a command, so the free slots bound the loop, or goes on to the next of a few steps.
        loop {
            let progress = match work.step {
                Step::Transfer { .. } => self.issue_transfer(pair, &mut work),
                Step::WriteZeroes { .. } => self.issue_write_zeroes(pair, &mut work),
                Step::Discard { .. } => self.issue_discard(pair, &mut work),
                Step::Same { .. } => self.issue_same(pair, &mut work),
                Step::Verify { .. } => self.issue_verify(pair, &mut work),
                Step::Probe { .. } => self.issue_probe(pair, &mut work),
                Step::Copy { .. } => self.issue_copy(pair, &mut work),
                Step::Flush => self.issue_flush(pair, &mut work),
                Step::Wait(_) => F::wait(self, &mut work),
                Step::Done => Progress::Finished,
            };
            let progress = match progress {
                Progress::Finished => self.next_step(&mut work),
                other => other,
            };
            match progress {
                Progress::Next => {}
                Progress::Issued => {
                    self.counters.commands = self.counters.commands.wrapping_add(1);
                    self.requests[usize::from(work.head.get())].pending += 1;
                }
                Progress::Blocked => {
                    self.set_work(Some(work));
                    return false;
                }
                Progress::Finished => break,
                Progress::Failed => {
                    self.fail_request(work.head, Status::INTERNAL_ERROR);
                    work.step = Step::Done;
                }
            }
        }
        self.end_work(work.head);
        true
    }

    /// All of the work at hand was issued, or never will be.
    fn end_work(&mut self, head: HeadIndex) {
        self.set_work(None);
        self.front.work_ended();
        // Drops the count that stood for the issuing itself.
        self.end_command(head);
    }

    fn issue_transfer<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let Step::Transfer {
            write,
            lba,
            left,
            offset,
        } = work.step
        else {
            return Progress::Failed;
        };
        if left == 0 {
            return Progress::Finished;
        }
        if pair.queue.room() == 0 {
            return Progress::Blocked;
        }
        let shift = work.medium.block_shift;
        let segments = if write {
            self.chain.readable()
        } else {
            self.chain.writable()
        };
        let most = (pair.queue.max_transfer() >> shift).clamp(1, MAX_BLOCKS);
        let blocks = left.min(most);
        let bytes = blocks << shift;
        let direct = piece(segments, offset, bytes);
        let entry = work.medium.transfer(write, lba, blocks);
        let (cid, blocks) =
            match pair
                .queue
                .submit(entry, direct.map(|segment| as_data(&segment)), bytes)
            {
                Ok(cid) => (Some(cid), blocks),
                Err(SubmitError::Full) => return Progress::Blocked,
                Err(SubmitError::Prp(PrpError::LengthMismatch)) => return Progress::Failed,
                Err(SubmitError::Prp(PrpError::Unaligned | PrpError::TooLong)) => {
                    let Some(chunk) = pair.bounce.take() else {
                        return Progress::Blocked;
                    };
                    let blocks = blocks.min(CHUNK_SIZE >> shift).max(1);
                    let bytes = blocks << shift;
                    let through = piece(segments, offset, bytes);
                    if write {
                        pair.bounce.gather(chunk, through);
                    } else {
                        pair.bounce.remember(chunk, through);
                    }
                    let entry = work.medium.transfer(write, lba, blocks);
                    self.counters.bounced += 1;
                    match self.submit_chunk(pair, work.head, entry, (chunk, bytes)) {
                        Progress::Issued => (None, blocks),
                        other => return other,
                    }
                }
            };
        if let Some(cid) = cid {
            *pair.context(cid) = CommandContext::Part {
                lane: self.slot,
                head: work.head,
                bounce: None,
            };
        }
        work.step = Step::Transfer {
            write,
            lba: lba + u64::from(blocks),
            left: left - blocks,
            offset: offset + (u64::from(blocks) << shift),
        };
        Progress::Issued
    }

    fn issue_write_zeroes<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        work: &mut Work,
    ) -> Progress {
        let Step::WriteZeroes { range, done } = work.step else {
            return Progress::Failed;
        };
        let Some(BlockRange { lba, count, unmap }) = self.ranges.as_slice().get(range).copied()
        else {
            return Progress::Finished;
        };
        let blocks = (count.get() - done).min(MAX_BLOCKS);
        let at = LbaRange {
            slba: lba.get() + u64::from(done),
            blocks,
        };
        let Medium { nsid, durable, .. } = work.medium;
        let entry = SubmissionEntry::write_zeroes(nsid, at, unmap, durable);
        let Ok(cid) = pair.queue.submit_without_data(entry) else {
            return Progress::Blocked;
        };
        *pair.context(cid) = CommandContext::Part {
            lane: self.slot,
            head: work.head,
            bounce: None,
        };
        let done = done + blocks;
        work.step = if done == count.get() {
            Step::WriteZeroes {
                range: range + 1,
                done: 0,
            }
        } else {
            Step::WriteZeroes { range, done }
        };
        Progress::Issued
    }

    fn issue_discard<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let Step::Discard { range } = work.step else {
            return Progress::Failed;
        };
        let ranges = &self.ranges.as_slice()[range..];
        if ranges.is_empty() {
            return Progress::Finished;
        }
        let as_wire = |range: &BlockRange| LbaRange {
            slba: range.lba.get(),
            blocks: range.count.get(),
        };
        match pair
            .queue
            .submit_deallocate(work.medium.nsid, ranges.iter().map(as_wire))
        {
            Ok(cid) => {
                *pair.context(cid) = CommandContext::Part {
                    lane: self.slot,
                    head: work.head,
                    bounce: None,
                };
                work.step = Step::Discard {
                    range: range + ranges.len(),
                };
                Progress::Issued
            }
            Err(SubmitError::Full) => Progress::Blocked,
            Err(SubmitError::Prp(_)) => Progress::Failed,
        }
    }

    /// One command after the other: what a segment reads may be what the one before has written.
    fn issue_copy<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let Step::Copy { range, done, most } = work.step else {
            return Progress::Failed;
        };
        let request = &self.requests[usize::from(work.head.get())];
        // One stands for the issuing itself.
        if request.pending > 1 {
            return Progress::Blocked;
        }
        let ranges = self.ranges.as_slice();
        let (Some(source), Some(destination), None) =
            (ranges.get(range), ranges.get(range + 1), request.failure)
        else {
            return Progress::Finished;
        };
        let blocks = (source.count.get() - done).min(most).clamp(1, MAX_BLOCKS);
        let from = LbaRange {
            slba: source.lba.get() + u64::from(done),
            blocks,
        };
        let to = destination.lba.get() + u64::from(done);
        let Medium { nsid, durable, .. } = work.medium;
        let Ok(cid) = pair.queue.submit_copy(nsid, to, from, durable) else {
            return Progress::Blocked;
        };
        *pair.context(cid) = CommandContext::Part {
            lane: self.slot,
            head: work.head,
            bounce: None,
        };
        let done = done + blocks;
        let (range, done) = match done == source.count.get() {
            true => (range + 2, 0),
            false => (range, done),
        };
        work.step = Step::Copy { range, done, most };
        Progress::Issued
    }

    /// Through a bounce buffer with as many copies of the block as it has room for.
    fn issue_same<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let Step::Same { lba, left } = work.step else {
            return Progress::Failed;
        };
        if left == 0 {
            return Progress::Finished;
        }
        let Some(chunk) = pair.take_chunk() else {
            return Progress::Blocked;
        };
        let shift = work.medium.block_shift;
        let most = CHUNK_SIZE.min(pair.queue.max_transfer()) >> shift;
        let blocks = left.min(most).max(1);
        let bytes = blocks << shift;
        let block = self.chain.readable();
        if block.is_empty() {
            pair.bounce.clear(chunk, bytes);
        } else {
            // The guest may change the block meanwhile: each copy is whatever it is then.
            let copies = (0..blocks).flat_map(|_| piece(block, 0, 1 << shift));
            pair.bounce.gather(chunk, copies);
        }
        let entry = work.medium.transfer(true, lba, blocks);
        let progress = self.submit_chunk(pair, work.head, entry, (chunk, bytes));
        if matches!(progress, Progress::Issued) {
            work.step = Step::Same {
                lba: lba + u64::from(blocks),
                left: left - blocks,
            };
        }
        progress
    }

    /// Through a bounce buffer, also where nothing is compared: the data is not for the guest.
    fn issue_verify<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let Step::Verify {
            lba,
            left,
            offset,
            against,
            fua,
        } = work.step
        else {
            return Progress::Failed;
        };
        if left == 0 {
            return Progress::Finished;
        }
        let Some(chunk) = pair.take_chunk() else {
            return Progress::Blocked;
        };
        let shift = work.medium.block_shift;
        let most = CHUNK_SIZE.min(pair.queue.max_transfer()) >> shift;
        let blocks = left.min(most).max(1);
        let bytes = blocks << shift;
        let segments = self.chain.readable();
        match against {
            Against::Nothing => {}
            Against::Data => {
                let data = piece(segments, offset, bytes);
                pair.bounce.expect(chunk, bytes, data, offset);
            }
            Against::Block => {
                let block = piece(segments, 0, 1 << shift);
                pair.bounce.expect(chunk, bytes, block, 0);
            }
        }
        let mut entry = work.medium.transfer(false, lba, blocks);
        if fua {
            entry = entry.force_unit_access();
        }
        let progress = self.submit_chunk(pair, work.head, entry, (chunk, bytes));
        if matches!(progress, Progress::Issued) {
            work.step = Step::Verify {
                lba: lba + u64::from(blocks),
                left: left - blocks,
                offset: offset + u64::from(bytes),
                against,
                fua,
            };
        }
        progress
    }

    /// Through bounce buffers: what they read is nobody's.
    fn issue_probe<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let Step::Probe { lba, left } = work.step else {
            return Progress::Failed;
        };
        // Those before one that has failed were sent before it.
        if left == 0 || self.front.is_explained(work.head) {
            return Progress::Finished;
        }
        let Some(chunk) = pair.take_chunk() else {
            return Progress::Blocked;
        };
        let entry = work.medium.transfer(false, lba, 1);
        let bytes = 1 << work.medium.block_shift;
        let progress = self.submit_chunk(pair, work.head, entry, (chunk, bytes));
        if matches!(progress, Progress::Issued) {
            work.step = Step::Probe {
                lba: lba + 1,
                left: left - 1,
            };
        }
        progress
    }

    /// A step was issued. The one that follows, if any, begins when all commands so far have ended, and ended well.
    fn next_step(&mut self, work: &mut Work) -> Progress {
        let request = &self.requests[usize::from(work.head.get())];
        let [next, last] = work.then;
        let next = next.filter(|_| request.failure.is_none());
        if next.is_none() && !self.front.keeps_others_waiting() {
            return Progress::Finished;
        }
        // One stands for the issuing itself.
        if request.pending > 1 {
            return Progress::Blocked;
        }
        let Some(next) = next else {
            return Progress::Finished;
        };
        work.step = next;
        work.then = [last, None];
        Progress::Next
    }

    /// Sends a command whose data is the first bytes of a bounce buffer. That goes back if it cannot be sent.
    fn submit_chunk<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        head: HeadIndex,
        entry: SubmissionEntry,
        (chunk, bytes): (ChunkId, u32),
    ) -> Progress {
        let data = std::iter::once(pair.bounce.data(chunk, bytes));
        match pair.queue.submit(entry, data, bytes) {
            Ok(cid) => {
                *pair.context(cid) = CommandContext::Part {
                    lane: self.slot,
                    head,
                    bounce: Some(chunk),
                };
                Progress::Issued
            }
            Err(error) => {
                pair.bounce.release(chunk);
                match error {
                    SubmitError::Full => Progress::Blocked,
                    SubmitError::Prp(_) => Progress::Failed,
                }
            }
        }
    }

    fn issue_flush<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let entry = SubmissionEntry::flush(work.medium.nsid);
        let Ok(cid) = pair.queue.submit_without_data(entry) else {
            return Progress::Blocked;
        };
        *pair.context(cid) = CommandContext::Part {
            lane: self.slot,
            head: work.head,
            bounce: None,
        };
        work.step = Step::Done;
        Progress::Issued
    }

    fn give_up_work(&mut self) {
        if let Some(work) = self.work {
            self.fail_request(work.head, Status::ABORTED_POWER_LOSS);
            self.end_work(work.head);
        }
    }

    /// There is no device: takes new requests from the ring and fails them, whatever they ask. `true` when anything was
    /// done.
    #[cold]
    fn fail_new(&mut self) -> bool {
        if !F::may_fetch(self) {
            return true;
        }
        if self.state != State::Running {
            return false;
        }
        match self.queue.available() {
            Ok(0) => return false,
            Ok(available) => F::fail(self, available.min(FETCH_BUDGET)),
            Err(error) => {
                self.break_ring(&error);
                return false;
            }
        }
        true
    }

    /// The next chain, for those that take each the long way.
    // With words of its own: a second caller of those that the hot path uses would cost each request.
    #[cold]
    fn pop_cold(&mut self) -> bool {
        match self.queue.pop(&self.config.memory, &mut self.chain) {
            Ok(there) => there,
            Err(error) => {
                self.break_ring(&error);
                false
            }
        }
    }

    fn command_done(&mut self, head: HeadIndex, failure: Option<Failure>) {
        if let Some(failure) = failure {
            self.fail_request(head, failure);
        }
        self.end_command(head);
    }

    #[cold]
    fn fail_request(&mut self, head: HeadIndex, failure: impl Into<Failure>) {
        let failure = failure.into();
        let request = &mut self.requests[usize::from(head.get())];
        let first = request.failure.is_none();
        let status = *request.failure.get_or_insert(failure.status);
        if status.is(failure.status) {
            self.front.explain(head, failure, first);
        }
    }

    fn end_command(&mut self, head: HeadIndex) {
        let request = &mut self.requests[usize::from(head.get())];
        request.pending -= 1;
        if request.pending > 0 {
            return;
        }
        if request.failure.is_some() && F::investigate(self, head) {
            return;
        }
        let request = &mut self.requests[usize::from(head.get())];
        let (data_in, failure) = (request.data_in, request.failure);
        if let Some(place) = request.place.take() {
            if failure.is_some_and(|status| F::is_error(&place, status)) {
                self.counters.errors += 1;
            }
            let written = self.front.finish(head, place, data_in, failure);
            self.answer(head, written);
        }
    }

    /// Everything but the plain end of a whole request: one place where that is inlined is enough.
    #[inline(never)]
    fn answer(&mut self, head: HeadIndex, written: u32) {
        self.queue.push_used(head, written);
    }

    #[inline(never)]
    fn signal(&mut self) {
        if self.config.call.signal() {
            self.counters.notifications += 1;
        }
    }

    #[cold]
    fn break_ring(&mut self, _error: &RingError) {
        if self.state == State::Running {
            self.set_state(State::Broken);
            self.counters.malformed += 1;
            self.config.error.signal();
        }
    }

    #[inline]
    fn publish_used(&mut self) {
        self.queue.publish_used();
    }

    #[inline]
    fn publish(&mut self) {
        self.queue.publish_used();
        self.decide();
        F::published(self);
    }

    /// [`Self::publish`] at the end of a turn. A signal may wait for the next one.
    #[inline]
    fn publish_turn(&mut self) {
        self.queue.publish_used();
        if self.may_hold {
            self.attention = Attention::Signal;
        } else {
            self.decide();
        }
        F::published(self);
    }

    /// Signals the guest if it wants that for anything since the last decision.
    #[inline]
    fn decide(&mut self) {
        if self.attention == Attention::Signal {
            self.attention = Attention::Ring;
        }
        if self.queue.needs_signal() {
            self.signal();
        }
    }

    #[cold]
    fn publish_timed(&mut self) -> (Instant, Option<Instant>) {
        self.queue.publish_used();
        let used = Instant::now();
        let before = self.counters.notifications;
        self.decide();
        let signalled = self.counters.notifications != before;
        F::published(self);
        (used, signalled.then(Instant::now))
    }

    fn stages(&self) -> &StageTimes {
        &self.config.shared.stages
    }
}

/// The `len` bytes of `segments` from `offset` on.
fn piece(segments: &[Segment], offset: u64, len: u32) -> impl Iterator<Item = Segment> {
    let mut skip = offset;
    let mut left = len;
    segments.iter().filter_map(move |segment| {
        if skip >= u64::from(segment.len()) {
            skip -= u64::from(segment.len());
            return None;
        }
        // `skip` is less than the segment's length, which has 32 bits.
        let rest = segment.suffix(u32::try_from(skip).unwrap_or(u32::MAX));
        skip = 0;
        let taken = rest.prefix(left);
        left -= taken.len();
        (taken.len() > 0).then_some(taken)
    })
}

#[inline]
fn as_data(segment: &Segment) -> DataSegment {
    DataSegment {
        iova: Iova(segment.dma()),
        len: segment.len(),
    }
}

/// Copies `bytes` into guest segments, as many as fit.
fn copy_out(bytes: &[u8], segments: &[Segment]) {
    let mut rest = bytes;
    for segment in segments {
        rest = &rest[segment.copy_from(rest)..];
    }
}
