//! A vhost-user front-end that speaks raw messages, so that tests can send good ones and any bad one, and the memory
//! that it shares.
//!
//! Every answer has a deadline. What the server must not do, and a socket that cannot be used at all, is a panic: this
//! is for tests and benchmarks. Start at [`FrontEnd`].

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::Arc;
use std::time::{Duration, Instant};

use memmap2::MmapOptions;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::SimGuest;
use crate::virtio::memory::{Gpa, GuestMemory, GuestRegion};
use crate::virtio::virtqueue::{RingLayout, VirtqueueConfig};

/// Bytes of one huge page.
pub const HUGE_PAGE: u64 = 2 << 20;

/// Requests of a front-end. Vhost-user Protocol, "Front-end message types".
pub mod request {
    /// GET_FEATURES.
    pub const GET_FEATURES: u32 = 1;
    /// SET_FEATURES.
    pub const SET_FEATURES: u32 = 2;
    /// SET_OWNER.
    pub const SET_OWNER: u32 = 3;
    /// SET_MEM_TABLE.
    pub const SET_MEM_TABLE: u32 = 5;
    /// SET_VRING_NUM.
    pub const SET_VRING_NUM: u32 = 8;
    /// SET_VRING_ADDR.
    pub const SET_VRING_ADDR: u32 = 9;
    /// SET_VRING_BASE.
    pub const SET_VRING_BASE: u32 = 10;
    /// GET_VRING_BASE.
    pub const GET_VRING_BASE: u32 = 11;
    /// SET_VRING_KICK.
    pub const SET_VRING_KICK: u32 = 12;
    /// SET_VRING_CALL.
    pub const SET_VRING_CALL: u32 = 13;
    /// SET_VRING_ERR.
    pub const SET_VRING_ERR: u32 = 14;
    /// GET_PROTOCOL_FEATURES.
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    /// SET_PROTOCOL_FEATURES.
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    /// GET_QUEUE_NUM.
    pub const GET_QUEUE_NUM: u32 = 17;
    /// SET_VRING_ENABLE.
    pub const SET_VRING_ENABLE: u32 = 18;
    /// SET_BACKEND_REQ_FD.
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    /// GET_CONFIG.
    pub const GET_CONFIG: u32 = 24;
    /// SET_CONFIG.
    pub const SET_CONFIG: u32 = 25;
    /// RESET_DEVICE.
    pub const RESET_DEVICE: u32 = 34;
    /// GET_MAX_MEM_SLOTS.
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    /// ADD_MEM_REG.
    pub const ADD_MEM_REG: u32 = 37;
    /// REM_MEM_REG.
    pub const REM_MEM_REG: u32 = 38;
}

/// Feature bits, as far as a front-end has to know them.
pub mod feature {
    /// VHOST_USER_F_PROTOCOL_FEATURES.
    pub const F_PROTOCOL: u64 = 1 << 30;
    /// VIRTIO_F_VERSION_1.
    pub const F_VERSION_1: u64 = 1 << 32;
    /// VIRTIO_F_INDIRECT.
    pub const F_INDIRECT: u64 = 1 << 28;
    /// VIRTIO_F_EVENT_IDX.
    pub const F_EVENT_IDX: u64 = 1 << 29;
    /// VIRTIO_F_RING_PACKED.
    pub const F_RING_PACKED: u64 = 1 << 34;
    /// VIRTIO_F_FLUSH.
    pub const F_FLUSH: u64 = 1 << 9;
}

use feature::*;
use request::*;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// Where a guest's memory is in the address space that a front-end speaks of.
pub const USER_BASE: u64 = 0x7f00_0000_0000;

/// How long any answer may take.
const DEADLINE: Duration = Duration::from_secs(15);

/// One connection to a server.
#[derive(Debug)]
pub struct FrontEnd {
    /// The connection.
    pub socket: UnixStream,
}

impl FrontEnd {
    /// Connects; the server may still be about to bind.
    ///
    /// # Panics
    /// When nobody listens within 15 s.
    pub fn connect(path: &Path) -> FrontEnd {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(DEADLINE)).expect("a deadline");
                    return FrontEnd { socket };
                }
                Err(error) if start.elapsed() > DEADLINE => {
                    panic!("cannot connect to {}: {error}", path.display())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

    /// Sends bytes as they stand, with descriptors.
    ///
    /// # Errors
    /// When the server closed the connection.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(250))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)));
        }
        let sent = sendmsg(
            &self.socket,
            &[IoSlice::new(bytes)],
            &mut ancillary,
            SendFlags::NOSIGNAL,
        )?;
        (&self.socket).write_all(&bytes[sent..])
    }

    /// A message's bytes.
    #[must_use]
    pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).expect("a short message");
        let header = [request, flags, len].map(u32::to_le_bytes).concat();
        [&header, payload].concat()
    }

    /// Sends a message without an answer.
    ///
    /// # Panics
    /// When the server closed the connection.
    pub fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_raw(&Self::message(request, VERSION, payload), fds)
            .expect("the server closed the connection");
    }

    /// Sends a message and returns the payload of the answer.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, payload, &[]);
        self.receive(request)
    }

    /// The same for a number.
    #[must_use]
    pub fn ask_u64(&self, request: u32) -> u64 {
        number(&self.ask(request, &[]))
    }

    /// Sends a message with NEED_REPLY; 0 is success. `None` when the server closed the connection.
    pub fn acknowledged(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Option<u64> {
        self.send_raw(&Self::message(request, VERSION | NEED_REPLY, payload), fds)
            .ok()?;
        let answer = self.try_receive(request)?;
        Some(number(&answer))
    }

    /// The payload of the answer to `request`.
    ///
    /// # Panics
    /// When the server closed the connection, or answered something else.
    #[must_use]
    pub fn receive(&self, request: u32) -> Vec<u8> {
        self.try_receive(request)
            .expect("the server closed the connection")
    }

    /// The same; `None` when the server closed the connection.
    ///
    /// # Panics
    /// When the server answered something else.
    #[must_use]
    pub fn try_receive(&self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header).ok()?;
        let [code, flags, len] = [0, 4, 8].map(|at| {
            u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]])
        });
        assert_eq!(
            (code, flags & 7),
            (request, VERSION | 4),
            "answer to another request, or no reply flag"
        );
        let mut payload = vec![0; len as usize];
        (&self.socket).read_exact(&mut payload).ok()?;
        Some(payload)
    }

    /// The server closes the connection within the deadline.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let mut byte = [0];
        let mut slices = [IoSliceMut::new(&mut byte)];
        let mut none = rustix::net::RecvAncillaryBuffer::default();
        match recvmsg(&self.socket, &mut slices, &mut none, RecvFlags::empty()) {
            Ok(message) => message.bytes == 0,
            Err(error) => error == rustix::io::Errno::CONNRESET,
        }
    }

    /// Connects as QEMU does, up to SET_OWNER and the protocol features: the features and protocol features offered.
    ///
    /// # Panics
    /// When the server has no protocol features.
    pub fn negotiate(&self) -> (u64, u64) {
        let features = self.ask_u64(GET_FEATURES);
        assert_ne!(features & F_PROTOCOL, 0);
        let protocol = self.ask_u64(GET_PROTOCOL_FEATURES);
        self.send(SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[]);
        self.send(SET_OWNER, &[], &[]);
        (features, protocol)
    }

    /// Accepts `features` and shares `memory`.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn share(&self, features: u64, memory: &SharedMemory) {
        self.send(SET_FEATURES, &features.to_le_bytes(), &[]);
        let table = mem_table(&[memory.region]);
        let answer = self.acknowledged(SET_MEM_TABLE, &table, &[memory.file.as_fd()]);
        assert_eq!(answer, Some(0), "SET_MEM_TABLE");
    }

    /// Starts the virtqueue of `driver`, which lives in `memory`, as QEMU orders it: the eventfds to kick and to be
    /// called by.
    ///
    /// # Panics
    /// When the server refuses.
    pub fn start_queue(
        &self,
        index: u32,
        driver: &SimGuest,
        memory: &SharedMemory,
    ) -> (File, File) {
        let config = driver.virtqueue_config();
        let (kick, call) = (eventfd(), eventfd());
        self.send(SET_VRING_NUM, &vring_state(index, config.size.into()), &[]);
        let base = vring_state(index, vring_base(&config));
        self.send(SET_VRING_BASE, &base, &[]);
        let [descriptor, used, avail] =
            [config.descriptor_table, config.used, config.avail].map(|at| memory.user_address(at));
        let addresses = vring_addr(index, descriptor, used, avail);
        self.send(SET_VRING_ADDR, &addresses, &[]);
        let which = u64::from(index).to_le_bytes();
        self.send(SET_VRING_CALL, &which, &[call.as_fd()]);
        self.send(SET_VRING_KICK, &which, &[kick.as_fd()]);
        let enabled = self.acknowledged(SET_VRING_ENABLE, &vring_state(index, 1), &[]);
        assert_eq!(enabled, Some(0), "SET_VRING_ENABLE");
        (kick, call)
    }
}

fn number(payload: &[u8]) -> u64 {
    u64::from_le_bytes(payload.try_into().expect("an answer of 8 bytes"))
}

/// A guest's memory in a memfd, one region, as a front-end shares it.
#[derive(Debug)]
pub struct SharedMemory {
    /// The memfd.
    pub file: File,
    /// How the server is told about it.
    pub region: Region,
    /// For the guest's drivers.
    pub memory: Arc<GuestMemory>,
}

impl SharedMemory {
    /// `bytes` of zeroes at `base`.
    ///
    /// # Panics
    /// When the system has no memory.
    #[must_use]
    pub fn new(base: Gpa, bytes: u64) -> SharedMemory {
        SharedMemory::of_file(base, bytes, memfd(bytes))
    }

    /// The same on huge pages of 2 MiB, of which it takes whole ones.
    ///
    /// # Panics
    /// When too few of them are free.
    #[must_use]
    pub fn on_huge_pages(base: Gpa, bytes: u64) -> SharedMemory {
        let bytes = bytes.next_multiple_of(HUGE_PAGE);
        SharedMemory::of_file(base, bytes, huge_memfd(bytes))
    }

    fn of_file(base: Gpa, bytes: u64, file: File) -> SharedMemory {
        let len = usize::try_from(bytes).expect("64 bits");
        let map = MmapOptions::new()
            .len(len)
            .map_raw(&file)
            .expect("address space for a guest's memory");
        let hva = NonNull::new(map.as_mut_ptr()).expect("a mapping");
        let region = GuestRegion {
            gpa: base,
            len: bytes,
            hva,
            dma: 0,
        };
        // SAFETY: `map` keeps the pages mapped and is owned by the memory; only raw accesses follow.
        let memory = unsafe { GuestMemory::new(vec![region], Box::new(map)) };
        SharedMemory {
            file,
            region: Region {
                gpa: base.0,
                size: bytes,
                user_addr: USER_BASE,
                mmap_offset: 0,
            },
            memory: Arc::new(memory.expect("one region")),
        }
    }

    /// How the front-end names an address of ours within it.
    ///
    /// # Panics
    /// When the address is not within it.
    #[must_use]
    pub fn user_address(&self, host: NonNull<u8>) -> u64 {
        let start = self.memory.contiguous(Gpa(self.region.gpa), 1);
        let start = start.expect("one region").addr().get();
        let offset = host
            .addr()
            .get()
            .checked_sub(start)
            .expect("an address within it");
        self.region.user_addr + offset as u64
    }
}

/// A memory region as SET_MEM_TABLE and ADD_MEM_REG name it.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Where the guest sees it.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Where the front-end says that it sees it.
    pub user_addr: u64,
    /// Offset in its file.
    pub mmap_offset: u64,
}

impl Region {
    /// As it stands in a message.
    #[must_use]
    pub fn payload(&self) -> Vec<u8> {
        [self.gpa, self.size, self.user_addr, self.mmap_offset]
            .map(u64::to_le_bytes)
            .concat()
    }
}

/// SET_MEM_TABLE.
///
/// # Panics
/// With more regions than 32 bits count.
#[must_use]
pub fn mem_table(regions: &[Region]) -> Vec<u8> {
    let mut payload = [u32::try_from(regions.len()).expect("few regions"), 0]
        .map(u32::to_le_bytes)
        .concat();
    regions
        .iter()
        .for_each(|region| payload.extend(region.payload()));
    payload
}

/// ADD_MEM_REG and REM_MEM_REG: padding, then the region.
#[must_use]
pub fn one_region(region: &Region) -> Vec<u8> {
    [&[0; 8][..], &region.payload()].concat()
}

/// A vring index and a number.
#[must_use]
pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index, num].map(u32::to_le_bytes).concat()
}

/// What SET_VRING_BASE says of a queue that starts: in a packed ring, where to take and where to give back.
#[must_use]
pub fn vring_base(config: &VirtqueueConfig) -> u32 {
    match config.layout {
        RingLayout::Split => config.next_avail.into(),
        RingLayout::Packed => u32::from(config.next_avail) | u32::from(config.next_used) << 16,
    }
}

/// SET_VRING_ADDR.
#[must_use]
pub fn vring_addr(index: u32, descriptor: u64, used: u64, avail: u64) -> Vec<u8> {
    let head = [index, 0].map(u32::to_le_bytes).concat();
    [
        head,
        [descriptor, used, avail, 0].map(u64::to_le_bytes).concat(),
    ]
    .concat()
}

/// GET_CONFIG of `size` bytes.
#[must_use]
pub fn config_request(offset: u32, size: u32) -> Vec<u8> {
    let mut payload = [offset, size, 0].map(u32::to_le_bytes).concat();
    payload.resize(12 + size as usize, 0);
    payload
}

/// A memfd of `size` bytes.
///
/// # Panics
/// When the system has none.
#[must_use]
pub fn memfd(size: u64) -> File {
    memfd_of(MemfdFlags::empty(), size)
}

/// The same on huge pages; `size` is a multiple of [`HUGE_PAGE`]. Mapping it takes them.
///
/// # Panics
/// When the system has none.
#[must_use]
pub fn huge_memfd(size: u64) -> File {
    memfd_of(MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB, size)
}

fn memfd_of(flags: MemfdFlags, size: u64) -> File {
    let file = memfd_create("guest", MemfdFlags::CLOEXEC | flags);
    let file = File::from(file.expect("a memfd"));
    file.set_len(size).expect("a memfd of that size");
    file
}

/// An eventfd that does not block.
///
/// # Panics
/// When the system has none.
#[must_use]
pub fn eventfd() -> File {
    let eventfd = rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK);
    File::from(eventfd.expect("an eventfd"))
}

/// Borrowed, to be sent.
#[must_use]
pub fn fds(files: &[File]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}
