//! Muon: momentum made orthogonal, for hidden matrices; AdamW for the rest.

use tch::{Kind, Tensor};

use super::AdamWConfig;
use super::each::{Slot, adamw, moments, wide, zeros};
use crate::error::Result;

/// Muon's settings (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks").
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MuonConfig {
    /// Decay of the momentum.
    pub momentum: f64,
    /// Whether the gradient is looked at once more on top of the momentum.
    pub nesterov: bool,
    /// Newton-Schulz steps.
    pub newton_schulz_steps: u32,
    /// How large a step is by the matrix's shape.
    pub scale: MuonScale,
    /// Decoupled weight decay of the matrices.
    pub weight_decay: f64,
    /// What everything else gets.
    pub adamw: AdamWConfig,
    /// The rest's learning rate over the matrices'.
    pub adamw_lr_ratio: f64,
}

impl Default for MuonConfig {
    /// The published defaults with Moonlight's scale, at which one learning rate fits all.
    fn default() -> Self {
        Self {
            momentum: 0.95,
            nesterov: true,
            newton_schulz_steps: 5,
            scale: MuonScale::AdamRms,
            weight_decay: 0.0,
            adamw: AdamWConfig::default(),
            adamw_lr_ratio: 1.0,
        }
    }
}

/// How large an orthogonalised step of R × C is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MuonScale {
    /// √max(1, R/C), as published first.
    Aspect,
    /// 0.2·√max(R, C): the root mean square of AdamW's steps (Liu et al. 2025, arXiv 2502.16982, equation 4).
    AdamRms,
}

/// Whether Muon itself steps a parameter: a matrix that is neither an embedding nor the head, by name.
#[must_use]
pub fn is_hidden_matrix(name: &str, parameter: &Tensor) -> bool {
    parameter.dim() == 2
        && !["embed", "lm_head", "wte", "wpe"]
            .iter()
            .any(|n| name.contains(n))
}

pub(super) fn state(name: &str, parameter: &Tensor) -> Vec<(&'static str, Tensor)> {
    if is_hidden_matrix(name, parameter) {
        vec![("momentum_buffer", zeros(parameter))]
    } else {
        moments(parameter)
    }
}

pub(super) fn step(slot: &Slot, grad: &Tensor, lr: f64, c: &MuonConfig) -> Result<()> {
    let Some(mut buffer) = slot.find("momentum_buffer") else {
        return adamw(slot, grad, lr * c.adamw_lr_ratio, &c.adamw);
    };
    slot.count()?;
    let g = wide(grad);
    // An average, not a sum: the orthogonalised step is the same.
    buffer.f_copy_(&(&buffer * c.momentum + &g * (1.0 - c.momentum)))?;
    let direction = if c.nesterov {
        g * (1.0 - c.momentum) + &buffer * c.momentum
    } else {
        buffer.shallow_clone()
    };
    let update = orthogonalized(&direction, c.newton_schulz_steps);
    let size = slot.parameter.size();
    let (rows, columns) = (size[0] as f64, size[1] as f64);
    let scale = match c.scale {
        MuonScale::Aspect => (rows / columns).max(1.0).sqrt(),
        MuonScale::AdamRms => 0.2 * rows.max(columns).sqrt(),
    };
    let next = wide(&slot.parameter) * (1.0 - lr * c.weight_decay) - update * (lr * scale);
    slot.parameter.shallow_clone().f_copy_(&next)?;
    Ok(())
}

/// About the nearest matrix with orthonormal rows or columns: the quintic Newton-Schulz iteration
/// X ← aX + (bA + cA²)X, A = XXᵀ, whose coefficients bring singular values near 1 fast and leave them within
/// about 0.7 to 1.2.
fn orthogonalized(g: &Tensor, steps: u32) -> Tensor {
    const A: f64 = 3.4445;
    const B: f64 = -4.7750;
    const C: f64 = 2.0315;
    let tall = g.size()[0] > g.size()[1];
    let wide = if tall { g.tr() } else { g.shallow_clone() };
    let norm = wide.square().sum(None::<Kind>).sqrt() + 1e-7;
    let mut x = wide / norm;
    for _ in 0..steps {
        let a = x.matmul(&x.tr());
        let b = &a * B + a.matmul(&a) * C;
        x = &x * A + b.matmul(&x);
    }
    if tall { x.tr() } else { x }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// Singular values after five steps lie about 1, whatever they were, for wide and tall matrices.
    #[test]
    fn singular_values_are_brought_to_one() {
        for size in [[4i64, 9], [9, 4], [6, 6]] {
            let n = size.iter().product::<i64>();
            let squares = Tensor::arange(n, (Kind::Double, Device::Cpu)).square();
            let x = (squares * 1.7).sin().view(size);
            let y = orthogonalized(&x, 5);
            let gram = if size[0] < size[1] {
                y.matmul(&y.tr())
            } else {
                y.tr().matmul(&y)
            };
            let s = gram.linalg_eigvalsh("L").clamp_min(0.0).sqrt();
            let (low, high) = (s.min().double_value(&[]), s.max().double_value(&[]));
            assert!(low > 0.3 && high < 1.25, "{size:?}: {low} to {high}");
        }
    }
}
