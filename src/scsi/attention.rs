//! Unit attentions (SAM-5, 5.14): what has happened to a logical unit that an initiator has not been told yet.
//!
//! An initiator has a [`Conditions`] with each unit that it reaches: a bit for each condition, so that nothing is lost
//! when several wait, and one for each kind of command that a reservation keeps from it. The many commands that find
//! neither pay one relaxed load.

use std::sync::atomic::{AtomicU32, Ordering};

use super::sense::{Sense, key};

/// A condition, in the order in which they are told (SAM-5, 5.14.1: what resets more comes first).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Attention {
    /// POWER ON, RESET, OR BUS DEVICE RESET OCCURRED. Nothing older is told any more.
    PowerOn,
    /// BUS DEVICE RESET FUNCTION OCCURRED: a logical unit reset.
    Reset,
    /// I_T NEXUS LOSS OCCURRED.
    NexusLoss,
    /// COMMANDS CLEARED BY ANOTHER INITIATOR.
    CommandsCleared,
    /// RESERVATIONS PREEMPTED.
    ReservationsPreempted,
    /// RESERVATIONS RELEASED.
    ReservationsReleased,
    /// REGISTRATIONS PREEMPTED.
    RegistrationsPreempted,
    /// MODE PARAMETERS CHANGED.
    ModeParameters,
    /// LOG PARAMETERS CHANGED.
    LogParameters,
    /// CAPACITY DATA HAS CHANGED.
    Capacity,
    /// INQUIRY DATA HAS CHANGED.
    Inquiry,
    /// REPORTED LUNS DATA HAS CHANGED.
    ReportedLuns,
}

/// ASC and ASCQ of each.
const CODES: [(u8, u8); 12] = [
    (0x29, 0x00),
    (0x29, 0x03),
    (0x29, 0x07),
    (0x2f, 0x00),
    (0x2a, 0x03),
    (0x2a, 0x04),
    (0x2a, 0x05),
    (0x2a, 0x01),
    (0x2a, 0x02),
    (0x2a, 0x09),
    (0x3f, 0x03),
    (0x3f, 0x0e),
];

/// Those that a reset establishes: told before a reservation conflict is, the others after it (SAM-5, 5.3.3).
pub(super) const RESETS: u32 =
    Attention::PowerOn.bit() | Attention::Reset.bit() | Attention::NexusLoss.bit();
/// All of them.
pub(super) const ALL: u32 = (1 << CODES.len()) - 1;

impl Attention {
    const fn bit(self) -> u32 {
        1 << self as u8
    }

    /// Its ASC and ASCQ.
    #[must_use]
    pub const fn codes(self) -> (u8, u8) {
        CODES[self as usize]
    }
}

/// What a persistent reservation keeps from an initiator, and what a reservation of SPC-2 does.
pub(super) mod denied {
    pub const READS: u32 = 1 << 16;
    pub const WRITES: u32 = 1 << 17;
    pub const RESERVED: u32 = 1 << 18;
}

/// What an initiator is to be told of a logical unit, and what it may not do there.
#[derive(Debug, Default)]
pub(super) struct Conditions(AtomicU32);

impl Conditions {
    /// Whether there is anything at all.
    ///
    /// Relaxed is enough: a guest that heard of a reservation heard of it after it was stored here.
    #[inline(always)]
    pub(super) fn any(&self) -> bool {
        self.0.load(Ordering::Relaxed) != 0
    }

    /// Whether any of these kinds of commands is denied.
    pub(super) fn denies(&self, kinds: u32) -> bool {
        self.0.load(Ordering::Relaxed) & kinds != 0
    }

    /// Of the kinds in `which`, those in `kinds` are denied from now on, and the others are not.
    pub(super) fn deny(&self, which: u32, kinds: u32) {
        // The closure always gives a value.
        let _ = self
            .0
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |word| {
                Some(word & !which | kinds)
            });
    }

    /// This has happened, and is to be told. Who is told acquires what was changed before: see `take_of`.
    pub(super) fn establish(&self, attention: Attention) {
        if attention == Attention::PowerOn {
            self.0.fetch_and(!ALL, Ordering::Relaxed);
        }
        self.0.fetch_or(attention.bit(), Ordering::Release);
    }

    /// That need not be told any more.
    pub(super) fn withdraw(&self, attention: Attention) {
        self.0.fetch_and(!attention.bit(), Ordering::Relaxed);
    }

    /// The first of those in `which`, once.
    #[inline]
    pub(super) fn take(&self, which: u32) -> Option<Sense> {
        // Looked at first: of all commands hardly one finds anything.
        match self.0.load(Ordering::Relaxed) & which {
            0 => None,
            waiting => self.take_of(waiting),
        }
    }

    #[cold]
    fn take_of(&self, mut waiting: u32) -> Option<Sense> {
        while waiting != 0 {
            let at = waiting.trailing_zeros();
            let bit = 1 << at;
            // Another command of this initiator may have been quicker. Pairs with the release in `establish`.
            if self.0.fetch_and(!bit, Ordering::Acquire) & bit != 0 {
                let (asc, ascq) = *CODES.get(at as usize)?;
                return Some(Sense::new(key::UNIT_ATTENTION, asc, ascq));
            }
            waiting &= !bit;
        }
        None
    }
}
