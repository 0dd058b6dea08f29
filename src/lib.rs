//! Tandem: a polled-mode userspace storage server. Each guest virtqueue rides in tandem with one NVMe queue
//! pair, on one pinned core that busy-polls both rings.

pub mod block;
pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod plan;
pub mod reactor;
pub mod stats;
pub mod vhost;
pub mod virtio;
