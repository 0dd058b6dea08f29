//! One NVMe queue pair: a submission ring, a completion ring, the CID table, a PRP list page per slot, two doorbells.
//!
//! Promises: no lock, no allocation, no system call after creation; at most one submission doorbell per [`QueuePair::ring`];
//! what the device says about indices is checked and counted, never believed (I10). It belongs to one thread at a
//! time (`&mut self` everywhere, I7) and is deleted only by handing it back to its controller.
//! Start at [`QueuePair::submit`] and [`QueuePair::poll`].

pub(crate) mod doorbells;
pub mod prp;
pub(crate) mod ring;
pub(crate) mod slots;
#[cfg(test)]
pub(crate) mod tests;

use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U16, U64};

use crate::canary::canary;
use crate::dma::{DmaAccess, DmaBuffer, DmaError, DmaSpace};
use crate::mmio::{AtomicU64, fence};
use crate::spec::{
    Cid, CopyRange, DsmRange, LbaRange, MAX_BLOCKS, MAX_DSM_RANGES, Nsid, PAGE_SIZE, QueueId,
    Status, SubmissionEntry, Transfer,
};
use crate::transport::{Armed, Iova, QueuePort, Transport};
use doorbells::Doorbells;
use prp::{DataSegment, PrpError};
use ring::{CompletionRing, SubmissionRing};
use slots::Slots;

/// The most bytes of one command: what a PRP list of one page holds whatever the offset of the first byte.
pub const MAX_TRANSFER: u32 = 2 << 20;

/// The largest submission queue that we ask for. Bounds the list pages (4 KiB a slot) of one queue pair to 4 MiB.
pub const MAX_ENTRIES: u16 = 1024;

/// How often a command is sent again that the device says may succeed then (DNR = 0).
const MAX_RETRIES: u8 = 3;

/// A command's end, as the device reported it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completion {
    /// Which command: the identifier that [`QueuePair::submit`] returned, checked to be outstanding.
    pub cid: Cid,
    /// How it ended.
    pub status: Status,
}

/// Why a command was not submitted. Nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SubmitError {
    /// No free slot: poll first.
    Full,
    /// The data cannot be described by PRPs.
    Prp(PrpError),
}

/// What a queue pair has done so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePairCounters {
    /// Commands submitted, and rung.
    pub commands: u64,
    /// Submission tail doorbells; where the controller reads shadows of them, those that it wanted.
    pub sq_doorbells: u64,
    /// Completion head doorbells, likewise.
    pub cq_doorbells: u64,
    /// Completions of another queue, with an identifier that was not outstanding, or with an impossible SQHD.
    pub anomalies: u64,
    /// Commands sent again: after a status without DNR, or after a reset.
    pub resent: u64,
}

/// An NVMe I/O queue pair. `Send`, not `Sync`.
#[derive(Debug)]
pub struct QueuePair<T: Transport> {
    /// `None` while the device is gone.
    doorbells: Option<Doorbells<T::Port>>,
    sq: SubmissionRing,
    cq: CompletionRing,
    slots: Slots,
    /// Every outstanding command as it was sent, by CID: its entry in the ring may be overwritten once it was fetched,
    /// but not before it has completed does anyone know that it need not be sent again.
    sent: Box<[[u64; 8]; MAX_ENTRIES as usize]>,
    /// The tail that the device knows.
    rung_tail: u16,
    /// Completions consumed since the last head doorbell.
    unreported: u16,
    /// The SQHD of the completion polled last.
    reported_head: u16,
    max_transfer: u32,
    counters: QueuePairCounters,
    /// Page `i` belongs to slot `i`: its PRP list, or the ranges of its Dataset Management.
    lists: DmaBuffer,
    id: QueueId,
    retired: bool,
}

impl<T: Transport> QueuePair<T> {
    /// Memory and indices of a queue pair of `entries` (2 to 1024), not yet known to the controller.
    pub(crate) fn new(
        space: &Arc<DmaSpace>,
        doorbells: Doorbells<T::Port>,
        id: QueueId,
        entries: u16,
        max_transfer: u32,
    ) -> Result<QueuePair<T>, DmaError> {
        let entries = entries.clamp(2, MAX_ENTRIES);
        let slots = entries - 1;
        Ok(QueuePair {
            doorbells: Some(doorbells),
            sq: SubmissionRing::new(space, entries)?,
            cq: CompletionRing::new(space, entries)?,
            slots: Slots::new(slots),
            sent: Box::new([[0; 8]; MAX_ENTRIES as usize]),
            rung_tail: 0,
            unreported: 0,
            reported_head: 0,
            max_transfer: max_transfer.min(MAX_TRANSFER),
            counters: QueuePairCounters::default(),
            lists: DmaBuffer::new(
                space,
                usize::from(slots) * PAGE_SIZE,
                DmaAccess::DeviceReads,
            )?,
            id,
            retired: false,
        })
    }

    /// The identifier on the controller.
    #[must_use]
    pub fn id(&self) -> QueueId {
        self.id
    }

    /// How many commands may be outstanding: CIDs are `0..depth`.
    #[must_use]
    pub fn depth(&self) -> u16 {
        self.sq.entries() - 1
    }

    /// The most bytes of one Read, Write or Compare: MDTS, capped by [`MAX_TRANSFER`].
    #[must_use]
    pub fn max_transfer(&self) -> u32 {
        self.max_transfer
    }

    /// Commands that may be submitted now.
    #[inline]
    #[must_use]
    pub fn room(&mut self) -> u16 {
        self.end_round();
        self.slots.free_count().min(self.sq.room())
    }

    /// Commands submitted and not yet completed.
    #[must_use]
    pub fn outstanding(&self) -> u16 {
        self.slots.outstanding_count()
    }

    /// What this queue pair has done so far.
    #[must_use]
    pub fn counters(&self) -> QueuePairCounters {
        self.counters
    }

    pub(crate) fn ring_addresses(&self) -> (Iova, Iova) {
        (self.sq.iova(), self.cq.iova())
    }

    /// [`QueuePair::submit`] in short, of a read or write that moves one segment of at most two pages.
    ///
    /// # Errors
    /// As of [`QueuePair::submit`]; [`PrpError::TooLong`] also for a segment that only that takes.
    #[inline(always)]
    pub fn submit_short(
        &mut self,
        transfer: Transfer,
        range: LbaRange,
        segment: DataSegment,
    ) -> Result<Cid, SubmitError> {
        debug_assert!((1..=MAX_BLOCKS).contains(&range.blocks));
        let pointer = prp::short(segment).filter(|_| segment.len <= self.max_transfer);
        let pointer = pointer.ok_or(SubmitError::Prp(PrpError::TooLong))?;
        let cid = self.take_cid()?;
        self.push(transfer.words(cid, range, pointer.prp1, pointer.prp2), cid);
        Ok(cid)
    }

    /// Puts a command of `bytes` bytes of data in `segments` into the submission queue; no doorbell yet.
    ///
    /// The data must stay mapped until the completion with the returned identifier was polled (I2).
    ///
    /// # Errors
    /// [`SubmitError`]; nothing was changed then.
    #[inline(never)]
    pub fn submit(
        &mut self,
        mut entry: SubmissionEntry,
        segments: impl Iterator<Item = DataSegment>,
        bytes: u32,
    ) -> Result<Cid, SubmitError> {
        if bytes > self.max_transfer {
            return Err(SubmitError::Prp(PrpError::TooLong));
        }
        let cid = self.take_cid()?;
        let lists = &self.lists;
        let offset = cid.index() * PAGE_SIZE;
        let list = || lists.iova(offset);
        let pointer = prp::build(segments, bytes, list, |i, prp| {
            debug_assert!(i < PAGE_SIZE / 8);
            let page: NonNull<AtomicU64> = lists.pointer(offset).cast();
            // SAFETY: `build` stores to entries below 512, within slot `cid`'s page, which is ours while the slot is
            // free (I3); 8-byte aligned since it lies in a page.
            unsafe { page.add(i).as_ref() }.store(prp.to_le(), Ordering::Relaxed);
        })
        .map_err(|error| self.refuse(cid, error))?;
        entry.prp1 = U64::new(pointer.prp1);
        entry.prp2 = U64::new(pointer.prp2);
        self.push_entry(entry, cid);
        Ok(cid)
    }

    /// Puts a command without data (Flush, Write Zeroes) into the submission queue; no doorbell yet.
    ///
    /// # Errors
    /// [`SubmitError::Full`].
    #[inline]
    pub fn submit_without_data(&mut self, entry: SubmissionEntry) -> Result<Cid, SubmitError> {
        debug_assert!(entry.prp1.get() == 0 && entry.prp2.get() == 0);
        self.submit_raw(entry)
    }

    /// Puts a command into the submission queue as it stands, data pointer included (only the command identifier is
    /// ours); no doorbell yet. Commands that this crate has no words for go this way, and invalid ones. As any other it
    /// is sent again when it fails with DNR = 0.
    ///
    /// Memory that the data pointer names is mapped for the device and stays so until the completion with the returned
    /// identifier was polled (I2).
    ///
    /// # Errors
    /// [`SubmitError::Full`].
    #[inline]
    pub fn submit_raw(&mut self, entry: SubmissionEntry) -> Result<Cid, SubmitError> {
        let cid = self.take_cid()?;
        self.push_entry(entry, cid);
        Ok(cid)
    }

    /// Dataset Management, deallocate, of 1 to 256 `ranges`; no doorbell yet. Advisory: a controller may ignore it.
    ///
    /// # Errors
    /// [`SubmitError::Full`], or [`PrpError::TooLong`] for more than 256 ranges or none.
    pub fn submit_deallocate(
        &mut self,
        nsid: Nsid,
        ranges: impl ExactSizeIterator<Item = LbaRange>,
    ) -> Result<Cid, SubmitError> {
        let count = ranges.len();
        if count == 0 || count > MAX_DSM_RANGES {
            return Err(SubmitError::Prp(PrpError::TooLong));
        }
        let cid = self.take_cid()?;
        let offset = cid.index() * PAGE_SIZE;
        for (i, range) in ranges.enumerate().take(MAX_DSM_RANGES) {
            let wire = DsmRange {
                blocks: range.blocks.into(),
                slba: range.slba.into(),
                ..DsmRange::default()
            };
            self.lists
                .write_bytes(offset + i * size_of::<DsmRange>(), wire.as_bytes());
        }
        // 1 to 256 (checked above).
        let count = u16::try_from(count).unwrap_or(256);
        let mut entry = SubmissionEntry::deallocate(nsid, count);
        entry.prp1 = U64::new(self.lists.iova(offset).0);
        self.push_entry(entry, cid);
        Ok(cid)
    }

    /// Copy of `source` to the blocks from `slba` on; no doorbell yet. How much one may be says Identify Namespace (MSSRL, MCL).
    ///
    /// # Errors
    /// [`SubmitError::Full`].
    pub fn submit_copy(
        &mut self,
        nsid: Nsid,
        slba: u64,
        source: LbaRange,
        fua: bool,
    ) -> Result<Cid, SubmitError> {
        let cid = self.take_cid()?;
        let offset = cid.index() * PAGE_SIZE;
        self.lists
            .write_bytes(offset, CopyRange::from(source).as_bytes());
        let mut entry = SubmissionEntry::copy(nsid, slba, fua);
        entry.prp1 = U64::new(self.lists.iova(offset).0);
        self.push_entry(entry, cid);
        Ok(cid)
    }

    /// An identifier, with room for its entry.
    #[inline(always)]
    fn take_cid(&mut self) -> Result<Cid, SubmitError> {
        if self.sq.is_full() {
            self.end_round();
            if self.sq.is_full() {
                return Err(SubmitError::Full);
            }
        }
        self.slots.take().ok_or(SubmitError::Full)
    }

    #[cold]
    fn refuse(&mut self, cid: Cid, error: PrpError) -> SubmitError {
        self.slots.release(cid);
        SubmitError::Prp(error)
    }

    #[inline]
    fn push_entry(&mut self, entry: SubmissionEntry, cid: Cid) {
        let entry = SubmissionEntry {
            cid: U16::new(cid.0),
            ..entry
        };
        self.push(entry.words(), cid);
    }

    /// In whole words: they are stored twice.
    #[inline]
    fn push(&mut self, entry: [u64; 8], cid: Cid) {
        self.sent[cid.index() % self.sent.len()] = entry;
        self.sq.push(entry);
    }

    /// Tells the controller of everything submitted since the last call: one doorbell, or none.
    #[inline]
    pub fn ring(&mut self) {
        let tail = self.sq.tail();
        if tail == self.rung_tail {
            return;
        }
        // The controller may post as many completions as are outstanding; consumed entries that we did not report
        // yet take room as well. Only when both together could fill the queue does the head have to be told: the
        // sum grows with submissions alone, so it is enough to look here.
        if self.unreported + self.slots.taken_count() >= self.cq.entries() {
            self.report_head();
        }
        self.sq.publish();
        let rung = self
            .doorbells
            .as_mut()
            .is_some_and(|doorbells| doorbells.ring_sq(tail));
        self.counters.sq_doorbells += u64::from(rung);
        // All that was pushed since, but for what was sent again: counted once for all of it.
        let pushed = match tail.checked_sub(self.rung_tail) {
            Some(pushed) => pushed,
            None => self.sq.entries() - (self.rung_tail - tail),
        };
        self.counters.commands = self.counters.commands.wrapping_add(pushed.into());
        self.rung_tail = tail;
    }

    /// Writes the completion head doorbell if the controller does not know the head yet.
    pub fn report_head(&mut self) {
        if self.unreported > 0 {
            let head = self.cq.head();
            let rung = self
                .doorbells
                .as_mut()
                .is_some_and(|doorbells| doorbells.ring_cq(head));
            self.unreported = 0;
            self.counters.cq_doorbells += u64::from(rung);
        }
    }

    /// Gives a software controller its turn; to be called once before a round of [`QueuePair::poll`].
    #[inline]
    pub fn service(&mut self) {
        if let Some(doorbells) = &mut self.doorbells {
            doorbells.service();
        }
    }

    /// Something has completed that was not polled yet: a look at one word.
    #[inline]
    #[must_use]
    pub fn has_completion(&self) -> bool {
        self.cq.has_entry()
    }

    /// The eventfd of the controller's interrupt for this queue pair; see [`QueuePort::interrupt`].
    #[must_use]
    pub fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.doorbells.as_ref()?.port().interrupt()
    }

    /// For whoever wants to sleep: asks the controller for an interrupt at the next completion, then looks once more.
    /// Without outstanding commands there is nothing to wait for, and nothing is asked.
    pub fn request_interrupt(&mut self) -> Armed {
        let late = canary("look-before-interrupt");
        if self.outstanding() == 0 || self.doorbells.is_none() {
            return Armed::Yes;
        }
        // A controller tells of new entries only when it knows that we have seen those before (NVM Express Base 2.0,
        // "Interrupts": a message is sent when the first unacknowledged entry arrives).
        if !canary("no-head-before-sleep") {
            self.report_head();
        }
        let before = late && self.has_completion();
        let armed = match &mut self.doorbells {
            Some(doorbells) => doorbells.port_mut().arm(),
            None => Armed::Yes,
        };
        // Pairs with the controller posting an entry and then deciding about an interrupt: either we see the entry, or
        // it sees what we asked for.
        if !canary("no-interrupt-fence") {
            fence(Ordering::SeqCst);
        }
        if before || (!late && self.has_completion()) {
            return Armed::Pending;
        }
        armed
    }

    /// Asks for no interrupts: the queue pair is polled.
    pub fn suppress_interrupt(&mut self) {
        if let Some(doorbells) = &mut self.doorbells {
            doorbells.port_mut().disarm();
        }
    }

    /// The next completed command, if any. An entry that names another queue, no outstanding command, or an impossible
    /// SQHD is counted and ends this round: the device gets no endless loop out of us (I8). A command that may succeed
    /// when it is sent again is sent again, three times at most, before anyone hears of it.
    #[inline]
    pub fn poll(&mut self) -> Option<Completion> {
        loop {
            let Some(entry) = self.cq.pop() else {
                self.end_round();
                return None;
            };
            // At most as many as were submitted: a completion of nothing reports the head at once.
            self.unreported = self.unreported.wrapping_add(1);
            // Another queue's completion says nothing about our commands, nor about what was fetched of ours (I4).
            if entry.sqid.get() != self.id.0 {
                self.note_anomaly();
                return None;
            }
            self.reported_head = entry.sqhd.get();
            let cid = Cid(entry.cid.get());
            let status = Status::from_wire(entry.phase_and_status.get());
            if !status.is_success() && self.send_again(cid, status) {
                continue; // each command so often only: the device cannot keep us here
            }
            if !self.slots.release(cid) {
                self.note_anomaly();
                return None;
            }
            return Some(Completion { cid, status });
        }
    }

    /// Sends a failed command again, if its status says that this may help.
    #[cold]
    fn send_again(&mut self, cid: Cid, status: Status) -> bool {
        let hopeless = !status.may_retry()
            // An answer, whatever DNR says.
            || status.is(Status::COMPARE_FAILURE)
            || status.is(Status::ABORT_REQUESTED)
            || status.is(Status::ABORTED_SQ_DELETION);
        self.end_round();
        if hopeless || self.sq.is_full() || !self.slots.try_again(cid, MAX_RETRIES) {
            return false;
        }
        self.resend(cid);
        self.ring();
        true
    }

    fn resend(&mut self, cid: Cid) {
        self.sq.push(self.sent[cid.index() % self.sent.len()]);
        self.counters.resent += 1;
        // It will be counted when it is rung.
        self.counters.commands = self.counters.commands.wrapping_sub(1);
    }

    /// Time goes by: to be called at even intervals by whoever wants to know of [`QueuePair::oldest`] commands.
    pub fn next_era(&mut self) {
        self.slots.next_era();
    }

    /// The command that has been outstanding longest, and for how many intervals.
    #[must_use]
    pub fn oldest(&self) -> Option<(Cid, u16)> {
        self.slots.oldest()
    }

    /// Lets go of the doorbells, and with them of the device: to be called when the device is gone or is about to be
    /// given up. Outstanding commands stay outstanding until the controller's successor is told of this queue pair
    /// (`Controller::recreate_queue_pair`) or they are [abandoned](QueuePair::abandon).
    pub fn disconnect(&mut self) {
        self.doorbells = None;
        self.retired = true;
    }

    /// The controller was reset, or is another one: both rings empty, nothing known to it yet. Commands that are
    /// outstanding are sent again by [`QueuePair::replay`].
    pub(crate) fn restart(&mut self, doorbells: Doorbells<T::Port>) {
        self.doorbells = Some(doorbells);
        self.retired = true; // until the controller knows it
        self.sq.reset();
        self.cq.reset();
        self.rung_tail = 0;
        self.unreported = 0;
        self.reported_head = 0;
    }

    /// The controller knows this queue pair from now on.
    pub(crate) fn is_created(&mut self) {
        self.retired = false;
    }

    /// Sends every outstanding command again. There is room: the ring was emptied and has a place for each slot.
    pub fn replay(&mut self) {
        for cid in (0..self.depth()).map(Cid) {
            if self.slots.try_again(cid, u8::MAX) && self.sq.room() > 0 {
                self.resend(cid);
            }
        }
        self.ring();
    }

    /// The identifiers of outstanding commands.
    pub fn outstanding_cids(&self) -> impl Iterator<Item = Cid> {
        self.slots.outstanding()
    }

    /// The command that was sent last with an identifier: the one that is outstanding, or has completed last.
    #[must_use]
    pub fn sent(&self, cid: Cid) -> Option<SubmissionEntry> {
        let words = self.sent.get(cid.index())?;
        Some(zerocopy::transmute!(*words))
    }

    /// Whether a command with this identifier is outstanding.
    #[must_use]
    pub fn is_outstanding(&self, cid: Cid) -> bool {
        self.slots.is_outstanding(cid)
    }

    /// No other command gets the identifier of the one that was polled last, until [`QueuePair::give_back`]: for those whose
    /// Abort is still on its way. An Abort names nothing but the identifier, and would end the next command that has it.
    /// `false` of any other.
    pub fn keep(&mut self, cid: Cid) -> bool {
        self.slots.keep(cid)
    }

    /// An identifier that was kept may be used again. `false` of any other.
    pub fn give_back(&mut self, cid: Cid) -> bool {
        self.slots.give_back(cid)
    }

    /// Gives an outstanding command up that nobody will complete: there is no device any more
    /// ([`QueuePair::disconnect`]). `false` when the device is still there, or the command not outstanding.
    pub fn abandon(&mut self, cid: Cid) -> bool {
        self.doorbells.is_none() && self.slots.release(cid)
    }

    /// Takes over how far the controller has fetched: of the completions polled since the last time, the last one's
    /// value counts. To be called before anyone is told that there is no room.
    #[inline]
    fn end_round(&mut self) {
        if self.reported_head != self.sq.head() && !self.sq.advance_head(self.reported_head) {
            self.reported_head = self.sq.head();
            self.note_anomaly();
        }
    }

    #[cold]
    fn note_anomaly(&mut self) {
        self.counters.anomalies += 1;
        // A device that talks nonsense must not run into its own full queue.
        self.report_head();
    }

    /// The controller has forgotten this queue pair (deleted, or proven stopped): its memory may go.
    pub(crate) fn retire(mut self) {
        self.retired = true;
    }
}

impl<T: Transport> Drop for QueuePair<T> {
    fn drop(&mut self) {
        if !self.retired {
            tracing::error!(
                queue = self.id.0,
                "queue pair dropped while the controller knows it: its memory is leaked"
            );
            self.sq.leak();
            self.cq.leak();
            self.lists.leak();
        }
    }
}
