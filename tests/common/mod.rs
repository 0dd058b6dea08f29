//! What several test binaries share.
#![allow(clippy::unwrap_used)]

pub mod rig;
pub mod rng;
