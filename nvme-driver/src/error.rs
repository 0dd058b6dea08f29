//! What can go wrong between the driver and a controller.

use std::time::Duration;

use crate::dma::DmaError;
use crate::spec::Status;

/// A failed driver call. Device misbehaviour is a value of this type, never a panic (I10).
#[derive(Clone, Debug, thiserror::Error)]
pub enum Error {
    /// Registers read all ones: nothing answers on the bus.
    #[error(
        "{device}: the controller does not answer (registers read all ones): it was removed or lost power"
    )]
    Removed {
        /// The transport's name.
        device: String,
    },
    /// CSTS.CFS.
    #[error("{device}: the controller reports a fatal status (CSTS.CFS) while {doing}: reset it")]
    Fatal {
        /// The transport's name.
        device: String,
        /// What was being attempted.
        doing: &'static str,
    },
    /// A register or a command did not answer in time.
    #[error("{device}: no answer within {waited:?} while {doing}")]
    Timeout {
        /// The transport's name.
        device: String,
        /// What was being attempted.
        doing: &'static str,
        /// How long was waited.
        waited: Duration,
    },
    /// The controller lacks something that the driver cannot do without.
    #[error("{device}: {what}")]
    Unsupported {
        /// The transport's name.
        device: String,
        /// What is missing, and the value seen.
        what: String,
    },
    /// A command completed with an error.
    #[error("{device}: {doing} failed: {status}")]
    Command {
        /// The transport's name.
        device: String,
        /// What was being attempted.
        doing: &'static str,
        /// The controller's answer.
        status: Status,
    },
    /// Every granted queue pair is in use.
    #[error("{device}: all {granted} I/O queue pairs that the controller granted are in use")]
    NoQueuePair {
        /// The transport's name.
        device: String,
        /// How many the controller granted.
        granted: u16,
    },
    /// DMA memory.
    #[error(transparent)]
    Dma(#[from] DmaError),
}

/// Shorthand.
pub type Result<V, E = Error> = std::result::Result<V, E>;
