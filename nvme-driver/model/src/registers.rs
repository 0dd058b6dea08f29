//! The register file: CAP, VS, INTMS, INTMC, CC, CSTS, AQA, ASQ, ACQ and the doorbells, with the rules of when each may
//! be written. NVM Express Base 2.0, "Controller Properties".

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nvme_driver::spec::{Cc, Csts, PAGE_SIZE, offset};

use crate::VERSION;
use crate::shared::Shared;

/// CC fields other than EN and SHN: CSS, MPS, AMS, IOSQES, IOCQES as this controller needs them.
const CC_SHAPE_MASK: u32 = 0x00ff_3ff0;

/// Where the controller is on its way between disabled and ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Disabled,
    Starting(Duration),
    Ready,
    Stopping(Duration),
}

#[derive(Debug)]
pub(crate) struct Registers {
    shared: Arc<Shared>,
    state: State,
    cc: u32,
    interrupt_mask: u32,
    aqa: u32,
    asq: u64,
    acq: u64,
    shutdown: u32,
}

impl Registers {
    pub(crate) fn new(shared: Arc<Shared>) -> Registers {
        Registers {
            shared,
            state: State::Disabled,
            cc: 0,
            interrupt_mask: 0,
            aqa: 0,
            asq: 0,
            acq: 0,
            shutdown: 0,
        }
    }

    fn cap(&self) -> u64 {
        let config = &self.shared.config;
        let cqr = 1 << 16;
        u64::from(config.mqes - 1)
            | cqr
            | u64::from(config.timeout_units) << 24
            | u64::from(config.dstrd) << 32
            | 1 << 37 // NVM command set; MPSMIN = MPSMAX = 0: 4 KiB pages
    }

    fn csts(&self) -> u32 {
        let ready = matches!(self.state, State::Ready | State::Stopping(_));
        let fatal = self.shared.fatal.load(Ordering::Relaxed);
        (u32::from(ready) * Csts::RDY) | (u32::from(fatal) * Csts::CFS) | self.shutdown
    }

    pub(crate) fn read32(&self, at: u32) -> u32 {
        if self.shared.gone.load(Ordering::Relaxed) {
            return u32::MAX;
        }
        let half = |value: u64, at: u32| ((value >> (8 * (at & 4))) & 0xffff_ffff) as u32;
        match at {
            offset::CAP | 0x04 => half(self.cap(), at),
            offset::VS => VERSION,
            offset::INTMS | offset::INTMC => self.interrupt_mask,
            offset::CC => self.cc,
            offset::CSTS => self.csts(),
            offset::AQA => self.aqa,
            offset::ASQ | 0x2c => half(self.asq, at - offset::ASQ),
            offset::ACQ | 0x34 => half(self.acq, at - offset::ACQ),
            _ => 0, // reserved properties and doorbells read zero
        }
    }

    pub(crate) fn write32(&mut self, at: u32, value: u32) {
        if self.shared.gone.load(Ordering::Relaxed) {
            return;
        }
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match at {
            offset::INTMS => self.interrupt_mask |= value,
            offset::INTMC => self.interrupt_mask &= !value,
            offset::CC => self.write_cc(value),
            offset::AQA | offset::ASQ | 0x2c | offset::ACQ | 0x34 if self.cc & Cc::EN != 0 => {
                self.shared
                    .driver_error("admin queue properties written while CC.EN is 1");
            }
            offset::AQA => self.aqa = value,
            offset::ASQ => self.asq = low(self.asq),
            0x2c => self.asq = high(self.asq),
            offset::ACQ => self.acq = low(self.acq),
            0x34 => self.acq = high(self.acq),
            doorbell if doorbell >= offset::DOORBELLS => self.write_doorbell(doorbell, value),
            _ => self
                .shared
                .driver_error("write to a read-only or reserved property"),
        }
    }

    fn write_doorbell(&self, at: u32, value: u32) {
        let shared = &self.shared;
        let stride = 4 << shared.config.dstrd;
        let index = (at - offset::DOORBELLS) / stride;
        let slot = usize::try_from(index / 2)
            .ok()
            .and_then(|id| shared.slots.get(id));
        let (Some(slot), Ok(value)) = (slot, u16::try_from(value)) else {
            return shared.driver_error("doorbell of an impossible queue or value");
        };
        if index.is_multiple_of(2) {
            slot.ring_sq(value);
        } else {
            slot.ring_cq(value);
        }
    }

    fn write_cc(&mut self, value: u32) {
        let was_enabled = self.cc & Cc::EN != 0;
        let enable = value & Cc::EN != 0;
        if was_enabled && enable && (value ^ self.cc) & CC_SHAPE_MASK != 0 {
            self.shared
                .driver_error("CC fields changed while CC.EN is 1");
        }
        let shutting_down = value & Cc::SHN_MASK != 0 && self.cc & Cc::SHN_MASK == 0;
        self.cc = value;
        match (was_enabled, enable) {
            (false, true) => self.enable(),
            (true, false) => self.disable(),
            _ => {}
        }
        if shutting_down && enable {
            // A medium that cannot be made durable never reports that the shutdown is complete.
            self.shutdown = match self.shared.media.sync() {
                Ok(()) => Csts::SHST_COMPLETE,
                Err(_) => Csts::SHST_OCCURRING,
            };
        }
    }

    fn enable(&mut self) {
        if self.state != State::Disabled {
            return self.shared.driver_error("CC.EN set before CSTS.RDY was 0");
        }
        self.shutdown = 0;
        let entries = |zero_based: u32| (zero_based & 0xfff) + 1;
        let (sq, cq) = (entries(self.aqa), entries(self.aqa >> 16));
        let page = PAGE_SIZE as u64;
        let sound = self.cc & CC_SHAPE_MASK == Cc::enabled().0 & CC_SHAPE_MASK
            && sq >= 2
            && cq >= 2
            && self.asq.is_multiple_of(page)
            && self.acq.is_multiple_of(page);
        if !sound {
            self.shared.fatal.store(true, Ordering::Relaxed);
            return;
        }
        let slot = &self.shared.slots[0];
        slot.unring();
        let mut queue = slot.lock();
        queue.create_cq(self.acq, cq);
        queue.create_sq(self.asq, sq);
        drop(queue);
        self.state = State::Starting(self.shared.config.ready_delay);
        self.advance(Duration::ZERO);
    }

    /// All queues are gone at once; CSTS.RDY follows.
    fn disable(&mut self) {
        if matches!(self.state, State::Starting(_)) {
            self.shared
                .driver_error("CC.EN cleared before CSTS.RDY was 1");
        }
        self.shared.forget_queues();
        self.shared
            .write_cache
            .store(self.shared.config.vwc, Ordering::Relaxed);
        self.shared.fatal.store(false, Ordering::Relaxed);
        self.state = State::Stopping(self.shared.config.ready_delay);
        self.advance(Duration::ZERO);
    }

    /// Lets time pass for a state change under way. `false` when there is none to wait for.
    pub(crate) fn advance(&mut self, passed: Duration) -> bool {
        let left =
            |delay: Duration| Some(delay.saturating_sub(passed)).filter(|left| !left.is_zero());
        match self.state {
            State::Starting(delay) => match left(delay) {
                Some(left) => self.state = State::Starting(left),
                None => {
                    self.state = State::Ready;
                    self.shared.ready.store(true, Ordering::Release);
                }
            },
            State::Stopping(delay) => {
                self.state = left(delay).map_or(State::Disabled, State::Stopping);
            }
            State::Disabled | State::Ready => return false,
        }
        true
    }
}
