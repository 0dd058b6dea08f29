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
    /// How many are neither free nor outstanding: see [`Slots::keep`].
    kept_count: u16,
    /// What a slot is that is taken now. Its era is the time, in units of whoever calls [`Slots::next_era`].
    fresh: Slot,
}

/// What one identifier is used for, in one word. While it is free, the free one behind it (bits 15:0; [`NONE`] behind the
/// last). While it is outstanding, how often it was sent (bits 23:16, never 0) and in which era it was taken (15:0).
#[derive(Clone, Copy, Debug)]
struct Slot(u32);

/// No slot: there are at most 1023.
const NONE: u16 = u16::MAX;
/// What stands behind one that is kept: no slot either.
const KEPT: u16 = NONE - 1;
const ATTEMPTS_SHIFT: u32 = 16;

impl Slot {
    fn free(next: u16) -> Slot {
        Slot(u32::from(next))
    }

    fn outstanding(attempts: u8, era: u16) -> Slot {
        Slot(u32::from(attempts) << ATTEMPTS_SHIFT | u32::from(era))
    }

    /// 0 while it is free.
    #[inline]
    fn attempts(self) -> u32 {
        self.0 >> ATTEMPTS_SHIFT
    }

    /// The free slot behind it, or the era that it was taken in.
    #[inline]
    fn low(self) -> u16 {
        (self.0 & 0xffff) as u16
    }
}

impl Slots {
    pub(crate) fn new(count: u16) -> Slots {
        Slots {
            slots: (1..count).chain([NONE]).map(Slot::free).collect(),
            free: 0,
            free_count: count,
            kept_count: 0,
            fresh: Slot::outstanding(1, 0),
        }
    }

    #[inline]
    pub(crate) fn free_count(&self) -> u16 {
        self.free_count
    }

    /// Identifiers that are not free.
    #[inline]
    pub(crate) fn taken_count(&self) -> u16 {
        // No more are ever free than there are: `release` checks occupancy.
        u16::try_from(self.slots.len()).unwrap_or(u16::MAX) - self.free_count
    }

    pub(crate) fn outstanding_count(&self) -> u16 {
        // Those that are kept are not free.
        self.taken_count() - self.kept_count
    }

    /// Whether a command has this identifier.
    pub(crate) fn is_outstanding(&self, cid: Cid) -> bool {
        let slot = self.slots.get(cid.index());
        slot.is_some_and(|slot| slot.attempts() > 0)
    }

    /// No other command gets the identifier that was released last, until [`Slots::give_back`]. `false` of another one.
    pub(crate) fn keep(&mut self, cid: Cid) -> bool {
        if self.free != cid.0 || self.take().is_none() {
            return false;
        }
        self.slots[cid.index()] = Slot::free(KEPT);
        self.kept_count += 1;
        true
    }

    /// An identifier that was kept is free again. `false` of any other.
    pub(crate) fn give_back(&mut self, cid: Cid) -> bool {
        let slot = self.slots.get_mut(cid.index());
        let Some(slot) = slot.filter(|slot| slot.attempts() == 0 && slot.low() == KEPT) else {
            return false;
        };
        *slot = Slot::free(self.free);
        self.free = cid.0;
        self.free_count += 1;
        self.kept_count -= 1;
        true
    }

    /// Takes a free identifier; [`Slots::release`] gives back one that was not used after all.
    #[inline]
    pub(crate) fn take(&mut self) -> Option<Cid> {
        let cid = self.free;
        // [`NONE`] names no slot.
        let slot = self.slots.get_mut(usize::from(cid))?;
        self.free = slot.low();
        *slot = self.fresh;
        self.free_count = self.free_count.wrapping_sub(1); // not 0: there was a free one
        Some(Cid(cid))
    }

    /// The identifiers of outstanding commands.
    pub(crate) fn outstanding(&self) -> impl Iterator<Item = Cid> {
        let taken = (0_u16..).zip(&self.slots);
        taken
            .filter(|(_, slot)| slot.attempts() > 0)
            .map(|(cid, _)| Cid(cid))
    }

    /// Counts one more attempt of an outstanding command; its time starts anew. `false` when it has had `most`, or is
    /// not outstanding.
    pub(crate) fn try_again(&mut self, cid: Cid, most: u8) -> bool {
        let era = self.fresh.low();
        let slot = self.slots.get_mut(cid.index());
        let Some(slot) = slot.filter(|slot| (1..=u32::from(most)).contains(&slot.attempts()))
        else {
            return false;
        };
        // At most `most`, which has 8 bits: one more than those stays the most that there is.
        let attempts = u8::try_from(slot.attempts().saturating_add(1)).unwrap_or(u8::MAX);
        *slot = Slot::outstanding(attempts, era);
        true
    }

    /// Time goes by.
    pub(crate) fn next_era(&mut self) {
        self.fresh = Slot::outstanding(1, self.fresh.low().wrapping_add(1));
    }

    /// The outstanding command that was taken first, and how many eras ago (at most 65535).
    pub(crate) fn oldest(&self) -> Option<(Cid, u16)> {
        let age = |cid: Cid| {
            self.slots
                .get(cid.index())
                .map_or(0, |slot| self.fresh.low().wrapping_sub(slot.low()))
        };
        self.outstanding()
            .map(|cid| (cid, age(cid)))
            .max_by_key(|(_, age)| *age)
    }

    /// Frees a completed identifier. `false` when the device named one that is out of range or not outstanding (I10).
    #[inline]
    pub(crate) fn release(&mut self, cid: Cid) -> bool {
        let Some(slot) = self
            .slots
            .get_mut(cid.index())
            .filter(|slot| slot.attempts() > 0)
        else {
            return false;
        };
        *slot = Slot::free(self.free);
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
    fn kept_cid_is_neither_outstanding_nor_taken_again_before_it_is_given_back() {
        let mut slots = Slots::new(2);
        let (first, second) = (slots.take().unwrap(), slots.take().unwrap());
        assert!(!slots.keep(first), "outstanding");
        assert!(slots.release(first) && slots.release(second));
        assert!(!slots.keep(first), "another one was released last");
        assert!(slots.keep(second) && !slots.keep(second));
        assert_eq!((slots.outstanding_count(), slots.free_count()), (0, 1));
        assert!(!slots.is_outstanding(second) && !slots.release(second));
        assert_eq!(slots.take(), Some(first));
        assert_eq!(slots.take(), None);
        assert!(!slots.give_back(first), "outstanding");
        assert!(slots.give_back(second) && !slots.give_back(second));
        assert_eq!(slots.take(), Some(second));
        assert_eq!((slots.outstanding_count(), slots.free_count()), (2, 0));
    }

    #[test]
    fn oldest_is_the_command_taken_first_also_when_eras_wrap() {
        let mut slots = Slots::new(4);
        for _ in 0..u16::MAX {
            slots.next_era();
        }
        assert_eq!(slots.oldest(), None);
        let (first, second) = (slots.take().unwrap(), slots.take().unwrap());
        slots.next_era();
        slots.next_era();
        let third = slots.take().unwrap();
        assert!(slots.try_again(first, 1) && !slots.try_again(first, 1));
        slots.next_era();
        assert_eq!(slots.oldest(), Some((second, 3)));
        assert!(slots.release(second));
        let oldest = slots.oldest().unwrap();
        assert!(oldest == (first, 1) || oldest == (third, 1));
        assert!(!slots.try_again(second, 9), "not outstanding any more");
        assert_eq!(slots.outstanding().count(), 2);
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
