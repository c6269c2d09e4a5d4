//! Thumbs: single completions called good or bad (KTO, BCO, APO-zero).
//!
//! KTO's reference point z of a step is the mean of Δ over its mismatched completions, of each prompt with the
//! completion of the step's next row; the step is whole, however it is split. Where the policy's part is
//! computed once a step without gradients, the reference's is known before training: which rows meet is a
//! function of the seed.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_kernels::LossSum;
use rlhf_model::Transformer;
use rlhf_train::{Flow, Session, Stepper};
use tch::{Device, Tensor};

use super::measure::{auc, calibration_error, mean, prefers};
use super::{At, HeldOut, Seen, Sums, Task, TrainConfig, completion_sums, host, met_sums, run};
use crate::error::{Result, ensure};
use crate::loss::unpaired::{UnpairedLogprobs, UnpairedLoss, kl_estimate};

/// Settings of [`train`].
pub type ThumbConfig = TrainConfig<UnpairedLoss>;

/// Thumbs and what is known of them, in one order.
#[derive(Clone, Copy, Debug)]
pub struct ThumbData<'a> {
    /// One completion each.
    pub groups: &'a [PromptGroup],
    /// Whether each is good.
    pub desirable: &'a [bool],
    /// What the reference says of them.
    pub reference: &'a ThumbSums,
}

/// Sums of log-probs under the reference.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ThumbSums {
    /// Of each row's completion; NaN of rows that are never met.
    pub own: Vec<f64>,
    /// Of the mismatched completions, by position in the training; empty where the loss asks for none.
    pub mismatched: Vec<f64>,
}

/// The rows of `groups` in the order of training, each with the completion of its step's next row in the place
/// of its own: x₁ with y₂, x₂ with y₃, …, x_m with y₁ (Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1).
#[must_use]
pub fn mismatched<L>(groups: &[PromptGroup], cfg: &TrainConfig<L>) -> Vec<PromptGroup> {
    (0..cfg.steps)
        .flat_map(|step| turned(groups, &cfg.picks(groups.len(), step)))
        .collect()
}

/// The prompts of `picks` with the completions of the next of them.
fn turned(groups: &[PromptGroup], picks: &[usize]) -> Vec<PromptGroup> {
    let next = picks.iter().cycle().skip(1);
    let both = picks.iter().zip(next);
    both.map(|(&i, &j)| PromptGroup {
        completions: groups[j].completions.clone(),
        ..groups[i].clone()
    })
    .collect()
}

/// The sums under the reference `model` that a training of `cfg` on `groups` needs.
///
/// # Errors
/// When a row exceeds `micro_tokens` or the model fails.
pub fn reference_sums(
    model: &Transformer,
    groups: &[PromptGroup],
    cfg: &ThumbConfig,
) -> Result<ThumbSums> {
    let mismatched = if cfg.loss.asks_reference_point() {
        completion_sums(model, &mismatched(groups, cfg), cfg.micro_tokens)?
    } else {
        Vec::new()
    };
    Ok(ThumbSums {
        own: met_sums(model, groups, cfg)?,
        mismatched,
    })
}

/// A training of one step that holds all of `groups`: by it held-out rows are mismatched.
#[must_use]
pub fn at_once(groups: &[PromptGroup], cfg: &ThumbConfig) -> ThumbConfig {
    TrainConfig {
        steps: 1,
        batch_size: groups.len(),
        ..cfg.clone()
    }
}

/// The sums under the reference `model` of held-out rows: all of them, and mismatched in one seeded order.
///
/// # Errors
/// As [`reference_sums`].
pub fn held_out_sums(
    model: &Transformer,
    groups: &[PromptGroup],
    cfg: &ThumbConfig,
) -> Result<ThumbSums> {
    reference_sums(model, groups, &at_once(groups, cfg))
}

/// What the loss says of held-out thumbs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ThumbEval {
    /// Mean loss of a completion.
    pub loss: f64,
    /// Share of completions on the right side of what the loss compares rewards with; a tie counts half.
    pub accuracy: f64,
    /// The same of the good ones; NaN where there are none.
    pub accuracy_desirable: f64,
    /// The same of the bad ones.
    pub accuracy_undesirable: f64,
    /// The chance that a good one has a higher reward than a bad one ([`auc`]).
    pub auc: f64,
    /// Mean reward of the good less that of the bad.
    pub margin: f64,
    /// What rewards were compared with, in units of the reward.
    pub baseline: f64,
    /// How far σ of the distance from the baseline, taken as the probability that the label is right, is from how
    /// often it is (as [`super::LossEval::calibration_error`]).
    pub calibration_error: f64,
}

/// Computes the loss of thumbs from their sums under the policy; `baseline` as in [`UnpairedLoss::compute`].
///
/// # Errors
/// When the loss fails.
pub fn evaluate(
    loss: UnpairedLoss,
    data: ThumbData<'_>,
    policy: &[f64],
    baseline: f64,
) -> Result<ThumbEval> {
    let completions = UnpairedLogprobs {
        logprobs: Tensor::from_slice(policy),
        ref_logprobs: Tensor::from_slice(&data.reference.own),
        desirable: labels(data.desirable.iter().copied(), Device::Cpu),
    };
    let out = tch::no_grad(|| loss.compute(&completions, baseline))?;
    let shift = loss.shift(baseline);
    let rewards = host(&out.rewards)?;
    let good = || rewards.iter().zip(data.desirable).map(|(r, d)| (*r, *d));
    let signed: Vec<(f64, bool)> = good()
        .map(|(r, d)| (if d { r - shift } else { shift - r }, d))
        .collect();
    let right = |of: Option<bool>| {
        let of = signed.iter().filter(|s| of.is_none_or(|d| s.1 == d));
        mean(of.map(|s| prefers(s.0, 0.0)))
    };
    let mean_of = |kind: bool| mean(good().filter(|g| g.1 == kind).map(|g| g.0));
    let margins: Vec<f64> = signed.iter().map(|s| s.0).collect();
    Ok(ThumbEval {
        loss: out.loss.sum.double_value(&[]) / out.loss.weight,
        accuracy: right(None),
        accuracy_desirable: right(Some(true)),
        accuracy_undesirable: right(Some(false)),
        auc: auc(&rewards, data.desirable),
        margin: mean_of(true) - mean_of(false),
        baseline: shift,
        calibration_error: calibration_error(&margins),
    })
}

fn labels(of: impl Iterator<Item = bool>, device: Device) -> Tensor {
    let host: Vec<bool> = of.collect();
    Tensor::from_slice(&host).to_device(device)
}

struct ThumbTask<'a> {
    data: ThumbData<'a>,
    /// Of the training that `data` are rows of.
    cfg: ThumbConfig,
}

impl<'a> ThumbTask<'a> {
    fn new(data: ThumbData<'a>, cfg: ThumbConfig) -> Result<Self> {
        let op = "training on thumbs";
        let n = data.groups.len();
        let sums = data.reference;
        ensure(
            n > 0 && data.desirable.len() == n && sums.own.len() == n,
            op,
            || {
                format!(
                    "{n} rows, {} labels and {} sums of the reference: expected as many of each, at least one",
                    data.desirable.len(),
                    sums.own.len()
                )
            },
        )?;
        let odd = data.groups.iter().find(|g| g.completions.len() != 1);
        ensure(odd.is_none(), op, || {
            let (row, k) = odd.map_or((0, 0), |g| (g.row, g.completions.len()));
            format!("row {row} has {k} completions, expected one")
        })?;
        if cfg.loss.asks_reference_point() {
            let positions = cfg.steps.saturating_mul(cfg.batch_size as u64);
            ensure(sums.mismatched.len() as u64 == positions, op, || {
                format!(
                    "{} mismatched sums of the reference, expected one for each of {positions} positions (`reference_sums`)",
                    sums.mismatched.len()
                )
            })?;
            ensure(cfg.batch_size > 1, op, || {
                "KTO mismatches the rows of a step: it needs at least 2".into()
            })?;
        }
        Ok(Self { data, cfg })
    }

    /// KTO's z of the rows of a step, else the mean of the rewards so far.
    fn point(&self, model: &Transformer, at: At<'_>, rewards: f64) -> Result<f64> {
        if !self.cfg.loss.asks_reference_point() {
            return Ok(rewards);
        }
        let others = turned(self.data.groups, at.picks);
        let own = completion_sums(model, &others, at.micro_tokens)?;
        let first = at.step as usize * self.cfg.batch_size;
        let reference = &self.data.reference.mismatched[first..first + own.len()];
        kl_estimate(&Tensor::from_slice(&own), &Tensor::from_slice(reference))
    }
}

impl Task for ThumbTask<'_> {
    fn groups(&self) -> &[PromptGroup] {
        self.data.groups
    }

    fn baseline(&self, model: &Transformer, at: At<'_>, rewards: f64) -> Result<f64> {
        self.point(model, at, rewards)
    }

    fn loss(&self, picks: &[usize], own: &Sums, baseline: f64, seen: &mut Seen) -> Result<LossSum> {
        let completions = UnpairedLogprobs {
            logprobs: own.logprobs.shallow_clone(),
            ref_logprobs: own.column(picks.iter().map(|&i| self.data.reference.own[i])),
            desirable: labels(
                picks.iter().map(|&i| self.data.desirable[i]),
                own.logprobs.device(),
            ),
        };
        let out = self.cfg.loss.compute(&completions, baseline)?;
        let shift = self.cfg.loss.shift(baseline);
        let (rewards, logprobs) = (host(&out.rewards)?, host(&own.logprobs)?);
        for ((&i, reward), logprob) in picks.iter().zip(&rewards).zip(&logprobs) {
            let desirable = self.data.desirable[i];
            let from = if desirable {
                reward - shift
            } else {
                shift - reward
            };
            let right = prefers(from, 0.0);
            seen.add("accuracy", right);
            let names = if desirable {
                [
                    "accuracy_desirable",
                    "desirable_rewards",
                    "desirable_logprobs",
                ]
            } else {
                [
                    "accuracy_undesirable",
                    "undesirable_rewards",
                    "undesirable_logprobs",
                ]
            };
            for (name, value) in names.into_iter().zip([right, *reward, *logprob]) {
                seen.add(name, value);
            }
        }
        for length in host(&own.lengths)? {
            seen.add("length", length);
        }
        seen.add("baseline", shift);
        seen.rewards.extend(rewards);
        Ok(out.loss)
    }

    fn look(
        &self,
        model: &Transformer,
        micro_tokens: usize,
        rewards: f64,
    ) -> Result<Vec<(&'static str, f64)>> {
        let sums = completion_sums(model, self.data.groups, micro_tokens)?;
        let picks: Vec<usize> = (0..self.data.groups.len() as u64)
            .map(|i| endless(self.cfg.seed, self.data.groups.len(), i))
            .collect();
        let at = At {
            step: 0,
            picks: &picks,
            micro_tokens,
        };
        let baseline = self.point(model, at, rewards)?;
        let e = evaluate(self.cfg.loss, self.data, &sums, baseline)?;
        let all = [
            ("test_loss", e.loss),
            ("test_accuracy", e.accuracy),
            ("test_accuracy_desirable", e.accuracy_desirable),
            ("test_accuracy_undesirable", e.accuracy_undesirable),
            ("test_auc", e.auc),
            ("test_margin", e.margin),
            ("test_baseline", e.baseline),
            ("test_calibration_error", e.calibration_error),
        ];
        Ok(all.into_iter().filter(|v| v.1.is_finite()).collect())
    }
}

/// Trains `model`, whose parameters `stepper` holds, on thumbs. What is found on `held_out` ones is logged as
/// `test_…`; their reference sums are those of [`held_out_sums`]. BCO's δ is the mean reward of the steps before.
///
/// # Errors
/// When numbers of rows differ, a row exceeds `micro_tokens`, the loss fails or stays non-finite, or a file
/// cannot be written.
pub fn train(
    model: &Transformer,
    data: ThumbData<'_>,
    cfg: &ThumbConfig,
    held_out: Option<&HeldOut<'_, ThumbData<'_>>>,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let task = ThumbTask::new(data, cfg.clone())?;
    let held_out = held_out
        .map(|h| h.try_map(|data| ThumbTask::new(data, at_once(data.groups, cfg))))
        .transpose()?;
    run(model, &task, cfg, held_out.as_ref(), stepper, session)
}
