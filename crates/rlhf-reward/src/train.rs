//! Training a Bradley–Terry reward model on preference pairs.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_model::{DeviceBatch, RewardNorm, ScalarModel};
use rlhf_train::{Flow, Session, Stepper};
use tch::{Kind, Tensor};

use crate::bradley_terry::{self, BradleyTerry};
use crate::error::{Error, Result};
use crate::source::model_scores;

/// Settings of [`train`].
#[derive(Clone, Copy, Debug)]
pub struct RewardConfig {
    /// Seed of the data order.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Prompts a step, each with two or more completions, best first.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// Weight of (r_c + r_r)².
    pub centering: f64,
}

/// Trains `model`, whose parameters `stepper` holds, on `data`: in each group, every earlier
/// completion is preferred to every later one, each pair at weight 1 / (pairs of its prompt).
///
/// # Errors
/// When a group exceeds `micro_tokens`, the loss stays non-finite, or a file cannot be written.
pub fn train(
    model: &ScalarModel,
    data: &[PromptGroup],
    cfg: &RewardConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let device = model.device();
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    for step in start..cfg.steps {
        let first = step * cfg.batch_size as u64;
        let rows: Vec<PromptGroup> = (0..cfg.batch_size as u64)
            .map(|i| data[endless(cfg.seed, data.len(), first + i)].clone())
            .collect();
        let lengths: Vec<usize> = rows.iter().map(PromptGroup::num_tokens).collect();
        let (mut right, mut margin, mut pairs) = (0.0, 0.0, 0.0);
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let groups = &rows[range];
            let batch = DeviceBatch::new(&PackedBatch::pack(groups)?, device)?;
            let scores = model.scores(&batch)?;
            let (chosen, rejected, weights) = all_pairs(groups);
            let at = |index: &[i64]| {
                scores.index_select(0, &Tensor::from_slice(index).to_device(device))
            };
            let (c, r) = (at(&chosen), at(&rejected));
            let w = Tensor::from_slice(&weights)
                .to_kind(c.kind())
                .to_device(device);
            let loss = bradley_terry::loss(
                &c,
                &r,
                &BradleyTerry {
                    weights: Some(&w),
                    centering: cfg.centering,
                    ..BradleyTerry::default()
                },
            )?;
            let gap = (&c - &r).detach().to_kind(Kind::Double);
            right += gap
                .gt(0.0)
                .to_kind(Kind::Double)
                .sum(None)
                .double_value(&[])
                + 0.5
                    * gap
                        .eq(0.0)
                        .to_kind(Kind::Double)
                        .sum(None)
                        .double_value(&[]);
            margin += gap.sum(None).double_value(&[]);
            pairs += chosen.len() as f64;
            stepper.accumulate(loss)?;
        }
        let report = stepper.apply()?;
        let n = f64::max(pairs, 1.0);
        let metrics = [
            ("loss", report.loss),
            ("accuracy", right / n),
            ("margin", margin / n),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
        ];
        session.log(step, lengths.iter().sum(), &metrics)?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

/// Completion indices of every (better, worse) pair, with weights that sum to 1 in each group.
fn all_pairs(groups: &[PromptGroup]) -> (Vec<i64>, Vec<i64>, Vec<f64>) {
    let (mut chosen, mut rejected, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut base = 0i64;
    for group in groups {
        let k = group.completions.len() as i64;
        for better in 0..k {
            for worse in better + 1..k {
                chosen.push(base + better);
                rejected.push(base + worse);
                weights.push(2.0 / (k * (k - 1)) as f64);
            }
        }
        base += k;
    }
    (chosen, rejected, weights)
}

/// Scores of (chosen, rejected) for every pair of `data`.
///
/// # Errors
/// When a group exceeds `micro_tokens` or the model fails.
pub fn pair_scores(
    model: &ScalarModel,
    data: &[PromptGroup],
    micro_tokens: usize,
) -> Result<Vec<(f64, f64)>> {
    let groups: Vec<&PromptGroup> = data.iter().collect();
    let scores = model_scores(model, &groups, micro_tokens)?;
    if scores.len() != 2 * data.len() {
        return Err(Error::NotPairs);
    }
    Ok(scores.chunks_exact(2).map(|c| (c[0], c[1])).collect())
}

/// Sets the model's normalisation so that its scores of `data`'s completions have mean 0 and
/// standard deviation 1.
///
/// # Errors
/// When a group exceeds `micro_tokens` or the model fails.
pub fn normalize_on(
    model: &mut ScalarModel,
    data: &[PromptGroup],
    micro_tokens: usize,
) -> Result<()> {
    let groups: Vec<&PromptGroup> = data.iter().collect();
    model.set_norm(RewardNorm::default())?;
    let scores = model_scores(model, &groups, micro_tokens)?;
    let n = scores.len().max(1) as f64;
    let mean = scores.iter().sum::<f64>() / n;
    let var = scores.iter().map(|s| (s - mean).powi(2)).sum::<f64>() / n;
    model.set_norm(RewardNorm {
        mean,
        std: var.sqrt().max(1e-6),
    })?;
    Ok(())
}
