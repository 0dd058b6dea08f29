//! Sleepers and those who wake them, under loom: a wake-up that gets lost shows as a wait without an end.
//! `scripts/loom-rings` runs them, and expects each canary to make them fail.

use super::Attention;
use loom::sync::atomic::{AtomicU32, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// Looks after which the sleeper is stuck: each lets it go on until it waits itself.
const MAX_IDLE: u32 = 100;

/// A mailbox that counts its messages, and the eventfd beside it.
#[derive(Default)]
struct Mailbox {
    messages: AtomicU32,
    seen: AtomicU32,
    attention: Attention,
    eventfd: Mutex<u32>,
    woken: Condvar,
}

impl Mailbox {
    fn send(&self) {
        // Relaxed: what orders it against `asleep` are the fences.
        self.messages.fetch_add(1, Relaxed);
        if self.attention.is_wanted() {
            *self.eventfd.lock().unwrap() += 1;
            self.woken.notify_one();
        }
    }

    /// Until `count` messages have arrived, asleep whenever there is no new one.
    fn receive(&self, count: u32) {
        let mut seen = 0;
        while seen < count {
            let new = || self.messages.load(Relaxed) != seen;
            self.attention.doze(new, || {
                let mut counter = self.eventfd.lock().unwrap();
                while *counter == 0 {
                    counter = self.woken.wait(counter).unwrap();
                }
                *counter = 0;
            });
            seen = self.messages.load(Relaxed);
            self.seen.store(seen, Relaxed);
        }
    }

    /// A sender that looks whether all messages are seen.
    fn see(&self, count: u32) {
        let mut idle = 0;
        while self.seen.load(Relaxed) < count {
            idle += 1;
            assert!(
                idle < MAX_IDLE,
                "nobody receives: it sleeps, and its wake-up got lost"
            );
            thread::yield_now();
        }
    }
}

fn explore(preemptions: usize, run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.max_threads = 3;
    model.max_branches = 10_000;
    model.preemption_bound = model.preemption_bound.or(Some(preemptions));
    model.check(run);
}

#[test]
fn sleeper_misses_no_message_of_one_sender() {
    explore(3, || {
        let mailbox = Arc::new(Mailbox::default());
        let sender = Arc::clone(&mailbox);
        let sender = thread::spawn(move || {
            sender.send();
            sender.send();
            sender.see(2);
        });
        mailbox.receive(2);
        sender.join().unwrap();
    });
}

#[test]
fn sleeper_misses_no_message_of_two_senders() {
    explore(2, || {
        let mailbox = Arc::new(Mailbox::default());
        let senders = [true, false].map(|looks| {
            let mailbox = Arc::clone(&mailbox);
            thread::spawn(move || {
                mailbox.send();
                if looks {
                    mailbox.see(2);
                }
            })
        });
        mailbox.receive(2);
        for sender in senders {
            sender.join().unwrap();
        }
    });
}
