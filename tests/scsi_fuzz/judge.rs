//! What holds for every command, whatever it is. Which commands a logical unit has, and which bits of their CDBs count, is
//! what it says itself (SPC-4, 6.35).

use tandem::block::{BlockOp, BlockRange};
use tandem::scsi::sense::FieldPointer;
use tandem::scsi::{Action, Address, Carry, MAX_SENSE_BYTES, Sense};

use super::{BLOCKS, Call, Outcome, TARGET, UNITS, World};

/// The error says what does not hold.
pub type Verdict = Result<(), String>;

pub fn ensure(holds: bool, what: &str) -> Verdict {
    match holds {
        true => Ok(()),
        false => Err(what.to_owned()),
    }
}

/// A command that is supported.
#[derive(Clone, Debug)]
struct Usage {
    opcode: u8,
    action: Option<u8>,
    usage: Vec<u8>,
}

/// What the logical units, the well-known one included, say that they support.
#[derive(Debug)]
pub struct Supported {
    units: Vec<Vec<Usage>>,
    well_known: Vec<Usage>,
}

impl Supported {
    pub fn ask(world: &mut World) -> Supported {
        let well_known = Address::WellKnown { target: TARGET };
        Supported {
            units: UNITS.map(|unit| usages(world, unit)).to_vec(),
            well_known: usages(world, well_known),
        }
    }

    /// At an address; nothing where there is no logical unit.
    fn at(&self, address: Address) -> Option<&[Usage]> {
        match address {
            Address::Controller | Address::WellKnown { .. } => Some(&self.well_known),
            unit => {
                let at = UNITS.iter().position(|own| *own == unit)?;
                Some(&self.units[at])
            }
        }
    }
}

fn usages(world: &mut World, address: Address) -> Vec<Usage> {
    let mut say = |options, opcode, action| {
        let cdb = [
            0xa3, 0x0c, options, opcode, 0, action, 0, 0, 0xff, 0xff, 0, 0,
        ];
        let outcome = world.observer.asks(address, &cdb);
        assert_eq!(outcome.action, Action::Good);
        outcome.data
    };
    let all = say(0, 0, 0);
    let descriptors = all[4..].chunks(8).map(|entry| {
        let has_action = entry[5] & 1 != 0;
        let action = has_action.then_some(entry[3]);
        let one = say(1 + u8::from(has_action), entry[0], entry[3]);
        assert_eq!(one[1] & 7, 3, "{entry:02x?}");
        assert_eq!([one[2], one[3]], [entry[6], entry[7]], "{entry:02x?}");
        Usage {
            opcode: entry[0],
            action,
            usage: one[4..].to_vec(),
        }
    });
    descriptors.collect()
}

/// Where a command has its allocation length; `None` where it has none, and then how much it answers.
fn answers_at_most(cdb: &[u8]) -> Option<usize> {
    let be = |at: usize, bytes: usize| {
        let field = cdb.get(at..at + bytes)?;
        Some(
            field
                .iter()
                .fold(0, |all, byte| all << 8 | usize::from(*byte)),
        )
    };
    match cdb[0] {
        0x03 | 0x1a => be(4, 1),
        0x12 => be(3, 2),
        0x25 => Some(8),
        0x4d | 0x5a | 0x5e => be(7, 2),
        0x84 | 0x9e => be(10, 4),
        0xa0 | 0xa3 => be(6, 4),
        _ => Some(0),
    }
}

/// `most` is how much the target says that any answer has, `wanted` how long the parameter list was.
pub fn command(
    supported: &Supported,
    call: &Call,
    wanted: usize,
    most: usize,
    outcome: &Outcome,
) -> Verdict {
    let len = outcome.data.len();
    if outcome.action == Action::Good {
        let room = answers_at_most(&call.cdb).ok_or("a CDB without its allocation length")?;
        ensure(len <= room, "an answer beyond the allocation length")?;
        ensure(len <= most, "an answer beyond the target's longest")?;
    } else {
        ensure(len == 0, "an answer of a command that does not answer")?;
    }
    let at = UNITS.iter().position(|own| *own == call.address);
    match outcome.action {
        Action::Carry(carry) => self::carry(at, &carry, &outcome.ranges)?,
        Action::Check(sense) => self::sense(&sense)?,
        Action::Defer => return Err("it is settled, and waits".to_owned()),
        Action::Busy => return Err("nobody changes anything meanwhile".to_owned()),
        Action::Good | Action::Conflict => {}
    }
    match supported.at(call.address) {
        Some(usages) => refusal(usages, at.is_some(), call, wanted, outcome.action),
        None => absent(&call.cdb, outcome.action),
    }
}

/// SPC-4, 4.2.3: there are commands that every LUN answers; others are told that there is no logical unit.
fn absent(cdb: &[u8], action: Action) -> Verdict {
    match action {
        Action::Good => ensure(
            [0x03, 0x12, 0xa0].contains(&cdb[0]),
            "it is carried out without a logical unit",
        ),
        Action::Check(sense) => {
            let wrong = [0x03, 0x12, 0xa0].contains(&cdb[0]) && sense.asc == 0x24;
            ensure(wrong || sense == Sense::NO_UNIT, "another refusal")
        }
        _ => Err("there is no logical unit".to_owned()),
    }
}

/// A command is refused if, and only if, the usage data says so; a pointer is to what is wrong.
fn refusal(usages: &[Usage], is_disk: bool, call: &Call, wanted: usize, action: Action) -> Verdict {
    let cdb = &call.cdb;
    if let Action::Check(sense) = action
        && sense.key == 6
    {
        return ensure(is_disk, "a unit attention of no logical unit");
    }
    let mut same = usages.iter().filter(|own| own.opcode == cdb[0]);
    let own_action = cdb.get(1).map_or(0, |byte| byte & 0x1f);
    let exists = same.clone().next().is_some();
    let found = same.find(|own| own.action.is_none_or(|action| action == own_action));
    let usage = match found {
        Some(own) if own.usage.len() <= cdb.len() => own,
        None if exists => {
            let expected = Action::Check(Sense::in_cdb(1, 4));
            return ensure(action == expected, "an unknown service action");
        }
        _ => {
            let expected = Action::Check(Sense::INVALID_OPCODE);
            return ensure(action == expected, "an unknown operation code");
        }
    };
    let looked_at = |at: usize| match (at, usage.action) {
        (0, _) => 0xff,
        (1, Some(_)) => usage.usage[1] | 0x1f,
        _ => usage.usage.get(at).copied().unwrap_or(0),
    };
    let mut bytes = cdb.iter().take(usage.usage.len()).enumerate();
    let stray = bytes.find_map(|(at, byte)| {
        let bit = (byte & !looked_at(at)).checked_ilog2()?;
        Some(Sense::in_cdb(at as u16, bit as u8))
    });
    match (stray, action) {
        (_, Action::Conflict) => ensure(is_disk, "a conflict about no logical unit"),
        (Some(stray), action) => {
            ensure(action == Action::Check(stray), "a bit that does not count")
        }
        (None, Action::Check(sense)) => {
            ensure(sense != Sense::INVALID_OPCODE, "it is supported")?;
            let Some(FieldPointer { in_cdb, byte, bit }) = sense.field else {
                // INVALID RELEASE OF PERSISTENT RESERVATION, 26h/04h, is about no field.
                return ensure(
                    sense.ascq != 0 || ![0x24, 0x26].contains(&sense.asc),
                    "it points to no field",
                );
            };
            let at = usize::from(byte);
            let bits = bit.map_or(0xff, |bit| 1 << bit);
            match in_cdb {
                true => ensure(
                    looked_at(at) & bits != 0,
                    "it points where it does not look",
                ),
                false => ensure(at < wanted, "it points behind the parameter list"),
            }
        }
        (None, _) => Ok(()),
    }
}

/// An operation lies wholly inside the logical unit, and moves as many bytes as it has.
fn carry(at: Option<usize>, carry: &Carry, ranges: &[BlockRange]) -> Verdict {
    let at = at.ok_or("an operation on no logical unit")?;
    ensure(carry.unit == at, "an operation on another logical unit")?;
    let read_only = at == 1;
    let block: u64 = [512, 4096][at];
    let moved = (carry.data_in, carry.data_out);
    let inside = |range: &BlockRange| {
        let count = u64::from(range.count.get());
        let end = range.lba.get().checked_add(count);
        ensure(
            count > 0 && end.is_some_and(|end| end <= BLOCKS),
            "blocks that the logical unit does not have",
        )?;
        Ok::<u64, String>(count * block)
    };
    let moves = |wanted: (u64, u64)| ensure(moved == wanted, "other data than its blocks");
    let writes = ensure(!read_only, "a read-only disk is written");
    match carry.op {
        BlockOp::Read(range) => moves((inside(&range)?, 0)),
        BlockOp::Write(range) | BlockOp::WriteAndVerify { range, .. } => {
            moves((0, inside(&range)?)).and(writes)
        }
        BlockOp::CompareAndWrite(range) => moves((0, 2 * inside(&range)?)).and(writes),
        BlockOp::WriteSame(range) => {
            inside(&range)?;
            ensure([(0, 0), (0, block)].contains(&moved), "no block").and(writes)
        }
        BlockOp::Copy { .. } => {
            ensure(!ranges.is_empty(), "no ranges")?;
            for pair in ranges.chunks(2) {
                let [source, destination] = pair else {
                    return Err("a source without a destination".to_owned());
                };
                let same = inside(source)? == inside(destination)?;
                ensure(same, "more blocks than their destination has")?;
            }
            ensure(carry.data_in == 0, "a copy reads").and(writes)
        }
        BlockOp::Discard | BlockOp::WriteZeroes => {
            ensure(!ranges.is_empty(), "no ranges")?;
            ranges
                .iter()
                .try_for_each(|range| inside(range).map(|_| ()))?;
            ensure(carry.data_in == 0, "data of nothing read").and(writes)
        }
        BlockOp::Verify { range, .. } => {
            let all = inside(&range)?;
            ensure(
                [(0, 0), (0, all), (0, block)].contains(&moved),
                "neither all blocks nor one",
            )
        }
        BlockOp::Flush | BlockOp::DrainAndFlush => ensure(carry.data_in == 0, "a flush reads"),
        BlockOp::DeviceId => Err("no command asks for that".to_owned()),
    }
}

/// Sense data can be written in both formats, and says the same in both (SPC-4, 4.5).
fn sense(sense: &Sense) -> Verdict {
    let mut bytes = [0xee; MAX_SENSE_BYTES];
    let codes = [sense.key, sense.asc, sense.ascq];
    let len = sense.encode(false, &mut bytes);
    let whole = len == 18 && bytes[7] == 10 && bytes[0] & 0x7f == 0x70;
    ensure(
        whole && [bytes[2], bytes[12], bytes[13]] == codes,
        "fixed sense data",
    )?;
    let len = sense.encode(true, &mut bytes);
    let whole = bytes[0] == 0x72 && len == 8 + usize::from(bytes[7]);
    ensure(whole && bytes[1..4] == codes, "descriptor sense data")?;
    let mut rest = &bytes[8..len];
    while let [kind, more, ..] = *rest {
        ensure([0x00, 0x02].contains(&kind), "a descriptor of no kind")?;
        rest = rest
            .get(2 + usize::from(more)..)
            .ok_or("a descriptor's end")?;
    }
    ensure(rest.is_empty(), "half a descriptor")
}

/// Keys, the reservation and the full status fit each other (SPC-4, 6.15).
pub fn reservations(said: Option<&[Vec<u8>; 3]>) -> Verdict {
    let Some([keys, reservation, full]) = said else {
        return Ok(());
    };
    let word = |bytes: &[u8], at: usize| {
        let word = bytes[at..].first_chunk().copied();
        word.map_or(0, u32::from_be_bytes) as usize
    };
    for said in [keys, reservation, full] {
        ensure(word(said, 4) + 8 == said.len(), "another length")?;
        ensure(said[..4] == keys[..4], "another generation")?;
    }
    let registered: Vec<&[u8]> = keys[8..].chunks(8).collect();
    ensure(!registered.contains(&&[0; 8][..]), "a key of 0")?;
    let (mut at, mut holders, mut seen) = (8, 0, Vec::new());
    while at < full.len() {
        seen.push(&full[at..at + 8]);
        holders += usize::from(full[at + 12] & 1);
        at += 24 + word(full, at + 20);
    }
    ensure(
        at == full.len() && seen == registered,
        "other registrations",
    )?;
    let held = reservation.get(8..16);
    let kind = reservation.get(21).copied().unwrap_or(0);
    match (held, kind) {
        (None, _) => ensure(holders == 0, "a holder of nothing"),
        (Some(key), 7 | 8) => ensure(
            key == [0; 8] && holders == registered.len() && holders > 0,
            "all registrants hold it",
        ),
        (Some(key), 1 | 3 | 5 | 6) => ensure(
            holders == 1 && registered.contains(&key),
            "a registrant holds it",
        ),
        _ => Err("a reservation of no type".to_owned()),
    }
}
