//! The two memory barriers between the driver's stores and loads and those of a device. On x86-64, whose stores
//! stay in order, they bind the compiler only; on other machines they bind the processor as well.

use std::sync::atomic::{Ordering, fence};

/// After reading a completion's phase tag: pairs with the controller writing the phase tag last.
#[inline]
pub fn dma_rmb() {
    #[cfg(not(feature = "canary-no-dma-rmb"))]
    fence(Ordering::Acquire);
}

/// Before a doorbell: pairs with the controller fetching submission entries only after it saw the doorbell.
#[inline]
pub fn dma_wmb() {
    #[cfg(not(feature = "canary-no-dma-wmb"))]
    fence(Ordering::Release);
}
