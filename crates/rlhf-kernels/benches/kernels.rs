//! Kernels against their bounds. Each name carries the floating-point work of its matrix products, so
//! that time × the machine's GEMM rate tells how near the bound it is.
#![allow(missing_docs, clippy::unwrap_used, reason = "a benchmark")]

use std::hint::black_box;

use criterion::{Criterion, criterion_group, criterion_main};
use rlhf_kernels::optim::{AdamW, AdamWConfig};
use rlhf_kernels::{
    AttentionGroup, AttentionLayout, LogprobOptions, linear_logprobs, reference,
    shared_prefix_attention,
};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// A fixed pattern instead of noise: no global generator.
fn filled(size: &[i64]) -> Tensor {
    let n: i64 = size.iter().product();
    (Tensor::arange(n, F32) * 0.618).sin().view(size)
}

fn logprobs(c: &mut Criterion) {
    for (m, h, v) in [(2048i64, 128i64, 1024i64), (512, 576, 49152)] {
        let hidden = filled(&[m, h]).set_requires_grad(true);
        let weight = (filled(&[v, h]) * 0.1).set_requires_grad(true);
        let ids = Tensor::arange(m, (Kind::Int64, Device::Cpu)) % v;
        let gflop = 8.0 * (m * h * v) as f64 / 1e9;
        let mut group = c.benchmark_group(format!(
            "linear_logprobs fwd+bwd M{m} H{h} V{v}: {gflop:.1} GFLOP"
        ));
        group.sample_size(10);
        let options = LogprobOptions::default();
        group.bench_function("chunked", |b| {
            b.iter(|| {
                black_box(
                    linear_logprobs(&hidden, &weight, &ids, &options)
                        .unwrap()
                        .logprobs
                        .sum(None),
                )
                .backward()
            });
        });
        group.bench_function("plain", |b| {
            b.iter(|| {
                black_box(
                    reference::linear_logprobs(&hidden, &weight, &ids, &options)
                        .unwrap()
                        .logprobs
                        .sum(None),
                )
                .backward()
            });
        });
    }
}

fn attention(c: &mut Criterion) {
    let (groups, k, prompt, completion, heads, d) = (24i64, 8i64, 40i64, 40i64, 4i64, 32i64);
    let mut at = 0;
    let mut next = |n: i64| {
        at += n;
        at - n..at
    };
    let layout: Vec<AttentionGroup> = (0..groups)
        .map(|_| AttentionGroup {
            prompt: next(prompt),
            completions: (0..k).map(|i| next(completion - i)).collect(),
        })
        .collect();
    let layout = AttentionLayout::new(layout).unwrap();
    let x = filled(&[layout.num_rows(), heads, d]).set_requires_grad(true);
    let mut group = c.benchmark_group(format!("attention fwd+bwd {groups} groups of {k}"));
    group.sample_size(10);
    group.bench_function("shared prefix", |b| {
        b.iter(|| {
            shared_prefix_attention(&x, &x, &x, &layout, 0.18)
                .unwrap()
                .sum(None)
                .backward()
        });
    });
    group.bench_function("plain", |b| {
        b.iter(|| {
            reference::shared_prefix_attention(&x, &x, &x, &layout, 0.18)
                .unwrap()
                .sum(None)
                .backward()
        });
    });
}

fn adamw(c: &mut Criterion) {
    let n = 4_000_000i64;
    let p = filled(&[n / 1000, 1000]).set_requires_grad(true);
    (&p * &p).sum(None).backward();
    let mut optim = AdamW::new(vec![("p".into(), p)], AdamWConfig::default());
    c.bench_function(
        &format!("adamw {n} parameters: {} MB moved", n * 28 / 1_000_000),
        |b| {
            b.iter(|| optim.step(1e-4).unwrap());
        },
    );
}

criterion_group!(benches, logprobs, attention, adamw);
criterion_main!(benches);
