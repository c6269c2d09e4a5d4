//! Log-probabilities of given ids, and entropies, without ever making the `[M, V]` logits whole.

use tch::{Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi;

/// The last layer of a language model: logits = hidden · weightᵀ + bias.
#[derive(Clone, Copy, Debug)]
pub struct Head<'a> {
    /// `[V, H]`.
    pub weight: &'a Tensor,
    /// `[V]`.
    pub bias: Option<&'a Tensor>,
}

impl<'a> From<&'a Tensor> for Head<'a> {
    /// A weight without a bias.
    fn from(weight: &'a Tensor) -> Self {
        Self { weight, bias: None }
    }
}

/// Settings of [`linear_logprobs`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LogprobOptions {
    /// Logits are divided by it.
    pub temperature: f64,
    /// Logits are squashed as c·tanh(x/c) before the temperature.
    pub softcap: Option<f64>,
    /// Also give the entropy of each row.
    pub entropy: bool,
    /// Also give log Σ exp of each row.
    pub log_sum_exp: bool,
    /// Also give c·(log Σ exp)² of each row: the z-loss of PaLM (Chowdhery et al. 2022, section 5; there
    /// c = 1e-4), which keeps the softmax's denominator near 1.
    pub z_loss: Option<f64>,
    /// Also give c times the mean over the vocabulary of the squared logits, after soft cap and temperature: a
    /// pull towards 0 that the z-loss, which is blind to a row's spread, does not give. Not with a filter.
    pub logit_penalty: Option<f64>,
    /// Also give whether the id is the most likely one, and the most likely one's log-probability.
    pub top1: bool,
    /// Also give log Σ p² and the mean logit.
    pub moments: bool,
    /// Leave words out of a chunk's gradients to which none of its rows gives this probability: see
    /// [`F32_RESOLUTION`] and [`linear_logprobs`]. Values are exact all the same.
    pub filter: Option<f64>,
    /// Bytes of logits held at once. By default 4 MiB on the CPU, where they are a tile of rows and words
    /// that stays in the cache, and 256 MiB on other devices, of whole rows. Given, no more than that is held.
    pub chunk_bytes: Option<i64>,
    /// Rows computed at once, whatever they take.
    pub chunk_rows: Option<i64>,
}

impl Default for LogprobOptions {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            softcap: None,
            entropy: false,
            log_sum_exp: false,
            z_loss: None,
            logit_penalty: None,
            top1: false,
            moments: false,
            filter: None,
            chunk_bytes: None,
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
    /// `[M]` log Σ exp of the logits after soft cap and temperature, where it was asked for.
    pub log_sum_exp: Option<Tensor>,
    /// `[M]` c·(log Σ exp)², where a coefficient c was given: to be added to the loss.
    pub z_loss: Option<Tensor>,
    /// `[M]` c · mean z², where a coefficient c was given: to be added to the loss.
    pub logit_penalty: Option<Tensor>,
    /// The most likely ids, where they were asked for.
    pub top1: Option<Top1>,
    /// Two more sums over the vocabulary, where they were asked for.
    pub moments: Option<Moments>,
}

/// How the ids compare with the most likely ones; no gradients.
#[derive(Debug)]
pub struct Top1 {
    /// `[M]` boolean: whether the id is the first of the largest logits.
    pub agrees: Tensor,
    /// `[M]` the largest log-probability.
    pub logprobs: Tensor,
}

/// Sums over the vocabulary that describe a row; no gradients.
#[derive(Debug)]
pub struct Moments {
    /// `[M]` log Σ p²: minus the collision entropy.
    pub log_sum_sq_probs: Tensor,
    /// `[M]` the mean of the logits after soft cap and temperature.
    pub mean_logits: Tensor,
}

/// 2⁻²⁴: half a unit in the last place of a probability near 1 in f32; what a `filter` takes for nothing.
pub const F32_RESOLUTION: f64 = 1.0 / (1 << 24) as f64;

/// The type that sums are made in.
fn wide(t: &Tensor) -> Kind {
    match t.kind() {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}

/// Bytes of whole rows of logits held at once by default: on the CPU as many as the kept buffer holds, for a product
/// packs the weight anew for every chunk; on a GPU a 32nd of its memory, for each chunk adds to the whole weight's
/// gradient.
fn default_chunk_bytes(hidden: &Tensor) -> i64 {
    if hidden.device() == tch::Device::Cpu {
        64 << 20
    } else {
        ffi::gpu_memory(hidden).map_or(256 << 20, |all| all / 32)
    }
}

/// Rows of `vocabulary` logits whose work fits the budget, `copies` of them held at once.
pub(crate) fn rows_of_budget(
    hidden: &Tensor,
    vocabulary: i64,
    copies: i64,
    chunk_bytes: Option<i64>,
) -> i64 {
    let double = hidden.kind() == Kind::Double;
    // The special code works in place; plain composition holds about three more of the same size.
    let plain = match (double, hidden.device()) {
        (true, _) => 4,
        (_, tch::Device::Cpu) => 1,
        // The logits, and beside them their gradient in another type.
        _ => 2,
    };
    let row = (vocabulary * copies * plain * if double { 8 } else { 4 }).max(1);
    (chunk_bytes.unwrap_or_else(|| default_chunk_bytes(hidden)) / row).max(1)
}

/// Bytes of a tile of logits by default: what two cores' caches hold beside what the product reads.
const TILE_BYTES: i64 = 4 << 20;

/// Logits on the CPU that backward need not compute again where nobody says how much is held at once: no more than a
/// small language model's head.
const KEPT_BYTES: i64 = 96 << 20;

/// Rows and words of a tile of logits on the CPU. A product is fast with a few hundred words; more rows mean
/// that the weight is read less often.
fn tile(m: i64, v: i64, hidden: &Tensor, options: &LogprobOptions) -> (i64, i64) {
    const WORDS: i64 = 512;
    let size = if hidden.kind() == Kind::Double { 8 } else { 4 };
    let numbers = (options.chunk_bytes.unwrap_or(TILE_BYTES) / size).max(1);
    let rows = options
        .chunk_rows
        .unwrap_or((numbers / WORDS.min(v)).max(1))
        .min(m.max(1));
    let most = (numbers / rows).clamp(1, v);
    // Blocks of one length, of whole vectors.
    let blocks = (v + most - 1) / most;
    let words = (v + blocks - 1) / blocks;
    let words = if words < 16 {
        words
    } else {
        (words + 15) / 16 * 16
    };
    (rows, words.min(v))
}

/// log softmax(cap(hidden · weightᵀ + bias) / T) at `ids`, and what else the options ask for.
///
/// Forward and backward hold one chunk of logits in f32 (f64 for f64), in a buffer that is kept; backward
/// computes it again. On the CPU logits of at most 96 MiB in all are kept instead where neither `chunk_bytes`
/// nor `chunk_rows` is given and no filter is: a quarter of the arithmetic. With a frozen head forward prepares the gradient of `hidden` instead, and backward
/// recomputes nothing (but for an entropy that is part of the loss). A logit of −∞ contributes 0 to the
/// entropy. The z-loss needs no second tensor as wide as the vocabulary: d lse/dz is the softmax, which
/// that of the log-probability holds already.
///
/// With a `filter` ε, backward works on the words that some row of the chunk gives a probability of ε or more
/// (Wijmans et al. 2024, arXiv 2411.09009, section 4.3): of a trained model few. What is left out of the
/// gradient of g·log p with respect to a row's hidden state is at most |g|·ε/T · Σ |W_v| over the words left
/// out; of the weight's row of such a word, ε/T · Σ |g_i·h_i| over rows. A chosen id is never left out.
///
/// # Shapes
/// `hidden` `[M, H]`, the head's weight `[V, H]` and bias `[V]` of the same type, `ids` i64 `[M]`.
/// Differentiable in all but `ids`.
///
/// # Errors
/// When shapes or types do not fit, an id lies outside `0..V` (checked on the CPU), the temperature is
/// not positive, or libtorch fails. A second derivative is not supported.
pub fn linear_logprobs<'a>(
    hidden: &Tensor,
    head: impl Into<Head<'a>>,
    ids: &Tensor,
    options: &LogprobOptions,
) -> Result<Logprobs> {
    const OP: &str = "linear_logprobs";
    let head = head.into();
    let (m, v) = check_linear(OP, hidden, head)?;
    check_ids(OP, ids, (m, hidden.device()), v)?;
    check_temperature(OP, options.temperature)?;
    check_softcap(OP, options.softcap)?;
    for (name, value) in [
        ("chunk_rows", options.chunk_rows),
        ("chunk_bytes", options.chunk_bytes),
    ] {
        ensure(value.is_none_or(|n| n > 0), OP, || {
            format!("{name} is {value:?}, expected at least 1")
        })?;
    }
    ensure(
        options.filter.is_none_or(|p| p > 0.0 && p < 1.0),
        OP,
        || {
            format!(
                "filter is {:?}, expected a probability between 0 and 1",
                options.filter
            )
        },
    )?;
    for (name, value) in [
        ("z_loss", options.z_loss),
        ("logit_penalty", options.logit_penalty),
    ] {
        ensure(value.is_none_or(f64::is_finite), OP, || {
            format!("{name} is {value:?}, expected a number")
        })?;
    }
    ensure(
        options.filter.is_none() || options.logit_penalty.is_none(),
        OP,
        || "a filter leaves out words that a logit_penalty is about: give one of them".into(),
    )?;
    let (chunk_rows, chunk_words) = if hidden.device() == tch::Device::Cpu {
        tile(m, v, hidden, options)
    } else {
        let rows = || rows_of_budget(hidden, v, 1, options.chunk_bytes);
        (options.chunk_rows.unwrap_or_else(rows), 0)
    };
    let chunked = options.chunk_rows.is_some() || options.chunk_bytes.is_some();
    let raw = ffi::RawLogprobOptions {
        temperature: options.temperature,
        softcap: options.softcap.unwrap_or(0.0),
        filter: options.filter.unwrap_or(0.0),
        penalty: options.logit_penalty.unwrap_or(0.0),
        chunk_rows,
        chunk_words,
        keep: if chunked { 0 } else { KEPT_BYTES },
        entropy: options.entropy.into(),
        log_sum_exp: (options.log_sum_exp || options.z_loss.is_some()).into(),
        top1: options.top1.into(),
        moments: options.moments.into(),
    };
    let penalized = options.logit_penalty;
    let [logprobs, entropy, lse, penalty, agrees, top, squares, mean] =
        ffi::linear_logprobs(hidden, head.weight, head.bias, ids, &raw)?;
    Ok(Logprobs {
        logprobs: logprobs.unwrap_or_else(Tensor::new),
        entropy,
        z_loss: options
            .z_loss
            .and_then(|c| lse.as_ref().map(|lse| lse.square() * c)),
        // A coefficient of 0 makes nothing.
        logit_penalty: penalty.or_else(|| {
            let options = (wide(hidden), hidden.device());
            penalized.map(|_| Tensor::zeros([m], options))
        }),
        log_sum_exp: lse.filter(|_| options.log_sum_exp),
        top1: agrees
            .zip(top)
            .map(|(agrees, logprobs)| Top1 { agrees, logprobs }),
        moments: squares
            .zip(mean)
            .map(|(log_sum_sq_probs, mean_logits)| Moments {
                log_sum_sq_probs,
                mean_logits,
            }),
    })
}

/// Checks a product of hidden states and a head; gives (M, V).
pub(crate) fn check_linear(
    op: &'static str,
    hidden: &Tensor,
    head: Head<'_>,
) -> Result<(i64, i64)> {
    let weight = head.weight;
    let (hs, ws) = (hidden.size(), weight.size());
    ensure(hs.len() == 2 && ws.len() == 2 && hs[1] == ws[1], op, || {
        format!("hidden is {hs:?} and weight {ws:?}, expected [M, H] and [V, H]")
    })?;
    ensure(hidden.kind() == weight.kind(), op, || {
        format!(
            "hidden is {:?} and weight {:?}, expected one type",
            hidden.kind(),
            weight.kind()
        )
    })?;
    check_float(op, "hidden", hidden)?;
    ensure(hidden.device() == weight.device(), op, || {
        format!(
            "hidden is on {:?} and weight on {:?}",
            hidden.device(),
            weight.device()
        )
    })?;
    ensure(ws[0] > 0, op, || "the vocabulary is empty".into())?;
    if let Some(bias) = head.bias {
        ensure(
            bias.size() == [ws[0]]
                && bias.kind() == weight.kind()
                && bias.device() == weight.device(),
            op,
            || {
                format!(
                    "the bias is {:?} {:?} on {:?}, expected {:?} [{}] on {:?}",
                    bias.kind(),
                    bias.size(),
                    bias.device(),
                    weight.kind(),
                    ws[0],
                    weight.device()
                )
            },
        )?;
    }
    Ok((hs[0], ws[0]))
}

pub(crate) fn check_temperature(op: &'static str, temperature: f64) -> Result<()> {
    ensure(temperature > 0.0 && temperature.is_finite(), op, || {
        format!("temperature is {temperature}, expected a positive number")
    })
}

pub(crate) fn check_softcap(op: &'static str, softcap: Option<f64>) -> Result<()> {
    ensure(softcap.is_none_or(|c| c > 0.0 && c.is_finite()), op, || {
        format!("the soft cap is {softcap:?}, expected a positive number")
    })
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
    check_ids(OP, ids, (size[0], logits.device()), size[1])?;
    ffi::logit_logprobs(OP, logits, Some(ids), false)
}

/// [`token_logprobs`] whose backward writes the gradient over the logits, so that no second tensor of their size
/// is made (where they are f32 or f64 and contiguous).
///
/// # Errors
/// As [`token_logprobs`], and when the logits are a leaf that wants a gradient: they would be destroyed, and
/// nobody could compute them again. Where another operation of the graph needs the logits in its backward,
/// libtorch refuses that backward.
pub fn token_logprobs_in_place(logits: &Tensor, ids: &Tensor) -> Result<Tensor> {
    const OP: &str = "token_logprobs_in_place";
    let size = check_logits(OP, logits)?;
    check_ids(OP, ids, (size[0], logits.device()), size[1])?;
    ensure(!(logits.is_leaf() && logits.requires_grad()), OP, || {
        "the logits are a leaf, expected the result of an operation".into()
    })?;
    ffi::logit_logprobs(OP, logits, Some(ids), true)
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
    ffi::logit_logprobs(OP, logits, None, false)
}

pub(crate) fn check_logits(op: &'static str, logits: &Tensor) -> Result<Vec<i64>> {
    let size = logits.size();
    ensure(size.len() == 2 && size[1] > 0, op, || {
        format!("logits are {size:?}, expected [M, V]")
    })?;
    check_float(op, "logits", logits)?;
    Ok(size)
}

pub(crate) fn check_float(op: &'static str, name: &str, t: &Tensor) -> Result<()> {
    ensure(
        matches!(
            t.kind(),
            Kind::Float | Kind::Double | Kind::BFloat16 | Kind::Half
        ),
        op,
        || format!("{name} is {:?}, expected a floating-point type", t.kind()),
    )
}

/// `m` ids in 0..v on a device.
pub(crate) fn check_ids(
    op: &'static str,
    ids: &Tensor,
    (m, device): (i64, tch::Device),
    v: i64,
) -> Result<()> {
    ensure(ids.device() == device, op, || {
        format!("ids are on {:?}, expected {device:?}", ids.device())
    })?;
    ensure(ids.size() == [m] && ids.kind() == Kind::Int64, op, || {
        format!(
            "ids are {:?} {:?}, expected Int64 [{m}]",
            ids.kind(),
            ids.size()
        )
    })?;
    if m > 0 && device == tch::Device::Cpu {
        let (low, high) = (ids.min().int64_value(&[]), ids.max().int64_value(&[]));
        ensure(low >= 0 && high < v, op, || {
            format!("ids run from {low} to {high}, expected 0..{v}")
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::reference;

    fn wave(size: &[i64], step: f64) -> Tensor {
        let n = size.iter().product::<i64>();
        (Tensor::arange(n, (Kind::Double, tch::Device::Cpu)) * step)
            .sin()
            .view(size)
            .set_requires_grad(true)
    }

    /// What other devices run, whole rows at a time, is right too: in f64 it is the same composition.
    #[test]
    fn whole_rows_agree_with_the_reference() {
        let (m, h, v) = (7, 4, 33);
        let (hidden, weight, bias) = (
            wave(&[m, h], 0.7),
            wave(&[v, h], 1.3) * 2.0,
            wave(&[v], 0.9),
        );
        let weight = weight.detach().set_requires_grad(true);
        let ids = (Tensor::arange(m, (Kind::Int64, tch::Device::Cpu)) * 5).remainder(v);
        for (softcap, frozen, chunk_rows) in
            [(None, false, 3), (Some(1.5), false, 2), (None, true, 7)]
        {
            let fixed = |t: &Tensor| {
                if frozen {
                    t.detach()
                } else {
                    t.shallow_clone()
                }
            };
            let (w, b) = (fixed(&weight), fixed(&bias));
            let raw = ffi::RawLogprobOptions {
                temperature: 0.8,
                softcap: softcap.unwrap_or(0.0),
                filter: 0.0,
                penalty: 0.4,
                chunk_rows,
                chunk_words: 0,
                keep: 0,
                entropy: 1,
                log_sum_exp: 1,
                top1: 1,
                moments: 1,
            };
            let ours = ffi::linear_logprobs(&hidden, &w, Some(&b), &ids, &raw)
                .unwrap()
                .map(Option::unwrap);
            let options = LogprobOptions {
                temperature: 0.8,
                softcap,
                entropy: true,
                log_sum_exp: true,
                logit_penalty: Some(0.4),
                top1: true,
                moments: true,
                ..Default::default()
            };
            let head = Head {
                weight: &w,
                bias: Some(&b),
            };
            let plain = reference::linear_logprobs(&hidden, head, &ids, &options).unwrap();
            let (top1, moments) = (plain.top1.unwrap(), plain.moments.unwrap());
            let plain = [
                plain.logprobs,
                plain.entropy.unwrap(),
                plain.log_sum_exp.unwrap(),
                plain.logit_penalty.unwrap(),
                top1.agrees,
                top1.logprobs,
                moments.log_sum_sq_probs,
                moments.mean_logits,
            ];
            let leaves: Vec<&Tensor> = if frozen {
                vec![&hidden]
            } else {
                vec![&hidden, &weight, &bias]
            };
            // Each differentiable result alone, so that every shortcut is taken.
            for which in 0..4 {
                let gradients = |all: &[Tensor; 8]| {
                    let loss = (all[which].square() + &all[which]).sum(Kind::Double);
                    Tensor::run_backward(&[loss], &leaves, true, false)
                };
                for (a, b) in gradients(&ours).iter().zip(&gradients(&plain)) {
                    let error = (a - b).abs().max().double_value(&[]);
                    assert!(error < 1e-11, "{which} {softcap:?} {frozen}: {error:.1e}");
                }
            }
            for (a, b) in ours.iter().zip(&plain) {
                let error = (a.to_kind(Kind::Double) - b.to_kind(Kind::Double))
                    .abs()
                    .max();
                assert!(error.double_value(&[]) < 1e-11);
            }
        }
    }
}
