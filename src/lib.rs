//! Tandem: a polled-mode userspace storage server. Each guest virtqueue rides in tandem with one NVMe queue pair, on
//! one pinned core that busy-polls both rings: no lock, no allocation, no interrupt and no system call per request.
//! Where it is asked to ([`config::Polling::Adaptive`]) a core sleeps while nothing happens.
//!
//! ```text
//!  guest avail ring                                                 guest used ring, then the call eventfd
//!       | virtio::virtqueue   one look at the ring a turn                 ^ used elements, used.idx, one signal
//!       v                                                                 |
//!  virtio::chain      each descriptor copied once               datapath::lane   last command of a request?
//!       v                                                                 |
//!  virtio::blk        header -> block::BlockOp, checked         QueuePair::poll  phase, CID -> context
//!       v                                                                 |
//!  datapath::lane     PRPs in place, split at MDTS, or bounced            |
//!       v                                                                 |
//!  QueuePair::submit  SQEs; one doorbell a turn  ------------->  NVMe controller (or nvme-model) ---+
//! ```
//! A turn goes: completions first (they free slots), submissions, one doorbell, then the guests' used rings.
//!
//! # Rooms
//! | room | what it is |
//! |---|---|
//! | [`cli`], [`config`], [`plan`] | flags and TOML -> `Config` -> `Plan`, before anything is touched |
//! | [`control`] | the life of the process: devices, sockets, one [`control::session`] per front-end |
//! | [`host`] | the machine's SSDs: who uses them, handing them to vfio-pci and back |
//! | [`vhost`] | a front-end's memory: mapped here and for the device, faults contained |
//! | [`reactor`] | a pinned core with a mailbox and pollers; when it sleeps and what wakes it |
//! | [`datapath`] | lanes (a virtqueue in service) and pollers (a queue pair and its lanes) |
//! | [`virtio`] | virtqueues (split and packed), descriptor walk, virtio-blk, virtio-scsi; knows no NVMe |
//! | [`scsi`] | SCSI commands, sense data, logical units; knows neither virtio nor NVMe |
//! | [`block`] | the vocabulary between the two |
//! | [`stats`] | counters of each virtqueue |
//! | [`mod@bench`] | the latency benchmark: this server's parts, other servers and the kernel, in turn |
//! | [`sim`] | a simulated guest driver, for tests and benchmarks |
//!
//! The NVMe side is the crate `nvme-driver`, usable alone; `nvme-model` is the embedded controller behind it.
//! Dependencies point downwards only; `tests/tidy.rs` holds that. Start reading at [`datapath::lane`].
//!
//! # Invariants
//! SAFETY comments and assertions cite these numbers.
//!
//! - **I1** No Rust reference is made to bytes that a guest or the device also writes; they are reached as atomics or
//!   copied.
//! - **I2** A mapping outlives every command that names it: only a drained lane gives up its memory.
//! - **I3** A CID is outstanding at most once per submission queue.
//! - **I4** A submission queue slot is reused only after SQHD passed it, a CID only after its completion.
//! - **I5** Every head taken from the avail ring is returned to the used ring exactly once.
//! - **I6** What a guest wrote is read once, validated, and then only the copy is used.
//! - **I7** One thread touches a queue pair or a virtqueue: ownership moves by value.
//! - **I8** Every wait has a deadline, every loop a bound.
//! - **I9** Nothing on a reactor allocates, locks, formats or blocks; its only system call is the write to an eventfd,
//!   and what it takes to fall asleep and wake up.
//! - **I10** The device is not trusted for indices, nor the guest for anything.
//! - **I11** A completed FLUSH makes every earlier completed write durable; a guest without FLUSH gets write-through.
//! - **I12** Shutdown returns every queue pair and leaves the controller clean (CC.SHN).
//!
//! # Words
//! Names are the specifications': SQ, CQ, CID, PRP, MDTS, NSID (NVMe); virtqueue, descriptor, head, avail, used
//! (virtio); front-end, back-end (vhost-user);
//! target, LUN, CDB, sense (SCSI). Ours: a *lane* is one guest virtqueue in service, or what of it goes to another device; a
//! *poller* is one queue pair with the lanes that ride on it, a *reactor* is one core that polls.

pub mod bench;
pub mod block;
pub mod cli;
pub mod config;
pub mod control;
pub mod datapath;
pub mod host;
pub mod plan;
pub mod reactor;
pub mod scsi;
pub mod sim;
pub mod stats;
pub mod vhost;
pub mod virtio;
