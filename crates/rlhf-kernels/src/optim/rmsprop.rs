//! RMSprop, as PyTorch has it.

use tch::Tensor;

use super::each::{Slot, wide, zeros};
use crate::error::Result;

/// RMSprop's settings. The DPO paper's optimiser, at a learning rate of 5e-7.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RmsPropConfig {
    /// Decay of the second moment.
    pub alpha: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Momentum of the update; 0 for none.
    pub momentum: f64,
    /// Whether the mean gradient is taken out of the second moment.
    pub centered: bool,
    /// Added to the gradient, times the parameter (not decoupled), whatever its dimensions.
    pub weight_decay: f64,
}

impl Default for RmsPropConfig {
    /// PyTorch's defaults.
    fn default() -> Self {
        Self {
            alpha: 0.99,
            eps: 1e-8,
            momentum: 0.0,
            centered: false,
            weight_decay: 0.0,
        }
    }
}

pub(super) fn state(parameter: &Tensor, c: &RmsPropConfig) -> Vec<(&'static str, Tensor)> {
    let mut all = vec![("square_avg", zeros(parameter))];
    if c.centered {
        all.push(("grad_avg", zeros(parameter)));
    }
    if c.momentum > 0.0 {
        all.push(("momentum_buffer", zeros(parameter)));
    }
    all
}

pub(super) fn step(slot: &Slot, grad: &Tensor, lr: f64, c: &RmsPropConfig) -> Result<()> {
    slot.count()?;
    let p = wide(&slot.parameter);
    let g = wide(grad) + &p * c.weight_decay;
    let mut second = slot.get("square_avg")?;
    second.f_copy_(&(&second * c.alpha + g.square() * (1.0 - c.alpha)))?;
    let variance = if c.centered {
        let mut mean = slot.get("grad_avg")?;
        mean.f_copy_(&(&mean * c.alpha + &g * (1.0 - c.alpha)))?;
        &second - mean.square()
    } else {
        second
    };
    let mut update = g / (variance.sqrt() + c.eps);
    if c.momentum > 0.0 {
        let mut buffer = slot.get("momentum_buffer")?;
        buffer.f_copy_(&(&buffer * c.momentum + update))?;
        update = buffer;
    }
    slot.parameter.shallow_clone().f_copy_(&(p - update * lr))?;
    Ok(())
}
