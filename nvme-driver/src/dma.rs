//! Memory that the device reaches: our own buffers, mappings of someone else's memory, and the I/O virtual address
//! windows they lie in. Promises that a window is unmapped before it is reused, and that a mapping keeps its memory
//! alive. Never lends a Rust reference to bytes that a device shares (I1). Start at [`DmaSpace`].

use std::any::Any;
use std::collections::BTreeMap;
use std::fmt;
use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::mmio::{reads, writes};
use crate::pages::{self, PageKind};
use crate::spec::PAGE_SIZE;
pub use crate::transport::{DmaAccess, DmaDomain, DmaError, Iova, PhysicalMemory, Pinned, Run};

/// Windows start at multiples of this, so that the IOMMU can use its large pages.
const LARGE_WINDOW_ALIGN: u64 = 2 << 20;

/// A device's DMA domain together with the book of its windows.
///
/// The book outlives the domain: a device that is lost takes its domain along ([`DmaSpace::detach`]), mappings of
/// guests and buffers stay where they are in the book, and the domain of the device that comes back gets them all at
/// the same addresses ([`DmaSpace::attach`]). While there is no domain no device reaches anything.
///
/// A device without an IOMMU has no windows: what is mapped stays where it is in physical memory, and the device is told
/// where that is, piece by piece ([`DmaMapping::runs`]). Nothing changes for it when the device is lost and comes back.
#[derive(Debug)]
pub struct DmaSpace {
    /// For a device without an IOMMU: in the place of the book.
    physical: Option<Arc<dyn PhysicalMemory>>,
    /// Held for reading over each call of the domain, so that none is under way while domains are exchanged.
    domain: RwLock<Option<Arc<dyn DmaDomain>>>,
    book: Mutex<Book>,
}

#[derive(Debug)]
struct Book {
    free: IovaSpace,
    /// By start.
    windows: BTreeMap<u64, Window>,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    hva: NonNull<u8>,
    len: u64,
    access: DmaAccess,
}

// SAFETY: the pointer is an address to hand to the domain; nothing here reads or writes through it.
unsafe impl Send for Window {}

impl DmaSpace {
    /// Takes charge of all windows of `domain`.
    #[must_use]
    pub fn new(domain: Arc<dyn DmaDomain>) -> Arc<DmaSpace> {
        let book = Book {
            free: IovaSpace::new(&domain.usable_ranges()),
            windows: BTreeMap::new(),
        };
        Arc::new(DmaSpace {
            physical: domain.physical(),
            domain: RwLock::new(Some(domain)),
            book: Mutex::new(book),
        })
    }

    /// Gives the domain up: to be called when its device can no longer reach memory through it.
    pub fn detach(&self) {
        *self.domain.write().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Maps every window of the book into `domain`, where it was, and goes on with that domain.
    ///
    /// # Errors
    /// [`DmaError`] when a window lies outside what `domain` can address, or when it refuses; nothing changes then.
    pub fn attach(&self, domain: Arc<dyn DmaDomain>) -> Result<(), DmaError> {
        let mut current = self.domain.write().unwrap_or_else(PoisonError::into_inner);
        if domain.physical().is_some() != self.physical.is_some() {
            let (was, is) = match self.physical {
                Some(_) => ("not ", ""),
                None => ("", "not "),
            };
            return Err(DmaError::Changed { was, is });
        }
        let mut book = self.book();
        let mut free = IovaSpace::new(&domain.usable_ranges());
        for (iova, window) in &book.windows {
            let (iova, len) = (*iova, window.len);
            if !free.take(Iova(iova), len) {
                let reason = "the device cannot address it".to_owned();
                return Err(DmaError::Refused {
                    action: "map",
                    iova,
                    len,
                    reason,
                });
            }
            // SAFETY: whoever asked for this window keeps its memory mapped until it is unmapped (`DmaMapping::new`).
            unsafe { domain.map(Iova(iova), window.hva, len, window.access)? };
        }
        book.free = free;
        *current = Some(domain);
        Ok(())
    }

    /// Nothing stands between the device and memory: what it is given by [`DmaMapping::new`] must lie in huge pages, and
    /// may be in several pieces for it.
    #[must_use]
    pub fn is_physical(&self) -> bool {
        self.physical.is_some()
    }

    /// # Safety
    /// As [`DmaDomain::map`], until [`DmaSpace::unmap`] of the window returned `Ok`.
    unsafe fn map(&self, hva: NonNull<u8>, len: u64, access: DmaAccess) -> Result<Iova, DmaError> {
        let domain = self.read_domain();
        let iova = self.book().free.allocate(len);
        let iova = iova.ok_or(DmaError::NoWindow { len })?;
        if let Some(domain) = &*domain {
            // SAFETY: the caller's promise.
            let mapped = unsafe { domain.map(iova, hva, len, access) };
            if let Err(error) = mapped {
                self.book().free.release(iova, len);
                return Err(error);
            }
        }
        self.book()
            .windows
            .insert(iova.0, Window { hva, len, access });
        Ok(iova)
    }

    fn unmap(&self, iova: Iova, len: u64) -> Result<(), DmaError> {
        let domain = self.read_domain();
        if let Some(domain) = &*domain {
            domain.unmap(iova, len)?;
        }
        let mut book = self.book();
        book.windows.remove(&iova.0);
        book.free.release(iova, len);
        Ok(())
    }

    /// The NUMA node that memory for the device is best taken from.
    fn numa_node(&self) -> Option<u32> {
        self.read_domain().as_ref()?.numa_node()
    }

    fn read_domain(&self) -> RwLockReadGuard<'_, Option<Arc<dyn DmaDomain>>> {
        self.domain.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Which I/O virtual addresses are free. First fit, page granular; coalesces on release.
#[derive(Debug)]
pub struct IovaSpace {
    /// Sorted, disjoint, half-open, page aligned. Never holds address 0: a zero PRP must stay an error.
    free: Vec<(u64, u64)>,
}

impl IovaSpace {
    /// All of `ranges` is free, apart from the zero page.
    #[must_use]
    pub fn new(ranges: &[RangeInclusive<u64>]) -> IovaSpace {
        let page = PAGE_SIZE as u64;
        let mut free: Vec<(u64, u64)> = ranges
            .iter()
            .filter_map(|range| {
                let start = (*range.start()).max(page).checked_next_multiple_of(page)?;
                let end = range.end().saturating_add(1) & !(page - 1);
                (start < end).then_some((start, end))
            })
            .collect();
        free.sort_unstable();
        IovaSpace { free }
    }

    /// A window of `len` bytes (a multiple of 4096), 2 MiB aligned when it is that large.
    pub fn allocate(&mut self, len: u64) -> Option<Iova> {
        let align = if len >= LARGE_WINDOW_ALIGN {
            LARGE_WINDOW_ALIGN
        } else {
            PAGE_SIZE as u64
        };
        for i in 0..self.free.len() {
            let (start, end) = self.free[i];
            let Some(base) = start.checked_next_multiple_of(align) else {
                continue;
            };
            if end.checked_sub(base).is_none_or(|room| room < len) {
                continue;
            }
            self.take(Iova(base), len);
            return Some(Iova(base));
        }
        None
    }

    /// Takes exactly this window. `false` when not all of it is free; nothing changes then.
    fn take(&mut self, Iova(base): Iova, len: u64) -> bool {
        let Some(top) = base.checked_add(len) else {
            return false;
        };
        let holds = |(start, end): &(u64, u64)| *start <= base && top <= *end;
        let Some(i) = self.free.iter().position(holds) else {
            return false;
        };
        let (start, end) = self.free.remove(i);
        if top < end {
            self.free.insert(i, (top, end));
        }
        if start < base {
            self.free.insert(i, (start, base));
        }
        true
    }

    /// Gives a window back. Only after the domain confirmed that it is unmapped.
    pub fn release(&mut self, iova: Iova, len: u64) {
        let window = (iova.0, iova.0.saturating_add(len));
        let at = self.free.partition_point(|(start, _)| *start < window.0);
        self.free.insert(at, window);
        if let Some((_, next_end)) = self
            .free
            .get(at + 1)
            .copied()
            .filter(|next| next.0 == window.1)
        {
            self.free[at].1 = next_end;
            self.free.remove(at + 1);
        }
        if let Some(before) = at
            .checked_sub(1)
            .filter(|before| self.free[*before].1 == window.0)
        {
            self.free[before].1 = self.free[at].1;
            self.free.remove(at);
        }
    }
}

/// A window of the device onto memory of this process, for as long as this value lives; without an IOMMU, the memory
/// itself.
///
/// Dropping it unmaps. Whoever drops it has made sure that no outstanding command names it (I2). If the domain
/// refuses to unmap, window and memory are leaked and the log says so: a leak is safe, reuse is not.
pub struct DmaMapping {
    space: Arc<DmaSpace>,
    /// The first run once more: nearly always all.
    first: Run,
    runs: Box<[Run]>,
    len: u64,
    /// Of memory that is given by its physical addresses: keeps it there.
    keeper: Option<Box<dyn Any + Send + Sync>>,
    owner: Option<Box<dyn Any + Send + Sync>>,
    leaked: bool,
}

impl DmaMapping {
    /// Maps `len` bytes at `hva` (both multiples of 4096) into a fresh window; `owner` keeps the memory mapped.
    ///
    /// # Safety
    /// `hva..hva+len` must stay mapped for as long as `owner` lives, and nobody may hold a Rust reference to bytes
    /// that the device may write.
    ///
    /// # Errors
    /// [`DmaError`]; nothing stays mapped then.
    pub unsafe fn new(
        space: &Arc<DmaSpace>,
        hva: NonNull<u8>,
        len: u64,
        access: DmaAccess,
        owner: Box<dyn Any + Send + Sync>,
    ) -> Result<DmaMapping, DmaError> {
        let (runs, keeper) = match &space.physical {
            Some(physical) => {
                // SAFETY: the caller keeps the memory mapped through `owner`, which we drop after the keeper.
                let Pinned { runs, keeper } = unsafe { physical.pin(hva, len)? };
                (runs, Some(keeper))
            }
            None => {
                // SAFETY: the caller keeps the memory mapped through `owner`, which we drop only after a successful unmap.
                let iova = unsafe { space.map(hva, len, access)? };
                (vec![Run { iova, len }], None)
            }
        };
        let first = *runs.first().ok_or(DmaError::NoWindow { len })?;
        Ok(DmaMapping {
            space: Arc::clone(space),
            first,
            runs: runs.into(),
            len,
            keeper,
            owner: Some(owner),
            leaked: false,
        })
    }

    /// Lets window and memory outlive this value, for ever: the device may still use them.
    pub fn leak(&mut self) {
        self.leaked = true;
    }

    /// Where the device sees the first byte.
    #[must_use]
    pub fn iova(&self) -> Iova {
        self.first.iova
    }

    /// All of it in order, each piece contiguous for the device. One, where there is an IOMMU.
    #[must_use]
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Where the device sees `len` bytes at `offset`: what of them lies within.
    #[inline]
    fn pieces(&self, mut offset: u64, mut left: u64) -> impl Iterator<Item = Run> {
        std::iter::from_fn(move || {
            let (iova, room) = self.at(offset);
            let len = room.min(left);
            (offset, left) = (offset + len, left - len);
            (len > 0).then_some(Run { iova, len })
        })
    }

    /// Where the device sees the byte at `offset`, and how many follow there. One past the end is where the last run ends.
    #[inline]
    fn at(&self, offset: u64) -> (Iova, u64) {
        if offset < self.first.len {
            let iova = Iova(self.first.iova.0 + offset);
            return (iova, self.first.len - offset);
        }
        self.at_later(offset)
    }

    #[cold]
    fn at_later(&self, offset: u64) -> (Iova, u64) {
        let (mut before, mut end) = (0, self.first.iova);
        for run in &self.runs {
            if offset - before < run.len {
                return (
                    Iova(run.iova.0 + (offset - before)),
                    run.len - (offset - before),
                );
            }
            before += run.len;
            end = Iova(run.iova.0 + run.len);
        }
        (end, 0)
    }

    /// Bytes.
    #[must_use]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Never true: an empty mapping cannot be made.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}

impl Drop for DmaMapping {
    fn drop(&mut self) {
        if self.leaked {
            std::mem::forget((self.keeper.take(), self.owner.take()));
            return;
        }
        if self.keeper.take().is_some() {
            return; // nothing was mapped: the memory is let go of, then unmapped from this process
        }
        if let Err(error) = self.space.unmap(self.first.iova, self.len) {
            tracing::error!(%error, "memory stays reachable for the device and is leaked");
            std::mem::forget(self.owner.take());
        }
    }
}

impl fmt::Debug for DmaMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let DmaMapping {
            first, runs, len, ..
        } = self;
        write!(
            f,
            "DmaMapping({:?}, {len:#x} bytes in {} runs)",
            first.iova,
            runs.len()
        )
    }
}

/// Zeroed memory of ours that the device reaches. Never derefs: bytes go in and out by copies.
#[derive(Debug)]
pub struct DmaBuffer {
    base: NonNull<u8>,
    len: usize,
    // Holds the pages (its owner) and unmaps them from the device first.
    mapping: DmaMapping,
}

// SAFETY: the pages belong to this value alone on our side; every access goes through its methods, and sharing
// with the device is what they are for.
unsafe impl Send for DmaBuffer {}

impl DmaBuffer {
    /// At least `len` bytes, rounded up to whole pages, zeroed.
    ///
    /// # Errors
    /// [`DmaError`] when there is no memory, no window, or the domain refuses.
    pub fn new(
        space: &Arc<DmaSpace>,
        len: usize,
        access: DmaAccess,
    ) -> Result<DmaBuffer, DmaError> {
        let asked = len;
        let no_memory = |reason: String| DmaError::NoMemory {
            len: asked as u64,
            reason,
        };
        let len = len
            .max(1)
            .checked_next_multiple_of(PAGE_SIZE)
            .ok_or_else(|| no_memory("the length overflows".to_owned()))?;
        let kind = match space.physical {
            Some(_) => PageKind::Huge,
            None => PageKind::Any,
        };
        let pages = pages::allocate(len, space.numa_node(), kind)
            .map_err(|error| no_memory(error.to_string()))?;
        let base =
            NonNull::new(pages.as_mut_ptr()).ok_or_else(|| no_memory("null mapping".to_owned()))?;
        // SAFETY: `pages` stays mapped until it is dropped, the mapping owns it, and this type lends no references.
        let mapping = unsafe { DmaMapping::new(space, base, len as u64, access, Box::new(pages))? };
        Ok(DmaBuffer { base, len, mapping })
    }

    /// See [`DmaMapping::leak`].
    pub fn leak(&mut self) {
        self.mapping.leak();
    }

    /// Bytes, a multiple of 4096.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Never true.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Where the device sees the byte at `offset` (at most `len`). Without an IOMMU what follows is contiguous for the
    /// device up to the next multiple of 2 MiB only: see [`DmaBuffer::pieces`].
    ///
    /// # Panics
    /// When `offset` lies outside: a programmer's error.
    #[must_use]
    pub fn iova(&self, offset: usize) -> Iova {
        assert!(
            offset <= self.len,
            "offset {offset} in a DMA buffer of {}",
            self.len
        );
        self.mapping.at(offset as u64).0
    }

    /// Where the device sees `len` bytes at `offset`, in order: one piece, or several without an IOMMU.
    ///
    /// # Panics
    /// When they lie outside: a programmer's error.
    #[inline]
    pub fn pieces(&self, offset: usize, len: usize) -> impl Iterator<Item = Run> {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} in a DMA buffer of {}",
            self.len
        );
        self.mapping.pieces(offset as u64, len as u64)
    }

    /// Where we see the byte at `offset`. The pointer is valid for `len - offset` bytes while this buffer lives.
    ///
    /// # Panics
    /// When `offset` lies outside: a programmer's error.
    #[must_use]
    pub fn pointer(&self, offset: usize) -> NonNull<u8> {
        assert!(
            offset <= self.len,
            "offset {offset} in a DMA buffer of {}",
            self.len
        );
        // SAFETY: within (or one past) the allocation of `len` bytes.
        unsafe { self.base.add(offset) }
    }

    /// Copies bytes in.
    ///
    /// # Panics
    /// When they do not fit: a programmer's error.
    pub fn write_bytes(&mut self, offset: usize, bytes: &[u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        writes(self.pointer(offset).as_ptr(), bytes.len());
        // SAFETY: in bounds (asserted); `bytes` is ordinary memory and cannot overlap pages that nobody can borrow.
        unsafe {
            std::ptr::copy_nonoverlapping(
                bytes.as_ptr(),
                self.base.add(offset).as_ptr(),
                bytes.len(),
            )
        };
    }

    /// Copies bytes out. What the device writes meanwhile may or may not be seen.
    ///
    /// # Panics
    /// When the range lies outside: a programmer's error.
    pub fn read_bytes(&self, offset: usize, bytes: &mut [u8]) {
        assert!(offset <= self.len && bytes.len() <= self.len - offset);
        reads(self.pointer(offset).as_ptr(), bytes.len());
        // SAFETY: in bounds (asserted); `bytes` is exclusive ordinary memory.
        unsafe {
            std::ptr::copy_nonoverlapping(
                self.base.add(offset).as_ptr(),
                bytes.as_mut_ptr(),
                bytes.len(),
            )
        };
    }

    /// Copies a wire structure out.
    #[must_use]
    pub fn read<V: FromBytes + IntoBytes>(&self, offset: usize) -> V {
        let mut value = V::new_zeroed();
        self.read_bytes(offset, value.as_mut_bytes());
        value
    }

    /// Copies a wire structure in.
    pub fn write<V: IntoBytes + Immutable>(&mut self, offset: usize, value: &V) {
        self.write_bytes(offset, value.as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn allocate_with_reserved_window_never_touches_it_or_page_zero() {
        let mut space = IovaSpace::new(&[0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff]);
        let mut taken = Vec::new();
        for len in [
            0x1000_u64,
            0x8000_0000,
            0x6000_0000,
            0x20_0000,
            0x10_0000_0000,
        ] {
            let Iova(base) = space.allocate(len).unwrap();
            assert!(base >= 0x1000);
            assert!(
                base + len <= 0xfee0_0000 || base >= 0xfef0_0000,
                "{base:#x}+{len:#x}"
            );
            assert!(
                taken
                    .iter()
                    .all(|(b, l): &(u64, u64)| base + len <= *b || b + l <= base)
            );
            taken.push((base, len));
        }
    }

    #[test]
    fn release_in_any_order_gives_one_range_back() {
        for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [0, 2, 1]] {
            let mut space = IovaSpace::new(&[0x1000..=0xffff]);
            let windows: Vec<Iova> = (0..3).map(|_| space.allocate(0x5000).unwrap()).collect();
            assert_eq!(space.allocate(0x1000), None);
            for i in order {
                space.release(windows[i], 0x5000);
            }
            assert_eq!(space.free, vec![(0x1000, 0x1_0000)]);
        }
    }

    /// Memory of which each page of 4096 bytes is somewhere else, and the domain of a device that is given it so.
    #[derive(Debug, Default)]
    struct Bare {
        pinned: Arc<AtomicUsize>,
    }

    struct Pin(Arc<AtomicUsize>);

    impl Drop for Pin {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }

    impl PhysicalMemory for Bare {
        unsafe fn pin(&self, _hva: NonNull<u8>, len: u64) -> Result<Pinned, DmaError> {
            self.pinned.fetch_add(1, Ordering::Relaxed);
            let runs = (0..len / 4096).map(|page| Run {
                iova: Iova(0x10_0000 - page * 0x2000),
                len: 4096,
            });
            Ok(Pinned {
                runs: runs.collect(),
                keeper: Box::new(Pin(Arc::clone(&self.pinned))),
            })
        }
    }

    impl DmaDomain for Bare {
        fn usable_ranges(&self) -> Vec<RangeInclusive<u64>> {
            Vec::new()
        }

        unsafe fn map(
            &self,
            _iova: Iova,
            _hva: NonNull<u8>,
            _len: u64,
            _access: DmaAccess,
        ) -> Result<(), DmaError> {
            unreachable!("there is no table")
        }

        fn unmap(&self, _iova: Iova, _len: u64) -> Result<(), DmaError> {
            unreachable!("there is no table")
        }

        fn physical(&self) -> Option<Arc<dyn PhysicalMemory>> {
            Some(Arc::new(Bare {
                pinned: Arc::clone(&self.pinned),
            }))
        }
    }

    /// Three pages.
    fn mapping(space: &Arc<DmaSpace>) -> DmaMapping {
        let pages = Box::new([[0_u64; 512]; 3]);
        let hva = NonNull::from(&*pages).cast();
        // SAFETY: the box is the owner, and nobody reads or writes what is in it.
        unsafe { DmaMapping::new(space, hva, 3 * 4096, DmaAccess::Both, pages) }.unwrap()
    }

    #[test]
    fn pieces_of_scattered_memory_end_where_the_next_one_is_no_neighbour() {
        let space = DmaSpace::new(Arc::new(Bare::default()));
        assert!(space.is_physical());
        let mapping = mapping(&space);
        let pieces = |offset, len| {
            let pieces = mapping.pieces(offset, len);
            pieces
                .map(|run| (run.iova.0, run.len))
                .collect::<Vec<(u64, u64)>>()
        };
        assert_eq!(pieces(0, 4096), [(0x10_0000, 4096)]);
        assert_eq!(pieces(512, 1024), [(0x10_0200, 1024)]);
        assert_eq!(
            pieces(4095, 4098),
            [(0x10_0fff, 1), (0xf_e000, 4096), (0xf_c000, 1)]
        );
        assert_eq!(pieces(3 * 4096, 0), []);
        assert_eq!(pieces(3 * 4096 - 1, 5), [(0xf_cfff, 1)], "nothing beyond");
        for (offset, iova) in [
            (0, 0x10_0000),
            (4095, 0x10_0fff),
            (4096, 0xf_e000),
            (2 * 4096 + 8, 0xf_c008),
            (3 * 4096, 0xf_d000),
        ] {
            assert_eq!(mapping.at(offset).0, Iova(iova), "{offset}");
        }
    }

    #[test]
    fn memory_stays_pinned_while_its_device_is_lost_and_until_it_is_dropped() {
        let device = Bare::default();
        let pinned = Arc::clone(&device.pinned);
        let count = || pinned.load(Ordering::Relaxed);
        let space = DmaSpace::new(Arc::new(device));
        let first = mapping(&space);
        space.detach();
        // A guest that comes while the device is away.
        let mut second = mapping(&space);
        assert_eq!(count(), 2);
        space
            .attach(Arc::new(Bare {
                pinned: Arc::clone(&pinned),
            }))
            .unwrap();
        drop(first);
        assert_eq!(count(), 1);
        second.leak();
        drop(second);
        assert_eq!(count(), 1, "what is leaked stays pinned");
    }

    #[test]
    fn attach_of_a_device_behind_an_iommu_to_memory_without_one_is_refused_and_back() {
        #[derive(Debug)]
        struct Table;
        impl DmaDomain for Table {
            fn usable_ranges(&self) -> Vec<RangeInclusive<u64>> {
                vec![0..=0xffff_ffff]
            }
            unsafe fn map(
                &self,
                _iova: Iova,
                _hva: NonNull<u8>,
                _len: u64,
                _access: DmaAccess,
            ) -> Result<(), DmaError> {
                Ok(())
            }
            fn unmap(&self, _iova: Iova, _len: u64) -> Result<(), DmaError> {
                Ok(())
            }
        }
        let bare = DmaSpace::new(Arc::new(Bare::default()));
        let isolated = DmaSpace::new(Arc::new(Table));
        let errors = [
            bare.attach(Arc::new(Table)).unwrap_err(),
            isolated.attach(Arc::new(Bare::default())).unwrap_err(),
        ];
        assert_eq!(
            errors.map(|error| error.to_string()),
            [
                "the device was not behind an IOMMU and is behind one now",
                "the device was behind an IOMMU and is not behind one now"
            ]
        );
        assert!(!isolated.is_physical());
    }

    #[test]
    fn allocate_of_more_than_is_left_returns_none() {
        let mut space = IovaSpace::new(&[0x1000..=0x2fff]);
        assert_eq!(space.allocate(0x3000), None);
        assert!(space.allocate(0x2000).is_some());
    }
}
