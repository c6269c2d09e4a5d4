//! Attention over packed groups: a completion's token sees its prompt and its completion's past.

use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi;

/// One prompt's rows and its completions' rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionGroup {
    /// The prompt's rows; may be empty.
    pub prompt: Range<i64>,
    /// Each completion's rows, right after the prompt, one after the other.
    pub completions: Vec<Range<i64>>,
}

/// Who sees whom in a packed batch of N rows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttentionLayout {
    groups: Vec<AttentionGroup>,
    rows: i64,
    /// The groups as the shim reads them.
    flat: Vec<i64>,
}

impl AttentionLayout {
    /// The layout of `groups`, which must cover rows 0..N in order without gaps. A prompt or a
    /// completion may be empty, and a group may have no completions.
    ///
    /// # Errors
    /// When ranges leave gaps, overlap or are out of order.
    pub fn new(groups: Vec<AttentionGroup>) -> Result<Self> {
        let mut end = 0;
        let mut flat = Vec::new();
        for g in &groups {
            for range in std::iter::once(&g.prompt).chain(&g.completions) {
                ensure(
                    range.start == end && range.end >= range.start,
                    "attention layout",
                    || format!("rows {range:?} come after row {end}, expected them to begin there"),
                )?;
                end = range.end;
            }
            flat.extend([g.prompt.start, g.prompt.end, g.completions.len() as i64]);
            flat.extend(g.completions.iter().flat_map(|c| [c.start, c.end]));
        }
        Ok(Self {
            groups,
            rows: end,
            flat,
        })
    }

    /// The groups.
    #[must_use]
    pub fn groups(&self) -> &[AttentionGroup] {
        &self.groups
    }

    /// N.
    #[must_use]
    pub fn num_rows(&self) -> i64 {
        self.rows
    }
}

/// How scores become weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionOptions {
    /// Multiplies the scores; usually D^-½.
    pub scale: f64,
    /// The cap c of scaled scores squashed as c·tanh(x/c).
    pub softcap: Option<f64>,
    /// A token sees itself and the `window − 1` tokens before it, be they its own completion's or
    /// its prompt's.
    pub window: Option<i64>,
}

impl AttentionOptions {
    /// Plain attention with this scale.
    #[must_use]
    pub fn new(scale: f64) -> Self {
        Self {
            scale,
            softcap: None,
            window: None,
        }
    }
}

/// softmax(scale · q kᵀ) v over each row's group prompt and own completion's past, differentiable;
/// with a soft cap on the scores and within a sliding window where the options say so.
/// Grouped-query attention: Hq is a multiple of Hkv.
///
/// On the CPU the prompt's keys and values are laid out once, however many completions look at them,
/// and scores exist for a block of rows at a time; keys that a whole block has left its window behind
/// are not computed; types narrower than f32 compute in f32. On CUDA in 16 bits, without cap and window, libtorch's
/// flash kernel runs twice, over every row's own sequence and over the prompts that completions see; neither masks
/// nor copies of prompts are made. All else runs libtorch's attention completion by completion.
///
/// # Shapes
/// `q` `[N, Hq, D]`, `k` and `v` `[N, Hkv, D]`; result `[N, Hq, D]`.
///
/// # Errors
/// When shapes, types or devices do not fit each other or the layout, scale, cap or window is not
/// positive, or libtorch fails. A second derivative is not supported on the CPU.
pub fn shared_prefix_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    options: &AttentionOptions,
) -> Result<Tensor> {
    const OP: &str = "shared_prefix_attention";
    let (qs, ks, vs) = (q.size(), k.size(), v.size());
    ensure(
        qs.len() == 3 && ks.len() == 3 && ks == vs && qs[2] == ks[2],
        OP,
        || format!("q is {qs:?}, k {ks:?}, v {vs:?}, expected [N, Hq, D], [N, Hkv, D] twice"),
    )?;
    ensure(qs[0] == layout.rows && ks[0] == layout.rows, OP, || {
        format!(
            "q has {} rows and k {}, the layout {}",
            qs[0], ks[0], layout.rows
        )
    })?;
    ensure(
        qs[1] > 0 && ks[1] > 0 && qs[2] > 0 && qs[1] % ks[1] == 0,
        OP,
        || {
            format!(
                "{} query heads are no multiple of {} key heads",
                qs[1], ks[1]
            )
        },
    )?;
    ensure(q.kind() == k.kind() && k.kind() == v.kind(), OP, || {
        format!(
            "q is {:?}, k {:?}, v {:?}, expected one type",
            q.kind(),
            k.kind(),
            v.kind()
        )
    })?;
    ensure(
        q.device() == k.device() && k.device() == v.device(),
        OP,
        || {
            format!(
                "q is on {:?}, k on {:?}, v on {:?}",
                q.device(),
                k.device(),
                v.device()
            )
        },
    )?;
    let AttentionOptions {
        scale,
        softcap,
        window,
    } = *options;
    ensure(scale > 0.0 && scale.is_finite(), OP, || {
        format!("the scale is {scale}, expected a positive number")
    })?;
    ensure(softcap.is_none_or(|c| c > 0.0 && c.is_finite()), OP, || {
        format!("the soft cap is {softcap:?}, expected a positive number")
    })?;
    ensure(window.is_none_or(|w| w > 0), OP, || {
        format!("the window is {window:?}, expected a positive number")
    })?;
    match (q.device(), q.kind()) {
        (Device::Cpu, Kind::Float | Kind::Double) => {
            ffi::prefix_attention(q, k, v, &layout.flat, options)
        }
        (Device::Cpu, Kind::BFloat16 | Kind::Half) => {
            let wide = |t: &Tensor| t.to_kind(Kind::Float);
            Ok(
                ffi::prefix_attention(&wide(q), &wide(k), &wide(v), &layout.flat, options)?
                    .to_kind(q.kind()),
            )
        }
        (Device::Cuda(_), Kind::BFloat16 | Kind::Half) if flash_takes(&qs, options) => {
            ffi::prefix_attention_by_parts([q, k, v], &layout.flat, scale, true)
        }
        _ => by_completion(q, k, v, layout, options),
    }
}

/// Whether libtorch's flash kernel is for these queries.
fn flash_takes(size: &[i64], options: &AttentionOptions) -> bool {
    let plain = options.softcap.is_none() && options.window.is_none();
    plain && size[0] > 0 && size[2] % 8 == 0 && size[2] <= 256
}

/// Any device: libtorch's attention for each prompt and each completion, whose keys are the prompt's
/// and its own laid end to end. A soft cap needs the scores themselves.
fn by_completion(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    options: &AttentionOptions,
) -> Result<Tensor> {
    // [1, H, L, D] of some rows.
    let rows = |t: &Tensor, r: &Range<i64>| {
        t.narrow(0, r.start, r.end - r.start)
            .transpose(0, 1)
            .unsqueeze(0)
    };
    let gqa = q.size()[1] != k.size()[1];
    let mut parts = Vec::new();
    for g in &layout.groups {
        let prompt_len = g.prompt.end - g.prompt.start;
        let sequences =
            std::iter::once((&g.prompt, 0)).chain(g.completions.iter().map(|c| (c, prompt_len)));
        for (own, seen) in sequences.filter(|(own, _)| !own.is_empty()) {
            let keys = |t: &Tensor| match seen {
                0 => rows(t, own),
                _ => Tensor::cat(&[rows(t, &g.prompt), rows(t, own)], 2),
            };
            let length = own.end - own.start;
            let window = options.window.filter(|&w| w < seen + length);
            let mask = || {
                let past =
                    Tensor::ones([length, seen + length], (Kind::Bool, q.device())).tril(seen);
                match window {
                    Some(w) => past.triu(seen - w + 1),
                    None => past,
                }
            };
            let out = if let Some(cap) = options.softcap {
                capped(
                    &rows(q, own),
                    &keys(k),
                    &keys(v),
                    &mask(),
                    options.scale,
                    cap,
                )?
            } else {
                let mask = (seen > 0 || window.is_some()).then(mask);
                Tensor::f_scaled_dot_product_attention(
                    &rows(q, own),
                    &keys(k),
                    &keys(v),
                    mask.as_ref(),
                    0.0,
                    mask.is_none(),
                    options.scale,
                    gqa,
                )?
            };
            parts.push(out.squeeze_dim(0).transpose(0, 1));
        }
    }
    Ok(if parts.is_empty() {
        q.zeros_like()
    } else {
        Tensor::f_cat(&parts, 0)?
    })
}

/// Attention with capped scores, in f32 at least. `mask` `[L, keys]` is true where a row looks.
fn capped(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Tensor,
    scale: f64,
    cap: f64,
) -> Result<Tensor> {
    let repeats = q.size()[1] / k.size()[1];
    let shared = |t: &Tensor| t.repeat_interleave_self_int(repeats, 1, None);
    let kind = match q.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    };
    let scores = q.f_matmul(&shared(k).transpose(2, 3))?.to_kind(kind) * (scale / cap);
    let weights = (scores.tanh() * cap)
        .masked_fill(&mask.logical_not(), f64::NEG_INFINITY)
        .softmax(-1, kind);
    Ok(weights.to_kind(q.kind()).f_matmul(&shared(v))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    fn wave(size: &[i64], step: f64) -> Tensor {
        let n = size.iter().product::<i64>();
        (Tensor::arange(n, (Kind::Double, Device::Cpu)) * step)
            .sin()
            .view(size)
            .set_requires_grad(true)
    }

    fn group(prompt: Range<i64>, completions: &[Range<i64>]) -> AttentionGroup {
        AttentionGroup {
            prompt,
            completions: completions.to_vec(),
        }
    }

    fn layout() -> AttentionLayout {
        AttentionLayout::new(vec![
            group(0..3, &[3..5, 5..5, 5..9]),
            group(9..9, &[9..10, 10..12]),
            group(12..13, &[]),
        ])
        .unwrap()
    }

    /// What other devices run is right too.
    #[test]
    fn the_composition_agrees_with_the_reference() {
        let (q, k, v) = (
            wave(&[13, 4, 6], 0.7),
            wave(&[13, 2, 6], 0.3),
            wave(&[13, 2, 6], 1.1),
        );
        let run = |f: &dyn Fn() -> Tensor| {
            let out = f();
            let grads = Tensor::run_backward(
                &[(&out * &out).sum(Kind::Double)],
                &[&q, &k, &v],
                false,
                false,
            );
            std::iter::once(out.detach())
                .chain(grads)
                .collect::<Vec<_>>()
        };
        for (softcap, window) in [
            (None, None),
            (Some(0.7), None),
            (None, Some(2)),
            (Some(0.7), Some(4)),
        ] {
            let options = AttentionOptions {
                scale: 0.4,
                softcap,
                window,
            };
            let plain = run(&|| {
                reference::shared_prefix_attention(&q, &k, &v, &layout(), &options).unwrap()
            });
            let mut ways = vec![run(&|| {
                by_completion(&q, &k, &v, &layout(), &options).unwrap()
            })];
            // What merges the flash kernel's two results, over its definition.
            if softcap.is_none() && window.is_none() {
                ways.push(run(&|| {
                    let flat = layout().flat;
                    ffi::prefix_attention_by_parts([&q, &k, &v], &flat, 0.4, false).unwrap()
                }));
            }
            for ours in ways {
                for (a, b) in ours.iter().zip(&plain) {
                    assert!((a - b).abs().max().double_value(&[]) < 1e-12);
                }
            }
        }
    }

    #[test]
    fn layouts_with_gaps_are_refused() {
        let e = AttentionLayout::new(vec![group(0..2, &[3..4, 4..5])]).unwrap_err();
        assert_eq!(
            e.to_string(),
            "attention layout: rows 3..4 come after row 2, expected them to begin there"
        );
    }
}
