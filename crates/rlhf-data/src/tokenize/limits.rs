//! How long a prompt and a completion may be, what becomes of longer ones, and the count of both.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use super::Parted;
use crate::error::{Error, Result};

/// Lengths in tokens, and what becomes of what is longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// The longest prompt.
    pub max_prompt: usize,
    /// The longest completion.
    pub max_completion: usize,
    /// What becomes of longer ones.
    pub truncation: Truncation,
}

impl Limits {
    /// Limits under which a longer prompt drops its row, and a longer completion loses its end.
    #[must_use]
    pub const fn new(max_prompt: usize, max_completion: usize) -> Self {
        Self {
            max_prompt,
            max_completion,
            truncation: Truncation {
                prompt: LongPrompt::Drop,
                completion: LongCompletion::KeepStart,
            },
        }
    }
}

/// What becomes of rows beyond the limits. Every such row is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Truncation {
    /// Of long prompts.
    pub prompt: LongPrompt,
    /// Of long completions.
    pub completion: LongCompletion,
}

/// What becomes of a prompt beyond its limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongPrompt {
    /// Its row is dropped.
    #[default]
    Drop,
    /// Its first tokens stay. The model then answers a question that breaks off.
    KeepStart,
    /// Its last tokens stay. A system message and what opens the template may be lost.
    KeepEnd,
    /// The oldest turns go, whole ones, until it fits; the system message and the last question stay.
    /// Plain text has no turns, and where the last question alone is too long, the row is dropped.
    DropTurns,
    /// It is an error that names the row.
    Refuse,
}

/// What becomes of a completion beyond its limit. Its end is never kept without its start: those tokens
/// would be trained after a prompt that they do not follow.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LongCompletion {
    /// Its first tokens stay, at least one; no end-of-sequence token is added.
    #[default]
    KeepStart,
    /// Its row is dropped.
    Drop,
    /// It is an error that names the row.
    Refuse,
}

/// Why a row is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The prompt is longer than the limit.
    PromptTooLong,
    /// A completion is longer than the limit.
    CompletionTooLong,
    /// A completion is blank.
    EmptyCompletion,
    /// A completion has no trained token.
    NothingTrained,
    /// Chosen and rejected have the same ids (perhaps after truncation).
    Identical,
    /// The prompt's ids are no prefix of the conversation's ids.
    NoPrefix,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PromptTooLong => "prompt too long",
            Self::CompletionTooLong => "completion too long",
            Self::EmptyCompletion => "empty completion",
            Self::NothingTrained => "nothing to train",
            Self::Identical => "chosen equals rejected",
            Self::NoPrefix => "the prompt is no token prefix",
        })
    }
}

/// A row that is kept, perhaps truncated, or dropped.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome<T> {
    /// Used.
    Kept(T),
    /// Used, with its prompt or a completion shortened to the limit.
    Truncated(T),
    /// Not used.
    Dropped(DropReason),
}

/// Counts of a tokenised table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenizeReport {
    /// Rows with a truncated completion.
    pub truncated: usize,
    /// Rows whose prompt was cut or lost turns.
    pub shortened_prompts: usize,
    /// Rows of plain text in which a token spans prompt and completion.
    pub shared_boundary: usize,
    /// Dropped rows by reason: how many, and the first few.
    pub dropped: BTreeMap<DropReason, Dropped>,
}

/// Dropped rows of one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dropped {
    /// How many.
    pub count: usize,
    /// The first few.
    pub first_rows: Vec<u64>,
}

impl TokenizeReport {
    /// Counts a dropped row.
    pub fn drop(&mut self, row: u64, reason: DropReason) {
        let d = self.dropped.entry(reason).or_default();
        d.count += 1;
        if d.first_rows.len() < 5 {
            d.first_rows.push(row);
        }
    }
}

impl fmt::Display for TokenizeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.truncated > 0 {
            parts.push(format!("{} truncated", self.truncated));
        }
        if self.shortened_prompts > 0 {
            parts.push(format!(
                "{} with a shortened prompt",
                self.shortened_prompts
            ));
        }
        if self.shared_boundary > 0 {
            parts.push(format!(
                "{} with a token across the end of the prompt",
                self.shared_boundary
            ));
        }
        for (reason, d) in &self.dropped {
            parts.push(format!(
                "{} dropped ({reason}; first rows {:?})",
                d.count, d.first_rows
            ));
        }
        f.write_str(&if parts.is_empty() {
            "all rows kept".to_owned()
        } else {
            parts.join(", ")
        })
    }
}

/// A prompt's ids within the limits, and whether some were cut off.
pub(super) fn fit_prompt(mut ids: Vec<u32>, limits: &Limits) -> Result<Parted<(Vec<u32>, bool)>> {
    let over = ids.len().saturating_sub(limits.max_prompt);
    if over == 0 {
        return Ok(Ok((ids, false)));
    }
    match limits.truncation.prompt {
        LongPrompt::Drop | LongPrompt::DropTurns => return Ok(Err(DropReason::PromptTooLong)),
        LongPrompt::KeepStart => ids.truncate(limits.max_prompt),
        LongPrompt::KeepEnd => drop(ids.drain(..over)),
        LongPrompt::Refuse => return Err(too_long("prompt", ids.len(), limits.max_prompt)),
    }
    Ok(Ok((ids, true)))
}

pub(super) fn too_long(what: &str, tokens: usize, limit: usize) -> Error {
    Error::Invalid {
        what: format!("a {what} of {tokens} tokens, the limit is {limit}"),
        mend: format!("raise max_{what}, or choose another truncation than refuse"),
    }
}
