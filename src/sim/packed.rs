//! The driver's side of a packed ring: positions, laps, the structures that suppress events. Which requests there are,
//! and what they look like, is [`SimGuest`](super::SimGuest)'s.

use super::RawDescriptor;
use crate::virtio::shared::{AtomicU32, AtomicU64};
use crate::virtio::virtqueue::PACKED_START;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;
const EVENT_ENABLE: u32 = 0;
const EVENT_DISABLE: u32 = 1;
const EVENT_DESC: u32 = 2;

/// A descriptor as it stands in a packed ring or its tables.
pub(super) fn words(descriptor: RawDescriptor, id: u16) -> [u64; 2] {
    let RawDescriptor {
        gpa, len, flags, ..
    } = descriptor;
    let rest = u64::from(len) | u64::from(id) << 32 | u64::from(flags) << 48;
    [gpa.to_le(), rest.to_le()]
}

/// A place in the ring and the wrap counter of the lap, as virtio has it in 16 bits.
#[derive(Debug, Clone, Copy)]
struct Place {
    index: u16,
    wrap: bool,
}

impl Place {
    fn bits(self) -> u16 {
        self.index | if self.wrap { PACKED_START } else { 0 }
    }

    fn step(&mut self, entries: u16, size: u16) {
        self.index += entries;
        if self.index >= size {
            self.index -= size;
            self.wrap = !self.wrap;
        }
    }
}

/// Where a driver has got to in a packed ring.
#[derive(Debug)]
pub(super) struct PackedDriver {
    descriptors: NonNull<AtomicU64>,
    driver_event: NonNull<AtomicU32>,
    device_event: NonNull<AtomicU32>,
    size: u16,
    event_idx: bool,
    /// The next entry to fill.
    avail: Place,
    /// The next entry that the device will write a used one to.
    used: Place,
    /// Entries that are the driver's to fill.
    free: u16,
    /// Entries of each buffer id in flight.
    entries: Vec<u16>,
    /// The first entry since the last publication, and its second word: the device stops at it.
    first: Option<(u16, u64)>,
}

impl PackedDriver {
    /// # Safety
    /// `size` descriptors and two event suppression structures are mapped there, aligned, as long as the value lives.
    pub(super) unsafe fn new(
        [descriptors, driver_event, device_event]: [NonNull<u8>; 3],
        size: u16,
        event_idx: bool,
        first_index: u16,
    ) -> PackedDriver {
        let start = Place {
            index: first_index % size,
            wrap: true,
        };
        let ring = PackedDriver {
            descriptors: descriptors.cast(),
            driver_event: driver_event.cast(),
            device_event: device_event.cast(),
            size,
            event_idx,
            avail: start,
            used: start,
            free: size,
            entries: vec![0; size.into()],
            first: None,
        };
        // The entries before were used in this lap: in the next one they are neither used nor available.
        for index in 0..start.index {
            let used = u64::from(AVAIL | USED) << 48;
            ring.entry(index)[1].store(used.to_le(), Relaxed);
        }
        ring
    }

    pub(super) fn free(&self) -> u16 {
        self.free
    }

    /// Where the device starts, as SET_VRING_BASE has it in 16 bits.
    pub(super) fn start(first_index: u16, size: u16) -> u16 {
        (first_index % size) | PACKED_START
    }

    /// The two words of entry `index`.
    fn entry(&self, index: u16) -> [&AtomicU64; 2] {
        assert!(index < self.size);
        // SAFETY: inside the ring (asserted, and the contract of `new`), aligned to 16.
        unsafe {
            let entry = self.descriptors.add(2 * usize::from(index));
            [entry.as_ref(), entry.add(1).as_ref()]
        }
    }

    /// Fills the next entries with `chain`, whatever it says, as the request `id`. The device sees them after
    /// [`Self::publish`].
    pub(super) fn add(&mut self, chain: &[RawDescriptor], id: u16) {
        for descriptor in chain {
            let lap = if self.avail.wrap { AVAIL } else { USED };
            let flags = descriptor.flags | lap;
            let [address, rest] = words(
                RawDescriptor {
                    flags,
                    ..*descriptor
                },
                id,
            );
            let [to_address, to_rest] = self.entry(self.avail.index);
            to_address.store(address, Relaxed);
            if self.first.is_some() {
                // Relaxed: the release of the first one, which the device reads before, covers it.
                to_rest.store(rest, Relaxed);
            } else {
                self.first = Some((self.avail.index, rest));
            }
            self.avail.step(1, self.size);
        }
        let entries = u16::try_from(chain.len()).expect("few descriptors");
        // A hostile driver fills entries that are not its own.
        self.free = self.free.saturating_sub(entries);
        if let Some(of_id) = self.entries.get_mut(usize::from(id)) {
            *of_id = entries;
        }
    }

    /// Shows the device everything added.
    pub(super) fn publish(&mut self) {
        if let Some((index, rest)) = self.first.take() {
            // Release pairs with the acquire in the device's ring, where it looks at the flags of a chain's first entry.
            self.entry(index)[1].store(rest, Release);
        }
    }

    /// Whether the device wants to be kicked. One kick too many when it named a position: ours never does.
    pub(super) fn wants_kick(&self) -> bool {
        // SAFETY: the structure of the contract of `new`.
        let event = u32::from_le(unsafe { self.device_event.as_ref() }.load(Relaxed));
        event >> 16 & 3 != EVENT_DISABLE
    }

    fn is_used(&self, rest: u64) -> bool {
        let flags = (rest >> 48) as u16;
        [AVAIL, USED].map(|bit| flags & bit != 0) == [self.used.wrap; 2]
    }

    /// The next used entry, id and length.
    pub(super) fn take_used(&mut self) -> Option<(u32, u32)> {
        // Acquire pairs with the release in `Virtqueue::publish_used`.
        let rest = u64::from_le(self.entry(self.used.index)[1].load(Acquire));
        if !self.is_used(rest) {
            return None;
        }
        let (id, len) = (((rest >> 32) & 0xffff) as u16, (rest & 0xffff_ffff) as u32);
        let entries = self.entries.get_mut(usize::from(id));
        let entries = std::mem::take(entries.expect("the device used an id outside the ring"));
        assert!(entries > 0, "the device used id {id} twice");
        self.free += entries;
        self.used.step(entries, self.size);
        Some((id.into(), len))
    }

    /// Asks for a signal at the next used entry. True if one is there already.
    pub(super) fn enable_signals(&self, barrier: impl Fn()) -> bool {
        self.write_event(match self.event_idx {
            true => EVENT_DESC << 16 | u32::from(self.used.bits()),
            false => EVENT_ENABLE,
        });
        barrier();
        self.is_used(u64::from_le(self.entry(self.used.index)[1].load(Relaxed)))
    }

    /// Asks for no signals.
    pub(super) fn disable_signals(&self) {
        self.write_event(EVENT_DISABLE << 16);
    }

    /// Asks for a signal at the entry `position`, with its wrap counter in bit 15, as a driver with EVENT_IDX may.
    pub(super) fn signal_at(&self, position: u16) {
        self.write_event(EVENT_DESC << 16 | u32::from(position));
    }

    fn write_event(&self, event: u32) {
        // SAFETY: the structure of the contract of `new`.
        unsafe { self.driver_event.as_ref() }.store(event.to_le(), Relaxed);
    }

    /// Overwrites both event suppression structures.
    pub(super) fn scribble(&self, value: u16) {
        let value = u32::from(value) | u32::from(value) << 16;
        self.write_event(value);
        // SAFETY: the structure of the contract of `new`.
        unsafe { self.device_event.as_ref() }.store(value, Relaxed);
    }
}
