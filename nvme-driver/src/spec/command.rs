//! Submission queue entries: the common 64-byte layout, opcodes, and constructors for the commands that we send.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::{Cid, Nsid, QueueId};

/// One submission queue entry, 64 bytes. NVM Express Base 2.0, "Common Command Format".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct SubmissionEntry {
    /// CDW0 bits 7:0.
    pub opcode: u8,
    /// CDW0 bits 15:8: FUSE (1:0) and PSDT (7:6); 0 means not fused, PRPs.
    pub flags: u8,
    /// CDW0 bits 31:16: command identifier.
    pub cid: U16,
    /// Namespace identifier.
    pub nsid: U32,
    /// Command dword 2.
    pub cdw2: U32,
    /// Command dword 3.
    pub cdw3: U32,
    /// Metadata pointer.
    pub mptr: U64,
    /// Data pointer: PRP entry 1.
    pub prp1: U64,
    /// Data pointer: PRP entry 2, or the address of a PRP list.
    pub prp2: U64,
    /// Command dword 10.
    pub cdw10: U32,
    /// Command dword 11.
    pub cdw11: U32,
    /// Command dword 12.
    pub cdw12: U32,
    /// Command dword 13.
    pub cdw13: U32,
    /// Command dword 14.
    pub cdw14: U32,
    /// Command dword 15.
    pub cdw15: U32,
}

const _: () = assert!(size_of::<SubmissionEntry>() == 64);
const _: () = assert!(std::mem::offset_of!(SubmissionEntry, prp1) == 24);
const _: () = assert!(std::mem::offset_of!(SubmissionEntry, cdw10) == 40);

/// Admin command opcodes.
pub mod admin_opcode {
    /// Delete I/O Submission Queue.
    pub const DELETE_IO_SQ: u8 = 0x00;
    /// Create I/O Submission Queue.
    pub const CREATE_IO_SQ: u8 = 0x01;
    /// Get Log Page.
    pub const GET_LOG_PAGE: u8 = 0x02;
    /// Delete I/O Completion Queue.
    pub const DELETE_IO_CQ: u8 = 0x04;
    /// Create I/O Completion Queue.
    pub const CREATE_IO_CQ: u8 = 0x05;
    /// Identify.
    pub const IDENTIFY: u8 = 0x06;
    /// Abort.
    pub const ABORT: u8 = 0x08;
    /// Doorbell Buffer Config.
    pub const DOORBELL_BUFFER_CONFIG: u8 = 0x7c;
    /// Set Features.
    pub const SET_FEATURES: u8 = 0x09;
    /// Get Features.
    pub const GET_FEATURES: u8 = 0x0a;
    /// Asynchronous Event Request.
    pub const ASYNC_EVENT_REQUEST: u8 = 0x0c;
}

/// NVM command set opcodes.
pub mod io_opcode {
    /// Flush.
    pub const FLUSH: u8 = 0x00;
    /// Write.
    pub const WRITE: u8 = 0x01;
    /// Read.
    pub const READ: u8 = 0x02;
    /// Compare.
    pub const COMPARE: u8 = 0x05;
    /// Write Zeroes.
    pub const WRITE_ZEROES: u8 = 0x08;
    /// Dataset Management.
    pub const DATASET_MANAGEMENT: u8 = 0x09;
    /// Copy.
    pub const COPY: u8 = 0x19;
}

/// CDW12 bit 30 of Read, Write, Compare and Write Zeroes: Force Unit Access.
pub const CDW12_FUA: u32 = 1 << 30;
/// CDW12 bit 25 of Write Zeroes: Deallocate.
pub const CDW12_DEAC: u32 = 1 << 25;
/// CDW11 bit 2 of Dataset Management: Attribute - Deallocate.
pub const CDW11_AD: u32 = 1 << 2;

/// The most blocks that one Read, Write, Compare or Write Zeroes names: NLB has 16 bits, zero-based.
pub const MAX_BLOCKS: u32 = 65536;
/// The most ranges of one Dataset Management command: NR has 8 bits, zero-based.
pub const MAX_DSM_RANGES: usize = 256;

/// What is the same in all Reads, or all Writes, of one namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Command dwords 0 and 1, without an identifier.
    first: u64,
    /// Of dword 12, what is not the number of blocks.
    control: u64,
}

impl Transfer {
    /// Reads.
    #[must_use]
    pub fn read(nsid: Nsid) -> Transfer {
        Transfer::of(SubmissionEntry::read(nsid, LbaRange::FIRST))
    }

    /// Writes; see [`SubmissionEntry::write`] for `fua`.
    #[must_use]
    pub fn write(nsid: Nsid, fua: bool) -> Transfer {
        Transfer::of(SubmissionEntry::write(nsid, LbaRange::FIRST, fua))
    }

    fn of(entry: SubmissionEntry) -> Transfer {
        Transfer {
            first: u64::from_le(entry.words()[0]),
            control: entry.cdw12.get().into(),
        }
    }

    /// The entry of one of them in whole words, as [`SubmissionEntry::words`] gives it.
    #[inline(always)]
    pub(crate) fn words(self, cid: Cid, range: LbaRange, prp1: u64, prp2: u64) -> [u64; 8] {
        let count = u64::from(range.blocks.wrapping_sub(1) & 0xffff);
        [
            self.first | u64::from(cid.0) << 16,
            0,
            0,
            prp1,
            prp2,
            range.slba,
            count | self.control,
            0,
        ]
        .map(u64::to_le)
    }
}

impl LbaRange {
    /// The first block.
    const FIRST: LbaRange = LbaRange { slba: 0, blocks: 1 };
}

/// What a Read, Write, Compare or Write Zeroes works on: `blocks` (1 to 65536) from `slba`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LbaRange {
    /// First logical block.
    pub slba: u64,
    /// Count of logical blocks, not zero-based.
    pub blocks: u32,
}

impl SubmissionEntry {
    /// The entry in whole words, as it lies in memory.
    #[inline]
    #[must_use]
    pub fn words(self) -> [u64; 8] {
        let pair = |low: U32, high: U32| u64::from(low.get()) | u64::from(high.get()) << 32;
        let first =
            u32::from(self.opcode) | u32::from(self.flags) << 8 | u32::from(self.cid.get()) << 16;
        [
            pair(U32::new(first), self.nsid),
            pair(self.cdw2, self.cdw3),
            self.mptr.get(),
            self.prp1.get(),
            self.prp2.get(),
            pair(self.cdw10, self.cdw11),
            pair(self.cdw12, self.cdw13),
            pair(self.cdw14, self.cdw15),
        ]
        .map(u64::to_le)
    }

    /// A command with this opcode, of an admin or an I/O command set, and zeroes elsewhere: the fields are public.
    #[must_use]
    pub fn new(opcode: u8, nsid: Nsid) -> SubmissionEntry {
        SubmissionEntry {
            opcode,
            nsid: U32::new(nsid.0),
            ..SubmissionEntry::default()
        }
    }

    #[inline]
    fn with_range(opcode: u8, nsid: Nsid, range: LbaRange, control: u32) -> SubmissionEntry {
        debug_assert!((1..=MAX_BLOCKS).contains(&range.blocks));
        SubmissionEntry {
            opcode,
            nsid: U32::new(nsid.0),
            cdw10: U32::new((range.slba & 0xffff_ffff) as u32),
            cdw11: U32::new((range.slba >> 32) as u32),
            cdw12: U32::new((range.blocks.wrapping_sub(1) & 0xffff) | control),
            ..SubmissionEntry::default()
        }
    }

    /// Read. NVM Command Set 1.0, "Read command".
    #[inline]
    #[must_use]
    pub fn read(nsid: Nsid, range: LbaRange) -> SubmissionEntry {
        SubmissionEntry::with_range(io_opcode::READ, nsid, range, 0)
    }

    /// Write; with `fua` the data is on non-volatile media before the completion.
    #[inline]
    #[must_use]
    pub fn write(nsid: Nsid, range: LbaRange, fua: bool) -> SubmissionEntry {
        SubmissionEntry::with_range(
            io_opcode::WRITE,
            nsid,
            range,
            if fua { CDW12_FUA } else { 0 },
        )
    }

    /// The same command with FUA: a Read comes from the media then, where whatever a cache had was written before.
    #[must_use]
    pub fn force_unit_access(self) -> SubmissionEntry {
        SubmissionEntry {
            cdw12: self.cdw12 | U32::new(CDW12_FUA),
            ..self
        }
    }

    /// Compare.
    #[must_use]
    pub fn compare(nsid: Nsid, range: LbaRange) -> SubmissionEntry {
        SubmissionEntry::with_range(io_opcode::COMPARE, nsid, range, 0)
    }

    /// Write Zeroes; `deallocate` (DEAC) lets the controller unmap the blocks as long as they read back zero.
    #[must_use]
    pub fn write_zeroes(
        nsid: Nsid,
        range: LbaRange,
        deallocate: bool,
        fua: bool,
    ) -> SubmissionEntry {
        let control = if deallocate { CDW12_DEAC } else { 0 } | if fua { CDW12_FUA } else { 0 };
        SubmissionEntry::with_range(io_opcode::WRITE_ZEROES, nsid, range, control)
    }

    /// Flush of one namespace.
    #[must_use]
    pub fn flush(nsid: Nsid) -> SubmissionEntry {
        SubmissionEntry::new(io_opcode::FLUSH, nsid)
    }

    /// Dataset Management, deallocate, of `ranges` (1 to 256) [`DsmRange`]s at the data pointer.
    #[must_use]
    pub fn deallocate(nsid: Nsid, ranges: u16) -> SubmissionEntry {
        debug_assert!((1..=256).contains(&ranges));
        SubmissionEntry {
            cdw10: U32::new(u32::from(ranges.wrapping_sub(1)) & 0xff),
            cdw11: U32::new(CDW11_AD),
            ..SubmissionEntry::new(io_opcode::DATASET_MANAGEMENT, nsid)
        }
    }

    /// Copy to `slba` on, of one [`CopyRange`] (descriptor format 0) at the data pointer.
    #[must_use]
    pub fn copy(nsid: Nsid, slba: u64, fua: bool) -> SubmissionEntry {
        // NR, zero-based, is where the other commands have their count.
        let one = LbaRange { slba, blocks: 1 };
        let control = if fua { CDW12_FUA } else { 0 };
        SubmissionEntry::with_range(io_opcode::COPY, nsid, one, control)
    }

    /// Identify with the given CNS; the 4096-byte answer goes to the data pointer.
    #[must_use]
    pub fn identify(cns: super::Cns, nsid: Nsid) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(cns as u8)),
            ..SubmissionEntry::new(admin_opcode::IDENTIFY, nsid)
        }
    }

    /// Get Features of the current value.
    #[must_use]
    pub fn get_features(feature: super::FeatureId) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(feature as u8)),
            ..SubmissionEntry::new(admin_opcode::GET_FEATURES, Nsid::NONE)
        }
    }

    /// Set Features (not saved across power cycles).
    #[must_use]
    pub fn set_features(feature: super::FeatureId, value: u32) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(feature as u8)),
            cdw11: U32::new(value),
            ..SubmissionEntry::new(admin_opcode::SET_FEATURES, Nsid::NONE)
        }
    }

    /// Get Log Page of `len` bytes (a multiple of 4, at most 4096); reading clears the event that announced it.
    #[must_use]
    pub fn get_log_page(log: super::LogId, nsid: Nsid, len: usize) -> SubmissionEntry {
        let dwords = u32::try_from((len / 4).saturating_sub(1)).unwrap_or(u32::MAX);
        SubmissionEntry {
            cdw10: U32::new(u32::from(log as u8) | ((dwords & 0xffff) << 16)),
            cdw11: U32::new(dwords >> 16),
            ..SubmissionEntry::new(admin_opcode::GET_LOG_PAGE, nsid)
        }
    }

    /// Create I/O Completion Queue: `entries` long, physically contiguous, interrupts off.
    #[must_use]
    pub fn create_io_cq(queue: QueueId, entries: u16, vector: Option<u16>) -> SubmissionEntry {
        // IEN, and IV in the upper half.
        let interrupt = vector.map_or(0, |vector| u32::from(vector) << 16 | 1 << 1);
        SubmissionEntry {
            cdw10: U32::new(u32::from(queue.0) | (u32::from(entries.wrapping_sub(1)) << 16)),
            cdw11: U32::new(1 | interrupt), // PC = 1
            ..SubmissionEntry::new(admin_opcode::CREATE_IO_CQ, Nsid::NONE)
        }
    }

    /// Create I/O Submission Queue of the same identifier as its completion queue.
    #[must_use]
    pub fn create_io_sq(queue: QueueId, entries: u16) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(queue.0) | (u32::from(entries.wrapping_sub(1)) << 16)),
            cdw11: U32::new(1 | (u32::from(queue.0) << 16)), // PC = 1, CQID
            ..SubmissionEntry::new(admin_opcode::CREATE_IO_SQ, Nsid::NONE)
        }
    }

    /// Doorbell Buffer Config; the data pointer names the two pages.
    #[must_use]
    pub fn doorbell_buffer_config() -> SubmissionEntry {
        SubmissionEntry::new(admin_opcode::DOORBELL_BUFFER_CONFIG, Nsid::NONE)
    }

    /// Abort of the command `cid` in the submission queue `queue`.
    #[must_use]
    pub fn abort(queue: QueueId, cid: Cid) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(queue.0) | u32::from(cid.0) << 16),
            ..SubmissionEntry::new(admin_opcode::ABORT, Nsid::NONE)
        }
    }

    /// Delete I/O Submission Queue.
    #[must_use]
    pub fn delete_io_sq(queue: QueueId) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(queue.0)),
            ..SubmissionEntry::new(admin_opcode::DELETE_IO_SQ, Nsid::NONE)
        }
    }

    /// Delete I/O Completion Queue.
    #[must_use]
    pub fn delete_io_cq(queue: QueueId) -> SubmissionEntry {
        SubmissionEntry {
            cdw10: U32::new(u32::from(queue.0)),
            ..SubmissionEntry::new(admin_opcode::DELETE_IO_CQ, Nsid::NONE)
        }
    }

    /// Asynchronous Event Request: completes when something happens.
    #[must_use]
    pub fn async_event_request() -> SubmissionEntry {
        SubmissionEntry::new(admin_opcode::ASYNC_EVENT_REQUEST, Nsid::NONE)
    }

    /// The command identifier.
    #[must_use]
    pub fn cid(&self) -> Cid {
        Cid(self.cid.get())
    }

    /// The starting LBA of a command that names a range.
    #[must_use]
    pub fn lba_range(&self) -> LbaRange {
        LbaRange {
            slba: u64::from(self.cdw10.get()) | (u64::from(self.cdw11.get()) << 32),
            blocks: (self.cdw12.get() & 0xffff) + 1,
        }
    }
}

/// One range of Dataset Management, 16 bytes. NVM Command Set 1.0, "Range Definition".
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct DsmRange {
    /// Context attributes; advisory, 0.
    pub attributes: U32,
    /// Length in logical blocks, not zero-based.
    pub blocks: U32,
    /// Starting LBA.
    pub slba: U64,
}

const _: () = assert!(size_of::<DsmRange>() == 16);

/// One source range of Copy, 32 bytes. NVM Command Set 1.0, "Copy", source range entries of descriptor format 0.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct CopyRange {
    reserved_0: [u8; 8],
    /// Starting LBA.
    pub slba: U64,
    /// Number of logical blocks, zero-based.
    pub nlb: U16,
    reserved_18: [u8; 6],
    /// Expected tags of protection information; not used.
    tags: [u8; 8],
}

const _: () = assert!(size_of::<CopyRange>() == 32);
const _: () = assert!(std::mem::offset_of!(CopyRange, slba) == 8);
const _: () = assert!(std::mem::offset_of!(CopyRange, nlb) == 16);

impl From<LbaRange> for CopyRange {
    fn from(range: LbaRange) -> CopyRange {
        debug_assert!((1..=MAX_BLOCKS).contains(&range.blocks));
        CopyRange {
            slba: range.slba.into(),
            nlb: U16::new((range.blocks.wrapping_sub(1) & 0xffff) as u16),
            ..CopyRange::default()
        }
    }
}
