//! Gradients against central differences, in f64: every loss, in every argument that learns.

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

const X: [f64; 6] = [0.5, -1.0, 2.0, 0.1, 1.4, -0.3];

/// Compares the gradient of `f` at `x` with central differences.
fn check(x: &[f64], f: impl Fn(&Tensor) -> Tensor) {
    const STEP: f64 = 1e-6;
    let leaf = from_slice(x).set_requires_grad(true);
    let got = Vec::<f64>::try_from(&gradient(&f(&leaf), &leaf)).unwrap();
    assert!(got.iter().any(|g| *g != 0.0), "a gradient of nothing");
    for i in 0..x.len() {
        let at = |h: f64| {
            let mut moved = x.to_vec();
            moved[i] += h;
            f(&from_slice(&moved)).double_value(&[])
        };
        let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        assert!(
            (got[i] - expected).abs() < 1e-8,
            "[{i}]: {} against {expected}",
            got[i]
        );
    }
}

fn halves(x: &Tensor) -> (Tensor, Tensor) {
    (x.narrow(0, 0, 3), x.narrow(0, 3, 3))
}

#[test]
fn bradley_terry() {
    // Every score takes part in several pairs.
    let (chosen, rejected) = (
        from_slice(&[0i64, 2, 2, 3, 1, 4]),
        from_slice(&[1i64, 0, 1, 2, 0, 5]),
    );
    let margin = from_slice(&[0.5, 0.0, 1.0, -0.3, 0.2, 0.0]);
    let weights = from_slice(&[0.5, 1.0, 0.0, 2.0, 1.5, 1.0]);
    let preference = from_slice(&[1.0, 0.5, 1.0, 0.3, 0.5, 0.9]);
    for label_smoothing in [0.0, 0.2] {
        for preference in [None, Some(&preference)] {
            let settings = BradleyTerry {
                margin: Some(&margin),
                weights: Some(&weights),
                preference,
                centering: 0.3,
                label_smoothing,
            };
            check(&X, |x| {
                bradley_terry::loss_of_pairs(x, &chosen, &rejected, &settings)
                    .unwrap()
                    .sum
            });
        }
    }
}

#[test]
fn plackett_luce() {
    let offsets = Offsets::from_lengths(&[4, 2]).unwrap();
    let weights = from_slice(&[0.5, 2.0]);
    check(&X, |x| {
        let scores = Ragged::new(x.shallow_clone(), offsets.clone()).unwrap();
        plackett_luce::loss(&scores, Some(&weights)).unwrap().sum
    });
}

#[test]
fn difference() {
    let labelled = from_slice(&[0.0, 1.5, 3.0]);
    for form in [
        DifferenceLoss::Squared {},
        DifferenceLoss::Soft { temperature: 0.7 },
        DifferenceLoss::Scaled {},
    ] {
        check(&X, |x| {
            let (c, r) = halves(x);
            difference::loss(&c, &r, &labelled, form, None).unwrap().sum
        });
    }
}

#[test]
fn ordinal() {
    // Three scores, then what three thresholds are made of.
    let labels = from_slice(&[0i64, 1, 3]);
    check(&X, |x| {
        let (s, raw) = halves(x);
        let thresholds = ordinal::thresholds(&raw).unwrap();
        ordinal::loss(&s, &labels, &thresholds, None).unwrap().sum
    });
    let labels = from_slice(&[2i64, 3, 6]);
    check(&X, |x| {
        let (s, raw) = halves(x);
        let thresholds = ordinal::symmetric_thresholds(&raw).unwrap();
        ordinal::loss(&s, &labels, &thresholds, None).unwrap().sum
    });
}

#[test]
fn regression() {
    let targets = from_slice(&[0.0, 1.0, 2.2, 3.0, f64::NAN, -0.1]).view([3, 2]);
    let present = from_slice(&[true, true, true, true, false, true]).view([3, 2]);
    let weights = from_slice(&[0.5, 2.0]);
    let rows = from_slice(&[1.0, 0.25, 3.0]);
    for huber in [None, Some(0.4)] {
        let settings = Regression {
            present: Some(&present),
            attribute_weights: Some(&weights),
            weights: Some(&rows),
            huber,
        };
        check(&X, |x| {
            regression::loss(&x.view([3, 2]), &targets, &settings)
                .unwrap()
                .sum
        });
    }
    // Four attributes of two completions, and the mix.
    check(&X, |x| {
        let r = regression::mix(&x.narrow(0, 0, 4).view([2, 2]), &x.narrow(0, 4, 2)).unwrap();
        let settings = BradleyTerry::default();
        bradley_terry::loss(&r.narrow(0, 0, 1), &r.narrow(0, 1, 1), &settings)
            .unwrap()
            .sum
    });
}

#[test]
fn outcome() {
    let offsets = Offsets::from_lengths(&[2, 0, 3, 1]).unwrap();
    let correct = from_slice(&[1.0, 1.0, 0.0, 0.3]);
    let weights = from_slice(&[1.0, 1.0, 0.5, 2.0]);
    let logits = |x: &Tensor| Ragged::new(x.shallow_clone(), offsets.clone()).unwrap();
    check(&X, |x| {
        outcome::per_token(&logits(x), &correct, Some(&weights))
            .unwrap()
            .sum
    });
    for pool in [Pool::Last, Pool::Mean] {
        check(&X, |x| {
            outcome::pooled(&logits(x), &correct, pool, Some(&weights))
                .unwrap()
                .sum
        });
    }
}

#[test]
fn process() {
    let weights = from_slice(&[0.5, 2.0]);
    check(&X, |x| {
        let labels = from_slice(&[1i64, 2]);
        process::loss(&x.view([2, 3]), &labels, Some(&weights))
            .unwrap()
            .sum
    });
    let labels = from_slice(&[0.0, 1.0, 0.25, 1.0, 0.0, 0.5]);
    check(&X, |x| process::binary_loss(x, &labels, None).unwrap().sum);
}

#[test]
fn distributional() {
    let x: Vec<f64> = X.iter().chain(&[0.7, -0.2]).copied().collect();
    let part = |x: &Tensor, i: i64| x.narrow(0, 2 * i, 2);
    check(&x, |x| {
        let (mean, log_variance) = (part(x, 0), part(x, 1));
        let (other, other_variance) = (part(x, 2), part(x, 3));
        distributional::pairwise(
            Normal {
                mean: &mean,
                log_variance: &log_variance,
            },
            Normal {
                mean: &other,
                log_variance: &other_variance,
            },
            None,
        )
        .unwrap()
        .sum
    });
    let targets = from_slice(&[0.3, 1.0, -2.0]);
    check(&X, |x| {
        let (mean, log_variance) = halves(x);
        let predicted = Normal {
            mean: &mean,
            log_variance: &log_variance,
        };
        distributional::regression(predicted, &targets, None)
            .unwrap()
            .sum
    });
}

#[test]
fn segments() {
    use rlhf_reward::segments::{self, Comparisons};
    // Clips of one, two and three steps, each in two comparisons.
    let offsets = Offsets::from_lengths(&[1, 2, 3]).unwrap();
    let (first, second) = (from_slice(&[0i64, 1, 2]), from_slice(&[1i64, 2, 0]));
    let preference = from_slice(&[1.0, 0.5, 0.0]);
    let weights = from_slice(&[1.0, 2.0, 0.3]);
    for error_rate in [0.0, 0.1] {
        check(&X, |x| {
            let rewards = Ragged::new(x.shallow_clone(), offsets.clone()).unwrap();
            let compared = Comparisons {
                first: &first,
                second: &second,
                preference: &preference,
                weights: Some(&weights),
            };
            segments::loss(&rewards, &compared, error_rate).unwrap().sum
        });
    }
}
