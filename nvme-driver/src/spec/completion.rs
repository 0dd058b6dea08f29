//! Completion queue entries and the status field with the names of its codes.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// One completion queue entry, 16 bytes. NVM Express Base 2.0, "Common Completion Queue Entry".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CompletionEntry {
    /// Command specific.
    pub dw0: U32,
    /// Command specific / reserved.
    pub dw1: U32,
    /// Submission queue head pointer.
    pub sqhd: U16,
    /// Submission queue identifier.
    pub sqid: U16,
    /// Command identifier.
    pub cid: U16,
    /// Bit 0: phase tag; bits 15:1: status field.
    pub phase_and_status: U16,
}

const _: () = assert!(size_of::<CompletionEntry>() == 16);

/// The 15-bit status field of a completion: SC (7:0), SCT (10:8), CRD (12:11), M (13), DNR (14).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Status(u16);

impl Status {
    /// Successful completion.
    pub const SUCCESS: Status = Status(0);
    /// Do Not Retry.
    pub const DNR: u16 = 1 << 14;

    /// From status code type and status code.
    #[must_use]
    pub const fn new(sct: u8, sc: u8) -> Status {
        Status(((sct as u16 & 7) << 8) | sc as u16)
    }

    /// The same status with Do Not Retry set.
    #[must_use]
    pub const fn with_dnr(self) -> Status {
        Status(self.0 | Status::DNR)
    }

    /// From the last word of a completion entry.
    #[inline]
    #[must_use]
    pub const fn from_wire(phase_and_status: u16) -> Status {
        Status(phase_and_status >> 1)
    }

    /// As it stands in the last word of a completion entry, with the given phase tag.
    #[must_use]
    pub const fn to_wire(self, phase: bool) -> u16 {
        (self.0 << 1) | phase as u16
    }

    /// Status code.
    #[must_use]
    pub const fn sc(self) -> u8 {
        (self.0 & 0xff) as u8
    }

    /// Status code type.
    #[must_use]
    pub const fn sct(self) -> u8 {
        ((self.0 >> 8) & 7) as u8
    }

    /// DNR = 0: the same command may succeed when it is sent again.
    #[must_use]
    pub const fn may_retry(self) -> bool {
        self.0 & Status::DNR == 0
    }

    /// SCT and SC both zero.
    #[inline]
    #[must_use]
    pub const fn is_success(self) -> bool {
        self.0 & 0x7ff == 0
    }

    /// The name in the specification, or a description of the code type.
    #[must_use]
    pub fn name(self) -> &'static str {
        STATUS_NAMES
            .iter()
            .find(|(sct, sc, _)| (*sct, *sc) == (self.sct(), self.sc()))
            .map_or_else(|| status_type_name(self.sct()), |(_, _, name)| name)
    }

    /// Same code, whatever CRD, M and DNR say.
    #[must_use]
    pub const fn is(self, other: Status) -> bool {
        self.0 & 0x7ff == other.0 & 0x7ff
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} (SCT {:X}h, SC {:02X}h",
            self.name(),
            self.sct(),
            self.sc()
        )?;
        f.write_str(if self.may_retry() { ")" } else { ", DNR)" })
    }
}

impl std::fmt::Debug for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Status({self})")
    }
}

fn status_type_name(sct: u8) -> &'static str {
    match sct {
        0 => "Generic Command Status",
        1 => "Command Specific Status",
        2 => "Media and Data Integrity Error",
        3 => "Path Related Status",
        7 => "Vendor Specific",
        _ => "Reserved Status Code Type",
    }
}

macro_rules! status_codes {
    ($($name:ident = ($sct:literal, $sc:literal, $text:literal);)*) => {
        impl Status {
            $(#[doc = $text] pub const $name: Status = Status::new($sct, $sc);)*
        }
        const STATUS_NAMES: &[(u8, u8, &str)] = &[(0, 0, "Successful Completion"), $(($sct, $sc, $text)),*];
    };
}

// NVM Express Base 2.0, "Status Code" tables, and NVM Command Set 1.0 for codes 80h and up.
status_codes! {
    INVALID_OPCODE = (0, 0x01, "Invalid Command Opcode");
    INVALID_FIELD = (0, 0x02, "Invalid Field in Command");
    CID_CONFLICT = (0, 0x03, "Command ID Conflict");
    DATA_TRANSFER_ERROR = (0, 0x04, "Data Transfer Error");
    ABORTED_POWER_LOSS = (0, 0x05, "Commands Aborted due to Power Loss Notification");
    INTERNAL_ERROR = (0, 0x06, "Internal Error");
    ABORT_REQUESTED = (0, 0x07, "Command Abort Requested");
    ABORTED_SQ_DELETION = (0, 0x08, "Command Aborted due to SQ Deletion");
    INVALID_NAMESPACE = (0, 0x0b, "Invalid Namespace or Format");
    COMMAND_SEQUENCE_ERROR = (0, 0x0c, "Command Sequence Error");
    INVALID_PRP_OFFSET = (0, 0x13, "PRP Offset Invalid");
    SANITIZE_IN_PROGRESS = (0, 0x1d, "Sanitize In Progress");
    NAMESPACE_WRITE_PROTECTED = (0, 0x20, "Namespace is Write Protected");
    LBA_OUT_OF_RANGE = (0, 0x80, "LBA Out of Range");
    CAPACITY_EXCEEDED = (0, 0x81, "Capacity Exceeded");
    NAMESPACE_NOT_READY = (0, 0x82, "Namespace Not Ready");
    RESERVATION_CONFLICT = (0, 0x83, "Reservation Conflict");
    FORMAT_IN_PROGRESS = (0, 0x84, "Format In Progress");
    INVALID_COMPLETION_QUEUE = (1, 0x00, "Completion Queue Invalid");
    INVALID_QUEUE_IDENTIFIER = (1, 0x01, "Invalid Queue Identifier");
    INVALID_QUEUE_SIZE = (1, 0x02, "Invalid Queue Size");
    ABORT_LIMIT_EXCEEDED = (1, 0x03, "Abort Command Limit Exceeded");
    ASYNC_EVENT_LIMIT_EXCEEDED = (1, 0x05, "Asynchronous Event Request Limit Exceeded");
    INVALID_INTERRUPT_VECTOR = (1, 0x08, "Invalid Interrupt Vector");
    INVALID_LOG_PAGE = (1, 0x09, "Invalid Log Page");
    INVALID_FORMAT = (1, 0x0a, "Invalid Format");
    FEATURE_NOT_SAVEABLE = (1, 0x0d, "Feature Identifier Not Saveable");
    FEATURE_NOT_CHANGEABLE = (1, 0x0e, "Feature Not Changeable");
    INVALID_QUEUE_DELETION = (1, 0x0c, "Invalid Queue Deletion");
    FEATURE_NOT_NAMESPACE_SPECIFIC = (1, 0x0f, "Feature Not Namespace Specific");
    NAMESPACE_NOT_ATTACHED = (1, 0x1a, "Namespace Not Attached");
    CONFLICTING_ATTRIBUTES = (1, 0x80, "Conflicting Attributes");
    COMMAND_SIZE_LIMIT_EXCEEDED = (1, 0x83, "Command Size Limit Exceeded");
    WRITE_TO_READ_ONLY_RANGE = (1, 0x82, "Attempted Write to Read Only Range");
    WRITE_FAULT = (2, 0x80, "Write Fault");
    UNRECOVERED_READ_ERROR = (2, 0x81, "Unrecovered Read Error");
    GUARD_CHECK_ERROR = (2, 0x82, "End-to-end Guard Check Error");
    APPLICATION_TAG_CHECK_ERROR = (2, 0x83, "End-to-end Application Tag Check Error");
    REFERENCE_TAG_CHECK_ERROR = (2, 0x84, "End-to-end Reference Tag Check Error");
    COMPARE_FAILURE = (2, 0x85, "Compare Failure");
    ACCESS_DENIED = (2, 0x86, "Access Denied");
    DEALLOCATED_BLOCK = (2, 0x87, "Deallocated or Unwritten Logical Block");
}
