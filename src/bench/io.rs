//! What is sent to a target: operations, and the patterns in which they follow one another.
//!
//! Promises that the same seed gives the same operations, whatever the target. Knows nothing of time but the gaps of a
//! Poisson process. Start at [`Workload::next`].

use std::fmt;
use std::str::FromStr;

use super::args::Job;
use super::verify::Verifier;

/// What one I/O does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Read,
    Write,
    Trim,
    Flush,
}

impl Op {
    pub const ALL: [Op; 4] = [Op::Read, Op::Write, Op::Trim, Op::Flush];

    /// Its place in tables of all four.
    #[must_use]
    pub const fn index(self) -> usize {
        self as usize
    }

    /// As fio names it; a flush is a "sync" there.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Op::Read => "read",
            Op::Write => "write",
            Op::Trim => "trim",
            Op::Flush => "sync",
        }
    }
}

/// One I/O.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Io {
    pub op: Op,
    /// Bytes from the start of the target.
    pub offset: u64,
    /// Bytes; 0 for a flush.
    pub len: u32,
}

/// fio's `rw=`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    Read,
    Write,
    RandRead,
    RandWrite,
    Rw,
    RandRw,
    Trim,
    RandTrim,
}

impl Pattern {
    const NAMES: [(&'static str, Pattern); 8] = [
        ("read", Pattern::Read),
        ("write", Pattern::Write),
        ("randread", Pattern::RandRead),
        ("randwrite", Pattern::RandWrite),
        ("rw", Pattern::Rw),
        ("randrw", Pattern::RandRw),
        ("trim", Pattern::Trim),
        ("randtrim", Pattern::RandTrim),
    ];

    /// It has reads.
    #[must_use]
    pub fn reads(self) -> bool {
        use Pattern::{RandRead, RandRw, Read, Rw};
        matches!(self, Read | RandRead | Rw | RandRw)
    }

    /// It has writes.
    #[must_use]
    pub fn writes(self) -> bool {
        use Pattern::{RandRw, RandWrite, Rw, Write};
        matches!(self, Write | RandWrite | Rw | RandRw)
    }

    /// It has trims.
    #[must_use]
    pub fn trims(self) -> bool {
        matches!(self, Pattern::Trim | Pattern::RandTrim)
    }

    fn is_random(self) -> bool {
        use Pattern::{RandRead, RandRw, RandTrim, RandWrite};
        matches!(self, RandRead | RandWrite | RandRw | RandTrim)
    }
}

impl FromStr for Pattern {
    type Err = String;
    fn from_str(text: &str) -> Result<Pattern, String> {
        // fio has two names for this one.
        let text = if text == "readwrite" { "rw" } else { text };
        Pattern::NAMES
            .iter()
            .find(|(name, _)| *name == text)
            .map(|(_, pattern)| *pattern)
            .ok_or_else(|| {
                let names = Pattern::NAMES.map(|(name, _)| name);
                format!("`{text}` is none of {}", names.join(", "))
            })
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = Pattern::NAMES.iter().find(|(_, pattern)| pattern == self);
        f.pad(name.map_or("", |(name, _)| name))
    }
}

/// SplitMix64: small, and every seed is a good one.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(seed)
    }

    #[inline]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Less than `bound`, evenly: bounds are far less than 2^64.
    #[inline]
    pub fn below(&mut self, bound: u64) -> u64 {
        let product = u128::from(self.next()) * u128::from(bound);
        // The high half of a product of two 64-bit numbers.
        u64::try_from(product >> 64).unwrap_or(0)
    }

    /// The time to the next of events that come `rate` times a second on average, in nanoseconds.
    pub fn gap(&mut self, rate: f64) -> f64 {
        // 53 bits, never 0.
        let unit = ((self.next() >> 11) as f64 + 1.0) / (1u64 << 53) as f64;
        -unit.ln() / rate * 1e9
    }
}

/// A part of a target, in I/Os side by side.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Region {
    /// Bytes from the start of the target.
    pub base: u64,
    /// How many I/Os it has room for. Not 0.
    pub places: u64,
}

/// The operations of one queue, without an end.
#[derive(Debug)]
pub struct Workload {
    pattern: Pattern,
    bs: u32,
    region: Region,
    mix: u8,
    fsync: u32,
    random: Random,
    /// Of reads (or trims), and of writes: where the next one goes in sequence.
    next: [u64; 2],
    since_flush: u32,
    pub verifier: Option<Verifier>,
}

/// How often another place is tried when one is busy, with --verify.
const TRIES: u32 = 8;

impl Workload {
    /// Of queue `index` of `job`, in `region`.
    #[must_use]
    pub fn new(job: &Job, region: Region, index: usize) -> Workload {
        let mut seeds = Random::new(job.seed);
        let seed = (0..=index).fold(0, |_, _| seeds.next());
        Workload {
            pattern: job.rw,
            bs: job.bs,
            region,
            mix: job.rwmixread,
            fsync: job.fsync,
            random: Random::new(seed),
            next: [0; 2],
            since_flush: 0,
            verifier: job
                .verify
                .then(|| Verifier::new(region, job.bs, job.seed, job.rw.writes())),
        }
    }

    /// The next operation. `None` when every place that it might work on is busy: with --verify no two I/Os in flight
    /// work on one place, since their order would not be known.
    #[inline]
    pub fn next(&mut self) -> Option<Io> {
        if self.fsync > 0 && self.since_flush >= self.fsync {
            self.since_flush = 0;
            return Some(Io {
                op: Op::Flush,
                offset: 0,
                len: 0,
            });
        }
        let op = match self.pattern {
            Pattern::Read | Pattern::RandRead => Op::Read,
            Pattern::Write | Pattern::RandWrite => Op::Write,
            Pattern::Trim | Pattern::RandTrim => Op::Trim,
            Pattern::Rw | Pattern::RandRw if self.random.below(100) < u64::from(self.mix) => {
                Op::Read
            }
            Pattern::Rw | Pattern::RandRw => Op::Write,
        };
        let place = self.place(op)?;
        if op == Op::Write {
            self.since_flush += 1;
        }
        Some(Io {
            op,
            offset: self.region.base + place * u64::from(self.bs),
            len: self.bs,
        })
    }

    #[inline]
    fn place(&mut self, op: Op) -> Option<u64> {
        let places = self.region.places;
        if self.pattern.is_random() {
            let Some(verifier) = &self.verifier else {
                return Some(self.random.below(places));
            };
            for _ in 0..TRIES {
                let place = self.random.below(places);
                if !verifier.is_busy(place) {
                    return Some(place);
                }
            }
            return None;
        }
        let next = &mut self.next[usize::from(op == Op::Write)];
        let place = *next;
        if self
            .verifier
            .as_ref()
            .is_some_and(|verifier| verifier.is_busy(place))
        {
            return None;
        }
        *next = if place + 1 == places { 0 } else { place + 1 };
        Some(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::args::JobOptions;

    fn workload(rw: Pattern, more: JobOptions, places: u64) -> Workload {
        let job = JobOptions {
            rw: Some(rw),
            ..more
        };
        let region = Region { base: 8192, places };
        Workload::new(&job.resolve("j").unwrap(), region, 0)
    }

    #[test]
    fn sequential_offsets_follow_one_another_and_begin_again_at_the_end() {
        let mut work = workload(Pattern::Read, JobOptions::default(), 3);
        let offsets: Vec<u64> = (0..4).map(|_| work.next().unwrap().offset).collect();
        assert_eq!(offsets, [8192, 12288, 16384, 8192]);
    }

    #[test]
    fn random_offsets_stay_within_the_region_and_reach_all_of_it() {
        let mut work = workload(Pattern::RandRead, JobOptions::default(), 16);
        let mut seen = [false; 16];
        for _ in 0..1000 {
            let io = work.next().unwrap();
            seen[usize::try_from((io.offset - 8192) / 4096).unwrap()] = true;
        }
        assert_eq!(seen, [true; 16]);
    }

    #[test]
    fn mixed_load_has_the_share_of_reads_and_a_flush_after_every_nth_write() {
        let more = JobOptions {
            rwmixread: Some("70".parse().unwrap()),
            fsync: Some(4),
            ..JobOptions::default()
        };
        let mut work = workload(Pattern::RandRw, more, 1 << 20);
        let mut counts = [0u32; 4];
        for _ in 0..10_000 {
            let io = work.next().unwrap();
            counts[io.op.index()] += 1;
            assert!(counts[1] / 4 >= counts[3]);
        }
        let share = f64::from(counts[0]) / f64::from(counts[0] + counts[1]);
        assert!((share - 0.7).abs() < 0.03, "{share}");
        assert!(counts[3].abs_diff(counts[1] / 4) <= 1, "{counts:?}");
    }

    #[test]
    fn gaps_have_the_mean_and_the_spread_of_a_poisson_process() {
        let mut random = Random::new(1);
        let gaps: Vec<f64> = (0..100_000).map(|_| random.gap(1e6)).collect();
        let mean = gaps.iter().sum::<f64>() / 1e5;
        let variance = gaps.iter().map(|gap| (gap - mean).powi(2)).sum::<f64>() / 1e5;
        assert!((mean - 1000.0).abs() < 20.0, "{mean}");
        assert!((variance.sqrt() - mean).abs() < 20.0, "{variance}");
    }
}
