//! A prompt with its completions, as token ids: the one shape that every kind of training shares.
//!
//! Invariant: ids are made once and never re-tokenised; what the sampler knew (log-probs, policy
//! version) travels with them. Knows nothing of text, models or devices.

use std::ops::Range;

use crate::error::{Error, Result};

/// Why a completion ends where it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// It ends by itself: with an end-of-sequence token, or with a stop string.
    Stop,
    /// The sampler reached its limit.
    Length,
    /// It was longer in the data and was truncated.
    Cut,
}

/// What the sampler of a completion recorded.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplerRecord {
    /// Log-probability of each token under the distribution that it was drawn from.
    pub logprobs: Vec<f32>,
    /// Which policy drew it (the optimiser step of its weights).
    pub policy_version: u64,
    /// The likeliest tokens at each place with their log-probabilities, likeliest first; empty unless
    /// asked for.
    pub top: Vec<Vec<(u32, f32)>>,
}

/// One completion of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Completion {
    /// Token ids, end-of-sequence token included when `finish` is [`Finish::Stop`].
    pub ids: Vec<u32>,
    /// Which of `ids` are trained: sorted, disjoint, within bounds.
    pub trained: Vec<Range<usize>>,
    /// Why it ends.
    pub finish: Finish,
    /// The sampler's record, for completions that a policy drew.
    pub sampler: Option<SamplerRecord>,
}

impl Completion {
    /// A completion all of whose tokens are trained.
    #[must_use]
    #[allow(
        clippy::single_range_in_vec_init,
        reason = "a list of one range is meant"
    )]
    pub fn whole(ids: Vec<u32>, finish: Finish) -> Self {
        let n = ids.len();
        Self {
            ids,
            trained: vec![0..n],
            finish,
            sampler: None,
        }
    }

    /// How many tokens are trained.
    #[must_use]
    pub fn trained_tokens(&self) -> usize {
        self.trained.iter().map(ExactSizeIterator::len).sum()
    }
}

/// A prompt with one or more completions.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptGroup {
    /// The row of the data that it comes from (0-based), for messages and as a key of randomness.
    pub row: u64,
    /// The prompt's token ids; may be empty (plain-text training).
    pub prompt: Vec<u32>,
    /// The completions, in a fixed order (chosen before rejected).
    pub completions: Vec<Completion>,
}

impl PromptGroup {
    /// Packed length: the prompt once, and every completion.
    #[must_use]
    pub fn num_tokens(&self) -> usize {
        self.prompt.len() + self.completions.iter().map(|c| c.ids.len()).sum::<usize>()
    }

    /// Checks the invariants of the group and its completions.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no completion, a completion is empty, trained ranges are
    /// unsorted, overlapping or out of bounds, or a sampler's record has another length.
    pub fn validate(&self) -> Result<()> {
        let bad = |what: String| Error::Invalid {
            what: format!("row {}: {what}", self.row),
            mend: "make the group again from its data".into(),
        };
        if self.completions.is_empty() {
            return Err(bad("a prompt without completions".into()));
        }
        for (i, c) in self.completions.iter().enumerate() {
            if c.ids.is_empty() {
                return Err(bad(format!("completion {i} has no tokens")));
            }
            let mut end = 0;
            for r in &c.trained {
                if r.start < end || r.end < r.start || r.end > c.ids.len() {
                    return Err(bad(format!(
                        "completion {i}: trained range {r:?} is out of order or beyond its {} tokens",
                        c.ids.len()
                    )));
                }
                end = r.end;
            }
            if let Some(s) = &c.sampler
                && s.logprobs.len() != c.ids.len()
            {
                return Err(bad(format!(
                    "completion {i}: {} sampler log-probs for {} tokens",
                    s.logprobs.len(),
                    c.ids.len()
                )));
            }
        }
        Ok(())
    }
}
