//! Why a device must not be taken from whoever has it. Each reason is a sentence that names everything involved.
//!
//! Three sorts, in this order:
//! - [`standing`]: what the inventory shows. Nothing overrides these.
//! - [`claim`]: the kernel is asked for each disk exclusively, which also finds what no table shows, and keeps others
//!   from starting to use it until the driver has let go.
//! - [`data`]: what `wipefs` finds on the disks. `--force-data` overrides these and only these.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::Path;

use nvme_driver::vfio::pci::PciAddress;
use serde::Deserialize;

use super::Host;
use super::blocks::device_file;
use super::effects::{Effects, Held};
use super::inventory::{HostDevice, Namespace, Survey};

/// What VFIO needs first.
pub const NO_GROUP: &str = "it is in no IOMMU group: no IOMMU is on";

/// How to get it.
pub const ENABLE_IOMMU: &str = "put intel_iommu=on (Intel) or `amd_iommu=on iommu=pt` (AMD) on the kernel command \
    line, and enable VT-d (Intel) or AMD-Vi (AMD, often called IOMMU) in the firmware";

/// How to do without.
pub const OR_UNSAFE: &str = "or, at the risk of all memory of this machine, load the module vfio with \
    enable_unsafe_noiommu_mode=1 and give --unsafe-noiommu";

/// Why we do without it.
pub const NO_IOMMU: &str =
    "its IOMMU group is of VFIO's no-IOMMU mode: the SSD could write to any memory of the machine";

/// What the user takes upon himself.
pub const NO_IOMMU_TAKEN: &str = "UNSAFE, NO IOMMU: once it is served, any fault of this SSD may change all memory of this \
    machine; the kernel is tainted";

/// Reasons of the function itself and of those who use it; `unsafe_noiommu`: not that nothing stands between it and memory.
#[must_use]
pub fn standing(
    host: &Host,
    survey: &Survey,
    device: &HostDevice,
    unsafe_noiommu: bool,
) -> Vec<String> {
    let mut reasons = of_group(host, device, unsafe_noiommu);
    reasons.extend(in_use(survey, device));
    reasons
}

/// Without an IOMMU that stands between, VFIO is of no use, but for those who insist.
#[must_use]
pub fn of_group(host: &Host, device: &HostDevice, unsafe_noiommu: bool) -> Vec<String> {
    match (device.iommu_group, unsafe_noiommu) {
        (None, false) => vec![format!("{NO_GROUP}; {ENABLE_IOMMU}; {OR_UNSAFE}")],
        // vfio-pci makes a group for it as it takes it.
        (None, true) => noiommu_mode(host).err().into_iter().collect(),
        (Some(_), false) if device.no_iommu => vec![NO_IOMMU.to_owned()],
        (Some(_), _) => Vec::new(),
    }
}

/// VFIO takes devices without an IOMMU. That is for the user to switch on: it is a decision about the machine.
fn noiommu_mode(host: &Host) -> Result<(), String> {
    const PARAMETER: &str = "enable_unsafe_noiommu_mode";
    let module = host.sysfs.path("module/vfio");
    let parameter = module.join("parameters").join(PARAMETER);
    match std::fs::read_to_string(&parameter) {
        Ok(value) if value.trim() == "Y" => Ok(()),
        Ok(_) => Err(format!(
            "{NO_GROUP}, and VFIO's no-IOMMU mode is off: write 1 to {}",
            parameter.display()
        )),
        Err(_) if module.exists() => Err(format!(
            "{NO_GROUP}, and this kernel's VFIO has no mode without one (it was built without CONFIG_VFIO_NOIOMMU)"
        )),
        Err(_) => Err(format!(
            "{NO_GROUP}, and VFIO's no-IOMMU mode is not on: modprobe vfio {PARAMETER}=1"
        )),
    }
}

/// Who uses it, or might.
#[must_use]
pub fn in_use(survey: &Survey, device: &HostDevice) -> Vec<String> {
    let mut reasons: Vec<String> = device.uses.iter().map(ToString::to_string).collect();
    if let Some(first) = survey.unseen.first() {
        reasons.push(format!(
            "the open files of {} processes cannot be seen (the first is pid {first}): run this as root, with \
             CAP_SYS_PTRACE",
            survey.unseen.len()
        ));
    }
    reasons
}

/// Others of its IOMMU group that the kernel uses, but for those in `leaving`.
#[must_use]
pub fn siblings(device: &HostDevice, leaving: &[PciAddress]) -> Vec<String> {
    let staying = device
        .siblings
        .iter()
        .filter(|sibling| !leaving.contains(&sibling.address));
    let reasons = staying.map(|sibling| {
        let blocks = match sibling.block_devices.as_slice() {
            [] => String::new(),
            names => format!(" ({})", names.join(", ")),
        };
        format!(
            "IOMMU group {} also has {}, which the driver {} uses{blocks}: VFIO takes a group only whole",
            device.iommu_group.unwrap_or_default(),
            sibling.address,
            sibling.driver,
        )
    });
    reasons.collect()
}

/// Disks that we have exclusively, by name, until this is dropped.
pub type Claims = BTreeMap<String, Held>;

/// Takes every disk of a device exclusively, and keeps it in `held`. Those there are ours already: controllers of one
/// SSD may lead to the same disk.
///
/// # Errors
/// The reasons, when one of them is not to be had.
pub fn claim(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
    held: &mut Claims,
) -> Result<(), Vec<String>> {
    let mut reasons = Vec::new();
    for Namespace { name, .. } in &device.namespaces {
        if held.contains_key(name) {
            continue;
        }
        let path = host.dev.join(device_file(name));
        match effects.claim(&path) {
            Ok(one) => {
                held.insert(name.clone(), one);
            }
            Err(error) if error.kind() == ErrorKind::ResourceBusy => reasons.push(format!(
                "the kernel has {name} claimed for something that /proc and /sys do not show (a ZFS pool, a SCSI \
                 target, a mount namespace without a process)"
            )),
            Err(error) => reasons.push(format!("cannot open {}: {error}", path.display())),
        }
    }
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(reasons)
    }
}

/// What is on the disks, or why that cannot be told.
#[must_use]
pub fn data(host: &Host, effects: &mut dyn Effects, device: &HostDevice) -> Vec<String> {
    let cannot_tell = |why: String| format!("{why}, so whether it holds data cannot be told");
    match (device.driver.as_deref(), device.state.as_deref()) {
        (Some("nvme"), Some("live")) => {}
        (Some("nvme"), state) => {
            let state = state.unwrap_or("not there");
            return vec![cannot_tell(format!("the kernel's controller is {state}"))];
        }
        (Some(driver), _) => return vec![cannot_tell(format!("the driver {driver} has it"))],
        (None, _) => return vec![cannot_tell("no driver has it".to_owned())],
    }
    let mut reasons = Vec::new();
    for namespace in &device.namespaces {
        if namespace.size.unwrap_or_default() == 0 {
            reasons.push(cannot_tell(format!(
                "{} has a format that the kernel cannot read",
                namespace.name
            )));
            continue;
        }
        let partitions = namespace.partitions.iter();
        for name in std::iter::once(&namespace.name).chain(partitions) {
            match signatures(effects, &host.dev.join(device_file(name))) {
                Ok(found) if found.is_empty() => {}
                Ok(found) => reasons.push(format!("{name} holds {}", found.join(", "))),
                Err(why) => reasons.push(cannot_tell(why)),
            }
        }
    }
    reasons
}

/// What `wipefs -J` prints.
#[derive(Deserialize)]
struct Wipefs {
    #[serde(default)]
    signatures: Vec<Signature>,
}

#[derive(Deserialize)]
struct Signature {
    r#type: Option<String>,
    label: Option<String>,
}

/// Kinds of file systems, partition tables, RAID or LVM members on a device, each once.
fn signatures(effects: &mut dyn Effects, path: &Path) -> Result<Vec<String>, String> {
    let file = path.display().to_string();
    let ran = effects
        .look("wipefs", &["-J", "--no-act", &file])
        .map_err(|error| {
            if error.kind() == ErrorKind::NotFound {
                "the program `wipefs` is missing (package util-linux)".to_owned()
            } else {
                format!("cannot run wipefs on {file}: {error}")
            }
        })?;
    if !ran.success {
        return Err(format!("wipefs cannot look at {file}: {}", ran.complaint));
    }
    parse_wipefs(&ran.stdout)
        .map_err(|error| format!("wipefs said of {file} what is not understood: {error}"))
}

fn parse_wipefs(text: &str) -> serde_json::Result<Vec<String>> {
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    let found: Wipefs = serde_json::from_str(text)?;
    let mut kinds = Vec::new();
    for Signature { r#type, label } in found.signatures {
        let kind = r#type.unwrap_or_else(|| "a signature".to_owned());
        let kind = match label {
            Some(label) => format!("{kind} \"{label}\""),
            None => kind,
        };
        // GPT has a copy at the end.
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    Ok(kinds)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wipefs_output_gives_each_kind_once_with_its_label() {
        let text = r#"{"signatures": [
            {"device": "a", "offset": "0x200", "type": "gpt", "uuid": null, "label": null},
            {"device": "a", "offset": "0x3fffe00", "type": "gpt", "uuid": null, "label": null},
            {"device": "a", "offset": "0x438", "type": "ext4", "uuid": "97", "label": "data"}]}"#;
        assert_eq!(parse_wipefs(text).unwrap(), ["gpt", "ext4 \"data\""]);
    }

    #[test]
    fn wipefs_output_without_signatures_is_empty_and_garbage_is_an_error() {
        assert_eq!(parse_wipefs("").unwrap(), [""; 0]);
        assert_eq!(
            parse_wipefs("{\n \"signatures\": [\n\n]\n}\n").unwrap(),
            [""; 0]
        );
        assert!(parse_wipefs("wipefs: what?").is_err());
        assert!(parse_wipefs("{\"signatures\": 1}").is_err());
    }
}
