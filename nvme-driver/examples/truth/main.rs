//! Sends seeded sequences of NVMe commands, valid and invalid, to a controller and prints what it answered.
//!
//! The same sequences go to the software controller and to one that others wrote, and the two transcripts are compared
//! (`tests/truth.rs` of the server says what may differ and why). **Everything on the namespace is lost.**
//!
//! ```sh
//! truth --model ram,size=50331648,block_size=512
//! truth --device pci:0000:00:05.0 --overwrite-data
//! ```
//! A line is `SEED.STEP CASE [what was sent] KEY=VALUE...`. `status` is the status code type and the status code in
//! hexadecimal, `dnr` Do Not Retry; what follows them is there when the command succeeded: `dw0` where it means
//! something, data as `zero`, `untouched` (no byte was stored) or a hash, and fields by the specification's names.
//! Commands do not depend on answers, so both transcripts have the same lines, except that what an answer left
//! behind (a queue that was created) is taken back silently.
//!
//! Not sent: commands whose data pointer names memory that is not mapped, since an IOMMU logs that as a fault.

mod admin;
mod bench;
mod io;
mod rng;

use std::error::Error;
use std::io::Write;

use clap::Parser;
use nvme_driver::Controller;
use nvme_driver::transport::Transport;
use nvme_driver::vfio::VfioTransport;
use nvme_driver::vfio::pci::PciAddress;
use nvme_model::{Model, ModelConfig};

use bench::Bench;

/// Commands of one seed besides one round through all cases.
const EXTRA_CASES: usize = 40;

/// Sends seeded sequences of NVMe commands and prints the answers.
#[derive(Parser)]
struct Arguments {
    /// An SSD that is bound to vfio-pci: pci:0000:00:05.0
    #[arg(long, required_unless_present = "model", conflicts_with = "model")]
    device: Option<String>,
    /// The software controller: ram[,size=BYTES][,block_size=512][,serial=TEXT]
    #[arg(long)]
    model: Option<String>,
    /// What is on the SSD may go
    #[arg(long)]
    overwrite_data: bool,
    /// How many sequences
    #[arg(long, default_value_t = 20)]
    seeds: u64,
    /// The seed of the first one
    #[arg(long, default_value_t = 0)]
    first_seed: u64,
}

type Result<V> = std::result::Result<V, Box<dyn Error>>;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let seeds = arguments.first_seed..arguments.first_seed + arguments.seeds;
    let transcript = match (&arguments.device, &arguments.model) {
        (Some(device), _) => {
            if !arguments.overwrite_data {
                return Err(
                    "it writes all over the SSD: say --overwrite-data if that may be".into(),
                );
            }
            let address = device
                .strip_prefix("pci:")
                .ok_or("a device is pci:ADDRESS")?;
            run(seeds, VfioTransport::claim(address.parse::<PciAddress>()?)?)?
        }
        (None, Some(model)) => {
            let model = Model::new(model_config(model)?)?;
            let handle = model.handle();
            let transcript = run(seeds, model)?;
            if handle.iommu_violations() + handle.driver_errors() != 0 {
                let last = handle.last_driver_error();
                return Err(
                    format!("the driver did what it must not: {last:?}, {handle:?}").into(),
                );
            }
            transcript
        }
        (None, None) => return Err("name a --device or a --model".into()),
    };
    let mut out = std::io::stdout().lock();
    for line in transcript {
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// The twin of the SSD that `tests/truth.rs` puts into the machine.
fn model_config(text: &str) -> Result<ModelConfig> {
    let mut words = text.split(',');
    if words.next() != Some("ram") {
        return Err("a model is ram[,KEY=VALUE]".into());
    }
    let mut config = ModelConfig {
        queues: 8,
        mqes: 2048,
        mdts_bytes: Some(128 << 10),
        max_namespaces: 256,
        ..ModelConfig::default()
    };
    for word in words {
        match word.split_once('=') {
            Some(("size", bytes)) => config.size = bytes.parse()?,
            Some(("block_size", bytes)) => config.block_size = bytes.parse()?,
            Some(("serial", serial)) => config.serial = serial.to_owned(),
            _ => return Err(format!("a model knows no `{word}`").into()),
        }
    }
    Ok(config)
}

/// One sequence for each seed on a freshly enabled controller; the transcript.
fn run<T: Transport>(seeds: impl Iterator<Item = u64>, transport: T) -> Result<Vec<String>> {
    let mut transcript = Vec::new();
    let mut disabled = Controller::new(transport)?;
    for seed in seeds {
        let controller = disabled.enable(bench::QUEUES).map_err(|(_, error)| error)?;
        let mut bench = Bench::new(controller, seed)?;
        bench.before_queues()?;
        bench.create_queue_pair()?;
        let all = Bench::cases();
        let mut cases = all.clone();
        for _ in 0..EXTRA_CASES {
            cases.push(bench.rng.pick(&all));
        }
        bench.rng.shuffle(&mut cases);
        bench.fill()?;
        for case in cases {
            case(&mut bench)?;
        }
        bench.check_media()?;
        let (controller, lines) = bench.finish()?;
        transcript.extend(lines);
        disabled = controller.shutdown().map_err(|(_, error)| error)?;
    }
    Ok(transcript)
}
