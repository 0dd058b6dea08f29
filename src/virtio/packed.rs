//! A packed ring's words and positions (virtio 1.2, 2.8): the part of a [`Virtqueue`](super::virtqueue::Virtqueue) that
//! the other layout does differently. What a chain means, and which heads are in flight, is settled elsewhere.
//!
//! One ring of descriptors serves both ways. The guest fills the next ones of it, the device writes used ones over them,
//! in the order in which requests end; each side goes round it on its own, and the AVAIL and USED bits of an entry say,
//! against the lap that a side is in, whose it is. A buffer id names a request on its way back; the guest steps over as
//! many entries as the request took, so the device does too, and remembers how many by id.
//!
//! Nothing that the guest writes moves our positions: an entry that no lap accounts for is simply not available, and a
//! chain that takes entries which are still out stops the ring.

use super::chain::{
    AcceptThree, Chain, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, Descriptor, DescriptorTable,
    Entry, Layout, RingPart, ThreeEntries,
};
use super::memory::{Gpa, MainRegion};
use super::shared::AtomicU32;
use super::virtqueue::{
    HeadIndex, Heads, Ring, RingError, VirtqueueConfig, avail_acquire, used_release,
};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed};

/// Virtio 1.2, 2.8.1 "Driver and Device Ring Wrap Counters".
const DESC_F_AVAIL: u16 = 1 << 7;
const DESC_F_USED: u16 = 1 << 15;
/// What of an entry's flags says whose it is.
const LAP: u16 = DESC_F_AVAIL | DESC_F_USED;
/// Virtio 1.2, 2.8.10 "Event Suppression Structure Format": the flags, in the upper half of the structure.
const EVENT_ENABLE: u32 = 0;
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;
const EVENT_FLAGS_SHIFT: u32 = 16;
/// The wrap counter beside a position.
const WRAP: u16 = 1 << 15;

/// Entries of a chain follow one another, in the ring and in a table; the last one in the ring has the head.
#[derive(Debug)]
pub(super) struct PackedLayout;

/// Address, length, id and flags of an entry.
#[inline]
fn fields([address, rest]: [u64; 2]) -> Descriptor {
    Descriptor {
        gpa: Gpa(address),
        len: (rest & 0xffff_ffff) as u32,
        flags: flags_of(rest),
        next: 0,
        id: ((rest >> 32) & 0xffff) as u16,
    }
}

#[inline]
const fn flags_of(rest: u64) -> u16 {
    (rest >> 48) as u16
}

impl Layout for PackedLayout {
    const CONSECUTIVE: bool = true;

    #[inline]
    fn in_ring(words: [u64; 2], index: u16, count: u16) -> Descriptor {
        let entry = fields(words);
        Descriptor {
            flags: entry.flags & !LAP,
            next: if index + 1 < count { index + 1 } else { 0 },
            ..entry
        }
    }

    /// Virtio 1.2, 2.8.8: in a table only WRITE means anything; the table's length ends the chain. INDIRECT is kept, since
    /// no driver may set it there.
    #[inline]
    fn in_table(words: [u64; 2], index: u16, count: u16) -> Descriptor {
        let entry = fields(words);
        let next = index.saturating_add(1);
        let more = if next < count { DESC_F_NEXT } else { 0 };
        Descriptor {
            flags: entry.flags & (DESC_F_WRITE | DESC_F_INDIRECT) | more,
            next,
            ..entry
        }
    }

    #[inline(always)]
    fn three_in_table([first, second, third]: [Entry; 3]) -> Option<ThreeEntries> {
        let flags = |entry: Entry| entry.flags() & (DESC_F_WRITE | DESC_F_INDIRECT);
        let sound =
            flags(first) == 0 && flags(second) & !DESC_F_WRITE == 0 && flags(third) == DESC_F_WRITE;
        sound.then_some(ThreeEntries {
            first,
            second,
            third,
            writable: flags(second) != 0,
        })
    }
}

impl Entry {
    /// Of a packed ring.
    #[inline]
    const fn flags(self) -> u16 {
        (self.upper >> 16) as u16
    }

    /// Of a packed ring.
    #[inline]
    const fn id(self) -> u16 {
        (self.upper & 0xffff) as u16
    }
}

/// A place in the ring, and the wrap counter of the lap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Position {
    index: u16,
    wrap: bool,
}

impl Position {
    const fn from_bits(bits: u16) -> Position {
        Position {
            index: bits & !WRAP,
            wrap: bits & WRAP != 0,
        }
    }

    #[inline]
    const fn bits(self) -> u16 {
        self.index | if self.wrap { WRAP } else { 0 }
    }

    /// `entries` further on, at most a lap.
    #[inline]
    const fn advanced(self, entries: u16, size: u16) -> Position {
        // No position of a ring of at most 32768 entries wraps 16 bits before it is reduced.
        let index = self.index.wrapping_add(entries);
        if index < size {
            return Position {
                index,
                wrap: self.wrap,
            };
        }
        Position {
            index: index - size,
            wrap: !self.wrap,
        }
    }

    /// Whether the guest made the entry with these flags available in this lap.
    #[inline]
    const fn is_available(self, flags: u16) -> bool {
        let avail = flags & DESC_F_AVAIL != 0;
        let used = flags & DESC_F_USED != 0;
        avail == self.wrap && used != self.wrap
    }
}

/// Where the device has got to in a packed ring.
#[derive(Debug)]
#[repr(C)]
pub(super) struct PackedRing {
    descriptors: DescriptorTable,
    /// The driver's event suppression structure.
    driver_event: NonNull<AtomicU32>,
    /// Ours.
    device_event: NonNull<AtomicU32>,
    /// The next entry to take.
    avail: Position,
    /// The next entry to write a used one to.
    used: Position,
    /// Entries taken and not yet given back.
    out: u16,
    /// Entries given back since the last publication; their first one is still to be written.
    unpublished: u16,
    /// Entries published since the last decision about a signal.
    undecided: u16,
    /// Where the first used entry of the batch goes, and what it says.
    batch_at: u16,
    batch: u64,
    /// The upper half of our event suppression structure.
    kicks: u32,
    event_idx: bool,
}

/// A position that a front-end or a former device names; `None` outside a ring of `size`.
pub(super) const fn is_position(bits: u16, size: u16) -> bool {
    Position::from_bits(bits).index < size
}

impl PackedRing {
    /// # Safety
    /// As of `Virtqueue::new`, which has checked size, positions and alignment.
    pub(super) unsafe fn new(config: &VirtqueueConfig) -> PackedRing {
        // SAFETY: `size` descriptors are mapped there (contract), aligned to 16 (checked).
        let descriptors =
            unsafe { DescriptorTable::new(config.descriptor_table.cast(), config.size) };
        let at = Position::from_bits(config.next_avail);
        PackedRing {
            descriptors,
            driver_event: config.avail.cast(),
            device_event: config.used.cast(),
            avail: at,
            used: at,
            out: 0,
            unpublished: 0,
            undecided: 0,
            batch_at: 0,
            batch: 0,
            kicks: 0,
            event_idx: config.event_idx,
        }
    }

    /// Where the device before us stood, from the structure that only devices write: see `publish_used`. `None` unless
    /// a device left it there and the entries around that place bear it out, so that a ring which its driver cleared
    /// is not taken for an old one.
    pub(super) fn left_at(&self) -> Option<u16> {
        // SAFETY: 4 mapped bytes, aligned to 4 (`new`).
        let event = u32::from_le(unsafe { self.device_event.as_ref() }.load(Acquire));
        let bits = (event & 0xffff) as u16;
        let (at, size) = (Position::from_bits(bits), self.size());
        let flags = event >> EVENT_FLAGS_SHIFT;
        // A driver's zeroes look like a device at entry 0 that slept: what the ring says tells them apart.
        if (flags != EVENT_DISABLE && flags != EVENT_ENABLE) || at.index >= size {
            return None;
        }
        let flags = |index| {
            flags_of(u64::from_le(
                self.descriptors.control_word(index).load(Relaxed),
            ))
        };
        // The entry before is of the lap that it was last filled in: this one, or the one before for the last entry.
        let (before, lap) = match at.index {
            0 => (size - 1, !at.wrap),
            index => (index - 1, at.wrap),
        };
        let filled = (flags(before) & DESC_F_AVAIL != 0) == lap;
        // The entry itself is either older or waits to be taken; it was not used in this lap.
        let here = flags(at.index);
        let used = [DESC_F_AVAIL, DESC_F_USED].map(|bit| (here & bit != 0) == at.wrap);
        (filled && used != [true; 2]).then_some(bits)
    }

    /// The same as [`PackedLayout::three_in_table`] of three entries in the ring.
    #[inline]
    fn three_in_ring(&self, first: Entry) -> Option<ThreeEntries> {
        let flags = |entry: Entry| entry.flags() & !LAP;
        let entry = |ahead| {
            let at = self.avail.advanced(ahead, self.size());
            self.descriptors.entry(at.index)
        };
        if flags(first) != DESC_F_NEXT {
            return None;
        }
        let (second, third) = (entry(1)?, entry(2)?);
        let sound = flags(second) & !DESC_F_WRITE == DESC_F_NEXT && flags(third) == DESC_F_WRITE;
        sound.then_some(ThreeEntries {
            first,
            second,
            third,
            writable: flags(second) & DESC_F_WRITE != 0,
        })
    }

    /// The guest's structure, read at once: position and flags belong together.
    #[inline]
    fn driver_event(&self) -> (Position, u32) {
        // SAFETY: 4 mapped bytes, aligned to 4 (`new`).
        let event = u32::from_le(unsafe { self.driver_event.as_ref() }.load(Relaxed));
        let position = Position::from_bits((event & 0xffff) as u16);
        // The upper 14 bits are reserved.
        (position, event >> EVENT_FLAGS_SHIFT & 3)
    }

    #[inline]
    fn write_device_event(&self) {
        let event = u32::from(self.used.bits()) | self.kicks << EVENT_FLAGS_SHIFT;
        // SAFETY: 4 mapped bytes, aligned to 4 (`new`).
        unsafe { self.device_event.as_ref() }.store(event.to_le(), Relaxed);
    }
}

impl Ring for PackedRing {
    type Layout = PackedLayout;

    fn size(&self) -> u16 {
        self.descriptors.count()
    }

    fn base(&self) -> u32 {
        u32::from(self.avail.bits()) | u32::from(self.used.bits()) << 16
    }

    fn in_flight(&self) -> u16 {
        self.out
    }

    fn table(&self) -> DescriptorTable {
        self.descriptors
    }

    #[inline(always)]
    fn has_request(&self) -> bool {
        // Relaxed: a hint. `first` reads it again.
        let word = self.descriptors.control_word(self.avail.index);
        self.avail
            .is_available(flags_of(u64::from_le(word.load(Relaxed))))
    }

    /// Only whether there is one is known: how many descriptors each has, the walks find out.
    #[inline]
    fn available(&mut self) -> Result<u16, RingError> {
        Ok(match self.has_request() {
            true => self.size() - self.out,
            false => 0,
        })
    }

    #[inline]
    fn first(&mut self, _heads: &Heads) -> Result<Option<(u16, Descriptor)>, RingError> {
        let index = self.avail.index;
        // Acquire pairs with the guest's release of the flags of a chain's first descriptor, which it writes last: the
        // rest of it, the other descriptors and the buffers are read after it.
        let rest = u64::from_le(self.descriptors.control_word(index).load(avail_acquire()));
        if !self.avail.is_available(flags_of(rest)) {
            return Ok(None);
        }
        // The address is the other word; the one that was just read is not read again (I6).
        let Some(address) = self.descriptors.address(index) else {
            return Ok(None);
        };
        let first = PackedLayout::in_ring([address, rest], index, self.size());
        Ok(Some((index, first)))
    }

    #[inline(always)]
    fn three<const N: usize, A: AcceptThree>(
        &mut self,
        indirect: bool,
        heads: &mut Heads,
        memory: &MainRegion<N>,
        accept: A,
    ) -> Option<A::Accepted> {
        let index = self.avail.index;
        // As in `first`.
        let rest = u64::from_le(self.descriptors.control_word(index).load(avail_acquire()));
        if !self.avail.is_available(flags_of(rest)) {
            return None;
        }
        let first = Entry {
            gpa: Gpa(self.descriptors.address(index)?),
            len: (rest & 0xffff_ffff) as u32,
            upper: (rest >> 32) as u32,
        };
        let size = self.size();
        let (three, head, entries) = if first.flags() & !LAP == DESC_F_INDIRECT && indirect {
            let table = DescriptorTable::three_of(first, memory)?;
            (PackedLayout::three_in_table(table)?, first.id(), 1)
        } else {
            let three = self.three_in_ring(first)?;
            (three, three.third.id(), 3)
        };
        if head >= size || heads.in_flight(head) || entries > size - self.out {
            return None;
        }
        let accepted = accept.accept(HeadIndex::new(head), three)?;
        heads.take(head, entries);
        self.out += entries;
        self.avail = self.avail.advanced(entries, size);
        Some(accepted)
    }

    #[inline]
    fn take(&mut self, at: u16, chain: &Chain, heads: &mut Heads) -> Result<u16, RingError> {
        let RingPart { head, entries } = chain.ring_part();
        let size = self.size();
        if head >= size {
            return Err(RingError::HeadOutOfRange { head, size });
        }
        if heads.in_flight(head) {
            return Err(RingError::DuplicateHead { head });
        }
        if entries > size - self.out {
            return Err(RingError::EndlessChain { at });
        }
        heads.take(head, entries);
        self.out += entries;
        self.avail = self.avail.advanced(entries, size);
        Ok(head)
    }

    // By itself: inlined beside the other layout it would cost that one registers.
    #[inline(never)]
    fn push_used(&mut self, head: u16, entries: u16, len: u32) {
        let lap = if self.used.wrap { LAP } else { 0 };
        // Virtio 1.2, 2.8.2: WRITE says that anything was written.
        let flags = lap | if len > 0 { DESC_F_WRITE } else { 0 };
        let word = u64::from(len) | u64::from(head) << 32 | u64::from(flags) << 48;
        if self.unpublished == 0 {
            // The guest stops at it, so that it sees the batch at once and not entry by entry.
            (self.batch_at, self.batch) = (self.used.index, word);
        } else {
            // Relaxed: the release of the batch's first entry, which the guest reads before, covers it. At most the
            // entries that were taken are overwritten: as many as are given back.
            self.descriptors
                .control_word(self.used.index)
                .store(word.to_le(), Relaxed);
        }
        // No wrapping: every head gives back what it took.
        self.out -= entries;
        // A guest that makes entries available which are still out may see several laps of them between two publications.
        self.unpublished = self.unpublished.saturating_add(entries);
        self.used = self.used.advanced(entries, self.size());
    }

    #[inline]
    fn publish_used(&mut self) {
        if self.unpublished == 0 {
            return;
        }
        // Release pairs with the guest's acquire of the flags: data, status, and the other used entries come before it.
        self.descriptors
            .control_word(self.batch_at)
            .store(self.batch.to_le(), used_release());
        // More than a lap without a decision is as good as a lap: whatever the guest waits for was passed.
        self.undecided = self.undecided.saturating_add(self.unpublished);
        self.unpublished = 0;
        // While kicks are disabled, or enabled for any request, the position beside the flags says nothing to the guest. It tells the next device
        // where this one stood, as the used index of a split ring does: packed rings have nothing else that does.
        self.write_device_event();
    }

    #[inline]
    fn decide(&mut self) -> u16 {
        std::mem::take(&mut self.undecided)
    }

    #[inline]
    fn wants_signal(&self, fresh: u16) -> bool {
        let (event, flags) = self.driver_event();
        match flags {
            EVENT_DISABLE => false,
            EVENT_DESC if self.event_idx => {
                // Virtio 1.2, 2.8.10: the guest asked for the entry at `event`; was it among the fresh ones? How far it
                // lies behind us, in entries; a position ahead of us, or nonsense, is far more than a lap.
                let lap = if event.wrap == self.used.wrap {
                    0
                } else {
                    self.size()
                };
                let behind = self
                    .used
                    .index
                    .wrapping_add(lap)
                    .wrapping_sub(event.index)
                    .wrapping_sub(1);
                behind < fresh
            }
            // 3 is reserved, and so is a position that was not negotiated: one signal too many.
            _ => true,
        }
    }

    fn suppress_kicks(&mut self) {
        self.kicks = EVENT_DISABLE;
        self.write_device_event();
    }

    /// At any request, with EVENT_IDX too: then the position beside the flags goes on saying where we stand, as it does
    /// while kicks are disabled (`publish_used`).
    fn request_kicks(&mut self) {
        self.kicks = EVENT_ENABLE;
        self.write_device_event();
    }
}
