//! Disks that get another size while front-ends are connected: by an asynchronous event of the controller, as an SSD sends it.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use nvme_driver::spec::Nsid;

use super::*;

/// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, version 1, without a payload or a wish for an answer: 12 bytes, little-endian.
const CONFIG_CHANGE: [u8; 12] = [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];

/// Sectors of a disk of so many MiB.
const fn sectors(mib: u64) -> u64 {
    mib << 11
}

fn capacity(front_end: &FrontEnd) -> u64 {
    let answer = front_end.ask(GET_CONFIG, &config_request(0, 60));
    u64::from_le_bytes(answer[12..20].try_into().unwrap())
}

/// Gives the server a second channel: this end of it.
fn backend_channel(front_end: &FrontEnd) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let answer = front_end.acknowledged(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    assert_eq!(answer, Some(0));
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    ours
}

#[track_caller]
fn is_told(mut channel: &UnixStream) {
    let mut message = [0; 12];
    channel.read_exact(&mut message).unwrap();
    assert_eq!(message, CONFIG_CHANGE);
}

/// For longer than the server waits before it says anything.
fn hears_nothing(mut channel: &UnixStream) -> bool {
    channel
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let nothing = channel.read(&mut [0]).is_err();
    channel
        .set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    nothing
}

/// Waits for the front-end to be told otherwise.
#[track_caller]
fn becomes(front_end: &FrontEnd, expected: u64) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while capacity(front_end) != expected {
        assert!(Instant::now() < deadline, "{}", capacity(front_end));
        std::thread::sleep(Duration::from_millis(10));
    }
}

impl Rig {
    fn resize(&self, mib: u64) {
        let model = self.server.as_ref().unwrap().model("d0").unwrap();
        assert_eq!(model.resize(Nsid(1), mib << 20).unwrap(), mib << 20);
    }
}

impl Guest {
    fn status_of_read(&mut self, sector: u64) -> u8 {
        self.status_of_read_of(sector, 512)
    }

    fn status_of_read_of(&mut self, sector: u64, len: u32) -> u8 {
        let request = SimRequest::new(request_type::IN, sector, len, true);
        self.driver.submit(&request, &[]).unwrap();
        self.driver.publish();
        self.wait().status
    }
}

#[test]
fn disk_that_grows_is_told_of_and_its_new_blocks_are_there() {
    for block in [512, 4096] {
        let device = format!("model:ram,size=8M,block={block}");
        let rig = Rig::start(&device, &[("a", ",queues=2")]);
        let front_end = rig.connect("a");
        front_end.negotiate();
        let channel = backend_channel(&front_end);
        assert_eq!(capacity(&front_end), sectors(8));
        let mut guest = Guest::new(64, 0);
        guest.start(&front_end, 1, FEATURES);
        let last = u64::from(block >> 9);
        assert_eq!(
            guest.status_of_read_of(sectors(8) - last, block),
            status::OK
        );
        assert_eq!(guest.status_of_read_of(sectors(8), block), status::IOERR);
        // Twice: it goes on from what the front-end knows.
        for (before, now) in [(8, 12), (12, 100)] {
            rig.resize(now);
            is_told(&channel);
            // What is told is in force by then.
            assert_eq!(guest.write(sectors(now) - 16, &[0xa5; 8192]), status::OK);
            assert_eq!(guest.read(sectors(now) - 8, 4096), [0xa5; 4096]);
            assert_eq!(guest.read(sectors(before) - 8, 8192)[4096..], [0; 4096]);
            assert_eq!(guest.status_of_read_of(sectors(now), block), status::IOERR);
            assert!(hears_nothing(&channel));
            assert_eq!(capacity(&front_end), sectors(now));
        }
        assert!(hears_nothing(&channel));
    }
}

#[test]
fn disk_that_shrinks_is_told_of_and_one_that_is_no_disk_any_more_is_not() {
    let rig = Rig::start("model:ram,size=8M", &[("a", "")]);
    let model = rig.server.as_ref().unwrap().model("d0").unwrap();
    let front_end = rig.connect("a");
    front_end.negotiate();
    let channel = backend_channel(&front_end);
    assert_eq!(capacity(&front_end), sectors(8));
    let mut guest = Guest::new(64, 0);
    guest.start(&front_end, 0, FEATURES);
    assert!(model.cut_off(Nsid(1), sectors(4)));
    // Whether the server knows of it yet or not.
    assert_eq!(guest.status_of_read(sectors(4)), status::IOERR);
    is_told(&channel);
    assert_eq!(capacity(&front_end), sectors(4));
    assert_eq!(guest.status_of_read(sectors(4) - 1), status::OK);
    assert!(model.cut_off(Nsid(1), 0));
    // Longer than the server looks away from its devices.
    std::thread::sleep(Duration::from_millis(700));
    assert!(hears_nothing(&channel));
    assert_eq!(capacity(&front_end), sectors(4));
    assert_eq!(guest.status_of_read(0), status::IOERR);
    // It is a disk again.
    rig.resize(8);
    is_told(&channel);
    assert_eq!(capacity(&front_end), sectors(8));
    assert_eq!(guest.status_of_read(sectors(8) - 1), status::OK);
}

#[test]
fn disk_that_grows_is_told_of_while_a_request_takes_its_time() {
    let rig = Rig::start("model:ram,size=8M,latency=4s", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let channel = backend_channel(&front_end);
    assert_eq!(capacity(&front_end), sectors(8));
    let mut guest = Guest::new(64, 0);
    guest.start(&front_end, 0, FEATURES);
    let request = SimRequest::new(request_type::IN, 0, 512, true);
    guest.driver.submit(&request, &[]).unwrap();
    guest.driver.publish();
    rig.resize(16);
    is_told(&channel);
    assert_eq!(capacity(&front_end), sectors(16));
    assert!(guest.driver.poll_used().is_none());
    assert_eq!(guest.wait().status, status::OK);
    assert_eq!(guest.status_of_read(sectors(16) - 1), status::OK);
}

/// The event is lost with the reset, or has been dealt with before it.
#[test]
fn disk_that_grows_while_its_controller_breaks_is_told_of() {
    let rig = Rig::start("model:ram,size=8M", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let channel = backend_channel(&front_end);
    assert_eq!(capacity(&front_end), sectors(8));
    let mut guest = Guest::new(64, 0);
    guest.start(&front_end, 0, FEATURES);
    rig.resize(16);
    let model = rig.server.as_ref().unwrap().model("d0").unwrap();
    model.break_down();
    is_told(&channel);
    assert_eq!(guest.status_of_read(sectors(16) - 1), status::OK);
    assert_eq!(capacity(&front_end), sectors(16));
    let deadline = Instant::now() + Duration::from_secs(10);
    while !rig.report().contains("serving, resets 1,") {
        assert!(Instant::now() < deadline, "{}", rig.report());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(guest.status_of_read(sectors(16) - 1), status::OK);
}

/// As QEMU that connects again, after the server was started with a larger disk: it does not ask.
#[test]
fn front_end_that_does_not_know_the_size_is_told_once_its_queues_run() {
    let rig = Rig::start("model:ram,size=8M", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let channel = backend_channel(&front_end);
    let guest = Guest::new(64, 0);
    assert!(hears_nothing(&channel));
    guest.start(&front_end, 0, FEATURES);
    is_told(&channel);
    // It may have its reasons not to ask.
    assert!(hears_nothing(&channel));
    assert_eq!(capacity(&front_end), sectors(8));
    assert!(hears_nothing(&channel));
}

#[test]
fn front_end_that_cannot_be_told_is_served_with_the_new_size() {
    let rig = Rig::start("model:ram,size=8M", &[("a", "")]);
    // Without a second channel, and with one that is closed again.
    for (closed, before, now) in [(false, 8, 16), (true, 16, 32)] {
        let front_end = rig.connect("a");
        front_end.negotiate();
        if closed {
            drop(backend_channel(&front_end));
        }
        assert_eq!(capacity(&front_end), sectors(before));
        let mut guest = Guest::new(64, 0);
        guest.start(&front_end, 0, FEATURES);
        rig.resize(now);
        becomes(&front_end, sectors(now));
        assert_eq!(guest.status_of_read(sectors(now) - 1), status::OK);
        // For longer than the server waits before it tells anybody.
        std::thread::sleep(Duration::from_millis(200));
        assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 1);
    }
    // Another file is none.
    let front_end = rig.connect("a");
    front_end.negotiate();
    let file = memfd(4096);
    let answer = front_end.acknowledged(SET_BACKEND_REQ_FD, &[], &[file.as_fd()]);
    assert_ne!(answer, Some(0));
}

#[test]
fn front_end_that_does_not_read_its_second_channel_holds_up_nothing_and_is_told_when_it_does() {
    let rig = Rig::start("model:ram,size=8M", &[("a", "")]);
    let front_end = rig.connect("a");
    front_end.negotiate();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let filler = theirs.try_clone().unwrap();
    let theirs = OwnedFd::from(theirs);
    let answer = front_end.acknowledged(SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]);
    assert_eq!(answer, Some(0));
    filler.set_nonblocking(true).unwrap();
    let mut filled = 0;
    while let Ok(len) = (&filler).write(&[0; 4096]) {
        filled += len;
    }
    // Not for the server, which has it too.
    filler.set_nonblocking(false).unwrap();
    assert_eq!(capacity(&front_end), sectors(8));
    let mut guest = Guest::new(64, 0);
    guest.start(&front_end, 0, FEATURES);
    rig.resize(16);
    let deadline = Instant::now() + Duration::from_secs(10);
    while guest.status_of_read(sectors(16) - 1) != status::OK {
        assert!(Instant::now() < deadline);
    }
    std::thread::sleep(Duration::from_millis(200));
    assert_eq!(front_end.ask_u64(GET_QUEUE_NUM), 1);
    let mut filling = vec![1; filled];
    ours.read_exact(&mut filling).unwrap();
    ours.set_read_timeout(Some(Duration::from_secs(10)))
        .unwrap();
    is_told(&ours);
    assert_eq!(capacity(&front_end), sectors(16));
}
