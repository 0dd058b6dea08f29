//! Real hardware: an NVMe controller that the kernel's vfio-pci driver hands to this process.

pub mod pci;
