//! Temporary.
#![allow(missing_docs, clippy::all, clippy::unwrap_used, clippy::print_stdout, reason = "temporary")]
use rlhf_kernels::*;
use std::time::Instant;
use tch::{Device, Kind, Tensor};
fn main() {
    let (m, h, v) = (512i64, 576i64, 49152i64);
    let f = |s: &[i64]| (Tensor::arange(s.iter().product::<i64>(), (Kind::Float, Device::Cpu)) * 0.618).sin().view(s);
    let hidden = f(&[m, h]).set_requires_grad(true);
    let weight = (f(&[v, h]) * 0.1).set_requires_grad(true);
    let ids = Tensor::arange(m, (Kind::Int64, Device::Cpu)).remainder(v);
    let chunks = [64, 128, 171, 256, 512];
    let mut best = vec![[f64::MAX; 4]; chunks.len()];
    let logits = Tensor::empty([m, v], (Kind::Float, Device::Cpu));
    let mut gemm = f64::MAX;
    for _ in 0..6 {
        {
            let _g = tch::no_grad_guard();
            let t = Instant::now();
            let _ = hidden.mm_out(&logits, &weight.tr());
            gemm = gemm.min(t.elapsed().as_secs_f64());
        }
        for (i, &c) in chunks.iter().enumerate() {
            let o = LogprobOptions { chunk_rows: Some(c), ..Default::default() };
            let t = Instant::now();
            let out = linear_logprobs(&hidden, &weight, &ids, &o).unwrap();
            best[i][0] = best[i][0].min(t.elapsed().as_secs_f64());
            let t = Instant::now();
            drop(Tensor::run_backward(&[out.logprobs.sum(None)], &[&hidden, &weight], false, false));
            best[i][1] = best[i][1].min(t.elapsed().as_secs_f64());
        }
    }
    println!("gemm {gemm:.3}");
    for (c, b) in chunks.iter().zip(best) { println!("chunk {c}: fwd {:.3} bwd {:.3}", b[0], b[1]); }
}
