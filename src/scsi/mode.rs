//! Mode parameters (SPC-4, 7.5, and SBC-3, 6.5): what MODE SENSE says of the cache, of sense data and of exceptions.

use super::sense::Sense;
use super::target::Seat;
use super::unit::LogicalUnit;
use super::{Action, DataIn, Exchange, Result};

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const EXCEPTIONS: u8 = 0x1c;
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// PC: which values are asked for.
const CHANGEABLE: u8 = 1;
const SAVED: u8 = 3;

type Page = (u8, fn(&LogicalUnit, &mut [u8; 18]) -> usize);

/// Each page: its code, and what fills in its parameters and says how many bytes they have.
const PAGES: &[Page] = &[
    (CACHING, |unit, page| {
        page[0] = u8::from(unit.has_volatile_cache()) << 2; // WCE
        18
    }),
    (CONTROL, |_, page| {
        page[1] = 0x10; // QUEUE ALGORITHM MODIFIER: commands may be reordered
        10
    }),
    (EXCEPTIONS, |_, page| {
        page[0] = 0x08; // DEXCPT: none are reported
        10
    }),
];

/// The long header and its long block descriptor, or the short ones.
struct Shape {
    long_header: bool,
    /// LLBAA.
    long_lba: bool,
    disable_block_descriptors: bool,
}

pub(super) fn sense_6(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let shape = Shape {
        long_header: false,
        long_lba: false,
        disable_block_descriptors: exchange.cdb.bit(1, 3),
    };
    sense(seat, exchange, &shape)?;
    exchange.data_in.truncate(exchange.cdb.byte(4).into());
    Ok(Action::Good)
}

pub(super) fn sense_10(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let shape = Shape {
        long_header: true,
        long_lba: exchange.cdb.bit(1, 4),
        disable_block_descriptors: exchange.cdb.bit(1, 3),
    };
    sense(seat, exchange, &shape)?;
    exchange.data_in.truncate(exchange.cdb.be16(7).into());
    Ok(Action::Good)
}

fn sense(seat: &Seat<'_>, exchange: &mut Exchange<'_>, shape: &Shape) -> Result<()> {
    let (unit, _) = seat.unit()?;
    let cdb = exchange.cdb;
    let (control, page, subpage) = (cdb.byte(2) >> 6, cdb.byte(2) & 0x3f, cdb.byte(3));
    if control == SAVED {
        return Err(Sense::NOT_SAVED);
    }
    if subpage != 0 && subpage != ALL_SUBPAGES {
        return Err(Sense::in_cdb(3, 7));
    }
    let wanted = |code: u8| page == code || page == ALL_PAGES;
    if !PAGES.iter().any(|(code, _)| wanted(*code)) {
        return Err(Sense::in_cdb(2, 5));
    }
    let out = &mut exchange.data_in;
    let header = if shape.long_header { 8 } else { 4 };
    out.put(&[0; 8][..header]);
    block_descriptor(unit, shape, out);
    let descriptor = u8::try_from(out.len() - header).unwrap_or(0);
    for (code, fill) in PAGES.iter().filter(|(code, _)| wanted(*code)) {
        let mut parameters = [0; 18];
        let len = fill(unit, &mut parameters);
        if control == CHANGEABLE {
            // There is no MODE SELECT.
            parameters.fill(0);
        }
        out.put(&[*code, u8::try_from(len).unwrap_or(0)]);
        out.put(&parameters[..len]);
    }
    // WP, DPOFUA.
    let device = u8::from(unit.geometry().read_only()) << 7 | 0x10;
    if shape.long_header {
        let len = u16::try_from(out.len() - 2).unwrap_or(0).to_be_bytes();
        out.set(0, &[len[0], len[1], 0, device]);
        out.set(4, &[u8::from(shape.long_lba), 0, 0, descriptor]);
    } else {
        let len = u8::try_from(out.len() - 1).unwrap_or(0);
        out.set(0, &[len, 0, device, descriptor]);
    }
    Ok(())
}

/// SBC-3, 6.4.2 and 6.4.3.
fn block_descriptor(unit: &LogicalUnit, shape: &Shape, out: &mut DataIn<'_>) {
    if shape.disable_block_descriptors {
        return;
    }
    let geometry = unit.geometry();
    if shape.long_lba {
        out.put(&geometry.blocks().to_be_bytes());
        out.put(&[0; 4]);
    } else {
        let blocks = u32::try_from(geometry.blocks()).unwrap_or(u32::MAX);
        out.put(&blocks.to_be_bytes());
    }
    // 64 KiB at most, so the first byte, which is reserved in the short form, is 0.
    out.put(&geometry.block_bytes().to_be_bytes());
}
