//! `tandem list` and `tandem setup-vfio`: what they take, and what they say.
//!
//! Standard output has what was asked for, standard error has what was refused or failed; each line that is about one
//! device begins with its address. Exit code 0: all as asked; 1: something was refused or failed; 2: the command line
//! makes no sense.

use std::io::{ErrorKind, Write};
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use clap::{Args, Subcommand};
use nvme_driver::vfio::pci::PciAddress;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::Host;
use super::effects::{DryRun, Effects, System};
use super::inventory::{self, HostDevice, Survey};
use super::owner::{self, Record, User};
use super::setup::{self, BindOptions, Outcome};
use super::{hugepages, show};

#[derive(Clone, Debug, Args)]
pub struct ListArgs {
    /// Print JSON instead of a table
    #[arg(long)]
    pub json: bool,
}

#[derive(Clone, Debug, Args)]
pub struct SetupArgs {
    #[command(subcommand)]
    pub action: Action,
}

#[derive(Clone, Debug, Subcommand)]
pub enum Action {
    /// Show every SSD: who has it, who uses it, its IOMMU group and PCIe link
    Status {
        /// Print JSON instead of a table
        #[arg(long)]
        json: bool,
    },
    /// Take SSDs that nobody uses from the kernel and give them to vfio-pci
    Bind(BindArgs),
    /// Give SSDs back to the driver that they had, and wait until their disks are there
    Unbind(Named),
    /// Reset SSDs that nobody uses
    Reset(Named),
    /// Set how many huge pages of 2 MiB there are, on the NUMA nodes of the SSDs that vfio-pci has
    Hugepages {
        /// In all, not per node
        pages: u64,
        /// Only on this NUMA node
        #[arg(long, value_name = "NODE")]
        node: Option<u32>,
        /// Print each step and take none
        #[arg(long)]
        dry_run: bool,
    },
}

#[derive(Clone, Debug, Args)]
pub struct BindArgs {
    /// PCI address (0000:5e:00.0 or 5e:00.0) or serial=S4EW...
    #[arg(value_name = "BDF", required_unless_present = "all_unused")]
    pub targets: Vec<Target>,
    /// Every SSD that nothing speaks against
    #[arg(long, conflicts_with_all = ["targets", "force_data"])]
    pub all_unused: bool,
    /// Also if a file system, a partition table or the like is on it; never if it is in use
    #[arg(long)]
    pub force_data: bool,
    /// Also where there is no IOMMU: once it is served, any fault of the SSD may change all memory of this machine
    #[arg(long, conflicts_with_all = ["all_unused", "user"])]
    pub unsafe_noiommu: bool,
    /// Let this user serve it: name or number
    #[arg(long, value_name = "NAME")]
    pub user: Option<String>,
    /// Print each step and take none
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Clone, Debug, Args)]
pub struct Named {
    /// PCI address (0000:5e:00.0 or 5e:00.0) or serial=S4EW...
    #[arg(value_name = "BDF", required = true)]
    pub targets: Vec<Target>,
    /// Print each step and take none
    #[arg(long)]
    pub dry_run: bool,
}

/// How a user names an SSD.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    Address(PciAddress),
    Serial(String),
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        match text.strip_prefix("serial=") {
            Some("") => {
                Err("serial= needs a serial number (`setup-vfio status` shows them)".to_owned())
            }
            Some(serial) => Ok(Target::Serial(serial.to_owned())),
            None => text
                .parse()
                .map(Target::Address)
                .map_err(|error| format!("{error}, or serial=...")),
        }
    }
}

/// Where a command speaks.
pub struct Console<'a> {
    pub out: &'a mut dyn Write,
    pub err: &'a mut dyn Write,
}

impl Console<'_> {
    // When nobody reads any more, there is nobody to tell.
    fn say(&mut self, text: &str) {
        let _ = self
            .out
            .write_all(text.as_bytes())
            .and_then(|()| self.out.flush());
    }

    fn complain(&mut self, text: &str) {
        let _ = self
            .err
            .write_all(text.as_bytes())
            .and_then(|()| self.err.flush());
    }

    /// Lines of one device; true when it is as asked.
    fn report(&mut self, subject: &str, outcome: Outcome) -> bool {
        match outcome {
            Ok(lines) => {
                lines
                    .iter()
                    .for_each(|line| self.say(&format!("{subject}: {line}\n")));
                true
            }
            Err(lines) => {
                lines
                    .iter()
                    .for_each(|line| self.complain(&format!("{subject}: {line}\n")));
                false
            }
        }
    }
}

impl std::fmt::Debug for Console<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Console")
    }
}

/// On this machine, with our standard output and error.
#[must_use]
pub fn list_here(args: &ListArgs) -> u8 {
    on_standard_streams(|console| list(&Host::default(), &mut System, args, console))
}

/// On this machine, with our standard output and error.
#[must_use]
pub fn setup_here(args: &SetupArgs) -> u8 {
    // A signal must not end us between two steps, with a device that no driver has. All that follows has deadlines.
    let late = Arc::new(AtomicBool::new(false));
    for signal in [SIGHUP, SIGINT, SIGTERM] {
        let _ = signal_hook::flag::register(signal, Arc::clone(&late));
    }
    on_standard_streams(|console| setup(&Host::default(), System, args, console))
}

fn on_standard_streams(command: impl FnOnce(&mut Console) -> u8) -> u8 {
    let (mut out, mut err) = (std::io::stdout().lock(), std::io::stderr().lock());
    command(&mut Console {
        out: &mut out,
        err: &mut err,
    })
}

/// `tandem list`. Gives the exit code.
pub fn list(host: &Host, effects: &mut dyn Effects, args: &ListArgs, console: &mut Console) -> u8 {
    let Some(survey) = look(host, console) else {
        return 1;
    };
    let verdicts = show::verdicts(host, effects, &survey);
    show_survey(&survey, &verdicts, args.json, console);
    0
}

/// `tandem setup-vfio`. Gives the exit code.
pub fn setup(
    host: &Host,
    mut machine: impl Effects,
    args: &SetupArgs,
    console: &mut Console,
) -> u8 {
    let Some(survey) = look(host, console) else {
        return 1;
    };
    let dry_run = match &args.action {
        Action::Status { json } => {
            show_survey(&survey, &[], *json, console);
            return 0;
        }
        Action::Bind(args) => args.dry_run,
        Action::Unbind(args) | Action::Reset(args) => args.dry_run,
        Action::Hugepages { dry_run, .. } => *dry_run,
    };
    if dry_run {
        if !machine.is_root() {
            console.complain(
                "setup-vfio: not root, so not all that speaks against a step can be seen\n",
            );
        }
        let mut machine = DryRun::of(machine);
        let code = act(host, &mut machine, &survey, &args.action, console);
        for step in machine.steps() {
            console.say(&format!("would {step}\n"));
        }
        return code;
    }
    if !machine.is_root() {
        console.complain("setup-vfio: this needs root (--dry-run shows what it would do)\n");
        return 1;
    }
    // Two at once would decide on what the other is changing.
    let path = Record::folder(host).join("lock");
    let lock = match machine.lock(&path) {
        Ok(lock) => lock,
        Err(error) => {
            let why = match error.kind() {
                ErrorKind::WouldBlock => "another setup-vfio is at work".to_owned(),
                _ => format!("cannot lock {}: {error}", path.display()),
            };
            console.complain(&format!("setup-vfio: {why}\n"));
            return 1;
        }
    };
    if matches!(args.action, Action::Bind(_) | Action::Reset(_)) {
        // udev opens each new disk for a moment; that is not a user of it. Without udev there is nothing to wait for.
        let _ = machine.look("udevadm", &["settle", "--timeout=10"]);
    }
    // What was seen before the lock may have changed.
    let code = match look(host, console) {
        Some(survey) => act(host, &mut machine, &survey, &args.action, console),
        None => 1,
    };
    drop(lock);
    code
}

fn look(host: &Host, console: &mut Console) -> Option<Survey> {
    let survey = inventory::survey(host);
    if let Err(error) = &survey {
        let root = host.sysfs.path("bus/pci/devices");
        console.complain(&format!(
            "setup-vfio: cannot read {}: {error}\n",
            root.display()
        ));
    }
    survey.ok()
}

fn show_survey(survey: &Survey, verdicts: &[show::Verdict], json: bool, console: &mut Console) {
    if json {
        console.say(&format!("{:#}\n", show::to_json(survey, verdicts)));
    } else {
        console.say(&show::to_text(survey, verdicts));
    }
}

fn act(
    host: &Host,
    effects: &mut dyn Effects,
    survey: &Survey,
    action: &Action,
    console: &mut Console,
) -> u8 {
    let good = match action {
        Action::Status { .. } => true,
        Action::Bind(args) => bind(host, effects, survey, args, console),
        Action::Unbind(args) => {
            let (devices, mut good) = resolve(host, survey, &args.targets, console);
            for device in devices {
                let outcome = setup::unbind(host, effects, device);
                good &= console.report(&device.address.to_string(), outcome);
            }
            good
        }
        Action::Reset(args) => {
            let (devices, mut good) = resolve(host, survey, &args.targets, console);
            for device in devices {
                let outcome = setup::reset(host, effects, survey, device);
                good &= console.report(&device.address.to_string(), outcome);
            }
            good
        }
        Action::Hugepages { pages, node, .. } => {
            match hugepages::reserve(host, effects, *pages, *node, &survey.devices) {
                Ok(lines) => lines.into_iter().fold(true, |good, line| {
                    let outcome = line.map(|line| vec![line]).map_err(|line| vec![line]);
                    console.report("hugepages", outcome) && good
                }),
                Err(why) => console.report("hugepages", Err(vec![why])),
            }
        }
    };
    u8::from(!good)
}

fn bind(
    host: &Host,
    effects: &mut dyn Effects,
    survey: &Survey,
    args: &BindArgs,
    console: &mut Console,
) -> bool {
    let user = match args
        .user
        .as_deref()
        .map(|name| User::find(host, name))
        .transpose()
    {
        Ok(user) => user,
        Err(why) => return console.report("setup-vfio", Err(vec![why])),
    };
    let options = BindOptions {
        force_data: args.force_data,
        unsafe_noiommu: args.unsafe_noiommu,
        user,
    };
    let (devices, mut good) = if args.all_unused {
        (survey.devices.iter().collect(), true)
    } else {
        resolve(host, survey, &args.targets, console)
    };
    if args.all_unused && devices.is_empty() {
        console.say("There is no NVMe controller on this machine's PCI buses.\n");
    }
    let mut bound = false;
    for (address, outcome) in setup::bind(host, effects, survey, &devices, &options) {
        bound |= outcome.is_ok();
        // Nobody asked for this one in particular: that it stays is an answer, unless it was tried.
        let left = |lines: &Vec<String>| lines.iter().all(|line| line.starts_with("refused: "));
        match outcome {
            Err(lines) if args.all_unused && left(&lines) => {
                for line in lines {
                    console.say(&format!(
                        "{address}: left alone: {}\n",
                        line.trim_start_matches("refused: ")
                    ));
                }
            }
            outcome => good &= console.report(&address.to_string(), outcome),
        }
    }
    if let Some(user) = options.user.filter(|_| bound && effects.acts()) {
        for line in owner::advice(host, &user) {
            console.say(&format!("{line}\n"));
        }
    }
    good
}

/// The SSDs that were named, each once; and whether all of them are there.
fn resolve<'a>(
    host: &Host,
    survey: &'a Survey,
    targets: &[Target],
    console: &mut Console,
) -> (Vec<&'a HostDevice>, bool) {
    let (mut devices, mut good): (Vec<&HostDevice>, bool) = (Vec::new(), true);
    for target in targets {
        match find(host, survey, target) {
            Ok(device) => {
                if !devices.iter().any(|known| known.address == device.address) {
                    devices.push(device);
                }
            }
            Err((subject, why)) => good &= console.report(&subject, Err(vec![why])),
        }
    }
    (devices, good)
}

fn find<'a>(
    host: &Host,
    survey: &'a Survey,
    target: &Target,
) -> Result<&'a HostDevice, (String, String)> {
    match target {
        Target::Address(address) => {
            let found = survey
                .devices
                .iter()
                .find(|device| device.address == *address);
            found.ok_or_else(|| {
                let why = match host.sysfs.function(*address) {
                    Ok(function) => format!(
                        "refused: it is no NVMe controller (its class is {:#08x})",
                        function.class().unwrap_or_default()
                    ),
                    Err(_) => "there is no PCI function at this address".to_owned(),
                };
                (address.to_string(), why)
            })
        }
        Target::Serial(serial) => {
            let devices = survey.devices.iter();
            let found: Vec<&HostDevice> = devices
                .filter(|device| device.serial.as_ref() == Some(serial))
                .collect();
            let subject = format!("serial={serial}");
            match found.as_slice() {
                [one] => Ok(*one),
                [] => {
                    let known: Vec<&str> = survey
                        .devices
                        .iter()
                        .filter_map(|device| device.serial.as_deref())
                        .collect();
                    let known = if known.is_empty() {
                        "none".to_owned()
                    } else {
                        known.join(", ")
                    };
                    Err((
                        subject,
                        format!("no NVMe controller has this serial number; known are: {known}"),
                    ))
                }
                several => {
                    let addresses: Vec<String> = several
                        .iter()
                        .map(|device| device.address.to_string())
                        .collect();
                    Err((
                        subject,
                        format!(
                            "several have this serial number, name one: {}",
                            addresses.join(", ")
                        ),
                    ))
                }
            }
        }
    }
}
