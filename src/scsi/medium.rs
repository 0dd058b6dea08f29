//! The commands that reach the blocks of a logical unit (SBC-3, clause 5), and those that say how many there are.

use super::command::Cdb;
use super::sense::Sense;
use super::target::Seat;
use super::unit::LogicalUnit;
use super::{Action, Carry, Exchange, Result};
use crate::block::{Against, BlockCount, BlockOp, BlockRange, Lba, MAX_RANGES};

/// The most blocks of one COMPARE AND WRITE, likewise. Others wait for as long as it takes.
pub const MAX_COMPARE_BLOCKS: u8 = 32;

/// The most blocks of one WRITE SAME, as the block limits page says.
pub const MAX_WRITE_SAME_BLOCKS: u32 = 1 << 22;

/// `count` blocks from `lba` on, if the logical unit has them. None of them from its end on are fine.
pub(super) fn range(unit: &LogicalUnit, lba: u64, count: u32) -> Result<BlockRange> {
    let end = lba.checked_add(count.into());
    match end {
        Some(end) if end <= unit.geometry().blocks() => {
            Ok(BlockRange::new(Lba::new(lba), BlockCount::new(count)))
        }
        _ => Err(Sense::OUT_OF_RANGE),
    }
}

pub(super) fn writable(unit: &LogicalUnit) -> Result<()> {
    if unit.geometry().read_only() {
        return Err(Sense::WRITE_PROTECTED);
    }
    match unit.modes().write_protected {
        true => Err(Sense::SOFTWARE_WRITE_PROTECTED),
        false => Ok(()),
    }
}

fn transfer(seat: &Seat<'_>, write: bool, lba: u64, count: u32, fua: bool) -> Result<Action> {
    let (unit, index) = seat.unit()?;
    if write {
        writable(unit)?;
    }
    let range = range(unit, lba, count)?;
    if count == 0 {
        return Ok(Action::Good);
    }
    let bytes = u64::from(count) << unit.geometry().block_shift();
    Ok(Action::Carry(Carry {
        op: if write {
            BlockOp::Write(range)
        } else {
            BlockOp::Read(range)
        },
        unit: index,
        fua: write && (fua || unit.writes_through()),
        data_in: if write { 0 } else { bytes },
        data_out: if write { bytes } else { 0 },
    }))
}

/// LBA and count of a 6-byte CDB. No blocks means 256 of them.
fn extent_6(cdb: &Cdb) -> (u64, u32) {
    let count = match cdb.byte(4) {
        0 => 256,
        count => count.into(),
    };
    (u64::from(cdb.be32(0) & 0x1f_ffff), count)
}

fn extent_10(cdb: &Cdb) -> (u64, u32) {
    (cdb.be32(2).into(), cdb.be16(7).into())
}

fn extent_12(cdb: &Cdb) -> (u64, u32) {
    (cdb.be32(2).into(), cdb.be32(6))
}

fn extent_16(cdb: &Cdb) -> (u64, u32) {
    (cdb.be64(2), cdb.be32(10))
}

/// A durable read is one whose blocks are durable: NVMe reads what was written, wherever it is, so FUA changes nothing.
macro_rules! transfers {
    ($($read:ident, $write:ident: $extent:ident, $fua:expr;)+) => {$(
        pub(super) fn $read(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
            let (lba, count) = $extent(exchange.cdb);
            transfer(seat, false, lba, count, false)
        }

        pub(super) fn $write(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
            let (lba, count) = $extent(exchange.cdb);
            let fua: fn(&Cdb) -> bool = $fua;
            transfer(seat, true, lba, count, fua(exchange.cdb))
        }
    )+};
}

transfers! {
    read_6, write_6: extent_6, |_| false;
    read_10, write_10: extent_10, |cdb| cdb.bit(1, 3);
    read_12, write_12: extent_12, |cdb| cdb.bit(1, 3);
    read_16, write_16: extent_16, |cdb| cdb.bit(1, 3);
}

/// BYTCHK of VERIFY: what the blocks have to be, and how many bytes the initiator sends for that.
fn verify(seat: &Seat<'_>, exchange: &Exchange<'_>, (lba, count): (u64, u32)) -> Result<Action> {
    let (unit, index) = seat.unit()?;
    let block_bytes = u64::from(unit.geometry().block_bytes());
    let (against, data_out) = match exchange.cdb.byte(1) >> 1 & 3 {
        0 => (Against::Nothing, 0),
        1 => (Against::Data, u64::from(count) * block_bytes),
        3 => (Against::Block, block_bytes),
        _ => return Err(Sense::in_cdb(1, 2)),
    };
    let range = range(unit, lba, count)?;
    if count == 0 {
        return Ok(Action::Good);
    }
    Ok(Action::Carry(Carry {
        op: BlockOp::Verify { range, against },
        unit: index,
        fua: false,
        data_in: 0,
        data_out,
    }))
}

/// What was written has to be on the medium before it is verified: a durable write.
fn write_and_verify(
    seat: &Seat<'_>,
    exchange: &Exchange<'_>,
    (lba, count): (u64, u32),
) -> Result<Action> {
    let against = match exchange.cdb.byte(1) >> 1 & 3 {
        0 => Against::Nothing,
        1 => Against::Data,
        _ => return Err(Sense::in_cdb(1, 2)),
    };
    Ok(match transfer(seat, true, lba, count, true)? {
        Action::Carry(
            carry @ Carry {
                op: BlockOp::Write(range),
                ..
            },
        ) => Action::Carry(Carry {
            op: BlockOp::WriteAndVerify { range, against },
            ..carry
        }),
        other => other,
    })
}

/// The same for each length of CDB.
macro_rules! verifications {
    ($($verify:ident, $write:ident: $extent:ident;)+) => {$(
        pub(super) fn $verify(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
            verify(seat, exchange, $extent(exchange.cdb))
        }

        pub(super) fn $write(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
            write_and_verify(seat, exchange, $extent(exchange.cdb))
        }
    )+};
}

verifications! {
    verify_10, write_and_verify_10: extent_10;
    verify_12, write_and_verify_12: extent_12;
    verify_16, write_and_verify_16: extent_16;
}

/// Twice the data: what the blocks have to be, and what they are to become.
pub(super) fn compare_and_write(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let cdb = exchange.cdb;
    let (unit, index) = seat.unit()?;
    let (lba, count) = (cdb.be64(2), cdb.byte(13));
    writable(unit)?;
    if count > MAX_COMPARE_BLOCKS {
        return Err(Sense::in_cdb(13, 7));
    }
    let range = range(unit, lba, count.into())?;
    if count == 0 {
        return Ok(Action::Good);
    }
    Ok(Action::Carry(Carry {
        op: BlockOp::CompareAndWrite(range),
        unit: index,
        fua: cdb.bit(1, 3) || unit.writes_through(),
        data_in: 0,
        data_out: u64::from(count) << (unit.geometry().block_shift() + 1),
    }))
}

fn nothing_moves(op: BlockOp, unit: usize) -> Action {
    Action::Carry(Carry {
        op,
        unit,
        fua: false,
        data_in: 0,
        data_out: 0,
    })
}

/// All of the cache is written back, whichever part was asked for. No blocks means up to the end.
fn synchronize(seat: &Seat<'_>, (lba, count): (u64, u32)) -> Result<Action> {
    let (unit, index) = seat.unit()?;
    range(unit, lba, count)?;
    Ok(nothing_moves(BlockOp::Flush, index))
}

pub(super) fn synchronize_cache_10(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    synchronize(seat, extent_10(exchange.cdb))
}

pub(super) fn synchronize_cache_16(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    synchronize(seat, extent_16(exchange.cdb))
}

/// No cache holds blocks to be read, so none of them fits: GOOD, and nothing is done. No blocks means up to the end.
fn pre_fetch(seat: &Seat<'_>, (lba, count): (u64, u32)) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    range(unit, lba, count)?;
    Ok(Action::Good)
}

pub(super) fn pre_fetch_10(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    pre_fetch(seat, extent_10(exchange.cdb))
}

pub(super) fn pre_fetch_16(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    pre_fetch(seat, extent_16(exchange.cdb))
}

/// A namespace does not tell on a queue of ours which of its blocks are allocated: they all are mapped, or their state is
/// not known, which is the same provisioning status.
pub(super) fn get_lba_status(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    let (lba, allocation_length) = extent_16(exchange.cdb);
    let blocks = unit.geometry().blocks();
    let left = blocks.checked_sub(lba).filter(|left| *left > 0);
    let left = left.ok_or(Sense::OUT_OF_RANGE)?;
    // What one descriptor has room for; an initiator asks again from where it ends.
    let count = u32::try_from(left).unwrap_or(u32::MAX);
    let out = &mut exchange.data_in;
    out.put(&20_u32.to_be_bytes());
    out.put(&[0; 4]);
    out.put(&lba.to_be_bytes());
    out.put(&count.to_be_bytes());
    out.put(&[0; 4]);
    out.truncate(allocation_length);
    Ok(Action::Good)
}

/// A block with the same content for each block of a range. `count_at` is where the CDB says how many.
fn write_same(
    seat: &Seat<'_>,
    exchange: &mut Exchange<'_>,
    (lba, count): (u64, u32),
    count_at: u16,
    ndob: bool,
) -> Result<Action> {
    let (unit, index) = seat.unit()?;
    let unmap = exchange.cdb.bit(1, 3);
    writable(unit)?;
    // WSNZ is set in the block limits page: no blocks do not mean all of them.
    if count == 0 || count > MAX_WRITE_SAME_BLOCKS {
        return Err(Sense::in_cdb(count_at, 7));
    }
    if unmap && !unit.can_unmap() {
        return Err(Sense::in_cdb(1, 3));
    }
    let range = range(unit, lba, count)?;
    let zeroes = ndob || exchange.parameters.iter().all(|byte| *byte == 0);
    if zeroes && unit.can_write_zeroes() {
        exchange.ranges.clear();
        // The list is empty, so there is room.
        let _ = exchange.ranges.push(BlockRange { unmap, ..range });
    }
    let op = match zeroes && unit.can_write_zeroes() {
        true => BlockOp::WriteZeroes,
        false => BlockOp::WriteSame(range),
    };
    Ok(Action::Carry(Carry {
        op,
        unit: index,
        fua: unit.writes_through(),
        data_in: 0,
        data_out: if ndob {
            0
        } else {
            unit.geometry().block_bytes().into()
        },
    }))
}

pub(super) fn write_same_10(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    write_same(seat, exchange, extent_10(exchange.cdb), 7, false)
}

pub(super) fn write_same_16(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let ndob = exchange.cdb.bit(1, 0);
    write_same(seat, exchange, extent_16(exchange.cdb), 10, ndob)
}

/// SBC-3, 5.28: a header of 8 bytes, then descriptors of 16.
pub(super) fn unmap(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    const HEADER: usize = 8;
    const DESCRIPTOR: usize = 16;
    let (unit, index) = seat.unit()?;
    writable(unit)?;
    let list = exchange.parameters;
    if list.is_empty() {
        return Ok(Action::Good);
    }
    let Some((header, rest)) = list.split_at_checked(HEADER) else {
        return Err(Sense::PARAMETER_LENGTH);
    };
    let said = usize::from(u16::from_be_bytes([header[2], header[3]]));
    let Some(descriptors) = rest.get(..said) else {
        return Err(Sense::PARAMETER_LENGTH);
    };
    // An incomplete descriptor at the end is ignored.
    if descriptors.len() / DESCRIPTOR > MAX_RANGES {
        return Err(Sense::in_parameters(2));
    }
    exchange.ranges.clear();
    for descriptor in descriptors.chunks_exact(DESCRIPTOR) {
        // Laid out as LBA and count of a 16-byte CDB, which begin at byte 2.
        let mut extent = [0; 14];
        extent[2..].copy_from_slice(&descriptor[..12]);
        let (lba, count) = extent_16(&Cdb::new(&extent));
        let range = range(unit, lba, count)?;
        if count != 0 {
            // As many as there is room for: counted above.
            let _ = exchange.ranges.push(range);
        }
    }
    Ok(match exchange.ranges.as_slice() {
        [] => Action::Good,
        _ => Action::Carry(Carry {
            op: BlockOp::Discard,
            unit: index,
            fua: false,
            data_in: 0,
            data_out: list.len() as u64,
        }),
    })
}

/// The disk is always started. What a stop promises, that the cache is written back, is done.
pub(super) fn start_stop_unit(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (_, index) = seat.unit()?;
    let cdb = exchange.cdb;
    if cdb.byte(4) & 0xf0 != 0 {
        // No power conditions.
        return Err(Sense::in_cdb(4, 7));
    }
    if cdb.bit(4, 1) {
        // Nothing to load or eject.
        return Err(Sense::in_cdb(4, 1));
    }
    let (start, no_flush) = (cdb.bit(4, 0), cdb.bit(4, 2));
    Ok(match start || no_flush {
        true => Action::Good,
        false => nothing_moves(BlockOp::Flush, index),
    })
}

/// The medium cannot be removed, so that is as the initiator wishes.
pub(super) fn prevent_allow(_seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    match exchange.cdb.bit(4, 1) {
        true => Err(Sense::in_cdb(4, 1)),
        false => Ok(Action::Good),
    }
}

pub(super) fn read_capacity_10(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    let (lba, pmi) = (exchange.cdb.be32(2), exchange.cdb.bit(8, 0));
    if lba != 0 && !pmi {
        return Err(Sense::in_cdb(2, 7));
    }
    let geometry = unit.geometry();
    let last = u32::try_from(geometry.blocks() - 1).unwrap_or(u32::MAX);
    exchange.data_in.put(&last.to_be_bytes());
    exchange.data_in.put(&geometry.block_bytes().to_be_bytes());
    Ok(Action::Good)
}

pub(super) fn read_capacity_16(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    let cdb = exchange.cdb;
    if cdb.be64(2) != 0 && !cdb.bit(14, 0) {
        return Err(Sense::in_cdb(2, 7));
    }
    let geometry = unit.geometry();
    let out = &mut exchange.data_in;
    out.put(&(geometry.blocks() - 1).to_be_bytes());
    out.put(&geometry.block_bytes().to_be_bytes());
    // No protection information; a physical block is a logical one; LBPME, LBPRZ.
    let thin = u8::from(unit.can_unmap()) << 7 | u8::from(unit.unmapped_reads_zero()) << 6;
    out.put(&[0, 0, thin, 0]);
    out.put(&[0; 16]);
    out.truncate(cdb.be32(10));
    Ok(Action::Good)
}
