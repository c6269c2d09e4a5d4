//! The clipped policy surrogate of PPO and GRPO with its KL term, statistics and gradient in one pass.
//!
//! Ratios are of tokens; a ratio of whole completions (GSPO) is composed from [`crate::Ragged`]'s sums.
//!
//! Invariant: equal to [`mod@crate::reference`]'s composition, in value and gradient; the result does not
//! depend on the number of threads.

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi;
use crate::kl::SampledKl;
use crate::ragged::{LossSum, Ragged};
use crate::reference;

/// Settings of [`surrogate`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct SurrogateOptions {
    /// ε_low: the ratio is held at 1 − ε_low where the advantage is negative.
    pub epsilon_low: f64,
    /// ε_high: the ratio is held at 1 + ε_high where the advantage is positive.
    pub epsilon_high: f64,
    /// Where the advantage is negative the ratio counts as at most this, which is above 1 + ε_high: dual
    /// clip (Ye et al. 2020, arXiv 1912.09729, equation 5).
    pub dual: Option<f64>,
    /// How much each token counts.
    pub token_weight: TokenWeight,
}

/// How much a token's loss counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenWeight {
    /// 1; the [`LossSum`]'s weight is the number of tokens.
    One,
    /// 1/n in a completion of n tokens; the [`LossSum`]'s weight is the number of completions.
    SequenceMean,
}

/// Advantages of a surrogate.
#[derive(Clone, Copy, Debug)]
pub enum Advantages<'a> {
    /// `[M]`.
    Token(&'a Tensor),
    /// `[S]`, the same for all tokens of a completion.
    Completion(&'a Tensor),
}

/// A KL term inside the loss; see [`mod@crate::kl`] for which descends what.
#[derive(Clone, Copy, Debug)]
pub struct KlTerm<'a> {
    /// `[M]` log-probabilities under the reference.
    pub ref_logprobs: &'a Tensor,
    /// Whose value is added.
    pub value: SampledKl,
    /// Whose gradient is followed; the same as `value` unless straight-through.
    pub gradient: SampledKl,
    /// β, its weight.
    pub coef: f64,
    /// Whether the ratio multiplies it, and is differentiated too (DeepSeek-V3.2's correction for samples
    /// of an older policy).
    pub weighted: bool,
}

/// What a surrogate sees.
#[derive(Clone, Copy, Debug)]
pub struct SurrogateInputs<'a> {
    /// `[M]` log π, with graph.
    pub logprobs: &'a Ragged,
    /// `[M]` log π_old.
    pub old_logprobs: &'a Tensor,
    /// The advantages.
    pub advantages: Advantages<'a>,
    /// `[M]` importance weights of the sampler's mismatch, on the surrogate but not on the KL term.
    pub weights: Option<&'a Tensor>,
    /// The KL term.
    pub kl: Option<KlTerm<'a>>,
}

/// Sums over tokens that statistics are made of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct SurrogateStats {
    /// M.
    pub tokens: f64,
    /// Tokens with A < 0 and ρ < 1 − ε_low.
    pub clipped_low: f64,
    /// Tokens with A > 0 and ρ > 1 + ε_high.
    pub clipped_high: f64,
    /// Σ ρ.
    pub ratio_sum: f64,
    /// max ρ.
    pub ratio_max: f64,
    /// Σ ½ (log ρ)².
    pub approx_kl_sum: f64,
    /// Σ of the KL term's value before its coefficient.
    pub kl_sum: f64,
}

/// What a surrogate gives.
#[derive(Debug)]
pub struct SurrogateOutput {
    /// The loss.
    pub loss: LossSum,
    /// Facts for the log.
    pub stats: SurrogateStats,
}

/// Σ_t w_t · [−min(ρA, clip(ρ, 1−ε_low, 1+ε_high)·A) + β·k], ρ = exp(log π − log π_old).
///
/// Schulman et al. 2017 (arXiv 1707.06347), equation 7, and Shao et al. 2024 (arXiv 2402.03300), equation
/// 3; with a dual bound c and A < 0 the surrogate is −max(min(…), cA). It is one pass that
/// stores the gradient, `[M]`; on a device without kernels of its own a composition.
///
/// # Shapes
/// All `[M]` in the offsets of `inputs.logprobs`, or advantages `[S]`. Differentiable in `inputs.logprobs`
/// only.
///
/// # Errors
/// When shapes do not fit, a setting is outside its range, or libtorch fails. A second derivative is not
/// supported.
pub fn surrogate(
    inputs: &SurrogateInputs<'_>,
    options: &SurrogateOptions,
) -> Result<SurrogateOutput> {
    check(inputs, options)?;
    let kind = match inputs.logprobs.values().kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let values = inputs.logprobs.values();
    if values.device() != Device::Cpu && !ffi::has_kernels(values) {
        return reference::surrogate(inputs, options);
    }
    let logprobs = inputs.logprobs.values().to_kind(kind);
    let fixed = |t: &Tensor| t.detach().to_kind(kind);
    let (advantages, by_completion) = match inputs.advantages {
        Advantages::Token(a) => (fixed(a), false),
        Advantages::Completion(a) => (fixed(a), true),
    };
    let old = fixed(inputs.old_logprobs);
    let weights = inputs.weights.map(fixed);
    let ref_logprobs = inputs.kl.map(|k| fixed(k.ref_logprobs));
    let code = |e: SampledKl| match e {
        SampledKl::K1 => 1,
        SampledKl::K2 => 2,
        SampledKl::K3 => 3,
    };
    let raw = ffi::RawSurrogate {
        low: 1.0 - options.epsilon_low,
        high: 1.0 + options.epsilon_high,
        dual: options.dual.unwrap_or(f64::INFINITY),
        kl: inputs.kl.map_or(0.0, |k| k.coef),
        kl_value: inputs.kl.map_or(0, |k| code(k.value)),
        kl_slope: inputs.kl.map_or(0, |k| code(k.gradient)),
        kl_weighted: inputs.kl.is_some_and(|k| k.weighted).into(),
    };
    let sequence_mean = options.token_weight == TokenWeight::SequenceMean;
    let (sum, sums) = ffi::surrogate(
        &logprobs,
        [
            Some(&old),
            Some(&advantages),
            weights.as_ref(),
            ref_logprobs.as_ref(),
        ],
        inputs.logprobs.offsets().host(),
        &raw,
        (by_completion, sequence_mean),
    )?;
    let [
        _,
        clipped_low,
        clipped_high,
        ratio_sum,
        ratio_max,
        approx_kl_sum,
        kl_sum,
    ] = sums;
    Ok(SurrogateOutput {
        loss: LossSum {
            sum,
            weight: weight(inputs, options),
        },
        stats: SurrogateStats {
            tokens: inputs.logprobs.offsets().num_values() as f64,
            clipped_low,
            clipped_high,
            ratio_sum,
            ratio_max,
            approx_kl_sum,
            kl_sum,
        },
    })
}

/// What the sum is to be divided by.
pub(crate) fn weight(inputs: &SurrogateInputs<'_>, options: &SurrogateOptions) -> f64 {
    let offsets = inputs.logprobs.offsets();
    match options.token_weight {
        TokenWeight::One => offsets.num_values() as f64,
        TokenWeight::SequenceMean => offsets.num_segments() as f64,
    }
}

fn check(inputs: &SurrogateInputs<'_>, options: &SurrogateOptions) -> Result<()> {
    const OP: &str = "surrogate";
    let (m, s) = (
        inputs.logprobs.offsets().num_values(),
        inputs.logprobs.offsets().num_segments(),
    );
    let device = inputs.logprobs.values().device();
    let mut others = vec![("old log-probs", inputs.old_logprobs, m)];
    others.push(match inputs.advantages {
        Advantages::Token(a) => ("advantages", a, m),
        Advantages::Completion(a) => ("advantages", a, s),
    });
    others.extend(inputs.weights.map(|w| ("weights", w, m)));
    others.extend(
        inputs
            .kl
            .map(|k| ("reference log-probs", k.ref_logprobs, m)),
    );
    for (name, t, n) in others {
        ensure(t.size() == [n] && t.device() == device, OP, || {
            format!(
                "{name} are {:?} on {:?}, expected [{n}] on {device:?}",
                t.size(),
                t.device()
            )
        })?;
    }
    crate::linear_logprobs::check_float(OP, "log-probs", inputs.logprobs.values())?;
    ensure((0.0..=1.0).contains(&options.epsilon_low), OP, || {
        format!("epsilon_low is {}, expected 0 to 1", options.epsilon_low)
    })?;
    ensure(
        options.epsilon_high >= 0.0 && options.epsilon_high.is_finite(),
        OP,
        || {
            format!(
                "epsilon_high is {}, expected 0 or more",
                options.epsilon_high
            )
        },
    )?;
    let high = 1.0 + options.epsilon_high;
    ensure(
        options.dual.is_none_or(|d| d > high && d.is_finite()),
        OP,
        || {
            format!(
                "dual is {:?}, expected above 1 + epsilon_high = {high}",
                options.dual
            )
        },
    )?;
    ensure(inputs.kl.is_none_or(|k| k.coef.is_finite()), OP, || {
        "the KL term's coefficient is not finite".into()
    })
}
