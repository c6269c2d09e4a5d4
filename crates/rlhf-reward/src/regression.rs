//! Regression on attributes (helpfulness, correctness, …) and the mix that makes one reward of them.
//!
//! Invariant: an attribute that a row does not have is in no sum.

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::checks::{self, at_least_f32};
use crate::error::{Result, ensure};

const OP: &str = "regression";

/// Settings of [`loss`]; the default is half the squared error of every attribute.
#[derive(Clone, Copy, Debug, Default)]
pub struct Regression<'a> {
    /// Bool `[S, A]`, which ratings there are; all where absent. A rating that is not there may be NaN.
    pub present: Option<&'a Tensor>,
    /// `[A]`, the weight of each attribute; 1 where absent.
    pub attribute_weights: Option<&'a Tensor>,
    /// `[S]`, the weight of each row; 1 where absent.
    pub weights: Option<&'a Tensor>,
    /// δ of the Huber loss: beyond it an error costs linearly. Squared throughout where absent.
    pub huber: Option<f64>,
}

/// L = Σ_s Σ_a w_s w_a ½ (r_sa − y_sa)² over the ratings that there are; its weight is their Σ w_s w_a.
///
/// Wang et al. 2023 (SteerLM, HelpSteer, arXiv 2311.09528) and 2024 (HelpSteer2, arXiv 2406.08673);
/// Huber 1964.
///
/// # Shapes
/// `predictions` and `targets` `[S, A]`.
///
/// # Errors
/// When shapes differ, a rating that is there is not finite, a weight is negative or not finite, or δ is
/// not positive; the message names the entry, counted row by row.
///
/// # Deviations
/// HelpSteer has no ½ and takes the mean over attributes of a row first; with every rating there and no
/// weights, this is half of it.
pub fn loss(predictions: &Tensor, targets: &Tensor, settings: &Regression<'_>) -> Result<LossSum> {
    let size = predictions.size();
    ensure(size.len() == 2, OP, || {
        format!("predictions are {size:?}, expected [S, A]")
    })?;
    checks::shaped(OP, "predictions", predictions, &size)?;
    checks::shaped(OP, "targets", targets, &size)?;
    let r = at_least_f32(predictions);
    let mut y = targets.detach().to_kind(r.kind());
    let mut weights = Tensor::ones(&size[..], (r.kind(), r.device()));
    if let Some(w) = settings.attribute_weights {
        checks::shaped(OP, "attribute_weights", w, &size[1..])?;
        checks::weights(OP, Some(w))?;
        weights = &weights * w.detach().to_kind(r.kind()).unsqueeze(0);
    }
    if let Some(w) = settings.weights {
        checks::shaped(OP, "weights", w, &size[..1])?;
        checks::weights(OP, Some(w))?;
        weights = &weights * w.detach().to_kind(r.kind()).unsqueeze(1);
    }
    if let Some(present) = settings.present {
        ensure(
            present.kind() == Kind::Bool && present.size() == size,
            OP,
            || {
                format!(
                    "present: {:?} {:?}, expected Bool {size:?}",
                    present.kind(),
                    present.size()
                )
            },
        )?;
        let absent = present.logical_not();
        y = y.masked_fill(&absent, 0.0);
        weights = weights.masked_fill(&absent, 0.0);
    }
    checks::finite(OP, "targets", &y)?;
    let error = r - y;
    let losses = match settings.huber {
        None => error.square() * 0.5,
        Some(delta) => {
            ensure(delta > 0.0 && delta.is_finite(), OP, || {
                format!("huber is {delta}, expected more than 0")
            })?;
            let near = error.abs().clamp_max(delta);
            &near * (error.abs() - &near * 0.5)
        }
    };
    let weight = weights.sum(Kind::Double).double_value(&[]);
    Ok(LossSum {
        sum: (losses * weights).sum(None),
        weight,
    })
}

/// r_s = Σ_a m_a r_sa: one reward of several attributes.
///
/// The mix is given (HelpSteer2 publishes one) or learned: both arguments have gradients, so
/// [`bradley_terry`](crate::bradley_terry) over mixed scores fits it to preferences.
///
/// # Shapes
/// `attributes` `[S, A]`, `mix` `[A]` → `[S]`.
///
/// # Errors
/// When shapes differ.
pub fn mix(attributes: &Tensor, mix: &Tensor) -> Result<Tensor> {
    let size = attributes.size();
    ensure(size.len() == 2, OP, || {
        format!("attributes are {size:?}, expected [S, A]")
    })?;
    checks::shaped(OP, "mix", mix, &size[1..])?;
    let attributes = at_least_f32(attributes);
    Ok(attributes.matmul(&mix.to_kind(attributes.kind())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let r = Tensor::from_slice(&[1.0, 2.0, 0.0, 4.0]).view([2, 2]);
        let y = Tensor::from_slice(&[0.0, 2.5, f64::NAN, 1.0]).view([2, 2]);
        let present = Tensor::from_slice(&[true, true, false, true]).view([2, 2]);
        let w = Tensor::from_slice(&[1.0, 2.0]);
        let mut settings = Regression {
            present: Some(&present),
            attribute_weights: Some(&w),
            weights: None,
            huber: None,
        };
        // ½·1² + 2·½·.5² + 2·½·3² = .5 + .25 + 9, weight 1 + 2 + 2.
        let out = loss(&r, &y, &settings).unwrap();
        assert_eq!((out.sum.double_value(&[]), out.weight), (9.75, 5.0));
        // δ = 1: 1·(3 − ½) = 2.5 in place of 4.5.
        settings.huber = Some(1.0);
        let out = loss(&r, &y, &settings).unwrap();
        assert_eq!(out.sum.double_value(&[]), 5.75);
        // Rows at ½ and 2: ½ · 0.75 + 2 · 5; weights ½ · 3 + 2 · 2.
        let rows = Tensor::from_slice(&[0.5, 2.0]);
        settings.weights = Some(&rows);
        let out = loss(&r, &y, &settings).unwrap();
        assert_eq!((out.sum.double_value(&[]), out.weight), (10.375, 5.5));
        assert_eq!(
            Vec::<f64>::try_from(&mix(&r, &w).unwrap()).unwrap(),
            [5.0, 8.0]
        );
    }

    #[test]
    fn a_rating_that_is_no_number_is_named() {
        let r = Tensor::from_slice(&[1.0, 2.0]).view([1, 2]);
        let y = Tensor::from_slice(&[1.0, f64::NAN]).view([1, 2]);
        let message = loss(&r, &y, &Regression::default())
            .unwrap_err()
            .to_string();
        assert!(message.contains("targets[1] is NaN"), "{message}");
    }
}
