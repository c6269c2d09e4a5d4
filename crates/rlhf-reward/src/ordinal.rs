//! Ordered labels: Likert scales of a completion, of a pair, and pairs with ties.
//!
//! Invariant: thresholds never decrease, so every label has a probability of 0 or more and they sum to 1.
//! What is labelled is a number s: a score (how good, 1 to 5) or a difference of two scores (much worse …
//! much better). A pair with the labels worse, tie, better and thresholds −η, η is the model of Rao and
//! Kupper 1967 with θ = exp η: P(better) = σ(d − η).

use rlhf_kernels::LossSum;
use tch::{Kind, Tensor};

use crate::checks::{self, at_least_f32, weighted};
use crate::error::{Result, ensure};

const OP: &str = "ordinal";

/// L = −Σ w log [σ(θ_y − s) − σ(θ_{y−1} − s)], θ_{−1} = −∞, θ_{C−1} = ∞; its weight is Σ w.
///
/// The cumulative logit (proportional odds) model, McCullagh 1980; for pairs with ties Rao and Kupper
/// 1967.
///
/// # Shapes
/// `location` `[S]` s; `labels` i64 `[S]` y in 0..C, worst first; `thresholds` `[C−1]` θ, which may be
/// learned ([`thresholds`], [`symmetric_thresholds`]); `weights` `[S]`, 1 where absent.
///
/// # Errors
/// When shapes differ, a label is outside its scale (with its row), the thresholds do not increase, or a
/// weight is negative or not finite.
///
/// # Deviations
/// None. A difference of sigmoids is taken in logarithms: far from its threshold a label costs its
/// distance, not infinity.
pub fn loss(
    location: &Tensor,
    labels: &Tensor,
    thresholds: &Tensor,
    weights: Option<&Tensor>,
) -> Result<LossSum> {
    checks::vectors(OP, &[("location", Some(location)), ("weights", weights)])?;
    checks::vectors(OP, &[("thresholds", Some(thresholds))])?;
    let last = thresholds.size()[0];
    ensure(last > 0, OP, || {
        "no thresholds: one label has no loss".into()
    })?;
    let gaps = thresholds.narrow(0, 1, last - 1) - thresholds.narrow(0, 0, last - 1);
    ensure(gaps.gt(0.0).all().int64_value(&[]) != 0, OP, || {
        "the thresholds do not increase".into()
    })?;
    checks::classes(OP, labels, location.size()[0], last + 1)?;
    checks::weights(OP, weights)?;
    let s = at_least_f32(location);
    let thresholds = thresholds.to_kind(s.kind());
    let at = |index: Tensor| thresholds.index_select(0, &index);
    let (above, below) = (
        at(labels.clamp_max(last - 1)),
        at((labels - 1).clamp_min(0)),
    );
    // σ(a) − σ(b) = σ(a) σ(−b) (1 − e^{b−a}); at an end of the scale one factor is all there is.
    let (top, bottom) = (labels.eq(last), labels.eq(0));
    let inside = top.logical_or(&bottom).logical_not();
    let zero = Tensor::zeros([1], (s.kind(), s.device()));
    let upper = (&above - &s)
        .log_sigmoid()
        .where_self(&top.logical_not(), &zero);
    let lower = (&s - &below)
        .log_sigmoid()
        .where_self(&bottom.logical_not(), &zero);
    let gap = (above - below).where_self(&inside, &(&zero + 1.0));
    let width = (-(-gap).expm1()).log().where_self(&inside, &zero);
    Ok(weighted(&-(upper + lower + width), weights))
}

/// θ_0 = raw_0, θ_k = θ_{k−1} + softplus(raw_k): thresholds that increase whatever a step does to `raw`.
///
/// # Shapes
/// `raw` `[C−1]` → `[C−1]`.
///
/// # Errors
/// When `raw` is no vector of at least one number.
pub fn thresholds(raw: &Tensor) -> Result<Tensor> {
    checks::vectors(OP, &[("raw", Some(raw))])?;
    let n = raw.size()[0];
    ensure(n > 0, OP, || "no thresholds".into())?;
    let steps = raw.narrow(0, 1, n - 1).softplus();
    Ok(Tensor::cat(&[raw.narrow(0, 0, 1), steps], 0).cumsum(0, None::<Kind>))
}

/// −θ_n … −θ_1, θ_1 … θ_n with θ_k = Σ_{j≤k} softplus(raw_j): the thresholds of a pair's scale with a
/// middle (a tie), which says the same of (a, b) and of (b, a).
///
/// # Shapes
/// `raw` `[n]` → `[2n]`, for C = 2n + 1 labels.
///
/// # Errors
/// When `raw` is no vector of at least one number.
pub fn symmetric_thresholds(raw: &Tensor) -> Result<Tensor> {
    checks::vectors(OP, &[("raw", Some(raw))])?;
    ensure(raw.size()[0] > 0, OP, || "no thresholds".into())?;
    let right = raw.softplus().cumsum(0, None::<Kind>);
    Ok(Tensor::cat(&[-right.flip([0]), right], 0))
}

/// The probability of each label, without gradients.
///
/// # Shapes
/// `location` `[S]`, `thresholds` `[C−1]` → `[S, C]`.
///
/// # Errors
/// When shapes do not fit.
pub fn probabilities(location: &Tensor, thresholds: &Tensor) -> Result<Tensor> {
    let _guard = tch::no_grad_guard();
    checks::vectors(OP, &[("location", Some(location))])?;
    checks::vectors(OP, &[("thresholds", Some(thresholds))])?;
    let s = at_least_f32(location).unsqueeze(1);
    let below = (thresholds.to_kind(s.kind()).unsqueeze(0) - s).sigmoid();
    let edge = |x: f64| Tensor::full([below.size()[0], 1], x, (below.kind(), below.device()));
    Ok(Tensor::cat(&[&below, &edge(1.0)], 1) - Tensor::cat(&[&edge(0.0), &below], 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        let theta = Tensor::from_slice(&[-1.0, 2.0]);
        let s = Tensor::from_slice(&[0.5, 0.5, 0.5]);
        let labels = Tensor::from_slice(&[0i64, 1, 2]);
        // σ(-1.5), σ(1.5) - σ(-1.5), 1 - σ(1.5).
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        let expected: [f64; 3] = [sigma(-1.5), sigma(1.5) - sigma(-1.5), 1.0 - sigma(1.5)];
        let out = loss(&s, &labels, &theta, None).unwrap();
        let by_hand: f64 = expected.iter().map(|p| -p.ln()).sum();
        assert!((out.sum.double_value(&[]) - by_hand).abs() < 1e-14);
        assert_eq!(out.weight, 3.0);
        let p = Vec::<f64>::try_from(&probabilities(&s, &theta).unwrap().get(0)).unwrap();
        for (p, e) in p.iter().zip(expected) {
            assert!((p - e).abs() < 1e-15);
        }
        // Far away it stays finite: about 1000 − 2, not −log 0.
        let far = Tensor::from_slice(&[1000.0]);
        let out = loss(&far, &Tensor::from_slice(&[1i64]), &theta, None).unwrap();
        assert!((out.sum.double_value(&[]) - (998.0 - (1.0 - (-3.0f64).exp()).ln())).abs() < 1e-9);
    }

    #[test]
    fn learned_thresholds_increase() {
        let raw = Tensor::from_slice(&[3.0, -20.0, 0.0]);
        let theta = Vec::<f64>::try_from(&thresholds(&raw).unwrap()).unwrap();
        assert!(theta[0] == 3.0 && theta[0] < theta[1] && theta[1] < theta[2]);
        let even = Vec::<f64>::try_from(&symmetric_thresholds(&raw).unwrap()).unwrap();
        assert_eq!(even.len(), 6);
        for (a, b) in even.iter().zip(even.iter().rev()) {
            assert_eq!(*a, -*b);
        }
    }

    #[test]
    fn a_label_outside_its_scale_is_named() {
        let s = Tensor::from_slice(&[0.0, 0.0]);
        let theta = Tensor::from_slice(&[-1.0, 1.0]);
        let message = loss(&s, &Tensor::from_slice(&[1i64, 3]), &theta, None).unwrap_err();
        assert!(message.to_string().contains("labels[1] is 3"), "{message}");
        let back = Tensor::from_slice(&[1.0, -1.0]);
        let message = loss(&s, &Tensor::from_slice(&[1i64, 1]), &back, None).unwrap_err();
        assert!(message.to_string().contains("increase"), "{message}");
    }
}
