//! One queue pair on the controller's side: fetches submission entries, carries them out or hands them on, posts
//! completion entries. Serviced inline by the core that polls the driver's side; nothing on that way allocates, sleeps
//! or makes a system call.
//!
//! Its ring arithmetic is its own: sharing the driver's would hide a mistake in it. Start at [`DeviceQueue::service`].

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use nvme_driver::spec::{CompletionEntry, Status, SubmissionEntry, io_opcode};
use nvme_driver::transport::{Armed, Bell};

use crate::admin;
use crate::io::{self, Inline};
use crate::iommu::{Direction, Dma, DmaTable};
use crate::shared::{Shared, spin};
use crate::worker::{Done, Job};

/// A doorbell that was not written since its queue was created.
const NOT_RUNG: u32 = u32::MAX;
/// Commands that one service round fetches at most (I8). The driver's own limits are lower.
const FETCH_BOUND: u32 = 4096;

/// One queue identifier: its doorbells and, while it exists, its queues.
#[derive(Debug)]
pub(crate) struct Slot {
    pub(crate) id: u16,
    sq_tail: AtomicU32,
    cq_head: AtomicU32,
    queue: Mutex<DeviceQueue>,
}

impl Slot {
    pub(crate) fn new(id: u16, seed: u64) -> Slot {
        Slot {
            id,
            sq_tail: AtomicU32::new(NOT_RUNG),
            cq_head: AtomicU32::new(NOT_RUNG),
            queue: Mutex::new(DeviceQueue::new(seed ^ u64::from(id) << 48)),
        }
    }

    /// Control threads only.
    pub(crate) fn lock(&self) -> MutexGuard<'_, DeviceQueue> {
        spin(&self.queue)
    }

    #[inline]
    pub(crate) fn ring_sq(&self, tail: u16) {
        // Release pairs with the Acquire in `fetch`: submission entries are visible before their doorbell.
        self.sq_tail.store(u32::from(tail), Ordering::Release);
    }

    #[inline]
    pub(crate) fn ring_cq(&self, head: u16) {
        // Release pairs with the Acquire in `post`: the driver has read an entry before we write over it.
        self.cq_head.store(u32::from(head), Ordering::Release);
    }

    pub(crate) fn unring(&self) {
        self.sq_tail.store(NOT_RUNG, Ordering::Relaxed);
        self.cq_head.store(NOT_RUNG, Ordering::Relaxed);
    }

    /// What a poller that wants to sleep has to wait for.
    pub(crate) fn waits_for(&self, shared: &Shared) -> Armed {
        match self.queue.try_lock() {
            Ok(queue) => queue.waits_for(self, shared),
            // A control thread is changing the queue.
            Err(_) => Armed::Pending,
        }
    }

    /// One service round, unless a control thread is changing the queue at this moment.
    // Not inlined: a profile shows under this name what the controller costs, apart from its driver.
    #[inline(never)]
    pub(crate) fn service(&self, shared: &Shared) {
        match self.queue.try_lock() {
            Ok(mut queue) => queue.service(self, shared),
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner().service(self, shared),
            Err(TryLockError::WouldBlock) => {}
        }
    }
}

/// A ring in the driver's memory.
#[derive(Clone, Copy, Debug)]
struct Ring {
    iova: u64,
    entries: u32,
    /// Where it is, while one window holds all of it.
    hva: Option<NonNull<u8>>,
}

/// A command that completes later. Ordered by time; commands of one time in their order of arrival.
#[derive(Debug)]
struct Delayed {
    due: Duration,
    order: u64,
    entry: SubmissionEntry,
}

impl PartialEq for Delayed {
    fn eq(&self, other: &Self) -> bool {
        self.order == other.order
    }
}

impl Eq for Delayed {}

impl PartialOrd for Delayed {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Delayed {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.due, self.order).cmp(&(other.due, other.order))
    }
}

/// What a controller's I/O queues carried out. Commands that workers carry out count when they are handed over.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IoCounters {
    /// Read commands.
    pub reads: u64,
    /// Write commands.
    pub writes: u64,
    /// Those of them that asked for Force Unit Access.
    pub fua_writes: u64,
    /// 512-byte units that reads returned.
    pub units_read: u64,
    /// 512-byte units that were written.
    pub units_written: u64,
    /// Flush commands.
    pub flushes: u64,
    /// Write Zeroes commands.
    pub write_zeroes: u64,
    /// Dataset Management commands.
    pub deallocates: u64,
    /// Ranges in them.
    pub deallocated_ranges: u64,
    /// Compare commands.
    pub compares: u64,
    /// 512-byte units that they read.
    pub units_compared: u64,
    /// Copy commands.
    pub copies: u64,
    /// Commands that were ended by an Abort.
    pub aborted: u64,
    /// Commands that ended with an error.
    pub errors: u64,
}

impl IoCounters {
    pub(crate) fn add(&mut self, other: &IoCounters) {
        self.reads += other.reads;
        self.writes += other.writes;
        self.fua_writes += other.fua_writes;
        self.units_read += other.units_read;
        self.units_written += other.units_written;
        self.flushes += other.flushes;
        self.write_zeroes += other.write_zeroes;
        self.deallocates += other.deallocates;
        self.deallocated_ranges += other.deallocated_ranges;
        self.compares += other.compares;
        self.units_compared += other.units_compared;
        self.copies += other.copies;
        self.aborted += other.aborted;
        self.errors += other.errors;
    }
}

/// The queues behind one identifier.
#[derive(Debug)]
pub(crate) struct DeviceQueue {
    table: Arc<DmaTable>,
    hint: usize,
    sq: Option<Ring>,
    cq: Option<Ring>,
    /// The next submission entry to fetch.
    sq_head: u32,
    /// The next completion entry to fill.
    cq_tail: u32,
    phase: bool,
    /// Commands fetched and not yet posted as completed; a bit by CID in `cids`.
    outstanding: u32,
    cids: Box<[u64]>,
    /// Completed, not posted yet.
    ready: VecDeque<(u16, Status, u32)>,
    delayed: BinaryHeap<Reverse<Delayed>>,
    /// A command that found no room on its way to the workers.
    stalled: Option<SubmissionEntry>,
    /// Commands at the workers.
    handed: u32,
    done: Arc<ArrayQueue<Done>>,
    /// Wakes the poller.
    bell: Option<Arc<Bell>>,
    turns: u64,
    arrivals: u64,
    rng: u64,
    counters: IoCounters,
}

// SAFETY: the ring pointers name driver memory that stays mapped until it is unmapped from the table, which replaces
// them first (`set_table`).
unsafe impl Send for DeviceQueue {}

impl DeviceQueue {
    fn new(seed: u64) -> DeviceQueue {
        DeviceQueue {
            table: Arc::default(),
            hint: 0,
            sq: None,
            cq: None,
            sq_head: 0,
            cq_tail: 0,
            phase: true,
            outstanding: 0,
            cids: Box::default(),
            ready: VecDeque::new(),
            delayed: BinaryHeap::new(),
            stalled: None,
            handed: 0,
            done: Arc::new(ArrayQueue::new(1)),
            bell: None,
            turns: 0,
            arrivals: 0,
            rng: seed,
            counters: IoCounters::default(),
        }
    }

    /// Replaces the DMA table: from now on the old one is not used here.
    pub(crate) fn set_table(&mut self, table: Arc<DmaTable>) {
        self.table = table;
        self.locate_rings();
    }

    fn locate_rings(&mut self) {
        let table = &self.table;
        let locate = |ring: &mut Option<Ring>, size: usize, direction| {
            if let Some(ring) = ring {
                let bytes = ring.entries as usize * size;
                ring.hva = table.translate(ring.iova, bytes, direction, &mut 0);
            }
        };
        locate(&mut self.sq, size_of::<SubmissionEntry>(), Direction::Read);
        locate(&mut self.cq, size_of::<CompletionEntry>(), Direction::Write);
    }

    /// The one that wakes whoever polls this queue. `None` when there is no file descriptor left.
    pub(crate) fn bell(&mut self) -> Option<Arc<Bell>> {
        if self.bell.is_none() {
            self.bell = Bell::new().ok().map(Arc::new);
        }
        self.bell.clone()
    }

    /// The poller has asked to be woken: is there anything that it has to do itself?
    fn waits_for(&self, slot: &Slot, shared: &Shared) -> Armed {
        if self.sq.is_none() || shared.fatal.load(Ordering::Relaxed) {
            // Nothing happens here any more: whoever deals with that wakes the poller.
            return Armed::Yes;
        }
        let tail = slot.sq_tail.load(Ordering::Acquire);
        let limit = self.cq.map_or(0, |cq| cq.entries);
        let unfetched = tail != self.sq_head && tail != NOT_RUNG && self.outstanding < limit;
        if unfetched || !self.done.is_empty() || !self.ready.is_empty() || self.stalled.is_some() {
            return Armed::Pending;
        }
        if self.delayed.is_empty() || shared.config.by_itself {
            Armed::Yes
        } else {
            Armed::Never
        }
    }

    /// A round without the poller.
    pub(crate) fn carry_on(&mut self, slot: &Slot, shared: &Shared) {
        let before = self.cq_tail;
        self.service(slot, shared);
        if self.cq_tail != before
            && let Some(bell) = &self.bell
        {
            bell.ring();
        }
    }

    pub(crate) fn has_sq(&self) -> bool {
        self.sq.is_some()
    }

    pub(crate) fn has_cq(&self) -> bool {
        self.cq.is_some()
    }

    pub(crate) fn counters(&self) -> IoCounters {
        self.counters
    }

    /// The completion queue comes first; everything that servicing needs is allocated here.
    pub(crate) fn create_cq(&mut self, iova: u64, entries: u32) {
        let most = entries as usize;
        self.cq = Some(Ring {
            iova,
            entries,
            hva: None,
        });
        (self.cq_tail, self.phase) = (0, true);
        self.ready = VecDeque::with_capacity(most);
        self.delayed = BinaryHeap::with_capacity(most);
        self.done = Arc::new(ArrayQueue::new(most));
        self.cids = vec![0; 65536 / 64].into();
        self.outstanding = 0;
        self.locate_rings();
    }

    pub(crate) fn create_sq(&mut self, iova: u64, entries: u32) {
        self.sq = Some(Ring {
            iova,
            entries,
            hva: None,
        });
        self.sq_head = 0;
        self.locate_rings();
    }

    /// Ends every command: those at the workers are waited for, the others are aborted.
    pub(crate) fn delete_sq(&mut self, slot: &Slot, shared: &Shared) {
        self.wait_for_workers();
        let aborted = Status::ABORTED_SQ_DELETION;
        if let Some(entry) = self.stalled.take() {
            self.complete(entry.cid.get(), aborted, 0);
        }
        while let Some(Reverse(Delayed { entry, .. })) = self.delayed.pop() {
            self.complete(entry.cid.get(), aborted, 0);
        }
        self.post(slot, shared);
        self.sq = None;
    }

    pub(crate) fn delete_cq(&mut self) {
        self.cq = None;
        self.ready.clear();
    }

    /// Controller reset: both queues are gone, whatever was under way.
    pub(crate) fn reset(&mut self) {
        self.wait_for_workers();
        (self.sq, self.cq, self.stalled) = (None, None, None);
        self.delayed.clear();
        self.ready.clear();
        self.outstanding = 0;
    }

    /// The workers do not need this queue's lock, so this ends when they have.
    fn wait_for_workers(&mut self) {
        while self.handed > 0 {
            match self.done.pop() {
                Some(done) => {
                    self.handed -= 1;
                    self.complete(done.cid, done.status, 0);
                }
                None => std::thread::sleep(Duration::from_micros(50)),
            }
        }
    }

    /// Abort: `true` when the command was found waiting and has been ended.
    pub(crate) fn abort(&mut self, cid: u16) -> bool {
        let before = self.delayed.len();
        self.delayed
            .retain(|Reverse(delayed)| delayed.entry.cid.get() != cid);
        let found = self.delayed.len() < before;
        if found {
            self.counters.aborted += 1;
            self.complete(cid, Status::ABORT_REQUESTED, 0);
        }
        found
    }

    /// One round: takes over what workers finished, fetches new commands, ends those whose time has come, posts.
    #[inline]
    fn service(&mut self, slot: &Slot, shared: &Shared) {
        self.turns += 1;
        let Some(sq) = self.sq else {
            return self.check_idle_doorbells(slot, shared);
        };
        if shared.fatal.load(Ordering::Relaxed) {
            return;
        }
        while self.handed > 0
            && let Some(done) = self.done.pop()
        {
            self.handed -= 1;
            self.complete(done.cid, done.status, 0);
        }
        if let Some(entry) = self.stalled.take() {
            self.execute(shared, entry);
        }
        self.fetch(sq, slot, shared);
        if !self.delayed.is_empty() {
            self.execute_due(shared);
        }
        if slot.id == 0 {
            admin::deliver_events(self, shared);
        }
        if !self.ready.is_empty() {
            self.post(slot, shared);
        }
    }

    /// A doorbell of a queue that does not exist.
    fn check_idle_doorbells(&self, slot: &Slot, shared: &Shared) {
        if slot.sq_tail.swap(NOT_RUNG, Ordering::Relaxed) != NOT_RUNG {
            shared.driver_error("submission doorbell of a queue that does not exist");
        }
    }

    #[inline]
    fn fetch(&mut self, sq: Ring, slot: &Slot, shared: &Shared) {
        let tail = slot.sq_tail.load(Ordering::Acquire); // pairs with `ring_sq`
        if tail == self.sq_head || tail == NOT_RUNG {
            return;
        }
        if tail >= sq.entries {
            slot.sq_tail.store(self.sq_head, Ordering::Relaxed);
            return shared.driver_error("submission tail doorbell beyond the queue");
        }
        let Some(base) = sq.hva else {
            // The whole controller depends on its queues: CSTS.CFS.
            shared.violations.fetch_add(1, Ordering::Relaxed);
            return shared.fatal.store(true, Ordering::Relaxed);
        };
        let limit = self.cq.map_or(0, |cq| cq.entries);
        for _ in 0..FETCH_BOUND {
            if self.sq_head == tail || self.outstanding >= limit || self.stalled.is_some() {
                break;
            }
            // SAFETY: `sq_head < entries` (below) and the ring is `entries` entries at `base` (`locate_rings`), page
            // aligned; the driver does not write an entry between its doorbell and SQHD passing it (I4).
            let entry = unsafe {
                base.cast::<SubmissionEntry>()
                    .add(self.sq_head as usize)
                    .read()
            };
            self.sq_head += 1;
            if self.sq_head == sq.entries {
                self.sq_head = 0;
            }
            self.accept(slot, shared, entry);
        }
    }

    #[inline]
    fn accept(&mut self, slot: &Slot, shared: &Shared, entry: SubmissionEntry) {
        let cid = entry.cid.get();
        self.outstanding += 1;
        let (word, bit) = (usize::from(cid >> 6), 1_u64 << (cid & 63));
        if self.cids[word] & bit != 0 {
            // Not marked again: its first use clears the mark.
            shared.driver_error("a command identifier that is outstanding");
            self.ready
                .push_back((cid, Status::CID_CONFLICT.with_dnr(), 0));
            return;
        }
        self.cids[word] |= bit;
        if slot.id == 0 {
            let mut dma = Dma {
                table: &self.table,
                hint: &mut self.hint,
                violations: &shared.violations,
            };
            if let Some((status, dw0)) = admin::execute(shared, &mut dma, &entry) {
                self.complete(cid, status, dw0);
            }
        } else if shared.config.latency.is_zero() && shared.config.jitter.is_zero() {
            self.execute(shared, entry);
        } else {
            self.delay(shared, entry);
        }
    }

    fn delay(&mut self, shared: &Shared, entry: SubmissionEntry) {
        // SplitMix64: any spread will do, from a seed.
        self.rng = self.rng.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut random = self.rng;
        random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        random = (random ^ (random >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let jitter = u64::try_from(shared.config.jitter.as_nanos()).unwrap_or(u64::MAX);
        let spread = Duration::from_nanos((random >> 1) % jitter.max(1));
        self.arrivals += 1;
        self.delayed.push(Reverse(Delayed {
            due: shared.now(self.turns) + shared.config.latency + spread,
            order: self.arrivals,
            entry,
        }));
    }

    /// Data moves when a command's time has come, not before: a driver that unmapped it meanwhile is caught.
    fn execute_due(&mut self, shared: &Shared) {
        let now = shared.now(self.turns);
        while self.stalled.is_none()
            && let Some(Reverse(first)) = self.delayed.peek()
            && first.due <= now
            && let Some(Reverse(Delayed { entry, .. })) = self.delayed.pop()
        {
            self.execute(shared, entry);
        }
    }

    #[inline]
    fn execute(&mut self, shared: &Shared, entry: SubmissionEntry) {
        let cid = entry.cid.get();
        match shared.take_fault(&entry) {
            None => {}
            Some(Some(status)) => return self.complete(cid, status, 0),
            Some(None) => {
                self.arrivals += 1;
                let order = self.arrivals;
                let due = Duration::MAX;
                return self.delayed.push(Reverse(Delayed { due, order, entry }));
            }
        }
        let mut dma = Dma {
            table: &self.table,
            hint: &mut self.hint,
            violations: &shared.violations,
        };
        match io::execute_inline(shared, &mut dma, &entry) {
            Inline::Done(status) => {
                if status.is_success() {
                    self.count(shared, &entry);
                }
                self.complete(cid, status, 0);
            }
            Inline::NeedsWorker => {
                let (done, bell) = (Arc::clone(&self.done), self.bell.clone());
                match shared.jobs.push(Job { entry, done, bell }) {
                    Ok(()) => {
                        if shared.config.interrupts {
                            shared.wake_workers();
                        }
                        self.count(shared, &entry);
                        self.handed += 1;
                    }
                    Err(_) => self.stalled = Some(entry),
                }
            }
        }
    }

    #[inline]
    fn count(&mut self, shared: &Shared, entry: &SubmissionEntry) {
        let counters = &mut self.counters;
        let units =
            || u64::from(entry.lba_range().blocks) * u64::from(shared.config.block_size >> 9);
        match entry.opcode {
            io_opcode::READ => {
                counters.reads += 1;
                counters.units_read += units();
            }
            io_opcode::WRITE => {
                counters.writes += 1;
                counters.fua_writes += u64::from(io::is_fua(entry));
                counters.units_written += units();
            }
            io_opcode::FLUSH => counters.flushes += 1,
            io_opcode::WRITE_ZEROES => counters.write_zeroes += 1,
            io_opcode::COPY => counters.copies += 1,
            io_opcode::COMPARE => {
                counters.compares += 1;
                counters.units_compared += units();
            }
            _ => {
                counters.deallocates += 1;
                counters.deallocated_ranges += u64::from(entry.cdw10.get() & 0xff) + 1;
            }
        }
    }

    #[inline]
    pub(crate) fn complete(&mut self, cid: u16, status: Status, dw0: u32) {
        if !status.is_success() {
            self.counters.errors += 1;
        }
        self.cids[usize::from(cid >> 6)] &= !(1_u64 << (cid & 63));
        self.ready.push_back((cid, status, dw0));
    }

    /// Writes completion entries while the queue has room; the others wait for the driver's head doorbell.
    #[inline]
    fn post(&mut self, slot: &Slot, shared: &Shared) {
        let Some(cq) = self.cq else {
            return;
        };
        let head = match slot.cq_head.load(Ordering::Acquire) {
            NOT_RUNG => 0,
            head => head, // Acquire pairs with `ring_cq`
        };
        if head >= cq.entries {
            slot.cq_head.store(NOT_RUNG, Ordering::Relaxed);
            return shared.driver_error("completion head doorbell beyond the queue");
        }
        let Some(base) = cq.hva else {
            shared.violations.fetch_add(1, Ordering::Relaxed);
            return shared.fatal.store(true, Ordering::Relaxed);
        };
        while let Some((cid, status, dw0)) = self.ready.front().copied() {
            let next = if self.cq_tail + 1 == cq.entries {
                0
            } else {
                self.cq_tail + 1
            };
            if next == head {
                break;
            }
            self.ready.pop_front();
            self.outstanding -= 1;
            // SQ head and identifiers have 16 bits on the wire; `sq_head < 65536`.
            let low = u64::from(dw0);
            let high = u64::from(self.sq_head & 0xffff)
                | u64::from(slot.id) << 16
                | u64::from(cid) << 32
                | u64::from(status.to_wire(self.phase)) << 48;
            // SAFETY: `cq_tail < entries` (below) and the ring is `entries` entries of two words at `base`
            // (`locate_rings`), page aligned. Reached as atomics: the driver reads them meanwhile.
            let [to_low, to_high] = unsafe {
                let entry = base.cast::<AtomicU64>().add(self.cq_tail as usize * 2);
                [entry.as_ref(), entry.add(1).as_ref()]
            };
            to_low.store(low.to_le(), Ordering::Relaxed);
            // The phase tag comes last. Release pairs with the driver's `dma_rmb` after it saw the tag.
            to_high.store(high.to_le(), Ordering::Release);
            self.cq_tail = next;
            if next == 0 {
                self.phase = !self.phase;
            }
        }
    }
}
