//! How long a completion is, and how much of it repeats.

use std::collections::HashSet;

use serde::{Deserialize, Serialize};

use super::words::{sentences, words};
use super::{Sample, Verdict, Verifier, bad};
use crate::error::Result;

/// What length is counted in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unit {
    /// Runs of letters, digits and underscores.
    Words,
    /// Sentences.
    Sentences,
    /// Characters.
    Characters,
    /// The completion's own tokens.
    Tokens,
}

/// Whether a completion's length lies within bounds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Length {
    /// What is counted.
    pub unit: Unit,
    /// The least.
    #[serde(default)]
    pub min: usize,
    /// The most; without it there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<usize>,
    /// Outside of the bounds the score falls from 1 to 0 over so many units; 0 is a step.
    #[serde(default)]
    pub slope: usize,
}

impl Length {
    pub(crate) fn check(&self) -> Result<&Self> {
        if self.min == 0 && self.max.is_none() {
            return Err(bad("length", "give `min`, `max` or both"));
        }
        if self.max.is_some_and(|max| max < self.min) {
            return Err(bad("length", "`max` is below `min`"));
        }
        Ok(self)
    }
}

impl Verifier for Length {
    fn name(&self) -> &str {
        "length"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let text = sample.completion;
        let n = match self.unit {
            Unit::Words => words(text).count(),
            Unit::Sentences => sentences(text),
            Unit::Characters => text.chars().count(),
            Unit::Tokens => sample.tokens.ok_or_else(|| {
                bad(
                    "length",
                    "the completions' tokens are not known here; count words or characters",
                )
            })?,
        };
        let most = self.max.unwrap_or(usize::MAX);
        let off = self.min.saturating_sub(n).max(n.saturating_sub(most));
        let score = (1.0 - off as f64 / (self.slope as f64 + 1.0)).max(0.0);
        Ok(Verdict::scored(score, format!("length {n}")))
    }
}

/// How little of a completion repeats: 1 less the share of its n-grams of words that stood there before.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Repetition {
    /// Words of an n-gram.
    #[serde(default = "four")]
    pub n: usize,
    /// Above this share of repeated n-grams the score is 0 and otherwise 1; without it the score is the
    /// share of new ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_share: Option<f64>,
}

fn four() -> usize {
    4
}

impl Repetition {
    pub(crate) fn check(&self) -> Result<&Self> {
        if !(1..=16).contains(&self.n) {
            return Err(bad("repetition", "`n` lies in 1 to 16"));
        }
        if self.max_share.is_some_and(|m| !(0.0..=1.0).contains(&m)) {
            return Err(bad("repetition", "`max_share` lies in 0 to 1"));
        }
        Ok(self)
    }

    fn share(&self, text: &str) -> f64 {
        let lower = text.to_lowercase();
        let all: Vec<&str> = words(&lower).collect();
        let grams = all.windows(self.n).len();
        if grams == 0 {
            return 0.0;
        }
        let distinct: HashSet<&[&str]> = all.windows(self.n).collect();
        1.0 - distinct.len() as f64 / grams as f64
    }
}

impl Verifier for Repetition {
    fn name(&self) -> &str {
        "repetition"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let share = self.share(sample.completion);
        let reason = format!("{:.0} % of {}-grams repeat", share * 100.0, self.n);
        Ok(match self.max_share {
            Some(most) => Verdict::of(share <= most, reason),
            None => Verdict::scored(1.0 - share, reason),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::Map;

    fn score(v: &dyn Verifier, text: &str, tokens: Option<usize>) -> Result<f64> {
        let fields = Map::new();
        let sample = Sample {
            tokens,
            ..Sample::new("", text, &fields)
        };
        Ok(v.verify(&sample)?.score)
    }

    #[test]
    fn bounds_and_slope() {
        let length = |unit, min, max, slope| Length {
            unit,
            min,
            max,
            slope,
        };
        let words = length(Unit::Words, 2, Some(4), 0);
        let text = "one two three four five";
        let cut = |n: usize| text.split(' ').take(n).collect::<Vec<_>>().join(" ");
        let found: Vec<f64> = (0..=5)
            .map(|n| score(&words, &cut(n), None).unwrap())
            .collect();
        assert_eq!(found, [0.0, 0.0, 1.0, 1.0, 1.0, 0.0]);
        // One off of a slope of three: 1 − 1/4.
        let soft = length(Unit::Words, 0, Some(4), 3);
        assert_eq!(score(&soft, text, None).unwrap(), 0.75);
        assert_eq!(
            score(&length(Unit::Characters, 3, Some(3), 0), "äöü", None).unwrap(),
            1.0
        );
        assert_eq!(
            score(&length(Unit::Sentences, 2, None, 0), "A b. C d.", None).unwrap(),
            1.0
        );
        let tokens = length(Unit::Tokens, 0, Some(9), 0);
        assert_eq!(score(&tokens, "", Some(9)).unwrap(), 1.0);
        assert!(score(&tokens, "", None).is_err());
        assert!(length(Unit::Words, 0, None, 0).check().is_err());
        assert!(length(Unit::Words, 5, Some(4), 0).check().is_err());
    }

    #[test]
    fn repeated_words() {
        let r = |n, max_share| Repetition { n, max_share };
        // Bigrams: ab ba ab ba ab: 5, of which 2 distinct: 3/5 repeat.
        assert_eq!(score(&r(2, None), "a b a b a b", None).unwrap(), 0.4);
        assert_eq!(score(&r(2, Some(0.6)), "A b a B a b", None).unwrap(), 1.0);
        assert_eq!(score(&r(2, Some(0.5)), "a b a b a b", None).unwrap(), 0.0);
        assert_eq!(score(&r(4, None), "too short", None).unwrap(), 1.0);
        assert!(r(0, None).check().is_err() && r(4, Some(1.5)).check().is_err());
    }
}
