//! Guests that sleep until they are signalled, in one thread and from a seed. A lane may leave a signal to its next turn
//! while its guest goes on sending; it must not leave it for longer, nor forget it over anything that happens to the
//! lane meanwhile.

use std::fs::File;
use std::os::fd::OwnedFd;

use nvme_model::ModelConfig;
use rustix::event::{EventfdFlags, eventfd};
use tandem::datapath::Service;
use tandem::sim::SimRequest;
use tandem::virtio::blk::request_type;
use tandem::virtio::virtqueue::RingLayout;

use crate::common::rig::{GuestSetup, Rig, RigGuest};
use crate::common::rng::Rng;

/// Turns after which a signal must be there: one that still finds what the guest sent, and one more.
const PATIENCE: u32 = 2;

struct Sleeper {
    guest: RigGuest,
    call: OwnedFd,
    in_flight: u32,
    /// It has asked for a signal, seen nothing, and does nothing until it comes.
    asleep: bool,
    /// Turns for which something was there to wake it for.
    overslept: u32,
    signals: u64,
}

impl Sleeper {
    fn new(rig: &mut Rig, setup: &GuestSetup) -> Sleeper {
        let guest = rig.add_guest(setup);
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let call = eventfd(0, flags).unwrap();
        let theirs = File::from(call.try_clone().unwrap());
        setup.call.replace(Some(theirs)).unwrap();
        Sleeper {
            guest,
            call,
            in_flight: 0,
            asleep: false,
            overslept: 0,
            signals: 0,
        }
    }

    fn send(&mut self, rng: &mut Rng) {
        // An unknown request is answered at once; the large one takes several commands, of which only the first few have room.
        let (kind, len) = *rng.pick(&[
            (request_type::IN, 4096),
            (request_type::IN, 4096),
            (request_type::IN, 4096),
            (request_type::FLUSH, 0),
            (request_type::IN, 256 << 10),
            (77, 0),
        ]);
        let request = SimRequest::new(kind, 0, len, kind == request_type::IN);
        if self.guest.driver.submit(&request, &[]).is_some() {
            self.guest.driver.publish();
            self.in_flight += 1;
        }
    }

    fn collect(&mut self) {
        while self.guest.driver.poll_used().is_some() {
            self.in_flight -= 1;
        }
    }

    /// What a driver does before it waits.
    fn try_to_sleep(&mut self) {
        if !self.guest.driver.enable_signals() {
            self.asleep = true;
            self.overslept = 0;
        } else {
            self.collect();
        }
    }

    fn take_signals(&mut self) {
        let mut count = [0; 8];
        if rustix::io::read(&self.call, &mut count).is_ok() {
            self.signals += u64::from_ne_bytes(count);
            self.asleep = false;
            self.collect();
            self.guest.driver.disable_signals();
        }
    }

    /// After a turn.
    fn check(&mut self, seed: u64) {
        self.take_signals();
        if !self.asleep {
            return;
        }
        // A second look, which a sleeping driver would not take.
        if self.guest.driver.enable_signals() {
            self.overslept += 1;
            assert!(
                self.overslept <= PATIENCE,
                "seed {seed}: a guest sleeps over what has been done for it"
            );
        }
    }
}

fn setup(rng: &mut Rng) -> GuestSetup {
    GuestSetup {
        layout: *rng.pick(&[RingLayout::Split, RingLayout::Packed]),
        queue_size: *rng.pick(&[8, 32, 256]),
        max_data: 256 << 10,
        ..GuestSetup::default()
    }
}

fn run(seed: u64) {
    let mut rng = Rng::new(seed);
    let mut rig = Rig::new(ModelConfig {
        queues: 1,
        mdts_bytes: Some(16 << 10),
        ..ModelConfig::default()
    });
    let count = 1 + rng.below(2) as usize;
    let mut sleepers: Vec<Sleeper> = (0..count)
        .map(|_| {
            let setup = setup(&mut rng);
            Sleeper::new(&mut rig, &setup)
        })
        .collect();
    for _ in 0..2000 {
        for sleeper in &mut sleepers {
            // Also one that sleeps: another of its threads goes on.
            match rng.below(8) {
                0..=3 => sleeper.send(&mut rng),
                4 if !sleeper.asleep => sleeper.collect(),
                5..=6 if !sleeper.asleep => sleeper.try_to_sleep(),
                _ => {}
            }
        }
        if rng.one_in(300) {
            // The device is given up just now, and is back after a while.
            let poller = &mut rig.pollers;
            rig.device
                .with_control(|control| {
                    control.give_up(poller, false, Service::Hold);
                    Ok(())
                })
                .unwrap();
            sleepers.iter_mut().for_each(|one| one.take_signals());
            for sleeper in sleepers.iter_mut().filter(|one| one.asleep) {
                assert!(
                    !sleeper.guest.driver.enable_signals(),
                    "seed {seed}: a signal is lost with the device"
                );
            }
            let pollers = &mut rig.pollers;
            rig.device
                .with_control(|control| control.regain(pollers))
                .unwrap();
        }
        rig.turn();
        sleepers.iter_mut().for_each(|one| one.check(seed));
    }
    assert!(
        sleepers.iter().all(|one| one.signals > 50),
        "seed {seed}: they slept too little"
    );
    // All of it is done, and they hear of it.
    for _ in 0..64 {
        rig.turn();
        sleepers.iter_mut().for_each(|one| one.check(seed));
    }
    for sleeper in &mut sleepers {
        sleeper.collect();
        assert_eq!(sleeper.in_flight, 0, "seed {seed}");
    }
    rig.finish();
}

#[test]
fn no_guest_sleeps_over_what_is_done_for_it() {
    for seed in 0..200 {
        run(seed);
    }
}

#[test]
fn guest_that_goes_on_sending_is_signalled_every_other_turn() {
    for layout in [RingLayout::Split, RingLayout::Packed] {
        let mut rig = Rig::new(ModelConfig::default());
        let setup = GuestSetup {
            layout,
            ..GuestSetup::default()
        };
        let mut sleeper = Sleeper::new(&mut rig, &setup);
        let mut turns = 0;
        for _ in 0..100 {
            sleeper
                .guest
                .driver
                .submit(&SimRequest::new(request_type::IN, 0, 4096, true), &[])
                .unwrap();
            sleeper.in_flight += 1;
            sleeper.guest.driver.publish();
            sleeper.guest.driver.enable_signals();
            rig.turn();
            turns += 1;
            sleeper.take_signals();
            sleeper.collect();
        }
        let signals = sleeper.signals;
        assert!(
            (turns / 3..=turns / 2 + 2).contains(&signals),
            "{layout:?}: {signals} signals in {turns} turns"
        );
        rig.finish();
    }
}
