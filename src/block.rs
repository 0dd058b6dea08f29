//! The middle vocabulary: what a guest asks of a block device, in blocks of the namespace.
//!
//! Promises that a [`BlockOp`] which left a request parser lies wholly inside its [`Geometry`]; whoever carries
//! it out checks nothing again. Knows neither virtio nor SCSI nor NVMe: those meet only in the data path, and
//! here is the seam where another front or another medium would be attached. Start at [`BlockOp`].
#![forbid(unsafe_code)]

/// Number of ranges one DISCARD or WRITE ZEROES may name: the limit of one NVMe Dataset Management command
/// (NVM Command Set 1.0, "Dataset Management", NR is eight bits and zero-based).
pub const MAX_RANGES: usize = 256;

/// A logical block address: the index of a block of the namespace (not a 512-byte virtio sector).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lba(u64);

impl Lba {
    /// Block number `index` of the namespace.
    pub const fn new(index: u64) -> Self {
        Self(index)
    }

    /// The block number.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// A number of blocks. Zero is representable: wire formats count from zero, and a range that was shrunk to its
/// whole blocks may hold none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockCount(u32);

impl BlockCount {
    /// `count` blocks.
    pub const fn new(count: u32) -> Self {
        Self(count)
    }

    /// The number of blocks.
    pub const fn get(self) -> u32 {
        self.0
    }

    /// The zero-based form of NVMe's NLB; `None` for zero blocks and for more than its 16 bits hold (65536).
    pub fn to_zeroes_based(self) -> Option<u16> {
        u16::try_from(self.0.checked_sub(1)?).ok()
    }
}

/// Consecutive blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockRange {
    /// The first block.
    pub lba: Lba,
    /// How many blocks follow, the first included.
    pub count: BlockCount,
    /// The device may deallocate the blocks instead of storing zeroes. Only WRITE ZEROES sets it.
    pub unmap: bool,
}

impl BlockRange {
    /// `count` blocks from `lba` on, not to be deallocated.
    pub const fn new(lba: Lba, count: BlockCount) -> Self {
        Self {
            lba,
            count,
            unmap: false,
        }
    }
}

/// The ranges of one DISCARD or WRITE ZEROES, allocated once and filled anew by each request.
#[derive(Debug)]
pub struct RangeList {
    ranges: Box<[BlockRange; MAX_RANGES]>,
    len: usize,
}

impl RangeList {
    /// An empty list with room for [`MAX_RANGES`]; the only allocation it ever makes.
    pub fn new() -> Self {
        let none = BlockRange::new(Lba::new(0), BlockCount::new(0));
        Self {
            ranges: Box::new([none; MAX_RANGES]),
            len: 0,
        }
    }

    /// Forgets all ranges.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Appends `range`; false when the list is full, and then nothing was appended.
    #[must_use]
    pub fn push(&mut self, range: BlockRange) -> bool {
        match self.ranges.get_mut(self.len) {
            Some(slot) => {
                *slot = range;
                self.len += 1;
                true
            }
            None => false,
        }
    }

    /// The ranges of the request, in its order.
    pub fn as_slice(&self) -> &[BlockRange] {
        &self.ranges[..self.len]
    }
}

impl Default for RangeList {
    fn default() -> Self {
        Self::new()
    }
}

/// One request to a block device. The data of a read or write stays where the parser found it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockOp {
    /// Fill the data segments from the range, which holds at least one block.
    Read(BlockRange),
    /// Store the data segments to the range, which holds at least one block.
    Write(BlockRange),
    /// Make every completed write durable (I11).
    Flush,
    /// Deallocate the ranges of the [`RangeList`]; an empty list is done at once.
    Discard,
    /// Make the ranges of the [`RangeList`] read back as zeroes; an empty list is done at once.
    WriteZeroes,
    /// Store the one block of the data segments to each block of the range; without data, zeroes.
    WriteSame(BlockRange),
    /// Read the range from the medium and look whether it is as it should be. The guest gets no data.
    Verify {
        /// At least one block.
        range: BlockRange,
        /// How it should be.
        against: Against,
    },
    /// [`BlockOp::Write`], then [`BlockOp::Verify`] of the same range.
    WriteAndVerify {
        /// At least one block.
        range: BlockRange,
        /// How it should be.
        against: Against,
    },
    /// Look whether the range is what the first half of the data segments says, and if so store the second half there. No
    /// other write to it comes in between.
    CompareAndWrite(BlockRange),
    /// Copy each first one of two ranges of the [`RangeList`] to the second one, in turn.
    Copy {
        /// What the initiator calls it.
        name: Option<u8>,
    },
    /// [`BlockOp::Flush`] when every write of the disk that is at the device has ended.
    DrainAndFlush,
    /// Fill the data segments with the serial number of the disk.
    DeviceId,
}

/// What the blocks of a [`BlockOp::Verify`] should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// Readable.
    Nothing,
    /// What the data segments say.
    Data,
    /// Each what the one block of the data segments says.
    Block,
}

/// How a request ended, as far as a guest may know.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BlockStatus {
    /// Carried out.
    Ok,
    /// Refused or failed; nothing is promised about the blocks of a failed write.
    IoError,
    /// The device does not know this request.
    Unsupported,
}

/// What a disk looks like to its guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    block_shift: u32,
    blocks: u64,
    /// What every request asks for: the size in sectors, and the sectors of a block as a power of two.
    sectors: u64,
    sector_shift: u32,
    /// What is 0 of a sector, and of a length in bytes, that is one of whole blocks.
    sector_mask: u64,
    byte_mask: u32,
    read_only: bool,
}

impl Geometry {
    /// A disk of `blocks` blocks of `1 << block_shift` bytes. `None` unless a block has 512 bytes to 64 KiB and
    /// the size in bytes fits 64 bits: with both, no arithmetic on a checked range can wrap.
    pub fn new(block_shift: u32, blocks: u64, read_only: bool) -> Option<Self> {
        let fits = (9..=16).contains(&block_shift) && blocks <= u64::MAX >> block_shift;
        fits.then(|| Self {
            block_shift,
            blocks,
            sectors: blocks << (block_shift - 9),
            sector_shift: block_shift - 9,
            sector_mask: (1 << (block_shift - 9)) - 1,
            byte_mask: (1 << block_shift) - 1,
            read_only,
        })
    }

    /// The same disk, whether it may be written or not.
    #[must_use]
    pub const fn with_read_only(self, read_only: bool) -> Self {
        Self { read_only, ..self }
    }

    /// The same disk with so many blocks; `None` as of [`Self::new`].
    #[must_use]
    pub fn with_blocks(self, blocks: u64) -> Option<Self> {
        Self::new(self.block_shift, blocks, self.read_only)
    }

    /// The block size as a power of two: 9 for 512 bytes, 12 for 4096.
    pub const fn block_shift(&self) -> u32 {
        self.block_shift
    }

    /// The block size in bytes.
    pub const fn block_bytes(&self) -> u32 {
        1 << self.block_shift
    }

    /// The number of blocks.
    pub const fn blocks(&self) -> u64 {
        self.blocks
    }

    /// The size in the 512-byte sectors virtio counts in, whatever the block size.
    pub const fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Sectors of a block as a power of two: 0 for blocks of 512 bytes, 3 for 4096.
    pub const fn sector_shift(&self) -> u32 {
        self.sector_shift
    }

    /// What is 0 of a sector, and of a length in bytes, that is one of whole blocks.
    pub const fn part_masks(&self) -> (u64, u32) {
        (self.sector_mask, self.byte_mask)
    }

    /// Whether the guest may change nothing.
    pub const fn read_only(&self) -> bool {
        self.read_only
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_zeroes_based_outside_sixteen_bits_is_refused() {
        assert_eq!(BlockCount::new(0).to_zeroes_based(), None);
        assert_eq!(BlockCount::new(1).to_zeroes_based(), Some(0));
        assert_eq!(BlockCount::new(65536).to_zeroes_based(), Some(u16::MAX));
        assert_eq!(BlockCount::new(65537).to_zeroes_based(), None);
    }

    #[test]
    fn geometry_that_exceeds_64_bits_of_bytes_is_refused() {
        assert!(Geometry::new(9, 1 << 54, false).is_some());
        assert!(Geometry::new(9, 1 << 55, false).is_none());
        assert!(Geometry::new(12, 1 << 52, false).is_none());
        assert!(Geometry::new(8, 1, false).is_none());
        assert_eq!(Geometry::new(12, 10, false).map(|g| g.sectors()), Some(80));
    }

    #[test]
    fn range_list_when_full_refuses_and_keeps_what_it_has() {
        let mut list = RangeList::new();
        let range = BlockRange::new(Lba::new(7), BlockCount::new(8));
        for _ in 0..MAX_RANGES {
            assert!(list.push(range));
        }
        assert!(!list.push(range));
        assert_eq!(list.as_slice().len(), MAX_RANGES);
        list.clear();
        assert!(list.as_slice().is_empty());
    }
}
