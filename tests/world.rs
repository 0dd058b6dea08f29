//! The whole data path in one thread, from a seed: simulated guests, lanes, pollers, queue pairs, the software
//! controller. Every block's content is known at every time, and every DMA address is checked by the controller.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod common;
#[path = "world/recovery.rs"]
mod recovery;
#[path = "world/signals.rs"]
mod signals;
#[path = "world/sleep.rs"]
mod sleep;

use std::collections::HashMap;
use std::time::Duration;

use common::rig::{GuestSetup, Rig, RigGuest};
use common::rng::Rng;
use nvme_driver::spec::{Status, io_opcode};
use nvme_model::{Clock, Medium, ModelConfig};
use tandem::control::device::{DeviceControl, DeviceError, Pollers};
use tandem::datapath::Service;
use tandem::sim::{Framing, SimRequest};
use tandem::virtio::blk::{RangeSegment, request_type, status};
use tandem::virtio::virtqueue::RingLayout;
use zerocopy::IntoBytes;

const SECTOR: u64 = 512;
const DISK_BYTES: u64 = 4 << 20;
const MAX_DATA: u32 = 300 << 10;

/// One request in flight and what its end must look like.
#[derive(Debug)]
enum Expected {
    Read {
        sector: u64,
        len: u32,
    },
    /// The oracle learns the bytes when the guest learns that they were written.
    Write {
        sector: u64,
        bytes: Vec<u8>,
    },
    Zeroes {
        sector: u64,
        sectors: u64,
    },
    /// Discarded blocks read back zero on this controller.
    Flush,
    /// Its device lost its cache meanwhile: it may fail.
    DoubtfulFlush,
    Id,
    Refused(u8),
}

struct World {
    rng: Rng,
    rig: Rig,
    guests: Vec<RigGuest>,
    in_flight: Vec<HashMap<u16, Expected>>,
    /// What each block holds, as 512-byte sectors.
    disk: Vec<u8>,
    /// Sectors that a request in flight may change or is reading: the next request stays off them.
    busy: Vec<bool>,
    sector_step: u64,
    finished: u64,
    /// Now and then the controller breaks, or the device is taken away for a while.
    surprises: bool,
    /// Guests whose next flush may fail: their device has come back without its cache.
    cache_lost: Vec<bool>,
    trace: Vec<String>,
}

impl World {
    fn new(seed: u64, surprises: bool) -> World {
        let mut rng = Rng::new(seed);
        let block_size = *rng.pick(&[512, 4096]);
        let lanes = 1 + rng.below(3);
        let config = ModelConfig {
            size: DISK_BYTES,
            block_size,
            queues: *rng.pick(&[1, 2, 8]),
            mqes: *rng.pick(&[4, 17, 64, 1024]),
            dstrd: *rng.pick(&[0, 3]),
            mdts_bytes: *rng.pick(&[None, Some(8192), Some(64 << 10), Some(1 << 20)]),
            vwc: rng.one_in(2),
            // Commands complete out of order, in the controller's own time.
            jitter: Duration::from_micros(*rng.pick(&[0, 3, 20])),
            clock: Clock::Turns,
            seed,
            ..ModelConfig::default()
        };
        let mut rig = Rig::new(config);
        let guests: Vec<RigGuest> = (0..lanes)
            .map(|_| {
                rig.add_guest(&GuestSetup {
                    layout: *rng.pick(&[RingLayout::Split, RingLayout::Packed]),
                    queue_size: *rng.pick(&[8, 64, 256]),
                    event_idx: rng.one_in(2),
                    indirect: rng.one_in(2),
                    max_data: MAX_DATA,
                    first_index: *rng.pick(&[0, 65_500]),
                    regions: 1 + rng.below(3),
                    write_through: rng.one_in(4),
                    ..GuestSetup::default()
                })
            })
            .collect();
        World {
            in_flight: guests.iter().map(|_| HashMap::new()).collect(),
            surprises,
            cache_lost: vec![false; guests.len()],
            rng,
            rig,
            guests,
            disk: vec![0; DISK_BYTES as usize],
            busy: vec![false; (DISK_BYTES / SECTOR) as usize],
            sector_step: u64::from(block_size) / SECTOR,
            finished: 0,
            trace: Vec::new(),
        }
    }

    fn note(&mut self, line: String) {
        if self.trace.len() == 40 {
            self.trace.remove(0);
        }
        self.trace.push(line);
    }

    /// A run of sectors that no request in flight touches, marked busy.
    fn claim(&mut self, max_sectors: u64) -> Option<(u64, u64)> {
        let total = DISK_BYTES / SECTOR / self.sector_step;
        let count = 1 + self.rng.below((max_sectors / self.sector_step).max(1));
        let first = self.rng.below(total.saturating_sub(count).max(1));
        let (sector, sectors) = (first * self.sector_step, count * self.sector_step);
        let range = sector as usize..(sector + sectors) as usize;
        if range.end > self.busy.len() || self.busy[range.clone()].iter().any(|busy| *busy) {
            return None;
        }
        self.busy[range].fill(true);
        Some((sector, sectors))
    }

    fn release(&mut self, sector: u64, sectors: u64) {
        self.busy[sector as usize..(sector + sectors) as usize].fill(false);
    }

    fn submit(&mut self, at: usize) {
        let max_sectors = if self.rng.one_in(4) {
            u64::from(MAX_DATA) / SECTOR - 16
        } else {
            32
        };
        let kind = self.rng.below(20);
        let (mut request, data, expected) = match kind {
            0..=7 => {
                let Some((sector, sectors)) = self.claim(max_sectors) else {
                    return;
                };
                let len = (sectors * SECTOR) as u32;
                let request = SimRequest::new(request_type::IN, sector, len, true);
                (request, Vec::new(), Expected::Read { sector, len })
            }
            8..=14 => {
                let Some((sector, sectors)) = self.claim(max_sectors) else {
                    return;
                };
                let mut bytes = vec![0; (sectors * SECTOR) as usize];
                self.rng.fill(&mut bytes);
                let request = SimRequest::new(request_type::OUT, sector, bytes.len() as u32, false);
                (request, bytes.clone(), Expected::Write { sector, bytes })
            }
            15 => (
                SimRequest::new(request_type::FLUSH, 0, 0, false),
                Vec::new(),
                Expected::Flush,
            ),
            16 => (
                SimRequest::new(request_type::GET_ID, 0, 20, true),
                Vec::new(),
                Expected::Id,
            ),
            17 | 18 => {
                let Some((sector, sectors)) = self.claim(max_sectors) else {
                    return;
                };
                let discard = kind == 17;
                let segment = RangeSegment {
                    sector: sector.into(),
                    num_sectors: (sectors as u32).into(),
                    flags: u32::from(!discard && self.rng.one_in(2)).into(),
                };
                let kind = if discard {
                    request_type::DISCARD
                } else {
                    request_type::WRITE_ZEROES
                };
                let request = SimRequest::new(kind, 0, 16, false);
                (
                    request,
                    segment.as_bytes().to_vec(),
                    Expected::Zeroes { sector, sectors },
                )
            }
            _ => {
                let total = DISK_BYTES / SECTOR;
                let (kind, sector, want) = *self.rng.pick(&[
                    (request_type::IN, total, status::IOERR),
                    (request_type::IN, total - 1, status::IOERR),
                    (request_type::OUT, u64::MAX - 7, status::IOERR),
                    (request_type::OUT, 1 << 55, status::IOERR),
                    (77, 0, status::UNSUPP),
                ]);
                let request = SimRequest::new(kind, sector, 4096, kind == request_type::IN);
                (request, Vec::new(), Expected::Refused(want))
            }
        };
        request.framing = *self
            .rng
            .pick(&[Framing::Plain, Framing::SplitHeader, Framing::Joined]);
        if request.data_len > 0 {
            // No driver may build a chain that is longer than its queue: three for the header, one for the status.
            let most = u64::from(self.guests[at].queue_size - 4).min(8);
            let most = most.min(u64::from(request.data_len));
            request.pieces = 1 + self.rng.below(most) as u16;
            // Mostly where a kernel puts its buffers, now and then where it hurts.
            request.data_offset = *self.rng.pick(&[0, 0, 0, 512, 1024, 4, 1, 3]);
        }
        if self.guests[at].indirect && self.rng.one_in(2) {
            request.direct = Some(self.rng.below(3) as u16);
        }
        match self.guests[at].driver.submit(&request, &data) {
            Some(head) => {
                self.note(format!("guest {at} head {head}: {request:?}"));
                assert!(
                    self.in_flight[at].insert(head, expected).is_none(),
                    "head {head} reused"
                );
            }
            None => self.forget(&expected),
        }
    }

    /// The ring was full: nothing was asked.
    fn forget(&mut self, expected: &Expected) {
        match expected {
            Expected::Read { sector, len } => self.release(*sector, u64::from(*len) / SECTOR),
            Expected::Write { sector, bytes } => self.release(*sector, bytes.len() as u64 / SECTOR),
            Expected::Zeroes { sector, sectors } => self.release(*sector, *sectors),
            Expected::Flush | Expected::DoubtfulFlush | Expected::Id | Expected::Refused(_) => {}
        }
    }

    fn collect(&mut self, at: usize) {
        while let Some(completion) = self.guests[at].driver.poll_used() {
            let head = completion.head;
            let expected = self.in_flight[at]
                .remove(&head)
                .expect("a head that was not sent");
            self.finished += 1;
            self.forget(&expected);
            let ok = |what: &str| {
                assert_eq!(
                    completion.status,
                    status::OK,
                    "{what} of guest {at} head {head}"
                )
            };
            match expected {
                Expected::Read { sector, len } => {
                    ok("read");
                    assert_eq!(completion.used_len, len + 1);
                    let mut bytes = vec![0; len as usize];
                    self.guests[at].driver.read_data(head, &mut bytes);
                    let start = (sector * SECTOR) as usize;
                    let want = &self.disk[start..start + len as usize];
                    let wrong = bytes.iter().zip(want).position(|(a, b)| a != b);
                    assert_eq!(
                        wrong, None,
                        "guest {at} head {head}: sector {sector} len {len} reads back wrong"
                    );
                }
                Expected::Write { sector, bytes } => {
                    ok("write");
                    assert_eq!(completion.used_len, 1);
                    let start = (sector * SECTOR) as usize;
                    self.disk[start..start + bytes.len()].copy_from_slice(&bytes);
                }
                Expected::Zeroes { sector, sectors } => {
                    ok("discard or write zeroes");
                    let start = (sector * SECTOR) as usize;
                    self.disk[start..start + (sectors * SECTOR) as usize].fill(0);
                }
                Expected::DoubtfulFlush => {}
                Expected::Flush if completion.status == status::IOERR && self.cache_lost[at] => {
                    self.cache_lost[at] = false;
                }
                Expected::Flush => ok("flush"),
                Expected::Id => {
                    ok("get id");
                    let mut id = [0; 20];
                    self.guests[at].driver.read_data(head, &mut id);
                    assert_eq!(&id, common::rig::SERIAL);
                }
                Expected::Refused(want) => assert_eq!(completion.status, want),
            }
        }
    }

    fn control(
        &mut self,
        action: impl FnOnce(&mut dyn DeviceControl, &mut Pollers) -> Result<(), DeviceError>,
    ) {
        let pollers = &mut self.rig.pollers;
        let done = self
            .rig
            .device
            .with_control(|control| action(control, pollers));
        done.unwrap();
    }

    /// Whatever happens to the device, requests only take longer.
    fn surprise(&mut self) {
        let what = self.rng.below(4);
        self.note(format!("surprise {what}"));
        let (pull, orderly) = (what == 2, what == 3);
        if what == 1 {
            self.rig.model.break_down();
            self.rig.turn();
        }
        if what < 2 {
            return self.control(|control, pollers| control.recover(pollers));
        }
        if pull {
            self.rig.model.pull_out();
            self.rig.turn();
        }
        self.control(|control, pollers| {
            control.give_up(pollers, orderly, Service::Hold);
            Ok(())
        });
        for _ in 0..self.rng.below(20) {
            self.rig.turn();
            // What is at no device must not end; what was refused, or had ended before, may.
            (0..self.guests.len()).for_each(|at| self.collect(at));
        }
        self.control(|control, pollers| control.regain(pollers));
        self.cache_lost.fill(true);
        for expected in self.in_flight.iter_mut().flat_map(HashMap::values_mut) {
            if matches!(expected, Expected::Flush) {
                *expected = Expected::DoubtfulFlush;
            }
        }
    }

    fn run(&mut self, steps: u64) {
        for _ in 0..steps {
            if self.surprises && self.rng.one_in(30) {
                self.surprise();
            }
            let at = self.rng.below(self.guests.len() as u64) as usize;
            for _ in 0..self.rng.below(6) {
                self.submit(at);
            }
            self.guests[at].driver.publish();
            for _ in 0..self.rng.below(3) {
                self.rig.turn();
            }
            self.collect(at);
        }
        // Liveness: with no new requests everything ends, and the lanes come back empty.
        for _ in 0..100_000 {
            if self.in_flight.iter().all(HashMap::is_empty) {
                break;
            }
            self.rig.turn();
            (0..self.guests.len()).for_each(|at| self.collect(at));
        }
        assert!(
            self.in_flight.iter().all(HashMap::is_empty),
            "requests never ended: {:?}",
            self.in_flight
        );
    }

    /// Every sector, as the medium holds it.
    fn compare_medium(&self) {
        let medium = self.rig.medium(DISK_BYTES as usize);
        let wrong = medium.iter().zip(&self.disk).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "the medium differs from the oracle");
    }
}

fn run_seed(seed: u64, steps: u64, surprises: bool) -> u64 {
    let world = std::sync::Mutex::new(World::new(seed, surprises));
    let result = std::panic::catch_unwind(|| {
        let mut world = world.lock().unwrap();
        world.run(steps);
        world.compare_medium();
        world.finished
    });
    let world = world
        .into_inner()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    let finished = result.unwrap_or_else(|_| {
        panic!(
            "seed {seed} failed after {} requests; the last ones:\n{}",
            world.finished,
            world.trace.join("\n")
        )
    });
    world.rig.finish();
    finished
}

fn run_seeds(surprises: bool) {
    let seeds = std::env::var("TANDEM_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(100);
    let finished: u64 = (0..seeds).map(|seed| run_seed(seed, 400, surprises)).sum();
    assert!(
        finished > seeds * 100,
        "only {finished} requests in {seeds} seeds: the world does nothing"
    );
}

#[test]
fn world_of_any_seed_keeps_every_block() {
    run_seeds(false);
}

#[test]
fn world_whose_device_breaks_and_comes_back_ends_every_request_once() {
    run_seeds(true);
}

/// Writes, now and then a flush; the power fails with nothing in flight. I11: what was written before a completed flush
/// is there, and with write-through all of it.
fn lose_power(seed: u64, write_through: bool) -> usize {
    const SECTORS: u64 = 256;
    let mut rng = Rng::new(seed);
    let mut rig = Rig::new(ModelConfig {
        size: SECTORS * SECTOR,
        queues: 1,
        track_durability: true,
        mdts_bytes: Some(8192),
        seed,
        ..ModelConfig::default()
    });
    let mut guest = rig.add_guest(&GuestSetup {
        write_through,
        ..GuestSetup::default()
    });
    // What each sector may hold after the failure: the last durable value first.
    let mut history: Vec<Vec<u8>> = vec![vec![0]; SECTORS as usize];
    for round in 1..=200_u8 {
        let flush = rng.one_in(10);
        let (request, data) = if flush {
            (
                SimRequest::new(request_type::FLUSH, 0, 0, false),
                Vec::new(),
            )
        } else {
            let sector = rng.below(SECTORS - 40);
            let sectors = 1 + rng.below(40);
            let data = vec![round; (sectors * SECTOR) as usize];
            for held in &mut history[sector as usize..(sector + sectors) as usize] {
                if write_through {
                    held.clear();
                }
                held.push(round);
            }
            let mut request = SimRequest::new(request_type::OUT, sector, data.len() as u32, false);
            // Split at MDTS, and some of it bounced.
            request.data_offset = *rng.pick(&[0, 0, 3]);
            (request, data)
        };
        guest.driver.submit(&request, &data).unwrap();
        guest.driver.publish();
        let mut turns = 0;
        let completion = loop {
            rig.turn();
            turns += 1;
            assert!(turns < 1000, "seed {seed}: a request does not end");
            if let Some(completion) = guest.driver.poll_used() {
                break completion;
            }
        };
        assert_eq!(completion.status, status::OK);
        if flush {
            history.iter_mut().for_each(|held| {
                held.drain(..held.len() - 1);
            });
        }
    }
    let lost = rig.model.fail_power();
    let medium = rig.medium((SECTORS * SECTOR) as usize);
    for (sector, held) in history.iter().enumerate() {
        let byte = medium[sector * SECTOR as usize];
        assert!(
            held.contains(&byte),
            "seed {seed}: sector {sector} holds {byte}, it may hold {held:?}"
        );
    }
    rig.finish();
    lost
}

#[test]
fn power_failure_after_a_flush_loses_nothing_that_was_written_before_it() {
    let lost: usize = (0..32).map(|seed| lose_power(seed, false)).sum();
    assert!(
        lost > 0,
        "the controller lost nothing: the test shows nothing"
    );
}

#[test]
fn power_failure_with_write_through_loses_nothing() {
    assert_eq!((0..32).map(|seed| lose_power(seed, true)).sum::<usize>(), 0);
}

#[test]
fn command_that_the_device_fails_ends_its_request_with_ioerr_and_no_other() {
    let mut rig = Rig::new(ModelConfig {
        size: DISK_BYTES,
        queues: 1,
        mdts_bytes: Some(8192),
        ..ModelConfig::default()
    });
    let mut guest = rig.add_guest(&GuestSetup::default());
    let (read, write) = (request_type::IN, request_type::OUT);
    let error = Status::UNRECOVERED_READ_ERROR.with_dnr();
    for (kind, opcode, len, offset) in [
        (read, io_opcode::READ, 4096, 0),     // one command
        (read, io_opcode::READ, 64 << 10, 0), // eight of them, the first fails
        (read, io_opcode::READ, 64 << 10, 3), // bounced
        (write, io_opcode::WRITE, 4096, 0),
        (write, io_opcode::WRITE, 64 << 10, 0),
        (request_type::FLUSH, io_opcode::FLUSH, 0, 0),
    ] {
        let mut request = SimRequest::new(kind, 0, len, kind == read);
        request.data_offset = offset;
        let expected = [status::IOERR, status::OK, status::OK];
        assert!(rig.model.fail_next(opcode, error));
        let heads = expected.map(|_| guest.driver.submit(&request, &[]).unwrap());
        guest.driver.publish();
        let mut ended = HashMap::new();
        for _ in 0..1000 {
            rig.turn();
            while let Some(completion) = guest.driver.poll_used() {
                assert!(ended.insert(completion.head, completion).is_none());
            }
        }
        for (head, status) in heads.iter().zip(expected) {
            let completion = ended[head];
            assert_eq!(completion.status, status, "type {kind} length {len}");
            // A read that failed wrote no data that counts, and its status lies behind it.
            let used = match (status, kind == read) {
                (status::OK, true) => len + 1,
                (_, true) => 0,
                _ => 1,
            };
            assert_eq!(completion.used_len, used, "type {kind} length {len}");
        }
    }
    rig.finish();
}

#[test]
fn bounced_read_of_a_device_that_returns_nothing_gives_zeroes_and_no_other_guests_bytes() {
    let mut rig = Rig::new(ModelConfig {
        medium: Medium::Null,
        size: DISK_BYTES,
        queues: 1,
        ..ModelConfig::default()
    });
    // Both ride on one queue pair, whose bounce buffers they share.
    let mut victim = rig.add_guest(&GuestSetup::default());
    let mut other = rig.add_guest(&GuestSetup::default());
    let mut request = SimRequest::new(request_type::OUT, 0, 4096, false);
    request.data_offset = 3;
    for _ in 0..20 {
        victim.driver.submit(&request, &[0x5e; 4096]).unwrap();
        victim.driver.publish();
        while victim.driver.poll_used().is_none() {
            rig.turn();
        }
    }
    (request.request_type, request.data_writable) = (request_type::IN, true);
    let head = other.driver.submit(&request, &[]).unwrap();
    other.driver.publish();
    let completion = loop {
        rig.turn();
        if let Some(completion) = other.driver.poll_used() {
            break completion;
        }
    };
    assert_eq!((completion.head, completion.status), (head, status::OK));
    let mut bytes = [1; 4096];
    other.driver.read_data(head, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0), "{:?}", &bytes[..8]);
    rig.finish();
}
