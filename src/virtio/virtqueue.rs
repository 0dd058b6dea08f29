//! Split virtqueue, device side (virtio 1.2, 2.7). Ring addresses are resolved once; nothing allocates.
//!
//! Promises that a head is in flight at most once and goes back at most once (I5), that all indices are private
//! to us (what the guest writes over the used ring is harmless), and that only a [`RingError`] stops a ring.
//! Knows nothing of block devices, eventfds or how the rings came to be mapped.
//!
//! One turn, in this order; each step says whom its ordering pairs with:
//! [`Virtqueue::available`] -> [`Virtqueue::pop`] while there is room for a request -> ... ->
//! [`Virtqueue::push_used`] per finished request -> [`Virtqueue::publish_used`] once ->
//! [`Virtqueue::needs_signal`] once. A request that finds no room is simply not popped: it stays in the avail
//! ring until the next turn.

use super::chain::{Chain, DescriptorTable, Ends};
use super::memory::GuestMemory;
use super::shared::{AtomicU16, AtomicU32, fence};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release, SeqCst};
use thiserror::Error;

/// The largest queue we serve. Virtio allows 32768; QEMU's block front-ends stop at 1024.
pub const MAX_QUEUE_SIZE: u16 = 1024;

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// The two orderings and the fence below are what makes the rings work between two cores. Each can be removed by
/// a `canary-*` feature, on which `scripts/loom-rings` must fail: x86 itself would forgive the loss of the first two.
const AVAIL_ACQUIRE: Ordering = match cfg!(feature = "canary-no-avail-acquire") {
    true => Relaxed,
    false => Acquire,
};
const USED_RELEASE: Ordering = match cfg!(feature = "canary-no-used-release") {
    true => Relaxed,
    false => Release,
};

/// The head of a descriptor chain: an index into the descriptor table that was checked against its size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HeadIndex(u16);

impl HeadIndex {
    /// The index, less than the queue size.
    #[inline]
    pub const fn get(self) -> u16 {
        self.0
    }
}

/// The guest broke the ring itself: this ring can only be stopped, nothing else is touched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum RingError {
    /// The avail index ran backwards, or further ahead than the queue has entries.
    #[error(
        "avail index went from {seen} to {index} with {next} the next to be taken: more than {size} entries"
    )]
    AvailIndex {
        /// The index read now.
        index: u16,
        /// The index read before.
        seen: u16,
        /// The next entry we would take.
        next: u16,
        /// The queue size.
        size: u16,
    },
    /// A head outside the descriptor table.
    #[error("avail ring names head {head}, the queue has {size} descriptors")]
    HeadOutOfRange {
        /// The head.
        head: u16,
        /// The queue size.
        size: u16,
    },
    /// A head that was made available before and has not been used yet.
    #[error("avail ring names head {head}, which is still in flight")]
    DuplicateHead {
        /// The head.
        head: u16,
    },
    /// An indirect descriptor although VIRTIO_F_INDIRECT_DESC was not negotiated.
    #[error("head {head} leads to an indirect table, which was not negotiated")]
    IndirectNotNegotiated {
        /// The head.
        head: u16,
    },
}

/// Why a queue was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QueueError {
    /// The size is no power of two from 1 to [`MAX_QUEUE_SIZE`].
    #[error("queue size {0} is no power of two from 1 to {MAX_QUEUE_SIZE}")]
    Size(u16),
    /// A part of the queue is not aligned as virtio 1.2, 2.7 "Split Virtqueues" wants it.
    #[error("the {part} is not aligned to {alignment} bytes")]
    Misaligned {
        /// Which part.
        part: &'static str,
        /// What it should be aligned to.
        alignment: usize,
    },
}

/// Everything a queue consists of. The addresses are where this process sees the parts.
#[derive(Debug, Clone, Copy)]
pub struct VirtqueueConfig {
    /// Number of descriptors: a power of two, at most [`MAX_QUEUE_SIZE`].
    pub size: u16,
    /// The descriptor table: [`descriptor_table_bytes`], aligned to 16.
    pub descriptor_table: NonNull<u8>,
    /// The avail ring: [`avail_ring_bytes`], aligned to 2.
    pub avail: NonNull<u8>,
    /// The used ring: [`used_ring_bytes`], aligned to 4.
    pub used: NonNull<u8>,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The avail index of the first request to take.
    pub next_avail: u16,
    /// The used index of the first request to give back; see [`used_index`].
    pub next_used: u16,
}

/// Size in bytes of the descriptor table of a queue of `size`.
pub const fn descriptor_table_bytes(size: u16) -> u32 {
    16 * size as u32
}

/// Size in bytes of the avail ring of a queue of `size`: flags, index, entries, used_event.
pub const fn avail_ring_bytes(size: u16) -> u32 {
    6 + 2 * size as u32
}

/// Size in bytes of the used ring of a queue of `size`: flags, index, entries, avail_event.
pub const fn used_ring_bytes(size: u16) -> u32 {
    6 + 8 * size as u32
}

/// The used index that stands in a used ring: where a back-end that takes the ring over goes on.
///
/// # Safety
/// At least 4 bytes are mapped at `used`, which is aligned to 2.
pub unsafe fn used_index(used: NonNull<u8>) -> u16 {
    // SAFETY: the word at offset 2 is mapped and aligned (contract), and reached as an atomic (I1).
    let index = unsafe { used.add(2).cast::<AtomicU16>().as_ref() };
    u16::from_le(index.load(Relaxed))
}

/// A split virtqueue that is running: it can only be built complete.
///
/// The fields of every turn share the first cache line.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Virtqueue {
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
    indirect: bool,
    /// Signal at the next publication whatever the guest says.
    signal_requested: bool,
    /// Which heads are in flight. A byte each: nothing is shifted, and heads come back last in, first out.
    heads: [bool; MAX_QUEUE_SIZE as usize],
}

// SAFETY: a virtqueue is moved by value, and every method takes it exclusively; its pointers name memory that is
// reachable from every thread (contract of `new`).
unsafe impl Send for Virtqueue {}

impl Virtqueue {
    /// Starts serving a queue.
    ///
    /// # Errors
    /// A size we do not serve, or a misaligned part.
    ///
    /// # Safety
    /// - The three parts are mapped readable and writable in their whole length (the `*_bytes` functions) as
    ///   long as this value lives (I2), and no Rust reference to them exists, atomics apart.
    /// - Nobody else in this process serves the same queue at the same time.
    pub unsafe fn new(config: VirtqueueConfig) -> Result<Self, QueueError> {
        let VirtqueueConfig { size, .. } = config;
        if !size.is_power_of_two() || size > MAX_QUEUE_SIZE {
            return Err(QueueError::Size(size));
        }
        for (part, address, alignment) in [
            ("descriptor table", config.descriptor_table, 16),
            ("avail ring", config.avail, 2),
            ("used ring", config.used, 4),
        ] {
            if !address.addr().get().is_multiple_of(alignment) {
                return Err(QueueError::Misaligned { part, alignment });
            }
        }
        // SAFETY: `size` descriptors are mapped there (contract), aligned to 16 (checked above).
        let descriptors = unsafe { DescriptorTable::new(config.descriptor_table.cast(), size) };
        Ok(Self {
            descriptors,
            avail: config.avail.cast(),
            used: config.used,
            mask: size - 1,
            next_avail: config.next_avail,
            seen_avail: config.next_avail,
            next_used: config.next_used,
            published_used: config.next_used,
            decided_used: config.next_used,
            first_avail: config.next_avail,
            first_used: config.next_used,
            event_idx: config.event_idx,
            indirect: config.indirect,
            signal_requested: false,
            heads: [false; MAX_QUEUE_SIZE as usize],
        })
    }

    /// The number of descriptors.
    pub const fn size(&self) -> u16 {
        self.mask + 1
    }

    /// The avail index of the next request to take: what GET_VRING_BASE reports once the queue has drained.
    pub const fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The number of heads taken and not yet given back.
    pub const fn in_flight(&self) -> u16 {
        let taken = self.next_avail.wrapping_sub(self.first_avail);
        let returned = self.next_used.wrapping_sub(self.first_used);
        taken.wrapping_sub(returned)
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

    /// How many requests can be taken now. Once per turn: it is the load that ping-pongs with the guest's core.
    ///
    /// # Errors
    /// An avail index that ran backwards or too far: the ring is broken.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        // Acquire pairs with the guest's release of avail.idx: the entries, descriptors and buffers behind it
        // are read after it.
        let index = u16::from_le(self.avail_word(1).load(AVAIL_ACQUIRE));
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

    /// Takes the next request that [`Self::available`] counted and resolves its descriptors into `chain`; false
    /// if there is none. Whoever lacks room for a request does not call this.
    ///
    /// # Errors
    /// The ring is broken; `chain` is then meaningless. A chain that is merely malformed is no error: it shows
    /// in [`Chain::fault`], and its head must go back like any other (I5).
    #[inline]
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, RingError> {
        let Some(head) = self.take_head()? else {
            return Ok(false);
        };
        self.walk(head, memory, chain)?;
        Ok(true)
    }

    /// [`Self::pop`] and [`Chain::take_ends`] at once, the short way for chains as drivers build them.
    ///
    /// # Errors
    /// As [`Self::pop`].
    #[inline]
    pub fn pop_framed<const N: usize>(
        &mut self,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<Option<Ends<N>>, RingError> {
        let Some(head) = self.take_head()? else {
            return Ok(None);
        };
        if let Some(ends) = chain.walk_framed(head, self.descriptors, self.indirect, memory) {
            return Ok(Some(ends));
        }
        self.walk(head, memory, chain)?;
        Ok(Some(chain.take_ends()))
    }

    /// Walks the chain of the head that was just taken. A chain that breaks the ring leaves the head where it was: it is
    /// not in flight, so that the ring drains without it.
    fn walk(
        &mut self,
        head: HeadIndex,
        memory: &GuestMemory,
        chain: &mut Chain,
    ) -> Result<(), RingError> {
        let walked = chain.walk(head, self.descriptors, self.indirect, memory);
        if walked.is_err() {
            self.heads[Self::place(head.0)] = false;
            self.next_avail = self.next_avail.wrapping_sub(1);
        }
        walked
    }

    /// Takes the next head off the avail ring.
    #[inline]
    fn take_head(&mut self) -> Result<Option<HeadIndex>, RingError> {
        if self.next_avail == self.seen_avail {
            return Ok(None);
        }
        let slot = usize::from(self.next_avail & self.mask);
        let head = u16::from_le(self.avail_word(2 + slot).load(Relaxed));
        if head > self.mask {
            let size = self.mask + 1;
            return Err(RingError::HeadOutOfRange { head, size });
        }
        let in_flight = &mut self.heads[Self::place(head)];
        if *in_flight {
            return Err(RingError::DuplicateHead { head });
        }
        *in_flight = true;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.prefetch();
        Ok(Some(HeadIndex(head)))
    }

    /// The place of a checked head in the table.
    #[inline]
    fn place(head: u16) -> usize {
        // The modulo changes nothing (heads are less than the queue size) and spares a bounds check.
        usize::from(head) % usize::from(MAX_QUEUE_SIZE)
    }

    /// Brings the descriptor of the next request near while this one is worked on. Its head is read here only
    /// as a hint; the one that counts is read, once, by `pop` (I6).
    #[inline]
    fn prefetch(&self) {
        if self.next_avail != self.seen_avail {
            let slot = usize::from(self.next_avail & self.mask);
            let head = u16::from_le(self.avail_word(2 + slot).load(Relaxed));
            self.descriptors.prefetch(head);
        }
    }

    /// Gives `head` back with `len` bytes written into its writable buffers. The guest sees it after the next
    /// [`Self::publish_used`].
    ///
    /// # Panics
    /// When `head` is not in flight: our own error (I5), never the guest's.
    #[inline]
    pub fn push_used(&mut self, head: HeadIndex, len: u32) {
        let in_flight = &mut self.heads[Self::place(head.0)];
        assert!(*in_flight, "head given back twice");
        *in_flight = false;
        let slot = usize::from(self.next_used & self.mask);
        // SAFETY: `slot < size`, so the 8 bytes at 4 + 8 * slot lie in the `6 + 8 * size` mapped bytes; the ring
        // is aligned to 4 (`new`). At most `size` heads are in flight, so no entry is overwritten that the
        // guest did not yet give the head of to us again.
        let [id, written] = unsafe {
            let element = self.used.add(4 + 8 * slot).cast::<AtomicU32>();
            [element.as_ref(), element.add(1).as_ref()]
        };
        // Relaxed: the release in `publish_used` makes both visible together with the index.
        id.store(u32::from(head.0).to_le(), Relaxed);
        written.store(len.to_le(), Relaxed);
        self.next_used = self.next_used.wrapping_add(1);
    }

    /// Shows the guest everything given back so far. Once per batch: used.idx is the line the guest polls.
    #[inline]
    pub fn publish_used(&mut self) {
        if self.next_used != self.published_used {
            // Release pairs with the guest's acquire of used.idx: data, status and used elements come before it.
            self.used_word(2)
                .store(self.next_used.to_le(), USED_RELEASE);
            self.published_used = self.next_used;
        }
    }

    /// Whether the guest wants to be signalled about what was published since the last call. Call it after
    /// [`Self::publish_used`], once per batch, and signal when it says so.
    #[inline]
    pub fn needs_signal(&mut self) -> bool {
        let (new, old) = (self.published_used, self.decided_used);
        if new == old && !self.signal_requested {
            return false;
        }
        self.decided_used = new;
        if std::mem::take(&mut self.signal_requested) {
            return true;
        }
        // Pairs with the driver's full barrier between asking for a signal (used_event, flags) and looking at
        // used.idx again: either it sees our index, or we see its request. Without, both may look away.
        if !cfg!(feature = "canary-no-event-fence") {
            fence(SeqCst);
        }
        if self.event_idx {
            let used_event = self.avail_word(usize::from(self.mask) + 3).load(Relaxed);
            // Virtio 1.2, 2.7.10: the guest asked for the entry `used_event`; was it among `old..new`?
            let past_event = new.wrapping_sub(u16::from_le(used_event)).wrapping_sub(1);
            past_event < new.wrapping_sub(old)
        } else {
            u16::from_le(self.avail_word(0).load(Relaxed)) & AVAIL_F_NO_INTERRUPT == 0
        }
    }

    /// Makes the next [`Self::needs_signal`] say yes. After a restart nobody knows which signals the guest got
    /// from our predecessor: one spurious interrupt costs less than a lost one.
    pub fn request_signal(&mut self) {
        self.signal_requested = true;
    }

    /// Tells the guest not to kick: the ring is polled. Once after the start is enough.
    ///
    /// With EVENT_IDX a guest kicks when it passes `avail_event`; behind its index by one it is passed once in
    /// 65536 requests, and that kick is as harmless as any.
    pub fn suppress_kicks(&mut self) {
        if self.event_idx {
            let event = self.next_avail.wrapping_sub(1);
            self.used_word(4 + 8 * (usize::from(self.mask) + 1))
                .store(event.to_le(), Relaxed);
        } else {
            self.used_word(0).store(USED_F_NO_NOTIFY.to_le(), Relaxed);
        }
    }
}
