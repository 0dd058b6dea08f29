//! SCSI as SCSI: a direct-access block device as SPC-4 and SBC-3 describe it, seen from a target.
//!
//! A CDB comes in; an answer goes out, or what a block device has to do for it. What it promises: an operation that it
//! asks for lies wholly inside the logical unit, and a command that it refuses has changed nothing. It knows neither the
//! transport that brings CDBs and data nor the device that carries operations out. One table says which commands there
//! are, which bits of their CDBs count and who handles them; REPORT SUPPORTED OPERATION CODES answers from the same table.
//!
//! Start at [`Nexus::execute`]; the table is in [`command`].
#![forbid(unsafe_code)]

mod attention;
pub mod command;
mod copy;
mod initiator;
mod inquiry;
mod lock;
mod log;
mod medium;
mod mode;
mod persistent;
mod plain;
mod port;
pub mod reservations;
mod roster;
pub mod sense;
mod target;
mod unit;

pub use attention::Attention;
pub use command::Cdb;
pub use initiator::{Initiator, InitiatorError};
pub use lock::RangeLock;
pub use log::{Health, HealthReport};
pub use medium::{MAX_COMPARE_BLOCKS, MAX_WRITE_SAME_BLOCKS};
pub use persistent::PARAMETER_BYTES as PR_OUT_BYTES;
pub use plain::PlainUnit;
pub use roster::{PlaceError, Roster};
pub use sense::{MAX_SENSE_BYTES, Sense};
pub use target::{Address, Lun, MAX_UNITS, Nexus, Target};
pub use unit::{Keep, Listen, LogicalUnit, MAX_INITIATORS, Settlement, ShareError, Tasks, UnitIds};

use crate::block::{BlockOp, RangeList};

/// Status codes (SAM-5, table 35).
pub mod status {
    /// It ended well.
    pub const GOOD: u8 = 0x00;
    /// Not now, but soon.
    pub const BUSY: u8 = 0x08;
    /// There is sense data.
    pub const CHECK_CONDITION: u8 = 0x02;
    /// Another initiator has reserved the logical unit.
    pub const RESERVATION_CONFLICT: u8 = 0x18;
    /// There is no room for another command.
    pub const TASK_SET_FULL: u8 = 0x28;
}

/// The longest parameter list that a command takes: one block of WRITE SAME. More than 256 UNMAP descriptors need.
pub const MAX_PARAMETER_BYTES: usize = 64 << 10;

/// What a command says of itself, for its initiator: appended to, in a buffer that is large enough for any command
/// ([`Target::data_in_bytes`]).
#[derive(Debug)]
pub struct DataIn<'a> {
    bytes: &'a mut [u8],
    len: usize,
}

impl<'a> DataIn<'a> {
    /// Nothing yet.
    pub fn new(bytes: &'a mut [u8]) -> DataIn<'a> {
        DataIn { bytes, len: 0 }
    }

    /// How many bytes there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The bytes.
    #[must_use]
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn put(&mut self, bytes: &[u8]) {
        let end = (self.len + bytes.len()).min(self.bytes.len());
        let count = end - self.len;
        self.bytes[self.len..end].copy_from_slice(&bytes[..count]);
        self.len = end;
    }

    /// Writes over what is there: lengths are known last.
    fn set(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.bytes[..self.len].get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }

    /// No more than the initiator has room for; what lies behind is dropped, and lengths within stay as they are
    /// (SPC-4, 4.2.5.6).
    fn truncate(&mut self, allocation_length: u32) {
        self.len = self
            .len
            .min(usize::try_from(allocation_length).unwrap_or(usize::MAX));
    }
}

/// What a command works with.
#[derive(Debug)]
pub struct Exchange<'a> {
    /// The command.
    pub cdb: &'a Cdb,
    /// Its parameter list, or the block of a WRITE SAME: as long as [`command::parameter_bytes`] says.
    pub parameters: &'a [u8],
    /// Its answer, if it is one with data.
    pub data_in: DataIn<'a>,
    /// The ranges of an operation that has any.
    pub ranges: &'a mut RangeList,
}

/// What a command comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// It has ended well; what it says is in [`Exchange::data_in`].
    Good,
    /// It has ended with CHECK CONDITION.
    Check(Sense),
    /// Another initiator has reserved the logical unit: RESERVATION CONFLICT.
    Conflict,
    /// What it is about is being changed at this moment: BUSY.
    Busy,
    /// It may have to wait, which is not for the caller to do: [`Nexus::settle`] carries it out.
    Defer,
    /// The block device has to do something first.
    Carry(Carry),
}

/// An operation for the block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Carry {
    /// What to do. The data of a WRITE SAME is one block, or none for zeroes.
    pub op: BlockOp,
    /// Index of the logical unit within its [`Target`].
    pub unit: usize,
    /// What is written must be durable when the command ends.
    pub fua: bool,
    /// Bytes of data for the initiator.
    pub data_in: u64,
    /// Bytes of data from the initiator.
    pub data_out: u64,
}

type Result<T> = std::result::Result<T, Sense>;
