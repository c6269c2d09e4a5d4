//! Losses of single completions called good or bad: KTO, BCO, APO-zero.
//!
//! Invariant: what a loss compares a reward with (KTO's KL, BCO's δ) is an argument, taken over the whole
//! step by the caller, so that a step may be split into micro-batches in any way.

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use super::checks::{not_negative, positive};
use super::pairs::at_least_f32;
use crate::error::{Result, ensure};

/// N completions, each with its thumb: `[N]` three times.
#[derive(Debug)]
pub struct UnpairedLogprobs {
    /// log π, with its graph.
    pub logprobs: Tensor,
    /// log π₀.
    pub ref_logprobs: Tensor,
    /// Boolean: whether the completion is desirable.
    pub desirable: Tensor,
}

impl UnpairedLogprobs {
    /// Δ, `[N]`, of type f32 at least, differentiable in the policy only.
    ///
    /// # Errors
    /// Unless log-probs are floating-point tensors, and labels a boolean one, of one shape `[N]`.
    pub fn log_ratios(&self) -> Result<Tensor> {
        let op = "unpaired log-probs";
        let all = [&self.logprobs, &self.ref_logprobs, &self.desirable];
        ensure(
            all.iter()
                .all(|t| t.dim() == 1 && t.size() == self.logprobs.size()),
            op,
            || {
                format!(
                    "are {:?}, expected one and the same [N]",
                    all.map(Tensor::size)
                )
            },
        )?;
        ensure(
            self.logprobs.is_floating_point()
                && self.ref_logprobs.is_floating_point()
                && self.desirable.kind() == Kind::Bool,
            op,
            || {
                format!(
                    "are {:?}, expected floating point twice and Bool",
                    all.map(Tensor::kind)
                )
            },
        )?;
        Ok(at_least_f32(&self.logprobs) - at_least_f32(&self.ref_logprobs).detach())
    }
}

/// What an unpaired loss gives.
#[derive(Debug)]
pub struct UnpairedOutput {
    /// Sum over completions; the weight is their number.
    pub loss: LossSum,
    /// The loss of each completion, `[N]`, with its graph.
    pub losses: Tensor,
    /// Implicit rewards βΔ, `[N]`, without a graph.
    pub rewards: Tensor,
}

impl UnpairedOutput {
    fn new(losses: Tensor, ratios: &Tensor, beta: f64) -> Self {
        Self {
            loss: LossSum {
                sum: losses.sum(None),
                weight: losses.numel() as f64,
            },
            losses,
            rewards: ratios.detach() * beta,
        }
    }
}

/// A factor of the loss of good and of bad completions: KTO's λ_D and λ_U.
///
/// Its paper advises λ_D n_D / (λ_U n_U) between 1 and 4/3, n the numbers of either.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct ThumbWeights {
    /// Of the desirable, λ_D.
    pub desirable: f64,
    /// Of the undesirable, λ_U.
    pub undesirable: f64,
}

impl Default for ThumbWeights {
    fn default() -> Self {
        Self {
            desirable: 1.0,
            undesirable: 1.0,
        }
    }
}

impl ThumbWeights {
    fn of(self, op: &'static str, desirable: &Tensor, kind: Kind) -> Result<Tensor> {
        not_negative(op, "the desirable's weight", self.desirable)?;
        not_negative(op, "the undesirable's weight", self.undesirable)?;
        let good = desirable.to_kind(kind);
        Ok(good * (self.desirable - self.undesirable) + self.undesirable)
    }
}

/// +1 for the desirable and −1 for the undesirable.
fn sign(desirable: &Tensor, kind: Kind) -> Tensor {
    desirable.to_kind(kind) * 2.0 - 1.0
}

/// KTO: L = λ (1 − σ(±β(Δ − z))), + with λ_D for the desirable, − with λ_U for the undesirable.
///
/// Ethayarajh et al. 2024 (arXiv 2402.01306): the value function of prospect theory, against a
/// reference point z, [`kl_estimate`]. The loss is bounded: what is far on the wrong side is let go.
///
/// # Shapes
/// `[N]`; rewards βΔ and losses `[N]`.
///
/// # Errors
/// When shapes differ, `beta` is not above 0, `kl` (z) is negative or a weight is negative.
pub fn kto(
    completions: &UnpairedLogprobs,
    kl: f64,
    beta: f64,
    weights: ThumbWeights,
) -> Result<UnpairedOutput> {
    positive("unpaired::kto", "beta", beta)?;
    not_negative("unpaired::kto", "kl", kl)?;
    let ratios = completions.log_ratios()?;
    let weight = weights.of("unpaired::kto", &completions.desirable, ratios.kind())?;
    let toward = (&ratios - kl) * beta * sign(&completions.desirable, ratios.kind());
    // 1 - σ(x) = σ(-x), which loses nothing where σ(x) is near 1.
    Ok(UnpairedOutput::new(
        (-toward).sigmoid() * weight,
        &ratios,
        beta,
    ))
}

/// KTO's reference point z = max(0, mean Δ) over mismatched completions: each is another row's, after this row's prompt.
///
/// It is to be taken over the whole step, and has no gradient.
///
/// # Errors
/// Unless both are floating-point tensors of one shape `[N]`, N above 0.
pub fn kl_estimate(logprobs: &Tensor, ref_logprobs: &Tensor) -> Result<f64> {
    ensure(
        logprobs.dim() == 1 && logprobs.size() == ref_logprobs.size() && logprobs.numel() > 0,
        "unpaired::kl_estimate",
        || {
            format!(
                "log-probs are {:?} and {:?}, expected the same [N] twice and not empty",
                logprobs.size(),
                ref_logprobs.size()
            )
        },
    )?;
    let mean = (at_least_f32(logprobs) - at_least_f32(ref_logprobs)).mean(Kind::Double);
    Ok(mean.double_value(&[]).max(0.0))
}

/// BCO: L = −w ℓ(±(βΔ − δ)), + for the desirable and − for the undesirable.
///
/// Jung et al. 2024 (arXiv 2404.04656): the logit of a classifier of good and bad is the implicit reward less
/// δ, the running mean of all rewards ([`RunningMoments`], this step's included). `weights` w are 1, or
/// [`density_ratio`] for the undesirable where prompts of good and bad rows differ.
///
/// # Shapes
/// `[N]`, also `weights`, taken without their graph; rewards βΔ and losses `[N]`.
///
/// # Errors
/// When shapes differ or `beta` is not above 0.
pub fn bco(
    completions: &UnpairedLogprobs,
    delta: f64,
    beta: f64,
    weights: Option<&Tensor>,
) -> Result<UnpairedOutput> {
    positive("unpaired::bco", "beta", beta)?;
    let ratios = completions.log_ratios()?;
    let toward = (&ratios * beta - delta) * sign(&completions.desirable, ratios.kind());
    let mut losses = -toward.log_sigmoid();
    if let Some(w) = weights {
        ensure(w.size() == ratios.size(), "unpaired::bco", || {
            format!("weights are {:?}, expected {:?}", w.size(), ratios.size())
        })?;
        losses *= w.detach();
    }
    Ok(UnpairedOutput::new(losses, &ratios, beta))
}

/// BCO's weights of undesirable rows whose prompts come from elsewhere than those of the desirable:
/// p/(1−p + `epsilon`) within `least..=most`, p the probability, by a classifier of prompts, that the prompt is
/// of a desirable row.
///
/// TRL has `epsilon` 1e-8, `least` 0.5 and `most` 10; the paper no `epsilon`, and with bounds none is needed.
///
/// # Errors
/// Unless 0 ≤ `least` ≤ `most` < ∞.
pub fn density_ratio(probability: &Tensor, epsilon: f64, least: f64, most: f64) -> Result<Tensor> {
    ensure(
        least >= 0.0 && least <= most && most.is_finite(),
        "unpaired::density_ratio",
        || format!("bounds are {least} and {most}, expected 0 <= least <= most"),
    )?;
    Ok((probability / (-probability + 1.0 + epsilon)).clamp(least, most))
}

/// APO-zero of unpaired completions: L = λ_D (1 − σ(βΔ)) for the desirable, λ_U σ(βΔ) for the undesirable.
///
/// D'Oosterlinck et al. 2024 (arXiv 2408.06266), the unpaired form of equation 7: KTO with z = 0.
///
/// # Shapes
/// `[N]`; rewards βΔ and losses `[N]`.
///
/// # Errors
/// When shapes differ, `beta` is not above 0, or a weight is negative.
pub fn apo_zero_unpaired(
    completions: &UnpairedLogprobs,
    beta: f64,
    weights: ThumbWeights,
) -> Result<UnpairedOutput> {
    kto(completions, 0.0, beta, weights)
}

/// Mean and deviation of all numbers seen, in f64: BCO's δ.
///
/// A checkpoint must keep it.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct RunningMoments {
    count: f64,
    mean: f64,
    /// Sum of squares about the mean.
    squares: f64,
}

impl RunningMoments {
    /// Takes in the rewards of a step (of both kinds of completions), of any shape.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn update(&mut self, rewards: &Tensor) -> Result<()> {
        let count = rewards.numel() as f64;
        if count == 0.0 {
            return Ok(());
        }
        let x = rewards.detach().f_to_kind(Kind::Double)?;
        let mean = x.mean(Kind::Double).double_value(&[]);
        let squares = (x - mean).square().sum(Kind::Double).double_value(&[]);
        // Chan, Golub and LeVeque 1979.
        let (apart, total) = (mean - self.mean, self.count + count);
        self.squares += squares + apart * apart * self.count * count / total;
        self.mean += apart * count / total;
        self.count = total;
        Ok(())
    }

    /// The mean: δ. 0 before anything was seen.
    #[must_use]
    pub fn mean(&self) -> f64 {
        self.mean
    }

    /// The deviation of a sample (divisor n − 1); 0 below two numbers.
    #[must_use]
    pub fn std(&self) -> f64 {
        if self.count > 1.0 {
            (self.squares / (self.count - 1.0)).sqrt()
        } else {
            0.0
        }
    }
}

/// The unpaired losses by name, each with its own knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum UnpairedLoss {
    /// [`kto`].
    Kto {
        /// Steepness of the value function.
        beta: f64,
        /// λ_D and λ_U.
        weights: ThumbWeights,
    },
    /// [`bco`].
    Bco {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`apo_zero_unpaired`].
    ApoZeroUnpaired {
        /// Steepness.
        beta: f64,
        /// λ_D and λ_U.
        weights: ThumbWeights,
    },
}

impl UnpairedLoss {
    /// Whether the loss has KTO's reference point z.
    #[must_use]
    pub fn asks_reference_point(&self) -> bool {
        matches!(self, Self::Kto { .. })
    }

    /// `baseline` in units of the reward: βz, δ, or 0. What is good should have a higher reward than this.
    #[must_use]
    pub fn shift(&self, baseline: f64) -> f64 {
        match *self {
            Self::Kto { beta, .. } => beta * baseline,
            Self::Bco { .. } => baseline,
            Self::ApoZeroUnpaired { .. } => 0.0,
        }
    }

    /// Checks the settings, on a completion made up for it.
    ///
    /// # Errors
    /// As [`UnpairedLoss::compute`] where settings are at fault.
    pub fn check(&self) -> Result<()> {
        let one = UnpairedLogprobs {
            logprobs: Tensor::from_slice(&[-1.0]),
            ref_logprobs: Tensor::from_slice(&[-1.0]),
            desirable: Tensor::from_slice(&[true]),
        };
        self.compute(&one, 0.0).map(drop)
    }

    /// Computes the loss. `baseline` is what it compares rewards with, over the whole step: KTO's z
    /// ([`kl_estimate`]), BCO's δ ([`RunningMoments::mean`]); APO-zero looks at none.
    ///
    /// # Errors
    /// When shapes or values do not fit.
    pub fn compute(&self, completions: &UnpairedLogprobs, baseline: f64) -> Result<UnpairedOutput> {
        match *self {
            Self::Kto { beta, weights } => kto(completions, baseline, beta, weights),
            Self::Bco { beta } => bco(completions, baseline, beta, None),
            Self::ApoZeroUnpaired { beta, weights } => {
                apo_zero_unpaired(completions, beta, weights)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(x: &Tensor) -> Vec<f64> {
        Vec::<f64>::try_from(x).unwrap()
    }

    fn near(got: &Tensor, expected: &[f64]) {
        for (g, e) in host(got).iter().zip(expected) {
            assert!((g - e).abs() < 1e-15, "{g} against {e}");
        }
    }

    /// Δ = ln 3 and good, Δ = -ln 2 and bad.
    fn two() -> UnpairedLogprobs {
        UnpairedLogprobs {
            logprobs: Tensor::from_slice(&[3f64.ln() - 4.0, -(2f64.ln()) - 4.0]),
            ref_logprobs: Tensor::from_slice(&[-4.0, -4.0]),
            desirable: Tensor::from_slice(&[true, false]),
        }
    }

    #[test]
    fn by_hand() {
        let weights = ThumbWeights {
            desirable: 2.0,
            undesirable: 3.0,
        };
        // z = ln 3: σ(0) = ½, and σ(z - Δ) = σ(ln 6) = 6/7.
        let out = kto(&two(), 3f64.ln(), 1.0, weights).unwrap();
        near(&out.losses, &[1.0, 3.0 / 7.0]);
        assert_eq!(out.loss.weight, 2.0);
        near(&out.rewards, &[3f64.ln(), -(2f64.ln())]);
        // 1 - 3/4 and 1/3.
        let out = apo_zero_unpaired(&two(), 1.0, weights).unwrap();
        near(&out.losses, &[0.5, 1.0]);
        let out = bco(
            &two(),
            3f64.ln(),
            1.0,
            Some(&Tensor::from_slice(&[1.0, 2.0])),
        )
        .unwrap();
        near(&out.losses, &[2f64.ln(), -2.0 * (6f64 / 7.0).ln()]);
    }

    #[test]
    fn the_reference_point() {
        let column = |x: [f64; 2]| Tensor::from_slice(&x);
        let zero = column([0.0, 0.0]);
        assert_eq!(kl_estimate(&column([-1.0, 4.0]), &zero).unwrap(), 1.5);
        assert_eq!(kl_estimate(&column([-1.0, -4.0]), &zero).unwrap(), 0.0);
        let none = Tensor::from_slice(&[0f64; 0]);
        assert!(kl_estimate(&none, &none).is_err());
    }

    #[test]
    fn running_moments() {
        // 1 2 3 4 in two parts: mean 2.5, sample variance 5/3.
        let mut running = RunningMoments::default();
        assert_eq!((running.mean(), running.std()), (0.0, 0.0));
        running.update(&Tensor::from_slice(&[1.0])).unwrap();
        running.update(&Tensor::from_slice(&[0f64; 0])).unwrap();
        running
            .update(&Tensor::from_slice(&[2.0, 3.0, 4.0]))
            .unwrap();
        assert!((running.mean() - 2.5).abs() < 1e-15);
        assert!((running.std() - (5f64 / 3.0).sqrt()).abs() < 1e-15);
    }

    #[test]
    fn density_ratios_are_bounded() {
        let p = Tensor::from_slice(&[0.0, 0.5, 0.75, 1.0]);
        let got = density_ratio(&p, 0.0, 0.5, 10.0).unwrap();
        assert_eq!(host(&got), [0.5, 1.0, 3.0, 10.0]);
        assert!(density_ratio(&p, 0.0, 2.0, 1.0).is_err());
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let crooked = UnpairedLogprobs {
            desirable: Tensor::from_slice(&[1i64, 0]),
            ..two()
        };
        let message = |c: &UnpairedLogprobs, kl| {
            kto(c, kl, 1.0, ThumbWeights::default())
                .unwrap_err()
                .to_string()
        };
        assert!(message(&crooked, 0.0).contains("Int64"));
        assert!(message(&two(), -1.0).contains("kl is -1"));
    }
}
