//! Logistic regression of a few numbers, by Newton's method in f64.
//!
//! Invariant: the penalised likelihood has one maximum, so the result depends on the data alone. Knows
//! nothing of what the numbers are.

use crate::error::{Result, ensure};

const OP: &str = "logistic";

/// Coefficients w that maximise Σ_i log σ(w·x_i) − ½ λ |w|²: every row is a difference (chosen less
/// rejected) whose right label is 1, so there is no intercept unless a column is it.
///
/// # Errors
/// When rows differ in length, a number is not finite, or λ is not positive (rows that can be parted
/// perfectly have no maximum without it).
pub fn fit(rows: &[Vec<f64>], ridge: f64) -> Result<Vec<f64>> {
    let ones = vec![1.0; rows.len()];
    fit_labelled(rows, &ones, ridge)
}

/// [`fit`] with a label in 0..=1 for each row.
///
/// # Errors
/// As [`fit`]; also when there is not one label for each row.
pub fn fit_labelled(rows: &[Vec<f64>], labels: &[f64], ridge: f64) -> Result<Vec<f64>> {
    let n = rows.first().map_or(0, Vec::len);
    ensure(ridge > 0.0 && ridge.is_finite(), OP, || {
        format!("ridge is {ridge}, expected more than 0")
    })?;
    ensure(labels.len() == rows.len(), OP, || {
        format!("{} labels of {} rows", labels.len(), rows.len())
    })?;
    if let Some(i) = rows
        .iter()
        .position(|r| r.len() != n || r.iter().any(|x| !x.is_finite()))
    {
        ensure(false, OP, || {
            format!("row {i} is {:?}, expected {n} finite numbers", rows[i])
        })?;
    }
    let objective = |w: &[f64]| -> f64 {
        let fit: f64 = rows
            .iter()
            .zip(labels)
            .map(|(x, y)| {
                let z = dot(w, x);
                y * log_sigmoid(z) + (1.0 - y) * log_sigmoid(-z)
            })
            .sum();
        fit - 0.5 * ridge * dot(w, w)
    };
    let mut w = vec![0.0; n];
    let mut at = objective(&w);
    for _ in 0..100 {
        let mut gradient: Vec<f64> = w.iter().map(|w| -ridge * w).collect();
        let mut hessian = vec![vec![0.0; n]; n];
        for (i, row) in hessian.iter_mut().enumerate() {
            row[i] = ridge;
        }
        for (x, y) in rows.iter().zip(labels) {
            let p = sigmoid(dot(&w, x));
            for i in 0..n {
                gradient[i] += (y - p) * x[i];
                for j in 0..n {
                    hessian[i][j] += p * (1.0 - p) * x[i] * x[j];
                }
            }
        }
        let step = solve(hessian, gradient);
        let mut scale = 1.0;
        let (next, there) = loop {
            let next: Vec<f64> = w.iter().zip(&step).map(|(w, s)| w + scale * s).collect();
            let there = objective(&next);
            if there >= at || scale < 1e-12 {
                break (next, there);
            }
            scale *= 0.5;
        };
        let change = w
            .iter()
            .zip(&next)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f64::max);
        (w, at) = (next, there);
        if change < 1e-12 {
            break;
        }
    }
    Ok(w)
}

/// Standard errors of [`fit_labelled`]'s coefficients: the roots of the diagonal of the inverse of the
/// penalised likelihood's curvature.
#[must_use]
pub fn errors(rows: &[Vec<f64>], w: &[f64], ridge: f64) -> Vec<f64> {
    let n = w.len();
    let mut curvature = vec![vec![0.0; n]; n];
    for (i, row) in curvature.iter_mut().enumerate() {
        row[i] = ridge;
    }
    for x in rows {
        let p = sigmoid(dot(w, x));
        for i in 0..n {
            for j in 0..n {
                curvature[i][j] += p * (1.0 - p) * x[i] * x[j];
            }
        }
    }
    (0..n)
        .map(|i| {
            let mut unit = vec![0.0; n];
            unit[i] = 1.0;
            solve(curvature.clone(), unit)[i].max(0.0).sqrt()
        })
        .collect()
}

/// log σ(z), stable for any z.
pub(crate) fn log_sigmoid(z: f64) -> f64 {
    z.min(0.0) - (-z.abs()).exp().ln_1p()
}

/// σ(z).
pub(crate) fn sigmoid(z: f64) -> f64 {
    log_sigmoid(z).exp()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

/// Gaussian elimination of a positive definite system.
fn solve(mut a: Vec<Vec<f64>>, mut b: Vec<f64>) -> Vec<f64> {
    let n = b.len();
    for i in 0..n {
        for j in i + 1..n {
            let factor = a[j][i] / a[i][i];
            let (above, below) = a.split_at_mut(j);
            for (x, y) in below[0][i..].iter_mut().zip(&above[i][i..]) {
                *x -= factor * y;
            }
            b[j] -= factor * b[i];
        }
    }
    for i in (0..n).rev() {
        let known: f64 = (i + 1..n).map(|j| a[i][j] * b[j]).sum();
        b[i] = (b[i] - known) / a[i][i];
    }
    b
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_number_by_hand() {
        // Three rows of +1 and one of −1: σ(w) = ¾, w = ln 3 (the ridge moves it by less than 1e-8).
        let rows: Vec<Vec<f64>> = [1.0, 1.0, 1.0, -1.0].map(|x| vec![x]).into();
        let w = fit(&rows, 1e-9).unwrap();
        assert!((w[0] - 3f64.ln()).abs() < 1e-8, "{w:?}");
        // Curvature 4 · ¾ · ¼ = ¾.
        assert!((errors(&rows, &w, 1e-9)[0] - (4.0f64 / 3.0).sqrt()).abs() < 1e-8);
    }

    #[test]
    fn the_gradient_is_zero_at_the_maximum() {
        let rows = vec![
            vec![1.0, 0.2, -0.5],
            vec![0.3, -1.0, 2.0],
            vec![-2.0, 0.5, 0.1],
            vec![0.7, 0.7, -0.9],
        ];
        let w = fit(&rows, 0.1).unwrap();
        for i in 0..3 {
            let slope: f64 = rows
                .iter()
                .map(|x| (1.0 - sigmoid(dot(&w, x))) * x[i])
                .sum::<f64>()
                - 0.1 * w[i];
            assert!(slope.abs() < 1e-10, "{slope}");
        }
    }

    #[test]
    fn bad_rows_are_named() {
        let message = fit(&[vec![1.0], vec![f64::NAN]], 1.0)
            .unwrap_err()
            .to_string();
        assert!(message.contains("row 1"), "{message}");
        assert!(fit(&[vec![1.0]], 0.0).is_err());
        assert_eq!(fit(&[], 1.0).unwrap(), Vec::<f64>::new());
        // Perfectly parted rows: finite thanks to the ridge.
        assert!(fit(&[vec![1.0]], 0.01).unwrap()[0].is_finite());
    }
}
