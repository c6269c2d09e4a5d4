//! Losses of the margin h other than the logistic one: hinge, squares, a reverse KL, a discovered one.

use tch::Tensor;

use super::checks::{label_smoothing as smoothing_fits, positive};
use super::{PairValues, PreferenceOutput};
use crate::error::{Result, ensure};

/// The hinge: L = [1 − βh]₊.
///
/// SLiC-HF (Zhao et al. 2023, arXiv 2305.10425) on log-probs, with log-ratios in the form of Liu et al. 2023,
/// RSO (arXiv 2309.06657). [Without a reference](super::PairLogprobs::reference_free) it is SLiC's own
/// (its margin is 1/β).
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn hinge(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("margin::hinge", "beta", beta)?;
    let losses = (-(ratios.margin() * beta) + 1.0).relu();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// IPO: L = (h − 1/2β)².
///
/// Azar et al. 2023 (arXiv 2310.12036), equation 17, whose τ is β: the margin is driven to 1/2β and no
/// further, whatever the labels' certainty.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
///
/// # Deviations
/// None: Δ are sums. TRL's `ipo` averages them over tokens first: that is this loss of log-ratios
/// [per token](PairValues::per_token), `PreferenceLoss::IpoPerToken`.
pub fn ipo(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("margin::ipo", "beta", beta)?;
    let losses = (ratios.margin() - 0.5 / beta).square();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// EXO of a pair: L = p log(p/(1−ε)) + (1−p) log((1−p)/ε), p = σ(βh).
///
/// Ji et al. 2024 (arXiv 2402.00856), equation 16: KL of the policy's preference from the smoothed label, the
/// reverse of cDPO's. It is least, and 0, where p = 1 − ε.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, or `label_smoothing` is not in (0, ½): at 0 the loss is infinite (as it is at
/// TRL's default).
pub fn exo_pair(ratios: &PairValues, beta: f64, label_smoothing: f64) -> Result<PreferenceOutput> {
    positive("margin::exo_pair", "beta", beta)?;
    smoothing_fits("margin::exo_pair", label_smoothing)?;
    positive("margin::exo_pair", "label_smoothing", label_smoothing)?;
    let z = ratios.margin() * beta;
    let side = |z: &Tensor, label: f64| z.sigmoid() * (z.log_sigmoid() - label.ln());
    let losses = side(&z, 1.0 - label_smoothing) + side(&-&z, label_smoothing);
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// DiscoPOP: L = −(1−m) ℓ(z) + m e^−z, z = βh, m = σ(z/τ).
///
/// Lu et al. 2024 (arXiv 2406.08414), equation 5, the log-ratio modulated loss; the paper's τ is 0.05. It is
/// not convex: around z = 0 its gradient turns.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, or `tau` is not between 0 and 1 (from 1 on a wrong pair's loss explodes).
///
/// # Deviations
/// −z counts as at most 80 in e^−z, where m is 0 long since: where TRL multiplies 0 by infinity, this is 0.
pub fn discopop(ratios: &PairValues, beta: f64, tau: f64) -> Result<PreferenceOutput> {
    positive("margin::discopop", "beta", beta)?;
    ensure(tau > 0.0 && tau < 1.0, "margin::discopop", || {
        format!("tau is {tau}, expected 0 < tau < 1")
    })?;
    let z = ratios.margin() * beta;
    let modulation = (&z / tau).sigmoid();
    let exponential = (-&z).clamp_max(80.0).exp();
    let logistic = -z.log_sigmoid();
    let losses = &logistic + modulation * (exponential - &logistic);
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// REBEL: L = (h/η − (score_c − score_r))².
///
/// Gao et al. 2024 (arXiv 2404.16767), algorithm 1: least squares on the difference of rewards, with the
/// sampling policy for a reference. Its optimum is π ∝ π₀ exp(ηr), so that η is 1/β.
///
/// # Shapes
/// `ratios` are Δ and `scores` rewards, taken without their graph, `[P]`; rewards Δ/η and losses `[P]`.
///
/// # Errors
/// When `eta` is not above 0, or `scores` are of other pairs.
pub fn rebel(ratios: &PairValues, scores: &PairValues, eta: f64) -> Result<PreferenceOutput> {
    positive("margin::rebel", "eta", eta)?;
    ratios.fits("margin::rebel", "scores", scores.chosen())?;
    let losses = (ratios.margin() / eta - scores.margin().detach()).square();
    Ok(PreferenceOutput::new(losses, ratios, 1.0 / eta))
}

/// Reward-aware preference optimisation: L = q log(q/p) + (1−q) log((1−q)/(1−p)), p = σ(βh),
/// q = σ(η(score_c − score_r)).
///
/// Nemotron-4 (Adler et al. 2024, arXiv 2406.11704, section 3.3.2): KL of two Bernoulli preferences. It is 0
/// where βh is η times the difference of rewards. Not to be taken for the "RPO" that is DPO with an NLL term
/// (Pang et al. 2024), here [`PreferenceMix`](super::PreferenceMix) of `sigmoid` and `sft`.
///
/// # Shapes
/// `ratios` are Δ and `scores` rewards, taken without their graph, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` or `eta` is not above 0, or `scores` are of other pairs.
pub fn reward_aware(
    ratios: &PairValues,
    scores: &PairValues,
    beta: f64,
    eta: f64,
) -> Result<PreferenceOutput> {
    positive("margin::reward_aware", "beta", beta)?;
    positive("margin::reward_aware", "eta", eta)?;
    ratios.fits("margin::reward_aware", "scores", scores.chosen())?;
    let policy = ratios.margin() * beta;
    let target = scores.margin().detach() * eta;
    let side = |target: &Tensor, policy: &Tensor| {
        target.sigmoid() * (target.log_sigmoid() - policy.log_sigmoid())
    };
    let losses = side(&target, &policy) + side(&-&target, &-&policy);
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn values(chosen: f64, rejected: f64) -> PairValues {
        PairValues::new(
            &Tensor::from_slice(&[chosen]),
            &Tensor::from_slice(&[rejected]),
        )
        .unwrap()
    }

    fn loss(out: Result<PreferenceOutput>) -> f64 {
        out.unwrap().loss.sum.double_value(&[])
    }

    #[test]
    fn by_hand() {
        // Δc = 1, Δr = -2, h = 3.
        let pair = || values(1.0, -2.0);
        assert_eq!(loss(hinge(&pair(), 0.25)), 0.25);
        assert_eq!(loss(hinge(&pair(), 0.5)), 0.0);
        // 1/2β = 2: (3 - 2)².
        assert_eq!(loss(ipo(&pair(), 0.25)), 1.0);
        // h/η = 6 against 4 - 1.
        assert_eq!(loss(rebel(&pair(), &values(4.0, 1.0), 0.5)), 9.0);
        // βh = 1.5 and η·1 = 1.5: the same preference, no loss.
        assert!(loss(reward_aware(&pair(), &values(2.0, 1.0), 0.5, 1.5)).abs() < 1e-15);
        // p = σ(ln 3) = 3/4 against 1 - ε = 3/4, and against 2/3.
        let ln_3 = values(3f64.ln(), 0.0);
        assert!(loss(exo_pair(&ln_3, 1.0, 0.25)).abs() < 1e-15);
        let expected = 0.75 * (0.75f64 * 1.5).ln() + 0.25 * (0.25f64 * 3.0).ln();
        assert!((loss(exo_pair(&ln_3, 1.0, 1.0 / 3.0)) - expected).abs() < 1e-15);
        // z = 0: half of ln 2 and half of 1.
        let expected = 0.5 * (2f64.ln() + 1.0);
        assert!((loss(discopop(&values(1.0, 1.0), 1.0, 0.05)) - expected).abs() < 1e-15);
    }

    #[test]
    fn a_vanished_chosen_costs_a_finite_amount() {
        for h in [-1e5, -1e3, 1e3, 1e5] {
            for out in [
                discopop(&values(h, 0.0), 1.0, 0.05),
                exo_pair(&values(h, 0.0), 1.0, 0.1),
                reward_aware(&values(h, 0.0), &values(1.0, 0.0), 1.0, 1.0),
            ] {
                let out = loss(out);
                assert!(out.is_finite() && out >= 0.0, "{h}: {out}");
            }
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        let message = |out: Result<PreferenceOutput>| out.unwrap_err().to_string();
        let pair = || values(1.0, -2.0);
        assert!(message(exo_pair(&pair(), 1.0, 0.0)).contains("label_smoothing is 0"));
        assert!(message(discopop(&pair(), 1.0, 1.0)).contains("tau is 1"));
        assert!(message(rebel(&pair(), &pair(), -1.0)).contains("eta is -1"));
        let two = Tensor::from_slice(&[0.0, 0.0]);
        let two = PairValues::new(&two, &two).unwrap();
        assert!(message(rebel(&pair(), &two, 1.0)).contains("scores are [2], expected [1]"));
    }
}
