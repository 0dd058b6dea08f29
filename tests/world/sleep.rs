//! A reactor that sleeps, in one thread and from a seed: guests that kick when they are asked, and others; a controller
//! that goes on by itself; control threads that take lanes away, reset the device, take it away and bring it back.
//!
//! The reactor's code is all real, down to its eventfds and epoll; what is simulated is time, and with it the moment in
//! which a sleep would block. There the world knows what is left undone. A sleep that nobody ends, while a request waits
//! for nothing but the reactor, is a wake-up that got lost.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam::channel::Receiver;
use nvme_model::{Clock, ModelConfig};
use rustix::event::{EventfdFlags, eventfd};
use tandem::control::device::{DeviceControl, DeviceError, Pollers};
use tandem::datapath::{Lane, Poll, Service, Signal};
use tandem::reactor::{Core, Mode, PollerId, ReactorHandle, Rest, WakeSet, Woken};
use tandem::sim::SimRequest;
use tandem::virtio::blk::{request_type, status};
use tandem::virtio::virtqueue::{self, RingLayout};

use crate::common::rig::{GuestSetup, Rig, RigGuest};
use crate::common::rng::Rng;

/// The longest sleep of a reactor that has to look by itself.
const NAP: Duration = Duration::from_millis(1);
const DATA: u32 = 4096;
/// Rounds in which the controller ends whatever it has.
const CARRY_ON: u32 = 100;

/// What a guest makes of it that it is asked to kick.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Manners {
    Kicks,
    /// Never: its requests wait until something else happens.
    Silent,
    /// Also when nothing is there.
    Storms,
    /// Its front-end gave no kick eventfd.
    Deaf,
}

#[derive(Debug)]
enum Place {
    Served,
    /// Asked back.
    Leaving(Receiver<Lane>),
    /// It broke its ring, and is gone.
    Removed,
}

struct Tenant {
    guest: RigGuest,
    layout: RingLayout,
    manners: Manners,
    kick: OwnedFd,
    in_flight: HashMap<u16, u32>,
    poller: PollerId,
    place: Place,
    broken: bool,
}

impl Tenant {
    fn kick(&self) {
        rustix::io::write(&self.kick, &1_u64.to_ne_bytes()).unwrap();
    }

    /// Its lane's end of the kick eventfd.
    fn kick_of_lane(&self) -> Option<OwnedFd> {
        (self.manners != Manners::Deaf).then(|| self.kick.try_clone().unwrap())
    }

    fn signals_of_lane(&self) -> (Option<OwnedFd>, Arc<Signal>) {
        (self.kick_of_lane(), Arc::new(Signal::new().unwrap()))
    }
}

/// All pollers, on their way to the control thread, and what it will do.
struct Errand {
    pollers: Vec<(PollerId, Receiver<Box<dyn Poll>>)>,
    arrived: Vec<(PollerId, Box<dyn Poll>)>,
    what: What,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Reset,
    TakeAway,
    BringBack,
}

/// Everything but the reactor.
struct Scene {
    rng: Rng,
    rig: Rig,
    handle: ReactorHandle,
    tenants: Vec<Tenant>,
    ids: Vec<PollerId>,
    now: Duration,
    errand: Option<Errand>,
    gone: bool,
    /// Control threads do nothing more, and guests ask for nothing more.
    ending: bool,
    interrupts: bool,
    finished: u64,
    errands: u64,
    trace: Vec<String>,
}

impl Scene {
    fn note(&mut self, line: String) {
        if self.trace.len() == 60 {
            self.trace.remove(0);
        }
        self.trace.push(line);
    }

    fn submit(&mut self, at: usize) {
        let tenant = &mut self.tenants[at];
        if tenant.broken || matches!(tenant.place, Place::Removed) {
            return;
        }
        for _ in 0..1 + self.rng.below(3) {
            let kind = *self.rng.pick(&[
                request_type::IN,
                request_type::IN,
                request_type::OUT,
                request_type::FLUSH,
                77,
            ]);
            let len = if matches!(kind, request_type::IN | request_type::OUT) {
                DATA
            } else {
                0
            };
            let request = SimRequest::new(kind, 8 * at as u64, len, kind == request_type::IN);
            let Some(head) = tenant.guest.driver.submit(&request, &[]) else {
                break;
            };
            assert!(tenant.in_flight.insert(head, kind).is_none());
        }
        let wanted = tenant.guest.driver.publish();
        match tenant.manners {
            Manners::Kicks | Manners::Storms if wanted => tenant.kick(),
            _ => {}
        }
        let line = format!("guest {at} publishes, kick wanted: {wanted}");
        self.note(line);
    }

    fn collect(&mut self, at: usize) {
        let tenant = &mut self.tenants[at];
        while let Some(completion) = tenant.guest.driver.poll_used() {
            let kind = tenant.in_flight.remove(&completion.head);
            let expected = match kind.expect("a head that was not sent") {
                77 => status::UNSUPP,
                // Its device may have lost its cache.
                request_type::FLUSH => completion.status,
                _ => status::OK,
            };
            assert_eq!(completion.status, expected, "guest {at}, type {kind:?}");
            self.finished += 1;
        }
    }

    fn collect_all(&mut self) {
        (0..self.tenants.len()).for_each(|at| self.collect(at));
    }

    /// Anything that can happen beside the reactor.
    fn act(&mut self) {
        let at = self.rng.below(self.tenants.len() as u64) as usize;
        match self.rng.below(100) {
            0..=44 if !self.ending => self.submit(at),
            45..=64 => self.rig.model.carry_on(),
            65..=79 => self.collect(at),
            80..=84 if self.tenants[at].manners == Manners::Storms => {
                self.note(format!("guest {at} kicks for nothing"));
                self.tenants[at].kick();
            }
            85..=86 if !self.ending => self.take_lane(at),
            87 if !self.ending => self.replace_kick(at),
            88 if !self.ending && self.rng.one_in(20) => self.break_ring(at),
            89 if !self.ending && self.rng.one_in(30) => self.begin_errand(),
            _ => self.follow_up(),
        }
    }

    fn take_lane(&mut self, at: usize) {
        let tenant = &mut self.tenants[at];
        if matches!(tenant.place, Place::Served) && self.errand.is_none() && !self.gone {
            let back = self.handle.detach(tenant.poller, tenant.guest.lane);
            tenant.place = Place::Leaving(back);
            self.note(format!("guest {at} is taken out of service"));
        }
    }

    fn replace_kick(&mut self, at: usize) {
        let tenant = &mut self.tenants[at];
        if !matches!(tenant.place, Place::Served) || tenant.manners == Manners::Deaf {
            return;
        }
        tenant.kick = new_eventfd();
        let (poller, lane, kick) = (tenant.poller, tenant.guest.lane, tenant.kick_of_lane());
        self.handle.replace_kick(poller, lane, kick);
        // A kick on its way may have gone to the old one: front-ends kick once after they changed it.
        self.tenants[at].kick();
        self.note(format!("guest {at} gets another kick eventfd"));
    }

    /// The guest moves its avail index to where no driver does. What it had in flight is nobody's any more.
    fn break_ring(&mut self, at: usize) {
        let tenant = &mut self.tenants[at];
        if tenant.broken || tenant.layout == RingLayout::Packed || self.gone {
            return;
        }
        tenant.guest.driver.jump(-300);
        tenant.guest.driver.publish();
        tenant.kick();
        tenant.broken = true;
        self.note(format!("guest {at} breaks its ring"));
        self.take_lane(at);
    }

    fn begin_errand(&mut self) {
        let leaving = |tenant: &Tenant| matches!(tenant.place, Place::Leaving(_));
        if self.errand.is_some() || self.tenants.iter().any(leaving) {
            return;
        }
        let what = match (self.gone, self.rng.one_in(2)) {
            (true, _) => What::BringBack,
            (false, true) => What::Reset,
            (false, false) => What::TakeAway,
        };
        self.note(format!("errand {what:?}"));
        let ids = self.ids.iter();
        let pollers = ids.map(|id| (*id, self.handle.lend(*id))).collect();
        self.errand = Some(Errand {
            pollers,
            arrived: Vec::new(),
            what,
        });
    }

    /// Control threads go on with what has arrived.
    fn follow_up(&mut self) {
        for at in 0..self.tenants.len() {
            let tenant = &mut self.tenants[at];
            let Place::Leaving(back) = &tenant.place else {
                continue;
            };
            let Ok(lane) = back.try_recv() else {
                continue;
            };
            self.lane_arrived(at, &lane);
        }
        if let Some(errand) = &mut self.errand {
            errand
                .pollers
                .retain(|(id, poller)| match poller.try_recv() {
                    Ok(poller) => {
                        errand.arrived.push((*id, poller));
                        false
                    }
                    Err(_) => true,
                });
            if errand.pollers.is_empty() {
                self.run_errand();
            }
        }
    }

    /// A lane has drained: it goes back into service where it stood, unless its guest broke it.
    fn lane_arrived(&mut self, at: usize, lane: &Lane) {
        self.collect(at);
        let tenant = &mut self.tenants[at];
        if tenant.broken {
            tenant.place = Place::Removed;
            tenant.in_flight.clear();
            return self.note(format!("guest {at} is gone"));
        }
        let mut queue = tenant.guest.driver.virtqueue_config();
        let base = lane.base();
        queue.next_avail = (base & 0xffff) as u16;
        queue.next_used = match tenant.layout {
            // SAFETY: the used ring of the guest, whose memory it keeps mapped.
            RingLayout::Split => unsafe { virtqueue::used_index(queue.used) },
            RingLayout::Packed => (base >> 16) as u16,
        };
        let signals = tenant.signals_of_lane();
        let lane = self
            .rig
            .make_lane(&tenant.guest.driver, queue, signals, false);
        tenant.place = Place::Served;
        self.handle.attach(tenant.poller, lane);
        self.note(format!("guest {at} is served again"));
    }

    fn run_errand(&mut self) {
        let Some(Errand { arrived, what, .. }) = self.errand.take() else {
            return;
        };
        let (ids, mut pollers): (Vec<PollerId>, Pollers) = arrived.into_iter().unzip();
        match what {
            What::Reset => self.control(|control| control.recover(&mut pollers)),
            What::TakeAway => {
                if self.rng.one_in(2) {
                    self.rig.model.pull_out();
                }
                self.control(|control| {
                    control.give_up(&mut pollers, false, Service::Hold);
                    Ok(())
                });
            }
            What::BringBack => self.control(|control| control.regain(&mut pollers)),
        }
        self.gone = what == What::TakeAway;
        for (id, poller) in ids.into_iter().zip(pollers) {
            self.handle.adopt(id, poller);
        }
        self.errands += 1;
        self.note(format!("errand {what:?} done"));
    }

    fn control(&self, act: impl FnOnce(&mut dyn DeviceControl) -> Result<(), DeviceError>) {
        self.rig.device.with_control(act).unwrap();
    }

    /// Requests that only the reactor keeps from ending.
    fn is_owed_anything(&self) -> bool {
        let control_has_them = self.gone || self.errand.is_some();
        let owed = |tenant: &Tenant| {
            let kicks = matches!(tenant.manners, Manners::Kicks | Manners::Storms);
            let served = matches!(tenant.place, Place::Served) && !tenant.broken;
            kicks && served && !tenant.in_flight.is_empty()
        };
        !control_has_them && self.tenants.iter().any(owed)
    }
}

impl Rest for Scene {
    /// Between a turn that found nothing and what follows from it, anything may happen.
    fn now(&mut self) -> Duration {
        self.now += Duration::from_micros(*self.rng.pick(&[5, 300, 3000]));
        if self.rng.one_in(4) {
            self.act();
        }
        self.now
    }

    fn relax(&mut self, about: Duration) {
        self.now += about;
        if self.rng.one_in(4) {
            self.act();
        }
    }

    fn sleep(&mut self, set: &WakeSet, timeout: Duration) -> Woken {
        let naps = timeout <= NAP;
        let deaf = |tenant: &Tenant| tenant.manners == Manners::Deaf;
        if naps {
            let why = !self.interrupts || self.tenants.iter().any(deaf);
            assert!(why, "naps for no reason");
        }
        let mut woken = set.wait(Duration::ZERO);
        for _ in 0..self.rng.below(12) {
            if woken.any() {
                break;
            }
            self.act();
            woken = set.wait(Duration::ZERO);
        }
        // Nothing happens by itself any more but what is under way already.
        if !woken.any() {
            self.follow_up();
            (0..CARRY_ON).for_each(|_| self.rig.model.carry_on());
            self.collect_all();
            woken = set.wait(Duration::ZERO);
        }
        if woken.any() {
            self.now += Duration::from_micros(20);
            return woken;
        }
        assert!(
            naps || !self.is_owed_anything(),
            "it sleeps for {timeout:?}, and nothing will wake it: {:?}",
            self.tenants
                .iter()
                .map(|tenant| (tenant.manners, &tenant.in_flight))
                .collect::<Vec<_>>()
        );
        self.now += timeout;
        woken
    }
}

fn new_eventfd() -> OwnedFd {
    eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC).unwrap()
}

fn world(seed: u64) -> Core<Scene> {
    let mut rng = Rng::new(seed);
    let interrupts = !rng.one_in(8);
    let config = ModelConfig {
        size: 4 << 20,
        queues: *rng.pick(&[1, 1, 2]),
        mqes: *rng.pick(&[3, 64, 1024]),
        jitter: Duration::from_micros(*rng.pick(&[0, 20, 60])),
        clock: Clock::Turns,
        interrupts,
        by_itself: true,
        seed,
        ..ModelConfig::default()
    };
    let mut rig = Rig::new(config);
    let pollers = std::mem::take(&mut rig.pollers);
    let ids: Vec<PollerId> = (0..pollers.len() as u32).map(PollerId).collect();
    let manners = [
        Manners::Kicks,
        Manners::Kicks,
        Manners::Storms,
        Manners::Silent,
    ];
    let lanes: Vec<(Tenant, Lane)> = (0..1 + rng.below(3))
        .map(|at| {
            let setup = GuestSetup {
                layout: *rng.pick(&[RingLayout::Split, RingLayout::Packed]),
                queue_size: *rng.pick(&[8, 64]),
                event_idx: rng.one_in(2),
                indirect: false,
                max_data: DATA,
                first_index: *rng.pick(&[0, 65_500]),
                ..GuestSetup::default()
            };
            // A ring without a kick has the reactor look by itself: not in every world.
            let manners = match seed % 8 {
                0 if at == 0 => Manners::Deaf,
                _ => *rng.pick(&manners),
            };
            let (guest, _) = rig.make_guest(&setup);
            let tenant = Tenant {
                guest,
                layout: setup.layout,
                manners,
                kick: new_eventfd(),
                in_flight: HashMap::new(),
                poller: ids[at as usize % ids.len()],
                place: Place::Served,
                broken: false,
            };
            let queue = tenant.guest.driver.virtqueue_config();
            let lane = rig.make_lane(&tenant.guest.driver, queue, tenant.signals_of_lane(), false);
            (tenant, lane)
        })
        .collect();
    let (mut tenants, mut attached) = (Vec::new(), Vec::new());
    for (tenant, lane) in lanes {
        attached.push((tenant.poller, lane));
        tenants.push(tenant);
    }
    // The scene needs a handle, which comes with the reactor, which takes the scene: the first handle is replaced.
    let (handle, _) = Core::new(0, Mode::Adaptive, NoTime).unwrap();
    let scene = Scene {
        rng,
        rig,
        handle,
        tenants,
        ids: ids.clone(),
        now: Duration::ZERO,
        errand: None,
        gone: false,
        ending: false,
        interrupts,
        finished: 0,
        errands: 0,
        trace: Vec::new(),
    };
    let (handle, mut core) = Core::new(0, Mode::Adaptive, scene).unwrap();
    for (id, poller) in ids.into_iter().zip(pollers) {
        handle.adopt(id, poller);
    }
    for (poller, lane) in attached {
        handle.attach(poller, lane);
    }
    core.rest.handle = handle;
    core
}

/// Of a reactor that never runs.
struct NoTime;

impl Rest for NoTime {
    fn now(&mut self) -> Duration {
        Duration::ZERO
    }

    fn relax(&mut self, _: Duration) {}

    fn sleep(&mut self, _: &WakeSet, _: Duration) -> Woken {
        Woken::default()
    }
}

/// What one world did.
#[derive(Debug, Default)]
struct Tally {
    sleeps: u64,
    cut_short: u64,
    kicks: u64,
    interrupts: u64,
    messages: u64,
    timeouts: u64,
    finished: u64,
    errands: u64,
}

/// Runs until the reactor has slept `sleeps` times, then until every request has ended.
fn run(core: &mut Core<Scene>, sleeps: u64) -> Tally {
    while core.rest.handle.stats().sleeps() < sleeps {
        assert!(core.round());
        if core.rest.rng.one_in(4) {
            core.rest.act();
        }
    }
    let stats = core.rest.handle.stats();
    let tally = Tally {
        sleeps: stats.sleeps(),
        cut_short: stats.cut_short(),
        kicks: stats.kicks(),
        interrupts: stats.interrupts(),
        messages: stats.messages(),
        timeouts: stats.timeouts(),
        finished: core.rest.finished,
        errands: core.rest.errands,
    };
    core.rest.ending = true;
    for _ in 0..100_000 {
        core.round();
        let scene = &mut core.rest;
        scene.follow_up();
        if scene.gone && scene.errand.is_none() {
            scene.begin_errand();
        }
        scene.collect_all();
        let over = |tenant: &Tenant| {
            let left = matches!(tenant.place, Place::Removed);
            let served = matches!(tenant.place, Place::Served) && tenant.in_flight.is_empty();
            left || served
        };
        if scene.errand.is_none() && !scene.gone && scene.tenants.iter().all(over) {
            return tally;
        }
        for at in 0..scene.tenants.len() {
            if scene.tenants[at].broken {
                scene.take_lane(at);
            }
        }
    }
    panic!("requests never ended");
}

/// Hands everything back, and has the rig check that nobody did anything forbidden.
fn finish(mut core: Core<Scene>) {
    let handle = core.rest.handle.clone();
    let lanes: Vec<_> = core
        .rest
        .tenants
        .iter()
        .filter(|tenant| matches!(tenant.place, Place::Served))
        .map(|tenant| handle.detach(tenant.poller, tenant.guest.lane))
        .collect();
    (0..2000).for_each(|_| assert!(core.round()));
    for lane in lanes {
        assert!(lane.try_recv().is_ok(), "a lane did not drain");
    }
    let ids = core.rest.ids.clone();
    let pollers: Vec<_> = ids.iter().map(|id| handle.retire(*id)).collect();
    (0..100).for_each(|_| assert!(core.round()));
    for poller in pollers {
        core.rest.rig.pollers.push(poller.try_recv().unwrap());
    }
    core.rest.rig.finish();
}

fn run_seed(seed: u64, sleeps: u64) -> Tally {
    let core = std::sync::Mutex::new(world(seed));
    let result = std::panic::catch_unwind(|| run(&mut core.lock().unwrap(), sleeps));
    let core = core
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let Ok(tally) = result else {
        panic!(
            "seed {seed} failed after {} sleeps; the last that happened:\n{}",
            core.rest.handle.stats().sleeps(),
            core.rest.trace.join("\n")
        );
    };
    finish(core);
    tally
}

/// 2500 sleeps in each of 400 worlds. `TANDEM_SEEDS` asks for more worlds, or fewer.
#[test]
fn reactor_that_sleeps_a_million_times_loses_no_wake_up() {
    let seeds = std::env::var("TANDEM_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(400);
    let mut sum = Tally::default();
    for seed in 0..seeds {
        let tally = run_seed(seed, 2500);
        sum.sleeps += tally.sleeps;
        sum.cut_short += tally.cut_short;
        sum.kicks += tally.kicks;
        sum.interrupts += tally.interrupts;
        sum.messages += tally.messages;
        sum.timeouts += tally.timeouts;
        sum.finished += tally.finished;
        sum.errands += tally.errands;
    }
    println!("{sum:?}");
    assert!(sum.sleeps >= 2500 * seeds, "{sum:?}");
    // Each way to be woken, and each way not to fall asleep, was gone often.
    for (what, count) in [
        ("cut short", sum.cut_short),
        ("kicks", sum.kicks),
        ("interrupts", sum.interrupts),
        ("messages", sum.messages),
        ("time-outs", sum.timeouts),
        ("requests", sum.finished),
    ] {
        assert!(count > 20 * seeds, "{what}: {sum:?}");
    }
    assert!(sum.errands > seeds / 2, "{sum:?}");
}
