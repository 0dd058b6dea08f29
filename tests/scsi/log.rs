//! What a disk says of its health, its blocks and its port: LOG SENSE, GET LBA STATUS, PRE-FETCH, REPORT TARGET PORT GROUPS,
//! and its name in the NAA format.

use super::*;

fn log_sense(page: u8, subpage: u8, pointer: u8) -> [u8; 10] {
    [0x4d, 0, 0x40 | page, subpage, 0, 0, pointer, 1, 0, 0]
}

const REPORT: HealthReport = HealthReport {
    temperature: 41,
    reference_temperature: 80,
    used: 7,
    exception: (0x0b, 0x01),
};

#[test]
fn log_pages_say_what_the_device_said_last() {
    let mut bench = Bench::new();
    let unknown = [0x8d, 0, 0, 12, 0, 0, 3, 2, 0, 0xff, 0, 1, 3, 2, 0, 0xff];
    assert_eq!(bench.says(&log_sense(0x0d, 0, 0)), unknown);
    assert_eq!(
        bench.refuses(&log_sense(0x11, 0, 0), &[]),
        fixed_sense(4, 0x44, 0, [0; 3])
    );
    bench.health.set(REPORT);
    let temperature = [0x8d, 0, 0, 12, 0, 0, 3, 2, 0, 41, 0, 1, 3, 2, 0, 80];
    assert_eq!(bench.says(&log_sense(0x0d, 0, 0)), temperature);
    let used = [0x91, 0, 0, 8, 0, 1, 3, 4, 0, 0, 0, 7];
    assert_eq!(bench.says(&log_sense(0x11, 0, 0)), used);
    let exceptions = [0xaf, 0, 0, 8, 0, 0, 3, 4, 0x0b, 0x01, 41, 80];
    assert_eq!(bench.says(&log_sense(0x2f, 0, 0)), exceptions);
    // From a parameter on; the length within says what there is.
    let reference = [0x8d, 0, 0, 6, 0, 1, 3, 2, 0, 80];
    assert_eq!(bench.says(&log_sense(0x0d, 0, 1)), reference);
    let mut short = log_sense(0x0d, 0, 0);
    (short[7], short[8]) = (0, 5);
    assert_eq!(bench.says(&short), temperature[..5]);
}

#[test]
fn log_pages_are_listed_and_others_refused() {
    let mut bench = Bench::new();
    let pages = [0, 0, 0, 4, 0x00, 0x0d, 0x11, 0x2f];
    assert_eq!(bench.says(&log_sense(0, 0, 0)), pages);
    let each = [0, 0x0d, 0x11, 0x2f].map(|page| [page, 0, page, 0xff]);
    let all = [&[0x40, 0xff, 0, 16][..], each.as_flattened()].concat();
    assert_eq!(bench.says(&log_sense(0, 0xff, 0)), all);
    let one = [0x4d, 0xff, 0, 4, 0x0d, 0, 0x0d, 0xff];
    assert_eq!(bench.says(&log_sense(0x0d, 0xff, 0)), one);
    for (cdb, byte, bit) in [
        (log_sense(0x02, 0, 0), 2, 5),
        (log_sense(0x0d, 1, 0), 3, 7),
        (log_sense(0x0d, 0, 2), 5, 7),
        (log_sense(0, 0, 1), 5, 7),
    ] {
        assert_eq!(bench.refuses(&cdb, &[]), invalid_field(byte, bit));
    }
    // SP: nothing is saved.
    let mut save = log_sense(0x0d, 0, 0);
    save[1] = 1;
    assert_eq!(bench.refuses(&save, &[]), invalid_field(1, 0));
}

#[test]
fn lba_status_is_one_descriptor_up_to_the_end() {
    let mut bench = Bench::new();
    let cdb = |lba: u64, len: u8| {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[13]) = (0x9e, 0x12, len);
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb
    };
    let mut expected = vec![0, 0, 0, 20, 0, 0, 0, 0];
    expected.extend(5_u64.to_be_bytes());
    expected.extend([0, 1, 0x23, 0x40, 0, 0, 0, 0]);
    assert_eq!(bench.says(&cdb(5, 255)), expected);
    assert_eq!(bench.says(&cdb(5, 24)), expected);
    assert_eq!(bench.says(&cdb(5, 9)), expected[..9]);
    assert_eq!(bench.says(&cdb(5, 0)), NOTHING);
    assert_eq!(bench.says(&cdb(BLOCKS - 1, 24))[16..20], [0, 0, 0, 1]);
    for lba in [BLOCKS, u64::MAX] {
        assert_eq!(
            bench.refuses(&cdb(lba, 24), &[]),
            fixed_sense(5, 0x21, 0, [0; 3])
        );
    }
}

#[test]
fn pre_fetch_is_good_within_the_disk() {
    let mut bench = Bench::new();
    let ten = |options, lba: u8, count| [0x34, options, 0, 1, 0x23, lba, 0, 0, count, 0];
    let mut sixteen = [0; 16];
    (sixteen[0], sixteen[7], sixteen[8], sixteen[9]) = (0x90, 1, 0x23, 0x44);
    sixteen[13] = 1;
    assert_eq!(bench.says(&ten(0, 0x44, 1)), NOTHING);
    assert_eq!(bench.says(&ten(2, 0x45, 0)), NOTHING);
    assert_eq!(bench.says(&sixteen), NOTHING);
    sixteen[13] = 2;
    let out_of_range = fixed_sense(5, 0x21, 0, [0; 3]);
    assert_eq!(bench.refuses(&ten(0, 0x44, 2), &[]), out_of_range);
    assert_eq!(bench.refuses(&sixteen, &[]), out_of_range);
}

#[test]
fn target_port_groups_are_one_as_the_identification_page_says() {
    let mut bench = Bench::new();
    let cdb = |format: u8, len| [0xa3, format << 5 | 0x0a, 0, 0, 0, 0, 0, 0, 0, len, 0, 0];
    let group = [0x00, 0x01, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1];
    let plain = [&[0, 0, 0, 12][..], &group].concat();
    let extended = [&[0, 0, 0, 16, 0x10, 0, 0, 0][..], &group].concat();
    assert_eq!(bench.says(&cdb(0, 255)), plain);
    assert_eq!(bench.says(&cdb(1, 255)), extended);
    assert_eq!(bench.says(&cdb(0, 6)), plain[..6]);
    assert_eq!(bench.refuses(&cdb(2, 255), &[]), invalid_field(1, 7));
    assert_eq!(
        bench.run_at(WELL_KNOWN, &cdb(0, 255), &[]).action,
        Action::Check(Sense::in_cdb(1, 4))
    );
}

#[test]
fn naa_name_is_told_only_where_it_is_all_of_the_namespaces_own() {
    let told = |eui64, nguid| {
        let geometry = Geometry::new(9, 8, false).unwrap();
        let ids = UnitIds {
            eui64,
            nguid,
            uuid: None,
        };
        let unit = LogicalUnit::new(geometry, "s").with_ids(ids);
        let mut bench = Bench::new();
        let lun = Lun::new(0);
        let target = Target::new(&initiator("vm0"), vec![(0, lun.unwrap(), unit)]);
        bench.nexus = Nexus::new(Arc::new(target.unwrap()));
        let at = Address::Unit { target: 0, lun };
        let page = bench.run_at(at, &[0x12, 1, 0x83, 1, 0, 0], &[]).data;
        let mut rest = &page[4..];
        let mut names = Vec::new();
        while let [_, kind, _, len, tail @ ..] = rest {
            let (name, next) = tail.split_at(usize::from(*len));
            if *kind == 3 {
                names.push(name.to_vec());
            }
            rest = next;
        }
        names
    };
    // The company is 00CAFEh, in bytes 8 to 10 of an NGUID and 0 to 2 of an EUI-64.
    let mut nguid = [
        1, 2, 3, 4, 5, 6, 7, 8, 0x00, 0xca, 0xfe, 0x0a, 0xbb, 0xcc, 0xdd, 0xee,
    ];
    let mut eui64 = [0x00, 0xca, 0xfe, 0x0a, 0xbb, 0xcc, 0xdd, 0xee];
    let extended = [
        0x60, 0x0c, 0xaf, 0xea, 0xbb, 0xcc, 0xdd, 0xee, 1, 2, 3, 4, 5, 6, 7, 8,
    ];
    let registered = [0x50, 0x0c, 0xaf, 0xea, 0xbb, 0xcc, 0xdd, 0xee];
    assert_eq!(told(None, Some(nguid)), [extended.to_vec()]);
    assert_eq!(told(Some(eui64), None), [registered.to_vec()]);
    assert_eq!(told(Some(eui64), Some(nguid)), [extended.to_vec()]);
    (nguid[11], eui64[3]) = (0x1a, 0x1a);
    assert!(told(Some(eui64), Some(nguid)).is_empty());
}
