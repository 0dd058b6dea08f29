//! EXTENDED COPY (LID1) and RECEIVE COPY RESULTS (SPC-4, 6.4 and 6.23): blocks that the device copies by itself.
//!
//! What is copied is what one namespace can: from a logical unit to itself, in segments from blocks to blocks. Everything is
//! looked at before anything is copied. Start at [`extended_copy`].

use std::sync::atomic::{AtomicU64, Ordering};

use super::medium::{range, writable};
use super::sense::{Sense, key};
use super::target::Seat;
use super::unit::LogicalUnit;
use super::{Action, Carry, DataIn, Exchange, Result, inquiry};
use crate::block::{BlockOp, BlockRange};

/// CSCD descriptors of one command, at most.
const MAX_CSCDS: usize = 8;
/// Segment descriptors of one command, at most: two ranges each.
const MAX_SEGMENTS: usize = 64;
/// What the number of blocks of a segment has room for.
const MAX_SEGMENT_BLOCKS: u64 = 0xffff;

const HEADER_BYTES: usize = 16;
const CSCD_BYTES: usize = 32;
const SEGMENT_BYTES: usize = 28;
const MAX_DESCRIPTOR_BYTES: usize = MAX_CSCDS * CSCD_BYTES + MAX_SEGMENTS * SEGMENT_BYTES;

/// An identification descriptor.
const IDENTIFICATION: u8 = 0xe4;
/// A segment from a block device to a block device.
const BLOCK_TO_BLOCK: u8 = 0x02;
/// The CSCD that is the logical unit with the command (SPC-4, table 110).
const OWN: u16 = 0xffff;

const fn illegal(asc: u8, ascq: u8) -> Sense {
    Sense::new(key::ILLEGAL_REQUEST, asc, ascq)
}

/// OPERATION IN PROGRESS.
const IN_PROGRESS: Sense = illegal(0x00, 0x16);
/// TOO MANY TARGET DESCRIPTORS.
const TOO_MANY_CSCDS: Sense = illegal(0x26, 0x06);
/// UNSUPPORTED TARGET DESCRIPTOR TYPE CODE.
const UNKNOWN_CSCD: Sense = illegal(0x26, 0x07);
/// TOO MANY SEGMENT DESCRIPTORS.
const TOO_MANY_SEGMENTS: Sense = illegal(0x26, 0x08);
/// UNSUPPORTED SEGMENT DESCRIPTOR TYPE CODE.
const UNKNOWN_SEGMENT: Sense = illegal(0x26, 0x09);
/// INLINE DATA LENGTH EXCEEDED.
const INLINE_DATA: Sense = illegal(0x26, 0x0b);
/// Blocks that there are not: nothing is copied. Conformance suites want no more than the key.
const BEYOND: Sense = Sense::new(key::COPY_ABORTED, 0x00, 0x00);
/// COPY TARGET DEVICE NOT REACHABLE.
const NOT_REACHABLE: Sense = Sense::new(key::COPY_ABORTED, 0x0d, 0x02);

/// What an initiator may ask of its copies, by list identifier: whether one is under way, or how it has ended.
#[derive(Debug)]
pub(super) struct CopyLog([AtomicU64; 256]);

/// How a copy is: state in bits 1:0, the unit in 17:2, segments in 31:18, blocks in 63:32.
#[derive(Clone, Copy)]
struct Record(u64);

const UNDER_WAY: u64 = 1;
const DONE: u64 = 2;
const GIVEN_UP: u64 = 3;

impl Record {
    fn new(unit: usize, segments: usize, blocks: u64) -> Record {
        let [unit, segments] = [unit & 0xffff, segments & 0x3fff].map(|part| part as u64);
        Record(UNDER_WAY | unit << 2 | segments << 18 | blocks << 32)
    }

    fn state(self) -> u64 {
        self.0 & 3
    }

    fn unit(self) -> usize {
        usize::try_from(self.0 >> 2 & 0xffff).unwrap_or(usize::MAX)
    }

    fn segments(self) -> u16 {
        (self.0 >> 18 & 0x3fff) as u16
    }

    fn blocks(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

impl CopyLog {
    pub(super) fn new() -> CopyLog {
        CopyLog([const { AtomicU64::new(0) }; 256])
    }

    fn place(&self, list: u8) -> &AtomicU64 {
        &self.0[usize::from(list)]
    }

    fn get(&self, list: u8) -> Option<Record> {
        let record = Record(self.place(list).load(Ordering::Relaxed));
        (record.state() != 0).then_some(record)
    }

    /// A copy has begun. `false` when another one of that name is under way.
    fn begin(&self, list: u8, record: Record) -> bool {
        let before = self.get(list);
        let free = before.is_none_or(|before| before.state() != UNDER_WAY);
        if free {
            self.place(list).store(record.0, Ordering::Relaxed);
        }
        free
    }

    /// It has ended.
    pub(super) fn end(&self, list: u8, well: bool) {
        let state = if well { DONE } else { GIVEN_UP };
        if let Some(record) = self.get(list) {
            let ended = record.0 & !3 | state;
            self.place(list).store(ended, Ordering::Relaxed);
        }
    }

    /// Nothing is known of any more (SPC-4, 5.17.4.5: a reset, the loss of the nexus).
    pub(super) fn clear(&self) {
        self.0
            .iter()
            .for_each(|place| place.store(0, Ordering::Relaxed));
    }
}

fn pointer(byte: usize) -> Sense {
    // A list that is looked at has a few kilobytes.
    Sense::in_parameters(u16::try_from(byte).unwrap_or(u16::MAX))
}

fn be16(bytes: &[u8], at: usize) -> u16 {
    bytes
        .get(at..at + 2)
        .map_or(0, |word| u16::from_be_bytes([word[0], word[1]]))
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from(be16(bytes, at)) << 16 | u32::from(be16(bytes, at + 2))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from(be32(bytes, at)) << 32 | u64::from(be32(bytes, at + 4))
}

pub(super) fn extended_copy(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (unit, index) = seat.unit()?;
    let list = exchange.parameters;
    if list.is_empty() {
        return Ok(Action::Good);
    }
    let Some((header, rest)) = list.split_at_checked(HEADER_BYTES) else {
        return Err(Sense::PARAMETER_LENGTH);
    };
    let name = list_identifier(header)?;
    if header[4..8] != [0; 4] {
        return Err(pointer(4));
    }
    if be32(header, 12) != 0 {
        return Err(INLINE_DATA);
    }
    let cscd_bytes = usize::from(be16(header, 2));
    if !cscd_bytes.is_multiple_of(CSCD_BYTES) {
        return Err(pointer(2));
    }
    let segment_bytes = usize::try_from(be32(header, 8)).unwrap_or(usize::MAX);
    if cscd_bytes.saturating_add(segment_bytes) > MAX_DESCRIPTOR_BYTES {
        return Err(Sense::PARAMETER_LENGTH);
    }
    if cscd_bytes > MAX_CSCDS * CSCD_BYTES {
        return Err(TOO_MANY_CSCDS);
    }
    let (cscds, rest) = rest
        .split_at_checked(cscd_bytes)
        .ok_or(Sense::PARAMETER_LENGTH)?;
    let segments = rest.get(..segment_bytes).ok_or(Sense::PARAMETER_LENGTH)?;
    if segment_bytes > MAX_SEGMENTS * SEGMENT_BYTES {
        return Err(TOO_MANY_SEGMENTS);
    }
    for (number, descriptor) in cscds.chunks_exact(CSCD_BYTES).enumerate() {
        check_cscd(seat, unit, descriptor, HEADER_BYTES + number * CSCD_BYTES)?;
    }
    writable(unit)?;
    exchange.ranges.clear();
    let (mut count, mut blocks) = (0, 0);
    for (number, segment) in segments.chunks(SEGMENT_BYTES).enumerate() {
        let at = HEADER_BYTES + cscd_bytes + number * SEGMENT_BYTES;
        let [source, destination] = check_segment(unit, segment, at, cscd_bytes / CSCD_BYTES)?;
        count += 1;
        if source.count.get() > 0 {
            blocks += u64::from(source.count.get());
            // Two for each segment, of which there are few enough.
            let _ = exchange.ranges.push(source) && exchange.ranges.push(destination);
        }
    }
    let log = seat.copies();
    if let Some(name) = name
        && !log.begin(name, Record::new(index, count, blocks))
    {
        return Err(IN_PROGRESS);
    }
    if exchange.ranges.as_slice().is_empty() {
        if let Some(name) = name {
            log.end(name, true);
        }
        return Ok(Action::Good);
    }
    Ok(Action::Carry(Carry {
        op: BlockOp::Copy { name },
        unit: index,
        fua: unit.writes_through(),
        data_in: 0,
        data_out: list.len() as u64,
    }))
}

/// LIST ID USAGE (SPC-4, table 146): the name by which the initiator may ask how the copy is, if it may.
fn list_identifier(header: &[u8]) -> Result<Option<u8>> {
    if header[1] & 0xc0 != 0 {
        return Err(Sense::in_parameter_bit(1, 7));
    }
    // STR is for tapes, and PRIORITY ranks what is not ranked here.
    match (header[1] >> 3 & 3, header[0]) {
        (0b00, name) => Ok(Some(name)),
        (0b10, _) | (0b11, 0) => Ok(None),
        (0b11, _) => Err(pointer(0)),
        _ => Err(Sense::in_parameter_bit(1, 4)),
    }
}

/// A CSCD has to be the logical unit that the command is for.
fn check_cscd(seat: &Seat<'_>, own: &LogicalUnit, descriptor: &[u8], at: usize) -> Result<()> {
    if descriptor[0] != IDENTIFICATION {
        return Err(UNKNOWN_CSCD);
    }
    // NUL (SPC-3): it stands for nobody.
    if descriptor[1] & 0x20 != 0 {
        return Err(NOT_REACHABLE);
    }
    // The type of the device. LU ID TYPE in front of it means nothing in this kind of descriptor.
    if descriptor[1] & 0x1f != 0 {
        return Err(pointer(at + 1));
    }
    let (code_set, kind) = (descriptor[4], descriptor[5]);
    let len = usize::from(descriptor[7]);
    let Some(designator) = descriptor[8..28].get(..len).filter(|_| len > 0) else {
        return Err(pointer(at + 7));
    };
    let mut units = seat.units();
    let found = units.find(|unit| inquiry::is_designated(unit, code_set, kind, designator));
    let found = found.filter(|unit| unit.identity() == own.identity());
    if found.is_none() {
        return Err(NOT_REACHABLE);
    }
    if be32(descriptor, 28) & 0xff_ffff != own.geometry().block_bytes() {
        return Err(pointer(at + 29));
    }
    Ok(())
}

/// Source and destination of a segment.
fn check_segment(
    unit: &LogicalUnit,
    segment: &[u8],
    at: usize,
    cscds: usize,
) -> Result<[BlockRange; 2]> {
    match segment {
        [BLOCK_TO_BLOCK, ..] => {}
        [_, ..] => return Err(UNKNOWN_SEGMENT),
        [] => return Err(Sense::PARAMETER_LENGTH),
    }
    if segment.len() < SEGMENT_BYTES {
        return Err(Sense::PARAMETER_LENGTH);
    }
    // CAT and DC change nothing: blocks are as long on either side.
    if segment[1] & !0x03 != 0 {
        return Err(pointer(at + 1));
    }
    if usize::from(be16(segment, 2)) != SEGMENT_BYTES - 4 {
        return Err(pointer(at + 2));
    }
    for id_at in [4, 6] {
        let id = be16(segment, id_at);
        if id != OWN && usize::from(id) >= cscds {
            return Err(NOT_REACHABLE);
        }
    }
    if segment[8..10] != [0; 2] {
        return Err(pointer(at + 8));
    }
    let count = be16(segment, 10).into();
    let blocks = |at| range(unit, be64(segment, at), count).map_err(|_| BEYOND);
    Ok([blocks(12)?, blocks(20)?])
}

/// RECEIVE COPY RESULTS, COPY STATUS (SPC-4, 6.23.2).
pub(super) fn copy_status(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (_, index) = seat.unit()?;
    let cdb = exchange.cdb;
    let record = seat.copies().get(cdb.byte(2));
    let record = record.filter(|record| record.unit() == index);
    let record = record.ok_or(Sense::in_cdb(2, 7))?;
    // Of a copy that has not ended, or not well, nothing is counted.
    let (status, segments, blocks) = match record.state() {
        UNDER_WAY => (0, 0, 0),
        DONE => (1, record.segments(), record.blocks()),
        _ => (2, 0, 0),
    };
    let out = &mut exchange.data_in;
    out.put(&8_u32.to_be_bytes());
    out.put(&[status]);
    out.put(&segments.to_be_bytes());
    out.put(&[0xf1]); // in blocks
    out.put(&blocks.to_be_bytes());
    out.truncate(cdb.be32(10));
    Ok(Action::Good)
}

fn limits() -> [u16; 2] {
    [MAX_CSCDS, MAX_SEGMENTS].map(|most| u16::try_from(most).unwrap_or(0))
}

fn put_limits(out: &mut DataIn<'_>) {
    for limit in limits() {
        out.put(&limit.to_be_bytes());
    }
    let list = u32::try_from(MAX_DESCRIPTOR_BYTES).unwrap_or(0);
    out.put(&list.to_be_bytes());
}

/// Bytes of a segment, at most.
fn segment_limit(unit: &LogicalUnit) -> [u8; 4] {
    let bytes = MAX_SEGMENT_BLOCKS << unit.geometry().block_shift();
    u32::try_from(bytes).unwrap_or(u32::MAX).to_be_bytes()
}

/// A logarithm.
fn granularity(unit: &LogicalUnit) -> u8 {
    u8::try_from(unit.geometry().block_shift()).unwrap_or(0)
}

/// Copies at a time: each request queue has one under way, so that is up to the guest.
const CONCURRENT: u8 = 255;

/// RECEIVE COPY RESULTS, OPERATING PARAMETERS (SPC-4, 6.23.4).
pub(super) fn operating_parameters(seat: &Seat<'_>, exchange: &mut Exchange<'_>) -> Result<Action> {
    let (unit, _) = seat.unit()?;
    let out = &mut exchange.data_in;
    out.put(&[0; 4]);
    // SNLID: a list need not have an identifier.
    out.put(&[1, 0, 0, 0]);
    put_limits(out);
    out.put(&segment_limit(unit));
    // No inline data, no held data, no tapes.
    out.put(&[0; 34 - 20]);
    out.put(&[0, CONCURRENT, CONCURRENT, granularity(unit), 0, 0]);
    out.put(&[0, 0, 0, 2, BLOCK_TO_BLOCK, IDENTIFICATION]);
    let len = u32::try_from(out.len() - 4).unwrap_or(0);
    out.set(0, &len.to_be_bytes());
    out.truncate(exchange.cdb.be32(10));
    Ok(Action::Good)
}

/// The third-party copy page (SPC-4, 7.8.17): commands, limits, descriptors, identifiers, copies.
pub(super) fn third_party(unit: &LogicalUnit, out: &mut DataIn<'_>) {
    out.put(&[0x00, 0x01, 0, 8, 7, 0x83, 1, 0x00, 0x84, 2, 0x00, 0x03]);
    out.put(&[0x00, 0x04, 0, 28, 0, 0, 0, 0]);
    put_limits(out);
    out.put(&[0; 32 - 16]);
    out.put(&[0x00, 0x08, 0, 4, 2, BLOCK_TO_BLOCK, IDENTIFICATION, 0]);
    out.put(&[0x00, 0x0c, 0, 4, 0, 2]);
    out.put(&OWN.to_be_bytes());
    out.put(&[0x80, 0x01, 0, 32]);
    let concurrent = u32::from(CONCURRENT).to_be_bytes();
    out.put(&concurrent);
    out.put(&concurrent);
    out.put(&segment_limit(unit));
    out.put(&[granularity(unit), 0]);
    out.put(&[0; 36 - 18]);
}
