//! `--verify crc32c`: every block that is written says where it belongs and which of the writes to that place it is.
//!
//! ```text
//!  0        8        16           24     32     36     40
//!  | magic  | offset | generation | seed | len  | crc  | noise ...        little-endian, crc over all of the block
//! ```
//! A read is held against it: the place, the checksum and, where this run has written the place, seed and generation. In
//! a run that writes, places that it has not written are not judged; in one that only reads all are.

use super::io::{Io, Op, Random, Region};

/// Bytes before the noise.
pub const HEADER_BYTES: u32 = 40;
/// "TandemVf".
const MAGIC: u64 = u64::from_le_bytes(*b"TandemVf");
const CRC_AT: usize = 36;

/// What a read should have been.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("verify: offset {offset}, {len} bytes: {what}")]
pub struct Mismatch {
    pub offset: u64,
    pub len: u32,
    pub what: String,
}

/// What this run has written, place by place.
#[derive(Debug)]
pub struct Verifier {
    region: Region,
    bs: u32,
    seed: u64,
    writes: bool,
    /// Of the last write that completed; 0: none.
    generations: Vec<u32>,
    busy: Vec<u64>,
    random: Random,
    scratch: Vec<u8>,
    pub checked: u64,
}

impl Verifier {
    #[must_use]
    pub fn new(region: Region, bs: u32, seed: u64, writes: bool) -> Verifier {
        let places = usize::try_from(region.places).unwrap_or(usize::MAX);
        Verifier {
            region,
            bs,
            seed,
            writes,
            generations: vec![0; places],
            busy: vec![0; places.div_ceil(64)],
            random: Random::new(seed),
            scratch: vec![0; bs as usize],
            checked: 0,
        }
    }

    fn place(&self, offset: u64) -> usize {
        let place = (offset - self.region.base) / u64::from(self.bs);
        usize::try_from(place).unwrap_or(usize::MAX)
    }

    #[must_use]
    pub fn is_busy(&self, place: u64) -> bool {
        let place = usize::try_from(place).unwrap_or(usize::MAX);
        self.busy[place / 64] & 1 << (place % 64) != 0
    }

    fn set_busy(&mut self, place: usize, busy: bool) {
        let bit = 1 << (place % 64);
        if busy {
            self.busy[place / 64] |= bit;
        } else {
            self.busy[place / 64] &= !bit;
        }
    }

    /// `io` is about to be sent: for a write, the data to send.
    pub fn prepare(&mut self, io: Io) -> Option<&[u8]> {
        if io.op == Op::Flush {
            return None;
        }
        let place = self.place(io.offset);
        self.set_busy(place, true);
        if io.op != Op::Write {
            return None;
        }
        let (noise, _) = self.scratch[HEADER_BYTES as usize..].as_chunks_mut::<8>();
        for word in noise {
            *word = self.random.next().to_le_bytes();
        }
        let generation = u64::from(self.generations[place].wrapping_add(1));
        let words = [MAGIC, io.offset, generation, self.seed];
        for (word, bytes) in words.iter().zip(self.scratch.as_chunks_mut::<8>().0) {
            *bytes = word.to_le_bytes();
        }
        self.scratch[32..CRC_AT].copy_from_slice(&self.bs.to_le_bytes());
        let crc = checksum(&self.scratch);
        self.scratch[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
        Some(&self.scratch)
    }

    /// `io` completed; `read` fetches the data of a read.
    ///
    /// # Errors
    /// [`Mismatch`].
    pub fn finish(&mut self, io: Io, read: impl FnOnce(&mut [u8])) -> Result<(), Mismatch> {
        if io.op == Op::Flush {
            return Ok(());
        }
        let place = self.place(io.offset);
        self.set_busy(place, false);
        let generation = self.generations[place];
        match io.op {
            Op::Write => self.generations[place] = generation.wrapping_add(1),
            Op::Read if generation > 0 || !self.writes => {
                read(&mut self.scratch);
                self.checked += 1;
                let wanted = (generation > 0).then_some((self.seed, u64::from(generation)));
                check(&self.scratch, io.offset, wanted).map_err(|what| Mismatch {
                    offset: io.offset,
                    len: io.len,
                    what,
                })?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Reads of all that this run has written.
    pub fn written(&self) -> impl Iterator<Item = Io> + use<> {
        let (base, bs) = (self.region.base, self.bs);
        let places = self.generations.iter().enumerate();
        let written: Vec<u64> = places
            .filter(|(_, generation)| **generation > 0)
            .map(|(place, _)| place as u64)
            .collect();
        written.into_iter().map(move |place| Io {
            op: Op::Read,
            offset: base + place * u64::from(bs),
            len: bs,
        })
    }
}

/// Over all of a block, its own place taken as zero.
fn checksum(block: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&block[..CRC_AT]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    crc32c::crc32c_append(crc, &block[CRC_AT + 4..])
}

fn check(block: &[u8], offset: u64, wanted: Option<(u64, u64)>) -> Result<(), String> {
    let word = |index: usize| {
        let bytes = block.as_chunks::<8>().0.get(index);
        bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
    };
    let [magic, at, generation, seed] = [0, 1, 2, 3].map(word);
    if magic != MAGIC {
        return Err(format!(
            "no block that --verify has written (it begins with {magic:#018x})"
        ));
    }
    let half = |at: usize| {
        block[at..at + 4]
            .iter()
            .rev()
            .fold(0, |n, b| n << 8 | u32::from(*b))
    };
    let (stored, computed) = (half(CRC_AT), checksum(block));
    if stored != computed {
        return Err(format!(
            "crc32c is {computed:#010x}, the header says {stored:#010x}"
        ));
    }
    if at != offset {
        return Err(format!("the block belongs to offset {at}"));
    }
    if half(32) as usize != block.len() {
        return Err(format!("it was written in blocks of {} bytes", half(32)));
    }
    match wanted {
        Some((own, newest)) if (seed, generation) != (own, newest) => Err(format!(
            "an old block: generation {generation} of seed {seed}, the last write was generation {newest} of seed {own}"
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REGION: Region = Region {
        base: 4096,
        places: 4,
    };

    fn io(op: Op, place: u64) -> Io {
        Io {
            op,
            offset: 4096 + 512 * place,
            len: 512,
        }
    }

    fn write(verifier: &mut Verifier, place: u64) -> Vec<u8> {
        let block = verifier.prepare(io(Op::Write, place)).unwrap().to_vec();
        verifier.finish(io(Op::Write, place), |_| ()).unwrap();
        block
    }

    fn read(verifier: &mut Verifier, place: u64, block: &[u8]) -> Result<(), Mismatch> {
        assert_eq!(verifier.prepare(io(Op::Read, place)), None);
        verifier.finish(io(Op::Read, place), |out| out.copy_from_slice(block))
    }

    #[test]
    fn block_that_was_written_last_is_accepted_and_every_other_is_not() {
        let mut verifier = Verifier::new(REGION, 512, 7, true);
        let old = write(&mut verifier, 1);
        let other = write(&mut verifier, 2);
        let new = write(&mut verifier, 1);
        assert_eq!(read(&mut verifier, 1, &new), Ok(()));
        let error = read(&mut verifier, 1, &old).unwrap_err().to_string();
        assert!(
            error.contains("offset 4608") && error.contains("generation 1"),
            "{error}"
        );
        assert!(
            read(&mut verifier, 1, &other)
                .unwrap_err()
                .what
                .contains("belongs to")
        );
        assert!(
            read(&mut verifier, 1, &[0; 512])
                .unwrap_err()
                .what
                .contains("no block")
        );
        for bit in [8, 300, 500] {
            let mut torn = new.clone();
            torn[bit] ^= 4;
            assert!(read(&mut verifier, 1, &torn).is_err(), "{bit}");
        }
        assert_eq!(verifier.checked, 7);
    }

    #[test]
    fn place_that_was_not_written_is_judged_only_where_nothing_writes() {
        let mut writing = Verifier::new(REGION, 512, 7, true);
        assert_eq!(read(&mut writing, 0, &[0; 512]), Ok(()));
        let mut reading = Verifier::new(REGION, 512, 8, false);
        let block = write(&mut writing, 0);
        assert_eq!(read(&mut reading, 0, &block), Ok(()));
        assert!(read(&mut reading, 1, &block).is_err());
    }

    #[test]
    fn place_is_busy_from_prepare_to_finish() {
        let mut verifier = Verifier::new(REGION, 512, 7, true);
        verifier.prepare(io(Op::Write, 3));
        assert!(verifier.is_busy(3) && !verifier.is_busy(2));
        verifier.finish(io(Op::Write, 3), |_| ()).unwrap();
        assert!(!verifier.is_busy(3));
        assert_eq!(verifier.written().count(), 1);
    }
}
