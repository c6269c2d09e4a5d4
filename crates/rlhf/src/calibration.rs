//! Whether a reward model is as right as it is sure.
//!
//! Invariant: a function of margins alone, chosen less rejected in log-odds; what is not finite is left out.

use serde::{Deserialize, Serialize};

use crate::interval::{Interval, share};

/// A bin of pairs: how sure the model is, and how often it is right.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Bin {
    /// The mean of σ(|margin|).
    pub sure: f64,
    /// The share of pairs with the chosen ahead.
    pub right: Interval,
}

/// Pairs in bins of equal count by how sure the model is of its choice, σ(|margin|).
#[must_use]
pub fn bins(margins: &[f64]) -> Vec<Bin> {
    let mut by_size: Vec<f64> = margins.iter().copied().filter(|x| x.is_finite()).collect();
    by_size.sort_by(|a, b| a.abs().total_cmp(&b.abs()));
    let count = (by_size.len() / 40).clamp(1, 8);
    by_size
        .chunks(by_size.len().div_ceil(count).max(1))
        .map(|chunk| {
            let n = chunk.len() as f64;
            let sure = chunk
                .iter()
                .map(|x| 1.0 / (1.0 + (-x.abs()).exp()))
                .sum::<f64>()
                / n;
            let right: f64 = chunk
                .iter()
                .map(|x| {
                    if *x > 0.0 {
                        1.0
                    } else if *x == 0.0 {
                        0.5
                    } else {
                        0.0
                    }
                })
                .sum();
            Bin {
                sure,
                right: share(right, chunk.len()),
            }
        })
        .collect()
}

/// The mean gap between how sure and how right, weighted by pairs (expected calibration error).
#[must_use]
pub fn calibration_error(bins: &[Bin]) -> f64 {
    let n: usize = bins.iter().map(|b| b.right.n).sum();
    bins.iter()
        .map(|b| (b.sure - b.right.value).abs() * b.right.n as f64)
        .sum::<f64>()
        / n.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_by_hand() {
        // One bin: log 3 is 75 % sure. Three of four right: no gap. Infinite margins are left out.
        let m = 3.0f64.ln();
        let b = bins(&[m, m, m, -m, f64::INFINITY]);
        assert_eq!(b.len(), 1);
        assert!((b[0].sure - 0.75).abs() < 1e-12 && b[0].right.value == 0.75 && b[0].right.n == 4);
        assert!(calibration_error(&b) < 1e-12);
        // All wrong: the gap is 75 %.
        assert!((calibration_error(&bins(&[-m; 4])) - 0.75).abs() < 1e-12);
        assert_eq!((bins(&[]).len(), calibration_error(&[])), (0, 0.0));
        // 400 pairs: 8 bins of 50, the least sure first.
        let many: Vec<f64> = (0..400).map(|i| f64::from(i) / 100.0).collect();
        let b = bins(&many);
        assert!(
            b.len() == 8
                && b.iter().all(|b| b.right.n == 50)
                && b.is_sorted_by(|a, b| a.sure < b.sure)
        );
    }
}
