//! VERIFY and WRITE AND VERIFY (SBC-3, clause 5).

use tandem::block::Against;

use super::*;

fn sized(opcodes: [u8; 3], options: u8, lba: u8, count: u8) -> [Vec<u8>; 3] {
    let [ten, twelve, sixteen] = opcodes;
    [
        vec![ten, options, 0, 0, 0, lba, 0, 0, count, 0],
        vec![twelve, options, 0, 0, 0, lba, 0, 0, 0, count, 0, 0],
        vec![
            sixteen, options, 0, 0, 0, 0, 0, 0, 0, lba, 0, 0, 0, count, 0, 0,
        ],
    ]
}

#[test]
fn verify_of_all_lengths_compares_as_bytchk_says() {
    let mut bench = Bench::new();
    // DPO changes nothing.
    for (options, against, data_out) in [
        (0x00, Against::Nothing, 0),
        (0x10, Against::Nothing, 0),
        (0x02, Against::Data, 5 * 512),
        (0x16, Against::Block, 512),
    ] {
        for cdb in sized([0x2f, 0xaf, 0x8f], options, 7, 5) {
            let expected = Carry {
                op: BlockOp::Verify {
                    range: range(7, 5),
                    against,
                },
                unit: 0,
                fua: false,
                data_in: 0,
                data_out,
            };
            assert_eq!(bench.carries(&cdb, &[]), expected, "{cdb:02x?}");
        }
    }
    for cdb in sized([0x2f, 0xaf, 0x8f], 0x02, 7, 0) {
        assert_eq!(bench.says(&cdb), NOTHING);
    }
    for cdb in sized([0x2f, 0xaf, 0x8f], 0x04, 7, 5) {
        assert_eq!(bench.refuses(&cdb, &[]), invalid_field(1, 2));
    }
    // A read-only disk may be verified.
    let verify = bench.run_at(READ_ONLY, &[0x2f, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
    assert!(matches!(verify.action, Action::Carry(_)));
}

#[test]
fn write_and_verify_writes_durably_first() {
    let mut bench = Bench::new();
    for (options, against) in [(0x00, Against::Nothing), (0x12, Against::Data)] {
        for cdb in sized([0x2e, 0xae, 0x8e], options, 7, 5) {
            let expected = Carry {
                op: BlockOp::WriteAndVerify {
                    range: range(7, 5),
                    against,
                },
                unit: 0,
                fua: true,
                data_in: 0,
                data_out: 5 * 512,
            };
            assert_eq!(bench.carries(&cdb, &[]), expected, "{cdb:02x?}");
        }
    }
    for options in [0x04, 0x06] {
        for cdb in sized([0x2e, 0xae, 0x8e], options, 7, 5) {
            assert_eq!(bench.refuses(&cdb, &[]), invalid_field(1, 2));
        }
    }
    for cdb in sized([0x2e, 0xae, 0x8e], 0, 7, 0) {
        assert_eq!(bench.says(&cdb), NOTHING);
    }
    let protected = bench.run_at(READ_ONLY, &[0x2e, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
    assert_eq!(protected.action, Action::Check(Sense::new(7, 0x27, 0)));
}

#[test]
fn verification_beyond_the_end_is_21_00() {
    let mut bench = Bench::new();
    for opcode in [0x2e, 0x2f] {
        let cdb = [opcode, 0, 0, 1, 0x23, 0x44, 0, 0, 2, 0];
        assert_eq!(bench.refuses(&cdb, &[]), fixed_sense(5, 0x21, 0, [0; 3]));
    }
}

#[test]
fn compare_and_write_takes_twice_its_blocks_and_no_more_than_the_limit() {
    let mut bench = Bench::new();
    let cdb = |options, lba: u8, count| {
        [
            0x89, options, 0, 0, 0, 0, 0, 1, 0x23, lba, 0, 0, 0, count, 0x1f, 0,
        ]
    };
    for (options, fua) in [(0x00, false), (0x10, false), (0x08, true)] {
        let expected = Carry {
            op: BlockOp::CompareAndWrite(range(0x1_2300, 32)),
            unit: 0,
            fua,
            data_in: 0,
            data_out: 64 * 512,
        };
        assert_eq!(bench.carries(&cdb(options, 0, 32), &[]), expected);
    }
    assert_eq!(bench.refuses(&cdb(0, 0, 33), &[]), invalid_field(13, 7));
    assert_eq!(bench.says(&cdb(0, 0x45, 0)), NOTHING);
    assert_eq!(
        bench.refuses(&cdb(0, 0x44, 2), &[]),
        fixed_sense(5, 0x21, 0, [0; 3])
    );
    let mut protected = cdb(0, 0, 1);
    protected[7] = 0;
    assert_eq!(
        bench.run_at(READ_ONLY, &protected, &[]).action,
        Action::Check(Sense::new(7, 0x27, 0))
    );
}

#[test]
fn range_lock_is_given_in_turn_and_to_nobody_who_has_given_up() {
    let lock = RangeLock::new(4);
    (0..4).for_each(|seat| lock.enter(seat));
    assert!(lock.acquire(1) && lock.acquire(1));
    lock.hold(10, 5);
    for (first, count, held) in [
        (0, 10, false),
        (0, 11, true),
        (14, 1, true),
        (15, 9, false),
        (0, u32::MAX, true),
        (u64::MAX, 1, false),
    ] {
        assert_eq!(lock.holds(first, count), held, "{first}+{count}");
    }
    // All want it; one of them no longer.
    for seat in [0, 2, 3, 0, 2, 3] {
        assert!(!lock.acquire(seat));
    }
    lock.release(2);
    assert!(lock.holds_any());
    lock.release(1);
    assert!(!lock.holds_any());
    // The next in turn behind the owner, however often others ask.
    assert!(!lock.acquire(0) && !lock.acquire(1) && lock.acquire(3));
    lock.release(3);
    assert!(!lock.acquire(1) && lock.acquire(0));
    lock.release(0);
    assert!(lock.acquire(1));
    lock.release(1);
    assert!(lock.acquire(2));
    lock.release(2);
    (0..3).for_each(|seat| lock.leave(seat));
    assert_eq!(lock.taken().collect::<Vec<_>>(), [3]);
}
