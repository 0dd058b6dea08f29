//! What several test binaries share.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

pub mod rig;
pub mod rng;
