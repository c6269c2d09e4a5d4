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
    let k = counts.first()?.len();
    if counts.iter().any(|row| row.len() != k) {
        return None;
    }
    fleiss(counts.iter().map(|row| row.iter().copied().enumerate()))
}

/// [`fleiss_kappa`] of items that are given as labels and how many annotators say so.
fn fleiss<I: Iterator<Item = (usize, usize)>>(items: impl Iterator<Item = I>) -> Option<f64> {
    let mut totals: BTreeMap<usize, f64> = BTreeMap::new();
    let (mut n, mut agree, mut raters) = (0.0, 0.0, None);
    for item in items {
        let (mut m, mut squares) = (0, 0.0);
        for (label, count) in item {
            m += count;
            squares += (count as f64).powi(2);
            *totals.entry(label).or_default() += count as f64;
        }
        if m < 2 || *raters.get_or_insert(m) != m {
            return None;
        }
        agree += (squares - m as f64) / (m as f64 * (m as f64 - 1.0));
        n += 1.0;
    }
    let m = raters? as f64;
    let chance = totals.values().map(|t| (t / (n * m)).powi(2)).sum();
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
    /// Items with at least two annotators, among those looked at.
    pub items: usize,
    /// The share of items that were looked at: 1 up to about a million, then ½, ¼, … drawn by digest.
    pub share: f64,
    /// Labels in use, up to a hundred; further ones count as one, `…`.
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

/// Items kept; beyond that every second one by its digest goes.
const MAX_ITEMS: usize = 1 << 20;
/// Labels told apart.
const MAX_LABELS: usize = 100;
/// What the labels beyond those count as.
const OTHER: &str = "…";

/// Judgements: about 100 bytes each, of about a million items. An annotator's last judgement of an item
/// counts.
#[derive(Debug, Default)]
pub(super) struct Judgements {
    /// Annotators by digest.
    annotators: HashMap<[u8; 16], usize>,
    labels: BTreeMap<String, usize>,
    items: BTreeMap<[u8; 16], BTreeMap<usize, usize>>,
    /// Leading bits that are 0 in the digests of the items looked at.
    zeros: u32,
}

/// Whether so many leading bits of a digest are 0.
fn has_zeros(item: &[u8; 16], zeros: u32) -> bool {
    u128::from_be_bytes(*item).leading_zeros() >= zeros
}

impl Judgements {
    pub(super) fn add(&mut self, item: [u8; 16], annotator: [u8; 16], label: String) {
        if !has_zeros(&item, self.zeros) {
            return;
        }
        let who = self.annotators.len();
        let who = *self.annotators.entry(annotator).or_insert(who);
        let what = self.labels.len();
        let known = what < MAX_LABELS || self.labels.contains_key(&label);
        let label = if known { label } else { OTHER.to_owned() };
        let what = *self.labels.entry(label).or_insert(what);
        self.items.entry(item).or_default().insert(who, what);
        while self.items.len() > MAX_ITEMS {
            self.zeros += 1;
            self.items.retain(|item, _| has_zeros(item, self.zeros));
        }
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
            share: 0.5f64.powi(self.zeros as i32),
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
        if let Some((raters, count)) = sizes.into_iter().max_by_key(|(m, n)| (*n, *m)) {
            let items = shared().filter(|i| i.len() == raters);
            out.fleiss = fleiss(items.map(|i| {
                let mut row = vec![0; k];
                for label in i.values() {
                    row[*label] += 1;
                }
                row.into_iter().enumerate()
            }));
            (out.fleiss_items, out.fleiss_raters) = (count, raters);
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
            j.add([item; 16], [who.as_bytes()[0]; 16], label.into());
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
        j.add([5; 16], [b'c'; 16], "n".into());
        let a = j.agreement().unwrap();
        assert_eq!((a.annotators, a.items, a.cohen), (3, 5, None));
        assert_eq!((a.fleiss_items, a.fleiss_raters), (5, 2));
        assert!(Judgements::default().agreement().is_none());
    }

    #[test]
    fn memory_is_bounded_and_the_sample_says_the_same() {
        // Three in four items agree: p_o = 0.75, margins even, κ = 0.5.
        let mut j = Judgements::default();
        let n = 3 * MAX_ITEMS as u64;
        for i in 0..n {
            let digest = crate::check::near::mix(i);
            let mut item = [0; 16];
            item[..8].copy_from_slice(&digest.to_be_bytes());
            let first = i % 2 == 0;
            let second = if i % 8 < 2 { !first } else { first };
            for (who, says) in [(1, first), (2, second)] {
                j.add(item, [who; 16], if says { "y" } else { "n" }.into());
            }
        }
        assert!(j.items.len() <= MAX_ITEMS, "{}", j.items.len());
        let a = j.agreement().unwrap();
        assert_eq!(a.share, 0.25);
        assert!(
            (a.items as f64 / n as f64 - 0.25).abs() < 0.01,
            "{}",
            a.items
        );
        assert!((a.cohen.unwrap() - 0.5).abs() < 0.01, "{a:?}");
        assert!((a.fleiss.unwrap() - 0.5).abs() < 0.01, "{a:?}");
    }

    #[test]
    fn labels_beyond_a_hundred_are_one() {
        let mut j = Judgements::default();
        for i in 0..200u8 {
            j.add([i; 16], [0; 16], format!("{i}"));
            j.add([i; 16], [1; 16], format!("{i}"));
        }
        let a = j.agreement().unwrap();
        assert_eq!(a.labels.len(), MAX_LABELS + 1);
        assert!((a.cohen.unwrap() - 1.0).abs() < 1e-12, "{a:?}");
    }
}
