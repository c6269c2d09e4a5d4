//! Rejection sampling and best-of-N: a matrix of rewards, what is kept of it, and what chance would keep.
//!
//! Invariant: a selection is a function of the rewards (ties go to the earlier completion), a control one of
//! the seed and the counts alone: no reward gets into it. Knows nothing of models, texts or files.

use rlhf_data::seed::{Purpose, Stream};
use serde::{Deserialize, Serialize};

use crate::error::{Result, ensure};

/// Rewards of N completions of each of M prompts.
#[derive(Clone, Debug, PartialEq)]
pub struct RewardMatrix {
    rewards: Vec<Vec<f64>>,
}

/// A completion that was kept.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Pick {
    /// Row of the matrix.
    pub prompt: usize,
    /// Column of the matrix.
    pub sample: usize,
    /// Its reward.
    pub reward: f64,
}

/// What is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Selection {
    /// The `keep` best completions of every prompt.
    TopPerPrompt {
        /// How many of each prompt.
        keep: usize,
    },
    /// The `keep` best completions of all prompts together: easy prompts have many, hard ones none.
    TopOverall {
        /// How many in all.
        keep: usize,
    },
}

/// What a control has in common with the selection that it is compared with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Match {
    /// As many completions of every prompt.
    PerPrompt,
    /// As many completions in all.
    Overall,
}

impl RewardMatrix {
    /// A matrix of rewards `[M][N]`.
    ///
    /// # Errors
    /// When there is no reward, rows differ in length, or a reward is NaN or infinite.
    pub fn new(rewards: Vec<Vec<f64>>) -> Result<Self> {
        let op = "reward matrix";
        let n = rewards.first().map_or(0, Vec::len);
        ensure(n > 0, op, || {
            format!("{} prompts of {n} completions", rewards.len())
        })?;
        for (i, row) in rewards.iter().enumerate() {
            ensure(row.len() == n, op, || {
                format!("prompt {i} has {} rewards, the first {n}", row.len())
            })?;
            ensure(row.iter().all(|r| r.is_finite()), op, || {
                format!("a reward of prompt {i} is not finite")
            })?;
        }
        Ok(Self { rewards })
    }

    /// M.
    #[must_use]
    pub fn prompts(&self) -> usize {
        self.rewards.len()
    }

    /// N.
    #[must_use]
    pub fn samples(&self) -> usize {
        self.rewards[0].len()
    }

    /// The rewards.
    #[must_use]
    pub fn rewards(&self) -> &[Vec<f64>] {
        &self.rewards
    }

    fn pick(&self, prompt: usize, sample: usize) -> Pick {
        Pick {
            prompt,
            sample,
            reward: self.rewards[prompt][sample],
        }
    }

    /// The completions that `selection` keeps, in the order of the matrix.
    ///
    /// # Errors
    /// When it keeps none, or more than there are.
    pub fn select(&self, selection: Selection) -> Result<Vec<Pick>> {
        let (keep, of) = match selection {
            Selection::TopPerPrompt { keep } => (keep, self.samples()),
            Selection::TopOverall { keep } => (keep, self.prompts() * self.samples()),
        };
        ensure((1..=of).contains(&keep), "selection", || {
            format!("keep is {keep}, expected 1 to {of}")
        })?;
        Ok(match selection {
            Selection::TopPerPrompt { keep } => (0..self.prompts())
                .flat_map(|i| best(self.row(i), keep))
                .collect(),
            Selection::TopOverall { keep } => best(
                (0..self.prompts()).flat_map(|i| self.row(i)).collect(),
                keep,
            ),
        })
    }

    fn row(&self, prompt: usize) -> Vec<Pick> {
        (0..self.samples()).map(|j| self.pick(prompt, j)).collect()
    }

    /// Completions drawn at random, without replacement, in the numbers of `selected`: what the rewards are worth
    /// is the difference between training on these and on those. In the order of the matrix.
    ///
    /// # Errors
    /// When `selected` is not of this matrix.
    pub fn control(&self, selected: &[Pick], matched: Match, seed: u64) -> Result<Vec<Pick>> {
        let (m, n) = (self.prompts(), self.samples());
        let mut counts = vec![0usize; m];
        for p in selected {
            ensure(p.prompt < m && p.sample < n, "control", || {
                format!(
                    "completion {} of prompt {} is not in a matrix of {m} × {n}",
                    p.sample, p.prompt
                )
            })?;
            counts[p.prompt] += 1;
        }
        let stream = Stream::new(seed, Purpose::Subset);
        let drawn = match matched {
            Match::PerPrompt => (0..m)
                .flat_map(|i| {
                    draw(self.row(i), counts[i], |j| {
                        stream.bits(i as u64, 0, j as u32)
                    })
                })
                .collect(),
            Match::Overall => {
                let all: Vec<Pick> = (0..m).flat_map(|i| self.row(i)).collect();
                draw(all, selected.len(), |j| stream.bits(j as u64, 1, 0))
            }
        };
        Ok(drawn)
    }

    /// The mean over prompts of [`best_of`] for n = 1 … N, with its standard error over prompts. `gold` are other
    /// scores of the same completions (`None`: the rewards themselves).
    ///
    /// # Errors
    /// When `gold` has another shape.
    pub fn curve(&self, gold: Option<&Self>) -> Result<Vec<BestOf>> {
        let gold = gold.unwrap_or(self);
        let (m, n) = (self.prompts(), self.samples());
        ensure(
            gold.prompts() == m && gold.samples() == n,
            "best-of-N curve",
            || format!("gold scores {} × {}", gold.prompts(), gold.samples()),
        )?;
        Ok((1..=n)
            .map(|k| {
                let each: Vec<f64> = self
                    .rewards
                    .iter()
                    .zip(&gold.rewards)
                    .map(|(by, of)| best_of(k, by, of))
                    .collect();
                let mean = each.iter().sum::<f64>() / m as f64;
                let variance = each.iter().map(|x| (x - mean).powi(2)).sum::<f64>()
                    / (m as f64 - 1.0).max(1.0);
                BestOf {
                    n: k,
                    kl: best_of_n_kl(k),
                    mean,
                    standard_error: (variance / m as f64).sqrt(),
                }
            })
            .collect())
    }
}

/// A point of the best-of-n curve.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOf {
    /// n.
    pub n: usize,
    /// [`best_of_n_kl`].
    pub kl: f64,
    /// Mean score of the best of n.
    pub mean: f64,
    /// Its standard error over prompts; 0 for one prompt.
    pub standard_error: f64,
}

/// The `keep` best, ties to the earlier, in the order given.
fn best(mut all: Vec<Pick>, keep: usize) -> Vec<Pick> {
    // Stable: equal rewards stay in order.
    all.sort_by(|a, b| b.reward.total_cmp(&a.reward));
    all.truncate(keep);
    in_order(all)
}

/// `count` of `all`: those with the lowest digests.
fn draw(all: Vec<Pick>, count: usize, digest: impl Fn(usize) -> [u32; 4]) -> Vec<Pick> {
    let mut keyed: Vec<([u32; 4], Pick)> = all
        .into_iter()
        .enumerate()
        .map(|(j, p)| (digest(j), p))
        .collect();
    keyed.sort_by_key(|k| k.0);
    in_order(keyed.into_iter().take(count).map(|k| k.1).collect())
}

fn in_order(mut picks: Vec<Pick>) -> Vec<Pick> {
    picks.sort_by_key(|p| (p.prompt, p.sample));
    picks
}

/// log n − (n − 1)/n nats: KL(best-of-n ‖ π) where no two completions share a reward and none is likely, and
/// an upper bound of it in any case (Stiennon et al. 2020, appendix G.3; Beirami et al. 2024, arXiv 2401.01879).
#[must_use]
pub fn best_of_n_kl(n: usize) -> f64 {
    let n = n.max(1) as f64;
    n.ln() - (n - 1.0) / n
}

/// The mean of `of` over the best by `by` among n of the N completions, over all ways to choose the n: an
/// unbiased estimate of the score of best-of-n, of lower variance than any one choice (Nakano et al. 2021,
/// arXiv 2112.09332, appendix I). Completions that tie share the place.
///
/// With completions in rising order of `by`, the i-th (from 1) is the best in C(i−1, n−1) of C(N, n) choices.
///
/// n is taken as at least 1 and at most N; NaN where there are none, or `of` is shorter.
#[must_use]
pub fn best_of(n: usize, by: &[f64], of: &[f64]) -> f64 {
    let total = by.len();
    if total == 0 || of.len() < total {
        return f64::NAN;
    }
    let n = n.clamp(1, total);
    let mut order: Vec<usize> = (0..total).collect();
    order.sort_by(|&a, &b| by[a].total_cmp(&by[b]));
    // Chance that none of the choice lies at or above place i: C(i, n) / C(N, n), a product.
    let below = |i: usize| -> f64 {
        (0..n)
            .map(|j| i.saturating_sub(j) as f64 / (total - j) as f64)
            .product()
    };
    let (mut sum, mut first) = (0.0, 0);
    while first < total {
        let tied = order[first..]
            .iter()
            .take_while(|&&i| by[i] == by[order[first]])
            .count();
        let end = first + tied;
        let mean = order[first..end].iter().map(|&i| of[i]).sum::<f64>() / tied as f64;
        sum += (below(end) - below(first)) * mean;
        first = end;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix() -> RewardMatrix {
        RewardMatrix::new(vec![
            vec![0.7, 0.3, 0.5, 0.2],
            vec![0.4, 0.8, 0.6, 0.5],
            vec![0.9, 0.3, 0.4, 0.9],
        ])
        .unwrap()
    }

    fn places(picks: &[Pick]) -> Vec<(usize, usize)> {
        picks.iter().map(|p| (p.prompt, p.sample)).collect()
    }

    #[test]
    fn the_best_are_kept_and_ties_go_to_the_earlier() {
        let m = matrix();
        let select = |s| places(&m.select(s).unwrap());
        assert_eq!(
            select(Selection::TopPerPrompt { keep: 1 }),
            [(0, 0), (1, 1), (2, 0)]
        );
        assert_eq!(
            select(Selection::TopPerPrompt { keep: 2 }),
            [(0, 0), (0, 2), (1, 1), (1, 2), (2, 0), (2, 3)]
        );
        assert_eq!(
            select(Selection::TopOverall { keep: 3 }),
            [(1, 1), (2, 0), (2, 3)]
        );
        for bad in [0, 5] {
            assert!(m.select(Selection::TopPerPrompt { keep: bad }).is_err());
        }
        assert!(m.select(Selection::TopOverall { keep: 13 }).is_err());
    }

    #[test]
    fn a_control_has_the_numbers_and_nothing_of_the_rewards() {
        let m = matrix();
        let chosen = m.select(Selection::TopOverall { keep: 3 }).unwrap();
        let count = |picks: &[Pick]| {
            let mut n = [0; 3];
            picks.iter().for_each(|p| n[p.prompt] += 1);
            n
        };
        let mut seen = std::collections::BTreeMap::<(usize, usize), u32>::new();
        for seed in 0..3000 {
            let per = m.control(&chosen, Match::PerPrompt, seed).unwrap();
            assert_eq!(count(&per), [0, 1, 2]);
            let all = m.control(&chosen, Match::Overall, seed).unwrap();
            let mut distinct = places(&all);
            distinct.dedup();
            assert_eq!(distinct.len(), 3);
            for p in places(&all) {
                *seen.entry(p).or_default() += 1;
            }
        }
        // Each of 12 is drawn with chance ¼: 750 ± 24 of 3000 times.
        assert_eq!(seen.len(), 12);
        assert!(seen.values().all(|n| n.abs_diff(750) < 120), "{seen:?}");
        // Other rewards, same draw.
        let other = RewardMatrix::new(vec![vec![0.0; 4]; 3]).unwrap();
        let drawn = other.control(&chosen, Match::Overall, 7).unwrap();
        assert_eq!(
            places(&drawn),
            places(&m.control(&chosen, Match::Overall, 7).unwrap())
        );
    }

    #[test]
    fn what_is_no_matrix_is_refused() {
        assert!(RewardMatrix::new(vec![]).is_err());
        assert!(RewardMatrix::new(vec![vec![]]).is_err());
        assert!(RewardMatrix::new(vec![vec![1.0], vec![1.0, 2.0]]).is_err());
        assert!(RewardMatrix::new(vec![vec![f64::NAN]]).is_err());
    }

    #[test]
    fn the_kl_of_best_of_n() {
        // log 1 − 0; log 2 − 1/2; log 16 − 15/16.
        assert_eq!(best_of_n_kl(1), 0.0);
        assert!((best_of_n_kl(2) - 0.193_147_180_56).abs() < 1e-10);
        assert!((best_of_n_kl(16) - 1.835_088_722_24).abs() < 1e-10);
    }

    #[test]
    fn best_of_by_hand() {
        // Of {1, 2, 4} the best of two: 2 once, 4 twice of three choices.
        assert!((best_of(2, &[1.0, 4.0, 2.0], &[1.0, 4.0, 2.0]) - 10.0 / 3.0).abs() < 1e-12);
        // By a reward that ties, gold 5 and 7 are met alike.
        assert!((best_of(1, &[1.0, 1.0], &[5.0, 7.0]) - 6.0).abs() < 1e-12);
        assert!((best_of(2, &[1.0, 1.0], &[5.0, 7.0]) - 6.0).abs() < 1e-12);
        assert!(best_of(1, &[], &[]).is_nan());
    }
}
