//! A driver that others wrote (the virtio-driver crate, with its own front-end) on a whole server: split rings, with EVENT_IDX
//! and without in step, the same requests, the same answers, and on either disk what a list of bytes says. It knows no
//! indirect tables.
//!
//! Not its packed rings: version 0.6.1 has them start at base 0, which is a wrap counter of 0, and then counts from 1.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/rng.rs"]
mod rng;

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use memmap2::MmapRaw;
use rng::Rng;
use tandem::config::{CoreId, Options};
use tandem::control::server::Server;
use tandem::plan::{Topology, plan};
use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags, iovec,
};

const DEADLINE: Duration = Duration::from_secs(10);
const SECTOR: usize = 512;
/// Small, so that requests meet.
const DISK: usize = 1 << 20;
/// Descriptors of a ring: a request takes up to six, so that laps and full rings come often.
const RING: u16 = 32;
/// Requests on the way at a time, and the bytes that one may have.
const SLOTS: usize = 8;
const SLOT: usize = 64 << 10;

#[derive(Clone, Copy, Debug)]
enum Op {
    Read,
    Write,
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

/// A disk as the foreign driver sees it, with one queue.
struct Disk {
    queue: VirtioBlkQueue<'static, usize>,
    transport: Box<VirtioBlkTransport>,
    buffers: MmapRaw,
}

impl Disk {
    fn connect(socket: &Path, events: VirtioFeatureFlags) -> Disk {
        let blk = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::WRITE_ZEROES;
        let ring = VirtioFeatureFlags::VERSION_1 | events;
        let features = blk.bits() | ring.bits();
        let transport = VhostUser::new(socket.to_str().unwrap(), features).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(transport);
        assert_eq!(transport.get_features() & ring.bits(), ring.bits());
        assert_eq!(
            transport.get_config().unwrap().capacity.to_native(),
            (DISK / SECTOR) as u64
        );
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, RING).unwrap();
        let bytes = SLOTS * SLOT;
        let file = rustix::fs::memfd_create("buffers", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, bytes as u64).unwrap();
        let buffers = MmapRaw::map_raw(&file).unwrap();
        let start = buffers.as_mut_ptr() as usize;
        transport
            .map_mem_region(start, bytes, file.as_raw_fd(), 0)
            .unwrap();
        Disk {
            queue: queues.remove(0),
            transport,
            buffers,
        }
    }

    fn buffer(&self, slot: usize) -> *mut u8 {
        // SAFETY: within the mapping.
        unsafe { self.buffers.as_mut_ptr().add(slot * SLOT) }
    }

    fn bytes(&self, slot: usize, len: usize) -> Vec<u8> {
        // SAFETY: within the slot, whose request has ended.
        unsafe { std::slice::from_raw_parts(self.buffer(slot), len) }.to_vec()
    }

    fn fill(&self, slot: usize, bytes: &[u8]) {
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
        let offset = offset as u64;
        // SAFETY: the buffers are the slot's, mapped until the queue is gone.
        let sent = unsafe {
            match op {
                Op::Read => self.queue.readv(offset, first, count, slot),
                Op::Write => self.queue.writev(offset, first, count, slot),
                Op::Zeroes => self.queue.write_zeroes(offset, len as u64, false, slot),
                Op::Flush => self.queue.flush(slot),
            }
        };
        sent.is_ok()
    }

    /// Slots whose requests have ended, all of those that are `due`.
    fn end(&mut self, due: usize) -> Vec<usize> {
        if self.queue.avail_notif_needed() {
            self.transport.get_submission_notifier(0).notify().unwrap();
        }
        let start = Instant::now();
        let mut ended = Vec::new();
        while ended.len() < due {
            assert!(start.elapsed() < DEADLINE, "{ended:?} of {due}");
            for completion in self.queue.completions() {
                assert_eq!(completion.ret, 0);
                ended.push(completion.context);
            }
        }
        ended.sort_unstable();
        ended
    }
}

/// A request for blocks that no other one on the way has.
fn request(rng: &mut Rng, taken: &[Request]) -> Request {
    loop {
        let sectors = 1 + rng.below((SLOT / SECTOR) as u64) as usize;
        let len = sectors * SECTOR;
        let last = (DISK - len) / SECTOR;
        let offset = rng.below(last as u64 + 1) as usize * SECTOR;
        let parts = 1 + rng.below(4.min(sectors as u64)) as usize;
        let op = match rng.one_in(10) {
            true => Op::Flush,
            false => *rng.pick(&[Op::Read, Op::Read, Op::Write, Op::Write, Op::Zeroes]),
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

#[test]
fn driver_of_others_finds_what_it_wrote_on_rings_of_either_kind_of_events() {
    let folder = std::env::temp_dir().join(format!("tandem-foreign-{}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let socket = |name: &str| -> PathBuf { folder.join(name) };
    let server = serve(&folder);
    for seed in 0..8 {
        let mut rng = Rng::new(seed);
        let mut disks = [
            Disk::connect(&socket("flags"), VirtioFeatureFlags::empty()),
            Disk::connect(&socket("indices"), VirtioFeatureFlags::RING_EVENT_IDX),
        ];
        // What the last seed has left.
        let mut expected = vec![0; DISK];
        for disk in &mut disks {
            let all = Request {
                op: Op::Zeroes,
                offset: 0,
                len: DISK,
                parts: 1,
            };
            assert!(disk.send(0, &all));
            assert_eq!(disk.end(1), [0]);
        }
        for round in 0..400 {
            let mut sent: Vec<Request> = Vec::new();
            let most = 1 + rng.below(SLOTS as u64) as usize;
            for slot in 0..most {
                let next = request(&mut rng, &sent);
                let mut bytes = vec![0; next.len];
                rng.fill(&mut bytes);
                let fits = disks.each_mut().map(|disk| {
                    disk.fill(slot, &bytes);
                    disk.send(slot, &next)
                });
                // Both rings are as long.
                assert_eq!(fits[0], fits[1], "seed {seed}, round {round}: {next:?}");
                if !fits[0] {
                    break;
                }
                sent.push(next);
            }
            let slots: Vec<usize> = (0..sent.len()).collect();
            for disk in &mut disks {
                assert_eq!(disk.end(sent.len()), slots);
            }
            for (slot, request) in sent.iter().enumerate() {
                let blocks = &mut expected[request.offset..request.offset + request.len];
                let found = disks.each_ref().map(|disk| disk.bytes(slot, request.len));
                match request.op {
                    Op::Read => {
                        let told = format!("seed {seed}, round {round}: {request:?}");
                        assert!(found[0] == blocks, "flags, {told}");
                        assert!(found[1] == blocks, "indices, {told}");
                    }
                    Op::Write => blocks.copy_from_slice(&found[0]),
                    Op::Zeroes => blocks.fill(0),
                    Op::Flush => {}
                }
            }
        }
    }
    let report = server.stop().unwrap();
    assert!(
        report.contains("iommu violations 0, driver errors 0"),
        "{report}"
    );
    fs::remove_dir_all(&folder).unwrap();
}

fn serve(folder: &Path) -> Server {
    let disk = |name: &str, nsid: u32| {
        format!("path={}/{name},ns={nsid}", folder.display())
            .parse()
            .unwrap()
    };
    let mut options = Options {
        device: vec!["model:ram,size=2M,namespaces=2".parse().unwrap()],
        blk: vec![disk("flags", 1), disk("indices", 2)],
        ..Options::default()
    };
    options.server.cores = Some("0".parse().unwrap());
    let config = options.resolve().unwrap();
    let plan = plan(&config, &Topology::from_online_cores([CoreId(0)])).unwrap();
    Server::start(&plan).unwrap()
}
