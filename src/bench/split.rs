//! The driver side of a split virtqueue (virtio 1.2, 2.7) that costs as little as it can: the load must not be what is
//! measured. An I/O whose slot had the same kind before takes an avail entry here and, once a batch, the index.
//!
//! What all queues have in common is in [`super::slots`].

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};
use std::time::Duration;

use anyhow::bail;

use super::args::Interrupts;
use super::engine::{Done, Queue, SPINS};
use super::io::Io;
use super::slots::{
    DriverRing, INDIRECT, MOST_PARTS, Memory, NEXT, Part, RingConfig, Signals, Slots,
};
use super::stats::Counters;
use crate::virtio::virtqueue::used_ring_bytes;

const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

/// One virtqueue.
pub struct SplitRing {
    slots: Slots,
    config: RingConfig,
    descriptors: NonNull<AtomicU64>,
    avail: NonNull<AtomicU16>,
    used: NonNull<u8>,
    avail_index: u16,
    published: u16,
    last_used: u16,
    /// Where `used_event` was put last.
    event: u16,
    signals: Signals,
}

// SAFETY: the pointers name memory that `slots` keeps mapped, shared by design: atomics and copies only (I1).
unsafe impl Send for SplitRing {}

impl SplitRing {
    #[inline]
    fn avail_word(&self, index: u16) -> &AtomicU16 {
        assert!(index <= self.config.size + 2);
        // SAFETY: inside the `6 + 2 * size` bytes resolved in `new` (asserted).
        unsafe { self.avail.add(index.into()).as_ref() }
    }

    #[inline]
    fn used_word(&self, offset: u32) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= used_ring_bytes(self.config.size));
        // SAFETY: inside the bytes resolved in `new` (asserted).
        unsafe { self.used.add(offset as usize).cast().as_ref() }
    }

    fn write_entry(&self, index: u32, words: [u64; 2]) {
        assert!(index < u32::from(self.config.size));
        // SAFETY: inside the table resolved in `new` (asserted), aligned to 16.
        let (first, second) = unsafe {
            let entry = self.descriptors.add(2 * index as usize);
            (entry.as_ref(), entry.add(1).as_ref())
        };
        first.store(words[0].to_le(), Relaxed);
        second.store(words[1].to_le(), Relaxed);
    }

    /// The slot's descriptors, in its own table or at its place in the queue's.
    #[cold]
    fn describe(&self, slot: u32, io: Io) {
        let chain = self.slots.chain(slot, io);
        for (index, part) in (0..).zip(chain.parts()) {
            let next = if index + 1 < chain.count { NEXT } else { 0 };
            if self.config.indirect {
                let words = words(part, next, index + 1);
                self.slots.write_table(slot, index, words);
            } else {
                let first = slot * MOST_PARTS;
                self.write_entry(first + index, words(part, next, first + index + 1));
            }
        }
        if self.config.indirect {
            let table = Part {
                gpa: self.slots.table(slot),
                len: 16 * chain.count,
                flags: INDIRECT,
            };
            self.write_entry(slot, words(table, 0, 0));
        }
    }

    /// Puts `used_event` where no completion of the next 65535 is. Without EVENT_IDX the flag says it.
    fn silence(&mut self) {
        self.event = self.last_used.wrapping_sub(1);
        if self.config.event_idx {
            self.avail_word(self.config.size + 2)
                .store(self.event.to_le(), Relaxed);
        }
    }

    /// Asks for a signal at the next completion; whoever asks looks once more.
    fn arm(&mut self) {
        self.event = self.last_used;
        if self.config.event_idx {
            self.avail_word(self.config.size + 2)
                .store(self.event.to_le(), Relaxed);
        }
        // Full barrier between asking for a signal and looking once more; pairs with the server's between publishing
        // its used index and reading what we ask for.
        fence(SeqCst);
    }

    #[inline]
    fn used_index(&self) -> u16 {
        // Acquire pairs with the server's release of its used elements, statuses and data.
        u16::from_le(self.used_word(2).load(Acquire))
    }

    #[inline]
    fn wants_kick(&self, old: u16, new: u16) -> bool {
        if self.config.event_idx {
            let event = self
                .used_word(4 + 8 * u32::from(self.config.size))
                .load(Relaxed);
            let past = new.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
            past < new.wrapping_sub(old)
        } else {
            u16::from_le(self.used_word(0).load(Relaxed)) & NO_NOTIFY == 0
        }
    }
}

/// A descriptor of a split ring. `next` is at most the queue's size, which fits 16 bits.
fn words(part: Part, flags: u16, next: u32) -> [u64; 2] {
    let next = if flags & NEXT == 0 { 0 } else { next };
    let flags = u64::from(part.flags | flags);
    [
        part.gpa,
        u64::from(part.len) | flags << 32 | u64::from(next) << 48,
    ]
}

impl DriverRing for SplitRing {
    const START: u32 = 0;

    fn new(memory: Arc<Memory>, base: u64, config: RingConfig, signals: Signals) -> SplitRing {
        let [descriptors, avail, used] = config.locate(&memory, base);
        let mut ring = SplitRing {
            slots: Slots::new(memory, base, &config),
            config,
            descriptors: descriptors.cast(),
            avail: avail.cast(),
            used,
            avail_index: 0,
            published: 0,
            last_used: 0,
            event: 0,
            signals,
        };
        if config.interrupts == Interrupts::Off {
            ring.avail_word(0).store(NO_INTERRUPT.to_le(), Relaxed);
            ring.silence();
        }
        ring
    }
}

impl Queue for SplitRing {
    #[inline]
    fn submit(&mut self, slot: u32, io: Io) -> anyhow::Result<()> {
        if self.slots.prepare(slot, io) {
            self.describe(slot, io);
        }
        let each = if self.config.indirect { 1 } else { MOST_PARTS };
        let head = u16::try_from(slot * each).unwrap_or(u16::MAX);
        let place = self.avail_index & (self.config.size - 1);
        self.avail_word(2 + place).store(head.to_le(), Relaxed);
        self.avail_index = self.avail_index.wrapping_add(1);
        Ok(())
    }

    #[inline]
    fn commit(&mut self) -> anyhow::Result<()> {
        let (old, new) = (self.published, self.avail_index);
        // Release pairs with the server's acquire of this index, before it reads entries and descriptors.
        self.avail_word(1).store(new.to_le(), Release);
        self.published = new;
        // Full barrier between publishing and asking whether to kick; pairs with the server's, which asks for a kick
        // and then looks once more.
        fence(SeqCst);
        if self.wants_kick(old, new) {
            self.signals.kick()?;
        }
        Ok(())
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        let index = self.used_index();
        if index == self.last_used {
            if self.config.interrupts == Interrupts::Armed && self.event != index {
                self.arm();
            }
            return Ok(());
        }
        while self.last_used != index {
            let place = u32::from(self.last_used & (self.config.size - 1));
            let id = NonNull::from(self.used_word(4 + 8 * place)).cast::<AtomicU32>();
            // SAFETY: the element's first word, aligned to 4 and inside the ring as its half is (`used_word`).
            let id = u32::from_le(unsafe { id.as_ref() }.load(Relaxed));
            let slot = match self.config.indirect {
                true => id,
                false if id % MOST_PARTS == 0 => id / MOST_PARTS,
                false => bail!("the server used head {id}, which no request has"),
            };
            let (_, failure) = self.slots.finish(slot)?;
            self.last_used = self.last_used.wrapping_add(1);
            done.push(Done { slot, failure });
        }
        if self.config.interrupts == Interrupts::Off
            && self.last_used.wrapping_sub(self.event) > 0x4000
        {
            self.silence();
        }
        Ok(())
    }

    #[inline]
    fn spin(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        let waits = match self.config.interrupts {
            Interrupts::Off => true,
            Interrupts::Armed => self.event == self.last_used,
            Interrupts::On => false,
        };
        if waits {
            let _ = (0..SPINS).find(|_| self.used_index() != self.last_used);
        }
        self.poll(done)
    }

    fn sleep(&mut self, timeout: Duration) -> anyhow::Result<bool> {
        if self.config.interrupts != Interrupts::On {
            return Ok(false);
        }
        self.arm();
        if self.used_index() == self.last_used {
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
