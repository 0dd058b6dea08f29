//! The driver side of a virtqueue with a block device behind it.
//!
//! Orders its accesses as a correct driver does (each barrier names its partner in `virtio::virtqueue`), frames
//! requests in every legal way, and lets a test write whatever else a hostile one would: see
//! [`SimGuest::write_descriptor`] and what follows it.

use super::packed::{self, PackedDriver};
use crate::virtio::blk::{HEADER_BYTES, RequestHeader};
use crate::virtio::memory::{Gpa, GuestMemory};
use crate::virtio::shared::{AtomicU16, AtomicU32, AtomicU64, fence};
use crate::virtio::virtqueue::{
    QueueError, RingLayout, Virtqueue, VirtqueueConfig, descriptor_table_bytes, used_ring_bytes,
};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Acquire, Relaxed, Release, SeqCst};
use zerocopy::IntoBytes;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const NO_INTERRUPT: u16 = 1;
const NO_NOTIFY: u16 = 1;

const PAGE: u64 = 4096;
/// Entries of an indirect table of ours; also the most descriptors of a request.
const MAX_DESCRIPTORS: usize = 64;
/// A status nobody writes: shows that a completed request got no answer.
const STATUS_UNWRITTEN: u8 = 0xee;

/// How the queue is set up.
#[derive(Debug, Clone, Copy)]
pub struct SimGuestConfig {
    /// VIRTIO_F_RING_PACKED was negotiated, or not.
    pub layout: RingLayout,
    /// Number of descriptors.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX was negotiated.
    pub event_idx: bool,
    /// VIRTIO_F_INDIRECT_DESC was negotiated.
    pub indirect: bool,
    /// Most bytes of data in a request, its offset included.
    pub max_data: u32,
    /// Where avail and used index start; not 0 in order to see them wrap. In a packed ring, its entry modulo the size.
    pub first_index: u16,
    /// Where the rings and the buffers lie: [`SimGuestConfig::bytes`] of guest memory, page aligned. The rings,
    /// which come first, must lie in one region; the buffers need not.
    pub base: Gpa,
}

impl SimGuestConfig {
    /// Bytes of guest memory that the rings take.
    pub fn ring_bytes(&self) -> u64 {
        self.used_at() + u64::from(self.layout.device_area(self.size).0).next_multiple_of(PAGE)
    }

    /// Bytes of guest memory that the rings and buffers take.
    pub fn bytes(&self) -> u64 {
        self.ring_bytes() + u64::from(self.size) * self.slot_bytes()
    }

    fn avail_at(&self) -> u64 {
        u64::from(descriptor_table_bytes(self.size)).next_multiple_of(PAGE)
    }

    fn used_at(&self) -> u64 {
        self.avail_at() + u64::from(self.layout.driver_area(self.size).0).next_multiple_of(PAGE)
    }

    /// A slot is a page whose first quarter is the indirect table and whose last bytes are the header, then the
    /// data, then the status: so that header, data and status can be joined.
    fn slot_bytes(&self) -> u64 {
        PAGE + (u64::from(self.max_data) + 1).next_multiple_of(PAGE)
    }
}

/// How a request is laid out in descriptors. All are legal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Framing {
    /// One descriptor for the header, one per piece of data, one for the status.
    Plain,
    /// The header in three descriptors, of 4, 8 and 4 bytes.
    SplitHeader,
    /// Header and first readable data in one descriptor, last writable data and status in one.
    Joined,
}

/// One request to send.
#[derive(Debug, Clone, Copy)]
pub struct SimRequest {
    /// One of [`crate::virtio::blk::request_type`], or anything else.
    pub request_type: u32,
    /// The sector.
    pub sector: u64,
    /// Bytes of data.
    pub data_len: u32,
    /// Whether the device fills the data.
    pub data_writable: bool,
    /// Where the data starts in its page: not 0 for misaligned data.
    pub data_offset: u32,
    /// Descriptors that the data is split over; at most its bytes.
    pub pieces: u16,
    /// Layout of header and status.
    pub framing: Framing,
    /// How many descriptors stay in the table of the queue; the others go to an indirect table. `None`: all.
    pub direct: Option<u16>,
}

impl SimRequest {
    /// A plain direct request: one descriptor each for header, data (if any) and status.
    pub const fn new(request_type: u32, sector: u64, data_len: u32, data_writable: bool) -> Self {
        Self {
            request_type,
            sector,
            data_len,
            data_writable,
            data_offset: 0,
            pieces: 1,
            framing: Framing::Plain,
            direct: None,
        }
    }
}

/// A request that came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimCompletion {
    /// The head it went out with.
    pub head: u16,
    /// Its used length.
    pub used_len: u32,
    /// Its status byte; 0xee if nobody wrote it.
    pub status: u8,
}

/// A descriptor as it stands in a table of a split ring. In a packed one, `next` says nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RawDescriptor {
    /// Guest address of the buffer.
    pub gpa: u64,
    /// Its length.
    pub len: u32,
    /// NEXT 1, WRITE 2, INDIRECT 4.
    pub flags: u16,
    /// Index of the next one.
    pub next: u16,
}

impl RawDescriptor {
    fn words(self) -> [u64; 2] {
        let rest = u64::from(self.len) | u64::from(self.flags) << 32 | u64::from(self.next) << 48;
        [self.gpa.to_le(), rest.to_le()]
    }
}

/// What the driver remembers of a request in flight, by head.
#[derive(Debug, Clone, Copy, Default)]
struct Sent {
    /// Descriptors it occupies in the table of a split queue.
    descriptors: u16,
    data_at: Gpa,
    data_len: u32,
    in_flight: bool,
}

/// A guest's virtqueue driver.
#[derive(Debug)]
pub struct SimGuest {
    memory: Arc<GuestMemory>,
    config: SimGuestConfig,
    descriptors: NonNull<AtomicU64>,
    avail: NonNull<AtomicU16>,
    used: NonNull<u8>,
    /// The ring, if it is a packed one; the fields below are then of no use, but `free` and `sent`.
    packed: Option<PackedDriver>,
    /// Unused descriptors; of a packed ring, unused buffer ids.
    free: Vec<u16>,
    /// The successor of each descriptor in use.
    next: Vec<u16>,
    sent: Vec<Sent>,
    avail_index: u16,
    published_avail: u16,
    last_used: u16,
    /// The descriptors of the request being built; kept to spare allocations.
    building: Vec<RawDescriptor>,
}

// SAFETY: the pointers name guest memory, which `memory` keeps mapped, and which is shared by design: ring words
// are atomics, and buffers change hands through the rings.
unsafe impl Send for SimGuest {}

impl SimGuest {
    /// Sets the queue up in `memory`, whose bytes there are zero. `None` unless the rings lie in one region each.
    pub fn new(memory: Arc<GuestMemory>, config: SimGuestConfig) -> Option<Self> {
        let size = config.size;
        let part = |offset, len| memory.contiguous(config.base.checked_add(offset)?, len);
        let descriptors = part(0, descriptor_table_bytes(size))?;
        let avail = part(config.avail_at(), config.layout.driver_area(size).0)?;
        let used = part(config.used_at(), config.layout.device_area(size).0)?;
        let packed = (config.layout == RingLayout::Packed).then(|| {
            let (parts, first_index) = ([descriptors, avail, used], config.first_index);
            // SAFETY: resolved in their whole length just now, page aligned, and mapped as long as `memory` lives.
            unsafe { PackedDriver::new(parts, size, config.event_idx, first_index) }
        });
        let guest = Self {
            config,
            descriptors: descriptors.cast(),
            avail: avail.cast(),
            used,
            packed,
            free: (0..size).rev().collect(),
            next: vec![0; size.into()],
            sent: vec![Sent::default(); size.into()],
            avail_index: config.first_index,
            published_avail: config.first_index,
            last_used: config.first_index,
            building: Vec::with_capacity(MAX_DESCRIPTORS),
            memory,
        };
        if guest.packed.is_none() {
            let index = config.first_index.to_le();
            guest.avail_word(1).store(index, Relaxed);
            guest.used_word(2).store(index, Relaxed);
        }
        Some(guest)
    }

    /// The memory the queue lives in. Whoever serves the queue holds it too (I2).
    pub fn memory(&self) -> &Arc<GuestMemory> {
        &self.memory
    }

    /// How a server of this queue would be told about it.
    pub fn virtqueue_config(&self) -> VirtqueueConfig {
        let first = match self.config.layout {
            RingLayout::Split => self.config.first_index,
            RingLayout::Packed => PackedDriver::start(self.config.first_index, self.config.size),
        };
        VirtqueueConfig {
            layout: self.config.layout,
            size: self.config.size,
            descriptor_table: self.descriptors.cast(),
            avail: self.avail.cast(),
            used: self.used,
            event_idx: self.config.event_idx,
            indirect: self.config.indirect,
            next_avail: first,
            next_used: first,
        }
    }

    /// The device side of the queue.
    ///
    /// # Errors
    /// As [`Virtqueue::new`].
    ///
    /// # Safety
    /// The virtqueue is used no longer than the memory lives (I2), and is the only one at a time.
    pub unsafe fn virtqueue(&self) -> Result<Virtqueue, QueueError> {
        // SAFETY: `new` resolved the three parts in their whole length; the rest is this function's contract.
        unsafe { Virtqueue::new(self.virtqueue_config()) }
    }

    fn avail_word(&self, index: u16) -> &AtomicU16 {
        assert!(self.packed.is_none(), "a packed ring has no avail ring");
        assert!(index <= self.config.size + 2);
        // SAFETY: inside the `6 + 2 * size` bytes resolved in `new` (asserted).
        unsafe { self.avail.add(index.into()).as_ref() }
    }

    fn used_word(&self, offset: u32) -> &AtomicU16 {
        assert!(self.packed.is_none(), "a packed ring has no used ring");
        assert!(offset.is_multiple_of(2) && offset + 2 <= used_ring_bytes(self.config.size));
        // SAFETY: inside the bytes resolved in `new` (asserted).
        unsafe { self.used.add(offset as usize).cast().as_ref() }
    }

    fn slot(&self, head: u16) -> Gpa {
        let offset = self.config.ring_bytes() + u64::from(head) * self.config.slot_bytes();
        Gpa(self.config.base.0 + offset)
    }

    /// Where a request with this head has its data, if the data starts at the page.
    pub fn data_at(&self, head: u16) -> Gpa {
        Gpa(self.slot(head).0 + PAGE)
    }

    /// Copies `bytes` into guest memory at `gpa`.
    ///
    /// # Panics
    /// When they are not mapped.
    pub fn write(&self, gpa: Gpa, mut bytes: &[u8]) {
        let mut at = gpa.0;
        while !bytes.is_empty() {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let piece = self.memory.piece(Gpa(at), len).expect("unmapped");
            let copied = piece.copy_from(bytes);
            bytes = &bytes[copied..];
            at += copied as u64;
        }
    }

    /// Copies guest memory at `gpa` into `bytes`.
    ///
    /// # Panics
    /// When they are not mapped.
    pub fn read(&self, gpa: Gpa, mut bytes: &mut [u8]) {
        let mut at = gpa.0;
        while !bytes.is_empty() {
            let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
            let piece = self.memory.piece(Gpa(at), len).expect("unmapped");
            let copied = piece.copy_to(bytes);
            bytes = &mut bytes[copied..];
            at += copied as u64;
        }
    }

    /// Builds a request whose data starts with `data` and puts it into the avail ring; the device sees it after
    /// [`Self::publish`]. The result is its head; `None` if too few descriptors are free.
    ///
    /// # Panics
    /// When the request does not fit the set-up: more data than `max_data`, more than 64 descriptors, an
    /// indirect table that was not negotiated.
    #[inline(never)]
    pub fn submit(&mut self, request: &SimRequest, data: &[u8]) -> Option<u16> {
        let head = *self.free.last()?;
        self.frame(request, head);
        let total = self.building.len();
        let direct = request
            .direct
            .map_or(total, |direct| total.min(direct.into()));
        let in_table = direct + usize::from(direct < total);
        let free = match &self.packed {
            Some(ring) => ring.free().into(),
            None => self.free.len(),
        };
        if free < in_table {
            return None;
        }
        let data_at = Gpa(self.data_at(head).0 + u64::from(request.data_offset));
        let header = RequestHeader {
            request_type: request.request_type.into(),
            reserved: 0.into(),
            sector: request.sector.into(),
        };
        self.write(Gpa(data_at.0 - HEADER_BYTES as u64), header.as_bytes());
        self.write(data_at, data);
        let status_at = Gpa(data_at.0 + u64::from(request.data_len));
        self.write(status_at, &[STATUS_UNWRITTEN]);

        let mut building = std::mem::take(&mut self.building);
        if direct < total {
            assert!(self.config.indirect, "indirect tables were not negotiated");
            self.write_table(self.slot(head), &mut building[direct..]);
            building[direct] = RawDescriptor {
                gpa: self.slot(head).0,
                len: u32::try_from(16 * (total - direct)).expect("few descriptors"),
                flags: INDIRECT,
                next: 0,
            };
        }
        if let Some(ring) = &mut self.packed {
            self.free.pop();
            building[..in_table - 1]
                .iter_mut()
                .for_each(|descriptor| descriptor.flags |= NEXT);
            ring.add(&building[..in_table], head);
        } else {
            for (place, descriptor) in building[..in_table].iter_mut().enumerate() {
                let index = self.free.pop().expect("counted above");
                if place + 1 < in_table {
                    descriptor.flags |= NEXT;
                    descriptor.next = *self.free.last().expect("counted above");
                }
                self.next[usize::from(index)] = descriptor.next;
                self.write_descriptor(index, *descriptor);
            }
            self.offer(head);
        }
        self.building = building;
        self.sent[usize::from(head)] = Sent {
            descriptors: u16::try_from(in_table).expect("at most the queue size"),
            data_at,
            data_len: request.data_len,
            in_flight: true,
        };
        Some(head)
    }

    /// Lays the buffers of a request out in `building`, not linked yet.
    fn frame(&mut self, request: &SimRequest, head: u16) {
        let SimRequest {
            data_len, pieces, ..
        } = *request;
        let data_end = u64::from(request.data_offset) + u64::from(data_len);
        assert!(data_end <= u64::from(self.config.max_data), "max_data");
        let data = self.data_at(head).0 + u64::from(request.data_offset);
        let out = &mut self.building;
        out.clear();
        let mut push = |gpa: u64, len: u32, flags: u16| {
            out.push(RawDescriptor {
                gpa,
                len,
                flags,
                next: 0,
            });
        };
        match request.framing {
            Framing::SplitHeader => {
                push(data - 16, 4, 0);
                push(data - 12, 8, 0);
                push(data - 4, 4, 0);
            }
            Framing::Plain | Framing::Joined => push(data - 16, 16, 0),
        }
        let flags = if request.data_writable { WRITE } else { 0 };
        let pieces = u32::from(pieces).min(data_len);
        for piece in 0..pieces {
            let (len, at) = (data_len / pieces, data_len / pieces * piece);
            let last = piece + 1 == pieces;
            push(
                data + u64::from(at),
                if last { data_len - at } else { len },
                flags,
            );
        }
        push(data + u64::from(data_len), 1, WRITE);
        if request.framing == Framing::Joined {
            // Neighbours are adjacent in memory: header and readable data, writable data and status.
            if out[1].flags == 0 {
                out[1].gpa -= 16;
                out[1].len += 16;
                out.remove(0);
            }
            if out[out.len() - 2].flags == WRITE {
                out.pop();
                if let Some(last) = out.last_mut() {
                    last.len += 1;
                }
            }
        }
        assert!(out.len() <= MAX_DESCRIPTORS, "too many descriptors");
    }

    /// Links `table`, in the table of a split ring, and writes it to `gpa`.
    fn write_table(&self, gpa: Gpa, table: &mut [RawDescriptor]) {
        let last = match self.packed {
            Some(_) => return self.write_raw_table(gpa, table),
            None => table.len() - 1,
        };
        for (index, descriptor) in table.iter_mut().enumerate() {
            if index < last {
                descriptor.flags |= NEXT;
                descriptor.next = u16::try_from(index + 1).expect("few descriptors");
            }
            let at = Gpa(gpa.0 + 16 * index as u64);
            self.write(at, descriptor.words().as_bytes());
        }
    }

    /// Shows the device everything submitted, and says whether it wants to be kicked.
    #[inline(never)]
    pub fn publish(&mut self) -> bool {
        if let Some(ring) = &mut self.packed {
            ring.publish();
            // As below.
            fence(SeqCst);
            return ring.wants_kick();
        }
        let (new, old) = (self.avail_index, self.published_avail);
        // Release pairs with the acquire in `Virtqueue::available`.
        self.avail_word(1).store(new.to_le(), Release);
        self.published_avail = new;
        // Full barrier between publishing and asking whether to kick.
        fence(SeqCst);
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

    /// The next request that came back, if any.
    ///
    /// # Panics
    /// When the device gives back a head that is not in flight: it broke I5.
    #[inline(never)]
    pub fn poll_used(&mut self) -> Option<SimCompletion> {
        let (id, used_len) = self.take_used()?;
        let head = u16::try_from(id)
            .ok()
            .filter(|head| *head < self.config.size);
        let head = head.expect("the device used a head outside the table");
        let sent = &mut self.sent[usize::from(head)];
        assert!(sent.in_flight, "the device used head {head} twice");
        sent.in_flight = false;
        let Sent {
            descriptors,
            data_at,
            data_len,
            ..
        } = *sent;
        if self.packed.is_some() {
            self.free.push(head);
        } else {
            let mut index = head;
            for _ in 0..descriptors {
                self.free.push(index);
                index = self.next[usize::from(index)];
            }
            // Last in, first out: the next request starts with this head again.
            let freed = self.free.len() - usize::from(descriptors);
            self.free[freed..].reverse();
        }
        let mut status = [0];
        self.read(Gpa(data_at.0 + u64::from(data_len)), &mut status);
        Some(SimCompletion {
            head,
            used_len,
            status: status[0],
        })
    }

    /// Copies the data of the request that came back last with this head.
    pub fn read_data(&self, head: u16, out: &mut [u8]) {
        self.read(self.sent[usize::from(head)].data_at, out);
    }

    /// The next used element as it stands, head and length, for tests that offer heads of their own.
    pub fn take_used(&mut self) -> Option<(u32, u32)> {
        if let Some(ring) = &mut self.packed {
            return ring.take_used();
        }
        // Acquire pairs with the release in `Virtqueue::publish_used`.
        let index = u16::from_le(self.used_word(2).load(Acquire));
        if index == self.last_used {
            return None;
        }
        let slot = usize::from(self.last_used % self.config.size);
        // SAFETY: entry `slot < size` of the used ring resolved in `new`, aligned to 4.
        let [id, len] = unsafe {
            let element = self.used.add(4 + 8 * slot).cast::<AtomicU32>();
            [element.as_ref(), element.add(1).as_ref()]
        };
        self.last_used = self.last_used.wrapping_add(1);
        Some((
            u32::from_le(id.load(Relaxed)),
            u32::from_le(len.load(Relaxed)),
        ))
    }

    /// Asks for a signal at the next completion. True if one is there already: do not wait then.
    #[inline(never)]
    pub fn enable_signals(&mut self) -> bool {
        if let Some(ring) = &self.packed {
            // As below.
            return ring.enable_signals(|| fence(SeqCst));
        }
        self.avail_word(0).store(0, Relaxed);
        if self.config.event_idx {
            self.avail_word(self.config.size + 2)
                .store(self.last_used.to_le(), Relaxed);
        }
        // Full barrier, pairs with the fence in `Virtqueue::needs_signal`.
        fence(SeqCst);
        u16::from_le(self.used_word(2).load(Relaxed)) != self.last_used
    }

    /// Asks for no signals: the guest polls.
    #[inline(never)]
    pub fn disable_signals(&mut self) {
        if let Some(ring) = &self.packed {
            return ring.disable_signals();
        }
        if self.config.event_idx {
            self.avail_word(self.config.size + 2)
                .store(self.last_used.wrapping_sub(1).to_le(), Relaxed);
        } else {
            self.avail_word(0).store(NO_INTERRUPT.to_le(), Relaxed);
        }
    }

    /// Writes a descriptor of the queue's table, whatever it says.
    ///
    /// # Panics
    /// When `index` is outside the table.
    pub fn write_descriptor(&self, index: u16, descriptor: RawDescriptor) {
        assert!(index < self.config.size);
        let [address, rest] = descriptor.words();
        // SAFETY: inside the table resolved in `new` (asserted), aligned to 16.
        let [to_address, to_rest] = unsafe {
            let entry = self.descriptors.add(2 * usize::from(index));
            [entry.as_ref(), entry.add(1).as_ref()]
        };
        to_address.store(address, Relaxed);
        to_rest.store(rest, Relaxed);
    }

    /// Writes descriptors one behind the other to `gpa`, as they stand: an indirect table, in the layout of the ring.
    pub fn write_raw_table(&self, gpa: Gpa, table: &[RawDescriptor]) {
        for (index, descriptor) in table.iter().enumerate() {
            let at = Gpa(gpa.0 + 16 * index as u64);
            let words = match self.packed {
                Some(_) => packed::words(*descriptor, 0),
                None => descriptor.words(),
            };
            self.write(at, words.as_bytes());
        }
    }

    /// Fills the next entries of a packed ring with `chain`, whatever it says, as request `id`; [`Self::publish`] shows it.
    ///
    /// # Panics
    /// When the ring is a split one.
    pub fn offer_chain(&mut self, id: u16, chain: &[RawDescriptor]) {
        let ring = self.packed.as_mut().expect("a packed ring");
        ring.add(chain, id);
    }

    /// Asks for a signal at an entry of a packed ring, with its wrap counter in bit 15.
    ///
    /// # Panics
    /// When the ring is a split one.
    pub fn signal_at(&self, position: u16) {
        self.packed
            .as_ref()
            .expect("a packed ring")
            .signal_at(position);
    }

    /// Puts `head` into the avail ring, whatever it is; [`Self::publish`] shows it.
    pub fn offer(&mut self, head: u16) {
        let slot = self.avail_index % self.config.size;
        self.avail_word(2 + slot).store(head.to_le(), Relaxed);
        self.avail_index = self.avail_index.wrapping_add(1);
    }

    /// Moves the avail index by `distance` without filling entries: jumps, and backwards.
    pub fn jump(&mut self, distance: i16) {
        self.avail_index = self.avail_index.wrapping_add_signed(distance);
    }

    /// Overwrites flags and used_event of the avail ring and the whole used ring, its index included. Of a packed ring,
    /// both event suppression structures.
    pub fn scribble(&self, value: u16) {
        if let Some(ring) = &self.packed {
            return ring.scribble(value);
        }
        self.avail_word(0).store(value, Relaxed);
        self.avail_word(self.config.size + 2).store(value, Relaxed);
        for offset in (0..used_ring_bytes(self.config.size)).step_by(2) {
            self.used_word(offset).store(value, Relaxed);
        }
    }
}
