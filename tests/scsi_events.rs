//! Logical units that come and go in a running server: what the event queue says, what commands meet, and how the server is
//! asked. The bytes of events are those of virtio 1.2, 5.6.6.3.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "scsi_events/resize.rs"]
mod resize;
#[path = "common/scsi_client.rs"]
mod scsi_client;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem::config::{AdminRequest, Options, Polling};
use tandem::control::admin::ask;
use tandem::control::server::Server;
use tandem::sim::{RawDescriptor, SimGuest, SimGuestConfig};
use tandem::virtio::memory::Gpa;
use tandem::virtio::virtqueue::RingLayout;

use scsi_client::{CHECK, Client, DEADLINE, FEATURES, GOOD, Place, ends_well, serve};

const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const INQUIRY: [u8; 6] = [0x12, 0, 0, 0, 36, 0];

/// VIRTIO_SCSI_F_HOTPLUG, VIRTIO_SCSI_F_CHANGE.
const F_EVENTS: u64 = 1 << 1 | 1 << 2;

fn at(target: u8, lun: u8) -> [u8; 8] {
    [1, target, 0x40, lun, 0, 0, 0, 0]
}

impl Place {
    /// Host `a` with namespaces 1 and 2 of three at 0:0 and 0:1; host `b` with namespace 1.
    fn serve(&self, poll: Polling) -> Server {
        self.serve_on("model:ram,size=96M,namespaces=3", poll)
    }

    fn serve_on(&self, device: &str, poll: Polling) -> Server {
        self.serve_hosts(&[device], ["lun=0:0:ns1,lun=0:1:ns2", "lun=0:0:ns1"], poll)
    }

    fn serve_hosts(&self, devices: &[&str], [a, b]: [&str; 2], poll: Polling) -> Server {
        let mut options = Options::default();
        let devices = devices.iter().map(|device| device.parse().unwrap());
        options.device.extend(devices);
        for (name, luns) in [("a", a), ("b", b)] {
            let path = self.0.join(name);
            let spec = format!("path={},{luns},initiator={name}", path.display());
            options.scsi.push(spec.parse().unwrap());
        }
        options.server.poll = Some(poll);
        let admin = self.0.join("admin");
        options.server.admin = Some(admin.to_str().unwrap().parse().unwrap());
        serve(options).unwrap()
    }

    fn ask(&self, request: &Value) -> Value {
        self.ask_raw(format!("{request}\n").as_bytes())
    }

    fn ask_raw(&self, request: &[u8]) -> Value {
        let mut stream = UnixStream::connect(self.0.join("admin")).unwrap();
        stream.set_read_timeout(Some(DEADLINE * 2)).unwrap();
        stream.write_all(request).unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn change(&self, command: &str, host: &str, lun: &str) -> Value {
        let path = self.0.join(host);
        self.ask(&json!({"command": command, "path": path, "lun": lun}))
    }

    #[track_caller]
    fn add(&self, host: &str, lun: &str) {
        let answer = self.change("lun-add", host, lun);
        assert!(answer["done"].is_string(), "{answer}");
    }

    #[track_caller]
    fn remove(&self, host: &str, lun: &str) {
        let answer = self.change("lun-remove", host, lun);
        let done = answer["done"].as_str().unwrap_or_default();
        assert!(done.ends_with("no more"), "{answer}");
    }

    /// Why it is refused.
    #[track_caller]
    fn refused(&self, command: &str, host: &str, lun: &str) -> String {
        let answer = self.change(command, host, lun);
        let error = answer["error"]
            .as_str()
            .unwrap_or_else(|| panic!("{answer}"));
        error.replace(self.0.to_str().unwrap(), "")
    }
}

/// The event queue of a client.
struct EventQueue {
    driver: SimGuest,
}

/// Event, LUN, reason.
type Event = (u32, [u8; 8], u32);

const RESET: u32 = 1;
const RESCAN: u32 = 1;
const REMOVED: u32 = 2;
const MISSED: u32 = 1 << 31;

impl EventQueue {
    fn config(client: &Client) -> SimGuestConfig {
        SimGuestConfig {
            layout: RingLayout::Split,
            size: 16,
            event_idx: true,
            indirect: true,
            max_data: 64,
            first_index: 0,
            base: Gpa(client.shared.region.gpa + client.shared.region.size - (1 << 20)),
        }
    }

    fn new(client: &mut Client) -> EventQueue {
        let config = EventQueue::config(client);
        let memory = Arc::clone(&client.shared.memory);
        let driver = SimGuest::new(memory, config).unwrap();
        let files = client.front_end.start_queue(1, &driver, &client.shared);
        client.files.push((1, files));
        EventQueue { driver }
    }

    /// Leaves a buffer of so many bytes.
    fn offer(&mut self, client: &Client, head: u16, len: u32) {
        let descriptor = RawDescriptor {
            gpa: self.driver.data_at(head).0,
            len,
            flags: 2,
            next: 0,
        };
        self.driver.write(self.driver.data_at(head), &[0xee; 16]);
        self.driver.write_descriptor(head, descriptor);
        self.driver.offer(head);
        self.driver.publish();
        client.kick(1);
    }

    /// The head that comes back, its used length and what is in its buffer.
    #[track_caller]
    fn next(&mut self) -> (u16, u32, Event) {
        let start = Instant::now();
        loop {
            if let Some((head, len)) = self.driver.take_used() {
                let head = head as u16;
                let mut bytes = [0; 16];
                self.driver.read(self.driver.data_at(head), &mut bytes);
                let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                return (
                    head,
                    len,
                    (word(0), bytes[4..12].try_into().unwrap(), word(12)),
                );
            }
            assert!(start.elapsed() < DEADLINE, "no event");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    fn says(&mut self, event: Event) {
        let (_, len, told) = self.next();
        assert_eq!((len, told), (16, event), "{told:x?}");
    }

    fn is_silent(&mut self) -> bool {
        std::thread::sleep(Duration::from_millis(30));
        self.driver.take_used().is_none()
    }
}

/// The core that answers commands looks for events in the same turns.
#[track_caller]
fn was_looked_for(client: &mut Client) {
    for _ in 0..3 {
        client.says(&INQUIRY, 1);
    }
}

const BOTH: [Polling; 2] = [Polling::Always, Polling::Adaptive];

#[test]
fn unit_that_comes_and_goes_is_told_of_and_others_of_its_target_are_told_why() {
    for poll in BOTH {
        let place = Place::new();
        let server = place.serve(poll);
        let mut a = place.connect("a");
        let mut b = place.connect("b");
        let mut events = EventQueue::new(&mut a);
        let mut others = EventQueue::new(&mut b);
        for head in 0..8 {
            events.offer(&a, head, 16);
            others.offer(&b, head, 16);
        }
        for lun in [at(0, 0), at(0, 1)] {
            a.lun = lun;
            a.is_told(0x29, 0x00);
        }
        b.is_told(0x29, 0x00);
        place.add("a", "3:300:ns3");
        // The LUN as REPORT LUNS has it: flat from 256 on.
        let lun = [1, 3, 0x41, 0x2c, 0, 0, 0, 0];
        events.says((RESET, lun, RESCAN));
        a.lun = lun;
        a.is_told(0x29, 0x00);
        assert_eq!(a.run(&WRITE, &[0x5a; 512]).status, GOOD);
        assert_eq!(a.says(&READ, 512), [0x5a; 512]);
        place.add("b", "0:255:ns2");
        others.says((RESET, [1, 0, 0, 255, 0, 0, 0, 0], RESCAN));
        b.is_told(0x3f, 0x0e);
        b.lun = at(0, 255);
        b.is_told(0x29, 0x00);
        // It is the same unit as a's at 0:1.
        assert_eq!(b.run(&WRITE, &[0x77; 512]).status, GOOD);
        a.lun = at(0, 1);
        assert_eq!(a.says(&READ, 512), [0x77; 512]);
        for _ in 0..2 {
            assert_eq!(a.run(&WRITE, &[0x78; 512]).status, GOOD);
        }

        place.remove("a", "0:1");
        events.says((RESET, [1, 0, 0, 1, 0, 0, 0, 0], REMOVED));
        for _ in 0..2 {
            assert_eq!(a.run(&WRITE, &[0x79; 512]).sense, Some((5, 0x25, 0)));
            assert_eq!(a.run(&READ, &[]).sense, Some((5, 0x25, 0)));
            assert_eq!(a.says(&INQUIRY, 1), [0x7f]);
        }
        assert_eq!(b.says(&READ, 512), [0x78; 512]);
        // Another one at a place where one was written to is another one.
        a.lun = lun;
        assert_eq!(a.run(&WRITE, &[0x5b; 512]).status, GOOD);
        place.remove("a", "3:300");
        place.add("a", "3:300:ns2");
        events.says((RESET, lun, REMOVED));
        events.says((RESET, lun, RESCAN));
        a.is_told(0x29, 0x00);
        assert_eq!(a.run(&WRITE, &[0x7a; 512]).status, GOOD);
        assert_eq!(b.says(&READ, 512), [0x7a; 512]);
        a.lun = at(0, 0);
        a.is_told(0x3f, 0x0e);
        assert_eq!(a.run(&[0; 6], &[]).status, GOOD);
        // The other host has it as before, and heard of nothing.
        assert_eq!(b.run(&READ, &[]).status, GOOD);
        assert!(others.is_silent() && events.is_silent());
        drop((a, b));
        ends_well(server);
    }
}

#[test]
fn event_without_a_buffer_is_missed_and_said_so_in_the_next_one() {
    for poll in BOTH {
        let place = Place::new();
        let server = place.serve(poll);
        let mut a = place.connect("a");
        let mut events = EventQueue::new(&mut a);
        place.add("a", "3:0:ns3");
        was_looked_for(&mut a);
        // As soon as there is one; nothing else is in it.
        events.offer(&a, 0, 16);
        events.says((MISSED, [0; 8], 0));
        assert!(events.is_silent());
        events.offer(&a, 1, 16);
        place.remove("a", "3:0");
        events.says((RESET, [1, 3, 0, 0, 0, 0, 0, 0], REMOVED));
        // Far more than the server remembers.
        for _ in 0..50 {
            place.add("a", "3:0:ns3");
            place.remove("a", "3:0");
        }
        was_looked_for(&mut a);
        for head in 2..6 {
            events.offer(&a, head, 16);
        }
        events.says((MISSED, [0; 8], 0));
        assert!(events.is_silent());
        drop(a);
        ends_well(server);
    }
}

#[test]
fn event_buffer_that_is_too_short_goes_back_and_the_next_one_is_taken() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    let mut a = place.connect("a");
    let mut events = EventQueue::new(&mut a);
    events.offer(&a, 0, 15);
    events.offer(&a, 1, 0);
    events.offer(&a, 2, 64);
    place.add("a", "3:0:ns3");
    let untouched = u32::from_le_bytes([0xee; 4]);
    for head in [0, 1] {
        let (own, len, told) = events.next();
        assert_eq!((own, len, told.0), (head, 0, untouched));
    }
    let (head, len, told) = events.next();
    let lun = [1, 3, 0, 0, 0, 0, 0, 0];
    assert_eq!((head, len, told), (2, 16, (RESET, lun, RESCAN)));
    drop(a);
    ends_well(server);
}

#[test]
fn guest_that_negotiated_no_events_hears_of_none_and_misses_none() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    let mut a = Client::connect(&place.0.join("a"), FEATURES & !F_EVENTS);
    let mut events = EventQueue::new(&mut a);
    place.add("a", "3:0:ns3");
    events.offer(&a, 0, 16);
    for _ in 0..50 {
        place.remove("a", "3:0");
        place.add("a", "3:0:ns3");
    }
    assert!(events.is_silent());
    a.lun = at(3, 0);
    a.is_told(0x29, 0x00);
    drop(a);
    ends_well(server);
}

#[test]
fn what_one_guest_does_to_a_shared_unit_is_told_to_the_other_at_once() {
    for poll in BOTH {
        let place = Place::new();
        let server = place.serve(poll);
        let (mut a, mut b) = (place.connect("a"), place.connect("b"));
        let mut events = EventQueue::new(&mut a);
        let mut own = EventQueue::new(&mut b);
        for head in 0..8 {
            events.offer(&a, head, 16);
            own.offer(&b, head, 16);
        }
        a.is_told(0x29, 0x00);
        b.is_told(0x29, 0x00);
        // MODE SENSE, the caching page alone; MODE SELECT of the same with WCE = 0.
        let page = &b.says(&[0x1a, 0x08, 0x08, 0, 24, 0], 24)[4..];
        let mut list = [&[0; 4], page].concat();
        list[4] &= 0x3f;
        list[6] &= !0x04;
        assert_eq!(b.run(&[0x15, 0x10, 0, 0, 24, 0], &list).status, GOOD);
        // PARAM_CHANGE: MODE PARAMETERS CHANGED, 2Ah in the first byte, 01h in the second.
        events.says((3, [1, 0, 0, 0, 0, 0, 0, 0], 0x012a));
        a.is_told(0x2a, 0x01);
        // LOGICAL UNIT RESET on the control queue of the other.
        b.lun = at(0, 0);
        assert_eq!(b.manage(5, 0), 0);
        // RESET_HARD.
        events.says((RESET, [1, 0, 0, 0, 0, 0, 0, 0], 0));
        a.is_told(0x29, 0x03);
        assert!(own.is_silent() && events.is_silent());
        drop((a, b));
        ends_well(server);
    }
}

/// A guest with commands for several LUNs in its ring all the time, of which one comes and goes.
#[test]
fn units_come_and_go_under_load_and_every_command_ends_once() {
    for (device, poll) in [
        ("model:ram,size=96M,namespaces=3", Polling::Always),
        (
            "model:ram,size=96M,namespaces=3,latency=200us,jitter=1ms",
            Polling::Always,
        ),
        (
            "model:ram,size=96M,namespaces=3,latency=50us",
            Polling::Adaptive,
        ),
    ] {
        let place = Place::new();
        let server = place.serve_on(device, poll);
        let mut a = place.connect("a");
        let over = AtomicBool::new(false);
        let (mut there, mut absent, mut steady) = (0, 0, 0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for _ in 0..40 {
                    place.add("a", "0:7:ns3");
                    std::thread::sleep(Duration::from_millis(3));
                    place.remove("a", "0:7");
                }
                over.store(true, Ordering::Release);
            });
            let mut sent: Vec<(u16, bool)> = Vec::new();
            let mut turn = 0_u16;
            while !over.load(Ordering::Acquire) || !sent.is_empty() {
                // Heads go round, and a slow one may be the next.
                while sent.iter().all(|(head, _)| *head != turn % 16 * 4)
                    && sent.len() < 12
                    && !over.load(Ordering::Acquire)
                {
                    let comes_and_goes = turn.is_multiple_of(2);
                    a.lun = match comes_and_goes {
                        true => at(0, 7),
                        false => at(0, (turn / 2 % 2) as u8),
                    };
                    let head = match turn.is_multiple_of(3) {
                        true => a.send(&WRITE, &[0xa5; 512]),
                        false => a.send(&READ, &[]),
                    };
                    assert_eq!(head, turn % 16 * 4);
                    sent.push((head, comes_and_goes));
                    turn = turn.wrapping_add(1);
                }
                let (head, reply) = a.take();
                let at = sent.iter().position(|(own, _)| *own == head);
                let (_, comes_and_goes) = sent.swap_remove(at.expect("a head came back twice"));
                match (comes_and_goes, reply.status, reply.sense) {
                    (true, GOOD, None) => there += 1,
                    (true, CHECK, Some((5, 0x25, 0))) => absent += 1,
                    (false, GOOD, None) => steady += 1,
                    // The new one says that it is new, and any of them that there are others now.
                    (_, CHECK, Some((6, 0x29, 0) | (6, 0x3f, 0x0e))) => {}
                    other => panic!("{other:?}"),
                }
            }
        });
        assert!(
            there > 0 && absent > 0 && steady > there,
            "{there} {absent} {steady}"
        );
        drop(a);
        ends_well(server);
    }
}

#[test]
fn connection_after_changes_sees_what_there_is_and_hears_of_nothing_old() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    drop(place.connect("a"));
    place.add("a", "5:1:ns3");
    place.remove("a", "0:0");
    let mut a = place.connect("a");
    let mut events = EventQueue::new(&mut a);
    events.offer(&a, 0, 16);
    assert!(events.is_silent());
    a.lun = at(5, 1);
    a.is_told(0x29, 0x00);
    assert_eq!(a.run(&READ, &[]).status, GOOD);
    a.lun = at(0, 0);
    assert_eq!(a.run(&READ, &[]).sense, Some((5, 0x25, 0)));
    drop(a);
    ends_well(server);
}

#[test]
fn reservations_of_a_unit_outlive_its_absence_from_a_host() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    let (mut a, mut b) = (place.connect("a"), place.connect("b"));
    a.is_told(0x29, 0x00);
    b.is_told(0x29, 0x00);
    let out = |action: u8, key: u64, new: u64| {
        let mut list = [0; 24];
        list[..8].copy_from_slice(&key.to_be_bytes());
        list[8..16].copy_from_slice(&new.to_be_bytes());
        ([0x5f, action, 1, 0, 0, 0, 0, 0, 24, 0], list)
    };
    for (action, key, new) in [(0, 0, 0xa), (1, 0xa, 0)] {
        let (cdb, list) = out(action, key, new);
        assert_eq!(a.run(&cdb, &list).status, GOOD);
    }
    place.remove("a", "0:0");
    // WRITE EXCLUSIVE: held by one who is not there.
    assert_eq!(b.run(&WRITE, &[0; 512]).status, 0x18);
    place.add("a", "4:0:ns1");
    a.lun = at(4, 0);
    a.is_told(0x29, 0x00);
    assert_eq!(a.run(&WRITE, &[0; 512]).status, GOOD);
    let (cdb, list) = out(2, 0xa, 0);
    assert_eq!(a.run(&cdb, &list).status, GOOD);
    assert_eq!(b.run(&WRITE, &[0; 512]).status, GOOD);
    // RESERVE of SPC-2 goes with the unit.
    let (cdb, list) = out(0, 0xa, 0);
    assert_eq!(a.run(&cdb, &list).status, GOOD);
    assert_eq!(a.run(&[0x16, 0, 0, 0, 0, 0], &[]).status, GOOD);
    assert_eq!(b.run(&READ, &[]).status, 0x18);
    place.remove("a", "4:0");
    assert_eq!(b.run(&READ, &[]).status, GOOD);
    drop((a, b));
    ends_well(server);
}

#[test]
fn what_makes_no_sense_is_refused_with_words_and_changes_nothing() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    let luns = place.ask(&json!({"command": "luns"}));
    for (command, host, lun, expected) in [
        (
            "lun-add",
            "nowhere",
            "3:0:ns3",
            "no SCSI host /nowhere: this server has /a, /b",
        ),
        (
            "lun-add",
            "a",
            "0:1:ns3",
            "cannot add 0:1:ns3 to host /a: target 0 has LUN 1 already: ",
        ),
        (
            "lun-add",
            "a",
            "3:0:ns1",
            "namespace 1 of device d0 would be served by /a and by /a, of which both are writable",
        ),
        (
            "lun-add",
            "a",
            "3:0:ns4",
            "cannot serve namespace 4 of device d0: it is not active (active: [1, 2, 3])",
        ),
        (
            "lun-add",
            "a",
            "3:ns3",
            "`3:ns3` is not a place for a logical unit: write TARGET:LUN:nsN",
        ),
        (
            "lun-add",
            "a",
            "3:16384:ns3",
            "(targets 0 to 255, LUNs 0 to 16383, namespaces 1 to 1024)",
        ),
        (
            "lun-remove",
            "a",
            "0:2",
            "cannot remove 0:2 from host /a: it has no such logical unit",
        ),
        (
            "lun-remove",
            "a",
            "0",
            "`0` is not the address of a logical unit: write TARGET:LUN, such as 0:1",
        ),
        (
            "lun-move",
            "a",
            "0:0",
            "unknown variant `lun-move`, expected one of `lun-add`, `lun-remove`, `luns`, \
             `device-rescan`, `device-resize`",
        ),
    ] {
        let error = place.refused(command, host, lun);
        assert!(error.contains(expected), "{command} {host} {lun}: {error}");
    }
    for (request, expected) in [
        (
            &b"nonsense\n"[..],
            "cannot read the request: expected ident",
        ),
        (
            b"{\"command\":\"luns\",\"more\":1}\n",
            "unknown field `more`",
        ),
        (b"\xff\xff\n", "cannot read the request: "),
        (
            &[b'['; 5000],
            "cannot read the request: it has more than 4096 bytes",
        ),
        (
            &[b"[".repeat(4094), b"\n".to_vec()].concat(),
            "cannot read the request: ",
        ),
    ] {
        let answer = place.ask_raw(request);
        let error = answer["error"].as_str().unwrap();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(place.ask(&json!({"command": "luns"})), luns);
    let path = place.0.join("a");
    let first = json!({
        "path": path, "lun": "0:0:ns1", "device": "d0", "blocks": 65536, "block_size": 512, "readonly": false,
    });
    assert_eq!(
        (&luns["luns"][0], luns["luns"].as_array().unwrap().len()),
        (&first, 3)
    );
    ends_well(server);
}

#[test]
fn namespace_with_commands_from_before_its_removal_is_given_to_nobody_until_they_have_ended() {
    let place = Place::new();
    // Longer than a removal waits.
    let server = place.serve_on(
        "model:ram,size=96M,namespaces=3,latency=12s",
        Polling::Always,
    );
    let mut a = place.connect("a");
    a.lun = at(0, 1);
    a.is_told(0x29, 0x00);
    let head = a.send(&READ, &[]);
    // It was taken from the ring before this one.
    a.says(&INQUIRY, 1);
    let answer = place.change("lun-remove", "a", "0:1");
    let done = answer["done"].as_str().unwrap();
    assert!(done.contains("at the device after 10s"), "{done}");
    for host in ["a", "b"] {
        let error = place.refused("lun-add", host, "4:0:ns2");
        let expected = "namespace 2 was taken from host /a, whose commands from before";
        assert!(error.contains(expected), "{error}");
    }
    // It ends as if nothing had happened.
    let (own, reply) = a.take();
    assert_eq!((own, reply.status), (head, GOOD));
    let start = Instant::now();
    while place.change("lun-add", "b", "4:0:ns2")["done"].is_null() {
        assert!(start.elapsed() < DEADLINE);
    }
    drop(a);
    ends_well(server);
}

#[test]
fn people_are_told_in_words_what_there_is_and_what_was_refused() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    let admin = place.0.join("admin");
    let ask = |request: &AdminRequest| {
        let answer = ask(&admin, request, false);
        let text = answer.unwrap_or_else(|error| error.to_string());
        text.replace(&format!("{}/", place.0.display()), "")
    };
    let path = place.0.join("b").display().to_string();
    let lun = "7:300:ns3".parse().unwrap();
    let add = AdminRequest::LunAdd { path, lun };
    assert_eq!(ask(&add), "host b has 7:300:ns3\n");
    let refused =
        "cannot add 7:300:ns3 to host b: namespace 3 of device d0 would be served by b and by b";
    assert!(ask(&add).starts_with(refused), "{}", ask(&add));
    let list = ask(&AdminRequest::Luns {});
    let lines: Vec<Vec<&str>> = list
        .lines()
        .map(|line| line.split_whitespace().collect())
        .collect();
    assert_eq!(lines[0], ["HOST", "PLACE", "DEVICE", "SIZE", "ACCESS"]);
    assert_eq!(lines[4], ["b", "7:300:ns3", "d0", "32M", "read-write"]);
    assert_eq!(lines.len(), 5);
    ends_well(server);
    let gone = ask(&add);
    assert!(
        gone.starts_with("cannot reach a server at admin: "),
        "{gone}"
    );
}

#[test]
fn administration_socket_is_private_and_no_client_holds_up_another_or_the_end() {
    let place = Place::new();
    let server = place.serve(Polling::Always);
    let path = place.0.join("admin");
    let mode = std::fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Several requests of one client, in pieces, the last one without an end.
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut silent: Vec<UnixStream> = Vec::new();
    for piece in [
        "{\"comm",
        "and\":\"luns\"}\n\n{\"command\":\"lu",
        "ns\"}\n{\"command\":\"luns\"}",
    ] {
        stream.write_all(piece.as_bytes()).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        silent.push(UnixStream::connect(&path).unwrap());
        silent.last_mut().unwrap().write_all(b"{").unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    let mut all = String::new();
    stream.read_to_string(&mut all).unwrap();
    assert_eq!(all.lines().count(), 3, "{all}");
    // Nobody has read anything for the silent ones; sooner or later there are too many of them.
    let start = Instant::now();
    let refused = loop {
        assert!(start.elapsed() < DEADLINE);
        let one_more = UnixStream::connect(&path).unwrap();
        let patience = Duration::from_millis(700);
        one_more.set_read_timeout(Some(patience)).unwrap();
        let mut line = String::new();
        if BufReader::new(&one_more).read_line(&mut line).is_ok() {
            let answer: Value = serde_json::from_str(&line).unwrap();
            break answer["error"].as_str().unwrap().to_owned();
        }
        silent.push(one_more);
    };
    assert_eq!(refused, "8 clients are at this socket already: close one");
    let start = Instant::now();
    ends_well(server);
    assert!(start.elapsed() < DEADLINE);
    assert!(!path.exists());
}
