//! What `tandem identify` shows: the fields and names that nvme-cli users know from `nvme id-ctrl` and `nvme id-ns`.

use std::fmt::Write;

use nvme_driver::spec::{IdentifyController, IdentifyNamespace, ascii_field};
use serde_json::{Map, Value, json};

use super::claim::open_device;
use super::device::{Device, DeviceError, Interrupts, NamespaceInfo};
use crate::config::DeviceConfig;

/// One field: its name, its value as a number or string, and as text.
type Field = (&'static str, Value, String);

fn hex(name: &'static str, value: impl Into<u64>) -> Field {
    let value = value.into();
    (name, json!(value), format!("{value:#x}"))
}

fn number(name: &'static str, value: impl Into<u64>) -> Field {
    let value = value.into();
    (name, json!(value), value.to_string())
}

fn text(name: &'static str, value: String) -> Field {
    (name, json!(value), value)
}

/// 128-bit byte counts: nvme-cli prints them as one decimal number.
fn bytes128(name: &'static str, value: [u8; 16]) -> Field {
    let value = u128::from_le_bytes(value);
    let number =
        u64::try_from(value).map_or_else(|_| json!(value.to_string()), |value| json!(value));
    (name, number, value.to_string())
}

fn hex_bytes(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn uuid(bytes: &[u8; 16]) -> String {
    let hex = hex_bytes(bytes);
    format!(
        "{}-{}-{}-{}-{}",
        &hex[..8],
        &hex[8..12],
        &hex[12..16],
        &hex[16..20],
        &hex[20..]
    )
}

fn controller_fields(id: &IdentifyController) -> Vec<Field> {
    let ieee = u32::from(id.ieee[0]) | u32::from(id.ieee[1]) << 8 | u32::from(id.ieee[2]) << 16;
    vec![
        hex("vid", id.vid.get()),
        hex("ssvid", id.ssvid.get()),
        text("sn", ascii_field(&id.sn)),
        text("mn", ascii_field(&id.mn)),
        text("fr", ascii_field(&id.fr)),
        number("rab", id.rab),
        ("ieee", json!(ieee), format!("{ieee:06x}")),
        hex("cmic", id.cmic),
        number("mdts", id.mdts),
        hex("cntlid", id.cntlid.get()),
        hex("ver", id.ver.get()),
        hex("rtd3r", id.rtd3r.get()),
        hex("rtd3e", id.rtd3e.get()),
        hex("oaes", id.oaes.get()),
        hex("ctratt", id.ctratt.get()),
        hex("oacs", id.oacs.get()),
        number("acl", id.acl),
        number("aerl", id.aerl),
        hex("frmw", id.frmw),
        hex("lpa", id.lpa),
        number("elpe", id.elpe),
        number("npss", id.npss),
        hex("avscc", id.avscc),
        hex("apsta", id.apsta),
        number("wctemp", id.wctemp.get()),
        number("cctemp", id.cctemp.get()),
        bytes128("tnvmcap", id.tnvmcap),
        bytes128("unvmcap", id.unvmcap),
        number("kas", id.kas.get()),
        hex("sqes", id.sqes),
        hex("cqes", id.cqes),
        number("maxcmd", id.maxcmd.get()),
        number("nn", id.nn.get()),
        hex("oncs", id.oncs.get()),
        hex("fuses", id.fuses.get()),
        hex("fna", id.fna),
        hex("vwc", id.vwc),
        number("awun", id.awun.get()),
        number("awupf", id.awupf.get()),
        hex("sgls", id.sgls.get()),
        number("mnan", id.mnan.get()),
        text("subnqn", ascii_field(&id.subnqn)),
    ]
}

fn namespace_fields(info: &NamespaceInfo) -> Vec<Field> {
    let id: &IdentifyNamespace = &info.identify;
    let ids = &info.namespace.ids;
    let mut fields = vec![
        hex("nsze", id.nsze.get()),
        hex("ncap", id.ncap.get()),
        hex("nuse", id.nuse.get()),
        hex("nsfeat", id.nsfeat),
        number("nlbaf", id.nlbaf),
        hex("flbas", id.flbas),
        hex("mc", id.mc),
        hex("dpc", id.dpc),
        hex("dps", id.dps),
        hex("nmic", id.nmic),
        hex("rescap", id.rescap),
        hex("fpi", id.fpi),
        number("dlfeat", id.dlfeat),
        bytes128("nvmcap", id.nvmcap),
        hex("nsattr", id.nsattr),
        text("nguid", hex_bytes(&id.nguid)),
        text("eui64", hex_bytes(&id.eui64)),
    ];
    if let Some(value) = &ids.uuid {
        fields.push(text("uuid", uuid(value)));
    }
    fields
}

fn lba_formats(id: &IdentifyNamespace) -> impl Iterator<Item = (usize, u16, u8, u8)> {
    let count = (usize::from(id.nlbaf) + 1).min(id.lbaf.len());
    id.lbaf
        .iter()
        .take(count)
        .enumerate()
        .map(|(i, format)| (i, format.ms.get(), format.lbads, format.rp))
}

fn as_object(fields: Vec<Field>) -> Map<String, Value> {
    fields
        .into_iter()
        .map(|(name, value, _)| (name.to_owned(), value))
        .collect()
}

/// Claims a controller, takes down what it says of itself, and lets it go.
///
/// # Errors
/// When it cannot be claimed, or not be shut down.
pub fn describe(config: &DeviceConfig, json: bool) -> Result<String, DeviceError> {
    let (device, _) = open_device(config, 1, Interrupts::Off)?;
    let text = if json {
        format!("{:#}\n", to_json(&device))
    } else {
        to_text(&device)
    };
    device.shutdown()?;
    Ok(text)
}

/// `{"device", "version", "queue_pairs", "controller": {...}, "namespaces": [{"nsid", ...}]}`, fields as nvme-cli
/// names them; sizes in logical blocks unless the name says otherwise.
#[must_use]
pub fn to_json(device: &Device) -> Value {
    let namespaces = device.namespaces();
    let namespaces: Vec<Value> = namespaces
        .iter()
        .map(|info| {
            let mut object = as_object(namespace_fields(info));
            object.insert("nsid".to_owned(), json!(info.namespace.nsid.0));
            let formats = lba_formats(&info.identify)
                .map(|(_, ms, ds, rp)| json!({"ms": ms, "ds": ds, "rp": rp}));
            object.insert("lbafs".to_owned(), formats.collect());
            Value::Object(object)
        })
        .collect();
    json!({
        "device": device.name,
        "version": device.version.to_string(),
        "queue_pairs": device.granted,
        "max_transfer": device.max_transfer,
        "controller": as_object(controller_fields(&device.identity)),
        "namespaces": namespaces,
    })
}

/// The same for people.
#[must_use]
pub fn to_text(device: &Device) -> String {
    let mut out = format!(
        "NVME Identify Controller: {} (NVMe {}, {} I/O queue pairs granted, {} bytes per command)\n",
        device.name, device.version, device.granted, device.max_transfer
    );
    let list = |out: &mut String, fields: Vec<Field>| {
        for (name, _, text) in fields {
            let _ = writeln!(out, "{name:<9} : {text}");
        }
    };
    list(&mut out, controller_fields(&device.identity));
    for info in &device.namespaces() {
        let _ = writeln!(out, "\nNVME Identify Namespace {}:", info.namespace.nsid.0);
        list(&mut out, namespace_fields(info));
        let in_use = info.identify.format();
        for (i, ms, ds, rp) in lba_formats(&info.identify) {
            let mark = if (ms, ds) == (in_use.ms.get(), in_use.lbads) {
                " (in use)"
            } else {
                ""
            };
            let _ = writeln!(
                out,
                "lbaf {i:>2} : ms:{ms:<3} lbads:{ds:<2} rp:{rp:#x}{mark}"
            );
        }
    }
    out
}
