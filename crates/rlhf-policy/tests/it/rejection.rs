//! Best-of-N against enumeration of every draw from a tiny distribution.

use rlhf_policy::rejection::{best_of, best_of_n_kl};

/// A distribution over completions with their rewards.
type Outcomes = Vec<(f64, f64)>;

/// Σ over all n-tuples of draws of P(draws) f(rewards of the draws).
fn over_draws(of: &Outcomes, n: u32, f: impl Fn(&[f64]) -> f64) -> f64 {
    let k = of.len();
    (0..k.pow(n))
        .map(|code| {
            let drawn: Vec<usize> = (0..n).map(|i| code / k.pow(i) % k).collect();
            let p: f64 = drawn.iter().map(|&i| of[i].0).product();
            let rewards: Vec<f64> = drawn.iter().map(|&i| of[i].1).collect();
            p * f(&rewards)
        })
        .sum()
}

fn max(rewards: &[f64]) -> f64 {
    rewards.iter().copied().fold(f64::NEG_INFINITY, f64::max)
}

/// Σ_r r (F(r)ⁿ − F(r−)ⁿ): the expectation of the largest order statistic.
fn order_statistics(of: &Outcomes, n: i32) -> f64 {
    let mut rewards: Vec<f64> = of.iter().map(|o| o.1).collect();
    rewards.sort_by(f64::total_cmp);
    rewards.dedup();
    let cdf = |r: f64| of.iter().filter(|o| o.1 <= r).map(|o| o.0).sum::<f64>();
    let mut below: f64 = 0.0;
    rewards
        .into_iter()
        .map(|r| {
            let upto = cdf(r);
            let mass = upto.powi(n) - below.powi(n);
            below = upto;
            r * mass
        })
        .sum()
}

fn distributions() -> [Outcomes; 2] {
    [
        vec![(0.5, 0.1), (0.3, 0.6), (0.2, 1.0)],
        // Two completions of one reward.
        vec![(0.4, -1.0), (0.25, 2.0), (0.25, 0.5), (0.1, 2.0)],
    ]
}

#[test]
fn the_expected_best_is_the_sum_over_order_statistics() {
    for of in distributions() {
        for n in 1..=5 {
            let enumerated = over_draws(&of, n, max);
            assert!((enumerated - order_statistics(&of, n as i32)).abs() < 1e-12);
        }
    }
}

#[test]
fn the_curve_from_many_samples_is_unbiased_for_every_n() {
    for of in distributions() {
        for samples in 1..=5u32 {
            for n in 1..=samples {
                let estimate = over_draws(&of, samples, |r| best_of(n as usize, r, r));
                let truth = order_statistics(&of, n as i32);
                assert!(
                    (estimate - truth).abs() < 1e-12,
                    "{n} of {samples}: {estimate} {truth}"
                );
            }
        }
    }
}

#[test]
fn the_kl_is_a_bound_and_is_reached_where_no_completion_is_likely() {
    // P(best-of-n = i) = F(i)ⁿ − F(i−1)ⁿ in rising order of reward.
    let kl = |p: &[f64], n: i32| -> f64 {
        let mut below = 0.0f64;
        p.iter()
            .map(|&p| {
                let upto = below + p;
                let q = upto.powi(n) - below.powi(n);
                below = upto;
                q * (q / p).ln()
            })
            .sum()
    };
    for n in [1usize, 2, 4, 16, 64] {
        let bound = best_of_n_kl(n);
        for p in [vec![0.5, 0.3, 0.2], vec![0.05; 20], vec![0.9, 0.1]] {
            assert!(kl(&p, n as i32) <= bound + 1e-12, "{n} {p:?}");
        }
        let fine = vec![1e-5; 100_000];
        assert!((kl(&fine, n as i32) - bound).abs() < 1e-3, "{n}");
    }
}
