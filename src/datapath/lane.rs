//! One guest virtqueue in service: its ring, its memory, its requests. A lane is made by the session, moves by value
//! to the [`Poller`](super::Poller) whose queue pair it rides with, and comes back by value when it has drained:
//! then no command names its memory any more (I2) and its session may unmap it.
//!
//! A request that one NVMe command carries out goes straight to the submission queue. Everything else (a transfer
//! beyond MDTS, data that PRPs cannot describe, several ranges) becomes `Work`: it is issued piece by piece as slots
//! and bounce buffers come free, and the lane fetches nothing new meanwhile, so that one request at a time is enough.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nvme_driver::MAX_ENTRIES;
use nvme_driver::spec::{Cid, LbaRange, MAX_BLOCKS, Nsid, SubmissionEntry, Transfer};
use nvme_driver::transport::{Armed, Iova, Transport};
use nvme_driver::{DataSegment, PrpError, QueuePair, SubmitError};

use super::bounce::{BouncePool, CHUNK_SIZE, ChunkId};
use super::signal::Signal;
use crate::block::{BlockOp, BlockRange, BlockStatus, RangeList};
use crate::stats::{QueueCounters, SharedCounters, StageTimes};
use crate::virtio::blk::{self, BlkLimits, BlkReject, BlkRequest, HEADER_BYTES};
use crate::virtio::chain::{Chain, Ends, Sole};
use crate::virtio::memory::{GuestMemory, MainRegion, Segment, StatusByte};
use crate::virtio::virtqueue::{HeadIndex, RingError, RingLayout, Virtqueue};

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

/// What a lane is made of.
#[derive(Debug)]
pub struct LaneConfig {
    /// Its name.
    pub id: LaneId,
    /// The ring, complete.
    pub queue: Virtqueue,
    /// The guest's memory; the lane keeps it mapped.
    pub memory: Arc<GuestMemory>,
    /// Negotiated limits of the disk.
    pub limits: BlkLimits,
    /// The namespace behind the disk.
    pub nsid: Nsid,
    /// What GET_ID answers: ASCII, zero padded.
    pub serial: [u8; 20],
    /// Every write is durable when it completes (no FLUSH negotiated, or writeback = 0).
    pub write_through: bool,
    /// Flush means something: the controller has a volatile write cache.
    pub volatile_cache: bool,
    /// Discards reach the device (Dataset Management is supported).
    pub deallocate: bool,
    /// The call eventfd.
    pub call: Arc<Signal>,
    /// The error eventfd.
    pub error: Arc<Signal>,
    /// The kick eventfd, for a reactor that sleeps. Without it the ring can only be looked at.
    pub kick: Option<OwnedFd>,
    /// Where others read this virtqueue's counters.
    pub shared: Arc<SharedCounters>,
}

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
    /// The work at hand.
    Work,
    /// Completions alone.
    Nothing,
}

/// A request between pop and used ring, at its head's place.
#[derive(Clone, Copy, Debug)]
struct Request {
    /// Where the answer goes; `None` while nothing is in flight here.
    status: Option<StatusByte>,
    /// Bytes of data that the guest gets on success.
    data_in: u32,
    /// Commands outstanding, plus one while the request is still being issued.
    pending: u32,
    failed: bool,
}

/// A request that takes several commands, and how far it has come.
#[derive(Clone, Copy, Debug)]
struct Work {
    head: HeadIndex,
    step: Step,
}

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
    Flush,
}

/// What became of a request.
enum Started {
    /// A command, by the short way.
    Short,
    /// Commands, or an answer, by the long way.
    Otherwise,
    /// [`Work`].
    Work,
}

enum Progress {
    Issued,
    /// No slot or no bounce buffer: go on after a completion.
    Blocked,
    Finished,
    Failed,
}

/// What a command belongs to, by CID: the lane's place in the poller, the request's head, and how much of the request
/// the command is. 16 bytes.
#[derive(Clone, Copy, Debug)]
pub(super) enum CommandContext {
    /// All of it: where the answer goes, and the bytes of data that the guest gets on success.
    Whole {
        lane: u16,
        head: HeadIndex,
        data_in: u32,
        status: StatusByte,
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
}

impl<T: Transport> Pair<T> {
    /// What an outstanding command belongs to.
    #[inline(always)]
    pub(super) fn context(&mut self, cid: Cid) -> &mut CommandContext {
        // The modulo changes nothing (the driver's own identifiers) and spares a bounds check.
        let place = cid.index() % self.commands.len();
        &mut self.commands[place]
    }
}

/// One guest virtqueue in service.
#[derive(Debug)]
pub struct Lane {
    queue: Virtqueue,
    chain: Chain,
    requests: Box<[Request]>,
    work: Option<Work>,
    state: State,
    attention: Attention,
    /// The device has come back without its cache: the next flush cannot keep its promise.
    cache_lost: bool,
    /// Its place in the poller.
    slot: u16,
    block_shift: u32,
    counters: QueueCounters,
    ranges: RangeList,
    config: LaneParts,
}

/// The parts of [`LaneConfig`] that stay as they are.
#[derive(Debug)]
struct LaneParts {
    id: LaneId,
    memory: Arc<GuestMemory>,
    /// Of that memory.
    main: MainRegion<HEADER_BYTES>,
    limits: BlkLimits,
    nsid: Nsid,
    /// Of a read and of a write.
    transfers: [Transfer; 2],
    serial: [u8; 20],
    write_through: bool,
    volatile_cache: bool,
    deallocate: bool,
    call: Arc<Signal>,
    error: Arc<Signal>,
    kick: Option<OwnedFd>,
    shared: Arc<SharedCounters>,
}

// SAFETY: the pointers in a lane lead to guest memory that its `Arc<GuestMemory>` keeps mapped; one thread at a time
// owns the lane (I7), and what the guest does to those bytes meanwhile is data, never a reference (I1).
unsafe impl Send for Lane {}

impl Lane {
    /// A lane that has fetched nothing yet. Allocates all that it will ever need.
    #[must_use]
    pub fn new(config: LaneConfig) -> Lane {
        let size = config.queue.size();
        let idle = Request {
            status: None,
            data_in: 0,
            pending: 0,
            failed: false,
        };
        let mut queue = config.queue;
        // After a (re)start the guest may wait for an interrupt that its last server owed it: one spurious signal.
        queue.request_signal();
        queue.suppress_kicks();
        Lane {
            queue,
            chain: Chain::new(max_segments(size)),
            requests: vec![idle; usize::from(size)].into_boxed_slice(),
            work: None,
            state: State::Running,
            attention: Attention::Ring,
            cache_lost: false,
            slot: 0,
            block_shift: config.limits.geometry.block_shift(),
            counters: config.shared.snapshot(),
            ranges: RangeList::new(),
            config: LaneParts {
                id: config.id,
                main: config.memory.main(),
                memory: config.memory,
                limits: config.limits,
                nsid: config.nsid,
                transfers: [
                    Transfer::read(config.nsid),
                    Transfer::write(config.nsid, config.write_through),
                ],
                serial: config.serial,
                write_through: config.write_through,
                volatile_cache: config.volatile_cache,
                deallocate: config.deallocate,
                call: config.call,
                error: config.error,
                kick: config.kick,
                shared: config.shared,
            },
        }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> LaneId {
        self.config.id
    }

    /// Where the ring stands, for GET_VRING_BASE.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.queue.base()
    }

    pub(super) fn set_slot(&mut self, slot: u16) {
        self.slot = slot;
    }

    pub(super) fn drain(&mut self) {
        self.set_state(State::Draining);
    }

    pub(super) fn is_draining(&self) -> bool {
        self.state == State::Draining
    }

    /// Writes that were completed and not flushed may be gone. Of a guest that gets write-through, none are.
    pub(super) fn cache_was_lost(&mut self) {
        self.cache_lost = self.config.volatile_cache && !self.config.write_through;
    }

    /// A flush that was at the device when its cache was lost: what it was to keep may be gone.
    pub(super) fn doubt_flush(&mut self, head: HeadIndex) {
        if self.cache_lost {
            self.fail_request(head);
        }
    }

    pub(super) fn is_drained(&self) -> bool {
        self.state == State::Draining && self.queue.in_flight() == 0 && self.work.is_none()
    }

    /// The kick eventfd. Nobody reads it: it is watched edge-triggered.
    #[must_use]
    pub fn kick(&self) -> Option<BorrowedFd<'_>> {
        self.config.kick.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn replace_kick(&mut self, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        std::mem::replace(&mut self.config.kick, kick)
    }

    /// The poller wants to sleep: asks the guest for a kick. What is it that nothing would tell of?
    pub(super) fn arm(&mut self) -> Armed {
        // Work that is being issued waits for completions, and so does a lane that fetches nothing.
        if self.state != State::Running || self.work.is_some() {
            return Armed::Yes;
        }
        match self.queue.request_kicks() {
            Ok(true) => Armed::Pending,
            Ok(false) if self.config.kick.is_none() => Armed::Never,
            Ok(false) => Armed::Yes,
            Err(error) => {
                self.break_ring(&error);
                Armed::Yes
            }
        }
    }

    /// The poller is awake.
    pub(super) fn disarm(&mut self) {
        self.queue.suppress_kicks();
    }

    pub(super) fn counters_mut(&mut self) -> &mut QueueCounters {
        &mut self.counters
    }

    pub(super) fn publish_counters(&self) {
        self.config.shared.publish(&self.counters);
    }

    /// Is there anything to do that does not wait for the device? At a glance: [`Lane::fetch`] knows better.
    #[inline(always)]
    pub(super) fn wants(&self) -> bool {
        if self.attention == Attention::Ring {
            return self.queue.has_request();
        }
        self.wants_work()
    }

    #[cold]
    fn wants_work(&self) -> bool {
        self.attention == Attention::Work
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
    }

    /// Takes new requests from the ring and submits their commands; no doorbell. `true` when anything was done.
    #[inline(always)]
    pub(super) fn fetch<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        if self.attention != Attention::Ring {
            return self.fetch_work(pair);
        }
        // The one look of a turn at the ring.
        let available = match self.queue.available() {
            Ok(0) => return false,
            Ok(available) => available.min(FETCH_BUDGET),
            Err(error) => {
                self.break_ring(&error);
                return true;
            }
        };
        let most = available.min(pair.queue.room());
        match self.queue.layout() {
            RingLayout::Split => self.fetch_from::<T, false>(pair, most),
            RingLayout::Packed => self.fetch_from::<T, true>(pair, most),
        }
        true
    }

    /// Takes up to `most` requests from a ring that is `PACKED` or not. Compiled for each by itself: together they would
    /// share registers and have too few.
    #[inline(never)]
    fn fetch_from<T: Transport, const PACKED: bool>(&mut self, pair: &mut Pair<T>, most: u16) {
        let commands = self.counters.commands;
        let mut short = 0_u64;
        // A request that takes more than one command becomes work, which ends the round.
        for _ in 0..most {
            if let Some(sole) = self.queue.pop_sole::<_, PACKED>(&self.config.main) {
                match self.start_sole(pair, sole) {
                    Started::Short => short = short.wrapping_add(1),
                    Started::Otherwise => {}
                    Started::Work => break,
                }
            } else if !self.start_next(pair) {
                break;
            }
        }
        self.counters.commands = self.counters.commands.wrapping_add(short);
        self.count_doorbell(commands);
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

    /// The next request, which is not one that [`Lane::start_sole`] knows. `false` when there is none, or it became work.
    #[inline(never)]
    fn start_next<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        match self.queue.pop(&self.config.memory, &mut self.chain) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                self.break_ring(&error);
                return false;
            }
        }
        let ends = self.chain.take_ends();
        self.start(pair, ends);
        self.work.is_none()
    }

    /// The request that was just taken, if it is a read or write that one command carries out; that command is for the
    /// caller to count.
    #[inline(always)]
    fn start_sole<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        sole: Sole<HEADER_BYTES>,
    ) -> Started {
        let Some((write, range)) = blk::parse_sole(&sole, &self.config.limits) else {
            return self.start_held(pair, sole);
        };
        let transfer = self.config.transfers[usize::from(write)];
        let range = LbaRange {
            slba: range.lba.get(),
            blocks: range.count.get(),
        };
        let (len, data) = (sole.len, sole_data(&sole));
        // One command moves no more bytes than `max_transfer`, and so no more blocks than it can name.
        let Ok(cid) = pair.queue.submit_short(transfer, range, data) else {
            return self.start_held(pair, sole);
        };
        *pair.context(cid) = CommandContext::Whole {
            lane: self.slot,
            head: sole.head,
            data_in: if write { 0 } else { len },
            status: sole.status,
        };
        self.count_transfer(write, len);
        Started::Short
    }

    /// What [`Lane::start_sole`] leaves to [`Lane::start`].
    #[cold]
    fn start_held<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        sole: Sole<HEADER_BYTES>,
    ) -> Started {
        let ends = self.chain.hold(&sole, &self.config.main);
        self.start(pair, ends);
        match self.work {
            Some(_) => Started::Work,
            None => Started::Otherwise,
        }
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

    /// The chain that was just popped becomes a request.
    #[inline(never)]
    fn start<T: Transport>(&mut self, pair: &mut Pair<T>, ends: Ends<HEADER_BYTES>) {
        let head = self.chain.head();
        let (chain, ranges) = (&mut self.chain, &mut self.ranges);
        let parsed = blk::parse_taken(ends, chain, ranges, &self.config.limits);
        let request = match parsed {
            Ok(request) => request,
            Err(reject) => return self.reject(head, reject),
        };
        let (write, range) = match request.op {
            BlockOp::Read(range) => (false, range),
            BlockOp::Write(range) => (true, range),
            _ => return self.start_other(pair, head, request),
        };
        self.count_transfer(write, request.data_len);
        let whole = request.data_len <= pair.queue.max_transfer();
        if whole {
            let entry = self.transfer_entry(write, range.lba.get(), range.count.get());
            let segments = if write {
                self.chain.readable()
            } else {
                self.chain.writable()
            };
            match pair
                .queue
                .submit(entry, segments.iter().map(as_data), request.data_len)
            {
                Ok(cid) => {
                    *pair.context(cid) = CommandContext::Whole {
                        lane: self.slot,
                        head,
                        data_in: request.data_in,
                        status: request.status,
                    };
                    self.counters.commands = self.counters.commands.wrapping_add(1);
                    return;
                }
                Err(
                    SubmitError::Full | SubmitError::Prp(PrpError::Unaligned | PrpError::TooLong),
                ) => {}
                // Cannot be: the parser took the length from the segments. Work fails for the same reason.
                Err(SubmitError::Prp(PrpError::LengthMismatch)) => {}
            }
        }
        if !whole {
            self.counters.split += 1;
        }
        self.remember(head, &request);
        let step = Step::Transfer {
            write,
            lba: range.lba.get(),
            left: range.count.get(),
            offset: 0,
        };
        self.begin_work(pair, head, step);
    }

    #[inline]
    fn transfer_entry(&self, write: bool, slba: u64, blocks: u32) -> SubmissionEntry {
        let range = LbaRange { slba, blocks };
        if write {
            SubmissionEntry::write(self.config.nsid, range, self.config.write_through)
        } else {
            SubmissionEntry::read(self.config.nsid, range)
        }
    }

    /// Everything that is neither a read nor a write.
    #[cold]
    fn start_other<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        head: HeadIndex,
        request: BlkRequest,
    ) {
        self.remember(head, &request);
        let step = match request.op {
            BlockOp::Flush => {
                self.counters.flushes += 1;
                if std::mem::take(&mut self.cache_lost) {
                    self.fail_request(head);
                }
                self.config.volatile_cache.then_some(Step::Flush)
            }
            BlockOp::Discard => {
                self.counters.discards += 1;
                // Advisory: without Dataset Management there is nothing to tell the device.
                (self.config.deallocate && !self.ranges.as_slice().is_empty())
                    .then_some(Step::Discard { range: 0 })
            }
            BlockOp::WriteZeroes => {
                self.counters.write_zeroes += 1;
                (!self.ranges.as_slice().is_empty())
                    .then_some(Step::WriteZeroes { range: 0, done: 0 })
            }
            BlockOp::DeviceId => {
                self.counters.get_ids += 1;
                copy_out(&self.config.serial, self.chain.writable());
                None
            }
            // Reads and writes do not come here.
            BlockOp::Read(_) | BlockOp::Write(_) => None,
        };
        match step {
            Some(step) => self.begin_work(pair, head, step),
            None => self.end_command(head),
        }
    }

    /// A request that may take several commands. One is counted for the issuing itself.
    fn remember(&mut self, head: HeadIndex, request: &BlkRequest) {
        self.requests[usize::from(head.get())] = Request {
            status: Some(request.status),
            data_in: request.data_in,
            pending: 1,
            failed: false,
        };
    }

    fn begin_work<T: Transport>(&mut self, pair: &mut Pair<T>, head: HeadIndex, step: Step) {
        self.set_work(Some(Work { head, step }));
        self.continue_work(pair);
    }

    /// Issues as much of the current work as there is room for. `true` when none is left.
    #[cold]
    fn continue_work<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        let Some(mut work) = self.work else {
            return true;
        };
        // Each round issues a command, so the free slots bound the loop.
        loop {
            let progress = match work.step {
                Step::Transfer { .. } => self.issue_transfer(pair, &mut work),
                Step::WriteZeroes { .. } => self.issue_write_zeroes(pair, &mut work),
                Step::Discard { .. } => self.issue_discard(pair, &mut work),
                Step::Flush => self.issue_flush(pair, &mut work),
            };
            match progress {
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
                    self.fail_request(work.head);
                    break;
                }
            }
        }
        self.set_work(None);
        // Drops the count that stood for the issuing itself.
        self.end_command(work.head);
        true
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
        let shift = self.block_shift;
        let segments = if write {
            self.chain.readable()
        } else {
            self.chain.writable()
        };
        let most = (pair.queue.max_transfer() >> shift).clamp(1, MAX_BLOCKS);
        let blocks = left.min(most);
        let bytes = blocks << shift;
        let direct = piece(segments, offset, bytes);
        let entry = self.transfer_entry(write, lba, blocks);
        let (cid, blocks, bounce) =
            match pair
                .queue
                .submit(entry, direct.map(|segment| as_data(&segment)), bytes)
            {
                Ok(cid) => (cid, blocks, None),
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
                    let entry = self.transfer_entry(write, lba, blocks);
                    let data = std::iter::once(pair.bounce.data(chunk, bytes));
                    self.counters.bounced += 1;
                    match pair.queue.submit(entry, data, bytes) {
                        Ok(cid) => (cid, blocks, Some(chunk)),
                        Err(error) => {
                            pair.bounce.release(chunk);
                            let full = error == SubmitError::Full;
                            return if full {
                                Progress::Blocked
                            } else {
                                Progress::Failed
                            };
                        }
                    }
                }
            };
        *pair.context(cid) = CommandContext::Part {
            lane: self.slot,
            head: work.head,
            bounce,
        };
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
        let entry =
            SubmissionEntry::write_zeroes(self.config.nsid, at, unmap, self.config.write_through);
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
            .submit_deallocate(self.config.nsid, ranges.iter().map(as_wire))
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

    fn issue_flush<T: Transport>(&mut self, pair: &mut Pair<T>, work: &mut Work) -> Progress {
        let entry = SubmissionEntry::flush(self.config.nsid);
        let Ok(cid) = pair.queue.submit_without_data(entry) else {
            return Progress::Blocked;
        };
        *pair.context(cid) = CommandContext::Part {
            lane: self.slot,
            head: work.head,
            bounce: None,
        };
        // No ranges follow: the next look finds this work finished.
        work.step = Step::Transfer {
            write: false,
            lba: 0,
            left: 0,
            offset: 0,
        };
        Progress::Issued
    }

    /// There is no device: what was not sent yet never will be.
    pub(super) fn give_up_work(&mut self) {
        if let Some(work) = self.work {
            self.set_work(None);
            self.fail_request(work.head);
            self.end_command(work.head);
        }
    }

    /// There is no device: takes new requests from the ring and fails them, whatever they ask. `true` when there were
    /// any.
    // With words of its own: a second caller of those that the hot path uses would cost each request.
    #[cold]
    pub(super) fn fail_new(&mut self) -> bool {
        if self.state != State::Running {
            return false;
        }
        let available = match self.queue.available() {
            Ok(0) => return false,
            Ok(available) => available.min(FETCH_BUDGET),
            Err(error) => {
                self.break_ring(&error);
                return false;
            }
        };
        for _ in 0..available {
            match self.queue.pop(&self.config.memory, &mut self.chain) {
                Ok(true) => {}
                Ok(false) => break,
                Err(error) => {
                    self.break_ring(&error);
                    break;
                }
            }
            self.counters.errors += 1;
            let status = self.chain.take_status();
            let reads = !self.chain.writable().is_empty();
            let written = status.map_or(0, |status| {
                blk::finish(status, BlockStatus::IoError, reads.into())
            });
            self.answer(self.chain.head(), written);
        }
        true
    }

    /// The command that was all of the request at `head` has completed.
    #[inline(always)]
    pub(super) fn request_done(
        &mut self,
        head: HeadIndex,
        status: StatusByte,
        data_in: u32,
        success: bool,
    ) {
        let answer = if success {
            BlockStatus::Ok
        } else {
            self.counters.errors += 1;
            BlockStatus::IoError
        };
        self.queue
            .push_used(head, blk::finish(status, answer, data_in));
    }

    /// A command of the request at `head` has completed.
    pub(super) fn command_done(&mut self, head: HeadIndex, success: bool) {
        if !success {
            self.fail_request(head);
        }
        self.end_command(head);
    }

    #[cold]
    fn fail_request(&mut self, head: HeadIndex) {
        self.requests[usize::from(head.get())].failed = true;
    }

    fn end_command(&mut self, head: HeadIndex) {
        let request = &mut self.requests[usize::from(head.get())];
        request.pending -= 1;
        if request.pending > 0 {
            return;
        }
        let status = if request.failed {
            BlockStatus::IoError
        } else {
            BlockStatus::Ok
        };
        if let Some(place) = request.status.take() {
            let written = blk::finish(place, status, request.data_in);
            self.answer(head, written);
        }
        if status != BlockStatus::Ok {
            self.counters.errors += 1;
        }
    }

    /// A request that never becomes a command.
    #[cold]
    fn reject(&mut self, head: HeadIndex, reject: BlkReject) {
        let malformed = self.chain.fault().is_some() || reject.location.is_none();
        match reject.status {
            _ if malformed => self.counters.malformed += 1,
            BlockStatus::Unsupported => self.counters.unsupported += 1,
            BlockStatus::Ok | BlockStatus::IoError => self.counters.errors += 1,
        }
        self.answer(head, reject.finish());
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

    /// Makes finished requests visible to the guest. [`Lane::publish`] tells it.
    #[inline]
    pub(super) fn publish_used(&mut self) {
        self.queue.publish_used();
    }

    /// Makes finished requests visible to the guest, and tells it once if it wants to know.
    #[inline]
    pub(super) fn publish(&mut self) {
        self.queue.publish_used();
        if self.queue.needs_signal() {
            self.signal();
        }
    }

    /// [`Self::publish`], and when it did what: when the guest could see it, and when it had its signal if it wanted one.
    #[cold]
    pub(super) fn publish_timed(&mut self) -> (Instant, Option<Instant>) {
        self.queue.publish_used();
        let used = Instant::now();
        if !self.queue.needs_signal() {
            return (used, None);
        }
        self.signal();
        (used, Some(Instant::now()))
    }

    pub(super) fn stages(&self) -> &StageTimes {
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

#[inline(always)]
fn sole_data(sole: &Sole<HEADER_BYTES>) -> DataSegment {
    DataSegment {
        iova: Iova(sole.dma),
        len: sole.len,
    }
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
