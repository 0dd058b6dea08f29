//! The command identifier table: which CIDs are outstanding. A CID is a slot index, never derived from the tail:
//! an SQ slot is free when its entry was *fetched*, a CID only when its command was *completed* (I3, I4).

use crate::spec::Cid;

/// Free and outstanding command identifiers of one queue.
#[derive(Debug)]
pub(crate) struct Slots {
    slots: Box<[Slot]>,
    /// The first of the free ones: a list, the most recently used one first, since it is the warmest in the cache.
    free: u16,
    free_count: u16,
}

#[derive(Clone, Copy, Debug)]
struct Slot {
    /// The free slot behind this one, while it is free; [`NONE`] behind the last.
    next: u16,
    outstanding: bool,
}

/// No slot: there are at most 1023.
const NONE: u16 = u16::MAX;

impl Slots {
    pub(crate) fn new(count: u16) -> Slots {
        Slots {
            slots: (1..count)
                .chain([NONE])
                .map(|next| Slot {
                    next,
                    outstanding: false,
                })
                .collect(),
            free: 0,
            free_count: count,
        }
    }

    #[inline]
    pub(crate) fn free_count(&self) -> u16 {
        self.free_count
    }

    pub(crate) fn outstanding_count(&self) -> u16 {
        // No more are ever free than there are: `release` checks occupancy.
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX) - self.free_count
    }

    /// Takes a free identifier; [`Slots::release`] gives back one that was not used after all.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Cid> {
        let cid = self.free;
        // [`NONE`] names no slot.
        let slot = self.slots.get_mut(usize::from(cid))?;
        slot.outstanding = true;
        self.free = slot.next;
        self.free_count = self.free_count.wrapping_sub(1); // not 0: there was a free one
        Some(Cid(cid))
    }

    /// Frees a completed identifier. `false` when the device named one that is out of range or not outstanding (I10).
    #[inline]
    pub(crate) fn release(&mut self, cid: Cid) -> bool {
        let Some(slot) = self
            .slots
            .get_mut(cid.index())
            .filter(|slot| slot.outstanding)
        else {
            return false;
        };
        slot.outstanding = false;
        slot.next = self.free;
        self.free = cid.0;
        self.free_count = self.free_count.wrapping_add(1); // at most as many as there are
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn release_of_unknown_or_idle_cid_is_refused() {
        let mut slots = Slots::new(2);
        assert!(!slots.release(Cid(0)));
        assert!(!slots.release(Cid(2)));
        assert!(!slots.release(Cid(u16::MAX)));
        let cid = slots.take().unwrap();
        assert!(slots.release(cid));
        assert!(!slots.release(cid), "a second completion of one command");
        assert_eq!(slots.free_count(), 2);
    }

    #[test]
    fn take_of_all_slots_gives_each_cid_once() {
        let mut slots = Slots::new(3);
        let mut seen: Vec<u16> = Vec::new();
        while let Some(cid) = slots.take() {
            seen.push(cid.0);
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
        assert_eq!(slots.outstanding_count(), 3);
    }
}
