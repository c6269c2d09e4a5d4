//! Shares with their Wilson interval. Knows nothing of what is counted.

use serde::Serialize;

/// The normal distribution's 97.5 % quantile.
pub(crate) const Z: f64 = 1.959_963_984_540_054;

/// A share of observations with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Rate {
    /// Observations.
    pub n: u64,
    /// The share, 0 where there are no observations.
    pub share: f64,
    /// Lower end.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Rate {
    /// Wilson's score interval (Wilson 1927, "Probable inference, the law of succession, and
    /// statistical inference") of `successes` of `n`; ties may count as halves.
    ///
    /// With p = successes/n and z = 1.96: (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). Without
    /// observations the interval is \[0, 1\].
    #[must_use]
    pub fn wilson(successes: f64, n: u64) -> Self {
        if n == 0 {
            return Self {
                n,
                share: 0.0,
                low: 0.0,
                high: 1.0,
            };
        }
        let m = n as f64;
        let p = (successes / m).clamp(0.0, 1.0);
        let scale = 1.0 + Z * Z / m;
        let centre = (p + Z * Z / (2.0 * m)) / scale;
        let half = Z * (p * (1.0 - p) / m + Z * Z / (4.0 * m * m)).sqrt() / scale;
        Self {
            n,
            share: p,
            low: (centre - half).clamp(0.0, p),
            high: (centre + half).clamp(p, 1.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wilson_solves_its_equation() {
        // The ends are where |p − q| = z·√(q(1−q)/n).
        for (k, n) in [(7.0, 10), (0.5, 3), (650.0, 1000)] {
            let r = Rate::wilson(k, n);
            for q in [r.low, r.high] {
                let se = (q * (1.0 - q) / n as f64).sqrt();
                assert!(((r.share - q).abs() - Z * se).abs() < 1e-12, "{r:?}");
            }
        }
        let r = Rate::wilson(0.0, 4);
        assert!(r.low == 0.0 && (r.high - Z * Z / (4.0 + Z * Z)).abs() < 1e-12);
        assert_eq!(Rate::wilson(0.0, 0).high, 1.0);
    }
}
