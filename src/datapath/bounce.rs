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
/// Bytes that are compared at a time.
const COMPARE_STEP: u32 = 512;

/// Names a chunk that is in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkId(u16);

/// The bounce buffers of one queue pair.
#[derive(Debug)]
pub struct BouncePool {
    memory: DmaBuffer,
    free: Vec<ChunkId>,
    /// Where the guest's bytes are that each chunk's bytes have to do with. Kept because the guest's descriptors may have
    /// changed since (I6).
    segments: Vec<Vec<Segment>>,
    /// By chunk: what to do when its command has completed.
    purposes: [Purpose; CHUNKS as usize],
}

/// What becomes of a chunk's bytes.
#[derive(Clone, Copy, Debug)]
enum Purpose {
    /// They are copied to the guest, if there are segments.
    Copy,
    /// The first `len` are compared with the guest's, again and again if those are fewer. `offset` bytes of the guest's
    /// are behind us.
    Compare { len: u32, offset: u64 },
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
            segments: (0..CHUNKS)
                .map(|_| Vec::with_capacity(max_segments))
                .collect(),
            purposes: [Purpose::Copy; CHUNKS as usize],
        })
    }

    /// Takes a chunk, if one is free.
    pub fn take(&mut self) -> Option<ChunkId> {
        self.free.pop()
    }

    /// Gives a chunk back. Its command has completed, or was never submitted.
    pub fn release(&mut self, chunk: ChunkId) {
        self.segments[usize::from(chunk.0)].clear();
        self.purposes[usize::from(chunk.0)] = Purpose::Copy;
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
        let kept = &mut self.segments[usize::from(chunk.0)];
        kept.clear();
        kept.extend(segments);
        let bytes: usize = kept.iter().map(|segment| segment.len() as usize).sum();
        self.clear(chunk, u32::try_from(bytes).unwrap_or(CHUNK_SIZE));
    }

    /// The first `len` bytes of a chunk should be those of `segments` when its read completes: again and again if those are fewer. `offset` bytes of the guest's data are behind us.
    pub fn expect(
        &mut self,
        chunk: ChunkId,
        len: u32,
        segments: impl Iterator<Item = Segment>,
        offset: u64,
    ) {
        self.remember(chunk, segments);
        self.clear(chunk, len);
        self.purposes[usize::from(chunk.0)] = Purpose::Compare { len, offset };
    }

    /// A chunk's command has completed well: does with its bytes what they are for. Of a comparison, where the first byte
    /// is that differs, counted from the beginning of the guest's.
    pub fn settle(&mut self, chunk: ChunkId) -> Option<u64> {
        match self.purposes[usize::from(chunk.0)] {
            Purpose::Copy => {
                self.scatter(chunk);
                None
            }
            Purpose::Compare { len, offset } => {
                let at = self.first_difference(chunk, len)?;
                Some(offset + u64::from(at))
            }
        }
    }

    /// Copies a chunk's bytes to where [`BouncePool::remember`] said, after a read.
    fn scatter(&mut self, chunk: ChunkId) {
        let base = self.memory.pointer(self.offset(chunk));
        let segments = self.segments[usize::from(chunk.0)].iter().copied();
        copy_each(base, segments, |ours, theirs, len| {
            // SAFETY: as in `gather`, the other way round.
            unsafe { std::ptr::copy_nonoverlapping(ours.as_ptr(), theirs.as_ptr(), len) };
        });
    }

    /// Where in the guest's bytes the first one is that a chunk's first `len` bytes are not.
    #[cold]
    fn first_difference(&self, chunk: ChunkId, len: u32) -> Option<u32> {
        let len = len.min(CHUNK_SIZE);
        let mut theirs = 0;
        for segment in &self.segments[usize::from(chunk.0)] {
            let mut at = 0;
            while at < segment.len() && theirs < len {
                let mut guest = [0; COMPARE_STEP as usize];
                let step = (segment.len() - at).min(COMPARE_STEP).min(len - theirs);
                let guest = &mut guest[..step as usize];
                segment.suffix(at).copy_to(guest);
                if let Some(different) = self.differs(chunk, theirs, guest) {
                    return Some(theirs + different);
                }
                at += step;
                theirs += step;
            }
        }
        // Whatever follows has to be what came so many bytes before: that was compared.
        let mut done = theirs;
        while theirs > 0 && done < len {
            let mut before = [0; COMPARE_STEP as usize];
            let step = theirs.min(COMPARE_STEP).min(len - done);
            let before = &mut before[..step as usize];
            self.copy_out(chunk, done - theirs, before);
            if let Some(different) = self.differs(chunk, done, before) {
                return Some((done + different) % theirs);
            }
            done += step;
        }
        None
    }

    /// Which of `bytes` is the first that a chunk does not have at `at`.
    fn differs(&self, chunk: ChunkId, at: u32, bytes: &[u8]) -> Option<u32> {
        let mut ours = [0; COMPARE_STEP as usize];
        let ours = &mut ours[..bytes.len()];
        self.copy_out(chunk, at, ours);
        let place = ours.iter().zip(bytes).position(|(a, b)| a != b)?;
        u32::try_from(place).ok()
    }

    /// Copies bytes of a chunk whose command has completed.
    fn copy_out(&self, chunk: ChunkId, at: u32, bytes: &mut [u8]) {
        let room = CHUNK_SIZE.saturating_sub(at) as usize;
        let len = bytes.len().min(room);
        let base = self.memory.pointer(self.offset(chunk) + at as usize);
        // SAFETY: `at + len <= CHUNK_SIZE`: within the chunk, which is ours; `bytes` is other memory.
        unsafe {
            base.as_ptr()
                .copy_to_nonoverlapping(bytes.as_mut_ptr(), len)
        };
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
