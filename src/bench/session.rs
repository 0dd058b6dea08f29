//! Everything that one call measures: cases (a load at one depth or rate), each in rounds that give every target its
//! turn.
//!
//! ```text
//!  for each case:   ping-pong   A A' B C   ping-pong   A A' B C   ping-pong  ...
//! ```
//! A' is the first target again, measured as if it were another: how far the two differ is the noise of this machine in
//! this hour. A ratio is the median over the rounds of (B of this round) / (A of this round).

use std::io::{IsTerminal, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use anyhow::bail;

use super::args::{Job, LoadCurve};
use super::engine::{Live, Shot};
use super::environment::Environment;
use super::io::Region;
use super::pingpong;
use super::stats::{Outcome, median};
use super::target::{Info, Measured, Target};
use super::turns::Parking;

/// Rounds when nothing is said: a band needs several.
const ROUNDS_OF_SEVERAL: u32 = 5;
/// The knee is the heaviest load whose p99 is below this multiple of the lowest p99 of the curve.
const KNEE_FACTOR: f64 = 3.0;
/// A live figure of a shorter time, in seconds, jumps about.
const LEAST_LIVE: f64 = 0.1;
/// --verify remembers every place.
const MOST_VERIFIED: u64 = 1 << 26;

/// One load at one depth, closed or open.
#[derive(Clone, Debug)]
pub struct Case {
    pub job: Job,
    pub depth: u32,
    /// Percent of the closed loop's IOPS, on a load curve.
    pub share: Option<u8>,
}

/// One target in one case.
#[derive(Clone, Debug)]
pub struct Series {
    /// A, A', B, ...
    pub label: String,
    pub target: usize,
    /// Arrivals a second and job.
    pub rate: Option<f64>,
    /// One a round.
    pub rounds: Vec<Measured>,
}

impl Series {
    /// All rounds and queues.
    #[must_use]
    pub fn total(&self) -> Outcome {
        let mut totals = self.rounds.iter().map(Measured::total);
        let mut total = totals.next().unwrap_or_default();
        totals.for_each(|other| total.add_after(&other));
        total
    }
}

#[derive(Clone, Debug)]
pub struct CaseResult {
    pub case: Case,
    pub series: Vec<Series>,
    /// Ping-pong in nanoseconds: before the first round, and after each.
    pub pings: Vec<Option<f64>>,
}

/// A number of a target in relation to the first one's.
#[derive(Clone, Debug, PartialEq)]
pub struct Ratio {
    pub label: String,
    pub metric: &'static str,
    /// Median over the rounds.
    pub ratio: f64,
    /// What the first target reaches in relation to itself.
    pub band: (f64, f64),
}

impl Ratio {
    #[must_use]
    pub fn within_noise(&self) -> bool {
        (self.band.0..=self.band.1).contains(&self.ratio)
    }
}

type Metric = (&'static str, fn(&Measured) -> f64);

const METRICS: [Metric; 3] = [
    ("iops", |measured| measured.total().iops()),
    ("mean latency", |measured| measured.total().all().mean()),
    ("p99 latency", |measured| {
        measured.total().all().at(99.0) as f64
    }),
];

impl CaseResult {
    /// Every target but the first in relation to it; empty when there is only one.
    #[must_use]
    pub fn ratios(&self) -> Vec<Ratio> {
        let [first, again, others @ ..] = self.series.as_slice() else {
            return Vec::new();
        };
        let per_round = |series: &Series, metric: fn(&Measured) -> f64| -> Vec<f64> {
            let pairs = series.rounds.iter().zip(&first.rounds);
            pairs
                .map(|(own, base)| (metric(own), metric(base)))
                // A round in which one of them did nothing has no ratio.
                .filter(|(own, base)| *own > 0.0 && *base > 0.0)
                .map(|(own, base)| own / base)
                .collect()
        };
        let mut ratios = Vec::new();
        for (name, metric) in METRICS {
            let noise = per_round(again, metric);
            // Which of the two was first is chance: the band is the same both ways.
            let widest = noise
                .iter()
                .map(|ratio| ratio.max(1.0 / ratio))
                .fold(1.0, f64::max);
            for series in others {
                let own = per_round(series, metric);
                if own.is_empty() || noise.is_empty() {
                    continue;
                }
                ratios.push(Ratio {
                    label: series.label.clone(),
                    metric: name,
                    ratio: median(&own),
                    band: (1.0 / widest, widest),
                });
            }
        }
        ratios
    }
}

/// Where a load curve bends.
#[derive(Clone, Debug, PartialEq)]
pub struct Knee {
    pub job: String,
    pub label: String,
    /// The largest share before the bend.
    pub share: u8,
    /// Its arrivals a second, of all jobs.
    pub iops: f64,
    /// A heavier load was measured, and is beyond the bend.
    pub bends: bool,
}

#[derive(Debug)]
pub struct Results {
    pub infos: Vec<Info>,
    pub cases: Vec<CaseResult>,
    pub rounds: u32,
    pub environment: Environment,
    pub started: SystemTime,
    pub cpus: Option<(usize, usize)>,
    /// It was to be more.
    pub interrupted: bool,
}

impl Results {
    /// Of a case that was interrupted, what there is.
    fn keep(&mut self, mut result: CaseResult) {
        result.series.retain(|series| !series.rounds.is_empty());
        if !result.series.is_empty() {
            self.cases.push(result);
        }
    }

    /// One for each target that has a load curve.
    #[must_use]
    pub fn knees(&self) -> Vec<Knee> {
        // A closed loop, and the shares of it that follow.
        let curves = self.cases.chunk_by(|_, next| next.case.share.is_some());
        curves.flat_map(knees_of).collect()
    }
}

fn knees_of(cases: &[CaseResult]) -> Vec<Knee> {
    let curve: Vec<&CaseResult> = cases
        .iter()
        .filter(|case| case.case.share.is_some())
        .collect();
    let Some(lightest) = curve.first() else {
        return Vec::new();
    };
    let mut knees = Vec::new();
    for (index, series) in lightest.series.iter().enumerate() {
        let p99 = |case: &CaseResult| {
            let series = case.series.get(index);
            series.map_or(0.0, |series| series.total().all().at(99.0) as f64)
        };
        // The lowest need not be the lightest load's: chance may strike anywhere.
        let lowest = curve.iter().map(|case| p99(case)).fold(f64::MAX, f64::min);
        let last = curve
            .iter()
            .rposition(|case| p99(case) <= KNEE_FACTOR * lowest);
        let Some((place, last)) = last.and_then(|place| Some((place, curve.get(place)?))) else {
            continue;
        };
        let rate = last.series.get(index).and_then(|series| series.rate);
        knees.push(Knee {
            job: last.case.job.name.clone(),
            label: series.label.clone(),
            share: last.case.share.unwrap_or(0),
            iops: rate.unwrap_or(0.0) * f64::from(last.case.job.numjobs),
            bends: place + 1 < curve.len(),
        });
    }
    knees
}

/// Whom to measure, and how often.
pub struct Session {
    pub targets: Vec<Box<dyn Target>>,
    pub rounds: Option<u32>,
    pub load_curve: Option<LoadCurve>,
    /// Targets whose servers stand still while others are measured.
    pub parking: Option<Parking>,
    /// Ctrl-C.
    pub interrupted: Arc<AtomicBool>,
}

impl Session {
    /// What of a target a job works on.
    ///
    /// # Errors
    /// When that is not there.
    pub fn region(info: &Info, job: &Job) -> anyhow::Result<Region> {
        let Info {
            name,
            capacity,
            block,
            ..
        } = info;
        let bs = u64::from(job.bs);
        if !job.bs.is_multiple_of(*block) || !job.offset.is_multiple_of(u64::from(*block)) {
            bail!(
                "{}: --bs {bs} and --offset {} must be multiples of the blocks of {name}, {block} bytes",
                job.name,
                job.offset
            );
        }
        let left = capacity.saturating_sub(job.offset);
        let size = job.size.unwrap_or(left);
        if size > left {
            bail!(
                "{}: --size {size} from --offset {} reaches beyond {name}, which has {capacity} bytes",
                job.name,
                job.offset
            );
        }
        let places = size / bs;
        let jobs = if job.verify {
            u64::from(job.numjobs)
        } else {
            1
        };
        if places < jobs {
            bail!(
                "{}: {size} bytes of {name} have no room for --bs {bs} of each job",
                job.name
            );
        }
        if job.verify && places > MOST_VERIFIED {
            bail!(
                "{}: --verify remembers {MOST_VERIFIED} blocks at most, {name} has {places}: give a --size",
                job.name
            );
        }
        // Each place of a job must be free for each of its I/Os in flight.
        if job.verify && places / jobs < 2 * u64::from(job.most_depth()) {
            bail!(
                "{}: --verify wants twice as many blocks as I/Os in flight: raise --size or lower --iodepth",
                job.name
            );
        }
        Ok(Region {
            base: job.offset,
            places,
        })
    }

    /// Measures everything, in order.
    ///
    /// # Errors
    /// When an I/O fails or --verify finds something.
    pub fn run(&mut self, jobs: &[Job]) -> anyhow::Result<Results> {
        let several = self.targets.len() > 1;
        let rounds = self
            .rounds
            .unwrap_or(if several { ROUNDS_OF_SEVERAL } else { 1 });
        let first_cpu = jobs
            .first()
            .and_then(|job| Some(job.cpus.as_ref()?.as_slice().first()?.0));
        let mut results = Results {
            infos: self
                .targets
                .iter()
                .map(|target| target.info().clone())
                .collect(),
            cases: Vec::new(),
            rounds,
            environment: Environment::of_this_machine(),
            started: SystemTime::now(),
            cpus: pingpong::two_cpus(first_cpu),
            interrupted: false,
        };
        'all: for job in jobs {
            for case in self.cases(job) {
                if self.is_interrupted() {
                    break 'all;
                }
                let rates = vec![job.rate_iops; self.targets.len()];
                let result = self.measure(case, &rates, rounds, results.cpus)?;
                let most: Vec<f64> = result
                    .series
                    .iter()
                    .map(|series| series.total().iops())
                    .collect();
                let targets: Vec<usize> =
                    result.series.iter().map(|series| series.target).collect();
                let depth = result.case.depth;
                results.keep(result);
                let Some(curve) = self.load_curve else {
                    continue;
                };
                for percent in curve.percents() {
                    if self.is_interrupted() {
                        break 'all;
                    }
                    // Where a target was measured twice, its second figure is as good as the first.
                    let mut rates = vec![None; self.targets.len()];
                    for (target, most) in targets.iter().zip(&most) {
                        let share = most * f64::from(percent) / 100.0 / f64::from(job.numjobs);
                        rates[*target] = Some(share.max(1.0));
                    }
                    let case = Case {
                        job: job.clone(),
                        depth,
                        share: Some(percent),
                    };
                    results.keep(self.measure(case, &rates, rounds, results.cpus)?);
                }
            }
        }
        results.interrupted = self.is_interrupted();
        if results.cases.is_empty() {
            bail!("interrupted before anything was measured");
        }
        Ok(results)
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }

    fn cases(&self, job: &Job) -> Vec<Case> {
        let depths = match self.load_curve {
            Some(_) => vec![job.most_depth()],
            None => job.depths.clone(),
        };
        let case = |depth| Case {
            job: job.clone(),
            depth,
            share: None,
        };
        depths.into_iter().map(case).collect()
    }

    fn measure(
        &mut self,
        case: Case,
        rates: &[Option<f64>],
        rounds: u32,
        cpus: Option<(usize, usize)>,
    ) -> anyhow::Result<CaseResult> {
        let mut series: Vec<Series> = Vec::new();
        for (target, rate) in rates.iter().enumerate() {
            let letter = label(target);
            let again = (target == 0 && rates.len() > 1).then(|| format!("{letter}'"));
            for label in [Some(letter), again].into_iter().flatten() {
                series.push(Series {
                    label,
                    target,
                    rate: *rate,
                    rounds: Vec::new(),
                });
            }
        }
        if let Some(parking) = &mut self.parking {
            parking.admit(None)?;
        }
        let ping = || cpus.and_then(pingpong::round_trip);
        let mut pings = vec![ping()];
        'rounds: for round in 0..rounds {
            for series in &mut series {
                let Some(target) = self.targets.get_mut(series.target) else {
                    continue;
                };
                let shot = Shot {
                    job: &case.job,
                    depth: case.depth,
                    rate: series.rate,
                    region: Session::region(target.info(), &case.job)?,
                    interrupted: &self.interrupted,
                };
                if let Some(parking) = &mut self.parking {
                    parking.admit(target.info().server)?;
                }
                let mut progress = Progress::new(&case, &series.label, (round + 1, rounds));
                let measured =
                    target.measure(&shot, &mut |elapsed, live| progress.show(elapsed, live));
                progress.clear();
                let measured = measured?;
                // One that ended in its warm-up says nothing.
                let interrupted = self.interrupted.load(Ordering::Relaxed);
                if !interrupted || measured.total().all().count() > 0 {
                    series.rounds.push(measured);
                }
                if interrupted {
                    pings.push(ping());
                    break 'rounds;
                }
            }
            if let Some(parking) = &mut self.parking {
                parking.admit(None)?;
            }
            pings.push(ping());
        }
        Ok(CaseResult {
            case,
            series,
            pings,
        })
    }

    /// Gives all targets back.
    ///
    /// # Errors
    /// The first that did not end well.
    pub fn close(mut self) -> anyhow::Result<()> {
        // They have to answer.
        self.parking = None;
        let ends: Vec<_> = self.targets.into_iter().map(Target::close).collect();
        ends.into_iter().collect()
    }
}

/// A to Z, then by number.
fn label(target: usize) -> String {
    match u8::try_from(target) {
        Ok(target @ 0..26) => char::from(b'A' + target).to_string(),
        _ => format!("T{target}"),
    }
}

/// One line on a terminal that is written over and over; nothing anywhere else.
struct Progress {
    line: String,
    shown: bool,
    terminal: bool,
    last: (Duration, u64),
}

impl Progress {
    fn new(case: &Case, label: &str, (round, rounds): (u32, u32)) -> Progress {
        let load = case
            .share
            .map_or_else(String::new, |share| format!(" load={share}%"));
        let Case { job, depth, .. } = case;
        Progress {
            line: format!(
                "{} rw={} bs={} iodepth={depth}{load} round {round}/{rounds} {label}",
                job.name, job.rw, job.bs
            ),
            shown: false,
            terminal: std::io::stderr().is_terminal(),
            last: (Duration::ZERO, 0),
        }
    }

    fn show(&mut self, elapsed: Duration, live: &Live) {
        use std::sync::atomic::Ordering::Relaxed;
        if !self.terminal {
            return;
        }
        live.watched.store(true, Relaxed);
        let ios = live.ios.load(Relaxed);
        let seconds = elapsed.saturating_sub(self.last.0).as_secs_f64();
        if seconds < LEAST_LIVE {
            return;
        }
        if self.last.1 > 0 {
            let iops = (ios - self.last.1) as f64 / seconds;
            let p99 = live.p99.load(Relaxed) as f64 / 1000.0;
            let line = format!("\r{} {iops:.0} IOPS, p99 {p99:.1} usec\x1b[K", self.line);
            let _ = std::io::stderr().lock().write_all(line.as_bytes());
            self.shown = true;
        }
        self.last = (elapsed, ios);
    }

    fn clear(&mut self) {
        if self.shown {
            let _ = std::io::stderr().lock().write_all(b"\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::args::JobOptions;
    use crate::bench::io::Op;

    /// A target that did `iops` in each round.
    fn series(label: &str, iops: &[u32]) -> Series {
        let rounds = iops.iter().map(|&iops| {
            let mut outcome = Outcome {
                elapsed: 1_000_000_000,
                ..Outcome::default()
            };
            for _ in 0..iops {
                outcome
                    .op_mut(Op::Read)
                    .lat
                    .record(u64::from(1_000_000 / iops.max(1)));
            }
            Measured {
                queues: vec![outcome],
                ..Measured::default()
            }
        });
        Series {
            label: label.to_owned(),
            target: 0,
            rate: None,
            rounds: rounds.collect(),
        }
    }

    fn result(series: Vec<Series>) -> CaseResult {
        let job = JobOptions::default().resolve("j").unwrap();
        CaseResult {
            case: Case {
                job,
                depth: 1,
                share: None,
            },
            series,
            pings: Vec::new(),
        }
    }

    #[test]
    fn ratio_beyond_the_band_is_a_difference_and_one_inside_is_noise() {
        // The machine slows down by half in the last round: ratios do not mind.
        let result = result(vec![
            series("A", &[1000, 1000, 500]),
            series("A'", &[1000, 1100, 500]),
            series("B", &[1050, 1050, 525]),
            series("C", &[2000, 2000, 1000]),
        ]);
        let ratios = result.ratios();
        let iops: Vec<&Ratio> = ratios
            .iter()
            .filter(|ratio| ratio.metric == "iops")
            .collect();
        assert!((iops[0].ratio - 1.05).abs() < 1e-9 && iops[0].within_noise());
        assert!((iops[1].ratio - 2.0).abs() < 1e-9 && !iops[1].within_noise());
        assert!((iops[0].band.1 - 1.1).abs() < 1e-9);
        assert!((iops[0].band.0 - 1.0 / 1.1).abs() < 1e-9);
    }

    #[test]
    fn knee_is_the_heaviest_load_whose_p99_is_still_low() {
        let at = |share: Option<u8>, micros: u64| {
            let mut outcome = Outcome::default();
            outcome.op_mut(Op::Read).lat.record(micros * 1000);
            let mut case = result(vec![Series {
                label: "A".to_owned(),
                target: 0,
                rate: share.map(|share| 10.0 * f64::from(share)),
                rounds: vec![Measured {
                    queues: vec![outcome],
                    ..Measured::default()
                }],
            }]);
            case.case.share = share;
            case
        };
        // One load was disturbed, and the lightest a little. Of the second job no load is beyond.
        let first = [(10, 15), (50, 90), (70, 10), (90, 29), (95, 31)];
        let second = [(10, 5), (95, 6)];
        let mut cases = Vec::new();
        for curve in [&first[..], &second] {
            cases.push(at(None, 100));
            cases.extend(
                curve
                    .iter()
                    .map(|(share, micros)| at(Some(*share), *micros)),
            );
        }
        let results = Results {
            infos: Vec::new(),
            cases,
            rounds: 1,
            environment: Environment::of_this_machine(),
            started: SystemTime::now(),
            cpus: None,
            interrupted: false,
        };
        let knees = results.knees();
        let found: Vec<_> = knees.iter().map(|knee| (knee.share, knee.bends)).collect();
        assert_eq!(found, [(90, true), (95, false)]);
        assert!((knees[0].iops - 900.0).abs() < 1e-9);
    }

    #[test]
    fn round_in_which_a_target_did_nothing_has_no_ratio() {
        let some = result(vec![
            series("A", &[1000, 0]),
            series("A'", &[1000, 1000]),
            series("B", &[2000, 2000]),
        ]);
        let ratios = some.ratios();
        assert!((ratios[0].ratio - 2.0).abs() < 1e-9 && (ratios[0].band.1 - 1.0).abs() < 1e-9);
        let none = result(vec![
            series("A", &[0]),
            series("A'", &[1]),
            series("B", &[1]),
        ]);
        assert_eq!(none.ratios(), []);
    }

    #[test]
    fn single_target_has_no_ratios() {
        assert_eq!(result(vec![series("A", &[1])]).ratios(), []);
    }

    #[test]
    fn region_beyond_the_target_is_refused_with_both_sizes() {
        let info = Info {
            name: "disk".to_owned(),
            description: String::new(),
            capacity: 1 << 20,
            block: 512,
            server: None,
            ring: None,
            stages: None,
            doorbells: "doorbells",
        };
        let job = |text: [&str; 2]| {
            let options = JobOptions {
                size: Some(text[0].parse().unwrap()),
                offset: Some(text[1].parse().unwrap()),
                ..JobOptions::default()
            };
            options.resolve("j").unwrap()
        };
        let region = Session::region(&info, &job(["512K", "512K"])).unwrap();
        assert_eq!((region.base, region.places), (512 << 10, 128));
        let error = Session::region(&info, &job(["513K", "512K"]))
            .unwrap_err()
            .to_string();
        assert!(
            error.contains("525312") && error.contains("1048576"),
            "{error}"
        );
        assert!(Session::region(&info, &job(["1K", "0"])).is_err());
        assert!(Session::region(&info, &job(["8K", "100"])).is_err());
    }
}
