//! A queue pair and its controller on two threads, under loom: every order of accesses that the memory model allows.
//! `scripts/loom-rings` runs them, and expects each canary to make one fail.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};

use loom::sync::atomic::{AtomicBool, AtomicU32};
use loom::sync::{Condvar, Mutex};
use loom::thread;

use super::{Domain, PortOnly, queue_pair};
use crate::dma::{DmaAccess, DmaBuffer, Iova};
use crate::mmio::{AtomicU64, fence, reads, shadow, writes};
use crate::queue_pair::{Completion, DataSegment, QueuePair};
use crate::spec::{LbaRange, Nsid, PAGE_SIZE, Status, SubmissionEntry, io_opcode};
use crate::transport::{Armed, QueuePort};

const PAGE: u32 = 4096;
/// The queue pair's identifier.
const SQID: u64 = 1;
/// Three pages a command: PRP1, and a list of two.
const PAGES: u32 = 3;
/// Looks after which a sleeping driver is stuck: each lets it go on until it waits itself.
const MAX_IDLE: u32 = 100;

/// The two doorbell registers. A write to one is a plain store to the bus: what order it has comes from the driver.
#[derive(Debug, Default)]
struct Doorbells {
    sq_tail: AtomicU32,
    cq_head: AtomicU32,
    /// The interrupt's vector is on, its eventfd, and who waits for that.
    armed: AtomicBool,
    eventfd: Mutex<u32>,
    raised: Condvar,
    /// How many completions a driver that sleeps has seen.
    seen: AtomicU32,
}

#[derive(Debug)]
struct Port(Arc<Doorbells>);

impl QueuePort for Port {
    fn ring_sq(&mut self, tail: u16) {
        self.0.sq_tail.store(tail.into(), Relaxed);
    }

    fn ring_cq(&mut self, head: u16) {
        self.0.cq_head.store(head.into(), Relaxed);
    }

    fn arm(&mut self) -> Armed {
        self.0.armed.store(true, Relaxed);
        Armed::Yes
    }

    fn disarm(&mut self) {
        self.0.armed.store(false, Relaxed);
    }
}

/// The driver's side.
struct World {
    queue: QueuePair<PortOnly<Port>>,
    buffers: Vec<DmaBuffer>,
}

/// A queue pair, a data buffer for each command in flight, and its controller. All memory they share is covered.
fn world(entries: u16) -> (World, Controller) {
    shadow::reset();
    let doorbells = Arc::new(Doorbells::default());
    let (domain, space, queue) = queue_pair(Port(Arc::clone(&doorbells)), entries);
    let buffers: Vec<DmaBuffer> = (1..entries)
        .map(|_| DmaBuffer::new(&space, (PAGES * PAGE) as usize, DmaAccess::Both).unwrap())
        .collect();
    let (sq, cq) = queue.ring_addresses();
    for entry in 0..u64::from(entries) {
        shadow::cover_bytes(domain.reach(Iova(sq.0 + 64 * entry), 64), 64);
        let completion = domain.reach(Iova(cq.0 + 16 * entry), 16);
        AtomicU64::cover(completion, 2);
        shadow::cover_bytes(completion, 16);
    }
    for slot in 0..usize::from(entries) - 1 {
        let page = queue.lists.pointer(slot * PAGE_SIZE);
        AtomicU64::cover(page, PAGES as usize - 1);
    }
    for buffer in &buffers {
        for page in 0..PAGES as usize {
            shadow::cover_bytes(buffer.pointer(page * PAGE_SIZE), 8);
        }
    }
    let controller = Controller {
        domain,
        doorbells,
        sq,
        cq,
        entries: entries.into(),
        sq_head: 0,
        cq_tail: 0,
        phase: 1,
    };
    (World { queue, buffers }, controller)
}

/// What a correct controller does, and nothing that it need not do.
struct Controller {
    domain: Arc<Domain>,
    doorbells: Arc<Doorbells>,
    sq: Iova,
    cq: Iova,
    entries: u32,
    sq_head: u32,
    cq_tail: u32,
    phase: u64,
}

impl Controller {
    /// Carries out `count` commands. Those to odd blocks are writes and carry `data(block)`; reads get it.
    fn run(mut self, count: u64) {
        self.carry_out(0, count);
    }

    fn carry_out(&mut self, mut done: u64, count: u64) {
        while done < count {
            // Acquire pairs with the barrier before the driver's doorbell.
            let tail = self.doorbells.sq_tail.load(Acquire);
            while self.sq_head != tail {
                done += 1;
                let at = Iova(self.sq.0 + 64 * u64::from(self.sq_head));
                let entry: SubmissionEntry = self.copy_in(at);
                self.sq_head = (self.sq_head + 1) % self.entries;
                assert_eq!(entry.lba_range().slba, done, "another command");
                self.transfer(&entry, done);
                self.complete(&entry, done);
            }
            if done < count {
                thread::yield_now();
            }
        }
    }

    /// The same for a driver that sleeps: each command is followed by its completion being seen.
    fn run_for_sleeper(self, rounds: &[&[u64]]) {
        let doorbells = Arc::clone(&self.doorbells);
        let (mut controller, mut count) = (self, 0);
        for blocks in rounds {
            let first = count;
            count += blocks.len() as u64;
            controller.carry_out(first, count);
            let mut idle = 0;
            while u64::from(doorbells.seen.load(Relaxed)) < count {
                idle += 1;
                assert!(
                    idle < MAX_IDLE,
                    "the driver sees nothing: it sleeps, and its interrupt got lost"
                );
                thread::yield_now();
            }
        }
    }

    fn copy_in<V: Copy>(&self, iova: Iova) -> V {
        let from = self.domain.reach(iova, size_of::<V>() as u64);
        reads(from.as_ptr(), size_of::<V>());
        // SAFETY: mapped (`reach`), handed over by the driver (or loom has just found that it was not).
        unsafe { from.cast::<V>().read_unaligned() }
    }

    fn transfer(&self, entry: &SubmissionEntry, block: u64) {
        let list = self
            .domain
            .reach(Iova(entry.prp2.get()), 16)
            .cast::<AtomicU64>();
        // SAFETY: two entries of a list page, mapped (`reach`).
        let listed = [0, 1].map(|i| unsafe { list.add(i).as_ref() }.load(Relaxed));
        for (page, prp) in [entry.prp1.get(), listed[0], listed[1]]
            .into_iter()
            .enumerate()
        {
            let (iova, expected) = (Iova(prp), data(block, page));
            match entry.opcode {
                io_opcode::WRITE => assert_eq!(self.copy_in::<u64>(iova), expected),
                _ => {
                    let to = self.domain.reach(iova, 8);
                    writes(to.as_ptr(), 8);
                    // SAFETY: as in `copy_in`.
                    unsafe { to.cast::<u64>().write(expected) };
                }
            }
        }
    }

    fn complete(&mut self, entry: &SubmissionEntry, block: u64) {
        // Acquire pairs with the barrier before the driver's head doorbell: the entry was copied.
        while (self.cq_tail + 1) % self.entries == self.doorbells.cq_head.load(Acquire) {
            thread::yield_now();
        }
        let at = Iova(self.cq.0 + 16 * u64::from(self.cq_tail));
        let to: NonNull<AtomicU64> = self.domain.reach(at, 16).cast();
        // SAFETY: an entry of the completion queue, mapped (`reach`).
        let (low, high) = unsafe { (to.as_ref(), to.add(1).as_ref()) };
        // The command's number is its status, which is final: no second attempt.
        let status = Status::new(7, u8::try_from(block).unwrap()).with_dnr();
        let status = u64::from(status.to_wire(self.phase == 1));
        writes(to.cast().as_ptr(), 16);
        low.store(block, Relaxed);
        let cid = u64::from(entry.cid.get());
        // Release pairs with `dma_rmb`: the phase tag is the last to be seen.
        high.store(
            u64::from(self.sq_head) | SQID << 16 | cid << 32 | status << 48,
            Release,
        );
        let before = self.cq_tail;
        self.cq_tail += 1;
        if self.cq_tail == self.entries {
            self.cq_tail = 0;
            self.phase ^= 1;
        }
        // It interrupts when the first entry arrives that the driver has not acknowledged, and not for those after it.
        fence(SeqCst);
        let first = self.doorbells.cq_head.load(Relaxed) == before;
        if first && self.doorbells.armed.load(Relaxed) {
            *self.doorbells.eventfd.lock().unwrap() += 1;
            self.doorbells.raised.notify_one();
        }
    }
}

fn data(block: u64, page: usize) -> u64 {
    block * 0x10_0000 + page as u64
}

/// The commands in flight are to consecutive blocks: each has a buffer of its own.
fn buffer_of(block: u64, buffers: usize) -> usize {
    usize::try_from(block).unwrap() % buffers
}

/// Submits a command to `block` and rings.
fn submit(world: &mut World, block: u64) {
    let count = world.buffers.len();
    let buffer = &mut world.buffers[buffer_of(block, count)];
    let range = LbaRange {
        slba: block,
        blocks: 1,
    };
    let entry = if !block.is_multiple_of(2) {
        for page in 0..PAGES as usize {
            buffer.write(page * PAGE_SIZE, &data(block, page));
        }
        SubmissionEntry::write(Nsid(1), range, false)
    } else {
        SubmissionEntry::read(Nsid(1), range)
    };
    let segment = DataSegment {
        iova: buffer.iova(0),
        len: PAGES * PAGE,
    };
    world
        .queue
        .submit(entry, std::iter::once(segment), PAGES * PAGE)
        .unwrap();
    world.queue.ring();
}

/// Polls for the completion of the command to `block` and looks at what a read brought.
fn finish(world: &mut World, block: u64) {
    let Completion { status, .. } = loop {
        match world.queue.poll() {
            Some(completion) => break completion,
            None => thread::yield_now(),
        }
    };
    assert_eq!(
        u64::from(status.sc()),
        block,
        "another command's completion"
    );
    if block.is_multiple_of(2) {
        for page in 0..PAGES as usize {
            let got: u64 =
                world.buffers[buffer_of(block, world.buffers.len())].read(page * PAGE_SIZE);
            assert_eq!(got, data(block, page));
        }
    }
}

/// The same for a driver that sleeps until it is interrupted.
fn finish_asleep(world: &mut World, doorbells: &Doorbells, block: u64) {
    while !world.queue.has_completion() {
        if world.queue.request_interrupt() != Armed::Pending {
            let mut interrupts = doorbells.eventfd.lock().unwrap();
            while *interrupts == 0 {
                interrupts = doorbells.raised.wait(interrupts).unwrap();
            }
            *interrupts = 0;
        }
        world.queue.suppress_interrupt();
    }
    finish(world, block);
    doorbells.seen.fetch_add(1, Relaxed);
}

fn end(world: World) {
    assert_eq!(world.queue.counters().anomalies, 0);
    world.queue.retire();
}

/// Explores with at most `preemptions` (`LOOM_MAX_PREEMPTIONS` goes before); loads may always see whatever the memory
/// model allows.
fn explore(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.max_threads = 2;
    model.max_branches = 10_000;
    model.preemption_bound = model.preemption_bound.or(Some(preemptions));
    model.check(run);
}

#[test]
fn commands_one_after_the_other_reuse_slots_entries_and_buffers_unharmed() {
    explore(5, || {
        // Two entries: the submission queue wraps with the second command, the phase turns with the third.
        let (mut world, controller) = world(2);
        let device = thread::spawn(move || controller.run(4));
        for block in 1..=4 {
            submit(&mut world, block);
            finish(&mut world, block);
        }
        device.join().unwrap();
        end(world);
    });
}

#[test]
fn commands_in_flight_together_complete_with_their_own_data() {
    explore(5, || {
        let (mut world, controller) = world(3);
        let device = thread::spawn(move || controller.run(4));
        for blocks in [[1, 2], [3, 4]] {
            for block in blocks {
                submit(&mut world, block);
            }
            for block in blocks {
                finish(&mut world, block);
            }
        }
        device.join().unwrap();
        end(world);
    });
}

fn sleeping_driver(entries: u16, rounds: &'static [&'static [u64]]) {
    explore(3, move || {
        let (mut world, controller) = world(entries);
        let doorbells = Arc::clone(&controller.doorbells);
        let device = thread::spawn(move || controller.run_for_sleeper(rounds));
        for blocks in rounds {
            for block in *blocks {
                submit(&mut world, *block);
            }
            for block in *blocks {
                finish_asleep(&mut world, &doorbells, *block);
            }
        }
        device.join().unwrap();
        end(world);
    });
}

#[test]
fn sleeping_driver_misses_no_completion_of_one_command_after_the_other() {
    sleeping_driver(2, &[&[1], &[2]]);
}

#[test]
fn sleeping_driver_misses_no_completion_of_commands_in_flight_together() {
    sleeping_driver(3, &[&[1, 2]]);
}
