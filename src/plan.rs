//! `Config` x `Topology` -> `Plan`: which core polls which virtqueue. A pure function; `--dry-run` prints its answer.
//!
//! What it promises: every virtqueue has exactly one core out of the configured ones, and those are all online; the
//! queues of one disk land on distinct cores while there are enough, and all cores carry the same number of queues, give
//! or take one. One limit comes first: a queue pair belongs to one core, so a device never has virtqueues on more cores
//! than it has queue pairs.
//!
//! What it does not know: how a machine is asked for its cores, and how many queue pairs a controller grants in the end;
//! it trusts the configured number.
//!
//! Start at [`plan`].
#![forbid(unsafe_code)]

use std::fmt;
use std::path::PathBuf;

use crate::config::{
    ByteSize, Config, ControllerConfig, CoreId, CoreList, DeviceConfig, HostLun, Isolation, Medium,
    Polling, Socket,
};
use crate::scsi::Initiator;

/// What the machine has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topology {
    /// The online cores that this process may run on.
    pub cores: Vec<Core>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Core {
    pub id: CoreId,
    pub numa_node: Option<usize>,
}

impl Topology {
    /// A machine whose NUMA nodes are not known.
    pub fn from_online_cores(ids: impl IntoIterator<Item = CoreId>) -> Self {
        Self {
            cores: ids
                .into_iter()
                .map(|id| Core {
                    id,
                    numa_node: None,
                })
                .collect(),
        }
    }
}

/// Everything that is decided before anything is touched.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    pub devices: Vec<DevicePlan>,
    pub disks: Vec<DiskPlan>,
    pub hosts: Vec<HostPlan>,
    /// The cores that get a reactor, in the order configured.
    pub cores: Vec<Core>,
    pub poll: Polling,
    /// Where reservations are kept over restarts.
    pub state: Option<PathBuf>,
    /// Where the server tells programs of itself.
    pub stats: Option<PathBuf>,
    /// Where it is told to change.
    pub admin: Option<PathBuf>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DevicePlan {
    pub config: DeviceConfig,
    /// Of all its disks and hosts together, control and event queues apart. Beyond the queue pairs that the controller grants, virtqueues of one core share one.
    pub virtqueues: usize,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskPlan {
    pub socket: Socket,
    /// Index into [`Plan::devices`].
    pub device: usize,
    pub nsid: u32,
    pub readonly: bool,
    pub serial: String,
    /// The core of each virtqueue: as many as the disk has queues.
    pub queue_cores: Vec<CoreId>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPlan {
    pub socket: Socket,
    /// Index into [`Plan::devices`].
    pub device: usize,
    /// The devices of its other logical units: each request queue has a queue pair there too, polled on the same core.
    pub others: Vec<usize>,
    pub readonly: bool,
    pub luns: Vec<HostLun>,
    /// Who its guest is.
    pub initiator: Initiator,
    /// The configuration says so.
    pub named: bool,
    /// The core of each request queue. The control and the event queue are polled where the first one is.
    pub queue_cores: Vec<CoreId>,
}

/// Why the request does not fit the machine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    #[error(
        "cannot poll on core {core}: it is not online for this process (available: {available}); change --cores"
    )]
    NoSuchCore { core: CoreId, available: CoreList },
    #[error(
        "host {host}: its logical units are on {devices}, which have no core in common with a queue pair of each: give the \
         devices more queue pairs, or the server fewer cores (--cores)"
    )]
    NoCommonCore { host: Socket, devices: String },
}

/// Assigns every virtqueue of every disk and host to a core.
pub fn plan(config: &Config, topology: &Topology) -> Result<Plan, PlanError> {
    let mut cores = Vec::with_capacity(config.cores.as_slice().len());
    for &core in config.cores.as_slice() {
        let online = topology.cores.iter().find(|online| online.id == core);
        cores.push(*online.ok_or_else(|| PlanError::NoSuchCore {
            core,
            available: topology.cores.iter().map(|online| online.id).collect(),
        })?);
    }
    let mut load = vec![0; cores.len()];
    let mut spreads: Vec<Spread> = config
        .devices
        .iter()
        .map(|device| Spread {
            limit: match &device.controller {
                ControllerConfig::Model(model) => model.queue_pairs.into(),
                // What it grants shows when it is claimed.
                ControllerConfig::Pci(_) => usize::MAX,
            },
            virtqueues: vec![0; cores.len()],
        })
        .collect();
    let disks = config
        .disks
        .iter()
        .map(|disk| DiskPlan {
            socket: disk.socket.clone(),
            device: disk.device,
            nsid: disk.nsid,
            readonly: disk.readonly,
            serial: disk.serial.clone(),
            queue_cores: place(disk.queues, &mut spreads, &[disk.device], &mut load)
                .into_iter()
                .map(|slot| cores[slot].id)
                .collect(),
        })
        .collect();
    let hosts = config.hosts.iter().map(|host| {
        let others = host.other_devices();
        let all: Vec<usize> = std::iter::once(host.device)
            .chain(others.iter().copied())
            .collect();
        let slots = place(host.queues, &mut spreads, &all, &mut load);
        if slots.len() < usize::from(host.queues) {
            let names = all.iter().map(|&device| &config.devices[device].name[..]);
            return Err(PlanError::NoCommonCore {
                host: host.socket.clone(),
                devices: names.collect::<Vec<_>>().join(", "),
            });
        }
        Ok(HostPlan {
            socket: host.socket.clone(),
            device: host.device,
            others,
            readonly: host.readonly,
            luns: host.luns.clone(),
            initiator: host.initiator.clone(),
            named: host.named,
            queue_cores: slots.into_iter().map(|slot| cores[slot].id).collect(),
        })
    });
    let hosts = hosts.collect::<Result<Vec<HostPlan>, PlanError>>()?;
    let devices = config
        .devices
        .iter()
        .zip(&spreads)
        .map(|(device, spread)| DevicePlan {
            config: device.clone(),
            virtqueues: spread.virtqueues.iter().sum(),
        })
        .collect();
    Ok(Plan {
        devices,
        disks,
        hosts,
        cores,
        poll: config.poll,
        state: config.state.clone(),
        stats: config.stats.clone(),
        admin: config.admin.clone(),
    })
}

/// Where the virtqueues of one device are so far, per core.
struct Spread {
    /// Most cores that may hold any: one queue pair each.
    limit: usize,
    virtqueues: Vec<usize>,
}

/// Each queue in order goes where this disk has the fewest, then where all disks have the fewest, then to the core named
/// first. While its devices have queue pairs to spare this is a round robin that goes on from disk to disk. With several
/// devices there may be no core for it.
fn place(queues: u16, spreads: &mut [Spread], devices: &[usize], load: &mut [usize]) -> Vec<usize> {
    let mut own = vec![0; load.len()];
    let mut slots = Vec::with_capacity(queues.into());
    for _ in 0..queues {
        let has_room = |spread: &Spread, slot: usize| {
            let cores_used = spread.virtqueues.iter().filter(|&&count| count > 0).count();
            cores_used < spread.limit || spread.virtqueues[slot] > 0
        };
        let slot = (0..load.len())
            .filter(|&slot| devices.iter().all(|&at| has_room(&spreads[at], slot)))
            .min_by_key(|&slot| (own[slot], load[slot], slot));
        // Of a single device there is always one: `limit` is at least 1, so either a core may be added or one is in use.
        let Some(slot) = slot else { break };
        own[slot] += 1;
        load[slot] += 1;
        for &at in devices {
            spreads[at].virtqueues[slot] += 1;
        }
        slots.push(slot);
    }
    slots
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for device in &self.devices {
            fmt_device(device, f)?;
        }
        for disk in &self.disks {
            let device = self.devices[disk.device].config.name.as_str();
            let access = if disk.readonly {
                "read-only"
            } else {
                "read-write"
            };
            writeln!(f, "disk    {}", disk.socket)?;
            writeln!(
                f,
                "  {device} namespace {}, {access}, serial \"{}\"",
                disk.nsid, disk.serial
            )?;
            writeln!(
                f,
                "  {}, queue@core: {}",
                count(disk.queue_cores.len(), "virtqueue"),
                queues(&disk.queue_cores, 0)
            )?;
        }
        for host in &self.hosts {
            self.fmt_host(host, f)?;
        }
        if let Some(state) = &self.state {
            writeln!(f, "state   {}: reservations are kept", state.display())?;
        }
        if let Some(stats) = &self.stats {
            writeln!(f, "stats   {}: counters as JSON", stats.display())?;
        }
        if let Some(admin) = &self.admin {
            writeln!(f, "admin   {}: logical units come and go", admin.display())?;
        }
        for core in &self.cores {
            let polled = self
                .disks
                .iter()
                .map(|disk| &disk.queue_cores)
                .chain(self.hosts.iter().map(|host| &host.queue_cores))
                .flatten()
                .filter(|&&id| id == core.id)
                .count();
            write!(
                f,
                "core    {:<4} polls {}",
                core.id,
                count(polled, "virtqueue")
            )?;
            if let Some(node) = core.numa_node {
                write!(f, " (NUMA node {node})")?;
            }
            writeln!(
                f,
                "{}",
                match self.poll {
                    Polling::Always => "",
                    Polling::Adaptive => ", sleeps while nothing happens",
                }
            )?;
        }
        Ok(())
    }
}

impl Plan {
    fn fmt_host(&self, host: &HostPlan, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = |device: usize| self.devices[device].config.name.as_str();
        let device = name(host.device);
        let access = if host.readonly {
            "read-only"
        } else {
            "read-write"
        };
        writeln!(f, "host    {}", host.socket)?;
        let units = count(host.luns.len(), "logical unit");
        writeln!(f, "  initiator {}", host.initiator)?;
        writeln!(f, "  {device}, {units}, {access}; target:LUN, namespace:")?;
        // 8 to a line keeps to 120 columns.
        for line in host.luns.chunks(8) {
            let places = line.iter().map(|place| {
                let HostLun {
                    target,
                    lun,
                    device,
                    nsid,
                } = *place;
                match device == host.device {
                    true => format!("{target}:{lun} ns{nsid}"),
                    false => format!("{target}:{lun} {} ns{nsid}", name(device)),
                }
            });
            writeln!(f, "    {}", places.collect::<Vec<_>>().join(", "))?;
        }
        writeln!(
            f,
            "  {}, virtqueue@core: {}; control and event queue are polled with the first",
            count(host.queue_cores.len(), "request queue"),
            queues(&host.queue_cores, 2)
        )?;
        if host.others.is_empty() {
            return Ok(());
        }
        let others: Vec<&str> = host.others.iter().map(|&device| name(device)).collect();
        writeln!(
            f,
            "  a queue pair more for each request queue on each of: {}",
            others.join(", ")
        )
    }
}

fn fmt_device(device: &DevicePlan, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let DeviceConfig {
        name,
        controller,
        on_device_loss,
        isolation,
    } = &device.config;
    let model = match controller {
        ControllerConfig::Model(model) => model,
        ControllerConfig::Pci(target) => {
            let how = match isolation {
                Isolation::Iommu => "",
                Isolation::UnsafeNone => ", UNSAFE: also without an IOMMU",
            };
            writeln!(
                f,
                "device  {name}  {target} through VFIO{how}; if it is lost: {on_device_loss}"
            )?;
            return writeln!(
                f,
                "  a queue pair for each of {}, as far as it grants them",
                count(device.virtqueues, "virtqueue")
            );
        }
    };
    write!(f, "device  {name}  embedded controller, ")?;
    let size = match &model.medium {
        Medium::Ram { size } => {
            write!(f, "ram")?;
            Some(*size)
        }
        Medium::File { path, size } => {
            write!(f, "image {}", path.display())?;
            *size
        }
        Medium::Null { size } => {
            write!(f, "null: data written is lost")?;
            Some(*size)
        }
    };
    match size {
        Some(size) => write!(f, ", {}", ByteSize(size))?,
        None => write!(f, ", as large as the file")?,
    }
    let cache = if model.volatile_write_cache {
        "volatile"
    } else {
        "no"
    };
    writeln!(f, ", serial \"{}\", {cache} write cache", model.serial)?;
    let namespaces = usize::try_from(model.namespaces).unwrap_or(usize::MAX);
    write!(f, "  {}", count(namespaces, "namespace"))?;
    if let Some(size) = size {
        write!(f, " of {}", ByteSize(size / u64::from(model.namespaces)))?;
    }
    write!(f, " in {}-byte blocks; ", model.block_size)?;
    match model.max_transfer {
        Some(bytes) => write!(f, "at most {} per command", ByteSize(bytes))?,
        None => write!(f, "transfers without limit")?,
    }
    if !model.latency.is_zero() || !model.jitter.is_zero() {
        let (latency, jitter) = (model.latency.as_nanos(), model.jitter.as_nanos());
        write!(f, "; delayed by {latency} to {} ns", latency + jitter)?;
    }
    writeln!(f)?;
    write!(
        f,
        "  {} of up to {} entries for {}",
        count(model.queue_pairs.into(), "queue pair"),
        model.max_queue_entries,
        count(device.virtqueues, "virtqueue")
    )?;
    if device.virtqueues > usize::from(model.queue_pairs) {
        write!(
            f,
            ": SHARED, raise queues= of the device to give each its own"
        )?;
    }
    writeln!(f)
}

fn count(number: usize, what: &str) -> String {
    format!("{number} {what}{}", if number == 1 { "" } else { "s" })
}

/// The first queue is virtqueue `first`.
fn queues(cores: &[CoreId], first: usize) -> String {
    let cells: Vec<String> = cores
        .iter()
        .enumerate()
        .map(|(queue, core)| format!("{}@{core}", queue + first))
        .collect();
    // 16 to a line keeps a 64-queue disk within 120 columns; the continuation lines up with nothing but its disk.
    cells
        .chunks(16)
        .map(|line| line.join(" "))
        .collect::<Vec<_>>()
        .join("\n    ")
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::prelude::*;

    use super::*;
    use crate::config::Options;

    /// A device per entry of `queue_pairs`, a disk per `(device, queues)`; every core named is online.
    fn plan_of(queue_pairs: &[u16], disks: &[(usize, u16)], cores: &str) -> Plan {
        let mut text = format!("server.cores = \"{cores}\"\n");
        for pairs in queue_pairs {
            text += &format!(
                "[[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nnamespaces = 1024\nqueues = {pairs}\n"
            );
        }
        for (index, (device, queues)) in disks.iter().enumerate() {
            text += &format!(
                "[[blk]]\nfd = {}\nns = {}\ndevice = \"d{device}\"\n",
                index + 3,
                index + 1
            );
            text += &format!("queues = {queues}\n");
        }
        let config = Options::from_toml(&text, Path::new("plan"))
            .unwrap()
            .resolve()
            .unwrap();
        plan(&config, &Topology::from_online_cores((0..64).map(CoreId))).unwrap()
    }

    fn cores_of(plan: &Plan) -> Vec<Vec<usize>> {
        plan.disks
            .iter()
            .map(|disk| disk.queue_cores.iter().map(|core| core.0).collect())
            .collect()
    }

    #[test]
    fn queues_of_one_disk_land_on_distinct_cores() {
        assert_eq!(cores_of(&plan_of(&[64], &[(0, 4)], "0-3")), [[0, 1, 2, 3]]);
    }

    #[test]
    fn queues_beyond_the_cores_go_round_in_the_order_configured() {
        assert_eq!(
            cores_of(&plan_of(&[64], &[(0, 5)], "7,2")),
            [[7, 2, 7, 2, 7]]
        );
    }

    #[test]
    fn several_disks_go_on_where_the_last_ended() {
        let plan = plan_of(&[64, 64], &[(0, 1), (1, 1), (0, 3), (1, 2)], "0-3");
        assert_eq!(
            cores_of(&plan),
            [vec![0], vec![1], vec![2, 3, 0], vec![1, 2]]
        );
        assert_eq!(
            plan.devices
                .iter()
                .map(|device| device.virtqueues)
                .collect::<Vec<_>>(),
            [4, 3]
        );
    }

    #[test]
    fn device_with_fewer_queue_pairs_than_cores_keeps_to_as_many_cores() {
        let plan = plan_of(&[2, 64], &[(0, 4), (1, 2), (0, 1)], "0-3");
        assert_eq!(cores_of(&plan), [vec![0, 1, 0, 1], vec![2, 3], vec![0]]);
    }

    fn plan_of_host(queue_pairs: [u16; 2], queues: u16, cores: &str) -> Result<Plan, PlanError> {
        let [first, second] = queue_pairs;
        let text = format!(
            "server.cores = \"{cores}\"\n\
             [[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nqueues = {first}\n\
             [[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nnamespaces = 2\nqueues = {second}\n\
             [[blk]]\nfd = 3\ndevice = \"d1\"\nns = 2\n\
             [[scsi]]\nfd = 4\nqueues = {queues}\nlun = [\"0:0:d0:ns1\", \"0:1:d1:ns1\"]\n"
        );
        let config = Options::from_toml(&text, Path::new("plan"));
        let config = config.unwrap().resolve().unwrap();
        plan(&config, &Topology::from_online_cores((0..64).map(CoreId)))
    }

    #[test]
    fn host_on_two_devices_has_its_queues_where_both_have_queue_pairs() {
        let plan = plan_of_host([64, 64], 3, "0-3").unwrap();
        let cores: Vec<usize> = plan.hosts[0]
            .queue_cores
            .iter()
            .map(|core| core.0)
            .collect();
        assert_eq!(
            (cores, &plan.hosts[0].others[..]),
            (vec![1, 2, 3], &[1][..])
        );
        let counts: Vec<usize> = plan
            .devices
            .iter()
            .map(|device| device.virtqueues)
            .collect();
        assert_eq!(counts, [3, 4]);
        // The second device keeps to the core that the disk is on.
        let plan = plan_of_host([64, 1], 2, "0-3").unwrap();
        let cores: Vec<usize> = plan.hosts[0]
            .queue_cores
            .iter()
            .map(|core| core.0)
            .collect();
        assert_eq!(cores, [0, 0]);
        let text = plan.to_string();
        let shown = "0:0 ns1, 0:1 d1 ns1\n  2 request queues, virtqueue@core: 2@0 3@0; control and event queue are polled with \
                     the first\n  a queue pair more for each request queue on each of: d1\n";
        assert!(text.contains(shown), "{text}");
    }

    #[test]
    fn host_on_devices_that_share_no_core_is_refused_with_their_names() {
        let config = Options::from_toml(
            "server.cores = \"0-1\"\n\
             [[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nnamespaces = 2\nqueues = 1\n\
             [[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\nnamespaces = 2\nqueues = 1\n\
             [[blk]]\nfd = 3\ndevice = \"d0\"\n[[blk]]\nfd = 4\ndevice = \"d1\"\n\
             [[scsi]]\nfd = 5\nlun = [\"0:0:d0:ns2\", \"0:1:d1:ns2\"]\n",
            Path::new("plan"),
        )
        .unwrap()
        .resolve()
        .unwrap();
        let topology = Topology::from_online_cores([CoreId(0), CoreId(1)]);
        let error = plan(&config, &topology).unwrap_err().to_string();
        assert_eq!(
            error,
            "host fd 5: its logical units are on d0, d1, which have no core in common with a queue pair of each: give the \
             devices more queue pairs, or the server fewer cores (--cores)"
        );
    }

    #[test]
    fn core_that_is_not_online_is_named_with_those_that_are() {
        let config = Options::from_toml(
            "server.cores = \"0,9\"\n[[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"1G\"\n[[blk]]\nfd = 3\n",
            Path::new("plan"),
        )
        .unwrap()
        .resolve()
        .unwrap();
        let error = plan(
            &config,
            &Topology::from_online_cores([0, 1, 2, 3, 8].map(CoreId)),
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "cannot poll on core 9: it is not online for this process (available: 0-3,8); change --cores"
        );
    }

    #[test]
    fn plan_prints_devices_disks_and_the_core_of_each_queue() {
        let config = Options::from_toml(
            "server.cores = \"0-1\"\n\
             [[device]]\nkind = \"model\"\nmedium = \"ram\"\nsize = \"3G\"\nnamespaces = 3\nqueues = 4\nlatency = \"10us\"\n\
             [[device]]\nkind = \"model\"\nmedium = \"file\"\npath = \"disk.img\"\nblock = 4096\nmdts = 0\nvwc = \"off\"\n\
             [[blk]]\npath = \"/run/tandem/vm0.sock\"\ndevice = \"d0\"\nqueues = 18\n\
             [[blk]]\nfd = 5\ndevice = \"d1\"\nreadonly = true\nserial = \"tools\"\n",
            Path::new("plan"),
        )
        .unwrap()
        .resolve()
        .unwrap();
        let topology = Topology {
            cores: vec![
                Core {
                    id: CoreId(0),
                    numa_node: Some(1),
                },
                Core {
                    id: CoreId(1),
                    numa_node: None,
                },
            ],
        };
        assert_eq!(
            plan(&config, &topology).unwrap().to_string(),
            "\
device  d0  embedded controller, ram, 3G, serial \"tandem-d0\", volatile write cache
  3 namespaces of 1G in 512-byte blocks; at most 128K per command; delayed by 10000 to 10000 ns
  4 queue pairs of up to 1024 entries for 18 virtqueues: SHARED, raise queues= of the device to give each its own
device  d1  embedded controller, image disk.img, as large as the file, serial \"tandem-d1\", no write cache
  1 namespace in 4096-byte blocks; transfers without limit
  64 queue pairs of up to 1024 entries for 1 virtqueue
disk    /run/tandem/vm0.sock
  d0 namespace 1, read-write, serial \"d0-ns1\"
  18 virtqueues, queue@core: 0@0 1@1 2@0 3@1 4@0 5@1 6@0 7@1 8@0 9@1 10@0 11@1 12@0 13@1 14@0 15@1
    16@0 17@1
disk    fd 5
  d1 namespace 1, read-only, serial \"tools\"
  1 virtqueue, queue@core: 0@0
core    0    polls 10 virtqueues (NUMA node 1)
core    1    polls 9 virtqueues
"
        );
    }

    proptest! {
        #[test]
        fn any_plan_keeps_its_promises(
            pairs in prop::collection::vec(1..20u16, 1..4),
            disks in prop::collection::vec((any::<prop::sample::Index>(), 1..=64u16), 1..8),
            core_count in 1..32usize,
        ) {
            let disks: Vec<_> = disks.iter().map(|(device, queues)| (device.index(pairs.len()), *queues)).collect();
            let plan = plan_of(&pairs, &disks, &format!("0-{}", core_count - 1));
            for (disk, (_, queues)) in plan.disks.iter().zip(&disks) {
                prop_assert_eq!(disk.queue_cores.len(), usize::from(*queues));
                prop_assert!(disk.queue_cores.iter().all(|core| core.0 < core_count));
            }
            for (device, &limit) in pairs.iter().enumerate() {
                let mut used: Vec<_> =
                    plan.disks.iter().filter(|disk| disk.device == device).flat_map(|disk| &disk.queue_cores).collect();
                used.sort();
                used.dedup();
                prop_assert!(used.len() <= usize::from(limit), "device {} on {} cores", device, used.len());
            }
        }

        #[test]
        fn plan_with_queue_pairs_to_spare_is_one_round_robin(
            queues in prop::collection::vec(1..=64u16, 1..8),
            core_count in 1..32usize,
        ) {
            let disks: Vec<_> = queues.iter().map(|&queues| (0, queues)).collect();
            let placed = cores_of(&plan_of(&[64], &disks, &format!("0-{}", core_count - 1))).concat();
            let expected: Vec<_> = (0..placed.len()).map(|queue| queue % core_count).collect();
            prop_assert_eq!(placed, expected);
        }
    }
}
