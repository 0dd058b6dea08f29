//! One thread that keeps one queue busy and takes the time.
//!
//! ```text
//!  round:  poll -> clock -> send while there is a place (closed loop)
//!                           or an arrival is due (open loop) -> doorbell -> clock -> record what came back
//! ```
//! What came back is recorded while the target is busy with what was sent for it: the target does not wait for that.
//! The clock is read once a poll and once more after something was sent, never once an I/O. A latency ends when the poll
//! that found its completion has returned; it begins when its place was free (closed loop) or when it was due (open
//! loop, whether or not a place was free: no coordinated omission). So it is never too short, and too long by a poll.
//!
//! Nothing allocates while it is measured. Start at [`drive`].

use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::args::Job;
use super::io::{Io, Op, Random, Region, Workload};
use super::stats::{Counters, Outcome, Usage, whole};

/// No I/O takes longer: then something is broken.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// A poll that comes this much after the one before is late: a loop that is not interrupted takes a fraction of it.
pub const LATE: u64 = 20_000;
/// Looks at a ring between two readings of the clock, when nothing but an answer is waited for. A look is a load from
/// this core's cache until the server writes there; a reading of the clock costs as much as dozens of them.
pub const SPINS: u32 = 64;
/// How often the live figures are renewed.
const LIVE_EVERY: u64 = 200_000_000;

/// An I/O that came back.
#[derive(Clone, Copy, Debug)]
pub struct Done {
    pub slot: u32,
    /// What the target said of it when it failed.
    pub failure: Option<u16>,
}

/// One queue of a target, owned by the thread that drives it. Slots, each with a buffer of its own, are numbered from 0.
pub trait Queue: Send {
    /// Puts an I/O in; the target sees it after [`Queue::commit`].
    ///
    /// # Errors
    /// When the queue is full or the I/O is impossible, which no caller lets happen.
    fn submit(&mut self, slot: u32, io: Io) -> anyhow::Result<()>;

    /// Shows the target what was submitted.
    ///
    /// # Errors
    /// When the target is gone.
    fn commit(&mut self) -> anyhow::Result<()>;

    /// Appends what came back.
    ///
    /// # Errors
    /// When the target is gone or broke its rules.
    fn poll(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()>;

    /// As [`Queue::poll`], when there is nothing else to do: may look more than once.
    ///
    /// # Errors
    /// As there.
    fn spin(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        self.poll(done)
    }

    /// Sleeps until something comes back or `timeout` is over. A queue that only polls returns at once, with false.
    ///
    /// # Errors
    /// When the target is gone.
    fn sleep(&mut self, _timeout: Duration) -> anyhow::Result<bool> {
        Ok(false)
    }

    /// What a [`Done::failure`] means.
    fn explain(&self, status: u16) -> String {
        format!("status {status:#x}")
    }

    /// Puts the data of a write into a slot's buffer.
    fn write_data(&mut self, slot: u32, bytes: &[u8]);

    /// Fetches the data of a read.
    fn read_data(&self, slot: u32, bytes: &mut [u8]);

    fn counters(&self) -> Counters;
}

/// One measurement: what every queue of the target does.
#[derive(Clone, Copy, Debug)]
pub struct Shot<'a> {
    pub job: &'a Job,
    pub depth: u32,
    /// Open loop: arrivals a second and queue.
    pub rate: Option<f64>,
    pub region: Region,
    /// Ctrl-C: what was measured so far is the result.
    pub interrupted: &'a AtomicBool,
}

/// What is seen from outside while it runs.
#[derive(Debug, Default)]
pub struct Live {
    pub ios: AtomicU64,
    /// Of the last moment, in nanoseconds.
    pub p99: AtomicU64,
    /// Someone looks at it.
    pub watched: AtomicBool,
    /// Another queue failed.
    pub stop: AtomicBool,
}

#[derive(Clone, Copy)]
struct Slot {
    io: Io,
    intended: u64,
    handed: u64,
}

/// What is recorded of an I/O once its place is another's.
#[derive(Clone, Copy)]
struct Returned {
    op: Op,
    len: u32,
    intended: u64,
    handed: u64,
}

/// Four bins to a power of two, for the live figure only.
struct Recent {
    bins: [u32; 256],
    count: u32,
}

impl Recent {
    #[inline]
    fn record(&mut self, nanos: u64) {
        let nanos = nanos.max(4);
        let log = nanos.ilog2();
        let bin = u64::from(log * 4) + (nanos >> (log - 2) & 3);
        self.bins[usize::try_from(bin).unwrap_or(0) & 255] += 1;
        self.count += 1;
    }

    fn p99(&mut self) -> u64 {
        let mut left = self.count / 100;
        let bin = self.bins.iter().rposition(|count| {
            let reached = *count > left;
            left = left.saturating_sub(*count);
            reached
        });
        *self = Recent::default();
        bin.map_or(0, |bin| (4 + bin as u64 % 4) << (bin / 4).saturating_sub(2))
    }
}

impl Default for Recent {
    fn default() -> Recent {
        Recent {
            bins: [0; 256],
            count: 0,
        }
    }
}

/// When I/Os are due, if that does not depend on completions.
struct Arrivals {
    rate: f64,
    random: Random,
    next: f64,
}

impl Arrivals {
    fn advance(&mut self) {
        self.next += self.random.gap(self.rate);
    }
}

struct Drive<'a, Q> {
    queue: &'a mut Q,
    work: Workload,
    arrivals: Option<Arrivals>,
    epoch: Instant,
    slots: Vec<Slot>,
    free: Vec<u32>,
    sent: Vec<u32>,
    done: Vec<Done>,
    returned: Vec<Returned>,
    in_flight: u32,
    out: Outcome,
    measuring: bool,
    watched: bool,
    recent: Recent,
    live: &'a Live,
}

/// Drives queue `index` through one measurement. All queues begin together.
///
/// # Errors
/// When an I/O fails, does not come back, or is not what --verify expects.
pub fn drive<Q: Queue>(
    queue: &mut Q,
    shot: &Shot<'_>,
    index: usize,
    start: &Barrier,
    live: &Live,
) -> anyhow::Result<Outcome> {
    let depth = shot.depth as usize;
    let nothing = Slot {
        io: Io {
            op: Op::Flush,
            offset: 0,
            len: 0,
        },
        intended: 0,
        handed: 0,
    };
    let region = if shot.job.verify {
        share(shot.region, shot.job.bs, index, shot.job.numjobs)
    } else {
        shot.region
    };
    let pinned = pin(shot.job, index);
    let mut drive = Drive {
        queue,
        work: Workload::new(shot.job, region, index),
        arrivals: shot.rate.map(|rate| Arrivals {
            rate,
            random: Random::new(shot.job.seed ^ (index as u64 + 1) << 32),
            next: 0.0,
        }),
        epoch: Instant::now(),
        slots: vec![nothing; depth],
        free: (0..shot.depth).rev().collect(),
        sent: Vec::with_capacity(depth),
        done: Vec::with_capacity(depth),
        returned: Vec::with_capacity(depth),
        in_flight: 0,
        out: Outcome::default(),
        measuring: false,
        watched: live.watched.load(Ordering::Relaxed),
        recent: Recent::default(),
        live,
    };
    // Whatever fails, the others wait at the barrier.
    start.wait();
    let result = pinned.and_then(|()| {
        drive.run(shot)?;
        drive.drain()?;
        match shot.interrupted.load(Ordering::Relaxed) {
            true => Ok(()),
            false => drive.read_back(),
        }
    });
    if result.is_err() {
        live.stop.store(true, Ordering::Relaxed);
        // Buffers must not be reused while the target may still write to them.
        let _ = drive.drain();
    }
    result.map(|()| drive.out)
}

/// With --verify no two queues may write one place.
fn share(region: Region, bs: u32, index: usize, jobs: u32) -> Region {
    let places = (region.places / u64::from(jobs.max(1))).max(1);
    Region {
        base: region.base + index as u64 * places * u64::from(bs),
        places,
    }
}

fn pin(job: &Job, index: usize) -> anyhow::Result<()> {
    let Some(cpus) = &job.cpus else {
        return Ok(());
    };
    let cpus = cpus.as_slice();
    let cpu = cpus[index % cpus.len()].0;
    if !core_affinity::set_for_current(core_affinity::CoreId { id: cpu }) {
        bail!(
            "cannot move to CPU {cpu}, which --cpus_allowed names: it is offline or not ours to use"
        );
    }
    Ok(())
}

impl<Q: Queue> Drive<'_, Q> {
    #[inline]
    fn now(&self) -> u64 {
        // Centuries fit 64 bits of nanoseconds.
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    fn run(&mut self, shot: &Shot<'_>) -> anyhow::Result<()> {
        let nanos = |duration: Duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4);
        self.epoch = Instant::now();
        let begin = nanos(shot.job.ramp_time);
        let end = begin + nanos(shot.job.runtime);
        let deadline = nanos(DEADLINE);
        let mut usage = Usage::default();
        let mut counters = Counters::default();
        let (mut last, mut measured_from, mut last_completion, mut next_live) = (0, 0, 0, 0);
        if let Some(arrivals) = &mut self.arrivals {
            arrivals.advance();
        }
        loop {
            self.done.clear();
            if self.arrivals.is_none() && self.free.is_empty() {
                self.queue.spin(&mut self.done)?;
            } else {
                self.queue.poll(&mut self.done)?;
            }
            let now = self.now();
            let gap = now - last;
            let found = self.done.len() as u64;
            self.out.polls += 1;
            self.out.longest_gap = self.out.longest_gap.max(gap);
            if gap > LATE {
                self.out.late_polls += 1;
                self.out.found_late += found;
            }
            if found == 0 {
                self.out.idle_polls += 1;
                if self.in_flight > 0 && now - last_completion > deadline {
                    bail!(
                        "no I/O has come back for {DEADLINE:?}, {} are in flight",
                        self.in_flight
                    );
                }
            } else {
                last_completion = now;
                self.collect()?;
            }
            if now >= end || self.live.stop.load(Ordering::Relaxed) {
                self.record(now);
                self.finish(now, measured_from);
                self.out.usage = Usage::of_this_thread().since(usage);
                self.out.counters = self.queue.counters().since(counters);
                return Ok(());
            }
            if !self.measuring && now >= begin {
                self.record(now);
                self.measuring = true;
                self.out = Outcome::default();
                measured_from = now;
                counters = self.queue.counters();
                usage = Usage::of_this_thread();
            }
            if self.watched && now >= next_live {
                next_live = now + LIVE_EVERY;
                self.live.p99.store(self.recent.p99(), Ordering::Relaxed);
            }
            last = now;
            if self.send(now)? {
                if self.in_flight == 0 || found == 0 {
                    last_completion = last_completion.max(now);
                }
                last = self.hand_over()?;
            } else if found == 0 {
                let until = self
                    .arrivals
                    .as_ref()
                    .map_or(end, |arrivals| whole(arrivals.next));
                let room = until.min(end).saturating_sub(now);
                if room > 0 && self.in_flight > 0 && self.queue.sleep(Duration::from_nanos(room))? {
                    last = self.now();
                }
            }
            self.record(now);
        }
    }

    /// Takes what came back. All of it, even if something of it failed: nothing that has come back is in flight.
    #[inline]
    fn collect(&mut self) -> anyhow::Result<()> {
        let mut result = Ok(());
        for index in 0..self.done.len() {
            let done = self.done[index];
            self.free.push(done.slot);
            self.in_flight -= 1;
            let taken = self.take(done);
            result = result.and(taken);
        }
        result
    }

    #[inline]
    fn take(&mut self, Done { slot, failure }: Done) -> anyhow::Result<()> {
        let Slot {
            io,
            intended,
            handed,
        } = self.slots[slot as usize];
        if let Some(status) = failure {
            bail!(
                "a {} of {} bytes at offset {} failed: {}",
                io.op.name(),
                io.len,
                io.offset,
                self.queue.explain(status)
            );
        }
        if let Some(verifier) = &mut self.work.verifier {
            let queue = &self.queue;
            verifier.finish(io, |bytes| queue.read_data(slot, bytes))?;
        }
        if self.measuring || self.watched {
            self.returned.push(Returned {
                op: io.op,
                len: io.len,
                intended,
                handed,
            });
        }
        Ok(())
    }

    /// Records what came back at `now`.
    #[inline]
    fn record(&mut self, now: u64) {
        if self.returned.is_empty() {
            return;
        }
        for returned in self.returned.drain(..) {
            let latency = now.saturating_sub(returned.intended);
            if self.measuring {
                let stats = self.out.op_mut(returned.op);
                stats.lat.record(latency);
                stats.clat.record(now.saturating_sub(returned.handed));
                stats.bytes += u64::from(returned.len);
            }
            if self.watched {
                self.recent.record(latency);
                self.live.ios.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    /// Sends what may be sent now.
    #[inline]
    fn send(&mut self, now: u64) -> anyhow::Result<bool> {
        while let Some(&slot) = self.free.last() {
            let intended = match &self.arrivals {
                Some(arrivals) if arrivals.next > now as f64 => break,
                Some(arrivals) => whole(arrivals.next),
                None => now,
            };
            let Some(io) = self.work.next() else { break };
            if let Some(arrivals) = &mut self.arrivals {
                arrivals.advance();
            }
            self.submit(slot, io, intended)?;
        }
        Ok(!self.sent.is_empty())
    }

    #[inline]
    fn submit(&mut self, slot: u32, io: Io, intended: u64) -> anyhow::Result<()> {
        if let Some(verifier) = &mut self.work.verifier
            && let Some(data) = verifier.prepare(io)
        {
            self.queue.write_data(slot, data);
        }
        self.queue.submit(slot, io)?;
        self.free.pop();
        self.in_flight += 1;
        self.slots[slot as usize] = Slot {
            io,
            intended,
            handed: intended,
        };
        self.sent.push(slot);
        Ok(())
    }

    /// Rings for what was sent: when that was done.
    #[inline]
    fn hand_over(&mut self) -> anyhow::Result<u64> {
        self.queue.commit()?;
        let handed = self.now();
        for slot in self.sent.drain(..) {
            let slot = &mut self.slots[slot as usize];
            slot.handed = handed;
            if self.measuring {
                let stats = self.out.op_mut(slot.io.op);
                stats.slat.record(handed.saturating_sub(slot.intended));
            }
        }
        Ok(handed)
    }

    fn finish(&mut self, now: u64, measured_from: u64) {
        self.measuring = false;
        self.out.elapsed = now - measured_from;
        self.out.unfinished = self.in_flight.into();
        let slots = self.slots.iter().enumerate();
        let oldest = slots
            .filter(|(slot, _)| !self.free.iter().any(|free| *free as usize == *slot))
            .map(|(_, slot)| slot.intended)
            .min();
        self.out.unfinished_age = oldest.map_or(0, |oldest| now.saturating_sub(oldest));
        if let Some(arrivals) = &mut self.arrivals {
            let waited = (now as f64 - arrivals.next).max(0.0);
            self.out.backlog_age = whole(waited);
            // On average: the rest was not drawn.
            self.out.backlog = whole(waited * arrivals.rate / 1e9);
        }
    }

    /// Waits for what is in flight; it is not measured.
    fn drain(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        while self.in_flight > 0 {
            self.poll_once(start)?;
        }
        Ok(())
    }

    fn poll_once(&mut self, start: Instant) -> anyhow::Result<()> {
        self.done.clear();
        self.queue.poll(&mut self.done)?;
        if self.done.is_empty() {
            if start.elapsed() > DEADLINE {
                bail!(
                    "{} I/Os in flight do not end within {DEADLINE:?}",
                    self.in_flight
                );
            }
            self.queue.sleep(Duration::from_millis(100))?;
        }
        self.collect()?;
        self.record(self.now());
        Ok(())
    }

    /// Reads all that was written, to be checked.
    fn read_back(&mut self) -> anyhow::Result<()> {
        let Some(verifier) = &self.work.verifier else {
            return Ok(());
        };
        for io in verifier.written() {
            let start = Instant::now();
            while self.free.is_empty() {
                self.poll_once(start)?;
            }
            let slot = self.free.last().copied().context("a free slot")?;
            let now = self.now();
            self.submit(slot, io, now)?;
            self.hand_over()?;
        }
        self.drain()?;
        self.out.verified = self
            .work
            .verifier
            .as_ref()
            .map_or(0, |verifier| verifier.checked);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_p99_is_within_a_quarter_of_the_true_one() {
        let mut recent = Recent::default();
        for nanos in 1..=10_000 {
            recent.record(nanos);
        }
        let p99 = recent.p99();
        assert!((7_000..=12_500).contains(&p99), "{p99}");
        assert_eq!(recent.p99(), 0);
    }
}
