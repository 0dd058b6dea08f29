//! Something that is measured: queues of one kind, opened once and driven as often as there are rounds.

use std::fs;
use std::sync::Barrier;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::anyhow;

use super::args::RingKind;
use super::engine::{Live, Queue, Shot, drive};
use super::stages::{self, StageSource};
use super::stats::{Outcome, Usage, schedule};
use crate::stats::StageCounts;

/// What all measurements together need of a target.
#[derive(Clone, Copy, Debug)]
pub struct Needs {
    /// One for each job.
    pub queues: u32,
    pub depth: u32,
    /// The largest block.
    pub bs: u32,
    pub writes: bool,
    pub flushes: bool,
    pub trims: bool,
    /// What is read is compared with what was written.
    pub verify: bool,
    /// Bytes up to the end of the work, if that was said.
    pub reach: Option<u64>,
}

/// What was found.
#[derive(Clone, Debug)]
pub struct Info {
    pub name: String,
    /// What it is, and what it granted.
    pub description: String,
    /// Bytes.
    pub capacity: u64,
    /// I/Os are multiples of this many bytes.
    pub block: u32,
    /// The process behind it, if it is on this machine and not ours.
    pub server: Option<u32>,
    /// The layout of its virtqueues, if it has any.
    pub ring: Option<RingKind>,
    /// Where its server tells of the ways of requests, if it does.
    pub stages: Option<StageSource>,
    /// What [`super::stats::Counters::doorbells`] counts.
    pub doorbells: &'static str,
}

/// The queues of one target, of whatever kind.
pub trait Target {
    fn info(&self) -> &Info;

    /// One measurement; the calling thread watches.
    ///
    /// # Errors
    /// When an I/O fails.
    fn measure(
        &mut self,
        shot: &Shot<'_>,
        watch: &mut dyn FnMut(Duration, &Live),
    ) -> anyhow::Result<Measured>;

    /// Gives it back.
    ///
    /// # Errors
    /// When it is not known to have ended well.
    fn close(self: Box<Self>) -> anyhow::Result<()>;
}

/// One measurement of one target.
#[derive(Clone, Debug, Default)]
pub struct Measured {
    pub queues: Vec<Outcome>,
    /// CPU time and switches of the server meanwhile.
    pub server: Option<Usage>,
    /// By virtqueue, where the server's sampled requests spent their time; empty where it does not tell.
    pub stages: Vec<StageCounts>,
    /// Time that the hypervisor took from our CPUs meanwhile, in nanoseconds.
    pub steal: u64,
}

impl Measured {
    /// All queues.
    #[must_use]
    pub fn total(&self) -> Outcome {
        let mut queues = self.queues.iter();
        let mut total = queues.next().cloned().unwrap_or_default();
        queues.for_each(|queue| total.add_beside(queue));
        total
    }
}

/// Queues, and what must outlive them.
pub struct Pool<Q, K> {
    pub info: Info,
    pub queues: Vec<Q>,
    pub keeper: K,
}

/// What a target's queues came from.
pub trait Keeper<Q> {
    /// Takes the queues back.
    ///
    /// # Errors
    /// When the end is not known to be clean.
    fn close(self, queues: Vec<Q>) -> anyhow::Result<()>;
}

impl<Q: Queue, K: Keeper<Q>> Target for Pool<Q, K> {
    fn info(&self) -> &Info {
        &self.info
    }

    fn measure(
        &mut self,
        shot: &Shot<'_>,
        watch: &mut dyn FnMut(Duration, &Live),
    ) -> anyhow::Result<Measured> {
        let live = Live::default();
        watch(Duration::ZERO, &live);
        let jobs = shot.job.numjobs as usize;
        let server = self.info.server;
        let barrier = Barrier::new(jobs + 1);
        let source = self.info.stages.as_ref();
        let tells = || {
            source
                .map(StageSource::read)
                .transpose()
                .map(Option::unwrap_or_default)
        };
        let look = || (server.and_then(server_usage), steal(), tells());
        let (results, before, after) = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .queues
                .iter_mut()
                .take(jobs)
                .enumerate()
                .map(|(index, queue)| {
                    let (barrier, live) = (&barrier, &live);
                    scope.spawn(move || drive(queue, shot, index, barrier, live))
                })
                .collect();
            barrier.wait();
            let start = Instant::now();
            let (ramp, end) = (shot.job.ramp_time, shot.job.ramp_time + shot.job.runtime);
            watch_until(ramp, start, shot, &live, watch);
            let before = look();
            watch_until(end, start, shot, &live, watch);
            let after = look();
            let results: Vec<_> = threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(anyhow!("it panicked")))
                })
                .collect();
            (results, before, after)
        });
        let named = |error: anyhow::Error| error.context(self.info.name.clone());
        let queues = results
            .into_iter()
            .collect::<anyhow::Result<_>>()
            .map_err(named)?;
        let mut told = stages::since(after.2?, &before.2?);
        told.truncate(jobs);
        Ok(Measured {
            queues,
            stages: told,
            server: after
                .0
                .zip(before.0)
                .map(|(after, before)| after.since(before)),
            steal: after.1.saturating_sub(before.1),
        })
    }

    fn close(self: Box<Self>) -> anyhow::Result<()> {
        let Pool {
            info,
            queues,
            keeper,
        } = *self;
        keeper
            .close(queues)
            .map_err(|error| error.context(info.name))
    }
}

/// Looks in now and then, and leaves early when a queue failed or the user has seen enough.
fn watch_until(
    end: Duration,
    start: Instant,
    shot: &Shot<'_>,
    live: &Live,
    watch: &mut dyn FnMut(Duration, &Live),
) {
    const STEP: Duration = Duration::from_millis(100);
    loop {
        if shot.interrupted.load(Ordering::Relaxed) {
            live.stop.store(true, Ordering::Relaxed);
        }
        let elapsed = start.elapsed();
        let left = end.saturating_sub(elapsed);
        if left.is_zero() || live.stop.load(Ordering::Relaxed) {
            return;
        }
        watch(elapsed, live);
        std::thread::sleep(left.min(STEP));
    }
}

/// USER_HZ, which every Linux on every machine that we run on has at 100.
const TICK: u64 = 10_000_000;

/// CPU time and context switches of all threads of a process so far.
fn server_usage(pid: u32) -> Option<Usage> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut usage = cpu_of_stat(&stat)?;
    let mut exact = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task")).ok()?.flatten() {
        let status = fs::read_to_string(task.path().join("status")).unwrap_or_default();
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name));
            line.and_then(|value| value.trim().parse().ok())
                .unwrap_or(0)
        };
        let [time, waited] = schedule(&task.path().join("schedstat"));
        exact += time;
        usage.waited += waited;
        usage.voluntary_switches += field("voluntary_ctxt_switches:");
        usage.involuntary_switches += field("nonvoluntary_ctxt_switches:");
    }
    // Ticks are coarse for a short measurement; how they divide is all that they are needed for where there is better.
    if exact > 0 {
        usage.system = usage.system.min(exact);
        usage.user = exact - usage.system;
    }
    Some(usage)
}

/// proc_pid_stat(5): utime is the 14th field and stime the 15th; the second, in parentheses, may contain anything.
fn cpu_of_stat(stat: &str) -> Option<Usage> {
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest
        .split(' ')
        .skip(11)
        .map(|field| field.parse::<u64>().ok());
    Some(Usage {
        user: fields.next()?? * TICK,
        system: fields.next()?? * TICK,
        ..Usage::default()
    })
}

/// proc_stat(5): the eighth number of the first line, of all CPUs.
fn steal() -> u64 {
    let stat = fs::read_to_string("/proc/stat").unwrap_or_default();
    let first = stat.lines().next().unwrap_or_default();
    let steal = first.split_whitespace().nth(8);
    steal
        .and_then(|ticks| ticks.parse::<u64>().ok())
        .unwrap_or(0)
        * TICK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpu_time_is_found_behind_any_name() {
        let stat = "42 (a ) b (c) R 1 42 42 0 -1 4194304 100 0 0 0 250 70 0 0 20 0 3 0 5 6 7";
        let usage = cpu_of_stat(stat).unwrap();
        assert_eq!((usage.user, usage.system), (2_500_000_000, 700_000_000));
        assert!(cpu_of_stat("42 (a").is_none());
    }

    #[test]
    fn own_process_has_used_cpu_time_or_will() {
        let before = server_usage(std::process::id()).unwrap();
        let start = Instant::now();
        let used = loop {
            let used = server_usage(std::process::id()).unwrap().since(before);
            // Others may have the CPU for long.
            if used.cpu() >= TICK || start.elapsed() > Duration::from_secs(30) {
                break used;
            }
        };
        assert!(used.cpu() >= TICK, "{used:?}");
    }
}
