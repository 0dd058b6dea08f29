//! COMPARE AND WRITE against everybody else: other hosts of the logical unit on other cores, writes that come in between,
//! task management, a device that is lost. And the cache that is switched off under writes.

use std::sync::atomic::{AtomicBool, Ordering};

use super::*;

const MISCOMPARE: (u8, u8, u8) = (0xe, 0x1d, 0);
/// A seat at the lock that no host has.
const STRANGER: usize = 9;

fn compare_and_write(lba: u8, blocks: u8) -> [u8; 16] {
    let mut cdb = [0; 16];
    (cdb[0], cdb[9], cdb[13]) = (0x89, lba, blocks);
    cdb
}

fn host(storage: &Storage, number: usize) -> Host {
    Host::of(storage, number, Sizes::DEFAULT, (32, 96))
}

/// Turns in which nothing comes back.
fn stays_out(host: &mut Host) {
    for _ in 0..5000 {
        host.turn();
    }
    assert_eq!(host.requests.take_used(), None);
}

#[test]
fn compare_and_write_writes_only_what_it_has_found() {
    let mut host = Host::new();
    let old: Vec<u8> = (0..1024_u32).map(|at| (at / 3) as u8).collect();
    let new = vec![0x5a; 1024];
    assert_eq!(host.command(FIRST, &write_10(8, 2), &old, 0), good(0, 0));
    for place in [0, 700, 1023] {
        let mut other = old.clone();
        other[place] ^= 4;
        let data = [other, new.clone()].concat();
        let reply = host.command(FIRST, &compare_and_write(8, 2), &data, 0);
        assert_eq!((reply.status, reply.sense), (2, Some(MISCOMPARE)));
        assert_eq!(host.information(host.last_head()), Some(place as u32));
        assert_eq!(host.medium(1, 8, 1024), old);
    }
    let data = [old, new.clone()].concat();
    let fua = host.model.io_counters().fua_writes;
    let mut cdb = compare_and_write(8, 2);
    cdb[1] = 0x08;
    assert_eq!(host.command(FIRST, &cdb, &data, 0), good(0, 0));
    assert_eq!(host.medium(1, 8, 1024), new);
    assert_eq!(host.model.io_counters().fua_writes, fua + 1);
    // Half of the data is not enough.
    assert_eq!(
        host.command(FIRST, &compare_and_write(8, 2), &data[..2047], 0),
        refused(OVERRUN)
    );
    // A read or a write that fails gives the blocks back: the next command has them.
    for opcode in [io_opcode::READ, io_opcode::WRITE] {
        let status = Status::INTERNAL_ERROR.with_dnr();
        assert!(host.model.fail_next(opcode, status));
        let data = [new.clone(), new.clone()].concat();
        let reply = host.command(FIRST, &compare_and_write(8, 2), &data, 0);
        assert_eq!(reply, check(4, 0x44, 0, 2048));
    }
    assert_eq!(host.command(FIRST, &write_10(8, 2), &new, 0), good(0, 0));
    host.finish();
}

/// Where a request takes several entries of the ring.
#[test]
fn compare_and_write_in_a_packed_ring_waits_for_no_entry_of_its_own() {
    let storage = Storage {
        layout: RingLayout::Packed,
        ..Storage::new(ModelConfig::default())
    };
    let mut host = host(&storage, 0);
    let (old, new) = ([1; 512], [2; 512]);
    assert_eq!(host.command(FIRST, &write_10(8, 1), &old, 0), good(0, 0));
    let reply = host.command(FIRST, &compare_and_write(8, 1), &[old, new].concat(), 0);
    assert_eq!(reply, good(0, 0));
    assert_eq!(host.command(FIRST, &read_10(8, 1), &[], 512), good(0, 512));
    assert_eq!(host.data(host.last_head(), 512), new);
    host.finish();
}

#[test]
fn writes_to_locked_blocks_wait_and_nothing_else_does() {
    let storage = Storage::new(ModelConfig::default());
    let lock = storage.units[0].lock();
    let mut hosts = [host(&storage, 0), host(&storage, 1)];
    let mut list = vec![0, 22, 0, 16, 0, 0, 0, 0];
    list.extend(12_u64.to_be_bytes());
    list.extend([0, 0, 0, 1, 0, 0, 0, 0]);
    let same = [0x41, 0, 0, 0, 0, 10, 0, 0, 5, 0];
    let zeroes = [0x93, 1, 0, 0, 0, 0, 0, 0, 0, 11, 0, 0, 0, 1, 0, 0];
    let verify = [0x2e, 2, 0, 0, 0, 13, 0, 0, 1, 0];
    let waiting: [(&[u8], &[u8]); 6] = [
        (&write_10(13, 1), &[1; 512]),
        (&same, &[2; 512]),
        (&zeroes, &[]),
        (&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], &list),
        (&verify, &[3; 512]),
        (&compare_and_write(2, 1), &[0; 1024]),
    ];
    for (cdb, data) in waiting {
        lock.enter(STRANGER);
        assert!(lock.acquire(STRANGER));
        lock.hold(10, 4);
        let sent = hosts[0].send(FIRST, cdb, data, 0);
        stays_out(&mut hosts[0]);
        // Reads, other blocks, another unit.
        let other = &mut hosts[1];
        assert_eq!(
            other.command(FIRST, &read_10(10, 4), &[], 2048),
            good(0, 2048)
        );
        assert_eq!(
            other.command(FIRST, &write_10(14, 1), &[9; 512], 0),
            good(0, 0)
        );
        assert_eq!(
            other.command(SECOND, &write_10(10, 1), &[9; 512], 0),
            good(0, 0)
        );
        // Task management ends what waits, and nothing is done for it any more.
        hosts[0].ask(&Host::task(5, FIRST), 1);
        for _ in 0..3000 {
            hosts.iter_mut().for_each(Host::turn);
        }
        let (head, used_len) = hosts[0].comes_back();
        let reset = Reply {
            residual: data.len() as u32,
            ..refused(RESET)
        };
        assert_eq!((head, hosts[0].reply(head, used_len)), (sent, reset));
        assert_eq!(hosts[0].answered().1[0], OK);
        // A reset is told to everybody.
        for host in &mut hosts {
            assert_eq!(host.command(FIRST, &[0; 6], &[], 0), check(6, 0x29, 3, 0));
        }
        let sent = hosts[0].send(FIRST, cdb, data, 0);
        stays_out(&mut hosts[0]);
        lock.release(STRANGER);
        // Of the other host a compare wants to know that it is quiet.
        for _ in 0..3000 {
            hosts.iter_mut().for_each(Host::turn);
        }
        let (head, used_len) = hosts[0].comes_back();
        assert_eq!((head, hosts[0].reply(head, used_len)), (sent, good(0, 0)));
    }
    hosts.into_iter().for_each(Host::finish);
}

#[test]
fn compare_and_write_waits_for_writes_that_were_there_before() {
    let config = ModelConfig {
        latency: Duration::from_millis(20),
        ..ModelConfig::default()
    };
    let storage = Storage::new(config);
    let [mut first, mut second] = [host(&storage, 0), host(&storage, 1)];
    // At the device, from another host, when the compare is to begin.
    second.send(FIRST, &write_10(5, 1), &[7; 512], 0);
    second.turn();
    first.send(
        FIRST,
        &compare_and_write(5, 1),
        &[[7; 512], [8; 512]].concat(),
        0,
    );
    let start = Instant::now();
    let mut ended = [false; 2];
    while ended != [true; 2] && start.elapsed() < DEADLINE {
        for (host, ended) in [&mut first, &mut second].into_iter().zip(&mut ended) {
            host.turn();
            if let Some((head, len)) = host.requests.take_used() {
                assert_eq!(host.reply(head as u16, len), good(0, 0));
                *ended = true;
            }
        }
    }
    assert_eq!(ended, [true; 2]);
    assert_eq!(first.medium(1, 5, 512), [8; 512]);
    // A host that does nothing holds up nobody for long.
    let data = [[8; 512], [9; 512]].concat();
    first.send(FIRST, &compare_and_write(5, 1), &data, 0);
    let start = Instant::now();
    while first.requests.take_used().is_none() {
        assert!(start.elapsed() < DEADLINE);
        first.turn();
        second.turn();
    }
    first.finish();
    // Nor does one that has gone.
    let [mut third, fourth] = [host(&storage, 2), host(&storage, 3)];
    second.finish();
    fourth.finish();
    let data = [[9; 512], [1; 512]].concat();
    assert_eq!(
        third.command(FIRST, &compare_and_write(5, 1), &data, 0),
        good(0, 0)
    );
    third.finish();
}

#[test]
fn lock_of_a_lost_device_is_given_back() {
    let storage = Storage::new(ModelConfig::default());
    let lock = storage.units[0].lock();
    let mut host = host(&storage, 0);
    lock.enter(STRANGER);
    assert!(lock.acquire(STRANGER));
    host.send(FIRST, &compare_and_write(5, 1), &[0; 1024], 0);
    stays_out(&mut host);
    host.poller.as_mut().unwrap().suspend(Service::Fail);
    let (head, used_len) = host.comes_back();
    assert_eq!(host.reply(head, used_len), check(0xb, 0x0b, 8, 1024));
    lock.release(STRANGER);
    lock.enter(STRANGER + 1);
    assert!(lock.acquire(STRANGER + 1));
}

/// What is in blocks 0 and 1, in words. A read that meets a write may find some of either.
fn words(host: &mut Host) -> Vec<u64> {
    let reply = host.command(FIRST, &read_10(0, 2), &[], 1024);
    assert_eq!(reply, good(0, 1024));
    let bytes = host.data(host.last_head(), 1024);
    let words = bytes.as_chunks::<8>().0.iter();
    words.map(|word| u64::from_le_bytes(*word)).collect()
}

/// Compares the blocks with what the first word says, and if they are that counts it up.
fn increment(host: &mut Host) -> bool {
    let count = words(host)[0];
    let data = [block_of(count), block_of(count + 1)].concat();
    let reply = host.command(FIRST, &compare_and_write(0, 2), &data, 0);
    if let Some(sense) = reply.sense {
        assert_eq!(sense, MISCOMPARE);
    }
    reply.sense.is_none()
}

fn block_of(count: u64) -> Vec<u8> {
    count.to_le_bytes().repeat(128)
}

/// Three hosts count in the same two blocks, each on a thread of its own, and a fourth writes there without comparing: a
/// generation in the upper half. No increment is lost, and no generation is undone by a count that began before it.
#[test]
fn counter_that_all_hosts_increment_loses_nothing() {
    const ROUNDS: u64 = 20;
    const GENERATION: u64 = 1 << 32;
    let storage = Storage::new(slow());
    // Nobody overwrites: every increment is there.
    let count = |number| {
        let mut host = host(&storage, number);
        let mut misses = 0;
        for _ in 0..ROUNDS {
            while !increment(&mut host) {
                misses += 1;
            }
        }
        // It leaves, so that nobody waits for it.
        host.finish();
        misses
    };
    let misses: u64 = std::thread::scope(|scope| {
        let count = &count;
        let threads = [0, 1, 2].map(|number| scope.spawn(move || count(number)));
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .sum()
    });
    assert!(misses > 0, "they never met");
    let mut last = host(&storage, 3);
    assert_eq!(words(&mut last), [3 * ROUNDS; 128]);
    last.finish();

    let storage = Storage::new(slow());
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (storage, done) = (&storage, &done);
        let counters = [0, 1, 2].map(|number| {
            scope.spawn(move || {
                let mut host = host(storage, number);
                while !done.load(Ordering::Relaxed) {
                    increment(&mut host);
                }
                host.finish();
            })
        });
        let mut writer = host(storage, 3);
        let mut counted = 0;
        for generation in 1..=20 {
            let data = block_of(generation * GENERATION);
            assert_eq!(writer.command(FIRST, &write_10(0, 2), &data, 0), good(0, 0));
            // Until somebody has counted on, and a while if nobody does.
            for _ in 0..100 {
                let words = words(&mut writer);
                let kept = words.iter().all(|word| word / GENERATION == generation);
                assert!(kept, "write {generation} was undone: {words:x?}");
                if !words[0].is_multiple_of(GENERATION) {
                    counted += 1;
                    break;
                }
            }
        }
        assert!(counted > 0, "hardly anybody counted meanwhile: {counted}");
        done.store(true, Ordering::Relaxed);
        writer.finish();
        counters
            .into_iter()
            .for_each(|thread| thread.join().unwrap());
    });
}

/// Commands stay at the device for a while, and complete out of order.
fn slow() -> ModelConfig {
    ModelConfig {
        latency: Duration::from_micros(5),
        jitter: Duration::from_micros(40),
        ..ModelConfig::default()
    }
}

#[test]
fn cache_that_is_switched_off_is_flushed_when_all_writes_have_ended() {
    let config = ModelConfig {
        latency: Duration::from_millis(10),
        ..ModelConfig::default()
    };
    let storage = Storage::new(config);
    let [mut first, mut second] = [host(&storage, 0), host(&storage, 1)];
    second.send(FIRST, &write_10(5, 1), &[7; 512], 0);
    second.turn();
    let before = storage.model.io_counters();
    let mut off = vec![0, 0, 0, 0, 0x08, 0x12];
    off.resize(24, 0);
    first.send(FIRST, &[0x15, 0x10, 0, 0, 24, 0], &off, 0);
    // The write is still there: no flush yet, however long.
    stays_out(&mut first);
    assert_eq!(storage.model.io_counters().flushes, before.flushes);
    let (head, used_len) = second.comes_back();
    assert_eq!(second.reply(head, used_len), good(0, 0));
    second.turn();
    let (head, used_len) = first.comes_back();
    assert_eq!(first.reply(head, used_len), good(0, 0));
    let after = storage.model.io_counters();
    assert_eq!(after.flushes, before.flushes + 1);
    // From then on each write is durable, whoever sends it.
    assert_eq!(second.command(FIRST, &[0; 6], &[], 0), check(6, 0x2a, 1, 0));
    for host in [&mut first, &mut second] {
        assert_eq!(
            host.command(FIRST, &write_10(5, 1), &[7; 512], 0),
            good(0, 0)
        );
    }
    assert_eq!(storage.model.io_counters().fua_writes, after.fua_writes + 2);
    // The other unit has its own cache.
    assert_eq!(
        first.command(SECOND, &write_10(5, 1), &[7; 512], 0),
        good(0, 0)
    );
    assert_eq!(storage.model.io_counters().fua_writes, after.fua_writes + 2);
    first.finish();
    second.finish();
}

#[test]
fn sense_data_is_in_the_format_that_the_control_page_says() {
    let mut host = Host::new();
    let list = [0, 0, 0, 0, 0x0a, 0x0a, 0x04, 0x10, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(
        host.command(FIRST, &[0x15, 0x10, 0, 0, 16, 0], &list, 0),
        good(0, 0)
    );
    let sense = |host: &mut Host, cdb: &[u8], data_in| {
        let sent = host.send(FIRST, cdb, &[], data_in);
        let (head, _) = host.comes_back();
        assert_eq!(head, sent);
        let mut bytes = [0; 12 + 32];
        host.requests
            .read(Gpa(Host::slot(head) + 0x400), &mut bytes);
        bytes[12..12 + bytes[0] as usize].to_vec()
    };
    assert_eq!(
        sense(&mut host, &[0xff; 6], 0),
        [0x72, 5, 0x20, 0, 0, 0, 0, 0]
    );
    // The device's words, with the block: 64 bits have room here.
    let status = Status::UNRECOVERED_READ_ERROR.with_dnr();
    assert!(host.model.fail_next(io_opcode::READ, status));
    assert_eq!(
        sense(&mut host, &read_10(77, 1), 512),
        [
            0x72, 3, 0x11, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 77
        ]
    );
    host.poller.as_mut().unwrap().suspend(Service::Fail);
    assert_eq!(
        sense(&mut host, &read_10(0, 1), 512),
        [0x72, 4, 0x44, 0, 0, 0, 0, 0]
    );
}
