//! The result as one line a job, in fio's terse format, version 3: 121 fields with semicolons between.
//!
//! Percentiles that the samples do not carry are written as fio writes places that it does not use: `0%=0`. Trims have
//! no place in this format.

use std::fmt::Write;

use super::io::Op;
use super::json::FIO_PERCENTILES;
use super::session::{CaseResult, Results, Series};
use super::stats::{Latencies, Moments, Outcome, whole};

/// Upper bounds of fio's latency ranges, in microseconds and in milliseconds; the last one is open.
const MICROS: [u64; 10] = [2, 4, 10, 20, 50, 100, 250, 500, 750, 1000];
const MILLIS: [u64; 11] = [2, 4, 10, 20, 50, 100, 250, 500, 750, 1000, 2000];
/// fio's ranges of queue depths, by their lower bound.
const DEPTHS: [u32; 7] = [1, 2, 4, 8, 16, 32, 64];
/// Places for percentiles.
const PLACES: usize = 20;

#[must_use]
pub fn render(results: &Results) -> String {
    let mut out = String::new();
    for case in &results.cases {
        for series in &case.series {
            let fields = line(results, case, series);
            let _ = writeln!(out, "{}", fields.join(";"));
        }
    }
    out
}

fn line(results: &Results, case: &CaseResult, series: &Series) -> Vec<String> {
    let total = series.total();
    let job = &case.case.job;
    let mut fields = vec![
        "3".to_owned(),
        format!("tandem-{}", results.environment.version),
        // A semicolon would begin another field.
        format!("{}/{}", job.name, series.label).replace(';', "_"),
        "0".to_owned(),
        "0".to_owned(),
    ];
    for op in [Op::Read, Op::Write] {
        operation(&mut fields, series, &total, op);
    }
    let elapsed = total.elapsed.max(1) as f64 * f64::from(job.numjobs);
    for nanos in [total.usage.user, total.usage.system] {
        fields.push(format!("{:.6}%", 100.0 * nanos as f64 / elapsed));
    }
    let switches = total.usage.voluntary_switches + total.usage.involuntary_switches;
    fields.extend([switches.to_string(), "0".to_owned(), "0".to_owned()]);
    let range = DEPTHS.iter().rposition(|depth| *depth <= case.case.depth);
    for index in 0..DEPTHS.len() {
        let share = if Some(index) == range { 100.0 } else { 0.0 };
        fields.push(format!("{share:.1}%"));
    }
    let all = total.all();
    let bounds: Vec<u64> = MICROS
        .map(|micros| micros * 1000)
        .into_iter()
        .chain(MILLIS.map(|millis| millis * 1_000_000))
        .collect();
    for count in all.ranges(&bounds) {
        let share = 100.0 * count as f64 / all.count().max(1) as f64;
        fields.push(format!("{share:.2}%"));
    }
    fields
}

fn operation(fields: &mut Vec<String>, series: &Series, total: &Outcome, op: Op) {
    let stats = total.op(op);
    let count = stats.lat.count();
    let runtime = if count == 0 {
        0
    } else {
        total.elapsed / 1_000_000
    };
    let bandwidth = |outcome: &Outcome| outcome.per_second(outcome.op(op).bytes) / 1024.0;
    fields.extend([
        (stats.bytes / 1024).to_string(),
        whole(bandwidth(total)).to_string(),
        whole(total.per_second(count)).to_string(),
        runtime.to_string(),
    ]);
    let Moments { min, max, .. } = stats.slat;
    fields.extend(four(min, max, stats.slat.mean(), stats.slat.stddev()));
    fields.extend(distribution(&stats.clat));
    for place in 0..PLACES {
        let percent = FIO_PERCENTILES.get(place).copied();
        let value = percent.and_then(|percent| {
            let nanos = stats.clat.percentile(percent).value?;
            Some(format!("{percent:.6}%={}", nanos / 1000))
        });
        fields.push(value.unwrap_or_else(|| "0%=0".to_owned()));
    }
    fields.extend(distribution(&stats.lat));
    let mut rounds = Moments::default();
    for round in &series.rounds {
        rounds.record(whole(bandwidth(&round.total())));
    }
    fields.extend([
        rounds.min.to_string(),
        rounds.max.to_string(),
        format!("{:.6}%", if count == 0 { 0.0 } else { 100.0 }),
        format!("{:.6}", rounds.mean()),
        format!("{:.6}", rounds.stddev()),
    ]);
}

fn distribution(latencies: &Latencies) -> [String; 4] {
    four(
        latencies.min(),
        latencies.max(),
        latencies.mean(),
        latencies.stddev(),
    )
}

/// Microseconds.
fn four(min: u64, max: u64, mean: f64, stddev: f64) -> [String; 4] {
    [
        (min / 1000).to_string(),
        (max / 1000).to_string(),
        format!("{:.6}", mean / 1000.0),
        format!("{:.6}", stddev / 1000.0),
    ]
}
