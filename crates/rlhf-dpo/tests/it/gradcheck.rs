//! Gradients against central differences, in f64.

use rlhf_dpo::loss::{PairLogprobs, PreferenceLoss};
use tch::Tensor;

use crate::golden_io::gradient;

#[test]
fn sigmoid() {
    const STEP: f64 = 1e-6;
    let x = [-3.0, -1.0, -7.0, -2.5, -2.0, -9.0];
    let reference = Tensor::from_slice(&[-2.5, -1.5, -6.0, -3.0, -2.0, -4.0]);
    for (beta, label_smoothing) in [(0.1, 0.0), (0.7, 0.0), (0.7, 0.2)] {
        let f = |x: &Tensor| {
            let pairs = PairLogprobs {
                chosen: x.slice(0, 0, None, 2),
                rejected: x.slice(0, 1, None, 2),
                ref_chosen: reference.slice(0, 0, None, 2),
                ref_rejected: reference.slice(0, 1, None, 2),
            };
            PreferenceLoss::Sigmoid {
                beta,
                label_smoothing,
            }
            .compute(&pairs)
            .unwrap()
            .loss
            .sum
        };
        let leaf = Tensor::from_slice(&x).set_requires_grad(true);
        let got = Vec::<f64>::try_from(&gradient(&f(&leaf), &leaf)).unwrap();
        for i in 0..x.len() {
            let at = |h: f64| {
                let mut moved = x;
                moved[i] += h;
                f(&Tensor::from_slice(&moved)).double_value(&[])
            };
            let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
            assert!(
                (got[i] - expected).abs() < 1e-9,
                "{beta} {label_smoothing} [{i}]: {} against {expected}",
                got[i]
            );
        }
    }
}

#[test]
fn the_reference_gets_no_gradient() {
    let leaf = |x: f64| Tensor::from_slice(&[x]).set_requires_grad(true);
    let pairs = PairLogprobs {
        chosen: leaf(-1.0),
        rejected: leaf(-2.0),
        ref_chosen: leaf(-1.5),
        ref_rejected: leaf(-1.5),
    };
    let out = PreferenceLoss::Sigmoid {
        beta: 0.1,
        label_smoothing: 0.0,
    }
    .compute(&pairs)
    .unwrap();
    out.loss.sum.backward();
    assert!(
        pairs.chosen.grad().defined()
            && !pairs.ref_chosen.grad().defined()
            && !pairs.ref_rejected.grad().defined()
    );
    assert!(!out.chosen_rewards.requires_grad());
}
