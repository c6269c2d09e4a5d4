//! Pairs that say by how much one completion is better: losses on the difference of scores.
//!
//! Invariant: only differences of scores matter. A difference as a margin is
//! [`bradley_terry`](crate::bradley_terry)'s.

use rlhf_kernels::LossSum;
use tch::Tensor;

use crate::checks::{self, at_least_f32, weighted};
use crate::error::{Result, ensure};

const OP: &str = "difference";

/// What a labelled difference Δ says of d = r_c − r_r.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "train",
    serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)
)]
pub enum DifferenceLoss {
    /// ½ (d − Δ)²: the scores have the labels' own unit.
    Squared {},
    /// −p log σ(d) − (1−p) log σ(−d), p = σ(Δ / temperature): the labels are scores of another judge,
    /// whose preference is imitated. At d = Δ / temperature the gradient is 0.
    Soft {
        /// More than 0.
        temperature: f64,
    },
    /// −Δ log σ(d), Δ ≥ 0: scaled Bradley–Terry, a pair counts by how clear it is.
    Scaled {},
}

/// L = Σ w · ℓ(d, Δ) with ℓ as [`DifferenceLoss`] says; its weight is Σ w.
///
/// `Squared`: least squares on differences, as in Gao et al. 2024 (REBEL, arXiv 2404.16767), equation 1,
/// with a reward in place of the log-ratio. `Soft`: the cross-entropy of two Bernoulli preferences.
/// `Scaled`: Wang et al. 2024 (HelpSteer2-Preference, arXiv 2410.01257), scaled Bradley–Terry.
///
/// # Shapes
/// `chosen`, `rejected`, `differences` and `weights` `[P]`; weights are 1 where absent.
///
/// # Errors
/// When shapes differ, a difference is not finite (or negative for `Scaled`), a weight is negative or not
/// finite, or the temperature is not positive; the message names the row.
///
/// # Deviations
/// The ½ of `Squared` is ours: its gradient is the residual.
pub fn loss(
    chosen: &Tensor,
    rejected: &Tensor,
    differences: &Tensor,
    form: DifferenceLoss,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    checks::vectors(
        OP,
        &[
            ("chosen", Some(chosen)),
            ("rejected", Some(rejected)),
            ("differences", Some(differences)),
            ("weights", weights),
        ],
    )?;
    checks::finite(OP, "differences", differences)?;
    checks::weights(OP, weights)?;
    let lead = at_least_f32(chosen) - at_least_f32(rejected);
    let labelled = differences.detach().to_kind(lead.kind());
    let losses = match form {
        DifferenceLoss::Squared {} => (lead - labelled).square() * 0.5,
        DifferenceLoss::Soft { temperature } => {
            ensure(temperature > 0.0 && temperature.is_finite(), OP, || {
                format!("temperature is {temperature}, expected more than 0")
            })?;
            let p = (labelled / temperature).sigmoid();
            // −log σ(d) = −log σ(−d) − d.
            -(-&lead).log_sigmoid() - p * lead
        }
        DifferenceLoss::Scaled {} => {
            ensure(differences.ge(0.0).all().int64_value(&[]) != 0, OP, || {
                "a difference is negative: exchange chosen and rejected".into()
            })?;
            -labelled * lead.log_sigmoid()
        }
    };
    Ok(weighted(&losses, weights))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn value(form: DifferenceLoss, d: f64, delta: f64) -> f64 {
        let t = |x: f64| Tensor::from_slice(&[x]);
        loss(&t(d), &t(0.0), &t(delta), form, None)
            .unwrap()
            .sum
            .double_value(&[])
    }

    #[test]
    fn by_hand() {
        assert_eq!(value(DifferenceLoss::Squared {}, 3.0, 1.0), 2.0);
        // -log σ(1.5) = .201413278; twice as clear, twice the loss.
        let plain = 0.201_413_277_982_752_4;
        assert!((value(DifferenceLoss::Scaled {}, 1.5, 2.0) - 2.0 * plain).abs() < 1e-15);
        // p = σ(0) = ½: plain + 0.75.
        let soft = DifferenceLoss::Soft { temperature: 2.0 };
        assert!((value(soft, 1.5, 0.0) - (plain + 0.75)).abs() < 1e-15);
        // p = σ(4/2); -p log σ(1.5) - (1-p) log σ(-1.5) = plain + 1.5 (1-p).
        let p = 1.0 / (1.0 + (-2.0f64).exp());
        assert!((value(soft, 1.5, 4.0) - (plain + 1.5 * (1.0 - p))).abs() < 1e-15);
    }

    #[test]
    fn bad_rows_are_named() {
        let t = Tensor::from_slice(&[0.0, 1.0]);
        let bad = Tensor::from_slice(&[0.0, f64::INFINITY]);
        let message = |d: &Tensor, form| loss(&t, &t, d, form, None).unwrap_err().to_string();
        assert!(message(&bad, DifferenceLoss::Squared {}).contains("differences[1] is inf"));
        let negative = Tensor::from_slice(&[0.0, -1.0]);
        assert!(message(&negative, DifferenceLoss::Scaled {}).contains("negative"));
        let cold = DifferenceLoss::Soft { temperature: 0.0 };
        assert!(message(&t, cold).contains("temperature"));
    }
}
