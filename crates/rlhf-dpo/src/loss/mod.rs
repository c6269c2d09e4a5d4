//! Losses of preference pairs: free functions of log-probabilities.
//!
//! Notation: Δc = log π(y_c|x) − log π₀(y_c|x), the sum over the chosen completion's trained tokens;
//! Δr likewise for the rejected one; h = Δc − Δr; ℓ(z) = log σ(z).
//!
//! Invariant: a loss sees tensors only, and gives a sum over pairs with the number of pairs, never a
//! mean, so that a step may be split into micro-batches in any way.

pub mod dpo;

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::error::{Result, ensure};

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
    /// Δc and Δr, `[P]` each, of type f32 at least, differentiable in the policy only.
    ///
    /// # Errors
    /// Unless the four are floating-point tensors of one shape `[P]`.
    pub fn log_ratios(&self) -> Result<(Tensor, Tensor)> {
        let all = [
            &self.chosen,
            &self.rejected,
            &self.ref_chosen,
            &self.ref_rejected,
        ];
        ensure(
            all.iter()
                .all(|t| t.dim() == 1 && t.size() == self.chosen.size()),
            "preference loss",
            || {
                format!(
                    "log-probs are {:?}, expected the same [P] four times",
                    all.map(Tensor::size)
                )
            },
        )?;
        ensure(
            all.iter().all(|t| t.is_floating_point()),
            "preference loss",
            || {
                format!(
                    "log-probs are {:?}, expected floating point",
                    all.map(Tensor::kind)
                )
            },
        )?;
        let [c, r, ref_c, ref_r] = all.map(at_least_f32);
        Ok((c - ref_c.detach(), r - ref_r.detach()))
    }
}

/// f16 and bf16 become f32; the graph is kept.
fn at_least_f32(x: &Tensor) -> Tensor {
    if matches!(x.kind(), Kind::Half | Kind::BFloat16) {
        x.to_kind(Kind::Float)
    } else {
        x.shallow_clone()
    }
}

/// What a preference loss gives.
#[derive(Debug)]
pub struct PreferenceOutput {
    /// Sum over pairs; the weight is the number of pairs.
    pub loss: LossSum,
    /// The loss of each pair, `[P]`, with its graph: for users who weight pairs themselves.
    pub losses: Tensor,
    /// Implicit rewards βΔ of the chosen, `[P]`, without a graph.
    pub chosen_rewards: Tensor,
    /// Implicit rewards βΔ of the rejected, `[P]`, without a graph.
    pub rejected_rewards: Tensor,
}

impl PreferenceOutput {
    /// Sums per-pair `losses`; rewards lose their graph.
    fn new(losses: Tensor, chosen_rewards: &Tensor, rejected_rewards: &Tensor) -> Self {
        Self {
            loss: LossSum {
                sum: losses.sum(None),
                weight: losses.numel() as f64,
            },
            losses,
            chosen_rewards: chosen_rewards.detach(),
            rejected_rewards: rejected_rewards.detach(),
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

/// The preference losses by name, each with its own knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum PreferenceLoss {
    /// DPO; with label smoothing, conservative DPO.
    Sigmoid {
        /// Strength of the reference.
        beta: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        label_smoothing: f64,
    },
}

impl PreferenceLoss {
    /// Computes the loss.
    ///
    /// # Errors
    /// When shapes or values do not fit.
    pub fn compute(&self, pairs: &PairLogprobs) -> Result<PreferenceOutput> {
        match *self {
            Self::Sigmoid {
                beta,
                label_smoothing,
            } => dpo::sigmoid(pairs, beta, label_smoothing),
        }
    }

    /// β of the implicit reward.
    #[must_use]
    pub fn beta(&self) -> f64 {
        match *self {
            Self::Sigmoid { beta, .. } => beta,
        }
    }
}
