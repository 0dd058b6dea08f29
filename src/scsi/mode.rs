//! Mode parameters (SPC-4, 7.5, and SBC-3, 6.5): the cache, sense data, exceptions. What MODE SELECT changes is changed for all
//! initiators of the logical unit, is told to the others, and lasts until the unit is reset or the server ends: nothing is
//! saved.

use super::attention::Attention;
use super::sense::Sense;
use super::target::Seat;
use super::unit::{LogicalUnit, Modes};
use super::{Action, Carry, DataIn, Exchange, Result};
use crate::block::BlockOp;

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const EXCEPTIONS: u8 = 0x1c;
const ALL_PAGES: u8 = 0x3f;
const ALL_SUBPAGES: u8 = 0xff;

/// PC: which values are asked for.
const CHANGEABLE: u8 = 1;
const DEFAULT: u8 = 2;
const SAVED: u8 = 3;

const WCE: u8 = 0x04; // byte 0 of the caching page's parameters
const D_SENSE: u8 = 0x04; // byte 0 of the control page's
const SWP: u8 = 0x08; // byte 2 of it
/// QUEUE ALGORITHM MODIFIER: commands may be reordered.
const UNRESTRICTED: u8 = 0x10;
/// DEXCPT: no exceptions are reported.
const DEXCPT: u8 = 0x08;

/// The longest parameters of a page.
const MOST: usize = 18;

/// A page: its code, how many bytes its parameters have, and how they come from modes and go back to them.
struct Page {
    code: u8,
    len: u8,
    /// The parameters of a logical unit that has these modes.
    fill: fn(&LogicalUnit, Modes, &mut [u8; MOST]),
    /// The bits that can be changed.
    changeable: fn(&LogicalUnit, &mut [u8; MOST]),
    /// Modes as parameters say: no other bits have changed.
    take: fn(&LogicalUnit, &[u8], &mut Modes),
}

const PAGES: &[Page] = &[
    Page {
        code: CACHING,
        len: 18,
        fill: |unit, modes, page| {
            if unit.has_volatile_cache() && !modes.write_through {
                page[0] = WCE;
            }
        },
        // Without a volatile cache there is nothing to switch on, or off.
        changeable: |unit, page| page[0] = if unit.has_volatile_cache() { WCE } else { 0 },
        take: |unit, page, modes| {
            modes.write_through = unit.has_volatile_cache() && page[0] & WCE == 0;
        },
    },
    Page {
        code: CONTROL,
        len: 10,
        fill: |_, modes, page| {
            page[0] = if modes.descriptor_sense { D_SENSE } else { 0 };
            page[1] = UNRESTRICTED;
            page[2] = if modes.write_protected { SWP } else { 0 };
        },
        changeable: |_, page| (page[0], page[2]) = (D_SENSE, SWP),
        take: |_, page, modes| {
            modes.descriptor_sense = page[0] & D_SENSE != 0;
            modes.write_protected = page[2] & SWP != 0;
        },
    },
    Page {
        code: EXCEPTIONS,
        len: 10,
        fill: |_, _, page| page[0] = DEXCPT,
        changeable: |_, _| {},
        take: |_, _, _| {},
    },
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
    if !PAGES.iter().any(|page| wanted(page.code)) {
        return Err(Sense::in_cdb(2, 5));
    }
    let modes = match control {
        DEFAULT => Modes::default(),
        _ => unit.modes(),
    };
    let out = &mut exchange.data_in;
    let header = if shape.long_header { 8 } else { 4 };
    out.put(&[0; 8][..header]);
    block_descriptor(unit, shape, out);
    let descriptor = u8::try_from(out.len() - header).unwrap_or(0);
    for page in PAGES.iter().filter(|page| wanted(page.code)) {
        let mut parameters = [0; MOST];
        match control {
            CHANGEABLE => (page.changeable)(unit, &mut parameters),
            _ => (page.fill)(unit, modes, &mut parameters),
        }
        out.put(&[page.code, page.len]);
        out.put(&parameters[..usize::from(page.len)]);
    }
    // WP, DPOFUA.
    let protected = unit.geometry().read_only() || unit.modes().write_protected;
    let device = u8::from(protected) << 7 | 0x10;
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

pub(super) fn select_6(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    select(seat, exchange, false)
}

pub(super) fn select_10(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    select(seat, exchange, true)
}

/// SPC-4, 6.9 and 6.10. Everything is looked at before anything is changed.
fn select(seat: &Seat<'_>, exchange: &mut Exchange<'_>, long_header: bool) -> Result<Action> {
    let (unit, index) = seat.unit()?;
    let list = exchange.parameters;
    if list.is_empty() {
        return Ok(Action::Good);
    }
    if !exchange.cdb.bit(1, 4) {
        // Not in the page format.
        return Err(Sense::in_cdb(1, 4));
    }
    let start = skip_header(unit, list, long_header)?;
    let parse = |mut modes| {
        let mut at = start;
        while at < list.len() {
            at = select_page(unit, list, at, &mut modes)?;
        }
        Ok(modes)
    };
    let mut before = unit.modes();
    let mut modes = parse(before)?;
    // Each time that this fails another initiator has changed something: in the end all have.
    while modes != before && !unit.change_modes(before, modes) {
        before = unit.modes();
        modes = parse(before)?;
    }
    if modes == before {
        return Ok(Action::Good);
    }
    seat.attend_others(Attention::ModeParameters);
    if before.write_through || !modes.write_through {
        return Ok(Action::Good);
    }
    // The cache is off: what is in it has to be durable, and so has what was on its way there.
    Ok(Action::Carry(Carry {
        op: BlockOp::DrainAndFlush,
        unit: index,
        fua: false,
        data_in: 0,
        data_out: list.len() as u64,
    }))
}

fn pointer(byte: usize) -> Sense {
    // A parameter list has at most 64 KiB.
    Sense::in_parameters(u16::try_from(byte).unwrap_or(u16::MAX))
}

/// Where the pages begin, behind a header and a block descriptor that changes nothing. The mode data length and the
/// device-specific parameter are not for MODE SELECT.
fn skip_header(unit: &LogicalUnit, list: &[u8], long_header: bool) -> Result<usize> {
    let (header, medium_type, long_lba, len_at) = match (long_header, list) {
        (false, [_, medium, _, len, ..]) => (4, (1, *medium), false, (3, usize::from(*len))),
        (true, [_, _, medium, _, flags, _, high, low, ..]) => {
            let len = usize::from(u16::from_be_bytes([*high, *low]));
            (8, (2, *medium), flags & 1 != 0, (6, len))
        }
        _ => return Err(Sense::PARAMETER_LENGTH),
    };
    if medium_type.1 != 0 {
        return Err(pointer(medium_type.0));
    }
    let (len_at, len) = len_at;
    if len == 0 {
        return Ok(header);
    }
    if len != if long_lba { 16 } else { 8 } {
        return Err(pointer(len_at));
    }
    let descriptor = list[header..].get(..len).ok_or(Sense::PARAMETER_LENGTH)?;
    let mut expected = [0; 16];
    let mut out = DataIn::new(&mut expected);
    let shape = Shape {
        long_header,
        long_lba,
        disable_block_descriptors: false,
    };
    block_descriptor(unit, &shape, &mut out);
    let (blocks, rest) = descriptor.split_at(len / 2);
    let (own_blocks, own_rest) = out.as_slice().split_at(len / 2);
    // As many blocks as there are, in any of three ways; of the length that they have (SBC-3, 6.4.2).
    let all_ones = blocks.iter().all(|byte| *byte == 0xff);
    let zero = blocks.iter().all(|byte| *byte == 0);
    if blocks != own_blocks && !zero && !all_ones {
        return Err(pointer(header));
    }
    if rest != own_rest {
        return Err(pointer(header + len / 2));
    }
    Ok(header + len)
}

/// Takes the page at `at`, and says where the next one is.
fn select_page(unit: &LogicalUnit, list: &[u8], at: usize, modes: &mut Modes) -> Result<usize> {
    let [first, len, rest @ ..] = &list[at..] else {
        return Err(Sense::PARAMETER_LENGTH);
    };
    // PS is not for MODE SELECT; with SPF the page would be another one.
    let found = PAGES.iter().find(|page| page.code == first & 0x7f);
    let page = found.ok_or_else(|| pointer(at))?;
    if *len != page.len {
        return Err(pointer(at + 1));
    }
    let wanted = rest
        .get(..usize::from(*len))
        .ok_or(Sense::PARAMETER_LENGTH)?;
    let (mut own, mut changeable) = ([0; MOST], [0; MOST]);
    (page.fill)(unit, *modes, &mut own);
    (page.changeable)(unit, &mut changeable);
    let bytes = wanted.iter().zip(own.iter().zip(&changeable));
    for (byte, (wanted, (own, changeable))) in bytes.enumerate() {
        if (wanted ^ own) & !changeable != 0 {
            return Err(pointer(at + 2 + byte));
        }
    }
    (page.take)(unit, wanted, modes);
    Ok(at + 2 + wanted.len())
}
