//! Virtio, device side: guest memory, virtqueues, the descriptor walk, the block device, the SCSI host.
//!
//! Promises that nothing a guest puts into its memory makes this code read or write outside the mapped regions,
//! loop without a bound, allocate, or panic. Knows nothing of NVMe, of vhost-user or of how memory came to be
//! mapped: everything here runs on byte arrays. Reading order: [`memory`] (where a guest address leads),
//! [`virtqueue`] (the rings; `split` and `packed` have their ordering), [`chain`] (one request's descriptors), [`blk`] and
//! [`scsi`] (what it asks), [`relay`] (a virtqueue between two lanes).

pub mod blk;
pub mod chain;
pub mod memory;
mod packed;
pub mod relay;
pub mod scsi;
pub(crate) mod shared;
mod split;
pub mod virtqueue;
