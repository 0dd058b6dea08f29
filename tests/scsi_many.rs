//! As many logical units as a server has for one host, through the whole server: all are reported, and each is found by every
//! way that there is to write its LUN.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/scsi_client.rs"]
mod scsi_client;

use tandem::config::{MAX_NAMESPACES, Options};

use scsi_client::{CHECK, GOOD, Place, ends_well, serve};

/// Namespaces 1 to 1022 at LUNs 0 to 1021 of target 0; the others at the highest LUN of that, and of the last target.
const ELSEWHERE: [(u8, u16); 2] = [(0, 16383), (255, 16383)];

fn places() -> Vec<(u8, u16)> {
    let last = MAX_NAMESPACES as u16 - 2;
    (0..last).map(|lun| (0, lun)).chain(ELSEWHERE).collect()
}

/// The LUN field of a request (virtio 1.2, 5.6.6.1) in each way of SAM-5, 4.7 that reaches a LUN: peripheral device
/// addressing below 256, flat space, extended flat space.
fn addresses((target, lun): (u8, u16)) -> Vec<[u8; 8]> {
    let [high, low] = lun.to_be_bytes();
    let mut all = vec![
        [1, target, 0x40 | high, low, 0, 0, 0, 0],
        [1, target, 0xd2, 0, high, low, 0, 0],
    ];
    if lun < 256 {
        all.push([1, target, 0, low, 0, 0, 0, 0]);
    }
    all
}

fn block(number: usize) -> Vec<u8> {
    let mut block = vec![0xa5; 512];
    block[..8].copy_from_slice(&(number as u64).to_be_bytes());
    block
}

#[test]
fn thousand_logical_units_are_reported_and_each_is_itself_however_it_is_addressed() {
    let place = Place::new();
    let mut options = Options::default();
    let device = format!("model:ram,size=64M,namespaces={MAX_NAMESPACES}");
    options.device.push(device.parse().unwrap());
    let mut host = format!("path={}", place.0.join("s").display());
    for (nsid, (target, lun)) in (1..).zip(places()) {
        host += &format!(",lun={target}:{lun}:ns{nsid}");
    }
    options.scsi.push(host.parse().unwrap());
    let server = serve(options).unwrap();
    let mut client = place.connect("s");

    // From where there is no logical unit, all of the target; from the controller's well-known one, all of both.
    client.lun = [1, 0, 0x7f, 0xfe, 0, 0, 0, 0];
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0x3c, 0, 0, 0];
    let luns = MAX_NAMESPACES as usize - 1;
    let said = client.says(&report, 8 + luns * 8);
    assert_eq!(said[..8], [0, 0, 0x1f, 0xf8, 0, 0, 0, 0]);
    for (entry, (_, lun)) in said[8..].chunks(8).zip(places()) {
        let [high, low] = lun.to_be_bytes();
        let flat = if lun < 256 { 0 } else { 0x40 };
        assert_eq!(entry, [flat | high, low, 0, 0, 0, 0, 0, 0]);
    }
    client.lun = [0xc1, 0x01, 0, 0, 0, 0, 0, 0];
    let said = client.says(&report, 8 + luns * 8 + 8);
    assert_eq!(said[..8], [0, 0, 0x20, 0, 0, 0, 0, 0]);
    let all: Vec<[u8; 8]> = places().into_iter().map(|at| addresses(at)[0]).collect();
    assert_eq!(said[8..].chunks(8).collect::<Vec<_>>(), all);

    for (number, at) in places().into_iter().enumerate() {
        client.lun = addresses(at)[0];
        client.is_told(0x29, 0x00);
        let write = [0x2a, 0, 0, 0, 0, 7, 0, 0, 1, 0];
        assert_eq!(client.run(&write, &block(number)).status, GOOD);
    }
    for (number, at) in places().into_iter().enumerate() {
        for address in addresses(at) {
            client.lun = address;
            let read = [0x28, 0, 0, 0, 0, 7, 0, 0, 1, 0];
            assert!(client.says(&read, 512) == block(number), "{at:?}");
            // The serial number tells the namespace.
            let serial = format!("d0-ns{}", number + 1);
            let said = client.says(&[0x12, 1, 0x80, 0, 255, 0], 4 + serial.len());
            assert_eq!(said[..4], [0, 0x80, 0, serial.len() as u8]);
            assert_eq!(said[4..], *serial.as_bytes());
        }
    }
    // A reset of the last one is told there alone.
    client.lun = addresses(ELSEWHERE[1])[0];
    assert_eq!(client.manage(5, 0), 0);
    client.is_told(0x29, 0x03);
    client.lun = addresses(ELSEWHERE[0])[0];
    assert_eq!(client.run(&[0; 6], &[]).status, GOOD);
    // Beside them there is nothing.
    for at in [(0, luns as u16 - 1), (0, 16382), (255, 0)] {
        for address in addresses(at) {
            client.lun = address;
            let reply = client.run(&[0; 6], &[]);
            assert_eq!((reply.status, reply.sense), (CHECK, Some((5, 0x25, 0))));
        }
    }
    drop(client);
    ends_well(server);
}
