//! `--vhost-user`: a front-end of any vhost-user-blk server, with one virtqueue for each job.
//!
//! Promises that nothing the server answers makes us panic or read outside our memory: every answer has a deadline, and
//! what is impossible is an error with the server's name. Start at [`open`]; the queues' sides are in [`super::split`]
//! and [`super::packed`].

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use rustix::event::EventfdFlags;

use super::args::RingKind;
use super::packed::PackedRing;
use super::slots::{DriverRing, Memory, RingConfig, Signals, Wishes};
use super::spec::ServerSpec;
use super::split::SplitRing;
use super::stages::StageSource;
use super::target::{Info, Keeper, Needs, Pool, Target};
use crate::sim::FrontEnd;
use crate::sim::front_end::{
    Region, USER_BASE, config_request, feature, mem_table, request, vring_addr, vring_state,
};
use crate::virtio::blk;

/// How long any answer may take, and a server may take to listen.
const DEADLINE: Duration = Duration::from_secs(15);
const PATIENCE: Duration = Duration::from_secs(3);
/// The longest answer: a configuration, with its header.
const LONGEST_ANSWER: usize = 12 + 256;
/// Bytes of the configuration up to `write_zeroes_may_unmap` and its padding.
const CONFIG_BYTES: u32 = 60;

const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

const PROTOCOL_MQ: u64 = 1 << 0;
const PROTOCOL_REPLY_ACK: u64 = 1 << 3;
const PROTOCOL_CONFIG: u64 = 1 << 9;

/// Connects, shares memory and starts a virtqueue for each job.
///
/// # Errors
/// When nobody listens, or the server cannot do what is needed of it.
pub fn open(spec: &ServerSpec, all: Wishes, needs: &Needs) -> anyhow::Result<Box<dyn Target>> {
    let wishes = spec.wishes(all);
    let target = match wishes.ring {
        RingKind::Split => connect::<SplitRing>(spec, wishes, needs),
        RingKind::Packed => connect::<PackedRing>(spec, wishes, needs),
    };
    target.with_context(|| format!("vhost-user server {}", spec.text))
}

fn connect<R: DriverRing + 'static>(
    spec: &ServerSpec,
    wishes: Wishes,
    needs: &Needs,
) -> anyhow::Result<Box<dyn Target>> {
    let wire = Wire::connect(&spec.path)?;
    let offered = wire.ask_u64(request::GET_FEATURES)?;
    ensure!(
        offered & feature::F_VERSION_1 != 0,
        "it does not offer VIRTIO_F_VERSION_1, without which its rings are another format"
    );
    ensure!(
        wishes.ring == RingKind::Split || offered & feature::F_RING_PACKED != 0,
        "it does not offer VIRTIO_F_RING_PACKED: use ring=split"
    );
    let mut wire = wire;
    if offered & feature::F_PROTOCOL != 0 {
        let protocol = wire.ask_u64(request::GET_PROTOCOL_FEATURES)?
            & (PROTOCOL_MQ | PROTOCOL_REPLY_ACK | PROTOCOL_CONFIG);
        wire.send(request::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
        wire.protocol = protocol;
    }
    let most = match wire.protocol & PROTOCOL_MQ {
        0 => 1,
        _ => wire.ask_u64(request::GET_QUEUE_NUM)?,
    };
    ensure!(
        u64::from(needs.queues) <= most,
        "it has {most} virtqueue(s): --numjobs {} needs one each",
        needs.queues
    );
    wire.send(request::SET_OWNER, &[], &[])?;
    ensure!(
        wire.protocol & PROTOCOL_CONFIG != 0,
        "it has no configuration space (VHOST_USER_PROTOCOL_F_CONFIG): is it a block device?"
    );
    let disk = Disk::parse(offered, &wire.config()?)?;
    disk.check(needs)?;
    let features = choose(offered, wishes, needs);
    let granted = Wishes {
        indirect: features & feature::F_INDIRECT != 0,
        event_idx: features & feature::F_EVENT_IDX != 0,
        ..wishes
    };
    let config = RingConfig::new(needs, granted)?;
    let memory = Arc::new(Memory::new(
        config.bytes() * u64::from(needs.queues),
        wishes.hugepages,
    )?);
    wire.send(request::SET_FEATURES, &features.to_le_bytes(), &[])?;
    let region = Region {
        gpa: 0,
        size: memory.len(),
        user_addr: USER_BASE,
        mmap_offset: 0,
    };
    let table = mem_table(&[region]);
    wire.confirmed(request::SET_MEM_TABLE, &table, &[memory.file().as_fd()])?;
    let mut queues = Vec::new();
    for index in 0..needs.queues {
        queues.push(wire.start::<R>(index, features, config, &memory)?);
    }
    let server = spec.pid.or_else(|| wire.server());
    let switch = |on: bool| if on { "on" } else { "off" };
    let info = Info {
        name: spec.text.clone(),
        description: format!(
            "vhost-user-blk{}, {} bytes in blocks of {}, {} of {most} {} virtqueue(s) of {} entries, indirect {}, event_idx {}, interrupts {}{}",
            server.map_or_else(String::new, |pid| format!(" of {}", process_name(pid))),
            disk.capacity,
            disk.block,
            needs.queues,
            config.ring,
            config.size,
            switch(config.indirect),
            switch(config.event_idx),
            wishes.interrupts,
            if wishes.hugepages { ", huge pages" } else { "" },
        ),
        capacity: disk.capacity,
        block: disk.block,
        server,
        ring: Some(config.ring),
        stages: spec.stats.clone().map(|stats| StageSource {
            stats,
            socket: spec.path.clone(),
        }),
        doorbells: "kicks",
    };
    Ok(Box::new(Pool {
        info,
        queues,
        keeper: wire,
    }))
}

fn choose(offered: u64, wishes: Wishes, needs: &Needs) -> u64 {
    let wanted = [
        (feature::F_PROTOCOL, true),
        (feature::F_VERSION_1, true),
        (blk::feature::BLK_SIZE, true),
        (feature::F_FLUSH, true),
        (blk::feature::MQ, needs.queues > 1),
        (blk::feature::DISCARD, needs.trims),
        (feature::F_INDIRECT, wishes.indirect),
        (feature::F_EVENT_IDX, wishes.event_idx),
        (feature::F_RING_PACKED, wishes.ring == RingKind::Packed),
    ];
    let wanted = wanted.iter().filter(|(_, wanted)| *wanted);
    wanted.fold(0, |bits, (bit, _)| bits | bit) & offered
}

/// What the configuration says (virtio 1.2, 5.2.4), and what was offered.
struct Disk {
    capacity: u64,
    block: u32,
    offered: u64,
}

impl Disk {
    fn parse(offered: u64, config: &[u8]) -> anyhow::Result<Disk> {
        let half = |at: usize| {
            let bytes = config
                .get(at..at + 4)
                .and_then(|bytes| bytes.try_into().ok());
            bytes.map_or(0, u32::from_le_bytes)
        };
        let sectors = u64::from(half(0)) | u64::from(half(4)) << 32;
        let block = match offered & blk::feature::BLK_SIZE {
            0 => 512,
            _ => half(20),
        };
        let capacity = sectors.checked_mul(512);
        let (Some(capacity), true) = (
            capacity,
            block.is_power_of_two() && (512..=65536).contains(&block),
        ) else {
            bail!("its configuration makes no sense: {sectors} sectors, blocks of {block} bytes");
        };
        Ok(Disk {
            capacity,
            block,
            offered,
        })
    }

    fn check(&self, needs: &Needs) -> anyhow::Result<()> {
        let has = |bit| self.offered & bit != 0;
        ensure!(
            !(has(blk::feature::RO) && (needs.writes || needs.trims)),
            "the disk is read-only"
        );
        ensure!(
            !needs.trims || has(blk::feature::DISCARD),
            "it does not offer VIRTIO_BLK_F_DISCARD: it cannot be trimmed"
        );
        ensure!(
            !needs.flushes || has(feature::F_FLUSH),
            "it does not offer VIRTIO_BLK_F_FLUSH: drop --fsync"
        );
        Ok(())
    }
}

/// The connection.
struct Wire {
    front_end: FrontEnd,
    protocol: u64,
}

impl Wire {
    fn connect(path: &std::path::Path) -> anyhow::Result<Wire> {
        let start = Instant::now();
        let socket = loop {
            match UnixStream::connect(path) {
                Ok(socket) => break socket,
                Err(error) if start.elapsed() > PATIENCE => {
                    return Err(error).context("cannot connect: is it running?");
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        };
        socket.set_read_timeout(Some(DEADLINE))?;
        Ok(Wire {
            front_end: FrontEnd { socket },
            protocol: 0,
        })
    }

    fn send(&self, request: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> anyhow::Result<()> {
        let message = FrontEnd::message(request, VERSION, payload);
        let sent = self.front_end.send_raw(&message, fds);
        sent.with_context(|| format!("cannot send message {request}"))
    }

    fn receive(&self, request: u32) -> anyhow::Result<Vec<u8>> {
        let mut socket = &self.front_end.socket;
        let what = || format!("no answer to message {request}");
        let mut header = [0; 12];
        socket.read_exact(&mut header).with_context(what)?;
        let (words, _) = header.as_chunks::<4>();
        let word = |index: usize| words.get(index).map_or(0, |word| u32::from_le_bytes(*word));
        let len = word(2) as usize;
        if word(0) != request || word(1) & REPLY == 0 || len > LONGEST_ANSWER {
            bail!(
                "its answer to message {request} is message {}, flags {:#x}, {len} bytes",
                word(0),
                word(1)
            );
        }
        let mut payload = vec![0; len];
        socket.read_exact(&mut payload).with_context(what)?;
        Ok(payload)
    }

    fn ask_u64(&self, request: u32) -> anyhow::Result<u64> {
        self.send(request, &[], &[])?;
        self.number(request)
    }

    fn number(&self, request: u32) -> anyhow::Result<u64> {
        let answer = self.receive(request)?;
        let bytes = answer.as_slice().try_into();
        let bytes = bytes.map_err(|_| {
            anyhow::anyhow!(
                "its answer to message {request} has {} bytes, not 8",
                answer.len()
            )
        })?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Sends and waits until the server has done it.
    fn confirmed(
        &self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> anyhow::Result<()> {
        if self.protocol & PROTOCOL_REPLY_ACK == 0 {
            self.send(request, payload, fds)?;
            // Messages are taken in order: an answer to this one means that the other was read.
            return self.ask_u64(request::GET_FEATURES).map(drop);
        }
        let message = FrontEnd::message(request, VERSION | NEED_REPLY, payload);
        self.front_end.send_raw(&message, fds)?;
        match self.number(request)? {
            0 => Ok(()),
            code => bail!("it refuses message {request} with {code}"),
        }
    }

    fn config(&self) -> anyhow::Result<Vec<u8>> {
        self.send(request::GET_CONFIG, &config_request(0, CONFIG_BYTES), &[])?;
        let answer = self.receive(request::GET_CONFIG)?;
        let config = answer.get(12..).unwrap_or_default();
        // Up to `blk_size`.
        ensure!(
            config.len() >= 24,
            "its configuration has {} bytes",
            config.len()
        );
        Ok(config.to_vec())
    }

    /// Starts one virtqueue, in the order of QEMU.
    fn start<R: DriverRing>(
        &self,
        index: u32,
        features: u64,
        config: RingConfig,
        memory: &Arc<Memory>,
    ) -> anyhow::Result<R> {
        let (kick, call) = (eventfd()?, eventfd()?);
        let base = config.bytes() * u64::from(index);
        let at = config.addresses(base);
        let [descriptors, avail, used] = at.map(|gpa| USER_BASE + gpa);
        let size = vring_state(index, config.size.into());
        self.send(request::SET_VRING_NUM, &size, &[])?;
        self.send(request::SET_VRING_BASE, &vring_state(index, R::START), &[])?;
        let addresses = vring_addr(index, descriptors, used, avail);
        self.send(request::SET_VRING_ADDR, &addresses, &[])?;
        let which = u64::from(index).to_le_bytes();
        // The ring says whether signals are wanted before the server may look.
        let signals = Signals::new(kick.try_clone()?, call.try_clone()?);
        let ring = R::new(Arc::clone(memory), base, config, signals);
        self.send(request::SET_VRING_CALL, &which, &[call.as_fd()])?;
        self.send(request::SET_VRING_KICK, &which, &[kick.as_fd()])?;
        if features & feature::F_PROTOCOL != 0 {
            self.confirmed(request::SET_VRING_ENABLE, &vring_state(index, 1), &[])?;
        }
        Ok(ring)
    }

    /// Who listens, if that is another process whose figures we may read.
    fn server(&self) -> Option<u32> {
        let peer = rustix::net::sockopt::socket_peercred(&self.front_end.socket).ok()?;
        let pid = u32::try_from(peer.pid.as_raw_nonzero().get()).ok()?;
        (pid != std::process::id()).then_some(pid)
    }
}

fn process_name(pid: u32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
    format!("{} (process {pid})", name.trim())
}

fn eventfd() -> anyhow::Result<File> {
    let flags = EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC;
    Ok(File::from(rustix::event::eventfd(0, flags)?))
}

impl<R: DriverRing> Keeper<R> for Wire {
    /// Stops every virtqueue; the server has let go of it when it answers.
    fn close(self, queues: Vec<R>) -> anyhow::Result<()> {
        for index in 0..u32::try_from(queues.len()).unwrap_or(0) {
            self.send(request::GET_VRING_BASE, &vring_state(index, 0), &[])?;
            self.receive(request::GET_VRING_BASE)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use super::super::args::Interrupts;

    const NEEDS: Needs = Needs {
        queues: 1,
        depth: 1,
        bs: 4096,
        writes: false,
        flushes: false,
        trims: false,
        verify: false,
        reach: None,
    };

    /// A server that answers whatever it is told to.
    fn against(answers: Vec<(u32, Vec<u8>)>) -> String {
        static COUNT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let count = COUNT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("tandem-bench-wire-{}-{count}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().unwrap();
            for (request, answer) in answers {
                let message = FrontEnd::message(request, VERSION | REPLY, &answer);
                std::io::Write::write_all(&mut socket, &message).unwrap();
            }
            // Whatever comes is read, so that nothing is reset before it arrived.
            socket.shutdown(std::net::Shutdown::Write).unwrap();
            let _ = socket.read_to_end(&mut Vec::new());
        });
        let wishes = Wishes {
            ring: RingKind::Split,
            indirect: true,
            event_idx: true,
            interrupts: Interrupts::Off,
            hugepages: false,
        };
        let spec = path.to_str().unwrap().parse().unwrap();
        let error = match open(&spec, wishes, &NEEDS) {
            Ok(_) => panic!("it was opened"),
            Err(error) => format!("{error:#}"),
        };
        server.join().unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(error.contains(&path.display().to_string()), "{error}");
        error
    }

    #[test]
    fn server_that_answers_nonsense_is_named_with_what_it_said() {
        let all = u64::MAX.to_le_bytes().to_vec();
        let features = (request::GET_FEATURES, all.clone());
        assert!(against(vec![]).contains("no answer to message 1"));
        assert!(against(vec![(request::GET_FEATURES, vec![0; 8])]).contains("VERSION_1"));
        assert!(against(vec![(request::GET_FEATURES, vec![0; 3])]).contains("3 bytes"));
        assert!(against(vec![(request::GET_CONFIG, all.clone())]).contains("is message 24"));
        let too_long = vec![(request::GET_FEATURES, vec![0; 4000])];
        assert!(against(too_long).contains("4000 bytes"));
        let no_queue = vec![
            features.clone(),
            (request::GET_PROTOCOL_FEATURES, all.clone()),
            (request::GET_QUEUE_NUM, vec![0; 8]),
        ];
        assert!(against(no_queue).contains("0 virtqueue(s)"));
        let no_block = vec![
            features,
            (request::GET_PROTOCOL_FEATURES, all.clone()),
            (request::GET_QUEUE_NUM, all),
            (request::GET_CONFIG, vec![0; 72]),
        ];
        assert!(against(no_block).contains("blocks of 0 bytes"));
    }
}
