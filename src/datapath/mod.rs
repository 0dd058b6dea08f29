//! The data path: virtqueues on one side, an NVMe queue pair on the other. The only room that sees both virtio and
//! NVMe. Nothing here allocates, locks or blocks once a lane runs; the only system call is the write to a call
//! eventfd (I9). What has to wait is left to other threads ([`errand`], [`abort`]). Start at [`Poller::turn`](poller::Poller), then [`Lane`].

pub mod abort;
pub mod bounce;
pub mod errand;
pub mod lane;
pub mod poller;
pub mod signal;

pub use errand::{Clerk, Desk};
pub use lane::{
    Barrier, ControlConfig, EventConfig, Events, Happening, HostTasks, Lane, LaneConfig, LaneId,
    MediumId, ScsiLaneConfig, SideConfig, WantedEvents, WayConfig,
};
pub use poller::{Load, PairHealth, Poll, Poller, Service, Waker};
pub use signal::Signal;
