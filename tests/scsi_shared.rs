//! Two front-ends of one logical unit, through the whole server: reservations between them, over connections and restarts.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/scsi_client.rs"]
mod scsi_client;

use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tandem::config::{Options, Polling};
use tandem::control::server::Server;

use scsi_client::{Client, DEADLINE, GOOD, Place, Reply, ends_well, serve};

const CONFLICT: u8 = 0x18;
const FULL: u8 = 0x28;

const REGISTER: u8 = 0;
const RESERVE: u8 = 1;
const CLEAR: u8 = 3;
const PREEMPT_AND_ABORT: u8 = 5;

impl Place {
    fn state(&self) -> PathBuf {
        self.0.join("state")
    }

    /// The one file of the one namespace.
    fn file(&self) -> PathBuf {
        let files = fs::read_dir(self.state()).unwrap();
        let mut files: Vec<PathBuf> = files.map(|file| file.unwrap().path()).collect();
        assert_eq!(files.len(), 1, "{files:?}");
        files.remove(0)
    }

    /// Hosts `a` and `b` with namespace 1 of a RAM disk, at different LUNs.
    fn try_serve(&self, device: &str, poll: Polling, keeps: bool) -> Result<Server, String> {
        let mut options = Options::default();
        options.device.push(device.parse().unwrap());
        for (name, lun) in [("a", "0:0"), ("b", "0:0")] {
            let path = self.0.join(name);
            let spec = format!("path={},lun={lun}:ns1,initiator={name}", path.display());
            options.scsi.push(spec.parse().unwrap());
        }
        options.server.poll = Some(poll);
        if keeps {
            options.server.state = Some(self.state().to_str().unwrap().parse().unwrap());
        }
        serve(options)
    }

    fn serve(&self, device: &str, poll: Polling) -> Server {
        self.try_serve(device, poll, true).unwrap()
    }
}

impl Client {
    #[track_caller]
    fn ends_with(&mut self, status: u8, cdb: &[u8], out: &[u8]) {
        assert_eq!(self.run(cdb, out).status, status, "{cdb:02x?}");
    }

    fn reserve_out(&mut self, action: u8, kind: u8, keys: (u64, u64), flags: u8) -> u16 {
        let (cdb, list) = out_command(action, kind, keys, flags);
        self.send(&cdb, &list)
    }

    #[track_caller]
    fn out(&mut self, action: u8, kind: u8, keys: (u64, u64), flags: u8) -> Reply {
        let (cdb, list) = out_command(action, kind, keys, flags);
        self.run(&cdb, &list)
    }

    #[track_caller]
    fn does(&mut self, action: u8, kind: u8, keys: (u64, u64), flags: u8) {
        assert_eq!(self.out(action, kind, keys, flags).status, GOOD);
    }

    /// What PERSISTENT RESERVE IN says.
    #[track_caller]
    fn reserve_in(&mut self, action: u8, len: usize) -> Vec<u8> {
        self.says(&[0x5e, action, 0, 0, 0, 0, 0, 2, 0, 0], len)
    }
}

fn out_command(action: u8, kind: u8, keys: (u64, u64), flags: u8) -> ([u8; 10], [u8; 24]) {
    let mut list = [0; 24];
    list[..8].copy_from_slice(&keys.0.to_be_bytes());
    list[8..16].copy_from_slice(&keys.1.to_be_bytes());
    list[20] = flags;
    ([0x5f, action, kind, 0, 0, 0, 0, 0, 24, 0], list)
}

const READ: [u8; 10] = [0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const WRITE: [u8; 10] = [0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0];
const BLOCK: [u8; 512] = [0xa5; 512];
const APTPL: u8 = 1;
const RAM: &str = "model:ram,size=64M";

fn both(place: &Place) -> (Client, Client) {
    let (mut a, mut b) = (place.connect("a"), place.connect("b"));
    a.is_told(0x29, 0x00);
    b.is_told(0x29, 0x00);
    (a, b)
}

#[test]
fn one_front_end_fences_the_other_off_and_is_preempted() {
    for poll in [Polling::Always, Polling::Adaptive] {
        let place = Place::new();
        let server = place.try_serve(RAM, poll, false).unwrap();
        let (mut a, mut b) = both(&place);
        a.does(REGISTER, 0, (0, 0xa), 0);
        b.does(REGISTER, 0, (0, 0xb), 0);
        a.does(RESERVE, 1, (0xa, 0), 0);
        b.ends_with(CONFLICT, &WRITE, &BLOCK);
        b.ends_with(GOOD, &READ, &[]);
        a.ends_with(GOOD, &WRITE, &BLOCK);
        // Without a directory nothing survives, and that is said.
        assert_eq!(
            a.out(REGISTER, 0, (0xa, 0xa), APTPL).sense,
            Some((5, 0x26, 0))
        );
        assert_eq!(a.reserve_in(2, 4)[2] & 1, 0);
        // A connection that ends takes nothing with it.
        drop(a);
        b.ends_with(CONFLICT, &WRITE, &BLOCK);
        b.does(PREEMPT_AND_ABORT, 3, (0xb, 0xa), 0);
        let mut a = place.connect("a");
        a.is_told(0x29, 0x00);
        a.ends_with(CONFLICT, &READ, &[]);
        a.ends_with(GOOD, &[0; 6], &[]);
        b.ends_with(GOOD, &WRITE, &BLOCK);
        b.does(CLEAR, 0, (0xb, 0), 0);
        a.ends_with(GOOD, &READ, &[]);
        // RESERVE of SPC-2 ends with the connection.
        a.ends_with(GOOD, &[0x16, 0, 0, 0, 0, 0], &[]);
        b.ends_with(CONFLICT, &READ, &[]);
        drop(a);
        let start = Instant::now();
        while b.run(&READ, &[]).status != GOOD {
            assert!(start.elapsed() < DEADLINE);
        }
        drop(b);
        ends_well(server);
    }
}

#[test]
fn preempt_and_abort_is_answered_after_the_commands_that_it_ends() {
    for poll in [Polling::Always, Polling::Adaptive] {
        let place = Place::new();
        let server = place.serve("model:ram,size=64M,latency=300ms", poll);
        let (mut a, mut b) = both(&place);
        for (client, key) in [(&mut a, 1), (&mut b, 2)] {
            client.does(REGISTER, 0, (0, key), 0);
        }
        b.does(RESERVE, 1, (2, 0), 0);
        // A fresh ring position of b is at the device for a while.
        let writes = [b.send(&WRITE, &BLOCK), b.send(&WRITE, &BLOCK)];
        std::thread::sleep(Duration::from_millis(50));
        let start = Instant::now();
        a.does(PREEMPT_AND_ABORT, 1, (1, 2), 0);
        let waited = start.elapsed();
        let ended = [b.try_take(), b.try_take()];
        for (write, ended) in writes.into_iter().zip(ended) {
            let (head, reply) = ended.expect("a command of the preempted one was still under way");
            assert_eq!((head, reply.status), (write, GOOD));
        }
        assert!(waited > Duration::from_millis(100), "{waited:?}");
        b.is_told(0x2a, 0x05);
        b.ends_with(CONFLICT, &WRITE, &BLOCK);
        // Each preempts the other: one of them comes first, and nobody waits for ever.
        b.does(REGISTER, 0, (0, 2), 0);
        let sent = [
            a.reserve_out(PREEMPT_AND_ABORT, 1, (1, 2), 0),
            b.reserve_out(PREEMPT_AND_ABORT, 1, (2, 1), 0),
        ];
        let (first, second) = (a.take(), b.take());
        assert_eq!([first.0, second.0], sent);
        // The later one conflicts, or is told before that it is not registered any more.
        let statuses = [first.1.status, second.1.status];
        let winners = statuses.iter().filter(|status| **status == GOOD);
        assert_eq!(winners.count(), 1, "{statuses:?}");
        drop((a, b));
        ends_well(server);
    }
}

const ABORT_TASK: u32 = 0;
const I_T_NEXUS_RESET: u32 = 4;
const LOGICAL_UNIT_RESET: u32 = 5;

/// Response codes (virtio 1.2, 5.6.6.1.1).
const ABORTED: u8 = 2;
const RESET: u8 = 4;

#[test]
fn abort_and_reset_end_commands_at_the_device_and_not_when_it_is_done_with_them() {
    for poll in [Polling::Always, Polling::Adaptive] {
        let place = Place::new();
        let server = place.serve("model:ram,size=64M,latency=60s", poll);
        let (mut a, mut b) = both(&place);
        let start = Instant::now();
        let sent = [a.send(&READ, &[]), a.send(&WRITE, &BLOCK)];
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(a.manage(ABORT_TASK, sent[1]), 0);
        let (head, reply) = a.try_take().expect("it ended before the function");
        assert_eq!((head, reply.response), (sent[1], ABORTED));
        assert_eq!(a.try_take(), None, "the other one");
        // Another initiator's nexus is nobody else's business; the logical unit is everybody's.
        let other = b.send(&READ, &[]);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(b.manage(I_T_NEXUS_RESET, 0), 0);
        let (head, reply) = b.try_take().expect("it ended before the function");
        assert_eq!((head, reply.response), (other, RESET));
        assert_eq!(a.try_take(), None, "the other initiator's");
        b.is_told(0x29, 0x07);
        let other = b.send(&WRITE, &BLOCK);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(a.manage(LOGICAL_UNIT_RESET, 0), 0);
        for (client, sent) in [(&mut a, sent[0]), (&mut b, other)] {
            let (head, reply) = client.try_take().expect("it ended before the reset");
            assert_eq!((head, reply.response), (sent, RESET));
            client.is_told(0x29, 0x03);
        }
        assert!(start.elapsed() < DEADLINE, "the device was waited for");
        drop((a, b));
        ends_well(server);
    }
}

/// MODE SENSE (6) of the caching page, without a block descriptor.
const CACHING: [u8; 6] = [0x1a, 0x08, 0x08, 0, 255, 0];

#[test]
fn reset_of_a_unit_sets_modes_and_reserve_back_and_keeps_persistent_reservations() {
    let place = Place::new();
    let server = place.try_serve(RAM, Polling::Always, false).unwrap();
    let (mut a, mut b) = both(&place);
    assert_eq!(a.says(&CACHING, 7)[6] & 4, 4);
    // MODE SELECT: WCE off, D_SENSE and SWP on.
    let mut caching = [0; 24];
    (caching[4], caching[5]) = (0x08, 18);
    a.ends_with(GOOD, &[0x15, 0x10, 0, 0, 24, 0], &caching);
    let mut control = [0; 16];
    (control[4], control[5], control[6], control[7], control[8]) = (0x0a, 10, 4, 0x10, 8);
    a.ends_with(GOOD, &[0x15, 0x10, 0, 0, 16, 0], &control);
    let reply = b.run(&[0; 6], &[]);
    assert_eq!(reply.status, scsi_client::CHECK);
    assert_eq!(b.says(&CACHING, 7)[6] & 4, 0);
    a.ends_with(scsi_client::CHECK, &WRITE, &BLOCK);
    a.ends_with(GOOD, &[0x16, 0, 0, 0, 0, 0], &[]);
    b.ends_with(CONFLICT, &READ, &[]);
    // The nexus of one initiator: its reservation is its own, and modes are everybody's.
    assert_eq!(b.manage(I_T_NEXUS_RESET, 0), 0);
    // In the descriptor format, as D_SENSE says.
    b.ends_with(scsi_client::CHECK, &[0; 6], &[]);
    b.ends_with(CONFLICT, &READ, &[]);
    assert_eq!(b.manage(LOGICAL_UNIT_RESET, 0), 0);
    a.is_told(0x29, 0x03);
    b.is_told(0x29, 0x03);
    b.ends_with(GOOD, &READ, &[]);
    b.ends_with(GOOD, &WRITE, &BLOCK);
    for client in [&mut a, &mut b] {
        assert_eq!(client.says(&CACHING, 7)[6] & 4, 4);
    }
    a.ends_with(GOOD, &[0x16, 0, 0, 0, 0, 0], &[]);
    assert_eq!(a.manage(I_T_NEXUS_RESET, 0), 0);
    a.is_told(0x29, 0x07);
    b.ends_with(GOOD, &READ, &[]);
    a.does(REGISTER, 0, (0, 0xa), 0);
    a.does(RESERVE, 3, (0xa, 0), 0);
    assert_eq!(b.manage(LOGICAL_UNIT_RESET, 0), 0);
    b.is_told(0x29, 0x03);
    b.ends_with(CONFLICT, &READ, &[]);
    assert_eq!(b.reserve_in(0, 16)[8..], [0, 0, 0, 0, 0, 0, 0, 0xa]);
    a.is_told(0x29, 0x03);
    a.ends_with(GOOD, &WRITE, &BLOCK);
    drop((a, b));
    ends_well(server);
}

#[test]
fn more_commands_than_may_wait_are_answered_all_the_same_and_so_is_a_hasty_end() {
    let place = Place::new();
    let server = place.serve(RAM, Polling::Always);
    let (mut a, mut b) = both(&place);
    let sent: Vec<u16> = (1..13)
        .map(|key| a.reserve_out(6, 0, (0, key), APTPL))
        .collect();
    let mut back: Vec<u16> = Vec::new();
    for _ in &sent {
        let (head, reply) = a.take();
        assert!([GOOD, FULL].contains(&reply.status), "{reply:?}");
        back.push(head);
    }
    back.sort_unstable();
    assert_eq!(back, sent);
    // The guest goes while the clerk is at work: the server waits for it, and the next one finds all in order.
    a.does(6, 0, (0, 0xa), APTPL);
    a.reserve_out(RESERVE, 3, (0xa, 0), 0);
    drop(a);
    b.ends_with(GOOD, &[0; 6], &[]);
    let mut a = place.connect("a");
    a.is_told(0x29, 0x00);
    assert_eq!(a.reserve_in(0, 16)[8..], [0, 0, 0, 0, 0, 0, 0, 0xa]);
    a.reserve_out(RESERVE, 3, (0xa, 0), 0);
    // And so with the whole server.
    ends_well(server);
}

#[test]
fn reservations_survive_a_restart_when_they_are_to() {
    let place = Place::new();
    let server = place.serve(RAM, Polling::Always);
    let (mut a, mut b) = both(&place);
    assert_eq!(a.reserve_in(2, 4)[2..], [0x15, 0x90]);
    a.does(REGISTER, 0, (0, 0x0102_0304_0506_0708), APTPL);
    b.does(REGISTER, 0, (0, 0xb), APTPL);
    a.does(RESERVE, 6, (0x0102_0304_0506_0708, 0), 0);
    drop((a, b));
    ends_well(server);
    let name = place.file().file_name().unwrap().to_owned();
    let name = name.to_str().unwrap().to_owned();
    assert!(
        name.starts_with("nguid-") && name.ends_with(".json"),
        "{name}"
    );
    let whole = fs::read_to_string(place.file()).unwrap();

    // All that a disk may do to a file, and what people may. The server says which file it is and does not start.
    let flipped = whole.replace("\"kind\": 6", "\"kind\": 5");
    let version = whole.replace("\"version\": 1", "\"version\": 2");
    let cases = [
        (String::new(), "it is damaged: EOF"),
        (whole[..whole.len() / 2].to_owned(), "it is damaged: EOF"),
        (
            flipped,
            "it is damaged: its checksum is that of something else",
        ),
        (version, "it is of version 2, and this server knows 1"),
        ("\0".repeat(whole.len()), "it is damaged: expected value"),
    ];
    for (text, reason) in cases {
        assert_ne!(text, whole);
        fs::write(place.file(), &text).unwrap();
        let error = place.try_serve(RAM, Polling::Always, true).unwrap_err();
        for words in [
            reason,
            &name,
            "it is not ignored: put back a copy of it, or remove it",
        ] {
            assert!(error.contains(words), "{error}");
        }
        assert_eq!(fs::read_to_string(place.file()).unwrap(), text);
    }
    // That of another namespace.
    fs::remove_file(place.file()).unwrap();
    let other = "model:ram,size=64M,serial=other";
    let server = place.serve(other, Polling::Always);
    let (mut a, b) = both(&place);
    a.does(REGISTER, 0, (0, 1), APTPL);
    drop((a, b));
    ends_well(server);
    assert_ne!(place.file().file_name().unwrap().to_str().unwrap(), name);
    fs::write(place.file(), &whole).unwrap();
    let error = place.try_serve(other, Polling::Always, true).unwrap_err();
    assert!(error.contains("it is that of namespace nguid-"), "{error}");
    fs::rename(place.file(), place.state().join(&name)).unwrap();
    // Nothing can be kept where there is no directory.
    fs::rename(place.state(), place.0.join("away")).unwrap();
    fs::write(place.state(), b"").unwrap();
    let error = place.try_serve(RAM, Polling::Always, true).unwrap_err();
    assert!(error.contains("cannot keep reservations in"), "{error}");
    fs::remove_file(place.state()).unwrap();
    fs::rename(place.0.join("away"), place.state()).unwrap();

    fs::write(place.file(), &whole).unwrap();
    let server = place.serve(RAM, Polling::Always);
    let (mut a, mut b) = both(&place);
    assert_eq!(a.reserve_in(2, 4)[2..], [0x15, 0x91]);
    let held = a.reserve_in(1, 24);
    assert_eq!(
        held[..16],
        [0, 0, 0, 0, 0, 0, 0, 16, 1, 2, 3, 4, 5, 6, 7, 8]
    );
    assert_eq!(held[21], 6);
    // Both are registered.
    a.ends_with(GOOD, &WRITE, &BLOCK);
    b.ends_with(GOOD, &WRITE, &BLOCK);
    b.does(REGISTER, 0, (0xb, 0), APTPL);
    b.ends_with(CONFLICT, &READ, &[]);
    // The last registration says that nothing is to survive any more.
    a.does(REGISTER, 0, (0x0102_0304_0506_0708, 0xa), 0);
    assert_eq!(fs::read_dir(place.state()).unwrap().count(), 0);
    drop((a, b));
    ends_well(server);
    let server = place.serve(RAM, Polling::Always);
    let (mut a, mut b) = both(&place);
    assert_eq!(a.reserve_in(0, 8), [0; 8]);
    b.ends_with(GOOD, &READ, &[]);
    drop((a, b));
    ends_well(server);
}

#[test]
fn what_cannot_be_kept_fails_and_changes_nothing() {
    let place = Place::new();
    let server = place.serve(RAM, Polling::Always);
    let (mut a, mut b) = both(&place);
    a.does(REGISTER, 0, (0, 0xa), 0);
    // Nothing can be written to a directory that is gone, whoever tries.
    fs::remove_dir_all(place.state()).unwrap();
    assert_eq!(
        a.out(REGISTER, 0, (0xa, 0xb), APTPL).sense,
        Some((4, 0x44, 0))
    );
    assert_eq!(
        b.reserve_in(0, 16),
        [0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0xa]
    );
    fs::create_dir(place.state()).unwrap();
    a.does(REGISTER, 0, (0xa, 0xb), APTPL);
    drop((a, b));
    ends_well(server);
}
