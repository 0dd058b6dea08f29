//! A claimed device: its controller, its namespaces, and the pollers made from its queue pairs. The transport is
//! chosen here once and hidden behind [`DeviceControl`]; the data path stays statically dispatched.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nvme_driver::dma::DmaSpace;
use nvme_driver::spec::{
    Cid, IdentifyController, IdentifyNamespace, Nsid, QueueId, SmartLog, Version, ascii_field, oncs,
};
use nvme_driver::transport::{Notice, Transport};
use nvme_driver::{Controller, Disabled, Enabled, Error, Health, Namespace};
use rustix::event::{EventfdFlags, eventfd};

use crate::block::Geometry;
use crate::config::ByteSize;
use crate::datapath::{Poll, Poller, Service};
use crate::scsi::{self, HealthReport};

/// How long requests may take to end when the system wants a device back.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);
/// Submission queue entries that we ask for: as many as the largest virtqueue has descriptors.
const QUEUE_ENTRIES: u16 = 1024;

/// A device call that failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver.
    #[error(transparent)]
    Driver(#[from] Error),
    /// DMA memory.
    #[error(transparent)]
    Dma(#[from] nvme_driver::dma::DmaError),
    /// Claiming it.
    #[error(transparent)]
    Claim(#[from] nvme_driver::vfio::ClaimError),
    /// No SSD that vfio-pci has is the one that was meant.
    #[error(
        "device {name}: no SSD with serial number {serial} is bound to vfio-pci ({others}); tandem list shows all"
    )]
    NoSuchSerial {
        /// The device's name in the configuration.
        name: String,
        /// The serial number.
        serial: String,
        /// What is there instead.
        others: String,
    },
    /// The software controller.
    #[error("{name}: {error}")]
    Model {
        /// The device's name in the configuration.
        name: String,
        /// What it said.
        error: nvme_model::ModelError,
    },
    /// The system.
    #[error("cannot wake the thread that looks after a device: {0}")]
    Bell(#[from] rustix::io::Errno),
    /// It was given up.
    #[error("device {name} is lost")]
    Lost {
        /// The device's name in the configuration.
        name: String,
    },
    /// What came back is not what guests were told of.
    #[error(
        "device {name} came back as another: {what}; it is not served (restart the server to serve what is there now)"
    )]
    Changed {
        /// The device's name in the configuration.
        name: String,
        /// What is different.
        what: String,
    },
    /// A poller was handed to another device than its own.
    #[error("a queue pair was returned to a device that did not make it")]
    ForeignPoller,
}

/// How a device is, as one look at it shows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Condition {
    /// As it should be.
    Ready,
    /// It said something that an operator should know; it goes on working.
    Event(String),
    /// These namespaces are not what they were; [`Nsid::ALL`] is all of them.
    Namespaces(Vec<Nsid>),
    /// It is there, but only a reset helps.
    Broken(String),
    /// The system wants it back.
    Wanted,
    /// It does not answer.
    Gone(String),
    /// It was given up; see [`DeviceControl::regain`].
    GivenUp,
}

/// Whether queue pairs have interrupts, for reactors that sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interrupts {
    /// They are polled only.
    Off,
    /// As far as the device has them.
    OnRequest,
}

impl Interrupts {
    fn of<T: Transport>(self, controller: Controller<T, Disabled>) -> Controller<T, Disabled> {
        match self {
            Interrupts::Off => controller,
            Interrupts::OnRequest => controller.with_interrupts(),
        }
    }
}

/// What has become of a namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NamespaceChange {
    /// It has another size.
    Resized {
        /// What it is now.
        namespace: Namespace,
        /// How many blocks it had.
        before: u64,
    },
    /// Guests cannot be told what it is now: it stays what it was, and the controller refuses what it cannot do.
    Unusable {
        /// Which.
        nsid: Nsid,
        /// What is different.
        what: String,
    },
}

impl fmt::Display for NamespaceChange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            NamespaceChange::Resized { namespace, before } => {
                let size =
                    |blocks: u64| ByteSize(blocks.saturating_mul(namespace.block_size.into()));
                let (now, before) = (size(namespace.blocks), size(*before));
                write!(
                    f,
                    "namespace {} has {now}, {before} before",
                    namespace.nsid.0
                )
            }
            NamespaceChange::Unusable { nsid, what } => write!(
                f,
                "namespace {} is not what it was: {what}; guests are told nothing of that",
                nsid.0
            ),
        }
    }
}

/// All pollers of one device, on loan from their reactors.
pub type Pollers = Vec<Box<dyn Poll>>;

/// What the server does with a controller, whatever its transport.
pub trait DeviceControl: Send {
    /// Creates a queue pair and makes a poller of it. Also says the queue pair's identifier on the controller.
    ///
    /// # Errors
    /// When the controller refuses or memory is short.
    fn create_poller(&mut self) -> Result<(u16, Box<dyn Poll>), DeviceError>;

    /// Takes a poller without lanes back and deletes its queue pair.
    ///
    /// # Errors
    /// When the controller refuses.
    fn delete_poller(&mut self, poller: Box<dyn Poll>) -> Result<(), DeviceError>;

    /// Looks at the device, and deals with one asynchronous event, if any has arrived.
    fn look(&mut self) -> Condition;

    /// Identifies namespaces anew, and remembers what sizes they have by now; [`Nsid::ALL`] is all of them. What else has
    /// changed is not remembered: guests were told otherwise.
    ///
    /// # Errors
    /// When the controller does not answer.
    fn survey(&mut self, which: &[Nsid]) -> Result<Vec<NamespaceChange>, DeviceError>;

    /// Reads the SMART log.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    fn smart_log(&mut self) -> Result<SmartLog, DeviceError>;

    /// Asks the controller to end one command that takes too long.
    ///
    /// # Errors
    /// When the controller refuses or does not answer.
    fn abort(&mut self, queue: u16, cid: Cid) -> Result<bool, DeviceError>;

    /// Resets the controller and carries out again what was outstanding. The pollers are all that it has.
    ///
    /// # Errors
    /// When it does not come up as it was: it must be given up then.
    fn recover(&mut self, pollers: &mut Pollers) -> Result<(), DeviceError>;

    /// Gives the device up: with a normal shutdown first where `orderly`, at once otherwise. The pollers go on without.
    fn give_up(&mut self, pollers: &mut Pollers, orderly: bool, service: Service);

    /// Takes the device again that was given up, if it is there, and goes on where it was.
    ///
    /// # Errors
    /// When it is not there (which is no news), or is another one than before.
    fn regain(&mut self, pollers: &mut Pollers) -> Result<(), DeviceError>;

    /// Normal shutdown: the cache is durable afterwards.
    ///
    /// # Errors
    /// When the controller did not confirm it.
    fn shutdown(self: Box<Self>) -> Result<(), DeviceError>;
}

/// Takes a device that was given up from the system again.
pub type Claim<T> = Box<dyn FnMut() -> Result<T, DeviceError> + Send>;

struct Controlled<T: Transport> {
    name: String,
    /// `None` while the device is given up.
    controller: Option<Controller<T, Enabled<T>>>,
    space: Arc<DmaSpace>,
    claim: Claim<T>,
    interrupts: Interrupts,
    wanted: u16,
    identity: Box<IdentifyController>,
    namespaces: Namespaces,
}

/// The active namespaces, as they were identified last.
type Namespaces = Arc<Mutex<Vec<NamespaceInfo>>>;

fn lock(namespaces: &Namespaces) -> MutexGuard<'_, Vec<NamespaceInfo>> {
    namespaces.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What else than its size is different of a namespace.
fn difference(was: &Namespace, is: &Namespace) -> Option<String> {
    let resized = Namespace {
        blocks: is.blocks,
        ..was.clone()
    };
    if resized == *is {
        return None;
    }
    Some(if was.block_size != is.block_size {
        let (was, is) = (was.block_size, is.block_size);
        format!("its blocks had {was} bytes and have {is}")
    } else if was.metadata_size != is.metadata_size {
        let (was, is) = (was.metadata_size, is.metadata_size);
        format!("its blocks had {was} bytes of metadata and have {is}")
    } else {
        format!("it was {was:?} and is {is:?}")
    })
}

impl<T: Transport + 'static> Controlled<T>
where
    T::Port: 'static,
{
    fn controller(&mut self) -> Result<&mut Controller<T, Enabled<T>>, DeviceError> {
        let name = &self.name;
        self.controller
            .as_mut()
            .ok_or_else(|| DeviceError::Lost { name: name.clone() })
    }

    /// The same SSD with the same namespaces as when guests were told of them, of whatever size?
    fn check_identity(
        &self,
        controller: &mut Controller<T, Enabled<T>>,
    ) -> Result<(), DeviceError> {
        let changed = |what: String| DeviceError::Changed {
            name: self.name.clone(),
            what,
        };
        let (was, is) = (&self.identity, controller.identity());
        if (was.sn, was.mn) != (is.sn, is.mn) {
            let (was, is) = (ascii_field(&was.sn), ascii_field(&is.sn));
            return Err(changed(format!("its serial number was {was} and is {is}")));
        }
        for info in lock(&self.namespaces).iter() {
            let nsid = info.namespace.nsid;
            let now = controller.namespace(nsid)?;
            // Another size is told to guests afterwards.
            if let Some(what) = difference(&info.namespace, &now) {
                return Err(changed(format!("namespace {}: {what}", nsid.0)));
            }
        }
        Ok(())
    }

    /// Enables the controller, tells it of every queue pair, sends what was outstanding, and goes on with it. On an error
    /// it is let go of, and the pollers are without a device.
    fn go_on(
        &mut self,
        disabled: Controller<T, Disabled>,
        pollers: &mut Pollers,
        cache_lost: bool,
    ) -> Result<(), DeviceError> {
        let mut controller = disabled.enable(self.wanted).map_err(|(disabled, error)| {
            disabled.release();
            error
        })?;
        if let Err(error) = self.create_again(&mut controller, pollers) {
            suspend_all(pollers, Service::Hold);
            controller.release();
            return Err(error);
        }
        for poller in pollers.iter_mut() {
            own::<T>(poller)?.resume(cache_lost);
        }
        self.controller = Some(controller);
        Ok(())
    }

    fn create_again(
        &self,
        controller: &mut Controller<T, Enabled<T>>,
        pollers: &mut Pollers,
    ) -> Result<(), DeviceError> {
        self.check_identity(controller)?;
        for poller in pollers.iter_mut() {
            controller.recreate_queue_pair(own(poller)?.queue_pair())?;
        }
        Ok(())
    }
}

/// The pollers let go of the device and do without. Doorbells keep it open, so this comes before it is let go of.
fn suspend_all(pollers: &mut Pollers, service: Service) {
    pollers
        .iter_mut()
        .for_each(|poller| poller.suspend(service));
}

fn own<T: Transport + 'static>(poller: &mut Box<dyn Poll>) -> Result<&mut Poller<T>, DeviceError> {
    poller
        .as_any()
        .downcast_mut::<Poller<T>>()
        .ok_or(DeviceError::ForeignPoller)
}

impl<T: Transport + 'static> DeviceControl for Controlled<T>
where
    T::Port: 'static,
{
    fn create_poller(&mut self) -> Result<(u16, Box<dyn Poll>), DeviceError> {
        let controller = self.controller()?;
        let queue = controller.create_queue_pair(QUEUE_ENTRIES)?;
        let id = queue.id().0;
        let poller = Poller::new(queue, controller.dma_space())?;
        Ok((id, Box::new(poller)))
    }

    fn delete_poller(&mut self, poller: Box<dyn Poll>) -> Result<(), DeviceError> {
        let poller = poller
            .into_any()
            .downcast::<Poller<T>>()
            .map_err(|_| DeviceError::ForeignPoller)?;
        let queue = poller.into_queue_pair();
        match &mut self.controller {
            Some(controller) => Ok(controller.delete_queue_pair(queue)?),
            // Disconnected: no device knows it any more.
            None => Ok(()),
        }
    }

    fn look(&mut self) -> Condition {
        let Some(controller) = &mut self.controller else {
            return Condition::GivenUp;
        };
        match controller.notice() {
            Some(Notice::ReleaseRequested) => return Condition::Wanted,
            Some(Notice::BusError) => {
                return Condition::Broken("the bus reported an error".to_owned());
            }
            None => {}
        }
        match controller.health() {
            Health::Ready => {}
            Health::Fatal => {
                return Condition::Broken("it reports a fatal status (CSTS.CFS)".to_owned());
            }
            Health::Stopped => {
                return Condition::Broken(
                    "it is not ready any more (CSTS.RDY): someone has reset it".to_owned(),
                );
            }
            Health::Removed => {
                return Condition::Gone(
                    "its registers read all ones: it was removed or lost power".to_owned(),
                );
            }
        }
        match controller.next_event() {
            Ok(None) => Condition::Ready,
            Ok(Some(event)) if event.is_namespace_change() => {
                let mut which = controller.take_changed_namespaces();
                if which.is_empty() {
                    // Named with the event before, or not at all.
                    which.push(Nsid::ALL);
                }
                Condition::Namespaces(which)
            }
            Ok(Some(event)) => {
                let (kind, what) = (event.event_type(), event.information());
                Condition::Event(format!("type {kind} information {what:#04x}"))
            }
            Err(error @ Error::Removed { .. }) => Condition::Gone(error.to_string()),
            Err(error) => Condition::Broken(error.to_string()),
        }
    }

    fn survey(&mut self, which: &[Nsid]) -> Result<Vec<NamespaceChange>, DeviceError> {
        let namespaces = Arc::clone(&self.namespaces);
        let controller = self.controller()?;
        let mut changes = Vec::new();
        for info in lock(&namespaces).iter_mut() {
            let nsid = info.namespace.nsid;
            let was = &mut info.namespace;
            if !which.contains(&nsid) && !which.contains(&Nsid::ALL) {
                continue;
            }
            let unusable = |what: String| NamespaceChange::Unusable { nsid, what };
            let is = match controller.namespace(nsid) {
                Ok(is) => is,
                // One that is there no longer has no format, or no answer.
                Err(error @ (Error::Unsupported { .. } | Error::Command { .. })) => {
                    changes.push(unusable(format!("it cannot be identified ({error})")));
                    continue;
                }
                Err(error) => return Err(error.into()),
            };
            let shift = is.block_size.trailing_zeros();
            let geometry = Geometry::new(shift, is.blocks, false);
            if let Some(what) = difference(was, &is) {
                changes.push(unusable(what));
            } else if geometry.is_none_or(|geometry| geometry.blocks() == 0) {
                changes.push(unusable(format!("{} blocks make no disk", is.blocks)));
            } else if is.blocks != was.blocks {
                let before = std::mem::replace(&mut was.blocks, is.blocks);
                changes.push(NamespaceChange::Resized {
                    namespace: is,
                    before,
                });
            }
        }
        Ok(changes)
    }

    fn smart_log(&mut self) -> Result<SmartLog, DeviceError> {
        Ok(self.controller()?.smart_log()?)
    }

    fn abort(&mut self, queue: u16, cid: Cid) -> Result<bool, DeviceError> {
        Ok(self.controller()?.abort(QueueId(queue), cid)?)
    }

    fn recover(&mut self, pollers: &mut Pollers) -> Result<(), DeviceError> {
        let Some(controller) = self.controller.take() else {
            return Err(DeviceError::Lost {
                name: self.name.clone(),
            });
        };
        // Without doorbells until the controller knows the queue pairs again.
        suspend_all(pollers, Service::Hold);
        let disabled = controller.reset().map_err(|(disabled, error)| {
            disabled.release();
            error
        })?;
        // From here on nothing that was outstanding can reach memory any more: EN = 0 and RDY = 0 were seen.
        self.go_on(disabled, pollers, false)
    }

    fn give_up(&mut self, pollers: &mut Pollers, orderly: bool, service: Service) {
        if orderly {
            let settled = pollers
                .iter_mut()
                .all(|poller| poller.settle(SETTLE_DEADLINE));
            if !settled {
                tracing::warn!(device = %self.name, "requests are still at the device that is to be released");
            }
        }
        let controller = self.controller.take();
        if let Some(controller) = controller {
            // Doorbells first: they keep the device open. Nothing is failed before the device is let go of: until
            // then it may still write to guests.
            suspend_all(pollers, Service::Hold);
            if orderly {
                match controller.shutdown() {
                    Ok(disabled) => disabled.release(),
                    Err((disabled, error)) => {
                        tracing::warn!(device = %self.name, %error, "it did not confirm its shutdown");
                        disabled.release();
                    }
                }
            } else {
                controller.release();
            }
        }
        suspend_all(pollers, service);
    }

    fn regain(&mut self, pollers: &mut Pollers) -> Result<(), DeviceError> {
        let transport = (self.claim)()?;
        let disabled = Controller::with_space(transport, Arc::clone(&self.space))?;
        let disabled = self.interrupts.of(disabled);
        self.go_on(disabled, pollers, true)
    }

    fn shutdown(self: Box<Self>) -> Result<(), DeviceError> {
        self.controller.map_or(Ok(()), |controller| {
            controller
                .shutdown()
                .map(drop)
                .map_err(|(_, error)| error.into())
        })
    }
}

/// A SMART log in SCSI's words; `warning` is the temperature in kelvin at which it warns.
fn report(log: &SmartLog, warning: u16) -> HealthReport {
    const SPARE: u8 = 1 << 0;
    const TEMPERATURE: u8 = 1 << 1;
    const RELIABILITY: u8 = 1 << 2;
    const READ_ONLY: u8 = 1 << 3;
    const BACKUP: u8 = 1 << 4;
    // 0 kelvin is not reported; the field has room for 0 to 254 degrees Celsius.
    let celsius = |kelvin: u16| match kelvin {
        0 => 0xff,
        _ => u8::try_from(kelvin.saturating_sub(273).min(0xfe)).unwrap_or(0xff),
    };
    let warned = |bit: u8| log.critical_warning & bit != 0;
    // The worst of them.
    let exception = if warned(READ_ONLY | RELIABILITY) {
        (0x5d, 0x00) // FAILURE PREDICTION THRESHOLD EXCEEDED
    } else if warned(SPARE) {
        (0x5d, 0x03) // SPARE AREA EXHAUSTION PREDICTION THRESHOLD EXCEEDED
    } else if warned(BACKUP) {
        (0x0b, 0x06) // WARNING - NON-VOLATILE CACHE NOW VOLATILE
    } else if warned(TEMPERATURE) {
        (0x0b, 0x01) // WARNING - SPECIFIED TEMPERATURE EXCEEDED
    } else {
        (0, 0)
    };
    HealthReport {
        temperature: celsius(log.temperature.get()),
        reference_temperature: celsius(warning),
        used: log.percentage_used,
        exception,
    }
}

/// One namespace with its identify data.
#[derive(Clone, Debug)]
pub struct NamespaceInfo {
    /// What a server needs of it.
    pub namespace: Namespace,
    /// Everything, as the controller returned it at first.
    pub identify: Box<IdentifyNamespace>,
}

/// A device in service.
pub struct Device {
    /// Its name in the configuration.
    pub name: String,
    /// Identify Controller data.
    pub identity: Box<IdentifyController>,
    /// The specification that it follows.
    pub version: Version,
    /// I/O queue pairs granted.
    pub granted: u16,
    /// The most bytes of one command.
    pub max_transfer: u32,
    namespaces: Namespaces,
    no_write_zeroes: bool,
    /// How it was when it was asked last.
    pub health: Arc<scsi::Health>,
    /// Its DMA windows.
    pub space: Arc<DmaSpace>,
    /// Rung for its keeper.
    bell: Arc<OwnedFd>,
    control: Mutex<Option<Box<dyn DeviceControl>>>,
}

impl Device {
    /// Brings a controller up and looks at its namespaces. Asks for `queue_pairs`; fewer may be granted. `claim` takes
    /// the device again when it was given up and has come back.
    ///
    /// # Errors
    /// When the controller does not come up, or an active namespace cannot be identified.
    pub fn open<T>(
        name: &str,
        transport: T,
        queue_pairs: u16,
        claim: Claim<T>,
    ) -> Result<Device, DeviceError>
    where
        T: Transport + 'static,
        T::Port: 'static,
    {
        Device::open_with(name, transport, queue_pairs, Interrupts::Off, claim)
    }

    /// The same; with interrupts, queue pairs can wake reactors that sleep.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_with<T>(
        name: &str,
        transport: T,
        queue_pairs: u16,
        interrupts: Interrupts,
        claim: Claim<T>,
    ) -> Result<Device, DeviceError>
    where
        T: Transport + 'static,
        T::Port: 'static,
    {
        let no_write_zeroes = transport.quirks().no_write_zeroes;
        let disabled = interrupts.of(Controller::new(transport)?);
        let mut controller = disabled.enable(queue_pairs).map_err(|(_, error)| error)?;
        let mut namespaces = Vec::new();
        for nsid in controller.active_namespaces()? {
            namespaces.push(NamespaceInfo {
                namespace: controller.namespace(nsid)?,
                identify: controller.identify_namespace(nsid)?,
            });
        }
        let namespaces = Arc::new(Mutex::new(namespaces));
        let identity = Box::new(*controller.identity());
        let space = Arc::clone(controller.dma_space());
        Ok(Device {
            name: name.to_owned(),
            identity: identity.clone(),
            version: controller.version(),
            granted: controller.granted_queue_pairs(),
            max_transfer: controller.max_transfer(),
            namespaces: Arc::clone(&namespaces),
            no_write_zeroes,
            health: Arc::default(),
            space: Arc::clone(&space),
            bell: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
            control: Mutex::new(Some(Box::new(Controlled {
                name: name.to_owned(),
                controller: Some(controller),
                space,
                claim,
                interrupts,
                wanted: queue_pairs,
                identity,
                namespaces,
            }))),
        })
    }

    /// Namespaces that were active when it was opened, with the sizes that they have by now.
    #[must_use]
    pub fn namespaces(&self) -> Vec<NamespaceInfo> {
        lock(&self.namespaces).clone()
    }

    /// The one with this identifier, if there is one.
    #[must_use]
    pub fn namespace(&self, nsid: Nsid) -> Option<Namespace> {
        let namespaces = lock(&self.namespaces);
        let mut namespaces = namespaces.iter().map(|info| &info.namespace);
        namespaces.find(|own| own.nsid == nsid).cloned()
    }

    /// See [`DeviceControl::survey`].
    ///
    /// # Errors
    /// As there, and after a shutdown.
    pub fn survey(&self, which: &[Nsid]) -> Result<Vec<NamespaceChange>, DeviceError> {
        self.with_control(|control| control.survey(which))
    }

    /// An eventfd that tells its keeper of commands to be aborted.
    #[must_use]
    pub fn bell(&self) -> &Arc<OwnedFd> {
        &self.bell
    }

    /// Flush means something.
    #[must_use]
    pub fn has_volatile_cache(&self) -> bool {
        self.identity.has_volatile_write_cache()
    }

    /// Dataset Management is there.
    #[must_use]
    pub fn can_deallocate(&self) -> bool {
        self.identity.supports(oncs::DATASET_MANAGEMENT)
    }

    /// Write Zeroes is there.
    #[must_use]
    pub fn can_write_zeroes(&self) -> bool {
        !self.no_write_zeroes && self.identity.supports(oncs::WRITE_ZEROES)
    }

    /// Blocks of a namespace that one Copy may copy from one range; 0 where there is no Copy.
    #[must_use]
    pub fn copy_blocks(&self, nsid: Nsid) -> u32 {
        let namespaces = lock(&self.namespaces);
        let mut namespaces = namespaces.iter();
        let info = namespaces.find(|info| info.namespace.nsid == nsid);
        match info.filter(|_| self.identity.supports(oncs::COPY)) {
            Some(info) => u32::from(info.identify.mssrl.get()).min(info.identify.mcl.get()),
            None => 0,
        }
    }

    /// Asks the device how it is, and tells it to those who have its [`Device::health`].
    ///
    /// # Errors
    /// As [`DeviceControl::smart_log`], and after a shutdown.
    pub fn ask_for_health(&self) -> Result<(), DeviceError> {
        let log = self.with_control(|control| control.smart_log())?;
        self.health.set(report(&log, self.identity.wctemp.get()));
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn DeviceControl>>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with the controller.
    ///
    /// # Errors
    /// What `action` says, and [`DeviceError::Lost`] after a shutdown.
    pub fn with_control<V>(
        &self,
        action: impl FnOnce(&mut dyn DeviceControl) -> Result<V, DeviceError>,
    ) -> Result<V, DeviceError> {
        let mut control = self.lock();
        let control = control.as_mut().ok_or_else(|| DeviceError::Lost {
            name: self.name.clone(),
        })?;
        action(control.as_mut())
    }

    /// See [`DeviceControl::create_poller`].
    ///
    /// # Errors
    /// As there, and after a shutdown.
    pub fn create_poller(&self) -> Result<(u16, Box<dyn Poll>), DeviceError> {
        self.with_control(|control| control.create_poller())
    }

    /// See [`DeviceControl::delete_poller`].
    ///
    /// # Errors
    /// As there, and after a shutdown.
    pub fn delete_poller(&self, poller: Box<dyn Poll>) -> Result<(), DeviceError> {
        self.with_control(|control| control.delete_poller(poller))
    }

    /// Normal shutdown; the second call does nothing.
    ///
    /// # Errors
    /// When the controller did not confirm it.
    pub fn shutdown(&self) -> Result<(), DeviceError> {
        let control = self.lock().take();
        control.map_or(Ok(()), DeviceControl::shutdown)
    }
}

impl fmt::Debug for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .field("granted", &self.granted)
            .finish_non_exhaustive()
    }
}
