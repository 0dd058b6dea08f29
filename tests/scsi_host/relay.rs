//! What is different when the guest's ring is at another device than the logical units, and what is not.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering};

/// Has each poller turn on a thread of its own while `guest` is busy with the rings.
fn on_threads(host: &mut Host, guest: impl FnOnce(&mut Host)) {
    let over = AtomicBool::new(false);
    let drive = |mut poller: Box<dyn Poll>| {
        while !over.load(Ordering::Acquire) {
            if !poller.turn() {
                std::thread::yield_now();
            }
        }
        poller
    };
    std::thread::scope(|scope| {
        let own = host.poller.take().unwrap();
        let own = scope.spawn(|| drive(own));
        let near = host.near.take().map(|(device, poller, lane)| {
            let poller = scope.spawn(|| drive(poller));
            (device, poller, lane)
        });
        guest(host);
        over.store(true, Ordering::Release);
        host.poller = Some(own.join().unwrap());
        host.near = near.map(|(device, poller, lane)| (device, poller.join().unwrap(), lane));
    });
}

#[test]
fn lanes_that_are_polled_by_different_threads_lose_nothing() {
    let config = ModelConfig {
        latency: Duration::from_micros(20),
        jitter: Duration::from_micros(200),
        ..ModelConfig::default()
    };
    for layout in [RingLayout::Split, RingLayout::Packed] {
        let storage = Storage {
            layout,
            ..Storage::new(config.clone())
        };
        let mut host = Host::of(&storage, 0, Sizes::DEFAULT, (32, 96));
        drop(storage);
        on_threads(&mut host, |host| {
            // By block: what was written last.
            let mut blocks = [0_u8; 4];
            let wait = |host: &mut Host| {
                let start = Instant::now();
                loop {
                    if let Some((head, len)) = host.requests.take_used() {
                        return (head as u16, len);
                    }
                    assert!(start.elapsed() < DEADLINE, "nothing came back");
                    std::thread::yield_now();
                }
            };
            for round in 0..500_usize {
                // A write, and reads of the other blocks of both units beside it.
                let written = round % 4;
                blocks[written] = round as u8;
                let data = [blocks[written]; 512];
                let write = host.send(FIRST, &write_10(written as u32, 1), &data, 0);
                let mut reads = Vec::new();
                for block in (0..4).filter(|block| *block != written) {
                    let read = host.send(FIRST, &read_10(block as u32, 1), &[], 512);
                    reads.push((read, blocks[block]));
                }
                reads.push((host.send(SECOND, &read_10(0, 1), &[], 512), 0));
                for _ in 0..=reads.len() {
                    let (head, used_len) = wait(host);
                    if head == write {
                        assert_eq!(host.reply(head, used_len), good(0, 0));
                        continue;
                    }
                    assert_eq!(host.reply(head, used_len), good(0, 512));
                    let at = reads.iter().position(|(read, _)| *read == head);
                    let (_, byte) = reads[at.expect("a head that was not sent")];
                    assert_eq!(host.data(head, 512), [byte; 512]);
                }
                if round % 50 == 7 {
                    // LOGICAL UNIT RESET, and what it leaves to be told.
                    host.ask(&Host::task(5, SECOND), 1);
                    let start = Instant::now();
                    while host.control.take_used().is_none() {
                        assert!(start.elapsed() < DEADLINE, "the function is not answered");
                        std::thread::yield_now();
                    }
                    host.send(SECOND, &[0; 6], &[], 0);
                    let (head, used_len) = wait(host);
                    assert_eq!(host.reply(head, used_len), check(6, 0x29, 3, 0));
                }
            }
        });
        host.finish();
    }
}

#[test]
fn units_are_served_while_their_own_device_is_there() {
    let mut host = Host::new();
    let of_the_ring = match &mut host.near {
        Some((_, near, _)) => near,
        None => host.poller.as_mut().unwrap(),
    };
    of_the_ring.suspend(Service::Fail);
    let expected = match FAR {
        true => good(0, 512),
        false => check(4, 0x44, 0, 512),
    };
    let reply = host.command(FIRST, &read_10(0, 1), &[], 512);
    assert_eq!(reply, expected);
    assert_eq!(host.manage(5, FIRST), OK);
    // Where there is no device there is nobody to hand a queue pair to.
    drop(host.recall());
}

#[test]
fn guest_that_leaves_while_a_device_is_held_gets_its_commands_back() {
    let mut host = Host::new();
    assert!(host.model.hang_next(io_opcode::READ));
    let at_the_device = host.send(FIRST, &read_10(0, 1), &[], 512);
    host.turn();
    host.poller.as_mut().unwrap().suspend(Service::Hold);
    let after = host.send(FIRST, &read_10(1, 1), &[], 512);
    for _ in 0..50 {
        host.turn();
    }
    assert_eq!(host.requests.take_used(), None, "it is held");
    drop(host.recall());
    let mut back = Vec::new();
    while let Some((head, len)) = host.requests.take_used() {
        back.push((head as u16, host.reply(head as u16, len).status));
    }
    back.sort_unstable();
    let mut expected = vec![(at_the_device, 2)];
    if FAR {
        // It had left the guest's ring. From there it would have been taken by the next server.
        expected.push((after, 2));
    }
    assert_eq!(back, expected);
}
