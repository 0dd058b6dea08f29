//! Memory by its physical addresses, for a device without an IOMMU: where each page is, that it is one that the kernel
//! does not move about by itself, and that it stays ours until it is let go of.
//!
//! Three things of the kernel together, since none is enough:
//! - huge pages (hugetlb), which are neither swapped out nor compacted, and long enough that memory is in few pieces;
//! - a pin: the pages are registered as buffers of an io_uring that does nothing else. A pinned page does not migrate,
//!   and one that its file gives up (a front-end punches a hole in guest memory) is nobody else's while it is pinned;
//! - `/proc/self/pagemap`, read after the pin. Only a page fault of this process could put another page in the place of
//!   one that was pinned, and nobody touches the memory before [`PhysicalMemory::pin`] has returned. One thing is left:
//!   whole GiB of hugetlb memory may have their page tables in common with the process that shares it, whose faults
//!   count too then. One that exchanged pages in that very moment could be given a page that is not pinned: without an
//!   IOMMU a front-end's process (not its guest) is trusted that far.
//!
//! What an address means is the machine's affair: here a physical address is a bus address, as on every PC.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use crate::spec::PAGE_SIZE;
use crate::transport::{DmaError, Iova, PhysicalMemory, Pinned, Run};

const PAGE: u64 = PAGE_SIZE as u64;
/// The smallest huge page.
const HUGE_PAGE: u64 = 2 << 20;
/// Entries of the page map that are read at once: those of 256 MiB.
const BATCH: usize = 64 << 10;
/// What one buffer of an io_uring may hold, and how many it may have.
const MOST_BYTES: u64 = 1 << 30;
const MOST_BUFFERS: u64 = 1 << 14;

/// An entry of `/proc/self/pagemap`, as the kernel's Documentation/admin-guide/mm/pagemap.rst has it.
const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;
/// KPF_HUGE in `/proc/kpageflags`: a part of a hugetlb page.
const KPF_HUGE: u64 = 1 << 17;

/// This process's memory.
#[derive(Debug)]
pub(super) struct OwnMemory {
    pagemap: File,
    flags: File,
}

impl OwnMemory {
    /// Opens what the kernel says of pages, and makes sure that it says it to us.
    pub(super) fn open() -> Result<OwnMemory, String> {
        let open = |path: &str| {
            File::open(path).map_err(|error| {
                format!(
                    "cannot read {path}: {error} (physical addresses need root, or CAP_SYS_ADMIN)"
                )
            })
        };
        Ok(OwnMemory {
            pagemap: open("/proc/self/pagemap")?,
            flags: open("/proc/kpageflags")?,
        })
    }

    /// The runs of `len` bytes at `address`.
    fn runs(&self, address: u64, len: u64) -> Result<Vec<Run>, String> {
        let mut runs = Runs::default();
        let mut entries = vec![0; BATCH * 8];
        let (mut page, mut left) = (address / PAGE, len / PAGE);
        while left > 0 {
            let count = left.min(BATCH as u64);
            // At most BATCH, so it fits.
            let bytes = usize::try_from(count * 8).unwrap_or(0);
            let bytes = entries.get_mut(..bytes).unwrap_or_default();
            self.pagemap
                .read_exact_at(bytes, page * 8)
                .map_err(|error| format!("cannot read /proc/self/pagemap: {error}"))?;
            for entry in bytes.as_chunks().0 {
                runs.push(u64::from_ne_bytes(*entry))?;
            }
            page += count;
            left -= count;
        }
        Ok(runs.0)
    }

    /// Every page of these runs is a part of a huge page. A huge page is aligned to its size: one look at each 2 MiB is
    /// enough.
    fn check_huge(&self, runs: &[Run]) -> Result<(), String> {
        for run in runs {
            let mut at = run.iova.0;
            while at < run.iova.0 + run.len {
                let mut flags = [0; 8];
                self.flags
                    .read_exact_at(&mut flags, at / PAGE * 8)
                    .map_err(|error| format!("cannot read /proc/kpageflags: {error}"))?;
                if u64::from_ne_bytes(flags) & KPF_HUGE == 0 {
                    return Err(format!(
                        "the page at physical address {at:#x} is an ordinary one, which the kernel may move: huge pages \
                         are needed (hugetlb)"
                    ));
                }
                at = (at / HUGE_PAGE + 1) * HUGE_PAGE;
            }
        }
        Ok(())
    }
}

impl PhysicalMemory for OwnMemory {
    unsafe fn pin(&self, hva: NonNull<u8>, len: u64) -> Result<Pinned, DmaError> {
        let refused = |reason: String| DmaError::NotPhysical { len, reason };
        // SAFETY: the caller keeps the memory mapped while the pin lives.
        let pin = unsafe { pin(hva, len) }.map_err(|error| refused(explain_pin(&error)))?;
        let runs = self
            .runs(hva.addr().get() as u64, len)
            .and_then(|runs| self.check_huge(&runs).map(|()| runs))
            .map_err(refused)?;
        tracing::debug!(len, runs = runs.len(), "memory by its physical addresses");
        Ok(Pinned {
            runs,
            keeper: Box::new(pin),
        })
    }
}

/// Consecutive pages of ours, put together where they are consecutive in physical memory too.
#[derive(Debug, Default)]
struct Runs(Vec<Run>);

impl Runs {
    /// One more page, by its entry of the page map.
    fn push(&mut self, entry: u64) -> Result<(), String> {
        if entry & PRESENT == 0 {
            return Err("a page went away while it was looked for: its file was made smaller, or has a hole".to_owned());
        }
        let frame = entry & FRAME;
        if frame == 0 {
            return Err(
                "the kernel does not tell this process its physical addresses: it needs CAP_SYS_ADMIN (run it as root, \
                 outside of user namespaces)"
                    .to_owned(),
            );
        }
        let at = frame * PAGE;
        match self.0.last_mut() {
            Some(run) if run.iova.0 + run.len == at => run.len += PAGE,
            _ => self.0.push(Run {
                iova: Iova(at),
                len: PAGE,
            }),
        }
        Ok(())
    }
}

/// What the pin's buffers are: at most 1 GiB each. `None` for more than there may be.
fn buffers(base: u64, len: u64) -> Option<Vec<(u64, u64)>> {
    if len.div_ceil(MOST_BYTES) > MOST_BUFFERS {
        return None;
    }
    let starts = (0..len).step_by(usize::try_from(MOST_BYTES).ok()?);
    Some(
        starts
            .map(|start| (base + start, MOST_BYTES.min(len - start)))
            .collect(),
    )
}

/// Pins `len` bytes at `hva` until the result is dropped. Pages that are not there yet are made.
///
/// # Safety
/// They stay mapped meanwhile.
unsafe fn pin(hva: NonNull<u8>, len: u64) -> io::Result<OwnedFd> {
    const IORING_REGISTER_BUFFERS: u32 = 0;
    let base = hva.addr().get() as u64;
    let vectors: Vec<libc::iovec> = buffers(base, len)
        .ok_or_else(|| io::Error::other("it is more than 16 TiB"))?
        .into_iter()
        .map(|(start, len)| {
            // Within `len` bytes of this process's memory, so both fit.
            let offset = usize::try_from(start - base).unwrap_or(0);
            libc::iovec {
                iov_base: hva.as_ptr().wrapping_add(offset).cast(),
                iov_len: usize::try_from(len).unwrap_or(0),
            }
        })
        .collect();
    // struct io_uring_params: 120 bytes, of which zeroes ask for nothing special.
    let mut parameters = [0_u64; 15];
    // SAFETY: one entry, and a structure of the size that the kernel fills in.
    let ring = unsafe { libc::syscall(libc::SYS_io_uring_setup, 1, parameters.as_mut_ptr()) };
    if ring < 0 {
        return Err(io::Error::last_os_error());
    }
    // A descriptor fits.
    let ring = i32::try_from(ring).unwrap_or(-1);
    // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
    let ring = unsafe { OwnedFd::from_raw_fd(ring) };
    // SAFETY: the vectors name memory that the caller keeps mapped; the kernel reads as many as is said.
    let done = unsafe {
        libc::syscall(
            libc::SYS_io_uring_register,
            ring.as_raw_fd(),
            IORING_REGISTER_BUFFERS,
            vectors.as_ptr(),
            vectors.len(),
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(ring)
}

fn explain_pin(error: &io::Error) -> String {
    let what = match error.raw_os_error() {
        Some(libc::ENOSYS | libc::EPERM) => {
            ": io_uring holds pages in their place and is switched off here (sysctl kernel.io_uring_disabled, or the \
             container's seccomp profile)"
        }
        Some(libc::ENOMEM) => {
            ": memory that a device reaches is locked, and RLIMIT_MEMLOCK or the machine has no more"
        }
        Some(libc::EFAULT) => ": its pages are not there, or too few huge pages are free",
        Some(libc::EOPNOTSUPP) => {
            ": its pages are of a file system that does not hold still (huge pages are needed)"
        }
        _ => "",
    };
    format!("cannot pin it: {error}{what}")
}

#[cfg(test)]
mod tests {
    use memmap2::MmapOptions;

    use super::*;

    /// What the page map says of pages at these frames.
    fn runs_of(frames: &[u64]) -> Result<Vec<(u64, u64)>, String> {
        let mut runs = Runs::default();
        for frame in frames {
            // Soft-dirty and file-mapped, as the kernel adds.
            runs.push(PRESENT | 1 << 61 | 1 << 55 | frame)?;
        }
        Ok(runs.0.iter().map(|run| (run.iova.0, run.len)).collect())
    }

    #[test]
    fn runs_of_consecutive_frames_are_merged_and_of_others_are_not() {
        assert_eq!(runs_of(&[]).unwrap(), []);
        assert_eq!(runs_of(&[7]).unwrap(), [(0x7000, 0x1000)]);
        let two_huge_pages: Vec<u64> = (0x800..0xc00).collect();
        assert_eq!(runs_of(&two_huge_pages).unwrap(), [(0x80_0000, 0x40_0000)]);
        // Backwards, with a gap, and the same frame again (one page mapped twice).
        assert_eq!(
            runs_of(&[9, 8, 10, 11, 11]).unwrap(),
            [
                (0x9000, 0x1000),
                (0x8000, 0x1000),
                (0xa000, 0x2000),
                (0xb000, 0x1000)
            ]
        );
        // The highest frame that an entry can name.
        assert_eq!(
            runs_of(&[FRAME >> 3]).unwrap(),
            [((FRAME >> 3) * PAGE, PAGE)]
        );
    }

    #[test]
    fn runs_of_an_absent_or_hidden_page_say_why() {
        let mut runs = Runs::default();
        // Swapped out: a swap entry in the place of the frame.
        let error = runs.push(1 << 62 | 0x1234).unwrap_err();
        assert!(error.contains("went away"), "{error}");
        let error = runs.push(PRESENT).unwrap_err();
        assert!(error.contains("CAP_SYS_ADMIN"), "{error}");
        assert!(runs.0.is_empty(), "{runs:?}");
    }

    #[test]
    fn buffers_of_a_pin_cover_everything_in_pieces_of_a_gibibyte() {
        const GIB: u64 = 1 << 30;
        assert_eq!(buffers(0x1000, 0x2000), Some(vec![(0x1000, 0x2000)]));
        assert_eq!(buffers(0, GIB), Some(vec![(0, GIB)]));
        assert_eq!(
            buffers(4096, 2 * GIB + 4096),
            Some(vec![(4096, GIB), (4096 + GIB, GIB), (4096 + 2 * GIB, 4096)])
        );
        assert_eq!(buffers(0, (MOST_BUFFERS << 30) + 1), None);
    }

    #[test]
    fn pin_of_ordinary_memory_is_refused_whatever_this_process_may_see() {
        // Without privileges the addresses are hidden; with them the pages are seen to be ordinary.
        let Ok(memory) = OwnMemory::open() else {
            return; // the kernel shows the page flags to root only: nothing to ask
        };
        let pages = MmapOptions::new().len(1 << 16).map_anon().unwrap();
        let hva = NonNull::new(pages.as_ptr().cast_mut()).unwrap();
        // SAFETY: `pages` lives until the end of the test, and nobody reads or writes it.
        let error = unsafe { memory.pin(hva, 1 << 16) }.unwrap_err().to_string();
        assert!(
            ["ordinary", "CAP_SYS_ADMIN", "cannot pin"]
                .iter()
                .any(|reason| error.contains(reason)),
            "{error}"
        );
    }
}
