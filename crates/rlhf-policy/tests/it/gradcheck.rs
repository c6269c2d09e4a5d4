//! Gradients against central differences, in f64, away from the kinks.

use rlhf_kernels::{Offsets, Ragged};
use rlhf_policy::kl::{self, KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::ppo::{self, ValueInputs};
use rlhf_policy::loss::{
    Clip, GammaWeight, Gate, KlTerm, PolicyInputs, RatioLevel, Reduction, clipped, select, smooth,
};
use tch::{Kind, Tensor};

use crate::device::from_slice;
use crate::golden_io::gradient;

const STEP: f64 = 1e-6;

/// Compares the gradient of `f` at `x` with (f(x + h) − f(x − h)) / 2h.
fn check(what: &str, x: &[f64], f: impl Fn(&Tensor) -> Tensor) {
    let leaf = from_slice(x).set_requires_grad(true);
    let got = Vec::<f64>::try_from(&gradient(&f(&leaf), &leaf)).unwrap();
    for i in 0..x.len() {
        let at = |h: f64| {
            let mut moved = x.to_vec();
            moved[i] += h;
            f(&from_slice(&moved)).double_value(&[])
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
    let old = ragged(&from_slice(&[-0.95, -1.0, -0.8, -2.1, -1.9, -0.5]));
    let advantages = ragged(&from_slice(&[0.7, -1.2, 0.4, -0.3, -2.0, 1.5]));
    let reference = ragged(&from_slice(&[-1.0, -1.1, -0.2, -2.5, -0.6, -1.2]));
    let weights = ragged(&from_slice(&[1.0, 0.5, 1.2, 0.9, 1.1, 0.8]));
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
                                    exact: None,
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
    let old = ragged(&from_slice(&[0.0, 1.0, -1.0, 0.5, 0.2, 2.0]));
    let returns = ragged(&from_slice(&[0.5, -1.0, 0.3, 0.4, 1.2, 1.0]));
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
    let q = from_slice(&[0.1, 0.9, -0.4, 0.0, 1.0, 2.0]).view([2, 3]);
    check("p", &[1.0, 0.2, -0.7, 0.3, 0.1, -2.0], |x| {
        kl::exact(&x.view([2, 3]), &q).unwrap().sum(Kind::Double)
    });
    check("q", &[1.0, 0.2, -0.7, 0.3, 0.1, -2.0], |x| {
        kl::exact(&q, &x.view([2, 3])).unwrap().sum(Kind::Double)
    });
}

#[test]
fn straight_through_has_the_value_of_k3_and_the_gradient_of_k2() {
    let reference = ragged(&from_slice(&[-1.0, -1.1, -0.2, -2.5, -0.6, -1.2]));
    let leaf = from_slice(&[-0.9, -1.4, -0.3, -2.0, -0.7, -1.1]).set_requires_grad(true);
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

const NEW: [f64; 6] = [-0.9, -1.4, -0.3, -2.0, -0.7, -1.1];
const OLD: [f64; 6] = [-0.95, -1.0, -0.8, -2.1, -1.9, -0.5];
const ADVANTAGES: [f64; 6] = [0.7, -1.2, 0.4, -0.3, -2.0, 1.5];
/// The tokens of each completion.
const PARTS: [std::ops::Range<usize>; 3] = [0..3, 3..5, 5..6];

#[test]
fn gates_and_geometric_means() {
    let old = ragged(&from_slice(&OLD));
    let advantages = ragged(&from_slice(&ADVANTAGES));
    for level in [
        RatioLevel::Token,
        RatioLevel::SequenceMean,
        RatioLevel::SequenceSum,
    ] {
        for reduction in [Reduction::Sequence {}, Reduction::SequenceSum {}] {
            check(&format!("sapo {level:?} {reduction:?}"), &NEW, |x| {
                let logprobs = ragged(x);
                let inputs = PolicyInputs::new(&logprobs, &old, &advantages);
                let gate = Gate {
                    positive: 1.0,
                    negative: 1.05,
                };
                let loss = smooth::sapo(&inputs, gate, level, reduction).unwrap().loss;
                loss.sum / loss.weight
            });
        }
    }
    check("gmpo", &NEW, |x| {
        let logprobs = ragged(x);
        let inputs = PolicyInputs::new(&logprobs, &old, &advantages);
        smooth::gmpo(&inputs, 0.3, 0.4).unwrap().loss.sum
    });
    check("entropy bonus", &[0.1, 0.4, 2.0, 0.0, 1.0, 0.3], |x| {
        let bonus = select::entropy_bonus(&ragged(x), 0.3, Reduction::Sequence {}).unwrap();
        bonus.sum / bonus.weight
    });
}

/// Where a weight is held, the gradient is that of −weight · A · log π with the weight as a number, which is
/// worked out here with plain arithmetic.
#[test]
fn held_weights() {
    let old = ragged(&from_slice(&OLD));
    let advantages = ragged(&from_slice(&ADVANTAGES));
    let factors = [1.0, 0.5, 1.2, 0.9, 1.1, 0.8];
    let weights = ragged(&from_slice(&factors));
    let gradient_of = |loss: &dyn Fn(&PolicyInputs<'_>) -> Tensor| {
        let leaf = from_slice(&NEW).set_requires_grad(true);
        let logprobs = ragged(&leaf);
        let inputs = PolicyInputs {
            weights: Some(&weights),
            ..PolicyInputs::new(&logprobs, &old, &advantages)
        };
        Vec::<f64>::try_from(&gradient(&loss(&inputs), &leaf)).unwrap()
    };
    let close = |got: Vec<f64>, expected: Vec<f64>| {
        for (g, e) in got.iter().zip(&expected) {
            assert!((g - e).abs() < 1e-12, "{got:?} {expected:?}");
        }
    };
    let ratio = |i: usize| (NEW[i] - OLD[i]).exp();
    let sum = Reduction::SequenceSum {};
    close(
        gradient_of(&|i| {
            let out = smooth::cispo(i, (0.7, 1.5), RatioLevel::Token, sum).unwrap();
            // Ratios: 1.05, 0.67 (A < 0), 1.65 (A > 0), 1.11, 3.3 (A < 0), 0.55 (A > 0).
            assert_eq!((out.stats.clipped_low, out.stats.clipped_high), (1.0, 1.0));
            out.loss.sum
        }),
        (0..6)
            .map(|i| -factors[i] * ratio(i).clamp(0.7, 1.5) * ADVANTAGES[i])
            .collect(),
    );
    close(
        gradient_of(&|i| {
            smooth::vespo(i, GammaWeight::default(), sum)
                .unwrap()
                .loss
                .sum
        }),
        PARTS
            .into_iter()
            .flat_map(|part| {
                let w: f64 = part.clone().map(|i| ratio(i) * factors[i]).product();
                part.map(move |i| {
                    let (k, lambda) = if ADVANTAGES[i] >= 0.0 {
                        (2, 3.0)
                    } else {
                        (3, 2.0)
                    };
                    -(lambda - lambda * w).exp() * w.powi(k) * ADVANTAGES[i]
                })
            })
            .collect(),
    );
}

#[test]
fn settings_that_contradict_are_refused() {
    let x = ragged(&from_slice(&NEW));
    let inputs = PolicyInputs::new(&x, &x, &x);
    let (token, mean) = (RatioLevel::Token, Reduction::Token {});
    let e = smooth::cispo(&inputs, (0.0, 0.2), token, mean).unwrap_err();
    assert!(e.to_string().contains("bounds ρ itself"), "{e}");
    let gate = Gate {
        positive: 0.0,
        negative: 1.0,
    };
    assert!(smooth::sapo(&inputs, gate, token, mean).is_err());
    let shape = GammaWeight {
        lambda_negative: 0.0,
        ..GammaWeight::default()
    };
    assert!(smooth::vespo(&inputs, shape, mean).is_err());
    let weighted = PolicyInputs {
        weights: Some(&x),
        ..inputs
    };
    let e = smooth::gmpo(&weighted, 0.4, 0.4).unwrap_err();
    assert!(e.to_string().contains("geometric mean"), "{e}");
    assert!(select::high_entropy(&x, 0.0).is_err());
    assert!(select::on_policy(&x, &x, &x, f64::NAN).is_err());
}
