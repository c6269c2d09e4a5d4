//! AdamW with moments as 8-bit codes.
//!
//! Blocks of 256 numbers share their largest magnitude; a code is a place in a dynamic tree map, signed for
//! the first moment (Dettmers et al. 2022, arXiv 2110.02861, section 2).
//!
//! Deviations. A number goes to one of its two neighbours in the map with chances by nearness, drawn from a
//! hash of step and place, where the paper takes the nearest: that loses each change smaller than half a gap,
//! so second moments only shrink, and steps grow (a small regression ended 5 % away from f32's loss). And a
//! second moment above 0 never becomes 0, which would make the next step lr·m̂/ε.

use tch::{Device, Kind, Tensor};

use super::each::{Slot, adamw, moments, wide};
use super::{AdamWConfig, decays};
use crate::error::Result;
use crate::{ffi, reference};

const BLOCK: i64 = 256;
/// Smaller tensors keep moments in f32.
const SMALLEST: usize = 4096;

pub(super) fn state(parameter: &Tensor) -> Vec<(&'static str, Tensor)> {
    if parameter.numel() < SMALLEST {
        return moments(parameter);
    }
    let device = parameter.device();
    let blocks = (parameter.numel() as i64 + BLOCK - 1) / BLOCK;
    let codes = |zero: i64| Tensor::full(parameter.size(), zero, (Kind::Uint8, device));
    let tops = || Tensor::zeros([blocks], (Kind::Float, device));
    vec![
        // The signed map has its 0 in the middle.
        ("exp_avg", codes(127)),
        ("exp_avg_sq", codes(0)),
        ("exp_avg_absmax", tops()),
        ("exp_avg_sq_absmax", tops()),
    ]
}

pub(super) fn step(slot: &Slot, grad: &Tensor, lr: f64, c: &AdamWConfig) -> Result<()> {
    let Some(mut m_top) = slot.find("exp_avg_absmax") else {
        return adamw(slot, grad, lr, c);
    };
    let step = slot.count()?;
    let mut v_top = slot.get("exp_avg_sq_absmax")?;
    let (mut m, mut v) = (slot.get("exp_avg")?, slot.get("exp_avg_sq")?);
    let weight_decay = if decays(&slot.parameter) {
        c.weight_decay
    } else {
        0.0
    };
    let mut p = slot.parameter.detach();
    let fused = p.device() == Device::Cpu || ffi::has_kernels(&p);
    if fused && p.kind() == Kind::Float && p.is_contiguous() {
        let list = [&p, &grad.contiguous(), &m, &v, &m_top, &v_top];
        let betas = (c.beta1, c.beta2);
        return ffi::adamw8(&list, step, lr, betas, weight_decay, c.eps);
    }
    let maps = reference::dynamic_maps();
    let plain = AdamWConfig { weight_decay, ..*c };
    let moments = (
        reference::dequantize(&m, &m_top, &maps.0),
        reference::dequantize(&v, &v_top, &maps.1),
    );
    let (next, first, second) = reference::adamw(
        &wide(&p).to_kind(Kind::Float),
        &grad.to_kind(Kind::Float),
        (&moments.0, &moments.1),
        step as i32,
        lr,
        &plain,
    );
    p.f_copy_(&next)?;
    let noise = reference::quantizing_noise(p.numel() as i64, step as i64, p.device());
    for (code, top, moment, map, chance) in [
        (&mut m, &mut m_top, first, &maps.0, &noise.0),
        (&mut v, &mut v_top, second, &maps.1, &noise.1),
    ] {
        let (codes, tops) = reference::quantize(&moment, map, chance);
        code.f_copy_(&codes)?;
        top.f_copy_(&tops)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shim's maps are the paper's, and have 256 different values.
    #[test]
    fn maps() {
        let (first, second) = reference::dynamic_maps();
        for (ours, plain) in ffi::dynamic_maps().iter().zip([&first, &second]) {
            let plain = Vec::<f32>::try_from(plain).unwrap();
            assert!(plain.windows(2).all(|w| w[0] < w[1]) && plain.len() == 256);
            for (a, b) in ours.iter().zip(&plain) {
                assert!((a - b).abs() <= 1e-6 * b.abs(), "{a} {b}");
            }
        }
        assert_eq!(first.double_value(&[127]), 0.0);
    }

    /// Over blocks with tails and all magnitudes: shim and composition make the same codes, but where a
    /// number lies between two of them to the last digit.
    #[test]
    fn both_ways_step_alike() {
        let n = 5000i64;
        let x = Tensor::arange(n, (Kind::Float, Device::Cpu));
        let wave = |f: f64| (&x * f).sin();
        let c = AdamWConfig {
            weight_decay: 0.1,
            ..Default::default()
        };
        let leaf = || wave(0.37).view([50, 100]).copy().set_requires_grad(true);
        let (a, b) = (leaf(), leaf());
        // A transposed parameter takes the composition.
        let turned = b.detach().tr().contiguous().tr().set_requires_grad(true);
        let slots = |p: &Tensor| {
            let named = vec![("p".to_owned(), p.shallow_clone())];
            super::super::Optimizer::new(named, super::super::OptimizerConfig::AdamW8bit(c))
        };
        let (mut fused, mut plain) = (slots(&a), slots(&turned));
        for k in 0..5 {
            // Gradients over ten decades within a block.
            let decades = (&x * 0.11 + f64::from(k)).cos() * 5.0 - 5.0;
            let g = (wave(0.91 + f64::from(k)) * (decades * 10f64.ln()).exp()).view([50, 100]);
            for (o, p) in [(&mut fused, &a), (&mut plain, &turned)] {
                o.zero_grad();
                (p * &g).sum(Kind::Float).backward();
                o.step(1e-2).unwrap();
            }
        }
        let apart = (a.detach() - turned.detach()).abs();
        // A code that differs moves one parameter by less than its step, and few do.
        assert!(apart.max().double_value(&[]) < 1e-2);
        assert!(apart.gt(1e-5).sum(Kind::Double).double_value(&[]) < 0.005 * n as f64);
    }
}
