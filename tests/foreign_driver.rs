//! A driver that others wrote (the virtio-driver crate, with its own front-end) on a whole server: split rings and packed
//! ones, with EVENT_IDX and without, the same requests, the same answers, and on every disk what a list of bytes says. It
//! knows no indirect tables.
//!
//! Its packed rings count from a wrap counter of 1, as virtio has it, but version 0.6.1 announces them with base 0, a wrap
//! counter of 0. Nobody else can implement its transport (a type in the trait's signatures cannot be named), so a
//! [`Relay`] stands between and says 1: everything else that the server hears is the crate's.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "foreign_driver/relay.rs"]
mod relay;
#[path = "common/rng.rs"]
mod rng;

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use relay::Relay;
use rng::Rng;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tandem::config::{CoreId, Options, Polling};
use tandem::control::server::Server;
use tandem::plan::{Topology, plan};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags, iovec,
};

/// Generous: on a machine that is busy with others the server was seen to wait 10 s for its core.
const DEADLINE: Duration = Duration::from_secs(60);
const SECTOR: usize = 512;
/// Small, so that requests meet.
const DISK: usize = 1 << 20;
/// Descriptors of a split ring: a request takes two to six, so that laps and full rings come often.
const RING: u16 = 32;
/// Of a packed one, in turn: those need not be powers of two.
const PACKED_RINGS: [u16; 4] = [RING, 27, 8, 31];
/// Requests of a round, more than a ring has room for, and the bytes that one may have.
const SLOTS: usize = 24;
const SLOT: usize = 16 << 10;
/// Rounds of a connection. The crate counts a packed ring's descriptors in 16 bits, until a server wants to be kicked for a
/// certain one (ours never does), and panics on overflow: 6 * 24 * 100 do not.
const ROUNDS: usize = 100;
/// Virtio 1.2, "Driver and Device Ring Wrap Counters" (both start with 1); Vhost-user Protocol, "VRING state structure"
/// (bits 0 to 14 an index, bit 15 its wrap counter, for the available ring and then for the used one).
const FRESH_PACKED: u32 = 0x8000_8000;
/// -EIO, which the crate makes of VIRTIO_BLK_S_IOERR.
const REFUSED: i32 = -5;

#[derive(Clone, Copy, Debug, PartialEq)]
enum Op {
    Read,
    Write,
    Discard,
    Zeroes,
    Flush,
}

/// A request: `len` bytes from `offset` on, in so many buffers.
#[derive(Clone, Copy, Debug)]
struct Request {
    op: Op,
    offset: usize,
    len: usize,
    parts: usize,
}

impl Request {
    fn result(&self) -> i32 {
        if self.offset + self.len > DISK {
            REFUSED
        } else {
            0
        }
    }
}

/// Which ring a disk has.
#[derive(Clone, Copy, Debug)]
struct Kind {
    name: &'static str,
    packed: bool,
    events: bool,
}

const KINDS: [Kind; 4] = [
    Kind {
        name: "split",
        packed: false,
        events: false,
    },
    Kind {
        name: "split-events",
        packed: false,
        events: true,
    },
    Kind {
        name: "packed",
        packed: true,
        events: false,
    },
    Kind {
        name: "packed-events",
        packed: true,
        events: true,
    },
];

/// A disk as the foreign driver sees it, with one queue.
struct Disk {
    kind: Kind,
    queue: VirtioBlkQueue<'static, usize>,
    transport: Box<VirtioBlkTransport>,
    relay: Option<Relay>,
    buffers: MmapRaw,
    /// Waits to be signalled, and looks all the time otherwise.
    sleeps: bool,
}

impl Disk {
    fn connect(folder: &Path, kind: Kind, ring: u16, sleeps: bool) -> Disk {
        let socket = folder.join(kind.name);
        let relayed = folder.join("relay");
        let relay = kind
            .packed
            .then(|| Relay::start(&relayed, &socket, FRESH_PACKED));
        let reached = if kind.packed { &relayed } else { &socket };
        let blk = VirtioBlkFeatureFlags::FLUSH
            | VirtioBlkFeatureFlags::DISCARD
            | VirtioBlkFeatureFlags::WRITE_ZEROES;
        let mut flags = VirtioFeatureFlags::VERSION_1;
        flags.set(VirtioFeatureFlags::RING_PACKED, kind.packed);
        flags.set(VirtioFeatureFlags::RING_EVENT_IDX, kind.events);
        let features = blk.bits() | flags.bits();
        let transport = VhostUser::new(reached.to_str().unwrap(), features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        assert_eq!(transport.get_features() & features, features);
        assert_eq!(
            transport.get_config().unwrap().capacity.to_native(),
            (DISK / SECTOR) as u64
        );
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, ring).unwrap();
        let bytes = SLOTS * SLOT;
        let file = rustix::fs::memfd_create("buffers", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes as u64).unwrap();
        let buffers = MmapRaw::map_raw(&file).unwrap();
        let start = buffers.as_mut_ptr() as usize;
        transport
            .map_mem_region(start, bytes, file.as_raw_fd(), 0)
            .unwrap();
        let mut queue = queues.remove(0);
        queue.set_used_notif_enabled(sleeps);
        Disk {
            kind,
            queue,
            transport,
            relay,
            buffers,
            sleeps,
        }
    }

    /// Until the server has heard of it as well.
    fn close(self) {
        let Disk {
            transport,
            relay,
            kind,
            ..
        } = self;
        drop(transport);
        if let Some(relay) = relay {
            assert_eq!(relay.end(), 1, "{}: bases of one ring", kind.name);
            assert!(kind.packed);
        }
    }

    fn buffer(&self, slot: usize) -> *mut u8 {
        assert!(slot < SLOTS);
        // SAFETY: within the mapping.
        unsafe { self.buffers.as_mut_ptr().add(slot * SLOT) }
    }

    fn bytes(&self, slot: usize, len: usize) -> Vec<u8> {
        assert!(len <= SLOT);
        // SAFETY: within the slot, whose request has ended.
        unsafe { std::slice::from_raw_parts(self.buffer(slot), len) }.to_vec()
    }

    fn fill(&self, slot: usize, bytes: &[u8]) {
        assert!(bytes.len() <= SLOT);
        // SAFETY: within the slot, which has no request yet.
        unsafe {
            self.buffer(slot)
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
    }

    /// `false` when the ring is full.
    fn send(&mut self, slot: usize, request: &Request) -> bool {
        let Request {
            op,
            offset,
            len,
            parts,
        } = *request;
        let part = len / parts / SECTOR * SECTOR;
        let vectors: Vec<iovec> = (0..parts)
            .map(|at| iovec {
                iov_base: self.buffer(slot).wrapping_add(at * part).cast(),
                iov_len: if at + 1 == parts {
                    len - at * part
                } else {
                    part
                },
            })
            .collect();
        let (first, count) = (vectors.as_ptr(), vectors.len());
        let (offset, bytes) = (offset as u64, len as u64);
        // SAFETY: the buffers are the slot's, mapped until the queue is gone.
        let sent = unsafe {
            match op {
                Op::Read => self.queue.readv(offset, first, count, slot),
                Op::Write => self.queue.writev(offset, first, count, slot),
                Op::Discard => self.queue.discard(offset, bytes, slot),
                Op::Zeroes => self.queue.write_zeroes(offset, bytes, false, slot),
                Op::Flush => self.queue.flush(slot),
            }
        };
        sent.is_ok()
    }

    /// Carries out requests, each in the slot of its place, with the ring as full as it gets: their results.
    fn carry_out(&mut self, requests: &[Request]) -> Vec<i32> {
        let mut results = vec![None; requests.len()];
        let (mut sent, mut ended) = (0, 0);
        while ended < requests.len() {
            while let Some(next) = requests.get(sent)
                && self.send(sent, next)
            {
                sent += 1;
            }
            assert!(sent > ended, "no room in an empty ring");
            if self.queue.avail_notif_needed() {
                self.transport.get_submission_notifier(0).notify().unwrap();
            }
            for (slot, result) in self.end() {
                let before = results[slot].replace(result);
                assert_eq!(before, None, "{}: slot {slot} ended twice", self.kind.name);
                ended += 1;
            }
        }
        assert!(self.queue.completions().next().is_none());
        results.into_iter().map(Option::unwrap).collect()
    }

    /// At least one of those on the way.
    fn end(&mut self) -> Vec<(usize, i32)> {
        let start = Instant::now();
        loop {
            // Before the look: this thread, too, may be kept from running for long.
            let late = start.elapsed() > DEADLINE;
            if self.sleeps {
                self.queue.set_used_notif_enabled(true);
                // The crate's split ring leaves this out: the wish to be signalled, then the look at the ring. Pairs with
                // the server's between the used ring and the look at that wish.
                fence(Ordering::SeqCst);
            }
            let ended: Vec<_> = self
                .queue
                .completions()
                .map(|completion| (completion.context, completion.ret))
                .collect();
            if !ended.is_empty() {
                return ended;
            }
            assert!(!late, "{}: nothing", self.kind.name);
            if self.sleeps {
                self.await_signal();
            } else {
                std::thread::yield_now();
            }
        }
    }

    fn await_signal(&self) {
        let signal = self.transport.get_completion_fd(0);
        let mut wanted = [PollFd::from_borrowed_fd(signal.as_fd(), PollFlags::IN)];
        let deadline = Timespec::try_from(DEADLINE).unwrap();
        let ready = poll(&mut wanted, Some(&deadline)).unwrap();
        assert_eq!(ready, 1, "{}: no signal", self.kind.name);
        signal.read().unwrap();
    }
}

/// A request for blocks that no other one of its round has.
fn request(rng: &mut Rng, taken: &[Request]) -> Request {
    loop {
        let sectors = 1 + rng.below((SLOT / SECTOR) as u64) as usize;
        let len = sectors * SECTOR;
        let last = (DISK - len) / SECTOR;
        let mut offset = rng.below(last as u64 + 1) as usize * SECTOR;
        let parts = 1 + rng.below(4.min(sectors as u64)) as usize;
        let op = if rng.one_in(20) {
            // Beyond the end. Not a read: of one that fails, the crate wants all bytes counted as written.
            offset = DISK - rng.below(sectors as u64) as usize * SECTOR;
            *rng.pick(&[Op::Write, Op::Discard, Op::Zeroes])
        } else {
            let usual = [Op::Read, Op::Read, Op::Write, Op::Write, Op::Zeroes];
            let seldom = [Op::Flush, Op::Flush, Op::Discard];
            let those = if rng.one_in(5) {
                &seldom[..]
            } else {
                &usual[..]
            };
            *rng.pick(those)
        };
        let meets =
            |other: &Request| offset < other.offset + other.len && other.offset < offset + len;
        if !taken.iter().any(meets) {
            return Request {
                op,
                offset,
                len,
                parts,
            };
        }
    }
}

/// The same load on all disks, in step from round to round, whose rings stay as they are from the first to the last. Before
/// each disk's turn there is a pause.
fn same_load_on_all_disks(folder: &Path, seed: u64, rounds: usize, pause: Duration) {
    assert!(rounds <= ROUNDS);
    let mut rng = Rng::new(seed);
    let packed = PACKED_RINGS[seed as usize % PACKED_RINGS.len()];
    let sleeps = seed % 3 == 1;
    let mut disks = KINDS.map(|kind| {
        let ring = if kind.packed { packed } else { RING };
        Disk::connect(folder, kind, ring, sleeps)
    });
    // What the last seed has left.
    let mut expected = vec![0; DISK];
    let all = [Request {
        op: Op::Zeroes,
        offset: 0,
        len: DISK,
        parts: 1,
    }];
    for disk in &mut disks {
        assert_eq!(disk.carry_out(&all), [0]);
    }
    for round in 0..rounds {
        let mut requests: Vec<Request> = Vec::new();
        for _ in 0..=rng.below(SLOTS as u64) {
            let next = request(&mut rng, &requests);
            requests.push(next);
        }
        let mut bytes = vec![0; requests.len() * SLOT];
        rng.fill(&mut bytes);
        let results: Vec<i32> = requests.iter().map(Request::result).collect();
        for disk in &mut disks {
            let told = format!("{}, seed {seed}, round {round}", disk.kind.name);
            for (slot, bytes) in bytes.chunks(SLOT).enumerate() {
                disk.fill(slot, bytes);
            }
            if !pause.is_zero() {
                std::thread::sleep(pause);
            }
            assert_eq!(disk.carry_out(&requests), results, "{told}: {requests:?}");
            for (slot, request) in requests.iter().enumerate() {
                if request.op == Op::Read {
                    let blocks = &expected[request.offset..request.offset + request.len];
                    let found = disk.bytes(slot, request.len);
                    assert!(found == blocks, "{told}: {request:?}");
                }
            }
        }
        for (request, bytes) in requests.iter().zip(bytes.chunks(SLOT)) {
            if request.result() != 0 {
                continue;
            }
            let blocks = &mut expected[request.offset..request.offset + request.len];
            match request.op {
                Op::Write => blocks.copy_from_slice(&bytes[..request.len]),
                // The embedded controller's deallocated blocks are zeroes.
                Op::Zeroes | Op::Discard => blocks.fill(0),
                Op::Read | Op::Flush => {}
            }
        }
    }
    let whole: Vec<Request> = (0..DISK / SLOT)
        .map(|at| Request {
            op: Op::Read,
            offset: at * SLOT,
            len: SLOT,
            parts: 1,
        })
        .collect();
    for mut disk in disks {
        for some in whole.chunks(SLOTS) {
            assert!(disk.carry_out(some).iter().all(|&result| result == 0));
            for (slot, request) in some.iter().enumerate() {
                let blocks = &expected[request.offset..request.offset + request.len];
                let told = format!("{}, seed {seed}, at the end", disk.kind.name);
                assert!(disk.bytes(slot, SLOT) == blocks, "{told}: {request:?}");
            }
        }
        disk.close();
    }
}

#[test]
fn driver_of_others_finds_what_it_wrote_on_rings_of_either_layout_and_kind_of_events() {
    let (folder, server) = serve("polling", Polling::Always);
    for seed in 0..8 {
        same_load_on_all_disks(&folder, seed, ROUNDS, Duration::ZERO);
    }
    end(server, &folder);
}

#[test]
fn driver_of_others_wakes_a_server_that_sleeps_and_is_woken_by_it() {
    let (folder, server) = serve("sleeping", Polling::Adaptive);
    for seed in 0..6 {
        // Long enough to fall asleep.
        same_load_on_all_disks(&folder, seed, 40, Duration::from_millis(1));
    }
    let report = end(server, &folder);
    let (_, kicks) = report.split_once("woken by kick ").unwrap();
    let kicks: String = kicks.chars().take_while(char::is_ascii_digit).collect();
    assert!(kicks.parse::<u32>().unwrap() > 100, "{report}");
}

/// Commands end out of order: each takes up to so much longer than another.
fn serve(name: &str, polling: Polling) -> (PathBuf, Server) {
    let folder = std::env::temp_dir().join(format!("tandem-foreign-{name}-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let disk = |kind: &Kind, nsid: usize| {
        format!("path={}/{},ns={nsid}", folder.display(), kind.name)
            .parse()
            .unwrap()
    };
    let device = "model:ram,size=4M,namespaces=4,latency=1us,jitter=20us";
    let mut options = Options {
        device: vec![device.parse().unwrap()],
        blk: KINDS
            .iter()
            .zip(1..)
            .map(|(kind, nsid)| disk(kind, nsid))
            .collect(),
        ..Options::default()
    };
    options.server.cores = Some("0".parse().unwrap());
    options.server.poll = Some(polling);
    let config = options.resolve().unwrap();
    let plan = plan(&config, &Topology::from_online_cores([CoreId(0)])).unwrap();
    (folder, Server::start(&plan).unwrap())
}

fn end(server: Server, folder: &Path) -> String {
    let report = server.stop().unwrap();
    assert!(
        report.contains("iommu violations 0, driver errors 0"),
        "{report}"
    );
    fs::remove_dir_all(folder).unwrap();
    report
}
