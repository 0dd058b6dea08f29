//! Commands that a guest wants to end at the device. NVMe's Abort goes over the admin queue, which a reactor must not wait
//! for (I9): the poller writes down which commands, and the device's keeper sends the Aborts.
//!
//! ```text
//!  poller: Pair::abort ---- bit of the CID set, bell ---->  keeper: Abort, waits for its answer
//!  its completion: with Command Abort Requested, or as ever
//!  Pair::look_at_aborts <-- bit cleared ------------------  answered
//! ```
//! An Abort names its command by the CID alone. So a CID is not used again while its bit is set, though the command has long
//! ended (I3): an Abort that comes late finds nothing.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use nvme_driver::MAX_ENTRIES;
use nvme_driver::spec::Cid;

const WORDS: usize = MAX_ENTRIES as usize / 64;

fn place(cid: Cid) -> (usize, u64) {
    // The modulo changes nothing: identifiers are the driver's own.
    (cid.index() / 64 % WORDS, 1 << (cid.index() % 64))
}

fn cids(word: usize, mut bits: u64) -> impl Iterator<Item = Cid> {
    std::iter::from_fn(move || {
        let bit = usize::try_from(bits.trailing_zeros())
            .ok()
            .filter(|_| bits != 0)?;
        bits &= bits - 1;
        u16::try_from(word * 64 + bit).ok().map(Cid)
    })
}

/// The commands of one queue pair whose end is asked for, by CID.
#[derive(Debug, Default)]
pub struct AbortList {
    asked: [AtomicU64; WORDS],
    /// The keeper's, once there is one.
    bell: OnceLock<Arc<OwnedFd>>,
}

impl AbortList {
    /// Whom to wake; the first one counts.
    pub fn set_bell(&self, bell: &Arc<OwnedFd>) {
        let _ = self.bell.set(Arc::clone(bell));
    }

    /// The commands to abort. Each has to be [answered](AbortList::answer).
    pub fn asked(&self) -> impl Iterator<Item = Cid> + '_ {
        let words = self.asked.iter().enumerate();
        // Pairs with the release in `ask`: the command is at the device.
        words.flat_map(|(word, bits)| cids(word, bits.load(Ordering::Acquire)))
    }

    /// The controller has answered the Abort of a command: its CID may be used again when it has completed.
    pub fn answer(&self, cid: Cid) {
        let (word, bit) = place(cid);
        // Pairs with the acquire in `is_asked`.
        self.asked[word].fetch_and(!bit, Ordering::Release);
    }

    /// There is no controller any more that knew of them.
    pub(super) fn clear(&self) {
        for word in &self.asked {
            word.store(0, Ordering::Release);
        }
    }

    fn ask(&self, cid: Cid) {
        let (word, bit) = place(cid);
        self.asked[word].fetch_or(bit, Ordering::Release);
    }

    fn is_asked(&self, cid: Cid) -> bool {
        let (word, bit) = place(cid);
        self.asked[word].load(Ordering::Acquire) & bit != 0
    }

    fn ring(&self) {
        if let Some(bell) = self.bell.get() {
            // A counter at its limit has been told of already.
            let _ = rustix::io::write(bell.as_fd(), &1_u64.to_ne_bytes());
        }
    }
}

/// Waits for nothing: takes what the bell has counted.
pub fn hear(bell: BorrowedFd<'_>) {
    // Nothing to read means that it was not rung.
    let _ = rustix::io::read(bell, &mut [0; 8]);
}

/// The poller's side: commands whose CIDs must not be used again before their Aborts are answered.
#[derive(Debug, Default)]
pub(super) struct Aborts {
    own: [u64; WORDS],
    count: u16,
}

impl Aborts {
    #[inline(always)]
    pub(super) fn any(&self) -> bool {
        self.count > 0
    }

    pub(super) fn contains(&self, cid: Cid) -> bool {
        let (word, bit) = place(cid);
        self.own[word] & bit != 0
    }

    /// Asks for the end of commands that are at the device.
    pub(super) fn ask(&mut self, list: &AbortList, commands: impl Iterator<Item = Cid>) {
        let before = self.count;
        for cid in commands {
            let (word, bit) = place(cid);
            if self.own[word] & bit == 0 {
                self.own[word] |= bit;
                self.count += 1;
                list.ask(cid);
            }
        }
        if self.count != before {
            list.ring();
        }
    }

    fn forget(&mut self, cid: Cid) {
        let (word, bit) = place(cid);
        self.own[word] &= !bit;
        self.count -= 1;
    }

    /// A command has completed. Whether its CID has to be kept.
    pub(super) fn completed(&mut self, list: &AbortList, cid: Cid) -> bool {
        if !self.contains(cid) {
            return false;
        }
        let waits = list.is_asked(cid);
        if !waits {
            self.forget(cid);
        }
        waits
    }

    /// Those whose Aborts have been answered, once; whether they have completed or not.
    pub(super) fn answered(&mut self, list: &AbortList) -> Option<Cid> {
        let mut own = (0..WORDS).flat_map(|word| cids(word, self.own[word]));
        let cid = own.find(|cid| !list.is_asked(*cid))?;
        self.forget(cid);
        Some(cid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cid_is_kept_from_its_completion_to_the_answer_of_its_abort() {
        let (list, mut aborts) = (AbortList::default(), Aborts::default());
        aborts.ask(&list, [Cid(0), Cid(63), Cid(64), Cid(1022)].into_iter());
        assert_eq!(
            list.asked().map(|cid| cid.0).collect::<Vec<_>>(),
            [0, 63, 64, 1022]
        );
        assert!(!aborts.completed(&list, Cid(1)), "nobody asked for its end");
        // Completed first, then answered.
        assert!(aborts.completed(&list, Cid(63)));
        assert_eq!(aborts.answered(&list), None);
        list.answer(Cid(63));
        assert_eq!(aborts.answered(&list), Some(Cid(63)));
        assert_eq!(aborts.answered(&list), None);
        // Answered first.
        list.answer(Cid(1022));
        assert!(!aborts.completed(&list, Cid(1022)) && !aborts.contains(Cid(1022)));
        // Answered, and goes on at the device: it may be asked for again.
        list.answer(Cid(0));
        assert_eq!(aborts.answered(&list), Some(Cid(0)));
        aborts.ask(&list, [Cid(0), Cid(64)].into_iter());
        assert_eq!(list.asked().map(|cid| cid.0).collect::<Vec<_>>(), [0, 64]);
        list.clear();
        assert!(aborts.answered(&list).is_some() && aborts.answered(&list).is_some());
        assert!(!aborts.any());
    }
}
