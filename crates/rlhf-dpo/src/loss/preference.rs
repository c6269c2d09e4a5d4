//! The losses of pairs by name, and weighted mixtures of them.

use tch::Tensor;

use super::{Divergence, PairLogprobs, PairValues, Pairs, PreferenceOutput};
use super::{absolute, aot, dpo, likelihood, margin, nll};
use crate::error::{Result, ensure};

/// The preference losses by name, each with its own knobs.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
#[non_exhaustive]
pub enum PreferenceLoss {
    /// DPO; with label smoothing, conservative DPO: [`dpo::sigmoid`].
    Sigmoid {
        /// Strength of the reference.
        beta: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
    },
    /// Length-normalised DPO (Tülu 3), TRL's `sigmoid_norm`: [`dpo::sigmoid`] of log-ratios per token.
    SigmoidPerToken {
        /// Strength of the reference.
        beta: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
    },
    /// [`dpo::robust`].
    Robust {
        /// Strength of the reference.
        beta: f64,
        /// Known rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
    },
    /// [`dpo::odpo`] with the paper's offset of scores.
    Odpo {
        /// Strength of the reference.
        beta: f64,
        /// Scale of the offset α log(score_c − score_r).
        alpha: f64,
    },
    /// [`dpo::dpo_positive`].
    DpoPositive {
        /// Strength of the reference.
        beta: f64,
        /// What a lost nat of the chosen counts.
        lambda: f64,
    },
    /// [`dpo::cal_dpo`].
    CalDpo {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`margin::hinge`].
    Hinge {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`margin::ipo`] of sums, the paper's.
    Ipo {
        /// Strength of the reference (the paper's τ).
        beta: f64,
    },
    /// [`margin::ipo`] of log-ratios per token: TRL's `ipo`.
    IpoPerToken {
        /// Strength of the reference (the paper's τ).
        beta: f64,
    },
    /// [`margin::exo_pair`].
    ExoPair {
        /// Strength of the reference.
        beta: f64,
        /// Assumed rate of wrong labels, above 0 and below ½.
        label_smoothing: f64,
    },
    /// [`margin::discopop`].
    Discopop {
        /// Strength of the reference.
        beta: f64,
        /// Temperature of the modulation; the paper's is 0.05.
        tau: f64,
    },
    /// [`margin::rebel`].
    Rebel {
        /// Step size: 1/β.
        eta: f64,
    },
    /// [`margin::reward_aware`].
    RewardAware {
        /// Strength of the reference.
        beta: f64,
        /// Scale of the rewards.
        eta: f64,
    },
    /// [`absolute::nca_pair`].
    NcaPair {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`absolute::bco_pair`] with the δ of the [`Pairs`].
    BcoPair {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`absolute::sppo_hard`].
    SppoHard {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`absolute::apo_zero`].
    ApoZero {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`absolute::apo_down`].
    ApoDown {
        /// Strength of the reference.
        beta: f64,
    },
    /// [`aot::aot`].
    Aot {
        /// Strength of the reference.
        beta: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
    },
    /// [`aot::aot_unpaired`].
    AotUnpaired {
        /// Strength of the reference.
        beta: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
    },
    /// [`likelihood::orpo`].
    Orpo {
        /// Weight of the odds-ratio term.
        lambda: f64,
    },
    /// [`likelihood::cpo`].
    Cpo {
        /// Scale of the margin.
        beta: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
        /// Weight of the chosen's NLL; the paper's is 1.
        nll_coef: f64,
    },
    /// [`likelihood::simpo`].
    Simpo {
        /// Scale of the margin.
        beta: f64,
        /// Margin to win by.
        gamma: f64,
        /// Assumed rate of wrong labels, 0 to ½.
        #[cfg_attr(feature = "serde", serde(default))]
        label_smoothing: f64,
    },
    /// [`likelihood::alphapo`].
    Alphapo {
        /// Scale of the margin.
        beta: f64,
        /// Margin to win by.
        gamma: f64,
        /// Shape of the reward, not 0.
        alpha: f64,
    },
    /// [`nll::sft`]: the NLL of the chosen, each completion's mean.
    Sft,
    /// [`nll::sft_batch_mean`]: TRL's `sft`, one mean over the tokens of the call.
    SftBatchMean,
}

fn needed<'a>(column: Option<&'a PairValues>, name: &str) -> Result<&'a PairValues> {
    column.ok_or_else(|| crate::Error::Argument {
        op: "preference loss",
        what: format!("this loss asks for the pairs' {name}, none were given"),
    })
}

impl PreferenceLoss {
    /// Computes the loss.
    ///
    /// # Errors
    /// When shapes or values do not fit, or the loss asks for lengths or scores and there are none.
    pub fn compute(&self, pairs: &Pairs) -> Result<PreferenceOutput> {
        self.compute_under(pairs, Divergence::ReverseKl)
    }

    /// Whether the loss has a reference at all.
    #[must_use]
    pub fn has_reference(&self) -> bool {
        !matches!(
            self,
            Self::Orpo { .. }
                | Self::Cpo { .. }
                | Self::Simpo { .. }
                | Self::Alphapo { .. }
                | Self::Sft
                | Self::SftBatchMean
        )
    }

    /// Whether the loss asks for scores of the completions.
    #[must_use]
    pub fn asks_scores(&self) -> bool {
        matches!(
            self,
            Self::Odpo { .. } | Self::Rebel { .. } | Self::RewardAware { .. }
        )
    }

    /// Whether the losses are of quantiles and not of pairs.
    fn sorts(&self) -> bool {
        matches!(self, Self::Aot { .. } | Self::AotUnpaired { .. })
    }

    fn compute_under(&self, pairs: &Pairs, divergence: Divergence) -> Result<PreferenceOutput> {
        let takes_one = self.has_reference() && !matches!(self, Self::Aot { .. });
        ensure(
            takes_one || divergence == Divergence::ReverseKl,
            "preference loss",
            || format!("{self:?} is not a function of log-ratios: {divergence:?} says nothing"),
        )?;
        let out = self.unweighted(pairs, divergence)?;
        let Some(weights) = &pairs.weights else {
            return Ok(out);
        };
        ensure(!self.sorts(), "preference loss", || {
            format!("{self:?} sorts the pairs: weights of pairs have no place in it")
        })?;
        ensure(
            weights.size() == out.losses.size(),
            "preference loss",
            || {
                format!(
                    "weights are {:?}, expected {:?}",
                    weights.size(),
                    out.losses.size()
                )
            },
        )?;
        let losses = &out.losses * weights.detach();
        Ok(out.with_losses(losses))
    }

    fn unweighted(&self, pairs: &Pairs, divergence: Divergence) -> Result<PreferenceOutput> {
        let logprobs = &pairs.logprobs;
        let ratios = divergence.of_ratios(&logprobs.log_ratios()?)?;
        let lengths = || needed(pairs.lengths.as_ref(), "lengths");
        let scores = || needed(pairs.scores.as_ref(), "scores");
        let mean_logprobs = || logprobs.policy()?.per_token(lengths()?);
        match *self {
            Self::Sigmoid {
                beta,
                label_smoothing,
            } => dpo::sigmoid(&ratios, beta, label_smoothing),
            Self::SigmoidPerToken {
                beta,
                label_smoothing,
            } => dpo::sigmoid(&ratios.per_token(lengths()?)?, beta, label_smoothing),
            Self::Robust {
                beta,
                label_smoothing,
            } => dpo::robust(&ratios, beta, label_smoothing),
            Self::Odpo { beta, alpha } => {
                dpo::odpo(&ratios, &dpo::score_offset(scores()?, alpha)?, beta)
            }
            Self::DpoPositive { beta, lambda } => dpo::dpo_positive(&ratios, beta, lambda),
            Self::CalDpo { beta } => dpo::cal_dpo(&ratios, beta),
            Self::Hinge { beta } => margin::hinge(&ratios, beta),
            Self::Ipo { beta } => margin::ipo(&ratios, beta),
            Self::IpoPerToken { beta } => margin::ipo(&ratios.per_token(lengths()?)?, beta),
            Self::ExoPair {
                beta,
                label_smoothing,
            } => margin::exo_pair(&ratios, beta, label_smoothing),
            Self::Discopop { beta, tau } => margin::discopop(&ratios, beta, tau),
            Self::Rebel { eta } => margin::rebel(&ratios, scores()?, eta),
            Self::RewardAware { beta, eta } => margin::reward_aware(&ratios, scores()?, beta, eta),
            Self::NcaPair { beta } => absolute::nca_pair(&ratios, beta),
            Self::BcoPair { beta } => absolute::bco_pair(&ratios, beta, pairs.delta),
            Self::SppoHard { beta } => absolute::sppo_hard(&ratios, beta),
            Self::ApoZero { beta } => absolute::apo_zero(&ratios, beta),
            Self::ApoDown { beta } => absolute::apo_down(&ratios, beta),
            Self::Aot {
                beta,
                label_smoothing,
            } => aot::aot(logprobs, beta, label_smoothing),
            Self::AotUnpaired {
                beta,
                label_smoothing,
            } => aot::aot_unpaired(&ratios, beta, label_smoothing),
            Self::Orpo { lambda } => likelihood::orpo(&mean_logprobs()?, lambda),
            Self::Cpo {
                beta,
                label_smoothing,
                nll_coef,
            } => likelihood::cpo(&logprobs.policy()?, beta, label_smoothing, nll_coef),
            Self::Simpo {
                beta,
                gamma,
                label_smoothing,
            } => likelihood::simpo(&mean_logprobs()?, beta, gamma, label_smoothing),
            Self::Alphapo { beta, gamma, alpha } => {
                likelihood::alphapo(&mean_logprobs()?, beta, gamma, alpha)
            }
            Self::Sft => nll::sft(&logprobs.policy()?, lengths()?, &ratios),
            Self::SftBatchMean => nll::sft_batch_mean(&logprobs.policy()?, lengths()?, &ratios),
        }
    }
}

/// One loss of a [`PreferenceMix`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct WeightedLoss {
    /// Its factor.
    pub weight: f64,
    /// The loss.
    pub loss: PreferenceLoss,
}

/// A weighted sum of losses, under one divergence: DPO with an NLL term (Pang et al. 2024, arXiv 2404.19733),
/// or MPO's 0.8 `sigmoid` + 0.2 `bco_pair` + 1 `sft` (Wang et al. 2024, arXiv 2411.10442).
#[derive(Clone, Debug, Default, PartialEq)]
#[cfg_attr(
    feature = "serde",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct PreferenceMix {
    /// The losses; rewards and accuracy are those of the first.
    pub terms: Vec<WeightedLoss>,
    /// What ties the policy to the reference, for every term that has one.
    #[cfg_attr(feature = "serde", serde(default))]
    pub divergence: Divergence,
    /// Leaves the reference out: log π₀ = 0.
    #[cfg_attr(feature = "serde", serde(default))]
    pub reference_free: bool,
}

impl From<PreferenceLoss> for PreferenceMix {
    fn from(loss: PreferenceLoss) -> Self {
        Self {
            terms: vec![WeightedLoss { weight: 1.0, loss }],
            ..Self::default()
        }
    }
}

impl PreferenceMix {
    /// Checks the settings, on a pair made up for it.
    ///
    /// # Errors
    /// As [`PreferenceMix::compute`] where settings are at fault.
    pub fn check(&self) -> Result<()> {
        let column = |x: f64| Tensor::from_slice(&[x]);
        let pair = |c: f64, r: f64| PairValues::new(&column(c), &column(r));
        let pairs = Pairs {
            lengths: Some(pair(1.0, 1.0)?),
            scores: Some(pair(1.0, 0.0)?),
            ..PairLogprobs::new(&pair(-1.0, -1.0)?, &pair(-1.0, -1.0)?).into()
        };
        self.compute(&pairs).map(drop)
    }

    /// Computes the sum. Terms without log-ratios (`orpo`, `cpo`, `simpo`, `alphapo`, the NLL) are outside the divergence.
    ///
    /// # Errors
    /// When there is no term, a weight is not finite, a divergence other than the reverse KL meets `aot` or no
    /// term at all, or a term fails.
    pub fn compute(&self, pairs: &Pairs) -> Result<PreferenceOutput> {
        let Some((first, rest)) = self.terms.split_first() else {
            return Err(crate::Error::Argument {
                op: "preference mix",
                what: "it has no terms".into(),
            });
        };
        let free;
        let pairs = if self.reference_free {
            free = without_reference(pairs)?;
            &free
        } else {
            pairs
        };
        let tied = self.terms.iter().any(|t| t.loss.has_reference());
        let part = |term: &WeightedLoss| -> Result<PreferenceOutput> {
            ensure(term.weight.is_finite(), "preference mix", || {
                format!("a weight is {}", term.weight)
            })?;
            let divergence = if term.loss.has_reference() || !tied {
                self.divergence
            } else {
                Divergence::ReverseKl
            };
            let out = term.loss.compute_under(pairs, divergence)?;
            let losses = &out.losses * term.weight;
            Ok(out.with_losses(losses))
        };
        let mut sum = part(first)?;
        for term in rest {
            let losses = &sum.losses + part(term)?.losses;
            sum = sum.with_losses(losses);
        }
        Ok(sum)
    }
}

fn without_reference(pairs: &Pairs) -> Result<Pairs> {
    let copy = |v: &PairValues| v.map(Tensor::shallow_clone);
    Ok(Pairs {
        logprobs: PairLogprobs::reference_free(&pairs.logprobs.policy()?),
        lengths: pairs.lengths.as_ref().map(copy),
        scores: pairs.scores.as_ref().map(copy),
        weights: pairs.weights.as_ref().map(Tensor::shallow_clone),
        delta: pairs.delta,
    })
}
