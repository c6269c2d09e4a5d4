//! DPO's loss with its gradient, by number of pairs. It is bound by the cost of a libtorch call
//! (some 25 of them), not by arithmetic.
#![allow(missing_docs, clippy::expect_used, reason = "a benchmark")]

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use rlhf_dpo::loss::{PairLogprobs, PreferenceLoss};
use tch::Tensor;

fn sigmoid(c: &mut Criterion) {
    let mut bench = c.benchmark_group("dpo_sigmoid");
    for pairs in [8usize, 4096] {
        let column = |scale: f32| {
            Tensor::from_slice(
                &(0..pairs)
                    .map(|i| -scale * (i % 97) as f32)
                    .collect::<Vec<_>>(),
            )
        };
        let leaf = column(1.0).set_requires_grad(true);
        let (rejected, ref_chosen, ref_rejected) = (column(1.2), column(1.1), column(1.1));
        let loss = PreferenceLoss::Sigmoid {
            beta: 0.1,
            label_smoothing: 0.0,
        };
        bench.throughput(Throughput::Elements(pairs as u64));
        bench.bench_function(BenchmarkId::from_parameter(pairs), |b| {
            b.iter(|| {
                let inputs = PairLogprobs {
                    chosen: leaf.shallow_clone(),
                    rejected: rejected.shallow_clone(),
                    ref_chosen: ref_chosen.shallow_clone(),
                    ref_rejected: ref_rejected.shallow_clone(),
                };
                let out = loss.compute(&inputs.into()).expect("valid inputs");
                Tensor::run_backward(&[out.loss.sum], &[&leaf], false, false)
            });
        });
    }
    bench.finish();
}

criterion_group!(benches, sigmoid);
criterion_main!(benches);
