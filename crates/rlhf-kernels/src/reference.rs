//! The plain version of each operation: the oracle of the tests, and what runs where no special code
//! exists.

use tch::{Kind, Tensor};

use crate::attention::AttentionLayout;
use crate::error::Result;
use crate::linear_logprobs::{LogprobOptions, Logprobs};

/// [`crate::linear_logprobs`] with all logits at once.
///
/// # Errors
/// When libtorch fails.
pub fn linear_logprobs(
    hidden: &Tensor,
    weight: &Tensor,
    ids: &Tensor,
    options: &LogprobOptions,
) -> Result<Logprobs> {
    let kind = if hidden.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    };
    let mut logits = hidden.to_kind(kind).f_matmul(&weight.to_kind(kind).tr())?;
    if let Some(cap) = options.softcap {
        logits = (logits / cap).tanh() * cap;
    }
    let logits = logits / options.temperature;
    let entropy = if options.entropy {
        Some(entropy(&logits)?)
    } else {
        None
    };
    Ok(Logprobs {
        logprobs: token_logprobs(&logits, ids)?,
        entropy,
    })
}

/// [`crate::token_logprobs`] by log-softmax and gather.
///
/// # Errors
/// When libtorch fails.
pub fn token_logprobs(logits: &Tensor, ids: &Tensor) -> Result<Tensor> {
    let kind = if logits.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    };
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
    let kind = if logits.kind() == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    };
    let logp = logits.f_log_softmax(1, kind)?;
    Ok(-(logp.exp() * logp.clamp_min(-1e30)).sum_dim_intlist(&[1i64][..], false, None::<Kind>))
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
    scale: f64,
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
            let hidden = Tensor::ones([lq, lk], (Kind::Bool, q.device())).triu(lk - lq + 1);
            let scores = slice(q, rows).f_matmul(&keys.transpose(1, 2))? * scale;
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
