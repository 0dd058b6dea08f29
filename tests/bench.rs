//! `tandem bench` as its users run it: real measurements, short ones, of every kind of target, and what it refuses.
//!
//! Nothing here depends on how fast this machine is, only on laws that hold at any speed.
#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// A folder of its own for each test, removed at the end.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        Folder::below(Path::new(env!("CARGO_TARGET_TMPDIR")))
    }

    /// A socket's path has at most 107 bytes: not below wherever the sources are.
    fn of_sockets() -> Folder {
        Folder::below(&std::env::temp_dir())
    }

    fn below(parent: &Path) -> Folder {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = parent.join(format!("tandem-bench-{}-{count}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// One measurement at a time: each takes a core, and some servers take another.
fn bench(arguments: &[&str]) -> Output {
    static TURN: Mutex<()> = Mutex::new(());
    let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.arg("bench").args(arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Ends well: its JSON, which is as the schema says.
#[track_caller]
fn measured(arguments: &[&str]) -> Value {
    let json = ["--output-format", "json"];
    let output = bench(&[arguments, &json].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    checked(&output.stdout)
}

#[track_caller]
fn checked(json: &[u8]) -> Value {
    let value: Value = serde_json::from_slice(json).unwrap();
    let schema = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/bench.schema.json");
    let schema: Value = serde_json::from_slice(&fs::read(schema).unwrap()).unwrap();
    let validator = jsonschema::validator_for(&schema).unwrap();
    let errors: Vec<String> = validator
        .iter_errors(&value)
        .map(|error| format!("{}: {error}", error.instance_path()))
        .collect();
    assert!(errors.is_empty(), "{errors:#?}");
    value
}

/// Fails: its code and what it says.
#[track_caller]
fn refused(arguments: &[&str], code: i32, words: &[&str]) {
    let output = bench(arguments);
    let text = stderr(&output);
    assert_eq!(output.status.code(), Some(code), "{text}");
    for word in words {
        assert!(text.contains(word), "{word} is not in: {text}");
    }
}

const RAM: &str = "model:ram,size=16M";
const SHORT: [&str; 4] = ["--runtime", "300ms", "--ramp_time", "50ms"];

fn number(value: &Value, path: &str) -> f64 {
    let found = value.pointer(path).and_then(Value::as_f64);
    found.unwrap_or_else(|| panic!("no number at {path} in {value:#}"))
}

/// Little's law: what is in flight on average is the rate times the time that each takes. It holds for every closed loop
/// that is kept full, however slow, but for both ends: what was in flight when it began is counted with all of its time,
/// and what was in flight at the end not at all. Each end is one latency long at most, the one of what did not come back
/// included.
#[track_caller]
fn obeys_littles_law(job: &Value, in_flight: f64) {
    let mean = number(job, "/read/iops") * number(job, "/read/lat_ns/mean") / 1e9;
    let rounds = job["tandem"]["rounds"].as_array().unwrap();
    let elapsed: f64 = rounds
        .iter()
        .map(|round| number(round, "/elapsed_ns"))
        .sum();
    let longest = [
        "/read/lat_ns/max",
        "/tandem/tail/longest_gap_ns",
        "/tandem/unfinished/oldest_ns",
    ]
    .map(|path| number(job, path))
    .into_iter()
    .fold(0.0, f64::max);
    let ends = 2.0 * longest * rounds.len() as f64 / elapsed;
    assert!(
        (mean / in_flight - 1.0).abs() < 0.02 + ends,
        "{mean} I/Os in flight, not {in_flight}, with {ends} at the ends: {job:#}"
    );
}

#[test]
fn closed_loop_on_the_driver_keeps_its_depth_in_flight() {
    let sweep = ["--device", RAM, "--iodepth", "1,4,32"];
    let result = measured(&[&sweep[..], &SHORT].concat());
    let jobs = result["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), 3);
    for (job, depth) in jobs.iter().zip([1.0, 4.0, 32.0]) {
        obeys_littles_law(job, depth);
        assert_eq!(number(job, "/write/total_ios"), 0.0);
        assert!(number(job, "/tandem/cost_per_io/generator_cpu_ns") > 0.0);
    }
    // Batches share a doorbell.
    assert!(number(&jobs[2], "/tandem/cost_per_io/doorbells") < 0.5);
}

#[test]
fn null_medium_of_any_size_is_measured_and_refuses_to_be_verified() {
    let null = ["--device", "model:null,size=1T", "--iodepth", "4"];
    let result = measured(&[&null[..], &["--rw", "randrw"], &SHORT].concat());
    let target = result.pointer("/tandem/targets/0").unwrap();
    assert_eq!(target["name"], "model:null");
    assert_eq!(
        number(target, "/capacity_bytes"),
        f64::from(1 << 20) * f64::from(1 << 20)
    );
    let verify = ["--verify", "crc32c", "--size", "1M"];
    refused(
        &[&null[..], &verify].concat(),
        2,
        &["--verify", "model:null keeps nothing"],
    );
}

#[test]
fn latency_of_the_model_is_found_in_what_is_measured() {
    let slow = [
        "--device",
        "model:ram,size=16M,latency=2ms",
        "--iodepth",
        "4",
    ];
    let result = measured(&[&slow[..], &SHORT].concat());
    let job = &result["jobs"][0];
    obeys_littles_law(job, 4.0);
    assert!(number(job, "/read/lat_ns/min") >= 2e6);
    assert!(number(job, "/read/clat_ns/min") >= 1.9e6);
    // And the four that were in flight when it began.
    let elapsed = number(job, "/tandem/rounds/0/elapsed_ns") / 1e9;
    assert!(number(job, "/read/total_ios") <= 4.0 / 2e-3 * elapsed + 4.0);
}

/// The right to have servers: they poll, and there may be two cores.
fn turn_of_servers() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server that is ready; killed at the end.
struct Server(Child);

impl Server {
    fn tandem(socket: &str) -> Server {
        let blk = format!("path={socket},queues=2");
        let mut child = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(["serve", "--device", RAM, "--cores", "0", "--blk", &blk])
            .args(["--stats", &format!("{socket}.stats")])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let out = child.stdout.take().unwrap();
        BufReader::new(out).read_line(&mut line).unwrap();
        assert_eq!(line, "tandem: ready\n");
        Server(child)
    }

    fn qemu(socket: &str, disk: &str) -> Server {
        let export = format!(
            "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket},writable=on"
        );
        let node = format!("driver=file,node-name=n,filename={disk}");
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &node, "--export", &export])
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-storage-daemon: package qemu-utils or qemu-system-common");
        Server(child)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn server_is_measured_in_every_way_of_its_rings() {
    let _turn = turn_of_servers();
    let folder = Folder::of_sockets();
    let socket = folder.path("disk.sock");
    let server = Server::tandem(&socket);
    for ways in [
        ["split", "on", "off", "on"],
        ["split", "off", "off", "off"],
        ["split", "on", "on", "on"],
        ["split", "off", "on", "off"],
        ["packed", "on", "off", "on"],
        ["packed", "off", "off", "off"],
        ["packed", "on", "on", "off"],
        ["packed", "off", "on", "on"],
        ["split", "on", "armed", "on"],
        ["packed", "on", "armed", "on"],
        ["packed", "off", "armed", "off"],
    ] {
        let [ring, indirect, interrupts, event_idx] = ways;
        let result = measured(
            &[
                &["--vhost-user", &socket, "--iodepth", "8"][..],
                &["--indirect", indirect, "--interrupts", interrupts],
                &["--event-idx", event_idx, "--ring", ring],
                &SHORT,
            ]
            .concat(),
        );
        let job = &result["jobs"][0];
        obeys_littles_law(job, 8.0);
        let target = result.pointer("/tandem/targets/0").unwrap();
        assert_eq!(target["ring"], ring);
        assert_eq!(
            number(&result, "/tandem/targets/0/server_pid"),
            f64::from(server.0.id())
        );
        // It polls all the time, so it costs something whatever the clock's steps of 10 ms.
        assert!(
            number(job, "/tandem/cost_per_io/server_cpu_ns") > 0.0,
            "{ways:?}"
        );
        let notified = number(job, "/tandem/cost_per_io/notifications") > 0.0;
        assert_eq!(notified, interrupts != "off", "{ways:?}");
    }
}

#[test]
fn server_that_tells_has_the_stages_of_its_requests_in_the_result() {
    let _turn = turn_of_servers();
    let folder = Folder::of_sockets();
    let socket = folder.path("disk.sock");
    let server = Server::tandem(&socket);
    let target = format!("{socket},stats={socket}.stats,interrupts=on");
    let load = ["--iodepth", "8", "--numjobs", "2", "--runtime", "1s"];
    let result = measured(
        &[
            &["--vhost-user", &target][..],
            &load,
            &["--ramp_time", "100ms"],
        ]
        .concat(),
    );
    let job = &result["jobs"][0];
    let queues = job.pointer("/tandem/stages").unwrap();
    assert_eq!(queues.as_array().unwrap().len(), 2);
    let longest = number(job, "/read/lat_ns/max");
    for queue in queues.as_array().unwrap() {
        let samples = number(queue, "/submit/N");
        assert!(samples > 20.0, "{queue}");
        for stage in ["submit", "device", "used", "signal"] {
            let of = &queue[stage];
            let bins = of["bins"].as_object().unwrap();
            let sum: u64 = bins.values().map(|count| count.as_u64().unwrap()).sum();
            assert_eq!(number(of, "/N"), sum as f64);
            // A request that is forgotten was submitted, and one in eight beyond is a bin's width.
            assert!(number(of, "/N") <= samples, "{queue}");
            assert!(number(of, "/p50_ns") <= longest * 1.125, "{queue}");
        }
    }
    let text = bench(&["--vhost-user", &target, "--runtime", "300ms"]).stdout;
    let text = String::from_utf8(text).unwrap();
    assert!(
        text.contains("stages in the server (usec, p50/p99 of "),
        "{text}"
    );
    assert!(text.contains("nsec in the run queue"), "{text}");
    // What was measured must be there: another socket's server tells nothing of it.
    drop(server);
    let other = folder.path("other.sock");
    let _server = Server::tandem(&other);
    let foreign = format!("{other},stats={socket}");
    let error = stderr(&bench(&["--vhost-user", &foreign, "--runtime", "100ms"]));
    assert!(error.contains("statistics socket"), "{error}");
}

#[test]
fn mixed_load_on_two_queues_of_a_server_reads_what_it_wrote() {
    let _turn = turn_of_servers();
    let folder = Folder::of_sockets();
    let socket = folder.path("disk.sock");
    let _server = Server::tandem(&socket);
    // On a ring of either kind, where flushes take fewer descriptors than the others, and laps differ.
    for ways in ["ring=split", "ring=packed", "ring=packed,indirect=off"] {
        let target = format!("{socket},{ways}");
        let load = [
            ["--vhost-user", &target],
            ["--rw", "randrw"],
            ["--rwmixread", "30"],
            ["--fsync", "16"],
            ["--verify", "crc32c"],
            ["--size", "1M"],
            ["--numjobs", "2"],
            ["--iodepth", "8"],
        ];
        let result = measured(&[load.as_flattened(), &SHORT].concat());
        is_mixed_and_verified(&result["jobs"][0]);
    }
}

#[track_caller]
fn is_mixed_and_verified(job: &Value) {
    let [reads, writes, syncs] =
        ["read", "write", "sync"].map(|op| number(job, &format!("/{op}/total_ios")));
    assert!(
        reads > 0.0 && writes > 0.0 && syncs > 0.0,
        "{reads} {writes} {syncs}"
    );
    // Of so few, within a wide margin; and one flush to each 16 writes, but for the ends of two queues.
    assert!(
        (syncs - writes / 16.0).abs() <= 4.0 + writes / 160.0,
        "{writes} {syncs}"
    );
    assert!(number(job, "/tandem/verified_reads") > 0.0);
    assert_eq!(job["tandem"]["queues"].as_array().unwrap().len(), 2);
}

#[test]
fn socket_named_twice_is_measured_with_rings_of_both_kinds_in_turn() {
    let _turn = turn_of_servers();
    let folder = Folder::of_sockets();
    let socket = folder.path("disk.sock");
    let server = Server::tandem(&socket);
    let packed = format!("{socket},ring=packed");
    let targets = ["--vhost-user", &socket, "--vhost-user", &packed];
    let load = ["--iodepth", "4", "--rounds", "2"];
    let result = measured(&[&targets[..], &load, &SHORT].concat());
    let of = |key: &str| -> Vec<Value> {
        let targets = result.pointer("/tandem/targets").unwrap();
        let targets = targets.as_array().unwrap().iter();
        targets.map(|target| target[key].clone()).collect()
    };
    assert_eq!(of("name"), [Value::from(socket), Value::from(packed)]);
    assert_eq!(of("ring"), ["split", "packed"]);
    assert_eq!(of("server_pid"), [server.0.id(), server.0.id()]);
    for job in result["jobs"].as_array().unwrap() {
        obeys_littles_law(job, 4.0);
    }
}

#[test]
fn parked_server_stands_still_while_another_is_measured_and_serves_afterwards() {
    let _turn = turn_of_servers();
    let folder = Folder::of_sockets();
    let sockets = ["a.sock", "b.sock"].map(|name| folder.path(name));
    let [a, b] = &sockets;
    // Both on one core, which each would have all of.
    let servers = (Server::tandem(a), Server::tandem(b));
    let targets = ["--vhost-user", a, "--vhost-user", b, "--park"];
    let load = ["--rounds", "1", "--runtime", "1", "--ramp_time", "100ms"];
    let pids = [servers.0.0.id(), servers.1.0.id()];
    let stands_still = |pid: &u32| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        stat.rsplit_once(") ").unwrap().1.starts_with('T')
    };
    let over = AtomicBool::new(false);
    let (result, seen) = std::thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let mut seen = [false; 2];
            while !over.load(Ordering::Relaxed) {
                for (seen, pid) in seen.iter_mut().zip(&pids) {
                    *seen |= stands_still(pid);
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            seen
        });
        let result = measured(&[&targets[..], &load].concat());
        over.store(true, Ordering::Relaxed);
        (result, watcher.join().unwrap())
    });
    assert_eq!(seen, [true, true]);
    for (index, pid) in pids.iter().enumerate() {
        let path = format!("/tandem/targets/{index}/server_pid");
        assert_eq!(number(&result, &path), f64::from(*pid));
        assert!(!stands_still(pid));
        // It goes on: it answers.
        measured(&[&["--vhost-user", &sockets[index]][..], &SHORT].concat());
    }
    // A file has no server that could be parked.
    let file = folder.path("file");
    let targets = ["--vhost-user", a, "--file", &file, "--size", "1M", "--park"];
    refused(&targets, 2, &["--park", "file"]);
}

#[test]
fn foreign_server_is_measured_beside_ours_with_ratios_and_a_band() {
    let _turn = turn_of_servers();
    let folder = Folder::of_sockets();
    let [ours, foreign, disk] = ["ours.sock", "foreign.sock", "disk"].map(|name| folder.path(name));
    fs::write(&disk, vec![1; 4 << 20]).unwrap();
    let _servers = (Server::tandem(&ours), Server::qemu(&foreign, &disk));
    let targets = ["--vhost-user", &ours, "--vhost-user", &foreign];
    let load = ["--iodepth", "4", "--rounds", "2", "--runtime", "1"];
    let result = measured(&[&targets[..], &load].concat());
    let labels: Vec<&str> = result["jobs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|job| job["tandem"]["label"].as_str().unwrap())
        .collect();
    assert_eq!(labels, ["A", "A'", "B"]);
    for job in result["jobs"].as_array().unwrap() {
        obeys_littles_law(job, 4.0);
        assert_eq!(job["tandem"]["rounds"].as_array().unwrap().len(), 2);
    }
    let ratios = result.pointer("/tandem/cases/0/ratios").unwrap();
    assert_eq!(ratios.as_array().unwrap().len(), 3);
    let [low, high] = ["0", "1"].map(|end| number(ratios, &format!("/0/band/{end}")));
    assert!(low <= 1.0 && high >= 1.0 && (low * high - 1.0).abs() < 1e-9);
    assert_eq!(
        result
            .pointer("/tandem/cases/0/ping_pong_ns")
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        3
    );
}

#[test]
fn file_is_laid_out_and_read_through_the_kernel() {
    let folder = Folder::new();
    let file = folder.path("file");
    for interrupts in ["off", "on"] {
        let result = measured(
            &[
                &["--file", &file, "--size", "4M", "--iodepth", "4"][..],
                &["--interrupts", interrupts],
                &SHORT,
            ]
            .concat(),
        );
        obeys_littles_law(&result["jobs"][0], 4.0);
        let description = result.pointer("/tandem/targets/0/description").unwrap();
        let text = description.as_str().unwrap();
        assert!(
            text.contains("O_DIRECT") && text.contains("4194304"),
            "{text}"
        );
    }
    // No holes: they would be read faster.
    let data = fs::read(&file).unwrap();
    assert_eq!(data.len(), 4 << 20);
    assert!(
        data.chunks(4096)
            .all(|block| block.iter().any(|byte| *byte != 0))
    );
}

#[test]
fn corrupted_block_is_found_by_verify_and_named_by_its_offset() {
    let folder = Folder::new();
    let file = folder.path("file");
    // Every block is written: in order, and for as long as it takes.
    let both = [
        ["--file", &file],
        ["--size", "256K"],
        ["--verify", "crc32c"],
        ["--iodepth", "8"],
        ["--runtime", "1"],
        ["--ramp_time", "0"],
    ];
    let [write, read] = ["write", "read"].map(|rw| [both.as_flattened(), &["--rw", rw]].concat());
    let written = measured(&write);
    let verified = number(&written, "/jobs/0/tandem/verified_reads");
    assert_eq!(verified, 64.0, "the disk is too slow");
    measured(&read);

    let disk = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(&file)
        .unwrap();
    let at = 17 * 4096 + 1000;
    let mut byte = [0];
    disk.read_exact_at(&mut byte, at).unwrap();
    disk.write_all_at(&[byte[0] ^ 1], at).unwrap();
    disk.sync_all().unwrap();
    let start = Instant::now();
    refused(&read, 1, &["verify: offset 69632", "crc32c"]);
    // At once: nothing is waited for that has come back.
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn percentile_without_samples_is_null_with_the_reason() {
    let slow = [
        "--device",
        "model:ram,size=16M,latency=1ms",
        "--iodepth",
        "1",
    ];
    let result = measured(&[&slow[..], &SHORT].concat());
    let latencies = &result["jobs"][0]["read"]["lat_ns"];
    // 300 at most.
    let count = number(latencies, "/N");
    assert!((20.0..=320.0).contains(&count), "{count}");
    assert!(latencies["percentile"]["50.000000"].is_u64());
    for percent in ["99.000000", "99.999000"] {
        assert!(latencies["percentile"][percent].is_null());
        let reason = latencies["percentile_declined"][percent].as_str().unwrap();
        assert!(reason.contains("10 are needed"), "{reason}");
    }
    let output = bench(&[&slow[..], &SHORT].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    let values = text.lines().find(|line| line.contains("usec  ")).unwrap();
    let cells: Vec<&str> = values.split_whitespace().collect();
    assert_eq!(cells[4..7], ["-", "-", "-"], "{text}");
}

#[test]
fn open_loop_beyond_capacity_counts_the_time_in_the_queue() {
    // One in flight, a millisecond each: a thousand a second at most, and twice as many arrive.
    let slow = [
        "--device",
        "model:ram,size=16M,latency=1ms",
        "--rate_iops",
        "2000",
    ];
    let latency = |runtime: &str| {
        let time = ["--runtime", runtime, "--ramp_time", "0"];
        let result = measured(&[&slow[..], &time].concat());
        let job = &result["jobs"][0];
        let elapsed = number(job, "/tandem/rounds/0/elapsed_ns") / 1e6;
        assert!(number(job, "/read/total_ios") <= elapsed + 1.0);
        assert!(number(job, "/tandem/backlog/arrivals") > 0.0);
        assert!(number(job, "/tandem/backlog/oldest_ns") > 0.0);
        // The target itself is no slower: the time passes before the hand-over.
        let [lat, slat] = ["/read/lat_ns/mean", "/read/slat_ns/mean"].map(|path| number(job, path));
        assert!(slat > lat / 2.0, "{lat} {slat}");
        // Each waits half a millisecond longer than the one before: arrivals are that far apart, services twice as far.
        // A generator that loses its CPU serves fewer, and those wait longer. Poisson takes some of it away.
        let served = number(job, "/read/total_ios");
        let expected = served / 2.0 * 0.5e6;
        assert!(lat >= 0.6 * expected, "{served} I/Os, latency {lat}");
        lat
    };
    let (short, long) = (latency("200ms"), latency("800ms"));
    assert!(
        long >= 1.5 * short,
        "latency does not grow: {short} and {long}"
    );
}

#[test]
fn open_loop_within_capacity_arrives_at_its_rate() {
    let load = ["--device", RAM, "--rate_iops", "2000", "--iodepth", "64"];
    let time = ["--runtime", "1", "--ramp_time", "0"];
    let result = measured(&[&load[..], &time].concat());
    let job = &result["jobs"][0];
    let count: f64 = [
        "/read/total_ios",
        "/tandem/unfinished/ios",
        "/tandem/backlog/arrivals",
    ]
    .map(|path| number(job, path))
    .iter()
    .sum();
    let expected = 2000.0 * number(job, "/tandem/rounds/0/elapsed_ns") / 1e9;
    // Five standard deviations of a Poisson count.
    assert!(
        (count - expected).abs() < 5.0 * expected.sqrt(),
        "{count} arrivals, not {expected}"
    );
}

#[test]
fn load_curve_measures_the_most_and_then_shares_of_it_and_is_drawn() {
    let folder = Folder::new();
    let plot = folder.path("load.svg");
    let load = [
        "--device",
        "model:ram,size=16M,latency=500us",
        "--load-curve",
        "20..50%",
    ];
    let result = measured(&[&load[..], &SHORT, &["--plot", &plot]].concat());
    let jobs = result["jobs"].as_array().unwrap();
    let percents: Vec<&Value> = jobs
        .iter()
        .map(|job| &job["tandem"]["load_percent"])
        .collect();
    assert_eq!(
        percents,
        [&Value::Null, &20.into(), &30.into(), &40.into(), &50.into()]
    );
    let most = number(&jobs[0], "/read/iops");
    for job in &jobs[1..] {
        let share = number(job, "/tandem/load_percent") / 100.0;
        assert!((number(job, "/tandem/rate_iops") / (most * share) - 1.0).abs() < 1e-6);
    }
    assert_eq!(
        result
            .pointer("/tandem/knees")
            .unwrap()
            .as_array()
            .unwrap()
            .len(),
        1
    );
    let svg = fs::read_to_string(&plot).unwrap();
    for title in ["Latency distribution", "Latency under load"] {
        assert!(svg.contains(title), "{title}");
    }
    assert!(svg.contains("polyline") && svg.trim_end().ends_with("</svg>"));
}

#[test]
fn json_plus_has_bins_that_hold_every_sample() {
    let folder = Folder::new();
    let path = folder.path("result.json");
    let output = ["--output-format", "json+", "--output", &path];
    let output = bench(&[&["--device", RAM][..], &SHORT, &output].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(output.stdout.is_empty());
    let result = checked(&fs::read(&path).unwrap());
    let latencies = &result["jobs"][0]["read"]["lat_ns"];
    let bins = latencies["bins"].as_object().unwrap();
    let sum: u64 = bins.values().filter_map(Value::as_u64).sum();
    assert!(sum > 0);
    assert_eq!(latencies["N"], sum);
}

#[test]
fn terse_line_has_the_fields_of_fio_in_their_places() {
    let load = [
        "--device",
        RAM,
        "--rw",
        "randrw",
        "--output-format",
        "terse",
    ];
    let output = bench(&[&load[..], &SHORT].concat());
    let text = String::from_utf8(output.stdout).unwrap();
    let fields: Vec<&str> = text.trim_end().split(';').collect();
    assert_eq!(fields.len(), 121, "{text}");
    assert_eq!((fields[0], fields[2], fields[4]), ("3", "bench/A", "0"));
    // Reads and writes are alike and 41 fields apart: bandwidth in KiB/s is four times IOPS with blocks of 4 KiB.
    for start in [5, 46] {
        let [_, bandwidth, iops, runtime] =
            [0, 1, 2, 3].map(|at| fields[start + at].parse::<f64>().unwrap());
        assert!((bandwidth / iops - 4.0).abs() < 0.01, "{text}");
        assert!((250.0..=2000.0).contains(&runtime), "{text}");
        assert!(fields[start + 18].starts_with("50.000000%="), "{text}");
    }
}

#[test]
fn job_file_is_measured_section_by_section() {
    let folder = Folder::new();
    let path = folder.path("two.fio");
    let text = "[global]\nramp_time=0\nruntime=100ms\n[first]\nrw=randwrite\nbs=8k\n[second]\nstonewall\niodepth=4\n";
    fs::write(&path, text).unwrap();
    let result = measured(&[&path, "--device", RAM]);
    let jobs = result["jobs"].as_array().unwrap();
    let names: Vec<&str> = jobs
        .iter()
        .map(|job| job["jobname"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["first", "second"]);
    let writes = number(&jobs[0], "/write/total_ios");
    assert_eq!(number(&jobs[0], "/write/io_bytes"), 8192.0 * writes);
    assert_eq!(jobs[1]["job options"]["iodepth"], "4");
    assert_eq!(number(&jobs[1], "/write/total_ios"), 0.0);
}

#[test]
fn interrupted_measurement_reports_what_there_is_and_exits_as_fio_does() {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tandem"))
        .args([
            "bench",
            "--device",
            RAM,
            "--iodepth",
            "1,4",
            "--rounds",
            "9",
        ])
        .args([
            "--runtime",
            "1000",
            "--ramp_time",
            "0",
            "--output-format",
            "json",
        ])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    let pid = Pid::from_child(&child);
    kill_process(pid, Signal::INT).unwrap();
    let mut json = Vec::new();
    child.stdout.take().unwrap().read_to_end(&mut json).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(128));
    assert!(start.elapsed() < Duration::from_secs(60));
    let result = checked(&json);
    assert_eq!(result.pointer("/tandem/interrupted").unwrap(), true);
    // One depth of two, one round of nine.
    let jobs = result["jobs"].as_array().unwrap();
    assert_eq!(jobs.len(), 1);
    assert_eq!(jobs[0]["tandem"]["rounds"].as_array().unwrap().len(), 1);
    obeys_littles_law(&jobs[0], 1.0);
    assert!(number(&jobs[0], "/read/total_ios") > 0.0);
}

#[test]
fn trims_are_counted_apart() {
    let load = ["--device", RAM, "--rw", "randtrim", "--iodepth", "4"];
    let result = measured(&[&load[..], &SHORT].concat());
    assert!(number(&result, "/jobs/0/trim/total_ios") > 0.0);
    assert_eq!(number(&result, "/jobs/0/read/total_ios"), 0.0);
}

#[test]
fn what_makes_no_sense_is_refused_with_2_before_anything_is_measured() {
    let folder = Folder::new();
    let job = folder.path("bad.fio");
    fs::write(&job, "[a]\nbs=4k\nioengine=libaio\n").unwrap();
    refused(
        &[&job, "--device", RAM],
        2,
        &["bad.fio:3", "`ioengine=libaio`"],
    );
    let pci = ["--device", "pci:0000:ff:1f.7", "--rw", "randwrite"];
    refused(
        &pci,
        2,
        &["pci:0000:ff:1f.7", "--overwrite-data", "randwrite"],
    );
    refused(&[], 2, &["no target"]);
    let device = ["--device", RAM];
    for (flags, words) in [
        (&["--iodepth", "1,x"][..], &["`x` in `1,x`"][..]),
        (&["--iodepth", "4,4"], &["depth 4 is named twice"]),
        (&["--rw", "sideways"], &["`sideways` is none of read"]),
        (&["--size", "17M"], &["--size 17825792", "16777216 bytes"]),
        (&["--bs", "1k", "--offset", "100"], &["--offset 100", "512"]),
        (
            &[
                "--numjobs",
                "64",
                "--verify",
                "crc32c",
                "--rw",
                "write",
                "--size",
                "64K",
            ],
            &["no room"],
        ),
        (&["--interrupts", "on"], &["a --device is only polled"]),
        (
            &["--interrupts", "armed"],
            &["--interrupts armed: a --device"],
        ),
        (&["--park"], &["--park", "model:ram"]),
        (&["--vhost-user", "x,ring=round"], &["ring: `round`"]),
        (
            &["--verify", "crc32c", "--size", "64K", "--iodepth", "16"],
            &["twice as many blocks"],
        ),
        (
            &["--load-curve", "10..95%", "--rate_iops", "5"],
            &["drop --rate_iops"],
        ),
        (&["--verify", "md5"], &["crc32c is"]),
        (
            &["--output", "/proc/no/such/file"],
            &["cannot write /proc/no/such/file"],
        ),
    ] {
        refused(&[&device[..], flags].concat(), 2, words);
    }
    refused(
        &["--vhost-user", &folder.path("none")],
        2,
        &["none", "cannot connect"],
    );
    refused(
        &["--file", &folder.path("none")],
        2,
        &["does not exist", "--size"],
    );
}
