//! Supervised fine-tuning: maximise the log-probability of the trained tokens.
//!
//! Invariant: a step is a function of its number, the seed and the weights; noise is keyed by
//! (seed, step, row, position), so it is the same in any split and after any resume.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_data::seed::{Purpose, Stream};
use rlhf_model::{DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{Flow, Session, Stepper};
use tch::Tensor;

use crate::error::{Result, ensure};
use crate::loss::SftLoss;

/// Settings of [`train`].
#[derive(Clone, Copy, Debug)]
pub struct SftConfig {
    /// Seed of the data order and of the noise.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// What is minimised.
    pub loss: SftLoss,
    /// NEFTune (Jain et al. 2023, arXiv 2310.05914): noise of this α on the embeddings, see [`noise`]. None
    /// where absent.
    pub neftune_alpha: Option<f64>,
}

/// What is learned from.
#[derive(Clone, Copy, Debug)]
pub struct Demonstrations<'a> {
    /// The rows.
    pub rows: &'a [PromptGroup],
    /// A weight above 0 for each row; all 1 where absent.
    pub weights: Option<&'a [f64]>,
    /// Rows that are only looked at.
    pub held_out: Option<HeldOut<'a>>,
}

/// Held-out demonstrations, to be looked at while training goes on.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut<'a> {
    /// The rows.
    pub rows: &'a [PromptGroup],
    /// After every so many steps, and after the last one.
    pub every: u64,
}

/// Trains `model`, whose parameters `stepper` holds: `L = Σ_s w_s Σ_t l_st / Σ_s w_s n_s` with
/// `l = −log π(y_t | x, y_<t)`, or what [`SftConfig::loss`] makes of it. The mean negative log-probability of
/// a held-out token, without noise and weights, is logged as `test_loss`.
///
/// # Errors
/// When a row exceeds `micro_tokens`, a weight is not above 0, the loss stays non-finite, or a file cannot be
/// written.
pub fn train(
    model: &Transformer,
    data: &Demonstrations<'_>,
    cfg: &SftConfig,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    check(data, cfg)?;
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    for step in start..cfg.steps {
        let first = step * cfg.batch_size as u64;
        let picks: Vec<usize> = (0..cfg.batch_size as u64)
            .map(|i| endless(cfg.seed, data.rows.len(), first + i))
            .collect();
        let lengths: Vec<usize> = picks.iter().map(|&i| data.rows[i].num_tokens()).collect();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let picks = &picks[range];
            let rows: Vec<PromptGroup> = picks.iter().map(|&i| data.rows[i].clone()).collect();
            let packed = PackedBatch::pack(&rows)?;
            let mut batch = DeviceBatch::new(&packed, model.device())?;
            if let Some(alpha) = cfg.neftune_alpha {
                let hidden = model.config().hidden_size as usize;
                let noise = noise(&packed, alpha, hidden, cfg.seed, step);
                batch.embedding_noise = Some(noise.to_device(model.device()));
            }
            let logprobs = target_logprobs(model, &batch, 1.0, false)?.logprobs;
            let weights = data.weights.map(|all| {
                // One for each completion of a row.
                let of = |(&i, row): (&usize, &PromptGroup)| vec![all[i]; row.completions.len()];
                let weights: Vec<f64> = picks.iter().zip(&rows).flat_map(of).collect();
                Tensor::from_slice(&weights).to_device(model.device())
            });
            stepper.accumulate(cfg.loss.compute(&logprobs, weights.as_ref())?)?;
        }
        let report = stepper.apply()?;
        let mut metrics = vec![
            ("loss", report.loss),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
        ];
        let due =
            |h: &HeldOut<'_>| (step + 1).is_multiple_of(h.every.max(1)) || step + 1 == cfg.steps;
        if let Some(h) = data.held_out.filter(due) {
            metrics.push(("test_loss", evaluate(model, h.rows, cfg.micro_tokens)?));
        }
        session.log(step, lengths.iter().sum(), &metrics)?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

fn check(data: &Demonstrations<'_>, cfg: &SftConfig) -> Result<()> {
    if let Some(weights) = data.weights {
        ensure(weights.len() == data.rows.len(), "sft", || {
            format!("{} weights for {} rows", weights.len(), data.rows.len())
        })?;
        let bad = weights.iter().position(|w| !(*w > 0.0 && w.is_finite()));
        if let Some(i) = bad {
            ensure(false, "sft", || {
                format!(
                    "row {i} has the weight {}, expected one above 0; leave out rows that shall not count",
                    weights[i]
                )
            })?;
        }
    }
    let alpha = cfg.neftune_alpha.unwrap_or(1.0);
    ensure(alpha > 0.0 && alpha.is_finite(), "sft", || {
        format!("neftune_alpha is {alpha}, expected a number above 0")
    })
}

/// The mean of −log π over the trained tokens of `rows`, without gradients.
///
/// # Errors
/// When a row exceeds `micro_tokens`, or the model fails.
pub fn evaluate(model: &Transformer, rows: &[PromptGroup], micro_tokens: usize) -> Result<f64> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = rows.iter().map(PromptGroup::num_tokens).collect();
    let (mut sum, mut weight) = (0.0, 0.0);
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let batch = DeviceBatch::new(&PackedBatch::pack(&rows[range])?, model.device())?;
        let logprobs = target_logprobs(model, &batch, 1.0, false)?.logprobs;
        let loss = SftLoss::default().compute(&logprobs, None)?;
        sum += loss.sum.double_value(&[]);
        weight += loss.weight;
    }
    Ok(sum / weight)
}

/// NEFTune's noise for the rows of a batch, `[N, H]`: uniform in ±α/√(L H), L the tokens of the row's prompt
/// and completions. A function of (seed, step, row of the data, place in the row, axis).
pub fn noise(batch: &PackedBatch, alpha: f64, hidden: usize, seed: u64, step: u64) -> Tensor {
    // Seeds of steps must not meet those of neighbouring seeds; `Stream` mixes what it is given.
    let stream = Stream::new(
        seed ^ step.wrapping_mul(0x9e37_79b9_7f4a_7c15),
        Purpose::Noise,
    );
    let mut values = Vec::with_capacity(batch.num_tokens() * hidden);
    for (span, row) in batch.groups.iter().zip(&batch.rows) {
        let begin = span.prompt.start;
        let end = span.completions.last().map_or(span.prompt.end, |c| c.end);
        let size = alpha / (((end - begin) * hidden) as f64).sqrt();
        for place in 0..end - begin {
            for block in 0..hidden.div_ceil(4) {
                let bits = stream.bits(*row, place as u32, block as u32);
                let left = (hidden - block * 4).min(4);
                // The middle of each of 2³² cells of [−1, 1].
                let unit = |b: u32| ((f64::from(b) + 0.5) / 2_147_483_648.0 - 1.0) * size;
                values.extend(bits.iter().take(left).map(|&b| unit(b) as f32));
            }
        }
    }
    Tensor::from_slice(&values).view([batch.num_tokens() as i64, hidden as i64])
}
