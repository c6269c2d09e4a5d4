//! Other divergences than the reverse KL for the tie to the reference (f-DPO).
//!
//! Wang et al. 2023 (arXiv 2309.16240): tied by D_f, the policy's implicit reward is β f′(π/π₀)
//! up to a constant of the prompt, so that f′ of the ratio stands wherever DPO has its logarithm.

use tch::Tensor;

use super::PairValues;
use super::checks::positive;
use crate::error::Result;

/// Above this the exponent of a far smaller π than π₀ is held, as in TRL: f32 ends at e^88.
const LARGEST_EXPONENT: f64 = 80.0;

/// The divergence from the reference, with u = π/π₀ and Δ = log u.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum Divergence {
    /// KL(π‖π₀), DPO's own: Δ.
    #[default]
    ReverseKl,
    /// KL(π₀‖π): 1 − e^−Δ.
    ForwardKl,
    /// Jensen–Shannon: log 2u/(1+u) = log 2 + ℓ(Δ).
    JensenShannon,
    /// The α-divergence: (1 − u^−α)/α, between the reverse KL (α → 0) and the forward (α = 1). TRL counts
    /// otherwise: its `f_alpha_divergence_coef` is 1 − α.
    Alpha {
        /// Above 0.
        alpha: f64,
    },
}

impl Divergence {
    /// f′(u), less f′(1), of log-ratios: what is to be put in the place of Δ.
    ///
    /// # Shapes
    /// `ratios` are Δ, `[P]`.
    ///
    /// # Errors
    /// When `alpha` is not above 0.
    ///
    /// # Deviations
    /// In the forward KL and the α-divergence −αΔ counts as at most 80, so that a chosen that vanished costs
    /// a finite amount; past that its gradient is 0. TRL does so for the α-divergence only.
    pub fn of_ratios(self, ratios: &PairValues) -> Result<PairValues> {
        let power = |alpha: f64| {
            ratios.map(|x| -((x * -alpha).clamp_max(LARGEST_EXPONENT).expm1() / alpha))
        };
        Ok(match self {
            Self::ReverseKl => ratios.map(Tensor::shallow_clone),
            Self::ForwardKl => power(1.0),
            Self::JensenShannon => ratios.map(|x| x.log_sigmoid() + std::f64::consts::LN_2),
            Self::Alpha { alpha } => {
                positive("divergence", "alpha", alpha)?;
                power(alpha)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Δ = ln 2 and -ln 2: u = 2 and ½.
        let ln_2 = std::f64::consts::LN_2;
        let at = |d: Divergence| {
            let ratios =
                PairValues::new(&Tensor::from_slice(&[ln_2]), &Tensor::from_slice(&[-ln_2]))
                    .unwrap();
            let out = d.of_ratios(&ratios).unwrap();
            [out.chosen(), out.rejected()].map(|t| t.double_value(&[0]))
        };
        let close = |a: [f64; 2], b: [f64; 2]| {
            assert!(
                a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-15),
                "{a:?} {b:?}"
            );
        };
        close(at(Divergence::ReverseKl), [ln_2, -ln_2]);
        close(at(Divergence::ForwardKl), [0.5, -1.0]);
        // 2u/(1+u): 4/3 and 2/3.
        close(
            at(Divergence::JensenShannon),
            [(4f64 / 3.0).ln(), (2f64 / 3.0).ln()],
        );
        // α = 2: (1 - 1/4)/2 and (1 - 4)/2; α = 1 is the forward KL.
        close(at(Divergence::Alpha { alpha: 2.0 }), [0.375, -1.5]);
        close(at(Divergence::Alpha { alpha: 1.0 }), [0.5, -1.0]);
        let none = Divergence::Alpha { alpha: 0.0 }.of_ratios(
            &PairValues::new(&Tensor::from_slice(&[0.0]), &Tensor::from_slice(&[0.0])).unwrap(),
        );
        assert!(none.unwrap_err().to_string().contains("alpha is 0"));
    }
}
