//! Losses of demonstrations.
//!
//! Invariant: a row of weight w counts as w rows would: it is in the sum and in the weight.

use rlhf_kernels::{LossSum, Ragged};
use tch::{Kind, Tensor};

use crate::error::{Result, at_least_f32, ensure};

/// What is minimised on demonstrations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
pub enum SftLoss {
    /// −log p of each token: cross-entropy.
    Nll {},
    /// Dynamic fine-tuning (Wu et al. 2025, arXiv 2508.05629, equation 9): −sg(p) log p of each token.
    ///
    /// Cross-entropy is a policy gradient whose reward is 1/p on the demonstrated token and 0 elsewhere; the
    /// factor p makes that reward 1. Its gradient is −∇p, so tokens that the model finds unlikely pull
    /// little: good where it nearly knows the task, bad where it must learn something new.
    Dft {},
}

impl Default for SftLoss {
    fn default() -> Self {
        Self::Nll {}
    }
}

impl SftLoss {
    /// The loss of `logprobs`, log p of each demonstrated token.
    ///
    /// # Shapes
    /// `logprobs` `[M]` in S segments; `weights` `[S]`, one for each row, all 1 where absent. The result is
    /// Σ_s w_s Σ_t l_st over Σ_s w_s n_s.
    ///
    /// # Errors
    /// When there are not S weights.
    pub fn compute(self, logprobs: &Ragged, weights: Option<&Tensor>) -> Result<LossSum> {
        let log_p = at_least_f32(logprobs);
        let kind = log_p.kind();
        let losses = match self {
            Self::Nll {} => -log_p,
            Self::Dft {} => -(log_p.detach().exp() * log_p),
        };
        let Some(weights) = weights else {
            return Ok(LossSum {
                sum: losses.sum(kind),
                weight: logprobs.offsets().num_values() as f64,
            });
        };
        let segments = logprobs.offsets().num_segments();
        ensure(weights.size() == [segments], "sft", || {
            format!("weights {:?} for {segments} rows", weights.size())
        })?;
        let per_token = logprobs.broadcast(&weights.to_kind(kind));
        Ok(LossSum {
            sum: (losses * &per_token).sum(kind),
            weight: per_token.sum(Kind::Double).double_value(&[]),
        })
    }
}
