//! Surrogates that weigh tokens instead of clipping them away.

use tch::Tensor;

use crate::error::{Result, ensure};
use crate::loss::step::Step;
use crate::loss::{PolicyInputs, PolicyOutput, RatioLevel, Reduction};

/// Per token: L = −w · A · log π, then reduced.
///
/// REINFORCE (Williams 1992): the policy gradient itself, without a ratio, so that only the first step on a batch
/// is right. With [`Reduction::SequenceSum`] it is the gradient of whole completions, as in RLOO (Ahmadian et al.
/// 2024, arXiv 2402.14740) and ReMax (arXiv 2310.10505).
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.logprobs` only.
///
/// # Errors
/// When offsets differ or the KL term belongs in the reward.
pub fn reinforce(inputs: &PolicyInputs<'_>, reduction: Reduction) -> Result<PolicyOutput> {
    let step = Step::new("reinforce", inputs, RatioLevel::Token)?;
    let losses = -&step.advantages * &step.logprobs;
    step.finish(inputs.weights, &losses, reduction, NO_BOUNDS)
}

/// Per token: L = −w · sg(clip(ρ, least, most)) · A · log π, then reduced.
///
/// CISPO, MiniMax 2025 (arXiv 2506.13585), equations 4 and 5: the importance weight is bounded, the gradient
/// of no token is cut off. The paper's ε_high is `most` − 1; it bounds above alone, which is `least` 0.
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.logprobs` only.
///
/// # Errors
/// When offsets differ, unless 0 <= `least` < 1 < `most`, or when the KL term belongs in the reward.
///
/// # Deviations
/// TRL calls `most` itself `epsilon_high`, so that PPO's 0.2 would hold every weight at a fifth; here 0.2 is
/// refused.
pub fn cispo(
    inputs: &PolicyInputs<'_>,
    (least, most): (f64, f64),
    level: RatioLevel,
    reduction: Reduction,
) -> Result<PolicyOutput> {
    let op = "cispo";
    ensure((0.0..1.0).contains(&least), op, || {
        format!("the least ratio is {least}, expected 0 to 1")
    })?;
    ensure(most > 1.0 && most.is_finite(), op, || {
        format!(
            "the largest ratio is {most}, expected above 1: it bounds ρ itself (about 5), not ρ − 1"
        )
    })?;
    let step = Step::new(op, inputs, level)?;
    let held = step.ratio.detach().clamp(least, most);
    let losses = -(held * &step.advantages) * &step.logprobs;
    step.finish(inputs.weights, &losses, reduction, (least, most))
}

/// Temperatures of [`sapo`]'s gate.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct Gate {
    /// Where A > 0 (1.0 in the paper).
    pub positive: f64,
    /// Where A <= 0 (1.05 in the paper: such tokens fade sooner).
    pub negative: f64,
}

/// Per token: L = −w · (4/τ) σ(τ(ρ − 1)) · A, then reduced.
///
/// SAPO, Gao et al. 2025 (arXiv 2511.20347): a gate that fades with the distance from ρ = 1, where its slope
/// is 1, in the place of the clip. With [`Reduction::Sequence`] as in the paper.
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.logprobs` only.
///
/// # Errors
/// When offsets differ, a temperature is not above 0, or the KL term belongs in the reward.
pub fn sapo(
    inputs: &PolicyInputs<'_>,
    gate: Gate,
    level: RatioLevel,
    reduction: Reduction,
) -> Result<PolicyOutput> {
    let op = "sapo";
    for (name, t) in [("positive", gate.positive), ("negative", gate.negative)] {
        ensure(t > 0.0 && t.is_finite(), op, || {
            format!("the {name} temperature is {t}, expected above 0")
        })?;
    }
    let step = Step::new(op, inputs, level)?;
    let temperature = by_sign(
        &step.advantages.gt(0.0),
        &step.ratio,
        gate.positive,
        gate.negative,
    );
    let gated = ((&step.ratio - 1.0) * &temperature).sigmoid() * 4.0 / temperature;
    let losses = -gated * &step.advantages;
    step.finish(inputs.weights, &losses, reduction, NO_BOUNDS)
}

/// Where nothing is clipped.
const NO_BOUNDS: (f64, f64) = (f64::NEG_INFINITY, f64::INFINITY);

/// `yes` where the mask is set, else `no`, in the type of `like`.
fn by_sign(mask: &Tensor, like: &Tensor, yes: f64, no: f64) -> Tensor {
    like.detach().full_like(no).masked_fill(mask, yes)
}

/// The shape of [`vespo`]'s weight φ(W) = e^λ W^k e^(−λW), which is 1 at W = 1.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct GammaWeight {
    /// k where A >= 0 (2).
    pub k_positive: f64,
    /// λ where A >= 0 (3).
    pub lambda_positive: f64,
    /// k where A < 0 (3).
    pub k_negative: f64,
    /// λ where A < 0 (2).
    pub lambda_negative: f64,
}

impl Default for GammaWeight {
    fn default() -> Self {
        Self {
            k_positive: 2.0,
            lambda_positive: 3.0,
            k_negative: 3.0,
            lambda_negative: 2.0,
        }
    }
}

/// Per token: L = −sg(φ(W)) · A · log π, W = Π ρ_t · Π w_t over the completion, then reduced.
///
/// VESPO, Shen et al. 2026 (arXiv 2602.10693): a smooth weight of whole completions, which falls on both sides
/// of W = 1. The weights of the sampler's mismatch are part of W. log W is held within log 1e-8 and 20 and its
/// terms within ±20, as in the published code, so that φ is finite.
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.logprobs` only.
///
/// # Errors
/// When offsets differ, k is below 0, λ is not above 0, or the KL term belongs in the reward.
pub fn vespo(
    inputs: &PolicyInputs<'_>,
    shape: GammaWeight,
    reduction: Reduction,
) -> Result<PolicyOutput> {
    let op = "vespo";
    for k in [shape.k_positive, shape.k_negative] {
        ensure(k >= 0.0 && k.is_finite(), op, || {
            format!("k is {k}, expected 0 or more")
        })?;
    }
    for lambda in [shape.lambda_positive, shape.lambda_negative] {
        ensure(lambda > 0.0 && lambda.is_finite(), op, || {
            format!("lambda is {lambda}, expected above 0")
        })?;
    }
    const MOST: f64 = 20.0;
    let least = 1e-8f64.ln();
    let step = Step::new(op, inputs, RatioLevel::Token)?;
    let mut terms = step.log_ratio.detach().clamp(-MOST, MOST);
    if let Some(w) = inputs.weights {
        terms += w
            .values()
            .detach()
            .to_kind(terms.kind())
            .log()
            .clamp(least, MOST);
    }
    let terms = step.ragged(&terms)?;
    let log_w = terms.broadcast(&terms.sum().clamp(least, MOST));
    let positive = step.advantages.ge(0.0);
    let k = by_sign(&positive, &step.ratio, shape.k_positive, shape.k_negative);
    let lambda = by_sign(
        &positive,
        &step.ratio,
        shape.lambda_positive,
        shape.lambda_negative,
    );
    let phi = (&lambda + k * &log_w - &lambda * log_w.exp()).exp();
    let losses = -(phi * &step.advantages) * &step.logprobs;
    step.finish(None, &losses, reduction, NO_BOUNDS)
}

/// Per completion: L = −A · exp(mean over tokens of the clipped log ρ), the mean over completions.
///
/// GMPO, Zhao et al. 2025 (arXiv 2507.20673), equation 4: the geometric mean of token ratios, each held from
/// above at e^ε_high where A > 0 and from below at e^−ε_low elsewhere. The paper's ε is 0.4. Each token of a
/// completion must have its advantage.
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.logprobs` only.
///
/// # Errors
/// When offsets differ, an ε is below 0, there are weights (a mean of logarithms has no place for them), or
/// the KL term belongs in the reward.
pub fn gmpo(
    inputs: &PolicyInputs<'_>,
    epsilon_low: f64,
    epsilon_high: f64,
) -> Result<PolicyOutput> {
    let op = "gmpo";
    for e in [epsilon_low, epsilon_high] {
        ensure(e >= 0.0 && e.is_finite(), op, || {
            format!("epsilon is {e}, expected 0 or more")
        })?;
    }
    ensure(inputs.weights.is_none(), op, || {
        "weights of tokens have no place in a geometric mean".into()
    })?;
    let step = Step::new(op, inputs, RatioLevel::Token)?;
    let upper = step.log_ratio.clamp_max(epsilon_high);
    let lower = step.log_ratio.clamp_min(-epsilon_low);
    let held = step.ragged(&upper.where_self(&step.advantages.gt(0.0), &lower))?;
    let losses = -held.broadcast(&held.mean().exp()) * &step.advantages;
    let bounds = ((-epsilon_low).exp(), epsilon_high.exp());
    step.finish(None, &losses, Reduction::Sequence {}, bounds)
}
