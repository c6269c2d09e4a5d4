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
    clip_grad_norm,
};
use rlhf_kernels::surrogate::{
    Advantages, KlTerm, SurrogateInputs, SurrogateOptions, SurrogateOutput, TokenWeight,
};
use rlhf_kernels::{
    AttentionGroup, AttentionLayout, AttentionOptions, F32_RESOLUTION, LogprobOptions, Mean,
    Offsets, Panels, Ragged, discounted_returns, entropy, gae, layer, linear_kl, linear_kl_top,
    linear_logprobs, nucleus, recompute, reference, shared_prefix_attention, surrogate,
    token_logprobs, token_logprobs_in_place, top_logprobs,
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

/// Numbers in −1..1 without pattern, by SplitMix64: no global generator.
fn scattered(size: &[i64]) -> Tensor {
    let n: i64 = size.iter().product();
    let of = |i: u64| {
        let mut z = (i + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let out: Vec<f32> = (0..n as u64).map(of).collect();
    Tensor::from_slice(&out).view(size)
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
        for (name, options, products) in [("", &options, 4), (", filtered", &filtered, 1)] {
            let name = format!("forward + backward, peaked{name}");
            group.throughput(bound(&name, Throughput::Elements(products * product)));
            group.bench_function(name, |b| {
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
        let with_all = LogprobOptions {
            entropy: true,
            top1: true,
            moments: true,
            z_loss: Some(1e-4),
            logit_penalty: Some(1e-4),
            ..options
        };
        let all = "forward + backward, entropy, z-loss and penalty";
        group.throughput(bound(all, Throughput::Elements(4 * product)));
        group.bench_function(all, |b| {
            b.iter(|| {
                let out = linear_logprobs(&hidden, &weight, &ids, &with_all).unwrap();
                step(
                    out.logprobs
                        + out.entropy.unwrap()
                        + out.z_loss.unwrap()
                        + out.logit_penalty.unwrap(),
                );
            });
        });
        group.throughput(bound("forward", Throughput::Elements(product)));
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

/// Of logits that exist. Each is read once (4 bytes), its gradient written (4), in place over it.
fn logits(c: &mut Criterion) {
    let (m, v) = (512i64, 49152i64);
    let leaf = (scattered(&[m, v]) * 4.0).set_requires_grad(true);
    let ids = Tensor::arange(m, (Kind::Int64, Device::Cpu));
    let mut group = c.benchmark_group(format!("logits M{m} V{v}"));
    group.sample_size(10);
    let bytes = |each: u64| Throughput::Bytes(each * (m * v) as u64);
    let backward = |out: Tensor| {
        drop(Tensor::run_backward(
            &[out.sum(None)],
            &[&leaf],
            false,
            false,
        ));
    };
    // Forward reads, backward reads and writes.
    for (name, f) in [
        (
            "token_logprobs",
            token_logprobs as fn(&Tensor, &Tensor) -> _,
        ),
        ("token_logprobs, plain", reference::token_logprobs),
    ] {
        group.throughput(bound(name, bytes(12)));
        group.bench_function(name, |b| b.iter(|| backward(f(&leaf, &ids).unwrap())));
    }
    // The copy that it may destroy: 8 bytes more.
    group.throughput(bound("token_logprobs_in_place, of a copy", bytes(20)));
    group.bench_function("token_logprobs_in_place, of a copy", |b| {
        b.iter(|| backward(token_logprobs_in_place(&(&leaf * 1.0), &ids).unwrap()));
    });
    for (name, f) in [
        ("entropy", entropy as fn(&Tensor) -> _),
        ("entropy, plain", reference::entropy),
    ] {
        group.throughput(bound(name, bytes(12)));
        group.bench_function(name, |b| b.iter(|| backward(f(&leaf).unwrap())));
    }
    group.throughput(bound("nucleus of .9", bytes(4)));
    group.bench_function("nucleus of .9", |b| b.iter(|| nucleus(&leaf, 0.9).unwrap()));
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
    group.throughput(bound(
        "standardized groups",
        Throughput::Bytes(8 * (s * n) as u64),
    ));
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
    group.bench_function("leave one out", |b| b.iter(|| rewards.leave_one_out()));
    group.bench_function("cumulative sums", |b| b.iter(|| rewards.cumsum().unwrap()));
    group.bench_function("clamped", |b| b.iter(|| rewards.clamp(-0.5, 0.5)));
    group.bench_function("spread", |b| {
        let sums = rewards.sum();
        b.iter(|| rewards.broadcast(&sums));
    });
    for (name, kl) in [
        ("k1", SampledKl::K1),
        ("k2", SampledKl::K2),
        ("k3", SampledKl::K3),
    ] {
        group.throughput(bound(name, Throughput::Bytes(12 * (s * n) as u64)));
        group.bench_function(name, |b| {
            b.iter(|| kl.estimate(rewards.values(), values.values()).unwrap());
        });
    }
    group.throughput(bound("sums", Throughput::Bytes(4 * (s * n) as u64)));
    for (name, of) in [
        ("sums", Ragged::sum as fn(&Ragged) -> Tensor),
        ("means", Ragged::mean),
        ("deviations", |x| x.std(1.0)),
        ("last", |x| x.last(0.0)),
    ] {
        group.bench_function(name, |b| b.iter(|| of(&rewards)));
    }
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

/// The same with a soft cap, and within a window of 128 (Gemma 2's layers): 14·D operations a pair that is seen.
fn attention_variants(c: &mut Criterion) {
    let (prompt, k, completion, h, d) = (512i64, 8i64, 64i64, 9i64, 64i64);
    let n = prompt + k * completion;
    let layout = AttentionLayout::new(vec![AttentionGroup {
        prompt: 0..prompt,
        completions: (0..k)
            .map(|i| prompt + i * completion..prompt + (i + 1) * completion)
            .collect(),
    }])
    .unwrap();
    let leaf = |f: f64| (filled(&[n, h, d]) * f).set_requires_grad(true);
    let (q, keys, v) = (leaf(1.0), leaf(0.9), leaf(0.8));
    let plain = AttentionOptions::new(0.125);
    let seen = |window: i64| -> i64 {
        let own = (0..prompt).map(|t| (t + 1).min(window)).sum::<i64>();
        own + k
            * (0..completion)
                .map(|t| (prompt + t + 1).min(window))
                .sum::<i64>()
    };
    let mut group = c.benchmark_group("attention, variants");
    group.sample_size(10);
    for (name, options, window) in [
        ("plain", plain, n),
        (
            "soft cap",
            AttentionOptions {
                softcap: Some(50.0),
                ..plain
            },
            n,
        ),
        (
            "window",
            AttentionOptions {
                window: Some(128),
                ..plain
            },
            128,
        ),
    ] {
        let work = Throughput::Elements((14 * seen(window) * h * d) as u64);
        group.throughput(bound(name, work));
        group.bench_function(name, |b| {
            b.iter(|| {
                let out = shared_prefix_attention(&q, &keys, &v, &layout, &options).unwrap();
                drop(Tensor::run_backward(
                    &[out.sum(None)],
                    &[&q, &keys, &v],
                    false,
                    false,
                ));
            });
        });
    }
}

/// The small operations of SmolLM2's layers over 768 tokens, forward and backward. Bound: what they read and write.
fn layers(c: &mut Criterion) {
    let (n, h, inner, heads, d) = (768i64, 576i64, 1536i64, 9i64, 64i64);
    let leaf = |size: &[i64]| scattered(size).set_requires_grad(true);
    let (x, more, w) = (leaf(&[n, h]), leaf(&[n, h]), leaf(&[h]));
    let (gate, up) = (leaf(&[n, inner]), leaf(&[n, inner]));
    let q = leaf(&[n, heads, d]);
    let angle = filled(&[n, 1, d]);
    let (cos, sin) = (angle.cos(), angle.sin());
    let backward = |out: &[Tensor], leaves: &[&Tensor]| {
        let loss = out
            .iter()
            .map(|t| t.sum(None))
            .fold(Tensor::from(0f32), |a, b| a + b);
        drop(Tensor::run_backward(&[loss], leaves, false, false));
    };
    let mut group = c.benchmark_group(format!("layer of {n} tokens"));
    let numbers = |each: i64| Throughput::Bytes(4 * (each * n) as u64);
    // Forward reads two and writes two rows; backward reads three and writes one.
    group.throughput(bound("add_norm", numbers(8 * h)));
    for (name, plain) in [("add_norm", false), ("add_norm, composed", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let (x, y) = if plain {
                    reference::add_norm(&x, Some(&more), &w, 1e-5)
                } else {
                    layer::add_norm(&x, Some(&more), &w, 1e-5).unwrap()
                };
                backward(&[x, y], &[&more, &w]);
            });
        });
    }
    group.throughput(bound("silu_mul", numbers(8 * inner)));
    for (name, plain) in [("silu_mul", false), ("silu_mul, composed", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let y = if plain {
                    reference::silu_mul(&gate, &up)
                } else {
                    layer::silu_mul(&gate, &up).unwrap()
                };
                backward(&[y], &[&gate, &up]);
            });
        });
    }
    // Forward reads and writes the rows, backward reads, adds and writes them. Libtorch's backward writes a whole table.
    let table = leaf(&[49_152, h]);
    let ids = (Tensor::arange(n, (Kind::Int64, Device::Cpu)) * 7919).remainder(5000);
    group.throughput(bound("embedding", numbers(5 * h)));
    for (name, plain) in [("embedding", false), ("embedding, libtorch's", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let y = if plain {
                    Tensor::embedding(&table, &ids, -1, false, false)
                } else {
                    layer::embedding(&table, &ids).unwrap()
                };
                backward(&[y], &[&table]);
            });
        });
    }
    // Forward one product and backward two; what is computed again costs a pass over the rows.
    let (down, first) = (leaf(&[h, inner]), [leaf(&[inner, h]), leaf(&[inner, h])]);
    let product = 2 * (n * h * inner) as u64;
    group.throughput(bound("silu_mul_linear", Throughput::Elements(3 * product)));
    for (name, plain) in [
        ("silu_mul_linear", false),
        ("silu_mul_linear, composed", true),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let y = if plain {
                    reference::silu_mul_linear(&gate, &up, &down)
                } else {
                    layer::silu_mul_linear(&gate, &up, &down).unwrap()
                };
                backward(&[y], &[&gate, &up, &down]);
            });
        });
    }
    group.throughput(bound("linears", Throughput::Elements(3 * product)));
    for (name, plain) in [("linears, one", false), ("linears, one, libtorch", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let y = if plain {
                    x.linear(&first[0], None::<Tensor>)
                } else {
                    layer::linears(&x, &[&first[0]]).unwrap().remove(0)
                };
                backward(&[y], &[&x, &first[0]]);
            });
        });
    }
    group.throughput(bound("norm_linears", Throughput::Elements(6 * product)));
    let weights: Vec<&Tensor> = first.iter().collect();
    for (name, plain) in [("norm_linears", false), ("norm_linears, composed", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let (x, mut out) = if plain {
                    reference::norm_linears(&x, Some(&more), &w, 1e-5, &weights)
                } else {
                    layer::norm_linears(&x, Some(&more), &w, 1e-5, &weights).unwrap()
                };
                out.push(x);
                backward(&out, &[&more, &w, weights[0], weights[1]]);
            });
        });
    }
    group.throughput(bound("rotate", numbers(4 * heads * d)));
    for (name, plain) in [("rotate", false), ("rotate, composed", true)] {
        group.bench_function(name, |b| {
            b.iter(|| {
                let y = if plain {
                    reference::rotate(&q, &cos, &sin)
                } else {
                    layer::rotate(&q, &cos, &sin).unwrap()
                };
                backward(&[y], &[&q]);
            });
        });
    }
}

/// A product computed again in backward: four instead of three.
fn recomputed(c: &mut Criterion) {
    let n = 768i64;
    let x = filled(&[n, n]).set_requires_grad(true);
    let w = filled(&[n, n]).set_requires_grad(true);
    let step = |out: Tensor| {
        drop(Tensor::run_backward(
            &[out.sum(None)],
            &[&x, &w],
            false,
            false,
        ));
    };
    let product = 2 * (n * n * n) as u64;
    let mut group = c.benchmark_group(format!("recompute, a product of {n}"));
    group.throughput(bound("recompute", Throughput::Elements(4 * product)));
    group.bench_function("recompute", |b| {
        b.iter(|| step(recompute(&[&x, &w], |x| x[0].matmul(&x[1]).sin()).unwrap()));
    });
    group.throughput(bound("plain", Throughput::Elements(3 * product)));
    group.bench_function("plain", |b| b.iter(|| step(x.matmul(&w).sin())));
}

/// Products of few rows with a matrix laid out for decoding: bound by reading it, or by arithmetic.
fn panels(c: &mut Criterion) {
    let (n, k) = (49_152i64, 576i64);
    let packed = Panels::pack(&filled(&[n, k])).unwrap();
    let mut group = c.benchmark_group(format!("panels {n}x{k}"));
    group.sample_size(10);
    for rows in [8i64, 32] {
        let x = filled(&[rows, k]);
        let name = format!("{rows} rows");
        group.throughput(bound(
            &name,
            Throughput::Elements(2 * (rows * n * k) as u64),
        ));
        group.bench_function(name, |b| b.iter(|| packed.product(&x).unwrap()));
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

/// The norm reads every gradient (4 bytes), scaling reads and writes it (8).
fn clipping(c: &mut Criterion) {
    let n = 4_000_000i64;
    let grads: Vec<Tensor> = (0..40).map(|_| filled(&[n / 40])).collect();
    let mut group = c.benchmark_group(format!("clip_grad_norm, {n} parameters"));
    for (name, bytes, limit) in [("within the limit", 4, 1e9), ("beyond it", 12, 1e-3)] {
        group.throughput(bound(name, Throughput::Bytes(bytes * n as u64)));
        group.bench_function(name, |b| {
            b.iter(|| clip_grad_norm(&grads, limit).unwrap());
        });
    }
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
    logits,
    divergences,
    ragged,
    surrogates,
    attention,
    attention_variants,
    layers,
    recomputed,
    panels,
    clipping,
    adamw,
    optimizers
);
criterion_main!(benches);
