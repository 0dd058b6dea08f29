//! Targets, logical units and who may speak to them.
//!
//! A [`Target`] is all that one controller shows: logical units, each at a target identifier and a LUN. A [`Nexus`] is one
//! initiator's relation to it: what that initiator has not been told yet.

use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};

use super::command::{self, Cdb, Scope};
use super::sense::{MAX_SENSE_BYTES, Sense, key};
use super::{Action, Exchange, Health, Result};
use crate::block::Geometry;

/// A logical unit number of up to 14 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lun(u16);

impl Lun {
    /// The highest that flat addressing reaches.
    pub const MAX: u16 = 16383;

    /// LUN `number`; `None` beyond [`Lun::MAX`].
    #[must_use]
    pub const fn new(number: u16) -> Option<Lun> {
        if number <= Lun::MAX {
            Some(Lun(number))
        } else {
            None
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0
    }

    /// As a LUN of a single level is written (SAM-5, 4.7): peripheral addressing below 256, flat from there on.
    #[must_use]
    pub const fn to_bytes(self) -> [u8; 2] {
        let [high, low] = self.0.to_be_bytes();
        if self.0 < 256 {
            [0, low]
        } else {
            [0x40 | high, low]
        }
    }
}

/// Whom a command is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// The REPORT LUNS well-known logical unit of the whole controller.
    Controller,
    /// That of one target.
    WellKnown {
        /// The target's identifier.
        target: u8,
    },
    /// A logical unit of one target.
    Unit {
        /// The target's identifier.
        target: u8,
        /// Its LUN; `None` for one that is written in no way that is known here.
        lun: Option<Lun>,
    },
}

impl Address {
    /// A target's identifier with a LUN as SAM-5, 4.7 writes it. Whatever its form, a second level is no LUN of ours.
    #[must_use]
    pub fn of(target: u8, lun: [u8; 6]) -> Address {
        let [first, second, third, fourth, rest @ ..] = lun;
        let single = [third, fourth] == [0; 2] && rest == [0; 2];
        let number = match first >> 6 {
            // Peripheral device addressing, bus 0.
            0 if first == 0 && single => Some(second.into()),
            // Flat space.
            1 if single => Some(u16::from_be_bytes([first & 0x3f, second])),
            3 if first == 0xc1 && second == 0x01 && single => {
                return Address::WellKnown { target };
            }
            // Extended flat space, three bytes.
            3 if first == 0xd2 && second == 0 && rest == [0; 2] => {
                Some(u16::from_be_bytes([third, fourth]))
            }
            _ => None,
        };
        Address::Unit {
            target,
            lun: number.and_then(Lun::new),
        }
    }
}

/// What a namespace says of its identity.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnitIds {
    /// 8 bytes.
    pub eui64: Option<[u8; 8]>,
    /// 16 bytes, EUI-64 based.
    pub nguid: Option<[u8; 16]>,
    /// RFC 4122.
    pub uuid: Option<[u8; 16]>,
}

/// A disk, as its initiators see it.
#[derive(Clone, Debug)]
pub struct LogicalUnit {
    geometry: Geometry,
    serial: String,
    ids: UnitIds,
    volatile_cache: bool,
    unmap: bool,
    write_zeroes: bool,
    unmapped_reads_zero: bool,
    health: Arc<Health>,
}

impl LogicalUnit {
    /// A disk with `serial`, ASCII, and nothing more: no cache, no UNMAP.
    ///
    /// # Panics
    /// When it has no blocks: there is no last one.
    #[must_use]
    pub fn new(geometry: Geometry, serial: &str) -> LogicalUnit {
        assert!(geometry.blocks() > 0, "a disk has blocks");
        LogicalUnit {
            geometry,
            serial: serial.to_owned(),
            ids: UnitIds::default(),
            volatile_cache: false,
            unmap: false,
            write_zeroes: false,
            unmapped_reads_zero: false,
            health: Arc::default(),
        }
    }

    /// What it is called.
    #[must_use]
    pub fn with_ids(self, ids: UnitIds) -> LogicalUnit {
        LogicalUnit { ids, ..self }
    }

    /// Where its device's health is told.
    #[must_use]
    pub fn with_health(self, health: Arc<Health>) -> LogicalUnit {
        LogicalUnit { health, ..self }
    }

    /// Writes may be lost before they are synchronized.
    #[must_use]
    pub fn with_volatile_cache(self, volatile_cache: bool) -> LogicalUnit {
        LogicalUnit {
            volatile_cache,
            ..self
        }
    }

    /// Blocks can be given back, and are zeroes then if `reads_zero`; zeroes can be written without sending any.
    #[must_use]
    pub fn with_provisioning(
        self,
        unmap: bool,
        reads_zero: bool,
        write_zeroes: bool,
    ) -> LogicalUnit {
        LogicalUnit {
            unmap,
            unmapped_reads_zero: unmap && reads_zero,
            write_zeroes,
            ..self
        }
    }

    /// Its size.
    #[must_use]
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    pub(super) fn serial(&self) -> &str {
        &self.serial
    }

    pub(super) fn ids(&self) -> &UnitIds {
        &self.ids
    }

    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    pub(super) fn has_volatile_cache(&self) -> bool {
        self.volatile_cache
    }

    pub(super) fn can_unmap(&self) -> bool {
        self.unmap
    }

    pub(super) fn can_write_zeroes(&self) -> bool {
        self.write_zeroes
    }

    pub(super) fn unmapped_reads_zero(&self) -> bool {
        self.unmapped_reads_zero
    }
}

/// All logical units of one controller.
#[derive(Clone, Debug)]
pub struct Target {
    /// Sorted by place.
    places: Vec<((u8, Lun), usize)>,
    /// In the order given.
    units: Vec<LogicalUnit>,
}

/// Bytes of an entry of REPORT LUNS, and of its header.
const LUN_ENTRY: usize = 8;

impl Target {
    /// Logical units with the target identifier and the LUN of each. Of two at one place the first one counts.
    #[must_use]
    pub fn new(units: Vec<(u8, Lun, LogicalUnit)>) -> Target {
        let places = units.iter().enumerate();
        let mut places: Vec<((u8, Lun), usize)> = places
            .map(|(index, (target, lun, _))| ((*target, *lun), index))
            .collect();
        places.sort();
        places.dedup_by_key(|(place, _)| *place);
        Target {
            places,
            units: units.into_iter().map(|(_, _, unit)| unit).collect(),
        }
    }

    /// The logical units, by the index that [`super::Carry::unit`] gives.
    #[must_use]
    pub fn units(&self) -> &[LogicalUnit] {
        &self.units
    }

    /// Which logical unit is there.
    #[must_use]
    pub fn find(&self, target: u8, lun: Lun) -> Option<usize> {
        let at = self
            .places
            .binary_search_by_key(&(target, lun), |(place, _)| *place)
            .ok()?;
        Some(self.places[at].1)
    }

    /// Whether a target has any logical unit.
    #[must_use]
    pub fn has_target(&self, target: u8) -> bool {
        !self.luns_of(target).is_empty()
    }

    fn luns_of(&self, target: u8) -> &[((u8, Lun), usize)] {
        let start = self.places.partition_point(|((own, _), _)| *own < target);
        let end = self.places.partition_point(|((own, _), _)| *own <= target);
        &self.places[start..end]
    }

    /// How large the buffer for the answer of any command must be.
    #[must_use]
    pub fn data_in_bytes(&self) -> usize {
        // The well-known ones and the header: three entries more. Nothing else exceeds a page.
        ((self.places.len() + 3) * LUN_ENTRY).max(4096)
    }
}

/// What there is at an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Unit,
    WellKnown,
    Absent,
}

/// Where a command is served.
#[derive(Debug)]
pub(super) struct Seat<'a> {
    nexus: &'a Nexus,
    address: Address,
    unit: Option<usize>,
}

impl Seat<'_> {
    pub(super) fn role(&self) -> Role {
        match (self.address, self.unit) {
            (_, Some(_)) => Role::Unit,
            (Address::Controller | Address::WellKnown { .. }, None) => Role::WellKnown,
            (Address::Unit { .. }, None) => Role::Absent,
        }
    }

    /// The logical unit and its index.
    pub(super) fn unit(&self) -> Result<(&LogicalUnit, usize)> {
        let index = self.unit.ok_or(Sense::NO_UNIT)?;
        let unit = self.nexus.target.units.get(index);
        unit.map(|unit| (unit, index)).ok_or(Sense::NO_UNIT)
    }
}

/// One initiator and the logical units that it reaches.
#[derive(Debug)]
pub struct Nexus {
    target: Arc<Target>,
    /// By unit: ASC and ASCQ of what the initiator is to be told; 0 for nothing.
    attentions: Box<[AtomicU16]>,
}

/// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED.
const POWER_ON: u16 = 0x2900;

impl Nexus {
    /// An initiator that has just come.
    #[must_use]
    pub fn new(target: Arc<Target>) -> Nexus {
        let attentions = target.units.iter().map(|_| AtomicU16::new(POWER_ON));
        Nexus {
            attentions: attentions.collect(),
            target,
        }
    }

    /// What it reaches.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Tells the initiator with its next command to a unit that this has happened to it. A reset is all that is told so
    /// far, and the last one counts.
    pub fn attend(&self, unit: usize, asc: u8, ascq: u8) {
        if let Some(attention) = self.attentions.get(unit) {
            attention.store(u16::from_be_bytes([asc, ascq]), Ordering::Relaxed);
        }
    }

    /// The same for all units of the target at an address.
    pub fn attend_target(&self, address: Address, asc: u8, ascq: u8) {
        if let Address::Unit { target, .. } | Address::WellKnown { target } = address {
            for (_, unit) in self.target.luns_of(target) {
                self.attend(*unit, asc, ascq);
            }
        }
    }

    /// What the initiator is to be told of a unit, once.
    fn take_attention(&self, unit: usize) -> Option<Sense> {
        let attention = self.attentions.get(unit)?;
        // Looked at first: of all commands hardly one finds anything.
        if attention.load(Ordering::Relaxed) == 0 {
            return None;
        }
        match attention.swap(0, Ordering::Relaxed).to_be_bytes() {
            [0, 0] => None,
            [asc, ascq] => Some(Sense::new(key::UNIT_ATTENTION, asc, ascq)),
        }
    }

    /// The logical unit at an address.
    #[must_use]
    pub fn find(&self, address: Address) -> Option<usize> {
        match address {
            Address::Unit {
                target,
                lun: Some(lun),
            } => self.target.find(target, lun),
            _ => None,
        }
    }

    /// Whether there is a target at an address, with or without the logical unit.
    #[must_use]
    pub fn has_target(&self, address: Address) -> bool {
        match address {
            Address::Controller => true,
            Address::WellKnown { target } | Address::Unit { target, .. } => {
                self.target.has_target(target)
            }
        }
    }

    /// How many bytes of the initiator's data [`Self::execute`] must be given; see [`command::parameter_bytes`].
    #[must_use]
    pub fn parameter_bytes(&self, unit: Option<usize>, cdb: &Cdb) -> u32 {
        let unit = unit.and_then(|index| self.target.units.get(index));
        command::parameter_bytes(cdb, unit)
    }

    /// Carries a command out as far as that needs no block device. `unit` is what [`Self::find`] says of the address.
    pub fn execute(
        &self,
        address: Address,
        unit: Option<usize>,
        exchange: &mut Exchange<'_>,
    ) -> Action {
        let seat = Seat {
            nexus: self,
            address,
            unit,
        };
        match seat_command(&seat, exchange) {
            Ok(action) => action,
            Err(sense) => {
                exchange.data_in.truncate(0);
                Action::Check(sense)
            }
        }
    }
}

fn seat_command(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let found = command::find(exchange.cdb);
    // An absent logical unit is told of before anything that the command gets wrong.
    let absent = seat.role() == Role::Absent;
    let command = match found {
        Ok(command) if command::serves(command, seat) => command,
        _ if absent => return Err(Sense::NO_UNIT),
        Ok(_) => return Err(Sense::INVALID_OPCODE),
        Err(sense) => {
            attention(seat)?;
            return Err(sense);
        }
    };
    if command.scope != Scope::Always {
        attention(seat)?;
    }
    command::check_unused(command, exchange.cdb)?;
    (command.handler)(seat, exchange)
}

/// A command that finds a unit attention ends with it.
fn attention(seat: &Seat<'_>) -> Result<()> {
    match seat.unit.and_then(|unit| seat.nexus.take_attention(unit)) {
        Some(sense) => Err(sense),
        None => Ok(()),
    }
}

pub(super) fn test_unit_ready(_seat: &Seat<'_>, _exchange: &mut Exchange<'_>) -> Result<Action> {
    Ok(Action::Good)
}

/// SPC-4, 6.39. What was wrong with earlier commands went with them; so a unit attention is all that there can be.
pub(super) fn request_sense(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let sense = match seat.role() {
        Role::Absent => Sense::NO_UNIT,
        _ => attention(seat).err().unwrap_or(Sense::NONE),
    };
    let mut bytes = [0; MAX_SENSE_BYTES];
    let len = sense.encode(exchange.cdb.bit(1, 0), &mut bytes);
    exchange.data_in.put(&bytes[..len]);
    exchange.data_in.truncate(exchange.cdb.byte(4).into());
    Ok(Action::Good)
}

/// SPC-4, 6.33.
pub(super) fn report_luns(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let cdb = exchange.cdb;
    let (select, allocation_length) = (cdb.byte(2), cdb.be32(6));
    let (units, well_known) = match select {
        0x00 => (true, false),
        0x01 => (false, true),
        0x02 => (true, true),
        // There are no administrative logical units; their like and all others are the ordinary ones.
        0x10 | 0x12 => (false, false),
        0x11 => (true, false),
        _ => return Err(Sense::in_cdb(2, 7)),
    };
    if allocation_length < 16 {
        return Err(Sense::in_cdb(6, 7));
    }
    let out = &mut exchange.data_in;
    out.put(&[0; 8]);
    let places = match seat.address {
        Address::Controller => &seat.nexus.target.places[..],
        Address::WellKnown { target } | Address::Unit { target, .. } => {
            seat.nexus.target.luns_of(target)
        }
    };
    let whole = seat.address == Address::Controller;
    if units {
        for ((target, lun), _) in places {
            let [high, low] = lun.to_bytes();
            match whole {
                // As the transport addresses them: the target's identifier comes first.
                true => out.put(&[1, *target, 0x40 | high, low, 0, 0, 0, 0]),
                false => out.put(&[high, low, 0, 0, 0, 0, 0, 0]),
            }
        }
    }
    if well_known {
        out.put(&[0xc1, 0x01, 0, 0, 0, 0, 0, 0]);
    }
    let len = u32::try_from(out.len() - 8).unwrap_or(0);
    out.set(0, &len.to_be_bytes());
    out.truncate(allocation_length);
    Ok(Action::Good)
}
