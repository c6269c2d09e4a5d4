//! What GRPO and PPO share between drawing completions and learning from them.
//!
//! Invariant: per-token facts of rollouts (log-probs, values, advantages) live on the host, one list
//! per completion, so that any grouping into micro-batches gathers the same numbers.

use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::{Offsets, Ragged};
use rlhf_model::{CausalLm, DeviceBatch, Mismatch, target_logprobs};
use tch::{Device, Kind, Tensor};

use crate::collect::{Harvest, Told};
use crate::error::Result;
use crate::kl::{KlPenalty, KlPlacement};
use crate::loss::PolicyStats;
use crate::rollout::ScoredRollout;

/// One number for each trained token of each completion.
pub(crate) type PerToken = Vec<Vec<f64>>;

/// Gathers per-token facts of a micro-batch's completions as one ragged tensor.
pub(crate) fn gather<'a>(
    lists: impl Iterator<Item = &'a Vec<f64>>,
    offsets: &Offsets,
    kind: Kind,
    device: Device,
) -> Result<Ragged> {
    let flat: Vec<f64> = lists.flatten().copied().collect();
    Ok(Ragged::new(
        Tensor::from_slice(&flat).to_kind(kind).to_device(device),
        offsets.clone(),
    )?)
}

/// The values of a ragged tensor as one list per completion.
pub(crate) fn scatter(values: &Ragged) -> Result<PerToken> {
    let host = Vec::<f64>::try_from(
        &values
            .values()
            .detach()
            .to_kind(Kind::Double)
            .to_device(Device::Cpu),
    )?;
    Ok(values
        .offsets()
        .host()
        .windows(2)
        .map(|w| host[w[0] as usize..w[1] as usize].to_vec())
        .collect())
}

/// Micro-batches of `groups`: ranges of groups with the completions that they hold.
pub(crate) fn micro_batches(groups: &[&PromptGroup], micro_tokens: usize) -> Result<Vec<Micro>> {
    let lengths: Vec<usize> = groups.iter().map(|g| g.num_tokens()).collect();
    let mut first = 0;
    Ok(batches_by_tokens(&lengths, micro_tokens)?
        .into_iter()
        .map(|range| {
            let n: usize = groups[range.clone()]
                .iter()
                .map(|g| g.completions.len())
                .sum();
            let completions = first..first + n;
            first += n;
            Micro {
                groups: range,
                completions,
            }
        })
        .collect())
}

/// A micro-batch: which groups, and which completions counted over all groups.
#[derive(Clone, Debug)]
pub(crate) struct Micro {
    pub(crate) groups: std::ops::Range<usize>,
    pub(crate) completions: std::ops::Range<usize>,
}

impl Micro {
    /// Packs the micro-batch onto a device.
    pub(crate) fn pack(&self, groups: &[&PromptGroup], device: Device) -> Result<DeviceBatch> {
        let part: Vec<PromptGroup> = groups[self.groups.clone()]
            .iter()
            .map(|g| (*g).clone())
            .collect();
        Ok(DeviceBatch::new(&PackedBatch::pack(&part)?, device)?)
    }
}

/// The chosen groups, and the index of each of their completions over all groups.
pub(crate) fn pick<'a>(
    groups: &[&'a PromptGroup],
    chosen: &[usize],
) -> (Vec<&'a PromptGroup>, Vec<usize>) {
    let mut first = vec![0];
    for g in groups {
        first.push(first[first.len() - 1] + g.completions.len());
    }
    let completions = chosen
        .iter()
        .flat_map(|&i| first[i]..first[i + 1])
        .collect();
    (chosen.iter().map(|&i| groups[i]).collect(), completions)
}

/// Log-probs of every trained token under `model`, without gradients.
pub(crate) fn logprobs_of(
    model: &dyn CausalLm,
    groups: &[&PromptGroup],
    temperature: f64,
    micro_tokens: usize,
    device: Device,
) -> Result<PerToken> {
    let _guard = tch::no_grad_guard();
    let mut all = Vec::new();
    for micro in micro_batches(groups, micro_tokens)? {
        let batch = micro.pack(groups, device)?;
        all.extend(scatter(
            &target_logprobs(model, &batch, temperature, false)?.logprobs,
        )?);
    }
    Ok(all)
}

/// The sampler's log-probs of every completion's trained tokens.
pub(crate) fn sampler_logprobs(groups: &[&PromptGroup]) -> PerToken {
    let of = |c: &Completion| {
        let Some(s) = &c.sampler else {
            return Vec::new();
        };
        let trained = c.trained.iter().flat_map(|r| &s.logprobs[r.clone()]);
        trained.map(|&x| f64::from(x)).collect()
    };
    groups.iter().flat_map(|g| &g.completions).map(of).collect()
}

/// The rewards of steps at the trained tokens of every completion, NaN where no step ends; `None` where nobody
/// judged steps. A step that ends at a token that is not trained counts at the last trained one before it.
pub(crate) fn step_rewards(scored: &[ScoredRollout]) -> Option<PerToken> {
    if scored.iter().all(|s| s.steps.is_empty()) {
        return None;
    }
    let of = |c: &Completion, steps: &[(usize, f64)]| {
        let places: Vec<usize> = c.trained.iter().flat_map(Clone::clone).collect();
        let mut row = vec![f64::NAN; places.len()];
        for (at, reward) in steps {
            let before = places.partition_point(|p| p <= at);
            if let Some(slot) = before.checked_sub(1).map(|i| &mut row[i]) {
                *slot = if slot.is_nan() {
                    *reward
                } else {
                    *slot + reward
                };
            }
        }
        row
    };
    let all = scored.iter().flat_map(|s| {
        let none: &[(usize, f64)] = &[];
        let steps = s.steps.iter().map(Vec::as_slice);
        let steps = steps.chain(std::iter::repeat(none));
        s.rollout.group.completions.iter().zip(steps)
    });
    Some(all.map(|(c, steps)| of(c, steps)).collect())
}

/// Leaves completions that were cut off without trained tokens.
pub(crate) fn silence_cut(scored: &mut [ScoredRollout]) {
    let completions = scored
        .iter_mut()
        .flat_map(|s| &mut s.rollout.group.completions);
    for c in completions.filter(|c| c.finish != Finish::Stop) {
        c.trained.clear();
    }
}

/// Σ (log π − log π₀) of each completion.
pub(crate) fn each_kl(policy: &PerToken, reference: &PerToken) -> Vec<f64> {
    policy
        .iter()
        .zip(reference)
        .map(|(p, q)| p.iter().sum::<f64>() - q.iter().sum::<f64>())
        .collect()
}

/// Mean over completions of Σ (log π − log π₀): the KL in nats a completion, estimated by k1.
pub(crate) fn mean_kl(policy: &PerToken, reference: &PerToken) -> f64 {
    let sum: f64 = policy.iter().flatten().sum::<f64>() - reference.iter().flatten().sum::<f64>();
    sum / speaking(policy)
}

/// Completions with trained tokens, at least 1.
fn speaking(lists: &PerToken) -> f64 {
    lists.iter().filter(|l| !l.is_empty()).count().max(1) as f64
}

/// Mean over completions of Σ k3, k3 = π₀/π − 1 − log(π₀/π): never negative, the same in expectation.
pub(crate) fn mean_k3(policy: &PerToken, reference: &PerToken) -> f64 {
    let k3 = |(p, q): (&f64, &f64)| (q - p).exp_m1() + (p - q);
    let both = policy.iter().flatten().zip(reference.iter().flatten());
    both.map(k3).sum::<f64>() / speaking(policy)
}

/// The values at the given shares of the sorted ones, linearly between; NaN of none.
pub(crate) fn quantiles<const N: usize>(mut values: Vec<f64>, shares: [f64; N]) -> [f64; N] {
    values.sort_by(f64::total_cmp);
    let Some(last) = values.len().checked_sub(1) else {
        return [f64::NAN; N];
    };
    shares.map(|share| {
        let at = share * last as f64;
        let (low, part) = (at.floor() as usize, at - at.floor());
        let high = (low + 1).min(last);
        values[low] + (values[high] - values[low]) * part
    })
}

/// Mean, standard deviation, least and largest.
pub(crate) fn moments(values: &PerToken) -> [f64; 4] {
    let all = || values.iter().flatten().copied();
    let n = all().count().max(1) as f64;
    let mean = all().sum::<f64>() / n;
    let variance = all().map(|x| (x - mean).powi(2)).sum::<f64>() / n;
    let least = all().fold(f64::INFINITY, f64::min);
    [
        mean,
        variance.sqrt(),
        least,
        all().fold(f64::NEG_INFINITY, f64::max),
    ]
}

/// What learner and sampler disagree by on the same tokens.
pub(crate) fn mismatch(learner: &PerToken, sampler: &PerToken) -> Mismatch {
    Mismatch::of(
        learner.iter().flatten().copied(),
        sampler.iter().flatten().copied(),
    )
}

/// What both loops log of a step's rollouts and of the policy's passes over them.
pub(crate) struct StepLog(Vec<(String, f64)>);

impl StepLog {
    pub(crate) fn new(harvest: &Harvest) -> Self {
        let s = &harvest.facts.stats;
        let mut log = Self(Vec::new());
        log.add(&[
            ("reward", s.reward),
            ("reward_std", s.reward_std),
            ("length", s.length),
            ("length_stopped", s.length_stopped),
            ("length_cut", s.length_cut),
            ("stopped", s.stopped),
            ("no_contrast", s.no_contrast),
            ("groups_drawn", harvest.facts.drawn as f64),
            ("groups_used", harvest.scored.len() as f64),
            (
                "staleness",
                harvest.step.saturating_sub(harvest.version) as f64,
            ),
        ]);
        for (name, mean) in &harvest.facts.parts {
            log.0.push((format!("reward_{name}"), *mean));
        }
        log
    }

    pub(crate) fn add(&mut self, values: &[(&str, f64)]) {
        let named = values.iter().map(|(k, v)| ((*k).to_owned(), *v));
        self.0.extend(named);
    }

    /// Of the policy's passes; `ratios` are the tokens' π/π_old in the last one.
    pub(crate) fn policy(&mut self, stats: &PolicyStats, ratios: Vec<f64>, advantages: &PerToken) {
        let [low, middle, high] = quantiles(ratios, [0.01, 0.5, 0.99]);
        let [mean, std, least, largest] = moments(advantages);
        self.add(&[
            ("entropy", stats.entropy()),
            ("clip_fraction_low", stats.clip_fraction_low()),
            ("clip_fraction_high", stats.clip_fraction_high()),
            ("ratio_mean", stats.ratio_mean()),
            ("ratio_max", stats.ratio_max),
            ("ratio_p01", low),
            ("ratio_p50", middle),
            ("ratio_p99", high),
            ("approx_kl", stats.approx_kl()),
            ("advantage_mean", mean),
            ("advantage_std", std),
            ("advantage_min", least),
            ("advantage_max", largest),
        ]);
    }

    /// How fast it went; keys of times end in `per_second`.
    pub(crate) fn speed(&mut self, harvest: &Harvest, passes: u64, learning: f64) {
        let tokens = harvest.facts.stats.length
            * harvest.facts.drawn as f64
            * harvest.scored.first().map_or(0, |s| s.rewards.len()) as f64;
        let packed: usize = harvest
            .scored
            .iter()
            .map(|s| s.rollout.group.num_tokens())
            .sum();
        if harvest.seconds > 0.0 {
            self.add(&[("sampled_tokens_per_second", tokens / harvest.seconds)]);
        }
        let learned = packed as f64 * passes as f64;
        self.add(&[("learned_tokens_per_second", learned / learning.max(1e-9))]);
    }

    pub(crate) fn values(&self) -> Vec<(&str, f64)> {
        self.0.iter().map(|(k, v)| (k.as_str(), *v)).collect()
    }
}

/// Rows of every completion's trained tokens end to end, in f64 on the CPU.
pub(crate) fn on_host(rows: &PerToken) -> Result<Ragged> {
    let lengths: Vec<i64> = rows.iter().map(|r| r.len() as i64).collect();
    let offsets = Offsets::from_lengths(&lengths)?;
    gather(rows.iter(), &offsets, Kind::Double, Device::Cpu)
}

/// What a KL penalty in the reward takes from each token, with the coefficient that it has now; zeros where the
/// penalty is elsewhere or there is no reference.
pub(crate) fn penalties(
    kl: &KlPenalty,
    coef: f64,
    policy: &PerToken,
    reference: Option<&PerToken>,
) -> Result<Ragged> {
    let policy = on_host(policy)?;
    Ok(match reference {
        Some(reference) if kl.placement == KlPlacement::InReward && coef != 0.0 => {
            let estimate = kl.estimator.estimate(&policy, &on_host(reference)?)?;
            estimate.with_values(estimate.values() * coef)?
        }
        _ => policy.with_values(policy.values().zeros_like())?,
    })
}

/// What a sample tells of each completion.
pub(crate) fn told(
    advantages: &PerToken,
    sampler: &PerToken,
    base: Option<&PerToken>,
) -> Vec<Told> {
    let kl = |i: usize| {
        base.map_or(f64::NAN, |b| {
            sampler[i].iter().sum::<f64>() - b[i].iter().sum::<f64>()
        })
    };
    let of = |(i, a): (usize, &Vec<f64>)| Told {
        advantage: a.first().copied().unwrap_or(0.0),
        kl: kl(i),
    };
    advantages.iter().enumerate().map(of).collect()
}

#[cfg(test)]
mod tests {
    use rlhf_data::group::SamplerRecord;

    use super::*;
    use crate::rollout::Rollout;

    /// Five tokens, of which 0, 1 and 4 are trained: the others are a tool's.
    fn scored(finish: Finish, steps: Vec<(usize, f64)>) -> ScoredRollout {
        let completion = Completion {
            trained: vec![0..2, 4..5],
            sampler: Some(SamplerRecord {
                logprobs: vec![-1.0, -2.0, 0.0, 0.0, -3.0],
                policy_version: 0,
                top: Vec::new(),
            }),
            ..Completion::whole(vec![5, 6, 7, 8, 9], finish)
        };
        ScoredRollout {
            rollout: Rollout {
                prompt: 0,
                group: PromptGroup {
                    row: 0,
                    prompt: vec![1],
                    completions: vec![completion],
                },
                texts: vec![String::new()],
                earned: Vec::new(),
            },
            rewards: vec![1.0],
            steps: vec![steps],
        }
    }

    #[test]
    fn only_trained_tokens_have_facts() {
        let s = [scored(Finish::Stop, vec![(0, 0.5), (3, 0.25), (4, 1.0)])];
        assert_eq!(
            sampler_logprobs(&[&s[0].rollout.group]),
            [[-1.0, -2.0, -3.0]]
        );
        // The step that ends in the tool's words counts at the last token of the policy before them.
        assert_eq!(step_rewards(&s).unwrap(), [[0.5, 0.25, 1.0]]);
        let mut none = [scored(Finish::Stop, Vec::new())];
        assert!(step_rewards(&none).unwrap()[0].iter().all(|x| x.is_nan()));
        none[0].steps.clear();
        assert!(step_rewards(&none).is_none());
    }

    #[test]
    fn cut_completions_are_silent() {
        let mut s = [
            scored(Finish::Length, vec![(0, 1.0)]),
            scored(Finish::Stop, Vec::new()),
        ];
        silence_cut(&mut s);
        let tokens: Vec<usize> = s
            .iter()
            .map(|s| s.rollout.group.completions[0].trained_tokens())
            .collect();
        assert_eq!(tokens, [0, 3]);
        assert_eq!(step_rewards(&s).unwrap()[0], [0.0; 0]);
    }

    #[test]
    fn quantiles_and_moments_by_hand() {
        assert_eq!(
            quantiles(vec![4.0, 1.0, 2.0], [0.0, 0.25, 0.5, 1.0]),
            [1.0, 1.5, 2.0, 4.0]
        );
        assert!(quantiles(Vec::new(), [0.5])[0].is_nan());
        assert_eq!(
            moments(&vec![vec![1.0, 3.0], vec![], vec![5.0, 7.0]]),
            [4.0, 5f64.sqrt(), 1.0, 7.0]
        );
        // k1 = ln 2: k3 = ½ − 1 + ln 2.
        let k3 = mean_k3(&vec![vec![0.5f64.ln()]], &vec![vec![0.25f64.ln()]]);
        assert!((k3 - (2f64.ln() - 0.5)).abs() < 1e-15);
    }
}
