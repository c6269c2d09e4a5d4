//! From the log-probs of tokens to what losses of pairs see, and the modifiers that need tokens: LD-DPO and
//! WPO.

use rlhf_kernels::Ragged;
use tch::Tensor;

use super::PairValues;
use super::checks::not_negative;
use super::pairs::at_least_f32;
use crate::error::{Result, ensure};

/// A value of each trained token of the chosen and of the rejected completions of P pairs.
#[derive(Clone, Debug)]
pub struct PairTokens {
    chosen: Ragged,
    rejected: Ragged,
}

impl PairTokens {
    /// The tokens of P chosen and of P rejected completions; f16 and bf16 become f32.
    ///
    /// # Errors
    /// Unless there are as many chosen as rejected, of floating-point values.
    pub fn new(chosen: &Ragged, rejected: &Ragged) -> Result<Self> {
        let counts = [chosen, rejected].map(|r| r.offsets().num_segments());
        ensure(counts[0] == counts[1], "pair tokens", || {
            format!(
                "{} chosen and {} rejected completions, expected as many of either",
                counts[0], counts[1]
            )
        })?;
        let column = |r: &Ragged| {
            ensure(r.values().is_floating_point(), "pair tokens", || {
                format!(
                    "values are {:?}, expected floating point",
                    r.values().kind()
                )
            })?;
            Ok::<_, crate::Error>(r.with_values(at_least_f32(r.values()))?)
        };
        Ok(Self {
            chosen: column(chosen)?,
            rejected: column(rejected)?,
        })
    }

    /// Those of the chosen.
    pub fn chosen(&self) -> &Ragged {
        &self.chosen
    }

    /// Those of the rejected.
    pub fn rejected(&self) -> &Ragged {
        &self.rejected
    }

    /// The sum of each completion: log π where the values are log-probs.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn sums(&self) -> Result<PairValues> {
        PairValues::new(&self.chosen.sum(), &self.rejected.sum())
    }

    /// The number of tokens of each completion.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn lengths(&self) -> Result<PairValues> {
        let column = |r: &Ragged| {
            r.offsets()
                .lengths(r.values().device())
                .to_kind(r.values().kind())
        };
        PairValues::new(&column(&self.chosen), &column(&self.rejected))
    }

    /// LD-DPO's log-probs: each completion's sum with the tokens past the length of the pair's shorter one
    /// counted `alpha` times.
    ///
    /// Liu et al. 2024, length-desensitised DPO (arXiv 2409.06411): at 1 these are [`sums`](Self::sums), at 0
    /// both completions are cut to one length. Policy and reference take the same `alpha`.
    ///
    /// # Errors
    /// When `alpha` is not in [0, 1].
    pub fn length_desensitized(&self, alpha: f64) -> Result<PairValues> {
        not_negative("length_desensitized", "alpha", alpha)?;
        ensure(alpha <= 1.0, "length_desensitized", || {
            format!("alpha is {alpha}, expected at most 1")
        })?;
        let lengths = [&self.chosen, &self.rejected].map(|r| r.offsets().host_lengths());
        let shared: Vec<i64> = lengths[0]
            .iter()
            .zip(&lengths[1])
            .map(|(c, r)| *c.min(r))
            .collect();
        let sum = |tokens: &Ragged, lengths: &[i64]| -> Result<Tensor> {
            let mut factors: Vec<f64> = Vec::with_capacity(tokens.values().numel());
            for (n, shared) in lengths.iter().zip(&shared) {
                factors.extend((0..*n).map(|i| if i < *shared { 1.0 } else { alpha }));
            }
            let x = tokens.values();
            let factors = Tensor::from_slice(&factors)
                .to_kind(x.kind())
                .to_device(x.device());
            Ok(tokens.with_values(x * factors)?.sum())
        };
        PairValues::new(
            &sum(&self.chosen, &lengths[0])?,
            &sum(&self.rejected, &lengths[1])?,
        )
    }

    /// WPO's weight of each pair, `[P]`, without a graph: w_c w_r with w = exp(mean over tokens of
    /// log π − log Σ_v π(v)²). `self` are log-probs, `log_sum_sq_probs` the second term
    /// (`rlhf_kernels::Moments` gives it).
    ///
    /// Zhou et al. 2024 (arXiv 2406.11827), equation 2 with the sampled alignment: pairs that the policy
    /// itself would hardly write count less.
    ///
    /// # Errors
    /// When the two are of other tokens.
    pub fn wpo_weights(&self, log_sum_sq_probs: &Self) -> Result<Tensor> {
        let mean = |x: &Ragged, norm: &Ragged| {
            ensure(x.offsets() == norm.offsets(), "wpo_weights", || {
                "log_sum_sq_probs are of other tokens than the log-probs".into()
            })?;
            let aligned = x.values().detach() - norm.values().detach();
            Ok::<_, crate::Error>(x.with_values(aligned)?.mean())
        };
        let chosen = mean(&self.chosen, &log_sum_sq_probs.chosen)?;
        let rejected = mean(&self.rejected, &log_sum_sq_probs.rejected)?;
        Ok((chosen + rejected).exp())
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;

    fn ragged(values: &[f64], lengths: &[i64]) -> Ragged {
        Ragged::new(
            Tensor::from_slice(values),
            Offsets::from_lengths(lengths).unwrap(),
        )
        .unwrap()
    }

    fn host(x: &Tensor) -> Vec<f64> {
        Vec::<f64>::try_from(x).unwrap()
    }

    #[test]
    fn by_hand() {
        // Pairs of lengths (2, 1) and (1, 3).
        let tokens = PairTokens::new(
            &ragged(&[-1.0, -2.0, -4.0], &[2, 1]),
            &ragged(&[-8.0, -0.5, -3.0, -5.0], &[1, 3]),
        )
        .unwrap();
        assert_eq!(host(tokens.sums().unwrap().chosen()), [-3.0, -4.0]);
        assert_eq!(host(tokens.lengths().unwrap().rejected()), [1.0, 3.0]);
        let half = tokens.length_desensitized(0.5).unwrap();
        assert_eq!(host(half.chosen()), [-2.0, -4.0]);
        assert_eq!(host(half.rejected()), [-8.0, -4.5]);
        let whole = tokens.length_desensitized(1.0).unwrap();
        assert_eq!(
            host(whole.rejected()),
            host(tokens.sums().unwrap().rejected())
        );
        // Norms of -1: means of the first pair -½ and -7, of the second -3 and -(-0.5 + 2 + 4)/3 = -11/6.
        let norms =
            PairTokens::new(&ragged(&[-1.0; 3], &[2, 1]), &ragged(&[-1.0; 4], &[1, 3])).unwrap();
        let weights = host(&tokens.wpo_weights(&norms).unwrap());
        assert!((weights[0] - (-7.5f64).exp()).abs() < 1e-15);
        assert!((weights[1] - (-3.0f64 - 11.0 / 6.0).exp()).abs() < 1e-15);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let one = ragged(&[-1.0], &[1]);
        let two = ragged(&[-1.0, -1.0], &[1, 1]);
        let message = PairTokens::new(&one, &two).unwrap_err().to_string();
        assert!(message.contains("1 chosen and 2 rejected"), "{message}");
        let tokens = PairTokens::new(&two, &two).unwrap();
        assert!(tokens.length_desensitized(1.5).is_err());
        let other = PairTokens::new(&ragged(&[-1.0; 2], &[2, 0]), &two).unwrap();
        assert!(tokens.wpo_weights(&other).is_err());
    }
}
