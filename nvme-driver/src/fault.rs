//! Contains SIGBUS: pages that vanish under us cost the one they belong to, not the process. A front-end that shrinks
//! the file behind its memory loses its session; an SSD that is pulled out loses its BAR.
//!
//! The handler replaces the page that faulted, sets the flag of whoever registered the region, and returns; whoever
//! touched the page goes on with zeroes (or with all ones, as a bus answers for a device that is gone). A SIGBUS
//! anywhere else ends the process as it would have without us. Everything the handler uses is async-signal-safe: one
//! table of atomics, `mmap`, and stores.

use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Mutex, Once, PoisonError};

/// Regions that one process can have watched at a time: guest memory of all sessions, and BARs.
const MAX_GUARDS: usize = 4096;

/// Set by the handler when pages were lost.
#[derive(Clone, Debug, Default)]
pub struct Poisoned(Arc<AtomicBool>);

impl Poisoned {
    /// Pages were lost.
    #[must_use]
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

struct Slot {
    start: AtomicUsize,
    /// 0 while the slot is free or being changed.
    len: AtomicUsize,
    flag: AtomicPtr<AtomicBool>,
    /// What the replacement reads as.
    fill: AtomicU8,
}

/// What whoever goes on with a lost page reads there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Memory.
    Zeroes,
    /// Registers.
    Ones,
}

static SLOTS: [Slot; MAX_GUARDS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        flag: AtomicPtr::new(std::ptr::null_mut()),
        fill: AtomicU8::new(0),
    }
}; MAX_GUARDS];
/// Slots below this have been used: what the handler scans.
static USED: AtomicUsize = AtomicUsize::new(0);
/// Serialises registration; the handler never takes it.
static REGISTRY: Mutex<()> = Mutex::new(());

/// Watches one mapped region for as long as it lives. Must be dropped before the region is unmapped.
#[derive(Debug)]
pub struct FaultGuard {
    slot: usize,
    flag: Poisoned,
}

impl FaultGuard {
    /// Watches `len` bytes at `hva`; a fault there sets `flag`. `None` when the table is full.
    #[must_use]
    pub fn register(
        hva: NonNull<u8>,
        len: usize,
        flag: &Poisoned,
        lost: Lost,
    ) -> Option<FaultGuard> {
        install();
        let _registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = SLOTS
            .iter()
            .position(|slot| slot.len.load(Ordering::Relaxed) == 0)?;
        SLOTS[slot]
            .start
            .store(hva.as_ptr().addr(), Ordering::Relaxed);
        SLOTS[slot]
            .flag
            .store(Arc::as_ptr(&flag.0).cast_mut(), Ordering::Relaxed);
        let fill = if lost == Lost::Ones { 0xff } else { 0 };
        SLOTS[slot].fill.store(fill, Ordering::Relaxed);
        // Release: pairs with the handler's Acquire of `len`, which makes those above visible.
        SLOTS[slot].len.store(len, Ordering::Release);
        USED.fetch_max(slot + 1, Ordering::Release);
        Some(FaultGuard {
            slot,
            flag: flag.clone(),
        })
    }
}

impl Drop for FaultGuard {
    fn drop(&mut self) {
        let _registry = REGISTRY.lock().unwrap_or_else(PoisonError::into_inner);
        debug_assert!(Arc::strong_count(&self.flag.0) > 0);
        SLOTS[self.slot].len.store(0, Ordering::Release);
    }
}

fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: a zeroed sigaction is valid; the handler is async-signal-safe (module documentation).
        let result = unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_sigbus as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, std::ptr::null_mut())
        };
        if result != 0 {
            tracing::warn!("cannot install a SIGBUS handler: a front-end that shrinks its memory, or an SSD that is pulled out, ends the process");
        }
    });
}

extern "C" fn on_sigbus(
    _signal: libc::c_int,
    info: *mut libc::siginfo_t,
    _context: *mut libc::c_void,
) {
    // SAFETY: the kernel passes a valid siginfo for SA_SIGINFO handlers.
    let address = unsafe { (*info).si_addr() }.addr();
    for slot in SLOTS.iter().take(USED.load(Ordering::Acquire)) {
        let len = slot.len.load(Ordering::Acquire);
        let start = slot.start.load(Ordering::Relaxed);
        if len == 0 || address < start || address - start >= len {
            continue;
        }
        // Everything from the faulting page to the end of the region is gone, or soon will be: replace it at once.
        let page = address & !4095;
        // SAFETY: the range lies in a registered region, which stays mapped while its guard lives; replacing its
        // pages by anonymous ones is what the region's owner asked for by registering it.
        let replaced = unsafe {
            libc::mmap(
                std::ptr::without_provenance_mut(page),
                start + len - page,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE,
                -1,
                0,
            )
        };
        if replaced != libc::MAP_FAILED {
            let fill = slot.fill.load(Ordering::Relaxed);
            if fill != 0 {
                // SAFETY: the pages are there now, writable, and belong to the region.
                unsafe { std::ptr::write_bytes(replaced.cast::<u8>(), fill, start + len - page) };
            }
            // SAFETY: the guard in this slot holds the flag's Arc.
            unsafe { &*slot.flag.load(Ordering::Relaxed) }.store(true, Ordering::Relaxed);
            return;
        }
    }
    // Not ours: back to the default action; returning faults again and ends the process.
    // SAFETY: resetting a signal to its default is async-signal-safe.
    unsafe { libc::signal(libc::SIGBUS, libc::SIG_DFL) };
}
