//! What happens in a story: commands, mostly ones that mean something, and what comes between them.

use proptest::collection::vec;
use proptest::prelude::*;
use tandem::scsi::Address;
use tandem::scsi::command::COMMANDS;

use super::{BLOCKS, PORTS, TARGET, UNITS};

/// A command of an initiator.
#[derive(Clone, Debug)]
pub struct Call {
    pub port: usize,
    pub address: Address,
    pub cdb: Vec<u8>,
    /// As much of it as the command wants, with zeroes behind it.
    pub list: Vec<u8>,
    pub keeper_fails: bool,
}

#[derive(Clone, Debug)]
pub enum Step {
    Command(Call),
    /// The nexus of an initiator is lost, and made anew.
    Comes(usize),
    ResetUnit(usize, usize),
    ResetTarget(usize, Address),
}

pub fn story() -> impl Strategy<Value = Vec<Step>> {
    let port = 0..PORTS;
    let step = prop_oneof![
        60 => call().prop_map(Step::Command),
        1 => port.clone().prop_map(Step::Comes),
        1 => (port.clone(), 0..3_usize).prop_map(|(port, unit)| Step::ResetUnit(port, unit)),
        1 => (port, address()).prop_map(|(port, address)| Step::ResetTarget(port, address)),
    ];
    vec(step, 1..100)
}

fn call() -> impl Strategy<Value = Call> {
    let fails = prop_oneof![15 => Just(false), 1 => Just(true)];
    (0..PORTS, address(), command(), fails).prop_map(
        |(port, address, (cdb, list), keeper_fails)| Call {
            port,
            address,
            cdb,
            list,
            keeper_fails,
        },
    )
}

/// A CDB and its parameter list: any with any, or those that belong together.
fn command() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let lists = prop_oneof![
        2 => reservation(),
        1 => ranges(),
        1 => modes(),
        1 => vec(any::<u8>(), 0..80),
        1 => Just(Vec::new()),
    ];
    prop_oneof![
        12 => (cdb(), lists),
        5 => (0..8_u8, kind(), reservation()).prop_map(|(action, kind, list)| {
            (vec![0x5f, action, kind, 0, 0, 0, 0, 0, list.len() as u8, 0], list)
        }),
        1 => ranges().prop_map(|list| {
            (vec![0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], list)
        }),
        2 => copies().prop_map(|list| {
            let [high, low] = (list.len() as u16).to_be_bytes();
            (vec![0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, low, 0, 0], list)
        }),
        // WRITE SAME (16) of few zeroes: its count has four bytes, of which most are too large.
        1 => (0..9_u8, 1..9_u8, any::<bool>()).prop_map(|(lba, count, unmap)| {
            let flags = 1 | u8::from(unmap) << 3;
            (vec![0x93, flags, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, count, 0, 0], Vec::new())
        }),
        1 => modes().prop_map(|list| match list[3..8] {
            // The longer header is all zeroes, a page is not.
            [0, 0, 0, 0, 0] => (vec![0x55, 0x10, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], list),
            _ => (vec![0x15, 0x10, 0, 0, list.len() as u8, 0], list),
        }),
    ]
}

/// SCOPE and TYPE, mostly one that there is.
fn kind() -> impl Strategy<Value = u8> {
    let known = prop::sample::select(vec![1, 3, 5, 6, 7, 8]);
    prop_oneof![15 => known, 1 => any::<u8>()]
}

fn address() -> impl Strategy<Value = Address> {
    prop_oneof![
        24 => Just(UNITS[0]),
        6 => Just(UNITS[1]),
        2 => Just(Address::WellKnown { target: TARGET }),
        1 => Just(Address::Controller),
        2 => (prop_oneof![Just(TARGET), any::<u8>()], any::<[u8; 6]>())
            .prop_map(|(target, lun)| Address::of(target, lun)),
    ]
}

/// Bytes as fields have them: mostly none set, few, or all.
fn byte() -> impl Strategy<Value = u8> {
    prop_oneof![6 => Just(0), 3 => 1..9_u8, 1 => any::<u8>(), 1 => Just(0xff)]
}

/// An LBA near the end, if there is one; and the fields, masked as the table says.
fn legal() -> impl Strategy<Value = Vec<u8>> {
    let near_end = prop_oneof![3 => Just(None), 1 => (0..12_u64).prop_map(Some)];
    (0..COMMANDS.len(), vec(byte(), 16), near_end).prop_map(|(at, fields, near_end)| {
        let usage = COMMANDS[at].usage;
        let mut cdb: Vec<u8> = usage.iter().zip(&fields).map(|(u, f)| u & f).collect();
        if let Some(near_end) = near_end {
            let lba = (BLOCKS + 2 - near_end).to_be_bytes();
            match cdb.len() {
                10 | 12 => cdb[2..6].copy_from_slice(&lba[4..]),
                16 => cdb[2..10].copy_from_slice(&lba),
                _ => {}
            }
            for (byte, usage) in cdb.iter_mut().zip(usage) {
                *byte &= usage;
            }
        }
        cdb[0] = usage[0];
        if let Some(action) = COMMANDS[at].service_action {
            cdb[1] = cdb[1] & !0x1f | action;
        }
        cdb
    })
}

fn cdb() -> impl Strategy<Value = Vec<u8>> {
    let flips = vec((any::<prop::sample::Index>(), 0..8_u32), 1..4);
    prop_oneof![
        12 => legal(),
        4 => (legal(), flips).prop_map(|(mut cdb, flips)| {
            for (at, bit) in flips {
                let at = at.index(cdb.len());
                cdb[at] ^= 1 << bit;
            }
            cdb
        }),
        // As transports bring them: longer than the command, with anything behind it.
        2 => (legal(), vec(any::<u8>(), 0..24)).prop_map(|(cdb, rest)| [cdb, rest].concat()),
        1 => (legal(), any::<prop::sample::Index>())
            .prop_map(|(cdb, at)| cdb[..=at.index(cdb.len())].to_vec()),
        2 => vec(any::<u8>(), 2..40),
    ]
}

/// Of PERSISTENT RESERVE OUT.
fn reservation() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![12 => Just(0), 4 => Just(1), 1 => Just(5), 1 => any::<u8>()];
    (0..4_u64, 0..4_u64, flags).prop_map(|(key, action_key, flags)| {
        let mut list = [key.to_be_bytes(), action_key.to_be_bytes(), [0; 8]].concat();
        list[20] = flags;
        list
    })
}

/// Of UNMAP.
fn ranges() -> impl Strategy<Value = Vec<u8>> {
    let lba = prop_oneof![3 => 0..9_u64, 2 => BLOCKS - 9..BLOCKS + 2, 1 => any::<u64>()];
    let count = prop_oneof![5 => 0..9_u32, 1 => any::<u32>()];
    let descriptors = vec((lba, count), 0..4);
    (descriptors, -1..2_i16).prop_map(|(descriptors, off)| {
        let bytes = (descriptors.len() * 16) as i16 + off;
        let mut list = [[0; 2], bytes.max(0).to_be_bytes(), [0; 2], [0; 2]].concat();
        for (lba, count) in descriptors {
            list.extend(lba.to_be_bytes());
            list.extend(count.to_be_bytes());
            list.extend([0; 4]);
        }
        list
    })
}

/// Of EXTENDED COPY: segments within the logical unit, mostly, or with CSCDs that there are not.
fn copies() -> impl Strategy<Value = Vec<u8>> {
    let lba = || prop_oneof![3 => 0..9_u64, 2 => BLOCKS - 9..BLOCKS + 2, 1 => any::<u64>()];
    let count = prop_oneof![5 => 0..9_u16, 1 => any::<u16>()];
    let cscd = || prop_oneof![9 => Just(0xffff_u16), 1 => any::<u16>()];
    let segments = vec((cscd(), cscd(), count, lba(), lba()), 0..4);
    let usage = prop_oneof![4 => Just(0_u8), 1 => Just(0x18), 1 => any::<u8>()];
    (segments, 0..4_u8, usage, any::<[u8; 16]>()).prop_map(|(segments, name, usage, noise)| {
        let mut list = vec![0; 16];
        (list[0], list[1]) = (name, usage);
        // One header in some is anything.
        if noise[0] > 0xf0 {
            list.copy_from_slice(&noise);
        }
        list[8..12].copy_from_slice(&(segments.len() as u32 * 28).to_be_bytes());
        for (source, destination, count, from, to) in segments {
            list.extend([0x02, 0, 0, 0x18]);
            list.extend(
                [source, destination, 0, count]
                    .map(u16::to_be_bytes)
                    .concat(),
            );
            list.extend([from, to].map(u64::to_be_bytes).concat());
        }
        list
    })
}

/// Of MODE SELECT: the header of either, and a page as it may be sent.
fn modes() -> impl Strategy<Value = Vec<u8>> {
    let header = prop_oneof![Just(4), Just(8)];
    (header, 0..3_usize, byte(), byte()).prop_map(|(header, page, first, third)| {
        let mut list = vec![0; header];
        match page {
            0 => list.extend([&[0x08, 18, first & 4][..], &[0; 17]].concat()),
            1 => {
                let parameters = [0x0a, 10, first & 4, 0x10, third & 8];
                list.extend([&parameters[..], &[0; 7]].concat());
            }
            _ => list.extend([0x1c, 10, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0]),
        }
        list
    })
}
