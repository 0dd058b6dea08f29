//! The two rings of a queue pair: index and phase arithmetic over memory that the controller shares.
//! A ring knows nothing of command identifiers; [`super::slots`] does.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use zerocopy::FromZeros;

use crate::dma::{DmaAccess, DmaBuffer, DmaError, DmaSpace, Iova};
use crate::mmio::{AtomicU64, dma_rmb, dma_wmb, reads, writes};
use crate::spec::{CompletionEntry, SubmissionEntry};

/// The index after `index`, which is below `entries`.
#[inline]
fn following(index: u16, entries: u16) -> u16 {
    let next = index.wrapping_add(1);
    if next == entries {
        std::hint::cold_path();
        return 0;
    }
    next
}

/// Our side of a submission queue.
#[derive(Debug)]
pub(crate) struct SubmissionRing {
    base: NonNull<SubmissionEntry>,
    entries: u16,
    /// Entries that may be in use: one stays empty, a full ring would look like an empty one.
    last: u16,
    tail: u16,
    /// The controller has fetched everything before this entry: the last plausible SQHD it reported.
    head: u16,
    /// Entries from head to tail: not known to be fetched.
    used: u16,
    memory: DmaBuffer,
}

// SAFETY: `base` points into `memory`, which this value owns.
unsafe impl Send for SubmissionRing {}

impl SubmissionRing {
    /// A zeroed ring of `entries` (at least 2) that the device may only read (G4).
    pub(crate) fn new(space: &Arc<DmaSpace>, entries: u16) -> Result<SubmissionRing, DmaError> {
        let bytes = usize::from(entries) * size_of::<SubmissionEntry>();
        let memory = DmaBuffer::new(space, bytes, DmaAccess::DeviceReads)?;
        Ok(SubmissionRing {
            base: memory.pointer(0).cast(),
            entries,
            last: entries - 1,
            tail: 0,
            head: 0,
            used: 0,
            memory,
        })
    }

    /// See [`DmaBuffer::leak`].
    pub(crate) fn leak(&mut self) {
        self.memory.leak();
    }

    pub(crate) fn iova(&self) -> Iova {
        self.memory.iova(0)
    }

    pub(crate) fn entries(&self) -> u16 {
        self.entries
    }

    #[inline]
    pub(crate) fn tail(&self) -> u16 {
        self.tail
    }

    /// Empty, as a controller expects it that is told of it anew.
    pub(crate) fn reset(&mut self) {
        self.tail = 0;
        self.head = 0;
        self.used = 0;
    }

    /// The controller has fetched everything before this entry.
    #[inline]
    pub(crate) fn head(&self) -> u16 {
        self.head
    }

    /// Entries that may be pushed.
    #[inline]
    pub(crate) fn room(&self) -> u16 {
        // Never wraps: `used` does not exceed it.
        self.last.wrapping_sub(self.used)
    }

    /// No room.
    #[inline]
    pub(crate) fn is_full(&self) -> bool {
        self.used == self.last
    }

    /// Stores an entry at the tail. The caller saw `room() > 0`.
    #[inline]
    pub(crate) fn push(&mut self, entry: [u64; 8]) {
        debug_assert!(self.room() > 0);
        // SAFETY: `tail < entries` always holds (below), and the buffer holds `entries` entries (`new`). The slot is
        // ours: SQHD passed it (`room`), and the controller does not look before the doorbell (I4).
        unsafe {
            let slot = self.base.add(usize::from(self.tail)).cast();
            writes(slot.cast().as_ptr(), size_of::<SubmissionEntry>());
            slot.write(entry);
        }
        // Neither wraps: both stay below `entries` (the caller saw room; the comparison below).
        self.used = self.used.wrapping_add(1);
        self.tail = following(self.tail, self.entries);
    }

    /// To be called before the tail doorbell is rung: the entries become visible to the device first.
    #[inline]
    pub(crate) fn publish(&self) {
        dma_wmb(); // pairs with the controller fetching entries only after it saw the doorbell
    }

    /// Takes over the SQHD of a completion. `false` when the value is impossible: beyond our tail (I10).
    #[inline]
    pub(crate) fn advance_head(&mut self, sqhd: u16) -> bool {
        // How far the head moves on; with `sqhd < entries` neither branch can wrap.
        let fetched = match sqhd {
            beyond if beyond >= self.entries => return false,
            ahead if ahead >= self.head => ahead - self.head,
            around => around + (self.entries - self.head),
        };
        if fetched > self.used {
            return false;
        }
        self.used -= fetched;
        self.head = sqhd;
        true
    }
}

/// Our side of a completion queue.
#[derive(Debug)]
pub(crate) struct CompletionRing {
    base: NonNull<AtomicU64>,
    entries: u16,
    /// The entry at the head, which is below `entries`.
    next: NonNull<AtomicU64>,
    /// Behind the last entry.
    end: NonNull<AtomicU64>,
    /// The phase tag of new entries, at its place in the second 64-bit word: 1 on the first pass over zeroed memory.
    phase: u64,
    memory: DmaBuffer,
}

// SAFETY: the pointers lead into `memory`, which this value owns.
unsafe impl Send for CompletionRing {}

/// Where the phase tag stands in the second 64-bit word of a completion entry.
const PHASE: u64 = 1 << 48;

impl CompletionRing {
    /// A zeroed ring of `entries` (at least 2).
    pub(crate) fn new(space: &Arc<DmaSpace>, entries: u16) -> Result<CompletionRing, DmaError> {
        let bytes = usize::from(entries) * size_of::<CompletionEntry>();
        let memory = DmaBuffer::new(space, bytes, DmaAccess::DeviceWrites)?;
        let base = memory.pointer(0).cast();
        Ok(CompletionRing {
            base,
            entries,
            next: base,
            // SAFETY: the buffer holds `entries` entries of two words.
            end: unsafe { base.add(2 * usize::from(entries)) },
            phase: PHASE,
            memory,
        })
    }

    /// See [`DmaBuffer::leak`].
    pub(crate) fn leak(&mut self) {
        self.memory.leak();
    }

    pub(crate) fn iova(&self) -> Iova {
        self.memory.iova(0)
    }

    pub(crate) fn entries(&self) -> u16 {
        self.entries
    }

    /// Zeroed and at its beginning, as a controller expects it that is told of it anew.
    pub(crate) fn reset(&mut self) {
        let zeroes = CompletionEntry::new_zeroed();
        for i in 0..usize::from(self.entries) {
            self.memory.write(i * size_of::<CompletionEntry>(), &zeroes);
        }
        self.next = self.base;
        self.phase = PHASE;
    }

    #[inline]
    pub(crate) fn head(&self) -> u16 {
        let words = (self.next.addr().get() - self.base.addr().get()) / size_of::<AtomicU64>();
        // Below `entries`.
        u16::try_from(words / 2).unwrap_or(0)
    }

    /// The words of the entry at the head.
    #[inline(always)]
    fn words(&self) -> (&AtomicU64, &AtomicU64) {
        // SAFETY: `next` leads to one of the `entries` entries of two words (`pop`), 8-byte aligned since the first one
        // starts on a page. Shared bytes are only reached as atomics (I1).
        unsafe { (self.next.as_ref(), self.next.add(1).as_ref()) }
    }

    /// The controller has completed the next entry.
    #[inline(always)]
    pub(crate) fn has_entry(&self) -> bool {
        (self.words().1.load(Ordering::Relaxed) ^ self.phase) & PHASE == 0
    }

    #[cold]
    fn next_lap(&mut self) {
        self.next = self.base;
        self.phase ^= PHASE;
    }

    /// The next entry that the controller has completed, copied once (I6).
    #[inline]
    pub(crate) fn pop(&mut self) -> Option<CompletionEntry> {
        let (low, high) = self.words();
        if (high.load(Ordering::Relaxed) ^ self.phase) & PHASE != 0 {
            return None;
        }
        dma_rmb(); // pairs with the controller writing the phase tag last
        reads(std::ptr::from_ref(low).cast(), size_of::<CompletionEntry>());
        let words = [low.load(Ordering::Relaxed), high.load(Ordering::Relaxed)];
        // SAFETY: the next entry, or the place behind the last, which the comparison takes back.
        self.next = unsafe { self.next.add(2) };
        if self.next == self.end {
            self.next_lap();
        }
        Some(zerocopy::transmute!(words.map(u64::to_le)))
    }
}
