//! Gradients against central differences, in f64.

use rlhf_reward::bradley_terry::{self, BradleyTerry};
use tch::Tensor;

use crate::golden_io::gradient;

#[test]
fn bradley_terry() {
    const STEP: f64 = 1e-6;
    let x = [0.5, -1.0, 2.0, 0.1];
    // Every score takes part in several pairs.
    let (chosen, rejected) = (
        Tensor::from_slice(&[0i64, 2, 2, 3, 1]),
        Tensor::from_slice(&[1i64, 0, 1, 2, 0]),
    );
    let margin = Tensor::from_slice(&[0.5, 0.0, 1.0, -0.3, 0.2]);
    let weights = Tensor::from_slice(&[0.5, 1.0, 0.0, 2.0, 1.5]);
    for label_smoothing in [0.0, 0.2] {
        let settings = BradleyTerry {
            margin: Some(&margin),
            weights: Some(&weights),
            centering: 0.3,
            label_smoothing,
        };
        let f = |x: &Tensor| {
            bradley_terry::loss_of_pairs(x, &chosen, &rejected, &settings)
                .unwrap()
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
                (got[i] - expected).abs() < 1e-8,
                "[{i}]: {} against {expected}",
                got[i]
            );
        }
    }
}
