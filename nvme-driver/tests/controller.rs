//! The driver against the software controller: bring-up, admin commands, queues and I/O with odd capabilities.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

use std::time::Duration;

use nvme_driver::dma::{DmaAccess, DmaBuffer, DmaMapping};
use nvme_driver::spec::{
    Cns, FeatureId, LbaRange, LogId, Nsid, PAGE_SIZE, Status, SubmissionEntry, ascii_field,
    io_opcode, offset, oncs,
};
use nvme_driver::transport::{Iova, Transport};
use nvme_driver::{Controller, DataSegment, Enabled, Error, Namespace, QueuePair, SubmitError};
use nvme_model::{Clock, Medium, Model, ModelConfig, ModelHandle};

type Live = Controller<Model, Enabled<Model>>;

fn enable(config: ModelConfig, queue_pairs: u16) -> (Live, ModelHandle) {
    let model = Model::new(config).unwrap();
    let handle = model.handle();
    let controller = Controller::new(model).unwrap().enable(queue_pairs);
    (controller.map_err(|(_, error)| error).unwrap(), handle)
}

fn assert_clean(handle: &ModelHandle) {
    let last = handle.last_driver_error();
    assert_eq!((handle.driver_errors(), last), (0, None));
    assert_eq!(handle.iommu_violations(), 0);
}

/// Polls until one command has completed.
fn finish(queue: &mut QueuePair<Model>) -> Status {
    queue.ring();
    for _ in 0..1_000_000 {
        queue.service();
        if let Some(completion) = queue.poll() {
            return completion.status;
        }
    }
    panic!("the command does not complete");
}

fn whole(buffer: &DmaBuffer, len: u32) -> std::iter::Once<DataSegment> {
    std::iter::once(DataSegment {
        iova: buffer.iova(0),
        len,
    })
}

/// The byte that block `lba` is filled with.
fn pattern(lba: u64) -> u8 {
    (lba.wrapping_mul(0x9e37_79b9) >> 13) as u8
}

#[test]
fn bring_up_with_any_capabilities_moves_data_and_leaves_the_controller_clean() {
    for (mqes, dstrd, mdts, block_size, queues) in [
        (2, 0, Some(8192), 512, 1),
        (3, 4, Some(8192), 4096, 2),
        (17, 15, None, 512, 3),
        (1024, 1, Some(1 << 20), 4096, 64),
        (65536, 0, Some(128 << 10), 512, 5),
    ] {
        let config = ModelConfig {
            size: 4 << 20,
            block_size,
            queues,
            mqes,
            dstrd,
            mdts_bytes: mdts,
            ..ModelConfig::default()
        };
        let (mut controller, handle) = enable(config, 8);
        assert_eq!(controller.granted_queue_pairs(), queues.min(8));
        let most = mdts.unwrap_or(u64::MAX).min(2 << 20);
        assert_eq!(u64::from(controller.max_transfer()), most);
        let mut pairs: Vec<QueuePair<Model>> = (0..controller.granted_queue_pairs())
            .map(|_| controller.create_queue_pair(1024).unwrap())
            .collect();
        assert!(matches!(
            controller.create_queue_pair(16),
            Err(Error::NoQueuePair { .. })
        ));
        let blocks = 4096 / block_size;
        let space = controller.dma_space().clone();
        let mut buffer = DmaBuffer::new(&space, PAGE_SIZE, DmaAccess::Both).unwrap();
        // Several times around each ring, whatever its size.
        let rounds = 3 * u64::from(pairs[0].depth()).min(2000) + 1;
        let pages = (4 << 20) / 4096;
        for round in 0..rounds {
            let count = pairs.len() as u64;
            let queue = &mut pairs[(round % count) as usize];
            let range = LbaRange {
                slba: round % pages * u64::from(blocks),
                blocks,
            };
            buffer.write_bytes(0, &[pattern(range.slba + round); PAGE_SIZE]);
            let write = SubmissionEntry::write(Nsid(1), range, round % 3 == 0);
            queue.submit(write, whole(&buffer, 4096), 4096).unwrap();
            assert_eq!(finish(queue), Status::SUCCESS);
            buffer.write_bytes(0, &[0; PAGE_SIZE]);
            let read = SubmissionEntry::read(Nsid(1), range);
            queue.submit(read, whole(&buffer, 4096), 4096).unwrap();
            assert_eq!(finish(queue), Status::SUCCESS);
            let mut bytes = [0; PAGE_SIZE];
            buffer.read_bytes(0, &mut bytes);
            assert_eq!(bytes, [pattern(range.slba + round); PAGE_SIZE]);
        }
        for queue in pairs {
            assert_eq!(queue.counters().anomalies, 0);
            controller.delete_queue_pair(queue).unwrap();
        }
        drop(buffer);
        let mut disabled = controller.shutdown().map_err(|(_, error)| error).unwrap();
        assert_eq!(disabled.transport().read32(offset::CSTS) & 1, 0);
        assert_clean(&handle);
    }
}

#[test]
fn batches_that_fill_the_queue_again_and_again_complete_each_command_once() {
    for mqes in [2, 3, 8, 64] {
        let config = ModelConfig {
            mqes,
            jitter: Duration::from_micros(40),
            clock: Clock::Turns,
            seed: u64::from(mqes),
            ..ModelConfig::default()
        };
        let (mut controller, handle) = enable(config, 1);
        let mut queue = controller.create_queue_pair(1024).unwrap();
        assert_eq!(u32::from(queue.depth()), mqes - 1);
        let mut outstanding = vec![false; usize::from(queue.depth())];
        let (mut sent, mut done) = (0, 0);
        while done < 5000 {
            while sent < 5000 {
                match queue.submit_without_data(SubmissionEntry::flush(Nsid(1))) {
                    Ok(cid) => {
                        assert!(!std::mem::replace(&mut outstanding[cid.index()], true));
                        sent += 1;
                    }
                    Err(error) => {
                        assert_eq!(error, SubmitError::Full);
                        break;
                    }
                }
            }
            queue.ring();
            queue.service();
            while let Some(completion) = queue.poll() {
                assert!(std::mem::replace(
                    &mut outstanding[completion.cid.index()],
                    false
                ));
                assert!(completion.status.is_success());
                done += 1;
            }
        }
        assert_eq!(queue.outstanding(), 0);
        assert!(queue.counters().sq_doorbells <= 5000);
        controller.delete_queue_pair(queue).unwrap();
        controller.shutdown().map_err(|(_, error)| error).unwrap();
        assert_clean(&handle);
    }
}

#[test]
fn completion_doorbell_is_written_far_less_often_than_commands_complete() {
    let (mut controller, handle) = enable(ModelConfig::default(), 1);
    let mut queue = controller.create_queue_pair(64).unwrap();
    for _ in 0..6400 {
        queue
            .submit_without_data(SubmissionEntry::flush(Nsid(1)))
            .unwrap();
        assert_eq!(finish(&mut queue), Status::SUCCESS);
    }
    let counters = queue.counters();
    assert_eq!((counters.commands, counters.sq_doorbells), (6400, 6400));
    assert!(counters.cq_doorbells < 6400 / 32, "{counters:?}");
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

#[test]
fn flush_write_zeroes_deallocate_compare_and_copy_do_what_they_say() {
    let (mut controller, handle) = enable(ModelConfig::default(), 1);
    assert!(
        controller
            .identity()
            .supports(oncs::COMPARE | oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES)
    );
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let mut buffer = DmaBuffer::new(&space, 32 << 10, DmaAccess::Both).unwrap();
    let medium = |at: u64| {
        let mut bytes = [0; 512];
        handle.media_read(Nsid(1), at * 512, &mut bytes);
        bytes
    };
    buffer.write_bytes(0, &[0xa5; 32 << 10]);
    let all = LbaRange {
        slba: 0,
        blocks: 64,
    };
    let write = SubmissionEntry::write(Nsid(1), all, false);
    queue
        .submit(write, whole(&buffer, 32 << 10), 32 << 10)
        .unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);

    let compare = SubmissionEntry::compare(Nsid(1), all);
    queue
        .submit(compare, whole(&buffer, 32 << 10), 32 << 10)
        .unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    buffer.write_bytes(700, &[0]);
    queue
        .submit(compare, whole(&buffer, 32 << 10), 32 << 10)
        .unwrap();
    assert!(finish(&mut queue).is(Status::COMPARE_FAILURE));

    let middle = LbaRange {
        slba: 10,
        blocks: 3,
    };
    let zeroes = SubmissionEntry::write_zeroes(Nsid(1), middle, true, true);
    queue.submit_without_data(zeroes).unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    assert_eq!(
        [9, 10, 12, 13].map(|at| medium(at)[511]),
        [0xa5, 0, 0, 0xa5]
    );

    let ranges: Vec<LbaRange> = (0..8)
        .map(|i| LbaRange {
            slba: 20 + 4 * i,
            blocks: 2,
        })
        .collect();
    queue
        .submit_deallocate(Nsid(1), ranges.into_iter())
        .unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    assert_eq!(
        [20, 21, 22, 23, 24, 49, 50].map(|at| medium(at)[0]),
        [0, 0, 0xa5, 0xa5, 0, 0, 0xa5]
    );
    let none = std::iter::empty::<LbaRange>();
    assert!(queue.submit_deallocate(Nsid(1), none).is_err());

    // 49 and 50 hold other bytes than each other. Beyond the end of the namespace there is nothing to copy, nor to copy to.
    let source = |slba, blocks| LbaRange { slba, blocks };
    queue
        .submit_copy(Nsid(1), 60, source(49, 2), false)
        .unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    assert_eq!(
        [59, 60, 61, 62].map(|at| medium(at)[0]),
        [0xa5, 0, 0xa5, 0xa5]
    );
    let end = controller.namespace(Nsid(1)).unwrap().blocks;
    for (to, from) in [(0, source(end - 1, 2)), (end - 1, source(0, 2))] {
        queue.submit_copy(Nsid(1), to, from, false).unwrap();
        assert!(finish(&mut queue).is(Status::LBA_OUT_OF_RANGE));
    }
    let identify = controller.identify_namespace(Nsid(1)).unwrap();
    assert_eq!(
        (identify.mssrl.get(), identify.mcl.get(), identify.msrc),
        (128, 128, 127)
    );
    queue
        .submit_copy(Nsid(1), 0, source(1, 129), false)
        .unwrap();
    assert!(finish(&mut queue).is(Status::COMMAND_SIZE_LIMIT_EXCEEDED));

    for nsid in [Nsid(1), Nsid::ALL] {
        queue
            .submit_without_data(SubmissionEntry::flush(nsid))
            .unwrap();
        assert_eq!(finish(&mut queue), Status::SUCCESS);
    }
    let counters = handle.io_counters();
    assert_eq!((counters.flushes, counters.compares), (2, 1));
    assert_eq!((counters.deallocates, counters.deallocated_ranges), (1, 8));
    assert_eq!(counters.copies, 1);
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

#[test]
fn commands_that_the_specification_forbids_end_with_its_statuses() {
    let config = ModelConfig {
        size: 1 << 20,
        namespaces: 2,
        mdts_bytes: Some(8192),
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config, 1);
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let buffer = DmaBuffer::new(&space, 16 << 10, DmaAccess::Both).unwrap();
    let mut status = |entry: SubmissionEntry, bytes: u32| {
        queue.submit(entry, whole(&buffer, bytes), bytes).unwrap();
        finish(&mut queue)
    };
    let range = |slba, blocks| LbaRange { slba, blocks };
    let read = |nsid, slba, blocks| SubmissionEntry::read(Nsid(nsid), range(slba, blocks));
    assert!(status(read(1, 2047, 1), 512).is_success());
    for (entry, want) in [
        (read(1, 2048, 1), Status::LBA_OUT_OF_RANGE),
        (read(1, 2047, 2), Status::LBA_OUT_OF_RANGE),
        (read(1, u64::MAX, 1), Status::LBA_OUT_OF_RANGE),
        (read(3, 0, 1), Status::INVALID_NAMESPACE),
        (read(0, 0, 1), Status::INVALID_NAMESPACE),
        (read(u32::MAX, 0, 1), Status::INVALID_FIELD), // no broadcast here
        (read(1, 0, 32), Status::INVALID_FIELD),       // 16 KiB, MDTS is 8
        (
            SubmissionEntry {
                opcode: 0x7f,
                ..read(1, 0, 1)
            },
            Status::INVALID_OPCODE,
        ),
        (
            SubmissionEntry {
                flags: 0x40, // SGLs
                ..read(1, 0, 1)
            },
            Status::INVALID_FIELD,
        ),
        (
            SubmissionEntry::write_zeroes(Nsid(2), range(2000, 100), false, false),
            Status::LBA_OUT_OF_RANGE,
        ),
    ] {
        let got = status(entry, 512);
        assert!(got.is(want) && !got.may_retry(), "{entry:?}: {got}");
    }
    let unreadable = Status::UNRECOVERED_READ_ERROR.with_dnr();
    assert!(handle.fail_next(io_opcode::READ, unreadable));
    assert!(status(read(1, 0, 1), 512).is(Status::UNRECOVERED_READ_ERROR));
    assert!(status(read(1, 0, 1), 512).is_success());
    // The error log is for admin commands; the SMART log counts what was read.
    assert!(controller.identify_namespace(Nsid(9)).is_err());
    assert_eq!(controller.error_log().unwrap().len(), 1);
    assert_eq!(controller.smart_log().unwrap().host_read_commands[0], 2);
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

#[test]
fn admin_command_of_any_kind_returns_what_the_controller_answers() {
    let config = ModelConfig {
        max_namespaces: 4,
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config, 1);
    assert_eq!(controller.identity().nn.get(), 4);
    let mut buffer = DmaBuffer::new(controller.dma_space(), 8192, DmaAccess::Both).unwrap();
    buffer.write_bytes(0, &[0xa5; 8192]);
    let mut answer = |mut entry: SubmissionEntry, offset: usize| {
        entry.prp1 = buffer.iova(offset).0.into();
        controller.admin_command(entry).unwrap()
    };
    let identify = |nsid| SubmissionEntry::identify(Cns::Namespace, Nsid(nsid));
    let refused = answer(SubmissionEntry::new(0xc0, Nsid::NONE), 0);
    assert_eq!(refused.status, Status::INVALID_OPCODE.with_dnr());
    assert_eq!(answer(identify(5), 0).status.sc(), 0x0b);
    // Inactive is not invalid: zeroes.
    assert_eq!(answer(identify(4), 0).status, Status::SUCCESS);
    // More than the log page has: what follows it is left alone.
    let log = SubmissionEntry::get_log_page(LogId::Smart, Nsid::NONE, 1024);
    assert_eq!(answer(log, 4096).status, Status::SUCCESS);
    let mut bytes = [0; 8192];
    buffer.read_bytes(0, &mut bytes);
    assert_eq!(bytes[..4096], [0; 4096]);
    assert_ne!(bytes[4096..4608], [0xa5; 512]);
    assert_eq!(bytes[4608..], [0xa5; 8192 - 4608]);
    let counts = SubmissionEntry::get_features(FeatureId::NumberOfQueues);
    assert_eq!(controller.admin_command(counts).unwrap().dw0, 0);
    assert_clean(&handle);
}

#[test]
fn command_that_may_succeed_later_is_sent_again_three_times() {
    let (mut controller, handle) = enable(ModelConfig::default(), 1);
    let mut queue = controller.create_queue_pair(4).unwrap();
    let buffer = DmaBuffer::new(controller.dma_space(), PAGE_SIZE, DmaAccess::Both).unwrap();
    let one = LbaRange { slba: 0, blocks: 1 };
    let busy = Status::NAMESPACE_NOT_READY;
    for (failures, last, resent) in [
        (1, Status::SUCCESS, 1),
        (3, Status::SUCCESS, 4),
        (4, busy, 7),
    ] {
        for _ in 0..failures {
            assert!(handle.fail_next(io_opcode::WRITE, busy));
        }
        queue
            .submit(
                SubmissionEntry::write(Nsid(1), one, false),
                whole(&buffer, 512),
                512,
            )
            .unwrap();
        assert!(finish(&mut queue).is(last), "{failures} failures");
        assert_eq!(queue.counters().resent, resent);
    }
    // Nothing is left of them: no identifier is lost, and the next command goes through.
    assert_eq!((queue.outstanding(), queue.room()), (0, queue.depth()));
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

#[test]
fn data_at_an_address_that_was_unmapped_fails_the_command_and_is_counted() {
    let (mut controller, handle) = enable(ModelConfig::default(), 1);
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let gone = DmaBuffer::new(&space, PAGE_SIZE, DmaAccess::Both).unwrap();
    let read_only = DmaBuffer::new(&space, PAGE_SIZE, DmaAccess::DeviceReads).unwrap();
    let (gone_at, read_only_at) = (gone.iova(0), read_only.iova(0));
    drop(gone);
    let one = LbaRange { slba: 0, blocks: 1 };
    for iova in [gone_at, read_only_at] {
        let data = std::iter::once(DataSegment { iova, len: 512 });
        let read = SubmissionEntry::read(Nsid(1), one);
        queue.submit(read, data, 512).unwrap();
        assert!(finish(&mut queue).is(Status::DATA_TRANSFER_ERROR));
    }
    assert_eq!((handle.iommu_violations(), handle.driver_errors()), (2, 0));
    // Reading from it is what it is for.
    let write = SubmissionEntry::write(Nsid(1), one, false);
    queue.submit(write, whole(&read_only, 512), 512).unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    controller.delete_queue_pair(queue).unwrap();
}

#[test]
fn identify_says_what_the_controller_was_made_of() {
    let config = ModelConfig {
        size: 8 << 20,
        namespaces: 3,
        block_size: 4096,
        serial: "S4EWNX0R".to_owned(),
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config.clone(), 4);
    assert_eq!(ascii_field(&controller.identity().sn), "S4EWNX0R");
    assert!(controller.identity().has_volatile_write_cache());
    let active = controller.active_namespaces().unwrap();
    assert_eq!(active, [Nsid(1), Nsid(2), Nsid(3)]);
    let namespaces: Vec<_> = active
        .iter()
        .map(|nsid| controller.namespace(*nsid).unwrap())
        .collect();
    assert!(
        namespaces
            .iter()
            .all(|ns| (ns.blocks, ns.block_size) == (2048, 4096))
    );
    assert_ne!(namespaces[0].ids, namespaces[1].ids);
    assert!(namespaces[0].ids.uuid.is_some());
    assert_eq!(
        controller.feature(FeatureId::VolatileWriteCache).unwrap(),
        1
    );
    assert_eq!(controller.version().to_string(), "1.4.0");
    drop(controller);
    assert_clean(&handle);
    // The same serial number is the same disk.
    let (mut again, _) = enable(config, 4);
    assert_eq!(again.namespace(Nsid(2)).unwrap(), namespaces[1]);
}

#[test]
fn events_are_delivered_once_each_and_requests_armed_again() {
    let (mut controller, handle) = enable(ModelConfig::default(), 1);
    assert_eq!(controller.next_event().unwrap(), None);
    for _ in 0..20 {
        handle.report_changed_namespace(Nsid(1));
        let event = controller.next_event().unwrap().unwrap();
        assert!(event.is_namespace_change());
        assert_eq!(controller.take_changed_namespaces(), [Nsid(1)]);
        assert_eq!(controller.next_event().unwrap(), None);
        assert_eq!(controller.take_changed_namespaces(), []);
    }
    handle.set_critical_warning(0b10);
    let event = controller.next_event().unwrap().unwrap();
    assert_eq!((event.event_type(), event.information()), (1, 1));
    assert_eq!(controller.smart_log().unwrap().critical_warning, 0b10);
    assert_clean(&handle);
}

#[test]
fn namespace_that_grows_says_so_and_has_its_new_blocks_alone() {
    let path = std::env::temp_dir().join(format!("tandem-grows-{}", std::process::id()));
    for medium in [
        Medium::Ram,
        Medium::File { path: path.clone() },
        Medium::Null,
    ] {
        let config = ModelConfig {
            size: 1 << 20,
            medium: medium.clone(),
            ..ModelConfig::default()
        };
        let (mut controller, handle) = enable(config, 1);
        let before = controller.namespace(Nsid(1)).unwrap();
        for (nsid, bytes, reason) in [
            (1, (1 << 20) - 512, "shrinking"),
            (1, (1 << 20) + 511, "blocks have 512 bytes"),
            (2, 2 << 20, "no such namespace"),
            (1, u64::MAX - 511, ""),
        ] {
            // Where nothing is kept there is room for anything.
            if medium == Medium::Null && reason.is_empty() {
                continue;
            }
            let error = handle.resize(Nsid(nsid), bytes).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        }
        assert_eq!(controller.next_event().unwrap(), None);
        assert_eq!(handle.resize(Nsid(1), 3 << 20).unwrap(), 3 << 20);
        assert!(
            controller
                .next_event()
                .unwrap()
                .unwrap()
                .is_namespace_change()
        );
        assert_eq!(controller.take_changed_namespaces(), [Nsid(1)]);
        let now = controller.namespace(Nsid(1)).unwrap();
        assert_eq!(now.blocks, 6144);
        assert_eq!(
            Namespace {
                blocks: before.blocks,
                ..now
            },
            before
        );
        // As large as it is: nothing happens.
        assert_eq!(handle.resize(Nsid(1), 3 << 20).unwrap(), 3 << 20);
        handle.look_at_medium().unwrap();
        assert_eq!(controller.next_event().unwrap(), None);
        if medium != Medium::Null {
            let mut last = [1; 512];
            handle.media_read(Nsid(1), (3 << 20) - 512, &mut last);
            assert_eq!(last, [0; 512]);
        }
        assert_clean(&handle);
    }
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn image_that_somebody_else_makes_longer_is_noticed_when_it_is_looked_at() {
    let path = std::env::temp_dir().join(format!("tandem-longer-{}", std::process::id()));
    let config = ModelConfig {
        size: 1 << 20,
        medium: Medium::File { path: path.clone() },
        ..ModelConfig::default()
    };
    let file = || {
        let mut options = std::fs::OpenOptions::new();
        options.write(true).open(&path).unwrap()
    };
    let (mut controller, handle) = enable(config.clone(), 1);
    file().set_len((2 << 20) + 100).unwrap();
    assert_eq!(controller.next_event().unwrap(), None);
    handle.look_at_medium().unwrap();
    assert!(controller.next_event().unwrap().is_some());
    assert_eq!(controller.namespace(Nsid(1)).unwrap().blocks, 4096);
    file().set_len(1 << 20).unwrap();
    let error = handle.look_at_medium().unwrap_err().to_string();
    assert!(error.contains("shorter"), "{error}");
    assert_eq!(controller.namespace(Nsid(1)).unwrap().blocks, 4096);
    drop((controller, handle));
    // Several share one image, so that none of them can have what is behind the last.
    let shared = ModelConfig {
        size: 512 << 10,
        namespaces: 2,
        max_namespaces: 2,
        ..config
    };
    let (mut controller, handle) = enable(shared, 1);
    handle.look_at_medium().unwrap();
    file().set_len(2 << 20).unwrap();
    for error in [
        handle.look_at_medium().unwrap_err(),
        handle.resize(Nsid(2), 1 << 20).unwrap_err(),
    ] {
        let error = error.to_string();
        assert!(error.contains("equal parts"), "{error}");
    }
    assert_eq!(controller.next_event().unwrap(), None);
    std::fs::remove_file(&path).unwrap();
}

#[test]
fn reset_under_load_stops_the_device_and_it_comes_up_again() {
    let config = ModelConfig {
        latency: Duration::from_secs(3600),
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config, 1);
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let buffer = DmaBuffer::new(&space, PAGE_SIZE, DmaAccess::Both).unwrap();
    let read = SubmissionEntry::read(Nsid(1), LbaRange { slba: 0, blocks: 8 });
    queue.submit(read, whole(&buffer, 4096), 4096).unwrap();
    queue.ring();
    queue.service();
    let disabled = controller.reset().map_err(|(_, error)| error).unwrap();
    queue.service();
    assert_eq!(queue.poll(), None);
    drop((queue, buffer)); // the queue's memory is leaked, and says so
    let again = disabled.enable(1).map_err(|(_, error)| error).unwrap();
    let disabled = again.shutdown().map_err(|(_, error)| error).unwrap();
    drop(disabled);
    assert_clean(&handle);
}

#[test]
fn delete_of_a_queue_pair_with_commands_outstanding_aborts_them() {
    let config = ModelConfig {
        latency: Duration::from_secs(3600),
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config, 1);
    let mut queue = controller.create_queue_pair(16).unwrap();
    queue
        .submit_without_data(SubmissionEntry::flush(Nsid(1)))
        .unwrap();
    queue.ring();
    queue.service();
    controller.delete_queue_pair(queue).unwrap();
    let queue = controller.create_queue_pair(16).unwrap();
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

#[test]
fn controller_that_is_slow_to_become_ready_is_waited_for_and_one_that_never_does_is_not() {
    let slow = ModelConfig {
        timeout_units: 4,
        ready_delay: Duration::from_millis(1900),
        ..ModelConfig::default()
    };
    let (controller, handle) = enable(slow.clone(), 1);
    controller.shutdown().map_err(|(_, error)| error).unwrap();
    assert_clean(&handle);
    let never = ModelConfig {
        ready_delay: Duration::from_secs(60),
        ..slow
    };
    let model = Model::new(never).unwrap();
    let (_, error) = Controller::new(model).unwrap().enable(1).unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[test]
fn memory_of_someone_else_is_reached_through_a_mapping_and_only_while_it_lives() {
    let (mut controller, handle) = enable(ModelConfig::default(), 1);
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let pages = memmap2::MmapOptions::new().len(8192).map_anon().unwrap();
    let pages = memmap2::MmapRaw::from(pages);
    let base = std::ptr::NonNull::new(pages.as_mut_ptr()).unwrap();
    // SAFETY: `pages` owns the mapping and is owned by the DMA mapping; no reference to its bytes is made.
    let mapping =
        unsafe { DmaMapping::new(&space, base, 8192, DmaAccess::Both, Box::new(pages)) }.unwrap();
    // SAFETY: 8 bytes of the mapping, which `mapping` keeps alive.
    unsafe { base.as_ptr().add(4096 - 4).write_bytes(0x77, 8) };
    let data = std::iter::once(DataSegment {
        iova: Iova(mapping.iova().0 + 4096 - 512),
        len: 1024,
    });
    let two = LbaRange { slba: 4, blocks: 2 };
    queue
        .submit(SubmissionEntry::write(Nsid(1), two, false), data, 1024)
        .unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    let mut bytes = [0; 1024];
    handle.media_read(Nsid(1), 4 * 512, &mut bytes);
    assert_eq!(
        bytes[507..517],
        [0, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0x77, 0]
    );
    drop(mapping);
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

#[test]
fn image_file_keeps_what_was_flushed_and_answers_while_it_syncs() {
    let path = std::env::temp_dir().join(format!("nvme-driver-{}.img", std::process::id()));
    let config = ModelConfig {
        medium: Medium::File { path: path.clone() },
        size: 4 << 20,
        namespaces: 2,
        ..ModelConfig::default()
    };
    let block = LbaRange { slba: 5, blocks: 8 };
    {
        let (mut controller, handle) = enable(config.clone(), 1);
        let mut queue = controller.create_queue_pair(16).unwrap();
        let space = controller.dma_space().clone();
        let mut buffer = DmaBuffer::new(&space, PAGE_SIZE, DmaAccess::Both).unwrap();
        for nsid in [1, 2] {
            buffer.write_bytes(0, &[nsid as u8 + 0x40; PAGE_SIZE]);
            let write = SubmissionEntry::write(Nsid(nsid), block, nsid == 2);
            queue.submit(write, whole(&buffer, 4096), 4096).unwrap();
            queue.ring();
            let status = loop {
                queue.service();
                if let Some(completion) = queue.poll() {
                    break completion.status;
                }
                std::thread::yield_now();
            };
            assert_eq!(status, Status::SUCCESS);
        }
        let zeroes =
            SubmissionEntry::write_zeroes(Nsid(2), LbaRange { slba: 5, blocks: 1 }, true, false);
        queue.submit_without_data(zeroes).unwrap();
        queue
            .submit_without_data(SubmissionEntry::flush(Nsid(1)))
            .unwrap();
        queue.ring();
        let mut ended = 0;
        while ended < 2 {
            queue.service();
            ended += usize::from(queue.poll().is_some());
            std::thread::yield_now();
        }
        controller.delete_queue_pair(queue).unwrap();
        drop(buffer);
        controller.shutdown().map_err(|(_, error)| error).unwrap();
        assert_clean(&handle);
    }
    let bytes = std::fs::read(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    assert_eq!(bytes.len(), 8 << 20);
    assert!(bytes[5 * 512..13 * 512].iter().all(|b| *b == 0x41));
    let second = 4 << 20;
    assert!(
        bytes[second + 5 * 512..second + 6 * 512]
            .iter()
            .all(|b| *b == 0)
    );
    assert!(
        bytes[second + 6 * 512..second + 13 * 512]
            .iter()
            .all(|b| *b == 0x42)
    );
}

#[test]
fn power_failure_keeps_what_was_flushed_or_forced_and_loses_some_of_the_rest() {
    let config = ModelConfig {
        track_durability: true,
        seed: 7,
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config, 1);
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let mut buffer = DmaBuffer::new(&space, 32 << 10, DmaAccess::Both).unwrap();
    write_pattern(&mut queue, &mut buffer, 0, 1, false);
    write_pattern(&mut queue, &mut buffer, 64, 2, true);
    queue_flush(&mut queue);
    write_pattern(&mut queue, &mut buffer, 0, 3, false);
    write_pattern(&mut queue, &mut buffer, 128, 4, true);
    let lost = handle.fail_power();
    assert!((1..64).contains(&lost), "{lost} of 64 sectors");
    let mut bytes = vec![0; 192 * 512];
    handle.media_read(Nsid(1), 0, &mut bytes);
    let sectors: Vec<u8> = bytes.chunks(512).map(|sector| sector[0]).collect();
    assert!(sectors[..64].iter().all(|byte| matches!(byte, 1 | 3)));
    assert_eq!(
        sectors[..64].iter().filter(|byte| **byte == 1).count(),
        lost
    );
    assert!(sectors[64..128].iter().all(|byte| *byte == 2));
    assert!(sectors[128..].iter().all(|byte| *byte == 4));
    controller.delete_queue_pair(queue).unwrap();
    assert_clean(&handle);
}

/// Fills 64 blocks from `slba` on with `byte`.
fn write_pattern(
    queue: &mut QueuePair<Model>,
    buffer: &mut DmaBuffer,
    slba: u64,
    byte: u8,
    fua: bool,
) {
    buffer.write_bytes(0, &[byte; 32 << 10]);
    let range = LbaRange { slba, blocks: 64 };
    let entry = SubmissionEntry::write(Nsid(1), range, fua);
    queue
        .submit(entry, whole(buffer, 32 << 10), 32 << 10)
        .unwrap();
    assert_eq!(finish(queue), Status::SUCCESS);
}

fn queue_flush(queue: &mut QueuePair<Model>) {
    queue
        .submit_without_data(SubmissionEntry::flush(Nsid(1)))
        .unwrap();
    assert_eq!(finish(queue), Status::SUCCESS);
}

#[test]
fn identify_of_something_unknown_is_an_error_with_its_name() {
    let (mut controller, _) = enable(ModelConfig::default(), 1);
    let error = controller.namespace(Nsid(7)).unwrap_err().to_string();
    assert!(error.contains("Invalid Namespace or Format"), "{error}");
}

#[test]
fn null_medium_checks_everything_moves_nothing_and_says_so() {
    let config = ModelConfig {
        medium: Medium::Null,
        // As large as anything: nothing is allocated by it.
        size: 1 << 50,
        ..ModelConfig::default()
    };
    let (mut controller, handle) = enable(config, 1);
    let identity = controller.identity();
    assert!(identity.mn.starts_with(b"Tandem null (keeps no data) "));
    assert!(!identity.supports(oncs::COMPARE));
    let blocks = controller.namespace(Nsid(1)).unwrap().blocks;
    assert_eq!(blocks, 1 << 41);
    let mut queue = controller.create_queue_pair(16).unwrap();
    let space = controller.dma_space().clone();
    let mut buffer = DmaBuffer::new(&space, 16 << 10, DmaAccess::Both).unwrap();
    buffer.write_bytes(0, &[0xa5; 16 << 10]);
    let last = LbaRange {
        slba: blocks - 32,
        blocks: 32,
    };
    // Four pages each: a PRP list.
    for entry in [
        SubmissionEntry::write(Nsid(1), last, true),
        SubmissionEntry::read(Nsid(1), last),
    ] {
        queue
            .submit(entry, whole(&buffer, 16 << 10), 16 << 10)
            .unwrap();
        assert_eq!(finish(&mut queue), Status::SUCCESS);
    }
    for entry in [
        SubmissionEntry::flush(Nsid(1)),
        SubmissionEntry::write_zeroes(Nsid(1), last, true, false),
    ] {
        queue.submit_without_data(entry).unwrap();
        assert_eq!(finish(&mut queue), Status::SUCCESS);
    }
    queue
        .submit_deallocate(Nsid(1), std::iter::once(last))
        .unwrap();
    assert_eq!(finish(&mut queue), Status::SUCCESS);
    let mut bytes = vec![0; 16 << 10];
    buffer.read_bytes(0, &mut bytes);
    assert!(bytes.iter().all(|byte| *byte == 0xa5));
    let beyond = LbaRange {
        slba: blocks - 31,
        blocks: 32,
    };
    let entry = SubmissionEntry::read(Nsid(1), beyond);
    queue
        .submit(entry, whole(&buffer, 16 << 10), 16 << 10)
        .unwrap();
    assert_eq!(finish(&mut queue), Status::LBA_OUT_OF_RANGE.with_dnr());
    assert_clean(&handle);
    // The last page of a list is looked up as the first is.
    let outside = [
        buffer.iova(0),
        buffer.iova(4096),
        buffer.iova(8192),
        Iova(1 << 38),
    ];
    for entry in [
        SubmissionEntry::read(Nsid(1), last),
        SubmissionEntry::write(Nsid(1), last, false),
    ] {
        let pages = outside.map(|iova| DataSegment { iova, len: 4096 });
        queue.submit(entry, pages.into_iter(), 16 << 10).unwrap();
        assert_eq!(finish(&mut queue), Status::DATA_TRANSFER_ERROR.with_dnr());
    }
    assert_eq!(handle.iommu_violations(), 2);
    let counters = handle.io_counters();
    assert_eq!(
        (counters.reads, counters.writes, counters.errors),
        (1, 1, 3)
    );
    controller.delete_queue_pair(queue).unwrap();
    drop(buffer);
    controller.shutdown().map_err(|(_, error)| error).unwrap();
}
