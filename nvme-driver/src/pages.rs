//! Pages for DMA buffers: huge pages for the large ones where the system has some, near the device where that can be
//! asked for. Falls back to ordinary pages, and says so once; for a device without an IOMMU only huge pages will do.

use std::ffi::c_void;
use std::io;
use std::sync::Once;

use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::mm::{Advice, madvise};

use crate::spec::PAGE_SIZE;

const HUGE_PAGE: usize = 2 << 20;
/// Smaller buffers would waste most of a huge page.
const LEAST_FOR_HUGE: usize = 1 << 20;

/// What pages a buffer may lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PageKind {
    /// Huge ones for a large buffer, if there are some.
    Any,
    /// Those that the kernel does not move about: huge ones, whatever the size.
    Huge,
}

/// `len` bytes (a multiple of 4096) of zeroes, all of them there, and never swapped out once the device's IOMMU has
/// them.
pub(crate) fn allocate(len: usize, node: Option<u32>, kind: PageKind) -> io::Result<MmapRaw> {
    debug_assert!(len.is_multiple_of(PAGE_SIZE));
    if kind == PageKind::Huge {
        return allocate_huge(len, node).map_err(|error| {
            let pages = len.div_ceil(HUGE_PAGE);
            io::Error::new(
                error.kind(),
                format!(
                    "{error}: without an IOMMU the driver's buffers lie in huge pages of 2 MiB, of which {pages} more must \
                     be free (scripts/setup-vfio hugepages N reserves some)"
                ),
            )
        });
    }
    if len >= LEAST_FOR_HUGE {
        match allocate_huge(len, node) {
            Ok(pages) => return Ok(pages),
            Err(error) => {
                static ONCE: Once = Once::new();
                ONCE.call_once(|| {
                    tracing::info!(%error, "no 2 MiB huge pages for DMA buffers: ordinary pages do (scripts/setup-vfio hugepages N reserves some)");
                });
            }
        }
    }
    let pages = MmapRaw::from(MmapOptions::new().len(len).map_anon()?);
    place(&pages, node)?;
    Ok(pages)
}

/// From the system's pool: a file of whole huge pages, of which `len` bytes are used. (A mapping whose length is no
/// multiple of the page size could not be unmapped.)
fn allocate_huge(len: usize, node: Option<u32>) -> io::Result<MmapRaw> {
    let len = len.next_multiple_of(HUGE_PAGE);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = memfd_create("tandem-dma", flags)?;
    ftruncate(&file, len as u64)?;
    // Mapping reserves the pages: this, not the first touch, fails when there are too few.
    let pages = MmapOptions::new().len(len).map_raw(&file)?;
    place(&pages, node)?;
    Ok(pages)
}

/// Asks for pages of `node`, then for the pages.
fn place(pages: &MmapRaw, node: Option<u32>) -> io::Result<()> {
    let start = pages.as_mut_ptr().cast::<c_void>();
    if let Some(node) = node {
        prefer_node(start, pages.len(), node);
    }
    // SAFETY: the range is `pages`, which nobody else knows yet; populating changes no contents.
    unsafe { madvise(start, pages.len(), Advice::LinuxPopulateWrite) }?;
    Ok(())
}

/// A wish: the system may have no memory left there, or no NUMA at all.
fn prefer_node(start: *mut c_void, len: usize, node: u32) {
    const MPOL_PREFERRED: libc::c_int = 1;
    const WORD: u32 = u64::BITS;
    let mut mask = [0_u64; 16];
    let Some(word) = mask.get_mut((node / WORD) as usize) else {
        return;
    };
    *word = 1 << (node % WORD);
    let bits = mask.len() as u64 * u64::from(WORD);
    // SAFETY: `start..start+len` is a mapping of ours; the mask has as many bits as is said.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mbind,
            start,
            len,
            MPOL_PREFERRED,
            mask.as_ptr(),
            bits,
            0_u32,
        )
    };
    if result != 0 {
        let error = io::Error::last_os_error();
        tracing::debug!(node, %error, "cannot ask for memory of the device's NUMA node");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn first_and_last(pages: &MmapRaw, len: usize) -> (u8, u8) {
        // SAFETY: within the mapping, which is ours alone.
        unsafe {
            (
                pages.as_ptr().read_volatile(),
                pages.as_ptr().add(len - 1).read_volatile(),
            )
        }
    }

    #[test]
    fn allocate_with_and_without_huge_pages_gives_zeroes() {
        // Whether the pool has pages depends on the machine; either way the bytes must be there.
        for len in [PAGE_SIZE, HUGE_PAGE, HUGE_PAGE + PAGE_SIZE] {
            let pages = allocate(len, Some(0), PageKind::Any).unwrap();
            assert!(pages.len() >= len);
            assert_eq!(first_and_last(&pages, len), (0, 0));
        }
    }

    #[test]
    fn allocate_of_huge_pages_only_never_falls_back() {
        // More than any machine has.
        let error = allocate(1 << 46, None, PageKind::Huge).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("setup-vfio hugepages"), "{text}");
        assert!(text.contains("of which 33554432 more"), "{text}");
    }

    #[test]
    fn allocate_near_a_node_that_is_not_there_still_gives_memory() {
        for node in [63, 64, 1023, 1024, u32::MAX] {
            let pages = allocate(PAGE_SIZE, Some(node), PageKind::Any).unwrap();
            assert_eq!(first_and_last(&pages, PAGE_SIZE), (0, 0));
        }
    }
}
