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

pub mod dma;
pub mod mmio;
pub mod spec;
pub mod transport;
