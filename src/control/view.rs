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

use super::device::Device;
use super::recovery::Keeper;
use super::server::{Stop, wait_readable};
use super::session::{Export, ExportQueue};
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
        Statistics {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            queues: self.rows().map(|(queue, _)| queue).collect(),
        }
    }

    /// Every virtqueue, once for each of its devices; and whether that is another one than its export's own.
    fn rows(&self) -> impl Iterator<Item = (QueueStatistics, bool)> {
        self.exports.iter().flat_map(|export| {
            let row = |index: usize, device: &Device, queue: &ExportQueue| QueueStatistics {
                socket: export.name.clone(),
                queue: index,
                core: queue.reactor.core(),
                device: device.name.clone(),
                queue_pair: queue.pair,
                counters: queue.counters.snapshot(),
                stages: queue.counters.stages.snapshot(),
            };
            let own = export.queues.iter().enumerate();
            let own = own.map(|(index, queue)| (row(index, &export.device, queue), false));
            let mut rows: Vec<(QueueStatistics, bool)> = own.collect();
            for way in &export.ways {
                let first = export.queues.len() - way.queues.len();
                let queues = (first..).zip(&way.queues);
                rows.extend(queues.map(|(index, queue)| (row(index, &way.device, queue), true)));
            }
            rows
        })
    }

    /// The counters of every virtqueue, and what the software controllers say of themselves.
    pub(super) fn report(&self) -> String {
        let (mut table, mut stages) = (CounterTable::default(), StageTable::default());
        for (one, is_other) in self.rows() {
            let (mut pair, mut queue) = (one.queue_pair.to_string(), one.queue.to_string());
            if is_other {
                pair = format!("{}:{pair}", one.device);
                queue = format!("{queue}>{}", one.device);
            }
            table.push(&one.socket, one.queue, one.core, pair, one.counters);
            stages.push(&one.socket, queue, &one.stages);
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
