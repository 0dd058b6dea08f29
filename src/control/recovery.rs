//! What happens to a device after it was claimed: it is looked at twice a second, reset when it is broken, given up when
//! it is gone or the system wants it back, and taken again when it returns.
//!
//! ```text
//!  Serving --broken--> all pollers on loan, reset, queue pairs created anew, what was outstanding sent again --> Serving
//!     |                     | it does not come up, or broke three times in a minute
//!     +--gone, wanted--> Lost: pollers fail requests or hold them (on_device_loss) --it is back--> Serving
//! ```
//! Pollers move here by value while something is done to their queue pairs, so no reactor ever waits: the guests' other
//! disks go on. Nobody is told that a request failed before the device is known to reach no memory any more.

use std::sync::Arc;
use std::time::{Duration, Instant};

use nvme_driver::Error;
use nvme_driver::spec::Nsid;

use super::device::{Condition, Device, DeviceError, Pollers};
use super::resize::Sizes;
use crate::config::OnDeviceLoss;
use crate::datapath::{PairHealth, Service};
use crate::reactor::{PollerId, ReactorHandle};

/// Resets of one device within [`RESET_WINDOW`] before it is given up.
const MAX_RESETS: usize = 3;
const RESET_WINDOW: Duration = Duration::from_secs(60);
/// A device that does not answer is looked at so often again before it is given up, so far apart.
const GONE_LOOKS: u32 = 10;
const GONE_INTERVAL: Duration = Duration::from_millis(100);
/// How often a device is asked for its health: what LOG SENSE says of it is no older, while the device serves.
const HEALTH_INTERVAL: Duration = Duration::from_secs(60);
/// Completions that make no sense, before the controller is reset.
const MAX_ANOMALIES: u64 = 8;

/// How long commands may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Patience {
    /// One that the device has had for so long is to be aborted.
    pub command: Duration,
    /// How long that may take before the controller is reset.
    pub abort: Duration,
}

impl Default for Patience {
    /// Longer than the slowest thing that a healthy SSD does to a command, as Linux's driver gives it too.
    fn default() -> Patience {
        Patience {
            command: Duration::from_secs(30),
            abort: Duration::from_secs(5),
        }
    }
}

/// One of a device's pollers.
#[derive(Clone, Debug)]
pub struct Place {
    /// The reactor that has it.
    pub reactor: ReactorHandle,
    /// Its name there.
    pub id: PollerId,
    /// Identifier of its queue pair on the controller.
    pub pair: u16,
    /// How it is.
    pub health: Arc<PairHealth>,
}

/// Sends an Abort for each command of a queue pair whose end is asked for, and waits for its answer.
///
/// # Errors
/// When the controller does not answer: the commands after that are still to be aborted, and that one cannot be used again.
pub fn abort_commands(device: &Device, pair: u16, health: &PairHealth) -> Result<(), DeviceError> {
    let aborts = health.aborts();
    for cid in aborts.asked() {
        match device.with_control(|control| control.abort(pair, cid)) {
            // Refused is answered, too. A command that was not aborted ends by itself.
            Ok(_) | Err(DeviceError::Driver(Error::Command { .. })) => {
                aborts.answer(cid);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Looks after one device.
#[derive(Debug)]
pub struct Keeper {
    device: Arc<Device>,
    on_loss: OnDeviceLoss,
    places: Vec<Place>,
    patience: Patience,
    /// Of the last minute.
    resets: Vec<Instant>,
    total_resets: u64,
    lost: bool,
    /// What regaining it failed with last: told once.
    refusal: String,
    /// When an abort was asked for.
    aborting: Option<Instant>,
    /// Anomalies that were dealt with.
    anomalies: u64,
    /// When the device was asked for its health.
    asked: Option<Instant>,
    /// Who is told of namespaces with other sizes, and the device's index there.
    sizes: Option<(Arc<Sizes>, usize)>,
}

impl Keeper {
    /// A keeper of a device that serves.
    #[must_use]
    pub fn new(
        device: Arc<Device>,
        on_loss: OnDeviceLoss,
        places: Vec<Place>,
        patience: Patience,
    ) -> Keeper {
        for place in &places {
            place.health.aborts().set_bell(device.bell());
        }
        Keeper {
            patience,
            device,
            on_loss,
            places,
            resets: Vec::new(),
            total_resets: 0,
            lost: false,
            refusal: String::new(),
            aborting: None,
            anomalies: 0,
            asked: None,
            sizes: None,
        }
    }

    /// Whoever has a namespace of device `index` follows its size.
    #[must_use]
    pub(super) fn with_sizes(self, sizes: Arc<Sizes>, index: usize) -> Keeper {
        let sizes = Some((sizes, index));
        Keeper { sizes, ..self }
    }

    /// Asks the controller for the end of commands that guests want to end. It does that one after the other, and one is
    /// within any limit (ACL).
    pub fn abort_commands(&mut self) {
        let mut failed = None;
        for place in &self.places {
            let outcome = abort_commands(&self.device, place.pair, &place.health);
            failed = failed.or(outcome.err());
        }
        match failed {
            None => {}
            // It has none to end.
            Some(_) if self.lost => {}
            Some(DeviceError::Driver(Error::Removed { .. } | Error::Fatal { .. })) => self.look(),
            // Without an answer nobody knows which command it will end.
            Some(error) => self.recover(&format!("a command could not be aborted: {error}")),
        }
    }

    /// One look, and what follows from it.
    pub fn look(&mut self) {
        let device = Arc::clone(&self.device);
        match device.with_control(|control| Ok(control.look())) {
            Ok(Condition::Ready) => {
                self.look_at_health();
                self.look_at_commands();
            }
            Ok(Condition::Event(event)) => {
                tracing::warn!(device = %device.name, event, "asynchronous event");
                // It may be about its health.
                self.asked = None;
            }
            Ok(Condition::Namespaces(which)) => self.follow(&which),
            Ok(Condition::Broken(reason)) => self.recover(&reason),
            Ok(Condition::Wanted) => self.give_up("the system wants it back", true),
            Ok(Condition::Gone(reason)) => self.believe_gone(&reason),
            Ok(Condition::GivenUp) => self.regain(),
            // The server ends.
            Err(_) => {}
        }
    }

    /// Namespaces may have other sizes.
    fn follow(&mut self, which: &[Nsid]) {
        let Some((sizes, index)) = &self.sizes else {
            return;
        };
        if let Err(error) = sizes.follow(*index, which) {
            // If it is broken or gone, the next look finds that, and namespaces are looked at when it is up again.
            tracing::warn!(device = %self.device.name, %error, "cannot identify its namespaces anew");
        }
    }

    fn look_at_health(&mut self) {
        if self.asked.is_some_and(|at| at.elapsed() < HEALTH_INTERVAL) {
            return;
        }
        self.asked = Some(Instant::now());
        if let Err(error) = self.device.ask_for_health() {
            tracing::warn!(device = %self.device.name, %error, "cannot read its SMART log");
        }
    }

    /// A device that somebody else resets at this moment looks as if it were gone.
    fn believe_gone(&mut self, reason: &str) {
        let device = Arc::clone(&self.device);
        for _ in 0..GONE_LOOKS {
            std::thread::sleep(GONE_INTERVAL);
            match device.with_control(|control| Ok(control.look())) {
                Ok(Condition::Gone(_)) => {}
                Ok(Condition::Broken(reason)) => return self.recover(&reason),
                _ => return self.recover("it did not answer for a while"),
            }
        }
        self.give_up(reason, false);
    }

    /// Commands that take too long, and completions that make no sense.
    fn look_at_commands(&mut self) {
        let anomalies: u64 = self
            .places
            .iter()
            .map(|place| place.health.anomalies())
            .sum();
        if anomalies.saturating_sub(self.anomalies) >= MAX_ANOMALIES {
            self.anomalies = anomalies;
            return self.recover("it has completed commands that nobody sent");
        }
        let late = self
            .places
            .iter()
            .map(|place| (place.health.oldest(), place.pair));
        let late = late.max_by_key(|((_, age), _)| *age);
        let Some(((cid, age), pair)) = late.filter(|((_, age), _)| *age >= self.patience.command)
        else {
            self.aborting = None;
            return;
        };
        match self.aborting {
            None => {
                tracing::warn!(
                    device = %self.device.name, pair, cid = cid.0, ?age, "a command takes too long: asking for its end"
                );
                self.aborting = Some(Instant::now());
                let aborted = self.device.with_control(|control| control.abort(pair, cid));
                if let Err(error) = aborted {
                    self.recover(&format!(
                        "a command took {age:?}, and it could not be aborted: {error}"
                    ));
                }
            }
            Some(since) if since.elapsed() >= self.patience.abort => {
                self.recover(&format!("a command has taken {age:?} and was not aborted"));
            }
            Some(_) => {}
        }
    }

    /// Every poller of the device, from its reactor, and the places that they are to go back to.
    fn borrow(&self) -> (Vec<Place>, Pollers) {
        let waiting: Vec<_> = self
            .places
            .iter()
            .map(|place| place.reactor.lend(place.id))
            .collect();
        let lent = self.places.iter().cloned().zip(waiting);
        // A reactor answers after a few turns; one that does not has ended, and its pollers with it.
        lent.filter_map(|(place, poller)| Some((place, poller.recv().ok()?)))
            .unzip()
    }

    fn give_back(places: Vec<Place>, pollers: Pollers) {
        for (place, poller) in places.into_iter().zip(pollers) {
            place.reactor.adopt(place.id, poller);
        }
    }

    fn recover(&mut self, reason: &str) {
        self.aborting = None;
        let name = &self.device.name;
        self.resets.retain(|at| at.elapsed() < RESET_WINDOW);
        if self.resets.len() >= MAX_RESETS {
            return self.give_up(
                &format!("{reason}, and {MAX_RESETS} resets did not help"),
                false,
            );
        }
        self.resets.push(Instant::now());
        self.total_resets += 1;
        tracing::warn!(device = %name, reason, "resetting the controller");
        let start = Instant::now();
        let (places, mut pollers) = self.borrow();
        let result = self
            .device
            .with_control(|control| control.recover(&mut pollers));
        match result {
            Ok(()) => {
                tracing::warn!(device = %name, after = ?start.elapsed(), "the controller is up again: requests go on");
                Keeper::give_back(places, pollers);
                self.follow(&[Nsid::ALL]);
            }
            Err(error) => self.finish_loss(
                places,
                pollers,
                &format!("it did not come up after a reset: {error}"),
                false,
            ),
        }
    }

    fn give_up(&mut self, reason: &str, orderly: bool) {
        let (places, pollers) = self.borrow();
        self.finish_loss(places, pollers, reason, orderly);
    }

    fn finish_loss(
        &mut self,
        places: Vec<Place>,
        mut pollers: Pollers,
        reason: &str,
        orderly: bool,
    ) {
        let service = self.service();
        let then = match service {
            Service::Fail => "requests fail",
            Service::Hold | Service::Serve => "requests wait",
        };
        let name = &self.device.name;
        let given_up = self.device.with_control(|control| {
            control.give_up(&mut pollers, orderly, service);
            Ok(())
        });
        if given_up.is_ok() {
            tracing::error!(device = %name, reason, "device lost: {then} until it is back");
        }
        self.lost = true;
        Keeper::give_back(places, pollers);
    }

    /// What the pollers do without the device.
    fn service(&self) -> Service {
        match self.on_loss {
            OnDeviceLoss::Error => Service::Fail,
            OnDeviceLoss::Hold => Service::Hold,
        }
    }

    /// It may be back.
    fn regain(&mut self) {
        let (places, mut pollers) = self.borrow();
        let result = self
            .device
            .with_control(|control| control.regain(&mut pollers));
        if result.is_err() {
            let service = self.service();
            pollers
                .iter_mut()
                .for_each(|poller| poller.suspend(service));
        }
        Keeper::give_back(places, pollers);
        match result {
            Ok(()) => {
                tracing::warn!(device = %self.device.name, "device is back: requests go on");
                self.lost = false;
                self.refusal.clear();
                self.follow(&[Nsid::ALL]);
            }
            Err(error) => self.note_refusal(&error),
        }
    }

    fn note_refusal(&mut self, error: &DeviceError) {
        let error = error.to_string();
        if error != self.refusal {
            tracing::info!(device = %self.device.name, error, "waiting for the device");
            self.refusal = error;
        }
    }

    /// One line for the server's report.
    #[must_use]
    pub fn report(&self) -> String {
        let sum = |count: fn(&PairHealth) -> u64| -> u64 {
            self.places.iter().map(|place| count(&place.health)).sum()
        };
        format!(
            "device {}: {}, resets {}, commands sent again {}, completions without a command {}\n",
            self.device.name,
            if self.lost { "lost" } else { "serving" },
            self.total_resets,
            sum(PairHealth::resent),
            sum(PairHealth::anomalies),
        )
    }
}
