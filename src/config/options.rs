//! What was written, field by field, before defaults: the `[[device]]`, `[[blk]]`, `[[scsi]]` and `[server]` tables of a TOML file,
//! and the same as `key=value,key=value` flags.
//!
//! One serde structure reads both forms, so a key that one form knows the other knows too.

use std::fmt;
use std::fs;
use std::path::Path;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::ConfigError;
use super::values::{
    BlockSize, ByteSize, CoreList, Delay, DeviceName, ImagePath, InitiatorName, Kind, LogLevel,
    LunPlace, OnDeviceLoss, Pci, Polling, Serial, SocketPath, StatePath, Switch, ValueError,
    Within,
};

/// A configuration as written; [`Options::resolve`] completes and checks it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Options {
    pub server: ServerOptions,
    pub device: Vec<DeviceOptions>,
    pub blk: Vec<BlkOptions>,
    pub scsi: Vec<ScsiOptions>,
}

/// `[server]`, or `--cores`, `--poll`, `--state`, `--stats`, `--admin` and `--log`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ServerOptions {
    pub cores: Option<CoreList>,
    pub poll: Option<Polling>,
    pub state: Option<StatePath>,
    pub stats: Option<SocketPath>,
    pub admin: Option<SocketPath>,
    pub log: Option<LogLevel>,
}

/// One `[[device]]`, or `--device pci:ADDRESS,key=value,...`, or `--device model:MEDIUM,key=value,...`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeviceOptions {
    pub(super) kind: Kind,
    pub(super) medium: Option<MediumKind>,
    pub(super) address: Option<Pci>,
    pub(super) name: Option<DeviceName>,
    pub(super) path: Option<ImagePath>,
    pub(super) size: Option<ByteSize>,
    pub(super) block: Option<BlockSize>,
    pub(super) namespaces: Option<Within<u32, 1, { super::MAX_NAMESPACES as u64 }>>,
    pub(super) queues: Option<Within<u16, 1, 65535>>,
    pub(super) mqes: Option<Within<u32, 2, 65536>>,
    pub(super) mdts: Option<ByteSize>,
    pub(super) vwc: Option<Switch>,
    pub(super) latency: Option<Delay>,
    pub(super) jitter: Option<Delay>,
    pub(super) serial: Option<Serial>,
    pub(super) on_device_loss: Option<OnDeviceLoss>,
    pub(super) unsafe_noiommu: Option<Switch>,
}

/// Where the embedded controller keeps its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MediumKind {
    Ram,
    File,
    Null,
}

impl fmt::Display for MediumKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ram => "model:ram",
            Self::File => "model:file",
            Self::Null => "model:null",
        })
    }
}

/// One `[[blk]]`, or `--blk key=value,...`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BlkOptions {
    pub(super) path: Option<SocketPath>,
    /// 0 to 2 are the standard streams; systemd hands out sockets from 3.
    pub(super) fd: Option<Within<i32, 3, { i32::MAX as u64 }>>,
    pub(super) queues: Option<Within<u16, 1, { super::MAX_QUEUES as u64 }>>,
    pub(super) device: Option<DeviceName>,
    pub(super) ns: Option<Within<u32, 1, { super::MAX_NAMESPACES as u64 }>>,
    pub(super) readonly: Option<Switch>,
    pub(super) serial: Option<Serial>,
}

/// One `[[scsi]]`, or `--scsi key=value,...`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScsiOptions {
    pub(super) path: Option<SocketPath>,
    pub(super) fd: Option<Within<i32, 3, { i32::MAX as u64 }>>,
    pub(super) queues: Option<Within<u16, 1, { super::MAX_QUEUES as u64 }>>,
    pub(super) device: Option<DeviceName>,
    /// As a flag, a key for each.
    #[serde(default)]
    pub(super) lun: Vec<LunPlace>,
    pub(super) readonly: Option<Switch>,
    pub(super) initiator: Option<InitiatorName>,
}

impl DeviceOptions {
    /// As `unsafe_noiommu=on` of each device that is real, `--unsafe-noiommu` of them all.
    ///
    /// # Errors
    /// When none of them is.
    pub fn allow_noiommu(devices: &mut [DeviceOptions]) -> Result<(), ConfigError> {
        let mut any = false;
        for device in devices.iter_mut().filter(|device| device.kind == Kind::Pci) {
            device.unsafe_noiommu = Some(Switch(true));
            any = true;
        }
        if any {
            return Ok(());
        }
        Err(ConfigError::NothingUnsafe)
    }
}

impl Options {
    /// Reads a TOML file.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::from_toml(&text, path)
    }

    /// Reads the text of a TOML file; `path` is what errors call it.
    pub fn from_toml(text: &str, path: &Path) -> Result<Self, ConfigError> {
        toml::from_str(text).map_err(|error: toml::de::Error| {
            let start = error.span().map_or(0, |span| span.start.min(text.len()));
            let line = text[..start].matches('\n').count();
            ConfigError::File {
                path: path.to_owned(),
                line: line + 1,
                message: error.message().to_owned(),
                text: text
                    .lines()
                    .nth(line)
                    .unwrap_or_default()
                    .trim_end()
                    .to_owned(),
            }
        })
    }
}

/// Why a `key=value,key=value` flag was refused. The flag and its whole text are named by whoever prints this.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SpecError(String);

impl FromStr for DeviceOptions {
    type Err = SpecError;
    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let (head, rest) = spec
            .split_once(',')
            .map_or((spec, None), |(head, rest)| (head, Some(rest)));
        let (kind, which) = head.split_once(':').unwrap_or((head, ""));
        let parsed: Kind = kind
            .parse()
            .map_err(|error: ValueError| SpecError(error.to_string()))?;
        let mut table = toml::Table::new();
        table.insert("kind".to_owned(), kind.into());
        match parsed {
            Kind::Model => drop(table.insert("medium".to_owned(), which.into())),
            // `pci:serial=S4EW...` has no address; what follows the colon is the first key.
            Kind::Pci if which.contains('=') => {
                let pairs = spec.split_once(':').map_or(spec, |(_, pairs)| pairs);
                insert_pairs(&mut table, pairs)?;
                return read_table(table);
            }
            Kind::Pci => drop(table.insert("address".to_owned(), which.into())),
        }
        if let Some(rest) = rest {
            insert_pairs(&mut table, rest)?;
        }
        read_table(table)
    }
}

impl FromStr for BlkOptions {
    type Err = SpecError;
    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let mut table = toml::Table::new();
        insert_pairs(&mut table, spec)?;
        read_table(table)
    }
}

impl FromStr for ScsiOptions {
    type Err = SpecError;
    fn from_str(spec: &str) -> Result<Self, SpecError> {
        let mut table = toml::Table::new();
        // The one key that may be given several times.
        let mut luns = toml::value::Array::new();
        let mut rest = String::new();
        for pair in split_at_commas(spec) {
            match pair.strip_prefix("lun=") {
                Some(place) => luns.push(place.into()),
                None if rest.is_empty() => rest = escaped(&pair),
                None => rest = format!("{rest},{}", escaped(&pair)),
            }
        }
        if !rest.is_empty() || luns.is_empty() {
            insert_pairs(&mut table, &rest)?;
        }
        table.insert("lun".to_owned(), luns.into());
        read_table(table)
    }
}

fn escaped(pair: &str) -> String {
    pair.replace(',', ",,")
}

fn read_table<T: DeserializeOwned>(table: toml::Table) -> Result<T, SpecError> {
    toml::Value::Table(table)
        .try_into()
        .map_err(|error: toml::de::Error| {
            // Without a line to point at, the key is only in the last line of the display.
            let text = error.to_string();
            SpecError(match text.trim_end().rsplit_once("\nin ") {
                Some((reason, key)) => format!("{key}: {reason}"),
                None => error.message().to_owned(),
            })
        })
}

fn insert_pairs(table: &mut toml::Table, spec: &str) -> Result<(), SpecError> {
    for pair in split_at_commas(spec) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(SpecError(match pair.as_str() {
                "" => "an option is empty: write key=value,key=value".to_owned(),
                _ => format!("option `{pair}` has no value: write {pair}=..."),
            }));
        };
        if table.insert(key.to_owned(), value.into()).is_some() {
            return Err(SpecError(format!("key `{key}` is given twice")));
        }
    }
    Ok(())
}

/// Splits as QEMU does: `,` separates, `,,` is a comma within a value.
pub(crate) fn split_at_commas(spec: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut chars = spec.chars().peekable();
    while let Some(char) = chars.next() {
        let separates = char == ',' && chars.next_if_eq(&',').is_none();
        match parts.last_mut() {
            Some(part) if !separates => part.push(char),
            _ => parts.push(String::new()),
        }
    }
    parts
}
