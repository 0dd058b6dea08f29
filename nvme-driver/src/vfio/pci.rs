//! PCI functions as sysfs shows them: addresses, drivers, IOMMU groups and who else is in one. Reads only. The root
//! of the tree is a parameter, so that tests (and `setup-vfio`'s) run on a tree of their own.
#![forbid(unsafe_code)]

use std::fmt;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// PCI class code of an NVMe controller: mass storage, non-volatile memory, NVM Express.
pub const NVME_CLASS: u32 = 0x01_0802;

/// The driver that hands a function to us.
pub const VFIO_DRIVER: &str = "vfio-pci";

/// Where a function is: domain, bus, device, function. Written `0000:5e:00.0`; the domain may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PciAddress {
    /// Segment group.
    pub domain: u32,
    /// Bus.
    pub bus: u8,
    /// Device: 0 to 31.
    pub device: u8,
    /// Function: 0 to 7.
    pub function: u8,
}

/// A text that is no PCI address.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a PCI address: write it as lspci does, 0000:5e:00.0 or 5e:00.0")]
pub struct PciAddressError(String);

impl FromStr for PciAddress {
    type Err = PciAddressError;

    fn from_str(text: &str) -> Result<PciAddress, PciAddressError> {
        let refuse = || PciAddressError(text.to_owned());
        let hex = |part: &str, most: usize| {
            let digits = !part.is_empty() && part.len() <= most;
            let digits = digits && part.bytes().all(|byte| byte.is_ascii_hexdigit());
            u32::from_str_radix(part, 16).ok().filter(|_| digits)
        };
        let (slot, function) = text.rsplit_once('.').ok_or_else(refuse)?;
        let (bus, device) = slot.rsplit_once(':').ok_or_else(refuse)?;
        let (domain, bus) = bus.rsplit_once(':').unwrap_or(("0", bus));
        let byte = |part: &str, most: usize, limit: u8| {
            let value = hex(part, most).and_then(|value| u8::try_from(value).ok());
            value.filter(|value| *value <= limit).ok_or_else(refuse)
        };
        Ok(PciAddress {
            domain: hex(domain, 8).ok_or_else(refuse)?,
            bus: byte(bus, 2, 0xff)?,
            device: byte(device, 2, 0x1f)?,
            function: byte(function, 1, 7)?,
        })
    }
}

impl fmt::Display for PciAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let PciAddress {
            domain,
            bus,
            device,
            function,
        } = self;
        write!(f, "{domain:04x}:{bus:02x}:{device:02x}.{function:x}")
    }
}

/// The tree that `/sys` is, or a test's copy of it.
#[derive(Clone, Debug)]
pub struct Sysfs(PathBuf);

impl Default for Sysfs {
    fn default() -> Sysfs {
        Sysfs(PathBuf::from("/sys"))
    }
}

impl Sysfs {
    /// A tree somewhere else.
    #[must_use]
    pub fn at(root: impl Into<PathBuf>) -> Sysfs {
        Sysfs(root.into())
    }

    /// A path in it, such as `bus/pci/drivers_probe`.
    #[must_use]
    pub fn path(&self, relative: impl AsRef<Path>) -> PathBuf {
        self.0.join(relative)
    }

    /// The function at `address`.
    ///
    /// # Errors
    /// `NotFound` when there is none.
    pub fn function(&self, address: PciAddress) -> io::Result<PciFunction> {
        let path = self.path("bus/pci/devices").join(address.to_string());
        fs::symlink_metadata(&path)?;
        Ok(PciFunction {
            address,
            path,
            sysfs: self.clone(),
        })
    }

    /// All functions, by address.
    ///
    /// # Errors
    /// When the tree has no PCI bus.
    pub fn functions(&self) -> io::Result<Vec<PciFunction>> {
        self.functions_in(&self.path("bus/pci/devices"))
    }

    /// The group is VFIO's own, made for a device without an IOMMU: nothing keeps such a device from any memory.
    #[must_use]
    pub fn is_noiommu_group(&self, group: u32) -> bool {
        let name = self.path(format!("kernel/iommu_groups/{group}/name"));
        fs::read_to_string(name).is_ok_and(|name| name.trim() == "vfio-noiommu")
    }

    fn functions_in(&self, folder: &Path) -> io::Result<Vec<PciFunction>> {
        let mut functions = Vec::new();
        for entry in fs::read_dir(folder)? {
            let name = entry?.file_name();
            if let Some(address) = name.to_str().and_then(|name| name.parse().ok()) {
                match self.function(address) {
                    // It was pulled out while we looked.
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                    function => functions.push(function?),
                }
            }
        }
        functions.sort_by_key(|function| function.address);
        Ok(functions)
    }
}

/// One PCI function.
#[derive(Clone, Debug)]
pub struct PciFunction {
    /// Where it is.
    pub address: PciAddress,
    path: PathBuf,
    sysfs: Sysfs,
}

impl PciFunction {
    /// Its folder in sysfs.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// An attribute's text without white space at its ends; `None` when it is not there or cannot be read.
    #[must_use]
    pub fn attribute(&self, name: &str) -> Option<String> {
        let text = fs::read_to_string(self.path.join(name)).ok()?;
        Some(text.trim().to_owned())
    }

    /// A hexadecimal attribute, with or without `0x`.
    #[must_use]
    pub fn hex_attribute(&self, name: &str) -> Option<u32> {
        let text = self.attribute(name)?;
        u32::from_str_radix(text.trim_start_matches("0x"), 16).ok()
    }

    /// Base class, sub-class and programming interface.
    #[must_use]
    pub fn class(&self) -> Option<u32> {
        self.hex_attribute("class")
    }

    /// It is an NVMe controller.
    #[must_use]
    pub fn is_nvme(&self) -> bool {
        self.class() == Some(NVME_CLASS)
    }

    /// The driver that it is bound to.
    #[must_use]
    pub fn driver(&self) -> Option<String> {
        link_name(&self.path.join("driver"))
    }

    /// Its NUMA node; `None` where the machine has only one, or does not say.
    #[must_use]
    pub fn numa_node(&self) -> Option<u32> {
        self.attribute("numa_node")?.parse().ok()
    }

    /// The number of its IOMMU group: `/dev/vfio/N`. `None` when no IOMMU is on.
    #[must_use]
    pub fn iommu_group(&self) -> Option<u32> {
        link_name(&self.path.join("iommu_group"))?.parse().ok()
    }

    /// Its group is one of VFIO's no-IOMMU mode: nothing keeps the device from any memory of the machine.
    #[must_use]
    pub fn is_without_iommu(&self) -> bool {
        let group = self.iommu_group();
        group.is_some_and(|group| self.sysfs.is_noiommu_group(group))
    }

    /// The file through which a process gets the device, below `/dev`: `vfio/N`. `None` when it is in no group.
    #[must_use]
    pub fn vfio_node(&self) -> Option<String> {
        let prefix = if self.is_without_iommu() {
            "noiommu-"
        } else {
            ""
        };
        Some(format!("vfio/{prefix}{}", self.iommu_group()?))
    }

    /// What its PCI Express link runs at, and what it could; `None` when it is no PCI Express function.
    #[must_use]
    pub fn link(&self) -> Option<(PciLink, PciLink)> {
        let link = |which: &str| {
            let speed = self.attribute(&format!("{which}_link_speed"))?;
            let width = self.attribute(&format!("{which}_link_width"))?;
            Some(PciLink {
                speed: speed.trim_end_matches(" PCIe").to_owned(),
                width: width.parse().ok()?,
            })
        };
        let max = link("max").filter(|max| max.speed != "Unknown")?;
        Some((link("current")?, max))
    }

    /// All functions of its group, itself included: they share one table, so none may be the kernel's while we have
    /// another. Empty when there is no group.
    #[must_use]
    pub fn group_members(&self) -> Vec<PciFunction> {
        let folder = self.path.join("iommu_group/devices");
        self.sysfs.functions_in(&folder).unwrap_or_default()
    }

    /// Members of the group that are in the way: another driver than a VFIO one has them.
    #[must_use]
    pub fn siblings_in_use(&self) -> Vec<(PciAddress, String)> {
        let harmless = |driver: &str| {
            driver.starts_with("vfio") || driver == "pci-stub" || driver == "pcieport"
        };
        let members = self.group_members().into_iter();
        members
            .filter(|member| member.address != self.address)
            .filter_map(|member| Some((member.address, member.driver()?)))
            .filter(|(_, driver)| !harmless(driver))
            .collect()
    }
}

/// A PCI Express link, written `16.0 GT/s x4`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciLink {
    /// Of one lane, as the kernel writes it: `16.0 GT/s`, or `Unknown`.
    pub speed: String,
    /// Lanes; 0 when the link is down.
    pub width: u32,
}

impl fmt::Display for PciLink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} x{}", self.speed, self.width)
    }
}

/// The last part of what a link points to.
fn link_name(link: &Path) -> Option<String> {
    let to = fs::read_link(link).ok()?;
    Some(to.file_name()?.to_str()?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parse_of_long_and_short_form_gives_the_same_address() {
        let address: PciAddress = "0000:5e:00.0".parse().unwrap();
        assert_eq!("5e:00.0".parse(), Ok(address));
        assert_eq!(address.to_string(), "0000:5e:00.0");
        let far: PciAddress = "10000:01:1F.7".parse().unwrap();
        assert_eq!(far.to_string(), "10000:01:1f.7");
    }

    #[test]
    fn parse_of_anything_else_says_how_to_write_it() {
        for text in [
            "",
            "5e",
            "5e:00",
            "5e:20.0",
            "5e:00.8",
            "x:5e:00.0",
            ":5e:00.0",
            "0:0:5e:00.0",
            "+5e:00.0",
            "5e:00.+1",
            "05e:00.0",
        ] {
            let error = text.parse::<PciAddress>().unwrap_err().to_string();
            assert_eq!(
                error,
                format!(
                    "`{text}` is not a PCI address: write it as lspci does, 0000:5e:00.0 or 5e:00.0"
                )
            );
        }
    }
}
