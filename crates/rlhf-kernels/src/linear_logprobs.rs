//! Log-probabilities of given ids, and entropies, without ever making the `[M, V]` logits whole.

use tch::{Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi;

/// Settings of [`linear_logprobs`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogprobOptions {
    /// Logits are divided by it.
    pub temperature: f64,
    /// Logits are squashed as c·tanh(x/c) before the temperature.
    pub softcap: Option<f64>,
    /// Also give the entropy of each row.
    pub entropy: bool,
    /// Rows computed at once; by default as many as fit 32 MiB of logits.
    pub chunk_rows: Option<i64>,
}

impl Default for LogprobOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            softcap: None,
            entropy: false,
            chunk_rows: None,
        }
    }
}

/// What [`linear_logprobs`] gives: f32, or f64 when `hidden` is f64.
#[derive(Debug)]
pub struct Logprobs {
    /// `[M]` log-probability of each id.
    pub logprobs: Tensor,
    /// `[M]` entropy in nats, where it was asked for.
    pub entropy: Option<Tensor>,
}

/// Bytes of logits held at once by default.
const CHUNK_BYTES: i64 = 32 << 20;

/// log softmax(cap(hidden · weightᵀ) / T) at `ids`, and optionally the entropy of each row.
///
/// Forward and backward hold one chunk of logits in f32 (f64 for f64); backward computes it again. With
/// a frozen `weight` and no entropy, forward prepares the gradient of `hidden` instead and backward
/// recomputes nothing. A logit of −∞ contributes 0 to the entropy.
///
/// # Shapes
/// `hidden` `[M, H]`, `weight` `[V, H]` of the same type, `ids` i64 `[M]`.
///
/// # Errors
/// When shapes or types do not fit, an id lies outside `0..V` (checked on the CPU), the temperature is
/// not positive, or libtorch fails. A second derivative is not supported.
pub fn linear_logprobs(
    hidden: &Tensor,
    weight: &Tensor,
    ids: &Tensor,
    options: &LogprobOptions,
) -> Result<Logprobs> {
    const OP: &str = "linear_logprobs";
    let (hs, ws) = (hidden.size(), weight.size());
    ensure(hs.len() == 2 && ws.len() == 2 && hs[1] == ws[1], OP, || {
        format!("hidden is {hs:?} and weight {ws:?}, expected [M, H] and [V, H]")
    })?;
    ensure(hidden.kind() == weight.kind(), OP, || {
        format!(
            "hidden is {:?} and weight {:?}, expected one type",
            hidden.kind(),
            weight.kind()
        )
    })?;
    check_float(OP, "hidden", hidden)?;
    ensure(hidden.device() == weight.device(), OP, || {
        format!(
            "hidden is on {:?} and weight on {:?}",
            hidden.device(),
            weight.device()
        )
    })?;
    ensure(ws[0] > 0, OP, || "the vocabulary is empty".into())?;
    check_ids(OP, ids, hs[0], ws[0])?;
    ensure(
        options.temperature > 0.0 && options.temperature.is_finite(),
        OP,
        || {
            format!(
                "temperature is {}, expected a positive number",
                options.temperature
            )
        },
    )?;
    ensure(
        options.softcap.is_none_or(|c| c > 0.0 && c.is_finite()),
        OP,
        || {
            format!(
                "the soft cap is {:?}, expected a positive number",
                options.softcap
            )
        },
    )?;
    ensure(options.chunk_rows.is_none_or(|n| n > 0), OP, || {
        format!(
            "chunk_rows is {:?}, expected at least 1",
            options.chunk_rows
        )
    })?;
    let bytes = if hidden.kind() == Kind::Double { 8 } else { 4 };
    let chunk = options
        .chunk_rows
        .unwrap_or(CHUNK_BYTES / (ws[0] * bytes).max(1))
        .max(1);
    let (logprobs, entropy) = ffi::linear_logprobs(
        hidden,
        weight,
        ids,
        options.temperature,
        options.softcap.unwrap_or(0.0),
        options.entropy,
        chunk,
    )?;
    Ok(Logprobs { logprobs, entropy })
}

/// log softmax(logits) at `ids`, in f32 or better, without a `[M, V]` tensor of log-probabilities.
///
/// # Shapes
/// `logits` `[M, V]`, `ids` i64 `[M]`; result `[M]`.
///
/// # Errors
/// When shapes do not fit or an id lies outside `0..V` (checked on the CPU). A second derivative is
/// not supported.
pub fn token_logprobs(logits: &Tensor, ids: &Tensor) -> Result<Tensor> {
    const OP: &str = "token_logprobs";
    let size = check_logits(OP, logits)?;
    check_ids(OP, ids, size[0], size[1])?;
    ffi::logit_logprobs(OP, logits, Some(ids))
}

/// Entropy of softmax(logits) in nats; a logit of −∞ contributes 0.
///
/// # Shapes
/// `logits` `[M, V]`; result `[M]`.
///
/// # Errors
/// When `logits` is not two-dimensional. A second derivative is not supported.
pub fn entropy(logits: &Tensor) -> Result<Tensor> {
    const OP: &str = "entropy";
    check_logits(OP, logits)?;
    ffi::logit_logprobs(OP, logits, None)
}

fn check_logits(op: &'static str, logits: &Tensor) -> Result<Vec<i64>> {
    let size = logits.size();
    ensure(size.len() == 2 && size[1] > 0, op, || {
        format!("logits are {size:?}, expected [M, V]")
    })?;
    check_float(op, "logits", logits)?;
    Ok(size)
}

fn check_float(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    ensure(
        matches!(
            t.kind(),
            Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half
        ),
        op,
        || format!("{name} is {:?}, expected a floating-point type", t.kind()),
    )
}

fn check_ids(op: &'static str, ids: &Tensor, m: i64, v: i64) -> Result<()> {
    ensure(ids.size() == [m] && ids.kind() == Kind::Int64, op, || {
        format!(
            "ids are {:?} {:?}, expected Int64 [{m}]",
            ids.kind(),
            ids.size()
        )
    })?;
    if m > 0 && ids.device() == tch::Device::Cpu {
        let (low, high) = (ids.min().int64_value(&[]), ids.max().int64_value(&[]));
        ensure(low >= 0 && high < v, op, || {
            format!("ids run from {low} to {high}, expected 0..{v}")
        })?;
    }
    Ok(())
}
