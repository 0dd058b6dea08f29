//! A split ring's words and indices (virtio 1.2, 2.7): the part of a [`Virtqueue`](super::virtqueue::Virtqueue) that the
//! other layout does differently. What a chain means, and which heads are in flight, is settled elsewhere.

use super::chain::{
    AcceptThree, Chain, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, DescriptorTable,
    Entry, Layout, ThreeEntries,
};
use super::memory::{Gpa, MainRegion};
use super::shared::{AtomicU16, AtomicU32};
use super::virtqueue::{
    HeadIndex, Heads, Ring, RingError, VirtqueueConfig, avail_acquire, used_release,
};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

/// Virtio 1.2, 2.7.6 and 2.7.8.
pub(super) const AVAIL_F_NO_INTERRUPT: u16 = 1;
pub(super) const USED_F_NO_NOTIFY: u16 = 1;

#[inline]
const fn flags_of(entry: Entry) -> u16 {
    (entry.upper & 0xffff) as u16
}

/// Entries name their successor; a chain's head is where it starts.
#[derive(Debug)]
pub(super) struct SplitLayout;

impl Layout for SplitLayout {
    const CONSECUTIVE: bool = false;

    #[inline]
    fn in_ring([address, rest]: [u64; 2], _: u16, _: u16) -> Descriptor {
        Descriptor {
            gpa: Gpa(address),
            len: (rest & 0xffff_ffff) as u32,
            flags: ((rest >> 32) & 0xffff) as u16,
            next: (rest >> 48) as u16,
            id: 0,
        }
    }

    #[inline]
    fn in_table(words: [u64; 2], index: u16, count: u16) -> Descriptor {
        Self::in_ring(words, index, count)
    }

    /// Flags and successors at once: 0 -> 1 -> 2, as drivers fill tables.
    #[inline(always)]
    fn three_in_table([first, second, third]: [Entry; 3]) -> Option<ThreeEntries> {
        let write = u32::from(DESC_F_WRITE);
        let next = |successor: u32| u32::from(DESC_F_NEXT) | successor << 16;
        let sound = first.upper == next(1)
            && second.upper & !write == next(2)
            && third.upper & 0xffff == write;
        sound.then_some(ThreeEntries {
            first,
            second,
            third,
            writable: second.upper & write != 0,
        })
    }
}

/// Where the device has got to in a split ring.
#[derive(Debug)]
#[repr(C)]
pub(super) struct SplitRing {
    descriptors: DescriptorTable,
    avail: NonNull<AtomicU16>,
    used: NonNull<u8>,
    /// Queue size - 1.
    mask: u16,
    /// The next avail entry to take.
    next_avail: u16,
    /// The avail index read last: entries before it may be taken.
    seen_avail: u16,
    /// The next used entry to fill.
    next_used: u16,
    /// The used index the guest can see.
    published_used: u16,
    /// The used index at the last decision about a signal.
    decided_used: u16,
    /// Where the two indices stood when the queue was taken over.
    first_avail: u16,
    first_used: u16,
    event_idx: bool,
}

impl SplitRing {
    /// # Safety
    /// As of `Virtqueue::new`, which has checked size and alignment.
    pub(super) unsafe fn new(config: &VirtqueueConfig) -> SplitRing {
        // SAFETY: `size` descriptors are mapped there (contract), aligned to 16 (checked).
        let descriptors =
            unsafe { DescriptorTable::new(config.descriptor_table.cast(), config.size) };
        SplitRing {
            descriptors,
            avail: config.avail.cast(),
            used: config.used,
            mask: config.size - 1,
            next_avail: config.next_avail,
            seen_avail: config.next_avail,
            next_used: config.next_used,
            published_used: config.next_used,
            decided_used: config.next_used,
            first_avail: config.next_avail,
            first_used: config.next_used,
            event_idx: config.event_idx,
        }
    }

    /// Word `index` of the avail ring: 0 flags, 1 index, 2.. entries, 2 + size used_event.
    #[inline]
    fn avail_word(&self, index: usize) -> &AtomicU16 {
        debug_assert!(index <= usize::from(self.mask) + 3);
        // SAFETY: callers pass at most 2 + size, and the ring is `6 + 2 * size` mapped, aligned bytes (`new`).
        unsafe { self.avail.add(index).as_ref() }
    }

    /// The 16-bit word at byte `offset` of the used ring: 0 flags, 2 index, 4 + 8 * size avail_event.
    #[inline]
    fn used_word(&self, offset: usize) -> &AtomicU16 {
        debug_assert!(offset.is_multiple_of(2) && offset <= 4 + 8 * (usize::from(self.mask) + 1));
        // SAFETY: callers pass even offsets up to 4 + 8 * size, and the ring is `6 + 8 * size` mapped bytes,
        // aligned to 4 (`new`).
        unsafe { self.used.add(offset).cast().as_ref() }
    }

    /// The same as [`SplitLayout::three_in_table`] of descriptors in the ring, which may be anywhere.
    #[inline]
    fn three_in_ring(&self, first: Entry) -> Option<ThreeEntries> {
        let following = |entry: Entry| self.descriptors.entry((entry.upper >> 16) as u16);
        if flags_of(first) != DESC_F_NEXT {
            return None;
        }
        let second = following(first)?;
        if flags_of(second) & !DESC_F_WRITE != DESC_F_NEXT {
            return None;
        }
        let third = following(second)?;
        (flags_of(third) == DESC_F_WRITE).then_some(ThreeEntries {
            first,
            second,
            third,
            writable: flags_of(second) & DESC_F_WRITE != 0,
        })
    }

    /// Brings the indirect table of the request behind the next one near while that one is worked on. What is read here is
    /// a hint; what counts is read, once, when it is taken (I6).
    #[inline(always)]
    fn prefetch<const N: usize>(&self, memory: &MainRegion<N>) {
        let following = self.next_avail.wrapping_add(1);
        if following != self.seen_avail {
            let slot = usize::from(following & self.mask);
            let head = u16::from_le(self.avail_word(2 + slot).load(Relaxed));
            if let Some(table) = self.descriptors.address(head) {
                memory.prefetch(Gpa(table));
            }
        }
    }
}

impl Ring for SplitRing {
    type Layout = SplitLayout;

    fn size(&self) -> u16 {
        self.mask + 1
    }

    fn base(&self) -> u32 {
        u32::from(self.next_avail)
    }

    fn in_flight(&self) -> u16 {
        let taken = self.next_avail.wrapping_sub(self.first_avail);
        let returned = self.next_used.wrapping_sub(self.first_used);
        taken.wrapping_sub(returned)
    }

    fn table(&self) -> DescriptorTable {
        self.descriptors
    }

    #[inline(always)]
    fn has_request(&self) -> bool {
        // Relaxed: a hint. `available` reads it again.
        u16::from_le(self.avail_word(1).load(Relaxed)) != self.next_avail
    }

    #[inline]
    fn available(&mut self) -> Result<u16, RingError> {
        // Acquire pairs with the guest's release of avail.idx: the entries, descriptors and buffers behind it
        // are read after it.
        let index = u16::from_le(self.avail_word(1).load(avail_acquire()));
        let size = self.mask + 1;
        let waiting = self.seen_avail.wrapping_sub(self.next_avail);
        let fresh = index.wrapping_sub(self.seen_avail);
        // `waiting <= size` holds since the last turn, so a backward step, huge as a wrapped distance, fails too.
        if fresh > size - waiting {
            return Err(RingError::AvailIndex {
                index,
                seen: self.seen_avail,
                next: self.next_avail,
                size,
            });
        }
        self.seen_avail = index;
        Ok(waiting + fresh)
    }

    #[inline]
    fn first(&mut self, heads: &Heads) -> Result<Option<(u16, Descriptor)>, RingError> {
        if self.next_avail == self.seen_avail {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail_word(2 + slot).load(Relaxed));
        let Some(words) = self.descriptors.read(head) else {
            let size = self.mask + 1;
            return Err(RingError::HeadOutOfRange { head, size });
        };
        if heads.in_flight(head) {
            return Err(RingError::DuplicateHead { head });
        }
        Ok(Some((head, SplitLayout::in_ring(words, head, 0))))
    }

    #[inline(always)]
    fn three<const N: usize, A: AcceptThree>(
        &mut self,
        indirect: bool,
        heads: &mut Heads,
        memory: &MainRegion<N>,
        accept: A,
    ) -> Option<A::Accepted> {
        if self.next_avail == self.seen_avail {
            return None;
        }
        let slot = usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail_word(2 + slot).load(Relaxed));
        let first = self.descriptors.entry(head)?;
        if heads.in_flight(head) {
            return None;
        }
        self.prefetch(memory);
        let entries = if flags_of(first) == DESC_F_INDIRECT && indirect {
            SplitLayout::three_in_table(DescriptorTable::three_of(first, memory)?)?
        } else {
            self.three_in_ring(first)?
        };
        let accepted = accept.accept(HeadIndex::new(head), entries)?;
        heads.take(head, 1);
        self.next_avail = self.next_avail.wrapping_add(1);
        Some(accepted)
    }

    #[inline]
    fn take(&mut self, at: u16, _chain: &Chain, heads: &mut Heads) -> Result<u16, RingError> {
        // One avail entry, whatever it led to; the head was checked in `first`.
        heads.take(at, 1);
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(at)
    }

    #[inline]
    fn push_used(&mut self, head: u16, _entries: u16, len: u32) {
        let slot = usize::from(self.next_used & self.mask);
        // SAFETY: `slot < size`, so the 8 bytes at 4 + 8 * slot lie in the `6 + 8 * size` mapped bytes; the ring
        // is aligned to 4 (`new`). At most `size` heads are in flight, so no entry is overwritten that the
        // guest did not yet give the head of to us again.
        let [id, written] = unsafe {
            let element = self.used.add(4 + 8 * slot).cast::<AtomicU32>();
            [element.as_ref(), element.add(1).as_ref()]
        };
        // Relaxed: the release in `publish_used` makes both visible together with the index.
        id.store(u32::from(head).to_le(), Relaxed);
        written.store(len.to_le(), Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    #[inline]
    fn publish_used(&mut self) {
        if self.next_used != self.published_used {
            // Release pairs with the guest's acquire of used.idx: data, status and used elements come before it.
            self.used_word(2)
                .store(self.next_used.to_le(), used_release());
            self.published_used = self.next_used;
        }
    }

    #[inline]
    fn decide(&mut self) -> u16 {
        let fresh = self.published_used.wrapping_sub(self.decided_used);
        self.decided_used = self.published_used;
        fresh
    }

    #[inline]
    fn wants_signal(&self, fresh: u16) -> bool {
        if self.event_idx {
            let used_event = self.avail_word(usize::from(self.mask) + 3).load(Relaxed);
            // Virtio 1.2, 2.7.10: the guest asked for the entry `used_event`; was it among the fresh ones?
            let past_event = self
                .published_used
                .wrapping_sub(u16::from_le(used_event))
                .wrapping_sub(1);
            past_event < fresh
        } else {
            u16::from_le(self.avail_word(0).load(Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// With EVENT_IDX a guest kicks when it passes `avail_event`; behind its index by one it is passed once in
    /// 65536 requests, and that kick is as harmless as any.
    fn suppress_kicks(&mut self) {
        if self.event_idx {
            let event = self.next_avail.wrapping_sub(1);
            self.used_word(4 + 8 * (usize::from(self.mask) + 1))
                .store(event.to_le(), Relaxed);
        } else {
            self.used_word(0).store(USED_F_NO_NOTIFY.to_le(), Relaxed);
        }
    }

    /// With EVENT_IDX a guest kicks when it passes `avail_event`: at the entry that we would take next.
    fn request_kicks(&mut self) {
        if self.event_idx {
            self.used_word(4 + 8 * (usize::from(self.mask) + 1))
                .store(self.next_avail.to_le(), Relaxed);
        } else {
            self.used_word(0).store(0, Relaxed);
        }
    }
}
