//! What the user asked for: a TOML file and the flags of the command line become one [`Config`].
//!
//! ```text
//!  config.toml --serde--+
//!                       +--> Options (what was written) --resolve--> Config (complete, checked)
//!  --device, --blk  ----+
//! ```
//! Both forms pass through the same [`Options`], so they cannot drift apart: a flag's `key=value` list is read as a
//! one-table TOML document. A [`Config`] holds no default to be guessed and no contradiction that can be seen without
//! the machine: every name resolves, no namespace is served writable beside another disk, no socket is named twice.
//! Whether a core is online, a socket free or an image file readable is not known here.
//!
//! Start at [`Options::resolve`].
#![forbid(unsafe_code)]

mod admin;
mod options;
mod values;

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use nvme_driver::vfio::pci::PciAddress;

use crate::scsi::Initiator;
use values::{DeviceName, Kind, Switch};

pub use admin::{AdminAnswer, AdminRequest, LunAddress, LunInfo, MAX_REQUEST};
pub use nvme_driver::vfio::Isolation;
pub(crate) use options::split_at_commas;
pub use options::{
    BlkOptions, DeviceOptions, MediumKind, Options, ScsiOptions, ServerOptions, SpecError,
};
pub use values::{
    BlockSize, ByteSize, CoreId, CoreList, LogLevel, LunPlace, OnDeviceLoss, Polling, SocketPath,
    StatePath, ValueError,
};

/// Everything `tandem serve` was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// The controllers, in the order written. Never empty, names are unique.
    pub devices: Vec<DeviceConfig>,
    /// The disks, in the order written.
    pub disks: Vec<DiskConfig>,
    /// The SCSI hosts, in the order written. Never empty if there are no disks.
    pub hosts: Vec<HostConfig>,
    /// The cores that busy-poll. Never empty, none twice.
    pub cores: CoreList,
    /// Whether those cores sleep while nothing happens.
    pub poll: Polling,
    /// The directory where reservations are kept over restarts.
    pub state: Option<PathBuf>,
    /// The socket where the server tells programs of itself.
    pub stats: Option<PathBuf>,
    /// The socket where it is told to change.
    pub admin: Option<PathBuf>,
    pub log: LogLevel,
}

/// One NVMe controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceConfig {
    /// How disks and log lines call it: `d0`, `d1`, ... unless named.
    pub name: String,
    pub controller: ControllerConfig,
    pub on_device_loss: OnDeviceLoss,
    /// What must stand between a real SSD and memory.
    pub isolation: Isolation,
}

/// Where a controller comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ControllerConfig {
    /// Real hardware, bound to vfio-pci.
    Pci(PciTarget),
    /// Software, in this process.
    Model(ModelConfig),
}

/// Which SSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PciTarget {
    Address(PciAddress),
    /// Identify Controller SN.
    Serial(String),
}

impl fmt::Display for PciTarget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Address(address) => write!(f, "pci:{address}"),
            Self::Serial(serial) => write!(f, "pci:serial={serial}"),
        }
    }
}

/// The embedded software controller: what its registers and Identify pages will say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ModelConfig {
    pub medium: Medium,
    pub block_size: BlockSize,
    /// The medium is divided among them in equal parts; NSIDs are 1 to this.
    pub namespaces: u32,
    /// I/O queue pairs that it grants.
    pub queue_pairs: u16,
    /// Largest queue, in entries: CAP.MQES is one less.
    pub max_queue_entries: u32,
    /// Largest transfer of one command in bytes; `None` is no limit.
    pub max_transfer: Option<u64>,
    /// Identify VWC: whether Flush has something to do.
    pub volatile_write_cache: bool,
    /// Each command completes `latency` plus up to `jitter` after its doorbell.
    pub latency: Duration,
    pub jitter: Duration,
    /// Identify Controller SN: at most 20 printable ASCII bytes.
    pub serial: String,
}

/// Where the embedded controller keeps its blocks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Medium {
    /// Zeroes at start, gone at exit.
    Ram { size: u64 },
    /// An image file. With `size` it is created when absent and extended when shorter; without, it must exist.
    File { path: PathBuf, size: Option<u64> },
    /// Nothing is kept, and no data is moved: for measuring everything else.
    Null { size: u64 },
}

impl Medium {
    /// Whether what is written can be read back.
    #[must_use]
    pub fn keeps_data(&self) -> bool {
        !matches!(self, Self::Null { .. })
    }
}

/// One vhost-user-blk disk: a socket, and the namespace behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskConfig {
    pub socket: Socket,
    /// Most virtqueues a front-end may use: 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Index into [`Config::devices`].
    pub device: usize,
    /// 1 to the device's namespace count.
    pub nsid: u32,
    pub readonly: bool,
    /// What GET_ID answers: at most 20 printable ASCII bytes. `<device>-ns<nsid>` unless given.
    pub serial: String,
}

/// One vhost-user-scsi host: a socket, and the namespaces behind it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostConfig {
    pub socket: Socket,
    /// Most request queues a front-end may use: 1 to [`MAX_QUEUES`].
    pub queues: u16,
    /// Index into [`Config::devices`]: of logical units that name none.
    pub device: usize,
    pub readonly: bool,
    /// Never empty; no place twice, no namespace twice.
    pub luns: Vec<HostLun>,
    /// Who its guest is. No two of a namespace's hosts have the same.
    pub initiator: Initiator,
    /// It was named, and not made up from the socket: what its guest shares with others it shares on purpose.
    pub named: bool,
}

/// A logical unit of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostLun {
    /// The target's identifier.
    pub target: u8,
    /// 0 to 16383.
    pub lun: u16,
    /// Index into [`Config::devices`].
    pub device: usize,
    /// 1 to the device's namespace count.
    pub nsid: u32,
}

impl HostConfig {
    /// The devices of its logical units beside its own, in the order written.
    #[must_use]
    pub fn other_devices(&self) -> Vec<usize> {
        let mut others = Vec::new();
        for lun in &self.luns {
            if lun.device != self.device && !others.contains(&lun.device) {
                others.push(lun.device);
            }
        }
        others
    }
}

/// Where a front-end connects.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Socket {
    /// Created by us, and removed at exit.
    Path(PathBuf),
    /// Inherited, already listening (systemd activation, a test harness).
    Fd(i32),
}

impl fmt::Display for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => path.display().fmt(f),
            Self::Fd(fd) => write!(f, "fd {fd}"),
        }
    }
}

/// Most virtqueues of one disk: one bit each in the masks of the control path.
pub const MAX_QUEUES: u32 = 64;
/// `sun_path` is 108 bytes and the kernel wants a terminator to bind by name.
pub const MAX_SOCKET_PATH: usize = 107;
/// Identify Controller SN and VIRTIO_BLK_T_GET_ID are both 20 bytes.
pub const MAX_SERIAL: usize = 20;
/// `<name>-ns<nsid>` and `tandem-<name>` then always fit [`MAX_SERIAL`].
pub const MAX_DEVICE_NAME: usize = 13;
/// The highest LUN that flat addressing has (SAM-5, 4.7.7.3).
const MAX_LUN: u16 = 16383;
/// One Active Namespace ID list page holds this many.
pub const MAX_NAMESPACES: u32 = 1024;

/// Why the request makes no sense, before any machine was touched.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read configuration {}: {source}", path.display())]
    Read {
        path: PathBuf,
        source: std::io::Error,
    },
    /// Syntax, unknown fields and single values that are out of range: everything a line can be blamed for.
    #[error("{}:{line}: {message}\n  {line} | {text}", path.display())]
    File {
        path: PathBuf,
        line: usize,
        message: String,
        text: String,
    },
    #[error(
        "no device: describe at least one NVMe controller, for example --device model:ram,size=1G or a [[device]] table"
    )]
    NoDevice,
    #[error(
        "no disk: describe at least one, for example --blk path=/run/tandem/vm0.sock,queues=4 or a [[blk]] table, or a host \
         with --scsi path=/run/tandem/vm0.sock,lun=0:0:ns1"
    )]
    NoDisk,
    #[error(
        "no cores to poll on: name them, for example --cores 0-3,5 or cores = \"0-3,5\" in [server]"
    )]
    NoCores,
    #[error("state={} keeps the reservations of SCSI hosts, and there is none: drop it", path.display())]
    StrayState { path: PathBuf },
    #[error("device {name} is described twice: give each a name=... of its own")]
    DuplicateDevice { name: String },
    #[error("devices {first} and {second} are one SSD, {target}: describe it once")]
    SharedController {
        first: String,
        second: String,
        target: PciTarget,
    },
    #[error("device {device}: {key}=... means nothing {place}: drop it")]
    StrayKey {
        device: String,
        key: &'static str,
        place: &'static str,
    },
    #[error(
        "--unsafe-noiommu lets real SSDs do without an IOMMU, and there is no --device pci:...: drop it"
    )]
    NothingUnsafe,
    #[error(
        "device {device}: say which SSD it is with address=0000:5e:00.0 (tandem list shows them) or serial=..., one of both"
    )]
    PciChoice { device: String },
    #[error(
        "device {device}: the embedded controller needs medium = \"ram\", \"file\" or \"null\""
    )]
    NoMedium { device: String },
    #[error("device {device}: {medium} needs {key}=..., for example {example}")]
    MissingKey {
        device: String,
        medium: MediumKind,
        key: &'static str,
        example: &'static str,
    },
    #[error("device {device}: {medium} has no path (got {}): drop it, or use model:file", path.display())]
    StrayPath {
        device: String,
        medium: MediumKind,
        path: PathBuf,
    },
    #[error("devices {first} and {second} would both write image {}: give each its own file", path.display())]
    SharedImage {
        first: String,
        second: String,
        path: PathBuf,
    },
    #[error(
        "device {device}: size {size} does not divide into {namespaces} namespace(s) of whole {block_size}-byte blocks: \
         make it a multiple of {unit} bytes"
    )]
    UnevenSize {
        device: String,
        size: ByteSize,
        namespaces: u32,
        block_size: BlockSize,
        unit: u64,
    },
    #[error(
        "device {device}: a transfer limit of {mdts} cannot be expressed: MDTS is a power of two of at least 8K, or 0 for \
         no limit"
    )]
    TransferLimit { device: String, mdts: ByteSize },
    #[error(
        "a disk needs either path=... (a socket to create) or fd=... (one already listening): {found}"
    )]
    SocketChoice { found: &'static str },
    #[error("socket {socket} is given to two disks or hosts: each needs its own")]
    DuplicateSocket { socket: Socket },
    #[error("disk {disk}: there is no device {device} (devices: {known})")]
    UnknownDevice {
        disk: Socket,
        device: String,
        known: String,
    },
    #[error("disk {disk}: say which device it is on with device=... (devices: {known})")]
    AmbiguousDevice { disk: Socket, known: String },
    #[error("disk {disk}: device {device} has namespaces 1 to {namespaces}, not {nsid}")]
    UnknownNamespace {
        disk: Socket,
        device: String,
        namespaces: u32,
        nsid: u32,
    },
    #[error("host {host}: no logical unit: name at least one, for example lun=0:0:ns1")]
    NoLun { host: Socket },
    #[error("host {host}: target {target} has LUN {lun} twice: give each a place of its own")]
    DuplicateLun { host: Socket, target: u8, lun: u16 },
    #[error(
        "namespace {nsid} of device {device} would be served by {first} and by {second}, of which {writable} writable: \
         two guests would destroy each other's file system; make both readonly=on or use another ns=. SCSI hosts whose \
         guests know of each other share it when each is given a name with initiator=..."
    )]
    SharedNamespace {
        device: String,
        nsid: u32,
        first: Socket,
        second: Socket,
        writable: &'static str,
    },
    #[error(
        "namespace {nsid} of device {device} would be served twice to initiator {initiator}, by {first} and by {second}: \
         reservations could not tell the two apart; give each host a name of its own with initiator=..., or use another \
         namespace"
    )]
    SharedInitiator {
        device: String,
        nsid: u32,
        initiator: Initiator,
        first: Socket,
        second: Socket,
    },
}

impl Options {
    /// Fills in the defaults and refuses contradictions.
    pub fn resolve(self) -> Result<Config, ConfigError> {
        let devices = resolve_devices(self.device)?;
        if devices.is_empty() {
            return Err(ConfigError::NoDevice);
        }
        if self.blk.is_empty() && self.scsi.is_empty() {
            return Err(ConfigError::NoDisk);
        }
        let disks = self.blk.into_iter();
        let disks = disks.map(|options| resolve_disk(options, &devices));
        let disks = disks.collect::<Result<Vec<DiskConfig>, ConfigError>>()?;
        let hosts = self.scsi.into_iter();
        let hosts = hosts.map(|options| resolve_host(options, &devices));
        let hosts = hosts.collect::<Result<Vec<HostConfig>, ConfigError>>()?;
        let stats = self.server.stats.map(|socket| socket.0);
        let admin = self.server.admin.map(|socket| socket.0);
        check_sockets(&disks, &hosts, stats.iter().chain(&admin))?;
        let of_disks = disks.iter().map(Use::of_disk);
        let of_hosts = hosts.iter().flat_map(Use::of_host);
        let uses: Vec<Use<'_>> = of_disks.chain(of_hosts).collect();
        check_uses(&uses, |device| devices[device].name.clone())?;
        if let (Some(state), true) = (&self.server.state, hosts.is_empty()) {
            let path = state.0.clone();
            return Err(ConfigError::StrayState { path });
        }
        Ok(Config {
            devices,
            disks,
            hosts,
            cores: self.server.cores.ok_or(ConfigError::NoCores)?,
            poll: self.server.poll.unwrap_or_default(),
            state: self.server.state.map(|directory| directory.0),
            stats,
            admin,
            log: self.server.log.unwrap_or_default(),
        })
    }
}

impl DeviceOptions {
    /// The device alone, as `tandem identify` needs it; called `d0` unless it was named.
    pub fn resolve_alone(self) -> Result<DeviceConfig, ConfigError> {
        resolve_device(self, 0)
    }
}

fn resolve_devices(options: Vec<DeviceOptions>) -> Result<Vec<DeviceConfig>, ConfigError> {
    let mut devices: Vec<DeviceConfig> = Vec::with_capacity(options.len());
    for (index, options) in options.into_iter().enumerate() {
        let device = resolve_device(options, index)?;
        for earlier in &devices {
            if earlier.name == device.name {
                return Err(ConfigError::DuplicateDevice { name: device.name });
            }
            check_controllers(earlier, &device)?;
        }
        devices.push(device);
    }
    Ok(devices)
}

fn check_controllers(first: &DeviceConfig, second: &DeviceConfig) -> Result<(), ConfigError> {
    let names = || (first.name.clone(), second.name.clone());
    match (&first.controller, &second.controller) {
        (ControllerConfig::Pci(target), ControllerConfig::Pci(other)) if target == other => {
            let (first, second) = names();
            let target = target.clone();
            Err(ConfigError::SharedController {
                first,
                second,
                target,
            })
        }
        (ControllerConfig::Model(one), ControllerConfig::Model(other)) => {
            match (&one.medium, &other.medium) {
                (Medium::File { path: other, .. }, Medium::File { path, .. }) if path == other => {
                    let (first, second) = names();
                    let path = path.clone();
                    Err(ConfigError::SharedImage {
                        first,
                        second,
                        path,
                    })
                }
                _ => Ok(()),
            }
        }
        _ => Ok(()),
    }
}

fn resolve_device(options: DeviceOptions, index: usize) -> Result<DeviceConfig, ConfigError> {
    let name = options
        .name
        .clone()
        .map_or_else(|| format!("d{index}"), |name| name.0);
    let on_device_loss = options.on_device_loss.unwrap_or_default();
    let isolation = match options.unsafe_noiommu {
        Some(Switch(true)) => Isolation::UnsafeNone,
        _ => Isolation::Iommu,
    };
    let controller = match options.kind {
        Kind::Pci => ControllerConfig::Pci(resolve_pci(options, &name)?),
        Kind::Model => ControllerConfig::Model(resolve_model(options, &name)?),
    };
    Ok(DeviceConfig {
        name,
        controller,
        on_device_loss,
        isolation,
    })
}

fn resolve_pci(options: DeviceOptions, device: &str) -> Result<PciTarget, ConfigError> {
    let of_the_model = [
        ("medium", options.medium.is_some()),
        ("path", options.path.is_some()),
        ("size", options.size.is_some()),
        ("block", options.block.is_some()),
        ("namespaces", options.namespaces.is_some()),
        ("queues", options.queues.is_some()),
        ("mqes", options.mqes.is_some()),
        ("mdts", options.mdts.is_some()),
        ("vwc", options.vwc.is_some()),
        ("latency", options.latency.is_some()),
        ("jitter", options.jitter.is_some()),
    ];
    if let Some((key, _)) = of_the_model.into_iter().find(|(_, given)| *given) {
        let place = "for a real SSD, which says this itself";
        return Err(ConfigError::StrayKey {
            device: device.to_owned(),
            key,
            place,
        });
    }
    match (options.address, options.serial) {
        (Some(address), None) => Ok(PciTarget::Address(address.0)),
        (None, Some(serial)) => Ok(PciTarget::Serial(serial.0)),
        _ => Err(ConfigError::PciChoice {
            device: device.to_owned(),
        }),
    }
}

fn resolve_model(options: DeviceOptions, name: &str) -> Result<ModelConfig, ConfigError> {
    let name = name.to_owned();
    if options.address.is_some() {
        let place = "for the embedded controller, which is on no bus";
        return Err(ConfigError::StrayKey {
            device: name,
            key: "address",
            place,
        });
    }
    if options.unsafe_noiommu.is_some() {
        let place = "for the embedded controller, which checks every address itself";
        return Err(ConfigError::StrayKey {
            device: name,
            key: "unsafe_noiommu",
            place,
        });
    }
    let kind = options.medium.ok_or_else(|| ConfigError::NoMedium {
        device: name.clone(),
    })?;
    let block_size = options.block.unwrap_or_default();
    let namespaces = options.namespaces.map_or(1, |count| count.0);
    let missing = |key, example| ConfigError::MissingKey {
        device: name.clone(),
        medium: kind,
        key,
        example,
    };
    let medium = match (kind, options.path) {
        (MediumKind::Ram, None) => Medium::Ram {
            size: options.size.ok_or_else(|| missing("size", "size=1G"))?.0,
        },
        (MediumKind::Null, None) => Medium::Null {
            size: options.size.ok_or_else(|| missing("size", "size=1T"))?.0,
        },
        (MediumKind::Ram | MediumKind::Null, Some(path)) => {
            return Err(ConfigError::StrayPath {
                device: name,
                medium: kind,
                path: path.0,
            });
        }
        (MediumKind::File, Some(path)) => Medium::File {
            path: path.0,
            size: options.size.map(|size| size.0),
        },
        (MediumKind::File, None) => return Err(missing("path", "path=disk.img")),
    };
    if let Some(size) = options.size {
        let unit = u64::from(namespaces) * u64::from(block_size.bytes());
        if size.0 == 0 || !size.0.is_multiple_of(unit) {
            return Err(ConfigError::UnevenSize {
                device: name,
                size,
                namespaces,
                block_size,
                unit,
            });
        }
    }
    // MDTS counts in powers of two of the 4 KiB page, and its zero is taken by "no limit".
    let mdts = options.mdts.unwrap_or(ByteSize(128 << 10));
    if mdts.0 != 0 && (!mdts.0.is_power_of_two() || mdts.0 < 8 << 10) {
        return Err(ConfigError::TransferLimit { device: name, mdts });
    }
    Ok(ModelConfig {
        medium,
        block_size,
        namespaces,
        queue_pairs: options.queues.map_or(64, |count| count.0),
        max_queue_entries: options.mqes.map_or(1024, |entries| entries.0),
        max_transfer: (mdts.0 != 0).then_some(mdts.0),
        volatile_write_cache: options.vwc.is_none_or(|vwc| vwc.0),
        latency: options.latency.map_or(Duration::ZERO, |latency| latency.0),
        jitter: options.jitter.map_or(Duration::ZERO, |jitter| jitter.0),
        serial: options
            .serial
            .map_or_else(|| format!("tandem-{name}"), |serial| serial.0),
    })
}

fn resolve_socket(path: Option<SocketPath>, fd: Option<i32>) -> Result<Socket, ConfigError> {
    let found = match (path, fd) {
        (Some(path), None) => return Ok(Socket::Path(path.0)),
        (None, Some(fd)) => return Ok(Socket::Fd(fd)),
        (Some(_), Some(_)) => "this one has both",
        (None, None) => "this one has neither",
    };
    Err(ConfigError::SocketChoice { found })
}

/// Which device a disk is on.
fn resolve_place(
    device: Option<DeviceName>,
    socket: &Socket,
    devices: &[DeviceConfig],
) -> Result<usize, ConfigError> {
    let known = || {
        devices
            .iter()
            .map(|device| device.name.as_str())
            .collect::<Vec<_>>()
            .join(", ")
    };
    match device {
        Some(name) => devices
            .iter()
            .position(|device| device.name == name.0)
            .ok_or_else(|| ConfigError::UnknownDevice {
                disk: socket.clone(),
                device: name.0.clone(),
                known: known(),
            }),
        None if devices.len() == 1 => Ok(0),
        None => Err(ConfigError::AmbiguousDevice {
            disk: socket.clone(),
            known: known(),
        }),
    }
}

fn check_namespace(nsid: u32, socket: &Socket, device: &DeviceConfig) -> Result<(), ConfigError> {
    // What a real SSD has shows when it is claimed.
    match &device.controller {
        ControllerConfig::Model(model) if nsid > model.namespaces => {
            Err(ConfigError::UnknownNamespace {
                disk: socket.clone(),
                device: device.name.clone(),
                namespaces: model.namespaces,
                nsid,
            })
        }
        _ => Ok(()),
    }
}

fn resolve_disk(options: BlkOptions, devices: &[DeviceConfig]) -> Result<DiskConfig, ConfigError> {
    let socket = resolve_socket(options.path, options.fd.map(|fd| fd.0))?;
    let index = resolve_place(options.device, &socket, devices)?;
    let device = &devices[index];
    let nsid = options.ns.map_or(1, |nsid| nsid.0);
    check_namespace(nsid, &socket, device)?;
    Ok(DiskConfig {
        socket,
        queues: options.queues.map_or(1, |count| count.0),
        device: index,
        nsid,
        readonly: options.readonly.is_some_and(|readonly| readonly.0),
        serial: options
            .serial
            .map_or_else(|| format!("{}-ns{nsid}", device.name), |serial| serial.0),
    })
}

fn resolve_host(options: ScsiOptions, devices: &[DeviceConfig]) -> Result<HostConfig, ConfigError> {
    let socket = resolve_socket(options.path, options.fd.map(|fd| fd.0))?;
    // Those that name their device need no other one.
    let first = options.lun.first().and_then(|place| place.device.clone());
    let all_named = options.lun.iter().all(|place| place.device.is_some());
    let device = match options.device {
        None if all_named => first.map(DeviceName),
        device => device,
    };
    let index = resolve_place(device, &socket, devices)?;
    let mut luns: Vec<HostLun> = Vec::with_capacity(options.lun.len());
    for place in options.lun {
        let LunPlace {
            target,
            lun,
            device,
            nsid,
        } = place;
        let device = match device {
            Some(name) => resolve_place(Some(DeviceName(name)), &socket, devices)?,
            None => index,
        };
        check_namespace(nsid, &socket, &devices[device])?;
        if luns
            .iter()
            .any(|earlier| (earlier.target, earlier.lun) == (target, lun))
        {
            return Err(ConfigError::DuplicateLun {
                host: socket,
                target,
                lun,
            });
        }
        luns.push(HostLun {
            target,
            lun,
            device,
            nsid,
        });
    }
    if luns.is_empty() {
        return Err(ConfigError::NoLun { host: socket });
    }
    let named = options.initiator.is_some();
    let initiator = match options.initiator {
        Some(name) => name.0,
        None => Initiator::of_socket(&socket.to_string()),
    };
    Ok(HostConfig {
        initiator,
        named,
        socket,
        queues: options.queues.map_or(1, |count| count.0),
        device: index,
        readonly: options.readonly.is_some_and(|readonly| readonly.0),
        luns,
    })
}

fn check_sockets<'a>(
    disks: &[DiskConfig],
    hosts: &[HostConfig],
    more: impl Iterator<Item = &'a PathBuf>,
) -> Result<(), ConfigError> {
    let sockets = disks.iter().map(|disk| &disk.socket);
    let sockets: Vec<Socket> = sockets
        .chain(hosts.iter().map(|host| &host.socket))
        .cloned()
        .chain(more.cloned().map(Socket::Path))
        .collect();
    for (at, socket) in sockets.iter().enumerate() {
        if sockets[..at].contains(socket) {
            let socket = socket.clone();
            return Err(ConfigError::DuplicateSocket { socket });
        }
    }
    Ok(())
}

/// A namespace that is served.
#[derive(Clone, Copy, Debug)]
pub struct Use<'a> {
    pub socket: &'a Socket,
    /// Index of its device.
    pub device: usize,
    pub nsid: u32,
    pub readonly: bool,
    /// Of a SCSI host: who it is for.
    pub initiator: Option<&'a Initiator>,
    /// And whether the configuration says so.
    pub named: bool,
}

impl<'a> Use<'a> {
    fn of_disk(disk: &'a DiskConfig) -> Use<'a> {
        Use {
            socket: &disk.socket,
            device: disk.device,
            nsid: disk.nsid,
            readonly: disk.readonly,
            initiator: None,
            named: false,
        }
    }

    fn of_host(host: &'a HostConfig) -> impl Iterator<Item = Use<'a>> {
        host.luns.iter().map(|place| Use {
            socket: &host.socket,
            device: place.device,
            nsid: place.nsid,
            readonly: host.readonly,
            initiator: Some(&host.initiator),
            named: host.named,
        })
    }
}

/// What one may write, no other may even read: except guests that can reserve it.
///
/// # Errors
/// [`ConfigError::SharedInitiator`] and [`ConfigError::SharedNamespace`].
pub fn check_uses(
    uses: &[Use<'_>],
    device_name: impl Fn(usize) -> String,
) -> Result<(), ConfigError> {
    for (at, second) in uses.iter().enumerate() {
        let same = |first: &&Use<'_>| first.device == second.device && first.nsid == second.nsid;
        for first in uses[..at].iter().filter(same) {
            let itself = first.socket == second.socket;
            let reserved = first.named && second.named && !itself;
            let read = first.readonly && second.readonly;
            if let Some(initiator) = first.initiator
                && Some(initiator) == second.initiator
                && (reserved || read)
            {
                return Err(ConfigError::SharedInitiator {
                    device: device_name(second.device),
                    nsid: second.nsid,
                    initiator: initiator.clone(),
                    first: first.socket.clone(),
                    second: second.socket.clone(),
                });
            }
            let writable = match (first.readonly, second.readonly) {
                (true, true) => continue,
                _ if reserved => continue,
                (false, false) => "both are",
                (false, true) => "the first is",
                (true, false) => "the second is",
            };
            return Err(ConfigError::SharedNamespace {
                device: device_name(second.device),
                nsid: second.nsid,
                first: first.socket.clone(),
                second: second.socket.clone(),
                writable,
            });
        }
    }
    Ok(())
}
