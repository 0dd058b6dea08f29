//! The `tandem` binary: parse arguments, run, exit code. 2: it did not start; 1: it did not end cleanly.

use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;

use clap::Parser;
use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};
use signal_hook::iterator::Signals;
use tandem::cli::{Cli, Command, IdentifyArgs, ServeArgs};
use tandem::config::{AdminRequest, CoreId, LogLevel};
use tandem::control::{admin, identify, server};
use tandem::plan::{Topology, plan};

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Serve(args) => serve(&args),
        Command::Lun(command) => {
            let (server, request, json) = command.request();
            ask(server, &request, json)
        }
        Command::Device(command) => {
            let (server, request) = command.request();
            ask(server, &request, false)
        }
        Command::Bench(args) => {
            log_to_stderr(LogLevel::Warn);
            tandem::bench::run_here(&args).map(ExitCode::from)
        }
        Command::Identify(args) => run_identify(&args),
        Command::List(args) => Ok(tandem::host::command::list_here(&args).into()),
        Command::SetupVfio(args) => Ok(tandem::host::command::setup_here(&args).into()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("tandem: {error}");
        ExitCode::from(2)
    })
}

fn serve(args: &ServeArgs) -> anyhow::Result<ExitCode> {
    let config = args.config()?;
    let cores = core_affinity::get_core_ids().unwrap_or_default();
    let topology = Topology::from_online_cores(cores.iter().map(|core| CoreId(core.id)));
    let plan = plan(&config, &topology)?;
    if args.dry_run {
        print(&plan.to_string());
        return Ok(ExitCode::SUCCESS);
    }
    log_to_stderr(config.log);
    // Before the sockets listen: a signal that comes early must not end the process half started.
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
    let server = server::Server::start(&plan)?;
    print("tandem: ready\n");
    for signal in signals.forever() {
        if signal != SIGUSR1 {
            break;
        }
        print(&server.report());
    }
    match server.stop() {
        Ok(report) => {
            print(&report);
            Ok(ExitCode::SUCCESS)
        }
        Err(error) => {
            eprintln!("tandem: {error}");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn run_identify(args: &IdentifyArgs) -> anyhow::Result<ExitCode> {
    let config = args.config()?;
    // What is worth a warning is so here too.
    log_to_stderr(LogLevel::Warn);
    print(&identify::describe(&config, args.json)?);
    Ok(ExitCode::SUCCESS)
}

fn ask(server: &Path, request: &AdminRequest, json: bool) -> anyhow::Result<ExitCode> {
    print(&admin::ask(server, request, json)?);
    Ok(ExitCode::SUCCESS)
}

/// Output for whoever reads our standard output; when nobody does any more, there is nobody to tell.
fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn log_to_stderr(level: LogLevel) {
    let level = level.to_string().parse().unwrap_or(tracing::Level::INFO);
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_max_level(level)
        .init();
}
