//! Targets that cannot all be there at once: two of one socket, whose server takes one front-end at a time, and servers
//! that would disturb each other's measurement.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};

use super::engine::{Live, Shot};
use super::target::{Info, Measured, Target};

/// How long a server may take to see that a front-end has gone, or to stop.
const PATIENCE: Duration = Duration::from_secs(5);

type Open = Box<dyn Fn() -> anyhow::Result<Box<dyn Target>>>;

/// A target that is opened for each measurement and closed after it, out of the measured time.
pub struct Reopened {
    info: Info,
    open: Open,
}

impl Reopened {
    /// Opens it once, to see that it is there.
    ///
    /// # Errors
    /// As `open` says.
    pub fn new(open: Open) -> anyhow::Result<Reopened> {
        let target = patiently(&open)?;
        let info = target.info().clone();
        target.close()?;
        Ok(Reopened { info, open })
    }
}

/// The one before may have to be let go of first.
fn patiently(open: &Open) -> anyhow::Result<Box<dyn Target>> {
    let start = Instant::now();
    loop {
        match open() {
            Err(_) if start.elapsed() < PATIENCE => std::thread::sleep(Duration::from_millis(20)),
            result => return result,
        }
    }
}

impl Target for Reopened {
    fn info(&self) -> &Info {
        &self.info
    }

    fn measure(
        &mut self,
        shot: &Shot<'_>,
        watch: &mut dyn FnMut(Duration, &Live),
    ) -> anyhow::Result<Measured> {
        let mut target = patiently(&self.open)?;
        let measured = target.measure(shot, watch);
        let closed = target.close();
        let measured = measured?;
        closed?;
        Ok(measured)
    }

    fn close(self: Box<Self>) -> anyhow::Result<()> {
        Ok(())
    }
}

/// Servers that stand still (SIGSTOP) but for the one that is measured. All go on when this is dropped.
#[derive(Debug, Default)]
pub struct Parking {
    servers: BTreeSet<u32>,
    stopped: BTreeSet<u32>,
}

impl Parking {
    /// # Errors
    /// When a target has no process that could be stopped.
    pub fn of<'a>(infos: impl Iterator<Item = &'a Info>) -> anyhow::Result<Parking> {
        let mut parking = Parking::default();
        for info in infos {
            let Some(server) = info.server.filter(|pid| *pid > 1) else {
                bail!(
                    "--park: it is not known which process serves {}: name it, as in {},pid=1234, or leave --park out",
                    info.name,
                    info.name
                );
            };
            parking.servers.insert(server);
        }
        Ok(parking)
    }

    /// Lets `server` go on, and nobody else.
    ///
    /// # Errors
    /// When one of them is gone or not ours.
    pub fn admit(&mut self, server: Option<u32>) -> anyhow::Result<()> {
        let others: Vec<u32> = self
            .servers
            .iter()
            .copied()
            .filter(|pid| Some(*pid) != server && !self.stopped.contains(pid))
            .collect();
        for pid in others {
            signal(pid, Signal::STOP)
                .with_context(|| format!("--park: cannot stop process {pid}"))?;
            self.stopped.insert(pid);
            let start = Instant::now();
            while !is_stopped(pid) {
                if start.elapsed() > PATIENCE {
                    bail!("--park: process {pid} does not stop");
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        if let Some(pid) = server.filter(|pid| self.stopped.remove(pid)) {
            signal(pid, Signal::CONT).with_context(|| format!("--park: process {pid} is gone"))?;
        }
        Ok(())
    }

    /// Lets all of them go on.
    pub fn open(&mut self) {
        for pid in std::mem::take(&mut self.stopped) {
            // One that is gone needs nothing.
            let _ = signal(pid, Signal::CONT);
        }
    }
}

impl Drop for Parking {
    fn drop(&mut self) {
        self.open();
    }
}

fn signal(pid: u32, signal: Signal) -> anyhow::Result<()> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    Ok(kill_process(pid.context("no process")?, signal)?)
}

/// proc_pid_stat(5): the third field, behind a name that may contain anything. One that is gone stands still as well.
fn is_stopped(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_none_or(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn info(server: Option<u32>) -> Info {
        Info {
            name: "vm0.sock".to_owned(),
            description: String::new(),
            capacity: 1 << 20,
            block: 512,
            server,
            ring: None,
            stages: None,
            doorbells: "kicks",
        }
    }

    #[test]
    fn all_but_the_admitted_stand_still_and_all_go_on_at_the_end() {
        let mut children = [0, 1].map(|_| Command::new("sleep").arg("60").spawn().unwrap());
        let pids = [children[0].id(), children[1].id()];
        let infos = pids.map(|pid| info(Some(pid)));
        let mut parking = Parking::of(infos.iter()).unwrap();
        let wait_for = |wanted: [bool; 2]| {
            let start = Instant::now();
            while pids.map(is_stopped) != wanted {
                assert!(start.elapsed() < PATIENCE, "{:?}", pids.map(is_stopped));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        parking.admit(Some(pids[0])).unwrap();
        wait_for([false, true]);
        parking.admit(Some(pids[1])).unwrap();
        wait_for([true, false]);
        parking.admit(None).unwrap();
        wait_for([true, true]);
        drop(parking);
        wait_for([false, false]);
        for child in &mut children {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn target_without_a_process_of_its_own_is_refused_by_name() {
        for server in [None, Some(1)] {
            let error = Parking::of([info(server)].iter()).unwrap_err().to_string();
            assert!(error.contains("vm0.sock,pid=1234"), "{error}");
        }
    }
}
