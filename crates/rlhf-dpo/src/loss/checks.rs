//! What arguments of losses must be.

use crate::error::{Result, ensure};

/// Above 0 and finite.
pub(super) fn positive(op: &'static str, name: &str, value: f64) -> Result<()> {
    ensure(value > 0.0 && value.is_finite(), op, || {
        format!("{name} is {value}, expected above 0")
    })
}

/// 0 or above, and finite.
pub(super) fn not_negative(op: &'static str, name: &str, value: f64) -> Result<()> {
    ensure(value >= 0.0 && value.is_finite(), op, || {
        format!("{name} is {value}, expected 0 or above")
    })
}

/// A rate of wrong labels: in [0, ½).
pub(super) fn label_smoothing(op: &'static str, value: f64) -> Result<()> {
    ensure((0.0..0.5).contains(&value), op, || {
        format!("label_smoothing is {value}, expected 0 <= label_smoothing < 0.5")
    })
}
