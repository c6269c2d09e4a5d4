//! The fused operations against their plain versions, and their edges.

use std::cell::Cell;
use std::collections::HashMap;
use std::rc::Rc;

use rlhf_kernels::kl::{Divergence, KlOptions, Logits};
use rlhf_kernels::optim::{AdamW, AdamWConfig, clip_grad_norm};
use rlhf_kernels::{
    AttentionOptions, Head, LogprobOptions, Offsets, Panels, Ragged, discounted_returns, entropy,
    gae, linear_kl, linear_logprobs, recompute, reference, shared_prefix_attention, token_logprobs,
    token_logprobs_in_place,
};
use tch::{Device, Kind, Tensor};

use crate::{cpu_wave, device, from_slice, largest_difference, layout, wave};

/// Result and gradients of the same loss of `ours` and `plain`.
pub(crate) fn compare(
    leaves: &[Tensor],
    ours: &dyn Fn() -> Tensor,
    plain: &dyn Fn() -> Tensor,
    tolerance: f64,
) {
    let run = |f: &dyn Fn() -> Tensor| {
        let y = f();
        let loss = (&y * wave(&y.size(), 5.0, y.kind())).sum(y.kind());
        let grads = Tensor::run_backward(&[loss], leaves, false, false);
        std::iter::once(y.detach()).chain(grads).collect::<Vec<_>>()
    };
    for (i, (a, b)) in run(ours).iter().zip(&run(plain)).enumerate() {
        let scale = if b.numel() == 0 {
            1.0
        } else {
            b.abs().max().double_value(&[]).max(1.0)
        };
        let error = largest_difference(a, b) / scale;
        assert!(
            error < tolerance,
            "result {i} (0: value, then gradients) differs by {error:.2e}"
        );
    }
}

pub(crate) fn tolerance(kind: Kind) -> f64 {
    if kind == Kind::Double { 1e-12 } else { 1e-5 }
}

/// Wide vocabularies (vector tails of every length), chunk borders, both kinds.
#[test]
fn linear_logprobs_is_the_plain_one() {
    for kind in [Kind::Float, Kind::Double] {
        for (m, h, v) in [(1, 1, 1), (1, 3, 2), (7, 8, 16), (8, 8, 65), (9, 16, 1037)] {
            let hidden = wave(&[m, h], 1.0, kind).set_requires_grad(true);
            let weight = (wave(&[v, h], 2.0, kind) * 2.0).set_requires_grad(true);
            let bias = wave(&[v], 3.0, kind).set_requires_grad(true);
            let ids = (Tensor::arange(m, (Kind::Int64, device())) * 31).remainder(v);
            // The third: tiles of 4 rows and 16 or 32 words; the fourth: of a single number or two.
            for (chunk_rows, chunk_bytes) in [
                (Some(1), None),
                (Some(8), None),
                (Some(4), Some(512)),
                (None, Some(8)),
                (None, None),
            ] {
                if chunk_bytes == Some(8) && v > 100 {
                    continue;
                }
                let options = LogprobOptions {
                    temperature: 0.8,
                    softcap: Some(4.0),
                    entropy: true,
                    log_sum_exp: true,
                    z_loss: Some(0.1),
                    logit_penalty: Some(0.3),
                    top1: true,
                    moments: true,
                    chunk_rows,
                    chunk_bytes,
                    ..Default::default()
                };
                let all = |out: rlhf_kernels::Logprobs| {
                    let (top1, moments) = (out.top1.unwrap(), out.moments.unwrap());
                    let parts = [
                        out.logprobs,
                        out.entropy.unwrap(),
                        out.log_sum_exp.unwrap(),
                        out.z_loss.unwrap(),
                        out.logit_penalty.unwrap(),
                        top1.logprobs,
                        top1.agrees.to_kind(kind),
                        moments.log_sum_sq_probs,
                        moments.mean_logits,
                    ];
                    Tensor::cat(&parts, 0)
                };
                for bias in [None, Some(&bias)] {
                    let head = Head {
                        weight: &weight,
                        bias,
                    };
                    let mut leaves = vec![hidden.shallow_clone(), weight.shallow_clone()];
                    leaves.extend(bias.map(Tensor::shallow_clone));
                    compare(
                        &leaves,
                        &|| all(linear_logprobs(&hidden, head, &ids, &options).unwrap()),
                        &|| all(reference::linear_logprobs(&hidden, head, &ids, &options).unwrap()),
                        tolerance(kind),
                    );
                }
            }
        }
    }
}

/// With a frozen weight the gradient is made in forward; with `hidden` frozen only the weight's.
#[test]
fn frozen_sides_get_no_gradient() {
    let ids = from_slice(&[2i64, 0, 1, 1, 2]);
    let options = LogprobOptions {
        chunk_rows: Some(2),
        ..Default::default()
    };
    for (hidden_wants, weight_wants) in [(true, false), (false, true)] {
        let hidden = wave(&[5, 4], 1.0, Kind::Float).set_requires_grad(hidden_wants);
        let weight = wave(&[3, 4], 2.0, Kind::Float).set_requires_grad(weight_wants);
        let leaf = if hidden_wants { &hidden } else { &weight };
        compare(
            &[leaf.shallow_clone()],
            &|| {
                linear_logprobs(&hidden, &weight, &ids, &options)
                    .unwrap()
                    .logprobs
            },
            &|| {
                reference::linear_logprobs(&hidden, &weight, &ids, &options)
                    .unwrap()
                    .logprobs
            },
            1e-6,
        );
        linear_logprobs(&hidden, &weight, &ids, &options)
            .unwrap()
            .logprobs
            .sum(None)
            .backward();
        assert_eq!(hidden.grad().defined(), hidden_wants);
        assert_eq!(weight.grad().defined(), weight_wants);
    }
    let (hidden, weight) = (
        wave(&[5, 4], 1.0, Kind::Float),
        wave(&[3, 4], 2.0, Kind::Float),
    );
    let out = linear_logprobs(&hidden, &weight, &ids, &options).unwrap();
    assert!(!out.logprobs.requires_grad());
}

/// With a frozen head backward needs nothing that forward has not made, whatever part of the result the
/// loss uses: entropy and z-loss included, with a bias that is frozen too or is all that is trained.
#[test]
fn frozen_heads_with_every_output() {
    let ids = from_slice(&[2i64, 0, 1, 1, 2]);
    let hidden = wave(&[5, 4], 1.0, Kind::Float).set_requires_grad(true);
    let weight = wave(&[3, 4], 2.0, Kind::Float);
    for bias_wants in [false, true] {
        let bias = wave(&[3], 4.0, Kind::Float).set_requires_grad(bias_wants);
        let head = Head {
            weight: &weight,
            bias: Some(&bias),
        };
        let mut leaves = vec![hidden.shallow_clone()];
        if bias_wants {
            leaves.push(bias.shallow_clone());
        }
        let options = LogprobOptions {
            chunk_rows: Some(2),
            chunk_bytes: Some(8),
            entropy: true,
            log_sum_exp: true,
            logit_penalty: Some(0.2),
            softcap: Some(1.5),
            ..Default::default()
        };
        let parts: [fn(rlhf_kernels::Logprobs) -> Tensor; 6] = [
            |o| o.logit_penalty.unwrap() + o.logprobs,
            |o| o.logprobs,
            |o| o.entropy.unwrap(),
            |o| o.log_sum_exp.unwrap(),
            |o| o.logprobs * 0.5 - o.log_sum_exp.unwrap(),
            |o| o.logprobs * 0.5 - o.log_sum_exp.unwrap() + o.entropy.unwrap(),
        ];
        for part in parts {
            compare(
                &leaves,
                &|| part(linear_logprobs(&hidden, head, &ids, &options).unwrap()),
                &|| part(reference::linear_logprobs(&hidden, head, &ids, &options).unwrap()),
                1e-6,
            );
        }
    }
}

/// Of equally likely words the first is the most likely one.
#[test]
fn the_first_of_equals() {
    for kind in [Kind::Float, Kind::Double] {
        let hidden = Tensor::ones([4, 1], (kind, device()));
        let weight = from_slice(&[0f64, 2., 1., 2.]).view([4, 1]).to_kind(kind);
        let ids = from_slice(&[0i64, 1, 2, 3]);
        for chunk_bytes in [None, Some(1), Some(16)] {
            let options = LogprobOptions {
                top1: true,
                chunk_bytes,
                ..Default::default()
            };
            let top1 = linear_logprobs(&hidden, &weight, &ids, &options)
                .unwrap()
                .top1
                .unwrap();
            let agrees = Vec::<bool>::try_from(&top1.agrees).unwrap();
            assert_eq!(agrees, [false, true, false, false]);
            // −log(2 + e⁻¹ + e⁻²) = −.9176
            let expected = -(2.0 + (-1f64).exp() + (-2f64).exp()).ln();
            assert!((top1.logprobs.double_value(&[2]) - expected).abs() < 1e-6);
        }
    }
}

/// Logits that are kept give the bits of those that are computed again, and serve a second backward.
#[test]
fn kept_logits() {
    let (m, v) = (600, 2003);
    let leaf = |size: &[i64], seed| cpu_wave(size, seed, Kind::Float).set_requires_grad(true);
    let (hidden, weight) = (leaf(&[m, 8], 1.0), leaf(&[v, 8], 2.0));
    let ids = (Tensor::arange(m, (Kind::Int64, Device::Cpu)) * 31).remainder(v);
    // 4 MiB is the tile that is the default: here there are two.
    let [kept, computed] = [None, Some(4 << 20)].map(|chunk_bytes| {
        let options = LogprobOptions {
            softcap: Some(4.0),
            entropy: true,
            z_loss: Some(0.1),
            chunk_bytes,
            ..Default::default()
        };
        let out = linear_logprobs(&hidden, &weight, &ids, &options).unwrap();
        let loss = out.logprobs.sum(None) + out.entropy.unwrap().square().sum(None);
        let loss = loss + out.z_loss.unwrap().sum(None);
        let mut all = Tensor::run_backward(&[&loss], &[&hidden, &weight], true, false);
        all.extend(Tensor::run_backward(
            &[&loss],
            &[&hidden, &weight],
            false,
            false,
        ));
        all.push(loss.detach());
        all
    });
    assert_eq!(kept[..2], kept[2..4]);
    assert_eq!(kept, computed);
}

/// However small the budget, the result is the same.
#[test]
fn any_budget() {
    let hidden = wave(&[6, 4], 1.0, Kind::Double).set_requires_grad(true);
    let weight = wave(&[9, 4], 2.0, Kind::Double).set_requires_grad(true);
    let ids = from_slice(&[0i64, 1, 2, 3, 8, 5]);
    for chunk_bytes in [1, 600, 1 << 30] {
        let options = LogprobOptions {
            chunk_bytes: Some(chunk_bytes),
            ..Default::default()
        };
        compare(
            &[hidden.shallow_clone(), weight.shallow_clone()],
            &|| {
                linear_logprobs(&hidden, &weight, &ids, &options)
                    .unwrap()
                    .logprobs
            },
            &|| {
                reference::linear_logprobs(&hidden, &weight, &ids, &options)
                    .unwrap()
                    .logprobs
            },
            1e-12,
        );
    }
}

/// Filtered gradients lie within their bound, for trained and frozen heads, with bias, soft cap and every
/// output; a filter below every probability changes nothing but rounding, and values change by no more.
#[test]
fn filtered_gradients_keep_their_bound() {
    for kind in [Kind::Float, Kind::Double] {
        // So many words that some runs of 32 have none that is likely.
        let (m, h, v) = (5, 6, 3000);
        let hidden = (wave(&[m, h], 1.0, kind) * 6.0).set_requires_grad(true);
        let weight = (wave(&[v, h], 2.0, kind) * 2.0).set_requires_grad(true);
        let bias = wave(&[v], 3.0, kind).set_requires_grad(true);
        let ids = (Tensor::arange(m, (Kind::Int64, device())) * 31).remainder(v);
        let cotangent = wave(&[m], 8.0, kind);
        let leaves = [&hidden, &weight, &bias];
        for softcap in [None, Some(12.0)] {
            for frozen in [false, true] {
                let plain = [weight.detach(), bias.detach()];
                let head = if frozen {
                    Head {
                        weight: &plain[0],
                        bias: Some(&plain[1]),
                    }
                } else {
                    Head {
                        weight: &weight,
                        bias: Some(&bias),
                    }
                };
                let wanted = if frozen { 1 } else { 3 };
                let run = |filter: Option<f64>| {
                    let options = LogprobOptions {
                        filter,
                        softcap,
                        log_sum_exp: true,
                        temperature: 0.8,
                        chunk_rows: Some(4),
                        ..Default::default()
                    };
                    let out = linear_logprobs(&hidden, head, &ids, &options).unwrap();
                    let lse = out.log_sum_exp.unwrap();
                    let loss = ((&out.logprobs + &lse * 0.3) * &cotangent).sum(kind);
                    let grads = Tensor::run_backward(&[loss], &leaves[..wanted], false, false);
                    (out.logprobs.detach(), grads)
                };
                let (values, exact) = run(None);
                for filter in [1e-30, 1e-5, 1e-2] {
                    let (same, filtered) = run(Some(filter));
                    // Words lie in tiles here and in whole rows there.
                    assert!(largest_difference(&values, &same) < 10.0 * tolerance(kind));
                    let least = if kind == Kind::Double { 1e-11 } else { 2e-4 };
                    // g of log p and of lse together, |h| and |W| summed whole.
                    let g = 1.3 * filter / 0.8;
                    let size = |t: &Tensor| t.abs().sum(Kind::Double).double_value(&[]);
                    let bounds = [
                        g * cotangent.abs().max().double_value(&[]) * size(&weight),
                        g * size(&hidden),
                        g * size(&cotangent),
                    ];
                    for ((a, b), bound) in filtered.iter().zip(&exact).zip(bounds) {
                        let error = largest_difference(a, b);
                        assert!(
                            error <= bound + least,
                            "{filter}: {error:.2e} of {bound:.2e}"
                        );
                    }
                    // It did leave something out.
                    if filter > 1e-3 {
                        assert!(largest_difference(&filtered[0], &exact[0]) > 0.0);
                    }
                }
            }
        }
    }
}

#[test]
fn no_rows() {
    let hidden = Tensor::zeros([0, 4], (Kind::Float, device())).set_requires_grad(true);
    let weight = wave(&[3, 4], 2.0, Kind::Float).set_requires_grad(true);
    let ids = Tensor::zeros([0], (Kind::Int64, device()));
    let options = LogprobOptions {
        entropy: true,
        ..Default::default()
    };
    let out = linear_logprobs(&hidden, &weight, &ids, &options).unwrap();
    assert_eq!(
        (out.logprobs.size(), out.entropy.as_ref().unwrap().size()),
        (vec![0], vec![0])
    );
    (out.logprobs.sum(None) + out.entropy.unwrap().sum(None)).backward();
    assert_eq!(weight.grad().abs().sum(None).double_value(&[]), 0.0);
    assert_eq!(hidden.grad().size(), [0, 4]);
    let logits = Tensor::zeros([0, 4], (Kind::Float, device()));
    assert_eq!(token_logprobs(&logits, &ids).unwrap().size(), [0]);
    assert_eq!(entropy(&logits).unwrap().size(), [0]);
    let nobody = layout(&[]);
    let q = Tensor::zeros([0, 2, 4], (Kind::Float, device()));
    assert_eq!(
        shared_prefix_attention(&q, &q, &q, &nobody, &AttentionOptions::new(1.0))
            .unwrap()
            .size(),
        [0, 2, 4]
    );
}

/// bf16 weights: the sums are f32's, the gradients come back in bf16 and are f32's but for its rounding.
#[test]
fn narrow_types_are_computed_wide() {
    let leaf = |size: &[i64], seed: f64| wave(size, seed, Kind::BFloat16).set_requires_grad(true);
    let wide = |t: &Tensor| t.detach().to_kind(Kind::Float).set_requires_grad(true);
    let near = |narrow: &[&Tensor], plain: &[&Tensor]| {
        for (a, b) in narrow.iter().zip(plain) {
            assert_eq!(a.grad().kind(), Kind::BFloat16);
            let largest = b.grad().abs().max().double_value(&[]);
            let error = largest_difference(&a.grad(), &b.grad()) / largest;
            assert!(error < 1e-2, "{error:.1e}");
        }
    };
    let (hidden, weight) = (leaf(&[6, 8], 1.0), leaf(&[50, 8], 2.0));
    let ids = from_slice(&[0i64, 1, 2, 30, 40, 49]);
    let out = linear_logprobs(&hidden, &weight, &ids, &LogprobOptions::default()).unwrap();
    let plain_sides = (wide(&hidden), wide(&weight));
    let plain = reference::linear_logprobs(
        &plain_sides.0,
        &plain_sides.1,
        &ids,
        &LogprobOptions::default(),
    )
    .unwrap();
    assert_eq!(out.logprobs.kind(), Kind::Float);
    assert!(largest_difference(&out.logprobs, &plain.logprobs) < 2e-6);
    let by = wave(&[6], 9.0, Kind::Float);
    (&out.logprobs * &by).sum(Kind::Float).backward();
    (&plain.logprobs * &by).sum(Kind::Float).backward();
    near(&[&hidden, &weight], &[&plain_sides.0, &plain_sides.1]);

    let (student, head) = (leaf(&[6, 8], 3.0), leaf(&[50, 8], 4.0));
    let (plain_student, plain_head) = (wide(&student), wide(&head));
    let (teacher, other) = (hidden.detach(), weight.detach());
    let (plain_teacher, plain_other) = (wide(&teacher).detach(), wide(&other).detach());
    let options = KlOptions::new(Divergence::Reverse);
    let kl = linear_kl(
        Logits::new(&student, &head),
        Logits::new(&teacher, &other),
        &options,
    )
    .unwrap();
    let plain = reference::linear_kl(
        Logits::new(&plain_student, &plain_head),
        Logits::new(&plain_teacher, &plain_other),
        &options,
    )
    .unwrap();
    assert!(largest_difference(&kl, &plain) < 1e-5);
    (&kl * &by).sum(Kind::Float).backward();
    (&plain * &by).sum(Kind::Float).backward();
    near(&[&student, &head], &[&plain_student, &plain_head]);

    let groups = layout(&[(3, &[4, 2])]);
    let [q, k, v] = [1.0, 5.0, 6.0].map(|seed| leaf(&[9, 2, 8], seed));
    let [a, b, c] = [&q, &k, &v].map(wide);
    let options = AttentionOptions::new(0.3);
    let seen = shared_prefix_attention(&q, &k, &v, &groups, &options).unwrap();
    let exact = reference::shared_prefix_attention(&a, &b, &c, &groups, &options).unwrap();
    assert_eq!(seen.kind(), Kind::BFloat16);
    assert!(largest_difference(&seen, &exact) < 4e-3);
    let by = wave(&[9, 2, 8], 7.0, Kind::Float);
    (seen.to_kind(Kind::Float) * &by)
        .sum(Kind::Float)
        .backward();
    (exact * &by).sum(Kind::Float).backward();
    near(&[&q, &k, &v], &[&a, &b, &c]);
}

/// The gradient lies where the logits lay, and is the same; whoever else needs the logits is refused.
#[test]
fn backward_over_the_logits() {
    let ids = from_slice(&[2i64, 0, 16]);
    for kind in [Kind::Float, Kind::Double] {
        let leaf = wave(&[3, 17], 1.0, kind).set_requires_grad(true);
        let gradient = |out: &Tensor| {
            let g = wave(&[3], 5.0, kind);
            Tensor::run_backward(&[(out * g).sum(None)], &[&leaf], false, false).remove(0)
        };
        let expected = gradient(&token_logprobs(&(&leaf * 3.0), &ids).unwrap());
        let logits = &leaf * 3.0;
        let out = token_logprobs_in_place(&logits, &ids).unwrap();
        assert!(largest_difference(&gradient(&out), &expected) == 0.0);
        assert!(largest_difference(&logits, &(&expected / 3.0)) < 1e-6);
        // tanh needs its result again.
        let logits = leaf.tanh();
        let out = token_logprobs_in_place(&logits, &ids).unwrap();
        let e = Tensor::f_run_backward(&[out.sum(None)], &[&leaf], false, false).unwrap_err();
        assert!(
            e.to_string().contains("modified by an inplace operation"),
            "{e}"
        );
        let e = token_logprobs_in_place(&leaf, &ids)
            .unwrap_err()
            .to_string();
        assert!(e.contains("are a leaf"), "{e}");
    }
    // What is computed wide has another storage.
    let leaf = wave(&[3, 17], 1.0, Kind::BFloat16).set_requires_grad(true);
    let logits = &leaf * 1.0;
    let before = logits.detach().copy();
    token_logprobs_in_place(&logits, &ids)
        .unwrap()
        .sum(None)
        .backward();
    assert_eq!(logits.detach(), before);
}

/// A logit of −∞ is a word that cannot be: probability 0, entropy contribution 0, gradient 0.
#[test]
fn impossible_words() {
    let inf = f32::NEG_INFINITY;
    for kind in [Kind::Float, Kind::Double] {
        let logits = from_slice(&[1f32, inf, 1., inf, inf, 5.])
            .view([2, 3])
            .to_kind(kind)
            .set_requires_grad(true);
        let h = entropy(&logits).unwrap();
        // Two equal words: ln 2. One word: 0.
        assert!(
            (h.double_value(&[0]) - 2f64.ln()).abs() < 1e-6 && h.double_value(&[1]).abs() < 1e-12
        );
        let logp = token_logprobs(&logits, &from_slice(&[0i64, 2])).unwrap();
        (h.sum(None) + logp.sum(None)).backward();
        // d log p₀ = 1 − ½ on the first word, −½ on the third; the entropy is at its maximum.
        let expected = from_slice(&[0.5f64, 0., -0.5, 0., 0., 0.]).view([2, 3]);
        assert!(largest_difference(&logits.grad(), &expected) < 1e-6);
    }
}

#[test]
fn wrong_arguments_are_named() {
    let hidden = wave(&[2, 4], 1.0, Kind::Float);
    let weight = wave(&[3, 4], 2.0, Kind::Float);
    let ids = from_slice(&[0i64, 3]);
    let text = |r: rlhf_kernels::Result<rlhf_kernels::Logprobs>| r.unwrap_err().to_string();
    let options = LogprobOptions::default();
    // A GPU is not asked what the ids are: one would wait for the answer.
    let on_cpu = device() == Device::Cpu;
    if on_cpu {
        assert_eq!(
            text(linear_logprobs(&hidden, &weight, &ids, &options)),
            "linear_logprobs: ids run from 0 to 3, expected 0..3"
        );
        assert!(text(linear_logprobs(&hidden, &weight, &(&ids - 1), &options)).contains("from -1"));
    }
    assert!(
        text(linear_logprobs(&hidden, &weight.tr(), &ids, &options)).contains("[M, H] and [V, H]")
    );
    let cold = LogprobOptions {
        temperature: 0.0,
        ..options
    };
    assert!(
        text(linear_logprobs(&hidden, &weight, &ids.clamp(0, 2), &cold)).contains("temperature")
    );
    let e = shared_prefix_attention(
        &wave(&[3, 1, 2], 0.0, Kind::Float),
        &wave(&[3, 1, 2], 0.0, Kind::Float),
        &wave(&[3, 1, 2], 0.0, Kind::Float),
        &layout(&[(2, &[2])]),
        &AttentionOptions::new(1.0),
    );
    assert!(e.unwrap_err().to_string().contains("the layout 4"));
}

#[test]
fn second_derivatives_are_refused() {
    let hidden = wave(&[2, 4], 1.0, Kind::Float).set_requires_grad(true);
    let weight = wave(&[3, 4], 2.0, Kind::Float).set_requires_grad(true);
    let ids = from_slice(&[0i64, 1]);
    let q = wave(&[4, 1, 2], 0.0, Kind::Float).set_requires_grad(true);
    let mut outs = vec![
        (
            linear_logprobs(&hidden, &weight, &ids, &LogprobOptions::default())
                .unwrap()
                .logprobs,
            &hidden,
        ),
        (token_logprobs(&hidden, &ids).unwrap(), &hidden),
        (recompute(&[&hidden], |x| x[0].tanh()).unwrap(), &hidden),
    ];
    // In f32 on a GPU it is libtorch's own, which has some.
    if device() == Device::Cpu {
        let layout = layout(&[(2, &[2])]);
        let out = shared_prefix_attention(&q, &q, &q, &layout, &AttentionOptions::new(1.0));
        outs.push((out.unwrap(), &q));
    }
    for (out, leaf) in outs {
        let e = Tensor::f_run_backward(&[out.sum(None)], &[leaf], true, true)
            .unwrap_err()
            .to_string();
        assert!(e.contains("has no second derivative"), "{e}");
    }
}

const LAYOUTS: [&[(i64, &[i64])]; 7] = [
    &[(5, &[3, 4])],
    &[(1, &[1])],
    &[(0, &[9, 2])],
    &[(7, &[]), (4, &[6])],
    &[(0, &[0]), (3, &[0, 5, 0])],
    &[(50, &[70, 1, 48, 49])],
    &[(17, &[30, 33]), (100, &[16, 15, 17]), (2, &[130])],
];

/// Ragged groups, query blocks' borders, head sizes with and without vector tails, shared heads.
#[test]
fn attention_is_the_plain_one() {
    for kind in [Kind::Float, Kind::Double] {
        for groups in LAYOUTS {
            let layout = layout(groups);
            for (hq, hkv, d) in [(1, 1, 4), (4, 2, 8), (2, 2, 32), (3, 1, 20), (2, 1, 64)] {
                let leaf = |h: i64, seed| {
                    (wave(&[layout.num_rows(), h, d], seed, kind) * 2.0).set_requires_grad(true)
                };
                let (q, k, v) = (leaf(hq, 1.0), leaf(hkv, 2.0), leaf(hkv, 3.0));
                let scale = 1.0 / (d as f64).sqrt();
                compare(
                    &[q.shallow_clone(), k.shallow_clone(), v.shallow_clone()],
                    &|| {
                        shared_prefix_attention(&q, &k, &v, &layout, &AttentionOptions::new(scale))
                            .unwrap()
                    },
                    &|| {
                        reference::shared_prefix_attention(
                            &q,
                            &k,
                            &v,
                            &layout,
                            &AttentionOptions::new(scale),
                        )
                        .unwrap()
                    },
                    tolerance(kind),
                );
            }
        }
    }
}

/// Windows shorter and longer than prompts, completions and blocks of queries; soft caps; both.
#[test]
fn attention_with_windows_and_caps_is_the_plain_one() {
    for kind in [Kind::Float, Kind::Double] {
        for groups in LAYOUTS {
            let layout = layout(groups);
            let leaf = |h: i64, seed| {
                (wave(&[layout.num_rows(), h, 20], seed, kind) * 3.0).set_requires_grad(true)
            };
            let (q, k, v) = (leaf(4, 1.0), leaf(2, 2.0), leaf(2, 3.0));
            for (softcap, window) in [
                (Some(2.0), None),
                (None, Some(1)),
                (None, Some(4)),
                (None, Some(16)),
                (Some(0.5), Some(33)),
                (None, Some(70)),
                (None, Some(1000)),
            ] {
                let options = AttentionOptions {
                    scale: 0.3,
                    softcap,
                    window,
                };
                compare(
                    &[q.shallow_clone(), k.shallow_clone(), v.shallow_clone()],
                    &|| shared_prefix_attention(&q, &k, &v, &layout, &options).unwrap(),
                    &|| reference::shared_prefix_attention(&q, &k, &v, &layout, &options).unwrap(),
                    tolerance(kind),
                );
            }
        }
    }
}

/// A cap that nothing comes near changes nothing.
#[test]
fn a_distant_cap_is_no_cap() {
    let layout = layout(&[(20, &[7, 40])]);
    let x = wave(&[67, 2, 16], 1.0, Kind::Double);
    let with = |softcap| {
        let options = AttentionOptions {
            softcap,
            ..AttentionOptions::new(0.25)
        };
        shared_prefix_attention(&x, &x, &x, &layout, &options).unwrap()
    };
    assert!(largest_difference(&with(Some(1e6)), &with(None)) < 1e-10);
}

/// Every number of rows around the tiles' borders, matrices of whole and broken panels, f32 and bf16.
#[test]
fn panels_are_the_plain_product() {
    for kind in [Kind::Float, Kind::BFloat16] {
        for (out, from) in [(32, 7), (64, 96), (1, 5), (33, 16), (95, 40)] {
            let weight = cpu_wave(&[out, from], 1.0, Kind::Float).to_kind(kind);
            let panels = Panels::pack(&weight).unwrap();
            // What is kept does not depend on how the weight lies.
            let turned = Panels::pack(&weight.tr().contiguous().tr()).unwrap();
            let x = cpu_wave(&[3, from], 5.0, Kind::Float);
            assert_eq!(turned.product(&x).unwrap(), panels.product(&x).unwrap());
            for rows in [1, 2, 3, 4, 5, 7, 8, 9, 12, 13, 16, 24, 25, 32, 33, 100] {
                let x = cpu_wave(&[rows, from + 2], 2.0, Kind::Float).narrow(1, 1, from);
                let wide = |t: &Tensor| t.to_kind(Kind::Double);
                let plain = wide(&x).mm(&wide(&weight).tr());
                let ours = panels.product(&x).unwrap();
                assert_eq!(ours.size(), [rows, out]);
                assert!(largest_difference(&wide(&ours), &plain) < 1e-6 * from as f64);
                // Bit for bit the same alone as among others.
                let alone = panels.product(&x.narrow(0, rows - 1, 1)).unwrap();
                assert_eq!(alone, ours.narrow(0, rows - 1, 1));
            }
        }
    }
    let weight = cpu_wave(&[8, 4], 1.0, Kind::Float);
    let panels = Panels::pack(&weight).unwrap();
    let text = |e: rlhf_kernels::Result<Tensor>| e.unwrap_err().to_string();
    assert!(text(panels.product(&cpu_wave(&[2, 5], 1.0, Kind::Float))).contains("[B, 4]"));
    assert!(text(panels.product(&cpu_wave(&[2, 4], 1.0, Kind::Double))).contains("f32"));
    assert!(Panels::pack(&weight.to_kind(Kind::Double)).is_err());
}

/// Heads cut out of one wide product, as models make them.
#[test]
fn attention_over_strided_views() {
    // A GPU takes another kernel for rows that lie apart; scores are large and so is what rounding does.
    let same_as = if device() == Device::Cpu { 1e-6 } else { 1e-4 };
    let layout = layout(&[(6, &[5, 9])]);
    let wide = (wave(&[20, 3, 2, 16], 1.0, Kind::Float) * 5.0).set_requires_grad(true);
    let part = |i: i64| wide.select(1, i);
    compare(
        &[wide.shallow_clone()],
        &|| {
            shared_prefix_attention(
                &part(0),
                &part(1),
                &part(2),
                &layout,
                &AttentionOptions::new(1.0),
            )
            .unwrap()
        },
        &|| {
            reference::shared_prefix_attention(
                &part(0),
                &part(1),
                &part(2),
                &layout,
                &AttentionOptions::new(1.0),
            )
            .unwrap()
        },
        1e-5,
    );
    let transposed = |i: i64| part(i).transpose(1, 2).contiguous().transpose(1, 2);
    let same = shared_prefix_attention(
        &transposed(0),
        &transposed(1),
        &transposed(2),
        &layout,
        &AttentionOptions::new(1.0),
    )
    .unwrap();
    assert!(
        largest_difference(
            &same,
            &shared_prefix_attention(
                &part(0),
                &part(1),
                &part(2),
                &layout,
                &AttentionOptions::new(1.0)
            )
            .unwrap()
        ) < same_as
    );
}

/// The whole point: a packed group equals each (prompt, completion) alone.
#[test]
fn packed_is_one_by_one() {
    let packed = layout(&[(11, &[7, 5])]);
    let x = wave(&[23, 2, 8], 1.0, Kind::Double);
    let all = shared_prefix_attention(&x, &x, &x, &packed, &AttentionOptions::new(0.4)).unwrap();
    for rows in [11..18, 18..23i64] {
        let n = rows.end - rows.start;
        let alone = Tensor::cat(&[x.narrow(0, 0, 11), x.narrow(0, rows.start, n)], 0);
        let one = shared_prefix_attention(
            &alone,
            &alone,
            &alone,
            &layout(&[(0, &[11 + n])]),
            &AttentionOptions::new(0.4),
        )
        .unwrap();
        assert!(largest_difference(&one.narrow(0, 11, n), &all.narrow(0, rows.start, n)) < 1e-13);
        assert!(largest_difference(&one.narrow(0, 0, 11), &all.narrow(0, 0, 11)) < 1e-13);
    }
}

#[test]
fn recompute_is_the_plain_run_twice() {
    let captured = wave(&[4, 4], 2.0, Kind::Float).set_requires_grad(true);
    let x = wave(&[3, 4], 1.0, Kind::Float).set_requires_grad(true);
    let calls = Rc::new(Cell::new(0));
    let block = |w: Tensor, calls: Rc<Cell<i32>>| {
        move |x: &[Tensor]| {
            calls.set(calls.get() + 1);
            x[0].matmul(&w).tanh()
        }
    };
    let plain = block(captured.shallow_clone(), calls.clone())(&[x.shallow_clone()]);
    (&plain * &plain).sum(None).backward();
    let expected = (x.grad().copy(), captured.grad().copy());
    let forget = || {
        let _ = x.grad().zero_();
        let _ = captured.grad().zero_();
    };
    forget();
    calls.set(0);
    let ours = recompute(&[&x], block(captured.shallow_clone(), calls.clone())).unwrap();
    assert_eq!(calls.get(), 1);
    (&ours * &ours).sum(None).backward();
    assert_eq!(calls.get(), 2);
    assert_eq!((x.grad(), captured.grad()), expected);
    // Nested: the inner one runs in forward, in the outer's second run, and once more for its own.
    forget();
    calls.set(0);
    let (w, inner) = (captured.shallow_clone(), calls.clone());
    let ours = recompute(&[&x], move |x| {
        recompute(&[&x[0]], block(w.shallow_clone(), inner.clone())).unwrap()
    })
    .unwrap();
    (&ours * &ours).sum(None).backward();
    assert_eq!(calls.get(), 3);
    assert_eq!((x.grad(), captured.grad()), expected);
    // Only captured parameters want a gradient.
    forget();
    let still = x.detach();
    let ours = recompute(&[&still], block(captured.shallow_clone(), calls.clone())).unwrap();
    (&ours * &ours).sum(None).backward();
    assert_eq!(captured.grad(), expected.1);
    // Nothing wants one; and without recording it runs once.
    let fixed = captured.detach();
    let none = recompute(&[&still], block(fixed.shallow_clone(), calls.clone())).unwrap();
    none.sum(None).backward();
    calls.set(0);
    let out = tch::no_grad(|| recompute(&[&x], block(fixed, calls.clone())).unwrap());
    assert_eq!((calls.get(), out.requires_grad()), (1, false));
}

/// What is dropped the first time is dropped the second, and the generator then goes on as if backward had drawn
/// nothing. Other tests draw nothing from it.
#[test]
#[allow(
    clippy::disallowed_methods,
    reason = "the global generator is what this is about"
)]
fn recompute_repeats_its_draws() {
    let x = wave(&[64, 8], 1.0, Kind::Float).set_requires_grad(true);
    let block = |x: &[Tensor]| (x[0].dropout(0.5, true) * 3.0).sin();
    let step = |out: &Tensor| {
        let g = Tensor::run_backward(&[out.square().sum(None)], &[&x], true, false).remove(0);
        (out.detach(), g, Tensor::rand([4], (Kind::Float, device())))
    };
    tch::manual_seed(7);
    let plain = step(&block(&[x.shallow_clone()]));
    tch::manual_seed(7);
    let nested = recompute(&[&x], move |x| recompute(&[&x[0]], block).unwrap()).unwrap();
    assert_eq!(step(&nested), plain);
    assert_eq!(step(&nested).1, plain.1);
}

#[test]
fn panics_stop_at_the_border() {
    let x = wave(&[2], 1.0, Kind::Float).set_requires_grad(true);
    let e = recompute(&[&x], |_| panic!("no weights for layer {}", 3)).unwrap_err();
    assert_eq!(
        e.to_string(),
        "recompute: the closure panicked: no weights for layer 3"
    );
    // A second run that fails makes backward fail.
    let first = Cell::new(true);
    let y = recompute(&[&x], move |x| {
        assert!(first.replace(false), "the second time");
        x[0].exp()
    })
    .unwrap();
    let e = Tensor::f_run_backward(&[y.sum(None)], &[&x], false, false)
        .unwrap_err()
        .to_string();
    assert!(e.contains("the closure panicked: the second time"), "{e}");
    assert!(recompute(&[], |_| Tensor::from(0f32)).is_err());
}

/// A step equals the formula; a saved state continues it bit by bit; one-dimensional tensors do not
/// decay; a parameter without a gradient stays.
#[test]
fn adamw_steps_and_state() {
    let config = AdamWConfig {
        weight_decay: 0.1,
        ..Default::default()
    };
    let make = || {
        let w = wave(&[3, 2], 1.0, Kind::Double).set_requires_grad(true);
        let b = wave(&[2], 2.0, Kind::Double).set_requires_grad(true);
        let idle = wave(&[2, 2], 3.0, Kind::Double).set_requires_grad(true);
        let named =
            [("w", &w), ("b", &b), ("idle", &idle)].map(|(n, t)| (n.to_owned(), t.shallow_clone()));
        (AdamW::new(named.into(), config), w, b, idle)
    };
    let step = |optim: &mut AdamW, w: &Tensor, b: &Tensor| {
        optim.zero_grad();
        ((w * w).sum(None) + (b * b * b).sum(None)).backward();
        optim.step(0.01).unwrap();
    };
    let (mut one, w, b, idle) = make();
    let (w0, b0, idle0) = (w.detach().copy(), b.detach().copy(), idle.detach().copy());
    step(&mut one, &w, &b);
    let zero = |t: &Tensor| t.zeros_like();
    let (expected, m, v) = reference::adamw(
        &w0,
        &(&w0 * 2.0),
        (&zero(&w0), &zero(&w0)),
        1,
        0.01,
        &config,
    );
    assert!(largest_difference(&w, &expected) < 1e-14);
    let without = AdamWConfig {
        weight_decay: 0.0,
        ..config
    };
    let (expected, ..) = reference::adamw(
        &b0,
        &(&b0 * &b0 * 3.0),
        (&zero(&b0), &zero(&b0)),
        1,
        0.01,
        &without,
    );
    assert!(largest_difference(&b, &expected) < 1e-14);
    assert_eq!(idle.detach(), idle0);
    let state: HashMap<String, Tensor> = one
        .state()
        .into_iter()
        .map(|(n, t)| (n, t.copy()))
        .collect();
    assert!(
        largest_difference(&state["exp_avg.w"], &m) < 1e-14
            && largest_difference(&state["exp_avg_sq.w"], &v) < 1e-14
    );

    let (mut other, w2, b2, _) = make();
    tch::no_grad(|| {
        w2.shallow_clone().copy_(&w);
        b2.shallow_clone().copy_(&b);
    });
    other.load_state(&state).unwrap();
    for _ in 0..3 {
        step(&mut one, &w, &b);
        step(&mut other, &w2, &b2);
    }
    assert_eq!((w.detach(), b.detach()), (w2.detach(), b2.detach()));
    let mut broken = state;
    broken.remove("step.b");
    assert_eq!(
        other.load_state(&broken).unwrap_err().to_string(),
        "adamw: the state has no `step.b`"
    );
}

/// 3-4-5: two tensors of norm 3 and 4 have the global norm 5; clipped to 1 it is 1/(1 + 2·10⁻⁷).
#[test]
fn clipping_by_hand() {
    let grads = [from_slice(&[3f64, 0.]), from_slice(&[0f64, 0., 4.])];
    assert_eq!(clip_grad_norm(&grads, 10.0).unwrap(), 5.0);
    assert_eq!(grads[0].double_value(&[0]), 3.0);
    assert_eq!(clip_grad_norm(&grads, 1.0).unwrap(), 5.0);
    assert!((grads[1].double_value(&[2]) - 4.0 / (5.0 + 1e-6)).abs() < 1e-15);
    let bad = [from_slice(&[f32::NAN, 1.]), from_slice(&[2f32])];
    assert!(clip_grad_norm(&bad, 0.1).unwrap().is_nan());
    assert_eq!(bad[1].double_value(&[0]), 2.0);
    assert_eq!(clip_grad_norm(&[], 1.0).unwrap(), 0.0);
}

#[test]
fn scans_of_nothing() {
    let empty = Ragged::new(
        Tensor::zeros([0], (Kind::Float, device())),
        Offsets::new(vec![0, 0, 0]).unwrap(),
    )
    .unwrap();
    let (a, r) = gae(&empty, &empty, 0.9, 0.9).unwrap();
    assert_eq!((a.values().size(), r.values().size()), (vec![0], vec![0]));
    assert_eq!(
        discounted_returns(&empty, 0.9).unwrap().values().kind(),
        Kind::Float
    );
    assert_eq!(empty.mean().size(), [2]);
}
