//! Integration tests: golden values, gradients by finite differences, agreement with the plain
//! versions, properties.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

mod collective;
mod decode;
mod device;
mod exact;
mod golden;
#[allow(dead_code, reason = "shared by several crates; each uses a part")]
#[path = "../../../rlhf-policy/tests/it/golden_io.rs"]
mod golden_io;
mod gradcheck;
mod kl;
mod layer;
mod memory;
mod optim;
mod props;
mod surrogate;

use device::{device, from_slice};
use rlhf_kernels::{AttentionGroup, AttentionLayout};
use tch::{Device, Kind, Tensor};

/// Numbers in −1..1 without pattern, the same every time: no global generator.
fn wave(size: &[i64], seed: f64, kind: Kind) -> Tensor {
    cpu_wave(size, seed, kind).to_device(device())
}

fn cpu_wave(size: &[i64], seed: f64, kind: Kind) -> Tensor {
    let n = size.iter().product::<i64>();
    let x = Tensor::arange(n, (Kind::Double, Device::Cpu)) + seed;
    ((&x * 12.9898).sin() * 437.5)
        .fmod(1.0)
        .view(size)
        .to_kind(kind)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.size(), b.size());
    if a.numel() == 0 {
        return 0.0;
    }
    let d = (a.detach().to_kind(Kind::Double) - b.detach().to_kind(Kind::Double))
        .abs()
        .max();
    let d = d.double_value(&[]);
    if d.is_nan() { f64::INFINITY } else { d }
}

/// A layout from (prompt length, completions' lengths).
fn layout(groups: &[(i64, &[i64])]) -> AttentionLayout {
    let mut end = 0;
    let mut next = |n: i64| {
        end += n;
        end - n..end
    };
    let groups = groups.iter().map(|(p, completions)| AttentionGroup {
        prompt: next(*p),
        completions: completions.iter().map(|&n| next(n)).collect(),
    });
    AttentionLayout::new(groups.collect()).unwrap()
}
