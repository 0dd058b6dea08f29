//! Block devices above a namespace: its partitions, and what device mapper, md or a loop device made of them.

use std::collections::{HashSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use super::Host;
use super::processes::{DeviceNumber, parse_number};

/// One block device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// As the kernel calls it: `nvme0n1p2`, `dm-0`.
    pub name: String,
    /// How it is reached from the namespace: `nvme0n1p2 > dm-0 (LVM vg-root)`.
    pub label: String,
    pub number: Option<DeviceNumber>,
    /// Names by which `/proc` may call it besides.
    aliases: Vec<String>,
}

impl Block {
    /// A path in `/dev` names this device.
    #[must_use]
    pub fn is_at(&self, path: &Path) -> bool {
        let name = path.strip_prefix("/dev").unwrap_or(path).to_string_lossy();
        name == device_file(&self.name) || self.aliases.iter().any(|alias| *alias == name)
    }
}

/// A device that keeps another one for itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holding {
    /// The label of what is held.
    pub device: String,
    pub by: String,
}

/// A namespace and all that stands on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockTree {
    /// The namespace comes first.
    pub blocks: Vec<Block>,
    pub holdings: Vec<Holding>,
}

impl BlockTree {
    /// Follows partitions and holders up from the block device called `namespace`.
    #[must_use]
    pub fn above(host: &Host, exports: &[Export], namespace: &str) -> BlockTree {
        let mut tree = BlockTree::default();
        let mut seen = HashSet::from([namespace.to_owned()]);
        let mut ahead = VecDeque::from([(namespace.to_owned(), namespace.to_owned())]);
        while let Some((name, label)) = ahead.pop_front() {
            let folder = folder(host, &name);
            for partition in partitions(&folder) {
                // `nvme0n1p1` says by itself what it is a part of.
                let label = match label.rsplit_once(" > ") {
                    Some((below, _)) => format!("{below} > {partition}"),
                    None => partition.clone(),
                };
                if seen.insert(partition.clone()) {
                    ahead.push_back((partition, label));
                }
            }
            for holder in holders(host, &folder, &name) {
                tree.holdings.push(Holding {
                    device: label.clone(),
                    by: holder.description.clone(),
                });
                if seen.insert(holder.name.clone()) {
                    let label = format!("{label} > {}", holder.description);
                    ahead.push_back((holder.name, label));
                }
            }
            for uuid in btrfs_on(host, &name) {
                tree.holdings.push(Holding {
                    device: label.clone(),
                    by: format!("the mounted btrfs file system {uuid}"),
                });
            }
            let block = Block {
                number: attribute(&folder, "dev").and_then(|text| parse_number(&text)),
                aliases: mapper_name(&folder)
                    .map(|name| format!("mapper/{name}"))
                    .into_iter()
                    .collect(),
                name,
                label,
            };
            for Export { subsystem, device } in exports {
                if block.is_at(device) {
                    tree.holdings.push(Holding {
                        device: block.label.clone(),
                        by: exported_by(subsystem),
                    });
                }
            }
            tree.blocks.push(block);
        }
        tree
    }
}

/// What the kernel's own NVMe target gives to other machines. It opens disks without claiming them, and no process has
/// them open, so this is the only place where it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    pub subsystem: String,
    /// A block device, or the file of a whole controller.
    pub device: PathBuf,
}

/// All that are enabled.
#[must_use]
pub fn exports(host: &Host) -> Vec<Export> {
    let subsystems = host.sysfs.path("kernel/config/nvmet/subsystems");
    let mut found = Vec::new();
    for subsystem in names(&subsystems) {
        let folder = subsystems.join(&subsystem);
        let namespaces = names(&folder.join("namespaces"));
        let mut places: Vec<PathBuf> = namespaces
            .iter()
            .map(|name| folder.join("namespaces").join(name))
            .collect();
        places.push(folder.join("passthru"));
        for place in places {
            let enabled = attribute(&place, "enable").is_some_and(|text| text == "1");
            if let Some(device) = attribute(&place, "device_path").filter(|_| enabled) {
                let device = PathBuf::from(device);
                found.push(Export {
                    subsystem: subsystem.clone(),
                    // It may have been named by its serial number.
                    device: fs::canonicalize(&device).unwrap_or(device),
                });
            }
        }
    }
    found
}

/// How an export is named as a holder.
#[must_use]
pub fn exported_by(subsystem: &str) -> String {
    format!("the kernel's NVMe target {subsystem}")
}

/// The folder of a disk or partition.
pub(super) fn folder(host: &Host, name: &str) -> PathBuf {
    host.sysfs.path("class/block").join(name)
}

/// The file below `/dev` of a kernel name: `!` stands for a slash there.
#[must_use]
pub fn device_file(name: &str) -> String {
    name.replace('!', "/")
}

/// Bytes; sysfs counts 512-byte sectors whatever the block size.
#[must_use]
pub fn size(host: &Host, name: &str) -> Option<u64> {
    let sectors: u64 = attribute(&folder(host, name), "size")?.parse().ok()?;
    sectors.checked_mul(512)
}

pub(super) fn attribute(folder: &Path, name: &str) -> Option<String> {
    let text = fs::read_to_string(folder.join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// Names in a folder, sorted.
pub(super) fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect();
    names.sort();
    names
}

/// Partitions of a disk, by name.
pub(super) fn partitions(folder: &Path) -> Vec<String> {
    let mut names = names(folder);
    names.retain(|name| folder.join(name).join("partition").is_file());
    names
}

struct Holder {
    name: String,
    description: String,
}

fn holders(host: &Host, of: &Path, name: &str) -> Vec<Holder> {
    let mut holders = names(&of.join("holders"));
    // A loop device is a user of its file like any other, and no holder.
    let backing = Path::new("/dev").join(device_file(name));
    for device in names(&host.sysfs.path("class/block")) {
        let file = attribute(&folder(host, &device), "loop/backing_file");
        if file.is_some_and(|file| Path::new(&file) == backing) {
            holders.push(device);
        }
    }
    let described = holders.into_iter().map(|name| Holder {
        description: describe(host, &name),
        name,
    });
    described.collect()
}

/// `dm-0 (LVM vg-root)`, `md0 (md raid1)`.
fn describe(host: &Host, name: &str) -> String {
    let folder = folder(host, name);
    if let Some(level) = attribute(&folder, "md/level") {
        return format!("{name} (md {level})");
    }
    if let Some(mapped) = mapper_name(&folder) {
        // "LVM-...", "CRYPT-LUKS2-...", "mpath-...", "part1-mpath-...": whose it is comes first.
        let uuid = attribute(&folder, "dm/uuid").unwrap_or_default();
        return match uuid.split_once('-') {
            Some((kind, _)) => format!("{name} ({kind} {mapped})"),
            None => format!("{name} (device mapper {mapped})"),
        };
    }
    if folder.join("loop").exists() {
        return format!("{name} (loop device)");
    }
    name.to_owned()
}

fn mapper_name(folder: &Path) -> Option<String> {
    attribute(folder, "dm/name")
}

/// btrfs has several devices, and mountinfo names but one of them.
fn btrfs_on(host: &Host, name: &str) -> Vec<String> {
    let mounted = host.sysfs.path("fs/btrfs");
    let mut uuids = names(&mounted);
    uuids
        .retain(|uuid| fs::symlink_metadata(mounted.join(uuid).join("devices").join(name)).is_ok());
    uuids
}
