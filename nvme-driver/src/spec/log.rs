//! Log pages and asynchronous events. NVM Express Base 2.0, "Get Log Page", "Asynchronous Event Information".

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Log page identifiers that the driver reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LogId {
    /// Error Information.
    Error = 0x01,
    /// SMART / Health Information.
    Smart = 0x02,
    /// Changed Namespace List.
    ChangedNamespaces = 0x04,
}

impl LogId {
    /// From the log page identifier that an asynchronous event names.
    #[must_use]
    pub fn from_wire(value: u8) -> Option<LogId> {
        match value {
            0x01 => Some(LogId::Error),
            0x02 => Some(LogId::Smart),
            0x04 => Some(LogId::ChangedNamespaces),
            _ => None,
        }
    }
}

/// One entry of the Error Information log, 64 bytes.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct ErrorLogEntry {
    /// Counts errors over the life of the controller; 0 marks an unused entry.
    pub error_count: U64,
    /// Submission queue of the command.
    pub sqid: U16,
    /// Its command identifier.
    pub cid: U16,
    /// Status field with the phase tag's place in bit 0.
    pub status: U16,
    /// Byte and bit of the command that was wrong.
    pub parameter_error_location: U16,
    /// First LBA of the error.
    pub lba: U64,
    /// Namespace.
    pub nsid: U32,
    /// Vendor specific and reserved bytes.
    pub rest: [u8; 36],
}

const _: () = assert!(size_of::<ErrorLogEntry>() == 64);

/// SMART / Health Information, 512 bytes. 16-byte counters are little-endian.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct SmartLog {
    /// Bit 0 spare low, 1 temperature, 2 reliability degraded, 3 read only, 4 volatile backup failed.
    pub critical_warning: u8,
    /// Composite temperature in kelvin.
    pub temperature: U16,
    /// Available spare in percent.
    pub available_spare: u8,
    /// Threshold below which spare is critical, in percent.
    pub available_spare_threshold: u8,
    /// Vendor's estimate of life used in percent; may exceed 100.
    pub percentage_used: u8,
    /// Endurance group summary and reserved.
    pub reserved: [u8; 26],
    /// In thousands of 512-byte units.
    pub data_units_read: [u8; 16],
    /// In thousands of 512-byte units.
    pub data_units_written: [u8; 16],
    /// Completed reads.
    pub host_read_commands: [u8; 16],
    /// Completed writes.
    pub host_write_commands: [u8; 16],
    /// Minutes.
    pub controller_busy_time: [u8; 16],
    /// Power cycles.
    pub power_cycles: [u8; 16],
    /// Hours.
    pub power_on_hours: [u8; 16],
    /// Shutdowns without a shutdown notification.
    pub unsafe_shutdowns: [u8; 16],
    /// Unrecovered integrity errors.
    pub media_errors: [u8; 16],
    /// Entries in the error log over the life of the controller.
    pub error_log_entries: [u8; 16],
    /// Temperature times, sensors, reserved.
    pub rest: [u8; 320],
}

const _: () = assert!(size_of::<SmartLog>() == 512);

/// What an asynchronous event reports: dword 0 of its completion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AsyncEvent(pub u32);

impl AsyncEvent {
    /// Type: 0 error, 1 SMART/health, 2 notice, 6 I/O command set, 7 vendor.
    #[must_use]
    pub fn event_type(self) -> u8 {
        (self.0 & 7) as u8
    }

    /// Information within the type.
    #[must_use]
    pub fn information(self) -> u8 {
        ((self.0 >> 8) & 0xff) as u8
    }

    /// The log page that must be read before the next event of this type comes.
    #[must_use]
    pub fn log_page(self) -> u8 {
        ((self.0 >> 16) & 0xff) as u8
    }

    /// Notice, Namespace Attribute Changed: sizes or the list of namespaces are not what they were.
    #[must_use]
    pub fn is_namespace_change(self) -> bool {
        self.event_type() == 2 && self.information() == 0
    }
}
