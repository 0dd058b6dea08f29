//! Data pointers: PRP1, PRP2 and PRP lists. NVM Express Base 2.0, "Physical Region Page Entry and List".
//!
//! The first segment may start at any dword; every later one must start on a page and every one but the last must
//! end on a page, unless it carries straight on where the one before ended. What does not fit is
//! [`PrpError::Unaligned`]: the caller bounces it. One list page per slot holds 512 entries, enough for
//! [`super::MAX_TRANSFER`], so lists never chain.

use crate::spec::PAGE_SIZE;
use crate::transport::Iova;

/// A piece of memory that is contiguous for the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DataSegment {
    /// Where the device sees the first byte.
    pub iova: Iova,
    /// Bytes, at least 1.
    pub len: u32,
}

/// Why segments cannot be described by PRPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PrpError {
    /// A segment starts or ends where PRPs cannot express it.
    Unaligned,
    /// More than the list page or the controller's MDTS holds.
    TooLong,
    /// Fewer or more bytes than the command moves.
    LengthMismatch,
}

const PAGE: u64 = PAGE_SIZE as u64;
const LIST_ENTRIES: usize = PAGE_SIZE / 8;

/// What goes into a submission entry, and how many list entries were written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DataPointer {
    pub(crate) prp1: u64,
    pub(crate) prp2: u64,
}

/// Describes one segment of at most two pages: what most commands move. `None` for any other.
#[inline(always)]
pub(crate) fn short(segment: DataSegment) -> Option<DataPointer> {
    let DataSegment { iova, len } = segment;
    let start = iova.0;
    // Where it ends, counted from the beginning of its first page.
    let end = start % PAGE + u64::from(len);
    let whole = end <= 2 * PAGE && start.is_multiple_of(4);
    let second = match end > PAGE {
        true => (start & !(PAGE - 1)).checked_add(PAGE)?,
        false => 0,
    };
    whole.then_some(DataPointer {
        prp1: start,
        prp2: second,
    })
}

/// Describes `segments`, which must add up to exactly `bytes`. `store(i, prp)` puts entry `i` (below 512) into the
/// list page, which lies at `list()`; neither is asked where PRP1 and PRP2 are enough.
pub(crate) fn build(
    segments: impl Iterator<Item = DataSegment>,
    bytes: u32,
    list: impl FnOnce() -> Iova,
    mut store: impl FnMut(usize, u64),
) -> Result<DataPointer, PrpError> {
    let mut prp1 = 0;
    let mut first_entry = 0;
    let mut entries = 0_usize;
    let mut end = 0_u64; // where the segment before ended
    let mut left = bytes;
    let mut started = false;
    for segment in segments {
        let start = segment.iova.0;
        left = left
            .checked_sub(segment.len)
            .ok_or(PrpError::LengthMismatch)?;
        let segment_end = start
            .checked_add(u64::from(segment.len))
            .ok_or(PrpError::Unaligned)?;
        // The first page boundary in this segment that still needs an entry.
        let mut page;
        if !started {
            if !start.is_multiple_of(4) {
                return Err(PrpError::Unaligned);
            }
            started = true;
            prp1 = start;
            page = (start & !(PAGE - 1)) + PAGE;
        } else if end.is_multiple_of(PAGE) && start.is_multiple_of(PAGE) {
            page = start;
        } else if start == end {
            page = (start & !(PAGE - 1)) + PAGE;
        } else {
            return Err(PrpError::Unaligned);
        }
        while page < segment_end {
            if entries == LIST_ENTRIES {
                return Err(PrpError::TooLong);
            }
            if entries == 0 {
                first_entry = page;
            } else {
                if entries == 1 {
                    store(0, first_entry);
                }
                store(entries, page);
            }
            entries += 1;
            page += PAGE;
        }
        end = segment_end;
    }
    if left != 0 {
        return Err(PrpError::LengthMismatch);
    }
    let prp2 = match entries {
        0 | 1 => first_entry,
        _ => list().0,
    };
    Ok(DataPointer { prp1, prp2 })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(segments: &[(u64, u32)]) -> Result<(u64, u64, Vec<u64>), PrpError> {
        let mut list = vec![0_u64; LIST_ENTRIES];
        let mut used = 0;
        let bytes = segments.iter().map(|s| s.1).sum();
        let segments = segments.iter().map(|(iova, len)| DataSegment {
            iova: Iova(*iova),
            len: *len,
        });
        let pointer = build(
            segments,
            bytes,
            || Iova(0xaaaa_0000),
            |i, prp| {
                list[i] = prp;
                used = used.max(i + 1);
            },
        )?;
        list.truncate(used);
        Ok((pointer.prp1, pointer.prp2, list))
    }

    #[test]
    fn build_within_one_page_uses_prp1_alone() {
        assert_eq!(describe(&[(0x1000, 4096)]), Ok((0x1000, 0, vec![])));
        assert_eq!(describe(&[(0x1e00, 512)]), Ok((0x1e00, 0, vec![])));
    }

    #[test]
    fn build_across_one_boundary_puts_the_second_page_into_prp2() {
        assert_eq!(describe(&[(0x1e00, 4096)]), Ok((0x1e00, 0x2000, vec![])));
        assert_eq!(
            describe(&[(0x1000, 4096), (0x9000, 512)]),
            Ok((0x1000, 0x9000, vec![]))
        );
    }

    #[test]
    fn build_across_more_boundaries_points_prp2_at_the_list() {
        assert_eq!(
            describe(&[(0x1800, 0x2800), (0x7000, 0x1000)]),
            Ok((0x1800, 0xaaaa_0000, vec![0x2000, 0x3000, 0x7000]))
        );
    }

    #[test]
    fn build_of_segments_that_continue_each_other_is_one_run() {
        assert_eq!(
            describe(&[(0x1000, 512), (0x1200, 512)]),
            Ok((0x1000, 0, vec![]))
        );
        assert_eq!(
            describe(&[(0x1200, 0x200), (0x1400, 0x1000)]),
            Ok((0x1200, 0x2000, vec![]))
        );
    }

    #[test]
    fn build_with_a_gap_inside_a_page_is_unaligned() {
        assert_eq!(
            describe(&[(0x1000, 512), (0x2000, 512)]),
            Err(PrpError::Unaligned)
        );
        assert_eq!(
            describe(&[(0x1000, 4096), (0x9200, 512)]),
            Err(PrpError::Unaligned)
        );
        assert_eq!(describe(&[(0x1002, 512)]), Err(PrpError::Unaligned));
        assert_eq!(describe(&[(u64::MAX - 3, 512)]), Err(PrpError::Unaligned));
    }

    #[test]
    fn build_of_the_largest_transfer_fits_and_one_page_more_does_not() {
        let (_, prp2, list) = describe(&[(0x10_0e00, 2 << 20)]).unwrap();
        assert_eq!((prp2, list.len()), (0xaaaa_0000, 512));
        assert_eq!(
            describe(&[(0x10_0e00, (2 << 20) + 4096)]),
            Err(PrpError::TooLong)
        );
    }

    #[test]
    fn build_with_another_length_than_the_command_moves_is_refused() {
        let segment = || {
            std::iter::once(DataSegment {
                iova: Iova(0x1000),
                len: 512,
            })
        };
        assert_eq!(
            build(segment(), 1024, || Iova(0), |_, _| ()),
            Err(PrpError::LengthMismatch)
        );
        assert_eq!(
            build(segment(), 256, || Iova(0), |_, _| ()),
            Err(PrpError::LengthMismatch)
        );
    }
}
