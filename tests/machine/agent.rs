//! What tests/vfio.rs runs inside its machine: clients of a server there, and one that uses the driver itself. It ends
//! with an error and says why when anything is not as it should be; facts are lines as scripts/guest/job.sh has them.
//!
//!   agent load LOAD SOCKET...      a verified load on each socket at the same time (tests/machine/load.rs)
//!   agent endure LOAD SOCKET...    the same while devices come and go: requests take longer, and flushes may fail
//!   agent survive SECONDS SOCKET   writes until the server dies, then looks what the next one has
//!   agent vanish ROUNDS SOCKET     a client goes with requests in flight, and the next one has other memory at once
//!   agent load-huge scattered|gathered LOAD SOCKET   the same in huge pages: no two are neighbours, or as many as can be
//!   agent hole SOCKET              gives a huge page back while the server has it
//!   agent fault BDF                reads to where nothing is mapped, on an SSD that vfio-pci has
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod client;
mod load;
#[path = "../common/rng.rs"]
mod rng;

use std::collections::HashMap;
use std::fs::File;
use std::iter::Peekable;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use client::{Client, DEADLINE, Pages, publish};
use load::{Action, Kind, Load, MAX_DATA, Oracle, Plan, SECTOR};
use memmap2::{MmapOptions, MmapRaw};
use nvme_driver::dma::{DmaAccess, DmaBuffer, Iova};
use nvme_driver::spec::{LbaRange, SubmissionEntry};
use nvme_driver::vfio::VfioTransport;
use nvme_driver::{Controller, DataSegment};
use rng::Rng;
use rustix::fs::{FallocateFlags, fallocate};
use tandem::sim::front_end::{HUGE_PAGE, huge_memfd};
use tandem::sim::{Framing, SimCompletion, SimGuest, SimRequest};
use tandem::virtio::blk::{RangeSegment, request_type, status};
use zerocopy::IntoBytes;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["load", load, ref sockets @ ..] if !sockets.is_empty() => {
            run_load(load, sockets, Pages::Ordinary, false);
        }
        ["endure", load, ref sockets @ ..] if !sockets.is_empty() => {
            run_load(load, sockets, Pages::Ordinary, true);
        }
        ["load-huge", "scattered", load, socket] => {
            let _others = scatter();
            run_load(load, &[socket], Pages::Huge, false);
        }
        ["load-huge", "gathered", load, socket] => {
            gather();
            run_load(load, &[socket], Pages::Huge, false);
        }
        ["hole", socket] => hole(Path::new(socket)),
        ["survive", seconds, socket] => survive(seconds.parse().unwrap(), Path::new(socket)),
        ["vanish", rounds, socket] => vanish(rounds.parse().unwrap(), Path::new(socket)),
        ["fault", address] => fault(address),
        _ => panic!("which command? {arguments:?}"),
    }
}

fn fact(key: &str, value: impl std::fmt::Display) {
    println!("TANDEM {key}={value}");
}

// ---- load ----

/// One queue of one client under a load.
struct Stream {
    plan: Peekable<Plan>,
    oracle: Oracle,
    /// Planned, but what it touches is in flight.
    held: Option<Action>,
    in_flight: HashMap<u16, Action>,
    busy: Vec<bool>,
    /// How requests are framed; nothing of what they mean.
    frames: Rng,
    first_sector: u64,
    compared: u64,
    /// A device that comes back may have lost its cache, and says so.
    endures: bool,
    failed_flushes: u64,
}

impl Stream {
    fn new(load: &Load, queue: u32, endures: bool) -> Stream {
        Stream {
            plan: load.plan(queue).peekable(),
            oracle: Oracle::new(load),
            held: None,
            in_flight: HashMap::new(),
            busy: vec![false; load.sectors() as usize],
            frames: Rng::new(load.seed ^ 0xf00d ^ u64::from(queue)),
            first_sector: load.first_sector(queue),
            compared: 0,
            endures,
            failed_flushes: 0,
        }
    }

    fn sectors(action: &Action) -> std::ops::Range<usize> {
        action.sector as usize..(action.sector + action.sectors) as usize
    }

    fn is_over(&mut self) -> bool {
        self.in_flight.is_empty() && self.held.is_none() && self.plan.peek().is_none()
    }

    /// Sends what can be sent. `depth` requests at most are in flight.
    fn submit(&mut self, queue: &mut SimGuest, kick: &File, depth: usize) {
        while self.in_flight.len() < depth {
            let Some(action) = self.held.take().or_else(|| self.plan.next()) else {
                break;
            };
            let waits = self.busy[Self::sectors(&action)].iter().any(|busy| *busy);
            let sent = if waits {
                None
            } else {
                self.send(queue, &action)
            };
            let Some(head) = sent else {
                self.held = Some(action);
                break;
            };
            self.busy[Self::sectors(&action)].fill(true);
            let reused = self.in_flight.insert(head, action);
            assert!(reused.is_none(), "head {head} is in use");
        }
        publish(queue, kick);
    }

    /// `None` when the ring has no room.
    fn send(&mut self, queue: &mut SimGuest, action: &Action) -> Option<u16> {
        let sector = self.first_sector + action.sector;
        let bytes = (action.sectors * SECTOR) as u32;
        let range = |flags: u32| RangeSegment {
            sector: sector.into(),
            num_sectors: (action.sectors as u32).into(),
            flags: flags.into(),
        };
        let (mut request, data) = match action.kind {
            Kind::Read => (
                SimRequest::new(request_type::IN, sector, bytes, true),
                Vec::new(),
            ),
            Kind::Write(_) => (
                SimRequest::new(request_type::OUT, sector, bytes, false),
                action.content(),
            ),
            Kind::Flush => (
                SimRequest::new(request_type::FLUSH, 0, 0, false),
                Vec::new(),
            ),
            Kind::Discard => (
                SimRequest::new(request_type::DISCARD, 0, 16, false),
                range(0).as_bytes().to_vec(),
            ),
            Kind::Zeroes(unmap) => (
                SimRequest::new(request_type::WRITE_ZEROES, 0, 16, false),
                range(unmap.into()).as_bytes().to_vec(),
            ),
        };
        let frames = &mut self.frames;
        request.framing = *frames.pick(&[Framing::Plain, Framing::SplitHeader, Framing::Joined]);
        if request.data_len > 0 {
            request.pieces = 1 + frames.below(8) as u16;
            // Mostly where a kernel puts its buffers, now and then where it hurts.
            request.data_offset = *frames.pick(&[0, 0, 0, 0, 512, 1024, 4, 1]);
        }
        if frames.one_in(2) {
            request.direct = Some(frames.below(3) as u16);
        }
        queue.submit(&request, &data)
    }

    fn end(&mut self, queue: &SimGuest, completion: SimCompletion) {
        let action = self.in_flight.remove(&completion.head);
        let action = action.unwrap_or_else(|| panic!("not sent: {completion:?}"));
        let lost_cache =
            self.endures && action.kind == Kind::Flush && completion.status == status::IOERR;
        self.failed_flushes += u64::from(lost_cache);
        assert!(
            lost_cache || completion.status == status::OK,
            "{action:?}: {completion:?}"
        );
        self.busy[Self::sectors(&action)].fill(false);
        if action.kind == Kind::Read {
            let mut bytes = vec![0; (action.sectors * SECTOR) as usize];
            queue.read_data(completion.head, &mut bytes);
            self.compare(action.sector, &bytes);
        }
        self.oracle.apply(&action);
    }

    fn compare(&mut self, sector: u64, bytes: &[u8]) {
        match self.oracle.compare(sector, bytes) {
            Ok(compared) => self.compared += compared.sectors,
            Err(wrong) => panic!(
                "reads back wrong (part from {}): {wrong}",
                self.first_sector
            ),
        }
    }
}

/// The same load on every socket, each with a seed of its own, all at once; then everything is read back.
fn run_load(text: &str, sockets: &[&str], pages: Pages, endures: bool) {
    const DEPTH: usize = 24;
    let start = Instant::now();
    let mut clients: Vec<(Load, Client, Vec<Stream>)> = (0..)
        .zip(sockets)
        .map(|(index, socket)| {
            let load = Load::parse(text).with_seed_of(index);
            let (size, max_data) = (64, MAX_DATA + 4096);
            let client =
                Client::connect_with(Path::new(socket), pages, load.queues, size, max_data);
            if pages == Pages::Huge {
                fact("load.bytes", client.shared.region.size);
                fact("load.crossings", client.crossings(size, MAX_DATA));
            }
            let streams = (0..load.queues).map(|queue| Stream::new(&load, queue, endures));
            (load, client, streams.collect())
        })
        .collect();
    let mut last = Instant::now();
    loop {
        let (mut over, mut ended) = (true, 0);
        for (_, client, streams) in &mut clients {
            let queues = client.queues.iter_mut().zip(&client.kicks);
            for ((queue, kick), stream) in queues.zip(streams) {
                stream.submit(queue, kick, DEPTH);
                while let Some(completion) = queue.poll_used() {
                    stream.end(queue, completion);
                    ended += 1;
                }
                over &= stream.is_over();
            }
        }
        if over {
            break;
        }
        if ended > 0 {
            last = Instant::now();
        }
        let patience = if endures { 4 * DEADLINE } else { DEADLINE };
        assert!(
            last.elapsed() < patience,
            "no request has ended for {patience:?}"
        );
    }
    let (mut compared, mut failed_flushes) = (0, 0);
    for (load, client, streams) in &mut clients {
        for (queue, stream) in (0..).zip(streams) {
            let all = client.read_all(load.first_sector(queue), load.sectors(), MAX_DATA as usize);
            stream.compare(0, &all);
            compared += stream.compared;
            failed_flushes += stream.failed_flushes;
        }
        let flush = SimRequest::new(request_type::FLUSH, 0, 0, false);
        assert_eq!(client.request(&flush, &[]).status, status::OK);
        client.check_canaries();
    }
    fact("load.compared", compared);
    if endures {
        fact("load.failed-flushes", failed_flushes);
    }
    fact("load.seconds", start.elapsed().as_secs_f32());
}

// ---- huge pages ----

const FREE_PAGES: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages";

fn free_pages() -> u64 {
    let text = std::fs::read_to_string(FREE_PAGES).unwrap();
    text.trim().parse().unwrap()
}

/// Takes every free huge page, one by one, in the order of their physical addresses.
fn all_free_pages() -> Vec<MmapRaw> {
    let pagemap = File::open("/proc/self/pagemap").unwrap();
    let frame = |map: &MmapRaw| {
        // SAFETY: the first byte of a mapping that nobody else knows. It makes the page be there.
        unsafe { map.as_mut_ptr().write_volatile(1) };
        let mut entry = [0; 8];
        let page = map.as_ptr().addr() as u64 / 4096;
        pagemap.read_exact_at(&mut entry, page * 8).unwrap();
        u64::from_ne_bytes(entry) & ((1 << 55) - 1)
    };
    let pages = (0..free_pages()).map(|_| {
        let file = huge_memfd(HUGE_PAGE);
        let map = MmapOptions::new().len(HUGE_PAGE as usize).map_raw(&file);
        map.unwrap()
    });
    let mut pages: Vec<(u64, MmapRaw)> = pages.map(|map| (frame(&map), map)).collect();
    pages.sort_by_key(|(frame, _)| *frame);
    pages.into_iter().map(|(_, map)| map).collect()
}

/// Every other free page is taken until the result is dropped: what others take meanwhile are no neighbours.
fn scatter() -> Vec<MmapRaw> {
    all_free_pages().into_iter().step_by(2).collect()
}

/// What is taken next are neighbours, as far as there are any: the page that was freed last is the first to be taken.
fn gather() {
    all_free_pages().into_iter().rev().for_each(drop);
}

/// A front-end gives a page of its memory back while the server has it, which the device may still write to: nobody else
/// is to get that page before the server has let it go.
fn hole(socket: &Path) {
    let client = Client::connect_with(socket, Pages::Huge, 1, 64, 4096);
    let free = free_pages();
    let last = client.shared.region.size - HUGE_PAGE;
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&client.shared.file, flags, last, HUGE_PAGE).unwrap();
    std::thread::sleep(Duration::from_millis(500));
    fact("hole.given-back", free_pages() as i64 - free as i64);
    client.hang_up();
    let start = Instant::now();
    while free_pages() <= free {
        assert!(start.elapsed() < DEADLINE, "the server keeps the page");
        std::thread::sleep(Duration::from_millis(10));
    }
    fact("hole.after", free_pages() as i64 - free as i64);
}

// ---- survive ----

/// One 4 KiB block of `survive`, by the generation of what was written to it.
#[derive(Clone, Copy, Default)]
struct Block {
    /// Written with a FLUSH after it: what must be there at least.
    durable: u64,
    completed: u64,
    /// The newest that may be there.
    submitted: u64,
}

const BLOCK: usize = 4096;

/// Each sector of a block tells the block, the sector and the generation, and what else is in it follows from those.
fn stamp(block: u64, generation: u64) -> Vec<u8> {
    let mut bytes = vec![0; BLOCK];
    for (index, sector) in (0_u64..).zip(bytes.chunks_mut(SECTOR as usize)) {
        Rng::new(block << 40 ^ index << 32 ^ generation).fill(&mut sector[8..]);
        sector[..8].copy_from_slice(&generation.to_le_bytes());
    }
    bytes
}

/// Two queues keep writing and flushing until the server is killed; then a server at the same socket must have what was
/// acknowledged before an acknowledged flush.
fn survive(seconds: u64, socket: &Path) {
    const QUEUES: usize = 2;
    const DEPTH: usize = 16;
    const BLOCKS: usize = 512; // of each queue

    enum Request {
        Write {
            block: usize,
            generation: u64,
        },
        /// With what had been acknowledged when it was sent.
        Flush(Vec<u64>),
    }
    let mut client = Client::connect(socket, QUEUES as u32, 64, BLOCK as u32);
    let mut blocks = [[Block::default(); BLOCKS]; QUEUES];
    let mut in_flight: [HashMap<u16, Request>; QUEUES] = Default::default();
    let mut rng = Rng::new(1);
    let (mut generation, mut flushes) = (0, 0_u64);
    let start = Instant::now();
    while !client.is_gone() {
        let limit = Duration::from_secs(seconds);
        assert!(start.elapsed() < limit, "the server is still there");
        for queue in 0..QUEUES {
            let (driver, in_flight) = (&mut client.queues[queue], &mut in_flight[queue]);
            let blocks = &mut blocks[queue];
            while in_flight.len() < DEPTH {
                let block = rng.below(BLOCKS as u64) as usize;
                let (request, data, what) = if rng.one_in(32) {
                    let acknowledged = blocks.iter().map(|block| block.completed).collect();
                    let request = SimRequest::new(request_type::FLUSH, 0, 0, false);
                    (request, Vec::new(), Request::Flush(acknowledged))
                } else if blocks[block].submitted == blocks[block].completed {
                    generation += 1;
                    let at = (queue * BLOCKS + block) as u64;
                    let sector = at * BLOCK as u64 / SECTOR;
                    let request = SimRequest::new(request_type::OUT, sector, BLOCK as u32, false);
                    let what = Request::Write { block, generation };
                    (request, stamp(at, generation), what)
                } else {
                    continue; // one write of a block at a time: which of two is newer is not settled
                };
                let head = driver.submit(&request, &data).expect("a ring with room");
                if let Request::Write { block, generation } = what {
                    blocks[block].submitted = generation;
                }
                in_flight.insert(head, what);
            }
            publish(driver, &client.kicks[queue]);
            while let Some(completion) = driver.poll_used() {
                assert_eq!(completion.status, status::OK);
                match in_flight.remove(&completion.head).expect("not sent") {
                    Request::Write { block, generation } => blocks[block].completed = generation,
                    Request::Flush(acknowledged) => {
                        flushes += 1;
                        if flushes == 32 {
                            fact("survive.warm", "yes"); // time to kill the server
                        }
                        for (block, acknowledged) in blocks.iter_mut().zip(acknowledged) {
                            block.durable = block.durable.max(acknowledged);
                        }
                    }
                }
            }
        }
    }
    let lost: usize = in_flight.iter().map(HashMap::len).sum();
    client.check_canaries();
    fact("survive.writes", generation);
    fact("survive.flushes", flushes);
    fact("survive.in-flight", lost);

    let mut client = Client::connect(socket, 1, 64, BLOCK as u32);
    let mut durable = 0;
    for (at, block) in (0_u64..).zip(blocks.iter().flatten()) {
        if block.submitted == 0 {
            continue; // never written by us
        }
        let mut bytes = vec![0; BLOCK];
        client.read(at * BLOCK as u64 / SECTOR, &mut bytes);
        durable += u64::from(block.durable > 0);
        for (index, sector) in bytes.chunks(SECTOR as usize).enumerate() {
            let found = u64::from_le_bytes(sector[..8].try_into().unwrap());
            if block.durable == 0 && found == 0 {
                continue; // what was there before
            }
            assert!(
                (block.durable..=block.submitted).contains(&found),
                "block {at} sector {index} has generation {found}: {} was flushed, {} was sent last",
                block.durable,
                block.submitted
            );
            let want = &stamp(at, found)[index * SECTOR as usize..][..SECTOR as usize];
            assert_eq!(sector, want, "block {at} sector {index} is torn");
        }
    }
    fact("survive.durable", durable);
}

// ---- vanish ----

/// Each round a client asks for 128 reads and is gone; the next one, at the same guest addresses, shares other memory.
/// What that one has not asked for must stay as it is, and so must the memory of the first: from the moment on that the
/// server has let it go, nothing may arrive there any more.
fn vanish(rounds: u64, socket: &Path) {
    const READS: u64 = 128;
    const DATA: u32 = 32 << 10;
    let pattern = |round: u64| {
        let mut bytes = vec![0; DATA as usize];
        Rng::new(round).fill(&mut bytes);
        bytes
    };
    let (mut in_flight, mut lost) = (0, 0);
    for round in 0..rounds {
        let mut client = Client::connect(socket, 1, 512, DATA);
        // Everything that the next client's memory must not show.
        client.write(0, &pattern(round));
        let queue = &mut client.queues[0];
        let request = SimRequest::new(request_type::IN, 0, DATA, true);
        let heads: Vec<u16> = (0..READS)
            .map(|_| queue.submit(&request, &[]).expect("a ring with room"))
            .collect();
        queue.publish();
        // In the middle of them, from one round to the next.
        let some = round * 16 % READS;
        let start = Instant::now();
        let mut ended = 0;
        while ended < some {
            ended += u64::from(queue.poll_used().is_some());
            assert!(start.elapsed() < DEADLINE, "{ended} of {some} have ended");
        }
        client.hang_up();
        in_flight += READS - ended;

        // The same addresses, other memory: nothing but these few requests may change it.
        let mut next = Client::connect(socket, 1, 512, DATA);
        let left: Vec<Vec<u8>> = heads
            .iter()
            .map(|head| client.data_of(*head, DATA))
            .collect();
        let untouched: Vec<u16> = (8..512).collect();
        for head in &untouched {
            next.queues[0].write(next.queues[0].data_at(*head), &[0x5a; DATA as usize]);
        }
        for request in 0..8 {
            let mut bytes = vec![0; DATA as usize];
            next.read(0, &mut bytes);
            assert!(
                bytes == pattern(round),
                "round {round} read {request}: other data"
            );
        }
        for head in &untouched {
            let bytes = next.data_of(*head, DATA);
            let stray = bytes.iter().position(|byte| *byte != 0x5a);
            assert_eq!(
                stray, None,
                "round {round}: a stray byte in the buffer of head {head}"
            );
        }
        next.check_canaries();
        // Kept until here: what the first client shared is not what the second one did.
        for (head, left) in heads.iter().zip(&left) {
            let late = client.data_of(*head, DATA) != *left;
            assert!(
                !late,
                "round {round}: data for head {head} arrived after its client was let go"
            );
        }
        while client.queues[0].poll_used().is_some() {
            ended += 1;
        }
        lost += READS - ended;
        client.check_canaries();
    }
    fact("vanish.in-flight", in_flight);
    fact("vanish.unanswered", lost);
}

// ---- fault ----

/// How the test sees that it would see an access outside of what is mapped.
fn fault(address: &str) {
    let transport = VfioTransport::claim(address.parse().unwrap()).unwrap();
    let controller = Controller::new(transport).unwrap();
    let mut controller = controller.enable(1).map_err(|(_, error)| error).unwrap();
    let nsid = controller.active_namespaces().unwrap()[0];
    let mut queue = controller.create_queue_pair(16).unwrap();
    let mapped = DmaBuffer::new(controller.dma_space(), 4096, DmaAccess::Both).unwrap();
    let dropped = DmaBuffer::new(controller.dma_space(), 4096, DmaAccess::Both).unwrap();
    let (mapped_at, dropped_at) = (mapped.iova(0), dropped.iova(0));
    drop(dropped);
    for (name, iova) in [
        ("mapped", mapped_at),
        ("unmapped", dropped_at),
        ("never-mapped", Iova(0x12_3456_7000)),
    ] {
        let block = LbaRange { slba: 0, blocks: 1 };
        let data = DataSegment { iova, len: 512 };
        queue
            .submit(
                SubmissionEntry::read(nsid, block),
                std::iter::once(data),
                512,
            )
            .unwrap();
        queue.ring();
        let start = Instant::now();
        let end = loop {
            if let Some(completion) = queue.poll() {
                break completion.status.to_string();
            }
            if start.elapsed() > Duration::from_secs(5) {
                break "nothing".to_owned();
            }
        };
        fact(&format!("fault.{name}"), format!("{:#x}, {end}", iova.0));
        // The IOMMU keeps one fault of a device until the kernel has seen it.
        std::thread::sleep(Duration::from_millis(300));
    }
    controller.delete_queue_pair(queue).unwrap();
    drop(mapped);
    controller.shutdown().map_err(|(_, error)| error).unwrap();
}
