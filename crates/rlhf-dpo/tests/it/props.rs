//! Properties that hold for any input.

use proptest::prelude::*;
use rlhf_dpo::loss::{PairLogprobs, PreferenceLoss, PreferenceOutput};
use tch::Tensor;

use crate::golden_io::gradient;

type Pair = (f64, f64, f64, f64);

fn pairs() -> impl Strategy<Value = Vec<Pair>> {
    let logprob = || -50.0f64..0.0;
    prop::collection::vec((logprob(), logprob(), logprob(), logprob()), 1..9)
}

fn column(pairs: &[Pair], pick: fn(&Pair) -> f64) -> Tensor {
    Tensor::from_slice(&pairs.iter().map(pick).collect::<Vec<_>>())
}

fn compute(pairs: &[Pair], label_smoothing: f64) -> PreferenceOutput {
    let inputs = PairLogprobs {
        chosen: column(pairs, |p| p.0),
        rejected: column(pairs, |p| p.1),
        ref_chosen: column(pairs, |p| p.2),
        ref_rejected: column(pairs, |p| p.3),
    };
    PreferenceLoss::Sigmoid {
        beta: 0.3,
        label_smoothing,
    }
    .compute(&inputs)
    .unwrap()
}

fn host(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// A step's loss and gradient do not depend on how it is split.
    #[test]
    fn any_split_gives_the_same_step(pairs in pairs(), cut in any::<prop::sample::Index>(), eps in 0.0f64..0.49) {
        let leaf = column(&pairs, |p| p.0).set_requires_grad(true);
        let part = |from: usize, to: usize| {
            let inputs = PairLogprobs {
                chosen: leaf.slice(0, from as i64, to as i64, 1),
                rejected: column(&pairs[from..to], |p| p.1),
                ref_chosen: column(&pairs[from..to], |p| p.2),
                ref_rejected: column(&pairs[from..to], |p| p.3),
            };
            PreferenceLoss::Sigmoid { beta: 0.3, label_smoothing: eps }.compute(&inputs).unwrap().loss
        };
        let cut = cut.index(pairs.len());
        let (whole, first, second) = (part(0, pairs.len()), part(0, cut), part(cut, pairs.len()));
        prop_assert_eq!(first.weight + second.weight, whole.weight);
        let sum = first.sum + second.sum;
        prop_assert!((sum.double_value(&[]) - whole.sum.double_value(&[])).abs() < 1e-10);
        let apart = gradient(&sum, &leaf) - gradient(&whole.sum, &leaf);
        prop_assert!(apart.abs().max().double_value(&[]) < 1e-14);
    }

    /// Exchanging chosen and rejected turns the margin's sign and exchanges the rewards.
    #[test]
    fn exchange_turns_the_margin(pairs in pairs(), eps in 0.0f64..0.49) {
        let turned: Vec<Pair> = pairs.iter().map(|p| (p.1, p.0, p.3, p.2)).collect();
        let (a, b) = (compute(&pairs, eps), compute(&turned, eps));
        prop_assert_eq!(host(&a.margins()), host(&-b.margins()));
        prop_assert_eq!(host(&a.chosen_rewards), host(&b.rejected_rewards));
        prop_assert_eq!(host(&a.accuracies()), host(&(-b.accuracies() + 1.0)));
        // The two losses differ by (1 - 2ε) of the margin: -ℓ(z) + ℓ(-z) = -z.
        for ((la, lb), m) in host(&a.losses).iter().zip(host(&b.losses)).zip(host(&a.margins())) {
            prop_assert!((lb - la - (1.0 - 2.0 * eps) * m).abs() < 1e-10);
        }
    }
}
