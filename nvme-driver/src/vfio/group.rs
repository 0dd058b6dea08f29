//! An open device, by way of its group and a container: behind an IOMMU (vfio-ioctls), or in VFIO's no-IOMMU mode, which
//! that crate does not know. What is asked of the device afterwards is the same for both.

use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_API_VERSION, VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD,
    VFIO_NOIOMMU_IOMMU, VFIO_REGION_INFO_CAP_SPARSE_MMAP, VFIO_REGION_INFO_FLAG_CAPS,
    VFIO_REGION_INFO_FLAG_MMAP, VFIO_TYPE,
};
use vfio_ioctls::{VfioContainer, VfioDevice, VfioError};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref, ioctl_with_val};
use vmm_sys_util::ioctl_io_nr;

use super::ClaimError;
use super::pci::{PciAddress, PciFunction};

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE.into(), VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE.into(), VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE.into(), VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE.into(), VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE.into(), VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE.into(), VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);

/// Room for the answer to GET_REGION_INFO: the structure, and areas of 16 bytes each.
const REGION_BYTES: u32 = 1024;

/// An open device. What it was opened by is closed after it.
pub(super) enum OpenDevice {
    /// vfio-ioctls panics on its way out when the device has gone from sysfs meanwhile; what it had to close is closed
    /// all the same, and nobody is to be ended by that.
    Isolated(ManuallyDrop<VfioDevice>),
    /// In the order in which they are closed.
    WithoutIommu {
        device: File,
        _group: File,
        _container: File,
    },
}

/// A device behind an IOMMU, and whose table that is.
pub(super) struct IsolatedDevice {
    pub(super) device: OpenDevice,
    pub(super) container: Arc<VfioContainer>,
}

/// A part of the device that is read, written or mapped through its descriptor.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Region {
    /// Where it begins for the descriptor.
    pub(super) start: u64,
    /// Bytes.
    pub(super) len: u64,
    /// What of it may be mapped: offset within it, and bytes.
    pub(super) areas: Vec<(u64, u64)>,
}

impl OpenDevice {
    /// A container of its own, and the device in it.
    pub(super) fn isolated(function: &PciFunction) -> Result<IsolatedDevice, ClaimError> {
        let address = function.address;
        let group = function.iommu_group().unwrap_or(0);
        let failed = |error: VfioError| {
            let reason = match &error {
                VfioError::OpenContainer(cause) if cause.kind() == io::ErrorKind::NotFound => {
                    format!("{error}: is the module vfio_iommu_type1 loaded?")
                }
                VfioError::OpenGroup(cause, _)
                    if cause.kind() == io::ErrorKind::PermissionDenied =>
                {
                    format!(
                        "{error}: hand it to this user: scripts/setup-vfio bind {address} --user NAME"
                    )
                }
                VfioError::OpenGroup(cause, _) if cause.raw_os_error() == Some(libc::EBUSY) => {
                    open_already(&format!("/dev/vfio/{group}"))
                }
                VfioError::GroupViable => {
                    format!("the kernel says that IOMMU group {group} is not viable")
                }
                VfioError::ContainerSetIOMMU(cause) if cause.errno() == libc::EPERM => format!(
                    "{error}: the platform does not isolate interrupts; the kernel's log has more"
                ),
                _ => error.to_string(),
            };
            opening(address, reason)
        };
        let container = Arc::new(VfioContainer::new(None).map_err(failed)?);
        let ops: Arc<dyn vfio_ioctls::VfioOps> = Arc::<VfioContainer>::clone(&container);
        let device = VfioDevice::new(function.path(), ops, false).map_err(failed)?;
        Ok(IsolatedDevice {
            device: OpenDevice::Isolated(ManuallyDrop::new(device)),
            container,
        })
    }

    /// The device from its `/dev/vfio/noiommu-N`. The kernel gives it only to a process with CAP_SYS_RAWIO.
    pub(super) fn without_iommu(function: &PciFunction) -> Result<OpenDevice, ClaimError> {
        let address = function.address;
        let node = function.vfio_node().unwrap_or_default();
        let path = format!("/dev/{node}");
        let failed = |doing: &str, error: &io::Error| {
            let reason = match error.raw_os_error() {
                Some(libc::EBUSY) => open_already(&path),
                Some(libc::EPERM | libc::EACCES) => format!(
                    "{doing}: {error}: without an IOMMU this is for root (CAP_SYS_RAWIO and CAP_SYS_ADMIN)"
                ),
                _ => format!("{doing}: {error}"),
            };
            opening(address, reason)
        };
        let open = |path: &str| {
            let file = OpenOptions::new().read(true).write(true).open(path);
            file.map_err(|error| failed(&format!("opening {path}"), &error))
        };
        let checked = |doing: &str, result: i32| {
            if result < 0 {
                return Err(failed(doing, &io::Error::last_os_error()));
            }
            Ok(result)
        };
        let container = open("/dev/vfio/vfio")?;
        // SAFETY: the ioctl takes no argument.
        let version = unsafe { ioctl(&container, VFIO_GET_API_VERSION()) };
        if u32::try_from(version) != Ok(VFIO_API_VERSION) {
            return Err(opening(
                address,
                format!("VFIO's interface has version {version}, not {VFIO_API_VERSION}"),
            ));
        }
        let group = open(&path)?;
        let fd = container.as_raw_fd();
        // SAFETY: the kernel reads one descriptor.
        let result = unsafe { ioctl_with_ref(&group, VFIO_GROUP_SET_CONTAINER(), &fd) };
        checked("putting its group into a container", result)?;
        let mode = u64::from(VFIO_NOIOMMU_IOMMU);
        // SAFETY: the ioctl takes a number.
        let result = unsafe { ioctl_with_val(&container, VFIO_CHECK_EXTENSION(), mode) };
        if checked("asking for VFIO's no-IOMMU mode", result)? != 1 {
            return Err(opening(
                address,
                "VFIO's no-IOMMU mode is switched off (enable_unsafe_noiommu_mode of the module vfio)"
                    .to_owned(),
            ));
        }
        // SAFETY: the ioctl takes a number.
        let result = unsafe { ioctl_with_val(&container, VFIO_SET_IOMMU(), mode) };
        checked("choosing VFIO's no-IOMMU mode", result)?;
        let name = CString::new(address.to_string()).unwrap_or_default();
        // SAFETY: the kernel reads a text that ends with a zero byte.
        let device =
            unsafe { libc::ioctl(group.as_raw_fd(), VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) };
        let device = checked("asking for the device", device)?;
        Ok(OpenDevice::WithoutIommu {
            // SAFETY: the kernel has just given this descriptor to us, and nobody else knows it.
            device: unsafe { File::from_raw_fd(device) },
            _group: group,
            _container: container,
        })
    }

    /// Its descriptor once more.
    pub(super) fn file(&self) -> io::Result<File> {
        Ok(File::from(self.as_fd().try_clone_to_owned()?))
    }

    /// Where the region with this number is.
    pub(super) fn region(&self, index: u32) -> io::Result<Region> {
        // Words of 8 bytes, so that the structures in it are aligned.
        let mut words = [0_u64; REGION_BYTES as usize / 8];
        // struct vfio_region_info: argsz, flags, index, cap_offset, size, offset.
        let header = [REGION_BYTES, 0, index, 0].map(u32::to_ne_bytes);
        let [first, second] = [[header[0], header[1]], [header[2], header[3]]]
            .map(|halves| <[u8; 8]>::try_from(halves.as_flattened()).unwrap_or_default());
        (words[0], words[1]) = (u64::from_ne_bytes(first), u64::from_ne_bytes(second));
        // SAFETY: the buffer has the `argsz` bytes that the kernel may fill.
        let result = unsafe {
            libc::ioctl(
                self.as_fd().as_raw_fd(),
                VFIO_DEVICE_GET_REGION_INFO(),
                words.as_mut_ptr(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        Ok(parse_region(&bytes))
    }

    /// Lets `event` be signalled by an event line of the device.
    pub(super) fn signal(&self, index: u32, event: &EventFd) -> io::Result<()> {
        let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
        // A descriptor that is open is not negative.
        let fd = u32::try_from(event.as_raw_fd()).unwrap_or(u32::MAX);
        // struct vfio_irq_set: argsz, flags, index, start, count; then a descriptor for each.
        let request = [24, flags, index, 0, 1, fd];
        // SAFETY: the kernel reads the 24 bytes that are there.
        let result = unsafe { ioctl_with_ref(self, VFIO_DEVICE_SET_IRQS(), &request) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }

    /// Resets the function.
    pub(super) fn reset(&self) -> io::Result<()> {
        // SAFETY: the ioctl takes no argument.
        if unsafe { ioctl(self, VFIO_DEVICE_RESET()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn opening(address: PciAddress, reason: String) -> ClaimError {
    ClaimError::Call {
        address,
        doing: "opening it through VFIO",
        reason,
    }
}

fn open_already(path: &str) -> String {
    format!(
        "{path} is open already: a group has one owner at a time (another server, a virtual machine, or another device \
         of this group)"
    )
}

impl AsFd for OpenDevice {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            // SAFETY: the descriptor is open while `device` lives.
            OpenDevice::Isolated(device) => unsafe { BorrowedFd::borrow_raw(device.as_raw_fd()) },
            OpenDevice::WithoutIommu { device, .. } => device.as_fd(),
        }
    }
}

impl AsRawFd for OpenDevice {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.as_fd().as_raw_fd()
    }
}

impl Drop for OpenDevice {
    fn drop(&mut self) {
        let OpenDevice::Isolated(device) = self else {
            return;
        };
        // SAFETY: taken once, here; nobody uses the field afterwards.
        let device = unsafe { ManuallyDrop::take(device) };
        if std::panic::catch_unwind(AssertUnwindSafe(|| drop(device))).is_err() {
            tracing::warn!("a device was gone before it was closed");
        }
    }
}

/// The answer to GET_REGION_INFO: a header, then a chain of capabilities by offset.
fn parse_region(bytes: &[u8]) -> Region {
    let field = |at: usize, len: usize| bytes.get(at..at.checked_add(len)?);
    let u16_at = |at| Some(u16::from_ne_bytes(field(at, 2)?.try_into().ok()?));
    let u32_at = |at| Some(u32::from_ne_bytes(field(at, 4)?.try_into().ok()?));
    let u64_at = |at| Some(u64::from_ne_bytes(field(at, 8)?.try_into().ok()?));
    let flags = u32_at(4).unwrap_or(0);
    let len = u64_at(16).unwrap_or(0);
    let whole = match flags & VFIO_REGION_INFO_FLAG_MMAP {
        0 => Vec::new(),
        _ => vec![(0, len)],
    };
    let mut region = Region {
        start: u64_at(24).unwrap_or(0),
        len,
        areas: whole,
    };
    let mut next = match flags & VFIO_REGION_INFO_FLAG_CAPS {
        0 => 0,
        _ => u32_at(12).unwrap_or(0),
    };
    // Offsets ascend; one that does not would be a loop.
    let mut last = 0;
    while next > last {
        last = next;
        let at = next as usize;
        let Some(id) = u16_at(at) else {
            break;
        };
        if u32::from(id) == VFIO_REGION_INFO_CAP_SPARSE_MMAP {
            let count = u32_at(at + 8).unwrap_or(0) as usize;
            region.areas = (0..count)
                .map_while(|i| {
                    let at = at.checked_add(16)?.checked_add(i.checked_mul(16)?)?;
                    Some((u64_at(at)?, u64_at(at + 8)?))
                })
                .collect();
        }
        next = u32_at(at + 4).unwrap_or(0);
    }
    region
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BAR0 of 16 KiB at 64 KiB, as Linux answers; `capabilities` from byte 32 on.
    fn answer(flags: u32, capabilities: &[u8]) -> Vec<u8> {
        let first = if capabilities.is_empty() { 0 } else { 32 };
        let words = [REGION_BYTES, flags, 0, first].map(u32::to_ne_bytes);
        let mut bytes = words.concat();
        bytes.extend(0x4000_u64.to_ne_bytes());
        bytes.extend(0x1_0000_u64.to_ne_bytes());
        bytes.extend(capabilities);
        bytes.resize(REGION_BYTES as usize, 0);
        bytes
    }

    fn capability(id: u16, next: u32, body: &[u64]) -> Vec<u8> {
        let mut bytes = [id, 1].map(u16::to_ne_bytes).concat();
        bytes.extend(next.to_ne_bytes());
        bytes.extend(body.iter().flat_map(|word| word.to_ne_bytes()));
        bytes
    }

    #[test]
    fn parse_region_maps_all_nothing_or_what_is_listed() {
        let region = |areas: &[(u64, u64)]| Region {
            start: 0x1_0000,
            len: 0x4000,
            areas: areas.to_vec(),
        };
        assert_eq!(parse_region(&answer(3, &[])), region(&[]));
        assert_eq!(parse_region(&answer(7, &[])), region(&[(0, 0x4000)]));
        // "The page of the MSI-X table may be mapped too" (3), then two areas (1).
        let mut both = capability(3, 40, &[]);
        both.extend(capability(1, 0, &[2, 0, 0x2000, 0x3000, 0x1000]));
        let areas = [(0, 0x2000), (0x3000, 0x1000)];
        assert_eq!(parse_region(&answer(15, &both)), region(&areas));
    }

    #[test]
    fn parse_region_of_nonsense_ends_and_invents_nothing() {
        assert_eq!(parse_region(&[]), Region::default());
        // A chain that leads back to itself, and one that leads out.
        for next in [32, 8, u32::MAX] {
            let region = parse_region(&answer(15, &capability(9, next, &[])));
            assert_eq!(region.areas, [(0, 0x4000)]);
        }
        let endless = capability(1, 0, &[u64::MAX]);
        let areas = parse_region(&answer(15, &endless)).areas.len();
        assert!(areas <= REGION_BYTES as usize / 16, "{areas}");
    }
}
