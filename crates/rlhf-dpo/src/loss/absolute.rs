//! Losses that say of each completion alone where it should go, not only of their difference.

use super::checks::positive;
use super::{PairValues, PreferenceOutput};
use crate::error::Result;

/// NCA of a pair: L = −ℓ(βΔc) − ½ ℓ(−βΔc) − ½ ℓ(−βΔr).
///
/// Chen et al. 2024, noise contrastive alignment (arXiv 2402.05369), for one better and one worse
/// completion: it holds the chosen near its likelihood (σ(βΔc) = 2/3 at the least), where DPO lets it fall.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn nca_pair(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("absolute::nca_pair", "beta", beta)?;
    let (chosen, rejected) = (ratios.chosen() * beta, ratios.rejected() * beta);
    let away = (-&chosen).log_sigmoid() + (-rejected).log_sigmoid();
    let losses = -chosen.log_sigmoid() - away * 0.5;
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// BCO of a pair: L = −ℓ(βΔc − δ) − ℓ(δ − βΔr).
///
/// Jung et al. 2024 (arXiv 2404.04656): a classifier of good and bad whose logit is the implicit reward. δ
/// is the running mean of all rewards ([`RunningMoments`](super::unpaired::RunningMoments)); TRL's
/// `bco_pair` has 0.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn bco_pair(ratios: &PairValues, beta: f64, delta: f64) -> Result<PreferenceOutput> {
    positive("absolute::bco_pair", "beta", beta)?;
    let chosen = ratios.chosen() * beta - delta;
    let rejected = ratios.rejected() * -beta + delta;
    let losses = -(chosen.log_sigmoid() + rejected.log_sigmoid());
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// SPPO with hard labels: L = (Δc − 1/2β)² + (Δr + 1/2β)².
///
/// Wu et al. 2024, self-play preference optimisation (arXiv 2405.00675), equation 4.7 with η = 1/β and a
/// probability to win of 1 for the chosen and 0 for the rejected.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn sppo_hard(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("absolute::sppo_hard", "beta", beta)?;
    let target = 0.5 / beta;
    let losses = (ratios.chosen() - target).square() + (ratios.rejected() + target).square();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// APO-zero: L = 1 − σ(βΔc) + σ(βΔr).
///
/// D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 7: the chosen shall become likelier and the
/// rejected less likely; for data whose chosen are better than what the policy writes.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn apo_zero(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("absolute::apo_zero", "beta", beta)?;
    // 1 - σ(x) = σ(-x), which loses nothing where σ(x) is near 1.
    let losses = (ratios.chosen() * -beta).sigmoid() + (ratios.rejected() * beta).sigmoid();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

/// APO-down: L = σ(βΔc) + 1 − σ(βh).
///
/// D'Oosterlinck et al. 2024 (arXiv 2408.06266), equation 8: both shall become less likely, the rejected
/// more so; for data whose chosen are worse than what the policy writes.
///
/// # Shapes
/// `ratios` are Δ, `[P]`; rewards βΔ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0.
pub fn apo_down(ratios: &PairValues, beta: f64) -> Result<PreferenceOutput> {
    positive("absolute::apo_down", "beta", beta)?;
    let losses = (ratios.chosen() * beta).sigmoid() + (ratios.margin() * -beta).sigmoid();
    Ok(PreferenceOutput::new(losses, ratios, beta))
}

#[cfg(test)]
mod tests {
    use tch::Tensor;

    use super::*;

    #[test]
    fn by_hand() {
        let near = |out: Result<PreferenceOutput>, expected: f64| {
            let got = out.unwrap().loss.sum.double_value(&[]);
            assert!((got - expected).abs() < 1e-15, "{got} against {expected}");
        };
        // β = 1, σ(Δc) = 3/4 and σ(Δr) = 1/3: Δc = ln 3, Δr = -ln 2, h = ln 6, σ(h) = 6/7.
        let (chosen, rejected) = (3f64.ln(), -(2f64.ln()));
        let pair = PairValues::new(
            &Tensor::from_slice(&[chosen]),
            &Tensor::from_slice(&[rejected]),
        )
        .unwrap();
        near(
            nca_pair(&pair, 1.0),
            -0.75f64.ln() - 0.5 * 0.25f64.ln() - 0.5 * (2f64 / 3.0).ln(),
        );
        near(bco_pair(&pair, 1.0, 0.0), -0.75f64.ln() - (2f64 / 3.0).ln());
        // δ = ln 3: σ(0) = 1/2, and σ(ln 3 + ln 2) = 6/7.
        near(
            bco_pair(&pair, 1.0, chosen),
            -0.5f64.ln() - (6f64 / 7.0).ln(),
        );
        near(apo_zero(&pair, 1.0), 0.25 + 1.0 / 3.0);
        near(apo_down(&pair, 1.0), 0.75 + 1.0 / 7.0);
        // 1/2β = ½.
        near(
            sppo_hard(&pair, 1.0),
            (chosen - 0.5).powi(2) + (rejected + 0.5).powi(2),
        );
    }
}
