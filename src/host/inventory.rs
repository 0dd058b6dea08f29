//! Every NVMe controller of the machine as it is now: who has it, what it is, who uses it. Only reads.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use nvme_driver::vfio::pci::{PciAddress, PciFunction, VFIO_DRIVER};
use serde::Serialize;

use super::Host;
use super::blocks::{self, BlockTree, Export, attribute, device_file, folder, names};
use super::hugepages::{self, Pool};
use super::owner::Record;
use super::processes::{Number, Process, Processes, parse_number};

/// All of it, at one moment.
#[derive(Clone, Debug, Serialize)]
pub struct Survey {
    pub devices: Vec<HostDevice>,
    /// Free huge pages of 2 MiB.
    pub hugepages: Vec<Pool>,
    /// Processes that we may not look into: they may use any device.
    pub unseen: Vec<u32>,
}

/// One NVMe controller on PCI.
#[derive(Clone, Debug, Serialize)]
pub struct HostDevice {
    #[serde(serialize_with = "as_text")]
    pub address: PciAddress,
    pub model: Option<String>,
    pub serial: Option<String>,
    /// Bytes of all its namespaces.
    pub size: Option<u64>,
    pub driver: Option<String>,
    pub iommu_group: Option<u32>,
    /// The group is of VFIO's no-IOMMU mode.
    pub no_iommu: bool,
    pub numa_node: Option<u32>,
    /// What the link runs at: `8.0 GT/s x4`.
    pub link: Option<String>,
    /// What it could run at.
    pub link_max: Option<String>,
    /// What the kernel's driver calls the controller: `nvme0`.
    pub controllers: Vec<String>,
    /// `live` when the kernel's driver works with it.
    pub state: Option<String>,
    pub namespaces: Vec<Namespace>,
    pub uses: Vec<Use>,
    /// Others of its IOMMU group that the kernel uses.
    pub siblings: Vec<Sibling>,
    #[serde(skip)]
    pub function: PciFunction,
}

/// A namespace as a block device of the kernel.
#[derive(Clone, Debug, Serialize)]
pub struct Namespace {
    /// `nvme0n1`
    pub name: String,
    /// Bytes; 0 when the kernel cannot use its format.
    pub size: Option<u64>,
    pub partitions: Vec<String>,
}

/// Another function of the same IOMMU group with a driver that is none of VFIO's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Sibling {
    #[serde(serialize_with = "as_text")]
    pub address: PciAddress,
    pub driver: String,
    /// If it is an SSD.
    pub block_devices: Vec<String>,
}

/// Somebody who uses a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "use", rename_all = "lowercase")]
pub enum Use {
    Mounted {
        device: String,
        at: String,
        /// In our own mount namespace.
        here: bool,
        /// Processes of other mount namespaces, one of each.
        elsewhere: Vec<Process>,
    },
    Swap {
        device: String,
    },
    Held {
        device: String,
        by: String,
    },
    Open {
        /// A device file, or what the process has in place of one.
        device: String,
        process: Process,
    },
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Use::Mounted {
                device,
                at,
                here,
                elsewhere,
            } => {
                write!(f, "{device} is mounted at {at}")?;
                let Some(process) = elsewhere.first() else {
                    return Ok(());
                };
                let also = if *here { ", also" } else { "" };
                match elsewhere.len() {
                    1 => write!(f, "{also} in the mount namespace of {process}"),
                    count => write!(
                        f,
                        "{also} in {count} other mount namespaces, one of them of {process}"
                    ),
                }
            }
            Use::Swap { device } => write!(f, "{device} is swap space"),
            Use::Held { device, by } => write!(f, "{device} is part of {by}"),
            Use::Open { device, process } => write!(f, "{device} is open in {process}"),
        }
    }
}

fn as_text<S: serde::Serializer>(address: &PciAddress, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(address)
}

/// Everybody who may use a disk.
struct Users {
    processes: Processes,
    exports: Vec<Export>,
}

/// Looks at the whole machine. One without PCI has no devices.
///
/// # Errors
/// When sysfs cannot be read.
pub fn survey(host: &Host) -> io::Result<Survey> {
    let functions = if host.sysfs.path("bus/pci/devices").exists() {
        host.sysfs.functions()?
    } else {
        Vec::new()
    };
    let users = Users {
        processes: Processes::survey(host),
        exports: blocks::exports(host),
    };
    let nvme = functions.into_iter().filter(PciFunction::is_nvme);
    Ok(Survey {
        devices: nvme
            .map(|function| HostDevice::look(host, &users, function))
            .collect(),
        hugepages: hugepages::pools(host),
        unseen: users.processes.unseen,
    })
}

impl HostDevice {
    fn look(host: &Host, users: &Users, function: PciFunction) -> HostDevice {
        let controllers = controllers(&function);
        let controller = controllers.first();
        let of_controller = |name: &str| {
            let folder = function.path().join("nvme").join(controller?);
            attribute(&folder, name).filter(|text| !text.is_empty())
        };
        let namespaces = namespaces(host, &function);
        let uses = uses(host, users, &function, &controllers, &namespaces);
        let record = match function.driver().as_deref() {
            Some(VFIO_DRIVER) => Record::load(host, function.address).ok().flatten(),
            _ => None,
        }
        .unwrap_or_default();
        let size: Option<u64> = namespaces.iter().map(|namespace| namespace.size).sum();
        let link = function.link();
        HostDevice {
            address: function.address,
            model: of_controller("model").or(record.model),
            serial: of_controller("serial").or(record.serial),
            size: size.filter(|_| controller.is_some()).or(record.size),
            driver: function.driver(),
            iommu_group: function.iommu_group(),
            no_iommu: function.is_without_iommu(),
            numa_node: function.numa_node(),
            link: link.as_ref().map(|(now, _)| now.to_string()),
            link_max: link.as_ref().map(|(_, most)| most.to_string()),
            state: of_controller("state"),
            controllers,
            namespaces,
            uses,
            siblings: siblings(host, &function),
            function,
        }
    }

    /// vfio-pci has it.
    #[must_use]
    pub fn is_bound(&self) -> bool {
        self.driver.as_deref() == Some(VFIO_DRIVER)
    }

    /// `/dev/vfio/N`
    #[must_use]
    pub fn vfio_path(&self, host: &Host) -> Option<PathBuf> {
        Some(host.dev.join(self.function.vfio_node()?))
    }
}

/// What the kernel's nvme driver calls a function; empty when another driver has it.
pub(super) fn controllers(function: &PciFunction) -> Vec<String> {
    let mut names = names(&function.path().join("nvme"));
    names.retain(|name| is_numbered(name, "nvme"));
    names
}

fn is_numbered(name: &str, prefix: &str) -> bool {
    let number = name.strip_prefix(prefix).unwrap_or_default();
    !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// The block device of a namespace, from the name of a controller's path to it: with native multipath a controller has
/// `nvme0c1n2`, which is hidden, and the disk is `nvme0n2` of the subsystem.
fn head(name: &str) -> Option<String> {
    let (subsystem, rest) = name.strip_prefix("nvme")?.split_once(['c', 'n'])?;
    let namespace = rest
        .rsplit_once('n')
        .map_or(rest, |(_, namespace)| namespace);
    let path = rest.rsplit_once('n').map_or("0", |(path, _)| path);
    let numbers = [subsystem, path, namespace];
    let digits = |text: &&str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let head = format!("nvme{subsystem}n{namespace}");
    let is_path = name == format!("nvme{subsystem}c{path}n{namespace}");
    (numbers.iter().all(digits) && (name == head || is_path)).then_some(head)
}

/// The namespaces that a function's controller gives the kernel.
pub(super) fn namespaces(host: &Host, function: &PciFunction) -> Vec<Namespace> {
    let mut heads = Vec::new();
    for controller in controllers(function) {
        let below = names(&function.path().join("nvme").join(&controller));
        let mut own: Vec<String> = below.iter().filter_map(|name| head(name)).collect();
        if own.is_empty() {
            own = subsystem_heads(host, &controller);
        }
        heads.append(&mut own);
    }
    heads.sort();
    heads.dedup();
    let namespace = |name: String| Namespace {
        size: blocks::size(host, &name),
        partitions: blocks::partitions(&folder(host, &name)),
        name,
    };
    heads.into_iter().map(namespace).collect()
}

/// Disks of the subsystem that a controller is in, where the controller itself shows none.
fn subsystem_heads(host: &Host, controller: &str) -> Vec<String> {
    let subsystems = host.sysfs.path("class/nvme-subsystem");
    let members = names(&subsystems)
        .into_iter()
        .map(|name| names(&subsystems.join(name)));
    members
        .filter(|members| members.iter().any(|name| name == controller))
        .flatten()
        .filter_map(|name| head(&name))
        .collect()
}

fn siblings(host: &Host, function: &PciFunction) -> Vec<Sibling> {
    let in_use = function.siblings_in_use().into_iter();
    let sibling = |(address, driver)| Sibling {
        address,
        driver,
        block_devices: host
            .sysfs
            .function(address)
            .map(|function| namespaces(host, &function))
            .unwrap_or_default()
            .into_iter()
            .map(|namespace| namespace.name)
            .collect(),
    };
    in_use.map(sibling).collect()
}

/// Everybody who uses a function, through whatever driver has it.
fn uses(
    host: &Host,
    users: &Users,
    function: &PciFunction,
    controllers: &[String],
    namespaces: &[Namespace],
) -> Vec<Use> {
    let processes = &users.processes;
    let mut uses = Vec::new();
    for namespace in namespaces {
        block_uses(host, users, &namespace.name, &mut uses);
        // The namespace's character device, ng0n1, takes commands past the block layer.
        let generic = namespace.name.replacen("nvme", "ng", 1);
        let number = char_number(&host.sysfs.path("class/nvme-generic").join(&generic));
        open_uses(processes, &host.dev.join(generic), number, &mut uses);
    }
    for controller in controllers {
        let file = Path::new("/dev").join(controller);
        for export in users.exports.iter().filter(|export| export.device == file) {
            uses.push(Use::Held {
                device: controller.clone(),
                by: blocks::exported_by(&export.subsystem),
            });
        }
        let number = char_number(&function.path().join("nvme").join(controller));
        open_uses(processes, &host.dev.join(controller), number, &mut uses);
    }
    if let Some(node) = function.vfio_node() {
        let name = node.trim_start_matches("vfio/");
        let number = char_number(&host.sysfs.path("class/vfio").join(name));
        open_uses(processes, &host.dev.join(&node), number, &mut uses);
    }
    for (folder, below) in [("vfio-dev", "vfio/devices"), ("uio", "")] {
        for name in names(&function.path().join(folder)) {
            let number = char_number(&function.path().join(folder).join(&name));
            open_uses(
                processes,
                &host.dev.join(below).join(&name),
                number,
                &mut uses,
            );
        }
    }
    if function
        .driver()
        .is_some_and(|driver| driver.starts_with("vfio"))
    {
        vfio_uses(host, processes, function, &mut uses);
    }
    uses
}

fn block_uses(host: &Host, users: &Users, namespace: &str, uses: &mut Vec<Use>) {
    let processes = &users.processes;
    let tree = BlockTree::above(host, &users.exports, namespace);
    for block in &tree.blocks {
        let device = &block.label;
        for mount in &processes.mounts {
            let source = Path::new(&mount.source);
            if Some(mount.device) == block.number || block.is_at(source) {
                uses.push(Use::Mounted {
                    device: device.clone(),
                    at: mount.at.clone(),
                    here: mount.here,
                    elsewhere: mount.elsewhere.clone(),
                });
            }
        }
        if processes.swaps.iter().any(|swap| block.is_at(swap)) {
            uses.push(Use::Swap {
                device: device.clone(),
            });
        }
    }
    for holding in tree.holdings {
        uses.push(Use::Held {
            device: holding.device,
            by: holding.by,
        });
    }
    for block in &tree.blocks {
        let path = host.dev.join(device_file(&block.name));
        let number = block.number.map(Number::Block);
        open_uses(processes, &path, number, uses);
    }
}

fn open_uses(processes: &Processes, path: &Path, number: Option<Number>, uses: &mut Vec<Use>) {
    for process in processes.holders(path, number) {
        uses.push(Use::Open {
            device: path.display().to_string(),
            process,
        });
    }
}

/// Processes that have the device itself from VFIO and closed the group's file.
fn vfio_uses(host: &Host, processes: &Processes, function: &PciFunction, uses: &mut Vec<Use>) {
    let address = function.address.to_string();
    let groups = host.dev.join("vfio");
    for device in &processes.vfio_devices {
        let process = &device.process;
        let known =
            |used: &Use| matches!(used, Use::Open { process: known, .. } if known == process);
        if uses.iter().any(known) {
            continue;
        }
        let name = match &device.function {
            Some(path) if path.ends_with(&address) => format!("the VFIO device {address}"),
            Some(_) => continue,
            // A kernel that does not say which. One that has a group's file open has its device from there.
            None => {
                let elsewhere = processes.files.iter().any(|file| {
                    file.process == *process
                        && file.path.starts_with(&groups)
                        && file.path != groups.join("vfio")
                });
                if elsewhere {
                    continue;
                }
                "a VFIO device, maybe this one,".to_owned()
            }
        };
        uses.push(Use::Open {
            device: name,
            process: process.clone(),
        });
    }
}

fn char_number(folder: &Path) -> Option<Number> {
    Some(Number::Char(parse_number(&attribute(folder, "dev")?)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn head_of_a_multipath_path_is_the_disk_of_the_subsystem() {
        assert_eq!(head("nvme0c1n2").as_deref(), Some("nvme0n2"));
        assert_eq!(head("nvme10n3").as_deref(), Some("nvme10n3"));
    }

    #[test]
    fn head_of_anything_else_is_none() {
        for name in [
            "nvme0",
            "nvme0n",
            "nvme0cn1",
            "nvmen1",
            "ng0n1",
            "nvme0n1p1",
            "nvme0c1",
            "hwmon1",
            "nvme0c1n2n3",
        ] {
            assert_eq!(head(name), None, "{name}");
        }
    }

    #[test]
    fn mount_elsewhere_names_the_process_and_counts_the_rest() {
        let process = |pid| Process {
            pid,
            command: "sleep".into(),
        };
        let mounted = |here, elsewhere| Use::Mounted {
            device: "nvme0n1p1".into(),
            at: "/data".into(),
            here,
            elsewhere,
        };
        assert_eq!(
            mounted(true, vec![]).to_string(),
            "nvme0n1p1 is mounted at /data"
        );
        assert_eq!(
            mounted(false, vec![process(7)]).to_string(),
            "nvme0n1p1 is mounted at /data in the mount namespace of pid 7 (sleep)"
        );
        assert_eq!(
            mounted(true, vec![process(7), process(8)]).to_string(),
            "nvme0n1p1 is mounted at /data, also in 2 other mount namespaces, one of them of pid 7 (sleep)"
        );
    }
}
