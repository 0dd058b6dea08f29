//! Cases of the admin command set: Identify, features, log pages, queues, Abort, and what nobody knows.

use nvme_driver::spec::{
    Cns, FeatureId, IdentifyController, IdentifyNamespace, LogId, NamespaceIds, Nsid, PAGE_SIZE,
    QueueId, SmartLog, SubmissionEntry, admin_opcode, ascii_field, offset,
};
use nvme_driver::transport::Transport;
use zerocopy::FromBytes;
use zerocopy::little_endian::{U32, U64};

use crate::Result;
use crate::bench::{Bench, Line, QUEUES, describe};

/// What the specification reserves, or what is optional and neither controller has.
const UNKNOWN_ADMIN_OPCODES: [u8; 12] = [
    0x03, 0x07, 0x0b, 0x0e, 0x0f, 0x12, 0x1f, 0x40, 0x7b, 0x85, 0xbf, 0xff,
];
const UNKNOWN_CNS: [u32; 8] = [0x04, 0x09, 0x0f, 0x1f, 0x40, 0x7f, 0xc0, 0xff];
const UNKNOWN_FEATURES: [u32; 8] = [0x00, 0x0c, 0x17, 0x30, 0x77, 0x7f, 0xc0, 0xff];
const UNKNOWN_LOGS: [u32; 6] = [0x0a, 0x0f, 0x20, 0x6f, 0xc0, 0xff];
/// What every I/O controller has, and the two that both of these have besides.
const ERROR_RECOVERY: u32 = 0x05;
const VOLATILE_WRITE_CACHE: u32 = 0x06;
const FEATURES: [(u32, &str); 10] = [
    (0x01, "arbitration"),
    (0x02, "power_management"),
    (0x04, "temperature_threshold"),
    (ERROR_RECOVERY, "error_recovery"),
    (VOLATILE_WRITE_CACHE, "volatile_write_cache"),
    (0x07, "number_of_queues"),
    (0x08, "interrupt_coalescing"),
    (0x09, "interrupt_vector"),
    (0x0a, "write_atomicity"),
    (0x0b, "async_event_configuration"),
];
/// The number of an I/O queue that no queue pair of the driver has.
const FREE_QUEUE: u16 = QUEUES - 1;
/// The number of the driver's queue pair.
const USED_QUEUE: u16 = 1;

fn get_features(feature: u32, select: u32, nsid: Nsid) -> SubmissionEntry {
    SubmissionEntry {
        cdw10: U32::new(feature | select << 8),
        ..SubmissionEntry::new(admin_opcode::GET_FEATURES, nsid)
    }
}

fn set_features(feature: u32, value: u32, nsid: Nsid) -> SubmissionEntry {
    SubmissionEntry {
        cdw10: U32::new(feature),
        cdw11: U32::new(value),
        ..SubmissionEntry::new(admin_opcode::SET_FEATURES, nsid)
    }
}

fn log_page(log: u32, dwords: u32, at: u64, nsid: Nsid) -> SubmissionEntry {
    SubmissionEntry {
        cdw10: U32::new(log | (dwords - 1) << 16),
        cdw11: U32::new((dwords - 1) >> 16),
        cdw12: U32::new((at & 0xffff_ffff) as u32),
        cdw13: U32::new((at >> 32) as u32),
        ..SubmissionEntry::new(admin_opcode::GET_LOG_PAGE, nsid)
    }
}

/// Create I/O Completion (`opcode` 05h) or Submission Queue with fields of any value.
fn create_queue(opcode: u8, id: u32, zero_based_size: u32, cdw11: u32) -> SubmissionEntry {
    SubmissionEntry {
        cdw10: U32::new(id | zero_based_size << 16),
        cdw11: U32::new(cdw11),
        ..SubmissionEntry::new(opcode, Nsid::NONE)
    }
}

fn delete_queue(opcode: u8, id: u32) -> SubmissionEntry {
    SubmissionEntry {
        cdw10: U32::new(id),
        ..SubmissionEntry::new(opcode, Nsid::NONE)
    }
}

impl<T: Transport> Bench<T> {
    /// What comes before there are I/O queues: registers, features after a reset, Number of Queues.
    pub fn before_queues(&mut self) -> Result<()> {
        let cap = self.controller.cap().0;
        let vs = self.controller.transport().read32(offset::VS);
        let mut line = self.other_line("registers");
        for (name, shift, bits) in [
            ("mqes", 0, 16),
            ("cqr", 16, 1),
            ("ams", 17, 2),
            ("to", 24, 8),
            ("dstrd", 32, 4),
            ("nssrs", 36, 1),
            ("css", 37, 8),
            ("bps", 45, 1),
            ("mpsmin", 48, 4),
            ("mpsmax", 52, 4),
            ("pmrs", 56, 1),
            ("cmbs", 57, 1),
        ] {
            line.add_hex(name, cap >> shift & ((1 << bits) - 1));
        }
        line.add_hex("vs", vs);
        self.record(line);

        for (feature, name) in FEATURES {
            let entry = get_features(feature, 0, self.nsid_of(feature));
            self.admin_dw0(&format!("reset.feature.{name}"), entry)?;
        }
        let all = u32::from(QUEUES - 1) | u32::from(QUEUES - 1) << 16;
        for (case, value) in [
            ("number_of_queues.sq_ffff", all | 0xffff),
            ("number_of_queues.cq_ffff", all | 0xffff_0000),
            ("number_of_queues.fewer", 0x0001_0001),
            ("number_of_queues.more", all | 0x0800_0800),
            ("number_of_queues.all", all),
        ] {
            self.admin_dw0(case, set_features(0x07, value, Nsid::NONE))?;
        }
        Ok(())
    }

    // ---- Identify ----

    /// Sends Identify for a page anywhere in the data buffer; the page when there was one.
    fn identify(&mut self, case: &str, cns: u32, nsid: Nsid) -> Result<(Line, Option<Vec<u8>>)> {
        self.wipe();
        let placement = self.place(PAGE_SIZE);
        let entry = SubmissionEntry {
            prp1: U64::new(placement.prp1),
            prp2: U64::new(placement.prp2),
            cdw10: U32::new(cns),
            ..SubmissionEntry::new(admin_opcode::IDENTIFY, nsid)
        };
        let (completion, mut line) = self.admin(case, entry)?;
        let page = completion.status.is_success().then(|| self.get(&placement));
        if page.is_some() {
            line.add("strayed", self.strayed(&placement));
        }
        Ok((line, page))
    }

    /// The same, with the whole page as one value.
    fn identify_page(&mut self, case: &str, cns: u32, nsid: Nsid) -> Result<()> {
        let (mut line, page) = self.identify(case, cns, nsid)?;
        if let Some(page) = page {
            line.add("data", describe(&page));
        }
        self.record(line);
        Ok(())
    }

    pub fn identify_controller(&mut self) -> Result<()> {
        let nsid = self
            .rng
            .pick(&[Nsid::NONE, Nsid::NONE, self.nsid, Nsid::ALL]);
        let (mut line, page) = self.identify("identify.controller", 0x01, nsid)?;
        let id = page.and_then(|page| IdentifyController::read_from_bytes(&page).ok());
        if let Some(id) = id {
            let text = |field: &[u8]| ascii_field(field).replace(' ', "_");
            line.add_hex("vid", id.vid.get());
            line.add_hex("ssvid", id.ssvid.get());
            line.add("sn", text(&id.sn));
            line.add("mn", text(&id.mn));
            line.add("fr", text(&id.fr));
            line.add("rab", id.rab);
            line.add_hex(
                "ieee",
                u32::from_le_bytes([id.ieee[0], id.ieee[1], id.ieee[2], 0]),
            );
            line.add_hex("cmic", id.cmic);
            line.add("mdts", id.mdts);
            line.add_hex("cntlid", id.cntlid.get());
            line.add_hex("ver", id.ver.get());
            line.add("rtd3r", id.rtd3r.get());
            line.add("rtd3e", id.rtd3e.get());
            line.add_hex("oaes", id.oaes.get());
            line.add_hex("ctratt", id.ctratt.get());
            line.add("cntrltype", id.cntrltype);
            line.add_hex("oacs", id.oacs.get());
            line.add("acl", id.acl);
            line.add("aerl", id.aerl);
            line.add_hex("frmw", id.frmw);
            line.add_hex("lpa", id.lpa);
            line.add("elpe", id.elpe);
            line.add("npss", id.npss);
            line.add("avscc", id.avscc);
            line.add("apsta", id.apsta);
            line.add("wctemp", id.wctemp.get());
            line.add("cctemp", id.cctemp.get());
            line.add("tnvmcap", u128::from_le_bytes(id.tnvmcap));
            line.add("unvmcap", u128::from_le_bytes(id.unvmcap));
            line.add("kas", id.kas.get());
            line.add_hex("sqes", id.sqes);
            line.add_hex("cqes", id.cqes);
            line.add("maxcmd", id.maxcmd.get());
            line.add("nn", id.nn.get());
            line.add_hex("oncs", id.oncs.get());
            line.add_hex("fuses", id.fuses.get());
            line.add_hex("fna", id.fna);
            line.add_hex("vwc", id.vwc);
            line.add("awun", id.awun.get());
            line.add("awupf", id.awupf.get());
            line.add_hex("sgls", id.sgls.get());
            line.add("mnan", id.mnan.get());
            line.add("subnqn", text(&id.subnqn));
        }
        self.record(line);
        Ok(())
    }

    pub fn identify_namespace(&mut self) -> Result<()> {
        let (mut line, page) = self.identify("identify.namespace", 0x00, self.nsid)?;
        let id = page.and_then(|page| IdentifyNamespace::read_from_bytes(&page).ok());
        if let Some(id) = id {
            line.add("nsze", id.nsze.get());
            line.add("ncap", id.ncap.get());
            line.add("nuse", id.nuse.get());
            line.add_hex("nsfeat", id.nsfeat);
            line.add("nlbaf", id.nlbaf);
            line.add_hex("flbas", id.flbas);
            line.add_hex("mc", id.mc);
            line.add_hex("dpc", id.dpc);
            line.add_hex("dps", id.dps);
            line.add_hex("nmic", id.nmic);
            line.add_hex("rescap", id.rescap);
            line.add_hex("fpi", id.fpi);
            line.add_hex("dlfeat", id.dlfeat);
            line.add("nvmcap", u128::from_le_bytes(id.nvmcap));
            line.add_hex("nsattr", id.nsattr);
            line.add("nguid", describe(&id.nguid));
            line.add("eui64", describe(&id.eui64));
            let format = id.format();
            line.add("ms", format.ms.get());
            line.add("lbads", format.lbads);
            line.add("rp", format.rp);
        }
        self.record(line);
        Ok(())
    }

    pub fn identify_lists(&mut self) -> Result<()> {
        for (case, after) in [
            ("identify.list_from_0", Nsid::NONE),
            ("identify.list_from_active", self.nsid),
            ("identify.list_from_fffffffd", Nsid(0xffff_fffd)),
            ("identify.list_from_fffffffe", Nsid(0xffff_fffe)),
            ("identify.list_from_ffffffff", Nsid::ALL),
        ] {
            self.identify_page(case, u32::from(Cns::ActiveNamespaces as u8), after)?;
        }
        Ok(())
    }

    pub fn identify_descriptors(&mut self) -> Result<()> {
        let cns = u32::from(Cns::NamespaceDescriptors as u8);
        let (mut line, page) = self.identify("identify.descriptors", cns, self.nsid)?;
        if let Some(page) = page {
            // What they are is up to the controller; that there is one, and that no two agree, is not.
            let ids = NamespaceIds::parse(&page);
            line.add(
                "any",
                ids.uuid.is_some() || ids.nguid.is_some() || ids.eui64.is_some(),
            );
        }
        self.record(line);
        Ok(())
    }

    pub fn identify_other_namespaces(&mut self) -> Result<()> {
        let (inactive, invalid) = (self.inactive_nsid(), self.invalid_nsid());
        for (name, cns) in [("namespace", 0x00), ("descriptors", 0x03)] {
            for (kind, nsid) in [
                ("nsid_0", Nsid::NONE),
                ("nsid_all", Nsid::ALL),
                ("nsid_inactive", inactive),
                ("nsid_invalid", invalid),
            ] {
                self.identify_page(&format!("identify.{name}.{kind}"), cns, nsid)?;
            }
        }
        Ok(())
    }

    pub fn identify_unknown(&mut self) -> Result<()> {
        let cns = self.rng.pick(&UNKNOWN_CNS);
        self.identify_page("identify.unknown", cns, self.nsid)
    }

    pub fn identify_with_bad_prps(&mut self) -> Result<()> {
        let start = 4 + self.rng.index(1000) * 4;
        let placement = self.place_at(start, PAGE_SIZE);
        let bend = self.rng.pick(&[4, 8, 512, 2048]);
        let entry = SubmissionEntry {
            prp1: U64::new(placement.prp1),
            prp2: U64::new(placement.prp2 + bend),
            cdw10: U32::new(0x01),
            ..SubmissionEntry::new(admin_opcode::IDENTIFY, Nsid::NONE)
        };
        self.admin_status("identify.prp2_offset", entry)?;
        Ok(())
    }

    // ---- features ----

    pub fn get_known_features(&mut self) -> Result<()> {
        let (feature, name) = self.rng.pick(&FEATURES);
        for (select, what) in [(1, "default"), (2, "saved"), (3, "supported")] {
            let case = format!("get_features.{what}.{name}");
            let entry = get_features(feature, select, self.nsid_of(feature));
            self.admin_dw0(&case, entry)?;
        }
        Ok(())
    }

    /// Namespaces have Error Recovery each of their own; everything else is the controller's.
    fn nsid_of(&self, feature: u32) -> Nsid {
        match feature {
            ERROR_RECOVERY => self.nsid,
            _ => Nsid::NONE,
        }
    }

    pub fn get_unknown_features(&mut self) -> Result<()> {
        let unknown = self.rng.pick(&UNKNOWN_FEATURES);
        self.admin_dw0("get_features.unknown", get_features(unknown, 0, Nsid::NONE))?;
        let known = self.rng.pick(&[0x04, 0x0b]);
        let reserved = u32::try_from(self.rng.within(4, 7))?;
        let entry = get_features(known, reserved, Nsid::NONE);
        self.admin_dw0("get_features.select_reserved", entry)
    }

    pub fn features_of_other_namespaces(&mut self) -> Result<()> {
        // Of the whole controller.
        let feature = self.rng.pick(&[0x04, 0x06, 0x0b]);
        let value = match feature {
            0x04 => 0x0150,
            VOLATILE_WRITE_CACHE => 1,
            _ => 0,
        };
        let (active, invalid) = (self.nsid, self.invalid_nsid());
        for (kind, nsid) in [
            ("nsid_active", active),
            ("nsid_invalid", invalid),
            ("nsid_all", Nsid::ALL),
        ] {
            let case = format!("set_features.{kind}");
            self.admin_dw0(&case, set_features(feature, value, nsid))?;
        }
        self.restore_feature(feature, Nsid::NONE)?;

        let inactive = self.inactive_nsid();
        let value = u32::try_from(self.rng.within(1, 0xffff))?;
        for (kind, nsid) in [
            ("nsid_0", Nsid::NONE),
            ("nsid_all", Nsid::ALL),
            ("nsid_inactive", inactive),
            ("nsid_invalid", invalid),
        ] {
            let case = format!("set_features.error_recovery.{kind}");
            self.admin_status(&case, set_features(ERROR_RECOVERY, value, nsid))?;
            let case = format!("get_features.error_recovery.{kind}");
            self.admin_dw0(&case, get_features(ERROR_RECOVERY, 0, nsid))?;
        }
        let entry = get_features(ERROR_RECOVERY, 0, active);
        self.admin_dw0("get_features.error_recovery.after_all", entry)?;
        self.restore_feature(ERROR_RECOVERY, active)
    }

    /// What Set Features changed is as after a reset again.
    fn restore_feature(&mut self, feature: u32, nsid: Nsid) -> Result<()> {
        let default = self
            .controller
            .admin_command(get_features(feature, 1, nsid))?;
        let value = match feature {
            VOLATILE_WRITE_CACHE => 1,
            _ => default.dw0,
        };
        self.controller
            .admin_command(set_features(feature, value, nsid))?;
        Ok(())
    }

    pub fn set_known_features(&mut self) -> Result<()> {
        let (feature, name) = self.rng.pick(&FEATURES);
        let nsid = self.nsid_of(feature);
        let value = match feature {
            0x04 => 0x0150 + u32::try_from(self.rng.within(0, 50))?,
            ERROR_RECOVERY => u32::try_from(self.rng.within(0, 0xffff))?,
            VOLATILE_WRITE_CACHE => u32::try_from(self.rng.within(0, 1))?,
            0x07 => u32::from(QUEUES - 1) * 0x1_0001,
            0x0b => u32::try_from(self.rng.within(0, 0x1f))?,
            _ => 0,
        };
        let case = format!("set_features.{name}");
        self.admin_status(&case, set_features(feature, value, nsid))?;
        let case = format!("set_features.{name}.read_back");
        self.admin_dw0(&case, get_features(feature, 0, nsid))?;
        self.restore_feature(feature, nsid)
    }

    pub fn set_features_wrongly(&mut self) -> Result<()> {
        let unknown = self.rng.pick(&UNKNOWN_FEATURES);
        self.admin_status("set_features.unknown", set_features(unknown, 0, Nsid::NONE))?;
        let feature = u32::from(FeatureId::VolatileWriteCache as u8);
        let save = set_features(feature | 1 << 31, 1, Nsid::NONE);
        self.admin_status("set_features.save", save)?;
        let power_state = u32::try_from(self.rng.within(1, 31))?;
        let entry = set_features(0x02, power_state, Nsid::NONE);
        self.admin_status("set_features.power_state_beyond", entry)?;
        Ok(())
    }

    // ---- log pages ----

    /// Sends Get Log Page; the bytes when there were some.
    fn log(
        &mut self,
        case: &str,
        mut entry: SubmissionEntry,
        len: usize,
    ) -> Result<(Line, Option<Vec<u8>>)> {
        self.wipe();
        // Where more is asked for than there is, one of the controllers takes PRP2 for what it would be if there were
        // no more: on a page of its own it is not looked at.
        let start = match len {
            0..=2048 => 4 * self.rng.index(512),
            _ => 0,
        };
        let placement = self.place_at(start, len.min(32 * PAGE_SIZE));
        (entry.prp1, entry.prp2) = (placement.prp1.into(), placement.prp2.into());
        let (completion, mut line) = self.admin(case, entry)?;
        let bytes = completion.status.is_success().then(|| self.get(&placement));
        if bytes.is_some() {
            line.add("strayed", self.strayed(&placement));
        }
        Ok((line, bytes))
    }

    /// The known pages, whole, shorter and longer than they are, and from somewhere within.
    pub fn known_logs(&mut self) -> Result<()> {
        let (log, name, whole) = self.rng.pick(&[
            // As many entries as there are everywhere.
            (LogId::Error, "error", 64),
            (LogId::Smart, "smart", 512),
            (LogId::ChangedNamespaces, "changed_namespaces", PAGE_SIZE),
        ]);
        let log = u32::from(log as u8);
        let some = 4 * (1 + self.rng.index(whole / 4));
        let at = 4 * self.rng.index(whole / 4);
        let longest = 32 * PAGE_SIZE; // MDTS
        let longer = whole + 4 * (1 + self.rng.index((longest - whole) / 4));
        for (kind, len, at) in [
            ("whole", whole, 0),
            ("odd", some, 0),
            ("one_dword", 4, 0),
            ("longer", longer, 0),
            ("longest", longest, 0),
            ("within", some.min(whole - at), at),
        ] {
            let dwords = u32::try_from(len / 4)?;
            let entry = log_page(log, dwords, at as u64, Nsid::ALL);
            let (mut line, bytes) = self.log(&format!("log.{name}.{kind}"), entry, len)?;
            // Counters and errors are each controller's own.
            if let Some(bytes) = bytes.filter(|_| name == "changed_namespaces") {
                line.add("data", describe(&bytes[..len.min(whole - at)]));
            }
            self.record(line);
        }
        Ok(())
    }

    pub fn smart_fields(&mut self) -> Result<()> {
        let nsid = self.rng.pick(&[Nsid::NONE, Nsid::ALL]);
        let entry = log_page(u32::from(LogId::Smart as u8), 128, 0, nsid);
        let (mut line, bytes) = self.log("log.smart", entry, 512)?;
        if let Some(smart) = bytes.and_then(|bytes| SmartLog::read_from_bytes(&bytes).ok()) {
            line.add_hex("critical_warning", smart.critical_warning);
            line.add("available_spare", smart.available_spare);
            line.add("percentage_used", smart.percentage_used);
            line.add("media_errors", u128::from_le_bytes(smart.media_errors));
        }
        self.record(line);
        Ok(())
    }

    pub fn firmware_log(&mut self) -> Result<()> {
        let (mut line, bytes) = self.log("log.firmware", log_page(0x03, 128, 0, Nsid::ALL), 512)?;
        if let Some(bytes) = bytes {
            line.add_hex("afi", bytes[0]);
            line.add("frs1", ascii_field(&bytes[8..16]).replace(' ', "_"));
        }
        self.record(line);
        Ok(())
    }

    pub fn logs_of_other_namespaces(&mut self) -> Result<()> {
        let (active, inactive, invalid) = (self.nsid, self.inactive_nsid(), self.invalid_nsid());
        for (kind, nsid) in [
            ("nsid_active", active),
            ("nsid_inactive", inactive),
            ("nsid_invalid", invalid),
        ] {
            let entry = log_page(u32::from(LogId::Smart as u8), 128, 0, nsid);
            let (line, _) = self.log(&format!("log.smart.{kind}"), entry, 512)?;
            self.record(line);
        }
        Ok(())
    }

    pub fn logs_wrongly(&mut self) -> Result<()> {
        let unknown = self.rng.pick(&UNKNOWN_LOGS);
        let smart = u32::from(LogId::Smart as u8);
        let odd = self.rng.within(0, 511) & !3 | self.rng.within(1, 3);
        let far = 4 * self.rng.within(129, 1 << 34);
        let beyond_mdts = u32::try_from(32 * PAGE_SIZE / 4 + 1)?;
        for (case, log, dwords, at) in [
            ("log.unknown", unknown, 128, 0),
            ("log.offset_odd", smart, 8, odd),
            ("log.offset_at_the_end", smart, 8, 512),
            ("log.offset_beyond", smart, 8, far),
            ("log.beyond_mdts", smart, beyond_mdts, 0),
        ] {
            let len = usize::try_from(dwords * 4)?;
            let (line, _) = self.log(case, log_page(log, dwords, at, Nsid::ALL), len)?;
            self.record(line);
        }
        Ok(())
    }

    // ---- queues ----

    /// Creates a queue in `rings` (completion queues in the first page), and takes it back if that worked: the status
    /// is the line.
    fn try_create(&mut self, case: &str, mut entry: SubmissionEntry) -> Result<bool> {
        let (page, delete) = match entry.opcode {
            admin_opcode::CREATE_IO_CQ => (0, admin_opcode::DELETE_IO_CQ),
            _ => (PAGE_SIZE, admin_opcode::DELETE_IO_SQ),
        };
        entry.prp1 = U64::new(entry.prp1.get() + self.rings.iova(page).0);
        let created = self.admin_status(case, entry)?.is_success();
        if created {
            let id = entry.cdw10.get() & 0xffff;
            self.controller.admin_command(delete_queue(delete, id))?;
        }
        Ok(created)
    }

    /// A completion queue for a submission queue of a case, without a line.
    fn with_completion_queue(&mut self, run: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let id = QueueId(FREE_QUEUE);
        let mut entry = SubmissionEntry::create_io_cq(id, 64, None);
        entry.prp1 = U64::new(self.rings.iova(0).0);
        let created = self.controller.admin_command(entry)?.status;
        if !created.is_success() {
            return Err(format!("cannot create completion queue {}: {created}", id.0).into());
        }
        run(self)?;
        let deleted = self
            .controller
            .admin_command(SubmissionEntry::delete_io_cq(id))?;
        if !deleted.status.is_success() {
            return Err(format!(
                "cannot delete completion queue {}: {}",
                id.0, deleted.status
            )
            .into());
        }
        Ok(())
    }

    pub fn create_and_delete_queues(&mut self) -> Result<()> {
        let id = QueueId(u16::try_from(self.rng.within(2, u64::from(QUEUES)))?);
        let entries = u16::try_from(self.rng.within(2, 64))?;
        let mut cq = SubmissionEntry::create_io_cq(id, entries, None);
        cq.prp1 = U64::new(self.rings.iova(0).0);
        let mut sq = SubmissionEntry::create_io_sq(id, entries);
        sq.prp1 = U64::new(self.rings.iova(PAGE_SIZE).0);
        for (case, entry) in [
            ("queues.sq_before_cq", sq),
            ("queues.create_cq", cq),
            ("queues.create_cq_again", cq),
            ("queues.create_sq", sq),
            ("queues.create_sq_again", sq),
            (
                "queues.delete_cq_before_sq",
                SubmissionEntry::delete_io_cq(id),
            ),
            ("queues.delete_sq", SubmissionEntry::delete_io_sq(id)),
            ("queues.delete_sq_again", SubmissionEntry::delete_io_sq(id)),
            ("queues.delete_cq", SubmissionEntry::delete_io_cq(id)),
            ("queues.delete_cq_again", SubmissionEntry::delete_io_cq(id)),
        ] {
            self.admin_status(case, entry)?;
        }
        Ok(())
    }

    pub fn create_completion_queues_wrongly(&mut self) -> Result<()> {
        let opcode = admin_opcode::CREATE_IO_CQ;
        let beyond = u32::try_from(self.rng.within(u64::from(QUEUES) + 1, 0xfffe))?;
        for (case, id) in [
            ("create_cq.id_0", 0),
            ("create_cq.id_in_use", u32::from(USED_QUEUE)),
            ("create_cq.id_beyond", beyond),
            ("create_cq.id_ffff", 0xffff),
        ] {
            self.try_create(case, create_queue(opcode, id, 7, 1))?;
        }
        let free = u32::from(FREE_QUEUE);
        let mqes = u32::try_from(self.controller.cap().0 & 0xffff)?;
        let too_large = u32::try_from(self.rng.within(u64::from(mqes) + 1, 0xffff))?;
        let vector = 0xffff_u32 << 16;
        for (case, size, cdw11) in [
            ("create_cq.size_0", 0, 1),
            ("create_cq.size_mqes", mqes, 1),
            ("create_cq.size_beyond_mqes", too_large, 1),
            ("create_cq.size_beyond_mqes", mqes + 1, 1),
            ("create_cq.not_contiguous", 7, 0),
            ("create_cq.interrupts", 7, 0b11),
            ("create_cq.vector_beyond", 7, 0b11 | vector),
        ] {
            self.try_create(case, create_queue(opcode, free, size, cdw11))?;
        }
        let mut unaligned = create_queue(opcode, free, 7, 1);
        unaligned.prp1 = U64::new(self.rng.pick(&[4, 8, 64, 2048]));
        self.try_create("create_cq.prp1_offset", unaligned)?;
        Ok(())
    }

    pub fn create_submission_queues_wrongly(&mut self) -> Result<()> {
        let opcode = admin_opcode::CREATE_IO_SQ;
        let free = u32::from(FREE_QUEUE);
        let beyond = u32::try_from(self.rng.within(u64::from(QUEUES) + 1, 0xfffe))?;
        let mqes = u32::try_from(self.controller.cap().0 & 0xffff)?;
        let bend = self.rng.pick(&[4, 8, 64, 2048]);
        let cq = free << 16;
        self.with_completion_queue(|bench| {
            for (case, id, size, cdw11) in [
                ("create_sq.id_0", 0, 7, 1 | cq),
                ("create_sq.id_in_use", u32::from(USED_QUEUE), 7, 1 | cq),
                ("create_sq.id_beyond", beyond, 7, 1 | cq),
                ("create_sq.id_ffff", 0xffff, 7, 1 | cq),
                ("create_sq.cq_0", free, 7, 1),
                ("create_sq.cq_absent", free, 7, 1 | (free - 1) << 16),
                ("create_sq.cq_beyond", free, 7, 1 | beyond << 16),
                ("create_sq.cq_of_another", free - 1, 7, 1 | cq),
                ("create_sq.size_0", free, 0, 1 | cq),
                ("create_sq.size_mqes", free, mqes, 1 | cq),
                ("create_sq.size_beyond_mqes", free, mqes + 1, 1 | cq),
                ("create_sq.not_contiguous", free, 7, cq),
            ] {
                bench.try_create(case, create_queue(opcode, id, size, cdw11))?;
            }
            let mut unaligned = create_queue(opcode, free, 7, 1 | cq);
            unaligned.prp1 = U64::new(bend);
            bench.try_create("create_sq.prp1_offset", unaligned)?;
            Ok(())
        })
    }

    pub fn delete_queues_wrongly(&mut self) -> Result<()> {
        let beyond = u32::try_from(self.rng.within(u64::from(QUEUES) + 1, 0xffff))?;
        for (name, opcode) in [
            ("delete_sq", admin_opcode::DELETE_IO_SQ),
            ("delete_cq", admin_opcode::DELETE_IO_CQ),
        ] {
            for (kind, id) in [
                ("id_0", 0),
                ("id_absent", u32::from(FREE_QUEUE)),
                ("id_beyond", beyond),
            ] {
                self.admin_status(&format!("{name}.{kind}"), delete_queue(opcode, id))?;
            }
        }
        let used = u32::from(USED_QUEUE);
        let entry = delete_queue(admin_opcode::DELETE_IO_CQ, used);
        self.admin_status("delete_cq.has_sq", entry)?;
        Ok(())
    }

    // ---- the rest ----

    pub fn abort(&mut self) -> Result<()> {
        let cid = u32::try_from(self.rng.within(0, 0xffff))? << 16;
        let beyond = u32::try_from(self.rng.within(u64::from(QUEUES) + 1, 0xffff))?;
        for (case, sqid) in [
            ("abort.unknown_command", u32::from(USED_QUEUE)),
            ("abort.queue_absent", u32::from(FREE_QUEUE)),
            ("abort.queue_beyond", beyond),
        ] {
            let entry = SubmissionEntry {
                cdw10: U32::new(sqid | cid),
                ..SubmissionEntry::new(admin_opcode::ABORT, Nsid::NONE)
            };
            self.admin_dw0(case, entry)?;
        }
        Ok(())
    }

    /// The driver has as many outstanding as there may be.
    pub fn event_request_beyond_the_limit(&mut self) -> Result<()> {
        self.admin_status(
            "event_request.too_many",
            SubmissionEntry::async_event_request(),
        )?;
        Ok(())
    }

    pub fn unknown_admin_opcode(&mut self) -> Result<()> {
        let opcode = self.rng.pick(&UNKNOWN_ADMIN_OPCODES);
        let nsid = self.rng.pick(&[Nsid::NONE, self.nsid, Nsid::ALL]);
        self.admin_status("admin.unknown_opcode", SubmissionEntry::new(opcode, nsid))?;
        Ok(())
    }

    pub fn admin_flags(&mut self) -> Result<()> {
        for (case, flags) in [
            ("admin.fused_first", 0x01),
            ("admin.fused_second", 0x02),
            ("admin.sgl", 0x40),
            ("admin.psdt_reserved", 0xc0),
        ] {
            let entry = SubmissionEntry {
                flags,
                ..get_features(0x07, 0, Nsid::NONE)
            };
            self.admin_status(case, entry)?;
        }
        Ok(())
    }
}
