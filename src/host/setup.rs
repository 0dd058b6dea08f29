//! Hands devices to vfio-pci and back. Each device ends bound, or with the driver that it had; what another does to
//! another device is none of its concern, but for those that share an IOMMU group.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nvme_driver::vfio::pci::{PciAddress, VFIO_DRIVER};

use super::Host;
use super::blocks::device_file;
use super::effects::Effects;
use super::inventory::{self, HostDevice, Survey};
use super::owner::{self, Record, User};
use super::refusals::{self, Claims};

/// What came of one device: what is to be said, and whether it is as asked.
pub type Outcome = Result<Vec<String>, Vec<String>>;

/// How often the kernel is looked at while it works.
const TICK: Duration = Duration::from_millis(100);
/// vfio-pci makes the group's file as it binds.
const NODE_TICKS: u32 = 50;
/// A controller has CAP.TO (up to 127 s, commonly below 20) to become ready; its namespaces are then looked for.
const LIVE_TICKS: u32 = 300;

/// What VFIO's containers need. The kernel asks for it by itself, but does not wait for it, and where it has no
/// /sbin/modprobe it asks in vain.
const IOMMU_MODULE: &str = "vfio_iommu_type1";

/// The driver that an SSD has when nobody did anything.
const KERNEL_DRIVER: &str = "nvme";

/// Options of bind.
#[derive(Clone, Debug, Default)]
pub struct BindOptions {
    pub force_data: bool,
    /// Also where no IOMMU stands between it and memory.
    pub unsafe_noiommu: bool,
    pub user: Option<User>,
}

/// Binds those of `wanted` that nothing speaks against.
#[must_use]
pub fn bind(
    host: &Host,
    effects: &mut dyn Effects,
    survey: &Survey,
    wanted: &[&HostDevice],
    options: &BindOptions,
) -> Vec<(PciAddress, Outcome)> {
    // Until all is done: nobody is to start using a disk between our look at it and the end of its driver.
    let mut held = Claims::new();
    let mut ready: Vec<&HostDevice> = Vec::new();
    let mut outcomes = Vec::new();
    let named: Vec<PciAddress> = wanted.iter().map(|device| device.address).collect();
    for device in wanted {
        match prepare(host, effects, survey, device, options, &mut held) {
            Ok(()) => ready.push(device),
            Err(mut reasons) => {
                reasons.extend(refusals::siblings(device, &named));
                outcomes.push((device.address, Err(refused(&reasons))));
            }
        }
    }
    // Those that share a group may all be named at once: they leave together, or none does.
    loop {
        let leaving: Vec<PciAddress> = ready.iter().map(|device| device.address).collect();
        let before = ready.len();
        ready.retain(|device| {
            let reasons = refusals::siblings(device, &leaving);
            if !reasons.is_empty() {
                outcomes.push((device.address, Err(refused(&reasons))));
            }
            reasons.is_empty()
        });
        if ready.len() == before {
            break;
        }
    }
    let taken: Vec<(&HostDevice, Outcome)> = ready
        .into_iter()
        .map(|device| (device, take(host, effects, device, options)))
        .collect();
    for (device, mut outcome) in taken {
        if effects.acts()
            && !device.is_bound()
            && let Ok(lines) = &mut outcome
        {
            // One of a group that failed leaves the others of no use.
            if let Some((address, driver)) = device.function.siblings_in_use().first() {
                let mut lines = vec![format!(
                    "{address} of the same IOMMU group stayed with {driver}, so this one goes back"
                )];
                lines.extend(roll_back(host, effects, device, options));
                outcome = Err(lines);
            } else {
                lines.extend(left_behind(host, device));
            }
        }
        outcomes.push((device.address, outcome));
    }
    outcomes.sort_by_key(|(address, _)| *address);
    outcomes
}

fn refused(reasons: &[String]) -> Vec<String> {
    reasons
        .iter()
        .map(|reason| format!("refused: {reason}"))
        .collect()
}

/// All checks but that of the siblings. A device that is bound already needs none but a group.
fn prepare(
    host: &Host,
    effects: &mut dyn Effects,
    survey: &Survey,
    device: &HostDevice,
    options: &BindOptions,
    held: &mut Claims,
) -> Result<(), Vec<String>> {
    let reasons = if device.is_bound() {
        refusals::of_group(host, device, options.unsafe_noiommu)
    } else {
        refusals::standing(host, survey, device, options.unsafe_noiommu)
    };
    if !reasons.is_empty() {
        return Err(reasons);
    }
    if device.is_bound() {
        return Ok(());
    }
    refusals::claim(host, effects, device, held)?;
    if !options.force_data {
        let reasons: Vec<String> = refusals::data(host, effects, device)
            .into_iter()
            .map(|reason| format!("{reason} (--force-data: take it all the same)"))
            .collect();
        if !reasons.is_empty() {
            return Err(reasons);
        }
    }
    Ok(())
}

fn take(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
    options: &BindOptions,
) -> Outcome {
    if device.is_bound() {
        let node = device.vfio_path(host).unwrap_or_default();
        let mut lines = vec![format!(
            "already bound to {VFIO_DRIVER}: {}",
            node.display()
        )];
        lines.extend(unsafe_now(device));
        lines.extend(hand_over(host, effects, device, &node, options).map_err(|why| vec![why])?);
        return Ok(lines);
    }
    // Without a driver it may be one that we lost half way: then the earlier record says where it belongs.
    let earlier = Record::load(host, device.address).ok().flatten();
    let earlier = earlier.filter(|_| device.driver.is_none());
    let record = earlier.unwrap_or_else(|| Record {
        address: device.address.to_string(),
        driver: device.driver.clone(),
        model: device.model.clone(),
        serial: device.serial.clone(),
        size: device.size,
        namespaces: device
            .namespaces
            .iter()
            .map(|namespace| namespace.name.clone())
            .collect(),
    });
    // The record comes first: without it, nobody would know where the device belongs if we were killed.
    record
        .save(host, effects, device.address)
        .map_err(|why| vec![why])?;
    let bound = attach(host, effects, device).and_then(|node| {
        let lines = hand_over(host, effects, device, &node, options)?;
        Ok((node, lines))
    });
    match bound {
        Ok((node, mut lines)) => {
            let before = device.driver.as_deref().unwrap_or("no driver");
            if effects.acts() {
                lines.insert(
                    0,
                    format!(
                        "bound to {VFIO_DRIVER} (before: {before}): {}",
                        node.display()
                    ),
                );
                lines.extend(unsafe_now(device));
            }
            Ok(lines)
        }
        Err(why) => {
            let mut lines = vec![why];
            lines.extend(roll_back(host, effects, device, options));
            Err(lines)
        }
    }
}

/// What there is to say of a device that vfio-pci has without an IOMMU.
fn unsafe_now(device: &HostDevice) -> Option<String> {
    let says = || refusals::NO_IOMMU_TAKEN.to_owned();
    device.function.is_without_iommu().then(says)
}

/// Gives it to vfio-pci. Where its file is then: without an IOMMU, its group is made by that.
fn attach(host: &Host, effects: &mut dyn Effects, device: &HostDevice) -> Result<PathBuf, String> {
    if !driver_folder(host, VFIO_DRIVER).exists() {
        load(effects, VFIO_DRIVER)?;
    }
    if !host.sysfs.path("module").join(IOMMU_MODULE).exists() {
        load(effects, IOMMU_MODULE)?;
    }
    write(
        effects,
        &device.function.path().join("driver_override"),
        VFIO_DRIVER,
    )?;
    let address = device.address.to_string();
    if let Some(driver) = &device.driver {
        write(
            effects,
            &driver_folder(host, driver).join("unbind"),
            &address,
        )?;
    }
    write(effects, &host.sysfs.path("bus/pci/drivers_probe"), &address)?;
    if !effects.acts() {
        return Ok(device.vfio_path(host).unwrap_or_default());
    }
    match device.function.driver() {
        Some(driver) if driver == VFIO_DRIVER => {}
        other => {
            return Err(format!(
                "{VFIO_DRIVER} did not take it: its driver is {} (dmesg says why)",
                other.as_deref().unwrap_or("none")
            ));
        }
    }
    let node = device.vfio_path(host).unwrap_or_default();
    let there = wait(effects, NODE_TICKS, || node.exists().then_some(()));
    there.map(|()| node.clone()).ok_or_else(|| {
        format!(
            "{VFIO_DRIVER} has it, but {} did not appear",
            node.display()
        )
    })
}

/// A disk of native multipath stays while another controller leads to it: the kernel could still be made to use it.
fn left_behind(host: &Host, device: &HostDevice) -> Option<String> {
    let names = device.namespaces.iter().map(|namespace| &namespace.name);
    let there = names.filter(|name| host.dev.join(device_file(name)).exists());
    let there: Vec<&str> = there.map(String::as_str).collect();
    (!there.is_empty()).then(|| {
        format!(
            "beware: the kernel still has {} through another controller of the same SSD",
            there.join(", ")
        )
    })
}

/// For `--user`: now, and whenever the kernel makes the group's file again.
fn hand_over(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
    node: &Path,
    options: &BindOptions,
) -> Result<Vec<String>, String> {
    let Some(user) = &options.user else {
        return Ok(Vec::new());
    };
    owner::set_rule(host, effects, device.address, Some(user))?;
    owner::hand_over(effects, node, user)?;
    if !effects.acts() {
        return Ok(Vec::new());
    }
    Ok(vec![format!(
        "{} belongs to {} now, and whenever it is bound ({})",
        node.display(),
        user.name,
        owner::rules_path(host).display()
    )])
}

/// Back to the driver that it had. Says how that went.
fn roll_back(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
    options: &BindOptions,
) -> Vec<String> {
    let mut lines = Vec::new();
    if let Err(why) = give(host, effects, device, device.driver.as_deref()) {
        lines.push(format!("while rolling back: {why}"));
    }
    let now = device.function.driver();
    if now == device.driver {
        // A rule that was there before stays.
        let rule = match options.user {
            Some(_) => owner::set_rule(host, effects, device.address, None),
            None => Ok(()),
        };
        lines.extend(
            [remove_record(host, effects, device.address), rule]
                .into_iter()
                .filter_map(Result::err),
        );
        lines.push(format!(
            "rolled back: its driver is {}",
            now.as_deref().unwrap_or("none, as before")
        ));
    } else {
        // The record stays: unbind can try again.
        lines.push(format!(
            "not rolled back: its driver is {}, try: scripts/setup-vfio unbind {}",
            now.as_deref().unwrap_or("none"),
            device.address
        ));
    }
    lines
}

/// Takes it from whatever driver has it now and gives it to `driver`.
fn give(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
    driver: Option<&str>,
) -> Result<(), String> {
    write(
        effects,
        &device.function.path().join("driver_override"),
        "\n",
    )?;
    let address = device.address.to_string();
    let now = device.function.driver();
    if let Some(now) = now.as_deref().filter(|now| Some(*now) != driver) {
        write(effects, &driver_folder(host, now).join("unbind"), &address)?;
    }
    let Some(driver) = driver else {
        return Ok(());
    };
    if now.as_deref() != Some(driver) {
        if !driver_folder(host, driver).exists() {
            load(effects, driver)?;
        }
        write(effects, &driver_folder(host, driver).join("bind"), &address)?;
    }
    match device.function.driver() {
        _ if !effects.acts() => Ok(()),
        Some(now) if now == driver => Ok(()),
        now => Err(format!(
            "its driver is {} and should be {driver}",
            now.as_deref().unwrap_or("none")
        )),
    }
}

/// Takes out what bind left behind for a device that it no longer has.
fn forget(host: &Host, effects: &mut dyn Effects, address: PciAddress) -> Result<(), String> {
    remove_record(host, effects, address)?;
    owner::set_rule(host, effects, address, None)
}

fn remove_record(
    host: &Host,
    effects: &mut dyn Effects,
    address: PciAddress,
) -> Result<(), String> {
    let path = Record::path(host, address);
    if !path.exists() {
        return Ok(());
    }
    effects
        .remove(&path)
        .map_err(|error| format!("cannot remove {}: {error}", path.display()))
}

/// Gives a device back to the driver that it had before bind.
///
/// # Errors
/// Why it is still where it was, or not yet usable.
pub fn unbind(host: &Host, effects: &mut dyn Effects, device: &HostDevice) -> Outcome {
    let one = |why: String| vec![why];
    let path = Record::path(host, device.address);
    let record = Record::load(host, device.address).map_err(|error| {
        one(format!(
            "cannot read {}: {error} (remove it: {KERNEL_DRIVER} takes over then)",
            path.display()
        ))
    })?;
    let previous = match &record {
        Some(record) => record.driver.clone(),
        None => Some(KERNEL_DRIVER.to_owned()),
    };
    let previous = previous.as_deref();
    match device.driver.as_deref() {
        // The kernel would wait for them, and we for the kernel, without an end.
        Some(VFIO_DRIVER) if !device.uses.is_empty() => {
            let reasons: Vec<String> = device.uses.iter().map(ToString::to_string).collect();
            return Err(refused(&reasons));
        }
        Some(VFIO_DRIVER) | None => {}
        Some(driver) if Some(driver) == previous || driver == KERNEL_DRIVER => {
            forget_if_left(host, effects, device).map_err(one)?;
            return Ok(one(format!("already bound to {driver}")));
        }
        Some(driver) => {
            return Err(refused(&[format!(
                "its driver is {driver}, neither {VFIO_DRIVER} nor {KERNEL_DRIVER}: whoever bound it there must release it"
            )]));
        }
    }
    give(host, effects, device, previous).map_err(one)?;
    forget(host, effects, device.address).map_err(one)?;
    if !effects.acts() {
        return Ok(Vec::new());
    }
    match previous {
        None => Ok(one(format!(
            "released from {VFIO_DRIVER}; it has no driver, as before"
        ))),
        Some(KERNEL_DRIVER) => wait_until_live(host, effects, device, record.as_ref()),
        Some(driver) => Ok(one(format!("bound to {driver}"))),
    }
}

/// Of a device that went back without us, such as at a driver's reload.
fn forget_if_left(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
) -> Result<(), String> {
    let forced = device.function.attribute("driver_override");
    if forced.as_deref() == Some(VFIO_DRIVER) {
        write(
            effects,
            &device.function.path().join("driver_override"),
            "\n",
        )?;
    }
    forget(host, effects, device.address)
}

/// The kernel's driver works in the background; its disks are what the user waits for.
fn wait_until_live(
    host: &Host,
    effects: &mut dyn Effects,
    device: &HostDevice,
    record: Option<&Record>,
) -> Outcome {
    // A controller without namespaces is rare, but one that had none cannot get them back.
    let expected = record.map_or(1, |record| record.namespaces.len());
    let function = &device.function;
    let state = || {
        let controller = inventory::controllers(function).into_iter().next()?;
        let state = function.attribute(&format!("nvme/{controller}/state"))?;
        Some((controller, state))
    };
    let nodes = || -> Vec<PathBuf> {
        inventory::namespaces(host, function)
            .into_iter()
            .map(|namespace| host.dev.join(device_file(&namespace.name)))
            .filter(|node| node.exists())
            .collect()
    };
    let live = wait(effects, LIVE_TICKS, || {
        let (controller, state) = state()?;
        match state.as_str() {
            "live" => {
                let nodes = nodes();
                (nodes.len() >= expected).then_some(Ok((controller, nodes)))
            }
            "dead" | "deleting" => Some(Err(format!(
                "the kernel gave {controller} up: it is {state} (see dmesg)"
            ))),
            _ => None,
        }
    });
    let seconds = (TICK * LIVE_TICKS).as_secs();
    let list = |nodes: &[PathBuf]| {
        let names: Vec<String> = nodes
            .iter()
            .map(|node| node.display().to_string())
            .collect();
        if names.is_empty() {
            "none".to_owned()
        } else {
            names.join(", ")
        }
    };
    match live {
        Some(Ok((controller, nodes))) => Ok(vec![format!(
            "bound to {KERNEL_DRIVER}: {controller} is live, its disks: {}",
            list(&nodes)
        )]),
        Some(Err(why)) => Err(vec![format!("bound to {KERNEL_DRIVER}, but {why}")]),
        None => match state() {
            // Without a record nobody promised a disk.
            Some((controller, state)) if state == "live" && record.is_none() => Ok(vec![format!(
                "bound to {KERNEL_DRIVER}: {controller} is live, no disks within {seconds} s"
            )]),
            Some((controller, state)) => Err(vec![format!(
                "bound to {KERNEL_DRIVER}, but after {seconds} s {controller} is {state}, its disks: {} (before: {})",
                list(&nodes()),
                record
                    .map(|record| record.namespaces.join(", "))
                    .unwrap_or_default()
            )]),
            None => Err(vec![format!(
                "bound to {KERNEL_DRIVER}, but after {seconds} s the kernel shows no controller (see dmesg)"
            )]),
        },
    }
}

/// Resets one function that nobody uses.
///
/// # Errors
/// Why it was not reset.
pub fn reset(
    host: &Host,
    effects: &mut dyn Effects,
    survey: &Survey,
    device: &HostDevice,
) -> Outcome {
    let reasons = refusals::in_use(survey, device);
    if !reasons.is_empty() {
        return Err(refused(&reasons));
    }
    let path = device.function.path().join("reset");
    if !path.exists() {
        return Err(refused(&[
            "the kernel knows no way to reset it (it has no reset attribute)".to_owned(),
        ]));
    }
    let mut held = Claims::new();
    refusals::claim(host, effects, device, &mut held).map_err(|reasons| refused(&reasons))?;
    let done = write(effects, &path, "1");
    drop(held);
    done.map_err(|why| vec![why])?;
    if !effects.acts() {
        return Ok(Vec::new());
    }
    // The kernel takes the first that the device can do; older ones do not say.
    let methods = device
        .function
        .attribute("reset_method")
        .unwrap_or_default();
    let done = match methods.split(' ').next() {
        Some(method) if !method.is_empty() => format!("reset ({method})"),
        _ => "reset".to_owned(),
    };
    let Some(controller) = device.controllers.first() else {
        return Ok(vec![done]);
    };
    // The kernel's driver starts the controller again in the background.
    let state = || {
        device
            .function
            .attribute(&format!("nvme/{controller}/state"))
    };
    let live = || state().filter(|state| state == "live");
    match wait(effects, LIVE_TICKS, live) {
        Some(state) => Ok(vec![format!("{done}: {controller} is {state}")]),
        None => Err(vec![format!(
            "{done}, but {controller} is {} after {} s (see dmesg)",
            state().as_deref().unwrap_or("gone"),
            (TICK * LIVE_TICKS).as_secs()
        )]),
    }
}

fn wait<T>(
    effects: &mut dyn Effects,
    ticks: u32,
    mut ready: impl FnMut() -> Option<T>,
) -> Option<T> {
    for _ in 0..ticks {
        if let Some(value) = ready() {
            return Some(value);
        }
        effects.pause(TICK);
    }
    ready()
}

fn driver_folder(host: &Host, driver: &str) -> PathBuf {
    host.sysfs.path("bus/pci/drivers").join(driver)
}

fn write(effects: &mut dyn Effects, path: &Path, value: &str) -> Result<(), String> {
    effects.write(path, value).map_err(|error| {
        format!(
            "cannot write {} to {}: {error}",
            value.escape_default(),
            path.display()
        )
    })
}

fn load(effects: &mut dyn Effects, module: &str) -> Result<(), String> {
    match effects.run("modprobe", &[module]) {
        Ok(ran) if ran.success => Ok(()),
        Ok(ran) => Err(format!(
            "cannot load the module {module}: {}",
            ran.complaint
        )),
        Err(error) => Err(format!("cannot run modprobe {module}: {error}")),
    }
}
