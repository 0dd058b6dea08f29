//! Reservations byte by byte: three initiators of one logical unit, PERSISTENT RESERVE IN and OUT as SPC-4 has them, RESERVE
//! and RELEASE as SPC-2 has them, and what each command meets under each type of reservation. The tables are written out
//! here from the standards and not taken from the code.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tandem::block::{Geometry, RangeList};
use tandem::scsi::command::COMMANDS;
use tandem::scsi::reservations::{Kind, MAX_REGISTRANTS, Registrant, Reservation, Reservations};
use tandem::scsi::{
    Action, Address, Cdb, DataIn, Exchange, Initiator, Keep, LogicalUnit, Lun, MAX_INITIATORS,
    Nexus, Sense, Target, Tasks, UnitIds,
};

const DISK: Address = Address::Unit {
    target: 0,
    lun: Lun::new(0),
};

/// Service actions of PERSISTENT RESERVE OUT.
const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const RELEASE: u8 = 2;
const CLEAR: u8 = 3;
const PREEMPT: u8 = 4;
const PREEMPT_AND_ABORT: u8 = 5;
const REGISTER_AND_IGNORE: u8 = 6;
const REGISTER_AND_MOVE: u8 = 7;

/// Types, as they are in CDBs.
const TYPES: [u8; 6] = [1, 3, 5, 6, 7, 8];

/// Unit attentions.
const PREEMPTED: (u8, u8) = (0x2a, 0x03);
const RELEASED: (u8, u8) = (0x2a, 0x04);
const REGISTRATIONS_PREEMPTED: (u8, u8) = (0x2a, 0x05);

fn disk() -> LogicalUnit {
    LogicalUnit::new(Geometry::new(9, 0x1_2345, false).unwrap(), "shared")
        .with_ids(UnitIds::default())
        .with_volatile_cache(true)
        .with_provisioning(true, true, true)
        .with_copy(128)
}

fn initiator(name: &str) -> Initiator {
    Initiator::new(name).unwrap()
}

/// An initiator of a logical unit, its first unit attention told.
struct Port {
    nexus: Nexus,
    buffer: Vec<u8>,
}

impl Port {
    fn new(name: &str, unit: &LogicalUnit) -> Port {
        let mut port = Port::fresh(name, unit);
        assert_eq!(port.told(), [(0x29, 0x00)]);
        port
    }

    fn fresh(name: &str, unit: &LogicalUnit) -> Port {
        let units = vec![(0, Lun::new(0).unwrap(), unit.clone())];
        let target = Target::new(&initiator(name), units).unwrap();
        Port {
            buffer: vec![0xee; target.data_in_bytes()],
            nexus: Nexus::new(Arc::new(target)),
        }
    }

    /// What a command comes to, those that wait included, and what it says.
    fn run(&mut self, cdb: &[u8], parameters: &[u8]) -> (Action, Vec<u8>) {
        let cdb = Cdb::new(cdb);
        let mut ranges = RangeList::new();
        let mut exchange = Exchange {
            cdb: &cdb,
            parameters,
            data_in: DataIn::new(&mut self.buffer),
            ranges: &mut ranges,
        };
        let action = self.nexus.execute(DISK, Some(0), &mut exchange);
        let data = exchange.data_in.as_slice().to_vec();
        if action != Action::Defer {
            return (action, data);
        }
        let settlement = self.nexus.settle(0, &cdb, parameters);
        assert!(settlement.is_over());
        (settlement.action(), data)
    }

    /// PERSISTENT RESERVE OUT with the flags of byte 20.
    fn out_with(&mut self, action: u8, kind: u8, keys: (u64, u64), flags: u8) -> Action {
        let mut list = [0; 24];
        list[..8].copy_from_slice(&keys.0.to_be_bytes());
        list[8..16].copy_from_slice(&keys.1.to_be_bytes());
        list[20] = flags;
        self.run(&[0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], &list)
            .0
    }

    fn out(&mut self, action: u8, kind: u8, key: u64, action_key: u64) -> Action {
        self.out_with(action, kind, (key, action_key), 0)
    }

    #[track_caller]
    fn does(&mut self, action: u8, kind: u8, key: u64, action_key: u64) {
        assert_eq!(self.out(action, kind, key, action_key), Action::Good);
    }

    #[track_caller]
    fn says(&mut self, service_action: u8) -> Vec<u8> {
        let (action, data) = self.run(&[0x5e, service_action, 0, 0, 0, 0, 0, 0xff, 0xff, 0], &[]);
        assert_eq!(action, Action::Good);
        data
    }

    /// PRGENERATION and all keys.
    fn keys(&mut self) -> (u32, Vec<u64>) {
        let data = self.says(0);
        let word = |at: usize| u32::from_be_bytes(data[at..at + 4].try_into().unwrap());
        assert_eq!(word(4) as usize, data.len() - 8);
        let keys = data[8..].chunks(8);
        let keys = keys.map(|key| u64::from_be_bytes(key.try_into().unwrap()));
        (word(0), keys.collect())
    }

    /// Key and type of the reservation.
    fn held(&mut self) -> Option<(u64, u8)> {
        let data = self.says(1);
        match data.len() {
            8 => None,
            len => {
                assert_eq!((len, &data[4..8]), (24, &[0, 0, 0, 16][..]));
                assert_eq!(data[16..21], [0; 5]);
                Some((
                    u64::from_be_bytes(data[8..16].try_into().unwrap()),
                    data[21],
                ))
            }
        }
    }

    /// All unit attentions that wait, in the order told.
    fn told(&mut self) -> Vec<(u8, u8)> {
        let mut codes = Vec::new();
        loop {
            match self.run(&[0; 6], &[]).0 {
                Action::Check(sense) => {
                    assert_eq!(sense.key, 6);
                    codes.push((sense.asc, sense.ascq));
                }
                other => {
                    assert_eq!(other, Action::Good);
                    return codes;
                }
            }
        }
    }
}

/// Three initiators, of which the first two have registered keys 1 and 2.
fn three() -> (Port, Port, Port) {
    let unit = disk();
    let mut ports = ["vm0", "vm1", "vm2"].map(|name| Port::new(name, &unit));
    ports[0].does(REGISTER, 0, 0, 1);
    ports[1].does(REGISTER, 0, 0, 2);
    ports.into()
}

fn check(key: u8, asc: u8, ascq: u8, field: Option<(bool, u16, Option<u8>)>) -> Action {
    Action::Check(Sense {
        field: field.map(|(in_cdb, byte, bit)| tandem::scsi::sense::FieldPointer {
            in_cdb,
            byte,
            bit,
        }),
        ..Sense::new(key, asc, ascq)
    })
}

/// What a table says of a command: for a write exclusive reservation of another, an exclusive access one of another, and the
/// registrants-only and all-registrants types of each for one that is not registered. Those that are registered are let
/// through by the latter whatever they do.
#[derive(Clone, Copy)]
struct Row(&'static [u8], Allowed, Allowed);
type Allowed = bool;
const YES: Allowed = true;
const NO: Allowed = false;

/// SPC-4, table 66, and SBC-3, table 15: a CDB, and whether it is allowed while another holds a write exclusive one, and an
/// exclusive access one.
#[rustfmt::skip]
const TABLE: &[Row] = &[
    Row(&[0x00, 0, 0, 0, 0, 0], YES, YES),                                   // TEST UNIT READY
    Row(&[0x03, 0, 0, 0, 18, 0], YES, YES),                                  // REQUEST SENSE
    Row(&[0x08, 0, 0, 0, 1, 0], YES, NO),                                    // READ (6)
    Row(&[0x0a, 0, 0, 0, 1, 0], NO, NO),                                     // WRITE (6)
    Row(&[0x12, 0, 0, 0, 96, 0], YES, YES),                                  // INQUIRY
    Row(&[0x15, 0x10, 0, 0, 0, 0], NO, NO),                                  // MODE SELECT (6)
    Row(&[0x1a, 0, 0x3f, 0, 96, 0], YES, NO),                                // MODE SENSE (6)
    Row(&[0x1b, 0, 0, 0, 1, 0], YES, YES),                                   // START STOP UNIT, start
    Row(&[0x1b, 0, 0, 0, 0, 0], NO, NO),                                     // START STOP UNIT, stop
    Row(&[0x1e, 0, 0, 0, 0, 0], YES, YES),                                   // PREVENT ALLOW, allow
    Row(&[0x1e, 0, 0, 0, 1, 0], NO, NO),                                     // PREVENT ALLOW, prevent
    Row(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], YES, YES),                       // READ CAPACITY (10)
    Row(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], YES, NO),                        // READ (10)
    Row(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], NO, NO),                         // WRITE (10)
    Row(&[0x2e, 0, 0, 0, 0, 0, 0, 0, 1, 0], NO, NO),                         // WRITE AND VERIFY (10)
    Row(&[0x2f, 0, 0, 0, 0, 0, 0, 0, 1, 0], YES, NO),                        // VERIFY (10)
    Row(&[0x34, 0, 0, 0, 0, 0, 0, 0, 1, 0], YES, NO),                        // PRE-FETCH (10)
    Row(&[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NO),                         // SYNCHRONIZE CACHE (10)
    Row(&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], NO, NO),                         // WRITE SAME (10)
    Row(&[0x42, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NO),                         // UNMAP
    Row(&[0x4d, 0, 0x4d, 0, 0, 0, 0, 0, 96, 0], YES, YES),                   // LOG SENSE
    Row(&[0x55, 0x10, 0, 0, 0, 0, 0, 0, 0, 0], NO, NO),                      // MODE SELECT (10)
    Row(&[0x5a, 0, 0x3f, 0, 0, 0, 0, 0, 96, 0], YES, NO),                    // MODE SENSE (10)
    Row(&[0x5e, 0, 0, 0, 0, 0, 0, 0, 96, 0], YES, YES),                      // PERSISTENT RESERVE IN, READ KEYS
    Row(&[0x5e, 1, 0, 0, 0, 0, 0, 0, 96, 0], YES, YES),                      // READ RESERVATION
    Row(&[0x5e, 2, 0, 0, 0, 0, 0, 0, 96, 0], YES, YES),                      // REPORT CAPABILITIES
    Row(&[0x5e, 3, 0, 0, 0, 0, 0, 0, 96, 0], YES, YES),                      // READ FULL STATUS
    Row(&[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NO),       // EXTENDED COPY
    Row(&[0x84, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0], NO, NO),      // RECEIVE COPY RESULTS, COPY STATUS
    Row(&[0x84, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 46, 0, 0], NO, NO),      // OPERATING PARAMETERS
    Row(&[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], YES, NO),      // READ (16)
    Row(&[0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], NO, NO),       // COMPARE AND WRITE
    Row(&[0x8a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], NO, NO),       // WRITE (16)
    Row(&[0x8e, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], NO, NO),       // WRITE AND VERIFY (16)
    Row(&[0x8f, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], YES, NO),      // VERIFY (16)
    Row(&[0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], YES, NO),      // PRE-FETCH (16)
    Row(&[0x91, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], NO, NO),       // SYNCHRONIZE CACHE (16)
    Row(&[0x93, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], NO, NO),       // WRITE SAME (16)
    Row(&[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], YES, YES), // READ CAPACITY (16)
    Row(&[0x9e, 0x12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0], YES, NO),  // GET LBA STATUS
    Row(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 96, 0, 0], YES, YES),                // REPORT LUNS
    Row(&[0xa3, 0x0a, 0, 0, 0, 0, 0, 0, 0, 96, 0, 0], YES, YES),             // REPORT TARGET PORT GROUPS
    Row(&[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 4, 0, 0, 0], YES, NO),               // REPORT SUPPORTED OPERATION CODES
    Row(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 4, 0, 0], YES, NO),               // ... TASK MANAGEMENT FUNCTIONS
    Row(&[0xa8, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], YES, NO),                  // READ (12)
    Row(&[0xaa, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], NO, NO),                   // WRITE (12)
    Row(&[0xae, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], NO, NO),                   // WRITE AND VERIFY (12)
    Row(&[0xaf, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], YES, NO),                  // VERIFY (12)
];

/// What reserves and is not in the table: it has rules of its own.
fn is_about_reservations(opcode: u8) -> bool {
    matches!(opcode, 0x16 | 0x17 | 0x56 | 0x57 | 0x5f)
}

#[test]
fn every_command_meets_each_type_of_reservation_as_the_standards_table_says() {
    for command in COMMANDS
        .iter()
        .filter(|one| !is_about_reservations(one.opcode))
    {
        let action = command.service_action;
        let in_table = |row: &&Row| {
            let own = action.is_none_or(|action| row.0[1] & 0x1f == action);
            row.0[0] == command.opcode && own
        };
        assert!(
            TABLE.iter().any(|row| in_table(&row)),
            "{command:02x?} is in no row"
        );
    }
    for kind in TYPES {
        let (mut holder, mut registrant, mut other) = three();
        holder.does(RESERVE, kind, 1, 0);
        let exclusive = [3, 6, 8].contains(&kind);
        for Row(cdb, writers, accessors) in TABLE {
            let block = [0x55; 512];
            let parameters = if cdb[0] == 0x41 { &block[..] } else { &[] };
            let by_table = if exclusive { *accessors } else { *writers };
            for (port, allowed) in [
                (&mut holder, true),
                (&mut registrant, by_table || kind >= 5),
                (&mut other, by_table),
            ] {
                let action = port.run(cdb, parameters).0;
                match allowed {
                    // Of a copy that nobody has begun there is no status.
                    true if cdb[..2] == [0x84, 0] => {
                        assert_eq!(action, check(5, 0x24, 0, Some((true, 2, Some(7)))));
                    }
                    true => assert!(
                        matches!(action, Action::Good | Action::Carry(_)),
                        "{cdb:02x?} under type {kind}: {action:?}"
                    ),
                    false => assert_eq!(action, Action::Conflict, "{cdb:02x?} under type {kind}"),
                }
            }
        }
        // RESERVE and RELEASE: those that hold it, or are registered where that is enough, change nothing and succeed.
        for cdb in [&[0x16, 0, 0, 0, 0, 0][..], &[0x17, 0, 0, 0, 0, 0]] {
            assert_eq!(holder.run(cdb, &[]).0, Action::Good);
            let spared = if kind >= 5 {
                Action::Good
            } else {
                Action::Conflict
            };
            assert_eq!(registrant.run(cdb, &[]).0, spared);
            assert_eq!(other.run(cdb, &[]).0, Action::Conflict);
        }
        let key = if kind >= 7 { 0 } else { 1 };
        assert_eq!(holder.held(), Some((key, kind)));
        // And it ends.
        holder.does(RELEASE, kind, 1, 0);
        assert_eq!(other.held(), None);
        for Row(cdb, ..) in TABLE {
            let told = kind >= 5 && cdb[0] == 0x00;
            let block = [0x55; 512];
            let parameters = if cdb[0] == 0x41 { &block[..] } else { &[] };
            if told {
                assert_eq!(registrant.told(), [RELEASED]);
            }
            assert_ne!(other.run(cdb, parameters).0, Action::Conflict);
            assert_ne!(registrant.run(cdb, parameters).0, Action::Conflict);
        }
    }
}

#[test]
fn register_needs_the_key_that_is_there_and_counts() {
    let unit = disk();
    let (mut a, mut b) = (Port::new("vm0", &unit), Port::new("vm1", &unit));
    assert_eq!(a.says(0), [0; 8]);
    // Of an unregistered one RESERVATION KEY is 0.
    assert_eq!(a.out(REGISTER, 0, 7, 1), Action::Conflict);
    assert_eq!(a.keys(), (0, vec![]));
    a.does(REGISTER, 0, 0, 0x0102_0304_0506_0708);
    assert_eq!(a.says(0), [0, 0, 0, 1, 0, 0, 0, 8, 1, 2, 3, 4, 5, 6, 7, 8]);
    // Of a registered one it is its own.
    assert_eq!(a.out(REGISTER, 0, 0, 2), Action::Conflict);
    a.does(REGISTER, 0, 0x0102_0304_0506_0708, 2);
    // Two may have the same.
    b.does(REGISTER, 0, 0, 2);
    assert_eq!(b.keys(), (3, vec![2, 2]));
    // Scope and type are ignored.
    a.does(REGISTER_AND_IGNORE, 0xff, 77, 9);
    assert_eq!(b.keys(), (4, vec![9, 2]));
    a.does(REGISTER_AND_IGNORE, 0, 0, 0);
    assert_eq!(b.keys(), (5, vec![2]));
    a.does(REGISTER_AND_IGNORE, 0, 0, 0);
    b.does(REGISTER, 0, 2, 0);
    assert_eq!(a.keys(), (7, vec![]));
    assert!(a.told().is_empty() && b.told().is_empty());
}

#[test]
fn reserve_and_release_are_for_those_that_are_registered() {
    for kind in TYPES {
        let (mut a, mut b, mut c) = three();
        assert_eq!(c.out(RESERVE, kind, 0, 0), Action::Conflict);
        assert_eq!(a.out(RESERVE, kind, 2, 0), Action::Conflict);
        a.does(RESERVE, kind, 1, 0);
        // Once more is no error, and another type is one.
        a.does(RESERVE, kind, 1, 0);
        for other in TYPES.into_iter().filter(|other| *other != kind) {
            assert_eq!(a.out(RESERVE, other, 1, 0), Action::Conflict);
            let invalid = check(5, 0x26, 0x04, None);
            assert_eq!(a.out(RELEASE, other, 1, 0), invalid);
        }
        // All registrants hold those of all registrants.
        let expected = if kind >= 7 {
            Action::Good
        } else {
            Action::Conflict
        };
        assert_eq!(b.out(RESERVE, kind, 2, 0), expected);
        // PRGENERATION counts neither.
        assert_eq!(a.keys().0, 2);
        if kind < 7 {
            // Not the holder: no error, and nothing happens.
            b.does(RELEASE, kind, 2, 0);
            assert_eq!(b.held(), Some((1, kind)));
        }
        assert_eq!(c.out(RELEASE, kind, 0, 0), Action::Conflict);
        a.does(RELEASE, kind, 1, 0);
        a.does(RELEASE, kind, 1, 0);
        assert_eq!((a.held(), a.keys()), (None, (2, vec![1, 2])));
        let told = if kind >= 5 { vec![RELEASED] } else { vec![] };
        assert_eq!((a.told(), b.told(), c.told()), (vec![], told, vec![]));
    }
}

#[test]
fn a_reservation_ends_with_its_holders_registration() {
    for kind in TYPES {
        let (mut a, mut b, _) = three();
        a.does(RESERVE, kind, 1, 0);
        a.does(REGISTER, 0, 1, 0);
        if kind >= 7 {
            // The other one holds it, too.
            assert_eq!(b.held(), Some((0, kind)));
            b.does(REGISTER, 0, 2, 0);
        }
        assert_eq!(a.held(), None);
        let told = if kind == 5 || kind == 6 {
            vec![RELEASED]
        } else {
            vec![]
        };
        assert_eq!(b.told(), told, "type {kind}");
    }
}

#[test]
fn clear_ends_everything_and_tells_all_registrants() {
    let (mut a, mut b, mut c) = three();
    a.does(RESERVE, 3, 1, 0);
    assert_eq!(c.out(CLEAR, 0, 0, 0), Action::Conflict);
    b.does(CLEAR, 0, 2, 0);
    assert_eq!((b.keys(), b.held()), ((3, vec![]), None));
    assert_eq!(
        (a.told(), b.told(), c.told()),
        (vec![PREEMPTED], vec![], vec![])
    );
}

#[test]
fn preempt_takes_the_reservation_and_the_registrations_with_its_key() {
    for (old, new) in TYPES
        .into_iter()
        .flat_map(|old| TYPES.map(|new| (old, new)))
    {
        let (mut a, mut b, mut c) = three();
        c.does(REGISTER, 0, 0, 3);
        a.does(RESERVE, old, 1, 0);
        // One of all registrants is preempted with key 0, and then all others go.
        let key = if old >= 7 { 0 } else { 1 };
        b.does(PREEMPT, new, 2, key);
        let (left, holds) = match old >= 7 {
            true => (vec![2], if new >= 7 { 0 } else { 2 }),
            false => (vec![2, 3], if new >= 7 { 0 } else { 2 }),
        };
        assert_eq!(b.keys(), (4, left), "{old} to {new}");
        assert_eq!(b.held(), Some((holds, new)));
        // Those that keep their registration are told when the type is another one.
        let kept = match (old >= 7, old != new) {
            (true, _) => vec![REGISTRATIONS_PREEMPTED],
            (false, true) => vec![RELEASED],
            (false, false) => vec![],
        };
        // While they may not even do what would tell them.
        assert_eq!(a.told(), [REGISTRATIONS_PREEMPTED]);
        assert_eq!((b.told(), c.told()), (vec![], kept), "{old} to {new}");
        let write = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
        assert_eq!(a.run(&write, &[]).0, Action::Conflict);
        assert!(matches!(b.run(&write, &[]).0, Action::Carry(_)));
    }
}

#[test]
fn preempt_of_a_key_that_holds_nothing_removes_registrations_alone() {
    let (mut a, mut b, mut c) = three();
    c.does(REGISTER, 0, 0, 2);
    // Without a reservation: all with the key, its own among them. Scope and type are not looked at.
    b.does(PREEMPT, 0xff, 2, 2);
    assert_eq!(a.keys(), (4, vec![1]));
    assert_eq!(
        (a.told(), b.told(), c.told()),
        (vec![], vec![], vec![REGISTRATIONS_PREEMPTED])
    );
    // With one: the reservation stays.
    b.does(REGISTER, 0, 0, 2);
    a.does(RESERVE, 5, 1, 0);
    a.does(PREEMPT, 3, 1, 2);
    assert_eq!((a.keys(), a.held()), ((6, vec![1]), Some((1, 5))));
    assert_eq!(b.told(), [REGISTRATIONS_PREEMPTED]);
    // Of all registrants: by key, and it stays as long as one is left.
    a.does(RELEASE, 5, 1, 0);
    b.does(REGISTER, 0, 0, 2);
    a.does(RESERVE, 8, 1, 0);
    a.does(PREEMPT, 8, 1, 2);
    assert_eq!((a.keys(), a.held()), ((8, vec![1]), Some((0, 8))));
    // Who preempts itself changes the type, and is told nothing.
    a.does(PREEMPT, 1, 1, 0);
    assert_eq!((a.keys(), a.held()), ((9, vec![1]), Some((1, 1))));
    a.does(PREEMPT, 3, 1, 1);
    assert_eq!((a.keys(), a.held()), ((10, vec![1]), Some((1, 3))));
    assert_eq!(a.told(), []);
}

#[test]
fn preempt_with_a_key_of_nobody_is_refused() {
    for action in [PREEMPT, PREEMPT_AND_ABORT] {
        let (mut a, mut b, mut c) = three();
        assert_eq!(c.out(action, 1, 0, 1), Action::Conflict);
        assert_eq!(a.out(action, 1, 2, 2), Action::Conflict);
        assert_eq!(a.out(action, 1, 1, 77), Action::Conflict);
        // INVALID FIELD IN PARAMETER LIST: 0 is a key only where all registrants hold the reservation.
        let zero = check(5, 0x26, 0, Some((false, 8, None)));
        assert_eq!(a.out(action, 1, 1, 0), zero);
        b.does(RESERVE, 1, 2, 0);
        assert_eq!(a.out(action, 1, 1, 0), zero);
        assert_eq!(a.out(action, 1, 1, 77), Action::Conflict);
        for (kind, bit) in [(0x11, 7), (0x00, 3), (0x02, 3), (0x04, 3), (0x09, 3)] {
            let field = check(5, 0x24, 0, Some((true, 2, Some(bit))));
            assert_eq!(a.out(action, kind, 1, 2), field);
        }
        assert_eq!((a.keys(), a.held()), ((2, vec![1, 2]), Some((2, 1))));
        assert!(a.told().is_empty() && b.told().is_empty());
    }
}

#[test]
fn fields_that_are_wrong_are_pointed_to() {
    let (mut a, ..) = three();
    for (kind, bit) in [(0x11, 7), (0x00, 3), (0x02, 3), (0x04, 3), (0x09, 3)] {
        let field = check(5, 0x24, 0, Some((true, 2, Some(bit))));
        assert_eq!(a.out(RESERVE, kind, 1, 0), field);
        a.does(RESERVE, 1, 1, 0);
        assert_eq!(a.out(RELEASE, kind, 1, 0), field);
        a.does(RELEASE, 1, 1, 0);
    }
    // REGISTER AND MOVE, and what is no service action of either command.
    let action = check(5, 0x24, 0, Some((true, 1, Some(4))));
    assert_eq!(a.out(REGISTER_AND_MOVE, 1, 1, 5), action);
    assert_eq!(a.out(8, 1, 1, 5), action);
    assert_eq!(a.run(&[0x5e, 4, 0, 0, 0, 0, 0, 0, 8, 0], &[]).0, action);
    // SPEC_I_PT, with and without the list that goes with it; APTPL without a place to keep anything.
    let flag = |bit| check(5, 0x26, 0, Some((false, 20, Some(bit))));
    for register in [REGISTER, REGISTER_AND_IGNORE] {
        assert_eq!(a.out_with(register, 0, (1, 5), 0x08), flag(3));
        assert_eq!(a.out_with(register, 0, (1, 5), 0x01), flag(0));
        let mut list = [0; 28];
        list[20] = 0x08;
        assert_eq!(
            a.run(&[0x5f, register, 0, 0, 0, 0, 0, 0, 28, 0], &list).0,
            flag(3)
        );
    }
    // They mean nothing to the others.
    assert_eq!(a.out_with(RESERVE, 1, (1, 0), 0x0d), Action::Good);
    // PARAMETER LIST LENGTH ERROR.
    for len in [0, 8, 23, 25] {
        let list = vec![0; usize::from(len)];
        let action = a.run(&[0x5f, 0, 0, 0, 0, 0, 0, 0, len, 0], &list).0;
        assert_eq!(action, check(5, 0x1a, 0, None));
    }
    // Reserved bits.
    let reserved = check(5, 0x24, 0, Some((true, 1, Some(7))));
    assert_eq!(
        a.run(&[0x5f, 0x80, 0, 0, 0, 0, 0, 0, 24, 0], &[0; 24]).0,
        reserved
    );
    assert_eq!(a.keys(), (2, vec![1, 2]));
}

#[test]
fn reservations_are_read_back_as_they_are() {
    let unit = disk();
    let long = format!("iqn.2001-04.com.example:{}", "x".repeat(223 - 24));
    let (mut a, mut b) = (Port::new("vm0", &unit), Port::new(&long, &unit));
    a.does(REGISTER, 0, 0, 0x11);
    assert_eq!(b.out_with(REGISTER, 0, (0, 0x22), 0x04), Action::Good);
    b.does(RESERVE, 5, 0x22, 0);
    let mut expected = vec![0, 0, 0, 2, 0, 0, 0, 0];
    expected.extend([
        0, 0, 0, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0x00, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 36,
    ]);
    expected.extend([0x05, 0, 0, 32]);
    expected.extend(b"iqn.2025-01.internal.tandem:vm0\0");
    expected.extend([
        0, 0, 0, 0, 0, 0, 0, 0x22, 0, 0, 0, 0, 0x03, 5, 0, 0, 0, 0, 0, 1, 0, 0, 0, 228,
    ]);
    expected.extend([0x05, 0, 0, 224]);
    expected.extend(long.as_bytes());
    expected.push(0);
    let len = (expected.len() - 8) as u8;
    assert_eq!(usize::from(len), expected.len() - 8 - 256);
    expected[6..8].copy_from_slice(&[1, len]);
    assert_eq!(a.says(3), expected);
    // The allocation length cuts, and what is said of lengths stays.
    let (action, data) = a.run(&[0x5e, 3, 0, 0, 0, 0, 0, 0, 9, 0], &[]);
    assert_eq!((action, data), (Action::Good, expected[..9].to_vec()));
    // CRH, ATP_C; TMV, ALLOW COMMANDS 001b; all types.
    assert_eq!(a.says(2), [0, 8, 0x14, 0x90, 0xea, 0x01, 0, 0]);
    // The shortest TransportID has 24 bytes.
    let mut c = Port::new("eui.0123456789", &unit);
    c.does(REGISTER, 0, 0, 0x33);
    let data = c.says(3);
    let id = b"\x05\0\0\x14eui.0123456789\0\0\0\0\0\0";
    assert_eq!(&data[data.len() - 24..], id);
    assert_eq!(data[data.len() - 28..data.len() - 24], [0, 0, 0, 24]);
}

#[test]
fn the_table_of_registrants_is_bounded() {
    let names: Vec<String> = (0..MAX_REGISTRANTS).map(|at| format!("gone{at}")).collect();
    let registrants = names.iter().map(|name| Registrant {
        initiator: initiator(name),
        key: 5,
        all_ports: false,
    });
    let kept = Reservations::restored(registrants.collect(), None).unwrap();
    let unit = disk().with_keeper(Box::new(Shelf::default()), kept);
    let mut a = Port::new("vm0", &unit);
    // INSUFFICIENT REGISTRATION RESOURCES.
    let full = check(5, 0x55, 0x04, None);
    assert_eq!(a.out(REGISTER, 0, 0, 1), full);
    assert_eq!(a.out(REGISTER_AND_IGNORE, 0, 0, 1), full);
    assert_eq!(a.keys().1.len(), MAX_REGISTRANTS);
    // All of it fits the buffer, with the longest of names.
    assert!(a.buffer.len() >= 8 + MAX_REGISTRANTS * (24 + 228));
    const { assert!(MAX_REGISTRANTS >= MAX_INITIATORS) };
}

#[test]
fn conflicts_and_unit_attentions_come_in_the_order_of_sam() {
    let (mut a, mut b, mut c) = three();
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    a.does(RESERVE, 3, 1, 0);
    b.does(PREEMPT, 3, 2, 1);
    // A reset is told before the conflict, everything else after it.
    a.nexus.attend(0, tandem::scsi::Attention::Reset);
    assert_eq!(a.run(&read, &[]).0, check(6, 0x29, 0x03, None));
    assert_eq!(a.run(&read, &[]).0, Action::Conflict);
    assert_eq!(a.told(), [REGISTRATIONS_PREEMPTED]);
    // A command that is wrong conflicts all the same; one that is not known is told of.
    assert_eq!(
        c.run(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0xff], &[]).0,
        Action::Conflict
    );
    assert_eq!(
        c.run(&[0xff, 0, 0, 0, 0, 0], &[]).0,
        check(5, 0x20, 0, None)
    );
}

#[test]
fn reserve_of_spc_2_keeps_all_others_out() {
    let unit = disk();
    let mut ports = ["vm0", "vm1"].map(|name| Port::new(name, &unit));
    let [a, b] = &mut ports;
    for (reserve, release) in [(0x16, 0x17), (0x56, 0x57)] {
        let cdb = |opcode: u8| {
            vec![opcode; 1]
                .into_iter()
                .chain([0; 9])
                .collect::<Vec<u8>>()
        };
        assert_eq!(a.run(&cdb(reserve), &[]).0, Action::Good);
        assert_eq!(a.run(&cdb(reserve), &[]).0, Action::Good);
        assert_eq!(b.run(&cdb(reserve), &[]).0, Action::Conflict);
        // What is not one's own is not released, and that is no error.
        assert_eq!(b.run(&cdb(release), &[]).0, Action::Good);
        for Row(cdb, ..) in TABLE {
            let always = [0x03, 0x12, 0xa0].contains(&cdb[0]) || **cdb == [0x1e, 0, 0, 0, 0, 0];
            let block = [0x55; 512];
            let parameters = if cdb[0] == 0x41 { &block[..] } else { &[] };
            let action = b.run(cdb, parameters).0;
            assert_eq!(
                action == Action::Conflict,
                !always,
                "{cdb:02x?}: {action:?}"
            );
            // PERSISTENT RESERVE IN and OUT conflict for everybody.
            let own = a.run(cdb, parameters).0;
            assert_eq!(own == Action::Conflict, cdb[0] == 0x5e, "{cdb:02x?}");
        }
        assert_eq!(a.out(REGISTER, 0, 0, 1), Action::Conflict);
        assert_eq!(b.out(REGISTER, 0, 0, 1), Action::Conflict);
        assert_eq!(a.run(&cdb(release), &[]).0, Action::Good);
        assert_eq!(b.told(), []);
    }
    // Third-party and extent reservations are obsolete.
    let field = check(5, 0x24, 0, Some((true, 1, Some(4))));
    assert_eq!(a.run(&[0x16, 0x10, 0, 0, 0, 0], &[]).0, field);
    let field = check(5, 0x24, 0, Some((true, 1, Some(0))));
    assert_eq!(a.run(&[0x17, 0x01, 0, 0, 0, 0], &[]).0, field);
    // It ends with a reset of the unit, whoever asks, and with the nexus.
    let reserve = [0x16, 0, 0, 0, 0, 0];
    assert_eq!(a.run(&reserve, &[]).0, Action::Good);
    assert!(b.nexus.reset_unit(0));
    assert_eq!(
        (a.told(), b.told()),
        (vec![(0x29, 0x03)], vec![(0x29, 0x03)])
    );
    assert_eq!(a.run(&reserve, &[]).0, Action::Good);
    assert!(a.nexus.reset_target(DISK));
    assert_eq!((a.told(), b.told()), (vec![(0x29, 0x07)], vec![]));
    assert_eq!(a.run(&reserve, &[]).0, Action::Good);
    a.nexus.end();
    assert_eq!(b.told(), []);
    // A persistent one does not.
    a.does(REGISTER, 0, 0, 1);
    a.does(RESERVE, 3, 1, 0);
    assert!(b.nexus.reset_unit(0) && a.nexus.reset_target(DISK));
    a.nexus.end();
    assert_eq!(b.told(), [(0x29, 0x03)]);
    assert_eq!(b.held(), Some((1, 3)));
}

/// Remembers what it was given, or fails.
#[derive(Debug, Default, Clone)]
struct Shelf {
    kept: Arc<Mutex<Vec<Reservations>>>,
    fails: Arc<AtomicBool>,
}

impl Keep for Shelf {
    fn keep(&self, reservations: &Reservations) -> io::Result<()> {
        if self.fails.load(Ordering::Relaxed) {
            return Err(io::Error::other("no space left"));
        }
        self.kept.lock().unwrap().push(reservations.clone());
        Ok(())
    }
}

#[test]
fn what_is_to_survive_is_kept_before_the_command_ends() {
    let shelf = Shelf::default();
    let unit = disk().with_keeper(Box::new(shelf.clone()), Reservations::default());
    let (mut a, mut b) = (Port::new("vm0", &unit), Port::new("vm1", &unit));
    let kept = || shelf.kept.lock().unwrap().last().cloned();
    // PTPL_C, and not yet PTPL_A.
    assert_eq!(a.says(2)[2..4], [0x15, 0x90]);
    a.does(REGISTER, 0, 0, 1);
    assert_eq!(kept(), None);
    assert_eq!(a.out_with(REGISTER, 0, (1, 1), 0x01), Action::Good);
    assert_eq!(a.says(2)[2..4], [0x15, 0x91]);
    b.does(REGISTER_AND_IGNORE, 0, 0, 2);
    // The last registration says for all whether they survive.
    assert!(!kept().unwrap().is_persistent());
    assert_eq!(b.out_with(REGISTER, 0, (2, 2), 0x01), Action::Good);
    a.does(RESERVE, 6, 1, 0);
    let last = kept().unwrap();
    assert_eq!(last.registrants().len(), 2);
    assert_eq!(
        last.reservation(),
        Some(&Reservation {
            kind: Kind::ExclusiveAccessRegistrantsOnly,
            holder: Some(initiator("vm0")),
        })
    );
    // What cannot be kept does not happen.
    shelf.fails.store(true, Ordering::Relaxed);
    assert_eq!(b.out(CLEAR, 0, 2, 0), check(4, 0x44, 0, None));
    assert_eq!((a.held(), a.told()), (Some((1, 6)), vec![]));
    shelf.fails.store(false, Ordering::Relaxed);
    // After a restart it is as it was, for those that are there again and for all others.
    let registrants = last.registrants().to_vec();
    let restored = Reservations::restored(registrants, last.reservation().cloned()).unwrap();
    let unit = disk().with_keeper(Box::new(shelf), restored);
    let (mut c, mut b) = (Port::new("vm2", &unit), Port::new("vm1", &unit));
    let read = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
    assert_eq!(c.run(&read, &[]).0, Action::Conflict);
    assert!(matches!(b.run(&read, &[]).0, Action::Carry(_)));
    assert_eq!((b.keys(), b.held()), ((0, vec![1, 2]), Some((1, 6))));
    assert_eq!(b.says(2)[3], 0x91);
}

#[test]
fn what_nobody_can_have_reserved_is_not_restored() {
    let registrant = |name: &str, key: u64| Registrant {
        initiator: initiator(name),
        key,
        all_ports: false,
    };
    let held = |kind, holder: Option<&str>| {
        Some(Reservation {
            kind,
            holder: holder.map(initiator),
        })
    };
    let (a, b) = (registrant("a", 1), registrant("b", 1));
    let both = || vec![a.clone(), b.clone()];
    assert!(Reservations::restored(both(), held(Kind::WriteExclusive, Some("b"))).is_some());
    let all = Kind::WriteExclusiveAllRegistrants;
    assert!(Reservations::restored(both(), held(all, None)).is_some());
    for (registrants, reservation) in [
        (vec![registrant("a", 0)], None),
        (vec![a.clone(), a.clone()], None),
        (both(), held(Kind::WriteExclusive, Some("c"))),
        (both(), held(Kind::WriteExclusive, None)),
        (both(), held(all, Some("a"))),
        (vec![], held(all, None)),
        (
            (0..=MAX_REGISTRANTS)
                .map(|at| registrant(&format!("n{at}"), 1))
                .collect(),
            None,
        ),
    ] {
        assert_eq!(Reservations::restored(registrants, reservation), None);
    }
}

/// Commands under way that a test ends.
#[derive(Debug, Default)]
struct Commands {
    asked: AtomicU64,
    ended: AtomicU64,
}

impl Tasks for Commands {
    fn ask(&self) -> u64 {
        self.asked.fetch_add(1, Ordering::Relaxed) + 1
    }

    fn have_ended(&self, number: u64) -> bool {
        self.ended.load(Ordering::Relaxed) >= number
    }
}

#[test]
fn preempt_and_abort_ends_when_the_commands_of_those_preempted_have() {
    let unit = disk();
    let mut ports = ["vm0", "vm1", "vm2"].map(|name| Port::new(name, &unit));
    let commands = [0, 1, 2].map(|_| Arc::new(Commands::default()));
    let mut watched = Vec::new();
    for (port, commands) in ports.into_iter().zip(&commands) {
        let tasks: Arc<dyn Tasks> = Arc::<Commands>::clone(commands);
        watched.push(Port {
            nexus: port.nexus.with_tasks(&tasks),
            buffer: port.buffer,
        });
    }
    ports = watched.try_into().ok().unwrap();
    for (port, key) in ports.iter_mut().zip([1, 2, 3]) {
        port.does(REGISTER, 0, 0, key);
    }
    let [a, b, _] = &mut ports;
    a.does(RESERVE, 1, 1, 0);
    // PREEMPT waits for nobody.
    b.does(PREEMPT, 1, 2, 1);
    assert_eq!(a.told(), [REGISTRATIONS_PREEMPTED]);
    a.does(REGISTER, 0, 0, 1);
    let mut list = [0; 24];
    (list[7], list[15]) = (1, 2);
    let cdb = Cdb::new(&[0x5f, PREEMPT_AND_ABORT, 3, 0, 0, 0, 0, 0, 24, 0]);
    let settlement = a.nexus.settle(0, &cdb, &list);
    // It is in force before: what comes now conflicts, what was there before is waited for.
    assert_eq!(
        b.run(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]).0,
        Action::Conflict
    );
    assert!(!settlement.is_over());
    let asked = |at: usize| commands[at].asked.load(Ordering::Relaxed);
    assert_eq!([asked(0), asked(1), asked(2)], [0, 1, 0]);
    commands[1].ended.store(1, Ordering::Relaxed);
    assert!(settlement.is_over());
    assert_eq!(settlement.action(), Action::Good);
}
