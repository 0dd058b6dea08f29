//! `tandem bench`: a latency benchmark in fio's words, for the NVMe driver, for any vhost-user-blk server and for the
//! kernel, several of them in turn.
//!
//! ```text
//!  args, job_file -> Job --+
//!                          +-> session: cases, rounds, A A' B --> target: threads --> engine: one queue each
//!  device | vhost_user | file: Queue + what keeps it ----------------^                  io, verify: what is sent
//!                                                                                       stats: what comes back
//!  Results -> report (people) | json (fio's shape) | terse | plot
//! ```
//! Promises: no latency is shorter than it was (see `engine`), warm-up does not count, no percentile is shown that the
//! samples do not carry, and no ratio without the noise beside it. Start at [`run_here`], then `engine`.

pub mod args;
mod device;
mod engine;
mod environment;
mod file;
mod io;
mod job_file;
mod json;
mod packed;
mod pingpong;
mod plot;
mod report;
mod session;
mod slots;
mod spec;
mod split;
mod stages;
mod stats;
mod target;
mod terse;
mod turns;
mod verify;
mod vhost_user;

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

use crate::config::{ControllerConfig, DeviceOptions};
use args::{BenchArgs, Interrupts, Job, JobOptions, OutputFormat};
use session::{Results, Session};
use slots::Wishes;
use spec::ServerSpec;
use target::{Needs, Target};
use turns::{Parking, Reopened};

/// The exit code after Ctrl-C, as fio has it.
const INTERRUPTED: u8 = 128;

/// Measures, and says what was found. The exit code: 0, 1 when it failed while measuring, 128 when it was interrupted.
///
/// # Errors
/// Why nothing was measured.
pub fn run_here(args: &BenchArgs) -> anyhow::Result<u8> {
    // With all its reasons: whoever prints it prints one line.
    run(args).map_err(|error| anyhow::anyhow!("{error:#}"))
}

fn run(args: &BenchArgs) -> anyhow::Result<u8> {
    let jobs = jobs(args)?;
    // A second Ctrl-C ends it at once.
    let interrupted = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        let exit = INTERRUPTED.into();
        flag::register_conditional_shutdown(signal, exit, Arc::clone(&interrupted))?;
        flag::register(signal, Arc::clone(&interrupted))?;
    }
    let mut session = Session {
        interrupted: Arc::clone(&interrupted),
        targets: Vec::new(),
        rounds: args.rounds,
        load_curve: args.load_curve,
        parking: None,
    };
    let opened = open(args, &jobs, &mut session);
    // What cannot be written is found out before an hour of measuring.
    let files = opened.and_then(|()| {
        Ok((
            create(args.output.as_deref())?,
            create(args.plot.as_deref())?,
        ))
    });
    let (output, plot) = match files {
        Ok(files) => files,
        Err(error) => {
            let _ = session.close();
            return Err(error);
        }
    };
    let results = session.run(&jobs);
    let closed = session.close();
    let written = results.and_then(|results| {
        let text = render(args.output_format, &results);
        match output {
            Some(mut file) => file.write_all(text.as_bytes())?,
            None => std::io::stdout().lock().write_all(text.as_bytes())?,
        }
        if let Some(mut plot) = plot {
            plot.write_all(plot::draw(&results)?.as_bytes())?;
        }
        closed
    });
    match written {
        Ok(()) if interrupted.load(Ordering::Relaxed) => Ok(INTERRUPTED),
        Ok(()) => Ok(0),
        Err(error) => {
            let _ = writeln!(std::io::stderr().lock(), "tandem: {error:#}");
            Ok(match interrupted.load(Ordering::Relaxed) {
                true => INTERRUPTED,
                false => 1,
            })
        }
    }
}

fn create(path: Option<&Path>) -> anyhow::Result<Option<File>> {
    let create = |path: &Path| {
        File::create(path).with_context(|| format!("cannot write {}", path.display()))
    };
    path.map(create).transpose()
}

fn jobs(args: &BenchArgs) -> anyhow::Result<Vec<Job>> {
    let sections = match &args.job_file {
        Some(path) => job_file::read(path)?,
        None => vec![("bench".to_owned(), JobOptions::default())],
    };
    let sections = sections.into_iter();
    sections
        .map(|(name, section)| job(args, &name, &section))
        .collect()
}

fn job(args: &BenchArgs, name: &str, section: &JobOptions) -> anyhow::Result<Job> {
    let mut options = args.job.clone().over(section);
    if args.load_curve.is_some() {
        if options.rate_iops.is_some() {
            bail!("--load-curve chooses the rates itself: drop --rate_iops");
        }
        // One in flight has no curve: the line would have a single server.
        options.iodepth = options.iodepth.or_else(|| Some(args::Depths(vec![32])));
    }
    options.resolve(name)
}

fn open(args: &BenchArgs, jobs: &[Job], session: &mut Session) -> anyhow::Result<()> {
    let targets = &mut session.targets;
    let most = |of: fn(&Job) -> u32| jobs.iter().map(of).max().unwrap_or(1);
    let changes = jobs.iter().find(|job| job.rw.writes() || job.rw.trims());
    let needs = Needs {
        queues: most(|job| job.numjobs),
        depth: most(Job::most_depth),
        bs: most(|job| job.bs),
        writes: jobs.iter().any(|job| job.rw.writes()),
        flushes: jobs.iter().any(|job| job.fsync > 0),
        trims: jobs.iter().any(|job| job.rw.trims()),
        verify: jobs.iter().any(|job| job.verify),
        reach: jobs
            .iter()
            .map(|job| job.size.map(|size| size.saturating_add(job.offset)))
            .max()
            .flatten(),
    };
    let interrupts = args.interrupts;
    if interrupts != Interrupts::Off && !args.device.is_empty() {
        bail!("--interrupts {interrupts}: a --device is only polled; leave one of the two out");
    }
    if interrupts == Interrupts::Armed && !args.file.is_empty() {
        bail!("--interrupts armed: a --file has nothing to arm; leave one of the two out");
    }
    let mut devices = args.device.clone();
    if args.unsafe_noiommu {
        DeviceOptions::allow_noiommu(&mut devices)?;
    }
    let mut configs = Vec::new();
    for options in devices {
        let config = options.resolve_alone()?;
        if let (ControllerConfig::Pci(target), Some(job), false) =
            (&config.controller, changes, args.overwrite_data)
        {
            bail!(
                "--rw {} would replace what is on {target}: say --overwrite-data if that may be",
                job.rw
            );
        }
        configs.push(config);
    }
    if configs.is_empty() && args.vhost_user.is_empty() && args.file.is_empty() {
        bail!("no target: name a --device, a --vhost-user socket or a --file");
    }
    for config in &configs {
        targets.push(device::open(config, &needs)?);
    }
    let wishes = Wishes {
        ring: args.ring,
        indirect: args.indirect.is_on(),
        event_idx: args.event_idx.is_on(),
        interrupts,
        hugepages: args.hugepages,
    };
    for spec in &args.vhost_user {
        targets.push(open_server(spec, &args.vhost_user, wishes, needs)?);
    }
    for path in &args.file {
        let interrupts = interrupts == Interrupts::On;
        targets.push(file::open(path, interrupts, args.overwrite_data, &needs)?);
    }
    for target in targets.iter() {
        for job in jobs {
            Session::region(target.info(), job)?;
        }
    }
    if args.park {
        session.parking = Some(Parking::of(targets.iter().map(|target| target.info()))?);
    }
    Ok(())
}

/// A server takes one front-end at a time: a socket that is named twice is connected to in turn.
fn open_server(
    spec: &ServerSpec,
    all: &[ServerSpec],
    wishes: Wishes,
    needs: Needs,
) -> anyhow::Result<Box<dyn Target>> {
    if all
        .iter()
        .filter(|other| other.is_same_socket(spec))
        .count()
        < 2
    {
        return vhost_user::open(spec, wishes, &needs);
    }
    let spec = spec.clone();
    let open = Box::new(move || vhost_user::open(&spec, wishes, &needs));
    Ok(Box::new(Reopened::new(open)?))
}

fn render(format: OutputFormat, results: &Results) -> String {
    match format {
        OutputFormat::Normal => report::normal(results),
        OutputFormat::Json => json::render(results, false),
        OutputFormat::JsonPlus => json::render(results, true),
        OutputFormat::Terse => terse::render(results),
    }
}
