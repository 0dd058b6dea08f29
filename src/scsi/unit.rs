//! Logical units: what they are, which initiators share them, and what those have reserved.

use std::fmt::Debug;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use super::Action;
use super::attention::{Attention, Conditions, denied};
use super::command::Cdb;
use super::initiator::Initiator;
use super::persistent;
use super::plain::PlainUnit;
use super::reservations::{Outcome, Reservations};
use super::sense::Sense;
use super::{Health, Lun, RangeLock};
use crate::block::Geometry;

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

/// The most initiators that share a logical unit: sockets whose hosts have it.
pub const MAX_INITIATORS: usize = 64;

/// A disk, as its initiators see it. A clone is the same logical unit: what happens to one happens to the other.
#[derive(Clone, Debug)]
pub struct LogicalUnit {
    geometry: Geometry,
    serial: String,
    ids: UnitIds,
    volatile_cache: bool,
    unmap: bool,
    write_zeroes: bool,
    unmapped_reads_zero: bool,
    copy_blocks: u32,
    health: Arc<Health>,
    medium: u64,
    shared: Arc<Shared>,
}

/// Request queues of a logical unit that nobody has said the number of.
const DEFAULT_LANES: usize = 64;

/// What an initiator may change about a logical unit, for all of them. All of it is off when the server starts, and after a
/// reset of the unit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Modes {
    /// WCE = 0, of a disk with a volatile cache.
    pub(super) write_through: bool,
    /// D_SENSE.
    pub(super) descriptor_sense: bool,
    /// SWP.
    pub(super) write_protected: bool,
}

impl Modes {
    fn from_bits(bits: u8) -> Modes {
        Modes {
            write_through: bits & 1 != 0,
            descriptor_sense: bits & 2 != 0,
            write_protected: bits & 4 != 0,
        }
    }

    fn to_bits(self) -> u8 {
        u8::from(self.write_through)
            | u8::from(self.descriptor_sense) << 1
            | u8::from(self.write_protected) << 2
    }
}

/// What all hosts that have a logical unit share of it.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) lock: RangeLock,
    /// See [`Modes::to_bits`].
    modes: AtomicU8,
    /// Filled from the front, and never emptied: initiators are those that the server was started with, and one that has the
    /// unit taken away may get it back.
    sharers: [OnceLock<Sharer>; MAX_INITIATORS],
    state: Mutex<State>,
    /// Held while a command changes the reservations, over the wait for their file.
    changing: Mutex<()>,
    keeper: OnceLock<Box<dyn Keep>>,
}

/// What has been reserved. Locked for moments only: a reactor may try.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) reservations: Reservations,
    /// Whose reservation there is by RESERVE of SPC-2.
    pub(super) reserved: Option<Arc<Conditions>>,
}

/// Where persistent reservations are kept over a loss of power.
pub trait Keep: Debug + Send + Sync {
    /// Makes them durable; those that are not persistent are forgotten, durably.
    ///
    /// # Errors
    /// When they are not durable.
    fn keep(&self, reservations: &Reservations) -> io::Result<()>;
}

/// The commands of an initiator that are under way.
pub trait Tasks: Debug + Send + Sync {
    /// Asks to be told when all that are here by now have ended. Its number.
    fn ask(&self) -> u64;
    /// Whether they have.
    fn have_ended(&self, number: u64) -> bool;
}

/// Hears what other initiators do to the logical units of one host.
pub trait Listen: Debug + Send + Sync {
    /// This has happened to the one at a place. It is called where nobody must wait.
    fn hear(&self, target: u8, lun: Lun, attention: Attention);
}

/// A command of [`Action::Defer`], carried out: it has ended when the commands that it aborts have.
#[derive(Debug)]
pub struct Settlement {
    action: Action,
    aborted: Vec<(Arc<dyn Tasks>, u64)>,
}

impl Settlement {
    pub(super) fn at_once(action: Action) -> Settlement {
        Settlement {
            action,
            aborted: Vec::new(),
        }
    }

    /// What it comes to.
    #[must_use]
    pub fn action(&self) -> Action {
        self.action
    }

    /// Whether it has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        let mut aborted = self.aborted.iter();
        aborted.all(|(tasks, number)| tasks.have_ended(*number))
    }
}

impl Shared {
    /// What MODE SELECT has made of it.
    #[inline]
    pub(super) fn modes(&self) -> Modes {
        Modes::from_bits(self.modes.load(Ordering::Relaxed))
    }

    fn new(lanes: usize) -> Arc<Shared> {
        Arc::new(Shared {
            lock: RangeLock::new(lanes),
            modes: AtomicU8::new(0),
            sharers: [const { OnceLock::new() }; MAX_INITIATORS],
            state: Mutex::default(),
            changing: Mutex::default(),
            keeper: OnceLock::new(),
        })
    }
}

/// An initiator of a logical unit: their I_T_L nexus, connected or not.
#[derive(Debug)]
struct Sharer {
    initiator: Initiator,
    /// It has the unit.
    present: AtomicBool,
    /// Where: the target's identifier above the LUN.
    place: AtomicU32,
    /// Who tells it at once what a unit attention would tell it with its next command.
    listener: OnceLock<Arc<dyn Listen>>,
    conditions: Arc<Conditions>,
    /// Of its connection, and of an earlier one as long as that has commands under way.
    tasks: Mutex<Vec<Weak<dyn Tasks>>>,
}

impl Sharer {
    fn hear(&self, attention: Attention) {
        let listener = self.listener.get();
        let Some(listener) = listener.filter(|_| self.present.load(Ordering::Relaxed)) else {
            return;
        };
        let [_, target, high, low] = self.place.load(Ordering::Relaxed).to_be_bytes();
        if let Some(lun) = Lun::new(u16::from_be_bytes([high, low])) {
            listener.hear(target, lun, attention);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Why an initiator cannot have a logical unit.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ShareError {
    /// Reservations could not tell the two apart.
    #[error(
        "initiator {0} has this logical unit already: give each socket a name of its own with initiator=..."
    )]
    Taken(Initiator),
    /// There is no room.
    #[error("more than {MAX_INITIATORS} initiators share this logical unit")]
    Full,
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
            copy_blocks: 0,
            health: Arc::default(),
            medium: 0,
            shared: Shared::new(DEFAULT_LANES),
        }
    }

    /// The same of all hosts that have it, and of no other logical unit.
    #[must_use]
    pub fn identity(&self) -> usize {
        Arc::as_ptr(&self.shared).addr()
    }

    /// What it is called.
    #[must_use]
    pub fn with_ids(self, ids: UnitIds) -> LogicalUnit {
        LogicalUnit { ids, ..self }
    }

    /// For as many request queues, those of all hosts together; to be said before anybody shares it.
    #[must_use]
    pub fn with_lanes(self, lanes: usize) -> LogicalUnit {
        LogicalUnit {
            shared: Shared::new(lanes),
            ..self
        }
    }

    /// Where its device's health is told.
    #[must_use]
    pub fn with_health(self, health: Arc<Health>) -> LogicalUnit {
        LogicalUnit { health, ..self }
    }

    /// What those who carry operations out call it. Nobody looks at it here.
    #[must_use]
    pub fn with_medium(self, medium: u64) -> LogicalUnit {
        LogicalUnit { medium, ..self }
    }

    /// See [`Self::with_medium`].
    #[inline]
    #[must_use]
    pub fn medium(&self) -> u64 {
        self.medium
    }

    /// Whether both are the same logical unit, for whomever.
    #[must_use]
    pub fn is(&self, other: &LogicalUnit) -> bool {
        Arc::ptr_eq(&self.shared, &other.shared)
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

    /// The device copies blocks by itself, at most so many at a time; 0 if it does not.
    #[must_use]
    pub fn with_copy(self, copy_blocks: u32) -> LogicalUnit {
        LogicalUnit {
            copy_blocks,
            ..self
        }
    }

    /// Blocks that the device copies at a time, at most; 0 if it copies none.
    #[must_use]
    pub fn copy_blocks(&self) -> u32 {
        self.copy_blocks
    }

    pub(super) fn can_copy(&self) -> bool {
        self.copy_blocks > 0
    }

    /// Where COMPARE AND WRITE holds up other writes. Seats are request queues.
    #[must_use]
    pub fn lock(&self) -> &RangeLock {
        &self.shared.lock
    }

    /// What MODE SELECT has made of it.
    #[inline]
    pub(super) fn modes(&self) -> Modes {
        self.shared.modes()
    }

    /// Itself, for reads and writes of an initiator.
    pub(super) fn plain(&self, conditions: &Arc<Conditions>) -> PlainUnit {
        PlainUnit::new(conditions, &self.shared, self.geometry)
    }

    /// For all initiators, from their next command on; unless another one has changed them since they were `before`.
    /// Release: a lane that is asked later (datapath's barrier) finds them.
    pub(super) fn change_modes(&self, before: Modes, modes: Modes) -> bool {
        let (from, to) = (before.to_bits(), modes.to_bits());
        self.shared
            .modes
            .compare_exchange(from, to, Ordering::Release, Ordering::Relaxed)
            .is_ok()
    }

    /// None are saved, so a reset leads back to the default ones (SPC-4, 7.5.1).
    pub(super) fn reset_modes(&self) {
        let default = Modes::default().to_bits();
        self.shared.modes.store(default, Ordering::Release);
    }

    /// Whether each write has to be durable when it ends.
    #[must_use]
    pub fn writes_through(&self) -> bool {
        self.modes().write_through
    }

    /// Whether sense data is in the descriptor format, unless a command says so.
    #[must_use]
    pub fn senses_in_descriptors(&self) -> bool {
        self.modes().descriptor_sense
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

    /// The same unit with another size; `None` if no disk has that.
    #[must_use]
    pub fn with_blocks(self, blocks: u64) -> Option<LogicalUnit> {
        let geometry = self.geometry.with_blocks(blocks).filter(|_| blocks > 0)?;
        Some(LogicalUnit { geometry, ..self })
    }

    /// The same unit through a host that only lets it be read.
    #[must_use]
    pub fn with_read_only(self, read_only: bool) -> LogicalUnit {
        let geometry = self.geometry.with_read_only(read_only);
        LogicalUnit { geometry, ..self }
    }

    /// Another initiator has it from now on.
    pub(super) fn share(&self, initiator: &Initiator) -> Result<Arc<Conditions>, ShareError> {
        for place in &self.shared.sharers {
            let mut fresh = false;
            let sharer = place.get_or_init(|| {
                fresh = true;
                Sharer {
                    initiator: initiator.clone(),
                    present: AtomicBool::new(true),
                    place: AtomicU32::new(0),
                    listener: OnceLock::new(),
                    conditions: Arc::default(),
                    tasks: Mutex::default(),
                }
            });
            if fresh {
                // Others may have reserved it before this one came.
                self.deny_all(&self.state());
                return Ok(Arc::clone(&sharer.conditions));
            }
            if sharer.initiator == *initiator {
                // Relaxed: those who share and unshare for one host hold a lock over it.
                return match sharer.present.swap(true, Ordering::Relaxed) {
                    true => Err(ShareError::Taken(initiator.clone())),
                    false => Ok(Arc::clone(&sharer.conditions)),
                };
            }
        }
        Err(ShareError::Full)
    }

    /// The initiator with `own` has it no longer. What it has registered and reserved persistently stays, as when it goes.
    pub(super) fn unshare(&self, own: &Arc<Conditions>) {
        self.lose_nexus(own);
        let mut sharers = self.sharers();
        if let Some(own) = sharers.find(|sharer| Arc::ptr_eq(&sharer.conditions, own)) {
            own.present.store(false, Ordering::Relaxed);
        }
    }

    fn sharers(&self) -> impl Iterator<Item = &Sharer> {
        self.shared.sharers.iter().map_while(OnceLock::get)
    }

    /// This has happened to it: every initiator but `own` is told.
    pub(super) fn attend_others(&self, own: &Arc<Conditions>, attention: Attention) {
        for sharer in self.sharers() {
            if !Arc::ptr_eq(&sharer.conditions, own) {
                sharer.conditions.establish(attention);
                sharer.hear(attention);
            }
        }
    }

    /// The initiator with `own` has it there.
    pub(super) fn announce(
        &self,
        own: &Arc<Conditions>,
        (target, lun): (u8, Lun),
        listener: &Arc<dyn Listen>,
    ) {
        let mut sharers = self.sharers();
        if let Some(own) = sharers.find(|sharer| Arc::ptr_eq(&sharer.conditions, own)) {
            let place = u32::from(target) << 16 | u32::from(lun.get());
            own.place.store(place, Ordering::Relaxed);
            // A host has one listener, for as long as it is there. Whoever finds it finds the place.
            own.listener.get_or_init(|| Arc::clone(listener));
        }
    }

    /// Its persistent reservations are kept by `keeper`, which has kept `kept`.
    #[must_use]
    pub fn with_keeper(self, keeper: Box<dyn Keep>, kept: Reservations) -> LogicalUnit {
        // A unit has one keeper: the first.
        if self.shared.keeper.set(keeper).is_ok() {
            self.state().reservations = kept;
            self.deny_all(&self.state());
        }
        self
    }

    pub(super) fn keeps_reservations(&self) -> bool {
        self.shared.keeper.get().is_some()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        lock(&self.shared.state)
    }

    /// `None` while it is being changed.
    pub(super) fn try_state(&self) -> Option<MutexGuard<'_, State>> {
        self.shared.state.try_lock().ok()
    }

    /// Where the commands of the initiator with `own` are looked for.
    pub(super) fn watch(&self, own: &Arc<Conditions>, tasks: &Arc<dyn Tasks>) {
        let mut sharers = self.sharers();
        if let Some(own) = sharers.find(|sharer| Arc::ptr_eq(&sharer.conditions, own)) {
            let (mut all, new) = (lock(&own.tasks), Arc::downgrade(tasks));
            all.retain(|tasks| tasks.strong_count() > 0 && !tasks.ptr_eq(&new));
            all.push(new);
        }
    }

    /// Each initiator is denied what the reservations deny it.
    fn deny_all(&self, state: &State) {
        for sharer in self.sharers() {
            let denial = state.reservations.denial(&sharer.initiator);
            let own = |owner: &Arc<Conditions>| Arc::ptr_eq(owner, &sharer.conditions);
            let reserved = state.reserved.as_ref().is_some_and(|owner| !own(owner));
            let kinds = [
                (denial.reads, denied::READS),
                (denial.writes, denied::WRITES),
                (reserved, denied::RESERVED),
            ];
            let kinds = kinds.into_iter().filter(|(denies, _)| *denies);
            let all = denied::READS | denied::WRITES | denied::RESERVED;
            sharer
                .conditions
                .deny(all, kinds.fold(0, |all, (_, kind)| all | kind));
        }
    }

    /// RESERVE of SPC-2 is undone: whoever did it, or if it was `own`.
    pub(super) fn forget_reserve(&self, state: &mut State, own: Option<&Arc<Conditions>>) {
        let ends = |owner: &Arc<Conditions>| own.is_none_or(|own| Arc::ptr_eq(own, owner));
        if state.reserved.as_ref().is_some_and(ends) {
            state.reserved = None;
            self.deny_all(state);
        }
    }

    /// The initiator with `own` has come, or has gone.
    pub(super) fn lose_nexus(&self, own: &Arc<Conditions>) {
        self.forget_reserve(&mut self.state(), Some(own));
    }

    /// Carries out a command that changes what is reserved.
    pub(super) fn settle(
        &self,
        initiator: &Initiator,
        own: &Arc<Conditions>,
        cdb: &Cdb,
        parameters: &[u8],
    ) -> Settlement {
        let _changing = lock(&self.shared.changing);
        match cdb.opcode() {
            0x16 | 0x56 => Settlement::at_once(self.reserve(initiator, own)),
            0x17 | 0x57 => Settlement::at_once(self.release(initiator, own)),
            _ => match self.change(initiator, cdb, parameters) {
                Ok(outcome) => Settlement {
                    action: Action::Good,
                    aborted: self.abort(&outcome.aborted),
                },
                Err(action) => Settlement::at_once(action),
            },
        }
    }

    /// SPC-2, 7.21, and what SPC-4, 5.13.3 leaves of it.
    fn reserve(&self, initiator: &Initiator, own: &Arc<Conditions>) -> Action {
        let mut state = self.state();
        if !state.reservations.registrants().is_empty() {
            return excused(state.reservations.excuses(initiator));
        }
        if let Some(owner) = &state.reserved
            && !Arc::ptr_eq(owner, own)
        {
            return Action::Conflict;
        }
        state.reserved = Some(Arc::clone(own));
        self.deny_all(&state);
        Action::Good
    }

    fn release(&self, initiator: &Initiator, own: &Arc<Conditions>) -> Action {
        let mut state = self.state();
        if !state.reservations.registrants().is_empty() {
            return excused(state.reservations.excuses(initiator));
        }
        // Of one that is another's, nothing is released, and that is no error.
        self.forget_reserve(&mut state, Some(own));
        Action::Good
    }

    /// PERSISTENT RESERVE OUT. What it leads to is durable first, if it is to be, then in force, then told.
    fn change(
        &self,
        initiator: &Initiator,
        cdb: &Cdb,
        parameters: &[u8],
    ) -> Result<Outcome, Action> {
        let keeper = self.shared.keeper.get();
        let out = persistent::parse_out(cdb, parameters, keeper.is_some());
        let out = out.map_err(Action::Check)?;
        let before = {
            let state = self.state();
            if state.reserved.is_some() {
                return Err(Action::Conflict);
            }
            state.reservations.clone()
        };
        let outcome = before.out(initiator, &out).map_err(persistent::refused)?;
        let kept = before.is_persistent() || outcome.next.is_persistent();
        if let Some(keeper) = keeper.filter(|_| kept && before != outcome.next)
            && keeper.keep(&outcome.next).is_err()
        {
            return Err(Action::Check(Sense::INTERNAL_FAILURE));
        }
        let mut state = self.state();
        state.reservations = outcome.next.clone();
        self.deny_all(&state);
        drop(state);
        for (told, attention) in &outcome.attentions {
            let mut sharers = self.sharers();
            if let Some(sharer) = sharers.find(|sharer| sharer.initiator == *told) {
                sharer.conditions.establish(*attention);
            }
        }
        Ok(outcome)
    }

    /// Asks for the end of all commands of these initiators.
    fn abort(&self, initiators: &[Initiator]) -> Vec<(Arc<dyn Tasks>, u64)> {
        let sharers = self.sharers();
        let sharers = sharers.filter(|sharer| initiators.contains(&sharer.initiator));
        let tasks = sharers.flat_map(|sharer| lock(&sharer.tasks).clone());
        let tasks = tasks.filter_map(|tasks| tasks.upgrade());
        tasks
            .map(|tasks| {
                let number = tasks.ask();
                (tasks, number)
            })
            .collect()
    }
}

fn excused(excused: bool) -> Action {
    match excused {
        true => Action::Good,
        false => Action::Conflict,
    }
}
