//! `examples/perf` on the software controller: what it prints hangs together, and it writes to no SSD unasked.
#![allow(clippy::unwrap_used)]

use std::path::PathBuf;
use std::process::{Command, Output};

/// The example, as of now: cargo builds none when it is asked for one test only.
fn perf(arguments: &[&str]) -> Output {
    let target = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    let target = target.parent().unwrap();
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--profile", "test", "--example", "perf"])
        .arg("--target-dir")
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status();
    assert!(built.unwrap().success(), "examples/perf was not built");
    let perf = target.join("debug/examples/perf");
    Command::new(perf).args(arguments).output().unwrap()
}

/// The number that follows `word` in `text`.
fn number(text: &str, word: &str) -> f64 {
    let (_, rest) = text.split_once(word).expect(word);
    let digits = rest.trim_start().split([' ', ',']).next().unwrap();
    digits.trim().parse().unwrap()
}

#[test]
fn perf_of_each_workload_prints_figures_that_hang_together() {
    for (rw, bs, depth) in [
        ("randread", "512", 1),
        ("randwrite", "4k", 32),
        ("read", "128k", 3),
        ("write", "8k", 1023),
    ] {
        let depth_text = depth.to_string();
        let output = perf(&[
            "--model",
            "ram,size=16m",
            "--rw",
            rw,
            "--bs",
            bs,
            "--iodepth",
            &depth_text,
            "--runtime",
            "0.3",
            "--ramp-time",
            "0.05",
        ]);
        let text = String::from_utf8(output.stdout).unwrap();
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{rw}: {words}");
        assert!(text.contains(&format!("rw={rw}")), "{text}");
        let [mean, p50, p99, p999, max] =
            ["mean", "p50", "p99 ", "p99.9", "max"].map(|word| number(&text, word));
        assert!(
            p50 <= p99 && p99 <= p999 && p999 <= max && mean <= max,
            "{text}"
        );
        // Little's law: what is in flight is what arrives in the time that one takes. Roughly, since the run is short
        // and this process may have to wait for a CPU.
        let in_flight = number(&text, "IOPS") * mean / 1e6;
        let depth = f64::from(depth);
        let near = depth / 2.0..depth * 2.0;
        assert!(near.contains(&in_flight), "{in_flight} in flight: {text}");
    }
}

#[test]
fn perf_that_would_overwrite_an_ssd_or_is_asked_for_nonsense_does_nothing_and_says_why() {
    for (arguments, why) in [
        (
            &["--device", "pci:0000:00:1e.7", "--rw", "write"][..],
            "--overwrite-data",
        ),
        (
            &["--device", "pci:0000:00:1e.7", "--rw", "randwrite"],
            "--overwrite-data",
        ),
        (&["--device", "nvme0", "--rw", "read"], "pci:"),
        (
            &["--model", "ram", "--bs", "1000"],
            "multiple of blocks of 512 bytes",
        ),
        (&["--model", "ram", "--bs", "1g"], "the most of one command"),
        (&["--model", "ram,size=4k", "--bs", "8k"], "smaller than"),
        (&["--model", "ram", "--cpu", "99999"], "CPU 99999"),
        (&["--model", "disk"], "ram[,size=SIZE]"),
    ] {
        let output = perf(arguments);
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success(), "{arguments:?}");
        assert!(
            words.contains(why) && output.stdout.is_empty(),
            "{arguments:?}: {words}"
        );
    }
}
