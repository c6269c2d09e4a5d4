//! Direct preference optimisation on fixed pairs.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_model::{DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{Flow, Session, Stepper};
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::loss::unpaired::RunningMoments;
use crate::loss::{PairLogprobs, PairValues, Pairs, PreferenceMix, PreferenceOutput};

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct DpoConfig {
    /// The loss. One that asks for scores is refused: the trainer has none.
    pub loss: PreferenceMix,
    /// Seed of the data order.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Pairs a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
}

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
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = data.iter().map(PromptGroup::num_tokens).collect();
    let mut sums = Vec::with_capacity(data.len());
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let batch = DeviceBatch::new(&PackedBatch::pack(&data[range])?, model.device())?;
        let per_completion = target_logprobs(model, &batch, 1.0, false)?.logprobs.sum();
        let host = Vec::<f64>::try_from(&per_completion.to_kind(Kind::Double))?;
        sums.extend(host.chunks_exact(2).map(|c| (c[0], c[1])));
    }
    Ok(sums)
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
    let positions = cfg.steps.saturating_mul(cfg.batch_size as u64);
    if positions >= data.len() as u64 {
        return pair_sums(model, data, cfg.micro_tokens);
    }
    let rows: Vec<usize> = (0..positions)
        .map(|i| endless(cfg.seed, data.len(), i))
        .collect();
    let met: Vec<PromptGroup> = rows.iter().map(|&i| data[i].clone()).collect();
    let mut sums = vec![(f64::NAN, f64::NAN); data.len()];
    for (row, sum) in rows
        .into_iter()
        .zip(pair_sums(model, &met, cfg.micro_tokens)?)
    {
        sums[row] = sum;
    }
    Ok(sums)
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

/// 1 where `a` is the higher, ½ at a tie, else 0.
fn prefers(a: f64, b: f64) -> f64 {
    if a > b {
        1.0
    } else if a == b {
        0.5
    } else {
        0.0
    }
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

/// Held-out pairs, to be looked at while training goes on.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut<'a> {
    /// The pairs.
    pub data: &'a [PromptGroup],
    /// Their sums under the reference.
    pub reference: &'a [(f64, f64)],
    /// After every so many steps, and after the last one.
    pub every: u64,
    /// Ends the training when the held-out loss was no lower than the lowest so far for so many looks.
    pub patience: Option<u64>,
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

/// Computes the loss of pairs from their sums under policy and reference. `delta` is that of
/// [`Pairs::delta`].
///
/// # Errors
/// When the loss fails.
pub fn evaluate_loss(
    loss: &PreferenceMix,
    data: &[PromptGroup],
    policy: &[(f64, f64)],
    reference: &[(f64, f64)],
    delta: f64,
) -> Result<LossEval> {
    let column = |of: &[(f64, f64)]| -> Result<PairValues> {
        let (c, r): (Vec<f64>, Vec<f64>) = of.iter().copied().unzip();
        PairValues::new(&Tensor::from_slice(&c), &Tensor::from_slice(&r))
    };
    let tokens: Vec<(f64, f64)> = data.iter().map(pair_lengths).collect();
    let pairs = Pairs {
        lengths: Some(column(&tokens)?),
        delta,
        ..PairLogprobs::new(&column(policy)?, &column(reference)?).into()
    };
    let out = tch::no_grad(|| loss.compute(&pairs))?;
    let margins = Vec::<f64>::try_from(&out.margins())?;
    let n = margins.len().max(1) as f64;
    Ok(LossEval {
        loss: out.loss.sum.double_value(&[]) / out.loss.weight,
        accuracy: margins.iter().map(|m| prefers(*m, 0.0)).sum::<f64>() / n,
        margin: margins.iter().sum::<f64>() / n,
        calibration_error: calibration_error(&margins),
    })
}

/// Σ_b |Σ_{i in b} (right_i − confidence_i)| / n over ten bins of the confidence max(σ(m), σ(−m)), which is ½
/// to 1.
fn calibration_error(margins: &[f64]) -> f64 {
    const BINS: usize = 10;
    let mut gaps = [0.0; BINS];
    for m in margins {
        let confidence = 1.0 / (1.0 + (-m.abs()).exp());
        let bin = (((confidence - 0.5) * 2.0 * BINS as f64) as usize).min(BINS - 1);
        gaps[bin] += prefers(*m, 0.0) - confidence;
    }
    gaps.iter().map(|g| g.abs()).sum::<f64>() / margins.len().max(1) as f64
}

/// Trained tokens of chosen and rejected.
fn pair_lengths(group: &PromptGroup) -> (f64, f64) {
    let of = |i: usize| {
        let completion = group.completions.get(i);
        completion.map_or(0, |c| c.trained_tokens()) as f64
    };
    (of(0), of(1))
}

/// What a training must remember beside weights and optimiser.
#[derive(Clone, Copy, Debug, Default, serde::Serialize, serde::Deserialize)]
struct Progress {
    /// Rewards of the steps so far: BCO's δ is their mean.
    rewards: RunningMoments,
    /// The lowest held-out loss.
    best: Option<f64>,
    /// Looks since then.
    waited: u64,
}

/// Trains `model`, whose parameters `stepper` holds, on `data` (completion 0 chosen, 1 rejected).
/// `reference` are the pairs' sums under the reference model, in the order of `data`. What is found on
/// `held_out` pairs is logged as `test_…`. BCO's δ is the mean reward of the steps before.
///
/// # Errors
/// When a pair exceeds `micro_tokens`, the loss fails or stays non-finite, or a file cannot be written.
pub fn train(
    model: &Transformer,
    data: &[PromptGroup],
    reference: &[(f64, f64)],
    cfg: &DpoConfig,
    held_out: Option<&HeldOut<'_>>,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let restored = session.resume(&mut [("model", stepper)])?;
    let (start, mut progress) = restored.map_or(
        (0, Progress::default()),
        |r: rlhf_train::Restored<Progress>| (r.step, r.extra),
    );
    for step in start..cfg.steps {
        if held_out.is_some_and(|h| h.patience.is_some_and(|most| progress.waited >= most)) {
            break;
        }
        let first = step * cfg.batch_size as u64;
        let picks: Vec<usize> = (0..cfg.batch_size as u64)
            .map(|i| endless(cfg.seed, data.len(), first + i))
            .collect();
        let lengths: Vec<usize> = picks.iter().map(|&i| data[i].num_tokens()).collect();
        let mut seen = Seen::default();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let picks = &picks[range];
            let pairs = micro_batch(model, data, reference, picks, progress.rewards.mean())?;
            let out = cfg.loss.compute(&pairs)?;
            seen.add(&pairs.logprobs, &out)?;
            stepper.accumulate(out.loss)?;
        }
        let report = stepper.apply()?;
        progress
            .rewards
            .update(&Tensor::from_slice(&seen.rewards))?;
        let mut metrics = vec![
            ("loss", report.loss),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
        ];
        metrics.extend(seen.means(picks.len()));
        let due =
            |h: &&HeldOut<'_>| (step + 1).is_multiple_of(h.every.max(1)) || step + 1 == cfg.steps;
        if let Some(h) = held_out.filter(due) {
            let sums = pair_sums(model, h.data, cfg.micro_tokens)?;
            let delta = progress.rewards.mean();
            let e = evaluate_loss(&cfg.loss, h.data, &sums, h.reference, delta)?;
            metrics.extend([
                ("test_loss", e.loss),
                ("test_accuracy", e.accuracy),
                ("test_margin", e.margin),
                ("test_calibration_error", e.calibration_error),
            ]);
            if progress.best.is_none_or(|best| e.loss < best) {
                (progress.best, progress.waited) = (Some(e.loss), 0);
            } else {
                progress.waited += 1;
            }
        }
        session.log(step, lengths.iter().sum(), &metrics)?;
        let flow = session.after_step(step, &[("model", stepper)], &progress)?;
        if let Flow::Stop(signal) = flow {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

/// The pairs `picks` of `data` with the policy's graph.
fn micro_batch(
    model: &Transformer,
    data: &[PromptGroup],
    reference: &[(f64, f64)],
    picks: &[usize],
    delta: f64,
) -> Result<Pairs> {
    let device = model.device();
    let groups: Vec<PromptGroup> = picks.iter().map(|&i| data[i].clone()).collect();
    let batch = DeviceBatch::new(&PackedBatch::pack(&groups)?, device)?;
    let logprobs = target_logprobs(model, &batch, 1.0, false)?.logprobs;
    let sums = logprobs.sum();
    let lengths = logprobs.offsets().lengths(device).to_kind(sums.kind());
    let sides = |t: &Tensor| PairValues::new(&t.slice(0, 0, None, 2), &t.slice(0, 1, None, 2));
    let column = |pick: fn(&(f64, f64)) -> f64| {
        let host: Vec<f64> = picks.iter().map(|&i| pick(&reference[i])).collect();
        Tensor::from_slice(&host)
            .to_kind(sums.kind())
            .to_device(device)
    };
    let reference = PairValues::new(&column(|p| p.0), &column(|p| p.1))?;
    Ok(Pairs {
        lengths: Some(sides(&lengths)?),
        delta,
        ..PairLogprobs::new(&sides(&sums)?, &reference).into()
    })
}

/// What a step's pairs show, summed.
#[derive(Default)]
struct Seen {
    right: f64,
    margin: f64,
    /// Of chosen and rejected.
    rewards: Vec<f64>,
    chosen_reward: f64,
    rejected_reward: f64,
    chosen_logprobs: f64,
    rejected_logprobs: f64,
}

impl Seen {
    fn add(&mut self, pairs: &PairLogprobs, out: &PreferenceOutput) -> Result<()> {
        let host = |t: &Tensor| Vec::<f64>::try_from(&t.detach().to_kind(Kind::Double));
        let (c, r) = (host(&out.chosen_rewards)?, host(&out.rejected_rewards)?);
        for (c, r) in c.iter().zip(&r) {
            self.right += prefers(*c, *r);
            self.margin += c - r;
            self.chosen_reward += c;
            self.rejected_reward += r;
            self.rewards.extend([c, r]);
        }
        self.chosen_logprobs += host(&pairs.chosen)?.iter().sum::<f64>();
        self.rejected_logprobs += host(&pairs.rejected)?.iter().sum::<f64>();
        Ok(())
    }

    fn means(&self, pairs: usize) -> [(&'static str, f64); 6] {
        let n = pairs.max(1) as f64;
        [
            ("accuracy", self.right / n),
            ("margin", self.margin / n),
            ("chosen_rewards", self.chosen_reward / n),
            ("rejected_rewards", self.rejected_reward / n),
            ("chosen_logprobs", self.chosen_logprobs / n),
            ("rejected_logprobs", self.rejected_logprobs / n),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_by_hand() {
        // σ(ln 9) = 0.9 and right; σ(−ln 9): 0.9 sure and wrong. A bin of two: right in 1, sure 1.8.
        let m = 9f64.ln();
        assert!((calibration_error(&[m, -m]) - 0.4).abs() < 1e-12);
        // In their own bins: |1 − 0.9| and |0 − 0.6|, over two.
        let small = -(1.5f64.ln());
        assert!((calibration_error(&[m, small]) - 0.35).abs() < 1e-12);
        assert_eq!(calibration_error(&[0.0, 0.0]), 0.0);
        assert_eq!(calibration_error(&[]), 0.0);
    }
}
