//! A controller's life: `Controller<T, Disabled>` -> `Controller<T, Enabled>` and back, each step consuming the one
//! before. The types say what we decided; what the device did (fatal status, removal) is a value.
//!
//! Promises: the bring-up order of NVM Express Base 2.0 "Controller Initialization"; every wait ends by CAP.TO, RTD3E
//! or a deadline of ours (I8); queue memory is unmapped only when the controller has forgotten it. Runs on a control
//! thread and may sleep. Start at [`Controller::new`].

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::admin::{ADMIN_ENTRIES, AdminCompletion, AdminQueue};
use crate::dma::{DmaAccess, DmaBuffer, DmaSpace};
use crate::error::{Error, Result};
use crate::queue_pair::doorbells::{Doorbells, ShadowPages};
use crate::queue_pair::{MAX_TRANSFER, QueuePair};
use crate::spec::{
    AsyncEvent, Cap, Cc, Cid, Cns, Csts, ErrorLogEntry, FeatureId, IdentifyController,
    IdentifyNamespace, LogId, NamespaceIds, Nsid, PAGE_SIZE, QueueCounts, QueueId, SmartLog,
    SubmissionEntry, Version, admin_queue_attributes, async_event_config, oacs, offset,
};
use crate::transport::{Notice, Transport};

/// How long two looks at CSTS are apart.
const READY_INTERVAL: Duration = Duration::from_millis(1);
/// The least that an admin command is given: CAP.TO speaks of enabling only, and queue deletion may wait for media.
const ADMIN_DEADLINE: Duration = Duration::from_secs(10);
/// How long the registers may be out of reach while the function is reset: the PCI Express specification gives it 100 ms,
/// and some devices take longer.
const FUNCTION_RESET_DEADLINE: Duration = Duration::from_secs(2);
/// The least that a shutdown is given: many controllers leave RTD3E at 0.
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(5);

/// A step back to disabled: the controller either way, and why it is not known to have ended well.
pub type DisableResult<T> = Result<Controller<T, Disabled>, (Box<Controller<T, Disabled>>, Error)>;

/// CC.EN = 0 and CSTS.RDY = 0 were seen.
pub struct Disabled {
    _private: (),
}

/// CSTS.RDY = 1 was seen; the admin queue works.
pub struct Enabled<T: Transport> {
    admin: AdminQueue<T>,
    /// One page for the data of admin commands.
    page: DmaBuffer,
    identity: Box<IdentifyController>,
    granted: u16,
    /// `in_use[i]`: queue identifier i + 1 exists.
    in_use: Vec<bool>,
    event_requests: usize,
    /// See [`Controller::take_changed_namespaces`].
    changed_namespaces: Vec<Nsid>,
    /// The controller reads doorbells here.
    shadows: Option<Arc<ShadowPages>>,
}

/// One NVMe controller behind a transport, in state `S`.
pub struct Controller<T: Transport, S> {
    transport: T,
    space: Arc<DmaSpace>,
    cap: Cap,
    /// Whoever polls the queue pairs may sleep.
    interrupts: bool,
    state: S,
}

/// How a controller that we enabled is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// As it should be.
    Ready,
    /// CSTS.CFS: only a reset helps.
    Fatal,
    /// CSTS.RDY is 0: someone else has reset it, and its queues are gone.
    Stopped,
    /// It does not answer: it was removed or lost power.
    Removed,
}

/// What one namespace is: the parts of its identify data that a server needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Its identifier.
    pub nsid: Nsid,
    /// Size in logical blocks.
    pub blocks: u64,
    /// Bytes of one logical block (512, 4096, ...).
    pub block_size: u32,
    /// Metadata bytes of one block; 0 for none.
    pub metadata_size: u16,
    /// NSATTR bit 0.
    pub write_protected: bool,
    /// DLFEAT: deallocated blocks read back zero.
    pub deallocated_reads_zero: bool,
    /// NGUID, EUI-64, UUID, and the command set if the controller says it.
    pub ids: NamespaceIds,
}

impl<T: Transport> Controller<T, Disabled> {
    /// Reads the capabilities and disables the controller, whatever state it was left in.
    ///
    /// # Errors
    /// [`Error`] when nothing answers, when RDY does not change in time, or when the controller lacks the NVM
    /// command set or 4 KiB pages.
    pub fn new(transport: T) -> Result<Controller<T, Disabled>> {
        let space = DmaSpace::new(transport.dma_domain());
        Controller::start(transport, space)
    }

    /// The same for a device that comes back: `space` is its predecessor's, given up by [`Controller::release`]. All
    /// that is mapped in it is mapped for this device, at the same addresses.
    ///
    /// # Errors
    /// As [`Controller::new`], and when something cannot be mapped; `space` has no domain then.
    pub fn with_space(transport: T, space: Arc<DmaSpace>) -> Result<Controller<T, Disabled>> {
        space.attach(transport.dma_domain())?;
        let started = Controller::start(transport, Arc::clone(&space));
        if started.is_err() {
            space.detach();
        }
        started
    }

    fn start(mut transport: T, space: Arc<DmaSpace>) -> Result<Controller<T, Disabled>> {
        let cap = Cap(transport.read64(offset::CAP));
        let unsupported = |transport: &T, what: String| Error::Unsupported {
            device: transport.name(),
            what,
        };
        if cap == Cap::REMOVED {
            return Err(Error::Removed {
                device: transport.name(),
            });
        }
        if !cap.supports_nvm_command_set() {
            let what = format!(
                "the controller has no NVM command set (CAP {:#018x})",
                cap.0
            );
            return Err(unsupported(&transport, what));
        }
        if cap.min_page_size() > PAGE_SIZE as u64 {
            let what = format!(
                "the controller needs pages of {} bytes (CAP.MPSMIN)",
                cap.min_page_size()
            );
            return Err(unsupported(&transport, what));
        }
        let mut controller = Controller {
            transport,
            space,
            cap,
            interrupts: false,
            state: Disabled { _private: () },
        };
        controller.disable()?;
        Ok(controller)
    }

    /// Gives queue pairs an interrupt each, as far as the device has them, for pollers that sleep
    /// ([`QueuePair::request_interrupt`]). Stays so over resets. Without this, interrupts are off.
    #[must_use]
    pub fn with_interrupts(mut self) -> Self {
        self.interrupts = true;
        self
    }

    /// Enables the controller, identifies it and asks for `queue_pairs` I/O queue pairs; fewer may be granted.
    ///
    /// # Errors
    /// The controller, disabled again where that was possible, and the reason.
    pub fn enable(
        mut self,
        queue_pairs: u16,
    ) -> Result<Controller<T, Enabled<T>>, (Box<Self>, Error)> {
        let prepared = self.port(QueueId::ADMIN).and_then(|port| {
            let admin = AdminQueue::new(&self.space, port)?;
            Ok((
                admin,
                DmaBuffer::new(&self.space, PAGE_SIZE, DmaAccess::Both)?,
            ))
        });
        let (admin, page) = match prepared {
            Ok(prepared) => prepared,
            Err(error) => return Err((Box::new(self), error)),
        };
        let (asq, acq) = admin.ring_addresses();
        self.transport
            .write32(offset::AQA, admin_queue_attributes(ADMIN_ENTRIES));
        self.transport.write64(offset::ASQ, asq.0);
        self.transport.write64(offset::ACQ, acq.0);
        // No vector is ever unmasked here. MSI-X has masks of its own, and whoever uses it leaves this register alone.
        let msix = self.interrupts && self.transport.enable_interrupts(queue_pairs);
        if !msix {
            self.transport.write32(offset::INTMS, u32::MAX);
        }
        self.transport.write32(offset::CC, Cc::enabled().0);

        let state = Enabled {
            admin,
            page,
            identity: Box::new(IdentifyController::zeroed()),
            granted: 0,
            in_use: Vec::new(),
            event_requests: 0,
            changed_namespaces: Vec::new(),
            shadows: None,
        };
        let mut enabled = Controller {
            transport: self.transport,
            space: self.space,
            cap: self.cap,
            interrupts: self.interrupts,
            state,
        };
        match enabled.bring_up(queue_pairs) {
            Ok(()) => Ok(enabled),
            Err(error) => Err((Box::new(enabled.into_disabled().0), error)),
        }
    }
}

impl<T: Transport> Controller<T, Enabled<T>> {
    fn bring_up(&mut self, queue_pairs: u16) -> Result<()> {
        self.transport
            .pause(self.transport.quirks().delay_before_ready);
        self.wait_ready(true, "enabling the controller")?;
        self.execute(
            "identifying the controller",
            SubmissionEntry::identify(Cns::Controller, Nsid::NONE),
        )?;
        *self.state.identity = self.state.page.read(0);

        let wanted = queue_pairs.max(1);
        let wanted = QueueCounts {
            submission: wanted,
            completion: wanted,
        };
        let entry =
            SubmissionEntry::set_features(FeatureId::NumberOfQueues, wanted.to_zeroes_based());
        let granted = QueueCounts::from_zeroes_based(self.execute("asking for I/O queues", entry)?);
        self.state.granted = granted
            .submission
            .min(granted.completion)
            .min(wanted.submission);
        self.state.in_use = vec![false; usize::from(self.state.granted)];
        // Forgotten at each reset.
        self.share_doorbells()?;

        // Only the events that the controller says it has: an unknown bit would be an invalid field.
        let notices = self.state.identity.oaes.get() & async_event_config::NAMESPACE_ATTRIBUTE;
        let events = async_event_config::CRITICAL_WARNINGS | notices;
        let entry = SubmissionEntry::set_features(FeatureId::AsyncEventConfiguration, events);
        self.execute("choosing asynchronous events", entry)?;
        self.state.event_requests = usize::from(self.state.identity.aerl)
            .saturating_add(1)
            .min(4);
        self.state
            .admin
            .arm_events(&mut self.transport, self.state.event_requests)
    }

    fn execute(&mut self, doing: &'static str, entry: SubmissionEntry) -> Result<u32> {
        let deadline = self.cap.ready_timeout().max(ADMIN_DEADLINE);
        let data = Some(self.state.page.iova(0));
        self.state
            .admin
            .execute(&mut self.transport, doing, entry, data, deadline)
    }

    /// Sends one admin command as it stands, data pointer included (only the command identifier is ours), and waits for
    /// the answer. Commands that this crate has no words for go this way, and invalid ones.
    ///
    /// A data pointer names memory that is mapped for the device ([`crate::dma::DmaBuffer::iova`]) and stays mapped
    /// meanwhile. What the driver keeps book of is the caller's to leave alone or to restore: queues that
    /// [`Controller::create_queue_pair`] made, Number of Queues, Asynchronous Event Configuration. An Asynchronous
    /// Event Request that is granted would not be answered in time: see [`Controller::next_event`].
    ///
    /// # Errors
    /// When no answer comes. That the controller refuses is an answer: [`AdminCompletion::status`].
    pub fn admin_command(&mut self, entry: SubmissionEntry) -> Result<AdminCompletion> {
        let deadline = self.cap.ready_timeout().max(ADMIN_DEADLINE);
        self.state.admin.run(
            &mut self.transport,
            "sending an admin command",
            entry,
            deadline,
        )
    }

    fn doorbells(&mut self, id: QueueId) -> Result<Doorbells<T::Port>> {
        let port = self.port(id)?;
        let stride = self.cap.doorbell_stride();
        Ok(match &self.state.shadows {
            Some(pages) => Doorbells::with_shadows(port, pages, id, stride),
            None => Doorbells::new(port),
        })
    }

    /// Has the controller take doorbells from memory, if it offers that.
    fn share_doorbells(&mut self) -> Result<()> {
        if self.state.identity.oacs.get() & oacs::DOORBELL_BUFFER_CONFIG == 0 {
            return Ok(());
        }
        let pages = ShadowPages::new(&self.space)?;
        let (values, events) = pages.addresses();
        let entry = SubmissionEntry {
            prp1: values.0.into(),
            prp2: events.0.into(),
            ..SubmissionEntry::doorbell_buffer_config()
        };
        let answer = self.admin_command(entry)?;
        if answer.status.is_success() {
            self.state.shadows = Some(pages);
        } else {
            // It works without.
            tracing::info!(device = %self.transport.name(), status = %answer.status, "no shadow doorbells");
        }
        Ok(())
    }

    /// Identify Controller data.
    #[must_use]
    pub fn identity(&self) -> &IdentifyController {
        &self.state.identity
    }

    /// How many I/O queue pairs the controller granted.
    #[must_use]
    pub fn granted_queue_pairs(&self) -> u16 {
        self.state.granted
    }

    /// The most bytes of one Read or Write.
    #[must_use]
    pub fn max_transfer(&self) -> u32 {
        let mdts = self.state.identity.max_transfer(self.cap.min_page_size());
        mdts.and_then(|bytes| u32::try_from(bytes).ok())
            .map_or(MAX_TRANSFER, |bytes| bytes.min(MAX_TRANSFER))
    }

    /// Identifiers of all active namespaces, ascending.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn active_namespaces(&mut self) -> Result<Vec<Nsid>> {
        let mut namespaces: Vec<Nsid> = Vec::new();
        loop {
            let after = namespaces.last().copied().unwrap_or(Nsid::NONE);
            self.execute(
                "listing namespaces",
                SubmissionEntry::identify(Cns::ActiveNamespaces, after),
            )?;
            let list: [zerocopy::little_endian::U32; 1024] = self.state.page.read(0);
            // Each entry must exceed the one before, so a hostile list ends the loop.
            let before = namespaces.len();
            for nsid in list.iter().map(|nsid| Nsid(nsid.get())) {
                if nsid <= namespaces.last().copied().unwrap_or(after) {
                    break;
                }
                namespaces.push(nsid);
            }
            if namespaces.len() - before < list.len() {
                return Ok(namespaces);
            }
        }
    }

    /// The identify data of one namespace as the controller returns it.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn identify_namespace(&mut self, nsid: Nsid) -> Result<Box<IdentifyNamespace>> {
        self.execute(
            "identifying a namespace",
            SubmissionEntry::identify(Cns::Namespace, nsid),
        )?;
        Ok(Box::new(self.state.page.read(0)))
    }

    /// Size, format and identifiers of one namespace.
    ///
    /// # Errors
    /// When the controller refuses, or when it reports an impossible block size.
    pub fn namespace(&mut self, nsid: Nsid) -> Result<Namespace> {
        let data = self.identify_namespace(nsid)?;
        let format = data.format();
        if !(9..=16).contains(&format.lbads) {
            let what = format!(
                "namespace {} reports blocks of 2^{} bytes",
                nsid.0, format.lbads
            );
            return Err(Error::Unsupported {
                device: self.transport.name(),
                what,
            });
        }
        let entry = SubmissionEntry::identify(Cns::NamespaceDescriptors, nsid);
        let mut ids = match self.execute("listing a namespace's identifiers", entry) {
            Ok(_) => {
                let mut list = [0; PAGE_SIZE];
                self.state.page.read_bytes(0, &mut list);
                NamespaceIds::parse(&list)
            }
            // Optional before NVMe 1.3.
            Err(Error::Command { .. }) => NamespaceIds::default(),
            Err(error) => return Err(error),
        };
        ids.nguid = ids.nguid.or((data.nguid != [0; 16]).then_some(data.nguid));
        ids.eui64 = ids.eui64.or((data.eui64 != [0; 8]).then_some(data.eui64));
        Ok(Namespace {
            nsid,
            blocks: data.nsze.get(),
            block_size: 1 << format.lbads,
            metadata_size: format.ms.get(),
            write_protected: data.nsattr & 1 != 0,
            deallocated_reads_zero: data.dlfeat & 7 == 1,
            ids,
        })
    }

    /// The current value of a feature.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn feature(&mut self, feature: FeatureId) -> Result<u32> {
        self.execute("reading a feature", SubmissionEntry::get_features(feature))
    }

    /// SMART / Health Information of the whole controller.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn smart_log(&mut self) -> Result<SmartLog> {
        let len = size_of::<SmartLog>();
        self.execute(
            "reading the SMART log",
            SubmissionEntry::get_log_page(LogId::Smart, Nsid::ALL, len),
        )?;
        Ok(self.state.page.read(0))
    }

    /// The newest entries of the error log, at most 64, unused ones left out.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn error_log(&mut self) -> Result<Vec<ErrorLogEntry>> {
        let entries =
            (usize::from(self.state.identity.elpe) + 1).min(PAGE_SIZE / size_of::<ErrorLogEntry>());
        let len = entries * size_of::<ErrorLogEntry>();
        self.execute(
            "reading the error log",
            SubmissionEntry::get_log_page(LogId::Error, Nsid::ALL, len),
        )?;
        let entries = (0..entries).map(|i| {
            self.state
                .page
                .read::<ErrorLogEntry>(i * size_of::<ErrorLogEntry>())
        });
        Ok(entries
            .filter(|entry| entry.error_count.get() != 0)
            .collect())
    }

    /// The next asynchronous event, if one has arrived: its log page has been read (which re-enables events of its
    /// type) and its request posted again. Call it now and then.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn next_event(&mut self) -> Result<Option<AsyncEvent>> {
        let Some(event) = self.state.admin.take_event() else {
            return Ok(None);
        };
        match LogId::from_wire(event.log_page()) {
            Some(LogId::Smart) => drop(self.smart_log()?),
            Some(LogId::Error) => drop(self.error_log()?),
            Some(LogId::ChangedNamespaces) => {
                let entry =
                    SubmissionEntry::get_log_page(LogId::ChangedNamespaces, Nsid::ALL, PAGE_SIZE);
                self.execute("reading the changed namespace list", entry)?;
                self.note_changed_namespaces();
            }
            None => {}
        }
        self.state
            .admin
            .arm_events(&mut self.transport, self.state.event_requests)?;
        Ok(Some(event))
    }

    /// What the changed namespace list has that was just read.
    fn note_changed_namespaces(&mut self) {
        let list: [zerocopy::little_endian::U32; 1024] = self.state.page.read(0);
        let listed = list.iter().map(|nsid| Nsid(nsid.get()));
        for nsid in listed.take_while(|nsid| *nsid != Nsid::NONE) {
            // As many as there are valid identifiers, and one: a list that names others does not grow.
            let valid = nsid == Nsid::ALL || nsid.0 <= self.state.identity.nn.get();
            if valid && !self.state.changed_namespaces.contains(&nsid) {
                self.state.changed_namespaces.push(nsid);
            }
        }
    }

    /// Namespaces that are not what they were, as the events say that [`Controller::next_event`] has returned: each once.
    /// [`Nsid::ALL`] is for more than the controller could name.
    pub fn take_changed_namespaces(&mut self) -> Vec<Nsid> {
        std::mem::take(&mut self.state.changed_namespaces)
    }

    /// Creates an I/O queue pair of `entries` (capped by CAP.MQES and 1024): completion queue first.
    ///
    /// # Errors
    /// [`Error::NoQueuePair`] when all granted ones are in use, or what the controller said.
    pub fn create_queue_pair(&mut self, entries: u16) -> Result<QueuePair<T>> {
        let granted = self.state.granted;
        let free = self.state.in_use.iter().position(|used| !used);
        let index = free.ok_or_else(|| Error::NoQueuePair {
            device: self.transport.name(),
            granted,
        })?;
        // At most 65535 were granted, so index + 1 fits.
        let id = QueueId(u16::try_from(index + 1).unwrap_or(u16::MAX));
        let max_entries = u16::try_from(self.cap.max_queue_entries()).unwrap_or(u16::MAX);
        let max_entries = match self.transport.quirks().queue_entries {
            Some(entries) if max_entries < 2 => entries,
            Some(entries) => entries.min(max_entries),
            None => max_entries,
        };
        let doorbells = self.doorbells(id)?;
        let queue = QueuePair::new(
            &self.space,
            doorbells,
            id,
            entries.min(max_entries),
            self.max_transfer(),
        )?;
        match self.tell_of(&queue) {
            Ok(()) => {
                self.state.in_use[index] = true;
                Ok(queue)
            }
            // The controller answered and refused: it does not know the queue. Otherwise that is open, and dropping
            // `queue` leaks its memory, and says so.
            Err((error, unknown)) => {
                if unknown {
                    queue.retire();
                }
                Err(error)
            }
        }
    }

    /// Creates a queue pair anew that a reset controller, or the one before this, has known: same identifier, same
    /// memory. Its outstanding commands are not sent yet ([`QueuePair::replay`]).
    ///
    /// # Errors
    /// When the controller grants fewer queue pairs or smaller queues than before, or refuses.
    pub fn recreate_queue_pair(&mut self, queue: &mut QueuePair<T>) -> Result<()> {
        let id = queue.id();
        let entries = queue.depth() + 1;
        let index = usize::from(id.0).checked_sub(1);
        let free = index.and_then(|index| self.state.in_use.get(index)) == Some(&false);
        let max_entries = self.cap.max_queue_entries();
        if !free || u32::from(entries) > max_entries || queue.max_transfer() > self.max_transfer() {
            let what = format!(
                "the controller grants {} I/O queue pairs of {max_entries} entries and {} bytes per command, and queue \
                 {} of {entries} entries and {} bytes was in use before",
                self.state.granted,
                self.max_transfer(),
                id.0,
                queue.max_transfer()
            );
            return Err(Error::Unsupported {
                device: self.transport.name(),
                what,
            });
        }
        queue.restart(self.doorbells(id)?);
        self.tell_of(queue).map_err(|(error, _)| error)?;
        queue.is_created();
        if let Some(in_use) = index.and_then(|index| self.state.in_use.get_mut(index)) {
            *in_use = true;
        }
        Ok(())
    }

    /// Completion queue first. An error comes with whether the controller is known not to know the queue pair.
    fn tell_of(&mut self, queue: &QueuePair<T>) -> Result<(), (Error, bool)> {
        let (sq, cq) = queue.ring_addresses();
        let (id, entries) = (queue.id(), queue.depth() + 1);
        let vector = self.transport.vector(id);
        let answered = |error: &Error| matches!(error, Error::Command { .. });
        let created = self.execute_at(
            "creating an I/O completion queue",
            SubmissionEntry::create_io_cq(id, entries, vector),
            cq,
        );
        if let Err(error) = created {
            let unknown = answered(&error);
            return Err((error, unknown));
        }
        let created = self.execute_at(
            "creating an I/O submission queue",
            SubmissionEntry::create_io_sq(id, entries),
            sq,
        );
        let Err(error) = created else {
            return Ok(());
        };
        // The completion queue exists: take it back, or the identifier stays unusable.
        let deleted = self.execute(
            "deleting an I/O completion queue",
            SubmissionEntry::delete_io_cq(id),
        );
        let unknown = answered(&error) && deleted.is_ok();
        Err((error, unknown))
    }

    fn execute_at(
        &mut self,
        doing: &'static str,
        entry: SubmissionEntry,
        at: crate::dma::Iova,
    ) -> Result<u32> {
        let deadline = self.cap.ready_timeout().max(ADMIN_DEADLINE);
        self.state
            .admin
            .execute(&mut self.transport, doing, entry, Some(at), deadline)
    }

    /// Deletes a queue pair: submission queue first. Commands still outstanding are aborted by the controller.
    ///
    /// # Errors
    /// When the controller refuses; the queue's memory is leaked then, since the device may still use it.
    pub fn delete_queue_pair(&mut self, queue: QueuePair<T>) -> Result<()> {
        let id = queue.id();
        self.execute(
            "deleting an I/O submission queue",
            SubmissionEntry::delete_io_sq(id),
        )?;
        self.execute(
            "deleting an I/O completion queue",
            SubmissionEntry::delete_io_cq(id),
        )?;
        queue.retire();
        if let Some(in_use) = self.state.in_use.get_mut(usize::from(id.0) - 1) {
            *in_use = false;
        }
        Ok(())
    }

    /// Asks for an outstanding command's end. `true` when the controller says that it has aborted it: its completion
    /// follows (Command Abort Requested), unless it had already come.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    pub fn abort(&mut self, queue: QueueId, cid: Cid) -> Result<bool> {
        let dw0 = self.execute("aborting a command", SubmissionEntry::abort(queue, cid))?;
        Ok(dw0 & 1 == 0)
    }

    /// How it is: one look at CSTS.
    pub fn health(&mut self) -> Health {
        let csts = Csts(self.transport.read32(offset::CSTS));
        if csts.is_removed() {
            Health::Removed
        } else if csts.is_fatal() {
            Health::Fatal
        } else if !csts.is_ready() {
            Health::Stopped
        } else {
            Health::Ready
        }
    }

    /// Normal shutdown (CC.SHN = 01b): the controller makes its cache durable and says so (SHST = 10b); then it is
    /// disabled. To be called when every queue pair was handed back.
    ///
    /// # Errors
    /// The controller, and the reason why it is not known to be clean.
    pub fn shutdown(mut self) -> DisableResult<T> {
        let cc = Cc(self.transport.read32(offset::CC));
        self.transport
            .write32(offset::CC, (cc.0 & !Cc::SHN_MASK) | Cc::SHN_NORMAL);
        let rtd3e = Duration::from_micros(self.state.identity.rtd3e.get().into());
        let deadline = rtd3e.max(SHUTDOWN_DEADLINE);
        let clean = self.wait_status("shutting down", deadline, Csts::is_shutdown_complete);
        let (disabled, reset) = self.into_disabled();
        match clean.and(reset) {
            Ok(()) => Ok(disabled),
            Err(error) => Err((Box::new(disabled), error)),
        }
    }

    /// Disables the controller at once, without asking it to save its cache. All queues are gone then.
    ///
    /// # Errors
    /// The controller, and the reason why it is not known to have stopped.
    pub fn reset(self) -> DisableResult<T> {
        let (disabled, reset) = self.into_disabled();
        match reset {
            Ok(()) => Ok(disabled),
            Err(error) => Err((Box::new(disabled), error)),
        }
    }

    fn into_disabled(mut self) -> (Controller<T, Disabled>, Result<()>) {
        let result = self.disable();
        if result.is_err() {
            // Not proven stopped: the admin queue and its page stay where they are.
            self.state.admin.leak();
            self.state.page.leak();
        }
        let state = Disabled { _private: () };
        (
            Controller {
                transport: self.transport,
                space: self.space,
                cap: self.cap,
                interrupts: self.interrupts,
                state,
            },
            result,
        )
    }
}

impl<T: Transport, S> Controller<T, S> {
    /// Gives the device up, whatever it is doing: the transport lets go of it (it can reach no memory any more), then
    /// its DMA domain goes. What is mapped stays in the space's book for [`Controller::with_space`].
    pub fn release(self) {
        let Controller {
            transport,
            space,
            state,
            ..
        } = self;
        drop(transport);
        drop(state);
        space.detach();
    }

    /// What the bus has said of the device since the last call.
    pub fn notice(&mut self) -> Option<Notice> {
        self.transport.notice()
    }

    /// Controller Capabilities.
    #[must_use]
    pub fn cap(&self) -> Cap {
        self.cap
    }

    /// Version of the specification that the controller follows.
    pub fn version(&mut self) -> Version {
        Version(self.transport.read32(offset::VS))
    }

    /// The device's DMA windows, for mapping other memory (a guest's).
    #[must_use]
    pub fn dma_space(&self) -> &Arc<DmaSpace> {
        &self.space
    }

    /// The transport's name.
    #[must_use]
    pub fn name(&self) -> String {
        self.transport.name()
    }

    /// The transport.
    pub fn transport(&mut self) -> &mut T {
        &mut self.transport
    }

    fn port(&mut self, queue: QueueId) -> Result<T::Port> {
        let port = self.transport.port(queue, self.cap.doorbell_stride());
        port.ok_or_else(|| Error::Unsupported {
            device: self.transport.name(),
            what: format!("the doorbells of queue {} cannot be mapped", queue.0),
        })
    }

    /// EN 1 -> 0, and RDY = 0 seen. A controller that is just being enabled is waited for first: clearing EN before
    /// RDY is 1 is undefined.
    fn disable(&mut self) -> Result<()> {
        self.wait_for_registers()?;
        let cc = Cc(self.transport.read32(offset::CC));
        if cc.is_enabled() {
            // A fatal status is an answer as well: only clearing EN helps then.
            match self.wait_ready(true, "waiting for a controller that is being enabled") {
                Ok(()) | Err(Error::Fatal { .. } | Error::Timeout { .. }) => {}
                Err(error) => return Err(error),
            }
            self.transport.write32(offset::CC, cc.0 & !Cc::EN);
            self.transport
                .pause(self.transport.quirks().delay_before_ready);
        }
        self.wait_status(
            "disabling the controller",
            self.cap.ready_timeout(),
            |csts| !csts.is_ready(),
        )
    }

    /// CAP reads as it did at first. While somebody else resets the function its registers are out of reach, and read
    /// all ones or zero.
    fn wait_for_registers(&mut self) -> Result<()> {
        let mut waited = Duration::ZERO;
        while Cap(self.transport.read64(offset::CAP)) != self.cap {
            if waited >= FUNCTION_RESET_DEADLINE {
                return Err(Error::Removed {
                    device: self.transport.name(),
                });
            }
            self.transport.pause(READY_INTERVAL);
            waited += READY_INTERVAL;
            self.transport.restore();
        }
        Ok(())
    }

    /// CSTS.RDY becomes `ready` within CAP.TO; a fatal status ends the wait.
    fn wait_ready(&mut self, ready: bool, doing: &'static str) -> Result<()> {
        let deadline = self.cap.ready_timeout();
        self.wait_status(doing, deadline, |csts| {
            csts.is_ready() == ready || csts.is_fatal()
        })?;
        if Csts(self.transport.read32(offset::CSTS)).is_fatal() {
            return Err(Error::Fatal {
                device: self.transport.name(),
                doing,
            });
        }
        Ok(())
    }

    fn wait_status(
        &mut self,
        doing: &'static str,
        deadline: Duration,
        done: impl Fn(Csts) -> bool,
    ) -> Result<()> {
        let mut waited = Duration::ZERO;
        loop {
            let csts = Csts(self.transport.read32(offset::CSTS));
            if csts.is_removed() {
                return Err(Error::Removed {
                    device: self.transport.name(),
                });
            }
            if done(csts) {
                return Ok(());
            }
            if waited >= deadline {
                return Err(Error::Timeout {
                    device: self.transport.name(),
                    doing,
                    waited,
                });
            }
            self.transport.pause(READY_INTERVAL);
            waited += READY_INTERVAL;
        }
    }
}

impl<T: Transport, S> fmt::Debug for Controller<T, S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Controller")
            .field("device", &self.transport.name())
            .field("cap", &self.cap)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for Disabled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Disabled")
    }
}

impl<T: Transport> fmt::Debug for Enabled<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enabled")
            .field("granted", &self.granted)
            .finish_non_exhaustive()
    }
}
