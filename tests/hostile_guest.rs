//! What a hostile guest may put into its rings and its block requests, entry by entry, and the one right answer to each.
//!
//! The answers: the request goes through; *E* IOERR in the status byte; *U* UNSUPP; *R0* the head comes back with used
//! length 0, and IOERR in the status byte where one can be found; *NR* the ring is broken, and no descriptor of it is
//! carried out. After each answer all of guest memory is compared: nothing but the status byte and the used ring has
//! changed.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::sync::Arc;

use tandem::block::{BlockCount, BlockOp, BlockRange, Geometry, Lba, RangeList};
use tandem::sim::{
    Framing, RawDescriptor, SimGuest, SimGuestConfig, SimRegion, SimRequest, heap_memory,
};
use tandem::virtio::blk::{self, BlkLimits, RangeLimits, RangeSegment, request_type, status};
use tandem::virtio::chain::{Chain, ChainFault};
use tandem::virtio::memory::{Gpa, GuestMemory};
use tandem::virtio::virtqueue::{
    MAX_QUEUE_SIZE, QueueError, RingError, RingLayout, Virtqueue, avail_ring_bytes, used_ring_bytes,
};
use zerocopy::IntoBytes;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

const SIZE: u16 = 16;
/// The rings.
const RINGS: u64 = 0x1_0000;
/// Two adjacent regions for buffers; holes before and behind.
const LEFT: u64 = 0x10_0000;
const REGION_BYTES: u64 = 0x1_0000;
const RIGHT: u64 = LEFT + REGION_BYTES;
const HOLE: u64 = RIGHT + REGION_BYTES;

/// Where a test's request usually is.
const HEADER: u64 = LEFT;
const STATUS: u64 = LEFT + 0x800;
const DATA: u64 = LEFT + 0x1000;
const TABLE: u64 = LEFT + 0x4000;
/// What stands in a status byte before it is written.
const UNWRITTEN: u8 = 0xee;

/// The disk: 2048 sectors.
const SECTORS: u64 = 2048;

struct Setup {
    event_idx: bool,
    indirect: bool,
    block_shift: u32,
    blocks: u64,
    read_only: bool,
    flush: bool,
    ranges: bool,
}

impl Default for Setup {
    fn default() -> Setup {
        Setup {
            event_idx: false,
            indirect: true,
            block_shift: 9,
            blocks: SECTORS,
            read_only: false,
            flush: true,
            ranges: true,
        }
    }
}

/// What the guest gets for its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Carried(BlockOp),
    Refused {
        /// The value of the status byte at `STATUS`.
        status: u8,
        used_len: u32,
    },
    Broken(RingError),
}

/// IOERR, whatever the used length.
const E: Answer = Answer::Refused {
    status: status::IOERR,
    used_len: 1,
};
const E_BEHIND_DATA: Answer = Answer::Refused {
    status: status::IOERR,
    used_len: 0,
};
const U: Answer = Answer::Refused {
    status: status::UNSUPP,
    used_len: 1,
};
/// The head comes back, and so does a status.
const R0: Answer = E_BEHIND_DATA;
/// The head comes back; there was no place for a status.
const R0_SILENT: Answer = Answer::Refused {
    status: UNWRITTEN,
    used_len: 0,
};

struct Bench {
    memory: Arc<GuestMemory>,
    guest: SimGuest,
    queue: Virtqueue,
    chain: Chain,
    ranges: RangeList,
    limits: BlkLimits,
}

impl Bench {
    fn new(setup: &Setup) -> Bench {
        let config = SimGuestConfig {
            layout: RingLayout::Split,
            size: SIZE,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            max_data: 4096,
            first_index: u16::MAX - 2,
            base: Gpa(RINGS),
        };
        let regions = [
            (RINGS, config.bytes()),
            (LEFT, REGION_BYTES),
            (RIGHT, REGION_BYTES),
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
        guest.write(Gpa(STATUS), &[UNWRITTEN]);
        let limits = RangeLimits {
            max_sectors: 4096,
            max_segments: 4,
        };
        Bench {
            memory,
            guest,
            queue,
            chain: Chain::new(usize::from(SIZE) + 2),
            ranges: RangeList::new(),
            limits: BlkLimits {
                geometry: Geometry::new(setup.block_shift, setup.blocks, setup.read_only).unwrap(),
                flush: setup.flush,
                discard: setup.ranges.then_some(limits),
                write_zeroes: setup.ranges.then_some(limits),
            },
        }
    }

    /// Descriptor `index` of the queue's table.
    fn descriptor(&self, index: u16, gpa: u64, len: u32, flags: u16, next: u16) {
        let descriptor = RawDescriptor {
            gpa,
            len,
            flags,
            next,
        };
        self.guest.write_descriptor(index, descriptor);
    }

    /// A chain from descriptor 0 on, linked one behind the other.
    fn chain(&self, buffers: &[(u64, u32, u16)]) {
        for (index, &(gpa, len, flags)) in (0..).zip(buffers) {
            let next = if usize::from(index) + 1 < buffers.len() {
                NEXT
            } else {
                0
            };
            self.descriptor(index, gpa, len, flags | next, index + 1);
        }
    }

    /// A linked chain in an indirect table at `TABLE`, or wherever.
    fn table(&self, at: u64, buffers: &[(u64, u32, u16)]) {
        let last = buffers.len() - 1;
        let entries = buffers
            .iter()
            .enumerate()
            .map(|(i, &(gpa, len, flags))| RawDescriptor {
                gpa,
                len,
                flags: flags | if i < last { NEXT } else { 0 },
                next: i as u16 + 1,
            });
        self.guest
            .write_raw_table(Gpa(at), &entries.collect::<Vec<_>>());
    }

    fn header(&self, at: u64, request: u32, sector: u64) {
        let words = [u64::from(request), sector].map(u64::to_le_bytes).concat();
        self.guest.write(Gpa(at), &words);
    }

    /// A request in three buffers: header, data, status.
    fn request(&self, request: u32, sector: u64, data_len: u32) {
        let flags = if matches!(request, request_type::IN | request_type::GET_ID) {
            WRITE
        } else {
            0
        };
        self.header(HEADER, request, sector);
        if data_len == 0 {
            self.chain(&[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
        } else {
            self.chain(&[(HEADER, 16, 0), (DATA, data_len, flags), (STATUS, 1, WRITE)]);
        }
    }

    /// A DISCARD or WRITE_ZEROES with these segments: (sector, sectors, flags).
    fn range_request(&self, request: u32, segments: &[(u64, u32, u32)]) {
        let segments: Vec<u8> = segments
            .iter()
            .flat_map(|&(sector, num_sectors, flags)| {
                let segment = RangeSegment {
                    sector: sector.into(),
                    num_sectors: num_sectors.into(),
                    flags: flags.into(),
                };
                segment.as_bytes().to_vec()
            })
            .collect();
        self.guest.write(Gpa(DATA), &segments);
        self.request(request, 0, segments.len() as u32);
    }

    /// All guest memory but the used ring, and but the status byte.
    fn snapshot(&self) -> Vec<u8> {
        let used = self.guest.virtqueue_config().used.addr().get();
        let mut all = Vec::new();
        for region in self.memory.regions() {
            let at = all.len();
            all.resize(at + region.len as usize, 0);
            self.guest.read(region.gpa, &mut all[at..]);
            let hva = region.hva.addr().get();
            if (hva..hva + region.len as usize).contains(&used) {
                let ring = at + used - hva;
                all[ring..ring + used_ring_bytes(SIZE) as usize].fill(0);
            }
            if region.gpa.0 == LEFT {
                all[at + (STATUS - LEFT) as usize] = 0;
            }
        }
        all
    }

    /// Offers `head` and serves it; `meanwhile` is what the guest does once its head was taken.
    fn serve_while(&mut self, head: u16, meanwhile: impl FnOnce(&Bench)) -> Answer {
        self.guest.offer(head);
        self.guest.publish();
        if let Err(error) = self.take() {
            return Answer::Broken(error);
        }
        meanwhile(self);
        let before = self.snapshot();
        let answer = self.answer(head);
        assert!(
            before == self.snapshot(),
            "more than the status byte was written"
        );
        answer
    }

    fn serve(&mut self, head: u16) -> Answer {
        self.serve_while(head, |_| ())
    }

    fn take(&mut self) -> Result<(), RingError> {
        let before = self.snapshot();
        let taken = self.queue.available().and_then(|count| {
            assert!(count > 0);
            self.queue.pop(&self.memory, &mut self.chain)
        });
        assert!(before == self.snapshot(), "a pop wrote into guest memory");
        taken.map(|taken| assert!(taken))
    }

    /// Parses what was popped and gives the head back.
    fn answer(&mut self, head: u16) -> Answer {
        assert_eq!(self.chain.head().get(), head);
        let (carried, used_len) = match blk::parse(&mut self.chain, &mut self.ranges, &self.limits)
        {
            Ok(request) => (
                Some(request.op),
                blk::finish(
                    request.status,
                    tandem::block::BlockStatus::Ok,
                    request.data_in,
                ),
            ),
            Err(reject) => (None, reject.finish()),
        };
        self.queue.push_used(self.chain.head(), used_len);
        self.queue.publish_used();
        assert_eq!(self.guest.take_used(), Some((head.into(), used_len)), "I5");
        assert_eq!((self.guest.take_used(), self.queue.in_flight()), (None, 0));
        match carried {
            Some(op) => Answer::Carried(op),
            None => Answer::Refused {
                status: self.status(),
                used_len,
            },
        }
    }

    fn status(&self) -> u8 {
        let mut byte = [0];
        self.guest.read(Gpa(STATUS), &mut byte);
        byte[0]
    }

    /// The data segments left in the chain, as guest addresses.
    fn data(&self) -> Vec<(u64, u32)> {
        self.chain
            .segments()
            .iter()
            .map(|s| (s.dma(), s.len()))
            .collect()
    }

    #[track_caller]
    fn faulted(&self, fault: ChainFault) {
        assert_eq!(self.chain.fault(), Some(fault));
    }
}

fn bench() -> Bench {
    Bench::new(&Setup::default())
}

fn read(sector: u64, blocks: u32) -> Answer {
    Answer::Carried(BlockOp::Read(BlockRange::new(
        Lba::new(sector),
        BlockCount::new(blocks),
    )))
}

fn write(sector: u64, blocks: u32) -> Answer {
    Answer::Carried(BlockOp::Write(BlockRange::new(
        Lba::new(sector),
        BlockCount::new(blocks),
    )))
}

// ---- the rings ----

#[test]
fn chain_that_loops_comes_back_unserved() {
    let mut b = bench();
    b.request(request_type::OUT, 0, 512);
    b.descriptor(1, DATA, 512, NEXT, 0);
    assert_eq!(b.serve(0), R0_SILENT);
    b.faulted(ChainFault::TooLong);
}

#[test]
fn next_outside_the_table_comes_back_unserved() {
    for next in [SIZE, SIZE + 1, u16::MAX] {
        let mut b = bench();
        b.request(request_type::OUT, 0, 512);
        b.descriptor(1, DATA, 512, NEXT, next);
        assert_eq!(b.serve(0), R0_SILENT, "next {next}");
        b.faulted(ChainFault::NextOutOfRange);
    }
}

#[test]
fn head_outside_the_table_breaks_the_ring() {
    for head in [SIZE, u16::MAX] {
        let error = RingError::HeadOutOfRange { head, size: SIZE };
        assert_eq!(bench().serve(head), Answer::Broken(error));
    }
}

#[test]
fn chain_longer_than_the_queue_comes_back_unserved() {
    // A table of one entry more than the queue has.
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 0);
    let mut buffers = vec![(DATA, 512, 0); usize::from(SIZE) + 1];
    buffers[0] = (HEADER, 16, 0);
    *buffers.last_mut().unwrap() = (STATUS, 1, WRITE);
    b.table(TABLE, &buffers);
    b.chain(&[(TABLE, 16 * buffers.len() as u32, INDIRECT)]);
    assert_eq!(b.serve(0), R0_SILENT);
    b.faulted(ChainFault::IndirectTooLong);

    // As many as the queue has in the table, and one before it.
    let mut b = bench();
    b.table(TABLE, &buffers[1..]);
    b.header(HEADER, request_type::OUT, 0);
    b.chain(&[(HEADER, 16, 0), (TABLE, 16 * u32::from(SIZE), INDIRECT)]);
    assert_eq!(b.serve(0), R0_SILENT);
    b.faulted(ChainFault::TooLong);
}

#[test]
fn chain_as_long_as_the_queue_is_served() {
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 0);
    let mut buffers = vec![(DATA, 512, 0); SIZE.into()];
    buffers[0] = (HEADER, 16, 0);
    *buffers.last_mut().unwrap() = (STATUS, 1, WRITE);
    b.chain(&buffers);
    assert_eq!(b.serve(0), write(0, u32::from(SIZE) - 2));
}

#[test]
fn buffer_in_no_region_comes_back_with_ioerr() {
    for gpa in [0, HOLE, LEFT - 0x1000, 1 << 55] {
        let mut b = bench();
        b.request(request_type::OUT, 0, 512);
        b.descriptor(1, gpa, 512, NEXT, 2);
        assert_eq!(b.serve(0), R0, "{gpa:#x}");
        b.faulted(ChainFault::Unmapped);
    }
}

#[test]
fn buffer_whose_end_wraps_comes_back_with_ioerr() {
    for gpa in [u64::MAX, u64::MAX - 510] {
        let mut b = bench();
        b.request(request_type::IN, 0, 512);
        b.descriptor(1, gpa, 512, WRITE | NEXT, 2);
        assert_eq!(b.serve(0), R0, "{gpa:#x}");
        b.faulted(ChainFault::Wraps);
    }
}

#[test]
fn buffer_that_runs_into_a_hole_comes_back_with_ioerr_and_nothing_is_written() {
    for before in [1, 511] {
        let mut b = bench();
        b.request(request_type::IN, 0, 512);
        b.descriptor(1, HOLE - before, 512, WRITE | NEXT, 2);
        assert_eq!(b.serve(0), R0);
        b.faulted(ChainFault::Unmapped);
    }
}

#[test]
fn buffer_over_adjacent_regions_is_served_in_two_segments() {
    let mut b = bench();
    b.request(request_type::IN, 3, 1024);
    b.descriptor(1, RIGHT - 100, 1024, WRITE | NEXT, 2);
    assert_eq!(b.serve(0), read(3, 2));
    assert_eq!(b.data(), [(RIGHT - 100, 100), (RIGHT, 924)]);
}

#[test]
fn buffers_of_four_gib_in_all_come_back_with_ioerr() {
    // The same 8 MiB over and over: one byte more than 32 bits of used length can say.
    const MIB: u32 = 1 << 20;
    for (last, fault) in [
        (8 * MIB - 17, None),
        (8 * MIB - 16, Some(ChainFault::TotalLength)),
    ] {
        let config = SimGuestConfig {
            layout: RingLayout::Split,
            size: 1024,
            event_idx: false,
            indirect: false,
            max_data: 0,
            first_index: 0,
            base: Gpa(0),
        };
        let regions = [(0, config.bytes()), (0x1000_0000, (8 * MIB).into())];
        let regions = regions.map(|(gpa, len)| SimRegion {
            gpa: Gpa(gpa),
            len,
            dma: gpa,
        });
        let memory = Arc::new(heap_memory(&regions).unwrap());
        let mut guest = SimGuest::new(Arc::clone(&memory), config).unwrap();
        // SAFETY: the only queue, and the memory is dropped behind it.
        let mut queue = unsafe { guest.virtqueue() }.unwrap();
        for index in 0..=512 {
            let (len, flags) = match index {
                0 => (16, NEXT),
                512 => (last, WRITE),
                _ => (8 * MIB, WRITE | NEXT),
            };
            let descriptor = RawDescriptor {
                gpa: 0x1000_0000,
                len,
                flags,
                next: index + 1,
            };
            guest.write_descriptor(index, descriptor);
        }
        guest.offer(0);
        guest.publish();
        let mut chain = Chain::new(1025);
        queue.available().unwrap();
        queue.pop(&memory, &mut chain).unwrap();
        assert_eq!(chain.fault(), fault);
        assert!(chain.take_status().is_some());
    }
}

#[test]
fn zero_length_descriptors_are_passed_over() {
    for gpa in [DATA, 0, HOLE, u64::MAX] {
        let mut b = bench();
        b.header(HEADER, request_type::OUT, 5);
        b.chain(&[
            (gpa, 0, 0),
            (HEADER, 16, 0),
            (gpa, 0, 0),
            (DATA, 512, 0),
            (gpa, 0, WRITE),
            (STATUS, 1, WRITE),
            (gpa, 0, WRITE),
        ]);
        assert_eq!(b.serve(0), write(5, 1));
    }
}

#[test]
fn chain_of_empty_descriptors_alone_comes_back_unserved() {
    let mut b = bench();
    b.chain(&[(DATA, 0, 0), (DATA, 0, WRITE)]);
    assert_eq!(b.serve(0), R0_SILENT);
}

#[test]
fn indirect_table_without_the_feature_breaks_the_ring() {
    let mut b = Bench::new(&Setup {
        indirect: false,
        ..Setup::default()
    });
    b.table(TABLE, &[(HEADER, 16, 0), (STATUS, 1, WRITE)]);
    b.chain(&[(TABLE, 32, INDIRECT)]);
    let error = RingError::IndirectNotNegotiated { head: 0 };
    assert_eq!(b.serve(0), Answer::Broken(error));
}

#[test]
fn table_in_a_table_comes_back_with_ioerr() {
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 0);
    b.table(
        TABLE,
        &[(HEADER, 16, 0), (TABLE, 48, INDIRECT), (STATUS, 1, WRITE)],
    );
    b.chain(&[(TABLE, 48, INDIRECT)]);
    assert_eq!(b.serve(0), R0);
    b.faulted(ChainFault::NestedIndirect);
}

#[test]
fn indirect_length_that_is_no_multiple_of_16_comes_back_unserved() {
    for len in [0, 1, 15, 17, 31, 47, u32::MAX] {
        let mut b = bench();
        b.table(
            TABLE,
            &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)],
        );
        b.chain(&[(TABLE, len, INDIRECT)]);
        assert_eq!(b.serve(0), R0_SILENT, "length {len}");
        b.faulted(ChainFault::IndirectLength);
    }
}

#[test]
fn indirect_table_outside_memory_comes_back_unserved() {
    for (gpa, fault) in [
        (0, ChainFault::IndirectUnmapped),
        (HOLE, ChainFault::IndirectUnmapped),
        // Its last entry alone lies in the hole.
        (HOLE - 32, ChainFault::IndirectUnmapped),
        (HOLE - 33, ChainFault::IndirectUnmapped),
        (u64::MAX - 46, ChainFault::Wraps),
        (u64::MAX - 15, ChainFault::Wraps),
    ] {
        let mut b = bench();
        b.chain(&[(gpa, 48, INDIRECT)]);
        assert_eq!(b.serve(0), R0_SILENT, "{gpa:#x}");
        b.faulted(fault);
    }
}

#[test]
fn indirect_table_over_two_regions_or_unaligned_is_served() {
    for at in [
        RIGHT - 16,
        RIGHT - 24,
        RIGHT - 1,
        RIGHT - 47,
        LEFT + 0x4001,
        LEFT + 0x4008,
    ] {
        let mut b = bench();
        b.header(HEADER, request_type::OUT, 7);
        b.table(at, &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)]);
        b.chain(&[(at, 48, INDIRECT)]);
        assert_eq!(b.serve(0), write(7, 1), "table at {at:#x}");
    }
}

#[test]
fn indirect_with_next_comes_back_with_ioerr() {
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 0);
    b.table(
        TABLE,
        &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)],
    );
    b.chain(&[(TABLE, 48, INDIRECT), (STATUS, 1, WRITE)]);
    assert_eq!(b.serve(0), R0);
    b.faulted(ChainFault::IndirectWithNext);
}

#[test]
fn indirect_with_write_is_served_and_write_ignored() {
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 9);
    b.table(
        TABLE,
        &[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, WRITE)],
    );
    b.chain(&[(TABLE, 48, INDIRECT | WRITE)]);
    assert_eq!(b.serve(0), write(9, 1));
}

#[test]
fn descriptors_and_then_a_table_are_served() {
    for direct in 1..=3 {
        let mut b = bench();
        b.header(HEADER, request_type::OUT, 11);
        let all = [
            (HEADER, 16, 0),
            (DATA, 512, 0),
            (DATA + 512, 512, 0),
            (STATUS, 1, WRITE),
        ];
        let (first, rest) = all.split_at(direct);
        b.table(TABLE, rest);
        b.chain(&[first, &[(TABLE, 16 * rest.len() as u32, INDIRECT)]].concat());
        assert_eq!(b.serve(0), write(11, 2), "{direct} direct");
        assert_eq!(b.data(), [(DATA, 512), (DATA + 512, 512)]);
    }
}

#[test]
fn header_in_pieces_and_joined_buffers_are_served() {
    // A header of 16 single bytes; header and data in one; data and status in one; everything in two.
    let pieces: Vec<(u64, u32, u16)> = (0..14)
        .map(|i| (HEADER + i, if i == 13 { 3 } else { 1 }, 0))
        .collect();
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 1);
    b.chain(&[&pieces, &[(DATA, 512, 0), (STATUS, 1, WRITE)][..]].concat());
    assert_eq!(b.serve(0), write(1, 1));

    let mut b = bench();
    b.header(DATA - 16, request_type::OUT, 2);
    b.chain(&[(DATA - 16, 16 + 512, 0), (STATUS, 1, WRITE)]);
    assert_eq!(b.serve(0), write(2, 1));
    assert_eq!(b.data(), [(DATA, 512)]);

    let mut b = bench();
    b.header(HEADER, request_type::IN, 3);
    b.chain(&[(HEADER, 16, 0), (STATUS - 1024, 1025, WRITE)]);
    assert_eq!(b.serve(0), read(3, 2));
    assert_eq!(b.data(), [(STATUS - 1024, 1024)]);
    assert_eq!(b.status(), status::OK);

    let mut b = bench();
    b.header(HEADER, request_type::IN, 4);
    b.chain(&[
        (HEADER, 5, 0),
        (HEADER + 5, 11, 0),
        (STATUS - 512, 100, WRITE),
        (STATUS - 412, 413, WRITE),
    ]);
    assert_eq!(b.serve(0), read(4, 1));
    assert_eq!(b.data(), [(STATUS - 512, 100), (STATUS - 412, 412)]);
}

#[test]
fn readable_behind_writable_comes_back_with_ioerr() {
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 0);
    b.chain(&[(HEADER, 16, 0), (STATUS, 1, WRITE), (DATA, 512, 0)]);
    assert_eq!(b.serve(0), R0);
    b.faulted(ChainFault::ReadableAfterWritable);
}

#[test]
fn writable_header_comes_back_with_ioerr() {
    let mut b = bench();
    b.header(HEADER, request_type::IN, 0);
    b.chain(&[(HEADER, 16, WRITE), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
    assert_eq!(b.serve(0), R0);
}

#[test]
fn readable_status_is_never_written() {
    let mut b = bench();
    b.header(HEADER, request_type::OUT, 0);
    b.chain(&[(HEADER, 16, 0), (DATA, 512, 0), (STATUS, 1, 0)]);
    assert_eq!(b.serve(0), R0_SILENT);
}

#[test]
fn header_too_short_or_alone_comes_back() {
    // 15 bytes and a status; a header alone; a status alone; a header of 15 bytes alone.
    let mut b = bench();
    b.header(HEADER, request_type::FLUSH, 0);
    b.chain(&[(HEADER, 15, 0), (STATUS, 1, WRITE)]);
    assert_eq!(b.serve(0), R0);
    for (buffers, answer) in [
        (&[(HEADER, 16, 0)][..], R0_SILENT),
        (&[(STATUS, 1, WRITE)][..], R0),
        (&[(HEADER, 15, 0)][..], R0_SILENT),
        (&[(HEADER, 16, 0), (DATA, 512, 0)][..], R0_SILENT),
    ] {
        let mut b = bench();
        b.header(HEADER, request_type::OUT, 0);
        b.chain(buffers);
        assert_eq!(b.serve(0), answer, "{buffers:?}");
    }
}

#[test]
fn avail_index_that_jumps_breaks_the_ring() {
    for distance in [SIZE as i16 + 1, 1000, i16::MAX, -1, -2, i16::MIN] {
        let mut b = bench();
        b.request(request_type::FLUSH, 0, 0);
        b.guest.jump(distance);
        b.guest.publish();
        let error = b.queue.available().unwrap_err();
        assert!(
            matches!(error, RingError::AvailIndex { .. }),
            "{distance}: {error}"
        );
    }
    // As many as the queue has entries may come at once.
    let mut b = bench();
    b.guest.jump(SIZE as i16);
    b.guest.publish();
    assert_eq!(b.queue.available(), Ok(SIZE));
    // With some of them still waiting, the next step may only be so much shorter.
    b.guest.jump(1);
    b.guest.publish();
    assert!(b.queue.available().is_err());
}

#[test]
fn avail_index_that_goes_back_by_one_breaks_the_ring() {
    let mut b = bench();
    b.request(request_type::FLUSH, 0, 0);
    assert_eq!(b.serve(0), Answer::Carried(BlockOp::Flush));
    b.guest.jump(-1);
    b.guest.publish();
    assert!(matches!(
        b.queue.available(),
        Err(RingError::AvailIndex { .. })
    ));
}

#[test]
fn head_in_flight_offered_again_breaks_the_ring_and_is_taken_once() {
    let mut b = bench();
    b.request(request_type::FLUSH, 0, 0);
    b.guest.offer(0);
    b.guest.offer(0);
    b.guest.publish();
    assert_eq!(b.queue.available(), Ok(2));
    assert_eq!(b.queue.pop(&b.memory, &mut b.chain), Ok(true));
    let error = b.queue.pop(&b.memory, &mut Chain::new(4)).unwrap_err();
    assert_eq!(error, RingError::DuplicateHead { head: 0 });
    // The first is still answered, once.
    assert_eq!(b.queue.in_flight(), 1);
    assert_eq!(b.answer(0), Answer::Carried(BlockOp::Flush));
}

#[test]
fn garbage_over_flags_events_and_the_used_ring_is_harmless() {
    for event_idx in [false, true] {
        for value in [0, 1, 0xfffe, u16::MAX] {
            let mut b = Bench::new(&Setup {
                event_idx,
                ..Setup::default()
            });
            b.request(request_type::FLUSH, 0, 0);
            let first = b.guest.virtqueue_config().next_used;
            for round in 0..40_u16 {
                b.guest.scribble(value);
                b.guest.offer(0);
                b.guest.publish();
                b.take().unwrap();
                b.guest.scribble(value);
                let accepted = blk::parse(&mut b.chain, &mut b.ranges, &b.limits).is_ok();
                assert!(accepted);
                b.queue.push_used(b.chain.head(), 1);
                b.queue.publish_used();
                let _ = b.queue.needs_signal();
                // Index and element are ours, whatever stood there.
                let used = b.guest.virtqueue_config().used;
                // SAFETY: the used ring, which the guest's memory holds.
                let index = unsafe { tandem::virtio::virtqueue::used_index(used) };
                assert_eq!(index, first.wrapping_add(round).wrapping_add(1));
            }
        }
    }
}

#[test]
fn what_the_guest_changes_after_the_pop_does_not_count() {
    // Descriptors, the indirect table.
    for indirect in [false, true] {
        let mut b = bench();
        b.header(HEADER, request_type::IN, 8);
        let buffers = [(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)];
        if indirect {
            b.table(TABLE, &buffers);
            b.chain(&[(TABLE, 48, INDIRECT)]);
        } else {
            b.chain(&buffers);
        }
        let answer = b.serve_while(0, |b| {
            let elsewhere = [(HOLE, 1, 0), (HOLE, 4096, 0), (HOLE, 1, WRITE)];
            b.table(TABLE, &elsewhere);
            b.chain(&elsewhere);
        });
        assert_eq!(answer, read(8, 1));
        assert_eq!(b.data(), [(DATA, 512)]);
    }
}

#[test]
fn header_and_range_segments_changed_after_the_parse_do_not_count() {
    let mut b = bench();
    b.range_request(request_type::WRITE_ZEROES, &[(16, 8, 0)]);
    b.guest.offer(0);
    b.guest.publish();
    b.take().unwrap();
    let request = blk::parse(&mut b.chain, &mut b.ranges, &b.limits).unwrap();
    b.header(HEADER, request_type::OUT, 0);
    b.range_request(request_type::DISCARD, &[(u64::MAX, u32::MAX, u32::MAX)]);
    assert_eq!(request.op, BlockOp::WriteZeroes);
    let kept = BlockRange::new(Lba::new(16), BlockCount::new(8));
    assert_eq!(b.ranges.as_slice(), [kept]);
}

#[test]
fn ring_in_a_hole_or_over_two_regions_is_not_found() {
    let b = bench();
    let len = avail_ring_bytes(SIZE);
    for gpa in [HOLE, HOLE - 2, RIGHT - 2, 0, u64::MAX - 1] {
        assert_eq!(b.memory.contiguous(Gpa(gpa), len), None, "{gpa:#x}");
    }
    assert!(
        b.memory
            .contiguous(Gpa(HOLE - u64::from(len)), len)
            .is_some()
    );
}

#[test]
fn queue_size_of_no_power_of_two_or_too_large_is_refused() {
    let good = bench().guest.virtqueue_config();
    for size in [
        0,
        3,
        SIZE - 1,
        MAX_QUEUE_SIZE + 1,
        MAX_QUEUE_SIZE * 2,
        1 << 15,
        u16::MAX,
    ] {
        let config = tandem::virtio::virtqueue::VirtqueueConfig { size, ..good };
        // SAFETY: refused before anything is touched, which is what this test is about.
        let refused = unsafe { Virtqueue::new(config) }.unwrap_err();
        assert_eq!(refused, QueueError::Size(size));
    }
}

#[test]
fn ring_that_is_not_aligned_is_refused() {
    let good = bench().guest.virtqueue_config();
    for (part, alignment) in [
        ("descriptor table", 16),
        ("avail ring", 2),
        ("used ring", 4),
    ] {
        for off in 1..alignment {
            let mut config = good;
            let place = match part {
                "descriptor table" => &mut config.descriptor_table,
                "avail ring" => &mut config.avail,
                _ => &mut config.used,
            };
            *place = place.map_addr(|addr| addr.saturating_add(off));
            // SAFETY: as above.
            let refused = unsafe { Virtqueue::new(config) }.unwrap_err();
            assert_eq!(
                refused,
                QueueError::Misaligned { part, alignment },
                "off by {off}"
            );
        }
    }
}

// ---- virtio-blk ----

#[test]
fn request_that_reaches_behind_the_end_is_an_error() {
    for (sector, bytes) in [
        (SECTORS, 512),
        (SECTORS - 1, 1024),
        (SECTORS + 1, 512),
        // sector + n wraps; so does sector * 512, with nothing left of it.
        (u64::MAX, 512),
        (u64::MAX - 1, 1024),
        (1 << 55, 512),
        ((1 << 55) + 1, 512),
        (u64::MAX >> 9, 512),
    ] {
        let mut b = bench();
        b.request(request_type::OUT, sector, bytes);
        assert_eq!(b.serve(0), E, "write of {bytes} at sector {sector:#x}");
        let mut b = bench();
        b.request(request_type::IN, sector, bytes);
        assert_eq!(
            b.serve(0),
            E_BEHIND_DATA,
            "read of {bytes} at sector {sector:#x}"
        );
    }
    // A request larger than the disk.
    let mut b = Bench::new(&Setup {
        blocks: 7,
        ..Setup::default()
    });
    b.request(request_type::OUT, 0, 4096);
    assert_eq!(b.serve(0), E);
}

#[test]
fn request_that_ends_with_the_disk_is_served() {
    let mut b = bench();
    b.request(request_type::OUT, SECTORS - 2, 1024);
    assert_eq!(b.serve(0), write(SECTORS - 2, 2));
}

#[test]
fn length_that_is_no_whole_number_of_sectors_is_an_error() {
    for bytes in [0, 1, 511, 513, 1023] {
        let mut b = bench();
        b.request(request_type::OUT, 0, bytes);
        assert_eq!(b.serve(0), E, "write of {bytes}");
        let mut b = bench();
        b.request(request_type::IN, 0, bytes);
        assert_eq!(
            b.serve(0),
            if bytes == 0 { E } else { E_BEHIND_DATA },
            "read of {bytes}"
        );
    }
}

#[test]
fn unknown_request_is_unsupported() {
    // 2 and 3: SCSI commands; 5: their flush; 14: secure erase; 15..=25: zoned; the barrier bit of old.
    for request in [
        2,
        3,
        5,
        6,
        7,
        9,
        10,
        12,
        14,
        15,
        16,
        18,
        20,
        22,
        24,
        26,
        77,
        1 << 31,
        (1 << 31) | 1,
        u32::MAX,
    ] {
        let mut b = bench();
        b.request(request, 0, 512);
        assert_eq!(b.serve(0), U, "type {request}");
        // Nothing is told of data that was not written.
        let mut b = bench();
        b.header(HEADER, request, 0);
        b.chain(&[(HEADER, 16, 0), (DATA, 512, WRITE), (STATUS, 1, WRITE)]);
        let silent = Answer::Refused {
            status: status::UNSUPP,
            used_len: 0,
        };
        assert_eq!(b.serve(0), silent, "type {request}");
    }
}

#[test]
fn request_of_a_feature_that_was_not_negotiated_is_unsupported() {
    // GET_ID (8) belongs to no feature bit in virtio 1.2 and is always served.
    let without = Setup {
        flush: false,
        ranges: false,
        ..Setup::default()
    };
    for request in [
        request_type::FLUSH,
        request_type::DISCARD,
        request_type::WRITE_ZEROES,
        2,
        14,
    ] {
        let mut b = Bench::new(&without);
        b.range_request(request, &[(0, 8, 0)]);
        assert_eq!(b.serve(0), U, "type {request}");
    }
    let mut b = Bench::new(&without);
    b.request(request_type::GET_ID, 0, 20);
    assert_eq!(b.serve(0), Answer::Carried(BlockOp::DeviceId));
}

#[test]
fn everything_that_changes_a_read_only_disk_is_an_error() {
    let read_only = Setup {
        read_only: true,
        ..Setup::default()
    };
    let mut b = Bench::new(&read_only);
    b.request(request_type::OUT, 0, 512);
    assert_eq!(b.serve(0), E);
    for request in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        let mut b = Bench::new(&read_only);
        b.range_request(request, &[(0, 8, 0)]);
        assert!(
            matches!(
                b.serve(0),
                Answer::Refused {
                    status: status::IOERR,
                    ..
                }
            ),
            "type {request}"
        );
        assert!(b.ranges.as_slice().is_empty());
    }
    let mut b = Bench::new(&read_only);
    b.request(request_type::IN, 0, 512);
    assert_eq!(b.serve(0), read(0, 1));
}

#[test]
fn flush_with_a_sector_or_data_is_served() {
    for (sector, bytes) in [(0, 0), (u64::MAX, 0), (7, 512), (SECTORS, 3)] {
        let mut b = bench();
        b.request(request_type::FLUSH, sector, bytes);
        assert_eq!(b.serve(0), Answer::Carried(BlockOp::Flush));
    }
}

#[test]
fn get_id_of_another_length_is_truncated() {
    for (bytes, data_in) in [(20, 20), (1, 1), (19, 19), (21, 20), (512, 20)] {
        let mut b = bench();
        b.request(request_type::GET_ID, 0, bytes);
        b.guest.offer(0);
        b.guest.publish();
        b.take().unwrap();
        let request = blk::parse(&mut b.chain, &mut b.ranges, &b.limits).unwrap();
        assert_eq!(
            (request.op, request.data_in),
            (BlockOp::DeviceId, data_in),
            "{bytes} bytes"
        );
    }
}

#[test]
fn discard_with_unmap_or_a_reserved_flag_is_unsupported() {
    for flags in [1, 2, 3, 1 << 31, u32::MAX] {
        let mut b = bench();
        b.range_request(request_type::DISCARD, &[(0, 8, flags)]);
        assert_eq!(b.serve(0), U, "flags {flags:#x}");
    }
}

#[test]
fn write_zeroes_with_a_reserved_flag_is_unsupported_and_with_unmap_is_served() {
    for flags in [2, 3, 1 << 31, u32::MAX] {
        let mut b = bench();
        b.range_request(request_type::WRITE_ZEROES, &[(0, 8, flags)]);
        assert_eq!(b.serve(0), U, "flags {flags:#x}");
    }
    for flags in [0, 1] {
        let mut b = bench();
        b.range_request(request_type::WRITE_ZEROES, &[(16, 8, flags)]);
        assert_eq!(b.serve(0), Answer::Carried(BlockOp::WriteZeroes));
        assert_eq!(
            b.ranges
                .as_slice()
                .iter()
                .map(|r| r.unmap)
                .collect::<Vec<_>>(),
            [flags == 1]
        );
    }
}

#[test]
fn more_segments_than_offered_are_unsupported() {
    for request in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        let mut b = bench();
        b.range_request(request, &[(0, 8, 0); 4]);
        assert!(matches!(b.serve(0), Answer::Carried(_)));
        assert_eq!(b.ranges.as_slice().len(), 4);
        let mut b = bench();
        b.range_request(request, &[(0, 8, 0); 5]);
        assert_eq!(b.serve(0), U, "type {request}");
    }
}

#[test]
fn part_of_a_segment_is_an_error() {
    for request in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        for bytes in [0, 1, 15, 17, 31] {
            let mut b = bench();
            b.request(request, 0, bytes);
            assert!(
                matches!(
                    b.serve(0),
                    Answer::Refused {
                        status: status::IOERR,
                        ..
                    }
                ),
                "{bytes} bytes"
            );
        }
    }
}

#[test]
fn range_that_overflows_or_reaches_behind_the_end_is_an_error() {
    for request in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        for (sector, sectors) in [
            (0, 0x80_0000),
            (0, u32::MAX),
            (u64::MAX, 1),
            (u64::MAX, u32::MAX),
            (1 << 55, 8),
            (SECTORS, 1),
            (SECTORS - 1, 2),
            (SECTORS + 1, 0),
            (u64::MAX, 0),
        ] {
            let mut b = bench();
            // The limit of sectors in one segment must not be what refuses it.
            b.limits.discard = Some(RangeLimits {
                max_sectors: u32::MAX,
                max_segments: 4,
            });
            b.limits.write_zeroes = b.limits.discard;
            // One that is right comes first: nothing of a wrong request is carried out.
            b.range_request(request, &[(0, 8, 0), (sector, sectors, 0)]);
            assert_eq!(b.serve(0), E, "type {request}: {sectors:#x} at {sector:#x}");
        }
    }
}

#[test]
fn range_of_more_sectors_than_offered_is_an_error() {
    for request in [request_type::DISCARD, request_type::WRITE_ZEROES] {
        let mut b = Bench::new(&Setup {
            blocks: 1 << 20,
            ..Setup::default()
        });
        b.range_request(request, &[(0, 4097, 0)]);
        assert_eq!(b.serve(0), E, "type {request}");
    }
}

#[test]
fn range_that_is_not_whole_blocks_shrinks_as_discard_and_fails_as_write_zeroes() {
    let blocks_of_4096 = Setup {
        block_shift: 12,
        blocks: 256,
        ..Setup::default()
    };
    for (sector, sectors, lba, blocks) in
        [(1, 16, 1, 1), (7, 10, 1, 1), (8, 15, 1, 1), (9, 15, 2, 1)]
    {
        let mut b = Bench::new(&blocks_of_4096);
        b.range_request(request_type::DISCARD, &[(sector, sectors, 0)]);
        assert_eq!(b.serve(0), Answer::Carried(BlockOp::Discard));
        let kept = BlockRange::new(Lba::new(lba), BlockCount::new(blocks));
        assert_eq!(
            b.ranges.as_slice(),
            [kept],
            "{sectors} sectors from {sector}"
        );

        let mut b = Bench::new(&blocks_of_4096);
        b.range_request(request_type::WRITE_ZEROES, &[(sector, sectors, 0)]);
        assert_eq!(b.serve(0), E);
    }
    // Less than a block: nothing to discard, and that is a success.
    let mut b = Bench::new(&blocks_of_4096);
    b.range_request(request_type::DISCARD, &[(1, 7, 0)]);
    assert_eq!(b.serve(0), Answer::Carried(BlockOp::Discard));
    assert!(b.ranges.as_slice().is_empty());
}

#[test]
fn request_that_is_not_whole_blocks_is_an_error_and_never_rounded() {
    let blocks_of_4096 = Setup {
        block_shift: 12,
        blocks: 256,
        ..Setup::default()
    };
    for (sector, bytes) in [(1, 4096), (0, 512), (8, 3584), (7, 4096)] {
        let mut b = Bench::new(&blocks_of_4096);
        b.request(request_type::OUT, sector, bytes);
        assert_eq!(b.serve(0), E, "{bytes} bytes at sector {sector}");
    }
    let mut b = Bench::new(&blocks_of_4096);
    b.request(request_type::OUT, 8, 4096);
    assert_eq!(b.serve(0), write(1, 1));
}

#[test]
fn every_framing_of_the_simulated_guest_is_the_same_request() {
    for framing in [Framing::Plain, Framing::SplitHeader, Framing::Joined] {
        for direct in [None, Some(0), Some(1), Some(2)] {
            let mut b = bench();
            let request = SimRequest {
                framing,
                direct,
                pieces: 3,
                ..SimRequest::new(request_type::OUT, 5, 1536, false)
            };
            let head = b.guest.submit(&request, &[7; 1536]).unwrap();
            b.guest.publish();
            b.take().unwrap();
            assert_eq!(b.chain.head().get(), head);
            let parsed = blk::parse(&mut b.chain, &mut b.ranges, &b.limits).unwrap();
            assert_eq!(
                Answer::Carried(parsed.op),
                write(5, 3),
                "{framing:?}, direct {direct:?}"
            );
            let mut bytes = vec![0; 1536];
            let mut at = 0;
            for segment in b.chain.readable() {
                at += segment.copy_to(&mut bytes[at..]);
            }
            assert_eq!((at, &bytes[..]), (1536, &[7; 1536][..]));
        }
    }
}
