//! A poller owns one NVMe queue pair and serves the lanes that ride with it: one, when the device has queue pairs
//! enough, or several of the same reactor. It belongs to one reactor (I7) and comes back by value at the end.
//!
//! One turn: completions first (they free slots), then submissions, one doorbell, then the guests' used rings and at
//! most one signal each.

use std::any::Any;
use std::sync::Arc;

use nvme_driver::dma::{DmaError, DmaSpace};
use nvme_driver::transport::Transport;
use nvme_driver::{Completion, QueuePair};

use super::bounce::BouncePool;
use super::lane::{CommandContext, Lane, LaneId, Pair, max_segments};
use crate::virtio::virtqueue::{HeadIndex, MAX_QUEUE_SIZE};

/// Completions that one turn takes from the completion queue.
const POLL_BUDGET: usize = 64;
/// A lane's counters are shown to others every so many turns.
const PUBLISH_INTERVAL: u64 = 1024;

/// What a reactor drives: one turn at a time, whatever the transport. The one virtual call of a turn is here.
pub trait Poll: Send {
    /// One turn. `true` when there was anything to do.
    fn turn(&mut self) -> bool;
    /// Takes a lane into service.
    fn attach(&mut self, lane: Box<Lane>);
    /// Lets a lane drain. `false` when it is not here.
    fn detach(&mut self, lane: LaneId) -> bool;
    /// A lane that has drained since, if any: nothing names its memory any more.
    fn take_drained(&mut self) -> Option<Box<Lane>>;
    /// Lanes here, draining ones included.
    fn lanes(&self) -> usize;
    /// The poller by value, for its maker.
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
}

/// One queue pair and its lanes.
#[derive(Debug)]
pub struct Poller<T: Transport> {
    pair: Pair<T>,
    /// Lanes at fixed places: a command's context names one.
    lanes: Vec<Option<Box<Lane>>>,
    lane_count: usize,
    draining: usize,
    turns: u64,
}

impl<T: Transport> Poller<T> {
    /// A poller without lanes. `space` is the device's.
    ///
    /// # Errors
    /// When there is no memory for bounce buffers; the queue pair is lost then (its memory is leaked, and says so).
    pub fn new(queue: QueuePair<T>, space: &Arc<DmaSpace>) -> Result<Poller<T>, DmaError> {
        let idle = CommandContext::Part {
            lane: 0,
            head: HeadIndex::default(),
            bounce: None,
        };
        let commands = vec![idle; usize::from(queue.depth())].into_boxed_slice();
        let bounce = BouncePool::new(space, max_segments(MAX_QUEUE_SIZE))?;
        Ok(Poller {
            pair: Pair {
                queue,
                commands,
                bounce,
            },
            lanes: Vec::with_capacity(64),
            lane_count: 0,
            draining: 0,
            turns: 0,
        })
    }

    /// The queue pair, for its controller to delete.
    #[must_use]
    pub fn into_queue_pair(self) -> QueuePair<T> {
        self.pair.queue
    }

    #[inline]
    fn complete(&mut self, completion: Completion) {
        let context = self.pair.commands[completion.cid.index()];
        let success = completion.status.is_success();
        // The lane is here: it does not leave before its last command has completed.
        match context {
            CommandContext::Whole {
                lane,
                head,
                data_in,
                status,
            } => {
                if let Some(Some(lane)) = self.lanes.get_mut(usize::from(lane)) {
                    lane.request_done(head, status, data_in, success);
                }
            }
            CommandContext::Part { lane, head, bounce } => {
                if let Some(chunk) = bounce {
                    if success {
                        self.pair.bounce.scatter(chunk);
                    }
                    self.pair.bounce.release(chunk);
                }
                if let Some(Some(lane)) = self.lanes.get_mut(usize::from(lane)) {
                    lane.command_done(head, success);
                }
            }
        }
    }
}

impl<T: Transport + 'static> Poll for Poller<T> {
    fn turn(&mut self) -> bool {
        let mut busy = false;
        self.pair.queue.service();
        for _ in 0..POLL_BUDGET {
            let Some(completion) = self.pair.queue.poll() else {
                break;
            };
            busy = true;
            self.complete(completion);
        }
        self.turns += 1;
        let show = self.turns.is_multiple_of(PUBLISH_INTERVAL);
        let before = self.pair.queue.counters();
        for lane in self.lanes.iter_mut().flatten() {
            let commands = lane.counters_mut().commands;
            let fetched = lane.fetch(&mut self.pair);
            let counters = lane.counters_mut();
            counters.polls += 1;
            if counters.commands != commands {
                // Lanes that share a queue pair share its doorbells too: each is told of every one it caused.
                counters.sq_doorbells += 1;
            }
            if !fetched && !busy {
                counters.idle_polls += 1;
            }
            busy |= fetched;
            if show {
                lane.publish_counters();
            }
        }
        if busy {
            self.pair.queue.ring();
            let heads = self.pair.queue.counters().cq_doorbells - before.cq_doorbells;
            for (i, lane) in self.lanes.iter_mut().flatten().enumerate() {
                if i == 0 {
                    lane.counters_mut().cq_doorbells += heads;
                }
                lane.publish();
            }
        }
        busy
    }

    fn attach(&mut self, mut lane: Box<Lane>) {
        let place = self
            .lanes
            .iter()
            .position(Option::is_none)
            .unwrap_or_else(|| {
                self.lanes.push(None);
                self.lanes.len() - 1
            });
        // A process has far fewer than 65536 lanes on one queue pair: each needs two descriptors of its own.
        lane.set_slot(u16::try_from(place).unwrap_or(u16::MAX));
        lane.publish();
        self.lanes[place] = Some(lane);
        self.lane_count += 1;
    }

    fn detach(&mut self, id: LaneId) -> bool {
        let found = self.lanes.iter_mut().flatten().find(|lane| lane.id() == id);
        if let Some(lane) = found {
            lane.drain();
            self.draining += 1;
            return true;
        }
        false
    }

    #[inline]
    fn take_drained(&mut self) -> Option<Box<Lane>> {
        if self.draining == 0 {
            return None;
        }
        let drained =
            |lane: &Option<Box<Lane>>| lane.as_ref().is_some_and(|lane| lane.is_drained());
        let place = self.lanes.iter().position(drained)?;
        let mut lane = self.lanes[place].take()?;
        self.draining -= 1;
        self.lane_count -= 1;
        lane.publish();
        lane.publish_counters();
        Some(lane)
    }

    fn lanes(&self) -> usize {
        self.lane_count
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}
