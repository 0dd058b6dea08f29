//! Where requests spend their time in a server that tells: `--vhost-user SOCKET,stats=PATH` reads `tandem serve --stats PATH`
//! before and after each measurement. The server samples for itself, so being asked costs a measurement nothing.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::stats::{StageCounts, Statistics};

/// How long a server may take to answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// The longest answer: more than 1024 virtqueues need.
const LONGEST: u64 = 64 << 20;

/// A statistics socket, and which of its virtqueues are meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StageSource {
    pub stats: PathBuf,
    /// Where the front-end connects.
    pub socket: PathBuf,
}

impl StageSource {
    /// What the server has counted so far, by virtqueue.
    ///
    /// # Errors
    /// When it does not answer, or serves no such socket.
    pub fn read(&self) -> anyhow::Result<Vec<StageCounts>> {
        let what = || format!("statistics socket {}", self.stats.display());
        let statistics = self.ask().with_context(what)?;
        let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
        let own = real(&self.socket);
        let mut queues: Vec<_> = statistics
            .queues
            .into_iter()
            .filter(|queue| real(Path::new(&queue.socket)) == own)
            .collect();
        ensure!(
            !queues.is_empty(),
            "{}: that server does not serve {}",
            what(),
            self.socket.display()
        );
        queues.sort_by_key(|queue| queue.queue);
        Ok(queues.into_iter().map(|queue| queue.stages).collect())
    }

    fn ask(&self) -> anyhow::Result<Statistics> {
        let stream = UnixStream::connect(&self.stats)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let mut text = String::new();
        stream.take(LONGEST).read_to_string(&mut text)?;
        serde_json::from_str(&text).context("its answer is not what `tandem serve --stats` says")
    }
}

/// By virtqueue, what came on top.
#[must_use]
pub fn since(after: Vec<StageCounts>, before: &[StageCounts]) -> Vec<StageCounts> {
    let nothing = StageCounts::default();
    let before = before.iter().chain(std::iter::repeat(&nothing));
    let pairs = after.into_iter().zip(before);
    pairs.map(|(after, before)| after.since(before)).collect()
}
