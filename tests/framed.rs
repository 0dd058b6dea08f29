//! The short way that a request takes off the ring gives what the long way gives, whatever the chain looks like.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use proptest::prelude::*;
use tandem::sim::{
    Framing, RawDescriptor, SimGuest, SimGuestConfig, SimRegion, SimRequest, heap_memory,
};
use tandem::virtio::blk::HEADER_BYTES;
use tandem::virtio::chain::{Chain, Ends};
use tandem::virtio::memory::{Gpa, Segment};
use tandem::virtio::virtqueue::{RingError, RingLayout, Virtqueue};

const BASE: u64 = 0x10_0000;
const SIZE: u16 = 16;

/// A guest whose buffers lie in `regions` adjacent regions, and two devices that read the same ring.
fn guest(layout: RingLayout, regions: u64, indirect: bool) -> (SimGuest, [Virtqueue; 2]) {
    let config = SimGuestConfig {
        layout,
        size: SIZE,
        event_idx: false,
        indirect,
        max_data: 16 << 10,
        first_index: u16::MAX,
        base: Gpa(BASE),
    };
    let part = ((config.bytes() - config.ring_bytes()) / regions).next_multiple_of(4096);
    let regions: Vec<SimRegion> = (0..regions)
        .map(|i| {
            let rings = config.ring_bytes();
            let (start, len) = if i == 0 {
                (0, rings + part)
            } else {
                (rings + i * part, part)
            };
            SimRegion {
                gpa: Gpa(BASE + start),
                len,
                dma: 0x4000_0000 + (i << 32),
            }
        })
        .collect();
    let guest = SimGuest::new(Arc::new(heap_memory(&regions).unwrap()), config).unwrap();
    // SAFETY: both live as long as the guest's memory, are used by this thread only, and give nothing back.
    let queues = [(); 2].map(|()| unsafe { guest.virtqueue() }.unwrap());
    (guest, queues)
}

type Seen = (
    Ends<HEADER_BYTES>,
    Vec<Segment>,
    Vec<Segment>,
    u64,
    u64,
    bool,
);

fn seen(ends: Ends<HEADER_BYTES>, chain: &Chain) -> Seen {
    (
        ends,
        chain.readable().to_vec(),
        chain.writable().to_vec(),
        chain.readable_len(),
        chain.writable_len(),
        chain.fault().is_some(),
    )
}

fn long_way(guest: &SimGuest, queue: &mut Virtqueue) -> Result<Option<Seen>, RingError> {
    let mut chain = Chain::new(usize::from(SIZE) + 64);
    queue.available()?;
    if !queue.pop(guest.memory(), &mut chain)? {
        return Ok(None);
    }
    let ends = chain.take_ends();
    Ok(Some(seen(ends, &chain)))
}

/// And whether it was a short way.
fn short_way(guest: &SimGuest, queue: &mut Virtqueue) -> (Result<Option<Seen>, RingError>, bool) {
    let mut chain = Chain::new(usize::from(SIZE) + 64);
    if let Err(error) = queue.available() {
        return (Err(error), false);
    }
    let main = guest.memory().main();
    let sole = match queue.layout() {
        RingLayout::Split => queue.pop_sole::<_, false>(&main),
        RingLayout::Packed => queue.pop_sole::<_, true>(&main),
    };
    match sole {
        Some(sole) => {
            let ends = chain.hold(&sole, &main);
            assert_eq!(chain.head(), sole.head);
            (Ok(Some(seen(ends, &chain))), true)
        }
        None => (long_way(guest, queue), false),
    }
}

/// Whether it is a request without a fault, and whether the short way took it.
fn same(guest: &SimGuest, [long, short]: &mut [Virtqueue; 2]) -> (bool, bool) {
    let (from_short, was_short) = short_way(guest, short);
    let seen = [long_way(guest, long), from_short];
    // Of a chain that breaks the ring nothing stays in flight, either way.
    assert_eq!(long.in_flight(), short.in_flight());
    assert!(seen[0].is_ok() || long.in_flight() == 0);
    let [long, short] = seen;
    assert_eq!(long, short);
    let sound = long.is_ok_and(|seen| seen.is_some_and(|seen| !seen.5 && seen.0.header.is_some()));
    (sound, was_short)
}

proptest! {
    #[test]
    fn pop_sole_of_a_legal_request_is_pop_and_take_ends(
        packed: bool,
        regions in 1_u64..4,
        kind in 0_u32..20,
        writable: bool,
        len in 0_u32..9000,
        offset in prop_oneof![Just(0_u32), Just(512), 0..4096_u32],
        pieces in 1_u16..8,
        framing in prop_oneof![Just(Framing::Plain), Just(Framing::SplitHeader), Just(Framing::Joined)],
        direct in proptest::option::of(0_u16..4),
    ) {
        let layout = if packed { RingLayout::Packed } else { RingLayout::Split };
        let (mut guest, mut queues) = guest(layout, regions, true);
        let request = SimRequest {
            data_offset: offset,
            pieces,
            framing,
            direct,
            ..SimRequest::new(kind, 77, len, writable)
        };
        guest.submit(&request, &[]).unwrap();
        guest.publish();
        let (sound, was_short) = same(&guest, &mut queues);
        prop_assert!(sound, "a legal request has a fault");
        // One buffer, one region, all in the ring or all in a table: what drivers send most.
        let plain = regions == 1 && len > 0 && pieces == 1 && framing == Framing::Plain;
        let usual = plain && matches!(direct, None | Some(0));
        prop_assert!(was_short || !usual, "a usual request went the long way");
    }

    #[test]
    fn pop_sole_of_any_descriptors_is_pop_and_take_ends(
        regions in 1_u64..4,
        indirect: bool,
        head in 0_u16..SIZE,
        table in proptest::collection::vec(any_descriptor(), usize::from(SIZE)),
        nested in proptest::collection::vec(any_descriptor(), 0..20),
    ) {
        let (mut guest, mut queues) = guest(RingLayout::Split, regions, indirect);
        for (index, descriptor) in (0..).zip(&table) {
            guest.write_descriptor(index, *descriptor);
        }
        guest.write_raw_table(guest.data_at(0), &nested);
        guest.offer(head);
        guest.publish();
        same(&guest, &mut queues);
    }

    #[test]
    fn pop_sole_of_any_entries_of_a_packed_ring_is_pop_and_take_ends(
        regions in 1_u64..4,
        indirect: bool,
        id in 0_u16..=SIZE,
        chain in proptest::collection::vec(any_descriptor(), 1..=usize::from(SIZE)),
        nested in proptest::collection::vec(any_descriptor(), 0..20),
    ) {
        let (mut guest, mut queues) = guest(RingLayout::Packed, regions, indirect);
        guest.write_raw_table(guest.data_at(0), &nested);
        guest.offer_chain(id, &chain);
        guest.publish();
        same(&guest, &mut queues);
    }
}

/// Mostly a descriptor that makes sense where it stands: next to the one before, header or status or data.
fn any_descriptor() -> impl Strategy<Value = RawDescriptor> {
    // The buffers of the first heads, the indirect table among them, then anywhere.
    let gpa = prop_oneof![
        8 => (0_u64..0x2_0000).prop_map(|offset| BASE + 0x3000 + offset),
        2 => Just(BASE + 0x3000 + 4096),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        3 => Just(16_u32), 3 => Just(1), 4 => 0..9000_u32, 2 => (0_u32..20).prop_map(|n| 16 * n), 1 => any::<u32>()
    ];
    let flags = prop_oneof![
        4 => Just(1_u16), 4 => Just(3), 2 => Just(2), 1 => Just(0), 2 => Just(4), 1 => Just(6), 1 => 0..8_u16
    ];
    let next = prop_oneof![6 => 0_u16..SIZE, 1 => any::<u16>()];
    (gpa, len, flags, next).prop_map(|(gpa, len, flags, next)| RawDescriptor {
        gpa,
        len,
        flags,
        next,
    })
}
