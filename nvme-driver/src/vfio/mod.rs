//! Real hardware: an NVMe controller that the kernel's vfio-pci driver hands to this process.
//!
//! ```text
//!  sysfs (pci) --> group viable? --> container + group --> device: command register, reset, BAR0 (bar), event lines
//!                                         |                                |
//!              Type1Domain (domain), or OwnMemory (physical)          VfioTransport, VfioPort (msix)
//! ```
//! On the kernel's container/group interface (group). The newer one (IOMMUFD, a file for each device) would replace
//! `group` and `domain`: nothing else here knows how the device was opened.
//!
//! # Without an IOMMU
//! VFIO has a mode for machines without one ([`Isolation::UnsafeNone`]; the kernel's module parameter
//! `enable_unsafe_noiommu_mode`). There are no windows then: the device is given physical addresses, and what it does
//! with others nobody checks. Memory for it lies in huge pages and is pinned (physical). Until the device is reset or
//! drained its pages must stay ours, as ever (a mapping outlives every command that names it); when this process dies,
//! the kernel ends the device's bus mastering as it closes the device, and drops the pins at about the same time.
//!
//! Promises: interrupts stay off, but for the MSI-X vectors (msix) of pollers that sleep; the device masters the bus only
//! while this value lives, and its command register is as before afterwards; a device that vanishes reads as all ones and
//! never ends the process. Start at [`VfioTransport::claim`].

mod bar;
mod domain;
mod group;
mod msix;
pub mod pci;
mod physical;

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vfio_bindings::bindings::vfio::{
    VFIO_PCI_BAR0_REGION_INDEX, VFIO_PCI_CONFIG_REGION_INDEX, VFIO_PCI_ERR_IRQ_INDEX,
    VFIO_PCI_REQ_IRQ_INDEX,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::quirks::{Quirks, of_device};
use crate::spec::QueueId;
use crate::transport::{DmaDomain, Notice, Transport};
use bar::Bar;
pub use bar::VfioPort;
use domain::{NoIommuDomain, Type1Domain};
use group::{IsolatedDevice, OpenDevice};
use msix::Vectors;
use pci::{PciAddress, PciFunction, Sysfs, VFIO_DRIVER};

/// Where the command register stands in configuration space.
const PCI_COMMAND: u64 = 0x04;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
const COMMAND_INTX_DISABLE: u16 = 1 << 10;
/// What a claimed function has.
const ENABLED: u16 = COMMAND_MEMORY | COMMAND_BUS_MASTER | COMMAND_INTX_DISABLE;
/// Where the doorbells begin in BAR0.
const DOORBELLS: u64 = 0x1000;

/// What must stand between a device and memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Isolation {
    /// An IOMMU.
    #[default]
    Iommu,
    /// An IOMMU if there is one; otherwise nothing but this program's care. Any fault of the device, of its firmware or
    /// of this program may then write to any memory of the machine.
    UnsafeNone,
}

/// Why a device could not be claimed.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Nothing is there.
    #[error("cannot claim {address}: there is no such PCI function (lspci -D lists them)")]
    NoFunction {
        /// The function.
        address: PciAddress,
    },
    /// Another kind of device.
    #[error("cannot claim {address}: it is no NVMe controller (class {class:06x})")]
    NotNvme {
        /// The function.
        address: PciAddress,
        /// Its class code.
        class: u32,
    },
    /// The kernel, or another driver, has it.
    #[error("cannot claim {address}: {}; bind it first: scripts/setup-vfio bind {address}", has_driver(.driver.as_deref()))]
    NotBound {
        /// The function.
        address: PciAddress,
        /// Its driver now.
        driver: Option<String>,
    },
    /// No IOMMU.
    #[error(
        "cannot claim {address}: it is in no IOMMU group, so nothing would keep it from writing all memory; switch the \
         IOMMU on (VT-d or AMD-Vi in the firmware, intel_iommu=on on the kernel's command line), or, at the risk of all \
         memory, see scripts/setup-vfio bind --unsafe-noiommu"
    )]
    NoIommu {
        /// The function.
        address: PciAddress,
    },
    /// VFIO's mode without an IOMMU.
    #[error(
        "cannot claim {address}: VFIO has it in no-IOMMU mode, in which the SSD could read and write all memory of this \
         machine, every virtual machine's included; switch the IOMMU on, or say that this risk is yours: --unsafe-noiommu"
    )]
    NoIommuMode {
        /// The function.
        address: PciAddress,
    },
    /// Siblings are in use.
    #[error(
        "cannot claim {address}: IOMMU group {group} is not viable, since other members have drivers: {}; unbind them or \
         move the SSD to another slot",
        list(.siblings)
    )]
    NotViable {
        /// The function.
        address: PciAddress,
        /// Its IOMMU group.
        group: u32,
        /// Members with drivers.
        siblings: Vec<(PciAddress, String)>,
    },
    /// A call failed.
    #[error("cannot claim {address}: {doing}: {reason}")]
    Call {
        /// The function.
        address: PciAddress,
        /// What was attempted.
        doing: &'static str,
        /// What the system said, and what to do.
        reason: String,
    },
    /// A known device that does not follow the specification.
    #[error("cannot claim {address}: {reason}")]
    Unusable {
        /// The function.
        address: PciAddress,
        /// Its story.
        reason: &'static str,
    },
}

fn has_driver(driver: Option<&str>) -> String {
    driver.map_or_else(
        || "no driver has it".to_owned(),
        |driver| format!("the driver {driver} has it"),
    )
}

fn list(siblings: &[(PciAddress, String)]) -> String {
    let names: Vec<String> = siblings
        .iter()
        .map(|(address, driver)| format!("{address} ({driver})"))
        .collect();
    names.join(", ")
}

/// A claimed NVMe controller.
pub struct VfioTransport {
    address: PciAddress,
    bar: Arc<Bar>,
    domain: Arc<dyn DmaDomain>,
    quirks: Quirks,
    /// The kernel wants the device back.
    release_requested: EventFd,
    /// The bus has reported an error.
    bus_error: EventFd,
    /// Interrupts of queue pairs, once they were asked for.
    vectors: Option<Vectors>,
    /// What the command register was.
    command: u16,
    config_space: ConfigSpace,
    device: OpenDevice,
}

/// The device's configuration space.
struct ConfigSpace {
    device: File,
    start: u64,
}

impl ConfigSpace {
    fn command(&self) -> io::Result<u16> {
        let mut bytes = [0; 2];
        self.device
            .read_exact_at(&mut bytes, self.start + PCI_COMMAND)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn set_command(&self, command: u16) -> io::Result<()> {
        self.device
            .write_all_at(&command.to_le_bytes(), self.start + PCI_COMMAND)
    }
}

impl VfioTransport {
    /// Takes the function at `address` from vfio-pci and resets it. An IOMMU stands between it and memory.
    ///
    /// # Errors
    /// [`ClaimError`]; the function is as before then.
    pub fn claim(address: PciAddress) -> Result<VfioTransport, ClaimError> {
        VfioTransport::claim_with(address, Isolation::Iommu)
    }

    /// The same, also without an IOMMU where `isolation` says so.
    ///
    /// # Errors
    /// [`ClaimError`]; the function is as before then.
    pub fn claim_with(
        address: PciAddress,
        isolation: Isolation,
    ) -> Result<VfioTransport, ClaimError> {
        let sysfs = Sysfs::default();
        let function = sysfs
            .function(address)
            .map_err(|_| ClaimError::NoFunction { address })?;
        check(&sysfs, &function, isolation)?;
        let id = |name| {
            function
                .hex_attribute(name)
                .and_then(|id| u16::try_from(id).ok())
                .unwrap_or(0)
        };
        let (quirks, story) = of_device(id("vendor"), id("device"));
        if let Some(reason) = quirks.unusable {
            return Err(ClaimError::Unusable { address, reason });
        }
        if let Some(story) = story {
            tracing::info!(device = %address, story, "known device");
        }
        let failed = |doing: &'static str, reason: String| ClaimError::Call {
            address,
            doing,
            reason,
        };
        let call = |doing: &'static str| move |error: io::Error| failed(doing, error.to_string());

        let numa_node = function.numa_node();
        let (device, domain): (_, Arc<dyn DmaDomain>) = if function.is_without_iommu() {
            let device = OpenDevice::without_iommu(&function)?;
            tracing::warn!(
                device = %address,
                "UNSAFE, NO IOMMU: nothing but software checks where this SSD reads and writes. Any fault of it, of its \
                 firmware or of this server, and any malice of it, may change or read all memory of this machine: the \
                 kernel's and every virtual machine's. The kernel is tainted (--unsafe-noiommu)"
            );
            let domain = NoIommuDomain::new(numa_node)
                .map_err(|reason| failed("finding physical addresses", reason))?;
            (device, Arc::new(domain))
        } else {
            let IsolatedDevice { device, container } = OpenDevice::isolated(&function)?;
            let domain = Type1Domain::new(container, numa_node)
                .map_err(|reason| failed("reading what the IOMMU can do", reason))?;
            (device, Arc::new(domain))
        };
        let file = device.file().map_err(call("duplicating its descriptor"))?;
        let config_space = ConfigSpace {
            device: file,
            start: device
                .region(VFIO_PCI_CONFIG_REGION_INDEX)
                .map_err(call("finding its configuration space"))?
                .start,
        };
        let command = config_space
            .command()
            .map_err(call("reading its command register"))?;
        if let Err(error) = device.reset() {
            // Then only the controller's own reset (CC.EN) is left.
            tracing::info!(device = %address, %error, "the function cannot be reset");
        }
        config_space
            .set_command(command | ENABLED)
            .map_err(call("enabling memory and bus mastering"))?;
        let bar = map_bar(&device).map_err(call("mapping BAR0"))?;
        let eventfd = || EventFd::new(EFD_NONBLOCK).map_err(call("making an eventfd"));
        let (release_requested, bus_error) = (eventfd()?, eventfd()?);
        for (index, event) in [
            (VFIO_PCI_REQ_IRQ_INDEX, &release_requested),
            (VFIO_PCI_ERR_IRQ_INDEX, &bus_error),
        ] {
            // Not every function has both.
            if let Err(error) = device.signal(index, event) {
                tracing::debug!(device = %address, index, %error, "no event line");
            }
        }
        tracing::info!(
            device = %address, group = function.iommu_group(), numa_node,
            "claimed (NUMA node: none where the machine has one only)"
        );
        Ok(VfioTransport {
            address,
            bar: Arc::new(bar),
            domain,
            quirks,
            release_requested,
            bus_error,
            vectors: None,
            command,
            config_space,
            device,
        })
    }
}

/// What sysfs says against claiming the function.
fn check(sysfs: &Sysfs, function: &PciFunction, isolation: Isolation) -> Result<(), ClaimError> {
    let address = function.address;
    if !function.is_nvme() {
        return Err(ClaimError::NotNvme {
            address,
            class: function.class().unwrap_or(0),
        });
    }
    let driver = function.driver();
    if driver.as_deref() != Some(VFIO_DRIVER) {
        return Err(ClaimError::NotBound { address, driver });
    }
    let group = function
        .iommu_group()
        .ok_or(ClaimError::NoIommu { address })?;
    if sysfs.is_noiommu_group(group) && isolation == Isolation::Iommu {
        return Err(ClaimError::NoIommuMode { address });
    }
    let siblings = function.siblings_in_use();
    if !siblings.is_empty() {
        return Err(ClaimError::NotViable {
            address,
            group,
            siblings,
        });
    }
    Ok(())
}

/// The parts of BAR0 that may be mapped: all of it, or what the kernel lists.
fn map_bar(device: &OpenDevice) -> io::Result<Bar> {
    let region = device.region(VFIO_PCI_BAR0_REGION_INDEX)?;
    Bar::map(&device.file()?, region.start, region.len, &region.areas)
}

impl Transport for VfioTransport {
    type Port = VfioPort;

    fn read32(&mut self, offset: u32) -> u32 {
        if self.bar.is_lost() {
            return u32::MAX;
        }
        self.bar.read32(offset.into())
    }

    // Two halves everywhere: some controllers take only 4-byte accesses, and none needs more.
    fn read64(&mut self, offset: u32) -> u64 {
        let low = self.read32(offset);
        u64::from(low) | u64::from(self.read32(offset + 4)) << 32
    }

    fn write32(&mut self, offset: u32, value: u32) {
        self.bar.write32(offset.into(), value);
    }

    fn write64(&mut self, offset: u32, value: u64) {
        let [low, high] = [value & 0xffff_ffff, value >> 32];
        // Both have 32 bits.
        self.write32(offset, u32::try_from(low).unwrap_or(0));
        self.write32(offset + 4, u32::try_from(high).unwrap_or(0));
    }

    fn port(&mut self, queue: QueueId, stride: u32) -> Option<VfioPort> {
        let sq = DOORBELLS + 2 * u64::from(queue.0) * u64::from(stride);
        let port = VfioPort::new(&self.bar, sq, sq + u64::from(stride))?;
        let vector = self.vectors.as_ref().and_then(|all| all.vector(queue.0));
        Some(match vector {
            Some(Ok(vector)) => port.with_vector(vector),
            // Without a file descriptor it is polled.
            Some(Err(_)) | None => port,
        })
    }

    fn enable_interrupts(&mut self, queues: u16) -> bool {
        if self.vectors.is_none() {
            let vectors = self
                .device
                .file()
                .and_then(|file| Vectors::new(file, queues.saturating_add(1)));
            match vectors {
                Ok(vectors) => self.vectors = Some(vectors),
                Err(error) => {
                    tracing::warn!(device = %self.address, %error, "no interrupts: completions are polled for");
                }
            }
        }
        self.vectors.is_some()
    }

    fn vector(&self, queue: QueueId) -> Option<u16> {
        self.vectors.as_ref()?.of(queue.0)
    }

    fn dma_domain(&self) -> Arc<dyn DmaDomain> {
        Arc::clone(&self.domain)
    }

    fn notice(&mut self) -> Option<Notice> {
        // Reading is what resets them; an error is an eventfd that nobody has written to.
        if self.release_requested.read().is_ok() {
            return Some(Notice::ReleaseRequested);
        }
        self.bus_error.read().is_ok().then_some(Notice::BusError)
    }

    fn restore(&mut self) {
        if let Ok(command) = self.config_space.command()
            && command & ENABLED != ENABLED
            && let Err(error) = self.config_space.set_command(command | ENABLED)
        {
            tracing::debug!(device = %self.address, %error, "cannot enable memory and bus mastering again");
        }
    }

    fn quirks(&self) -> Quirks {
        self.quirks
    }

    fn name(&self) -> String {
        self.address.to_string()
    }
}

impl Drop for VfioTransport {
    fn drop(&mut self) {
        if !self.bar.is_lost()
            && let Err(error) = self.config_space.set_command(self.command)
        {
            tracing::debug!(device = %self.address, %error, "cannot restore the command register");
        }
    }
}

impl fmt::Debug for VfioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VfioTransport({})", self.address)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::{Path, PathBuf};

    use super::*;

    const GROUP: &str = "kernel/iommu_groups/7";

    /// A machine of files, gone when it is dropped.
    struct Machine(PathBuf);

    impl Machine {
        fn new(name: &str) -> Machine {
            let root =
                std::env::temp_dir().join(format!("tandem-claim-{name}-{}", std::process::id()));
            fs::create_dir_all(root.join("bus/pci/devices")).unwrap();
            Machine(root)
        }

        fn function(&self, address: &str, class: &str, driver: Option<&str>, in_group: bool) {
            let folder = self.0.join("bus/pci/devices").join(address);
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join("class"), format!("{class}\n")).unwrap();
            if let Some(driver) = driver {
                symlink(Path::new("/drivers").join(driver), folder.join("driver")).unwrap();
            }
            if in_group {
                let members = self.0.join(GROUP).join("devices");
                fs::create_dir_all(members.join(address)).unwrap();
                symlink(self.0.join(GROUP), folder.join("iommu_group")).unwrap();
            }
        }

        fn check(&self) -> String {
            self.check_with(Isolation::Iommu)
        }

        fn check_with(&self, isolation: Isolation) -> String {
            let sysfs = Sysfs::at(&self.0);
            let function = sysfs.function("5e:00.0".parse().unwrap()).unwrap();
            check(&sysfs, &function, isolation)
                .map_or_else(|error| error.to_string(), |()| "viable".to_owned())
        }
    }

    impl Drop for Machine {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    const SSD: &str = "0000:5e:00.0";
    const NVME: &str = "0x010802";

    #[track_caller]
    fn refused(machine: &Machine, reason: &str) {
        let error = machine.check();
        assert!(error.starts_with("cannot claim 0000:5e:00.0: "), "{error}");
        assert!(error.contains(reason), "{error}");
    }

    #[test]
    fn check_of_a_bound_ssd_alone_or_with_harmless_siblings_finds_nothing() {
        let machine = Machine::new("viable");
        machine.function(SSD, NVME, Some("vfio-pci"), true);
        machine.function("0000:5d:00.0", "0x060400", Some("pcieport"), true);
        machine.function("0000:5e:00.1", "0x0c0330", Some("vfio-pci"), true);
        machine.function("0000:5e:00.2", "0x0c0330", None, true);
        assert_eq!(machine.check(), "viable");
    }

    #[test]
    fn check_of_another_device_or_driver_says_what_it_is() {
        let machine = Machine::new("class");
        machine.function(SSD, "0x020000", Some("vfio-pci"), true);
        refused(&machine, "it is no NVMe controller (class 020000)");
        let machine = Machine::new("kernel");
        machine.function(SSD, NVME, Some("nvme"), true);
        refused(
            &machine,
            "the driver nvme has it; bind it first: scripts/setup-vfio bind 0000:5e:00.0",
        );
        let machine = Machine::new("nobody");
        machine.function(SSD, NVME, None, true);
        refused(&machine, "no driver has it; bind it first");
    }

    #[test]
    fn check_without_an_iommu_says_how_to_switch_it_on() {
        let machine = Machine::new("none");
        machine.function(SSD, NVME, Some("vfio-pci"), false);
        refused(&machine, "it is in no IOMMU group");
        let machine = Machine::new("noiommu");
        machine.function(SSD, NVME, Some("vfio-pci"), true);
        fs::write(machine.0.join(GROUP).join("name"), "vfio-noiommu\n").unwrap();
        refused(
            &machine,
            "VFIO has it in no-IOMMU mode, in which the SSD could read and write all memory",
        );
        refused(&machine, "--unsafe-noiommu");
        // Whoever says so takes it, but none of a group that others use.
        assert_eq!(machine.check_with(Isolation::UnsafeNone), "viable");
        machine.function("0000:5e:00.1", NVME, Some("nvme"), true);
        let refusal = machine.check_with(Isolation::UnsafeNone);
        assert!(refusal.contains("0000:5e:00.1 (nvme)"), "{refusal}");
    }

    #[test]
    fn check_of_a_group_in_use_names_every_sibling() {
        let machine = Machine::new("siblings");
        machine.function(SSD, NVME, Some("vfio-pci"), true);
        machine.function("0000:5e:00.1", "0x020000", Some("mlx5_core"), true);
        machine.function("0000:5e:00.2", NVME, Some("nvme"), true);
        refused(
            &machine,
            "IOMMU group 7 is not viable, since other members have drivers: 0000:5e:00.1 (mlx5_core), 0000:5e:00.2 (nvme)",
        );
    }
}
