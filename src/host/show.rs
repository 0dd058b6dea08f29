//! The machine's SSDs for people: `setup-vfio status`, and `tandem list`, which adds what can be done with each.

use std::fmt::Write;

use nvme_driver::vfio::pci::PciAddress;
use serde::Serialize;
use serde_json::{Value, json};

use super::Host;
use super::effects::Effects;
use super::inventory::{HostDevice, Survey};
use super::refusals;

/// What Tandem would do with a device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "can", content = "how", rename_all = "lowercase")]
pub enum Verdict {
    Serve(String),
    Bind(String),
    /// Why neither.
    No(String),
}

impl Verdict {
    fn line(&self) -> String {
        match self {
            Verdict::Serve(how) => format!("serve it: {how}"),
            Verdict::Bind(how) => format!("bind it first: {how}"),
            Verdict::No(why) => format!("cannot: {why}"),
        }
    }
}

/// One for each device. What is on the disks is only asked by root, who may.
#[must_use]
pub fn verdicts(host: &Host, effects: &mut dyn Effects, survey: &Survey) -> Vec<Verdict> {
    let alone = |device: &HostDevice| {
        let mut reasons = match device.iommu_group {
            // How to change that is said once, below all.
            None => vec![refusals::NO_GROUP.to_owned()],
            // Somebody has bound it so: what is left is to say so again.
            Some(_) => refusals::of_group(host, device, device.is_bound()),
        };
        reasons.extend(device.uses.iter().map(ToString::to_string));
        reasons
    };
    let free = survey
        .devices
        .iter()
        .filter(|device| alone(device).is_empty());
    let free: Vec<PciAddress> = free.map(|device| device.address).collect();
    let verdict = |device: &HostDevice| {
        let mut reasons = alone(device);
        // SSDs of one group are bound together, or served only together.
        let leaving = if device.is_bound() { &[][..] } else { &free };
        reasons.extend(refusals::siblings(device, leaving));
        if !reasons.is_empty() {
            return Verdict::No(reasons.join("; "));
        }
        if device.is_bound() {
            let risk = match device.no_iommu {
                true => " --unsafe-noiommu, at the risk of all memory",
                false => "",
            };
            return Verdict::Serve(format!("--device pci:{}{risk}", device.address));
        }
        let mut together = device.address.to_string();
        for sibling in &device.siblings {
            let _ = write!(together, " {}", sibling.address);
        }
        let data = if effects.is_root() {
            refusals::data(host, effects, device)
        } else {
            Vec::new()
        };
        if data.is_empty() {
            return Verdict::Bind(format!("scripts/setup-vfio bind {together}"));
        }
        Verdict::No(format!(
            "{} (if nobody needs that: scripts/setup-vfio bind --force-data {together})",
            data.join("; ")
        ))
    };
    survey.devices.iter().map(verdict).collect()
}

/// `{"devices": [...], "hugepages": [...], "unseen": [...]}`; with verdicts, each device has `"can"` and `"how"`.
#[must_use]
pub fn to_json(survey: &Survey, verdicts: &[Verdict]) -> Value {
    let mut value = json!(survey);
    if let Some(devices) = value.get_mut("devices").and_then(Value::as_array_mut) {
        for (device, verdict) in devices.iter_mut().zip(verdicts) {
            if let (Some(device), Value::Object(verdict)) = (device.as_object_mut(), json!(verdict))
            {
                device.extend(verdict);
            }
        }
    }
    value
}

const HEADINGS: [&str; 8] = [
    "ADDRESS", "MODEL", "SERIAL", "SIZE", "DRIVER", "GROUP", "NODE", "LINK",
];

/// A table; below each device its disks, who uses them and the verdict, if there are verdicts; then huge pages.
#[must_use]
pub fn to_text(survey: &Survey, verdicts: &[Verdict]) -> String {
    let rows: Vec<[String; 8]> = std::iter::once(HEADINGS.map(str::to_owned))
        .chain(survey.devices.iter().map(row))
        .collect();
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..HEADINGS.len()).filter_map(width).collect();
    let mut out = String::new();
    let line = |row: &[String]| {
        let cells = row.iter().zip(&widths);
        let text: String = cells
            .map(|(cell, width)| format!("{cell:<width$}  "))
            .collect();
        format!("{}\n", text.trim_end())
    };
    if survey.devices.is_empty() {
        out.push_str("There is no NVMe controller on this machine's PCI buses.\n");
    } else if let Some(heading) = rows.first() {
        out.push_str(&line(heading));
    }
    for (index, (device, row)) in survey.devices.iter().zip(rows.iter().skip(1)).enumerate() {
        out.push_str(&line(row));
        for namespace in &device.namespaces {
            let parts = match namespace.partitions.join(", ") {
                parts if parts.is_empty() => parts,
                parts => format!(" ({parts})"),
            };
            let _ = writeln!(out, "  disk {}{parts}", namespace.name);
        }
        for used in &device.uses {
            let _ = writeln!(out, "  {used}");
        }
        if device.no_iommu {
            let _ = writeln!(out, "  {}", refusals::NO_IOMMU);
        }
        if let Some(verdict) = verdicts.get(index) {
            let _ = writeln!(out, "  -> {}", verdict.line());
        }
    }
    if survey
        .devices
        .iter()
        .any(|device| device.iommu_group.is_none())
    {
        let _ = writeln!(
            out,
            "For an IOMMU, {}; {}.",
            refusals::ENABLE_IOMMU,
            refusals::OR_UNSAFE
        );
    }
    out.push_str(&huge_pages(survey));
    if !survey.unseen.is_empty() {
        let _ = writeln!(
            out,
            "The open files of {} processes cannot be seen: run this as root to be told all.",
            survey.unseen.len()
        );
    }
    out
}

fn huge_pages(survey: &Survey) -> String {
    let pools = survey.hugepages.iter().map(|pool| {
        let place = pool
            .node
            .map_or(String::new(), |node| format!(" on node {node}"));
        format!("{} free of {}{place}", pool.free, pool.total)
    });
    match pools.collect::<Vec<_>>().join(", ") {
        pools if pools.is_empty() => String::new(),
        pools => format!("Huge pages of 2 MiB: {pools}\n"),
    }
}

fn row(device: &HostDevice) -> [String; 8] {
    let text = |value: &Option<String>| value.clone().unwrap_or_else(|| "-".to_owned());
    let number =
        |value: Option<u32>| value.map_or_else(|| "-".to_owned(), |value| value.to_string());
    let link = match (&device.link, &device.link_max) {
        (Some(now), Some(most)) if now != most => format!("{now} (max {most})"),
        (now, _) => text(now),
    };
    [
        device.address.to_string(),
        text(&device.model),
        text(&device.serial),
        device.size.map_or_else(|| "-".to_owned(), decimal_size),
        text(&device.driver),
        number(device.iommu_group),
        number(device.numa_node),
        link,
    ]
}

/// As SSDs are sold: `3.8 TB`, powers of 1000.
fn decimal_size(bytes: u64) -> String {
    let units = [
        ("TB", 1_000_000_000_000),
        ("GB", 1_000_000_000),
        ("MB", 1_000_000),
        ("kB", 1000),
    ];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{}.{} {name}", bytes / unit, bytes % unit / (unit / 10)),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimal_size_is_as_on_the_label() {
        for (bytes, text) in [
            (0, "0 B"),
            (3_840_755_982_336, "3.8 TB"),
            (1_000_000_000_000, "1.0 TB"),
            (1 << 30, "1.0 GB"),
            (999_999, "999.9 kB"),
        ] {
            assert_eq!(decimal_size(bytes), text);
        }
    }
}
