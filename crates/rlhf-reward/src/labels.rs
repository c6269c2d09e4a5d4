//! Labelled rows: prompts with completions as tokens, and what was said of them.
//!
//! Invariant: a label belongs to the group that it stands beside; whether it fits an objective is for
//! [`Objective`](crate::objective::Objective) to say. Knows nothing of models.

use std::collections::BTreeMap;

use rlhf_data::conversation::Text;
use rlhf_data::group::PromptGroup;
use rlhf_data::record::{
    Annotated, Grade, GradedStepsRecord, JudgedPairRecord, RankedRecord, RatedRecord,
    UnpairedRecord,
};
use rlhf_data::tokenize::{ChatTokenizer, Limits, TokenizeReport};
use serde::{Deserialize, Serialize};

use crate::error::Result;

/// What was said of the completions of one prompt.
#[derive(Clone, Debug, PartialEq)]
pub enum Label {
    /// Completion 0 is preferred to completion 1.
    Pair {
        /// By how much, where the data says so.
        margin: Option<f64>,
        /// The probability that it is, ½ for a tie.
        preference: f64,
    },
    /// Which completions are better.
    Ranking {
        /// A score of each, more is better; without scores they stand best first.
        scores: Option<Vec<f64>>,
    },
    /// A number for each of several attributes of the one completion.
    Ratings(BTreeMap<String, f64>),
    /// The probability that the one completion is right, 0 or 1 for certain.
    Outcome(f64),
    /// Grades of the one completion's steps.
    Steps {
        /// The place of each step's last token in the completion.
        ends: Vec<usize>,
        /// The grade of each.
        grades: Vec<Grade>,
    },
}

/// A prompt with completions and their label.
#[derive(Clone, Debug, PartialEq)]
pub struct Labelled {
    /// The tokens.
    pub group: PromptGroup,
    /// The label.
    pub label: Label,
    /// How much the row counts, 0 or more.
    pub weight: f64,
}

impl Labelled {
    /// A row of weight 1.
    #[must_use]
    pub fn new(group: PromptGroup, label: Label) -> Self {
        Self {
            group,
            label,
            weight: 1.0,
        }
    }
}

/// The kinds of rows that carry labels; docs/data.md has their columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Rows {
    /// `prompt`, `chosen`, `rejected`, perhaps `margin`, `preference`.
    Preference,
    /// `prompt`, `completions`, perhaps `scores`.
    Ranked,
    /// `prompt`, `completion`, `ratings`.
    Rated,
    /// `prompt`, `completion`, `label`.
    Unpaired,
    /// `prompt`, `completions` (the steps), `labels`.
    Stepwise,
}

impl Rows {
    /// The name in a recipe.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Preference => "preference",
            Self::Ranked => "ranked",
            Self::Rated => "rated",
            Self::Unpaired => "unpaired",
            Self::Stepwise => "stepwise",
        }
    }
}

/// Rows and what became of them when they were tokenised.
pub type Tokenised = (Vec<Labelled>, TokenizeReport);

/// Puts labels and weights beside the groups that are left.
fn labelled<R>(
    records: &[Annotated<R>],
    groups: impl IntoIterator<Item = PromptGroup>,
    label: impl Fn(&R) -> Label,
) -> Vec<Labelled> {
    groups
        .into_iter()
        .map(|group| {
            let record = &records[group.row as usize];
            Labelled {
                label: label(&record.record),
                weight: record.weight.unwrap_or(1.0),
                group,
            }
        })
        .collect()
}

/// Pairs as tokens.
///
/// # Errors
/// When the tokenizer fails or the limits refuse a row.
pub fn pairs(
    tokenizer: &ChatTokenizer,
    records: &[Annotated<JudgedPairRecord>],
    limits: &Limits,
) -> Result<Tokenised> {
    let plain: Vec<_> = records.iter().map(|r| r.record.pair.clone()).collect();
    let (groups, report) = tokenizer.preference_groups(&plain, limits)?;
    let label = |r: &JudgedPairRecord| Label::Pair {
        margin: r.pair.margin,
        preference: r.preference.unwrap_or(1.0),
    };
    Ok((labelled(records, groups, label), report))
}

/// Rankings as tokens.
///
/// # Errors
/// As [`pairs`].
pub fn rankings(
    tokenizer: &ChatTokenizer,
    records: &[Annotated<RankedRecord>],
    limits: &Limits,
) -> Result<Tokenised> {
    let (groups, report) = tokenizer.completion_groups(records, limits, |r| {
        (&r.record.prompt, r.record.completions.iter().collect())
    })?;
    let label = |r: &RankedRecord| Label::Ranking {
        scores: r.scores.clone(),
    };
    Ok((labelled(records, groups, label), report))
}

/// Rated completions as tokens.
///
/// # Errors
/// As [`pairs`].
pub fn ratings(
    tokenizer: &ChatTokenizer,
    records: &[Annotated<RatedRecord>],
    limits: &Limits,
) -> Result<Tokenised> {
    let (groups, report) = tokenizer.completion_groups(records, limits, |r| {
        (&r.record.prompt, vec![&r.record.completion])
    })?;
    let label = |r: &RatedRecord| Label::Ratings(r.ratings.clone());
    Ok((labelled(records, groups, label), report))
}

/// Right and wrong answers as tokens.
///
/// # Errors
/// As [`pairs`].
pub fn outcomes(
    tokenizer: &ChatTokenizer,
    records: &[Annotated<UnpairedRecord>],
    limits: &Limits,
) -> Result<Tokenised> {
    let (groups, report) = tokenizer.completion_groups(records, limits, |r| {
        (&r.record.prompt, vec![&r.record.completion])
    })?;
    let label = |r: &UnpairedRecord| Label::Outcome(f64::from(u8::from(r.label)));
    Ok((labelled(records, groups, label), report))
}

/// Solutions in steps as tokens, `separator` after each step. Of a solution that was cut, the whole steps
/// keep their grades.
///
/// # Errors
/// As [`pairs`].
pub fn steps(
    tokenizer: &ChatTokenizer,
    records: &[Annotated<GradedStepsRecord>],
    separator: &str,
    limits: &Limits,
) -> Result<Tokenised> {
    fn view(r: &Annotated<GradedStepsRecord>) -> (&Text, &[String]) {
        (&r.record.prompt, &r.record.completions)
    }
    let (found, report) = tokenizer.step_groups(records, separator, limits, view)?;
    let rows = found
        .into_iter()
        .map(|s| {
            let record = &records[s.group.row as usize];
            Labelled {
                label: Label::Steps {
                    grades: record.record.labels[..s.ends.len()].to_vec(),
                    ends: s.ends,
                },
                weight: record.weight.unwrap_or(1.0),
                group: s.group,
            }
        })
        .collect();
    Ok((rows, report))
}
