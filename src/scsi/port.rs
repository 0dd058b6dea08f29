//! The target port through which an initiator reaches a logical unit. Each socket is the one port of its initiator: it sees
//! no other way to the unit, so there is one group with one port, and access does not change.

use super::sense::Sense;
use super::target::Seat;
use super::{Action, Exchange, Result};

/// The one port, counted from 1 (SPC-4, 7.8.6.7).
pub(super) const RELATIVE_PORT: [u8; 2] = [0, 1];
/// The one group.
pub(super) const GROUP: [u8; 2] = [0, 1];
/// TPGS of INQUIRY: states change, if ever, without being asked to.
pub(super) const TPGS: u8 = 0x10;

/// SPC-4, 6.37.
pub(super) fn report_target_port_groups(
    _seat: &Seat<'_>,
    exchange: &mut Exchange<'_>,
) -> Result<Action> {
    let cdb = exchange.cdb;
    let out = &mut exchange.data_in;
    out.put(&[0; 4]);
    match cdb.byte(1) >> 5 {
        0 => {}
        // The extended header: no transition takes any time.
        1 => out.put(&[0x10, 0, 0, 0]),
        _ => return Err(Sense::in_cdb(1, 7)),
    }
    // ACTIVE/OPTIMIZED, which is the one state that there is.
    out.put(&[0x00, 0x01]);
    out.put(&GROUP);
    // No status code; one port.
    out.put(&[0, 0, 0, 1]);
    out.put(&[0, 0]);
    out.put(&RELATIVE_PORT);
    let len = u32::try_from(out.len() - 4).unwrap_or(0);
    out.set(0, &len.to_be_bytes());
    out.truncate(cdb.be32(6));
    Ok(Action::Good)
}
