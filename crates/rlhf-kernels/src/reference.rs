//! The plain version of each operation: the oracle of the tests, and what runs where no special code
//! exists.

use tch::{Kind, Tensor};

use crate::attention::AttentionLayout;
use crate::error::Result;
use crate::kl::{Divergence, KlOptions, Logits, Tail, TopLogprobs};
use crate::linear_logprobs::{Head, LogprobOptions, Logprobs, Moments, Top1};

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
