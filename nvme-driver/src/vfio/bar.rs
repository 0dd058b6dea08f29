//! BAR0 of a controller: its registers and doorbells, as far as the kernel lets them be mapped, and what is left of
//! them when the device is pulled out.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::sync::Arc;

use memmap2::{MmapOptions, MmapRaw};

use super::msix::Vector;
use crate::fault::{FaultGuard, Lost, Poisoned};
use crate::transport::{Armed, QueuePort};

/// One part of the BAR that is mapped.
#[derive(Debug)]
struct Area {
    /// Of its first byte in the BAR.
    offset: u64,
    /// Watched for SIGBUS. Stands before the mapping: fields are dropped in this order.
    _guard: FaultGuard,
    map: MmapRaw,
}

/// The BAR. Registers that no mapped area holds are reached by system calls; doorbells must be mapped.
#[derive(Debug)]
pub(super) struct Bar {
    areas: Vec<Area>,
    lost: Poisoned,
    file: File,
    /// Where the BAR begins in `file`.
    start: u64,
    len: u64,
}

// SAFETY: the mappings are device registers. Every access is a single volatile load or store of 32 bits, which any
// thread may do; which thread does is decided by who owns the transport (registers) and the ports (doorbells).
unsafe impl Sync for Bar {}
// SAFETY: as above; nothing is tied to a thread.
unsafe impl Send for Bar {}

impl Bar {
    /// Maps `areas` (offset and length within the BAR, as the kernel says) of the `len` bytes at `start` of the device.
    pub(super) fn map(
        device: impl AsFd,
        start: u64,
        len: u64,
        areas: &[(u64, u64)],
    ) -> io::Result<Bar> {
        let file = File::from(device.as_fd().try_clone_to_owned()?);
        let lost = Poisoned::default();
        let mut mapped = Vec::new();
        for (offset, bytes) in areas.iter().copied() {
            let inside = offset.checked_add(bytes).is_some_and(|end| end <= len);
            let Some(bytes) = usize::try_from(bytes)
                .ok()
                .filter(|bytes| inside && *bytes > 0)
            else {
                return Err(io::Error::other(format!(
                    "area {offset:#x}+{bytes:#x} lies outside a BAR of {len:#x}"
                )));
            };
            let map = MmapOptions::new()
                .offset(start + offset)
                .len(bytes)
                .map_raw(&file)?;
            let base = NonNull::new(map.as_mut_ptr())
                .ok_or_else(|| io::Error::other("mapped at address 0"))?;
            let guard = FaultGuard::register(base, bytes, &lost, Lost::Ones)
                .ok_or_else(|| io::Error::other("too many regions are mapped in this process"))?;
            mapped.push(Area {
                offset,
                _guard: guard,
                map,
            });
        }
        Ok(Bar {
            areas: mapped,
            lost,
            file,
            start,
            len,
        })
    }

    /// The device vanished under a mapping.
    pub(super) fn is_lost(&self) -> bool {
        self.lost.is_set()
    }

    /// The 32-bit register at `offset`, if it is mapped.
    fn register(&self, offset: u64) -> Option<NonNull<u32>> {
        if !offset.is_multiple_of(4) || offset.checked_add(4)? > self.len {
            return None;
        }
        self.areas.iter().find_map(|area| {
            let within = usize::try_from(offset.checked_sub(area.offset)?).ok()?;
            if within.checked_add(4)? > area.map.len() {
                return None;
            }
            // SAFETY: `within + 4` bytes lie in the area (checked above), so the sum stays in its mapping.
            NonNull::new(unsafe { area.map.as_mut_ptr().add(within) }.cast())
        })
    }

    /// All ones when it cannot be read.
    pub(super) fn read32(&self, offset: u64) -> u32 {
        if let Some(register) = self.register(offset) {
            // SAFETY: mapped, aligned (`register`); device registers are only ever accessed volatile.
            return u32::from_le(unsafe { register.as_ptr().read_volatile() });
        }
        let mut bytes = [0xff; 4];
        if let Err(error) = self
            .file
            .read_exact_at(&mut bytes, self.start.saturating_add(offset))
        {
            tracing::debug!(offset, %error, "register read");
        }
        u32::from_le_bytes(bytes)
    }

    pub(super) fn write32(&self, offset: u64, value: u32) {
        if let Some(register) = self.register(offset) {
            // SAFETY: as in `read32`.
            unsafe { register.as_ptr().write_volatile(value.to_le()) };
        } else if let Err(error) = self
            .file
            .write_all_at(&value.to_le_bytes(), self.start.saturating_add(offset))
        {
            tracing::debug!(offset, %error, "register write");
        }
    }
}

/// The two doorbells of one queue pair, and its interrupt if it has one.
#[derive(Debug)]
pub struct VfioPort {
    sq: NonNull<u32>,
    cq: NonNull<u32>,
    vector: Option<Vector>,
    /// Keeps both mapped.
    _bar: Arc<Bar>,
}

// SAFETY: the pointers lead to mapped device registers (`_bar`), and whoever owns the port alone writes these two.
unsafe impl Send for VfioPort {}

impl VfioPort {
    /// The doorbells at these offsets; `None` when they are not mapped: a system call for each would be no driver.
    pub(super) fn new(bar: &Arc<Bar>, sq: u64, cq: u64) -> Option<VfioPort> {
        Some(VfioPort {
            sq: bar.register(sq)?,
            cq: bar.register(cq)?,
            vector: None,
            _bar: Arc::clone(bar),
        })
    }

    /// With the interrupt of the queue pair.
    pub(super) fn with_vector(self, vector: Vector) -> VfioPort {
        VfioPort {
            vector: Some(vector),
            ..self
        }
    }
}

impl QueuePort for VfioPort {
    #[inline]
    fn ring_sq(&mut self, tail: u16) {
        // SAFETY: `sq` is mapped and aligned (`Bar::register`). On x86-64 a store to uncached memory is not reordered
        // with earlier stores; elsewhere the fence of `SubmissionRing::publish` orders them for the device.
        unsafe { self.sq.as_ptr().write_volatile(u32::from(tail).to_le()) };
    }

    #[inline]
    fn ring_cq(&mut self, head: u16) {
        // SAFETY: as above.
        unsafe { self.cq.as_ptr().write_volatile(u32::from(head).to_le()) };
    }

    fn interrupt(&self) -> Option<BorrowedFd<'_>> {
        self.vector.as_ref().map(AsFd::as_fd)
    }

    fn arm(&mut self) -> Armed {
        let on = self.vector.as_mut().is_some_and(Vector::switch_on);
        if on { Armed::Yes } else { Armed::Never }
    }

    fn disarm(&mut self) {
        if let Some(vector) = &mut self.vector {
            vector.switch_off();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEN: u64 = 0x4000;

    /// A file in the place of a device, of which pages 1 and 2 may be mapped.
    fn bar() -> (File, Bar) {
        let file = rustix::fs::memfd_create("bar", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(0x1000 + LEN).unwrap();
        let bar = Bar::map(&file, 0x1000, LEN, &[(0x1000, 0x2000)]).unwrap();
        (file, bar)
    }

    #[test]
    fn registers_in_and_outside_mapped_areas_read_what_was_written() {
        let (file, bar) = bar();
        for offset in [0, 0x14, 0xffc, 0x1000, 0x2ffc, 0x3000, 0x3ffc] {
            let value = 0xc0de_0000 | u32::try_from(offset).unwrap();
            bar.write32(offset, value);
            assert_eq!(bar.read32(offset), value);
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, 0x1000 + offset).unwrap();
            assert_eq!(
                u32::from_le_bytes(bytes),
                value,
                "offset {offset:#x} went elsewhere"
            );
        }
    }

    #[test]
    fn port_of_unmapped_or_unaligned_doorbells_is_refused() {
        let bar = Arc::new(bar().1);
        for (sq, cq) in [
            (0xffc, 0x1000),
            (0x2ffc, 0x3000),
            (0x1002, 0x1004),
            (LEN, LEN + 4),
            (u64::MAX - 3, 0x1000),
        ] {
            assert!(VfioPort::new(&bar, sq, cq).is_none(), "{sq:#x} {cq:#x}");
        }
        let mut port = VfioPort::new(&bar, 0x1008, 0x100c).unwrap();
        port.ring_sq(7);
        port.ring_cq(9);
        assert_eq!((bar.read32(0x1008), bar.read32(0x100c)), (7, 9));
    }

    #[test]
    fn map_of_an_area_outside_the_bar_is_refused() {
        let (file, _) = bar();
        for area in [(0x3000, 0x2000), (0, 0), (u64::MAX, 0x1000)] {
            assert!(Bar::map(&file, 0x1000, LEN, &[area]).is_err(), "{area:x?}");
        }
    }

    #[test]
    fn registers_of_a_device_that_vanished_read_all_ones() {
        let (file, bar) = bar();
        bar.write32(0x1000, 1);
        file.set_len(0).unwrap(); // as a device that is pulled out: SIGBUS at the next access
        assert!(!bar.is_lost());
        assert_eq!(bar.read32(0x1014), u32::MAX);
        assert!(bar.is_lost());
        bar.write32(0x1000, 5); // a doorbell rung too late goes nowhere
        assert_eq!(bar.read32(0x14), u32::MAX, "a register that is not mapped");
    }
}
