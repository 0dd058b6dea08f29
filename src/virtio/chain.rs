//! One request's descriptors, copied out of the ring and resolved: readable segments, then writable ones.
//!
//! Promises that each descriptor is read once (I6), that the walk ends after at most queue-size descriptors (I8)
//! whatever the guest wrote, and that nothing is allocated after [`Chain::new`]. Framing does not matter to what
//! comes behind: a header is the first bytes of the readable part however many descriptors it takes, a status is
//! the last byte of the writable part. Does not know what the bytes mean. Start at [`Chain::readable`]; the walk
//! itself is `Chain::walk`.
//!
//! There is one walk for both kinds of ring, in the words of the split one: NEXT, WRITE, INDIRECT, `next`. What an entry
//! of the other kind means in them is a `Layout`'s to say.

use super::memory::{
    AnswerPlace, Gpa, GuestMemory, MainRegion, SOLE_TABLE_BYTES, Segment, StatusByte, Unread,
};
use super::relay::RelayDriver;
#[cfg(not(all(test, loom)))]
use super::shared::AtomicU32;
use super::shared::AtomicU64;
use super::virtqueue::{HeadIndex, RingError};
use std::ptr::NonNull;
use std::sync::atomic::Ordering::Relaxed;

/// Virtio 1.2, 2.7.5 "The Virtqueue Descriptor Table": the size of an entry.
pub(super) const DESCRIPTOR_BYTES: u32 = 16;
pub(super) const DESC_F_NEXT: u16 = 1;
pub(super) const DESC_F_WRITE: u16 = 2;
pub(super) const DESC_F_INDIRECT: u16 = 4;

/// A chain that cannot be carried out. Its head goes back with used length 0, and IOERR into the status byte if
/// [`Chain::take_status`] still finds one. The ring itself is sound.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChainFault {
    /// More descriptors than the queue has entries: a loop, or a chain no driver may build.
    TooLong,
    /// The chain continues at an entry outside its table.
    NextOutOfRange,
    /// A buffer lies, wholly or in part, in no region of guest memory.
    Unmapped,
    /// The end address of a buffer or table does not fit 64 bits.
    Wraps,
    /// A readable buffer behind a writable one.
    ReadableAfterWritable,
    /// A descriptor of an indirect table points to another table.
    NestedIndirect,
    /// A descriptor points to a table and continues as well.
    IndirectWithNext,
    /// The length of an indirect table is no positive multiple of 16.
    IndirectLength,
    /// An indirect table with more entries than the queue.
    IndirectTooLong,
    /// An indirect table lies, wholly or in part, in no region of guest memory.
    IndirectUnmapped,
    /// 4 GiB of buffers or more: used lengths have 32 bits.
    TotalLength,
    /// The buffers touch more pieces of guest regions than were preallocated.
    TooManySegments,
}

/// The ends of a request's chain, taken off it: what is left is its data.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends<const N: usize> {
    /// Where the status goes: the last writable byte.
    pub status: Option<StatusByte>,
    /// The first `N` readable bytes.
    pub header: Option<[u8; N]>,
}

/// A request as drivers build most of them: a header of `N` bytes, one buffer and a status, each in a descriptor of its
/// own and in the largest region.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sole<const N: usize> {
    /// What goes back to the used ring.
    pub head: HeadIndex,
    /// The header, copied once (I6).
    pub header: [u8; N],
    /// Where the device sees the buffer.
    pub dma: u64,
    /// Its length: not 0, and short enough that it and the ends' fit 32 bits together.
    pub len: u32,
    /// The device fills the buffer.
    pub writable: bool,
    /// Where the status goes.
    pub status: StatusByte,
}

/// Our copy of one descriptor, in the words that its kind of ring has: the flags are in the upper one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub(super) gpa: Gpa,
    pub(super) len: u32,
    pub(super) upper: u32,
}

/// A request with an answer of `A` bytes, and else like [`Sole`]: the answer stands before the data if that is for the
/// guest, and behind it if not.
#[derive(Debug, Clone, Copy)]
pub struct SoleExchange<const N: usize, const A: usize> {
    /// What goes back to the used ring.
    pub head: HeadIndex,
    /// The header.
    pub header: Unread<N>,
    /// Where the device sees the data.
    pub dma: u64,
    /// Its length: not 0, and short enough that it and the ends' fit 32 bits together.
    pub len: u32,
    /// Where the answer goes.
    pub answer: AnswerPlace<A>,
}

/// Who takes such a request off the ring, if it can make something of it: a call for either direction, so that each is
/// compiled by itself.
pub trait AcceptExchange<const N: usize, const A: usize> {
    /// What it makes.
    type Accepted;

    /// `WRITE`: the data is for the device.
    fn accept<const WRITE: bool>(self, exchange: SoleExchange<N, A>) -> Option<Self::Accepted>;
}

/// Three descriptors: a readable one, one of either kind, a writable one. Nothing is known of the places yet.
#[derive(Debug, Clone, Copy)]
pub(super) struct ThreeEntries {
    pub(super) first: Entry,
    pub(super) second: Entry,
    pub(super) third: Entry,
    /// The second one is.
    pub(super) writable: bool,
}

/// What makes something of three descriptors, if it can.
// A trait and no closure: closures are not always inlined, which costs a request dozens of instructions.
pub(super) trait AcceptThree {
    type Accepted;

    fn accept(self, head: HeadIndex, entries: ThreeEntries) -> Option<Self::Accepted>;
}

/// [`Sole`] ones.
pub(super) struct AsSole<'a, const N: usize>(pub(super) &'a MainRegion<N>);

impl<const N: usize> AcceptThree for AsSole<'_, N> {
    type Accepted = Sole<N>;

    #[inline(always)]
    fn accept(self, head: HeadIndex, entries: ThreeEntries) -> Option<Sole<N>> {
        entries.sole(head, self.0)
    }
}

/// Those that a [`AcceptExchange`] takes.
pub(super) struct AsExchange<'a, const N: usize, const A: usize, T> {
    pub(super) memory: &'a MainRegion<N>,
    pub(super) taker: T,
}

impl<const N: usize, const A: usize, T: AcceptExchange<N, A>> AcceptThree
    for AsExchange<'_, N, A, T>
{
    type Accepted = T::Accepted;

    #[inline(always)]
    fn accept(self, head: HeadIndex, entries: ThreeEntries) -> Option<T::Accepted> {
        let Self { memory, taker } = self;
        match entries.writable {
            true => taker.accept::<false>(entries.exchange::<N, A, true>(head, memory)?),
            false => taker.accept::<true>(entries.exchange::<N, A, false>(head, memory)?),
        }
    }
}

/// Where a request goes by its first bytes. A trait and no closure, as `AcceptThree`.
pub trait Route {
    /// By what it is handed over; `None` if it is not.
    fn route(&mut self, first: [u8; 8]) -> Option<&mut RelayDriver>;
}

/// What became of a request that may be handed over.
#[derive(Debug)]
pub enum Routed<T> {
    /// It stays here.
    Here(T),
    /// It went elsewhere.
    HandedOver,
}

/// Those that go elsewhere, and those that `here` takes.
pub(super) struct AsRouted<'a, const N: usize, const A: usize, R, T> {
    pub(super) route: R,
    pub(super) here: AsExchange<'a, N, A, T>,
}

impl<const N: usize, const A: usize, R, T> AcceptThree for AsRouted<'_, N, A, R, T>
where
    R: Route,
    T: AcceptExchange<N, A>,
{
    type Accepted = Routed<T::Accepted>;

    #[inline(always)]
    fn accept(mut self, head: HeadIndex, entries: ThreeEntries) -> Option<Self::Accepted> {
        let header = self.here.memory.unread(entries.first.gpa)?;
        match self.route.route(header.read::<0>()) {
            // Whoever gets it reads it anew.
            Some(relay) => relay
                .hand_over_three(head, &entries)
                .then_some(Routed::HandedOver),
            None => self.here.accept(head, entries).map(Routed::Here),
        }
    }
}

impl ThreeEntries {
    /// Header, data and status. `None` where the long way has to look.
    #[inline(always)]
    fn sole<const N: usize>(self, head: HeadIndex, memory: &MainRegion<N>) -> Option<Sole<N>> {
        let (header, data, status) = (self.first, self.second, self.third);
        if header.len as usize != N || status.len != 1 {
            return None;
        }
        // The ends and the data fit the 32 bits of a used length together.
        if u64::from(data.len) + N as u64 + 1 > u64::from(u32::MAX) {
            return None;
        }
        let header = memory.header(header.gpa)?;
        let dma = memory.data(data.gpa, data.len)?;
        let status = memory.status(status.gpa)?;
        // Drivers have header and status side by side: their line comes once, to be read and written.
        status.prefetch();
        let mut bytes = [0; N];
        header.read_once(&mut bytes);
        Some(Sole {
            head,
            header: bytes,
            dma,
            len: data.len,
            writable: self.writable,
            status,
        })
    }

    /// Header, data and answer of one that brings data or, if `WRITABLE`, wants some. `None` where the long way has to look.
    #[inline(always)]
    fn exchange<const N: usize, const A: usize, const WRITABLE: bool>(
        self,
        head: HeadIndex,
        memory: &MainRegion<N>,
    ) -> Option<SoleExchange<N, A>> {
        let (answer, data) = match WRITABLE {
            true => (self.second, self.third),
            false => (self.third, self.second),
        };
        if self.first.len as usize != N || answer.len as usize != A {
            return None;
        }
        // As above.
        if u64::from(data.len) + (N + A) as u64 > u64::from(u32::MAX) {
            return None;
        }
        Some(SoleExchange {
            head,
            header: memory.unread(self.first.gpa)?,
            dma: memory.data(data.gpa, data.len)?,
            len: data.len,
            answer: memory.answer(answer.gpa)?,
        })
    }
}

/// Our copy of one descriptor.
#[derive(Debug, Clone, Copy)]
pub(super) struct Descriptor {
    pub(super) gpa: Gpa,
    pub(super) len: u32,
    pub(super) flags: u16,
    /// The entry at which the chain goes on, if it does.
    pub(super) next: u16,
    /// The buffer id, in a ring that has them.
    pub(super) id: u16,
}

/// How the entries of one kind of ring are to be read. The walk is compiled for each.
pub(super) trait Layout {
    /// A chain's entries stand one behind the other in the ring, and the last one says which head it is.
    const CONSECUTIVE: bool;

    /// Entry `index` of the `count` in the ring, from its two words in host order.
    fn in_ring(words: [u64; 2], index: u16, count: u16) -> Descriptor;

    /// Entry `index` of the `count` in an indirect table.
    fn in_table(words: [u64; 2], index: u16, count: u16) -> Descriptor;

    /// The three entries of an indirect table, if they are a readable one, one of either kind and a writable one, in this
    /// order.
    fn three_in_table(entries: [Entry; 3]) -> Option<ThreeEntries>;
}

/// What a chain takes of its ring.
#[derive(Debug, Clone, Copy)]
pub(super) struct RingPart {
    /// Its head, not checked.
    pub(super) head: u16,
    /// Its entries in the ring, at most one more than the ring has. An indirect table is one.
    pub(super) entries: u16,
}

impl Descriptor {
    const fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }
}

/// A contiguous, 8-byte aligned table of descriptors in guest memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct DescriptorTable {
    base: NonNull<AtomicU64>,
    count: u16,
}

impl DescriptorTable {
    /// # Safety
    /// `count` descriptors at `base`, which is aligned to 8, stay mapped as long as this value is used (I2).
    pub(super) const unsafe fn new(base: NonNull<AtomicU64>, count: u16) -> Self {
        Self { base, count }
    }

    /// The three entries of the indirect table that `pointer` names, each word read once (I6), if it has so many and lies
    /// aligned in the largest region: what drivers make of a request with one buffer.
    #[inline(always)]
    pub(super) fn three_of<const N: usize>(
        pointer: Entry,
        memory: &MainRegion<N>,
    ) -> Option<[Entry; 3]> {
        if pointer.len as usize != SOLE_TABLE_BYTES {
            return None;
        }
        let place = memory.table(pointer.gpa)?.cast::<AtomicU64>();
        if !place.is_aligned() {
            return None;
        }
        // SAFETY: three entries of one mapped region (`table`), aligned, read at once.
        let table = unsafe { DescriptorTable::new(place, 3) };
        Some([table.entry(0)?, table.entry(1)?, table.entry(2)?])
    }

    /// Copies entry `index`; `None` outside the table.
    #[cfg(not(all(test, loom)))]
    #[inline(always)]
    pub(super) fn entry(&self, index: u16) -> Option<Entry> {
        if index >= self.count {
            return None;
        }
        // SAFETY: as in `read`. The second word is read in halves, each once: they are used apart from each other.
        let (address, len, upper) = unsafe {
            let entry = self.base.add(2 * usize::from(index));
            let halves = entry.add(1).cast::<AtomicU32>();
            (entry.as_ref(), halves.as_ref(), halves.add(1).as_ref())
        };
        Some(Entry {
            gpa: Gpa(u64::from_le(address.load(Relaxed))),
            len: u32::from_le(len.load(Relaxed)),
            upper: u32::from_le(upper.load(Relaxed)),
        })
    }

    /// The checker knows words of one size each.
    #[cfg(all(test, loom))]
    pub(super) fn entry(&self, index: u16) -> Option<Entry> {
        let [address, rest] = self.read(index)?;
        Some(Entry {
            gpa: Gpa(address),
            len: (rest & 0xffff_ffff) as u32,
            upper: (rest >> 32) as u32,
        })
    }

    /// The number of entries.
    #[inline]
    pub(super) const fn count(&self) -> u16 {
        self.count
    }

    /// Copies entry `index`, two words in host order; `None` outside the table.
    #[inline]
    pub(super) fn read(&self, index: u16) -> Option<[u64; 2]> {
        if index >= self.count {
            return None;
        }
        // SAFETY: `index < count` (checked above) and the table is `count * 16` mapped, aligned bytes (`new`).
        // References to atomics are the one kind that guest memory is reached through (I1).
        let [address, rest] = unsafe {
            let entry = self.base.add(2 * usize::from(index));
            [entry.as_ref(), entry.add(1).as_ref()]
        };
        // Relaxed: an acquire load, of avail.idx or of the flags of the chain's first descriptor, ordered them after the
        // guest's writes.
        Some([
            u64::from_le(address.load(Relaxed)),
            u64::from_le(rest.load(Relaxed)),
        ])
    }

    /// Copies the address of entry `index` alone; `None` outside the table.
    #[inline]
    pub(super) fn address(&self, index: u16) -> Option<u64> {
        if index >= self.count {
            return None;
        }
        // SAFETY: as in `read`.
        let address = unsafe { self.base.add(2 * usize::from(index)).as_ref() };
        Some(u64::from_le(address.load(Relaxed)))
    }

    /// The second word of entry `index`: where a packed ring's flags are. The index is taken modulo the count.
    #[inline]
    pub(super) fn control_word(&self, index: u16) -> &AtomicU64 {
        let index = usize::from(if index < self.count { index } else { 0 });
        // SAFETY: within the table, as in `read`: no table is empty that has entries to be asked for (`new` of the rings).
        unsafe { self.base.add(2 * index + 1).as_ref() }
    }
}

/// How the walk over one table ended.
enum Ended {
    /// At a descriptor without NEXT, with this buffer id: the whole chain is known.
    Complete(u16),
    /// Somewhere else: what would be the last writable byte is not known.
    Broken,
    /// At a pointer to an indirect table.
    Indirect(Descriptor),
}

/// The descriptors of one request. Built once per queue, filled by `Virtqueue::pop`, consumed from both ends.
#[derive(Debug)]
pub struct Chain {
    segments: Box<[Segment]>,
    /// `segments[front..split]` are readable, `segments[split..end]` writable.
    front: usize,
    split: usize,
    end: usize,
    readable_len: u64,
    writable_len: u64,
    fault: Option<ChainFault>,
    /// Where a faulty chain's status goes.
    fault_status: Option<StatusByte>,
    head: HeadIndex,
    /// What it takes of its ring.
    part: RingPart,
}

impl Chain {
    /// An empty chain with room for `max_segments` pieces of guest regions, the header's and the status'
    /// included. One more than the queue size serves every buffer of a chain with a region boundary in one.
    pub fn new(max_segments: usize) -> Self {
        Self {
            segments: vec![Segment::EMPTY; max_segments].into(),
            front: 0,
            split: 0,
            end: 0,
            readable_len: 0,
            writable_len: 0,
            fault: None,
            fault_status: None,
            head: HeadIndex::default(),
            part: RingPart {
                head: 0,
                entries: 0,
            },
        }
    }

    /// The head of the chain popped last: what goes back to the used ring.
    #[inline]
    pub const fn head(&self) -> HeadIndex {
        self.head
    }

    /// What the chain walked last takes of its ring; of a split ring, one entry and nothing else.
    #[inline]
    pub(super) const fn ring_part(&self) -> RingPart {
        self.part
    }

    #[inline]
    pub(super) fn set_head(&mut self, head: HeadIndex) {
        self.head = head;
    }

    /// Why the chain cannot be carried out, if so. It then shows no segments.
    #[inline]
    pub const fn fault(&self) -> Option<ChainFault> {
        self.fault
    }

    /// The readable segments, then the writable ones, without what was taken off.
    #[inline]
    pub fn segments(&self) -> &[Segment] {
        &self.segments[self.front..self.end]
    }

    /// What the guest filled for the device: the data of a write.
    #[inline]
    pub fn readable(&self) -> &[Segment] {
        &self.segments[self.front..self.split]
    }

    /// What the device is to fill: the data of a read.
    #[inline]
    pub fn writable(&self) -> &[Segment] {
        &self.segments[self.split..self.end]
    }

    /// Bytes in [`Self::readable`].
    #[inline]
    pub const fn readable_len(&self) -> u64 {
        self.readable_len
    }

    /// Bytes in [`Self::writable`]. With the readable ones they are fewer than 2^32.
    #[inline]
    pub const fn writable_len(&self) -> u64 {
        self.writable_len
    }

    /// Copies the first `N` readable bytes and takes nothing off. `None` if there are fewer. Whoever reads them again may find
    /// others (I6): a hint.
    #[must_use]
    pub fn peek<const N: usize>(&self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        let mut done = 0;
        for segment in self.readable() {
            done += segment.read_once(&mut bytes[done..]);
        }
        (done == N).then_some(bytes)
    }

    /// Takes the first `N` readable bytes off: a header, copied once (I6) however it was framed. `None` if there
    /// are fewer, and then nothing was taken.
    #[inline]
    pub fn take_front<const N: usize>(&mut self) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        self.take_readable(&mut bytes).then_some(bytes)
    }

    /// Takes the first readable bytes off, as many as `out` has, each read once (I6). False if there are fewer, and then
    /// nothing was taken.
    #[inline]
    #[must_use]
    pub fn take_readable(&mut self, out: &mut [u8]) -> bool {
        let Some(left) = self.readable_len.checked_sub(out.len() as u64) else {
            return false;
        };
        self.readable_len = left;
        let mut done = 0;
        while done < out.len() {
            let segment = &mut self.segments[self.front];
            let copied = segment.read_once(&mut out[done..]);
            done += copied;
            if copied == segment.len() as usize {
                self.front += 1;
            } else {
                // No control structure comes near 4 GiB.
                *segment = segment.suffix(u32::try_from(copied).unwrap_or(u32::MAX));
            }
        }
        true
    }

    /// Takes the first `len` writable bytes off and says in how many of `pieces` they are. `None` if there are fewer
    /// bytes, or more pieces, and then nothing was taken.
    #[must_use]
    pub fn take_writable(&mut self, len: u32, pieces: &mut [Segment]) -> Option<usize> {
        let after = self.writable_len.checked_sub(len.into())?;
        let mut left = len;
        let mut count = 0;
        let mut at = self.split;
        let mut rest = None;
        while left > 0 {
            let segment = self.segments[..self.end].get(at)?;
            let taken = segment.prefix(left);
            *pieces.get_mut(count)? = taken;
            count += 1;
            left -= taken.len();
            if taken.len() == segment.len() {
                at += 1;
            } else {
                rest = Some(segment.suffix(taken.len()));
            }
        }
        // What is left stands behind the readable ones, which move up to it.
        if let Some(rest) = rest {
            self.segments[at] = rest;
        }
        let gone = at - self.split;
        if gone > 0 && self.front < self.split {
            self.segments
                .copy_within(self.front..self.split, self.front + gone);
        }
        self.front += gone;
        self.split = at;
        self.writable_len = after;
        Some(count)
    }

    /// Takes the last writable byte off: the status of a block request. Of a faulty chain too, where it could be
    /// located. `None` if there is none.
    #[inline]
    pub fn take_status(&mut self) -> Option<StatusByte> {
        if self.fault.is_some() {
            return self.fault_status.take();
        }
        if self.split == self.end {
            return None;
        }
        let last = &mut self.segments[self.end - 1];
        let status = last.last_byte()?;
        self.writable_len -= 1;
        if last.len() == 1 {
            self.end -= 1;
        } else {
            *last = last.prefix(last.len() - 1);
        }
        Some(status)
    }

    /// Takes the status and the first `N` readable bytes off.
    pub fn take_ends<const N: usize>(&mut self) -> Ends<N> {
        Ends {
            status: self.take_status(),
            header: self.take_front(),
        }
    }

    /// Makes a request that was taken off the ring the short way the chain that the long way makes of it, its ends taken
    /// off. `memory` is what it was found in.
    #[cold]
    pub fn hold<const N: usize>(&mut self, sole: &Sole<N>, memory: &MainRegion<N>) -> Ends<N> {
        self.front = 0;
        self.end = 0;
        if let Some(slot) = self.segments.first_mut() {
            *slot = memory.segment(sole.dma, sole.len);
            self.end = 1;
        }
        let len = u64::from(sole.len);
        (self.split, self.readable_len, self.writable_len) = match sole.writable {
            true => (0, 0, len),
            false => (self.end, len, 0),
        };
        self.fault = None;
        self.head = sole.head;
        Ends {
            status: Some(sole.status),
            header: Some(sole.header),
        }
    }

    /// Fills the chain from its descriptor `first` on. An error is one of the ring; a fault of the chain alone is kept.
    ///
    /// Descriptors that hold buffers count towards the bound; the one that leads to an indirect table does not.
    #[inline]
    pub(super) fn walk<L: Layout>(
        &mut self,
        head: u16,
        first: Descriptor,
        table: DescriptorTable,
        indirect_negotiated: bool,
        memory: &GuestMemory,
    ) -> Result<(), RingError> {
        let mut walk = Walk {
            memory,
            segments: &mut self.segments,
            split: 0,
            end: 0,
            readable_len: 0,
            writable_len: 0,
            last_writable: (Gpa(0), 0),
            budget: table.count,
            fault: None,
        };
        let mut ended = walk.table(first, false, |index| {
            Some(L::in_ring(table.read(index)?, index, table.count))
        });
        // At most as many as the budget was, and the pointer to a table.
        let mut part = RingPart {
            head,
            entries: table.count - walk.budget,
        };
        match ended {
            Ended::Complete(id) if L::CONSECUTIVE => part.head = id,
            // Where the next chain starts, and what to give back for this one, nobody knows.
            Ended::Broken if L::CONSECUTIVE => {
                return Err(RingError::EndlessChain { at: head });
            }
            Ended::Complete(_) | Ended::Broken => {}
            Ended::Indirect(pointer) => {
                if L::CONSECUTIVE {
                    part.head = pointer.id;
                }
                part.entries += 1;
                if !indirect_negotiated {
                    let head = part.head;
                    return Err(RingError::IndirectNotNegotiated { head });
                }
                ended = walk.indirect::<L>(pointer, table.count);
            }
        }
        let total = walk.readable_len.saturating_add(walk.writable_len);
        if total > u64::from(u32::MAX) {
            walk.fail(ChainFault::TotalLength);
        }
        let Walk {
            split,
            end,
            readable_len,
            writable_len,
            last_writable,
            fault,
            ..
        } = walk;
        self.front = 0;
        self.split = split;
        self.end = end;
        self.readable_len = readable_len;
        self.writable_len = writable_len;
        self.fault = fault;
        if fault.is_some() {
            self.keep_only_status(matches!(ended, Ended::Complete(_)), last_writable, memory);
        }
        self.part = part;
        Ok(())
    }

    /// Drops the segments of a faulty chain, so that nobody transfers a part of them, and looks for its status.
    #[cold]
    fn keep_only_status(&mut self, complete: bool, (gpa, len): (Gpa, u32), memory: &GuestMemory) {
        (self.split, self.end) = (0, 0);
        (self.readable_len, self.writable_len) = (0, 0);
        self.fault_status = (complete && len > 0)
            .then(|| gpa.checked_add(u64::from(len) - 1))
            .flatten()
            .and_then(|last| memory.piece(last, 1))
            .and_then(|byte| byte.last_byte());
    }
}

/// The state of one walk, in locals so that it stays in registers.
struct Walk<'a> {
    memory: &'a GuestMemory,
    segments: &'a mut [Segment],
    split: usize,
    end: usize,
    readable_len: u64,
    writable_len: u64,
    /// The last writable buffer; length 0 before there is one.
    last_writable: (Gpa, u32),
    /// Descriptors the chain may still have (I8).
    budget: u16,
    fault: Option<ChainFault>,
}

impl Walk<'_> {
    /// Keeps the first fault: it is the one the guest's author wants to hear of.
    #[cold]
    fn fail(&mut self, fault: ChainFault) {
        self.fault.get_or_insert(fault);
    }

    /// Follows the chain from its descriptor `first` in one table.
    #[inline]
    fn table(
        &mut self,
        first: Descriptor,
        nested: bool,
        read: impl Fn(u16) -> Option<Descriptor>,
    ) -> Ended {
        let mut descriptor = first;
        loop {
            if descriptor.has(DESC_F_INDIRECT) {
                if !nested && !descriptor.has(DESC_F_NEXT) {
                    return Ended::Indirect(descriptor);
                }
                // Not carried out, but followed to its end: the status byte is there.
                self.fail(match nested {
                    true => ChainFault::NestedIndirect,
                    false => ChainFault::IndirectWithNext,
                });
            }
            if self.budget == 0 {
                self.fail(ChainFault::TooLong);
                return Ended::Broken;
            }
            self.budget -= 1;
            self.buffer(&descriptor);
            if !descriptor.has(DESC_F_NEXT) {
                return Ended::Complete(descriptor.id);
            }
            let Some(next) = read(descriptor.next) else {
                self.fail(ChainFault::NextOutOfRange);
                return Ended::Broken;
            };
            descriptor = next;
        }
    }

    /// Follows the chain from the first entry of an indirect table on, which is there.
    #[inline]
    fn nested_table(&mut self, read: impl Fn(u16) -> Option<Descriptor>) -> Ended {
        match read(0) {
            Some(first) => self.table(first, true, read),
            None => {
                self.fail(ChainFault::NextOutOfRange);
                Ended::Broken
            }
        }
    }

    /// Takes one buffer in: its order, its length, its place.
    #[inline]
    fn buffer(&mut self, descriptor: &Descriptor) {
        let Descriptor { gpa, len, .. } = *descriptor;
        // Drivers may leave empty buffers in a chain; they hold nothing, so their address does not matter.
        if len == 0 || descriptor.has(DESC_F_INDIRECT) {
            return;
        }
        let writable = descriptor.has(DESC_F_WRITE);
        // Neither sum can wrap: at most queue-size (1024) addends of 32 bits.
        if writable {
            self.last_writable = (gpa, len);
            self.writable_len = self.writable_len.wrapping_add(u64::from(len));
        } else {
            if self.last_writable.1 != 0 {
                self.fail(ChainFault::ReadableAfterWritable);
            }
            self.readable_len = self.readable_len.wrapping_add(u64::from(len));
        }
        if self.fault.is_some() {
            return;
        }
        match self.memory.piece(gpa, len) {
            Some(segment) if segment.len() == len => self.push(segment),
            _ => self.scattered(gpa, len),
        }
        if !writable {
            self.split = self.end;
        }
    }

    #[inline]
    fn push(&mut self, segment: Segment) {
        match self.segments.get_mut(self.end) {
            Some(slot) => {
                *slot = segment;
                self.end += 1;
            }
            None => self.fail(ChainFault::TooManySegments),
        }
    }

    /// A buffer that goes on in an adjacent region: several segments. Into a hole: a fault.
    #[cold]
    fn scattered(&mut self, gpa: Gpa, len: u32) {
        if gpa.checked_add(u64::from(len)).is_none() {
            return self.fail(ChainFault::Wraps);
        }
        let mut done = 0;
        // Ends: a piece has at least one byte, and a push without room leaves a fault.
        while done < len && self.fault.is_none() {
            let piece = gpa
                .checked_add(u64::from(done))
                .and_then(|at| self.memory.piece(at, len - done));
            match piece {
                Some(piece) => {
                    done += piece.len();
                    self.push(piece);
                }
                None => self.fail(ChainFault::Unmapped),
            }
        }
    }

    /// Follows the chain into the table `pointer` names. WRITE is ignored there (virtio 1.2, 2.7.5.3.2).
    #[inline]
    fn indirect<L: Layout>(&mut self, pointer: Descriptor, queue_size: u16) -> Ended {
        let Descriptor { gpa, len, .. } = pointer;
        if len == 0 || !len.is_multiple_of(DESCRIPTOR_BYTES) {
            self.fail(ChainFault::IndirectLength);
            return Ended::Broken;
        }
        let count = match u16::try_from(len / DESCRIPTOR_BYTES) {
            Ok(count) if count <= queue_size => count,
            _ => {
                self.fail(ChainFault::IndirectTooLong);
                return Ended::Broken;
            }
        };
        match self.memory.piece(gpa, len) {
            Some(table) if table.len() == len && table.hva().cast::<AtomicU64>().is_aligned() => {
                // SAFETY: `count * 16` bytes of one mapped region (`piece`), aligned (checked above), used
                // during this walk only, while `memory` is borrowed.
                let table = unsafe { DescriptorTable::new(table.hva().cast(), count) };
                self.nested_table(|index| Some(L::in_table(table.read(index)?, index, count)))
            }
            _ => self.scattered_indirect::<L>(gpa, len, count),
        }
    }

    /// An indirect table that is unaligned or straddles regions: legal, rare, and read entry by entry.
    #[cold]
    fn scattered_indirect<L: Layout>(&mut self, table: Gpa, len: u32, count: u16) -> Ended {
        let Some(end) = table.checked_add(u64::from(len)) else {
            self.fail(ChainFault::Wraps);
            return Ended::Broken;
        };
        // All of it must be mapped, the entries that the chain leaves out too, as in a contiguous table.
        let mut at = table;
        while at < end {
            let rest = u32::try_from(end.0 - at.0).unwrap_or(u32::MAX);
            let Some(piece) = self.memory.piece(at, rest) else {
                self.fail(ChainFault::IndirectUnmapped);
                return Ended::Broken;
            };
            at = Gpa(at.0.wrapping_add(u64::from(piece.len())));
        }
        let memory = self.memory;
        self.nested_table(|index| {
            if index >= count {
                return None;
            }
            let offset = u64::from(index) * u64::from(DESCRIPTOR_BYTES);
            let mut entry = [[0; 8]; 2];
            let mapped = memory.read_once(table.checked_add(offset)?, entry.as_flattened_mut());
            // Cannot be otherwise, the table was found mapped above; were it, the chain would end here.
            mapped.then(|| L::in_table(entry.map(u64::from_le_bytes), index, count))
        })
    }
}
