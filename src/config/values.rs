//! Single values, as people write them: `1G`, `10us`, `on`, `0-3,5`.
//!
//! Each type here is read from text by one `FromStr`, whether the text came from a flag or from a TOML file (where whole
//! numbers and true/false may also be written bare), and refuses what can be refused without looking at anything else.
//! A size or a core list prints in the form in which it is read.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use nvme_driver::vfio::pci::{PciAddress, PciAddressError};
use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize};

use crate::scsi::Initiator;

use super::admin::LunAddress;
use super::{MAX_DEVICE_NAME, MAX_LUN, MAX_NAMESPACES, MAX_SERIAL, MAX_SOCKET_PATH};

/// Why a single value was refused: the value itself, and what would be right.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

pub(super) fn refuse<T>(reason: String) -> Result<T, ValueError> {
    Err(ValueError(reason))
}

/// A TOML scalar as the text that a flag would have carried.
pub(super) struct Scalar(String);

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Scalar;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a text, a whole number or true/false")
            }
            fn visit_str<E: de::Error>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar(text.to_owned()))
            }
            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }
            // JSON's.
            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Scalar, E> {
                Ok(Scalar(number.to_string()))
            }
            fn visit_bool<E: de::Error>(self, switch: bool) -> Result<Scalar, E> {
                Ok(Scalar(if switch { "on" } else { "off" }.to_owned()))
            }
        }
        deserializer.deserialize_any(Text)
    }
}

/// `#[serde(try_from = "Scalar")]` for types that have a `FromStr`.
macro_rules! from_scalar {
    ($($value:ty),+ $(,)?) => {$(
        impl TryFrom<Scalar> for $value {
            type Error = ValueError;
            fn try_from(scalar: Scalar) -> Result<Self, ValueError> {
                scalar.0.parse()
            }
        }
    )+};
}
from_scalar!(
    ByteSize,
    Delay,
    Switch,
    BlockSize,
    Serial,
    DeviceName,
    ImagePath,
    StatePath,
    SocketPath,
    CoreList,
    LogLevel,
    LunPlace,
    LunAddress,
    InitiatorName,
    Kind,
    Pci,
    OnDeviceLoss,
    Polling
);

/// A number of bytes; K, M, G and T are powers of 1024.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Scalar", into = "String")]
pub struct ByteSize(pub u64);

impl From<ByteSize> for String {
    fn from(size: ByteSize) -> String {
        size.to_string()
    }
}

const SIZE_UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl FromStr for ByteSize {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let unit = SIZE_UNITS.iter().find_map(|&(unit, shift)| {
            Some((text.strip_suffix([unit, unit.to_ascii_lowercase()])?, shift))
        });
        let (digits, shift) = unit.unwrap_or((text, 0));
        match whole_number(digits).and_then(|count| count.checked_mul(1 << shift)) {
            Some(bytes) => Ok(Self(bytes)),
            None => refuse(format!(
                "`{text}` is not a size: write whole bytes or a K, M, G or T multiple below 2^64, such as 1G or 128K"
            )),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let unit = SIZE_UNITS
            .iter()
            .find(|(_, shift)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((unit, shift)) => f.pad(&format!("{}{unit}", self.0 >> shift)),
            None => f.pad(&self.0.to_string()),
        }
    }
}

/// Digits only: `u64::from_str` would also take `+1`.
pub(super) fn whole_number(digits: &str) -> Option<u64> {
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit())
        .then(|| digits.parse().ok())?
}

/// A duration with its unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct Delay(pub Duration);

impl FromStr for Delay {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        // "s" last: it ends the other three.
        let units = [
            ("ns", 1),
            ("us", 1_000),
            ("ms", 1_000_000),
            ("s", 1_000_000_000),
        ];
        let unit = units
            .iter()
            .find_map(|&(unit, nanos)| Some((text.strip_suffix(unit)?, nanos)));
        let nanos = match unit {
            Some((digits, unit_nanos)) => {
                whole_number(digits).and_then(|count| count.checked_mul(unit_nanos))
            }
            None => (text == "0").then_some(0),
        };
        match nanos {
            Some(nanos) => Ok(Self(Duration::from_nanos(nanos))),
            None => refuse(format!(
                "`{text}` is not a duration: write a whole number and its unit ns, us, ms or s, such as 10us"
            )),
        }
    }
}

/// `on` or `off`; true and false in TOML.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct Switch(pub bool);

impl FromStr for Switch {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "on" => Ok(Self(true)),
            "off" => Ok(Self(false)),
            _ => refuse(format!("`{text}` is neither on nor off")),
        }
    }
}

/// A whole number within bounds that hold whatever else is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar", bound = "T: TryFrom<u64>")]
pub struct Within<T, const MIN: u64, const MAX: u64>(pub T);

impl<T: TryFrom<u64>, const MIN: u64, const MAX: u64> TryFrom<Scalar> for Within<T, MIN, MAX> {
    type Error = ValueError;
    fn try_from(scalar: Scalar) -> Result<Self, ValueError> {
        let number = whole_number(&scalar.0).filter(|number| (MIN..=MAX).contains(number));
        match number.and_then(|number| T::try_from(number).ok()) {
            Some(number) => Ok(Self(number)),
            None => refuse(format!(
                "`{}` is not a whole number from {MIN} to {MAX}",
                scalar.0
            )),
        }
    }
}

/// Logical block size of a namespace.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub enum BlockSize {
    #[default]
    B512,
    B4096,
}

impl BlockSize {
    pub const fn bytes(self) -> u32 {
        match self {
            Self::B512 => 512,
            Self::B4096 => 4096,
        }
    }
}

impl FromStr for BlockSize {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text.parse() {
            Ok(ByteSize(512)) => Ok(Self::B512),
            Ok(ByteSize(4096)) => Ok(Self::B4096),
            _ => refuse(format!(
                "`{text}` is not a block size: the controller formats 512 or 4096 bytes"
            )),
        }
    }
}

impl fmt::Display for BlockSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.bytes().fmt(f)
    }
}

/// A serial number as NVMe and virtio carry it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct Serial(pub String);

impl FromStr for Serial {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let printable = text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() || byte == b' ');
        if printable && (1..=MAX_SERIAL).contains(&text.len()) {
            return Ok(Self(text.to_owned()));
        }
        refuse(format!(
            "`{}` is not a serial number: 1 to {MAX_SERIAL} printable ASCII characters (this is {} bytes)",
            text.escape_default(),
            text.len()
        ))
    }
}

/// What a device is called in `device=` and in log lines.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct DeviceName(pub String);

impl FromStr for DeviceName {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let plain = text
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        if plain && (1..=MAX_DEVICE_NAME).contains(&text.len()) {
            return Ok(Self(text.to_owned()));
        }
        refuse(format!(
            "`{}` is not a device name: 1 to {MAX_DEVICE_NAME} of letters, digits, `.`, `_` and `-`",
            text.escape_default()
        ))
    }
}

/// An image file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct ImagePath(pub PathBuf);

impl FromStr for ImagePath {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        usable_path(text).map(Self)
    }
}

/// A directory for what outlives the process.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct StatePath(pub PathBuf);

impl FromStr for StatePath {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        usable_path(text).map(Self)
    }
}

/// A Unix socket to create.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct SocketPath(pub PathBuf);

impl FromStr for SocketPath {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        if text.len() > MAX_SOCKET_PATH {
            return refuse(format!(
                "socket path `{text}` is {} bytes long, a Unix socket takes at most {MAX_SOCKET_PATH}: use a shorter \
                 directory",
                text.len()
            ));
        }
        usable_path(text).map(Self)
    }
}

/// Who the guest of a SCSI host is, for reservations.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct InitiatorName(pub Initiator);

impl FromStr for InitiatorName {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match Initiator::new(text) {
            Ok(initiator) => Ok(Self(initiator)),
            Err(error) => refuse(format!(
                "`{}` is not the name of an initiator: {error}",
                text.escape_default()
            )),
        }
    }
}

/// `TARGET:LUN:nsN` or `TARGET:LUN:DEVICE:nsN`: where a SCSI host shows a namespace.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Scalar", into = "String")]
pub struct LunPlace {
    /// The target's identifier.
    pub target: u8,
    /// 0 to 16383.
    pub lun: u16,
    /// Its device, if it is not the host's.
    pub device: Option<String>,
    /// The namespace.
    pub nsid: u32,
}

impl FromStr for LunPlace {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let place = || {
            let (before, namespace) = text.rsplit_once(':')?;
            let (address, device) = match before.splitn(3, ':').nth(2) {
                Some(device) => {
                    let address = before.strip_suffix(device)?.strip_suffix(':')?;
                    (address, Some(device.parse::<DeviceName>().ok()?.0))
                }
                None => (before, None),
            };
            let LunAddress { target, lun } = LunAddress::read(address)?;
            Some(LunPlace {
                target,
                lun,
                device,
                nsid: u32::try_from(whole_number(namespace.strip_prefix("ns")?)?)
                    .ok()
                    .filter(|nsid| (1..=MAX_NAMESPACES).contains(nsid))?,
            })
        };
        match place() {
            Some(place) => Ok(place),
            None => refuse(format!(
                "`{text}` is not a place for a logical unit: write TARGET:LUN:nsN, such as 0:0:ns1, or \
                 TARGET:LUN:DEVICE:nsN (targets 0 to 255, LUNs 0 to {MAX_LUN}, namespaces 1 to {MAX_NAMESPACES})"
            )),
        }
    }
}

impl fmt::Display for LunPlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let LunPlace {
            target,
            lun,
            device,
            nsid,
        } = self;
        match device {
            Some(device) => write!(f, "{target}:{lun}:{device}:ns{nsid}"),
            None => write!(f, "{target}:{lun}:ns{nsid}"),
        }
    }
}

impl From<LunPlace> for String {
    fn from(place: LunPlace) -> String {
        place.to_string()
    }
}

fn usable_path(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() || text.contains('\0') {
        return refuse(format!("`{}` is not a path", text.escape_default()));
    }
    Ok(PathBuf::from(text))
}

/// Which sort of controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub enum Kind {
    Model,
    Pci,
}

impl FromStr for Kind {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "model" => Ok(Self::Model),
            "pci" => Ok(Self::Pci),
            _ => refuse(format!(
                "`{text}` is not a kind of device: there are pci:ADDRESS, pci:serial=TEXT, model:ram, model:file and model:null"
            )),
        }
    }
}

/// Where an NVMe controller is on the PCI bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct Pci(pub PciAddress);

impl FromStr for Pci {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        text.parse()
            .map(Self)
            .map_err(|error: PciAddressError| ValueError(error.to_string()))
    }
}

/// What guests are told while a device is gone.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub enum OnDeviceLoss {
    /// Every request fails until the device is back.
    #[default]
    Error,
    /// Requests wait until the device is back; those that were at the device are carried out again.
    Hold,
}

impl FromStr for OnDeviceLoss {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "error" => Ok(Self::Error),
            "hold" => Ok(Self::Hold),
            _ => refuse(format!("`{text}` is neither error nor hold")),
        }
    }
}

impl fmt::Display for OnDeviceLoss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Error => "error",
            Self::Hold => "hold",
        })
    }
}

/// What a core does while nothing happens.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub enum Polling {
    /// It looks.
    #[default]
    Always,
    /// It looks for a while, then it sleeps until it is woken.
    Adaptive,
}

impl FromStr for Polling {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match text {
            "always" => Ok(Self::Always),
            "adaptive" => Ok(Self::Adaptive),
            _ => refuse(format!("`{text}` is neither always nor adaptive")),
        }
    }
}

impl fmt::Display for Polling {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Always => "always",
            Self::Adaptive => "adaptive",
        })
    }
}

/// How much the log says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub enum LogLevel {
    Error,
    Warn,
    #[default]
    Info,
    Debug,
    Trace,
}

impl LogLevel {
    pub const ALL: [Self; 5] = [
        Self::Error,
        Self::Warn,
        Self::Info,
        Self::Debug,
        Self::Trace,
    ];

    /// The name that the flag, the file and the `tracing` filters use.
    const fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for LogLevel {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match Self::ALL.into_iter().find(|level| level.as_str() == text) {
            Some(level) => Ok(level),
            None => refuse(format!(
                "`{text}` is not a log level: error, warn, info, debug or trace"
            )),
        }
    }
}

/// A processor as Linux numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct CoreId(pub usize);

impl fmt::Display for CoreId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Cores in the order written, none twice. Prints as ranges: `0-3,5`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(try_from = "Scalar")]
pub struct CoreList(Vec<CoreId>);

impl CoreList {
    /// Linux is built for at most 8192 processors (CONFIG_NR_CPUS): a bound for ranges, so that a typing error is an
    /// answer and not an allocation.
    const MAX_CORE: u64 = 8191;

    pub fn as_slice(&self) -> &[CoreId] {
        &self.0
    }
}

impl FromIterator<CoreId> for CoreList {
    /// Keeps the first of each.
    fn from_iter<I: IntoIterator<Item = CoreId>>(cores: I) -> Self {
        let mut list = Vec::new();
        for core in cores {
            if !list.contains(&core) {
                list.push(core);
            }
        }
        Self(list)
    }
}

impl FromStr for CoreList {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        let number = |digits: &str| {
            whole_number(digits)
                .filter(|&number| number <= Self::MAX_CORE)
                .and_then(|number| usize::try_from(number).ok())
        };
        let mut cores: Vec<CoreId> = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            let (Some(first), Some(last)) = (number(first), number(last)) else {
                return refuse(format!(
                    "`{text}` is not a list of cores: write numbers and ranges, such as 0-3,5"
                ));
            };
            if first > last {
                return refuse(format!(
                    "core range `{part}` runs backwards: write {last}-{first}"
                ));
            }
            for core in (first..=last).map(CoreId) {
                if cores.contains(&core) {
                    return refuse(format!("core {core} is named twice in `{text}`"));
                }
                cores.push(core);
            }
        }
        Ok(Self(cores))
    }
}

impl fmt::Display for CoreList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, run) in self
            .0
            .chunk_by(|left, right| left.0 + 1 == right.0)
            .enumerate()
        {
            if index > 0 {
                f.write_str(",")?;
            }
            match run {
                [only] => write!(f, "{only}")?,
                [first, .., last] => write!(f, "{first}-{last}")?,
                [] => {}
            }
        }
        Ok(())
    }
}
