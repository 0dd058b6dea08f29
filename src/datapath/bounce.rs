//! Bounce buffers: for data that PRPs cannot describe (a buffer at an odd address, or a gap inside a page).
//! Allocated once per queue pair; a request that finds none free waits, with its virtqueue, for a completion.

use std::ptr::NonNull;
use std::sync::Arc;

use nvme_driver::DataSegment;
use nvme_driver::dma::{DmaAccess, DmaBuffer, DmaError, DmaSpace};

use crate::virtio::memory::Segment;

/// Bytes of one chunk, the most that one bounced command moves. At least the largest logical block (64 KiB).
pub const CHUNK_SIZE: u32 = 64 << 10;
/// Chunks of one queue pair.
const CHUNKS: u16 = 16;

/// Names a chunk that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkId(u16);

/// The bounce buffers of one queue pair.
#[derive(Debug)]
pub struct BouncePool {
    memory: DmaBuffer,
    free: Vec<ChunkId>,
    /// Where the bytes of each chunk go when a read completes. Kept because the guest's descriptors may have changed
    /// since (I6).
    scatter: Vec<Vec<Segment>>,
}

// SAFETY: the segments point into guest memory that the lane of the request keeps mapped until it has drained.
unsafe impl Send for BouncePool {}

impl BouncePool {
    /// A pool for requests of at most `max_segments` segments.
    ///
    /// # Errors
    /// When there is no memory for it.
    pub fn new(space: &Arc<DmaSpace>, max_segments: usize) -> Result<BouncePool, DmaError> {
        let bytes = CHUNK_SIZE as usize * usize::from(CHUNKS);
        Ok(BouncePool {
            memory: DmaBuffer::new(space, bytes, DmaAccess::Both)?,
            free: (0..CHUNKS).rev().map(ChunkId).collect(),
            scatter: (0..CHUNKS)
                .map(|_| Vec::with_capacity(max_segments))
                .collect(),
        })
    }

    /// Takes a chunk, if one is free.
    pub fn take(&mut self) -> Option<ChunkId> {
        self.free.pop()
    }

    /// Gives a chunk back. Its command has completed, or was never submitted.
    pub fn release(&mut self, chunk: ChunkId) {
        self.scatter[usize::from(chunk.0)].clear();
        self.free.push(chunk);
    }

    /// The first `len` bytes of a chunk, as the device sees them.
    #[must_use]
    pub fn data(&self, chunk: ChunkId, len: u32) -> DataSegment {
        DataSegment {
            iova: self.memory.iova(self.offset(chunk)),
            len,
        }
    }

    /// Copies the guest's bytes into a chunk, before a write.
    pub fn gather(&mut self, chunk: ChunkId, segments: impl Iterator<Item = Segment>) {
        let base = self.memory.pointer(self.offset(chunk));
        copy_each(base, segments, |ours, theirs, len| {
            // SAFETY: `copy_each` stays within the chunk, which is ours; `theirs` is `len` bytes of mapped guest memory.
            // The guest may write meanwhile: it gets whatever mix of bytes it asked for (I1: no references).
            unsafe { std::ptr::copy_nonoverlapping(theirs.as_ptr(), ours.as_ptr(), len) };
        });
    }

    /// Fills the first `len` bytes of a chunk with zeroes, before a write.
    pub fn clear(&mut self, chunk: ChunkId, len: u32) {
        let base = self.memory.pointer(self.offset(chunk));
        // SAFETY: within the chunk, which is CHUNK_SIZE bytes of ours and not at the device yet.
        unsafe { base.write_bytes(0, len.min(CHUNK_SIZE) as usize) };
    }

    /// Remembers where a chunk's bytes go when its read completes. They are zeroes until the device writes there: one
    /// that says it has read and has not must not pass on what another guest wrote.
    pub fn remember(&mut self, chunk: ChunkId, segments: impl Iterator<Item = Segment>) {
        let scatter = &mut self.scatter[usize::from(chunk.0)];
        scatter.clear();
        scatter.extend(segments);
        let bytes: usize = scatter.iter().map(|segment| segment.len() as usize).sum();
        let base = self.memory.pointer(self.offset(chunk));
        // SAFETY: within the chunk, which is CHUNK_SIZE bytes of ours and not at the device yet.
        unsafe { base.write_bytes(0, bytes.min(CHUNK_SIZE as usize)) };
    }

    /// Copies a chunk's bytes to where [`BouncePool::remember`] said, after a read.
    pub fn scatter(&mut self, chunk: ChunkId) {
        let base = self.memory.pointer(self.offset(chunk));
        let segments = self.scatter[usize::from(chunk.0)].iter().copied();
        copy_each(base, segments, |ours, theirs, len| {
            // SAFETY: as in `gather`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(ours.as_ptr(), theirs.as_ptr(), len) };
        });
    }

    fn offset(&self, chunk: ChunkId) -> usize {
        usize::from(chunk.0) * CHUNK_SIZE as usize
    }
}

fn copy_each(
    base: NonNull<u8>,
    segments: impl Iterator<Item = Segment>,
    mut copy: impl FnMut(NonNull<u8>, NonNull<u8>, usize),
) {
    let mut offset = 0_usize;
    for segment in segments {
        let len = (segment.len() as usize).min(CHUNK_SIZE as usize - offset);
        // SAFETY: `offset <= CHUNK_SIZE` by the line above, and a chunk is CHUNK_SIZE bytes.
        copy(unsafe { base.add(offset) }, segment.hva(), len);
        offset += len;
    }
}
