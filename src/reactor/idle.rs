//! When a reactor that may sleep does: how long it goes on looking after a turn that found nothing.
//!
//! ```text
//!  a turn that found something --> look again: twice the device's time with commands there, else a little
//!                              --> look now and then, the core waiting in between
//!                              --> sleep
//! ```
//! A pure function of times that it is told.

use std::time::Duration;

/// Looking goes on at full speed for so long at least: about what a sleep costs that ends at once.
const LOOK: Duration = Duration::from_micros(50);
/// And for so long at most: a device that takes half of it is not worth a core.
const LOOK_MOST: Duration = Duration::from_millis(5);
/// Then now and then for so long.
const RELAX: Duration = Duration::from_micros(200);
const SHORTEST_PAUSE: Duration = Duration::from_micros(1);
const LONGEST_PAUSE: Duration = Duration::from_micros(16);
/// What a device is taken to need before it has shown: an SSD's read.
const FIRST_GUESS: Duration = Duration::from_micros(100);
/// Each measurement counts for an eighth.
const WEIGHT: u32 = 8;
/// And as this many times what was expected at most.
const OUTLIER: u32 = 4;

/// What comes after a turn that found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The next turn.
    Look,
    /// The next turn, after a pause.
    Relax(Duration),
    /// No turn before something happens.
    Sleep,
}

/// How long nothing has been found, and how long the device is expected to take.
#[derive(Debug)]
pub(super) struct Idle {
    expected: Duration,
    /// Of the first turn in a row that found nothing.
    since: Option<Duration>,
    /// The next pause.
    pause: Duration,
    /// The last sleep ended without anything.
    drowsy: bool,
}

impl Idle {
    pub(super) fn new() -> Idle {
        Idle {
            expected: FIRST_GUESS,
            since: None,
            pause: SHORTEST_PAUSE,
            drowsy: false,
        }
    }

    /// How long a command is expected to take.
    pub(super) fn expected(&self) -> Duration {
        self.expected
    }

    /// A command has taken so long.
    pub(super) fn learn(&mut self, took: Duration) {
        // One that took far longer says little of the next: it hung, or this core was taken away meanwhile.
        let took = took.min(LOOK_MOST).min(self.expected * OUTLIER);
        self.expected = (self.expected * (WEIGHT - 1) + took) / WEIGHT;
    }

    /// Something was found.
    #[inline]
    pub(super) fn busy(&mut self) {
        (self.since, self.drowsy) = (None, false);
    }

    /// A sleep is over. Without anything that ended it the next one follows the next turn that finds nothing.
    pub(super) fn slept(&mut self, woken: bool) {
        (self.since, self.drowsy) = (None, !woken);
    }

    /// A turn at `now` found nothing; `waits`: commands are at the device.
    pub(super) fn next(&mut self, now: Duration, waits: bool) -> Step {
        if self.drowsy {
            return Step::Sleep;
        }
        let since = *self.since.get_or_insert_with(|| {
            self.pause = SHORTEST_PAUSE;
            now
        });
        let idle = now.saturating_sub(since);
        let look = match waits {
            true => (self.expected * 2).clamp(LOOK, LOOK_MOST),
            false => LOOK,
        };
        if idle < look {
            return Step::Look;
        }
        if idle >= look + RELAX {
            return Step::Sleep;
        }
        let pause = self.pause;
        self.pause = (pause * 2).min(LONGEST_PAUSE);
        Step::Relax(pause)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn us(micros: u64) -> Duration {
        Duration::from_micros(micros)
    }

    /// When an idle reactor that looks every microsecond goes over to pauses, and to sleep.
    fn stretch(idle: &mut Idle, waits: bool) -> (u64, u64) {
        let steps: Vec<Step> = (0..20_000)
            .map(|at| idle.next(us(1_000_000 + at), waits))
            .collect();
        let first = |wanted: fn(&Step) -> bool| steps.iter().position(wanted).unwrap() as u64;
        let relaxes = first(|step| matches!(step, Step::Relax(_)));
        (relaxes, first(|step| *step == Step::Sleep))
    }

    #[test]
    fn next_with_commands_at_the_device_looks_for_twice_their_time() {
        let mut idle = Idle::new();
        for _ in 0..100 {
            idle.learn(us(300));
        }
        assert!((us(295)..=us(300)).contains(&idle.expected()), "{idle:?}");
        let (relaxes, sleeps) = stretch(&mut idle, true);
        assert!((590..=600).contains(&relaxes), "{relaxes}");
        assert_eq!(sleeps, relaxes + 200);
    }

    #[test]
    fn next_without_commands_looks_a_little_whatever_the_device_takes() {
        let mut idle = Idle::new();
        idle.learn(us(4000));
        assert_eq!(stretch(&mut idle, false), (50, 250));
        idle.busy();
        assert_eq!(stretch(&mut idle, false), (50, 250));
    }

    #[test]
    fn learn_from_one_long_command_in_ten_stays_near_the_others() {
        let mut idle = Idle::new();
        for at in 0..100 {
            idle.learn(if at % 10 == 0 { us(100_000) } else { us(20) });
        }
        assert!(idle.expected() < us(40), "{idle:?}");
    }

    #[test]
    fn next_on_a_device_that_hangs_sleeps_all_the_same() {
        let mut idle = Idle::new();
        for _ in 0..100 {
            idle.learn(Duration::from_secs(1000));
        }
        assert_eq!(stretch(&mut idle, true), (5000, 5200));
    }

    #[test]
    fn next_after_a_sleep_that_nothing_ended_sleeps_on_and_after_another_looks() {
        let mut idle = Idle::new();
        idle.slept(false);
        assert_eq!(idle.next(us(1), false), Step::Sleep);
        idle.slept(true);
        assert_eq!(idle.next(us(2), false), Step::Look);
        idle.slept(false);
        idle.busy();
        assert_eq!(idle.next(us(3), false), Step::Look);
    }

    #[test]
    fn pauses_grow_up_to_a_limit() {
        let mut idle = Idle::new();
        idle.next(us(0), false);
        let pauses: Vec<Step> = (60..66).map(|at| idle.next(us(at), false)).collect();
        let expected = [1, 2, 4, 8, 16, 16].map(|pause| Step::Relax(us(pause)));
        assert_eq!(pauses, expected);
    }
}
