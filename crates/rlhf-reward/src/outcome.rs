//! Outcome reward models: is the final answer right, said at every token or once.
//!
//! Invariant: a logit's sigmoid is the probability that the completion ends in the right answer.

use rlhf_kernels::{LossSum, Ragged};
use tch::Tensor;

use crate::checks::{self, at_least_f32, weighted};
use crate::error::Result;

const OP: &str = "outcome";

/// One number of a sequence's logits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pool {
    /// The last token's.
    Last,
    /// Their mean.
    Mean,
}

/// L = Σ_s w_s Σ_t BCE(z_st, y_s): every token of a completion predicts how it ends; its weight is
/// Σ_s w_s n_s, the weighted number of tokens.
///
/// Cobbe et al. 2021 (arXiv 2110.14168), section 4.2, token-level verifier.
///
/// # Shapes
/// `logits` `[M]` of S completions; `correct` `[S]` y, 0 or 1 or a probability between; `weights` `[S]`,
/// 1 where absent.
///
/// # Errors
/// When shapes differ, a label is outside 0..=1, or a weight is negative or not finite.
///
/// # Deviations
/// None of the verifier's loss; Cobbe et al. add the language model's, which is SFT's.
pub fn per_token(logits: &Ragged, correct: &Tensor, weights: Option<&Tensor>) -> Result<LossSum> {
    let (values, labels) = (
        at_least_f32(logits.values()),
        labels(logits, correct, weights)?,
    );
    let labels = logits.broadcast(&labels.to_kind(values.kind()));
    let weights = weights.map(|w| logits.broadcast(&w.detach().to_kind(values.kind())));
    Ok(weighted(&bce(&values, &labels), weights.as_ref()))
}

/// L = Σ_s w_s BCE(pool_t z_st, y_s): one prediction a completion; its weight is Σ w.
///
/// Cobbe et al. 2021 (arXiv 2110.14168), section 4.2, solution-level verifier.
///
/// # Shapes
/// As [`per_token`].
///
/// # Errors
/// As [`per_token`]; an empty completion has logit 0.
pub fn pooled(
    logits: &Ragged,
    correct: &Tensor,
    pool: Pool,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    let labels = labels(logits, correct, weights)?;
    let one = pool_logits(logits, pool)?;
    let labels = labels.to_kind(one.kind());
    Ok(weighted(&bce(&one, &labels), weights))
}

/// `[S]` the pooled logit of each completion; its sigmoid is the probability of being right.
///
/// # Errors
/// When libtorch fails.
pub fn pool_logits(logits: &Ragged, pool: Pool) -> Result<Tensor> {
    let logits = logits.with_values(at_least_f32(logits.values()))?;
    Ok(match pool {
        Pool::Last => logits.last(0.0),
        Pool::Mean => logits.mean(),
    })
}

/// −y log σ(z) − (1−y) log σ(−z), stable for any z.
pub(crate) fn bce(logits: &Tensor, labels: &Tensor) -> Tensor {
    -(-logits).log_sigmoid() - labels * logits
}

fn labels(logits: &Ragged, correct: &Tensor, weights: Option<&Tensor>) -> Result<Tensor> {
    let size = [logits.offsets().num_segments()];
    checks::vectors(OP, &[("logits", Some(logits.values()))])?;
    checks::shaped(OP, "correct", correct, &size)?;
    checks::probabilities(OP, "correct", correct)?;
    if let Some(w) = weights {
        checks::shaped(OP, "weights", w, &size)?;
    }
    checks::weights(OP, weights)?;
    Ok(correct.detach())
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;

    fn logits() -> Ragged {
        let offsets = Offsets::from_lengths(&[2, 1]).unwrap();
        Ragged::new(Tensor::from_slice(&[0.0, 1.5, 2.0]), offsets).unwrap()
    }

    #[test]
    fn by_hand() {
        let correct = Tensor::from_slice(&[1.0, 0.0]);
        // −log σ(0) = ln 2, −log σ(1.5) = .2014, −log σ(−2) = ln(1 + e²).
        let (a, b, c) = (
            std::f64::consts::LN_2,
            0.201_413_277_982_752_4,
            (1.0 + 2f64.exp()).ln(),
        );
        let out = per_token(&logits(), &correct, None).unwrap();
        assert!((out.sum.double_value(&[]) - (a + b + c)).abs() < 1e-15);
        assert_eq!(out.weight, 3.0);
        let w = Tensor::from_slice(&[0.5, 2.0]);
        let out = per_token(&logits(), &correct, Some(&w)).unwrap();
        assert!((out.sum.double_value(&[]) - (0.5 * (a + b) + 2.0 * c)).abs() < 1e-15);
        assert_eq!(out.weight, 3.0);
        let last = pooled(&logits(), &correct, Pool::Last, None).unwrap();
        assert!((last.sum.double_value(&[]) - (b + c)).abs() < 1e-15);
        assert_eq!(last.weight, 2.0);
        // The mean of 0 and 1.5 is .75.
        let mean = pooled(&logits(), &correct, Pool::Mean, None).unwrap();
        let at_mean = (1.0 + (-0.75f64).exp()).ln();
        assert!((mean.sum.double_value(&[]) - (at_mean + c)).abs() < 1e-15);
    }

    #[test]
    fn a_label_that_is_no_probability_is_named() {
        let message = per_token(&logits(), &Tensor::from_slice(&[1.0, 1.5]), None).unwrap_err();
        assert!(
            message.to_string().contains("correct[1] is 1.5"),
            "{message}"
        );
    }
}
