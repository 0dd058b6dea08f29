//! The event queue of a SCSI host: what has happened to its logical units is told in buffers that the guest has left there
//! (virtio 1.2, 5.6.6.3).
//!
//! The control path leaves events in an [`Events`], a ring of as many words as may wait; the lane takes them from there.
//! Neither waits for the other. An event that finds no room, or no buffer of the guest's, is dropped, and the guest is told
//! in its next buffer that it has missed something, so that it looks for itself.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::event::{EventfdFlags, eventfd};

use super::side::{SideConfig, SideRing};
use crate::scsi::{Attention, Listen, Lun};
use crate::virtio::scsi::{self, event};

/// Events that wait for the lane, at most: it looks for them in each turn.
const PLACES: usize = 64;
/// Buffers that are taken in one turn.
const BUDGET: usize = 8;

/// What has happened to a logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Happening {
    /// It is there.
    Appeared,
    /// It is there no longer.
    Removed,
    /// Another initiator has reset it.
    Reset,
    /// Another initiator has changed its mode parameters.
    ModesChanged,
    /// It has another size.
    Resized,
}

impl Happening {
    const ALL: [Happening; 5] = [
        Happening::Appeared,
        Happening::Removed,
        Happening::Reset,
        Happening::ModesChanged,
        Happening::Resized,
    ];

    /// Event, reason.
    fn codes(self) -> (u32, u32) {
        match self {
            Happening::Appeared => (event::TRANSPORT_RESET, event::RESET_RESCAN),
            Happening::Removed => (event::TRANSPORT_RESET, event::RESET_REMOVED),
            Happening::Reset => (event::TRANSPORT_RESET, event::RESET_HARD),
            Happening::ModesChanged => changed(Attention::ModeParameters),
            Happening::Resized => changed(Attention::Capacity),
        }
    }
}

fn changed(attention: Attention) -> (u32, u32) {
    let (asc, ascq) = attention.codes();
    (event::PARAM_CHANGE, u32::from(asc) | u32::from(ascq) << 8)
}

/// Which events a guest has negotiated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WantedEvents {
    /// VIRTIO_SCSI_F_HOTPLUG.
    pub hotplug: bool,
    /// VIRTIO_SCSI_F_CHANGE.
    pub change: bool,
}

/// Events of one host on their way to its guest.
#[derive(Debug)]
pub struct Events {
    /// 0 where none is.
    places: [AtomicU64; PLACES],
    /// Where the next one goes: whoever tells of one holds this.
    next_in: Mutex<usize>,
    /// Where the lane goes on. Nobody else changes it.
    next_out: AtomicUsize,
    /// Some were dropped that the guest does not know of.
    missed: AtomicBool,
    /// An eventfd that wakes the lane's poller, should that sleep. Nobody reads it: it is watched edge-triggered.
    bell: OwnedFd,
}

const THERE: u64 = 1 << 63;

impl Events {
    /// None yet.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new() -> io::Result<Events> {
        Ok(Events {
            places: [const { AtomicU64::new(0) }; PLACES],
            next_in: Mutex::new(0),
            next_out: AtomicUsize::new(0),
            missed: AtomicBool::new(false),
            bell: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
        })
    }

    /// The guest is to be told.
    pub fn tell(&self, target: u8, lun: Lun, what: Happening) {
        let next = self.next_in.lock().unwrap_or_else(PoisonError::into_inner);
        self.leave(next, (target, lun, what));
        self.ring_bell();
    }

    fn leave(&self, mut next: MutexGuard<'_, usize>, event: (u8, Lun, Happening)) {
        let (target, lun, what) = event;
        let word = u64::from(target) << 16 | u64::from(lun.get());
        let place = &self.places[*next % PLACES];
        if place.load(Ordering::Acquire) == 0 {
            // Pairs with the acquire in `take`: what has changed, then that it has.
            place.store(THERE | (what as u64) << 32 | word, Ordering::Release);
            *next = next.wrapping_add(1);
        } else {
            self.missed.store(true, Ordering::Release);
        }
    }

    fn ring_bell(&self) {
        // A counter at its limit has been told of already.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Nobody is to be told of anything from before. No lane is there.
    pub fn forget(&self) {
        while self.take().is_some() {}
        self.missed.store(false, Ordering::Relaxed);
    }

    fn place(&self) -> &AtomicU64 {
        &self.places[self.next_out.load(Ordering::Relaxed) % PLACES]
    }

    fn is_empty(&self) -> bool {
        self.place().load(Ordering::Relaxed) == 0
    }

    fn has_missed(&self) -> bool {
        self.missed.load(Ordering::Relaxed)
    }

    fn take(&self) -> Option<(u8, Lun, Happening)> {
        let word = self.place().swap(0, Ordering::AcqRel);
        if word == 0 {
            return None;
        }
        let next = self.next_out.load(Ordering::Relaxed).wrapping_add(1);
        self.next_out.store(next, Ordering::Relaxed);
        let [_, _, _, what, _, target, high, low] = word.to_be_bytes();
        let what = Happening::ALL.get(usize::from(what))?;
        Some((target, Lun::new(u16::from_be_bytes([high, low]))?, *what))
    }
}

/// On other reactors: who finds another one here leaves it at that something was missed.
impl Listen for Events {
    fn hear(&self, target: u8, lun: Lun, attention: Attention) {
        let what = match attention {
            Attention::Reset => Happening::Reset,
            Attention::ModeParameters => Happening::ModesChanged,
            // Reservations: a unit attention tells of them.
            _ => return,
        };
        match self.next_in.try_lock() {
            Ok(next) => self.leave(next, (target, lun, what)),
            Err(_) => self.missed.store(true, Ordering::Release),
        }
        self.ring_bell();
    }
}

/// What the lane of an event queue is made of.
#[derive(Debug)]
pub struct EventConfig {
    /// The ring and the guest.
    pub side: SideConfig,
    /// What is told.
    pub events: Arc<Events>,
    /// And what of it to this guest.
    pub wanted: WantedEvents,
}

/// Tells the guest.
#[derive(Debug)]
pub(super) struct Herald {
    events: Arc<Events>,
    wanted: WantedEvents,
}

impl Herald {
    pub(super) fn new(events: Arc<Events>, wanted: WantedEvents) -> Herald {
        Herald { events, wanted }
    }

    pub(super) fn waker(&self) -> BorrowedFd<'_> {
        self.events.bell.as_fd()
    }

    /// The guest is to be told that it has missed something, and has left no buffer for it.
    pub(super) fn waits_for_buffer(&self) -> bool {
        self.wanted != WantedEvents::default() && self.events.has_missed()
    }

    /// Buffers alone are nothing to be done.
    #[inline]
    pub(super) fn wants(&self, ring: &SideRing) -> bool {
        ring.is_running()
            && (!self.events.is_empty() || (self.waits_for_buffer() && ring.has_request()))
    }

    /// Tells what there is to tell, as far as there are buffers.
    pub(super) fn fetch(&mut self, ring: &mut SideRing) -> bool {
        let mut busy = false;
        for _ in 0..BUDGET {
            if !ring.is_running() || (self.events.is_empty() && !self.waits_for_buffer()) {
                break;
            }
            let told = self.events.take();
            let told = told.filter(|(.., what)| match what {
                Happening::Appeared | Happening::Removed | Happening::Reset => self.wanted.hotplug,
                Happening::ModesChanged | Happening::Resized => self.wanted.change,
            });
            if told.is_none() && !self.waits_for_buffer() {
                busy = true;
                continue;
            }
            let Some(place) = next_buffer(ring) else {
                // Of one that it never asked for the guest has missed nothing.
                if told.is_some() {
                    self.events.missed.store(true, Ordering::Relaxed);
                }
                break;
            };
            busy = true;
            let missed = self.events.missed.swap(false, Ordering::AcqRel);
            let (mut number, mut lun, mut reason) = (event::NO_EVENT, [0; 8], 0);
            if let Some((target, own, what)) = told {
                (number, reason) = what.codes();
                let [high, low] = own.to_bytes();
                lun = [1, target, high, low, 0, 0, 0, 0];
            }
            if missed {
                number |= event::EVENTS_MISSED;
            }
            let head = ring.chain.head();
            let written = scsi::finish_event(&place, number, lun, reason);
            ring.queue.push_used(head, written);
        }
        busy
    }
}

/// The guest's next buffer that an event fits into. One that is too short goes back as it is.
fn next_buffer(ring: &mut SideRing) -> Option<scsi::ResponsePlace> {
    for _ in 0..ring.queue.size() {
        if !ring.pop() {
            break;
        }
        if let Some(place) = scsi::parse_event(&mut ring.chain) {
            return Some(place);
        }
        let head = ring.chain.head();
        ring.give_back_malformed(head);
    }
    None
}
