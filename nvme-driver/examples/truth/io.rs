//! Cases of the NVM command set, the list of all cases, and the watch over the data.

use nvme_driver::spec::{
    CDW11_AD, DsmRange, LbaRange, Nsid, PAGE_SIZE, SubmissionEntry, io_opcode,
};
use nvme_driver::transport::Transport;
use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use crate::Result;
use crate::bench::{Bench, Case, Placement, describe};

/// Reserved, or optional and in neither controller. Not Verify (0Ch) and Copy (19h), which one of them has.
const UNKNOWN_OPCODES: [u8; 12] = [
    0x03, 0x04, 0x06, 0x0a, 0x0d, 0x0e, 0x11, 0x15, 0x20, 0x7e, 0x80, 0xff,
];
/// Commands that name a range of blocks.
const RANGE_OPCODES: [(u8, &str); 4] = [
    (io_opcode::READ, "read"),
    (io_opcode::WRITE, "write"),
    (io_opcode::COMPARE, "compare"),
    (io_opcode::WRITE_ZEROES, "zeroes"),
];

fn range_command(opcode: u8, nsid: Nsid, slba: u64, zero_based: u32) -> SubmissionEntry {
    SubmissionEntry {
        cdw10: U32::new((slba & 0xffff_ffff) as u32),
        cdw11: U32::new((slba >> 32) as u32),
        cdw12: U32::new(zero_based),
        ..SubmissionEntry::new(opcode, nsid)
    }
}

fn at(mut entry: SubmissionEntry, placement: &Placement) -> SubmissionEntry {
    (entry.prp1, entry.prp2) = (placement.prp1.into(), placement.prp2.into());
    entry
}

impl<T: Transport> Bench<T> {
    /// All cases. Each seed goes through them once in an order of its own, and through some again.
    pub fn cases() -> Vec<Case<T>> {
        vec![
            Bench::identify_controller,
            Bench::identify_namespace,
            Bench::identify_lists,
            Bench::identify_descriptors,
            Bench::identify_other_namespaces,
            Bench::identify_unknown,
            Bench::identify_with_bad_prps,
            Bench::get_known_features,
            Bench::get_known_features,
            Bench::get_unknown_features,
            Bench::features_of_other_namespaces,
            Bench::set_known_features,
            Bench::set_known_features,
            Bench::set_features_wrongly,
            Bench::known_logs,
            Bench::smart_fields,
            Bench::firmware_log,
            Bench::logs_of_other_namespaces,
            Bench::logs_wrongly,
            Bench::create_and_delete_queues,
            Bench::create_completion_queues_wrongly,
            Bench::create_submission_queues_wrongly,
            Bench::delete_queues_wrongly,
            Bench::abort,
            Bench::event_request_beyond_the_limit,
            Bench::unknown_admin_opcode,
            Bench::admin_flags,
            Bench::write_and_read,
            Bench::write_and_read,
            Bench::write_and_read,
            Bench::read_one_block,
            Bench::compare,
            Bench::write_zeroes_and_read,
            Bench::write_zeroes_beyond_mdts,
            Bench::deallocate_and_read,
            Bench::deallocate_many,
            Bench::deallocate_wrongly,
            Bench::flush,
            Bench::ranges_at_the_end,
            Bench::lengths_around_mdts,
            Bench::other_namespaces,
            Bench::prp_rules,
            Bench::hints,
            Bench::io_flags,
            Bench::unknown_io_opcode,
        ]
    }

    fn read(&mut self, case: &str, range: LbaRange) -> Result<()> {
        let placement = self.place(self.bytes(range.blocks));
        self.read_into(case, SubmissionEntry::read(self.nsid, range), &placement)
    }

    fn read_into(
        &mut self,
        case: &str,
        entry: SubmissionEntry,
        placement: &Placement,
    ) -> Result<()> {
        self.wipe();
        let (status, mut line) = self.io(case, at(entry, placement))?;
        if status.is_success() {
            self.reads += 1;
            line.add("data", describe(&self.get(placement)));
            line.add("strayed", self.strayed(placement));
        }
        self.record(line);
        Ok(())
    }

    fn write(&mut self, case: &str, range: LbaRange, bytes: &[u8], fua: bool) -> Result<()> {
        let placement = self.place(bytes.len());
        self.put(&placement, bytes);
        let entry = SubmissionEntry::write(self.nsid, range, fua);
        if self.io_status(case, at(entry, &placement))?.is_success() {
            self.writes += 1;
        }
        Ok(())
    }

    // ---- the watch over the data ----

    /// Every watched block gets contents of its own, without lines.
    pub fn fill(&mut self) -> Result<()> {
        for range in self.watched_ranges() {
            let bytes = self.random_bytes(self.bytes(range.blocks));
            let placement = self.place(bytes.len());
            self.put(&placement, &bytes);
            let entry = SubmissionEntry::write(self.nsid, range, false);
            let status = self.send(at(entry, &placement))?;
            if !status.is_success() {
                return Err(format!("cannot write {range:?}: {status}").into());
            }
            self.writes += 1;
        }
        Ok(())
    }

    /// What the watched blocks hold in the end, and what the controller has counted.
    pub fn check_media(&mut self) -> Result<()> {
        for range in self.watched_ranges() {
            self.read("media", range)?;
        }
        let smart = self.controller.smart_log()?;
        let mut line = self.other_line("counted");
        let (reads_before, writes_before) = self.counted_before;
        // Commands that succeeded; a comparison that did not may count or not. Bytes are counted in thousands of 512, so they say nothing here.
        for (key, counter, before, ours) in [
            (
                "reads_more",
                smart.host_read_commands,
                reads_before,
                self.reads,
            ),
            (
                "writes_more",
                smart.host_write_commands,
                writes_before,
                self.writes,
            ),
        ] {
            let counted = u128::from_le_bytes(counter).wrapping_sub(before);
            line.add(key, counted.wrapping_sub(ours.into()).cast_signed());
        }
        self.record(line);
        Ok(())
    }

    fn watched_ranges(&self) -> Vec<LbaRange> {
        let most = self.max_blocks;
        let starts = (0..self.watched()).step_by(usize::try_from(most).unwrap_or(1));
        let ends = [self.blocks - u64::from(most)];
        let range = |slba| LbaRange { slba, blocks: most };
        starts.chain(ends).map(range).collect()
    }

    // ---- reads and writes ----

    pub fn write_and_read(&mut self) -> Result<()> {
        let range = self.some_range();
        let bytes = self.random_bytes(self.bytes(range.blocks));
        let fua = self.rng.within(0, 2) == 0;
        let case = if fua { "write.fua" } else { "write.ok" };
        self.write(case, range, &bytes, fua)?;
        self.read("write.read_back", range)?;
        // Somewhere across its borders.
        let around = self.some_range();
        self.read("read.ok", around)
    }

    /// NLB is zero-based: 0 is one block.
    pub fn read_one_block(&mut self) -> Result<()> {
        let slba = self.rng.within(0, self.watched() - 1);
        self.read("read.nlb_0", LbaRange { slba, blocks: 1 })?;
        let fua = SubmissionEntry {
            cdw12: U32::new(1 << 30),
            ..SubmissionEntry::read(self.nsid, LbaRange { slba, blocks: 1 })
        };
        let placement = self.place(self.block_size);
        self.read_into("read.fua", fua, &placement)
    }

    pub fn compare(&mut self) -> Result<()> {
        let range = self.some_range();
        let len = self.bytes(range.blocks);
        let placement = self.place(len);
        let read = at(SubmissionEntry::read(self.nsid, range), &placement);
        if !self.send(read)?.is_success() {
            return Err(format!("cannot read {range:?}").into());
        }
        self.reads += 1;
        let entry = at(SubmissionEntry::compare(self.nsid, range), &placement);
        if self.io_status("compare.same", entry)?.is_success() {
            self.reads += 1;
        }
        let mut bytes = self.get(&placement);
        let wrong = self.rng.index(len);
        bytes[wrong] ^= 1 << self.rng.index(8);
        self.put(&placement, &bytes);
        self.io_status("compare.differs", entry)?;
        Ok(())
    }

    // ---- Write Zeroes, Dataset Management, Flush ----

    pub fn write_zeroes_and_read(&mut self) -> Result<()> {
        let range = self.some_range();
        let (deallocate, fua) = (self.rng.within(0, 1) == 1, self.rng.within(0, 1) == 1);
        let entry = SubmissionEntry::write_zeroes(self.nsid, range, deallocate, fua);
        let case = if deallocate {
            "zeroes.deallocate"
        } else {
            "zeroes.ok"
        };
        self.io_status(case, entry)?;
        self.read("zeroes.read_back", range)?;
        let around = self.some_range();
        self.read("read.ok", around)
    }

    /// MDTS is no limit for a command that moves no data.
    pub fn write_zeroes_beyond_mdts(&mut self) -> Result<()> {
        let most = u64::from(self.max_blocks);
        let slba = self.watched() + self.rng.within(0, 1000);
        let zero_based = u32::try_from(self.rng.within(most, 3 * most))?;
        let entry = range_command(io_opcode::WRITE_ZEROES, self.nsid, slba, zero_based);
        self.io_status("zeroes.beyond_mdts", entry)?;
        let entry = range_command(io_opcode::WRITE_ZEROES, self.nsid, slba, 0xffff);
        self.io_status("zeroes.nlb_ffff", entry)?;
        self.read("zeroes.read_back", LbaRange { slba, blocks: 8 })
    }

    fn dataset_management(
        &mut self,
        case: &str,
        nsid: Nsid,
        ranges: &[DsmRange],
        cdw11: u32,
    ) -> Result<()> {
        let placement = self.place(ranges.as_bytes().len());
        self.put(&placement, ranges.as_bytes());
        let entry = SubmissionEntry {
            cdw10: U32::new(u32::try_from(ranges.len() - 1)?),
            cdw11: U32::new(cdw11),
            ..SubmissionEntry::new(io_opcode::DATASET_MANAGEMENT, nsid)
        };
        self.io_status(case, at(entry, &placement))?;
        Ok(())
    }

    fn dsm_range(range: LbaRange) -> DsmRange {
        DsmRange {
            attributes: 0.into(),
            blocks: range.blocks.into(),
            slba: range.slba.into(),
        }
    }

    pub fn deallocate_and_read(&mut self) -> Result<()> {
        let range = self.some_range();
        self.dataset_management("dsm.one", self.nsid, &[Self::dsm_range(range)], CDW11_AD)?;
        self.read("dsm.read_back", range)?;
        // What is written there again is there.
        let bytes = self.random_bytes(self.bytes(range.blocks));
        self.write("dsm.write_again", range, &bytes, false)?;
        self.read("dsm.write_again.read_back", range)
    }

    pub fn deallocate_many(&mut self) -> Result<()> {
        let count = self.rng.pick(&[2, 7, 255, 256]);
        let small = |bench: &mut Self| {
            let slba = bench.rng.within(0, bench.watched() - 1);
            LbaRange { slba, blocks: 1 }
        };
        let mut ranges: Vec<DsmRange> = (0..count).map(|_| Self::dsm_range(small(self))).collect();
        // Nothing is a range as well, also at the end.
        ranges[0].blocks = 0.into();
        ranges[1] = DsmRange {
            blocks: 0.into(),
            slba: self.blocks.into(),
            ..ranges[1]
        };
        let hints = self.rng.pick(&[0, 0b01, 0b11]);
        self.dataset_management("dsm.many", self.nsid, &ranges, CDW11_AD | hints)?;
        // Hints alone, which change nothing.
        self.dataset_management("dsm.hints", self.nsid, &ranges, 0b11)
    }

    pub fn deallocate_wrongly(&mut self) -> Result<()> {
        let end = self.blocks;
        let far = self.rng.within(end, u64::MAX);
        for (case, slba, blocks) in [
            ("dsm.at_the_end", end, 1),
            ("dsm.across_the_end", end - 1, 2),
            ("dsm.beyond", far, 1),
            ("dsm.wraps", u64::MAX, 2),
        ] {
            let range = Self::dsm_range(LbaRange { slba, blocks });
            self.dataset_management(case, self.nsid, &[range], CDW11_AD)?;
        }
        Ok(())
    }

    pub fn flush(&mut self) -> Result<()> {
        let (inactive, invalid) = (self.inactive_nsid(), self.invalid_nsid());
        for (case, nsid) in [
            ("flush.ok", self.nsid),
            ("flush.nsid_all", Nsid::ALL),
            ("flush.nsid_0", Nsid::NONE),
            ("flush.nsid_inactive", inactive),
            ("flush.nsid_invalid", invalid),
        ] {
            self.io_status(case, SubmissionEntry::flush(nsid))?;
        }
        Ok(())
    }

    // ---- what must be refused ----

    pub fn ranges_at_the_end(&mut self) -> Result<()> {
        let end = self.blocks;
        let few = self.rng.within(2, 8);
        let zero_based = u32::try_from(few - 1)?;
        let within = self.rng.within(1, few - 1);
        let bytes_wrap = (1_u64 << 63 >> self.block_size.trailing_zeros()) << 1;
        let (opcode, name) = self.rng.pick(&RANGE_OPCODES);
        for (kind, slba, zero_based) in [
            ("last_block", end - 1, 0),
            ("up_to_the_end", end - few, zero_based),
            ("at_the_end", end, 0),
            ("across_the_end", end - within, zero_based),
            ("bytes_wrap", bytes_wrap, 0),
            ("bytes_wrap", bytes_wrap + 1, zero_based),
            ("far", 1 << 40, 0),
            ("blocks_wrap", u64::MAX, 0),
            ("blocks_wrap", u64::MAX - within + 1, zero_based),
        ] {
            let len = self.bytes(zero_based + 1);
            let placement = self.place(len);
            let bytes = self.random_bytes(len);
            self.put(&placement, &bytes);
            let entry = range_command(opcode, self.nsid, slba, zero_based);
            let case = format!("{name}.{kind}");
            if opcode == io_opcode::READ {
                self.read_into(&case, entry, &placement)?;
                continue;
            }
            let entry = match opcode {
                io_opcode::WRITE_ZEROES => entry,
                _ => at(entry, &placement),
            };
            let status = self.io_status(&case, entry)?;
            self.writes += u64::from(opcode == io_opcode::WRITE && status.is_success());
        }
        Ok(())
    }

    pub fn lengths_around_mdts(&mut self) -> Result<()> {
        let most = self.max_blocks;
        let (opcode, name) = self.rng.pick(&RANGE_OPCODES[..3]);
        let slba = self.rng.within(0, self.watched() - u64::from(most) - 1);
        let far = (self.blocks - slba - 1).min(0xfffe);
        let far = u32::try_from(self.rng.within(u64::from(most), far))?;
        let exactly = LbaRange { slba, blocks: most };
        self.read("read.mdts", exactly)?;
        let bytes = self.random_bytes(self.bytes(most));
        self.write("write.mdts", exactly, &bytes, false)?;
        // Never more than the buffer holds is refused by what is too long for it as well.
        let placement = self.place(self.bytes(most + 1));
        for (kind, zero_based) in [
            ("mdts_and_one", most),
            ("beyond_mdts", far),
            ("nlb_ffff", 0xffff),
        ] {
            let entry = at(
                range_command(opcode, self.nsid, slba, zero_based),
                &placement,
            );
            self.io_status(&format!("{name}.{kind}"), entry)?;
        }
        Ok(())
    }

    pub fn other_namespaces(&mut self) -> Result<()> {
        let (inactive, invalid) = (self.inactive_nsid(), self.invalid_nsid());
        for (kind, nsid) in [
            ("nsid_0", Nsid::NONE),
            ("nsid_all", Nsid::ALL),
            ("nsid_inactive", inactive),
            ("nsid_invalid", invalid),
        ] {
            for (opcode, name) in RANGE_OPCODES {
                let placement = self.place(self.block_size);
                let entry = at(range_command(opcode, nsid, 0, 0), &placement);
                self.io_status(&format!("{name}.{kind}"), entry)?;
            }
            let range = Self::dsm_range(LbaRange { slba: 0, blocks: 1 });
            self.dataset_management(&format!("dsm.{kind}"), nsid, &[range], CDW11_AD)?;
        }
        Ok(())
    }

    pub fn prp_rules(&mut self) -> Result<()> {
        let page = u32::try_from(PAGE_SIZE / self.block_size.min(PAGE_SIZE))?;
        let slba = self.rng.within(0, self.watched() - 64);
        let odd = self.rng.within(1, 3);
        let bend = self.rng.pick(&[4, 8, 512, 4092]);

        // PRP2 means nothing where PRP1 is enough.
        let placement = self.place_at(0, self.block_size);
        let mut entry = at(
            SubmissionEntry::read(self.nsid, LbaRange { slba, blocks: 1 }),
            &placement,
        );
        entry.prp2 = U64::new(0xffff_ffff_ffff_f123);
        self.wipe();
        let (status, mut line) = self.io("read.prp2_unused", entry)?;
        if status.is_success() {
            self.reads += 1;
            line.add("data", describe(&self.get(&placement)));
            line.add("strayed", self.strayed(&placement));
        }
        self.record(line);

        // Two pages.
        let two = LbaRange { slba, blocks: page };
        let start = 4 * (1 + self.rng.index(1000));
        let placement = self.place_at(start, self.bytes(page));
        let mut entry = at(SubmissionEntry::read(self.nsid, two), &placement);
        entry.prp2 = U64::new(placement.prp2 + bend);
        self.io_status("read.prp2_offset", entry)?;
        entry = at(SubmissionEntry::write(self.nsid, two, false), &placement);
        entry.prp2 = U64::new(placement.prp2 + bend);
        self.io_status("write.prp2_offset", entry)?;
        self.read("write.prp2_offset.read_back", two)?;

        // A list.
        let four = LbaRange {
            slba,
            blocks: 4 * page,
        };
        let placement = self.place(self.bytes(4 * page));
        self.bend_list(placement.prp2, 0, bend);
        let entry = at(SubmissionEntry::read(self.nsid, four), &placement);
        self.io_status("read.list_offset", entry)?;

        // Nothing below dwords.
        let placement = self.place_at(0, self.block_size);
        let mut entry = at(
            SubmissionEntry::read(self.nsid, LbaRange { slba, blocks: 1 }),
            &placement,
        );
        entry.prp1 = U64::new(placement.prp1 + odd);
        if self.block_size < PAGE_SIZE {
            let status = self.io_status("read.prp1_odd", entry)?;
            self.reads += u64::from(status.is_success());
        }
        Ok(())
    }

    /// Bits that advise, or that mean something to other formats only.
    pub fn hints(&mut self) -> Result<()> {
        let slba = self.rng.within(0, self.watched() - 1);
        let range = LbaRange { slba, blocks: 1 };
        for (case, control, cdw13) in [
            ("read.limited_retry", 1 << 31, 0),
            ("read.dsm_hints", 0, 0x7f),
            ("read.protection_check", 0b111 << 26, 0),
            ("read.protection_action", 1 << 29, 0),
        ] {
            let mut entry = SubmissionEntry::read(self.nsid, range);
            entry.cdw12 = U32::new(control);
            entry.cdw13 = U32::new(cdw13);
            let placement = self.place(self.block_size);
            self.read_into(case, entry, &placement)?;
        }
        Ok(())
    }

    pub fn io_flags(&mut self) -> Result<()> {
        let range = LbaRange { slba: 0, blocks: 1 };
        for (case, flags) in [
            ("io.fused_first", 0x01),
            ("io.fused_second", 0x02),
            ("io.fuse_reserved", 0x03),
            ("io.psdt_reserved", 0xc0),
        ] {
            let placement = self.place(self.block_size);
            let entry = SubmissionEntry {
                flags,
                ..at(SubmissionEntry::read(self.nsid, range), &placement)
            };
            self.io_status(case, entry)?;
        }
        Ok(())
    }

    pub fn unknown_io_opcode(&mut self) -> Result<()> {
        let opcode = self.rng.pick(&UNKNOWN_OPCODES);
        self.io_status("io.unknown_opcode", SubmissionEntry::new(opcode, self.nsid))?;
        Ok(())
    }
}
