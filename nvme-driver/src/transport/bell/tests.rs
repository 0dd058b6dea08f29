//! Sleepers and those who wake them, under loom: a wake-up that gets lost shows as a deadlock. `scripts/loom-rings` runs
//! them, and expects each canary to make them fail.

use super::Attention;
use loom::sync::atomic::{AtomicU32, Ordering::Relaxed};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

/// A mailbox that counts its messages, and the eventfd beside it.
#[derive(Default)]
struct Mailbox {
    messages: AtomicU32,
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

    /// Until `count` messages have arrived, asleep whenever there is no new one. Says how often it slept.
    fn receive(&self, count: u32) -> u32 {
        let (mut seen, mut slept) = (0, 0);
        while seen < count {
            let new = || self.messages.load(Relaxed) != seen;
            let waited = self.attention.doze(new, || {
                let mut counter = self.eventfd.lock().unwrap();
                while *counter == 0 {
                    counter = self.woken.wait(counter).unwrap();
                }
                *counter = 0;
            });
            slept += u32::from(waited.is_some());
            seen = self.messages.load(Relaxed);
        }
        slept
    }
}

fn explore(run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.max_threads = 3;
    model.max_branches = 10_000;
    model.preemption_bound = model.preemption_bound.or(Some(4));
    model.check(run);
}

#[test]
fn sleeper_misses_no_message_of_one_sender() {
    explore(|| {
        let mailbox = Arc::new(Mailbox::default());
        let sender = Arc::clone(&mailbox);
        let sender = thread::spawn(move || {
            sender.send();
            sender.send();
        });
        mailbox.receive(2);
        sender.join().unwrap();
    });
}

#[test]
fn sleeper_misses_no_message_of_two_senders() {
    explore(|| {
        let mailbox = Arc::new(Mailbox::default());
        let senders = [(); 2].map(|()| {
            let mailbox = Arc::clone(&mailbox);
            thread::spawn(move || mailbox.send())
        });
        mailbox.receive(2);
        senders.map(|sender| sender.join().unwrap());
    });
}
