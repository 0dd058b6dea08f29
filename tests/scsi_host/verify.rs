//! What is compared with the medium, and where sense data says that it differs.

use super::*;

const MISCOMPARE: (u8, u8, u8) = (0xe, 0x1d, 0);

fn verify_10(options: u8, lba: u8, blocks: u8) -> [u8; 10] {
    [0x2f, options, 0, 0, 0, lba, 0, 0, blocks, 0]
}

#[test]
fn verify_finds_the_first_byte_that_differs() {
    let mut host = Host::new();
    // More than one bounce buffer holds.
    let bytes: Vec<u8> = (0..200 * 512_u32).map(|at| (at / 77) as u8).collect();
    assert_eq!(
        host.command(FIRST, &write_10(20, 200), &bytes, 0),
        good(0, 0)
    );
    assert_eq!(
        host.command(FIRST, &verify_10(0, 20, 200), &[], 0),
        good(0, 0)
    );
    assert_eq!(
        host.command(FIRST, &verify_10(2, 20, 200), &bytes, 0),
        good(0, 0)
    );
    for place in [0, 511, 512, 65_535, 65_536, 102_399] {
        let mut other = bytes.clone();
        other[place] ^= 0x80;
        // A later one does not count, even if its buffer is looked at first.
        other[102_399] ^= 0x40;
        let reply = host.command(FIRST, &verify_10(2, 20, 200), &other, 0);
        assert_eq!((reply.status, reply.sense), (2, Some(MISCOMPARE)));
        assert_eq!(reply.residual, 102_400);
        assert_eq!(host.information(host.last_head()), Some(place as u32));
    }
    // The data of the guest stays where it was, and the next command works.
    assert_eq!(host.medium(1, 20, 102_400), bytes);
    assert_eq!(host.command(FIRST, &read_10(20, 1), &[], 512), good(0, 512));
    host.finish();
}

#[test]
fn verify_against_one_block_takes_it_again_for_each() {
    let mut host = Host::new();
    let block: Vec<u8> = (0..512_u32).map(|at| (at * 3) as u8).collect();
    let same = [0x41, 0, 0, 0, 0, 100, 0, 0, 250, 0];
    assert_eq!(host.command(FIRST, &same, &block, 0), good(0, 0));
    assert_eq!(
        host.command(FIRST, &verify_10(6, 100, 250), &block, 0),
        good(0, 0)
    );
    let reply = host.command(FIRST, &verify_10(6, 99, 2), &block, 0);
    assert_eq!(reply.sense, Some(MISCOMPARE));
    assert_eq!(host.information(host.last_head()), Some(1));
    let mut last = block.clone();
    last[300] ^= 1;
    assert_eq!(host.command(FIRST, &write_10(349, 1), &last, 0), good(0, 0));
    let reply = host.command(FIRST, &verify_10(6, 100, 250), &block, 0);
    assert_eq!(reply.sense, Some(MISCOMPARE));
    assert_eq!(host.information(host.last_head()), Some(300));
    host.finish();
}

#[test]
fn verify_takes_its_data_however_the_guest_has_cut_it() {
    let mut host = Host::new();
    let bytes: Vec<u8> = (0..1024_u32).map(|at| (at / 5) as u8).collect();
    assert_eq!(host.command(FIRST, &write_10(9, 2), &bytes, 0), good(0, 0));
    for differs in [None, Some(0), Some(513), Some(1023)] {
        let mut sent = bytes.clone();
        if let Some(place) = differs {
            sent[place] ^= 1;
        }
        let head = host.next_head;
        host.header(head, FIRST, &verify_10(2, 9, 2));
        let slot = Host::slot(head);
        host.requests.write(Gpa(DATA + 1), &sent[..513]);
        host.requests.write(Gpa(DATA + 0x1003), &sent[513..]);
        host.offer(&[
            (slot, 51, 0),
            (DATA + 1, 513, 0),
            (DATA + 0x1003, 511, 0),
            (slot + 0x400, 108, WRITE),
        ]);
        let (head, used_len) = host.comes_back();
        let reply = host.reply(head, used_len);
        assert_eq!(reply.sense, differs.map(|_| MISCOMPARE));
        let place = differs.map(|place| place as u32);
        assert_eq!(host.information(head), place);
    }
    host.finish();
}

#[test]
fn verify_needs_the_data_that_it_compares() {
    let mut host = Host::new();
    for (options, len) in [(2, 1023), (6, 511)] {
        assert_eq!(
            host.command(FIRST, &verify_10(options, 0, 2), &vec![0; len], 0),
            refused(OVERRUN)
        );
    }
    assert_eq!(
        host.command(FIRST, &verify_10(6, 0, 2), &[0; 600], 0),
        good(88, 0)
    );
    host.finish();
}

#[test]
fn write_and_verify_reads_back_what_it_wrote() {
    let mut host = Host::new();
    let bytes: Vec<u8> = (0..130 * 512_u32).map(|at| (at / 11) as u8).collect();
    for options in [0, 2] {
        let cdb = [0x2e, options, 0, 0, 0, 70 + options, 0, 0, 130, 0];
        let before = host.model.io_counters();
        assert_eq!(host.command(FIRST, &cdb, &bytes, 0), good(0, 0));
        assert_eq!(host.medium(1, (70 + options).into(), bytes.len()), bytes);
        assert!(host.model.io_counters().reads > before.reads);
    }
    // A write that failed is not verified, and a verification that fails is told.
    let cdb = [0x2e, 2, 0, 0, 0, 1, 0, 0, 1, 0];
    let fault = Status::WRITE_FAULT.with_dnr();
    assert!(host.model.fail_next(io_opcode::WRITE, fault));
    let reads = host.model.io_counters().reads;
    assert_eq!(
        host.command(FIRST, &cdb, &[1; 512], 0),
        check(3, 0x0c, 0, 512)
    );
    assert_eq!(host.model.io_counters().reads, reads);
    let unreadable = Status::UNRECOVERED_READ_ERROR.with_dnr();
    assert!(host.model.fail_next(io_opcode::READ, unreadable));
    assert_eq!(
        host.command(FIRST, &cdb, &[1; 512], 0),
        check(3, 0x11, 0, 512)
    );
    assert_eq!(host.information(host.last_head()), Some(1));
    host.finish();
}

/// NVMe status, its name, SCSI status, and sense key, code and qualifier.
type Row = (Status, String, u8, Option<(u8, u8, u8)>);

/// The rows of the table in docs/scsi-sense.md.
fn documented() -> Vec<Row> {
    let text = include_str!("../../docs/scsi-sense.md");
    let hex = |text: &str| {
        let digits = text.trim().strip_suffix('h')?;
        u8::from_str_radix(digits, 16).ok()
    };
    let row = |line: &str| {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let [nvme, name, status, key, codes] = cells[..] else {
            return None;
        };
        let (sct, sc) = nvme.split_once(' ')?;
        let sense = codes
            .split_once('/')
            .and_then(|(asc, ascq)| Some((hex(key)?, hex(asc)?, hex(ascq)?)));
        let nvme = Status::new(hex(sct)?, hex(sc)?);
        Some((nvme, name.to_owned(), hex(status)?, sense))
    };
    text.lines().filter_map(row).collect()
}

#[test]
fn every_status_of_the_device_becomes_what_the_document_says() {
    let mut host = Host::new();
    let rows = documented();
    assert_eq!(rows.len(), 24);
    for (nvme, name, status, sense) in rows {
        assert_eq!(nvme.name(), name);
        assert!(host.model.fail_next(io_opcode::READ, nvme.with_dnr()));
        let reply = host.command(FIRST, &read_10(77, 1), &[], 512);
        assert_eq!((reply.status, reply.sense), (status, sense), "{nvme}");
        // The block, where the key is about one.
        let told = sense.is_some_and(|(key, ..)| [3, 0xb, 0xe].contains(&key));
        let lba = told.then_some(77);
        assert_eq!(host.information(host.last_head()), lba, "{nvme}");
    }
    let unknown = Status::new(2, 0xc0).with_dnr();
    assert!(host.model.fail_next(io_opcode::READ, unknown));
    let reply = host.command(FIRST, &read_10(77, 1), &[], 512);
    assert_eq!(reply, check(4, 0x44, 0, 512));
    host.finish();
}

#[test]
fn block_that_cannot_be_read_is_named_whatever_else_was_asked_for_with_it() {
    let mut host = Host::new();
    for lba in [77, 90] {
        host.model.spoil(Nsid(1), lba);
    }
    let error = |blocks: u32| check(3, 0x11, 0, blocks * 512);
    // The first of them.
    for (cdb, len, first) in [
        (read_10(77, 1), 512, 77),
        (read_10(70, 8), 4096, 77),
        (read_10(64, 64), 64 * 512, 77),
        (read_10(78, 16), 16 * 512, 90),
        (read_10(0, 255), 255 * 512, 77),
        (read_10(77, 2), 1024, 77),
        (read_10(76, 2), 1024, 77),
    ] {
        let reply = host.command(FIRST, &cdb, &[], len);
        assert_eq!(reply, error(len / 512), "{cdb:x?}");
        assert_eq!(host.information(host.last_head()), Some(first), "{cdb:x?}");
    }
    let mut verify = read_10(64, 64);
    verify[0] = 0x2f;
    let reply = host.command(FIRST, &verify, &[], 0);
    assert_eq!(reply, check(3, 0x11, 0, 0));
    assert_eq!(host.information(host.last_head()), Some(77));
    // Other blocks and other units are as ever, also meanwhile.
    let failing = host.send(FIRST, &read_10(64, 64), &[], 64 * 512);
    let fine = [
        host.send(FIRST, &read_10(91, 8), &[], 4096),
        host.send(SECOND, &read_10(64, 64), &[], 64 * 512),
    ];
    for _ in 0..3 {
        let (head, used_len) = host.comes_back();
        let reply = host.reply(head, used_len);
        match fine.iter().position(|own| *own == head) {
            Some(at) => assert_eq!(reply, good(0, [4096, 64 * 512][at])),
            None => assert_eq!((head, reply), (failing, error(64))),
        }
    }
    // One that was only once: nobody knows which block it was.
    let passing = Status::UNRECOVERED_READ_ERROR.with_dnr();
    assert!(host.model.fail_next(io_opcode::READ, passing));
    let reply = host.command(FIRST, &read_10(100, 8), &[], 4096);
    assert_eq!(reply, error(8));
    assert_eq!(host.information(host.last_head()), None);
    assert_eq!(
        host.command(FIRST, &read_10(100, 8), &[], 4096),
        good(0, 4096)
    );
    host.finish();
}
