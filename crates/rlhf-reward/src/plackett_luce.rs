//! The Plackett–Luce loss: a whole ranking as a draw without replacement.
//!
//! Invariant: only differences within a ranking matter. With two completions it is Bradley–Terry.

use rlhf_kernels::{LossSum, Ragged};
use tch::{Kind, Tensor};

use crate::checks::{self, at_least_f32, weighted};
use crate::error::{Result, ensure};

const OP: &str = "plackett_luce";

/// L = Σ_s w_s Σ_k (log Σ_{j≥k} exp r_j − r_k) over rankings s, items best first; its weight is Σ w.
///
/// Luce 1959, Plackett 1975; as a loss of reward models Rafailov et al. 2023 (arXiv 2305.18290),
/// appendix A.3.
///
/// # Shapes
/// `scores` `[M]` of S rankings, each best first; `weights` `[S]`, 1 where absent.
///
/// # Errors
/// When a ranking has fewer than two items, shapes differ, or a weight is negative or not finite.
///
/// # Deviations
/// None. A ranking of K items has K−1 factors, and each ranking counts once however long it is.
pub fn loss(scores: &Ragged, weights: Option<&Tensor>) -> Result<LossSum> {
    let offsets = scores.offsets();
    let lengths = offsets.host_lengths();
    checks::vectors(OP, &[("scores", Some(scores.values()))])?;
    if let Some(row) = lengths.iter().position(|n| *n < 2) {
        ensure(false, OP, || {
            format!(
                "ranking {row} has {} items, expected at least 2",
                lengths[row]
            )
        })?;
    }
    if let Some(w) = weights {
        checks::shaped(OP, "weights", w, &[offsets.num_segments()])?;
    }
    checks::weights(OP, weights)?;
    let values = at_least_f32(scores.values());
    if lengths.is_empty() {
        return Ok(LossSum {
            sum: values.sum(None),
            weight: 0.0,
        });
    }
    let device = values.device();
    let padded = scores.with_values(values)?.to_padded(0.0);
    let longest = padded.size()[1];
    let places = Tensor::arange(longest, (Kind::Int64, device));
    let lengths = offsets.lengths(device).unsqueeze(1);
    let real = places.unsqueeze(0).lt_tensor(&lengths);
    // Item k is drawn from itself and all that come after it. What is no item sees itself alone, which
    // keeps infinities out of the gradient.
    let after = places.unsqueeze(0).gt_tensor(&places.unsqueeze(1));
    let left = after
        .unsqueeze(0)
        .logical_and(&real.unsqueeze(1))
        .logical_or(&Tensor::eye(longest, (Kind::Bool, device)).unsqueeze(0));
    let normalizer = padded
        .unsqueeze(1)
        .masked_fill(&left.logical_not(), f64::NEG_INFINITY)
        .logsumexp(&[2i64][..], false);
    // Of what is no item the difference is exactly 0.
    let rankings = (normalizer - padded).sum_dim_intlist(&[1i64][..], false, None);
    Ok(weighted(&rankings, weights))
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::Offsets;

    use super::*;
    use crate::bradley_terry::{self, BradleyTerry};

    fn ragged(values: &[f64], lengths: &[i64]) -> Ragged {
        Ragged::new(
            Tensor::from_slice(values),
            Offsets::from_lengths(lengths).unwrap(),
        )
        .unwrap()
    }

    #[test]
    fn by_hand() {
        // Weights e^r of 4, 2, 1: 4/7 · 2/3 = 8/21.
        let r = [4f64.ln(), 2f64.ln(), 0.0];
        let out = loss(&ragged(&r, &[3]), None).unwrap();
        assert!((out.sum.double_value(&[]) - (21.0 / 8.0f64).ln()).abs() < 1e-15);
        // Beside a shorter ranking nothing changes: 1/(1 + e^-1) more.
        let both = loss(&ragged(&[r[0], r[1], r[2], 1.0, 0.0], &[3, 2]), None).unwrap();
        let pair = (1.0 + (-1.0f64).exp()).ln();
        assert!((both.sum.double_value(&[]) - (21.0 / 8.0f64).ln() - pair).abs() < 1e-15);
        assert_eq!(both.weight, 2.0);
    }

    #[test]
    fn of_two_it_is_bradley_terry() {
        let scores = ragged(&[0.3, -1.2, 5.0, 7.5], &[2, 2]);
        let bt = bradley_terry::loss(
            &Tensor::from_slice(&[0.3, 5.0]),
            &Tensor::from_slice(&[-1.2, 7.5]),
            &BradleyTerry::default(),
        )
        .unwrap();
        let pl = loss(&scores, None).unwrap();
        assert!((pl.sum - bt.sum).abs().double_value(&[]) < 1e-15);
    }

    #[test]
    fn a_ranking_of_one_is_refused_by_its_row() {
        let message = loss(&ragged(&[0.0, 1.0, 2.0], &[2, 1]), None).unwrap_err();
        assert!(message.to_string().contains("ranking 1 has 1 items"));
        let none = loss(&ragged(&[], &[]), None).unwrap();
        assert_eq!((none.sum.double_value(&[]), none.weight), (0.0, 0.0));
    }
}
