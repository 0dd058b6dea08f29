//! What a running server shows of itself: a report for people, and statistics for programs at a socket of their own.
//!
//! A program connects to the statistics socket, reads one JSON document ([`Statistics`]) up to the end of the stream, and
//! is done: nothing is read from it. Counters are what pollers published last, so looking costs them nothing.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nvme_model::ModelHandle;

use super::recovery::Keeper;
use super::server::{Stop, wait_readable};
use super::session::Export;
use super::socket::Listener;
use crate::reactor::ReactorHandle;
use crate::stats::{CounterTable, QueueStatistics, StageTable, Statistics};

/// How long a program may take to read.
const PATIENCE: Duration = Duration::from_secs(1);

/// All that is shown.
#[derive(Debug, Default)]
pub(super) struct View {
    pub(super) exports: Vec<Arc<Export>>,
    /// Of each reactor, also after its end.
    pub(super) handles: Vec<ReactorHandle>,
    /// One for each device.
    pub(super) keepers: Arc<[(String, Mutex<Keeper>)]>,
    pub(super) models: Vec<(String, ModelHandle)>,
}

impl View {
    pub(super) fn statistics(&self) -> Statistics {
        let mut queues = Vec::new();
        for export in &self.exports {
            for (index, queue) in export.queues.iter().enumerate() {
                queues.push(QueueStatistics {
                    socket: export.name.clone(),
                    queue: index,
                    core: queue.reactor.core(),
                    queue_pair: queue.pair,
                    counters: queue.counters.snapshot(),
                    stages: queue.counters.stages.snapshot(),
                });
            }
        }
        Statistics {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            queues,
        }
    }

    /// The counters of every virtqueue, and what the software controllers say of themselves.
    pub(super) fn report(&self) -> String {
        let (mut table, mut stages) = (CounterTable::default(), StageTable::default());
        for one in self.statistics().queues {
            table.push(
                &one.socket,
                one.queue,
                one.core,
                one.queue_pair,
                one.counters,
            );
            stages.push(&one.socket, one.queue, &one.stages);
        }
        let mut report = format!("{table}\n{stages}");
        for handle in &self.handles {
            report.push_str(&format!("core {}: {}\n", handle.core(), handle.stats()));
        }
        for (name, keeper) in self.keepers.iter() {
            report.push_str(&match keeper.try_lock() {
                Ok(keeper) => keeper.report(),
                // Nobody waits here for a controller that comes up.
                Err(_) => format!("device {name}: being reset, or taken again\n"),
            });
        }
        for (name, model) in &self.models {
            report.push_str(&format!(
                "device {name}: iommu violations {}, driver errors {}\n",
                model.iommu_violations(),
                model.driver_errors()
            ));
        }
        report
    }

    fn answer(&self, mut stream: UnixStream) -> std::io::Result<()> {
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut text = serde_json::to_vec(&self.statistics())?;
        text.push(b'\n');
        stream.write_all(&text)
    }
}

/// Answers whoever connects, one after the other, until `stop`.
pub(super) fn show(view: &View, listener: &Listener, stop: &Stop) {
    while wait_readable(listener.socket().as_fd(), Some(stop.event.as_fd()), None) && !stop.is_set()
    {
        let answered = listener
            .socket()
            .accept()
            .and_then(|(stream, _)| view.answer(stream));
        if let Err(error) = answered {
            tracing::warn!(%error, "cannot tell statistics");
            // Out of descriptors, most likely: do not spin.
            std::thread::sleep(Duration::from_millis(100));
        }
    }
}
