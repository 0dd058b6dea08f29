//! Mutation canaries: barriers that tests leave out, to see that it is noticed.

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
