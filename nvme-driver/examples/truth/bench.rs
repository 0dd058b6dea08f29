//! A controller with one I/O queue pair, memory for its data, and the transcript: what cases are made of.

use std::fmt::Write;
use std::time::{Duration, Instant};

use nvme_driver::dma::{DmaAccess, DmaBuffer};
use nvme_driver::spec::{LbaRange, Nsid, PAGE_SIZE, Status, SubmissionEntry};
use nvme_driver::transport::Transport;
use nvme_driver::{AdminCompletion, Controller, Enabled, QueuePair};

use crate::Result;
use crate::rng::Rng;

/// I/O queue pairs that are asked for: all that the controllers have.
pub const QUEUES: u16 = 8;
/// Pages of the data buffer: the largest transfer (MDTS of 128 KiB and one block), an odd start, and what must stay
/// untouched behind.
const DATA_PAGES: usize = 40;
/// Pages of the PRP lists: one may go on in the next.
const LIST_PAGES: usize = 2;
/// What the data buffer holds before a command that stores into it.
const UNTOUCHED: u8 = 0xa5;
const DEADLINE: Duration = Duration::from_secs(20);

/// A case: commands to send and lines to write.
pub type Case<T> = fn(&mut Bench<T>) -> Result<()>;

type Live<T> = Controller<T, Enabled<T>>;

pub struct Bench<T: Transport> {
    pub controller: Live<T>,
    queue: Option<QueuePair<T>>,
    /// The data of commands.
    pub data: DmaBuffer,
    lists: DmaBuffer,
    /// Memory of I/O queues that are created and deleted, and never rung.
    pub rings: DmaBuffer,
    pub rng: Rng,
    pub nsid: Nsid,
    pub blocks: u64,
    pub block_size: usize,
    /// The most blocks of one command that moves data.
    pub max_blocks: u32,
    seed: u64,
    lines: Vec<String>,
    /// Reads that succeeded: Read and Compare.
    pub reads: u64,
    pub writes: u64,
    /// What the controller's counters of both were in the beginning.
    pub counted_before: (u128, u128),
}

/// Where the bytes of a command are in the data buffer: PRP entries, and the same as pieces of (offset, length).
pub struct Placement {
    pub prp1: u64,
    pub prp2: u64,
    pieces: Vec<(usize, usize)>,
}

/// What one command was answered with, on its way into the transcript.
pub struct Line {
    text: String,
}

impl Line {
    pub fn add(&mut self, key: &str, value: impl std::fmt::Display) {
        // Writing to a string does not fail.
        let _ = write!(self.text, " {key}={value}");
    }

    pub fn add_hex(&mut self, key: &str, value: impl std::fmt::LowerHex) {
        self.add(key, format_args!("{value:x}"));
    }

    fn add_status(&mut self, status: Status) {
        self.add(
            "status",
            format_args!("{:x}/{:02x}", status.sct(), status.sc()),
        );
        self.add("dnr", u8::from(!status.may_retry()));
    }
}

impl<T: Transport> Bench<T> {
    pub fn new(mut controller: Live<T>, seed: u64) -> Result<Bench<T>> {
        let nsid = controller.active_namespaces()?.first().copied();
        let nsid = nsid.ok_or("the controller has no namespace")?;
        let namespace = controller.namespace(nsid)?;
        let smart = controller.smart_log()?;
        let buffer = |pages: usize| {
            DmaBuffer::new(controller.dma_space(), pages * PAGE_SIZE, DmaAccess::Both)
        };
        let (data, lists, rings) = (buffer(DATA_PAGES)?, buffer(LIST_PAGES)?, buffer(2)?);
        Ok(Bench {
            queue: None,
            data,
            lists,
            rings,
            rng: Rng::new(seed),
            nsid,
            blocks: namespace.blocks,
            block_size: usize::try_from(namespace.block_size)?,
            max_blocks: controller.max_transfer() / namespace.block_size,
            controller,
            seed,
            lines: Vec::new(),
            reads: 0,
            writes: 0,
            counted_before: (
                u128::from_le_bytes(smart.host_read_commands),
                u128::from_le_bytes(smart.host_write_commands),
            ),
        })
    }

    pub fn create_queue_pair(&mut self) -> Result<()> {
        self.queue = Some(self.controller.create_queue_pair(64)?);
        Ok(())
    }

    /// The controller, and the transcript so far.
    pub fn finish(mut self) -> Result<(Live<T>, Vec<String>)> {
        if let Some(queue) = self.queue.take() {
            if queue.counters().anomalies != 0 {
                return Err(format!("impossible completions: {:?}", queue.counters()).into());
            }
            self.controller.delete_queue_pair(queue)?;
        }
        Ok((self.controller, self.lines))
    }

    /// Identifiers of which the next is: above NN, so that no namespace can ever have it.
    pub fn invalid_nsid(&mut self) -> Nsid {
        let nn = u64::from(self.controller.identity().nn.get());
        Nsid(u32::try_from(nn + 1 + self.rng.within(0, 1000)).unwrap_or(u32::MAX - 1))
    }

    /// Valid (at most NN), with no namespace.
    pub fn inactive_nsid(&mut self) -> Nsid {
        let nn = self.controller.identity().nn.get();
        let inactive = self.rng.within(u64::from(self.nsid.0) + 1, u64::from(nn));
        Nsid(u32::try_from(inactive).unwrap_or(u32::MAX))
    }

    // ---- sending ----

    fn line(&self, case: &str, entry: &SubmissionEntry) -> Line {
        let mut text = format!(
            "{}.{} {case} [{:02x}",
            self.seed,
            self.lines.len(),
            entry.opcode
        );
        // Addresses are the transport's, and say nothing to anybody else: where in its page a pointer points is enough.
        let page = PAGE_SIZE as u64;
        for (name, value) in [
            ("flags", u64::from(entry.flags)),
            ("nsid", entry.nsid.get().into()),
            ("prp1", entry.prp1.get() % page),
            ("prp2", entry.prp2.get() % page),
            ("10", entry.cdw10.get().into()),
            ("11", entry.cdw11.get().into()),
            ("12", entry.cdw12.get().into()),
            ("13", entry.cdw13.get().into()),
        ] {
            if value != 0 {
                let _ = write!(text, " {name}:{value:x}");
            }
        }
        text.push(']');
        Line { text }
    }

    /// A line of no command: what is put together from several.
    pub fn other_line(&self, case: &str) -> Line {
        Line {
            text: format!("{}.{} {case} []", self.seed, self.lines.len()),
        }
    }

    pub fn record(&mut self, line: Line) {
        self.lines.push(line.text);
    }

    /// Sends an admin command and begins its line; what it returned besides is the case's to add.
    pub fn admin(&mut self, case: &str, entry: SubmissionEntry) -> Result<(AdminCompletion, Line)> {
        let completion = self.controller.admin_command(entry)?;
        let mut line = self.line(case, &entry);
        line.add_status(completion.status);
        Ok((completion, line))
    }

    /// An admin command of which only the status matters.
    pub fn admin_status(&mut self, case: &str, entry: SubmissionEntry) -> Result<Status> {
        let (completion, line) = self.admin(case, entry)?;
        self.record(line);
        Ok(completion.status)
    }

    /// An admin command that answers by dword 0 of its completion.
    pub fn admin_dw0(&mut self, case: &str, entry: SubmissionEntry) -> Result<()> {
        let (completion, mut line) = self.admin(case, entry)?;
        if completion.status.is_success() {
            line.add_hex("dw0", completion.dw0);
        }
        self.record(line);
        Ok(())
    }

    /// Sends an I/O command without a line.
    pub fn send(&mut self, entry: SubmissionEntry) -> Result<Status> {
        let queue = self.queue.as_mut().ok_or("there is no queue pair yet")?;
        queue
            .submit_raw(entry)
            .map_err(|error| format!("{error:?}"))?;
        queue.ring();
        let start = Instant::now();
        loop {
            queue.service();
            if let Some(completion) = queue.poll() {
                return Ok(completion.status);
            }
            if start.elapsed() > DEADLINE {
                return Err(format!("no completion of {entry:?} within {DEADLINE:?}").into());
            }
        }
    }

    pub fn io(&mut self, case: &str, entry: SubmissionEntry) -> Result<(Status, Line)> {
        let status = self.send(entry)?;
        let mut line = self.line(case, &entry);
        line.add_status(status);
        Ok((status, line))
    }

    /// An I/O command of which only the status matters.
    pub fn io_status(&mut self, case: &str, entry: SubmissionEntry) -> Result<Status> {
        let (status, line) = self.io(case, entry)?;
        self.record(line);
        Ok(status)
    }

    // ---- data ----

    /// Places `len` bytes at a dword offset of the data buffer, on pages in any order, and makes their PRP entries. A
    /// list begins anywhere in the first list page; what it does not hold goes on in the second.
    pub fn place(&mut self, len: usize) -> Placement {
        let start = self.rng.index(PAGE_SIZE / 4) * 4;
        self.place_at(start, len)
    }

    /// The same, from byte `start` of a page.
    pub fn place_at(&mut self, start: usize, len: usize) -> Placement {
        let mut pages: Vec<usize> = (0..DATA_PAGES).collect();
        self.rng.shuffle(&mut pages);
        let (mut pieces, mut left, mut offset) = (Vec::new(), len, start);
        for page in pages {
            let piece = left.min(PAGE_SIZE - offset);
            pieces.push((page * PAGE_SIZE + offset, piece));
            left -= piece;
            offset = 0;
            if left == 0 {
                break;
            }
        }
        let iovas = pieces.iter().map(|(offset, _)| self.data.iova(*offset).0);
        let iovas: Vec<u64> = iovas.collect();
        let prp2 = match iovas.as_slice() {
            [] | [_] => 0,
            [_, second] => *second,
            [_, rest @ ..] => self.write_list(rest),
        };
        Placement {
            prp1: iovas[0],
            prp2,
            pieces,
        }
    }

    fn write_list(&mut self, entries: &[u64]) -> u64 {
        let room = PAGE_SIZE / 8;
        // Half of them do not end in the first page.
        let first = match self.rng.within(0, 1) {
            0 => self.rng.index(room - entries.len()),
            _ => room - 1 - self.rng.index(entries.len() - 1),
        };
        let fits = entries.len() <= room - first;
        for (i, entry) in entries.iter().enumerate() {
            // The last entry of the first page points to the second, unless it is the last of all.
            let at = first + i;
            let at = if fits || at < room - 1 { at } else { at + 1 };
            self.lists.write(at * 8, &entry.to_le_bytes());
        }
        if !fits {
            let next = self.lists.iova(PAGE_SIZE).0.to_le_bytes();
            self.lists.write((room - 1) * 8, &next);
        }
        self.lists.iova(first * 8).0
    }

    /// Makes entry `i` of the list at `prp2`, which lies in the first list page, point `by` bytes further.
    pub fn bend_list(&mut self, prp2: u64, i: usize, by: u64) {
        let at = usize::try_from(prp2 - self.lists.iova(0).0).unwrap_or(0) + i * 8;
        let entry = u64::from_le_bytes(self.lists.read(at));
        self.lists.write(at, &(entry + by).to_le_bytes());
    }

    /// Nothing in the data buffer is a command's.
    pub fn wipe(&mut self) {
        self.data
            .write_bytes(0, &[UNTOUCHED; DATA_PAGES * PAGE_SIZE]);
    }

    pub fn put(&mut self, placement: &Placement, bytes: &[u8]) {
        let mut rest = bytes;
        for (offset, len) in &placement.pieces {
            let (piece, after) = rest.split_at((*len).min(rest.len()));
            self.data.write_bytes(*offset, piece);
            rest = after;
        }
    }

    pub fn get(&self, placement: &Placement) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (offset, len) in &placement.pieces {
            let mut piece = vec![0; *len];
            self.data.read_bytes(*offset, &mut piece);
            bytes.extend_from_slice(&piece);
        }
        bytes
    }

    /// Bytes of the wiped data buffer outside `placement` that were stored to.
    pub fn strayed(&self, placement: &Placement) -> usize {
        let mut bytes = vec![0; self.data.len()];
        self.data.read_bytes(0, &mut bytes);
        for (offset, len) in &placement.pieces {
            bytes[*offset..*offset + *len].fill(UNTOUCHED);
        }
        bytes.iter().filter(|byte| **byte != UNTOUCHED).count()
    }

    pub fn random_bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.rng.fill(&mut bytes);
        bytes
    }

    /// A range of the part of the namespace that the transcript watches: mostly small.
    pub fn some_range(&mut self) -> LbaRange {
        let most = u64::from(self.max_blocks);
        let limit = self.rng.pick(&[1, 8.min(most), 8.min(most), most]);
        let blocks = self.rng.within(1, limit);
        let slba = self.rng.within(0, self.watched() - blocks);
        let blocks = u32::try_from(blocks).unwrap_or(1);
        LbaRange { slba, blocks }
    }

    /// Blocks from 0 whose contents the transcript watches; the last blocks of the namespace are watched as well.
    pub fn watched(&self) -> u64 {
        4 * u64::from(self.max_blocks)
    }

    pub fn bytes(&self, blocks: u32) -> usize {
        usize::try_from(blocks).unwrap_or(0) * self.block_size
    }
}

/// Enough to tell data apart: `zero`, `untouched`, or a hash (FNV-1a).
pub fn describe(bytes: &[u8]) -> String {
    if bytes.iter().all(|byte| *byte == 0) {
        return "zero".to_owned();
    }
    if bytes.iter().all(|byte| *byte == UNTOUCHED) {
        return "untouched".to_owned();
    }
    let hash = bytes.iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}
