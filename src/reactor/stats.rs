//! What a reactor did beside its turns: how it slept, what woke it, the time that it took from its core.

use std::fmt;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use super::wake::Woken;

macro_rules! counters {
    ($($(#[$doc:meta])+ $name:ident,)+) => {
        /// The counters of one reactor that others read. It alone writes them.
        #[derive(Debug)]
        pub struct ReactorStats {
            $($name: AtomicU64,)+
            adaptive: bool,
            deaf: AtomicBool,
            started: Instant,
            clock: OnceLock<libc::clockid_t>,
            /// Once it has ended: CPU time and lifetime.
            ended: OnceLock<[Duration; 2]>,
        }

        impl ReactorStats {
            pub(super) fn new(adaptive: bool) -> ReactorStats {
                ReactorStats {
                    $($name: AtomicU64::new(0),)+
                    adaptive,
                    deaf: AtomicBool::new(false),
                    started: Instant::now(),
                    clock: OnceLock::new(),
                    ended: OnceLock::new(),
                }
            }

            $($(#[$doc])+
            #[must_use]
            pub fn $name(&self) -> u64 {
                self.$name.load(Relaxed)
            })+
        }
    };
}

counters! {
    /// Sleeps.
    sleeps,
    /// Times when it was about to sleep and found something to do.
    cut_short,
    /// Sleeps that guests' kicks ended.
    kicks,
    /// Sleeps that interrupts of devices ended.
    interrupts,
    /// Sleeps that messages ended.
    messages,
    /// Sleeps whose time was up.
    timeouts,
    /// How long the device is expected to take, in nanoseconds.
    expected_nanos,
}

impl ReactorStats {
    pub(super) fn count_sleep(&self, woken: Option<Woken>, expected: Duration) {
        let add = |counter: &AtomicU64, count: bool| {
            counter.store(counter.load(Relaxed) + u64::from(count), Relaxed);
        };
        match woken {
            None => add(&self.cut_short, true),
            Some(woken) => {
                add(&self.sleeps, true);
                add(&self.kicks, woken.kick);
                add(&self.interrupts, woken.interrupt);
                add(&self.messages, woken.message);
                add(&self.timeouts, !woken.any());
            }
        }
        let nanos = u64::try_from(expected.as_nanos()).unwrap_or(u64::MAX);
        self.expected_nanos.store(nanos, Relaxed);
    }

    /// The kernel refused to watch a file: it sleeps for moments only.
    pub(super) fn set_deaf(&self) {
        self.deaf.store(true, Relaxed);
    }

    pub(super) fn is_deaf(&self) -> bool {
        self.deaf.load(Relaxed)
    }

    /// The calling thread is the reactor.
    pub(super) fn begin(&self) {
        let mut clock = 0;
        // SAFETY: the calling thread exists, and `clock` is ours to write to.
        if unsafe { libc::pthread_getcpuclockid(libc::pthread_self(), &raw mut clock) } == 0 {
            self.clock.get_or_init(|| clock);
        }
    }

    /// The calling thread, which is the reactor, ends.
    pub(super) fn end(&self) {
        let times = self.times();
        self.ended.get_or_init(|| times);
    }

    /// CPU time so far, and for how long it has been there.
    #[must_use]
    pub fn times(&self) -> [Duration; 2] {
        if let Some(times) = self.ended.get() {
            return *times;
        }
        let mut cpu = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        if let Some(clock) = self.clock.get() {
            // SAFETY: `cpu` is ours to write to. The clock of a thread that has ended is an error, and `cpu` stays 0.
            unsafe { libc::clock_gettime(*clock, &raw mut cpu) };
        }
        let [seconds, nanos] =
            [cpu.tv_sec, cpu.tv_nsec].map(|part| u64::try_from(part).unwrap_or(0));
        let cpu = Duration::from_secs(seconds) + Duration::from_nanos(nanos);
        [cpu, self.started.elapsed()]
    }
}

/// One line for the server's report, without an end.
impl fmt::Display for ReactorStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [cpu, lifetime] = self.times();
        let share = 100.0 * cpu.as_secs_f64() / lifetime.as_secs_f64().max(1e-9);
        let (cpu, lifetime) = (cpu.as_secs_f64(), lifetime.as_secs_f64());
        write!(f, "CPU {cpu:.2} s of {lifetime:.2} s ({share:.1}%)")?;
        if !self.adaptive {
            return Ok(());
        }
        write!(
            f,
            ", sleeps {}, cut short {}, woken by kick {}, interrupt {}, message {}, time-out {}; device time {} us",
            self.sleeps(),
            self.cut_short(),
            self.kicks(),
            self.interrupts(),
            self.messages(),
            self.timeouts(),
            self.expected_nanos() / 1000
        )?;
        if self.is_deaf() {
            write!(f, "; cannot watch all files, sleeps are of a millisecond")?;
        }
        Ok(())
    }
}
