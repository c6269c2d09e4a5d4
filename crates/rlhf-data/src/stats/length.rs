//! How much of the preference length alone explains.

use serde::Serialize;

/// The ridge, so that the curvature is never zero.
const RIDGE: f64 = 1e-6;
/// The fit stops here: beyond, the data say no more than "always the longer".
const MAX_WEIGHT: f64 = 50.0;

/// A Bradley–Terry model (Bradley and Terry 1952) with the logarithm of the length as its one feature:
/// P(chosen ≻ rejected) = σ(w·(log len_chosen − log len_rejected)).
///
/// A pair is one observation, the difference chosen − rejected with the label 1; without an intercept
/// the mirrored observation (rejected − chosen with the label 0) adds the same likelihood, so that
/// nothing depends on which side a pair is written. w maximises Σ log σ(w·xᵢ) − ½·10⁻⁶·w² by Newton's
/// method. w = 0: length says nothing; w = 1: twice as long is chosen two to one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LengthModel {
    /// Pairs.
    pub n: u64,
    /// w.
    pub weight: f64,
    /// Its standard error, 1/√(curvature); nothing where the data do not bound w.
    pub standard_error: Option<f64>,
    /// McFadden's 1 − LL/LL₀ with LL₀ = n·ln ½ (McFadden 1974, "Conditional logit analysis of
    /// qualitative choice behavior"): 0 says nothing, 1 everything.
    pub pseudo_r2: f64,
    /// Share of pairs that "the longer one" (or, with w < 0, "the shorter one") gets right, ties half.
    pub accuracy: f64,
    /// Whether one side is the longer in every pair, or nearly so: w has no bound and stands at ±50.
    pub separated: bool,
}

/// log(1 + eˣ) without overflow.
fn softplus(x: f64) -> f64 {
    x.max(0.0) + (-x.abs()).exp().ln_1p()
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        x.exp() / (1.0 + x.exp())
    }
}

impl LengthModel {
    /// Fits the model to differences of log lengths, each with how often it occurs; `None` without any.
    /// Differences that are not finite are left out.
    #[must_use]
    pub fn fit(differences: &[(f64, u64)]) -> Option<Self> {
        let pairs: Vec<(f64, f64)> = differences
            .iter()
            .filter(|(x, n)| x.is_finite() && *n > 0)
            .map(|(x, n)| (*x, *n as f64))
            .collect();
        let n: f64 = pairs.iter().map(|(_, n)| n).sum();
        if n == 0.0 {
            return None;
        }
        let loss = |w: f64| -> f64 {
            let data: f64 = pairs.iter().map(|(x, n)| n * softplus(-w * x)).sum();
            data + 0.5 * RIDGE * w * w
        };
        // The negative gradient and the curvature of the loss.
        let slope = |w: f64| -> (f64, f64) {
            pairs.iter().fold((-RIDGE * w, RIDGE), |(g, h), (x, n)| {
                let p = sigmoid(-w * x);
                (g + n * x * p, h + n * x * x * p * (1.0 - p))
            })
        };
        let share = |test: fn(f64) -> bool| -> f64 {
            let of = pairs.iter().filter(|(x, _)| test(*x));
            of.map(|(_, n)| n).sum()
        };
        let (longer, shorter) = (share(|x| x > 0.0), share(|x| x < 0.0));
        let one_side = (longer == 0.0) != (shorter == 0.0);
        let mut w: f64 = 0.0;
        if one_side {
            w = if longer > 0.0 {
                MAX_WEIGHT
            } else {
                -MAX_WEIGHT
            };
        } else {
            let mut at = loss(w);
            for _ in 0..200 {
                let (g, h) = slope(w);
                let mut step = g / h;
                let mut next = (w + step).clamp(-MAX_WEIGHT, MAX_WEIGHT);
                // A step that does not help is halved: the loss is convex.
                while loss(next) > at && step.abs() > 1e-15 {
                    step /= 2.0;
                    next = (w + step).clamp(-MAX_WEIGHT, MAX_WEIGHT);
                }
                let moved = (next - w).abs();
                (w, at) = (next, loss(next));
                if moved <= 1e-12 * w.abs().max(1.0) {
                    break;
                }
            }
        }
        let separated = w.abs() >= MAX_WEIGHT;
        let bounded = !separated && longer > 0.0;
        let fit: f64 = pairs.iter().map(|(x, n)| n * softplus(-w * x)).sum();
        let right = if w >= 0.0 { longer } else { shorter };
        Some(Self {
            n: n as u64,
            weight: w,
            standard_error: bounded.then(|| 1.0 / slope(w).1.sqrt()),
            pseudo_r2: (1.0 - fit / (n * std::f64::consts::LN_2)).clamp(0.0, 1.0),
            accuracy: (right + 0.5 * (n - longer - shorter)) / n,
            separated,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fit_solves_the_score_equation() {
        // 3 pairs of +1 and 1 of −1: σ(w) = 3/4, so that w = ln 3; curvature 4·3/16, error √(4/3).
        let m = LengthModel::fit(&[(1.0, 3), (-1.0, 1)]).unwrap();
        assert!((m.weight - 3f64.ln()).abs() < 1e-5, "{m:?}");
        assert!((m.standard_error.unwrap() - (4.0f64 / 3.0).sqrt()).abs() < 1e-4);
        let ll = 3.0 * 0.75f64.ln() + 0.25f64.ln();
        assert!((m.pseudo_r2 - (1.0 - ll / (4.0 * 0.5f64.ln()))).abs() < 1e-9);
        assert_eq!((m.n, m.accuracy, m.separated), (4, 0.75, false));
        // Mirrored data has the mirrored weight and the same accuracy.
        let r = LengthModel::fit(&[(-1.0, 3), (1.0, 1)]).unwrap();
        assert!((r.weight + m.weight).abs() < 1e-9 && r.accuracy == 0.75);
        // Bisection of Σ xᵢ·σ(−w·xᵢ) = 0 on uneven data.
        let data: Vec<(f64, u64)> = (0..200u32)
            .map(|i| {
                let x = f64::from(i % 17) / 5.0 - 1.2;
                (if i % 3 == 0 { -x } else { x }, u64::from(i % 4))
            })
            .collect();
        let score = |w: f64| -> f64 {
            data.iter()
                .map(|(x, n)| *n as f64 * x / (1.0 + (w * x).exp()))
                .sum()
        };
        let (mut low, mut high) = (-30.0, 30.0);
        for _ in 0..200 {
            let middle = f64::midpoint(low, high);
            if score(middle) > 0.0 {
                low = middle
            } else {
                high = middle
            }
        }
        let m = LengthModel::fit(&data).unwrap();
        assert!((m.weight - low).abs() < 1e-6, "{} {low}", m.weight);
    }

    #[test]
    fn separation_ties_and_nothing() {
        let m = LengthModel::fit(&[(1.0, 5), (0.0, 1)]).unwrap();
        assert!(m.separated && m.weight == 50.0 && m.standard_error.is_none());
        assert!((m.accuracy - 5.5 / 6.0).abs() < 1e-12 && m.pseudo_r2 > 0.8);
        let m = LengthModel::fit(&[(-1e-3, 5)]).unwrap();
        assert!(m.separated && m.weight == -50.0 && m.accuracy == 1.0);
        // Tiny differences cannot push the weight beyond its bound.
        let m = LengthModel::fit(&[(1e-9, 99), (-1e-9, 1)]).unwrap();
        assert!(m.weight.is_finite() && m.weight.abs() <= 50.0, "{m:?}");
        // Huge differences on the wrong side neither.
        let m = LengthModel::fit(&[(1e9, 1), (-1e9, 1), (1.0, 1)]).unwrap();
        assert!(m.weight.abs() < 1e-6 && m.pseudo_r2 >= 0.0, "{m:?}");
        let m = LengthModel::fit(&[(0.0, 4)]).unwrap();
        assert_eq!(
            (
                m.weight,
                m.standard_error,
                m.pseudo_r2,
                m.accuracy,
                m.separated
            ),
            (0.0, None, 0.0, 0.5, false)
        );
        assert!(LengthModel::fit(&[]).is_none());
        assert!(LengthModel::fit(&[(f64::NAN, 3), (1.0, 0)]).is_none());
    }
}
