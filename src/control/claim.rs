//! Opens the devices that a configuration names: claims an SSD through VFIO, by address or by serial number, or makes
//! an embedded controller.

use nvme_driver::spec::ascii_field;
use nvme_driver::vfio::VfioTransport;
use nvme_driver::vfio::pci::{PciAddress, Sysfs, VFIO_DRIVER};
use nvme_model::{Model, ModelHandle};

use super::device::{Device, DeviceError, Interrupts};
use crate::config::{ControllerConfig, DeviceConfig, Medium, ModelConfig, PciTarget};

/// Claims one device and asks for a queue pair for each of `virtqueues`. An embedded controller comes with its other
/// end.
///
/// # Errors
/// When it cannot be opened.
pub fn open_device(
    config: &DeviceConfig,
    virtqueues: usize,
    interrupts: Interrupts,
) -> Result<(Device, Option<ModelHandle>), DeviceError> {
    // At least one, so that a device without disks can be identified.
    let wanted = u16::try_from(virtqueues.max(1)).unwrap_or(u16::MAX);
    match &config.controller {
        ControllerConfig::Pci(PciTarget::Address(address)) => {
            let device = claim_pci(config, *address, wanted, interrupts)?;
            Ok((device, None))
        }
        ControllerConfig::Pci(PciTarget::Serial(serial)) => {
            let (_, device) = find_by_serial(config, serial, wanted, interrupts)?;
            Ok((device, None))
        }
        ControllerConfig::Model(model) => {
            let transport = make_model(&config.name, model, interrupts)?;
            let handle = transport.handle();
            // Only one whose reset failed is given up. What memory held is gone with it; an image file is still there,
            // and where nothing was kept nothing is missing.
            let (name, model) = (config.name.clone(), model.clone());
            let again = Box::new(move || match model.medium {
                Medium::Ram { .. } => Err(DeviceError::Lost { name: name.clone() }),
                Medium::File { .. } | Medium::Null { .. } => make_model(&name, &model, interrupts),
            });
            let name = &config.name;
            let device = Device::open_with(name, transport, wanted, interrupts, again)?;
            Ok((device, Some(handle)))
        }
    }
}

/// The SSD with this serial number, among those that vfio-pci has: nothing but the controller itself knows it, so each
/// is asked, in the order of addresses. One that another process has is passed over.
fn find_by_serial(
    config: &DeviceConfig,
    serial: &str,
    wanted: u16,
    interrupts: Interrupts,
) -> Result<(PciAddress, Device), DeviceError> {
    let functions = Sysfs::default().functions().unwrap_or_default();
    let mut others = Vec::new();
    for function in functions {
        if !function.is_nvme() || function.driver().as_deref() != Some(VFIO_DRIVER) {
            continue;
        }
        let address = function.address;
        match claim_pci(config, address, wanted, interrupts) {
            Ok(device) if ascii_field(&device.identity.sn) == serial => {
                return Ok((address, device));
            }
            Ok(device) => {
                others.push(format!("{address} is {}", ascii_field(&device.identity.sn)));
                device.shutdown()?;
            }
            Err(error) => others.push(error.to_string()),
        }
    }
    Err(DeviceError::NoSuchSerial {
        name: config.name.clone(),
        serial: serial.to_owned(),
        others: if others.is_empty() {
            "vfio-pci has no NVMe controller".to_owned()
        } else {
            others.join("; ")
        },
    })
}

/// Where an SSD is that a configuration names. One that is named by its serial number is asked for it and let go again.
///
/// # Errors
/// When it is not there.
pub fn locate(config: &DeviceConfig, target: &PciTarget) -> Result<PciAddress, DeviceError> {
    match target {
        PciTarget::Address(address) => Ok(*address),
        PciTarget::Serial(serial) => {
            let (address, device) = find_by_serial(config, serial, 1, Interrupts::Off)?;
            device.shutdown()?;
            Ok(address)
        }
    }
}

fn claim_pci(
    config: &DeviceConfig,
    address: PciAddress,
    wanted: u16,
    interrupts: Interrupts,
) -> Result<Device, DeviceError> {
    let isolation = config.isolation;
    let claim = move || Ok(VfioTransport::claim_with(address, isolation)?);
    Device::open_with(&config.name, claim()?, wanted, interrupts, Box::new(claim))
}

/// An embedded controller.
///
/// # Errors
/// When its medium cannot be had.
pub fn make_model(
    name: &str,
    model: &ModelConfig,
    interrupts: Interrupts,
) -> Result<Model, DeviceError> {
    let namespaces = u64::from(model.namespaces.max(1));
    let (medium, size) = match &model.medium {
        Medium::Ram { size } => (nvme_model::Medium::Ram, Some(*size)),
        Medium::File { path, size } => (nvme_model::Medium::File { path: path.clone() }, *size),
        Medium::Null { size } => (nvme_model::Medium::Null, Some(*size)),
    };
    Model::new(nvme_model::ModelConfig {
        name: name.to_owned(),
        medium,
        size: size.map_or(0, |size| size / namespaces),
        namespaces: model.namespaces,
        block_size: model.block_size.bytes(),
        queues: model.queue_pairs,
        mqes: model.max_queue_entries,
        mdts_bytes: model.max_transfer,
        vwc: model.volatile_write_cache,
        latency: model.latency,
        jitter: model.jitter,
        serial: model.serial.clone(),
        interrupts: interrupts == Interrupts::OnRequest,
        ..nvme_model::ModelConfig::default()
    })
    .map_err(|error| DeviceError::Model {
        name: name.to_owned(),
        error,
    })
}
