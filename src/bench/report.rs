//! The result for people.

use std::fmt::Write;

use super::io::Op;
use super::session::{CaseResult, Results, Series};
use super::stats::{LEAST_BEYOND, Latencies, Outcome, PERCENTILES, Usage, whole};
use super::target::Info;
use crate::stats::{Stage, StageCounts};

/// The whole result.
#[must_use]
pub fn normal(results: &Results) -> String {
    let mut out = header(results);
    for case in &results.cases {
        one_case(&mut out, results, case);
    }
    if results.interrupted {
        out.push_str("\ninterrupted: this is what was measured until then\n");
    }
    let knees = results.knees();
    if !knees.is_empty() {
        out.push('\n');
    }
    for knee in knees {
        let _ = match knee.bends {
            true => writeln!(
                out,
                "{} {}: the knee is at {} % of its most, {} IOPS: beyond, p99 is more than 3 times the lowest",
                knee.job,
                knee.label,
                knee.share,
                count(knee.iops)
            ),
            false => writeln!(
                out,
                "{} {}: no knee up to {} % of its most",
                knee.job, knee.label, knee.share
            ),
        };
    }
    out
}

fn header(results: &Results) -> String {
    let here = &results.environment;
    let known = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
    let mut out = format!(
        "tandem bench {}, commit {}\n{} CPUs{}, {}, Linux {}, governor {}, isolcpus {}, {} huge page(s), {} NUMA node(s)\n",
        here.version,
        known(&here.commit),
        here.cpus,
        if here.hypervisor { " (virtual)" } else { "" },
        known(&here.cpu),
        known(&here.kernel),
        known(&here.governor),
        here.isolcpus.as_deref().unwrap_or("none"),
        here.huge_pages.unwrap_or(0),
        here.numa_nodes,
    );
    let mut labelled: Vec<(usize, &str)> = Vec::new();
    for series in results.cases.iter().flat_map(|case| &case.series) {
        if !labelled.iter().any(|(target, _)| *target == series.target) {
            labelled.push((series.target, &series.label));
        }
    }
    for (target, label) in labelled {
        if let Some(info) = results.infos.get(target) {
            let _ = writeln!(out, "{label:<2} {}: {}", info.name, info.description);
        }
    }
    out
}

fn one_case(out: &mut String, results: &Results, result: &CaseResult) {
    let job = &result.case.job;
    let load = match (result.case.share, job.rate_iops) {
        (Some(share), _) => format!("open loop at {share} % of the most"),
        (None, Some(rate)) => format!("open loop, {} IOPS a job", count(rate)),
        (None, None) => "closed loop".to_owned(),
    };
    let _ = writeln!(
        out,
        "\n{}: rw={} bs={} iodepth={} numjobs={}, {load}; {} round(s) of {:?} after {:?}",
        job.name,
        job.rw,
        job.bs,
        result.case.depth,
        job.numjobs,
        results.rounds,
        job.runtime,
        job.ramp_time
    );
    for series in &result.series {
        one_series(out, results, series);
    }
    for ratio in result.ratios() {
        let verdict = match ratio.within_noise() {
            true => "within noise",
            false => "beyond the noise",
        };
        let _ = writeln!(
            out,
            "  {} / A, {}: {:.3} (A'/A: {:.3} to {:.3}), {verdict}",
            ratio.label, ratio.metric, ratio.ratio, ratio.band.0, ratio.band.1
        );
    }
    let pings: Vec<f64> = result.pings.iter().flatten().copied().collect();
    let _ = match (results.cpus, pings.as_slice()) {
        (Some((from, to)), [_, ..]) => {
            let text: Vec<String> = pings.iter().map(|ping| format!("{ping:.0}")).collect();
            writeln!(
                out,
                "  ping-pong between CPUs {from} and {to}, before and after each round (nsec): {}",
                text.join(" ")
            )
        }
        _ => writeln!(out, "  ping-pong: no two CPUs to measure it on"),
    };
}

fn one_series(out: &mut String, results: &Results, series: &Series) {
    let Some(info) = results.infos.get(series.target) else {
        return;
    };
    let total = series.total();
    let _ = writeln!(out, "  {} {}", series.label, info.name);
    for op in Op::ALL {
        if total.op(op).lat.count() > 0 {
            operation(out, &total, op);
        }
    }
    if total.ios() == 0 {
        let _ = writeln!(out, "    no I/O was completed: --runtime is too short");
    }
    let queues = series.rounds.first().map_or(0, |round| round.queues.len());
    if queues > 1 {
        for index in 0..queues {
            let mut queue = Outcome::default();
            let rounds = series.rounds.iter();
            rounds
                .filter_map(|round| round.queues.get(index))
                .for_each(|part| queue.add_after(part));
            let all = queue.all();
            let _ = writeln!(
                out,
                "    queue {index}: IOPS={}, lat (usec) p50 {} p99 {} max {}",
                count(queue.iops()),
                cell(&all, 50.0),
                cell(&all, 99.0),
                micros(all.max() as f64)
            );
        }
    }
    stages(out, series);
    cost(out, info, series, &total);
    let _ = writeln!(out, "    tail: {}", tail(series, &total));
    // A short queue at the end is chance; one that took a twentieth of the time to grow is not.
    let rounds = series.rounds.len().max(1) as u64;
    if total.backlog_age * 20 > total.elapsed / rounds {
        let _ = writeln!(
            out,
            "    it fell behind: {} arrivals were due and not sent at the end, the first of them for {} usec",
            total.backlog,
            micros(total.backlog_age as f64)
        );
    }
    if total.unfinished_age > total.all().max() {
        let _ = writeln!(
            out,
            "    {} I/O(s) had not come back at the end, the oldest after {} usec: longer than any that did",
            total.unfinished,
            micros(total.unfinished_age as f64)
        );
    }
    if total.verified > 0 {
        let _ = writeln!(
            out,
            "    verify: {} reads were as they should be",
            total.verified
        );
    }
}

fn operation(out: &mut String, total: &Outcome, op: Op) {
    let stats = total.op(op);
    let lat = &stats.lat;
    let bandwidth = match stats.bytes {
        0 => String::new(),
        bytes => format!(
            ", BW={:.1} MiB/s",
            total.per_second(bytes) / f64::from(1 << 20)
        ),
    };
    let _ = writeln!(
        out,
        "    {:<5}: IOPS={}{bandwidth}, {} in {:.3} s",
        op.name(),
        count(total.per_second(lat.count())),
        lat.count(),
        total.elapsed as f64 / 1e9
    );
    let _ = writeln!(
        out,
        "      lat (usec): mean {}, stdev {}, min {}; of the mean, {} before the hand-over (slat), {} after (clat)",
        micros(lat.mean()),
        micros(lat.stddev()),
        micros(lat.min() as f64),
        micros(stats.slat.mean()),
        micros(stats.clat.mean())
    );
    let mut names = String::new();
    let mut values = String::new();
    let mut beyond = String::new();
    for percent in PERCENTILES {
        let _ = write!(names, "{:>11}", format!("p{percent}"));
        let _ = write!(values, "{:>11}", cell(lat, percent));
        let _ = write!(beyond, "{:>11}", lat.percentile(percent).beyond);
    }
    let _ = writeln!(out, "      percentile{names}{:>11}", "max");
    let _ = writeln!(
        out,
        "      usec      {values}{:>11}",
        micros(lat.max() as f64)
    );
    let _ = writeln!(out, "      samples > {beyond}{:>11}", 0);
    if PERCENTILES
        .iter()
        .any(|percent| lat.percentile(*percent).value.is_none())
    {
        let _ = writeln!(
            out,
            "      - : fewer than {LEAST_BEYOND} samples are beyond it, which would be chance"
        );
    }
}

fn cell(latencies: &Latencies, percent: f64) -> String {
    let value = latencies.percentile(percent).value;
    value.map_or_else(|| "-".to_owned(), |nanos| micros(nanos as f64))
}

fn cost(out: &mut String, info: &Info, series: &Series, total: &Outcome) {
    let ios = total.all().count().max(1) as f64;
    let per = |value: u64| value as f64 / ios;
    let usage = total.usage;
    let _ = write!(
        out,
        "    cost of an I/O: generator {:.0} nsec of CPU ({:.0} % in the kernel; {:.0} nsec in the run queue)",
        per(usage.cpu()),
        100.0 * usage.system as f64 / usage.cpu().max(1) as f64,
        per(usage.waited)
    );
    if let Some(server) = server_usage(series) {
        let _ = write!(
            out,
            ", server {:.0} nsec ({:.0} % in the kernel; {:.0} nsec in the run queue; {} switches, {} of them involuntary)",
            per(server.cpu()),
            100.0 * server.system as f64 / server.cpu().max(1) as f64,
            per(server.waited),
            server.voluntary_switches + server.involuntary_switches,
            server.involuntary_switches
        );
    }
    let _ = writeln!(
        out,
        ", {:.3} {}, {:.3} notifications, {:.2} polls ({:.0} % idle)",
        per(total.counters.doorbells),
        info.doorbells,
        per(total.counters.notifications),
        per(total.polls),
        100.0 * total.idle_polls as f64 / total.polls.max(1) as f64
    );
}

/// Where the server's sampled requests spent their time.
fn stages(out: &mut String, series: &Series) {
    let told = told_stages(series);
    for (queue, counts) in told.iter().enumerate() {
        let mut parts = Vec::new();
        for stage in Stage::ALL {
            let [half, most] = [50, 99].map(|percent| {
                let nanos = counts.percentile(stage, percent);
                nanos.map_or_else(|| "-".to_owned(), |nanos| micros(nanos as f64))
            });
            parts.push(format!("{} {half}/{most}", stage.name()));
        }
        let which = match told.len() {
            1 => String::new(),
            _ => format!(" of queue {queue}"),
        };
        let _ = writeln!(
            out,
            "    stages in the server{which} (usec, p50/p99 of {} sampled): {}",
            counts.count(Stage::Submit),
            parts.join(", ")
        );
    }
}

/// By virtqueue, of all rounds.
#[must_use]
pub fn told_stages(series: &Series) -> Vec<StageCounts> {
    let count = series.rounds.iter().map(|round| round.stages.len()).max();
    let mut sums = vec![StageCounts::default(); count.unwrap_or(0)];
    for round in &series.rounds {
        for (sum, stages) in sums.iter_mut().zip(&round.stages) {
            sum.add(stages);
        }
    }
    sums
}

/// Of all rounds; `None` when there is no server on this machine.
#[must_use]
pub fn server_usage(series: &Series) -> Option<Usage> {
    let mut rounds = series.rounds.iter().filter_map(|round| round.server);
    let first = rounds.next()?;
    Some(rounds.fold(first, |mut sum, usage| {
        sum.add(usage);
        sum
    }))
}

/// Whether the tail is the target's, or this machine's.
#[must_use]
pub fn tail(series: &Series, total: &Outcome) -> String {
    let count = total.all().count();
    let steal: u64 = series.rounds.iter().map(|round| round.steal).sum();
    let switches = total.usage.involuntary_switches;
    // From where on half of the samples or more were found by late polls; the maximum is one sample.
    let reach = |beyond: u64| total.found_late > 0 && total.found_late * 2 >= beyond.max(1);
    let names = [
        (99.0, "p99"),
        (99.9, "p99.9"),
        (99.99, "p99.99"),
        (99.999, "p99.999"),
    ];
    let from = names
        .iter()
        .find(|(percent, _)| reach(whole(count as f64 * (100.0 - percent) / 100.0)))
        .map(|(_, name)| *name);
    let facts = format!(
        "longest time between two polls {} usec, {switches} involuntary switches, {} msec stolen by the host",
        micros(total.longest_gap as f64),
        steal / 1_000_000
    );
    let Some(from) = from else {
        return format!("{facts}: the tail is the target's");
    };
    let why = match (switches, steal) {
        (0, 0) => "the generator polled late, though nothing says who had its CPU",
        (0, _) => "preemption by the host",
        _ => "preemption of the generator",
    };
    format!(
        "{facts}: {from} and beyond are dominated by {why} ({} I/Os were found by {} late polls)",
        total.found_late, total.late_polls
    )
}

/// Nanoseconds as microseconds.
fn micros(nanos: f64) -> String {
    let micros = nanos / 1000.0;
    match micros {
        0.0..100.0 => format!("{micros:.2}"),
        100.0..10_000.0 => format!("{micros:.1}"),
        _ => format!("{micros:.0}"),
    }
}

/// `1234`, `56.7k`, `1.23M`.
fn count(value: f64) -> String {
    match value {
        0.0..10_000.0 => whole(value.round()).to_string(),
        10_000.0..1e6 => format!("{:.1}k", value / 1e3),
        _ => format!("{:.3}M", value / 1e6),
    }
}

#[cfg(test)]
mod tests {
    use super::super::target::Measured;
    use super::*;

    fn tail_of(outcome: Outcome, steal: u64) -> String {
        let series = Series {
            label: "A".to_owned(),
            target: 0,
            rate: None,
            rounds: vec![Measured {
                queues: vec![outcome.clone()],
                steal,
                ..Measured::default()
            }],
        };
        tail(&series, &outcome)
    }

    #[test]
    fn tail_is_preemption_only_when_late_polls_found_most_of_it() {
        let mut outcome = Outcome::default();
        for _ in 0..10_000 {
            outcome.op_mut(Op::Read).lat.record(1000);
        }
        assert!(tail_of(outcome.clone(), 0).contains("the tail is the target's"));
        outcome.found_late = 4;
        assert!(tail_of(outcome.clone(), 0).contains(": p99.99 and beyond"));
        outcome.found_late = 5;
        assert!(tail_of(outcome.clone(), 0).contains(": p99.9 and beyond"));
        assert!(tail_of(outcome.clone(), 0).contains("nothing says who"));
        assert!(tail_of(outcome.clone(), 1).contains("by the host"));
        outcome.usage.involuntary_switches = 1;
        assert!(tail_of(outcome, 1).contains("of the generator"));
    }

    #[test]
    fn percentile_without_samples_is_printed_as_a_dash() {
        let mut outcome = Outcome {
            elapsed: 1_000_000_000,
            ..Outcome::default()
        };
        for nanos in 1..=1000 {
            outcome.op_mut(Op::Read).lat.record(nanos * 1000);
        }
        let mut out = String::new();
        operation(&mut out, &outcome, Op::Read);
        let values = out
            .lines()
            .find(|line| line.contains("usec      "))
            .unwrap();
        let cells: Vec<&str> = values.split_whitespace().collect();
        assert_eq!(cells[3..], ["990.2", "-", "-", "-", "1000.0"], "{out}");
    }
}
