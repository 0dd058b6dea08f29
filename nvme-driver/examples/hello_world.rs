//! Writes a greeting to an NVMe namespace through a polled queue pair, reads it back and prints it.
//! `cargo run -p nvme-driver --example hello_world`: needs no hardware, the controller is the software model.

use std::error::Error;

use nvme_driver::dma::{DmaAccess, DmaBuffer};
use nvme_driver::spec::{LbaRange, Nsid, SubmissionEntry};
use nvme_driver::transport::Transport;
use nvme_driver::{Completion, Controller, DataSegment, QueuePair};
use nvme_model::{Model, ModelConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let transport = Model::new(ModelConfig {
        size: 1 << 20,
        ..ModelConfig::default()
    })?;
    let mut controller = Controller::new(transport)?
        .enable(1)
        .map_err(|(_, error)| error)?;
    let nsid = controller.active_namespaces()?[0];
    let block_size = controller.namespace(nsid)?.block_size;
    let mut queue = controller.create_queue_pair(64)?;

    let greeting = "Hello from a polled queue pair";
    let mut buffer = DmaBuffer::new(controller.dma_space(), block_size as usize, DmaAccess::Both)?;
    let block = LbaRange { slba: 7, blocks: 1 };

    buffer.write_bytes(0, greeting.as_bytes());
    run(
        &mut queue,
        SubmissionEntry::write(nsid, block, false),
        &buffer,
        block_size,
    )?;
    flush(&mut queue, nsid)?;

    buffer.write_bytes(0, &vec![0; block_size as usize]);
    run(
        &mut queue,
        SubmissionEntry::read(nsid, block),
        &buffer,
        block_size,
    )?;
    let mut read = vec![0; greeting.len()];
    buffer.read_bytes(0, &mut read);
    println!("{}", String::from_utf8(read)?);

    controller.delete_queue_pair(queue)?;
    drop(buffer);
    controller.shutdown().map_err(|(_, error)| error)?;
    Ok(())
}

fn run<T: Transport>(
    queue: &mut QueuePair<T>,
    entry: SubmissionEntry,
    buffer: &DmaBuffer,
    bytes: u32,
) -> Result<(), Box<dyn Error>> {
    let data = DataSegment {
        iova: buffer.iova(0),
        len: bytes,
    };
    queue
        .submit(entry, std::iter::once(data), bytes)
        .map_err(|error| format!("{error:?}"))?;
    queue.ring();
    finish(queue)
}

fn flush<T: Transport>(queue: &mut QueuePair<T>, nsid: Nsid) -> Result<(), Box<dyn Error>> {
    queue
        .submit_without_data(SubmissionEntry::flush(nsid))
        .map_err(|error| format!("{error:?}"))?;
    queue.ring();
    finish(queue)
}

/// Polls until the one outstanding command has completed.
fn finish<T: Transport>(queue: &mut QueuePair<T>) -> Result<(), Box<dyn Error>> {
    loop {
        queue.service();
        if let Some(Completion { status, .. }) = queue.poll() {
            return if status.is_success() {
                Ok(())
            } else {
                Err(status.to_string().into())
            };
        }
    }
}
