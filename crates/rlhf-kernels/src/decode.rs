//! What a decoding step does between its matrix products, in one pass each: on the CPU in f32 and without
//! gradients. Elsewhere the composition of libtorch's operations serves.

use tch::{Device, Kind, Tensor};

use crate::attention::AttentionOptions;
use crate::error::{Result, ensure};
use crate::ffi;

/// Whether this module's functions take `x`.
#[must_use]
pub fn decodes(x: &Tensor) -> bool {
    x.device() == Device::Cpu && x.kind() == Kind::Float
}

fn rows_of(op: &'static str, x: &Tensor, shape: &[i64]) -> Result<()> {
    let size = x.size();
    let last = size.len().saturating_sub(1);
    let fits = size.len() == shape.len()
        && size.iter().zip(shape).all(|(a, b)| *b < 0 || a == b)
        && decodes(x)
        && (size[last] == 1 || x.stride()[last] == 1);
    ensure(fits, op, || {
        format!(
            "got {:?} {size:?} on {:?}, expected f32 {shape:?} (−1 for any) on the CPU with unit stride in the last dimension",
            x.kind(),
            x.device()
        )
    })
}

/// What stands before a sequence's own columns: a prompt that several sequences may share.
#[derive(Clone, Copy, Debug)]
pub struct Prefix<'a> {
    /// `[Hkv, L, D]`, contiguous, turned already.
    pub keys: &'a Tensor,
    /// As `keys`.
    pub values: &'a Tensor,
}

/// The cache that new tokens are written into, and who owns which columns.
#[derive(Clone, Copy, Debug)]
pub struct DecodeCache<'a> {
    /// `[rows, Hkv, columns, D]`; the first n rows are those of the new tokens.
    pub keys: &'a Tensor,
    /// As `keys`, with the same strides.
    pub values: &'a Tensor,
    /// `[n]`, each sequence's first column.
    pub starts: &'a [i64],
    /// `[n]`, or nothing where no sequence has one.
    pub prefixes: &'a [Option<Prefix<'a>>],
    /// The column that the new tokens get.
    pub now: i64,
}

/// Attention of one new token a sequence: turns queries and keys, writes keys and values into the cache,
/// and mixes what each sequence has there and before. A window counts the columns of both.
///
/// # Shapes
/// `q` `[n, Hq, D]`, `k` and `v` `[n, Hkv, D]`, `rope`: cos and sin `[n, 1, D']`, the first half of sin
/// negative (x·cos + roll(x, D'/2)·sin); result `[n, Hq·D]`.
///
/// # Errors
/// When shapes, types or columns do not fit.
pub fn decode_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    rope: Option<(&Tensor, &Tensor)>,
    cache: &DecodeCache<'_>,
    options: &AttentionOptions,
) -> Result<Tensor> {
    const OP: &str = "decode_attention";
    rows_of(OP, q, &[-1, -1, -1])?;
    let (n, hq, d) = (q.size()[0], q.size()[1], q.size()[2]);
    let hkv = k.size().get(1).copied().unwrap_or(0);
    ensure(hkv > 0 && hq % hkv == 0, OP, || {
        format!("{hq} query heads for {hkv} key heads")
    })?;
    rows_of(OP, k, &[n, hkv, d])?;
    rows_of(OP, v, &[n, hkv, d])?;
    rows_of(OP, cache.keys, &[-1, hkv, -1, d])?;
    rows_of(OP, cache.values, &cache.keys.size())?;
    let (rows, columns) = (cache.keys.size()[0], cache.keys.size()[2]);
    let inside = |s: &i64| (0..=cache.now).contains(s);
    ensure(
        cache.keys.stride() == cache.values.stride()
            && rows >= n
            && cache.starts.len() as i64 == n
            && cache.now < columns
            && cache.starts.iter().all(inside),
        OP,
        || {
            format!(
                "column {} and {} starts do not fit {n} of {rows} rows of {columns} columns",
                cache.now,
                cache.starts.len()
            )
        },
    )?;
    ensure(
        cache.prefixes.is_empty() || cache.prefixes.len() as i64 == n,
        OP,
        || format!("{} prefixes for {n} sequences", cache.prefixes.len()),
    )?;
    for prefix in cache.prefixes.iter().flatten() {
        rows_of(OP, prefix.keys, &[hkv, -1, d])?;
        rows_of(OP, prefix.values, &prefix.keys.size())?;
        ensure(
            prefix.keys.is_contiguous() && prefix.values.is_contiguous(),
            OP,
            || "a prefix is not contiguous".into(),
        )?;
    }
    let turned;
    let rope = match rope {
        None => None,
        Some((cos, sin)) => {
            let turning = cos.size().last().copied().unwrap_or(0);
            rows_of(OP, cos, &[n, 1, turning])?;
            rows_of(OP, sin, &[n, 1, turning])?;
            ensure(turning % 2 == 0 && turning <= d, OP, || {
                format!("{turning} of {d} dimensions cannot turn")
            })?;
            turned = (cos.contiguous(), sin.contiguous());
            Some((&turned.0, &turned.1))
        }
    };
    let tensors = [q, k, v, cache.keys, cache.values];
    let (starts, prefixes) = (cache.starts, cache.prefixes);
    ffi::decode_attention(tensors, rope, starts, prefixes, cache.now, options)
}

/// x·w / √(mean x² + ε) of every row.
///
/// # Shapes
/// `x` `[n, D]`, `weight` `[D]`; result `[n, D]`.
///
/// # Errors
/// When shapes or types do not fit.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    rows_of("rms_norm", x, &[-1, -1])?;
    rows_of("rms_norm", weight, &[x.size()[1]])?;
    ffi::rms_norm(x, weight, eps)
}

/// silu(gate)·up of rows that hold both, the gate first.
///
/// # Shapes
/// `both` `[n, 2·D]`; result `[n, D]`.
///
/// # Errors
/// When shape or type does not fit.
pub fn silu_gate(both: &Tensor) -> Result<Tensor> {
    rows_of("silu_gate", both, &[-1, -1])?;
    ensure(both.size()[1] % 2 == 0, "silu_gate", || {
        format!("{} columns have no halves", both.size()[1])
    })?;
    ffi::silu_gate(both)
}

/// A token for every row of scores.
#[derive(Clone, Debug, PartialEq)]
pub struct DrawnRows {
    /// Their ids.
    pub ids: Vec<i64>,
    /// Their log-probabilities under softmax(scores); NaN where a score of the row is NaN or +∞.
    pub logprobs: Vec<f32>,
    /// The sum of each row's scores: finite exactly when all of them are.
    pub sums: Vec<f32>,
}

/// Draws from softmax(`scores`) by inversion: the first token, in order of ids, at which the
/// cumulative probability exceeds the row's uniform. Nothing of the size of `scores` is written.
///
/// # Shapes
/// `scores` `[n, V]` with V > 0, `uniforms` `[n]` in (0, 1).
///
/// # Errors
/// When shape or type does not fit.
pub fn draw(scores: &Tensor, uniforms: &[f64]) -> Result<DrawnRows> {
    rows_of("draw", scores, &[uniforms.len() as i64, -1])?;
    ensure(scores.size()[1] > 0, "draw", || {
        "there are no scores to draw from".into()
    })?;
    let (ids, logprobs, sums) = ffi::draw(scores, uniforms)?;
    Ok(DrawnRows {
        ids,
        logprobs,
        sums,
    })
}
