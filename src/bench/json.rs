//! The result in the shape of fio's JSON, so that what reads fio's reads ours; what fio has no word for is in objects
//! called `tandem`. `docs/bench.schema.json` describes it.
//!
//! A percentile that the samples do not carry is null, and `percentile_declined` says why.

use std::time::UNIX_EPOCH;

use serde_json::{Map, Value, json};

use super::io::Op;
use super::report::{server_usage, tail, told_stages};
use super::session::{CaseResult, Results, Series};
use super::stats::{LEAST_BEYOND, Latencies, Moments, OpStats, Outcome, Usage};
use crate::stats::{Stage, StageCounts};

/// What fio lists, and one more.
pub const FIO_PERCENTILES: [f64; 18] = [
    1.0, 5.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 70.0, 80.0, 90.0, 95.0, 99.0, 99.5, 99.9, 99.95,
    99.99, 99.999,
];

/// The whole result; with `bins`, json+.
#[must_use]
pub fn render(results: &Results, bins: bool) -> String {
    format!("{:#}\n", document(results, bins))
}

fn document(results: &Results, bins: bool) -> Value {
    let since = results
        .started
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let jobs: Vec<Value> = results
        .cases
        .iter()
        .enumerate()
        .flat_map(|(index, case)| {
            let series = case.series.iter();
            series.map(move |series| job(results, index, case, series, bins))
        })
        .collect();
    json!({
        // Readers of fio's JSON look for this key.
        "fio version": format!("tandem-{}", results.environment.version),
        "timestamp": since.as_secs(),
        "timestamp_ms": u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        "jobs": jobs,
        "tandem": {
            "version": results.environment.version,
            "environment": results.environment,
            "rounds": results.rounds,
            "interrupted": results.interrupted,
            "ping_pong_cpus": results.cpus.map(|(from, to)| [from, to]),
            "targets": results.infos.iter().map(|info| json!({
                "name": info.name,
                "description": info.description,
                "capacity_bytes": info.capacity,
                "block_bytes": info.block,
                "server_pid": info.server,
                "ring": info.ring.map(|ring| ring.to_string()),
            })).collect::<Vec<_>>(),
            "cases": results.cases.iter().map(case).collect::<Vec<_>>(),
            "knees": results.knees().iter().map(|knee| json!({
                "job": knee.job,
                "label": knee.label,
                "percent": knee.share,
                "iops": knee.iops,
                "bends": knee.bends,
            })).collect::<Vec<_>>(),
        },
    })
}

fn case(result: &CaseResult) -> Value {
    let ratios = result.ratios();
    json!({
        "job": result.case.job.name,
        "iodepth": result.case.depth,
        "load_percent": result.case.share,
        "loop": if result.series.iter().any(|series| series.rate.is_some()) { "open" } else { "closed" },
        "ping_pong_ns": result.pings,
        "ratios": ratios.iter().map(|ratio| json!({
            "label": ratio.label,
            "base": "A",
            "metric": ratio.metric,
            "ratio": ratio.ratio,
            "band": [ratio.band.0, ratio.band.1],
            "within_noise": ratio.within_noise(),
        })).collect::<Vec<_>>(),
    })
}

fn job(results: &Results, index: usize, result: &CaseResult, series: &Series, bins: bool) -> Value {
    let job = &result.case.job;
    let total = series.total();
    let name = results
        .infos
        .get(series.target)
        .map_or("", |info| &info.name);
    let usage = total.usage;
    let elapsed = total.elapsed.max(1) as f64 * f64::from(job.numjobs);
    let share = |nanos: u64| 100.0 * nanos as f64 / elapsed;
    let mut object = json!({
        "jobname": job.name,
        "groupid": index,
        "error": 0,
        "eta": 0,
        "elapsed": total.elapsed.div_ceil(1_000_000_000),
        "job options": options(result, series),
        "read": operation(&total, Op::Read, bins),
        "write": operation(&total, Op::Write, bins),
        "trim": operation(&total, Op::Trim, bins),
        "sync": {
            "total_ios": total.op(Op::Flush).lat.count(),
            "lat_ns": latencies(&total.op(Op::Flush).lat, bins),
        },
        "job_runtime": total.elapsed / 1_000_000 * u64::from(job.numjobs),
        "usr_cpu": share(usage.user),
        "sys_cpu": share(usage.system),
        "ctx": usage.voluntary_switches + usage.involuntary_switches,
        "latency_depth": result.case.depth,
        "tandem": extra(series, &total),
    });
    object["tandem"]["label"] = json!(series.label);
    object["tandem"]["target"] = json!(name);
    object["tandem"]["case"] = json!(index);
    object["tandem"]["load_percent"] = json!(result.case.share);
    object["tandem"]["rate_iops"] = json!(series.rate);
    object
}

/// Texts, as fio has them.
fn options(result: &CaseResult, series: &Series) -> Value {
    let job = &result.case.job;
    let mut options = Map::new();
    let mut set = |key: &str, value: String| options.insert(key.to_owned(), value.into());
    set("name", job.name.clone());
    set("rw", job.rw.to_string());
    set("rwmixread", job.rwmixread.to_string());
    set("bs", job.bs.to_string());
    set("iodepth", result.case.depth.to_string());
    set("numjobs", job.numjobs.to_string());
    set("runtime", job.runtime.as_secs_f64().to_string());
    set("ramp_time", job.ramp_time.as_secs_f64().to_string());
    set("fsync", job.fsync.to_string());
    set("offset", job.offset.to_string());
    set("randseed", job.seed.to_string());
    if let Some(size) = job.size {
        set("size", size.to_string());
    }
    if let Some(rate) = series.rate {
        set("rate_iops", rate.to_string());
        set("rate_process", "poisson".to_owned());
    }
    if job.verify {
        set("verify", "crc32c".to_owned());
    }
    if let Some(cpus) = &job.cpus {
        set("cpus_allowed", cpus.to_string());
    }
    Value::Object(options)
}

fn operation(total: &Outcome, op: Op, bins: bool) -> Value {
    let OpStats {
        lat,
        clat,
        slat,
        bytes,
    } = total.op(op);
    let count = lat.count();
    let bandwidth = total.per_second(*bytes);
    json!({
        "io_bytes": bytes,
        "io_kbytes": bytes / 1024,
        "bw_bytes": super::stats::whole(bandwidth),
        "bw": super::stats::whole(bandwidth / 1024.0),
        "iops": total.per_second(count),
        "runtime": if count == 0 { 0 } else { total.elapsed / 1_000_000 },
        "total_ios": count,
        "short_ios": 0,
        "drop_ios": 0,
        "slat_ns": moments(slat),
        "clat_ns": latencies(clat, bins),
        "lat_ns": latencies(lat, bins),
    })
}

fn moments(moments: &Moments) -> Value {
    json!({
        "min": moments.min,
        "max": moments.max,
        "mean": moments.mean(),
        "stddev": moments.stddev(),
        "N": moments.count,
    })
}

fn latencies(latencies: &Latencies, bins: bool) -> Value {
    let mut object = json!({
        "min": latencies.min(),
        "max": latencies.max(),
        "mean": latencies.mean(),
        "stddev": latencies.stddev(),
        "N": latencies.count(),
    });
    if latencies.count() == 0 {
        return object;
    }
    let (mut percentiles, mut declined, mut beyond) = (Map::new(), Map::new(), Map::new());
    for percent in FIO_PERCENTILES {
        let key = format!("{percent:.6}");
        let percentile = latencies.percentile(percent);
        percentiles.insert(key.clone(), percentile.value.into());
        beyond.insert(key.clone(), percentile.beyond.into());
        if percentile.value.is_none() {
            let reason = format!(
                "{} samples are beyond it, {LEAST_BEYOND} are needed",
                percentile.beyond
            );
            declined.insert(key, reason.into());
        }
    }
    object["percentile"] = percentiles.into();
    object["percentile_beyond"] = beyond.into();
    object["percentile_declined"] = declined.into();
    if bins {
        let bins = latencies
            .bins()
            .map(|(value, count)| (value.to_string(), count.into()));
        object["bins"] = Value::Object(bins.collect());
    }
    object
}

fn extra(series: &Series, total: &Outcome) -> Value {
    let rounds: Vec<Value> = series
        .rounds
        .iter()
        .map(|round| {
            let total = round.total();
            let all = total.all();
            json!({
                "iops": total.iops(),
                "lat_ns_mean": all.mean(),
                "lat_ns_p50": all.percentile(50.0).value,
                "lat_ns_p99": all.percentile(99.0).value,
                "elapsed_ns": total.elapsed,
                "involuntary_switches": total.usage.involuntary_switches,
                "steal_ns": round.steal,
            })
        })
        .collect();
    let count = series.rounds.first().map_or(0, |round| round.queues.len());
    let queues: Vec<Value> = (0..count).map(|index| queue(series, index)).collect();
    let ios = total.all().count().max(1) as f64;
    let per_io = |value: u64| value as f64 / ios;
    let server = server_usage(series);
    let steal: u64 = series.rounds.iter().map(|round| round.steal).sum();
    json!({
        "rounds": rounds,
        "queues": queues,
        "cost_per_io": {
            "generator_cpu_ns": per_io(total.usage.cpu()),
            "server_cpu_ns": server.map(|usage| per_io(usage.cpu())),
            "doorbells": per_io(total.counters.doorbells),
            "notifications": per_io(total.counters.notifications),
            "polls": per_io(total.polls),
            "idle_polls": per_io(total.idle_polls),
        },
        "server": server.map(switches),
        "generator": switches(total.usage),
        "stages": told_stages(series).iter().map(stages).collect::<Vec<Value>>(),
        "tail": {
            "text": tail(series, total),
            "longest_gap_ns": total.longest_gap,
            "steal_ns": steal,
            "late_polls": total.late_polls,
            "found_by_late_polls": total.found_late,
        },
        "backlog": { "arrivals": total.backlog, "oldest_ns": total.backlog_age },
        "unfinished": { "ios": total.unfinished, "oldest_ns": total.unfinished_age },
        "verified_reads": total.verified,
    })
}

fn queue(series: &Series, index: usize) -> Value {
    let mut queue = Outcome::default();
    let rounds = series.rounds.iter();
    rounds
        .filter_map(|round| round.queues.get(index))
        .for_each(|part| queue.add_after(part));
    json!({
        "queue": index,
        "iops": queue.iops(),
        "read": operation(&queue, Op::Read, false),
        "write": operation(&queue, Op::Write, false),
        "trim": operation(&queue, Op::Trim, false),
        "sync": {
            "total_ios": queue.op(Op::Flush).lat.count(),
            "lat_ns": latencies(&queue.op(Op::Flush).lat, false),
        },
        "polls": queue.polls,
        "idle_polls": queue.idle_polls,
        "doorbells": queue.counters.doorbells,
        "notifications": queue.counters.notifications,
    })
}

/// Of one virtqueue in the server.
fn stages(counts: &StageCounts) -> Value {
    let one = |stage: Stage| {
        let of = json!({
            "N": counts.count(stage),
            "p50_ns": counts.percentile(stage, 50),
            "p99_ns": counts.percentile(stage, 99),
            "bins": counts.bins(stage),
        });
        (stage.name().to_owned(), of)
    };
    Value::Object(Stage::ALL.map(one).into_iter().collect())
}

fn switches(usage: Usage) -> Value {
    json!({
        "user_ns": usage.user,
        "system_ns": usage.system,
        "run_queue_ns": usage.waited,
        "voluntary_switches": usage.voluntary_switches,
        "involuntary_switches": usage.involuntary_switches,
    })
}
