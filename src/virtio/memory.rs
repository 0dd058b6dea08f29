//! Guest memory as the data path sees it: a flat table of regions, one compare and one add per look-up.
//!
//! Promises that a [`Segment`] lies wholly inside one mapped region, and that guest bytes are never lent as a
//! Rust reference (I1): they are copied, words with volatile accesses and bulk data by raw pointer. Does not know
//! how the regions were mapped, nor what the device-side address `dma` means. Start at [`GuestMemory::piece`].

use super::shared;
use std::any::Any;
use std::fmt;
use std::ptr::NonNull;
use thiserror::Error;

/// A guest-physical address, as it stands in descriptors.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Gpa(pub u64);

impl Gpa {
    /// The address `bytes` further on; `None` past the end of the 64-bit space.
    pub const fn checked_add(self, bytes: u64) -> Option<Self> {
        match self.0.checked_add(bytes) {
            Some(sum) => Some(Self(sum)),
            None => None,
        }
    }
}

impl fmt::Debug for Gpa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "gpa {:#x}", self.0)
    }
}

/// One region of guest memory and the two places where it is visible to us.
#[derive(Debug, Clone, Copy)]
pub struct GuestRegion {
    /// Where the guest sees the first byte.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Where this process sees the first byte.
    pub hva: NonNull<u8>,
    /// Where the NVMe device sees the first byte (an IOVA). Opaque here.
    pub dma: u64,
}

impl GuestRegion {
    /// The part of `offset..offset + len` that lies inside. The caller has checked `offset < self.len`.
    #[inline]
    fn segment(&self, offset: u64, len: u32) -> Segment {
        let rest = u32::try_from(self.len - offset).unwrap_or(u32::MAX);
        // The cast cannot truncate: `offset < self.len <= isize::MAX` (checked in `GuestMemory::new`).
        #[allow(clippy::cast_possible_truncation)]
        let bytes = offset as usize;
        Segment {
            // SAFETY: `bytes` is less than the length of the mapping that starts at `hva` (contract of
            // `GuestMemory::new`), so the result stays inside that allocation.
            hva: unsafe { self.hva.add(bytes) },
            dma: self.dma.wrapping_add(offset),
            len: len.min(rest),
        }
    }
}

/// Consecutive bytes of guest memory inside one region: an address without a lifetime.
///
/// Only [`GuestMemory`] makes segments; that they are used no longer than the memory lives is the promise given
/// to [`GuestMemory::new`] (I2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    hva: NonNull<u8>,
    dma: u64,
    len: u32,
}

// SAFETY: a segment is an address; its bytes are only ever copied, never lent, from whichever thread (I1).
unsafe impl Send for Segment {}
// SAFETY: as above; a shared segment offers nothing but copies.
unsafe impl Sync for Segment {}

/// Eight bytes at any alignment, so that one volatile access moves them.
#[repr(C, packed)]
#[derive(Clone, Copy)]
struct Word(u64);

impl Segment {
    /// A segment of no bytes, to fill preallocated tables with.
    pub(super) const EMPTY: Self = Self {
        hva: NonNull::dangling(),
        dma: 0,
        len: 0,
    };

    /// Where this process sees the first byte.
    #[inline]
    pub const fn hva(&self) -> NonNull<u8> {
        self.hva
    }

    /// Where the device sees the first byte.
    #[inline]
    pub const fn dma(&self) -> u64 {
        self.dma
    }

    /// Length in bytes.
    #[inline]
    #[allow(clippy::len_without_is_empty)]
    pub const fn len(&self) -> u32 {
        self.len
    }

    /// The first `len` bytes; the whole segment if it is shorter.
    #[inline]
    pub fn prefix(&self, len: u32) -> Self {
        Self {
            len: self.len.min(len),
            ..*self
        }
    }

    /// What is left behind the first `len` bytes; nothing if the segment is shorter.
    #[inline]
    pub fn suffix(&self, len: u32) -> Self {
        let skip = self.len.min(len);
        Self {
            // SAFETY: `skip <= self.len`, so the result is inside the region or one past its end.
            hva: unsafe { self.hva.add(skip as usize) },
            dma: self.dma.wrapping_add(u64::from(skip)),
            len: self.len - skip,
        }
    }

    /// Copies guest bytes into `out`, as many as both hold, and says how many. For bulk data: when the guest
    /// writes meanwhile, it gets torn data, which is its own affair.
    pub fn copy_to(&self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.len as usize);
        shared::reads(self.hva.as_ptr(), len);
        // SAFETY: `len` bytes at `hva` lie in one mapped region, which outlives this segment (contract of
        // `GuestMemory::new`); `out` is ours alone, so they do not overlap.
        unsafe {
            self.hva
                .as_ptr()
                .copy_to_nonoverlapping(out.as_mut_ptr(), len)
        };
        len
    }

    /// Copies `bytes` into guest memory, as many as both hold, and says how many.
    pub fn copy_from(&self, bytes: &[u8]) -> usize {
        let len = bytes.len().min(self.len as usize);
        shared::writes(self.hva.as_ptr(), len);
        // SAFETY: as in `copy_to`.
        unsafe {
            self.hva
                .as_ptr()
                .copy_from_nonoverlapping(bytes.as_ptr(), len)
        };
        len
    }

    /// Copies a control structure into `out`, as many bytes as both hold, and says how many. Each guest byte is
    /// read exactly once (I6): volatile, so that the compiler cannot go back to memory the guest changed since.
    #[inline]
    pub(super) fn read_once(&self, out: &mut [u8]) -> usize {
        let len = out.len().min(self.len as usize);
        shared::reads(self.hva.as_ptr(), len);
        let mut words = out[..len].chunks_exact_mut(8);
        let mut at = self.hva.as_ptr().cast_const();
        for word in &mut words {
            // SAFETY: 8 of the remaining bytes of the segment, which lies in one mapped region; `Word` has
            // alignment 1.
            let value = unsafe { at.cast::<Word>().read_volatile() }.0;
            word.copy_from_slice(&value.to_ne_bytes());
            // SAFETY: stays within the `len` bytes of the segment, or one past them.
            at = unsafe { at.add(8) };
        }
        for byte in words.into_remainder() {
            // SAFETY: one of the remaining bytes of the segment.
            *byte = unsafe { at.read_volatile() };
            // SAFETY: as above.
            at = unsafe { at.add(1) };
        }
        len
    }

    /// The last byte, as a place to write a status to; `None` for an empty segment.
    #[inline]
    pub(super) fn last_byte(&self) -> Option<StatusByte> {
        let last = self.suffix(self.len.checked_sub(1)?);
        Some(AnswerPlace(last.hva))
    }
}

/// Where the answer of one request goes: `N` writable bytes of guest memory in one piece. Lives as long as a [`Segment`]
/// does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerPlace<const N: usize>(NonNull<u8>);

/// An answer of one byte: a status.
pub type StatusByte = AnswerPlace<1>;

// SAFETY: an address; the bytes behind it are only ever written, never lent (I1).
unsafe impl<const N: usize> Send for AnswerPlace<N> {}
// SAFETY: as above; racing writes would come from two owners of one request, which I5 excludes.
unsafe impl<const N: usize> Sync for AnswerPlace<N> {}

impl<const N: usize> AnswerPlace<N> {
    /// It is about to be written.
    #[inline(always)]
    pub(super) fn prefetch(self) {
        prefetch_to_write(self.0.as_ptr());
    }

    /// Writes the answer. The guest sees it with the used index published afterwards.
    #[inline(always)]
    pub(super) fn fill(self, answer: &[u8; N]) {
        shared::writes(self.0.as_ptr(), N);
        // SAFETY: the bytes lie in a mapped region that outlives this value (contract of `GuestMemory::new`).
        unsafe {
            self.0.as_ptr().copy_from_nonoverlapping(answer.as_ptr(), N);
        }
    }

    /// Its first byte, as what remembers answers of any length keeps it.
    #[inline(always)]
    pub fn first(self) -> StatusByte {
        AnswerPlace(self.0)
    }

    /// The place again of which this is the first byte.
    ///
    /// # Safety
    /// `first` is what [`Self::first`] said of a place as long as this one.
    #[inline(always)]
    pub unsafe fn at(first: StatusByte) -> Self {
        AnswerPlace(first.0)
    }
}

impl StatusByte {
    /// Writes the status. The guest sees it with the used index published afterwards.
    #[inline]
    pub fn write(self, status: u8) {
        shared::writes(self.0.as_ptr(), 1);
        // SAFETY: the byte lies in a mapped region that outlives this value (contract of `GuestMemory::new`).
        unsafe { self.0.as_ptr().write_volatile(status) };
    }
}

/// Brings what lies at an address near, if it is one.
#[inline(always)]
fn prefetch(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: a prefetch has no architectural effect and faults on no address.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(address.cast()) };
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// The same for what is about to be written.
#[inline(always)]
fn prefetch_to_write(address: *const u8) {
    #[cfg(all(target_arch = "x86_64", not(miri)))]
    // SAFETY: as `prefetch`; a processor of this architecture that has no PREFETCHW takes it for a NOP.
    unsafe {
        std::arch::asm!("prefetchw byte ptr [{}]", in(reg) address, options(nostack, preserves_flags, readonly));
    }
    #[cfg(not(all(target_arch = "x86_64", not(miri))))]
    let _ = address;
}

/// A header of `N` bytes that is to be read in parts, each once (I6). Lives as long as a [`Segment`] does.
#[derive(Debug, Clone, Copy)]
pub struct Unread<const N: usize>(NonNull<u8>);

impl<const N: usize> Unread<N> {
    /// Copies the 8 bytes from `AT` on.
    #[inline(always)]
    pub fn read<const AT: usize>(&self) -> [u8; 8] {
        const { assert!(AT + 8 <= N) };
        // SAFETY: within the `N` bytes (just above), which lie in one mapped region (`MainRegion::unread`).
        let at = unsafe { self.0.as_ptr().cast_const().add(AT) };
        shared::reads(at, 8);
        // SAFETY: as above; `Word` has alignment 1.
        unsafe { at.cast::<Word>().read_volatile() }.0.to_ne_bytes()
    }
}

/// Why a region table was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RegionError {
    /// There is no region at all.
    #[error("guest memory has no region")]
    NoRegion,
    /// The region holds no byte.
    #[error("guest region at {0:?} has length 0")]
    Empty(Gpa),
    /// An end address does not fit 64 bits (or, in this process, an `isize`).
    #[error("guest region at {gpa:?} of length {len:#x} wraps around an address space")]
    Wraps {
        /// Where it starts.
        gpa: Gpa,
        /// Its length in bytes.
        len: u64,
    },
    /// Two regions share guest addresses.
    #[error("guest regions at {0:?} and {1:?} overlap")]
    Overlap(Gpa, Gpa),
}

/// The largest region of a [`GuestMemory`], where nearly all of a guest's buffers are, for those who hold that memory and
/// look up every request's: a header of `HEADER` bytes, a table of three descriptors, data, a status.
#[derive(Debug, Clone, Copy)]
pub struct MainRegion<const HEADER: usize> {
    region: GuestRegion,
    /// How many offsets a header, and a table, may start at.
    header_starts: u64,
    table_starts: u64,
}

/// A table of three descriptors.
pub(super) const SOLE_TABLE_BYTES: usize = 48;

impl<const HEADER: usize> MainRegion<HEADER> {
    fn new(region: GuestRegion) -> Self {
        let starts = |bytes: usize| (region.len + 1).saturating_sub(bytes as u64);
        Self {
            region,
            header_starts: starts(HEADER),
            table_starts: starts(SOLE_TABLE_BYTES),
        }
    }

    /// Where this process sees `offset`, which is inside.
    #[inline(always)]
    fn hva(&self, offset: u64) -> NonNull<u8> {
        // The cast cannot truncate: `offset < region.len <= isize::MAX` (checked in `GuestMemory::new`).
        #[allow(clippy::cast_possible_truncation)]
        let bytes = offset as usize;
        // SAFETY: less than the length of the mapping that starts at `hva` (contract of `GuestMemory::new`).
        unsafe { self.region.hva.add(bytes) }
    }

    /// Where `gpa` lies. An address below the region wraps to an offset beyond any length.
    #[inline(always)]
    fn offset(&self, gpa: Gpa) -> u64 {
        gpa.0.wrapping_sub(self.region.gpa.0)
    }

    /// A header, if all of it is in here.
    #[inline(always)]
    #[allow(clippy::cast_possible_truncation)] // a control structure is far below 4 GiB
    pub(super) fn header(&self, gpa: Gpa) -> Option<Segment> {
        let offset = self.offset(gpa);
        (offset < self.header_starts).then(|| Segment {
            hva: self.hva(offset),
            dma: self.region.dma.wrapping_add(offset),
            len: HEADER as u32,
        })
    }

    /// A header that is not read yet, if all of it is in here.
    #[inline(always)]
    pub(super) fn unread(&self, gpa: Gpa) -> Option<Unread<HEADER>> {
        let offset = self.offset(gpa);
        (offset < self.header_starts).then(|| Unread(self.hva(offset)))
    }

    /// Brings what lies at `gpa` near. Only a hint, so the address may be anything.
    #[inline(always)]
    pub(super) fn prefetch(&self, gpa: Gpa) {
        #[allow(clippy::cast_possible_truncation)] // a hint
        let offset = self.offset(gpa) as usize;
        prefetch(self.region.hva.as_ptr().wrapping_add(offset));
    }

    /// Where a table of three descriptors begins, if all of it is in here.
    #[inline(always)]
    pub(super) fn table(&self, gpa: Gpa) -> Option<NonNull<u8>> {
        let offset = self.offset(gpa);
        (offset < self.table_starts).then(|| self.hva(offset))
    }

    /// A status.
    #[inline(always)]
    pub(super) fn status(&self, gpa: Gpa) -> Option<StatusByte> {
        let offset = self.offset(gpa);
        (offset < self.region.len).then(|| AnswerPlace(self.hva(offset)))
    }

    /// Where the device sees all of `gpa..gpa + len`, if it is in here and not empty.
    #[inline(always)]
    pub(super) fn data(&self, gpa: Gpa, len: u32) -> Option<u64> {
        let offset = self.offset(gpa);
        // The last byte counts from 0, so that the one of an empty buffer is far outside.
        let last = u64::from(len).wrapping_sub(1);
        let inside = offset < self.region.len && last < self.region.len - offset;
        inside.then(|| self.region.dma.wrapping_add(offset))
    }

    /// An answer of `N` bytes, if all of it is in here.
    #[inline(always)]
    pub(super) fn answer<const N: usize>(&self, gpa: Gpa) -> Option<AnswerPlace<N>> {
        let offset = self.offset(gpa);
        // Lengths are less than 2^63.
        let starts = self.region.len.wrapping_add(1).saturating_sub(N as u64);
        (offset < starts).then(|| AnswerPlace(self.hva(offset)))
    }

    /// The bytes of an answer; `None` of one that lies elsewhere.
    #[cold]
    #[allow(clippy::cast_possible_truncation)] // an answer is far below 4 GiB
    pub fn bytes_of<const N: usize>(&self, answer: AnswerPlace<N>) -> Option<Segment> {
        let (at, start) = (answer.0.addr().get(), self.region.hva.addr().get());
        let offset = at.checked_sub(start)? as u64;
        (offset < self.region.len).then(|| self.region.segment(offset, N as u32))
    }

    /// The `len` bytes that [`Self::data`] said the device sees at `dma`.
    #[cold]
    pub(super) fn segment(&self, dma: u64, len: u32) -> Segment {
        self.region.segment(dma.wrapping_sub(self.region.dma), len)
    }
}

/// The guest's memory: immutable regions, sorted by guest address, and whatever keeps them mapped.
pub struct GuestMemory {
    /// The largest region once more: where nearly all of a guest's buffers are.
    largest: GuestRegion,
    regions: Box<[GuestRegion]>,
    /// Unmaps on drop, so it must go last; nobody looks inside.
    _owner: Box<dyn Any + Send + Sync>,
}

// SAFETY: the table is immutable, and its pointers name memory that is reachable from every thread. All
// accesses through them are atomic, volatile, or copies that tolerate a racing guest (I1).
unsafe impl Send for GuestMemory {}
// SAFETY: as above; no method hands out a reference to guest bytes.
unsafe impl Sync for GuestMemory {}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("regions", &self.regions)
            .finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// Takes over mapped `regions`, in any order. `owner` keeps them mapped and is dropped with this value.
    ///
    /// # Errors
    /// Regions that are empty, wrap, or overlap; no region.
    ///
    /// # Safety
    /// - `len` bytes at `hva` of each region are mapped readable and writable as long as `owner` lives, and no
    ///   Rust reference to them exists meanwhile.
    /// - The value is dropped only when no [`Segment`], [`StatusByte`] or virtqueue made from it will be used
    ///   any more: whoever holds such addresses holds the memory as well (I2; the poller holds both).
    pub unsafe fn new(
        mut regions: Vec<GuestRegion>,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<Self, RegionError> {
        regions.sort_by_key(|region| region.gpa);
        for region in &regions {
            let GuestRegion { gpa, len, hva, dma } = *region;
            if len == 0 {
                return Err(RegionError::Empty(gpa));
            }
            let fits = gpa.checked_add(len).is_some()
                && dma.checked_add(len).is_some()
                && isize::try_from(len).is_ok()
                && usize::try_from(len).is_ok_and(|len| hva.addr().checked_add(len).is_some());
            if !fits {
                return Err(RegionError::Wraps { gpa, len });
            }
        }
        for pair in regions.windows(2) {
            if pair[1].gpa.0 - pair[0].gpa.0 < pair[0].len {
                return Err(RegionError::Overlap(pair[0].gpa, pair[1].gpa));
            }
        }
        let largest = *regions
            .iter()
            .max_by_key(|region| region.len)
            .ok_or(RegionError::NoRegion)?;
        Ok(Self {
            largest,
            regions: regions.into(),
            _owner: owner,
        })
    }

    /// The regions, sorted by guest address.
    pub fn regions(&self) -> &[GuestRegion] {
        &self.regions
    }

    /// The largest region once more.
    pub fn main<const HEADER: usize>(&self) -> MainRegion<HEADER> {
        MainRegion::new(self.largest)
    }

    /// The longest piece of `gpa..gpa + len` that starts at `gpa` and lies in one region; `None` when `gpa` lies
    /// in none. A piece shorter than `len` says that the buffer goes on in the adjacent region or in a hole.
    #[inline]
    pub fn piece(&self, gpa: Gpa, len: u32) -> Option<Segment> {
        // An address below the region wraps to an offset beyond any length: one compare serves both ends.
        let offset = gpa.0.wrapping_sub(self.largest.gpa.0);
        if offset < self.largest.len {
            return Some(self.largest.segment(offset, len));
        }
        self.piece_elsewhere(gpa, len)
    }

    fn piece_elsewhere(&self, gpa: Gpa, len: u32) -> Option<Segment> {
        let after = self.regions.partition_point(|region| region.gpa <= gpa);
        let region = self.regions.get(after.checked_sub(1)?)?;
        let offset = gpa.0 - region.gpa.0;
        (offset < region.len).then(|| region.segment(offset, len))
    }

    /// Where the guest sees a segment that was made from this memory.
    pub(super) fn gpa_of(&self, segment: &Segment) -> Option<Gpa> {
        let at = segment.hva.addr().get();
        let find = |region: &GuestRegion| {
            let offset = at.checked_sub(region.hva.addr().get())? as u64;
            (offset < region.len).then(|| Gpa(region.gpa.0 + offset))
        };
        find(&self.largest).or_else(|| self.regions.iter().find_map(find))
    }

    /// Where this process sees `gpa..gpa + len` if it lies wholly in one region: how ring addresses are resolved.
    pub fn contiguous(&self, gpa: Gpa, len: u32) -> Option<NonNull<u8>> {
        let piece = self.piece(gpa, len)?;
        (piece.len == len).then_some(piece.hva)
    }

    /// Copies a control structure out of guest memory, over adjacent regions if need be, each byte read once
    /// (I6). False if a byte of it is not mapped; `out` is then partly filled.
    #[must_use]
    pub(super) fn read_once(&self, gpa: Gpa, out: &mut [u8]) -> bool {
        let mut done = 0;
        while done < out.len() {
            let rest = u32::try_from(out.len() - done).unwrap_or(u32::MAX);
            let piece = gpa
                .checked_add(done as u64)
                .and_then(|gpa| self.piece(gpa, rest));
            match piece {
                Some(piece) => done += piece.read_once(&mut out[done..]),
                None => return false,
            }
        }
        true
    }
}
