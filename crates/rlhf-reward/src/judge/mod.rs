//! Judges: other models say which of two completions is better, or how good one is.
//!
//! A [`RemoteJudge`] asks a model behind an OpenAI-compatible endpoint at temperature 0 and reads its verdict;
//! a [`LocalJudge`] reads the log-probabilities of the verdicts of a model of ours. Pairs are asked about in
//! both orders, so that a liking for a place cancels. Answers that hold no verdict are counted and cost their
//! row, never the run. Not known here: where rewards go, and how keys and prices are come by.

#[cfg(feature = "train")]
mod local;
mod prompts;
mod remote;
#[cfg(feature = "train")]
mod source;

use serde::{Deserialize, Serialize};

use crate::error::Result;

#[cfg(feature = "train")]
pub use local::LocalJudge;
pub use prompts::{PAIR_PROMPT, Prompts, RUBRIC, RUBRIC_PROMPT};
pub use remote::{Counts, Prices, RemoteJudge, Settings};
#[cfg(feature = "train")]
pub use source::{Against, PairSource, RubricSource};

/// Two completions of a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair<'a> {
    /// The prompt's text.
    pub prompt: &'a str,
    /// One completion.
    pub a: &'a str,
    /// The other.
    pub b: &'a str,
}

impl Pair<'_> {
    /// The same two in the other order.
    #[must_use]
    pub fn swapped(self) -> Self {
        Self {
            prompt: self.prompt,
            a: self.b,
            b: self.a,
        }
    }
}

/// Something that compares two completions.
pub trait PairJudge: std::fmt::Debug {
    /// The probability that `a` is the better one, of each pair, both orders counted alike: the soft label of
    /// constitutional AI (Bai et al. 2022, arXiv 2212.08073, section 4.1). Nothing where no verdict came.
    ///
    /// # Errors
    /// What will not pass: a wrong address or key, a model that fails.
    fn prefers(&self, pairs: &[Pair<'_>]) -> Result<Vec<Option<f64>>>;

    /// A short name for metrics.
    fn name(&self) -> &str;

    /// What it counted since it was last asked, by name, for the log.
    fn counted(&self) -> Vec<(String, f64)> {
        Vec::new()
    }
}

/// What a judge's answer says of two completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Winner {
    /// The first.
    A,
    /// The second.
    B,
    /// Neither.
    Tie,
}

impl Winner {
    /// The probability that it gives to the first.
    #[must_use]
    pub fn of_a(self) -> f64 {
        match self {
            Self::A => 1.0,
            Self::B => 0.0,
            Self::Tie => 0.5,
        }
    }
}
