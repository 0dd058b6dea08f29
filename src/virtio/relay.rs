//! A split virtqueue in this process's own memory, by which one server of a virtqueue has requests carried out by another:
//! the one is the driver here, the other one serves it as any other queue. So a request goes on as descriptors, which mean
//! the same pages to both however each device sees them.
//!
//! ```text
//!  guest ==ring==> front: Virtqueue     RelayDriver ==Relay==> behind: Virtqueue
//!                  pop --> hand_over -------------------------> pop
//!                  push_used <-- answer <---------------------- push_used
//!                  publish_used; then show -------------------> has_shown
//! ```
//! Nothing allocates after [`RelayDriver::new`]. Who sleeps asks for a kick or a signal as virtio has it.

use super::chain::{Chain, DESC_F_NEXT, DESC_F_WRITE, ThreeEntries};
use super::memory::{Gpa, GuestMemory};
use super::split::{AVAIL_F_NO_INTERRUPT, USED_F_NO_NOTIFY};
use super::virtqueue::{
    HeadIndex, MAX_QUEUE_SIZE, RingLayout, Virtqueue, VirtqueueConfig, avail_ring_bytes,
    descriptor_table_bytes, used_ring_bytes,
};
use std::ptr::NonNull;
use std::sync::Arc;
// No guest writes here, so not by the door to its memory (`shared`).
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64, fence};

/// As many descriptors as a queue may have: a chain of any queue fits.
pub const RELAY_SIZE: u16 = MAX_QUEUE_SIZE;

const AVAIL_AT: usize = descriptor_table_bytes(RELAY_SIZE) as usize;
const USED_AT: usize = AVAIL_AT + (avail_ring_bytes(RELAY_SIZE) as usize).next_multiple_of(64);
const BYTES: usize = USED_AT + used_ring_bytes(RELAY_SIZE) as usize;

#[derive(Debug)]
#[repr(C, align(64))]
struct Line([AtomicU64; 8]);

/// See the module: what both sides share.
#[derive(Debug)]
pub struct Relay {
    lines: Box<[Line]>,
    /// The used index up to which the guest can see what was answered.
    shown: AtomicU16,
    /// The front has ended.
    closed: AtomicBool,
}

impl Relay {
    /// One on which nothing is under way.
    #[must_use]
    pub fn new() -> Arc<Relay> {
        let line = || Line([const { AtomicU64::new(0) }; 8]);
        Arc::new(Relay {
            lines: (0..BYTES.div_ceil(size_of::<Line>()))
                .map(|_| line())
                .collect(),
            shown: AtomicU16::new(0),
            closed: AtomicBool::new(false),
        })
    }

    fn at<T>(&self, offset: usize) -> NonNull<T> {
        let start = NonNull::from(&self.lines[..]).cast::<u8>();
        // SAFETY: within the lines, which have as many bytes; all of it is atomics.
        unsafe { start.add(offset.min(BYTES)) }.cast()
    }

    /// The queue, for whoever serves it. It lies in here.
    #[must_use]
    pub fn config(&self) -> VirtqueueConfig {
        VirtqueueConfig {
            layout: RingLayout::Split,
            size: RELAY_SIZE,
            descriptor_table: self.at(0),
            avail: self.at(AVAIL_AT),
            used: self.at(USED_AT),
            event_idx: false,
            indirect: false,
            next_avail: 0,
            next_used: 0,
        }
    }

    /// Whether the guest can see everything that was given back so far, where `queue` is the side behind.
    #[must_use]
    pub fn has_shown(&self, queue: &Virtqueue) -> bool {
        // Both indices began at 0.
        let taken = (queue.base() & 0xffff) as u16;
        let given_back = taken.wrapping_sub(queue.in_flight());
        // Pairs with the release in `RelayDriver::show`: the guest's used ring first.
        self.shown.load(Acquire) == given_back
    }

    /// Nothing is under way, and nothing more comes.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.closed.load(Acquire)
    }

    /// Word `index` of the avail ring.
    fn avail_word(&self, index: u16) -> &AtomicU16 {
        let index = usize::from(index).min(usize::from(RELAY_SIZE) + 2);
        // SAFETY: within the ring, whose bytes are atomics in `lines`, and aligned.
        unsafe { self.at::<AtomicU16>(AVAIL_AT + 2 * index).as_ref() }
    }

    /// Flags and index of the used ring.
    fn used_words(&self) -> &[AtomicU16; 2] {
        // SAFETY: as above.
        unsafe { self.at::<[AtomicU16; 2]>(USED_AT).as_ref() }
    }

    /// Id and length of a used entry.
    fn used_entry(&self, index: u16) -> &[AtomicU32; 2] {
        let index = usize::from(index % RELAY_SIZE);
        // SAFETY: as above.
        unsafe { self.at::<[AtomicU32; 2]>(USED_AT + 4 + 8 * index).as_ref() }
    }

    fn descriptor(&self, index: u16) -> &[AtomicU64; 2] {
        let index = usize::from(index % RELAY_SIZE);
        // SAFETY: as above.
        unsafe { self.at::<[AtomicU64; 2]>(16 * index).as_ref() }
    }
}

/// Why a request was not handed over. It is as before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// Too many are under way: later, perhaps.
    Full,
    /// Never: it has more pieces than there are descriptors, or one that is in no region.
    Impossible,
}

/// The front's side.
#[derive(Debug)]
pub struct RelayDriver {
    relay: Arc<Relay>,
    /// By descriptor: the one behind it, in its chain or among the free ones.
    next: Box<[u16; RELAY_SIZE as usize]>,
    /// The first free one.
    free: u16,
    free_count: u16,
    /// By the first descriptor of a chain: the head in the front's ring, and how many descriptors.
    chains: Box<[(HeadIndex, u16); RELAY_SIZE as usize]>,
    avail_index: u16,
    used_index: u16,
}

impl RelayDriver {
    /// For a relay that nobody has used yet.
    #[must_use]
    pub fn new(relay: Arc<Relay>) -> RelayDriver {
        let driver = RelayDriver {
            relay,
            next: Box::new(std::array::from_fn(|at| {
                // The last one has none behind it.
                u16::try_from(at + 1).unwrap_or(RELAY_SIZE)
            })),
            free: 0,
            free_count: RELAY_SIZE,
            chains: Box::new([(HeadIndex::default(), 0); RELAY_SIZE as usize]),
            avail_index: 0,
            used_index: 0,
        };
        driver.suppress_signals();
        driver
    }

    /// Hands over the request in `chain`, of which nothing has been taken off. `memory` is what it was made from.
    ///
    /// # Errors
    /// [`Refusal`].
    pub fn hand_over(&mut self, chain: &Chain, memory: &GuestMemory) -> Result<(), Refusal> {
        let count = u16::try_from(chain.segments().len()).map_err(|_| Refusal::Impossible)?;
        if count == 0 || count > RELAY_SIZE || chain.fault().is_some() {
            return Err(Refusal::Impossible);
        }
        if count > self.free_count {
            return Err(Refusal::Full);
        }
        let first = self.free;
        let mut at = first;
        let readable = chain.readable().iter().map(|segment| (segment, 0));
        let writable = chain
            .writable()
            .iter()
            .map(|segment| (segment, DESC_F_WRITE));
        for (place, (segment, write)) in (1..).zip(readable.chain(writable)) {
            let gpa = memory.gpa_of(segment).ok_or(Refusal::Impossible)?;
            let flags = match place < count {
                true => write | DESC_F_NEXT,
                false => write,
            };
            at = self.describe(at, gpa, segment.len(), flags);
        }
        // Taken only now: an address that is nowhere has changed nothing.
        self.offer((first, count), at, chain.head());
        Ok(())
    }

    /// The same of a request that is three descriptors of the ring. `false` when too many are under way.
    #[inline(always)]
    pub(super) fn hand_over_three(&mut self, head: HeadIndex, entries: &ThreeEntries) -> bool {
        if self.free_count < 3 {
            return false;
        }
        let first = self.free;
        let mut at = first;
        let middle = if entries.writable { DESC_F_WRITE } else { 0 };
        for (entry, flags) in [
            (&entries.first, DESC_F_NEXT),
            (&entries.second, DESC_F_NEXT | middle),
            (&entries.third, DESC_F_WRITE),
        ] {
            at = self.describe(at, entry.gpa, entry.len, flags);
        }
        self.offer((first, 3), at, head);
        true
    }

    /// Writes a descriptor; the one that comes after it.
    #[inline(always)]
    fn describe(&self, at: u16, gpa: Gpa, len: u32, flags: u16) -> u16 {
        // Less than the size while one is free.
        let next = self.next[usize::from(at % RELAY_SIZE)];
        let [low, high] = self.relay.descriptor(at);
        let rest = u64::from(flags) << 32 | u64::from(next) << 48;
        low.store(gpa.0.to_le(), Relaxed);
        high.store((rest | u64::from(len)).to_le(), Relaxed);
        next
    }

    /// Makes a chain available that was written from `first` on; `free` is the first descriptor behind it.
    #[inline(always)]
    fn offer(&mut self, (first, count): (u16, u16), free: u16, head: HeadIndex) {
        self.free = free;
        self.free_count -= count;
        self.chains[usize::from(first % RELAY_SIZE)] = (head, count);
        let relay = &self.relay;
        relay
            .avail_word(2 + self.avail_index % RELAY_SIZE)
            .store(first.to_le(), Relaxed);
        self.avail_index = self.avail_index.wrapping_add(1);
        // Pairs with the acquire of the avail index: the entry and the descriptors first.
        relay.avail_word(1).store(self.avail_index.to_le(), Release);
    }

    /// Whether the other side sleeps: to be asked after [`Self::hand_over`].
    #[must_use]
    pub fn wants_kick(&self) -> bool {
        // Pairs with the fence in `Virtqueue::request_kicks`: either it sees the request, or we see that it asks.
        fence(SeqCst);
        u16::from_le(self.relay.used_words()[0].load(Relaxed)) & USED_F_NO_NOTIFY == 0
    }

    /// Whether any answer is there.
    #[must_use]
    pub fn has_answer(&self) -> bool {
        u16::from_le(self.relay.used_words()[1].load(Relaxed)) != self.used_index
    }

    /// The next answer, if there is one: the head in the front's ring, and the used length.
    pub fn answer(&mut self) -> Option<(HeadIndex, u32)> {
        // Acquire pairs with the release of the used index.
        if u16::from_le(self.relay.used_words()[1].load(Acquire)) == self.used_index {
            return None;
        }
        let [id, len] = self.relay.used_entry(self.used_index);
        // What `hand_over` made available: one of the descriptors.
        let first = u16::try_from(u32::from_le(id.load(Relaxed))).unwrap_or(0) % RELAY_SIZE;
        let id = usize::from(first);
        let len = u32::from_le(len.load(Relaxed));
        self.used_index = self.used_index.wrapping_add(1);
        let (head, count) = self.chains[id];
        // Its descriptors are the first free ones, still one behind the other.
        let mut last = id;
        for _ in 1..count {
            last = usize::from(self.next[last]) % usize::from(RELAY_SIZE);
        }
        self.next[last] = self.free;
        self.free = first;
        self.free_count += count;
        Some((head, len))
    }

    /// All answers that were taken are where the guest can see them.
    pub fn show(&self) {
        self.relay.shown.store(self.used_index, Release);
    }

    /// All answers were taken, and no more requests will come.
    pub fn close(&self) {
        self.relay.closed.store(true, Release);
    }

    /// Asks for a signal at the next answer, and looks once more: whether there is one already.
    #[must_use]
    pub fn request_signal(&self) -> bool {
        self.relay.avail_word(0).store(0, Relaxed);
        // Pairs with the fence in `Virtqueue::needs_signal`.
        fence(SeqCst);
        self.has_answer()
    }

    /// Answers are looked for.
    pub fn suppress_signals(&self) {
        self.relay
            .avail_word(0)
            .store(AVAIL_F_NO_INTERRUPT.to_le(), Relaxed);
    }
}
