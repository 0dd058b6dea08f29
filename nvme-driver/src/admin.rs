//! The admin queue: submit one command and wait for its answer with a deadline. Used by the control thread only,
//! never by a reactor. Asynchronous events that arrive meanwhile are kept for [`AdminQueue::take_event`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use zerocopy::little_endian::{U16, U64};

use crate::dma::{DmaSpace, Iova};
use crate::error::{Error, Result};
use crate::queue_pair::ring::{CompletionRing, SubmissionRing};
use crate::queue_pair::slots::Slots;
use crate::spec::{AsyncEvent, Cid, Csts, Status, SubmissionEntry, offset};
use crate::transport::{QueuePort, Transport};

/// Entries of the admin queues: more than the driver ever has outstanding, at most the 4096 that AQA holds.
pub(crate) const ADMIN_ENTRIES: u16 = 32;

/// How long two looks at the completion queue are apart.
const POLL_INTERVAL: Duration = Duration::from_micros(50);

/// How an admin command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AdminCompletion {
    /// The controller's answer.
    pub status: Status,
    /// Dword 0 of the completion; what it means depends on the command.
    pub dw0: u32,
}

/// The admin submission and completion queue of one controller.
#[derive(Debug)]
pub(crate) struct AdminQueue<T: Transport> {
    port: T::Port,
    sq: SubmissionRing,
    cq: CompletionRing,
    slots: Slots,
    /// CIDs of outstanding Asynchronous Event Requests.
    event_requests: Vec<Cid>,
    events: VecDeque<AsyncEvent>,
    anomalies: u64,
}

impl<T: Transport> AdminQueue<T> {
    pub(crate) fn new(space: &Arc<DmaSpace>, port: T::Port) -> Result<AdminQueue<T>> {
        Ok(AdminQueue {
            port,
            sq: SubmissionRing::new(space, ADMIN_ENTRIES)?,
            cq: CompletionRing::new(space, ADMIN_ENTRIES)?,
            slots: Slots::new(ADMIN_ENTRIES - 1),
            event_requests: Vec::new(),
            events: VecDeque::new(),
            anomalies: 0,
        })
    }

    /// Addresses for ASQ and ACQ.
    pub(crate) fn ring_addresses(&self) -> (Iova, Iova) {
        (self.sq.iova(), self.cq.iova())
    }

    /// The controller was not proven stopped: its queues stay where they are.
    pub(crate) fn leak(&mut self) {
        self.sq.leak();
        self.cq.leak();
    }

    /// Runs one command that has to succeed, and whose data, if any, lies in the page at `data`. Returns dword 0 of the
    /// completion.
    pub(crate) fn execute(
        &mut self,
        transport: &mut T,
        doing: &'static str,
        mut entry: SubmissionEntry,
        data: Option<Iova>,
        deadline: Duration,
    ) -> Result<u32> {
        entry.prp1 = U64::new(data.map_or(0, |iova| iova.0));
        let AdminCompletion { status, dw0 } = self.run(transport, doing, entry, deadline)?;
        if status.is_success() {
            return Ok(dw0);
        }
        Err(Error::Command {
            device: transport.name(),
            doing,
            status,
        })
    }

    /// Runs one command as it stands, and waits for whatever answer it gets.
    pub(crate) fn run(
        &mut self,
        transport: &mut T,
        doing: &'static str,
        entry: SubmissionEntry,
        deadline: Duration,
    ) -> Result<AdminCompletion> {
        let cid = self.submit(transport, doing, entry)?;
        let mut waited = Duration::ZERO;
        loop {
            self.port.service();
            // More than the queue holds would be a device that posts without end: the deadline is looked at in between.
            for _ in 0..ADMIN_ENTRIES {
                let Some((completed, status, dw0)) = self.next_completion() else {
                    break;
                };
                if completed == cid {
                    return Ok(AdminCompletion { status, dw0 });
                }
                self.note_event(completed, status, dw0);
            }
            let csts = Csts(transport.read32(offset::CSTS));
            if csts.is_removed() {
                return Err(Error::Removed {
                    device: transport.name(),
                });
            }
            if csts.is_fatal() {
                return Err(Error::Fatal {
                    device: transport.name(),
                    doing,
                });
            }
            if waited >= deadline {
                return Err(Error::Timeout {
                    device: transport.name(),
                    doing,
                    waited,
                });
            }
            transport.pause(POLL_INTERVAL);
            waited += POLL_INTERVAL;
        }
    }

    /// Posts Asynchronous Event Requests until `wanted` are outstanding.
    pub(crate) fn arm_events(&mut self, transport: &mut T, wanted: usize) -> Result<()> {
        while self.event_requests.len() < wanted {
            let cid = self.submit(
                transport,
                "requesting asynchronous events",
                SubmissionEntry::async_event_request(),
            )?;
            self.event_requests.push(cid);
        }
        Ok(())
    }

    /// The oldest event that has arrived and was not taken yet.
    pub(crate) fn take_event(&mut self) -> Option<AsyncEvent> {
        self.port.service();
        for _ in 0..ADMIN_ENTRIES {
            let Some((cid, status, dw0)) = self.next_completion() else {
                break;
            };
            self.note_event(cid, status, dw0);
        }
        self.events.pop_front()
    }

    fn submit(
        &mut self,
        transport: &mut T,
        doing: &'static str,
        mut entry: SubmissionEntry,
    ) -> Result<Cid> {
        // Commands that timed out keep their slots: when none is left, only a reset helps. As many entries as slots: the
        // queue has room while a slot is free.
        let cid = self.slots.take().filter(|_| self.sq.room() > 0);
        let cid = cid.ok_or_else(|| Error::Fatal {
            device: transport.name(),
            doing,
        })?;
        entry.cid = U16::new(cid.0);
        self.sq.push(entry.words());
        self.sq.publish();
        self.port.ring_sq(self.sq.tail());
        Ok(cid)
    }

    fn next_completion(&mut self) -> Option<(Cid, Status, u32)> {
        let entry = self.cq.pop()?;
        self.port.ring_cq(self.cq.head());
        let cid = Cid(entry.cid.get());
        let plausible = self.sq.advance_head(entry.sqhd.get());
        if !self.slots.release(cid) || !plausible {
            self.anomalies += 1;
            tracing::warn!(
                cid = cid.0,
                sqhd = entry.sqhd.get(),
                "impossible admin completion"
            );
        }
        Some((
            cid,
            Status::from_wire(entry.phase_and_status.get()),
            entry.dw0.get(),
        ))
    }

    /// A completion that nobody waits for: an event, or the late answer to a command that timed out.
    fn note_event(&mut self, cid: Cid, status: Status, dw0: u32) {
        if let Some(i) = self
            .event_requests
            .iter()
            .position(|request| *request == cid)
        {
            self.event_requests.swap_remove(i);
            if status.is_success() {
                self.events.push_back(AsyncEvent(dw0));
            } else {
                tracing::warn!(%status, "asynchronous event request ended");
            }
        }
    }
}
