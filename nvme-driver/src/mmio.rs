//! The two memory barriers between the driver's stores and loads and those of a device. On x86-64, whose stores
//! stay in order, they bind the compiler only; on other machines they bind the processor as well.
//!
//! Here is also the door to memory that the device shares: words are atomics, everything else is copied and says so.
//! In the product that is `std::sync::atomic` and nothing else. Under `--cfg loom` the words are loom's, and a copy
//! that races with the device is found: `scripts/loom-rings`.

#[cfg(loom)]
#[cfg(test)]
#[path = "../../tests/shadow/mod.rs"]
pub(crate) mod shadow;

use std::sync::atomic::Ordering;

use crate::canary::canary;

#[cfg(all(test, loom))]
pub(crate) type AtomicU64 = shadow::Word<loom::sync::atomic::AtomicU64>;

#[cfg(all(test, loom))]
pub(crate) use shadow::{fence, reads, writes};

#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::atomic::{AtomicU64, fence};

/// Says that the `len` bytes at `start` are about to be read; if the device wrote them, it must have handed them over.
#[cfg(not(all(test, loom)))]
#[inline(always)]
pub(crate) fn reads(_start: *const u8, _len: usize) {}

/// Says that the `len` bytes at `start` are about to be written; if the device used them, it must have handed them over.
#[cfg(not(all(test, loom)))]
#[inline(always)]
pub(crate) fn writes(_start: *const u8, _len: usize) {}

/// After reading a completion's phase tag: pairs with the controller writing the phase tag last.
#[inline]
pub fn dma_rmb() {
    if !canary("no-dma-rmb") {
        fence(Ordering::Acquire);
    }
}

/// Before a doorbell: pairs with the controller fetching submission entries only after it saw the doorbell.
#[inline]
pub fn dma_wmb() {
    if !canary("no-dma-wmb") {
        fence(Ordering::Release);
    }
}
