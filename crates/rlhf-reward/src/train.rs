//! Training reward models: one loop for every objective.
//!
//! Invariant: a step depends on the rows and the seed alone, not on how it is split into micro-batches. On
//! a trunk with several heads every head learns from the same rows; what tells the members apart is where
//! they begin and, if asked for, how much each row counts for each of them.

use rlhf_data::group::PromptGroup;
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::LossSum;
use rlhf_model::DeviceBatch;
use rlhf_train::{Flow, Session, Stepper};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::labels::{Label, Labelled};
use crate::logistic;
use crate::model::RewardModel;
use crate::objective::{Objective, Tally};

/// Settings of [`train`].
#[derive(Clone, Debug)]
pub struct RewardConfig {
    /// What is learned.
    pub objective: Objective,
    /// Seed of the data order and of the rows' weights.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Prompts a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
    /// How much rows count for each member.
    pub bootstrap: Bootstrap,
    /// The number of the first member, for ensembles whose nets are trained one by one.
    pub first_member: u32,
}

/// How much rows count for each member of an ensemble.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Bootstrap {
    /// As much as they say.
    #[default]
    None,
    /// Times −ln u, drawn for each row and member: the Bayesian bootstrap (Rubin 1981). Members then differ
    /// as if they had seen other samples of the same data.
    Bayesian,
}

/// Held-out rows, to be looked at while training goes on.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut<'a> {
    /// The rows.
    pub data: &'a [Labelled],
    /// After every so many steps, and after the last one.
    pub every: u64,
}

impl RewardConfig {
    /// What each of `rows` counts for a member.
    fn weights(&self, rows: &[&Labelled], member: u32) -> Vec<f64> {
        let stream = Stream::new(self.seed, Purpose::Bootstrap);
        rows.iter()
            .map(|r| match self.bootstrap {
                Bootstrap::None => r.weight,
                Bootstrap::Bayesian => {
                    -stream
                        .uniform(r.group.row, self.first_member + member, 0)
                        .ln()
                        * r.weight
                }
            })
            .collect()
    }
}

/// The loss of `rows`, packed together, over all members: their sums and weights added up.
fn forward(
    model: &RewardModel,
    objective: &Objective,
    rows: &[&Labelled],
    weights: impl Fn(u32) -> Vec<f64>,
) -> Result<(LossSum, Tally)> {
    let groups: Vec<PromptGroup> = rows.iter().map(|r| r.group.clone()).collect();
    let packed = PackedBatch::pack(&groups)?;
    let batch = DeviceBatch::new(&packed, model.device())?;
    let (places, lengths) = objective.places(rows, packed.completion_rows());
    let mut whole: Option<LossSum> = None;
    let mut tally = Tally::default();
    for (member, outputs) in (0u32..).zip(model.outputs(&batch, &places)?) {
        let thresholds = model.thresholds(member as usize);
        let weights = weights(member);
        let step = objective.step(rows, &outputs, &lengths, thresholds, &weights)?;
        tally.add(&step.tally);
        whole = Some(match whole {
            None => step.loss,
            Some(all) => LossSum {
                sum: all.sum + step.loss.sum,
                weight: all.weight + step.loss.weight,
            },
        });
    }
    let loss = whole.ok_or(Error::NotPairs)?;
    Ok((loss, tally))
}

/// Trains `model`, which has one net and whose parameters `stepper` holds, on `data`.
///
/// # Errors
/// When a row does not fit the objective (with its number, before anything is trained), a group exceeds
/// `micro_tokens`, the loss stays non-finite, or a file cannot be written.
pub fn train(
    model: &RewardModel,
    data: &[Labelled],
    cfg: &RewardConfig,
    held_out: Option<&HeldOut<'_>>,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    cfg.objective.check()?;
    cfg.objective.check_rows(data)?;
    if let Some(h) = held_out {
        cfg.objective.check_rows(h.data)?;
    }
    let start = session
        .resume(&mut [("model", stepper)])?
        .map_or(0, |r: rlhf_train::Restored<()>| r.step);
    for step in start..cfg.steps {
        let first = step * cfg.batch_size as u64;
        let rows: Vec<&Labelled> = (0..cfg.batch_size as u64)
            .map(|i| &data[endless(cfg.seed, data.len(), first + i)])
            .collect();
        let lengths: Vec<usize> = rows.iter().map(|r| r.group.num_tokens()).collect();
        let mut tally = Tally::default();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let rows = &rows[range];
            let weights = |member| cfg.weights(rows, member);
            let (loss, facts) = forward(model, &cfg.objective, rows, weights)?;
            tally.add(&facts);
            stepper.accumulate(loss)?;
        }
        let report = stepper.apply()?;
        let looked = match held_out {
            Some(h) if (step + 1) % h.every.max(1) == 0 || step + 1 == cfg.steps => {
                evaluate(model, &cfg.objective, h.data, cfg.micro_tokens)?
            }
            _ => Vec::new(),
        };
        let mut metrics: Vec<(&str, f64)> = vec![("loss", report.loss)];
        metrics.extend(tally.means().map(|(name, x)| -> (&str, f64) { (name, x) }));
        metrics.extend([("grad_norm", report.grad_norm), ("lr", report.lr)]);
        metrics.extend(looked.iter().map(|(name, x)| (name.as_str(), *x)));
        session.log(step, lengths.iter().sum(), &metrics)?;
        if let Flow::Stop(signal) = session.after_step(step, &[("model", stepper)], &())? {
            return Ok(Flow::Stop(signal));
        }
    }
    Ok(Flow::Continue)
}

/// Loss and facts of held-out rows, `test_loss`, `test_accuracy` and the like: means over members.
///
/// # Errors
/// When a row does not fit the objective, a group exceeds `micro_tokens`, or the model fails.
pub fn evaluate(
    model: &RewardModel,
    objective: &Objective,
    data: &[Labelled],
    micro_tokens: usize,
) -> Result<Vec<(String, f64)>> {
    let _guard = tch::no_grad_guard();
    objective.check_rows(data)?;
    let rows: Vec<&Labelled> = data.iter().collect();
    let lengths: Vec<usize> = rows.iter().map(|r| r.group.num_tokens()).collect();
    let (mut sum, mut weight, mut tally) = (0.0, 0.0, Tally::default());
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let rows = &rows[range];
        let weights = |_| rows.iter().map(|r| r.weight).collect();
        let (loss, facts) = forward(model, objective, rows, weights)?;
        sum += loss.sum.double_value(&[]);
        weight += loss.weight;
        tally.add(&facts);
    }
    let mut found = vec![(
        "test_loss".to_owned(),
        sum / f64::max(weight, f64::MIN_POSITIVE),
    )];
    found.extend(tally.means().map(|(name, x)| (format!("test_{name}"), x)));
    Ok(found)
}

/// Scores of (chosen, rejected) for every pair of `data`.
///
/// # Errors
/// When groups are not pairs, a group exceeds `micro_tokens` or the model fails.
pub fn pair_scores<'a>(
    model: &RewardModel,
    data: impl IntoIterator<Item = &'a PromptGroup>,
    micro_tokens: usize,
) -> Result<Vec<(f64, f64)>> {
    let groups: Vec<&PromptGroup> = data.into_iter().collect();
    if groups.iter().any(|g| g.completions.len() != 2) {
        return Err(Error::NotPairs);
    }
    let scores = model.scores(&groups, micro_tokens)?;
    Ok(scores.chunks_exact(2).map(|c| (c[0], c[1])).collect())
}

/// The mix of attributes that explains preferences best: weights m that maximise Σ log σ(m·(r_c − r_r))
/// − ½ λ |m|², over the pairs of `data`, of predicted ratings averaged over members.
///
/// Wang et al. 2024 (HelpSteer2, arXiv 2406.08673) search for weights on held-out preferences; logistic
/// regression finds the best ones for the likelihood.
///
/// # Errors
/// When rows are not pairs, a group exceeds `micro_tokens` or the model fails.
pub fn learn_mix(
    model: &RewardModel,
    data: &[Labelled],
    ridge: f64,
    micro_tokens: usize,
) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = data.iter().map(|r| r.group.num_tokens()).collect();
    let width = model.readout().outputs();
    let (mut rows, mut labels) = (Vec::new(), Vec::new());
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let part = &data[range];
        let groups: Vec<PromptGroup> = part.iter().map(|r| r.group.clone()).collect();
        let packed = PackedBatch::pack(&groups)?;
        let batch = DeviceBatch::new(&packed, model.device())?;
        let members = model.outputs(&batch, &packed.last_rows())?;
        let mean = tch::Tensor::stack(&members, 0)
            .to_kind(tch::Kind::Double)
            .mean_dim(&[0i64][..], false, None);
        let flat = Vec::<f64>::try_from(&mean.contiguous().view([-1]))?;
        for (row, two) in part.iter().zip(flat.chunks(2 * width)) {
            let Label::Pair { preference, .. } = row.label else {
                return Err(Error::Row {
                    row: row.group.row,
                    what: "a mix is learned from pairs of chosen and rejected".into(),
                });
            };
            rows.push((0..width).map(|a| two[a] - two[width + a]).collect());
            labels.push(preference);
        }
    }
    logistic::fit_labelled(&rows, &labels, ridge)
}
