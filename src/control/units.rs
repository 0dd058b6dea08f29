//! The logical units of namespaces: one for each, whichever hosts have it, from its first host to the end of the server.

use std::collections::BTreeMap;

use std::sync::Arc;

use nvme_driver::Namespace;
use nvme_driver::spec::{Nsid, ascii_field};

use super::device::Device;
use super::server::ServerError;
use super::state::StateDirectory;
use crate::block::Geometry;
use crate::config::{HostLun, Socket};
use crate::datapath::MediumId;
use crate::plan::{HostPlan, Plan};
use crate::scsi::{LogicalUnit, UnitIds};

/// See the module.
#[derive(Debug)]
pub(super) struct Units {
    /// By device and NSID.
    units: BTreeMap<(usize, u32), LogicalUnit>,
    /// Where reservations are kept.
    state: Option<StateDirectory>,
}

impl Units {
    pub(super) fn of(plan: &Plan) -> Result<Units, ServerError> {
        let state = plan.state.as_deref().map(StateDirectory::open);
        Ok(Units {
            units: BTreeMap::new(),
            state: state.transpose()?,
        })
    }

    /// That of a namespace for a host; all hosts have so many lanes together. `device` is the one that `place` names.
    pub(super) fn unit_of(
        &mut self,
        host: &HostPlan,
        place: HostLun,
        device: &Device,
        lanes: usize,
    ) -> Result<LogicalUnit, ServerError> {
        let (namespace, geometry) = servable(&host.socket, place.nsid, host.readonly, device)?;
        let medium = MediumId {
            device: number_of(place.device),
            nsid: Nsid(place.nsid),
        };
        let place = (place.device, place.nsid);
        let unit = match self.units.get(&place) {
            Some(unit) => unit.clone(),
            None => {
                let mut unit = logical_unit(device, &namespace, geometry);
                unit = unit.with_medium(medium.bits()).with_lanes(lanes);
                if let Some(state) = &mut self.state {
                    let serial = ascii_field(&device.identity.sn);
                    let (file, kept) = state.file_of(&serial, &namespace)?;
                    unit = unit.with_keeper(Box::new(file), kept);
                }
                self.units.insert(place, unit.clone());
                unit
            }
        };
        Ok(unit.with_read_only(geometry.read_only()))
    }

    /// That of a namespace has so many blocks by now: the logical unit, if any host has or had it.
    pub(super) fn resize(&mut self, device: usize, nsid: u32, blocks: u64) -> Option<LogicalUnit> {
        let unit = self.units.get_mut(&(device, nsid))?;
        *unit = unit.clone().with_blocks(blocks)?;
        Some(unit.clone())
    }
}

/// What lanes know a device by.
pub(super) fn number_of(device_index: usize) -> u32 {
    // There are far fewer.
    u32::try_from(device_index).unwrap_or(u32::MAX)
}

fn logical_unit(device: &Device, namespace: &Namespace, geometry: Geometry) -> LogicalUnit {
    let ids = UnitIds {
        eui64: namespace.ids.eui64,
        nguid: namespace.ids.nguid,
        uuid: namespace.ids.uuid,
    };
    LogicalUnit::new(geometry, &format!("{}-ns{}", device.name, namespace.nsid.0))
        .with_ids(ids)
        .with_health(Arc::clone(&device.health))
        .with_volatile_cache(device.has_volatile_cache())
        .with_provisioning(
            device.can_deallocate(),
            namespace.deallocated_reads_zero,
            device.can_write_zeroes(),
        )
        .with_copy(device.copy_blocks(namespace.nsid))
}

/// The namespace of a disk, if it can be served.
pub(super) fn servable(
    socket: &Socket,
    nsid: u32,
    readonly: bool,
    device: &Device,
) -> Result<(Namespace, Geometry), ServerError> {
    let refuse = |reason: String| ServerError::Namespace {
        disk: socket.to_string(),
        device: device.name.clone(),
        nsid,
        reason,
    };
    let namespace = device.namespace(Nsid(nsid)).ok_or_else(|| {
        let active: Vec<u32> = device
            .namespaces()
            .iter()
            .map(|info| info.namespace.nsid.0)
            .collect();
        refuse(format!("it is not active (active: {active:?})"))
    })?;
    // A controller with one command set need not say that it is this one.
    let command_set = namespace.ids.command_set.unwrap_or(0);
    if command_set != 0 {
        let name = if command_set == 2 { " (zoned)" } else { "" };
        return Err(refuse(format!(
            "its command set is {command_set:02x}h{name}, and a disk needs one of the NVM command set (00h)"
        )));
    }
    if namespace.metadata_size != 0 {
        return Err(refuse(format!(
            "its blocks carry {} bytes of metadata (format it without)",
            namespace.metadata_size
        )));
    }
    if namespace.block_size > device.max_transfer {
        return Err(refuse(format!(
            "one block exceeds the {} bytes of one command",
            device.max_transfer
        )));
    }
    let shift = namespace.block_size.trailing_zeros();
    let read_only = readonly || namespace.write_protected;
    let geometry =
        Geometry::new(shift, namespace.blocks, read_only).filter(|geometry| geometry.blocks() > 0);
    let geometry =
        geometry.ok_or_else(|| refuse(format!("{} blocks make no disk", namespace.blocks)))?;
    Ok((namespace, geometry))
}
