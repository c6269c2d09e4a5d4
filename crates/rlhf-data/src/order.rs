//! The order of training data: a seeded permutation addressed by index; shards of it, mixtures of data
//! sets, curricula.
//!
//! Invariant: `at(i)` needs no state, so a run resumes at any position in its data exactly. A new
//! epoch is a new permutation of the same rows.

use crate::error::{Error, Result};
use crate::seed::{Purpose, Stream};

const ROUNDS: u32 = 6;

/// A permutation of `0..n`, a function of (seed, epoch).
///
/// A six-round Feistel network over the smallest even number of bits that holds `n`, with
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
        Self::for_purpose(Purpose::Order, seed, n, epoch)
    }

    fn for_purpose(purpose: Purpose, seed: u64, n: usize, epoch: u64) -> Self {
        let n = n as u64;
        let bits = 64 - n.saturating_sub(1).leading_zeros();
        Self {
            stream: Stream::new(seed, purpose),
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

    /// The position of `row`: `position(at(i)) = i`.
    #[must_use]
    pub fn position(&self, row: usize) -> usize {
        if row as u64 >= self.n {
            return row;
        }
        let mut x = row as u64;
        loop {
            x = self.inverse(x);
            if x < self.n {
                return x as usize;
            }
        }
    }

    fn feistel(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in 0..ROUNDS {
            (left, right) = (right, left ^ self.noise(round, right) & mask);
        }
        left << self.half_bits | right
    }

    fn inverse(&self, x: u64) -> u64 {
        let mask = (1u64 << self.half_bits) - 1;
        let (mut left, mut right) = (x >> self.half_bits, x & mask);
        for round in (0..ROUNDS).rev() {
            (left, right) = (right ^ self.noise(round, left) & mask, left);
        }
        left << self.half_bits | right
    }

    fn noise(&self, round: u32, half: u64) -> u64 {
        let w = self.stream.bits(self.epoch, round, half as u32);
        (u64::from(w[0]) | u64::from(w[1]) << 32) ^ (half >> 32)
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

/// The share of one of `world` ranks in a walk: positions `rank`, `rank + world`, … Ranks never meet,
/// and a rank resumes at its own position as a single process does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shard {
    rank: u64,
    world: u64,
}

impl Shard {
    /// The share of `rank` (from 0) among `world` ranks.
    ///
    /// # Errors
    /// [`Error::Invalid`] unless `rank < world`.
    pub fn new(rank: u64, world: u64) -> Result<Self> {
        if rank >= world {
            return Err(Error::Invalid {
                what: format!("rank {rank} of {world} ranks"),
                mend: "count ranks from 0 to world - 1".into(),
            });
        }
        Ok(Self { rank, world })
    }

    /// The position in the common walk of this rank's position `i`.
    #[must_use]
    pub fn position(&self, i: u64) -> u64 {
        i * self.world + self.rank
    }

    /// How many of the first `n` positions of the common walk are this rank's.
    #[must_use]
    pub fn len(&self, n: u64) -> u64 {
        n.saturating_sub(self.rank).div_ceil(self.world)
    }
}

/// Several data sets mixed by weight: which one stands at a position, and how far it has come there.
///
/// Positions are cut into blocks of [`Mixture::BLOCK`]; in each block every data set has its share,
/// rounded by largest remainder, in an order of the block's own. So shares are exact over whole blocks,
/// and any position is found in constant time and memory.
#[derive(Clone, Debug, PartialEq)]
pub struct Mixture {
    seed: u64,
    /// `first[k]..first[k + 1]` are the slots of data set `k` in a block.
    first: Vec<u64>,
}

impl Mixture {
    /// Positions in a block.
    pub const BLOCK: u64 = 10_000;

    /// A mixture by `weights`, which need not add up to 1.
    ///
    /// # Errors
    /// [`Error::Invalid`] when a weight is negative or not finite, all are 0, or one is positive and so
    /// small beside the others that a block has no place for it.
    pub fn new(seed: u64, weights: &[f64]) -> Result<Self> {
        let bad = |what: String| Error::Invalid {
            what,
            mend: "give each data set a weight above 0".into(),
        };
        if let Some(w) = weights.iter().find(|w| !w.is_finite() || **w < 0.0) {
            return Err(bad(format!("a data set has the weight {w}")));
        }
        let sum: f64 = weights.iter().sum();
        if sum <= 0.0 || !sum.is_finite() {
            return Err(bad(format!("the weights add up to {sum}")));
        }
        let exact: Vec<f64> = weights
            .iter()
            .map(|w| w / sum * Self::BLOCK as f64)
            .collect();
        let mut slots: Vec<u64> = exact.iter().map(|x| x.floor() as u64).collect();
        let mut by_rest: Vec<usize> = (0..weights.len()).collect();
        by_rest.sort_by(|&a, &b| exact[b].fract().total_cmp(&exact[a].fract()));
        let missing = Self::BLOCK.saturating_sub(slots.iter().sum()) as usize;
        for &k in by_rest.iter().take(missing) {
            slots[k] += 1;
        }
        if let Some(k) = (0..weights.len()).find(|&k| weights[k] > 0.0 && slots[k] == 0) {
            return Err(bad(format!(
                "the weight {} of data set {k} is less than one row in {}",
                weights[k],
                Self::BLOCK
            )));
        }
        let mut first = vec![0];
        for n in slots {
            first.push(first.last().copied().unwrap_or_default() + n);
        }
        Ok(Self { seed, first })
    }

    /// The data set at `position`, and which position of its own walk that is (for [`endless`]).
    #[must_use]
    pub fn at(&self, position: u64) -> (usize, u64) {
        let (block, i) = (position / Self::BLOCK, position % Self::BLOCK);
        let order =
            Permutation::for_purpose(Purpose::Mixture, self.seed, Self::BLOCK as usize, block);
        let slot = order.at(i as usize) as u64;
        let k = self.first.partition_point(|f| *f <= slot) - 1;
        let share = self.first[k + 1] - self.first[k];
        (k, block * share + (slot - self.first[k]))
    }
}

/// Rows from low to high value, shuffled within windows of `window` rows: a curriculum by any column.
/// Rows of one value keep their order before shuffling; a window of 0 or 1 shuffles nothing.
///
/// # Errors
/// [`Error::Invalid`] when a value is NaN, naming its row.
pub fn curriculum(values: &[f64], window: usize, seed: u64, epoch: u64) -> Result<Vec<usize>> {
    if let Some(row) = values.iter().position(|v| v.is_nan()) {
        return Err(Error::Invalid {
            what: format!("row {row} has no number to be ordered by"),
            mend: "fill the column, or drop the row".into(),
        });
    }
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[a].total_cmp(&values[b]));
    for (w, rows) in order.chunks_mut(window.max(1)).enumerate() {
        let p = Permutation::new(
            seed ^ (w as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15),
            rows.len(),
            epoch,
        );
        let before = rows.to_vec();
        for (i, row) in rows.iter_mut().enumerate() {
            *row = before[p.at(i)];
        }
    }
    Ok(order)
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
