//! From logits to a token: filters in the order of `transformers`, and a draw from a given uniform.
//!
//! Pure functions of tensors; they know neither models nor seeds. Removed tokens have logit −inf.
//! All of them work on `[B, V]` in f32 or f64 and row by row: a row's result does not depend on the
//! other rows.

use rlhf_kernels::decode::{self, decodes};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};

/// Which tokens may be drawn, and how sharply. The default changes nothing.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Filters {
    /// Divides the logits; positive.
    pub temperature: f64,
    /// Keeps the k largest logits (and those equal to the k-th).
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens that together reach this probability; at least one.
    pub top_p: Option<f64>,
    /// Keeps tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f64>,
}

impl Default for Filters {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
        }
    }
}

impl Filters {
    /// Checks the ranges.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the value: a temperature that is not positive and finite, a
    /// `top_k` of 0, a `top_p` outside (0, 1], a `min_p` outside [0, 1].
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Argument(what));
        if !(self.temperature > 0.0 && self.temperature.is_finite()) {
            return bad(format!("temperature {} is not positive", self.temperature));
        }
        if self.top_k == Some(0) {
            return bad("top_k 0 would remove every token".into());
        }
        if let Some(p) = self.top_p.filter(|p| !(*p > 0.0 && *p <= 1.0)) {
            return bad(format!("top_p {p} is not in (0, 1]"));
        }
        if let Some(p) = self.min_p.filter(|p| !(0.0..=1.0).contains(p)) {
            return bad(format!("min_p {p} is not in [0, 1]"));
        }
        Ok(())
    }

    /// Applies temperature, top-k, top-p and min-p, in this order, to logits `[B, V]`.
    pub fn apply(&self, logits: &Tensor) -> Tensor {
        let mut scores = if self.temperature == 1.0 {
            logits.shallow_clone()
        } else {
            logits / self.temperature
        };
        if let Some(k) = self.top_k {
            scores = top_k(&scores, k);
        }
        if let Some(p) = self.top_p.filter(|&p| p < 1.0) {
            scores = top_p(&scores, p);
        }
        if let Some(p) = self.min_p.filter(|&p| p > 0.0) {
            scores = min_p(&scores, p);
        }
        scores
    }
}

/// Removes logits below the k-th largest of their row. A `k` beyond V keeps all.
pub fn top_k(logits: &Tensor, k: usize) -> Tensor {
    let vocab = logits.size()[1];
    let k = i64::try_from(k).unwrap_or(vocab).min(vocab);
    if k == vocab {
        return logits.shallow_clone();
    }
    let (largest, _) = logits.topk(k, -1, true, true);
    let threshold = largest.narrow(1, k - 1, 1);
    logits.masked_fill(&logits.lt_tensor(&threshold), f64::NEG_INFINITY)
}

/// Removes the least likely tokens whose probabilities together stay at or below 1 − p.
pub fn top_p(logits: &Tensor, p: f64) -> Tensor {
    let (ascending, order) = logits.sort_stable(true, -1, false);
    let cumulative = ascending.softmax(-1, None::<Kind>).cumsum(-1, None::<Kind>);
    let remove = cumulative.le(1.0 - p);
    let last = remove.size()[1] - 1;
    // The likeliest token always stays.
    let _ = remove.narrow(1, last, 1).fill_(0);
    let remove = remove.scatter(1, &order, &remove);
    logits.masked_fill(&remove, f64::NEG_INFINITY)
}

/// Removes tokens less than `p` times as likely as the row's likeliest, which always stays.
pub fn min_p(logits: &Tensor, p: f64) -> Tensor {
    let probs = logits.softmax(-1, None::<Kind>);
    let threshold = probs.amax(-1, true) * p;
    let remove = probs.lt_tensor(&threshold);
    logits.masked_fill(&remove, f64::NEG_INFINITY)
}

/// A token for every row.
#[derive(Debug)]
pub struct Drawn {
    /// Token ids, i64 `[B]`.
    pub ids: Tensor,
    /// Their log-probabilities under the distribution drawn from, `[B]`; NaN where a logit was NaN
    /// or +inf.
    pub logprobs: Tensor,
    /// The sum of each row's scores, `[B]`, where the draw had it for nothing.
    pub sums: Option<Tensor>,
}

/// Ids whose probabilities are summed together before the exact place is looked for.
const BLOCK: i64 = 64;
/// Rounding may put a drawn point on the total; so far below it the point certainly lies inside.
const INSIDE: f64 = 1.0 - 1e-12;

/// Draws from softmax(`scores`) by inversion: the first token, in order of ids, at which the
/// cumulative probability exceeds the row's uniform. Cumulative sums run over blocks of ids first
/// and then within one block, which costs a fraction of a sum over the whole vocabulary. On the CPU in
/// f32 a kernel does the same without writing a probability.
///
/// # Shapes
/// `scores` `[B, V]`, `uniforms` `[B]` in (0, 1).
///
/// # Errors
/// When there is not a uniform a row.
pub fn draw(scores: &Tensor, uniforms: &[f64]) -> Result<Drawn> {
    if decodes(scores) && scores.stride()[1] == 1 {
        let drawn = decode::draw(scores, uniforms)?;
        return Ok(Drawn {
            ids: Tensor::f_from_slice(&drawn.ids)?,
            logprobs: Tensor::f_from_slice(&drawn.logprobs)?,
            sums: Some(Tensor::f_from_slice(&drawn.sums)?),
        });
    }
    let uniforms = Tensor::f_from_slice(uniforms)?.f_to_device(scores.device())?;
    let probs = scores.softmax(-1, None::<Kind>);
    let (rows, vocab) = (probs.size()[0], probs.size()[1]);
    let whole = vocab / BLOCK * BLOCK;
    let mut sums = Vec::new();
    if whole > 0 {
        let blocks = probs.narrow(1, 0, whole).view([rows, whole / BLOCK, BLOCK]);
        sums.push(blocks.sum_dim_intlist(-1, false, None::<Kind>));
    }
    if whole < vocab {
        let rest = probs.narrow(1, whole, vocab - whole);
        sums.push(rest.sum_dim_intlist(-1, true, None::<Kind>));
    }
    let (block, point) = invert(&Tensor::cat(&sums, 1), &uniforms.unsqueeze(1));
    let within = block * BLOCK + Tensor::arange(BLOCK, (Kind::Int64, probs.device()));
    let outside = within.ge(vocab);
    let cells = probs
        .gather(1, &within.clamp_max(vocab - 1), false)
        .masked_fill(&outside, 0.0);
    let (cell, _) = invert(&cells, &point);
    // The clamp matters only for a row of NaN, which falls out of every block.
    let ids = within.gather(1, &cell, false).clamp_max(vocab - 1);
    let logprobs = probs.gather(1, &ids, false).log().squeeze_dim(1);
    Ok(Drawn {
        ids: ids.squeeze_dim(1),
        logprobs,
        sums: None,
    })
}

/// Where a point falls among `masses` `[B, n]`: the index i64 `[B, 1]` of the first at which the
/// cumulative mass exceeds `fraction` f64 `[B, 1]` of the total, and the fraction of that mass itself
/// that lies before the point, f64 `[B, 1]`.
fn invert(masses: &Tensor, fraction: &Tensor) -> (Tensor, Tensor) {
    let last = masses.size()[1] - 1;
    let cumulative = masses.cumsum(-1, Kind::Double);
    let point = fraction.clamp_max(INSIDE) * cumulative.narrow(1, last, 1);
    // Beyond the last only where a mass is NaN, which the caller sees in the log-probability.
    let index = point
        .searchsorted(&cumulative, false, true, "right", None::<Tensor>)
        .clamp_max(last);
    let mass = masses.gather(1, &index, false).to_kind(Kind::Double);
    let before = cumulative.gather(1, &index, false) - &mass;
    (index, ((point - before) / mass).clamp(0.0, INSIDE))
}

/// The likeliest token of every row, the first of equals. Its log-probability is that of the
/// distribution drawn from, which is certain: 0.
#[must_use]
pub fn greedy(scores: &Tensor) -> Drawn {
    let ids = scores.argmax(-1, false);
    let logprobs = Tensor::zeros([scores.size()[0]], (scores.kind(), scores.device()));
    Drawn {
        ids,
        logprobs,
        sums: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn logits(p: &[f64]) -> Tensor {
        Tensor::from_slice(p).log().unsqueeze(0)
    }

    fn kept(t: &Tensor) -> Vec<bool> {
        Vec::try_from(t.isfinite().view(-1)).unwrap()
    }

    #[test]
    fn filters_keep_what_they_say() {
        let l = logits(&[0.5, 0.3, 0.15, 0.05]);
        assert_eq!(kept(&top_k(&l, 2)), [true, true, false, false]);
        // Ascending sums: .05 .2 .5 1; those at or below 1 − .75 = .25 go.
        assert_eq!(kept(&top_p(&l, 0.75)), [true, true, false, false]);
        assert_eq!(kept(&top_p(&l, 1e-9)), [true, false, false, false]);
        // .4 of .5 is .2.
        assert_eq!(kept(&min_p(&l, 0.4)), [true, true, false, false]);
        // Equals of the k-th stay.
        assert_eq!(
            kept(&top_k(&logits(&[0.4, 0.3, 0.3]), 2)),
            [true, true, true]
        );
    }

    #[test]
    fn the_draw_inverts_the_cumulative_distribution() {
        // Cumulative: .5 .5 .8 1 (token 1 is removed).
        let l = logits(&[0.5, 0.0, 0.3, 0.2]).repeat([5, 1]);
        let u = [1e-12, 0.4999, 0.5001, 0.81, 1.0 - f64::EPSILON / 2.0];
        for (kind, near) in [(Kind::Double, 1e-12), (Kind::Float, 1e-7)] {
            let out = draw(&l.to_kind(kind), &u).unwrap();
            assert_eq!(Vec::<i64>::try_from(&out.ids).unwrap(), [0, 0, 2, 3, 3]);
            let p = out.logprobs.to_kind(Kind::Double).exp();
            let p: Vec<f64> = Vec::try_from(p).unwrap();
            for (a, b) in p.iter().zip([0.5, 0.5, 0.3, 0.2, 0.2]) {
                assert!((a - b).abs() < near, "{a} {b}");
            }
        }
    }

    #[test]
    fn a_row_of_nan_shows_in_its_logprob_only() {
        for vocab in [3_i64, 64, 100] {
            for kind in [Kind::Float, Kind::Double] {
                let good = Tensor::zeros([1, vocab], (kind, tch::Device::Cpu));
                let bad = good.shallow_clone() + f64::NAN;
                let out = draw(&Tensor::cat(&[&good, &bad], 0), &[0.5, 0.9]).unwrap();
                let ids = Vec::<i64>::try_from(&out.ids).unwrap();
                assert!(ids.iter().all(|id| (0..vocab).contains(id)));
                let finite = Vec::<bool>::try_from(out.logprobs.isfinite()).unwrap();
                assert_eq!(finite, [true, false]);
            }
        }
    }

    #[test]
    fn blocks_change_nothing() {
        // 150 ids are two blocks and a rest; every tenth is impossible. The plain inversion is
        // spelled out on the host.
        let scores: Vec<f64> = (0..150)
            .map(|i| {
                if i % 10 == 3 {
                    f64::NEG_INFINITY
                } else {
                    (f64::from(i) * 0.37).sin() * 3.0
                }
            })
            .collect();
        let p = Tensor::from_slice(&scores).softmax(0, None::<Kind>);
        let p = Vec::<f64>::try_from(p).unwrap();
        let uniforms: Vec<f64> = (0..2000).map(|i| (f64::from(i) + 0.5) / 2000.0).collect();
        let rows = Tensor::from_slice(&scores).unsqueeze(0).repeat([2000, 1]);
        let ids = Vec::<i64>::try_from(draw(&rows, &uniforms).unwrap().ids).unwrap();
        for (u, id) in uniforms.iter().zip(ids) {
            let mut cumulative = 0.0;
            let plain = p.iter().position(|p| {
                cumulative += p;
                cumulative > *u
            });
            assert_eq!(plain, Some(id as usize), "uniform {u}");
        }
    }

    #[test]
    fn out_of_range_filters_are_named() {
        for (f, word) in [
            (
                Filters {
                    temperature: 0.0,
                    ..Filters::default()
                },
                "temperature",
            ),
            (
                Filters {
                    temperature: f64::NAN,
                    ..Filters::default()
                },
                "temperature",
            ),
            (
                Filters {
                    top_k: Some(0),
                    ..Filters::default()
                },
                "top_k",
            ),
            (
                Filters {
                    top_p: Some(0.0),
                    ..Filters::default()
                },
                "top_p",
            ),
            (
                Filters {
                    min_p: Some(1.5),
                    ..Filters::default()
                },
                "min_p",
            ),
        ] {
            assert!(f.validate().unwrap_err().to_string().contains(word));
        }
    }
}
