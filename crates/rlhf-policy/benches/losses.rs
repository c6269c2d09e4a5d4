//! The GRPO loss with its gradient, by number of tokens.
//!
//! Bound: read bandwidth. By count of operations, forward and backward touch each f32 of `[M]` some 40 times; at 35 GB/s a
//! million tokens take no less than 5 ms.
#![allow(missing_docs, clippy::expect_used, reason = "a benchmark")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rlhf_kernels::{Offsets, Ragged};
use rlhf_policy::kl::{KlEstimator, KlPenalty, KlPlacement};
use rlhf_policy::loss::{Clip, KlTerm, PolicyInputs, PolicyLoss, RatioLevel, Reduction};
use tch::Tensor;

fn grpo(c: &mut Criterion) {
    let mut bench = c.benchmark_group("grpo_loss");
    for (completions, length) in [(16, 64), (128, 512)] {
        let n = completions * length;
        let offsets = Offsets::from_lengths(&vec![length; completions as usize]).expect("lengths");
        let column = |f: fn(f32) -> f32| {
            let host: Vec<f32> = (0..n).map(|i| f((i % 97) as f32 / 97.0)).collect();
            Ragged::new(Tensor::from_slice(&host), offsets.clone())
                .expect("as many values as offsets say")
        };
        let (old, reference, advantages) =
            (column(|x| -x), column(|x| -1.1 * x), column(|x| x - 0.5));
        let leaf = column(|x| -0.9 * x).values().copy().set_requires_grad(true);
        let penalty = KlPenalty {
            estimator: KlEstimator::K3,
            placement: KlPlacement::InLoss,
            coef: 0.04,
        };
        let loss = PolicyLoss::Clipped {
            clip: Clip::symmetric(0.2),
            ratio: RatioLevel::Token,
            reduction: Reduction::Sequence {},
        };
        bench.throughput(Throughput::Elements(n as u64));
        bench.bench_function(
            BenchmarkId::from_parameter(format!("{completions}x{length}")),
            |b| {
                b.iter(|| {
                    let logprobs = old.with_values(leaf.shallow_clone()).expect("same tokens");
                    let kl = Some(KlTerm {
                        exact: None,
                        ref_logprobs: &reference,
                        penalty,
                    });
                    let inputs = PolicyInputs {
                        kl,
                        ..PolicyInputs::new(&logprobs, &old, &advantages)
                    };
                    let out = loss.compute(&inputs).expect("valid inputs");
                    Tensor::run_backward(&[out.loss.sum], &[&leaf], false, false)
                });
            },
        );
    }
    bench.finish();
}

criterion_group!(benches, grpo);
criterion_main!(benches);
