//! SCSI commands byte by byte: what SPC-4 and SBC-3 say that goes in and comes out, written out here and not taken from the
//! code. Then the same through virtio-scsi rings over the software controller, with what a hostile guest may put there.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "scsi/log.rs"]
mod log;
#[path = "scsi/plain.rs"]
mod plain;
#[path = "scsi/select.rs"]
mod select;
#[path = "scsi/verify.rs"]
mod verify;

use std::sync::Arc;

use tandem::block::{BlockCount, BlockOp, BlockRange, Geometry, Lba, RangeList};
use tandem::scsi::command::COMMANDS;
use tandem::scsi::{
    Action, Address, Attention, Carry, Cdb, DataIn, Exchange, Health, HealthReport, Initiator,
    LogicalUnit, Lun, MAX_INITIATORS, MAX_SENSE_BYTES, Nexus, RangeLock, Sense, ShareError, Target,
    UnitIds,
};

const NOTHING: [u8; 0] = [];
const BLOCKS: u64 = 0x1_2345;
const NGUID: [u8; 16] = [0xa1; 16];
const EUI64: [u8; 8] = [0xb2; 8];

/// One initiator of a target with a disk at LUN 0 and a read-only one at LUN 300; unit attentions told.
struct Bench {
    nexus: Nexus,
    health: Arc<Health>,
    buffer: Vec<u8>,
    ranges: RangeList,
}

/// How a command ended, and what it said.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    action: Action,
    data: Vec<u8>,
}

const DISK: Address = Address::Unit {
    target: 3,
    lun: Lun::new(0),
};
const READ_ONLY: Address = Address::Unit {
    target: 3,
    lun: Lun::new(300),
};
const ABSENT: Address = Address::Unit {
    target: 3,
    lun: Lun::new(7),
};
const WELL_KNOWN: Address = Address::WellKnown { target: 3 };

impl Bench {
    fn fresh() -> Bench {
        let disk = |shift, read_only| {
            LogicalUnit::new(Geometry::new(shift, BLOCKS, read_only).unwrap(), "serial-1")
        };
        let health = Arc::new(Health::default());
        let first = disk(9, false)
            .with_health(Arc::clone(&health))
            .with_ids(UnitIds {
                eui64: Some(EUI64),
                nguid: Some(NGUID),
                uuid: None,
            })
            .with_volatile_cache(true)
            .with_provisioning(true, true, true)
            .with_copy(128);
        let lun = |number| Lun::new(number).unwrap();
        let units = vec![(3, lun(0), first), (3, lun(300), disk(12, true))];
        let target = Arc::new(Target::new(&initiator("vm0"), units).unwrap());
        Bench {
            buffer: vec![0xee; target.data_in_bytes()],
            nexus: Nexus::new(target),
            health,
            ranges: RangeList::new(),
        }
    }

    fn new() -> Bench {
        let mut bench = Bench::fresh();
        for address in [DISK, READ_ONLY] {
            let outcome = bench.run_at(address, &[0; 6], &[]);
            assert_eq!(outcome.action, Action::Check(Sense::new(6, 0x29, 0)));
        }
        bench
    }

    fn run_at(&mut self, address: Address, cdb: &[u8], parameters: &[u8]) -> Outcome {
        let cdb = Cdb::new(cdb);
        let unit = self.nexus.find(address);
        let wanted = self.nexus.parameter_bytes(unit, &cdb) as usize;
        let mut exchange = Exchange {
            cdb: &cdb,
            parameters: &parameters[..wanted.min(parameters.len())],
            data_in: DataIn::new(&mut self.buffer),
            ranges: &mut self.ranges,
        };
        let action = self.nexus.execute(address, unit, &mut exchange);
        Outcome {
            action,
            data: exchange.data_in.as_slice().to_vec(),
        }
    }

    fn run(&mut self, cdb: &[u8]) -> Outcome {
        self.run_at(DISK, cdb, &[])
    }

    /// What a command that ends well says.
    #[track_caller]
    fn says(&mut self, cdb: &[u8]) -> Vec<u8> {
        let outcome = self.run(cdb);
        assert_eq!(outcome.action, Action::Good, "{cdb:02x?}");
        outcome.data
    }

    /// What a command that is refused says, in the fixed format; and it is refused without data.
    #[track_caller]
    fn refuses(&mut self, cdb: &[u8], parameters: &[u8]) -> Vec<u8> {
        let outcome = self.run_at(DISK, cdb, parameters);
        let Action::Check(sense) = outcome.action else {
            panic!("{cdb:02x?} came to {outcome:?}")
        };
        assert!(outcome.data.is_empty());
        fixed(&sense)
    }

    #[track_caller]
    fn carries(&mut self, cdb: &[u8], parameters: &[u8]) -> Carry {
        match self.run_at(DISK, cdb, parameters).action {
            Action::Carry(carry) => carry,
            other => panic!("{cdb:02x?} came to {other:?}"),
        }
    }
}

fn initiator(name: &str) -> Initiator {
    Initiator::new(name).unwrap()
}

fn fixed(sense: &Sense) -> Vec<u8> {
    let mut bytes = [0; MAX_SENSE_BYTES];
    let len = sense.encode(false, &mut bytes);
    bytes[..len].to_vec()
}

/// SPC-4, 4.5.3: key, code and qualifier, and the sense-key-specific bytes.
fn fixed_sense(key: u8, asc: u8, ascq: u8, specific: [u8; 3]) -> Vec<u8> {
    let [a, b, c] = specific;
    vec![
        0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, asc, ascq, 0, a, b, c,
    ]
}

/// INVALID FIELD IN CDB at a byte and bit.
fn invalid_field(byte: u8, bit: u8) -> Vec<u8> {
    fixed_sense(5, 0x24, 0, [0xc8 | bit, 0, byte])
}

fn range(lba: u64, count: u32) -> BlockRange {
    BlockRange::new(Lba::new(lba), BlockCount::new(count))
}

#[test]
fn sense_in_both_formats_has_the_bytes_of_the_standard() {
    let mut out = [0; MAX_SENSE_BYTES];
    let sense = Sense {
        information: Some(0x1234_5678),
        ..Sense::new(3, 0x11, 0)
    };
    assert_eq!(sense.encode(false, &mut out), 18);
    assert_eq!(
        out[..18],
        [
            0xf0, 0, 3, 0x12, 0x34, 0x56, 0x78, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(sense.encode(true, &mut out), 20);
    assert_eq!(
        out[..20],
        [
            0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0x12, 0x34, 0x56, 0x78
        ]
    );
    // What does not fit the fixed format is not valid there.
    let sense = Sense {
        information: Some(1 << 32),
        ..sense
    };
    sense.encode(false, &mut out);
    assert_eq!(out[..7], [0x70, 0, 3, 0, 0, 0, 0]);
    let field = Sense::in_cdb(8, 5);
    assert_eq!(field.encode(true, &mut out), 16);
    assert_eq!(
        out[..16],
        [0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xcd, 0, 8, 0]
    );
    let field = Sense::in_parameters(0x102);
    assert_eq!(fixed(&field), fixed_sense(5, 0x26, 0, [0x80, 1, 2]));
}

#[test]
fn unknown_opcode_is_20_00_and_unknown_service_action_a_field() {
    let mut bench = Bench::new();
    let known: Vec<u8> = COMMANDS.iter().map(|command| command.opcode).collect();
    for opcode in (0..=255).filter(|opcode| !known.contains(opcode)) {
        let mut cdb = [0; 32];
        cdb[0] = opcode;
        assert_eq!(bench.refuses(&cdb, &[]), fixed_sense(5, 0x20, 0, [0; 3]));
    }
    for opcode in [0x9e, 0xa3] {
        let mut cdb = [0; 16];
        cdb[..2].copy_from_slice(&[opcode, 0x1f]);
        assert_eq!(bench.refuses(&cdb, &[]), invalid_field(1, 4));
    }
    // A CDB that the transport cut short.
    assert_eq!(
        bench.refuses(&[0x28; 6], &[]),
        fixed_sense(5, 0x20, 0, [0; 3])
    );
}

#[test]
fn every_bit_that_a_command_does_not_look_at_is_refused_where_it_is() {
    let mut bench = Bench::new();
    for command in COMMANDS {
        let mut cdb = vec![0; command.usage.len()];
        cdb[0] = command.opcode;
        let action = command.service_action.unwrap_or(0);
        for (byte, usage) in command.usage.iter().enumerate().skip(1) {
            let used = match command.service_action {
                Some(_) if byte == 1 => usage | 0x1f,
                _ => *usage,
            };
            for bit in (0..8).filter(|bit| used >> bit & 1 == 0) {
                let mut cdb = cdb.clone();
                cdb[1] |= action;
                cdb[byte] |= 1 << bit;
                assert_eq!(
                    bench.refuses(&cdb, &[0; 512]),
                    invalid_field(byte as u8, bit),
                    "{cdb:02x?}"
                );
            }
        }
    }
}

#[test]
fn reads_and_writes_of_all_lengths_name_their_blocks() {
    let mut bench = Bench::new();
    let (read, write) = (BlockOp::Read, BlockOp::Write);
    let cases: [(&[u8], BlockOp, bool); 13] = [
        (
            &[0x08, 0x01, 0x02, 0x03, 5, 0],
            read(range(0x1_0203, 5)),
            false,
        ),
        // No blocks are 256; the upper bits of byte 1 were the LUN's once.
        (
            &[0x0a, 0x00, 0x00, 0x10, 0, 0],
            write(range(0x10, 256)),
            false,
        ),
        (
            &[0x28, 0, 0, 1, 2, 3, 0, 0, 5, 0],
            read(range(0x1_0203, 5)),
            false,
        ),
        // DPO and FUA of a read; a group number.
        (
            &[0x28, 0x18, 0, 0, 0, 3, 0x1f, 1, 0, 0],
            read(range(3, 256)),
            false,
        ),
        (
            &[0x2a, 0x10, 0, 0, 0, 3, 0, 0, 5, 0],
            write(range(3, 5)),
            false,
        ),
        (
            &[0x2a, 0x08, 0, 0, 0, 3, 0, 0, 5, 0],
            write(range(3, 5)),
            true,
        ),
        (
            &[0xa8, 0, 0, 0, 0, 3, 0, 1, 0, 0, 0, 0],
            read(range(3, 0x1_0000)),
            false,
        ),
        (
            &[0xaa, 0x08, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0],
            write(range(3, 5)),
            true,
        ),
        (
            &[0x88, 0, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 5, 0, 0],
            read(range(0x1_0203, 5)),
            false,
        ),
        (
            &[0x8a, 0x08, 0, 0, 0, 0, 0, 1, 2, 3, 0, 0, 0, 5, 0, 0],
            write(range(0x1_0203, 5)),
            true,
        ),
        // The last block.
        (
            &[0x28, 0, 0, 1, 0x23, 0x44, 0, 0, 1, 0],
            read(range(BLOCKS - 1, 1)),
            false,
        ),
        (&[0x35, 0x02, 0, 0, 0, 0, 0, 0, 0, 0], BlockOp::Flush, false),
        (
            &[0x91, 0, 0, 0, 0, 0, 0, 1, 0x23, 0x45, 0, 0, 0, 0, 0, 0],
            BlockOp::Flush,
            false,
        ),
    ];
    for (cdb, op, fua) in cases {
        let bytes = |yes: bool, count: u32| if yes { u64::from(count) * 512 } else { 0 };
        let (data_in, data_out) = match op {
            BlockOp::Read(range) => (bytes(true, range.count.get()), 0),
            BlockOp::Write(range) => (0, bytes(true, range.count.get())),
            _ => (0, 0),
        };
        let expected = Carry {
            op,
            unit: 0,
            fua,
            data_in,
            data_out,
        };
        assert_eq!(bench.carries(cdb, &[]), expected, "{cdb:02x?}");
    }
}

#[test]
fn blocks_beyond_the_end_are_21_00_and_none_at_the_end_are_fine() {
    let mut bench = Bench::new();
    let out_of_range = fixed_sense(5, 0x21, 0, [0; 3]);
    let end = [0x00, 0x01, 0x23, 0x45];
    for opcode in [0x28, 0x2a, 0x35] {
        let cdb = |lba: [u8; 4], count: u8| {
            let [a, b, c, d] = lba;
            [opcode, 0, a, b, c, d, 0, 0, count, 0]
        };
        assert_eq!(bench.refuses(&cdb(end, 1), &[]), out_of_range);
        assert_eq!(
            bench.refuses(&cdb([0, 1, 0x23, 0x44], 2), &[]),
            out_of_range
        );
        assert_eq!(
            bench.refuses(&cdb([0, 1, 0x23, 0x46], 0), &[]),
            out_of_range
        );
        assert_eq!(bench.refuses(&cdb([0xff; 4], 255), &[]), out_of_range);
    }
    assert_eq!(
        bench.says(&[0x28, 0, 0, 1, 0x23, 0x45, 0, 0, 0, 0]),
        NOTHING
    );
    // LBA + count wraps.
    let mut cdb = [0xff; 16];
    (cdb[0], cdb[1], cdb[14], cdb[15]) = (0x88, 0, 0, 0);
    assert_eq!(bench.refuses(&cdb, &[]), out_of_range);
}

#[test]
fn writes_to_a_read_only_disk_are_write_protected() {
    let mut bench = Bench::new();
    let cdbs: [&[u8]; 3] = [
        &[0x0a, 0, 0, 0, 1, 0],
        &[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0],
        &[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0],
    ];
    for cdb in cdbs {
        let outcome = bench.run_at(READ_ONLY, cdb, &[0; 4096]);
        assert_eq!(
            outcome.action,
            Action::Check(Sense::new(7, 0x27, 0)),
            "{cdb:02x?}"
        );
    }
    let read = bench.run_at(READ_ONLY, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
    assert!(
        matches!(read.action, Action::Carry(carry) if carry.unit == 1 && carry.data_in == 4096)
    );
    let modes = bench.run_at(READ_ONLY, &[0x1a, 0x08, 0x3f, 0, 255, 0], &[]);
    assert_eq!(modes.data[2], 0x90); // WP, DPOFUA
}

#[test]
fn inquiry_has_the_standard_data_and_is_cut_to_the_allocation_length() {
    let mut bench = Bench::new();
    let data = bench.says(&[0x12, 0, 0, 0, 255, 0]);
    assert_eq!(data.len(), 96);
    assert_eq!(data[..8], [0x00, 0, 0x06, 0x12, 91, 0x18, 0, 0x02]);
    // 3PC only where the device copies.
    let other = bench.run_at(READ_ONLY, &[0x12, 0, 0, 0, 96, 0], &[]).data;
    assert_eq!(other[5], 0x10);
    assert_eq!(&data[8..36], b"TANDEM  Tandem NVMe disk0001");
    assert_eq!(data[58..64], [0x00, 0x80, 0x04, 0x60, 0x04, 0xc0]);
    assert_eq!(bench.says(&[0x12, 0, 0, 0, 5, 0]), data[..5]);
    assert_eq!(bench.says(&[0x12, 0, 0, 0, 0, 0]), NOTHING);
    // A page without EVPD, and a page that is not there.
    assert_eq!(
        bench.refuses(&[0x12, 0, 0x80, 0, 255, 0], &[]),
        invalid_field(2, 7)
    );
    assert_eq!(
        bench.refuses(&[0x12, 1, 0x84, 0, 255, 0], &[]),
        invalid_field(2, 7)
    );
}

#[test]
fn vital_product_data_pages_have_their_shapes() {
    let mut bench = Bench::new();
    let mut page = |code| bench.says(&[0x12, 1, code, 1, 0, 0]);
    assert_eq!(
        page(0),
        [0, 0, 0, 8, 0x00, 0x80, 0x83, 0x86, 0x8f, 0xb0, 0xb1, 0xb2]
    );
    assert_eq!(page(0x80), b"\x00\x80\x00\x08serial-1");
    let mut expected = vec![0, 0x83, 0, 20 + 12 + 20 + 8 + 8];
    expected.extend([1, 2, 0, 16]);
    expected.extend(NGUID);
    expected.extend([1, 2, 0, 8]);
    expected.extend(EUI64);
    expected.extend([2, 1, 0, 16]);
    expected.extend(b"TANDEM  serial-1");
    expected.extend([1, 0x14, 0, 4, 0, 0, 0, 1]);
    expected.extend([1, 0x15, 0, 4, 0, 0, 0, 1]);
    assert_eq!(page(0x83), expected);
    // SIMPSUP; V_SUP; the longest sense data.
    let mut extended = vec![0, 0x86, 0, 60, 0, 0x01, 0x01, 0, 0, 0, 0, 0, 0, 28];
    extended.resize(64, 0);
    assert_eq!(page(0x86), extended);
    let limits = page(0xb0);
    assert_eq!(
        (limits.len(), limits[..6].to_vec()),
        (64, vec![0, 0xb0, 0, 60, 1, 32])
    );
    assert_eq!(
        limits[20..32],
        [0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0, 0, 0, 0, 1]
    );
    assert_eq!(limits[36..44], [0, 0, 0, 0, 0, 0x40, 0, 0]);
    let characteristics = page(0xb1);
    assert_eq!(
        (characteristics.len(), characteristics[..6].to_vec()),
        (64, vec![0, 0xb1, 0, 60, 0, 1])
    );
    assert_eq!(page(0xb2), [0, 0xb2, 0, 4, 0, 0xe4, 2, 0]);
}

#[test]
fn capacity_is_the_last_block_and_its_length() {
    let mut bench = Bench::new();
    let data = bench.says(&[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(data, [0, 1, 0x23, 0x44, 0, 0, 2, 0]);
    assert_eq!(
        bench.refuses(&[0x25, 0, 0, 0, 0, 1, 0, 0, 0, 0], &[]),
        invalid_field(2, 7)
    );
    let cdb = |len| [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, len, 0, 0];
    let data = bench.says(&cdb(255));
    let mut expected = vec![0, 0, 0, 0, 0, 1, 0x23, 0x44, 0, 0, 2, 0, 0, 0, 0xc0, 0];
    expected.resize(32, 0);
    assert_eq!(data, expected);
    assert_eq!(bench.says(&cdb(12)), expected[..12]);
    let large = LogicalUnit::new(Geometry::new(9, 1 << 33, false).unwrap(), "l");
    let units = vec![(0, Lun::new(0).unwrap(), large)];
    let target = Target::new(&initiator("vm0"), units);
    bench.nexus = Nexus::new(Arc::new(target.unwrap()));
    let at = Address::Unit {
        target: 0,
        lun: Lun::new(0),
    };
    bench.run_at(at, &[0; 6], &[]);
    let data = bench
        .run_at(at, &[0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[])
        .data;
    assert_eq!(data, [0xff, 0xff, 0xff, 0xff, 0, 0, 2, 0]);
}

#[test]
fn mode_pages_tell_of_the_cache_in_both_headers() {
    let mut bench = Bench::new();
    let mut caching = vec![0x08, 0x12, 0x04];
    caching.resize(20, 0);
    let control = [0x0a, 0x0a, 0, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
    let exceptions = [0x1c, 0x0a, 0x08, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let short = [&[23, 0, 0x10, 0][..], &caching].concat();
    assert_eq!(bench.says(&[0x1a, 0x08, 0x08, 0, 255, 0]), short);
    assert_eq!(bench.says(&[0x1a, 0x08, 0x08, 0, 4, 0]), short[..4]);
    let descriptor = [0, 1, 0x23, 0x45, 0, 0, 2, 0];
    let all = [&caching[..], &control, &exceptions].concat();
    let with = [&[55, 0, 0x10, 8][..], &descriptor, &all].concat();
    assert_eq!(bench.says(&[0x1a, 0, 0x3f, 0, 255, 0]), with);
    assert_eq!(bench.says(&[0x1a, 0, 0x3f, 0xff, 255, 0]), with);
    let long = [&[0, 26, 0, 0x10, 0, 0, 0, 0][..], &caching].concat();
    assert_eq!(bench.says(&[0x5a, 0x08, 0x08, 0, 0, 0, 0, 0, 255, 0]), long);
    let long_lba = [0, 0, 0, 0, 0, 1, 0x23, 0x45, 0, 0, 0, 0, 0, 0, 2, 0];
    let long = [&[0, 34, 0, 0x10, 1, 0, 0, 16][..], &long_lba, &control].concat();
    assert_eq!(bench.says(&[0x5a, 0x10, 0x0a, 0, 0, 0, 0, 0, 255, 0]), long);
    // Nothing is saved; no such page, no such subpage.
    assert_eq!(
        bench.refuses(&[0x1a, 0, 0xc8, 0, 255, 0], &[]),
        fixed_sense(5, 0x39, 0, [0; 3])
    );
    assert_eq!(
        bench.refuses(&[0x1a, 0, 0x02, 0, 255, 0], &[]),
        invalid_field(2, 5)
    );
    assert_eq!(
        bench.refuses(&[0x1a, 0, 0x08, 1, 255, 0], &[]),
        invalid_field(3, 7)
    );
}

#[test]
fn request_sense_tells_a_unit_attention_once_in_the_format_asked_for() {
    let mut bench = Bench::fresh();
    assert_eq!(
        bench.says(&[3, 0, 0, 0, 255, 0]),
        fixed_sense(6, 0x29, 0, [0; 3])
    );
    assert_eq!(
        bench.says(&[3, 0, 0, 0, 255, 0]),
        fixed_sense(0, 0, 0, [0; 3])
    );
    bench.nexus.attend(0, Attention::Reset);
    assert_eq!(
        bench.says(&[3, 1, 0, 0, 255, 0]),
        [0x72, 6, 0x29, 3, 0, 0, 0, 0]
    );
    assert_eq!(bench.says(&[3, 1, 0, 0, 3, 0]), [0x72, 0, 0]);
    // INQUIRY and REPORT LUNS leave it alone; any other command ends with it, also one that is wrong.
    bench.nexus.attend(0, Attention::Reset);
    bench.says(&[0x12, 0, 0, 0, 255, 0]);
    bench.says(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16, 0, 0]);
    assert_eq!(
        bench.refuses(&[0xff; 6], &[]),
        fixed_sense(6, 0x29, 3, [0; 3])
    );
    assert_eq!(bench.says(&[0; 6]), NOTHING);
    let absent = bench.run_at(ABSENT, &[3, 0, 0, 0, 255, 0], &[]);
    assert_eq!(
        (absent.action, absent.data),
        (Action::Good, fixed_sense(5, 0x25, 0, [0; 3]))
    );
}

#[test]
fn luns_are_reported_by_every_select_code() {
    let mut bench = Bench::new();
    let cdb = |select, len| [0xa0, 0, select, 0, 0, 0, 0, 0, 0, len, 0, 0];
    let (first, second) = ([0; 8], [0x41, 0x2c, 0, 0, 0, 0, 0, 0]);
    let well_known = [0xc1, 0x01, 0, 0, 0, 0, 0, 0];
    let list = |luns: &[[u8; 8]]| {
        [
            &[0, 0, 0, luns.len() as u8 * 8, 0, 0, 0, 0][..],
            luns.as_flattened(),
        ]
        .concat()
    };
    for (select, luns) in [
        (0x00, &[first, second][..]),
        (0x01, &[well_known]),
        (0x02, &[first, second, well_known]),
        (0x10, &[]),
        (0x11, &[first, second]),
        (0x12, &[]),
    ] {
        assert_eq!(bench.says(&cdb(select, 255)), list(luns), "{select:#x}");
    }
    assert_eq!(bench.says(&cdb(0, 20)), list(&[first, second])[..20]);
    assert_eq!(bench.refuses(&cdb(3, 255), &[]), invalid_field(2, 7));
    assert_eq!(bench.refuses(&cdb(0, 15), &[]), invalid_field(6, 7));
    // Also from where there is no logical unit, and from the well-known one.
    for address in [ABSENT, WELL_KNOWN] {
        assert_eq!(
            bench.run_at(address, &cdb(0, 255), &[]).data,
            list(&[first, second])
        );
    }
    // Of the whole controller: with target identifiers.
    let all = bench.run_at(Address::Controller, &cdb(0, 255), &[]).data;
    assert_eq!(
        all,
        list(&[[1, 3, 0x40, 0, 0, 0, 0, 0], [1, 3, 0x41, 0x2c, 0, 0, 0, 0]])
    );
}

#[test]
fn absent_unit_is_told_by_inquiry_and_refuses_the_rest() {
    let mut bench = Bench::new();
    let inquiry = bench.run_at(ABSENT, &[0x12, 0, 0, 0, 255, 0], &[]);
    assert_eq!((inquiry.action, inquiry.data[0]), (Action::Good, 0x7f));
    for opcode in [0x00, 0x28, 0x1a, 0xff, 0xa3] {
        let mut cdb = [0; 16];
        cdb[0] = opcode;
        let outcome = bench.run_at(ABSENT, &cdb, &[]);
        assert_eq!(
            outcome.action,
            Action::Check(Sense::new(5, 0x25, 0)),
            "{opcode:#x}"
        );
    }
}

#[test]
fn well_known_unit_has_its_commands_and_no_blocks() {
    let mut bench = Bench::new();
    let inquiry = bench.run_at(WELL_KNOWN, &[0x12, 0, 0, 0, 255, 0], &[]);
    assert_eq!((inquiry.action, inquiry.data[0]), (Action::Good, 0x1e));
    let pages = bench.run_at(WELL_KNOWN, &[0x12, 1, 0, 0, 255, 0], &[]);
    assert_eq!(pages.data, [0x1e, 0, 0, 1, 0]);
    assert_eq!(bench.run_at(WELL_KNOWN, &[0; 6], &[]).action, Action::Good);
    let read = bench.run_at(WELL_KNOWN, &[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
    assert_eq!(read.action, Action::Check(Sense::new(5, 0x20, 0)));
}

#[test]
fn luns_are_read_in_every_addressing_method_that_there_is() {
    let unit = |lun| Address::Unit {
        target: 9,
        lun: Some(Lun::new(lun).unwrap()),
    };
    let unknown = Address::Unit {
        target: 9,
        lun: None,
    };
    for (bytes, address) in [
        ([0x00, 0x05, 0, 0, 0, 0], unit(5)),
        ([0x40, 0x05, 0, 0, 0, 0], unit(5)),
        ([0x7f, 0xff, 0, 0, 0, 0], unit(16383)),
        ([0xd2, 0, 0x01, 0x2c, 0, 0], unit(300)),
        ([0xc1, 0x01, 0, 0, 0, 0], Address::WellKnown { target: 9 }),
        // Another bus, logical unit addressing, an unknown well-known one, beyond 14 bits, a second level.
        ([0x01, 0x05, 0, 0, 0, 0], unknown),
        ([0x80, 0x05, 0, 0, 0, 0], unknown),
        ([0xc1, 0x02, 0, 0, 0, 0], unknown),
        ([0xd2, 0, 0x40, 0, 0, 0], unknown),
        ([0xd2, 1, 0, 0, 0, 0], unknown),
        ([0x40, 0x05, 0, 1, 0, 0], unknown),
        ([0x40, 0x05, 0, 0, 0, 1], unknown),
    ] {
        assert_eq!(Address::of(9, bytes), address, "{bytes:02x?}");
    }
    assert_eq!(Lun::new(16384), None);
}

#[test]
fn supported_operation_codes_are_those_of_the_table() {
    let mut bench = Bench::new();
    let cdb =
        |options, opcode, action, len| [0xa3, 0x0c, options, opcode, 0, action, 0, 0, 8, len, 0, 0];
    let all = bench.says(&cdb(0, 0, 0, 0));
    assert_eq!(all[..4], (COMMANDS.len() as u32 * 8).to_be_bytes());
    assert_eq!(all.len(), 4 + COMMANDS.len() * 8);
    for (entry, command) in all[4..].chunks(8).zip(COMMANDS) {
        let action = command.service_action;
        let flags = u8::from(action.is_some());
        let len = command.usage.len() as u8;
        assert_eq!(
            entry,
            [command.opcode, 0, 0, action.unwrap_or(0), 0, flags, 0, len]
        );
    }
    let timed = bench.says(&cdb(0x80, 0, 0, 0));
    assert_eq!(timed.len(), 4 + COMMANDS.len() * 20);
    assert_eq!(timed[4..16], [0, 0, 0, 0, 0, 2, 0, 6, 0, 10, 0, 0]);
    // One: by operation code, by service action too, by either.
    let read_10 = [
        0, 3, 0, 10, 0x28, 0x18, 0xff, 0xff, 0xff, 0xff, 0x1f, 0xff, 0xff, 0,
    ];
    assert_eq!(bench.says(&cdb(1, 0x28, 0, 0)), read_10);
    assert_eq!(bench.says(&cdb(3, 0x28, 0, 0)), read_10);
    let timed = bench.says(&cdb(0x81, 0x28, 0, 0));
    assert_eq!((timed[1], timed.len()), (0x83, 14 + 12));
    assert_eq!(
        bench.says(&cdb(2, 0x9e, 0x10, 0))[..6],
        [0, 3, 0, 16, 0x9e, 0x10]
    );
    let absent = [0, 1, 0, 0];
    assert_eq!(bench.says(&cdb(1, 0xff, 0, 0)), absent);
    assert_eq!(bench.says(&cdb(2, 0x9e, 0x11, 0)), absent);
    assert_eq!(bench.says(&cdb(3, 0x28, 1, 0)), absent);
    // Service actions where there are none, none where there are some, an unknown option.
    assert_eq!(bench.refuses(&cdb(2, 0x28, 0, 0), &[]), invalid_field(2, 2));
    assert_eq!(bench.refuses(&cdb(1, 0x9e, 0, 0), &[]), invalid_field(2, 2));
    assert_eq!(bench.refuses(&cdb(4, 0x28, 0, 0), &[]), invalid_field(2, 2));
    // A disk that cannot unmap has no UNMAP, and says so; the same of copies.
    let unmap = cdb(3, 0x42, 0, 0);
    assert_eq!(bench.says(&unmap)[..4], [0, 3, 0, 10]);
    assert_eq!(bench.run_at(READ_ONLY, &unmap, &[]).data, absent);
    let fewer = bench.run_at(READ_ONLY, &cdb(0, 0, 0, 0), &[]).data;
    assert_eq!(fewer.len(), all.len() - 4 * 8);
    let absent = [0x42, 0x83, 0x84];
    assert!(
        fewer[4..]
            .chunks(8)
            .all(|entry| !absent.contains(&entry[0]))
    );
    for opcode in absent {
        let reply = bench.run_at(READ_ONLY, &[&[opcode][..], &[0; 15]].concat(), &[]);
        assert!(
            matches!(reply.action, Action::Check(sense) if (sense.key, sense.asc, sense.ascq) == (5, 0x20, 0))
        );
    }
    let tasks = bench.says(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0]);
    assert_eq!(tasks, [0xdc, 0x03, 0, 0]);
    assert_eq!(
        bench.refuses(&[0xa3, 0x0d, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0], &[]),
        invalid_field(6, 7)
    );
}

#[test]
fn unmap_takes_whole_descriptors_and_refuses_lists_that_do_not_fit() {
    let mut bench = Bench::new();
    let cdb = |len: u16| {
        let [high, low] = len.to_be_bytes();
        [0x42, 0, 0, 0, 0, 0, 0, high, low, 0]
    };
    let list = |said: u16, extents: &[(u64, u32)]| {
        let mut list = vec![0; 8];
        list[..2].copy_from_slice(&(said + 6).to_be_bytes());
        list[2..4].copy_from_slice(&said.to_be_bytes());
        for (lba, count) in extents {
            list.extend(lba.to_be_bytes());
            list.extend(count.to_be_bytes());
            list.extend([0; 4]);
        }
        list
    };
    let two = list(32, &[(5, 6), (100, 1)]);
    let carry = bench.carries(&cdb(40), &two);
    assert_eq!((carry.op, carry.data_out), (BlockOp::Discard, 40));
    assert_eq!(bench.ranges.as_slice(), [range(5, 6), range(100, 1)]);
    // The last descriptor is not complete: ignored. None at all, and no list at all: fine.
    bench.carries(&cdb(40), &list(31, &[(5, 6), (100, 1)]));
    assert_eq!(bench.ranges.as_slice(), [range(5, 6)]);
    for (len, list) in [(8, list(0, &[])), (0, vec![]), (24, list(16, &[(9, 0)]))] {
        assert_eq!(bench.run_at(DISK, &cdb(len), &list).action, Action::Good);
    }
    let length = fixed_sense(5, 0x1a, 0, [0; 3]);
    assert_eq!(bench.refuses(&cdb(7), &two), length);
    assert_eq!(bench.refuses(&cdb(24), &two), length);
    assert_eq!(
        bench.refuses(&cdb(24), &list(16, &[(BLOCKS, 1)])),
        fixed_sense(5, 0x21, 0, [0; 3])
    );
    assert_eq!(
        bench.refuses(&cdb(24), &list(16, &[(u64::MAX, 2)])),
        fixed_sense(5, 0x21, 0, [0; 3])
    );
    let many = list(257 * 16, &[(0, 1); 257]);
    assert_eq!(
        bench.refuses(&cdb(8 + 257 * 16), &many),
        fixed_sense(5, 0x26, 0, [0x80, 0, 2])
    );
    let most = list(256 * 16, &[(0, 1); 256]);
    bench.carries(&cdb(8 + 256 * 16), &most);
    assert_eq!(bench.ranges.as_slice().len(), 256);
}

#[test]
fn write_same_is_write_zeroes_where_it_can_be() {
    let mut bench = Bench::new();
    let ten = |flags, count| [0x41, flags, 0, 0, 0, 7, 0, 0, count, 0];
    let sixteen = |flags, count| [0x93, flags, 0, 0, 0, 0, 0, 0, 0, 7, 0, 0, 0, count, 0, 0];
    let (zeroes, pattern) = ([0; 512], [0xa5; 512]);
    for unmap in [false, true] {
        let flags = u8::from(unmap) << 3;
        for carry in [
            bench.carries(&ten(flags, 9), &zeroes),
            bench.carries(&sixteen(flags, 9), &zeroes),
            bench.carries(&sixteen(flags | 1, 9), &[]),
        ] {
            assert_eq!(carry.op, BlockOp::WriteZeroes);
            assert_eq!(
                bench.ranges.as_slice(),
                [BlockRange {
                    unmap,
                    ..range(7, 9)
                }]
            );
        }
        let carry = bench.carries(&ten(flags, 9), &pattern);
        assert_eq!(
            (carry.op, carry.data_out),
            (BlockOp::WriteSame(range(7, 9)), 512)
        );
    }
    // WSNZ; too many; ANCHOR; LBA out of range.
    assert_eq!(bench.refuses(&ten(0, 0), &zeroes), invalid_field(7, 7));
    assert_eq!(bench.refuses(&sixteen(0, 0), &zeroes), invalid_field(10, 7));
    let mut many = sixteen(1, 1);
    many[10..14].copy_from_slice(&0x40_0001_u32.to_be_bytes());
    assert_eq!(bench.refuses(&many, &[]), invalid_field(10, 7));
    assert_eq!(bench.refuses(&ten(0x10, 1), &zeroes), invalid_field(1, 4));
    let mut beyond = sixteen(1, 1);
    beyond[2] = 1;
    assert_eq!(bench.refuses(&beyond, &[]), fixed_sense(5, 0x21, 0, [0; 3]));
}

#[test]
fn start_stop_and_prevent_allow_do_what_a_fixed_disk_can() {
    let mut bench = Bench::new();
    let stop = |byte_4| [0x1b, 0, 0, 0, byte_4, 0];
    assert_eq!(bench.carries(&stop(0), &[]).op, BlockOp::Flush);
    assert_eq!(bench.says(&stop(1)), NOTHING);
    assert_eq!(bench.says(&stop(4)), NOTHING);
    assert_eq!(bench.refuses(&stop(2), &[]), invalid_field(4, 1));
    assert_eq!(bench.refuses(&stop(0x30), &[]), invalid_field(4, 7));
    for prevent in [0, 1] {
        assert_eq!(bench.says(&[0x1e, 0, 0, 0, prevent, 0]), NOTHING);
    }
    assert_eq!(
        bench.refuses(&[0x1e, 0, 0, 0, 2, 0], &[]),
        invalid_field(4, 1)
    );
}

/// SAM-5, 5.14: the same unit through two hosts.
#[test]
fn unit_attentions_of_a_shared_unit_reach_the_others_in_their_order() {
    let disk = LogicalUnit::new(Geometry::new(9, BLOCKS, false).unwrap(), "shared");
    let host = |name: &str, lun: u16| {
        let units = vec![(0, Lun::new(lun).unwrap(), disk.clone())];
        Nexus::new(Arc::new(Target::new(&initiator(name), units).unwrap()))
    };
    let mut buffer = [0; 4096];
    let mut told = |nexus: &Nexus| {
        let mut codes = Vec::new();
        loop {
            let (cdb, mut ranges) = (Cdb::new(&[0; 6]), RangeList::new());
            let mut exchange = Exchange {
                cdb: &cdb,
                parameters: &[],
                data_in: DataIn::new(&mut buffer),
                ranges: &mut ranges,
            };
            match nexus.execute(DISK, Some(0), &mut exchange) {
                Action::Check(sense) => codes.push((sense.key, sense.asc, sense.ascq)),
                other => {
                    assert_eq!(other, Action::Good);
                    return codes;
                }
            }
        }
    };
    let (first, second) = (host("vm0", 0), host("vm1", 300));
    assert_eq!(told(&first), [(6, 0x29, 0)]);
    assert_eq!(told(&second), [(6, 0x29, 0)]);
    first.attend_others(0, Attention::ModeParameters);
    first.attend_others(0, Attention::Reset);
    first.attend_others(0, Attention::ModeParameters);
    assert_eq!(told(&first), []);
    assert_eq!(told(&second), [(6, 0x29, 3), (6, 0x2a, 1)]);
    // Nothing older than a power on is told.
    second.attend_others(0, Attention::Capacity);
    first.attend(0, Attention::PowerOn);
    first.attend(0, Attention::Inquiry);
    assert_eq!(told(&first), [(6, 0x29, 0), (6, 0x3f, 3)]);
    assert_eq!(told(&second), []);
    let units = vec![(0, Lun::new(0).unwrap(), disk.clone())];
    let error = Target::new(&initiator("VM1"), units).unwrap_err();
    assert_eq!(error, ShareError::Taken(initiator("vm1")));
    for at in 2..MAX_INITIATORS {
        host(&format!("vm{at}"), 0);
    }
    let units = vec![(0, Lun::new(0).unwrap(), disk)];
    let error = Target::new(&initiator("one-more"), units).unwrap_err();
    assert_eq!(error, ShareError::Full);
}
