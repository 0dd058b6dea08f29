//! How long a word takes from one CPU to another and back: the floor under every round trip between two cores, and a
//! sign of where the host has moved them.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use super::stats::median;

const BATCH: u32 = 200;
const BATCHES: usize = 21;
/// A busy machine may leave one of the two without a CPU for long.
const DEADLINE: Duration = Duration::from_millis(300);

/// A cache line of its own.
#[derive(Default)]
#[repr(align(128))]
struct Word(AtomicU32);

/// The median round trip in nanoseconds between two CPUs. `None` when it took too long, or they are not ours to use.
#[must_use]
pub fn round_trip(cpus: (usize, usize)) -> Option<f64> {
    let (there, back, give_up) = (Word::default(), Word::default(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let pinned = core_affinity::set_for_current(core_affinity::CoreId { id: cpus.1 });
            let mut seen = 0;
            // Ends with the other side, which has a deadline (I8).
            while pinned && !give_up.load(Ordering::Relaxed) {
                let value = there.0.load(Ordering::Acquire);
                if value == seen {
                    std::hint::spin_loop();
                    continue;
                }
                seen = value;
                back.0.store(value, Ordering::Release);
            }
        });
        let pinging = scope.spawn(|| {
            let pinned = core_affinity::set_for_current(core_affinity::CoreId { id: cpus.0 });
            let result = pinned.then(|| ping(&there, &back)).flatten();
            give_up.store(true, Ordering::Relaxed);
            result
        });
        pinging.join().unwrap_or(None)
    })
}

fn ping(there: &Word, back: &Word) -> Option<f64> {
    let start = Instant::now();
    let mut value = 0;
    let mut batches = Vec::with_capacity(BATCHES);
    while batches.len() < BATCHES {
        let begin = Instant::now();
        for _ in 0..BATCH {
            value += 1;
            there.0.store(value, Ordering::Release);
            let mut spins = 0u32;
            while back.0.load(Ordering::Acquire) != value {
                std::hint::spin_loop();
                spins += 1;
                if spins.is_multiple_of(1024) && start.elapsed() > DEADLINE {
                    // What was seen so far is better than nothing.
                    return (batches.len() >= 3).then(|| median(&batches));
                }
            }
        }
        batches.push(begin.elapsed().as_nanos() as f64 / f64::from(BATCH));
    }
    Some(median(&batches))
}

/// Two CPUs that this process may use: that of the first job, if it was named, and another. `None` on a single one.
#[must_use]
pub fn two_cpus(first: Option<usize>) -> Option<(usize, usize)> {
    let cpus = core_affinity::get_core_ids().unwrap_or_default();
    let mut ids = cpus.iter().map(|core| core.id);
    let first = first.or_else(|| ids.clone().next())?;
    let second = ids.find(|id| *id != first)?;
    Some((first, second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_between_two_cpus_takes_time_and_ends() {
        let Some(cpus) = two_cpus(None) else { return };
        assert_ne!(cpus.0, cpus.1);
        let start = Instant::now();
        if let Some(nanos) = round_trip(cpus) {
            assert!(nanos > 1.0, "{nanos}");
        }
        assert!(start.elapsed() < Duration::from_secs(5));
    }
}
