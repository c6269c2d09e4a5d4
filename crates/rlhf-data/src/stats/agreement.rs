//! Agreement between annotators beyond chance.

use std::collections::{BTreeMap, HashMap};

use serde::Serialize;

/// Cohen's kappa of two annotators, κ = (p_o − p_e)/(1 − p_e) (Cohen 1960, "A coefficient of agreement
/// for nominal scales", equation 1): p_o the share of items on which they agree, p_e the share expected
/// if each labelled at random with its own frequencies.
///
/// `pairs` holds both labels of each item, each below `k`. `None` without items, with a label out of
/// range, or where both use one same label only (p_e = 1: there is no chance to beat).
#[must_use]
pub fn cohen_kappa(pairs: &[(usize, usize)], k: usize) -> Option<f64> {
    let mut first = vec![0u64; k];
    let mut second = vec![0u64; k];
    let mut agree = 0u64;
    for (a, b) in pairs {
        *first.get_mut(*a)? += 1;
        *second.get_mut(*b)? += 1;
        agree += u64::from(a == b);
    }
    let n = pairs.len() as f64;
    let chance: f64 = first
        .iter()
        .zip(&second)
        .map(|(a, b)| (*a as f64 / n) * (*b as f64 / n))
        .sum();
    kappa(agree as f64 / n, chance)
}

/// Fleiss' kappa of many annotators (Fleiss 1971, "Measuring nominal scale agreement among many
/// raters"): `counts[i][j]` annotators give item i the label j, and each item has the
/// same number m ≥ 2 of them.
///
/// P_i = (Σ_j n_ij² − m)/(m(m − 1)), P̄ its mean, P̄_e = Σ_j p_j² with p_j the share of label j,
/// κ = (P̄ − P̄_e)/(1 − P̄_e). `None` without items, with unequal or too small m, with rows of unequal
/// length, or where one label only is used.
#[must_use]
pub fn fleiss_kappa(counts: &[Vec<usize>]) -> Option<f64> {
    let head = counts.first()?;
    let m: usize = head.iter().sum();
    if m < 2 {
        return None;
    }
    let mut totals = vec![0.0; head.len()];
    let mut agree = 0.0;
    for row in counts {
        if row.len() != head.len() || row.iter().sum::<usize>() != m {
            return None;
        }
        let squares: f64 = row.iter().map(|n| (*n as f64).powi(2)).sum();
        agree += (squares - m as f64) / (m as f64 * (m as f64 - 1.0));
        for (total, n) in totals.iter_mut().zip(row) {
            *total += *n as f64;
        }
    }
    let n = counts.len() as f64;
    let chance = totals.iter().map(|t| (t / (n * m as f64)).powi(2)).sum();
    kappa(agree / n, chance)
}

fn kappa(observed: f64, chance: f64) -> Option<f64> {
    let k = (observed - chance) / (1.0 - chance);
    (chance < 1.0 - 1e-12 && k.is_finite()).then_some(k)
}

/// What annotators say of the same items.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Agreement {
    /// Annotators.
    pub annotators: usize,
    /// Items with at least two annotators.
    pub items: usize,
    /// Labels in use.
    pub labels: Vec<String>,
    /// Cohen's kappa, where there are exactly two annotators.
    pub cohen: Option<f64>,
    /// Items that both of the two annotators judge.
    pub cohen_items: usize,
    /// Fleiss' kappa over the items with the most common number of annotators.
    pub fleiss: Option<f64>,
    /// These items.
    pub fleiss_items: usize,
    /// The annotators of each of these items.
    pub fleiss_raters: usize,
}

/// Judgements: about 100 bytes each. An annotator's last judgement of an item counts.
#[derive(Debug, Default)]
pub(super) struct Judgements {
    annotators: HashMap<String, usize>,
    labels: BTreeMap<String, usize>,
    items: BTreeMap<[u8; 16], BTreeMap<usize, usize>>,
}

impl Judgements {
    pub(super) fn add(&mut self, item: [u8; 16], annotator: String, label: String) {
        let who = self.annotators.len();
        let who = *self.annotators.entry(annotator).or_insert(who);
        let what = self.labels.len();
        let what = *self.labels.entry(label).or_insert(what);
        self.items.entry(item).or_default().insert(who, what);
    }

    /// The agreement, or `None` where no row names an annotator.
    pub(super) fn agreement(&self) -> Option<Agreement> {
        if self.annotators.is_empty() {
            return None;
        }
        let shared = || self.items.values().filter(|i| i.len() >= 2);
        let mut out = Agreement {
            annotators: self.annotators.len(),
            items: shared().count(),
            labels: self.labels.keys().cloned().collect(),
            ..Agreement::default()
        };
        let k = self.labels.len();
        if self.annotators.len() == 2 {
            let pairs: Vec<(usize, usize)> = shared()
                .filter_map(|i| Some((*i.get(&0)?, *i.get(&1)?)))
                .collect();
            out.cohen_items = pairs.len();
            out.cohen = cohen_kappa(&pairs, k);
        }
        let mut sizes: BTreeMap<usize, usize> = BTreeMap::new();
        for item in shared() {
            *sizes.entry(item.len()).or_default() += 1;
        }
        if let Some((raters, items)) = sizes.into_iter().max_by_key(|(m, n)| (*n, *m)) {
            let counts: Vec<Vec<usize>> = shared()
                .filter(|i| i.len() == raters)
                .map(|i| {
                    let mut row = vec![0; k];
                    for label in i.values() {
                        row[*label] += 1;
                    }
                    row
                })
                .collect();
            out.fleiss = fleiss_kappa(&counts);
            (out.fleiss_items, out.fleiss_raters) = (items, raters);
        }
        Some(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cohen_by_hand() {
        // Of 50 proposals both say yes to 20, no to 15; p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5.
        let mut pairs = vec![(0, 0); 20];
        pairs.extend([(0, 1); 5]);
        pairs.extend([(1, 0); 10]);
        pairs.extend([(1, 1); 15]);
        assert!((cohen_kappa(&pairs, 2).unwrap() - 0.4).abs() < 1e-12);
        // p_o = 0.6 in both, but other margins: 0.1304 and 0.2593.
        let table = |a, b, c, d| {
            let cells = [((0, 0), a), ((0, 1), b), ((1, 0), c), ((1, 1), d)];
            let pairs: Vec<_> = cells.iter().flat_map(|(p, n)| vec![*p; *n]).collect();
            cohen_kappa(&pairs, 2).unwrap()
        };
        assert!((table(45, 15, 25, 15) - 0.1304).abs() < 5e-5);
        assert!((table(25, 35, 5, 35) - 0.2593).abs() < 5e-5);
        assert!((table(5, 0, 0, 5) - 1.0).abs() < 1e-12);
        assert!((table(0, 5, 5, 0) + 1.0).abs() < 1e-12);
        assert_eq!(cohen_kappa(&[], 2), None);
        assert_eq!(cohen_kappa(&[(0, 0)], 2), None);
        assert_eq!(cohen_kappa(&[(0, 2)], 2), None);
    }

    #[test]
    fn fleiss_of_ten_subjects_and_fourteen_raters() {
        // The worked example of Wikipedia's "Fleiss' kappa": P̄ = 0.378, P̄_e = 0.213, κ = 0.210.
        let counts = [
            [0, 0, 0, 0, 14],
            [0, 2, 6, 4, 2],
            [0, 0, 3, 5, 6],
            [0, 3, 9, 2, 0],
            [2, 2, 8, 1, 1],
            [7, 7, 0, 0, 0],
            [3, 2, 6, 3, 0],
            [2, 5, 3, 2, 2],
            [6, 5, 2, 1, 0],
            [0, 2, 2, 3, 7],
        ]
        .map(|r| r.to_vec());
        let k = fleiss_kappa(&counts).unwrap();
        assert!((k - 0.210).abs() < 5e-4, "{k}");
        assert_eq!(fleiss_kappa(&[]), None);
        assert_eq!(fleiss_kappa(&[vec![1, 0]]), None);
        assert_eq!(fleiss_kappa(&[vec![2, 0], vec![1, 0]]), None);
        assert_eq!(fleiss_kappa(&[vec![2, 0], vec![2, 0]]), None);
        assert_eq!(fleiss_kappa(&[vec![2, 0], vec![0, 2]]), Some(1.0));
    }

    #[test]
    fn fleiss_of_thirty_patients_and_six_psychiatrists() {
        // Table 1 of Fleiss 1971 (also `irr::diagnoses` in R): κ = 0.430.
        let counts = [
            [0, 0, 0, 6, 0],
            [0, 3, 0, 0, 3],
            [0, 1, 4, 0, 1],
            [0, 0, 0, 0, 6],
            [0, 3, 0, 3, 0],
            [2, 0, 4, 0, 0],
            [0, 0, 4, 0, 2],
            [2, 0, 3, 1, 0],
            [2, 0, 0, 4, 0],
            [0, 0, 0, 0, 6],
            [1, 0, 0, 5, 0],
            [1, 1, 0, 4, 0],
            [0, 3, 3, 0, 0],
            [1, 0, 0, 5, 0],
            [0, 2, 0, 3, 1],
            [0, 0, 5, 0, 1],
            [3, 0, 0, 1, 2],
            [5, 1, 0, 0, 0],
            [0, 2, 0, 4, 0],
            [1, 0, 2, 0, 3],
            [0, 0, 0, 0, 6],
            [0, 1, 0, 5, 0],
            [0, 2, 0, 1, 3],
            [2, 0, 0, 4, 0],
            [1, 0, 0, 4, 1],
            [0, 5, 0, 1, 0],
            [4, 0, 0, 0, 2],
            [0, 2, 0, 4, 0],
            [1, 0, 5, 0, 0],
            [0, 0, 0, 0, 6],
        ]
        .map(|r| r.to_vec());
        let k = fleiss_kappa(&counts).unwrap();
        assert!((k - 0.430).abs() < 1e-3, "{k}");
    }

    #[test]
    fn two_annotators_and_many() {
        let mut j = Judgements::default();
        let mut say = |item: u8, who: &str, label: &str| {
            j.add([item; 16], who.into(), label.into());
        };
        // Of 4 items they agree on 3: p_o = 0.75, p_e = 0.5·0.75 + 0.5·0.25 = 0.5, κ = 0.5.
        for (item, a, b) in [(1, "y", "y"), (2, "y", "y"), (3, "n", "n"), (4, "n", "y")] {
            say(item, "anna", a);
            say(item, "ben", b);
        }
        say(5, "ben", "y");
        let a = j.agreement().unwrap();
        assert_eq!((a.annotators, a.items, a.cohen_items), (2, 4, 4));
        assert!((a.cohen.unwrap() - 0.5).abs() < 1e-12);
        // Fleiss: P̄ = 0.75, p = (5/8, 3/8), P̄_e = 34/64, κ = (48 − 34)/(64 − 34) = 7/15.
        assert!((a.fleiss.unwrap() - 7.0 / 15.0).abs() < 1e-12);
        j.add([5; 16], "cleo".into(), "n".into());
        let a = j.agreement().unwrap();
        assert_eq!((a.annotators, a.items, a.cohen), (3, 5, None));
        assert_eq!((a.fleiss_items, a.fleiss_raters), (5, 2));
        assert!(Judgements::default().agreement().is_none());
    }
}
