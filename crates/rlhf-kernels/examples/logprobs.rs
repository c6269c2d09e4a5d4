//! Time and memory of `linear_logprobs` at the size of a small model's head, a mode a process so that its peak
//! of memory is its own: `logprobs MODE [REPEATS [KIB]]`, where MODE is `trained`, `frozen`, `forward`, `peaked`,
//! `filtered`, `plain` or `product` (one matrix product, the bound), and KIB
//! the logits held at once. `OMP_NUM_THREADS` says on how many threads.
#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a measurement"
)]

use std::time::Instant;

use rlhf_kernels::{F32_RESOLUTION, LogprobOptions, linear_logprobs, reference};
use tch::{Device, Kind, Tensor};

const M: i64 = 2048;
const H: i64 = 576;
const V: i64 = 49152;

/// Numbers in −1..1 without pattern, by SplitMix64: no global generator.
fn scattered(size: &[i64], seed: u64) -> Tensor {
    let n: i64 = size.iter().product();
    let of = |i: u64| {
        let mut z = (i + (seed << 40) + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
    };
    let out: Vec<f32> = (0..n as u64).map(of).collect();
    Tensor::from_slice(&out).view(size)
}

/// MiB of the process, now or at most.
fn memory(field: &str) -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with(field)).unwrap();
    line.split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<f64>()
        .unwrap()
        / 1024.0
}

fn main() {
    let mut args = std::env::args().skip(1);
    let mode = args.next().expect("a mode");
    let repeats: usize = args.next().map_or(5, |n| n.parse().expect("a number"));
    let chunk_bytes = args
        .next()
        .map(|n| n.parse::<i64>().expect("a number") << 10);
    let weight = scattered(&[V, H], 1) * (H as f64).powf(-0.5) * 1.7;
    let ids = (Tensor::arange(M, (Kind::Int64, Device::Cpu)) * 7919).remainder(V);
    let peaked = matches!(mode.as_str(), "peaked" | "filtered");
    let hidden = if peaked {
        // Along their word's row of the weight, whose logit they make 40.
        let rows = weight.index_select(0, &ids);
        let squares = rows
            .square()
            .sum_dim_intlist(&[1i64][..], true, None::<Kind>);
        rows / squares * 40.0
    } else {
        scattered(&[M, H], 2) * 1.7
    };
    let g = scattered(&[M], 3);
    let trains = mode != "forward" && mode != "product";
    let hidden = hidden.set_requires_grad(trains);
    let weight = weight.set_requires_grad(trains && mode != "frozen");
    let options = LogprobOptions {
        filter: (mode == "filtered").then_some(F32_RESOLUTION),
        chunk_bytes,
        ..Default::default()
    };
    let leaves: Vec<&Tensor> = if mode == "frozen" {
        vec![&hidden]
    } else {
        vec![&hidden, &weight]
    };
    let logits = (mode == "product").then(|| Tensor::zeros([M, V], (Kind::Float, Device::Cpu)));
    let step = || match mode.as_str() {
        "product" => drop(hidden.mm_out(logits.as_ref().unwrap(), &weight.tr())),
        "forward" => drop(linear_logprobs(&hidden, &weight, &ids, &options).unwrap()),
        _ => {
            let out = if mode == "plain" {
                reference::linear_logprobs(&hidden, &weight, &ids, &options).unwrap()
            } else {
                linear_logprobs(&hidden, &weight, &ids, &options).unwrap()
            };
            let loss = (out.logprobs * &g).sum(Kind::Float);
            drop(Tensor::run_backward(&[loss], &leaves, false, false));
        }
    };
    // So that the baseline holds the libraries' own memory, and the code that a step reads from them.
    let few = |t: &Tensor, n: i64| t.detach().narrow(0, 0, n).set_requires_grad(trains);
    let (h, w) = (few(&hidden, 16), few(&weight, 64));
    let small = linear_logprobs(&h, &w, &ids.narrow(0, 0, 16).remainder(64), &options).unwrap();
    if trains {
        let loss = small.logprobs.sum(Kind::Float);
        drop(Tensor::run_backward(&[loss], &[&h, &w], false, false));
    }
    drop(h.detach().mm(&w.detach().tr()));
    // The peak so far, of making the data, is forgotten.
    std::fs::write("/proc/self/clear_refs", "5").unwrap();
    let base = memory("VmRSS");
    step();
    let mut times: Vec<f64> = (0..repeats)
        .map(|_| {
            let start = Instant::now();
            step();
            start.elapsed().as_secs_f64()
        })
        .collect();
    times.sort_by(f64::total_cmp);
    let product = 2.0 * (M * H * V) as f64;
    println!(
        "{mode}: {:.3} s (least {:.3}), {:.0} MiB over {base:.0}; one product's {:.0} GFLOP at this speed: {:.0} GFLOP/s",
        times[times.len() / 2],
        times[0],
        memory("VmHWM") - base,
        product * 1e-9,
        product * 1e-9 / times[times.len() / 2],
    );
}
