//! The two virtqueues of a SCSI host that carry no commands: how their rings are kept. What is done with the requests is
//! in [`super::control`] and [`super::events`].

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::Instant;

use nvme_driver::transport::Armed;

use super::control::{ControlConfig, TaskManager};
use super::events::{EventConfig, Herald};
use super::{LaneId, State, max_segments};
use crate::datapath::signal::Signal;
use crate::stats::{QueueCounters, SharedCounters, StageTimes};
use crate::virtio::chain::Chain;
use crate::virtio::memory::GuestMemory;
use crate::virtio::virtqueue::{HeadIndex, Virtqueue};

/// What the lanes of both are made of.
#[derive(Debug)]
pub struct SideConfig {
    /// Its name.
    pub id: LaneId,
    /// The ring, complete.
    pub queue: Virtqueue,
    /// The guest's memory; the lane keeps it mapped.
    pub memory: Arc<GuestMemory>,
    /// The call eventfd.
    pub call: Arc<Signal>,
    /// The error eventfd.
    pub error: Arc<Signal>,
    /// The kick eventfd, for a reactor that sleeps. Without it the ring can only be looked at.
    pub kick: Option<OwnedFd>,
    /// Where others read this virtqueue's counters.
    pub shared: Arc<SharedCounters>,
}

/// A ring, and the request that was taken from it last.
#[derive(Debug)]
pub(super) struct SideRing {
    id: LaneId,
    pub(super) queue: Virtqueue,
    pub(super) chain: Chain,
    pub(super) counters: QueueCounters,
    state: State,
    memory: Arc<GuestMemory>,
    call: Arc<Signal>,
    error: Arc<Signal>,
    kick: Option<OwnedFd>,
    shared: Arc<SharedCounters>,
}

impl SideRing {
    fn new(config: SideConfig) -> SideRing {
        let mut queue = config.queue;
        queue.request_signal();
        queue.suppress_kicks();
        SideRing {
            id: config.id,
            chain: Chain::new(max_segments(queue.size())),
            queue,
            counters: config.shared.snapshot(),
            state: State::Running,
            memory: config.memory,
            call: config.call,
            error: config.error,
            kick: config.kick,
            shared: config.shared,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        self.state == State::Running
    }

    /// At a glance.
    #[inline]
    pub(super) fn has_request(&self) -> bool {
        self.is_running() && self.queue.has_request()
    }

    /// Takes the next request, if there is one.
    pub(super) fn pop(&mut self) -> bool {
        if !self.is_running() {
            return false;
        }
        let taken = match self.queue.available() {
            Ok(0) => Ok(false),
            Ok(_) => self.queue.pop(&self.memory, &mut self.chain),
            Err(error) => Err(error),
        };
        taken.unwrap_or_else(|_| {
            self.break_ring();
            false
        })
    }

    /// A request that cannot be answered goes back with nothing written.
    pub(super) fn give_back_malformed(&mut self, head: HeadIndex) {
        self.counters.malformed += 1;
        self.queue.push_used(head, 0);
    }

    fn break_ring(&mut self) {
        self.state = State::Broken;
        self.counters.malformed += 1;
        self.error.signal();
    }

    /// The poller wants to sleep, and this ring is waited for.
    fn arm(&mut self) -> Armed {
        match self.queue.request_kicks() {
            Ok(true) => Armed::Pending,
            Ok(false) if self.kick.is_none() => Armed::Never,
            Ok(false) => Armed::Yes,
            Err(_) => {
                self.break_ring();
                Armed::Yes
            }
        }
    }
}

/// One of the two in service.
#[derive(Debug)]
pub(in crate::datapath) struct SideLane {
    ring: SideRing,
    duty: Duty,
}

#[derive(Debug)]
enum Duty {
    Control(Box<TaskManager>),
    Events(Herald),
}

impl SideLane {
    pub(super) fn control(config: ControlConfig) -> SideLane {
        let ControlConfig {
            side,
            nexus,
            barrier,
            lanes,
        } = config;
        SideLane {
            ring: SideRing::new(side),
            duty: Duty::Control(Box::new(TaskManager::new(nexus, barrier, lanes))),
        }
    }

    pub(super) fn events(config: EventConfig) -> SideLane {
        SideLane {
            ring: SideRing::new(config.side),
            duty: Duty::Events(Herald::new(config.events, config.wanted)),
        }
    }

    pub(super) fn id(&self) -> LaneId {
        self.ring.id
    }

    pub(super) fn base(&self) -> u32 {
        self.ring.queue.base()
    }

    pub(super) fn drain(&mut self) {
        self.ring.state = State::Draining;
    }

    pub(super) fn is_draining(&self) -> bool {
        self.ring.state == State::Draining
    }

    pub(super) fn is_drained(&self) -> bool {
        self.is_draining() && self.ring.queue.in_flight() == 0
    }

    pub(super) fn counters_mut(&mut self) -> &mut QueueCounters {
        &mut self.ring.counters
    }

    pub(super) fn publish_counters(&self) {
        self.ring.shared.publish(&self.ring.counters);
    }

    #[inline]
    pub(super) fn wants(&self) -> bool {
        match &self.duty {
            Duty::Control(manager) => manager.wants(&self.ring),
            Duty::Events(herald) => herald.wants(&self.ring),
        }
    }

    #[cold]
    pub(super) fn fetch(&mut self) -> bool {
        match &mut self.duty {
            Duty::Control(manager) => manager.fetch(&mut self.ring),
            Duty::Events(herald) => herald.fetch(&mut self.ring),
        }
    }

    pub(super) fn kick(&self) -> Option<BorrowedFd<'_>> {
        self.ring.kick.as_ref().map(AsFd::as_fd)
    }

    pub(super) fn replace_kick(&mut self, kick: Option<OwnedFd>) -> Option<OwnedFd> {
        std::mem::replace(&mut self.ring.kick, kick)
    }

    /// What wakes its poller beside a kick.
    pub(super) fn waker(&self) -> Option<BorrowedFd<'_>> {
        match &self.duty {
            Duty::Control(_) => None,
            Duty::Events(herald) => Some(herald.waker()),
        }
    }

    pub(super) fn arm(&mut self) -> Armed {
        let (pending, waits) = match &self.duty {
            Duty::Control(manager) => (manager.waits(), true),
            Duty::Events(herald) => (herald.wants(&self.ring), herald.waits_for_buffer()),
        };
        match (pending, self.ring.is_running() && waits) {
            (true, _) => Armed::Pending,
            (false, true) => self.ring.arm(),
            (false, false) => Armed::Yes,
        }
    }

    pub(super) fn disarm(&mut self) {
        self.ring.queue.suppress_kicks();
    }

    pub(super) fn publish(&mut self) {
        let ring = &mut self.ring;
        ring.queue.publish_used();
        if ring.queue.needs_signal() && ring.call.signal() {
            ring.counters.notifications += 1;
        }
    }

    /// It has no commands that would be timed.
    pub(super) fn publish_timed(&mut self) -> (Instant, Option<Instant>) {
        self.publish();
        (Instant::now(), None)
    }

    pub(super) fn stages(&self) -> &StageTimes {
        &self.ring.shared.stages
    }
}
