//! The lock of a few blocks of a logical unit, under which COMPARE AND WRITE compares and writes (SBC-3, 5.2): commands of
//! other initiators that would write there wait until it is free.
//!
//! Whoever carries commands out has a seat at the lock: each request queue of each host. One seat at a time owns it, in
//! turn. An owner says which blocks it holds; then it has to wait until no seat has a write at the device that began before
//! that (how is the seats' business: datapath's barrier), since from then on every seat looks here before it writes.
//! A seat that looks pays one load while nothing is held.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering, fence};

/// Nobody is there.
const ABSENT: u8 = 0;
/// It carries commands out.
const PRESENT: u8 = 1;
/// It wants the lock.
const WAITING: u8 = 2;
/// It has the lock.
const OWNER: u8 = 3;

/// A lock of one range of blocks at a time.
#[derive(Debug)]
pub struct RangeLock {
    extent: Extent,
    owned: AtomicBool,
    seats: Box<[AtomicU8]>,
}

/// The blocks that are held. In a cache line of its own: all seats look at it, and it hardly ever changes.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Extent {
    first: AtomicU64,
    /// The block behind the last one; 0 for none.
    end: AtomicU64,
}

impl RangeLock {
    /// With seats 0 to `seats` - 1, all of them empty.
    #[must_use]
    pub fn new(seats: usize) -> RangeLock {
        RangeLock {
            extent: Extent::default(),
            owned: AtomicBool::new(false),
            seats: (0..seats).map(|_| AtomicU8::new(ABSENT)).collect(),
        }
    }

    /// Someone takes a seat, and begins no write without a look from here on.
    ///
    /// # Panics
    /// When there is no such seat: our own error, they are counted when the lock is made.
    pub fn enter(&self, seat: usize) {
        self.seats[seat].store(PRESENT, Ordering::Relaxed);
        // Pairs with the fence in `hold`: either the owner finds the seat taken, or the seat finds the blocks held.
        fence(Ordering::SeqCst);
    }

    /// A seat becomes empty; it neither waits nor owns.
    pub fn leave(&self, seat: usize) {
        if let Some(seat) = self.seats.get(seat) {
            seat.store(ABSENT, Ordering::Release);
        }
    }

    /// The seats that are taken.
    pub fn taken(&self) -> impl Iterator<Item = usize> + '_ {
        let seats = self.seats.iter().enumerate();
        seats
            .filter(|(_, state)| state.load(Ordering::Acquire) != ABSENT)
            .map(|(seat, _)| seat)
    }

    /// A seat wants the lock, and asks again until it has it: then `true`.
    pub fn acquire(&self, seat: usize) -> bool {
        let Some(state) = self.seats.get(seat) else {
            return false;
        };
        // An owner that gives the lock on makes the state OWNER.
        match state.load(Ordering::Acquire) {
            OWNER => return true,
            WAITING => {}
            _ => state.store(WAITING, Ordering::Release),
        }
        let free = self
            .owned
            .compare_exchange(false, true, Ordering::Acquire, Ordering::Relaxed);
        if free.is_ok() {
            // Nobody else owns it who could give it on meanwhile.
            state.store(OWNER, Ordering::Relaxed);
        }
        free.is_ok()
    }

    /// The owner holds `count` blocks from `first` on.
    pub fn hold(&self, first: u64, count: u32) {
        self.extent.first.store(first, Ordering::Relaxed);
        let end = first.saturating_add(count.into());
        // Pairs with the acquire in `holds_any`.
        self.extent.end.store(end, Ordering::Release);
        // Pairs with the fence in `enter`.
        fence(Ordering::SeqCst);
    }

    /// A seat neither owns the lock any more nor waits for it. An owner's blocks are free, and the next seat in turn that
    /// waits has the lock.
    pub fn release(&self, seat: usize) {
        let Some(state) = self.seats.get(seat) else {
            return;
        };
        // As long as it waited, nobody has given it the lock.
        if state.swap(PRESENT, Ordering::AcqRel) != OWNER {
            return;
        }
        self.extent.end.store(0, Ordering::Release);
        let (before, after) = self.seats.split_at(seat + 1);
        let given = after.iter().chain(before).any(|next| {
            next.compare_exchange(WAITING, OWNER, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        });
        if !given {
            // Who begins to wait now finds it free when it asks again.
            self.owned.store(false, Ordering::Release);
        }
    }

    /// Whether any blocks are held.
    #[inline]
    #[must_use]
    pub fn holds_any(&self) -> bool {
        self.extent.end.load(Ordering::Acquire) != 0
    }

    /// Whether any of `count` blocks from `first` on is held.
    ///
    /// The two words of the extent may be of two owners. Then the second has just begun and waits for this seat, which
    /// does not know of it yet, so that either answer is right.
    #[must_use]
    pub fn holds(&self, first: u64, count: u32) -> bool {
        let end = self.extent.end.load(Ordering::Acquire);
        let held = self.extent.first.load(Ordering::Relaxed);
        first < end && held < first.saturating_add(count.into())
    }
}
