//! Answers to questions of mathematics: found in a completion, and compared with the right one.
//!
//! Invariant: linear in the text, never a panic, never an overflow: exact numbers are checked `i128`
//! fractions, all others finite `f64`; what does not fit is compared as text.

mod extract;
mod number;
mod parse;
mod tokens;

use serde::{Deserialize, Serialize};

use super::{Sample, Verdict, Verifier, bad, short};
use crate::error::Result;

pub use extract::{Extract, extract};

const NAME: &str = "math";

/// Whether the completion's answer equals the data's.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Math {
    /// The field that holds the right answer, or a solution that ends in `\boxed{…}` or `#### …`.
    #[serde(default = "answer")]
    pub answer: String,
    /// Where the completion's answer is looked for, in this order.
    #[serde(default = "Extract::all")]
    pub extract: Vec<Extract>,
}

fn answer() -> String {
    "answer".into()
}

impl Default for Math {
    fn default() -> Self {
        Self {
            answer: answer(),
            extract: Extract::all(),
        }
    }
}

impl Math {
    pub(crate) fn check(&self) -> Result<&Self> {
        if self.extract.is_empty() {
            return Err(bad(
                NAME,
                "`extract` is empty; name where answers are found, or leave the key out",
            ));
        }
        Ok(self)
    }
}

impl Verifier for Math {
    fn name(&self) -> &str {
        NAME
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let gold = sample.text(NAME, &self.answer)?;
        let gold = extract(&gold, &[Extract::Boxed, Extract::Hashes])
            .first()
            .map_or_else(|| gold.trim().to_owned(), Clone::clone);
        if gold.is_empty() {
            return Err(bad(NAME, format!("the field `{}` is empty", self.answer)));
        }
        let found = extract(sample.completion, &self.extract);
        let Some(first) = found.first() else {
            return Ok(Verdict::of(false, "no answer found"));
        };
        let right = equal(&gold, first)
            || (!parse::understood(first) && found[1..].iter().any(|f| equal(&gold, f)));
        let sign = if right { '=' } else { '≠' };
        Ok(Verdict::of(
            right,
            format!("{} {sign} {}", short(first), short(&gold)),
        ))
    }
}

/// Whether two answers are the same.
///
/// Numbers are equal when they are as fractions, or, unless both are whole, to 10⁻⁹ of the larger; a per
/// cent equals its number and its hundredth; units count where both have one. Expressions with variables
/// are equal when they are at three points. Tuples and intervals are compared in order and with their
/// brackets, sets and bare lists in any order. Everything else is compared as text: spaces, case, LaTeX's
/// text commands and a full stop at the end do not count.
#[must_use]
pub fn equal(gold: &str, found: &str) -> bool {
    let texts = (parse::as_text(gold), parse::as_text(found));
    if !texts.0.is_empty() && texts.0 == texts.1 {
        return true;
    }
    [parse::Letters::Variables, parse::Letters::Units]
        .into_iter()
        .any(
            |letters| match (parse::answer(gold, letters), parse::answer(found, letters)) {
                (Some(g), Some(f)) => g.equals(&f),
                _ => false,
            },
        )
}

#[cfg(test)]
mod tests;
