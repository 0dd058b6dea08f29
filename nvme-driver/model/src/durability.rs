//! What a power failure would leave behind: for tests of flush and Force Unit Access on a medium in memory.
//!
//! Every write that is not durable yet is remembered by sector, with what stood there before. A power failure keeps any
//! subset of those sectors.

use std::collections::BTreeMap;

use crate::media::Ram;

const SECTOR: usize = 512;

#[derive(Debug)]
pub(crate) struct Durability {
    /// Sectors that are not durable, by offset, with what a power failure may bring back.
    before: BTreeMap<u64, [u8; SECTOR]>,
    /// What each sector that ever was durable holds in that state; the others hold zeroes.
    shadow: BTreeMap<u64, [u8; SECTOR]>,
    rng: u64,
}

impl Durability {
    pub(crate) fn new(seed: u64) -> Durability {
        Durability {
            before: BTreeMap::new(),
            shadow: BTreeMap::new(),
            rng: seed,
        }
    }

    /// The range has just been changed.
    pub(crate) fn changed(&mut self, ram: &Ram, offset: u64, len: u64, durable: bool) {
        for sector in (offset..offset + len).step_by(SECTOR) {
            if durable {
                self.before.remove(&sector);
                self.shadow.insert(sector, read(ram, sector));
            } else {
                let held = self.shadow.get(&sector).copied().unwrap_or([0; 512]);
                self.before.entry(sector).or_insert(held);
            }
        }
    }

    pub(crate) fn flush(&mut self, ram: &Ram) {
        for sector in std::mem::take(&mut self.before).into_keys() {
            self.shadow.insert(sector, read(ram, sector));
        }
    }

    /// Puts back what stood in a random half of the sectors that were not durable. Says how many were lost.
    pub(crate) fn fail_power(&mut self, ram: &Ram) -> usize {
        let mut lost = 0;
        for (sector, held) in std::mem::take(&mut self.before) {
            self.rng = self
                .rng
                .wrapping_mul(0x5851_f42d_4c95_7f2d)
                .wrapping_add(0x1405_7b7e_f767_814f);
            if self.rng >> 63 == 0 {
                ram.write(sector, &held);
                lost += 1;
            }
            self.shadow.insert(sector, read(ram, sector));
        }
        lost
    }
}

fn read(ram: &Ram, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    // SAFETY: `at` checks the range; `bytes` is ours.
    unsafe {
        ram.at(sector, bytes.len())
            .as_ptr()
            .copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len())
    };
    bytes
}
