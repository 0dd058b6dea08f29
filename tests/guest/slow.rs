//! A disk that is slower than its guest wants to wait. Linux's virtio_scsi begins a command's time anew when it is over and
//! never sends ABORT TASK; resets it sends when it is told to.

use super::*;

#[test]
fn reset_ends_a_slow_command_at_the_device_and_the_guest_sends_it_again() {
    let lab = Lab::new("slow-scsi");
    let device = "model:ram,size=64M,latency=4s";
    let host = "path=vm0.sock,lun=0:0:ns1";
    let server = Server::start(&lab, &["--device", device, "--scsi", host]);
    let job = "
        step modules modprobe -a virtio_scsi sd_mod sg
        step 'the disk is there' sh -c 'for i in $(seq 300); do [ -b /dev/sda ] && break; sleep 0.1; done'
        fact first $(cat /sys/block/sda/device/iotmo_cnt)
        echo 1 >/sys/block/sda/device/timeout
        step 'longer than it may' dd if=/dev/sda of=/dev/null bs=4k count=1 skip=100 iflag=direct
        fact second $(cat /sys/block/sda/device/iotmo_cnt)
        echo 30 >/sys/block/sda/device/timeout
        dd if=/dev/sda of=/tmp/read bs=4k count=1 skip=100 iflag=direct 2>/dev/null &
        sleep 1
        before=$(centiseconds)
        step reset sg_reset -d /dev/sda
        fact reset $(($(centiseconds) - before))
        step 'and it is read' wait $!
        fact read $(($(centiseconds) - before))
        step 'all of it' sh -c '[ $(wc -c </tmp/read) = 4096 ]'";
    let more = ["--scsi", "vm0.sock,num_queues=1"];
    let setup = Setup {
        cpus: 1,
        more: &more,
        ..Setup::new(&[], job)
    };
    let facts = Guest::boot(&lab, &setup).ends_well();
    let time = |key: &str| -> u64 { facts[key].parse().unwrap() };
    // Not the three seconds that were left of the read, and then four for the one that was sent again.
    assert!(time("reset") < 200 && time("read") >= 400, "{facts:#?}");
    assert_ne!(facts["first"], facts["second"], "no time was over");
    let report = server.end_well();
    assert_eq!(report.total("tasks"), 1, "{report:?}");
}
