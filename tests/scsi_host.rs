//! virtio-scsi requests through a lane, a queue pair and the software controller: how they are answered, and what a hostile
//! guest may put there, entry by entry. After each test the controller has seen no DMA outside guest memory.
//!
//! Each test is compiled twice: scsi_relay.rs is the same with the guest's ring at another device, so that every request goes
//! on to the lane of the device that has the logical units.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "scsi_host/compare.rs"]
mod compare;
#[path = "scsi_host/copy.rs"]
mod copy;
#[path = "scsi_host/relay.rs"]
mod relay;
#[path = "scsi_host/tasks.rs"]
mod tasks;
#[path = "scsi_host/verify.rs"]
mod verify;

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::dma::DmaSpace;
use nvme_driver::spec::{Nsid, Status, io_opcode};
use nvme_model::{Model, ModelConfig, ModelHandle};
use tandem::block::Geometry;
use tandem::control::device::{Device, DeviceError};
use tandem::datapath::{
    Barrier, Clerk, ControlConfig, Lane, LaneId, MediumId, Poll, ScsiLaneConfig, Service,
    SideConfig, Signal, WayConfig,
};
use tandem::scsi::{Initiator, LogicalUnit, Lun, Nexus, Target};
use tandem::sim::{RawDescriptor, SimGuest, SimGuestConfig};
use tandem::vhost::memory::{MemoryTable, RegionInfo};
use tandem::virtio::memory::{Gpa, GuestMemory};
use tandem::virtio::relay::Relay;
use tandem::virtio::scsi::Sizes;
use tandem::virtio::virtqueue::{RingLayout, Virtqueue};

const NEXT: u16 = 1;
const WRITE: u16 = 2;

const BASE: u64 = 0x10_0000;
const MEMORY: u64 = 16 << 20;
const SIZE: u16 = 64;
/// Where the test's own requests are: a slot for each head.
const SLOTS: u64 = 0x80_0000;
const SLOT_BYTES: u64 = 0x1000;
const DATA: u64 = 0x90_0000;
const DEADLINE: Duration = Duration::from_secs(10);
const HOLE: u64 = BASE + MEMORY;

/// Response codes (virtio 1.2, 5.6.6.1.1).
const OK: u8 = 0;
const OVERRUN: u8 = 1;
const BAD_TARGET: u8 = 3;
const RESET: u8 = 4;
const FAILURE: u8 = 9;
const FUNCTION_REJECTED: u8 = 11;
const INCORRECT_LUN: u8 = 12;

/// Target 0 has namespace 1 at LUN 0; target 2 has namespace 2 at LUN 300.
const FIRST: [u8; 8] = [1, 0, 0x40, 0, 0, 0, 0, 0];
const SECOND: [u8; 8] = [1, 2, 0x41, 0x2c, 0, 0, 0, 0];

/// Address, length and flags of each descriptor of a chain.
type Buffers = Vec<(u64, u32, u16)>;

/// A device with two namespaces, and what its hosts share.
#[derive(Clone)]
struct Storage {
    device: Arc<Device>,
    model: ModelHandle,
    units: [LogicalUnit; 2],
    barrier: Arc<Barrier>,
    /// Where guests' rings are.
    near: Option<Arc<Device>>,
    /// Of the request queues that its hosts will have.
    layout: RingLayout,
}

/// Hosts of a device, at most.
const HOSTS: usize = 4;
/// Guests' rings are at another device.
const FAR: bool = matches!(env!("CARGO_CRATE_NAME").as_bytes(), b"scsi_relay");
/// Lanes of a host that have requests.
const LANES: usize = 1 + FAR as usize;
/// The number of the device that has the logical units, and of the other one.
const DEVICE: u32 = 7;
const NEAR: u32 = 3;

impl Storage {
    fn new(config: ModelConfig) -> Storage {
        let config = ModelConfig {
            namespaces: 2,
            max_namespaces: 2,
            size: 32 << 20,
            queues: HOSTS as u16,
            ..config
        };
        let open = |config| {
            let transport = Model::new(config).unwrap();
            let model = transport.handle();
            let claim = || {
                Err(DeviceError::Lost {
                    name: "host".to_owned(),
                })
            };
            let device = Device::open("host", transport, HOSTS as u16, Box::new(claim));
            (device.unwrap(), model)
        };
        let near = FAR.then(|| {
            let near = ModelConfig {
                size: 1 << 20,
                queues: HOSTS as u16,
                ..ModelConfig::default()
            };
            Arc::new(open(near).0)
        });
        let (device, model) = open(config);
        let units = [1, 2].map(|nsid| {
            let namespace = device.namespace(Nsid(nsid)).unwrap();
            let geometry = Geometry::new(9, namespace.blocks, false).unwrap();
            let medium = MediumId {
                device: DEVICE,
                nsid: Nsid(nsid),
            };
            LogicalUnit::new(geometry, "serial")
                .with_medium(medium.bits())
                .with_lanes(HOSTS * LANES + 8)
                .with_volatile_cache(true)
                .with_provisioning(true, true, true)
                .with_copy(device.copy_blocks(Nsid(nsid)))
        });
        let fronts = (0..HOSTS * LANES).map(|lane| lane / LANES * LANES);
        let barrier = Barrier::new(HOSTS * LANES).unwrap().with_fronts(fronts);
        Storage {
            device: Arc::new(device),
            model,
            units,
            barrier: Arc::new(barrier),
            near,
            layout: RingLayout::Split,
        }
    }
}

/// One region of a guest's, from [`BASE`] on.
fn memory_of(spaces: &[Arc<DmaSpace>], bytes: u64) -> MemoryTable {
    let mut table = MemoryTable::new(spaces.iter().cloned());
    let file =
        File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(bytes).unwrap();
    let info = RegionInfo {
        gpa: BASE,
        size: bytes,
        user_addr: 0x7000_0000_0000,
        mmap_offset: 0,
    };
    table.add(info, file).unwrap();
    table
}

struct Host {
    device: Arc<Device>,
    model: ModelHandle,
    poller: Option<Box<dyn Poll>>,
    /// Where the guest's ring is, if not there: the device, its poller, the lane.
    near: Option<(Arc<Device>, Box<dyn Poll>, LaneId)>,
    /// Identifier of its queue pair.
    pair: u16,
    layout: RingLayout,
    requests: SimGuest,
    control: SimGuest,
    lanes: Vec<LaneId>,
    sizes: (usize, usize),
    next_head: u16,
    _clerk: Clerk,
    _table: MemoryTable,
}

/// What came back.
#[derive(Debug, PartialEq, Eq)]
struct Reply {
    response: u8,
    status: u8,
    /// Key, code, qualifier; nothing without sense data.
    sense: Option<(u8, u8, u8)>,
    residual: u32,
    used_len: u32,
}

fn good(residual: u32, data_in: u32) -> Reply {
    Reply {
        response: OK,
        status: 0,
        sense: None,
        residual,
        used_len: 108 + data_in,
    }
}

fn check(key: u8, asc: u8, ascq: u8, residual: u32) -> Reply {
    Reply {
        response: OK,
        status: 2,
        sense: Some((key, asc, ascq)),
        residual,
        used_len: 108,
    }
}

fn refused(response: u8) -> Reply {
    Reply {
        response,
        ..good(0, 0)
    }
}

impl Host {
    fn new() -> Host {
        Host::with(ModelConfig::default(), Sizes::DEFAULT, (32, 96))
    }

    fn with(config: ModelConfig, sizes: Sizes, bytes: (usize, usize)) -> Host {
        Host::of(&Storage::new(config), 0, sizes, bytes)
    }

    /// The host of that number on a device.
    fn of(storage: &Storage, number: usize, sizes: Sizes, bytes: (usize, usize)) -> Host {
        let Storage {
            device,
            model,
            units,
            barrier,
            near,
            layout,
        } = storage.clone();
        let spaces = [&device].into_iter().chain(&near);
        let spaces: Vec<Arc<DmaSpace>> = spaces.map(|device| Arc::clone(&device.space)).collect();
        let table = memory_of(&spaces, MEMORY);
        let memory = table.snapshot(0).unwrap();
        let ring = |base, layout| SimGuestConfig {
            layout,
            size: SIZE,
            event_idx: true,
            indirect: true,
            max_data: 4096,
            first_index: 0,
            base: Gpa(base),
        };
        let ring = [(BASE, layout), (BASE + 0x10_0000, RingLayout::Split)].map(|(base, layout)| {
            assert!(ring(base, layout).bytes() < 0x10_0000);
            SimGuest::new(Arc::clone(&memory), ring(base, layout)).unwrap()
        });
        let [requests, control] = ring;

        let lun = |number| Lun::new(number).unwrap();
        let [first, second] = units;
        let units = vec![(0, lun(0), first), (2, lun(300), second)];
        let initiator = Initiator::new(&format!("vm{number}")).unwrap();
        let target = Target::new(&initiator, units).unwrap();
        let nexus = Arc::new(Nexus::new(Arc::new(target)));
        let clerk = Clerk::start().unwrap();
        let (pair, mut poller) = device.create_poller().unwrap();
        let signal = || Arc::new(Signal::new().unwrap());
        let lanes = vec![LaneId(1), LaneId(2)];
        let first = number * LANES;
        let (initiator, everyone) = (Arc::clone(&nexus), Arc::clone(&barrier));
        let lane = |id, queue: Virtqueue, memory: Arc<GuestMemory>, number, place| {
            let (device, ways, relay) = place;
            Lane::scsi(ScsiLaneConfig {
                id,
                queue,
                memory,
                sizes,
                nexus: Arc::clone(&initiator),
                device,
                ways,
                relay,
                barrier: Arc::clone(&everyone),
                number,
                desk: clerk.desk(Arc::clone(&everyone), number),
                volatile_cache: true,
                call: signal(),
                error: signal(),
                kick: None,
                shared: Arc::default(),
            })
        };
        // SAFETY: the lane holds the memory, and is the only one that serves this queue.
        let queue = unsafe { requests.virtqueue() }.unwrap();
        let near = near.map(|near| {
            let relay = Relay::new();
            // SAFETY: the lane holds the relay, and is the only one that serves its queue.
            let behind = unsafe { Virtqueue::new(relay.config()) }.unwrap();
            let place = (DEVICE, Vec::new(), Some(Arc::clone(&relay)));
            poller.attach(lane(
                lanes[0],
                behind,
                Arc::clone(&memory),
                first + 1,
                place,
            ));
            let way = WayConfig {
                device: DEVICE,
                relay,
                number: first + 1,
            };
            let (memory, place) = (table.snapshot(1).unwrap(), (NEAR, vec![way], None));
            let (_, poller) = near.create_poller().unwrap();
            (near, memory, place, poller)
        });
        let near = match near {
            None => {
                let place = (DEVICE, Vec::new(), None);
                poller.attach(lane(lanes[0], queue, Arc::clone(&memory), first, place));
                None
            }
            Some((near, memory, place, mut poller)) => {
                poller.attach(lane(LaneId(3), queue, memory, first, place));
                Some((near, poller, LaneId(3)))
            }
        };
        poller.attach(Lane::control(ControlConfig {
            side: SideConfig {
                id: lanes[1],
                // SAFETY: as above.
                queue: unsafe { control.virtqueue() }.unwrap(),
                memory,
                call: signal(),
                error: signal(),
                kick: None,
                shared: Arc::default(),
            },
            nexus,
            barrier,
            lanes: first..first + LANES,
        }));
        let mut host = Host {
            device,
            model,
            poller: Some(poller),
            near,
            pair,
            layout,
            requests,
            control,
            lanes,
            sizes: bytes,
            next_head: 0,
            _clerk: clerk,
            _table: table,
        };
        for lun in [FIRST, SECOND] {
            let told = host.command(lun, &[0; 6], &[], 0);
            assert_eq!((told.status, told.sense), (2, Some((6, 0x29, 0))));
        }
        host
    }

    fn slot(head: u16) -> u64 {
        SLOTS + u64::from(head) * SLOT_BYTES
    }

    /// Offers a chain of the request queue, one descriptor behind the other from a head on.
    fn offer(&mut self, chain: &[(u64, u32, u16)]) -> u16 {
        let head = self.next_head;
        // Chains that are in flight together must not overlap: eight descriptors are enough for each.
        self.next_head = (head + 8) % SIZE;
        assert!(chain.len() <= 8);
        match self.layout {
            RingLayout::Split => {
                write_chain(&self.requests, head, chain);
                self.requests.offer(head);
            }
            RingLayout::Packed => self.requests.offer_chain(head, &descriptors(head, chain)),
        }
        self.requests.publish();
        head
    }

    /// The header, with a CDB, in a head's slot.
    fn header(&self, head: u16, lun: [u8; 8], cdb: &[u8]) {
        let mut header = vec![0; 19 + self.sizes.0];
        header[..8].copy_from_slice(&lun);
        header[19..19 + cdb.len()].copy_from_slice(cdb);
        self.requests.write(Gpa(Self::slot(head)), &header);
        self.requests
            .write(Gpa(Self::slot(head) + 0x400), &[0xee; 300]);
    }

    fn header_bytes(&self) -> u32 {
        19 + self.sizes.0 as u32
    }

    fn response_bytes(&self) -> u32 {
        12 + self.sizes.1 as u32
    }

    /// Offers a command with its data, as drivers do.
    fn send(&mut self, lun: [u8; 8], cdb: &[u8], out: &[u8], data_in: u32) -> u16 {
        let head = self.next_head;
        self.header(head, lun, cdb);
        let slot = Self::slot(head);
        let data = DATA + u64::from(head) * 0x2_0000;
        let mut chain = vec![(slot, self.header_bytes(), 0)];
        if !out.is_empty() {
            self.requests.write(Gpa(data), out);
            chain.push((data, out.len() as u32, 0));
        }
        chain.push((slot + 0x400, self.response_bytes(), WRITE));
        if data_in > 0 {
            chain.push((data, data_in, WRITE));
        }
        self.offer(&chain)
    }

    fn turn(&mut self) {
        if let Some((_, near, _)) = &mut self.near {
            near.turn();
        }
        self.poller.as_mut().unwrap().turn();
        if let Some((_, near, _)) = &mut self.near {
            near.turn();
        }
    }

    /// All lanes leave, drained: the pollers, each for its device if that is there.
    #[track_caller]
    fn recall(&mut self) -> Vec<(Arc<Device>, Box<dyn Poll>)> {
        let mut poller = self.poller.take().unwrap();
        if let Some((_, near, lane)) = &mut self.near {
            assert!(near.detach(*lane));
        }
        for lane in &self.lanes {
            assert!(poller.detach(*lane));
        }
        for _ in 0..5000 {
            poller.turn();
            while poller.take_drained().is_some() {}
            if let Some((_, near, _)) = &mut self.near {
                near.turn();
                while near.take_drained().is_some() {}
            }
        }
        assert_eq!(poller.lanes(), 0, "a lane did not drain");
        let mut pollers = vec![(Arc::clone(&self.device), poller)];
        if let Some((device, near, _)) = self.near.take() {
            assert_eq!(near.lanes(), 0, "the lane of the ring did not drain");
            pollers.push((device, near));
        }
        pollers
    }

    /// The next request that comes back: its head and used length.
    #[track_caller]
    fn comes_back(&mut self) -> (u16, u32) {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some((head, len)) = self.requests.take_used() {
                return (head as u16, len);
            }
            self.turn();
            // Hosts on other threads have to come round, too.
            std::thread::yield_now();
        }
        panic!("nothing came back");
    }

    fn reply(&self, head: u16, used_len: u32) -> Reply {
        let mut bytes = [0; 30];
        self.requests
            .read(Gpa(Self::slot(head) + 0x400), &mut bytes);
        let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        Reply {
            response: bytes[11],
            status: bytes[10],
            sense: (word(0) > 0).then(|| (bytes[14], bytes[24], bytes[25])),
            residual: word(4),
            used_len,
        }
    }

    /// The information field of fixed sense data, if it is valid.
    fn information(&self, head: u16) -> Option<u32> {
        let mut bytes = [0; 19];
        self.requests
            .read(Gpa(Self::slot(head) + 0x400), &mut bytes);
        let valid = bytes[..4] != [0; 4] && bytes[12] & 0x80 != 0;
        valid.then(|| u32::from_be_bytes([bytes[15], bytes[16], bytes[17], bytes[18]]))
    }

    #[track_caller]
    fn command(&mut self, lun: [u8; 8], cdb: &[u8], out: &[u8], data_in: u32) -> Reply {
        let sent = self.send(lun, cdb, out, data_in);
        let (head, used_len) = self.comes_back();
        assert_eq!(head, sent);
        self.reply(head, used_len)
    }

    /// What the last command that came back for a head read.
    fn data(&self, head: u16, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.requests
            .read(Gpa(DATA + u64::from(head) * 0x2_0000), &mut bytes);
        bytes
    }

    fn last_head(&self) -> u16 {
        (self.next_head + SIZE - 8) % SIZE
    }

    fn medium(&self, nsid: u32, lba: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.model.media_read(Nsid(nsid), lba * 512, &mut bytes);
        bytes
    }

    /// Offers a control request: its bytes, and how many its answer has.
    fn ask(&mut self, request: &[u8], answer: u32) {
        self.control.write(Gpa(DATA), request);
        self.control.write(Gpa(DATA + 0x100), &[0xee; 8]);
        let mut chain = vec![(DATA, request.len() as u32, 0)];
        if answer > 0 {
            chain.push((DATA + 0x100, answer, WRITE));
        }
        write_chain(&self.control, 0, &chain);
        self.control.offer(0);
        self.control.publish();
    }

    #[track_caller]
    fn answered(&mut self) -> (u32, [u8; 5]) {
        let start = Instant::now();
        while start.elapsed() < DEADLINE {
            if let Some((_, len)) = self.control.take_used() {
                let mut bytes = [0; 5];
                self.control.read(Gpa(DATA + 0x100), &mut bytes);
                return (len, bytes);
            }
            self.turn();
        }
        panic!("the control queue does not answer");
    }

    fn task(function: u32, lun: [u8; 8]) -> Vec<u8> {
        let mut request = [0, function].map(u32::to_le_bytes).concat();
        request.extend(lun);
        request.extend(7_u64.to_le_bytes());
        request
    }

    #[track_caller]
    fn manage(&mut self, function: u32, lun: [u8; 8]) -> u8 {
        self.ask(&Self::task(function, lun), 1);
        let (len, bytes) = self.answered();
        assert_eq!(len, 1);
        bytes[0]
    }

    /// Everything drains, and nothing was done that a controller or an IOMMU would not like.
    fn finish(mut self) {
        for (device, poller) in self.recall() {
            device.delete_poller(poller).unwrap();
        }
        // Unless other hosts have it.
        if Arc::strong_count(&self.device) == 1 {
            self.device.shutdown().unwrap();
        }
        assert_eq!(
            (self.model.iommu_violations(), self.model.driver_errors()),
            (0, 0)
        );
    }
}

/// One descriptor behind the other, from an index on.
fn descriptors(first: u16, chain: &[(u64, u32, u16)]) -> Vec<RawDescriptor> {
    let descriptor = |(index, &(gpa, len, flags)): (u16, &(u64, u32, u16))| {
        let last = usize::from(index - first) + 1 == chain.len();
        RawDescriptor {
            gpa,
            len,
            flags: flags | if last { 0 } else { NEXT },
            next: index + 1,
        }
    };
    (first..).zip(chain).map(descriptor).collect()
}

fn write_chain(guest: &SimGuest, head: u16, chain: &[(u64, u32, u16)]) {
    for (index, descriptor) in (head..).zip(descriptors(head, chain)) {
        guest.write_descriptor(index, descriptor);
    }
}

fn read_10(lba: u32, blocks: u8) -> [u8; 10] {
    let [a, b, c, d] = lba.to_be_bytes();
    [0x28, 0, a, b, c, d, 0, 0, blocks, 0]
}

fn write_10(lba: u32, blocks: u8) -> [u8; 10] {
    let mut cdb = read_10(lba, blocks);
    cdb[0] = 0x2a;
    cdb
}

#[test]
fn data_goes_to_the_logical_unit_that_is_addressed_and_comes_back() {
    let mut host = Host::new();
    let bytes: Vec<u8> = (0..4096_u32).map(|at| ((at * 7) >> 3) as u8).collect();
    assert_eq!(
        host.command(SECOND, &write_10(40, 8), &bytes, 0),
        good(0, 0)
    );
    assert_eq!(host.medium(2, 40, 4096), bytes);
    assert_eq!(host.medium(1, 40, 4096), [0; 4096]);
    assert_eq!(
        host.command(SECOND, &read_10(40, 8), &[], 4096),
        good(0, 4096)
    );
    assert_eq!(host.data(host.last_head(), 4096), bytes);
    assert_eq!(
        host.command(SECOND, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0),
        good(0, 0)
    );
    // WRITE SAME of a pattern, UNMAP, WRITE SAME of zeroes.
    let pattern: Vec<u8> = (0..512_u32).map(|at| at as u8).collect();
    let same = [0x41, 0, 0, 0, 0, 100, 0, 1, 0x2c, 0];
    assert_eq!(host.command(FIRST, &same, &pattern, 0), good(0, 0));
    assert_eq!(host.medium(1, 100, 300 * 512), pattern.repeat(300));
    assert_eq!(host.medium(1, 400, 512), [0; 512]);
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(100_u64.to_be_bytes());
    list.extend([0, 0, 0, 8, 0, 0, 0, 0]);
    assert_eq!(
        host.command(FIRST, &[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list, 0),
        good(0, 0)
    );
    assert_eq!(host.medium(1, 100, 4096), [0; 4096]);
    let zeroes = [0x93, 1, 0, 0, 0, 0, 0, 0, 0, 110, 0, 0, 0, 5, 0, 0];
    assert_eq!(host.command(FIRST, &zeroes, &[], 0), good(0, 0));
    assert_eq!(
        host.medium(1, 108, 4608),
        [&pattern.repeat(2)[..], &[0; 2560], &pattern.repeat(2)].concat()
    );
    host.finish();
}

#[test]
fn transfer_beyond_one_command_or_at_an_odd_address_is_split_or_bounced() {
    let config = ModelConfig {
        mdts_bytes: Some(8 << 10),
        ..ModelConfig::default()
    };
    let mut host = Host::with(config, Sizes::DEFAULT, (32, 96));
    let bytes: Vec<u8> = (0..100 * 512_u32).map(|at| (at / 300) as u8).collect();
    assert_eq!(
        host.command(FIRST, &write_10(3, 100), &bytes, 0),
        good(0, 0)
    );
    assert_eq!(
        host.command(FIRST, &read_10(3, 100), &[], 51200),
        good(0, 51200)
    );
    assert_eq!(host.data(host.last_head(), 51200), bytes);
    let head = host.next_head;
    host.header(head, FIRST, &read_10(3, 4));
    let slot = Host::slot(head);
    host.offer(&[
        (slot, 51, 0),
        (slot + 0x400, 108, WRITE),
        (DATA + 1, 700, WRITE),
        (DATA + 0x1003, 1348, WRITE),
    ]);
    let (head, used_len) = host.comes_back();
    assert_eq!(host.reply(head, used_len), good(0, 2048));
    let mut read = vec![0; 2048];
    host.requests.read(Gpa(DATA + 1), &mut read[..700]);
    host.requests.read(Gpa(DATA + 0x1003), &mut read[700..]);
    assert_eq!(read, bytes[..2048]);
    host.finish();
}

#[test]
fn unknown_cdb_is_20_00_and_the_next_command_works() {
    let mut host = Host::new();
    assert_eq!(
        host.command(FIRST, &[0xff; 32], &[], 64),
        check(5, 0x20, 0, 64)
    );
    assert_eq!(host.command(FIRST, &read_10(0, 1), &[], 512), good(0, 512));
    host.finish();
}

#[test]
fn addresses_that_lead_nowhere_are_bad_targets_or_absent_units() {
    let mut host = Host::new();
    for lun in [
        [0, 0, 0, 0, 0, 0, 0, 0],
        [2, 0, 0x40, 0, 0, 0, 0, 0],
        [1, 1, 0x40, 0, 0, 0, 0, 0],
        [1, 255, 0x40, 0, 0, 0, 0, 0],
        [0xc1, 0x02, 0, 0, 0, 0, 0, 0],
        [0xff; 8],
    ] {
        assert_eq!(
            host.command(lun, &[0; 6], &[], 0),
            refused(BAD_TARGET),
            "{lun:02x?}"
        );
    }
    // LUN 0 is there in its other forms as well; target 2 has none.
    assert_eq!(
        host.command([1, 0, 0, 0, 0, 0, 0, 0], &[0; 6], &[], 0),
        good(0, 0)
    );
    assert_eq!(
        host.command([1, 2, 0, 0, 0, 0, 0, 0], &[0; 6], &[], 0),
        check(5, 0x25, 0, 0)
    );
    assert_eq!(
        host.command([1, 2, 0, 0, 0, 0, 0, 0], &[0x12, 0, 0, 0, 36, 0], &[], 36),
        good(0, 36)
    );
    assert_eq!(host.data(host.last_head(), 1), [0x7f]);
    let report = [0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0];
    assert_eq!(
        host.command([0xc1, 1, 0, 0, 0, 0, 0, 0], &report, &[], 64),
        good(40, 24)
    );
    assert_eq!(
        host.data(host.last_head(), 24)[8..],
        [FIRST, SECOND].concat()
    );
    host.finish();
}

#[test]
fn buffers_that_are_too_short_overrun_and_longer_ones_leave_a_residual() {
    let mut host = Host::new();
    assert_eq!(
        host.command(FIRST, &read_10(0, 2), &[], 1023),
        refused(OVERRUN)
    );
    assert_eq!(
        host.command(FIRST, &read_10(0, 2), &[], 0),
        refused(OVERRUN)
    );
    assert_eq!(
        host.command(FIRST, &read_10(0, 2), &[0; 1024], 0),
        refused(OVERRUN)
    );
    assert_eq!(
        host.command(FIRST, &read_10(0, 2), &[], 4096),
        good(3072, 1024)
    );
    assert_eq!(
        host.command(FIRST, &write_10(0, 2), &[7; 1023], 0),
        refused(OVERRUN)
    );
    assert_eq!(
        host.command(FIRST, &write_10(0, 2), &[7; 1500], 0),
        good(476, 0)
    );
    assert_eq!(
        host.medium(1, 0, 1536),
        [&[7; 1024][..], &[0; 512]].concat()
    );
    // What an allocation length says is data that need not come.
    let inquiry = |len| [0x12, 0, 0, 0, len, 0];
    assert_eq!(
        host.command(FIRST, &inquiry(255), &[], 255),
        good(255 - 96, 96)
    );
    assert_eq!(host.command(FIRST, &inquiry(255), &[], 96), good(0, 96));
    assert_eq!(
        host.command(FIRST, &inquiry(255), &[], 36),
        refused(OVERRUN)
    );
    assert_eq!(host.command(FIRST, &inquiry(36), &[], 36), good(0, 36));
    assert_eq!(host.command(FIRST, &[0; 6], &[], 512), good(512, 0));
    // Parameter lists.
    assert_eq!(
        host.command(
            FIRST,
            &[0x42, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0],
            &[0; 100],
            0
        ),
        refused(OVERRUN)
    );
    assert_eq!(
        host.command(FIRST, &[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], &[1; 511], 0),
        refused(OVERRUN)
    );
    assert_eq!(
        host.command(FIRST, &[0x42, 0, 0, 0, 0, 0, 0, 0, 8, 0], &[0; 100], 0),
        good(92, 0)
    );
    host.finish();
}

#[test]
fn data_both_ways_is_refused_and_nothing_is_written() {
    let mut host = Host::new();
    assert_eq!(
        host.command(FIRST, &write_10(0, 1), &[7; 512], 512),
        refused(FAILURE)
    );
    assert_eq!(host.medium(1, 0, 512), [0; 512]);
    host.finish();
}

#[test]
fn any_framing_of_header_and_response_works() {
    let mut host = Host::new();
    let head = host.next_head;
    host.header(head, FIRST, &read_10(0, 1));
    let slot = Host::slot(head);
    // The header in three pieces; the response in two, the second joined with the data.
    host.offer(&[
        (slot, 1, 0),
        (slot + 1, 20, 0),
        (slot + 21, 30, 0),
        (slot + 0x400, 5, WRITE),
        (slot + 0x405, 103 + 512, WRITE),
    ]);
    let (head, used_len) = host.comes_back();
    assert_eq!(host.reply(head, used_len), good(0, 512));
    // The header joined with the data of a write.
    let head = host.next_head;
    host.header(head, FIRST, &write_10(9, 1));
    let slot = Host::slot(head);
    host.requests.write(Gpa(slot + 51), &[9; 512]);
    host.offer(&[(slot, 51 + 512, 0), (slot + 0x400, 108, WRITE)]);
    let (head, used_len) = host.comes_back();
    assert_eq!(host.reply(head, used_len), good(0, 0));
    assert_eq!(host.medium(1, 9, 512), [9; 512]);
    host.finish();
}

#[test]
fn chains_that_are_no_request_come_back_and_harm_nothing() {
    let mut host = Host::new();
    let slot = |host: &Host| Host::slot(host.next_head);
    let cases: [fn(u64) -> Buffers; 6] = [
        |slot| vec![(slot, 51, 0)],
        |slot| vec![(slot, 51, 0), (slot + 0x400, 107, WRITE)],
        |slot| vec![(slot + 0x400, 108, WRITE), (slot, 51, 0)],
        |slot| vec![(slot, 51, 0), (HOLE, 108, WRITE)],
        |slot| {
            vec![
                (slot, 51, 0),
                (slot + 0x400, 108, WRITE),
                (HOLE - 256, 512, WRITE),
            ]
        },
        |slot| vec![(u64::MAX - 7, 51, 0), (slot + 0x400, 108, WRITE)],
    ];
    for chain in cases {
        let (head, at) = (host.next_head, slot(&host));
        host.header(head, FIRST, &read_10(0, 1));
        host.offer(&chain(at));
        assert_eq!(host.comes_back(), (head, 0));
        let mut response = [0; 108];
        host.requests.read(Gpa(at + 0x400), &mut response);
        assert_eq!(response, [0xee; 108]);
    }
    // A short header has a place for the answer.
    let (head, at) = (host.next_head, slot(&host));
    host.header(head, FIRST, &read_10(0, 1));
    host.offer(&[(at, 50, 0), (at + 0x400, 108, WRITE)]);
    let (head, used_len) = host.comes_back();
    assert_eq!(host.reply(head, used_len), refused(FAILURE));
    assert_eq!(host.command(FIRST, &read_10(0, 1), &[], 512), good(0, 512));
    host.finish();
}

#[test]
fn sizes_that_a_driver_changes_are_honoured() {
    // No room for all of the sense data: it is cut.
    let sizes = Sizes::new(16, 14).unwrap();
    let mut host = Host::with(ModelConfig::default(), sizes, (16, 14));
    let reply = host.command(FIRST, &[0xff; 16], &[], 0);
    assert_eq!((reply.sense, reply.used_len), (Some((5, 0x20, 0)), 26));
    let read = host.command(FIRST, &read_10(0, 1), &[], 512);
    assert_eq!((read.status, read.used_len), (0, 26 + 512));
    host.finish();
    let sizes = Sizes::new(255, 252).unwrap();
    let mut host = Host::with(ModelConfig::default(), sizes, (255, 252));
    let read = host.command(FIRST, &read_10(0, 1), &[], 512);
    assert_eq!((read.status, read.used_len), (0, 264 + 512));
    host.finish();
    assert!(
        Sizes::new(0, 96).is_none()
            && Sizes::new(257, 96).is_none()
            && Sizes::new(32, 257).is_none()
    );
}

#[test]
fn device_errors_become_sense_data() {
    let mut host = Host::new();
    for (opcode, status, key, asc, ascq) in [
        (io_opcode::WRITE, Status::WRITE_FAULT, 3, 0x0c, 0),
        (
            io_opcode::WRITE,
            Status::NAMESPACE_WRITE_PROTECTED,
            7,
            0x27,
            0,
        ),
    ] {
        assert!(host.model.fail_next(opcode, status.with_dnr()));
        let reply = host.command(FIRST, &write_10(0, 1), &[1; 512], 0);
        assert_eq!(reply, check(key, asc, ascq, 512), "{status}");
    }
    assert!(
        host.model
            .fail_next(io_opcode::FLUSH, Status::RESERVATION_CONFLICT.with_dnr())
    );
    let flush = host.command(FIRST, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0);
    assert_eq!(
        (flush.response, flush.status, flush.sense),
        (OK, 0x18, None)
    );
    host.finish();
}

#[test]
fn reset_ends_when_every_command_before_it_has_ended_and_is_told() {
    let config = ModelConfig {
        latency: Duration::from_millis(20),
        ..ModelConfig::default()
    };
    let mut host = Host::with(config, Sizes::DEFAULT, (32, 96));
    for _ in 0..3 {
        host.send(SECOND, &read_10(0, 1), &[], 512);
    }
    host.turn();
    // Not fetched yet, but sent before.
    host.send(SECOND, &read_10(8, 1), &[], 512);
    host.ask(&Host::task(5, SECOND), 1);
    let (_, bytes) = host.answered();
    assert_eq!(bytes[0], OK);
    for _ in 0..4 {
        let (head, used_len) = host.requests.take_used().expect("ended before the reset");
        assert_eq!(host.reply(head as u16, used_len), good(0, 512));
    }
    assert_eq!(host.command(FIRST, &read_10(0, 1), &[], 512), good(0, 512));
    assert_eq!(
        host.command(SECOND, &read_10(0, 1), &[], 512),
        check(6, 0x29, 3, 512)
    );
    assert_eq!(host.command(SECOND, &read_10(0, 1), &[], 512), good(0, 512));
    // Of a nexus: all units of the target, whatever the LUN.
    assert_eq!(host.manage(4, [1, 2, 0, 0, 0, 0, 0, 0]), OK);
    assert_eq!(host.command(SECOND, &[0; 6], &[], 0), check(6, 0x29, 7, 0));
    assert_eq!(host.command(FIRST, &[0; 6], &[], 0), good(0, 0));
    host.finish();
}

#[test]
fn task_management_of_what_is_not_there_is_answered() {
    let mut host = Host::new();
    // Aborts and queries of a tag that nobody knows.
    for function in [0, 1, 3, 6, 7] {
        assert_eq!(host.manage(function, FIRST), OK, "{function}");
    }
    // CLEAR ACA, and functions that there are not.
    for function in [2, 8, u32::MAX] {
        assert_eq!(
            host.manage(function, FIRST),
            FUNCTION_REJECTED,
            "{function}"
        );
    }
    for function in [0, 5, 6] {
        assert_eq!(
            host.manage(function, [1, 0, 0x40, 9, 0, 0, 0, 0]),
            INCORRECT_LUN
        );
        assert_eq!(
            host.manage(function, [1, 9, 0x40, 0, 0, 0, 0, 0]),
            BAD_TARGET
        );
        assert_eq!(host.manage(function, [9; 8]), BAD_TARGET);
    }
    host.finish();
}

#[test]
fn notifications_are_none_and_malformed_control_requests_come_back_empty() {
    let mut host = Host::new();
    for kind in [1_u32, 2] {
        let request = [&kind.to_le_bytes()[..], &FIRST, &[0xff; 4]].concat();
        host.ask(&request, 5);
        assert_eq!(host.answered(), (5, [0, 0, 0, 0, OK]));
        // Media changes, power management, whatever there is of a target; some of it; none.
        for events in [0x12, 0x4000_0000, 0_u32] {
            let events = events.to_le_bytes();
            let request = [&kind.to_le_bytes()[..], &SECOND, &events].concat();
            host.ask(&request, 5);
            assert_eq!(host.answered(), (5, [0, 0, 0, 0, OK]));
        }
        // No target, an absent logical unit, no address at all.
        for lun in [
            [1, 1, 0x40, 0, 0, 0, 0, 0],
            [1, 0, 0x40, 9, 0, 0, 0, 0],
            [9; 8],
        ] {
            let request = [&kind.to_le_bytes()[..], &lun, &[0xff; 4]].concat();
            host.ask(&request, 5);
            assert_eq!(host.answered(), (5, [0, 0, 0, 0, BAD_TARGET]), "{lun:02x?}");
        }
        // No room for all of the answer.
        host.ask(&request, 4);
        assert_eq!(host.answered(), (0, [0xee; 5]));
    }
    let task = Host::task(5, FIRST);
    for (request, answer) in [
        (&task[..], 0),
        (&task[..23], 1),
        (&task[..3], 1),
        (&[3; 24], 1),
    ] {
        host.ask(request, answer);
        assert_eq!(host.answered(), (0, [0xee; 5]));
    }
    assert_eq!(host.manage(5, FIRST), OK);
    host.finish();
}

#[test]
fn broken_request_ring_does_not_hold_up_task_management() {
    let mut host = Host::new();
    host.requests.jump(-5);
    host.requests.publish();
    assert_eq!(host.manage(5, FIRST), OK);
    host.finish();
}

#[test]
fn commands_without_a_device_fail_and_task_management_still_ends() {
    let mut host = Host::new();
    host.poller.as_mut().unwrap().suspend(Service::Fail);
    assert_eq!(
        host.command(FIRST, &read_10(0, 1), &[], 512),
        check(4, 0x44, 0, 512)
    );
    assert_eq!(host.manage(5, FIRST), OK);
    // The device never comes back: there is nothing to hand it.
    drop(host.recall());
}

#[test]
fn region_that_ends_within_a_page_has_no_byte_behind_its_end() {
    const BYTES: u64 = 0x1770;
    let storage = Storage::new(ModelConfig::default());
    let table = memory_of(&[Arc::clone(&storage.device.space)], BYTES);
    let memory = table.snapshot(0).unwrap();
    let last = Gpa(BASE + BYTES - 16);
    assert!(memory.contiguous(last, 16).is_some());
    assert!(memory.contiguous(last, 17).is_none());
    assert!(memory.contiguous(Gpa(BASE + BYTES), 1).is_none());
}
