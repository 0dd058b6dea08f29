//! The virtqueue between two lanes: what goes in comes out behind it as it was, and goes back to whom it came from, in any
//! order and however full it gets.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;

use proptest::prelude::*;
use tandem::sim::{RawDescriptor, SimGuest, SimGuestConfig, SimRegion, heap_memory};
use tandem::virtio::chain::Chain;
use tandem::virtio::memory::{Gpa, GuestMemory};
use tandem::virtio::relay::{RELAY_SIZE, Refusal, Relay, RelayDriver};
use tandem::virtio::virtqueue::{HeadIndex, RingLayout, Virtqueue};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const SIZE: u16 = 128;
const RINGS: u64 = 0x100_0000;
/// A table for each head.
const TABLES: u64 = 0x200_0000;
const TABLE_BYTES: u64 = 0x1000;
/// Two adjacent regions.
const BUFFERS: u64 = 0x10_0000;
const REGION: u64 = 0x1_0000;
const BUFFER_BYTES: u32 = 1000;

/// Address and length of each segment, the readable ones apart.
type Pieces = [Vec<(u64, u32)>; 2];

fn pieces(chain: &Chain) -> Pieces {
    [chain.readable(), chain.writable()]
        .map(|segments| segments.iter().map(|s| (s.dma(), s.len())).collect())
}

struct Bench {
    guest: SimGuest,
    memory: Arc<GuestMemory>,
    front: Virtqueue,
    driver: RelayDriver,
    relay: Arc<Relay>,
    behind: Virtqueue,
    chain: Chain,
    /// What was handed over and not taken behind yet, in order.
    under_way: std::collections::VecDeque<(HeadIndex, Pieces)>,
    /// Behind: the head there, and the one in front.
    taken: Vec<(HeadIndex, HeadIndex)>,
    /// Heads that the guest may use.
    free: Vec<u16>,
}

impl Bench {
    fn new() -> Bench {
        let config = SimGuestConfig {
            layout: RingLayout::Split,
            size: SIZE,
            event_idx: true,
            indirect: true,
            max_data: 16,
            first_index: 0,
            base: Gpa(RINGS),
        };
        let regions = [
            (RINGS, config.bytes()),
            (TABLES, u64::from(SIZE) * TABLE_BYTES),
            (BUFFERS, REGION),
            (BUFFERS + REGION, REGION),
        ];
        let regions = regions.map(|(gpa, len)| SimRegion {
            gpa: Gpa(gpa),
            len,
            dma: gpa,
        });
        let memory = Arc::new(heap_memory(&regions).unwrap());
        let guest = SimGuest::new(Arc::clone(&memory), config).unwrap();
        // SAFETY: the only queue; the bench holds the memory.
        let front = unsafe { guest.virtqueue() }.unwrap();
        let relay = Relay::new();
        // SAFETY: the only queue of the relay, which the bench holds.
        let behind = unsafe { Virtqueue::new(relay.config()) }.unwrap();
        Bench {
            guest,
            memory,
            front,
            driver: RelayDriver::new(Arc::clone(&relay)),
            relay,
            behind,
            chain: Chain::new(2048),
            under_way: std::collections::VecDeque::new(),
            taken: Vec::new(),
            free: (0..SIZE).collect(),
        }
    }

    /// The guest has a request of so many buffers, which the front hands over. `None` when the guest has no head for it.
    fn send(&mut self, readable: u16, writable: u16, at: u64) -> Option<Result<(), Refusal>> {
        let head = self.free.pop()?;
        let count = readable + writable;
        // Some lie over the border of the regions.
        let room = 2 * REGION - u64::from(BUFFER_BYTES);
        let buffer = |index: u16| RawDescriptor {
            gpa: BUFFERS + (at + u64::from(index) * 777) % room,
            len: BUFFER_BYTES,
            flags: if index + 1 < count { NEXT } else { 0 }
                | if index < readable { 0 } else { WRITE },
            next: index + 1,
        };
        let table: Vec<RawDescriptor> = (0..count).map(buffer).collect();
        let place = Gpa(TABLES + u64::from(head) * TABLE_BYTES);
        self.guest.write_raw_table(place, &table);
        let pointer = RawDescriptor {
            gpa: place.0,
            len: 16 * u32::from(count),
            flags: INDIRECT,
            next: 0,
        };
        self.guest.write_descriptor(head, pointer);
        self.guest.offer(head);
        self.guest.publish();
        self.front.available().unwrap();
        assert!(self.front.pop(&self.memory, &mut self.chain).unwrap());
        assert_eq!(self.chain.head().get(), head);
        let handed = self.driver.hand_over(&self.chain, &self.memory);
        match handed {
            Ok(()) => {
                let pieces = pieces(&self.chain);
                self.under_way.push_back((self.chain.head(), pieces));
            }
            Err(_) => {
                self.front.push_used(self.chain.head(), 0);
                self.guest_takes(head, 0);
            }
        }
        Some(handed)
    }

    /// The front gives a head back, and the guest finds it.
    fn guest_takes(&mut self, head: u16, len: u32) {
        self.front.publish_used();
        assert_eq!(self.guest.take_used(), Some((u32::from(head), len)));
        self.free.push(head);
    }

    /// The side behind takes a request. `false` when there is none.
    fn take(&mut self) -> bool {
        let available = self.behind.available().unwrap();
        assert_eq!(usize::from(available), self.under_way.len());
        if available == 0 {
            assert!(!self.behind.has_request());
            return false;
        }
        assert!(self.behind.pop(&self.memory, &mut self.chain).unwrap());
        let (head, expected) = self.under_way.pop_front().unwrap();
        assert_eq!((self.chain.fault(), pieces(&self.chain)), (None, expected));
        self.taken.push((self.chain.head(), head));
        true
    }

    /// One of the requests behind ends.
    fn answer(&mut self, which: usize, len: u32) {
        if self.taken.is_empty() {
            return assert!(!self.driver.has_answer());
        }
        let (behind, front) = self.taken.swap_remove(which % self.taken.len());
        self.behind.push_used(behind, len);
        self.behind.publish_used();
        assert!(!self.behind.needs_signal());
        assert!(self.driver.has_answer() && !self.relay.has_shown(&self.behind));
        assert_eq!(self.driver.answer(), Some((front, len)));
        assert!(!self.relay.has_shown(&self.behind));
        self.front.push_used(front, len);
        self.guest_takes(front.get(), len);
        self.driver.show();
        assert!(self.relay.has_shown(&self.behind) && self.driver.answer().is_none());
    }
}

#[derive(Clone, Debug)]
enum Event {
    Send(u16, u16, u64),
    Take,
    Answer(usize, u32),
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        4 => (1..20_u16, 0..20_u16, any::<u16>())
            .prop_map(|(readable, writable, at)| Event::Send(readable, writable, at.into())),
        1 => (1..100_u16, 1..28_u16, any::<u16>())
            .prop_map(|(readable, writable, at)| Event::Send(readable, writable, at.into())),
        4 => Just(Event::Take),
        3 => (any::<usize>(), any::<u32>()).prop_map(|(which, len)| Event::Answer(which, len)),
    ]
}

proptest! {
    #[test]
    fn requests_come_out_as_they_went_in_and_go_back_to_where_they_came_from(
        events in prop::collection::vec(event(), 1..400)
    ) {
        let mut bench = Bench::new();
        // Far more than the relay has descriptors.
        for event in events.iter().cycle().take(2000) {
            match *event {
                Event::Send(readable, writable, at) => {
                    bench.send(readable, writable, at);
                }
                Event::Take => {
                    bench.take();
                }
                Event::Answer(which, len) => bench.answer(which, len),
            }
        }
        while bench.take() {}
        while !bench.taken.is_empty() {
            bench.answer(0, 7);
        }
        prop_assert_eq!(bench.free.len(), usize::from(SIZE));
        prop_assert_eq!(bench.behind.in_flight(), 0);
        // All descriptors are there again.
        let mut room = RELAY_SIZE;
        while room >= 100 {
            prop_assert_eq!(bench.send(99, 1, 0x2000), Some(Ok(())));
            room -= bench.under_way.back().map_or(0, |(_, [a, b])| (a.len() + b.len()) as u16);
        }
    }
}

#[test]
fn relay_that_is_full_says_so_and_has_room_again_when_one_has_ended() {
    let mut bench = Bench::new();
    let mut handed = 0;
    while bench.send(100, 20, 0x2000) == Some(Ok(())) {
        handed += 1;
    }
    assert!((6..=8).contains(&handed), "{handed}");
    assert_eq!(bench.send(100, 20, 0x2000), Some(Err(Refusal::Full)));
    assert!(bench.take());
    bench.answer(0, 1);
    assert_eq!(bench.send(100, 20, 0x2000), Some(Ok(())));
}

#[test]
fn whoever_sleeps_is_woken_and_nobody_else() {
    let mut bench = Bench::new();
    assert!(bench.driver.wants_kick(), "nobody has said that it looks");
    bench.behind.suppress_kicks();
    assert!(!bench.driver.wants_kick());
    assert_eq!(bench.behind.request_kicks(), Ok(false));
    assert!(bench.driver.wants_kick());
    assert_eq!(bench.send(1, 1, 0), Some(Ok(())));
    assert_eq!(bench.behind.request_kicks(), Ok(true));
    bench.behind.suppress_kicks();
    assert!(bench.take());
    // The front looks by itself until it asks.
    assert!(!bench.driver.request_signal());
    let (behind, _) = bench.taken[0];
    bench.behind.push_used(behind, 3);
    bench.behind.publish_used();
    assert!(bench.behind.needs_signal());
    assert!(bench.driver.request_signal(), "there is an answer already");
    bench.driver.suppress_signals();
    assert!(bench.driver.answer().is_some());
    assert!(!bench.relay.is_closed());
    bench.driver.close();
    assert!(bench.relay.is_closed());
}
