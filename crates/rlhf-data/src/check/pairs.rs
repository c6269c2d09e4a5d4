//! Labels that contradict an earlier row, and pairs whose longer completion is chosen too often.

use std::collections::HashMap;

use sha2::{Digest as _, Sha256};

use crate::rate::Rate;

/// A wider share than this of longer chosen completions is a finding; so is a narrower one than
/// `1 − BIAS`.
const BIAS: f64 = 0.65;

/// The first 16 bytes of SHA-256 over texts and their lengths.
pub(crate) fn digest<T: AsRef<str>>(texts: impl IntoIterator<Item = T>) -> [u8; 16] {
    let mut hash = Sha256::new();
    for text in texts {
        let text = text.as_ref();
        hash.update(text.len().to_le_bytes());
        hash.update(text);
    }
    let mut short = [0; 16];
    short.copy_from_slice(&hash.finalize()[..16]);
    short
}

/// Judgements so far, by digest: about 50 bytes a row.
#[derive(Debug, Default)]
pub(super) struct Contradictions(HashMap<[u8; 16], (u64, bool)>);

impl Contradictions {
    /// The earlier row that prefers `rejected` to `chosen` for the same prompt.
    pub(super) fn pair(
        &mut self,
        place: u64,
        prompt: &str,
        chosen: &str,
        rejected: &str,
    ) -> Option<u64> {
        if chosen == rejected {
            return None;
        }
        let forward = chosen < rejected;
        let (a, b) = if forward {
            (chosen, rejected)
        } else {
            (rejected, chosen)
        };
        self.judge(digest(["pair", prompt, a, b]), place, forward)
    }

    /// The earlier row that gives the same completion the other label.
    pub(super) fn label(
        &mut self,
        place: u64,
        prompt: &str,
        completion: &str,
        label: bool,
    ) -> Option<u64> {
        self.judge(digest(["label", prompt, completion]), place, label)
    }

    fn judge(&mut self, key: [u8; 16], place: u64, side: bool) -> Option<u64> {
        let (first, before) = *self.0.entry(key).or_insert((place, side));
        (before != side).then_some(first)
    }
}

/// How often the longer completion is chosen.
#[derive(Debug, Default)]
pub(super) struct LengthBias {
    n: u64,
    longer: f64,
}

impl LengthBias {
    pub(super) fn add(&mut self, chosen: &str, rejected: &str) {
        self.n += 1;
        self.longer += match chosen.chars().count().cmp(&rejected.chars().count()) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        };
    }

    /// What is wrong, if the whole interval is beyond the limit.
    pub(super) fn finding(&self) -> Option<String> {
        let r = Rate::wilson(self.longer, self.n);
        let what = if r.low > BIAS {
            "longer"
        } else if r.high < 1.0 - BIAS {
            "shorter"
        } else {
            return None;
        };
        let share = |x: f64| 100.0 * if what == "longer" { x } else { 1.0 - x };
        let (a, b) = (share(r.low), share(r.high));
        Some(format!(
            "the chosen completion is the {what} one in {:.1} % of {} pairs (95 % interval {:.1} to {:.1}): length alone tells the label",
            share(r.share),
            r.n,
            a.min(b),
            a.max(b)
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn swapped_pairs_and_labels_contradict_once_known() {
        let mut c = Contradictions::default();
        assert_eq!(c.pair(1, "p", "a", "b"), None);
        assert_eq!(c.pair(2, "p", "a", "b"), None);
        assert_eq!(c.pair(3, "p", "b", "a"), Some(1));
        assert_eq!(c.pair(4, "q", "b", "a"), None);
        assert_eq!(c.pair(5, "p", "a", "a"), None);
        assert_eq!(c.label(6, "p", "a", true), None);
        assert_eq!(c.label(7, "p", "a", false), Some(6));
        assert_ne!(digest(["ab", "c"]), digest(["a", "bc"]));
    }

    #[test]
    fn only_an_interval_beyond_the_limit_is_a_bias() {
        let bias = |longer: usize, shorter: usize| {
            let mut b = LengthBias::default();
            (0..longer).for_each(|_| b.add("aa", "a"));
            (0..shorter).for_each(|_| b.add("a", "aa"));
            b.finding()
        };
        assert_eq!(bias(0, 0), None);
        assert_eq!(bias(3, 0), None);
        assert_eq!(bias(60, 40), None);
        assert_eq!(bias(68, 32), None);
        let b = bias(80, 20).unwrap();
        assert!(b.contains("longer one in 80.0 % of 100 pairs"), "{b}");
        let b = bias(20, 80).unwrap();
        assert!(b.contains("shorter one in 80.0 % of 100 pairs"), "{b}");
    }
}
