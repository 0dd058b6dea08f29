//! The two sides of a virtqueue on two threads, under loom: every order of accesses that the memory model allows, up
//! to the given number of preemptions. `scripts/loom-rings` runs them, and expects each canary to make one fail.
//!
//! A stale word shows as a wrong request, a copy that races with the other side as a causality violation, a signal
//! or a kick that got lost as a wait without an end.

use super::{Framing, SimCompletion, SimGuest, SimGuestConfig, SimRegion, SimRequest, heap_memory};
use crate::virtio::blk::{HEADER_BYTES, request_type};
use crate::virtio::chain::Chain;
use crate::virtio::memory::{Gpa, GuestMemory};
use crate::virtio::shared::{AtomicU16, AtomicU32, AtomicU64, shadow};
use crate::virtio::virtqueue::{RingLayout, Virtqueue, VirtqueueConfig};
use loom::sync::{Arc, Condvar, Mutex};
use loom::thread;

const BASE: Gpa = Gpa(0x10000);
const DATA_BYTES: u32 = 8;
/// Idle polls after which the guest is stuck: each lets it go on until it waits itself.
const MAX_IDLE: u32 = 100;

/// A guest whose avail and used index wrap after the first request, and its device; in a packed ring the first request lies
/// across the end of the ring. All memory is covered.
fn queue(layout: RingLayout, size: u16, event_idx: bool) -> (SimGuest, Virtqueue) {
    shadow::reset();
    let config = SimGuestConfig {
        layout,
        size,
        event_idx,
        indirect: false,
        max_data: DATA_BYTES,
        first_index: u16::MAX,
        base: BASE,
    };
    let region = SimRegion {
        gpa: BASE,
        len: config.bytes(),
        dma: 0x1000,
    };
    let memory = std::sync::Arc::new(heap_memory(&[region]).unwrap());
    let mut guest = SimGuest::new(memory, config).unwrap();
    guest.disable_signals();
    // SAFETY: the device thread keeps the memory together with the queue, and there is one queue.
    let queue = unsafe { guest.virtqueue() }.unwrap();
    cover(&guest, guest.virtqueue_config());
    (guest, queue)
}

fn cover(guest: &SimGuest, config: VirtqueueConfig) {
    let size = usize::from(config.size);
    AtomicU64::cover(config.descriptor_table, 2 * size);
    match config.layout {
        RingLayout::Split => {
            AtomicU16::cover(config.avail, size + 3);
            // SAFETY: places in the used ring, which has `6 + 8 * size` bytes.
            let (elements, event) = unsafe { (config.used.add(4), config.used.add(4 + 8 * size)) };
            AtomicU16::cover(config.used, 2);
            AtomicU32::cover(elements, 2 * size);
            AtomicU16::cover(event, 1);
        }
        RingLayout::Packed => {
            AtomicU32::cover(config.avail, 1);
            AtomicU32::cover(config.used, 1);
        }
    }
    for head in 0..config.size {
        let data = guest.data_at(head);
        for (gpa, len) in [
            (data.0 - HEADER_BYTES as u64, 16),
            (data.0, DATA_BYTES),
            (data.0 + u64::from(DATA_BYTES), 1),
        ] {
            let bytes = guest.memory().contiguous(Gpa(gpa), len).unwrap();
            shadow::cover_bytes(bytes, len as usize);
        }
    }
}

/// Two descriptors: header and data, status.
fn write_request(sector: u64) -> (SimRequest, [u8; 8]) {
    let request = SimRequest {
        framing: Framing::Joined,
        ..SimRequest::new(request_type::OUT, sector, DATA_BYTES, false)
    };
    (request, (sector * 0x0101).to_le_bytes())
}

/// The device: `count` requests in batches, as a lane does it. Each request is checked against what the guest sends,
/// and answered with its sector as status and used length. `signal` is the eventfd.
fn serve(mut queue: Virtqueue, memory: &GuestMemory, count: u64, signal: impl Fn()) {
    let mut chain = Chain::new(4);
    let (mut served, mut idle) = (0, 0);
    while served < count {
        let waiting = queue.available().unwrap();
        for _ in 0..waiting {
            // A packed ring says only whether there is one.
            if !queue.pop(memory, &mut chain).unwrap() {
                break;
            }
            served += 1;
            answer(&mut queue, &mut chain, served);
        }
        queue.publish_used();
        if queue.needs_signal() {
            signal();
        }
        idle = if waiting == 0 { idle + 1 } else { 0 };
        assert!(
            idle < MAX_IDLE,
            "the guest sends nothing: it sleeps, and its signal got lost"
        );
        if served < count {
            thread::yield_now();
        }
    }
}

fn answer(queue: &mut Virtqueue, chain: &mut Chain, sector: u64) {
    assert_eq!(chain.fault(), None, "a stale request: descriptors");
    let status = chain.take_status().expect("a stale request: no status");
    let header: [u8; HEADER_BYTES] = chain.take_front().expect("a stale request: no header");
    assert_eq!(header[8..], sector.to_le_bytes(), "a stale request: header");
    let mut data = [0; 8];
    assert_eq!(chain.readable().len(), 1);
    chain.readable()[0].copy_to(&mut data);
    assert_eq!(data, write_request(sector).1, "a stale request: data");
    let answer = u8::try_from(sector).unwrap();
    status.write(answer);
    queue.push_used(chain.head(), answer.into());
}

/// Explores with at most `preemptions`, or all; loads may always see whatever the memory model allows.
/// `LOOM_MAX_PREEMPTIONS` in the environment goes before.
fn explore(preemptions: Option<usize>, run: impl Fn() + Send + Sync + 'static) {
    let mut model = loom::model::Builder::new();
    model.max_threads = 2;
    model.max_branches = 10_000;
    model.preemption_bound = model.preemption_bound.or(preemptions);
    model.check(run);
}

fn submit(guest: &mut SimGuest, sector: u64) {
    let (request, data) = write_request(sector);
    guest.submit(&request, &data).unwrap();
    guest.publish();
}

fn check(completion: SimCompletion, sector: u64) {
    let SimCompletion {
        used_len, status, ..
    } = completion;
    assert_eq!((u64::from(used_len), u64::from(status)), (sector, sector));
}

/// The next completion, for a guest that polls.
fn poll(guest: &mut SimGuest) -> SimCompletion {
    loop {
        match guest.poll_used() {
            Some(completion) => return completion,
            None => thread::yield_now(),
        }
    }
}

fn no_signal() {
    panic!("a polling guest wants no signal");
}

fn one_at_a_time(layout: RingLayout) {
    explore(None, move || {
        // The first request takes both descriptors: the second reuses all that the device had.
        let (mut guest, queue) = queue(layout, 2, false);
        let memory = std::sync::Arc::clone(guest.memory());
        let device = thread::spawn(move || serve(queue, &memory, 2, no_signal));
        for sector in [1, 2] {
            submit(&mut guest, sector);
            check(poll(&mut guest), sector);
        }
        device.join().unwrap();
    });
}

fn two_at_a_time(layout: RingLayout) {
    explore(None, move || {
        let (mut guest, queue) = queue(layout, 4, false);
        let memory = std::sync::Arc::clone(guest.memory());
        let device = thread::spawn(move || serve(queue, &memory, 2, no_signal));
        submit(&mut guest, 1);
        submit(&mut guest, 2);
        check(poll(&mut guest), 1);
        check(poll(&mut guest), 2);
        device.join().unwrap();
    });
}

/// The eventfd between a guest and its device.
type EventFd = Arc<(Mutex<u32>, Condvar)>;

/// The next completion, for a guest that sleeps until it is signalled, as a driver with interrupts does.
fn sleep(guest: &mut SimGuest, eventfd: &EventFd) -> SimCompletion {
    loop {
        if let Some(completion) = guest.poll_used() {
            guest.disable_signals();
            return completion;
        }
        if guest.enable_signals() {
            continue;
        }
        let mut signals = eventfd.0.lock().unwrap();
        while *signals == 0 {
            signals = eventfd.1.wait(signals).unwrap();
        }
        *signals = 0;
    }
}

fn sleeping_guest(
    layout: RingLayout,
    size: u16,
    event_idx: bool,
    requests: impl Fn(&mut SimGuest, &EventFd) + Send + Sync + 'static,
) {
    explore(Some(5), move || {
        let (mut guest, queue) = queue(layout, size, event_idx);
        let memory = std::sync::Arc::clone(guest.memory());
        let eventfd = EventFd::default();
        let call = Arc::clone(&eventfd);
        let device = thread::spawn(move || {
            serve(queue, &memory, 2, || {
                *call.0.lock().unwrap() += 1;
                call.1.notify_one();
            });
        });
        requests(&mut guest, &eventfd);
        device.join().unwrap();
    });
}

fn one_after_the_other(guest: &mut SimGuest, eventfd: &EventFd) {
    for sector in [1, 2] {
        submit(guest, sector);
        check(sleep(guest, eventfd), sector);
    }
}

fn both_at_once(guest: &mut SimGuest, eventfd: &EventFd) {
    submit(guest, 1);
    submit(guest, 2);
    check(sleep(guest, eventfd), 1);
    check(sleep(guest, eventfd), 2);
}

fn sleeps(layout: RingLayout, event_idx: bool) {
    sleeping_guest(layout, 2, event_idx, one_after_the_other);
    sleeping_guest(layout, 4, event_idx, both_at_once);
}

/// The device as a reactor runs it that sleeps: `count` requests, asleep whenever there is none. `kicks` is the eventfd.
fn serve_asleep(mut queue: Virtqueue, memory: &GuestMemory, count: u64, kicks: &EventFd) {
    let mut chain = Chain::new(4);
    let mut served = 0;
    while served < count {
        for _ in 0..queue.available().unwrap() {
            if !queue.pop(memory, &mut chain).unwrap() {
                break;
            }
            served += 1;
            answer(&mut queue, &mut chain, served);
        }
        queue.publish_used();
        if served < count && !queue.request_kicks().unwrap() {
            let mut kicks_so_far = kicks.0.lock().unwrap();
            while *kicks_so_far == 0 {
                kicks_so_far = kicks.1.wait(kicks_so_far).unwrap();
            }
            *kicks_so_far = 0;
        }
        queue.suppress_kicks();
    }
}

/// The guest of a device that sleeps: it kicks when it is asked to, once for each request, and then only looks.
fn send_and_look(mut guest: SimGuest, kicks: &EventFd) {
    for sector in [1, 2] {
        let (request, data) = write_request(sector);
        guest.submit(&request, &data).unwrap();
        if guest.publish() {
            *kicks.0.lock().unwrap() += 1;
            kicks.1.notify_one();
        }
    }
    let mut idle = 0;
    for sector in [1, 2] {
        let completion = loop {
            match guest.poll_used() {
                Some(completion) => break completion,
                None => thread::yield_now(),
            }
            idle += 1;
            assert!(
                idle < MAX_IDLE,
                "the device answers nothing: it sleeps, and its kick got lost"
            );
        };
        check(completion, sector);
    }
}

fn sleeping_device(layout: RingLayout, event_idx: bool) {
    explore(Some(4), move || {
        let (guest, mut queue) = queue(layout, 4, event_idx);
        queue.suppress_kicks();
        let memory = std::sync::Arc::clone(guest.memory());
        let eventfd = EventFd::default();
        let kicks = Arc::clone(&eventfd);
        let guest = thread::spawn(move || send_and_look(guest, &kicks));
        serve_asleep(queue, &memory, 2, &eventfd);
        guest.join().unwrap();
    });
}

/// The same for each layout.
macro_rules! rings {
    ($($layout:ident: $ring:expr),*) => {$(
        mod $layout {
            use super::*;

            #[test]
            fn requests_that_reuse_descriptors_and_buffers_arrive_whole_and_come_back_answered() {
                one_at_a_time($ring);
            }

            #[test]
            fn requests_in_flight_together_arrive_whole_and_come_back_answered() {
                two_at_a_time($ring);
            }

            #[test]
            fn sleeping_guest_with_event_idx_misses_no_signal() {
                sleeps($ring, true);
            }

            #[test]
            fn sleeping_guest_without_event_idx_misses_no_signal() {
                sleeps($ring, false);
            }

            #[test]
            fn sleeping_device_with_event_idx_misses_no_kick() {
                sleeping_device($ring, true);
            }

            #[test]
            fn sleeping_device_without_event_idx_misses_no_kick() {
                sleeping_device($ring, false);
            }
        }
    )*};
}

rings!(split: RingLayout::Split, packed: RingLayout::Packed);
