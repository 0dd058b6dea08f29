//! One connected front-end: Negotiating -> MemoryShared -> Running -> Draining -> Closed, as vhost-user messages say.
//!
//! A virtqueue runs when it has a size, addresses, a kick and is enabled, and guest memory is shared; then it is a
//! [`Lane`] on its reactor. Whatever changes its ground (memory table, cache mode, reset, disconnect) takes the
//! lane back first, drained (I2). A message that cannot be honoured ends the connection with a log line; it never
//! harms another session. Runs on its own control thread, so a silent front-end delays nobody.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{Receiver, TryRecvError};
use nvme_driver::spec::Nsid;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, recv, recvmsg, send,
};
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Backend, Error as VhostError, GpuBackend, Result as VhostResult, VhostUserBackendReqHandlerMut,
};

use super::device::Device;
use super::units::number_of;
use crate::block::Geometry;
use crate::datapath::signal::require_eventfd;
use crate::datapath::{
    Barrier, Clerk, ControlConfig, EventConfig, Events, HostTasks, Lane, LaneConfig, LaneId,
    ScsiLaneConfig, SideConfig, Signal, WantedEvents, WayConfig,
};
use crate::reactor::{Mode, PollerId, ReactorHandle};
use crate::scsi::{Nexus, Roster, Tasks};
use crate::stats::SharedCounters;
use crate::vhost::memory::{MAX_REGIONS, MemoryTable, RegionInfo};
use crate::virtio::blk::{self, BlkLimits, RangeLimits, VirtioBlkConfig, feature};
use crate::virtio::memory::GuestMemory;
use crate::virtio::relay::Relay;
use crate::virtio::scsi::{Sizes, event};
use crate::virtio::virtqueue::{self, MAX_QUEUE_SIZE, RingLayout, Virtqueue, VirtqueueConfig};

/// How long a drain may take: longer than any healthy SSD needs for its slowest command.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);
/// The configuration space that a front-end may read: QEMU's own limit for one message.
const CONFIG_SPACE: usize = 256;
/// Data segments of one request. With header and status a chain has 128 descriptors: QEMU's default queue size, so
/// that a chain never exceeds its queue. A guest with smaller queues must limit its requests itself.
const SEG_MAX: u32 = 126;
/// DISCARD and WRITE_ZEROES: just below 4 GiB a segment, in whole blocks of any size up to 64 KiB; 256 segments are
/// one Dataset Management command.
const RANGE_LIMITS: RangeLimits = RangeLimits {
    max_sectors: 0x7f_ff80,
    max_segments: 256,
};
/// Where `writeback` stands in the configuration space: its only writable byte.
const WRITEBACK_OFFSET: u32 = 32;

/// Where the capacity ends: it comes first.
const CAPACITY_BYTES: u32 = 8;
/// Lanes that have nothing to do are woken to look at what has changed after so many changes.
const MAX_BEHIND: usize = 8;

/// VHOST_USER_F_PROTOCOL_FEATURES.
const F_PROTOCOL: u64 = 1 << 30;
/// Descriptors would hold I/O virtual addresses that only the front-end can translate.
const F_ACCESS_PLATFORM: u64 = 1 << 33;
const F_RING_PACKED: u64 = 1 << 34;

/// One virtqueue's fixed place: which poller of which reactor serves it.
#[derive(Debug)]
pub struct ExportQueue {
    /// The reactor.
    pub reactor: ReactorHandle,
    /// The poller on it.
    pub poller: PollerId,
    /// Identifier of the queue pair on its controller.
    pub pair: u16,
    /// Where its counters are read.
    pub counters: Arc<SharedCounters>,
}

/// What a socket offers to front-ends, one at a time: a disk or a SCSI host.
#[derive(Debug)]
pub struct Export {
    /// What log lines and tables call it.
    pub name: String,
    /// The device behind it.
    pub device: Arc<Device>,
    /// Its index among the devices.
    pub device_index: usize,
    /// The virtqueues that a front-end may set up.
    pub queues: Vec<ExportQueue>,
    /// The other devices of a host.
    pub ways: Vec<ExportWay>,
    /// What kind it is.
    pub kind: Kind,
}

/// Another device that has logical units of a host.
#[derive(Debug)]
pub struct ExportWay {
    /// Which.
    pub device: Arc<Device>,
    /// Its index among the devices.
    pub device_index: usize,
    /// Its queue pair for each request queue.
    pub queues: Vec<ExportQueue>,
}

/// What a socket offers.
#[derive(Debug)]
pub enum Kind {
    /// A block device.
    Disk(Disk),
    /// A SCSI host.
    Host(Host),
}

/// A block device.
#[derive(Debug)]
pub struct Disk {
    /// The namespace behind it.
    pub nsid: Nsid,
    /// Its size at first, and whether the guest may only read.
    geometry: Geometry,
    /// How many blocks it has by now.
    blocks: AtomicU64,
    /// An eventfd that is rung when that has changed: for the session, if there is one.
    resized: OwnedFd,
    /// What GET_ID answers.
    serial: [u8; 20],
    /// The guest's choice of cache mode (CONFIG_WCE). Outlives a connection: a guest that chose write-through goes on
    /// believing in it when its front-end reconnects.
    writeback: AtomicBool,
}

/// A SCSI host. Of its virtqueues the first is the control queue and the second the event queue.
#[derive(Debug)]
pub struct Host {
    /// Its logical units; the medium of each is the NSID of a namespace.
    pub roster: Roster,
    /// Where the lanes of all hosts are waited for.
    pub barrier: Arc<Barrier>,
    /// The numbers of this one's there: its request queues, then the same for each of its other devices.
    pub lanes: Range<usize>,
    /// Who carries out commands that wait.
    pub clerk: Arc<Clerk>,
    /// What its guest is to be told.
    pub events: Arc<Events>,
}

/// Virtqueue 0 of a SCSI host (virtio 1.2, 5.6.2).
const CONTROL_QUEUE: usize = 0;
const FIRST_REQUEST_QUEUE: usize = 2;

impl Export {
    /// Feature bits offered to the guest, and bit 30.
    fn features(&self) -> u64 {
        let features = F_PROTOCOL | feature::VERSION_1 | feature::INDIRECT_DESC;
        let features = features | feature::EVENT_IDX | F_RING_PACKED;
        match &self.kind {
            Kind::Disk(disk) => features | disk.features(&self.device),
            Kind::Host(_) => features | event::F_HOTPLUG | event::F_CHANGE,
        }
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        let features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE;
        match &self.kind {
            Kind::Disk(_) => features | VhostUserProtocolFeatures::CONFIG,
            // QEMU has the whole configuration space of a SCSI host to itself.
            Kind::Host(_) => features,
        }
    }

    /// Readable when a disk has got another size.
    pub(super) fn resized(&self) -> Option<BorrowedFd<'_>> {
        self.disk().map(|disk| disk.resized.as_fd())
    }

    /// Its devices with their indices, its own first.
    pub fn devices(&self) -> impl Iterator<Item = (usize, &Arc<Device>)> {
        let others = self.ways.iter().map(|way| (way.device_index, &way.device));
        std::iter::once((self.device_index, &self.device)).chain(others)
    }

    /// The number at the barrier of what serves a request queue of `host` for one of its devices, as [`Self::devices`] has
    /// them.
    fn lane_number(&self, host: &Host, request_queue: usize, device: usize) -> usize {
        let request_queues = self.queues.len().saturating_sub(FIRST_REQUEST_QUEUE);
        host.lanes.start + request_queues * device + request_queue
    }

    fn disk(&self) -> Option<&Disk> {
        match &self.kind {
            Kind::Disk(disk) => Some(disk),
            Kind::Host(_) => None,
        }
    }
}

impl Host {
    /// The initiator that is connected: it was made with the session.
    fn nexus(&self) -> VhostResult<Arc<Nexus>> {
        let nexus = self.roster.nexus();
        nexus.ok_or_else(|| refuse("a SCSI host without an initiator"))
    }

    /// Lanes that have nothing to do look at what has changed, if that was several times: each keeps all of it in memory from
    /// what it has seen on.
    pub(super) fn hurry_lanes(&self) {
        if self.roster.behind() > MAX_BEHIND {
            self.barrier.ask(|| self.lanes.clone());
        }
    }
}

impl Disk {
    /// A namespace as a guest sees it: its size, whether it may only be read, and what GET_ID answers.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(nsid: Nsid, geometry: Geometry, serial: [u8; 20]) -> io::Result<Disk> {
        Ok(Disk {
            nsid,
            geometry,
            blocks: AtomicU64::new(geometry.blocks()),
            resized: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            serial,
            writeback: AtomicBool::new(true),
        })
    }

    /// It has so many blocks from now on: the session hears of it and tells the guest.
    pub fn resize(&self, blocks: u64) {
        // Pairs with the acquire in `geometry`. The bell comes after it: who has heard that finds this.
        self.blocks.store(blocks, Ordering::Release);
        // A counter at its limit has been told of already.
        let _ = rustix::io::write(&self.resized, &1_u64.to_ne_bytes());
    }

    /// As it is by now.
    fn geometry(&self) -> Geometry {
        let geometry = self
            .geometry
            .with_blocks(self.blocks.load(Ordering::Acquire));
        // Whoever resizes it has asked the same.
        geometry.unwrap_or(self.geometry)
    }

    fn features(&self, device: &Device) -> u64 {
        let mut features = feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::MQ;
        features |= feature::FLUSH | feature::CONFIG_WCE;
        if self.geometry.read_only() {
            return features | feature::RO;
        }
        if device.can_deallocate() {
            features |= feature::DISCARD;
        }
        if device.can_write_zeroes() {
            features |= feature::WRITE_ZEROES;
        }
        features
    }

    /// What a front-end that acknowledged those of the `offered` features may ask for.
    fn limits(geometry: Geometry, offered: u64) -> BlkLimits {
        let ranges = |feature: u64| (offered & feature != 0).then_some(RANGE_LIMITS);
        BlkLimits {
            geometry,
            flush: offered & feature::FLUSH != 0,
            discard: ranges(feature::DISCARD),
            write_zeroes: ranges(feature::WRITE_ZEROES),
        }
    }

    /// I11: a guest without FLUSH, or one that asked for writeback = 0, gets write-through.
    fn write_through(&self, features: u64) -> bool {
        let flush = features & feature::FLUSH != 0;
        let configured = features & feature::CONFIG_WCE != 0;
        !flush || (configured && !self.writeback.load(Ordering::Relaxed))
    }

    fn config_space(&self, capacity: u64, queues: usize) -> [u8; CONFIG_SPACE] {
        let writeback = self.writeback.load(Ordering::Relaxed);
        // At most 64 queues: the configuration refuses more.
        let queues = u16::try_from(queues).unwrap_or(u16::MAX);
        let block_sectors = self.geometry.block_bytes() >> blk::SECTOR_SHIFT;
        let config = VirtioBlkConfig {
            capacity: capacity.into(),
            seg_max: SEG_MAX.into(),
            blk_size: self.geometry.block_bytes().into(),
            min_io_size: 1.into(),
            writeback: u8::from(writeback),
            num_queues: queues.into(),
            max_discard_sectors: RANGE_LIMITS.max_sectors.into(),
            max_discard_seg: RANGE_LIMITS.max_segments.into(),
            discard_sector_alignment: block_sectors.into(),
            max_write_zeroes_sectors: RANGE_LIMITS.max_sectors.into(),
            max_write_zeroes_seg: RANGE_LIMITS.max_segments.into(),
            write_zeroes_may_unmap: 1,
            ..VirtioBlkConfig::default()
        };
        let mut space = [0; CONFIG_SPACE];
        let bytes = zerocopy::IntoBytes::as_bytes(&config);
        space[..bytes.len()].copy_from_slice(bytes);
        space
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct RingAddresses {
    descriptor_table: u64,
    avail: u64,
    used: u64,
}

#[derive(Debug)]
struct Vring {
    size: u16,
    /// As SET_VRING_BASE says it and GET_VRING_BASE answers.
    base: u32,
    addresses: Option<RingAddresses>,
    kicked: bool,
    enabled: bool,
    running: Option<LaneId>,
    /// The lanes for other devices that go with it, by way.
    behind: Vec<LaneId>,
    call: Arc<Signal>,
    error: Arc<Signal>,
    /// For a reactor that sleeps. `None`: the front-end says that the ring is to be polled.
    kick: Option<OwnedFd>,
}

impl Vring {
    fn new() -> io::Result<Vring> {
        Ok(Vring {
            size: 0,
            base: 0,
            addresses: None,
            kicked: false,
            enabled: false,
            running: None,
            behind: Vec::new(),
            call: Arc::new(Signal::new()?),
            error: Arc::new(Signal::new()?),
            kick: None,
        })
    }
}

/// The state of one connection.
#[derive(Debug)]
pub struct Session {
    disk: Arc<Export>,
    /// Of a SCSI host: its front-end as an initiator.
    initiator: Option<Initiator>,
    owned: bool,
    features: u64,
    memory: MemoryTable,
    vrings: Vec<Vring>,
    /// Of a disk: what its lanes go by, but for those in `following`.
    geometry: Option<Geometry>,
    /// Lanes that have been given another size and have not said so yet: their pollers may be on loan.
    following: Vec<Receiver<()>>,
    capacity: KnownCapacity,
    backend_channel: BackendChannel,
}

/// What a front-end knows of a disk's size. QEMU asks for it once, when it connects for the first time, and then whenever it
/// is told.
#[derive(Debug, Default)]
struct KnownCapacity {
    /// In sectors, what it is told if it asks: what all lanes went by when that was looked at last.
    shown: u64,
    /// As it has asked for it last on this connection.
    asked: Option<u64>,
    /// As it was told last that it has changed; not again since queues have started.
    told: Option<u64>,
}

/// A front-end of a SCSI host.
#[derive(Debug)]
struct Initiator {
    /// Whose commands other initiators wait for; they know it for as long as it is here.
    _tasks: Arc<dyn Tasks>,
}

impl Initiator {
    /// One that has just come, or was reset, if `export` is for initiators.
    fn of(export: &Export) -> Option<Initiator> {
        match &export.kind {
            Kind::Disk(_) => None,
            Kind::Host(host) => {
                let tasks: Arc<dyn Tasks> = Arc::new(HostTasks {
                    barrier: Arc::clone(&host.barrier),
                    lanes: host.lanes.clone(),
                });
                // One that comes looks for itself.
                host.events.forget();
                drop(host.roster.connect(&tasks));
                Some(Initiator { _tasks: tasks })
            }
        }
    }
}

/// The front-end's second channel, for what it is told unasked.
#[derive(Debug, Default)]
struct BackendChannel {
    /// It may be used for a change of the configuration space: CONFIG and BACKEND_REQ were accepted.
    negotiated: bool,
    /// What [`Session::look_ahead`] has found in a message that was not looked at further yet.
    peeked: Option<UnixStream>,
    /// QEMU complains of one that is closed.
    socket: Option<UnixStream>,
}

impl BackendChannel {
    /// VHOST_USER_BACKEND_CONFIG_CHANGE_MSG: a header alone, of version 1. No answer is asked for: QEMU reads the
    /// configuration space before it answers, and that is asked of whoever would wait here.
    const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

    /// `false` when there is no room for it now.
    fn tell_of_change(&mut self) -> bool {
        let Some(socket) = &self.socket else {
            return true;
        };
        let message = BackendChannel::CONFIG_CHANGE.map(u32::to_ne_bytes).concat();
        match send(socket, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) if sent == message.len() => true,
            Err(Errno::AGAIN | Errno::INTR) => false,
            // Nobody is there: only this front-end misses anything.
            Ok(_) | Err(_) => {
                self.socket = None;
                true
            }
        }
    }
}

/// The descriptor of SET_BACKEND_REQ_FD, if that is the message that comes next. It stays where it is.
fn peek_backend_channel(socket: BorrowedFd<'_>) -> io::Result<Option<UnixStream>> {
    const SET_BACKEND_REQ_FD: u32 = 21;
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let mut request = [0; 4];
    // Without room for descriptors none is made.
    let (_, len) = recv(socket, &mut request, flags)?;
    if len < request.len() || u32::from_ne_bytes(request) != SET_BACKEND_REQ_FD {
        return Ok(None);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut request)],
        &mut ancillary,
        flags,
    )?;
    let channel = ancillary.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok(channel.map(UnixStream::from))
}

fn refuse(what: impl Into<String>) -> VhostError {
    VhostError::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, what.into()))
}

fn next_lane_id() -> LaneId {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    LaneId(NEXT.fetch_add(1, Ordering::Relaxed))
}

impl Session {
    /// A fresh connection to what a socket offers.
    ///
    /// # Errors
    /// When the process has no file descriptor left.
    pub fn new(disk: Arc<Export>) -> io::Result<Session> {
        let vrings = disk
            .queues
            .iter()
            .map(|_| Vring::new())
            .collect::<io::Result<_>>()?;
        let spaces = disk.devices().map(|(_, device)| Arc::clone(&device.space));
        let memory = MemoryTable::new(spaces);
        let geometry = disk.disk().map(Disk::geometry);
        Ok(Session {
            initiator: Initiator::of(&disk),
            disk,
            owned: false,
            features: 0,
            memory,
            vrings,
            geometry,
            following: Vec::new(),
            capacity: KnownCapacity {
                shown: geometry.map_or(0, |geometry| geometry.sectors()),
                ..KnownCapacity::default()
            },
            backend_channel: BackendChannel::default(),
        })
    }

    /// Looks at the message that comes next, while it is there still: the `vhost` crate keeps the socket of a second channel
    /// to itself, and cannot send on it what is to be sent.
    ///
    /// # Errors
    /// When the socket cannot be looked at.
    pub fn look_ahead(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.backend_channel.peeked = peek_backend_channel(socket)?;
        Ok(())
    }

    /// The disk may have another size: its lanes are given that. None waits for what it has at the device.
    pub fn follow_size(&mut self) {
        let now = self.disk.disk().map(Disk::geometry);
        if let Some(geometry) = now
            && now != self.geometry
        {
            self.geometry = now;
            let queues = self.vrings.iter().zip(&self.disk.queues);
            let running = queues.filter_map(|(vring, queue)| Some((vring.running?, queue)));
            let told = running
                .map(|(lane, queue)| queue.reactor.resize(queue.poller, lane, geometry.blocks()));
            self.following.extend(told);
            self.show_size();
        }
    }

    /// What all lanes go by, the front-end may know.
    fn show_size(&mut self) {
        self.following
            .retain(|lane| matches!(lane.try_recv(), Err(TryRecvError::Empty)));
        if let Some(geometry) = self.geometry
            && self.following.is_empty()
        {
            self.capacity.shown = geometry.sectors();
        }
    }

    /// The disk has, or is about to have, another size than the front-end knows, which can be told. While nothing runs there
    /// is no guest to know it; QEMU would forget it.
    #[must_use]
    pub fn has_news(&self) -> bool {
        let capacity = self.geometry.map(|geometry| geometry.sectors());
        self.backend_channel.negotiated
            && self.backend_channel.socket.is_some()
            && self.vrings.iter().any(|vring| vring.running.is_some())
            && capacity != self.capacity.asked
            && capacity != self.capacity.told
    }

    /// Tells it, once it is so. To be called when the front-end has said nothing for a while: QEMU before 8.0 looks at the
    /// second channel also while it waits for an answer on the first, and would take that for the configuration space.
    pub fn tell_news(&mut self) {
        self.show_size();
        if self.following.is_empty() && self.backend_channel.tell_of_change() {
            self.capacity.told = Some(self.capacity.shown);
        }
    }

    /// The front-end shrank its memory under us.
    #[must_use]
    pub fn is_poisoned(&self) -> bool {
        self.memory.is_poisoned()
    }

    /// The connection is over: every queue is taken back, then the memory is given up.
    pub fn close(&mut self) {
        if let Err(error) = self.quiesce() {
            tracing::error!(disk = %self.disk.name, %error, "a queue did not drain: its memory stays mapped");
        }
        self.memory.clear();
        if let Kind::Host(host) = &self.disk.kind {
            host.roster.disconnect();
        }
    }

    /// Takes all running lanes back, drained. All are asked first, so they drain side by side.
    fn quiesce(&mut self) -> VhostResult<()> {
        let indices: Vec<usize> = (0..self.vrings.len()).collect();
        self.stop_queues(&indices)
    }

    fn stop_queues(&mut self, indices: &[usize]) -> VhostResult<()> {
        let mut waiting = Vec::new();
        for index in indices {
            if let Some(id) = self.vrings[*index].running.take() {
                let queue = &self.disk.queues[*index];
                waiting.push((*index, true, queue.reactor.detach(queue.poller, id)));
                let behind = std::mem::take(&mut self.vrings[*index].behind);
                for (way, id) in self.disk.ways.iter().zip(behind) {
                    // Those end when it has; but for a device that is gone they are to be given back now.
                    if let Some(queue) = way.queues.get(*index - FIRST_REQUEST_QUEUE) {
                        waiting.push((*index, false, queue.reactor.detach(queue.poller, id)));
                    }
                }
            }
        }
        let deadline = Instant::now() + DRAIN_DEADLINE;
        let mut stuck = Vec::new();
        for (index, has_ring, lane_back) in waiting {
            match lane_back.recv_deadline(deadline) {
                Ok(lane) if has_ring => self.vrings[index].base = lane.base(),
                Ok(_) => {}
                // The lane keeps its memory mapped until the device answers; it ends on its reactor then.
                Err(_) => stuck.push(index),
            }
        }
        if stuck.is_empty() {
            return Ok(());
        }
        Err(refuse(format!(
            "virtqueues {stuck:?} still have requests at the device after {DRAIN_DEADLINE:?}"
        )))
    }

    /// Starts every virtqueue that has all it needs and does not run yet.
    fn start_ready(&mut self) -> VhostResult<()> {
        for index in 0..self.vrings.len() {
            self.start_queue(index)?;
        }
        Ok(())
    }

    fn start_queue(&mut self, index: usize) -> VhostResult<()> {
        let vring = &self.vrings[index];
        let enabled = vring.enabled || self.features & F_PROTOCOL == 0;
        let Some(addresses) = vring.addresses else {
            return Ok(());
        };
        if vring.running.is_some()
            || !enabled
            || !vring.kicked
            || vring.size == 0
            || self.memory.is_empty()
        {
            return Ok(());
        }
        let memory = self
            .memory
            .snapshot(0)
            .map_err(|error| refuse(error.to_string()))?;
        let rings = self.resolve(index, addresses)?;
        let [next_avail, next_used] = [(vring.base & 0xffff) as u16, (vring.base >> 16) as u16];
        let mut config = VirtqueueConfig {
            layout: self.layout(),
            size: vring.size,
            descriptor_table: rings.descriptor_table,
            avail: rings.avail,
            used: rings.used,
            event_idx: self.features & feature::EVENT_IDX != 0,
            indirect: self.features & feature::INDIRECT_DESC != 0,
            next_avail,
            next_used,
        };
        match config.layout {
            RingLayout::Split => {
                // The used index in guest memory says where the driver has got to (it survives a server's restart).
                // SAFETY: `resolve` found the whole used ring in mapped memory, 4-byte aligned.
                config.next_used = unsafe { virtqueue::used_index(rings.used) };
            }
            RingLayout::Packed => {
                if next_used == 0 {
                    // A front-end that knows only the lower half. Both are the same, or requests are in flight elsewhere.
                    config.next_used = next_avail;
                }
                // SAFETY: as for the queue below, which does not exist yet.
                let left_at = unsafe { virtqueue::packed_position(config) };
                // After a server's sudden end the front-end knows only where the ring started: QEMU says so again.
                let left_at =
                    left_at.map_err(|error| refuse(format!("virtqueue {index}: {error}")))?;
                if let Some(position) = left_at {
                    (config.next_avail, config.next_used) = (position, position);
                }
            }
        }
        // SAFETY: the three rings lie wholly in memory that `memory` keeps mapped, aligned (`resolve`); the lane owns
        // `memory` for as long as the queue exists.
        let queue = unsafe { Virtqueue::new(config) }
            .map_err(|error| refuse(format!("virtqueue {index}: {error}")))?;
        let id = next_lane_id();
        let relays = match index.checked_sub(FIRST_REQUEST_QUEUE) {
            Some(_) => self.disk.ways.iter().map(|_| Relay::new()).collect(),
            None => Vec::new(),
        };
        // All are made before any is in service.
        let behind = relays.iter().enumerate();
        let behind = behind.map(|(way, relay)| self.lane_behind(index, way, relay));
        let behind = behind.collect::<VhostResult<Vec<Lane>>>()?;
        let lane = self.lane(index, id, queue, memory, &relays)?;
        let (disk, vring) = (&self.disk, &self.vrings[index]);
        let mut ids = Vec::new();
        for (way, lane) in disk.ways.iter().zip(behind) {
            ids.push(lane.id());
            let place = &way.queues[index - FIRST_REQUEST_QUEUE];
            place.reactor.attach(place.poller, lane);
        }
        let place = &disk.queues[index];
        place.reactor.attach(place.poller, lane);
        tracing::debug!(disk = %disk.name, queue = index, size = vring.size, base = vring.base, "virtqueue started");
        self.vrings[index].running = Some(id);
        self.vrings[index].behind = ids;
        self.capacity.told = None;
        Ok(())
    }

    /// What serves the requests of virtqueue `index` for another device.
    fn lane_behind(&self, index: usize, way: usize, relay: &Arc<Relay>) -> VhostResult<Lane> {
        let export = &self.disk;
        let Kind::Host(host) = &export.kind else {
            return Err(refuse("a disk has one device"));
        };
        // SAFETY: the queue lies in the relay, which the lane holds.
        let queue = unsafe { Virtqueue::new(relay.config()) };
        let queue = queue.map_err(|error| refuse(format!("virtqueue {index}: {error}")))?;
        let memory = self.memory.snapshot(way + 1);
        let memory = memory.map_err(|error| refuse(error.to_string()))?;
        let request_queue = index - FIRST_REQUEST_QUEUE;
        let front = host
            .barrier
            .waker(export.lane_number(host, request_queue, 0));
        let signals = || -> io::Result<(Signal, Signal)> {
            let call = Signal::new()?;
            call.replace(Some(front.try_clone_to_owned()?.into()))?;
            Ok((call, Signal::new()?))
        };
        let (call, error) = signals().map_err(VhostError::ReqHandlerError)?;
        let ExportWay {
            device,
            device_index,
            queues,
        } = &export.ways[way];
        let number = export.lane_number(host, request_queue, way + 1);
        self.scsi_lane(
            host,
            ScsiParts {
                id: next_lane_id(),
                queue,
                memory,
                device: (device, *device_index),
                ways: Vec::new(),
                relay: Some(Arc::clone(relay)),
                number,
                call: Arc::new(call),
                error: Arc::new(error),
                kick: None,
                shared: Arc::clone(&queues[request_queue].counters),
            },
        )
    }

    fn scsi_lane(&self, host: &Host, parts: ScsiParts<'_>) -> VhostResult<Lane> {
        let nexus = host.nexus()?;
        let barrier = Arc::clone(&host.barrier);
        let (device, index) = parts.device;
        Ok(Lane::scsi(ScsiLaneConfig {
            id: parts.id,
            queue: parts.queue,
            memory: parts.memory,
            sizes: Sizes::DEFAULT,
            nexus,
            device: number_of(index),
            ways: parts.ways,
            relay: parts.relay,
            desk: host.clerk.desk(Arc::clone(&barrier), parts.number),
            barrier,
            number: parts.number,
            volatile_cache: device.has_volatile_cache(),
            call: parts.call,
            error: parts.error,
            kick: parts.kick,
            shared: parts.shared,
        }))
    }

    /// What serves virtqueue `index`.
    fn lane(
        &self,
        index: usize,
        id: LaneId,
        queue: Virtqueue,
        memory: Arc<GuestMemory>,
        relays: &[Arc<Relay>],
    ) -> VhostResult<Lane> {
        let (export, vring) = (&self.disk, &self.vrings[index]);
        let [call, error] = [&vring.call, &vring.error].map(Arc::clone);
        let kick = vring.kick.as_ref().map(OwnedFd::try_clone).transpose();
        let kick = kick.map_err(VhostError::ReqHandlerError)?;
        let shared = Arc::clone(&export.queues[index].counters);
        let volatile_cache = export.device.has_volatile_cache();
        let host = match &export.kind {
            Kind::Disk(disk) => {
                return Ok(Lane::new(LaneConfig {
                    id,
                    queue,
                    memory,
                    limits: Disk::limits(
                        self.geometry.unwrap_or(disk.geometry),
                        self.features & export.features(),
                    ),
                    nsid: disk.nsid,
                    serial: disk.serial,
                    write_through: disk.write_through(self.features),
                    volatile_cache,
                    deallocate: export.device.can_deallocate(),
                    call,
                    error,
                    kick,
                    shared,
                }));
            }
            Kind::Host(host) => host,
        };
        if let Some(number) = index.checked_sub(FIRST_REQUEST_QUEUE) {
            let ways = export.ways.iter().zip(relays).enumerate();
            let ways = ways.map(|(at, (way, relay))| WayConfig {
                device: number_of(way.device_index),
                relay: Arc::clone(relay),
                number: export.lane_number(host, number, at + 1),
            });
            let parts = ScsiParts {
                id,
                queue,
                memory,
                device: (&export.device, export.device_index),
                ways: ways.collect(),
                relay: None,
                number: export.lane_number(host, number, 0),
                call,
                error,
                kick,
                shared,
            };
            return self.scsi_lane(host, parts);
        }
        let nexus = host.nexus()?;
        let barrier = Arc::clone(&host.barrier);
        let side = SideConfig {
            id,
            queue,
            memory,
            call,
            error,
            kick,
            shared,
        };
        Ok(match index {
            CONTROL_QUEUE => Lane::control(ControlConfig {
                side,
                nexus,
                barrier,
                lanes: host.lanes.clone(),
            }),
            _ => Lane::events(EventConfig {
                side,
                events: Arc::clone(&host.events),
                wanted: WantedEvents {
                    hotplug: self.features & event::F_HOTPLUG != 0,
                    change: self.features & event::F_CHANGE != 0,
                },
            }),
        })
    }

    fn layout(&self) -> RingLayout {
        match self.features & F_RING_PACKED {
            0 => RingLayout::Split,
            _ => RingLayout::Packed,
        }
    }

    fn resolve(&self, index: usize, addresses: RingAddresses) -> VhostResult<ResolvedRings> {
        let size = self.vrings[index].size;
        let (driver_area, device_area) = (
            self.layout().driver_area(size),
            self.layout().device_area(size),
        );
        let part = |what: &str, at: u64, len: u32, align: usize| {
            let hva = self.memory.resolve_user(at, u64::from(len)).ok_or_else(|| {
                refuse(format!("virtqueue {index}: {what} at {at:#x} of {len} bytes is not in shared memory"))
            })?;
            if !hva.addr().get().is_multiple_of(align) {
                return Err(refuse(format!(
                    "virtqueue {index}: {what} at {at:#x} is not aligned to {align}"
                )));
            }
            Ok(hva)
        };
        Ok(ResolvedRings {
            descriptor_table: part(
                "descriptor table",
                addresses.descriptor_table,
                virtqueue::descriptor_table_bytes(size),
                16,
            )?,
            avail: part("avail ring", addresses.avail, driver_area.0, driver_area.1)?,
            used: part("used ring", addresses.used, device_area.0, device_area.1)?,
        })
    }

    fn index(&self, index: u32) -> VhostResult<usize> {
        let count = self.vrings.len();
        usize::try_from(index)
            .ok()
            .filter(|index| *index < count)
            .ok_or_else(|| refuse(format!("virtqueue {index} of a device with {count}")))
    }

    /// A virtqueue whose size, base or addresses are to be changed must not run.
    fn stopped(&mut self, index: u32, what: &str) -> VhostResult<&mut Vring> {
        let index = self.index(index)?;
        let vring = &mut self.vrings[index];
        if vring.running.is_some() {
            return Err(refuse(format!("{what} of virtqueue {index} while it runs")));
        }
        Ok(vring)
    }

    /// Changes the memory table while no queue runs, then goes on.
    fn change_memory(
        &mut self,
        change: impl FnOnce(&mut MemoryTable) -> Result<(), crate::vhost::memory::TableError>,
    ) -> VhostResult<()> {
        self.quiesce()?;
        change(&mut self.memory).map_err(|error| refuse(error.to_string()))?;
        self.start_ready()
    }

    fn reset(&mut self) -> VhostResult<()> {
        self.quiesce()?;
        for vring in &mut self.vrings {
            (vring.size, vring.base, vring.addresses) = (0, 0, None);
            (vring.kicked, vring.enabled, vring.kick) = (false, false, None);
        }
        self.features = 0;
        if let Some(disk) = self.disk.disk() {
            disk.writeback.store(true, Ordering::Relaxed);
        }
        self.initiator = Initiator::of(&self.disk);
        Ok(())
    }
}

/// What is different about the lanes of a SCSI host.
struct ScsiParts<'a> {
    id: LaneId,
    queue: Virtqueue,
    memory: Arc<GuestMemory>,
    /// And its index.
    device: (&'a Device, usize),
    ways: Vec<WayConfig>,
    relay: Option<Arc<Relay>>,
    number: usize,
    call: Arc<Signal>,
    error: Arc<Signal>,
    kick: Option<OwnedFd>,
    shared: Arc<SharedCounters>,
}

struct ResolvedRings {
    descriptor_table: NonNull<u8>,
    avail: NonNull<u8>,
    used: NonNull<u8>,
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> VhostResult<()> {
        if self.owned {
            return Err(refuse("SET_OWNER twice on one connection"));
        }
        self.owned = true;
        Ok(())
    }

    fn reset_owner(&mut self) -> VhostResult<()> {
        self.owned = false;
        self.reset()
    }

    fn reset_device(&mut self) -> VhostResult<()> {
        self.reset()
    }

    fn get_features(&mut self) -> VhostResult<u64> {
        Ok(self.disk.features())
    }

    fn set_features(&mut self, features: u64) -> VhostResult<()> {
        // QEMU passes on bits of its own (such as ANY_LAYOUT) that we did not offer: harmless. This one is not.
        if features & F_ACCESS_PLATFORM != 0 {
            return Err(refuse(
                "the guest wants an IOMMU in the guest, which was not offered",
            ));
        }
        if features != self.features {
            // Only a stopped device negotiates; a front-end that does otherwise gets its queues restarted.
            self.quiesce()?;
            self.features = features;
        }
        self.start_ready()
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<Vec<u64>>> {
        self.change_memory(|table| {
            table.clear();
            regions
                .iter()
                .zip(files)
                .try_for_each(|(region, file)| table.add(region.into(), file))
        })?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> VhostResult<()> {
        let size = u16::try_from(num)
            .ok()
            .filter(|size| self.layout().allows(*size));
        let size = size.ok_or_else(|| {
            refuse(format!("virtqueue {index}: a size of {num} (up to {MAX_QUEUE_SIZE} is needed, a power of two for a split ring)"))
        })?;
        self.stopped(index, "the size")?.size = size;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> VhostResult<()> {
        let addresses = RingAddresses {
            descriptor_table: descriptor,
            avail: available,
            used,
        };
        let index = self.index(index)?;
        if self.vrings[index].running.is_some() {
            // The same addresses again change nothing (QEMU repeats them when it starts or stops logging).
            let same = self.vrings[index].addresses == Some(addresses);
            return if same {
                Ok(())
            } else {
                Err(refuse(format!(
                    "new addresses of virtqueue {index} while it runs"
                )))
            };
        }
        self.resolve(index, addresses)?;
        self.vrings[index].addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> VhostResult<()> {
        if self.layout() == RingLayout::Split && base > u32::from(u16::MAX) {
            return Err(refuse(format!(
                "virtqueue {index}: a base of {base} on a split ring"
            )));
        }
        self.stopped(index, "the base")?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> VhostResult<VhostUserVringState> {
        let at = self.index(index)?;
        self.stop_queues(&[at])?;
        self.vrings[at].kicked = false;
        Ok(VhostUserVringState::new(index, self.vrings[at].base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = self.index(u32::from(index))?;
        if let Some(file) = &fd {
            require_eventfd(file).map_err(VhostError::ReqHandlerError)?;
        }
        let queue = &self.disk.queues[index];
        if queue.reactor.mode() == Mode::Adaptive {
            let kick = fd.map(OwnedFd::from);
            if let Some(lane) = self.vrings[index].running {
                let clone = kick.as_ref().map(OwnedFd::try_clone).transpose();
                let clone = clone.map_err(VhostError::ReqHandlerError)?;
                queue.reactor.replace_kick(queue.poller, lane, clone);
            }
            self.vrings[index].kick = kick;
        }
        // A ring that is always polled needs no descriptor. Its arrival starts the ring, kick or no kick.
        self.vrings[index].kicked = true;
        self.start_queue(index)
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = self.index(u32::from(index))?;
        let vring = &self.vrings[index];
        vring
            .call
            .replace(fd)
            .map_err(VhostError::ReqHandlerError)?;
        if vring.running.is_some() {
            // The guest may have used the ring while this message was under way (QEMU has it wait for nothing), and what was
            // signalled meanwhile went to the eventfd before this one, which nobody may look at any more.
            vring.call.signal();
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> VhostResult<()> {
        let index = self.index(u32::from(index))?;
        self.vrings[index]
            .error
            .replace(fd)
            .map_err(VhostError::ReqHandlerError)
    }

    fn get_protocol_features(&mut self) -> VhostResult<VhostUserProtocolFeatures> {
        Ok(self.disk.protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> VhostResult<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(refuse(format!(
                "protocol features {:#x} were not offered",
                features & !offered
            )));
        }
        let needed = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG;
        self.backend_channel.negotiated = features & needed.bits() == needed.bits();
        Ok(())
    }

    fn get_queue_num(&mut self) -> VhostResult<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> VhostResult<()> {
        let index = self.index(index)?;
        self.vrings[index].enabled = enable;
        if enable {
            self.start_queue(index)
        } else {
            self.stop_queues(&[index])
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<Vec<u8>> {
        self.show_size();
        let Some(disk) = self.disk.disk() else {
            return Err(not_offered("GET_CONFIG"));
        };
        let space = disk.config_space(self.capacity.shown, self.disk.queues.len());
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(usize::try_from(size).unwrap_or(usize::MAX));
        let bytes = end.and_then(|end| space.get(start..end));
        let bytes = bytes.ok_or_else(|| {
            refuse(format!(
                "{size} bytes at {offset} of the configuration space"
            ))
        })?;
        if offset == 0 && size >= CAPACITY_BYTES {
            self.capacity.asked = Some(self.capacity.shown);
        }
        Ok(bytes.to_vec())
    }

    fn set_config(
        &mut self,
        offset: u32,
        bytes: &[u8],
        _flags: VhostUserConfigFlags,
    ) -> VhostResult<()> {
        let Some(disk) = self.disk.disk() else {
            return Err(not_offered("SET_CONFIG"));
        };
        let writeback = match bytes {
            [writeback @ (0 | 1)] if offset == WRITEBACK_OFFSET => *writeback == 1,
            _ => {
                let len = bytes.len();
                return Err(refuse(format!(
                    "write of {len} bytes at {offset} of the configuration space: read only"
                )));
            }
        };
        if disk.writeback.swap(writeback, Ordering::Relaxed) != writeback {
            tracing::info!(disk = %self.disk.name, writeback, "cache mode changed by the guest");
            self.quiesce()?;
            self.start_ready()?;
        }
        Ok(())
    }

    /// The message was as it should be. `_backend` is the same socket, for what the `vhost` crate has words for.
    fn set_backend_req_fd(&mut self, _backend: Backend) {
        self.backend_channel.socket = self.backend_channel.peeked.take();
    }

    fn get_max_mem_slots(&mut self) -> VhostResult<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> VhostResult<Option<u64>> {
        let info = RegionInfo::from(&**region);
        self.change_memory(|table| table.add(info, fd))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> VhostResult<()> {
        let info = RegionInfo::from(&**region);
        self.change_memory(|table| table.remove(info))
    }

    fn get_inflight_fd(
        &mut self,
        _inflight: &VhostUserInflight,
    ) -> VhostResult<(VhostUserInflight, File)> {
        Err(not_offered("GET_INFLIGHT_FD"))
    }

    fn set_inflight_fd(&mut self, _inflight: &VhostUserInflight, _file: File) -> VhostResult<()> {
        Err(not_offered("SET_INFLIGHT_FD"))
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> VhostResult<()> {
        Err(not_offered("GPU_SET_SOCKET"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> VhostResult<File> {
        Err(not_offered("GET_SHARED_OBJECT"))
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> VhostResult<Option<File>> {
        Err(not_offered("SET_DEVICE_STATE_FD"))
    }

    fn check_device_state(&mut self) -> VhostResult<()> {
        Err(not_offered("CHECK_DEVICE_STATE"))
    }

    fn get_shmem_config(&mut self) -> VhostResult<VhostUserShMemConfig> {
        Err(not_offered("GET_SHMEM_CONFIG"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> VhostResult<()> {
        Err(not_offered("SET_LOG_BASE"))
    }
}

fn not_offered(message: &str) -> VhostError {
    refuse(format!("{message}: not offered"))
}
