//! Measures one queue pair: IOPS, bandwidth and latency, in fio's words.
//!
//! ```sh
//! perf --model ram,size=1g --rw randread --bs 4k --iodepth 32
//! perf --device pci:0000:5e:00.0 --rw randread --bs 4k --iodepth 32 --runtime 10 --cpu 2
//! perf --device pci:0000:5e:00.0 --rw randwrite --overwrite-data
//! ```
//! What it measures: the driver and the controller, on one thread that polls without pause. `iodepth` commands are in
//! flight all the time (a closed loop): a completion makes room for the next command at once. A latency reaches from
//! the round in which a command was submitted to the round in which its completion was polled. The clock is read once
//! a round, not once a command, so a latency is up to one round too long at its start and at its end; the printed
//! length of a round says how much that may be.
//!
//! What it does not: latency under a load that arrives at its own pace (a slow command holds up those behind it, and
//! they are not counted as waiting), several queue pairs or cores, file systems, interrupts, or a server in front. On
//! the software controller there is no SSD at all: commands are carried out within the poll, on the same core, so it
//! shows what the software costs, and `iodepth` only makes batches. Memory and blocks that nobody wrote may be faster
//! than data (many SSDs answer reads of deallocated blocks at once): write them first for figures that mean something.
#![allow(clippy::cast_precision_loss)]

use std::error::Error;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use hdrhistogram::Histogram;
use nvme_driver::dma::{DmaAccess, DmaBuffer};
use nvme_driver::spec::{LbaRange, Nsid, SubmissionEntry};
use nvme_driver::transport::Transport;
use nvme_driver::vfio::VfioTransport;
use nvme_driver::vfio::pci::PciAddress;
use nvme_driver::{Controller, DataSegment, QueuePair};
use nvme_model::{Model, ModelConfig};

type Result<V> = std::result::Result<V, Box<dyn Error>>;

/// Measures IOPS, bandwidth and latency of one queue pair.
#[derive(Parser)]
struct Arguments {
    /// An SSD that is bound to vfio-pci: pci:0000:5e:00.0
    #[arg(long, required_unless_present = "model", conflicts_with = "model")]
    device: Option<String>,
    /// The software controller: ram[,size=SIZE][,block_size=512]
    #[arg(long)]
    model: Option<String>,
    /// Namespace [the first one]
    #[arg(long)]
    nsid: Option<u32>,
    /// What commands do
    #[arg(long, value_enum, default_value = "randread")]
    rw: Workload,
    /// Bytes of one command
    #[arg(long, default_value = "4k", value_parser = bytes)]
    bs: u64,
    /// Commands in flight
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..1024))]
    iodepth: u16,
    /// Seconds that are measured
    #[arg(long, default_value_t = 5.0)]
    runtime: f64,
    /// Seconds before that
    #[arg(long, default_value_t = 1.0)]
    ramp_time: f64,
    /// The core to poll on
    #[arg(long)]
    cpu: Option<usize>,
    /// Writes may replace what is on the SSD
    #[arg(long)]
    overwrite_data: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Workload {
    Randread,
    Randwrite,
    Read,
    Write,
}

impl Workload {
    fn writes(self) -> bool {
        matches!(self, Workload::Randwrite | Workload::Write)
    }

    fn name(self) -> &'static str {
        match self {
            Workload::Randread => "randread",
            Workload::Randwrite => "randwrite",
            Workload::Read => "read",
            Workload::Write => "write",
        }
    }

    fn is_random(self) -> bool {
        matches!(self, Workload::Randread | Workload::Randwrite)
    }
}

/// `4096`, `4k`, `1m`, `1g`: powers of 1024, as fio has them.
fn bytes(text: &str) -> std::result::Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let (digits, unit) = match lower.char_indices().last() {
        Some((at, 'k')) => (&lower[..at], 1 << 10),
        Some((at, 'm')) => (&lower[..at], 1 << 20),
        Some((at, 'g')) => (&lower[..at], 1 << 30),
        _ => (lower.as_str(), 1),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| format!("`{text}` is no size: write 4096, 4k, 1m or 1g"))?;
    number
        .checked_mul(unit)
        .filter(|bytes| *bytes > 0)
        .ok_or_else(|| format!("`{text}` is zero or more than 64 bits hold"))
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(cpu) = arguments.cpu {
        let cores = core_affinity::get_core_ids().unwrap_or_default();
        let core = cores.into_iter().find(|core| core.id == cpu);
        let core = core.ok_or_else(|| format!("this process may not run on a CPU {cpu}"))?;
        if !core_affinity::set_for_current(core) {
            return Err(format!("cannot move to CPU {cpu}").into());
        }
    }
    match (&arguments.device, &arguments.model) {
        (Some(device), _) => {
            if arguments.rw.writes() && !arguments.overwrite_data {
                let rw = arguments.rw.name();
                return Err(format!(
                    "--rw {rw} would replace what is on {device}: say --overwrite-data if that may be"
                )
                .into());
            }
            let address = device.strip_prefix("pci:").ok_or_else(|| {
                format!("a device is written pci:0000:5e:00.0, which `{device}` is not")
            })?;
            measure(
                VfioTransport::claim(address.parse::<PciAddress>()?)?,
                &arguments,
            )
        }
        (None, Some(model)) => measure(Model::new(model_config(model)?)?, &arguments),
        (None, None) => Err("name a --device or a --model".into()),
    }
}

fn model_config(text: &str) -> Result<ModelConfig> {
    let mut words = text.split(',');
    if words.next() != Some("ram") {
        return Err(
            format!("a model is ram[,size=SIZE][,block_size=512], which `{text}` is not").into(),
        );
    }
    let mut config = ModelConfig {
        size: 1 << 30,
        ..ModelConfig::default()
    };
    for word in words {
        match word.split_once('=') {
            Some(("size", size)) => config.size = bytes(size)?,
            Some(("block_size", size)) => config.block_size = u32::try_from(bytes(size)?)?,
            _ => {
                return Err(
                    format!("a model knows no `{word}`: it has size and block_size").into(),
                );
            }
        }
    }
    Ok(config)
}

/// Which blocks commands work on, one after the other.
struct Blocks {
    nsid: Nsid,
    workload: Workload,
    /// Of one command.
    blocks: u32,
    /// Places for a command, side by side.
    places: u64,
    next: u64,
    random: u64,
}

impl Blocks {
    fn next_entry(&mut self) -> SubmissionEntry {
        let place = if self.workload.is_random() {
            // SplitMix64; the high half of the product is even enough for places that are far fewer than 2^64.
            self.random = self.random.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.random;
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^= z >> 31;
            // Less than `places`.
            u64::try_from((u128::from(z) * u128::from(self.places)) >> 64).unwrap_or(0)
        } else {
            let place = self.next;
            self.next = if place + 1 == self.places {
                0
            } else {
                place + 1
            };
            place
        };
        let range = LbaRange {
            slba: place * u64::from(self.blocks),
            blocks: self.blocks,
        };
        if self.workload.writes() {
            SubmissionEntry::write(self.nsid, range, false)
        } else {
            SubmissionEntry::read(self.nsid, range)
        }
    }
}

fn measure<T: Transport>(transport: T, arguments: &Arguments) -> Result<()> {
    let controller = Controller::new(transport)?;
    let mut controller = controller.enable(1).map_err(|(_, error)| error)?;
    let nsid = match arguments.nsid {
        Some(nsid) => Nsid(nsid),
        None => *controller
            .active_namespaces()?
            .first()
            .ok_or("the controller has no namespace")?,
    };
    let namespace = controller.namespace(nsid)?;
    if namespace.metadata_size != 0 {
        return Err(format!(
            "namespace {} has metadata, which is not measured here",
            nsid.0
        )
        .into());
    }
    let most = controller.max_transfer();
    let len = u32::try_from(arguments.bs)
        .ok()
        .filter(|len| *len <= most && len.is_multiple_of(namespace.block_size))
        .ok_or_else(|| {
            format!(
                "--bs {} is no multiple of blocks of {} bytes up to {most}, the most of one command",
                arguments.bs, namespace.block_size
            )
        })?;
    let blocks = len / namespace.block_size;
    let places = namespace.blocks / u64::from(blocks);
    if places == 0 {
        return Err(format!("namespace {} is smaller than --bs {len}", nsid.0).into());
    }
    let mut work = Blocks {
        nsid,
        workload: arguments.rw,
        blocks,
        places,
        next: 0,
        random: 1,
    };

    let mut queue = controller.create_queue_pair(arguments.iodepth + 1)?;
    let depth = arguments.iodepth.min(queue.depth());
    if depth < arguments.iodepth {
        return Err(
            format!("the controller's queues take only {depth} commands: lower --iodepth").into(),
        );
    }
    // A place in the buffer for each command in flight, on pages of its own.
    let stride = usize::try_from(len)?.next_multiple_of(4096);
    let size = stride * usize::from(queue.depth());
    let mut data = DmaBuffer::new(controller.dma_space(), size, DmaAccess::Both)?;
    if arguments.rw.writes() {
        // Not zeroes, and no two blocks alike: SSDs take short cuts.
        let noise: Vec<u8> = (0..size as u64 / 8)
            .flat_map(|i| (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
            .collect();
        data.write_bytes(0, &noise);
    }
    println!(
        "{}: namespace {} of {} blocks of {} bytes; rw={} bs={len} iodepth={depth}, one queue pair, ramp_time={}s runtime={}s",
        controller.name(),
        nsid.0,
        namespace.blocks,
        namespace.block_size,
        arguments.rw.name(),
        arguments.ramp_time,
        arguments.runtime,
    );

    let ramp = Duration::try_from_secs_f64(arguments.ramp_time)?;
    let runtime = Duration::try_from_secs_f64(arguments.runtime)?;
    let mut run = Run::new(depth)?;
    run.poll_until(&mut queue, &mut work, &data, (len, stride), ramp)?;
    run.begin_measuring();
    run.poll_until(&mut queue, &mut work, &data, (len, stride), runtime)?;
    let elapsed = Duration::from_nanos(run.last_round - run.started);
    let counters = queue.counters();
    run.drain(&mut queue)?;
    run.report(elapsed, len);
    let resent = counters.resent;
    if resent + counters.anomalies != 0 {
        println!(
            "  sent again {resent}, impossible completions {}",
            counters.anomalies
        );
    }
    controller.delete_queue_pair(queue)?;
    drop(data);
    controller.shutdown().map_err(|(_, error)| error)?;
    Ok(())
}

/// What was measured since [`Run::begin_measuring`].
struct Run {
    depth: u16,
    /// By command identifier.
    in_flight: Vec<InFlight>,
    /// Places in the data buffer, one for each command.
    free_places: Vec<usize>,
    epoch: Instant,
    /// When measuring began: the round before it.
    started: u64,
    /// When the last round began. Nothing of what came later was seen.
    last_round: u64,
    /// Nanoseconds, three digits exact.
    latencies: Histogram<u64>,
    rounds: u64,
    idle_rounds: u64,
}

#[derive(Clone, Copy)]
struct InFlight {
    place: usize,
    /// When it was submitted, in nanoseconds since the epoch.
    since: u64,
}

/// No command takes longer: then something is broken.
const DEADLINE: Duration = Duration::from_secs(30);

impl Run {
    fn new(depth: u16) -> Result<Run> {
        Ok(Run {
            depth,
            in_flight: vec![InFlight { place: 0, since: 0 }; usize::from(depth)],
            free_places: (0..usize::from(depth)).collect(),
            epoch: Instant::now(),
            started: 0,
            last_round: 0,
            latencies: Histogram::new_with_bounds(1, DEADLINE.as_nanos().try_into()?, 3)?,
            rounds: 0,
            idle_rounds: 0,
        })
    }

    fn begin_measuring(&mut self) {
        self.latencies.reset();
        (self.rounds, self.idle_rounds) = (0, 0);
        self.started = self.last_round;
    }

    fn now(&self) -> u64 {
        u64::try_from(self.epoch.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }

    /// Keeps `depth` commands in flight for `duration`.
    fn poll_until<T: Transport>(
        &mut self,
        queue: &mut QueuePair<T>,
        work: &mut Blocks,
        data: &DmaBuffer,
        (len, stride): (u32, usize),
        duration: Duration,
    ) -> Result<()> {
        let end = self.now() + u64::try_from(duration.as_nanos())?;
        let mut last_completion = self.now();
        loop {
            let now = self.now(); // the round's one look at the clock
            if now >= end {
                return Ok(());
            }
            self.last_round = now;
            if self.complete(queue, now)? > 0 {
                last_completion = now;
            } else if now - last_completion > u64::try_from(DEADLINE.as_nanos())? {
                return Err(format!("no completion for {DEADLINE:?}").into());
            }
            while queue.outstanding() < self.depth {
                // As many as commands that may be in flight.
                let place = self.free_places.pop().ok_or("no place for data is free")?;
                let segment = DataSegment {
                    iova: data.iova(place * stride),
                    len,
                };
                let cid = queue
                    .submit(work.next_entry(), std::iter::once(segment), len)
                    .map_err(|error| format!("cannot submit: {error:?}"))?;
                self.in_flight[cid.index()] = InFlight { place, since: now };
            }
            queue.ring();
        }
    }

    /// One round of completions: how many there were.
    fn complete<T: Transport>(&mut self, queue: &mut QueuePair<T>, now: u64) -> Result<u32> {
        queue.service();
        let mut count = 0;
        while let Some(completion) = queue.poll() {
            if !completion.status.is_success() {
                return Err(format!("a command failed: {}", completion.status).into());
            }
            let InFlight { place, since } = self.in_flight[completion.cid.index()];
            self.free_places.push(place);
            let latency = now - since;
            self.latencies.saturating_record(latency.max(1));
            count += 1;
        }
        self.rounds += 1;
        self.idle_rounds += u64::from(count == 0);
        Ok(count)
    }

    /// Waits for what is in flight; it is not measured.
    fn drain<T: Transport>(&mut self, queue: &mut QueuePair<T>) -> Result<()> {
        let start = Instant::now();
        while queue.outstanding() > 0 {
            queue.service();
            while queue.poll().is_some() {}
            if start.elapsed() > DEADLINE {
                return Err(format!("commands in flight do not end within {DEADLINE:?}").into());
            }
        }
        Ok(())
    }

    fn report(&self, elapsed: Duration, len: u32) {
        let seconds = elapsed.as_secs_f64();
        let commands = self.latencies.len();
        let iops = commands as f64 / seconds;
        let mib = iops * f64::from(len) / f64::from(1 << 20);
        println!("  IOPS {iops:.0}, BW {mib:.1} MiB/s, {commands} commands in {seconds:.3} s");
        let micros = |nanos: f64| nanos / 1000.0;
        let at = |quantile| micros(self.latencies.value_at_quantile(quantile) as f64);
        println!(
            "  lat (usec): mean {:.2}, p50 {:.2}, p99 {:.2}, p99.9 {:.2}, max {:.2}",
            micros(self.latencies.mean()),
            at(0.5),
            at(0.99),
            at(0.999),
            micros(self.latencies.max() as f64),
        );
        println!(
            "  polling: {} rounds of {:.2} usec, {:.0} % of them without a completion",
            self.rounds,
            micros(elapsed.as_nanos() as f64 / self.rounds.max(1) as f64),
            100.0 * self.idle_rounds as f64 / self.rounds.max(1) as f64,
        );
    }
}
