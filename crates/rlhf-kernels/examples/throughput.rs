//! What share of a device's speed the operations reach: `throughput [cuda|cpu] [REPEATS]`. First the rates of a large
//! product and of a copy are measured, then each operation at a size that fills a large GPU; its bound is the
//! arithmetic of its products at the one rate or the bytes that it must move at the other, whichever is longer.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement"
)]

use std::time::Instant;

use rlhf_kernels::kl::{Divergence, KlOptions, Logits, SampledKl};
use rlhf_kernels::optim::{AdamWConfig, Optimizer, OptimizerConfig, clip_grad_norm};
use rlhf_kernels::surrogate::{Advantages, KlTerm, SurrogateInputs, SurrogateOptions, TokenWeight};
use rlhf_kernels::{
    AttentionGroup, AttentionLayout, AttentionOptions, LogprobOptions, Mean, Offsets, Ragged,
    entropy, gae, linear_kl, linear_logprobs, reference, shared_prefix_attention, surrogate,
    token_logprobs,
};
use tch::{Device, Kind, Tensor};

/// Where and how often, and what a product (f32, bf16) and a copy reach there.
struct Bench {
    device: Device,
    repeats: usize,
    f32: f64,
    bf16: f64,
    copy: f64,
}

impl Bench {
    fn sync(&self) {
        if let Device::Cuda(i) = self.device {
            tch::Cuda::synchronize(i as i64);
        }
    }

    /// The median of the times of `run`, in seconds, of `REPEATS` after three that do not count.
    fn time(&self, mut run: impl FnMut()) -> f64 {
        (0..3).for_each(|_| run());
        let mut times: Vec<f64> = (0..self.repeats)
            .map(|_| {
                self.sync();
                let start = Instant::now();
                run();
                self.sync();
                start.elapsed().as_secs_f64()
            })
            .collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// Pseudo-random numbers in −1..1.
    fn numbers(&self, size: &[i64], seed: f64, kind: Kind) -> Tensor {
        let n: i64 = size.iter().product();
        let x = Tensor::arange(n, (Kind::Double, self.device)) + seed;
        ((x * 12.9898).sin() * 437.5)
            .fmod(1.0)
            .to_kind(kind)
            .view(size)
    }

    fn leaf(&self, size: &[i64], seed: f64, kind: Kind) -> Tensor {
        self.numbers(size, seed, kind).set_requires_grad(true)
    }

    /// One line: `flops` of products in `kind`, `bytes` that must move.
    fn line(&self, name: &str, kind: Kind, flops: f64, bytes: f64, run: impl FnMut()) -> f64 {
        let rate = if kind == Kind::Float {
            self.f32
        } else {
            self.bf16
        };
        let bound = (flops / rate).max(bytes / self.copy);
        let seconds = self.time(run);
        println!(
            "{name:<58} {:>9.3} ms, bound {:>8.3} ms, {:>3.0} %",
            seconds * 1e3,
            bound * 1e3,
            100.0 * bound / seconds
        );
        seconds
    }
}

fn backward(out: &Tensor, leaves: &[&Tensor]) {
    drop(Tensor::run_backward(
        &[out.sum(Kind::Float)],
        leaves,
        false,
        false,
    ));
}

fn main() {
    let mut args = std::env::args().skip(1);
    let device = match args.next().as_deref() {
        None | Some("cuda") => {
            rlhf_kernels::load_cuda();
            assert!(tch::Cuda::is_available(), "no CUDA device");
            Device::Cuda(0)
        }
        Some("cpu") => Device::Cpu,
        Some(other) => panic!("{other}: expected cuda or cpu"),
    };
    let repeats = args.next().map_or(20, |n| n.parse().expect("a number"));
    let mut b = Bench {
        device,
        repeats,
        f32: 1.0,
        bf16: 1.0,
        copy: 1.0,
    };
    let n = if device == Device::Cpu { 2048 } else { 8192 };
    let product = |kind: Kind| {
        let (x, y) = (b.numbers(&[n, n], 1.0, kind), b.numbers(&[n, n], 2.0, kind));
        2.0 * (n as f64).powi(3) / b.time(|| drop(x.mm(&y)))
    };
    let (f32, bf16) = (product(Kind::Float), product(Kind::BFloat16));
    let (from, mut to) = (
        b.numbers(&[n, 4 * n], 1.0, Kind::Float),
        b.numbers(&[n, 4 * n], 2.0, Kind::Float),
    );
    let copy = 32.0 * (n * n) as f64 / b.time(|| to.copy_(&from));
    (b.f32, b.bf16, b.copy) = (f32, bf16, copy);
    println!(
        "ceilings: product of f32 {:.1} and of bf16 {:.1} TFLOP/s, copy {:.0} GB/s",
        f32 * 1e-12,
        bf16 * 1e-12,
        copy * 1e-9
    );
    drop((from, to));
    for (m, h, v, kind) in [
        (2048, 576, 49_152, Kind::Float),
        (2048, 576, 49_152, Kind::BFloat16),
        (8192, 2048, 128_256, Kind::BFloat16),
    ] {
        vocabulary(&b, m, h, v, kind);
    }
    of_logits(&b);
    attention(&b);
    per_token(&b);
    optimizers(&b);
}

/// As in the crate's benchmarks: one product forward, three with backward, a fourth recomputes the logits. The
/// logits of a chunk are written and read, but never leave a large cache in principle: no bytes are counted.
fn vocabulary(b: &Bench, m: i64, h: i64, v: i64, kind: Kind) {
    let hidden = b.leaf(&[m, h], 1.0, kind);
    let weight = (b.numbers(&[v, h], 2.0, kind) * 0.1).set_requires_grad(true);
    let frozen = weight.detach();
    let ids = Tensor::arange(m, (Kind::Int64, b.device)).remainder(v);
    let product = 2.0 * (m * h * v) as f64;
    let options = LogprobOptions::default();
    println!("linear_logprobs and linear_kl, M {m}, H {h}, V {v}, {kind:?}:");
    b.line("  forward", kind, product, 0.0, || {
        let _guard = tch::no_grad_guard();
        drop(linear_logprobs(&hidden, &weight, &ids, &options).unwrap());
    });
    b.line("  forward + backward", kind, 4.0 * product, 0.0, || {
        let out = linear_logprobs(&hidden, &weight, &ids, &options).unwrap();
        backward(&out.logprobs, &[&hidden, &weight]);
    });
    b.line(
        "  forward + backward, frozen head",
        kind,
        2.0 * product,
        0.0,
        || {
            let out = linear_logprobs(&hidden, &frozen, &ids, &options).unwrap();
            backward(&out.logprobs, &[&hidden]);
        },
    );
    // All logits at once, log-softmax in f32 and gather: what one would write without this crate.
    b.line(
        "  forward + backward, plain",
        kind,
        3.0 * product,
        0.0,
        || {
            let logits = hidden.matmul(&weight.tr());
            let all = logits.log_softmax(-1, Kind::Float);
            let out = all.gather(1, &ids.unsqueeze(1), false);
            backward(&out, &[&hidden, &weight]);
        },
    );
    let (t_hidden, t_weight) = (
        b.numbers(&[m, h], 3.0, kind),
        b.numbers(&[v, h], 4.0, kind) * 0.1,
    );
    let teacher = Logits::new(&t_hidden, &t_weight);
    let kl = KlOptions::new(Divergence::Reverse);
    b.line(
        "  reverse KL, frozen heads",
        kind,
        3.0 * product,
        0.0,
        || {
            let out = linear_kl(Logits::new(&hidden, &frozen), teacher, &kl).unwrap();
            backward(&out, &[&hidden]);
        },
    );
}

fn of_logits(b: &Bench) {
    let (m, v) = (2048, 49_152);
    let leaf = b.leaf(&[m, v], 1.0, Kind::Float);
    let ids = Tensor::arange(m, (Kind::Int64, b.device));
    let bytes = 12.0 * (m * v) as f64;
    println!("of f32 logits {m} x {v}, forward + backward:");
    b.line("  token_logprobs", Kind::Float, 0.0, bytes, || {
        backward(&token_logprobs(&leaf, &ids).unwrap(), &[&leaf]);
    });
    b.line("  token_logprobs, plain", Kind::Float, 0.0, bytes, || {
        backward(&reference::token_logprobs(&leaf, &ids).unwrap(), &[&leaf]);
    });
    b.line("  entropy", Kind::Float, 0.0, bytes, || {
        backward(&entropy(&leaf).unwrap(), &[&leaf]);
    });
    b.line("  entropy, plain", Kind::Float, 0.0, bytes, || {
        backward(&reference::entropy(&leaf).unwrap(), &[&leaf]);
    });
}

/// 14·D operations a head and a pair (query, key that it sees), forward and backward.
fn attention(b: &Bench) {
    for (groups, prompt, k, completion, hq, hkv, d) in
        [(8, 512, 8, 64, 9, 9, 64), (4, 2048, 8, 512, 32, 8, 64)]
    {
        let lay = |shared: bool| {
            let (mut at, mut pairs) = (0, 0);
            let mut next = |n: i64, seen: i64| {
                at += n;
                pairs += n * seen + n * (n + 1) / 2;
                at - n..at
            };
            let mut all = Vec::new();
            for _ in 0..groups {
                if shared {
                    all.push(AttentionGroup {
                        prompt: next(prompt, 0),
                        completions: (0..k).map(|_| next(completion, prompt)).collect(),
                    });
                } else {
                    all.extend((0..k).map(|_| AttentionGroup {
                        prompt: next(prompt + completion, 0),
                        completions: Vec::new(),
                    }));
                }
            }
            (AttentionLayout::new(all).unwrap(), at, pairs)
        };
        println!(
            "attention, bf16, {groups} prompts of {prompt}, {k} completions of {completion}, heads {hq}/{hkv}x{d}, forward + backward:"
        );
        for (name, shared) in [("  shared prompt", true), ("  separate sequences", false)] {
            let (layout, n, pairs) = lay(shared);
            let leaf = |h: i64, seed: f64| b.leaf(&[n, h, d], seed, Kind::BFloat16);
            let (q, keys, v) = (leaf(hq, 1.0), leaf(hkv, 2.0), leaf(hkv, 3.0));
            let options = AttentionOptions::new(0.125);
            let flops = 14.0 * (pairs * hq * d) as f64;
            b.line(name, Kind::BFloat16, flops, 0.0, || {
                let out = shared_prefix_attention(&q, &keys, &v, &layout, &options).unwrap();
                backward(&out, &[&q, &keys, &v]);
            });
        }
    }
}

/// 4,096 completions of 512 tokens, f32.
fn per_token(b: &Bench) {
    let (s, n) = (4096, 512);
    let offsets = Offsets::from_lengths(&vec![n; s as usize]).unwrap();
    let column =
        |seed: f64| Ragged::new(b.numbers(&[s * n], seed, Kind::Float), offsets.clone()).unwrap();
    let (rewards, values) = (column(1.0), column(2.0));
    let tokens = (s * n) as f64;
    println!("{s} completions of {n} tokens:");
    b.line("  gae", Kind::Float, 0.0, 16.0 * tokens, || {
        drop(gae(&rewards, &values, 0.99, 0.95).unwrap());
    });
    b.line(
        "  gae, a loop over columns",
        Kind::Float,
        0.0,
        16.0 * tokens,
        || {
            drop(reference::gae(&rewards, &values, 0.99, 0.95).unwrap());
        },
    );
    b.line("  sums", Kind::Float, 0.0, 4.0 * tokens, || {
        drop(rewards.sum())
    });
    b.line(
        "  standardized groups",
        Kind::Float,
        0.0,
        8.0 * tokens,
        || {
            drop(rewards.standardized(1e-4));
        },
    );
    b.line("  whitened", Kind::Float, 0.0, 8.0 * tokens, || {
        drop(rewards.whitened(Mean::Removed));
    });
    let leaf = (column(3.0).values() * 0.1).set_requires_grad(true);
    let logprobs = Ragged::new(leaf.shallow_clone(), offsets.clone()).unwrap();
    let (old, advantages) = (
        column(4.0).values() * 0.1,
        b.numbers(&[s], 5.0, Kind::Float),
    );
    let reference_logprobs = column(6.0).values() * 0.1;
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
    // Reads log-probabilities of three policies, writes and scales a gradient.
    b.line(
        "  surrogate, forward + backward",
        Kind::Float,
        0.0,
        24.0 * tokens,
        || {
            let out = surrogate(&inputs, &options).unwrap();
            backward(&out.loss.sum, &[&leaf]);
        },
    );
}

/// Of 134.5 million parameters in 272 tensors, as SmolLM2 has.
fn optimizers(b: &Bench) {
    let sizes: Vec<[i64; 2]> = (0..272)
        .map(|i| if i == 0 { [49_152, 576] } else { [682, 576] })
        .collect();
    let n: i64 = sizes.iter().map(|s| s[0] * s[1]).sum();
    println!(
        "{:.1} million f32 parameters in 272 tensors:",
        n as f64 * 1e-6
    );
    for (name, each, config) in [
        (
            "  AdamW",
            28.0,
            OptimizerConfig::AdamW(AdamWConfig::default()),
        ),
        (
            "  AdamW, 8 bits",
            16.0,
            OptimizerConfig::AdamW8bit(AdamWConfig::default()),
        ),
    ] {
        let leaves: Vec<Tensor> = sizes.iter().map(|s| b.leaf(s, 1.0, Kind::Float)).collect();
        let loss = leaves
            .iter()
            .map(|p| (p * p).sum(Kind::Float))
            .fold(Tensor::from(0f32), |a, x| a + x);
        loss.backward();
        let grads: Vec<Tensor> = leaves.iter().map(Tensor::grad).collect();
        if each > 20.0 {
            b.line(
                "  clip_grad_norm, beyond the limit",
                Kind::Float,
                0.0,
                12.0 * n as f64,
                || {
                    let _guard = tch::no_grad_guard();
                    clip_grad_norm(&grads, 1e-3).unwrap();
                },
            );
        }
        let named = leaves
            .iter()
            .enumerate()
            .map(|(i, p)| (format!("p{i}"), p.shallow_clone()));
        let mut optimizer = Optimizer::new(named.collect(), config);
        b.line(name, Kind::Float, 0.0, each * n as f64, || {
            optimizer.step(1e-4).unwrap();
        });
    }
}
