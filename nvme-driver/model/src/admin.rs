//! The admin command set: queues, Identify, features, log pages, asynchronous events, Abort. NVM Express Base 2.0.
//!
//! Runs on the thread that services the admin queue, which is never a polling core, and may wait. Start at
//! [`execute`].

use std::collections::{BTreeMap, VecDeque};
use std::sync::atomic::Ordering;

use nvme_driver::spec::{
    AsyncEvent, Cns, ErrorLogEntry, FeatureId, IdentifyController, IdentifyNamespace, LbaFormat,
    LogId, NamespaceIds, Nsid, PAGE_SIZE, QueueCounts, SmartLog, Status, SubmissionEntry,
    admin_opcode, oncs,
};
use zerocopy::{FromZeros, IntoBytes};

use crate::io::{self, copy_out};
use crate::iommu::Dma;
use crate::queue::{DeviceQueue, IoCounters, Slot};
use crate::shared::Shared;
use crate::{MODEL_NUMBER, Medium, NULL_MODEL_NUMBER, VERSION};

/// Asynchronous Event Requests that may be outstanding (AERL, zero-based on the wire).
const EVENT_REQUESTS: u8 = 4;
/// Entries of the error log (ELPE, zero-based on the wire).
const ERROR_ENTRIES: u8 = 64;
/// Events that wait for a request; more of them are lost, as on a controller with little memory.
const WAITING_EVENTS: usize = 64;

const INVALID_FIELD: Status = Status::INVALID_FIELD.with_dnr();

/// Composite temperatures in kelvin: that of a controller that is never hot, and the thresholds of warnings.
const TEMPERATURE: u16 = 298;
const WARNING_TEMPERATURE: u16 = 343;
const CRITICAL_TEMPERATURE: u16 = 373;

/// Error Recovery: the one feature that each namespace has of its own. Default 0.
const ERROR_RECOVERY: u8 = 0x05;
/// Power Management. There is one power state, 0.
const POWER_MANAGEMENT: u8 = 0x02;

/// Feature identifiers that the driver does not use and that hold a value all the same, with their defaults:
/// Arbitration, Power Management, Temperature Threshold, Interrupt Coalescing, Interrupt Vector Configuration, Write
/// Atomicity Normal.
const PLAIN_FEATURES: [(u8, u32); 6] = [
    (0x01, 0),
    (POWER_MANAGEMENT, 0),
    (0x04, WARNING_TEMPERATURE as u32),
    (0x08, 0),
    (0x09, 0),
    (0x0a, 0),
];

/// State of the admin command set. A reset brings the defaults back.
#[derive(Debug)]
pub(crate) struct Admin {
    features: [u32; PLAIN_FEATURES.len()],
    /// Of the namespaces that it was set for.
    error_recovery: BTreeMap<Nsid, u32>,
    /// I/O queue pairs granted by Set Features; `None` before it was sent.
    granted: Option<u16>,
    event_config: u32,
    /// CIDs of outstanding Asynchronous Event Requests.
    requests: VecDeque<u16>,
    waiting: VecDeque<AsyncEvent>,
    /// Event types that were reported and whose log page was not read since, one bit each.
    masked: u8,
    changed_namespaces: Vec<Nsid>,
    critical_warning: u8,
    errors: VecDeque<ErrorLogEntry>,
    error_count: u64,
    last_driver_error: Option<&'static str>,
}

impl Default for Admin {
    fn default() -> Admin {
        Admin {
            features: PLAIN_FEATURES.map(|(_, value)| value),
            error_recovery: BTreeMap::new(),
            granted: None,
            event_config: 0,
            requests: VecDeque::new(),
            waiting: VecDeque::new(),
            masked: 0,
            changed_namespaces: Vec::new(),
            critical_warning: 0,
            errors: VecDeque::new(),
            error_count: 0,
            last_driver_error: None,
        }
    }
}

impl Admin {
    pub(crate) fn note_driver_error(&mut self, what: &'static str) {
        self.last_driver_error = Some(what);
    }

    pub(crate) fn last_driver_error(&self) -> Option<&'static str> {
        self.last_driver_error
    }

    /// Forgets what a controller reset forgets. Logs survive.
    pub(crate) fn reset(&mut self) {
        self.features = PLAIN_FEATURES.map(|(_, value)| value);
        self.error_recovery.clear();
        self.granted = None;
        self.event_config = 0;
        self.requests.clear();
        self.waiting.clear();
        self.masked = 0;
    }

    /// Something happened that the driver may want to know, if its configuration says so.
    pub(crate) fn raise(&mut self, event: AsyncEvent) {
        let wanted = match event.event_type() {
            2 => self.event_config & (1 << (8 + event.information())) != 0,
            1 => self.event_config & 0xff & u32::from(self.critical_warning) != 0,
            _ => true,
        };
        if wanted && self.waiting.len() < WAITING_EVENTS {
            self.waiting.push_back(event);
        }
    }

    pub(crate) fn namespace_changed(&mut self, nsid: Nsid) {
        if !self.changed_namespaces.contains(&nsid) {
            self.changed_namespaces.push(nsid);
        }
        // Type 2 Notice, information 00h Namespace Attribute Changed, log page 04h.
        self.raise(AsyncEvent(0x0004_0002));
    }

    pub(crate) fn set_critical_warning(&mut self, bits: u8) {
        self.critical_warning = bits;
        // Type 1 SMART / health, information by the lowest bit: 00h reliability, 01h temperature, 02h spare.
        let information = match bits {
            bits if bits & 0b10 != 0 => 1,
            bits if bits & 1 != 0 => 2,
            _ => 0,
        };
        if bits != 0 {
            self.raise(AsyncEvent(0x0002_0001 | information << 8));
        }
    }

    fn note_error(&mut self, entry: &SubmissionEntry, status: Status) {
        self.error_count += 1;
        let mut error = ErrorLogEntry::new_zeroed();
        error.error_count = self.error_count.into();
        error.cid = entry.cid;
        error.status = status.to_wire(false).into();
        error.nsid = entry.nsid;
        self.errors.truncate(usize::from(ERROR_ENTRIES) - 1);
        self.errors.push_front(error);
    }
}

/// Ends outstanding Asynchronous Event Requests for events that wait.
pub(crate) fn deliver_events(queue: &mut DeviceQueue, shared: &Shared) {
    let mut admin = shared.admin();
    while let Some(at) = {
        let masked = admin.masked;
        admin
            .waiting
            .iter()
            .position(|event| masked & (1 << event.event_type()) == 0)
    } && let Some(cid) = admin.requests.pop_front()
        && let Some(event) = admin.waiting.remove(at)
    {
        admin.masked |= 1 << event.event_type();
        queue.complete(cid, Status::SUCCESS, event.0);
    }
}

/// Carries one admin command out: its status and dword 0 of its completion. `None`: it completes later.
pub(crate) fn execute(
    shared: &Shared,
    dma: &mut Dma<'_>,
    entry: &SubmissionEntry,
) -> Option<(Status, u32)> {
    let result = if entry.flags != 0 {
        Err(INVALID_FIELD)
    } else {
        match entry.opcode {
            admin_opcode::CREATE_IO_CQ => create_cq(shared, entry),
            admin_opcode::CREATE_IO_SQ => create_sq(shared, entry),
            admin_opcode::DELETE_IO_SQ => delete_sq(shared, entry),
            admin_opcode::DELETE_IO_CQ => delete_cq(shared, entry),
            admin_opcode::IDENTIFY => identify(shared, dma, entry),
            admin_opcode::GET_LOG_PAGE => get_log_page(shared, dma, entry),
            admin_opcode::SET_FEATURES => set_features(shared, entry),
            admin_opcode::GET_FEATURES => get_features(shared, entry),
            admin_opcode::ABORT => Ok(abort(shared, entry)),
            admin_opcode::ASYNC_EVENT_REQUEST => {
                let requests = &mut shared.admin().requests;
                if requests.len() < usize::from(EVENT_REQUESTS) {
                    requests.push_back(entry.cid.get());
                    return None;
                }
                Err(Status::ASYNC_EVENT_LIMIT_EXCEEDED.with_dnr())
            }
            _ => Err(Status::INVALID_OPCODE.with_dnr()),
        }
    };
    Some(match result {
        Ok(dw0) => (Status::SUCCESS, dw0),
        Err(status) => {
            shared.admin().note_error(entry, status);
            (status, 0)
        }
    })
}

type AdminResult = Result<u32, Status>;

fn low(dword: u32) -> u16 {
    (dword & 0xffff) as u16
}

/// The slot of an I/O queue identifier, if that many were granted.
fn io_slot(shared: &Shared, id: u16) -> Result<&Slot, Status> {
    let granted = shared.admin().granted.unwrap_or(shared.config.queues);
    let valid = (1..=granted).contains(&id);
    valid
        .then(|| shared.slots.get(usize::from(id)))
        .flatten()
        .map(|slot| &**slot)
        .ok_or(Status::INVALID_QUEUE_IDENTIFIER.with_dnr())
}

/// What both Create commands check: queue size, and a contiguous, page aligned place.
fn queue_shape(shared: &Shared, entry: &SubmissionEntry) -> Result<u32, Status> {
    let entries = (entry.cdw10.get() >> 16) + 1;
    if entries < 2 || entries > shared.config.mqes {
        return Err(Status::INVALID_QUEUE_SIZE.with_dnr());
    }
    if entry.cdw11.get() & 1 == 0 {
        return Err(INVALID_FIELD); // CAP.CQR: only contiguous queues
    }
    if !entry.prp1.get().is_multiple_of(PAGE_SIZE as u64) {
        return Err(Status::INVALID_PRP_OFFSET.with_dnr());
    }
    Ok(entries)
}

fn create_cq(shared: &Shared, entry: &SubmissionEntry) -> AdminResult {
    let slot = io_slot(shared, low(entry.cdw10.get()))?;
    let mut queue = slot.lock();
    if queue.has_cq() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
    }
    let entries = queue_shape(shared, entry)?;
    if entry.cdw11.get() & 2 != 0 {
        return Err(Status::INVALID_INTERRUPT_VECTOR.with_dnr()); // there are no interrupts
    }
    slot.unring();
    queue.create_cq(entry.prp1.get(), entries);
    Ok(0)
}

fn create_sq(shared: &Shared, entry: &SubmissionEntry) -> AdminResult {
    let id = low(entry.cdw10.get());
    let slot = io_slot(shared, id)?;
    let mut queue = slot.lock();
    if queue.has_sq() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
    }
    // Each submission queue has the completion queue of its own identifier: they are serviced by one core.
    if low(entry.cdw11.get() >> 16) != id || !queue.has_cq() {
        return Err(Status::INVALID_COMPLETION_QUEUE.with_dnr());
    }
    let entries = queue_shape(shared, entry)?;
    queue.create_sq(entry.prp1.get(), entries);
    Ok(0)
}

fn delete_sq(shared: &Shared, entry: &SubmissionEntry) -> AdminResult {
    let slot = io_slot(shared, low(entry.cdw10.get()))?;
    let mut queue = slot.lock();
    if !queue.has_sq() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
    }
    queue.delete_sq(slot, shared);
    Ok(0)
}

fn delete_cq(shared: &Shared, entry: &SubmissionEntry) -> AdminResult {
    let slot = io_slot(shared, low(entry.cdw10.get()))?;
    let mut queue = slot.lock();
    if !queue.has_cq() {
        return Err(Status::INVALID_QUEUE_IDENTIFIER.with_dnr());
    }
    if queue.has_sq() {
        return Err(Status::INVALID_QUEUE_DELETION.with_dnr());
    }
    queue.delete_cq();
    slot.unring();
    Ok(0)
}

/// Dword 0 bit 0: 0 when the command was aborted.
fn abort(shared: &Shared, entry: &SubmissionEntry) -> u32 {
    let (sqid, cid) = (low(entry.cdw10.get()), low(entry.cdw10.get() >> 16));
    let aborted = io_slot(shared, sqid).is_ok_and(|slot| slot.lock().abort(cid));
    u32::from(!aborted)
}

fn identify(shared: &Shared, dma: &mut Dma<'_>, entry: &SubmissionEntry) -> AdminResult {
    let nsid = Nsid(entry.nsid.get());
    let cns = (entry.cdw10.get() & 0xff) as u8;
    let mut page = [0; PAGE_SIZE];
    match cns {
        cns if cns == Cns::Controller as u8 => {
            page.copy_from_slice(identify_controller(shared).as_bytes());
        }
        // There is no Namespace Management, so nothing is common to all of them.
        cns if (cns == Cns::Namespace as u8 || cns == Cns::NamespaceDescriptors as u8)
            && nsid == Nsid::ALL =>
        {
            return Err(Status::INVALID_NAMESPACE.with_dnr());
        }
        // Zeroes for an inactive one.
        cns if cns == Cns::Namespace as u8 && shared.is_inactive(nsid) => {}
        cns if cns == Cns::Namespace as u8 => {
            page.copy_from_slice(identify_namespace(shared, nsid)?.as_bytes());
        }
        cns if cns == Cns::ActiveNamespaces as u8 => {
            if nsid.0 >= 0xffff_fffe {
                return Err(Status::INVALID_NAMESPACE.with_dnr());
            }
            let active = shared.namespaces.iter().map(|namespace| namespace.nsid);
            let after = active.filter(|active| *active > nsid);
            for (slot, active) in page.chunks_exact_mut(4).zip(after) {
                slot.copy_from_slice(&active.0.to_le_bytes());
            }
        }
        cns if cns == Cns::NamespaceDescriptors as u8 => {
            let namespace = shared.namespace(nsid)?;
            let list = NamespaceIds {
                eui64: Some(namespace.eui64),
                nguid: Some(namespace.nguid),
                uuid: Some(namespace.uuid),
                command_set: Some(0),
            }
            .to_list();
            page[..list.len()].copy_from_slice(&list);
        }
        _ => return Err(INVALID_FIELD),
    }
    copy_out(dma, entry, PAGE_SIZE, &page)?;
    Ok(0)
}

/// Left-justified ASCII, padded with spaces.
fn ascii<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (byte, given) in field.iter_mut().zip(text.bytes()) {
        *byte = given;
    }
    field
}

fn identify_controller(shared: &Shared) -> Box<IdentifyController> {
    let config = &shared.config;
    let bytes = shared.namespaces.iter().map(|n| u128::from(n.bytes()));
    let mut id = Box::new(IdentifyController::zeroed());
    id.sn = ascii(&config.serial);
    let null = config.medium == Medium::Null;
    id.mn = ascii(if null {
        NULL_MODEL_NUMBER
    } else {
        MODEL_NUMBER
    });
    id.fr = ascii(env!("CARGO_PKG_VERSION"));
    id.rab = 6;
    // A power of two of pages: checked when the controller was made.
    id.mdts = config.mdts_bytes.map_or(0, |bytes| {
        u8::try_from((bytes / PAGE_SIZE as u64).trailing_zeros()).unwrap_or(0)
    });
    id.cntlid = 1.into();
    id.ver = VERSION.into();
    id.oaes = (1 << 8).into(); // Namespace Attribute Notices
    id.cntrltype = 1; // I/O controller
    id.acl = 3;
    id.aerl = EVENT_REQUESTS - 1;
    id.frmw = 0b11; // one slot, read-only
    id.lpa = 1 << 2; // Get Log Page takes all 32 bits of NUMD, and an offset
    id.elpe = ERROR_ENTRIES - 1;
    id.wctemp = WARNING_TEMPERATURE.into();
    id.cctemp = CRITICAL_TEMPERATURE.into();
    id.tnvmcap = bytes.sum::<u128>().to_le_bytes();
    id.sqes = 0x66;
    id.cqes = 0x44;
    id.nn = shared.max_namespaces().into();
    let data = if null { 0 } else { oncs::COMPARE | oncs::COPY };
    id.oncs = (data | oncs::DATASET_MANAGEMENT | oncs::WRITE_ZEROES | oncs::SAVE_AND_SELECT).into();
    id.vwc = 0b110 | u8::from(config.vwc); // Flush knows the broadcast NSID
    let uuid = shared
        .namespaces
        .first()
        .map_or([0; 16], |namespace| namespace.uuid);
    let nqn = format!("nqn.2014-08.org.nvmexpress:uuid:{}", hyphenated(&uuid));
    id.subnqn[..nqn.len()].copy_from_slice(nqn.as_bytes());
    id
}

fn hyphenated(uuid: &[u8; 16]) -> String {
    let mut text = String::new();
    for (i, byte) in uuid.iter().enumerate() {
        if matches!(i, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

fn identify_namespace(shared: &Shared, nsid: Nsid) -> Result<Box<IdentifyNamespace>, Status> {
    let namespace = shared.namespace(nsid)?;
    let mut id = Box::new(IdentifyNamespace::zeroed());
    let blocks = namespace.blocks();
    (id.nsze, id.ncap, id.nuse) = (blocks.into(), blocks.into(), blocks.into());
    // Deallocated blocks read zero; Write Zeroes honours DEAC. Where nothing is kept, what they read is not reported.
    id.dlfeat = if shared.config.medium == Medium::Null {
        0
    } else {
        0b1001
    };
    id.nvmcap = (u128::from(blocks) << namespace.block_shift).to_le_bytes();
    if shared.config.medium != Medium::Null {
        id.mssrl = io::MAX_COPY_RANGE.into();
        id.mcl = io::MAX_COPY.into();
        id.msrc = io::MAX_COPY_RANGES - 1;
    }
    id.nguid = namespace.nguid;
    id.eui64 = namespace.eui64;
    id.lbaf[0] = LbaFormat {
        ms: 0.into(),
        lbads: u8::try_from(namespace.block_shift).unwrap_or(0),
        rp: 0,
    };
    Ok(id)
}

/// Bits of CDW10 in Get Features: what is asked for.
const SELECT_SUPPORTED: u32 = 3;
/// CDW10 bit 31 in Set Features: keep it over a power cycle.
const SAVE: u32 = 1 << 31;
/// Answer to [`SELECT_SUPPORTED`]: changeable; nothing is saveable.
const CHANGEABLE: u32 = 1 << 2;
/// The same: each namespace has its own.
const NAMESPACE_SPECIFIC: u32 = 1 << 1;

fn set_features(shared: &Shared, entry: &SubmissionEntry) -> AdminResult {
    let id = (entry.cdw10.get() & 0xff) as u8;
    let value = entry.cdw11.get();
    let nsid = Nsid(entry.nsid.get());
    if entry.cdw10.get() & SAVE != 0 {
        return Err(Status::FEATURE_NOT_SAVEABLE.with_dnr());
    }
    if id == ERROR_RECOVERY {
        let of = match nsid {
            Nsid::ALL => shared.namespaces.as_slice(),
            nsid => std::slice::from_ref(shared.namespace(nsid)?),
        };
        let values = of.iter().map(|namespace| (namespace.nsid, value));
        shared.admin().error_recovery.extend(values);
        return Ok(0);
    }
    // The others are the whole controller's.
    if nsid != Nsid::NONE && nsid != Nsid::ALL {
        return Err(if nsid.0 > shared.max_namespaces() {
            Status::INVALID_NAMESPACE.with_dnr()
        } else {
            Status::FEATURE_NOT_NAMESPACE_SPECIFIC.with_dnr()
        });
    }
    match id {
        POWER_MANAGEMENT if value & 0x1f != 0 => Err(INVALID_FIELD),
        id if id == FeatureId::VolatileWriteCache as u8 => {
            if !shared.config.vwc {
                return Err(INVALID_FIELD);
            }
            let enable = value & 1 != 0;
            if !enable && shared.media.sync().is_err() {
                return Err(Status::INTERNAL_ERROR);
            }
            shared.write_cache.store(enable, Ordering::Relaxed);
            Ok(0)
        }
        id if id == FeatureId::NumberOfQueues as u8 => {
            if low(value) == u16::MAX || value >> 16 == 0xffff {
                return Err(INVALID_FIELD);
            }
            if shared.slots.iter().skip(1).any(|slot| slot.lock().has_cq()) {
                return Err(Status::COMMAND_SEQUENCE_ERROR.with_dnr());
            }
            let wanted = QueueCounts::from_zeroes_based(value);
            let granted = wanted
                .submission
                .max(wanted.completion)
                .min(shared.config.queues);
            shared.admin().granted = Some(granted);
            Ok(number_of_queues(granted))
        }
        id if id == FeatureId::AsyncEventConfiguration as u8 => {
            shared.admin().event_config = value;
            Ok(0)
        }
        _ => match PLAIN_FEATURES.iter().position(|(known, _)| *known == id) {
            Some(at) => {
                // Their values mean nothing here: there is no power, no heat and no interrupt to speak of.
                shared.admin().features[at] = value;
                Ok(0)
            }
            None => Err(INVALID_FIELD),
        },
    }
}

fn number_of_queues(pairs: u16) -> u32 {
    QueueCounts {
        submission: pairs,
        completion: pairs,
    }
    .to_zeroes_based()
}

fn get_features(shared: &Shared, entry: &SubmissionEntry) -> AdminResult {
    let id = (entry.cdw10.get() & 0xff) as u8;
    let select = entry.cdw10.get() >> 8 & 7;
    if select > SELECT_SUPPORTED {
        return Err(INVALID_FIELD);
    }
    if id == ERROR_RECOVERY {
        let nsid = match Nsid(entry.nsid.get()) {
            Nsid::ALL => return Err(Status::INVALID_NAMESPACE.with_dnr()),
            nsid => shared.namespace(nsid)?.nsid,
        };
        let current = shared.admin().error_recovery.get(&nsid).copied();
        return Ok(match select {
            SELECT_SUPPORTED => CHANGEABLE | NAMESPACE_SPECIFIC,
            0 => current.unwrap_or(0),
            _ => 0,
        });
    }
    let admin = shared.admin();
    let queues = number_of_queues(shared.config.queues);
    let (current, default) = match id {
        id if id == FeatureId::VolatileWriteCache as u8 => {
            if !shared.config.vwc {
                return Err(INVALID_FIELD);
            }
            (u32::from(shared.write_cache.load(Ordering::Relaxed)), 1)
        }
        id if id == FeatureId::NumberOfQueues as u8 => {
            (admin.granted.map_or(queues, number_of_queues), queues)
        }
        id if id == FeatureId::AsyncEventConfiguration as u8 => (admin.event_config, 0),
        _ => {
            let at = PLAIN_FEATURES.iter().position(|(known, _)| *known == id);
            let at = at.ok_or(INVALID_FIELD)?;
            (admin.features[at], PLAIN_FEATURES[at].1)
        }
    };
    Ok(match select {
        SELECT_SUPPORTED => CHANGEABLE,
        0 => current,
        _ => default, // nothing is saved, so the saved value is the default
    })
}

fn get_log_page(shared: &Shared, dma: &mut Dma<'_>, entry: &SubmissionEntry) -> AdminResult {
    let (cdw10, cdw11) = (entry.cdw10.get(), entry.cdw11.get());
    let id = (cdw10 & 0xff) as u8;
    let dwords = u64::from(cdw10 >> 16 | (cdw11 & 0xffff) << 16) + 1;
    let offset = u64::from(entry.cdw12.get()) | u64::from(entry.cdw13.get()) << 32;
    let page = log_page(shared, id).ok_or(Status::INVALID_LOG_PAGE.with_dnr())?;
    let start = usize::try_from(offset)
        .ok()
        .filter(|start| start.is_multiple_of(4) && *start <= page.len());
    let start = start.ok_or(INVALID_FIELD)?;
    if shared
        .config
        .mdts_bytes
        .is_some_and(|most| dwords * 4 > most)
    {
        return Err(INVALID_FIELD);
    }
    // A page that no namespace has of its own (LPA bit 0 is 0).
    let nsid = Nsid(entry.nsid.get());
    if nsid != Nsid::NONE && nsid != Nsid::ALL {
        shared.namespace(nsid)?;
        return Err(INVALID_FIELD);
    }
    // What follows the page is undefined; without MDTS it could be 16 GiB of it.
    let wanted = usize::try_from(dwords * 4).unwrap_or(usize::MAX);
    let end = page.len().min(start.saturating_add(wanted));
    copy_out(dma, entry, wanted, &page[start..end])?;
    let retain = cdw10 & (1 << 15) != 0;
    if !retain {
        let mut admin = shared.admin();
        let event_type = match id {
            0x01 => 0,
            0x02 => 1,
            _ => 2,
        };
        admin.masked &= !(1 << event_type);
        if id == LogId::ChangedNamespaces as u8 {
            admin.changed_namespaces.clear();
        }
    }
    Ok(0)
}

fn log_page(shared: &Shared, id: u8) -> Option<Vec<u8>> {
    let admin = shared.admin();
    match id {
        id if id == LogId::Error as u8 => {
            let mut page = Vec::new();
            admin
                .errors
                .iter()
                .for_each(|error| page.extend_from_slice(error.as_bytes()));
            page.resize(usize::from(ERROR_ENTRIES) * size_of::<ErrorLogEntry>(), 0);
            Some(page)
        }
        id if id == LogId::Smart as u8 => {
            let (warning, errors) = (admin.critical_warning, admin.error_count);
            drop(admin);
            Some(
                smart(&shared.io_counters(), warning, errors)
                    .as_bytes()
                    .to_vec(),
            )
        }
        // Firmware Slot Information: slot 1 is active.
        0x03 => {
            let mut page = vec![0; 512];
            page[0] = 1;
            page[8..16].copy_from_slice(&ascii::<8>(env!("CARGO_PKG_VERSION")));
            Some(page)
        }
        id if id == LogId::ChangedNamespaces as u8 => {
            let mut page: Vec<u8> = admin
                .changed_namespaces
                .iter()
                .flat_map(|nsid| nsid.0.to_le_bytes())
                .collect();
            page.resize(PAGE_SIZE, 0);
            Some(page)
        }
        _ => None,
    }
}

fn smart(counters: &IoCounters, critical_warning: u8, error_count: u64) -> SmartLog {
    let wide = |value: u64| u128::from(value).to_le_bytes();
    let mut log = SmartLog::new_zeroed();
    log.critical_warning = critical_warning;
    log.temperature = TEMPERATURE.into();
    log.available_spare = 100;
    log.available_spare_threshold = 10;
    log.data_units_read = wide((counters.units_read + counters.units_compared).div_ceil(1000));
    log.data_units_written = wide(counters.units_written.div_ceil(1000));
    // Compare reads as well.
    log.host_read_commands = wide(counters.reads + counters.compares);
    log.host_write_commands = wide(counters.writes);
    log.power_cycles = wide(1);
    log.error_log_entries = wide(error_count);
    log
}
