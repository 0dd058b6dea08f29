//! MSI-X vectors as eventfds: one for each queue pair, off until its poller is about to sleep.
//!
//! A vector that is off is masked in the device: what a completion would have told is kept pending by the device and told
//! when it is switched on. Switching is a system call, which a poller makes when it falls asleep with commands at the
//! device and when it wakes up, never while it polls.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::sync::Arc;

use rustix::event::{EventfdFlags, eventfd};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_IRQ_SET_ACTION_TRIGGER, VFIO_IRQ_SET_DATA_EVENTFD, VFIO_PCI_MSIX_IRQ_INDEX,
    VFIO_TYPE,
};
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ptr};
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE.into(), VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);

/// An eventfd that is none: the vector is off.
const OFF: RawFd = -1;
/// `argsz`, `flags`, `index`, `start` and `count` of `struct vfio_irq_set`.
const HEADER_WORDS: usize = 5;

/// All vectors of one device that were made.
#[derive(Debug)]
pub(super) struct Vectors {
    device: Arc<File>,
    /// Vector 0 is the admin queue's, and stays off.
    count: u16,
}

impl Vectors {
    /// Makes `wanted` vectors, or as many as the device and the kernel have, all of them off.
    pub(super) fn new(device: File, wanted: u16) -> io::Result<Vectors> {
        let device = Arc::new(device);
        let mut count = wanted.min(vectors_of(&device)?);
        if count == 0 {
            return Err(io::Error::other("the device has no MSI-X"));
        }
        loop {
            let off = vec![OFF; count.into()];
            match set(&device, 0, &off)? {
                0 => return Ok(Vectors { device, count }),
                // So many could be had.
                fewer => {
                    let fewer = u16::try_from(fewer).ok().filter(|fewer| *fewer < count);
                    count = fewer.ok_or_else(|| io::Error::other("the kernel has no vectors"))?;
                }
            }
        }
    }

    /// The vector of a queue pair's own. `None` when there are not enough.
    pub(super) fn of(&self, queue: u16) -> Option<u16> {
        (queue > 0 && queue < self.count).then_some(queue)
    }

    /// The vector of a queue pair, to be switched on and off.
    pub(super) fn vector(&self, queue: u16) -> Option<io::Result<Vector>> {
        let number = self.of(queue)?;
        Some(Vector::new(Arc::clone(&self.device), number))
    }
}

/// One vector.
#[derive(Debug)]
pub(super) struct Vector {
    device: Arc<File>,
    number: u16,
    event: OwnedFd,
    on: bool,
}

impl Vector {
    fn new(device: Arc<File>, number: u16) -> io::Result<Vector> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Vector {
            device,
            number,
            event,
            on: false,
        })
    }

    /// `false` when the kernel refuses: it stays off.
    pub(super) fn switch_on(&mut self) -> bool {
        if !self.on {
            let event = [self.event.as_raw_fd()];
            self.on = matches!(set(&self.device, self.number.into(), &event), Ok(0));
        }
        self.on
    }

    pub(super) fn switch_off(&mut self) {
        if self.on {
            // One that cannot be switched off goes on telling what nobody asked: a spurious wake-up.
            self.on = !matches!(set(&self.device, self.number.into(), &[OFF]), Ok(0));
        }
    }
}

impl AsFd for Vector {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        self.switch_off();
    }
}

/// VFIO_DEVICE_GET_IRQ_INFO: how many vectors the device has.
fn vectors_of(device: &File) -> io::Result<u16> {
    // `argsz`, `flags`, `index` and `count` of `struct vfio_irq_info`.
    let mut info = [16_u32, 0, VFIO_PCI_MSIX_IRQ_INDEX, 0];
    // SAFETY: the kernel reads and writes the 16 bytes that `argsz` says.
    if unsafe { ioctl_with_mut_ref(device, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(u16::try_from(info[3]).unwrap_or(u16::MAX))
}

/// VFIO_DEVICE_SET_IRQS: connects vectors from `start` on to eventfds. A positive answer says how many there could be.
fn set(device: &File, start: u32, events: &[RawFd]) -> io::Result<i32> {
    let count = u32::try_from(events.len()).map_err(io::Error::other)?;
    let bytes = u32::try_from(4 * (HEADER_WORDS + events.len())).map_err(io::Error::other)?;
    let flags = VFIO_IRQ_SET_DATA_EVENTFD | VFIO_IRQ_SET_ACTION_TRIGGER;
    // All fields of the structure have 32 bits, and so have the eventfds behind it. One vector needs no allocation: a
    // reactor sets one at a time.
    let mut small = [0; HEADER_WORDS + 1];
    let mut large = Vec::new();
    let words = if events.len() == 1 {
        &mut small[..]
    } else {
        large.resize(HEADER_WORDS + events.len(), 0);
        &mut large[..]
    };
    words[..HEADER_WORDS].copy_from_slice(&[bytes, flags, VFIO_PCI_MSIX_IRQ_INDEX, start, count]);
    for (word, event) in words[HEADER_WORDS..].iter_mut().zip(events) {
        *word = event.cast_unsigned();
    }
    // SAFETY: the kernel reads `argsz` bytes from there: as many as the words have.
    match unsafe { ioctl_with_ptr(device, VFIO_DEVICE_SET_IRQS(), words.as_ptr()) } {
        answer if answer < 0 => Err(io::Error::last_os_error()),
        answer => Ok(answer),
    }
}
