//! A SCSI host whose logical units are on several devices, in a whole server.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/scsi_client.rs"]
mod scsi_client;

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use tandem::config::{AdminRequest, Options, Polling};
use tandem::control::admin::ask;
use tandem::control::server::Server;
use tandem::sim::front_end::request::*;
use tandem::sim::front_end::{eventfd, vring_state};

use scsi_client::{Client, DEADLINE, GOOD, Place, ends_well, serve};

const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];

const BOTH: [Polling; 2] = [Polling::Always, Polling::Adaptive];

fn at(target: u8, lun: u8) -> [u8; 8] {
    [1, target, 0x40, lun, 0, 0, 0, 0]
}

/// Namespace 2 of the device is at LUN 1 of both hosts, and each has one of its own at LUN 0 of the device where its ring is.
const HOSTS: [(&str, &str); 2] = [
    ("a", "lun=0:0:d0:ns1,lun=0:1:d1:ns2,lun=0:2:d2:ns1"),
    ("b", "device=d1,lun=0:0:ns1,lun=0:1:ns2"),
];

fn start(place: &Place, devices: [&str; 3], poll: Polling) -> Server {
    let mut options = Options::default();
    for device in devices {
        options.device.push(device.parse().unwrap());
    }
    for (name, luns) in HOSTS {
        let path = place.0.join(name);
        let spec = format!("path={},{luns},initiator={name}", path.display());
        options.scsi.push(spec.parse().unwrap());
    }
    options.server.poll = Some(poll);
    let admin = place.0.join("admin");
    options.server.admin = Some(admin.to_str().unwrap().parse().unwrap());
    serve(options).unwrap()
}

impl Client {
    /// Stops the request queue, and starts it where it stood.
    fn restart(&mut self) {
        // Number and base, of 32 bits each.
        let base = self.front_end.ask(GET_VRING_BASE, &vring_state(2, 0));
        self.front_end.send(SET_VRING_BASE, &base, &[]);
        let kick = eventfd();
        let which = 2_u64.to_le_bytes();
        self.front_end.send(SET_VRING_KICK, &which, &[kick.as_fd()]);
        let enabled = vring_state(2, 1);
        let enabled = self.front_end.acknowledged(SET_VRING_ENABLE, &enabled, &[]);
        assert_eq!(enabled, Some(0));
        let queue = self.files.iter_mut().find(|(index, _)| *index == 2);
        queue.unwrap().1.0 = kick;
    }
}

const DEVICES: [&str; 3] = [
    "model:ram,size=32M",
    "model:ram,size=96M,namespaces=3",
    "model:ram,size=32M,block=4096",
];

/// The queue pairs of request queue 2 of host `a`, and the commands that went to each.
fn commands(report: &str) -> Vec<(String, u64)> {
    let rings = report
        .split("\n\n")
        .find(|table| table.contains("SQ doorbells"));
    let rows = rings.into_iter().flat_map(str::lines).map(|line| {
        let cells: Vec<&str> = line.split_whitespace().collect();
        (cells[0].ends_with("/a"), cells)
    });
    rows.filter(|(is_own, cells)| *is_own && cells[1] == "2")
        .map(|(_, cells)| {
            (
                cells[3].to_owned(),
                cells[4].replace(',', "").parse().unwrap(),
            )
        })
        .collect()
}

#[test]
fn units_of_several_devices_keep_their_own_blocks_over_queue_pairs_of_their_own() {
    for poll in BOTH {
        let place = Place::new();
        let server = start(&place, DEVICES, poll);
        let mut a = place.connect("a");
        for lun in 0..3 {
            a.lun = at(0, lun);
            a.is_told(0x29, 0x00);
        }
        // One block of each is a whole one of 4096 bytes on the third.
        let data =
            |lun: u8, round: u8| vec![0x10 * (lun + 1) + round; if lun == 2 { 4096 } else { 512 }];
        for round in 0..10 {
            for lun in 0..3 {
                a.lun = at(0, lun);
                assert_eq!(a.run(&WRITE, &data(lun, round)).status, GOOD, "{lun}");
            }
            for lun in 0..3 {
                a.lun = at(0, lun);
                assert_eq!(
                    a.says(&READ, data(lun, round).len()),
                    data(lun, round),
                    "{lun}"
                );
            }
        }
        drop(a);
        let report = server.stop().unwrap();
        let of_pairs = commands(&report);
        let pairs: Vec<&str> = of_pairs.iter().map(|(pair, _)| pair.as_str()).collect();
        assert_eq!(pairs, ["1", "d1:1", "d2:1"], "{report}");
        for (_, count) in of_pairs {
            assert_eq!(count, 20, "{report}");
        }
    }
}

/// COMPARE AND WRITE of block 0.
const COMPARE_AND_WRITE: [u8; 16] = [0x89, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0];

#[test]
fn unit_that_two_hosts_reach_from_different_devices_is_one_unit_to_both() {
    for poll in BOTH {
        let place = Place::new();
        let server = start(&place, DEVICES, poll);
        let (mut a, mut b) = (place.connect("a"), place.connect("b"));
        for client in [&mut a, &mut b] {
            client.lun = at(0, 1);
            client.is_told(0x29, 0x00);
        }
        // Each takes the number that is there one further, whoever was there before: none is lost.
        let block = |number: u64| {
            let mut block = vec![0; 512];
            block[..8].copy_from_slice(&number.to_le_bytes());
            block
        };
        assert_eq!(a.run(&WRITE, &block(0)).status, GOOD);
        let count = |client: &mut Client| {
            let mut done = 0;
            while done < 100 {
                let now = client.says(&READ, 512);
                let number = u64::from_le_bytes(now[..8].try_into().unwrap());
                let pair = [now, block(number + 1)].concat();
                let reply = client.run(&COMPARE_AND_WRITE, &pair);
                match (reply.status, reply.sense) {
                    (GOOD, None) => done += 1,
                    (_, Some((0x0e, 0x1d, 0))) => {}
                    other => panic!("{other:?}"),
                }
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| count(&mut a));
            scope.spawn(|| count(&mut b));
        });
        assert_eq!(a.says(&READ, 512), block(200));
        // PERSISTENT RESERVE OUT: REGISTER, then RESERVE for WRITE EXCLUSIVE.
        for (action, key, new) in [(0, 0, 0xa_u64), (1, 0xa_u64, 0)] {
            let list = [key.to_be_bytes(), new.to_be_bytes(), [0; 8]].concat();
            let cdb = [0x5f, action, 1, 0, 0, 0, 0, 0, 24, 0];
            assert_eq!(b.run(&cdb, &list).status, GOOD);
        }
        assert_eq!(a.run(&WRITE, &block(0)).status, 0x18);
        a.lun = at(0, 0);
        a.is_told(0x29, 0x00);
        assert_eq!(a.run(&WRITE, &block(0)).status, GOOD);
        // LOGICAL UNIT RESET.
        a.lun = at(0, 1);
        assert_eq!(a.manage(5, 0), 0);
        b.is_told(0x29, 0x03);
        drop((a, b));
        ends_well(server);
    }
}

/// Commands for units of all devices in one ring, one of which comes and goes, while the guest resets units and stops and
/// starts its ring.
#[test]
fn units_of_several_devices_under_load_end_every_command_once() {
    let slow = [
        "model:ram,size=32M,latency=100us,jitter=500us",
        "model:ram,size=96M,namespaces=3,latency=50us,jitter=1ms",
        "model:ram,size=32M,block=4096",
    ];
    for (devices, poll) in [
        (DEVICES, Polling::Always),
        (slow, Polling::Always),
        (slow, Polling::Adaptive),
    ] {
        let place = Place::new();
        let server = start(&place, devices, poll);
        let mut a = place.connect("a");
        for lun in 0..3 {
            a.lun = at(0, lun);
            a.is_told(0x29, 0x00);
        }
        let (over, enough) = (AtomicBool::new(false), AtomicBool::new(false));
        let (mut good, mut told, mut absent, mut ended) = (0, 0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let admin = place.0.join("admin");
                let path = place.0.join("a").display().to_string();
                let change =
                    |what| ask(&admin, &serde_json::from_value(what).unwrap(), false).unwrap();
                // As often as it takes for the guest to have met everything.
                let start = Instant::now();
                let mut round = 0;
                while round < 30 || !(enough.load(Ordering::Acquire) || start.elapsed() > DEADLINE)
                {
                    round += 1;
                    change(json!({"command": "lun-add", "path": path, "lun": "0:7:d1:ns3"}));
                    std::thread::sleep(Duration::from_millis(3));
                    change(json!({"command": "lun-remove", "path": path, "lun": "0:7"}));
                }
                over.store(true, Ordering::Release);
            });
            let mut sent: Vec<u16> = Vec::new();
            let mut turn = 0_u16;
            while !over.load(Ordering::Acquire) || !sent.is_empty() {
                while sent.len() < 12
                    && !sent.contains(&(turn % 16 * 4))
                    && !over.load(Ordering::Acquire)
                {
                    a.lun = at(0, [0, 1, 2, 7][usize::from(turn % 4)]);
                    let len = if turn % 4 == 2 { 4096 } else { 512 };
                    sent.push(match turn.is_multiple_of(3) {
                        true => a.send(&WRITE, &vec![0xa5; len]),
                        false => a.send(&READ, &[]),
                    });
                    turn = turn.wrapping_add(1);
                }
                if turn % 61 == 5 {
                    // ABORT TASK SET, LOGICAL UNIT RESET; of one's own.
                    a.lun = at(0, (turn / 61 % 3) as u8);
                    let function = [1, 5][usize::from(turn / 61 % 2)];
                    assert_eq!(a.manage(function, 0), 0);
                    turn = turn.wrapping_add(1);
                    // The head that its place had.
                    a.lun = at(0, 0);
                    sent.push(a.send(&READ, &[]));
                }
                let (head, reply) = a.take();
                let place = sent.iter().position(|own| *own == head);
                sent.swap_remove(place.expect("a head came back twice"));
                match (reply.response, reply.status, reply.sense) {
                    (0, GOOD, None) => good += 1,
                    (0, 2, Some((6, ..))) => told += 1,
                    (0, 2, Some((5, 0x25, 0))) => absent += 1,
                    // ABORTED, RESET.
                    (2 | 4, ..) => ended += 1,
                    other => panic!("{other:?}"),
                }
                if good > 100 && told > 0 && absent > 0 {
                    enough.store(true, Ordering::Release);
                }
            }
        });
        assert!(
            enough.load(Ordering::Acquire),
            "{good} {told} {absent} {ended}"
        );
        // The guest stops its ring with commands in it, and starts it again.
        for round in 0..20_u8 {
            for lun in [0, 1, 2, 1] {
                a.lun = at(0, lun);
                a.send(&READ, &[]);
            }
            a.restart();
            let mut back = 0;
            while back < 4 {
                let (_, reply) = a.take();
                assert!(
                    matches!(reply.status, GOOD | 2),
                    "{reply:?} in round {round}"
                );
                back += 1;
            }
        }
        drop(a);
        ends_well(server);
    }
}

#[test]
fn administrators_are_told_of_devices_by_name() {
    let place = Place::new();
    let server = start(&place, DEVICES, Polling::Always);
    let admin = place.0.join("admin");
    let host = |name: &str| place.0.join(name).display().to_string();
    let asks = |what: serde_json::Value| {
        let request: AdminRequest = serde_json::from_value(what).unwrap();
        ask(&admin, &request, false).map_err(|error| error.to_string())
    };
    let add =
        |name: &str, lun: &str| asks(json!({"command": "lun-add", "path": host(name), "lun": lun}));
    add("a", "3:0:d1:ns3").unwrap();
    let list = asks(json!({"command": "luns"})).unwrap();
    let row = |place: &str| {
        let row = list.lines().find(|line| line.contains(place));
        let row = row.unwrap_or_else(|| panic!("{place}: {list}"));
        row.split_whitespace()
            .skip(2)
            .map(str::to_owned)
            .collect::<Vec<_>>()
            .join(" ")
    };
    assert_eq!(row("a  3:0:d1:ns3"), "d1 32M read-write");
    assert_eq!(row("a  0:0:ns1"), "d0 32M read-write");
    assert_eq!(row("b  0:0:ns1"), "d1 32M read-write");
    let mut a = place.connect("a");
    a.lun = at(3, 0);
    a.is_told(0x29, 0x00);
    assert_eq!(a.run(&WRITE, &[9; 512]).status, GOOD);
    for (name, lun, why) in [
        (
            "b",
            "3:0:d0:ns1",
            "the host has no queue pairs at that device, but at those alone whose namespaces",
        ),
        (
            "b",
            "3:0:d7:ns1",
            "there is no device d7, but there is d0, d1, d2",
        ),
        ("a", "3:1:d1:ns3", "would be served by"),
    ] {
        let refusal = add(name, lun).unwrap_err();
        assert!(refusal.contains(why), "{refusal}");
    }
    drop(a);
    ends_well(server);
}
