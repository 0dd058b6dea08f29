//! vhost-user message scripts against a running server: what QEMU sends, and what it never would. At the end, what its
//! reactor does under a load, and does not (I9).
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "vhost_user/resize.rs"]
mod resize;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tandem::config::{CoreId, Options, Polling};
use tandem::control::server::Server;
use tandem::plan::{Topology, plan};
use tandem::sim::front_end::feature::*;
use tandem::sim::front_end::request::*;
use tandem::sim::front_end::*;
use tandem::sim::{RawDescriptor, SimCompletion, SimGuest, SimGuestConfig, SimRequest};
use tandem::virtio::blk::{VirtioBlkConfig, request_type, status};
use tandem::virtio::memory::Gpa;
use tandem::virtio::virtqueue::RingLayout;
use zerocopy::FromBytes;

/// A server in this process, with one RAM disk for each name.
struct Rig {
    server: Option<Server>,
    folder: PathBuf,
}

impl Rig {
    fn start(device: &str, disks: &[(&str, &str)]) -> Rig {
        Rig::start_polling(device, disks, Polling::Always)
    }

    fn start_polling(device: &str, disks: &[(&str, &str)], poll: Polling) -> Rig {
        Rig::start_with(device, disks, &[], poll)
    }

    /// Disks and SCSI hosts.
    fn start_with(
        device: &str,
        disks: &[(&str, &str)],
        hosts: &[(&str, &str)],
        poll: Polling,
    ) -> Rig {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = std::env::temp_dir().join(format!("tandem-vu-{}-{count}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let mut options = Options::default();
        options.device.push(device.parse().unwrap());
        for (name, more) in disks {
            let path = folder.join(name);
            options
                .blk
                .push(format!("path={}{more}", path.display()).parse().unwrap());
        }
        for (name, more) in hosts {
            let path = folder.join(name);
            let spec = format!("path={}{more}", path.display());
            options.scsi.push(spec.parse().unwrap());
        }
        options.server.cores = Some("0".parse().unwrap());
        options.server.poll = Some(poll);
        let config = options.resolve().unwrap();
        let plan = plan(&config, &Topology::from_online_cores([CoreId(0)])).unwrap();
        Rig {
            server: Some(Server::start(&plan).unwrap()),
            folder,
        }
    }

    fn connect(&self, name: &str) -> FrontEnd {
        FrontEnd::connect(&self.folder.join(name))
    }

    /// A front-end whose guest runs queue 0.
    fn running_guest(&self, name: &str) -> (FrontEnd, Guest) {
        let front_end = self.connect(name);
        front_end.negotiate();
        let guest = Guest::new(64, 0);
        guest.start(&front_end, 0, FEATURES);
        (front_end, guest)
    }

    fn report(&self) -> String {
        self.server.as_ref().unwrap().report()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        let report = self.server.take().map(Server::stop);
        let _ = std::fs::remove_dir_all(&self.folder);
        if let Some(report) = report
            && !std::thread::panicking()
        {
            let report = report.expect("the server did not end cleanly");
            assert!(
                report.contains("iommu violations 0, driver errors 0"),
                "{report}"
            );
        }
    }
}

const BASE: u64 = 0x10_0000;
const USER: u64 = USER_BASE;
const MEMORY: u64 = 8 << 20;

/// A guest with one queue in a memfd, as the front-end shares it.
struct Guest {
    driver: SimGuest,
    shared: SharedMemory,
}

impl Guest {
    fn new(size: u16, first_index: u16) -> Guest {
        Guest::with_layout(RingLayout::Split, size, first_index)
    }

    fn with_layout(layout: RingLayout, size: u16, first_index: u16) -> Guest {
        let shared = SharedMemory::new(Gpa(BASE), MEMORY);
        let config = SimGuestConfig {
            layout,
            size,
            event_idx: true,
            indirect: true,
            max_data: 64 << 10,
            first_index,
            base: Gpa(BASE),
        };
        let driver = SimGuest::new(Arc::clone(&shared.memory), config).unwrap();
        Guest { driver, shared }
    }

    /// Everything between SET_OWNER and the running queue, as QEMU orders it.
    fn start(&self, front_end: &FrontEnd, index: u32, features: u64) -> (File, File) {
        front_end.share(features, &self.shared);
        self.start_queue(front_end, index)
    }

    fn start_queue(&self, front_end: &FrontEnd, index: u32) -> (File, File) {
        front_end.start_queue(index, &self.driver, &self.shared)
    }

    /// Where the event suppression structure of a packed ring's device is.
    fn device_event(&self) -> Gpa {
        let used = self.driver.virtqueue_config().used;
        Gpa(BASE + self.shared.user_address(used) - USER)
    }

    /// The base, the addresses and a kick again, as a front-end resumes a queue.
    fn restart(&self, front_end: &FrontEnd, base: &[u8]) {
        let config = self.driver.virtqueue_config();
        let [descriptor, used, avail] = [config.descriptor_table, config.used, config.avail]
            .map(|at| self.shared.user_address(at));
        // A server that refuses closes; what it does not read then is as good.
        let send = |request, payload: &[u8], fds: &[BorrowedFd<'_>]| {
            let _ = front_end.send_raw(&FrontEnd::message(request, 1, payload), fds);
        };
        send(SET_VRING_BASE, base, &[]);
        send(SET_VRING_ADDR, &vring_addr(0, descriptor, used, avail), &[]);
        let kick = eventfd();
        send(SET_VRING_KICK, &0_u64.to_le_bytes(), &[kick.as_fd()]);
        send(SET_VRING_ENABLE, &vring_state(0, 1), &[]);
    }

    fn wait(&mut self) -> SimCompletion {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(completion) = self.driver.poll_used() {
                return completion;
            }
            assert!(Instant::now() < deadline, "no completion");
            std::thread::yield_now();
        }
    }

    fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let request = SimRequest::new(request_type::OUT, sector, data.len() as u32, false);
        self.driver.submit(&request, data).unwrap();
        self.driver.publish();
        self.wait().status
    }

    fn read(&mut self, sector: u64, len: u32) -> Vec<u8> {
        let head = self
            .driver
            .submit(&SimRequest::new(request_type::IN, sector, len, true), &[])
            .unwrap();
        self.driver.publish();
        assert_eq!(self.wait().status, status::OK);
        let mut data = vec![0; len as usize];
        self.driver.read_data(head, &mut data);
        data
    }
}

const FEATURES: u64 = F_PROTOCOL | F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_FLUSH;
const PACKED: u64 = FEATURES | F_RING_PACKED;

fn signals(call: &File) -> u64 {
    let mut bytes = [0; 8];
    (&*call)
        .read(&mut bytes)
        .map_or(0, |_| u64::from_ne_bytes(bytes))
}

fn wait_for_signal(call: &File) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while signals(call) == 0 {
        assert!(Instant::now() < deadline, "no signal");
        std::thread::yield_now();
    }
}

#[test]
fn negotiation_offers_what_the_issue_lists_and_nothing_it_cannot_serve() {
    let rig = Rig::start(
        "model:ram,size=64M",
        &[("a", ",queues=4"), ("b", ",ns=1,readonly=on")][..1],
    );
    let front_end = rig.connect("a");
    let (features, protocol) = front_end.negotiate();
    for bit in [2, 6, 9, 10, 11, 12, 13, 14, 28, 29, 30, 32, 34] {
        assert_ne!(features & (1 << bit), 0, "feature bit {bit}");
    }
    for bit in [1, 4, 5, 24, 26, 33, 40] {
        assert_eq!(features & (1 << bit), 0, "feature bit {bit}");
    }
    // MQ 0, REPLY_ACK 3, BACKEND_REQ 5, CONFIG 9, RESET_DEVICE 13, CONFIGURE_MEM_SLOTS 15; not INFLIGHT_SHMFD 12.
    assert_eq!(
        protocol,
        1 << 0 | 1 << 3 | 1 << 5 | 1 << 9 | 1 << 13 | 1 << 15
    );
    assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 4);
    assert!(front_end.ask_u64(GET_MAX_MEM_SLOTS) >= 32);
}

#[test]
fn get_config_of_any_length_that_qemu_asks_is_exactly_as_long() {
    let rig = Rig::start("model:ram,size=64M", &[("a", ",queues=2")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    for size in [36, 48, 57, 60, 256] {
        let answer = front_end.ask(GET_CONFIG, &config_request(0, size));
        assert_eq!(answer.len(), 12 + size as usize);
        assert_eq!(
            answer[12..20],
            (64_u64 << 11).to_le_bytes(),
            "capacity in sectors"
        );
    }
    let answer = front_end.ask(GET_CONFIG, &config_request(0, 60));
    let config = VirtioBlkConfig::read_from_bytes(&answer[12..]).unwrap();
    assert_eq!(
        (
            config.blk_size.get(),
            config.num_queues.get(),
            config.writeback
        ),
        (512, 2, 1)
    );
    assert_eq!(
        (config.seg_max.get(), config.max_discard_seg.get()),
        (126, 256)
    );
    // Beyond the space: an empty payload says no, and the connection goes on.
    assert_eq!(
        front_end.ask(GET_CONFIG, &config_request(250, 57)).len(),
        12
    );
    assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 2);
}

#[test]
fn io_over_a_started_queue_reads_back_and_signals() {
    let rig = Rig::start("model:ram,size=64M", &[("a", ",queues=2")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest = Guest::new(64, 0);
    let (_kick, call) = guest.start(&front_end, 1, FEATURES);
    wait_for_signal(&call); // the spurious one after a start
    guest.driver.enable_signals();
    let data: Vec<u8> = (0..8192_u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(guest.write(16, &data), status::OK);
    wait_for_signal(&call);
    assert_eq!(guest.read(16, 8192), data);
    // GET_VRING_BASE answers with the next avail index, and the ring is silent afterwards.
    assert_eq!(
        front_end.ask(GET_VRING_BASE, &vring_state(1, 0)),
        vring_state(1, 2)
    );
    guest
        .driver
        .submit(&SimRequest::new(request_type::FLUSH, 0, 0, false), &[])
        .unwrap();
    guest.driver.publish();
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(guest.driver.poll_used(), None);
    assert!(rig.report().contains("8,192"), "{}", rig.report());
}

#[test]
fn sixty_four_queues_of_1024_entries_all_serve() {
    let rig = Rig::start("model:ram,size=64M", &[("a", ",queues=64")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 64);
    // One guest's memory for the connection; its ring is served as the first queue, then as the last.
    let mut guest = Guest::new(1024, 0);
    guest.start(&front_end, 0, FEATURES);
    assert_eq!(guest.write(0, &[7; 4096]), status::OK);
    let base = front_end.ask(GET_VRING_BASE, &vring_state(0, 0));
    assert_eq!(base, vring_state(0, 1));
    front_end.send(SET_VRING_NUM, &vring_state(63, 1024), &[]);
    front_end.send(SET_VRING_BASE, &vring_state(63, 1), &[]);
    let config = guest.driver.virtqueue_config();
    let [descriptor, used, avail] = [config.descriptor_table, config.used, config.avail]
        .map(|at| guest.shared.user_address(at));
    front_end.send(
        SET_VRING_ADDR,
        &vring_addr(63, descriptor, used, avail),
        &[],
    );
    let kick = eventfd();
    front_end.send(SET_VRING_KICK, &63_u64.to_le_bytes(), &[kick.as_fd()]);
    let enabled = front_end.acknowledged(SET_VRING_ENABLE, &vring_state(63, 1), &[]);
    assert_eq!(enabled, Some(0));
    assert_eq!(guest.read(0, 4096), vec![7; 4096]);
    // Beyond what a disk may have.
    front_end.send(SET_VRING_NUM, &vring_state(64, 128), &[]);
    assert!(front_end.is_closed());
}

#[test]
fn queue_restarted_from_its_base_goes_on_where_it_stood() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest = Guest::new(16, 65_530);
    guest.start(&front_end, 0, FEATURES);
    for i in 0..10 {
        assert_eq!(guest.write(i, &[i as u8; 512]), status::OK);
    }
    let base = front_end.ask(GET_VRING_BASE, &vring_state(0, 0));
    assert_eq!(base, vring_state(0, 4), "65530 + 10 wraps to 4");
    // Resume: the base that was reported, the addresses and a kick again.
    front_end.send(SET_VRING_BASE, &base, &[]);
    let kick = eventfd();
    front_end.send(SET_VRING_KICK, &0_u64.to_le_bytes(), &[kick.as_fd()]);
    assert_eq!(guest.read(9, 512), vec![9; 512]);
}

#[test]
fn packed_queue_restarted_from_its_base_goes_on_where_it_stood() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    // A size that only a packed ring may have; each request takes three entries.
    let mut guest = Guest::with_layout(RingLayout::Packed, 24, 20);
    guest.start(&front_end, 0, PACKED);
    for i in 0..10 {
        assert_eq!(guest.write(i, &[i as u8; 512]), status::OK);
    }
    // 20 + 10 * 3 is entry 2 two laps on, where the wrap counters are 1 again; avail and used are the same.
    let base = front_end.ask(GET_VRING_BASE, &vring_state(0, 0));
    assert_eq!(base, vring_state(0, 0x8002_8002));
    guest.restart(&front_end, &base);
    assert_eq!(guest.read(9, 512), vec![9; 512]);
    assert_eq!(guest.write(9, &[1; 512]), status::OK);
    for i in 0..7 {
        assert_eq!(guest.write(i, &[i as u8; 512]), status::OK);
    }
    // 5 + 8 * 3 entries on.
    let base = front_end.ask(GET_VRING_BASE, &vring_state(0, 0));
    assert_eq!(base, vring_state(0, 0x0005_0005));
}

#[test]
fn packed_queue_whose_front_end_lost_its_base_goes_on_where_it_stood() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    for round in 0..80 {
        let (requests, asleep) = (round / 2, round % 2 == 1);
        let front_end = rig.connect("a");
        front_end.negotiate();
        let mut guest = Guest::with_layout(RingLayout::Packed, 16, 0);
        guest.start(&front_end, 0, PACKED);
        for _ in 0..requests {
            assert_eq!(guest.write(3, &[7; 512]), status::OK);
        }
        drop(front_end);
        // What QEMU says after a crash of the server: the base it started with.
        let again = rig.connect("a");
        again.negotiate();
        if asleep {
            // As a server leaves it that dies in its sleep: kicks are enabled.
            let flags = Gpa(guest.device_event().0 + 2);
            guest.driver.write(flags, &[0, 0]);
        }
        guest.start(&again, 0, PACKED);
        assert_eq!(guest.write(3, &[requests; 512]), status::OK);
        assert_eq!(guest.read(3, 512), vec![requests; 512]);
        // A driver that clears its ring and not that structure starts from the beginning.
        drop(again);
        let again = rig.connect("a");
        again.negotiate();
        let mut left = [0; 4];
        guest.driver.read(guest.device_event(), &mut left);
        assert_eq!(left[2..], [1, 0], "kicks are disabled");
        if asleep {
            left[2] = 0;
        }
        let mut cleared = Guest::with_layout(RingLayout::Packed, 16, 0);
        cleared.driver.write(cleared.device_event(), &left);
        cleared.start(&again, 0, PACKED);
        assert_eq!(cleared.read(3, 512), vec![requests; 512]);
    }
}

/// Until the reactor sleeps.
fn fall_asleep(rig: &Rig) {
    let sleeps = || {
        let report = rig.report();
        let (_, rest) = report.split_once("sleeps ").expect("an adaptive reactor");
        let digits = rest.split(',').next().unwrap();
        digits.parse::<u64>().unwrap()
    };
    let before = sleeps();
    let start = Instant::now();
    while sleeps() == before {
        assert!(
            start.elapsed() < Duration::from_secs(10),
            "it does not sleep"
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn queue_without_a_kick_eventfd_is_looked_at_by_a_reactor_that_sleeps() {
    for layout in [RingLayout::Split, RingLayout::Packed] {
        let rig = Rig::start_polling("model:ram,size=64M", &[("a", "")], Polling::Adaptive);
        let front_end = rig.connect("a");
        front_end.negotiate();
        let mut guest = Guest::with_layout(layout, 16, 0);
        let features = if layout == RingLayout::Split {
            FEATURES
        } else {
            PACKED
        };
        guest.start(&front_end, 0, features);
        // Bit 8: there is none.
        front_end.send(SET_VRING_KICK, &0x100_u64.to_le_bytes(), &[]);
        let _ = front_end.ask_u64(GET_QUEUE_NUM);
        fall_asleep(&rig);
        let start = Instant::now();
        for i in 0..10 {
            std::thread::sleep(Duration::from_millis(5));
            assert_eq!(guest.write(i, &[i as u8; 512]), status::OK);
        }
        // A sleep that only a kick ends is of a second.
        assert!(
            start.elapsed() < Duration::from_secs(2),
            "{:?}",
            start.elapsed()
        );
        assert_eq!(guest.read(9, 512), vec![9; 512]);
    }
}

#[test]
fn kick_eventfd_that_is_replaced_wakes_a_reactor_that_sleeps() {
    let rig = Rig::start_polling("model:ram,size=64M", &[("a", "")], Polling::Adaptive);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest = Guest::new(16, 0);
    let (mut kick, _call) = guest.start(&front_end, 0, FEATURES);
    for i in 0..10 {
        fall_asleep(&rig);
        let request = SimRequest::new(request_type::OUT, i, 512, false);
        guest.driver.submit(&request, &[7; 512]).unwrap();
        assert!(guest.driver.publish(), "it sleeps, and wants no kick");
        let start = Instant::now();
        kick.write_all(&1_u64.to_ne_bytes()).unwrap();
        assert_eq!(guest.wait().status, status::OK);
        assert!(
            start.elapsed() < Duration::from_millis(500),
            "{:?}",
            start.elapsed()
        );
        kick = eventfd();
        front_end.send(SET_VRING_KICK, &0_u64.to_le_bytes(), &[kick.as_fd()]);
        let _ = front_end.ask_u64(GET_QUEUE_NUM);
    }
}

#[test]
fn signal_that_was_on_its_way_while_the_call_eventfd_was_replaced_reaches_the_new_one() {
    let rig = Rig::start("model:ram,size=16M", &[("vm0.sock", "")]);
    let (front_end, mut guest) = rig.running_guest("vm0.sock");
    for call in [eventfd(), eventfd()] {
        guest.write(0, &[1; 512]);
        // Its own signal, if it wanted one, went to the eventfd before.
        std::thread::sleep(Duration::from_millis(10));
        let which = 0_u64.to_le_bytes();
        front_end.send(SET_VRING_CALL, &which, &[call.as_fd()]);
        wait_for_signal(&call);
    }
    // Without an eventfd there is nobody to tell.
    let nobody = (1_u64 << 8).to_le_bytes();
    front_end.send(SET_VRING_CALL, &nobody, &[]);
    guest.write(0, &[2; 512]);
    assert_eq!(guest.read(0, 512), [2; 512]);
}

#[test]
fn packed_base_that_is_none_closes_the_connection() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    for base in [
        0x8010_8010, // behind the ring
        0x8000_8001, // a request in flight at another server
        0x8000_0000,
        0xffff_ffff,
    ] {
        let front_end = rig.connect("a");
        front_end.negotiate();
        let guest = Guest::with_layout(RingLayout::Packed, 16, 0);
        front_end.share(PACKED, &guest.shared);
        front_end.send(SET_VRING_NUM, &vring_state(0, 16), &[]);
        guest.restart(&front_end, &vring_state(0, base));
        assert!(front_end.is_closed(), "{base:#x}");
    }
    // The older document knows only the lower half.
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest = Guest::with_layout(RingLayout::Packed, 16, 0);
    front_end.share(PACKED, &guest.shared);
    front_end.send(SET_VRING_NUM, &vring_state(0, 16), &[]);
    guest.restart(&front_end, &vring_state(0, 0x8000));
    assert_eq!(guest.write(3, &[7; 512]), status::OK);
}

#[test]
fn packed_ring_of_a_guest_that_wants_signals_is_signalled_and_only_when_asked() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    for features in [PACKED, PACKED & !F_EVENT_IDX] {
        let front_end = rig.connect("a");
        front_end.negotiate();
        let mut guest = Guest::with_layout(RingLayout::Packed, 16, 0);
        let (_kick, call) = guest.start(&front_end, 0, features);
        wait_for_signal(&call); // the spurious one after a start
        guest.driver.disable_signals();
        assert_eq!(guest.write(16, &[1; 512]), status::OK);
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(signals(&call), 0);
        guest.driver.enable_signals();
        assert_eq!(guest.write(16, &[2; 512]), status::OK);
        wait_for_signal(&call);
    }
}

#[test]
fn memory_table_replaced_while_running_keeps_serving() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let (front_end, mut guest) = rig.running_guest("a");
    assert_eq!(guest.write(0, &[1; 4096]), status::OK);
    let extra = memfd(1 << 20);
    let more = Region {
        gpa: 1 << 32,
        size: 1 << 20,
        user_addr: USER + (1 << 32),
        mmap_offset: 0,
    };
    assert_eq!(
        front_end.acknowledged(ADD_MEM_REG, &one_region(&more), &[extra.as_fd()]),
        Some(0)
    );
    assert_eq!(guest.write(8, &[2; 4096]), status::OK);
    assert_eq!(
        front_end.acknowledged(REM_MEM_REG, &one_region(&more), &[]),
        Some(0)
    );
    assert_eq!(guest.read(0, 4096), vec![1; 4096]);
    let again = mem_table(&[guest.shared.region]);
    assert_eq!(
        front_end.acknowledged(SET_MEM_TABLE, &again, &[guest.shared.file.as_fd()]),
        Some(0)
    );
    assert_eq!(guest.read(8, 4096), vec![2; 4096]);
}

#[test]
fn front_end_that_vanishes_with_io_in_flight_can_come_back() {
    let rig = Rig::start("model:ram,size=64M,latency=2ms", &[("a", "")]);
    for round in 0..5_u8 {
        let front_end = rig.connect("a");
        front_end.negotiate();
        let mut guest = Guest::new(64, 0);
        guest.start(&front_end, 0, FEATURES);
        assert_eq!(guest.write(u64::from(round), &[round; 512]), status::OK);
        assert_eq!(guest.read(0, 512), vec![0; 512]);
        for sector in 100..120 {
            guest
                .driver
                .submit(
                    &SimRequest::new(request_type::OUT, sector, 512, false),
                    &[7; 512],
                )
                .unwrap();
        }
        guest.driver.publish();
    }
}

#[test]
fn second_front_end_of_a_disk_is_refused_and_the_first_goes_on() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let first = rig.connect("a");
    first.negotiate();
    assert!(rig.connect("a").is_closed());
    assert_eq!(first.ask_u64(GET_QUEUE_NUM), 1);
    drop(first);
    rig.connect("a").negotiate();
}

#[test]
fn write_through_by_config_or_missing_flush_feature_still_reads_back() {
    let rig = Rig::start("model:ram,size=64M,vwc=on", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest = Guest::new(64, 0);
    guest.start(&front_end, 0, FEATURES & !F_FLUSH | 1 << 11);
    assert_eq!(guest.write(0, &[3; 512]), status::OK);
    let set = |offset: u32, bytes: &[u8]| {
        let mut payload = config_request(offset, bytes.len() as u32);
        payload[12..].copy_from_slice(bytes);
        front_end.acknowledged(SET_CONFIG, &payload, &[])
    };
    assert_eq!(set(32, &[0]), Some(0));
    assert_eq!(front_end.ask(GET_CONFIG, &config_request(32, 1))[12], 0);
    assert_eq!(guest.write(1, &[4; 512]), status::OK);
    assert_eq!(set(32, &[1]), Some(0));
    assert_eq!(guest.read(1, 512), vec![4; 512]);
    // Anything else is read only: refused, and the connection ends.
    assert_eq!(set(0, &[0; 8]), Some(1));
    assert!(front_end.is_closed());
}

#[test]
fn reset_device_stops_the_rings_and_a_new_start_works() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let (front_end, mut guest) = rig.running_guest("a");
    assert_eq!(guest.write(5, &[9; 512]), status::OK);
    front_end.send(RESET_DEVICE, &[], &[]);
    let mut rebooted = Guest::new(128, 0);
    rebooted.start(&front_end, 0, FEATURES);
    assert_eq!(rebooted.read(5, 512), vec![9; 512]);
}

#[test]
fn two_disks_serve_two_front_ends_and_a_hostile_one_harms_only_itself() {
    let rig = Rig::start(
        "model:ram,size=64M,namespaces=2",
        &[("a", ",ns=1"), ("b", ",ns=2")],
    );
    let (good, bad) = (rig.connect("a"), rig.connect("b"));
    good.negotiate();
    bad.negotiate();
    let (mut a, mut b) = (Guest::new(64, 0), Guest::new(64, 0));
    a.start(&good, 0, FEATURES);
    b.start(&bad, 0, FEATURES);
    assert_eq!(
        (a.write(0, &[1; 512]), b.write(0, &[2; 512])),
        (status::OK, status::OK)
    );
    b.driver.jump(1000); // the avail index runs away: this ring is broken
    b.driver.publish();
    bad.send(SET_VRING_NUM, &vring_state(0, 3), &[]);
    assert!(bad.is_closed());
    assert_eq!(a.read(0, 512), vec![1; 512]);
    let back = rig.connect("b");
    back.negotiate();
    let mut b = Guest::new(64, 0);
    b.start(&back, 0, FEATURES);
    assert_eq!(b.read(0, 512), vec![2; 512]);
}

#[test]
fn broken_ring_signals_its_error_and_is_given_back_at_once() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest = Guest::new(64, 0);
    let error = eventfd();
    front_end.send(SET_VRING_ERR, &0_u64.to_le_bytes(), &[error.as_fd()]);
    guest.start(&front_end, 0, FEATURES & !F_INDIRECT);
    assert_eq!(guest.write(0, &[5; 512]), status::OK);
    // An indirect table that was not negotiated: this ring can only be stopped.
    let mut request = SimRequest::new(request_type::OUT, 0, 512, false);
    request.direct = Some(0);
    guest.driver.submit(&request, &[6; 512]).unwrap();
    guest.driver.publish();
    wait_for_signal(&error);
    let start = Instant::now();
    let base = front_end.ask(GET_VRING_BASE, &vring_state(0, 0));
    assert_eq!(
        base,
        vring_state(0, 1),
        "the request that broke it was not taken"
    );
    assert!(start.elapsed() < Duration::from_secs(1));
    // The disk is as it was, for a driver that starts anew.
    let mut again = Guest::new(64, 0);
    again.start(&front_end, 0, FEATURES);
    assert_eq!(again.read(0, 512), vec![5; 512]);
}

#[test]
fn memory_shrunk_by_the_front_end_costs_its_session_only() {
    let rig = Rig::start(
        "model:ram,size=64M,namespaces=2",
        &[("a", ",ns=1"), ("b", ",ns=2")],
    );
    let (good, bad) = (rig.connect("a"), rig.connect("b"));
    good.negotiate();
    bad.negotiate();
    let (mut a, b) = (Guest::new(64, 0), Guest::new(64, 0));
    a.start(&good, 0, FEATURES);
    b.start(&bad, 0, FEATURES);
    b.shared.file.set_len(4096).unwrap(); // the poller reads avail.idx all the time: SIGBUS
    assert!(bad.is_closed());
    assert_eq!(a.write(3, &[6; 512]), status::OK);
    assert_eq!(a.read(3, 512), vec![6; 512]);
    std::mem::forget(b); // its own mapping is gone as well: nothing may touch it again
}

/// Each script must end the connection, and the next client must be served.
#[test]
fn bad_messages_close_the_connection_and_nothing_else() {
    let rig = Rig::start("model:ram,size=64M", &[("a", ",queues=2")]);
    let guest = Guest::new(64, 0);
    let small = memfd(4096);
    let region = |gpa, size, user_addr| Region {
        gpa,
        size,
        user_addr,
        mmap_offset: 0,
    };
    let raw = |request: u32, flags: u32, payload: &[u8]| FrontEnd::message(request, flags, payload);
    let pipe = File::open("/dev/null").unwrap();
    let many: Vec<File> = (0..40).map(|_| memfd(4096)).collect();
    let large = |f: &FrontEnd| {
        let header = [GET_FEATURES, 1, 1 << 31].map(u32::to_le_bytes).concat();
        f.send_raw(&header, &[])
    };
    type Send<'a> = Box<dyn Fn(&FrontEnd) -> std::io::Result<()> + 'a>;
    type Script<'a> = (&'a str, Send<'a>);
    let send = |request: u32, payload: Vec<u8>| -> Send<'_> {
        Box::new(move |f| f.send_raw(&FrontEnd::message(request, 1, &payload), &[]))
    };
    let table = |regions: Vec<Region>, file: &File| {
        let file = file.try_clone().unwrap();
        move |f: &FrontEnd| {
            let fds: Vec<BorrowedFd<'_>> = regions.iter().map(|_| file.as_fd()).collect();
            f.send_raw(
                &FrontEnd::message(SET_MEM_TABLE, 1, &mem_table(&regions)),
                &fds,
            )
        }
    };
    let with_fd = |request: u32, payload: Vec<u8>, file: &File| {
        let file = file.try_clone().unwrap();
        move |f: &FrontEnd| f.send_raw(&FrontEnd::message(request, 1, &payload), &[file.as_fd()])
    };
    let scripts: Vec<Script<'_>> = vec![
        ("a size of 2^31", Box::new(large)),
        (
            "version 3",
            Box::new(|f| f.send_raw(&raw(GET_FEATURES, 3, &[]), &[])),
        ),
        ("an unknown request", send(999, vec![])),
        ("request 0", send(0, vec![])),
        ("a short payload", send(SET_FEATURES, vec![0; 4])),
        ("a long payload", send(SET_FEATURES, vec![0; 16])),
        (
            "unoffered protocol features",
            send(SET_PROTOCOL_FEATURES, u64::MAX.to_le_bytes().to_vec()),
        ),
        (
            "an IOMMU that was not offered",
            send(SET_FEATURES, (FEATURES | 1 << 33).to_le_bytes().to_vec()),
        ),
        ("SET_OWNER twice", send(SET_OWNER, vec![])),
        ("vring 999", send(SET_VRING_NUM, vring_state(999, 64))),
        (
            "vring 2^32 - 1",
            send(SET_VRING_BASE, vring_state(u32::MAX, 0)),
        ),
        (
            "GET_VRING_BASE of vring 2",
            send(GET_VRING_BASE, vring_state(2, 0)),
        ),
        ("size 0", send(SET_VRING_NUM, vring_state(0, 0))),
        ("size 3", send(SET_VRING_NUM, vring_state(0, 3))),
        ("size 2048", send(SET_VRING_NUM, vring_state(0, 2048))),
        ("size 65536", send(SET_VRING_NUM, vring_state(0, 65536))),
        (
            "a base beyond 16 bits",
            send(SET_VRING_BASE, vring_state(0, 65536)),
        ),
        (
            "ring addresses before any memory",
            send(SET_VRING_ADDR, vring_addr(0, USER, USER, USER)),
        ),
        ("enable 2", send(SET_VRING_ENABLE, vring_state(0, 2))),
        (
            "a kick fd that is missing",
            send(SET_VRING_KICK, 0_u64.to_le_bytes().to_vec()),
        ),
        (
            "a kick fd that is a file",
            Box::new(with_fd(SET_VRING_KICK, vec![0; 8], &pipe)),
        ),
        (
            "a call fd that is a file",
            Box::new(with_fd(SET_VRING_CALL, vec![0; 8], &pipe)),
        ),
        (
            "an fd where none belongs",
            Box::new(with_fd(GET_FEATURES, vec![], &pipe)),
        ),
        (
            "a region larger than its file",
            Box::new(table(vec![region(0, 8192, USER)], &small)),
        ),
        (
            "an empty region",
            Box::new(table(vec![region(0, 0, USER)], &small)),
        ),
        (
            "a region whose end wraps",
            Box::new(table(vec![region(u64::MAX - 4095, 8192, USER)], &small)),
        ),
        (
            "a region off a page",
            Box::new(table(vec![region(100, 4096, USER)], &small)),
        ),
        (
            "overlapping regions",
            Box::new(table(
                vec![region(0, 4096, USER), region(0, 4096, USER + 8192)],
                &small,
            )),
        ),
        (
            "overlapping user addresses",
            Box::new(table(
                vec![region(0, 4096, USER), region(8192, 4096, USER)],
                &small,
            )),
        ),
        (
            "a file that cannot be mapped",
            Box::new(table(vec![region(0, 4096, USER)], &pipe)),
        ),
        ("no region", Box::new(table(vec![], &small))),
        (
            "a region that is not there",
            Box::new(send(REM_MEM_REG, one_region(&region(0, 4096, USER)))),
        ),
        (
            "40 descriptors",
            // More than the protocol library has room for: it drops the header with them and takes what follows for one.
            Box::new(|f| {
                f.send_raw(&raw(SET_MEM_TABLE, 1, &mem_table(&[])), &fds(&many))?;
                f.send_raw(&raw(GET_FEATURES, 1, &[]), &[])
            }),
        ),
        ("GET_INFLIGHT_FD, not offered", send(31, vec![0; 24])),
        ("SET_LOG_BASE, not offered", send(6, vec![0; 16])),
        ("SET_STATUS, not offered", send(39, vec![0; 8])),
    ];
    for (what, script) in &scripts {
        let front_end = rig.connect("a");
        front_end.negotiate();
        // A peer that has closed already is as good an answer.
        let _ = script(&front_end);
        assert!(
            front_end.is_closed(),
            "{what}: the connection is still open"
        );
    }
    let front_end = rig.connect("a");
    front_end.negotiate();
    let mut guest_after = guest;
    guest_after.start(&front_end, 0, FEATURES);
    assert_eq!(guest_after.write(0, &[1; 512]), status::OK);
}

#[test]
fn ring_addresses_outside_shared_memory_close_the_connection() {
    let rig = Rig::start("model:ram,size=64M", &[("a", "")]);
    let guest = Guest::new(64, 0);
    let end = guest.shared.region.user_addr + MEMORY;
    for [descriptor, used, avail] in [
        [0, USER, USER],
        [USER, 0, USER],
        [USER, USER, end],
        [end - 16 * 63, USER, USER], // its tail is outside
        [USER + 8, USER, USER],      // not aligned to 16
        [USER, USER + 2, USER],      // not aligned to 4
        [USER, USER, USER + 1],      // not aligned to 2
        [u64::MAX - 8, USER, USER],
    ] {
        let front_end = rig.connect("a");
        front_end.negotiate();
        front_end.send(SET_FEATURES, &FEATURES.to_le_bytes(), &[]);
        let table = mem_table(&[guest.shared.region]);
        assert_eq!(
            front_end.acknowledged(SET_MEM_TABLE, &table, &[guest.shared.file.as_fd()]),
            Some(0)
        );
        front_end.send(SET_VRING_NUM, &vring_state(0, 64), &[]);
        front_end.send(SET_VRING_ADDR, &vring_addr(0, descriptor, used, avail), &[]);
        assert!(
            front_end.is_closed(),
            "{descriptor:#x} {used:#x} {avail:#x}"
        );
    }
}

#[test]
fn half_a_message_and_silence_delay_nobody() {
    let rig = Rig::start(
        "model:ram,size=64M,namespaces=2",
        &[("a", ",ns=1"), ("b", ",ns=2")],
    );
    let silent = rig.connect("b");
    silent.send_raw(&[1, 0, 0], &[]).unwrap();
    let (_front_end, mut guest) = rig.running_guest("a");
    assert_eq!(guest.write(0, &[1; 512]), status::OK);
    drop(rig); // stops with both clients attached
}

#[test]
fn stop_with_a_client_attached_and_io_in_flight_takes_less_than_a_second() {
    let mut rig = Rig::start("model:ram,size=64M,latency=20ms", &[("a", "")]);
    let (_front_end, mut guest) = rig.running_guest("a");
    for sector in 0..64 {
        let mut request = SimRequest::new(request_type::OUT, sector, 512, false);
        request.direct = Some(0); // one descriptor each
        guest.driver.submit(&request, &[1; 512]).unwrap();
    }
    guest.driver.publish();
    let start = Instant::now();
    let server = rig.server.take().unwrap();
    let report = server.stop().unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "{:?}",
        start.elapsed()
    );
    assert!(!rig.folder.join("a").exists(), "the socket was left behind");
    assert!(report.contains("iommu violations 0"), "{report}");
}

/// Counts what one thread allocates, and passes everything on.
struct CountingAllocator;

/// The thread whose allocations count; 0 is none.
static COUNTED_THREAD: AtomicI32 = AtomicI32::new(0);
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

fn count_allocation() {
    let counted = COUNTED_THREAD.load(Ordering::Relaxed);
    // SAFETY: gettid has no preconditions.
    if counted != 0 && unsafe { libc::gettid() } == counted {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
    }
}

// SAFETY: everything is the system allocator's; counting touches no memory but two atomics.
unsafe impl GlobalAlloc for CountingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        count_allocation();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.dealloc(at, layout) }
    }

    unsafe fn realloc(&self, at: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        count_allocation();
        // SAFETY: the caller's contract is passed on.
        unsafe { System.realloc(at, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: CountingAllocator = CountingAllocator;

/// Runs `test` in a process of its own, where the only reactor is its own. `name` is the test that calls this.
fn alone(name: &str, test: impl FnOnce()) {
    if std::env::var_os("TANDEM_TEST_ALONE").is_some() {
        return test();
    }
    let child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture", "--test-threads=1"])
        .env("TANDEM_TEST_ALONE", "1")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&child.stdout);
    let errors = String::from_utf8_lossy(&child.stderr);
    assert!(child.status.success(), "{output}{errors}");
    assert!(
        output.contains("1 passed"),
        "the test did not run: {output}"
    );
}

/// The one reactor thread of this process.
fn reactor_thread() -> i32 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let reactors = tasks.filter_map(|task| {
        let task = task.unwrap();
        let name = std::fs::read_to_string(task.path().join("comm")).unwrap();
        name.starts_with("reactor-")
            .then(|| task.file_name().to_str().unwrap().parse().unwrap())
    });
    let reactors: Vec<i32> = reactors.collect();
    assert_eq!(reactors.len(), 1);
    reactors[0]
}

/// Requests of every kind, in batches: aligned and not, larger than one command, refused ones; signals wanted or not.
fn work_hard(guest: &mut Guest, rounds: u64) {
    for round in 0..rounds {
        if round % 2 == 0 {
            guest.driver.enable_signals();
        } else {
            guest.driver.disable_signals();
        }
        let mut sent = 0;
        for i in 0..8 {
            let sector = (round * 8 + i) % 64 * 128;
            let mut request = match i {
                0 | 1 => SimRequest::new(request_type::IN, sector, 4096, true),
                2 => SimRequest::new(request_type::OUT, sector, 32 << 10, false),
                3 => SimRequest::new(request_type::FLUSH, 0, 0, false),
                4 => SimRequest::new(request_type::GET_ID, 0, 20, true),
                5 => SimRequest::new(request_type::IN, 1 << 40, 512, true),
                6 => SimRequest::new(99, 0, 0, false),
                _ => SimRequest::new(request_type::OUT, sector, 8192, false),
            };
            request.direct = Some(0);
            if i == 7 {
                request.data_offset = 1; // bounced
            }
            sent += usize::from(guest.driver.submit(&request, &[]).is_some());
        }
        assert_eq!(sent, 8);
        guest.driver.publish();
        for _ in 0..sent {
            guest.wait();
        }
    }
}

/// A server with a guest on it whose small commands make requests split.
fn busy_guest() -> (Rig, FrontEnd, Guest, (File, File)) {
    let rig = Rig::start("model:ram,size=64M,mdts=8K", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let guest = Guest::new(64, 0);
    let descriptors = guest.start(&front_end, 0, FEATURES);
    (rig, front_end, guest, descriptors)
}

#[test]
fn report_says_where_the_time_of_sampled_requests_went() {
    let (rig, _front_end, mut guest, _descriptors) = busy_guest();
    let start = Instant::now();
    // One turn in a thousand looks for a request to time.
    let [sampled, signalled] = loop {
        work_hard(&mut guest, 20);
        let report = rig.report();
        let (_, stages) = report.split_once(" sampled ").expect("a table of stages");
        let row: Vec<&str> = stages.lines().nth(1).unwrap().split_whitespace().collect();
        // Disk, virtqueue, samples, then p50 and p99 of submit, device, used, signal.
        assert_eq!(row.len(), 11, "{report}");
        let count = row[2].replace(',', "").parse::<u64>().unwrap();
        if count >= 20 || start.elapsed() > Duration::from_secs(60) {
            let time = |column: usize| row[column].replace(',', "").parse::<u64>().unwrap_or(0);
            for column in [3, 5, 7] {
                assert!((4..1_000_000_000).contains(&time(column)), "{report}");
            }
            break [count, time(9)];
        }
    };
    assert!(sampled >= 20, "{sampled} samples");
    // Half of the rounds want none.
    assert!(signalled < 1_000_000_000);
}

#[test]
fn reactor_under_load_allocates_nothing() {
    alone("reactor_under_load_allocates_nothing", || {
        let (rig, _front_end, mut guest, _descriptors) = busy_guest();
        work_hard(&mut guest, 10);
        COUNTED_THREAD.store(reactor_thread(), Ordering::Relaxed);
        work_hard(&mut guest, 500);
        COUNTED_THREAD.store(0, Ordering::Relaxed);
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 0);
        // The count counts: this thread allocates.
        // SAFETY: gettid has no preconditions.
        COUNTED_THREAD.store(unsafe { libc::gettid() }, Ordering::Relaxed);
        drop(std::hint::black_box(vec![0_u8; 100]));
        COUNTED_THREAD.store(0, Ordering::Relaxed);
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), 2);
        let report = rig.report();
        assert!(report.contains("iommu violations 0"), "{report}");
    });
}

#[test]
fn reactor_under_load_makes_no_system_call_but_writes_to_eventfds() {
    let name = "reactor_under_load_makes_no_system_call_but_writes_to_eventfds";
    alone(name, || {
        let (rig, _front_end, mut guest, _descriptors) = busy_guest();
        work_hard(&mut guest, 10);
        let trace = rig.folder.join("trace");
        let mut strace = Command::new("strace")
            .args(["-y", "-o"])
            .arg(&trace)
            .args(["-p", &reactor_thread().to_string()])
            .stderr(Stdio::piped())
            .spawn()
            .expect("this test needs strace (scripts/dev test installs it)");
        // It says that it is attached; whatever else it says is why not.
        let mut said = String::new();
        let mut errors = BufReader::new(strace.stderr.as_mut().unwrap());
        errors.read_line(&mut said).unwrap();
        assert!(said.contains("attached"), "{said}");
        work_hard(&mut guest, 300);
        let pid = i32::try_from(strace.id()).unwrap();
        // SAFETY: sends a signal to a child that was not waited for yet; strace detaches then.
        assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
        strace.wait().unwrap();
        let trace = std::fs::read_to_string(trace).unwrap();
        let is_signal = |line: &&str| {
            line.starts_with("write(")
                && line.contains("<anon_inode:[eventfd]>")
                && line.ends_with("= 8")
        };
        let calls: Vec<&str> = trace
            .lines()
            .filter(|line| !line.contains("detached"))
            .collect();
        let others: Vec<&&str> = calls.iter().filter(|line| !is_signal(line)).collect();
        assert!(others.is_empty(), "{others:?}");
        // 150 rounds wanted signals, and no round is told more often than it has requests.
        assert!((50..=1200).contains(&calls.len()), "{} writes", calls.len());
    });
}

// ---- SCSI hosts ----

/// Where a command is: its header, and its response.
const COMMAND: u64 = BASE + MEMORY - 0x1_0000;

/// Offers TEST UNIT READY for LUN 0 of target 0, at a head.
fn offer_test_unit_ready(guest: &mut SimGuest, head: u16) {
    let at = COMMAND + u64::from(head) * 0x200;
    let mut header = [0; 51];
    header[..3].copy_from_slice(&[1, 0, 0x40]);
    guest.write(Gpa(at), &header);
    let descriptor = |gpa, len, flags| RawDescriptor {
        gpa,
        len,
        flags,
        next: head + 1,
    };
    guest.write_descriptor(head, descriptor(at, 51, 1));
    guest.write_descriptor(head + 1, descriptor(at + 0x100, 108, 2));
    guest.offer(head);
    guest.publish();
}

/// The head of the command that comes back, and its status.
fn ended(guest: &mut SimGuest) -> (u32, u8) {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        if let Some((head, len)) = guest.take_used() {
            assert_eq!(len, 108);
            let mut status = [0];
            let at = COMMAND + u64::from(head) * 0x200 + 0x100;
            guest.read(Gpa(at + 10), &mut status);
            return (head, status[0]);
        }
        assert!(Instant::now() < deadline, "no answer");
        std::thread::yield_now();
    }
}

#[test]
fn scsi_host_is_negotiated_as_qemu_does_it() {
    let rig = Rig::start_with(
        "model:ram,size=64M,namespaces=2",
        &[],
        &[("s", ",queues=3,lun=0:0:ns1,lun=5:7:ns2")],
        Polling::Always,
    );
    let front_end = rig.connect("s");
    let (features, protocol) = front_end.negotiate();
    // HOTPLUG, CHANGE, ...
    for bit in [1, 2, 28, 29, 30, 32, 34] {
        assert_ne!(features & (1 << bit), 0, "feature bit {bit}");
    }
    // INOUT, T10_PI; RING_RESET.
    for bit in [0, 3, 33, 40] {
        assert_eq!(features & (1 << bit), 0, "feature bit {bit}");
    }
    // No CONFIG: the configuration space is QEMU's.
    assert_eq!(protocol, 1 << 0 | 1 << 3 | 1 << 5 | 1 << 13 | 1 << 15);
    assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 5);
    // QEMU passes a bit on that was not offered: NOTIFY_ON_EMPTY.
    let mut guest = Guest::new(64, 0);
    front_end.share((FEATURES & !F_FLUSH) | 1 << 2 | 1 << 24, &guest.shared);
    // All but the last step of a start, with a request in the ring: it waits.
    let config = guest.driver.virtqueue_config();
    let [descriptor, used, avail] = [config.descriptor_table, config.used, config.avail]
        .map(|at| guest.shared.user_address(at));
    let kick = eventfd();
    let set_up = |index: u32, base: u32| {
        front_end.send(SET_VRING_NUM, &vring_state(index, 64), &[]);
        front_end.send(SET_VRING_BASE, &vring_state(index, base), &[]);
        let addresses = vring_addr(index, descriptor, used, avail);
        front_end.send(SET_VRING_ADDR, &addresses, &[]);
        let which = u64::from(index).to_le_bytes();
        front_end.send(SET_VRING_KICK, &which, &[kick.as_fd()]);
    };
    let enable = |index| {
        let enabled = front_end.acknowledged(SET_VRING_ENABLE, &vring_state(index, 1), &[]);
        assert_eq!(enabled, Some(0));
    };
    set_up(3, 0);
    offer_test_unit_ready(&mut guest.driver, 0);
    assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 5);
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(guest.driver.take_used(), None);
    enable(3);
    // The initiator is new: CHECK CONDITION with a unit attention, then all is well.
    assert_eq!(ended(&mut guest.driver), (0, 2));
    offer_test_unit_ready(&mut guest.driver, 2);
    assert_eq!(ended(&mut guest.driver), (2, 0));
    // Nothing has happened: the event queue keeps its buffers, and stands where it stood.
    set_up(1, 9);
    enable(1);
    for (index, base) in [(1, 9), (3, 2)] {
        let answer = front_end.ask(GET_VRING_BASE, &vring_state(index, 0));
        assert_eq!(answer, vring_state(index, base));
    }
    // A virtqueue beyond the last ends the connection.
    front_end.send(SET_VRING_NUM, &vring_state(5, 64), &[]);
    assert!(front_end.is_closed());
    // The next front-end is a new initiator again.
    let again = rig.connect("s");
    again.negotiate();
    let mut guest = Guest::new(64, 0);
    guest.start(&again, 2, FEATURES);
    offer_test_unit_ready(&mut guest.driver, 0);
    assert_eq!(ended(&mut guest.driver), (0, 2));
}
