//! Kernels against their bounds. A benchmark's throughput counts the arithmetic of the matrix products that it
//! cannot avoid, or the bytes it must move; `bound` prints what these take at the rates of a large product and of
//! a copy, both measured first.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a benchmark"
)]

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::Instant;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rlhf_kernels::kl::{Divergence, KlOptions, Logits, SampledKl, Tail};
use rlhf_kernels::optim::{
    AdafactorConfig, AdamW, AdamWConfig, MuonConfig, Optimizer, OptimizerConfig, RmsPropConfig,
};
use rlhf_kernels::surrogate::{
    Advantages, KlTerm, SurrogateInputs, SurrogateOptions, SurrogateOutput, TokenWeight,
};
use rlhf_kernels::{
    AttentionGroup, AttentionLayout, AttentionOptions, F32_RESOLUTION, LogprobOptions, Mean,
    Offsets, Ragged, discounted_returns, gae, linear_kl, linear_kl_top, linear_logprobs, reference,
    shared_prefix_attention, surrogate, top_logprobs,
};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// The least of some times, in seconds.
fn least(mut run: impl FnMut()) -> f64 {
    run();
    let time = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..5).map(time).fold(f64::INFINITY, f64::min)
}

/// Operations a second of a large product, and bytes a second of a copy (read and written).
fn ceilings() -> (f64, f64) {
    static MEASURED: OnceLock<(f64, f64)> = OnceLock::new();
    *MEASURED.get_or_init(|| {
        let _guard = tch::no_grad_guard();
        let n = 2048i64;
        let (a, b, c) = (filled(&[n, n]), filled(&[n, n]), filled(&[n, n]));
        let product = 2.0 * (n as f64).powi(3) / least(|| drop(a.mm_out(&c, &b)));
        let (from, mut to) = (filled(&[16_000_000]), filled(&[16_000_000]));
        let copy = 128e6 / least(|| to.copy_(&from));
        println!(
            "ceilings: {:.0} GFLOP/s, {:.1} GB/s",
            product * 1e-9,
            copy * 1e-9
        );
        (product, copy)
    })
}

/// Prints what a benchmark cannot be faster than.
fn bound(name: &str, work: Throughput) -> Throughput {
    let (flops, bytes) = ceilings();
    let time = match work {
        Throughput::Elements(n) => n as f64 / flops,
        Throughput::Bytes(n) => n as f64 / bytes,
        _ => return work,
    };
    println!("{name}: bound {:.3} ms", time * 1e3);
    work
}

/// A fixed pattern instead of noise: no global generator.
fn scattered(size: &[i64]) -> Tensor {
    let n: i64 = size.iter().product();
    let x = (Tensor::arange(n, (Kind::Double, Device::Cpu)) * 12.9898).sin() * 437.5;
    x.fmod(1.0).to_kind(Kind::Float).view(size)
}

/// Another, smoother and of low rank.
fn filled(size: &[i64]) -> Tensor {
    let n: i64 = size.iter().product();
    (Tensor::arange(n, F32) * 0.618).sin().view(size)
}

/// Hidden states along their word's row of the weight, whose logit they make 40.
fn peaked_hidden(weight: &Tensor, ids: &Tensor) -> Tensor {
    let rows = weight.detach().index_select(0, ids);
    let squares = rows
        .square()
        .sum_dim_intlist(&[1i64][..], true, None::<Kind>);
    rows / squares * 40.0
}

/// One product is logits = hidden · weightᵀ, 2MHV operations. Forward needs one; forward and backward
/// three, and the fourth recomputes the logits.
fn logprobs(c: &mut Criterion) {
    for (m, h, v) in [(2048i64, 128i64, 1024i64), (512, 576, 49152)] {
        let hidden = filled(&[m, h]).set_requires_grad(true);
        let weight = (filled(&[v, h]) * 0.1).set_requires_grad(true);
        let frozen = weight.detach();
        let ids = Tensor::arange(m, (Kind::Int64, Device::Cpu)).remainder(v);
        let product = 2 * (m * h * v) as u64;
        let options = LogprobOptions::default();
        let step = |out: Tensor| {
            drop(Tensor::run_backward(
                &[out.sum(None)],
                &[&hidden, &weight],
                false,
                false,
            ));
        };
        let mut group = c.benchmark_group(format!("linear_logprobs M{m} H{h} V{v}"));
        group.sample_size(10);
        group.throughput(bound(
            "forward + backward",
            Throughput::Elements(4 * product),
        ));
        group.bench_function("forward + backward", |b| {
            b.iter(|| {
                step(
                    linear_logprobs(&hidden, &weight, &ids, &options)
                        .unwrap()
                        .logprobs,
                )
            });
        });
        group.throughput(bound(
            "forward + backward, plain",
            Throughput::Elements(3 * product),
        ));
        group.bench_function("forward + backward, plain", |b| {
            b.iter(|| {
                step(
                    reference::linear_logprobs(&hidden, &weight, &ids, &options)
                        .unwrap()
                        .logprobs,
                )
            });
        });
        group.throughput(bound(
            "forward + backward, frozen weight",
            Throughput::Elements(2 * product),
        ));
        group.bench_function("forward + backward, frozen weight", |b| {
            b.iter(|| {
                let out = linear_logprobs(&hidden, &frozen, &ids, &options)
                    .unwrap()
                    .logprobs;
                drop(Tensor::run_backward(
                    &[out.sum(None)],
                    &[&hidden],
                    false,
                    false,
                ));
            });
        });
        // As of a trained model: each row knows its word, at a distance of some nats. Forward is one product,
        // backward gathers some words.
        let apart = (scattered(&[v, h]) * 0.1).set_requires_grad(true);
        let peaked = peaked_hidden(&apart, &ids).set_requires_grad(true);
        let filtered = LogprobOptions {
            filter: Some(F32_RESOLUTION),
            ..options
        };
        group.throughput(bound("forward", Throughput::Elements(product)));
        for (name, options) in [("", &options), (", filtered", &filtered)] {
            group.bench_function(format!("forward + backward, peaked{name}"), |b| {
                b.iter(|| {
                    let out = linear_logprobs(&peaked, &apart, &ids, options).unwrap();
                    drop(Tensor::run_backward(
                        &[out.logprobs.sum(None)],
                        &[&peaked, &apart],
                        false,
                        false,
                    ));
                });
            });
        }
        group.bench_function("forward", |b| {
            let _guard = tch::no_grad_guard();
            b.iter(|| black_box(linear_logprobs(&hidden, &weight, &ids, &options).unwrap()));
        });
        let logits = Tensor::empty([m, v], F32);
        group.bench_function("bound: one product", |b| {
            let _guard = tch::no_grad_guard();
            b.iter(|| hidden.mm_out(&logits, &weight.tr()));
        });
    }
}

/// Two products make both sides' logits; with a frozen head a third is the student's gradient, with a
/// trained one there are six in all (the logits twice).
fn divergences(c: &mut Criterion) {
    let (m, h, v) = (512i64, 576i64, 49152i64);
    let student = filled(&[m, h]).set_requires_grad(true);
    let weight = filled(&[v, h]) * 0.1;
    let (teacher, other) = (filled(&[m, h]) * 0.9, filled(&[v, h]) * 0.11);
    let t = Logits::new(&teacher, &other);
    let cached = top_logprobs(t, 64, 1.0, None).unwrap();
    let backward = |out: Tensor, leaves: &[&Tensor]| {
        drop(Tensor::run_backward(&[out.sum(None)], leaves, false, false));
    };
    let mut group = c.benchmark_group(format!("linear_kl M{m} H{h} V{v}"));
    group.sample_size(10);
    let product = 2 * (m * h * v) as u64;
    let js = Divergence::JensenShannon { beta: 0.5 };
    for (name, d) in [
        ("forward KL", Divergence::Forward),
        ("reverse KL", Divergence::Reverse),
        ("Jensen-Shannon", js),
    ] {
        let options = KlOptions::new(d);
        group.throughput(bound(
            &format!("{name}, forward + backward, frozen head"),
            Throughput::Elements(3 * product),
        ));
        group.bench_function(format!("{name}, forward + backward, frozen head"), |b| {
            let s = Logits::new(&student, &weight);
            b.iter(|| backward(linear_kl(s, t, &options).unwrap(), &[&student]));
        });
    }
    let options = KlOptions::new(Divergence::Reverse);
    group.bench_function("reverse KL, forward + backward, frozen head, plain", |b| {
        let s = Logits::new(&student, &weight);
        b.iter(|| backward(reference::linear_kl(s, t, &options).unwrap(), &[&student]));
    });
    let trained = weight.copy().set_requires_grad(true);
    let s = Logits::new(&student, &trained);
    group.throughput(bound(
        "reverse KL, forward + backward",
        Throughput::Elements(6 * product),
    ));
    group.bench_function("reverse KL, forward + backward", |b| {
        b.iter(|| backward(linear_kl(s, t, &options).unwrap(), &[&student, &trained]));
    });
    for (tail, name, products) in [
        (Tail::Bucket, "bucket", 4 * product),
        (Tail::Dropped, "dropped", 6 * (m * h * 64) as u64),
    ] {
        group.throughput(bound(
            &format!("reverse KL, teacher's 64 words, {name}"),
            Throughput::Elements(products),
        ));
        group.bench_function(format!("reverse KL, teacher's 64 words, {name}"), |b| {
            b.iter(|| {
                let out = linear_kl_top(s, &cached, tail, &options).unwrap();
                backward(out, &[&student, &trained]);
            });
        });
    }
}

/// Per-token operations of 64 completions of 512 tokens against what a trainer in Python runs: a loop over
/// padded columns, or over groups. Bound: each reads and writes some 4 bytes a token and result.
fn ragged(c: &mut Criterion) {
    let (s, n) = (64i64, 512i64);
    let offsets = Offsets::from_lengths(&vec![n; s as usize]).unwrap();
    let column = |f: f64| Ragged::new((filled(&[s * n]) * f).sin(), offsets.clone()).unwrap();
    let (rewards, values) = (column(3.0), column(5.0));
    let mut group = c.benchmark_group(format!("ragged {s}x{n}"));
    group.throughput(bound("gae", Throughput::Bytes(16 * (s * n) as u64)));
    group.bench_function("gae", |b| {
        b.iter(|| gae(&rewards, &values, 0.99, 0.95).unwrap());
    });
    group.bench_function("gae, a loop over columns", |b| {
        b.iter(|| reference::gae(&rewards, &values, 0.99, 0.95).unwrap());
    });
    group.throughput(bound(
        "discounted returns",
        Throughput::Bytes(8 * (s * n) as u64),
    ));
    group.bench_function("discounted returns", |b| {
        b.iter(|| discounted_returns(&rewards, 0.99).unwrap());
    });
    group.bench_function("standardized groups", |b| {
        b.iter(|| rewards.standardized(1e-4));
    });
    group.bench_function("standardized groups, a loop over groups", |b| {
        b.iter(|| {
            let parts: Vec<Tensor> = rewards
                .values()
                .view([s, n])
                .unbind(0)
                .into_iter()
                .map(|x| (&x - x.mean(None::<Kind>)) / (x.std(true) + 1e-4))
                .collect();
            Tensor::cat(&parts, 0)
        });
    });
    group.bench_function("whitened", |b| b.iter(|| rewards.whitened(Mean::Removed)));
    group.bench_function("sums", |b| b.iter(|| rewards.sum()));
    group.bench_function("sums, plain", |b| {
        b.iter(|| reference::segment_sum(&rewards));
    });
}

/// Scores and weighted values: 4·D operations a head and a pair (query, key that it sees); backward
/// computes the scores again and four more products, 10·D.
fn attention(c: &mut Criterion) {
    let shapes = [
        (24i64, 8i64, 40i64, 40i64, 4i64, 4i64, 32i64),
        (4, 8, 60, 60, 9, 3, 64),
        (1, 8, 512, 64, 9, 9, 64),
    ];
    for (groups, k, prompt, completion, hq, hkv, d) in shapes {
        let (mut at, mut pairs) = (0, 0);
        let mut next = |n: i64, seen: i64| {
            at += n;
            pairs += n * seen + n * (n + 1) / 2;
            at - n..at
        };
        let layout: Vec<AttentionGroup> = (0..groups)
            .map(|_| AttentionGroup {
                prompt: next(prompt, 0),
                completions: (0..k).map(|i| next(completion - i, prompt)).collect(),
            })
            .collect();
        let layout = AttentionLayout::new(layout).unwrap();
        let leaf = |h: i64| filled(&[at, h, d]).set_requires_grad(true);
        let (q, keys, v) = (leaf(hq), leaf(hkv), leaf(hkv));
        let step = |out: Tensor| {
            drop(Tensor::run_backward(
                &[out.sum(None)],
                &[&q, &keys, &v],
                false,
                false,
            ));
        };
        let name = format!(
            "attention, {groups} prompts of {prompt}, {k} completions of {completion}, heads {hq}/{hkv}x{d}"
        );
        let mut group = c.benchmark_group(name);
        group.sample_size(10);
        group.throughput(bound(
            "forward + backward",
            Throughput::Elements((14 * pairs * hq * d) as u64),
        ));
        group.bench_function("forward + backward", |b| {
            b.iter(|| {
                step(
                    shared_prefix_attention(&q, &keys, &v, &layout, &AttentionOptions::new(0.18))
                        .unwrap(),
                )
            });
        });
        group.bench_function("forward + backward, libtorch's per completion", |b| {
            b.iter(|| step(per_completion(&q, &keys, &v, &layout, 0.18)));
        });
        group.throughput(bound(
            "forward",
            Throughput::Elements((4 * pairs * hq * d) as u64),
        ));
        group.bench_function("forward", |b| {
            let _guard = tch::no_grad_guard();
            b.iter(|| {
                black_box(
                    shared_prefix_attention(&q, &keys, &v, &layout, &AttentionOptions::new(0.18))
                        .unwrap(),
                )
            });
        });
    }
}

/// What one would write without this crate: each prompt with each completion as a sequence of its own.
fn per_completion(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    scale: f64,
) -> Tensor {
    let mut parts = Vec::new();
    for g in layout.groups() {
        for c in &g.completions {
            let one = |t: &Tensor| {
                let rows = |r: &std::ops::Range<i64>| t.narrow(0, r.start, r.end - r.start);
                Tensor::cat(&[rows(&g.prompt), rows(c)], 0)
                    .transpose(0, 1)
                    .unsqueeze(0)
            };
            let gqa = q.size()[1] != k.size()[1];
            let out = Tensor::scaled_dot_product_attention(
                &one(q),
                &one(k),
                &one(v),
                None::<Tensor>,
                0.0,
                true,
                scale,
                gqa,
            );
            parts.push(out.squeeze_dim(0).transpose(0, 1));
        }
    }
    Tensor::cat(&parts, 0)
}

/// AdamW reads parameter, gradient and two moments and writes three: 28 bytes a parameter.
fn adamw(c: &mut Criterion) {
    let n = 4_000_000i64;
    let p = filled(&[n / 1000, 1000]).set_requires_grad(true);
    (&p * &p).sum(None).backward();
    let mut optim = AdamW::new(vec![("p".into(), p)], AdamWConfig::default());
    let mut group = c.benchmark_group(format!("adamw, {n} parameters"));
    group.throughput(bound("step", Throughput::Bytes(28 * n as u64)));
    group.bench_function("step", |b| b.iter(|| optim.step(1e-4).unwrap()));
    group.throughput(bound("bound: a copy", Throughput::Bytes(8 * n as u64)));
    let (from, mut to) = (filled(&[n]), filled(&[n]));
    group.bench_function("bound: a copy", |b| b.iter(|| to.copy_(&from)));
}

/// One step of each optimiser over a matrix of 4 million.
fn optimizers(c: &mut Criterion) {
    let n = 4_000_000i64;
    let mut group = c.benchmark_group(format!("optimizers, {n} parameters"));
    group.sample_size(10);
    // What a parameter, its gradient and its state take, read and where changed written.
    let bytes = |each: u64| Throughput::Bytes(each * n as u64);
    for (name, work, config) in [
        (
            "AdamW",
            bytes(28),
            OptimizerConfig::AdamW(AdamWConfig::default()),
        ),
        (
            "AdamW, 8-bit",
            bytes(16),
            OptimizerConfig::AdamW8bit(AdamWConfig::default()),
        ),
        (
            "Adafactor",
            bytes(12),
            OptimizerConfig::Adafactor(AdafactorConfig::default()),
        ),
        (
            "RMSprop",
            bytes(20),
            OptimizerConfig::RmsProp(RmsPropConfig::default()),
        ),
        // Five steps of two products of [R,C] with [C,R] and one of [C,C], R = 4000 and C = 1000.
        (
            "Muon",
            Throughput::Elements(5 * 2 * (2 * n as u64 * 1000 + 1_000_000_000)),
            OptimizerConfig::Muon(MuonConfig::default()),
        ),
    ] {
        let p = filled(&[n / 1000, 1000]).set_requires_grad(true);
        (&p * &p).sum(None).backward();
        let mut optim = Optimizer::new(vec![("p".into(), p)], config);
        group.throughput(bound(name, work));
        group.bench_function(name, |b| b.iter(|| optim.step(1e-4).unwrap()));
    }
}

/// The surrogate with its gradient. Bound: it must read four numbers a token and write one, 20 bytes, and
/// backward reads and writes 8 more.
fn surrogates(c: &mut Criterion) {
    for (s, n) in [(16i64, 64i64), (64, 512), (512, 512)] {
        let m = s * n;
        let offsets = Offsets::from_lengths(&vec![n; s as usize]).unwrap();
        let leaf = (filled(&[m]) * 0.2).set_requires_grad(true);
        let (old, reference_logprobs) = (filled(&[m]) * 0.1, filled(&[m]) * 0.15);
        let advantages = filled(&[s]);
        let logprobs = Ragged::new(leaf.shallow_clone(), offsets).unwrap();
        let inputs = SurrogateInputs {
            logprobs: &logprobs,
            old_logprobs: &old,
            advantages: Advantages::Completion(&advantages),
            weights: None,
            kl: Some(KlTerm {
                ref_logprobs: &reference_logprobs,
                value: SampledKl::K3,
                gradient: SampledKl::K3,
                coef: 0.04,
                weighted: false,
            }),
        };
        let options = SurrogateOptions {
            epsilon_low: 0.2,
            epsilon_high: 0.2,
            dual: None,
            token_weight: TokenWeight::SequenceMean,
        };
        let mut group = c.benchmark_group(format!("surrogate {s}x{n}"));
        group.throughput(bound(
            "forward + backward",
            Throughput::Bytes(28 * m as u64),
        ));
        let backward =
            |out: SurrogateOutput| Tensor::run_backward(&[&out.loss.sum], &[&leaf], false, false);
        group.bench_function("forward + backward", |b| {
            b.iter(|| backward(surrogate(&inputs, &options).unwrap()));
        });
        group.bench_function("forward + backward, composed", |b| {
            b.iter(|| backward(reference::surrogate(&inputs, &options).unwrap()));
        });
    }
}

criterion_group!(
    benches,
    logprobs,
    divergences,
    ragged,
    surrogates,
    attention,
    adamw,
    optimizers
);
criterion_main!(benches);
