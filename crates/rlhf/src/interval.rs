//! 95 % intervals: normal for means, Wilson for shares, bootstrap for anything else.

use rlhf_data::seed::{Purpose, Stream};
use serde::{Deserialize, Deserializer, Serialize};

/// The normal distribution's 97.5 % quantile.
const Z: f64 = 1.959_963_984_540_054;

/// A number with its 95 % interval and how many observations it rests on.
///
/// JSON knows no infinities: what is not finite is written as null and read as NaN.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Interval {
    /// The estimate.
    #[serde(deserialize_with = "number")]
    pub value: f64,
    /// Lower end.
    #[serde(deserialize_with = "number")]
    pub low: f64,
    /// Upper end.
    #[serde(deserialize_with = "number")]
    pub high: f64,
    /// Observations.
    pub n: usize,
}

fn number<'de, D: Deserializer<'de>>(from: D) -> Result<f64, D::Error> {
    Ok(Option::<f64>::deserialize(from)?.unwrap_or(f64::NAN))
}

/// The mean of `xs`, ± 1.96 standard errors. One observation, or none, says nothing about the spread:
/// the interval is a point then.
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

/// The mean of `after − before` over the same items. Where both vary with the item together (the same
/// prompts, say) this is far narrower than the two means' intervals are apart.
///
/// Items beyond the shorter list are left out.
#[must_use]
pub fn mean_difference(after: &[f64], before: &[f64]) -> Interval {
    mean(
        &after
            .iter()
            .zip(before)
            .map(|(a, b)| a - b)
            .collect::<Vec<f64>>(),
    )
}

/// A share of `n` trials of which `hits` (ties count half) succeeded, by Wilson's score interval.
/// Without trials nothing is known: 0 to 1.
#[must_use]
pub fn share(hits: f64, n: usize) -> Interval {
    if n == 0 {
        return Interval {
            value: 0.0,
            low: 0.0,
            high: 1.0,
            n,
        };
    }
    let m = n as f64;
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

/// A statistic of `items` with an interval from `rounds` resamples: their 2.5 % and 97.5 % quantiles,
/// moved so that the resamples' mean lies on the estimate. Without the move a statistic that counts
/// what is different (distinct-n) would lie outside its own interval: a resample repeats items.
///
/// The same seed draws the same resamples.
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
    let centre = values.iter().sum::<f64>() / values.len().max(1) as f64;
    let at = |q: f64| {
        values
            .get((q * (values.len().saturating_sub(1)) as f64).round() as usize)
            .map_or(value, |v| value + v - centre)
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

    fn average(x: &[&f64]) -> f64 {
        x.iter().copied().sum::<f64>() / x.len() as f64
    }

    #[test]
    fn means_by_hand() {
        // Mean 2, variance 1, n 3: half width 1.96/√3 = 1.1316.
        let i = mean(&[1.0, 2.0, 3.0]);
        assert!((i.value - 2.0).abs() < 1e-12 && (i.high - 2.0 - 1.131_585_8).abs() < 1e-6);
        // Differences 1, 1, 1: no spread at all, though both lists spread.
        let d = mean_difference(&[2.0, 5.0, 9.0], &[1.0, 4.0, 8.0]);
        assert_eq!((d.value, d.low, d.high, d.n), (1.0, 1.0, 1.0, 3));
        assert_eq!((mean(&[4.0]).low, mean(&[]).n), (4.0, 0));
    }

    #[test]
    fn shares_by_hand() {
        // Wilson for 8 of 10: 0.4902 to 0.9433 (Agresti & Coull's table).
        let s = share(8.0, 10);
        assert!(
            (s.low - 0.4902).abs() < 1e-4 && (s.high - 0.9433).abs() < 1e-4,
            "{s:?}"
        );
        // None of 10: 0 to z²/(n + z²) = 3.8415/13.8415 = 0.2775.
        let s = share(0.0, 10);
        assert!(s.low == 0.0 && (s.high - 0.277_53).abs() < 1e-5, "{s:?}");
        assert_eq!((share(0.0, 0).low, share(0.0, 0).high), (0.0, 1.0));
    }

    #[test]
    fn the_bootstrap_of_a_mean_agrees_with_the_normal_interval() {
        let xs: Vec<f64> = (0..400).map(|i| f64::from(i % 20)).collect();
        let (b, m) = (bootstrap(&xs, 2000, 1, average), mean(&xs));
        assert!(
            b.value == m.value && (b.low - m.low).abs() < 0.1 && (b.high - m.high).abs() < 0.1,
            "{b:?} {m:?}"
        );
        assert_eq!(b, bootstrap(&xs, 2000, 1, average));
        assert_ne!(b, bootstrap(&xs, 2000, 2, average));
        // One item can only be drawn again and again.
        assert_eq!(
            (
                bootstrap(&[7.0], 50, 1, average).low,
                bootstrap(&[7.0], 0, 1, average).high
            ),
            (7.0, 7.0)
        );
    }

    #[test]
    fn what_is_not_finite_survives_json() {
        let i = Interval {
            value: 1.0,
            low: f64::NEG_INFINITY,
            high: f64::NAN,
            n: 2,
        };
        let read: Interval = serde_json::from_str(&serde_json::to_string(&i).unwrap()).unwrap();
        assert!(read.value == 1.0 && read.low.is_nan() && read.high.is_nan() && read.n == 2);
    }
}
