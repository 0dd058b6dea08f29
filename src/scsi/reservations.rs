//! Persistent reservations of a logical unit (SPC-4, 5.13): who is registered, who holds the reservation, and what PERSISTENT
//! RESERVE OUT makes of that.
//!
//! A [`Reservations`] is a value. [`Reservations::out`] says what comes after a command, and nothing has changed yet: so it
//! can be made durable first. I_T nexuses are told apart by their initiators alone, since a unit has one target port.
//! Start at [`Reservations::out`].

use super::attention::Attention;
use super::initiator::Initiator;
use super::sense::{Sense, key};

/// The most registrations of a logical unit. More are refused (SPC-4, 5.13.7).
pub const MAX_REGISTRANTS: usize = 64;

/// What a reservation keeps from whom (SPC-4, table 67).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// All but its holder may only read.
    WriteExclusive = 1,
    /// All but its holder may not even read.
    ExclusiveAccess = 3,
    /// All that are not registered may only read.
    WriteExclusiveRegistrantsOnly = 5,
    /// All that are not registered may not even read.
    ExclusiveAccessRegistrantsOnly = 6,
    /// The same, and all that are registered hold it.
    WriteExclusiveAllRegistrants = 7,
    /// The same, and all that are registered hold it.
    ExclusiveAccessAllRegistrants = 8,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 6] = [
        Kind::WriteExclusive,
        Kind::ExclusiveAccess,
        Kind::WriteExclusiveRegistrantsOnly,
        Kind::ExclusiveAccessRegistrantsOnly,
        Kind::WriteExclusiveAllRegistrants,
        Kind::ExclusiveAccessAllRegistrants,
    ];

    /// The one with this code.
    #[must_use]
    pub fn of(code: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| *kind as u8 == code)
    }

    fn is_of_all_registrants(self) -> bool {
        self as u8 >= Kind::WriteExclusiveAllRegistrants as u8
    }

    /// Those that are registered are not kept out.
    fn spares_registrants(self) -> bool {
        self as u8 >= Kind::WriteExclusiveRegistrantsOnly as u8
    }

    fn keeps_readers_out(self) -> bool {
        matches!(
            self,
            Kind::ExclusiveAccess
                | Kind::ExclusiveAccessRegistrantsOnly
                | Kind::ExclusiveAccessAllRegistrants
        )
    }
}

/// A registered I_T nexus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registrant {
    /// Its initiator port.
    pub initiator: Initiator,
    /// Its reservation key; not 0.
    pub key: u64,
    /// It registered for all target ports. There is one.
    pub all_ports: bool,
}

/// The reservation. Its scope is the logical unit, the only one there is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reservation {
    /// Its type.
    pub kind: Kind,
    /// Who holds it; nobody in particular when all registrants do.
    pub holder: Option<Initiator>,
}

/// What an initiator may not do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Denial {
    /// To read.
    pub reads: bool,
    /// To write.
    pub writes: bool,
}

/// All registrations of a logical unit, and its reservation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reservations {
    generation: u32,
    registrants: Vec<Registrant>,
    reservation: Option<Reservation>,
    /// APTPL: they are to survive a loss of power.
    persistent: bool,
}

/// A service action of PERSISTENT RESERVE OUT (SPC-4, 6.16.2). REGISTER AND MOVE is not one of ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Action {
    Register { ignore_existing: bool },
    Reserve,
    Release,
    Clear,
    Preempt { abort: bool },
}

/// PERSISTENT RESERVE OUT, its CDB and its parameter list taken apart.
#[derive(Clone, Copy, Debug)]
pub(super) struct Out {
    pub(super) action: Action,
    /// SCOPE and TYPE, as they are in byte 2.
    pub(super) scope_and_type: u8,
    /// RESERVATION KEY.
    pub(super) key: u64,
    /// SERVICE ACTION RESERVATION KEY.
    pub(super) action_key: u64,
    pub(super) all_ports: bool,
    /// APTPL.
    pub(super) persistent: bool,
}

/// Why a command is not carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// RESERVATION CONFLICT.
    Conflict,
    Check(Sense),
}

/// What comes of a command.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    pub(super) next: Reservations,
    /// Whom to tell what.
    pub(super) attentions: Vec<(Initiator, Attention)>,
    /// Whose commands must have ended before this one does.
    pub(super) aborted: Vec<Initiator>,
}

type Result<T> = std::result::Result<T, Refusal>;

impl Reservations {
    /// What was kept over a restart. PRGENERATION begins anew (SPC-4, 5.13.8). `None` when no commands can have led there.
    #[must_use]
    pub fn restored(
        registrants: Vec<Registrant>,
        reservation: Option<Reservation>,
    ) -> Option<Reservations> {
        let restored = Reservations {
            generation: 0,
            registrants,
            reservation,
            persistent: true,
        };
        let all = &restored.registrants;
        let twice = |at: usize| {
            let earlier = &all[..at];
            earlier.iter().any(|one| one.initiator == all[at].initiator)
        };
        let holder = match &restored.reservation {
            None => true,
            Some(Reservation { kind, holder }) => match holder {
                None => kind.is_of_all_registrants() && !all.is_empty(),
                Some(holder) => {
                    !kind.is_of_all_registrants() && restored.registrant(holder).is_some()
                }
            },
        };
        let fits = all.len() <= MAX_REGISTRANTS && all.iter().all(|one| one.key != 0);
        (fits && holder && !(0..all.len()).any(twice)).then_some(restored)
    }

    /// PRGENERATION.
    #[must_use]
    pub fn generation(&self) -> u32 {
        self.generation
    }

    /// All registrations, the oldest first.
    #[must_use]
    pub fn registrants(&self) -> &[Registrant] {
        &self.registrants
    }

    /// The reservation, if there is one.
    #[must_use]
    pub fn reservation(&self) -> Option<&Reservation> {
        self.reservation.as_ref()
    }

    /// Whether they are to survive a loss of power (APTPL).
    #[must_use]
    pub fn is_persistent(&self) -> bool {
        self.persistent
    }

    pub(super) fn registrant(&self, initiator: &Initiator) -> Option<&Registrant> {
        self.registrants
            .iter()
            .find(|registrant| registrant.initiator == *initiator)
    }

    /// Whether a registrant holds the reservation.
    pub(super) fn holds(&self, initiator: &Initiator) -> bool {
        self.reservation
            .as_ref()
            .is_some_and(|reservation| match &reservation.holder {
                Some(holder) => holder == initiator,
                None => self.registrant(initiator).is_some(),
            })
    }

    /// Whether an initiator's RESERVE and RELEASE succeed and change nothing (SPC-4, 5.13.3).
    pub(super) fn excuses(&self, initiator: &Initiator) -> bool {
        let spared = self
            .reservation
            .as_ref()
            .is_some_and(|reservation| reservation.kind.spares_registrants());
        self.holds(initiator) || (spared && self.registrant(initiator).is_some())
    }

    /// What an initiator may not do (SPC-4, table 65).
    pub(super) fn denial(&self, initiator: &Initiator) -> Denial {
        match &self.reservation {
            Some(reservation) if !self.holds(initiator) => {
                let spared =
                    reservation.kind.spares_registrants() && self.registrant(initiator).is_some();
                Denial {
                    reads: reservation.kind.keeps_readers_out() && !spared,
                    writes: !spared,
                }
            }
            _ => Denial::default(),
        }
    }

    /// What PERSISTENT RESERVE OUT from an initiator comes to.
    pub(super) fn out(&self, from: &Initiator, out: &Out) -> Result<Outcome> {
        let mut outcome = Outcome {
            next: self.clone(),
            ..Outcome::default()
        };
        let ignore_existing = Action::Register {
            ignore_existing: true,
        };
        let known = match self.registrant(from) {
            Some(registrant) => out.key == registrant.key,
            // Who is not registered can only become so.
            None => matches!(out.action, Action::Register { .. }) && out.key == 0,
        };
        if !known && out.action != ignore_existing {
            return Err(Refusal::Conflict);
        }
        match out.action {
            Action::Register { .. } => outcome.register(from, out)?,
            Action::Reserve => outcome.reserve(from, out)?,
            Action::Release => outcome.release(from, out)?,
            Action::Clear => outcome.clear(from),
            Action::Preempt { abort } => outcome.preempt(from, out, abort)?,
        }
        let counts = !matches!(out.action, Action::Reserve | Action::Release);
        let generation = &mut outcome.next.generation;
        *generation = generation.wrapping_add(counts.into());
        Ok(outcome)
    }
}

/// SCOPE must be that of a logical unit, TYPE one that there is.
fn kind_of(scope_and_type: u8) -> Result<Kind> {
    if scope_and_type >> 4 != 0 {
        return Err(Refusal::Check(Sense::in_cdb(2, 7)));
    }
    Kind::of(scope_and_type & 0x0f).ok_or(Refusal::Check(Sense::in_cdb(2, 3)))
}

impl Outcome {
    fn tell_registrants_but(&mut self, from: &Initiator, attention: Attention) {
        let others = self.next.registrants.iter();
        let others = others.filter(|registrant| registrant.initiator != *from);
        let told = others.map(|registrant| (registrant.initiator.clone(), attention));
        self.attentions.extend(told);
    }

    /// SPC-4, 5.13.7.
    fn register(&mut self, from: &Initiator, out: &Out) -> Result<()> {
        self.next.persistent = out.persistent;
        let registrants = &mut self.next.registrants;
        let own = registrants.iter().position(|own| own.initiator == *from);
        match (own, out.action_key) {
            (None, 0) => {}
            (None, _) if registrants.len() == MAX_REGISTRANTS => {
                let full = Sense::new(key::ILLEGAL_REQUEST, 0x55, 0x04);
                return Err(Refusal::Check(full));
            }
            (None, key) => registrants.push(Registrant {
                initiator: from.clone(),
                key,
                all_ports: out.all_ports,
            }),
            (Some(own), 0) => {
                registrants.remove(own);
                self.drop_unheld(from);
            }
            (Some(own), key) => {
                registrants[own].key = key;
                registrants[own].all_ports = out.all_ports;
            }
        }
        Ok(())
    }

    /// A reservation ends when its holder's registration does, and so does one of all when no registration is left
    /// (SPC-4, 5.13.11.2.3).
    fn drop_unheld(&mut self, from: &Initiator) {
        let Some(reservation) = &self.next.reservation else {
            return;
        };
        let held = match &reservation.holder {
            Some(holder) => self.next.registrant(holder).is_some(),
            None => !self.next.registrants.is_empty(),
        };
        if held {
            return;
        }
        let told = reservation.kind.spares_registrants();
        self.next.reservation = None;
        if told {
            self.tell_registrants_but(from, Attention::ReservationsReleased);
        }
    }

    /// SPC-4, 5.13.9.
    fn reserve(&mut self, from: &Initiator, out: &Out) -> Result<()> {
        if let Some(reservation) = &self.next.reservation {
            let same = out.scope_and_type == reservation.kind as u8;
            return match same && self.next.holds(from) {
                true => Ok(()),
                false => Err(Refusal::Conflict),
            };
        }
        let kind = kind_of(out.scope_and_type)?;
        self.establish(from, kind);
        Ok(())
    }

    fn establish(&mut self, from: &Initiator, kind: Kind) {
        let holder = (!kind.is_of_all_registrants()).then(|| from.clone());
        self.next.reservation = Some(Reservation { kind, holder });
    }

    /// SPC-4, 5.13.11.2.2.
    fn release(&mut self, from: &Initiator, out: &Out) -> Result<()> {
        let Some(kind) = self.next.reservation.as_ref().map(|held| held.kind) else {
            return Ok(());
        };
        if !self.next.holds(from) {
            return Ok(());
        }
        if out.scope_and_type != kind as u8 {
            kind_of(out.scope_and_type)?;
            // INVALID RELEASE OF PERSISTENT RESERVATION.
            let other = Sense::new(key::ILLEGAL_REQUEST, 0x26, 0x04);
            return Err(Refusal::Check(other));
        }
        self.next.reservation = None;
        if kind.spares_registrants() {
            self.tell_registrants_but(from, Attention::ReservationsReleased);
        }
        Ok(())
    }

    /// SPC-4, 5.13.11.2.6.
    fn clear(&mut self, from: &Initiator) {
        self.tell_registrants_but(from, Attention::ReservationsPreempted);
        self.next.registrants.clear();
        self.next.reservation = None;
    }

    /// SPC-4, 5.13.11.2.4.
    fn preempt(&mut self, from: &Initiator, out: &Out, abort: bool) -> Result<()> {
        const KEY: Sense = Sense::in_parameters(8);
        let held = self.next.reservation.clone();
        let holder = held.as_ref().and_then(|held| held.holder.as_ref());
        let holder_key = holder.and_then(|holder| self.next.registrant(holder));
        let of_all = held.as_ref().is_some_and(|held| held.holder.is_none());
        let whole = match holder_key {
            Some(registrant) => registrant.key == out.action_key,
            None => of_all && out.action_key == 0,
        };
        if out.action_key == 0 && !whole {
            return Err(Refusal::Check(KEY));
        }
        // When the reservation goes, the preempting nexus stays whatever its key.
        let goes = |one: &Registrant| match whole {
            true => one.initiator != *from && (of_all || one.key == out.action_key),
            false => one.key == out.action_key,
        };
        let before = self.next.registrants.iter();
        let (gone, stay): (Vec<Registrant>, Vec<Registrant>) = before.cloned().partition(goes);
        if gone.is_empty() && !whole {
            return Err(Refusal::Conflict);
        }
        let kind = match whole {
            true => Some(kind_of(out.scope_and_type)?),
            false => None,
        };
        self.next.registrants = stay;
        if let Some(kind) = kind {
            self.establish(from, kind);
            if held.is_some_and(|held| held.kind != kind) {
                self.tell_registrants_but(from, Attention::ReservationsReleased);
            }
        } else {
            self.drop_unheld(from);
        }
        for registrant in gone {
            if registrant.initiator == *from {
                continue;
            }
            let told = (
                registrant.initiator.clone(),
                Attention::RegistrationsPreempted,
            );
            self.attentions.push(told);
            if abort {
                self.aborted.push(registrant.initiator);
            }
        }
        Ok(())
    }
}
