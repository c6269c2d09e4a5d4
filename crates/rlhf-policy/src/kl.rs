//! How far the policy is from the reference: estimators, where they act, and their control.
//!
//! KL(π‖π₀) = E_π[log π − log π₀]. From samples of π there are several estimators of it, and two
//! places to put one: the reward (it is a number) or the loss (it is differentiated). As a *number*
//! k1 and k3 are unbiased; what counts in a loss is the *gradient*, and there the order is another.
//! [`KlPenalty`] makes estimator and place one choice, and [`KlPenalty::warning`] says which choices
//! do not descend KL(π‖π₀).
//!
//! Each token's estimate concerns the distribution after that token's prefix. In the loss the prefixes
//! are taken as given; only a penalty in the reward also teaches the policy to avoid prefixes after
//! which it will differ (for completions of one token the two are the same).

use rlhf_kernels::Ragged;
use tch::{Kind, Tensor};

use crate::error::{Result, at_least_f32, ensure, same_offsets};

/// An estimator of KL(π‖π₀) from a token sampled from π; k1 = log π − log π₀.
///
/// Schulman 2020, "Approximating KL divergence".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum KlEstimator {
    /// k1: unbiased, may be negative.
    K1,
    /// k2 = ½ k1²: biased value, and exactly the gradient of KL(π‖π₀).
    K2,
    /// k3 = e^{−k1} − 1 + k1: unbiased, never negative; its gradient is that of KL(π₀‖π).
    K3,
    /// The value of k3 with the gradient of k2 (a straight-through estimator).
    K3Straight,
    /// No estimate: KL of the two whole next-token distributions at each token ([`exact`]), without the noise of the
    /// token drawn. For the loss.
    Exact,
}

impl KlEstimator {
    /// The estimate at each token.
    ///
    /// # Shapes
    /// Both arguments and the result `[M]` with the same offsets. Differentiable in `logprobs`; no
    /// gradient goes to `ref_logprobs`.
    ///
    /// # Errors
    /// When the offsets differ, and for [`KlEstimator::Exact`], which is no function of these.
    pub fn estimate(self, logprobs: &Ragged, ref_logprobs: &Ragged) -> Result<Ragged> {
        same_offsets("kl", logprobs, &[("reference log-probs", ref_logprobs)])?;
        ensure(self != Self::Exact, "kl", || {
            "the exact KL needs both distributions, not the log-probs of one token".into()
        })?;
        let k1 = at_least_f32(logprobs) - at_least_f32(ref_logprobs).detach();
        Ok(logprobs.with_values(self.of_log_ratio(&k1))?)
    }

    /// The estimate from k1 of any shape.
    fn of_log_ratio(self, k1: &Tensor) -> Tensor {
        match self {
            Self::K1 | Self::Exact => k1.shallow_clone(),
            Self::K2 => k1.square() * 0.5,
            // expm1: for k1 near 0, e^{-k1} - 1 would lose every digit.
            Self::K3 => (-k1).expm1() + k1,
            Self::K3Straight => {
                let k2 = Self::K2.of_log_ratio(k1);
                Self::K3.of_log_ratio(k1).detach() + &k2 - k2.detach()
            }
        }
    }
}

/// Where a KL penalty acts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case")
)]
pub enum KlPlacement {
    /// Taken from the reward, as a number.
    InReward,
    /// Added to the loss of each token and differentiated.
    InLoss,
    /// As `InLoss`, multiplied by the ratio π/π_old, which is differentiated too (DeepSeek-V3.2's
    /// correction, TRL's `use_bias_correction_kl`): unbiased whatever the age of the samples.
    InLossWeighted,
}

/// A KL penalty: which estimate, where, how strong.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(rename_all = "snake_case", deny_unknown_fields)
)]
pub struct KlPenalty {
    /// The estimator.
    pub estimator: KlEstimator,
    /// Where it acts.
    pub placement: KlPlacement,
    /// β, its weight.
    pub coef: f64,
}

impl KlPenalty {
    /// Why this choice does not descend KL(π‖π₀), or `None` if its expected gradient on samples of
    /// the policy is that of KL(π‖π₀) (with prefixes held, where it acts in the loss).
    #[must_use]
    pub fn warning(&self) -> Option<&'static str> {
        use KlEstimator::{Exact, K1, K2, K3, K3Straight};
        use KlPlacement::{InLoss, InLossWeighted, InReward};
        match (self.estimator, self.placement) {
            (K1, InReward | InLossWeighted)
            | (K2 | K3Straight | Exact, InLoss)
            | (K3, InLossWeighted) => None,
            (Exact, InReward | InLossWeighted) => Some(
                "the exact KL at a token does not depend on which token was drawn: as a reward, or weighted by the ratio, it does not hold that token; put it in the loss",
            ),
            (K2, InReward) => {
                Some("k2 in the reward penalises half the squared log-ratio, not KL; use k1 there")
            }
            (K3 | K3Straight, InReward) => {
                Some("k3 in the reward also pushes KL(reference || policy) up; use k1 there")
            }
            (K1, InLoss) => {
                Some("k1 in the loss has an expected gradient of zero: it holds nothing; use k2")
            }
            (K3, InLoss) => Some(
                "k3 in the loss descends KL(reference || policy), not KL(policy || reference); use k2",
            ),
            (K2 | K3Straight, InLossWeighted) => Some(
                "with the ratio as weight, k2's gradient is no longer that of KL; use k1 or k3",
            ),
        }
    }
}

/// The exact KL(p‖q) of two rows of logits at each position: Σ_v p (log p − log q).
///
/// A vocabulary entry with p = 0 contributes 0. With the arguments exchanged it is the reverse
/// divergence. Memory is O(M·V).
///
/// # Shapes
/// `p_logits` and `q_logits` `[M, V]`; the result `[M]`, differentiable in both.
///
/// # Errors
/// Unless both are floating point and of one shape `[M, V]`.
pub fn exact(p_logits: &Tensor, q_logits: &Tensor) -> Result<Tensor> {
    ensure(
        p_logits.dim() == 2 && p_logits.size() == q_logits.size(),
        "exact kl",
        || {
            format!(
                "logits are {:?} and {:?}, expected the same [M, V]",
                p_logits.size(),
                q_logits.size()
            )
        },
    )?;
    ensure(
        p_logits.is_floating_point() && q_logits.is_floating_point(),
        "exact kl",
        || {
            format!(
                "logits are {:?} and {:?}, expected floating point",
                p_logits.kind(),
                q_logits.kind()
            )
        },
    )?;
    let log_softmax = |x: &Tensor| match x.kind() {
        Kind::Half | Kind::BFloat16 => x.log_softmax(-1, Kind::Float),
        kind => x.log_softmax(-1, kind),
    };
    let (log_p, log_q) = (log_softmax(p_logits), log_softmax(q_logits));
    let p = log_p.exp();
    // Where p = 0, log p is -inf: 0 · -inf must be 0, in the gradient too.
    let gap = (&log_p - &log_q).masked_fill(&p.eq(0.0), 0.0);
    let kind = p.kind();
    Ok((p * gap).sum_dim_intlist(&[-1i64][..], false, kind))
}

/// What sets a KL penalty's coefficient. It is all of its own state: saved and restored as it is.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
pub enum KlController {
    /// Always the same.
    Fixed {
        /// The coefficient.
        coef: f64,
    },
    /// Ziegler et al. 2019 (arXiv 1909.08593), section 2.2: after each batch of n completions with
    /// measured KL, β ← β (1 + clip(KL/target − 1, ±0.2) n/horizon).
    Adaptive {
        /// The coefficient now.
        coef: f64,
        /// The KL aimed at, in nats a completion.
        target: f64,
        /// Completions over which the coefficient may change by 20 %.
        horizon: f64,
    },
}

impl KlController {
    /// The coefficient now.
    #[must_use]
    pub fn coef(&self) -> f64 {
        match *self {
            Self::Fixed { coef } | Self::Adaptive { coef, .. } => coef,
        }
    }

    /// Takes notice of `kl`, the mean KL in nats a completion of a batch of `completions`. A KL that
    /// is not finite changes nothing.
    pub fn update(&mut self, kl: f64, completions: u64) {
        if let Self::Adaptive {
            coef,
            target,
            horizon,
        } = self
            && kl.is_finite()
        {
            let error = (kl / *target - 1.0).clamp(-0.2, 0.2);
            *coef *= 1.0 + error * completions as f64 / *horizon;
        }
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;

    fn one(x: f64) -> Ragged {
        Ragged::new(Tensor::from_slice(&[x]), Offsets::new(vec![0, 1]).unwrap()).unwrap()
    }

    #[test]
    fn by_hand() {
        // log π = -1, log π₀ = -1.5: k1 = .5, k2 = .125, k3 = e^-.5 - 1 + .5 = .10653066.
        let k = |e: KlEstimator| {
            e.estimate(&one(-1.0), &one(-1.5))
                .unwrap()
                .values()
                .double_value(&[0])
        };
        assert_eq!(k(KlEstimator::K1), 0.5);
        assert_eq!(k(KlEstimator::K2), 0.125);
        assert!((k(KlEstimator::K3) - 0.106_530_659_712_633_42).abs() < 1e-15);
        assert_eq!(k(KlEstimator::K3Straight), k(KlEstimator::K3));
    }

    /// p = (.5, .3, .2), q = (.2, .3, .5): KL(p‖q) = .5 ln 2.5 + .2 ln .4 = .27489.
    /// A well-known text's code gives −.2749 for k1 and .3551 for k3, whose ratio it inverts.
    #[test]
    fn enumerated_expectations_of_k1_and_k3_are_the_kl() {
        let (p, q) = ([0.5f64, 0.3, 0.2], [0.2f64, 0.3, 0.5]);
        let expected = |e: KlEstimator| {
            p.iter()
                .zip(&q)
                .map(|(p, q)| {
                    p * e
                        .estimate(&one(p.ln()), &one(q.ln()))
                        .unwrap()
                        .values()
                        .double_value(&[0])
                })
                .sum::<f64>()
        };
        let kl = 0.5 * 2.5f64.ln() + 0.2 * 0.4f64.ln();
        assert!((kl - 0.2749).abs() < 5e-5);
        assert!((expected(KlEstimator::K1) - kl).abs() < 1e-15);
        assert!((expected(KlEstimator::K3) - kl).abs() < 1e-15);
        // k2 is biased: ½ (.5 ln² 2.5 + .2 ln² .4) = .35 ln² 2.5 = .29386.
        assert!((expected(KlEstimator::K2) - 0.35 * 2.5f64.ln().powi(2)).abs() < 1e-15);
        let logits = |x: &[f64; 3]| Tensor::from_slice(&x.map(f64::ln)).unsqueeze(0);
        assert!((exact(&logits(&p), &logits(&q)).unwrap().double_value(&[0]) - kl).abs() < 1e-15);
    }

    #[test]
    fn a_forbidden_entry_costs_nothing() {
        let p = Tensor::from_slice(&[0.0, f64::NEG_INFINITY])
            .unsqueeze(0)
            .set_requires_grad(true);
        let kl = exact(&p, &Tensor::from_slice(&[0.0, 0.0]).unsqueeze(0)).unwrap();
        assert!((kl.double_value(&[0]) - std::f64::consts::LN_2).abs() < 1e-15);
    }

    #[test]
    fn the_controller_moves_to_its_target() {
        // KL 9 against 6 is clipped to +.2; 512 of 10240 completions: ·(1 + .2/20) = 1.01.
        let mut c = KlController::Adaptive {
            coef: 0.1,
            target: 6.0,
            horizon: 10240.0,
        };
        c.update(9.0, 512);
        assert!((c.coef() - 0.101).abs() < 1e-15);
        // 5.7 against 6 is -.05: ·(1 - .05/20).
        c.update(5.7, 512);
        assert!((c.coef() - 0.101 * 0.9975).abs() < 1e-15);
        c.update(f64::NAN, 512);
        assert!((c.coef() - 0.101 * 0.9975).abs() < 1e-15);
        let mut fixed = KlController::Fixed { coef: 0.05 };
        fixed.update(9.0, 512);
        assert_eq!(fixed.coef(), 0.05);
    }

    #[cfg(feature = "train")]
    #[test]
    fn a_controller_is_saved_and_restored_as_it_is() {
        let mut c = KlController::Adaptive {
            coef: 0.1,
            target: 6.0,
            horizon: 1e4,
        };
        c.update(7.0, 33);
        let saved = serde_json::to_string(&c).unwrap();
        assert_eq!(serde_json::from_str::<KlController>(&saved).unwrap(), c);
        let wrong = r#"{"kind": "fixed", "coef": 0.1, "horizon": 5}"#;
        assert!(
            serde_json::from_str::<KlController>(wrong)
                .unwrap_err()
                .to_string()
                .contains("horizon")
        );
    }
}
