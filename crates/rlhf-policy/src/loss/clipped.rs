//! The clipped surrogate of PPO and its descendants.

use crate::error::{Result, ensure};
use crate::loss::step::Step;
use crate::loss::{PolicyInputs, PolicyOutput, RatioLevel, Reduction};

/// Bounds of the ratio.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Clip {
    /// ε_low: the ratio is held at 1 − ε_low where the advantage is negative.
    pub epsilon_low: f64,
    /// ε_high: the ratio is held at 1 + ε_high where the advantage is positive. Above ε_low it is
    /// DAPO's clip-higher.
    pub epsilon_high: f64,
    /// Dual clip (Ye et al. 2020, arXiv 1912.09729, equation 5; TRL's `delta`): where the advantage
    /// is negative the ratio counts as at most this, which is above 1 + ε_high.
    #[cfg_attr(
        feature = "train",
        serde(default, skip_serializing_if = "Option::is_none")
    )]
    pub dual: Option<f64>,
}

impl Clip {
    /// The same ε on both sides and no dual clip.
    #[must_use]
    pub fn symmetric(epsilon: f64) -> Self {
        Self {
            epsilon_low: epsilon,
            epsilon_high: epsilon,
            dual: None,
        }
    }

    fn check(&self) -> Result<()> {
        let op = "clip";
        ensure((0.0..=1.0).contains(&self.epsilon_low), op, || {
            format!("epsilon_low is {}, expected 0 to 1", self.epsilon_low)
        })?;
        ensure(
            self.epsilon_high >= 0.0 && self.epsilon_high.is_finite(),
            op,
            || format!("epsilon_high is {}, expected 0 or more", self.epsilon_high),
        )?;
        let high = 1.0 + self.epsilon_high;
        ensure(
            self.dual.is_none_or(|d| d > high && d.is_finite()),
            op,
            || {
                format!(
                    "dual is {:?}, expected above 1 + epsilon_high = {high}",
                    self.dual
                )
            },
        )
    }
}

/// Per token: L = −w · min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A) + β·k, then reduced.
///
/// Schulman et al. 2017 (arXiv 1707.06347), equation 7; with [`Reduction::Sequence`] and a group's
/// advantages it is GRPO (Shao et al. 2024, arXiv 2402.03300, equation 3), with
/// [`Reduction::Token`] and ε_high > ε_low DAPO, with [`Reduction::FixedLength`] Dr.GRPO, with
/// [`RatioLevel::SequenceMean`] GSPO. With `dual` = c, and where A < 0: −max(min(…), cA).
/// w are the optional weights against the sampler's mismatch, k the optional KL estimate.
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.logprobs` only.
///
/// # Errors
/// When offsets differ, a bound is outside its range, or the KL term belongs in the reward.
///
/// # Deviations
/// None from the papers. Where ρ = 1 exactly (`old_logprobs` are the same numbers) the gradient is
/// that of −A log π, as it should be.
pub fn surrogate(
    inputs: &PolicyInputs<'_>,
    clip: Clip,
    level: RatioLevel,
    reduction: Reduction,
) -> Result<PolicyOutput> {
    let op = "clipped surrogate";
    clip.check()?;
    let step = Step::new(op, inputs, level)?;
    let (ratio, advantages) = (&step.ratio, &step.advantages);
    let bounded = match clip.dual {
        // For A > 0 the upper bound of the clip is nearer, so this acts on A < 0 alone.
        Some(most) => ratio.clamp_max(most),
        None => ratio.shallow_clone(),
    };
    let held = ratio.clamp(1.0 - clip.epsilon_low, 1.0 + clip.epsilon_high);
    let losses = -(bounded * advantages).minimum(&(held * advantages));
    let bounds = (1.0 - clip.epsilon_low, 1.0 + clip.epsilon_high);
    step.finish(inputs.weights, &losses, reduction, bounds)
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::{Offsets, Ragged};
    use tch::Tensor;

    use super::*;
    use crate::kl::{KlEstimator, KlPenalty, KlPlacement};
    use crate::loss::KlTerm;

    fn ragged(values: &[f64], lengths: &[i64]) -> Ragged {
        Ragged::new(
            Tensor::from_slice(values),
            Offsets::from_lengths(lengths).unwrap(),
        )
        .unwrap()
    }

    /// Two completions, of two tokens and one; ratios 1.5, .5, 2; advantages 1, 1, -1.
    fn compute(clip: Clip, reduction: Reduction) -> PolicyOutput {
        let lengths = [2, 1];
        let new = ragged(&[1.5f64.ln(), 0.5f64.ln(), 2f64.ln()], &lengths);
        let old = ragged(&[0.0; 3], &lengths);
        let advantages = ragged(&[1.0, 1.0, -1.0], &lengths);
        surrogate(
            &PolicyInputs::new(&new, &old, &advantages),
            clip,
            RatioLevel::Token,
            reduction,
        )
        .unwrap()
    }

    #[test]
    fn by_hand() {
        // -min(1.5, 1.28) = -1.28; -min(.5, .8) = -.5; -min(-2, -1.28) = 2.
        let clip = Clip {
            epsilon_low: 0.2,
            epsilon_high: 0.28,
            dual: None,
        };
        let token = compute(clip, Reduction::Token {});
        assert!((token.loss.sum.double_value(&[]) - 0.22).abs() < 1e-12);
        assert_eq!(token.loss.weight, 3.0);
        // -(1.28 + .5)/2 + 2 = 1.11.
        let sequence = compute(clip, Reduction::Sequence {});
        assert!((sequence.loss.sum.double_value(&[]) - 1.11).abs() < 1e-12);
        assert_eq!(sequence.loss.weight, 2.0);
        let fixed = compute(clip, Reduction::FixedLength { length: 8 });
        assert!((fixed.loss.sum.double_value(&[]) - 0.22).abs() < 1e-12);
        assert_eq!(fixed.loss.weight, 16.0);
        // A dual clip at 1.6 turns 2 into 1.6.
        let dual = compute(
            Clip {
                dual: Some(1.6),
                ..clip
            },
            Reduction::Token {},
        );
        assert!((dual.loss.sum.double_value(&[]) + 0.18).abs() < 1e-12);
    }

    #[test]
    fn statistics_by_hand() {
        let stats = compute(Clip::symmetric(0.2), Reduction::Token {}).stats;
        assert_eq!(
            (
                stats.tokens,
                stats.ratios,
                stats.clipped_low,
                stats.clipped_high
            ),
            (3.0, 3.0, 0.0, 1.0)
        );
        assert!((stats.ratio_mean() - 4.0 / 3.0).abs() < 1e-12);
        assert!((stats.ratio_max - 2.0).abs() < 1e-12);
        let expected = [1.5f64, 0.5, 2.0]
            .map(|r| 0.5 * r.ln().powi(2))
            .iter()
            .sum::<f64>()
            / 3.0;
        assert!((stats.approx_kl() - expected).abs() < 1e-12);
    }

    #[test]
    fn bad_arguments_are_named() {
        let x = ragged(&[0.0, 0.0], &[2]);
        let y = ragged(&[0.0, 0.0], &[1, 1]);
        let call = |inputs: PolicyInputs<'_>, clip: Clip| {
            surrogate(&inputs, clip, RatioLevel::Token, Reduction::Token {})
                .unwrap_err()
                .to_string()
        };
        assert!(
            call(PolicyInputs::new(&x, &y, &x), Clip::symmetric(0.2)).contains("old log-probs")
        );
        let fine = PolicyInputs::new(&x, &x, &x);
        assert!(call(fine, Clip::symmetric(-0.1)).contains("epsilon_low"));
        assert!(
            call(
                fine,
                Clip {
                    dual: Some(1.1),
                    ..Clip::symmetric(0.2)
                }
            )
            .contains("dual")
        );
        let penalty = KlPenalty {
            estimator: KlEstimator::K1,
            placement: KlPlacement::InReward,
            coef: 0.1,
        };
        let kl = Some(KlTerm {
            exact: None,
            ref_logprobs: &x,
            penalty,
        });
        assert!(call(PolicyInputs { kl, ..fine }, Clip::symmetric(0.2)).contains("reward"));
    }
}
