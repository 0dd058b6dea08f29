//! The command line as clap sees it: `tandem serve`, `lun`, `device`, `bench`, `identify`, `list` and `setup-vfio`.
//!
//! It names flags and documents them; what a flag's value means, and what is refused, is in [`crate::config`]. A file
//! comes first and flags come on top: `--device`, `--blk` and `--scsi` add to it, `--cores`, `--poll`, `--state`, `--stats`, `--admin` and `--log`
//! replace what it says.
//! clap ends the process with code 2 on a bad flag; so does `main` on a [`ConfigError`].

use std::path::{Path, PathBuf};

use clap::{Args, Parser, Subcommand};

use crate::bench::args::BenchArgs;
use crate::config::{
    AdminRequest, BlkOptions, ByteSize, Config, ConfigError, CoreList, DeviceConfig, DeviceOptions,
    LogLevel, LunAddress, LunPlace, Options, Polling, ScsiOptions, SocketPath, StatePath,
};
use crate::host::command::{ListArgs, SetupArgs};

/// A polled-mode userspace storage server: each virtqueue of a guest's disk rides in tandem with one NVMe queue pair.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, propagate_version = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve disks to virtual machines until SIGTERM
    Serve(ServeArgs),
    /// Add a logical unit to a SCSI host of a running server, take one away, or list them
    #[command(subcommand)]
    Lun(LunCommand),
    /// Have guests follow the sizes of a running server's namespaces, or make one larger
    #[command(subcommand)]
    Device(DeviceCommand),
    /// Measure latency and IOPS of SSDs, vhost-user-blk servers and files, in fio's words
    Bench(Box<BenchArgs>),
    /// Print what a controller says of itself and of its namespaces
    Identify(IdentifyArgs),
    /// Show this machine's SSDs, and what Tandem would do with each
    List(ListArgs),
    /// Hand SSDs to vfio-pci and back, and reserve huge pages; refuses what is in use
    SetupVfio(SetupArgs),
}

#[derive(Clone, Debug, Args)]
#[command(after_help = SERVE_HELP)]
pub struct ServeArgs {
    /// TOML file; flags come on top of it
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// An NVMe controller: pci:0000:5e:00.0, model:ram,size=1G, model:file,path=disk.img or model:null,size=1T (repeatable)
    #[arg(long, value_name = "SPEC")]
    pub device: Vec<DeviceOptions>,
    /// A vhost-user-blk disk: path=/run/tandem/vm0.sock,queues=4 (repeatable)
    #[arg(long, value_name = "SPEC")]
    pub blk: Vec<BlkOptions>,
    /// A vhost-user-scsi host: path=/run/tandem/vm0.sock,queues=4,lun=0:0:ns1,lun=1:0:ns2 (repeatable)
    #[arg(long, value_name = "SPEC")]
    pub scsi: Vec<ScsiOptions>,
    /// Cores that poll, each fully used from start to end (but see --poll): 0-3,5
    #[arg(long, value_name = "LIST")]
    pub cores: Option<CoreList>,
    /// always, or adaptive: cores sleep while nothing happens, and the first request after that takes longer
    /// [default: always]
    #[arg(long, value_name = "MODE")]
    pub poll: Option<Polling>,
    /// Directory where persistent reservations of SCSI hosts are kept over restarts; without it they end with the process
    #[arg(long, value_name = "DIR")]
    pub state: Option<StatePath>,
    /// Socket where programs read the counters of every virtqueue: one JSON document for each connection
    #[arg(long, value_name = "PATH")]
    pub stats: Option<SocketPath>,
    /// Socket, for its owner alone, where logical units are added and taken away and namespaces get other sizes: see `tandem
    /// lun` and `tandem device`
    #[arg(long, value_name = "PATH")]
    pub admin: Option<SocketPath>,
    /// Serve real SSDs also without an IOMMU: any fault of one may then change all memory of this machine
    #[arg(long)]
    pub unsafe_noiommu: bool,
    /// Print the plan (which core polls which queue) and touch nothing
    #[arg(long)]
    pub dry_run: bool,
    /// error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL")]
    pub log: Option<LogLevel>,
}

#[derive(Clone, Debug, Subcommand)]
pub enum LunCommand {
    /// Show a namespace at a target and a LUN; the guest finds it by itself
    Add {
        #[command(flatten)]
        server: AdminArgs,
        /// The host's socket, as the server was given it
        #[arg(value_name = "HOST")]
        path: String,
        /// TARGET:LUN:nsN or TARGET:LUN:DEVICE:nsN, such as 3:0:ns2
        #[arg(value_name = "PLACE")]
        lun: LunPlace,
    },
    /// Take a logical unit away, and wait until its last command has ended; unmount it in the guest first
    Remove {
        #[command(flatten)]
        server: AdminArgs,
        /// The host's socket, as the server was given it
        #[arg(value_name = "HOST")]
        path: String,
        /// TARGET:LUN, such as 3:0
        #[arg(value_name = "ADDRESS")]
        lun: LunAddress,
    },
    /// Show the logical units of all hosts
    List {
        #[command(flatten)]
        server: AdminArgs,
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub enum DeviceCommand {
    /// Look how large the namespaces are; guests are told what is different. SSDs that say so themselves need it not
    Rescan {
        #[command(flatten)]
        server: AdminArgs,
        /// Its name in the configuration
        #[arg(value_name = "DEVICE")]
        device: String,
    },
    /// Make the namespace of an embedded controller larger, its image file too; guests are told
    Resize {
        #[command(flatten)]
        server: AdminArgs,
        /// Its name in the configuration
        #[arg(value_name = "DEVICE")]
        device: String,
        /// The namespace's identifier
        #[arg(value_name = "NSID")]
        namespace: u32,
        /// What it is to have, such as 2G
        #[arg(value_name = "SIZE")]
        size: ByteSize,
    },
}

impl DeviceCommand {
    /// Whom to ask, and for what.
    pub fn request(&self) -> (&Path, AdminRequest) {
        match self {
            DeviceCommand::Rescan { server, device } => {
                let device = device.clone();
                (&server.admin, AdminRequest::DeviceRescan { device })
            }
            DeviceCommand::Resize {
                server,
                device,
                namespace,
                size,
            } => {
                let (device, namespace, size) = (device.clone(), *namespace, *size);
                let request = AdminRequest::DeviceResize {
                    device,
                    namespace,
                    size,
                };
                (&server.admin, request)
            }
        }
    }
}

#[derive(Clone, Debug, Args)]
pub struct AdminArgs {
    /// The server's --admin socket
    #[arg(long, value_name = "PATH")]
    pub admin: PathBuf,
}

impl LunCommand {
    /// Whom to ask, for what, and whether the answer is for a program.
    pub fn request(&self) -> (&Path, AdminRequest, bool) {
        match self {
            LunCommand::Add { server, path, lun } => {
                let (path, lun) = (path.clone(), lun.clone());
                (&server.admin, AdminRequest::LunAdd { path, lun }, false)
            }
            LunCommand::Remove { server, path, lun } => {
                let (path, lun) = (path.clone(), *lun);
                (&server.admin, AdminRequest::LunRemove { path, lun }, false)
            }
            LunCommand::List { server, json } => (&server.admin, AdminRequest::Luns {}, *json),
        }
    }
}

#[derive(Clone, Debug, Args)]
#[command(after_help = DEVICE_HELP)]
pub struct IdentifyArgs {
    /// An NVMe controller: pci:0000:5e:00.0, model:ram,size=1G, model:file,path=disk.img or model:null,size=1T
    #[arg(long, value_name = "SPEC")]
    pub device: DeviceOptions,
    /// Also without an IOMMU: any fault of the SSD may then change all memory of this machine
    #[arg(long)]
    pub unsafe_noiommu: bool,
    /// Print JSON instead of text
    #[arg(long)]
    pub json: bool,
}

impl IdentifyArgs {
    /// The device, complete.
    pub fn config(&self) -> Result<DeviceConfig, ConfigError> {
        let mut device = self.device.clone();
        if self.unsafe_noiommu {
            DeviceOptions::allow_noiommu(std::slice::from_mut(&mut device))?;
        }
        device.resolve_alone()
    }
}

impl ServeArgs {
    /// The file, then the flags, then the defaults.
    pub fn config(&self) -> Result<Config, ConfigError> {
        let mut options = match &self.config {
            Some(path) => Options::read(path)?,
            None => Options::default(),
        };
        options.device.extend_from_slice(&self.device);
        options.blk.extend_from_slice(&self.blk);
        options.scsi.extend_from_slice(&self.scsi);
        if self.unsafe_noiommu {
            DeviceOptions::allow_noiommu(&mut options.device)?;
        }
        options.server.cores = self.cores.clone().or(options.server.cores);
        options.server.poll = self.poll.or(options.server.poll);
        options.server.state = self.state.clone().or(options.server.state);
        options.server.stats = self.stats.clone().or(options.server.stats);
        options.server.admin = self.admin.clone().or(options.server.admin);
        options.server.log = self.log.or(options.server.log);
        options.resolve()
    }
}

macro_rules! device_help {
    () => {
        "\
A --device is pci:0000:5e:00.0 (or 5e:00.0), pci:serial=TEXT, model:ram, model:file
or model:null, which keeps nothing and moves no data: for measuring the rest.
Keys of each (a comma within a value is written ,,):
  name=d0           what disks call it                        [d0, d1, ... in order]
  on_device_loss=error|hold
                    while it is gone, requests fail or wait   [error]
Keys of pci:
  address=ADDRESS   as lspci writes it, or
  serial=TEXT       the one with this serial number; it must be bound to vfio-pci
  unsafe_noiommu=on|off
                    served also without an IOMMU, at the risk of all memory [off]
Keys of model:
  size=1G           capacity, shared equally by the namespaces; an image file is
                    created when absent and extended when shorter
  path=disk.img     the image file (model:file only)
  block=512|4096    logical block size                        [512]
  namespaces=N      1 to 1024                                 [1]
  queues=N          I/O queue pairs that it grants            [64]
  mqes=N            largest queue in entries, 2 to 65536      [1024]
  mdts=128K         largest transfer per command, 0: no limit [128K]
  vwc=on|off        has a volatile write cache                [on]
  latency=10us      added to each command (ns, us, ms, s)     [0]
  jitter=5us        and up to this much more                  [0]
  serial=TEXT       controller serial, 20 characters at most  [tandem-NAME]"
    };
}

const DEVICE_HELP: &str = device_help!();
const SERVE_HELP: &str = concat!(
    device_help!(),
    "

Keys of --blk:
  path=SOCKET       Unix socket to create, or fd=N: one inherited and listening
  queues=N          virtqueues, 1 to 64                       [1]
  device=NAME       needed when there are several devices
  ns=N              namespace                                 [1]
  readonly=on|off   several disks may share a namespace if all are read-only [off]
  serial=TEXT       what the guest sees, 20 characters        [NAME-nsN]

Keys of --scsi:
  path=SOCKET       or fd=N, as of --blk
  queues=N          request queues, 1 to 64                   [1]
  device=NAME       needed when there are several devices
  lun=T:L:nsN       namespace N is LUN L of target T; once for each
  lun=T:L:DEV:nsN   the same of another device: each request queue has a queue
                    pair there too
  readonly=on|off   of all of them                            [off]
  initiator=NAME    who the guest is, for reservations: an iSCSI name, or one
                    that is made part of one. Hosts that are both given names
                    may share a namespace             [made from the socket]"
);

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::config::Isolation;

    fn serve(flags: &[&str]) -> Result<ServeArgs, clap::Error> {
        match Cli::try_parse_from(["tandem", "serve"].iter().chain(flags))?.command {
            Command::Serve(args) => Ok(args),
            other => panic!("serve was parsed as {other:?}"),
        }
    }

    #[test]
    fn clap_definitions_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn serve_with_unknown_key_names_flag_value_and_key_and_exits_2() {
        let error = serve(&["--device", "model:ram,sise=1G"]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with(
                "error: invalid value 'model:ram,sise=1G' for '--device <SPEC>': unknown field `sise`, expected one of \
                 `kind`, `medium`, `address`, `name`"
            ),
            "{text}"
        );
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn serve_with_file_and_flags_adds_disks_and_replaces_cores() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/config/two-vms.toml");
        let args = serve(&[
            "--config",
            file,
            "--device",
            "model:ram,size=4M,name=extra",
            "--blk",
            "fd=3,device=extra",
            "--cores",
            "7",
            "--log",
            "trace",
        ])
        .unwrap();
        let alone = serve(&["--config", file]).unwrap().config().unwrap();
        let both = args.config().unwrap();
        assert_eq!(both.devices[..alone.devices.len()], alone.devices);
        assert_eq!(
            both.devices.last().map(|device| device.name.as_str()),
            Some("extra")
        );
        assert_eq!(both.disks.len(), alone.disks.len() + 1);
        assert_eq!(both.cores.to_string(), "7");
        assert_eq!(both.log, LogLevel::Trace);
    }

    #[test]
    fn help_names_every_key_of_device_blk_and_scsi() {
        // serde lists the keys that it knows when it meets one that it does not.
        for (spec, help) in [
            (
                "model:ram,no-such-key=1"
                    .parse::<DeviceOptions>()
                    .unwrap_err(),
                DEVICE_HELP,
            ),
            (
                "no-such-key=1".parse::<BlkOptions>().unwrap_err(),
                SERVE_HELP,
            ),
            (
                "no-such-key=1".parse::<ScsiOptions>().unwrap_err(),
                SERVE_HELP,
            ),
        ] {
            let message = spec.to_string();
            let keys = message.split('`').skip(3).step_by(2);
            for key in keys.filter(|key| !["kind", "medium"].contains(key)) {
                assert!(
                    help.contains(&format!("{key}=")),
                    "--help does not explain {key}="
                );
            }
        }
    }

    #[test]
    fn unsafe_noiommu_is_for_every_real_ssd_and_for_nothing_else() {
        let isolation = |flags: &[&str]| {
            let args = serve(&[flags, &["--blk", "fd=3,device=d0", "--cores", "0"]].concat());
            let config = args.unwrap().config().map_err(|error| error.to_string());
            config.map(|config| {
                let devices = config.devices.iter();
                devices.map(|device| device.isolation).collect::<Vec<_>>()
            })
        };
        let (one, two) = ("pci:5e:00.0", "pci:5f:00.0,unsafe_noiommu=on");
        let model = "model:ram,size=1G";
        let (safe, not) = (Isolation::Iommu, Isolation::UnsafeNone);
        for (devices, flag, expected) in [
            ([one, two, model], false, [safe, not, safe]),
            ([one, two, model], true, [not, not, safe]),
        ] {
            let mut flags: Vec<&str> = devices.iter().flat_map(|spec| ["--device", spec]).collect();
            flags.extend(flag.then_some("--unsafe-noiommu"));
            assert_eq!(isolation(&flags).unwrap(), expected);
        }
        let error = isolation(&["--device", model, "--unsafe-noiommu"]).unwrap_err();
        assert!(error.contains("there is no --device pci:"), "{error}");
    }

    #[test]
    fn identify_takes_one_device_and_json() {
        let cli = Cli::try_parse_from([
            "tandem",
            "identify",
            "--device",
            "model:ram,size=1G",
            "--json",
        ])
        .unwrap();
        let Command::Identify(args) = cli.command else {
            panic!("identify was parsed as serve")
        };
        assert!(args.json);
        assert_eq!(args.config().unwrap().name, "d0");
    }
}
