//! Disks that come and go in a running guest, of which it hears by events alone: nobody asks it to look.

use std::process::{Command, Output};

use super::*;

/// `tandem lun`, as people type it.
fn lun(lab: &Lab, action: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(server::server_binary());
    command.args(["lun", action, "--admin", "admin.sock"]);
    let command = command.args(arguments).current_dir(&lab.folder);
    command.output().unwrap()
}

#[track_caller]
fn does(lab: &Lab, action: &str, arguments: &[&str]) -> String {
    let output = lun(lab, action, arguments);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{action} {arguments:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

/// Where the second disk is shown, and how Linux calls the place: LUNs of both ways to write them, and a target of its own.
const PLACES: [(&str, &str); 3] = [
    ("0:7", "0:0:0:7"),
    ("0:300", "0:0:0:16684"),
    ("5:0", "0:0:5:0"),
];
const ROUNDS: usize = 6;

#[test]
fn disk_that_is_added_and_removed_under_load_comes_and_goes_in_the_guest_by_itself() {
    for poll in ["always", "adaptive"] {
        let lab = Lab::new(&format!("hotplug-{poll}"));
        let mut content: Vec<u8> = vec![0; 16 << 20];
        let second: Vec<u8> = (0..16 << 20)
            .map(|at: u32| (at.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        fs::write(lab.path("second.img"), &second).unwrap();
        content.extend(second);
        fs::write(lab.path("disk.img"), &content).unwrap();
        let server = Server::start(
            &lab,
            &[
                "--poll",
                poll,
                "--admin",
                "admin.sock",
                "--device",
                "model:file,path=disk.img,namespaces=2",
                "--scsi",
                "path=vm0.sock,queues=2,lun=0:0:ns1",
            ],
        );
        let mut job = "
            step modules modprobe -a virtio_scsi sd_mod sg
            step 'the disk is there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && break; sleep 0.1; done'
            (while ! [ -e /tmp/over ]; do fio_verify /dev/sda 2 4m || exit 1; done) >/tmp/load 2>&1 &
            load=$!
            # comes ADDRESS, node DISK, goes ADDRESS
            comes() { for i in $(seq 300); do [ -n \"$(ls /sys/bus/scsi/devices/$1/block 2>/dev/null)\" ] && return 0; sleep 0.1; done; return 1; }
            node() { for i in $(seq 50); do [ -b $1 ] && return 0; sleep 0.1; done; return 1; }
            goes() { for i in $(seq 300); do [ -e /sys/bus/scsi/devices/$1 ] || return 0; sleep 0.1; done; return 1; }
        "
        .to_owned();
        for round in 0..ROUNDS {
            let (_, address) = PLACES[round % PLACES.len()];
            job += &format!(
                "
                fact ready.{round} yes
                step 'comes {round}' comes {address}
                disk=/dev/$(ls /sys/bus/scsi/devices/{address}/block)
                step 'node {round}' node $disk
                fact sum.{round} $(sha256sum $disk | cut -d ' ' -f 1)
                fact seen.{round} yes
                step 'goes {round}' goes {address}"
            );
        }
        job += "
            touch /tmp/over
            step 'the load goes on all the time' wait $load
            fact failed $(dmesg | grep -c 'error, dev sda')";
        let more = ["--scsi", "vm0.sock,num_queues=2"];
        let setup = Setup {
            cpus: 2,
            more: &more,
            ..Setup::new(&[], &job)
        };
        let mut guest = Guest::boot(&lab, &setup);
        for round in 0..ROUNDS {
            let (place, _) = PLACES[round % PLACES.len()];
            guest.tells(&format!("ready.{round}"));
            does(&lab, "add", &["vm0.sock", &format!("{place}:ns2")]);
            guest.tells(&format!("seen.{round}"));
            let list = does(&lab, "list", &[]);
            assert!(list.contains(&format!("{place}:ns2 ")), "{list}");
            does(&lab, "remove", &["vm0.sock", place]);
        }
        let facts = guest.ends_well();
        let sum = sha256_of(&lab, "second.img");
        for round in 0..ROUNDS {
            assert_eq!(facts[&format!("sum.{round}")], sum, "round {round}");
        }
        assert_eq!(facts["failed"], "0");
        let refused = lun(&lab, "remove", &["vm0.sock", "0:7"]);
        let words = String::from_utf8(refused.stderr).unwrap();
        let expected = "tandem: cannot remove 0:7 from host vm0.sock: it has no such logical unit";
        assert!(
            words.starts_with(expected) && refused.status.code() == Some(2),
            "{words}"
        );
        server.end_well();
    }
}
