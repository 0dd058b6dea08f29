//! Tandem: a polled-mode userspace storage server. Each guest virtqueue rides in tandem with one NVMe queue
//! pair, on one pinned core that busy-polls both rings.

pub mod block;
pub mod config;
pub mod plan;
pub mod sim;
pub mod virtio;
