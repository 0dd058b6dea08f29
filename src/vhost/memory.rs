//! A front-end's memory table: maps its file descriptors into this process, once, and into the DMA windows of each device
//! that its requests are for.
//!
//! Without an IOMMU the device is told where guest memory is, which must lie in huge pages then: each piece that is
//! contiguous for the device becomes a region of its own for the data path, which knows buffers that cross regions.
//!
//! Control path only. The data path gets an immutable [`GuestMemory`] made from it; a changed table makes a new one
//! (the session quiesces its queues in between). A region is unmapped when the last `GuestMemory` that names it is
//! gone, and no queue gives its `GuestMemory` up before it has drained (I2). Start at [`MemoryTable::add`].

use std::fs::File;
use std::ptr::NonNull;
use std::sync::Arc;

use nvme_driver::dma::{DmaAccess, DmaError, DmaMapping, DmaSpace};
use nvme_driver::fault::{FaultGuard, Lost, Poisoned};
use vhost::vhost_user::message::VhostUserMemoryRegion;
use vm_memory::{FileOffset, MmapRegion};

use super::huge;
use crate::virtio::memory::{Gpa, GuestMemory, GuestRegion, RegionError};

/// The most regions of one table. QEMU's own limit for a vhost-user device is lower (512 with memory slots).
pub const MAX_REGIONS: usize = 256;

const PAGE: u64 = 4096;

/// Where a front-end says one of its regions is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionInfo {
    /// Guest physical address of the first byte.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Address of the first byte in the front-end's own address space: ring addresses are given in it.
    pub user_addr: u64,
    /// Where the region starts in its file.
    pub mmap_offset: u64,
}

impl From<&VhostUserMemoryRegion> for RegionInfo {
    fn from(region: &VhostUserMemoryRegion) -> RegionInfo {
        RegionInfo {
            gpa: region.guest_phys_addr,
            size: region.memory_size,
            user_addr: region.user_addr,
            mmap_offset: region.mmap_offset,
        }
    }
}

/// Why a region was refused. The connection ends with it.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// Addresses that wrap, overlap, or are not page aligned; too many regions.
    #[error("memory region gpa {gpa:#x} size {size:#x}: {reason}")]
    Invalid {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// What is wrong with it.
        reason: String,
    },
    /// The device cannot reach it.
    #[error("cannot map guest region gpa {gpa:#x} size {size:#x} for DMA: {error}")]
    Dma {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// What the domain said.
        error: DmaError,
    },
    /// Ordinary pages, and nothing that translates addresses for the device.
    #[error(
        "guest region gpa {gpa:#x} size {size:#x} is not in huge pages ({found}), and the SSD is served without an IOMMU: the \
         kernel may move ordinary pages while the SSD writes to where they were. Give the guest huge pages: QEMU's -object \
         memory-backend-memfd,hugetlb=on,hugetlbsize=2M,share=on,... (scripts/setup-vfio hugepages N reserves some)"
    )]
    OrdinaryPages {
        /// Guest physical address.
        gpa: u64,
        /// Bytes.
        size: u64,
        /// What the file is.
        found: String,
    },
    /// The table as a whole.
    #[error("memory table: {0}")]
    Table(#[from] RegionError),
}

/// One region: mapped here and for the device. Dropping it unmaps from the device first.
#[derive(Debug)]
struct Region {
    info: RegionInfo,
    hva: NonNull<u8>,
    /// Turns a SIGBUS on these pages (the front-end shrank its file) into this session's end. Stands before `dma`,
    /// the last drop of which unmaps the pages: fields are dropped in this order.
    _guard: FaultGuard,
    /// By device.
    dma: Box<[DmaMapping]>,
}

// SAFETY: `hva` points into the mapping that each of `dma` owns; nothing here reads or writes through it.
unsafe impl Send for Region {}
// SAFETY: as above; all methods take `&self` and only compute addresses.
unsafe impl Sync for Region {}

impl Region {
    /// What the data path sees: a region for each piece that is contiguous for a device, up to where the region ends.
    fn runs(&self, device: usize) -> impl Iterator<Item = GuestRegion> {
        let mut offset = 0;
        let runs = self.dma.get(device).map(DmaMapping::runs);
        runs.into_iter().flatten().map(move |run| {
            let at = offset;
            offset += run.len;
            GuestRegion {
                // Does not wrap: the region's end was checked.
                gpa: Gpa(self.info.gpa + at),
                // The last page may be the region's in part; the run begins before its end.
                len: run.len.min(self.info.size.saturating_sub(at)),
                // SAFETY: the runs are together as long as the region's mapping, so this lies within it.
                hva: unsafe { self.hva.add(usize::try_from(at).unwrap_or(0)) },
                dma: run.iova.0,
            }
        })
    }
}

/// All regions of one session.
#[derive(Debug)]
pub struct MemoryTable {
    /// By device.
    spaces: Box<[Arc<DmaSpace>]>,
    poisoned: Poisoned,
    regions: Vec<Arc<Region>>,
}

impl MemoryTable {
    /// An empty table whose regions will be mapped for the devices of `spaces`.
    #[must_use]
    pub fn new(spaces: impl IntoIterator<Item = Arc<DmaSpace>>) -> MemoryTable {
        MemoryTable {
            spaces: spaces.into_iter().collect(),
            poisoned: Poisoned::default(),
            regions: Vec::new(),
        }
    }

    /// The front-end shrank a file under us: the session must end.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.is_set()
    }

    /// No region is shared yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Forgets every region. Those that a queue still uses stay mapped until it has drained.
    pub fn clear(&mut self) {
        self.regions.clear();
    }

    /// Maps one more region.
    ///
    /// # Errors
    /// [`TableError`]; the table is as before then.
    pub fn add(&mut self, info: RegionInfo, file: File) -> Result<(), TableError> {
        let refuse = |reason: &str| TableError::Invalid {
            gpa: info.gpa,
            size: info.size,
            reason: reason.to_owned(),
        };
        let end = |start: u64| {
            start
                .checked_add(info.size)
                .ok_or_else(|| refuse("its end wraps around"))
        };
        if info.size == 0 {
            return Err(refuse("it is empty"));
        }
        let (gpa_end, user_end, file_end) =
            (end(info.gpa)?, end(info.user_addr)?, end(info.mmap_offset)?);
        if !info.mmap_offset.is_multiple_of(PAGE) || !info.gpa.is_multiple_of(PAGE) {
            return Err(refuse("address and file offset must be multiples of 4096"));
        }
        if self.regions.len() >= MAX_REGIONS {
            return Err(refuse(&format!(
                "the table already holds {MAX_REGIONS} regions"
            )));
        }
        for other in &self.regions {
            let other = &other.info;
            if info.gpa < other.gpa + other.size && other.gpa < gpa_end {
                return Err(refuse(&format!(
                    "it overlaps the region at gpa {:#x}",
                    other.gpa
                )));
            }
            if info.user_addr < other.user_addr + other.size && other.user_addr < user_end {
                return Err(refuse(&format!(
                    "its user address overlaps the region at gpa {:#x}",
                    other.gpa
                )));
            }
        }
        // A region larger than its file would be SIGBUS on first touch.
        let file_size = file
            .metadata()
            .map_err(|error| refuse(&format!("cannot stat its file: {error}")))?
            .len();
        if file_end > file_size {
            return Err(refuse(&format!(
                "its file has only {file_size:#x} bytes, {file_end:#x} are needed"
            )));
        }
        let size =
            usize::try_from(info.size).map_err(|_| refuse("it does not fit this process"))?;
        let pages = huge::pages_of(&file)
            .map_err(|error| refuse(&format!("cannot ask which pages its file has: {error}")))?;
        if let Some(pages) = pages.huge() {
            // The kernel maps whole huge pages, and unmaps nothing less.
            if !info.size.is_multiple_of(pages) || !info.mmap_offset.is_multiple_of(pages) {
                return Err(refuse(&format!(
                    "size and file offset must be multiples of its file's huge pages of {pages:#x} bytes"
                )));
            }
        } else if self.spaces.iter().any(|space| space.is_physical()) {
            return Err(TableError::OrdinaryPages {
                gpa: info.gpa,
                size: info.size,
                found: pages.to_string(),
            });
        }
        let mapping = MmapRegion::<()>::from_file(FileOffset::new(file, info.mmap_offset), size)
            .map_err(|error| refuse(&format!("cannot map its file: {error}")))?;
        let hva = NonNull::new(mapping.as_ptr()).ok_or_else(|| refuse("mapped at address 0"))?;
        let guard = FaultGuard::register(hva, size, &self.poisoned, Lost::Zeroes)
            .ok_or_else(|| refuse("too many guest regions are mapped in this process"))?;
        // A front-end's last page may be one in part: all of it is mapped here, and for the device, which is told of no
        // address behind `size`.
        let whole_pages = info.size.next_multiple_of(PAGE);
        let mapping = Arc::new(mapping);
        let map = |space: &Arc<DmaSpace>| {
            let owner = Box::new(Arc::clone(&mapping));
            // SAFETY: `mapping` keeps the pages mapped and is owned by each DMA mapping; guest memory is never lent as a
            // Rust reference (I1).
            unsafe { DmaMapping::new(space, hva, whole_pages, DmaAccess::Both, owner) }
        };
        let dma = self.spaces.iter().map(map).collect::<Result<Box<[_]>, _>>();
        let dma = dma.map_err(|error| TableError::Dma {
            gpa: info.gpa,
            size: info.size,
            error,
        })?;
        for (space, dma) in self.spaces.iter().zip(&dma) {
            if space.is_physical() {
                tracing::info!(
                    gpa = format_args!("{:#x}", info.gpa),
                    size = format_args!("{:#x}", info.size),
                    %pages,
                    runs = dma.runs().len(),
                    "guest memory by its physical addresses"
                );
            }
        }
        self.regions.push(Arc::new(Region {
            info,
            hva,
            _guard: guard,
            dma,
        }));
        Ok(())
    }

    /// Forgets the region with this guest address, user address and size.
    ///
    /// # Errors
    /// When there is no such region.
    pub fn remove(&mut self, info: RegionInfo) -> Result<(), TableError> {
        let same = |region: &Arc<Region>| {
            (region.info.gpa, region.info.user_addr, region.info.size)
                == (info.gpa, info.user_addr, info.size)
        };
        let at = self
            .regions
            .iter()
            .position(same)
            .ok_or_else(|| TableError::Invalid {
                gpa: info.gpa,
                size: info.size,
                reason: "it is to be removed but is not in the table".to_owned(),
            })?;
        self.regions.remove(at);
        Ok(())
    }

    /// The table as the data path wants it that serves `device`, an index into the spaces. Holds every region until the last
    /// clone is dropped. Pages are at the same places in this process whichever device it is for.
    ///
    /// # Errors
    /// [`TableError::Table`] when there is no region at all.
    pub fn snapshot(&self, device: usize) -> Result<Arc<GuestMemory>, TableError> {
        let regions = self.regions.iter().flat_map(|region| region.runs(device));
        // SAFETY: the regions are mapped as they say, and the owner keeps them so.
        let memory =
            unsafe { GuestMemory::new(regions.collect(), Box::new(self.regions.clone()))? };
        Ok(Arc::new(memory))
    }

    /// Where `len` bytes at the front-end's address `user` are in this process: wholly inside one region, or `None`.
    #[must_use]
    pub fn resolve_user(&self, user: u64, len: u64) -> Option<NonNull<u8>> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.info.user_addr)?;
            let end = offset.checked_add(len)?;
            let offset = usize::try_from(offset).ok()?;
            // SAFETY: `offset + len` lies within the region's mapping (checked here).
            (end <= region.info.size).then(|| unsafe { region.hva.add(offset) })
        })
    }
}
