//! How the driver reaches a controller: registers, one port of doorbells per queue pair, and a DMA domain.
//!
//! Implemented by VFIO for real SSDs and by the crate `nvme-model` for the software controller. Dispatch is static:
//! a [`crate::QueuePair`] is compiled for its transport and its port is two stores. Only [`DmaDomain`], which no
//! request touches, is a trait object.

mod bell;

use std::any::Any;
use std::fmt::{self, Debug};
use std::ops::RangeInclusive;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::Duration;

pub use bell::{Attention, Bell};

use crate::quirks::Quirks;
use crate::spec::QueueId;

/// An address as the device sees it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Iova(pub u64);

impl Debug for Iova {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Iova({:#x})", self.0)
    }
}

/// Which side of a mapping the device may touch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DmaAccess {
    /// The device only reads: submission queues, PRP lists (G4).
    DeviceReads,
    /// The device only writes: completion queues.
    DeviceWrites,
    /// Both.
    Both,
}

impl DmaAccess {
    /// The device may read.
    #[must_use]
    pub fn allows_read(self) -> bool {
        self != DmaAccess::DeviceWrites
    }

    /// The device may write.
    #[must_use]
    pub fn allows_write(self) -> bool {
        self != DmaAccess::DeviceReads
    }
}

/// Why memory could not be made reachable for the device, or be taken back.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaError {
    /// No free window is left among the ranges that the device can address.
    #[error("no free I/O virtual address window of {len:#x} bytes is left for this device")]
    NoWindow {
        /// Bytes asked for.
        len: u64,
    },
    /// The domain refused.
    #[error("cannot {action} {len:#x} bytes at IOVA {iova:#x}: {reason}")]
    Refused {
        /// "map" or "unmap".
        action: &'static str,
        /// Start of the window.
        iova: u64,
        /// Its length in bytes.
        len: u64,
        /// What the domain said, and what to do.
        reason: String,
    },
    /// Memory that cannot be given by its physical addresses.
    #[error("cannot give the device {len:#x} bytes by their physical addresses: {reason}")]
    NotPhysical {
        /// Bytes.
        len: u64,
        /// What is in the way, and what to do.
        reason: String,
    },
    /// A device came back behind an IOMMU and was not before, or the other way round.
    #[error("the device was {was}behind an IOMMU and is {is}behind one now")]
    Changed {
        /// "not " or nothing.
        was: &'static str,
        /// The other of the two.
        is: &'static str,
    },
    /// Memory for the buffer itself could not be had.
    #[error("cannot allocate a DMA buffer of {len:#x} bytes: {reason}")]
    NoMemory {
        /// Bytes asked for.
        len: u64,
        /// What the system said.
        reason: String,
    },
}

/// The IOMMU's (or the model's) table for one device.
pub trait DmaDomain: Send + Sync + Debug {
    /// Ranges of I/O virtual addresses that the device can reach and that nothing else (such as the interrupt
    /// window at `fee0_0000h`) occupies.
    fn usable_ranges(&self) -> Vec<RangeInclusive<u64>>;

    /// Lets the device reach `len` bytes at `hva` as `iova`. The three are multiples of 4096.
    ///
    /// # Safety
    /// The memory must stay mapped in this process until [`DmaDomain::unmap`] of the same window returned `Ok`,
    /// and nobody may hold a Rust reference to bytes that the device may write (I1).
    ///
    /// # Errors
    /// [`DmaError::Refused`] with the reason; nothing is mapped then.
    unsafe fn map(
        &self,
        iova: Iova,
        hva: NonNull<u8>,
        len: u64,
        access: DmaAccess,
    ) -> Result<(), DmaError>;

    /// Takes back exactly one window that was mapped. After `Ok` the device cannot reach it.
    ///
    /// # Errors
    /// [`DmaError::Refused`]; the caller must treat the memory as still reachable.
    fn unmap(&self, iova: Iova, len: u64) -> Result<(), DmaError>;

    /// The NUMA node that memory for the device is best taken from; `None` when it makes no difference.
    fn numa_node(&self) -> Option<u32> {
        None
    }

    /// How memory is given to a device behind which nothing translates addresses. Where there is this, there are no
    /// windows, and [`DmaDomain::map`] and [`DmaDomain::unmap`] are not called.
    fn physical(&self) -> Option<Arc<dyn PhysicalMemory>> {
        None
    }
}

/// Memory of this process by its physical addresses: all that a device without an IOMMU understands. Needs no device:
/// memory can be asked for while there is none.
pub trait PhysicalMemory: Send + Sync + Debug {
    /// Says where `len` bytes at `hva` (both multiples of 4096) are, and keeps them there until the answer's `keeper`
    /// is dropped.
    ///
    /// # Safety
    /// The memory must stay mapped in this process for as long as `keeper` lives, and nobody may hold a Rust reference
    /// to bytes that the device may write (I1).
    ///
    /// # Errors
    /// [`DmaError::NotPhysical`] with the reason.
    unsafe fn pin(&self, hva: NonNull<u8>, len: u64) -> Result<Pinned, DmaError>;
}

/// A piece of memory that is contiguous for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// Where the device sees the first byte.
    pub iova: Iova,
    /// Bytes, at least 1.
    pub len: u64,
}

/// Memory that stays where it is.
pub struct Pinned {
    /// Where: the pieces in order. At least one, and together as long as the memory.
    pub runs: Vec<Run>,
    /// Lets go of it when dropped.
    pub keeper: Box<dyn Any + Send + Sync>,
}

impl Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pinned")
            .field("runs", &self.runs)
            .finish_non_exhaustive()
    }
}

/// What a device's bus has to say about it, beside what its registers say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The system wants the device back, and waits: it is to be unplugged, or bound to another driver.
    ReleaseRequested,
    /// The bus reported an error of the device that was not corrected.
    BusError,
}

/// What a controller answers when it is asked for an interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Armed {
    /// The next completion makes the interrupt's file readable.
    Yes,
    /// Nothing will: only looking finds the next completion.
    Never,
    /// There is something to look at already.
    Pending,
}

/// The doorbells of one queue pair. Moves with its queue pair to the thread that polls it (I7).
pub trait QueuePort: Send + Debug {
    /// Writes the submission queue tail doorbell. Everything stored before is visible to the device first.
    fn ring_sq(&mut self, tail: u16);

    /// Writes the completion queue head doorbell.
    fn ring_cq(&mut self, head: u16);

    /// Gives a software controller its turn on this core. Real hardware needs none.
    #[inline]
    fn service(&mut self) {}

    /// The eventfd of this queue pair's interrupt, which nobody has to read: it is to be watched edge-triggered. `None`
    /// when there is no interrupt.
    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Asks for an interrupt at the next completion. What completed before is to be looked for after this.
    fn arm(&mut self) -> Armed {
        Armed::Never
    }

    /// Asks for no interrupts: the queue pair is polled.
    fn disarm(&mut self) {}
}

/// A controller's registers and DMA domain, owned by the thread that controls the device.
pub trait Transport: Send {
    /// The doorbells of one queue pair.
    type Port: QueuePort;

    /// Reads a 32-bit register at a byte offset. All ones when the device is gone.
    fn read32(&mut self, offset: u32) -> u32;

    /// Reads a 64-bit register (as two 32-bit reads where the device wants that).
    fn read64(&mut self, offset: u32) -> u64;

    /// Writes a 32-bit register.
    fn write32(&mut self, offset: u32, value: u32);

    /// Writes a 64-bit register, low half first where it must be split.
    fn write64(&mut self, offset: u32, value: u64);

    /// The doorbells of `queue`; `stride` is CAP.DSTRD in bytes. `None` when they lie beyond what can be reached.
    fn port(&mut self, queue: QueueId, stride: u32) -> Option<Self::Port>;

    /// Makes interrupts for queue pairs 1 to `queues`, as far as there are any; none is asked for yet, and ports made from
    /// now on have theirs ([`QueuePort::interrupt`]). `true` when they are those of MSI-X, with which the mask registers
    /// of the controller must be left alone.
    fn enable_interrupts(&mut self, _queues: u16) -> bool {
        false
    }

    /// The interrupt vector of a queue pair's completions. `None` when it has none.
    fn vector(&self, _queue: QueueId) -> Option<u16> {
        None
    }

    /// The device's DMA domain.
    fn dma_domain(&self) -> Arc<dyn DmaDomain>;

    /// Waits for about `duration` between two looks at a register; the software controller counts it as time.
    fn pause(&mut self, duration: Duration) {
        std::thread::sleep(duration);
    }

    /// Something that the bus has said since the last call.
    fn notice(&mut self) -> Option<Notice> {
        None
    }

    /// Puts back what a reset of the function by somebody else may have undone: access to registers and memory.
    fn restore(&mut self) {}

    /// How this device departs from the specification.
    fn quirks(&self) -> Quirks {
        Quirks::default()
    }

    /// What error messages call this device.
    fn name(&self) -> String;
}
