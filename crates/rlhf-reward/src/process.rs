//! Process reward models: is each step of a solution right.
//!
//! Invariant: one prediction a step, at its last token; the caller has picked those rows, so nothing here
//! knows of tokens. Steps of one solution are a `Ragged`.

use rlhf_kernels::{LossSum, Ragged};
use tch::{Kind, Tensor};

use crate::checks::{self, at_least_f32, weighted};
use crate::error::{Result, ensure};
use crate::outcome::bce;

const OP: &str = "process";

/// What the middle one of three classes counts as when steps are scored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "train", serde(rename_all = "snake_case"))]
pub enum Neutral {
    /// A right step.
    Right,
    /// A wrong step.
    Wrong,
}

/// One number of the probabilities of a solution's steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(feature = "train", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "train", serde(rename_all = "snake_case"))]
pub enum Aggregate {
    /// Their mean.
    Mean,
    /// The least: a chain is as strong as its weakest link.
    Min,
    /// Their product: the probability that all are right.
    Product,
    /// The last step's.
    Last,
}

/// L = −Σ_m w_m log softmax(z_m) at y_m, over step ends m; its weight is Σ w.
///
/// Lightman et al. 2023 (arXiv 2305.20050): three classes, wrong, neutral, right. With two it is TRL's
/// `PRMTrainer`.
///
/// # Shapes
/// `logits` `[M, C]` at the last token of each step, C of 2 or 3, worst first; `labels` i64 `[M]`;
/// `weights` `[M]`, 1 where absent.
///
/// # Errors
/// When shapes differ, a label is no class (with its row), or a weight is negative or not finite.
///
/// # Deviations
/// None.
pub fn loss(logits: &Tensor, labels: &Tensor, weights: Option<&Tensor>) -> Result<LossSum> {
    let (steps, classes) = classes(logits)?;
    checks::classes(OP, labels, steps, classes)?;
    if let Some(w) = weights {
        checks::shaped(OP, "weights", w, &[steps])?;
    }
    checks::weights(OP, weights)?;
    let picked = at_least_f32(logits)
        .log_softmax(1, None::<Kind>)
        .gather(1, &labels.unsqueeze(1), false)
        .squeeze_dim(1);
    Ok(weighted(&-picked, weights))
}

/// L = Σ_m w_m BCE(z_m, y_m) over step ends m; its weight is Σ w.
///
/// Uesato et al. 2022 (arXiv 2211.14275); with y the share of continuations that reach the right answer,
/// Wang et al. 2023 (Math-Shepherd, arXiv 2312.08935), soft estimation.
///
/// # Shapes
/// `logits` `[M]`; `labels` `[M]`, 0 or 1 or a probability between; `weights` `[M]`, 1 where absent.
///
/// # Errors
/// When shapes differ, a label is outside 0..=1, or a weight is negative or not finite.
///
/// # Deviations
/// None.
pub fn binary_loss(logits: &Tensor, labels: &Tensor, weights: Option<&Tensor>) -> Result<LossSum> {
    checks::vectors(
        OP,
        &[
            ("logits", Some(logits)),
            ("labels", Some(labels)),
            ("weights", weights),
        ],
    )?;
    checks::probabilities(OP, "labels", labels)?;
    checks::weights(OP, weights)?;
    let logits = at_least_f32(logits);
    let labels = labels.detach().to_kind(logits.kind());
    Ok(weighted(&bce(&logits, &labels), weights))
}

/// `[M]` the probability that each step is right, from logits `[M, 2]`, or `[M, 3]` with its neutral class
/// counted as said.
///
/// # Errors
/// When the logits have another shape.
pub fn step_probabilities(logits: &Tensor, neutral: Neutral) -> Result<Tensor> {
    let (_, classes) = classes(logits)?;
    let p = at_least_f32(logits).softmax(1, None::<Kind>);
    let right = p.select(1, classes - 1);
    Ok(if classes == 3 && neutral == Neutral::Right {
        right + p.select(1, 1)
    } else {
        right
    })
}

/// `[S]` the score of each solution from the probabilities of its steps; 0 for one without steps.
///
/// Lightman et al. 2023 (arXiv 2305.20050), appendix E, compare product and minimum.
///
/// # Shapes
/// `steps` `[M]` of S solutions.
///
/// # Errors
/// When a probability is outside 0..=1 or libtorch fails.
pub fn aggregate(steps: &Ragged, how: Aggregate) -> Result<Tensor> {
    let values = at_least_f32(steps.values());
    checks::vectors(OP, &[("steps", Some(&values))])?;
    checks::probabilities(OP, "steps", &values)?;
    let empty = steps.offsets().lengths(values.device()).eq(0);
    let steps = steps.with_values(values)?;
    let of = |padded: Tensor, reduce: fn(&Tensor) -> Tensor| {
        if padded.numel() == 0 {
            Tensor::zeros(empty.size(), (padded.kind(), padded.device()))
        } else {
            reduce(&padded).masked_fill(&empty, 0.0)
        }
    };
    Ok(match how {
        Aggregate::Mean => steps.mean(),
        Aggregate::Last => steps.last(0.0),
        Aggregate::Min => of(steps.to_padded(1.0), |p| p.min_dim(1, false).0),
        Aggregate::Product => of(steps.to_padded(1.0), |p| {
            p.prod_dim_int(1, false, None::<Kind>)
        }),
    })
}

fn classes(logits: &Tensor) -> Result<(i64, i64)> {
    match logits.size()[..] {
        [steps, c @ (2 | 3)] if logits.is_floating_point() => Ok((steps, c)),
        ref size => {
            ensure(false, OP, || {
                format!(
                    "logits: {:?} {size:?}, expected floating point [M, 2] or [M, 3]",
                    logits.kind()
                )
            })?;
            Ok((0, 0))
        }
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;

    #[test]
    fn by_hand() {
        // Odds 1 : 2 : 5, so 1/8, 2/8, 5/8.
        let row = [0.0, 2f64.ln(), 5f64.ln()];
        let logits = Tensor::from_slice(&[row, row].concat()).view([2, 3]);
        let out = loss(&logits, &Tensor::from_slice(&[1i64, 2]), None).unwrap();
        assert!((out.sum.double_value(&[]) - (4f64.ln() + 1.6f64.ln())).abs() < 1e-15);
        assert_eq!(out.weight, 2.0);
        let p = |n| step_probabilities(&logits, n).unwrap().double_value(&[0]);
        assert!((p(Neutral::Wrong) - 0.625).abs() < 1e-15);
        assert!((p(Neutral::Right) - 0.875).abs() < 1e-15);
        // Soft label ½ at z = 0: ln 2.
        let half = binary_loss(
            &Tensor::from_slice(&[0.0]),
            &Tensor::from_slice(&[0.5]),
            None,
        );
        assert!((half.unwrap().sum.double_value(&[]) - std::f64::consts::LN_2).abs() < 1e-15);
    }

    #[test]
    fn aggregates_by_hand() {
        let offsets = Offsets::from_lengths(&[3, 0, 1]).unwrap();
        let steps = Ragged::new(Tensor::from_slice(&[0.5, 0.25, 0.75, 1.0]), offsets).unwrap();
        let of = |how| Vec::<f64>::try_from(&aggregate(&steps, how).unwrap()).unwrap();
        assert_eq!(of(Aggregate::Mean), [0.5, 0.0, 1.0]);
        assert_eq!(of(Aggregate::Min), [0.25, 0.0, 1.0]);
        assert_eq!(of(Aggregate::Product), [0.093_75, 0.0, 1.0]);
        assert_eq!(of(Aggregate::Last), [0.75, 0.0, 1.0]);
        let none = Ragged::new(
            Tensor::from_slice::<f64>(&[]),
            Offsets::from_lengths(&[0]).unwrap(),
        )
        .unwrap();
        for how in [
            Aggregate::Mean,
            Aggregate::Min,
            Aggregate::Product,
            Aggregate::Last,
        ] {
            assert_eq!(aggregate(&none, how).unwrap().double_value(&[0]), 0.0);
        }
    }

    #[test]
    fn a_label_that_is_no_class_is_named() {
        let logits = Tensor::from_slice(&[0.0, 1.0, 2.0, 3.0]).view([2, 2]);
        let message = loss(&logits, &Tensor::from_slice(&[0i64, -100]), None).unwrap_err();
        assert!(
            message.to_string().contains("labels[1] is -100"),
            "{message}"
        );
        assert!(loss(&logits.view([1, 4]), &Tensor::from_slice(&[0i64]), None).is_err());
    }
}
