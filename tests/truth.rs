//! The software controller told apart from one that nobody here wrote: the same seeded sequences of commands, valid and
//! invalid, go by the same driver to the model, and in a machine with an IOMMU through VFIO to QEMU's controller.
//! Statuses, results, data and identify fields are compared line by line. What may differ is in [`ACCEPTED`], each
//! with its reason; anything else fails, and so does a difference there that no longer occurs.
//!
//! `nvme-driver/examples/truth` sends the sequences and says how a line reads. The table is of QEMU 7.2, which Debian 12
//! has: another version may well answer differently, and then it is the table that has to follow.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

#[path = "common/guest.rs"]
mod guest;
#[path = "common/lab.rs"]
mod lab;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use guest::{Guest, Setup};
use lab::Lab;

const SEEDS: &str = "20";

/// Whose doing a difference is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Because {
    /// The specification lets a controller choose.
    Choice,
    /// The model leaves out something that it need not have, or that it says it lacks.
    ModelLacks,
    /// QEMU departs from the specification.
    QemuDeparts,
}
use Because::{Choice, ModelLacks, QemuDeparts};

/// One accepted difference: of which cases, in which key, what the model and what QEMU says (`*` stands for anything),
/// and why.
type Accepted = (
    &'static str,
    &'static str,
    &'static str,
    &'static str,
    Because,
    &'static str,
);

#[rustfmt::skip]
const ACCEPTED: &[Accepted] = &[
    // ---- registers and Identify ----
    ("registers", "css", "1", "c1", ModelLacks, "CAP.CSS: QEMU has several I/O command sets as well"),
    ("registers", "mpsmax", "0", "4", ModelLacks, "only 4 KiB pages"),
    ("registers", "to", "a", "f", Choice, "how long enabling may take"),
    ("identify.controller", "vid", "0", "1b36", ModelLacks, "it is no PCI device"),
    ("identify.controller", "ssvid", "0", "1af4", ModelLacks, "it is no PCI device"),
    ("identify.controller", "ieee", "0", "525400", ModelLacks, "it has no OUI"),
    ("identify.controller", "mn", "Tandem_embedded_controller", "QEMU_NVMe_Ctrl", Choice, "the model number"),
    ("identify.controller", "fr", "*", "7.2*", Choice, "the firmware revision"),
    ("identify.controller", "subnqn", "nqn.2014-08.org.nvmexpress:uuid:*", "nqn.2019-08.org.qemu:ssd*", Choice, "the subsystem's name"),
    ("identify.controller", "cntlid", "1", "0", Choice, "the controller's number in its subsystem"),
    ("identify.controller", "ctratt", "0", "8000", ModelLacks, "extended LBA formats"),
    ("identify.controller", "oacs", "0", "10a", ModelLacks, "Format NVM, Namespace Management, Doorbell Buffer Config"),
    ("identify.controller", "oncs", "11d", "15d", ModelLacks, "Timestamp"),
    ("identify.controller", "sgls", "0", "1", ModelLacks, "SGLs"),
    ("identify.controller", "lpa", "4", "7", ModelLacks, "SMART per namespace, Commands Supported and Effects"),
    ("identify.controller", "elpe", "63", "0", Choice, "entries of the error log"),
    ("identify.controller", "tnvmcap", "*", "0", Choice, "needed with Namespace Management alone"),
    ("identify.namespace", "nsfeat", "0", "14", ModelLacks, "preferred sizes and alignments, errors of deallocated blocks"),
    ("identify.namespace", "nlbaf", "0", "7", ModelLacks, "one LBA format"),
    ("identify.namespace", "flbas", "0", "4", ModelLacks, "one LBA format: blocks of 4096 bytes are the fifth of QEMU's"),
    ("identify.namespace", "mc", "0", "3", ModelLacks, "metadata"),
    ("identify.namespace", "dpc", "0", "1f", ModelLacks, "protection information"),
    ("identify.namespace", "dlfeat", "9", "1", Choice, "Write Zeroes with DEAC deallocates: QEMU's does too, and does not say so"),
    ("identify.namespace", "nvmcap", "*", "0", Choice, "needed with Namespace Management alone"),
    ("identify.namespace", "nguid", "*", "zero", Choice, "QEMU has none unless it is told one"),
    ("identify.namespace", "eui64", "*", "zero", Choice, "QEMU has none unless it is told one"),
    ("identify.descriptors", "any", "true", "false", QemuDeparts, "an active namespace has at least one of UUID, NGUID, EUI-64"),

    // ---- features ----
    ("number_of_queues.fewer", "dw0", "10001", "70007", Choice, "more may be granted than was asked for"),
    ("*.arbitration", "dw0", "0", "7", Choice, "the default burst: one command, or no limit"),
    ("*.interrupt_vector", "dw0", "0", "10000", ModelLacks, "vector 0 is not coalesced; there are no interrupts"),
    ("*.interrupt_vector.read_back", "dw0", "0", "10000", ModelLacks, "vector 0 is not coalesced; there are no interrupts"),
    ("*.arbitration.read_back", "dw0", "0", "7", Choice, "changeable or not"),
    ("get_features.supported.*", "dw0", "4", "0", Choice, "changeable or not"),
    ("set_features.arbitration", "status", "0/00", "1/0e", Choice, "changeable or not"),
    ("set_features.interrupt_coalescing", "status", "0/00", "1/0e", Choice, "changeable or not"),
    ("set_features.interrupt_vector", "status", "0/00", "1/0e", Choice, "changeable or not"),
    ("set_features.power_management", "status", "0/00", "1/0e", Choice, "changeable or not: there is one power state"),
    ("set_features.power_state_beyond", "status", "0/02", "1/0e", Choice, "a state that there is not, or none that may be set"),
    ("set_features.write_atomicity", "status", "0/00", "1/0e", Choice, "changeable or not"),
    ("get_features.*.volatile_write_cache", "dw0", "1", "0", QemuDeparts, "the default is on: that is how it was after the reset"),
    ("get_features.select_reserved", "status", "0/02", "0/00", QemuDeparts, "a reserved Select is taken for the current value"),

    // ---- log pages ----
    ("log.unknown", "status", "1/09", "0/02", QemuDeparts, "Invalid Log Page has a status code of its own"),
    ("log.offset_at_the_end", "status", "0/00", "0/02", QemuDeparts, "an error is an offset beyond the page, not one at its end"),
    ("log.smart", "status", "0/00", "0/0b", QemuDeparts, "NSID 0 is the controller's own page"),
    ("log.smart", "available_spare", "100", "0", QemuDeparts, "all of the spare is there"),
    ("log.smart.nsid_active", "status", "0/02", "0/00", ModelLacks, "SMART per namespace (LPA bit 0)"),
    ("log.smart.nsid_inactive", "status", "0/02", "0/0b", QemuDeparts, "inactive is not invalid"),
    ("log.firmware", "frs1", "*", "1.0", QemuDeparts, "the revision in the slot that is active is not FR"),

    // ---- queues and Abort ----
    ("create_cq.interrupts", "status", "1/08", "0/00", ModelLacks, "there are no interrupts"),
    ("create_sq.cq_of_another", "status", "1/00", "0/00", ModelLacks, "a submission queue has the completion queue of its number"),
    ("delete_cq.id_*", "status", "1/01", "1/00", QemuDeparts, "Invalid Queue Identifier is what Delete I/O Completion Queue has"),
    ("queues.delete_cq_again", "status", "1/01", "1/00", QemuDeparts, "Invalid Queue Identifier is what Delete I/O Completion Queue has"),
    ("delete_cq.has_sq", "dnr", "1", "0", Choice, "Do Not Retry is advice"),
    ("queues.delete_cq_before_sq", "dnr", "1", "0", Choice, "Do Not Retry is advice"),
    ("event_request.too_many", "dnr", "1", "0", Choice, "Do Not Retry is advice"),
    ("abort.queue_*", "status", "0/00", "0/02", Choice, "a command that is not there was not aborted, or its queue is invalid"),

    // ---- the NVM command set ----
    ("*.fuse*", "dnr", "1", "0", Choice, "Do Not Retry is advice"),
    ("compare.*", "dnr", "1", "0", Choice, "Do Not Retry is advice, and others may write meanwhile"),
    ("dsm.*", "status", "0/80", "0/00", Choice, "a range beyond the end is refused, or its deallocation, which is advice, is not followed"),
    ("counted", "reads_more", "0", "*", QemuDeparts, "a Write Zeroes may be counted in the place of a comparison that failed before it"),
    ("read.prp1_odd", "status", "0/13", "0/00", Choice, "a controller need not look at the two lowest bits of PRP1"),
];

/// The two SSDs of the machine, and the model's configuration that is their like.
struct Twin {
    name: &'static str,
    mib: u64,
    block_size: u32,
    ssd: &'static str,
    address: &'static str,
}

const TWINS: [Twin; 2] = [
    Twin {
        name: "ssd0",
        mib: 48,
        block_size: 512,
        ssd: "ssd0.img,max_ioqpairs=8,mdts=5",
        address: "0000:00:05.0",
    },
    Twin {
        name: "ssd1",
        mib: 512, // 65536 blocks fit, the most of one command
        block_size: 4096,
        ssd: "ssd1.img,max_ioqpairs=8,mdts=5,logical_block_size=4096,physical_block_size=4096",
        address: "0000:00:06.0",
    },
];

#[test]
fn the_same_commands_are_answered_alike_by_the_model_and_by_qemu() {
    let lab = Lab::new("truth");
    let theirs = in_machine(&lab);
    let mut used = BTreeSet::new();
    for twin in &TWINS {
        let ours = on_model(twin);
        let theirs = &theirs[twin.name];
        let lines = ours.lines().count();
        assert!(lines > 7000, "{}: only {lines} lines", twin.name);
        let differences = differences(ours.trim_end(), theirs.trim_end()).unwrap();
        let mut unexpected = BTreeMap::new();
        for difference in &differences {
            match ACCEPTED.iter().position(|row| difference.is(row)) {
                Some(row) => drop(used.insert(row)),
                None => unexpected
                    .entry(difference.kind())
                    .or_insert_with(Vec::new)
                    .push(&difference.lines),
            }
        }
        let report = unexpected.iter().map(|(kind, lines)| {
            let (ours, theirs) = lines[0];
            format!(
                "{kind}, {} times:\n  model {ours}\n  QEMU  {theirs}",
                lines.len()
            )
        });
        let report: Vec<String> = report.collect();
        assert!(report.is_empty(), "{}:\n{}", twin.name, report.join("\n"));
        println!(
            "{}: {lines} lines, {} accepted differences",
            twin.name,
            differences.len()
        );
    }
    let unused = ACCEPTED
        .iter()
        .enumerate()
        .filter(|(row, _)| !used.contains(row));
    let unused: Vec<_> = unused.map(|(_, row)| row).collect();
    assert!(
        unused.is_empty(),
        "accepted, but they no longer differ: {unused:#?}"
    );
}

#[test]
fn a_difference_outside_the_table_or_another_sequence_is_found() {
    let ours =
        "0.0 registers [] css=1\n0.1 read.ok [02 nsid:1] status=0/00 dnr=0 data=aa strayed=0";
    let found = |theirs: &str| {
        let differences = differences(ours, theirs).unwrap();
        let outside = differences
            .iter()
            .filter(|difference| !ACCEPTED.iter().any(|row| difference.is(row)));
        (
            differences.len(),
            outside.map(Difference::kind).collect::<Vec<_>>(),
        )
    };
    assert_eq!(found(ours), (0, vec![]));
    assert_eq!(found(&ours.replace("css=1", "css=c1")), (1, vec![]));
    assert_eq!(
        found(&ours.replace("css=1", "css=2")).1,
        ["registers css: 1 against 2"]
    );
    assert_eq!(
        found(&ours.replace("=aa", "=bb")).1,
        ["read.ok data: aa against bb"]
    );
    assert_eq!(
        found(&ours.replace("=aa strayed=0", "=aa")).1,
        ["read.ok strayed: 0 against -"]
    );
    // With another status the rest means nothing.
    let refused = ours.replace("0/00 dnr=0 data=aa strayed=0", "0/80 dnr=1");
    assert_eq!(found(&refused).1, ["read.ok status: 0/00 against 0/80"]);
    for wrong in [&ours.replace("nsid:1", "nsid:2"), "0.0 registers [] css=1"] {
        assert!(differences(ours, wrong).is_err(), "{wrong}");
    }
}

#[test]
fn every_accepted_difference_has_a_reason_and_is_one() {
    for (index, row) in ACCEPTED.iter().enumerate() {
        let (cases, key, ours, theirs, _, why) = row;
        assert!(
            !cases.is_empty() && !key.is_empty() && !why.is_empty() && ours != theirs,
            "{row:?}"
        );
        let double = ACCEPTED[..index]
            .iter()
            .any(|other| other.0 == *cases && other.1 == *key && other.2 == *ours);
        assert!(!double, "twice: {row:?}");
    }
}

// ---- comparing ----

struct Difference<'a> {
    case: &'a str,
    key: &'a str,
    ours: &'a str,
    theirs: &'a str,
    lines: (&'a str, &'a str),
}

impl Difference<'_> {
    fn kind(&self) -> String {
        format!(
            "{} {}: {} against {}",
            self.case, self.key, self.ours, self.theirs
        )
    }

    fn is(&self, (cases, key, ours, theirs, ..): &Accepted) -> bool {
        self.key == *key
            && matches(cases, self.case)
            && matches(ours, self.ours)
            && matches(theirs, self.theirs)
    }
}

/// `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((before, after)) => text.strip_prefix(before).is_some_and(|rest| {
            (0..=rest.len()).any(|end| rest.is_char_boundary(end) && matches(after, &rest[end..]))
        }),
    }
}

/// What differs between two transcripts of the same commands. Where the status does, what comes with it is left out.
fn differences<'a>(ours: &'a str, theirs: &'a str) -> Result<Vec<Difference<'a>>, String> {
    let mut differences = Vec::new();
    let counts = (ours.lines().count(), theirs.lines().count());
    if counts.0 != counts.1 {
        return Err(format!("{} lines against {}", counts.0, counts.1));
    }
    for lines in ours.lines().zip(theirs.lines()) {
        let split = |line: &'a str| {
            line.split_once(']')
                .ok_or_else(|| format!("no command in {line}"))
        };
        let ((sent, ours), (sent_to_theirs, theirs)) = (split(lines.0)?, split(lines.1)?);
        if sent != sent_to_theirs {
            return Err(format!(
                "{sent}] was sent to one, {sent_to_theirs}] to the other"
            ));
        }
        let case = sent.split(' ').nth(1).unwrap_or("");
        let (ours, theirs) = (fields(ours), fields(theirs));
        let value =
            |fields: &BTreeMap<&'a str, &'a str>, key| fields.get(key).copied().unwrap_or("-");
        let mut keys: BTreeSet<&str> = ours.keys().chain(theirs.keys()).copied().collect();
        if value(&ours, "status") != value(&theirs, "status") {
            keys = BTreeSet::from(["status"]);
        }
        for key in keys {
            let (ours, theirs) = (value(&ours, key), value(&theirs, key));
            if ours != theirs {
                differences.push(Difference {
                    case,
                    key,
                    ours,
                    theirs,
                    lines,
                });
            }
        }
    }
    Ok(differences)
}

fn fields(text: &str) -> BTreeMap<&str, &str> {
    text.split_whitespace()
        .map(|field| field.split_once('=').unwrap())
        .collect()
}

// ---- both sides ----

fn on_model(twin: &Twin) -> String {
    let (size, block_size, serial) = (twin.mib << 20, twin.block_size, twin.name);
    let model = format!("ram,size={size},block_size={block_size},serial={serial}");
    let mut command = Command::new(truth_binary());
    let output = command
        .args(["--seeds", SEEDS, "--model", &model])
        .output()
        .unwrap();
    let words = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "on the model: {words}");
    String::from_utf8(output.stdout).unwrap()
}

/// The program that sends, as of now: cargo builds no examples when it is asked for one test only.
fn truth_binary() -> PathBuf {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let target = target.parent().unwrap();
    let mut command = Command::new(env!("CARGO"));
    command.args([
        "build",
        "--quiet",
        "--profile",
        "test",
        "--package",
        "nvme-driver",
        "--example",
        "truth",
    ]);
    command
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"));
    assert!(
        command.status().unwrap().success(),
        "the program was not built"
    );
    target.join("debug/examples/truth")
}

/// The machine gives its transcripts packed: its console is slow.
fn unpack(packed: &str) -> String {
    let mut command = Command::new("sh");
    let pipes = command
        .args(["-c", "base64 -d | gzip -dc"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    let mut child = pipes.spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    let packed = packed.to_owned();
    let feeder = std::thread::spawn(move || input.write_all(packed.as_bytes()));
    let output = child.wait_with_output().unwrap();
    feeder.join().unwrap().unwrap();
    assert!(output.status.success(), "the transcript does not unpack");
    String::from_utf8(output.stdout).unwrap()
}

/// Sends the sequences to the SSDs of a machine. Transcripts by the SSD's name.
fn in_machine(lab: &Lab) -> HashMap<&'static str, String> {
    let payload = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/payload"))
        .arg(lab.path("payload.img"))
        .arg(truth_binary())
        .arg(env!("CARGO_BIN_EXE_tandem")) // to bind with
        .status();
    assert!(payload.unwrap().success(), "no payload was made");
    let mut more = vec!["--memory", "1G", "--payload", "payload.img"];
    let mut job = ". /machine.sh\n".to_owned();
    for Twin {
        name,
        mib,
        ssd,
        address,
        ..
    } in &TWINS
    {
        let medium = File::create(lab.path(&format!("{name}.img"))).unwrap();
        medium.set_len(mib << 20).unwrap();
        more.extend(["--ssd", ssd]);
        job += &format!(
            "step 'vfio-pci has {name}' bind {address}\n\
             send() {{ truth --device pci:{address} --overwrite-data --seeds {SEEDS} >/tmp/{name}; }}\n\
             step 'commands for {name}' send\n\
             gzip -c /tmp/{name} | base64 >/tmp/{name}.packed\n\
             tells {name} /tmp/{name}.packed\n\
             fact {name}.lines \"$(wc -l </tmp/{name})\"\n"
        );
    }
    job += "step 'the IOMMU blocked nothing' no_faults\n";
    let mut guest = Guest::boot(
        lab,
        &Setup {
            cpus: 2,
            more: &more,
            ..Setup::new(&[], &job)
        },
    );
    let counts = TWINS.map(|twin| guest.tells(&format!("{}.lines", twin.name)));
    let facts = guest.ends_well();
    let transcripts = TWINS.iter().zip(&counts).map(|(twin, count)| {
        let transcript = unpack(&facts[twin.name]);
        // Nothing was lost on the console.
        assert_eq!(transcript.lines().count().to_string(), *count);
        (twin.name, transcript)
    });
    transcripts.collect()
}
