//! Golden bytes, written out from the specifications, not from our encoders.

use super::*;
use zerocopy::{FromBytes, IntoBytes};

fn dwords(entry: &SubmissionEntry) -> [u32; 16] {
    let mut dwords = [0; 16];
    for (dword, bytes) in dwords.iter_mut().zip(entry.as_bytes().chunks_exact(4)) {
        *dword = u32::from_le_bytes(bytes.try_into().unwrap());
    }
    dwords
}

#[test]
fn read_of_eight_blocks_matches_the_specification() {
    let mut entry = SubmissionEntry::read(
        Nsid(1),
        LbaRange {
            slba: 0x1_2345_6789,
            blocks: 8,
        },
    );
    entry.cid = 0x0102.into();
    entry.prp1 = 0x1122_3344_5566_7000.into();
    entry.prp2 = 0x0000_0000_aabb_c000.into();
    #[rustfmt::skip]
    let golden: [u8; 64] = [
        0x02, 0x00, 0x02, 0x01,  0x01, 0x00, 0x00, 0x00, // opcode 02h, CID 0102h; NSID 1
        0, 0, 0, 0, 0, 0, 0, 0,  0, 0, 0, 0, 0, 0, 0, 0, // CDW2, CDW3, MPTR
        0x00, 0x70, 0x66, 0x55,  0x44, 0x33, 0x22, 0x11, // PRP1
        0x00, 0xc0, 0xbb, 0xaa,  0x00, 0x00, 0x00, 0x00, // PRP2
        0x89, 0x67, 0x45, 0x23,  0x01, 0x00, 0x00, 0x00, // SLBA, little-endian over CDW10 and CDW11
        0x07, 0x00, 0x00, 0x00,  0x00, 0x00, 0x00, 0x00, // NLB is zero-based: 7
        0x00, 0x00, 0x00, 0x00,  0x00, 0x00, 0x00, 0x00,
    ];
    assert_eq!(entry.as_bytes(), golden);
    assert_eq!(
        entry.lba_range(),
        LbaRange {
            slba: 0x1_2345_6789,
            blocks: 8
        }
    );
}

#[test]
fn write_with_fua_sets_bit_30_of_cdw12() {
    let range = LbaRange {
        slba: 0,
        blocks: 65536,
    };
    let d = dwords(&SubmissionEntry::write(Nsid(2), range, true));
    assert_eq!((d[0], d[1], d[10], d[12]), (0x01, 2, 0, 0x4000_ffff));
    let d = dwords(&SubmissionEntry::write(Nsid(2), range, false));
    assert_eq!(d[12], 0x0000_ffff);
}

#[test]
fn other_io_commands_match_the_specification() {
    let range = LbaRange {
        slba: 16,
        blocks: 1,
    };
    assert_eq!(dwords(&SubmissionEntry::flush(Nsid(7)))[..2], [0x00, 7]);
    let d = dwords(&SubmissionEntry::compare(Nsid(1), range));
    assert_eq!((d[0], d[10], d[12]), (0x05, 16, 0));
    let d = dwords(&SubmissionEntry::write_zeroes(Nsid(1), range, true, true));
    assert_eq!((d[0], d[10], d[12]), (0x08, 16, 0x4200_0000)); // FUA bit 30, DEAC bit 25
    let d = dwords(&SubmissionEntry::deallocate(Nsid(1), 256));
    assert_eq!((d[0], d[10], d[11]), (0x09, 255, 4)); // NR zero-based; AD is bit 2
    let d = dwords(&SubmissionEntry::copy(Nsid(1), 0x1_0000_0010, true));
    // SDLBA; NR zero-based, descriptor format 0; FUA bit 30.
    assert_eq!(
        (d[0], d[1], d[10], d[11], d[12]),
        (0x19, 1, 0x10, 1, 0x4000_0000)
    );
    let source = CopyRange::from(LbaRange {
        slba: 0x0102_0304_0506,
        blocks: 0x300,
    });
    assert_eq!(
        source.as_bytes(),
        [
            0, 0, 0, 0, 0, 0, 0, 0, 6, 5, 4, 3, 2, 1, 0, 0, // SLBA
            0xff, 0x02, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // NLB zero-based
        ]
    );
    let range = DsmRange {
        blocks: 0x10.into(),
        slba: 0x2000.into(),
        ..DsmRange::default()
    };
    assert_eq!(
        range.as_bytes(),
        [0, 0, 0, 0, 0x10, 0, 0, 0, 0, 0x20, 0, 0, 0, 0, 0, 0]
    );
}

#[test]
fn admin_commands_match_the_specification() {
    let d = dwords(&SubmissionEntry::identify(
        Cns::NamespaceDescriptors,
        Nsid(3),
    ));
    assert_eq!((d[0], d[1], d[10]), (0x06, 3, 3));
    let d = dwords(&SubmissionEntry::set_features(
        FeatureId::NumberOfQueues,
        0x0007_0007,
    ));
    assert_eq!((d[0], d[10], d[11]), (0x09, 0x07, 0x0007_0007));
    let d = dwords(&SubmissionEntry::get_features(
        FeatureId::VolatileWriteCache,
    ));
    assert_eq!((d[0], d[10]), (0x0a, 0x06));
    let d = dwords(&SubmissionEntry::create_io_cq(QueueId(5), 1024, None));
    assert_eq!((d[0], d[10], d[11]), (0x05, 0x03ff_0005, 0x0000_0001)); // PC = 1, IEN = 0
    let d = dwords(&SubmissionEntry::create_io_sq(QueueId(5), 1024));
    assert_eq!((d[0], d[10], d[11]), (0x01, 0x03ff_0005, 0x0005_0001)); // CQID 5, PC = 1
    assert_eq!(dwords(&SubmissionEntry::delete_io_sq(QueueId(5)))[10], 5);
    assert_eq!(dwords(&SubmissionEntry::delete_io_sq(QueueId(5)))[0], 0x00);
    assert_eq!(dwords(&SubmissionEntry::delete_io_cq(QueueId(5)))[0], 0x04);
    assert_eq!(dwords(&SubmissionEntry::async_event_request())[0], 0x0c);
    let d = dwords(&SubmissionEntry::get_log_page(LogId::Smart, Nsid::ALL, 512));
    assert_eq!(
        (d[0], d[1], d[10], d[11]),
        (0x02, 0xffff_ffff, 0x007f_0002, 0)
    ); // NUMDL zero-based: 127
}

#[test]
fn completion_entry_fields_stand_where_the_specification_says() {
    let bytes = [
        0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0, // DW0
        0x05, 0x00, 0x01, 0x00, // SQHD 5, SQID 1
        0x2a, 0x00, // CID 42
        0x03, 0x83, // phase 1 (bit 0), SC 81h (8:1), SCT 1 (11:9), DNR 1 (15)
    ];
    let entry = CompletionEntry::read_from_bytes(&bytes).unwrap();
    assert_eq!((entry.dw0.get(), entry.sqhd.get()), (0x1234_5678, 5));
    assert_eq!((entry.sqid.get(), entry.cid.get()), (1, 42));
    let status = Status::from_wire(entry.phase_and_status.get());
    assert_eq!(
        (status.sct(), status.sc(), status.may_retry()),
        (1, 0x81, false)
    );
    assert_eq!(Status::from_wire(0x0001).name(), "Successful Completion");
    assert!(Status::from_wire(0x0001).is_success());
}

#[test]
fn status_names_are_those_of_the_specification() {
    assert_eq!(Status::LBA_OUT_OF_RANGE.name(), "LBA Out of Range");
    assert_eq!(Status::LBA_OUT_OF_RANGE.to_wire(true), 0x0101);
    assert_eq!(
        Status::UNRECOVERED_READ_ERROR.with_dnr().to_string(),
        "Unrecovered Read Error (SCT 2h, SC 81h, DNR)"
    );
    assert_eq!(Status::new(7, 0x11).name(), "Vendor Specific");
    assert!(
        Status::COMPARE_FAILURE
            .with_dnr()
            .is(Status::COMPARE_FAILURE)
    );
}

#[test]
fn cap_fields_convert_from_the_wire_once() {
    // MQES 3ffh, CQR, TO 0fh, DSTRD 2, CSS NVM, MPSMIN 0, MPSMAX 4.
    let cap = Cap(0x03ff | 1 << 16 | 0x0f << 24 | 2 << 32 | 1 << 37 | 4 << 52);
    assert_eq!(cap.max_queue_entries(), 1024);
    assert_eq!(cap.ready_timeout().as_millis(), 8000); // TO + 1
    assert_eq!(cap.doorbell_stride(), 16);
    assert!(cap.supports_nvm_command_set());
    assert_eq!((cap.min_page_size(), cap.max_page_size()), (4096, 65536));
    assert_eq!(sq_tail_doorbell(QueueId(3), 16), 0x1000 + 6 * 16);
    assert_eq!(cq_head_doorbell(QueueId(3), 4), 0x1000 + 7 * 4);
    assert_eq!(Cap(0xffff).max_queue_entries(), 65536);
}

#[test]
fn cc_and_csts_bits_match_the_specification() {
    assert_eq!(Cc::enabled().0, 0x0046_0001); // IOCQES 4, IOSQES 6, EN
    assert!(Csts(1).is_ready() && Csts(2).is_fatal() && Csts(8).is_shutdown_complete());
    assert!(!Csts(0xc).is_shutdown_complete()); // reserved value, and all ones
    assert!(Csts(u32::MAX).is_removed());
    assert_eq!(admin_queue_attributes(32), 0x001f_001f);
    assert_eq!(Version(0x0001_0400).to_string(), "1.4.0");
}

#[test]
fn queue_counts_are_zero_based_on_the_wire() {
    let counts = QueueCounts {
        submission: 8,
        completion: 4,
    };
    assert_eq!(counts.to_zeroes_based(), 0x0003_0007);
    assert_eq!(QueueCounts::from_zeroes_based(0x0003_0007), counts);
    assert_eq!(
        QueueCounts::from_zeroes_based(0xffff_ffff).submission,
        65535
    );
}

#[test]
fn namespace_descriptors_round_trip_and_hostile_lists_end() {
    let list = [
        &[3_u8, 16, 0, 0][..],
        &[0xaa; 16],
        &[1, 8, 0, 0],
        &[0xbb; 8],
        &[9, 4, 0, 0, 1, 2, 3, 4], // an unknown type is skipped
        &[2, 16, 0, 0],
        &[0xcc; 16],
        &[4, 1, 0, 0],
        &[2],
        &[0; 16],
    ]
    .concat();
    let ids = NamespaceIds::parse(&list);
    assert_eq!(ids.command_set, Some(2));
    assert_eq!(ids.uuid, Some([0xaa; 16]));
    assert_eq!(ids.eui64, Some([0xbb; 8]));
    assert_eq!(ids.nguid, Some([0xcc; 16]));
    assert_eq!(NamespaceIds::parse(&ids.to_list()), ids);
    assert_eq!(
        NamespaceIds::parse(&[2, 255, 0, 0, 1]),
        NamespaceIds::default()
    );
    assert_eq!(
        NamespaceIds::parse(&[1, 0, 0, 0, 1, 0, 0, 0]),
        NamespaceIds::default()
    );
    assert_eq!(
        NamespaceIds::parse(&[1, 3, 0, 0, 1, 2, 3]),
        NamespaceIds::default()
    );
}

#[test]
fn identify_controller_limits_convert_from_the_wire() {
    let mut id = IdentifyController::zeroed();
    assert_eq!(id.max_transfer(4096), None);
    id.mdts = 5;
    assert_eq!(id.max_transfer(4096), Some(128 << 10));
    id.mdts = 255;
    assert_eq!(id.max_transfer(4096), Some(u64::MAX));
    id.oncs = 0x000c.into();
    assert!(
        id.supports(oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES) && !id.supports(oncs::COMPARE)
    );
    assert_eq!(id.as_bytes()[520..522], [0x0c, 0]); // ONCS stands at byte 520
}

#[test]
fn identify_namespace_format_index_uses_all_its_bits() {
    let mut id = IdentifyNamespace::zeroed();
    id.lbaf[17].lbads = 12;
    id.flbas = 0x21; // bits 3:0 = 1, bits 6:5 = 1: format 17
    assert_eq!(id.format().lbads, 12);
    id.flbas = 0xff;
    let _ = id.format();
}
