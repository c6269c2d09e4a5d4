//! Losses of the policy's likelihoods alone, without a reference: ORPO, CPO, SimPO, AlphaPO.

use tch::Tensor;

use super::checks::{label_smoothing as smoothing_fits, not_negative, positive};
use super::dpo::smoothed;
use super::{PairValues, PreferenceOutput};
use crate::error::{Result, ensure};

/// A mean log-prob nearer to 0 than this counts as this: at 0 the odds are infinite.
const NEAREST_TO_CERTAIN: f64 = -1e-7;

/// log(1 − e^x) for x < 0 without loss at either end.
fn log_1m_exp(x: &Tensor) -> Tensor {
    let near = x.clamp(-std::f64::consts::LN_2, NEAREST_TO_CERTAIN);
    let far = x.clamp_max(-std::f64::consts::LN_2);
    (-near.expm1())
        .log()
        .where_self(&x.ge(-std::f64::consts::LN_2), &(-far.exp()).log1p())
}

/// log p̄/(1 − p̄) of log p̄, `[P]`; TRL logs the mean of its margin.
///
/// log p̄ above −1e-7 counts as −1e-7, without gradient there: the odds of what is certain are infinite.
pub fn log_odds(mean_logprobs: &PairValues) -> PairValues {
    mean_logprobs.map(|x| x.clamp_max(NEAREST_TO_CERTAIN) - log_1m_exp(x))
}

/// ORPO's odds-ratio term: L = −λ ℓ(logit p̄_c − logit p̄_r), p̄ the geometric mean of a completion's token
/// probabilities.
///
/// Hong, Lee and Thorne 2024 (arXiv 2403.07691), equation 7.
///
/// # Shapes
/// `mean_logprobs` are log p̄, the mean log-prob of a token, `[P]`; rewards λ log p̄ and losses `[P]`.
///
/// # Errors
/// When `lambda` is negative.
///
/// # Deviations
/// As [`log_odds`].
pub fn odds_ratio(mean_logprobs: &PairValues, lambda: f64) -> Result<PreferenceOutput> {
    not_negative("likelihood::odds_ratio", "lambda", lambda)?;
    let losses = log_odds(mean_logprobs).margin().log_sigmoid() * -lambda;
    Ok(PreferenceOutput::new(losses, mean_logprobs, lambda))
}

/// ORPO: L = −log p̄_c − λ ℓ(logit p̄_c − logit p̄_r).
///
/// Hong, Lee and Thorne 2024 (arXiv 2403.07691), equation 6: instruction tuning on the chosen, and
/// [`odds_ratio`] beside it; one stage from a base model.
///
/// # Shapes
/// As of [`odds_ratio`].
///
/// # Errors
/// When `lambda` is negative.
///
/// # Deviations
/// The NLL is a mean over the tokens of each completion; TRL's is a mean over all tokens of the batch, prompts
/// included where they are not masked.
pub fn orpo(mean_logprobs: &PairValues, lambda: f64) -> Result<PreferenceOutput> {
    let term = odds_ratio(mean_logprobs, lambda)?;
    let losses = &term.losses - mean_logprobs.chosen();
    Ok(term.with_losses(losses))
}

/// CPO: L = −(1−ε) ℓ(z) − ε ℓ(−z) − α log π_c, z = β(log π_c − log π_r).
///
/// Xu et al. 2024, contrastive preference optimisation (arXiv 2401.08417): DPO with a uniform reference, held
/// by behaviour cloning on the chosen. The paper has ε = 0 and α = 1.
///
/// # Shapes
/// `logprobs` are sums log π, `[P]`; rewards β log π and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, `label_smoothing` is not in [0, ½), or `nll_coef` (α) is negative.
///
/// # Deviations
/// None. TRL's NLL is a mean over all tokens of the batch: `cpo` without it beside `sft_batch_mean`.
pub fn cpo(
    logprobs: &PairValues,
    beta: f64,
    label_smoothing: f64,
    nll_coef: f64,
) -> Result<PreferenceOutput> {
    positive("likelihood::cpo", "beta", beta)?;
    smoothing_fits("likelihood::cpo", label_smoothing)?;
    not_negative("likelihood::cpo", "nll_coef", nll_coef)?;
    let mut losses = smoothed(&(logprobs.margin() * beta), label_smoothing);
    if nll_coef > 0.0 {
        losses -= logprobs.chosen() * nll_coef;
    }
    Ok(PreferenceOutput::new(losses, logprobs, beta))
}

/// SimPO: L = −(1−ε) ℓ(z) − ε ℓ(−z), z = β(log p̄_c − log p̄_r) − γ.
///
/// Meng, Xia and Chen 2024 (arXiv 2405.14734), equation 6 (with ε = 0): the reward is what decoding goes by,
/// the mean log-prob of a token, and the chosen must win by γ.
///
/// # Shapes
/// `mean_logprobs` are log p̄, `[P]`; rewards β log p̄ and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, `gamma` is negative, or `label_smoothing` is not in [0, ½).
pub fn simpo(
    mean_logprobs: &PairValues,
    beta: f64,
    gamma: f64,
    label_smoothing: f64,
) -> Result<PreferenceOutput> {
    positive("likelihood::simpo", "beta", beta)?;
    not_negative("likelihood::simpo", "gamma", gamma)?;
    smoothing_fits("likelihood::simpo", label_smoothing)?;
    let losses = smoothed(&(mean_logprobs.margin() * beta - gamma), label_smoothing);
    Ok(PreferenceOutput::new(losses, mean_logprobs, beta))
}

/// AlphaPO: L = −ℓ(β(r_c − r_r) − γ), r = (1 − p̄^−α)/α.
///
/// Gupta et al. 2025 (arXiv 2501.03884): SimPO, which is α → 0, with a reward of another shape; α > 0
/// pulls harder on unlikely completions, α < 0 on likely ones.
///
/// # Shapes
/// `mean_logprobs` are log p̄, `[P]`; rewards βr and losses `[P]`.
///
/// # Errors
/// When `beta` is not above 0, `gamma` is negative, or `alpha` is 0 (that is `simpo`) or not finite.
pub fn alphapo(
    mean_logprobs: &PairValues,
    beta: f64,
    gamma: f64,
    alpha: f64,
) -> Result<PreferenceOutput> {
    positive("likelihood::alphapo", "beta", beta)?;
    not_negative("likelihood::alphapo", "gamma", gamma)?;
    ensure(
        alpha != 0.0 && alpha.is_finite(),
        "likelihood::alphapo",
        || format!("alpha is {alpha}, expected a number other than 0"),
    )?;
    let rewards = mean_logprobs.map(|x| -((x * -alpha).expm1() / alpha));
    let losses = -(rewards.margin() * beta - gamma).log_sigmoid();
    Ok(PreferenceOutput::new(losses, &rewards, beta))
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

    fn near(out: Result<PreferenceOutput>, expected: f64) {
        let got = out.unwrap().loss.sum.double_value(&[]);
        assert!((got - expected).abs() < 1e-14, "{got} against {expected}");
    }

    #[test]
    fn by_hand() {
        let softplus = |x: f64| x.exp().ln_1p();
        // p̄ = 3/4 and 1/2: odds 3 and 1, log-odds ln 3, σ = 3/4.
        let pair = || values(0.75f64.ln(), 0.5f64.ln());
        near(odds_ratio(&pair(), 2.0), -2.0 * 0.75f64.ln());
        near(orpo(&pair(), 2.0), -3.0 * 0.75f64.ln());
        // z = 2 ln 1.5 and the NLL times ½.
        near(
            cpo(&pair(), 2.0, 0.0, 0.5),
            softplus(-2.0 * 1.5f64.ln()) - 0.5 * 0.75f64.ln(),
        );
        near(
            simpo(&pair(), 2.0, 0.3, 0.0),
            softplus(0.3 - 2.0 * 1.5f64.ln()),
        );
        // α = 1: 1 - 4/3 and 1 - 2; r_c - r_r = 2/3.
        near(
            alphapo(&pair(), 1.5, 0.3, 1.0),
            softplus(0.3 - 1.5 * 2.0 / 3.0),
        );
    }

    #[test]
    fn odds_of_the_nearly_certain_and_the_impossible() {
        for x in [-1e-30, -1e-7, -1e-3, -0.69, -0.7, -50.0, -1e4] {
            let pair = values(x, -1.0);
            let leaf = pair.chosen().set_requires_grad(true);
            let out = odds_ratio(&PairValues::new(&leaf, pair.rejected()).unwrap(), 1.0).unwrap();
            out.loss.sum.backward();
            let (loss, gradient) = (
                out.loss.sum.double_value(&[]),
                leaf.grad().double_value(&[0]),
            );
            assert!(
                loss.is_finite() && gradient.is_finite(),
                "{x}: {loss} {gradient}"
            );
        }
    }

    #[test]
    fn bad_arguments_are_named() {
        let message = |out: Result<PreferenceOutput>| out.unwrap_err().to_string();
        let pair = || values(-1.0, -2.0);
        assert!(message(orpo(&pair(), -1.0)).contains("lambda is -1"));
        assert!(message(alphapo(&pair(), 1.0, 0.0, 0.0)).contains("alpha is 0"));
        assert!(message(simpo(&pair(), 1.0, -1.0, 0.0)).contains("gamma is -1"));
        assert!(message(cpo(&pair(), 1.0, 0.0, f64::NAN)).contains("nll_coef is NaN"));
    }
}
