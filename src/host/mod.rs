//! The machine's own SSDs: which there are, who uses them, and handing them to vfio-pci and back.
//!
//! ```text
//!  /sys, /proc --survey--> HostDevice: model, group, block devices, uses ---+--> show: `tandem list`, `setup-vfio status`
//!                                                                           |
//!                          refusals: why it must not be taken  <------------+
//!                                 | none                  (wipefs and an exclusive open are asked here)
//!                                 v
//!                          setup: bind, unbind, reset --Effects--> writes to /sys, modprobe, chown, udev rules
//! ```
//! [`survey`](inventory::survey) only reads, below roots that tests replace by a tree of their own. All that changes the
//! machine goes through [`Effects`](effects::Effects), so that a test sees each write and `--dry-run` prints it instead.
//!
//! It promises: nothing is taken from its driver that was not named and that anyone uses; a device is bound whole, or
//! is back with the driver that it had. It knows nothing of how a device is served. Start at [`refusals`].
#![forbid(unsafe_code)]

pub mod blocks;
pub mod command;
pub mod effects;
pub mod hugepages;
pub mod inventory;
pub mod owner;
pub mod processes;
pub mod refusals;
pub mod setup;
pub mod show;

use std::path::{Path, PathBuf};

use nvme_driver::vfio::pci::Sysfs;

/// Where the machine is looked at: the usual roots, or a test's.
#[derive(Clone, Debug)]
pub struct Host {
    /// `/sys`
    pub sysfs: Sysfs,
    /// `/proc`
    pub proc: PathBuf,
    /// `/dev`
    pub dev: PathBuf,
    /// `/run`: records of what was bound are below `tandem/vfio`.
    pub run: PathBuf,
    /// `/etc`: users, limits, udev rules.
    pub etc: PathBuf,
}

impl Default for Host {
    fn default() -> Host {
        Host::at(Path::new("/"))
    }
}

impl Host {
    /// A machine whose `/sys`, `/proc` and so on are below `root`.
    #[must_use]
    pub fn at(root: &Path) -> Host {
        Host {
            sysfs: Sysfs::at(root.join("sys")),
            proc: root.join("proc"),
            dev: root.join("dev"),
            run: root.join("run"),
            etc: root.join("etc"),
        }
    }
}
