//! The IOMMU's table for one VFIO container: which I/O virtual addresses the kernel lets us use, and the two calls that
//! change it; and what stands in its place without an IOMMU. vfio-ioctls maps read-write only and does not report the ranges, so these three calls are made here.

use std::fmt;
use std::io;
use std::mem::size_of;
use std::ops::RangeInclusive;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_DMA_MAP_FLAG_READ, VFIO_DMA_MAP_FLAG_WRITE, VFIO_IOMMU_INFO_CAPS,
    VFIO_IOMMU_INFO_PGSIZES, VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE, VFIO_TYPE,
    vfio_iommu_type1_dma_map, vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info,
};
use vfio_ioctls::VfioContainer;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::ioctl_io_nr;

use super::physical::OwnMemory;
use crate::spec::PAGE_SIZE;
use crate::transport::{DmaAccess, DmaDomain, DmaError, Iova, PhysicalMemory};

ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 14);

/// VFIO_IOMMU_TYPE1_INFO_DMA_AVAIL: vfio-bindings has the structure but not its number.
const CAP_DMA_AVAIL: u16 = 3;
/// Room for the answer to GET_INFO: a header, and a range for each hole. Real machines report a handful.
const INFO_BYTES: u32 = 4096;

/// One container's table. All devices of one IOMMU group share it.
pub(super) struct Type1Domain {
    container: Arc<VfioContainer>,
    ranges: Vec<RangeInclusive<u64>>,
    numa_node: Option<u32>,
}

/// What VFIO_IOMMU_GET_INFO says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Info {
    /// Page sizes, one bit each.
    page_sizes: u64,
    /// What a device may be given; the interrupt window is left out by the kernel.
    ranges: Vec<RangeInclusive<u64>>,
    /// Mappings that one more could be added to.
    entries: Option<u32>,
}

impl Type1Domain {
    /// The table of `container`, which has its group and its IOMMU type.
    pub(super) fn new(
        container: Arc<VfioContainer>,
        numa_node: Option<u32>,
    ) -> Result<Type1Domain, String> {
        let info = read_info(&container)?;
        if info.page_sizes & PAGE_SIZE as u64 == 0 {
            return Err(format!(
                "the IOMMU has no pages of {PAGE_SIZE} bytes (page sizes {:#x})",
                info.page_sizes
            ));
        }
        if info.ranges.is_empty() {
            return Err("the kernel does not say which I/O virtual addresses can be used: Linux 5.4 or later does".to_owned());
        }
        tracing::debug!(ranges = ?info.ranges, entries = info.entries, "IOMMU");
        Ok(Type1Domain {
            container,
            ranges: info.ranges,
            numa_node,
        })
    }
}

impl DmaDomain for Type1Domain {
    fn usable_ranges(&self) -> Vec<RangeInclusive<u64>> {
        self.ranges.clone()
    }

    unsafe fn map(
        &self,
        iova: Iova,
        hva: NonNull<u8>,
        len: u64,
        access: DmaAccess,
    ) -> Result<(), DmaError> {
        let flag = |allowed: bool, flag: u32| if allowed { flag } else { 0 };
        let request = vfio_iommu_type1_dma_map {
            argsz: size_u32::<vfio_iommu_type1_dma_map>(),
            flags: flag(access.allows_read(), VFIO_DMA_MAP_FLAG_READ)
                | flag(access.allows_write(), VFIO_DMA_MAP_FLAG_WRITE),
            vaddr: hva.as_ptr().addr() as u64,
            iova: iova.0,
            size: len,
        };
        // SAFETY: the structure is as the kernel wants it; the caller keeps the memory mapped until `unmap`.
        let result = unsafe { ioctl_with_ref(&*self.container, VFIO_IOMMU_MAP_DMA(), &request) };
        if result == 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        Err(DmaError::Refused {
            action: "map",
            iova: iova.0,
            len,
            reason: explain_map(&error, &self.container),
        })
    }

    fn unmap(&self, iova: Iova, len: u64) -> Result<(), DmaError> {
        let mut request = vfio_iommu_type1_dma_unmap {
            argsz: size_u32::<vfio_iommu_type1_dma_unmap>(),
            iova: iova.0,
            size: len,
            ..vfio_iommu_type1_dma_unmap::default()
        };
        let refused = |reason: String| DmaError::Refused {
            action: "unmap",
            iova: iova.0,
            len,
            reason,
        };
        // SAFETY: the structure is as the kernel wants it; it writes back the size that it has unmapped.
        let result =
            unsafe { ioctl_with_mut_ref(&*self.container, VFIO_IOMMU_UNMAP_DMA(), &mut request) };
        if result != 0 {
            return Err(refused(io::Error::last_os_error().to_string()));
        }
        if request.size != len {
            return Err(refused(format!(
                "the kernel unmapped {:#x} bytes instead",
                request.size
            )));
        }
        Ok(())
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }
}

impl fmt::Debug for Type1Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Type1Domain")
            .field("ranges", &self.ranges)
            .finish_non_exhaustive()
    }
}

/// No table at all: the device is given physical addresses.
#[derive(Debug)]
pub(super) struct NoIommuDomain {
    memory: Arc<OwnMemory>,
    numa_node: Option<u32>,
}

impl NoIommuDomain {
    pub(super) fn new(numa_node: Option<u32>) -> Result<NoIommuDomain, String> {
        Ok(NoIommuDomain {
            memory: Arc::new(OwnMemory::open()?),
            numa_node,
        })
    }
}

impl DmaDomain for NoIommuDomain {
    fn usable_ranges(&self) -> Vec<RangeInclusive<u64>> {
        Vec::new()
    }

    unsafe fn map(
        &self,
        iova: Iova,
        _hva: NonNull<u8>,
        len: u64,
        _access: DmaAccess,
    ) -> Result<(), DmaError> {
        Err(no_table("map", iova, len))
    }

    fn unmap(&self, iova: Iova, len: u64) -> Result<(), DmaError> {
        Err(no_table("unmap", iova, len))
    }

    fn numa_node(&self) -> Option<u32> {
        self.numa_node
    }

    fn physical(&self) -> Option<Arc<dyn PhysicalMemory>> {
        Some(Arc::<OwnMemory>::clone(&self.memory))
    }
}

fn no_table(action: &'static str, iova: Iova, len: u64) -> DmaError {
    DmaError::Refused {
        action,
        iova: iova.0,
        len,
        reason: "there is no IOMMU".to_owned(),
    }
}

fn size_u32<T>() -> u32 {
    u32::try_from(size_of::<T>()).unwrap_or(u32::MAX)
}

/// Why a mapping was refused, and what to do.
fn explain_map(error: &io::Error, container: &VfioContainer) -> String {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            let limit = rustix::process::getrlimit(rustix::process::Resource::Memlock).current;
            let limit =
                limit.map_or_else(|| "unlimited".to_owned(), |bytes| format!("{bytes} bytes"));
            format!(
                "{error}: memory that a device reaches is locked, and RLIMIT_MEMLOCK is {limit}; it must hold all guest \
                 memory and the server's buffers (LimitMEMLOCK=infinity in a systemd unit, or ulimit -l)"
            )
        }
        Some(libc::ENOSPC) => {
            let left = read_info(container).ok().and_then(|info| info.entries);
            let left = left.map_or_else(String::new, |left| format!(" ({left} are left)"));
            format!(
                "{error}: the container has no entry left for a mapping{left}; the limit is dma_entry_limit of the module \
                 vfio_iommu_type1"
            )
        }
        _ => error.to_string(),
    }
}

fn read_info(container: &VfioContainer) -> Result<Info, String> {
    // Words of 8 bytes, so that the structures in it are aligned.
    let mut words = [0_u64; INFO_BYTES as usize / 8];
    let header = vfio_iommu_type1_info {
        argsz: INFO_BYTES,
        ..vfio_iommu_type1_info::default()
    };
    // SAFETY: the buffer is larger than the header and aligned for it.
    unsafe {
        words
            .as_mut_ptr()
            .cast::<vfio_iommu_type1_info>()
            .write(header)
    };
    // SAFETY: the buffer has the `argsz` bytes that the kernel may fill.
    let result = unsafe {
        libc::ioctl(
            container.as_raw_fd(),
            VFIO_IOMMU_GET_INFO(),
            words.as_mut_ptr(),
        )
    };
    if result != 0 {
        return Err(format!(
            "cannot ask the IOMMU what it can do: {}",
            io::Error::last_os_error()
        ));
    }
    let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    Ok(parse_info(&bytes))
}

/// The answer to GET_INFO: a header, then a chain of capabilities by offset.
fn parse_info(bytes: &[u8]) -> Info {
    let field = |at: usize, len: usize| bytes.get(at..at.checked_add(len)?);
    let u16_at = |at| Some(u16::from_ne_bytes(field(at, 2)?.try_into().ok()?));
    let u32_at = |at| Some(u32::from_ne_bytes(field(at, 4)?.try_into().ok()?));
    let u64_at = |at| Some(u64::from_ne_bytes(field(at, 8)?.try_into().ok()?));
    let mut info = Info::default();
    let flags = u32_at(4).unwrap_or(0);
    if flags & VFIO_IOMMU_INFO_PGSIZES != 0 {
        info.page_sizes = u64_at(8).unwrap_or(0);
    }
    let mut next = if flags & VFIO_IOMMU_INFO_CAPS != 0 {
        u32_at(16).unwrap_or(0)
    } else {
        0
    };
    // Offsets ascend; one that does not would be a loop.
    let mut last = 0;
    while next > last {
        last = next;
        let at = next as usize;
        let Some(id) = u16_at(at) else {
            break;
        };
        if u32::from(id) == VFIO_IOMMU_TYPE1_INFO_CAP_IOVA_RANGE {
            let count = u32_at(at + 8).unwrap_or(0) as usize;
            info.ranges = (0..count)
                .map_while(|i| {
                    let at = at.checked_add(16)?.checked_add(i.checked_mul(16)?)?;
                    Some(u64_at(at)?..=u64_at(at + 8)?)
                })
                .collect();
        } else if id == CAP_DMA_AVAIL {
            info.entries = u32_at(at + 8);
        }
        next = u32_at(at + 4).unwrap_or(0);
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.1 answers behind an IOMMU of 39 bits.
    fn answer() -> Vec<u8> {
        let mut bytes = vec![0; INFO_BYTES as usize];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(0, &120_u32.to_ne_bytes());
        put(4, &3_u32.to_ne_bytes());
        put(8, &0x4000_1000_u64.to_ne_bytes());
        put(16, &24_u32.to_ne_bytes());
        // Two ranges at 24, the entry limit at 72.
        put(24, &[1_u16, 1].map(u16::to_ne_bytes).concat());
        put(28, &[72_u32, 2, 0].map(u32::to_ne_bytes).concat());
        put(
            40,
            &[0, 0xfedf_ffff, 0xfef0_0000, 0x7f_ffff_ffff_u64]
                .map(u64::to_ne_bytes)
                .concat(),
        );
        put(72, &[3_u16, 1].map(u16::to_ne_bytes).concat());
        put(76, &[0_u32, 65535].map(u32::to_ne_bytes).concat());
        bytes
    }

    #[test]
    fn parse_info_of_a_whole_answer_finds_ranges_and_entries() {
        let expected = Info {
            page_sizes: 0x4000_1000,
            ranges: vec![0..=0xfedf_ffff, 0xfef0_0000..=0x7f_ffff_ffff],
            entries: Some(65535),
        };
        assert_eq!(parse_info(&answer()), expected);
    }

    #[test]
    fn parse_info_of_nonsense_ends_and_invents_nothing() {
        assert_eq!(parse_info(&[]), Info::default());
        let mut looping = answer();
        looping[28..32].copy_from_slice(&24_u32.to_ne_bytes());
        assert_eq!(parse_info(&looping).entries, None);
        let mut endless = answer();
        endless[32..36].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(parse_info(&endless).ranges.len() <= INFO_BYTES as usize / 16);
        let mut beyond = answer();
        beyond[16..20].copy_from_slice(&u32::MAX.to_ne_bytes());
        assert!(parse_info(&beyond).ranges.is_empty());
    }
}
