//! Direct preference optimisation and what changes its logistic loss a little: noisy labels, an offset, a
//! penalty on what the chosen loses, calibration.

use tch::Tensor;

use super::checks::{label_smoothing as smoothing_fits, not_negative, positive};
use super::{PairValues, PreferenceOutput};
use crate::error::Result;

/// −(1−ε) ℓ(z) − ε ℓ(−z).
pub(super) fn smoothed(z: &Tensor, label_smoothing: f64) -> Tensor {
    let right = -z.log_sigmoid();
    if label_smoothing > 0.0 {
        right * (1.0 - label_smoothing) - (-z).log_sigmoid() * label_smoothing
    } else {
        right
    }
}

/// DPO: L = −(1−ε) ℓ(βh) − ε ℓ(−βh).
///
/// With ε = 0 this is Rafailov et al. 2023 (arXiv 2305.18290), equation 7. With ε > 0 it is cDPO
/// (Mitchell 2023, "A note on DPO with noisy preferences", equation 3): ε is the probability that a
/// label is flipped, and the loss is least where σ(βh) = 1 − ε instead of at infinity.
/// Its gradient in h is −β(σ(−βh) − ε).
///
/// Of log-ratios [per token](PairValues::per_token) it is the length-normalised DPO of Tülu 3 (Lambert et
/// al. 2024, arXiv 2411.15124); TRL's name for that is `sigmoid_norm`.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, or `label_smoothing` is not in [0, ½).
///
/// # Deviations
/// None from the papers. TRL 1.16 ignores `label_smoothing` for its loss `sigmoid`.
pub fn sigmoid(ratios: &PairValues, beta: f64, label_smoothing: f64) -> Result<PreferenceOutput> {
    positive("dpo::sigmoid", "beta", beta)?;
    smoothing_fits("dpo::sigmoid", label_smoothing)?;
    let losses = smoothed(&(ratios.margin() * beta), label_smoothing);
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// Robust DPO: L = [−(1−ε) ℓ(βh) + ε ℓ(−βh)] / (1−2ε).
///
/// Chowdhury, Kini and Natarajan 2024 (arXiv 2403.00409): with labels flipped at rate ε its
/// expectation is DPO's loss of the true labels. One pair's loss falls without bound.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, or `label_smoothing` is not in [0, ½).
pub fn robust(ratios: &PairValues, beta: f64, label_smoothing: f64) -> Result<PreferenceOutput> {
    positive("dpo::robust", "beta", beta)?;
    smoothing_fits("dpo::robust", label_smoothing)?;
    let z = ratios.margin() * beta;
    let flipped = (-&z).log_sigmoid() * label_smoothing;
    let losses =
        (flipped - z.log_sigmoid() * (1.0 - label_smoothing)) / (1.0 - 2.0 * label_smoothing);
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// ODPO, DPO with an offset: L = −ℓ(βh − offset).
///
/// Amini, Vieira and Cotterell 2024 (arXiv 2402.10571): the chosen must win by more where it is
/// better by more. The paper's offset is α log(score_c − score_r): [`score_offset`].
///
/// # Shapes
/// `ratios` are Δ and `offset`, taken without its graph, is `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, or `offset` is not `[P]`.
pub fn odpo(ratios: &PairValues, offset: &Tensor, beta: f64) -> Result<PreferenceOutput> {
    positive("dpo::odpo", "beta", beta)?;
    ratios.fits("dpo::odpo", "offset", offset)?;
    let losses = -(ratios.margin() * beta - offset.detach()).log_sigmoid();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// The offset α log(score_c − score_r), `[P]`, that ODPO's paper uses.
///
/// # Errors
/// When `alpha` is negative, or a chosen does not score higher than its rejected.
pub fn score_offset(scores: &PairValues, alpha: f64) -> Result<Tensor> {
    not_negative("dpo::score_offset", "alpha", alpha)?;
    let gap = scores.margin().detach();
    let least = if gap.numel() == 0 {
        f64::INFINITY
    } else {
        gap.min().double_value(&[])
    };
    positive(
        "dpo::score_offset",
        "the least score of a chosen less that of its rejected",
        least.min(f64::MAX),
    )?;
    Ok(gap.log() * alpha)
}

/// DPO-positive: L = −ℓ(β(h − λ [−Δc]₊)).
///
/// Pal et al. 2024, Smaug (arXiv 2402.13228): a chosen that became less likely than it was under
/// the reference counts against the margin λ times.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, or `lambda` is negative.
pub fn dpo_positive(ratios: &PairValues, beta: f64, lambda: f64) -> Result<PreferenceOutput> {
    positive("dpo::dpo_positive", "beta", beta)?;
    not_negative("dpo::dpo_positive", "lambda", lambda)?;
    let lost = (-ratios.chosen()).relu();
    let losses = -((ratios.margin() - lost * lambda) * beta).log_sigmoid();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// Calibrated DPO: L = −ℓ(h) + (Δc − 1/2β)² + (Δr + 1/2β)².
///
/// Xiao et al. 2024 (arXiv 2412.14516): the log-ratios themselves, and not only their
/// difference, are held to rewards of ±½ over β. The logistic term carries no β.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn cal_dpo(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("dpo::cal_dpo", "beta", beta)?;
    let target = 0.5 / beta;
    let calibration = (ratios.chosen() - target).square() + (ratios.rejected() + target).square();
    let losses = calibration - ratios.margin().log_sigmoid();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

#[cfg(test)]
mod tests {
    use super::super::PairLogprobs;
    use super::*;

    fn pair(chosen: f64, rejected: f64) -> PairValues {
        PairLogprobs {
            chosen: Tensor::from_slice(&[chosen]),
            rejected: Tensor::from_slice(&[rejected]),
            ref_chosen: Tensor::from_slice(&[-2.0]),
            ref_rejected: Tensor::from_slice(&[-3.0]),
        }
        .log_ratios()
        .unwrap()
    }

    fn loss(out: Result<PreferenceOutput>) -> f64 {
        out.unwrap().loss.sum.double_value(&[])
    }

    fn softplus(x: f64) -> f64 {
        x.exp().ln_1p()
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
        let smooth = loss(sigmoid(&pair(-1.0, -5.0), 0.5, 0.1));
        let expected = 0.9 * 0.201_413_277_982_752_4 + 0.1 * 1.701_413_277_982_752_4;
        assert!((smooth - expected).abs() < 1e-15);
    }

    #[test]
    fn the_kin_by_hand() {
        // Δc = 1, Δr = -2, h = 3 as above. Robust at ε = .1: (.9·.2014 - .1·1.7014)/.8.
        let robust = loss(robust(&pair(-1.0, -5.0), 0.5, 0.1));
        assert!((robust - (0.9 * softplus(-1.5) - 0.1 * softplus(1.5)) / 0.8).abs() < 1e-15);
        // Scores 3 and 1: offset 2 ln 2 at α = 2; βh - offset = 1.5 - 1.38629436.
        let scores = PairValues::new(&Tensor::from_slice(&[3.0]), &Tensor::from_slice(&[1.0]));
        let offset = score_offset(&scores.unwrap(), 2.0).unwrap();
        let odpo = loss(odpo(&pair(-1.0, -5.0), &offset, 0.5));
        assert!((odpo - softplus(2.0 * 2f64.ln() - 1.5)).abs() < 1e-15);
        // The chosen lost one nat (Δc = -1, Δr = -2, h = 1): β(h - 5·1) = -2; where it gained, it is DPO.
        let positive = |c| loss(dpo_positive(&pair(c, -5.0), 0.5, 5.0));
        assert!((positive(-3.0) - softplus(2.0)).abs() < 1e-15);
        assert!((positive(-1.0) - softplus(-1.5)).abs() < 1e-15);
        // 1/2β = 1: (1 - 1)² + (-2 + 1)² + softplus(-3).
        let calibrated = loss(cal_dpo(&pair(-1.0, -5.0), 0.5));
        assert!((calibrated - (1.0 + softplus(-3.0))).abs() < 1e-15);
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
        let two = Tensor::from_slice(&[0.0, 0.0]);
        let crooked = PairValues::new(&Tensor::from_slice(&[0.0]), &two);
        assert!(crooked.unwrap_err().to_string().contains("[2]"));
        let counts = PairValues::new(&two, &two.to_kind(tch::Kind::Int));
        assert!(counts.unwrap_err().to_string().contains("Int"));
        let tie = PairValues::new(&two, &two).unwrap();
        assert!(
            score_offset(&tie, 1.0)
                .unwrap_err()
                .to_string()
                .contains("is 0")
        );
    }
}
