//! Stand-ins for what Tandem meets in production: a guest's memory and a guest's driver.
//!
//! Promises to run anywhere, and to do everything from its arguments alone, so that a seed repeats
//! a run. Knows the wire (rings, virtio-blk), nothing of how the server works. Start at [`SimGuest`].

pub mod front_end;
mod guest;
mod memory;
mod packed;

pub use front_end::{FrontEnd, SharedMemory};
pub use guest::{Framing, RawDescriptor, SimCompletion, SimGuest, SimGuestConfig, SimRequest};
pub use memory::{SimRegion, heap_memory};

#[cfg(loom)]
#[cfg(test)]
mod tests;
