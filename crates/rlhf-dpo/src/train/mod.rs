//! Direct alignment on fixed data: pairs ([`train`]), thumbs ([`thumbs::train`]) and rankings
//! ([`rankings::train`]), by one loop.
//!
//! Invariant: which rows a step takes is a function of the seed and the step, and what a loss compares rewards
//! with (KTO's z, BCO's δ) is taken over whole steps. So a step may be split into micro-batches in any way,
//! and a resumed training is the unbroken one.

mod measure;
mod pairs;
pub mod rankings;
mod samples;
pub mod thumbs;

use rlhf_data::group::{Finish, PromptGroup};
use rlhf_data::order::endless;
use rlhf_data::pack::{PackedBatch, batches_by_tokens};
use rlhf_kernels::{LossSum, Ragged};
use rlhf_model::{DeviceBatch, Transformer, target_logprobs};
use rlhf_train::{Flow, Restored, Session, Stepper};
use tch::{Kind, Tensor};

pub use measure::auc;
pub(crate) use measure::prefers;
pub use pairs::{
    LossEval, PairData, PairEval, PairSums, evaluate, evaluate_loss, pair_sums, reference_sums,
    train,
};

pub use samples::Samples;

use crate::error::Result;
use crate::loss::PreferenceMix;
use crate::loss::unpaired::RunningMoments;

/// Settings of a training by a loss `L`.
#[derive(Clone, Debug)]
pub struct TrainConfig<L> {
    /// The loss.
    pub loss: L,
    /// Seed of the data order.
    pub seed: u64,
    /// Optimiser steps.
    pub steps: u64,
    /// Rows a step.
    pub batch_size: usize,
    /// Packed tokens a micro-batch.
    pub micro_tokens: usize,
}

/// Settings of [`train`].
pub type DpoConfig = TrainConfig<PreferenceMix>;

impl<L> TrainConfig<L> {
    /// The rows of step `step` among `rows`.
    fn picks(&self, rows: usize, step: u64) -> Vec<usize> {
        let first = step * self.batch_size as u64;
        (0..self.batch_size as u64)
            .map(|i| endless(self.seed, rows, first + i))
            .collect()
    }

    /// The rows that are met among `rows`, where those are not all.
    fn met(&self, rows: usize) -> Option<Vec<usize>> {
        let positions = self.steps.saturating_mul(self.batch_size as u64);
        (positions < rows as u64).then(|| {
            (0..positions)
                .map(|i| endless(self.seed, rows, i))
                .collect()
        })
    }
}

/// Held-out data, to be looked at while training goes on.
#[derive(Clone, Copy, Debug)]
pub struct HeldOut<'a, D> {
    /// The rows with what is known of them.
    pub data: D,
    /// After every so many steps, and after the last one.
    pub every: u64,
    /// Ends the training when the held-out loss was no lower than the lowest so far for so many looks.
    pub patience: Option<u64>,
    /// Prompts that are answered at every look.
    pub samples: Option<Samples<'a>>,
}

impl<'a, D: Copy> HeldOut<'a, D> {
    fn try_map<T>(&self, f: impl FnOnce(D) -> Result<T>) -> Result<HeldOut<'a, T>> {
        Ok(HeldOut {
            data: f(self.data)?,
            every: self.every,
            patience: self.patience,
            samples: self.samples,
        })
    }
}

/// Sums of the log-probs of every completion of `groups`, in order, without gradients.
///
/// # Errors
/// When a group exceeds `micro_tokens` or the model fails.
pub fn completion_sums(
    model: &Transformer,
    groups: &[PromptGroup],
    micro_tokens: usize,
) -> Result<Vec<f64>> {
    let _guard = tch::no_grad_guard();
    let lengths: Vec<usize> = groups.iter().map(PromptGroup::num_tokens).collect();
    let mut sums = Vec::new();
    for range in batches_by_tokens(&lengths, micro_tokens)? {
        let batch = DeviceBatch::new(&PackedBatch::pack(&groups[range])?, model.device())?;
        let own = target_logprobs(model, &batch, 1.0, false)?.logprobs.sum();
        sums.extend(host(&own)?);
    }
    Ok(sums)
}

/// The sums under the reference `model` of the completions that a training of `cfg` meets, in the order of
/// `data`; those that it never meets are NaN. Computed once: the reference never changes.
///
/// # Errors
/// When a group exceeds `micro_tokens` or the model fails.
pub fn met_sums<L>(
    model: &Transformer,
    data: &[PromptGroup],
    cfg: &TrainConfig<L>,
) -> Result<Vec<f64>> {
    let Some(rows) = cfg.met(data.len()) else {
        return completion_sums(model, data, cfg.micro_tokens);
    };
    let met: Vec<PromptGroup> = rows.iter().map(|&i| data[i].clone()).collect();
    let mut found = completion_sums(model, &met, cfg.micro_tokens)?.into_iter();
    let starts = starts(data);
    let mut sums = vec![f64::NAN; starts[data.len()]];
    for row in rows {
        for slot in &mut sums[starts[row]..starts[row + 1]] {
            *slot = found.next().unwrap_or(f64::NAN);
        }
    }
    Ok(sums)
}

/// Where the completions of each group begin among those of all, and their number at the end.
fn starts(data: &[PromptGroup]) -> Vec<usize> {
    let mut at = 0;
    let ends = data.iter().map(|g| {
        at += g.completions.len();
        at
    });
    std::iter::once(0).chain(ends).collect()
}

pub(crate) fn host(t: &Tensor) -> Result<Vec<f64>> {
    Ok(Vec::<f64>::try_from(&t.detach().to_kind(Kind::Double))?)
}

/// What trainings differ in.
trait Task {
    /// What some rows of the data are, one completion or several each.
    fn groups(&self) -> &[PromptGroup];

    /// What rewards are compared with in a step of the rows `picks`: the mean of the rewards so far, where
    /// nothing else is said.
    fn baseline(&self, _model: &Transformer, _at: At<'_>, rewards: f64) -> Result<f64> {
        Ok(rewards)
    }

    /// The loss of the rows `picks`, whose log-probs are `sums`, with their graph, in `lengths` tokens each.
    fn loss(&self, picks: &[usize], own: &Sums, baseline: f64, seen: &mut Seen) -> Result<LossSum>;

    /// What is to be said of these rows as held-out ones; the first number is the loss. `rewards` is the mean of
    /// training's rewards.
    fn look(
        &self,
        model: &Transformer,
        micro_tokens: usize,
        rewards: f64,
    ) -> Result<Vec<(&'static str, f64)>>;
}

/// A step and its rows.
#[derive(Clone, Copy)]
struct At<'a> {
    step: u64,
    picks: &'a [usize],
    micro_tokens: usize,
}

/// Log-probs of the completions of a micro-batch.
pub(crate) struct Sums {
    /// `[S]`, with their graph.
    pub(crate) logprobs: Tensor,
    /// `[S]` trained tokens, in the same type.
    pub(crate) lengths: Tensor,
}

impl Sums {
    pub(crate) fn of(logprobs: &Ragged) -> Self {
        let sums = logprobs.sum();
        let lengths = logprobs.offsets().lengths(sums.device());
        Self {
            lengths: lengths.to_kind(sums.kind()),
            logprobs: sums,
        }
    }

    /// Numbers as a column beside these.
    pub(crate) fn column(&self, values: impl IntoIterator<Item = f64>) -> Tensor {
        let values: Vec<f64> = values.into_iter().collect();
        Tensor::from_slice(&values)
            .to_kind(self.logprobs.kind())
            .to_device(self.logprobs.device())
    }
}

/// What a step's rows show.
#[derive(Default)]
pub(crate) struct Seen {
    /// All rewards.
    rewards: Vec<f64>,
    /// By name: the sum, and of how many.
    sums: Vec<(&'static str, f64, f64)>,
}

impl Seen {
    pub(crate) fn add(&mut self, name: &'static str, value: f64) {
        match self.sums.iter_mut().find(|s| s.0 == name) {
            Some(s) => {
                s.1 += value;
                s.2 += 1.0;
            }
            None => self.sums.push((name, value, 1.0)),
        }
    }

    /// The means.
    pub(crate) fn means(&self) -> impl Iterator<Item = (&'static str, f64)> + '_ {
        self.sums.iter().map(|(name, sum, n)| (*name, sum / n))
    }
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

/// Trains `model`, whose parameters `stepper` holds. What is found on held-out rows is logged as `test_…`.
fn run<T: Task, L>(
    model: &Transformer,
    task: &T,
    cfg: &TrainConfig<L>,
    held_out: Option<&HeldOut<'_, T>>,
    stepper: &mut Stepper,
    session: &mut Session,
) -> Result<Flow> {
    let restored = session.resume(&mut [("model", stepper)])?;
    let (start, mut progress) = restored
        .map_or((0, Progress::default()), |r: Restored<Progress>| {
            (r.step, r.extra)
        });
    for step in start..cfg.steps {
        if held_out.is_some_and(|h| h.patience.is_some_and(|most| progress.waited >= most)) {
            break;
        }
        let picks = cfg.picks(task.groups().len(), step);
        let lengths: Vec<usize> = picks
            .iter()
            .map(|&i| task.groups()[i].num_tokens())
            .collect();
        let at = At {
            step,
            picks: &picks,
            micro_tokens: cfg.micro_tokens,
        };
        let baseline = task.baseline(model, at, progress.rewards.mean())?;
        let mut seen = Seen::default();
        for range in batches_by_tokens(&lengths, cfg.micro_tokens)? {
            let picks = &picks[range];
            let groups: Vec<PromptGroup> =
                picks.iter().map(|&i| task.groups()[i].clone()).collect();
            let batch = DeviceBatch::new(&PackedBatch::pack(&groups)?, model.device())?;
            let own = Sums::of(&target_logprobs(model, &batch, 1.0, false)?.logprobs);
            let loss = task.loss(picks, &own, baseline, &mut seen)?;
            for completion in groups.iter().flat_map(|g| &g.completions) {
                let cut = completion.finish == Finish::Cut;
                seen.add("truncated", f64::from(u8::from(cut)));
            }
            stepper.note_rows(groups.iter().map(|g| g.row));
            stepper.accumulate(loss)?;
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
        metrics.extend(seen.means());
        let due = |h: &&HeldOut<'_, T>| {
            (step + 1).is_multiple_of(h.every.max(1)) || step + 1 == cfg.steps
        };
        if let Some(h) = held_out.filter(due) {
            let found = h
                .data
                .look(model, cfg.micro_tokens, progress.rewards.mean())?;
            if let Some(samples) = &h.samples {
                samples.write(model, step + 1)?;
            }
            let loss = found.first().map_or(f64::NAN, |f| f.1);
            metrics.extend(found);
            if progress.best.is_none_or(|best| loss < best) {
                (progress.best, progress.waited) = (Some(loss), 0);
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
