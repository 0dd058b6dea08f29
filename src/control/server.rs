//! The life of the process: everything is checked and claimed first, then sockets listen; at the end every queue
//! pair goes back to its controller and the controller is shut down (I12). Start at [`Server::start`].

use std::io;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use nvme_model::ModelHandle;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};

use super::admin::{self, Admin};
use super::claim::open_device;
use super::device::{Device, DeviceError, Interrupts};
use super::placement::place;
use super::recovery::{Keeper, Patience, Place};
use super::resize::Sizes;
use super::session::{Disk, Export, ExportQueue, ExportWay, Host, Kind, Session};
use super::socket::{Listener, SocketError};
use super::state::StateError;
use super::units::{Units, servable};
use super::view::{self, View};
use crate::config::{ControllerConfig, CoreId, Polling, Socket};
use crate::datapath::abort::hear;
use crate::datapath::{Barrier, Clerk, Events, Poll};
use crate::plan::{DiskPlan, HostPlan, Plan};
use crate::reactor::{Mode, PollerId, Reactor, ReactorError};
use crate::scsi::{Listen, Lun, Roster, ShareError, Target};
use crate::stats::SharedCounters;

/// How often a session looks after its memory, and a keeper after its device, when nothing else happens.
const LOOK_INTERVAL: Duration = Duration::from_millis(500);
/// How long a front-end must have been silent before it is told something unasked.
const SILENCE: Duration = Duration::from_millis(50);
/// How long a reactor may take to give an idle poller back.
const RETIRE_DEADLINE: Duration = Duration::from_secs(2);

/// Why a server did not start, or did not end cleanly.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// A socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// A device.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// A reactor.
    #[error(transparent)]
    Reactor(#[from] ReactorError),
    /// A disk names a namespace that is not there or cannot be served.
    #[error("disk {disk}: cannot serve namespace {nsid} of device {device}: {reason}")]
    Namespace {
        /// The disk's socket.
        disk: String,
        /// The device's name.
        device: String,
        /// The namespace.
        nsid: u32,
        /// What is wrong with it.
        reason: String,
    },
    /// Reservations that are kept.
    #[error(transparent)]
    State(#[from] StateError),
    /// An initiator cannot have its logical units.
    #[error("host {host}: {source}")]
    Shared {
        /// The host's socket.
        host: String,
        /// Why.
        source: ShareError,
    },
    /// The system.
    #[error("cannot start the server: {0}")]
    Io(#[from] io::Error),
}

/// A running server.
#[derive(Debug)]
pub struct Server {
    devices: Vec<Arc<Device>>,
    reactors: Vec<Reactor>,
    /// Every poller, with the index of its device.
    pollers: Vec<(usize, Place)>,
    /// What it shows of itself, once it is up.
    view: Arc<View>,
    stop: Arc<Stop>,
    threads: Vec<JoinHandle<()>>,
}

/// Tells every control thread that the server ends.
#[derive(Debug)]
pub(super) struct Stop {
    flag: AtomicBool,
    /// Readable from then on.
    pub(super) event: OwnedFd,
}

impl Stop {
    fn new() -> io::Result<Stop> {
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        Ok(Stop {
            flag: AtomicBool::new(false),
            event,
        })
    }

    fn set(&self) {
        self.flag.store(true, Ordering::Release);
        // The counter starts at 0 and nobody reads it: the write cannot fail.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    pub(super) fn is_set(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

impl Server {
    /// Starts everything that `plan` names. Sockets are bound first and listen last; on any error what was started is
    /// taken down again and the sockets are removed.
    ///
    /// # Errors
    /// [`ServerError`].
    pub fn start(plan: &Plan) -> Result<Server, ServerError> {
        let listeners = sockets(plan).map(|socket| match socket {
            Socket::Path(path) => Listener::bind(path),
            Socket::Fd(fd) => Listener::inherit(*fd),
        });
        let listeners = listeners.collect::<Result<Vec<Listener>, SocketError>>()?;
        let shown = plan.stats.as_deref().map(Listener::bind).transpose()?;
        let asked = plan.admin.as_deref().map(Listener::bind_private);
        let asked = asked.transpose()?;
        let mut server = Server {
            devices: Vec::new(),
            reactors: Vec::new(),
            pollers: Vec::new(),
            view: Arc::default(),
            stop: Arc::new(Stop::new()?),
            threads: Vec::new(),
        };
        match server.bring_up(plan, listeners, (shown, asked)) {
            Ok(()) => Ok(server),
            Err(error) => {
                if let Err(also) = server.take_down() {
                    tracing::error!(error = %also, "while giving up");
                }
                Err(error)
            }
        }
    }

    fn bring_up(
        &mut self,
        plan: &Plan,
        listeners: Vec<Listener>,
        (shown, asked): (Option<Listener>, Option<Listener>),
    ) -> Result<(), ServerError> {
        let mut view = View::default();
        let (mode, interrupts) = match plan.poll {
            Polling::Always => (Mode::Always, Interrupts::Off),
            Polling::Adaptive => (Mode::Adaptive, Interrupts::OnRequest),
        };
        let mut models = Vec::new();
        for device in &plan.devices {
            if let ControllerConfig::Model(model) = &device.config.controller
                && !model.medium.keeps_data()
            {
                tracing::warn!(
                    device = %device.config.name,
                    "the medium is null: data written is lost, and reads return whatever is in the guest's buffer"
                );
            }
            let (device, handle) = open_device(&device.config, device.virtqueues, interrupts)?;
            let shown = handle.clone().map(|handle| (device.name.clone(), handle));
            view.models.extend(shown);
            models.push(handle);
            if let Err(error) = device.ask_for_health() {
                tracing::warn!(device = %device.name, %error, "cannot read its SMART log");
            }
            self.devices.push(Arc::new(device));
        }
        for core in &plan.cores {
            self.reactors.push(Reactor::start(core.id.0, mode)?);
        }
        let handles = self.reactors.iter().map(Reactor::handle);
        view.handles = handles.cloned().collect();
        let mut shared = Shared::of(plan)?;
        view.exports = self.create_exports(plan, &mut shared)?;
        for (disk, listener) in view.exports.iter().zip(listeners) {
            let (disk, stop) = (Arc::clone(disk), Arc::clone(&self.stop));
            let thread = std::thread::Builder::new().name("listener".to_owned());
            self.threads
                .push(thread.spawn(move || accept_loop(&disk, &listener, &stop))?);
        }
        let devices = self.devices.iter().cloned().zip(models).collect();
        let sizes = Sizes::new(devices, view.exports.clone(), shared.units);
        let sizes = Arc::new(sizes);
        let keepers = plan.devices.iter().enumerate().map(|(index, planned)| {
            let own = self.pollers.iter().filter(|(device, _)| *device == index);
            let places = own.map(|(_, place)| place.clone()).collect();
            let device = Arc::clone(&self.devices[index]);
            let keeper = Keeper::new(
                device,
                planned.config.on_device_loss,
                places,
                Patience::default(),
            )
            .with_sizes(Arc::clone(&sizes), index);
            (planned.config.name.clone(), Mutex::new(keeper))
        });
        view.keepers = keepers.collect();
        // A thread for each device: one that does not come up holds up no other.
        for index in 0..view.keepers.len() {
            let (keepers, stop) = (Arc::clone(&view.keepers), Arc::clone(&self.stop));
            let thread = std::thread::Builder::new().name("keeper".to_owned());
            let bell = Arc::clone(self.devices[index].bell());
            self.threads
                .push(thread.spawn(move || keep(&keepers[index].1, &bell, &stop))?);
        }
        self.view = Arc::new(view);
        if let Some(listener) = shown {
            let (view, stop) = (Arc::clone(&self.view), Arc::clone(&self.stop));
            let thread = std::thread::Builder::new().name("statistics".to_owned());
            self.threads
                .push(thread.spawn(move || view::show(&view, &listener, &stop))?);
        }
        if let Some(listener) = asked {
            let admin = Admin::new(plan, &self.view.exports, sizes, &self.stop);
            let thread = std::thread::Builder::new().name("administration".to_owned());
            self.threads
                .push(thread.spawn(move || admin::serve(&admin, &listener))?);
        }
        Ok(())
    }

    /// Makes the queue pairs of all devices, and the disks and hosts that ride on them, in the order of the plan.
    fn create_exports(
        &mut self,
        plan: &Plan,
        shared: &mut Shared,
    ) -> Result<Vec<Arc<Export>>, ServerError> {
        let disks = plan.disks.iter().map(Planned::Disk);
        let planned: Vec<Planned<'_>> = disks.chain(plan.hosts.iter().map(Planned::Host)).collect();
        let none = |export: &Planned<'_>| vec![Vec::new(); export.devices().len()];
        let mut places: Vec<Vec<Vec<Place>>> = planned.iter().map(none).collect();
        for device in 0..self.devices.len() {
            self.create_pollers(device, &planned, &mut places)?;
        }
        let mut exports = Vec::new();
        for (export, places) in planned.iter().zip(places) {
            let kind = export.kind(&self.devices, shared)?;
            let indices = export.devices();
            let mut of_devices = indices.into_iter().zip(places);
            // There is one device at least.
            let Some((device_index, own)) = of_devices.next() else {
                continue;
            };
            let mut queues: Vec<ExportQueue> = Vec::new();
            if let (Kind::Host(_), Some(first)) = (&kind, own.first()) {
                // The control queue and the event queue, polled with the first request queue.
                queues.extend([export_queue(first), export_queue(first)]);
            }
            queues.extend(own.iter().map(export_queue));
            let ways = of_devices.map(|(device_index, places)| ExportWay {
                device: Arc::clone(&self.devices[device_index]),
                device_index,
                queues: places.iter().map(export_queue).collect(),
            });
            exports.push(Arc::new(Export {
                name: export.socket().to_string(),
                device: Arc::clone(&self.devices[device_index]),
                device_index,
                queues,
                ways: ways.collect(),
                kind,
            }));
        }
        Ok(exports)
    }

    /// Makes the queue pairs of one device: `places` learns where the queues are of each that is planned, by its devices.
    fn create_pollers(
        &mut self,
        index: usize,
        planned: &[Planned<'_>],
        places: &mut [Vec<Vec<Place>>],
    ) -> Result<(), ServerError> {
        let mut riders = Vec::new();
        for (at, export) in planned.iter().enumerate() {
            let devices = export.devices();
            if let Some(which) = devices.iter().position(|device| *device == index) {
                riders.extend(export.queue_cores().iter().map(|core| (at, which, core.0)));
            }
        }
        let cores: Vec<usize> = riders.iter().map(|(_, _, core)| *core).collect();
        let device = &self.devices[index];
        let found = place(&cores, usize::from(device.granted));
        let pairs = found.iter().map(|place| place.pair + 1).max().unwrap_or(0);
        if pairs < found.len() {
            tracing::warn!(
                device = %device.name, virtqueues = found.len(), queue_pairs = pairs,
                "more virtqueues than queue pairs: virtqueues of one reactor share"
            );
        }
        let mut pollers = Vec::new();
        for pair in 0..pairs {
            let core = found
                .iter()
                .find(|place| place.pair == pair)
                .map_or(0, |place| place.core);
            pollers.push(self.create_poller(index, core)?);
        }
        for ((at, which, _), place) in riders.into_iter().zip(found) {
            places[at][which].push(pollers[place.pair].clone());
        }
        Ok(())
    }

    fn create_poller(&mut self, device: usize, core: usize) -> Result<Place, ServerError> {
        let reactor = self
            .reactors
            .iter()
            .find(|reactor| reactor.handle().core() == core);
        let reactor = reactor.ok_or(ReactorError::Pin { core })?.handle().clone();
        let (pair, poller) = self.devices[device].create_poller()?;
        // Fewer than 2^32 queue pairs: a controller has at most 65535.
        let id = PollerId(u32::try_from(self.pollers.len()).unwrap_or(u32::MAX));
        let health = poller.health();
        reactor.adopt(id, poller);
        let place = Place {
            reactor,
            id,
            pair,
            health,
        };
        self.pollers.push((device, place.clone()));
        Ok(place)
    }

    /// The counters of every virtqueue, and what the software controllers say of themselves.
    #[must_use]
    pub fn report(&self) -> String {
        self.view.report()
    }

    /// The other end of an embedded controller, for what happens to an SSD by itself.
    #[must_use]
    pub fn model(&self, device: &str) -> Option<&ModelHandle> {
        let mut models = self.view.models.iter();
        let (_, model) = models.find(|(name, _)| name == device)?;
        Some(model)
    }

    /// Ends everything: sessions, queue pairs, reactors, controllers. Returns the last report.
    ///
    /// # Errors
    /// When a controller did not confirm its shutdown: its cache may not be durable.
    pub fn stop(mut self) -> Result<String, ServerError> {
        let result = self.take_down();
        let report = self.report();
        result.map(|()| report)
    }

    fn take_down(&mut self) -> Result<(), ServerError> {
        self.stop.set();
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a control thread panicked");
            }
        }
        let mut result = Ok(());
        for (device, place) in self.pollers.drain(..) {
            let device = &self.devices[device];
            let returned = place.reactor.retire(place.id).recv_timeout(RETIRE_DEADLINE);
            let deleted = returned
                .map_err(|_| ())
                .map(|poller: Box<dyn Poll>| device.delete_poller(poller));
            match deleted {
                Ok(Ok(())) => {}
                Ok(Err(error)) => result = Err(error.into()),
                Err(()) => {
                    tracing::error!(device = %device.name, "a queue pair still has requests at the device")
                }
            }
        }
        for device in self.devices.drain(..) {
            if let Err(error) = device.shutdown() {
                tracing::error!(device = %device.name, %error, "the device did not confirm its shutdown");
                result = Err(error.into());
            }
        }
        for reactor in self.reactors.drain(..) {
            reactor.stop();
        }
        result
    }
}

/// Where front-ends connect: disks, then hosts.
fn sockets(plan: &Plan) -> impl Iterator<Item = &Socket> {
    let disks = plan.disks.iter().map(|disk| &disk.socket);
    disks.chain(plan.hosts.iter().map(|host| &host.socket))
}

fn export_queue(place: &Place) -> ExportQueue {
    ExportQueue {
        reactor: place.reactor.clone(),
        poller: place.id,
        pair: place.pair,
        counters: Arc::new(SharedCounters::default()),
    }
}

/// What a socket is planned to offer.
#[derive(Clone, Copy)]
enum Planned<'a> {
    Disk(&'a DiskPlan),
    Host(&'a HostPlan),
}

impl Planned<'_> {
    fn socket(&self) -> &Socket {
        match self {
            Planned::Disk(disk) => &disk.socket,
            Planned::Host(host) => &host.socket,
        }
    }

    fn queue_cores(&self) -> &[CoreId] {
        match self {
            Planned::Disk(disk) => &disk.queue_cores,
            Planned::Host(host) => &host.queue_cores,
        }
    }

    /// Indices of its devices.
    fn devices(&self) -> Vec<usize> {
        match self {
            Planned::Disk(disk) => vec![disk.device],
            Planned::Host(host) => {
                let own = std::iter::once(host.device);
                own.chain(host.others.iter().copied()).collect()
            }
        }
    }

    fn kind(&self, devices: &[Arc<Device>], shared: &mut Shared) -> Result<Kind, ServerError> {
        match self {
            Planned::Disk(disk) => {
                let device = &devices[disk.device];
                let (namespace, geometry) =
                    servable(&disk.socket, disk.nsid, disk.readonly, device)?;
                let mut serial = [0; 20];
                for (byte, given) in serial.iter_mut().zip(disk.serial.bytes()) {
                    *byte = given;
                }
                Ok(Kind::Disk(Disk::new(namespace.nsid, geometry, serial)?))
            }
            Planned::Host(host) => host_of(host, devices, shared).map(Kind::Host),
        }
    }
}

/// The lanes of all hosts, which are waited for together.
struct Lanes {
    barrier: Arc<Barrier>,
    /// How many have a place at the barrier.
    given: usize,
}

fn lanes_of(plan: &Plan) -> io::Result<Lanes> {
    let mut fronts: Vec<usize> = Vec::new();
    for host in &plan.hosts {
        let first = fronts.len();
        // Its request queues, and those once more for each other device.
        for _ in 0..=host.others.len() {
            fronts.extend(first..first + host.queue_cores.len());
        }
    }
    let barrier = Barrier::new(fronts.len())?.with_fronts(fronts);
    Ok(Lanes {
        barrier: Arc::new(barrier),
        given: 0,
    })
}

/// What hosts share.
struct Shared {
    units: Units,
    lanes: Lanes,
    /// Once there is a host.
    clerk: Option<Arc<Clerk>>,
}

impl Shared {
    fn of(plan: &Plan) -> Result<Shared, ServerError> {
        Ok(Shared {
            units: Units::of(plan)?,
            lanes: lanes_of(plan)?,
            clerk: None,
        })
    }

    fn clerk(&mut self) -> Result<Arc<Clerk>, ServerError> {
        let clerk = match &self.clerk {
            Some(clerk) => Arc::clone(clerk),
            None => Arc::new(Clerk::start()?),
        };
        self.clerk = Some(Arc::clone(&clerk));
        Ok(clerk)
    }
}

fn host_of(
    host: &HostPlan,
    devices: &[Arc<Device>],
    shared: &mut Shared,
) -> Result<Host, ServerError> {
    let mut units = Vec::with_capacity(host.luns.len());
    for place in &host.luns {
        let (device, lanes) = (&devices[place.device], shared.lanes.barrier.lanes());
        let unit = shared.units.unit_of(host, *place, device, lanes)?;
        // The configuration refuses higher ones.
        if let Some(lun) = Lun::new(place.lun) {
            units.push((place.target, lun, unit));
        }
    }
    let target = Target::new(&host.initiator, units).map_err(|source| ServerError::Shared {
        host: host.socket.to_string(),
        source,
    })?;
    let events = Arc::new(Events::new()?);
    let listener: Arc<dyn Listen> = Arc::<Events>::clone(&events);
    let first = shared.lanes.given;
    shared.lanes.given += host.queue_cores.len() * (1 + host.others.len());
    Ok(Host {
        roster: Roster::new(target).with_listener(listener),
        barrier: Arc::clone(&shared.lanes.barrier),
        lanes: first..shared.lanes.given,
        clerk: shared.clerk()?,
        events,
    })
}

/// A connection and the thread that serves it.
struct Connection {
    stream: UnixStream,
    thread: JoinHandle<()>,
}

impl Connection {
    /// The front-end hung up, or its session ended.
    fn is_over(&self) -> bool {
        let mut fds = [PollFd::new(&self.stream, PollFlags::RDHUP)];
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let hung_up = poll(&mut fds, Some(&now)).is_ok_and(|ready| ready > 0);
        hung_up || self.thread.is_finished()
    }

    fn end(self) {
        let _ = self.stream.shutdown(Shutdown::Both);
        if self.thread.join().is_err() {
            tracing::error!("a session panicked");
        }
    }
}

/// Serves one client of a disk at a time. A second one is refused while the first is there; one that comes while the
/// first is still draining waits for that.
fn accept_loop(disk: &Arc<Export>, listener: &Listener, stop: &Arc<Stop>) {
    let mut current: Option<Connection> = None;
    while wait_readable(listener.socket().as_fd(), Some(stop.event.as_fd()), None) && !stop.is_set()
    {
        let stream = match listener.socket().accept() {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(disk = %disk.name, %error, "cannot accept a connection");
                std::thread::sleep(Duration::from_millis(100)); // out of descriptors, most likely: do not spin
                continue;
            }
        };
        if let Some(connection) = current.take() {
            if !connection.is_over() {
                tracing::warn!(disk = %disk.name, "a second front-end was refused: the disk is in use");
                current = Some(connection);
                continue;
            }
            connection.end();
        }
        let clone = stream.try_clone();
        let session_disk = Arc::clone(disk);
        let thread = std::thread::Builder::new().name("session".to_owned());
        let started = clone.and_then(|clone| {
            let thread = thread.spawn(move || run_session(&session_disk, stream))?;
            Ok(Connection {
                stream: clone,
                thread,
            })
        });
        match started {
            Ok(connection) => current = Some(connection),
            Err(error) => tracing::warn!(disk = %disk.name, %error, "cannot start a session"),
        }
    }
    if let Some(connection) = current {
        connection.end();
    }
}

/// Waits until `fd` or `stop` is readable, or `timeout` has passed. `false` on an error that will not go away.
pub(super) fn wait_readable(
    fd: BorrowedFd<'_>,
    stop: Option<BorrowedFd<'_>>,
    timeout: Option<Duration>,
) -> bool {
    let mut fds = vec![PollFd::new(&fd, PollFlags::IN)];
    if let Some(stop) = &stop {
        fds.push(PollFd::new(stop, PollFlags::IN));
    }
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    matches!(
        poll(&mut fds, timeout.as_ref()),
        Ok(_) | Err(rustix::io::Errno::INTR)
    )
}

/// Which of the files are readable, or have hung up, when any is or `timeout` has passed.
fn wait_for(files: [Option<BorrowedFd<'_>>; 2], timeout: Option<Duration>) -> [bool; 2] {
    let there = files.iter().flatten();
    let mut fds: Vec<PollFd<'_>> = there.map(|file| PollFd::new(file, PollFlags::IN)).collect();
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    let polled = poll(&mut fds, timeout.as_ref()).is_ok();
    let mut ready = fds.iter().map(|fd| polled && !fd.revents().is_empty());
    files.map(|file| file.is_some() && ready.next().unwrap_or(false))
}

fn run_session(disk: &Arc<Export>, stream: UnixStream) {
    let session = match Session::new(Arc::clone(disk)) {
        Ok(session) => Arc::new(Mutex::new(session)),
        Err(error) => return tracing::warn!(disk = %disk.name, %error, "cannot start a session"),
    };
    tracing::info!(disk = %disk.name, "front-end connected");
    let started = Instant::now();
    let mut handler = BackendReqHandler::from_stream(stream, Arc::clone(&session));
    let lock = || session.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        // SAFETY: the handler owns the socket and lives until the end of this function.
        let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
        let news = lock().has_news();
        let timeout = Some(if news { SILENCE } else { LOOK_INTERVAL });
        let [ready, resized] = wait_for([Some(socket), disk.resized()], timeout);
        if lock().is_poisoned() {
            tracing::warn!(disk = %disk.name, "the front-end shrank its shared memory: connection closed");
            break;
        }
        if let Some(bell) = disk.resized().filter(|_| resized) {
            hear(bell);
            lock().follow_size();
        }
        if !ready {
            if news && !resized {
                lock().tell_news();
            }
            continue;
        }
        if let Err(error) = lock().look_ahead(socket) {
            tracing::debug!(disk = %disk.name, %error, "cannot look at the next message");
        }
        match handler.handle_request() {
            Ok(()) | Err(VhostError::SocketRetry(_)) => {}
            Err(VhostError::Disconnected) => {
                tracing::info!(disk = %disk.name, after = ?started.elapsed(), "front-end disconnected");
                break;
            }
            Err(error) => {
                tracing::warn!(disk = %disk.name, %error, "connection closed");
                break;
            }
        }
    }
    lock().close();
    // The listener keeps a descriptor of this socket: only a shutdown tells the front-end, and only now that nothing
    // of its memory is in use any more.
    // SAFETY: as above.
    let socket = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
    let _ = rustix::net::shutdown(socket, rustix::net::Shutdown::Both);
}

/// Looks after a device every so often, and after the commands that are to be aborted when the bell says so.
fn keep(keeper: &Mutex<Keeper>, bell: &OwnedFd, stop: &Stop) {
    let lock = || keeper.lock().unwrap_or_else(PoisonError::into_inner);
    let mut next_look = Instant::now();
    while !stop.is_set() {
        if Instant::now() >= next_look {
            lock().look();
            next_look = Instant::now() + LOOK_INTERVAL;
        }
        let left = next_look.saturating_duration_since(Instant::now());
        wait_readable(bell.as_fd(), Some(stop.event.as_fd()), Some(left));
        hear(bell.as_fd());
        lock().abort_commands();
    }
}
