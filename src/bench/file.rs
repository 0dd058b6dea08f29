//! `--file`: a file or block device through the kernel, by io_uring: the baseline that leaves the kernel where it is.
//!
//! Takes O_DIRECT and IOPOLL where they work, and says what it got. One ring and one set of buffers for each job.

use std::fs::{File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use io_uring::types::{Fd, SubmitArgs, Timespec};
use io_uring::{EnterFlags, IoUring, opcode};
use memmap2::{MmapMut, MmapRaw};

use super::device::noise;
use super::engine::{DEADLINE, Done, Queue};
use super::io::{Io, Op};
use super::stats::Counters;
use super::target::{Info, Keeper, Needs, Pool, Target};

/// Of one write when a file is laid out.
const LAYOUT_BYTES: usize = 1 << 20;
const PROBE_DEADLINE: Duration = Duration::from_secs(2);

/// Opens the file, makes it first if that was asked for, and a ring for each job.
///
/// # Errors
/// When it cannot be opened, or must not be written.
pub fn open(
    path: &Path,
    interrupts: bool,
    overwrite: bool,
    needs: &Needs,
) -> anyhow::Result<Box<dyn Target>> {
    let target = open_rings(path, interrupts, overwrite, needs);
    target.with_context(|| format!("file {}", path.display()))
}

fn open_rings(
    path: &Path,
    interrupts: bool,
    overwrite: bool,
    needs: &Needs,
) -> anyhow::Result<Box<dyn Target>> {
    let changes = needs.writes || needs.trims;
    let is_device = path
        .metadata()
        .is_ok_and(|metadata| metadata.file_type().is_block_device());
    ensure!(
        !(is_device && changes) || overwrite,
        "this would replace what is on the block device: say --overwrite-data if that may be"
    );
    if !is_device {
        lay_out(path, needs.reach)?;
    }
    let (file, direct) = open_file(path, is_device, changes, needs.bs)?;
    let capacity = (&file).seek(SeekFrom::End(0))?;
    let block = match is_device {
        true => rustix::fs::ioctl_blksszget(&file)?,
        false => 512,
    };
    // Neither fsync nor fallocate can be polled for.
    let may_poll = direct && !interrupts && !needs.flushes && !needs.trims;
    let iopoll = may_poll && capacity >= u64::from(needs.bs) && polls(&file, needs.bs)?;
    let mut queues = Vec::new();
    for index in 0..needs.queues {
        queues.push(FileQueue::new(&file, iopoll, interrupts, needs, index)?);
    }
    let info = Info {
        name: path.display().to_string(),
        description: format!(
            "{} of {capacity} bytes by io_uring, {}, {}, {} ring(s)",
            if is_device { "block device" } else { "file" },
            if direct {
                "O_DIRECT"
            } else {
                "through the page cache (no O_DIRECT here)"
            },
            match (iopoll, interrupts) {
                (true, _) => "IOPOLL",
                (false, false) => "completion queue polled (no IOPOLL here)",
                (false, true) => "sleeping for completions",
            },
            needs.queues
        ),
        capacity,
        block,
        server: None,
        ring: None,
        stages: None,
        doorbells: "io_uring_enter",
    };
    Ok(Box::new(Pool {
        info,
        queues,
        keeper: file,
    }))
}

/// Makes a regular file as long as the work reaches. Holes would be read faster than any data.
fn lay_out(path: &Path, reach: Option<u64>) -> anyhow::Result<()> {
    let exists = path.exists();
    let Some(reach) = reach else {
        ensure!(exists, "it does not exist: give a --size to have it made");
        return Ok(());
    };
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(path)
        .context("cannot open it for writing, to make it as long as --offset and --size say")?;
    let mut at = file.seek(SeekFrom::End(0))?;
    let data = noise(LAYOUT_BYTES, 0);
    while at < reach {
        let left = usize::try_from(reach - at).unwrap_or(LAYOUT_BYTES);
        let part = &data[..left.min(LAYOUT_BYTES)];
        file.write_all_at(part, at)
            .with_context(|| format!("cannot make it {reach} bytes long"))?;
        at += part.len() as u64;
    }
    file.sync_all()?;
    Ok(())
}

/// With O_DIRECT if a block of `bs` can be read that way, without otherwise.
fn open_file(path: &Path, is_device: bool, writes: bool, bs: u32) -> anyhow::Result<(File, bool)> {
    let open = |direct: bool| {
        // With O_EXCL the kernel refuses a device that is mounted.
        let exclusive = if is_device && writes { libc::O_EXCL } else { 0 };
        let flags = exclusive | if direct { libc::O_DIRECT } else { 0 };
        OpenOptions::new()
            .read(true)
            .write(writes)
            .custom_flags(flags)
            .open(path)
    };
    if let Ok(file) = open(true) {
        let mut page = MmapMut::map_anon((bs as usize).next_multiple_of(4096))?;
        let read = file.read_at(&mut page[..bs as usize], 0);
        if !read.is_err_and(|error| error.raw_os_error() == Some(libc::EINVAL)) {
            return Ok((file, true));
        }
    }
    let file = open(false).context("cannot open it")?;
    Ok((file, false))
}

/// The device behind the file completes polled reads.
fn polls(file: &File, bs: u32) -> anyhow::Result<bool> {
    let needs = Needs {
        queues: 1,
        depth: 1,
        bs,
        writes: false,
        flushes: false,
        trims: false,
        verify: false,
        reach: None,
    };
    let Ok(mut queue) = FileQueue::new(file, true, false, &needs, 0) else {
        return Ok(false);
    };
    let read = Io {
        op: Op::Read,
        offset: 0,
        len: bs,
    };
    queue.submit(0, read)?;
    if queue.commit().is_err() {
        return Ok(false);
    }
    let start = Instant::now();
    let mut done = Vec::with_capacity(1);
    while done.is_empty() && start.elapsed() < PROBE_DEADLINE {
        if queue.poll(&mut done).is_err() {
            break;
        }
    }
    match done.first() {
        Some(done) => Ok(done.failure.is_none()),
        None => {
            // The kernel may still write there.
            std::mem::forget(queue);
            Ok(false)
        }
    }
}

impl Keeper<FileQueue> for File {
    fn close(self, _queues: Vec<FileQueue>) -> anyhow::Result<()> {
        Ok(())
    }
}

/// One io_uring, and a buffer for each slot.
struct FileQueue {
    // Before the buffers: the kernel ends what is in flight when it goes.
    ring: IoUring,
    buffers: MmapRaw,
    stride: usize,
    fd: RawFd,
    iopoll: bool,
    interrupts: bool,
    /// By slot: what a completion must return.
    wanted: Vec<u32>,
    counters: Counters,
}

impl FileQueue {
    fn new(
        file: &File,
        iopoll: bool,
        interrupts: bool,
        needs: &Needs,
        index: u32,
    ) -> anyhow::Result<FileQueue> {
        let mut builder = IoUring::builder();
        if iopoll {
            builder.setup_iopoll();
        }
        let entries = needs.depth.next_power_of_two();
        let ring = builder.build(entries).context(
            "cannot make an io_uring (is kernel.io_uring_disabled set, or the limit of locked memory low?)",
        )?;
        let stride = (needs.bs as usize).next_multiple_of(4096);
        let mut buffers = MmapMut::map_anon(stride * needs.depth as usize)?;
        // Written even where nothing is sent, so that no page is first touched while it is measured.
        let data = noise(stride, index);
        buffers
            .chunks_exact_mut(stride)
            .for_each(|buffer| buffer.copy_from_slice(&data));
        Ok(FileQueue {
            ring,
            buffers: buffers.into(),
            stride,
            fd: file.as_raw_fd(),
            iopoll,
            interrupts,
            wanted: vec![0; needs.depth as usize],
            counters: Counters::default(),
        })
    }

    /// # Panics
    /// When the slot has no `len` bytes: a programmer's error.
    fn buffer(&self, slot: u32, len: usize) -> *mut u8 {
        let start = slot as usize * self.stride;
        assert!(len <= self.stride && start + len <= self.buffers.len());
        // SAFETY: inside the mapping (asserted).
        unsafe { self.buffers.as_mut_ptr().add(start) }
    }
}

impl Queue for FileQueue {
    #[inline]
    fn submit(&mut self, slot: u32, io: Io) -> anyhow::Result<()> {
        ensure!(
            io.len as usize <= self.stride,
            "{io:?} is longer than its buffer"
        );
        let fd = Fd(self.fd);
        let buffer = self.buffer(slot, io.len as usize);
        self.wanted[slot as usize] = match io.op {
            Op::Read | Op::Write => io.len,
            Op::Trim | Op::Flush => 0,
        };
        let entry = match io.op {
            Op::Read => opcode::Read::new(fd, buffer, io.len)
                .offset(io.offset)
                .build(),
            Op::Write => opcode::Write::new(fd, buffer, io.len)
                .offset(io.offset)
                .build(),
            Op::Trim => opcode::Fallocate::new(fd, u64::from(io.len))
                .offset(io.offset)
                .mode(libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE)
                .build(),
            Op::Flush => opcode::Fsync::new(fd).build(),
        };
        let entry = entry.user_data(slot.into());
        // SAFETY: the buffer is the slot's own and as long as the I/O (checked); it lives until the ring is gone, and
        // nobody touches it before the completion. The file outlives the queue (`Pool::keeper`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.context("the submission queue is full")
    }

    fn commit(&mut self) -> anyhow::Result<()> {
        let start = Instant::now();
        loop {
            self.counters.doorbells += 1;
            match self.ring.submit() {
                Ok(_) if self.ring.submission().is_empty() => return Ok(()),
                Ok(_) => {}
                // Not now: memory, or completions that nobody has taken.
                Err(error)
                    if [libc::EINTR, libc::EAGAIN, libc::EBUSY]
                        .map(Some)
                        .contains(&error.raw_os_error()) => {}
                Err(error) => return Err(error).context("io_uring_enter"),
            }
            if start.elapsed() > DEADLINE {
                bail!("io_uring takes no submissions for {DEADLINE:?}");
            }
        }
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        if self.iopoll {
            self.counters.doorbells += 1;
            let flags = EnterFlags::GETEVENTS.bits();
            // SAFETY: nothing is submitted and no argument is passed.
            let entered = unsafe { self.ring.submitter().enter::<()>(0, 0, flags, None) };
            if let Err(error) = entered
                && error.raw_os_error() != Some(libc::EINTR)
                && error.raw_os_error() != Some(libc::EAGAIN)
            {
                return Err(error).context("io_uring_enter");
            }
        }
        for entry in self.ring.completion() {
            let slot = u32::try_from(entry.user_data()).unwrap_or(u32::MAX);
            let wanted = self.wanted.get(slot as usize).copied().unwrap_or(0);
            let failure = match u32::try_from(entry.result()) {
                Ok(bytes) if bytes == wanted => None,
                // A part of it, which no disk does.
                Ok(_) => Some(0),
                Err(_) => u16::try_from(entry.result().unsigned_abs())
                    .ok()
                    .or(Some(0)),
            };
            done.push(Done { slot, failure });
        }
        Ok(())
    }

    fn sleep(&mut self, timeout: Duration) -> anyhow::Result<bool> {
        if !self.interrupts {
            return Ok(false);
        }
        let timeout = Timespec::from(timeout);
        let arguments = SubmitArgs::new().timespec(&timeout);
        self.counters.doorbells += 1;
        match self.ring.submitter().submit_with_args(1, &arguments) {
            Ok(_) => self.counters.notifications += 1,
            Err(error)
                if [libc::ETIME, libc::EINTR, libc::EBUSY]
                    .map(Some)
                    .contains(&error.raw_os_error()) => {}
            Err(error) => return Err(error).context("io_uring_enter"),
        }
        Ok(true)
    }

    fn explain(&self, status: u16) -> String {
        match status {
            0 => "only a part of it was done".to_owned(),
            errno => std::io::Error::from_raw_os_error(errno.into()).to_string(),
        }
    }

    fn write_data(&mut self, slot: u32, bytes: &[u8]) {
        let to = self.buffer(slot, bytes.len());
        // SAFETY: as long as `bytes` (`buffer`), which is ordinary memory that the mapping cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) };
    }

    fn read_data(&self, slot: u32, bytes: &mut [u8]) {
        let from = self.buffer(slot, bytes.len());
        // SAFETY: as long as `bytes` (`buffer`), which is exclusive ordinary memory.
        unsafe { std::ptr::copy_nonoverlapping(from, bytes.as_mut_ptr(), bytes.len()) };
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
