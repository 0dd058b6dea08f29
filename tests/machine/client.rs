//! A polled vhost-user-blk client: a front-end, a guest's memory with a canary around everything that the server may
//! touch, and a virtqueue driver for each queue.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem::sim::front_end::HUGE_PAGE;
use tandem::sim::front_end::feature::{F_EVENT_IDX, F_INDIRECT, F_PROTOCOL, F_VERSION_1};
use tandem::sim::front_end::request::GET_FEATURES;
use tandem::sim::{FrontEnd, SharedMemory, SimCompletion, SimGuest, SimGuestConfig, SimRequest};
use tandem::virtio::blk::{feature, request_type, status};
use tandem::virtio::memory::Gpa;
use tandem::virtio::virtqueue::RingLayout;

use crate::load::SECTOR;

/// How long a request may take: an emulated machine is slow, and a server may be draining another client.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Every client has its memory here: two clients of a server use the same addresses.
const BASE: u64 = 0x10_0000;
const CANARY: u8 = 0xc5;
const CANARY_BYTES: u64 = 1 << 20;
const FEATURES: u64 = F_PROTOCOL
    | F_VERSION_1
    | F_INDIRECT
    | F_EVENT_IDX
    | feature::FLUSH
    | feature::MQ
    | feature::DISCARD
    | feature::WRITE_ZEROES;

pub struct Client {
    front_end: FrontEnd,
    pub queues: Vec<SimGuest>,
    /// The kick eventfd of each.
    pub kicks: Vec<File>,
    /// Where the canaries begin: in front of the queues and behind them.
    canaries: [u64; 2],
    pub shared: SharedMemory,
}

/// What pages a client shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pages {
    Ordinary,
    /// Of 2 MiB.
    Huge,
}

/// Shows the server what was submitted, and kicks it if it wants that.
pub fn publish(queue: &mut SimGuest, mut kick: &File) {
    if queue.publish() {
        kick.write_all(&1_u64.to_ne_bytes()).expect("an eventfd");
    }
}

impl Client {
    /// Connects and starts `queues` virtqueues of `size` entries. `None` when the server turns us away: it is still
    /// busy with the client before.
    pub fn try_connect(
        path: &Path,
        pages: Pages,
        queues: u32,
        size: u16,
        max_data: u32,
    ) -> Option<Client> {
        let front_end = FrontEnd::connect(path);
        // As `negotiate` asks first, but closed is an answer here.
        front_end
            .send_raw(&FrontEnd::message(GET_FEATURES, 1, &[]), &[])
            .ok()?;
        front_end.try_receive(GET_FEATURES)?;
        let (offered, _) = front_end.negotiate();
        let missing = FEATURES & !offered;
        assert_eq!(missing, 0, "features that are not offered: {missing:#x}");

        let config = |base| SimGuestConfig {
            layout: RingLayout::Split,
            size,
            event_idx: true,
            indirect: true,
            max_data,
            first_index: 65_500,
            base,
        };
        let each = config(Gpa(BASE)).bytes().next_multiple_of(4096);
        let first = BASE + CANARY_BYTES;
        let end = first + each * u64::from(queues);
        let bytes = end + CANARY_BYTES - BASE;
        let shared = match pages {
            Pages::Ordinary => SharedMemory::new(Gpa(BASE), bytes),
            Pages::Huge => SharedMemory::on_huge_pages(Gpa(BASE), bytes),
        };
        let drivers = (0..u64::from(queues)).map(|index| {
            let config = config(Gpa(first + each * index));
            SimGuest::new(Arc::clone(&shared.memory), config).expect("one region")
        });
        let drivers: Vec<SimGuest> = drivers.collect();
        let canaries = [BASE, end];
        for at in canaries {
            drivers[0].write(Gpa(at), &vec![CANARY; CANARY_BYTES as usize]);
        }
        front_end.share(FEATURES, &shared);
        let numbered = (0..).zip(&drivers);
        let kicks = numbered.map(|(index, driver)| front_end.start_queue(index, driver, &shared).0);
        let kicks = kicks.collect();
        let mut queues = drivers;
        for queue in &mut queues {
            queue.disable_signals();
        }
        Some(Client {
            front_end,
            queues,
            kicks,
            canaries,
            shared,
        })
    }

    pub fn connect(path: &Path, queues: u32, size: u16, max_data: u32) -> Client {
        Client::connect_with(path, Pages::Ordinary, queues, size, max_data)
    }

    pub fn connect_with(
        path: &Path,
        pages: Pages,
        queues: u32,
        size: u16,
        max_data: u32,
    ) -> Client {
        let start = Instant::now();
        loop {
            if let Some(client) = Client::try_connect(path, pages, queues, size, max_data) {
                return client;
            }
            assert!(
                start.elapsed() < DEADLINE,
                "{} turns us away",
                path.display()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// How many of the buffers that requests use go on from one huge page into the next.
    pub fn crossings(&self, size: u16, max_data: u32) -> usize {
        let page = |at: u64| (at - BASE) / HUGE_PAGE;
        let buffers = self
            .queues
            .iter()
            .flat_map(|queue| (0..size).map(|head| queue.data_at(head).0));
        buffers
            .filter(|at| page(*at) != page(at + u64::from(max_data) - 1))
            .count()
    }

    /// One request at a time, by queue 0: its completion.
    pub fn request(&mut self, request: &SimRequest, data: &[u8]) -> SimCompletion {
        let queue = &mut self.queues[0];
        queue.submit(request, data).expect("an idle queue");
        publish(queue, &self.kicks[0]);
        let start = Instant::now();
        loop {
            if let Some(completion) = queue.poll_used() {
                return completion;
            }
            assert!(start.elapsed() < DEADLINE, "no completion: {request:?}");
            std::hint::spin_loop();
        }
    }

    pub fn write(&mut self, sector: u64, data: &[u8]) {
        let len = u32::try_from(data.len()).expect("a request's length");
        let request = SimRequest::new(request_type::OUT, sector, len, false);
        assert_eq!(
            self.request(&request, data).status,
            status::OK,
            "{request:?}"
        );
    }

    pub fn read(&mut self, sector: u64, data: &mut [u8]) {
        let len = u32::try_from(data.len()).expect("a request's length");
        let request = SimRequest::new(request_type::IN, sector, len, true);
        let completion = self.request(&request, &[]);
        assert_eq!(completion.status, status::OK, "{request:?}");
        self.queues[0].read_data(completion.head, data);
    }

    /// Reads `sectors` from the beginning, in pieces.
    pub fn read_all(&mut self, sector: u64, sectors: u64, piece: usize) -> Vec<u8> {
        let mut all = vec![0; (sectors * SECTOR) as usize];
        for (index, piece_of) in all.chunks_mut(piece).enumerate() {
            self.read(sector + (index * piece) as u64 / SECTOR, piece_of);
        }
        all
    }

    /// The buffer of a head of queue 0, as it stands.
    pub fn data_of(&self, head: u16, len: u32) -> Vec<u8> {
        let mut bytes = vec![0; len as usize];
        self.queues[0].read(self.queues[0].data_at(head), &mut bytes);
        bytes
    }

    /// Nothing was written where nothing was asked for.
    pub fn check_canaries(&self) {
        for at in self.canaries {
            let mut bytes = vec![0; CANARY_BYTES as usize];
            self.queues[0].read(Gpa(at), &mut bytes);
            let stray = bytes.iter().position(|byte| *byte != CANARY);
            assert_eq!(stray, None, "a stray byte behind {at:#x} of guest memory");
        }
    }

    /// Closes the connection, as the end of this process would. The memory stays, for us to look at.
    pub fn hang_up(&self) {
        let _ = self.front_end.socket.shutdown(std::net::Shutdown::Both);
    }

    /// Has the server closed the connection? Does not wait.
    pub fn is_gone(&self) -> bool {
        let socket = &self.front_end.socket;
        let mut byte = [0];
        let peeked = rustix::net::recv(
            socket,
            &mut byte[..],
            rustix::net::RecvFlags::PEEK | rustix::net::RecvFlags::DONTWAIT,
        );
        match peeked {
            Ok((_, received)) => received == 0,
            Err(error) => error != rustix::io::Errno::AGAIN,
        }
    }
}
