//! The controller's IOMMU: which I/O virtual addresses it may reach, and for what. Every access of the controller to
//! memory of the driver goes through a [`DmaTable`]; an address outside is a violation, counted and never touched.
//!
//! A table is immutable. A queue holds the current one; mapping and unmapping make a new one and hand it to every
//! queue under that queue's lock, so that no queue uses an old table once [`DmaDomain::unmap`] has returned.

use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use nvme_driver::spec::{PAGE_SIZE, Status, SubmissionEntry};
use nvme_driver::transport::{DmaAccess, DmaDomain, DmaError, Iova};

use crate::shared::Shared;

/// What an IOMMU of a small desktop machine reports: 39 bits, without the interrupt window at `fee0_0000h`.
pub(crate) const USABLE_RANGES: [RangeInclusive<u64>; 2] =
    [0..=0xfedf_ffff, 0xfef0_0000..=(1 << 39) - 1];

const PAGE: u64 = PAGE_SIZE as u64;

/// Which way the controller wants to go through a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    /// It reads the driver's memory.
    Read,
    /// It writes the driver's memory.
    Write,
}

#[derive(Clone, Copy, Debug)]
struct Window {
    iova: u64,
    len: u64,
    hva: NonNull<u8>,
    access: DmaAccess,
}

// SAFETY: a window is an address that its owner keeps mapped until it is unmapped here; bytes behind it are only
// copied, from whichever thread.
unsafe impl Send for Window {}
// SAFETY: as above; a shared window offers nothing but its fields.
unsafe impl Sync for Window {}

/// The windows of one moment, sorted by address.
#[derive(Clone, Debug, Default)]
pub(crate) struct DmaTable {
    windows: Vec<Window>,
}

impl DmaTable {
    /// Where the `len` bytes at `iova` are, if they lie in one window that allows `direction`. `hint` is the window
    /// found last: most accesses stay in it.
    #[inline]
    pub(crate) fn translate(
        &self,
        iova: u64,
        len: usize,
        direction: Direction,
        hint: &mut usize,
    ) -> Option<NonNull<u8>> {
        let inside = |window: &&Window| iova.wrapping_sub(window.iova) < window.len;
        let window = match self.windows.get(*hint).filter(inside) {
            Some(window) => window,
            None => {
                let after = self.windows.partition_point(|window| window.iova <= iova);
                *hint = after.checked_sub(1)?;
                self.windows.get(*hint).filter(inside)?
            }
        };
        let allowed = match direction {
            Direction::Read => window.access.allows_read(),
            Direction::Write => window.access.allows_write(),
        };
        let offset = iova - window.iova;
        if !allowed || len as u64 > window.len - offset {
            return None;
        }
        let offset = usize::try_from(offset).ok()?;
        // SAFETY: the offset lies within the window (checked above), which is `len` mapped bytes at `hva` (contract of
        // `DmaDomain::map`).
        Some(unsafe { window.hva.add(offset) })
    }

    pub(crate) fn clear(&mut self) {
        self.windows.clear();
    }

    fn add(&mut self, window: Window) -> Result<(), String> {
        let end = window.iova.checked_add(window.len);
        let end = end.ok_or_else(|| "the window wraps around".to_owned())?;
        let at = self.windows.partition_point(|w| w.iova < window.iova);
        let before = at
            .checked_sub(1)
            .and_then(|before| self.windows.get(before));
        let overlaps = before.is_some_and(|w| w.iova + w.len > window.iova)
            || self.windows.get(at).is_some_and(|w| w.iova < end);
        if overlaps {
            return Err("it overlaps a window that is mapped".to_owned());
        }
        self.windows.insert(at, window);
        Ok(())
    }

    fn remove(&mut self, iova: u64, len: u64) -> Result<(), String> {
        let at = self
            .windows
            .iter()
            .position(|window| (window.iova, window.len) == (iova, len));
        let at = at.ok_or_else(|| "no such window is mapped".to_owned())?;
        self.windows.remove(at);
        Ok(())
    }
}

/// A view of the driver's memory through one table: what a queue or a worker does its transfers with.
pub(crate) struct Dma<'a> {
    pub(crate) table: &'a DmaTable,
    pub(crate) hint: &'a mut usize,
    pub(crate) violations: &'a AtomicU64,
}

impl Dma<'_> {
    /// As [`DmaTable::translate`]; a violation is counted and fails the command.
    #[inline]
    pub(crate) fn reach(
        &mut self,
        iova: u64,
        len: usize,
        direction: Direction,
    ) -> Result<NonNull<u8>, Status> {
        match self.table.translate(iova, len, direction, self.hint) {
            Some(hva) => Ok(hva),
            None => Err(self.violation()),
        }
    }

    #[cold]
    fn violation(&self) -> Status {
        self.violations.fetch_add(1, Ordering::Relaxed);
        Status::DATA_TRANSFER_ERROR.with_dnr()
    }

    fn read_u64(&mut self, iova: u64) -> Result<u64, Status> {
        let hva = self.reach(iova, 8, Direction::Read)?.cast::<AtomicU64>();
        // SAFETY: 8 mapped bytes (`reach`); `iova` is a multiple of 8 and windows start at pages, so the word is
        // aligned. It is reached as an atomic: the driver may write it.
        Ok(u64::from_le(
            unsafe { hva.as_ref() }.load(Ordering::Relaxed),
        ))
    }

    /// Calls `each` with the pieces of memory that PRP1, PRP2 and the PRP lists of `entry` name, in order, `bytes` in
    /// all: where they are, and the offset of their first byte in the data. NVM Express Base 2.0, "Physical Region
    /// Page Entry and List".
    ///
    /// # Errors
    /// PRP Offset Invalid, or Data Transfer Error for an address outside all windows, or what `each` said.
    #[inline]
    pub(crate) fn pages(
        &mut self,
        entry: &SubmissionEntry,
        bytes: usize,
        direction: Direction,
        mut each: impl FnMut(NonNull<u8>, usize, usize) -> Result<(), Status>,
    ) -> Result<(), Status> {
        const INVALID_OFFSET: Status = Status::INVALID_PRP_OFFSET.with_dnr();
        let (prp1, prp2) = (entry.prp1.get(), entry.prp2.get());
        if !prp1.is_multiple_of(4) {
            return Err(INVALID_OFFSET);
        }
        // Less than a page, so the cast is exact.
        let first = (PAGE_SIZE - (prp1 % PAGE) as usize).min(bytes);
        each(self.reach(prp1, first, direction)?, first, 0)?;
        let mut done = first;
        if done == bytes {
            return Ok(());
        }
        if bytes - done <= PAGE_SIZE {
            if !prp2.is_multiple_of(PAGE) {
                return Err(INVALID_OFFSET);
            }
            let rest = bytes - done;
            return each(self.reach(prp2, rest, direction)?, rest, done);
        }
        if !prp2.is_multiple_of(8) {
            return Err(INVALID_OFFSET);
        }
        let mut list = prp2;
        while done < bytes {
            let prp = self.read_u64(list)?;
            if !prp.is_multiple_of(PAGE) {
                return Err(INVALID_OFFSET);
            }
            let last_of_page = list % PAGE == PAGE - 8;
            if last_of_page && bytes - done > PAGE_SIZE {
                // The last entry of a list page that does not end the data points to the next list page.
                list = prp;
                continue;
            }
            let len = (bytes - done).min(PAGE_SIZE);
            each(self.reach(prp, len, direction)?, len, done)?;
            done += len;
            list += 8;
        }
        Ok(())
    }
}

/// What the driver sees of the IOMMU.
#[derive(Debug)]
pub(crate) struct Domain(pub(crate) Arc<Shared>);

impl Domain {
    fn change(
        &self,
        action: &'static str,
        iova: Iova,
        len: u64,
        change: impl FnOnce(&mut DmaTable) -> Result<(), String>,
    ) -> Result<(), DmaError> {
        let refused = |reason: String| DmaError::Refused {
            action,
            iova: iova.0,
            len,
            reason,
        };
        if len == 0 || !(iova.0 | len).is_multiple_of(PAGE) {
            return Err(refused("it is not made of whole pages".to_owned()));
        }
        self.0.change_table(change).map_err(refused)
    }
}

impl DmaDomain for Domain {
    fn usable_ranges(&self) -> Vec<RangeInclusive<u64>> {
        USABLE_RANGES.to_vec()
    }

    unsafe fn map(
        &self,
        iova: Iova,
        hva: NonNull<u8>,
        len: u64,
        access: DmaAccess,
    ) -> Result<(), DmaError> {
        let end = iova.0.checked_add(len);
        let usable = |range: &RangeInclusive<u64>| {
            end.is_some_and(|end| *range.start() <= iova.0 && end - 1 <= *range.end())
        };
        self.change("map", iova, len, |table| {
            if !USABLE_RANGES.iter().any(usable) {
                return Err("it lies outside the ranges that this IOMMU translates".to_owned());
            }
            table.add(Window {
                iova: iova.0,
                len,
                hva,
                access,
            })
        })
    }

    fn unmap(&self, iova: Iova, len: u64) -> Result<(), DmaError> {
        if self.0.gone.load(Ordering::Relaxed) {
            return Ok(()); // the table went with the device
        }
        self.change("unmap", iova, len, |table| table.remove(iova.0, len))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(windows: &[(u64, u64, DmaAccess)]) -> DmaTable {
        let mut table = DmaTable::default();
        for (iova, len, access) in windows {
            let window = Window {
                iova: *iova,
                len: *len,
                hva: NonNull::dangling(),
                access: *access,
            };
            table.add(window).unwrap();
        }
        table
    }

    #[test]
    fn translate_outside_a_window_or_against_its_direction_is_none() {
        let table = table(&[
            (0x1000, 0x2000, DmaAccess::DeviceReads),
            (0x8000, 0x1000, DmaAccess::DeviceWrites),
        ]);
        let ok = |iova, len, direction| table.translate(iova, len, direction, &mut 0).is_some();
        assert!(ok(0x1000, 0x2000, Direction::Read));
        assert!(ok(0x2fff, 1, Direction::Read));
        assert!(!ok(0x1000, 1, Direction::Write));
        assert!(!ok(0x2fff, 2, Direction::Read));
        assert!(!ok(0xfff, 1, Direction::Read));
        assert!(!ok(0x3000, 1, Direction::Read));
        assert!(ok(0x8000, 0x1000, Direction::Write));
        assert!(!ok(0x8000, 1, Direction::Read));
        assert!(!ok(u64::MAX, 1, Direction::Read));
    }

    #[test]
    fn translate_with_any_hint_finds_the_same_window() {
        let table = table(&[
            (0x1000, 0x1000, DmaAccess::Both),
            (0x2000, 0x1000, DmaAccess::Both),
            (0x9000, 0x1000, DmaAccess::Both),
        ]);
        for start in 0..5 {
            let mut hint = start;
            assert!(
                table
                    .translate(0x9010, 16, Direction::Read, &mut hint)
                    .is_some()
            );
            assert_eq!(hint, 2);
        }
    }

    #[test]
    fn add_of_an_overlapping_window_and_remove_of_another_are_refused() {
        let mut table = table(&[(0x2000, 0x2000, DmaAccess::Both)]);
        for (iova, len) in [
            (0x1000, 0x2000),
            (0x3000, 0x1000),
            (0x2000, 0x2000),
            (0, 0x8000),
        ] {
            let window = Window {
                iova,
                len,
                hva: NonNull::dangling(),
                access: DmaAccess::Both,
            };
            assert!(table.add(window).is_err(), "{iova:#x}");
        }
        assert!(table.remove(0x2000, 0x1000).is_err());
        assert!(table.remove(0x2000, 0x2000).is_ok());
        assert!(table.remove(0x2000, 0x2000).is_err());
    }
}
