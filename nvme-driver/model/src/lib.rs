//! A software NVMe controller: registers, admin and I/O command sets, its own IOMMU; memory, an image file
//! or nothing behind it.
//!
//! ```text
//!  driver --registers--> Registers ---- enable, reset, shutdown ----> Slot 0: admin queue
//!         --doorbells--> Slot n: fetch, carry out (io), post <--inline on the core that polls queue n
//!                              |                 \--long work--> workers --> media (memory | image file)
//!                              \-- every address through iommu: a violation is counted and fails the command
//! ```
//! It is strict: what the specification forbids is counted ([`ModelHandle::driver_errors`]) or fails as the
//! specification says, so that a driver that works here has not been forgiven anything. It shares the wire structures
//! and the transport seam with the driver and no other code. No interrupt vectors, no SGLs, no metadata, no fused commands;
//! each submission queue has the completion queue of its own identifier.
//!
//! A queue is serviced by the thread that polls it ([`nvme_driver::transport::QueuePort::service`]): no thread of its
//! own, no allocation, no system call. A poller that wants to sleep can, while all that it waits for is at the workers.
//! Start at [`Model`], then `queue`.

mod admin;
mod durability;
mod io;
mod iommu;
mod media;
mod queue;
mod registers;
mod shared;
mod worker;

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use nvme_driver::spec::{Nsid, PAGE_SIZE, QueueId, Status};
use nvme_driver::transport::{Armed, Bell, DmaDomain, Notice, QueuePort, Transport};

pub use queue::IoCounters;

use iommu::Domain;
use media::Media;
use queue::Slot;
use registers::Registers;
use shared::{NamespaceState, Shared, spin};
use worker::Workers;

const MODEL_NUMBER: &str = "Tandem embedded controller";
/// On [`Medium::Null`]: nobody who looks at the device takes it for a disk.
const NULL_MODEL_NUMBER: &str = "Tandem null (keeps no data)";
/// NVMe 1.4.0, as VS and the identify data say it: 2.0 wants Identify data and log pages that nobody here would read.
const VERSION: u32 = 0x0001_0400;

/// Where blocks are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Memory: zeroes at first, gone with the controller.
    Ram,
    /// An image file or a block device.
    File {
        /// Created when it is absent and a size is given.
        path: PathBuf,
    },
    /// Nowhere: what is written is lost, and a read leaves the driver's buffer as it was. Everything but the copy is
    /// done, every PRP entry read and checked included; nothing is allocated by size. For measuring.
    Null,
}

/// What the latency of commands is measured with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// Time of day goes by.
    Monotonic,
    /// Each service round of a queue is a microsecond: the same run every time.
    Turns,
}

/// What a controller is made of. The default is a small disk in memory.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// What error messages call it.
    pub name: String,
    /// Where blocks are kept.
    pub medium: Medium,
    /// Bytes of one namespace. 0, for an image file: the file's length in equal parts.
    pub size: u64,
    /// Namespaces, with identifiers from 1.
    pub namespaces: u32,
    /// The largest namespace identifier that is valid (NN), if there are fewer namespaces: those above are inactive.
    pub max_namespaces: u32,
    /// Bytes of a logical block: 512 or 4096.
    pub block_size: u32,
    /// I/O queue pairs that it grants at most.
    pub queues: u16,
    /// Entries of its largest queue, 2 to 65536 (CAP.MQES + 1).
    pub mqes: u32,
    /// Doorbells are 4 << `dstrd` bytes apart (CAP.DSTRD), 0 to 15.
    pub dstrd: u8,
    /// CAP.TO in units of 500 ms.
    pub timeout_units: u8,
    /// How long CSTS.RDY takes to follow CC.EN.
    pub ready_delay: Duration,
    /// Largest transfer of one command in bytes, a power of two of pages; `None` is no limit.
    pub mdts_bytes: Option<u64>,
    /// A volatile write cache is present.
    pub vwc: bool,
    /// Added to each I/O command.
    pub latency: Duration,
    /// And up to this much more, so that commands complete out of order.
    pub jitter: Duration,
    /// What both are measured with.
    pub clock: Clock,
    /// Who polls a queue may sleep: workers wake it ([`QueuePort::interrupt`]), and are woken instead of looking for work.
    /// Commands that are delayed need the poller's turns all the same.
    pub interrupts: bool,
    /// With `interrupts`: somebody calls [`ModelHandle::carry_on`], so that delayed commands complete by themselves.
    pub by_itself: bool,
    /// Remember what a power failure would lose ([`ModelHandle::fail_power`]); memory only, and slow.
    pub track_durability: bool,
    /// Serial number, at most 20 characters of ASCII.
    pub serial: String,
    /// Where random choices come from.
    pub seed: u64,
}

impl Default for ModelConfig {
    fn default() -> ModelConfig {
        ModelConfig {
            name: "model".to_owned(),
            medium: Medium::Ram,
            size: 64 << 20,
            namespaces: 1,
            max_namespaces: 1,
            block_size: 512,
            queues: 64,
            mqes: 1024,
            dstrd: 0,
            timeout_units: 10,
            ready_delay: Duration::from_millis(2),
            mdts_bytes: Some(128 << 10),
            vwc: true,
            latency: Duration::ZERO,
            jitter: Duration::ZERO,
            clock: Clock::Monotonic,
            interrupts: false,
            by_itself: false,
            track_durability: false,
            serial: "model-0".to_owned(),
            seed: 0,
        }
    }
}

/// Why a controller could not be made.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A parameter that no controller can have.
    #[error("{what} is {value}: {needed}")]
    Parameter {
        /// The parameter.
        what: &'static str,
        /// Its value.
        value: String,
        /// What it must be.
        needed: &'static str,
    },
    /// The image file.
    #[error("cannot {doing} the image {path}: {reason}")]
    Image {
        /// What was attempted.
        doing: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        reason: String,
    },
    /// Memory for the medium.
    #[error("cannot get {size} bytes of memory for the medium: {reason}")]
    Memory {
        /// Bytes asked for.
        size: u64,
        /// What the system said.
        reason: String,
    },
    /// A namespace cannot have the size that was asked for.
    #[error("namespace {nsid} cannot have {bytes} bytes: {reason}")]
    Resize {
        /// Which.
        nsid: u32,
        /// Bytes asked for.
        bytes: u64,
        /// What is against it.
        reason: String,
    },
    /// Threads for the medium.
    #[error("cannot start the media workers: {0}")]
    Workers(std::io::Error),
}

/// A software controller, as a driver's transport.
#[derive(Debug)]
pub struct Model {
    registers: Registers,
    shared: Arc<Shared>,
    _workers: Workers,
}

impl Model {
    /// Powers a controller on: disabled, its namespaces ready.
    ///
    /// # Errors
    /// [`ModelError`].
    pub fn new(config: ModelConfig) -> Result<Model, ModelError> {
        check(&config)?;
        let wanted = config.size.checked_mul(config.namespaces.into());
        let wanted = wanted.ok_or_else(|| ModelError::Parameter {
            what: "the size of all namespaces",
            value: format!("{} times {}", config.namespaces, config.size),
            needed: "it must fit 64 bits",
        })?;
        let (media, size) = Media::open(&config.medium, wanted)?;
        let namespaces = namespaces(&config, size)?;
        let shared = Shared::new(config, media, namespaces);
        let workers = Workers::start(&shared).map_err(ModelError::Workers)?;
        Ok(Model {
            registers: Registers::new(Arc::clone(&shared)),
            shared,
            _workers: workers,
        })
    }

    /// The other end: what a test or an operator sees and does, beside the driver.
    #[must_use]
    pub fn handle(&self) -> ModelHandle {
        ModelHandle {
            shared: Arc::clone(&self.shared),
        }
    }
}

fn check(config: &ModelConfig) -> Result<(), ModelError> {
    let page = PAGE_SIZE as u64;
    // MDTS 0 would be no limit: the smallest that can be said is two pages.
    let mdts = config.mdts_bytes.unwrap_or(2 * page);
    let rules = [
        (
            config.namespaces >= 1,
            "the number of namespaces",
            u64::from(config.namespaces),
            "at least 1",
        ),
        (
            matches!(config.block_size, 512 | 4096),
            "the block size",
            config.block_size.into(),
            "512 or 4096 bytes",
        ),
        (
            config.queues >= 1,
            "the number of queue pairs",
            config.queues.into(),
            "at least 1",
        ),
        (
            (2..=65536).contains(&config.mqes),
            "the largest queue",
            config.mqes.into(),
            "2 to 65536 entries",
        ),
        (
            config.dstrd <= 15,
            "the doorbell stride",
            config.dstrd.into(),
            "0 to 15",
        ),
        (
            mdts.is_power_of_two() && mdts >= 2 * page,
            "the largest transfer",
            mdts,
            "a power of two of at least 8192 bytes",
        ),
        (
            matches!(config.medium, Medium::File { .. }) || config.size > 0,
            "the size of a namespace",
            config.size,
            "at least one block",
        ),
        (
            config.medium == Medium::Ram || !config.track_durability,
            "tracking of durability on another medium",
            1,
            "it is for memory only",
        ),
    ];
    let broken = rules.into_iter().find(|(holds, ..)| !holds);
    broken.map_or(Ok(()), |(_, what, value, needed)| {
        Err(ModelError::Parameter {
            what,
            value: value.to_string(),
            needed,
        })
    })
}

/// Equal parts of the medium, in whole blocks.
fn namespaces(config: &ModelConfig, size: u64) -> Result<Vec<NamespaceState>, ModelError> {
    let block_shift = config.block_size.trailing_zeros();
    let blocks = (size / u64::from(config.namespaces)) >> block_shift;
    if blocks == 0 {
        return Err(ModelError::Parameter {
            what: "the size of a namespace",
            value: (size / u64::from(config.namespaces)).to_string(),
            needed: "at least one block",
        });
    }
    let states = (1..=config.namespaces).map(|nsid| {
        let id = identity(&config.serial, nsid);
        let mut eui64 = [0; 8];
        eui64.copy_from_slice(&id[8..]);
        NamespaceState {
            nsid: Nsid(nsid),
            blocks: blocks.into(),
            block_shift,
            offset: (u64::from(nsid) - 1) * (blocks << block_shift),
            nguid: id,
            eui64,
            uuid: as_uuid(id),
        }
    });
    Ok(states.collect())
}

/// An identifier that is the same whenever a controller of this serial number is started (FNV-1a, twice).
fn identity(serial: &str, nsid: u32) -> [u8; 16] {
    let hash = |salt: u8| {
        let bytes = serial.bytes().chain(nsid.to_le_bytes()).chain([salt]);
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        })
    };
    let mut id = [0; 16];
    id[..8].copy_from_slice(&hash(1).to_be_bytes());
    id[8..].copy_from_slice(&hash(2).to_be_bytes());
    // The OUI stands at byte 8 of an NGUID: locally administered, not a group.
    id[8] = id[8] & 0xfc | 2;
    id
}

/// RFC 9562 version 8: custom contents.
fn as_uuid(mut id: [u8; 16]) -> [u8; 16] {
    id[6] = id[6] & 0x0f | 0x80;
    id[8] = id[8] & 0x3f | 0x80;
    id
}

impl Transport for Model {
    type Port = ModelPort;

    fn read32(&mut self, offset: u32) -> u32 {
        self.registers.read32(offset)
    }

    fn read64(&mut self, offset: u32) -> u64 {
        u64::from(self.read32(offset)) | u64::from(self.read32(offset + 4)) << 32
    }

    fn write32(&mut self, offset: u32, value: u32) {
        self.registers.write32(offset, value);
    }

    fn write64(&mut self, offset: u32, value: u64) {
        // Both halves fit 32 bits.
        self.write32(offset, (value & 0xffff_ffff) as u32);
        self.write32(offset + 4, (value >> 32) as u32);
    }

    fn port(&mut self, queue: QueueId, stride: u32) -> Option<ModelPort> {
        let slot = self.shared.slots.get(usize::from(queue.0));
        if slot.is_none() || stride != 4 << self.shared.config.dstrd {
            self.shared
                .driver_error("doorbells of an impossible queue or stride");
        }
        let slot = Arc::clone(slot?);
        let bell = self.shared.config.interrupts.then(|| slot.lock().bell());
        Some(ModelPort {
            slot,
            // Without a file descriptor it is polled.
            bell: bell.flatten(),
            shared: Arc::clone(&self.shared),
        })
    }

    fn dma_domain(&self) -> Arc<dyn DmaDomain> {
        Arc::new(Domain(Arc::clone(&self.shared)))
    }

    fn notice(&mut self) -> Option<Notice> {
        let asked = self.shared.release_requested.swap(false, Ordering::Relaxed);
        asked.then_some(Notice::ReleaseRequested)
    }

    fn pause(&mut self, duration: Duration) {
        if !self.registers.advance(duration) {
            std::thread::sleep(duration);
        }
    }

    fn name(&self) -> String {
        self.shared.config.name.clone()
    }
}

/// The doorbells of one queue pair, and the controller's turn on it.
#[derive(Debug)]
pub struct ModelPort {
    slot: Arc<Slot>,
    bell: Option<Arc<Bell>>,
    shared: Arc<Shared>,
}

impl ModelPort {
    #[inline]
    fn slot(&self) -> Option<&Slot> {
        let ready = self.shared.ready.load(Ordering::Relaxed);
        if !ready && !self.shared.gone.load(Ordering::Relaxed) {
            self.shared.driver_error("doorbell while CSTS.RDY is 0");
        }
        ready.then_some(&*self.slot)
    }
}

impl QueuePort for ModelPort {
    #[inline]
    fn ring_sq(&mut self, tail: u16) {
        if let Some(slot) = self.slot() {
            slot.ring_sq(tail);
        }
    }

    #[inline]
    fn ring_cq(&mut self, head: u16) {
        if let Some(slot) = self.slot() {
            slot.ring_cq(head);
        }
    }

    // Apart, so that what a turn costs is the driver's or the controller's (scripts/bench).
    #[inline(never)]
    fn service(&mut self) {
        self.slot.service(&self.shared);
    }

    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.bell.as_deref().map(AsFd::as_fd)
    }

    fn arm(&mut self) -> Armed {
        let Some(bell) = &self.bell else {
            return Armed::Never;
        };
        bell.attention().listen();
        // After that: what a worker finishes from now on is told.
        self.slot.waits_for(&self.shared)
    }

    fn disarm(&mut self) {
        if let Some(bell) = &self.bell {
            bell.attention().ignore();
        }
    }
}

/// What a test or an operator sees of a controller, and can do to it. Clones reach the same one.
#[derive(Clone, Debug)]
pub struct ModelHandle {
    shared: Arc<Shared>,
}

impl ModelHandle {
    /// Accesses to addresses that were not mapped for them. Each failed its command, or the controller.
    #[must_use]
    pub fn iommu_violations(&self) -> u64 {
        self.shared.violations.load(Ordering::Relaxed)
    }

    /// What the driver did against the specification: doorbells, register writes, command identifiers.
    #[must_use]
    pub fn driver_errors(&self) -> u64 {
        self.shared.driver_errors.load(Ordering::Relaxed)
    }

    /// The last of them, in words.
    #[must_use]
    pub fn last_driver_error(&self) -> Option<&'static str> {
        self.shared.admin().last_driver_error()
    }

    /// What all I/O queues carried out so far.
    #[must_use]
    pub fn io_counters(&self) -> IoCounters {
        self.shared.io_counters()
    }

    /// Copies bytes of a namespace out, past the driver.
    ///
    /// # Panics
    /// When the namespace or the range does not exist, or the image cannot be read.
    pub fn media_read(&self, nsid: Nsid, offset: u64, bytes: &mut [u8]) {
        let namespace = self.shared.namespace(nsid).expect("no such namespace");
        let len = namespace.bytes();
        let end = offset.checked_add(bytes.len() as u64);
        assert!(end.is_some_and(|end| end <= len), "beyond the namespace");
        let read = self.shared.media.read(namespace.offset + offset, bytes);
        read.expect("cannot read the image");
    }

    /// The next I/O command with this opcode ends with `status` and is not carried out. `false` when too
    /// many are programmed already.
    pub fn fail_next(&self, opcode: u8, status: Status) -> bool {
        self.shared.add_fault(opcode, Some(status))
    }

    /// The next I/O command with this opcode never ends, unless it is aborted. `false` when too many are programmed.
    pub fn hang_next(&self, opcode: u8) -> bool {
        self.shared.add_fault(opcode, None)
    }

    /// Whoever reads that block from now on gets Unrecovered Read Error, and no other one.
    pub fn spoil(&self, nsid: Nsid, lba: u64) {
        self.shared.add_bad_block(nsid.0, lba);
    }

    /// A round of every I/O queue, as hardware goes on by itself while its driver sleeps; who sleeps is told of completions.
    /// For controllers that were made `by_itself`.
    pub fn carry_on(&self) {
        for slot in self.shared.slots.iter().skip(1) {
            slot.lock().carry_on(slot, &self.shared);
        }
    }

    /// The controller stops: CSTS.CFS, until it is reset.
    pub fn break_down(&self) {
        self.shared.fatal.store(true, Ordering::Relaxed);
    }

    /// The system wants the device back, as when it is to be unplugged in good order.
    pub fn ask_for_release(&self) {
        self.shared.release_requested.store(true, Ordering::Relaxed);
    }

    /// The device is pulled out in mid-work: its registers read all ones, its doorbells lead nowhere, it reaches no
    /// memory any more.
    pub fn pull_out(&self) {
        self.shared.gone.store(true, Ordering::SeqCst);
        self.shared.forget_queues();
    }

    /// The device is put in again after [`ModelHandle::pull_out`], or after its driver let go of it: a controller as
    /// after power-on, with the same medium. The transport before must have been dropped.
    ///
    /// # Errors
    /// [`ModelError::Workers`].
    pub fn plug_in(&self) -> Result<Model, ModelError> {
        let shared = Arc::clone(&self.shared);
        shared.forget_queues();
        // Cannot fail: clearing has no conflicts.
        let _ = shared.change_table(|table| {
            table.clear();
            Ok(())
        });
        shared.fatal.store(false, Ordering::Relaxed);
        shared.gone.store(false, Ordering::SeqCst);
        let workers = Workers::start(&shared).map_err(ModelError::Workers)?;
        Ok(Model {
            registers: Registers::new(Arc::clone(&shared)),
            shared,
            _workers: workers,
        })
    }

    /// Makes the one namespace of a controller larger, and reports that by an asynchronous event. Memory grows, and so does
    /// an image file. Says how many bytes it has: as many as asked for.
    ///
    /// # Errors
    /// [`ModelError::Resize`] for fewer bytes than it has, for parts of a block, for one of several namespaces, and for more
    /// than the medium can have. Nothing has changed then.
    pub fn resize(&self, nsid: Nsid, bytes: u64) -> Result<u64, ModelError> {
        self.shared.resize(nsid, bytes)
    }

    /// A namespace has fewer blocks from now on, or none, as an SSD's own tools may leave it; reported by an asynchronous event.
    /// The medium keeps what it has. `false` if it has no more than that, or is not there.
    pub fn cut_off(&self, nsid: Nsid, blocks: u64) -> bool {
        let growing = &self.shared.growing;
        let _growing = growing.lock().unwrap_or_else(PoisonError::into_inner);
        let namespace = self.shared.namespace(nsid);
        let namespace = namespace.ok().filter(|own| blocks < own.blocks());
        if let Some(namespace) = namespace {
            namespace.set_blocks(blocks);
            self.shared.admin().namespace_changed(nsid);
        }
        namespace.is_some()
    }

    /// Looks whether the image has grown, as a controller does whose medium is somebody else's: the whole blocks that are new
    /// belong to the namespace, and an asynchronous event reports them.
    ///
    /// # Errors
    /// [`ModelError`] when it has shrunk, when it cannot be measured, or when it is of several namespaces and has grown.
    pub fn look_at_medium(&self) -> Result<(), ModelError> {
        self.shared.look_at_medium()
    }

    /// Reports a changed namespace by an asynchronous event.
    pub fn report_changed_namespace(&self, nsid: Nsid) {
        self.shared.admin().namespace_changed(nsid);
    }

    /// Sets the Critical Warning bits of the SMART log, and reports them by an asynchronous event.
    pub fn set_critical_warning(&self, bits: u8) {
        self.shared.admin().set_critical_warning(bits);
    }

    /// The power fails: of the sectors written since the last flush, without FUA, a random half is lost. Says how many
    /// sectors that were. Nothing may be in flight.
    ///
    /// # Panics
    /// When the controller was not made to track durability.
    pub fn fail_power(&self) -> usize {
        let (Some(durability), Media::Ram(ram)) = (&self.shared.durability, &self.shared.media)
        else {
            panic!("this controller does not track durability");
        };
        spin(durability).fail_power(ram)
    }
}

impl Shared {
    fn resize(&self, nsid: Nsid, bytes: u64) -> Result<u64, ModelError> {
        let refuse = |reason: String| ModelError::Resize {
            nsid: nsid.0,
            bytes,
            reason,
        };
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let namespace = self.namespace(nsid);
        let namespace = namespace.map_err(|_| refuse("there is no such namespace".to_owned()))?;
        let (own, block) = (namespace.bytes(), 1_u64 << namespace.block_shift);
        if self.namespaces.len() > 1 {
            return Err(refuse(format!(
                "{} namespaces share the medium in equal parts, so none of them can grow (give each a device of its own)",
                self.namespaces.len()
            )));
        }
        if bytes < own {
            return Err(refuse(format!(
                "it has {own}, and shrinking would lose what is in the rest"
            )));
        }
        if !bytes.is_multiple_of(block) {
            return Err(refuse(format!("its blocks have {block} bytes")));
        }
        if bytes > own {
            self.media.grow(bytes).map_err(refuse)?;
            self.has_grown(namespace, bytes);
        }
        Ok(bytes)
    }

    fn look_at_medium(&self) -> Result<(), ModelError> {
        let _growing = self.growing.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(len) = self.media.measure()? else {
            return Ok(());
        };
        let own: u64 = self.namespaces.iter().map(NamespaceState::bytes).sum();
        let refuse = |reason: &str| ModelError::Resize {
            nsid: 1,
            bytes: len,
            reason: reason.to_owned(),
        };
        let (namespace, several) = match self.namespaces.as_slice() {
            [] => return Ok(()),
            [namespace, rest @ ..] => (namespace, !rest.is_empty()),
        };
        let bytes = len >> namespace.block_shift << namespace.block_shift;
        if bytes < own {
            return Err(refuse(
                "the image has become shorter than it is: blocks beyond its end cannot be read until it has its length again",
            ));
        }
        // Equal parts of whole blocks may leave something over.
        let part = 1_u64 << namespace.block_shift;
        if several && bytes - own >= part * self.namespaces.len() as u64 {
            return Err(refuse(
                "several namespaces share the image in equal parts, so none of them can grow (give each a device of its own)",
            ));
        }
        if !several && bytes > own {
            self.has_grown(namespace, bytes);
        }
        Ok(())
    }

    fn has_grown(&self, namespace: &NamespaceState, bytes: u64) {
        namespace.set_blocks(bytes >> namespace.block_shift);
        self.admin().namespace_changed(namespace.nsid);
    }

    fn io_counters(&self) -> IoCounters {
        let mut sum = IoCounters::default();
        for slot in self.slots.iter().skip(1) {
            sum.add(&slot.lock().counters());
        }
        sum
    }
}
