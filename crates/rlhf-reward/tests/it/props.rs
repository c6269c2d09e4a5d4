//! Properties that hold for any input.

use proptest::prelude::*;
use rlhf_kernels::{Offsets, Ragged};
use rlhf_reward::bradley_terry::{self, BradleyTerry};
use rlhf_reward::difference::{self, DifferenceLoss};
use rlhf_reward::distributional::{self, Normal};
use rlhf_reward::outcome::{self, Pool};
use rlhf_reward::regression::{self, Regression};
use rlhf_reward::{ordinal, plackett_luce, process};
use tch::Tensor;

use crate::device::from_slice;
use crate::golden_io::gradient;

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// A step's loss and gradient do not depend on how its pairs are split.
    #[test]
    fn any_split_gives_the_same_step(
        pairs in prop::collection::vec((0i64..5, 0i64..5, 0.0f64..2.0), 1..10),
        scores in prop::collection::vec(-4.0f64..4.0, 5),
        cut in any::<prop::sample::Index>(),
    ) {
        let leaf = from_slice(&scores).set_requires_grad(true);
        let part = |pairs: &[(i64, i64, f64)]| {
            let index = |pick: fn(&(i64, i64, f64)) -> i64| from_slice(&pairs.iter().map(pick).collect::<Vec<_>>());
            let weights = from_slice(&pairs.iter().map(|p| p.2).collect::<Vec<_>>());
            let settings = BradleyTerry { weights: Some(&weights), centering: 0.1, ..BradleyTerry::default() };
            bradley_terry::loss_of_pairs(&leaf, &index(|p| p.0), &index(|p| p.1), &settings).unwrap()
        };
        let (a, b) = pairs.split_at(cut.index(pairs.len()));
        let (whole, a, b) = (part(&pairs), part(a), part(b));
        prop_assert!((a.weight + b.weight - whole.weight).abs() < 1e-12);
        let sum = a.sum + b.sum;
        prop_assert!((sum.double_value(&[]) - whole.sum.double_value(&[])).abs() < 1e-10);
        prop_assert!((gradient(&sum, &leaf) - gradient(&whole.sum, &leaf)).abs().max().double_value(&[]) < 1e-12);
    }

    /// Without centring only the difference counts; exchanging a pair changes its loss by the margin.
    #[test]
    fn only_the_difference_counts(c in -9.0f64..9.0, r in -9.0f64..9.0, shift in -9.0f64..9.0) {
        let of = |c: f64, r: f64| {
            bradley_terry::loss(&from_slice(&[c]), &from_slice(&[r]), &BradleyTerry::default()).unwrap().sum.double_value(&[])
        };
        prop_assert!((of(c, r) - of(c + shift, r + shift)).abs() < 1e-12);
        prop_assert!((of(r, c) - of(c, r) - (c - r)).abs() < 1e-12);
    }

    /// Rankings and completions of any lengths, cut anywhere: the parts add up to the whole.
    #[test]
    fn ragged_losses_split(
        lengths in prop::collection::vec(2i64..5, 1..6),
        cut in any::<prop::sample::Index>(),
        seed in prop::collection::vec(-3.0f64..3.0, 25),
    ) {
        let total: i64 = lengths.iter().sum();
        let leaf = from_slice(&seed[..total as usize]).set_requires_grad(true);
        let correct: Vec<f64> = (0..lengths.len()).map(|i| [1.0, 0.0, 0.25][i % 3]).collect();
        let part = |from: usize, to: usize| {
            let start: i64 = lengths[..from].iter().sum();
            let offsets = Offsets::from_lengths(&lengths[from..to]).unwrap();
            let values = leaf.narrow(0, start, offsets.num_values());
            let ragged = Ragged::new(values, offsets).unwrap();
            let correct = from_slice(&correct[from..to]);
            [
                plackett_luce::loss(&ragged, None).unwrap(),
                outcome::per_token(&ragged, &correct, None).unwrap(),
                outcome::pooled(&ragged, &correct, Pool::Mean, None).unwrap(),
            ]
        };
        let cut = cut.index(lengths.len() + 1);
        let parts = part(0, cut).into_iter().zip(part(cut, lengths.len()));
        for (whole, (a, b)) in part(0, lengths.len()).into_iter().zip(parts) {
            prop_assert!((a.weight + b.weight - whole.weight).abs() < 1e-12);
            let sum = a.sum + b.sum;
            prop_assert!((&sum - &whole.sum).abs().double_value(&[]) < 1e-10);
            prop_assert!((gradient(&sum, &leaf) - gradient(&whole.sum, &leaf)).abs().max().double_value(&[]) < 1e-12);
        }
    }

    /// Losses of rows, cut anywhere.
    #[test]
    fn row_losses_split(
        rows in prop::collection::vec((-4.0f64..4.0, -4.0f64..4.0, 0i64..3, 0.0f64..2.0), 1..9),
        cut in any::<prop::sample::Index>(),
    ) {
        let n = rows.len();
        let flat: Vec<f64> = rows.iter().flat_map(|r| [r.0, r.1]).collect();
        let leaf = from_slice(&flat).set_requires_grad(true);
        let theta = from_slice(&[-1.0, 0.5]);
        let part = |from: usize, to: usize| {
            let rows = &rows[from..to];
            let x = leaf.view([-1, 2]).narrow(0, from as i64, rows.len() as i64);
            let (a, b) = (x.select(1, 0), x.select(1, 1));
            let labels = from_slice(&rows.iter().map(|r| r.2).collect::<Vec<_>>());
            let w = from_slice(&rows.iter().map(|r| r.3).collect::<Vec<_>>());
            let three = Tensor::stack(&[&a, &b, &(&a * &b)], 1);
            let normal = |mean, log_variance| Normal { mean, log_variance };
            [
                difference::loss(&a, &b, &w, DifferenceLoss::Squared {}, Some(&w)).unwrap(),
                ordinal::loss(&(&a - &b), &labels, &theta, Some(&w)).unwrap(),
                process::loss(&three, &labels, Some(&w)).unwrap(),
                regression::loss(&x, &Tensor::stack(&[&w, &w], 1), &Regression::default()).unwrap(),
                distributional::regression(normal(&a, &b), &w, Some(&w)).unwrap(),
                distributional::pairwise(normal(&a, &b), normal(&b, &a), Some(&w)).unwrap(),
            ]
        };
        let cut = cut.index(n + 1);
        let parts = part(0, cut).into_iter().zip(part(cut, n));
        for (whole, (a, b)) in part(0, n).into_iter().zip(parts) {
            prop_assert!((a.weight + b.weight - whole.weight).abs() < 1e-12);
            let sum = a.sum + b.sum;
            prop_assert!((&sum - &whole.sum).abs().double_value(&[]) < 1e-9);
            prop_assert!((gradient(&sum, &leaf) - gradient(&whole.sum, &leaf)).abs().max().double_value(&[]) < 1e-9);
        }
    }

    /// The labels' probabilities sum to 1 and agree with the loss.
    #[test]
    fn ordinal_labels_sum_to_one(s in -9.0f64..9.0, raw in prop::collection::vec(-3.0f64..3.0, 1..5)) {
        let theta = ordinal::thresholds(&from_slice(&raw)).unwrap();
        let at = from_slice(&[s]);
        let p = Vec::<f64>::try_from(&ordinal::probabilities(&at, &theta).unwrap().get(0)).unwrap();
        prop_assert!((p.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        for (label, p) in p.iter().enumerate() {
            let loss = ordinal::loss(&at, &from_slice(&[label as i64]), &theta, None).unwrap();
            prop_assert!(((-loss.sum).exp().double_value(&[]) - p).abs() < 1e-12);
        }
    }
}
