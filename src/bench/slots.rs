//! What the virtqueues of the load have in common, split or packed: shared memory, and a slot for each I/O.
//!
//! ```text
//!  a queue:  descriptors | driver's part | device's part | a control block for each slot | a buffer for each slot
//!  a control block, two cache lines:   table of three descriptors |  header, status, range of a discard
//! ```
//! Each slot has its table, header, status and buffer for ever; what does not change between two I/Os of a slot is not
//! written again. A read after a read stores 8 bytes of sector and a status, in one cache line.
//!
//! The server is another process that may write anywhere in this memory at any time. So indices are ours, memory is
//! reached as atomics or by copies (I1), and what a ring says was used is checked (I10).

use std::cell::Cell;
use std::fs::File;
use std::io::{Read, Write};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU8, AtomicU64};
use std::time::Duration;

use anyhow::{Context, bail};
use memmap2::{MmapOptions, MmapRaw};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::MemfdFlags;

use super::args::{Interrupts, RingKind};
use super::device::noise;
use super::engine::Queue;
use super::io::{Io, Op};
use super::stats::Counters;
use super::target::Needs;
use crate::virtio::blk::{request_type, status};
use crate::virtio::virtqueue::{
    MAX_QUEUE_SIZE, avail_ring_bytes, descriptor_table_bytes, used_ring_bytes,
};

/// Flags of a descriptor, in either ring.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

const PAGE: u64 = 4096;
const HUGE_PAGE: u64 = 2 << 20;
/// As QEMU has it; a smaller ring would fit fewer cache lines than any guest's.
const LEAST_SIZE: u32 = 128;
/// Descriptors of a request, one each for header, data and status.
pub const MOST_PARTS: u32 = 3;
/// Bytes of each of a packed ring's two event suppression structures.
const EVENT_BYTES: u32 = 4;

const CONTROL_BYTES: u64 = 128;
const HEADER_AT: u64 = 64;
const STATUS_AT: u64 = 80;
const RANGE_AT: u64 = 96;
const UNWRITTEN: u8 = 0xee;

/// What the user asked of the virtqueues.
#[derive(Clone, Copy, Debug)]
pub struct Wishes {
    pub ring: RingKind,
    pub indirect: bool,
    pub event_idx: bool,
    pub interrupts: Interrupts,
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
    pub fn at(&self, gpa: u64, len: u64) -> NonNull<u8> {
        assert!(gpa.checked_add(len).is_some_and(|end| end <= self.len()));
        let start = NonNull::new(self.map.as_mut_ptr()).expect("a mapping");
        // SAFETY: inside the mapping (asserted); an offset of less than its length fits `usize`.
        unsafe { start.byte_add(usize::try_from(gpa).unwrap_or(0)) }
    }
}

/// How a virtqueue and its buffers lie in memory, and what was negotiated for it.
#[derive(Clone, Copy, Debug)]
pub struct RingConfig {
    /// A power of two.
    pub size: u16,
    pub depth: u32,
    pub ring: RingKind,
    pub indirect: bool,
    pub event_idx: bool,
    pub interrupts: Interrupts,
    stride: u64,
    noise: bool,
}

impl RingConfig {
    /// The smallest queue that carries the depth.
    ///
    /// # Errors
    /// When none does.
    pub fn new(needs: &Needs, granted: Wishes) -> anyhow::Result<RingConfig> {
        let each = if granted.indirect { 1 } else { MOST_PARTS };
        let entries = (needs.depth * each).max(LEAST_SIZE).next_power_of_two();
        let size = u16::try_from(entries)
            .ok()
            .filter(|size| *size <= MAX_QUEUE_SIZE);
        let Some(size) = size else {
            bail!(
                "--iodepth {} takes {} descriptors of {MAX_QUEUE_SIZE}: lower it{}",
                needs.depth,
                needs.depth * each,
                if granted.indirect {
                    ""
                } else {
                    " or use --indirect on"
                }
            );
        };
        Ok(RingConfig {
            size,
            depth: needs.depth,
            ring: granted.ring,
            indirect: granted.indirect,
            event_idx: granted.event_idx,
            interrupts: granted.interrupts,
            stride: u64::from(needs.bs).next_multiple_of(PAGE),
            noise: needs.writes,
        })
    }

    /// Bytes of the descriptors, of the part that the driver writes, and of the part that the device writes.
    #[must_use]
    pub fn parts(&self) -> [u32; 3] {
        let descriptors = descriptor_table_bytes(self.size);
        match self.ring {
            RingKind::Split => [
                descriptors,
                avail_ring_bytes(self.size),
                used_ring_bytes(self.size),
            ],
            RingKind::Packed => [descriptors, EVENT_BYTES, EVENT_BYTES],
        }
    }

    /// Where those are in a queue at `base`, each on pages of its own.
    #[must_use]
    pub fn addresses(&self, base: u64) -> [u64; 3] {
        let [descriptors, driver, _] = self.parts().map(in_pages);
        [base, base + descriptors, base + descriptors + driver]
    }

    /// The same in our memory.
    #[must_use]
    pub fn locate(&self, memory: &Memory, base: u64) -> [NonNull<u8>; 3] {
        let [descriptors, driver, device] = self.addresses(base);
        let [of_descriptors, of_driver, of_device] = self.parts().map(u64::from);
        [
            memory.at(descriptors, of_descriptors),
            memory.at(driver, of_driver),
            memory.at(device, of_device),
        ]
    }

    fn control(&self, base: u64) -> u64 {
        base + self.parts().map(in_pages).iter().sum::<u64>()
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

fn in_pages(bytes: u32) -> u64 {
    u64::from(bytes).next_multiple_of(PAGE)
}

/// One virtqueue of the load, as the server is told about it.
pub trait DriverRing: Queue + Sized {
    /// What SET_VRING_BASE says of a queue that was never used.
    const START: u32;

    /// A queue at `base`, where memory is zero, that the server does not know yet.
    fn new(memory: Arc<Memory>, base: u64, config: RingConfig, signals: Signals) -> Self;
}

/// The two eventfds of a virtqueue.
#[derive(Debug)]
pub struct Signals {
    kick: File,
    call: File,
    doorbells: u64,
    notifications: Cell<u64>,
}

impl Signals {
    #[must_use]
    pub fn new(kick: File, call: File) -> Signals {
        Signals {
            kick,
            call,
            doorbells: 0,
            notifications: Cell::new(0),
        }
    }

    /// # Errors
    /// When the system refuses.
    pub fn kick(&mut self) -> anyhow::Result<()> {
        self.doorbells += 1;
        match self.kick.write(&1u64.to_ne_bytes()) {
            Err(error) if error.kind() != std::io::ErrorKind::WouldBlock => {
                Err(error).context("cannot kick")
            }
            // An eventfd that is full was kicked already.
            _ => Ok(()),
        }
    }

    /// Sleeps until the server signals.
    ///
    /// # Errors
    /// When the system refuses.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<()> {
        let mut call = [PollFd::new(&self.call, PollFlags::IN)];
        let timeout = Timespec::try_from(timeout)?;
        match poll(&mut call, Some(&timeout)) {
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => {
                let _ = self.take();
                self.notifications.update(|count| count + 1);
            }
            Err(error) => return Err(error).context("cannot wait for the server's signal"),
        }
        Ok(())
    }

    /// How often the server signalled since this was asked last.
    fn take(&self) -> u64 {
        let mut count = [0; 8];
        let read = (&self.call).read(&mut count);
        read.map_or(0, |_| u64::from_ne_bytes(count))
    }

    /// Where nobody waits for signals they are counted by the eventfd.
    #[must_use]
    pub fn counters(&self, interrupts: Interrupts) -> Counters {
        if interrupts == Interrupts::Armed {
            self.notifications
                .set(self.notifications.get() + self.take());
        }
        Counters {
            doorbells: self.doorbells,
            notifications: self.notifications.get(),
        }
    }
}

/// What a slot's table says now.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Shape {
    op: Op,
    len: u32,
}

/// A request's descriptors, as [`Slots::chain`] says them.
pub struct Chain {
    parts: [Part; MOST_PARTS as usize],
    pub count: u32,
}

impl Chain {
    /// In order.
    pub fn parts(&self) -> impl Iterator<Item = Part> {
        self.parts.iter().copied().take(self.count as usize)
    }
}

#[derive(Clone, Copy)]
pub struct Part {
    pub gpa: u64,
    pub len: u32,
    /// [`WRITE`] or none; that another one follows is the ring's to say.
    pub flags: u16,
}

#[derive(Clone, Copy)]
struct Slot {
    shape: Option<Shape>,
    /// Descriptors of the request; 0 while none is in flight.
    in_flight: u16,
}

/// The control blocks and buffers of one queue.
pub struct Slots {
    memory: Arc<Memory>,
    depth: u32,
    stride: u64,
    /// Guest addresses.
    control: u64,
    data: u64,
    blocks: NonNull<u8>,
    slots: Vec<Slot>,
}

// SAFETY: the pointer names memory that `memory` keeps mapped, shared by design: atomics and copies only (I1).
unsafe impl Send for Slots {}

impl Slots {
    /// Those of the queue at `base`.
    #[must_use]
    pub fn new(memory: Arc<Memory>, base: u64, config: &RingConfig) -> Slots {
        let control = config.control(base);
        let nothing = Slot {
            shape: None,
            in_flight: 0,
        };
        let mut slots = Slots {
            blocks: memory.at(control, u64::from(config.depth) * CONTROL_BYTES),
            memory,
            depth: config.depth,
            stride: config.stride,
            control,
            data: config.data(base),
            slots: vec![nothing; config.depth as usize],
        };
        if config.noise {
            let bytes = usize::try_from(config.stride).unwrap_or(0);
            (0..config.depth).for_each(|slot| slots.write_data(slot, &noise(bytes, slot)));
        }
        slots
    }

    /// A word of a slot's control block.
    #[inline]
    fn word(&self, slot: u32, offset: u64) -> &AtomicU64 {
        assert!(slot < self.depth && offset.is_multiple_of(8) && offset < CONTROL_BYTES);
        let at = u64::from(slot) * CONTROL_BYTES + offset;
        // SAFETY: inside the control blocks resolved in `new` (asserted), which are page aligned.
        unsafe {
            let at = self.blocks.byte_add(usize::try_from(at).unwrap_or(0));
            at.cast().as_ref()
        }
    }

    #[inline]
    fn status(&self, slot: u32) -> &AtomicU8 {
        let word = NonNull::from(self.word(slot, STATUS_AT));
        // SAFETY: the first byte of an atomic word in shared memory, which only the server writes with another size.
        unsafe { word.cast().as_ref() }
    }

    /// Where a slot's table is, for the server.
    #[inline]
    #[must_use]
    pub fn table(&self, slot: u32) -> u64 {
        self.control + u64::from(slot) * CONTROL_BYTES
    }

    /// Writes one entry of a slot's table.
    pub fn write_table(&self, slot: u32, index: u32, words: [u64; 2]) {
        let at = u64::from(index) * 16;
        self.word(slot, at).store(words[0].to_le(), Relaxed);
        self.word(slot, at + 8).store(words[1].to_le(), Relaxed);
    }

    /// Writes what the I/O needs. True if the slot's chain is another than before.
    #[inline]
    pub fn prepare(&mut self, slot: u32, io: Io) -> bool {
        let shape = Some(Shape {
            op: io.op,
            len: io.len,
        });
        let sector = io.offset / 512;
        let of_header = match io.op {
            Op::Read | Op::Write => sector,
            Op::Trim | Op::Flush => 0,
        };
        self.word(slot, HEADER_AT + 8)
            .store(of_header.to_le(), Relaxed);
        if io.op == Op::Trim {
            self.word(slot, RANGE_AT).store(sector.to_le(), Relaxed);
            let sectors = u64::from(io.len / 512);
            self.word(slot, RANGE_AT + 8)
                .store(sectors.to_le(), Relaxed);
        }
        self.status(slot).store(UNWRITTEN, Relaxed);
        let state = &mut self.slots[slot as usize];
        state.in_flight = if io.op == Op::Flush { 2 } else { 3 };
        if state.shape == shape {
            return false;
        }
        state.shape = shape;
        self.reshape(slot, io.op);
        true
    }

    #[cold]
    fn reshape(&self, slot: u32, op: Op) {
        let request = match op {
            Op::Read => request_type::IN,
            Op::Write => request_type::OUT,
            Op::Trim => request_type::DISCARD,
            Op::Flush => request_type::FLUSH,
        };
        let header = self.word(slot, HEADER_AT);
        header.store(u64::from(request).to_le(), Relaxed);
    }

    /// Header, data and status of the I/O that was prepared last.
    #[inline]
    #[must_use]
    pub fn chain(&self, slot: u32, io: Io) -> Chain {
        let control = self.table(slot);
        let part = |gpa, len, flags| Part { gpa, len, flags };
        let header = part(control + HEADER_AT, 16, 0);
        let status = part(control + STATUS_AT, 1, WRITE);
        let data = self.data + u64::from(slot) * self.stride;
        let data = match io.op {
            Op::Read => part(data, io.len, WRITE),
            Op::Write => part(data, io.len, 0),
            Op::Trim => part(control + RANGE_AT, 16, 0),
            Op::Flush => {
                return Chain {
                    parts: [header, status, status],
                    count: 2,
                };
            }
        };
        Chain {
            parts: [header, data, status],
            count: 3,
        }
    }

    /// Descriptors of the I/O that was prepared last.
    #[inline]
    #[must_use]
    pub fn parts_in_flight(&self, slot: u32) -> u32 {
        self.slots[slot as usize].in_flight.into()
    }

    /// What came back: how many descriptors it had, and what the server says of it if that is not good.
    ///
    /// # Errors
    /// When no such request is in flight.
    #[inline]
    pub fn finish(&mut self, slot: u32) -> anyhow::Result<(u16, Option<u16>)> {
        let state = self.slots.get_mut(slot as usize);
        let entries = state.map_or(0, |state| std::mem::take(&mut state.in_flight));
        if entries == 0 {
            bail!("the server used buffer {slot}, which is not in flight");
        }
        let status = self.status(slot).load(Relaxed);
        Ok((entries, (status != status::OK).then_some(status.into())))
    }

    /// # Panics
    /// When the slot has no such bytes: a programmer's error.
    fn buffer(&self, slot: u32, len: usize) -> NonNull<u8> {
        assert!(slot < self.depth && len as u64 <= self.stride);
        self.memory
            .at(self.data + u64::from(slot) * self.stride, len as u64)
    }

    pub fn write_data(&mut self, slot: u32, bytes: &[u8]) {
        let to = self.buffer(slot, bytes.len());
        // SAFETY: inside the mapping (`buffer`); `bytes` is ordinary memory, which the mapping cannot overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
    }

    pub fn read_data(&self, slot: u32, bytes: &mut [u8]) {
        let from = self.buffer(slot, bytes.len());
        // SAFETY: inside the mapping (`buffer`); `bytes` is exclusive ordinary memory.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), bytes.as_mut_ptr(), bytes.len()) };
    }
}
