//! A small generator (SplitMix64): the same seed gives the same commands everywhere.

pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Rng {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0x0074_7275_7468)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// `from` to `to`, both included.
    pub fn within(&mut self, from: u64, to: u64) -> u64 {
        from + self.next() % (to - from + 1)
    }

    pub fn index(&mut self, len: usize) -> usize {
        // The remainder is smaller than `len`.
        usize::try_from(self.next() % len as u64).unwrap_or(0)
    }

    pub fn pick<V: Copy>(&mut self, choices: &[V]) -> V {
        choices[self.index(choices.len())]
    }

    pub fn shuffle<V>(&mut self, values: &mut [V]) {
        for i in (1..values.len()).rev() {
            values.swap(i, self.index(i + 1));
        }
    }

    /// Never zeroes only.
    pub fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            let word = (self.next() | 1).to_le_bytes();
            chunk.copy_from_slice(&word[..chunk.len()]);
        }
    }
}
