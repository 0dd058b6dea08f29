//! The driver side of a packed virtqueue (virtio 1.2, 2.8), as cheap as [`super::split`]: an I/O takes one descriptor of
//! the ring with an indirect table, two or three without; a batch is shown by the flags of its first descriptor.
//!
//! A slot is a buffer id. What all queues have in common is in [`super::slots`].

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64, fence};
use std::time::Duration;

use super::args::Interrupts;
use super::engine::{Done, Queue, SPINS};
use super::io::Io;
use super::slots::{DriverRing, INDIRECT, Memory, NEXT, RingConfig, Signals, Slots};
use super::stats::Counters;

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const LAP: u16 = AVAIL | USED;
/// Of the event suppression structures, in the upper half of the word.
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;
const WRAP: u16 = 1 << 15;

/// A place in the ring and the wrap counter of the lap.
#[derive(Clone, Copy)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    const START: Place = Place {
        index: 0,
        wrap: true,
    };

    #[inline]
    fn step(&mut self, entries: u16, size: u16) {
        self.index += entries;
        if self.index >= size {
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }

    /// What a descriptor that is made available here says.
    #[inline]
    fn available(self) -> u16 {
        if self.wrap { AVAIL } else { USED }
    }

    /// What one that was used here says.
    #[inline]
    fn used(self) -> u16 {
        if self.wrap { LAP } else { 0 }
    }
}

/// One virtqueue.
pub struct PackedRing {
    slots: Slots,
    config: RingConfig,
    descriptors: NonNull<AtomicU64>,
    driver_event: NonNull<AtomicU32>,
    device_event: NonNull<AtomicU32>,
    /// The next entry to fill.
    avail: Place,
    /// The next entry that the server marks as used.
    used: Place,
    /// The first entry since the last publication, and its second word: the server stops at it until then.
    first: Option<(u16, u64)>,
    /// Entries since then.
    added: u16,
    /// A signal was asked for at the next used entry.
    armed: bool,
    signals: Signals,
}

// SAFETY: the pointers name memory that `slots` keeps mapped, shared by design: atomics and copies only (I1).
unsafe impl Send for PackedRing {}

impl PackedRing {
    /// The two words of entry `index`.
    #[inline]
    fn entry(&self, index: u16) -> [&AtomicU64; 2] {
        assert!(index < self.config.size);
        // SAFETY: inside the ring resolved in `new` (asserted), aligned to 16.
        unsafe {
            let entry = self.descriptors.add(2 * usize::from(index));
            [entry.as_ref(), entry.add(1).as_ref()]
        }
    }

    /// Fills the next entry.
    #[inline]
    fn add(&mut self, gpa: u64, len: u32, id: u16, flags: u16) {
        let flags = flags | self.avail.available();
        let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
        let [address, word] = self.entry(self.avail.index);
        address.store(gpa.to_le(), Relaxed);
        if self.first.is_some() {
            // Relaxed: the release of the first one, which the server reads before, covers it.
            word.store(rest.to_le(), Relaxed);
        } else {
            self.first = Some((self.avail.index, rest.to_le()));
        }
        self.avail.step(1, self.config.size);
        self.added += 1;
    }

    /// The slot's own table. In it only the direction counts: entries follow each other.
    #[cold]
    fn describe(&self, slot: u32, io: Io) {
        for (index, part) in (0..).zip(self.slots.chain(slot, io).parts()) {
            let rest = u64::from(part.len) | u64::from(part.flags) << 48;
            self.slots.write_table(slot, index, [part.gpa, rest]);
        }
    }

    #[inline]
    fn next_used(&self) -> Option<u64> {
        let [_, word] = self.entry(self.used.index);
        // Acquire pairs with the server's release of its used descriptor, status and data.
        let rest = u64::from_le(word.load(Acquire));
        ((rest >> 48) as u16 & LAP == self.used.used()).then_some(rest)
    }

    #[inline]
    fn wants_kick(&self, added: u16) -> bool {
        // SAFETY: the structure resolved in `new`.
        let event = u32::from_le(unsafe { self.device_event.as_ref() }.load(Relaxed));
        match event >> 16 & 3 {
            EVENT_DISABLE => false,
            EVENT_DESC if self.config.event_idx => {
                let at = (event & 0xffff) as u16;
                let this_lap = (at & WRAP != 0) == self.avail.wrap;
                let at = at & !WRAP;
                let at = if this_lap {
                    at
                } else {
                    at.wrapping_sub(self.config.size)
                };
                self.avail.index.wrapping_sub(at).wrapping_sub(1) < added
            }
            _ => true,
        }
    }

    /// Asks for a signal at the next used entry; whoever asks looks once more.
    fn arm(&mut self) {
        self.armed = true;
        if self.config.event_idx {
            let wrap = if self.used.wrap { WRAP } else { 0 };
            self.write_event(EVENT_DESC << 16 | u32::from(self.used.index | wrap));
        }
        // Full barrier between asking for a signal and looking once more; pairs with the server's between publishing
        // its used descriptors and reading what we ask for.
        fence(SeqCst);
    }

    fn write_event(&self, event: u32) {
        // SAFETY: the structure resolved in `new`.
        unsafe { self.driver_event.as_ref() }.store(event.to_le(), Relaxed);
    }
}

impl DriverRing for PackedRing {
    /// Entry 0 of the first lap, both to take and to give back.
    const START: u32 = 0x8000_8000;

    fn new(memory: Arc<Memory>, base: u64, config: RingConfig, signals: Signals) -> PackedRing {
        let [descriptors, driver_event, device_event] = config.locate(&memory, base);
        let ring = PackedRing {
            slots: Slots::new(memory, base, &config),
            config,
            descriptors: descriptors.cast(),
            driver_event: driver_event.cast(),
            device_event: device_event.cast(),
            avail: Place::START,
            used: Place::START,
            first: None,
            added: 0,
            armed: true,
            signals,
        };
        if config.interrupts == Interrupts::Off {
            ring.write_event(EVENT_DISABLE << 16);
        }
        ring
    }
}

impl Queue for PackedRing {
    #[inline]
    fn submit(&mut self, slot: u32, io: Io) -> anyhow::Result<()> {
        let other = self.slots.prepare(slot, io);
        let id = u16::try_from(slot).unwrap_or(u16::MAX);
        if !self.config.indirect {
            let chain = self.slots.chain(slot, io);
            let last = chain.count - 1;
            for (index, part) in (0..).zip(chain.parts()) {
                let next = if index < last { NEXT } else { 0 };
                self.add(part.gpa, part.len, id, part.flags | next);
            }
            return Ok(());
        }
        if other {
            self.describe(slot, io);
        }
        let entries = self.slots.parts_in_flight(slot);
        self.add(self.slots.table(slot), 16 * entries, id, INDIRECT);
        Ok(())
    }

    #[inline]
    fn commit(&mut self) -> anyhow::Result<()> {
        let added = std::mem::take(&mut self.added);
        if let Some((index, rest)) = self.first.take() {
            // Release pairs with the server's acquire of these flags, before it reads the descriptors.
            self.entry(index)[1].store(rest, Release);
        }
        // Full barrier between publishing and asking whether to kick; pairs with the server's, which asks for a kick
        // and then looks once more.
        fence(SeqCst);
        if self.wants_kick(added) {
            self.signals.kick()?;
        }
        Ok(())
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        if self.config.interrupts == Interrupts::Armed && !self.armed && self.next_used().is_none()
        {
            self.arm();
        }
        // Each round takes a request that was in flight, so this ends (I8).
        while let Some(rest) = self.next_used() {
            let slot = (rest >> 32 & 0xffff) as u32;
            let (entries, failure) = self.slots.finish(slot)?;
            let entries = if self.config.indirect { 1 } else { entries };
            self.used.step(entries, self.config.size);
            self.armed = false;
            done.push(Done { slot, failure });
        }
        Ok(())
    }

    #[inline]
    fn spin(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        let waits = match self.config.interrupts {
            Interrupts::Off => true,
            Interrupts::Armed => self.armed,
            Interrupts::On => false,
        };
        if waits {
            let _ = (0..SPINS).find(|_| self.next_used().is_some());
        }
        self.poll(done)
    }

    fn sleep(&mut self, timeout: Duration) -> anyhow::Result<bool> {
        if self.config.interrupts != Interrupts::On {
            return Ok(false);
        }
        self.arm();
        if self.next_used().is_none() {
            self.signals.wait(timeout)?;
        }
        Ok(true)
    }

    fn write_data(&mut self, slot: u32, bytes: &[u8]) {
        self.slots.write_data(slot, bytes);
    }

    fn read_data(&self, slot: u32, bytes: &mut [u8]) {
        self.slots.read_data(slot, bytes);
    }

    fn counters(&self) -> Counters {
        self.signals.counters(self.config.interrupts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn place_after_the_last_entry_is_the_first_of_the_next_lap() {
        let mut place = Place {
            index: 126,
            wrap: true,
        };
        place.step(3, 128);
        assert_eq!((place.index, place.wrap), (1, false));
        assert_eq!((place.available(), place.used()), (USED, 0));
        place.step(127, 128);
        assert_eq!((place.index, place.wrap), (0, true));
        assert_eq!((place.available(), place.used()), (AVAIL, LAP));
    }
}
