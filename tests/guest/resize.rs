//! Disks that grow in a running guest, which hears of it by virtio-blk's configuration interrupt and by virtio-scsi's event
//! queue alone: nobody asks it to look.

use std::process::Command;

use super::*;

/// `tandem device`, as people type it: what it prints.
#[track_caller]
fn device(lab: &Lab, arguments: &[&str]) -> String {
    let mut command = Command::new(server::server_binary());
    let [action, rest @ ..] = arguments else {
        panic!("no command");
    };
    command.args(["device", action, "--admin", "admin.sock"]);
    let output = command.args(rest).current_dir(&lab.folder).output();
    let output = output.unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

const JOB: &str = "
    step modules modprobe -a virtio_scsi sd_mod
    step 'the disk is there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && break; sleep 0.1; done'
    fact before \"$(cat /sys/block/vda/size) $(cat /sys/block/sda/size)\"
    load() { while ! [ -e /tmp/over ]; do fio_verify /dev/$1 2 4m || return 1; done; }
    load vda >/tmp/load.vda 2>&1 &
    vda=$!
    load sda >/tmp/load.sda 2>&1 &
    sda=$!
    # grows DISK SECTORS
    grows() { for i in $(seq 300); do [ \"$(cat /sys/block/$1/size)\" = $2 ] && return 0; sleep 0.1; done; return 1; }
    # keeps DISK MIB: what is written from there on is read back
    keeps() {
        dd if=/dev/urandom of=/tmp/new bs=1M count=8
        dd if=/tmp/new of=/dev/$1 bs=1M seek=$2 oflag=direct
        dd if=/dev/$1 of=/tmp/back bs=1M skip=$2 count=8 iflag=direct
        cmp /tmp/new /tmp/back
    }
    fact ready yes
    step 'vda grows' grows vda 98304
    step 'sda grows' grows sda 81920
    step 'vda has its new blocks' keeps vda 40
    step 'sda has its new blocks' keeps sda 32
    fact grown yes
    step 'vda grows again' grows vda 131072
    step 'vda has them too' keeps vda 56
    touch /tmp/over
    step 'the load on vda goes on all the time' wait $vda
    step 'the load on sda goes on all the time' wait $sda
    fact failed $(dmesg | grep -c 'error, dev')";

#[test]
fn disks_that_grow_under_load_grow_in_the_guest_by_themselves() {
    let lab = Lab::new("resize");
    let server = Server::start(
        &lab,
        &[
            "--poll",
            "adaptive",
            "--admin",
            "admin.sock",
            "--device",
            "model:file,path=disk.img,size=32M,name=image",
            "--blk",
            "path=vm0.sock,queues=2,device=image",
            "--device",
            "model:ram,size=32M,name=memory",
            "--scsi",
            "path=vm1.sock,queues=2,device=memory,lun=0:0:ns1",
        ],
    );
    let setup = Setup {
        cpus: 2,
        more: &["--scsi", "vm1.sock,num_queues=2"],
        ..Setup::new(&["vm0.sock,num-queues=2"], JOB)
    };
    let mut guest = Guest::boot(&lab, &setup);
    guest.tells("ready");
    assert_eq!(
        device(&lab, &["resize", "image", "1", "48M"]),
        "device image: namespace 1 has 48M, 32M before\n"
    );
    assert_eq!(
        device(&lab, &["resize", "memory", "1", "40M"]),
        "device memory: namespace 1 has 40M, 32M before\n"
    );
    guest.tells("grown");
    let image = fs::OpenOptions::new()
        .write(true)
        .open(lab.path("disk.img"));
    image.unwrap().set_len(64 << 20).unwrap();
    assert_eq!(
        device(&lab, &["rescan", "image"]),
        "device image: namespace 1 has 64M, 48M before\n"
    );
    let facts = guest.ends_well();
    assert_eq!(facts["before"], "65536 65536");
    assert_eq!(facts["failed"], "0");
    server.end_well();
}
