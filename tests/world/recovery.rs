//! What a guest sees of a device that breaks, hangs, is pulled out, is wanted back or comes back as another: a keeper
//! and a reactor as the server has them, the software controller, and a guest that goes on asking.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::common::rig::{GuestSetup, Rig, RigGuest};
use nvme_driver::spec::{Status, io_opcode};
use nvme_model::{Model, ModelConfig, ModelHandle};
use tandem::config::OnDeviceLoss;
use tandem::control::device::{Device, DeviceError};
use tandem::control::recovery::{Keeper, Patience, Place};
use tandem::datapath::{Lane, LaneId};
use tandem::reactor::{Mode, PollerId, Reactor};
use tandem::sim::{SimCompletion, SimRequest};
use tandem::virtio::blk::{request_type, status};

/// How long anything may take that is bound to happen.
const DEADLINE: Duration = Duration::from_secs(10);
const POLLER: PollerId = PollerId(0);

struct Scene {
    keeper: Keeper,
    reactor: Option<Reactor>,
    device: Arc<Device>,
    model: ModelHandle,
    guest: RigGuest,
}

impl Scene {
    fn new(on_loss: OnDeviceLoss) -> Scene {
        let config = ModelConfig {
            size: 4 << 20,
            queues: 1,
            ..ModelConfig::default()
        };
        Scene::of(Rig::new(config), on_loss, Patience::default())
    }

    fn of(mut rig: Rig, on_loss: OnDeviceLoss, patience: Patience) -> Scene {
        let (guest, lane) = rig.make_guest(&GuestSetup::default());
        let poller = rig.pollers.remove(0);
        let reactor = Reactor::start(0, Mode::Always).unwrap();
        let handle = reactor.handle().clone();
        let place = Place {
            reactor: handle.clone(),
            id: POLLER,
            pair: 1,
            health: poller.health(),
        };
        handle.adopt(POLLER, poller);
        handle.attach(POLLER, lane);
        let device = Arc::new(rig.device);
        let keeper = Keeper::new(Arc::clone(&device), on_loss, vec![place], patience);
        Scene {
            keeper,
            reactor: Some(reactor),
            device,
            model: rig.model,
            guest,
        }
    }

    fn send(&mut self, kind: u32, sector: u64, bytes: &[u8]) -> u16 {
        let reads = kind == request_type::IN;
        let len = if reads {
            4096
        } else {
            u32::try_from(bytes.len()).unwrap()
        };
        let request = SimRequest::new(kind, sector, len, reads);
        let head = self.guest.driver.submit(&request, bytes).unwrap();
        self.guest.driver.publish();
        head
    }

    fn completion_within(&mut self, time: Duration) -> Option<SimCompletion> {
        let start = Instant::now();
        loop {
            if let Some(completion) = self.guest.driver.poll_used() {
                return Some(completion);
            }
            if start.elapsed() > time {
                return None;
            }
            std::thread::sleep(Duration::from_micros(50));
        }
    }

    fn status_of(&mut self, kind: u32, sector: u64, bytes: &[u8]) -> u8 {
        let head = self.send(kind, sector, bytes);
        let completion = self
            .completion_within(DEADLINE)
            .expect("a request that does not end");
        assert_eq!(completion.head, head);
        completion.status
    }

    fn write(&mut self, sector: u64, byte: u8) -> u8 {
        self.status_of(request_type::OUT, sector, &[byte; 4096])
    }

    fn reads_back(&mut self, sector: u64, byte: u8) {
        let head = self.send(request_type::IN, sector, &[]);
        let completion = self
            .completion_within(DEADLINE)
            .expect("a read that does not end");
        assert_eq!((completion.head, completion.status), (head, status::OK));
        let mut bytes = [0; 4096];
        self.guest.driver.read_data(head, &mut bytes);
        assert!(bytes.iter().all(|read| *read == byte), "sector {sector}");
    }

    fn flush(&mut self) -> u8 {
        self.status_of(request_type::FLUSH, 0, &[])
    }

    fn take_lane(&self) -> Option<Lane> {
        let reactor = self.reactor.as_ref().unwrap().handle();
        let lane: LaneId = self.guest.lane;
        reactor.detach(POLLER, lane).recv_timeout(DEADLINE).ok()
    }

    /// As a server ends: the lane, the poller, the device.
    fn finish(mut self) {
        drop(self.take_lane().expect("the lane did not come back"));
        let reactor = self.reactor.take().unwrap();
        let poller = reactor
            .handle()
            .retire(POLLER)
            .recv_timeout(DEADLINE)
            .unwrap();
        self.device.delete_poller(poller).unwrap();
        self.device.shutdown().unwrap();
        reactor.stop();
        assert_eq!(
            (self.model.iommu_violations(), self.model.driver_errors()),
            (0, 0)
        );
    }
}

#[test]
fn controller_that_breaks_is_reset_and_requests_under_way_go_on() {
    let mut scene = Scene::new(OnDeviceLoss::Error);
    assert_eq!(scene.write(0, 1), status::OK);
    scene.model.break_down();
    let heads = [
        scene.send(request_type::OUT, 8, &[2; 4096]),
        scene.send(request_type::OUT, 16, &[3; 4096]),
    ];
    assert!(
        scene.completion_within(Duration::from_millis(50)).is_none(),
        "a broken controller carried a request out"
    );
    scene.keeper.look();
    let mut ended: Vec<(u16, u8)> = (0..2)
        .map(|_| scene.completion_within(DEADLINE).unwrap())
        .map(|c| (c.head, c.status))
        .collect();
    ended.sort_unstable();
    let mut expected = heads.map(|head| (head, status::OK));
    expected.sort_unstable();
    assert_eq!(ended, expected);
    for (sector, byte) in [(0, 1), (8, 2), (16, 3)] {
        scene.reads_back(sector, byte);
    }
    assert_eq!(scene.flush(), status::OK, "a reset loses no cache");
    assert!(
        scene.keeper.report().contains("serving, resets 1,"),
        "{}",
        scene.keeper.report()
    );
    scene.finish();
}

#[test]
fn controller_that_breaks_four_times_in_a_minute_is_given_up() {
    let mut scene = Scene::new(OnDeviceLoss::Error);
    for _ in 0..3 {
        scene.model.break_down();
        scene.keeper.look();
        assert_eq!(scene.write(0, 1), status::OK);
    }
    scene.model.break_down();
    scene.keeper.look();
    assert_eq!(scene.write(0, 1), status::IOERR);
    assert!(
        scene.keeper.report().contains("lost, resets 3,"),
        "{}",
        scene.keeper.report()
    );
    scene.finish();
}

#[test]
fn device_pulled_out_with_error_fails_requests_until_it_is_back() {
    let mut scene = Scene::new(OnDeviceLoss::Error);
    assert_eq!(scene.write(0, 1), status::OK);
    scene.model.pull_out();
    let head = scene.send(request_type::OUT, 8, &[2; 4096]);
    assert!(scene.completion_within(Duration::from_millis(50)).is_none());
    scene.keeper.look();
    let completion = scene.completion_within(DEADLINE).unwrap();
    assert_eq!((completion.head, completion.status), (head, status::IOERR));
    assert_eq!(scene.write(8, 3), status::IOERR);
    assert_eq!(scene.status_of(request_type::IN, 0, &[]), status::IOERR);
    assert_eq!(scene.flush(), status::IOERR);
    assert!(scene.keeper.report().contains("lost"));
    scene.keeper.look(); // it is back in its slot
    assert_eq!(scene.write(8, 4), status::OK);
    // The device had a volatile cache: what was written and not flushed may be gone, and the guest hears of it once.
    assert_eq!([scene.flush(), scene.flush()], [status::IOERR, status::OK]);
    scene.reads_back(0, 1);
    scene.reads_back(8, 4);
    scene.finish();
}

#[test]
fn device_pulled_out_with_hold_keeps_requests_until_it_is_back() {
    let mut scene = Scene::new(OnDeviceLoss::Hold);
    scene.model.break_down(); // so that what is sent stays under way
    let before = scene.send(request_type::OUT, 8, &[2; 4096]);
    let flush = scene.send(request_type::FLUSH, 0, &[]);
    std::thread::sleep(Duration::from_millis(50));
    scene.model.pull_out();
    scene.keeper.look();
    let after = scene.send(request_type::OUT, 16, &[3; 4096]);
    assert!(
        scene
            .completion_within(Duration::from_millis(100))
            .is_none(),
        "a request ended without a device"
    );
    scene.keeper.look();
    let mut ended: Vec<(u16, u8)> = (0..3)
        .map(|_| scene.completion_within(DEADLINE).unwrap())
        .map(|c| (c.head, c.status))
        .collect();
    ended.sort_unstable();
    // The flush had been sent to a cache that is gone.
    let mut expected = [
        (before, status::OK),
        (flush, status::IOERR),
        (after, status::OK),
    ];
    expected.sort_unstable();
    assert_eq!(ended, expected);
    scene.reads_back(8, 2);
    scene.reads_back(16, 3);
    scene.finish();
}

#[test]
fn guest_that_leaves_while_its_device_is_gone_gets_its_requests_back() {
    let mut scene = Scene::new(OnDeviceLoss::Hold);
    scene.model.pull_out();
    let head = scene.send(request_type::OUT, 8, &[2; 4096]);
    std::thread::sleep(Duration::from_millis(50));
    scene.keeper.look();
    let lane = scene
        .take_lane()
        .expect("a session cannot end while its device is gone");
    let completion = scene
        .completion_within(Duration::ZERO)
        .expect("the request was not given back");
    assert_eq!((completion.head, completion.status), (head, status::IOERR));
    // Another session comes, and the device too.
    let reactor = scene.reactor.as_ref().unwrap().handle().clone();
    reactor.attach(POLLER, lane);
    assert!(scene.take_lane().is_some());
    scene.keeper.look();
    let reactor = scene.reactor.take().unwrap();
    let poller = reactor
        .handle()
        .retire(POLLER)
        .recv_timeout(DEADLINE)
        .unwrap();
    scene.device.delete_poller(poller).unwrap();
    scene.device.shutdown().unwrap();
    reactor.stop();
}

#[test]
fn device_that_the_system_wants_back_is_drained_and_released_in_good_order() {
    // Slow enough that the request is at the device when the system asks.
    let config = ModelConfig {
        size: 4 << 20,
        queues: 1,
        latency: Duration::from_millis(200),
        ..ModelConfig::default()
    };
    let mut scene = Scene::of(Rig::new(config), OnDeviceLoss::Error, Patience::default());
    let head = scene.send(request_type::OUT, 8, &[2; 4096]);
    std::thread::sleep(Duration::from_millis(50));
    scene.model.ask_for_release();
    scene.keeper.look();
    let completion = scene.completion_within(DEADLINE).unwrap();
    assert_eq!(
        (completion.head, completion.status),
        (head, status::OK),
        "what was at the device was to end first"
    );
    assert_eq!(scene.write(8, 3), status::IOERR);
    scene.keeper.look();
    scene.reads_back(8, 2);
    scene.finish();
}

#[test]
fn command_that_never_ends_is_aborted_and_no_other() {
    let patience = Patience {
        command: Duration::from_millis(500),
        abort: Duration::from_secs(60),
    };
    let rig = Rig::new(ModelConfig {
        size: 4 << 20,
        queues: 1,
        ..ModelConfig::default()
    });
    let mut scene = Scene::of(rig, OnDeviceLoss::Error, patience);
    assert!(scene.model.hang_next(io_opcode::WRITE));
    let head = scene.send(request_type::OUT, 8, &[2; 4096]);
    let start = Instant::now();
    let completion = loop {
        scene.keeper.look();
        if let Some(completion) = scene.completion_within(Duration::from_millis(20)) {
            break completion;
        }
        assert!(start.elapsed() < DEADLINE, "nobody aborts it");
    };
    assert_eq!((completion.head, completion.status), (head, status::IOERR));
    assert!(start.elapsed() >= patience.command - Duration::from_millis(250));
    assert_eq!(scene.write(16, 3), status::OK);
    assert!(
        scene.keeper.report().contains("serving, resets 0,"),
        "{}",
        scene.keeper.report()
    );
    scene.finish();
}

#[test]
fn command_that_cannot_be_aborted_ends_after_a_reset() {
    let patience = Patience {
        command: Duration::from_millis(500),
        abort: Duration::ZERO,
    };
    let rig = Rig::new(ModelConfig {
        size: 4 << 20,
        queues: 1,
        ..ModelConfig::default()
    });
    let mut scene = Scene::of(rig, OnDeviceLoss::Error, patience);
    // The first attempt and the one after the abort hang: an abort that is not waited for helps nobody.
    assert!(
        scene
            .model
            .fail_next(io_opcode::WRITE, Status::NAMESPACE_NOT_READY)
    );
    assert!(scene.model.hang_next(io_opcode::WRITE));
    let head = scene.send(request_type::OUT, 8, &[2; 4096]);
    let start = Instant::now();
    let completion = loop {
        scene.keeper.look();
        if let Some(completion) = scene.completion_within(Duration::from_millis(1)) {
            break completion;
        }
        assert!(start.elapsed() < DEADLINE, "nobody resets the controller");
    };
    // Aborted, or carried out after the reset, whichever came first; never both.
    assert_eq!(completion.head, head);
    assert!(
        scene.completion_within(Duration::from_millis(50)).is_none(),
        "it ended twice"
    );
    assert_eq!(scene.write(16, 3), status::OK);
    scene.finish();
}

/// Another device in the old one's slot is taken, asked and let go of, twice a second, while guests go on asking.
#[test]
fn device_that_comes_back_as_another_is_refused_and_requests_go_on_failing() {
    let config = |serial: &str| ModelConfig {
        size: 4 << 20,
        queues: 1,
        serial: serial.to_owned(),
        ..ModelConfig::default()
    };
    let model = Model::new(config("one")).unwrap();
    let handle = model.handle();
    let other = config("two");
    let claim = move || {
        Model::new(other.clone()).map_err(|error| DeviceError::Model {
            name: "swapped".to_owned(),
            error,
        })
    };
    let device = Device::open("swapped", model, 1, Box::new(claim)).unwrap();
    let rig = Rig::of(device, handle);
    let mut scene = Scene::of(rig, OnDeviceLoss::Error, Patience::default());
    scene.model.pull_out();
    scene.keeper.look();
    for _ in 0..3 {
        assert_eq!(scene.write(8, 3), status::IOERR);
        let error = scene
            .device
            .with_control(|control| control.regain(&mut Vec::new()));
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("its serial number was one and is two; it is not served"),
            "{error}"
        );
        scene.keeper.look();
    }
    assert!(scene.keeper.report().contains("lost, resets 0,"));
    scene.finish();
}
