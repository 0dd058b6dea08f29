//! Latencies and what they say: log-linear histograms, percentiles that know how many samples carry them.

use std::path::Path;

use hdrhistogram::Histogram;

use super::io::Op;

/// What is reported of each distribution.
pub const PERCENTILES: [f64; 6] = [50.0, 90.0, 99.0, 99.9, 99.99, 99.999];
/// A percentile with fewer samples beyond it says more about chance than about the target.
pub const LEAST_BEYOND: u64 = 10;
/// 137 s; what is longer counts as this long.
const LONGEST: u64 = 1 << 37;
/// Decimal digits that a histogram keeps: an error of 0.1 %.
const DIGITS: u8 = 3;

/// A whole number of what is never negative, such as nanoseconds.
#[must_use]
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "a float's conversion saturates"
)]
pub fn whole(value: f64) -> u64 {
    value as u64
}

/// Latencies in nanoseconds.
#[derive(Clone, Debug)]
pub struct Latencies {
    histogram: Histogram<u64>,
    /// Exact, where bins are not.
    sum: f64,
    min: u64,
    max: u64,
}

impl Default for Latencies {
    fn default() -> Latencies {
        let histogram = Histogram::new_with_bounds(1, LONGEST, DIGITS);
        Latencies {
            histogram: histogram.expect("bounds and digits that are constants"),
            sum: 0.0,
            min: u64::MAX,
            max: 0,
        }
    }
}

/// A percentile and how well it is founded.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Percentile {
    pub percent: f64,
    /// Nanoseconds. `None`: declined, since fewer than [`LEAST_BEYOND`] samples are beyond it.
    pub value: Option<u64>,
    /// Samples on the farther side of it: above, or below for one under 50.
    pub beyond: u64,
}

impl Latencies {
    #[inline]
    pub fn record(&mut self, nanos: u64) {
        self.histogram.saturating_record(nanos.max(1));
        self.sum += nanos as f64;
        self.min = self.min.min(nanos);
        self.max = self.max.max(nanos);
    }

    pub fn add(&mut self, other: &Latencies) {
        // Bounds are the same: nothing can be out of range.
        let _ = self.histogram.add(&other.histogram);
        self.sum += other.sum;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
    }

    #[must_use]
    pub fn count(&self) -> u64 {
        self.histogram.len()
    }

    #[must_use]
    pub fn mean(&self) -> f64 {
        self.sum / (self.count().max(1)) as f64
    }

    #[must_use]
    pub fn stddev(&self) -> f64 {
        self.histogram.stdev()
    }

    #[must_use]
    pub fn min(&self) -> u64 {
        if self.count() == 0 { 0 } else { self.min }
    }

    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    #[must_use]
    pub fn percentile(&self, percent: f64) -> Percentile {
        // Floating point: 99.9 % of 10000 samples is 9990.000000000002, and leaves 10.
        let side = percent.min(100.0 - percent);
        let beyond = whole((self.count() as f64 * side / 100.0 + 1e-6).floor());
        let value = (beyond >= LEAST_BEYOND).then(|| self.at(percent));
        Percentile {
            percent,
            value,
            beyond,
        }
    }

    /// A percentile whatever it stands on, for drawing.
    #[must_use]
    pub fn at(&self, percent: f64) -> u64 {
        // The upper end of a bin may be beyond all that was in it.
        self.histogram.value_at_percentile(percent).min(self.max)
    }

    /// How many samples lie in each of ranges that follow one another: below each of `bounds`, in nanoseconds, and the
    /// rest.
    #[must_use]
    pub fn ranges(&self, bounds: &[u64]) -> Vec<u64> {
        let mut counts = vec![0; bounds.len() + 1];
        for (value, count) in self.bins() {
            counts[bounds.partition_point(|bound| *bound <= value)] += count;
        }
        counts
    }

    /// Bins that are not empty: their value in nanoseconds, and how many samples.
    pub fn bins(&self) -> impl Iterator<Item = (u64, u64)> {
        let values = self.histogram.iter_recorded();
        values.map(|value| (value.value_iterated_to(), value.count_at_value()))
    }
}

/// A distribution of which only the moments are kept.
#[derive(Clone, Copy, Debug, Default)]
pub struct Moments {
    pub count: u64,
    pub min: u64,
    pub max: u64,
    sum: f64,
    squares: f64,
}

impl Moments {
    #[inline]
    pub fn record(&mut self, nanos: u64) {
        self.min = if self.count == 0 {
            nanos
        } else {
            self.min.min(nanos)
        };
        self.max = self.max.max(nanos);
        self.count += 1;
        self.sum += nanos as f64;
        self.squares += nanos as f64 * nanos as f64;
    }

    pub fn add(&mut self, other: &Moments) {
        if other.count == 0 {
            return;
        }
        self.min = if self.count == 0 {
            other.min
        } else {
            self.min.min(other.min)
        };
        self.max = self.max.max(other.max);
        self.count += other.count;
        self.sum += other.sum;
        self.squares += other.squares;
    }

    #[must_use]
    pub fn mean(&self) -> f64 {
        self.sum / self.count.max(1) as f64
    }

    #[must_use]
    pub fn stddev(&self) -> f64 {
        let mean = self.mean();
        (self.squares / self.count.max(1) as f64 - mean * mean)
            .max(0.0)
            .sqrt()
    }
}

/// One kind of operation.
#[derive(Clone, Debug, Default)]
pub struct OpStats {
    /// From the intended start (a free place, or the arrival) to the completion.
    pub lat: Latencies,
    /// From the hand-over to the completion.
    pub clat: Latencies,
    /// From the intended start to the hand-over.
    pub slat: Moments,
    pub bytes: u64,
}

/// What one queue's thread had of its machine, or what it spent.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    /// CPU time in nanoseconds.
    pub user: u64,
    pub system: u64,
    /// Nanoseconds for which it could have run, and another had its CPU.
    pub waited: u64,
    pub voluntary_switches: u64,
    pub involuntary_switches: u64,
}

/// Nanoseconds on a CPU, and waiting for one, of a thread with this schedstat file (proc_pid_schedstat(5)); zeroes where the
/// kernel does not count.
#[must_use]
pub fn schedule(schedstat: &Path) -> [u64; 2] {
    let text = std::fs::read_to_string(schedstat).unwrap_or_default();
    let mut numbers = text
        .split_whitespace()
        .map(|number| number.parse().unwrap_or(0));
    std::array::from_fn(|_| numbers.next().unwrap_or(0))
}

impl Usage {
    /// Of the calling thread so far.
    #[must_use]
    pub fn of_this_thread() -> Usage {
        // SAFETY: `rusage` is plain numbers, for which zeroes are valid.
        let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
        // SAFETY: the pointer names a `rusage` of ours.
        if unsafe { libc::getrusage(libc::RUSAGE_THREAD, &raw mut usage) } != 0 {
            return Usage::default();
        }
        let nanos = |time: libc::timeval| {
            let micros = time.tv_sec.saturating_mul(1_000_000) + time.tv_usec;
            u64::try_from(micros).unwrap_or(0) * 1000
        };
        let count = |count: libc::c_long| u64::try_from(count).unwrap_or(0);
        Usage {
            user: nanos(usage.ru_utime),
            system: nanos(usage.ru_stime),
            waited: schedule(Path::new("/proc/thread-self/schedstat"))[1],
            voluntary_switches: count(usage.ru_nvcsw),
            involuntary_switches: count(usage.ru_nivcsw),
        }
    }

    #[must_use]
    pub fn since(self, before: Usage) -> Usage {
        Usage {
            user: self.user.saturating_sub(before.user),
            system: self.system.saturating_sub(before.system),
            waited: self.waited.saturating_sub(before.waited),
            voluntary_switches: self
                .voluntary_switches
                .saturating_sub(before.voluntary_switches),
            involuntary_switches: self
                .involuntary_switches
                .saturating_sub(before.involuntary_switches),
        }
    }

    pub fn add(&mut self, other: Usage) {
        self.user += other.user;
        self.system += other.system;
        self.waited += other.waited;
        self.voluntary_switches += other.voluntary_switches;
        self.involuntary_switches += other.involuntary_switches;
    }

    #[must_use]
    pub fn cpu(self) -> u64 {
        self.user + self.system
    }
}

/// How a queue talked to its target.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Doorbell writes, kicks, or calls of io_uring_enter.
    pub doorbells: u64,
    /// Notifications received: reads of an eventfd, or times that sleeping ended.
    pub notifications: u64,
}

impl Counters {
    #[must_use]
    pub fn since(self, before: Counters) -> Counters {
        Counters {
            doorbells: self.doorbells - before.doorbells,
            notifications: self.notifications - before.notifications,
        }
    }
}

/// What one queue did in one measurement, or several in all.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// By [`Op::index`].
    pub ops: [OpStats; 4],
    /// Nanoseconds that were measured; of several queues at once, the longest.
    pub elapsed: u64,
    pub usage: Usage,
    pub counters: Counters,
    pub polls: u64,
    pub idle_polls: u64,
    /// The longest time between two polls, in nanoseconds.
    pub longest_gap: u64,
    /// Polls that came late (see `engine::LATE`), and completions that they found.
    pub late_polls: u64,
    pub found_late: u64,
    /// Arrivals that had not been sent at the end, and how long the first of them had waited (open loop).
    pub backlog: u64,
    pub backlog_age: u64,
    /// I/Os that had not come back at the end, and how long the oldest of them had taken by then.
    pub unfinished: u64,
    pub unfinished_age: u64,
    /// Reads that --verify has checked.
    pub verified: u64,
}

impl Outcome {
    #[must_use]
    pub fn op(&self, op: Op) -> &OpStats {
        &self.ops[op.index()]
    }

    #[inline]
    pub fn op_mut(&mut self, op: Op) -> &mut OpStats {
        &mut self.ops[op.index()]
    }

    /// Queues side by side: time passes once.
    pub fn add_beside(&mut self, other: &Outcome) {
        let elapsed = self.elapsed.max(other.elapsed);
        self.add_after(other);
        self.elapsed = elapsed;
    }

    /// Measurements one after the other.
    pub fn add_after(&mut self, other: &Outcome) {
        for (own, other) in self.ops.iter_mut().zip(&other.ops) {
            own.lat.add(&other.lat);
            own.clat.add(&other.clat);
            own.slat.add(&other.slat);
            own.bytes += other.bytes;
        }
        self.elapsed += other.elapsed;
        self.usage.add(other.usage);
        self.counters.doorbells += other.counters.doorbells;
        self.counters.notifications += other.counters.notifications;
        self.polls += other.polls;
        self.idle_polls += other.idle_polls;
        self.longest_gap = self.longest_gap.max(other.longest_gap);
        self.late_polls += other.late_polls;
        self.found_late += other.found_late;
        self.backlog += other.backlog;
        self.backlog_age = self.backlog_age.max(other.backlog_age);
        self.unfinished += other.unfinished;
        self.unfinished_age = self.unfinished_age.max(other.unfinished_age);
        self.verified += other.verified;
    }

    /// Reads, writes and trims; flushes are on top.
    #[must_use]
    pub fn ios(&self) -> u64 {
        let ops = [Op::Read, Op::Write, Op::Trim];
        ops.iter().map(|op| self.op(*op).lat.count()).sum()
    }

    /// Those a second.
    #[must_use]
    pub fn iops(&self) -> f64 {
        self.per_second(self.ios())
    }

    #[must_use]
    pub fn per_second(&self, count: u64) -> f64 {
        count as f64 / (self.elapsed.max(1) as f64 / 1e9)
    }

    /// All latencies, flushes included: they take a place as well.
    #[must_use]
    pub fn all(&self) -> Latencies {
        self.ops
            .iter()
            .fold(Latencies::default(), |mut all, stats| {
                all.add(&stats.lat);
                all
            })
    }
}

/// The middle one, or the mean of the two in the middle. 0 of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let half = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        len if len % 2 == 1 => sorted[half],
        _ => f64::midpoint(sorted[half - 1], sorted[half]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentile_with_fewer_than_ten_samples_beyond_it_is_declined() {
        let mut latencies = Latencies::default();
        for nanos in 1..=9_999 {
            latencies.record(nanos);
        }
        assert_eq!(latencies.percentile(99.9).value, None);
        assert_eq!(latencies.percentile(99.9).beyond, 9);
        latencies.record(10_000);
        let tenth = latencies.percentile(99.9);
        assert_eq!(tenth.beyond, 10);
        assert!(tenth.value.unwrap().abs_diff(9_990) <= 10);
        assert_eq!(latencies.percentile(99.99).value, None);
    }

    #[test]
    fn recorded_value_is_off_by_less_than_one_percent_everywhere() {
        for shift in 0..36 {
            let nanos = (1u64 << shift) + (1 << shift) / 3;
            let mut latencies = Latencies::default();
            for _ in 0..20 {
                latencies.record(nanos);
            }
            let value = latencies.percentile(50.0).value.unwrap();
            assert!(
                value.abs_diff(nanos) * 100 <= nanos,
                "{nanos} is said to be {value}"
            );
        }
    }

    #[test]
    fn moments_of_two_parts_are_those_of_the_whole() {
        let (mut left, mut right, mut whole) = Default::default();
        for nanos in [4, 8, 15, 16, 23, 42] {
            let part: &mut Moments = if nanos < 16 { &mut left } else { &mut right };
            part.record(nanos);
            Moments::record(&mut whole, nanos);
        }
        left.add(&right);
        assert_eq!((left.count, left.min, left.max), (6, 4, 42));
        assert!((left.mean() - 18.0).abs() < 1e-9);
        assert!((left.stddev() - whole.stddev()).abs() < 1e-9);
    }

    #[test]
    fn outcomes_beside_each_other_take_time_once_and_after_each_other_twice() {
        let one = Outcome {
            elapsed: 1_000_000_000,
            ..Outcome::default()
        };
        let (mut beside, mut after) = (one.clone(), one.clone());
        beside.add_beside(&one);
        after.add_after(&one);
        assert_eq!(beside.elapsed, 1_000_000_000);
        assert_eq!(after.elapsed, 2_000_000_000);
    }

    #[test]
    fn median_is_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), 2.5);
        assert_eq!(median(&[]), 0.0);
    }
}
