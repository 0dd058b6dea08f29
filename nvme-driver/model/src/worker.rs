//! Threads that carry out what would hold up a polling core. They look for work instead of being woken: waking them
//! would be a system call of the core (I9). With nothing to do they sleep a little longer each time, up to a
//! millisecond.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::queue::ArrayQueue;
use nvme_driver::spec::{Status, SubmissionEntry};

use crate::io::{self, Scratch};
use crate::shared::Shared;

/// More than one, so that a flush does not hold up reads.
const WORKERS: usize = 2;
const SHORTEST_SLEEP: Duration = Duration::from_micros(20);
const LONGEST_SLEEP: Duration = Duration::from_millis(1);

/// A command on its way to a worker, and where its end is told.
#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) entry: SubmissionEntry,
    pub(crate) done: Arc<ArrayQueue<Done>>,
}

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Done {
    pub(crate) cid: u16,
    pub(crate) status: Status,
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
            workers.threads.push(thread.spawn(move || work(&shared))?);
        }
        Ok(workers)
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so; its command never ends, as on a controller that broke.
            let _ = thread.join();
        }
    }
}

fn work(shared: &Shared) {
    let mut scratch = Scratch::default();
    let mut sleep = SHORTEST_SLEEP;
    while !shared.stop.load(Ordering::Acquire) {
        let Some(Job { entry, done }) = shared.jobs.pop() else {
            std::thread::sleep(sleep);
            sleep = (sleep * 2).min(LONGEST_SLEEP);
            continue;
        };
        sleep = SHORTEST_SLEEP;
        let status = io::execute_slowly(shared, &entry, &mut scratch);
        // A queue has room for the end of every command that it handed over.
        let _ = done.push(Done {
            cid: entry.cid.get(),
            status,
        });
    }
}
