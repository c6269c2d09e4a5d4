//! From rewards to advantages.
//!
//! Two families: [`AdvantageEstimator`] compares the completions of one prompt with each other, one
//! number for each completion, on the host in f64; [`generalized`] compares each token with a learnt
//! value.
//!
//! Invariant: completions of one prompt with equal rewards get advantages of exactly 0.

use rlhf_kernels::{Offsets, Ragged, discounted_returns, gae};
use tch::{Device, Kind, Tensor};

use crate::error::{Result, at_least_f32, ensure, same_offsets};
use crate::loss::ppo::{ScorePlace, token_rewards};

/// Over which rewards a standard deviation is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum StdScope {
    /// The completions of the same prompt.
    Group,
    /// All completions of the batch.
    Batch,
}

/// How the completions of one prompt are compared. r are the rewards of a group of G.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum AdvantageEstimator {
    /// GRPO (Shao et al. 2024, arXiv 2402.03300, section 4.1.2): (r − mean r) / (std r + ε).
    ///
    /// The standard deviation is that of a sample (divisor G − 1), as in the published code; the
    /// paper has no ε. Biased: prompts of low spread weigh more.
    GroupNormalized {
        /// ε, added to the standard deviation (1e-4 in TRL).
        std_epsilon: f64,
        /// Over what the standard deviation is taken.
        scope: StdScope,
    },
    /// Dr.GRPO (Liu et al. 2025, arXiv 2503.20783): r − mean r. The mean includes r itself, so its
    /// expected gradient is (G − 1)/G of the true one.
    GroupCentered {},
    /// RLOO (Kool et al. 2019; Ahmadian et al. 2024, arXiv 2402.14740, equation 8): r less the mean
    /// of the *other* rewards. Unbiased.
    LeaveOneOut {},
    /// MaxRL (Tajwar, Zeng et al. 2026, arXiv 2602.02710): (r − mean r) / mean r, 0 where no reward is above
    /// 0. Rewards must not be negative.
    ///
    /// For rewards of 0 and 1 and a chance p of success its expected gradient is Σ_{k<G} ∇pass@k / k, which goes
    /// to ∇ log p as G grows: prompts that are rarely solved weigh most.
    MeanNormalized {},
    /// REINFORCE without a baseline (Williams 1992): r. Unbiased, and of high variance.
    Plain {},
    /// REINFORCE with the mean of the whole batch of S completions as baseline. The mean includes r itself: its
    /// expected gradient is (S − 1)/S of the true one.
    BatchCentered {},
    /// REINFORCE with a baseline b of earlier batches, which is 0 in the first and then decay·b + (1 − decay)·mean r
    /// (Williams 1992, "reinforcement comparison"). Unbiased.
    Running {
        /// What of b is kept, 0 to below 1.
        decay: f64,
    },
    /// ReMax: [`against_greedy`].
    Greedy {},
    /// REINFORCE++: [`reinforce_plus_plus`], which looks at tokens.
    ReinforcePlusPlus {
        /// Whether rewards are first centred in their group.
        group_baseline: bool,
    },
}

/// What [`AdvantageEstimator::of_tokens`] looks at, besides the estimator's own settings.
#[derive(Clone, Copy, Debug)]
pub struct Earned<'a> {
    /// `[S]` what each completion as a whole earned, groups end to end; NaN where there is no reward.
    pub scores: &'a [f64],
    /// Completions of each prompt; they sum to S.
    pub group_sizes: &'a [usize],
    /// `[M]` taken from the reward of each token: β·kl; zeros where no penalty is in the reward.
    pub penalties: &'a Ragged,
    /// `[M]` rewards of steps (process supervision), each at its step's last token; NaN where no step ends.
    pub steps: Option<&'a Ragged>,
    /// The reward of each prompt's greedy completion, for [`AdvantageEstimator::Greedy`].
    pub greedy: Option<&'a [f64]>,
    /// b of [`AdvantageEstimator::Running`].
    pub running: f64,
}

impl AdvantageEstimator {
    /// The advantage of each completion.
    ///
    /// A reward of NaN means that there is none (its verifier failed, say): that completion gets 0
    /// and is left out of means and deviations. A completion alone in its group gets 0.
    ///
    /// # Shapes
    /// `rewards` holds the groups end to end; `group_sizes` sums to its length; the result is as
    /// long as `rewards`.
    ///
    /// # Errors
    /// When the sizes do not sum to the number of rewards, a reward is infinite, or a setting is
    /// outside its range.
    pub fn advantages(&self, rewards: &[f64], group_sizes: &[usize]) -> Result<Vec<f64>> {
        let op = "advantages";
        let total: usize = group_sizes.iter().sum();
        ensure(total == rewards.len(), op, || {
            format!(
                "group sizes sum to {total}, expected {} as there are rewards",
                rewards.len()
            )
        })?;
        if let Some(i) = rewards.iter().position(|r| r.is_infinite()) {
            ensure(false, op, || {
                format!(
                    "reward {i} is {}, expected a finite one or NaN for none",
                    rewards[i]
                )
            })?;
        }
        if let Self::GroupNormalized { std_epsilon, .. } = self {
            ensure(*std_epsilon >= 0.0 && std_epsilon.is_finite(), op, || {
                format!("std_epsilon is {std_epsilon}, expected 0 or more")
            })?;
        }
        if let (Self::MeanNormalized {}, Some(i)) = (self, rewards.iter().position(|r| *r < 0.0)) {
            ensure(false, op, || {
                format!("reward {i} is {}, expected 0 or more", rewards[i])
            })?;
        }
        match *self {
            Self::Plain {} => return Ok(known(rewards, |r| r)),
            Self::BatchCentered {} => return Ok(deviations(rewards).centred),
            Self::Running { .. } | Self::Greedy {} | Self::ReinforcePlusPlus { .. } => {
                ensure(false, op, || {
                    format!("{self:?} needs more than rewards; use `of_tokens`")
                })?;
            }
            _ => {}
        }
        let batch_std = deviations(rewards).std;
        let mut advantages = Vec::with_capacity(rewards.len());
        let mut start = 0;
        for size in group_sizes {
            let group = deviations(&rewards[start..start + size]);
            start += size;
            let scale = match *self {
                Self::GroupNormalized {
                    std_epsilon,
                    scope: StdScope::Group,
                } => 1.0 / (group.std + std_epsilon),
                Self::GroupNormalized {
                    std_epsilon,
                    scope: StdScope::Batch,
                } => 1.0 / (batch_std + std_epsilon),
                // The others have returned above.
                Self::GroupCentered {}
                | Self::Plain {}
                | Self::BatchCentered {}
                | Self::Running { .. }
                | Self::Greedy {}
                | Self::ReinforcePlusPlus { .. } => 1.0,
                // r − mean of others = G/(G − 1) (r − mean of all).
                Self::LeaveOneOut {} => group.count / (group.count - 1.0),
                // Without a success all are 0, and so are their deviations.
                Self::MeanNormalized {} => 1.0 / group.mean,
            };
            advantages.extend(
                group
                    .centred
                    .iter()
                    .map(|d| if *d == 0.0 { 0.0 } else { d * scale }),
            );
        }
        Ok(advantages)
    }

    /// The advantage of each token of each completion.
    ///
    /// A completion's score less its penalties is compared with others as [`AdvantageEstimator::advantages`] says,
    /// and all of its tokens get the result. Rewards of steps come in so:
    ///
    /// - `GroupNormalized`, `GroupCentered`: as in GRPO's process supervision (Shao et al. 2024, section 4.1.3): all
    ///   step rewards of a group are less their mean (and over their deviation), and a token gets the sum of those
    ///   at or after it, added to the advantage of its completion's score;
    /// - `Plain`, `BatchCentered`, `Running`, `Greedy`, `LeaveOneOut`: they are part of a completion's total, and a
    ///   token's advantage leaves out those before it, which it did not cause (unbiased wherever the estimator is);
    /// - `ReinforcePlusPlus`: they are part of the return;
    /// - `MeanNormalized` refuses them.
    ///
    /// # Shapes
    /// As [`Earned`] says; the result `[M]` in f64 on the CPU, with the penalties' offsets.
    ///
    /// # Errors
    /// As [`AdvantageEstimator::advantages`], and when something that the estimator needs is missing.
    pub fn of_tokens(&self, earned: &Earned<'_>) -> Result<Ragged> {
        let op = "advantages of tokens";
        let offsets = earned.penalties.offsets();
        ensure(
            offsets.num_segments() == earned.scores.len() as i64,
            op,
            || {
                format!(
                    "penalties are of {} completions, expected {} as there are scores",
                    offsets.num_segments(),
                    earned.scores.len()
                )
            },
        )?;
        if let Some(steps) = earned.steps {
            same_offsets(op, earned.penalties, &[("step rewards", steps)])?;
        }
        if let Self::ReinforcePlusPlus { group_baseline } = *self {
            let mut less = host(earned.penalties)?;
            if let Some(steps) = earned.steps {
                less.iter_mut()
                    .flatten()
                    .zip(host(steps)?.into_iter().flatten())
                    .filter(|(_, s)| !s.is_nan())
                    .for_each(|(l, s)| *l -= s);
            }
            let sizes = group_baseline.then_some(earned.group_sizes);
            return reinforce_plus_plus(earned.scores, sizes, &ragged(&less, offsets)?, 1.0);
        }
        let penalties = host(earned.penalties)?;
        let steps = earned.steps.map(host).transpose()?;
        let group_wise = matches!(self, Self::GroupNormalized { .. } | Self::GroupCentered {});
        let mut totals: Vec<f64> = earned
            .scores
            .iter()
            .zip(&penalties)
            .map(|(score, p)| score - p.iter().sum::<f64>())
            .collect();
        if let (Some(steps), false) = (&steps, group_wise) {
            for (total, s) in totals.iter_mut().zip(steps) {
                *total += s.iter().filter(|s| !s.is_nan()).sum::<f64>();
            }
        }
        let of_completions = match (*self, earned.greedy) {
            (Self::Greedy {}, Some(greedy)) => against_greedy(&totals, earned.group_sizes, greedy)?,
            (Self::Greedy {}, None) => {
                ensure(false, op, || {
                    "the rewards of greedy completions are missing".into()
                })?;
                Vec::new()
            }
            (Self::Running { decay }, _) => {
                ensure((0.0..1.0).contains(&decay), op, || {
                    format!("decay is {decay}, expected 0 to below 1")
                })?;
                known(&totals, |r| r - earned.running)
            }
            _ => self.advantages(&totals, earned.group_sizes)?,
        };
        let mut tokens: Vec<Vec<f64>> = of_completions
            .iter()
            .zip(&penalties)
            .map(|(a, p)| vec![*a; p.len()])
            .collect();
        match (steps, self) {
            (None, _) => {}
            (Some(_), Self::MeanNormalized {}) => ensure(false, op, || {
                "mean_normalized has no place for rewards of steps".into()
            })?,
            (Some(steps), _) if group_wise => {
                let later = self.later_steps(&steps, earned.group_sizes)?;
                tokens
                    .iter_mut()
                    .flatten()
                    .zip(later.into_iter().flatten())
                    .for_each(|(a, l)| *a += l);
            }
            (Some(steps), _) => {
                for ((row, s), score) in tokens.iter_mut().zip(&steps).zip(earned.scores) {
                    let mut past = 0.0;
                    for (a, s) in row.iter_mut().zip(s).filter(|_| !score.is_nan()) {
                        *a -= past;
                        past += if s.is_nan() { 0.0 } else { *s };
                    }
                }
            }
        }
        ragged(&tokens, offsets)
    }

    /// For each token the sum of the compared step rewards at or after it.
    fn later_steps(&self, steps: &[Vec<f64>], group_sizes: &[usize]) -> Result<Vec<Vec<f64>>> {
        let mut result = steps.to_vec();
        let mut rest = result.as_mut_slice();
        for size in group_sizes {
            let (group, others) = rest.split_at_mut(*size);
            rest = others;
            let flat: Vec<f64> = group.iter().flatten().copied().collect();
            let marked: Vec<f64> = flat.iter().copied().filter(|s| !s.is_nan()).collect();
            let mut compared = self.advantages(&marked, &[marked.len()])?.into_iter();
            for row in group.iter_mut() {
                for s in row.iter_mut() {
                    *s = if s.is_nan() {
                        0.0
                    } else {
                        compared.next().unwrap_or(0.0)
                    };
                }
                let mut sum = 0.0;
                for s in row.iter_mut().rev() {
                    sum += *s;
                    *s = sum;
                }
            }
        }
        Ok(result)
    }
}

/// Applies `f`, and gives 0 for NaN.
fn known(rewards: &[f64], f: impl Fn(f64) -> f64) -> Vec<f64> {
    let of = |r: &f64| if r.is_nan() { 0.0 } else { f(*r) };
    rewards.iter().map(of).collect()
}

/// The values of each sequence, in f64.
fn host(x: &Ragged) -> Result<Vec<Vec<f64>>> {
    let flat = x.values().detach().to_kind(Kind::Double);
    let flat = Vec::<f64>::try_from(&flat.to_device(Device::Cpu))?;
    let part = |w: &[i64]| flat[w[0] as usize..w[1] as usize].to_vec();
    Ok(x.offsets().host().windows(2).map(part).collect())
}

fn ragged(rows: &[Vec<f64>], offsets: &Offsets) -> Result<Ragged> {
    Ok(Ragged::new(
        Tensor::from_slice(&rows.concat()),
        offsets.clone(),
    )?)
}

/// ReMax (Li et al. 2023, arXiv 2310.10505): r less the reward of the prompt's greedy completion, `greedy`, one
/// for each prompt. Unbiased, since the greedy completion does not depend on the draw. NaN on either side
/// gives 0.
///
/// # Errors
/// When there is not one greedy reward for each group, or the sizes do not sum to the number of rewards.
pub fn against_greedy(rewards: &[f64], group_sizes: &[usize], greedy: &[f64]) -> Result<Vec<f64>> {
    let op = "advantages against greedy";
    let total: usize = group_sizes.iter().sum();
    ensure(
        total == rewards.len() && group_sizes.len() == greedy.len(),
        op,
        || {
            format!(
                "{} rewards and {} greedy ones, expected {total} and {}",
                rewards.len(),
                greedy.len(),
                group_sizes.len()
            )
        },
    )?;
    let baselines = group_sizes
        .iter()
        .zip(greedy)
        .flat_map(|(size, g)| std::iter::repeat_n(g, *size));
    let less = |(r, g): (&f64, &f64)| if (r - g).is_nan() { 0.0 } else { r - g };
    Ok(rewards.iter().zip(baselines).map(less).collect())
}

/// (x − mean)/(std + ε) over all of `values` with a sample's standard deviation; NaN gives 0 and is
/// left out, equal values give exactly 0. TRL's `normalize_advantages` of RLOO, and REINFORCE++'s
/// step over the batch.
#[must_use]
pub fn standardize(values: &[f64], epsilon: f64) -> Vec<f64> {
    let all = deviations(values);
    all.centred
        .iter()
        .map(|d| {
            if *d == 0.0 {
                0.0
            } else {
                d / (all.std + epsilon)
            }
        })
        .collect()
}

struct Deviations {
    centred: Vec<f64>,
    mean: f64,
    std: f64,
    count: f64,
}

/// Deviations from the mean, with NaN left out. The first number is subtracted before the mean is
/// taken: equal numbers give exactly 0, and large ones lose nothing.
fn deviations(values: &[f64]) -> Deviations {
    let known = || values.iter().copied().filter(|v| !v.is_nan());
    let count = known().count() as f64;
    let origin = known().next().unwrap_or(0.0);
    let shift = known().map(|v| v - origin).sum::<f64>() / count.max(1.0);
    let centred: Vec<f64> = values
        .iter()
        .map(|v| {
            if v.is_nan() {
                0.0
            } else {
                (v - origin) - shift
            }
        })
        .collect();
    let squares: f64 = centred.iter().map(|d| d * d).sum();
    Deviations {
        centred,
        mean: origin + shift,
        std: (squares / (count - 1.0).max(1.0)).sqrt(),
        count,
    }
}

/// What is done to advantages over the whole batch before they are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum Whitening {
    /// Nothing.
    None,
    /// Mean 0 and standard deviation 1.
    RemoveMean,
    /// Standard deviation 1 about the mean that they had: TRL's `shift_mean=False`, meant for rewards.
    KeepMean,
}

/// Whitens values over all tokens of all sequences: (x − mean)/√(var + 1e-8), with a sample's
/// variance (divisor M − 1; 0 for a single value).
///
/// # Shapes
/// `values` `[M]`, as the result; no gradients.
///
/// # Errors
/// When values are not floating point.
pub fn whiten(values: &Ragged, whitening: Whitening) -> Result<Ragged> {
    ensure(values.values().is_floating_point(), "whiten", || {
        format!(
            "values are {:?}, expected floating point",
            values.values().kind()
        )
    })?;
    let x = at_least_f32(values).detach();
    if whitening == Whitening::None || x.numel() == 0 {
        return Ok(values.with_values(x)?);
    }
    let mean = x.mean(x.kind());
    let centred = &x - &mean;
    let variance = centred.square().sum(x.kind()) / (x.numel() as f64 - 1.0).max(1.0);
    let whitened = centred * (variance + 1e-8).rsqrt();
    Ok(values.with_values(if whitening == Whitening::KeepMean {
        whitened + mean
    } else {
        whitened
    })?)
}

/// Generalised advantages and what they are made of.
#[derive(Debug)]
pub struct Generalized {
    /// `[M]` advantages, whitened if asked.
    pub advantages: Ragged,
    /// `[M]` targets of the value function: advantages before whitening + values.
    pub returns: Ragged,
}

/// Generalised advantage estimation (Schulman et al. 2016, arXiv 1506.02438, equation 16) with
/// whitening over the batch: δ_t = r_t + γV_{t+1} − V_t, A_t = δ_t + γλA_{t+1}, returns = A + V.
/// A completion's end is terminal: V after its last token is 0.
///
/// # Shapes
/// `rewards` and `values` `[M]` with the same offsets, as the results; no gradients.
///
/// # Errors
/// When the offsets differ, or γ or λ is not in [0, 1].
pub fn generalized(
    rewards: &Ragged,
    values: &Ragged,
    gamma: f64,
    gae_lambda: f64,
    whitening: Whitening,
) -> Result<Generalized> {
    for (name, x) in [("gamma", gamma), ("gae_lambda", gae_lambda)] {
        ensure((0.0..=1.0).contains(&x), "generalized advantages", || {
            format!("{name} is {x}, expected 0 to 1")
        })?;
    }
    let (advantages, returns) = gae(rewards, values, gamma, gae_lambda)?;
    Ok(Generalized {
        advantages: whiten(&advantages, whitening)?,
        returns,
    })
}

/// REINFORCE++ (Hu 2025, arXiv 2501.03262): the return of each token, r at its completion's last token less
/// β·kl of each, no discount, and then (A − mean)/√max(var, 1e-8) over all tokens of the batch.
///
/// With `group_sizes` r is first centred in its group: the REINFORCE++-baseline, for several completions of a
/// prompt. The variance is the batch's own (divisor M), as in the published code. A reward of NaN means that
/// there is none: its completion has advantages of 0 and is left out of means and variance.
///
/// # Shapes
/// `rewards` are those of S completions, in groups end to end; `kl` `[M]` (k1 against the reference), as the
/// result; no gradients.
///
/// # Errors
/// When there are not S rewards, a reward is infinite, or the sizes do not sum to S.
pub fn reinforce_plus_plus(
    rewards: &[f64],
    group_sizes: Option<&[usize]>,
    kl: &Ragged,
    kl_coef: f64,
) -> Result<Ragged> {
    let groups = AdvantageEstimator::GroupCentered {};
    let scores = match group_sizes {
        Some(sizes) => groups.advantages(rewards, sizes)?,
        None => {
            // Checked likewise.
            groups.advantages(rewards, &[rewards.len()])?;
            let known = |r: &f64| if r.is_nan() { 0.0 } else { *r };
            rewards.iter().map(known).collect()
        }
    };
    let tokens = token_rewards(
        kl,
        &Tensor::from_slice(&scores),
        kl_coef,
        ScorePlace::LastToken {},
    )?;
    let returns = discounted_returns(&tokens, 1.0)?;
    let known: Vec<f64> = rewards
        .iter()
        .map(|r| f64::from(u8::from(!r.is_nan())))
        .collect();
    let x = returns.values();
    let known = Tensor::from_slice(&known)
        .to_kind(x.kind())
        .to_device(x.device());
    let known = returns.broadcast(&known);
    let n = known.sum(x.kind()).clamp_min(1.0);
    let mean = (x * &known).sum(x.kind()) / &n;
    let centred = (x - mean) * known;
    let variance = centred.square().sum(x.kind()) / n;
    Ok(returns.with_values(centred * variance.clamp_min(1e-8).rsqrt())?)
}

/// The mean over groups of whether all rewards are equal: such groups carry no gradient.
#[must_use]
pub fn groups_without_contrast(rewards: &[f64], group_sizes: &[usize]) -> f64 {
    let mut start = 0;
    let mut flat = 0.0;
    for size in group_sizes {
        let group = deviations(&rewards[start..start + size]);
        start += size;
        flat += f64::from(u8::from(group.centred.iter().all(|d| *d == 0.0)));
    }
    flat / group_sizes.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRPO: AdvantageEstimator = AdvantageEstimator::GroupNormalized {
        std_epsilon: 0.0,
        scope: StdScope::Group,
    };

    #[test]
    fn by_hand() {
        // Rewards 1, 2, 6: mean 3, deviations -2, -1, 3, sample variance 14/2 = 7.
        let a = |e: AdvantageEstimator| e.advantages(&[1.0, 2.0, 6.0], &[3]).unwrap();
        let s = 7f64.sqrt();
        assert_eq!(a(GRPO), [-2.0 * (1.0 / s), -(1.0 / s), 3.0 * (1.0 / s)]);
        assert_eq!(a(AdvantageEstimator::GroupCentered {}), [-2.0, -1.0, 3.0]);
        // 1 − 4, 2 − 3.5, 6 − 1.5.
        assert_eq!(a(AdvantageEstimator::LeaveOneOut {}), [-3.0, -1.5, 4.5]);
    }

    #[test]
    fn equal_rewards_give_exactly_zero() {
        // In f64, (0.1 + 0.1 + 0.1)/3 is not 0.1.
        for e in [
            GRPO,
            AdvantageEstimator::GroupCentered {},
            AdvantageEstimator::LeaveOneOut {},
        ] {
            assert_eq!(e.advantages(&[0.1; 3], &[3]).unwrap(), [0.0; 3]);
            assert_eq!(e.advantages(&[0.7, 1e9, 1e9], &[1, 2]).unwrap(), [0.0; 3]);
        }
        assert_eq!(
            groups_without_contrast(&[0.1, 0.1, 0.1, 1.0, 2.0], &[3, 2]),
            0.5
        );
    }

    #[test]
    fn a_missing_reward_is_left_out() {
        let a = AdvantageEstimator::LeaveOneOut {}
            .advantages(&[1.0, f64::NAN, 3.0], &[3])
            .unwrap();
        assert_eq!(a, [-2.0, 0.0, 2.0]);
        assert_eq!(standardize(&[f64::NAN, 5.0], 1e-4), [0.0, 0.0]);
    }

    #[test]
    fn bad_arguments_are_named() {
        assert!(
            GRPO.advantages(&[1.0], &[2])
                .unwrap_err()
                .to_string()
                .contains("sum to 2")
        );
        assert!(
            GRPO.advantages(&[f64::INFINITY], &[1])
                .unwrap_err()
                .to_string()
                .contains("reward 0 is inf")
        );
    }

    #[test]
    fn baselines_by_hand() {
        let of = |e: AdvantageEstimator| e.advantages(&[1.0, f64::NAN, 6.0, 2.0], &[2, 2]).unwrap();
        assert_eq!(of(AdvantageEstimator::Plain {}), [1.0, 0.0, 6.0, 2.0]);
        // The mean of 1, 6 and 2 is 3.
        assert_eq!(
            of(AdvantageEstimator::BatchCentered {}),
            [-2.0, 0.0, 3.0, -1.0]
        );
        let e = AdvantageEstimator::Greedy {}
            .advantages(&[1.0], &[1])
            .unwrap_err();
        assert!(e.to_string().contains("of_tokens"), "{e}");
    }

    fn rows(x: &[&[f64]]) -> Ragged {
        let lengths: Vec<i64> = x.iter().map(|r| r.len() as i64).collect();
        Ragged::new(
            Tensor::from_slice(&x.concat()),
            Offsets::from_lengths(&lengths).unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn tokens_by_hand() {
        let n = f64::NAN;
        let penalties = rows(&[&[0.5, 0.5], &[0.0]]);
        let steps = rows(&[&[3.0, 1.0], &[n]]);
        let earned = Earned {
            scores: &[2.0, 4.0],
            group_sizes: &[2],
            penalties: &penalties,
            steps: None,
            greedy: Some(&[1.5]),
            running: 0.25,
        };
        let of = |e: AdvantageEstimator, earned: &Earned<'_>| {
            Vec::<f64>::try_from(e.of_tokens(earned).unwrap().values()).unwrap()
        };
        let with_steps = Earned {
            steps: Some(&steps),
            ..earned
        };
        // Totals 2 − 1 = 1 and 4, with steps 5 and 4.
        let loo = AdvantageEstimator::LeaveOneOut {};
        assert_eq!(of(loo, &earned), [-3.0, -3.0, 3.0]);
        // The second token did not cause the first step's 3.
        assert_eq!(of(loo, &with_steps), [1.0, -2.0, -1.0]);
        let running = AdvantageEstimator::Running { decay: 0.9 };
        assert_eq!(of(running, &earned), [0.75, 0.75, 3.75]);
        assert_eq!(
            of(AdvantageEstimator::Greedy {}, &earned),
            [-0.5, -0.5, 2.5]
        );
        // Steps 3 and 1 about their mean: 1 and −1; from each token on 0 and −1; scores −1.5 and 1.5.
        let centred = AdvantageEstimator::GroupCentered {};
        assert_eq!(of(centred, &with_steps), [-1.5, -2.5, 1.5]);
        let e = AdvantageEstimator::MeanNormalized {}
            .of_tokens(&with_steps)
            .unwrap_err();
        assert!(e.to_string().contains("no place"), "{e}");
        let e = AdvantageEstimator::Greedy {}
            .of_tokens(&Earned {
                greedy: None,
                ..earned
            })
            .unwrap_err();
        assert!(e.to_string().contains("greedy"), "{e}");
        // Returns 2 − .5 − .5 = 1, 1.5 and 4, then over the batch: mean 6.5/3, variance with divisor 3.
        let plus = AdvantageEstimator::ReinforcePlusPlus {
            group_baseline: false,
        };
        let (mean, std) = (6.5 / 3.0, (31.0f64 / 18.0).sqrt());
        for (got, g) in of(plus, &earned).iter().zip([1.0, 1.5, 4.0]) {
            assert!((got - (g - mean) / std).abs() < 1e-12);
        }
        // With steps the returns are 5, 2.5 and 4.
        let (mean, std) = (11.5 / 3.0, (19.0f64 / 18.0).sqrt());
        for (got, g) in of(plus, &with_steps).iter().zip([5.0, 2.5, 4.0]) {
            assert!((got - (g - mean) / std).abs() < 1e-12);
        }
    }

    #[test]
    fn whitening_by_hand() {
        // 1, 2, 6 again: 3 ± as above, variance 7.
        let x = Ragged::new(
            Tensor::from_slice(&[1.0, 2.0, 6.0]),
            Offsets::new(vec![0, 1, 3]).unwrap(),
        )
        .unwrap();
        let s = (7f64 + 1e-8).sqrt();
        let remove =
            Vec::<f64>::try_from(whiten(&x, Whitening::RemoveMean).unwrap().values()).unwrap();
        let keep = Vec::<f64>::try_from(whiten(&x, Whitening::KeepMean).unwrap().values()).unwrap();
        for (i, d) in [-2.0, -1.0, 3.0].into_iter().enumerate() {
            assert!((remove[i] - d / s).abs() < 1e-14);
            assert!((keep[i] - d / s - 3.0).abs() < 1e-14);
        }
    }
}
