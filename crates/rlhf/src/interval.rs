//! 95 % intervals: normal for means, Wilson for shares, bootstrap for anything else.

use rlhf_data::seed::{Purpose, Stream};
use serde::{Deserialize, Serialize};

/// The normal distribution's 97.5 % quantile.
const Z: f64 = 1.959_963_984_540_054;

/// A number with its 95 % interval and how many observations it rests on.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate.
    pub value: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
    /// Observations.
    pub n: usize,
}

/// The mean of `xs`, ± 1.96 standard errors.
#[must_use]
pub fn mean(xs: &[f64]) -> Interval {
    let n = xs.len().max(1) as f64;
    let mean = xs.iter().sum::<f64>() / n;
    let variance = xs.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let half = Z * (variance / n).sqrt();
    Interval {
        value: mean,
        low: mean - half,
        high: mean + half,
        n: xs.len(),
    }
}

/// A share of `n` trials of which `hits` (ties count half) succeeded, by Wilson's score interval.
#[must_use]
pub fn share(hits: f64, n: usize) -> Interval {
    let m = n.max(1) as f64;
    let p = hits / m;
    let centre = (p + Z * Z / (2.0 * m)) / (1.0 + Z * Z / m);
    let half = Z / (1.0 + Z * Z / m) * (p * (1.0 - p) / m + Z * Z / (4.0 * m * m)).sqrt();
    Interval {
        value: p,
        low: (centre - half).max(0.0),
        high: (centre + half).min(1.0),
        n,
    }
}

/// A statistic of `items` with the 2.5 % and 97.5 % quantiles of `rounds` resamples.
pub fn bootstrap<T>(
    items: &[T],
    rounds: u32,
    seed: u64,
    statistic: impl Fn(&[&T]) -> f64,
) -> Interval {
    let all: Vec<&T> = items.iter().collect();
    let value = statistic(&all);
    let stream = Stream::new(seed, Purpose::Bootstrap);
    let n = items.len() as u64;
    let mut values: Vec<f64> = (0..rounds)
        .map(|round| {
            let drawn: Vec<&T> = (0..n)
                .map(|i| all[stream.below(n, i, round, 0) as usize])
                .collect();
            statistic(&drawn)
        })
        .collect();
    values.sort_by(f64::total_cmp);
    let at = |q: f64| {
        values
            .get((q * (values.len().saturating_sub(1)) as f64).round() as usize)
            .copied()
            .unwrap_or(value)
    };
    Interval {
        value,
        low: at(0.025),
        high: at(0.975),
        n: items.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_hand() {
        // Mean 2, variance 1, n 3: half width 1.96/√3 = 1.1316.
        let i = mean(&[1.0, 2.0, 3.0]);
        assert!((i.value - 2.0).abs() < 1e-12 && (i.high - 2.0 - 1.131_585_8).abs() < 1e-6);
        // Wilson for 8 of 10: 0.4902 to 0.9433 (Agresti & Coull's table).
        let s = share(8.0, 10);
        assert!(
            (s.low - 0.4902).abs() < 1e-4 && (s.high - 0.9433).abs() < 1e-4,
            "{s:?}"
        );
        let b = bootstrap(&[1.0, 2.0, 3.0], 200, 1, |x| {
            x.iter().copied().sum::<f64>() / x.len() as f64
        });
        assert!(b.low >= 1.0 && b.high <= 3.0 && b.low < 2.0 && b.high > 2.0 && b.value == 2.0);
        assert_eq!(
            b,
            bootstrap(&[1.0, 2.0, 3.0], 200, 1, |x| x.iter().copied().sum::<f64>()
                / x.len() as f64)
        );
    }
}
