//! Commands that must not be carried out on a reactor, since they wait: for a file to be durable, for other guests' commands
//! to end. A lane leaves such a command at its [`Desk`] and goes on; the [`Clerk`], a thread of its own, settles it; the
//! lane finds the outcome there and answers. The clerk never touches guest memory, so a lane that waits for the clerk
//! before it leaves is all that a session's end needs.
//!
//! ```text
//!  lane, on its reactor            Desk: a few places               Clerk, a thread
//!  leave ---- command --->   FREE -> LEFT  ---- bell ---->   take; Nexus::settle
//!  collect <-- outcome ---   FREE <- SETTLED <-- waker ---   everything it waits for has ended
//! ```

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::lane::Barrier;
use crate::scsi::{Action, Cdb, Nexus, PR_OUT_BYTES, Settlement};

/// Commands of one lane that may wait at a time. A guest sends one after the other; more are told that the task set is
/// full.
pub(super) const PLACES: usize = 4;
/// How often the clerk looks whether commands that others have to end first have ended.
const LOOK_INTERVAL: Duration = Duration::from_millis(1);

const FREE: u8 = 0;
const LEFT: u8 = 1;
const TAKEN: u8 = 2;
const SETTLED: u8 = 3;

/// Where a lane leaves commands.
#[derive(Debug)]
pub struct Desk {
    places: [Place; PLACES],
    /// The clerk's.
    bell: Arc<OwnedFd>,
    /// Where the lane is woken.
    barrier: Arc<Barrier>,
    lane: usize,
}

/// Room for a command. Its state says whose it is: the lane's while FREE or SETTLED, the clerk's in between. So the lock
/// is never contended; a reactor only tries.
#[derive(Debug)]
struct Place {
    state: AtomicU8,
    errand: Mutex<Errand>,
}

#[derive(Debug)]
struct Errand {
    /// Whose command it is, while the clerk has it.
    nexus: Option<Arc<Nexus>>,
    unit: usize,
    cdb: Cdb,
    /// One more than there should be: a list that is too long is told from one that is not.
    parameters: [u8; PR_OUT_BYTES + 1],
    len: usize,
    outcome: Action,
}

impl Desk {
    /// Leaves a command. Its place; `None` when all are taken.
    pub(super) fn leave(
        &self,
        nexus: &Arc<Nexus>,
        unit: usize,
        cdb: &Cdb,
        parameters: &[u8],
    ) -> Option<usize> {
        let free = |place: &Place| place.state.load(Ordering::Acquire) == FREE;
        let at = self.places.iter().position(free)?;
        let place = &self.places[at];
        let mut errand = place.errand.try_lock().ok()?;
        let len = parameters.len().min(errand.parameters.len());
        errand.parameters[..len].copy_from_slice(&parameters[..len]);
        (errand.unit, errand.cdb, errand.len) = (unit, *cdb, len);
        errand.nexus = Some(Arc::clone(nexus));
        drop(errand);
        // Pairs with the acquire in `Clerk::take`.
        place.state.store(LEFT, Ordering::Release);
        // A counter at its limit has been told of already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
        Some(at)
    }

    /// Whether a command that was left has been settled.
    pub(super) fn is_settled(&self, at: usize) -> bool {
        let place = self.places.get(at);
        // Pairs with the release in `settle`.
        place.is_some_and(|place| place.state.load(Ordering::Acquire) == SETTLED)
    }

    /// What it came to, once.
    pub(super) fn collect(&self, at: usize) -> Option<Action> {
        let place = self.places.get(at).filter(|_| self.is_settled(at))?;
        let outcome = place.errand.try_lock().ok()?.outcome;
        place.state.store(FREE, Ordering::Release);
        Some(outcome)
    }

    fn settle(&self, at: usize, outcome: Action) {
        let place = &self.places[at];
        place.lock().outcome = outcome;
        place.state.store(SETTLED, Ordering::Release);
        self.barrier.wake(self.lane);
    }
}

impl Place {
    fn new() -> Place {
        Place {
            state: AtomicU8::new(FREE),
            errand: Mutex::new(Errand {
                nexus: None,
                unit: 0,
                cdb: Cdb::new(&[]),
                parameters: [0; PR_OUT_BYTES + 1],
                len: 0,
                outcome: Action::Good,
            }),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Errand> {
        self.errand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread that settles what lanes leave at their desks, one command after the other.
#[derive(Debug)]
pub struct Clerk {
    office: Arc<Office>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Office {
    /// A lane's end is its desk's.
    desks: Mutex<Vec<Weak<Desk>>>,
    bell: Arc<OwnedFd>,
    stop: AtomicBool,
}

/// A command that is done but for those of others.
#[derive(Debug)]
struct Waiting {
    desk: Arc<Desk>,
    at: usize,
    settlement: Settlement,
}

impl Clerk {
    /// Begins.
    ///
    /// # Errors
    /// When there is no file descriptor or thread left.
    pub fn start() -> io::Result<Clerk> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let office = Arc::new(Office {
            desks: Mutex::default(),
            bell: Arc::new(bell),
            stop: AtomicBool::new(false),
        });
        let own = Arc::clone(&office);
        let thread = std::thread::Builder::new().name("clerk".to_owned());
        Ok(Clerk {
            office,
            thread: Some(thread.spawn(move || own.work())?),
        })
    }

    /// A desk for lane `lane` of a host, as its [`Barrier`] numbers them.
    #[must_use]
    pub fn desk(&self, barrier: Arc<Barrier>, lane: usize) -> Arc<Desk> {
        let desk = Arc::new(Desk {
            places: std::array::from_fn(|_| Place::new()),
            bell: Arc::clone(&self.office.bell),
            barrier,
            lane,
        });
        let mut desks = self.office.desks();
        desks.retain(|desk| desk.strong_count() > 0);
        desks.push(Arc::downgrade(&desk));
        desk
    }
}

impl Drop for Clerk {
    /// All lanes have left by now, so nobody waits for an answer.
    fn drop(&mut self) {
        self.office.stop.store(true, Ordering::Release);
        let _ = rustix::io::write(&self.office.bell, &1_u64.to_ne_bytes());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the clerk panicked");
        }
    }
}

impl Office {
    fn desks(&self) -> std::sync::MutexGuard<'_, Vec<Weak<Desk>>> {
        self.desks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let mut waiting: Vec<Waiting> = Vec::new();
        while !self.stop.load(Ordering::Acquire) {
            self.await_bell(!waiting.is_empty());
            let desks: Vec<Arc<Desk>> = self.desks().iter().filter_map(Weak::upgrade).collect();
            for desk in desks {
                for at in 0..PLACES {
                    waiting.extend(take(&desk, at));
                }
            }
            waiting.retain(|waiting| {
                let over = waiting.settlement.is_over();
                if over {
                    waiting.desk.settle(waiting.at, waiting.settlement.action());
                }
                !over
            });
        }
    }

    /// Until a command is left, or a moment if some wait.
    fn await_bell(&self, looks: bool) {
        let mut fds = [PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN)];
        let timeout = looks.then(|| Timespec::try_from(LOOK_INTERVAL).ok());
        // An interrupted wait is one look too many.
        let _ = poll(&mut fds, timeout.flatten().as_ref());
        let mut count = [0; 8];
        let _ = rustix::io::read(&self.bell, &mut count);
    }
}

/// Carries out the command that was left there, if any.
fn take(desk: &Arc<Desk>, at: usize) -> Option<Waiting> {
    let place = &desk.places[at];
    place
        .state
        .compare_exchange(LEFT, TAKEN, Ordering::Acquire, Ordering::Relaxed)
        .ok()?;
    let (nexus, unit, cdb, parameters, len) = {
        let mut errand = place.lock();
        let nexus = errand.nexus.take()?;
        (
            nexus,
            errand.unit,
            errand.cdb,
            errand.parameters,
            errand.len,
        )
    };
    Some(Waiting {
        desk: Arc::clone(desk),
        at,
        settlement: nexus.settle(unit, &cdb, &parameters[..len]),
    })
}
