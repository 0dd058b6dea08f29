//! Virtqueue, device side (virtio 1.2, 2.7 and 2.8). Ring addresses are resolved once; nothing allocates.
//!
//! There are two layouts of a ring, `split` and `packed`: words and indices. What they
//! have in common is here, once: which heads are in flight, how a chain is taken off, when the guest is signalled. A
//! queue has one layout for life; each call asks for it once, and the code behind is compiled for either.
//!
//! Promises that a head is in flight at most once and goes back at most once (I5), that all indices are private
//! to us (what the guest writes over the used ring is harmless), and that only a [`RingError`] stops a ring.
//! Knows nothing of block devices, eventfds or how the rings came to be mapped.
//!
//! One turn, in this order; each step says whom its ordering pairs with:
//! [`Virtqueue::available`] -> [`Virtqueue::pop`] while there is room for a request -> ... ->
//! [`Virtqueue::push_used`] per finished request -> [`Virtqueue::publish_used`] once ->
//! [`Virtqueue::needs_signal`] once. Before its poller sleeps, [`Virtqueue::request_kicks`]. A request that finds no room is simply not popped: it stays in the avail
//! ring until the next turn.

use super::chain::{
    AcceptExchange, AcceptThree, AsExchange, AsRouted, AsSole, Chain, Descriptor, DescriptorTable,
    Layout, Route, Routed, Sole,
};
use super::memory::{GuestMemory, MainRegion};
use super::packed::{PackedRing, is_position};
use super::shared::{AtomicU16, canary, fence};
use super::split::SplitRing;
use std::ptr::NonNull;
use std::sync::atomic::Ordering::{self, Acquire, Relaxed, Release, SeqCst};
use thiserror::Error;

/// The largest queue we serve. Virtio allows 32768; QEMU's block front-ends stop at 1024.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// The two orderings and the fences below are what makes the rings work between two cores. Each can be left out by
/// a [`canary`], on which `scripts/loom-rings` must fail: x86 itself would forgive the loss of the first two.
#[inline(always)]
pub(super) fn avail_acquire() -> Ordering {
    if canary("no-avail-acquire") {
        Relaxed
    } else {
        Acquire
    }
}

#[inline(always)]
pub(super) fn used_release() -> Ordering {
    if canary("no-used-release") {
        Relaxed
    } else {
        Release
    }
}

/// The head of a descriptor chain, less than the queue size: where it starts in the table of a split ring, its buffer id in
/// a packed one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct HeadIndex(u16);

impl HeadIndex {
    /// A head that was checked to be less than the queue size.
    #[inline]
    pub(super) const fn new(head: u16) -> Self {
        Self(head)
    }

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
    /// A head outside the descriptor table, or a buffer id as large.
    #[error("the guest names head {head}, the queue has {size} descriptors")]
    HeadOutOfRange {
        /// The head.
        head: u16,
        /// The queue size.
        size: u16,
    },
    /// A head that was made available before and has not been used yet.
    #[error("the guest names head {head}, which is still in flight")]
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
    /// A chain of a packed ring that takes entries which are not the guest's: it has no end, or one behind them.
    #[error("the chain at entry {at} of the packed ring goes on over entries that are in flight")]
    EndlessChain {
        /// Where it starts.
        at: u16,
    },
}

/// Why a queue was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum QueueError {
    /// The size is not from 1 to [`MAX_QUEUE_SIZE`], or that of a split ring is no power of two.
    #[error(
        "queue size {0} is not from 1 to {MAX_QUEUE_SIZE}, or not a power of two as a split ring's must be"
    )]
    Size(u16),
    /// A packed ring is to go on at an entry that it has not, or with requests in flight that this process never saw.
    #[error(
        "a packed ring of {size} entries cannot go on at {next_avail:#x} with {next_used:#x} to be used next"
    )]
    Position {
        /// The queue size.
        size: u16,
        /// Where to take the next request, and the wrap counter.
        next_avail: u16,
        /// Where to give the next one back, and the wrap counter.
        next_used: u16,
    },
    /// A part of the queue is not aligned as virtio 1.2, 2.7 and 2.8 want it.
    #[error("the {part} is not aligned to {alignment} bytes")]
    Misaligned {
        /// Which part.
        part: &'static str,
        /// What it should be aligned to.
        alignment: usize,
    },
}

/// How a ring lies in memory: VIRTIO_F_RING_PACKED was negotiated, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingLayout {
    /// A descriptor table, an avail ring, a used ring.
    Split,
    /// One ring of descriptors, and a structure for each side to say which events it wants to hear of.
    Packed,
}

impl RingLayout {
    /// Whether a queue of `size` may be laid out so.
    pub const fn allows(self, size: u16) -> bool {
        let counted = size > 0 && size <= MAX_QUEUE_SIZE;
        counted && (matches!(self, RingLayout::Packed) || size.is_power_of_two())
    }

    /// Size in bytes, and alignment, of the avail ring or the driver's event suppression structure.
    pub const fn driver_area(self, size: u16) -> (u32, usize) {
        match self {
            RingLayout::Split => (avail_ring_bytes(size), 2),
            RingLayout::Packed => (EVENT_SUPPRESSION_BYTES, 4),
        }
    }

    /// Size in bytes, and alignment, of the used ring or the device's event suppression structure.
    pub const fn device_area(self, size: u16) -> (u32, usize) {
        match self {
            RingLayout::Split => (used_ring_bytes(size), 4),
            RingLayout::Packed => (EVENT_SUPPRESSION_BYTES, 4),
        }
    }
}

/// Virtio 1.2, 2.8.14 "Event Suppression Structure Format".
const EVENT_SUPPRESSION_BYTES: u32 = 4;

/// The position at which a packed ring starts: entry 0, the wrap counter 1.
pub const PACKED_START: u16 = 1 << 15;

/// Everything a queue consists of. The addresses are where this process sees the parts.
#[derive(Debug, Clone, Copy)]
pub struct VirtqueueConfig {
    /// How the ring lies in memory.
    pub layout: RingLayout,
    /// Number of descriptors: at most [`MAX_QUEUE_SIZE`], a power of two in a split ring.
    pub size: u16,
    /// The descriptors: [`descriptor_table_bytes`], aligned to 16.
    pub descriptor_table: NonNull<u8>,
    /// The avail ring or the driver's event suppression structure: [`RingLayout::driver_area`].
    pub avail: NonNull<u8>,
    /// The used ring or the device's event suppression structure: [`RingLayout::device_area`].
    pub used: NonNull<u8>,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// The avail index of the first request to take. In a packed ring the entry, and its wrap counter in bit 15.
    pub next_avail: u16,
    /// The used index of the first request to give back; see [`used_index`]. In a packed ring the same as `next_avail`.
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

/// Where a packed ring's last device left it, if that can be told from the ring: where a back-end that takes the ring
/// over goes on. A ring that its driver cleared since says nothing.
///
/// # Errors
/// As [`Virtqueue::new`].
///
/// # Safety
/// As of [`Virtqueue::new`].
pub unsafe fn packed_position(config: VirtqueueConfig) -> Result<Option<u16>, QueueError> {
    config.check()?;
    // SAFETY: this function's contract, and checked just now.
    let ring = unsafe { PackedRing::new(&config) };
    Ok(ring.left_at())
}

impl VirtqueueConfig {
    fn check(&self) -> Result<(), QueueError> {
        let Self { layout, size, .. } = *self;
        if !layout.allows(size) {
            return Err(QueueError::Size(size));
        }
        for (part, address, alignment) in [
            ("descriptor table", self.descriptor_table, 16),
            ("avail ring", self.avail, layout.driver_area(size).1),
            ("used ring", self.used, layout.device_area(size).1),
        ] {
            if !address.addr().get().is_multiple_of(alignment) {
                return Err(QueueError::Misaligned { part, alignment });
            }
        }
        let (next_avail, next_used) = (self.next_avail, self.next_used);
        // Requests that another device has in flight are known to nobody here.
        let sound = is_position(next_avail, size) && next_avail == next_used;
        if layout == RingLayout::Packed && !sound {
            return Err(QueueError::Position {
                size,
                next_avail,
                next_used,
            });
        }
        Ok(())
    }
}

/// What one layout of a ring has to say. Static dispatch: see [`Virtqueue`].
pub(super) trait Ring {
    type Layout: Layout;

    /// The number of descriptors.
    fn size(&self) -> u16;
    /// What GET_VRING_BASE reports once the queue has drained.
    fn base(&self) -> u32;
    /// Entries taken and not yet given back.
    fn in_flight(&self) -> u16;
    /// Where descriptors are read.
    fn table(&self) -> DescriptorTable;
    /// Whether any can be taken.
    fn has_request(&self) -> bool;
    /// How many requests can be taken, at most.
    fn available(&mut self) -> Result<u16, RingError>;
    /// Where the next chain starts, and its first descriptor.
    fn first(&mut self, heads: &Heads) -> Result<Option<(u16, Descriptor)>, RingError>;
    /// Takes the next chain if it has three buffers and `accept` makes something of them. `None` if it does not, or if
    /// something is wrong with the chain or the ring: nothing has changed then.
    fn three<const N: usize, A: AcceptThree>(
        &mut self,
        indirect: bool,
        heads: &mut Heads,
        memory: &MainRegion<N>,
        accept: A,
    ) -> Option<A::Accepted>;
    /// Steps over the chain that started at `first` and puts its head in flight: the head, checked. Of a ring that has
    /// heads at the end of chains, the chain was walked before.
    fn take(&mut self, at: u16, chain: &Chain, heads: &mut Heads) -> Result<u16, RingError>;
    /// Fills the next used entry for a head that took `entries`.
    fn push_used(&mut self, head: u16, entries: u16, len: u32);
    /// Shows the guest all used entries filled so far.
    fn publish_used(&mut self);
    /// How many entries were published since the last decision.
    fn decide(&mut self) -> u16;
    /// Whether the guest wants a signal for the last `fresh` entries published.
    fn wants_signal(&self, fresh: u16) -> bool;
    /// Tells the guest not to kick.
    fn suppress_kicks(&mut self);
    /// Tells the guest to kick at the next request.
    fn request_kicks(&mut self);
}

/// Which heads are in flight: the entries that each took in the ring, 0 when it is not in flight. A number each: nothing
/// is shifted, and heads come back last in, first out.
#[derive(Debug)]
pub(super) struct Heads([u16; MAX_QUEUE_SIZE as usize]);

impl Heads {
    /// The place of a checked head in the table.
    #[inline]
    fn place(head: u16) -> usize {
        // The modulo changes nothing (heads are less than the queue size) and spares a bounds check.
        usize::from(head) % usize::from(MAX_QUEUE_SIZE)
    }

    #[inline]
    pub(super) fn in_flight(&self, head: u16) -> bool {
        self.0[Self::place(head)] != 0
    }

    #[inline]
    pub(super) fn take(&mut self, head: u16, entries: u16) {
        self.0[Self::place(head)] = entries;
    }

    #[inline]
    pub(super) fn give_back(&mut self, head: u16) -> u16 {
        std::mem::take(&mut self.0[Self::place(head)])
    }
}

#[derive(Debug)]
enum AnyRing {
    Split(SplitRing),
    Packed(PackedRing),
}

/// The same for either layout, compiled for each.
macro_rules! on_ring {
    ($ring:expr, $name:ident => $do:expr) => {
        match $ring {
            AnyRing::Split($name) => $do,
            AnyRing::Packed($name) => $do,
        }
    };
}

/// A virtqueue that is running: it can only be built complete.
///
/// The fields of every turn are in the first two cache lines.
#[derive(Debug)]
#[repr(C, align(64))]
pub struct Virtqueue {
    ring: AnyRing,
    indirect: bool,
    /// Signal at the next publication whatever the guest says.
    signal_requested: bool,
    heads: Heads,
}

// SAFETY: a virtqueue is moved by value, and every method takes it exclusively; its pointers name memory that is
// reachable from every thread (contract of `new`).
unsafe impl Send for Virtqueue {}

impl Virtqueue {
    /// Starts serving a queue.
    ///
    /// # Errors
    /// A size or a position we do not serve, or a misaligned part.
    ///
    /// # Safety
    /// - The three parts are mapped readable and writable in their whole length ([`descriptor_table_bytes`],
    ///   [`RingLayout::driver_area`], [`RingLayout::device_area`]) as long as this value lives (I2), and no Rust
    ///   reference to them exists, atomics apart.
    /// - Nobody else in this process serves the same queue at the same time.
    pub unsafe fn new(config: VirtqueueConfig) -> Result<Self, QueueError> {
        config.check()?;
        // SAFETY: this function's contract, and checked just now.
        let ring = unsafe {
            match config.layout {
                RingLayout::Split => AnyRing::Split(SplitRing::new(&config)),
                RingLayout::Packed => AnyRing::Packed(PackedRing::new(&config)),
            }
        };
        Ok(Self {
            ring,
            indirect: config.indirect,
            signal_requested: false,
            heads: Heads([0; MAX_QUEUE_SIZE as usize]),
        })
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        on_ring!(&self.ring, ring => ring.size())
    }

    /// What GET_VRING_BASE reports once the queue has drained: the avail index of the next request to take. Of a packed
    /// ring its entry and wrap counter (bit 15), and the same for the next used one in the upper half.
    pub fn base(&self) -> u32 {
        on_ring!(&self.ring, ring => ring.base())
    }

    /// Entries of the ring that belong to heads taken and not yet given back: one a head, or its descriptors in a packed
    /// ring.
    pub fn in_flight(&self) -> u16 {
        on_ring!(&self.ring, ring => ring.in_flight())
    }

    /// Heads taken and not yet given back. Counted: not for every turn.
    #[cold]
    pub fn heads_in_flight(&self) -> usize {
        let heads = &self.heads.0[..usize::from(self.size())];
        heads.iter().filter(|entries| **entries != 0).count()
    }

    /// Whether [`Self::available`] would find anything: one load, and nothing is checked.
    #[inline(always)]
    pub fn has_request(&self) -> bool {
        on_ring!(&self.ring, ring => ring.has_request())
    }

    /// How many requests can be taken now; of a packed ring, 0 if there is none, else at most so many. Once per turn: it is
    /// the load that ping-pongs with the guest's core.
    ///
    /// # Errors
    /// An avail index that ran backwards or too far: the ring is broken.
    #[inline]
    pub fn available(&mut self) -> Result<u16, RingError> {
        on_ring!(&mut self.ring, ring => ring.available())
    }

    /// Takes the next request that [`Self::available`] counted and resolves its descriptors into `chain`; false
    /// if there is none. Whoever lacks room for a request does not call this.
    ///
    /// # Errors
    /// The ring is broken; `chain` is then meaningless, and its head is not in flight, so that the ring drains without it.
    /// A chain that is merely malformed is no error: it shows in [`Chain::fault`], and its head must go back like any
    /// other (I5).
    #[inline]
    pub fn pop(&mut self, memory: &GuestMemory, chain: &mut Chain) -> Result<bool, RingError> {
        let (indirect, heads) = (self.indirect, &mut self.heads);
        on_ring!(&mut self.ring, ring => pop(ring, heads, indirect, memory, chain))
    }

    /// Which layout the ring has.
    #[inline(always)]
    pub fn layout(&self) -> RingLayout {
        match self.ring {
            AnyRing::Split(_) => RingLayout::Split,
            AnyRing::Packed(_) => RingLayout::Packed,
        }
    }

    /// [`Self::pop`] in short for a request as drivers build most, from a ring that is known to be `PACKED` or not: whoever
    /// takes several asks once. `None` for any other request or ring, for a request with anything amiss, and when there is
    /// none: nothing has changed then, [`Self::pop`] reads it anew, and only what that reads counts (I6).
    #[inline(always)]
    pub fn pop_sole<const N: usize, const PACKED: bool>(
        &mut self,
        memory: &MainRegion<N>,
    ) -> Option<Sole<N>> {
        self.pop_three::<N, PACKED, _>(memory, AsSole(memory))
    }

    /// The same for a request with an answer of `A` bytes, if `taker` makes something of it too.
    #[inline(always)]
    pub fn pop_exchange<const N: usize, const A: usize, const PACKED: bool, T>(
        &mut self,
        memory: &MainRegion<N>,
        taker: T,
    ) -> Option<T::Accepted>
    where
        T: AcceptExchange<N, A>,
    {
        self.pop_three::<N, PACKED, _>(memory, AsExchange::<N, A, T> { memory, taker })
    }

    /// The same, where requests may be for somebody else.
    #[inline(always)]
    pub fn pop_routed<const N: usize, const A: usize, const PACKED: bool, R, T>(
        &mut self,
        memory: &MainRegion<N>,
        route: R,
        taker: T,
    ) -> Option<Routed<T::Accepted>>
    where
        R: Route,
        T: AcceptExchange<N, A>,
    {
        let here = AsExchange::<N, A, T> { memory, taker };
        self.pop_three::<N, PACKED, _>(memory, AsRouted { route, here })
    }

    #[inline(always)]
    fn pop_three<const N: usize, const PACKED: bool, A: AcceptThree>(
        &mut self,
        memory: &MainRegion<N>,
        accept: A,
    ) -> Option<A::Accepted> {
        let (indirect, heads) = (self.indirect, &mut self.heads);
        match (&mut self.ring, PACKED) {
            (AnyRing::Split(ring), false) => ring.three(indirect, heads, memory, accept),
            (AnyRing::Packed(ring), true) => ring.three(indirect, heads, memory, accept),
            _ => None,
        }
    }

    /// Gives `head` back with `len` bytes written into its writable buffers. The guest sees it after the next
    /// [`Self::publish_used`].
    ///
    /// # Panics
    /// When `head` is not in flight: our own error (I5), never the guest's.
    #[inline(always)]
    pub fn push_used(&mut self, head: HeadIndex, len: u32) {
        let entries = self.heads.give_back(head.0);
        assert!(entries != 0, "head given back twice");
        on_ring!(&mut self.ring, ring => ring.push_used(head.0, entries, len));
    }

    /// Shows the guest everything given back so far. Once per batch: it writes what the guest polls.
    #[inline]
    pub fn publish_used(&mut self) {
        on_ring!(&mut self.ring, ring => ring.publish_used());
    }

    /// Whether the guest wants to be signalled about what was published since the last call. Call it after
    /// [`Self::publish_used`], once per batch, and signal when it says so.
    #[inline]
    pub fn needs_signal(&mut self) -> bool {
        let fresh = on_ring!(&mut self.ring, ring => ring.decide());
        if std::mem::take(&mut self.signal_requested) {
            return true;
        }
        if fresh == 0 {
            return false;
        }
        // Pairs with the driver's full barrier between asking for a signal (used_event, flags) and looking at
        // the used ring again: either it sees our entries, or we see its request. Without, both may look away.
        if !canary("no-event-fence") {
            fence(SeqCst);
        }
        on_ring!(&self.ring, ring => ring.wants_signal(fresh))
    }

    /// Makes the next [`Self::needs_signal`] say yes. After a restart nobody knows which signals the guest got
    /// from our predecessor: one spurious interrupt costs less than a lost one.
    pub fn request_signal(&mut self) {
        self.signal_requested = true;
    }

    /// Tells the guest not to kick: the ring is polled. Once after the start is enough, and after each
    /// [`Self::request_kicks`].
    pub fn suppress_kicks(&mut self) {
        on_ring!(&mut self.ring, ring => ring.suppress_kicks());
    }

    /// For whoever wants to sleep: tells the guest to kick at the next request, then looks once more. `true` when there is
    /// a request already: no kick may follow for it.
    ///
    /// # Errors
    /// As [`Self::available`].
    pub fn request_kicks(&mut self) -> Result<bool, RingError> {
        let late = canary("look-before-kicks");
        let before = late && self.available()? > 0;
        on_ring!(&mut self.ring, ring => ring.request_kicks());
        // Pairs with the driver's full barrier between making a request available and asking whether to kick: either we
        // see the request, or it sees that we want to be kicked.
        if !canary("no-kick-fence") {
            fence(SeqCst);
        }
        Ok(before || (!late && self.available()? > 0))
    }
}

/// [`Virtqueue::pop`] on one layout.
#[inline]
fn pop<R: Ring>(
    ring: &mut R,
    heads: &mut Heads,
    indirect: bool,
    memory: &GuestMemory,
    chain: &mut Chain,
) -> Result<bool, RingError> {
    let Some((head, first)) = ring.first(heads)? else {
        return Ok(false);
    };
    chain.walk::<R::Layout>(head, first, ring.table(), indirect, memory)?;
    chain.set_head(HeadIndex(ring.take(head, chain, heads)?));
    Ok(true)
}
