//! Judges as sources of rewards.

use serde::{Deserialize, Serialize};

use super::{Pair, PairJudge, RemoteJudge};
use crate::error::{Error, Result};
use crate::source::{Judged, RewardSource};

/// A judge that rates each completion by itself: 0 (worst) to 1.
#[derive(Debug)]
pub struct RubricSource {
    judge: RemoteJudge,
    failure_score: f64,
}

impl RubricSource {
    /// A source whose completions without a rating get `failure_score`.
    #[must_use]
    pub fn new(judge: RemoteJudge, failure_score: f64) -> Self {
        Self {
            judge,
            failure_score,
        }
    }
}

impl RewardSource for RubricSource {
    fn name(&self) -> &str {
        "judge"
    }

    fn scores(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<f64>>> {
        let all: Vec<(&str, &str)> = items
            .iter()
            .flat_map(|i| i.texts.iter().map(|t| (i.prompt, t.as_str())))
            .collect();
        let mut rated = self.judge.rates(&all)?.into_iter();
        let score = |r: Option<f64>| r.unwrap_or(self.failure_score);
        Ok(items
            .iter()
            .map(|i| rated.by_ref().take(i.texts.len()).map(score).collect())
            .collect())
    }

    fn counted(&self) -> Vec<(String, f64)> {
        self.judge.counted()
    }
}

/// What a completion is compared with.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Against {
    /// Each other completion of its prompt: the score is the mean probability of being better. A prompt
    /// with K completions asks K(K−1) questions.
    #[default]
    RoundRobin,
    /// The text of this field of the data.
    Field(String),
}

/// A judge that compares completions: the score is the probability of being better, 0 to 1.
#[derive(Debug)]
pub struct PairSource {
    judge: Box<dyn PairJudge>,
    against: Against,
    failure_score: f64,
}

impl PairSource {
    /// A source. A comparison with a baseline that has no verdict counts as `failure_score`, one within a
    /// group as a tie.
    #[must_use]
    pub fn new(judge: Box<dyn PairJudge>, against: Against, failure_score: f64) -> Self {
        Self {
            judge,
            against,
            failure_score,
        }
    }

    fn pairs<'a>(&self, item: &Judged<'a>) -> Result<Vec<Pair<'a>>> {
        let pair = |a: &'a str, b: &'a str| Pair {
            prompt: item.prompt,
            a,
            b,
        };
        let texts = item.texts.iter().map(String::as_str);
        match &self.against {
            Against::RoundRobin => {
                let before =
                    |(j, b): (usize, &'a str)| texts.clone().take(j).map(move |a| pair(a, b));
                Ok(texts.clone().enumerate().flat_map(before).collect())
            }
            Against::Field(field) => {
                let baseline = item.fields.get(field).and_then(|v| v.as_str());
                let baseline = baseline.ok_or_else(|| Error::Judge {
                    what: format!(
                        "row {}: the data have no text in the field `{field}` to compare with",
                        item.group.row
                    ),
                })?;
                Ok(texts.map(|a| pair(a, baseline)).collect())
            }
        }
    }
}

impl RewardSource for PairSource {
    fn name(&self) -> &str {
        self.judge.name()
    }

    fn scores(&self, items: &[Judged<'_>]) -> Result<Vec<Vec<f64>>> {
        let pairs: Result<Vec<Vec<Pair<'_>>>> = items.iter().map(|i| self.pairs(i)).collect();
        let pairs = pairs?;
        let mut labels = self.judge.prefers(&pairs.concat())?.into_iter();
        let mut label = |otherwise| labels.next().flatten().unwrap_or(otherwise);
        let scores = items.iter().map(|item| {
            let n = item.texts.len();
            if self.against != Against::RoundRobin {
                return (0..n).map(|_| label(self.failure_score)).collect();
            }
            // Alone a completion is neither better nor worse.
            if n < 2 {
                return vec![0.5; n];
            }
            let mut wins = vec![0.0; n];
            for j in 0..n {
                for i in 0..j {
                    let p = label(0.5);
                    wins[i] += p;
                    wins[j] += 1.0 - p;
                }
            }
            wins.into_iter().map(|w| w / (n - 1) as f64).collect()
        });
        Ok(scores.collect())
    }

    fn counted(&self) -> Vec<(String, f64)> {
        self.judge.counted()
    }
}
