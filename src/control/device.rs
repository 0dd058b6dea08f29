//! A claimed device: its controller, its namespaces, and the pollers made from its queue pairs. The transport is
//! chosen here once and hidden behind [`DeviceControl`]; the data path stays statically dispatched.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nvme_driver::dma::DmaSpace;
use nvme_driver::spec::{IdentifyController, IdentifyNamespace, Nsid, Version, oncs};
use nvme_driver::transport::Transport;
use nvme_driver::{Controller, Enabled, Namespace};

use crate::datapath::{Poll, Poller};

/// Submission queue entries that we ask for: as many as the largest virtqueue has descriptors.
const QUEUE_ENTRIES: u16 = 1024;

/// A device call that failed.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver.
    #[error(transparent)]
    Driver(#[from] nvme_driver::Error),
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
    /// A poller was handed to another device than its own.
    #[error("a queue pair was returned to a device that did not make it")]
    ForeignPoller,
}

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

    /// Deals with one asynchronous event, if any has arrived. Says what it was.
    ///
    /// # Errors
    /// When the controller does not answer.
    fn next_event(&mut self) -> Result<Option<String>, DeviceError>;

    /// Normal shutdown: the cache is durable afterwards.
    ///
    /// # Errors
    /// When the controller did not confirm it.
    fn shutdown(self: Box<Self>) -> Result<(), DeviceError>;
}

struct Controlled<T: Transport> {
    controller: Controller<T, Enabled<T>>,
}

impl<T: Transport + 'static> DeviceControl for Controlled<T>
where
    T::Port: 'static,
{
    fn create_poller(&mut self) -> Result<(u16, Box<dyn Poll>), DeviceError> {
        let queue = self.controller.create_queue_pair(QUEUE_ENTRIES)?;
        let id = queue.id().0;
        let poller = Poller::new(queue, self.controller.dma_space())?;
        Ok((id, Box::new(poller)))
    }

    fn delete_poller(&mut self, poller: Box<dyn Poll>) -> Result<(), DeviceError> {
        let poller = poller
            .into_any()
            .downcast::<Poller<T>>()
            .map_err(|_| DeviceError::ForeignPoller)?;
        Ok(self
            .controller
            .delete_queue_pair(poller.into_queue_pair())?)
    }

    fn next_event(&mut self) -> Result<Option<String>, DeviceError> {
        let Some(event) = self.controller.next_event()? else {
            return Ok(None);
        };
        let what = if event.is_namespace_change() {
            "namespace attributes changed: restart the server to serve the new size".to_owned()
        } else {
            format!(
                "type {} information {:#04x}",
                event.event_type(),
                event.information()
            )
        };
        Ok(Some(what))
    }

    fn shutdown(self: Box<Self>) -> Result<(), DeviceError> {
        self.controller
            .shutdown()
            .map(drop)
            .map_err(|(_, error)| error.into())
    }
}

/// One namespace with its identify data.
#[derive(Clone, Debug)]
pub struct NamespaceInfo {
    /// What a server needs of it.
    pub namespace: Namespace,
    /// Everything, as the controller returned it.
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
    /// Active namespaces.
    pub namespaces: Vec<NamespaceInfo>,
    /// Its DMA windows.
    pub space: Arc<DmaSpace>,
    control: Mutex<Option<Box<dyn DeviceControl>>>,
}

impl Device {
    /// Brings a controller up and looks at its namespaces. Asks for `queue_pairs`; fewer may be granted.
    ///
    /// # Errors
    /// When the controller does not come up, or an active namespace cannot be identified.
    pub fn open<T>(name: &str, transport: T, queue_pairs: u16) -> Result<Device, DeviceError>
    where
        T: Transport + 'static,
        T::Port: 'static,
    {
        let disabled = Controller::new(transport)?;
        let mut controller = disabled.enable(queue_pairs).map_err(|(_, error)| error)?;
        let mut namespaces = Vec::new();
        for nsid in controller.active_namespaces()? {
            namespaces.push(NamespaceInfo {
                namespace: controller.namespace(nsid)?,
                identify: controller.identify_namespace(nsid)?,
            });
        }
        Ok(Device {
            name: name.to_owned(),
            identity: Box::new(*controller.identity()),
            version: controller.version(),
            granted: controller.granted_queue_pairs(),
            max_transfer: controller.max_transfer(),
            namespaces,
            space: Arc::clone(controller.dma_space()),
            control: Mutex::new(Some(Box::new(Controlled { controller }))),
        })
    }

    /// The namespace with this identifier, if it is active.
    #[must_use]
    pub fn namespace(&self, nsid: Nsid) -> Option<&Namespace> {
        self.namespaces
            .iter()
            .map(|info| &info.namespace)
            .find(|namespace| namespace.nsid == nsid)
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
        self.identity.supports(oncs::WRITE_ZEROES)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Box<dyn DeviceControl>>> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`DeviceControl::create_poller`].
    ///
    /// # Errors
    /// As there, and after a shutdown.
    pub fn create_poller(&self) -> Result<(u16, Box<dyn Poll>), DeviceError> {
        self.lock()
            .as_mut()
            .ok_or(DeviceError::ForeignPoller)?
            .create_poller()
    }

    /// See [`DeviceControl::delete_poller`].
    ///
    /// # Errors
    /// As there, and after a shutdown.
    pub fn delete_poller(&self, poller: Box<dyn Poll>) -> Result<(), DeviceError> {
        self.lock()
            .as_mut()
            .ok_or(DeviceError::ForeignPoller)?
            .delete_poller(poller)
    }

    /// See [`DeviceControl::next_event`].
    ///
    /// # Errors
    /// As there.
    pub fn next_event(&self) -> Result<Option<String>, DeviceError> {
        self.lock()
            .as_mut()
            .map_or(Ok(None), |control| control.next_event())
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

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device")
            .field("name", &self.name)
            .field("granted", &self.granted)
            .finish_non_exhaustive()
    }
}
