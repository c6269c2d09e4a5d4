//! A distribution of numbers in bounded memory.
//!
//! Invariant: quantiles of whole numbers below 2048 are exact; others are at most 0.1 % too near to zero.

use std::collections::BTreeMap;

use serde::Serialize;

/// Bits of a double that are cut: 10 of 52 bits of the mantissa are kept.
const CUT: u32 = 42;
/// Larger numbers count as not finite, so that no square of one overflows.
const LARGEST: f64 = 1e100;
/// Bars of a histogram.
const BINS: usize = 20;

/// Counts by value, cut to 11 significant bits: at most 1024 entries an octave, in practice a few
/// thousand in all. The idea is that of HdrHistogram.
#[derive(Clone, Debug, Default)]
pub(super) struct Sketch {
    /// By value: how many, and their sum.
    cells: BTreeMap<i64, (u64, f64)>,
    n: u64,
    mean: f64,
    /// Σ(x − mean)².
    squares: f64,
    min: f64,
    max: f64,
    not_finite: u64,
    /// Values that are no whole numbers.
    broken: u64,
}

impl Sketch {
    pub(super) fn add(&mut self, x: f64) {
        if x.is_nan() || x.abs() > LARGEST {
            self.not_finite += 1;
            return;
        }
        self.broken += u64::from(x.fract() != 0.0);
        let size = (x.abs().to_bits() >> CUT) as i64;
        let cell = self
            .cells
            .entry(if x < 0.0 { -size } else { size })
            .or_default();
        cell.0 += 1;
        cell.1 += x;
        (self.min, self.max) = if self.n == 0 {
            (x, x)
        } else {
            (self.min.min(x), self.max.max(x))
        };
        // Welford 1962, "Note on a method for calculating corrected sums of squares and products".
        self.n += 1;
        let d = x - self.mean;
        self.mean += d / self.n as f64;
        self.squares += d * (x - self.mean);
    }

    /// The mean of each cell and how many values are in it, in order.
    pub(super) fn cells(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        self.cells.values().map(|(n, sum)| (sum / *n as f64, *n))
    }

    fn values(&self) -> impl Iterator<Item = (f64, u64)> + '_ {
        self.cells.iter().map(|(key, (n, _))| {
            let size = f64::from_bits(key.unsigned_abs() << CUT);
            let x = if *key < 0 { -size } else { size };
            (x.clamp(self.min, self.max), *n)
        })
    }

    /// The value of rank round(q·(n − 1)).
    fn quantile(&self, q: f64) -> f64 {
        let rank = (q * self.n.saturating_sub(1) as f64).round() as u64;
        let mut below = 0;
        for (x, n) in self.values() {
            below += n;
            if below > rank {
                return x;
            }
        }
        self.max
    }

    /// What was added; zeros where nothing was.
    pub(super) fn summary(&self) -> Summary {
        let spread = (self.squares / (self.n.saturating_sub(1)).max(1) as f64).sqrt();
        Summary {
            n: self.n,
            not_finite: self.not_finite,
            mean: self.mean,
            sd: spread,
            min: self.min,
            p05: self.quantile(0.05),
            p25: self.quantile(0.25),
            median: self.quantile(0.5),
            p75: self.quantile(0.75),
            p95: self.quantile(0.95),
            p99: self.quantile(0.99),
            max: self.max,
            histogram: self.histogram(),
        }
    }

    /// Equal bars between the least and the greatest value; where the greatest is far beyond the
    /// median, bars that grow by an equal factor. Of whole numbers each equal bar holds equally many.
    fn histogram(&self) -> Histogram {
        if self.n == 0 {
            return Histogram::default();
        }
        let (low, high) = (self.min, self.max);
        if low == high {
            return Histogram {
                edges: vec![low, high],
                counts: vec![self.n],
            };
        }
        let edges = self.edges(low, high);
        let bins = edges.len() - 1;
        let mut counts = vec![0; bins];
        for (x, n) in self.values() {
            let bin = edges.partition_point(|e| *e <= x).clamp(1, bins) - 1;
            counts[bin] += n;
        }
        Histogram { edges, counts }
    }

    /// At least two edges.
    fn edges(&self, low: f64, high: f64) -> Vec<f64> {
        let part = |i: usize| i as f64 / BINS as f64;
        let whole = self.broken == 0 && high - low < 1e15;
        if low >= 0.0 && high > 10.0 * self.quantile(0.5).max(1.0) {
            let shift = 1.0 - low;
            let mut edges: Vec<f64> = (0..=BINS)
                .map(|i| (high + shift).powf(part(i)) - shift)
                .map(|e| if whole { e.ceil() } else { e })
                .collect();
            edges.dedup();
            return edges;
        }
        if whole {
            let width = ((high - low + 1.0) / BINS as f64).ceil();
            let bins = ((high - low + 1.0) / width).ceil() as usize;
            return (0..=bins).map(|i| low + i as f64 * width).collect();
        }
        (0..=BINS).map(|i| low + part(i) * (high - low)).collect()
    }
}

/// A distribution: moments, quantiles, bars.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// Values.
    pub n: u64,
    /// Values that were no finite numbers (or beyond ±10¹⁰⁰), which nothing else here counts.
    pub not_finite: u64,
    /// The mean.
    pub mean: f64,
    /// The standard deviation with n − 1.
    pub sd: f64,
    /// The least.
    pub min: f64,
    /// The 5 % quantile, as the value of rank round(0.05·(n − 1)); the others alike.
    pub p05: f64,
    /// The 25 % quantile.
    pub p25: f64,
    /// The median.
    pub median: f64,
    /// The 75 % quantile.
    pub p75: f64,
    /// The 95 % quantile.
    pub p95: f64,
    /// The 99 % quantile.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
    /// Bars.
    pub histogram: Histogram,
}

/// Bars between edges: `counts[i]` values in \[`edges[i]`, `edges[i + 1]`), the last also at its end.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Histogram {
    /// One more than counts.
    pub edges: Vec<f64>,
    /// How many.
    pub counts: Vec<u64>,
}

impl Histogram {
    /// The bars as a line of block characters.
    #[must_use]
    pub fn line(&self) -> String {
        let most = self.counts.iter().copied().max().unwrap_or(0).max(1);
        let bar = |n: &u64| match n {
            0 => ' ',
            n => {
                let blocks = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
                blocks[((n * 8).div_ceil(most) as usize).clamp(1, 8) - 1]
            }
        };
        self.counts.iter().map(bar).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(xs: impl IntoIterator<Item = f64>) -> Summary {
        let mut s = Sketch::default();
        xs.into_iter().for_each(|x| s.add(x));
        s.summary()
    }

    #[test]
    fn small_whole_numbers_are_exact() {
        let s = of((0..=2000).map(f64::from));
        assert_eq!(
            (
                s.n, s.min, s.p05, s.p25, s.median, s.p75, s.p95, s.p99, s.max
            ),
            (
                2001, 0.0, 100.0, 500.0, 1000.0, 1500.0, 1900.0, 1980.0, 2000.0
            )
        );
        // The variance of 0..n is n(n + 1)/12 with n + 1 values and n in the denominator.
        assert!(
            (s.mean - 1000.0).abs() < 1e-9
                && (s.sd - (2001.0 * 2002.0 / 12.0f64).sqrt()).abs() < 1e-9
        );
        assert_eq!(s.histogram.counts.iter().sum::<u64>(), 2001);
        // 2001 values in 20 bars of 101, the last of 82.
        assert_eq!((s.histogram.counts[0], s.histogram.counts[19]), (101, 82));
        assert_eq!(s.histogram.edges[1], 101.0);
        let few = of([3.0, 4.0, 4.0, 6.0]).histogram;
        assert_eq!(
            (few.edges, few.counts),
            (vec![3.0, 4.0, 5.0, 6.0, 7.0], vec![1, 2, 0, 1])
        );
    }

    #[test]
    fn any_number_is_within_a_thousandth_and_none_is_lost() {
        let xs = [-1.0, -0.5, 0.0, 1e-300, 0.123_456, 3.0, 1e9 + 1.0, 1e99];
        let s = of(xs);
        assert_eq!((s.min, s.max), (xs[0], xs[7]));
        for (q, x) in [(s.p05, -1.0), (of([0.123_456, 7.0, 9.0]).min, 0.123_456)] {
            assert!((q - x).abs() <= 1e-3 * x.abs(), "{q} {x}");
        }
        assert!((of([-0.123_456; 3]).median + 0.123_456).abs() < 1.3e-4);
        assert_eq!(s.histogram.counts.iter().sum::<u64>(), 8);
        let s = of([f64::NAN, 1.0, f64::INFINITY]);
        assert_eq!((s.n, s.not_finite, s.mean, s.sd), (1, 2, 1.0, 0.0));
        let s = of([1e100, -1e100, 1e101]);
        assert_eq!(
            (s.n, s.not_finite, s.histogram.counts.iter().sum()),
            (2, 1, 2u64)
        );
        assert!(s.sd.is_finite());
    }

    #[test]
    fn nothing_and_constants_have_no_nan() {
        for s in [of([]), of([5.0]), of([5.0; 4])] {
            let json = serde_json::to_string(&s).unwrap();
            assert!(!json.contains("null"), "{json}");
        }
        assert_eq!(of([]).histogram.line(), "");
        assert_eq!(of([5.0; 4]).histogram.line(), "█");
    }

    #[test]
    fn bars_grow_where_few_values_are_far_out() {
        let s = of((1..=1000).map(f64::from).chain([1e6]));
        let filled = s.histogram.counts.iter().filter(|n| **n > 0).count();
        assert!(filled > 5, "{:?}", s.histogram);
        assert_eq!(s.histogram.counts.iter().sum::<u64>(), 1001);
    }
}
