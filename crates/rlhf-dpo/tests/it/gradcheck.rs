//! Gradients against central differences, in f64.

use rlhf_dpo::loss::plackett_luce::plackett_luce;
use rlhf_dpo::loss::unpaired::{ThumbWeights, UnpairedLogprobs, UnpairedLoss};
use rlhf_dpo::loss::{
    Divergence, PairLogprobs, PairTokens, PairValues, Pairs, PreferenceLoss, PreferenceMix,
};
use rlhf_kernels::{Offsets, Ragged};
use tch::Tensor;

use crate::device::from_slice;
use crate::every::every_loss;
use crate::golden_io::gradient;

/// Compares the gradient of `f` at `x` with central differences.
fn check(name: &str, x: &[f64], f: impl Fn(&Tensor) -> Tensor) {
    const STEP: f64 = 1e-6;
    let leaf = from_slice(x).set_requires_grad(true);
    let got = Vec::<f64>::try_from(&gradient(&f(&leaf), &leaf)).unwrap();
    assert!(got.iter().any(|g| *g != 0.0), "{name}: no gradient at all");
    for i in 0..x.len() {
        let at = |h: f64| {
            let mut moved = x.to_vec();
            moved[i] += h;
            f(&from_slice(&moved)).double_value(&[])
        };
        let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
        let allowed = 1e-8 * expected.abs().max(1.0);
        assert!(
            (got[i] - expected).abs() < allowed,
            "{name} [{i}]: {} against {expected}",
            got[i]
        );
    }
}

/// Log-probs of three pairs, chosen and rejected in turn.
const LOGPROBS: [f64; 6] = [-3.0, -1.0, -7.0, -2.5, -2.0, -9.0];

fn column(x: &[f64], first: i64) -> Tensor {
    from_slice(x).slice(0, first, None, 2)
}

fn values(x: &[f64]) -> PairValues {
    PairValues::new(&column(x, 0), &column(x, 1)).unwrap()
}

fn pairs(x: &Tensor) -> Pairs {
    let reference = [-2.5, -1.5, -6.0, -3.3, -2.4, -4.0];
    let logprobs = PairLogprobs {
        chosen: x.slice(0, 0, None, 2),
        rejected: x.slice(0, 1, None, 2),
        ref_chosen: column(&reference, 0),
        ref_rejected: column(&reference, 1),
    };
    Pairs {
        lengths: Some(values(&[3.0, 2.0, 5.0, 4.0, 1.0, 6.0])),
        scores: Some(values(&[1.5, 0.5, 0.2, -0.9, 3.0, 0.0])),
        delta: 0.2,
        ..logprobs.into()
    }
}

#[test]
fn every_loss_of_pairs() {
    for loss in every_loss() {
        check(&format!("{loss:?}"), &LOGPROBS, |x| {
            loss.compute(&pairs(x)).unwrap().loss.sum
        });
    }
}

#[test]
fn every_divergence_and_modifier() {
    let sigmoid = PreferenceLoss::Sigmoid {
        beta: 0.3,
        label_smoothing: 0.0,
    };
    for divergence in [
        Divergence::ReverseKl,
        Divergence::ForwardKl,
        Divergence::JensenShannon,
        Divergence::Alpha { alpha: 0.5 },
    ] {
        for loss in [sigmoid, PreferenceLoss::ApoZero { beta: 0.3 }] {
            let mix = PreferenceMix {
                divergence,
                ..loss.into()
            };
            check(&format!("{divergence:?} {loss:?}"), &LOGPROBS, |x| {
                let weighted = Pairs {
                    weights: Some(from_slice(&[0.5, 2.0, 1.0])),
                    ..pairs(x)
                };
                mix.compute(&weighted).unwrap().loss.sum
            });
        }
    }
    // LD-DPO: pairs of lengths (2, 1), (1, 3).
    let tokens = |x: &Tensor| {
        let ragged = |from: i64, lengths: &[i64]| {
            let n = lengths.iter().sum();
            Ragged::new(
                x.narrow(0, from, n),
                Offsets::from_lengths(lengths).unwrap(),
            )
            .unwrap()
        };
        PairTokens::new(&ragged(0, &[2, 1]), &ragged(3, &[1, 3])).unwrap()
    };
    let x = [-0.3, -1.1, -0.7, -2.0, -0.1, -0.9, -1.7];
    let reference = tokens(&from_slice(&x.map(|l| l * 0.8 - 0.1)));
    check("LD-DPO", &x, |x| {
        let logprobs = PairLogprobs::new(
            &tokens(x).length_desensitized(0.4).unwrap(),
            &reference.length_desensitized(0.4).unwrap(),
        );
        sigmoid.compute(&logprobs.into()).unwrap().loss.sum
    });
}

#[test]
fn unpaired_losses() {
    let weights = ThumbWeights {
        desirable: 1.33,
        undesirable: 0.7,
    };
    let beta = 0.4;
    for loss in [
        UnpairedLoss::Kto { beta, weights },
        UnpairedLoss::Bco { beta },
        UnpairedLoss::ApoZeroUnpaired { beta, weights },
    ] {
        check(&format!("{loss:?}"), &LOGPROBS[..4], |x| {
            let completions = UnpairedLogprobs {
                logprobs: x.shallow_clone(),
                ref_logprobs: from_slice(&[-2.0, -1.5, -6.0, -4.0]),
                desirable: from_slice(&[true, false, true, false]),
            };
            loss.compute(&completions, 0.3).unwrap().loss.sum
        });
    }
}

#[test]
fn rankings() {
    check("plackett_luce", &LOGPROBS, |x| {
        let offsets = Offsets::new(vec![0, 4, 6]).unwrap();
        let ratios = Ragged::new(x.shallow_clone(), offsets).unwrap();
        plackett_luce(&ratios, 0.3).unwrap().loss.sum
    });
}

#[test]
fn the_reference_gets_no_gradient() {
    for loss in every_loss() {
        let leaf = |x: &[f64]| from_slice(x).set_requires_grad(true);
        let logprobs = PairLogprobs {
            chosen: leaf(&[-1.0, -2.0]),
            rejected: leaf(&[-2.0, -4.0]),
            ref_chosen: leaf(&[-1.5, -2.5]),
            ref_rejected: leaf(&[-1.5, -3.0]),
        };
        let pairs = Pairs {
            lengths: Some(values(&[2.0, 2.0, 3.0, 3.0])),
            scores: Some(values(&[1.0, 0.0, 2.0, 0.0])),
            ..logprobs.into()
        };
        let out = loss.compute(&pairs).unwrap();
        out.loss.sum.backward();
        let logprobs = &pairs.logprobs;
        assert!(
            logprobs.chosen.grad().defined()
                && !logprobs.ref_chosen.grad().defined()
                && !logprobs.ref_rejected.grad().defined(),
            "{loss:?}"
        );
        assert!(!out.chosen_rewards.requires_grad() && !out.rejected_rewards.requires_grad());
    }
}
