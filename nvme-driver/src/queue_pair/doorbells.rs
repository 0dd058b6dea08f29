//! The doorbells of one queue pair, with shadows in memory where the controller takes those: an emulated controller
//! (every write to a register leaves the virtual machine) then reads most values from memory and says when it wants a
//! doorbell. NVM Express Base 2.0, "Doorbell Buffer Config command". Hardware does not offer it and is unaffected.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering, fence};

use crate::dma::{DmaAccess, DmaBuffer, DmaError, DmaSpace, Iova};
use crate::spec::{PAGE_SIZE, QueueId};
use crate::transport::QueuePort;

/// The two pages of one controller.
#[derive(Debug)]
pub(crate) struct ShadowPages {
    /// Values as we would write them to the doorbells. QEMU writes to this page as well.
    values: DmaBuffer,
    /// Up to which values the controller needs no doorbell.
    events: DmaBuffer,
}

// SAFETY: shared are words that are only reached as atomics (`Shadow`).
unsafe impl Sync for ShadowPages {}

impl ShadowPages {
    pub(crate) fn new(space: &Arc<DmaSpace>) -> Result<Arc<ShadowPages>, DmaError> {
        Ok(Arc::new(ShadowPages {
            values: DmaBuffer::new(space, PAGE_SIZE, DmaAccess::Both)?,
            events: DmaBuffer::new(space, PAGE_SIZE, DmaAccess::Both)?,
        }))
    }

    /// Addresses for PRP1 and PRP2 of the command.
    pub(crate) fn addresses(&self) -> (Iova, Iova) {
        (self.values.iova(0), self.events.iova(0))
    }

    /// The shadow of the doorbell at this index (twice the queue identifier, and one more for its completion queue),
    /// `stride` bytes apart. `None` when it lies behind the page: that doorbell is rung.
    fn shadow(self: &Arc<Self>, index: usize, stride: usize) -> Option<Shadow> {
        let offset = index.checked_mul(stride)?;
        let inside = offset.checked_add(4)? <= PAGE_SIZE && offset.is_multiple_of(4);
        inside.then(|| Shadow {
            offset,
            last: 0,
            pages: Arc::clone(self),
        })
    }
}

/// The shadow of one doorbell.
#[derive(Debug)]
struct Shadow {
    offset: usize,
    /// The value written last.
    last: u16,
    pages: Arc<ShadowPages>,
}

impl Shadow {
    fn word(&self, page: &DmaBuffer) -> &AtomicU32 {
        // SAFETY: `offset + 4` lies in the page and is aligned (`ShadowPages::shadow`); the page lives as long as `self`;
        // its words are only reached as atomics (I1).
        unsafe { page.pointer(self.offset).cast::<AtomicU32>().as_ref() }
    }

    /// Stores a value. `true` when the controller wants the doorbell as well.
    fn store(&mut self, value: u16) -> bool {
        let pages = Arc::clone(&self.pages);
        // Release: what the value announces comes first.
        self.word(&pages.values)
            .store(u32::from(value).to_le(), Ordering::Release);
        // The controller stores its event and then looks at the value; we the other way round: without a full fence
        // on both sides each could miss the other.
        fence(Ordering::SeqCst);
        let event = u32::from_le(self.word(&pages.events).load(Ordering::Relaxed));
        // The device's word, of which 16 bits count.
        let event = (event & 0xffff) as u16;
        let old = std::mem::replace(&mut self.last, value);
        wants_doorbell(event, value, old)
    }
}

/// `event` lies among the values from `old` on and before `new`, round the corner of 16 bits too.
fn wants_doorbell(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// Both doorbells of one queue pair.
#[derive(Debug)]
pub(crate) struct Doorbells<P> {
    port: P,
    /// Of submission tail and completion head.
    shadows: Option<Box<[Shadow; 2]>>,
}

impl<P: QueuePort> Doorbells<P> {
    /// Doorbells without shadows.
    pub(crate) fn new(port: P) -> Doorbells<P> {
        Doorbells {
            port,
            shadows: None,
        }
    }

    /// With shadows, if both lie in the pages.
    pub(crate) fn with_shadows(
        port: P,
        pages: &Arc<ShadowPages>,
        queue: QueueId,
        stride: u32,
    ) -> Doorbells<P> {
        let index = 2 * usize::from(queue.0);
        let shadow = |index| pages.shadow(index, usize::try_from(stride).ok()?);
        let shadows = shadow(index).zip(shadow(index + 1));
        Doorbells {
            port,
            shadows: shadows.map(|(sq, cq)| Box::new([sq, cq])),
        }
    }

    /// `true` when the doorbell itself was written.
    #[inline]
    pub(crate) fn ring_sq(&mut self, tail: u16) -> bool {
        if let Some(shadows) = &mut self.shadows
            && !store_shadow(&mut shadows[0], tail)
        {
            return false;
        }
        self.port.ring_sq(tail);
        true
    }

    /// `true` when the doorbell itself was written.
    #[inline]
    pub(crate) fn ring_cq(&mut self, head: u16) -> bool {
        if let Some(shadows) = &mut self.shadows
            && !store_shadow(&mut shadows[1], head)
        {
            return false;
        }
        self.port.ring_cq(head);
        true
    }

    #[inline]
    pub(crate) fn service(&mut self) {
        self.port.service();
    }

    pub(crate) fn port(&self) -> &P {
        &self.port
    }

    pub(crate) fn port_mut(&mut self) -> &mut P {
        &mut self.port
    }
}

/// Apart, so that hardware's path stays short.
#[inline(never)]
fn store_shadow(shadow: &mut Shadow, value: u16) -> bool {
    shadow.store(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue_pair::tests::Domain;

    /// Remembers what was rung.
    #[derive(Debug, Default)]
    struct Rung(Vec<(&'static str, u16)>);

    impl QueuePort for Rung {
        fn ring_sq(&mut self, tail: u16) {
            self.0.push(("sq", tail));
        }

        fn ring_cq(&mut self, head: u16) {
            self.0.push(("cq", head));
        }
    }

    #[test]
    fn ring_with_shadows_stores_each_value_and_rings_when_it_is_wanted() {
        let space = DmaSpace::new(Arc::new(Domain::default()));
        let mut pages = ShadowPages::new(&space).unwrap();
        // The controller wants to hear of tail 4 of queue 3, and of every head.
        let (tail_at, head_at) = (2 * 3 * 4, 2 * 3 * 4 + 4);
        Arc::get_mut(&mut pages)
            .unwrap()
            .events
            .write(tail_at, &3_u32);
        let mut doorbells = Doorbells::with_shadows(Rung::default(), &pages, QueueId(3), 4);
        for value in 1..=5 {
            doorbells.ring_sq(value);
            assert_eq!(pages.values.read::<u32>(tail_at), u32::from(value));
        }
        assert!(doorbells.ring_cq(1));
        assert_eq!(pages.values.read::<u32>(head_at), 1);
        assert_eq!(doorbells.port.0, [("sq", 4), ("cq", 1)]);
        // Behind the page: no shadow, each is rung.
        let mut doorbells = Doorbells::with_shadows(Rung::default(), &pages, QueueId(3), 4096);
        assert!(doorbells.ring_sq(1) && doorbells.ring_sq(2));
        assert_eq!(doorbells.port.0.len(), 2);
    }

    #[test]
    fn wants_doorbell_only_when_the_event_was_passed() {
        // The controller asks for a doorbell once the value goes beyond `event`.
        for (event, old, new, wanted) in [
            (5, 5, 6, true),
            (5, 4, 6, true),
            (5, 6, 7, false),
            (5, 4, 5, false),
            (0xffff, 0xffff, 0, true),
            (0xfffe, 0xffff, 1, false),
            (0, 0, 1, true),
            // Round the corner of a ring of 1024.
            (1022, 1023, 0, false),
            (1023, 1023, 0, true),
            (0, 1022, 1, true),
            (5, 1020, 3, false),
        ] {
            assert_eq!(
                wants_doorbell(event, new, old),
                wanted,
                "event {event} from {old} to {new}"
            );
        }
    }
}
