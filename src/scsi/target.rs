//! Targets, logical units and who may speak to them.
//!
//! A [`Target`] is all that one host shows to its initiator: logical units, each at a target identifier and a LUN. Other
//! hosts may show the same logical units to theirs. A [`Nexus`] is the initiator while it is connected.
//!
//! Neither ever changes: what a host shows changes by a successor ([`super::Roster`] makes them), which each of those who
//! hold a nexus takes up when it suits them. Nobody waits for anybody, and who looks at a nexus twice sees the same.

use std::sync::{Arc, OnceLock};

use super::attention::{self, Attention, Conditions};
use super::command::{self, Cdb, Scope};
use super::copy::CopyLog;
use super::initiator::Initiator;
use super::persistent::MAX_FULL_STATUS;
use super::plain::PlainUnit;
use super::sense::{MAX_SENSE_BYTES, Sense};
use super::unit::{Listen, LogicalUnit, Settlement, ShareError, Tasks};
use super::{Action, Exchange, Result};

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

/// The most logical units of one host.
pub const MAX_UNITS: usize = 1024;

/// All logical units of one host, for its initiator, at one time.
#[derive(Clone, Debug)]
pub struct Target {
    initiator: Initiator,
    generation: u64,
    /// Sorted by place.
    places: Vec<((u8, Lun), usize)>,
    /// In the order given. One that has no place any more stays until another takes its index.
    units: Vec<LogicalUnit>,
    /// By unit: what the initiator is to be told of it.
    conditions: Vec<Arc<Conditions>>,
    /// By target identifier: whether it has a logical unit, or had one.
    known: [bool; 256],
}

/// Bytes of an entry of REPORT LUNS, and of its header.
const LUN_ENTRY: usize = 8;

impl Target {
    /// Logical units with the target identifier and the LUN of each, for `initiator`. Of two at one place the first one
    /// counts.
    ///
    /// # Errors
    /// When the initiator has one of them already, or too many others have.
    pub fn new(
        initiator: &Initiator,
        units: Vec<(u8, Lun, LogicalUnit)>,
    ) -> std::result::Result<Target, ShareError> {
        let places = units.iter().enumerate();
        let mut places: Vec<((u8, Lun), usize)> = places
            .map(|(index, (target, lun, _))| ((*target, *lun), index))
            .collect();
        places.sort();
        places.dedup_by_key(|(place, _)| *place);
        let mut known = [false; 256];
        for ((target, _), _) in &places {
            known[usize::from(*target)] = true;
        }
        let units: Vec<LogicalUnit> = units.into_iter().map(|(_, _, unit)| unit).collect();
        let conditions = units.iter().map(|unit| unit.share(initiator));
        Ok(Target {
            initiator: initiator.clone(),
            generation: 0,
            places,
            conditions: conditions.collect::<std::result::Result<_, _>>()?,
            units,
            known,
        })
    }

    /// Of its successors each has a higher one. Whatever was remembered of [`Self::find`] or [`LogicalUnit::geometry`] is
    /// true for as long as this is what it was.
    #[inline]
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// The logical units, by the index that [`super::Carry::unit`] gives; also such that have just been taken away.
    #[must_use]
    pub fn units(&self) -> &[LogicalUnit] {
        &self.units
    }

    /// The places, in order, with the logical unit at each.
    pub fn places(&self) -> impl Iterator<Item = (u8, Lun, &LogicalUnit)> {
        let places = self.places.iter();
        places.filter_map(|((target, lun), index)| Some((*target, *lun, self.units.get(*index)?)))
    }

    /// The target identifier of a unit, if it has a place.
    #[must_use]
    pub fn id_of(&self, unit: usize) -> Option<u8> {
        let mut places = self.places.iter();
        let ((target, _), _) = places.find(|(_, index)| *index == unit)?;
        Some(*target)
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

    /// The successor with one logical unit more, at index `at` or at a new one. What is at the index must have no place.
    pub(super) fn with_unit(
        &self,
        (target, lun): (u8, Lun),
        at: Option<usize>,
        unit: LogicalUnit,
    ) -> std::result::Result<(Target, usize), ShareError> {
        let conditions = unit.share(&self.initiator)?;
        let mut next = self.succeed();
        let index = match at.filter(|at| *at < next.units.len()) {
            Some(at) => {
                (next.units[at], next.conditions[at]) = (unit, conditions);
                at
            }
            None => {
                next.units.push(unit);
                next.conditions.push(conditions);
                next.units.len() - 1
            }
        };
        let after = next
            .places
            .partition_point(|(place, _)| *place < (target, lun));
        next.places.insert(after, ((target, lun), index));
        next.known[usize::from(target)] = true;
        Ok((next, index))
    }

    /// The successor without the logical unit at a place, and its index.
    pub(super) fn without(&self, place: (u8, Lun)) -> Option<(Target, usize)> {
        let index = self.find(place.0, place.1)?;
        let mut next = self.succeed();
        next.places.retain(|(own, _)| *own != place);
        Some((next, index))
    }

    /// The successor in which a logical unit has the size that `unit` has; `None` if it is not there, or has that.
    pub(super) fn resized(&self, unit: &LogicalUnit) -> Option<Target> {
        let blocks = unit.geometry().blocks();
        let differs = |own: &LogicalUnit| own.is(unit) && own.geometry().blocks() != blocks;
        if !self.units.iter().any(differs) {
            return None;
        }
        let mut next = self.succeed();
        for own in next.units.iter_mut().filter(|own| differs(own)) {
            *own = own.clone().with_blocks(blocks)?;
        }
        Some(next)
    }

    /// The initiator is told with its next command to a logical unit that it has another size. Its places.
    pub(super) fn attend_size(&self, unit: &LogicalUnit) -> Vec<(u8, Lun)> {
        let places = self.places.iter();
        let places = places.filter(|(_, index)| self.units[*index].is(unit));
        places
            .map(|(place, index)| {
                self.conditions[*index].establish(Attention::Capacity);
                *place
            })
            .collect()
    }

    fn succeed(&self) -> Target {
        Target {
            generation: self.generation + 1,
            ..self.clone()
        }
    }

    /// An initiator that knows the logical units of a target is told with its next command to one of them, but for the one
    /// at `index`, that there are others now.
    pub(super) fn attend_inventory(&self, target: u8, index: usize) {
        let others = self.luns_of(target).iter();
        for (_, other) in others.filter(|(_, other)| *other != index) {
            self.conditions[*other].establish(Attention::ReportedLuns);
        }
    }

    /// It knows.
    fn forget_inventory(&self, target: u8) {
        for (_, index) in self.luns_of(target) {
            self.conditions[*index].withdraw(Attention::ReportedLuns);
        }
    }

    /// A logical unit has come to an initiator that is there.
    pub(super) fn greet(&self, index: usize, tasks: Option<&Arc<dyn Tasks>>) {
        let (unit, conditions) = (&self.units[index], &self.conditions[index]);
        unit.lose_nexus(conditions);
        conditions.establish(Attention::PowerOn);
        if let Some(tasks) = tasks {
            unit.watch(conditions, tasks);
        }
    }

    /// What others do to its logical units is for `listener` to tell; of all of them, or of the one at `index`.
    pub(super) fn announce(&self, index: Option<usize>, listener: &Arc<dyn Listen>) {
        let places = self.places.iter();
        for (place, at) in places.filter(|(_, at)| index.is_none_or(|index| index == *at)) {
            self.units[*at].announce(&self.conditions[*at], *place, listener);
        }
    }

    /// The initiator has a logical unit no more, and no command for it.
    pub(super) fn unshare(&self, index: usize) {
        if let (Some(unit), Some(own)) = (self.units.get(index), self.conditions.get(index)) {
            unit.unshare(own);
        }
    }

    /// Whether a target has any logical unit, or had one.
    #[must_use]
    pub fn has_target(&self, target: u8) -> bool {
        self.known[usize::from(target)]
    }

    fn luns_of(&self, target: u8) -> &[((u8, Lun), usize)] {
        let start = self.places.partition_point(|((own, _), _)| *own < target);
        let end = self.places.partition_point(|((own, _), _)| *own <= target);
        &self.places[start..end]
    }

    /// How large the buffer for the answer of any command must be, also of its successors.
    #[must_use]
    pub fn data_in_bytes(&self) -> usize {
        // The well-known ones and the header: three entries more. Nothing else exceeds a full status of reservations.
        ((self.places.len().max(MAX_UNITS) + 3) * LUN_ENTRY).max(MAX_FULL_STATUS)
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

    /// Everybody else is told what this initiator has done to the logical unit.
    pub(super) fn attend_others(&self, attention: Attention) {
        if let Some(unit) = self.unit {
            self.nexus.attend_others(unit, attention);
        }
    }

    /// Its initiator has asked, or was told, of the logical units that there are now.
    fn knows_inventory(&self) {
        let target = &self.nexus.target;
        match self.address {
            Address::Unit { target: own, .. } | Address::WellKnown { target: own } => {
                target.forget_inventory(own);
            }
            Address::Controller => (0..=u8::MAX).for_each(|own| target.forget_inventory(own)),
        }
    }

    /// The copies that its initiator may ask about.
    pub(super) fn copies(&self) -> &CopyLog {
        &self.nexus.copies
    }

    /// All logical units that the initiator reaches.
    pub(super) fn units(&self) -> impl Iterator<Item = &LogicalUnit> {
        self.nexus.target.units.iter()
    }

    /// What its initiator is to know of it.
    fn conditions(&self) -> Option<&Conditions> {
        let conditions = self.nexus.target.conditions.get(self.unit?)?;
        Some(conditions)
    }

    /// The logical unit and its index.
    pub(super) fn unit(&self) -> Result<(&LogicalUnit, usize)> {
        let index = self.unit.ok_or(Sense::NO_UNIT)?;
        let unit = self.nexus.target.units.get(index);
        unit.map(|unit| (unit, index)).ok_or(Sense::NO_UNIT)
    }
}

/// One initiator, connected, and the logical units that it reaches.
#[derive(Debug)]
pub struct Nexus {
    target: Arc<Target>,
    copies: Arc<CopyLog>,
    next: OnceLock<Arc<Nexus>>,
}

impl Drop for Nexus {
    /// One successor after the other: by itself each would be dropped within the one before.
    fn drop(&mut self) {
        let mut next = self.next.take();
        while let Some(nexus) = next {
            next = Arc::into_inner(nexus).and_then(|mut nexus| nexus.next.take());
        }
    }
}

impl Nexus {
    /// The same initiator with what it reaches from now on.
    pub(super) fn succeed(&self, target: Arc<Target>) -> Arc<Nexus> {
        let copies = Arc::clone(&self.copies);
        let nexus = Arc::new(Nexus::reaching(target, copies));
        // There is one who makes successors, and it makes the newest one's.
        Arc::clone(self.next.get_or_init(|| nexus))
    }

    fn reaching(target: Arc<Target>, copies: Arc<CopyLog>) -> Nexus {
        Nexus {
            target,
            copies,
            next: OnceLock::new(),
        }
    }

    /// What has taken its place, if anything has: to be looked at before commands are taken up, and taken up in its stead.
    /// One load while nothing has changed. Whoever made it keeps this one, so that nothing is freed by leaving it.
    #[inline(always)]
    pub fn successor(&self) -> Option<&Arc<Nexus>> {
        self.next.get()
    }

    /// An initiator that has just come: whatever happened before, it is told that all is new.
    #[must_use]
    pub fn new(target: Arc<Target>) -> Nexus {
        for (unit, conditions) in target.units.iter().zip(&target.conditions) {
            unit.lose_nexus(conditions);
            conditions.establish(Attention::PowerOn);
        }
        Nexus::reaching(target, Arc::new(CopyLog::new()))
    }

    /// Where its commands are, for others that preempt it.
    #[must_use]
    pub fn with_tasks(self, tasks: &Arc<dyn Tasks>) -> Nexus {
        for (unit, conditions) in self.target.units.iter().zip(&self.target.conditions) {
            unit.watch(conditions, tasks);
        }
        self
    }

    /// The initiator has gone. What it reserved as SPC-2 has it is no longer reserved.
    pub fn end(&self) {
        for (unit, conditions) in self.target.units.iter().zip(&self.target.conditions) {
            unit.lose_nexus(conditions);
        }
    }

    /// Carries out a command of [`Action::Defer`]. Waits for what it needs; not for a thread that must not.
    #[must_use]
    pub fn settle(&self, unit: usize, cdb: &Cdb, parameters: &[u8]) -> Settlement {
        let target = &self.target;
        match (target.units.get(unit), target.conditions.get(unit)) {
            (Some(unit), Some(own)) => unit.settle(&target.initiator, own, cdb, parameters),
            _ => Settlement::at_once(Action::Check(Sense::NO_UNIT)),
        }
    }

    /// A unit is reset: what anybody reserved of it as SPC-2 has it is no longer reserved, its modes are what they were when
    /// the server started, and all are told. `false` when that is to be tried again.
    pub fn reset_unit(&self, index: usize) -> bool {
        let Some(unit) = self.target.units.get(index) else {
            return true;
        };
        let Some(mut state) = unit.try_state() else {
            return false;
        };
        unit.forget_reserve(&mut state, None);
        unit.reset_modes();
        self.copies.clear();
        self.attend(index, Attention::Reset);
        self.attend_others(index, Attention::Reset);
        true
    }

    /// The nexus with the target at an address is reset: the same for what this initiator reserved. `false` when that is
    /// to be tried again.
    pub fn reset_target(&self, address: Address) -> bool {
        let (Address::Unit { target, .. } | Address::WellKnown { target }) = address else {
            return true;
        };
        for (_, index) in self.target.luns_of(target) {
            let unit = self.target.units.get(*index);
            let (Some(unit), Some(own)) = (unit, self.target.conditions.get(*index)) else {
                continue;
            };
            let Some(mut state) = unit.try_state() else {
                return false;
            };
            unit.forget_reserve(&mut state, Some(own));
            own.establish(Attention::NexusLoss);
        }
        self.copies.clear();
        true
    }

    /// A copy with this name ([`crate::block::BlockOp::Copy`]) has ended, well or not.
    pub fn copy_ended(&self, name: Option<u8>, well: bool) {
        if let Some(name) = name {
            self.copies.end(name, well);
        }
    }

    /// What it reaches.
    #[must_use]
    pub fn target(&self) -> &Target {
        &self.target
    }

    /// Tells the initiator with its next command to a unit that this has happened to it.
    pub fn attend(&self, unit: usize, attention: Attention) {
        if let Some(conditions) = self.target.conditions.get(unit) {
            conditions.establish(attention);
        }
    }

    /// Tells all other initiators of a unit.
    pub fn attend_others(&self, unit: usize, attention: Attention) {
        let target = &self.target;
        if let (Some(own), Some(unit)) = (target.conditions.get(unit), target.units.get(unit)) {
            unit.attend_others(own, attention);
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

    /// A logical unit for the short way of most commands.
    #[must_use]
    pub fn plain(&self, unit: usize) -> Option<PlainUnit> {
        let conditions = self.target.conditions.get(unit)?;
        Some(self.target.units.get(unit)?.plain(conditions))
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
    let Some(command) = found.filter(|command| command::serves(command, seat)) else {
        // An absent logical unit is told of before anything that the command gets wrong.
        if seat.role() == Role::Absent {
            return Err(Sense::NO_UNIT);
        }
        attention(seat, attention::ALL)?;
        return Err(command::why_not(exchange.cdb, seat));
    };
    if let Some(conditions) = seat.conditions()
        && conditions.any()
        && command.scope != Scope::Always
    {
        // In the order of SAM-5, 5.3.3.
        attention(seat, attention::RESETS)?;
        if conditions.denies(command.access.needs(exchange.cdb)) {
            return Ok(Action::Conflict);
        }
        attention(seat, attention::ALL)?;
    }
    command::check_unused(command, exchange.cdb)?;
    (command.handler)(seat, exchange)
}

/// A command that finds one of these unit attentions ends with it.
#[cold]
fn attention(seat: &Seat<'_>, which: u32) -> Result<()> {
    match seat.conditions().and_then(|own| own.take(which)) {
        Some(sense) => {
            if sense.is(Attention::ReportedLuns.codes()) {
                // Once is enough for all logical units of the target.
                seat.knows_inventory();
            }
            Err(sense)
        }
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
        _ => attention(seat, attention::ALL).err().unwrap_or(Sense::NONE),
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
    if units {
        seat.knows_inventory();
    }
    Ok(Action::Good)
}
