//! The built server with real Linux guests, which drive their disks with their own virtio_blk.
//!
//! Needs QEMU and what a guest boots from: `scripts/dev test` sees to both. Guests are emulated, so that KVM is not
//! needed, and run one test at a time. What a job may say is in `scripts/guest/job.sh`.
#![allow(clippy::unwrap_used)]

#[path = "guest/conformance.rs"]
mod conformance;
#[path = "guest/devices.rs"]
mod devices;
#[path = "guest/firmware.rs"]
mod firmware;
#[path = "common/guest.rs"]
mod guest;
#[path = "guest/hotplug.rs"]
mod hotplug;
#[path = "common/lab.rs"]
mod lab;
#[path = "common/report.rs"]
mod report;
#[path = "guest/resize.rs"]
mod resize;
#[path = "common/server.rs"]
mod server;
#[path = "guest/slow.rs"]
mod slow;
#[path = "guest/thousand.rs"]
mod thousand;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use guest::{Guest, Setup};
use lab::{Lab, eventually};
use report::Report;
use server::Server;

/// Virtual I/O Device 1.2, "Feature bits" of the block device and "Reserved Feature Bits".
const F_RO: usize = 5;
const F_FLUSH: usize = 9;
const F_MQ: usize = 12;
const F_DISCARD: usize = 13;
const F_INDIRECT_DESC: usize = 28;
const F_EVENT_IDX: usize = 29;
const F_VERSION_1: usize = 32;
const F_RING_PACKED: usize = 34;

/// Both check every block that they read: fio its own marks, the file system files against their SHA-256 sums.
const VERIFY: &str = "facts vda\nstep verify fio_verify /dev/vda 4 8m";

/// Whether the guest's driver negotiated a feature, from the `features` that the guest told.
fn has_feature(facts: &HashMap<String, String>, disk: &str, bit: usize) -> bool {
    facts[&format!("{disk}.features")].as_bytes()[bit] == b'1'
}

fn facts_of(lab: &Lab, disk: &str, job: &str) -> HashMap<String, String> {
    Guest::boot(lab, &Setup::new(&[disk], job)).ends_well()
}

#[track_caller]
fn assert_each_virtqueue_used_its_own_queue_pair(report: &Report, virtqueues: usize) {
    let pairs: HashSet<u64> = report.queues.iter().map(|queue| queue.get("qp")).collect();
    assert_eq!(
        (report.queues.len(), pairs.len()),
        (virtqueues, virtqueues),
        "{report:?}"
    );
    for queue in &report.queues {
        assert!(
            queue.get("commands") > 0 && queue.get("notifications") > 0,
            "idle: {queue:?}"
        );
    }
}

#[test]
fn four_queues_with_a_file_system_and_fio_lose_nothing() {
    let lab = Lab::new("four");
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=1G",
            "--blk",
            "path=vm0.sock,queues=4",
        ],
    );
    let job = "
        facts vda
        step partition sh -c 'printf \"size=256MiB\\n,\\n\" | sfdisk -q /dev/vda'
        step mkfs mkfs.ext4 -q /dev/vda1
        step mount mount -t ext4 /dev/vda1 /mnt
        step write sh -c 'mkdir /mnt/f && for i in $(seq 16); do dd if=/dev/urandom of=/mnt/f/$i bs=64k count=$i; done'
        step sums sh -c 'cd /mnt/f && sha256sum * >/mnt/sums'
        step sync sync
        step umount umount /mnt
        step 'mount again' mount -t ext4 /dev/vda1 /mnt
        step check sh -c 'cd /mnt/f && sha256sum -c /mnt/sums'
        step remove rm -r /mnt/f
        step fstrim fstrim -v /mnt
        step 'umount again' umount /mnt
        step fsck e2fsck -fn /dev/vda1
        step discard /tools/bin/blkdiscard /dev/vda2
        step zeroes /tools/bin/blkdiscard -z -l 67108864 /dev/vda2
        step 'read zeroes' sh -c 'head -c 67108864 /dev/vda2 | cmp -n 67108864 - /dev/zero'
        fact before-fio yes
        step verify fio_verify /dev/vda2 4 16m";
    let mut guest = Guest::boot(&lab, &Setup::new(&["vm0.sock,num-queues=4"], job));
    guest.tells("before-fio");
    let before = server.report();
    let facts = guest.ends_well();
    for (key, value) in [
        ("bytes", "1073741824"),
        ("block", "512"),
        ("ro", "0"),
        ("serial", "d0-ns1"),
        ("queues", "4"),
        ("cache", "write back"),
    ] {
        assert_eq!(facts[&format!("vda.{key}")], value, "{key}");
    }
    for bit in [
        F_FLUSH,
        F_MQ,
        F_DISCARD,
        F_INDIRECT_DESC,
        F_EVENT_IDX,
        F_VERSION_1,
    ] {
        assert!(has_feature(&facts, "vda", bit), "feature bit {bit}");
    }
    let report = server.end_well();
    assert_each_virtqueue_used_its_own_queue_pair(&report, 4);
    // fstrim, mkfs and blkdiscard; sync and mkfs; blkdiscard -z.
    assert!(
        before.total("discards") > 0 && before.total("flushes") > 0 && before.total("zeroes") > 0,
        "{before:?}"
    );
    assert_eq!(report.total("ids"), 1);
    // fio reads and writes 16 MiB in all for each job, then reads back what it wrote.
    let moved = |report: &Report| report.total("bytes read") + report.total("bytes written");
    assert!(moved(&report) - moved(&before) > 64 << 20, "{report:?}");
    // A request of 128 KiB that is not aligned to a page takes more PRPs than one command of the controller's limit.
    assert!(
        report.total("commands") >= report.total("reads") + report.total("writes"),
        "{report:?}"
    );
}

#[test]
fn one_queue_without_event_idx_loses_nothing() {
    let lab = Lab::new("one");
    let server = Server::start(
        &lab,
        &["--device", "model:ram,size=256M", "--blk", "path=vm0.sock"],
    );
    let facts = facts_of(&lab, "vm0.sock,num-queues=1,event_idx=off", VERIFY);
    assert_eq!(facts["vda.queues"], "1");
    assert!(
        !has_feature(&facts, "vda", F_EVENT_IDX) && has_feature(&facts, "vda", F_INDIRECT_DESC)
    );
    assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), 1);
}

#[test]
fn direct_descriptors_in_small_rings_lose_nothing() {
    let lab = Lab::new("direct");
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=256M",
            "--blk",
            "path=vm0.sock,queues=4",
        ],
    );
    let facts = facts_of(
        &lab,
        "vm0.sock,num-queues=4,indirect_desc=off,queue-size=32",
        VERIFY,
    );
    assert!(
        !has_feature(&facts, "vda", F_INDIRECT_DESC) && has_feature(&facts, "vda", F_EVENT_IDX)
    );
    assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), 4);
}

/// A file system with files that are summed up and read again, then fio.
const FILES_AND_VERIFY: &str = "
    facts vda
    step mkfs mkfs.ext4 -q /dev/vda
    step mount mount -t ext4 /dev/vda /mnt
    step write sh -c 'mkdir /mnt/f && for i in $(seq 8); do dd if=/dev/urandom of=/mnt/f/$i bs=64k count=$i; done'
    step sums sh -c 'cd /mnt/f && sha256sum * >/mnt/sums'
    step umount umount /mnt
    step 'mount again' mount -t ext4 /dev/vda /mnt
    step check sh -c 'cd /mnt/f && sha256sum -c /mnt/sums'
    step fstrim fstrim -v /mnt
    step 'umount again' umount /mnt
    step fsck e2fsck -fn /dev/vda
    step verify fio_verify /dev/vda 4 8m";

#[test]
fn packed_rings_of_any_kind_lose_nothing() {
    for (name, queues, more, absent) in [
        ("packed-4", 4, "", None),
        ("packed-1", 1, ",event_idx=off", Some(F_EVENT_IDX)),
        (
            "packed-direct",
            4,
            ",indirect_desc=off,queue-size=128",
            Some(F_INDIRECT_DESC),
        ),
    ] {
        let lab = Lab::new(name);
        let blk = format!("path=vm0.sock,queues={queues}");
        let device = ["--device", "model:ram,size=256M", "--blk", &blk];
        let server = Server::start(&lab, &device);
        let disk = format!("vm0.sock,num-queues={queues},packed=on{more}");
        let facts = facts_of(&lab, &disk, FILES_AND_VERIFY);
        assert_eq!(facts["vda.queues"], queues.to_string());
        assert!(has_feature(&facts, "vda", F_RING_PACKED), "{name}");
        for bit in [F_EVENT_IDX, F_INDIRECT_DESC] {
            let wanted = absent != Some(bit);
            assert_eq!(has_feature(&facts, "vda", bit), wanted, "{name}: {bit}");
        }
        assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), queues);
    }
}

/// At most 2 % of a core while guests do nothing, and nothing lost before, meanwhile or after.
#[test]
fn server_that_sleeps_leaves_its_core_to_others_while_guests_are_idle() {
    const IDLE: Duration = Duration::from_secs(10);
    let lab = Lab::new("adaptive");
    let server = Server::start(
        &lab,
        &[
            "--poll",
            "adaptive",
            "--device",
            "model:ram,size=256M,name=ram",
            "--blk",
            "path=vm0.sock,queues=4,device=ram",
            "--device",
            "model:file,path=disk.img,size=256M,name=file",
            "--blk",
            "path=vm1.sock,queues=2,device=file",
        ],
    );
    let job = "
        facts vda
        facts vdb
        step 'verify split' fio_verify /dev/vda 4 4m
        step mkfs mkfs.ext4 -q /dev/vdb
        step mount mount -t ext4 /dev/vdb /mnt
        step write sh -c 'mkdir /mnt/f && for i in $(seq 8); do dd if=/dev/urandom of=/mnt/f/$i bs=64k count=$i; done'
        step sums sh -c 'cd /mnt/f && sha256sum * >/mnt/sums'
        step umount umount /mnt
        fact idle yes
        sleep 14
        fact awake yes
        step 'mount again' mount -t ext4 /dev/vdb /mnt
        step check sh -c 'cd /mnt/f && sha256sum -c /mnt/sums'
        step 'umount again' umount /mnt
        step fsck e2fsck -fn /dev/vdb
        step 'verify split again' fio_verify /dev/vda 4 4m
        step 'verify packed' fio_verify /dev/vdb 2 2m
        step 'one by one' sh -c 'for i in $(seq 20); do dd if=/dev/vda of=/dev/null bs=4k count=1 skip=$i iflag=direct; sleep 0.1; done'";
    let disks = ["vm0.sock,num-queues=4", "vm1.sock,num-queues=2,packed=on"];
    let mut guest = Guest::boot(&lab, &Setup::new(&disks, job));
    guest.tells("idle");
    std::thread::sleep(Duration::from_secs(1));
    let before = server.cpu_time();
    std::thread::sleep(IDLE);
    let used = server.cpu_time() - before;
    assert!(
        used <= IDLE / 50,
        "{used:?} of a core in {IDLE:?} of nothing"
    );
    server.report();
    let idle = server.sleeps();
    guest.tells("awake");
    let facts = guest.ends_well();
    assert!(
        has_feature(&facts, "vdb", F_RING_PACKED) && !has_feature(&facts, "vda", F_RING_PACKED)
    );
    server.report();
    let sleeps = server.sleeps();
    // The reads one by one each found it asleep.
    assert!(
        sleeps.kicks >= idle.kicks + 20 && sleeps.sleeps >= sleeps.kicks,
        "{idle:?} {sleeps:?}"
    );
    // Those of the image file's workers, and the front-end's comings and goings.
    assert!(sleeps.interrupts > 0 && sleeps.messages > 0, "{sleeps:?}");
    let report = server.end_well();
    assert_eq!(report.queues.len(), 6);
    let used = |queue: &report::Queue| queue.get("commands") > 0 && queue.get("notifications") > 0;
    assert!(report.queues.iter().all(used), "{report:?}");
}

#[test]
fn slow_controller_with_small_queues_and_commands_loses_nothing() {
    let lab = Lab::new("slow");
    let device = "model:ram,size=256M,mqes=8,mdts=8K,latency=100us,jitter=200us";
    let server = Server::start(
        &lab,
        &["--device", device, "--blk", "path=vm0.sock,queues=4"],
    );
    facts_of(&lab, "vm0.sock,num-queues=4,queue-size=1024", VERIFY);
    let report = server.end_well();
    assert_each_virtqueue_used_its_own_queue_pair(&report, 4);
    assert!(
        report.total("split") > 0 && report.total("CQ doorbells") > 0,
        "{report:?}"
    );
}

#[test]
fn more_virtqueues_than_queue_pairs_share_them_and_the_log_says_so() {
    let lab = Lab::new("shared");
    let device = "model:ram,size=256M,queues=2";
    let server = Server::start(
        &lab,
        &["--device", device, "--blk", "path=vm0.sock,queues=4"],
    );
    assert!(
        server.log().contains("more virtqueues than queue pairs"),
        "{}",
        server.log()
    );
    let facts = facts_of(&lab, "vm0.sock,num-queues=4", VERIFY);
    assert_eq!(facts["vda.queues"], "4");
    let report = server.end_well();
    let pairs: HashSet<u64> = report.queues.iter().map(|queue| queue.get("qp")).collect();
    assert_eq!((report.queues.len(), pairs.len()), (4, 2));
    assert!(
        report.queues.iter().all(|queue| queue.get("commands") > 0),
        "{report:?}"
    );
}

#[test]
fn blocks_of_4096_bytes_are_what_the_guest_sees_and_uses() {
    let lab = Lab::new("4096");
    let device = "model:ram,size=256M,block=4096";
    let server = Server::start(
        &lab,
        &[
            "--device",
            device,
            "--blk",
            "path=vm0.sock,queues=4,serial=four-k",
        ],
    );
    let job = "
        facts vda
        step 'no smaller reads' sh -c '! fio --name=small --filename=/dev/vda --direct=1 --rw=read --bs=512 --size=512'
        step mkfs mkfs.ext4 -q /dev/vda
        step mount mount -t ext4 /dev/vda /mnt
        step write dd if=/dev/urandom of=/mnt/file bs=64k count=64
        step umount umount /mnt
        step fsck e2fsck -fn /dev/vda
        step verify fio_verify /dev/vda 4 8m --bsrange=4k-128k";
    let facts = facts_of(&lab, "vm0.sock,num-queues=4", job);
    assert_eq!(
        (
            facts["vda.block"].as_str(),
            facts["vda.bytes"].as_str(),
            facts["vda.serial"].as_str()
        ),
        ("4096", "268435456", "four-k")
    );
    assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), 4);
}

#[test]
fn read_only_disk_is_read_and_never_written() {
    let lab = Lab::new("readonly");
    let image = lab.path("disk.img");
    let content: Vec<u8> = (0..4 << 20)
        .map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    fs::write(&image, &content).unwrap();
    let device = "model:file,path=disk.img";
    let server = Server::start(
        &lab,
        &[
            "--device",
            device,
            "--blk",
            "path=vm0.sock,queues=4,readonly=on",
        ],
    );
    let job = "
        facts vda
        step 'no writes' sh -c '! dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct'
        step 'no discards' sh -c '! /tools/bin/blkdiscard /dev/vda'
        fact sum \"$(sha256sum /dev/vda | cut -d ' ' -f 1)\"
        fact direct \"$(dd if=/dev/vda bs=96k iflag=direct 2>/dev/null | sha256sum | cut -d ' ' -f 1)\"";
    let facts = facts_of(&lab, "vm0.sock,num-queues=4", job);
    assert_eq!(
        (facts["vda.ro"].as_str(), has_feature(&facts, "vda", F_RO)),
        ("1", true)
    );
    let sum = sha256_of(&lab, "disk.img");
    assert_eq!((&facts["sum"], &facts["direct"]), (&sum, &sum));
    let report = server.end_well();
    assert_eq!(
        report.total("writes") + report.total("discards") + report.total("zeroes"),
        0
    );
    assert!(
        fs::read(&image).unwrap() == content,
        "the image was changed"
    );
}

/// By the same program as in the guest, so that the two are compared and not one with itself.
fn sha256_of(lab: &Lab, name: &str) -> String {
    let output = std::process::Command::new("sha256sum")
        .arg(lab.path(name))
        .output()
        .unwrap();
    String::from_utf8(output.stdout)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned()
}

#[test]
fn image_file_is_there_after_a_restart_of_the_server() {
    let lab = Lab::new("image");
    let arguments = [
        "--device",
        "model:file,path=disk.img,size=256M",
        "--blk",
        "path=vm0.sock,queues=4",
    ];
    let server = Server::start(&lab, &arguments);
    let job = "
        step mkfs mkfs.ext4 -q /dev/vda
        step mount mount -t ext4 /dev/vda /mnt
        step write sh -c 'for i in $(seq 8); do dd if=/dev/urandom of=/mnt/$i bs=64k count=32; done'
        fact sum \"$(cat /mnt/[1-8] | sha256sum)\"
        step umount umount /mnt";
    let before = facts_of(&lab, "vm0.sock,num-queues=4", job);
    assert!(server.end_well().total("flushes") > 0);
    // Where ext4 keeps its magic number: the image holds what the guest saw, in its order.
    let mut magic = [0; 2];
    fs::File::open(lab.path("disk.img"))
        .unwrap()
        .read_exact_at(&mut magic, 1024 + 0x38)
        .unwrap();
    assert_eq!(magic, 0xef53_u16.to_le_bytes());

    let server = Server::start(&lab, &arguments);
    let job = "
        step fsck e2fsck -fn /dev/vda
        step mount mount -t ext4 -o ro /dev/vda /mnt
        fact sum \"$(cat /mnt/[1-8] | sha256sum)\"";
    let after = facts_of(&lab, "vm0.sock,num-queues=4", job);
    assert_eq!(before["sum"], after["sum"]);
    server.end_well();
}

#[test]
fn reboot_with_requests_in_flight_keeps_what_was_synced() {
    reboot_keeps_what_was_synced("reboot", "vm0.sock,num-queues=4");
}

#[test]
fn reboot_with_requests_in_packed_rings_keeps_what_was_synced() {
    reboot_keeps_what_was_synced("packed-reboot", "vm0.sock,num-queues=4,packed=on");
}

fn reboot_keeps_what_was_synced(name: &str, disk: &str) {
    let lab = Lab::new(name);
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=256M",
            "--blk",
            "path=vm0.sock,queues=4",
        ],
    );
    let job = "
        if e2fsck -p /dev/vda; then
            fact boot second
            step mount mount -t ext4 /dev/vda /mnt
            step check sh -c 'cd /mnt && sha256sum -c sum'
            step verify fio_verify /mnt/space 4 4m
            exit
        fi
        step mkfs mkfs.ext4 -q /dev/vda
        step mount mount -t ext4 /dev/vda /mnt
        step write dd if=/dev/urandom of=/mnt/file bs=64k count=64
        step sum sh -c 'cd /mnt && sha256sum file >sum'
        step space dd if=/dev/zero of=/mnt/space bs=1M count=16
        step sync sync
        fio_verify /mnt/space 4 4m --time_based --runtime=60 >/dev/null 2>&1 &
        sleep 2
        fact boot first
        reboot -f";
    let disks = [disk];
    let setup = Setup {
        reboots: true,
        ..Setup::new(&disks, job)
    };
    let mut guest = Guest::boot(&lab, &setup);
    assert_eq!(guest.tells("boot"), "first");
    let first = server.report();
    assert_each_virtqueue_used_its_own_queue_pair(&first, 4);
    assert_eq!(guest.ends_well()["boot"], "second");
    // The queue pairs and their counters outlive the reset of the guest.
    let report = server.end_well();
    for (queue, first) in report.queues.iter().zip(&first.queues) {
        assert!(
            queue.get("commands") > first.get("commands"),
            "idle after the reboot: {queue:?}"
        );
        assert_eq!(queue.get("qp"), first.get("qp"));
    }
}

#[test]
fn driver_unbound_and_bound_again_negotiates_anew() {
    let lab = Lab::new("rebind");
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=256M",
            "--blk",
            "path=vm0.sock,queues=4",
        ],
    );
    let job = "
        facts vda
        for round in 1 2 3 4 5; do
            step 'verify' fio_verify /dev/vda 4 1m
            step 'mark' sh -c \"echo round $round | dd of=/dev/vda bs=4k conv=sync,fsync\"
            step unbind sh -c 'echo virtio0 >/sys/bus/virtio/drivers/virtio_blk/unbind'
            step 'disk gone' sh -c '! test -e /sys/block/vda'
            step bind sh -c 'echo virtio0 >/sys/bus/virtio/drivers/virtio_blk/bind'
            step 'mark there' grep -q \"round $round\" /dev/vda
        done
        step 'write through' sh -c 'echo write through >/sys/block/vda/cache_type'
        step 'takes effect' grep -q 'write through' /sys/block/vda/queue/write_cache
        step 'verify again' fio_verify /dev/vda 4 4m";
    facts_of(&lab, "vm0.sock,num-queues=4", job);
    assert!(
        server.log().contains("cache mode changed by the guest"),
        "{}",
        server.log()
    );
    assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), 4);
}

/// Writes and syncs a file, then keeps four queues busy for a long time.
const BUSY: &str = "
    step mkfs mkfs.ext4 -q /dev/vda
    step mount mount -t ext4 /dev/vda /mnt
    step write dd if=/dev/urandom of=/mnt/file bs=64k count=64
    fact sum \"$(sha256sum /mnt/file)\"
    step space dd if=/dev/zero of=/mnt/space bs=1M count=16
    step sync sync
    fio_verify /mnt/space 4 4m --time_based --runtime=300 >/dev/null 2>&1 &
    sleep 1
    fact busy yes
    wait";

/// The guest is busy, and the server sees that.
#[track_caller]
fn wait_until_busy(guest: &mut Guest, server: &Server) {
    guest.tells("busy");
    let before = server.report();
    eventually(Duration::from_secs(30), "every virtqueue is busy", || {
        let now = server.report();
        let mut both = now.queues.iter().zip(&before.queues);
        both.all(|(now, before)| now.get("commands") > before.get("commands"))
            .then_some(())
    });
}

#[test]
fn guest_that_crashes_with_requests_in_flight_leaves_the_disk_to_the_next() {
    let lab = Lab::new("crash");
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=256M",
            "--blk",
            "path=vm0.sock,queues=4",
        ],
    );
    let mut guest = Guest::boot(&lab, &Setup::new(&["vm0.sock,num-queues=4"], BUSY));
    wait_until_busy(&mut guest, &server);
    let sum = guest.tells("sum");
    drop(guest); // kills QEMU, as a crash would

    let job = "
        step fsck e2fsck -p /dev/vda
        step mount mount -t ext4 /dev/vda /mnt
        fact sum \"$(sha256sum /mnt/file)\"
        step umount umount /mnt
        step 'fsck again' e2fsck -fn /dev/vda
        step verify fio_verify /dev/vda 4 8m";
    assert_eq!(facts_of(&lab, "vm0.sock,num-queues=4", job)["sum"], sum);
    assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), 4);
}

#[test]
fn sigterm_with_a_busy_guest_ends_within_a_second_and_removes_the_sockets() {
    let lab = Lab::new("sigterm");
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=256M",
            "--blk",
            "path=vm0.sock,queues=4",
        ],
    );
    let mut guest = Guest::boot(&lab, &Setup::new(&["vm0.sock,num-queues=4"], BUSY));
    wait_until_busy(&mut guest, &server);
    assert!(lab.path("vm0.sock").exists());
    let end = server.end();
    assert!(end.status.success(), "{}", end.status);
    assert!(
        end.after < Duration::from_secs(1),
        "it took {:?}",
        end.after
    );
    assert!(!lab.path("vm0.sock").exists(), "the socket is still there");
    assert_eq!((end.iommu_violations, end.driver_errors), (0, 0));
    assert_each_virtqueue_used_its_own_queue_pair(&end.report, 4);
    drop(guest); // kills QEMU, as a crash would
}

#[test]
fn idle_guest_goes_on_after_a_crash_and_restart_of_the_server() {
    idle_guest_goes_on_after_a_crash("reconnect", "", "always");
}

#[test]
fn idle_guest_with_packed_rings_goes_on_after_a_crash_and_restart_of_the_server() {
    idle_guest_goes_on_after_a_crash("packed-reconnect", ",packed=on", "always");
}

#[test]
fn idle_guest_with_packed_rings_goes_on_after_its_server_crashed_asleep() {
    idle_guest_goes_on_after_a_crash("asleep-reconnect", ",packed=on", "adaptive");
}

#[test]
fn idle_guest_with_chains_in_packed_rings_goes_on_after_a_crash_and_restart_of_the_server() {
    let properties = ",packed=on,indirect_desc=off";
    idle_guest_goes_on_after_a_crash("packed-direct-reconnect", properties, "always");
}

fn idle_guest_goes_on_after_a_crash(name: &str, properties: &str, poll: &str) {
    let lab = Lab::new(name);
    let arguments = [
        "--poll",
        poll,
        "--device",
        "model:file,path=disk.img,size=256M",
        "--blk",
        "path=vm0.sock,queues=4",
    ];
    let server = Server::start(&lab, &arguments);
    let job = "
        step mkfs mkfs.ext4 -q /dev/vda
        step mount mount -t ext4 /dev/vda /mnt
        step write dd if=/dev/urandom of=/mnt/file bs=64k count=64
        step sum sh -c 'cd /mnt && sha256sum file >sum'
        step sync sync
        fact idle yes
        sleep 8
        echo 3 >/proc/sys/vm/drop_caches
        step check sh -c 'cd /mnt && sha256sum -c sum'
        step space dd if=/dev/zero of=/mnt/space bs=1M count=16
        step verify fio_verify /mnt/space 4 4m
        step umount umount /mnt
        step fsck e2fsck -fn /dev/vda";
    let disk = format!("vm0.sock,num-queues=4,reconnect=1{properties}");
    let disks = [disk.as_str()];
    let setup = Setup {
        // That the server has gone.
        complaints: &["end-of-file", "Failed to", "vhost"],
        ..Setup::new(&disks, job)
    };
    let mut guest = Guest::boot(&lab, &setup);
    guest.tells("idle");
    if poll == "adaptive" {
        std::thread::sleep(Duration::from_secs(1));
    }
    server.crash();
    let server = Server::start(&lab, &arguments);
    guest.ends_well();
    assert_each_virtqueue_used_its_own_queue_pair(&server.end_well(), 4);
}

#[test]
fn two_guests_on_two_namespaces_do_not_meet() {
    let lab = Lab::new("two");
    let disks = [
        "--blk",
        "path=a.sock,queues=2,ns=1,serial=a",
        "--blk",
        "path=b.sock,queues=2,ns=2,serial=b",
    ];
    let device = ["--device", "model:ram,size=512M,namespaces=2"];
    let server = Server::start(&lab, &[&device[..], &disks].concat());
    // Each fills the same blocks with its own name; after both have worked, each looks for the other's.
    let job = "
        facts vda
        name=$(cat /sys/block/vda/serial)
        step mark sh -c \"yes $name | head -c 1048576 | dd of=/dev/vda bs=64k oflag=direct iflag=fullblock\"
        step verify fio_verify /dev/vda 2 16m --offset=1m
        sleep 3
        step 'mark is mine' sh -c \"yes $name | head -c 1048576 | cmp -n 1048576 - /dev/vda\"
        step 'verify again' fio_verify /dev/vda 2 4m --offset=1m";
    let setup = |disk| Setup {
        cpus: 2,
        ..Setup::new(disk, job)
    };
    let a = Guest::boot(&lab, &setup(&["a.sock,num-queues=2"]));
    let b = Guest::boot(&lab, &setup(&["b.sock,num-queues=2"]));
    for (guest, serial) in [(a, "a"), (b, "b")] {
        let facts = guest.ends_well();
        assert_eq!(
            (facts["vda.serial"].as_str(), facts["vda.bytes"].as_str()),
            (serial, "268435456")
        );
    }
    let report = server.end_well();
    assert_each_virtqueue_used_its_own_queue_pair(&report, 4);
    let disks: HashSet<&str> = report
        .queues
        .iter()
        .map(|queue| queue.disk.as_str())
        .collect();
    assert_eq!(disks, HashSet::from(["a.sock", "b.sock"]));
}

#[test]
fn scsi_host_with_four_queues_and_two_disks_loses_nothing() {
    let lab = Lab::new("scsi");
    let server = Server::start(
        &lab,
        &[
            "--device",
            "model:ram,size=512M,namespaces=2",
            "--scsi",
            "path=vm0.sock,queues=4,lun=0:0:ns1,lun=1:300:ns2",
        ],
    );
    // The second disk has a LUN that only flat addressing reaches.
    let job = "
        step modules modprobe -a virtio_scsi sd_mod sg
        step 'disks are there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && [ -b /dev/sdb ] && break; sleep 0.1; done'
        step 'names in order, whichever was found first' sh -c 'cd /sys/bus/scsi/drivers/sd && for d in 0:0:0:0 0:0:1:16684; do echo $d >unbind; done; for d in 0:0:0:0 0:0:1:16684; do echo $d >bind; done'
        fact where.a $(ls -d /sys/block/sda/device/scsi_device/*)
        fact where.b $(ls -d /sys/block/sdb/device/scsi_device/*)
        fact bytes.a $(($(cat /sys/block/sda/size) * 512))
        fact queues.a $(find /sys/block/sda/mq -mindepth 1 -maxdepth 1 | wc -l)
        fact cache.a \"$(cat /sys/block/sda/queue/write_cache)\"
        fact fua.a $(cat /sys/block/sda/queue/fua)
        fact discard.a $(cat /sys/block/sda/queue/discard_max_bytes)
        fact serial.a \"$(sg_vpd -q -p sn /dev/sda | sed -n 's/.*number: //p')\"
        fact serial.b \"$(sg_vpd -q -p sn /dev/sdb | sed -n 's/.*number: //p')\"
        fact inquiry \"$(sg_inq /dev/sda | tr -s ' \\n' ' ')\"
        fact pages \"$(sg_vpd /dev/sda | tr -s ' \\n' ' ')\"
        fact designators \"$(sg_vpd -p di /dev/sda | tr -s ' \\n' ' ')\"
        fact limits \"$(sg_vpd -p bl /dev/sda | tr -s ' \\n' ' ')\"
        fact thin \"$(sg_vpd -p lbpv /dev/sda | tr -s ' \\n' ' ')\"
        fact luns.a \"$(sg_luns -q /dev/sda | tr -s ' \\n' ' ')\"
        fact luns.b \"$(sg_luns -q -s 2 /dev/sdb | tr -s ' \\n' ' ')\"
        fact capacity \"$(sg_readcap --16 /dev/sda | tr -s ' \\n' ' ')\"
        fact opcodes \"$(sg_opcodes -n /dev/sda | grep -cE '^ [0-9a-f][0-9a-f] ')\"
        fact read10 \"$(sg_opcodes -n -o 0x28 -m /dev/sda | tr -s ' \\n' ' ')\"
        fact modes \"$(sg_modes -6 /dev/sda | tr -s ' \\n' ' ')\"
        fact features \"$(sg_vpd -p ei /dev/sda | tr -s ' \\n' ' ')\"
        fact temperature \"$(sg_logs -p 0xd /dev/sda | tr -s ' \\n' ' ')\"
        fact wear \"$(sg_logs -p 0x11 /dev/sda | tr -s ' \\n' ' ')\"
        fact exceptions \"$(sg_logs -p 0x2f /dev/sda | tr -s ' \\n' ' ')\"
        fact logs \"$(sg_logs -L /dev/sda | tr -s ' \\n' ' ')\"
        fact lba.status \"$(sg_get_lba_status -l 1000 /dev/sda | tr -s ' \\n' ' ')\"
        fact ports \"$(sg_rtpg -d /dev/sda | tr -s ' \\n' ' ')\"
        step ready sg_turs -n 20 /dev/sda
        step requests sg_requests /dev/sda
        step start sg_start --start /dev/sda
        step stop sg_start --stop /dev/sda
        step 'sync cache' sg_sync /dev/sda
        step 'pattern' sh -c 'tr \"\\0\" \"\\245\" </dev/zero | dd of=/tmp/pattern bs=512 count=1 iflag=fullblock'
        step 'write same' sg_write_same --16 -l 1000 -n 300 -i /tmp/pattern /dev/sda
        step 'expected pattern' sh -c 'for i in $(seq 300); do cat /tmp/pattern; done >/tmp/expected'
        step 'read pattern' sh -c 'dd if=/dev/sda bs=512 skip=1000 count=300 iflag=direct | cmp - /tmp/expected'
        step verify sg_verify -l 1000 -c 300 /dev/sda
        step 'verify all zones' sg_verify --16 -l 0 -c 100000 -b 20000 /dev/sda
        step 'same bytes' sh -c 'sg_verify -E 1 -n 153600 -l 1000 -c 300 -i /tmp/expected /dev/sda'
        step 'same block' sh -c 'sg_verify -E 3 -n 512 -l 1000 -c 300 -i /tmp/pattern /dev/sda'
        fact miscompare $(sg_verify -E 3 -n 512 -l 999 -c 2 -i /tmp/pattern /dev/sda >/dev/null 2>&1; echo $?)
        step 'write and verify' sh -c 'sg_write_verify --16 -l 1300 -n 10 -i /tmp/expected --ilen=5120 -b 1 /dev/sda'
        step 'read what was verified' sh -c 'dd if=/dev/sda bs=512 skip=1300 count=10 iflag=direct | cmp -n 5120 - /tmp/expected'
        step 'what udev would do' sh -c 'mkdir -p /dev/block && ln -s /dev/sda /dev/block/$(cat /sys/block/sda/dev)'
        step 'the device copies' sg_xcopy if=/dev/sda of=/dev/sda bs=512 skip=1300 seek=60000 count=10
        step 'read the copy' sh -c 'dd if=/dev/sda bs=512 skip=60000 count=10 iflag=direct | cmp -n 5120 - /tmp/expected'
        fact copies \"$(sg_copy_results --params /dev/sda | tr -s ' \\n' ' ')\"
        fact third.party \"$(sg_vpd -p tpc /dev/sda | tr -s ' \\n' ' ')\"
        step 'descriptor sense' sg_wr_mode -p 0xa -c a,a,4,10,0,0,0,0,0,0,0,0 /dev/sda
        fact descriptor.sense \"$(sg_modes -6 -p 0xa /dev/sda | grep -c ' 0a 0a 04 10')\"
        step 'cache off, by its page' sg_wr_mode -p 8 -c 8,12,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0 /dev/sda
        fact cache.page \"$(sg_modes -6 -p 8 /dev/sda | grep -c ' 08 12 00')\"
        step 'a reset sets modes back' sg_reset -d /dev/sda
        step 'told' sg_turs -n 2 /dev/sda
        fact after.reset \"$(sg_modes -6 -p 0xa /dev/sda | grep -c ' 0a 0a 00 10') $(sg_modes -6 -p 8 /dev/sda | grep -c ' 08 12 04')\"
        step 'compare and write' sg_compare_and_write -i /tmp/expected -l 1000 -n 1 -x 1024 /dev/sda
        fact compare.differs $(sg_compare_and_write -i /tmp/expected -l 2000 -n 1 -x 1024 -q /dev/sda >/dev/null 2>&1; echo $?)
        step 'cache off' sh -c 'echo \"write through\" >/sys/class/scsi_disk/0:0:0:0/cache_type'
        fact cache.off \"$(cat /sys/block/sda/queue/write_cache) $(sg_modes -6 -p 8 /dev/sda | grep -c ' 08 12 00')\"
        step 'durable write' dd if=/tmp/expected of=/dev/sda bs=512 seek=1400 count=10 oflag=direct
        step 'cache on' sh -c 'echo \"write back\" >/sys/class/scsi_disk/0:0:0:0/cache_type'
        fact cache.on \"$(cat /sys/block/sda/queue/write_cache)\"
        step unmap sg_unmap -l 1000 -n 300 /dev/sda
        step 'write zeroes' sg_write_same --10 -l 1000 -n 300 /dev/sda
        step 'read zeroes' sh -c 'dd if=/dev/sda bs=512 skip=1000 count=300 iflag=direct | cmp -n 153600 - /dev/zero'
        step partition sh -c 'printf \"size=128MiB\\n,\\n\" | sfdisk -q /dev/sda'
        step mkfs mkfs.ext4 -q /dev/sda1
        step mount mount -t ext4 /dev/sda1 /mnt
        step write sh -c 'mkdir /mnt/f && for i in $(seq 16); do dd if=/dev/urandom of=/mnt/f/$i bs=64k count=$i; done'
        step sums sh -c 'cd /mnt/f && sha256sum * >/mnt/sums'
        step sync sync
        step umount umount /mnt
        step 'mount again' mount -t ext4 /dev/sda1 /mnt
        step check sh -c 'cd /mnt/f && sha256sum -c /mnt/sums'
        step remove rm -r /mnt/f
        step fstrim fstrim -v /mnt
        step 'umount again' umount /mnt
        step fsck e2fsck -fn /dev/sda1
        step discard /tools/bin/blkdiscard /dev/sda2
        step zeroes /tools/bin/blkdiscard -z -l 67108864 /dev/sda2
        step 'read them' sh -c 'head -c 67108864 /dev/sda2 | cmp -n 67108864 - /dev/zero'
        step verify fio_verify /dev/sdb 4 8m
        fio_verify /dev/sdb 4 8m --time_based --runtime=4 --verify_fatal=0 --verify=0 >/tmp/load 2>&1 &
        sleep 1
        step 'reset under load' sg_reset -d /dev/sdb
        step 'load goes on' wait $!
        step 'verify after the reset' fio_verify /dev/sdb 4 4m";
    let scsi = ["--scsi", "vm0.sock,num_queues=4"];
    let setup = Setup {
        more: &scsi,
        ..Setup::new(&[], job)
    };
    let facts = Guest::boot(&lab, &setup).ends_well();
    for (key, value) in [
        ("bytes.a", "268435456"),
        ("queues.a", "4"),
        ("cache.a", "write back"),
        ("fua.a", "1"),
        ("serial.a", "d0-ns1"),
        ("serial.b", "d0-ns2"),
        ("opcodes", "57"),
        ("descriptor.sense", "1"),
        ("cache.page", "1"),
        ("after.reset", "1 1"),
        // MISCOMPARE.
        ("miscompare", "14"),
        ("compare.differs", "14"),
        ("cache.off", "write through 1"),
        ("cache.on", "write back"),
    ] {
        assert_eq!(facts[key], value, "{key}: {facts:#?}");
    }
    for (key, words) in [
        ("where.a", "0:0:0:0"),
        // Linux writes a flat LUN with its addressing method.
        ("where.b", "0:0:1:16684"),
        ("inquiry", "version=0x06 [SPC-4]"),
        ("inquiry", "Vendor identification: TANDEM"),
        (
            "pages",
            "Supported VPD pages [sv] Unit serial number [sn] Device identification [di]",
        ),
        ("designators", "designator type: EUI-64 based"),
        ("designators", "Relative target port: 0x1"),
        ("copies", "Maximum target descriptor count: 8"),
        ("third.party", "Extended copy(LID1)"),
        ("limits", "Maximum unmap block descriptor count: 256"),
        ("limits", "Maximum compare and write length: 32 blocks"),
        ("limits", "Maximum write same length: 0x400000 blocks"),
        ("thin", "Unmap command supported (LBPU): 1"),
        ("luns.a", "0000000000000000"),
        ("luns.b", "412c000000000000 c101000000000000"),
        ("features", "V_SUP=1"),
        ("features", "SIMPSUP=1"),
        ("temperature", "Current temperature = 25 C"),
        ("wear", "Percentage used endurance indicator: 0 %"),
        (
            "exceptions",
            "IE asc = 0x0, ascq = 0x0 Current temperature = 25 C Threshold temperature = 70 C",
        ),
        ("logs", "0x0d"),
        ("lba.status", "0x00000000000003e8"),
        (
            "ports",
            "target port group asymmetric access state : 0x00 (active/optimized)",
        ),
        ("designators", "Target port group: 0x1"),
        ("capacity", "Last LBA=524287"),
        ("capacity", "lbpme=1"),
        ("read10", "28 18 ff ff ff ff 1f ff ff 00"),
        ("modes", "Caching, page_control: current 00 08 12 04"),
    ] {
        assert!(facts[key].contains(words), "{key}: {}", facts[key]);
    }
    assert_ne!(facts["discard.a"], "0");
    let report = server.end_well();
    let [control, _events, requests @ ..] = &report.queues[..] else {
        panic!("{report:?}")
    };
    assert!(control.get("tasks") >= 1, "{report:?}");
    let pairs: HashSet<u64> = requests.iter().map(|queue| queue.get("qp")).collect();
    assert_eq!((requests.len(), pairs.len()), (4, 4));
    for queue in requests {
        assert!(
            queue.get("commands") > 0 && queue.get("notifications") > 0,
            "idle: {queue:?}"
        );
    }
    assert!(
        report.total("discards") > 0 && report.total("flushes") > 0 && report.total("zeroes") > 0
    );
}

/// Words for two guests of one disk, which tell each other where they are by the keys that they register.
const RESERVATIONS: &str = r#"
    # key_is_there DISK KEY, no_key DISK
    key_is_there() {
        for _ in $(seq 300); do
            sg_persist -n -i -k "$1" 2>/dev/null | grep -qx " *$2" && return 0
            sleep 0.1
        done
        return 1
    }
    no_key() {
        for _ in $(seq 300); do
            sg_persist -n -i -k "$1" 2>/dev/null | grep -q 'NO registered' && return 0
            sleep 0.1
        done
        return 1
    }
    # out DISK OPTION...: PERSISTENT RESERVE OUT, once unit attentions have been told
    out() {
        out_disk=$1
        shift
        sg_turs -n 3 "$out_disk" >/dev/null 2>&1
        sg_persist -n -o "$@" "$out_disk"
    }
    # may_read DISK, may_write DISK
    may_read() { dd if="$1" of=/dev/null bs=512 skip=8 count=1 iflag=direct; }
    may_write() { dd if=/tmp/block of="$1" bs=512 seek=8 count=1 oflag=direct conv=notrunc; }
    access() {
        may_read "$1" >/dev/null 2>&1 && access_read=r || access_read=-
        may_write "$1" >/dev/null 2>&1 && access_write=w || access_write=-
        echo "$access_read$access_write"
    }
"#;

/// Reserves the disk with every type, and fences the other guest off in the middle of its writes.
const RESERVES: &str = r#"
    head -c 512 /dev/urandom >/tmp/block
    step register out /dev/sda -G -S 0xa
    key=0xa
    step 'the other is there' key_is_there /dev/sda 0xb
    for type in 1 3 5 6 7 8; do
        step "reserve $type" out /dev/sda -R -K $key -T $type
        step "say so $type" out /dev/sda -G -K $key -S 0xa$type
        key=0xa$type
        step "tried $type" key_is_there /dev/sda 0xb$type
        fact "holder.$type" "$(access /dev/sda)"
        step "release $type" out /dev/sda -L -K $key -T $type
    done
    step 'reserve to fence' out /dev/sda -R -K $key -T 5
    step 'say so' out /dev/sda -G -K $key -S 0xaf
    step 'the other writes' key_is_there /dev/sda 0xbf
    sleep 1
    step fence out /dev/sda -A -K 0xaf -S 0xbf -T 5
    step 'write there' may_write /dev/sda
    step 'the other cannot' key_is_there /dev/sda 0xbe
    step 'and has not' sh -c 'dd if=/dev/sda bs=512 skip=8 count=1 iflag=direct | cmp - /tmp/block'
    fact status "$(sg_persist -n -i -s /dev/sda | tr -s ' \n' ' ')"
    fact capabilities "$(sg_persist -n -i -c /dev/sda | tr -s ' \n' ' ')"
    step clear out /dev/sda -C -K 0xaf
    step 'the other has seen it' key_is_there /dev/sda 0xc
"#;

/// The other guest.
const IS_FENCED: &str = r#"
    step modules modprobe -a virtio_scsi sd_mod sg
    step 'the disk is there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && break; sleep 0.1; done'
    head -c 512 /dev/urandom >/tmp/block
    step 'the first is there' key_is_there /dev/sda 0xa
    step register out /dev/sda -G -S 0xb
    key=0xb
    for type in 1 3 5 6 7 8; do
        step "reserved $type" key_is_there /dev/sda 0xa$type
        fact "registrant.$type" "$(access /dev/sda)"
        step "unregister $type" out /dev/sda -G -K $key -S 0
        fact "other.$type" "$(access /dev/sda)"
        step "say so $type" out /dev/sda -G -S 0xb$type
        key=0xb$type
    done
    step 'reserved again' key_is_there /dev/sda 0xaf
    (while may_write /dev/sda; do :; done) >/dev/null 2>&1 &
    step 'say that it writes' out /dev/sda -G -K $key -S 0xbf
    step 'is fenced' wait $!
    fact fenced "$(access /dev/sda)"
    step 'say that it cannot' out /dev/sda -G -S 0xbe
    step 'all is cleared' no_key /dev/sda
    fact cleared "$(access /dev/sda)"
    step 'say that it is done' out /dev/sda -G -S 0xc
"#;

#[test]
fn two_guests_reserve_a_disk_from_each_other_and_reset_it_while_cores_sleep() {
    let lab = Lab::new("scsi-sleep");
    let [first, second] = [
        "path=vm0.sock,queues=2,lun=0:0:ns1,initiator=first",
        "path=vm1.sock,lun=0:0:ns1,initiator=second",
    ];
    let device = "model:ram,size=256M";
    let arguments = ["--poll", "adaptive", "--device", device];
    let hosts = ["--scsi", first, "--scsi", second];
    let server = Server::start(&lab, &[&arguments[..], &hosts[..]].concat());
    let more = ["--scsi", "vm1.sock,num_queues=1"];
    let job = format!("{RESERVATIONS}{IS_FENCED}");
    let setup = Setup {
        cpus: 1,
        more: &more,
        ..Setup::new(&[], &job)
    };
    let second = Guest::boot(&lab, &setup);
    // Nothing else happens: every core sleeps between two resets.
    let job = "
        step modules modprobe -a virtio_scsi sd_mod sg
        step 'the disk is there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && break; sleep 0.1; done'
        fact features $(cat /sys/bus/virtio/devices/virtio0/features)
        #RESERVES
        step resets sh -c 'for i in $(seq 10); do sg_reset -d /dev/sda || exit 1; sg_turs -n 2 /dev/sda; sleep 0.2; done'
        step verify fio_verify /dev/sda 2 2m";
    let more = ["--scsi", "vm0.sock,num_queues=2,packed=on"];
    let job = job.replace("#RESERVES", &format!("{RESERVATIONS}{RESERVES}"));
    let setup = Setup {
        cpus: 2,
        more: &more,
        ..Setup::new(&[], &job)
    };
    let facts = Guest::boot(&lab, &setup).ends_well();
    let others = second.ends_well();
    // SPC-4, table 66, for reads and writes.
    for (kind, registrant, other) in [
        (1, "r-", "r-"),
        (3, "--", "--"),
        (5, "rw", "r-"),
        (6, "rw", "--"),
        (7, "rw", "r-"),
        (8, "rw", "--"),
    ] {
        assert_eq!(facts[&format!("holder.{kind}")], "rw");
        assert_eq!(others[&format!("registrant.{kind}")], registrant);
        assert_eq!(others[&format!("other.{kind}")], other);
    }
    assert_eq!((&*others["fenced"], &*others["cleared"]), ("r-", "rw"));
    for (key, words) in [
        ("status", "Reservation holder"),
        ("status", "iqn.2025-01.internal.tandem:first"),
        ("status", "iqn.2025-01.internal.tandem:second"),
        ("capabilities", "All Target Ports Capable(ATP_C): 1"),
        (
            "capabilities",
            "Persist Through Power Loss Capable(PTPL_C): 0",
        ),
    ] {
        assert!(facts[key].contains(words), "{key}: {}", facts[key]);
    }
    assert_eq!(facts["features"].as_bytes()[F_RING_PACKED], b'1');
    let report = server.end_well();
    assert_eq!(report.total("tasks"), 10, "{report:?}");
}
