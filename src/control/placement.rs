//! Which queue pair each virtqueue rides with: a pure function of the cores the plan chose and the number of queue
//! pairs that the device granted.
#![forbid(unsafe_code)]

/// One virtqueue's place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of its queue pair among those to create.
    pub pair: usize,
    /// The core whose reactor polls that queue pair.
    pub core: usize,
}

/// Places the virtqueues of one device, whose planned cores are `cores`, on at most `granted` queue pairs.
///
/// With enough queue pairs each virtqueue has its own, on its planned core. With fewer, virtqueues of the same core
/// share first; a core that would get no queue pair at all sends its virtqueues to another core, since a queue pair
/// is never touched by two.
#[must_use]
pub fn place(cores: &[usize], granted: usize) -> Vec<Place> {
    let granted = granted.max(1);
    if cores.len() <= granted {
        return cores
            .iter()
            .enumerate()
            .map(|(pair, core)| Place { pair, core: *core })
            .collect();
    }
    let mut distinct: Vec<usize> = Vec::new();
    for core in cores {
        if !distinct.contains(core) {
            distinct.push(*core);
        }
    }
    distinct.truncate(granted);
    // Queue pair p lives on core `distinct[p % n]`: every core gets its share of them.
    let pair_core = |pair: usize| distinct[pair % distinct.len()];
    let mut load = vec![0_usize; granted];
    cores
        .iter()
        .enumerate()
        .map(|(i, planned)| {
            let core = if distinct.contains(planned) {
                *planned
            } else {
                distinct[i % distinct.len()]
            };
            let least = (0..granted)
                .filter(|pair| pair_core(*pair) == core)
                .min_by_key(|pair| load[*pair]);
            let pair = least.unwrap_or(0);
            load[pair] += 1;
            Place {
                pair,
                core: pair_core(pair),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(cores: &[usize], granted: usize) -> Vec<(usize, usize)> {
        place(cores, granted)
            .into_iter()
            .map(|place| (place.pair, place.core))
            .collect()
    }

    #[test]
    fn place_with_enough_queue_pairs_gives_each_virtqueue_its_own() {
        assert_eq!(pairs(&[3, 5, 3], 3), [(0, 3), (1, 5), (2, 3)]);
        assert_eq!(pairs(&[0, 1], 64), [(0, 0), (1, 1)]);
    }

    #[test]
    fn place_with_fewer_shares_within_a_core_and_spreads_the_load() {
        assert_eq!(pairs(&[0, 1, 0, 1], 2), [(0, 0), (1, 1), (0, 0), (1, 1)]);
        assert_eq!(pairs(&[0, 0, 0, 0], 2), [(0, 0), (1, 0), (0, 0), (1, 0)]);
    }

    #[test]
    fn place_with_fewer_queue_pairs_than_cores_moves_virtqueues() {
        assert_eq!(pairs(&[0, 1, 2, 3], 2), [(0, 0), (1, 1), (0, 0), (1, 1)]);
        assert_eq!(pairs(&[7, 8], 1), [(0, 7), (0, 7)]);
    }

    #[test]
    fn place_never_puts_one_queue_pair_on_two_cores() {
        for granted in 1..10 {
            let cores: Vec<usize> = (0..24).map(|i| i * 7 % 5).collect();
            let places = place(&cores, granted);
            for a in &places {
                assert!(a.pair < granted);
                assert!(places.iter().all(|b| a.pair != b.pair || a.core == b.core));
            }
        }
    }
}
