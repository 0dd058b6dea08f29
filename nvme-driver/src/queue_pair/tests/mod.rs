//! A queue pair against controllers of a few lines, which a test steers entry by entry.

#[cfg(loom)]
mod loom;
#[cfg(not(loom))]
mod rings;

use std::ops::RangeInclusive;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex};

use super::QueuePair;
use super::doorbells::Doorbells;
use crate::dma::{DmaAccess, DmaDomain, DmaError, DmaSpace, Iova};
use crate::spec::QueueId;
use crate::transport::{QueuePort, Transport};

/// A domain that only remembers what is mapped where.
#[derive(Debug, Default)]
pub(crate) struct Domain {
    windows: Mutex<Vec<Window>>,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    iova: Iova,
    hva: NonNull<u8>,
    len: u64,
}

// SAFETY: an address; what is behind it is reached under the rules of whoever asks for it.
unsafe impl Send for Window {}

impl Domain {
    /// Where the controller of a test finds `len` bytes at `iova`. None of them may be unmapped.
    fn reach(&self, iova: Iova, len: u64) -> NonNull<u8> {
        let windows = self.windows.lock().unwrap();
        let window = windows
            .iter()
            .find(|w| iova >= w.iova && iova.0 + len <= w.iova.0 + w.len);
        let window = window.unwrap_or_else(|| panic!("{len} bytes at {iova:?} are not mapped"));
        let offset = usize::try_from(iova.0 - window.iova.0).unwrap();
        // SAFETY: inside the window (found above), which the driver keeps mapped.
        unsafe { window.hva.add(offset) }
    }
}

impl DmaDomain for Domain {
    fn usable_ranges(&self) -> Vec<RangeInclusive<u64>> {
        vec![0..=0xffff_ffff]
    }

    unsafe fn map(
        &self,
        iova: Iova,
        hva: NonNull<u8>,
        len: u64,
        _access: DmaAccess,
    ) -> Result<(), DmaError> {
        self.windows.lock().unwrap().push(Window { iova, hva, len });
        Ok(())
    }

    fn unmap(&self, iova: Iova, _len: u64) -> Result<(), DmaError> {
        self.windows.lock().unwrap().retain(|w| w.iova != iova);
        Ok(())
    }
}

/// A transport that is never asked for registers: a queue pair needs its port alone.
struct PortOnly<P>(std::marker::PhantomData<P>);

impl<P: QueuePort> Transport for PortOnly<P> {
    type Port = P;

    fn read32(&mut self, offset: u32) -> u32 {
        panic!("a queue pair read register {offset:#x}");
    }

    fn read64(&mut self, offset: u32) -> u64 {
        panic!("a queue pair read register {offset:#x}");
    }

    fn write32(&mut self, offset: u32, _value: u32) {
        panic!("a queue pair wrote register {offset:#x}");
    }

    fn write64(&mut self, offset: u32, _value: u64) {
        panic!("a queue pair wrote register {offset:#x}");
    }

    fn port(&mut self, _queue: QueueId, _stride: u32) -> Option<P> {
        panic!("a queue pair asked for another port");
    }

    fn dma_domain(&self) -> Arc<dyn DmaDomain> {
        panic!("a queue pair asked for a domain");
    }

    fn name(&self) -> String {
        "test".to_owned()
    }
}

/// A queue pair of `entries` behind `port`.
fn queue_pair<P: QueuePort>(
    port: P,
    entries: u16,
) -> (Arc<Domain>, Arc<DmaSpace>, QueuePair<PortOnly<P>>) {
    let domain = Arc::new(Domain::default());
    let space = DmaSpace::new(Arc::clone(&domain) as Arc<dyn DmaDomain>);
    let queue = QueuePair::new(
        &space,
        Doorbells::new(port),
        QueueId(1),
        entries,
        super::MAX_TRANSFER,
    )
    .unwrap();
    (domain, space, queue)
}
