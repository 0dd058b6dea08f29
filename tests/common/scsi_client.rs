//! A SCSI initiator of a whole server: a front-end with one request queue and its control queue, and where the server's sockets are.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use tandem::config::{CoreId, Options};
use tandem::control::server::Server;
use tandem::plan::{Topology, plan};
use tandem::sim::front_end::feature::*;
use tandem::sim::front_end::{FrontEnd, SharedMemory};
use tandem::sim::{RawDescriptor, SimGuest, SimGuestConfig};
use tandem::virtio::memory::Gpa;
use tandem::virtio::virtqueue::RingLayout;

const BASE: u64 = 0x10_0000;
const MEMORY: u64 = 4 << 20;
/// Where commands are: a slot for each four heads.
const COMMANDS: u64 = BASE + MEMORY / 2;
/// Where the ring of the control queue is, and its one request at a time.
const CONTROL: u64 = BASE + MEMORY / 4;
const FUNCTION: u64 = COMMANDS + MEMORY / 8;
const SLOT: u64 = 0x4000;
const RESPONSE: u64 = 0x200;
const DATA: u64 = 0x400;
const SIZE: u16 = 64;
pub const DEADLINE: Duration = Duration::from_secs(10);
/// HOTPLUG and CHANGE among them.
pub const FEATURES: u64 = F_PROTOCOL | F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | 1 << 1 | 1 << 2;

pub const GOOD: u8 = 0x00;
pub const CHECK: u8 = 0x02;

/// A folder for sockets, which goes last.
pub struct Place(pub PathBuf);

impl Place {
    pub fn new() -> Place {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let folder = format!("tandem-scsi-{}-{count}", std::process::id());
        let folder = std::env::temp_dir().join(folder);
        fs::create_dir_all(&folder).unwrap();
        Place(folder)
    }

    pub fn connect(&self, name: &str) -> Client {
        Client::connect(&self.0.join(name), FEATURES)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Starts a server on core 0.
pub fn serve(mut options: Options) -> Result<Server, String> {
    options.server.cores = Some("0".parse().unwrap());
    let config = options.resolve().unwrap();
    let plan = plan(&config, &Topology::from_online_cores([CoreId(0)])).unwrap();
    Server::start(&plan).map_err(|error| error.to_string())
}

pub fn ends_well(server: Server) {
    let report = server.stop().expect("the server did not end cleanly");
    let clean = report.contains("iommu violations 0, driver errors 0");
    assert!(clean, "{report}");
}

/// A front-end with one request queue and the control queue.
pub struct Client {
    /// Whom its commands are for.
    pub lun: [u8; 8],
    /// Dropped first: the server must not miss the rest.
    pub front_end: FrontEnd,
    driver: SimGuest,
    control: SimGuest,
    next: u16,
    pub shared: SharedMemory,
    /// Of each queue, to kick and to be called by.
    pub files: Vec<(u32, (fs::File, fs::File))>,
}

/// How a command ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Reply {
    /// The transport's, 0 where the status counts.
    pub response: u8,
    pub status: u8,
    /// Key, code and qualifier.
    pub sense: Option<(u8, u8, u8)>,
}

impl Client {
    pub fn connect(path: &Path, features: u64) -> Client {
        let front_end = FrontEnd::connect(path);
        front_end.negotiate();
        let shared = SharedMemory::new(Gpa(BASE), MEMORY);
        let ring = |base| SimGuestConfig {
            layout: RingLayout::Split,
            size: SIZE,
            event_idx: true,
            indirect: true,
            max_data: 4096,
            first_index: 0,
            base: Gpa(base),
        };
        assert!(ring(BASE).bytes() < MEMORY / 4);
        let guest = |base| SimGuest::new(std::sync::Arc::clone(&shared.memory), ring(base));
        let (driver, control) = (guest(BASE).unwrap(), guest(CONTROL).unwrap());
        front_end.share(features, &shared);
        let mut client = Client {
            lun: [1, 0, 0x40, 0, 0, 0, 0, 0],
            front_end,
            driver,
            control,
            next: 0,
            shared,
            files: Vec::new(),
        };
        let Client {
            front_end, shared, ..
        } = &client;
        let queues = [(0, &client.control), (2, &client.driver)];
        let files = queues.map(|(at, queue)| (at, front_end.start_queue(at, queue, shared)));
        client.files = files.into();
        client
    }

    pub fn kick(&self, index: u32) {
        let queue = self.files.iter().find(|(own, _)| *own == index);
        rustix::io::write(&queue.unwrap().1.0, &1_u64.to_ne_bytes()).unwrap();
    }

    fn slot(head: u16) -> u64 {
        COMMANDS + u64::from(head / 4) * SLOT
    }

    /// Offers a command with room for data, or with data; its head.
    pub fn send(&mut self, cdb: &[u8], out: &[u8]) -> u16 {
        let head = self.next;
        self.next = (head + 4) % SIZE;
        let at = Self::slot(head);
        let mut header = [0; 51];
        header[..8].copy_from_slice(&self.lun);
        header[8..16].copy_from_slice(&u64::from(head).to_le_bytes());
        header[19..19 + cdb.len()].copy_from_slice(cdb);
        self.driver.write(Gpa(at), &header);
        let mut chain = vec![(at, 51, 0)];
        if out.is_empty() {
            chain.push((at + RESPONSE, 108, 2));
            chain.push((at + DATA, (SLOT - DATA) as u32, 2));
        } else {
            self.driver.write(Gpa(at + DATA), out);
            chain.push((at + DATA, out.len() as u32, 0));
            chain.push((at + RESPONSE, 108, 2));
        }
        let last = chain.len() - 1;
        for (index, (gpa, len, flags)) in chain.into_iter().enumerate() {
            let at = head + index as u16;
            let descriptor = RawDescriptor {
                gpa,
                len,
                flags: flags | u16::from(index != last),
                next: at + 1,
            };
            self.driver.write_descriptor(at, descriptor);
        }
        self.driver.offer(head);
        self.driver.publish();
        self.kick(2);
        head
    }

    pub fn try_take(&mut self) -> Option<(u16, Reply)> {
        let (head, _) = self.driver.take_used()?;
        let head = head as u16;
        let mut bytes = [0; 30];
        self.driver
            .read(Gpa(Self::slot(head) + RESPONSE), &mut bytes);
        let told = bytes[0] > 0;
        let sense = told.then(|| (bytes[14], bytes[24], bytes[25]));
        let (response, status) = (bytes[11], bytes[10]);
        let reply = Reply {
            response,
            status,
            sense,
        };
        Some((head, reply))
    }

    #[track_caller]
    pub fn take(&mut self) -> (u16, Reply) {
        let start = Instant::now();
        loop {
            if let Some(taken) = self.try_take() {
                return taken;
            }
            assert!(start.elapsed() < DEADLINE, "no answer");
            std::thread::yield_now();
        }
    }

    #[track_caller]
    pub fn run(&mut self, cdb: &[u8], out: &[u8]) -> Reply {
        let sent = self.send(cdb, out);
        let (head, reply) = self.take();
        assert_eq!((head, reply.response), (sent, 0));
        reply
    }

    /// What a command says that ends well.
    #[track_caller]
    pub fn says(&mut self, cdb: &[u8], len: usize) -> Vec<u8> {
        let head = self.next;
        assert_eq!(self.run(cdb, &[]).status, GOOD, "{cdb:02x?}");
        let mut data = vec![0; len];
        self.driver.read(Gpa(Self::slot(head) + DATA), &mut data);
        data
    }

    /// Has a task management function carried out about the command whose tag is its head; its response.
    #[track_caller]
    pub fn manage(&mut self, function: u32, head: u16) -> u8 {
        let mut request = [0, function].map(u32::to_le_bytes).concat();
        request.extend(self.lun);
        request.extend(u64::from(head).to_le_bytes());
        self.control.write(Gpa(FUNCTION), &request);
        let answer = FUNCTION + 0x100;
        for (index, (gpa, len, flags)) in
            [(FUNCTION, 24, 1), (answer, 1, 2)].into_iter().enumerate()
        {
            let index = index as u16;
            let descriptor = RawDescriptor {
                gpa,
                len,
                flags,
                next: index + 1,
            };
            self.control.write_descriptor(index, descriptor);
        }
        self.control.offer(0);
        self.control.publish();
        self.kick(0);
        let start = Instant::now();
        while self.control.take_used().is_none() {
            assert!(start.elapsed() < DEADLINE, "the function is not answered");
            std::thread::yield_now();
        }
        let mut response = [0];
        self.control.read(Gpa(answer), &mut response);
        response[0]
    }

    /// The unit attention that waits.
    #[track_caller]
    pub fn is_told(&mut self, asc: u8, ascq: u8) {
        let reply = self.run(&[0; 6], &[]);
        let sense = Some((6, asc, ascq));
        assert_eq!((reply.status, reply.sense), (CHECK, sense));
    }
}
