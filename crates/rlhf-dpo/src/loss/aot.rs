//! Alignment by optimal transport: one distribution of log-ratios over the other, not pair by pair.

use tch::Tensor;

use super::checks::{label_smoothing as smoothing_fits, positive};
use super::dpo::smoothed;
use super::{PairLogprobs, PairValues, PreferenceOutput};
use crate::error::Result;

fn sorted(x: &Tensor) -> Tensor {
    x.sort(0, false).0
}

/// AOT of pairs: L = −(1−ε) ℓ(βd_(i)) − ε ℓ(−βd_(i)), d_(i) the i-th smallest of log π_c − log π_r less the
/// i-th smallest of log π₀_c − log π₀_r.
///
/// Melnyk et al. 2024 (arXiv 2406.05882): the policy's margins shall dominate the reference's in
/// the first order. Every quantile counts, not every pair.
///
/// # Shapes
/// `[P]`; rewards βΔ of each pair. Losses `[P]` are of quantiles: they are in ascending order, not in that of
/// the pairs.
///
/// # Errors
/// When `beta` is not above 0, or `label_smoothing` is not in [0, ½).
///
/// # Deviations
/// None; as the paper's it is a loss of the pairs of one call, so that a step cut into micro-batches sorts
/// within each.
pub fn aot(logprobs: &PairLogprobs, beta: f64, label_smoothing: f64) -> Result<PreferenceOutput> {
    positive("aot::aot", "beta", beta)?;
    smoothing_fits("aot::aot", label_smoothing)?;
    let ratios = logprobs.log_ratios()?;
    let (policy, reference) = (logprobs.policy()?.margin(), logprobs.reference()?.margin());
    let losses = smoothed(
        &((sorted(&policy) - sorted(&reference)) * beta),
        label_smoothing,
    );
    Ok(PreferenceOutput::new(losses, &ratios, beta))
}

/// AOT of unpaired completions: L = −(1−ε) ℓ(βd_(i)) − ε ℓ(−βd_(i)), d_(i) the i-th smallest Δc less the i-th
/// smallest Δr.
///
/// Melnyk et al. 2024 (arXiv 2406.05882): the rewards of the chosen shall dominate those of the rejected in
/// the first order; which rejected stands beside which chosen does not matter, they need not share a prompt.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ of each pair. Losses `[P]` are of quantiles, in ascending order.
///
/// # Errors
/// When `beta` is not above 0, or `label_smoothing` is not in [0, ½).
///
/// # Deviations
/// None; it sorts the completions of one call (see [`aot`]).
pub fn aot_unpaired(
    ratios: &PairValues,
    beta: f64,
    label_smoothing: f64,
) -> Result<PreferenceOutput> {
    positive("aot::aot_unpaired", "beta", beta)?;
    smoothing_fits("aot::aot_unpaired", label_smoothing)?;
    let apart = sorted(ratios.chosen()) - sorted(ratios.rejected());
    let losses = smoothed(&(apart * beta), label_smoothing);
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let column = |x: [f64; 2]| Tensor::from_slice(&x);
        // Margins of the policy 1 and -3, of the reference 0 and -1: sorted -3 1 and -1 0, apart -2 and 1.
        let pairs = PairLogprobs {
            chosen: column([-1.0, -5.0]),
            rejected: column([-2.0, -2.0]),
            ref_chosen: column([-2.0, -3.0]),
            ref_rejected: column([-2.0, -2.0]),
        };
        let softplus = |x: f64| x.exp().ln_1p();
        let near = |out: PreferenceOutput, expected: [f64; 2]| {
            for (i, e) in expected.iter().enumerate() {
                let got = out.losses.double_value(&[i as i64]);
                assert!((got - e).abs() < 1e-15, "{got} against {e}");
            }
        };
        near(
            aot(&pairs, 0.5, 0.0).unwrap(),
            [softplus(1.0), softplus(-0.5)],
        );
        // Δc = 1, -2 and Δr = 0, 0: sorted -2 1.
        let ratios = pairs.log_ratios().unwrap();
        near(
            aot_unpaired(&ratios, 0.5, 0.0).unwrap(),
            [softplus(1.0), softplus(-0.5)],
        );
        let smooth = [
            0.9 * softplus(1.0) + 0.1 * softplus(-1.0),
            0.9 * softplus(-0.5) + 0.1 * softplus(0.5),
        ];
        near(aot_unpaired(&ratios, 0.5, 0.1).unwrap(), smooth);
        // The rewards keep the order of the pairs.
        let rewards = aot(&pairs, 0.5, 0.0).unwrap().chosen_rewards;
        assert_eq!(Vec::<f64>::try_from(&rewards).unwrap(), [0.5, -1.0]);
    }
}
