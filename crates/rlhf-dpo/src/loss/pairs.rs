//! What losses of pairs see and give.
//!
//! Invariant: [`PairValues`] are checked when they are made, so that a loss need not.

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::error::{Result, ensure};

/// One number for the chosen and one for the rejected completion of each of P pairs: `[P]` twice, floating
/// point, f32 at least.
#[derive(Debug)]
pub struct PairValues {
    chosen: Tensor,
    rejected: Tensor,
}

impl PairValues {
    /// Two columns; f16 and bf16 become f32, graphs are kept.
    ///
    /// # Errors
    /// Unless both are floating-point tensors of one shape `[P]`.
    pub fn new(chosen: &Tensor, rejected: &Tensor) -> Result<Self> {
        same_columns("pair values", &[chosen, rejected])?;
        Ok(Self {
            chosen: at_least_f32(chosen),
            rejected: at_least_f32(rejected),
        })
    }

    /// Those of the chosen, `[P]`.
    pub fn chosen(&self) -> &Tensor {
        &self.chosen
    }

    /// Those of the rejected, `[P]`.
    pub fn rejected(&self) -> &Tensor {
        &self.rejected
    }

    /// Chosen less rejected, `[P]`: h where the values are log-ratios.
    pub fn margin(&self) -> Tensor {
        &self.chosen - &self.rejected
    }

    /// Each divided by its completion's length: the mean of a token where the values are sums. A completion
    /// without tokens counts as one.
    ///
    /// # Errors
    /// Unless there are as many lengths as pairs.
    pub fn per_token(&self, lengths: &Self) -> Result<Self> {
        self.fits("per_token", "lengths", &lengths.chosen)?;
        let mean = |sum: &Tensor, n: &Tensor| sum / n.to_kind(sum.kind()).clamp_min(1.0);
        Ok(Self {
            chosen: mean(&self.chosen, &lengths.chosen),
            rejected: mean(&self.rejected, &lengths.rejected),
        })
    }

    /// Applies one function to both columns.
    pub(super) fn map(&self, f: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            chosen: f(&self.chosen),
            rejected: f(&self.rejected),
        }
    }

    /// Checks that `column` is `[P]`.
    pub(super) fn fits(&self, op: &'static str, name: &str, column: &Tensor) -> Result<()> {
        ensure(column.size() == self.chosen.size(), op, || {
            format!(
                "{name} are {:?}, expected {:?}",
                column.size(),
                self.chosen.size()
            )
        })
    }
}

fn same_columns(op: &'static str, columns: &[&Tensor]) -> Result<()> {
    let first = columns[0];
    ensure(
        columns
            .iter()
            .all(|t| t.dim() == 1 && t.size() == first.size()),
        op,
        || {
            let sizes: Vec<_> = columns.iter().map(|t| t.size()).collect();
            format!("columns are {sizes:?}, expected one and the same [P]")
        },
    )?;
    ensure(columns.iter().all(|t| t.is_floating_point()), op, || {
        let kinds: Vec<_> = columns.iter().map(|t| t.kind()).collect();
        format!("columns are {kinds:?}, expected floating point")
    })
}

/// f16 and bf16 become f32; the graph is kept.
pub(super) fn at_least_f32(x: &Tensor) -> Tensor {
    if matches!(x.kind(), Kind::Half | Kind::BFloat16) {
        x.to_kind(Kind::Float)
    } else {
        x.shallow_clone()
    }
}

/// Log-probabilities of P pairs, each summed over its completion's trained tokens: `[P]`.
#[derive(Debug)]
pub struct PairLogprobs {
    /// log π(chosen), with its graph.
    pub chosen: Tensor,
    /// log π(rejected), with its graph.
    pub rejected: Tensor,
    /// log π₀(chosen).
    pub ref_chosen: Tensor,
    /// log π₀(rejected).
    pub ref_rejected: Tensor,
}

impl PairLogprobs {
    /// Those of a policy and of its reference.
    pub fn new(policy: &PairValues, reference: &PairValues) -> Self {
        Self {
            chosen: policy.chosen.shallow_clone(),
            rejected: policy.rejected.shallow_clone(),
            ref_chosen: reference.chosen.shallow_clone(),
            ref_rejected: reference.rejected.shallow_clone(),
        }
    }

    /// Those of a policy without a reference: log π₀ = 0, so that Δ = log π.
    pub fn reference_free(policy: &PairValues) -> Self {
        Self::new(policy, &policy.map(Tensor::zeros_like))
    }

    /// log π of chosen and rejected.
    ///
    /// # Errors
    /// Unless both are floating-point tensors of one shape `[P]`.
    pub fn policy(&self) -> Result<PairValues> {
        PairValues::new(&self.chosen, &self.rejected)
    }

    /// log π₀ of chosen and rejected, without a graph.
    ///
    /// # Errors
    /// Unless both are floating-point tensors of one shape `[P]`.
    pub fn reference(&self) -> Result<PairValues> {
        PairValues::new(&self.ref_chosen.detach(), &self.ref_rejected.detach())
    }

    /// Δc and Δr, `[P]` each, of type f32 at least, differentiable in the policy only.
    ///
    /// # Errors
    /// Unless the four are floating-point tensors of one shape `[P]`.
    pub fn log_ratios(&self) -> Result<PairValues> {
        let columns = [
            &self.chosen,
            &self.rejected,
            &self.ref_chosen,
            &self.ref_rejected,
        ];
        same_columns("log-probs of pairs", &columns)?;
        let (policy, reference) = (self.policy()?, self.reference()?);
        Ok(PairValues {
            chosen: policy.chosen - reference.chosen,
            rejected: policy.rejected - reference.rejected,
        })
    }
}

/// P pairs with all that some loss may ask for.
#[derive(Debug)]
pub struct Pairs {
    /// The log-probs.
    pub logprobs: PairLogprobs,
    /// Trained tokens of each completion; asked for by the losses that average over tokens.
    pub lengths: Option<PairValues>,
    /// Scores of a reward model; asked for by the losses that fit the size of a preference.
    pub scores: Option<PairValues>,
    /// A factor of each pair's loss, `[P]`, taken without its graph (WPO's weights, say). It changes the
    /// sum, not what the sum is divided by.
    pub weights: Option<Tensor>,
    /// BCO's reward shift δ, a running mean of rewards ([`RunningMoments`](super::unpaired::RunningMoments)); 0
    /// otherwise.
    pub delta: f64,
}

impl From<PairLogprobs> for Pairs {
    fn from(logprobs: PairLogprobs) -> Self {
        Self {
            logprobs,
            lengths: None,
            scores: None,
            weights: None,
            delta: 0.0,
        }
    }
}

/// What a preference loss gives.
#[derive(Debug)]
pub struct PreferenceOutput {
    /// Sum over pairs; the weight is the number of pairs.
    pub loss: LossSum,
    /// The loss of each pair, `[P]`, with its graph: for users who weight pairs themselves.
    pub losses: Tensor,
    /// Implicit rewards of the chosen, `[P]`, without a graph.
    pub chosen_rewards: Tensor,
    /// Implicit rewards of the rejected, `[P]`, without a graph.
    pub rejected_rewards: Tensor,
}

impl PreferenceOutput {
    /// Sums per-pair `losses`; the rewards are `scale` times `values`, without a graph.
    pub(super) fn new(losses: Tensor, values: &PairValues, scale: f64) -> Self {
        Self {
            loss: LossSum {
                sum: losses.sum(None),
                weight: losses.numel() as f64,
            },
            losses,
            chosen_rewards: values.chosen.detach() * scale,
            rejected_rewards: values.rejected.detach() * scale,
        }
    }

    /// The same rewards with other losses.
    pub(super) fn with_losses(self, losses: Tensor) -> Self {
        Self {
            loss: LossSum {
                sum: losses.sum(None),
                weight: losses.numel() as f64,
            },
            losses,
            ..self
        }
    }

    /// Reward of the chosen less that of the rejected, `[P]`.
    pub fn margins(&self) -> Tensor {
        &self.chosen_rewards - &self.rejected_rewards
    }

    /// 1 where the chosen has the higher reward, ½ at a tie, else 0; `[P]`. (TRL counts a tie as wrong.)
    pub fn accuracies(&self) -> Tensor {
        (self.margins().sign() + 1.0) * 0.5
    }
}
