//! Threads that carry out what would hold up a polling core. They look for work instead of being woken: waking them
//! would be a system call of the core (I9). With nothing to do they sleep a little longer each time, up to a
//! millisecond. Where pollers sleep (`ModelConfig::interrupts`), workers do as well: after the longest of those they wait
//! until a poller wakes them, and they wake the poller.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use nvme_driver::spec::{Status, SubmissionEntry};
use nvme_driver::transport::{Attention, Bell};

use crate::io::{self, Scratch};
use crate::shared::Shared;

/// More than one, so that a flush does not hold up reads.
pub(crate) const WORKERS: usize = 2;
const SHORTEST_SLEEP: Duration = Duration::from_micros(20);
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// A command on its way to a worker, where its end is told, and who wants to be woken then.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) entry: SubmissionEntry,
    pub(crate) done: Arc<ArrayQueue<Done>>,
    pub(crate) bell: Option<Arc<Bell>>,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) cid: u16,
    pub(crate) status: Status,
}

/// Where a worker sleeps until it is woken.
#[derive(Debug, Default)]
pub(crate) struct Bed {
    attention: Attention,
    /// Whose it is now.
    thread: Mutex<Option<Thread>>,
}

impl Bed {
    /// Sleeps unless `pending`, or until it is woken.
    fn doze(&self, pending: impl FnMut() -> bool) {
        self.attention.doze(pending, std::thread::park);
    }

    /// Wakes whoever sleeps here.
    pub(crate) fn wake(&self) {
        if self.attention.is_wanted()
            && let Some(thread) = &*self.thread.lock().unwrap_or_else(PoisonError::into_inner)
        {
            thread.unpark();
        }
    }
}

/// The workers of one controller. Dropping it ends them.
#[derive(Debug)]
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Workers {
    pub(crate) fn start(shared: &Arc<Shared>) -> std::io::Result<Workers> {
        shared.stop.store(false, Ordering::Release);
        let mut workers = Workers {
            shared: Arc::clone(shared),
            threads: Vec::new(),
        };
        for i in 0..WORKERS {
            let shared = Arc::clone(shared);
            let thread = std::thread::Builder::new().name(format!("media-{i}"));
            workers
                .threads
                .push(thread.spawn(move || work(&shared, &shared.beds[i]))?);
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        self.shared.wake_workers();
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so; its command never ends, as on a controller that broke.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared, bed: &Bed) {
    // Before it sleeps: the lock is free whenever somebody is to be woken.
    *bed.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(std::thread::current());
    let mut scratch = Scratch::default();
    let mut sleep = SHORTEST_SLEEP;
    while !shared.stop.load(Ordering::Acquire) {
        let Some(Job { entry, done, bell }) = shared.jobs.pop() else {
            if sleep == LONGEST_SLEEP && shared.config.interrupts {
                let pending = || !shared.jobs.is_empty() || shared.stop.load(Ordering::Acquire);
                bed.doze(pending);
                sleep = SHORTEST_SLEEP;
            } else {
                std::thread::sleep(sleep);
                sleep = (sleep * 2).min(LONGEST_SLEEP);
            }
            continue;
        };
        sleep = SHORTEST_SLEEP;
        let status = io::execute_slowly(shared, &entry, &mut scratch);
        // A queue has room for the end of every command that it handed over.
        let _ = done.push(Done {
            cid: entry.cid.get(),
            status,
        });
        if let Some(bell) = bell {
            bell.ring();
        }
    }
}
