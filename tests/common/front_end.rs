//! A vhost-user front-end that speaks raw messages, so that tests can send good ones and any bad one.

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

pub const GET_FEATURES: u32 = 1;
pub const SET_FEATURES: u32 = 2;
pub const SET_OWNER: u32 = 3;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_NUM: u32 = 8;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const SET_VRING_ERR: u32 = 14;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_PROTOCOL_FEATURES: u32 = 16;
pub const GET_QUEUE_NUM: u32 = 17;
pub const SET_VRING_ENABLE: u32 = 18;
pub const GET_CONFIG: u32 = 24;
pub const SET_CONFIG: u32 = 25;
pub const RESET_DEVICE: u32 = 34;
pub const GET_MAX_MEM_SLOTS: u32 = 36;
pub const ADD_MEM_REG: u32 = 37;
pub const REM_MEM_REG: u32 = 38;

pub const F_PROTOCOL: u64 = 1 << 30;
pub const F_VERSION_1: u64 = 1 << 32;
pub const F_INDIRECT: u64 = 1 << 28;
pub const F_EVENT_IDX: u64 = 1 << 29;
pub const F_FLUSH: u64 = 1 << 9;

const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;

/// How long any answer may take.
const DEADLINE: Duration = Duration::from_secs(15);

pub struct FrontEnd {
    pub socket: UnixStream,
}

impl FrontEnd {
    /// Connects; the server may still be about to bind.
    pub fn connect(path: &Path) -> FrontEnd {
        let start = Instant::now();
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(DEADLINE)).unwrap();
                    return FrontEnd { socket };
                }
                Err(error) if start.elapsed() > DEADLINE => {
                    panic!("cannot connect to {}: {error}", path.display())
                }
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        }
    }

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

    pub fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap();
        let header = [request, flags, len].map(u32::to_le_bytes).concat();
        [&header, payload].concat()
    }

    /// Sends a message without an answer.
    pub fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) {
        self.send_raw(&Self::message(request, VERSION, payload), fds)
            .unwrap();
    }

    /// Sends a message and returns the payload of the answer.
    pub fn ask(&self, request: u32, payload: &[u8]) -> Vec<u8> {
        self.send(request, payload, &[]);
        self.receive(request)
    }

    pub fn ask_u64(&self, request: u32) -> u64 {
        u64::from_le_bytes(self.ask(request, &[]).try_into().unwrap())
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
        Some(u64::from_le_bytes(answer.try_into().unwrap()))
    }

    pub fn receive(&self, request: u32) -> Vec<u8> {
        self.try_receive(request)
            .expect("the server closed the connection")
    }

    pub fn try_receive(&self, request: u32) -> Option<Vec<u8>> {
        let mut header = [0; 12];
        (&self.socket).read_exact(&mut header).ok()?;
        let [code, flags, len] =
            [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().unwrap()));
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
    pub fn is_closed(&self) -> bool {
        let mut byte = [0];
        let mut slices = [IoSliceMut::new(&mut byte)];
        let mut none = rustix::net::RecvAncillaryBuffer::default();
        match recvmsg(&self.socket, &mut slices, &mut none, RecvFlags::empty()) {
            Ok(message) => message.bytes == 0,
            Err(error) => error == rustix::io::Errno::CONNRESET,
        }
    }

    /// Connect as QEMU does, up to SET_OWNER and the protocol features.
    pub fn negotiate(&self) -> (u64, u64) {
        let features = self.ask_u64(GET_FEATURES);
        assert_ne!(features & F_PROTOCOL, 0);
        let protocol = self.ask_u64(GET_PROTOCOL_FEATURES);
        self.send(SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[]);
        self.send(SET_OWNER, &[], &[]);
        (features, protocol)
    }
}

/// A memory region as SET_MEM_TABLE and ADD_MEM_REG name it.
#[derive(Clone, Copy)]
pub struct Region {
    pub gpa: u64,
    pub size: u64,
    pub user_addr: u64,
    pub mmap_offset: u64,
}

impl Region {
    pub fn payload(&self) -> Vec<u8> {
        [self.gpa, self.size, self.user_addr, self.mmap_offset]
            .map(u64::to_le_bytes)
            .concat()
    }
}

pub fn mem_table(regions: &[Region]) -> Vec<u8> {
    let mut payload = [u32::try_from(regions.len()).unwrap(), 0]
        .map(u32::to_le_bytes)
        .concat();
    regions
        .iter()
        .for_each(|region| payload.extend(region.payload()));
    payload
}

/// ADD_MEM_REG and REM_MEM_REG: padding, then the region.
pub fn one_region(region: &Region) -> Vec<u8> {
    [&[0; 8][..], &region.payload()].concat()
}

pub fn vring_state(index: u32, num: u32) -> Vec<u8> {
    [index, num].map(u32::to_le_bytes).concat()
}

pub fn vring_addr(index: u32, descriptor: u64, used: u64, avail: u64) -> Vec<u8> {
    let head = [index, 0].map(u32::to_le_bytes).concat();
    [
        head,
        [descriptor, used, avail, 0].map(u64::to_le_bytes).concat(),
    ]
    .concat()
}

pub fn config_request(offset: u32, size: u32) -> Vec<u8> {
    let mut payload = [offset, size, 0].map(u32::to_le_bytes).concat();
    payload.resize(12 + size as usize, 0);
    payload
}

/// A memfd of `size` bytes.
pub fn memfd(size: u64) -> File {
    let file =
        File::from(rustix::fs::memfd_create("guest", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

pub fn eventfd() -> File {
    File::from(rustix::event::eventfd(0, rustix::event::EventfdFlags::NONBLOCK).unwrap())
}

pub fn fds(files: &[File]) -> Vec<BorrowedFd<'_>> {
    files.iter().map(AsFd::as_fd).collect()
}
