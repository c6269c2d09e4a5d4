//! Proximal policy optimisation with a learnt value: rewards of tokens, value loss, the two losses
//! of a step.

use rlhf_kernels::{LossSum, Offsets, Ragged};
use tch::{Kind, Tensor};

use crate::error::{Result, at_least_f32, ensure, same_offsets};
use crate::loss::clipped::{self, Clip};
use crate::loss::{PolicyInputs, PolicyOutput, RatioLevel, Reduction, to_host};

/// Which token of a completion gets its score.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
pub enum ScorePlace {
    /// The last one, as in the papers (Stiennon et al. 2020, section 3.4; Ouyang et al. 2022).
    LastToken {},
    /// TRL's place: one slot past the last token, with a KL of 0, in every completion shorter than
    /// `width`; the last token in the others. The result has that many more values, and so must the
    /// value function's output.
    OnePastLast {
        /// The padded width of the batch, in tokens.
        width: u32,
    },
}

/// Rewards of tokens: r_t = −β·kl_t, plus the completion's score where `place` says.
///
/// Ziegler et al. 2019 (arXiv 1909.08593), equation 2, spread over tokens. A completion without
/// trained tokens gets nothing: no action earned its score.
///
/// # Shapes
/// `kl` `[M]` (k1 of each token, see [`crate::kl`]); `scores` `[S]`; the result `[M]`, or `[M']` for
/// [`ScorePlace::OnePastLast`]. No gradients.
///
/// # Errors
/// When `scores` is not `[S]`, or a completion is longer than `width`.
pub fn token_rewards(
    kl: &Ragged,
    scores: &Tensor,
    kl_coef: f64,
    place: ScorePlace,
) -> Result<Ragged> {
    let op = "token rewards";
    let offsets = kl.offsets();
    same_offsets(op, kl, &[])?;
    ensure(scores.size() == [offsets.num_segments()], op, || {
        format!(
            "scores are {:?}, expected [{}]",
            scores.size(),
            offsets.num_segments()
        )
    })?;
    let penalty = at_least_f32(kl).detach() * -kl_coef;
    let (device, kind) = (penalty.device(), penalty.kind());
    let scores = scores.detach().to_kind(kind).to_device(device);
    let lengths = offsets.host_lengths();
    let extended = match place {
        ScorePlace::LastToken {} => offsets.clone(),
        ScorePlace::OnePastLast { width } => {
            let width = i64::from(width);
            ensure(lengths.iter().all(|n| *n <= width), op, || {
                format!(
                    "a completion has {:?} tokens, expected at most {width}",
                    lengths.iter().max()
                )
            })?;
            Offsets::from_lengths(
                &lengths
                    .iter()
                    .map(|n| (n + 1).min(width))
                    .collect::<Vec<_>>(),
            )?
        }
    };
    let mut kept = Vec::with_capacity(penalty.numel());
    let (mut ends, mut ended) = (Vec::new(), Vec::new());
    for (s, (w, n)) in extended.host().windows(2).zip(&lengths).enumerate() {
        kept.extend(w[0]..w[0] + n);
        if w[0] < w[1] {
            ends.push(w[1] - 1);
            ended.push(s as i64);
        }
    }
    let index = |x: &[i64]| Tensor::from_slice(x).to_device(device);
    let rewards = Tensor::zeros([extended.num_values()], (kind, device))
        .index_add(0, &index(&kept), &penalty)
        .index_add(0, &index(&ends), &scores.index_select(0, &index(&ended)));
    Ok(Ragged::new(rewards, extended)?)
}

/// Takes `penalty` from the score of every completion that did not end by itself (no EOS).
///
/// # Shapes
/// `scores` `[S]`, `ended` bool `[S]`; the result `[S]`, no gradients.
///
/// # Errors
/// When shapes differ or `ended` is not boolean.
pub fn penalize_missing_eos(scores: &Tensor, ended: &Tensor, penalty: f64) -> Result<Tensor> {
    let op = "missing-EOS penalty";
    ensure(
        scores.dim() == 1 && scores.size() == ended.size(),
        op,
        || {
            format!(
                "scores are {:?} and ended {:?}, expected the same [S]",
                scores.size(),
                ended.size()
            )
        },
    )?;
    ensure(ended.kind() == Kind::Bool, op, || {
        format!("ended is {:?}, expected Bool", ended.kind())
    })?;
    Ok(scores.detach() - ended.logical_not().to_kind(scores.kind()) * penalty)
}

/// What the value loss sees, all with the same offsets.
#[derive(Clone, Copy, Debug)]
pub struct ValueInputs<'a> {
    /// `[M]` V, with graph.
    pub values: &'a Ragged,
    /// `[M]` V when the completions were drawn.
    pub old_values: &'a Ragged,
    /// `[M]` targets.
    pub returns: &'a Ragged,
}

/// Sums over tokens that statistics are made of; they add up over micro-batches.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct ValueStats {
    /// Trained tokens.
    pub tokens: f64,
    /// Tokens whose loss is that of the clipped value.
    pub clipped: f64,
    /// Σ V.
    pub value_sum: f64,
    /// Σ R.
    pub return_sum: f64,
    /// Σ R².
    pub return_square_sum: f64,
    /// Σ (R − V).
    pub error_sum: f64,
    /// Σ (R − V)².
    pub error_square_sum: f64,
}

impl ValueStats {
    /// Adds another micro-batch.
    pub fn merge(&mut self, other: &Self) {
        self.tokens += other.tokens;
        self.clipped += other.clipped;
        self.value_sum += other.value_sum;
        self.return_sum += other.return_sum;
        self.return_square_sum += other.return_square_sum;
        self.error_sum += other.error_sum;
        self.error_square_sum += other.error_square_sum;
    }

    /// Share of tokens whose loss is that of the clipped value.
    #[must_use]
    pub fn clip_fraction(&self) -> f64 {
        self.clipped / self.tokens.max(1.0)
    }

    /// Mean value.
    #[must_use]
    pub fn value_mean(&self) -> f64 {
        self.value_sum / self.tokens.max(1.0)
    }

    /// Mean return.
    #[must_use]
    pub fn return_mean(&self) -> f64 {
        self.return_sum / self.tokens.max(1.0)
    }

    /// 1 − Var(R − V)/Var(R): 1 where the values explain the returns, 0 where they say no more than a
    /// constant; 0 where the returns do not vary.
    #[must_use]
    pub fn explained_variance(&self) -> f64 {
        let n = self.tokens.max(1.0);
        let variance = |sum: f64, squares: f64| squares / n - (sum / n).powi(2);
        let returns = variance(self.return_sum, self.return_square_sum);
        if returns <= 0.0 {
            0.0
        } else {
            1.0 - variance(self.error_sum, self.error_square_sum) / returns
        }
    }
}

/// What the value loss finds.
#[derive(Debug)]
pub struct ValueOutput {
    /// Sum over tokens; its weight is M.
    pub loss: LossSum,
    /// Facts for the log.
    pub stats: ValueStats,
}

/// L = ½ max((V − R)², (clip(V, V_old − ε, V_old + ε) − R)²); without ε, ½ (V − R)².
///
/// The clipped form is that of the published PPO code (OpenAI baselines; Engstrom et al. 2020, arXiv
/// 2005.12729, section 2), not of the paper.
///
/// # Shapes
/// All of `inputs` `[M]` with the same offsets. Differentiable in `inputs.values` only.
///
/// # Errors
/// When offsets differ or ε is not above 0.
pub fn value_loss(inputs: &ValueInputs<'_>, clip_epsilon: Option<f64>) -> Result<ValueOutput> {
    let op = "value loss";
    same_offsets(
        op,
        inputs.values,
        &[
            ("old values", inputs.old_values),
            ("returns", inputs.returns),
        ],
    )?;
    ensure(clip_epsilon.is_none_or(|e| e > 0.0), op, || {
        format!("clip is {clip_epsilon:?}, expected above 0")
    })?;
    let values = at_least_f32(inputs.values);
    let kind = values.kind();
    let old = inputs.old_values.values().detach().to_kind(kind);
    let returns = inputs.returns.values().detach().to_kind(kind);
    let plain = (&values - &returns).square();
    let (losses, clipped) = match clip_epsilon {
        None => (plain, Tensor::from(0.0)),
        Some(e) => {
            // Bounds on V itself, so that a V inside them stays the same number.
            let held = (values.clamp_tensor(Some(&old - e), Some(&old + e)) - &returns).square();
            let count = held.gt_tensor(&plain).sum(Kind::Double);
            (plain.maximum(&held), count)
        }
    };
    let error = (&returns - &values).detach();
    let total = |x: &Tensor| x.detach().sum(Kind::Double);
    let host = to_host(&[
        clipped.to_device(values.device()),
        total(&values),
        total(&returns),
        total(&returns.square()),
        total(&error),
        total(&error.square()),
    ])?;
    let stats = ValueStats {
        tokens: values.numel() as f64,
        clipped: host[0],
        value_sum: host[1],
        return_sum: host[2],
        return_square_sum: host[3],
        error_sum: host[4],
        error_square_sum: host[5],
    };
    Ok(ValueOutput {
        loss: LossSum {
            sum: losses.sum(kind) * 0.5,
            weight: values.numel() as f64,
        },
        stats,
    })
}

/// Settings of [`loss`].
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(
    feature = "train",
    derive(serde::Serialize, serde::Deserialize),
    serde(deny_unknown_fields)
)]
pub struct PpoLoss {
    /// The bounds of the policy's ratio.
    pub clip: Clip,
    /// ε of the value's clip; none: not clipped.
    #[cfg_attr(
        feature = "train",
        serde(default, skip_serializing_if = "Option::is_none")
    )]
    pub value_clip: Option<f64>,
}

/// The two losses of a PPO step. They are kept apart: policy and value may be two networks.
#[derive(Debug)]
pub struct PpoOutput {
    /// Of the policy.
    pub policy: PolicyOutput,
    /// Of the value function.
    pub value: ValueOutput,
}

impl PpoOutput {
    /// policy + `value_coef` · value, for a network that has both heads. Both are sums over the same
    /// tokens.
    #[must_use]
    pub fn combined(&self, value_coef: f64) -> LossSum {
        LossSum {
            sum: &self.policy.loss.sum + &self.value.loss.sum * value_coef,
            weight: self.policy.loss.weight,
        }
    }
}

/// The clipped surrogate at token level, meant over tokens, and the value loss.
///
/// Schulman et al. 2017 (arXiv 1707.06347), equations 7 and 9.
///
/// # Shapes
/// All `[M]` with the same offsets.
///
/// # Errors
/// When offsets differ or a setting is outside its range.
///
/// # Deviations
/// TRL's value loss also covers the slot past the end and its approximate KL averages over padding;
/// neither exists here.
pub fn loss(
    policy: &PolicyInputs<'_>,
    value: &ValueInputs<'_>,
    settings: &PpoLoss,
) -> Result<PpoOutput> {
    same_offsets("ppo", policy.logprobs, &[("values", value.values)])?;
    Ok(PpoOutput {
        policy: clipped::surrogate(
            policy,
            settings.clip,
            RatioLevel::Token,
            Reduction::Token {},
        )?,
        value: value_loss(value, settings.value_clip)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ragged(values: &[f64], lengths: &[i64]) -> Ragged {
        Ragged::new(
            Tensor::from_slice(values),
            Offsets::from_lengths(lengths).unwrap(),
        )
        .unwrap()
    }

    fn host(x: &Ragged) -> Vec<f64> {
        Vec::<f64>::try_from(x.values()).unwrap()
    }

    #[test]
    fn the_score_lies_on_the_last_token() {
        let kl = ragged(&[1.0, 2.0, 4.0], &[2, 0, 1]);
        let scores = Tensor::from_slice(&[10.0, 77.0, 20.0]);
        let rewards = token_rewards(&kl, &scores, 0.5, ScorePlace::LastToken {}).unwrap();
        assert_eq!(host(&rewards), [-0.5, 9.0, 18.0]);
        assert_eq!(rewards.offsets(), kl.offsets());
    }

    #[test]
    fn the_peers_place_is_one_past_it_where_there_is_room() {
        let kl = ragged(&[1.0, 2.0, 4.0], &[2, 1]);
        let scores = Tensor::from_slice(&[10.0, 20.0]);
        let rewards =
            token_rewards(&kl, &scores, 0.5, ScorePlace::OnePastLast { width: 2 }).unwrap();
        assert_eq!(host(&rewards), [-0.5, 9.0, -2.0, 20.0]);
        assert_eq!(rewards.offsets().host(), [0, 2, 4]);
        assert!(token_rewards(&kl, &scores, 0.5, ScorePlace::OnePastLast { width: 1 }).is_err());
        assert!(
            token_rewards(
                &kl,
                &kl.values().shallow_clone(),
                0.5,
                ScorePlace::LastToken {}
            )
            .is_err()
        );
    }

    #[test]
    fn only_cut_completions_pay() {
        let scores = Tensor::from_slice(&[1.0, 2.0]);
        let ended = Tensor::from_slice(&[true, false]);
        let after = penalize_missing_eos(&scores, &ended, 3.0).unwrap();
        assert_eq!(Vec::<f64>::try_from(&after).unwrap(), [1.0, -1.0]);
    }

    #[test]
    fn value_loss_by_hand() {
        // V 2, old 1, R 3, ε .5: plain 1, held at 1.5: 2.25, so ½·2.25. V 1.2, old 1, R 0: plain 1.44.
        let (v, old, r) = (
            ragged(&[2.0, 1.2], &[2]),
            ragged(&[1.0, 1.0], &[2]),
            ragged(&[3.0, 0.0], &[2]),
        );
        let inputs = ValueInputs {
            values: &v,
            old_values: &old,
            returns: &r,
        };
        let out = value_loss(&inputs, Some(0.5)).unwrap();
        assert!((out.loss.sum.double_value(&[]) - 0.5 * (2.25 + 1.44)).abs() < 1e-12);
        assert_eq!((out.loss.weight, out.stats.clip_fraction()), (2.0, 0.5));
        // R: 3, 0, variance 2.25; errors 1, -1.2: variance 1.21.
        assert!((out.stats.explained_variance() - (1.0 - 1.21 / 2.25)).abs() < 1e-12);
        let plain = value_loss(&inputs, None).unwrap();
        assert!((plain.loss.sum.double_value(&[]) - 0.5 * (1.0 + 1.44)).abs() < 1e-12);
        assert!(value_loss(&inputs, Some(0.0)).is_err());
    }
}
