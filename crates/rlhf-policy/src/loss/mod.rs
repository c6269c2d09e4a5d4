//! Surrogate losses of a policy.
//!
//! Notation: ρ = π/π_old per token, A the advantage, n the number of trained tokens of a completion.
//!
//! Invariant: a loss gives a sum and a weight, never a mean. Which tokens count how much is an
//! explicit [`Reduction`]; the same step split in any way has the same gradient.

pub mod clipped;
pub mod mismatch;
pub mod ppo;
pub mod select;
pub mod smooth;
mod step;
pub mod supervised;

use rlhf_kernels::{LossSum, Offsets, Ragged};
use tch::{Kind, Tensor};

pub use clipped::Clip;
pub use smooth::{GammaWeight, Gate};
pub use supervised::SftLoss;

use crate::error::Result;
use crate::kl::KlPenalty;

/// How losses of tokens become the loss of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
pub enum Reduction {
    /// The mean over all tokens of the step: DAPO (Yu et al. 2025, arXiv 2503.14476, equation 8).
    /// TRL's `bnpo` is the same with the mean taken within each micro-batch, which makes the gradient
    /// depend on the split; as a [`LossSum`] the two are one.
    Token {},
    /// The mean over completions of the mean over their tokens: GRPO (Shao et al. 2024). Tokens of
    /// long completions weigh less. A completion without trained tokens counts as 0.
    Sequence {},
    /// The sum over tokens divided by completions · `length`, a constant: Dr.GRPO (Liu et al. 2025).
    FixedLength {
        /// The longest completion allowed, in tokens.
        length: u32,
    },
    /// The mean over completions of the sum over their tokens: LUSPO (Liu et al. 2026, arXiv 2602.05261), which
    /// takes GSPO's ratio and so mends its preference for short answers; also REINFORCE of whole completions.
    SequenceSum {},
}

impl Reduction {
    /// Reduces the losses of tokens.
    #[must_use]
    pub fn reduce(self, per_token: &Ragged) -> LossSum {
        let total = |x: &Tensor| x.sum(x.kind());
        let sequences = per_token.offsets().num_segments() as f64;
        match self {
            Self::Token {} => LossSum {
                sum: total(per_token.values()),
                weight: per_token.offsets().num_values() as f64,
            },
            Self::Sequence {} => LossSum {
                sum: total(&per_token.mean()),
                weight: sequences,
            },
            Self::FixedLength { length } => LossSum {
                sum: total(per_token.values()),
                weight: sequences * f64::from(length),
            },
            Self::SequenceSum {} => LossSum {
                sum: total(per_token.values()),
                weight: sequences,
            },
        }
    }
}

/// Of what the ratio π/π_old is taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum RatioLevel {
    /// Of each token: PPO, GRPO.
    Token,
    /// Of each completion, its geometric mean over tokens: GSPO (Zheng et al. 2025, arXiv 2507.18071,
    /// equation 7).
    SequenceMean,
    /// Of each completion: the product over its tokens, the true importance weight (RLOO as bandit).
    SequenceSum,
}

/// The KL penalty inside a loss.
#[derive(Clone, Copy, Debug)]
pub struct KlTerm<'a> {
    /// `[M]` log-probs under the reference; gradients are not followed.
    pub ref_logprobs: &'a Ragged,
    /// Which estimate and how strong; its placement must be in the loss.
    pub penalty: KlPenalty,
    /// `[M]` the divergence itself, with graph, for [`KlEstimator::Exact`](crate::kl::KlEstimator::Exact).
    pub exact: Option<&'a Ragged>,
}

/// What a policy loss sees: per-token quantities of S completions, all with the same offsets.
#[derive(Clone, Copy, Debug)]
pub struct PolicyInputs<'a> {
    /// `[M]` log π, with graph.
    pub logprobs: &'a Ragged,
    /// `[M]` log π_old of the policy that the ratio is against.
    pub old_logprobs: &'a Ragged,
    /// `[M]` advantages.
    pub advantages: &'a Ragged,
    /// `[M]` importance weights of the sampler's mismatch ([`mismatch`]), multiplied onto the
    /// surrogate (not onto the KL term).
    pub weights: Option<&'a Ragged>,
    /// The KL penalty, where it acts in the loss.
    pub kl: Option<KlTerm<'a>>,
    /// `[M]` entropies of the policy, for the statistics and the bonus.
    pub entropy: Option<&'a Ragged>,
    /// What each token's entropy takes from its loss (Williams and Peng 1991); 0 for no bonus. Reduced as the loss is.
    pub entropy_coef: f64,
}

impl<'a> PolicyInputs<'a> {
    /// Inputs without weights, KL term or entropies.
    #[must_use]
    pub fn new(logprobs: &'a Ragged, old_logprobs: &'a Ragged, advantages: &'a Ragged) -> Self {
        Self {
            logprobs,
            old_logprobs,
            advantages,
            entropy_coef: 0.0,
            weights: None,
            kl: None,
            entropy: None,
        }
    }
}

/// Sums over tokens that statistics are made of; they add up over micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct PolicyStats {
    /// Trained tokens.
    pub tokens: f64,
    /// Ratios: tokens, or completions with tokens where the ratio is theirs.
    pub ratios: f64,
    /// Ratios held by the lower bound (A < 0, ρ < 1 − ε_low).
    pub clipped_low: f64,
    /// Ratios held by the upper bound (A > 0, ρ > 1 + ε_high).
    pub clipped_high: f64,
    /// Σ ρ.
    pub ratio_sum: f64,
    /// max ρ.
    pub ratio_max: f64,
    /// Σ ½ (log π − log π_old)² over tokens.
    pub approx_kl_sum: f64,
    /// Σ of the KL term's estimate over tokens, before its coefficient; 0 without one.
    pub kl_sum: f64,
    /// Σ entropy over tokens; 0 where none was given.
    pub entropy_sum: f64,
}

impl PolicyStats {
    /// Adds another micro-batch.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.ratios += other.ratios;
        self.clipped_low += other.clipped_low;
        self.clipped_high += other.clipped_high;
        self.ratio_sum += other.ratio_sum;
        self.ratio_max = self.ratio_max.max(other.ratio_max);
        self.approx_kl_sum += other.approx_kl_sum;
        self.kl_sum += other.kl_sum;
        self.entropy_sum += other.entropy_sum;
    }

    /// Share of ratios held by the lower bound.
    #[must_use]
    pub fn clip_fraction_low(&self) -> f64 {
        self.clipped_low / self.ratios.max(1.0)
    }

    /// Share of ratios held by the upper bound.
    #[must_use]
    pub fn clip_fraction_high(&self) -> f64 {
        self.clipped_high / self.ratios.max(1.0)
    }

    /// Mean of ρ.
    #[must_use]
    pub fn ratio_mean(&self) -> f64 {
        self.ratio_sum / self.ratios.max(1.0)
    }

    /// Mean over tokens of ½ (log π − log π_old)²: how far the step has gone, in nats a token.
    #[must_use]
    pub fn approx_kl(&self) -> f64 {
        self.approx_kl_sum / self.tokens.max(1.0)
    }

    /// Mean over tokens of the KL term's estimate.
    #[must_use]
    pub fn kl(&self) -> f64 {
        self.kl_sum / self.tokens.max(1.0)
    }

    /// Mean entropy in nats a token.
    #[must_use]
    pub fn entropy(&self) -> f64 {
        self.entropy_sum / self.tokens.max(1.0)
    }
}

/// What a policy loss finds.
#[derive(Debug)]
pub struct PolicyOutput {
    /// The loss.
    pub loss: LossSum,
    /// Facts for the log.
    pub stats: PolicyStats,
}

/// The surrogates that a recipe can name.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum PolicyLoss {
    /// [`clipped::surrogate`]: PPO, GRPO, DAPO, Dr.GRPO, GSPO and LUSPO by its settings.
    Clipped {
        /// The bounds of the ratio.
        clip: Clip,
        /// Of what the ratio is taken.
        ratio: RatioLevel,
        /// How tokens' losses are put together.
        reduction: Reduction,
    },
    /// [`smooth::cispo`].
    Cispo {
        /// The largest weight: about 5.
        max_ratio: f64,
        /// The smallest weight.
        #[cfg_attr(feature = "train", serde(default))]
        min_ratio: f64,
        /// Of what the ratio is taken.
        ratio: RatioLevel,
        /// How tokens' losses are put together.
        reduction: Reduction,
    },
    /// [`smooth::sapo`].
    Sapo {
        /// How sharply the gate falls.
        temperature: Gate,
        /// Of what the ratio is taken.
        ratio: RatioLevel,
        /// How tokens' losses are put together.
        reduction: Reduction,
    },
    /// [`smooth::vespo`].
    Vespo {
        /// The shape of the weight.
        #[cfg_attr(feature = "train", serde(default))]
        weight: GammaWeight,
        /// How tokens' losses are put together.
        reduction: Reduction,
    },
    /// [`smooth::reinforce`].
    Reinforce {
        /// How tokens' losses are put together.
        reduction: Reduction,
    },
    /// [`smooth::gmpo`].
    Gmpo {
        /// The lower bound of log ρ, negated.
        epsilon_low: f64,
        /// The upper bound of log ρ.
        epsilon_high: f64,
    },
}

impl PolicyLoss {
    /// Checks the settings, on a token made up for it.
    ///
    /// # Errors
    /// As [`PolicyLoss::compute`] where settings are at fault.
    pub fn check(&self) -> Result<()> {
        let one = Ragged::new(Tensor::from_slice(&[-1.0]), Offsets::from_lengths(&[1])?)?;
        self.compute(&PolicyInputs::new(&one, &one, &one)).map(drop)
    }

    /// Computes the loss.
    ///
    /// # Shapes
    /// All of `inputs` `[M]` with the same offsets.
    ///
    /// # Errors
    /// When offsets differ or a setting is outside its range.
    pub fn compute(&self, inputs: &PolicyInputs<'_>) -> Result<PolicyOutput> {
        match *self {
            Self::Clipped {
                clip,
                ratio,
                reduction,
            } => clipped::surrogate(inputs, clip, ratio, reduction),
            Self::Cispo {
                max_ratio,
                min_ratio,
                ratio,
                reduction,
            } => smooth::cispo(inputs, (min_ratio, max_ratio), ratio, reduction),
            Self::Sapo {
                temperature,
                ratio,
                reduction,
            } => smooth::sapo(inputs, temperature, ratio, reduction),
            Self::Vespo { weight, reduction } => smooth::vespo(inputs, weight, reduction),
            Self::Reinforce { reduction } => smooth::reinforce(inputs, reduction),
            Self::Gmpo {
                epsilon_low,
                epsilon_high,
            } => smooth::gmpo(inputs, epsilon_low, epsilon_high),
        }
    }
}

/// Copies scalars to the host at once.
fn to_host(scalars: &[Tensor]) -> Result<Vec<f64>> {
    let scalars: Vec<Tensor> = scalars
        .iter()
        .map(|t| t.detach().to_kind(Kind::Double))
        .collect();
    Ok(Vec::<f64>::try_from(&Tensor::stack(&scalars, 0))?)
}

#[cfg(all(test, feature = "train"))]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_names_a_loss() {
        let text = r#"{"kind": "clipped", "clip": {"epsilon_low": 0.2, "epsilon_high": 0.28}, "ratio": "token", "reduction": {"kind": "fixed_length", "length": 64}}"#;
        let expected = PolicyLoss::Clipped {
            clip: Clip {
                epsilon_low: 0.2,
                epsilon_high: 0.28,
                dual: None,
            },
            ratio: RatioLevel::Token,
            reduction: Reduction::FixedLength { length: 64 },
        };
        assert_eq!(serde_json::from_str::<PolicyLoss>(text).unwrap(), expected);
        let wrong = text.replace("\"length\"", "\"lenght\"");
        assert!(
            serde_json::from_str::<PolicyLoss>(&wrong)
                .unwrap_err()
                .to_string()
                .contains("lenght")
        );
    }
}
