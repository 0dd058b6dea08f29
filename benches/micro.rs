//! Times of the parts, one at a time: the rings, a request parsed, data described by PRPs, a poller's turn. For someone
//! who changes one of them and wants to know now; whether it was worth it is counted (`datapath`) and measured against
//! another revision (`scripts/dev bench --ab`), since times on a shared machine say little.
//!
//! `cargo bench --bench micro`, with divan's options behind `--`. What has two parts is of a split ring (0) and of a packed
//! one (1), by the size of the batch. Everything runs on one thread and on data that is in
//! the cache; a guest's own part is in each of the figures.

#[allow(clippy::unwrap_used)] // as in the tests that it belongs to
#[path = "../tests/common/rig.rs"]
mod rig;

use std::sync::Arc;

use divan::Bencher;
use divan::counter::ItemsCount;
use nvme_driver::dma::{DmaAccess, DmaBuffer};
use nvme_driver::spec::{LbaRange, Nsid, SubmissionEntry};
use nvme_driver::{Controller, DataSegment};
use nvme_model::{Medium, Model, ModelConfig};
use rig::{GuestSetup, Rig};
use tandem::block::{Geometry, RangeList};
use tandem::sim::{SimGuest, SimGuestConfig, SimRegion, SimRequest, heap_memory};
use tandem::virtio::blk::{self, BlkLimits, request_type};
use tandem::virtio::chain::Chain;
use tandem::virtio::memory::{Gpa, GuestMemory};
use tandem::virtio::virtqueue::{RingLayout, Virtqueue};

const BATCHES: [u64; 7] = [1, 2, 4, 8, 16, 32, 64];
const LAYOUTS: [RingLayout; 2] = [RingLayout::Split, RingLayout::Packed];
const BYTES: u32 = 4096;
const SECTORS: u64 = 1 << 30;

fn main() {
    divan::main();
}

/// A 4 KiB read, as Linux sends it: one descriptor that names a table.
fn read(sector: &mut u64) -> SimRequest {
    *sector = (*sector + 8 * 7919) % SECTORS;
    let mut request = SimRequest::new(request_type::IN, *sector, BYTES, true);
    request.direct = Some(0);
    request
}

/// A guest's queue without a server: both ends of one ring.
struct Ends {
    guest: SimGuest,
    queue: Virtqueue,
    memory: Arc<GuestMemory>,
    chain: Chain,
    sector: u64,
}

impl Ends {
    fn new(layout: RingLayout) -> Ends {
        let config = SimGuestConfig {
            layout,
            size: 128,
            event_idx: true,
            indirect: true,
            max_data: BYTES,
            first_index: 0,
            base: Gpa(0x10_0000),
        };
        let region = SimRegion {
            gpa: config.base,
            len: config.bytes(),
            dma: 0,
        };
        let memory = heap_memory(&[region]).expect("memory for a queue");
        let memory = Arc::new(memory);
        let mut guest = SimGuest::new(Arc::clone(&memory), config).expect("a queue in it");
        guest.disable_signals();
        // SAFETY: `Ends` holds the memory, and this is the only server of the queue.
        let queue = unsafe { guest.virtqueue() }.expect("a queue as configured");
        Ends {
            guest,
            queue,
            memory,
            chain: Chain::new(128),
            sector: 0,
        }
    }

    /// A batch through the ring and back; `each` sees every chain on the way.
    fn round(&mut self, batch: u64, mut each: impl FnMut(&mut Chain)) {
        for _ in 0..batch {
            let head = self.guest.submit(&read(&mut self.sector), &[]);
            assert!(head.is_some(), "the ring is full");
        }
        self.guest.publish();
        let mut left = batch;
        while left > 0 {
            assert_ne!(self.queue.available(), Ok(0), "requests are missing");
            while left > 0 && self.queue.pop(&self.memory, &mut self.chain) == Ok(true) {
                let head = self.chain.head();
                each(&mut self.chain);
                self.queue.push_used(head, BYTES + 1);
                left -= 1;
            }
        }
        self.queue.publish_used();
        while self.guest.poll_used().is_some() {}
    }
}

/// Requests through a ring and back: submitted, popped, given back, taken.
#[divan::bench(args = BATCHES, consts = [0, 1])]
fn ring<const LAYOUT: usize>(bencher: Bencher<'_, '_>, batch: u64) {
    let mut ends = Ends::new(LAYOUTS[LAYOUT]);
    bencher
        .counter(ItemsCount::new(batch))
        .bench_local(|| ends.round(batch, |_| ()));
}

/// The same, with each request parsed.
#[divan::bench(args = BATCHES, consts = [0, 1])]
fn ring_and_parse<const LAYOUT: usize>(bencher: Bencher<'_, '_>, batch: u64) {
    let mut ends = Ends::new(LAYOUTS[LAYOUT]);
    let mut ranges = RangeList::default();
    let limits = BlkLimits {
        geometry: Geometry::new(9, SECTORS, false).expect("a disk"),
        flush: true,
        discard: None,
        write_zeroes: None,
    };
    bencher.counter(ItemsCount::new(batch)).bench_local(|| {
        ends.round(batch, |chain| {
            let request = blk::parse(chain, &mut ranges, &limits);
            assert!(divan::black_box(request).is_ok());
        });
    });
}

/// One command and its completion on a controller that moves nothing: what grows with the pages is PRPs, built by the
/// driver and read by the controller.
#[divan::bench(args = [1, 2, 3, 8, 32])]
fn command_of_pages(bencher: Bencher<'_, '_>, pages: u32) {
    let config = ModelConfig {
        medium: Medium::Null,
        size: SECTORS * 512,
        ..ModelConfig::default()
    };
    let model = Model::new(config).expect("a controller");
    let enabled = Controller::new(model).expect("a controller").enable(1);
    let mut controller = enabled.map_err(|(_, error)| error).expect("enabled");
    let mut queue = controller.create_queue_pair(64).expect("a queue pair");
    let bytes = pages * BYTES;
    let space = Arc::clone(controller.dma_space());
    let buffer = DmaBuffer::new(&space, bytes as usize, DmaAccess::Both).expect("a buffer");
    let data = DataSegment {
        iova: buffer.iova(0),
        len: bytes,
    };
    let range = LbaRange {
        slba: 0,
        blocks: bytes / 512,
    };
    bencher.bench_local(|| {
        let entry = SubmissionEntry::read(Nsid(1), range);
        let submitted = queue.submit(entry, std::iter::once(data), bytes);
        assert!(submitted.is_ok());
        queue.ring();
        queue.service();
        let completion = queue.poll().expect("it is carried out at once");
        assert!(completion.status.is_success());
    });
    controller.delete_queue_pair(queue).expect("deleted");
}

/// A batch from the guest's submission to its completion: two turns of a poller on a controller that moves nothing.
#[divan::bench(args = BATCHES, consts = [0, 1])]
fn turns<const LAYOUT: usize>(bencher: Bencher<'_, '_>, batch: u64) {
    let mut rig = Rig::new(ModelConfig {
        medium: Medium::Null,
        size: SECTORS * 512,
        queues: 1,
        ..ModelConfig::default()
    });
    let setup = GuestSetup {
        layout: LAYOUTS[LAYOUT],
        max_data: BYTES,
        ..GuestSetup::default()
    };
    let mut guest = rig.add_guest(&setup);
    guest.driver.disable_signals();
    assert!(guest.indirect && batch <= guest.queue_size.into());
    let mut sector = 0;
    bencher.counter(ItemsCount::new(batch)).bench_local(|| {
        for _ in 0..batch {
            let head = guest.driver.submit(&read(&mut sector), &[]);
            assert!(head.is_some(), "the ring is full");
        }
        guest.driver.publish();
        let mut left = batch;
        while left > 0 {
            rig.turn();
            while guest.driver.poll_used().is_some() {
                left -= 1;
            }
        }
    });
    rig.finish();
}

/// A turn that finds nothing.
#[divan::bench(consts = [0, 1])]
fn idle_turn<const LAYOUT: usize>(bencher: Bencher<'_, '_>) {
    let mut rig = Rig::new(ModelConfig {
        queues: 1,
        ..ModelConfig::default()
    });
    let setup = GuestSetup {
        layout: LAYOUTS[LAYOUT],
        ..GuestSetup::default()
    };
    let _guest = rig.add_guest(&setup);
    bencher.bench_local(|| rig.pollers[0].turn());
    // Nobody asked for anything.
    assert_eq!(rig.medium(512), [0; 512]);
    rig.finish();
}
