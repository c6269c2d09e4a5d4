//! The small operations of a transformer: the embedding, and those of a layer. On the CPU in f32 and f64 each is one
//! pass over its rows forward and one backward, and keeps no more than its inputs; elsewhere libtorch's operations do
//! the same.

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};
use crate::{ffi, reference};

/// Whether the passes are for these tensors.
fn fused(tensors: &[&Tensor]) -> bool {
    let kind = tensors[0].kind();
    matches!(kind, Kind::Float | Kind::Double)
        && tensors
            .iter()
            .all(|t| t.device() == Device::Cpu && t.kind() == kind && t.numel() > 0)
}

/// The residual stream x + more (x itself where there is nothing to add), and its RMS norm
/// y = x·w / √(mean x² + ε) over the last dimension (Zhang and Sennrich 2019, arXiv 1910.07467). What goes on with
/// the first of the two results lets the gradients of both meet in one pass.
///
/// # Shapes
/// `x` and `more` `[…, D]`, `weight` `[D]`; results as `x`.
///
/// # Errors
/// When shapes do not fit. A second derivative is not supported on the CPU.
pub fn add_norm(
    x: &Tensor,
    more: Option<&Tensor>,
    weight: &Tensor,
    eps: f64,
) -> Result<(Tensor, Tensor)> {
    let size = x.size();
    ensure(
        weight.dim() == 1
            && size.last() == weight.size().first()
            && more.is_none_or(|m| m.size() == size),
        "add_norm",
        || {
            let more = more.map(Tensor::size);
            format!(
                "x is {size:?}, more {more:?} and the weight {:?}, expected […, D] twice and [D]",
                weight.size()
            )
        },
    )?;
    let all: Vec<&Tensor> = [x, weight].into_iter().chain(more).collect();
    if fused(&all) {
        return ffi::add_norm(x, more, weight, eps);
    }
    Ok(reference::add_norm(x, more, weight, eps))
}

/// Rows of an embedding table. On the CPU in f32 and f64 the gradient, which is as large as the table, takes memory
/// for the rows that were looked up, a page of the system at a time; so do the moments of
/// [`AdamW`](crate::optim::AdamW).
///
/// # Shapes
/// `table` `[V, H]`, `ids` i64 `[n]`; result `[n, H]`.
///
/// # Errors
/// When shapes do not fit, or an id is not in the table. A second derivative is not supported on the CPU.
pub fn embedding(table: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let (t, i) = (table.size(), ids.size());
    ensure(
        t.len() == 2 && i.len() == 1 && ids.kind() == Kind::Int64,
        "embedding",
        || {
            let kind = ids.kind();
            format!("the table is {t:?} and ids {kind:?} {i:?}, expected [V, H] and i64 [n]")
        },
    )?;
    if fused(&[table]) && ids.device() == Device::Cpu {
        return ffi::embedding(table, ids);
    }
    Ok(Tensor::f_embedding(table, ids, -1, false, false)?)
}

/// gate·σ(gate)·up: what a gated feed-forward block has between its products (Shazeer 2020, arXiv 2002.05202).
///
/// # Shapes
/// Both `[N, D]`, as the result.
///
/// # Errors
/// When shapes do not fit. A second derivative is not supported on the CPU.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (g, u) = (gate.size(), up.size());
    ensure(g.len() == 2 && g == u, "silu_mul", || {
        format!("gate is {g:?} and up {u:?}, expected [N, D] twice")
    })?;
    if fused(&[gate, up]) {
        return ffi::silu_mul(gate, up);
    }
    Ok(reference::silu_mul(gate, up))
}

/// Rotary positions in halves: x·cos + roll(x, D'/2)·sin on the first D' of D dimensions, the sign of the rotation
/// being in `sin` (Su et al. 2021, arXiv 2104.09864). Differentiable in `x`.
///
/// # Shapes
/// `x` `[N, heads, D]`, `cos` and `sin` `[N, 1, D']`; result as `x`.
///
/// # Errors
/// When shapes do not fit. A second derivative is not supported on the CPU.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (xs, cs) = (x.size(), cos.size());
    let fits = xs.len() == 3 && cs.len() == 3 && cs == sin.size() && cs[..2] == [xs[0], 1];
    ensure(fits && cs[2] % 2 == 0 && cs[2] <= xs[2], "rotate", || {
        format!(
            "x is {xs:?}, cos {cs:?} and sin {:?}, expected [N, heads, D] and [N, 1, D'] twice with an even D' of at most D",
            sin.size()
        )
    })?;
    if fused(&[x, cos, sin]) {
        return ffi::rotate(x, cos, sin);
    }
    Ok(reference::rotate(x, cos, sin))
}

/// (gate·σ(gate)·up)·Wᵀ: [`silu_mul`] and the product after it. On the CPU backward computes what is between
/// the two again instead of keeping it.
///
/// # Shapes
/// `gate` and `up` `[N, D]`, `weight` `[out, D]`; result `[N, out]`.
///
/// # Errors
/// When shapes or types do not fit. A second derivative is not supported.
pub fn silu_mul_linear(gate: &Tensor, up: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (g, u) = (gate.size(), up.size());
    let fits = g.len() == 2 && g == u;
    ensure(fits && takes(weight, gate), "silu_mul_linear", || {
        let w = weight.size();
        format!(
            "gate is {g:?}, up {u:?} and the weight {w:?}, expected [N, D] twice and [out, D] of one type"
        )
    })?;
    if fused(&[gate, up, weight]) {
        return ffi::silu_mul_linear(gate, up, weight);
    }
    Ok(silu_mul(gate, up)?.linear(weight, None::<&Tensor>))
}

/// Whether `weight` is `[out, D]` for rows `[N, D]` of the same type.
fn takes(weight: &Tensor, x: &Tensor) -> bool {
    let width = x.size().last().copied().unwrap_or(-1);
    weight.dim() == 2 && weight.size()[1] == width && weight.kind() == x.kind()
}

/// x·Wᵀ for several W, on any device: what flows back to x is added up by the products themselves.
///
/// # Shapes
/// `x` `[N, D]`, each weight `[out, D]`; results `[N, out]`.
///
/// # Errors
/// When shapes or types do not fit. A second derivative is not supported.
pub fn linears(x: &Tensor, weights: &[&Tensor]) -> Result<Vec<Tensor>> {
    let fits = x.dim() == 2 && weights.iter().all(|w| takes(w, x));
    ensure(fits, "linears", || {
        let sizes: Vec<_> = weights.iter().map(|w| w.size()).collect();
        format!(
            "x is {:?} and the weights {sizes:?}, expected [N, D] and [out, D] of one type",
            x.size()
        )
    })?;
    ffi::linears(x, weights)
}

/// The x of [`add_norm`] and [`linears`] of its y. On the CPU backward computes y again instead of keeping it.
///
/// # Shapes
/// `x` and `more` `[N, D]`, `norm` `[D]`, each weight `[out, D]`; results `[N, D]` and `[N, out]`.
///
/// # Errors
/// When shapes or types do not fit. A second derivative is not supported.
pub fn norm_linears(
    x: &Tensor,
    more: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weights: &[&Tensor],
) -> Result<(Tensor, Vec<Tensor>)> {
    let size = x.size();
    let fits = size.len() == 2
        && norm.size() == size[1..]
        && more.is_none_or(|m| m.size() == size)
        && weights.iter().all(|w| takes(w, x));
    let all = || {
        [x, norm]
            .into_iter()
            .chain(more)
            .chain(weights.iter().copied())
    };
    if fits && fused(&all().collect::<Vec<_>>()) {
        return ffi::norm_linears(x, more, norm, eps, weights);
    }
    let (x, y) = add_norm(x, more, norm, eps)?;
    let products = linears(&y, weights)?;
    Ok((x, products))
}
