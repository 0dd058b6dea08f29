//! A polled userspace NVMe driver.
