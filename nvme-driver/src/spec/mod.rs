//! The NVMe wire truth: registers, commands, completions, status codes, identify data, features and log pages.
//! Layouts only: nothing in here touches memory that a device shares. Names are those of the NVM Express Base
//! Specification 2.0 and the NVM Command Set Specification 1.0. Start at [`SubmissionEntry`].
#![forbid(unsafe_code)]

mod command;
mod completion;
mod features;
mod identify;
mod log;
mod registers;

pub use command::*;
pub use completion::*;
pub use features::*;
pub use identify::*;
pub use log::*;
pub use registers::*;

/// The memory page that PRP entries are counted in: CC.MPS = 0, which every controller that we know supports.
pub const PAGE_SIZE: usize = 4096;

/// Says how a queue is known to the controller: 0 is the admin queue, I/O queues count from 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct QueueId(pub u16);

impl QueueId {
    /// The admin submission and completion queue.
    pub const ADMIN: QueueId = QueueId(0);
}

/// A namespace identifier. 0 is no namespace; `FFFFFFFFh` is all of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Nsid(pub u32);

impl Nsid {
    /// No namespace (controller-wide commands).
    pub const NONE: Nsid = Nsid(0);
    /// The broadcast value.
    pub const ALL: Nsid = Nsid(0xffff_ffff);
}

/// A command identifier: unique among the outstanding commands of one submission queue (I3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cid(pub u16);

impl Cid {
    /// The slot that this identifier names.
    #[must_use]
    pub fn index(self) -> usize {
        usize::from(self.0)
    }
}

/// Decodes a fixed-width ASCII field (space padded, sometimes zero padded) as the nvme-cli tools print it.
#[must_use]
pub fn ascii_field(bytes: &[u8]) -> String {
    let text: String = bytes
        .iter()
        .take_while(|b| **b != 0)
        .map(|b| {
            if (0x20..0x7f).contains(b) {
                char::from(*b)
            } else {
                '?'
            }
        })
        .collect();
    text.trim_end().to_owned()
}

#[cfg(test)]
mod tests;
