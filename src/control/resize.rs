//! Namespaces that become larger or smaller while they are served. A device says so by an asynchronous event, or somebody
//! asks it; either way it is identified anew, and whoever has the namespace follows.
//!
//! ```text
//!  SSD, embedded controller --event--> Keeper --+
//!  tandem device rescan, resize --> Admin ------+--> Sizes --> the device is identified anew
//!                                                     |------> logical units, a successor of each host's target, its events
//!                                                     +------> disks: the session gives it to their lanes, then tells the guest
//! ```
//! The new size is in force before any guest is told of it. Reads and writes beyond the end of a namespace that has shrunk
//! are the device's to refuse until then.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme_driver::Namespace;
use nvme_driver::spec::Nsid;
use nvme_model::{ModelError, ModelHandle};

use super::device::{Device, DeviceError, NamespaceChange};
use super::session::{Export, Kind};
use super::units::Units;
use crate::datapath::Happening;

/// See the module.
#[derive(Debug)]
pub(super) struct Sizes {
    /// In the order of the plan; an embedded controller with its other end.
    devices: Vec<(Arc<Device>, Option<ModelHandle>)>,
    exports: Vec<Arc<Export>>,
    /// Held while sizes change, so that whoever gets a logical unit meanwhile gets it as it is.
    units: Mutex<Units>,
}

/// Why a namespace has the size that it has.
#[derive(Debug, thiserror::Error)]
pub(super) enum ResizeError {
    #[error("there is no device {name}: this server has {known}")]
    NoDevice { name: String, known: String },
    #[error(
        "device {name} is an SSD, whose namespaces have the size that its own tools give them: it is followed when it says so, or \
         with tandem device rescan {name}"
    )]
    NotOurs { name: String },
    #[error("device {name}: {error}")]
    Model { name: String, error: ModelError },
    #[error("device {name}: {error}")]
    Device { name: String, error: DeviceError },
}

impl Sizes {
    pub(super) fn new(
        devices: Vec<(Arc<Device>, Option<ModelHandle>)>,
        exports: Vec<Arc<Export>>,
        units: Units,
    ) -> Sizes {
        Sizes {
            devices,
            exports,
            units: Mutex::new(units),
        }
    }

    /// The logical units. None changes its size while they are held.
    pub(super) fn units(&self) -> MutexGuard<'_, Units> {
        self.units.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn find(&self, name: &str) -> Result<(usize, &Device, Option<&ModelHandle>), ResizeError> {
        let mut devices = self.devices.iter().enumerate();
        let found = devices.find(|(_, (device, _))| device.name == name);
        let (index, (device, model)) = found.ok_or_else(|| {
            let known = self.devices.iter().map(|(device, _)| device.name.as_str());
            ResizeError::NoDevice {
                name: name.to_owned(),
                known: known.collect::<Vec<_>>().join(", "),
            }
        })?;
        Ok((index, device, model.as_ref()))
    }

    /// The namespaces of a device are identified anew, those in `which`, and guests hear of what is different.
    pub(super) fn follow(
        &self,
        device: usize,
        which: &[Nsid],
    ) -> Result<Vec<NamespaceChange>, DeviceError> {
        self.follow_with(&mut self.units(), device, which)
    }

    fn follow_with(
        &self,
        units: &mut Units,
        index: usize,
        which: &[Nsid],
    ) -> Result<Vec<NamespaceChange>, DeviceError> {
        let Some((device, _)) = self.devices.get(index) else {
            return Ok(Vec::new());
        };
        let changes = device.survey(which)?;
        for change in &changes {
            match change {
                NamespaceChange::Resized { namespace, .. } => {
                    tracing::warn!(device = %device.name, "{change}");
                    self.tell(units, index, namespace);
                }
                NamespaceChange::Unusable { .. } => {
                    tracing::error!(device = %device.name, "{change}");
                }
            }
        }
        Ok(changes)
    }

    /// Whoever has a namespace is told its size.
    fn tell(&self, units: &mut Units, device: usize, namespace: &Namespace) {
        let Namespace { nsid, blocks, .. } = *namespace;
        let unit = units.resize(device, nsid.0, blocks);
        let own = self.devices.get(device).map(|(device, _)| device);
        for export in &self.exports {
            match &export.kind {
                Kind::Disk(disk) => {
                    let same = own.is_some_and(|own| Arc::ptr_eq(own, &export.device));
                    if same && disk.nsid == nsid {
                        disk.resize(blocks);
                    }
                }
                Kind::Host(host) => {
                    let Some(unit) = &unit else { continue };
                    for (target, lun) in host.roster.resize(unit) {
                        host.events.tell(target, lun, Happening::Resized);
                    }
                    host.hurry_lanes();
                }
            }
        }
    }

    /// Has a device looked at, and says what is different.
    pub(super) fn rescan(&self, name: &str) -> Result<String, ResizeError> {
        let (index, device, model) = self.find(name)?;
        let mut units = self.units();
        let name = || device.name.clone();
        if let Some(model) = model {
            // It raises an event as an SSD would; what that says is found here already.
            let looked = model.look_at_medium();
            looked.map_err(|error| ResizeError::Model {
                name: name(),
                error,
            })?;
        }
        let changes = self.follow_with(&mut units, index, &[Nsid::ALL]);
        let changes = changes.map_err(|error| ResizeError::Device {
            name: name(),
            error,
        })?;
        Ok(match changes.as_slice() {
            [] => format!("device {}: no namespace has changed", device.name),
            changes => {
                let changes: Vec<String> = changes.iter().map(ToString::to_string).collect();
                format!("device {}: {}", device.name, changes.join("; "))
            }
        })
    }

    /// Makes a namespace of an embedded controller larger.
    pub(super) fn resize(&self, name: &str, nsid: u32, bytes: u64) -> Result<String, ResizeError> {
        let (index, device, model) = self.find(name)?;
        let name = || device.name.clone();
        let model = model.ok_or_else(|| ResizeError::NotOurs { name: name() })?;
        let mut units = self.units();
        let resized = model.resize(Nsid(nsid), bytes);
        resized.map_err(|error| ResizeError::Model {
            name: name(),
            error,
        })?;
        let changes = self.follow_with(&mut units, index, &[Nsid(nsid)]);
        let changes = changes.map_err(|error| ResizeError::Device {
            name: name(),
            error,
        })?;
        Ok(match changes.first() {
            None => format!(
                "device {}: namespace {nsid} had that size already",
                device.name
            ),
            Some(change) => format!("device {}: {change}", device.name),
        })
    }
}
