//! Index and phase arithmetic against counters that never wrap, PRPs against bytes counted one by one, and a
//! controller that lies.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::{Domain, PortOnly, queue_pair};
use crate::dma::{DmaDomain, DmaSpace, Iova};
use crate::queue_pair::prp::{self, DataSegment, PrpError};
use crate::queue_pair::ring::{CompletionRing, SubmissionRing};
use crate::queue_pair::{Completion, QueuePair, SubmitError};
use crate::spec::{Cid, CompletionEntry, Nsid, PAGE_SIZE, Status, SubmissionEntry};
use crate::transport::QueuePort;

/// The smallest queue, odd ones (virtio has none, NVMe allows them), and the largest that we ask for.
const SIZES: [u16; 4] = [2, 3, 17, 1024];

fn sizes() -> impl Strategy<Value = u16> {
    prop::sample::select(SIZES.as_slice())
}

fn space() -> (Arc<Domain>, Arc<DmaSpace>) {
    let domain = Arc::new(Domain::default());
    let space = DmaSpace::new(Arc::clone(&domain) as Arc<dyn DmaDomain>);
    (domain, space)
}

/// A place in a ring, from a counter that never wraps.
fn slot(count: u64, entries: u16) -> u16 {
    u16::try_from(count % u64::from(entries)).unwrap()
}

// ---- submission ring ----

/// Walks a submission ring: pushes as many entries as each step says (and fit), then lets the controller report
/// that it fetched as many as the step says.
fn check_submission_ring(entries: u16, steps: &[(u16, u16)]) {
    let (domain, space) = space();
    let mut ring = SubmissionRing::new(&space, entries).unwrap();
    let (mut pushed, mut fetched) = (0_u64, 0_u64);
    for &(push, fetch) in steps {
        for _ in 0..push.min(ring.room()) {
            let entry = SubmissionEntry {
                prp1: pushed.into(),
                ..SubmissionEntry::flush(Nsid(1))
            };
            ring.push(entry.words());
            pushed += 1;
        }
        assert_eq!(ring.tail(), slot(pushed, entries));
        assert_eq!(
            u64::from(ring.room()),
            u64::from(entries) - 1 - (pushed - fetched)
        );
        // What the controller would fetch now is what was pushed and not fetched yet, in its order.
        for count in fetched..pushed {
            let at = Iova(ring.iova().0 + 64 * u64::from(slot(count, entries)));
            // SAFETY: one entry of the ring, which nobody writes meanwhile.
            let entry = unsafe { domain.reach(at, 64).cast::<SubmissionEntry>().read() };
            assert_eq!(entry.prp1.get(), count);
        }
        // Any SQHD is believed exactly if it lies between the last one and the tail.
        for lie in [
            slot(fetched + pushed + 1, entries),
            entries,
            u16::MAX,
            slot(pushed + 1, entries),
        ] {
            let possible = (fetched..=pushed).any(|count| slot(count, entries) == lie);
            if !possible {
                assert!(
                    !ring.advance_head(lie),
                    "SQHD {lie} of {entries} with {fetched}..{pushed} outstanding"
                );
                assert_eq!(
                    u64::from(ring.room()),
                    u64::from(entries) - 1 - (pushed - fetched)
                );
            }
        }
        fetched += u64::from(fetch).min(pushed - fetched);
        assert!(ring.advance_head(slot(fetched, entries)));
    }
}

#[test]
fn submission_ring_filled_to_the_brim_keeps_one_entry_empty_over_many_wraps() {
    for entries in SIZES {
        let steps = vec![(u16::MAX, u16::MAX); 7];
        check_submission_ring(entries, &steps);
        // One by one, so that head and tail meet at every slot.
        check_submission_ring(entries, &vec![(1, 1); 3 * usize::from(entries)]);
    }
}

// ---- completion ring ----

/// The controller's side of a completion queue.
struct Completer {
    domain: Arc<Domain>,
    cq: Iova,
    entries: u16,
    posted: u64,
}

impl Completer {
    /// Posts an entry with the phase tag of the pass it belongs to.
    fn post(&mut self, entry: CompletionEntry) {
        let phase = (self.posted / u64::from(self.entries)).is_multiple_of(2);
        self.write(entry, phase);
        self.posted += 1;
    }

    /// Writes the next entry with another phase tag than it should have.
    fn write(&self, mut entry: CompletionEntry, phase: bool) {
        let place = u64::from(slot(self.posted, self.entries));
        let status = Status::from_wire(entry.phase_and_status.get());
        entry.phase_and_status = status.to_wire(phase).into();
        let words: [u64; 2] = zerocopy::transmute!(entry);
        let to = self
            .domain
            .reach(Iova(self.cq.0 + 16 * place), 16)
            .cast::<AtomicU64>();
        for (i, word) in words.into_iter().enumerate() {
            // SAFETY: one of the two words of an entry inside the queue (`reach`).
            unsafe { to.add(i).as_ref() }.store(word, Ordering::Relaxed);
        }
    }
}

fn numbered(count: u64) -> CompletionEntry {
    CompletionEntry {
        dw0: u32::try_from(count & 0xffff_ffff).unwrap().into(),
        ..CompletionEntry::default()
    }
}

fn check_completion_ring(entries: u16, steps: &[(u16, u16)]) {
    let (domain, space) = space();
    let mut ring = CompletionRing::new(&space, entries).unwrap();
    let mut completer = Completer {
        domain,
        cq: ring.iova(),
        entries,
        posted: 0,
    };
    let mut taken = 0;
    for &(post, take) in steps {
        let room = u64::from(entries) - (completer.posted - taken);
        for _ in 0..u64::from(post).min(room) {
            completer.post(numbered(completer.posted));
        }
        for _ in 0..take {
            match ring.pop() {
                Some(entry) => {
                    assert!(
                        taken < completer.posted,
                        "an entry of an earlier pass was taken"
                    );
                    assert_eq!(entry.dw0, numbered(taken).dw0);
                    taken += 1;
                }
                None => {
                    assert_eq!(taken, completer.posted, "a posted entry was not seen");
                    break;
                }
            }
        }
        assert_eq!(ring.head(), slot(taken, entries));
    }
}

#[test]
fn completion_ring_full_or_empty_never_takes_an_entry_of_another_pass() {
    for entries in SIZES {
        check_completion_ring(entries, &[(u16::MAX, u16::MAX); 7]);
        check_completion_ring(entries, &vec![(1, 2); 3 * usize::from(entries)]);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn submission_ring_agrees_with_counters_that_never_wrap(
        entries in sizes(),
        steps in prop::collection::vec((0_u16..1100, 0_u16..1100), 1..60),
    ) {
        check_submission_ring(entries, &steps);
    }

    #[test]
    fn completion_ring_agrees_with_counters_that_never_wrap(
        entries in sizes(),
        steps in prop::collection::vec((0_u16..1100, 0_u16..1100), 1..60),
    ) {
        check_completion_ring(entries, &steps);
    }
}

// ---- data pointers ----

/// Consecutive bytes as the device sees them.
type Runs = Vec<(u64, u64)>;

/// Joins runs that continue each other, so that two descriptions of the same bytes are equal.
fn join(runs: impl Iterator<Item = (u64, u64)>) -> Runs {
    let mut joined = Runs::new();
    for (start, len) in runs {
        match joined.last_mut() {
            Some((last, last_len)) if *last + *last_len == start => *last_len += len,
            _ => joined.push((start, len)),
        }
    }
    joined
}

/// What a controller transfers: PRP1 from its offset to the end of its page, then whole pages. NVM Express Base 2.0,
/// "Physical Region Page Entry and List".
fn followed(prp1: u64, prp2: u64, list: &[u64], bytes: u64) -> Runs {
    let page = PAGE_SIZE as u64;
    let first = bytes.min(page - prp1 % page);
    let rest = bytes - first;
    // Two entries or more are in a list; one is PRP2 itself.
    let pages: Vec<u64> = match rest {
        0 => vec![],
        rest if rest <= page => vec![prp2],
        _ => {
            assert_eq!(prp2, LIST.0);
            list[..usize::try_from(rest.div_ceil(page)).unwrap()].to_vec()
        }
    };
    let mut left = rest;
    let whole = pages.into_iter().map(|prp| {
        assert_eq!(prp % page, 0, "only PRP1 may have an offset");
        let len = left.min(page);
        left -= len;
        (prp, len)
    });
    join(std::iter::once((prp1, first)).chain(whole))
}

const LIST: Iova = Iova(0xaaaa_0000_0000);

/// Whether PRPs can say it: starts at a dword, and leaves a page only at its end, for the start of another.
fn expressible(runs: &Runs) -> bool {
    let page = PAGE_SIZE as u64;
    let starts = runs.first().is_none_or(|(start, _)| start % 4 == 0);
    let steps = runs
        .windows(2)
        .all(|pair| (pair[0].0 + pair[0].1) % page == 0 && pair[1].0 % page == 0);
    starts && steps
}

/// Segments as guests have them: mostly page runs, sometimes with an offset, a piece of a page, or straight on.
fn segments() -> impl Strategy<Value = Vec<DataSegment>> {
    let start = prop_oneof![
        4 => Just(0_u64),
        2 => (0_u64..1024).prop_map(|dword| 4 * dword),
        1 => 0_u64..4096,
    ];
    let len = prop_oneof![
        4 => (1_u32..6).prop_map(|pages| pages << 12),
        2 => (1_u32..40).prop_map(|sectors| sectors << 9),
        1 => 1_u32..20_000,
        1 => Just(2 << 20),
    ];
    // Fill up: end the segment at the end of a page, as a driver that keeps to pages does.
    let segment = (any::<bool>(), 1_u64..1 << 20, start, len, any::<bool>());
    prop::collection::vec(segment, 1..8).prop_map(|raw| {
        let mut end = 0;
        raw.into_iter()
            .map(|(follow_on, page, start, len, fill_up)| {
                let start = if follow_on && end != 0 {
                    end
                } else {
                    (page << 12) + start
                };
                let tail = u32::try_from((start + u64::from(len)) % 4096).unwrap();
                let len = if fill_up && tail != 0 {
                    len + 4096 - tail
                } else {
                    len
                };
                end = start + u64::from(len);
                DataSegment {
                    iova: Iova(start),
                    len,
                }
            })
            .collect()
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4096, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn prps_cover_every_byte_once_in_order_or_are_refused_for_a_reason(segments in segments()) {
        let runs = join(segments.iter().map(|s| (s.iova.0, u64::from(s.len))));
        let bytes: u32 = segments.iter().map(|s| s.len).sum();
        let mut list = vec![0; PAGE_SIZE / 8];
        let built = prp::build(segments.iter().copied(), bytes, || LIST, |i, prp| list[i] = prp);

        let page = PAGE_SIZE as u64;
        let behind_first = u64::from(bytes).saturating_sub(page - runs[0].0 % page);
        let fits = behind_first.div_ceil(page) <= list.len() as u64;
        match built {
            Ok(pointer) => {
                prop_assert!(expressible(&runs) && fits);
                prop_assert_eq!(followed(pointer.prp1, pointer.prp2, &list, bytes.into()), runs);
            }
            Err(PrpError::Unaligned) => prop_assert!(!expressible(&runs)),
            Err(PrpError::TooLong) => prop_assert!(!fits || !expressible(&runs)),
            Err(PrpError::LengthMismatch) => prop_assert!(false, "the lengths do match"),
        }
    }
}

// ---- a controller that lies ----

#[derive(Debug, Default)]
struct DeafPort;

impl QueuePort for DeafPort {
    fn ring_sq(&mut self, _tail: u16) {}
    fn ring_cq(&mut self, _head: u16) {}
}

const ENTRIES: u16 = 4;

/// A queue pair with three commands outstanding, and what posts its completions.
fn three_outstanding() -> (QueuePair<PortOnly<DeafPort>>, Completer, [Cid; 3]) {
    let (domain, _space, mut queue) = queue_pair(DeafPort, ENTRIES);
    let cids = [0; 3].map(|_| {
        queue
            .submit_without_data(SubmissionEntry::flush(Nsid(1)))
            .unwrap()
    });
    queue.ring();
    let (_, cq) = queue.ring_addresses();
    let completer = Completer {
        domain,
        cq,
        entries: ENTRIES,
        posted: 0,
    };
    (queue, completer, cids)
}

fn completion(cid: Cid, sqhd: u16) -> CompletionEntry {
    CompletionEntry {
        cid: cid.0.into(),
        sqhd: sqhd.into(),
        sqid: 1.into(),
        ..CompletionEntry::default()
    }
}

/// After whatever lie was told, the three commands still complete, each once.
fn finish(
    mut queue: QueuePair<PortOnly<DeafPort>>,
    mut completer: Completer,
    left: &[Cid],
    anomalies: u64,
) {
    for cid in left {
        completer.post(completion(*cid, 3));
        let status = Status::SUCCESS;
        assert_eq!(queue.poll(), Some(Completion { cid: *cid, status }));
    }
    assert_eq!(queue.poll(), None);
    assert_eq!((queue.outstanding(), queue.room()), (0, 3));
    assert_eq!(queue.counters().anomalies, anomalies);
    queue.retire();
}

#[test]
fn completion_of_an_unknown_cid_is_counted_and_ignored() {
    for unknown in [3, 4, 1023, u16::MAX] {
        let (mut queue, mut completer, cids) = three_outstanding();
        completer.post(completion(Cid(unknown), 1));
        assert_eq!(queue.poll(), None, "CID {unknown}");
        assert_eq!(queue.outstanding(), 3);
        finish(queue, completer, &cids, 1);
    }
}

#[test]
fn completion_of_a_completed_cid_is_counted_and_ignored() {
    let (mut queue, mut completer, cids) = three_outstanding();
    completer.post(completion(cids[0], 1));
    completer.post(completion(cids[0], 1));
    assert!(queue.poll().is_some());
    assert_eq!(queue.poll(), None);
    assert_eq!(queue.outstanding(), 2);
    finish(queue, completer, &cids[1..], 1);
}

#[test]
fn completion_of_another_queue_is_counted_and_ignored() {
    for sqid in [0, 2, u16::MAX] {
        let (mut queue, mut completer, cids) = three_outstanding();
        completer.post(CompletionEntry {
            sqid: sqid.into(),
            ..completion(cids[0], 1)
        });
        assert_eq!(queue.poll(), None, "SQID {sqid}");
        assert_eq!(queue.outstanding(), 3);
        finish(queue, completer, &cids, 1);
    }
}

#[test]
fn completion_with_an_impossible_sqhd_completes_its_command_and_moves_no_head() {
    for sqhd in [ENTRIES, u16::MAX] {
        let (mut queue, mut completer, cids) = three_outstanding();
        completer.post(completion(cids[0], sqhd));
        assert!(queue.poll().is_some(), "SQHD {sqhd}");
        // The entry may still be unfetched: a free CID alone is no room.
        assert_eq!(queue.room(), 0);
        let refused = queue.submit_without_data(SubmissionEntry::flush(Nsid(1)));
        assert_eq!(refused, Err(SubmitError::Full));
        finish(queue, completer, &cids[1..], 1);
    }
}

#[test]
fn completion_with_a_stale_phase_tag_is_not_there() {
    let (mut queue, completer, cids) = three_outstanding();
    completer.write(completion(cids[0], 1), false);
    assert_eq!(queue.poll(), None);
    assert_eq!(queue.outstanding(), 3);
    finish(queue, completer, &cids, 0);
}

#[test]
fn completions_without_end_are_taken_one_a_poll() {
    // A controller that overruns its own queue: every poll ends, and no command completes.
    let (mut queue, mut completer, cids) = three_outstanding();
    for posted in 1..=10 * u64::from(ENTRIES) {
        completer.post(completion(Cid(u16::MAX), 0));
        assert_eq!(queue.poll(), None);
        assert_eq!(queue.counters().anomalies, posted);
    }
    finish(queue, completer, &cids, 40);
}
