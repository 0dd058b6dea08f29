//! As many logical units as a host can have, in a Linux guest: all are found, and each is itself.

use super::*;
use tandem::config::MAX_NAMESPACES;

/// The first, those on either side of the end of peripheral addressing, one in the midst, and the last.
const TRIED: [u16; 5] = [0, 255, 256, 600, 1023];

/// As Linux writes a LUN: a flat one with its addressing method.
fn in_linux(lun: u16) -> u32 {
    let method = if lun < 256 { 0 } else { 0x4000 };
    u32::from(lun) | method
}

#[test]
fn thousand_logical_units_of_one_host_are_all_found_and_each_keeps_its_own_blocks() {
    let lab = Lab::new("thousand");
    let luns = (0..MAX_NAMESPACES).map(|lun| format!(",lun=0:{lun}:ns{}", lun + 1));
    let host = format!("path=vm0.sock,queues=2{}", luns.collect::<String>());
    let device = format!("model:ram,size=64M,namespaces={MAX_NAMESPACES}");
    let server = Server::start(&lab, &["--device", &device, "--scsi", &host]);
    let tried = TRIED.map(|lun| in_linux(lun).to_string()).join(" ");
    let job = r#"
        free() { sed -n 's/MemAvailable: *\([0-9]*\).*/\1/p' /proc/meminfo; }
        disks() { ls /sys/class/scsi_disk | wc -l; }
        # disk LUN: its device file, once there is one
        disk() {
            for _ in $(seq 100); do
                disk_name=$(ls "/sys/class/scsi_device/0:0:0:$1/device/block" 2>/dev/null)
                [ -b "/dev/$disk_name" ] && echo "/dev/$disk_name" && return 0
                sleep 0.1
            done
            return 1
        }
        before=$(free)
        step modules modprobe -a virtio_scsi sd_mod sg
        step 'all disks are there' sh -c 'for i in $(seq 900); do [ $(ls /sys/class/scsi_disk | wc -l) -ge 1024 ] && exit 0; sleep 0.2; done; exit 1'
        fact kibibytes $(((before - $(free)) / 1024))
        fact devices "$(ls /sys/class/scsi_device | wc -l)"
        fact disks "$(disks)"
        fact blocks "$(cat /sys/class/scsi_device/*/device/block/*/size | sort | uniq -c | tr -s ' ')"
        fact serials "$(for at in /sys/class/scsi_device/*/device/vpd_pg80; do tail -c +5 "$at"; echo; done | sort -u | wc -l)"
        first=$(disk 0)
        fact luns "$(sg_luns -q -m 16384 "$first" | sort -u | wc -l)"
        fact last.lun "$(sg_luns -q -m 16384 "$first" | tail -n 1)"
        fact length "$(sg_luns -m 16384 "$first" | head -n 1)"
        for lun in TRIED; do
            step "write $lun" sh -c "yes 'unit $lun' | head -c 4096 | dd of=$(disk $lun) bs=4k oflag=direct iflag=fullblock conv=notrunc"
        done
        for lun in TRIED; do
            step "read $lun" sh -c "yes 'unit $lun' | head -c 4096 >/tmp/unit; dd if=$(disk $lun) bs=4k count=1 iflag=direct | cmp - /tmp/unit"
            fact "serial.$lun" "$(sg_vpd -q -p sn "$(disk $lun)" | sed -n 's/.*number: //p')"
        done"#;
    let job = job.replace("TRIED", &tried);
    let setup = Setup {
        cpus: 2,
        more: &["--memory", "1G", "--scsi", "vm0.sock,num_queues=2"],
        deadline: Duration::from_secs(240),
        ..Setup::new(&[], &job)
    };
    let facts = Guest::boot(&lab, &setup).ends_well();
    for (key, value) in [
        ("devices", "1024"),
        ("disks", "1024"),
        // 64 KiB each.
        ("blocks", " 1024 128"),
        ("serials", "1024"),
        ("luns", "1024"),
        ("last.lun", "43ff000000000000"),
    ] {
        assert_eq!(facts[key], value, "{key}: {facts:#?}");
    }
    assert!(facts["length"].contains("8192"), "{facts:#?}");
    for lun in TRIED {
        let serial = &facts[&format!("serial.{}", in_linux(lun))];
        assert_eq!(*serial, format!("d0-ns{}", lun + 1));
    }
    server.end_well();
}
