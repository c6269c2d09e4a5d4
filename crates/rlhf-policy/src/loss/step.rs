//! What the surrogates have in common: checks and ratios before, the KL term, weights and statistics after.

use rlhf_kernels::Ragged;
use tch::{Kind, Tensor};

use crate::error::{Error, Result, at_least_f32, same_offsets};
use crate::kl::{KlEstimator, KlPlacement};
use crate::loss::{PolicyInputs, PolicyOutput, PolicyStats, RatioLevel, Reduction, to_host};

/// Checked inputs with the ratio ρ of a level; all `[M]`.
pub(super) struct Step<'a> {
    op: &'static str,
    inputs: &'a PolicyInputs<'a>,
    level: RatioLevel,
    /// log π, f32 at least, with graph.
    pub(super) logprobs: Tensor,
    /// log π − log π_old, with graph.
    pub(super) log_ratio: Tensor,
    /// ρ, a completion's repeated over its tokens, with graph.
    pub(super) ratio: Tensor,
    /// A.
    pub(super) advantages: Tensor,
}

impl<'a> Step<'a> {
    pub(super) fn new(
        op: &'static str,
        inputs: &'a PolicyInputs<'a>,
        level: RatioLevel,
    ) -> Result<Self> {
        let optional = [
            ("weights", inputs.weights),
            ("entropies", inputs.entropy),
            ("reference log-probs", inputs.kl.map(|k| k.ref_logprobs)),
            ("exact KL", inputs.kl.and_then(|k| k.exact)),
        ];
        let mut others = vec![
            ("old log-probs", inputs.old_logprobs),
            ("advantages", inputs.advantages),
        ];
        others.extend(
            optional
                .iter()
                .filter_map(|(name, x)| x.map(|x| (*name, x))),
        );
        same_offsets(op, inputs.logprobs, &others)?;
        let logprobs = at_least_f32(inputs.logprobs);
        let kind = logprobs.kind();
        let log_ratio = &logprobs - inputs.old_logprobs.values().detach().to_kind(kind);
        let by_token = inputs.logprobs.with_values(log_ratio.shallow_clone())?;
        let ratio = match level {
            RatioLevel::Token => log_ratio.exp(),
            RatioLevel::SequenceMean => by_token.broadcast(&by_token.mean().exp()),
            RatioLevel::SequenceSum => by_token.broadcast(&by_token.sum().exp()),
        };
        let advantages = inputs.advantages.values().detach().to_kind(kind);
        Ok(Self {
            op,
            inputs,
            level,
            logprobs,
            log_ratio,
            ratio,
            advantages,
        })
    }

    /// Values of tokens with the inputs' offsets.
    pub(super) fn ragged(&self, values: &Tensor) -> Result<Ragged> {
        Ok(self.inputs.logprobs.with_values(values.shallow_clone())?)
    }

    /// Multiplies `losses` by the weights, adds the KL term and reduces. Ratios below the first of `bounds`
    /// (where A < 0) and above the second (where A > 0) are counted as clipped.
    pub(super) fn finish(
        &self,
        weights: Option<&Ragged>,
        losses: &Tensor,
        reduction: Reduction,
        bounds: (f64, f64),
    ) -> Result<PolicyOutput> {
        let weighted = match weights {
            Some(w) => losses * w.values().detach().to_kind(losses.kind()),
            None => losses.shallow_clone(),
        };
        let (losses, kl) = if let Some(term) = self.inputs.kl {
            let estimate = match term.exact {
                Some(exact) if term.penalty.estimator == KlEstimator::Exact => exact.clone(),
                _ => term
                    .penalty
                    .estimator
                    .estimate(self.inputs.logprobs, term.ref_logprobs)?,
            };
            let values = match term.penalty.placement {
                KlPlacement::InLoss => estimate.values().shallow_clone(),
                KlPlacement::InLossWeighted => estimate.values() * &self.ratio,
                KlPlacement::InReward => {
                    let what = "the KL term's placement is the reward, expected the loss".into();
                    return Err(Error::Argument { op: self.op, what });
                }
            };
            (
                weighted + values * term.penalty.coef,
                Some(estimate.values().detach()),
            )
        } else {
            (weighted, None)
        };
        let losses = match self.inputs.entropy {
            Some(entropy) if self.inputs.entropy_coef != 0.0 => {
                losses - at_least_f32(entropy) * self.inputs.entropy_coef
            }
            _ => losses,
        };
        Ok(PolicyOutput {
            loss: reduction.reduce(&self.ragged(&losses)?),
            stats: self.statistics(bounds, kl.as_ref())?,
        })
    }

    fn statistics(&self, (low, high): (f64, f64), kl: Option<&Tensor>) -> Result<PolicyStats> {
        let offsets = self.inputs.logprobs.offsets();
        let tokens = offsets.num_values() as f64;
        if tokens == 0.0 {
            return Ok(PolicyStats::default());
        }
        // A completion's ratio is counted once: at its first token.
        let (ratio, advantages, ratios) = match self.level {
            RatioLevel::Token => (self.ratio.detach(), self.advantages.shallow_clone(), tokens),
            RatioLevel::SequenceMean | RatioLevel::SequenceSum => {
                let firsts: Vec<i64> = offsets
                    .host()
                    .windows(2)
                    .filter(|w| w[0] < w[1])
                    .map(|w| w[0])
                    .collect();
                let index = Tensor::from_slice(&firsts).to_device(self.ratio.device());
                (
                    self.ratio.detach().index_select(0, &index),
                    self.advantages.index_select(0, &index),
                    firsts.len() as f64,
                )
            }
        };
        let count = |mask: Tensor| mask.sum(Kind::Double);
        let total = |x: &Tensor| x.detach().sum(Kind::Double);
        let host = to_host(
            &[
                count(ratio.lt(low).logical_and(&advantages.lt(0.0))),
                count(ratio.gt(high).logical_and(&advantages.gt(0.0))),
                total(&ratio),
                ratio.max(),
                total(&self.log_ratio.detach().square()) * 0.5,
                kl.map_or_else(|| Tensor::from(0.0), total),
                self.inputs
                    .entropy
                    .map_or_else(|| Tensor::from(0.0), |e| total(e.values())),
            ]
            .map(|t| t.to_device(ratio.device())),
        )?;
        Ok(PolicyStats {
            tokens,
            ratios,
            clipped_low: host[0],
            clipped_high: host[1],
            ratio_sum: host[2],
            ratio_max: host[3],
            approx_kl_sum: host[4],
            kl_sum: host[5],
            entropy_sum: host[6],
        })
    }
}
