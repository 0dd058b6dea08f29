//! INQUIRY (SPC-4, 6.6 and 7.8; SBC-3, 6.6): what a logical unit is, and its vital product data pages.

use super::medium::{MAX_COMPARE_BLOCKS, MAX_WRITE_SAME_BLOCKS};
use super::sense::{MAX_SENSE_BYTES, Sense};
use super::target::{Role, Seat};
use super::unit::{LogicalUnit, UnitIds};
use super::{Action, DataIn, Exchange, Result, copy, port};
use crate::block::MAX_RANGES;

const VENDOR: &[u8; 8] = b"TANDEM  ";
const PRODUCT: &[u8; 16] = b"Tandem NVMe disk";
const REVISION: &[u8; 4] = b"0001";

/// SAM-4, SPC-4 and SBC-3, no version claimed (SPC-4, annex D).
const STANDARDS: [u8; 6] = [0x00, 0x80, 0x04, 0x60, 0x04, 0xc0];

const NO_UNIT: u8 = 0x7f; // PERIPHERAL QUALIFIER 011b, PERIPHERAL DEVICE TYPE 1Fh
const WELL_KNOWN: u8 = 0x1e;
const DISK: u8 = 0x00;

pub(super) fn inquiry(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let cdb = exchange.cdb;
    let (vital, code) = (cdb.bit(1, 0), cdb.byte(2));
    let peripheral = match seat.role() {
        Role::Unit => DISK,
        Role::WellKnown => WELL_KNOWN,
        Role::Absent => NO_UNIT,
    };
    let out = &mut exchange.data_in;
    match (vital, code) {
        (false, 0) => {
            let copies = seat.unit().is_ok_and(|(unit, _)| unit.can_copy());
            standard(peripheral, copies, out);
        }
        (false, _) => return Err(Sense::in_cdb(2, 7)),
        (true, _) => vital_data(peripheral, code, seat, out)?,
    }
    out.truncate(cdb.be16(3).into());
    Ok(Action::Good)
}

fn standard(peripheral: u8, copies: bool, out: &mut DataIn<'_>) {
    // A well-known logical unit is in no target port group that it would report.
    let tpgs = if peripheral == DISK { port::TPGS } else { 0 };
    // 3PC.
    let flags = tpgs | u8::from(copies) << 3;
    // SPC-4; HISUP, response data format 2; 96 bytes in all; CMDQUE.
    out.put(&[peripheral, 0, 0x06, 0x12, 96 - 5, flags, 0, 0x02]);
    out.put(VENDOR);
    out.put(PRODUCT);
    out.put(REVISION);
    out.put(&[0; 58 - 36]);
    out.put(&STANDARDS);
    out.put(&[0; 96 - 64]);
}

/// The page of a unit that copies.
const THIRD_PARTY: u8 = 0x8f;

fn has_page(unit: &LogicalUnit, page: &Page) -> bool {
    page.0 != THIRD_PARTY || unit.can_copy()
}

type Page = (u8, fn(&LogicalUnit, &mut DataIn<'_>));

/// The pages of a disk, by code; what fills each is given the header already.
const PAGES: &[Page] = &[
    (0x00, |unit, out| {
        let pages = PAGES.iter().filter(|page| has_page(unit, page));
        pages.for_each(|(code, _)| out.put(&[*code]));
    }),
    (0x80, |unit, out| out.put(unit.serial().as_bytes())),
    (0x83, identification),
    (0x86, extended),
    (THIRD_PARTY, copy::third_party),
    (0xb0, block_limits),
    (0xb1, characteristics),
    (0xb2, provisioning),
];

fn vital_data(peripheral: u8, code: u8, seat: &Seat<'_>, out: &mut DataIn<'_>) -> Result<()> {
    let unit = match seat.role() {
        Role::Unit => Some(seat.unit()?.0),
        Role::WellKnown | Role::Absent => None,
    };
    let page = PAGES.iter().find(|(own, _)| *own == code);
    out.put(&[peripheral, code, 0, 0]);
    match (unit, page) {
        (Some(unit), Some(page)) if has_page(unit, page) => (page.1)(unit, out),
        // What is no disk has the list of pages alone.
        (None, _) if code == 0 => out.put(&[0]),
        _ => return Err(Sense::in_cdb(2, 7)),
    }
    let len = u16::try_from(out.len() - 4).unwrap_or(0);
    out.set(2, &len.to_be_bytes());
    Ok(())
}

/// SPC-4, 7.8.6: the namespace by what it says of itself, and the port that leads here.
fn identification(unit: &LogicalUnit, out: &mut DataIn<'_>) {
    const BINARY: u8 = 1;
    const ASCII: u8 = 2;
    let mut designator = |code_set: u8, kind: u8, parts: &[&[u8]]| {
        let len: usize = parts.iter().map(|part| part.len()).sum();
        out.put(&[code_set, kind, 0, u8::try_from(len).unwrap_or(0)]);
        parts.iter().for_each(|part| out.put(part));
    };
    let ids = unit.ids();
    if let Some(naa) = registered_extended(ids) {
        designator(BINARY, 0x03, &[&naa]);
    } else if let Some(naa) = registered(ids) {
        designator(BINARY, 0x03, &[&naa]);
    }
    if let Some(nguid) = &ids.nguid {
        // EUI-64 based, 16 bytes.
        designator(BINARY, 0x02, &[nguid]);
    }
    if let Some(eui64) = &ids.eui64 {
        designator(BINARY, 0x02, &[eui64]);
    }
    if let Some(uuid) = &ids.uuid {
        // UUID identifier: type 1, then a reserved byte.
        designator(BINARY, 0x0a, &[&[0x10, 0], uuid]);
    }
    designator(ASCII, 0x01, &[VENDOR, unit.serial().as_bytes()]);
    // Association with the target port.
    designator(BINARY, 0x14, &[&[0, 0], &port::RELATIVE_PORT]);
    designator(BINARY, 0x15, &[&[0, 0], &port::GROUP]);
}

/// Whether a designation descriptor of a logical unit has this code set, this association and type, and this designator.
pub(super) fn is_designated(unit: &LogicalUnit, code_set: u8, kind: u8, designator: &[u8]) -> bool {
    // Of the unit itself, not of a port that leads there.
    if kind & 0x30 != 0 {
        return false;
    }
    let mut bytes = [0; 512];
    let mut page = DataIn::new(&mut bytes);
    identification(unit, &mut page);
    let mut rest = page.as_slice();
    while let [own_set, own_kind, _, len, tail @ ..] = rest {
        let Some((own, next)) = tail.split_at_checked(usize::from(*len)) else {
            return false;
        };
        if (*own_set, *own_kind) == (code_set & 0x0f, kind & 0x3f) && own == designator {
            return true;
        }
        rest = next;
    }
    false
}

/// NAA, then a company's identifier and 36 bits of its own, made of an identifier of 64 bits that begins with the company's.
/// `None` if that uses the four bits for which NAA has no room: another namespace might come to the same name.
fn naa(kind: u64, identifier: u64) -> Option<u64> {
    const OWN: u32 = 40;
    let (company, own) = (identifier >> OWN, identifier & ((1 << OWN) - 1));
    (own >> 36 == 0).then_some(kind << 60 | company << 36 | own)
}

/// NAA IEEE Registered Extended (SPC-4, 7.8.6.6.5), of an NGUID: eight bytes of an extension, then what an EUI-64 has.
fn registered_extended(ids: &UnitIds) -> Option<[u8; 16]> {
    let (extension, identifier) = ids.nguid.as_ref()?.split_first_chunk::<8>()?;
    let identifier = u64::from_be_bytes(identifier.try_into().ok()?);
    let mut designator = [0; 16];
    designator[..8].copy_from_slice(&naa(6, identifier)?.to_be_bytes());
    designator[8..].copy_from_slice(extension);
    Some(designator)
}

/// NAA IEEE Registered (SPC-4, 7.8.6.6.4), of an EUI-64.
fn registered(ids: &UnitIds) -> Option<[u8; 8]> {
    Some(naa(5, u64::from_be_bytes(ids.eui64?))?.to_be_bytes())
}

/// SPC-4, 7.8.7: tasks are simple ones; whether the cache is volatile; how long sense data may be.
fn extended(unit: &LogicalUnit, out: &mut DataIn<'_>) {
    let volatile = u8::from(unit.has_volatile_cache());
    out.put(&[0, 0x01, volatile, 0, 0, 0, 0, 0, 0]);
    out.put(&[u8::try_from(MAX_SENSE_BYTES).unwrap_or(0)]);
    out.put(&[0; 64 - 14]);
}

/// SBC-3, 6.6.4.
fn block_limits(unit: &LogicalUnit, out: &mut DataIn<'_>) {
    let (unmap_blocks, unmap_ranges) = match unit.can_unmap() {
        true => (u32::MAX, u32::try_from(MAX_RANGES).unwrap_or(0)),
        false => (0, 0),
    };
    // WSNZ; COMPARE AND WRITE; no limit for transfers, and no optimum.
    out.put(&[0x01, MAX_COMPARE_BLOCKS, 0, 0]);
    out.put(&[0; 20 - 8]);
    out.put(&unmap_blocks.to_be_bytes());
    out.put(&unmap_ranges.to_be_bytes());
    out.put(&1_u32.to_be_bytes()); // granularity
    out.put(&[0; 4]);
    out.put(&u64::from(MAX_WRITE_SAME_BLOCKS).to_be_bytes());
    out.put(&[0; 64 - 44]);
}

/// SBC-3, 6.6.2: nothing rotates.
fn characteristics(_unit: &LogicalUnit, out: &mut DataIn<'_>) {
    out.put(&[0, 1]);
    out.put(&[0; 64 - 6]);
}

/// SBC-3, 6.6.5.
fn provisioning(unit: &LogicalUnit, out: &mut DataIn<'_>) {
    let unmap = unit.can_unmap();
    let write_same = unmap && unit.can_write_zeroes();
    let flags = u8::from(unmap) << 7 // LBPU
        | u8::from(write_same) << 6 // LBPWS
        | u8::from(write_same) << 5 // LBPWS10
        | u8::from(unit.unmapped_reads_zero()) << 2; // LBPRZ
    let kind = if unmap { 0x02 } else { 0x00 }; // thin provisioned
    out.put(&[0, flags, kind, 0]);
}
