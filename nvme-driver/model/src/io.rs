//! The NVM command set: Read, Write, Flush, Write Zeroes, Dataset Management, Compare, Copy. NVM Command Set 1.0.
//!
//! On memory, and where nothing is kept, a command is carried out inline by the core that services its queue; on an image
//! file, and where memory is to be given back to the system, by a worker. What is checked is the same on all ways.

use std::sync::atomic::Ordering;

use nvme_driver::spec::{
    CDW11_AD, CDW12_DEAC, CDW12_FUA, CopyRange, DsmRange, MAX_DSM_RANGES, Nsid, Status,
    SubmissionEntry, io_opcode,
};
use zerocopy::FromBytes;

use crate::iommu::{Direction, Dma};
use crate::media::{Image, Media, Ram};
use crate::shared::{NamespaceState, Shared, spin};

/// Zeroing more memory than this is given to a worker: storing it would hold up the core for too long.
const INLINE_ZEROES: u64 = 1 << 20;

/// Blocks of one source range of Copy, of all of them, and how many there may be: those of QEMU's controller.
pub(crate) const MAX_COPY_RANGE: u16 = 128;
pub(crate) const MAX_COPY: u32 = 128;
pub(crate) const MAX_COPY_RANGES: u8 = 128;

const INVALID_FIELD: Status = Status::INVALID_FIELD.with_dnr();

/// What became of a command on the core that services its queue.
pub(crate) enum Inline {
    Done(Status),
    /// It may take long: nothing was done.
    NeedsWorker,
}

impl From<Status> for Inline {
    fn from(status: Status) -> Inline {
        Inline::Done(status)
    }
}

/// The checked range of a command: bytes of the medium.
#[derive(Clone, Copy)]
struct Extent {
    offset: u64,
    len: u64,
}

pub(crate) fn is_fua(entry: &SubmissionEntry) -> bool {
    entry.cdw12.get() & CDW12_FUA != 0
}

/// FUSE and PSDT: fused operations and SGLs are not supported.
fn check_flags(entry: &SubmissionEntry) -> Result<(), Status> {
    if entry.flags == 0 {
        Ok(())
    } else {
        Err(INVALID_FIELD)
    }
}

fn extent(namespace: &NamespaceState, slba: u64, blocks: u64) -> Result<Extent, Status> {
    let end = slba.checked_add(blocks);
    if end.is_none_or(|end| end > namespace.blocks()) {
        return Err(Status::LBA_OUT_OF_RANGE.with_dnr());
    }
    // A namespace's size in bytes fits 64 bits (checked when it was made, and when it grew).
    Ok(Extent {
        offset: namespace.offset + (slba << namespace.block_shift),
        len: blocks << namespace.block_shift,
    })
}

/// The range that a Read, Write, Write Zeroes or Compare names.
#[inline]
fn target(shared: &Shared, entry: &SubmissionEntry) -> Result<Extent, Status> {
    check_flags(entry)?;
    let namespace = shared.namespace(Nsid(entry.nsid.get()))?;
    let range = entry.lba_range();
    extent(namespace, range.slba, u64::from(range.blocks))
}

/// The same for a command that moves data: at most MDTS of it.
#[inline]
fn transfer(shared: &Shared, entry: &SubmissionEntry) -> Result<(Extent, usize), Status> {
    let extent = target(shared, entry)?;
    if shared
        .config
        .mdts_bytes
        .is_some_and(|most| extent.len > most)
    {
        return Err(INVALID_FIELD);
    }
    // At most 65536 blocks of 64 KiB.
    let len = usize::try_from(extent.len).map_err(|_| INVALID_FIELD)?;
    Ok((extent, len))
}

/// Completed writes need no flush: there is no cache, it is switched off, or the command asked for it.
fn is_durable(shared: &Shared, entry: &SubmissionEntry) -> bool {
    is_fua(entry) || !shared.write_cache.load(Ordering::Relaxed)
}

/// Carries out a command without waiting for anything, or says that it needs a worker.
#[inline]
pub(crate) fn execute_inline(
    shared: &Shared,
    dma: &mut Dma<'_>,
    entry: &SubmissionEntry,
) -> Inline {
    let ram = match &shared.media {
        Media::Ram(ram) => ram,
        Media::Null => return execute_null(shared, dma, entry).into(),
        Media::File(_) => return Inline::NeedsWorker,
    };
    let result = match entry.opcode {
        io_opcode::READ => transfer(shared, entry).and_then(|(extent, len)| {
            let from = ram.at(extent.offset, len);
            dma.pages(entry, len, Direction::Write, |to, len, at| {
                // SAFETY: `at + len` is within the checked extent; `to` is `len` bytes that the IOMMU lets us write.
                // The two never overlap: the medium is a private mapping that is in no DMA table.
                unsafe { from.add(at).copy_to_nonoverlapping(to, len) };
                Ok(())
            })
        }),
        io_opcode::WRITE => transfer(shared, entry).and_then(|(extent, len)| {
            let to = ram.at(extent.offset, len);
            dma.pages(entry, len, Direction::Read, |from, len, at| {
                // SAFETY: as for Read, the other way round.
                unsafe { from.copy_to_nonoverlapping(to.add(at), len) };
                Ok(())
            })?;
            note_change(shared, ram, entry, extent);
            Ok(())
        }),
        _ => return execute_other(shared, ram, dma, entry),
    };
    Inline::Done(result.err().unwrap_or(Status::SUCCESS))
}

/// Everything that a command on memory goes through, each page of its data looked up and checked, but the copy.
#[inline]
fn execute_null(shared: &Shared, dma: &mut Dma<'_>, entry: &SubmissionEntry) -> Status {
    let result = match entry.opcode {
        io_opcode::READ => transfer(shared, entry)
            .and_then(|(_, len)| dma.pages(entry, len, Direction::Write, |_, _, _| Ok(()))),
        io_opcode::WRITE => transfer(shared, entry)
            .and_then(|(_, len)| dma.pages(entry, len, Direction::Read, |_, _, _| Ok(()))),
        _ => execute_other_null(shared, dma, entry),
    };
    result.err().unwrap_or(Status::SUCCESS)
}

#[cold]
fn execute_other_null(
    shared: &Shared,
    dma: &mut Dma<'_>,
    entry: &SubmissionEntry,
) -> Result<(), Status> {
    match entry.opcode {
        io_opcode::FLUSH => flush_target(shared, entry),
        io_opcode::WRITE_ZEROES => target(shared, entry).map(drop),
        io_opcode::DATASET_MANAGEMENT => ranges(shared, dma, entry).map(drop),
        // Compare among them: there is nothing to compare with, as ONCS says.
        _ => Err(Status::INVALID_OPCODE.with_dnr()),
    }
}

#[cold]
fn execute_other(shared: &Shared, ram: &Ram, dma: &mut Dma<'_>, entry: &SubmissionEntry) -> Inline {
    let result = match entry.opcode {
        io_opcode::FLUSH => flush_target(shared, entry).map(|()| {
            if let Some(durability) = &shared.durability {
                spin(durability).flush(ram);
            }
        }),
        io_opcode::COMPARE => transfer(shared, entry).and_then(|(extent, len)| {
            dma.pages(entry, len, Direction::Read, |ours, len, at| {
                compare(ours, ram.at(extent.offset + at as u64, len), len)
            })
        }),
        io_opcode::COPY => parts(shared, dma, entry).map(|parts| {
            for (from, to, len) in parts.iter() {
                ram.copy(from, to, len);
            }
            note_change(shared, ram, entry, parts.destination);
        }),
        io_opcode::WRITE_ZEROES => match target(shared, entry) {
            Ok(extent) if extent.len > INLINE_ZEROES => return Inline::NeedsWorker,
            Ok(extent) => {
                ram.zero(extent.offset, usize::try_from(extent.len).unwrap_or(0));
                note_change(shared, ram, entry, extent);
                Ok(())
            }
            Err(status) => Err(status),
        },
        io_opcode::DATASET_MANAGEMENT => match ranges(shared, dma, entry) {
            Ok(ranges) if ranges.total() > INLINE_ZEROES => return Inline::NeedsWorker,
            Ok(ranges) => {
                for extent in ranges.as_slice() {
                    ram.zero(extent.offset, usize::try_from(extent.len).unwrap_or(0));
                    note_change(shared, ram, entry, *extent);
                }
                Ok(())
            }
            Err(status) => Err(status),
        },
        _ => Err(Status::INVALID_OPCODE.with_dnr()),
    };
    result.err().unwrap_or(Status::SUCCESS).into()
}

fn note_change(shared: &Shared, ram: &Ram, entry: &SubmissionEntry, extent: Extent) {
    if let Some(durability) = &shared.durability {
        let durable = is_durable(shared, entry);
        spin(durability).changed(ram, extent.offset, extent.len, durable);
    }
}

/// Byte for byte, without borrowing either side.
fn compare(a: std::ptr::NonNull<u8>, b: std::ptr::NonNull<u8>, len: usize) -> Result<(), Status> {
    for i in 0..len {
        // SAFETY: both are `len` bytes that were checked; volatile, since others may write them meanwhile.
        let same = unsafe { a.add(i).read_volatile() == b.add(i).read_volatile() };
        if !same {
            return Err(Status::COMPARE_FAILURE.with_dnr());
        }
    }
    Ok(())
}

/// One namespace, or all of them: our VWC says that Flush knows the broadcast value.
fn flush_target(shared: &Shared, entry: &SubmissionEntry) -> Result<(), Status> {
    check_flags(entry)?;
    match Nsid(entry.nsid.get()) {
        Nsid::ALL => Ok(()),
        nsid => shared.namespace(nsid).map(drop),
    }
}

/// The checked ranges of a Dataset Management command.
struct Ranges {
    extents: [Extent; MAX_DSM_RANGES],
    count: usize,
}

impl Ranges {
    fn as_slice(&self) -> &[Extent] {
        &self.extents[..self.count]
    }

    fn total(&self) -> u64 {
        self.as_slice()
            .iter()
            .fold(0, |sum: u64, extent| sum.saturating_add(extent.len))
    }
}

fn ranges(shared: &Shared, dma: &mut Dma<'_>, entry: &SubmissionEntry) -> Result<Ranges, Status> {
    check_flags(entry)?;
    let namespace = shared.namespace(Nsid(entry.nsid.get()))?;
    let wanted = (entry.cdw10.get() & 0xff) as usize + 1;
    let mut bytes = [0; MAX_DSM_RANGES * size_of::<DsmRange>()];
    let len = wanted * size_of::<DsmRange>();
    copy_in(dma, entry, &mut bytes[..len])?;
    let mut ranges = Ranges {
        extents: [Extent { offset: 0, len: 0 }; MAX_DSM_RANGES],
        count: 0,
    };
    let deallocate = entry.cdw11.get() & CDW11_AD != 0;
    for wire in bytes[..len].chunks_exact(size_of::<DsmRange>()) {
        let wire = DsmRange::read_from_bytes(wire).map_err(|_| Status::INTERNAL_ERROR)?;
        let extent = extent(namespace, wire.slba.get(), u64::from(wire.blocks.get()))?;
        // The other attributes are hints that nothing here can use.
        if deallocate {
            ranges.extents[ranges.count] = extent;
            ranges.count += 1;
        }
    }
    Ok(ranges)
}

/// The checked parts of a Copy, one behind the other at its destination.
struct Parts {
    sources: [Extent; MAX_COPY_RANGES as usize],
    count: usize,
    destination: Extent,
}

impl Parts {
    /// Source, destination and length of each, in bytes.
    fn iter(&self) -> impl Iterator<Item = (u64, u64, usize)> {
        let mut to = self.destination.offset;
        self.sources[..self.count].iter().map(move |source| {
            let at = to;
            to += source.len;
            // At most `MAX_COPY` blocks.
            (source.offset, at, usize::try_from(source.len).unwrap_or(0))
        })
    }
}

/// CDW12: NR in bits 7:0, the descriptor format in 11:8.
fn parts(shared: &Shared, dma: &mut Dma<'_>, entry: &SubmissionEntry) -> Result<Parts, Status> {
    const LIMIT: Status = Status::COMMAND_SIZE_LIMIT_EXCEEDED.with_dnr();
    check_flags(entry)?;
    let namespace = shared.namespace(Nsid(entry.nsid.get()))?;
    let cdw12 = entry.cdw12.get();
    if cdw12 >> 8 & 0xf != 0 {
        return Err(INVALID_FIELD);
    }
    let wanted = (cdw12 & 0xff) as usize + 1;
    if wanted > usize::from(MAX_COPY_RANGES) {
        return Err(LIMIT);
    }
    let mut bytes = [0; MAX_COPY_RANGES as usize * size_of::<CopyRange>()];
    let len = wanted * size_of::<CopyRange>();
    copy_in(dma, entry, &mut bytes[..len])?;
    let none = Extent { offset: 0, len: 0 };
    let mut sources = [none; MAX_COPY_RANGES as usize];
    let mut blocks = 0;
    for (wire, source) in bytes[..len]
        .chunks_exact(size_of::<CopyRange>())
        .zip(&mut sources)
    {
        let wire = CopyRange::read_from_bytes(wire).map_err(|_| Status::INTERNAL_ERROR)?;
        let count = u32::from(wire.nlb.get()) + 1;
        blocks += count;
        if count > MAX_COPY_RANGE.into() || blocks > MAX_COPY {
            return Err(LIMIT);
        }
        *source = extent(namespace, wire.slba.get(), count.into())?;
    }
    Ok(Parts {
        sources,
        count: wanted,
        destination: extent(namespace, entry.lba_range().slba, blocks.into())?,
    })
}

/// Copies a command's data out of the driver's memory.
pub(crate) fn copy_in(
    dma: &mut Dma<'_>,
    entry: &SubmissionEntry,
    bytes: &mut [u8],
) -> Result<(), Status> {
    let len = bytes.len();
    dma.pages(entry, len, Direction::Read, |from, len, at| {
        let to = &mut bytes[at..at + len];
        // SAFETY: `from` is `len` bytes that the IOMMU lets us read; `to` is ordinary memory of ours.
        unsafe { from.as_ptr().copy_to_nonoverlapping(to.as_mut_ptr(), len) };
        Ok(())
    })
}

/// Copies a command's data into the driver's memory: `bytes`, which the data pointer may have more room for (`room`).
pub(crate) fn copy_out(
    dma: &mut Dma<'_>,
    entry: &SubmissionEntry,
    room: usize,
    bytes: &[u8],
) -> Result<(), Status> {
    dma.pages(entry, room, Direction::Write, |to, len, at| {
        let from = bytes.get(at..).unwrap_or_default();
        let from = &from[..len.min(from.len())];
        let len = from.len();
        // SAFETY: as in `copy_in`, the other way round.
        unsafe { to.as_ptr().copy_from_nonoverlapping(from.as_ptr(), len) };
        Ok(())
    })
}

/// What a worker keeps between commands.
#[derive(Default)]
pub(crate) struct Scratch {
    data: Vec<u8>,
    other: Vec<u8>,
    hint: usize,
}

/// Carries out a command that may take long. Runs on a worker.
pub(crate) fn execute_slowly(
    shared: &Shared,
    entry: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Status {
    let result = match &shared.media {
        Media::Ram(ram) => zero_memory(shared, ram, entry, scratch),
        Media::File(image) => execute_on_file(shared, image, entry, scratch),
        // It never is too long for the core.
        Media::Null => Err(Status::INTERNAL_ERROR),
    };
    result.err().unwrap_or(Status::SUCCESS)
}

fn zero_memory(
    shared: &Shared,
    ram: &Ram,
    entry: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let release = |extent: Extent| {
        ram.release(extent.offset, extent.len);
        note_change(shared, ram, entry, extent);
    };
    if entry.opcode == io_opcode::WRITE_ZEROES {
        target(shared, entry).map(release)
    } else {
        let ranges = shared.with_dma(&mut scratch.hint, |dma| ranges(shared, dma, entry))?;
        ranges.as_slice().iter().for_each(|extent| release(*extent));
        Ok(())
    }
}

fn execute_on_file(
    shared: &Shared,
    image: &Image,
    entry: &SubmissionEntry,
    scratch: &mut Scratch,
) -> Result<(), Status> {
    let read_error = |_| Status::UNRECOVERED_READ_ERROR;
    let write_fault = |_| Status::WRITE_FAULT;
    let sync = |needed: bool| {
        if needed {
            image.sync().map_err(write_fault)
        } else {
            Ok(())
        }
    };
    match entry.opcode {
        io_opcode::READ => {
            let (extent, len) = transfer(shared, entry)?;
            let data = sized(&mut scratch.data, len);
            image.read(extent.offset, data).map_err(read_error)?;
            shared.with_dma(&mut scratch.hint, |dma| copy_out(dma, entry, len, data))
        }
        io_opcode::WRITE => {
            let (extent, len) = transfer(shared, entry)?;
            let data = sized(&mut scratch.data, len);
            shared.with_dma(&mut scratch.hint, |dma| copy_in(dma, entry, data))?;
            image.write(extent.offset, data).map_err(write_fault)?;
            sync(is_durable(shared, entry))
        }
        io_opcode::COMPARE => {
            let (extent, len) = transfer(shared, entry)?;
            let (theirs, ours) = (
                sized(&mut scratch.data, len),
                sized(&mut scratch.other, len),
            );
            shared.with_dma(&mut scratch.hint, |dma| copy_in(dma, entry, theirs))?;
            image.read(extent.offset, ours).map_err(read_error)?;
            if theirs == ours {
                Ok(())
            } else {
                Err(Status::COMPARE_FAILURE.with_dnr())
            }
        }
        io_opcode::COPY => {
            let parts = shared.with_dma(&mut scratch.hint, |dma| parts(shared, dma, entry))?;
            for (from, to, len) in parts.iter() {
                let data = sized(&mut scratch.data, len);
                image.read(from, data).map_err(read_error)?;
                image.write(to, data).map_err(write_fault)?;
            }
            sync(is_durable(shared, entry))
        }
        io_opcode::FLUSH => {
            flush_target(shared, entry)?;
            sync(true)
        }
        io_opcode::WRITE_ZEROES => {
            let extent = target(shared, entry)?;
            let deallocate = entry.cdw12.get() & CDW12_DEAC != 0;
            image
                .zero(extent.offset, extent.len, deallocate)
                .map_err(write_fault)?;
            sync(is_durable(shared, entry))
        }
        io_opcode::DATASET_MANAGEMENT => {
            let ranges = shared.with_dma(&mut scratch.hint, |dma| ranges(shared, dma, entry))?;
            for extent in ranges.as_slice().iter().filter(|extent| extent.len > 0) {
                image
                    .zero(extent.offset, extent.len, true)
                    .map_err(write_fault)?;
            }
            Ok(())
        }
        _ => Err(Status::INVALID_OPCODE.with_dnr()),
    }
}

fn sized(buffer: &mut Vec<u8>, len: usize) -> &mut [u8] {
    if buffer.len() < len {
        buffer.resize(len, 0);
    }
    &mut buffer[..len]
}
