//! A poller owns one NVMe queue pair and serves the lanes that ride with it: one, when the device has queue pairs
//! enough, or several of the same reactor. It belongs to one reactor (I7) and comes back by value at the end.
//!
//! One turn: completions first (they free slots), the guests' used rings, then submissions, one doorbell, and at most one
//! signal for each guest.

use std::any::Any;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nvme_driver::MAX_ENTRIES;
use nvme_driver::dma::{DmaError, DmaSpace};
use nvme_driver::spec::{Cid, LbaRange, Status, SubmissionEntry, io_opcode};
use nvme_driver::transport::{Armed, Transport};
use nvme_driver::{Completion, QueuePair};

use super::abort::{AbortList, Aborts};
use super::bounce::BouncePool;
use super::lane::{CommandContext, Failure, Kind, Lane, LaneId, Pair, max_segments};
use crate::stats::Stage;
use crate::virtio::virtqueue::{HeadIndex, MAX_QUEUE_SIZE};

/// Completions that one turn takes from the completion queue.
const POLL_BUDGET: usize = 64;
/// A lane's counters are shown to others, and the clock is looked at, every so many turns.
const PUBLISH_INTERVAL: u32 = 1024;
/// Every so many of those turns, a request is timed on its way.
const SAMPLE_INTERVAL: u32 = 16;
/// Turns that a timed request may take: it is forgotten then.
const SAMPLE_PATIENCE: u32 = 1 << 18;
/// What the age of commands is counted in.
const ERA: Duration = Duration::from_millis(250);

/// What a poller does with its lanes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Service {
    /// The device carries requests out.
    Serve,
    /// There is no device: every request fails.
    Fail,
    /// There is no device: requests wait, those that were at the device too. A lane that is asked back fails its own.
    Hold,
}

/// What others may know of a queue pair while a reactor has it.
#[derive(Debug, Default)]
pub struct PairHealth {
    /// How long the oldest outstanding command has been at the device, in milliseconds; and its CID, in the upper half.
    oldest: AtomicU64,
    anomalies: AtomicU64,
    resent: AtomicU64,
    aborts: AbortList,
}

impl PairHealth {
    /// The command that has been at the device longest, and since when (in steps of a quarter of a second).
    #[must_use]
    pub fn oldest(&self) -> (Cid, Duration) {
        let value = self.oldest.load(Ordering::Relaxed);
        let [cid, millis] = [value >> 48, value & 0xffff_ffff];
        (
            Cid(u16::try_from(cid).unwrap_or(0)),
            Duration::from_millis(millis),
        )
    }

    /// Commands that are to be aborted.
    #[must_use]
    pub fn aborts(&self) -> &AbortList {
        &self.aborts
    }

    /// See `QueuePairCounters::anomalies`.
    #[must_use]
    pub fn anomalies(&self) -> u64 {
        self.anomalies.load(Ordering::Relaxed)
    }

    /// See `QueuePairCounters::resent`.
    #[must_use]
    pub fn resent(&self) -> u64 {
        self.resent.load(Ordering::Relaxed)
    }
}

/// What is at a device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Commands submitted so far.
    pub submitted: u64,
    /// Those of them that have not completed.
    pub outstanding: u16,
}

/// A file that becomes readable when a poller has something to do.
#[derive(Clone, Copy, Debug)]
pub enum Waker<'a> {
    /// A guest's kick.
    Kick(BorrowedFd<'a>),
    /// The device's interrupt.
    Interrupt(BorrowedFd<'a>),
}

/// What a reactor drives: one turn at a time, whatever the transport. The one virtual call of a turn is here.
pub trait Poll: Send {
    /// One turn. `true` when there was anything to do.
    fn turn(&mut self) -> bool;
    /// Takes a lane into service.
    fn attach(&mut self, lane: Lane);
    /// Lets a lane drain. `false` when it is not here.
    fn detach(&mut self, lane: LaneId) -> bool;
    /// A lane that has drained since, if any: nothing names its memory any more.
    fn take_drained(&mut self) -> Option<Lane>;
    /// Lanes here, draining ones included.
    fn lanes(&self) -> usize;
    /// What others may know of its queue pair meanwhile.
    fn health(&self) -> Arc<PairHealth>;
    /// What is at the device.
    fn load(&self) -> Load;
    /// The reactor wants to sleep: asks guests for kicks and the device for an interrupt, and says whether anything has
    /// happened meanwhile, or would without being told.
    fn arm(&mut self) -> Armed;
    /// The reactor is awake: takes back what was asked for.
    fn disarm(&mut self);
    /// Every file that [`Poll::arm`] may make use of. Nobody reads them: they are watched edge-triggered.
    fn wakers(&self, each: &mut dyn FnMut(Waker<'_>));
    /// Another kick eventfd for a lane. Gives back the one before.
    fn replace_kick(&mut self, lane: LaneId, kick: Option<OwnedFd>) -> Option<OwnedFd>;
    /// The disk of a lane has so many blocks, from its next request on.
    fn resize(&mut self, lane: LaneId, blocks: u64);
    /// Shows others how it is: turns do so every so often, and there will be none for a while.
    fn show(&mut self);
    /// Carries on with what is at the device and takes nothing new, until nothing is there or `deadline` has passed.
    /// `true` when nothing is. For the control thread that has the poller.
    fn settle(&mut self, deadline: Duration) -> bool;
    /// The device is given up: lets go of it, and does without. For the control thread that has the poller.
    fn suspend(&mut self, service: Service);
    /// The poller by value, for its maker.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
    /// The poller, for its maker.
    fn as_any(&mut self) -> &mut dyn Any;
}

/// A request that is timed, at the device. While it is there every turn is a rare one, so that the others need not ask
/// whether there is one.
#[derive(Clone, Copy, Debug)]
struct Sample {
    cid: Cid,
    /// Its lane's place.
    lane: u16,
    /// The turn that found it looked at the avail rings.
    seen: Instant,
    /// The submission queue's doorbell was rung.
    rung: Instant,
    /// Turns that it may still take.
    patience: u32,
}

/// One queue pair and its lanes.
#[derive(Debug)]
pub struct Poller<T: Transport> {
    pair: Pair<T>,
    /// Lanes at fixed places: a command's context names one.
    lanes: Vec<Option<Lane>>,
    lane_count: usize,
    draining: usize,
    /// Turns, up to the next [`Poller::rare_turn`].
    turns: u64,
    /// How many of them are still to come: one for a rare turn next. While there is no device, every turn is rare.
    until_show: u32,
    /// Turns in which anything was done.
    busy_turns: u64,
    /// Turns, busy turns and completion doorbells that the lanes' counters know of.
    counted: [u64; 3],
    service: Service,
    sample: Option<Sample>,
    /// Rare turns until the next sample.
    until_sample: u32,
    /// When the current era began.
    era: Instant,
    health: Arc<PairHealth>,
}

impl<T: Transport> Poller<T> {
    /// A poller without lanes. `space` is the device's.
    ///
    /// # Errors
    /// When there is no memory for bounce buffers; the queue pair is lost then (its memory is leaked, and says so).
    pub fn new(queue: QueuePair<T>, space: &Arc<DmaSpace>) -> Result<Poller<T>, DmaError> {
        let idle = CommandContext::Part {
            lane: 0,
            head: HeadIndex::default(),
            bounce: None,
        };
        let commands = Box::new([idle; MAX_ENTRIES as usize]);
        let bounce = BouncePool::new(space, max_segments(MAX_QUEUE_SIZE))?;
        let health: Arc<PairHealth> = Arc::default();
        Ok(Poller {
            pair: Pair {
                queue,
                commands,
                bounce,
                aborts: Aborts::default(),
                health: Arc::clone(&health),
            },
            lanes: Vec::with_capacity(64),
            lane_count: 0,
            draining: 0,
            turns: 1,
            until_show: 1,
            busy_turns: 0,
            counted: [0; 3],
            service: Service::Serve,
            sample: None,
            until_sample: 1,
            era: Instant::now(),
            health,
        })
    }

    /// The queue pair, for its controller to delete.
    #[must_use]
    pub fn into_queue_pair(self) -> QueuePair<T> {
        self.pair.queue
    }

    /// The queue pair, for its controller to create anew.
    pub fn queue_pair(&mut self) -> &mut QueuePair<T> {
        &mut self.pair.queue
    }

    /// The device is there (again) and knows the queue pair: what was outstanding is carried out again. With
    /// `cache_lost`, writes that were completed and not flushed may be gone: the flushes under way and the next one of
    /// each guest say so (I11).
    pub fn resume(&mut self, cache_lost: bool) {
        if cache_lost {
            self.doubt_flushes();
        }
        self.service = Service::Serve;
        self.pair.queue.replay();
        self.show_counters();
    }

    fn doubt_flushes(&mut self) {
        self.lanes
            .iter_mut()
            .flatten()
            .for_each(|lane| lane.cache_was_lost());
        for cid in self.pair.queue.outstanding_cids() {
            let sent = self.pair.queue.sent(cid);
            if sent.is_none_or(|entry| entry.opcode != io_opcode::FLUSH) {
                continue;
            }
            // A flush is always a part of its request.
            if let CommandContext::Part { lane, head, .. } = self.pair.commands[cid.index()]
                && let Some(Some(lane)) = self.lanes.get_mut(usize::from(lane))
            {
                lane.doubt_flush(head);
            }
        }
    }

    /// Ends an outstanding command that no device will complete.
    #[cold]
    fn give_up(&mut self, cid: Cid) {
        if self.pair.queue.abandon(cid) {
            self.complete(Completion {
                cid,
                status: Status::ABORTED_POWER_LOSS,
            });
        }
    }

    /// Ends every command of the lanes that `which` chooses, and what they had not sent yet.
    fn give_up_lanes(&mut self, which: impl Fn(&Lane) -> bool) {
        let chosen = |lanes: &[Option<Lane>], slot: u16| {
            let lane = lanes.get(usize::from(slot)).and_then(Option::as_ref);
            lane.is_some_and(&which)
        };
        for cid in (0..self.pair.queue.depth()).map(Cid) {
            let slot = match *self.pair.context(cid) {
                CommandContext::Whole { lane, .. } | CommandContext::Part { lane, .. } => lane,
            };
            if chosen(&self.lanes, slot) {
                self.give_up(cid);
            }
        }
        for lane in self.lanes.iter_mut().flatten().filter(|lane| which(lane)) {
            lane.give_up_work();
            lane.publish();
        }
    }

    /// A turn while there is no device.
    #[cold]
    fn turn_without_device(&mut self) -> bool {
        let mut busy = false;
        let fail = self.service == Service::Fail;
        for lane in self.lanes.iter_mut().flatten() {
            if lane.do_without(fail) {
                busy = true;
                lane.publish();
            }
        }
        if !fail && self.draining > 0 {
            self.give_up_lanes(Lane::is_draining);
        }
        if self.turns.is_multiple_of(PUBLISH_INTERVAL.into()) {
            self.count_turns();
        }
        self.busy_turns = self.busy_turns.wrapping_add(busy.into());
        busy
    }

    /// A turn that has more to do than to look for work: every so many, and each while there is no device.
    #[cold]
    fn rare_turn(&mut self) -> bool {
        if let Some(sample) = self.sample.take() {
            return self.follow(sample);
        }
        let serves = self.service == Service::Serve;
        self.until_show = if serves { PUBLISH_INTERVAL } else { 1 };
        self.turns = self.turns.wrapping_add(self.until_show.into());
        if !serves {
            return self.turn_without_device();
        }
        self.pair.look_at_aborts();
        self.show_all();
        self.until_sample = self.until_sample.saturating_sub(1);
        let mut lanes = self.lanes.iter().flatten();
        if self.until_sample == 0 && lanes.any(|lane| lane.wants()) {
            return self.sampled_turn();
        }
        self.pair.queue.service();
        self.busy_turn()
    }

    /// [`Poller::busy_turn`], of whose requests the first is timed.
    #[cold]
    fn sampled_turn(&mut self) -> bool {
        self.pair.queue.service();
        let mut busy = self.collect();
        let mut before = [0_u64; MAX_ENTRIES as usize / 64];
        for cid in self.pair.queue.outstanding_cids() {
            before[cid.index() / 64] |= 1 << (cid.index() % 64);
        }
        let seen = Instant::now();
        for lane in self.lanes.iter_mut().flatten() {
            busy |= lane.fetch(&mut self.pair);
        }
        if busy {
            self.pair.queue.ring();
            let rung = Instant::now();
            let is_new = |cid: &Cid| before[cid.index() / 64] >> (cid.index() % 64) & 1 == 0;
            let new = self.pair.queue.outstanding_cids().find(is_new);
            for lane in self.lanes.iter_mut().flatten() {
                lane.publish();
            }
            if let Some(cid) = new {
                let (CommandContext::Whole { lane, .. } | CommandContext::Part { lane, .. }) =
                    *self.pair.context(cid);
                self.until_sample = SAMPLE_INTERVAL;
                self.sample = Some(Sample {
                    cid,
                    lane,
                    seen,
                    rung,
                    patience: SAMPLE_PATIENCE,
                });
                self.hurry();
            }
        }
        self.busy_turns = self.busy_turns.wrapping_add(busy.into());
        busy
    }

    /// A turn while a timed request is at the device.
    #[cold]
    fn follow(&mut self, mut sample: Sample) -> bool {
        self.until_show = PUBLISH_INTERVAL;
        self.turns = self.turns.wrapping_add(PUBLISH_INTERVAL.into());
        self.pair.queue.service();
        let (mut busy, mut completed) = (false, None);
        for _ in 0..POLL_BUDGET {
            let Some(completion) = self.pair.queue.poll() else {
                break;
            };
            if completion.cid == sample.cid && completed.is_none() {
                completed = Some(Instant::now());
            }
            busy = true;
            self.complete(completion);
        }
        for lane in self.lanes.iter_mut().flatten() {
            busy |= lane.fetch(&mut self.pair);
        }
        if busy {
            self.pair.queue.ring();
        }
        for (place, lane) in self.lanes.iter_mut().enumerate() {
            let Some(lane) = lane.as_mut().filter(|_| busy) else {
                continue;
            };
            let Some(completed) = completed.filter(|_| place == usize::from(sample.lane)) else {
                lane.publish();
                continue;
            };
            let (used, signalled) = lane.publish_timed();
            let stages = lane.stages();
            stages.record(Stage::Submit, sample.rung.duration_since(sample.seen));
            stages.record(Stage::Device, completed.duration_since(sample.rung));
            stages.record(Stage::Used, used.duration_since(completed));
            if let Some(signalled) = signalled {
                stages.record(Stage::Signal, signalled.duration_since(used));
            }
        }
        sample.patience -= 1;
        if completed.is_none() && sample.patience > 0 {
            self.sample = Some(sample);
            self.hurry();
            if self.turns.is_multiple_of(PUBLISH_INTERVAL.into()) {
                self.show_all();
            }
        }
        self.busy_turns = self.busy_turns.wrapping_add(busy.into());
        busy
    }

    /// The rest of a turn with something to do, or with other lanes than a block device's single one.
    #[inline(never)]
    fn closer_look(&mut self) -> bool {
        self.lanes.iter().flatten().any(Lane::wants) && self.busy_turn()
    }

    /// The next turn is to look at [`Poller::service`] again.
    fn hurry(&mut self) {
        self.turns = self
            .turns
            .wrapping_sub(self.until_show.into())
            .wrapping_add(1);
        self.until_show = 1;
    }

    /// A turn with something to do: what has completed, then what the lanes have for the device, one doorbell, and at most
    /// one signal for each guest.
    #[inline(never)]
    fn busy_turn(&mut self) -> bool {
        let completed = self.collect();
        let mut busy = completed;
        for lane in self.lanes.iter_mut().flatten() {
            // A guest sees it while its next requests are taken; the signal, which may take a system call, waits for the
            // doorbell.
            if completed {
                lane.publish_used();
            }
            busy |= lane.fetch(&mut self.pair);
        }
        if busy {
            self.pair.queue.ring();
            for lane in self.lanes.iter_mut().flatten() {
                lane.publish_turn();
            }
        }
        self.busy_turns = self.busy_turns.wrapping_add(busy.into());
        busy
    }

    /// Tells the lanes of the turns since the last time, and shows their counters to others. A turn has no time for it.
    fn count_turns(&mut self) {
        let now = [
            self.turns.wrapping_sub(self.until_show.into()),
            self.busy_turns,
            self.pair.queue.counters().cq_doorbells,
        ];
        let [turns, busy, heads] = [0, 1, 2].map(|i| now[i].wrapping_sub(self.counted[i]));
        self.counted = now;
        // The completion queue is everybody's: its doorbells are told to the first.
        if let Some(lane) = self.lanes.iter_mut().flatten().next() {
            lane.counters_mut().cq_doorbells += heads;
        }
        for lane in self.lanes.iter_mut().flatten() {
            let counters = lane.counters_mut();
            counters.polls += turns;
            // No more are busy than there are, whenever it is counted.
            counters.idle_polls += turns.saturating_sub(busy);
            lane.publish_counters();
        }
    }

    /// Shows others how the lanes and the queue pair are.
    #[cold]
    fn show_all(&mut self) {
        self.count_turns();
        if self.era.elapsed() < ERA {
            return;
        }
        self.era = Instant::now();
        self.pair.queue.next_era();
        let (cid, eras) = self.pair.queue.oldest().unwrap_or((Cid(0), 0));
        let millis = u64::from(eras) * u64::try_from(ERA.as_millis()).unwrap_or(0);
        let oldest = u64::from(cid.0) << 48 | millis;
        self.health.oldest.store(oldest, Ordering::Relaxed);
        self.show_counters();
    }

    fn show_counters(&self) {
        let counters = self.pair.queue.counters();
        let anomalies = &self.health.anomalies;
        anomalies.store(counters.anomalies, Ordering::Relaxed);
        self.health.resent.store(counters.resent, Ordering::Relaxed);
    }

    /// Takes what has completed. `true` when anything had.
    #[inline(always)]
    fn collect(&mut self) -> bool {
        let mut left = POLL_BUDGET;
        while left > 0
            && let Some(completion) = self.pair.queue.poll()
        {
            left = left.wrapping_sub(1);
            self.complete(completion);
        }
        left < POLL_BUDGET
    }

    // Always: a second caller, however cold, would cost each request a call.
    #[inline(always)]
    fn complete(&mut self, completion: Completion) {
        if completion.status.is_success() {
            self.succeed(completion.cid);
        } else {
            self.fail(completion);
        }
    }

    /// A command has completed well. Its lane is here: it does not leave before its last command has completed.
    #[inline(always)]
    fn succeed(&mut self, cid: Cid) {
        match *self.pair.context(cid) {
            CommandContext::Whole {
                lane,
                head,
                data_in,
                answer,
            } => match self.lanes.get_mut(usize::from(lane)) {
                Some(Some(Lane(Kind::Blk(lane)))) => lane.request_done(head, answer, data_in),
                _ => self.exchange_done(cid),
            },
            CommandContext::Part { .. } => self.part_done(cid),
        }
    }

    /// A command that was all of a SCSI request has completed.
    // Apart, as all that is for SCSI hosts (see `Kind`), and with what is at hand.
    #[inline(never)]
    fn exchange_done(&mut self, cid: Cid) {
        if let CommandContext::Whole {
            lane,
            head,
            data_in,
            answer,
        } = *self.pair.context(cid)
            && let Some(Some(Lane(Kind::Scsi(lane)))) = self.lanes.get_mut(usize::from(lane))
        {
            lane.request_done(head, answer, data_in);
        }
    }

    /// A command that was a part of a request has completed.
    #[inline(never)]
    fn part_done(&mut self, cid: Cid) {
        let CommandContext::Part { lane, head, bounce } = *self.pair.context(cid) else {
            return;
        };
        if self.pair.aborts.any() {
            self.pair.was_to_be_aborted(cid);
        }
        let differs = bounce.and_then(|chunk| {
            let differs = self.pair.bounce.settle(chunk);
            self.pair.bounce.release(chunk);
            differs
        });
        let failure = differs.map(|_| Failure {
            status: Status::COMPARE_FAILURE,
            differs,
            blocks: None,
        });
        if let Some(Some(lane)) = self.lanes.get_mut(usize::from(lane)) {
            lane.command_done(head, failure);
        }
    }

    /// A command has failed.
    #[cold]
    #[inline(never)]
    fn fail(&mut self, Completion { cid, status }: Completion) {
        let sent = self.pair.queue.sent(cid);
        // The device does not say which block of them it was.
        let failure = Failure {
            status,
            differs: None,
            blocks: sent.as_ref().and_then(blocks_of),
        };
        let context = *self.pair.context(cid);
        if let CommandContext::Part { bounce, .. } = context {
            if self.pair.aborts.any() {
                self.pair.was_to_be_aborted(cid);
            }
            if let Some(chunk) = bounce {
                self.pair.bounce.release(chunk);
            }
        }
        let (CommandContext::Whole { lane, head, .. } | CommandContext::Part { lane, head, .. }) =
            context;
        let Some(Some(lane)) = self.lanes.get_mut(usize::from(lane)) else {
            return;
        };
        match (context, lane) {
            (
                CommandContext::Whole {
                    answer, data_in, ..
                },
                Lane(Kind::Blk(lane)),
            ) => lane.request_failed(head, answer, data_in),
            (CommandContext::Whole { answer, .. }, Lane(Kind::Scsi(lane))) => {
                lane.request_failed(head, answer, sent, failure);
            }
            (_, lane) => lane.command_done(head, Some(failure)),
        }
    }
}

/// The blocks that a command was about, if it was one range.
fn blocks_of(sent: &SubmissionEntry) -> Option<LbaRange> {
    match sent.opcode {
        io_opcode::READ | io_opcode::WRITE | io_opcode::WRITE_ZEROES => Some(sent.lba_range()),
        _ => None,
    }
}

impl<T: Transport + 'static> Poll for Poller<T> {
    // Short, so that a turn which finds nothing costs little: the rest is elsewhere.
    fn turn(&mut self) -> bool {
        self.until_show = self.until_show.wrapping_sub(1);
        if self.until_show == 0 {
            return self.rare_turn();
        }
        self.pair.queue.service();
        if self.pair.queue.has_completion() {
            return self.busy_turn();
        }
        // One virtqueue to a queue pair is the rule.
        match &self.lanes[..] {
            [Some(Lane(Kind::Blk(lane)))] if lane.is_quiet() => false,
            _ => self.closer_look(),
        }
    }

    fn attach(&mut self, mut lane: Lane) {
        let place = self
            .lanes
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.lanes.push(None);
                self.lanes.len() - 1
            });
        // A process has far fewer than 65536 lanes on one queue pair: each needs two descriptors of its own.
        lane.set_slot(u16::try_from(place).unwrap_or(u16::MAX));
        // Turns before it came are not its own.
        self.count_turns();
        lane.publish();
        self.lanes[place] = Some(lane);
        self.lane_count += 1;
    }

    fn detach(&mut self, id: LaneId) -> bool {
        let found = self.lanes.iter_mut().flatten().find(|lane| lane.id() == id);
        if let Some(lane) = found {
            lane.drain();
            self.draining += 1;
            return true;
        }
        false
    }

    #[inline]
    fn take_drained(&mut self) -> Option<Lane> {
        if self.draining == 0 {
            return None;
        }
        let drained = |lane: &Option<Lane>| lane.as_ref().is_some_and(Lane::is_drained);
        let place = self.lanes.iter().position(drained)?;
        self.count_turns();
        let mut lane = self.lanes[place].take()?;
        self.draining -= 1;
        self.lane_count -= 1;
        lane.leave();
        Some(lane)
    }

    fn lanes(&self) -> usize {
        self.lane_count
    }

    fn health(&self) -> Arc<PairHealth> {
        Arc::clone(&self.health)
    }

    fn load(&self) -> Load {
        Load {
            submitted: self.pair.queue.counters().commands,
            outstanding: self.pair.queue.outstanding(),
        }
    }

    #[cold]
    fn arm(&mut self) -> Armed {
        let mut armed = match self.service {
            Service::Serve => self.pair.queue.request_interrupt(),
            Service::Fail => Armed::Yes,
            // Nothing is taken from the rings. A lane that is asked back has its requests failed in the next turn.
            Service::Hold if self.draining > 0 => return Armed::Pending,
            Service::Hold => return Armed::Yes,
        };
        // With no room at the device nothing new is taken before a completion.
        if armed == Armed::Pending || self.pair.queue.room() == 0 {
            return armed;
        }
        for lane in self.lanes.iter_mut().flatten() {
            armed = match (armed, lane.arm()) {
                (_, Armed::Pending) => return Armed::Pending,
                (Armed::Yes, Armed::Yes) => Armed::Yes,
                _ => Armed::Never,
            };
        }
        armed
    }

    #[cold]
    fn disarm(&mut self) {
        self.pair.queue.suppress_interrupt();
        for lane in self.lanes.iter_mut().flatten() {
            lane.disarm();
        }
    }

    fn wakers(&self, each: &mut dyn FnMut(Waker<'_>)) {
        let interrupt = self.pair.queue.interrupt().map(Waker::Interrupt);
        let lanes = self.lanes.iter().flatten();
        let kicks = lanes.flat_map(|lane| lane.wakers().map(Waker::Kick));
        interrupt.into_iter().chain(kicks).for_each(each);
    }

    fn replace_kick(&mut self, id: LaneId, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        let found = self.lanes.iter_mut().flatten().find(|lane| lane.id() == id);
        found.and_then(|lane| lane.replace_kick(kick))
    }

    #[cold]
    fn resize(&mut self, id: LaneId, blocks: u64) {
        let found = self.lanes.iter_mut().flatten().find(|lane| lane.id() == id);
        if let Some(lane) = found {
            lane.resize(blocks);
        }
    }

    fn show(&mut self) {
        self.show_all();
    }

    #[cold]
    fn settle(&mut self, deadline: Duration) -> bool {
        let start = Instant::now();
        while self.pair.queue.outstanding() > 0 && start.elapsed() < deadline {
            self.pair.queue.service();
            if self.collect() {
                self.lanes
                    .iter_mut()
                    .flatten()
                    .for_each(|lane| lane.publish());
            }
        }
        self.pair.queue.outstanding() == 0
    }

    fn suspend(&mut self, service: Service) {
        self.pair.queue.disconnect();
        self.pair.forget_aborts();
        self.sample = None;
        self.service = service;
        self.hurry();
        self.health.oldest.store(0, Ordering::Relaxed);
        self.lanes.iter_mut().flatten().for_each(Lane::publish);
        if service == Service::Fail {
            self.give_up_lanes(|_| true);
        }
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }

    fn as_any(&mut self) -> &mut dyn Any {
        self
    }
}
