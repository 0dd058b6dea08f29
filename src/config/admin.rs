//! What is asked for while a server runs: one JSON object a line at its administration socket, and one for each answer.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::MAX_LUN;
use super::values::{ByteSize, LunPlace, Scalar, ValueError, refuse, whole_number};

/// The longest request, in bytes, its newline included.
pub const MAX_REQUEST: usize = 4096;

/// A line at the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "kebab-case", deny_unknown_fields)]
pub enum AdminRequest {
    /// A host shows one logical unit more.
    LunAdd {
        /// The host's socket, as it was given.
        path: String,
        /// Where, and which namespace.
        lun: LunPlace,
    },
    /// A host shows one less.
    LunRemove {
        /// The host's socket.
        path: String,
        /// Which.
        lun: LunAddress,
    },
    /// What do all hosts show?
    Luns {},
    /// Guests follow the sizes that a device's namespaces have by now.
    DeviceRescan {
        /// The device's name.
        device: String,
    },
    /// A namespace of an embedded controller becomes larger.
    DeviceResize {
        /// The device's name.
        device: String,
        /// Its identifier.
        namespace: u32,
        /// What it is to have.
        size: ByteSize,
    },
}

/// A line back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum AdminAnswer {
    /// It was not done.
    Refused {
        /// Why.
        error: String,
    },
    /// All logical units.
    Luns {
        /// By host, target and LUN.
        luns: Vec<LunInfo>,
    },
    /// It was done.
    Done {
        /// What was done, for people.
        done: String,
    },
}

/// A logical unit of a host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LunInfo {
    /// The host's socket.
    pub path: String,
    /// As [`AdminRequest::LunAdd`] takes it.
    pub lun: LunPlace,
    /// The device's name.
    pub device: String,
    /// How many blocks it has.
    pub blocks: u64,
    /// Bytes of each.
    pub block_size: u32,
    /// The guest may only read.
    pub readonly: bool,
}

/// `TARGET:LUN`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Scalar", into = "String")]
pub struct LunAddress {
    /// The target's identifier.
    pub target: u8,
    /// 0 to 16383.
    pub lun: u16,
}

impl LunAddress {
    pub(super) fn read(text: &str) -> Option<LunAddress> {
        let (target, lun) = text.split_once(':')?;
        Some(LunAddress {
            target: u8::try_from(whole_number(target)?).ok()?,
            lun: u16::try_from(whole_number(lun)?)
                .ok()
                .filter(|lun| *lun <= MAX_LUN)?,
        })
    }
}

impl FromStr for LunAddress {
    type Err = ValueError;
    fn from_str(text: &str) -> Result<Self, ValueError> {
        match LunAddress::read(text) {
            Some(address) => Ok(address),
            None => refuse(format!(
                "`{}` is not the address of a logical unit: write TARGET:LUN, such as 0:1 (targets 0 to 255, LUNs 0 to \
                 {MAX_LUN})",
                text.escape_default()
            )),
        }
    }
}

impl fmt::Display for LunAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.target, self.lun)
    }
}

impl From<LunAddress> for String {
    fn from(address: LunAddress) -> String {
        address.to_string()
    }
}
