//! The short way of what initiators send most: a read or write of a logical unit that asks for nothing else. Whatever else a
//! command is, or may not be, [`Nexus::execute`](super::Nexus::execute) knows; the two agree where both have an answer.

use std::sync::Arc;

use super::attention::Conditions;
use super::unit::Shared;
use crate::block::{BlockCount, BlockRange, Geometry, Lba};

/// A logical unit as one initiator reads and writes it.
#[derive(Clone, Debug)]
pub struct PlainUnit {
    conditions: Arc<Conditions>,
    shared: Arc<Shared>,
    geometry: Geometry,
}

/// What is looked at of the first 8 bytes of a CDB of 10 bytes, and of one of 16. The rest says which blocks, or changes
/// nothing: DPO, FUA of a read, the group number.
const SEEN_10: u64 = SEEN_16 | (0xff & !GROUP) << 8;
const SEEN_16: u64 = 0xff << 56 | (0xff & !(DPO | FUA)) << 48;
const DPO: u64 = 0x10;
const FUA: u64 = 0x08;
const GROUP: u64 = 0x1f;

impl PlainUnit {
    pub(super) fn new(
        conditions: &Arc<Conditions>,
        shared: &Arc<Shared>,
        geometry: Geometry,
    ) -> PlainUnit {
        PlainUnit {
            conditions: Arc::clone(conditions),
            shared: Arc::clone(shared),
            geometry,
        }
    }

    /// The block size as a power of two.
    #[inline(always)]
    #[must_use]
    pub fn block_shift(&self) -> u32 {
        self.geometry.block_shift()
    }

    /// The blocks that a READ or, if `write`, a WRITE (10) or (16) moves, at least one, from the first 16 bytes of its CDB.
    /// `None` of any other command, of one that asks for more than that, that is to be refused, or that has to wait.
    #[inline(always)]
    #[must_use]
    pub fn transfer(&self, cdb: [[u8; 8]; 2], write: bool) -> Option<BlockRange> {
        // Something is to be told first, or a reservation to be looked at.
        if self.conditions.any() {
            return None;
        }
        let [high, low] = cdb.map(u64::from_be_bytes);
        let writes = u64::from(write);
        let is = |opcode: u64, seen: u64| {
            // The one operation code is the other one's with bit 1; and of a write FUA is looked at.
            high & (seen | (writes * FUA) << 48) == (opcode | writes << 1) << 56
        };
        // What is left of the CDB behind its blocks: the group number of the longer one, and the control byte.
        let (lba, count, rest) = if is(0x28, SEEN_10) {
            (
                high >> 16 & 0xffff_ffff,
                (high & 0xff) << 8 | low >> 56,
                low >> 48 & 0xff,
            )
        } else if is(0x88, SEEN_16) {
            (
                high << 16 | low >> 48,
                low >> 16 & 0xffff_ffff,
                low & 0xffff & !(GROUP << 8),
            )
        } else {
            return None;
        };
        if rest != 0 || count == 0 || (write && !self.takes_plain_writes()) {
            return None;
        }
        let left = self.geometry.blocks().checked_sub(lba)?;
        // It has 32 bits.
        let count = u32::try_from(count).ok().filter(|_| count <= left)?;
        Some(BlockRange::new(Lba::new(lba), BlockCount::new(count)))
    }

    /// A write that asks for nothing may be carried out now, and is over when the device has it.
    #[inline(always)]
    fn takes_plain_writes(&self) -> bool {
        let modes = self.shared.modes();
        let kept_off = self.geometry.read_only() || modes.write_protected;
        !(kept_off || modes.write_through || self.shared.lock.holds_any())
    }
}
