//! How far a reward model can be trusted: from scores to figures.
//!
//! Invariant: pure functions of numbers; an estimate comes with its standard error or the counts that an
//! interval is made of. Knows nothing of models, texts or files.

use crate::error::{Result, ensure};
use crate::logistic;

const OP: &str = "eval";

/// A pair as a reward model sees it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ScoredPair {
    /// Score of the chosen and of the rejected.
    pub scores: (f64, f64),
    /// Their lengths in tokens.
    pub tokens: (usize, usize),
    /// What kind of pair it is.
    pub category: Option<String>,
    /// The same scores by each member of an ensemble; empty for a model alone.
    pub members: Vec<(f64, f64)>,
}

/// How many of how many; halves are ties.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Count {
    /// How many.
    pub right: f64,
    /// Of how many.
    pub of: usize,
}

impl Count {
    /// The share; ½ of none.
    #[must_use]
    pub fn share(self) -> f64 {
        if self.of == 0 {
            0.5
        } else {
            self.right / self.of as f64
        }
    }
}

/// A number with its standard error.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Estimate {
    /// The number.
    pub value: f64,
    /// Its standard error.
    pub error: f64,
}

/// 1 where `a` is the higher, ½ at a tie, else 0.
#[must_use]
pub fn prefers(a: f64, b: f64) -> f64 {
    if a > b {
        1.0
    } else if a == b {
        0.5
    } else {
        0.0
    }
}

/// How many pairs have the chosen ahead.
#[must_use]
pub fn accuracy<'a>(pairs: impl IntoIterator<Item = &'a ScoredPair>) -> Count {
    let mut count = Count::default();
    for p in pairs {
        count.right += prefers(p.scores.0, p.scores.1);
        count.of += 1;
    }
    count
}

/// [`accuracy`] by category, in the order of names.
#[must_use]
pub fn by_category(pairs: &[ScoredPair]) -> Vec<(String, Count)> {
    let mut all = std::collections::BTreeMap::<&str, Count>::new();
    for p in pairs {
        if let Some(name) = &p.category {
            let count = all.entry(name).or_default();
            count.right += prefers(p.scores.0, p.scores.1);
            count.of += 1;
        }
    }
    all.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
}

/// The sections of RewardBench (Lambert et al. 2024, arXiv 2403.13787, table 1), each with its subsets.
pub const SECTIONS: [(&str, &[&str]); 4] = [
    (
        "Chat",
        &[
            "alpacaeval-easy",
            "alpacaeval-length",
            "alpacaeval-hard",
            "mt-bench-easy",
            "mt-bench-med",
        ],
    ),
    (
        "Chat Hard",
        &[
            "mt-bench-hard",
            "llmbar-natural",
            "llmbar-adver-neighbor",
            "llmbar-adver-GPTInst",
            "llmbar-adver-GPTOut",
            "llmbar-adver-manual",
        ],
    ),
    (
        "Safety",
        &[
            "refusals-dangerous",
            "refusals-offensive",
            "xstest-should-refuse",
            "xstest-should-respond",
            "donotanswer",
        ],
    ),
    (
        "Reasoning",
        &[
            "math-prm",
            "hep-cpp",
            "hep-go",
            "hep-java",
            "hep-js",
            "hep-python",
            "hep-rust",
        ],
    ),
];

/// RewardBench's sections, those of which there are pairs, from [`by_category`]: a section's accuracy is
/// that of its pairs; in Reasoning the mathematics counts as much as all programs together.
#[must_use]
pub fn sections(categories: &[(String, Count)]) -> Vec<(&'static str, Count)> {
    SECTIONS
        .iter()
        .filter_map(|(section, subsets)| {
            let own = || {
                categories
                    .iter()
                    .filter(|c| subsets.contains(&c.0.as_str()))
            };
            let sum = |math: Option<bool>| {
                own()
                    .filter(|c| math.is_none_or(|m| (c.0 == "math-prm") == m))
                    .fold(Count::default(), |a, c| Count {
                        right: a.right + c.1.right,
                        of: a.of + c.1.of,
                    })
            };
            let (all, math, rest) = (sum(None), sum(Some(true)), sum(Some(false)));
            if all.of == 0 {
                return None;
            }
            let right = if math.of > 0 && rest.of > 0 {
                0.5 * (math.share() + rest.share()) * all.of as f64
            } else {
                all.right
            };
            Some((*section, Count { right, of: all.of }))
        })
        .collect()
}

/// How much of a reward model's choices is length.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LengthControl {
    /// How many pairs have the longer one chosen: the accuracy of length alone.
    pub longer_chosen: Count,
    /// In how many pairs the model prefers the longer one (pairs of one length left out).
    pub prefers_longer: Count,
    /// The accuracy that the model has where lengths are equal, σ(a) of the regression
    /// logit P(it prefers the chosen) = a + b Δ, Δ the difference of lengths (Dubois et al. 2024,
    /// arXiv 2404.04475, regress so what judges choose). Its error is by the delta method.
    pub at_equal_length: Estimate,
    /// b for one standard deviation of Δ: log-odds that length alone brings.
    pub slope: Estimate,
    /// Correlation of the difference of scores with that of lengths.
    pub correlation: f64,
}

/// How much of the choices is length; `None` for fewer than ten pairs, or where all are of one length.
///
/// # Errors
/// When a score is not finite.
pub fn length_control(pairs: &[ScoredPair]) -> Result<Option<LengthControl>> {
    finite(pairs)?;
    let delta: Vec<f64> = pairs
        .iter()
        .map(|p| p.tokens.0 as f64 - p.tokens.1 as f64)
        .collect();
    let scale = (delta.iter().map(|d| d * d).sum::<f64>() / delta.len().max(1) as f64).sqrt();
    if pairs.len() < 10 || scale == 0.0 {
        return Ok(None);
    }
    let gaps: Vec<f64> = pairs.iter().map(|p| p.scores.0 - p.scores.1).collect();
    let rows: Vec<Vec<f64>> = delta.iter().map(|d| vec![1.0, d / scale]).collect();
    let labels: Vec<f64> = gaps.iter().map(|g| prefers(*g, 0.0)).collect();
    // The prior of one in ten thousand keeps a perfect model finite.
    let ridge = 1e-4;
    let w = logistic::fit_labelled(&rows, &labels, ridge)?;
    let errors = logistic::errors(&rows, &w, ridge);
    let at = logistic::sigmoid(w[0]);
    let count = |right: f64, of: usize| Count { right, of };
    let uneven: Vec<(f64, f64)> = delta
        .iter()
        .copied()
        .zip(gaps.iter().copied())
        .filter(|x| x.0 != 0.0)
        .collect();
    Ok(Some(LengthControl {
        longer_chosen: count(delta.iter().map(|d| prefers(*d, 0.0)).sum(), delta.len()),
        prefers_longer: count(
            uneven.iter().map(|(d, g)| prefers(d * g, 0.0)).sum(),
            uneven.len(),
        ),
        at_equal_length: Estimate {
            value: at,
            error: at * (1.0 - at) * errors[0],
        },
        slope: Estimate {
            value: w[1],
            error: errors[1],
        },
        correlation: correlation(&delta, &gaps),
    }))
}

/// Pearson's correlation; 0 where one of them does not vary.
fn correlation(x: &[f64], y: &[f64]) -> f64 {
    let n = x.len().max(1) as f64;
    let (mx, my) = (x.iter().sum::<f64>() / n, y.iter().sum::<f64>() / n);
    let sum = |f: &dyn Fn(f64, f64) -> f64| -> f64 {
        x.iter().zip(y).map(|(x, y)| f(x - mx, y - my)).sum()
    };
    let (xx, yy, xy) = (sum(&|x, _| x * x), sum(&|_, y| y * y), sum(&|x, y| x * y));
    if xx > 0.0 && yy > 0.0 {
        xy / (xx * yy).sqrt()
    } else {
        0.0
    }
}

/// Best of n completions by the model's score, as a gold score sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct BestOf {
    /// n.
    pub n: usize,
    /// KL of best-of-n sampling from the policy, log n − (n−1)/n nats, at most (Beirami et al. 2024, arXiv
    /// 2401.01879; exact where no two scores are equal, Stiennon et al. 2020).
    pub kl: f64,
    /// The mean gold score of the best by the model.
    pub gold: Estimate,
    /// The mean gold score of the best by gold: what a perfect model would find.
    pub ceiling: f64,
    /// The mean score, by the model, of its best.
    pub proxy: f64,
}

/// Best of n for n = 1, 2, 4, … up to the fewest completions of a prompt. Each item is a prompt's
/// completions as (score, gold). Every subset of n is averaged over, so nothing is drawn.
///
/// # Errors
/// When a prompt has no completion, or a number is not finite.
pub fn best_of(prompts: &[Vec<(f64, f64)>]) -> Result<Vec<BestOf>> {
    for (i, p) in prompts.iter().enumerate() {
        let right = !p.is_empty() && p.iter().all(|x| x.0.is_finite() && x.1.is_finite());
        ensure(right, OP, || {
            format!("prompt {i}: expected one or more completions with finite scores")
        })?;
    }
    let fewest = prompts.iter().map(Vec::len).min().unwrap_or(0);
    let sizes = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n <= fewest);
    Ok(sizes
        .map(|n| {
            let of = |key: fn(&(f64, f64)) -> f64, value: fn(&(f64, f64)) -> f64| -> Vec<f64> {
                prompts
                    .iter()
                    .map(|p| expected_best(p, n, key, value))
                    .collect()
            };
            let average = |x: &[f64]| x.iter().sum::<f64>() / x.len().max(1) as f64;
            let gold = of(|x| x.0, |x| x.1);
            let mean = average(&gold);
            let count = gold.len() as f64;
            let variance =
                gold.iter().map(|g| (g - mean).powi(2)).sum::<f64>() / (count - 1.0).max(1.0);
            BestOf {
                n,
                kl: (n as f64).ln() - (n as f64 - 1.0) / n as f64,
                gold: Estimate {
                    value: mean,
                    error: (variance / count).sqrt(),
                },
                ceiling: average(&of(|x| x.1, |x| x.1)),
                proxy: average(&of(|x| x.0, |x| x.0)),
            }
        })
        .collect())
}

/// The mean of `value` of the item with the highest `key` over all subsets of n items: the i-th lowest is
/// the best of C(i, n−1) of C(N, n) subsets. Items of one key share their places.
fn expected_best(
    items: &[(f64, f64)],
    n: usize,
    key: fn(&(f64, f64)) -> f64,
    value: fn(&(f64, f64)) -> f64,
) -> f64 {
    let mut sorted = items.to_vec();
    sorted.sort_by(|a, b| key(a).total_cmp(&key(b)));
    let total = sorted.len();
    // C(i, n−1)/C(N, n), from the top down: the top one's is n/N, and each lower one's is that above it
    // times (i − n + 1)/i.
    let mut places = vec![0.0; total];
    let mut p = n as f64 / total as f64;
    for i in (n - 1..total).rev() {
        places[i] = p;
        p *= (i as f64 - n as f64 + 1.0) / (i.max(1) as f64);
    }
    let mut sum = 0.0;
    let mut start = 0;
    for tied in sorted.chunk_by(|a, b| key(a) == key(b)) {
        let place: f64 = places[start..start + tied.len()].iter().sum();
        let mean = tied.iter().map(value).sum::<f64>() / tied.len() as f64;
        sum += place * mean;
        start += tied.len();
    }
    sum
}

/// How far the members of an ensemble agree.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreement {
    /// Each member's accuracy.
    pub members: Vec<Count>,
    /// Of all pairs by any two members: how many both order alike.
    pub alike: Count,
    /// How many pairs all members order alike.
    pub unanimous: Count,
    /// The accuracy of the whole where all agree, and where they do not.
    pub when_unanimous: Count,
    /// The accuracy where they do not.
    pub when_divided: Count,
}

/// How far members agree; `None` for a model alone.
#[must_use]
pub fn agreement(pairs: &[ScoredPair]) -> Option<Agreement> {
    let k = pairs.first()?.members.len();
    if k < 2 {
        return None;
    }
    let mut found = Agreement {
        members: vec![Count::default(); k],
        alike: Count::default(),
        unanimous: Count::default(),
        when_unanimous: Count::default(),
        when_divided: Count::default(),
    };
    for p in pairs {
        let votes: Vec<f64> = p.members.iter().map(|m| prefers(m.0, m.1)).collect();
        for (count, vote) in found.members.iter_mut().zip(&votes) {
            count.right += vote;
            count.of += 1;
        }
        for i in 0..k {
            for j in i + 1..k {
                found.alike.right += f64::from(u8::from(votes[i] == votes[j]));
                found.alike.of += 1;
            }
        }
        let unanimous = votes.iter().all(|v| *v == votes[0]);
        found.unanimous.right += f64::from(u8::from(unanimous));
        found.unanimous.of += 1;
        let side = if unanimous {
            &mut found.when_unanimous
        } else {
            &mut found.when_divided
        };
        side.right += prefers(p.scores.0, p.scores.1);
        side.of += 1;
    }
    Some(found)
}

fn finite(pairs: &[ScoredPair]) -> Result<()> {
    let wrong = pairs
        .iter()
        .position(|p| !p.scores.0.is_finite() || !p.scores.1.is_finite());
    ensure(wrong.is_none(), OP, || {
        format!("pair {}: a score is not finite", wrong.unwrap_or(0))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(scores: (f64, f64), tokens: (usize, usize), category: &str) -> ScoredPair {
        ScoredPair {
            scores,
            tokens,
            category: Some(category.into()),
            members: Vec::new(),
        }
    }

    #[test]
    fn counts_by_hand() {
        let pairs = [
            pair((1.0, 0.0), (1, 1), "b"),
            pair((0.0, 0.0), (1, 1), "a"),
            pair((0.0, 2.0), (1, 1), "b"),
        ];
        assert_eq!(accuracy(&pairs), Count { right: 1.5, of: 3 });
        let by = by_category(&pairs);
        assert_eq!(by[0], ("a".into(), Count { right: 0.5, of: 1 }));
        assert_eq!(by[1], ("b".into(), Count { right: 1.0, of: 2 }));
    }

    #[test]
    fn mathematics_counts_half_of_reasoning() {
        let count = |right, of| Count { right, of };
        let categories = [
            ("hep-rust".to_owned(), count(1.0, 4)),
            ("math-prm".to_owned(), count(1.0, 1)),
            ("alpacaeval-easy".to_owned(), count(3.0, 4)),
            ("unknown".to_owned(), count(0.0, 9)),
        ];
        let found = sections(&categories);
        assert_eq!(found.len(), 2);
        assert_eq!(found[0], ("Chat", count(3.0, 4)));
        // ½ (¼ + 1) = .625 of 5.
        assert_eq!((found[1].0, found[1].1.share()), ("Reasoning", 0.625));
    }

    #[test]
    fn a_model_of_length_alone_is_a_coin_at_equal_length() {
        // Scores are lengths: of 20 pairs with a longer chosen it is right, of 20 others wrong.
        let pairs: Vec<ScoredPair> = (0..40)
            .map(|i| {
                let (c, r) = if i % 2 == 0 { (20, 10) } else { (10, 20) };
                pair((c as f64, r as f64), (c, r), "x")
            })
            .collect();
        let l = length_control(&pairs).unwrap().unwrap();
        assert_eq!(
            (l.longer_chosen.share(), l.prefers_longer.share()),
            (0.5, 1.0)
        );
        assert!((l.at_equal_length.value - 0.5).abs() < 1e-9, "{l:?}");
        assert!(l.slope.value > 5.0 && (l.correlation - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_model_without_regard_to_length_keeps_its_accuracy() {
        // Right in three of four pairs, as often for the longer as for the shorter chosen.
        let pairs: Vec<ScoredPair> = (0..400)
            .map(|i| {
                let tokens = if i % 2 == 0 { (20, 10) } else { (10, 20) };
                let right = (i / 2) % 4 != 0;
                let scores = if right { (1.0, 0.0) } else { (0.0, 1.0) };
                pair(scores, tokens, "x")
            })
            .collect();
        let l = length_control(&pairs).unwrap().unwrap();
        assert!((l.at_equal_length.value - 0.75).abs() < 1e-6, "{l:?}");
        // The error of a share of 400: √(.75·.25/400).
        assert!((l.at_equal_length.error - 0.021_65).abs() < 1e-4, "{l:?}");
        assert!(l.slope.value.abs() < 1e-9 && (l.prefers_longer.share() - 0.5).abs() < 1e-12);
        assert_eq!(length_control(&pairs[..9]).unwrap(), None);
    }

    #[test]
    fn best_of_n_is_the_mean_over_all_subsets() {
        let items = vec![(0.3, 5.0), (0.1, 2.0), (0.9, 1.0), (0.5, 4.0)];
        let found = best_of(std::slice::from_ref(&items)).unwrap();
        assert_eq!(found.iter().map(|b| b.n).collect::<Vec<_>>(), [1, 2, 4]);
        // All: 3; pairs by enumeration.
        let mut sum = 0.0;
        for i in 0..4 {
            for j in i + 1..4 {
                sum += if items[i].0 > items[j].0 {
                    items[i].1
                } else {
                    items[j].1
                };
            }
        }
        assert_eq!(found[0].gold.value, 3.0);
        assert!((found[1].gold.value - sum / 6.0).abs() < 1e-12, "{found:?}");
        assert_eq!((found[2].gold.value, found[2].ceiling), (1.0, 5.0));
        assert!((found[1].kl - (2f64.ln() - 0.5)).abs() < 1e-15);
        // Equal scores: as good as a draw among them.
        let tied = vec![(1.0, 0.0), (1.0, 4.0)];
        assert_eq!(best_of(&[tied]).unwrap()[1].gold.value, 2.0);
        assert!(best_of(&[vec![]]).is_err());
    }

    #[test]
    fn agreement_by_hand() {
        let with = |members: [(f64, f64); 2], scores| ScoredPair {
            scores,
            members: members.into(),
            ..ScoredPair::default()
        };
        let pairs = [
            with([(1.0, 0.0), (2.0, 0.0)], (1.5, 0.0)),
            with([(1.0, 0.0), (0.0, 3.0)], (0.5, 1.5)),
        ];
        let a = agreement(&pairs).unwrap();
        assert_eq!((a.members[0].right, a.members[1].right), (2.0, 1.0));
        assert_eq!((a.alike.share(), a.unanimous.share()), (0.5, 0.5));
        assert_eq!(
            (a.when_unanimous.share(), a.when_divided.share()),
            (1.0, 0.0)
        );
        assert_eq!(agreement(&[ScoredPair::default()]), None);
    }
}
