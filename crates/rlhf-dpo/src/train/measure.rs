//! Figures of rewards: who is preferred, how well sureness fits, how well good and bad are told apart.

/// 1 where `a` is the higher, ½ at a tie, else 0.
pub(crate) fn prefers(a: f64, b: f64) -> f64 {
    if a > b {
        1.0
    } else if a == b {
        0.5
    } else {
        0.0
    }
}

/// Σ_b |Σ_{i in b} (right_i − confidence_i)| / n over ten bins of the confidence max(σ(m), σ(−m)), which is ½
/// to 1, of margins m that are above 0 where the label's side wins.
pub(super) fn calibration_error(margins: &[f64]) -> f64 {
    const BINS: usize = 10;
    let mut gaps = [0.0; BINS];
    for m in margins {
        let confidence = 1.0 / (1.0 + (-m.abs()).exp());
        let bin = (((confidence - 0.5) * 2.0 * BINS as f64) as usize).min(BINS - 1);
        gaps[bin] += prefers(*m, 0.0) - confidence;
    }
    gaps.iter().map(|g| g.abs()).sum::<f64>() / margins.len().max(1) as f64
}

pub(super) fn mean(values: impl IntoIterator<Item = f64>) -> f64 {
    let (mut sum, mut n) = (0.0, 0u32);
    for v in values {
        sum += v;
        n += 1;
    }
    sum / f64::from(n)
}

/// The chance that a good one of `scores` is above a bad one, ties half (the area under the ROC curve); NaN
/// where either kind is missing.
#[must_use]
pub fn auc(scores: &[f64], good: &[bool]) -> f64 {
    let mut order: Vec<(f64, bool)> = scores.iter().copied().zip(good.iter().copied()).collect();
    order.sort_by(|a, b| a.0.total_cmp(&b.0));
    let (mut below, mut wins) = (0.0, 0.0);
    for tied in order.chunk_by(|a, b| a.0 == b.0) {
        let goods = tied.iter().filter(|t| t.1).count() as f64;
        let bads = tied.len() as f64 - goods;
        wins += goods * (below + 0.5 * bads);
        below += bads;
    }
    wins / (below * (order.len() as f64 - below))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calibration_by_hand() {
        // σ(ln 9) = 0.9 and right; σ(−ln 9): 0.9 sure and wrong. A bin of two: right in 1, sure 1.8.
        let m = 9f64.ln();
        assert!((calibration_error(&[m, -m]) - 0.4).abs() < 1e-12);
        // In their own bins: |1 − 0.9| and |0 − 0.6|, over two.
        let small = -(1.5f64.ln());
        assert!((calibration_error(&[m, small]) - 0.35).abs() < 1e-12);
        assert_eq!(calibration_error(&[0.0, 0.0]), 0.0);
        assert_eq!(calibration_error(&[]), 0.0);
    }

    #[test]
    fn good_over_bad_by_hand() {
        // Good 3 and 1, bad 2 and 1: 3 beats both, 1 loses to 2 and ties with 1. 2½ of 4.
        assert_eq!(
            auc(&[3.0, 2.0, 1.0, 1.0], &[true, false, true, false]),
            0.625
        );
        assert!(auc(&[1.0], &[true]).is_nan());
    }
}
