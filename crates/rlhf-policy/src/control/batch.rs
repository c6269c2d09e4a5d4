//! Steps of many episodes end to end, their advantages, and the losses of some of them.

use rlhf_kernels::{LossSum, Ragged, entropy, token_logprobs};
use tch::{Kind, Tensor};

use super::mlp::Mlp;
use crate::advantage::{Generalized, Whitening, generalized};
use crate::error::{Result, ensure};
use crate::loss::ppo::{ValueInputs, ValueOutput, value_loss};
use crate::loss::select::entropy_bonus;
use crate::loss::{PolicyInputs, PolicyLoss, PolicyOutput, Reduction};

/// Steps of S pieces of episodes, M in all: an episode is a completion, a step is a token.
#[derive(Debug)]
pub struct Batch {
    /// `[M, D]` what was seen before each action.
    pub observations: Tensor,
    /// i64 `[M]` what was done.
    pub actions: Tensor,
    /// `[M]` log π of it when it was drawn.
    pub logprobs: Ragged,
    /// `[M]` r.
    pub rewards: Ragged,
    /// `[S, D]` what was seen after each piece's last step.
    pub after: Tensor,
    /// Which of the S pieces are open: cut by a time limit or by the end of the batch, so that V of what was
    /// seen after them counts. The others ended: nothing more is to be had.
    pub open: Vec<bool>,
    /// At which of the M steps the environment ended the episode, also where the pieces hide it.
    pub terminated: Vec<bool>,
}

impl Batch {
    /// M.
    #[must_use]
    pub fn steps(&self) -> usize {
        self.terminated.len()
    }
}

/// [`generalized`] over pieces of episodes: an open piece's last reward is r + γV(after), which is to say that
/// its last δ is r + γV(after) − V, as in the middle of an episode.
///
/// # Shapes
/// `values` `[M]` with the batch's offsets, `after` `[S]`: V of `batch.after`.
///
/// # Errors
/// As [`generalized`]; also when there are not S values after.
pub fn advantages(
    batch: &Batch,
    values: &Ragged,
    after: &Tensor,
    (gamma, gae_lambda): (f64, f64),
    whitening: Whitening,
) -> Result<Generalized> {
    let offsets = batch.rewards.offsets();
    let pieces = offsets.num_segments();
    let fits = after.size() == [pieces] && batch.open.len() as i64 == pieces;
    ensure(fits, "advantages of pieces", || {
        format!("values after are {:?}, expected [{pieces}]", after.size())
    })?;
    let later = Vec::<f64>::try_from(&after.detach().to_kind(Kind::Double))?;
    let (mut at, mut more) = (Vec::new(), Vec::new());
    for (i, w) in offsets.host().windows(2).enumerate() {
        if batch.open[i] && w[0] < w[1] {
            at.push(w[1] - 1);
            more.push(gamma * later[i]);
        }
    }
    let rewards = batch.rewards.values().to_kind(Kind::Double);
    let rewards = rewards.index_add(0, &Tensor::from_slice(&at), &Tensor::from_slice(&more));
    let rewards = batch.rewards.with_values(rewards)?;
    let values = values.with_values(values.values().detach().to_kind(Kind::Double))?;
    generalized(&rewards, &values, gamma, gae_lambda, whitening)
}

/// What an optimiser step learns from: some steps with what is known of them, `[m]` each with the same offsets.
#[derive(Debug)]
pub struct Part {
    /// `[m, D]`.
    pub observations: Tensor,
    /// i64 `[m]`.
    pub actions: Tensor,
    /// log π_old.
    pub old_logprobs: Ragged,
    /// V_old.
    pub old_values: Ragged,
    /// A.
    pub advantages: Ragged,
    /// R.
    pub returns: Ragged,
    /// Weights of steps in the policy's loss, where they differ.
    pub weights: Option<Ragged>,
}

impl Part {
    /// The whole batch.
    ///
    /// # Errors
    /// When `values` have other offsets.
    pub fn whole(batch: &Batch, values: &Ragged, known: &Generalized) -> Result<Self> {
        let kind = batch.observations.kind();
        let narrow = |x: &Ragged| x.with_values(x.values().detach().to_kind(kind));
        Ok(Self {
            observations: batch.observations.shallow_clone(),
            actions: batch.actions.shallow_clone(),
            old_logprobs: narrow(&batch.logprobs)?,
            old_values: narrow(values)?,
            advantages: narrow(&known.advantages)?,
            returns: narrow(&known.returns)?,
            weights: None,
        })
    }

    /// Some of its steps, as one piece: once the advantages are known, steps stand for themselves.
    ///
    /// # Errors
    /// When a row lies outside.
    pub fn pick(&self, rows: &[i64]) -> Result<Self> {
        let index = Tensor::from_slice(rows);
        let offsets = rlhf_kernels::Offsets::from_lengths(&[rows.len() as i64])?;
        let pick = |x: &Ragged| -> Result<Ragged> {
            let values = x.values().f_index_select(0, &index)?;
            Ok(Ragged::new(values, offsets.clone())?)
        };
        Ok(Self {
            observations: self.observations.f_index_select(0, &index)?,
            actions: self.actions.f_index_select(0, &index)?,
            old_logprobs: pick(&self.old_logprobs)?,
            old_values: pick(&self.old_values)?,
            advantages: pick(&self.advantages)?,
            returns: pick(&self.returns)?,
            weights: self.weights.as_ref().map(pick).transpose()?,
        })
    }
}

/// The losses of a part: the policy's, less `entropy_coef` times the mean entropy, and the value function's.
///
/// # Errors
/// As the losses.
pub fn losses(
    part: &Part,
    policy: &Mlp,
    value: Option<&Mlp>,
    loss: &PolicyLoss,
    value_clip: Option<f64>,
    entropy_coef: f64,
) -> Result<(PolicyOutput, Option<ValueOutput>)> {
    let same = |x: Tensor| part.old_logprobs.with_values(x);
    let logits = policy.forward(&part.observations)?;
    let logprobs = same(token_logprobs(&logits, &part.actions)?)?;
    let spread = same(entropy(&logits)?)?;
    let mut inputs = PolicyInputs::new(&logprobs, &part.old_logprobs, &part.advantages);
    inputs.entropy = Some(&spread);
    inputs.weights = part.weights.as_ref();
    let mut out = loss.compute(&inputs)?;
    if entropy_coef != 0.0 {
        let bonus = entropy_bonus(&spread, entropy_coef, Reduction::Token {})?;
        out.loss = LossSum {
            sum: out.loss.sum + bonus.sum * (out.loss.weight / bonus.weight),
            weight: out.loss.weight,
        };
    }
    let Some(value) = value else {
        return Ok((out, None));
    };
    let inputs = ValueInputs {
        values: &same(value.scalars(&part.observations)?)?,
        old_values: &part.old_values,
        returns: &part.returns,
    };
    Ok((out, Some(value_loss(&inputs, value_clip)?)))
}
