//! The order of training data: a seeded permutation addressed by index.
//!
//! Invariant: `at(i)` needs no state, so a run resumes at any position in its data exactly. A new
//! epoch is a new permutation of the same rows.

use crate::seed::{Purpose, Stream};

/// A permutation of `0..n`, a function of (seed, epoch).
///
/// A four-round Feistel network over the smallest even number of bits that holds `n`, with
/// cycle-walking; memory is O(1) whatever `n` is.
#[derive(Clone, Copy, Debug)]
pub struct Permutation {
    stream: Stream,
    epoch: u64,
    n: u64,
    half_bits: u32,
}

impl Permutation {
    /// The permutation of `0..n` for `epoch` under `seed`.
    #[must_use]
    pub fn new(seed: u64, n: usize, epoch: u64) -> Self {
        let n = n as u64;
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        Self {
            stream: Stream::new(seed, Purpose::Order),
            epoch,
            n,
            half_bits: bits.div_ceil(2).max(1),
        }
    }

    /// How many rows are permuted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.n as usize
    }

    /// Whether there are no rows.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.n == 0
    }

    /// The row at position `i`; `i` itself when it lies outside `0..n`.
    #[must_use]
    pub fn at(&self, i: usize) -> usize {
        if i as u64 >= self.n {
            return i;
        }
        let mut x = i as u64;
        loop {
            x = self.feistel(x);
            if x < self.n {
                return x as usize;
            }
        }
    }

    fn feistel(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..6u32 {
            let w = self.stream.bits(self.epoch, round, right as u32);
            let f = (u64::from(w[0]) | u64::from(w[1]) << 32) ^ (right >> 32);
            (left, right) = (right, left ^ (f & mask));
        }
        left << self.half_bits | right
    }
}

/// The row at `position` of an endless walk over `n` rows: epoch `position / n`, each epoch in an
/// order of its own. `n` must not be 0; 0 gives 0.
#[must_use]
pub fn endless(seed: u64, n: usize, position: u64) -> usize {
    if n == 0 {
        return 0;
    }
    Permutation::new(seed, n, position / n as u64).at((position % n as u64) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_a_permutation_for_every_small_n() {
        for n in 1..200 {
            let p = Permutation::new(3, n, 1);
            let mut seen = vec![false; n];
            for i in 0..n {
                assert!(
                    !std::mem::replace(&mut seen[p.at(i)], true),
                    "n = {n}, i = {i}"
                );
            }
        }
    }

    #[test]
    fn epochs_and_seeds_differ_and_it_looks_shuffled() {
        let order = |seed, epoch| {
            (0..1000)
                .map(|i| Permutation::new(seed, 1000, epoch).at(i))
                .collect::<Vec<_>>()
        };
        assert_ne!(order(1, 0), order(1, 1));
        assert_ne!(order(1, 0), order(2, 0));
        // A random permutation keeps one point fixed on average.
        let fixed = order(1, 0)
            .iter()
            .enumerate()
            .filter(|(i, x)| i == *x)
            .count();
        assert!(fixed < 10, "{fixed} points stay in place");
        // Mean displacement of a random permutation is n/3.
        let moved: f64 = order(1, 0)
            .iter()
            .enumerate()
            .map(|(i, x)| i.abs_diff(*x) as f64)
            .sum::<f64>()
            / 1000.0;
        assert!((moved - 333.0).abs() < 40.0, "{moved}");
    }

    #[test]
    fn the_endless_walk_visits_each_row_once_an_epoch() {
        let mut seen: Vec<usize> = (0..10).map(|i| endless(5, 10, 20 + i)).collect();
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<_>>());
    }
}
