//! A polled userspace NVMe driver.
//!
//! ```text
//!  Controller<T, Disabled> --enable--> Controller<T, Enabled> --create_queue_pair--> QueuePair<T>  (moves to a core)
//!            |                                  |                                        |
//!            +------- registers, admin queue ---+            SQ, CQ, CID slots, PRP lists, doorbells
//!                                   |                                                    |
//!                               Transport (VFIO | nvme-model)  <------ QueuePort --------+
//! ```
//! The crate knows nothing of virtio and is usable alone.

mod admin;
mod controller;
pub mod dma;
mod error;
pub mod mmio;
mod queue_pair;
pub mod spec;
pub mod transport;

pub use controller::{Controller, DisableResult, Disabled, Enabled, Namespace};
pub use error::{Error, Result};
pub use queue_pair::prp::{DataSegment, PrpError};
pub use queue_pair::{
    Completion, MAX_ENTRIES, MAX_TRANSFER, QueuePair, QueuePairCounters, SubmitError,
};
