//! Direct preference optimisation on fixed pairs.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_model::{DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{Flow, Session, Stepper};
use tch::{Kind, Tensor};

use crate::error::Result;
use crate::loss::{PairLogprobs, PairValues, Pairs, PreferenceLoss};

/// Settings of [`train`].
#[derive(Clone, Copy, Debug)]
pub struct DpoConfig {
    /// The loss.
    pub loss: PreferenceLoss,
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
    /// Share of pairs whose implicit reward prefers the chosen; a tie counts half.
    pub accuracy: f64,
    /// Share of pairs whose log-prob alone (no reference) prefers the chosen.
    pub logprob_accuracy: f64,
    /// Mean of β(Δ_chosen − Δ_rejected).
    pub margin: f64,
    /// Pairs.
    pub pairs: usize,
}

/// Accuracy of the implicit reward β log π/π₀ on pairs, from their sums under policy and reference.
#[must_use]
pub fn evaluate(policy: &[(f64, f64)], reference: &[(f64, f64)], beta: f64) -> PairEval {
    let prefers = |a: f64, b: f64| {
        if a > b {
            1.0
        } else if a == b {
            0.5
        } else {
            0.0
        }
    };
    let mut e = PairEval {
        pairs: policy.len(),
        ..PairEval::default()
    };
    for ((pc, pr), (rc, rr)) in policy.iter().zip(reference) {
        e.accuracy += prefers(pc - rc, pr - rr);
        e.logprob_accuracy += prefers(*pc, *pr);
        e.margin += beta * ((pc - rc) - (pr - rr));
    }
    let n = policy.len().max(1) as f64;
    PairEval {
        accuracy: e.accuracy / n,
        logprob_accuracy: e.logprob_accuracy / n,
        margin: e.margin / n,
        ..e
    }
}

/// Trains `model`, whose parameters `stepper` holds, on `data` (completion 0 chosen, 1 rejected).
/// `reference` are the pairs' sums under the reference model, in the order of `data`.
///
/// # Errors
/// When a pair exceeds `micro_tokens`, the loss stays non-finite, or a file cannot be written.
pub fn train(
    model: &Transformer,
    data: &[PromptGroup],
    reference: &[(f64, f64)],
    cfg: &DpoConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let device = model.device();
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    for step in start..cfg.steps {
        let first = step * cfg.batch_size as u64;
        let picks: Vec<usize> = (0..cfg.batch_size as u64)
            .map(|i| endless(cfg.seed, data.len(), first + i))
            .collect();
        let lengths: Vec<usize> = picks.iter().map(|&i| data[i].num_tokens()).collect();
        let mut seen = Seen::default();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let picks = &picks[range];
            let groups: Vec<PromptGroup> = picks.iter().map(|&i| data[i].clone()).collect();
            let batch = DeviceBatch::new(&PackedBatch::pack(&groups)?, device)?;
            let logprobs = target_logprobs(model, &batch, 1.0, false)?.logprobs;
            let sums = logprobs.sum();
            let lengths = logprobs.offsets().lengths(device).to_kind(sums.kind());
            let column = |pick: fn(&(f64, f64)) -> f64| {
                let host: Vec<f64> = picks.iter().map(|&i| pick(&reference[i])).collect();
                Tensor::from_slice(&host)
                    .to_kind(sums.kind())
                    .to_device(device)
            };
            let pairs = PairLogprobs {
                chosen: sums.slice(0, 0, None, 2),
                rejected: sums.slice(0, 1, None, 2),
                ref_chosen: column(|p| p.0),
                ref_rejected: column(|p| p.1),
            };
            let pairs = Pairs {
                lengths: Some(PairValues::new(
                    &lengths.slice(0, 0, None, 2),
                    &lengths.slice(0, 1, None, 2),
                )?),
                ..pairs.into()
            };
            let out = cfg.loss.compute(&pairs)?;
            seen.add(&pairs.logprobs, &out)?;
            stepper.accumulate(out.loss)?;
        }
        let report = stepper.apply()?;
        let mut metrics = vec![
            ("loss", report.loss),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
        ];
        metrics.extend(seen.means(picks.len()));
        session.log(step, lengths.iter().sum(), &metrics)?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

/// What a step's pairs show, summed.
#[derive(Default)]
struct Seen {
    right: f64,
    margin: f64,
    chosen_reward: f64,
    rejected_reward: f64,
    chosen_logprobs: f64,
    rejected_logprobs: f64,
}

impl Seen {
    fn add(&mut self, pairs: &PairLogprobs, out: &crate::loss::PreferenceOutput) -> Result<()> {
        let host = |t: &Tensor| Vec::<f64>::try_from(&t.detach().to_kind(Kind::Double));
        let (c, r) = (host(&out.chosen_rewards)?, host(&out.rejected_rewards)?);
        for (c, r) in c.iter().zip(&r) {
            self.right += if c > r {
                1.0
            } else if c == r {
                0.5
            } else {
                0.0
            };
            self.margin += c - r;
            self.chosen_reward += c;
            self.rejected_reward += r;
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
