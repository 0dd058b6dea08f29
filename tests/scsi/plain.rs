//! The short way of reads and writes says what the long one says, and nothing where that says anything else.

use super::*;

fn halves(cdb: [u8; 16]) -> [[u8; 8]; 2] {
    [0, 8].map(|at| cdb[at..at + 8].try_into().unwrap())
}

/// What the long way makes of a command that the short way may know.
fn long_way(bench: &mut Bench, address: Address, cdb: &[u8; 16]) -> Option<(bool, BlockRange)> {
    let transfers = [0x28, 0x2a, 0x88, 0x8a].contains(&cdb[0]);
    match bench.run_at(address, cdb, &[]).action {
        Action::Carry(Carry { op, fua: false, .. }) if transfers => match op {
            BlockOp::Read(range) => Some((false, range)),
            BlockOp::Write(range) => Some((true, range)),
            other => panic!("{cdb:02x?} came to {other:?}"),
        },
        _ => None,
    }
}

/// Both ways, of CDBs that differ from good ones in one or two bits. How many the short way knew.
fn compare(bench: &mut Bench, address: Address) -> usize {
    let mut known = 0;
    let unit = bench.nexus.find(address).unwrap();
    let plain = bench.nexus.plain(unit).unwrap();
    for opcode in [0x28, 0x2a, 0x88, 0x8a] {
        let mut good = [0; 16];
        good[0] = opcode;
        // 8 blocks up to the last one.
        let first = (BLOCKS - 8).to_be_bytes();
        match opcode < 0x80 {
            true => {
                good[2..6].copy_from_slice(&first[4..]);
                good[8] = 8;
            }
            false => {
                good[2..10].copy_from_slice(&first);
                good[13] = 8;
            }
        }
        let bits = 16 * 8;
        for (one, other) in (0..=bits).flat_map(|one| (one..=bits).map(move |other| (one, other))) {
            let mut cdb = good;
            for bit in [one, other].into_iter().filter(|bit| *bit < bits) {
                cdb[bit / 8] |= 1 << (bit % 8);
            }
            let short =
                [false, true].map(|write| Some((write, plain.transfer(halves(cdb), write)?)));
            let [read, write] = short;
            assert!(read.is_none() || write.is_none());
            let short = read.or(write);
            let expected = long_way(bench, address, &cdb);
            assert_eq!(short, expected, "{cdb:02x?}");
            known += usize::from(short.is_some());
        }
    }
    known
}

#[test]
fn short_way_of_reads_and_writes_agrees_with_the_long_one() {
    let mut bench = Bench::new();
    let written_too = compare(&mut bench, DISK);
    let read_only = compare(&mut bench, READ_ONLY);
    assert!(read_only > 100 && written_too > read_only + 100);
}

#[test]
fn short_way_of_writes_is_closed_while_they_are_durable_or_kept_off() {
    for page in [select::caching(0), select::control(0, 0x08)] {
        let list = select::short(&[&page]);
        let mut bench = Bench::new();
        let before = compare(&mut bench, DISK);
        let changed = bench.run_at(DISK, &select::select_6(&list), &list).action;
        assert!(!matches!(changed, Action::Check(_)), "{changed:?}");
        let after = compare(&mut bench, DISK);
        assert!(after > 100 && after < before);
    }
}

#[test]
fn short_way_is_closed_while_anything_is_to_be_told_or_blocks_are_held() {
    let mut read = [0; 16];
    (read[0], read[8]) = (0x28, 1);
    let mut write = read;
    write[0] = 0x2a;
    let mut bench = Bench::fresh();
    let unit = bench.nexus.find(DISK).unwrap();
    let plain = bench.nexus.plain(unit).unwrap();
    assert_eq!(plain.transfer(halves(read), false), None);
    // The unit attention is told.
    bench.run(&read);
    assert!(
        plain.transfer(halves(read), false).is_some()
            && plain.transfer(halves(write), true).is_some()
    );
    let lock = bench.nexus.target().units()[unit].lock();
    lock.enter(0);
    assert!(lock.acquire(0));
    lock.hold(BLOCKS - 1, 1);
    assert!(
        plain.transfer(halves(read), false).is_some()
            && plain.transfer(halves(write), true).is_none()
    );
    lock.release(0);
    assert!(plain.transfer(halves(write), true).is_some());
    bench.nexus.attend(unit, Attention::Reset);
    assert_eq!(plain.transfer(halves(read), false), None);
}
