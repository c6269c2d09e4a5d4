//! Training a Bradley–Terry reward model on preference pairs.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::Offsets;
use rlhf_model::{DeviceBatch, RewardNorm, ScalarModel};
use rlhf_train::{Flow, Session, Stepper};
use tch::Kind;

use crate::bradley_terry::{self, BradleyTerry, PairStats};
use crate::error::{Error, Result};
use crate::pairs::Pairs;
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
/// When a group exceeds `micro_tokens` or has fewer than two completions, the loss stays non-finite, or a file cannot be written.
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
        let mut stats = PairStats::default();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let groups = &rows[range];
            let batch = DeviceBatch::new(&PackedBatch::pack(groups)?, device)?;
            let scores = model.scores(&batch)?;
            let lengths: Vec<i64> = groups.iter().map(|g| g.completions.len() as i64).collect();
            let pairs =
                Pairs::of_rankings(&Offsets::from_lengths(&lengths)?)?.tensors(Kind::Float, device);
            let (c, r) = (
                scores.index_select(0, &pairs.chosen),
                scores.index_select(0, &pairs.rejected),
            );
            let settings = BradleyTerry {
                weights: Some(&pairs.weights),
                centering: cfg.centering,
                ..BradleyTerry::default()
            };
            let loss = bradley_terry::loss(&c, &r, &settings)?;
            stats.add(&PairStats::of(&c, &r)?);
            stepper.accumulate(loss)?;
        }
        let report = stepper.apply()?;
        let metrics = [
            ("loss", report.loss),
            ("accuracy", stats.accuracy()),
            ("margin", stats.mean_margin()),
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
