//! What the parts of one controller share: its configuration, its namespaces, the queue slots, the DMA table, counters.
//!
//! Lock order: a thread that holds a queue may take another queue (only the admin queue does) or [`Shared::admin`];
//! it never takes the table. [`Shared::change_table`] takes queues one at a time and never while a worker waits for it.
//! Queues on polling cores take only their own lock, and only if it is free.

use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, TryLockError};
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;
use nvme_driver::spec::{Nsid, Status, SubmissionEntry, io_opcode};

use crate::admin::Admin;
use crate::durability::Durability;
use crate::iommu::{Dma, DmaTable};
use crate::media::Media;
use crate::queue::Slot;
use crate::worker::{Bed, Job, WORKERS};
use crate::{Clock, ModelConfig};

/// Commands that may wait for a worker, over all queues. A queue that finds no room keeps its command.
const JOBS: usize = 4096;
/// Faults that can be programmed at a time.
const FAULTS: usize = 64;

/// One namespace and where its blocks lie in the medium.
#[derive(Debug)]
pub(crate) struct NamespaceState {
    pub(crate) nsid: Nsid,
    /// See [`NamespaceState::set_blocks`].
    pub(crate) blocks: AtomicU64,
    pub(crate) block_shift: u32,
    pub(crate) offset: u64,
    pub(crate) nguid: [u8; 16],
    pub(crate) eui64: [u8; 8],
    pub(crate) uuid: [u8; 16],
}

impl NamespaceState {
    /// Pairs with the release in `set_blocks`: the medium has all of them.
    #[inline]
    pub(crate) fn blocks(&self) -> u64 {
        self.blocks.load(Ordering::Acquire)
    }

    /// It has so many from now on, and so has the medium.
    pub(crate) fn set_blocks(&self, blocks: u64) {
        self.blocks.store(blocks, Ordering::Release);
    }

    /// Its size in bytes.
    pub(crate) fn bytes(&self) -> u64 {
        // It fits 64 bits: checked when the namespace was made, and when it grew.
        self.blocks() << self.block_shift
    }
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) config: ModelConfig,
    pub(crate) media: Media,
    pub(crate) namespaces: Vec<NamespaceState>,
    /// By queue identifier; 0 is the admin queue.
    pub(crate) slots: Box<[Arc<Slot>]>,
    /// What workers translate with. They hold it for one copy, so that an unmap waits for them (I2).
    table: RwLock<Arc<DmaTable>>,
    /// Serialises changes of the table.
    changing: Mutex<()>,
    /// Serialises changes of sizes.
    pub(crate) growing: Mutex<()>,
    pub(crate) admin: Mutex<Admin>,
    pub(crate) durability: Option<Mutex<Durability>>,
    pub(crate) jobs: ArrayQueue<Job>,
    /// Workers end.
    pub(crate) stop: AtomicBool,
    /// Those that sleep until they are woken.
    pub(crate) beds: [Bed; WORKERS],
    pub(crate) violations: AtomicU64,
    pub(crate) driver_errors: AtomicU64,
    /// CSTS.CFS.
    pub(crate) fatal: AtomicBool,
    /// Pulled out: nothing answers.
    pub(crate) gone: AtomicBool,
    /// The system wants the device back.
    pub(crate) release_requested: AtomicBool,
    /// CSTS.RDY: doorbells mean something.
    pub(crate) ready: AtomicBool,
    /// Feature 06h: the volatile write cache is in use.
    pub(crate) write_cache: AtomicBool,
    /// An opcode, and the status that the next command with it ends with; `None`: it never ends.
    faults: ArrayQueue<(u8, Option<Status>)>,
    /// Blocks that cannot be read: of which namespace, and which.
    bad_blocks: Mutex<Vec<(u32, u64)>>,
    /// Of both.
    fault_count: AtomicUsize,
    started: Instant,
}

impl Shared {
    pub(crate) fn new(
        config: ModelConfig,
        media: Media,
        namespaces: Vec<NamespaceState>,
    ) -> Arc<Shared> {
        let slots = (0..=config.queues)
            .map(|id| Arc::new(Slot::new(id, config.seed)))
            .collect();
        let durability = config
            .track_durability
            .then(|| Mutex::new(Durability::new(config.seed)));
        let write_cache = AtomicBool::new(config.vwc);
        Arc::new(Shared {
            media,
            namespaces,
            slots,
            table: RwLock::default(),
            changing: Mutex::new(()),
            growing: Mutex::new(()),
            admin: Mutex::default(),
            durability,
            jobs: ArrayQueue::new(JOBS),
            stop: AtomicBool::new(false),
            beds: Default::default(),
            violations: AtomicU64::new(0),
            driver_errors: AtomicU64::new(0),
            fatal: AtomicBool::new(false),
            gone: AtomicBool::new(false),
            release_requested: AtomicBool::new(false),
            ready: AtomicBool::new(false),
            write_cache,
            faults: ArrayQueue::new(FAULTS),
            bad_blocks: Mutex::default(),
            fault_count: AtomicUsize::new(0),
            started: Instant::now(),
            config,
        })
    }

    /// There is work, or the end.
    pub(crate) fn wake_workers(&self) {
        self.beds.iter().for_each(Bed::wake);
    }

    /// The driver did what the specification forbids: for tests to assert zero.
    #[cold]
    pub(crate) fn driver_error(&self, what: &'static str) {
        self.driver_errors.fetch_add(1, Ordering::Relaxed);
        self.admin().note_driver_error(what);
    }

    /// The namespace that a command is for. NVM Express Base 2.0, "Namespace Identifier": one that is not valid is
    /// told apart from one that is inactive, and from the broadcast value where a command has no use for it.
    pub(crate) fn namespace(&self, nsid: Nsid) -> Result<&NamespaceState, Status> {
        let index = usize::try_from(nsid.0)
            .ok()
            .and_then(|nsid| nsid.checked_sub(1));
        index
            .and_then(|index| self.namespaces.get(index))
            .ok_or_else(|| self.no_namespace(nsid))
    }

    #[cold]
    fn no_namespace(&self, nsid: Nsid) -> Status {
        let status = if self.is_inactive(nsid) || nsid == Nsid::ALL {
            Status::INVALID_FIELD
        } else {
            Status::INVALID_NAMESPACE
        };
        status.with_dnr()
    }

    /// Valid, and of no namespace.
    pub(crate) fn is_inactive(&self, nsid: Nsid) -> bool {
        let active = u32::try_from(self.namespaces.len()).unwrap_or(u32::MAX);
        (active + 1..=self.max_namespaces()).contains(&nsid.0)
    }

    /// NN.
    pub(crate) fn max_namespaces(&self) -> u32 {
        self.config.max_namespaces.max(self.config.namespaces)
    }

    /// Admin state. Never waited for by a polling core: whoever holds it does so for a few instructions.
    pub(crate) fn admin(&self) -> MutexGuard<'_, Admin> {
        spin(&self.admin)
    }

    /// Every queue and whatever waits in it is forgotten.
    pub(crate) fn forget_queues(&self) {
        self.ready.store(false, Ordering::Release);
        for slot in &self.slots {
            slot.lock().reset();
            slot.unring();
        }
        self.admin().reset();
    }

    /// Makes a new table and hands it to every queue. When this returns nobody uses the old one.
    pub(crate) fn change_table(
        &self,
        change: impl FnOnce(&mut DmaTable) -> Result<(), String>,
    ) -> Result<(), String> {
        let _changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut table = DmaTable::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner));
        change(&mut table)?;
        let table = Arc::new(table);
        for slot in &self.slots {
            slot.lock().set_table(Arc::clone(&table));
        }
        // Waits for copies of workers, which hold no other lock.
        *self.table.write().unwrap_or_else(PoisonError::into_inner) = table;
        Ok(())
    }

    /// Lets a worker reach the driver's memory. Short: an unmap waits for it.
    pub(crate) fn with_dma<R>(
        &self,
        hint: &mut usize,
        use_it: impl FnOnce(&mut Dma<'_>) -> R,
    ) -> R {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        use_it(&mut Dma {
            table: &table,
            hint,
            violations: &self.violations,
        })
    }

    /// Programs the next command with this opcode to fail, or never to end. `false` when too many are programmed.
    pub(crate) fn add_fault(&self, opcode: u8, status: Option<Status>) -> bool {
        let added = self.faults.push((opcode, status)).is_ok();
        if added {
            self.fault_count.fetch_add(1, Ordering::Release);
        }
        added
    }

    /// Reads of a block fail from now on.
    pub(crate) fn add_bad_block(&self, nsid: u32, lba: u64) {
        let mut bad = self
            .bad_blocks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        bad.push((nsid, lba));
        self.fault_count.fetch_add(1, Ordering::Release);
    }

    /// What a command was programmed to end with.
    #[inline]
    pub(crate) fn take_fault(&self, entry: &SubmissionEntry) -> Option<Option<Status>> {
        if self.fault_count.load(Ordering::Relaxed) == 0 {
            return None;
        }
        self.find_fault(entry)
    }

    #[cold]
    fn find_fault(&self, entry: &SubmissionEntry) -> Option<Option<Status>> {
        for _ in 0..FAULTS {
            let Some((wanted, status)) = self.faults.pop() else {
                break;
            };
            if wanted == entry.opcode {
                self.fault_count.fetch_sub(1, Ordering::Relaxed);
                return Some(status);
            }
            // Not ours: back to the end. Dropped when others filled the room meanwhile.
            if self.faults.push((wanted, status)).is_err() {
                self.fault_count.fetch_sub(1, Ordering::Relaxed);
            }
        }
        if entry.opcode != io_opcode::READ {
            return None;
        }
        let range = entry.lba_range();
        let blocks = range.slba..range.slba.saturating_add(range.blocks.into());
        let bad = self
            .bad_blocks
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let nsid = entry.nsid.get();
        let is_bad = |(own, lba): &(u32, u64)| *own == nsid && blocks.contains(lba);
        bad.iter()
            .any(is_bad)
            .then_some(Some(Status::UNRECOVERED_READ_ERROR.with_dnr()))
    }

    /// Time since the controller was made; `turns` is how often the asking queue was serviced.
    pub(crate) fn now(&self, turns: u64) -> Duration {
        match self.config.clock {
            Clock::Monotonic => self.started.elapsed(),
            Clock::Turns => Duration::from_micros(turns),
        }
    }
}

/// Takes a lock that is only ever held briefly, without ever sleeping for it: so nobody has to be woken either.
pub(crate) fn spin<V>(mutex: &Mutex<V>) -> MutexGuard<'_, V> {
    loop {
        match mutex.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => std::hint::spin_loop(),
        }
    }
}
