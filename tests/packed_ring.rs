//! Packed rings: they say what split ones say, and what a hostile guest may put into them has one right answer each.
//!
//! The answers are those of `tests/hostile_guest.rs`: *R0* the head comes back with used length 0, and IOERR where a
//! status byte can be found; *NR* the ring is broken, and nothing of it is carried out. What requests mean is not tried
//! again here: behind the walk nobody knows which ring they came from.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;

use proptest::prelude::*;
use tandem::sim::{
    Framing, RawDescriptor, SimGuest, SimGuestConfig, SimRegion, SimRequest, heap_memory,
};
use tandem::virtio::blk::HEADER_BYTES;
use tandem::virtio::chain::{Chain, ChainFault, Ends};
use tandem::virtio::memory::{Gpa, GuestMemory};
use tandem::virtio::virtqueue::{
    HeadIndex, MAX_QUEUE_SIZE, QueueError, RingError, RingLayout, Virtqueue, VirtqueueConfig,
};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const AVAIL: u16 = 1 << 7;
const USED: u16 = 1 << 15;

const SIZE: u16 = 8;
const RINGS: u64 = 0x100_0000;
/// Two adjacent regions for buffers, and a hole behind.
const LEFT: u64 = 0x10_0000;
const REGION_BYTES: u64 = 0x1_0000;
const HOLE: u64 = LEFT + 2 * REGION_BYTES;
const HEADER: u64 = LEFT;
const STATUS: u64 = LEFT + 0x800;
const DATA: u64 = LEFT + 0x1000;
const TABLE: u64 = LEFT + 0x4000;

struct Bench {
    memory: Arc<GuestMemory>,
    guest: SimGuest,
    queue: Virtqueue,
    chain: Chain,
}

fn bench_with(layout: RingLayout, size: u16, first_index: u16, indirect: bool) -> Bench {
    let config = SimGuestConfig {
        layout,
        size,
        event_idx: true,
        indirect,
        max_data: 16 << 10,
        first_index,
        base: Gpa(RINGS),
    };
    let regions = [
        (RINGS, config.bytes()),
        (LEFT, REGION_BYTES),
        (LEFT + REGION_BYTES, REGION_BYTES),
    ];
    let regions = regions.map(|(gpa, len)| SimRegion {
        gpa: Gpa(gpa),
        len,
        dma: gpa,
    });
    let memory = Arc::new(heap_memory(&regions).unwrap());
    let guest = SimGuest::new(Arc::clone(&memory), config).unwrap();
    // SAFETY: the only queue; the bench holds the memory.
    let queue = unsafe { guest.virtqueue() }.unwrap();
    Bench {
        memory,
        guest,
        queue,
        chain: Chain::new(usize::from(size) + 64),
    }
}

fn bench() -> Bench {
    // The last entry but one: most chains go round the end of the ring.
    bench_with(RingLayout::Packed, SIZE, SIZE - 2, true)
}

fn entry(gpa: u64, len: u32, flags: u16) -> RawDescriptor {
    RawDescriptor {
        gpa,
        len,
        flags,
        next: 0,
    }
}

/// Linked as a driver links them.
fn linked(buffers: &[(u64, u32, u16)]) -> Vec<RawDescriptor> {
    let last = buffers.len() - 1;
    let entries = buffers.iter().enumerate();
    entries
        .map(|(i, &(gpa, len, flags))| entry(gpa, len, flags | if i < last { NEXT } else { 0 }))
        .collect()
}

const REQUEST: [(u64, u32, u16); 3] = [(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)];

impl Bench {
    /// Where descriptor `index` stands: its guest address.
    fn entry_at(&self, index: u16) -> Gpa {
        Gpa(RINGS + 16 * u64::from(index))
    }

    /// Offers a chain as `id` and takes it.
    fn offer(&mut self, id: u16, chain: &[RawDescriptor]) -> Result<bool, RingError> {
        self.guest.offer_chain(id, chain);
        self.guest.publish();
        self.pop()
    }

    fn pop(&mut self) -> Result<bool, RingError> {
        self.queue.pop(&self.memory, &mut self.chain)
    }

    fn give_back(&mut self, head: HeadIndex, len: u32) {
        self.queue.push_used(head, len);
        self.queue.publish_used();
    }

    /// The chain as (guest address, length) of its segments.
    fn segments(&self) -> Vec<(u64, u32)> {
        let segments = self.chain.segments().iter();
        segments.map(|s| (s.dma(), s.len())).collect()
    }

    /// A chain that is refused comes back, and the ring goes on.
    #[track_caller]
    fn comes_back(&mut self, chain: &[RawDescriptor], fault: ChainFault, has_status: bool) {
        assert_eq!(self.offer(3, chain), Ok(true));
        assert_eq!(self.chain.fault(), Some(fault));
        assert_eq!(self.chain.take_status().is_some(), has_status);
        assert!(self.chain.segments().is_empty());
        self.give_back(self.chain.head(), 0);
        assert_eq!(self.guest.take_used(), Some((3, 0)));
        self.goes_on();
    }

    #[track_caller]
    fn goes_on(&mut self) {
        assert_eq!(self.offer(5, &linked(&REQUEST)), Ok(true));
        assert_eq!((self.chain.fault(), self.chain.head().get()), (None, 5));
        assert_eq!(self.segments(), REQUEST.map(|(gpa, len, _)| (gpa, len)));
        self.give_back(self.chain.head(), 1);
        assert_eq!(self.guest.take_used(), Some((5, 1)));
        assert_eq!((self.guest.take_used(), self.queue.in_flight()), (None, 0));
    }
}

// ---- the ring is broken ----

#[test]
fn chain_without_an_end_breaks_the_ring() {
    let mut b = bench();
    let chain = [entry(DATA, 512, NEXT); SIZE as usize];
    let at = SIZE - 2;
    assert_eq!(b.offer(0, &chain), Err(RingError::EndlessChain { at }));
    assert_eq!(b.queue.in_flight(), 0);
    assert_eq!(b.guest.take_used(), None);
}

#[test]
fn chain_as_long_as_the_ring_is_taken() {
    let mut b = bench();
    let chain = linked(&[(DATA, 512, 0); SIZE as usize]);
    assert_eq!(b.offer(0, &chain), Ok(true));
    assert_eq!((b.chain.fault(), b.queue.in_flight()), (None, SIZE));
    b.give_back(b.chain.head(), 0);
    assert_eq!(b.guest.take_used(), Some((0, 0)));
    b.goes_on();
}

#[test]
fn chain_over_entries_that_are_in_flight_breaks_the_ring() {
    // Five entries are out; a chain of four takes the first of them again, one of three does not.
    for (len, broken) in [(3, false), (4, true)] {
        let mut b = bench();
        assert_eq!(b.offer(0, &linked(&[(DATA, 512, 0); 5])), Ok(true));
        let first = b.chain.head();
        let taken = b.offer(1, &linked(&vec![(DATA, 512, 0); len]));
        let at = 3;
        let answer = if broken {
            Err(RingError::EndlessChain { at })
        } else {
            Ok(true)
        };
        assert_eq!(taken, answer);
        // What was taken before still comes back, once.
        b.give_back(first, 0);
        assert_eq!(b.queue.in_flight(), if broken { 0 } else { 3 });
    }
}

#[test]
fn buffer_id_outside_the_ring_breaks_it() {
    for head in [SIZE, SIZE + 1, u16::MAX] {
        let error = RingError::HeadOutOfRange { head, size: SIZE };
        assert_eq!(bench().offer(head, &linked(&REQUEST)), Err(error));
        let table = [entry(TABLE, 48, INDIRECT)];
        assert_eq!(bench().offer(head, &table), Err(error));
    }
}

#[test]
fn buffer_id_in_flight_offered_again_breaks_the_ring_and_is_taken_once() {
    let mut b = bench();
    assert_eq!(b.offer(2, &linked(&REQUEST)), Ok(true));
    let head = b.chain.head();
    let error = RingError::DuplicateHead { head: 2 };
    assert_eq!(b.offer(2, &linked(&REQUEST)), Err(error));
    b.give_back(head, 1);
    assert_eq!(b.queue.in_flight(), 0);
}

#[test]
fn table_without_the_feature_breaks_the_ring() {
    let mut b = bench_with(RingLayout::Packed, SIZE, 0, false);
    let error = RingError::IndirectNotNegotiated { head: 4 };
    assert_eq!(b.offer(4, &[entry(TABLE, 48, INDIRECT)]), Err(error));
    assert_eq!(b.queue.in_flight(), 0);
}

// ---- there is nothing to take ----

#[test]
fn entry_whose_bits_fit_no_lap_is_not_available() {
    for wrap in [true, false] {
        for bits in [0, AVAIL, USED, AVAIL | USED] {
            let mut b = bench_with(RingLayout::Packed, SIZE, 0, true);
            if !wrap {
                // A lap before.
                (0..SIZE).for_each(|_| {
                    assert_eq!(b.offer(0, &[entry(DATA, 512, 0)]), Ok(true));
                    b.give_back(b.chain.head(), 0);
                    assert_eq!(b.guest.take_used(), Some((0, 0)));
                });
            }
            // Whatever else the flags say.
            let flags = 0x7f78 | bits;
            let rest = 512 | u64::from(flags) << 48;
            let words = [DATA, rest].map(u64::to_le_bytes).concat();
            b.guest.write(b.entry_at(0), &words);
            let available = bits == if wrap { AVAIL } else { USED };
            let count = b.queue.available().unwrap();
            assert_eq!(count > 0, available, "lap {wrap}, bits {bits:#x}");
            assert_eq!(b.pop(), Ok(available));
        }
    }
}

#[test]
fn entries_used_and_not_taken_again_stay_where_they_are_for_laps() {
    let mut b = bench();
    for _ in 0..20 * SIZE {
        b.goes_on();
        assert_eq!(b.queue.available(), Ok(0));
        assert_eq!(b.pop(), Ok(false));
    }
}

// ---- the request comes back ----

#[test]
fn chains_that_are_malformed_come_back_and_the_ring_goes_on() {
    let request = [
        entry(HEADER, 16, 0),
        entry(DATA, 512, 0),
        entry(STATUS, 1, WRITE),
    ];
    let nested = [
        entry(HEADER, 16, 0),
        entry(TABLE, 48, INDIRECT),
        entry(STATUS, 1, WRITE),
    ];
    for (chain, fault, has_status) in [
        (
            linked(&[(HEADER, 16, 0), (HOLE, 512, 0), (STATUS, 1, WRITE)]),
            ChainFault::Unmapped,
            true,
        ),
        (
            linked(&[(HEADER, 16, 0), (HOLE - 1, 512, 0), (STATUS, 1, WRITE)]),
            ChainFault::Unmapped,
            true,
        ),
        (
            linked(&[(HEADER, 16, 0), (u64::MAX, 512, 0), (STATUS, 1, WRITE)]),
            ChainFault::Wraps,
            true,
        ),
        (
            linked(&[(HEADER, 16, 0), (STATUS, 1, WRITE), (DATA, 512, 0)]),
            ChainFault::ReadableAfterWritable,
            true,
        ),
        (
            linked(&[(TABLE, 48, INDIRECT), (STATUS, 1, WRITE)]),
            ChainFault::IndirectWithNext,
            true,
        ),
        (
            vec![entry(TABLE, 0, INDIRECT)],
            ChainFault::IndirectLength,
            false,
        ),
        (
            vec![entry(TABLE, 47, INDIRECT)],
            ChainFault::IndirectLength,
            false,
        ),
        (
            vec![entry(TABLE, u32::MAX, INDIRECT)],
            ChainFault::IndirectLength,
            false,
        ),
        (
            vec![entry(TABLE, 16 * (u32::from(SIZE) + 1), INDIRECT)],
            ChainFault::IndirectTooLong,
            false,
        ),
        (
            vec![entry(HOLE - 16, 48, INDIRECT)],
            ChainFault::IndirectUnmapped,
            false,
        ),
        (
            vec![entry(u64::MAX - 15, 48, INDIRECT)],
            ChainFault::Wraps,
            false,
        ),
    ] {
        let mut b = bench();
        b.guest.write_raw_table(Gpa(TABLE), &request);
        b.comes_back(&chain, fault, has_status);
    }
    let mut b = bench();
    b.guest.write_raw_table(Gpa(TABLE), &nested);
    b.comes_back(
        &[entry(TABLE, 48, INDIRECT)],
        ChainFault::NestedIndirect,
        true,
    );
}

#[test]
fn table_is_as_long_as_it_says_whatever_its_flags_are() {
    // NEXT, AVAIL and USED mean nothing in a table, nor do ids; WRITE means nothing where a table is named.
    for extra in [0, NEXT, AVAIL | USED, 0x7f78] {
        let mut b = bench();
        let table: Vec<RawDescriptor> = REQUEST
            .iter()
            .map(|&(gpa, len, flags)| entry(gpa, len, flags | extra))
            .collect();
        for at in [TABLE, TABLE + 1, LEFT + REGION_BYTES - 24] {
            b.guest.write_raw_table(Gpa(at), &table);
            assert_eq!(b.offer(1, &[entry(at, 48, INDIRECT | WRITE)]), Ok(true));
            assert_eq!((b.chain.fault(), b.queue.in_flight()), (None, 1));
            assert_eq!(b.segments(), REQUEST.map(|(gpa, len, _)| (gpa, len)));
            b.give_back(b.chain.head(), 1);
            assert_eq!(b.guest.take_used(), Some((1, 1)));
        }
    }
}

#[test]
fn what_the_guest_changes_after_the_pop_does_not_count() {
    for indirect in [false, true] {
        let mut b = bench();
        let table = linked(&REQUEST);
        b.guest.write_raw_table(Gpa(TABLE), &table);
        let chain = match indirect {
            true => vec![entry(TABLE, 48, INDIRECT)],
            false => table,
        };
        assert_eq!(b.offer(1, &chain), Ok(true));
        for index in 0..SIZE {
            b.guest.write(b.entry_at(index), &[0xff; 16]);
        }
        b.guest.write(Gpa(TABLE), &[0xff; 48]);
        assert_eq!(b.segments(), REQUEST.map(|(gpa, len, _)| (gpa, len)));
        // Id and length of the used entry are ours, and so is the number of entries that it stands for.
        b.give_back(b.chain.head(), 1);
        assert_eq!(
            (b.guest.take_used(), b.queue.in_flight()),
            (Some((1, 1)), 0)
        );
    }
}

#[test]
fn garbage_in_the_event_structures_is_harmless() {
    for value in [0, 1, 2, 3, 0x8002, 0x7fff, u16::MAX] {
        let mut b = bench();
        b.queue.suppress_kicks();
        for _ in 0..3 * SIZE {
            b.guest.scribble(value);
            b.goes_on();
            let _ = b.queue.needs_signal();
        }
    }
}

#[test]
fn requests_that_end_out_of_order_come_back_each_with_its_entries() {
    let mut b = bench_with(RingLayout::Packed, 16, 11, true);
    for round in 0..50_u16 {
        let mut heads = Vec::new();
        for (id, len) in [(7, 3), (2, 1), (9, 5), (0, 2)] {
            let chain = linked(&vec![(DATA, 512, 0); len]);
            assert_eq!(b.offer(id, &chain), Ok(true));
            heads.push(b.chain.head());
        }
        assert_eq!(b.queue.in_flight(), 11);
        heads.rotate_left(usize::from(round % 4));
        // Nothing shows before it is published; then all of it does.
        for head in &heads {
            b.queue.push_used(*head, u32::from(round));
            assert_eq!(b.guest.take_used(), None);
        }
        b.queue.publish_used();
        for head in heads {
            let used = (head.get().into(), round.into());
            assert_eq!(b.guest.take_used(), Some(used));
        }
        assert_eq!((b.guest.take_used(), b.queue.in_flight()), (None, 0));
    }
}

#[test]
fn size_or_position_that_no_packed_ring_has_is_refused() {
    let good = bench().guest.virtqueue_config();
    let refused = |config| {
        // SAFETY: refused before anything is touched, which is what this test is about.
        unsafe { Virtqueue::new(config) }.unwrap_err()
    };
    for size in [0, MAX_QUEUE_SIZE + 1, 1 << 15, u16::MAX] {
        let config = VirtqueueConfig { size, ..good };
        assert_eq!(refused(config), QueueError::Size(size));
    }
    for (next_avail, next_used) in [
        (SIZE, SIZE),
        (0x8000 | SIZE, 0x8000 | SIZE),
        (0, 1),
        (0x8000, 0),
    ] {
        let config = VirtqueueConfig {
            next_avail,
            next_used,
            ..good
        };
        let error = QueueError::Position {
            size: SIZE,
            next_avail,
            next_used,
        };
        assert_eq!(refused(config), error);
    }
    for (part, off) in [("descriptor table", 8), ("avail ring", 2), ("used ring", 2)] {
        let mut config = good;
        let place = match part {
            "descriptor table" => &mut config.descriptor_table,
            "avail ring" => &mut config.avail,
            _ => &mut config.used,
        };
        *place = place.map_addr(|addr| addr.saturating_add(off));
        assert!(
            matches!(refused(config), QueueError::Misaligned { part: named, .. } if named == part)
        );
    }
}

// ---- signals ----

/// Virtio 1.2, 2.8.10, counted entry by entry: the guest asked for a place; is it among the last `fresh` before `at`?
fn passed(asked: u16, at: u16, fresh: u16, size: u16) -> bool {
    let (mut index, mut wrap) = (at & 0x7fff, at & 0x8000);
    (0..fresh).any(|_| {
        if index == 0 {
            (index, wrap) = (size, wrap ^ 0x8000);
        }
        index -= 1;
        asked == index | wrap
    })
}

#[test]
fn signal_at_any_place_comes_when_that_place_is_passed() {
    let size = 5;
    for lap in 0..2 {
        for before in 0..size {
            for count in 1..=size {
                for asked in (0..size).flat_map(|index| [index, index | 0x8000]) {
                    let mut b = bench_with(RingLayout::Packed, size, 0, true);
                    let serve = |b: &mut Bench, count| {
                        for id in 0..count {
                            assert_eq!(b.offer(id, &[entry(DATA, 512, 0)]), Ok(true));
                            b.queue.push_used(b.chain.head(), 0);
                        }
                        b.queue.publish_used();
                        (0..count).for_each(|_| assert!(b.guest.take_used().is_some()));
                    };
                    for _ in 0..lap {
                        serve(&mut b, size);
                    }
                    serve(&mut b, before);
                    b.queue.needs_signal();
                    b.guest.signal_at(asked);
                    serve(&mut b, count);
                    let at = (b.queue.base() >> 16) as u16;
                    let wanted = passed(asked, at, count, size);
                    assert_eq!(b.queue.needs_signal(), wanted, "{asked:#x} {at:#x} {count}");
                    assert!(!b.queue.needs_signal(), "twice for one publication");
                }
            }
        }
    }
}

// ---- what a split ring says ----

type Seen = (
    Ends<HEADER_BYTES>,
    Vec<(u64, u32)>,
    Vec<(u64, u32)>,
    Option<ChainFault>,
);

/// One request through a ring: what the device sees, relative to the guest's buffers, and what comes back.
fn through(
    layout: RingLayout,
    first_index: u16,
    requests: &[SimRequest],
    order: &[prop::sample::Index],
) -> Vec<(Seen, (u32, u8))> {
    let mut b = bench_with(layout, 64, first_index, true);
    let mut sent = Vec::new();
    let mut seen = Vec::new();
    for request in requests {
        let Some(head) = b.guest.submit(request, &[0x5a; 16]) else {
            break;
        };
        b.guest.publish();
        assert!(b.queue.available().unwrap() > 0);
        let main = b.memory.main();
        let sole = match layout {
            RingLayout::Split => b.queue.pop_sole::<_, false>(&main),
            RingLayout::Packed => b.queue.pop_sole::<_, true>(&main),
        };
        let mut ends: Ends<HEADER_BYTES> = match sole {
            Some(sole) => b.chain.hold(&sole, &main),
            None => {
                assert!(b.queue.pop(&b.memory, &mut b.chain).unwrap(), "a request");
                b.chain.take_ends()
            }
        };
        assert_eq!(b.chain.head().get(), head);
        // Each layout has its own buffers: compare places within them.
        let base = b.guest.data_at(head).0;
        let places = |segments: &[tandem::virtio::memory::Segment]| -> Vec<(u64, u32)> {
            let segments = segments.iter();
            segments.map(|s| (s.dma() - base, s.len())).collect()
        };
        let status = ends.status.take();
        let (readable, writable) = (places(b.chain.readable()), places(b.chain.writable()));
        seen.push((ends, readable, writable, b.chain.fault()));
        sent.push((b.chain.head(), status));
    }
    // They end in any order.
    let mut answers = vec![(0, 0); sent.len()];
    let mut left: Vec<usize> = (0..sent.len()).collect();
    for pick in order.iter().cycle().take(sent.len()) {
        let which = left.remove(pick.index(left.len()));
        let (head, status) = sent[which];
        let answer = which as u8;
        status.expect("a status").write(answer);
        b.queue.push_used(head, 100 + u32::from(answer));
        b.queue.publish_used();
        let back = b.guest.poll_used().expect("what was published");
        assert_eq!(back.head, head.get());
        answers[which] = (back.used_len, back.status);
    }
    assert_eq!((b.guest.poll_used(), b.queue.in_flight()), (None, 0));
    seen.into_iter().zip(answers).collect()
}

fn request() -> impl Strategy<Value = SimRequest> {
    let framing = prop_oneof![
        Just(Framing::Plain),
        Just(Framing::SplitHeader),
        Just(Framing::Joined)
    ];
    (
        (0_u32..20, any::<u64>(), 0_u32..9000, any::<bool>()),
        (0_u32..4096, 1_u16..8, framing, prop::option::of(0_u16..4)),
    )
        .prop_map(
            |((kind, sector, len, writable), (data_offset, pieces, framing, direct))| SimRequest {
                data_offset,
                pieces,
                framing,
                direct,
                ..SimRequest::new(kind, sector, len, writable)
            },
        )
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_on_a_packed_ring_are_what_they_are_on_a_split_one(
        first_index: u16,
        requests in prop::collection::vec(request(), 1..12),
        order in prop::collection::vec(any::<prop::sample::Index>(), 1..8),
    ) {
        let [split, packed] = [RingLayout::Split, RingLayout::Packed]
            .map(|layout| through(layout, first_index, &requests, &order));
        // A packed ring has as many free entries; ids do not use them up.
        prop_assert_eq!(&packed[..split.len().min(packed.len())], &split[..split.len().min(packed.len())]);
        prop_assert!(!split.is_empty() && !packed.is_empty());
    }

    #[test]
    fn ring_of_any_bytes_is_served_broken_or_empty_and_ends(
        size in 1_u16..20,
        bytes in prop::collection::vec(any::<u8>(), 16 * 20),
        bits in prop::collection::vec(any::<bool>(), 20),
        indirect: bool,
    ) {
        let mut b = bench_with(RingLayout::Packed, size, 0, indirect);
        let mut ring = bytes[..16 * usize::from(size)].to_vec();
        for (entry, available) in ring.chunks_mut(16).zip(bits) {
            // Mostly available, buffers near, ids within the ring: else there would be little to see.
            entry[15] = if available { entry[15] & 0x7f } else { entry[15] };
            entry[14] |= 0x80;
            entry[12] = (entry[12] as u16 % size) as u8;
            entry[13] = 0;
            entry[2..8].copy_from_slice(&[0x10, 0, 0, 0, 0, 0]);
            entry[10..12].fill(0);
        }
        b.guest.write(b.entry_at(0), &ring);
        let mut taken = 0;
        // Bounded, since entries that were given back do not fit the next lap.
        for _ in 0..4 * size {
            match b.pop() {
                Ok(true) => {
                    taken += 1;
                    b.give_back(b.chain.head(), 0);
                }
                Ok(false) | Err(_) => break,
            }
        }
        prop_assert!(taken <= 2 * size);
        prop_assert_eq!(b.queue.in_flight(), 0);
    }
}
