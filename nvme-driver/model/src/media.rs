//! Where the blocks of all namespaces are kept: memory, an image file, or nowhere.
//!
//! Memory is reached inline by whichever queue's core asks. A file is reached by worker threads alone, so that no core
//! that polls ever waits for a disk, and a full disk or a failing one is a command's status, never a signal.

use std::ffi::c_void;
use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::{Path, PathBuf};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::{FallocateFlags, FlockOperation, fallocate, fdatasync, flock};
use rustix::mm::{
    Advice, MapFlags, MprotectFlags, ProtFlags, madvise, mmap_anonymous, mprotect, munmap,
};

use crate::{Medium, ModelError};

const PAGE: u64 = 4096;
/// Addresses that memory keeps for its growth: those who use it know where it begins, so that it cannot move.
const ROOM: usize = 1 << 40;

/// Opened for one controller, by its configuration.
#[derive(Debug)]
pub(crate) enum Media {
    Ram(Ram),
    File(Image),
    Null,
}

impl Media {
    /// Opens `medium` with `size` bytes; for an image file 0 takes it as long as it is.
    pub(crate) fn open(medium: &Medium, size: u64) -> Result<(Media, u64), ModelError> {
        match medium {
            Medium::Ram => Ok((Media::Ram(Ram::new(size)?), size)),
            Medium::File { path } => {
                let (image, size) = Image::open(path, size)?;
                Ok((Media::File(image), size))
            }
            Medium::Null => Ok((Media::Null, size)),
        }
    }

    /// Makes it larger. What is new are zeroes.
    pub(crate) fn grow(&self, size: u64) -> Result<(), String> {
        match self {
            Media::Ram(ram) => ram.grow(size),
            Media::File(image) => image.grow(size).map_err(|error| error.to_string()),
            Media::Null => Ok(()),
        }
    }

    /// How long an image is whose length is its own affair; `None` where that is decided here.
    pub(crate) fn measure(&self) -> Result<Option<u64>, ModelError> {
        match self {
            Media::File(image) => image.measure(),
            Media::Ram(_) | Media::Null => Ok(None),
        }
    }

    /// Copies bytes out, for tests and reports.
    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        match self {
            Media::Ram(ram) => ram.read(offset, bytes),
            Media::File(image) => image.file.read_exact_at(bytes, offset)?,
            Media::Null => return Err(io::Error::other("nothing is kept")),
        }
        Ok(())
    }

    /// Makes everything written so far durable. May take long.
    pub(crate) fn sync(&self) -> io::Result<()> {
        match self {
            Media::Ram(_) | Media::Null => Ok(()),
            Media::File(image) => image.sync(),
        }
    }
}

/// Zeroed memory that is taken from the system as it is written.
#[derive(Debug)]
pub(crate) struct Ram {
    base: NonNull<u8>,
    /// Bytes that are there, from `base` on. Only grows.
    len: AtomicUsize,
    /// Bytes of address space, of which those beyond `len` are not accessible.
    room: usize,
}

// SAFETY: the mapping belongs to this value; its bytes are only copied, by raw pointer. Two commands that touch the
// same blocks at the same time get torn data, as the specification allows.
unsafe impl Send for Ram {}
// SAFETY: as above.
unsafe impl Sync for Ram {}

impl Ram {
    fn new(size: u64) -> Result<Ram, ModelError> {
        let no_memory = |reason: String| ModelError::Memory { size, reason };
        let len = usize::try_from(size).map_err(|error| no_memory(error.to_string()))?;
        let map = |room: usize| {
            let flags = MapFlags::PRIVATE | MapFlags::NORESERVE;
            // SAFETY: a fresh anonymous mapping of the kernel's choice disturbs nothing.
            unsafe { mmap_anonymous(std::ptr::null_mut(), room, ProtFlags::empty(), flags) }
        };
        // Where addresses are scarce there are none for growth.
        let (room, base) = match (len.max(ROOM), map(len.max(ROOM))) {
            (room, Ok(base)) => (room, Ok(base)),
            _ => (len, map(len)),
        };
        let base = base.map_err(|error| no_memory(error.to_string()))?;
        let base = NonNull::new(base.cast()).ok_or_else(|| no_memory("mapped at 0".to_owned()))?;
        let ram = Ram {
            base,
            len: AtomicUsize::new(0),
            room,
        };
        ram.grow(size).map_err(no_memory)?;
        Ok(ram)
    }

    /// One caller at a time.
    fn grow(&self, size: u64) -> Result<(), String> {
        let len = usize::try_from(size).ok().filter(|len| *len <= self.room);
        let len = len.ok_or_else(|| format!("memory can have {} bytes at most", self.room))?;
        // SAFETY: the pages are those of our own mapping (checked above), and become accessible; those that are stay so.
        let grown = unsafe {
            mprotect(
                self.base.as_ptr().cast::<c_void>(),
                len,
                MprotectFlags::READ | MprotectFlags::WRITE,
            )
        };
        grown.map_err(|error| error.to_string())?;
        self.len.store(len, Ordering::Release);
        Ok(())
    }

    /// Where the `len` bytes at `offset` are.
    ///
    /// # Panics
    /// When they lie outside: our own error, ranges are checked against the namespace before.
    #[inline]
    pub(crate) fn at(&self, offset: u64, len: usize) -> NonNull<u8> {
        // Who was let through by a size has acquired that, and the memory was there before.
        let own = self.len.load(Ordering::Relaxed);
        let inside = usize::try_from(offset)
            .ok()
            .filter(|offset| *offset <= own && len <= own - *offset);
        let offset = inside.expect("a checked range lies outside the medium");
        // SAFETY: `offset + len` lies within the mapping (checked above).
        unsafe { self.base.add(offset) }
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) {
        let from = self.at(offset, bytes.len()).as_ptr();
        // SAFETY: `at` checked the range; `bytes` is exclusive ordinary memory.
        unsafe { from.copy_to_nonoverlapping(bytes.as_mut_ptr(), bytes.len()) };
    }

    /// Copies bytes in.
    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) {
        let to = self.at(offset, bytes.len());
        // SAFETY: as in `read`; `bytes` is ordinary memory that cannot overlap a private mapping of ours.
        unsafe {
            to.as_ptr()
                .copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
        };
    }

    /// Copies bytes within; the two may overlap.
    pub(crate) fn copy(&self, from: u64, to: u64, len: usize) {
        // SAFETY: `at` checked both ranges.
        unsafe { self.at(from, len).copy_to(self.at(to, len), len) };
    }

    /// Zeroes by storing.
    pub(crate) fn zero(&self, offset: u64, len: usize) {
        // SAFETY: `at` checked the range.
        unsafe { self.at(offset, len).write_bytes(0, len) };
    }

    /// Zeroes by giving whole pages back to the system. One system call: for workers.
    pub(crate) fn release(&self, offset: u64, len: u64) {
        let first = offset.next_multiple_of(PAGE);
        let end = offset + len;
        let last = end - end % PAGE;
        if first >= last {
            return self.zero(offset, clamp(len));
        }
        self.zero(offset, clamp(first - offset));
        self.zero(last, clamp(end - last));
        let pages = self.at(first, clamp(last - first));
        // SAFETY: whole pages of our own mapping (`at` checked the range), which may be dropped: that is the request.
        let dropped = unsafe {
            madvise(
                pages.as_ptr().cast::<c_void>(),
                clamp(last - first),
                Advice::LinuxDontNeed,
            )
        };
        if dropped.is_err() {
            self.zero(first, clamp(last - first));
        }
    }
}

/// Lengths within a mapping fit the address space.
fn clamp(len: u64) -> usize {
    usize::try_from(len).unwrap_or(usize::MAX)
}

impl Drop for Ram {
    fn drop(&mut self) {
        // SAFETY: the mapping was made with this many addresses in `new`, and nobody else knows it.
        let _ = unsafe { munmap(self.base.as_ptr().cast(), self.room) };
    }
}

/// An image file or a block device. Locked for as long as it is open: two controllers on one image would destroy it.
#[derive(Debug)]
pub(crate) struct Image {
    file: File,
    path: PathBuf,
    /// All of it is served, however long it is: not that part of a block device which was asked for.
    whole: bool,
}

impl Image {
    fn open(path: &Path, size: u64) -> Result<(Image, u64), ModelError> {
        let error = |doing: &'static str| {
            let path: PathBuf = path.to_owned();
            move |error: io::Error| ModelError::Image {
                doing,
                path,
                reason: error.to_string(),
            }
        };
        let mut options = OpenOptions::new();
        // A new image needs a size; a mistyped path without one must not become an empty file.
        let mut file = options
            .read(true)
            .write(true)
            .create(size != 0)
            .truncate(false)
            .open(path)
            .map_err(error("open"))?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(io::Error::from)
            .map_err(|e| match e.kind() {
                io::ErrorKind::WouldBlock => io::Error::other("another process is using it"),
                _ => e,
            })
            .map_err(error("lock"))?;
        let kind = file.metadata().map_err(error("stat"))?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let neither = io::Error::other("it is neither a regular file nor a block device");
            return Err(error("use")(neither));
        }
        // The end of a block device is found by seeking only.
        let mut len = file.seek(SeekFrom::End(0)).map_err(error("measure"))?;
        if len < size {
            if !kind.is_file() {
                let short = io::Error::other(format!("it has {len} bytes, {size} were asked for"));
                return Err(error("use")(short));
            }
            file.set_len(size).map_err(error("extend"))?;
            file.sync_all().map_err(error("extend"))?;
            len = size;
        }
        if len > size && size != 0 && kind.is_file() {
            let longer = io::Error::other(format!(
                "it has {len} bytes, more than the {size} asked for: leave the size out to serve all of it"
            ));
            return Err(error("use")(longer));
        }
        let image = Image {
            file,
            path: path.to_owned(),
            whole: size == 0 || kind.is_file(),
        };
        Ok((image, if size == 0 { len } else { size }))
    }

    fn grow(&self, size: u64) -> io::Result<()> {
        if !self.file.metadata()?.file_type().is_file() {
            return Err(io::Error::other(
                "the image is a block device: make that larger, then have it looked at",
            ));
        }
        // One that somebody else has made longer still stays so.
        if (&self.file).seek(SeekFrom::End(0))? < size {
            self.file.set_len(size)?;
        }
        self.file.sync_all()
    }

    fn measure(&self) -> Result<Option<u64>, ModelError> {
        if !self.whole {
            return Ok(None);
        }
        // Others read and write it at places that they name.
        let len = (&self.file).seek(SeekFrom::End(0));
        let len = len.map_err(|error| ModelError::Image {
            doing: "measure",
            path: self.path.clone(),
            reason: error.to_string(),
        })?;
        Ok(Some(len))
    }

    pub(crate) fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(fdatasync(&self.file)?)
    }

    /// Makes a range read back as zeroes, as a hole if `deallocate`. A file system that knows neither gets zeroes
    /// written.
    pub(crate) fn zero(&self, offset: u64, len: u64, deallocate: bool) -> io::Result<()> {
        let mode = if deallocate {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
        };
        match fallocate(&self.file, mode, offset, len) {
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NODEV) => {}
            result => return Ok(result?),
        }
        static ZEROES: [u8; 64 << 10] = [0; 64 << 10];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(ZEROES.len() as u64);
            self.file
                .write_all_at(&ZEROES[..clamp(step)], offset + done)?;
            done += step;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn temp(name: &str) -> PathBuf {
        std::env::temp_dir().join(format!("nvme-model-{}-{name}", std::process::id()))
    }

    #[test]
    fn ram_release_of_unaligned_ranges_zeroes_exactly_them() {
        let ram = Ram::new(64 << 10).unwrap();
        for (offset, len) in [
            (512, 512),
            (4096, 8192),
            (512, 16384),
            (5000, 100),
            (0, 65536),
        ] {
            ram.write(0, &[0xaa; 64 << 10]);
            ram.release(offset, len);
            let mut bytes = vec![1; 64 << 10];
            ram.read(0, &mut bytes);
            for (i, byte) in bytes.iter().enumerate() {
                let inside = (offset..offset + len).contains(&(i as u64));
                assert_eq!(
                    *byte,
                    if inside { 0 } else { 0xaa },
                    "{offset}+{len} at {i}"
                );
            }
        }
    }

    #[test]
    fn image_opened_twice_is_refused_and_keeps_its_bytes() {
        let path = temp("twice");
        let (image, size) = Image::open(&path, 1 << 20).unwrap();
        assert_eq!(size, 1 << 20);
        image.write(4096, b"kept").unwrap();
        let error = Image::open(&path, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("another process"), "{error}");
        drop(image);
        let (image, size) = Image::open(&path, 0).unwrap();
        let mut bytes = [0; 4];
        image.read(4096, &mut bytes).unwrap();
        assert_eq!((&bytes, size), (b"kept", 1 << 20));
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn image_that_is_absent_without_a_size_is_not_created() {
        let path = temp("absent");
        assert!(Image::open(&path, 0).is_err());
        assert!(!path.exists());
    }

    #[test]
    fn image_longer_than_asked_for_is_refused() {
        let path = temp("longer");
        drop(Image::open(&path, 1 << 20).unwrap());
        let error = Image::open(&path, 1 << 19).unwrap_err().to_string();
        assert!(error.contains("leave the size out"), "{error}");
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn image_zero_either_way_reads_back_zeroes() {
        let path = temp("zero");
        let (image, _) = Image::open(&path, 1 << 20).unwrap();
        for deallocate in [false, true] {
            image.write(0, &[7; 16384]).unwrap();
            image.zero(512, 8192, deallocate).unwrap();
            let mut bytes = [0; 16384];
            image.read(0, &mut bytes).unwrap();
            assert!(bytes[..512].iter().chain(&bytes[8704..]).all(|b| *b == 7));
            assert!(bytes[512..8704].iter().all(|b| *b == 0));
        }
        std::fs::remove_file(&path).unwrap();
    }
}
