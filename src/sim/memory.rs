//! Guest memory on the heap: what a memfd is in production.

use crate::virtio::memory::{Gpa, GuestMemory, GuestRegion, RegionError};
use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;

/// Alignment of a region, as a mapping would have it.
const PAGE_BYTES: usize = 4096;

/// A region to allocate.
#[derive(Debug, Clone, Copy)]
pub struct SimRegion {
    /// Where the guest sees it.
    pub gpa: Gpa,
    /// Length in bytes.
    pub len: u64,
    /// Where the device sees it.
    pub dma: u64,
}

/// One zeroed heap allocation, freed on drop.
struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block is only an allocation to be freed; whose bytes are shared is settled by `GuestMemory`.
unsafe impl Send for Block {}
// SAFETY: as above; a shared block offers nothing.
unsafe impl Sync for Block {}

impl Block {
    /// `None` for a length the allocator cannot be asked for.
    fn new(len: u64) -> Option<Self> {
        let len = usize::try_from(len).ok().filter(|len| *len > 0)?;
        let layout = Layout::from_size_align(len, PAGE_BYTES).ok()?;
        // SAFETY: the layout has a non-zero size (filtered above).
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else {
            handle_alloc_error(layout)
        };
        Some(Self { start, layout })
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: allocated with this layout in `new`, and freed once.
        unsafe { dealloc(self.start.as_ptr(), self.layout) };
    }
}

/// Guest memory on the heap, one allocation per region. Every user of a simulated guest holds the memory
/// together with what was resolved from it, as the contract of [`GuestMemory::new`] asks.
///
/// # Errors
/// As [`GuestMemory::new`]; also [`RegionError::Empty`] or [`RegionError::Wraps`] for lengths that cannot be
/// allocated.
pub fn heap_memory(regions: &[SimRegion]) -> Result<GuestMemory, RegionError> {
    let mut table = Vec::with_capacity(regions.len());
    let mut blocks = Vec::with_capacity(regions.len());
    for &SimRegion { gpa, len, dma } in regions {
        let block = Block::new(len).ok_or(match len {
            0 => RegionError::Empty(gpa),
            _ => RegionError::Wraps { gpa, len },
        })?;
        table.push(GuestRegion {
            gpa,
            len,
            hva: block.start,
            dma,
        });
        blocks.push(block);
    }
    // SAFETY: each region is an allocation of its length that lives in the owner; only raw pointers to it exist.
    unsafe { GuestMemory::new(table, Box::new(blocks)) }
}
