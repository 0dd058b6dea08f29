//! A conformance suite that others wrote (libiscsi's, over SG_IO), in one guest on a logical unit of the server and on one
//! that shops know well, QEMU's scsi-hd.

use super::*;
use std::collections::BTreeMap;

/// How each test of the suite ended, by its name.
type Outcomes = BTreeMap<String, Outcome>;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    /// For want of something that the logical unit need not have.
    Skipped,
    Failed,
}

/// What fails on any logical unit that has the command: the suite puts 256 blocks into a field of 8 bits, and it asks of a
/// copy that it takes for unknown, which an earlier test of its own has made.
const EXCUSED: [&str; 3] = [
    "CompareAndWrite.Simple",
    "CompareAndWrite.Miscompare",
    "ReceiveCopyResults.CopyStatus",
];

/// Lines of name and outcome.
fn outcomes(lines: &str) -> Outcomes {
    let outcome = |line: &str| {
        let (name, outcome) = line.rsplit_once(' ').unwrap();
        let outcome = match outcome {
            "passed" => Outcome::Passed,
            "skipped" => Outcome::Skipped,
            "failed" => Outcome::Failed,
            _ => panic!("{line}"),
        };
        (name.to_owned(), outcome)
    };
    lines.lines().map(outcome).collect()
}

fn count(outcomes: &Outcomes, outcome: Outcome) -> usize {
    outcomes.values().filter(|own| **own == outcome).count()
}

#[test]
fn no_test_of_a_conformance_suite_fails_that_scsi_hd_passes() {
    let lab = Lab::new("conformance");
    let host = "path=vm0.sock,queues=2,lun=0:0:ns1";
    let server = Server::start(&lab, &["--device", "model:ram,size=16M", "--scsi", host]);
    let disk = fs::File::create(lab.path("reference.img")).unwrap();
    disk.set_len(16 << 20).unwrap();
    let drive = format!(
        "file={},format=raw,if=none,id=reference",
        lab.path("reference.img").display()
    );
    // The suite says of each test how it ended at the end of a line, and of one that it leaves out why.
    let job = r#"
        step modules modprobe -a virtio_scsi sd_mod sg
        step 'disks are there' sh -c 'for i in $(seq 50); do [ -b /dev/sda ] && [ -b /dev/sdb ] && exit; sleep 0.1; done; exit 1'
        for name in QEMU TANDEM; do
            disk=$(grep -l "^$name" /sys/block/sd?/device/vendor | cut -d / -f 4)
            # Of larger pieces than the suite's own pages: there are more of those in its buffers of 1 MiB than the host
            # takes segments, if they are not next to each other.
            generic=$(ls /sys/block/$disk/device/scsi_generic)
            iscsi-test-cu -d -v --test=ALL /dev/$generic >/tmp/suite 2>&1 </dev/null
            step "the suite ended on $name" grep 'Run Summary' /tmp/suite
            awk -v key="$name" '
                /^Suite: / { suite = $2 }
                /^ *Test: / { test = $2; end = "passed" }
                /\[SKIPPED\]/ { end = "skipped" }
                /passed *$/ { print "TANDEM-FILE " key " " suite "." test " " end }
                /FAILED *$/ { print "TANDEM-FILE " key " " suite "." test " failed" }
            ' /tmp/suite
        done
        # For whoever reads this log.
        grep -B 4 -A 4 'FAILED *$' /tmp/suite || :"#;
    let setup = Setup {
        cpus: 2,
        more: &[
            "--memory",
            "1G",
            "--scsi",
            "vm0.sock,num_queues=2",
            "--",
            "-device",
            "virtio-scsi-pci,id=reference",
            "-drive",
            &drive,
            "-device",
            "scsi-hd,drive=reference,bus=reference.0",
        ],
        ..Setup::new(&[], job)
    };
    let facts = Guest::boot(&lab, &setup).ends_well();
    server.end_well();
    let [own, hd] = ["TANDEM", "QEMU"].map(|name| outcomes(&facts[name]));
    let passed = count(&own, Outcome::Passed);
    assert!(passed > 140, "{passed} tests passed of {own:#?}");
    assert!(passed > count(&hd, Outcome::Passed), "of scsi-hd's {hd:#?}");
    for (name, _) in own.iter().filter(|(_, own)| **own == Outcome::Failed) {
        assert!(EXCUSED.contains(&name.as_str()), "{name}");
        assert_ne!(hd[name], Outcome::Passed, "{name}");
    }
}
