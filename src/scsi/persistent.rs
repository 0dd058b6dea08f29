//! PERSISTENT RESERVE IN and OUT (SPC-4, 6.15 and 6.16), and RESERVE and RELEASE of SPC-2 beside them.
//!
//! What changes reservations is not done where commands are taken from a ring: [`Action::Defer`] says so, and
//! [`Nexus::settle`](super::Nexus::settle) does it on a thread that may wait, for a disk and for other initiators' commands
//! to end.

use super::command::Cdb;
use super::reservations::{self, Kind, Out, Refusal, Registrant};
use super::sense::Sense;
use super::target::Seat;
use super::unit::{LogicalUnit, State};
use super::{Action, DataIn, Exchange, Result};

/// Bytes of the parameter list of PERSISTENT RESERVE OUT, without TransportIDs.
pub const PARAMETER_BYTES: usize = 24;

/// Bytes of READ FULL STATUS at most: its header, and for each registrant a descriptor with a TransportID.
pub(super) const MAX_FULL_STATUS: usize =
    8 + reservations::MAX_REGISTRANTS * (24 + super::initiator::MAX_TRANSPORT_ID);

/// Somebody else may have to be waited for.
pub(super) fn defer(_seat: &Seat<'_>, _exchange: &mut Exchange<'_>) -> Result<Action> {
    Ok(Action::Defer)
}

/// The parts of a command that changes persistent reservations. `keeps` says whether a loss of power can be survived.
pub(super) fn parse_out(cdb: &Cdb, parameters: &[u8], keeps: bool) -> Result<Out> {
    const SPEC_I_PT: u8 = 0x08;
    const ALL_TG_PT: u8 = 0x04;
    const APTPL: u8 = 0x01;
    const FLAGS: u16 = 20;
    use reservations::Action as Service;
    let action = match cdb.byte(1) & 0x1f {
        0 => Service::Register {
            ignore_existing: false,
        },
        1 => Service::Reserve,
        2 => Service::Release,
        3 => Service::Clear,
        4 => Service::Preempt { abort: false },
        5 => Service::Preempt { abort: true },
        6 => Service::Register {
            ignore_existing: true,
        },
        _ => return Err(Sense::in_cdb(1, 4)),
    };
    let registers = matches!(action, Service::Register { .. });
    let flags = parameters.get(usize::from(FLAGS)).copied().unwrap_or(0);
    // With it the list is longer; it is the flag that is refused.
    if registers && flags & SPEC_I_PT != 0 {
        return Err(Sense::in_parameter_bit(FLAGS, 3));
    }
    let Ok(list) = <&[u8; PARAMETER_BYTES]>::try_from(parameters) else {
        return Err(Sense::PARAMETER_LENGTH);
    };
    let persistent = registers && flags & APTPL != 0;
    if persistent && !keeps {
        return Err(Sense::in_parameter_bit(FLAGS, 0));
    }
    let key = |at: usize| {
        let bytes = list[at..at + 8].iter();
        bytes.fold(0, |key, byte| key << 8 | u64::from(*byte))
    };
    Ok(Out {
        action,
        scope_and_type: cdb.byte(2),
        key: key(0),
        action_key: key(8),
        all_ports: flags & ALL_TG_PT != 0,
        persistent,
    })
}

/// What a refused command comes to.
pub(super) fn refused(refusal: Refusal) -> Action {
    match refusal {
        Refusal::Conflict => Action::Conflict,
        Refusal::Check(sense) => Action::Check(sense),
    }
}

/// Says what `fill` puts there, unless the state is being changed at this moment, or reserved otherwise: then all of
/// these commands conflict, whoever sends them (SPC-2, 5.5.1).
fn say(
    seat: &Seat<'_>,
    exchange: &mut Exchange<'_>,
    fill: fn(&LogicalUnit, &State, &mut DataIn<'_>),
) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    let Some(state) = unit.try_state() else {
        return Ok(Action::Busy);
    };
    if state.reserved.is_some() {
        return Ok(Action::Conflict);
    }
    fill(unit, &state, &mut exchange.data_in);
    exchange.data_in.truncate(exchange.cdb.be16(7).into());
    Ok(Action::Good)
}

fn header(state: &State, len: usize, out: &mut DataIn<'_>) {
    out.put(&state.reservations.generation().to_be_bytes());
    out.put(&u32::try_from(len).unwrap_or(0).to_be_bytes());
}

pub(super) fn read_keys(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    say(seat, exchange, |_, state, out| {
        let registrants = state.reservations.registrants();
        header(state, registrants.len() * 8, out);
        for registrant in registrants {
            out.put(&registrant.key.to_be_bytes());
        }
    })
}

pub(super) fn read_reservation(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    say(seat, exchange, |_, state, out| {
        let Some(reservation) = state.reservations.reservation() else {
            return header(state, 0, out);
        };
        header(state, 16, out);
        let holder = reservation.holder.as_ref();
        let holder = holder.and_then(|holder| state.reservations.registrant(holder));
        // One of all registrants has no key.
        out.put(&holder.map_or(0, |holder| holder.key).to_be_bytes());
        out.put(&[0, 0, 0, 0, 0, reservation.kind as u8, 0, 0]);
    })
}

pub(super) fn report_capabilities(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    say(seat, exchange, |unit, state, out| {
        const CRH: u8 = 0x10;
        const ATP_C: u8 = 0x04;
        const TMV: u8 = 0x80;
        // 001b: TEST UNIT READY is always allowed.
        const ALLOW_COMMANDS: u8 = 0x10;
        let keeps = u8::from(unit.keeps_reservations());
        let kept = u8::from(state.reservations.is_persistent());
        out.put(&[0, 8, CRH | ATP_C | keeps, TMV | ALLOW_COMMANDS | kept]);
        let mask = Kind::ALL.iter().fold(0_u16, |mask, kind| {
            // The first byte has the types below 8, the second one those from there on.
            mask | 1 << ((*kind as u8 + 8) % 16)
        });
        out.put(&mask.to_be_bytes());
        out.put(&[0, 0]);
    })
}

pub(super) fn read_full_status(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    say(seat, exchange, |_, state, out| {
        header(state, 0, out);
        for registrant in state.reservations.registrants() {
            full_status(state, registrant, out);
        }
        let len = u32::try_from(out.len() - 8).unwrap_or(0);
        out.set(4, &len.to_be_bytes());
    })
}

fn full_status(state: &State, registrant: &Registrant, out: &mut DataIn<'_>) {
    let holds = state.reservations.holds(&registrant.initiator);
    let kind = state.reservations.reservation().filter(|_| holds);
    let kind = kind.map_or(0, |reservation| reservation.kind as u8);
    let flags = u8::from(registrant.all_ports) << 1 | u8::from(holds);
    out.put(&registrant.key.to_be_bytes());
    out.put(&[0, 0, 0, 0, flags, kind, 0, 0, 0, 0]);
    // The relative port 1, and the length of what follows.
    out.put(&[0, 1, 0, 0, 0, 0]);
    let start = out.len();
    registrant.initiator.transport_id(out);
    let len = u32::try_from(out.len() - start).unwrap_or(0);
    out.set(start - 4, &len.to_be_bytes());
}
