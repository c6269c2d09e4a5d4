//! Verifiers: rules that look at one completion and say right or wrong, with a reason.
//!
//! Each kind that is shipped is a variant of [`Check`], which a recipe names (`kind = "math"`), and which
//! [`Check::build`] makes a [`Verifier`] of; users bring their own by the trait. A [`Pool`] runs them on
//! threads with deadlines, so that one that hangs costs its row and nothing else. None of them knows of
//! models or tensors.
//!
//! Invariant: a shipped verifier never panics and is bounded in time and memory by the text's length,
//! whatever the text; [`code`] is bounded by its limits.
//!
//! ```
//! use rlhf_reward::verify::{Check, Sample};
//!
//! let check: Check = serde_json::from_str(r#"{"kind": "math", "answer": "answer"}"#)?;
//! let fields = serde_json::json!({"answer": "1/2"});
//! let sample = Sample::new("Half of one?", r"So it is $\boxed{0.5}$.", fields.as_object().unwrap());
//! let verdict = check.build()?.verify(&sample)?;
//! assert_eq!(verdict.score, 1.0);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use std::borrow::Cow;
use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{Error, Result};

pub mod code;
pub mod constraint;
pub mod estimate;
pub mod exact;
#[cfg(unix)]
#[allow(
    unsafe_code,
    reason = "`pre_exec` and `fork` are the only way to limit a process before it begins"
)]
mod ffi;
pub mod format;
pub mod json;
pub mod language;
pub mod length;
pub mod math;
mod part;
pub mod pool;
pub mod sandbox;
mod words;

#[cfg(feature = "train")]
pub mod source;

pub use part::Part;
pub use pool::{FailureCounts, Job, Pool, PoolConfig};
#[cfg(feature = "train")]
pub use source::VerifierSource;

/// What a verifier sees: one completion of a prompt.
#[derive(Clone, Copy, Debug)]
pub struct Sample<'a> {
    /// The prompt's text.
    pub prompt: &'a str,
    /// The completion's text, special tokens left out.
    pub completion: &'a str,
    /// What else the data say of the prompt (an answer, say).
    pub fields: &'a Map<String, Value>,
    /// The completion's length in tokens, where it is known.
    pub tokens: Option<usize>,
}

impl<'a> Sample<'a> {
    /// A sample whose tokens are not counted.
    #[must_use]
    pub fn new(prompt: &'a str, completion: &'a str, fields: &'a Map<String, Value>) -> Self {
        Self {
            prompt,
            completion,
            fields,
            tokens: None,
        }
    }

    /// The text of a field; numbers are given as they are written.
    ///
    /// # Errors
    /// When the data have no such field, or it is neither text nor a number.
    pub fn text(&self, verifier: &'static str, field: &str) -> Result<Cow<'a, str>> {
        match self.fields.get(field) {
            Some(Value::String(s)) => Ok(Cow::Borrowed(s)),
            Some(Value::Number(n)) => Ok(Cow::Owned(n.to_string())),
            Some(_) => Err(bad(
                verifier,
                format!("the field `{field}` is neither text nor a number"),
            )),
            None => Err(bad(
                verifier,
                format!(
                    "the data have no field `{field}`; they have {}",
                    listed(self.fields.keys())
                ),
            )),
        }
    }
}

fn listed<'a>(names: impl Iterator<Item = &'a String>) -> String {
    let all: Vec<String> = names.map(|n| format!("`{n}`")).collect();
    if all.is_empty() {
        "none".into()
    } else {
        all.join(", ")
    }
}

/// What kept a verifier from a verdict of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum FailureKind {
    /// It was not through at its deadline.
    Deadline,
    /// It panicked.
    Panicked,
    /// It was not begun, since too many before it hang.
    NotBegun,
    /// The completion is longer than what verifiers are given.
    TooLong,
    /// A command used up its processor time.
    Cpu,
    /// A command and its children took more memory than allowed.
    Memory,
    /// A command printed more than allowed.
    Output,
    /// A command started more processes than allowed.
    Processes,
}

impl FailureKind {
    /// Its name in logs.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Deadline => "deadline",
            Self::Panicked => "panicked",
            Self::NotBegun => "not_begun",
            Self::TooLong => "too_long",
            Self::Cpu => "cpu",
            Self::Memory => "memory",
            Self::Output => "output",
            Self::Processes => "processes",
        }
    }
}

/// What a verifier says of a completion.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// 0 (wrong) to 1 (right), unless a verifier says otherwise.
    pub score: f64,
    /// Why, for a person.
    pub reason: String,
    /// Set when there is no verdict: `score` is then what the pool gives for failures.
    pub failure: Option<FailureKind>,
}

impl Verdict {
    /// 1 or 0.
    pub fn of(right: bool, reason: impl Into<String>) -> Self {
        Self::scored(f64::from(u8::from(right)), reason)
    }

    /// A score.
    pub fn scored(score: f64, reason: impl Into<String>) -> Self {
        Self {
            score,
            reason: reason.into(),
            failure: None,
        }
    }

    /// No verdict.
    pub fn failed(kind: FailureKind, reason: impl Into<String>) -> Self {
        Self {
            score: 0.0,
            reason: reason.into(),
            failure: Some(kind),
        }
    }
}

/// Something that looks at one completion.
pub trait Verifier: Send + Sync + Debug {
    /// A short name for metrics.
    fn name(&self) -> &str;

    /// The verdict on one completion.
    ///
    /// # Errors
    /// When the data are not what the verifier needs (no such field, an unknown constraint); the run stops.
    /// What a completion alone can cause is a verdict, not an error.
    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict>;

    /// How long one call may take by the verifier's own limits; a pool waits for at least so long.
    fn own_limit(&self) -> Option<Duration> {
        None
    }
}

/// The verifiers that are shipped, by the names that a recipe gives them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Check {
    /// The answer to a question of mathematics.
    Math(math::Math),
    /// The text itself.
    Exact(exact::Exact),
    /// A regular expression.
    Regex(exact::Pattern),
    /// JSON, and a schema of it.
    Json(json::Json),
    /// Tags in order, each once.
    Format(format::Format),
    /// The language it is written in.
    Language(language::Language),
    /// How long it is.
    Length(length::Length),
    /// How much of it repeats.
    Repetition(length::Repetition),
    /// The constraints of IFEval.
    Ifeval(constraint::Ifeval),
    /// A command that is run.
    Code(code::Code),
}

impl Check {
    /// The verifier that it describes.
    ///
    /// # Errors
    /// When a setting makes no sense; the message names it.
    pub fn build(&self) -> Result<Arc<dyn Verifier>> {
        Ok(match self {
            Self::Math(c) => Arc::new(c.check()?.clone()),
            Self::Exact(c) => Arc::new(c.clone()),
            Self::Regex(c) => Arc::new(c.build()?),
            Self::Json(c) => Arc::new(c.build()?),
            Self::Format(c) => Arc::new(c.check()?.clone()),
            Self::Language(c) => Arc::new(c.build()?),
            Self::Length(c) => Arc::new(c.check()?.clone()),
            Self::Repetition(c) => Arc::new(c.check()?.clone()),
            Self::Ifeval(c) => Arc::new(c.clone()),
            Self::Code(c) => Arc::new(c.build()?),
        })
    }
}

/// An error of a verifier.
pub(crate) fn bad(verifier: &str, what: impl Into<String>) -> Error {
    Error::Verifier {
        verifier: verifier.into(),
        what: what.into(),
    }
}

/// The beginning of a text, for a reason.
pub(crate) fn short(text: &str) -> String {
    const MOST: usize = 80;
    let mut chars = text.chars();
    let mut out: String = chars
        .by_ref()
        .take(MOST)
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    if chars.next().is_some() {
        out.push('…');
    }
    out
}

/// A pattern that is written in the code.
pub(crate) fn fixed(pattern: &str) -> regex::Regex {
    regex::Regex::new(pattern).unwrap_or_else(|e| unreachable!("{e}"))
}
