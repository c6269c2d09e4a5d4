//! The plain version of each operation: the oracle of the tests, and what runs where no special code
//! exists.

use tch::{Device, Kind, Tensor};

use crate::attention::{AttentionLayout, AttentionOptions};
use crate::error::Result;
use crate::kl::{Divergence, KlOptions, Logits, Tail, TopLogprobs};
use crate::linear_logprobs::{Head, LogprobOptions, Logprobs, Moments, Top1};
use crate::ragged::{LossSum, Ragged};
use crate::scan::Direction;
use crate::surrogate::{
    Advantages, SurrogateInputs, SurrogateOptions, SurrogateOutput, SurrogateStats, TokenWeight,
};

/// The type that sums are made in.
fn accumulation(x: &Tensor) -> Kind {
    if x.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

/// [`crate::linear_logprobs`] with all logits at once.
///
/// # Errors
/// When libtorch fails.
pub fn linear_logprobs<'a>(
    hidden: &Tensor,
    head: impl Into<Head<'a>>,
    ids: &Tensor,
    options: &LogprobOptions,
) -> Result<Logprobs> {
    let logits = linear_logits(hidden, head.into(), options.softcap)? / options.temperature;
    let entropy = if options.entropy {
        Some(entropy(&logits)?)
    } else {
        None
    };
    let lse = logits.f_logsumexp(&[1i64][..], false)?;
    let logp = logits.detach().f_log_softmax(1, None::<Kind>)?;
    let top1 = if options.top1 {
        Some(Top1 {
            agrees: logits.argmax(1, false).eq_tensor(ids),
            logprobs: logp.amax(&[1i64][..], false),
        })
    } else {
        None
    };
    Ok(Logprobs {
        logprobs: token_logprobs(&logits, ids)?,
        entropy,
        z_loss: options.z_loss.map(|c| lse.square() * c),
        logit_penalty: options
            .logit_penalty
            .map(|c| logits.square().mean_dim(&[1i64][..], false, None::<Kind>) * c),
        top1,
        moments: options.moments.then(|| Moments {
            log_sum_sq_probs: (&logp * 2.0).logsumexp(&[1i64][..], false),
            mean_logits: logits.detach().mean_dim(&[1i64][..], false, None::<Kind>),
        }),
        log_sum_exp: options.log_sum_exp.then_some(lse),
    })
}

/// cap(hidden · weightᵀ + bias) in f32 or f64.
pub(crate) fn linear_logits(
    hidden: &Tensor,
    head: Head<'_>,
    softcap: Option<f64>,
) -> Result<Tensor> {
    let kind = accumulation(hidden);
    let mut logits = hidden
        .to_kind(kind)
        .f_matmul(&head.weight.to_kind(kind).tr())?;
    if let Some(bias) = head.bias {
        logits = logits.f_add(&bias.to_kind(kind))?;
    }
    Ok(match softcap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    })
}

/// [`crate::token_logprobs`] by log-softmax and gather.
///
/// # Errors
/// When libtorch fails.
pub fn token_logprobs(logits: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let kind = accumulation(logits);
    Ok(logits
        .f_log_softmax(1, kind)?
        .f_gather(1, &ids.unsqueeze(1), false)?
        .squeeze_dim(1))
}

/// [`crate::entropy`] by −Σ p log p, where log 0 stands at −1e30.
///
/// # Errors
/// When libtorch fails.
pub fn entropy(logits: &Tensor) -> Result<Tensor> {
    let kind = accumulation(logits);
    let logp = logits.f_log_softmax(1, kind)?;
    Ok(-(logp.exp() * logp.clamp_min(-1e30)).sum_dim_intlist(&[1i64][..], false, None::<Kind>))
}

/// [`crate::linear_kl`] with all logits at once.
///
/// # Errors
/// When libtorch fails.
pub fn linear_kl(student: Logits<'_>, teacher: Logits<'_>, options: &KlOptions) -> Result<Tensor> {
    let log_probs = |side: Logits<'_>| -> Result<Tensor> {
        let logits = linear_logits(side.hidden, side.head, side.softcap)? / options.temperature;
        Ok(logits.f_log_softmax(1, None::<Kind>)?)
    };
    Ok(divergence(
        &log_probs(student)?,
        &log_probs(teacher)?.detach(),
        options.divergence,
    ))
}

/// [`crate::linear_kl_top`] with all logits at once.
///
/// # Errors
/// When libtorch fails.
pub fn linear_kl_top(
    student: Logits<'_>,
    teacher: &TopLogprobs,
    tail: Tail,
    options: &KlOptions,
) -> Result<Tensor> {
    let logits =
        linear_logits(student.hidden, student.head, student.softcap)? / options.temperature;
    let all = logits.f_log_softmax(1, None::<Kind>)?;
    let known = all.f_gather(1, &teacher.ids, false)?;
    let logprobs = teacher.logprobs.detach().to_kind(known.kind());
    let bucket = tail == Tail::Bucket && teacher.ids.size()[1] < logits.size()[1];
    Ok(if bucket {
        let others = all
            .f_scatter_value(1, &teacher.ids, f64::NEG_INFINITY)?
            .f_logsumexp(&[1i64][..], true)?;
        let mass =
            logprobs
                .to_kind(Kind::Double)
                .exp()
                .sum_dim_intlist(&[1i64][..], true, None::<Kind>);
        let rest = (-mass + 1.0).clamp_min(0.0);
        let rest = rest.log().to_kind(known.kind());
        divergence(
            &Tensor::cat(&[known, others], 1),
            &Tensor::cat(&[logprobs, rest], 1),
            options.divergence,
        )
    } else {
        divergence(
            &known.log_softmax(1, None::<Kind>),
            &logprobs.log_softmax(1, None::<Kind>),
            options.divergence,
        )
    })
}

/// A divergence of rows of log-probabilities, where 0 · log 0 = 0.
fn divergence(log_s: &Tensor, log_t: &Tensor, which: Divergence) -> Tensor {
    let kl = |log_p: &Tensor, log_q: &Tensor| {
        let p = log_p.exp();
        let gap = (log_p - log_q).masked_fill(&p.eq(0.0), 0.0);
        (p * gap).sum_dim_intlist(&[1i64][..], false, None::<Kind>)
    };
    match which {
        Divergence::Forward => kl(log_t, log_s),
        Divergence::Reverse => kl(log_s, log_t),
        Divergence::JensenShannon { beta } => {
            let log_m = (log_t.exp() * beta + log_s.exp() * (1.0 - beta)).log();
            kl(log_t, &log_m) * beta + kl(log_s, &log_m) * (1.0 - beta)
        }
    }
}

/// [`crate::shared_prefix_attention`] completion by completion, by plain matrix products.
///
/// # Errors
/// When libtorch fails.
pub fn shared_prefix_attention(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    layout: &AttentionLayout,
    options: &AttentionOptions,
) -> Result<Tensor> {
    let repeats = q.size()[1] / k.size()[1];
    let (k, v) = (
        k.repeat_interleave_self_int(repeats, 1, None),
        v.repeat_interleave_self_int(repeats, 1, None),
    );
    let slice = |t: &Tensor, r: &std::ops::Range<i64>| {
        t.narrow(0, r.start, r.end - r.start).transpose(0, 1)
    };
    let mut parts = Vec::new();
    for g in layout.groups() {
        let prompt = (slice(&k, &g.prompt), slice(&v, &g.prompt));
        for (rows, sees_prompt) in
            std::iter::once((&g.prompt, false)).chain(g.completions.iter().map(|c| (c, true)))
        {
            if rows.is_empty() {
                continue;
            }
            let (own_k, own_v) = (slice(&k, rows), slice(&v, rows));
            let (keys, values) = if sees_prompt {
                (
                    Tensor::cat(&[&prompt.0, &own_k], 1),
                    Tensor::cat(&[&prompt.1, &own_v], 1),
                )
            } else {
                (own_k, own_v)
            };
            let (lq, lk) = (rows.end - rows.start, keys.size()[1]);
            // Row i stands at position lk − lq + i.
            let at = |n: i64, from: i64| Tensor::arange(n, (Kind::Int64, q.device())) + from;
            let distance = at(lq, lk - lq).unsqueeze(1) - at(lk, 0).unsqueeze(0);
            let hidden = distance
                .lt(0)
                .logical_or(&distance.ge(options.window.unwrap_or(i64::MAX)));
            let mut scores = slice(q, rows).f_matmul(&keys.transpose(1, 2))? * options.scale;
            if let Some(cap) = options.softcap {
                scores = (scores / cap).tanh() * cap;
            }
            let weights = scores
                .masked_fill(&hidden, f64::NEG_INFINITY)
                .softmax(-1, None::<Kind>);
            parts.push(weights.f_matmul(&values)?.transpose(0, 1));
        }
    }
    Ok(if parts.is_empty() {
        q.zeros_like()
    } else {
        Tensor::cat(&parts, 0)
    })
}

/// [`Ragged::sum`] by adding each value at its sequence's place.
pub fn segment_sum(x: &Ragged) -> Tensor {
    let values = x.values();
    let zeros = Tensor::zeros(
        [x.offsets().num_segments()],
        (values.kind(), values.device()),
    );
    zeros.index_add(0, &x.offsets().segment_ids(values.device()), values)
}

/// [`Ragged::broadcast`] by picking each token's sequence.
pub fn segment_broadcast(x: &Ragged, per_segment: &Tensor) -> Tensor {
    per_segment.index_select(0, &x.offsets().segment_ids(per_segment.device()))
}

/// [`crate::scan`] one token after another.
///
/// # Errors
/// When libtorch fails.
pub fn scan(x: &Ragged, decay: f64, direction: Direction) -> Result<Ragged> {
    let mut rows = x.values().f_unbind(0)?;
    for w in x.offsets().host().windows(2) {
        let (begin, end) = (w[0] as usize, w[1] as usize);
        for i in 1..end - begin {
            let (to, from) = match direction {
                Direction::Forward => (begin + i, begin + i - 1),
                Direction::Backward => (end - 1 - i, end - i),
            };
            rows[to] = &rows[to] + &rows[from] * decay;
        }
    }
    if rows.is_empty() {
        return Ok(x.clone());
    }
    x.with_values(Tensor::f_stack(&rows, 0)?)
}

/// [`crate::gae`] over padded columns, one after another, as Python trainers write it.
///
/// # Errors
/// When libtorch fails.
pub fn gae(rewards: &Ragged, values: &Ragged, gamma: f64, lambda: f64) -> Result<Ragged> {
    let (r, v) = (rewards.to_padded(0.0), values.to_padded(0.0));
    let longest = r.size()[1];
    let mut next = Tensor::new();
    let mut columns = Vec::new();
    for t in (0..longest).rev() {
        let after = if t + 1 < longest {
            v.f_select(1, t + 1)?
        } else {
            v.f_select(1, t)?.f_zeros_like()?
        };
        let delta = r.f_select(1, t)? + after * gamma - v.f_select(1, t)?;
        next = if columns.is_empty() {
            delta
        } else {
            delta + next * (gamma * lambda)
        };
        columns.push(next.shallow_clone());
    }
    columns.reverse();
    if columns.is_empty() {
        return Ok(rewards.clone());
    }
    let lengths = rewards.offsets().lengths(r.device()).unsqueeze(1);
    let mask = Tensor::arange(longest, (Kind::Int64, r.device()))
        .unsqueeze(0)
        .lt_tensor(&lengths);
    rewards.with_values(Tensor::f_stack(&columns, 1)?.f_masked_select(&mask)?)
}

/// [`crate::surrogate()`] by tch's operators, gradient included.
///
/// # Errors
/// When shapes do not fit.
pub fn surrogate(
    inputs: &SurrogateInputs<'_>,
    options: &SurrogateOptions,
) -> Result<SurrogateOutput> {
    let x = inputs.logprobs;
    let kind = accumulation(x.values());
    let constant = |t: &Tensor| t.detach().to_kind(kind);
    let logprobs = x.values().to_kind(kind);
    let log_ratio = logprobs.f_sub(&constant(inputs.old_logprobs))?;
    let ratio = log_ratio.exp();
    let advantages = match inputs.advantages {
        Advantages::Token(a) => constant(a),
        Advantages::Completion(a) => x.broadcast(&constant(a)),
    };
    let (low, high) = (1.0 - options.epsilon_low, 1.0 + options.epsilon_high);
    let bounded = match options.dual {
        Some(most) => ratio.clamp_max(most),
        None => ratio.shallow_clone(),
    };
    let mut losses = -(bounded * &advantages).minimum(&(ratio.clamp(low, high) * &advantages));
    if let Some(weights) = inputs.weights {
        losses = losses.f_mul(&constant(weights))?;
    }
    let mut kl_sum = Tensor::zeros([], (Kind::Double, ratio.device()));
    if let Some(term) = inputs.kl {
        let k = term
            .value
            .straight_through(term.gradient, &logprobs, term.ref_logprobs)?
            .to_kind(kind);
        kl_sum = k.detach().sum(Kind::Double);
        let k = if term.weighted { k * &ratio } else { k };
        losses = losses.f_add(&(k * term.coef))?;
    }
    let losses = x.with_values(losses)?;
    let sum = match options.token_weight {
        TokenWeight::One => losses.values().sum(kind),
        TokenWeight::SequenceMean => losses.mean().sum(kind),
    };
    let tokens = x.offsets().num_values() as f64;
    let (r, l) = (ratio.detach(), log_ratio.detach());
    let count = |mask: Tensor| mask.sum(Kind::Double);
    let stats = [
        count(r.lt(low).logical_and(&advantages.lt(0.0))),
        count(r.gt(high).logical_and(&advantages.gt(0.0))),
        r.sum(Kind::Double),
        if tokens > 0.0 {
            r.max().to_kind(Kind::Double)
        } else {
            kl_sum.zeros_like()
        },
        l.square().sum(Kind::Double) * 0.5,
        kl_sum,
    ];
    let host = Vec::<f64>::try_from(Tensor::f_stack(&stats, 0)?)?;
    Ok(SurrogateOutput {
        loss: LossSum {
            sum,
            weight: crate::surrogate::weight(inputs, options),
        },
        stats: SurrogateStats {
            tokens,
            clipped_low: host[0],
            clipped_high: host[1],
            ratio_sum: host[2],
            ratio_max: host[3],
            approx_kl_sum: host[4],
            kl_sum: host[5],
        },
    })
}

/// One AdamW step on plain tensors; gives (parameter, first moment, second moment).
pub fn adamw(
    parameter: &Tensor,
    grad: &Tensor,
    (first, second): (&Tensor, &Tensor),
    step: i32,
    lr: f64,
    c: &crate::optim::AdamWConfig,
) -> (Tensor, Tensor, Tensor) {
    let m = first * c.beta1 + grad * (1.0 - c.beta1);
    let v = second * c.beta2 + grad * grad * (1.0 - c.beta2);
    let m_hat = &m / (1.0 - c.beta1.powi(step));
    let v_hat = &v / (1.0 - c.beta2.powi(step));
    let decayed = parameter * (1.0 - lr * c.weight_decay);
    (decayed - m_hat / (v_hat.sqrt() + c.eps) * lr, m, v)
}

/// The values that 8-bit codes stand for, of first moments and of second (Dettmers et al. 2022, section
/// 2.1): seven decades below 1 with 1, 2, … 64 magnitudes of either sign (2, 4, … 128 where there is no
/// sign), 0 and 1.
pub fn dynamic_maps() -> (Tensor, Tensor) {
    let map = |signed: bool| {
        let mut values = vec![0.0f64, 1.0];
        for i in 0..7 {
            let items = if signed { 1 << i } else { 2 << i };
            for j in 0..items {
                let middle = 0.1 + 0.9 * (f64::from(j) + 0.5) / f64::from(items);
                let value = 10f64.powi(i - 6) * middle;
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f64::total_cmp);
        Tensor::from_slice(&values).to_kind(Kind::Float)
    };
    (map(true), map(false))
}

const LOW: i64 = 0xffff_ffff;

/// lowbias32 of each number of 32 bits, in the lower half of 64.
fn hash(x: &Tensor) -> Tensor {
    let x = x.bitwise_xor_tensor(&x.bitwise_right_shift_tensor_scalar(16));
    let x = (x * 0x7feb_352di64).bitwise_and(LOW);
    let x = x.bitwise_xor_tensor(&x.bitwise_right_shift_tensor_scalar(15));
    let x = (x * 0x846c_a68bi64).bitwise_and(LOW);
    x.bitwise_xor_tensor(&x.bitwise_right_shift_tensor_scalar(16))
}

/// The hash of the first `n` places with a salt.
fn noise(n: i64, salt: &Tensor) -> Tensor {
    let places = Tensor::arange(n, (Kind::Int64, salt.device()));
    hash(&(places + salt).bitwise_and(LOW))
}

/// Numbers in 0..1 for [`quantize`], of first moments and of second: a hash of step and place.
pub fn quantizing_noise(n: i64, step: i64, device: Device) -> (Tensor, Tensor) {
    let noise = noise(n, &hash(&Tensor::from_slice(&[step])).to_device(device));
    let unit = |x: Tensor| x.to_kind(Kind::Float) / 65536.0;
    (
        unit(noise.bitwise_right_shift_tensor_scalar(16)),
        unit(noise.bitwise_and(0xffff)),
    )
}

/// f32 numbers as bf16: each one of its two neighbours, with chances by nearness drawn from a hash of place
/// and `salt`. What is not finite stays.
pub fn round_to_bf16(x: &Tensor, salt: u32) -> Tensor {
    let chance = noise(
        x.numel() as i64,
        &Tensor::from_slice(&[i64::from(salt)]).to_device(x.device()),
    );
    let bits = x
        .contiguous()
        .view_dtype(Kind::Int)
        .to_kind(Kind::Int64)
        .bitwise_and(LOW);
    let moved = &bits + chance.bitwise_and(0xffff).view_as(x);
    let upper = moved.bitwise_right_shift_tensor_scalar(16);
    let signed = upper.where_self(&upper.lt(32768), &(&upper - 65536));
    let rounded = signed.to_kind(Kind::Int16).view_dtype(Kind::BFloat16);
    rounded.where_self(&x.isfinite(), &x.to_kind(Kind::BFloat16))
}

/// Codes of `x`, of its size, and each block's largest magnitude: one of the two values of `map` beside each
/// number, the greater in magnitude where it is nearer than `chance` (of as many numbers in 0..1). What is
/// above 0 is never 0 where the map has no sign.
pub fn quantize(x: &Tensor, map: &Tensor, chance: &Tensor) -> (Tensor, Tensor) {
    let map = map.to_device(x.device());
    let positive = map.double_value(&[0]) == 0.0;
    let zero = if positive { 0 } else { 127 };
    let magnitudes = map.narrow(0, zero, 256 - zero);
    let n = x.numel() as i64;
    let blocks = (n + 255) / 256;
    let rest = x.new_zeros([blocks * 256 - n], (x.kind(), x.device()));
    let padded = Tensor::cat(&[x.flatten(0, -1), rest], 0).view([blocks, 256]);
    let tops = padded.abs().amax(&[1i64][..], false);
    let unit = &padded / tops.clamp_min(f64::from(f32::MIN_POSITIVE)).unsqueeze(1);
    let unit = unit.view([-1]).narrow(0, 0, n);
    let size = unit.abs();
    let top = 255 - zero;
    let below = (size.bucketize(&magnitudes, false, true) - 1).clamp(0, top);
    let above = (&below + 1).clamp_max(top);
    let (low, high) = (
        magnitudes.index_select(0, &below),
        magnitudes.index_select(0, &above),
    );
    let nearness = (&size - &low) / (high - &low).clamp_min(f64::from(f32::MIN_POSITIVE));
    let mut place = below + nearness.gt_tensor(chance).to_kind(Kind::Int64);
    place = place.clamp_max(top);
    let codes = if positive {
        place.maximum(&unit.gt(0.0).to_kind(Kind::Int64))
    } else {
        // −1 is no value of the map.
        let negative = -place.clamp_max(127) + 127;
        negative.where_self(&unit.lt(0.0), &(place + 127))
    };
    (codes.to_kind(Kind::Uint8).view_as(x), tops)
}

/// What [`quantize`] kept of its argument.
pub fn dequantize(codes: &Tensor, tops: &Tensor, map: &Tensor) -> Tensor {
    let n = codes.numel() as i64;
    let values = map
        .to_device(codes.device())
        .index_select(0, &codes.flatten(0, -1).to_kind(Kind::Int64));
    let scales = tops
        .unsqueeze(1)
        .expand([tops.size()[0], 256], true)
        .flatten(0, -1)
        .narrow(0, 0, n);
    (values * scales).view_as(codes)
}

/// x + more (x where there is none) and its RMS norm, as libtorch's operations.
pub fn add_norm(x: &Tensor, more: Option<&Tensor>, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    let x = more.map_or_else(|| x.shallow_clone(), |more| x + more);
    let y = x.rms_norm(weight.size()[0], Some(weight), eps);
    (x, y)
}

/// silu(gate)·up.
pub fn silu_mul(gate: &Tensor, up: &Tensor) -> Tensor {
    gate.silu() * up
}

/// (silu(gate)·up)·Wᵀ.
pub fn silu_mul_linear(gate: &Tensor, up: &Tensor, weight: &Tensor) -> Tensor {
    silu_mul(gate, up).matmul(&weight.tr())
}

/// The x of [`add_norm`] and y·Wᵀ for each W.
pub fn norm_linears(
    x: &Tensor,
    more: Option<&Tensor>,
    norm: &Tensor,
    eps: f64,
    weights: &[&Tensor],
) -> (Tensor, Vec<Tensor>) {
    let (x, y) = add_norm(x, more, norm, eps);
    (x, weights.iter().map(|w| y.matmul(&w.tr())).collect())
}

/// x·cos + roll(x, D'/2)·sin on the first D' dimensions.
pub fn rotate(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Tensor {
    let (d, turning) = (x.size()[2], cos.size()[2]);
    let turn = |x: &Tensor| (x * cos).addcmul(&x.roll(turning / 2, -1), sin);
    if d == turning {
        return turn(x);
    }
    let still = x.narrow(2, turning, d - turning);
    Tensor::cat(&[turn(&x.narrow(2, 0, turning)), still], 2)
}
