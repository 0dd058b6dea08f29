//! A host whose disks are on several devices, in Linux: each its own blocks, on queue pairs of its own.

use super::*;

#[test]
fn disks_of_one_host_on_two_devices_lose_nothing() {
    for (poll, packed) in [("always", "on"), ("adaptive", "off")] {
        let lab = Lab::new(&format!("devices-{poll}"));
        let server = Server::start(
            &lab,
            &[
                "--poll",
                poll,
                "--device",
                "model:ram,size=64M",
                "--device",
                "model:file,path=second.img,size=64M",
                "--scsi",
                "path=vm0.sock,queues=2,lun=0:0:d0:ns1,lun=1:0:d1:ns1",
            ],
        );
        let job = "
            step modules modprobe -a virtio_scsi sd_mod sg
            step 'disks are there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && [ -b /dev/sdb ] && exit; sleep 0.1; done; exit 1'
            first=/dev/$(ls /sys/bus/scsi/devices/0:0:0:0/block)
            second=/dev/$(ls /sys/bus/scsi/devices/0:0:1:0/block)
            fact serial.first \"$(sg_vpd -q -p sn $first | sed -n 's/.*number: //p')\"
            fact serial.second \"$(sg_vpd -q -p sn $second | sed -n 's/.*number: //p')\"
            (fio_verify $first 2 16m || exit 1) >/tmp/first 2>&1 &
            load=$!
            step 'verify the second' fio_verify $second 2 16m
            step 'verify the first meanwhile' wait $load
            fio_verify $second 2 8m --time_based --runtime=3 --verify_fatal=0 --verify=0 >/tmp/load 2>&1 &
            sleep 1
            step 'reset under load' sg_reset -d $second
            step 'load goes on' wait $!
            step mkfs mkfs.ext4 -q $second
            step mount mount -t ext4 $second /mnt
            step write sh -c 'for i in $(seq 8); do dd if=/dev/urandom of=/mnt/$i bs=64k count=$i; done; cd /mnt && sha256sum [1-8] >sums'
            step remove rm /mnt/8
            step fstrim fstrim -v /mnt
            step umount umount /mnt
            step 'mount again' mount -t ext4 $second /mnt
            step check sh -c 'cd /mnt && head -n 7 sums | sha256sum -c'
            step 'umount again' umount /mnt
            step sync sg_sync $second
            fact sum $(sha256sum $second | cut -d ' ' -f 1)
            fact failed $(dmesg | grep -c 'error, dev sd')";
        let scsi = format!("vm0.sock,num_queues=2,packed={packed}");
        let setup = Setup {
            cpus: 2,
            more: &["--scsi", &scsi],
            ..Setup::new(&[], job)
        };
        let facts = Guest::boot(&lab, &setup).ends_well();
        let report = server.end_well();
        assert_eq!(
            (&facts["serial.first"][..], &facts["serial.second"][..]),
            ("d0-ns1", "d1-ns1")
        );
        assert_eq!(facts["sum"], sha256_of(&lab, "second.img"));
        assert_eq!(facts["failed"], "0");
        // Two queue pairs for each request queue.
        let requests = report.queues.iter().filter(|queue| queue.get("vq") >= 2);
        let (own, second): (Vec<_>, Vec<_>) =
            requests.partition(|queue| queue.find("qp").is_some());
        for queues in [own, second] {
            assert_eq!(queues.len(), 2, "{report:?}");
            for queue in queues {
                assert!(queue.get("commands") > 100, "idle: {queue:?}");
            }
        }
    }
}
