//! The control path: the life of the process, its devices and its sessions. Threads that may sleep, lock and
//! allocate; the data path is reached only by moving lanes and pollers. Start at [`server::Server`].

pub mod admin;
pub mod claim;
pub mod device;
pub mod identify;
pub mod placement;
pub mod recovery;
mod resize;
pub mod server;
pub mod session;
pub mod socket;
pub mod state;
mod units;
mod view;
