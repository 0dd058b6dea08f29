//! The command identifier table: which CIDs are outstanding. A CID is a slot index, never derived from the tail:
//! an SQ slot is free when its entry was *fetched*, a CID only when its command was *completed* (I3, I4).

use crate::spec::Cid;

/// Free and outstanding command identifiers of one queue.
#[derive(Debug)]
pub(crate) struct Slots {
    /// A stack of free identifiers: the most recently used one is the warmest in the cache.
    free: Box<[u16]>,
    free_count: u16,
    outstanding: Box<[bool]>,
}

impl Slots {
    pub(crate) fn new(count: u16) -> Slots {
        Slots {
            free: (0..count).rev().collect(),
            free_count: count,
            outstanding: vec![false; usize::from(count)].into_boxed_slice(),
        }
    }

    #[inline]
    pub(crate) fn free_count(&self) -> u16 {
        self.free_count
    }

    pub(crate) fn outstanding_count(&self) -> u16 {
        // `free` never holds more than it was made with: `release` checks occupancy.
        u16::try_from(self.outstanding.len()).unwrap_or(u16::MAX) - self.free_count
    }

    #[inline]
    pub(crate) fn next_free(&self) -> Option<Cid> {
        let top = self.free_count.checked_sub(1)?;
        self.free.get(usize::from(top)).copied().map(Cid)
    }

    /// Takes the identifier that `next_free` showed.
    #[inline]
    pub(crate) fn take(&mut self, cid: Cid) {
        debug_assert_eq!(self.next_free(), Some(cid));
        self.free_count = self.free_count.wrapping_sub(1); // not 0: `next_free` showed one
        self.outstanding[cid.index()] = true;
    }

    /// Frees a completed identifier. `false` when the device named one that is out of range or not outstanding (I10).
    #[inline]
    pub(crate) fn release(&mut self, cid: Cid) -> bool {
        match self.outstanding.get_mut(cid.index()) {
            Some(outstanding) if *outstanding => *outstanding = false,
            _ => return false,
        }
        // An outstanding identifier was taken off the stack, so there is room for it.
        self.free[usize::from(self.free_count)] = cid.0;
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
        let cid = slots.next_free().unwrap();
        slots.take(cid);
        assert!(slots.release(cid));
        assert!(!slots.release(cid), "a second completion of one command");
        assert_eq!(slots.free_count(), 2);
    }

    #[test]
    fn take_of_all_slots_gives_each_cid_once() {
        let mut slots = Slots::new(3);
        let mut seen: Vec<u16> = Vec::new();
        while let Some(cid) = slots.next_free() {
            slots.take(cid);
            seen.push(cid.0);
        }
        seen.sort_unstable();
        assert_eq!(seen, [0, 1, 2]);
        assert_eq!(slots.outstanding_count(), 3);
    }
}
