//! The door to memory that the guest writes too (I1): words are atomics, everything else is copied and says so.
//!
//! In the product this is `std::sync::atomic` and nothing else. Under `--cfg loom` the words are loom's, and a copy
//! that races with the other side is found: `scripts/loom-rings`.

#[cfg(loom)]
#[cfg(test)]
#[path = "../../tests/shadow/mod.rs"]
pub(crate) mod shadow;

#[cfg(all(test, loom))]
mod checked {
    use super::shadow::Word;
    use loom::sync::atomic;

    pub(crate) type AtomicU16 = Word<atomic::AtomicU16>;
    pub(crate) type AtomicU32 = Word<atomic::AtomicU32>;
    pub(crate) type AtomicU64 = Word<atomic::AtomicU64>;
}

#[cfg(all(test, loom))]
pub(crate) use {
    checked::{AtomicU16, AtomicU32, AtomicU64},
    shadow::{fence, reads, writes},
};

#[cfg(not(all(test, loom)))]
pub(crate) use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, fence};

/// Says that the `len` bytes at `start` are about to be read; whoever wrote them must have handed them over.
#[cfg(not(all(test, loom)))]
#[inline(always)]
pub(crate) fn reads(_start: *const u8, _len: usize) {}

/// Says that the `len` bytes at `start` are about to be written; whoever used them must have handed them over.
#[cfg(not(all(test, loom)))]
#[inline(always)]
pub(crate) fn writes(_start: *const u8, _len: usize) {}

/// Whether a mutation canary leaves the barrier of that name out, or takes a step too late: `scripts/loom-rings` has each of
/// them found out. Nothing does in the product.
#[cfg(all(test, loom))]
pub(crate) fn canary(name: &str) -> bool {
    static WANTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();
    let wanted = WANTED.get_or_init(|| std::env::var("TANDEM_CANARY").ok());
    wanted.as_deref() == Some(name)
}

/// The same: none.
#[cfg(not(all(test, loom)))]
#[inline(always)]
pub(crate) const fn canary(_name: &str) -> bool {
    false
}
