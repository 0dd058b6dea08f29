//! Our split virtqueue and descriptor walk against the crate `virtio-queue`, which nobody here wrote, over the same
//! bytes: any descriptor table, valid or not.
//!
//! What both accept must be the same segments. Where they differ by design the difference is asserted, not skipped:
//! `virtio-queue` ends a malformed chain early where we refuse it; it does not look where buffers lie, in which order
//! they come, or whether INDIRECT comes with NEXT; it takes indirect tables of up to 65535 entries where we take
//! queue-size descriptors in all; it follows indirect tables whether or not they were negotiated; and without EVENT_IDX
//! it signals whatever the guest says. Start at `explain`.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::collections::BTreeSet;
use std::ptr::NonNull;
use std::sync::Arc;

use proptest::prelude::*;
use tandem::sim::{RawDescriptor, SimGuest, SimGuestConfig};
use tandem::virtio::chain::{Chain, ChainFault};
use tandem::virtio::memory::{Gpa, GuestMemory, GuestRegion, Segment};
use tandem::virtio::virtqueue::{
    RingError, RingLayout, Virtqueue, avail_ring_bytes, used_ring_bytes,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// What the device side adds to a guest address, so that the segment of an address can be told from its `dma`.
const DMA: u64 = 0x5_0000_0000;

/// The rings; then three regions, the last two of them adjacent; holes between the others. The largest is where most
/// buffers are, as in a guest.
const RINGS: (u64, usize) = (0x1_0000, 0x8000);
const LARGE: (u64, usize) = (0x10_0000, 0x2_0000);
const LEFT: (u64, usize) = (0x20_0000, 0x2000);
const RIGHT: (u64, usize) = (0x20_2000, 0x3000);

/// One guest, seen by both.
struct Bench {
    theirs: GuestMemoryMmap,
    ours: Arc<GuestMemory>,
    guest: SimGuest,
    queue: Virtqueue,
    oracle: Queue,
    size: u16,
}

impl Bench {
    fn new(size: u16, event_idx: bool, indirect: bool, first_index: u16) -> Bench {
        let regions = [RINGS, LARGE, LEFT, RIGHT].map(|(gpa, len)| (GuestAddress(gpa), len));
        let theirs: GuestMemoryMmap = GuestMemoryMmap::from_ranges(&regions).unwrap();
        let table = theirs
            .iter()
            .map(|region| GuestRegion {
                gpa: Gpa(region.start_addr().0),
                len: region.len(),
                hva: NonNull::new(theirs.get_host_address(region.start_addr()).unwrap()).unwrap(),
                dma: region.start_addr().0 + DMA,
            })
            .collect();
        // SAFETY: the clone keeps the regions mapped, and the test holds it longer than what is made from it.
        let ours = Arc::new(unsafe { GuestMemory::new(table, Box::new(theirs.clone())) }.unwrap());
        let config = SimGuestConfig {
            layout: RingLayout::Split,
            size,
            event_idx,
            indirect,
            max_data: 0,
            first_index,
            base: Gpa(RINGS.0),
        };
        let guest = SimGuest::new(Arc::clone(&ours), config).unwrap();
        // SAFETY: the only queue; the bench holds the memory.
        let queue = unsafe { guest.virtqueue() }.unwrap();
        let mut oracle = Queue::new(1024).unwrap();
        let start = theirs
            .get_host_address(GuestAddress(RINGS.0))
            .unwrap()
            .addr();
        let gpa = |part: NonNull<u8>| RINGS.0 + (part.addr().get() - start) as u64;
        let parts = guest.virtqueue_config();
        oracle.set_size(size);
        oracle
            .try_set_desc_table_address(GuestAddress(gpa(parts.descriptor_table)))
            .unwrap();
        oracle
            .try_set_avail_ring_address(GuestAddress(gpa(parts.avail)))
            .unwrap();
        oracle
            .try_set_used_ring_address(GuestAddress(gpa(parts.used)))
            .unwrap();
        oracle.set_event_idx(event_idx);
        oracle.set_next_avail(first_index);
        oracle.set_next_used(first_index);
        oracle.set_ready(true);
        assert!(oracle.is_valid(&theirs));
        Bench {
            theirs,
            ours,
            guest,
            queue,
            oracle,
            size,
        }
    }

    /// The used ring as the guest sees it, its flags and avail_event left out.
    fn used_ring(&self) -> Vec<u8> {
        let mut bytes = vec![0; used_ring_bytes(self.size) as usize - 4];
        self.theirs
            .read_slice(&mut bytes, GuestAddress(self.oracle.used_ring() + 2))
            .unwrap();
        bytes
    }

    /// Everything in guest memory.
    fn snapshot(&self) -> Vec<u8> {
        let mut all = Vec::new();
        for (gpa, len) in [RINGS, LARGE, LEFT, RIGHT] {
            let at = all.len();
            all.resize(at + len, 0);
            self.theirs
                .read_slice(&mut all[at..], GuestAddress(gpa))
                .unwrap();
        }
        all
    }

    /// The bytes of a buffer, cut where regions end; the rest that is not mapped is left out.
    fn pieces(&self, gpa: u64, len: u32) -> (Vec<(u64, u32)>, bool) {
        let (mut at, end) = (gpa, u128::from(gpa) + u128::from(len));
        let mut pieces = Vec::new();
        while u128::from(at) < end {
            let region = [RINGS, LARGE, LEFT, RIGHT]
                .into_iter()
                .find(|(start, size)| (*start..start + *size as u64).contains(&at));
            let Some((start, size)) = region else {
                return (pieces, false);
            };
            let piece = (start + size as u64 - at).min((end - u128::from(at)) as u64);
            pieces.push((at, piece as u32));
            at += piece;
        }
        (pieces, true)
    }
}

// ---- what virtio-queue did, and what we must say to it ----

/// Why the oracle went no further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// At a descriptor without NEXT.
    End,
    /// The next index is outside the table.
    NextOutOfRange,
    /// As many descriptors as the table has entries, and the last has NEXT.
    Ttl,
    /// A table inside a table.
    Nested,
    /// The length of a table, or more than 65535 entries.
    Table,
    /// An entry of a table is not mapped.
    Unmapped,
    /// More than 4 GiB.
    Total,
}

/// A chain as the oracle reads it, and everything about it that we are to refuse.
#[derive(Debug)]
struct Explained {
    descriptors: Vec<RawDescriptor>,
    stop: Stop,
    /// Something that we follow otherwise: what the chain's status is, is then another question.
    strange: bool,
    /// It came to an indirect table.
    indirect: bool,
    /// What we may say is wrong with it; nothing if it is right.
    faults: BTreeSet<String>,
}

fn raw(bench: &Bench, table: u64, index: u16) -> Option<RawDescriptor> {
    let mut bytes = [0; 16];
    let at = table.checked_add(16 * u64::from(index))?;
    bench.theirs.read_slice(&mut bytes, GuestAddress(at)).ok()?;
    Some(RawDescriptor {
        gpa: u64::from_le_bytes(bytes[..8].try_into().unwrap()),
        len: u32::from_le_bytes(bytes[8..12].try_into().unwrap()),
        flags: u16::from_le_bytes(bytes[12..14].try_into().unwrap()),
        next: u16::from_le_bytes(bytes[14..].try_into().unwrap()),
    })
}

/// What may be wrong with a table.
const ANY_INDIRECT: [ChainFault; 6] = [
    ChainFault::IndirectLength,
    ChainFault::IndirectTooLong,
    ChainFault::IndirectUnmapped,
    ChainFault::IndirectWithNext,
    ChainFault::NestedIndirect,
    ChainFault::Wraps,
];

/// Follows a chain by the oracle's rules, and collects what breaks ours.
fn explain(bench: &Bench, head: u16, room: usize) -> Explained {
    let mut faults = BTreeSet::new();
    let mut note = |fault: ChainFault| {
        faults.insert(format!("{fault:?}"));
    };
    let mut descriptors = Vec::new();
    let (mut table, mut entries, mut index) =
        (bench.oracle.desc_table(), u32::from(bench.size), head);
    let mut ttl = entries;
    let (mut indirect, mut strange) = (false, false);
    let (mut total, mut unread) = (0_u64, None);
    let stop = loop {
        if ttl == 0 {
            note(ChainFault::TooLong);
            // We look at one descriptor more: at the index for it, and whether it leads to a table.
            if u32::from(index) >= entries {
                note(ChainFault::NextOutOfRange);
            } else if let Some(one_more) = raw(bench, table, index)
                && one_more.flags & INDIRECT != 0
            {
                indirect |= one_more.flags & NEXT == 0;
                strange = true;
                ANY_INDIRECT.iter().copied().for_each(&mut note);
            }
            if indirect {
                // A loop in a table shorter than the queue: we go round it until the queue size is reached.
                note(ChainFault::TooManySegments);
                note(ChainFault::ReadableAfterWritable);
            }
            break Stop::Ttl;
        }
        if u32::from(index) >= entries {
            note(ChainFault::NextOutOfRange);
            break Stop::NextOutOfRange;
        }
        let Some(descriptor) = raw(bench, table, index) else {
            // We look at the whole table first, so its end may be what is missing.
            break Stop::Unmapped;
        };
        let RawDescriptor {
            gpa,
            len,
            flags,
            next,
        } = descriptor;
        if flags & INDIRECT != 0 {
            if indirect {
                note(ChainFault::NestedIndirect);
                strange = true;
                break Stop::Nested;
            }
            if flags & NEXT != 0 {
                note(ChainFault::IndirectWithNext);
                strange = true;
            } else {
                indirect = true;
            }
            if len == 0 || !len.is_multiple_of(16) {
                note(ChainFault::IndirectLength);
            } else if len / 16 > u32::from(bench.size) {
                note(ChainFault::IndirectTooLong);
            }
            if !len.is_multiple_of(16) || len / 16 > u32::from(u16::MAX) {
                break Stop::Table;
            }
            if gpa.checked_add(len.into()).is_none() {
                note(ChainFault::Wraps);
            } else if !bench.pieces(gpa, len).1 {
                note(ChainFault::IndirectUnmapped);
            }
            // What the oracle does after INDIRECT with NEXT has no counterpart here.
            if flags & NEXT != 0 {
                break Stop::Nested;
            }
            (table, entries, index) = (gpa, len / 16, 0);
            ttl = entries;
            continue;
        }
        total += u64::from(len);
        if total > u64::from(u32::MAX) {
            note(ChainFault::TotalLength);
            // We go on: nothing that long is mapped, which is then what we say.
            strange = true;
            unread = Some(descriptor);
            break Stop::Total;
        }
        descriptors.push(descriptor);
        if flags & NEXT == 0 {
            break Stop::End;
        }
        index = next;
        ttl -= 1;
    };
    if descriptors.len() > usize::from(bench.size) {
        note(ChainFault::TooLong);
    }
    // The descriptor that is one too many is read by neither, or by us alone.
    if stop != Stop::End && descriptors.len() >= usize::from(bench.size) {
        note(ChainFault::TooLong);
    }
    let (mut written, mut segments) = (false, 0);
    for RawDescriptor {
        gpa, len, flags, ..
    } in descriptors
        .iter()
        .chain(&unread)
        .copied()
        .filter(|d| d.len > 0)
    {
        if flags & WRITE != 0 {
            written = true;
        } else if written {
            note(ChainFault::ReadableAfterWritable);
        }
        let (pieces, mapped) = bench.pieces(gpa, len);
        segments += pieces.len();
        if gpa.checked_add(len.into()).is_none() {
            note(ChainFault::Wraps);
        } else if !mapped {
            note(ChainFault::Unmapped);
        }
    }
    if segments > room {
        note(ChainFault::TooManySegments);
    }
    Explained {
        descriptors,
        stop,
        strange,
        indirect,
        faults,
    }
}

/// Segments as (guest address, length).
fn places(segments: &[Segment]) -> Vec<(u64, u32)> {
    segments
        .iter()
        .map(|segment| (segment.dma() - DMA, segment.len()))
        .collect()
}

/// Takes one chain through both and compares.
fn compare(bench: &mut Bench, head: u16, indirect: bool, room: usize) -> Result<(), TestCaseError> {
    let explained = explain(bench, head, room);
    let oracle = bench
        .oracle
        .pop_descriptor_chain(&bench.theirs)
        .expect("a chain");
    prop_assert_eq!(oracle.head_index(), head);
    if !explained.strange {
        let read: Vec<_> = oracle
            .map(|d| (d.addr().0, d.len(), d.flags(), d.next()))
            .collect();
        let told: Vec<_> = explained
            .descriptors
            .iter()
            .map(|d| (d.gpa, d.len, d.flags, d.next))
            .collect();
        prop_assert_eq!(read, told, "the oracle is not what this test takes it for");
    }

    let mut chain = Chain::new(room);
    prop_assert_eq!(bench.queue.available(), Ok(1));
    match bench.queue.pop(&bench.ours, &mut chain) {
        Ok(taken) => prop_assert!(taken),
        Err(error) => {
            // Ours follows a table only if that was negotiated.
            prop_assert_eq!(error, RingError::IndirectNotNegotiated { head });
            // Of a strange chain we read more than the oracle: it may lead to a table later.
            prop_assert!(!indirect && (explained.indirect || explained.strange));
            return Ok(());
        }
    }
    prop_assert!(
        indirect || explained.strange || !explained.indirect,
        "a table was followed without negotiation"
    );
    prop_assert_eq!(chain.head().get(), head);

    let writable = |d: &&RawDescriptor| d.len > 0 && d.flags & WRITE != 0;
    match chain.fault() {
        None => {
            prop_assert_eq!(&explained.faults, &BTreeSet::new(), "accepted");
            prop_assert_eq!(explained.stop, Stop::End);
            let side = |write: u16| -> Vec<(u64, u32)> {
                let buffers = explained
                    .descriptors
                    .iter()
                    .filter(|d| d.flags & WRITE == write);
                buffers.flat_map(|d| bench.pieces(d.gpa, d.len).0).collect()
            };
            prop_assert_eq!(places(chain.readable()), side(0));
            prop_assert_eq!(places(chain.writable()), side(WRITE));
            let bytes =
                |pieces: Vec<(u64, u32)>| pieces.iter().map(|p| u64::from(p.1)).sum::<u64>();
            prop_assert_eq!(
                (chain.readable_len(), chain.writable_len()),
                (bytes(side(0)), bytes(side(WRITE)))
            );
        }
        Some(fault) => {
            let name = format!("{fault:?}");
            prop_assert!(
                explained.faults.contains(&name),
                "{} of {:?}",
                name,
                explained
            );
            prop_assert!(
                chain.segments().is_empty(),
                "a part of a refused chain is shown"
            );
        }
    }

    // The status byte is the last byte of the last writable buffer, of a refused chain too if its end was seen.
    let before = bench.snapshot();
    let status = chain.take_status();
    if let Some(status) = status {
        status.write(0x5a);
    }
    let after = bench.snapshot();
    let changed = before
        .iter()
        .zip(&after)
        .filter(|(old, new)| old != new)
        .count();
    prop_assert!(changed <= 1, "more than a status was written");
    if !explained.strange && explained.stop == Stop::End {
        let last = explained.descriptors.iter().rfind(writable);
        let byte = last.and_then(|d| d.gpa.checked_add(u64::from(d.len) - 1));
        let mapped = byte.filter(|byte| bench.pieces(*byte, 1).1);
        let too_long = explained.descriptors.len() > usize::from(bench.size);
        let table = explained
            .faults
            .iter()
            .any(|fault| fault.starts_with("Indirect") || fault == "Wraps");
        if !too_long && !table {
            prop_assert_eq!(status.is_some(), mapped.is_some());
        }
        if let (Some(_), Some(byte)) = (status, mapped) {
            let value: u8 = bench.theirs.read_obj(GuestAddress(byte)).unwrap();
            prop_assert_eq!(value, 0x5a, "the status went elsewhere");
        }
    }

    bench.queue.push_used(chain.head(), 0);
    bench.queue.publish_used();
    prop_assert_eq!(bench.guest.take_used(), Some((u32::from(head), 0)));
    Ok(())
}

// ---- what a guest may write ----

/// Where buffers lie: mostly in the large region, else over and around every edge there is.
fn address() -> impl Strategy<Value = u64> {
    let edges = vec![
        LARGE.0,
        LARGE.0 + LARGE.1 as u64,
        LEFT.0,
        RIGHT.0,
        RIGHT.0 + RIGHT.1 as u64,
        0,
        u64::MAX,
        1 << 55,
    ];
    prop_oneof![
        6 => LARGE.0..LARGE.0 + LARGE.1 as u64 - 0x4000,
        2 => LEFT.0..RIGHT.0 + RIGHT.1 as u64 - 0x1000,
        2 => (prop::sample::select(edges), -40_i64..40).prop_map(|(edge, off)| edge.wrapping_add_signed(off)),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => 1_u32..64,
        3 => (1_u32..5).prop_map(|sectors| sectors * 512),
        1 => (0_u32..20).prop_map(|entries| entries * 16),
        1 => 4096_u32..0x3000,
        1 => Just(0),
        1 => prop::sample::select(vec![u32::MAX, 1 << 31, 0x10_0010, 0xf_fff0, (1 << 20) + 16, 15, 17]),
    ]
}

/// A descriptor that may be anything.
fn any_descriptor(size: u16) -> impl Strategy<Value = RawDescriptor> {
    let flags = prop_oneof![
        6 => prop::sample::select(vec![0, NEXT, NEXT, NEXT, WRITE, WRITE | NEXT]),
        1 => 0_u16..8,
        1 => any::<u16>(),
    ];
    let next = prop_oneof![8 => 0..size, 1 => any::<u16>()];
    (address(), length(), flags, next).prop_map(|(gpa, len, flags, next)| RawDescriptor {
        gpa,
        len,
        flags,
        next,
    })
}

/// A chain that a driver may build, readable buffers first; then perhaps one thing wrong with it.
fn sound_chain(most: usize) -> impl Strategy<Value = Vec<RawDescriptor>> {
    let buffer = prop_oneof![
        5 => (LARGE.0..LARGE.0 + LARGE.1 as u64 - 0x2000, 0_u32..0x2000),
        1 => (LEFT.0..RIGHT.0 + RIGHT.1 as u64 - 0x2000, 0_u32..0x2000),
    ];
    (
        prop::collection::vec(buffer, 1..=most),
        any::<prop::sample::Index>(),
    )
        .prop_map(|(buffers, split)| {
            let split = split.index(buffers.len() + 1);
            let count = buffers.len();
            let descriptors =
                buffers
                    .into_iter()
                    .enumerate()
                    .map(|(i, (gpa, len))| RawDescriptor {
                        gpa,
                        len,
                        flags: if i >= split { WRITE } else { 0 }
                            | if i + 1 < count { NEXT } else { 0 },
                        next: 0,
                    });
            descriptors.collect()
        })
}

/// How a table comes to be: any garbage, or a chain laid out over the table and an indirect one.
#[derive(Debug, Clone)]
struct Scene {
    size: u16,
    indirect: bool,
    /// The table of the queue.
    table: Vec<RawDescriptor>,
    /// An indirect table, and where it is.
    inner: Vec<RawDescriptor>,
    inner_at: u64,
    head: u16,
    /// Room in our chain, above what the queue size asks for.
    spare: usize,
    first_index: u16,
}

fn inner_at() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => (0_u64..0x100).prop_map(|slot| LARGE.0 + LARGE.1 as u64 - 0x2000 + 16 * slot),
        // Unaligned, and over the boundary of two regions.
        2 => (0_u64..0x100).prop_map(|offset| RIGHT.0 - 0x80 + offset),
        1 => address(),
    ]
}

fn garbage() -> impl Strategy<Value = Scene> {
    (0_u32..6, any::<bool>(), inner_at()).prop_flat_map(|(shift, indirect, inner_at)| {
        let size = 1_u16 << shift;
        let table = prop::collection::vec(any_descriptor(size), usize::from(size));
        let inner = prop::collection::vec(any_descriptor(size), 1..20);
        // Now and then a descriptor points to the table that is there.
        let pointers = prop::collection::vec((0..size, 0_u32..20, any::<bool>()), 0..2);
        (table, inner, pointers, 0..size, 0_usize..4, any::<u16>()).prop_map(
            move |(mut table, inner, pointers, head, spare, first_index)| {
                for (index, entries, write) in pointers {
                    table[usize::from(index)] = RawDescriptor {
                        gpa: inner_at,
                        len: 16 * entries,
                        flags: INDIRECT | if write { WRITE } else { 0 },
                        next: 0,
                    };
                }
                Scene {
                    size,
                    indirect,
                    table,
                    inner,
                    inner_at,
                    head,
                    spare,
                    first_index,
                }
            },
        )
    })
}

fn sound() -> impl Strategy<Value = Scene> {
    let rest = (
        any::<bool>(),
        inner_at(),
        any::<prop::sample::Index>(),
        any::<u16>(),
        0_usize..4,
    );
    (2_u32..6, rest, any::<prop::sample::Index>()).prop_flat_map(|(shift, rest, rotate)| {
        let size = 1_u16 << shift;
        sound_chain(usize::from(size)).prop_map(move |chain| {
            let (indirect, inner_at, cut, first_index, spare) = rest;
            // Where the chain goes on in an indirect table: before its first descriptor, its last, or not at all.
            let direct = if indirect {
                cut.index(chain.len() + 1)
            } else {
                chain.len()
            };
            let (direct, inner) =
                chain.split_at(direct.min(usize::from(size) - 1).min(chain.len()));
            let inner: Vec<RawDescriptor> = (1..)
                .zip(inner)
                .map(|(next, d)| RawDescriptor { next, ..*d })
                .collect();
            let indirect = !inner.is_empty();
            let mut out = direct.to_vec();
            if indirect {
                if let Some(last) = out.last_mut() {
                    last.flags |= NEXT;
                }
                out.push(RawDescriptor {
                    gpa: inner_at,
                    len: 16 * inner.len() as u32,
                    flags: INDIRECT,
                    next: 0,
                });
            }
            // The chain runs through the table from anywhere.
            let head = rotate.index(usize::from(size)) as u16;
            let mut table = vec![RawDescriptor::default(); size.into()];
            for (i, descriptor) in (0..).zip(out) {
                let at = (head + i) % size;
                table[usize::from(at)] = RawDescriptor {
                    next: (at + 1) % size,
                    ..descriptor
                };
            }
            Scene {
                size,
                indirect,
                table,
                inner,
                inner_at,
                head,
                spare,
                first_index,
            }
        })
    })
}

fn play(scene: &Scene) -> Result<(), TestCaseError> {
    let mut bench = Bench::new(scene.size, false, scene.indirect, scene.first_index);
    for (index, descriptor) in (0..).zip(&scene.table) {
        bench.guest.write_descriptor(index, *descriptor);
    }
    // What of the indirect table is mapped; the rest is where the guest says but nobody finds it.
    for (index, descriptor) in (0_u64..).zip(&scene.inner) {
        let at = scene.inner_at.wrapping_add(16 * index);
        if bench.pieces(at, 16).1 {
            bench.guest.write_raw_table(Gpa(at), &[*descriptor]);
        }
    }
    bench.guest.offer(scene.head);
    bench.guest.publish();
    compare(
        &mut bench,
        scene.head,
        scene.indirect,
        usize::from(scene.size) + scene.spare,
    )
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig {
        cases,
        failure_persistence: None,
        ..ProptestConfig::default()
    }
}

proptest! {
    #![proptest_config(cases(4096))]

    #[test]
    fn chain_of_any_garbage_is_what_the_oracle_reads_or_refused_for_a_reason(scene in garbage()) {
        play(&scene)?;
    }

    #[test]
    fn chain_that_a_driver_may_build_is_what_the_oracle_reads(scene in sound()) {
        play(&scene)?;
    }
}

#[test]
fn chains_of_both_kinds_are_tried_and_every_fault_is_met() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut met = BTreeSet::new();
    let mut sound_ones = 0;
    for i in 0..4000 {
        let scene = match i % 2 {
            0 => garbage().new_tree(&mut runner).unwrap().current(),
            _ => sound().new_tree(&mut runner).unwrap().current(),
        };
        let mut bench = Bench::new(scene.size, false, true, 0);
        for (index, descriptor) in (0..).zip(&scene.table) {
            bench.guest.write_descriptor(index, *descriptor);
        }
        for (index, descriptor) in (0_u64..).zip(&scene.inner) {
            let at = scene.inner_at.wrapping_add(16 * index);
            if bench.pieces(at, 16).1 {
                bench.guest.write_raw_table(Gpa(at), &[*descriptor]);
            }
        }
        bench.guest.offer(scene.head);
        bench.guest.publish();
        let mut chain = Chain::new(usize::from(scene.size) + scene.spare);
        bench.queue.available().unwrap();
        bench.queue.pop(&bench.ours, &mut chain).unwrap();
        match chain.fault() {
            Some(fault) => drop(met.insert(format!("{fault:?}"))),
            None => sound_ones += 1,
        }
    }
    // Nobody reaches 4 GiB in this memory; tests/hostile_guest.rs does.
    let all = [
        "IndirectLength",
        "IndirectTooLong",
        "IndirectUnmapped",
        "IndirectWithNext",
        "NestedIndirect",
        "NextOutOfRange",
        "ReadableAfterWritable",
        "TooLong",
        "TooManySegments",
        "Unmapped",
        "Wraps",
    ];
    assert_eq!(met.iter().map(String::as_str).collect::<Vec<_>>(), all);
    assert!(sound_ones > 1000, "{sound_ones} sound chains");
}

// ---- indices and signals ----

/// Virtio 1.2, 2.7.10: `vring_need_event`.
fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// One turn of guest and device.
#[derive(Debug, Clone)]
struct Turn {
    /// Requests that the guest adds, if there is room.
    add: u16,
    /// Requests that the device gives back, those in flight longest or shortest.
    finish: u16,
    newest_first: bool,
    /// used_event relative to the used index before the turn, and the flags of the avail ring.
    event: i16,
    flags: u16,
}

fn turns() -> impl Strategy<Value = Vec<Turn>> {
    let turn = (
        0_u16..20,
        0_u16..20,
        any::<bool>(),
        prop_oneof![-3_i16..24, any::<i16>()],
        0_u16..3,
    )
        .prop_map(|(add, finish, newest_first, event, flags)| Turn {
            add,
            finish,
            newest_first,
            event,
            flags,
        });
    prop::collection::vec(turn, 1..80)
}

fn check_turns(
    shift: u32,
    event_idx: bool,
    first_index: u16,
    turns: &[Turn],
) -> Result<(), TestCaseError> {
    let size = 1_u16 << shift;
    let mut bench = Bench::new(size, event_idx, false, first_index);
    // The oracle writes into a used ring of its own; both must end up the same.
    let mut twin = Bench::new(size, event_idx, false, first_index);
    let avail = GuestAddress(bench.oracle.avail_ring());
    let used_event = GuestAddress(avail.0 + u64::from(avail_ring_bytes(size)) - 2);
    let mut free: Vec<u16> = (0..size).collect();
    let mut in_flight: Vec<u16> = Vec::new();
    let (mut added, mut finished) = (first_index, first_index);
    let mut chain = Chain::new(4);
    for turn in turns {
        for _ in 0..turn.add {
            let Some(head) = free.pop() else { break };
            bench.guest.write_descriptor(
                head,
                RawDescriptor {
                    gpa: LARGE.0,
                    len: 16,
                    flags: WRITE,
                    next: 0,
                },
            );
            bench.guest.offer(head);
            in_flight.push(head);
            added = added.wrapping_add(1);
        }
        bench.guest.publish();
        // What the guest offered comes out in its order.
        let fresh = bench.queue.available().unwrap();
        for i in 0..fresh {
            prop_assert!(bench.queue.pop(&bench.ours, &mut chain).unwrap());
            let expected = in_flight[in_flight.len() - usize::from(fresh - i)];
            prop_assert_eq!(chain.head().get(), expected);
            prop_assert_eq!(
                bench
                    .oracle
                    .pop_descriptor_chain(&bench.theirs)
                    .unwrap()
                    .head_index(),
                expected
            );
        }
        prop_assert!(!bench.queue.pop(&bench.ours, &mut chain).unwrap());
        prop_assert_eq!(bench.queue.base(), u32::from(added));

        let event = finished.wrapping_add_signed(turn.event);
        for memory in [&bench.theirs, &twin.theirs] {
            memory.write_obj(turn.flags, avail).unwrap();
            memory.write_obj(event, used_event).unwrap();
        }
        let old = finished;
        for _ in 0..turn.finish.min(in_flight.len() as u16) {
            let head = if turn.newest_first {
                in_flight.pop().unwrap()
            } else {
                in_flight.remove(0)
            };
            let len = u32::from(finished) * 7;
            bench.push_used(head, len);
            twin.oracle.add_used(&twin.theirs, head, len).unwrap();
            free.push(head);
            finished = finished.wrapping_add(1);
        }
        prop_assert_eq!(usize::from(bench.queue.in_flight()), in_flight.len());
        bench.queue.publish_used();
        prop_assert_eq!(bench.used_ring(), twin.used_ring());

        let signal = bench.queue.needs_signal();
        let oracle = twin.oracle.needs_notification(&twin.theirs).unwrap();
        if event_idx {
            prop_assert_eq!(signal, need_event(event, finished, old));
            prop_assert_eq!(signal, oracle);
        } else {
            // The oracle does not know VRING_AVAIL_F_NO_INTERRUPT, nor that there is nothing to signal.
            prop_assert_eq!(signal, finished != old && turn.flags & 1 == 0);
            prop_assert!(oracle);
        }
        prop_assert!(
            !bench.queue.needs_signal(),
            "signalled twice for one publication"
        );
    }
    // Everything that is left comes back too.
    while let Some((head, _)) = bench.guest.take_used() {
        prop_assert!(head < u32::from(size));
    }
    Ok(())
}

impl Bench {
    /// Gives back a head by its number.
    fn push_used(&mut self, head: u16, len: u32) {
        self.queue.push_used(head_index(head), len);
    }
}

/// A checked head, as only a pop makes one: popped from a queue of its own.
fn head_index(head: u16) -> tandem::virtio::virtqueue::HeadIndex {
    thread_local! {
        static HEADS: Vec<tandem::virtio::virtqueue::HeadIndex> = {
            let mut bench = Bench::new(64, false, false, 0);
            let mut chain = Chain::new(1);
            (0..64).for_each(|head| bench.guest.offer(head));
            bench.guest.publish();
            bench.queue.available().unwrap();
            (0..64)
                .map(|_| {
                    bench.queue.pop(&bench.ours, &mut chain).unwrap();
                    chain.head()
                })
                .collect()
        };
    }
    HEADS.with(|heads| heads[usize::from(head)])
}

fn first_index() -> impl Strategy<Value = u16> {
    // Indices wrap at 65536: most runs see it.
    prop_oneof![Just(0), 65_400_u16..=u16::MAX, any::<u16>()]
}

proptest! {
    #![proptest_config(cases(256))]

    #[test]
    fn indices_used_ring_and_event_idx_signals_are_the_oracles(shift in 0_u32..7, first in first_index(), turns in turns()) {
        check_turns(shift, true, first, &turns)?;
    }

    #[test]
    fn without_event_idx_no_interrupt_is_obeyed_and_the_rest_is_the_oracles(shift in 0_u32..7, first in first_index(), turns in turns()) {
        check_turns(shift, false, first, &turns)?;
    }
}

#[test]
fn requested_signal_comes_once_whatever_the_guest_says() {
    for event_idx in [false, true] {
        let mut bench = Bench::new(4, event_idx, false, 9);
        bench.guest.disable_signals();
        assert!(!bench.queue.needs_signal());
        bench.queue.request_signal();
        assert!(bench.queue.needs_signal());
        assert!(!bench.queue.needs_signal());
    }
}

#[test]
fn suppressed_kicks_are_not_wanted_for_a_whole_lap_of_the_index() {
    for event_idx in [false, true] {
        let mut bench = Bench::new(4, event_idx, false, 65_530);
        let mut chain = Chain::new(1);
        bench.queue.suppress_kicks();
        for _ in 0..u16::MAX {
            bench.guest.offer(0);
            assert!(!bench.guest.publish());
            bench.queue.available().unwrap();
            bench.queue.pop(&bench.ours, &mut chain).unwrap();
            bench.queue.push_used(chain.head(), 0);
        }
    }
}
