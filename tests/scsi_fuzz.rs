//! Any commands in any order, from several initiators of one disk: CDBs of the table with bits flipped and wild ones,
//! parameter lists, allocation lengths, addresses, losses of nexuses, resets, a keeper that fails. Each outcome is judged by
//! what holds for all of SCSI; which commands and bits there are is asked of the logical units themselves.
//!
//! A story is a list of steps that comes of a seed. One that fails is told to the end: its seed, and the shortest list that
//! proptest finds to fail in its place. `TANDEM_FUZZ_SEED=N` begins with another seed, and `TANDEM_FUZZ=SECONDS` goes on for
//! longer. No coverage steers it; that every command of the table succeeds somewhere in the short run is a test.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "scsi_fuzz/judge.rs"]
mod judge;
#[path = "scsi_fuzz/steps.rs"]
mod steps;

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::{RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use tandem::block::{BlockCount, BlockOp, BlockRange, Geometry, Lba, RangeList};
use tandem::scsi::command::COMMANDS;
use tandem::scsi::reservations::Reservations;
use tandem::scsi::{
    Action, Address, Carry, Cdb, DataIn, Exchange, Initiator, Keep, LogicalUnit, Lun,
    MAX_PARAMETER_BYTES, Nexus, Sense, Target, UnitIds,
};

use judge::{Supported, Verdict};
use steps::{Call, Step};

const BLOCKS: u64 = 0x1_2345;
const PORTS: usize = 3;
/// Of the run that belongs to the tests.
const STORIES: u64 = 1500;

/// The target has a thin disk at LUN 0, and one at LUN 300 that is read-only, has 4 KiB blocks and cannot unmap.
const TARGET: u8 = 3;
const UNITS: [Address; 2] = [place(0), place(300)];

const fn place(lun: u16) -> Address {
    Address::Unit {
        target: TARGET,
        lun: Lun::new(lun),
    }
}

/// How a command ended.
#[derive(Clone, Debug)]
struct Outcome {
    action: Action,
    data: Vec<u8>,
    ranges: Vec<BlockRange>,
    /// What it was before it was settled.
    deferred: bool,
}

/// An initiator.
struct Port {
    target: Arc<Target>,
    nexus: Nexus,
    buffer: Vec<u8>,
    ranges: RangeList,
}

impl Port {
    fn new(name: &str, disks: &[LogicalUnit; 2]) -> Port {
        let [first, second] = disks;
        let lun = |number| Lun::new(number).unwrap();
        let units = vec![
            (TARGET, lun(0), first.clone()),
            (TARGET, lun(300), second.clone()),
        ];
        let target = Target::new(&Initiator::new(name).unwrap(), units).unwrap();
        let target = Arc::new(target);
        Port {
            // More than a target says that any answer needs, to see that none has more.
            buffer: vec![0xee; target.data_in_bytes() + 4096],
            nexus: Nexus::new(Arc::clone(&target)),
            target,
            ranges: RangeList::new(),
        }
    }

    /// As the data path does it: the parameter list is as long as the command wants it. `None` if that is longer than any
    /// that is taken from an initiator.
    fn run(&mut self, address: Address, cdb: &[u8], list: &[u8]) -> Option<(Outcome, usize)> {
        let cdb = Cdb::new(cdb);
        let unit = self.nexus.find(address);
        let wanted = self.nexus.parameter_bytes(unit, &cdb) as usize;
        if wanted > MAX_PARAMETER_BYTES {
            return None;
        }
        let mut list = list.to_vec();
        list.resize(wanted, 0);
        let mut exchange = Exchange {
            cdb: &cdb,
            parameters: &list,
            data_in: DataIn::new(&mut self.buffer),
            ranges: &mut self.ranges,
        };
        let mut action = self.nexus.execute(address, unit, &mut exchange);
        let data = exchange.data_in.as_slice().to_vec();
        let deferred = action == Action::Defer;
        if let (true, Some(unit)) = (deferred, unit) {
            let settlement = self.nexus.settle(unit, &cdb, &list);
            assert!(settlement.is_over(), "nobody has commands under way");
            action = settlement.action();
        }
        let ranges = self.ranges.as_slice().to_vec();
        let outcome = Outcome {
            action,
            data,
            ranges,
            deferred,
        };
        Some((outcome, wanted))
    }

    /// The same, unit attentions passed over.
    fn asks(&mut self, address: Address, cdb: &[u8]) -> Outcome {
        loop {
            let outcome = self.run(address, cdb, &[]).unwrap().0;
            match outcome.action {
                Action::Check(sense) if sense.key == 6 => {}
                _ => return outcome,
            }
        }
    }
}

/// Keeps nothing, or says that it cannot.
#[derive(Clone, Debug, Default)]
struct Shelf(Arc<AtomicBool>);

impl Keep for Shelf {
    fn keep(&self, _: &Reservations) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(io::Error::other("no space left")),
            false => Ok(()),
        }
    }
}

/// What is reserved of a disk: registrations, reservation, full status. Nothing while RESERVE of SPC-2 is in force.
type Reserved = Option<[Vec<u8>; 3]>;

struct World {
    shelf: Shelf,
    ports: Vec<Port>,
    /// An initiator that only looks.
    observer: Port,
    /// Of each disk.
    reserved: [Reserved; 2],
}

impl World {
    fn new() -> World {
        let shelf = Shelf::default();
        let disk = |shift, read_only, thin| {
            LogicalUnit::new(Geometry::new(shift, BLOCKS, read_only).unwrap(), "serial-1")
                .with_ids(UnitIds {
                    nguid: Some([0xa1; 16]),
                    ..UnitIds::default()
                })
                .with_volatile_cache(thin)
                .with_provisioning(thin, thin, thin)
                .with_copy(64)
        };
        let first = disk(9, false, true);
        let first = first.with_keeper(Box::new(shelf.clone()), Reservations::default());
        let disks = [first, disk(12, true, false)];
        let mut world = World {
            shelf,
            ports: (0..PORTS)
                .map(|i| Port::new(&format!("vm{i}"), &disks))
                .collect(),
            observer: Port::new("observer", &disks),
            reserved: [None, None],
        };
        world.reserved = world.look();
        world
    }

    fn look(&mut self) -> [Reserved; 2] {
        UNITS.map(|unit| self.look_at(unit))
    }

    fn look_at(&mut self, unit: Address) -> Reserved {
        let mut all: [Vec<u8>; 3] = Default::default();
        for (said, action) in all.iter_mut().zip([0, 1, 3]) {
            let cdb = [0x5e, action, 0, 0, 0, 0, 0, 0xff, 0xff, 0];
            let outcome = self.observer.asks(unit, &cdb);
            match outcome.action {
                Action::Conflict => return None,
                action => assert_eq!(action, Action::Good),
            }
            *said = outcome.data;
        }
        Some(all)
    }

    fn take(&mut self, step: &Step, supported: &Supported, met: &mut Met) -> Verdict {
        let mut may_change = true;
        match step {
            Step::Command(call) => {
                self.shelf.0.store(call.keeper_fails, Ordering::Relaxed);
                let port = &mut self.ports[call.port];
                let Some((outcome, wanted)) = port.run(call.address, &call.cdb, &call.list) else {
                    return Ok(());
                };
                let most = port.target.data_in_bytes();
                judge::command(supported, call, wanted, most, &outcome)?;
                met.note(call, &outcome);
                may_change = outcome.deferred && outcome.action == Action::Good;
                if outcome.action == Action::Conflict && call.cdb[0] != 0x5f {
                    let at = UNITS.iter().position(|unit| *unit == call.address);
                    let reserved = at.and_then(|at| self.reserved[at].as_ref());
                    let free = reserved.is_some_and(|[keys, ..]| keys.len() <= 8);
                    judge::ensure(!free, "a conflict although nothing is reserved")?;
                }
            }
            Step::Comes(port) => {
                let port = &mut self.ports[*port];
                port.nexus.end();
                port.nexus = Nexus::new(Arc::clone(&port.target));
            }
            Step::ResetUnit(port, unit) => {
                let done = self.ports[*port].nexus.reset_unit(*unit);
                judge::ensure(done, "nobody keeps it from being reset")?;
            }
            Step::ResetTarget(port, address) => {
                let done = self.ports[*port].nexus.reset_target(*address);
                judge::ensure(done, "nobody keeps it from being reset")?;
            }
        }
        let reserved = self.look();
        let same = reserved == self.reserved;
        judge::ensure(
            same || may_change,
            "reservations changed without a command that changes them",
        )?;
        for reserved in &reserved {
            judge::reservations(reserved.as_ref())?;
        }
        self.reserved = reserved;
        Ok(())
    }
}

/// What has been seen.
#[derive(Debug, Default)]
struct Met {
    commands: u64,
    /// Operation code and service action of those that did not fail.
    succeeded: BTreeSet<(u8, u8)>,
    /// Codes and qualifiers.
    senses: BTreeSet<(u8, u8, u8)>,
    conflicts: u64,
}

impl Met {
    fn note(&mut self, call: &Call, outcome: &Outcome) {
        self.commands += 1;
        match outcome.action {
            Action::Good | Action::Carry(_) => {
                self.succeeded.insert((call.cdb[0], call.cdb[1] & 0x1f));
            }
            Action::Check(sense) => {
                self.senses.insert((sense.key, sense.asc, sense.ascq));
            }
            Action::Conflict => self.conflicts += 1,
            Action::Busy | Action::Defer => {}
        }
    }
}

/// The story of a seed, from its beginning.
fn tell(seed: u64, supported: &Supported, met: &RefCell<Met>) {
    let config = ProptestConfig {
        cases: 1,
        failure_persistence: None,
        max_shrink_iters: 100_000,
        max_shrink_time: 30_000,
        ..ProptestConfig::default()
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(config, rng);
    let result = runner.run(&steps::story(), |story| {
        let mut world = World::new();
        for step in &story {
            let verdict = world.take(step, supported, &mut met.borrow_mut());
            verdict.map_err(TestCaseError::fail)?;
        }
        Ok(())
    });
    match result {
        Ok(()) => {}
        Err(TestError::Fail(reason, story)) => {
            panic!("TANDEM_FUZZ_SEED={seed}: {reason}\nthe last of these steps: {story:02x?}")
        }
        Err(TestError::Abort(reason)) => panic!("TANDEM_FUZZ_SEED={seed}: {reason}"),
    }
}

fn number(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name}={value}")))
}

#[test]
fn any_commands_in_any_order_keep_what_scsi_promises() {
    let supported = Supported::ask(&mut World::new());
    let met = RefCell::new(Met::default());
    let (first, start) = (number("TANDEM_FUZZ_SEED").unwrap_or(0), Instant::now());
    let seconds = number("TANDEM_FUZZ").map(Duration::from_secs);
    let mut stories = 0;
    while seconds.map_or(stories < STORIES, |seconds| start.elapsed() < seconds) {
        tell(first + stories, &supported, &met);
        stories += 1;
    }
    let met = met.into_inner();
    let last = first + stories.saturating_sub(1);
    println!(
        "seeds {first} to {last}: {} commands, {} conflicts, sense {:02x?}",
        met.commands, met.conflicts, met.senses
    );
    if stories < STORIES {
        return;
    }
    // Where nothing succeeds, nothing is tried.
    for command in COMMANDS {
        let action = command.service_action;
        let mut succeeded = met.succeeded.iter();
        let found = succeeded.any(|(opcode, own)| {
            *opcode == command.opcode && action.is_none_or(|action| action == *own)
        });
        assert!(
            found,
            "{:02x} {action:02x?} never succeeded",
            command.opcode
        );
    }
    assert!(met.conflicts > 0);
}

/// A judge that lets everything pass is none.
#[test]
fn wrong_outcomes_are_noticed() {
    let supported = Supported::ask(&mut World::new());
    let judge = |unit: usize, cdb: &[u8], action, data: usize| {
        let call = Call {
            port: 0,
            address: UNITS[unit],
            cdb: cdb.to_vec(),
            list: Vec::new(),
            keeper_fails: false,
        };
        let outcome = Outcome {
            action,
            data: vec![0; data],
            ranges: Vec::new(),
            deferred: false,
        };
        judge::command(&supported, &call, 0, 4096, &outcome)
    };
    let read = |lba, count, data_in| {
        let range = BlockRange::new(Lba::new(lba), BlockCount::new(count));
        Action::Carry(Carry {
            op: BlockOp::Read(range),
            unit: 0,
            fua: false,
            data_in,
            data_out: 0,
        })
    };
    let cdb = [0x28, 0, 0, 1, 0x23, 0x44, 0, 0, 1, 0];
    judge(0, &cdb, read(BLOCKS - 1, 1, 512), 0).unwrap();
    for wrong in [
        // Behind the end; another size; another unit; data of its own.
        judge(0, &cdb, read(BLOCKS, 1, 512), 0),
        judge(0, &cdb, read(u64::MAX, 1, 512), 0),
        judge(0, &cdb, read(BLOCKS - 1, 1, 1024), 0),
        judge(1, &cdb, read(BLOCKS - 1, 1, 4096), 0),
        judge(0, &cdb, Action::Check(Sense::OUT_OF_RANGE), 1),
        // More than there is room for.
        judge(0, &[0x12, 0, 0, 0, 5, 0], Action::Good, 6),
        // A bit that does not count, and a pointer to another one and to one that is as it should be.
        judge(0, &[0, 0, 0, 0, 0, 1], Action::Good, 0),
        judge(
            0,
            &[0, 0, 0, 0, 0, 1],
            Action::Check(Sense::in_cdb(5, 1)),
            0,
        ),
        judge(0, &[0; 6], Action::Check(Sense::in_cdb(2, 0)), 0),
        // What is not there, and what is.
        judge(0, &[0xc0; 6], Action::Good, 0),
        judge(0, &[0; 6], Action::Check(Sense::INVALID_OPCODE), 0),
        judge(0, &[0x9e; 16], Action::Check(Sense::INVALID_OPCODE), 0),
        judge(0, &cdb[..9], read(BLOCKS - 1, 1, 512), 0),
        // The thick disk has no UNMAP.
        judge(1, &[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], Action::Good, 0),
    ] {
        wrong.unwrap_err();
    }
}
