//! Adafactor: second moments of a matrix from those of its rows and columns.

use tch::{Kind, Tensor};

use super::decays;
use super::each::{Slot, wide, zeros};
use crate::error::Result;

/// Adafactor's settings (Shazeer & Stern 2018, arXiv 1804.04235, algorithms 4 and 5), without momentum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdafactorConfig {
    /// β̂₂ = 1 − step^−this.
    pub decay_rate: f64,
    /// Added to squared gradients.
    pub eps: f64,
    /// The update's root mean square is held at this.
    pub clip_threshold: f64,
    /// Whether the learning rate is relative: multiplied by max(1e-3, the parameter's root mean square).
    pub relative: bool,
    /// Decoupled weight decay of tensors with two or more dimensions.
    pub weight_decay: f64,
}

impl Default for AdafactorConfig {
    /// The paper's values, with learning rates that are not relative.
    fn default() -> Self {
        Self {
            decay_rate: 0.8,
            eps: 1e-30,
            clip_threshold: 1.0,
            relative: false,
            weight_decay: 0.0,
        }
    }
}

pub(super) fn state(parameter: &Tensor) -> Vec<(&'static str, Tensor)> {
    let whole = zeros(parameter);
    if parameter.dim() < 2 {
        return vec![("exp_avg_sq", whole)];
    }
    let mean = |axis: i64| whole.mean_dim(&[axis][..], false, None::<Kind>);
    vec![("exp_avg_sq_row", mean(-1)), ("exp_avg_sq_col", mean(-2))]
}

pub(super) fn step(slot: &Slot, grad: &Tensor, lr: f64, c: &AdafactorConfig) -> Result<()> {
    let beta2 = 1.0 - slot.count()?.powf(-c.decay_rate);
    let (p, g) = (wide(&slot.parameter), wide(grad));
    let squares = g.square() + c.eps;
    let average = |kind: &str, now: &Tensor| -> Result<Tensor> {
        let mut kept = slot.get(kind)?;
        kept.f_copy_(&(&kept * beta2 + now * (1.0 - beta2)))?;
        Ok(kept)
    };
    let update = if slot.find("exp_avg_sq").is_some() {
        g / average("exp_avg_sq", &squares)?.sqrt()
    } else {
        let mean = |axis: i64| squares.mean_dim(&[axis][..], false, None::<Kind>);
        let rows = average("exp_avg_sq_row", &mean(-1))?;
        let columns = average("exp_avg_sq_col", &mean(-2))?;
        // V̂ = R·C / mean R, its root taken in two parts, which are smaller than their product.
        let rows = &rows / rows.mean_dim(&[-1i64][..], true, None::<Kind>);
        g * rows.rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
    };
    let rms = |t: &Tensor| -> Result<f64> {
        let mean = t.square().f_mean(Kind::Double)?.f_double_value(&[])?;
        Ok(mean.sqrt())
    };
    let lr = if c.relative {
        lr * rms(&p)?.max(1e-3)
    } else {
        lr
    };
    let held = (rms(&update)? / c.clip_threshold).max(1.0);
    let decay = if decays(&slot.parameter) {
        c.weight_decay
    } else {
        0.0
    };
    let next = p * (1.0 - lr * decay) - update * (lr / held);
    slot.parameter.shallow_clone().f_copy_(&next)?;
    Ok(())
}
