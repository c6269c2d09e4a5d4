//! Supervised fine-tuning: maximise the log-probability of the trained tokens.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::LossSum;
use rlhf_model::{DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{Flow, Session, Stepper};

use crate::error::Result;

/// Settings of [`train`].
#[derive(Clone, Copy, Debug)]
pub struct SftConfig {
    /// Seed of the data order.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
}

/// Trains `model`, whose parameters `stepper` holds, on `data`:
/// `L = −Σ log π(y_t | x, y_<t) / (number of trained tokens)`.
///
/// # Errors
/// When a row exceeds `micro_tokens`, the loss stays non-finite, or a file cannot be written.
pub fn train(
    model: &Transformer,
    data: &[PromptGroup],
    cfg: &SftConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    for step in start..cfg.steps {
        let first = step * cfg.batch_size as u64;
        let rows: Vec<PromptGroup> = (0..cfg.batch_size as u64)
            .map(|i| data[endless(cfg.seed, data.len(), first + i)].clone())
            .collect();
        let lengths: Vec<usize> = rows.iter().map(PromptGroup::num_tokens).collect();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let batch = DeviceBatch::new(&PackedBatch::pack(&rows[range])?, model.device())?;
            let logprobs = target_logprobs(model, &batch, 1.0, false)?.logprobs;
            let sum = -logprobs.values().sum(None);
            stepper.accumulate(LossSum {
                sum,
                weight: batch.offsets.num_values() as f64,
            })?;
        }
        let report = stepper.apply()?;
        let tokens = lengths.iter().sum();
        session.log(
            step,
            tokens,
            &[
                ("loss", report.loss),
                ("grad_norm", report.grad_norm),
                ("lr", report.lr),
            ],
        )?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}
