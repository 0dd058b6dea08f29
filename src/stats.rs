//! What each virtqueue did: plain counters for its poller, a published copy for everybody else, a table for people.
//!
//! ```text
//!  poller: QueueCounters --publish, now and then--> SharedCounters --snapshot--> CounterTable
//! ```
//! The poller counts in plain words that no other thread reads. What others read are relaxed atomics, so a snapshot is a
//! little old and its fields need not be of one instant; the last publication of a drained poller is exact. Nothing here
//! knows what a request is or who prints the table.
//!
//! Start at [`QueueCounters`].

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Serialize};

macro_rules! counters {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// The counters of one virtqueue, owned by the poller that counts.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[repr(C)]
        pub struct QueueCounters {
            $($(#[$doc])+ pub $name: u64,)+
        }

        /// The copy of a poller's counters that other threads read. One writer, any number of readers.
        // Aligned so that two queues never share a cache line: their pollers publish from different cores.
        #[derive(Debug, Default)]
        #[repr(C, align(64))]
        pub struct SharedCounters {
            $($name: AtomicU64,)+
            /// Where the time of sampled requests went.
            pub stages: StageTimes,
        }

        impl SharedCounters {
            /// Some twenty stores: for every few thousand turns and the last one, not for every turn.
            pub fn publish(&self, counters: &QueueCounters) {
                // Relaxed: each field stands alone, nothing is reached through it.
                $(self.$name.store(counters.$name, Ordering::Relaxed);)+
            }

            /// What was published last.
            pub fn snapshot(&self) -> QueueCounters {
                QueueCounters { $($name: self.$name.load(Ordering::Relaxed),)+ }
            }
        }

        impl QueueCounters {
            /// Adds the counters of another queue, for totals. A total stops at its maximum instead of lying.
            pub fn add(&mut self, other: &Self) {
                $(self.$name = self.$name.saturating_add(other.$name);)+
            }
        }
    };
}

// Busiest first: what a turn with one read or write touches lies in the first two cache lines.
counters! {
    /// Turns of the poller.
    polls,
    /// Turns that found nothing to do.
    idle_polls,
    /// Read requests of the guest.
    reads,
    /// Write requests of the guest.
    writes,
    /// Bytes that reads returned.
    bytes_read,
    /// Bytes that writes wrote.
    bytes_written,
    /// NVMe commands submitted. More than requests where a request was split.
    commands,
    /// Writes to the submission queue's doorbell: one for a batch of commands.
    sq_doorbells,
    /// Writes to the completion queue's doorbell.
    cq_doorbells,
    /// Signals to the guest's call eventfd.
    notifications,
    /// Flush requests.
    flushes,
    /// Discard requests.
    discards,
    /// Write-zeroes requests.
    write_zeroes,
    /// Requests for the serial number.
    get_ids,
    /// Requests that ended with IOERR.
    errors,
    /// Chains that were no request: loops, addresses outside memory, missing status bytes.
    malformed,
    /// Requests that ended with UNSUPP; of a SCSI host, with another response than OK.
    unsupported,
    /// Requests whose data went through a buffer of ours, because the device could not reach it in place.
    bounced,
    /// Requests that took more than one NVMe command.
    split,
    /// SCSI commands that ended well without the device.
    immediate,
    /// SCSI commands that ended with CHECK CONDITION without the device, or were for nobody.
    checks,
    /// Task management functions of a SCSI host.
    tasks,
}

/// The ways of a request through the server that are timed, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// From when the turn that found it looked at the avail ring to the submission queue's doorbell.
    Submit,
    /// To when its completion was seen.
    Device,
    /// To when the guest could see it in the used ring.
    Used,
    /// To the end of the signal, if the guest wanted one.
    Signal,
}

impl Stage {
    /// In order.
    pub const ALL: [Stage; 4] = [Stage::Submit, Stage::Device, Stage::Used, Stage::Signal];

    /// What it is called.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Stage::Submit => "submit",
            Stage::Device => "device",
            Stage::Used => "used",
            Stage::Signal => "signal",
        }
    }
}

/// Bins to a power of two: a percentile is off by an eighth at most.
const BINS_LOG2: u32 = 2;
/// Up to 2^42 ns, more than an hour; what is longer counts as that.
const BINS: usize = 40 << BINS_LOG2;

/// Histograms of the times that sampled requests spent in each [`Stage`]. One writer, any number of readers.
#[derive(Debug)]
pub struct StageTimes {
    bins: [[AtomicU64; BINS]; Stage::ALL.len()],
}

impl Default for StageTimes {
    fn default() -> StageTimes {
        StageTimes {
            bins: std::array::from_fn(|_| std::array::from_fn(|_| AtomicU64::new(0))),
        }
    }
}

impl StageTimes {
    /// Counts one request. For its poller only.
    pub fn record(&self, stage: Stage, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        let nanos = nanos.max(1 << BINS_LOG2);
        let log = nanos.ilog2();
        let bin = u64::from(log - BINS_LOG2) << BINS_LOG2 | nanos >> (log - BINS_LOG2) & 3;
        let bin = usize::try_from(bin).unwrap_or(BINS).min(BINS - 1);
        // Relaxed, and not atomic as a whole: there is one writer, and each bin stands alone.
        let count = &self.bins[stage as usize][bin];
        count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// What was counted so far.
    #[must_use]
    pub fn snapshot(&self) -> StageCounts {
        StageCounts(Stage::ALL.map(|stage| {
            let bins = self.bins[stage as usize].iter().enumerate();
            let counted = bins.filter_map(|(index, bin)| {
                let (index, one) = (index as u64, 1 << BINS_LOG2);
                let width = 1 << (index >> BINS_LOG2);
                let count = bin.load(Ordering::Relaxed);
                (count > 0).then_some(((one + index % one) * width + width / 2, count))
            });
            counted.collect()
        }))
    }
}

/// How many sampled requests spent how long in each [`Stage`], in order: counts by nanoseconds, to the middle of a bin.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StageCounts([BTreeMap<u64, u64>; Stage::ALL.len()]);

impl StageCounts {
    /// Counts by nanoseconds.
    #[must_use]
    pub fn bins(&self, stage: Stage) -> &BTreeMap<u64, u64> {
        &self.0[stage as usize]
    }

    /// How many requests went through a stage.
    #[must_use]
    pub fn count(&self, stage: Stage) -> u64 {
        self.bins(stage).values().sum()
    }

    /// Nanoseconds that so many percent of the requests did not exceed; `None` with fewer than ten of them beyond.
    #[must_use]
    pub fn percentile(&self, stage: Stage, percent: u64) -> Option<u64> {
        let mut left = self.count(stage) * (100 - percent) / 100;
        if left < 10 {
            return None;
        }
        for (nanos, count) in self.bins(stage).iter().rev() {
            if *count > left {
                return Some(*nanos);
            }
            left -= count;
        }
        None
    }

    /// What came on top of an earlier count of the same virtqueue.
    #[must_use]
    pub fn since(mut self, before: &StageCounts) -> StageCounts {
        for (bins, before) in self.0.iter_mut().zip(&before.0) {
            for (nanos, count) in bins.iter_mut() {
                *count = count.saturating_sub(before.get(nanos).copied().unwrap_or(0));
            }
            bins.retain(|_, count| *count > 0);
        }
        self
    }

    /// Adds what was counted at another time.
    pub fn add(&mut self, other: &StageCounts) {
        for (bins, other) in self.0.iter_mut().zip(&other.0) {
            for (nanos, count) in other {
                let sum = bins.entry(*nanos).or_default();
                *sum = sum.saturating_add(*count);
            }
        }
    }
}

/// What a server says of itself to whoever connects to its statistics socket: one JSON document.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Statistics {
    /// Of the server.
    pub version: String,
    /// Every virtqueue.
    pub queues: Vec<QueueStatistics>,
}

/// One virtqueue of [`Statistics`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueStatistics {
    /// Where its front-end connects.
    pub socket: String,
    /// Its number there.
    pub queue: usize,
    /// The core that polls it.
    pub core: usize,
    /// The device; a virtqueue of a SCSI host with several is listed once for each.
    pub device: String,
    /// The NVMe queue pair that it rides with.
    pub queue_pair: u16,
    /// Since the server started.
    pub counters: QueueCounters,
    /// Since the server started: for each of submit, device, used and signal the requests by nanoseconds.
    pub stages: StageCounts,
}

/// Where the time of sampled requests went, for people: one row for each virtqueue, in nanoseconds.
#[derive(Debug, Default)]
pub struct StageTable {
    lines: Vec<Vec<String>>,
}

impl StageTable {
    /// Adds virtqueue `queue` of a disk, or what goes from there to another device.
    pub fn push(&mut self, disk: &str, queue: impl fmt::Display, times: &StageCounts) {
        let samples = times.count(Stage::Submit);
        let mut line = vec![shortened(disk), queue.to_string(), grouped(samples)];
        for stage in Stage::ALL {
            for percent in [50, 99] {
                let nanos = times.percentile(stage, percent);
                line.push(nanos.map_or_else(|| "-".to_owned(), grouped));
            }
        }
        self.lines.push(line);
    }
}

impl fmt::Display for StageTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut lines = vec![["disk", "vq", "sampled"].map(str::to_owned).to_vec()];
        for stage in Stage::ALL {
            let names = ["p50", "p99"].map(|percent| format!("{} {percent}", stage.name()));
            lines[0].extend(names);
        }
        lines.extend(self.lines.iter().cloned());
        aligned(&lines, f)
    }
}

/// Columns under each other: the first to the left, the others to the right.
fn aligned(lines: &[Vec<String>], f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let width = |column: usize| {
        let cells = lines.iter().map(|line| line[column].chars().count());
        cells.max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..lines[0].len()).map(width).collect();
    for line in lines {
        write!(f, "{:<width$}", line[0], width = widths[0])?;
        for (cell, width) in line.iter().zip(&widths).skip(1) {
            write!(f, " {cell:>width$}")?;
        }
        writeln!(f)?;
    }
    Ok(())
}

/// Counters for people: one row for each virtqueue and a row of totals, first what the guest asked for, then what the
/// rings did. Numbers are exact, grouped by thousands.
#[derive(Clone, Debug, Default)]
pub struct CounterTable {
    rows: Vec<Row>,
}

#[derive(Clone, Debug)]
struct Row {
    /// Disk, virtqueue, core, queue pair.
    place: [String; 4],
    counters: QueueCounters,
}

impl CounterTable {
    /// Adds virtqueue `queue` of a disk, polled on `core` and riding with the queue pair of that NVMe identifier, or of that
    /// device and identifier. A disk goes by its socket.
    pub fn push(
        &mut self,
        disk: &str,
        queue: usize,
        core: usize,
        queue_pair: impl fmt::Display,
        counters: QueueCounters,
    ) {
        let place = [
            shortened(disk),
            queue.to_string(),
            core.to_string(),
            queue_pair.to_string(),
        ];
        self.rows.push(Row { place, counters });
    }
}

type Column = (&'static str, fn(&QueueCounters) -> String);

const REQUESTS: &[Column] = &[
    ("reads", |c| grouped(c.reads)),
    ("bytes read", |c| grouped(c.bytes_read)),
    ("writes", |c| grouped(c.writes)),
    ("bytes written", |c| grouped(c.bytes_written)),
    ("flushes", |c| grouped(c.flushes)),
    ("discards", |c| grouped(c.discards)),
    ("zeroes", |c| grouped(c.write_zeroes)),
    ("ids", |c| grouped(c.get_ids)),
    ("errors", |c| grouped(c.errors)),
    ("malformed", |c| grouped(c.malformed)),
    ("unsupp", |c| grouped(c.unsupported)),
];

const RINGS: &[Column] = &[
    ("commands", |c| grouped(c.commands)),
    ("SQ doorbells", |c| grouped(c.sq_doorbells)),
    ("CQ doorbells", |c| grouped(c.cq_doorbells)),
    ("notifications", |c| grouped(c.notifications)),
    ("bounced", |c| grouped(c.bounced)),
    ("split", |c| grouped(c.split)),
    ("polls", |c| grouped(c.polls)),
    ("idle polls", |c| grouped(c.idle_polls)),
    ("idle", |c| percent(c.idle_polls, c.polls)),
];

/// Of SCSI hosts.
const SCSI: &[Column] = &[
    ("immediate", |c| grouped(c.immediate)),
    ("checks", |c| grouped(c.checks)),
    ("tasks", |c| grouped(c.tasks)),
];

/// Longest disk name shown. Of a longer socket path the end tells more than the beginning.
const DISK_WIDTH: usize = 24;

impl fmt::Display for CounterTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.block(REQUESTS, f)?;
        writeln!(f)?;
        self.block(RINGS, f)?;
        let is_scsi = |c: &QueueCounters| c.immediate + c.checks + c.tasks > 0;
        if self.rows.iter().any(|row| is_scsi(&row.counters)) {
            writeln!(f)?;
            self.block(SCSI, f)?;
        }
        Ok(())
    }
}

impl CounterTable {
    fn block(&self, columns: &[Column], f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut total = QueueCounters::default();
        let head = ["disk", "vq", "core", "qp"]
            .into_iter()
            .chain(columns.iter().map(|(name, _)| *name));
        let mut lines: Vec<Vec<String>> = vec![head.map(str::to_owned).collect()];
        for row in &self.rows {
            let cells = columns.iter().map(|(_, cell)| cell(&row.counters));
            lines.push(row.place.iter().cloned().chain(cells).collect());
            total.add(&row.counters);
        }
        let place = ["total", "", "", ""].map(str::to_owned);
        lines.push(
            place
                .into_iter()
                .chain(columns.iter().map(|(_, cell)| cell(&total)))
                .collect(),
        );
        aligned(&lines, f)
    }
}

fn shortened(disk: &str) -> String {
    let length = disk.chars().count();
    if length <= DISK_WIDTH {
        return disk.to_owned();
    }
    let end: String = disk.chars().skip(length + 1 - DISK_WIDTH).collect();
    format!("…{end}")
}

/// 1234567 as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() * 4 / 3 + 1);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// A share in percent with one decimal, cut off: 100.0% means all.
fn percent(part: u64, whole: u64) -> String {
    let tenths = u128::from(part) * 1000 / u128::from(whole.max(1));
    format!("{}.{}%", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stage_percentile_is_off_by_an_eighth_at_most_and_declined_without_samples() {
        for nanos in [1, 5, 100, 777, 4096, 1 << 30, 1 << 41] {
            let times = StageTimes::default();
            for count in 0..20 {
                assert_eq!(
                    times.snapshot().percentile(Stage::Device, 50),
                    None,
                    "{count}"
                );
                times.record(Stage::Device, Duration::from_nanos(nanos));
            }
            let times = times.snapshot();
            let said = times.percentile(Stage::Device, 50).unwrap();
            let wanted = nanos.max(4);
            assert!(said.abs_diff(wanted) * 8 <= wanted, "{nanos}: {said}");
            assert_eq!(times.percentile(Stage::Device, 99), None);
            assert_eq!(times.percentile(Stage::Used, 50), None);
        }
        let times = StageTimes::default();
        for nanos in 1..=10_000 {
            times.record(Stage::Submit, Duration::from_nanos(nanos));
        }
        let times = times.snapshot();
        let [half, most] =
            [50, 99].map(|percent| times.percentile(Stage::Submit, percent).unwrap());
        assert!(
            half.abs_diff(5000) <= 625 && most.abs_diff(9900) <= 1238,
            "{half} {most}"
        );
        let mut table = StageTable::default();
        table.push("disk", 0, &times);
        let text = table.to_string();
        assert!(
            text.contains("submit p50") && text.contains("10,000"),
            "{text}"
        );
    }

    /// Every field another value. A new counter must be added here before this compiles.
    fn distinct(base: u64) -> QueueCounters {
        QueueCounters {
            polls: base + 1,
            idle_polls: base + 2,
            reads: base + 3,
            bytes_read: base + 4,
            writes: base + 5,
            bytes_written: base + 6,
            commands: base + 7,
            sq_doorbells: base + 8,
            cq_doorbells: base + 9,
            notifications: base + 10,
            flushes: base + 11,
            discards: base + 12,
            write_zeroes: base + 13,
            get_ids: base + 14,
            errors: base + 15,
            malformed: base + 16,
            unsupported: base + 17,
            bounced: base + 18,
            split: base + 19,
            immediate: base + 20,
            checks: base + 21,
            tasks: base + 22,
        }
    }

    #[test]
    fn snapshot_after_publish_returns_every_counter() {
        let shared = SharedCounters::default();
        assert_eq!(shared.snapshot(), QueueCounters::default());
        shared.publish(&distinct(100));
        assert_eq!(shared.snapshot(), distinct(100));
        shared.publish(&distinct(200));
        assert_eq!(shared.snapshot(), distinct(200));
    }

    #[test]
    fn snapshot_from_another_thread_never_runs_backwards() {
        let shared = SharedCounters::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for base in 0..10_000 {
                    shared.publish(&distinct(base));
                }
            });
            let mut last = 0;
            while last < 10_000 {
                let polls = shared.snapshot().polls;
                assert!(polls >= last);
                last = polls;
                std::thread::yield_now();
            }
        });
    }

    #[test]
    fn shared_counters_of_two_queues_lie_on_separate_cache_lines() {
        assert_eq!(align_of::<SharedCounters>(), 64);
        assert_eq!(size_of::<SharedCounters>() % 64, 0);
    }

    #[test]
    fn add_sums_every_counter_and_stops_at_the_maximum() {
        let mut total = distinct(0);
        total.add(&distinct(1000));
        let expected = QueueCounters {
            polls: 1002,
            split: 1038,
            errors: 1030,
            ..total
        };
        assert_eq!(total, expected);
        let mut doubled = distinct(7);
        doubled.add(&distinct(7));
        for (double, single) in [
            (doubled.reads, 10),
            (doubled.get_ids, 21),
            (doubled.bytes_written, 13),
        ] {
            assert_eq!(double, 2 * single);
        }
        total.reads = u64::MAX;
        total.add(&distinct(0));
        assert_eq!(total.reads, u64::MAX);
    }

    #[test]
    fn table_shows_exact_numbers_per_queue_and_totals() {
        let busy = QueueCounters {
            reads: 1_234_567,
            bytes_read: 5_056_786_432,
            flushes: 12,
            commands: 1_234_600,
            sq_doorbells: 40_000,
            cq_doorbells: 20_000,
            notifications: 39_999,
            polls: 10_000_000,
            idle_polls: 9_999_999,
            ..QueueCounters::default()
        };
        let quiet = QueueCounters {
            writes: 1,
            bytes_written: 512,
            errors: 1,
            ..QueueCounters::default()
        };
        let mut table = CounterTable::default();
        table.push("/run/tandem/vm0.sock", 0, 3, 1, busy);
        table.push("/run/tandem/vm0.sock", 1, 3, 2, quiet);
        assert_eq!(
            table.to_string(),
            "\
disk                 vq core qp     reads    bytes read writes bytes written flushes discards zeroes ids errors malformed unsupp
/run/tandem/vm0.sock  0    3  1 1,234,567 5,056,786,432      0             0      12        0      0   0      0         0      0
/run/tandem/vm0.sock  1    3  2         0             0      1           512       0        0      0   0      1         0      0
total                           1,234,567 5,056,786,432      1           512      12        0      0   0      1         0      0

disk                 vq core qp  commands SQ doorbells CQ doorbells notifications bounced split      polls idle polls  idle
/run/tandem/vm0.sock  0    3  1 1,234,600       40,000       20,000        39,999       0     0 10,000,000  9,999,999 99.9%
/run/tandem/vm0.sock  1    3  2         0            0            0             0       0     0          0          0  0.0%
total                           1,234,600       40,000       20,000        39,999       0     0 10,000,000  9,999,999 99.9%
"
        );
    }

    #[test]
    fn table_of_a_scsi_host_has_a_third_block() {
        let counters = QueueCounters {
            immediate: 1_234,
            tasks: 5,
            ..QueueCounters::default()
        };
        let mut table = CounterTable::default();
        table.push("a", 0, 3, 1, counters);
        table.push("a", 2, 3, 1, QueueCounters::default());
        let table = table.to_string();
        let third = table.split("\n\n").nth(2);
        assert_eq!(
            third,
            Some(
                "\
disk  vq core qp immediate checks tasks
a      0    3  1     1,234      0     5
a      2    3  1         0      0     0
total                1,234      0     5
"
            )
        );
    }

    #[test]
    fn table_of_a_long_busy_day_stays_within_160_columns() {
        // A day of 500,000 reads and as many writes of 4 KiB a second, and 20 million polls.
        let requests = 500_000 * 86_400;
        let counters = QueueCounters {
            polls: requests * 40,
            idle_polls: requests * 20,
            reads: requests,
            bytes_read: requests * 4096,
            writes: requests,
            bytes_written: requests * 4096,
            commands: requests * 2,
            sq_doorbells: requests,
            cq_doorbells: requests,
            notifications: requests,
            ..distinct(1000)
        };
        let mut table = CounterTable::default();
        table.push(
            "/var/lib/machines/customers/0123456789/disk.sock",
            63,
            127,
            128,
            counters,
        );
        let table = table.to_string();
        assert!(table.contains("…rs/0123456789/disk.sock "), "{table}");
        let widest = table.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(160), "{widest:?}\n{table}");
    }

    #[test]
    fn table_without_queues_still_prints_its_totals() {
        assert!(CounterTable::default().to_string().contains("total"));
    }
}
