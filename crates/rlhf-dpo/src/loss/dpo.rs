//! Direct preference optimisation, and its form for noisy labels.

use crate::error::{Result, ensure};
use crate::loss::{PairLogprobs, PreferenceOutput};

/// DPO: L = −(1−ε) ℓ(βh) − ε ℓ(−βh).
///
/// With ε = 0 this is Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With ε > 0 it is cDPO
/// (Mitchell 2023, "A note on DPO with noisy preferences", equation 3): ε is the probability that a
/// label is flipped, and the loss is least where σ(βh) = 1 − ε instead of at infinity.
/// Its gradient in h is −β(σ(−βh) − ε).
///
/// # Shapes
/// All of `pairs` `[P]`; rewards and losses `[P]`.
///
/// # Errors
/// When shapes differ, `beta` is not above 0, or `label_smoothing` is not in [0, ½).
///
/// # Deviations
/// None from the papers. TRL 1.16 ignores `label_smoothing` for its loss `sigmoid`.
pub fn sigmoid(pairs: &PairLogprobs, beta: f64, label_smoothing: f64) -> Result<PreferenceOutput> {
    ensure(beta > 0.0 && beta.is_finite(), "dpo::sigmoid", || {
        format!("beta is {beta}, expected above 0")
    })?;
    ensure(
        (0.0..0.5).contains(&label_smoothing),
        "dpo::sigmoid",
        || format!("label_smoothing is {label_smoothing}, expected 0 <= label_smoothing < 0.5"),
    )?;
    let (chosen, rejected) = pairs.log_ratios()?;
    let margin = (&chosen - &rejected) * beta;
    let right = -margin.log_sigmoid();
    let losses = if label_smoothing > 0.0 {
        right * (1.0 - label_smoothing) - (-&margin).log_sigmoid() * label_smoothing
    } else {
        right
    };
    Ok(PreferenceOutput::new(
        losses,
        &(chosen * beta),
        &(rejected * beta),
    ))
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    fn pair(chosen: f64, rejected: f64) -> PairLogprobs {
        PairLogprobs {
            chosen: Tensor::from_slice(&[chosen]),
            rejected: Tensor::from_slice(&[rejected]),
            ref_chosen: Tensor::from_slice(&[-2.0]),
            ref_rejected: Tensor::from_slice(&[-3.0]),
        }
    }

    #[test]
    fn by_hand() {
        // Δc = -1 - -2 = 1, Δr = -5 - -3 = -2, h = 3, β = .5: βh = 1.5,
        // -log σ(1.5) = ln(1 + e^-1.5) = ln 1.22313016 = .20141328; at ε = .1: .9·.20141328 + .1·1.70141328.
        let out = sigmoid(&pair(-1.0, -5.0), 0.5, 0.0).unwrap();
        assert!((out.loss.sum.double_value(&[]) - 0.201_413_277_982_752_4).abs() < 1e-15);
        assert_eq!(out.loss.weight, 1.0);
        assert_eq!(out.chosen_rewards.double_value(&[0]), 0.5);
        assert_eq!(out.rejected_rewards.double_value(&[0]), -1.0);
        assert_eq!(out.margins().double_value(&[0]), 1.5);
        assert_eq!(out.accuracies().double_value(&[0]), 1.0);
        let smooth = sigmoid(&pair(-1.0, -5.0), 0.5, 0.1).unwrap();
        let expected = 0.9 * 0.201_413_277_982_752_4 + 0.1 * 1.701_413_277_982_752_4;
        assert!((smooth.loss.sum.double_value(&[]) - expected).abs() < 1e-15);
    }

    #[test]
    fn the_reference_itself_costs_ln_2_and_ties() {
        let out = sigmoid(&pair(-2.0, -3.0), 0.5, 0.0).unwrap();
        assert!((out.loss.sum.double_value(&[]) - std::f64::consts::LN_2).abs() < 1e-15);
        assert_eq!(out.accuracies().double_value(&[0]), 0.5);
    }

    #[test]
    fn far_margins_stay_finite() {
        let out = sigmoid(&pair(-1e5, -1.0), 1.0, 0.0).unwrap();
        assert!((out.loss.sum.double_value(&[]) - 1e5).abs() < 10.0);
    }

    #[test]
    fn bad_arguments_are_named() {
        let message = |beta, eps| {
            sigmoid(&pair(-1.0, -1.0), beta, eps)
                .unwrap_err()
                .to_string()
        };
        assert!(message(0.0, 0.0).contains("beta is 0"));
        assert!(message(f64::NAN, 0.0).contains("beta"));
        assert!(message(0.1, 0.5).contains("label_smoothing is 0.5"));
        let crooked = PairLogprobs {
            ref_chosen: Tensor::from_slice(&[0.0, 0.0]),
            ..pair(0.0, 0.0)
        };
        assert!(
            sigmoid(&crooked, 0.1, 0.0)
                .unwrap_err()
                .to_string()
                .contains("[2]")
        );
    }
}
