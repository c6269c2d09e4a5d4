//! Corrections where the sampler's probabilities are not the learner's.
//!
//! Other kernels, another precision or older weights make μ ≠ π_old. The weight π_old/μ mends that;
//! bounding it trades variance for bias.

use rlhf_kernels::Ragged;

use crate::error::{Result, at_least_f32, ensure, same_offsets};
use crate::loss::RatioLevel;

/// What happens to a weight outside its bounds.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
pub enum Bound {
    /// At most `max`: truncated importance sampling (Yao et al. 2025).
    Truncate {
        /// The largest weight.
        max: f64,
    },
    /// 0 outside `min..=max`: such tokens or completions teach nothing.
    Mask {
        /// The smallest weight kept.
        min: f64,
        /// The largest weight kept.
        max: f64,
    },
}

impl Bound {
    /// What is wrong with it.
    ///
    /// # Errors
    /// When the bounds are not 0 <= min <= max.
    pub fn check(&self) -> Result<()> {
        let (min, max) = match *self {
            Self::Truncate { max } => (0.0, max),
            Self::Mask { min, max } => (min, max),
        };
        ensure(0.0 <= min && min <= max, "mismatch weights", || {
            format!("bounds are {min} and {max}, expected 0 <= min <= max")
        })
    }
}

/// How a sampler's mismatch is mended.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Correction {
    /// What has a weight of its own.
    pub level: RatioLevel,
    /// How the weights are held.
    pub bound: Bound,
}

impl Correction {
    /// As [`weights`].
    ///
    /// # Errors
    /// As [`weights`].
    pub fn weights(&self, old_logprobs: &Ragged, sampler_logprobs: &Ragged) -> Result<Ragged> {
        weights(old_logprobs, sampler_logprobs, self.level, self.bound)
    }
}

/// Importance weights π_old/μ, bounded, to be given as [`crate::loss::PolicyInputs::weights`].
///
/// # Shapes
/// Both arguments and the result `[M]` with the same offsets; a completion's weight is repeated over
/// its tokens. No gradients.
///
/// # Errors
/// When offsets differ or the bounds are not 0 <= min <= max.
pub fn weights(
    old_logprobs: &Ragged,
    sampler_logprobs: &Ragged,
    level: RatioLevel,
    bound: Bound,
) -> Result<Ragged> {
    let op = "mismatch weights";
    same_offsets(op, old_logprobs, &[("sampler log-probs", sampler_logprobs)])?;
    let log_ratio = (at_least_f32(old_logprobs) - at_least_f32(sampler_logprobs)).detach();
    let by_token = old_logprobs.with_values(log_ratio)?;
    let ratio = match level {
        RatioLevel::Token => by_token.values().exp(),
        RatioLevel::SequenceMean => by_token.broadcast(&by_token.mean().exp()),
        RatioLevel::SequenceSum => by_token.broadcast(&by_token.sum().exp()),
    };
    bound.check()?;
    Ok(old_logprobs.with_values(match bound {
        Bound::Truncate { max } => ratio.clamp_max(max),
        Bound::Mask { min, max } => {
            let outside = ratio.lt(min).logical_or(&ratio.gt(max));
            ratio.masked_fill(&outside, 0.0)
        }
    })?)
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;
    use tch::Tensor;

    use super::*;

    #[test]
    fn by_hand() {
        // Ratios 1.5 and .5 | 3: products .75 | 3, geometric means √.75 | 3.
        let offsets = Offsets::new(vec![0, 2, 3]).unwrap();
        let old = Ragged::new(
            Tensor::from_slice(&[1.5f64.ln(), 0.5f64.ln(), 3f64.ln()]),
            offsets.clone(),
        )
        .unwrap();
        let sampler = Ragged::new(Tensor::from_slice(&[0.0; 3]), offsets).unwrap();
        let of = |level, bound| {
            Vec::<f64>::try_from(weights(&old, &sampler, level, bound).unwrap().values()).unwrap()
        };
        let near = |a: &[f64], b: &[f64]| a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-14);
        assert!(near(
            &of(RatioLevel::Token, Bound::Truncate { max: 2.0 }),
            &[1.5, 0.5, 2.0]
        ));
        assert!(near(
            &of(RatioLevel::Token, Bound::Mask { min: 0.8, max: 2.0 }),
            &[1.5, 0.0, 0.0]
        ));
        assert!(near(
            &of(RatioLevel::SequenceSum, Bound::Truncate { max: 2.0 }),
            &[0.75, 0.75, 2.0]
        ));
        let root = 0.75f64.sqrt();
        assert!(near(
            &of(RatioLevel::SequenceMean, Bound::Truncate { max: 9.0 }),
            &[root, root, 3.0]
        ));
        assert!(
            weights(
                &old,
                &sampler,
                RatioLevel::Token,
                Bound::Mask { min: 2.0, max: 1.0 }
            )
            .is_err()
        );
    }
}
