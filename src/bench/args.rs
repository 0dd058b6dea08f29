//! What `tandem bench` takes: targets, fio's words for the load, and what to do with the result.
//!
//! A [`JobOptions`] is what was written, on the command line or in a section of a job file; a [`Job`] is complete.
//! Flags go before the section, the section before `[global]`, and that before the defaults.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::config::{ByteSize, CoreList, DeviceOptions};

use super::io::Pattern;
use super::spec::ServerSpec;

/// The largest block: what one descriptor, one command of most SSDs and one io_uring entry carry without being split.
const MAX_BLOCK: u64 = 1 << 20;
/// Entries of the largest queue that any target has.
const MAX_DEPTH: u32 = 1023;
const MAX_JOBS: u32 = 64;
/// Longer measurements are several.
const MAX_SECONDS: f64 = 86_400.0;

#[derive(Clone, Debug, Args)]
#[command(after_help = HELP)]
pub struct BenchArgs {
    /// A fio job file with the words below; its sections run one after the other (stonewall)
    #[arg(value_name = "JOB.fio")]
    pub job_file: Option<PathBuf>,
    /// An NVMe controller, without a server between: as for serve (repeatable)
    #[arg(long, value_name = "SPEC", help_heading = "Targets")]
    pub device: Vec<DeviceOptions>,
    /// The socket of any vhost-user-blk server (repeatable); what holds for it alone follows: vm0.sock,ring=packed
    #[arg(long, value_name = "SOCKET[,KEY=VALUE]", help_heading = "Targets")]
    pub vhost_user: Vec<ServerSpec>,
    /// A file or block device, through the kernel's io_uring (repeatable)
    #[arg(long, value_name = "PATH", help_heading = "Targets")]
    pub file: Vec<PathBuf>,
    /// Writes and trims may replace what is on an SSD (pci:...) or on a block device
    #[arg(long, help_heading = "Targets")]
    pub overwrite_data: bool,
    /// Real SSDs also without an IOMMU: any fault of one may then change all memory of this machine
    #[arg(long, help_heading = "Targets")]
    pub unsafe_noiommu: bool,
    /// vhost-user: split or packed virtqueues
    #[arg(
        long,
        value_name = "KIND",
        default_value = "split",
        help_heading = "Targets"
    )]
    pub ring: RingKind,
    /// vhost-user: one descriptor that names a table, or three in the ring
    #[arg(
        long,
        value_name = "on|off",
        default_value = "on",
        help_heading = "Targets"
    )]
    pub indirect: OnOff,
    /// on: sleep until told of a completion, instead of polling (not with --device). armed: ask to be told, as a guest
    /// does when it has found nothing, and poll all the same (vhost-user): what signals cost the server
    #[arg(
        long,
        value_name = "on|off|armed",
        default_value = "off",
        help_heading = "Targets"
    )]
    pub interrupts: Interrupts,
    /// vhost-user: negotiate VIRTIO_F_EVENT_IDX if the server has it
    #[arg(
        long,
        value_name = "on|off",
        default_value = "on",
        help_heading = "Targets"
    )]
    pub event_idx: OnOff,
    /// vhost-user: take the memory that is shared from huge pages of 2 MiB
    #[arg(long, help_heading = "Targets")]
    pub hugepages: bool,
    /// vhost-user: stop each server (SIGSTOP) while another target is measured, so that servers that poll share a core
    #[arg(long, help_heading = "Targets")]
    pub park: bool,
    #[command(flatten)]
    pub job: JobOptions,
    /// Times that each target is measured, in turn: A A' B A A' B [default: 1, with several targets 5]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000), help_heading = "Result")]
    pub rounds: Option<u32>,
    /// Measure the most that the target does, then an open loop at shares of it, in steps of 10: 10..95%
    #[arg(long, value_name = "A..B%", help_heading = "Result")]
    pub load_curve: Option<LoadCurve>,
    /// Draw latency distributions, the depth sweep and the load curve
    #[arg(long, value_name = "FILE.svg", help_heading = "Result")]
    pub plot: Option<PathBuf>,
    /// json+ adds the histograms' bins
    #[arg(
        long,
        value_name = "FORMAT",
        default_value = "normal",
        help_heading = "Result"
    )]
    pub output_format: OutputFormat,
    /// Write the result here instead of to standard output
    #[arg(long, value_name = "FILE", help_heading = "Result")]
    pub output: Option<PathBuf>,
}

const HELP: &str = "\
Targets are compared with the first one: devices come before sockets, sockets
before files. With several, the first is measured twice a round; how far these
two differ is the noise that a difference must exceed.
Keys of a --vhost-user socket, before the flags of the same names: ring,
indirect, event_idx, interrupts, hugepages; and pid=N, the server's process if
another one made the socket, and stats=PATH, what it was given as --stats: where
its requests spend their time. A socket that is named twice is connected to anew
for each measurement. If this is killed (SIGKILL), servers that it parked stand
still until SIGCONT.
Exit code 1: it failed while measuring, or --verify found something.
2: nothing was measured. 128: it was interrupted (Ctrl-C), and what was measured
until then is the result; a second Ctrl-C ends it at once.

  tandem bench --device model:ram,size=1G --bs 4k --iodepth 1,4,16,64
  tandem bench --vhost-user vm0.sock --vhost-user other.sock --iodepth 32
  tandem bench --vhost-user vm0.sock --vhost-user vm0.sock,ring=packed
  tandem bench --file /dev/nvme0n1 --rw randread --rate_iops 20000
  tandem bench --device pci:5e:00.0 --rw randwrite --overwrite-data \\
    --load-curve 10..95% --plot load.svg";

/// The load, as far as it was written.
#[derive(Clone, Debug, Default, PartialEq, Args)]
#[command(next_help_heading = "Load (fio's words)")]
pub struct JobOptions {
    /// read, write, randread, randwrite, rw, randrw, trim or randtrim [default: randread]
    #[arg(long, value_name = "PATTERN")]
    pub rw: Option<Pattern>,
    /// Percent of reads in rw and randrw [default: 50]
    #[arg(long, value_name = "PERCENT")]
    pub rwmixread: Option<Percent>,
    /// A flush after every N writes, 0: none [default: 0]
    #[arg(long, value_name = "N")]
    pub fsync: Option<u32>,
    /// Bytes of one I/O [default: 4k]
    #[arg(long, value_name = "SIZE")]
    pub bs: Option<Block>,
    /// I/Os in flight in each job; a list is measured one after the other [default: 1]
    #[arg(long, value_name = "LIST")]
    pub iodepth: Option<Depths>,
    /// Threads, each with a queue of its own [default: 1]
    #[arg(long, value_name = "N")]
    pub numjobs: Option<Jobs>,
    /// Seconds of each measurement (or 500ms) [default: 5]
    #[arg(long, value_name = "TIME")]
    pub runtime: Option<Seconds>,
    /// Seconds before each that do not count [default: 1]
    #[arg(long = "ramp_time", value_name = "TIME")]
    pub ramp_time: Option<Seconds>,
    /// Open loop: so many I/Os a second and job arrive at random (Poisson), whether or not earlier ones are done; latency
    /// counts from the arrival
    #[arg(long = "rate_iops", value_name = "N")]
    pub rate_iops: Option<Rate>,
    /// Bytes that are worked on [default: to the end]
    #[arg(long, value_name = "SIZE")]
    pub size: Option<ByteSize>,
    /// Where they begin [default: 0]
    #[arg(long, value_name = "SIZE")]
    pub offset: Option<ByteSize>,
    /// crc32c: writes carry offset, generation and checksum; they are read back, and every read is checked
    #[arg(long, value_name = "METHOD")]
    pub verify: Option<Verify>,
    /// CPUs that the jobs run on, one each in turn: 1 or 0-3,5 [default: wherever]
    #[arg(long = "cpus_allowed", value_name = "LIST")]
    pub cpus_allowed: Option<CoreList>,
    /// The same numbers give the same offsets [default: 1]
    #[arg(long, value_name = "N")]
    pub randseed: Option<u64>,
}

impl JobOptions {
    /// What is said here, and what is not as `under` says it.
    #[must_use]
    pub fn over(self, under: &JobOptions) -> JobOptions {
        let under = under.clone();
        JobOptions {
            rw: self.rw.or(under.rw),
            rwmixread: self.rwmixread.or(under.rwmixread),
            fsync: self.fsync.or(under.fsync),
            bs: self.bs.or(under.bs),
            iodepth: self.iodepth.or(under.iodepth),
            numjobs: self.numjobs.or(under.numjobs),
            runtime: self.runtime.or(under.runtime),
            ramp_time: self.ramp_time.or(under.ramp_time),
            rate_iops: self.rate_iops.or(under.rate_iops),
            size: self.size.or(under.size),
            offset: self.offset.or(under.offset),
            verify: self.verify.or(under.verify),
            cpus_allowed: self.cpus_allowed.or(under.cpus_allowed),
            randseed: self.randseed.or(under.randseed),
        }
    }

    /// With the defaults, and checked as far as no target is needed.
    ///
    /// # Errors
    /// What contradicts what.
    pub fn resolve(self, name: &str) -> anyhow::Result<Job> {
        let job = Job {
            name: name.to_owned(),
            rw: self.rw.unwrap_or(Pattern::RandRead),
            rwmixread: self.rwmixread.map_or(50, |percent| percent.0),
            fsync: self.fsync.unwrap_or(0),
            bs: self.bs.map_or(4096, |block| block.0),
            depths: self.iodepth.map_or_else(|| vec![1], |depths| depths.0),
            numjobs: self.numjobs.map_or(1, |jobs| jobs.0),
            runtime: self.runtime.map_or(Duration::from_secs(5), |time| time.0),
            ramp_time: self.ramp_time.map_or(Duration::from_secs(1), |time| time.0),
            rate_iops: self.rate_iops.map(|rate| rate.0),
            size: self.size.map(|size| size.0),
            offset: self.offset.map_or(0, |offset| offset.0),
            verify: self.verify.is_some(),
            cpus: self.cpus_allowed,
            seed: self.randseed.unwrap_or(1),
        };
        if job.runtime.is_zero() {
            anyhow::bail!("{name}: --runtime 0 measures nothing: give it some seconds");
        }
        if job.size == Some(0) {
            anyhow::bail!("{name}: --size 0 leaves no room for an I/O: give it at least --bs");
        }
        if job.rw.trims() && job.verify {
            anyhow::bail!(
                "{name}: --verify cannot be had with {}: what trimmed blocks hold is not defined",
                job.rw
            );
        }
        if job.fsync > 0 && !job.rw.writes() {
            anyhow::bail!(
                "{name}: --fsync {} has nothing to make durable with --rw {}: drop it",
                job.fsync,
                job.rw
            );
        }
        if job.verify && job.bs < super::verify::HEADER_BYTES {
            anyhow::bail!(
                "{name}: --verify needs --bs of {} bytes at least",
                super::verify::HEADER_BYTES
            );
        }
        Ok(job)
    }
}

/// A load, complete.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub name: String,
    pub rw: Pattern,
    pub rwmixread: u8,
    pub fsync: u32,
    pub bs: u32,
    /// Never empty.
    pub depths: Vec<u32>,
    pub numjobs: u32,
    pub runtime: Duration,
    pub ramp_time: Duration,
    /// Of each job, as fio has it.
    pub rate_iops: Option<f64>,
    pub size: Option<u64>,
    pub offset: u64,
    pub verify: bool,
    pub cpus: Option<CoreList>,
    pub seed: u64,
}

impl Job {
    /// The largest depth of the sweep.
    #[must_use]
    pub fn most_depth(&self) -> u32 {
        self.depths.iter().copied().max().unwrap_or(1)
    }
}

/// The layouts of a virtqueue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum RingKind {
    Split,
    Packed,
}

impl fmt::Display for RingKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Split => "split",
            Self::Packed => "packed",
        })
    }
}

/// Whether signals are wanted, and waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Interrupts {
    On,
    Off,
    Armed,
}

impl fmt::Display for Interrupts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
            Self::Armed => "armed",
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum OnOff {
    On,
    Off,
}

impl OnOff {
    #[must_use]
    pub fn is_on(self) -> bool {
        self == OnOff::On
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Verify;

impl FromStr for Verify {
    type Err = String;
    fn from_str(text: &str) -> Result<Verify, String> {
        match text {
            "crc32c" => Ok(Verify),
            _ => Err(format!(
                "`{text}` is no method that is known here: crc32c is"
            )),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OutputFormat {
    Normal,
    Json,
    JsonPlus,
    Terse,
}

impl FromStr for OutputFormat {
    type Err = String;
    fn from_str(text: &str) -> Result<OutputFormat, String> {
        match text {
            "normal" => Ok(OutputFormat::Normal),
            "json" => Ok(OutputFormat::Json),
            "json+" => Ok(OutputFormat::JsonPlus),
            "terse" => Ok(OutputFormat::Terse),
            _ => Err(format!("`{text}` is none of normal, json, json+ and terse")),
        }
    }
}

/// Percent, 0 to 100.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Percent(pub u8);

impl FromStr for Percent {
    type Err = String;
    fn from_str(text: &str) -> Result<Percent, String> {
        let percent = text.parse().ok().filter(|percent| *percent <= 100);
        percent
            .map(Percent)
            .ok_or_else(|| format!("`{text}` is no whole number from 0 to 100"))
    }
}

/// Bytes of one I/O: a multiple of 512 up to 1 MiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Block(pub u32);

impl FromStr for Block {
    type Err = String;
    fn from_str(text: &str) -> Result<Block, String> {
        let bytes = text
            .parse::<ByteSize>()
            .map_err(|error| error.to_string())?
            .0;
        u32::try_from(bytes)
            .ok()
            .filter(|_| bytes.is_multiple_of(512) && (512..=MAX_BLOCK).contains(&bytes))
            .map(Block)
            .ok_or_else(|| format!("`{text}` is no multiple of 512 bytes up to 1M"))
    }
}

/// A sweep: `1,4,16`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Depths(pub Vec<u32>);

impl FromStr for Depths {
    type Err = String;
    fn from_str(text: &str) -> Result<Depths, String> {
        let mut depths = Vec::new();
        for word in text.split(',') {
            let depth: u32 = word
                .parse()
                .ok()
                .filter(|depth| (1..=MAX_DEPTH).contains(depth))
                .ok_or_else(|| {
                    format!(
                        "`{word}` in `{text}` is no depth: write whole numbers from 1 to {MAX_DEPTH}, such as 1,4,16"
                    )
                })?;
            if depths.contains(&depth) {
                return Err(format!("depth {depth} is named twice in `{text}`"));
            }
            depths.push(depth);
        }
        Ok(Depths(depths))
    }
}

/// Threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Jobs(pub u32);

impl FromStr for Jobs {
    type Err = String;
    fn from_str(text: &str) -> Result<Jobs, String> {
        let jobs = text
            .parse()
            .ok()
            .filter(|jobs| (1..=MAX_JOBS).contains(jobs));
        jobs.map(Jobs)
            .ok_or_else(|| format!("`{text}` is no whole number from 1 to {MAX_JOBS}"))
    }
}

/// A time; seconds unless it says otherwise, as fio has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seconds(pub Duration);

impl FromStr for Seconds {
    type Err = String;
    fn from_str(text: &str) -> Result<Seconds, String> {
        // "s" last: it ends the other two.
        let units = [("us", 1e-6), ("ms", 1e-3), ("m", 60.0), ("s", 1.0)];
        let (digits, unit) = units
            .iter()
            .find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)))
            .unwrap_or((text, 1.0));
        number(digits)
            .map(|count| count * unit)
            .filter(|seconds| *seconds <= MAX_SECONDS)
            .map(|seconds| Seconds(Duration::from_secs_f64(seconds)))
            .ok_or_else(|| format!("`{text}` is no time up to a day: write 10, 0.5 or 500ms"))
    }
}

/// I/Os a second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Rate(pub f64);

impl FromStr for Rate {
    type Err = String;
    fn from_str(text: &str) -> Result<Rate, String> {
        let (digits, unit) = match text.strip_suffix(['k', 'K']) {
            Some(digits) => (digits, 1e3),
            None => text
                .strip_suffix(['m', 'M'])
                .map_or((text, 1.0), |digits| (digits, 1e6)),
        };
        number(digits)
            .map(|rate| rate * unit)
            .filter(|rate| (1e-2..=1e9).contains(rate))
            .map(Rate)
            .ok_or_else(|| {
                format!("`{text}` is no rate: write I/Os a second, such as 20000 or 20k")
            })
    }
}

/// Digits and at most one point: `f64::from_str` would take `inf` and `1e9` as well.
fn number(digits: &str) -> Option<f64> {
    digits
        .bytes()
        .all(|byte| byte.is_ascii_digit() || byte == b'.')
        .then(|| digits.parse().ok())?
}

/// Shares of the most that a target does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadCurve {
    pub from: u8,
    pub to: u8,
}

impl LoadCurve {
    /// In steps of ten, and the last.
    pub fn percents(self) -> impl Iterator<Item = u8> {
        let steps = (self.from..self.to).step_by(10);
        steps.chain([self.to])
    }
}

impl FromStr for LoadCurve {
    type Err = String;
    fn from_str(text: &str) -> Result<LoadCurve, String> {
        let parse = || {
            let (from, to) = text.strip_suffix('%')?.split_once("..")?;
            let (from, to) = (from.parse().ok()?, to.parse().ok()?);
            (1 <= from && from <= to && to <= 150).then_some(LoadCurve { from, to })
        };
        parse().ok_or_else(|| {
            format!("`{text}` is no load curve: write two shares from 1 to 150 such as 10..95%")
        })
    }
}

impl fmt::Display for LoadCurve {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}%", self.from, self.to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_make_no_sense_are_refused_with_the_value() {
        for refused in ["", "0", "4,,8", "4,4", "1024", "a"] {
            let error = refused.parse::<Depths>().unwrap_err();
            assert!(error.contains(refused), "{error}");
        }
        for refused in ["", "1e3", "inf", "-1", "90000"] {
            assert!(refused.parse::<Seconds>().is_err(), "{refused}");
        }
        for refused in ["0", "100", "4097", "2M", "x"] {
            assert!(refused.parse::<Block>().is_err(), "{refused}");
        }
        for refused in ["10..95", "95..10%", "0..10%", "10..200%"] {
            assert!(refused.parse::<LoadCurve>().is_err(), "{refused}");
        }
    }

    #[test]
    fn values_in_fios_words_are_read() {
        assert_eq!("1,4,16".parse(), Ok(Depths(vec![1, 4, 16])));
        assert_eq!("4k".parse(), Ok(Block(4096)));
        assert_eq!("500ms".parse(), Ok(Seconds(Duration::from_millis(500))));
        assert_eq!("0.5".parse(), Ok(Seconds(Duration::from_millis(500))));
        assert_eq!("20k".parse(), Ok(Rate(20_000.0)));
        let curve: LoadCurve = "10..95%".parse().unwrap();
        let percents: Vec<u8> = curve.percents().collect();
        assert_eq!(percents, [10, 20, 30, 40, 50, 60, 70, 80, 90, 95]);
    }

    #[test]
    fn options_that_contradict_each_other_are_refused() {
        let flush = JobOptions {
            fsync: Some(4),
            ..JobOptions::default()
        };
        let error = flush.resolve("j").unwrap_err().to_string();
        assert!(
            error.contains("--fsync 4") && error.contains("randread"),
            "{error}"
        );
        let trim = JobOptions {
            rw: Some(Pattern::Trim),
            verify: Some(Verify),
            ..JobOptions::default()
        };
        assert!(trim.resolve("j").is_err());
    }

    #[test]
    fn option_that_is_written_goes_before_the_one_under_it() {
        let upper = JobOptions {
            bs: Some(Block(512)),
            ..JobOptions::default()
        };
        let under = JobOptions {
            bs: Some(Block(4096)),
            rw: Some(Pattern::Write),
            ..JobOptions::default()
        };
        let both = upper.over(&under);
        assert_eq!((both.bs, both.rw), (Some(Block(512)), Some(Pattern::Write)));
    }
}
