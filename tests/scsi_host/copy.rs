//! EXTENDED COPY through NVMe's Copy: what it copies, and what it refuses, by the bytes of SPC-4, 6.4 and 6.23.

use super::*;

/// An identification descriptor with the T10 vendor identification of the units here, whose blocks have 512 bytes.
fn cscd() -> [u8; 32] {
    let mut descriptor = [0; 32];
    // Code set ASCII, associated with the unit, T10 vendor identification.
    descriptor[..8].copy_from_slice(&[0xe4, 0, 0, 0, 2, 1, 0, 14]);
    descriptor[8..22].copy_from_slice(b"TANDEM  serial");
    descriptor[30] = 2;
    descriptor
}

/// From block to block, between the CSCDs of these numbers.
fn segment((source, destination): (u16, u16), count: u16, from: u64, to: u64) -> [u8; 28] {
    let mut segment = [0; 28];
    segment[0] = 0x02;
    segment[3] = 0x18;
    segment[4..6].copy_from_slice(&source.to_be_bytes());
    segment[6..8].copy_from_slice(&destination.to_be_bytes());
    segment[10..12].copy_from_slice(&count.to_be_bytes());
    segment[12..20].copy_from_slice(&from.to_be_bytes());
    segment[20..].copy_from_slice(&to.to_be_bytes());
    segment
}

/// A parameter list with a list identifier.
fn list(name: u8, cscds: &[[u8; 32]], segments: &[[u8; 28]]) -> Vec<u8> {
    let mut list = vec![0; 16];
    list[0] = name;
    list[3] = (cscds.len() * 32) as u8;
    list[8..12].copy_from_slice(&(segments.len() as u32 * 28).to_be_bytes());
    list.extend(cscds.concat());
    list.extend(segments.concat());
    list
}

impl Host {
    #[track_caller]
    fn copy(&mut self, lun: [u8; 8], list: &[u8]) -> Reply {
        let [a, b] = (list.len() as u16).to_be_bytes();
        let cdb = [0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, 0, 0];
        self.command(lun, &cdb, list, 0)
    }

    /// COPY STATUS of a list identifier: status, segments, blocks.
    #[track_caller]
    fn copy_status(&mut self, name: u8) -> Option<(u8, u8, u32)> {
        let cdb = [0x84, 0, name, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 0, 0];
        let reply = self.command(FIRST, &cdb, &[], 12);
        if reply.status != 0 {
            assert_eq!(reply, check(5, 0x24, 0, 12));
            return None;
        }
        let said = self.data(self.last_head(), 12);
        assert_eq!((&said[..4], said[5], said[7]), (&[0, 0, 0, 8][..], 0, 0xf1));
        let blocks = u32::from_be_bytes(said[8..].try_into().unwrap());
        Some((said[4], said[6], blocks))
    }
}

fn pattern(blocks: usize) -> Vec<u8> {
    (0..blocks * 512).map(|at| (at / 3) as u8).collect()
}

#[test]
fn segments_are_copied_in_turn_by_the_device() {
    let mut host = Host::new();
    let bytes = pattern(100);
    for at in [0, 100, 200] {
        let data = host.command(FIRST, &write_10(at, 100), &bytes, 0);
        assert_eq!(data, good(0, 0));
    }
    let before = host.model.io_counters();
    // 300 blocks take three commands of 128; the second segment copies what the first has written; the third nothing.
    let segments = [
        segment((0, 0), 300, 0, 1000),
        segment((0xffff, 0), 10, 1290, 5000),
        segment((0, 0xffff), 0, 0, 0),
    ];
    let list = list(7, &[cscd()], &segments);
    assert_eq!(host.copy(FIRST, &list), good(0, 0));
    assert_eq!(host.medium(1, 1000, 300 * 512), bytes.repeat(3));
    assert_eq!(host.medium(1, 5000, 10 * 512), bytes[90 * 512..]);
    assert_eq!(host.medium(1, 1300, 512), [0; 512]);
    let after = host.model.io_counters();
    assert_eq!(after.copies - before.copies, 4);
    assert_eq!((after.reads, after.writes), (before.reads, before.writes));
    assert_eq!(host.copy_status(7), Some((1, 3, 310)));
    assert_eq!(host.copy_status(8), None);
    // Nothing to do is no error; nor is no list.
    assert_eq!(
        host.copy(
            FIRST,
            &list[..16 + 32]
                .iter()
                .enumerate()
                .map(|(at, byte)| if at == 11 { 0 } else { *byte })
                .collect::<Vec<u8>>()
        ),
        good(0, 0)
    );
    assert_eq!(host.copy_status(7), Some((1, 0, 0)));
    assert_eq!(
        host.command(
            FIRST,
            &[0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            &[],
            0
        ),
        good(0, 0)
    );
    // A reset forgets.
    assert_eq!(host.manage(5, FIRST), OK);
    assert_eq!(host.command(FIRST, &[0; 6], &[], 0), check(6, 0x29, 3, 0));
    assert_eq!(host.copy_status(7), None);
    host.finish();
}

#[test]
fn lists_that_say_something_else_are_refused_and_nothing_is_copied() {
    let mut host = Host::new();
    let bytes = pattern(4);
    host.command(FIRST, &write_10(0, 4), &bytes, 0);
    let mut fine = list(1, &[cscd()], &[segment((0, 0), 4, 0, 100)]);
    // LU ID TYPE is ignored.
    fine[17] = 0x80;
    let with = |at: usize, byte: u8| {
        let mut list = fine.clone();
        list[at] = byte;
        list
    };
    let longer = |cscds: usize, segments: usize| {
        let mut list = list(
            1,
            &vec![cscd(); cscds],
            &vec![segment((0, 0), 1, 0, 100); segments],
        );
        list[2..4].copy_from_slice(&(cscds as u16 * 32).to_be_bytes());
        list
    };
    let cases = [
        // PARAMETER LIST LENGTH ERROR: within the header, a CSCD descriptor, a segment descriptor.
        (fine[..15].to_vec(), (5, 0x1a, 0)),
        (fine[..47].to_vec(), (5, 0x1a, 0)),
        (fine[..75].to_vec(), (5, 0x1a, 0)),
        (with(11, 27), (5, 0x1a, 0)),
        // A reserved list ID usage; a list without identifier that has one; reserved fields; inline data.
        (with(1, 0x08), (5, 0x26, 0)),
        (with(1, 0x18), (5, 0x26, 0)),
        (with(1, 0x80), (5, 0x26, 0)),
        (with(5, 1), (5, 0x26, 0)),
        (with(15, 1), (5, 0x26, 0x0b)),
        (with(3, 31), (5, 0x26, 0)),
        // More than the longest list, too many CSCDs, too many segments.
        (longer(9, 65), (5, 0x1a, 0)),
        (longer(9, 1), (5, 0x26, 0x06)),
        (longer(1, 65), (5, 0x26, 0x08)),
        // A CSCD of another type, that is null, no disk, has no designator, or too long a one; of a port; of nobody here;
        // with other blocks.
        (with(16, 0xe0), (5, 0x26, 0x07)),
        (with(17, 0x20), (0x0a, 0x0d, 0x02)),
        (with(17, 0x01), (5, 0x26, 0)),
        (with(23, 0), (5, 0x26, 0)),
        (with(23, 21), (5, 0x26, 0)),
        (with(21, 0x11), (0x0a, 0x0d, 0x02)),
        (with(24, b'S'), (0x0a, 0x0d, 0x02)),
        (with(46, 1), (5, 0x26, 0)),
        // A segment of another type, with reserved bits, of another length, between others, with reserved bytes.
        (with(48, 0x00), (5, 0x26, 0x09)),
        (with(49, 0x04), (5, 0x26, 0)),
        (with(51, 0x14), (5, 0x26, 0)),
        (with(53, 1), (0x0a, 0x0d, 0x02)),
        (with(55, 1), (0x0a, 0x0d, 0x02)),
        (with(56, 1), (5, 0x26, 0)),
        // Blocks that there are not.
        (with(60, 1), (0x0a, 0, 0)),
        (with(68, 1), (0x0a, 0, 0)),
    ];
    for (list, (key, asc, ascq)) in cases {
        let reply = host.copy(FIRST, &list);
        assert_eq!(
            reply,
            check(key, asc, ascq, list.len() as u32),
            "{list:02x?}"
        );
    }
    assert_eq!(host.model.io_counters().copies, 0);
    assert_eq!(host.copy_status(1), None);
    // The same name means one of two units here: the one that the command is for is found first, the other not at all.
    assert_eq!(host.copy(SECOND, &fine), check(0x0a, 0x0d, 0x02, 76));
    // LID4, and results that are not kept.
    for cdb in [[0x83, 1], [0x84, 1], [0x84, 4]] {
        let reply = host.command(FIRST, &[&cdb[..], &[0; 14]].concat(), &[], 0);
        assert_eq!(reply, check(5, 0x24, 0, 0));
    }
    // Without an identifier, and with one that is not held: nothing is known afterwards.
    for (name, usage) in [(0, 0x18), (9, 0x10)] {
        let mut list = with(1, usage);
        list[0] = name;
        assert_eq!(host.copy(FIRST, &list), good(0, 0));
        assert_eq!(host.copy_status(name), None);
    }
    assert_eq!(host.medium(1, 100, 2048), bytes);
    host.finish();
}

#[test]
fn copy_that_fails_or_is_aborted_is_told_as_one() {
    let mut host = Host::new();
    let fine = list(3, &[], &[segment((0xffff, 0xffff), 300, 0, 1000)]);
    for status in [
        Status::UNRECOVERED_READ_ERROR,
        Status::COMMAND_SIZE_LIMIT_EXCEEDED,
    ] {
        assert!(host.model.fail_next(io_opcode::COPY, status.with_dnr()));
        // COPY ABORTED, THIRD PARTY DEVICE FAILURE; the rest of the segment is not tried.
        assert_eq!(host.copy(FIRST, &fine), check(0x0a, 0x0d, 0x01, 44));
        assert_eq!(host.copy_status(3), Some((2, 0, 0)));
    }
    assert_eq!(host.model.io_counters().copies, 0);
    assert!(host.model.hang_next(io_opcode::COPY));
    let [a, b] = (fine.len() as u16).to_be_bytes();
    let cdb = [0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, 0, 0];
    let head = host.send(FIRST, &cdb, &fine, 0);
    host.turn();
    host.ask(&Host::task(1, FIRST), 1);
    for _ in 0..100 {
        host.turn();
    }
    let health = host.poller.as_ref().unwrap().health();
    tandem::control::recovery::abort_commands(&host.device, host.pair, &health).unwrap();
    let (back, used_len) = host.comes_back();
    assert_eq!((back, host.reply(back, used_len).response), (head, 2));
    assert_eq!(host.answered().1[0], OK);
    assert_eq!(host.copy_status(3), Some((2, 0, 0)));
    assert_eq!(host.model.io_counters().copies, 0);
    host.finish();
}

#[test]
fn copy_waits_for_blocks_that_a_compare_and_write_holds() {
    const STRANGER: usize = 2;
    let storage = Storage::new(ModelConfig::default());
    let lock = storage.units[0].lock();
    let mut host = Host::of(&storage, 0, Sizes::DEFAULT, (32, 96));
    lock.enter(STRANGER);
    assert!(lock.acquire(STRANGER));
    lock.hold(10, 4);
    // Read from there may be what it likes.
    let from = list(1, &[], &[segment((0xffff, 0xffff), 1, 12, 20)]);
    assert_eq!(host.copy(FIRST, &from), good(0, 0));
    let to = list(
        1,
        &[],
        &[
            segment((0xffff, 0xffff), 1, 20, 30),
            segment((0xffff, 0xffff), 1, 20, 12),
        ],
    );
    let [a, b] = (to.len() as u16).to_be_bytes();
    let cdb = [0x83, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, a, b, 0, 0];
    let head = host.send(FIRST, &cdb, &to, 0);
    for _ in 0..1000 {
        host.turn();
        assert_eq!(host.requests.take_used(), None);
    }
    lock.release(STRANGER);
    assert_eq!(host.comes_back().0, head);
    lock.leave(STRANGER);
    host.finish();
}

#[test]
fn inquiry_and_operating_parameters_say_what_can_be_copied() {
    let mut host = Host::new();
    host.command(FIRST, &[0x12, 0, 0, 0, 96, 0], &[], 96);
    assert_eq!(host.data(host.last_head(), 6)[5], 0x18); // TPGS, 3PC
    let cdb = [0x84, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 0, 0];
    assert_eq!(host.command(FIRST, &cdb, &[], 255), good(255 - 46, 46));
    #[rustfmt::skip]
    let parameters = [
        0, 0, 0, 42, 1, 0, 0, 0, // SNLID
        0, 8, 0, 64, 0, 0, 8, 0, // CSCDs, segments; 8 * 32 + 64 * 28 bytes of them
        0x01, 0xff, 0xfe, 0x00, 0, 0, 0, 0, // 65535 blocks; no inline data
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // no held data, no stream
        0, 255, 255, 9, 0, 0, 0, 0, 0, // copies at a time; granularity
        2, 0x02, 0xe4,
    ];
    assert_eq!(host.data(host.last_head(), 46), parameters);
    host.command(FIRST, &[0x12, 1, 0x8f, 0, 255, 0], &[], 255);
    #[rustfmt::skip]
    let page = [
        0, 0x8f, 0, 96,
        0, 1, 0, 8, 7, 0x83, 1, 0, 0x84, 2, 0, 3,
        0, 4, 0, 28, 0, 0, 0, 0, 0, 8, 0, 64, 0, 0, 8, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        0, 8, 0, 4, 2, 0x02, 0xe4, 0,
        0, 12, 0, 4, 0, 2, 0xff, 0xff,
        0x80, 1, 0, 32, 0, 0, 0, 255, 0, 0, 0, 255, 0x01, 0xff, 0xfe, 0, 9, 0,
        0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(host.data(host.last_head(), 100), page);
    host.finish();
}
