//! `--device`: straight on the NVMe driver, one queue pair for each job.

use anyhow::{Context, bail};
use nvme_driver::dma::{DmaAccess, DmaBuffer, Run};
use nvme_driver::spec::{LbaRange, Nsid, SubmissionEntry, oncs};
use nvme_driver::transport::Transport;
use nvme_driver::{Controller, DataSegment, Enabled, QueuePair};

use super::engine::{Done, Queue};
use super::io::{Io, Op, Random};
use super::stats::Counters;
use super::target::{Info, Keeper, Needs, Pool, Target};
use crate::config::{ControllerConfig, DeviceConfig, Medium};
use crate::control::claim;
use crate::control::device::Interrupts;

/// Opens the controller and a queue pair for each job.
///
/// # Errors
/// When it does not come up, or cannot do what is needed of it.
pub fn open(config: &DeviceConfig, needs: &Needs) -> anyhow::Result<Box<dyn Target>> {
    match &config.controller {
        ControllerConfig::Pci(target) => {
            let address = claim::locate(config, target)?;
            open_on(
                nvme_driver::vfio::VfioTransport::claim_with(address, config.isolation)?,
                &target.to_string(),
                needs,
            )
        }
        ControllerConfig::Model(model) => {
            let medium = match &model.medium {
                Medium::Ram { .. } => "model:ram".to_owned(),
                Medium::File { path, .. } => format!("model:file,path={}", path.display()),
                Medium::Null { .. } => "model:null".to_owned(),
            };
            let target = open_on(
                claim::make_model(&config.name, model, Interrupts::Off)?,
                &medium,
                needs,
            )?;
            if needs.verify && !model.medium.keeps_data() {
                let _ = target.close();
                bail!("--verify: {medium} keeps nothing that could be verified: use model:ram");
            }
            Ok(target)
        }
    }
}

fn open_on<T: Transport + 'static>(
    transport: T,
    name: &str,
    needs: &Needs,
) -> anyhow::Result<Box<dyn Target>>
where
    T::Port: 'static,
{
    let wanted = u16::try_from(needs.queues).unwrap_or(u16::MAX);
    let mut controller = Controller::new(transport)?
        .enable(wanted)
        .map_err(|(_, error)| error)?;
    let nsid = *controller
        .active_namespaces()?
        .first()
        .context("the controller has no namespace: create one (nvme create-ns)")?;
    let namespace = controller.namespace(nsid)?;
    if namespace.metadata_size != 0 {
        bail!(
            "namespace {} has metadata, which is not measured here: format it without",
            nsid.0
        );
    }
    let most = controller.max_transfer();
    if needs.bs > most || !needs.bs.is_multiple_of(namespace.block_size) {
        bail!(
            "--bs {} is no multiple of blocks of {} bytes up to {most}, the most of one command of {name}",
            needs.bs,
            namespace.block_size
        );
    }
    if needs.writes && namespace.write_protected {
        bail!(
            "namespace {} of {name} is write protected: it can only be read",
            nsid.0
        );
    }
    if needs.trims && !controller.identity().supports(oncs::DATASET_MANAGEMENT) {
        bail!("{name} has no Dataset Management: it cannot be trimmed");
    }
    let granted = u32::from(controller.granted_queue_pairs());
    if granted < needs.queues {
        bail!(
            "{name} grants {granted} queue pairs: --numjobs {} needs one each",
            needs.queues
        );
    }
    let mut queues = Vec::new();
    for index in 0..needs.queues {
        queues.push(DeviceQueue::new(
            &mut controller,
            nsid,
            namespace.block_size,
            needs,
            index,
        )?);
    }
    let info = Info {
        name: name.to_owned(),
        description: format!(
            "{}, NVMe {}, namespace {} of {} blocks of {} bytes, {} queue pair(s)",
            controller.name(),
            controller.version(),
            nsid.0,
            namespace.blocks,
            namespace.block_size,
            needs.queues
        ),
        capacity: namespace.blocks * u64::from(namespace.block_size),
        block: namespace.block_size,
        server: None,
        ring: None,
        stages: None,
        doorbells: "doorbells",
    };
    Ok(Box::new(Pool {
        info,
        queues,
        keeper: controller,
    }))
}

impl<T: Transport> Keeper<DeviceQueue<T>> for Controller<T, Enabled<T>> {
    fn close(mut self, queues: Vec<DeviceQueue<T>>) -> anyhow::Result<()> {
        for queue in queues {
            // The buffer goes after its queue: the device may write there until then.
            let DeviceQueue { queue, data, .. } = queue;
            self.delete_queue_pair(queue)?;
            drop(data);
        }
        self.shutdown().map(drop).map_err(|(_, error)| error.into())
    }
}

/// One queue pair, and a buffer for each slot on pages of its own.
struct DeviceQueue<T: Transport> {
    queue: QueuePair<T>,
    data: DmaBuffer,
    stride: usize,
    nsid: Nsid,
    block_shift: u32,
    /// By command identifier.
    slots: Vec<u32>,
}

impl<T: Transport> DeviceQueue<T> {
    fn new(
        controller: &mut Controller<T, Enabled<T>>,
        nsid: Nsid,
        block_size: u32,
        needs: &Needs,
        index: u32,
    ) -> anyhow::Result<DeviceQueue<T>> {
        let entries = u16::try_from(needs.depth + 1).unwrap_or(u16::MAX);
        let queue = controller.create_queue_pair(entries)?;
        if u32::from(queue.depth()) < needs.depth {
            bail!(
                "{}'s queues take {} commands: lower --iodepth {}",
                controller.name(),
                queue.depth(),
                needs.depth
            );
        }
        let stride = (needs.bs as usize).next_multiple_of(4096);
        let size = stride * needs.depth as usize;
        let mut data = DmaBuffer::new(controller.dma_space(), size, DmaAccess::Both)?;
        if needs.writes {
            data.write_bytes(0, &noise(size, index));
        }
        Ok(DeviceQueue {
            slots: vec![0; usize::from(queue.depth())],
            queue,
            data,
            stride,
            nsid,
            block_shift: block_size.ilog2(),
        })
    }
}

/// A piece of a request's data: at most `io.len` bytes, which 32 bits hold.
#[inline]
fn as_segment(run: Run) -> DataSegment {
    DataSegment {
        iova: run.iova,
        len: u32::try_from(run.len).unwrap_or(u32::MAX),
    }
}

/// Not zeroes, and no two blocks alike: SSDs take short cuts.
pub fn noise(bytes: usize, seed: u32) -> Vec<u8> {
    let mut random = Random::new(u64::from(seed) + 1);
    let words = (0..bytes.div_ceil(8)).flat_map(|_| random.next().to_le_bytes());
    words.take(bytes).collect()
}

impl<T: Transport> Queue for DeviceQueue<T> {
    #[inline]
    fn submit(&mut self, slot: u32, io: Io) -> anyhow::Result<()> {
        let range = LbaRange {
            slba: io.offset >> self.block_shift,
            blocks: io.len >> self.block_shift,
        };
        let at = slot as usize * self.stride;
        let segments = self.data.pieces(at, io.len as usize).map(as_segment);
        let (queue, nsid) = (&mut self.queue, self.nsid);
        let cid = match io.op {
            Op::Read => queue.submit(SubmissionEntry::read(nsid, range), segments, io.len),
            Op::Write => queue.submit(SubmissionEntry::write(nsid, range, false), segments, io.len),
            Op::Trim => queue.submit_deallocate(nsid, std::iter::once(range)),
            Op::Flush => queue.submit_without_data(SubmissionEntry::flush(nsid)),
        };
        let cid = cid.map_err(|error| anyhow::anyhow!("cannot submit {io:?}: {error:?}"))?;
        self.slots[cid.index()] = slot;
        Ok(())
    }

    #[inline]
    fn commit(&mut self) -> anyhow::Result<()> {
        self.queue.ring();
        Ok(())
    }

    #[inline]
    fn poll(&mut self, done: &mut Vec<Done>) -> anyhow::Result<()> {
        self.queue.service();
        while let Some(completion) = self.queue.poll() {
            let failure =
                (!completion.status.is_success()).then(|| completion.status.to_wire(false) >> 1);
            done.push(Done {
                slot: self.slots[completion.cid.index()],
                failure,
            });
        }
        Ok(())
    }

    fn write_data(&mut self, slot: u32, bytes: &[u8]) {
        self.data.write_bytes(slot as usize * self.stride, bytes);
    }

    fn read_data(&self, slot: u32, bytes: &mut [u8]) {
        self.data.read_bytes(slot as usize * self.stride, bytes);
    }

    fn counters(&self) -> Counters {
        let counters = self.queue.counters();
        Counters {
            doorbells: counters.sq_doorbells + counters.cq_doorbells,
            notifications: 0,
        }
    }
}
