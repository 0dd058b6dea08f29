//! The driver side of a split virtqueue (virtio 1.2, 2.7) that costs as little as it can: the load must not be what is
//! measured.
//!
//! Each slot has its descriptors, header, status and buffer for ever; what does not change between two I/Os of a slot is
//! not written again. A read after a read stores 8 bytes of sector, a status, an avail entry and, once a batch, the
//! index.
//!
//! The server is another process that may write anywhere in this memory at any time. So indices are ours, memory is
//! reached as atomics or by copies (I1), and what the used ring says is checked (I10).

use std::fs::File;
use std::io::{Read, Write};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, fence};
use std::time::Duration;

use anyhow::{Context, bail};
use memmap2::{MmapOptions, MmapRaw};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;

use super::device::noise;
use super::engine::{Done, Queue};
use super::io::{Io, Op};
use super::stats::Counters;
use super::target::Needs;
use crate::virtio::blk::{request_type, status};
use crate::virtio::virtqueue::{
    MAX_QUEUE_SIZE, avail_ring_bytes, descriptor_table_bytes, used_ring_bytes,
};

const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// As QEMU has it; a smaller ring would fit fewer cache lines than any guest's.
const LEAST_SIZE: u32 = 128;

/// Of a slot: a table of three descriptors in one cache line, header, status and the range of a discard in another.
const CONTROL_BYTES: u64 = 128;
const HEADER_AT: u64 = 64;
const STATUS_AT: u64 = 80;
const RANGE_AT: u64 = 96;
const UNWRITTEN: u8 = 0xee;

/// What the user asked of the virtqueues.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    pub indirect: bool,
    pub event_idx: bool,
    pub interrupts: bool,
    pub hugepages: bool,
}

/// Memory that is shared with the server. Guest address 0 is its first byte.
#[derive(Debug)]
pub struct Memory {
    file: File,
    map: MmapRaw,
}

impl Memory {
    /// At least `bytes` of zeroes, all of them there from the start.
    ///
    /// # Errors
    /// When there is no memory of that kind.
    pub fn new(bytes: u64, hugepages: bool) -> anyhow::Result<Memory> {
        let (flags, unit) = match hugepages {
            true => (MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, HUGE_PAGE),
            false => (MemfdFlags::empty(), PAGE),
        };
        let bytes = bytes.next_multiple_of(unit);
        let make = || -> anyhow::Result<Memory> {
            let flags = flags | MemfdFlags::CLOEXEC;
            let file = File::from(rustix::fs::memfd_create("tandem-bench", flags)?);
            file.set_len(bytes)?;
            let len = usize::try_from(bytes)?;
            let map = MmapOptions::new().len(len).populate().map_raw(&file)?;
            Ok(Memory { file, map })
        };
        make().with_context(|| match hugepages {
            true => format!(
                "cannot have {} huge pages of 2 MiB: see tandem setup-vfio hugepages",
                bytes / HUGE_PAGE
            ),
            false => format!("cannot have {bytes} bytes of shared memory"),
        })
    }

    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    #[must_use]
    pub fn len(&self) -> u64 {
        self.map.len() as u64
    }

    /// # Panics
    /// When `len` bytes at `gpa` are not in it: a programmer's error.
    fn at(&self, gpa: u64, len: u64) -> NonNull<u8> {
        assert!(gpa.checked_add(len).is_some_and(|end| end <= self.len()));
        let start = NonNull::new(self.map.as_mut_ptr()).expect("a mapping");
        // SAFETY: inside the mapping (asserted); an offset of less than its length fits `usize`.
        unsafe { start.byte_add(usize::try_from(gpa).unwrap_or(0)) }
    }
}

/// How a virtqueue and its buffers lie in memory.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    size: u16,
    depth: u32,
    stride: u64,
    indirect: bool,
    event_idx: bool,
    interrupts: bool,
    noise: bool,
}

impl RingConfig {
    /// The smallest queue that carries the depth.
    ///
    /// # Errors
    /// When none does.
    pub fn new(
        needs: &Needs,
        indirect: bool,
        event_idx: bool,
        interrupts: bool,
    ) -> anyhow::Result<RingConfig> {
        let each = if indirect { 1 } else { 3 };
        let entries = (needs.depth * each).max(LEAST_SIZE).next_power_of_two();
        let size = u16::try_from(entries)
            .ok()
            .filter(|size| *size <= MAX_QUEUE_SIZE);
        let Some(size) = size else {
            bail!(
                "--iodepth {} takes {} descriptors of {MAX_QUEUE_SIZE}: lower it{}",
                needs.depth,
                needs.depth * each,
                if indirect {
                    ""
                } else {
                    " or use --indirect on"
                }
            );
        };
        Ok(RingConfig {
            size,
            depth: needs.depth,
            stride: u64::from(needs.bs).next_multiple_of(PAGE),
            indirect,
            event_idx,
            interrupts,
            noise: needs.writes,
        })
    }

    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// Descriptor table, avail ring and used ring of a queue at `base`.
    #[must_use]
    pub fn addresses(&self, base: u64) -> [u64; 3] {
        let avail = base + u64::from(descriptor_table_bytes(self.size)).next_multiple_of(PAGE);
        let used = avail + u64::from(avail_ring_bytes(self.size)).next_multiple_of(PAGE);
        [base, avail, used]
    }

    fn control(&self, base: u64) -> u64 {
        let [_, _, used] = self.addresses(base);
        used + u64::from(used_ring_bytes(self.size)).next_multiple_of(PAGE)
    }

    fn data(&self, base: u64) -> u64 {
        self.control(base) + (u64::from(self.depth) * CONTROL_BYTES).next_multiple_of(PAGE)
    }

    /// All of one queue; the next one follows.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.data(0) + u64::from(self.depth) * self.stride
    }
}

/// What a slot's descriptors say now.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    op: Op,
    len: u32,
}

/// One virtqueue.
pub struct Ring {
    memory: Arc<Memory>,
    config: RingConfig,
    /// Guest addresses.
    control: u64,
    data: u64,
    descriptors: NonNull<AtomicU64>,
    avail: NonNull<AtomicU16>,
    used: NonNull<u8>,
    control_at: NonNull<u8>,
    shapes: Vec<Option<Shape>>,
    in_flight: Vec<bool>,
    avail_index: u16,
    published: u16,
    last_used: u16,
    /// Where `used_event` was put last, so that it is never reached.
    event: u16,
    kick: File,
    call: File,
    counters: Counters,
}

// SAFETY: the pointers name memory that `memory` keeps mapped, shared by design: atomics and copies only (I1).
unsafe impl Send for Ring {}

impl Ring {
    /// A queue at `base`, where memory is zero, that the server does not know yet.
    #[must_use]
    pub fn new(memory: Arc<Memory>, base: u64, config: RingConfig, kick: File, call: File) -> Ring {
        let size = config.size;
        let [descriptors, avail, used] = config.addresses(base);
        let (control, data) = (config.control(base), config.data(base));
        let mut ring = Ring {
            descriptors: memory
                .at(descriptors, descriptor_table_bytes(size).into())
                .cast(),
            avail: memory.at(avail, avail_ring_bytes(size).into()).cast(),
            used: memory.at(used, used_ring_bytes(size).into()),
            control_at: memory.at(control, u64::from(config.depth) * CONTROL_BYTES),
            memory,
            control,
            data,
            shapes: vec![None; config.depth as usize],
            in_flight: vec![false; config.depth as usize],
            avail_index: 0,
            published: 0,
            last_used: 0,
            event: 0,
            kick,
            call,
            counters: Counters::default(),
            config,
        };
        if config.noise {
            for slot in 0..config.depth {
                ring.write_data(
                    slot,
                    &noise(usize::try_from(config.stride).unwrap_or(0), slot),
                );
            }
        }
        if !config.interrupts {
            ring.avail_word(0).store(NO_INTERRUPT.to_le(), Relaxed);
            ring.silence();
        }
        ring
    }

    #[inline]
    fn avail_word(&self, index: u16) -> &AtomicU16 {
        assert!(index <= self.config.size + 2);
        // SAFETY: inside the `6 + 2 * size` bytes resolved in `new` (asserted).
        unsafe { self.avail.add(index.into()).as_ref() }
    }

    #[inline]
    fn used_word(&self, offset: u32) -> &AtomicU16 {
        assert!(offset.is_multiple_of(2) && offset + 2 <= used_ring_bytes(self.config.size));
        // SAFETY: inside the bytes resolved in `new` (asserted).
        unsafe { self.used.add(offset as usize).cast().as_ref() }
    }

    /// A word of a slot's control block.
    #[inline]
    fn control_word(&self, slot: u32, offset: u64) -> &AtomicU64 {
        assert!(slot < self.config.depth && offset.is_multiple_of(8) && offset < CONTROL_BYTES);
        let at = u64::from(slot) * CONTROL_BYTES + offset;
        // SAFETY: inside the control blocks resolved in `new` (asserted), which are page aligned.
        unsafe {
            let at = self.control_at.byte_add(usize::try_from(at).unwrap_or(0));
            at.cast().as_ref()
        }
    }

    #[inline]
    fn status(&self, slot: u32) -> &AtomicU8 {
        let word = NonNull::from(self.control_word(slot, STATUS_AT));
        // SAFETY: the first byte of an atomic word in shared memory, which only the server writes with another size.
        unsafe { word.cast().as_ref() }
    }

    /// Descriptor `index` of a slot: in the queue's table, or in its own.
    fn write_descriptor(&self, slot: u32, index: u32, gpa: u64, len: u32, flags: u64, next: u32) {
        let rest = u64::from(len) | flags << 32;
        if self.config.indirect {
            let at = u64::from(index) * 16;
            let rest = rest | u64::from(next) << 48;
            self.control_word(slot, at).store(gpa.to_le(), Relaxed);
            self.control_word(slot, at + 8).store(rest.to_le(), Relaxed);
        } else {
            let rest = rest | u64::from(slot * 3 + next) << 48;
            self.write_entry(slot * 3 + index, gpa, rest);
        }
    }

    fn write_entry(&self, index: u32, gpa: u64, rest: u64) {
        assert!(index < u32::from(self.config.size));
        // SAFETY: inside the table resolved in `new` (asserted), aligned to 16.
        let (first, second) = unsafe {
            let entry = self.descriptors.add(2 * index as usize);
            (entry.as_ref(), entry.add(1).as_ref())
        };
        first.store(gpa.to_le(), Relaxed);
        second.store(rest.to_le(), Relaxed);
    }

    /// Header, data and status of an I/O of this kind.
    fn shape(&mut self, slot: u32, shape: Shape) {
        let control = self.control + u64::from(slot) * CONTROL_BYTES;
        let data = self.data + u64::from(slot) * self.config.stride;
        let after_header = if shape.op == Op::Flush { 2 } else { 1 };
        self.write_descriptor(slot, 0, control + HEADER_AT, 16, NEXT, after_header);
        match shape.op {
            Op::Read => self.write_descriptor(slot, 1, data, shape.len, NEXT | WRITE, 2),
            Op::Write => self.write_descriptor(slot, 1, data, shape.len, NEXT, 2),
            Op::Trim => self.write_descriptor(slot, 1, control + RANGE_AT, 16, NEXT, 2),
            Op::Flush => {}
        }
        self.write_descriptor(slot, 2, control + STATUS_AT, 1, WRITE, 0);
        if self.config.indirect {
            self.write_entry(slot, control, 48 | INDIRECT << 32);
        }
        let request = match shape.op {
            Op::Read => request_type::IN,
            Op::Write => request_type::OUT,
            Op::Trim => request_type::DISCARD,
            Op::Flush => request_type::FLUSH,
        };
        let header = self.control_word(slot, HEADER_AT);
        header.store(u64::from(request).to_le(), Relaxed);
        self.shapes[slot as usize] = Some(shape);
    }

    /// Puts `used_event` where no completion of the next 65535 is. Without EVENT_IDX the flag says it.
    fn silence(&mut self) {
        self.event = self.last_used.wrapping_sub(1);
        if self.config.event_idx {
            self.avail_word(self.config.size + 2)
                .store(self.event.to_le(), Relaxed);
        }
    }

    #[inline]
    fn used_index(&self) -> u16 {
        // Acquire pairs with the server's release of its used elements, statuses and data.
        u16::from_le(self.used_word(2).load(Acquire))
    }

    fn wants_kick(&self, old: u16, new: u16) -> bool {
        if self.config.event_idx {
            let event = self
                .used_word(4 + 8 * u32::from(self.config.size))
                .load(Relaxed);
            let past = new.wrapping_sub(u16::from_le(event)).wrapping_sub(1);
            past < new.wrapping_sub(old)
        } else {
            u16::from_le(self.used_word(0).load(Relaxed)) & NO_NOTIFY == 0
        }
    }

    /// # Panics
    /// When the slot has no such bytes: a programmer's error.
    fn buffer(&self, slot: u32, len: usize) -> NonNull<u8> {
        assert!(slot < self.config.depth && len as u64 <= self.config.stride);
        self.memory
            .at(self.data + u64::from(slot) * self.config.stride, len as u64)
    }
}

impl Queue for Ring {
    #[inline]
    fn submit(&mut self, slot: u32, io: Io) -> anyhow::Result<()> {
        let shape = Shape {
            op: io.op,
            len: io.len,
        };
        if self.shapes[slot as usize] != Some(shape) {
            self.shape(slot, shape);
        }
        let sector = io.offset / 512;
        match io.op {
            Op::Read | Op::Write => {
                self.control_word(slot, HEADER_AT + 8)
                    .store(sector.to_le(), Relaxed);
            }
            Op::Trim => {
                self.control_word(slot, HEADER_AT + 8).store(0, Relaxed);
                self.control_word(slot, RANGE_AT)
                    .store(sector.to_le(), Relaxed);
                let sectors = u64::from(io.len / 512);
                self.control_word(slot, RANGE_AT + 8)
                    .store(sectors.to_le(), Relaxed);
            }
            Op::Flush => self.control_word(slot, HEADER_AT + 8).store(0, Relaxed),
        }
        self.status(slot).store(UNWRITTEN, Relaxed);
        self.in_flight[slot as usize] = true;
        let head = if self.config.indirect { slot } else { 3 * slot };
        let head = u16::try_from(head).unwrap_or(u16::MAX);
        let place = self.avail_index % self.config.size;
        self.avail_word(2 + place).store(head.to_le(), Relaxed);
        self.avail_index = self.avail_index.wrapping_add(1);
        Ok(())
    }

    #[inline]
    fn commit(&mut self) -> anyhow::Result<()> {
        let (old, new) = (self.published, self.avail_index);
        // Release pairs with the server's acquire of this index, before it reads entries and descriptors.
        self.avail_word(1).store(new.to_le(), Release);
        self.published = new;
        // Full barrier between publishing and asking whether to kick; pairs with the server's, which asks for a kick
        // and then looks once more.
        fence(SeqCst);
        if self.wants_kick(old, new) {
            self.counters.doorbells += 1;
            match self.kick.write(&1u64.to_ne_bytes()) {
                Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                    return Err(error).context("cannot kick");
                }
                // An eventfd that is full was kicked already.
                _ => {}
            }
        }
        Ok(())
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        let index = self.used_index();
        if index == self.last_used {
            return Ok(());
        }
        let each = if self.config.indirect { 1 } else { 3 };
        while self.last_used != index {
            let place = u32::from(self.last_used % self.config.size);
            let id = NonNull::from(self.used_word(4 + 8 * place)).cast::<AtomicU32>();
            // SAFETY: the element's first word, aligned to 4 and inside the ring as its half is (`used_word`).
            let id = u32::from_le(unsafe { id.as_ref() }.load(Relaxed));
            let slot = id / each;
            let known = self
                .in_flight
                .get_mut(slot as usize)
                .filter(|known| **known);
            let (true, Some(in_flight)) = (id % each == 0, known) else {
                bail!("the server used head {id}, which is not in flight");
            };
            *in_flight = false;
            self.last_used = self.last_used.wrapping_add(1);
            let status = self.status(slot).load(Relaxed);
            let failure = (status != status::OK).then_some(status.into());
            done.push(Done { slot, failure });
        }
        if !self.config.interrupts && self.last_used.wrapping_sub(self.event) > 0x4000 {
            self.silence();
        }
        Ok(())
    }

    fn sleep(&mut self, timeout: Duration) -> anyhow::Result<bool> {
        if !self.config.interrupts {
            return Ok(false);
        }
        if self.config.event_idx {
            self.avail_word(self.config.size + 2)
                .store(self.last_used.to_le(), Relaxed);
        }
        // Full barrier between asking for a signal and looking once more; pairs with the server's between publishing
        // its used index and reading what we ask for.
        fence(SeqCst);
        if self.used_index() != self.last_used {
            return Ok(true);
        }
        let mut call = [PollFd::new(&self.call, PollFlags::IN)];
        let timeout = Timespec::try_from(timeout)?;
        match poll(&mut call, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => {
                let mut count = [0; 8];
                let _ = self.call.read(&mut count);
                self.counters.notifications += 1;
            }
            Err(error) => return Err(error).context("cannot wait for the server's signal"),
        }
        Ok(true)
    }

    fn write_data(&mut self, slot: u32, bytes: &[u8]) {
        let to = self.buffer(slot, bytes.len());
        // SAFETY: inside the mapping (`buffer`); `bytes` is ordinary memory, which the mapping cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
    }

    fn read_data(&self, slot: u32, bytes: &mut [u8]) {
        let from = self.buffer(slot, bytes.len());
        // SAFETY: inside the mapping (`buffer`); `bytes` is exclusive ordinary memory.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
    }

    fn counters(&self) -> Counters {
        self.counters
    }
}
