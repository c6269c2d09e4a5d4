//! Pairs: completion 0 of a group is chosen, 1 rejected.

use rlhf_data::group::PromptGroup;
use rlhf_kernels::LossSum;
use rlhf_model::Transformer;
use rlhf_train::{Flow, Session, Stepper};
use tch::Tensor;

use super::measure::{calibration_error, mean, prefers};
use super::{DpoConfig, HeldOut, Seen, Sums, Task, completion_sums, host, met_sums, run};
use crate::error::{Result, ensure};
use crate::loss::{PairLogprobs, PairValues, Pairs, PreferenceMix};

/// Sequence log-probs of (chosen, rejected) for each pair under a model.
pub type PairSums = Vec<(f64, f64)>;

/// Sums of the log-probs of chosen and rejected for every pair of `data`, without gradients.
///
/// # Errors
/// When a pair exceeds `micro_tokens` or the model fails.
pub fn pair_sums(
    model: &Transformer,
    data: &[PromptGroup],
    micro_tokens: usize,
) -> Result<PairSums> {
    Ok(in_pairs(&completion_sums(model, data, micro_tokens)?))
}

/// The sums under the reference `model` of the pairs that a training of `cfg` meets, in the order of
/// `data`; those of pairs that it never meets are NaN. Computed once: the reference never changes.
///
/// # Errors
/// When a pair exceeds `micro_tokens` or the model fails.
pub fn reference_sums(
    model: &Transformer,
    data: &[PromptGroup],
    cfg: &DpoConfig,
) -> Result<PairSums> {
    Ok(in_pairs(&met_sums(model, data, cfg)?))
}

fn in_pairs(sums: &[f64]) -> PairSums {
    sums.chunks_exact(2).map(|c| (c[0], c[1])).collect()
}

/// What [`evaluate`] finds on held-out pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PairEval {
    /// Share of pairs whose log-ratio prefers the chosen; a tie counts half.
    pub accuracy: f64,
    /// Share of pairs whose log-prob alone (no reference) prefers the chosen.
    pub logprob_accuracy: f64,
    /// Mean of Δ_chosen − Δ_rejected, in nats.
    pub margin: f64,
    /// Pairs.
    pub pairs: usize,
}

/// Accuracy of the log-ratio log π/π₀ on pairs, from their sums under policy and reference.
#[must_use]
pub fn evaluate(policy: &[(f64, f64)], reference: &[(f64, f64)]) -> PairEval {
    let mut e = PairEval {
        pairs: policy.len(),
        ..PairEval::default()
    };
    for ((pc, pr), (rc, rr)) in policy.iter().zip(reference) {
        e.accuracy += prefers(pc - rc, pr - rr);
        e.logprob_accuracy += prefers(*pc, *pr);
        e.margin += (pc - rc) - (pr - rr);
    }
    let n = policy.len().max(1) as f64;
    PairEval {
        accuracy: e.accuracy / n,
        logprob_accuracy: e.logprob_accuracy / n,
        margin: e.margin / n,
        ..e
    }
}

/// What the loss says of held-out pairs.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct LossEval {
    /// Mean loss of a pair.
    pub loss: f64,
    /// Share of pairs whose reward, as the loss sees it, prefers the chosen; a tie counts half.
    pub accuracy: f64,
    /// Mean reward of the chosen less that of the rejected.
    pub margin: f64,
    /// How far σ(margin), taken as the probability that the label is right, is from how often the label's
    /// side wins: expected calibration error in ten bins (Guo et al. 2017, arXiv 1706.04599).
    pub calibration_error: f64,
}

/// Computes the loss of pairs from their sums under the policy. `delta` is that of [`Pairs::delta`].
///
/// # Errors
/// When the loss fails.
pub fn evaluate_loss(
    loss: &PreferenceMix,
    data: PairData<'_>,
    policy: &[(f64, f64)],
    delta: f64,
) -> Result<LossEval> {
    let column = |of: &[(f64, f64)]| -> Result<PairValues> {
        let (c, r): (Vec<f64>, Vec<f64>) = of.iter().copied().unzip();
        PairValues::new(&Tensor::from_slice(&c), &Tensor::from_slice(&r))
    };
    let tokens: Vec<(f64, f64)> = data.groups.iter().map(pair_lengths).collect();
    let pairs = Pairs {
        lengths: Some(column(&tokens)?),
        scores: data.scores.map(column).transpose()?,
        delta,
        ..PairLogprobs::new(&column(policy)?, &column(data.reference)?).into()
    };
    let out = tch::no_grad(|| loss.compute(&pairs))?;
    let margins = host(&out.margins())?;
    Ok(LossEval {
        loss: out.loss.sum.double_value(&[]) / out.loss.weight,
        accuracy: mean(margins.iter().map(|m| prefers(*m, 0.0))),
        margin: mean(margins.iter().copied()),
        calibration_error: calibration_error(&margins),
    })
}

/// Trained tokens of chosen and rejected.
fn pair_lengths(group: &PromptGroup) -> (f64, f64) {
    let of = |i: usize| {
        let completion = group.completions.get(i);
        completion.map_or(0, |c| c.trained_tokens()) as f64
    };
    (of(0), of(1))
}

/// Pairs and what is known of them, in one order.
#[derive(Clone, Copy, Debug)]
pub struct PairData<'a> {
    /// Completion 0 chosen, 1 rejected.
    pub groups: &'a [PromptGroup],
    /// Their sums under the reference.
    pub reference: &'a [(f64, f64)],
    /// Scores of chosen and rejected, for losses that ask for them.
    pub scores: Option<&'a [(f64, f64)]>,
}

impl<'a> PairData<'a> {
    /// Pairs without scores.
    #[must_use]
    pub fn new(groups: &'a [PromptGroup], reference: &'a [(f64, f64)]) -> Self {
        Self {
            groups,
            reference,
            scores: None,
        }
    }
}

struct PairTask<'a> {
    data: PairData<'a>,
    loss: &'a PreferenceMix,
}

impl<'a> PairTask<'a> {
    fn new(data: PairData<'a>, loss: &'a PreferenceMix) -> Result<Self> {
        let n = data.groups.len();
        let fit = data.reference.len() == n && data.scores.is_none_or(|s| s.len() == n);
        ensure(fit && n > 0, "training on pairs", || {
            format!(
                "{n} pairs, {} sums of the reference and {:?} scores: expected as many of each, at least one",
                data.reference.len(),
                data.scores.map(<[_]>::len)
            )
        })?;
        let odd = data.groups.iter().find(|g| g.completions.len() != 2);
        ensure(odd.is_none(), "training on pairs", || {
            let (row, k) = odd.map_or((0, 0), |g| (g.row, g.completions.len()));
            format!("row {row} has {k} completions, expected chosen and rejected")
        })?;
        Ok(Self { data, loss })
    }
}

impl Task for PairTask<'_> {
    fn groups(&self) -> &[PromptGroup] {
        self.data.groups
    }

    fn loss(&self, picks: &[usize], own: &Sums, baseline: f64, seen: &mut Seen) -> Result<LossSum> {
        let sides = |t: &Tensor| PairValues::new(&t.slice(0, 0, None, 2), &t.slice(0, 1, None, 2));
        let columns = |of: &[(f64, f64)]| {
            PairValues::new(
                &own.column(picks.iter().map(|&i| of[i].0)),
                &own.column(picks.iter().map(|&i| of[i].1)),
            )
        };
        let logprobs = PairLogprobs::new(&sides(&own.logprobs)?, &columns(self.data.reference)?);
        let pairs = Pairs {
            lengths: Some(sides(&own.lengths)?),
            scores: self.data.scores.map(columns).transpose()?,
            delta: baseline,
            ..logprobs.into()
        };
        let out = self.loss.compute(&pairs)?;
        let (chosen, rejected) = (host(&out.chosen_rewards)?, host(&out.rejected_rewards)?);
        for (c, r) in chosen.iter().zip(&rejected) {
            seen.add("accuracy", prefers(*c, *r));
            seen.add("margin", c - r);
            seen.add("chosen_rewards", *c);
            seen.add("rejected_rewards", *r);
            seen.rewards.extend([*c, *r]);
        }
        for (names, values) in [
            (["chosen_logprobs", "rejected_logprobs"], &own.logprobs),
            (["chosen_length", "rejected_length"], &own.lengths),
        ] {
            for both in host(values)?.chunks_exact(2) {
                seen.add(names[0], both[0]);
                seen.add(names[1], both[1]);
            }
        }
        Ok(out.loss)
    }

    fn look(
        &self,
        model: &Transformer,
        micro_tokens: usize,
        rewards: f64,
    ) -> Result<Vec<(&'static str, f64)>> {
        let sums = pair_sums(model, self.data.groups, micro_tokens)?;
        let e = evaluate_loss(self.loss, self.data, &sums, rewards)?;
        Ok(vec![
            ("test_loss", e.loss),
            ("test_accuracy", e.accuracy),
            ("test_margin", e.margin),
            ("test_calibration_error", e.calibration_error),
        ])
    }
}

/// Trains `model`, whose parameters `stepper` holds, on pairs. What is found on `held_out` pairs is logged as
/// `test_…`. BCO's δ is the mean reward of the steps before.
///
/// # Errors
/// When a pair exceeds `micro_tokens`, the loss fails or stays non-finite, or a file cannot be written.
pub fn train(
    model: &Transformer,
    data: PairData<'_>,
    cfg: &DpoConfig,
    held_out: Option<&HeldOut<'_, PairData<'_>>>,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let task = PairTask::new(data, &cfg.loss)?;
    let held_out = held_out
        .map(|h| h.try_map(|data| PairTask::new(data, &cfg.loss)))
        .transpose()?;
    run(model, &task, cfg, held_out.as_ref(), stepper, session)
}
