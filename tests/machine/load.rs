//! A load that is settled by its arguments alone: which requests each queue sends, and so what the disk holds at the
//! end. The client in the machine sends it; the test outside works the same content out and compares the image.

use crate::rng::Rng;

pub const SECTOR: u64 = 512;

/// `seed=7,queues=4,requests=1000,mib=8,block=512`
#[derive(Clone, Copy, Debug)]
pub struct Load {
    pub seed: u64,
    pub queues: u32,
    /// Of each queue.
    pub requests: u64,
    /// Of each queue: queue `i` has the bytes from `i * mib` MiB.
    mib: u64,
    /// Requests are multiples of this, in bytes.
    block: u64,
}

/// The largest request, whatever the block size.
pub const MAX_DATA: u32 = 128 << 10;

impl Load {
    pub fn parse(text: &str) -> Load {
        let value = |key: &str| -> u64 {
            let found = text
                .split(',')
                .find_map(|item| item.strip_prefix(key)?.strip_prefix('='));
            let found = found.unwrap_or_else(|| panic!("a load has a {key}: {text}"));
            found
                .parse()
                .unwrap_or_else(|_| panic!("{key} is a number: {text}"))
        };
        Load {
            seed: value("seed"),
            queues: value("queues") as u32,
            requests: value("requests"),
            mib: value("mib"),
            block: value("block"),
        }
    }

    /// The load of the disk with this number among several that are loaded at once.
    pub fn with_seed_of(self, disk: u64) -> Load {
        Load {
            seed: self.seed + disk,
            ..self
        }
    }

    /// Where the part of a queue begins.
    pub fn first_sector(&self, queue: u32) -> u64 {
        u64::from(queue) * self.sectors()
    }

    /// How long it is.
    pub fn sectors(&self) -> u64 {
        (self.mib << 20) / SECTOR
    }

    pub fn plan(&self, queue: u32) -> Plan {
        Plan {
            rng: Rng::new(self.seed << 8 | u64::from(queue)),
            left: self.requests,
            blocks: (self.mib << 20) / self.block,
            block: self.block,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    /// What it writes comes from this seed.
    Write(u64),
    Flush,
    Discard,
    /// May it unmap?
    Zeroes(bool),
}

/// One request. Sectors are counted within the queue's part.
#[derive(Clone, Copy, Debug)]
pub struct Action {
    pub kind: Kind,
    pub sector: u64,
    pub sectors: u64,
}

impl Action {
    pub fn content(&self) -> Vec<u8> {
        let Kind::Write(seed) = self.kind else {
            return Vec::new();
        };
        let mut bytes = vec![0; (self.sectors * SECTOR) as usize];
        Rng::new(seed).fill(&mut bytes);
        bytes
    }
}

/// The requests of one queue.
pub struct Plan {
    rng: Rng,
    left: u64,
    blocks: u64,
    block: u64,
}

impl Iterator for Plan {
    type Item = Action;

    fn next(&mut self) -> Option<Action> {
        self.left = self.left.checked_sub(1)?;
        let rng = &mut self.rng;
        let kind = match rng.below(100) {
            0..45 => Kind::Write(rng.next()),
            45..80 => Kind::Read,
            80..88 => Kind::Flush,
            88..94 => Kind::Zeroes(rng.one_in(2)),
            _ => Kind::Discard,
        };
        let most = u64::from(MAX_DATA) / self.block;
        let few = most.min(16);
        let most = *rng.pick(&[few, few, few, few, most]);
        let blocks = 1 + rng.below(most);
        let first = rng.below(self.blocks - blocks + 1);
        let sectors = self.block / SECTOR;
        let (sector, sectors) = match kind {
            Kind::Flush => (0, 0),
            _ => (first * sectors, blocks * sectors),
        };
        Some(Action {
            kind,
            sector,
            sectors,
        })
    }
}

/// What is known of one sector.
#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    /// Nobody of ours wrote it.
    Foreign,
    /// It reads as the bytes.
    Written,
    /// It reads as the bytes or as zeroes: a controller need not do what it is advised to.
    Discarded,
}

/// What a comparison has found, in sectors.
#[derive(Clone, Copy, Debug, Default)]
pub struct Compared {
    pub sectors: u64,
    /// Discarded ones that read as zeroes now, and did not before.
    pub discarded: u64,
}

/// What the part of one queue holds.
pub struct Oracle {
    bytes: Vec<u8>,
    states: Vec<State>,
}

impl Oracle {
    pub fn new(load: &Load) -> Oracle {
        Oracle {
            bytes: vec![0; (load.sectors() * SECTOR) as usize],
            states: vec![State::Foreign; load.sectors() as usize],
        }
    }

    /// The request has been carried out.
    pub fn apply(&mut self, action: &Action) {
        let sectors = action.sector as usize..(action.sector + action.sectors) as usize;
        let bytes = sectors.start * SECTOR as usize..sectors.end * SECTOR as usize;
        let states = &mut self.states[sectors];
        match action.kind {
            Kind::Read | Kind::Flush => {}
            Kind::Write(_) => {
                self.bytes[bytes].copy_from_slice(&action.content());
                states.fill(State::Written);
            }
            Kind::Zeroes(_) => {
                self.bytes[bytes].fill(0);
                states.fill(State::Written);
            }
            Kind::Discard => {
                let written = states.iter_mut().filter(|state| **state == State::Written);
                written.for_each(|state| *state = State::Discarded);
            }
        }
    }

    /// Compares what was read from `sector` on.
    ///
    /// # Errors
    /// The first sector that differs.
    pub fn compare(&self, sector: u64, read: &[u8]) -> Result<Compared, String> {
        let mut compared = Compared::default();
        for (index, read) in read.chunks(SECTOR as usize).enumerate() {
            let at = sector as usize + index;
            let want = &self.bytes[at * SECTOR as usize..][..SECTOR as usize];
            let zero = |bytes: &[u8]| bytes.iter().all(|byte| *byte == 0);
            match self.states[at] {
                State::Foreign => continue,
                State::Discarded if zero(read) => {
                    compared.discarded += u64::from(!zero(want));
                    continue;
                }
                State::Written | State::Discarded => {}
            }
            compared.sectors += 1;
            if let Some(byte) = want.iter().zip(read).position(|(want, read)| want != read) {
                return Err(format!(
                    "sector {at} of the part, byte {byte}: {:02x?} instead of {:02x?}",
                    &read[byte..(byte + 16).min(512)],
                    &want[byte..(byte + 16).min(512)],
                ));
            }
        }
        Ok(compared)
    }
}
