//! Every gradient against central differences in f64.

use rlhf_kernels::kl::SampledKl;
use rlhf_kernels::surrogate::{Advantages, KlTerm, SurrogateInputs, SurrogateOptions, TokenWeight};
use rlhf_kernels::{
    AttentionOptions, Direction, Head, LogprobOptions, Mean, Offsets, Ragged, entropy,
    linear_logprobs, recompute, scan, shared_prefix_attention, surrogate, token_logprobs,
    token_logprobs_in_place,
};
use tch::{Kind, Tensor};

use crate::{from_slice, largest_difference, layout, wave};

const STEP: f64 = 1e-5;

/// Checks d f / d inputs, element by element. `f` gives any tensor; a fixed pattern weighs it.
pub(crate) fn check(name: &str, inputs: &[Tensor], f: &dyn Fn(&[Tensor]) -> Tensor) {
    let scalar = |x: &[Tensor]| {
        let y = f(x);
        let weights = wave(&y.size(), 7.3, Kind::Double);
        (y * weights).sum(Kind::Double)
    };
    let leaves: Vec<Tensor> = inputs
        .iter()
        .map(|t| t.copy().set_requires_grad(true))
        .collect();
    let analytic = Tensor::run_backward(&[scalar(&leaves)], &leaves, false, false);
    let _guard = tch::no_grad_guard();
    for (i, input) in inputs.iter().enumerate() {
        let mut numeric = Vec::new();
        for j in 0..input.numel() as i64 {
            let shifted = |by: f64| {
                let mut all: Vec<Tensor> = inputs.iter().map(Tensor::copy).collect();
                let _ = all[i]
                    .view(-1)
                    .get(j)
                    .fill_(input.view(-1).double_value(&[j]) + by);
                let y = scalar(&all).double_value(&[]);
                all.clear();
                y
            };
            numeric.push((shifted(STEP) - shifted(-STEP)) / (2.0 * STEP));
        }
        let numeric = Tensor::from_slice(&numeric)
            .to_device(input.device())
            .view_as(input);
        let scale = numeric.abs().max().double_value(&[]).max(1.0);
        let error = largest_difference(&analytic[i], &numeric) / scale;
        assert!(error < 1e-6, "{name}: input {i} differs by {error:.2e}");
    }
}

#[test]
fn linear_logprobs_all_settings() {
    let (m, h, v) = (5, 4, 7);
    let inputs = [
        wave(&[m, h], 1.0, Kind::Double),
        wave(&[v, h], 2.0, Kind::Double) * 2.0,
        wave(&[v], 3.0, Kind::Double),
    ];
    let ids = from_slice(&[0i64, 6, 3, 3, 1]);
    for (temperature, softcap) in [(1.0, None), (0.7, None), (1.0, Some(1.5)), (1.3, Some(0.8))] {
        // Whole rows, and tiles of 3 rows and 2 words; at last with kept logits.
        for (chunk_rows, chunk_bytes) in [
            (Some(1), None),
            (Some(3), Some(48)),
            (Some(m), None),
            (None, None),
        ] {
            for entropy in [false, true] {
                let options = LogprobOptions {
                    temperature,
                    softcap,
                    entropy,
                    chunk_rows,
                    chunk_bytes,
                    z_loss: entropy.then_some(0.3),
                    logit_penalty: entropy.then_some(0.2),
                    ..Default::default()
                };
                let name = format!("{options:?}");
                check(&name, &inputs, &|x| {
                    let head = Head {
                        weight: &x[1],
                        bias: Some(&x[2]),
                    };
                    let out = linear_logprobs(&x[0], head, &ids, &options).unwrap();
                    let mut parts = vec![out.logprobs];
                    parts.extend(out.entropy);
                    parts.extend(out.z_loss);
                    parts.extend(out.logit_penalty);
                    Tensor::cat(&parts, 0)
                });
            }
        }
    }
}

/// Where only the entropy is used, and where one side is frozen.
#[test]
fn linear_logprobs_in_part() {
    let hidden = wave(&[4, 3], 1.0, Kind::Double);
    let weight = wave(&[6, 3], 2.0, Kind::Double);
    let ids = from_slice(&[0i64, 5, 3, 3]);
    let with = |entropy| LogprobOptions {
        entropy,
        chunk_rows: Some(3),
        chunk_bytes: Some(48),
        softcap: Some(2.0),
        ..Default::default()
    };
    check("entropy alone", &[hidden.copy(), weight.copy()], &|x| {
        linear_logprobs(&x[0], &x[1], &ids, &with(true))
            .unwrap()
            .entropy
            .unwrap()
    });
    let z = LogprobOptions {
        z_loss: Some(0.7),
        ..with(false)
    };
    check("frozen weight, z-loss", &[hidden.copy()], &|x| {
        let out = linear_logprobs(&x[0], &weight, &ids, &z).unwrap();
        out.logprobs + out.z_loss.unwrap()
    });
    let penalty = LogprobOptions {
        logit_penalty: Some(0.6),
        ..with(false)
    };
    check("frozen weight, penalty alone", &[hidden.copy()], &|x| {
        let out = linear_logprobs(&x[0], &weight, &ids, &penalty).unwrap();
        out.logit_penalty.unwrap()
    });
    for entropy in [false, true] {
        check("frozen weight", &[hidden.copy()], &|x| {
            linear_logprobs(&x[0], &weight, &ids, &with(entropy))
                .unwrap()
                .logprobs
        });
        check("frozen hidden", &[weight.copy()], &|x| {
            linear_logprobs(&hidden, &x[0], &ids, &with(entropy))
                .unwrap()
                .logprobs
        });
    }
}

#[test]
fn ragged_operations() {
    let offsets = Offsets::from_lengths(&[3, 0, 1, 4]).unwrap();
    let inputs = [wave(&[8], 1.0, Kind::Double)];
    type Op = fn(Ragged) -> Tensor;
    let ops: [(&str, Op); 12] = [
        ("sum", |x| x.sum()),
        ("mean", |x| x.mean()),
        ("last", |x| x.last(0.0)),
        ("broadcast", |x| x.broadcast(&x.sum())),
        ("cumsum", |x| x.cumsum().unwrap().values().shallow_clone()),
        ("scan", |x| {
            let y = scan(&x, 0.7, Direction::Backward).unwrap();
            y.values().shallow_clone()
        }),
        ("centred", |x| x.centred().values().shallow_clone()),
        ("std", |x| x.std(1.0)),
        ("standardized", |x| {
            x.standardized(1e-4).values().shallow_clone()
        }),
        ("leave one out", |x| {
            x.leave_one_out().values().shallow_clone()
        }),
        ("whitened", |x| {
            x.whitened(Mean::Removed).values().shallow_clone()
        }),
        ("whitened about its mean", |x| {
            x.whitened(Mean::Kept).values().shallow_clone()
        }),
    ];
    for (name, op) in ops {
        check(name, &inputs, &|x| {
            op(Ragged::new(x[0].shallow_clone(), offsets.clone()).unwrap())
        });
    }
}

/// Sums and scans are linear: their second derivative exists (and is that of what follows).
#[test]
fn ragged_second_derivatives() {
    let offsets = Offsets::from_lengths(&[2, 1]).unwrap();
    let x = wave(&[3], 1.0, Kind::Double).set_requires_grad(true);
    let y = Ragged::new(x.shallow_clone(), offsets).unwrap();
    let loss = y
        .cumsum()
        .unwrap()
        .sum()
        .pow_tensor_scalar(3)
        .sum(Kind::Double);
    let g = Tensor::run_backward(&[loss], &[&x], true, true).remove(0);
    let second = Tensor::run_backward(&[g.get(0)], &[&x], false, false).remove(0);
    // (2x₀ + x₁)³: second derivatives 24s, 12s at s = 2x₀ + x₁.
    let s = 2.0 * x.double_value(&[0]) + x.double_value(&[1]);
    let expected = from_slice(&[24.0 * s, 12.0 * s, 0.0]);
    assert!(largest_difference(&second, &expected) < 1e-12);
}

#[test]
fn from_logits() {
    let logits = wave(&[4, 6], 3.0, Kind::Double) * 3.0;
    let ids = from_slice(&[0i64, 5, 2, 2]);
    check("token_logprobs", &[logits.copy()], &|x| {
        token_logprobs(&x[0], &ids).unwrap()
    });
    // Of a product, whose backward does not need it: a leaf may not be written over.
    check("token_logprobs_in_place", &[logits.copy()], &|x| {
        token_logprobs_in_place(&(&x[0] * 1.5), &ids).unwrap()
    });
    check("entropy", &[logits], &|x| entropy(&x[0]).unwrap());
}

#[test]
fn sampled_divergences() {
    let (logprobs, other) = (wave(&[6], 1.0, Kind::Double), wave(&[6], 4.0, Kind::Double));
    for kl in [SampledKl::K1, SampledKl::K2, SampledKl::K3] {
        check(&format!("{kl:?}"), &[logprobs.copy()], &|x| {
            kl.estimate(&x[0], &other).unwrap()
        });
    }
    // The value of one with the gradient of another is no function's derivative: against the other's own.
    let leaf = logprobs.set_requires_grad(true);
    let of = |y: Tensor| Tensor::run_backward(&[y.sum(None)], &[&leaf], false, false).remove(0);
    let through = SampledKl::K3.straight_through(SampledKl::K2, &leaf, &other);
    assert_eq!(
        of(through.unwrap()),
        of(SampledKl::K2.estimate(&leaf, &other).unwrap())
    );
}

/// One advantage a completion, its own weight a token, a divergence: all in the fused pass.
#[test]
fn surrogate_of_completions() {
    let offsets = Offsets::from_lengths(&[2, 0, 3]).unwrap();
    let (old, other) = (
        wave(&[5], 2.0, Kind::Double) * 0.3,
        wave(&[5], 3.0, Kind::Double),
    );
    let advantages = from_slice(&[1.2f64, 3.0, -0.7]);
    let weights = from_slice(&[1.0f64, 0.5, 0.0, 2.0, 1.0]);
    for token_weight in [TokenWeight::One, TokenWeight::SequenceMean] {
        let logprobs = wave(&[5], 1.0, Kind::Double) * 0.3;
        check(&format!("{token_weight:?}"), &[logprobs], &|x| {
            let logprobs = Ragged::new(x[0].shallow_clone(), offsets.clone()).unwrap();
            let inputs = SurrogateInputs {
                logprobs: &logprobs,
                old_logprobs: &old,
                advantages: Advantages::Completion(&advantages),
                weights: Some(&weights),
                kl: Some(KlTerm {
                    ref_logprobs: &other,
                    value: SampledKl::K3,
                    gradient: SampledKl::K3,
                    coef: 0.3,
                    weighted: false,
                }),
            };
            let options = SurrogateOptions {
                epsilon_low: 0.2,
                epsilon_high: 0.3,
                dual: None,
                token_weight,
            };
            surrogate(&inputs, &options).unwrap().loss.sum
        });
    }
}

#[test]
fn attention_ragged_groups_and_shared_heads() {
    let layout = layout(&[(3, &[2, 1, 3]), (0, &[2]), (2, &[]), (1, &[0, 2])]);
    let n = layout.num_rows();
    for (hq, hkv, d) in [(2, 2, 3), (4, 2, 2), (3, 1, 5)] {
        let size = |h: i64| [n, h, d];
        let inputs = [
            wave(&size(hq), 1.0, Kind::Double),
            wave(&size(hkv), 2.0, Kind::Double),
            wave(&size(hkv), 3.0, Kind::Double),
        ];
        check(&format!("{hq} over {hkv} heads of {d}"), &inputs, &|x| {
            shared_prefix_attention(&x[0], &x[1], &x[2], &layout, &AttentionOptions::new(0.9))
                .unwrap()
        });
    }
}

#[test]
fn attention_with_cap_and_window() {
    let layout = layout(&[(3, &[2, 3]), (0, &[4])]);
    let n = layout.num_rows();
    let inputs = [4, 2, 2].map(|h| wave(&[n, h, 3], 1.0 + h as f64, Kind::Double));
    for (softcap, window) in [(Some(0.8), None), (None, Some(2)), (Some(1.5), Some(3))] {
        let options = AttentionOptions {
            softcap,
            window,
            ..AttentionOptions::new(0.9)
        };
        check(&format!("{options:?}"), &inputs, &|x| {
            shared_prefix_attention(&x[0], &x[1], &x[2], &layout, &options).unwrap()
        });
    }
}

#[test]
fn recompute_of_a_block() {
    let inputs = [
        wave(&[3, 4], 1.0, Kind::Double),
        wave(&[4, 2], 2.0, Kind::Double),
    ];
    check("recompute", &inputs, &|x| {
        recompute(&[&x[0], &x[1]], |x| x[0].tanh().matmul(&x[1]).sin()).unwrap()
    });
}
