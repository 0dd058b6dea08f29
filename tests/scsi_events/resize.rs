//! Logical units that get another size while their guests use them. Capacities are those that READ CAPACITY says (SBC-3, 5.15
//! and 5.16), conditions those of SPC-4, annex F.

use nvme_driver::spec::Nsid;

use super::*;

/// PARAM_CHANGE: CAPACITY DATA HAS CHANGED, 2Ah in the first byte of the reason, 09h in the second.
const CAPACITY_CHANGED: (u32, u32) = (3, 0x092a);
const OUT_OF_RANGE: Option<(u8, u8, u8)> = Some((5, 0x21, 0));
const READ_CAPACITY_10: [u8; 10] = [0x25, 0, 0, 0, 0, 0, 0, 0, 0, 0];
const READ_CAPACITY_16: [u8; 16] = [0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32, 0, 0];

/// Blocks of a disk of so many MiB.
const fn blocks(mib: u32) -> u32 {
    mib << 11
}

fn of(mut cdb: [u8; 10], lba: u32) -> [u8; 10] {
    cdb[2..6].copy_from_slice(&lba.to_be_bytes());
    cdb
}

impl Client {
    /// It has so many blocks, and says so.
    #[track_caller]
    fn has(&mut self, blocks: u32) {
        let last = blocks - 1;
        // The second time by the short way.
        for _ in 0..2 {
            assert_eq!(self.run(&of(READ, last), &[]).status, GOOD);
            assert_eq!(self.run(&of(READ, blocks), &[]).sense, OUT_OF_RANGE);
        }
        let expected = [last.to_be_bytes(), 512_u32.to_be_bytes()].concat();
        assert_eq!(self.says(&READ_CAPACITY_10, 8), expected);
        let expected = [&u64::from(last).to_be_bytes()[..], &512_u32.to_be_bytes()].concat();
        assert_eq!(self.says(&READ_CAPACITY_16, 12), expected);
    }
}

impl Place {
    fn serve_one(&self, device: &str, poll: Polling) -> Server {
        self.serve_hosts(&[device], ["lun=0:0:ns1", "lun=2:5:ns1"], poll)
    }

    fn resize(&self, namespace: u32, size: &str) -> Value {
        self.ask(
            &json!({"command": "device-resize", "device": "d0", "namespace": namespace, "size": size}),
        )
    }
}

#[test]
fn unit_that_grows_is_told_of_on_every_host_and_has_its_new_blocks() {
    for poll in BOTH {
        let place = Place::new();
        let server = place.serve_one("model:ram,size=16M", poll);
        let (mut a, mut b) = (place.connect("a"), place.connect("b"));
        b.lun = at(2, 5);
        let mut events = EventQueue::new(&mut a);
        let mut others = EventQueue::new(&mut b);
        for head in 0..8 {
            events.offer(&a, head, 16);
            others.offer(&b, head, 16);
        }
        for client in [&mut a, &mut b] {
            client.is_told(0x29, 0x00);
            client.has(blocks(16));
        }
        let answer = place.resize(1, "24M");
        assert_eq!(answer["done"], "device d0: namespace 1 has 24M, 16M before");
        let (event, reason) = CAPACITY_CHANGED;
        events.says((event, [1, 0, 0, 0, 0, 0, 0, 0], reason));
        others.says((event, [1, 2, 0, 5, 0, 0, 0, 0], reason));
        for client in [&mut a, &mut b] {
            client.is_told(0x2a, 0x09);
            client.has(blocks(24));
        }
        let last = blocks(24) - 1;
        assert_eq!(a.run(&of(WRITE, last), &[0x6b; 512]).status, GOOD);
        assert_eq!(b.says(&of(READ, last), 512), [0x6b; 512]);
        // By an event of the controller alone; it is looked for twice a second.
        let model = server.model("d0").unwrap();
        model.resize(Nsid(1), 32 << 20).unwrap();
        events.says((event, [1, 0, 0, 0, 0, 0, 0, 0], reason));
        others.says((event, [1, 2, 0, 5, 0, 0, 0, 0], reason));
        for client in [&mut a, &mut b] {
            client.is_told(0x2a, 0x09);
            client.has(blocks(32));
        }
        // Who comes later, and a unit that comes later, know nothing else.
        drop(b);
        let mut b = place.connect("b");
        b.lun = at(2, 5);
        b.is_told(0x29, 0x00);
        b.has(blocks(32));
        place.remove("a", "0:0");
        events.says((RESET, [1, 0, 0, 0, 0, 0, 0, 0], REMOVED));
        place.resize(1, "40M");
        place.add("a", "1:1:ns1");
        events.says((RESET, [1, 1, 0, 1, 0, 0, 0, 0], RESCAN));
        a.lun = at(1, 1);
        a.is_told(0x29, 0x00);
        a.has(blocks(40));
        b.is_told(0x2a, 0x09);
        b.has(blocks(40));
        assert!(events.is_silent());
        drop((a, b));
        ends_well(server);
    }
}

/// Each of two devices has a namespace 1; the commands for one of them go by a lane of another device.
#[test]
fn unit_of_one_of_several_devices_grows_and_the_others_do_not() {
    for poll in BOTH {
        let place = Place::new();
        let luns = [
            "device=d0,lun=0:0:d0:ns1,lun=0:1:d1:ns1",
            "device=d1,lun=0:0:d1:ns1",
        ];
        let server = place.serve_hosts(&["model:ram,size=16M", "model:ram,size=16M"], luns, poll);
        let (mut a, mut b) = (place.connect("a"), place.connect("b"));
        let mut events = EventQueue::new(&mut a);
        let mut others = EventQueue::new(&mut b);
        for head in 0..4 {
            events.offer(&a, head, 16);
            others.offer(&b, head, 16);
        }
        b.is_told(0x29, 0x00);
        b.has(blocks(16));
        for lun in [1, 0] {
            a.lun = at(0, lun);
            a.is_told(0x29, 0x00);
            a.has(blocks(16));
        }
        let model = server.model("d1").unwrap();
        model.resize(Nsid(1), 20 << 20).unwrap();
        let (event, reason) = CAPACITY_CHANGED;
        events.says((event, [1, 0, 0, 1, 0, 0, 0, 0], reason));
        others.says((event, [1, 0, 0, 0, 0, 0, 0, 0], reason));
        a.has(blocks(16));
        a.lun = at(0, 1);
        for client in [&mut a, &mut b] {
            client.is_told(0x2a, 0x09);
            client.has(blocks(20));
        }
        let last = blocks(20) - 1;
        assert_eq!(a.run(&of(WRITE, last), &[0x6b; 512]).status, GOOD);
        assert_eq!(b.says(&of(READ, last), 512), [0x6b; 512]);
        assert!(events.is_silent() && others.is_silent());
        drop((a, b));
        ends_well(server);
    }
}

#[test]
fn resize_that_cannot_be_is_refused_with_words_and_changes_nothing() {
    let place = Place::new();
    let server = place.serve_one("model:ram,size=16M", Polling::Always);
    let mut a = place.connect("a");
    let mut events = EventQueue::new(&mut a);
    events.offer(&a, 0, 16);
    a.is_told(0x29, 0x00);
    for (namespace, size, words) in [
        (1, "8M", "shrinking would lose what is in the rest"),
        (1, "16777217", "its blocks have 512 bytes"),
        (1, "16000000T", "memory can have"),
        (2, "24M", "there is no such namespace"),
        (1, "much", "is not a size"),
    ] {
        let answer = place.resize(namespace, size);
        let error = answer["error"].as_str().unwrap_or_default();
        assert!(error.contains(words), "{size}: {answer}");
    }
    for (request, expected) in [
        (
            json!({"command": "device-rescan", "device": "d1"}),
            json!({"error": "cannot rescan: there is no device d1: this server has d0"}),
        ),
        (
            json!({"command": "device-resize", "device": "d0", "namespace": 1, "size": 16 << 20}),
            json!({"done": "device d0: namespace 1 had that size already"}),
        ),
        (
            json!({"command": "device-rescan", "device": "d0"}),
            json!({"done": "device d0: no namespace has changed"}),
        ),
    ] {
        assert_eq!(place.ask(&request), expected);
    }
    assert!(events.is_silent());
    a.has(blocks(16));
    drop(a);
    ends_well(server);
    let server = place.serve(Polling::Always);
    let answer = place.resize(3, "64M");
    let error = answer["error"].as_str().unwrap_or_default();
    assert!(
        error.contains("3 namespaces share the medium in equal parts"),
        "{answer}"
    );
    ends_well(server);
}

#[test]
fn image_that_somebody_makes_longer_is_followed_after_a_rescan() {
    let place = Place::new();
    let image = place.0.join("disk.img");
    let file = std::fs::File::create(&image).unwrap();
    file.set_len(16 << 20).unwrap();
    let device = format!("model:file,path={}", image.display());
    let server = place.serve_one(&device, Polling::Adaptive);
    let mut a = place.connect("a");
    let mut events = EventQueue::new(&mut a);
    events.offer(&a, 0, 16);
    a.is_told(0x29, 0x00);
    a.has(blocks(16));
    file.set_len(20 << 20).unwrap();
    let rescan = json!({"command": "device-rescan", "device": "d0"});
    assert_eq!(
        place.ask(&rescan),
        json!({"done": "device d0: namespace 1 has 20M, 16M before"})
    );
    let (event, reason) = CAPACITY_CHANGED;
    events.says((event, [1, 0, 0, 0, 0, 0, 0, 0], reason));
    a.is_told(0x2a, 0x09);
    a.has(blocks(20));
    let last = blocks(20) - 1;
    assert_eq!(a.run(&of(WRITE, last), &[0x6b; 512]).status, GOOD);
    assert_eq!(place.resize(1, "24M")["error"], Value::Null);
    assert_eq!(std::fs::metadata(&image).unwrap().len(), 24 << 20);
    a.is_told(0x2a, 0x09);
    a.has(blocks(24));
    assert_eq!(a.says(&of(READ, last), 512), [0x6b; 512]);
    file.set_len(1 << 20).unwrap();
    let answer = place.ask(&rescan);
    let error = answer["error"].as_str().unwrap_or_default();
    assert!(error.contains("has become shorter"), "{answer}");
    file.set_len(24 << 20).unwrap();
    a.has(blocks(24));
    drop(a);
    ends_well(server);
}

#[test]
fn unit_that_shrinks_by_itself_is_told_of_and_one_without_blocks_stays_what_it_was() {
    let place = Place::new();
    let server = place.serve_one("model:ram,size=16M", Polling::Always);
    let model = server.model("d0").unwrap();
    let mut a = place.connect("a");
    let mut events = EventQueue::new(&mut a);
    for head in 0..4 {
        events.offer(&a, head, 16);
    }
    a.is_told(0x29, 0x00);
    a.has(blocks(16));
    assert!(model.cut_off(Nsid(1), blocks(10).into()));
    // The device knows before the server does, and the words are the same.
    let refused = a.run(&of(READ, blocks(10)), &[]);
    let attention = Some((6, 0x2a, 0x09));
    assert!(
        [OUT_OF_RANGE, attention].contains(&refused.sense),
        "{refused:?}"
    );
    let (event, reason) = CAPACITY_CHANGED;
    events.says((event, [1, 0, 0, 0, 0, 0, 0, 0], reason));
    if refused.sense != attention {
        a.is_told(0x2a, 0x09);
    }
    a.has(blocks(10));
    assert!(model.cut_off(Nsid(1), 0));
    let answer = place.ask(&json!({"command": "device-rescan", "device": "d0"}));
    let words = answer["done"].as_str().unwrap_or_default();
    // Unless the server has looked by itself just before.
    assert!(
        words.contains("0 blocks make no disk") || answer["error"].is_string(),
        "{answer}"
    );
    assert_eq!(a.run(&of(READ, 0), &[]).sense, OUT_OF_RANGE);
    assert_eq!(a.says(&READ_CAPACITY_10, 4), (blocks(10) - 1).to_be_bytes());
    assert!(events.is_silent());
    drop(a);
    ends_well(server);
}

/// Commands for a unit that grows all the time: each ends once, those that are within what it had at first well.
#[test]
fn unit_grows_under_load_and_no_command_is_lost() {
    for device in [
        "model:ram,size=16M",
        "model:ram,size=16M,latency=200us,jitter=1ms",
    ] {
        let place = Place::new();
        let server = place.serve_one(device, Polling::Always);
        let mut a = place.connect("a");
        a.is_told(0x29, 0x00);
        let over = AtomicBool::new(false);
        let (mut good, mut told) = (0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for mib in 17..57 {
                    let answer = place.resize(1, &format!("{mib}M"));
                    assert!(answer["done"].is_string(), "{answer}");
                    std::thread::sleep(Duration::from_millis(3));
                }
                over.store(true, Ordering::Release);
            });
            while !over.load(Ordering::Acquire) || good < 100 {
                let sent: Vec<u16> = (0..12)
                    .map(|turn| match turn % 2 {
                        0 => a.send(&of(READ, blocks(16) - 1), &[]),
                        _ => a.send(&of(WRITE, blocks(16) - 1), &[0xa5; 512]),
                    })
                    .collect();
                let mut ended: Vec<u16> = (0..sent.len())
                    .map(|_| {
                        let (head, reply) = a.take();
                        match (reply.status, reply.sense) {
                            (GOOD, None) => good += 1,
                            (CHECK, Some((6, 0x2a, 0x09))) => told += 1,
                            _ => panic!("{reply:?}"),
                        }
                        head
                    })
                    .collect();
                ended.sort_unstable();
                let mut sent = sent;
                sent.sort_unstable();
                assert_eq!(ended, sent);
            }
        });
        assert!((1..=40).contains(&told), "{told}");
        let _ = a.run(&[0; 6], &[]);
        a.has(blocks(56));
        drop(a);
        ends_well(server);
    }
}
