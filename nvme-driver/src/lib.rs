//! A polled userspace NVMe driver.
//!
//! ```text
//!  Controller<T, Disabled> --enable--> Controller<T, Enabled> --create_queue_pair--> QueuePair<T>  (moves to a core)
//!            |                                  |                                        |
//!            +------- registers, admin queue ---+            SQ, CQ, CID slots, PRP lists, doorbells
//!                                   |                                                    |
//!                               Transport (VFIO | nvme-model)  <------ QueuePort --------+
//! ```
//! The crate knows nothing of virtio and is usable alone. One block written and read back, on the software controller:
//!
//! ```
//! use nvme_driver::dma::{DmaAccess, DmaBuffer};
//! use nvme_driver::spec::{LbaRange, SubmissionEntry};
//! use nvme_driver::{Controller, DataSegment};
//! use nvme_model::{Model, ModelConfig};
//!
//! let model = Model::new(ModelConfig::default())?;
//! let mut controller = Controller::new(model)?.enable(1).map_err(|(_, error)| error)?;
//! let nsid = controller.active_namespaces()?[0];
//! let mut queue = controller.create_queue_pair(64)?;
//! let mut buffer = DmaBuffer::new(controller.dma_space(), 512, DmaAccess::Both)?;
//! let block = LbaRange { slba: 7, blocks: 1 };
//!
//! buffer.write_bytes(0, b"kept");
//! for command in [SubmissionEntry::write(nsid, block, true), SubmissionEntry::read(nsid, block)] {
//!     let data = DataSegment { iova: buffer.iova(0), len: 512 };
//!     queue.submit(command, std::iter::once(data), 512).unwrap();
//!     queue.ring(); // one doorbell for everything submitted
//!     let status = loop {
//!         queue.service(); // a software controller takes its turn; hardware needs none
//!         if let Some(completion) = queue.poll() {
//!             break completion.status;
//!         }
//!     };
//!     assert!(status.is_success(), "{status}");
//! }
//! let mut read = [0; 4];
//! buffer.read_bytes(0, &mut read);
//! assert_eq!(&read, b"kept");
//!
//! controller.delete_queue_pair(queue)?;
//! drop(buffer);
//! controller.shutdown().map_err(|(_, error)| error)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod admin;
mod canary;
mod controller;
pub mod dma;
mod error;
pub mod fault;
pub mod mmio;
mod pages;
mod queue_pair;
pub mod quirks;
pub mod spec;
pub mod transport;
pub mod vfio;

pub use admin::AdminCompletion;
pub use controller::{Controller, DisableResult, Disabled, Enabled, Health, Namespace};
pub use error::{Error, Result};
pub use queue_pair::prp::{DataSegment, PrpError};
pub use queue_pair::{
    Completion, MAX_ENTRIES, MAX_TRANSFER, QueuePair, QueuePairCounters, SubmitError,
};
