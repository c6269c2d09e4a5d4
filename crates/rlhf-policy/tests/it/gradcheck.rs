//! Gradients against central differences, in f64, away from the kinks.

use rlhf_kernels::{Offsets, Ragged};
use rlhf_policy::kl::{self, KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::ppo::{self, ValueInputs};
use rlhf_policy::loss::{Clip, KlTerm, PolicyInputs, RatioLevel, Reduction, clipped};
use tch::{Kind, Tensor};

use crate::golden_io::gradient;

const STEP: f64 = 1e-6;

/// Compares the gradient of `f` at `x` with (f(x + h) − f(x − h)) / 2h.
fn check(what: &str, x: &[f64], f: impl Fn(&Tensor) -> Tensor) {
    let leaf = Tensor::from_slice(x).set_requires_grad(true);
    let got = Vec::<f64>::try_from(&gradient(&f(&leaf), &leaf)).unwrap();
    for i in 0..x.len() {
        let at = |h: f64| {
            let mut moved = x.to_vec();
            moved[i] += h;
            f(&Tensor::from_slice(&moved)).double_value(&[])
        };
        let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        assert!(
            (got[i] - expected).abs() < 1e-8 * expected.abs().max(1.0),
            "{what} [{i}]: {} against {expected}",
            got[i]
        );
    }
}

fn ragged(x: &Tensor) -> Ragged {
    Ragged::new(
        x.shallow_clone(),
        Offsets::new(vec![0, 3, 3, 5, 6]).unwrap(),
    )
    .unwrap()
}

#[test]
fn surrogate() {
    // Ratios on both sides of both bounds and inside them.
    let new = [-0.9, -1.4, -0.3, -2.0, -0.7, -1.1];
    let old = ragged(&Tensor::from_slice(&[-0.95, -1.0, -0.8, -2.1, -1.9, -0.5]));
    let advantages = ragged(&Tensor::from_slice(&[0.7, -1.2, 0.4, -0.3, -2.0, 1.5]));
    let reference = ragged(&Tensor::from_slice(&[-1.0, -1.1, -0.2, -2.5, -0.6, -1.2]));
    let weights = ragged(&Tensor::from_slice(&[1.0, 0.5, 1.2, 0.9, 1.1, 0.8]));
    for level in [
        RatioLevel::Token,
        RatioLevel::SequenceMean,
        RatioLevel::SequenceSum,
    ] {
        for reduction in [
            Reduction::Token {},
            Reduction::Sequence {},
            Reduction::FixedLength { length: 4 },
        ] {
            for dual in [None, Some(1.7)] {
                for (estimator, placement) in [
                    (KlEstimator::K1, KlPlacement::InLoss),
                    (KlEstimator::K2, KlPlacement::InLoss),
                    (KlEstimator::K3, KlPlacement::InLoss),
                    (KlEstimator::K3, KlPlacement::InLossWeighted),
                ] {
                    let penalty = KlPenalty {
                        estimator,
                        placement,
                        coef: 0.3,
                    };
                    check(
                        &format!("{level:?} {reduction:?} {dual:?} {penalty:?}"),
                        &new,
                        |x| {
                            let logprobs = ragged(x);
                            let inputs = PolicyInputs {
                                weights: Some(&weights),
                                kl: Some(KlTerm {
                                    ref_logprobs: &reference,
                                    penalty,
                                }),
                                ..PolicyInputs::new(&logprobs, &old, &advantages)
                            };
                            let clip = Clip {
                                epsilon_low: 0.2,
                                epsilon_high: 0.28,
                                dual,
                            };
                            let loss = clipped::surrogate(&inputs, clip, level, reduction)
                                .unwrap()
                                .loss;
                            loss.sum / loss.weight
                        },
                    );
                }
            }
        }
    }
}

#[test]
fn value_loss() {
    let old = ragged(&Tensor::from_slice(&[0.0, 1.0, -1.0, 0.5, 0.2, 2.0]));
    let returns = ragged(&Tensor::from_slice(&[0.5, -1.0, 0.3, 0.4, 1.2, 1.0]));
    for clip in [None, Some(0.2)] {
        check("value", &[0.1, 1.5, -1.6, 0.55, 0.9, 1.9], |x| {
            let values = ragged(x);
            let inputs = ValueInputs {
                values: &values,
                old_values: &old,
                returns: &returns,
            };
            ppo::value_loss(&inputs, clip).unwrap().loss.sum
        });
    }
}

#[test]
fn exact_kl() {
    let q = Tensor::from_slice(&[0.1, 0.9, -0.4, 0.0, 1.0, 2.0]).view([2, 3]);
    check("p", &[1.0, 0.2, -0.7, 0.3, 0.1, -2.0], |x| {
        kl::exact(&x.view([2, 3]), &q).unwrap().sum(Kind::Double)
    });
    check("q", &[1.0, 0.2, -0.7, 0.3, 0.1, -2.0], |x| {
        kl::exact(&q, &x.view([2, 3])).unwrap().sum(Kind::Double)
    });
}

#[test]
fn straight_through_has_the_value_of_k3_and_the_gradient_of_k2() {
    let reference = ragged(&Tensor::from_slice(&[-1.0, -1.1, -0.2, -2.5, -0.6, -1.2]));
    let leaf = Tensor::from_slice(&[-0.9, -1.4, -0.3, -2.0, -0.7, -1.1]).set_requires_grad(true);
    let of = |e: KlEstimator| {
        e.estimate(&ragged(&leaf), &reference)
            .unwrap()
            .values()
            .sum(Kind::Double)
    };
    let straight = of(KlEstimator::K3Straight);
    assert!((straight.double_value(&[]) - of(KlEstimator::K3).double_value(&[])).abs() < 1e-15);
    let apart = gradient(&straight, &leaf) - gradient(&of(KlEstimator::K2), &leaf);
    assert_eq!(apart.abs().max().double_value(&[]), 0.0);
}
