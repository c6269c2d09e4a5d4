//! What verdicts on many completions say: pass@k, maj@k, and which prompts are worth training on.

/// The probability that at least one of k completions is right, from `right` of n (n ≥ k): 1 − C(n−c, k) /
/// C(n, k), without bias (Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1).
/// Nothing when k is 0 or above n, or `right` is above n.
#[must_use]
pub fn pass_at_k(n: usize, right: usize, k: usize) -> Option<f64> {
    if k == 0 || k > n || right > n {
        return None;
    }
    if n - right < k {
        return Some(1.0);
    }
    // C(n−c, k) / C(n, k) as a product of n−c … n factors, none of which overflows.
    let none: f64 = (n - right + 1..=n)
        .map(|i| 1.0 - k as f64 / i as f64)
        .product();
    Some(1.0 - none)
}

/// The answers that most agree on: each as the index of the first that gives it, with its votes. `same` tells
/// whether two answers are one; completions without an answer (`None`) do not vote. Several when they tie.
pub fn majority<T>(answers: &[Option<T>], same: impl Fn(&T, &T) -> bool) -> Vec<(usize, usize)> {
    let mut votes: Vec<(usize, usize)> = Vec::new();
    for (i, answer) in answers.iter().enumerate() {
        let Some(answer) = answer else { continue };
        let known = votes
            .iter_mut()
            .find(|(first, _)| answers[*first].as_ref().is_some_and(|a| same(a, answer)));
        match known {
            Some((_, n)) => *n += 1,
            None => votes.push((i, 1)),
        }
    }
    let most = votes.iter().map(|(_, n)| *n).max().unwrap_or(0);
    votes.retain(|(_, n)| *n == most);
    votes
}

/// The probability that the answer that most of k completions give is right, ties broken by chance: the mean
/// over the n windows of k neighbours in the circle of `answers`, each of which is k completions drawn alike.
/// Nothing when k is 0 or above n.
pub fn maj_at_k<T: Clone>(
    answers: &[Option<T>],
    k: usize,
    same: impl Fn(&T, &T) -> bool,
    right: impl Fn(&T) -> bool,
) -> Option<f64> {
    let n = answers.len();
    if k == 0 || k > n {
        return None;
    }
    let circle: Vec<Option<T>> = answers.iter().chain(&answers[..k - 1]).cloned().collect();
    let windows = if k == n { 1 } else { n };
    let sum: f64 = circle
        .windows(k)
        .take(windows)
        .map(|window| {
            let winners = majority(window, &same);
            let of_right = winners
                .iter()
                .filter(|(i, _)| window[*i].as_ref().is_some_and(&right));
            of_right.count() as f64 / winners.len().max(1) as f64
        })
        .sum();
    Some(sum / windows as f64)
}

/// Which prompts are worth training on: those that the policy solves sometimes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Difficulty {
    /// A completion is right from this score on.
    pub right_from: f64,
    /// The smallest share of right completions.
    pub min_share: f64,
    /// The largest.
    pub max_share: f64,
}

impl Difficulty {
    /// The share of a prompt's completions that is right; 0 of none.
    #[must_use]
    pub fn share(&self, scores: &[f64]) -> f64 {
        let right = scores.iter().filter(|s| **s >= self.right_from).count();
        right as f64 / scores.len().max(1) as f64
    }

    /// Whether each prompt, by the scores of its completions, lies within the shares.
    #[must_use]
    pub fn keep(&self, scores: &[Vec<f64>]) -> Vec<bool> {
        let within = |s: &Vec<f64>| (self.min_share..=self.max_share).contains(&self.share(s));
        scores.iter().map(within).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Subsets of k of the n items, counted one by one.
    fn subsets(n: usize, k: usize) -> impl Iterator<Item = Vec<usize>> {
        (0u32..1 << n)
            .filter(move |bits| bits.count_ones() as usize == k)
            .map(move |bits| (0..n).filter(|i| bits >> i & 1 == 1).collect())
    }

    #[test]
    fn pass_at_k_is_the_share_of_subsets_with_a_right_one() {
        for n in 1..=8 {
            for right in 0..=n {
                for k in 1..=n {
                    let all: Vec<Vec<usize>> = subsets(n, k).collect();
                    let hit = all.iter().filter(|s| s.iter().any(|i| *i < right)).count();
                    let expected = hit as f64 / all.len() as f64;
                    let found = pass_at_k(n, right, k).unwrap();
                    assert!(
                        (found - expected).abs() < 1e-12,
                        "{n} {right} {k}: {found} {expected}"
                    );
                }
            }
        }
        assert_eq!(pass_at_k(3, 1, 4), None);
        assert_eq!(pass_at_k(3, 4, 1), None);
        assert_eq!(pass_at_k(3, 1, 0), None);
        // Factors of 10⁵ completions.
        let many = pass_at_k(100_000, 1, 50_000).unwrap();
        assert!((many - 0.5).abs() < 1e-9, "{many}");
    }

    #[test]
    fn majorities() {
        let answers = [Some(3), None, Some(4), Some(3), Some(4), Some(5)];
        assert_eq!(majority(&answers, |a, b| a == b), [(0, 2), (2, 2)]);
        assert_eq!(majority::<i32>(&[None, None], |a, b| a == b), []);
        let right = |a: &i32| *a == 3;
        let same = |a: &i32, b: &i32| a == b;
        // All six: 3 and 4 tie.
        assert_eq!(maj_at_k(&answers, 6, same, right), Some(0.5));
        // One at a time: the share of right answers.
        assert_eq!(maj_at_k(&answers, 1, same, right), Some(2.0 / 6.0));
        // Windows of two in the circle: 3- 1, -4 0, 43 ½, 34 ½, 45 0, 53 ½.
        assert_eq!(maj_at_k(&answers, 2, same, right), Some(2.5 / 6.0));
        assert_eq!(maj_at_k(&answers, 7, same, right), None);
    }

    #[test]
    fn maj_at_k_has_no_bias() {
        // Over all orders of the answers the mean is that over all subsets.
        let answers = [1, 1, 2, 2, 3];
        let (k, same, right) = (3, |a: &i32, b: &i32| a == b, |a: &i32| *a == 1);
        let vote = |set: &[usize]| {
            let chosen: Vec<Option<i32>> = set.iter().map(|i| Some(answers[*i])).collect();
            maj_at_k(&chosen, k, same, right).unwrap()
        };
        let sets: Vec<Vec<usize>> = subsets(5, k).collect();
        let expected = sets.iter().map(|s| vote(s)).sum::<f64>() / sets.len() as f64;
        let (mut sum, mut n) = (0.0, 0);
        for code in 0..5usize.pow(5) {
            let order: Vec<usize> = (0..5).map(|i| code / 5usize.pow(i) % 5).collect();
            if (0..5).all(|i| order.contains(&i)) {
                let row: Vec<Option<i32>> = order.iter().map(|i| Some(answers[*i])).collect();
                sum += maj_at_k(&row, k, same, right).unwrap();
                n += 1;
            }
        }
        assert_eq!(n, 120);
        assert!((sum / f64::from(n) - expected).abs() < 1e-12);
    }

    #[test]
    fn prompts_that_are_solved_sometimes() {
        let d = Difficulty {
            right_from: 1.0,
            min_share: 0.25,
            max_share: 0.75,
        };
        let scores = [
            vec![1.0, 0.0],
            vec![1.0; 4],
            vec![0.0; 4],
            vec![0.9, 1.0, 0.0, 0.0],
            vec![],
        ];
        assert_eq!(d.keep(&scores), [true, false, false, true, false]);
        assert_eq!(d.share(&scores[3]), 0.25);
    }
}
