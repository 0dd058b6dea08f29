//! Feature identifiers and the layouts of their values. NVM Express Base 2.0, "Feature Specific Information".

/// Feature identifiers that the driver uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FeatureId {
    /// Volatile Write Cache.
    VolatileWriteCache = 0x06,
    /// Number of Queues.
    NumberOfQueues = 0x07,
    /// Asynchronous Event Configuration.
    AsyncEventConfiguration = 0x0b,
}

/// The value of Number of Queues: counts of I/O queues, without the admin queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueCounts {
    /// I/O submission queues, 1 to 65535.
    pub submission: u16,
    /// I/O completion queues, 1 to 65535.
    pub completion: u16,
}

impl QueueCounts {
    /// As CDW11 of Set Features: both zero-based.
    #[must_use]
    pub fn to_zeroes_based(self) -> u32 {
        u32::from(self.submission.saturating_sub(1))
            | (u32::from(self.completion.saturating_sub(1)) << 16)
    }

    /// From dword 0 of the completion, which may grant fewer than asked, or more.
    #[must_use]
    pub fn from_zeroes_based(value: u32) -> QueueCounts {
        QueueCounts {
            submission: ((value & 0xffff) as u16).saturating_add(1),
            completion: ((value >> 16) as u16).saturating_add(1),
        }
    }
}

/// Bits of Asynchronous Event Configuration.
pub mod async_event_config {
    /// SMART / health critical warnings (bits 7:0 mirror the Critical Warning field).
    pub const CRITICAL_WARNINGS: u32 = 0x1f;
    /// Namespace Attribute Notices.
    pub const NAMESPACE_ATTRIBUTE: u32 = 1 << 8;
}
