//! Rewards that are normal distributions: a head of two numbers, the mean and the logarithm of the variance.
//!
//! Invariant: a variance is exp of a number, so it is positive whatever the head says. What the variance
//! learns is how far labels of one completion disagree.

use rlhf_kernels::LossSum;
use tch::Tensor;

use crate::checks::{self, at_least_f32, weighted};
use crate::error::Result;

const OP: &str = "distributional";

/// Normal rewards of some completions.
#[derive(Clone, Copy, Debug)]
pub struct Normal<'a> {
    /// `[S]` μ.
    pub mean: &'a Tensor,
    /// `[S]` log σ².
    pub log_variance: &'a Tensor,
}

/// L = −Σ w log Φ((μ_c − μ_r)/√(σ_c² + σ_r²)): the probability that a draw of the chosen's reward exceeds
/// one of the rejected's; its weight is Σ w.
///
/// Thurstone 1927 (case I without correlation); as a mean-variance preference model Siththaranjan et al.
/// 2023 (arXiv 2312.08358), section 4.
///
/// # Shapes
/// All `[P]`; weights are 1 where absent.
///
/// # Errors
/// When shapes differ or a weight is negative or not finite.
///
/// # Deviations
/// None. Scale is free as in the paper: means and deviations may be multiplied by one number.
pub fn pairwise(
    chosen: Normal<'_>,
    rejected: Normal<'_>,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    checks::vectors(
        OP,
        &[
            ("chosen mean", Some(chosen.mean)),
            ("chosen log variance", Some(chosen.log_variance)),
            ("rejected mean", Some(rejected.mean)),
            ("rejected log variance", Some(rejected.log_variance)),
            ("weights", weights),
        ],
    )?;
    checks::weights(OP, weights)?;
    let lead = at_least_f32(chosen.mean) - at_least_f32(rejected.mean);
    // −½ log(σ_c² + σ_r²), in logarithms so that no variance overflows.
    let log_variance =
        at_least_f32(chosen.log_variance).logaddexp(&at_least_f32(rejected.log_variance));
    let z = lead * (log_variance * -0.5).exp();
    Ok(weighted(&-z.special_log_ndtr(), weights))
}

/// L = Σ w ½ (log σ² + (y − μ)²/σ²): the likelihood of labelled scores less its constant; its weight is Σ w.
///
/// Nix and Weigend 1994.
///
/// # Shapes
/// All `[S]`; weights are 1 where absent.
///
/// # Errors
/// When shapes differ, a target is not finite, or a weight is negative or not finite.
///
/// # Deviations
/// None; ½ log 2π is left out.
pub fn regression(
    predicted: Normal<'_>,
    targets: &Tensor,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    checks::vectors(
        OP,
        &[
            ("mean", Some(predicted.mean)),
            ("log variance", Some(predicted.log_variance)),
            ("targets", Some(targets)),
            ("weights", weights),
        ],
    )?;
    checks::finite(OP, "targets", targets)?;
    checks::weights(OP, weights)?;
    let (mean, log_variance) = (
        at_least_f32(predicted.mean),
        at_least_f32(predicted.log_variance),
    );
    let error = mean - targets.detach().to_kind(log_variance.kind());
    let losses = (&log_variance + error.square() * (-&log_variance).exp()) * 0.5;
    Ok(weighted(&losses, weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let t = |x: f64| Tensor::from_slice(&[x]);
        let (two, zero, ln2) = (t(2.0), t(0.0), t(2f64.ln()));
        let at = |mean, log_variance| Normal { mean, log_variance };
        // σ² of 2 and 2: z = 2/√4 = 1, Φ(1) = .8413447460685429.
        let out = pairwise(at(&two, &ln2), at(&zero, &ln2), None).unwrap();
        assert!((out.sum.double_value(&[]) + 0.841_344_746_068_542_9f64.ln()).abs() < 1e-14);
        // ½ (ln 2 + 2²/2).
        let out = regression(at(&two, &ln2), &zero, None).unwrap();
        assert!((out.sum.double_value(&[]) - (0.5 * 2f64.ln() + 1.0)).abs() < 1e-15);
        // A hopeless pair stays finite: Φ(−200/√2) is 0 in f64, its logarithm is not.
        let far = t(-200.0);
        let out = pairwise(at(&far, &zero), at(&zero, &zero), None).unwrap();
        assert!((out.sum.double_value(&[]) - 10_000.0).abs() < 10.0);
    }
}
