//! The lane of a SCSI host: commands for the logical units of one device. What a command needs of the device becomes NVMe
//! commands as a block request does; what it does not is answered at once.
//!
//! A host whose logical units are on several devices has a lane for each of them behind each of its request queues. The one
//! with the guest's ring (the front) hands commands for the others' units over by a [`Relay`], and what they answer back to
//! the guest. Each lane has its own number at the [`Barrier`], and answers there for what it carries out itself.
//!
//! Nearly all commands are reads and writes of one buffer that one NVMe command carries out: those go the short way, from
//! the ring to the submission queue in [`StartShort`]. What that does not know, or does not like, is taken off the ring anew
//! by the long way, and then only what that reads counts.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use nvme_driver::DataSegment;
use nvme_driver::spec::{Cid, LbaRange, Nsid, Status, SubmissionEntry, Transfer};
use nvme_driver::transport::{Iova, Transport};

use super::control::Barrier;
use super::{
    CommandContext, FETCH_BUDGET, Failure, Front, LaneId, LaneParts, Medium, NOTHING_MORE, Pair,
    Progress, RequestLane, State, Step, Wait, Work, as_data, copy_out, piece,
};
use crate::block::{Against, BlockOp, BlockRange};
use crate::datapath::errand::{Desk, PLACES};
use crate::datapath::signal::Signal;
use crate::scsi::sense::key;
use crate::scsi::{
    Action, Address, Attention, Carry, Cdb, DataIn, Exchange, LogicalUnit, MAX_PARAMETER_BYTES,
    MAX_SENSE_BYTES, MAX_UNITS, Nexus, PlainUnit, RangeLock, Sense, status,
};
use crate::stats::SharedCounters;
use crate::virtio::chain::{AcceptExchange, Route, Routed};
use crate::virtio::memory::{GuestMemory, MainRegion, StatusByte};
use crate::virtio::relay::{Relay, RelayDriver};
use crate::virtio::scsi::{
    self, Ending, ResponsePlace, SHORT_REQUEST_BYTES, SHORT_RESPONSE_BYTES, ShortExchange,
    ShortResponse, Sizes, response,
};
use crate::virtio::virtqueue::{HeadIndex, MAX_QUEUE_SIZE, RingLayout, Virtqueue};

/// What a lane of a SCSI host is made of.
#[derive(Debug)]
pub struct ScsiLaneConfig {
    /// Its name.
    pub id: LaneId,
    /// The ring, complete.
    pub queue: Virtqueue,
    /// The guest's memory; the lane keeps it mapped.
    pub memory: Arc<GuestMemory>,
    /// Sizes of the fields of a request.
    pub sizes: Sizes,
    /// The guest, and what it reaches: logical units whose medium is a [`MediumId`].
    pub nexus: Arc<Nexus>,
    /// The device that this lane's commands go to.
    pub device: u32,
    /// Who carries out commands for others.
    pub ways: Vec<WayConfig>,
    /// Of one of those: by what the commands come. The ring is the relay's then.
    pub relay: Option<Arc<Relay>>,
    /// Where the control queue waits for this lane.
    pub barrier: Arc<Barrier>,
    /// Its number among those that the barrier knows.
    pub number: usize,
    /// Where it leaves commands that may wait.
    pub desk: Arc<Desk>,
    /// Flush means something: the controller has a volatile write cache.
    pub volatile_cache: bool,
    /// The call eventfd.
    pub call: Arc<Signal>,
    /// The error eventfd.
    pub error: Arc<Signal>,
    /// The kick eventfd, for a reactor that sleeps. Without it the ring can only be looked at.
    pub kick: Option<OwnedFd>,
    /// Where others read this virtqueue's counters.
    pub shared: Arc<SharedCounters>,
}

/// A namespace of a device, as [`LogicalUnit::medium`] keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MediumId {
    /// Whichever numbers devices have.
    pub device: u32,
    /// The namespace.
    pub nsid: Nsid,
}

impl MediumId {
    /// That of a logical unit.
    #[must_use]
    pub fn of(unit: &LogicalUnit) -> MediumId {
        let [a, b, c, d, device @ ..] = unit.medium().to_le_bytes();
        MediumId {
            device: u32::from_le_bytes(device),
            nsid: Nsid(u32::from_le_bytes([a, b, c, d])),
        }
    }

    /// For [`LogicalUnit::with_medium`].
    #[must_use]
    pub fn bits(self) -> u64 {
        u64::from(self.device) << 32 | u64::from(self.nsid.0)
    }
}

/// A lane for the logical units of another device.
#[derive(Debug)]
pub struct WayConfig {
    /// The device.
    pub device: u32,
    /// By what it gets its commands.
    pub relay: Arc<Relay>,
    /// Its number at the barrier.
    pub number: usize,
}

#[derive(Debug)]
struct Way {
    device: u32,
    driver: RelayDriver,
    number: usize,
    /// Commands were handed over, and it was not asked yet whether the other side sleeps.
    fresh: bool,
}

/// Blocks that are read one by one after one of them could not be, at most: a request of as many has no block named.
const MAX_PROBED: u32 = 4096;

/// The commands of a SCSI host.
#[derive(Debug)]
pub(in crate::datapath) struct Scsi {
    device: u32,
    ways: Box<[Way]>,
    relay: Option<Arc<Relay>>,
    /// Its poller wants a lane back that gets its commands by a relay: the front may have some for it yet.
    recalled: bool,
    sizes: Sizes,
    /// Changed by [`RequestLane::keep_up`] alone.
    nexus: Arc<Nexus>,
    /// By logical unit: see [`Front::lose_cache`].
    cache_lost: Box<[bool]>,
    /// Of the guest's memory; `None` where requests or responses are not as long as usual, which the short way does not know.
    main: Option<MainRegion<SHORT_REQUEST_BYTES>>,
    known: Known<KnownUnit>,
    /// By what commands for other devices go.
    routes: Known<usize>,
    /// By head, of a request that has failed: see [`Failure`]. Of several commands the first blocks count.
    differs: Box<[Option<u64>]>,
    fault: Box<[Option<LbaRange>]>,
    /// By head, of a request that went the short way: the guest's name for it.
    ids: Box<Ids>,
    /// A command's parameter list.
    parameters: Box<[u8]>,
    /// A command's answer.
    data_in: Box<[u8]>,
    gate: Gate,
    /// The logical unit whose lock the work at hand has, or waits for.
    locks: Option<usize>,
    desk: Arc<Desk>,
    /// By place at the desk: whose command is there.
    errands: [Option<(HeadIndex, Place)>; PLACES],
    /// How many.
    errand_count: u16,
    /// Commands that others have: the clerk, and the lanes of other devices.
    elsewhere: u16,
    /// Those have answered, and the guest cannot see it yet.
    unshown: bool,
}

/// What a guest calls its requests, by head.
#[derive(Debug)]
struct Ids([u64; MAX_QUEUE_SIZE as usize]);

impl Ids {
    #[inline(always)]
    fn place(head: HeadIndex) -> usize {
        // The modulo changes nothing (heads are less than the queue size) and spares a bounds check.
        usize::from(head.get()) % usize::from(MAX_QUEUE_SIZE)
    }

    fn of(&self, head: HeadIndex) -> u64 {
        self.0[Ids::place(head)]
    }

    #[inline(always)]
    fn note(&mut self, head: HeadIndex, id: u64) {
        self.0[Ids::place(head)] = id;
    }
}

/// Logical units by how a guest addresses them: those that it has asked for lately.
#[derive(Debug)]
struct Known<T>(Box<[KnownPlace<T>; KNOWN_UNITS]>);

/// The address, and what is known.
type KnownPlace<T> = Option<([u8; 8], T)>;

/// Places for them: a guest with more finds some of them the long way now and then.
const KNOWN_UNITS: usize = 256;

#[derive(Debug)]
struct KnownUnit {
    unit: PlainUnit,
    /// Of a read and of a write.
    transfers: [Transfer; 2],
}

impl<T> Known<T> {
    fn new() -> Known<T> {
        Known(Box::new([const { None }; KNOWN_UNITS]))
    }

    /// Targets and LUNs count from 0 on, mostly one of the two.
    #[inline(always)]
    fn place([_, target, _, lun, ..]: [u8; 8]) -> usize {
        usize::from(target ^ lun)
    }

    #[inline(always)]
    fn find(&self, lun: [u8; 8]) -> Option<&T> {
        let known = self.0[Self::place(lun)].as_ref();
        known.filter(|(own, _)| *own == lun).map(|(_, known)| known)
    }

    fn forget(&mut self) {
        self.0.fill_with(|| None);
    }

    #[inline(always)]
    fn learn(&mut self, lun: [u8; 8], known: impl FnOnce() -> Option<T>) {
        if self.find(lun).is_none() {
            self.0[Self::place(lun)] = known().map(|known| (lun, known));
        }
    }
}

/// Where the lane stands before the [`Barrier`].
#[derive(Debug)]
struct Gate {
    barrier: Arc<Barrier>,
    number: usize,
    /// The last number that this lane has let pass: all commands from before it have ended.
    passed: u64,
    /// The one that is to pass next.
    wanted: u64,
    /// Requests that may still be older than it.
    left: u16,
    /// None is left: nothing is fetched until all have ended.
    closed: bool,
    /// The last order of task management that was carried out.
    obeyed: u64,
    /// The one that is next.
    ordered: u64,
    /// Requests that may still be older than that.
    older: u16,
    /// None is left, and those that the order means are known.
    all_known: bool,
    /// Commands are to be looked at: whether an order means them.
    unmarked: bool,
    /// How many of those have not ended.
    ending: u16,
}

impl Gate {
    /// The last number that it was told, and that of an order.
    #[inline(always)]
    fn asked(&self) -> (u64, u64) {
        self.barrier.asked(self.number)
    }

    /// So many requests were taken from the ring.
    #[inline(always)]
    fn count(&mut self, taken: u16) {
        self.left = self.left.saturating_sub(taken);
        self.older = self.older.saturating_sub(taken);
    }
}

/// Where an answer goes, and what it says beside the status.
#[derive(Clone, Copy, Debug)]
pub(in crate::datapath) struct Place {
    response: ResponsePlace,
    residual: u32,
    /// If the command fails.
    residual_failed: u32,
    /// The logical unit.
    unit: u16,
    /// The guest's name for the command.
    id: u64,
    /// Task management wants its end: the response then, or 0.
    ended: u8,
    /// It is a copy, and has perhaps a name.
    copy: Option<Option<u8>>,
}

/// The first 8 bytes of a request (virtio 1.2, 5.6.6.1): the REPORT LUNS well-known logical unit, or a target and a LUN.
pub(super) fn address(lun: [u8; 8]) -> Option<Address> {
    match lun {
        [0xc1, 0x01, 0, 0, 0, 0, 0, 0] => Some(Address::Controller),
        [1, target, lun @ ..] => Some(Address::of(target, lun)),
        _ => None,
    }
}

/// What the device says (status code type and code), in SCSI's words: status, sense key, code and qualifier. The public
/// form of this table is docs/scsi-sense.md. After the NVMe to SCSI translation that the NVM Express organisation
/// publishes, where it has the code.
#[rustfmt::skip]
const TRANSLATIONS: &[(Status, u8, Sense)] = {
    use key::{
        ABORTED_COMMAND, DATA_PROTECT, HARDWARE_ERROR, ILLEGAL_REQUEST, MEDIUM_ERROR, NOT_READY,
    };
    use status::{CHECK_CONDITION as CHECK, RESERVATION_CONFLICT};
    const fn sense(key: u8, asc: u8, ascq: u8) -> Sense {
        Sense::new(key, asc, ascq)
    }
    &[
        (Status::DATA_TRANSFER_ERROR, CHECK, sense(HARDWARE_ERROR, 0x44, 0x00)),
        (Status::ABORTED_POWER_LOSS, CHECK, sense(ABORTED_COMMAND, 0x0b, 0x08)),
        (Status::INTERNAL_ERROR, CHECK, Sense::INTERNAL_FAILURE),
        (Status::ABORT_REQUESTED, CHECK, sense(ABORTED_COMMAND, 0x00, 0x00)),
        (Status::ABORTED_SQ_DELETION, CHECK, sense(ABORTED_COMMAND, 0x00, 0x00)),
        (Status::INVALID_NAMESPACE, CHECK, Sense::NO_UNIT),
        (Status::SANITIZE_IN_PROGRESS, CHECK, sense(NOT_READY, 0x04, 0x1b)),
        (Status::NAMESPACE_WRITE_PROTECTED, CHECK, Sense::WRITE_PROTECTED),
        (Status::LBA_OUT_OF_RANGE, CHECK, Sense::OUT_OF_RANGE),
        (Status::CAPACITY_EXCEEDED, CHECK, sense(DATA_PROTECT, 0x27, 0x07)),
        (Status::NAMESPACE_NOT_READY, CHECK, sense(NOT_READY, 0x04, 0x00)),
        (Status::RESERVATION_CONFLICT, RESERVATION_CONFLICT, Sense::NONE),
        (Status::FORMAT_IN_PROGRESS, CHECK, sense(NOT_READY, 0x04, 0x04)),
        (Status::NAMESPACE_NOT_ATTACHED, CHECK, Sense::NO_UNIT),
        (Status::CONFLICTING_ATTRIBUTES, CHECK, sense(ILLEGAL_REQUEST, 0x24, 0x00)),
        (Status::WRITE_TO_READ_ONLY_RANGE, CHECK, Sense::WRITE_PROTECTED),
        (Status::WRITE_FAULT, CHECK, sense(MEDIUM_ERROR, 0x0c, 0x00)),
        (Status::UNRECOVERED_READ_ERROR, CHECK, sense(MEDIUM_ERROR, 0x11, 0x00)),
        (Status::GUARD_CHECK_ERROR, CHECK, sense(ABORTED_COMMAND, 0x10, 0x01)),
        (Status::APPLICATION_TAG_CHECK_ERROR, CHECK, sense(ABORTED_COMMAND, 0x10, 0x02)),
        (Status::REFERENCE_TAG_CHECK_ERROR, CHECK, sense(ABORTED_COMMAND, 0x10, 0x03)),
        (Status::COMPARE_FAILURE, CHECK, Sense::MISCOMPARE),
        (Status::ACCESS_DENIED, CHECK, sense(DATA_PROTECT, 0x20, 0x02)),
        (Status::DEALLOCATED_BLOCK, CHECK, sense(MEDIUM_ERROR, 0x11, 0x00)),
    ]
};

/// How a command ends that the device let fail. What is not in the table is a failure of the target.
fn translate(failure: Status, information: Option<u64>) -> (u8, Sense) {
    let found = TRANSLATIONS.iter().find(|(own, ..)| own.is(failure));
    let (status, sense) = found.map_or(
        (status::CHECK_CONDITION, Sense::INTERNAL_FAILURE),
        |(_, status, sense)| (*status, *sense),
    );
    // Of the others the information field would not say what it does of these.
    let about_blocks = matches!(
        sense.key,
        key::MEDIUM_ERROR | key::MISCOMPARE | key::ABORTED_COMMAND
    );
    let information = information.filter(|_| about_blocks);
    (
        status,
        Sense {
            information,
            ..sense
        },
    )
}

/// The status of a command that needs nothing of the device.
fn status_of(action: Action) -> u8 {
    match action {
        Action::Good => status::GOOD,
        Action::Conflict => status::RESERVATION_CONFLICT,
        Action::Check(_) => status::CHECK_CONDITION,
        // Those that have not ended are not answered; a guest would try again.
        Action::Busy | Action::Defer | Action::Carry(_) => status::BUSY,
    }
}

/// Writes the response to a command that has ended, and returns the used length. `unit` says in which format sense data is.
fn finish(
    place: &ResponsePlace,
    unit: Option<&LogicalUnit>,
    outcome: (u8, Sense),
    residual: u32,
    data_in: u32,
) -> u32 {
    let (status, sense) = outcome;
    let mut bytes = [0; MAX_SENSE_BYTES];
    let len = match status {
        status::CHECK_CONDITION => {
            let descriptors = unit.is_some_and(LogicalUnit::senses_in_descriptors);
            sense.encode(descriptors, &mut bytes)
        }
        _ => 0,
    };
    let ending = Ending {
        response: response::OK,
        status,
        sense: &bytes[..len],
        residual,
        data_in,
    };
    scsi::finish(place, &ending)
}

fn verify(range: BlockRange, against: Against, fua: bool) -> Step {
    Step::Verify {
        lba: range.lba.get(),
        left: range.count.get(),
        offset: 0,
        against,
        fua,
    }
}

/// Where the answer to a request of the short way goes, from what its context remembers.
#[inline(always)]
fn whole_response(answer: StatusByte) -> ShortResponse {
    // SAFETY: contexts of commands that are all of a request of a SCSI lane are made by `StartShort` alone.
    unsafe { ShortResponse::at(answer) }
}

/// Sends a read or write that one command carries out at once.
struct StartShort<'a, T: Transport> {
    known: &'a Known<KnownUnit>,
    ids: &'a mut Ids,
    lane: u16,
    pair: &'a mut Pair<T>,
}

impl<T: Transport> AcceptExchange<SHORT_REQUEST_BYTES, SHORT_RESPONSE_BYTES> for StartShort<'_, T> {
    /// Whether it writes, and how many bytes.
    type Accepted = (bool, u32);

    #[inline(always)]
    fn accept<const WRITE: bool>(self, exchange: ShortExchange) -> Option<(bool, u32)> {
        let (lun, cdb) = scsi::parse_short(&exchange);
        let known = self.known.find(lun)?;
        let range = known.unit.transfer(cdb, WRITE)?;
        let (blocks, len) = (range.count.get(), exchange.len);
        // There may be more or less room.
        if u64::from(blocks).wrapping_shl(known.unit.block_shift()) != u64::from(len) {
            return None;
        }
        let slba = range.lba.get();
        let data = DataSegment {
            iova: Iova(exchange.dma),
            len,
        };
        let transfer = known.transfers[usize::from(WRITE)];
        let sent = self
            .pair
            .queue
            .submit_short(transfer, LbaRange { slba, blocks }, data);
        let cid = sent.ok()?;
        *self.pair.context(cid) = CommandContext::Whole {
            lane: self.lane,
            head: exchange.head,
            data_in: if WRITE { 0 } else { len },
            answer: exchange.answer.first(),
        };
        self.ids.note(exchange.head, scsi::id_of_short(&exchange));
        Some((WRITE, len))
    }
}

/// Finds those that are for other devices, which are known by now.
struct RouteShort<'a> {
    routes: &'a Known<usize>,
    ways: &'a mut [Way],
}

impl Route for RouteShort<'_> {
    #[inline(always)]
    fn route(&mut self, lun: [u8; 8]) -> Option<&mut RelayDriver> {
        let way = self.ways.get_mut(*self.routes.find(lun)?)?;
        way.fresh = true;
        Some(&mut way.driver)
    }
}

/// Writes the response to a request that is no command for anybody here.
fn refuse(place: &ResponsePlace, response: u8) -> u32 {
    let ending = Ending {
        response,
        status: status::GOOD,
        sense: &[],
        residual: 0,
        data_in: 0,
    };
    scsi::finish(place, &ending)
}

impl Front for Scsi {
    type Place = Place;

    #[inline(always)]
    fn may_fetch(lane: &mut RequestLane<Scsi>) -> bool {
        if lane.front.nexus.successor().is_some() {
            lane.keep_up();
        }
        if lane.front.elsewhere > 0 && lane.collect() {
            // To be published first.
            return false;
        }
        let gate = &lane.front.gate;
        let (wanted, ordered) = gate.asked();
        (wanted == gate.passed && ordered == gate.obeyed) || lane.attend_to(wanted, ordered)
    }

    #[cold]
    fn held_up<T: Transport>(lane: &mut RequestLane<Scsi>, pair: &mut Pair<T>) {
        if lane.front.gate.unmarked {
            lane.take_the_long_way(pair);
            lane.mark();
            let requests = &lane.requests;
            pair.abort(lane.slot, |head| {
                let place = requests.get(usize::from(head.get()));
                let place = place.and_then(|request| request.place.as_ref());
                place.is_some_and(|place| place.ended != 0)
            });
        }
    }

    /// While the gate is closed, completions are waited for, and they tell of themselves. Other lanes do not.
    #[inline(always)]
    fn is_wanted(lane: &RequestLane<Scsi>) -> bool {
        let front = &lane.front;
        let gate = &front.gate;
        if front.elsewhere > 0 && front.has_outcome() {
            return true;
        }
        if matches!(&lane.work, Some(work) if matches!(work.step, Step::Wait(_))) {
            return true;
        }
        let (wanted, ordered) = gate.asked();
        if wanted == gate.passed && ordered == gate.obeyed {
            return false;
        }
        lane.may_pass(wanted, ordered)
    }

    #[inline(always)]
    fn fetch<T: Transport>(lane: &mut RequestLane<Scsi>, pair: &mut Pair<T>, most: u16) {
        match (lane.queue.layout(), lane.front.ways.is_empty()) {
            (RingLayout::Split, true) => lane.fetch_from::<T, false, false>(pair, most),
            (RingLayout::Packed, true) => lane.fetch_from::<T, true, false>(pair, most),
            (RingLayout::Split, false) => lane.fetch_from::<T, false, true>(pair, most),
            (RingLayout::Packed, false) => lane.fetch_from::<T, true, true>(pair, most),
        }
    }

    fn fail(lane: &mut RequestLane<Scsi>, most: u16) {
        for _ in 0..most.min(FETCH_BUDGET) {
            if !lane.pop_cold() {
                break;
            }
            lane.front.gate.count(1);
            if lane.hand_over() {
                continue;
            }
            lane.counters.errors += 1;
            let written = scsi::parse(&mut lane.chain, lane.front.sizes).map_or(0, |request| {
                let outcome = translate(Status::INTERNAL_ERROR, None);
                let nexus = &lane.front.nexus;
                let unit = address(request.lun).and_then(|address| nexus.find(address));
                let unit = unit.and_then(|unit| nexus.target().units().get(unit));
                finish(&request.place, unit, outcome, lane.buffers(), 0)
            });
            lane.answer(lane.chain.head(), written);
        }
        lane.front.wake_ways();
    }

    fn finish(
        &mut self,
        head: HeadIndex,
        place: Place,
        data_in: u32,
        failure: Option<Status>,
    ) -> u32 {
        if place.ended != 0 {
            self.gate.ending = self.gate.ending.saturating_sub(1);
        }
        if let Some(name) = place.copy {
            self.nexus.copy_ended(name, failure.is_none());
        }
        match failure {
            Some(failure) if place.ended != 0 && failure.is(Status::ABORT_REQUESTED) => {
                let ending = Ending {
                    response: place.ended,
                    status: status::GOOD,
                    sense: &[],
                    residual: place.residual_failed,
                    data_in: 0,
                };
                scsi::finish(&place.response, &ending)
            }
            None => finish(
                &place.response,
                None,
                (status::GOOD, Sense::NONE),
                place.residual,
                data_in,
            ),
            Some(failure) => {
                let at = usize::from(head.get());
                let block = self.fault[at].filter(|fault| fault.blocks == 1);
                let information = self.differs[at].or(block.map(|block| block.slba));
                let outcome = match place.copy {
                    None => translate(failure, information),
                    Some(_) => (status::CHECK_CONDITION, Sense::COPY_FAILED),
                };
                let unit = self.unit_of(&place);
                finish(&place.response, unit, outcome, place.residual_failed, 0)
            }
        }
    }

    /// A comparison that finds a difference has not, nor has what the guest itself wanted to end.
    fn is_error(place: &Place, status: Status) -> bool {
        let wanted = place.ended != 0 && status.is(Status::ABORT_REQUESTED);
        !wanted && !status.is(Status::COMPARE_FAILURE)
    }

    #[cold]
    fn explain(&mut self, head: HeadIndex, failure: Failure, first: bool) {
        let at = usize::from(head.get());
        if first {
            (self.differs[at], self.fault[at]) = (failure.differs, failure.blocks);
            return;
        }
        let differ = self.differs[at].into_iter().chain(failure.differs);
        self.differs[at] = differ.min();
        let faults = self.fault[at].into_iter().chain(failure.blocks);
        self.fault[at] = faults.min_by_key(|fault| fault.slba);
    }

    #[cold]
    fn investigate(lane: &mut RequestLane<Scsi>, head: HeadIndex) -> bool {
        lane.probe(head).is_some()
    }

    fn is_explained(&self, head: HeadIndex) -> bool {
        self.fault[usize::from(head.get())].is_some()
    }

    fn wait(lane: &mut RequestLane<Scsi>, work: &mut Work) -> Progress {
        lane.wait(work)
    }

    fn keeps_others_waiting(&self) -> bool {
        self.locks.is_some()
    }

    fn work_ended(&mut self) {
        if let Some(unit) = self.locks.take()
            && let Some(unit) = self.nexus.target().units().get(unit)
        {
            unit.lock().release(self.gate.number);
        }
    }

    #[inline(always)]
    fn published(lane: &mut RequestLane<Scsi>) {
        let gate = &lane.front.gate;
        if gate.closed || gate.ordered != gate.obeyed {
            lane.pass();
        }
        if lane.front.unshown {
            lane.front.show();
        }
    }

    fn arm(&mut self) -> bool {
        let mut any = false;
        for way in &self.ways {
            any |= way.driver.request_signal();
        }
        any
    }

    fn disarm(&mut self) {
        self.ways
            .iter()
            .for_each(|way| way.driver.suppress_signals());
    }

    fn has_waker(&self) -> bool {
        self.relay.is_some()
    }

    fn recall(&mut self) -> bool {
        self.recalled = self.relay.is_some();
        self.recalled
    }

    fn is_recalled(&self) -> bool {
        self.recalled
    }

    fn is_over(&self) -> bool {
        let relay = self.relay.as_ref();
        self.recalled && relay.is_some_and(|relay| relay.is_closed())
    }

    fn lose_cache(&mut self) {
        self.cache_lost.fill(true);
    }

    fn doubts_flushes(&self) -> bool {
        self.cache_lost.iter().any(|lost| *lost)
    }
}

impl Scsi {
    /// A guest addresses a unit so.
    fn learn(&mut self, lun: [u8; 8], unit: usize) {
        let nexus = &self.nexus;
        let device = self.device;
        self.known.learn(lun, || {
            let MediumId { device: own, nsid } = MediumId::of(nexus.target().units().get(unit)?);
            (own == device).then_some(())?;
            Some(KnownUnit {
                unit: nexus.plain(unit)?,
                transfers: [Transfer::read(nsid), Transfer::write(nsid, false)],
            })
        });
    }

    /// Whether a logical unit is for this lane.
    fn is_own(&self, unit: &LogicalUnit) -> bool {
        MediumId::of(unit).device == self.device
    }

    /// Whether anybody has carried out what this lane has left to others.
    #[cold]
    fn has_outcome(&self) -> bool {
        let settled = (0..PLACES).any(|at| self.desk.is_settled(at));
        settled || self.ways.iter().any(|way| way.driver.has_answer())
    }

    /// Wakes those who were handed something and sleep.
    fn wake_ways(&mut self) {
        for way in self.ways.iter_mut().filter(|way| way.fresh) {
            way.fresh = false;
            if way.driver.wants_kick() {
                self.gate.barrier.wake(way.number);
            }
        }
    }

    /// What others have answered is in the guest's ring.
    #[cold]
    fn show(&mut self) {
        self.unshown = false;
        self.ways.iter().for_each(|way| way.driver.show());
    }

    /// The logical unit that an answer is from.
    fn unit_of(&self, place: &Place) -> Option<&LogicalUnit> {
        self.nexus.target().units().get(usize::from(place.unit))
    }
}

impl RequestLane<Scsi> {
    pub(super) fn new(config: ScsiLaneConfig) -> RequestLane<Scsi> {
        let target = config.nexus.target();
        // Known to those who own a lock before the barrier says what it need not wait for.
        for unit in target.units() {
            if MediumId::of(unit).device == config.device {
                unit.lock().enter(config.number);
            }
        }
        let (passed, obeyed) = config.barrier.enter(config.number);
        for way in &config.ways {
            // Those were there before, and may have missed what this one was told.
            config.barrier.forward(way.number, obeyed);
        }
        let ways = config.ways.into_iter().map(|way| Way {
            device: way.device,
            driver: RelayDriver::new(way.relay),
            number: way.number,
            fresh: false,
        });
        let front = Scsi {
            device: config.device,
            ways: ways.collect(),
            relay: config.relay,
            recalled: false,
            elsewhere: 0,
            unshown: false,
            sizes: config.sizes,
            cache_lost: vec![false; target.units().len().max(MAX_UNITS)].into(),
            main: (config.sizes == Sizes::DEFAULT).then(|| config.memory.main()),
            known: Known::new(),
            routes: Known::new(),
            differs: vec![None; config.queue.size().into()].into(),
            fault: vec![None; config.queue.size().into()].into(),
            ids: Box::new(Ids([0; MAX_QUEUE_SIZE as usize])),
            parameters: vec![0; MAX_PARAMETER_BYTES].into(),
            data_in: vec![0; target.data_in_bytes()].into(),
            nexus: config.nexus,
            desk: config.desk,
            errands: [None; PLACES],
            errand_count: 0,
            gate: Gate {
                barrier: config.barrier,
                number: config.number,
                passed,
                wanted: passed,
                left: 0,
                closed: false,
                obeyed,
                ordered: obeyed,
                older: 0,
                all_known: false,
                unmarked: false,
                ending: 0,
            },
            locks: None,
        };
        let parts = LaneParts {
            id: config.id,
            memory: config.memory,
            volatile_cache: config.volatile_cache,
            // A logical unit says whether it can unmap, and is asked to only then.
            deallocate: true,
            call: config.call,
            error: config.error,
            kick: config.kick,
            shared: config.shared,
        };
        RequestLane::with_front(config.queue, parts, front)
    }

    /// Takes up to `most` requests from a ring that is `PACKED` or not; see [`RequestLane::<Blk>::fetch_from`]. `ROUTES`: they
    /// may be for other lanes.
    #[inline(never)]
    fn fetch_from<T: Transport, const PACKED: bool, const ROUTES: bool>(
        &mut self,
        pair: &mut Pair<T>,
        most: u16,
    ) {
        let commands = self.counters.commands;
        let main = self.front.main;
        let mut taken = 0_u16;
        while taken < most {
            let short = main.as_ref().and_then(|main| {
                let start = StartShort {
                    known: &self.front.known,
                    ids: &mut self.front.ids,
                    lane: self.slot,
                    pair,
                };
                if !ROUTES {
                    let popped = self.queue.pop_exchange::<_, _, PACKED, _>(main, start);
                    return popped.map(Routed::Here);
                }
                let route = RouteShort {
                    routes: &self.front.routes,
                    ways: &mut self.front.ways,
                };
                self.queue
                    .pop_routed::<_, _, PACKED, _, _>(main, route, start)
            });
            match short {
                Some(Routed::Here((write, len))) => {
                    self.counters.commands = self.counters.commands.wrapping_add(1);
                    self.count_transfer(write, len);
                }
                Some(Routed::HandedOver) => self.front.elsewhere += 1,
                None if self.start_next(pair) => {}
                None => break,
            }
            taken = taken.wrapping_add(1);
        }
        self.front.gate.count(taken);
        self.count_doorbell(commands);
        if ROUTES {
            self.front.wake_ways();
        }
    }

    /// The next request, the long way. `false` when there is none, or it became work.
    #[inline(never)]
    fn start_next<T: Transport>(&mut self, pair: &mut Pair<T>) -> bool {
        match self.queue.pop(&self.config.memory, &mut self.chain) {
            Ok(true) => {}
            Ok(false) => return false,
            Err(error) => {
                self.break_ring(&error);
                return false;
            }
        }
        // One that a guest sends because of what another queue has told it may have come after `may_fetch`.
        if self.front.nexus.successor().is_some() {
            self.keep_up();
        }
        if !self.hand_over() {
            self.start(pair);
        }
        self.work.is_none()
    }

    /// The request that was just popped goes to the lane of another device, if its logical unit is there, and there is room.
    #[inline(always)]
    fn hand_over(&mut self) -> bool {
        !self.front.ways.is_empty() && self.hand_over_to_another()
    }

    #[inline(never)]
    fn hand_over_to_another(&mut self) -> bool {
        let front = &mut self.front;
        let nexus = &front.nexus;
        let Some(lun) = self.chain.peek() else {
            return false;
        };
        let Some(address) = address(lun) else {
            return false;
        };
        let unit = nexus.find(address);
        let unit = unit.and_then(|unit| nexus.target().units().get(unit));
        let Some(MediumId { device, .. }) = unit.map(MediumId::of) else {
            return false;
        };
        let Some(at) = front.ways.iter().position(|way| way.device == device) else {
            return false;
        };
        front.routes.learn(lun, || Some(at));
        let way = &mut front.ways[at];
        let handed = way.driver.hand_over(&self.chain, &self.config.memory);
        if handed.is_err() {
            return false;
        }
        way.fresh = true;
        front.elsewhere += 1;
        true
    }

    /// The command that was all of the request at `head` has completed, and well.
    #[inline(always)]
    pub(in crate::datapath) fn request_done(
        &mut self,
        head: HeadIndex,
        answer: StatusByte,
        data_in: u32,
    ) {
        let response = whole_response(answer);
        self.queue
            .push_used(head, scsi::finish_short(response, data_in));
    }

    /// It has failed: the long way has the words for it. `sent` is the command.
    #[cold]
    pub(in crate::datapath) fn request_failed(
        &mut self,
        head: HeadIndex,
        answer: StatusByte,
        sent: Option<SubmissionEntry>,
        failure: Failure,
    ) {
        let place = sent.and_then(|sent| self.place_of(head, answer, &sent));
        let Some(place) = place else {
            // Cannot be: it was sent, and taken from there.
            return self.answer(head, 0);
        };
        self.remember(head, place, 0);
        self.command_done(head, Some(failure));
    }

    /// The place of a request that went the short way.
    fn place_of(
        &self,
        head: HeadIndex,
        answer: StatusByte,
        sent: &SubmissionEntry,
    ) -> Option<Place> {
        let front = &self.front;
        let response = front.main?.bytes_of(whole_response(answer))?;
        // A namespace is behind one logical unit of a host.
        let units = front.nexus.target().units();
        let medium = MediumId {
            device: front.device,
            nsid: Nsid(sent.nsid.get()),
        };
        let unit = units.iter().position(|unit| MediumId::of(unit) == medium);
        let shift = unit
            .and_then(|unit| units.get(unit))
            .map_or(0, |unit| unit.geometry().block_shift());
        Some(Place {
            response: ResponsePlace::whole(response),
            residual: 0,
            residual_failed: sent.lba_range().blocks << shift,
            unit: unit
                .and_then(|unit| u16::try_from(unit).ok())
                .unwrap_or(u16::MAX),
            id: front.ids.of(head),
            ended: 0,
            copy: None,
        })
    }

    /// Requests that went the short way and have not ended go on by the long one, which remembers them.
    fn take_the_long_way<T: Transport>(&mut self, pair: &mut Pair<T>) {
        for cid in (0..pair.queue.depth()).map(Cid) {
            let CommandContext::Whole {
                lane,
                head,
                data_in,
                answer,
            } = *pair.context(cid)
            else {
                continue;
            };
            if lane != self.slot || !pair.queue.is_outstanding(cid) {
                continue;
            }
            let sent = pair.queue.sent(cid);
            if let Some(place) = sent.and_then(|sent| self.place_of(head, answer, &sent)) {
                self.remember(head, place, data_in);
                *pair.context(cid) = CommandContext::Part {
                    lane,
                    head,
                    bounce: None,
                };
            }
        }
    }

    /// A read of several blocks found one that cannot be read: which, reads of each will tell. Not while there is other work.
    #[cold]
    fn probe(&mut self, head: HeadIndex) -> Option<()> {
        let at = usize::from(head.get());
        let request = self.requests.get(at)?;
        let place = request
            .place
            .filter(|place| place.ended == 0 && place.copy.is_none())?;
        let is_fault = request
            .failure
            .is_some_and(|failure| failure.is(Status::UNRECOVERED_READ_ERROR));
        let blocks =
            self.front.fault[at].filter(|fault| fault.blocks > 1 && fault.blocks <= MAX_PROBED)?;
        let unit = self.front.unit_of(&place)?;
        let medium = Medium {
            nsid: MediumId::of(unit).nsid,
            block_shift: unit.geometry().block_shift(),
            durable: false,
        };
        if !is_fault || self.work.is_some() {
            return None;
        }
        self.front.fault[at] = None;
        // One for the issuing.
        self.requests[at].pending = 1;
        self.set_work(Some(Work {
            head,
            medium,
            step: Step::Probe {
                lba: blocks.slba,
                left: blocks.blocks,
            },
            then: NOTHING_MORE,
        }));
        Some(())
    }

    /// The host shows other logical units than it did. From the next command on the guest meets those; what is in flight
    /// goes by index, and an index is another's only when nothing of the one before is in flight.
    ///
    /// Whoever has this lane wait for a number has made the successor before: it is found before the number is passed.
    #[cold]
    fn keep_up(&mut self) {
        while let Some(next) = self.front.nexus.successor().map(Arc::clone) {
            let number = self.front.gate.number;
            let (old, new) = (self.front.nexus.target().units(), next.target().units());
            for (at, unit) in new.iter().enumerate() {
                let before = old.get(at);
                if before.is_some_and(|before| before.is(unit)) {
                    continue;
                }
                if let Some(before) = before.filter(|before| self.front.is_own(before)) {
                    before.lock().leave(number);
                }
                if self.front.is_own(unit) {
                    unit.lock().enter(number);
                }
                if let Some(lost) = self.front.cache_lost.get_mut(at) {
                    *lost = false;
                }
            }
            // Before the nexus goes that keeps what is forgotten: nothing is freed here.
            self.front.known.forget();
            self.front.routes.forget();
            self.front.nexus = next;
        }
    }

    /// Whether requests may be taken, or work gone on with.
    #[cold]
    fn attend_to(&mut self, wanted: u64, ordered: u64) -> bool {
        let goes_on = ordered == self.front.gate.obeyed || self.obey(ordered);
        goes_on && (wanted == self.front.gate.passed || self.approach(wanted))
    }

    /// Task management wants some of the commands to end that were there before it. Those are marked when it is heard of,
    /// so that none holds up the others; and again when all are known, which the ring had then. `false` when they are to be
    /// marked, which those at the device may need, or when there is something to be told.
    fn obey(&mut self, ordered: u64) -> bool {
        let gate = &mut self.front.gate;
        let fresh = gate.ordered != ordered;
        if fresh {
            gate.ordered = ordered;
            gate.older = self.queue.size();
            gate.all_known = false;
        }
        if gate.all_known {
            // If so, that is something to be told.
            return !self.has_obeyed();
        }
        let more = self.state == State::Running && gate.older > 0 && self.queue.has_request();
        gate.all_known = !more;
        if gate.all_known {
            // What was before the order is with those by now whom it may concern.
            for way in &self.front.ways {
                gate.barrier.forward(way.number, ordered);
            }
        }
        // What is taken from the ring meanwhile may become work, which nothing is taken behind.
        if !fresh && more && self.work.is_none() {
            return true;
        }
        self.front.gate.unmarked = true;
        // Without anything at the device there is nothing to be done there.
        if self.queue.heads_in_flight() <= self.front.elsewhere.into() {
            self.mark();
        }
        false
    }

    /// Whether there is more to do for what was wanted and ordered than to wait for completions.
    #[cold]
    fn may_pass(&self, wanted: u64, ordered: u64) -> bool {
        let front = &self.front;
        let gate = &front.gate;
        // One that gets its commands from another lane also has to wait until that one has shown the guest its answers.
        let others = front.relay.as_ref().map_or(0, |_| front.elsewhere);
        let busy = self.queue.in_flight() > others;
        let waits = gate.closed && gate.wanted == wanted && busy;
        let ends = gate.ending > 0 || front.relay.is_none();
        let obeys = gate.all_known && !gate.unmarked && gate.ordered == ordered && busy && ends;
        (wanted != gate.passed && !waits) || (ordered != gate.obeyed && !obeys)
    }

    /// All commands that orders mean have ended, but for the guest to see it, unless it depends on others for that.
    fn has_obeyed(&self) -> bool {
        let gate = &self.front.gate;
        gate.all_known && !gate.unmarked && gate.ending == 0 && self.is_seen()
    }

    /// The guest can see what was answered, once it is published.
    fn is_seen(&self) -> bool {
        let relay = self.front.relay.as_ref();
        relay.is_none_or(|relay| relay.has_shown(&self.queue))
    }

    /// Marks the commands that orders mean.
    fn mark(&mut self) {
        let Scsi {
            gate,
            nexus,
            errands,
            ..
        } = &mut self.front;
        let barrier = Arc::clone(&gate.barrier);
        gate.unmarked = false;
        let target = nexus.target();
        for (order, found) in barrier.orders(gate.number, gate.obeyed, gate.ordered) {
            let requests = self.requests.iter_mut();
            let places = requests.filter_map(|request| request.place.as_mut());
            let errands = errands.iter_mut().flatten().map(|(_, place)| place);
            for place in places.chain(errands) {
                let index = usize::from(place.unit);
                let Some(unit) = target.units().get(index) else {
                    continue;
                };
                if !order.means(unit, || target.id_of(index), place.id) {
                    continue;
                }
                found.store(true, Ordering::Relaxed);
                if order.is_query() || place.ended != 0 {
                    continue;
                }
                place.ended = order.response(gate.number);
                gate.ending += 1;
                if order.clears_others(gate.number) {
                    nexus.attend(index, Attention::CommandsCleared);
                }
            }
        }
        self.cut_work();
    }

    /// Work whose end is wanted goes no further.
    fn cut_work(&mut self) {
        let Some(work) = &mut self.work else {
            return;
        };
        let head = work.head;
        let place = &self.requests[usize::from(head.get())].place;
        let ended = place.as_ref().is_some_and(|place| place.ended != 0);
        if ended && !matches!(work.step, Step::Done) {
            work.step = Step::Done;
            self.fail_request(head, Status::ABORT_REQUESTED);
        }
    }

    /// Others wait for the commands that were there before. Whether there may be any more in the ring, or work to go on
    /// with.
    fn approach(&mut self, wanted: u64) -> bool {
        let gate = &mut self.front.gate;
        if gate.wanted != wanted {
            gate.wanted = wanted;
            gate.closed = false;
            // What is in the ring by now is among the next so many.
            gate.left = self.queue.size();
        }
        let more = self.state == State::Running && gate.left > 0 && self.queue.has_request();
        if self.work.is_some() || (more && !gate.closed) {
            return true;
        }
        gate.closed = true;
        false
    }

    /// What was wanted of this lane is done, and the guest can see it: says so, if that is so.
    #[cold]
    fn pass(&mut self) {
        let has_obeyed = self.has_obeyed();
        let gate = &mut self.front.gate;
        if gate.ordered != gate.obeyed && has_obeyed {
            gate.obeyed = gate.ordered;
            gate.barrier.obey(gate.number, gate.obeyed);
        }
        if gate.closed {
            self.let_pass();
        }
    }

    /// If everything that was fetched has ended.
    fn let_pass(&mut self) {
        let own = self.queue.heads_in_flight() > self.front.elsewhere.into();
        if own || self.work.is_some() || !self.is_seen() {
            return;
        }
        let gate = &mut self.front.gate;
        gate.barrier.sweep(gate.number, gate.wanted);
        if self.front.errand_count > 0 {
            return;
        }
        gate.closed = false;
        gate.passed = gate.wanted;
        gate.barrier.pass(gate.number, gate.passed);
    }

    /// Task management wakes a poller that sleeps.
    pub(super) fn waker(&self) -> BorrowedFd<'_> {
        self.front.gate.barrier.waker(self.front.gate.number)
    }

    /// Nobody need wait for it any more.
    pub(super) fn leave(&mut self) {
        let front = &self.front;
        for unit in front.nexus.target().units() {
            if front.is_own(unit) {
                unit.lock().leave(front.gate.number);
            }
        }
        front.gate.barrier.leave(front.gate.number);
        for way in &front.ways {
            way.driver.close();
        }
    }

    /// A request that is about a logical unit which other lanes have too.
    #[cold]
    fn wait(&mut self, work: &mut Work) -> Progress {
        let Step::Wait(wait) = work.step else {
            return Progress::Failed;
        };
        let (Wait::Lock { unit, .. } | Wait::Others { unit, .. } | Wait::Turn { unit }) = wait;
        let nexus = Arc::clone(&self.front.nexus);
        let Some(unit_of) = nexus.target().units().get(unit) else {
            return Progress::Failed;
        };
        let gate = &self.front.gate;
        let (barrier, lock) = (&gate.barrier, unit_of.lock());
        // Those who wait for this lane need not wait for what waits for them: it has nothing at the device yet. Nor has what
        // waits for the clerk.
        if self.queue.heads_in_flight() == 1 + usize::from(self.front.elsewhere) {
            barrier.be_quiet(gate.number);
        }
        if let Wait::Lock { .. } | Wait::Turn { .. } = wait {
            self.front.locks = Some(unit);
            if !lock.acquire(gate.number) {
                return Progress::Blocked;
            }
        }
        match wait {
            Wait::Lock { lba, count, .. } => {
                lock.hold(lba, count);
                let number = barrier.ask(|| lock.taken());
                work.step = Step::Wait(Wait::Others { unit, number });
                return Progress::Next;
            }
            Wait::Others { number, .. } if !barrier.are_quiet(lock.taken(), number) => {
                return Progress::Blocked;
            }
            // Nobody else holds any blocks, until this one gives the lock on.
            Wait::Others { .. } | Wait::Turn { .. } => {}
        }
        // The cache may have been switched off meanwhile.
        work.medium.durable |= unit_of.writes_through();
        Progress::Finished
    }

    /// Whether another command has locked blocks that a step would write.
    fn meets(&self, lock: &RangeLock, step: Step) -> bool {
        match step {
            Step::Transfer { lba, left, .. } | Step::Same { lba, left } => lock.holds(lba, left),
            Step::Discard { .. } | Step::WriteZeroes { .. } => self
                .ranges
                .as_slice()
                .iter()
                .any(|range| lock.holds(range.lba.get(), range.count.get())),
            // Sources and destinations.
            Step::Copy { .. } => self
                .ranges
                .as_slice()
                .chunks_exact(2)
                .any(|pair| lock.holds(pair[1].lba.get(), pair[1].count.get())),
            _ => false,
        }
    }

    /// Bytes of all data buffers of the chain.
    fn buffers(&self) -> u32 {
        // Chains hold fewer than 2^32 bytes.
        u32::try_from(self.chain.readable_len() + self.chain.writable_len()).unwrap_or(u32::MAX)
    }

    /// The chain that was just popped becomes a command.
    fn start<T: Transport>(&mut self, pair: &mut Pair<T>) {
        let head = self.chain.head();
        let Some(request) = scsi::parse(&mut self.chain, self.front.sizes) else {
            self.counters.malformed += 1;
            return self.answer(head, 0);
        };
        let place = request.place;
        let Some(cdb) = request.cdb() else {
            self.counters.malformed += 1;
            let written = refuse(&place, response::FAILURE);
            return self.answer(head, written);
        };
        let (readable, writable) = (self.chain.readable_len(), self.chain.writable_len());
        if readable > 0 && writable > 0 {
            // Data both ways needs VIRTIO_SCSI_F_INOUT, which is not offered.
            return self.refuse(head, &place, response::FAILURE);
        }
        let address = match address(request.lun) {
            Some(address) if self.front.nexus.has_target(address) => address,
            _ => {
                // A guest that looks for targets asks each of them.
                self.counters.checks += 1;
                let written = refuse(&place, response::BAD_TARGET);
                return self.answer(head, written);
            }
        };
        let cdb = Cdb::new(cdb);
        let nexus = Arc::clone(&self.front.nexus);
        let unit = nexus.find(address);
        let medium = unit.and_then(|unit| nexus.target().units().get(unit));
        if medium.is_some_and(|unit| !self.front.is_own(unit)) {
            // Its lane has no room for it; or the host shows another one there since it was handed over.
            self.counters.checks += 1;
            let outcome = (status::TASK_SET_FULL, Sense::NONE);
            let written = finish(&place, None, outcome, self.buffers(), 0);
            return self.answer(head, written);
        }
        if let Some(unit) = unit {
            self.front.learn(request.lun, unit);
        }
        let wanted = nexus.parameter_bytes(unit, &cdb);
        if u64::from(wanted) > readable {
            return self.refuse(head, &place, response::OVERRUN);
        }
        let residual = self.buffers();
        let parameters = &mut self.front.parameters[..(wanted as usize).min(MAX_PARAMETER_BYTES)];
        let mut done = 0;
        for segment in self.chain.readable() {
            done += segment.copy_to(&mut parameters[done..]);
        }
        let mut exchange = Exchange {
            cdb: &cdb,
            parameters,
            data_in: DataIn::new(&mut self.front.data_in),
            ranges: &mut self.ranges,
        };
        let action = nexus.execute(address, unit, &mut exchange);
        match action {
            Action::Good => {
                let data = exchange.data_in.as_slice();
                let moved = u32::try_from(data.len()).unwrap_or(u32::MAX);
                if u64::from(moved) > writable {
                    return self.refuse(head, &place, response::OVERRUN);
                }
                copy_out(data, self.chain.writable());
                let residual = residual - moved.max(wanted);
                self.counters.immediate += 1;
                let outcome = (status::GOOD, Sense::NONE);
                let written = finish(&place, None, outcome, residual, moved);
                self.answer(head, written);
            }
            Action::Check(sense) => {
                self.counters.checks += 1;
                let outcome = (status::CHECK_CONDITION, sense);
                let unit = unit.and_then(|unit| nexus.target().units().get(unit));
                let written = finish(&place, unit, outcome, residual, 0);
                self.answer(head, written);
            }
            Action::Conflict | Action::Busy => {
                self.counters.checks += 1;
                let outcome = (status_of(action), Sense::NONE);
                let written = finish(&place, None, outcome, residual, 0);
                self.answer(head, written);
            }
            Action::Defer => {
                let place = Place {
                    response: place,
                    residual: residual - wanted,
                    residual_failed: residual,
                    // Only a logical unit has such commands.
                    unit: unit
                        .and_then(|unit| u16::try_from(unit).ok())
                        .unwrap_or(u16::MAX),
                    id: request.id,
                    ended: 0,
                    copy: None,
                };
                self.defer(head, place, unit, &cdb, wanted);
            }
            Action::Carry(carry) if carry.data_in > writable || carry.data_out > readable => {
                self.refuse(head, &place, response::OVERRUN);
            }
            Action::Carry(carry) => {
                let moved = u32::try_from(carry.data_in + carry.data_out).unwrap_or(u32::MAX);
                let place = Place {
                    response: place,
                    residual: residual - moved,
                    residual_failed: residual,
                    // LUNs have 14 bits.
                    unit: u16::try_from(carry.unit).unwrap_or(u16::MAX),
                    id: request.id,
                    ended: 0,
                    copy: match carry.op {
                        BlockOp::Copy { name } => Some(name),
                        _ => None,
                    },
                };
                self.carry(pair, head, place, &carry, &nexus);
            }
        }
    }

    /// The clerk carries a command out.
    #[cold]
    fn defer(
        &mut self,
        head: HeadIndex,
        place: Place,
        unit: Option<usize>,
        cdb: &Cdb,
        wanted: u32,
    ) {
        let front = &mut self.front;
        let len = (wanted as usize).min(front.parameters.len());
        let (desk, nexus) = (&front.desk, &front.nexus);
        let left = unit.and_then(|unit| desk.leave(nexus, unit, cdb, &front.parameters[..len]));
        match left.and_then(|at| front.errands.get_mut(at)) {
            Some(errand) => {
                *errand = Some((head, place));
                front.errand_count += 1;
                front.elsewhere += 1;
            }
            None => {
                let outcome = (status::TASK_SET_FULL, Sense::NONE);
                let written = finish(&place.response, None, outcome, place.residual_failed, 0);
                self.answer(head, written);
            }
        }
    }

    /// Answers what others have carried out. `true` when there was anything.
    #[cold]
    pub(super) fn collect(&mut self) -> bool {
        let before = self.front.elsewhere;
        for way in &mut self.front.ways {
            while let Some((head, written)) = way.driver.answer() {
                self.queue.push_used(head, written);
                self.front.elsewhere -= 1;
                self.front.unshown = true;
            }
        }
        for at in 0..PLACES {
            let Some((head, place)) = self.front.errands[at] else {
                continue;
            };
            let Some(action) = self.front.desk.collect(at) else {
                continue;
            };
            self.front.errands[at] = None;
            self.front.errand_count -= 1;
            self.front.elsewhere -= 1;
            if place.ended != 0 {
                // It had begun and could not be stopped: its answer is as ever.
                self.front.gate.ending = self.front.gate.ending.saturating_sub(1);
            }
            let (residual, sense) = match action {
                Action::Good => {
                    self.counters.immediate += 1;
                    (place.residual, Sense::NONE)
                }
                Action::Check(sense) => {
                    self.counters.checks += 1;
                    (place.residual_failed, sense)
                }
                _ => {
                    self.counters.checks += 1;
                    (place.residual_failed, Sense::NONE)
                }
            };
            let outcome = (status_of(action), sense);
            let unit = self.front.unit_of(&place);
            let written = finish(&place.response, unit, outcome, residual, 0);
            self.answer(head, written);
        }
        self.front.elsewhere != before
    }

    #[cold]
    fn refuse(&mut self, head: HeadIndex, place: &ResponsePlace, response: u8) {
        self.counters.unsupported += 1;
        let written = refuse(place, response);
        self.answer(head, written);
    }

    fn carry<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        head: HeadIndex,
        place: Place,
        carry: &Carry,
        nexus: &Nexus,
    ) {
        let Some(unit) = nexus.target().units().get(carry.unit) else {
            return self.refuse(head, &place.response, response::FAILURE);
        };
        let medium = Medium {
            nsid: MediumId::of(unit).nsid,
            block_shift: unit.geometry().block_shift(),
            durable: carry.fua,
        };
        // No more than the chain holds.
        let data_in = u32::try_from(carry.data_in).unwrap_or(u32::MAX);
        self.remember(head, place, data_in);
        let mut then = NOTHING_MORE;
        let step = match carry.op {
            BlockOp::Read(range) | BlockOp::Write(range) => {
                let write = carry.data_out > 0;
                let (lba, left) = (range.lba.get(), range.count.get());
                let bytes = left << medium.block_shift;
                self.count_transfer(write, bytes);
                // An ordinary write looks once whether it has to wait for anybody.
                let free = !(write && unit.lock().holds_any());
                if free && self.sent_at_once(pair, head, medium, (write, lba, left)) {
                    return;
                }
                Some(Step::Transfer {
                    write,
                    lba,
                    left,
                    offset: 0,
                })
            }
            BlockOp::Flush => self.flush(head, carry.unit),
            BlockOp::DrainAndFlush => {
                then[0] = self.flush(head, carry.unit);
                let (unit, lock) = (carry.unit, unit.lock());
                let number = self.front.gate.barrier.ask(|| lock.taken());
                Some(Step::Wait(Wait::Others { unit, number }))
            }
            BlockOp::CompareAndWrite(range) => {
                let (lba, count) = (range.lba.get(), range.count.get());
                let bytes = count << medium.block_shift;
                self.count_transfer(true, bytes);
                then = [
                    // What was written last, wherever it is.
                    Some(verify(range, Against::Data, false)),
                    Some(Step::Transfer {
                        write: true,
                        lba,
                        left: count,
                        offset: bytes.into(),
                    }),
                ];
                let unit = carry.unit;
                Some(Step::Wait(Wait::Lock { unit, lba, count }))
            }
            BlockOp::Discard => {
                self.counters.discards += 1;
                Some(Step::Discard { range: 0 })
            }
            BlockOp::WriteZeroes => {
                self.counters.write_zeroes += 1;
                Some(Step::WriteZeroes { range: 0, done: 0 })
            }
            BlockOp::WriteSame(range) => {
                self.counters.write_zeroes += 1;
                Some(Step::Same {
                    lba: range.lba.get(),
                    left: range.count.get(),
                })
            }
            BlockOp::Verify { range, against } => {
                self.count_transfer(false, range.count.get() << medium.block_shift);
                Some(verify(range, against, true))
            }
            BlockOp::WriteAndVerify { range, against } => {
                let (lba, left) = (range.lba.get(), range.count.get());
                self.count_transfer(true, left << medium.block_shift);
                then[0] = Some(verify(range, against, true));
                Some(Step::Transfer {
                    write: true,
                    lba,
                    left,
                    offset: 0,
                })
            }
            BlockOp::Copy { .. } => Some(Step::Copy {
                range: 0,
                done: 0,
                most: unit.copy_blocks(),
            }),
            // No command asks for it.
            BlockOp::DeviceId => None,
        };
        let Some(step) = step else {
            return self.end_command(head);
        };
        let writes = !matches!(step, Step::Transfer { write: false, .. });
        let steps = match writes && self.meets(unit.lock(), step) {
            true => {
                let unit = carry.unit;
                // Of what writes only WRITE AND VERIFY has more than one step.
                (Step::Wait(Wait::Turn { unit }), [Some(step), then[0]])
            }
            false => (step, then),
        };
        self.begin_work(pair, head, medium, steps);
    }

    /// What a flush of a logical unit takes, if anything.
    fn flush(&mut self, head: HeadIndex, unit: usize) -> Option<Step> {
        self.counters.flushes += 1;
        let lost = self.front.cache_lost.get_mut(unit);
        if lost.is_some_and(std::mem::take) {
            self.fail_request(head, Status::INTERNAL_ERROR);
        }
        self.config.volatile_cache.then_some(Step::Flush)
    }

    /// A read or write that one NVMe command carries out in place. The count of the issuing is that command's.
    fn sent_at_once<T: Transport>(
        &mut self,
        pair: &mut Pair<T>,
        head: HeadIndex,
        medium: Medium,
        (write, lba, blocks): (bool, u64, u32),
    ) -> bool {
        let bytes = blocks << medium.block_shift;
        if bytes > pair.queue.max_transfer() {
            self.counters.split += 1;
            return false;
        }
        let segments = if write {
            self.chain.readable()
        } else {
            self.chain.writable()
        };
        let entry = medium.transfer(write, lba, blocks);
        // The buffers may be longer.
        let data = piece(segments, 0, bytes).map(|segment| as_data(&segment));
        let Ok(cid) = pair.queue.submit(entry, data, bytes) else {
            return false;
        };
        *pair.context(cid) = CommandContext::Part {
            lane: self.slot,
            head,
            bounce: None,
        };
        self.counters.commands = self.counters.commands.wrapping_add(1);
        true
    }
}
