//! MODE SELECT and what it changes, for whom (SPC-4, 6.9 to 6.12; SBC-3, 6.4 and 6.5).

use super::*;

/// MODE SELECT (6) with PF.
pub(super) fn select_6(list: &[u8]) -> [u8; 6] {
    [0x15, 0x10, 0, 0, list.len() as u8, 0]
}

pub(super) fn caching(wce: u8) -> Vec<u8> {
    let mut page = vec![0x08, 0x12, wce];
    page.resize(20, 0);
    page
}

pub(super) fn control(d_sense: u8, swp: u8) -> Vec<u8> {
    vec![0x0a, 0x0a, d_sense, 0x10, swp, 0, 0, 0, 0, 0, 0, 0]
}

pub(super) fn short(pages: &[&[u8]]) -> Vec<u8> {
    [&[0, 0, 0, 0][..], &pages.concat()].concat()
}

fn invalid_parameter(byte: u8) -> Vec<u8> {
    fixed_sense(5, 0x26, 0, [0x80, 0, byte])
}

impl Bench {
    #[track_caller]
    fn selects(&mut self, list: &[u8]) -> Action {
        self.run_at(DISK, &select_6(list), list).action
    }

    fn wce(&mut self) -> u8 {
        self.says(&[0x1a, 0x08, 0x08, 0, 255, 0])[6]
    }

    fn durable(&mut self, cdb: &[u8], parameters: &[u8]) -> bool {
        self.carries(cdb, parameters).fua
    }
}

#[test]
fn write_cache_that_is_off_makes_every_write_durable() {
    let mut bench = Bench::new();
    let write = [0x2a, 0, 0, 0, 0, 3, 0, 0, 5, 0];
    let same = [0x41, 0, 0, 0, 0, 3, 0, 0, 5, 0];
    let zeroes = [0x93, 1, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 5, 0, 0];
    assert!(!bench.durable(&write, &[]));
    let off = short(&[&caching(0)]);
    let Action::Carry(carry) = bench.selects(&off) else {
        panic!("nothing is flushed")
    };
    // All that is in the cache, and all that is on its way there.
    assert_eq!((carry.op, carry.data_out), (BlockOp::DrainAndFlush, 24));
    assert_eq!(bench.wce(), 0);
    assert!(bench.durable(&write, &[]));
    assert!(bench.durable(&same, &[1; 512]));
    assert!(bench.durable(&zeroes, &[]));
    assert!(bench.durable(&[0x0a, 0, 0, 3, 5, 0], &[]));
    // Off again, and on: nothing has to be flushed.
    assert_eq!(bench.selects(&off), Action::Good);
    assert_eq!(bench.selects(&short(&[&caching(4)])), Action::Good);
    assert_eq!(bench.wce(), 4);
    assert!(!bench.durable(&write, &[]));
    // By the long form, with several pages and a block descriptor that changes nothing.
    let descriptor = [0, 1, 0x23, 0x45, 0, 0, 2, 0];
    let list = [
        &[0, 0, 0, 0x10, 0, 0, 0, 8][..],
        &descriptor,
        &control(4, 0),
        &caching(0),
    ];
    let list = list.concat();
    let select_10 = [0x55, 0x10, 0, 0, 0, 0, 0, 0, list.len() as u8, 0];
    assert_eq!(bench.carries(&select_10, &list).op, BlockOp::DrainAndFlush);
    assert_eq!(
        bench.says(&[0x1a, 0x08, 0x0a, 0, 255, 0])[4..],
        control(4, 0)
    );
}

#[test]
fn changeable_and_default_values_are_those_that_can_be_changed_and_were_there() {
    let mut bench = Bench::new();
    bench.selects(&short(&[&caching(0), &control(4, 8)]));
    let page = |bench: &mut Bench, control: u8, code: u8| {
        bench.says(&[0x1a, 0x08, control << 6 | code, 0, 255, 0])[4..].to_vec()
    };
    assert_eq!(page(&mut bench, 0, 8), caching(0));
    assert_eq!(page(&mut bench, 1, 8), caching(4));
    assert_eq!(page(&mut bench, 2, 8), caching(4));
    assert_eq!(page(&mut bench, 0, 0x0a), control(4, 8));
    let mut mask = control(4, 8);
    mask[3] = 0;
    assert_eq!(page(&mut bench, 1, 0x0a), mask);
    assert_eq!(page(&mut bench, 2, 0x0a), control(0, 0));
    assert_eq!(page(&mut bench, 1, 0x1c)[2..], [0; 10]);
    // A disk without a cache has nothing to switch on.
    let modes = bench.run_at(READ_ONLY, &[0x1a, 0x08, 0x48, 0, 255, 0], &[]);
    assert_eq!(modes.data[4..], caching(0));
    let on = short(&[&caching(4)]);
    assert_eq!(
        bench.run_at(READ_ONLY, &select_6(&on), &on).action,
        Action::Check(Sense::in_parameters(6))
    );
}

#[test]
fn software_write_protection_stops_every_write_and_is_told() {
    let mut bench = Bench::new();
    assert_eq!(bench.selects(&short(&[&control(0, 8)])), Action::Good);
    let protected = fixed_sense(7, 0x27, 2, [0; 3]);
    let writes: [(&[u8], &[u8]); 5] = [
        (&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]),
        (&[0x2e, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]),
        (&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[0; 512]),
        (&[0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0], &[0; 8]),
        (&[0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], &[]),
    ];
    for (cdb, parameters) in writes {
        assert_eq!(bench.refuses(cdb, parameters), protected, "{cdb:02x?}");
    }
    assert_eq!(bench.says(&[0x1a, 0x08, 0x08, 0, 255, 0])[2], 0x90);
    bench.carries(&[0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
    assert_eq!(bench.selects(&short(&[&control(0, 0)])), Action::Good);
    bench.carries(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[]);
}

#[test]
fn mode_parameters_that_do_not_fit_are_refused_and_change_nothing() {
    let mut bench = Bench::new();
    let length = fixed_sense(5, 0x1a, 0, [0; 3]);
    let off = caching(0);
    let with = |at: usize, value: u8| {
        let mut page = caching(0);
        page[at] = value;
        short(&[&page])
    };
    let descriptor =
        |blocks: [u8; 4], len: [u8; 4]| [&[0, 0, 0, 8][..], &blocks, &len, &off].concat();
    let (blocks, len) = ([0, 1, 0x23, 0x45], [0, 0, 2, 0]);
    let cases = [
        // Cut: the header, a page's header, a page, a block descriptor.
        (vec![0, 0, 0], length.clone()),
        (short(&[&off[..1]]), length.clone()),
        (short(&[&off[..19]]), length.clone()),
        (vec![0, 0, 0, 8, 0, 0, 0, 0], length.clone()),
        // A medium type; a block descriptor of another length, number of blocks, or length of block.
        ([&[0, 1, 0, 0][..], &off].concat(), invalid_parameter(1)),
        ([&[0, 0, 0, 7][..], &off].concat(), invalid_parameter(3)),
        (descriptor([0, 0, 0, 9], len), invalid_parameter(4)),
        (descriptor(blocks, [0, 0, 0x10, 0]), invalid_parameter(8)),
        // A page that there is not, or as a subpage; of another length; a bit that cannot be changed.
        (short(&[&[0x02, 0x0e]]), invalid_parameter(4)),
        (short(&[&[0x48, 0x12]]), invalid_parameter(4)),
        (with(1, 0x0a), invalid_parameter(5)),
        (with(2, 0x01), invalid_parameter(6)),
        (with(12, 0x20), invalid_parameter(16)),
        // What is wrong comes last, and what came before is not taken.
        (short(&[&off, &control(0x20, 0)]), invalid_parameter(26)),
    ];
    for (list, sense) in cases {
        assert_eq!(bench.refuses(&select_6(&list), &list), sense, "{list:02x?}");
        assert_eq!(bench.wce(), 4);
    }
    // SP; no PF; none at all.
    let list = short(&[&off]);
    let count = list.len() as u8;
    for (options, bit) in [(0x11, 0), (0x01, 0), (0x00, 4)] {
        assert_eq!(
            bench.refuses(&[0x15, options, 0, 0, count, 0], &list),
            invalid_field(1, bit)
        );
    }
    assert_eq!(bench.selects(&[]), Action::Good);
    assert_eq!(bench.selects(&[0; 4]), Action::Good);
    // As many blocks as there are may be written in three ways.
    for blocks in [blocks, [0; 4], [0xff; 4]] {
        let list = descriptor(blocks, len);
        assert!(matches!(bench.selects(&list), Action::Carry(_)));
        bench.selects(&short(&[&caching(4)]));
    }
}

#[test]
fn mode_parameters_are_one_for_all_initiators_and_the_others_are_told() {
    let unit = LogicalUnit::new(Geometry::new(9, BLOCKS, false).unwrap(), "serial-1");
    let unit = unit.with_volatile_cache(true);
    let mut hosts = ["vm0", "vm1"].map(|name| {
        let units = vec![(3, Lun::new(0).unwrap(), unit.clone())];
        let target = Target::new(&initiator(name), units).unwrap();
        let mut bench = Bench::new();
        bench.nexus = Nexus::new(Arc::new(target));
        bench.run(&[0; 6]);
        bench
    });
    let [first, second] = &mut hosts;
    let list = short(&[&caching(0), &control(4, 0)]);
    assert!(matches!(first.selects(&list), Action::Carry(_)));
    assert_eq!(first.says(&[0; 6]), NOTHING);
    assert_eq!(
        second.refuses(&[0; 6], &[]),
        fixed_sense(6, 0x2a, 1, [0; 3])
    );
    assert_eq!(second.says(&[0; 6]), NOTHING);
    assert_eq!(second.wce(), 0);
    assert!(unit.writes_through() && unit.senses_in_descriptors());
    // What is not changed is not told.
    assert_eq!(first.selects(&list), Action::Good);
    assert_eq!(second.says(&[0; 6]), NOTHING);
}
