//! A fixed load over the data path in one process, for an instruction counter: `scripts/dev bench` runs it under
//! callgrind. Everything that is counted happens inside [`turn`]; of that, the embedded controller's part happens inside
//! its `Slot::service`.
//!
//! `datapath BATCH ROUNDS [packed] [scsi [long] [far]]`: in each round the guest has BATCH new 4 KiB reads in one virtqueue, a split one of
//! a block device if nothing else is said, and there are as many turns as it takes to get them to the device. BATCH 0 counts turns that find
//! nothing to do. `far` is a logical unit of another device than the ring's; both are the same one here.
#![allow(clippy::unwrap_used)] // as in the tests whose rig it shares

#[path = "../tests/common/rig.rs"]
mod rig;

use std::sync::Arc;

use nvme_driver::spec::Nsid;
use nvme_model::ModelConfig;
use rig::{GuestSetup, Rig, RigGuest};
use tandem::block::Geometry;
use tandem::datapath::{Barrier, Clerk, Lane, LaneId, Poll, ScsiLaneConfig, Signal, WayConfig};
use tandem::scsi::{Initiator, LogicalUnit, Lun, Nexus, Target};
use tandem::sim::{RawDescriptor, SimRequest};
use tandem::virtio::blk::{request_type, status};
use tandem::virtio::memory::Gpa;
use tandem::virtio::relay::Relay;
use tandem::virtio::scsi::Sizes;
use tandem::virtio::virtqueue::{RingLayout, Virtqueue};

const BYTES: u32 = 4096;
const DISK: u64 = 64 << 20;
/// Turns before anything is counted: buffers touched, tables warm.
const WARM_UP: u64 = 64;

/// Requests that a poller takes in one turn, at most.
const PER_TURN: u64 = 16;

/// What is counted.
#[inline(never)]
fn turn(poller: &mut dyn Poll) -> bool {
    poller.turn()
}

/// A guest that reads, and how it is done.
trait Load {
    /// Makes a read of sectors from `sector` on available.
    fn submit(&mut self, sector: u64);
    /// Shows what was made available.
    fn publish(&mut self);
    /// How many have ended well since the last time; none may end otherwise.
    fn collect(&mut self) -> u64;
}

struct Blk(RigGuest);

impl Load for Blk {
    fn submit(&mut self, sector: u64) {
        // One descriptor each, as Linux sends them: an indirect table of header, data, status.
        let mut request = SimRequest::new(request_type::IN, sector, BYTES, true);
        request.direct = Some(0);
        let head = self.0.driver.submit(&request, &[]);
        assert!(head.is_some(), "the ring is full");
    }

    fn publish(&mut self) {
        self.0.driver.publish();
    }

    fn collect(&mut self) -> u64 {
        let mut count = 0;
        while let Some(completion) = self.0.driver.poll_used() {
            assert_eq!(completion.status, status::OK);
            count += 1;
        }
        count
    }
}

/// READ (10) of a logical unit, one descriptor each: an indirect table of request, response, data, as Linux sends them.
struct Scsi {
    guest: RigGuest,
    packed: bool,
    /// READ (12), which the short way does not know.
    long: bool,
    next: u16,
    _clerk: Clerk,
}

/// Where a request's parts are, from the guest's own place for its data on.
const RESPONSE_AT: u64 = 512;
const TABLE_AT: u64 = 1024;
const DATA_AT: u64 = 4096;
const REQUEST_BYTES: u32 = 19 + 32;
const RESPONSE_BYTES: u32 = 12 + 96;

impl Scsi {
    fn new(rig: &mut Rig, setup: &GuestSetup, (long, far): (bool, bool)) -> Scsi {
        let (mut guest, _) = rig.make_guest(setup);
        guest.driver.disable_signals();
        let driver = &guest.driver;
        let namespace = rig.device.namespace(Nsid(1)).unwrap();
        let shift = namespace.block_size.trailing_zeros();
        let geometry = Geometry::new(shift, namespace.blocks, false).unwrap();
        let unit = LogicalUnit::new(geometry, "bench").with_medium(1);
        let initiator = Initiator::new("bench").unwrap();
        let units = vec![(0, Lun::new(0).unwrap(), unit)];
        let nexus = Arc::new(Nexus::new(Arc::new(
            Target::new(&initiator, units).unwrap(),
        )));
        let (barrier, clerk) = (Arc::new(Barrier::new(2).unwrap()), Clerk::start().unwrap());
        // SAFETY: the lane holds the memory, and is the only one that serves this queue.
        let queue = unsafe { Virtqueue::new(driver.virtqueue_config()) }.unwrap();
        let memory = driver.memory();
        let lane = |id, number, queue, device, ways, relay| {
            Lane::scsi(ScsiLaneConfig {
                id,
                queue,
                memory: Arc::clone(memory),
                sizes: Sizes::DEFAULT,
                desk: clerk.desk(Arc::clone(&barrier), number),
                nexus: Arc::clone(&nexus),
                device,
                ways,
                relay,
                barrier: Arc::clone(&barrier),
                number,
                volatile_cache: true,
                call: Arc::new(Signal::new().unwrap()),
                error: Arc::new(Signal::new().unwrap()),
                kick: None,
                shared: Arc::default(),
            })
        };
        let (own, behind) = (LaneId(1), LaneId(2));
        if far {
            let relay = Relay::new();
            let way = WayConfig {
                device: 0,
                relay: Arc::clone(&relay),
                number: 1,
            };
            rig.attach(own, lane(own, 0, queue, 1, vec![way], None));
            // SAFETY: the lane holds the relay, and is the only one that serves its queue.
            let queue = unsafe { Virtqueue::new(relay.config()) }.unwrap();
            rig.attach(behind, lane(behind, 1, queue, 0, Vec::new(), Some(relay)));
        } else {
            rig.attach(own, lane(own, 0, queue, 0, Vec::new(), None));
        }
        for head in 0..setup.queue_size {
            let gpa = driver.data_at(head).0;
            let part = |at: u64, len: u32, flags: u16, next: u16| RawDescriptor {
                gpa: gpa + at,
                len,
                flags,
                next,
            };
            let table = [
                part(0, REQUEST_BYTES, 1, 1),
                part(RESPONSE_AT, RESPONSE_BYTES, 1 | 2, 2),
                part(DATA_AT, BYTES, 2, 0),
            ];
            driver.write_raw_table(Gpa(gpa + TABLE_AT), &table);
        }
        Scsi {
            guest,
            packed: setup.layout == RingLayout::Packed,
            long,
            next: 0,
            _clerk: clerk,
        }
    }
}

impl Load for Scsi {
    fn submit(&mut self, sector: u64) {
        let driver = &mut self.guest.driver;
        let head = self.next;
        self.next = (self.next + 1) % self.guest.queue_size;
        let gpa = driver.data_at(head).0;
        let mut request = [0; REQUEST_BYTES as usize];
        request[0] = 1;
        // READ (10) or (12).
        request[19] = if self.long { 0xa8 } else { 0x28 };
        request[21..25].copy_from_slice(&u32::try_from(sector).unwrap().to_be_bytes());
        let blocks = u16::try_from(BYTES / 512).unwrap();
        let at = if self.long { 27 } else { 26 };
        request[at..at + 2].copy_from_slice(&blocks.to_be_bytes());
        driver.write(Gpa(gpa), &request);
        let table = RawDescriptor {
            gpa: gpa + TABLE_AT,
            len: 3 * 16,
            flags: 4,
            next: 0,
        };
        match self.packed {
            true => driver.offer_chain(head, &[table]),
            false => {
                driver.write_descriptor(head, table);
                driver.offer(head);
            }
        }
    }

    fn publish(&mut self) {
        self.guest.driver.publish();
    }

    fn collect(&mut self) -> u64 {
        let driver = &mut self.guest.driver;
        let mut count = 0;
        while let Some((head, len)) = driver.take_used() {
            let head = u16::try_from(head).unwrap();
            let mut response = [0; 12];
            driver.read(Gpa(driver.data_at(head).0 + RESPONSE_AT), &mut response);
            // The first one is told that the unit is new.
            assert!(response[10] == 0 && len == RESPONSE_BYTES + BYTES || response[10] == 2);
            assert_eq!(response[11], 0);
            count += 1;
        }
        count
    }
}

fn main() {
    let mut numbers = std::env::args().skip(1).filter_map(|arg| arg.parse().ok());
    let (batch, turns) = (numbers.next().unwrap_or(32), numbers.next().unwrap_or(1000));
    let mut rig = Rig::new(ModelConfig {
        size: DISK,
        queues: 1,
        ..ModelConfig::default()
    });
    let is = |word: &str| std::env::args().any(|arg| arg == word);
    let setup = GuestSetup {
        layout: if is("packed") {
            RingLayout::Packed
        } else {
            RingLayout::Split
        },
        max_data: 2 * BYTES,
        ..GuestSetup::default()
    };
    assert!(batch <= u64::from(setup.queue_size));
    let mut load: Box<dyn Load> = if is("scsi") {
        Box::new(Scsi::new(&mut rig, &setup, (is("long"), is("far"))))
    } else {
        let mut guest = rig.add_guest(&setup);
        assert!(guest.indirect);
        guest.driver.disable_signals();
        Box::new(Blk(guest))
    };
    // To the lane behind, and back.
    let way = if is("far") { 2 } else { 0 };
    let mut sector = 0;
    let mut completed = 0;
    for now in 0..turns + WARM_UP + 1 {
        // The last turn takes nothing new, so that all ends.
        for _ in 0..if now == turns + WARM_UP { 0 } else { batch } {
            load.submit(sector);
            sector = (sector + 8 * 7919) % (DISK / 512);
        }
        load.publish();
        for _ in 0..batch.div_ceil(PER_TURN).max(1) + way {
            if now < WARM_UP {
                rig.turn();
            } else {
                turn(&mut *rig.pollers[0]);
            }
        }
        completed += load.collect();
    }
    assert_eq!(completed, batch * (turns + WARM_UP));
    // Reads only: what the last one returned is what is there.
    assert_eq!(rig.medium(512), [0; 512]);
    rig.finish();
}
