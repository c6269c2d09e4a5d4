//! What every loss asks of its tensors before it computes.

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::error::{Result, ensure};

/// Floating point `[P]`, all of one length; absent ones are skipped.
pub(crate) fn vectors(op: &'static str, tensors: &[(&str, Option<&Tensor>)]) -> Result<()> {
    let size = tensors.iter().find_map(|(_, t)| t.map(Tensor::size));
    for (name, t) in tensors {
        let Some(t) = t else { continue };
        let right =
            t.dim() == 1 && Some(t.size()) == size && floating(t) && t.device() == device(tensors);
        ensure(right, op, || {
            format!(
                "{name}: {:?} {:?} on {:?}, expected floating point [P] with P of {:?} as the first",
                t.kind(),
                t.size(),
                t.device(),
                size.clone().unwrap_or_default()
            )
        })?;
    }
    Ok(())
}

fn device(tensors: &[(&str, Option<&Tensor>)]) -> tch::Device {
    tensors
        .iter()
        .find_map(|(_, t)| t.map(Tensor::device))
        .unwrap_or(tch::Device::Cpu)
}

/// A floating-point tensor of the size `size`.
pub(crate) fn shaped(op: &'static str, name: &str, t: &Tensor, size: &[i64]) -> Result<()> {
    ensure(t.size() == size && floating(t), op, || {
        format!(
            "{name}: {:?} {:?}, expected floating point {size:?}",
            t.kind(),
            t.size()
        )
    })
}

/// Every entry is finite.
pub(crate) fn finite(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    entries(op, name, t, &t.isfinite(), "finite")
}

/// Every entry is finite and 0 or more.
pub(crate) fn weights(op: &'static str, t: Option<&Tensor>) -> Result<()> {
    let Some(t) = t else { return Ok(()) };
    let right = t.isfinite().logical_and(&t.ge(0.0));
    entries(op, "weights", t, &right, "finite and 0 or more")
}

/// Every entry lies in 0..=1.
pub(crate) fn probabilities(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    let right = t.ge(0.0).logical_and(&t.le(1.0));
    entries(op, name, t, &right, "between 0 and 1")
}

/// i64 `[S]`, each in 0..`classes`.
pub(crate) fn classes(op: &'static str, labels: &Tensor, rows: i64, classes: i64) -> Result<()> {
    ensure(
        labels.kind() == Kind::Int64 && labels.size() == [rows],
        op,
        || {
            format!(
                "labels: {:?} {:?}, expected Int64 [{rows}]",
                labels.kind(),
                labels.size()
            )
        },
    )?;
    let right = labels.ge(0).logical_and(&labels.lt(classes));
    entries(
        op,
        "labels",
        labels,
        &right,
        &format!("a class, 0 to {}", classes - 1),
    )
}

/// Names the first entry where `right` is false.
fn entries(op: &'static str, name: &str, t: &Tensor, right: &Tensor, expected: &str) -> Result<()> {
    if right.all().int64_value(&[]) != 0 {
        return Ok(());
    }
    let wrong = right.reshape([-1]).logical_not().to_kind(Kind::Int64);
    let row = wrong.argmax(0, false);
    let value = t.reshape([-1]).index_select(0, &row.reshape([1]));
    ensure(false, op, || {
        format!(
            "{name}[{}] is {}, expected {expected}",
            row.int64_value(&[]),
            value.to_kind(Kind::Double).double_value(&[0])
        )
    })
}

fn floating(t: &Tensor) -> bool {
    t.is_floating_point()
}

/// f16 and bf16 become f32; the graph is kept.
pub(crate) fn at_least_f32(x: &Tensor) -> Tensor {
    if matches!(x.kind(), Kind::Half | Kind::BFloat16) {
        x.to_kind(Kind::Float)
    } else {
        x.shallow_clone()
    }
}

/// Σ w·losses with weight Σ w; w = 1 where absent.
pub(crate) fn weighted(losses: &Tensor, weights: Option<&Tensor>) -> LossSum {
    match weights {
        None => LossSum {
            sum: losses.sum(None),
            weight: losses.numel() as f64,
        },
        Some(w) => LossSum {
            sum: (losses * w.detach().to_kind(losses.kind())).sum(None),
            weight: w.sum(Kind::Double).double_value(&[]),
        },
    }
}
