//! A server's data path without its threads: one device, its pollers, and simulated guests on lanes.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use nvme_driver::spec::Nsid;
use nvme_model::{Model, ModelConfig, ModelHandle};
use tandem::block::Geometry;
use tandem::control::device::{Device, DeviceError, Interrupts};
use tandem::datapath::{Lane, LaneConfig, LaneId, Poll, Signal};
use tandem::sim::{SimGuest, SimGuestConfig};
use tandem::vhost::memory::{MemoryTable, RegionInfo};
use tandem::virtio::blk::{BlkLimits, RangeLimits};
use tandem::virtio::memory::Gpa;
use tandem::virtio::virtqueue::{RingLayout, Virtqueue, VirtqueueConfig};

pub const SERIAL: &[u8; 20] = b"rig-serial\0\0\0\0\0\0\0\0\0\0";

/// How a guest is set up.
pub struct GuestSetup {
    pub layout: RingLayout,
    pub queue_size: u16,
    pub event_idx: bool,
    pub indirect: bool,
    pub max_data: u32,
    pub first_index: u16,
    /// Regions that its memory is divided into: adjacent for the guest, apart for us and for the device.
    pub regions: u64,
    pub write_through: bool,
    /// Where the lane tells the guest of what is done.
    pub call: Arc<Signal>,
}

impl Default for GuestSetup {
    fn default() -> GuestSetup {
        GuestSetup {
            layout: RingLayout::Split,
            queue_size: 256,
            event_idx: true,
            indirect: true,
            max_data: 128 << 10,
            first_index: 0,
            regions: 1,
            write_through: false,
            call: Arc::new(Signal::new().unwrap()),
        }
    }
}

pub struct RigGuest {
    pub driver: SimGuest,
    pub indirect: bool,
    pub lane: LaneId,
    pub queue_size: u16,
    // Regions are dropped when the last of table, lane and driver is gone.
    _table: MemoryTable,
}

pub struct Rig {
    pub device: Device,
    pub model: ModelHandle,
    pub pollers: Vec<Box<dyn Poll>>,
    lanes: Vec<(usize, LaneId)>,
}

impl Rig {
    /// Opens the device and makes a poller of every queue pair that it grants.
    pub fn new(config: ModelConfig) -> Rig {
        let wanted = config.queues;
        let interrupts = match config.interrupts {
            true => Interrupts::OnRequest,
            false => Interrupts::Off,
        };
        let transport = Model::new(config).unwrap();
        let model = transport.handle();
        let slot = model.clone();
        let claim = move || {
            slot.plug_in().map_err(|error| DeviceError::Model {
                name: "rig".to_owned(),
                error,
            })
        };
        let device =
            Device::open_with("rig", transport, wanted, interrupts, Box::new(claim)).unwrap();
        Rig::of(device, model)
    }

    /// The same for a device that is open.
    pub fn of(device: Device, model: ModelHandle) -> Rig {
        let pollers = (0..device.granted)
            .map(|_| device.create_poller().unwrap().1)
            .collect();
        Rig {
            device,
            model,
            pollers,
            lanes: Vec::new(),
        }
    }

    /// A guest whose lane rides on the next poller in turn.
    pub fn add_guest(&mut self, setup: &GuestSetup) -> RigGuest {
        let (guest, lane) = self.make_guest(setup);
        self.attach(guest.lane, lane);
        guest
    }

    /// Puts a lane on the next poller in turn.
    pub fn attach(&mut self, id: LaneId, lane: Lane) {
        let at = self.lanes.len() % self.pollers.len();
        self.lanes.push((at, id));
        self.pollers[at].attach(lane);
    }

    /// A guest and its lane, for the caller to attach.
    pub fn make_guest(&self, setup: &GuestSetup) -> (RigGuest, Lane) {
        let base = Gpa(0x10_0000);
        let config = SimGuestConfig {
            layout: setup.layout,
            size: setup.queue_size,
            event_idx: setup.event_idx,
            indirect: setup.indirect,
            max_data: setup.max_data,
            first_index: setup.first_index,
            base,
        };
        let mut table = MemoryTable::new([Arc::clone(&self.device.space)]);
        // The rings lie in the first region; the buffers are cut wherever the others begin.
        let rings = config.ring_bytes();
        let buffers = (config.bytes() - rings).next_multiple_of(4096);
        let part = (buffers / setup.regions).next_multiple_of(4096);
        let mut start = 0;
        for i in 0..setup.regions {
            let len = if i == 0 { rings + part } else { part };
            let file = File::from(
                rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap(),
            );
            file.set_len(len).unwrap();
            let info = RegionInfo {
                gpa: base.0 + start,
                size: len,
                user_addr: 0x7000_0000_0000 + start,
                mmap_offset: 0,
            };
            table.add(info, file).unwrap();
            start += len;
        }
        let memory = table.snapshot(0).unwrap();
        let driver = SimGuest::new(memory, config).unwrap();
        let config = driver.virtqueue_config();
        let signals = (None, Arc::clone(&setup.call));
        let lane = self.make_lane(&driver, config, signals, setup.write_through);
        let guest = RigGuest {
            driver,
            indirect: setup.indirect,
            lane: lane.id(),
            queue_size: setup.queue_size,
            _table: table,
        };
        (guest, lane)
    }

    /// A lane for the queue of `driver`, from where `queue` says.
    pub fn make_lane(
        &self,
        driver: &SimGuest,
        queue: VirtqueueConfig,
        (kick, call): (Option<OwnedFd>, Arc<Signal>),
        write_through: bool,
    ) -> Lane {
        let id = LaneId(0x1000 + queue.used.addr().get() as u64);
        let namespace = self.device.namespace(Nsid(1)).unwrap();
        let geometry = Geometry::new(
            namespace.block_size.trailing_zeros(),
            namespace.blocks,
            false,
        )
        .unwrap();
        let ranges = RangeLimits {
            max_sectors: 0x7f_ff80,
            max_segments: 256,
        };
        Lane::new(LaneConfig {
            id,
            // SAFETY: the lane holds the memory, and is the only one that serves this queue.
            queue: unsafe { Virtqueue::new(queue) }.unwrap(),
            memory: Arc::clone(driver.memory()),
            limits: BlkLimits {
                geometry,
                flush: true,
                discard: Some(ranges),
                write_zeroes: Some(ranges),
            },
            nsid: Nsid(1),
            serial: *SERIAL,
            write_through,
            volatile_cache: self.device.has_volatile_cache(),
            deallocate: self.device.can_deallocate(),
            call,
            error: Arc::new(Signal::new().unwrap()),
            kick,
            shared: Arc::default(),
        })
    }

    /// One turn of every poller.
    pub fn turn(&mut self) {
        for poller in &mut self.pollers {
            poller.turn();
        }
    }

    /// What the first namespace's medium holds.
    pub fn medium(&self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.model.media_read(Nsid(1), 0, &mut bytes);
        bytes
    }

    /// Takes every lane back, hands every queue pair back, shuts the device down, and checks that nothing was done
    /// that a controller or an IOMMU would not like.
    pub fn finish(mut self) {
        for (at, lane) in std::mem::take(&mut self.lanes) {
            assert!(self.pollers[at].detach(lane));
        }
        for mut poller in std::mem::take(&mut self.pollers) {
            for _ in 0..1000 {
                poller.turn();
                while poller.take_drained().is_some() {}
            }
            assert_eq!(poller.lanes(), 0, "a lane did not drain");
            self.device.delete_poller(poller).unwrap();
        }
        self.device.shutdown().unwrap();
        assert_eq!(
            self.model.iommu_violations(),
            0,
            "DMA outside the mapped windows"
        );
        assert_eq!(
            self.model.driver_errors(),
            0,
            "the driver broke the specification"
        );
    }
}
