//! virtio-blk on the wire (virtio 1.2, 5.2): constants, the configuration space, and a chain parsed into a
//! [`BlockOp`].
//!
//! Promises that an accepted request lies inside the disk, is aligned to its blocks and may be carried out as it
//! stands, and that a refused one says where its status goes. Nothing is rounded in the guest's favour. Does not
//! transfer data: the data segments stay in the chain. Start at [`parse`].

use super::chain::{Chain, Ends, Sole};
use super::memory::StatusByte;
use crate::block::{BlockCount, BlockOp, BlockRange, BlockStatus, Geometry, Lba, RangeList};
use std::mem::{offset_of, size_of};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Feature bits (virtio 1.2, 5.2.3 and 6).
pub mod feature {
    /// The configuration field `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// FLUSH is understood.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The guest may write `writeback`.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// `num_queues` is valid.
    pub const MQ: u64 = 1 << 12;
    /// DISCARD is understood.
    pub const DISCARD: u64 = 1 << 13;
    /// WRITE_ZEROES is understood.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// VIRTIO_F_INDIRECT_DESC.
    pub const INDIRECT_DESC: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_VERSION_1.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Request types (virtio 1.2, 5.2.6).
pub mod request_type {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Make completed writes durable.
    pub const FLUSH: u32 = 4;
    /// Read the serial number.
    pub const GET_ID: u32 = 8;
    /// Deallocate.
    pub const DISCARD: u32 = 11;
    /// Zero.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Status bytes (virtio 1.2, 5.2.6).
pub mod status {
    /// Success.
    pub const OK: u8 = 0;
    /// Device or driver error.
    pub const IOERR: u8 = 1;
    /// The device does not understand the request.
    pub const UNSUPP: u8 = 2;
}

/// The wire form of a status.
pub const fn status_byte(status: BlockStatus) -> u8 {
    match status {
        BlockStatus::Ok => status::OK,
        BlockStatus::IoError => status::IOERR,
        BlockStatus::Unsupported => status::UNSUPP,
    }
}

/// Virtio counts in units of 512 bytes, whatever the block size.
pub const SECTOR_SHIFT: u32 = 9;
/// Length of the string GET_ID reads, padded with NUL; a string of this length has none.
pub const ID_BYTES: usize = 20;
/// Length of a request header: type, reserved, sector.
pub const HEADER_BYTES: usize = 16;

const FLAG_UNMAP: u32 = 1;

/// The header of a request.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RequestHeader {
    /// One of [`request_type`].
    pub request_type: U32,
    /// Was the I/O priority once; anything may stand here.
    pub reserved: U32,
    /// The first sector of an IN or OUT.
    pub sector: U64,
}

/// One segment of a DISCARD or WRITE_ZEROES.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct RangeSegment {
    /// The first sector.
    pub sector: U64,
    /// How many.
    pub num_sectors: U32,
    /// Bit 0: unmap, for WRITE_ZEROES only. The others are reserved.
    pub flags: U32,
}

/// Length of a [`RangeSegment`].
pub const RANGE_SEGMENT_BYTES: usize = 16;

/// The device configuration space up to the write-zeroes fields. A front-end may ask for less: QEMU reads 36, 48
/// or 57 bytes, by the features it knows.
#[derive(
    Debug,
    Clone,
    Copy,
    Default,
    PartialEq,
    Eq,
    FromBytes,
    IntoBytes,
    Immutable,
    KnownLayout,
    Unaligned,
)]
#[repr(C)]
pub struct VirtioBlkConfig {
    /// Size of the disk in 512-byte sectors.
    pub capacity: U64,
    /// Largest segment; valid with a feature we do not offer.
    pub size_max: U32,
    /// Most data segments of a request.
    pub seg_max: U32,
    /// Legacy geometry; valid with a feature we do not offer.
    pub cylinders: U16,
    /// As above.
    pub heads: u8,
    /// As above.
    pub sectors: u8,
    /// Block size in bytes.
    pub blk_size: U32,
    /// Blocks per physical block, as a power of two.
    pub physical_block_exp: u8,
    /// First aligned block.
    pub alignment_offset: u8,
    /// Preferred smallest request, in blocks.
    pub min_io_size: U16,
    /// Preferred largest request, in blocks.
    pub opt_io_size: U32,
    /// 1: writes may be cached until FLUSH; 0: write-through.
    pub writeback: u8,
    /// Padding.
    pub unused0: u8,
    /// Number of request queues.
    pub num_queues: U16,
    /// Most sectors of one DISCARD segment.
    pub max_discard_sectors: U32,
    /// Most segments of a DISCARD.
    pub max_discard_seg: U32,
    /// What discarded sectors should be aligned to.
    pub discard_sector_alignment: U32,
    /// Most sectors of one WRITE_ZEROES segment.
    pub max_write_zeroes_sectors: U32,
    /// Most segments of a WRITE_ZEROES.
    pub max_write_zeroes_seg: U32,
    /// 1: WRITE_ZEROES with the unmap flag may deallocate.
    pub write_zeroes_may_unmap: u8,
    /// Padding.
    pub unused1: [u8; 3],
}

const _: () = {
    assert!(size_of::<RequestHeader>() == HEADER_BYTES);
    assert!(offset_of!(RequestHeader, sector) == 8);
    assert!(size_of::<RangeSegment>() == RANGE_SEGMENT_BYTES);
    assert!(offset_of!(RangeSegment, num_sectors) == 8);
    assert!(offset_of!(RangeSegment, flags) == 12);
    assert!(size_of::<VirtioBlkConfig>() == 60);
    assert!(offset_of!(VirtioBlkConfig, seg_max) == 12);
    assert!(offset_of!(VirtioBlkConfig, blk_size) == 20);
    assert!(offset_of!(VirtioBlkConfig, opt_io_size) == 28);
    assert!(offset_of!(VirtioBlkConfig, writeback) == 32);
    assert!(offset_of!(VirtioBlkConfig, num_queues) == 34);
    assert!(offset_of!(VirtioBlkConfig, max_discard_sectors) == 36);
    assert!(offset_of!(VirtioBlkConfig, max_write_zeroes_sectors) == 48);
    assert!(offset_of!(VirtioBlkConfig, write_zeroes_may_unmap) == 56);
};

/// The limits of one of the two requests that carry range segments, as offered in the configuration space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RangeLimits {
    /// Most sectors of one segment.
    pub max_sectors: u32,
    /// Most segments; at most [`crate::block::MAX_RANGES`].
    pub max_segments: u32,
}

/// What was offered and negotiated for one disk: all that [`parse`] judges by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkLimits {
    /// The disk.
    pub geometry: Geometry,
    /// VIRTIO_BLK_F_FLUSH was negotiated.
    pub flush: bool,
    /// VIRTIO_BLK_F_DISCARD was negotiated, with these limits.
    pub discard: Option<RangeLimits>,
    /// VIRTIO_BLK_F_WRITE_ZEROES was negotiated, with these limits.
    pub write_zeroes: Option<RangeLimits>,
}

impl BlkLimits {
    /// Sectors to blocks: `None` unless they lie inside the disk and are whole blocks.
    #[inline]
    fn blocks(&self, sector: u64, sectors: u64) -> Option<(Lba, u64)> {
        // `Geometry` holds fewer than 2^55 sectors, so what passes here cannot wrap as a byte offset either.
        let end = sector.checked_add(sectors)?;
        let inside = end <= self.geometry.sectors();
        let shift = self.geometry.sector_shift();
        let part = !u64::MAX.wrapping_shl(shift);
        let (lba, blocks) = (sector.wrapping_shr(shift), sectors.wrapping_shr(shift));
        (inside && (sector | sectors) & part == 0).then_some((Lba::new(lba), blocks))
    }
}

/// A request to be carried out. Its data is what is left in the chain: `readable()` of a write, `writable()` of
/// a read or an identification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkRequest {
    /// What to do.
    pub op: BlockOp,
    /// Where to answer.
    pub status: StatusByte,
    /// Bytes of data the guest gets if it succeeds; see [`finish`].
    pub data_in: u32,
    /// Bytes of data that move, whichever way.
    pub data_len: u32,
}

/// A request refused: nothing of it was or will be carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlkReject {
    /// What the guest is told.
    pub status: BlockStatus,
    /// Where, if a place could be located.
    pub location: Option<StatusByte>,
    /// The used length its head goes back with.
    used_len: u32,
}

impl BlkReject {
    /// Writes the status if there is a place for it; the result is the used length for the head.
    pub fn finish(self) -> u32 {
        if let Some(location) = self.location {
            location.write(status_byte(self.status));
        }
        self.used_len
    }
}

/// Ends an accepted request: writes `status`, and returns the used length for its head.
///
/// The used length counts bytes from the first writable one on without a gap (virtio 1.2, 2.7.8.2), so a read
/// that failed reports none: its status lies behind data that was not written.
#[inline]
pub fn finish(location: StatusByte, status: BlockStatus, data_in: u32) -> u32 {
    location.write(status_byte(status));
    match status {
        // Chains hold fewer than 2^32 bytes, the status included.
        BlockStatus::Ok => data_in.wrapping_add(1),
        _ if data_in == 0 => 1,
        _ => 0,
    }
}

/// Parses the chain just popped. Takes header and status off it and leaves the data; the segments of a DISCARD
/// or WRITE_ZEROES go to `ranges`.
///
/// # Errors
/// Everything the guest may not ask; the refusal knows how to answer.
#[inline]
pub fn parse(
    chain: &mut Chain,
    ranges: &mut RangeList,
    limits: &BlkLimits,
) -> Result<BlkRequest, BlkReject> {
    let ends = chain.take_ends();
    parse_taken(ends, chain, ranges, limits)
}

/// The read or write that a request with one buffer asks for: whether it is a write, and of which blocks. `None` for
/// anything else, and for what may not be: [`parse_taken`] knows the answer.
#[inline(always)]
pub fn parse_sole(sole: &Sole<HEADER_BYTES>, limits: &BlkLimits) -> Option<(bool, BlockRange)> {
    let header: RequestHeader = zerocopy::transmute!(sole.header);
    let geometry = &limits.geometry;
    // IN is 0 and its buffer writable, OUT is 1 and its buffer is not: one differs from the other, and both are bits.
    let kind = header.request_type.get();
    let write = kind == request_type::OUT;
    if kind ^ u32::from(sole.writable) != 1 || (write && geometry.read_only()) {
        return None;
    }
    let (sector, len) = (header.sector.get(), sole.len);
    let (sector_mask, byte_mask) = geometry.part_masks();
    if sector & sector_mask | u64::from(len & byte_mask) != 0 {
        return None;
    }
    let shift = geometry.sector_shift();
    let lba = sector.wrapping_shr(shift);
    let count = (len >> SECTOR_SHIFT).wrapping_shr(shift);
    let inside = u64::from(count) <= geometry.blocks().checked_sub(lba)?;
    let range = BlockRange::new(Lba::new(lba), BlockCount::new(count));
    inside.then_some((write, range))
}

/// [`parse`] of a chain whose ends were taken off before.
///
/// # Errors
/// As [`parse`].
#[inline]
pub fn parse_taken(
    ends: Ends<HEADER_BYTES>,
    chain: &mut Chain,
    ranges: &mut RangeList,
    limits: &BlkLimits,
) -> Result<BlkRequest, BlkReject> {
    let Ends {
        status: location,
        header,
    } = ends;
    let (Some(status), Some(header)) = (location, header) else {
        // A malformed chain, one without a status, or one too short for a header.
        return Err(BlkReject {
            status: BlockStatus::IoError,
            location,
            used_len: 0,
        });
    };
    let header: RequestHeader = zerocopy::transmute!(header);
    let request_type = header.request_type.get();
    let refuse = |status: BlockStatus, chain: &Chain| BlkReject {
        status,
        location,
        // As in `finish`: the status counts if nothing unwritten lies before it.
        used_len: u32::from(chain.writable_len() == 0),
    };
    // Nearly all requests are a read or a write, so these come before the jump to any of the others.
    if request_type <= request_type::OUT {
        let write = request_type == request_type::OUT;
        let len = if write {
            chain.readable_len()
        } else {
            chain.writable_len()
        };
        let (Some((range, data_len)), false) = (
            data_range(len, header, limits),
            write && limits.geometry.read_only(),
        ) else {
            return Err(refuse(BlockStatus::IoError, chain));
        };
        return Ok(BlkRequest {
            op: if write {
                BlockOp::Write(range)
            } else {
                BlockOp::Read(range)
            },
            status,
            data_in: if write { 0 } else { data_len },
            data_len,
        });
    }
    match parse_other(request_type, chain, ranges, limits) {
        Ok((op, data_in)) => Ok(BlkRequest {
            op,
            status,
            data_in,
            data_len: data_in,
        }),
        Err(refusal) => Err(refuse(refusal, chain)),
    }
}

/// What is neither a read nor a write, and the bytes of data that the guest gets.
#[cold]
fn parse_other(
    request_type: u32,
    chain: &mut Chain,
    ranges: &mut RangeList,
    limits: &BlkLimits,
) -> Result<(BlockOp, u32), BlockStatus> {
    match request_type {
        // Sector and data of a flush are ignored: there are drivers that leave something there.
        request_type::FLUSH if limits.flush => Ok((BlockOp::Flush, 0)),
        request_type::GET_ID => {
            let len = chain.writable_len().min(ID_BYTES as u64);
            u32::try_from(len)
                .map(|len| (BlockOp::DeviceId, len))
                .map_err(|_| BlockStatus::IoError)
        }
        request_type::DISCARD => discard(chain, ranges, limits).map(|()| (BlockOp::Discard, 0)),
        request_type::WRITE_ZEROES => {
            write_zeroes(chain, ranges, limits).map(|()| (BlockOp::WriteZeroes, 0))
        }
        _ => Err(BlockStatus::Unsupported),
    }
}

/// The blocks of an IN or OUT with `bytes` of data, and its data length.
#[inline]
fn data_range(bytes: u64, header: RequestHeader, limits: &BlkLimits) -> Option<(BlockRange, u32)> {
    // Chains hold fewer than 2^32 bytes.
    let len = u32::try_from(bytes).ok().filter(|len| *len != 0)?;
    let (lba, count) = limits.blocks(header.sector.get(), u64::from(len >> SECTOR_SHIFT))?;
    let whole_sectors = len.is_multiple_of(1 << SECTOR_SHIFT);
    // No more blocks than bytes.
    let count = BlockCount::new((count & 0xffff_ffff) as u32);
    whole_sectors.then_some((BlockRange::new(lba, count), len))
}

/// Takes the segments of a DISCARD off the chain. They are advice, so each shrinks to the whole blocks in it.
fn discard(
    chain: &mut Chain,
    ranges: &mut RangeList,
    limits: &BlkLimits,
) -> Result<(), BlockStatus> {
    let offered = limits.discard.ok_or(BlockStatus::Unsupported)?;
    let geometry = &limits.geometry;
    let shift = geometry.sector_shift();
    range_segments(chain, ranges, limits, offered, 0, |segment| {
        let sector = segment.sector.get();
        let end = sector
            .checked_add(u64::from(segment.num_sectors.get()))
            .filter(|end| *end <= geometry.sectors())?;
        let first = sector.div_ceil(1 << shift);
        let count = u32::try_from((end >> shift).saturating_sub(first)).ok()?;
        Some(BlockRange::new(Lba::new(first), BlockCount::new(count)))
    })
}

/// Takes the segments of a WRITE_ZEROES off the chain. They are orders, so each must be whole blocks.
fn write_zeroes(
    chain: &mut Chain,
    ranges: &mut RangeList,
    limits: &BlkLimits,
) -> Result<(), BlockStatus> {
    let offered = limits.write_zeroes.ok_or(BlockStatus::Unsupported)?;
    range_segments(chain, ranges, limits, offered, FLAG_UNMAP, |segment| {
        let sectors = u64::from(segment.num_sectors.get());
        let (lba, count) = limits.blocks(segment.sector.get(), sectors)?;
        Some(BlockRange {
            lba,
            count: BlockCount::new(u32::try_from(count).ok()?),
            unmap: segment.flags.get() & FLAG_UNMAP != 0,
        })
    })
}

/// Copies all range segments of a request, once (I6), and judges them before the first is carried out.
fn range_segments(
    chain: &mut Chain,
    ranges: &mut RangeList,
    limits: &BlkLimits,
    offered: RangeLimits,
    known_flags: u32,
    to_range: impl Fn(RangeSegment) -> Option<BlockRange>,
) -> Result<(), BlockStatus> {
    ranges.clear();
    let bytes = chain.readable_len();
    if limits.geometry.read_only()
        || bytes == 0
        || !bytes.is_multiple_of(RANGE_SEGMENT_BYTES as u64)
    {
        return Err(BlockStatus::IoError);
    }
    if bytes / RANGE_SEGMENT_BYTES as u64 > u64::from(offered.max_segments) {
        return Err(BlockStatus::Unsupported);
    }
    while let Some(segment) = chain.take_front::<RANGE_SEGMENT_BYTES>() {
        let segment: RangeSegment = zerocopy::transmute!(segment);
        if segment.flags.get() & !known_flags != 0 {
            return Err(BlockStatus::Unsupported);
        }
        if segment.num_sectors.get() > offered.max_sectors {
            return Err(BlockStatus::IoError);
        }
        let range = to_range(segment).ok_or(BlockStatus::IoError)?;
        // Nothing to do is done already; the list has room for what may be offered.
        if range.count.get() != 0 && !ranges.push(range) {
            return Err(BlockStatus::Unsupported);
        }
    }
    Ok(())
}
