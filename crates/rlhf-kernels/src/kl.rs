//! How far two policies are apart: estimates from sampled tokens, and exact divergences over the whole
//! vocabulary that never hold a `[M, V]` tensor.
//!
//! # Where an estimate may stand
//! k1 = log π − log π₀ at tokens sampled from π; KL = KL(π‖π₀).
//!
//! | | as a value | in the reward | as a loss (differentiated) |
//! | --- | --- | --- | --- |
//! | k1 | unbiased, may be negative | its policy gradient is ∇KL | expected gradient 0: holds nothing |
//! | k2 = ½ k1² | biased | penalises ½ E k1² | expected gradient ∇KL |
//! | k3 = e^{−k1} − 1 + k1 | unbiased, never negative | adds a term of its own to ∇KL | expected gradient ∇KL(π₀‖π) |
//!
//! So in the reward stands k1, and in a loss k2, or k3's or k1's value with k2's gradient
//! ([`SampledKl::straight_through`]). Where the samples are not the policy's own, the importance ratio
//! belongs around it; this module sees no ratio.
//!
//! Invariant: gradients go to the student only.

use tch::{Kind, Tensor};

use crate::error::{Result, ensure};
use crate::ffi;
use crate::linear_logprobs::{
    Head, check_float, check_ids, check_linear, check_softcap, check_temperature, rows_of_budget,
};

/// An estimate of KL(π‖π₀) from tokens sampled from π (Schulman 2020, "Approximating KL divergence").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SampledKl {
    /// log π − log π₀.
    K1,
    /// ½ (log π − log π₀)².
    K2,
    /// π₀/π − 1 − log(π₀/π).
    K3,
}

impl SampledKl {
    /// The estimate at each token; differentiable in `logprobs`.
    ///
    /// # Shapes
    /// Both arguments of one shape, as the result (f32 or f64).
    ///
    /// # Errors
    /// When shapes differ or an argument is not floating point.
    pub fn estimate(self, logprobs: &Tensor, ref_logprobs: &Tensor) -> Result<Tensor> {
        const OP: &str = "sampled kl";
        ensure(logprobs.size() == ref_logprobs.size(), OP, || {
            format!(
                "log-probs are {:?} and the reference's {:?}, expected one shape",
                logprobs.size(),
                ref_logprobs.size()
            )
        })?;
        check_float(OP, "log-probs", logprobs)?;
        check_float(OP, "the reference's log-probs", ref_logprobs)?;
        let kind = if logprobs.kind() == Kind::Double {
            Kind::Double
        } else {
            Kind::Float
        };
        let k1 = logprobs.to_kind(kind) - ref_logprobs.detach().to_kind(kind);
        Ok(match self {
            Self::K1 => k1,
            Self::K2 => k1.square() * 0.5,
            // expm1: for k1 near 0, e^{−k1} − 1 would lose every digit.
            Self::K3 => (-&k1).expm1() + k1,
        })
    }

    /// The value of `self` with the gradient of `gradient`.
    ///
    /// # Shapes
    /// As [`SampledKl::estimate`].
    ///
    /// # Errors
    /// As [`SampledKl::estimate`].
    pub fn straight_through(
        self,
        gradient: Self,
        logprobs: &Tensor,
        ref_logprobs: &Tensor,
    ) -> Result<Tensor> {
        let value = self.estimate(&logprobs.detach(), ref_logprobs)?;
        let carrier = gradient.estimate(logprobs, ref_logprobs)?;
        Ok(value + &carrier - carrier.detach())
    }

    /// Whether a loss that is differentiated through this estimate descends KL(π‖π₀) in expectation
    /// over the policy's own samples.
    #[must_use]
    pub fn descends_as_loss(self) -> bool {
        self == Self::K2
    }

    /// Whether taking this number from the reward descends KL(π‖π₀), up to its coefficient.
    #[must_use]
    pub fn descends_as_reward(self) -> bool {
        self == Self::K1
    }
}

/// A divergence between a student s, which learns, and a teacher t.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Divergence {
    /// KL(t‖s): the student covers what the teacher does. Word-level distillation.
    Forward,
    /// KL(s‖t): the student avoids what the teacher would not do. With the reference as teacher, the
    /// penalty of RLHF.
    Reverse,
    /// β KL(t‖m) + (1−β) KL(s‖m) with m = βt + (1−β)s: the generalised Jensen-Shannon divergence of GKD
    /// (Agarwal et al. 2024, arXiv 2306.13649, equation 1). β = ½ is Jensen-Shannon's; divided by β it
    /// tends to [`Divergence::Forward`] for β → 0, by 1 − β to [`Divergence::Reverse`] for β → 1.
    JensenShannon {
        /// The teacher's share in the mixture, strictly between 0 and 1.
        beta: f64,
    },
}

impl Divergence {
    /// The shim's code, and β.
    fn code(self) -> (i64, f64) {
        match self {
            Self::Forward => (0, 0.0),
            Self::Reverse => (1, 0.0),
            Self::JensenShannon { beta } => (2, beta),
        }
    }
}

/// Hidden states with the head that makes logits of them.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a> {
    /// `[M, H]`.
    pub hidden: &'a Tensor,
    /// `[V, H]` and perhaps `[V]`.
    pub head: Head<'a>,
    /// Logits are squashed as c·tanh(x/c) before the temperature.
    pub softcap: Option<f64>,
}

impl<'a> Logits<'a> {
    /// Logits without a soft cap.
    pub fn new(hidden: &'a Tensor, head: impl Into<Head<'a>>) -> Self {
        Self {
            hidden,
            head: head.into(),
            softcap: None,
        }
    }
}

/// Settings of [`linear_kl`] and [`linear_kl_top`].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct KlOptions {
    /// Which divergence.
    pub divergence: Divergence,
    /// Both sides' logits are divided by it.
    pub temperature: f64,
    /// Bytes of logits held at once; see [`crate::LogprobOptions::chunk_bytes`].
    pub chunk_bytes: Option<i64>,
    /// Rows computed at once, whatever they take.
    pub chunk_rows: Option<i64>,
}

impl KlOptions {
    /// A divergence at temperature 1 with the usual budget.
    #[must_use]
    pub fn new(divergence: Divergence) -> Self {
        Self {
            divergence,
            temperature: 1.0,
            chunk_bytes: None,
            chunk_rows: None,
        }
    }
}

/// A teacher's likeliest words: all that need be kept of it where data is distilled offline.
#[derive(Debug)]
pub struct TopLogprobs {
    /// i64 `[M, k]`, distinct in each row.
    pub ids: Tensor,
    /// `[M, k]` their log-probabilities over the whole vocabulary.
    pub logprobs: Tensor,
}

/// What becomes of the words that are not among the teacher's k likeliest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tail {
    /// They are one more category. The result is a lower bound of the whole divergence (the data
    /// processing inequality), and the student is held to the teacher's mass outside the k.
    Bucket,
    /// They are left out: both sides are taken given that the word is one of the k. Nothing as wide as
    /// the vocabulary is computed, and nothing holds the student to the k.
    Dropped,
}

/// The divergence of two next-word distributions at each row, exact over the whole vocabulary.
///
/// With u the student's logits over T and s, t the probabilities, the gradients are (Forward) s − t,
/// (Reverse) s·(log s/t − KL(s‖t)), (JensenShannon) (1−β)·s·(log s/m − KL(s‖m)). Memory is two chunks of
/// logits; backward recomputes them, unless the student's head is frozen: then forward has made the
/// gradient. A word of probability 0 on the side that a divergence averages over contributes 0; where that
/// side may produce what the other cannot, the divergence is infinite.
///
/// # Shapes
/// `student` and `teacher` with one M and one V, their H may differ; result `[M]` in f32, or f64 when the
/// student is f64. Differentiable in the student's hidden states, weight and bias.
///
/// # Errors
/// When shapes or types do not fit, a setting is outside its range, or libtorch fails. A second derivative
/// is not supported.
pub fn linear_kl(student: Logits<'_>, teacher: Logits<'_>, options: &KlOptions) -> Result<Tensor> {
    const OP: &str = "linear_kl";
    let (s, t) = (check_side(OP, student)?, check_side(OP, teacher)?);
    ensure(s == t, OP, || {
        format!("the student is {s:?} and the teacher {t:?}, expected one (M, V)")
    })?;
    ensure(
        student.hidden.device() == teacher.hidden.device()
            && (student.hidden.kind() == Kind::Double) == (teacher.hidden.kind() == Kind::Double),
        OP,
        || {
            format!(
                "the student is {:?} on {:?} and the teacher {:?} on {:?}, expected one device, and both or neither f64",
                student.hidden.kind(),
                student.hidden.device(),
                teacher.hidden.kind(),
                teacher.hidden.device()
            )
        },
    )?;
    let raw = check_options(OP, student, s.1, 2, options)?;
    ffi::linear_kl(&raw_side(student), &raw_side(teacher), &raw)
}

/// The divergence to a teacher of whom only the likeliest words are known, such as a cached one.
///
/// # Shapes
/// `student` with M rows, `teacher` `[M, k]`, 1 ≤ k ≤ V; result `[M]` in f32, or f64 when the student is
/// f64. Differentiable in the student's hidden states, weight and bias.
///
/// # Errors
/// As [`linear_kl`]; and when an id lies outside `0..V` (checked on the CPU). That the ids of a row are
/// distinct is not checked.
pub fn linear_kl_top(
    student: Logits<'_>,
    teacher: &TopLogprobs,
    tail: Tail,
    options: &KlOptions,
) -> Result<Tensor> {
    const OP: &str = "linear_kl_top";
    let (m, v) = check_side(OP, student)?;
    let size = teacher.ids.size();
    ensure(
        size.len() == 2
            && size[0] == m
            && (1..=v).contains(&size[1])
            && teacher.logprobs.size() == size
            && teacher.ids.kind() == Kind::Int64,
        OP,
        || {
            format!(
                "ids are {:?} {size:?} and log-probs {:?}, expected Int64 [{m}, k] and the same with 1 to {v} words",
                teacher.ids.kind(),
                teacher.logprobs.size()
            )
        },
    )?;
    check_float(OP, "the teacher's log-probs", &teacher.logprobs)?;
    let device = student.hidden.device();
    ensure(teacher.logprobs.device() == device, OP, || {
        let at = teacher.logprobs.device();
        format!("the teacher's log-probs are on {at:?}, expected {device:?}")
    })?;
    check_ids(OP, &teacher.ids.flatten(0, -1), (m * size[1], device), v)?;
    let wide = match tail {
        Tail::Bucket => v,
        // Rows of the weight are gathered instead: k·H numbers a row.
        Tail::Dropped => size[1] * student.hidden.size()[1],
    };
    let raw = check_options(OP, student, wide, 1, options)?;
    let bucket = tail == Tail::Bucket && size[1] < v;
    ffi::linear_kl_top(
        &raw_side(student),
        &teacher.ids,
        &teacher.logprobs,
        bucket,
        &raw,
    )
}

/// The k likeliest words of each row, likeliest first; no gradients.
///
/// # Shapes
/// `teacher` with M rows and V words; both results `[M, k]`, log-probabilities in f32 or f64.
///
/// # Errors
/// When shapes or types do not fit, k is not in `1..=V`, or a setting is outside its range.
pub fn top_logprobs(
    teacher: Logits<'_>,
    k: i64,
    temperature: f64,
    chunk_bytes: Option<i64>,
) -> Result<TopLogprobs> {
    const OP: &str = "top_logprobs";
    let (_, v) = check_side(OP, teacher)?;
    check_temperature(OP, temperature)?;
    ensure((1..=v).contains(&k), OP, || {
        format!("k is {k}, expected 1 to {v}")
    })?;
    ensure(chunk_bytes.is_none_or(|n| n > 0), OP, || {
        format!("chunk_bytes is {chunk_bytes:?}, expected at least 1")
    })?;
    let rows = rows_of_budget(teacher.hidden, v, 1, chunk_bytes);
    let (ids, logprobs) = ffi::top_logprobs(&raw_side(teacher), k, temperature, rows)?;
    Ok(TopLogprobs { ids, logprobs })
}

fn raw_side(side: Logits<'_>) -> ffi::RawHead<'_> {
    ffi::RawHead::new(
        side.hidden,
        side.head.weight,
        side.head.bias,
        side.softcap.unwrap_or(0.0),
    )
}

fn check_side(op: &'static str, side: Logits<'_>) -> Result<(i64, i64)> {
    check_softcap(op, side.softcap)?;
    check_linear(op, side.hidden, side.head)
}

/// Checks the settings; `width` numbers a row are held `copies` times.
fn check_options(
    op: &'static str,
    student: Logits<'_>,
    width: i64,
    copies: i64,
    options: &KlOptions,
) -> Result<ffi::RawKlOptions> {
    check_temperature(op, options.temperature)?;
    for (name, value) in [
        ("chunk_rows", options.chunk_rows),
        ("chunk_bytes", options.chunk_bytes),
    ] {
        ensure(value.is_none_or(|n| n > 0), op, || {
            format!("{name} is {value:?}, expected at least 1")
        })?;
    }
    let (divergence, beta) = options.divergence.code();
    if let Divergence::JensenShannon { beta } = options.divergence {
        ensure(beta > 0.0 && beta < 1.0, op, || {
            format!(
                "beta is {beta}, expected strictly between 0 and 1 (its limits are Forward and Reverse)"
            )
        })?;
    }
    Ok(ffi::RawKlOptions {
        temperature: options.temperature,
        beta,
        divergence,
        chunk_rows: options
            .chunk_rows
            .unwrap_or_else(|| rows_of_budget(student.hidden, width, copies, options.chunk_bytes)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// p = (.5, .3, .2), q = (.2, .3, .5): KL(p‖q) = .3 ln 2.5 = .27489, and by symmetry the reverse too.
    /// k1 and k3 averaged over p give it; k2 gives ½ (.5 + .2) ln² 2.5 = .29386.
    #[test]
    fn by_enumeration() {
        let (p, q) = ([0.5f64, 0.3, 0.2], [0.2f64, 0.3, 0.5]);
        let logs = |x: [f64; 3]| Tensor::from_slice(&x.map(f64::ln));
        let kl = 0.3 * 2.5f64.ln();
        let expected = |e: SampledKl| {
            (e.estimate(&logs(p), &logs(q)).unwrap() * Tensor::from_slice(&p))
                .sum(Kind::Double)
                .double_value(&[])
        };
        assert!((kl - 0.2749).abs() < 5e-5);
        assert!((expected(SampledKl::K1) - kl).abs() < 1e-15);
        assert!((expected(SampledKl::K3) - kl).abs() < 1e-15);
        assert!((expected(SampledKl::K2) - 0.35 * 2.5f64.ln().powi(2)).abs() < 1e-15);
    }

    /// The expected gradients over the policy's own samples, by enumeration: k1's is 0, k2's is ∇KL(π‖π₀),
    /// k3's is ∇KL(π₀‖π), and a straight-through value changes no gradient.
    #[test]
    fn what_losses_descend() {
        let reference = Tensor::from_slice(&[0.2f64, 0.3, 0.5]).log();
        let gradient = |f: &dyn Fn(&Tensor) -> Tensor| {
            let z = Tensor::from_slice(&[0.4f64, -0.3, 0.1]).set_requires_grad(true);
            let logp = z.log_softmax(0, Kind::Double);
            let p = logp.exp().detach();
            let g = Tensor::run_backward(&[(f(&logp) * p).sum(Kind::Double)], &[&z], false, false);
            Vec::<f64>::try_from(&g[0]).unwrap()
        };
        let close = |a: Vec<f64>, b: Vec<f64>| a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-14);
        let loss = |e: SampledKl| gradient(&|logp| e.estimate(logp, &reference).unwrap());
        // As f is averaged with p held, p/sg(p) brings p's own gradient in.
        let kl = gradient(&|logp| (logp - logp.detach()).exp() * (logp - &reference));
        let reverse = gradient(&|logp| -(&reference - logp.detach()).exp() * logp);
        assert!(close(loss(SampledKl::K1), vec![0.0; 3]));
        assert!(close(loss(SampledKl::K2), kl.clone()));
        assert!(close(loss(SampledKl::K3), reverse));
        let straight = gradient(&|logp| {
            let out = SampledKl::K3.straight_through(SampledKl::K2, logp, &reference);
            out.unwrap()
        });
        assert!(close(straight, kl));
    }
}
