//! A socket between a front-end and a server that passes every message on as it is, with its descriptors, but for where a
//! packed ring begins.

use std::io::{ErrorKind, IoSliceMut, Read, Result};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::thread::JoinHandle;

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tandem::sim::front_end::{FrontEnd, request};

const HEADER: usize = 12;
/// More than any message that a front-end sends.
const MESSAGE: usize = 4096;

/// One connection's relay, which ends with the connection.
#[derive(Debug)]
pub struct Relay {
    to_server: JoinHandle<Result<u32>>,
    to_front_end: JoinHandle<()>,
}

impl Relay {
    /// Waits at `path` for a front-end and connects it to `server`. The base of a virtqueue that has not begun is `fresh`
    /// to the server, where the front-end says 0.
    pub fn start(path: &Path, server: &Path, fresh: u32) -> Relay {
        let listener = UnixListener::bind(path).unwrap();
        let server = FrontEnd::connect(server);
        let answers = server.socket.try_clone().unwrap();
        // Nothing is said while the rings are in use, however long that takes.
        answers.set_read_timeout(None).unwrap();
        let path = path.to_owned();
        let (accepted, front_end) = std::sync::mpsc::channel();
        let to_server = std::thread::spawn(move || {
            let (socket, _) = listener.accept()?;
            std::fs::remove_file(path)?;
            accepted.send(socket.try_clone()?).unwrap();
            let passed = pass_on(&socket, &server, fresh);
            server.socket.shutdown(Shutdown::Both)?;
            passed
        });
        let to_front_end = std::thread::spawn(move || {
            let front_end: UnixStream = front_end.recv().unwrap();
            // Answers bring no descriptors here. An error is an end, too: a connection that one side closed.
            let _ = std::io::copy(&mut &answers, &mut &front_end);
            let _ = front_end.shutdown(Shutdown::Both);
        });
        Relay {
            to_server,
            to_front_end,
        }
    }

    /// After the front-end has closed: how often a base was another one.
    pub fn end(self) -> u32 {
        self.to_front_end.join().unwrap();
        self.to_server.join().unwrap().unwrap()
    }
}

fn pass_on(front_end: &UnixStream, server: &FrontEnd, fresh: u32) -> Result<u32> {
    let mut bases = 0;
    let mut message = [0; MESSAGE];
    while let Some((len, descriptors)) = receive(front_end, &mut message)? {
        let [code, num] = [0, HEADER + 4].map(|at| {
            let word = message[at..at + 4].try_into().unwrap();
            u32::from_le_bytes(word)
        });
        if code == request::SET_VRING_BASE && num == 0 {
            message[HEADER + 4..HEADER + 8].copy_from_slice(&fresh.to_le_bytes());
            bases += 1;
        }
        let borrowed: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
        server.send_raw(&message[..len], &borrowed)?;
    }
    Ok(bases)
}

/// A message's bytes and descriptors, which come with its first byte; `None` at the end.
fn receive(socket: &UnixStream, message: &mut [u8]) -> Result<Option<(usize, Vec<OwnedFd>)>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut message[..HEADER])];
    let got = match recvmsg(socket, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC) {
        Ok(got) if got.bytes > 0 => got.bytes,
        Ok(_) | Err(rustix::io::Errno::CONNRESET) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let mut descriptors = Vec::new();
    for one in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(more) = one {
            descriptors.extend(more);
        }
    }
    (&*socket).read_exact(&mut message[got..HEADER])?;
    let size = u32::from_le_bytes(message[8..HEADER].try_into().unwrap());
    let len = HEADER + size as usize;
    let payload = message.get_mut(HEADER..len).ok_or(ErrorKind::InvalidData)?;
    (&*socket).read_exact(payload)?;
    Ok(Some((len, descriptors)))
}
