//! Which tokens and completions teach: weights of 0 and 1 for [`PolicyInputs::weights`](super::PolicyInputs).

use rlhf_kernels::{LossSum, Ragged};

use crate::error::{Result, at_least_f32, ensure, same_offsets};
use crate::loss::Reduction;

/// 1 for the tokens of the highest entropy, a share of all, and 0 for the others.
///
/// Wang et al. 2025 (arXiv 2506.01939), "Beyond the 80/20 rule": forking tokens alone, a share of 0.2. The
/// bound is the linearly interpolated quantile of all that is given, so give a whole step.
///
/// # Shapes
/// `entropy` and the result `[M]`; no gradients.
///
/// # Errors
/// Unless 0 < `share` <= 1 and the entropies are floating point.
pub fn high_entropy(entropy: &Ragged, share: f64) -> Result<Ragged> {
    let op = "high entropy";
    ensure(share > 0.0 && share <= 1.0, op, || {
        format!("the share is {share}, expected above 0 to 1")
    })?;
    ensure(entropy.values().is_floating_point(), op, || {
        format!(
            "entropies are {:?}, expected floating point",
            entropy.values().kind()
        )
    })?;
    let values = at_least_f32(entropy).detach();
    if values.numel() == 0 {
        return Ok(entropy.with_values(values)?);
    }
    // Not `quantile`, which takes 16 million values at most.
    let (sorted, _) = values.sort(0, false);
    let at = (1.0 - share) * (values.numel() as f64 - 1.0);
    let (below, part) = (at.floor(), at - at.floor());
    let of = |i: f64| sorted.get((i as i64).min(values.numel() as i64 - 1));
    let bound = of(below).lerp(&of(below + 1.0), part);
    Ok(entropy.with_values(values.ge_tensor(&bound).to_kind(values.kind()))?)
}

/// 0 for the tokens of completions with a negative advantage that the policy has left behind: whose mean of
/// log μ − log π is above `threshold`; 1 for the others.
///
/// DeepSeek-AI 2025 (DeepSeek-V3.2, arXiv 2512.02556), section 3.1: what the policy would no longer write
/// should not push it.
///
/// # Shapes
/// All `[M]` with the same offsets; a completion's advantage is that of its first token. No gradients.
///
/// # Errors
/// When offsets differ or the threshold is NaN.
pub fn on_policy(
    logprobs: &Ragged,
    sampler_logprobs: &Ragged,
    advantages: &Ragged,
    threshold: f64,
) -> Result<Ragged> {
    let op = "on-policy mask";
    let others = [
        ("sampler log-probs", sampler_logprobs),
        ("advantages", advantages),
    ];
    same_offsets(op, logprobs, &others)?;
    ensure(!threshold.is_nan(), op, || "the threshold is NaN".into())?;
    let gap = (at_least_f32(sampler_logprobs) - at_least_f32(logprobs)).detach();
    let kind = gap.kind();
    let gap = logprobs.with_values(gap)?;
    let near = gap.broadcast(&gap.mean()).le(threshold);
    let kept = near.logical_or(&advantages.values().detach().ge(0.0));
    Ok(logprobs.with_values(kept.to_kind(kind))?)
}

/// −coef · H per token, reduced: the entropy bonus of Williams and Peng 1991, "Function optimization using
/// connectionist reinforcement learning algorithms". TRL's is the mean over tokens, [`Reduction::Token`],
/// whatever its policy loss does.
///
/// # Shapes
/// `entropy` `[M]`, with graph.
///
/// # Errors
/// When `coef` is not finite.
pub fn entropy_bonus(entropy: &Ragged, coef: f64, reduction: Reduction) -> Result<LossSum> {
    ensure(coef.is_finite(), "entropy bonus", || {
        format!("coef is {coef}, expected a finite number")
    })?;
    Ok(reduction.reduce(&entropy.with_values(at_least_f32(entropy) * -coef)?))
}
