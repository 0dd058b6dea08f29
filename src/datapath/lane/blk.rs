//! The lane of a block device. A request that one NVMe command carries out goes straight to the submission queue; the rest
//! becomes [`Work`](super::Work).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nvme_driver::spec::{LbaRange, Nsid, Status, Transfer};
use nvme_driver::transport::{Iova, Transport};
use nvme_driver::{DataSegment, PrpError, SubmitError};

use super::{
    CommandContext, Front, LaneId, LaneParts, Medium, NOTHING_MORE, Pair, RequestLane, Step,
    as_data, copy_out,
};
use crate::block::{BlockOp, BlockStatus};
use crate::datapath::signal::Signal;
use crate::stats::SharedCounters;
use crate::virtio::blk::{self, BlkLimits, BlkReject, BlkRequest, HEADER_BYTES};
use crate::virtio::chain::{Ends, Sole};
use crate::virtio::memory::{GuestMemory, MainRegion, StatusByte};
use crate::virtio::virtqueue::{HeadIndex, RingLayout, Virtqueue};

/// What a lane of a block device is made of.
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

/// The requests of a block device.
#[derive(Debug)]
pub(in crate::datapath) struct Blk {
    /// Of the guest's memory.
    main: MainRegion<HEADER_BYTES>,
    limits: BlkLimits,
    medium: Medium,
    /// Of a read and of a write.
    transfers: [Transfer; 2],
    serial: [u8; 20],
    /// The device has come back without its cache: the next flush cannot keep its promise.
    cache_lost: bool,
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

impl Front for Blk {
    type Place = StatusByte;

    #[inline(always)]
    fn fetch<T: Transport>(lane: &mut RequestLane<Blk>, pair: &mut Pair<T>, most: u16) {
        match lane.queue.layout() {
            RingLayout::Split => lane.fetch_from::<T, false>(pair, most),
            RingLayout::Packed => lane.fetch_from::<T, true>(pair, most),
        }
    }

    fn fail(lane: &mut RequestLane<Blk>, most: u16) {
        for _ in 0..most {
            if !lane.pop_cold() {
                break;
            }
            lane.counters.errors += 1;
            let status = lane.chain.take_status();
            let reads = !lane.chain.writable().is_empty();
            let written = status.map_or(0, |status| {
                blk::finish(status, BlockStatus::IoError, reads.into())
            });
            lane.answer(lane.chain.head(), written);
        }
    }

    fn finish(
        &mut self,
        _head: HeadIndex,
        place: StatusByte,
        data_in: u32,
        failure: Option<Status>,
    ) -> u32 {
        let status = match failure {
            Some(_) => BlockStatus::IoError,
            None => BlockStatus::Ok,
        };
        blk::finish(place, status, data_in)
    }

    /// Of a guest that gets write-through, nothing is lost.
    fn lose_cache(&mut self) {
        self.cache_lost = !self.medium.durable;
    }

    fn doubts_flushes(&self) -> bool {
        self.cache_lost
    }
}

impl RequestLane<Blk> {
    pub(super) fn new(config: LaneConfig) -> RequestLane<Blk> {
        let (nsid, durable) = (config.nsid, config.write_through);
        let front = Blk {
            main: config.memory.main(),
            limits: config.limits,
            medium: Medium {
                nsid,
                block_shift: config.limits.geometry.block_shift(),
                durable,
            },
            transfers: [Transfer::read(nsid), Transfer::write(nsid, durable)],
            serial: config.serial,
            cache_lost: false,
        };
        let parts = LaneParts {
            id: config.id,
            memory: config.memory,
            volatile_cache: config.volatile_cache,
            deallocate: config.deallocate,
            call: config.call,
            error: config.error,
            kick: config.kick,
            shared: config.shared,
        };
        RequestLane::with_front(config.queue, parts, front)
    }

    /// The disk has so many blocks, from the next request on. Blocks are as long as they were.
    pub(super) fn resize(&mut self, blocks: u64) {
        let own = &mut self.front.limits.geometry;
        // Whoever resizes a disk knows that it is one.
        if let Some(resized) = own.with_blocks(blocks) {
            *own = resized;
        }
    }

    /// Takes up to `most` requests from a ring that is `PACKED` or not. Compiled for each by itself: together they would
    /// share registers and have too few.
    #[inline(never)]
    fn fetch_from<T: Transport, const PACKED: bool>(&mut self, pair: &mut Pair<T>, most: u16) {
        let commands = self.counters.commands;
        let mut short = 0_u64;
        // A request that takes more than one command becomes work, which ends the round.
        for _ in 0..most {
            if let Some(sole) = self.queue.pop_sole::<_, PACKED>(&self.front.main) {
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

    /// The next request, which is not one that [`RequestLane::start_sole`] knows. `false` when there is none, or it became work.
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
        let Some((write, range)) = blk::parse_sole(&sole, &self.front.limits) else {
            return self.start_held(pair, sole);
        };
        let transfer = self.front.transfers[usize::from(write)];
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
            answer: sole.status,
        };
        self.count_transfer(write, len);
        Started::Short
    }

    /// What [`RequestLane::start_sole`] leaves to [`RequestLane::start`].
    #[cold]
    fn start_held<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        sole: Sole<HEADER_BYTES>,
    ) -> Started {
        let ends = self.chain.hold(&sole, &self.front.main);
        self.start(pair, ends);
        match self.work {
            Some(_) => Started::Work,
            None => Started::Otherwise,
        }
    }

    /// The chain that was just popped becomes a request.
    #[inline(never)]
    fn start<T: Transport>(&mut self, pair: &mut Pair<T>, ends: Ends<HEADER_BYTES>) {
        let head = self.chain.head();
        let (chain, ranges) = (&mut self.chain, &mut self.ranges);
        let parsed = blk::parse_taken(ends, chain, ranges, &self.front.limits);
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
            let entry = self
                .front
                .medium
                .transfer(write, range.lba.get(), range.count.get());
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
                        answer: request.status,
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
        self.remember(head, request.status, request.data_in);
        let step = Step::Transfer {
            write,
            lba: range.lba.get(),
            left: range.count.get(),
            offset: 0,
        };
        self.begin_work(pair, head, self.front.medium, (step, NOTHING_MORE));
    }

    /// Everything that is neither a read nor a write.
    #[cold]
    fn start_other<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        head: HeadIndex,
        request: BlkRequest,
    ) {
        self.remember(head, request.status, request.data_in);
        let step = match request.op {
            BlockOp::Flush => {
                self.counters.flushes += 1;
                if std::mem::take(&mut self.front.cache_lost) {
                    self.fail_request(head, Status::INTERNAL_ERROR);
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
                copy_out(&self.front.serial, self.chain.writable());
                None
            }
            // Reads and writes do not come here, and the parser makes no other of them.
            BlockOp::Read(_)
            | BlockOp::Write(_)
            | BlockOp::WriteSame(_)
            | BlockOp::Verify { .. }
            | BlockOp::WriteAndVerify { .. }
            | BlockOp::CompareAndWrite(_)
            | BlockOp::Copy { .. }
            | BlockOp::DrainAndFlush => None,
        };
        match step {
            Some(step) => self.begin_work(pair, head, self.front.medium, (step, NOTHING_MORE)),
            None => self.end_command(head),
        }
    }

    /// The command that was all of the request at `head` has completed, and well.
    #[inline(always)]
    pub(in crate::datapath) fn request_done(
        &mut self,
        head: HeadIndex,
        status: StatusByte,
        data_in: u32,
    ) {
        self.queue
            .push_used(head, blk::finish(status, BlockStatus::Ok, data_in));
    }

    /// It has failed.
    #[cold]
    pub(in crate::datapath) fn request_failed(
        &mut self,
        head: HeadIndex,
        status: StatusByte,
        data_in: u32,
    ) {
        self.counters.errors += 1;
        self.answer(head, blk::finish(status, BlockStatus::IoError, data_in));
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
}

#[inline(always)]
fn sole_data(sole: &Sole<HEADER_BYTES>) -> DataSegment {
    DataSegment {
        iova: Iova(sole.dma),
        len: sole.len,
    }
}
