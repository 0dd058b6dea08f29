//! The administration socket: logical units come and go while guests run, and namespaces get other sizes.
//!
//! ```text
//!  {"command":"lun-add",...} --> Admin --> Roster (a successor of the nexus) --> lanes, at their next command
//!                                      --> Events --> the guest's event queue
//! ```
//! A line is a request, and has one line for an answer ([`AdminRequest`], [`AdminAnswer`]). Who may connect may take disks
//! away, so that only the server's user and root may. A few clients are served at a time; requests are carried out one
//! after the other.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read as _, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::device::Device;
use super::resize::Sizes;
use super::server::{Stop, wait_readable};
use super::session::{Export, Host, Kind};
use super::socket::Listener;
use crate::config::{
    AdminAnswer, AdminRequest, ByteSize, HostLun, LunAddress, LunInfo, LunPlace, MAX_REQUEST, Use,
    check_uses,
};
use crate::datapath::{Happening, MediumId};
use crate::plan::{DiskPlan, HostPlan, Plan};
use crate::scsi::{LogicalUnit, Lun};

/// Clients at a time.
const MAX_CLIENTS: usize = 8;
/// How long one too many is kept waiting.
const CROWD_PATIENCE: Duration = Duration::from_millis(250);
/// How long a client may take to read.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long it may say nothing.
const SILENCE: Duration = Duration::from_secs(600);
/// How long the commands of a logical unit that was taken away are waited for.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// What requests are about.
#[derive(Debug)]
pub(super) struct Admin {
    disks: Vec<DiskPlan>,
    hosts: Vec<Managed>,
    /// Devices' names.
    devices: Vec<String>,
    sizes: Arc<Sizes>,
    /// Held while a request is carried out.
    state: Mutex<State>,
    stop: Arc<Stop>,
}

#[derive(Debug)]
struct Managed {
    plan: HostPlan,
    export: Arc<Export>,
}

#[derive(Debug)]
struct State {
    /// Logical units that were taken away and have commands yet: host, index, and the number that its lanes have to pass.
    leaving: Vec<(usize, usize, u64)>,
}

type Answer = Result<AdminAnswer, String>;

impl Managed {
    fn host(&self) -> Option<&Host> {
        match &self.export.kind {
            Kind::Host(host) => Some(host),
            Kind::Disk(_) => None,
        }
    }

    /// One of its devices, by index.
    fn device(&self, index: usize) -> Option<&Device> {
        let mut devices = self.export.devices();
        devices
            .find(|(own, _)| *own == index)
            .map(|(_, device)| &**device)
    }
}

/// The index of a device, and the namespace.
fn place_of(unit: &LogicalUnit) -> (usize, u32) {
    let MediumId { device, nsid } = MediumId::of(unit);
    (usize::try_from(device).unwrap_or(usize::MAX), nsid.0)
}

fn use_of(host: &HostPlan, (device, nsid): (usize, u32)) -> Use<'_> {
    Use {
        socket: &host.socket,
        device,
        nsid,
        readonly: host.readonly,
        initiator: Some(&host.initiator),
        named: host.named,
    }
}

fn done(what: String) -> Answer {
    tracing::info!("{what}");
    Ok(AdminAnswer::Done { done: what })
}

impl Admin {
    /// For the hosts among `exports`, which were made by `plan`.
    pub(super) fn new(
        plan: &Plan,
        exports: &[Arc<Export>],
        sizes: Arc<Sizes>,
        stop: &Arc<Stop>,
    ) -> Admin {
        let hosts = plan.hosts.iter().filter_map(|host| {
            let name = host.socket.to_string();
            let export = exports.iter().find(|export| export.name == name)?;
            Some(Managed {
                plan: host.clone(),
                export: Arc::clone(export),
            })
        });
        let devices = plan.devices.iter();
        Admin {
            hosts: hosts.collect(),
            disks: plan.disks.clone(),
            devices: devices.map(|device| device.config.name.clone()).collect(),
            sizes,
            state: Mutex::new(State {
                leaving: Vec::new(),
            }),
            stop: Arc::clone(stop),
        }
    }

    fn answer(&self, line: &[u8]) -> AdminAnswer {
        let request = serde_json::from_slice(line);
        let answer = match request {
            Ok(request) => self.carry_out(&request),
            Err(error) => Err(format!(
                "cannot read the request: {error} (a line is one of {{\"command\":\"lun-add\",\"path\":HOST,\
                 \"lun\":\"T:L:nsN\"}}, {{\"command\":\"lun-remove\",\"path\":HOST,\"lun\":\"T:L\"}}, \
                 {{\"command\":\"luns\"}}, {{\"command\":\"device-rescan\",\"device\":NAME}} and \
                 {{\"command\":\"device-resize\",\"device\":NAME,\"namespace\":N,\"size\":\"2G\"}})"
            )),
        };
        answer.unwrap_or_else(|error| AdminAnswer::Refused { error })
    }

    fn carry_out(&self, request: &AdminRequest) -> Answer {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.settle(&mut state);
        match request {
            AdminRequest::LunAdd { path, lun } => self.add(&mut state, path, lun),
            AdminRequest::LunRemove { path, lun } => self.remove(&mut state, path, *lun),
            AdminRequest::Luns {} => Ok(AdminAnswer::Luns { luns: self.luns() }),
            AdminRequest::DeviceRescan { device } => {
                let rescanned = self.sizes.rescan(device);
                done(rescanned.map_err(|error| format!("cannot rescan: {error}"))?)
            }
            AdminRequest::DeviceResize {
                device,
                namespace,
                size,
            } => {
                let resized = self.sizes.resize(device, *namespace, size.0);
                done(resized.map_err(|error| format!("cannot resize: {error}"))?)
            }
        }
    }

    fn find(&self, path: &str) -> Result<(usize, &Managed, &Host), String> {
        let hosts = self.hosts.iter().enumerate();
        let mut hosts = hosts.filter_map(|(at, managed)| Some((at, managed, managed.host()?)));
        let found = hosts.find(|(_, managed, _)| managed.export.name == path);
        found.ok_or_else(|| {
            let known = self
                .hosts
                .iter()
                .map(|managed| managed.export.name.as_str());
            let known: Vec<&str> = known.collect();
            match known.is_empty() {
                true => format!("no SCSI host {path}: this server has none (start it with --scsi)"),
                false => format!("no SCSI host {path}: this server has {}", known.join(", ")),
            }
        })
    }

    fn add(&self, state: &mut State, path: &str, place: &LunPlace) -> Answer {
        let (at, managed, host) = self.find(path)?;
        let refuse = |why: String| format!("cannot add {place} to host {path}: {why}");
        let index = match &place.device {
            None => managed.plan.device,
            Some(name) => {
                let index = self.devices.iter().position(|device| device == name);
                let known = || self.devices.join(", ");
                index.ok_or_else(|| {
                    refuse(format!(
                        "there is no device {name}, but there is {}",
                        known()
                    ))
                })?
            }
        };
        let device = managed.device(index).ok_or_else(|| {
            let why = "the host has no queue pairs at that device, but at those alone whose namespaces it was started with";
            refuse(why.to_owned())
        })?;
        let nsid = place.nsid;
        if let Some(other) = self.left_by(state, (index, nsid)) {
            return Err(refuse(format!(
                "namespace {nsid} was taken from host {other}, whose commands from before are at the device yet: try again \
                 when they have ended"
            )));
        }
        self.check_use(at, (index, nsid)).map_err(refuse)?;
        let lun = Lun::new(place.lun).ok_or_else(|| refuse("there is no such LUN".to_owned()))?;
        let mut units = self.sizes.units();
        let host_lun = HostLun {
            target: place.target,
            lun: place.lun,
            device: index,
            nsid,
        };
        let unit = units.unit_of(&managed.plan, host_lun, device, host.barrier.lanes());
        let unit = unit.map_err(|error| refuse(error.to_string()))?;
        let added = host.roster.add(place.target, lun, unit);
        added.map_err(|error| refuse(error.to_string()))?;
        drop(units);
        host.events.tell(place.target, lun, Happening::Appeared);
        host.hurry_lanes();
        done(format!("host {path} has {place}"))
    }

    fn remove(&self, state: &mut State, path: &str, address: LunAddress) -> Answer {
        let (at, _, host) = self.find(path)?;
        let LunAddress { target, lun } = address;
        let lun = Lun::new(lun);
        let index = lun.and_then(|lun| host.roster.withdraw(target, lun));
        let (Some(lun), Some(index)) = (lun, index) else {
            return Err(format!(
                "cannot remove {address} from host {path}: it has no such logical unit (tandem lun list shows them)"
            ));
        };
        host.events.tell(target, lun, Happening::Removed);
        let number = host.barrier.ask(|| host.lanes.clone());
        state.leaving.push((at, index, number));
        let deadline = Instant::now() + DRAIN_DEADLINE;
        while self.settle(state) && Instant::now() < deadline && !self.stop.is_set() {
            std::thread::sleep(Duration::from_millis(1));
        }
        let left = state.leaving.iter();
        let mut left = left.filter(|(own, index_left, _)| (*own, *index_left) == (at, index));
        done(match left.next() {
            None => format!("host {path} has {address} no more"),
            Some(_) => format!(
                "host {path} has {address} no more, but commands from before are at the device after \
                 {DRAIN_DEADLINE:?}: its namespace can be added again when they have ended"
            ),
        })
    }

    /// Makes room where commands have ended. Whether any is still waited for.
    fn settle(&self, state: &mut State) -> bool {
        state.leaving.retain(|(at, index, number)| {
            let host = self.hosts.get(*at).and_then(Managed::host);
            host.is_some_and(|host| {
                let ended = host.barrier.have_ended(host.lanes.clone(), *number);
                if ended {
                    host.roster.forget(*index);
                }
                !ended
            })
        });
        !state.leaving.is_empty()
    }

    /// The host that has lost a namespace and has commands for it yet.
    fn left_by(&self, state: &State, place: (usize, u32)) -> Option<&str> {
        state.leaving.iter().find_map(|(at, index, _)| {
            let managed = self.hosts.get(*at)?;
            let target = managed.host()?.roster.target();
            let unit = target.units().get(*index)?;
            (place_of(unit) == place).then_some(managed.export.name.as_str())
        })
    }

    /// The same rules as at the start.
    fn check_use(&self, at: usize, place: (usize, u32)) -> Result<(), String> {
        let mut uses: Vec<Use<'_>> = Vec::new();
        uses.extend(self.disks.iter().map(|disk| Use {
            socket: &disk.socket,
            device: disk.device,
            nsid: disk.nsid,
            readonly: disk.readonly,
            initiator: None,
            named: false,
        }));
        for managed in &self.hosts {
            let target = managed.host().map(|host| host.roster.target());
            for own in target.iter().flat_map(|target| {
                let places = target.places();
                places.map(|(_, _, unit)| place_of(unit))
            }) {
                uses.push(use_of(&managed.plan, own));
            }
        }
        uses.push(use_of(&self.hosts[at].plan, place));
        let name = |device: usize| self.devices.get(device).cloned().unwrap_or_default();
        check_uses(&uses, name).map_err(|error| error.to_string())
    }

    fn luns(&self) -> Vec<LunInfo> {
        let mut luns = Vec::new();
        for managed in &self.hosts {
            let Some(host) = managed.host() else { continue };
            for (target, lun, unit) in host.roster.target().places() {
                let geometry = unit.geometry();
                let (index, nsid) = place_of(unit);
                let device = self.devices.get(index).cloned().unwrap_or_default();
                let is_own = index == managed.plan.device;
                luns.push(LunInfo {
                    path: managed.export.name.clone(),
                    lun: LunPlace {
                        target,
                        lun: lun.get(),
                        device: (!is_own).then(|| device.clone()),
                        nsid,
                    },
                    device,
                    blocks: geometry.blocks(),
                    block_size: geometry.block_bytes(),
                    readonly: geometry.read_only(),
                });
            }
        }
        luns
    }

    /// Answers one client until it has nothing more to ask.
    fn attend(&self, mut stream: &UnixStream) -> io::Result<()> {
        let peer = rustix::net::sockopt::socket_peercred(stream)?.uid;
        if !peer.is_root() && peer != rustix::process::geteuid() {
            return Err(io::Error::from(io::ErrorKind::PermissionDenied));
        }
        // Read is what is there by then.
        stream.set_read_timeout(Some(Duration::from_millis(1)))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut held: Vec<u8> = Vec::new();
        loop {
            let stop = Some(self.stop.event.as_fd());
            if !wait_readable(stream.as_fd(), stop, Some(SILENCE)) || self.stop.is_set() {
                return Ok(());
            }
            let mut chunk = [0; MAX_REQUEST];
            let read = match stream.read(&mut chunk) {
                Ok(read) => read,
                // It has been silent for too long.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            };
            held.extend_from_slice(&chunk[..read]);
            if read == 0 {
                // A last line need not end.
                held.push(b'\n');
            }
            while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = held.drain(..=end).collect();
                if line.len() > MAX_REQUEST {
                    return too_long(stream);
                }
                if !line.trim_ascii().is_empty() {
                    send(stream, &self.answer(&line))?;
                }
            }
            if read == 0 {
                return Ok(());
            }
            if held.len() >= MAX_REQUEST {
                return too_long(stream);
            }
        }
    }
}

fn too_long(stream: &UnixStream) -> io::Result<()> {
    let error = format!("cannot read the request: it has more than {MAX_REQUEST} bytes");
    send(stream, &AdminAnswer::Refused { error })
}

fn send(mut stream: &UnixStream, answer: &AdminAnswer) -> io::Result<()> {
    let mut text = serde_json::to_vec(answer)?;
    text.push(b'\n');
    stream.write_all(&text)
}

/// Serves whoever connects and may, until the server ends.
pub(super) fn serve(admin: &Admin, listener: &Listener) {
    let stop = &admin.stop;
    let clients = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        while wait_readable(listener.socket().as_fd(), Some(stop.event.as_fd()), None)
            && !stop.is_set()
        {
            let stream = match listener.socket().accept() {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an administrator");
                    // Out of descriptors, most likely: do not spin.
                    std::thread::sleep(Duration::from_millis(100));
                    continue;
                }
            };
            // One that has hung up may not have been noticed yet.
            let start = Instant::now();
            let crowded = || clients.load(Ordering::Acquire) >= MAX_CLIENTS;
            while crowded() && start.elapsed() < CROWD_PATIENCE && !stop.is_set() {
                std::thread::sleep(Duration::from_millis(5));
            }
            if crowded() {
                let error = format!("{MAX_CLIENTS} clients are at this socket already: close one");
                // Nobody waits for one that does not even read.
                let _ = stream.set_write_timeout(Some(Duration::from_millis(10)));
                let _ = send(&stream, &AdminAnswer::Refused { error });
                continue;
            }
            clients.fetch_add(1, Ordering::AcqRel);
            let clients = &clients;
            let thread = std::thread::Builder::new().name("administrator".to_owned());
            let started = thread.spawn_scoped(scope, move || {
                if let Err(error) = admin.attend(&stream) {
                    tracing::warn!(%error, "an administrator was not answered");
                }
                clients.fetch_sub(1, Ordering::AcqRel);
            });
            if let Err(error) = started {
                clients.fetch_sub(1, Ordering::AcqRel);
                tracing::warn!(%error, "cannot answer an administrator");
            }
        }
    });
}

/// Why a running server did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// There is no server.
    #[error(
        "cannot reach a server at {path}: {error} (it listens there when started with --admin {path})"
    )]
    Reach {
        /// The socket.
        path: String,
        /// What the system said.
        error: io::Error,
    },
    /// The server ended, or is of another version.
    #[error("the server at {path} gave no answer that makes sense: {error}")]
    Answer {
        /// The socket.
        path: String,
        /// What is wrong with it.
        error: io::Error,
    },
    /// It was refused.
    #[error("{0}")]
    Refused(String),
}

/// Asks a running server: what it says, for people or, of a list, for a program.
///
/// # Errors
/// [`AskError`].
pub fn ask(server: &Path, request: &AdminRequest, json: bool) -> Result<String, AskError> {
    let path = || server.display().to_string();
    let stream = UnixStream::connect(server);
    let mut stream = stream.map_err(|error| AskError::Reach {
        path: path(),
        error,
    })?;
    let mut exchange = || -> io::Result<(String, AdminAnswer)> {
        // A removal waits for commands to end.
        stream.set_read_timeout(Some(DRAIN_DEADLINE * 2))?;
        let mut text = serde_json::to_vec(request)?;
        text.push(b'\n');
        // One client too many is told so before it has said anything.
        let written = stream.write_all(&text);
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line)?;
        if line.is_empty() {
            written?;
        }
        let answer = serde_json::from_str(&line)?;
        Ok((line, answer))
    };
    let (line, answer) = exchange().map_err(|error| AskError::Answer {
        path: path(),
        error,
    })?;
    match answer {
        AdminAnswer::Refused { error } => Err(AskError::Refused(error)),
        AdminAnswer::Done { done } => Ok(format!("{done}\n")),
        AdminAnswer::Luns { .. } if json => Ok(line),
        AdminAnswer::Luns { luns } => Ok(table(&luns)),
    }
}

fn table(luns: &[LunInfo]) -> String {
    let mut text = String::new();
    let width = luns.iter().map(|info| info.path.len()).max();
    let width = width.unwrap_or(0).max("HOST".len());
    // A String takes all that is written to it.
    let _ = writeln!(
        text,
        "{:width$}  {:<18}  {:<8}  {:<8}  ACCESS",
        "HOST", "PLACE", "DEVICE", "SIZE"
    );
    for info in luns {
        let size = ByteSize(info.blocks.saturating_mul(info.block_size.into()));
        let access = match info.readonly {
            true => "read-only",
            false => "read-write",
        };
        let place = info.lun.to_string();
        let _ = writeln!(
            text,
            "{:width$}  {place:<18}  {:<8}  {size:<8}  {access}",
            info.path, info.device
        );
    }
    text
}
