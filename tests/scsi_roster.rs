//! A host's logical units as they come and go, without a transport: what its initiator is told, and what those who hold an
//! older nexus go on seeing.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use tandem::block::{Geometry, RangeList};
use tandem::scsi::{
    Action, Address, Cdb, DataIn, Exchange, Initiator, LogicalUnit, Lun, MAX_UNITS, Nexus,
    PlaceError, Roster, ShareError, Target, Tasks,
};

#[derive(Debug)]
struct NoTasks;

impl Tasks for NoTasks {
    fn ask(&self) -> u64 {
        0
    }
    fn have_ended(&self, _number: u64) -> bool {
        true
    }
}

fn lun(number: u16) -> Lun {
    Lun::new(number).unwrap()
}

fn at(target: u8, number: u16) -> Address {
    Address::Unit {
        target,
        lun: Some(lun(number)),
    }
}

fn disk(serial: &str) -> LogicalUnit {
    LogicalUnit::new(Geometry::new(9, 0x1000, false).unwrap(), serial)
}

/// Target 3 with LUNs 0 and 1, and target 5 with LUN 0.
struct Bench {
    roster: Roster,
    units: Vec<LogicalUnit>,
    nexus: Arc<Nexus>,
    _tasks: Arc<dyn Tasks>,
}

impl Bench {
    fn new() -> Bench {
        let units: Vec<LogicalUnit> = ["a", "b", "c"].map(disk).into();
        let places = [(3, lun(0)), (3, lun(1)), (5, lun(0))];
        let shown = places.iter().zip(&units);
        let shown = shown.map(|((target, lun), unit)| (*target, *lun, unit.clone()));
        let initiator = Initiator::new("vm0").unwrap();
        let roster = Roster::new(Target::new(&initiator, shown.collect()).unwrap());
        let tasks: Arc<dyn Tasks> = Arc::new(NoTasks);
        let nexus = roster.connect(&tasks);
        let mut bench = Bench {
            roster,
            units,
            nexus,
            _tasks: tasks,
        };
        for place in [at(3, 0), at(3, 1), at(5, 0)] {
            assert_eq!(bench.told(place), [(6, 0x29, 0)]);
        }
        bench
    }

    /// As a lane does before it takes a command.
    fn keep_up(&mut self) {
        while let Some(next) = self.nexus.successor().map(Arc::clone) {
            self.nexus = next;
        }
    }

    fn run(&mut self, address: Address, cdb: &[u8]) -> (Action, Vec<u8>) {
        self.keep_up();
        let (cdb, mut ranges) = (Cdb::new(cdb), RangeList::new());
        let mut buffer = vec![0; self.nexus.target().data_in_bytes()];
        let unit = self.nexus.find(address);
        let mut exchange = Exchange {
            cdb: &cdb,
            parameters: &[],
            data_in: DataIn::new(&mut buffer),
            ranges: &mut ranges,
        };
        let action = self.nexus.execute(address, unit, &mut exchange);
        (action, exchange.data_in.as_slice().to_vec())
    }

    /// Key, code and qualifier of all that TEST UNIT READY is refused for before it is not.
    fn told(&mut self, address: Address) -> Vec<(u8, u8, u8)> {
        let mut codes = Vec::new();
        while codes.len() < 8 {
            match self.run(address, &[0; 6]).0 {
                Action::Check(sense) => codes.push((sense.key, sense.asc, sense.ascq)),
                other => {
                    assert_eq!(other, Action::Good);
                    break;
                }
            }
        }
        codes
    }

    /// What REPORT LUNS says, without its header.
    fn luns(&mut self, address: Address) -> Vec<u8> {
        let (action, data) = self.run(address, &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0]);
        assert_eq!(action, Action::Good);
        data[8..].to_vec()
    }

    fn generation(&mut self) -> u64 {
        self.keep_up();
        self.nexus.target().generation()
    }
}

#[test]
fn unit_with_another_size_is_that_wherever_it_is_and_its_initiator_alone_is_told() {
    let mut bench = Bench::new();
    // READ CAPACITY (10): the last block and the block size.
    let capacity =
        |bench: &mut Bench, place| bench.run(place, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]).1;
    let before = Arc::clone(&bench.nexus);
    let larger = bench.units[1].clone().with_blocks(0x2345_6789).unwrap();
    assert_eq!(bench.roster.resize(&larger), [(3, lun(1))]);
    assert_eq!(bench.told(at(3, 1)), [(6, 0x2a, 0x09)]);
    assert_eq!(
        capacity(&mut bench, at(3, 1)),
        [0x23, 0x45, 0x67, 0x88, 0, 0, 2, 0]
    );
    for place in [at(3, 0), at(5, 0)] {
        assert_eq!(bench.told(place), []);
        assert_eq!(capacity(&mut bench, place), [0, 0, 0x0f, 0xff, 0, 0, 2, 0]);
    }
    // Who has not looked goes on with what there was.
    let old = before.find(at(3, 1)).unwrap();
    assert_eq!(before.target().units()[old].geometry().blocks(), 0x1000);
    // Nothing is different, or is here.
    let generation = bench.generation();
    assert_eq!(bench.roster.resize(&larger), []);
    assert_eq!(bench.roster.resize(&disk("d").with_blocks(1).unwrap()), []);
    assert_eq!(
        (bench.generation(), bench.told(at(3, 1))),
        (generation, vec![])
    );
    // One that was taken away has no place to be told at.
    let index = bench.roster.withdraw(3, lun(1)).unwrap();
    let smaller = larger.with_blocks(7).unwrap();
    assert_eq!(bench.roster.resize(&smaller), []);
    bench.keep_up();
    assert_eq!(bench.nexus.target().units()[index].geometry().blocks(), 7);
    bench.roster.forget(index);
    bench.roster.add(9, lun(9), smaller.clone()).unwrap();
    assert_eq!(bench.told(at(9, 9)), [(6, 0x29, 0)]);
    assert_eq!(capacity(&mut bench, at(9, 9)), [0, 0, 0, 6, 0, 0, 2, 0]);
    // No disk has such a size.
    for blocks in [0, u64::MAX] {
        assert!(smaller.clone().with_blocks(blocks).is_none());
    }
}

const INVENTORY: (u8, u8, u8) = (6, 0x3f, 0x0e);

#[test]
fn unit_that_is_added_is_there_with_the_next_command_and_others_of_its_target_tell_once() {
    let mut bench = Bench::new();
    let before = bench.generation();
    bench.roster.add(3, lun(300), disk("d")).unwrap();
    assert!(bench.generation() > before);
    assert_eq!(bench.told(at(3, 300)), [(6, 0x29, 0)]);
    // Once for the target, whichever LUN it is asked by, and not for another target.
    assert_eq!(bench.told(at(3, 1)), [INVENTORY]);
    assert_eq!(bench.told(at(3, 0)), []);
    assert_eq!(bench.told(at(5, 0)), []);
    let expected = [
        [0; 8],
        [0, 1, 0, 0, 0, 0, 0, 0],
        [0x41, 0x2c, 0, 0, 0, 0, 0, 0],
    ];
    assert_eq!(bench.luns(at(3, 0)), expected.concat());
    // Who has asked knows.
    bench.roster.add(3, lun(301), disk("e")).unwrap();
    assert_eq!(bench.luns(at(3, 1)).len(), 32);
    assert_eq!(bench.told(at(3, 0)), []);
    assert_eq!(bench.told(at(3, 301)), [(6, 0x29, 0)]);
    // A new target is nobody's change.
    bench.roster.add(9, lun(0), disk("f")).unwrap();
    for place in [at(3, 0), at(5, 0)] {
        assert_eq!(bench.told(place), []);
    }
}

#[test]
fn unit_that_is_taken_away_is_absent_for_good_and_its_target_stays_a_target() {
    let mut bench = Bench::new();
    let older = Arc::clone(&bench.nexus);
    let index = bench.roster.withdraw(3, lun(1)).unwrap();
    assert_eq!(older.find(at(3, 1)), Some(index), "one that has not looked");
    for _ in 0..3 {
        let (action, _) = bench.run(at(3, 1), &[0; 6]);
        let Action::Check(sense) = action else {
            panic!("{action:?}")
        };
        assert_eq!((sense.key, sense.asc, sense.ascq), (5, 0x25, 0));
        // PERIPHERAL QUALIFIER 011b, PERIPHERAL DEVICE TYPE 1Fh.
        let (action, data) = bench.run(at(3, 1), &[0x12, 0, 0, 0, 36, 0]);
        assert_eq!((action, data[0]), (Action::Good, 0x7f));
    }
    assert_eq!(bench.told(at(3, 0)), [INVENTORY]);
    assert_eq!(bench.luns(at(3, 0)), [0; 8]);
    assert_eq!(bench.roster.withdraw(3, lun(1)), None);
    // The last one of a target: what is left is an address with nobody there.
    bench.roster.withdraw(5, lun(0)).unwrap();
    bench.keep_up();
    assert!(bench.nexus.has_target(at(5, 0)) && !bench.nexus.has_target(at(6, 0)));
    assert_eq!(bench.luns(at(5, 0)), [0; 0]);
}

#[test]
fn index_is_given_again_only_after_it_was_forgotten_and_to_the_same_unit_first() {
    let mut bench = Bench::new();
    let [a, b] = [0, 1].map(|number| bench.roster.withdraw(3, lun(number)).unwrap());
    bench.roster.add(3, lun(7), disk("d")).unwrap();
    bench.keep_up();
    let d = bench.nexus.find(at(3, 7)).unwrap();
    assert!(d != a && d != b, "commands may still be under way");
    // The unit is still this initiator's, until its commands have ended.
    let error = bench.roster.add(3, lun(0), bench.units[0].clone());
    let taken = ShareError::Taken(Initiator::new("vm0").unwrap());
    assert_eq!(error, Err(PlaceError::Share(taken)));
    bench.roster.forget(a);
    bench.roster.forget(b);
    bench.roster.add(3, lun(8), bench.units[0].clone()).unwrap();
    bench.roster.add(3, lun(9), disk("e")).unwrap();
    bench.keep_up();
    assert_eq!(bench.nexus.find(at(3, 8)), Some(a));
    assert_eq!(bench.nexus.find(at(3, 9)), Some(b));
    // What resets comes first, and the LUN that came after it is told of then.
    assert_eq!(bench.told(at(3, 8)), [(6, 0x29, 0), INVENTORY]);
    let error = bench.roster.add(3, lun(9), disk("f"));
    let (target, lun) = (3, lun(9));
    assert_eq!(error, Err(PlaceError::Taken { target, lun }));
}

#[test]
fn host_that_is_full_refuses_another_unit_until_one_is_forgotten() {
    let bench = Bench::new();
    for number in 3..MAX_UNITS {
        let number = u16::try_from(number).unwrap();
        bench.roster.add(200, lun(number), disk("more")).unwrap();
    }
    let error = bench.roster.add(200, lun(0), disk("one too many"));
    assert_eq!(error, Err(PlaceError::Full));
    let index = bench.roster.withdraw(3, lun(0)).unwrap();
    bench.roster.forget(index);
    bench.roster.add(200, lun(0), disk("fits")).unwrap();
}

#[test]
fn nexus_that_nobody_holds_is_dropped_and_a_long_chain_of_them_costs_no_stack() {
    let mut bench = Bench::new();
    for _ in 0..10 {
        let index = bench.roster.withdraw(3, lun(0)).unwrap();
        bench.roster.forget(index);
        bench.roster.add(3, lun(0), bench.units[0].clone()).unwrap();
        bench.keep_up();
        assert!(bench.roster.behind() <= 1);
    }
    for _ in 0..20_000 {
        let index = bench.roster.withdraw(5, lun(0)).unwrap();
        bench.roster.forget(index);
        bench.roster.add(5, lun(0), bench.units[2].clone()).unwrap();
    }
    assert_eq!(bench.roster.behind(), 40_000);
    let Bench { roster, nexus, .. } = bench;
    drop(roster);
    drop(nexus);
}

#[test]
fn connection_after_changes_begins_with_what_there_is_by_then() {
    let mut bench = Bench::new();
    bench.roster.disconnect();
    assert!(bench.roster.nexus().is_none());
    bench.roster.add(3, lun(2), disk("d")).unwrap();
    assert!(bench.nexus.successor().is_none(), "the one before is over");
    let tasks: Arc<dyn Tasks> = Arc::new(NoTasks);
    bench.nexus = bench.roster.connect(&tasks);
    for place in [at(3, 0), at(3, 2)] {
        assert_eq!(bench.told(place), [(6, 0x29, 0)]);
    }
}
