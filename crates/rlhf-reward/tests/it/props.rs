//! Properties that hold for any input.

use proptest::prelude::*;
use rlhf_reward::bradley_terry::{self, BradleyTerry};
use tch::Tensor;

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
        let leaf = Tensor::from_slice(&scores).set_requires_grad(true);
        let part = |pairs: &[(i64, i64, f64)]| {
            let index = |pick: fn(&(i64, i64, f64)) -> i64| Tensor::from_slice(&pairs.iter().map(pick).collect::<Vec<_>>());
            let weights = Tensor::from_slice(&pairs.iter().map(|p| p.2).collect::<Vec<_>>());
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
            bradley_terry::loss(&Tensor::from_slice(&[c]), &Tensor::from_slice(&[r]), &BradleyTerry::default()).unwrap().sum.double_value(&[])
        };
        prop_assert!((of(c, r) - of(c + shift, r + shift)).abs() < 1e-12);
        prop_assert!((of(r, c) - of(c, r) - (c - r)).abs() < 1e-12);
    }
}
