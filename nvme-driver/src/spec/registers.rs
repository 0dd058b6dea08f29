//! Controller properties: NVM Express Base 2.0, "Controller Properties". Offsets in bytes from the start of BAR0.

use std::time::Duration;

/// Register offsets.
pub mod offset {
    /// Controller Capabilities, 64 bits.
    pub const CAP: u32 = 0x00;
    /// Version, 32 bits.
    pub const VS: u32 = 0x08;
    /// Interrupt Mask Set, 32 bits.
    pub const INTMS: u32 = 0x0c;
    /// Interrupt Mask Clear, 32 bits.
    pub const INTMC: u32 = 0x10;
    /// Controller Configuration, 32 bits.
    pub const CC: u32 = 0x14;
    /// Controller Status, 32 bits.
    pub const CSTS: u32 = 0x1c;
    /// Admin Queue Attributes, 32 bits.
    pub const AQA: u32 = 0x24;
    /// Admin Submission Queue Base Address, 64 bits.
    pub const ASQ: u32 = 0x28;
    /// Admin Completion Queue Base Address, 64 bits.
    pub const ACQ: u32 = 0x30;
    /// First doorbell (submission queue 0 tail).
    pub const DOORBELLS: u32 = 0x1000;
}

/// Controller Capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cap(pub u64);

impl Cap {
    /// What reads return when the device is gone.
    pub const REMOVED: Cap = Cap(u64::MAX);

    /// MQES: the largest I/O queue, in entries (2 to 65536; the wire value is zero-based).
    #[must_use]
    pub fn max_queue_entries(self) -> u32 {
        u32::from((self.0 & 0xffff) as u16) + 1
    }

    /// TO: how long CSTS.RDY may take to change. Units of 500 ms on the wire; one more unit for good measure,
    /// since the field may be read as "shall not exceed" or "at least".
    #[must_use]
    pub fn ready_timeout(self) -> Duration {
        let units = ((self.0 >> 24) & 0xff) as u32;
        Duration::from_millis(500) * (units + 1)
    }

    /// DSTRD: bytes from one doorbell register to the next.
    #[must_use]
    pub fn doorbell_stride(self) -> u32 {
        4 << ((self.0 >> 32) & 0xf)
    }

    /// CSS bit 0: the NVM command set is supported.
    #[must_use]
    pub fn supports_nvm_command_set(self) -> bool {
        self.0 & (1 << 37) != 0
    }

    /// MPSMIN: the smallest memory page in bytes (2 to the power 12 + MPSMIN).
    #[must_use]
    pub fn min_page_size(self) -> u64 {
        1 << (12 + ((self.0 >> 48) & 0xf))
    }

    /// MPSMAX: the largest memory page in bytes.
    #[must_use]
    pub fn max_page_size(self) -> u64 {
        1 << (12 + ((self.0 >> 52) & 0xf))
    }
}

/// Offset of the submission queue tail doorbell of `queue`.
#[must_use]
pub fn sq_tail_doorbell(queue: super::QueueId, stride: u32) -> u32 {
    offset::DOORBELLS + 2 * u32::from(queue.0) * stride
}

/// Offset of the completion queue head doorbell of `queue`.
#[must_use]
pub fn cq_head_doorbell(queue: super::QueueId, stride: u32) -> u32 {
    offset::DOORBELLS + (2 * u32::from(queue.0) + 1) * stride
}

/// Version (VS).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{}.{}.{}",
            self.0 >> 16,
            (self.0 >> 8) & 0xff,
            self.0 & 0xff
        )
    }
}

/// Controller Configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct Cc(pub u32);

impl Cc {
    /// Enable.
    pub const EN: u32 = 1;
    /// SHN = 01b: normal shutdown notification.
    pub const SHN_NORMAL: u32 = 1 << 14;
    /// Both bits of SHN.
    pub const SHN_MASK: u32 = 3 << 14;

    /// Enabled, NVM command set, 4 KiB pages, round robin, 64-byte submission and 16-byte completion entries.
    #[must_use]
    pub fn enabled() -> Cc {
        Cc(Cc::EN | (6 << 16) | (4 << 20))
    }

    /// EN.
    #[must_use]
    pub fn is_enabled(self) -> bool {
        self.0 & Cc::EN != 0
    }
}

/// Controller Status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Csts(pub u32);

impl Csts {
    /// Ready.
    pub const RDY: u32 = 1;
    /// Controller Fatal Status.
    pub const CFS: u32 = 1 << 1;
    /// SHST = 01b: shutdown processing occurring.
    pub const SHST_OCCURRING: u32 = 1 << 2;
    /// SHST = 10b: shutdown processing complete.
    pub const SHST_COMPLETE: u32 = 2 << 2;

    /// RDY.
    #[must_use]
    pub fn is_ready(self) -> bool {
        self.0 & Csts::RDY != 0
    }

    /// CFS: only a reset helps.
    #[must_use]
    pub fn is_fatal(self) -> bool {
        self.0 & Csts::CFS != 0
    }

    /// SHST = 10b.
    #[must_use]
    pub fn is_shutdown_complete(self) -> bool {
        self.0 & (3 << 2) == Csts::SHST_COMPLETE
    }

    /// All ones: nothing answers on the bus any more.
    #[must_use]
    pub fn is_removed(self) -> bool {
        self.0 == u32::MAX
    }
}

/// Admin Queue Attributes for queues of `entries` each (2 to 4096).
#[must_use]
pub fn admin_queue_attributes(entries: u16) -> u32 {
    let zero_based = u32::from(entries.clamp(2, 4096)) - 1;
    zero_based | (zero_based << 16)
}
