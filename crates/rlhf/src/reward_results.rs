//! What the evaluation of a reward model finds: `reward_eval.json`, and its text for a terminal.

use serde::{Deserialize, Serialize};

use crate::calibration::Bin;
use crate::interval::Interval;
use crate::terminal::{escape, table};

/// `reward_eval.json`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RewardEvaluation {
    /// The model's folder or stage.
    pub model: String,
    /// The file of pairs.
    pub data: String,
    /// The share of pairs with the chosen ahead.
    pub accuracy: Interval,
    /// The same by category, where the pairs have categories.
    pub categories: Vec<Named>,
    /// RewardBench's sections, where the categories are its subsets.
    pub sections: Vec<Named>,
    /// The mean of the sections, which is RewardBench's score.
    pub sections_mean: Option<f64>,
    /// For each pair chosen less rejected: log-odds of a model that was trained on pairs, else in the
    /// unit of its scores.
    pub margins: Vec<f64>,
    /// Calibration, where margins are log-odds.
    pub bins: Vec<Bin>,
    /// The mean gap between how sure and how right (expected calibration error).
    pub calibration_error: Option<f64>,
    /// How much of the choices is length.
    pub length: Option<LengthShare>,
    /// Best of n, where completions with gold scores were given.
    pub best_of: Vec<BestOfRow>,
    /// How far the members of an ensemble agree.
    pub members: Option<Members>,
}

/// A name and a share.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Named {
    /// The name.
    pub name: String,
    /// The share.
    pub share: Interval,
}

/// How much of a reward model's choices is length.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct LengthShare {
    /// In how many pairs the longer one is the chosen: the accuracy of length alone.
    pub longer_chosen: Interval,
    /// In how many pairs the model prefers the longer one.
    pub prefers_longer: Interval,
    /// Its accuracy where lengths are equal, by logistic regression.
    pub at_equal_length: Interval,
    /// Log-odds that one standard deviation of length brings.
    pub slope: Interval,
    /// Correlation of the differences of scores and of lengths.
    pub correlation: f64,
}

/// Best of n.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct BestOfRow {
    /// n.
    pub n: usize,
    /// log n − (n−1)/n, nats.
    pub kl: f64,
    /// Gold score of the best by the model.
    pub gold: Interval,
    /// Gold score of the best by gold.
    pub ceiling: f64,
    /// The model's score of its best.
    pub proxy: f64,
}

/// How far the members of an ensemble agree.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Members {
    /// The accuracy of each.
    pub accuracy: Vec<Interval>,
    /// How often any two order a pair alike.
    pub alike: Interval,
    /// How often all do.
    pub unanimous: Interval,
    /// The accuracy of the whole where all agree.
    pub when_unanimous: Interval,
    /// The accuracy of the whole where they do not.
    pub when_divided: Interval,
}

/// 71.3% ±2.0
fn percent(i: &Interval) -> String {
    format!("{:.1}% ±{:.1}", 100.0 * i.value, 50.0 * (i.high - i.low))
}

impl RewardEvaluation {
    /// As text for a terminal.
    #[must_use]
    pub fn text(&self) -> String {
        let row = |name: &str, i: &Interval| vec![name.to_owned(), percent(i), i.n.to_string()];
        let mut rows = vec![vec![String::new(), "right".into(), "pairs".into()]];
        rows.push(row("all pairs", &self.accuracy));
        for s in self.sections.iter().chain(&self.categories) {
            rows.push(row(&escape(&s.name), &s.share));
        }
        if let Some(l) = &self.length {
            rows.push(row("at equal length", &l.at_equal_length));
            rows.push(row("length alone", &l.longer_chosen));
            rows.push(row("prefers the longer", &l.prefers_longer));
        }
        if let Some(m) = &self.members {
            for (i, a) in m.accuracy.iter().enumerate() {
                rows.push(row(&format!("member {i}"), a));
            }
            rows.push(row("two members agree", &m.alike));
            rows.push(row("all members agree", &m.unanimous));
            rows.push(row("right where all agree", &m.when_unanimous));
            rows.push(row("right where they do not", &m.when_divided));
        }
        let mut out = table(&rows);
        if let Some(mean) = self.sections_mean {
            out += &format!("\n\nmean of the sections: {:.1}%", 100.0 * mean);
        }
        if let Some(e) = self.calibration_error {
            out += &format!(
                "\n\nas sure as right to within {:.1}% on average",
                100.0 * e
            );
        }
        if !self.best_of.is_empty() {
            let mut rows = vec![
                [
                    "best of",
                    "KL, nats",
                    "gold score",
                    "by gold",
                    "by the model",
                ]
                .map(String::from)
                .to_vec(),
            ];
            for b in &self.best_of {
                rows.push(vec![
                    b.n.to_string(),
                    format!("{:.2}", b.kl),
                    format!(
                        "{:.3} ±{:.3}",
                        b.gold.value,
                        0.5 * (b.gold.high - b.gold.low)
                    ),
                    format!("{:.3}", b.ceiling),
                    format!("{:.3}", b.proxy),
                ]);
            }
            out += "\n\n";
            out += &table(&rows);
        }
        out
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An evaluation with something of everything.
    pub(crate) fn example() -> RewardEvaluation {
        let i = |value: f64| Interval {
            value,
            low: value - 0.05,
            high: value + 0.05,
            n: 200,
        };
        let named = |name: &str, x| Named {
            name: name.into(),
            share: i(x),
        };
        let margins: Vec<f64> = (0..200).map(|k| f64::from(k) / 50.0 - 1.0).collect();
        RewardEvaluation {
            model: "rm".into(),
            data: "pairs.jsonl".into(),
            accuracy: i(0.75),
            categories: vec![named("hep-rust", 0.7), named("<b>", 0.5)],
            sections: vec![named("Reasoning", 0.7)],
            sections_mean: Some(0.7),
            bins: crate::calibration::bins(&margins),
            calibration_error: Some(0.031),
            margins,
            length: Some(LengthShare {
                longer_chosen: i(0.6),
                prefers_longer: i(0.65),
                at_equal_length: i(0.71),
                slope: i(0.4),
                correlation: 0.2,
            }),
            best_of: vec![
                BestOfRow {
                    n: 1,
                    kl: 0.0,
                    gold: i(0.3),
                    ceiling: 0.3,
                    proxy: -0.1,
                },
                BestOfRow {
                    n: 2,
                    kl: 0.193,
                    gold: i(0.4),
                    ceiling: 0.5,
                    proxy: 0.6,
                },
            ],
            members: Some(Members {
                accuracy: vec![i(0.74), i(0.73)],
                alike: i(0.9),
                unanimous: i(0.9),
                when_unanimous: i(0.8),
                when_divided: i(0.55),
            }),
        }
    }

    #[test]
    fn the_text_has_a_row_a_figure() {
        let text = example().text();
        for part in [
            "all pairs                75.0% ±5.0    200",
            "at equal length          71.0% ±5.0    200",
            "right where they do not  55.0% ±5.0    200",
            "mean of the sections: 70.0%",
            "to within 3.1% on average",
            "      2      0.19  0.400 ±0.050    0.500         0.600",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }
}
