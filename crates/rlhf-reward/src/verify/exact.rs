//! The text itself: equal to a field, or found by a regular expression.

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};

use super::{Sample, Verdict, Verifier, bad, short};
use crate::error::Result;

/// A compiled expression may take so much memory.
const REGEX_BYTES: usize = 4 << 20;

/// Whether the completion is the answer, word for word.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exact {
    /// The field that holds the answer.
    #[serde(default = "answer")]
    pub answer: String,
    /// Whether case counts.
    #[serde(default = "yes")]
    pub case: bool,
    /// Whether runs of white space count as they are; otherwise each is one space and the ends do not count.
    #[serde(default)]
    pub spaces: bool,
    /// Whether it is enough that the completion holds the answer.
    #[serde(default)]
    pub within: bool,
}

fn answer() -> String {
    "answer".into()
}

fn yes() -> bool {
    true
}

impl Default for Exact {
    fn default() -> Self {
        Self {
            answer: answer(),
            case: true,
            spaces: false,
            within: false,
        }
    }
}

impl Exact {
    fn plain(&self, text: &str) -> String {
        let text = if self.spaces {
            text.to_owned()
        } else {
            text.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        if self.case { text } else { text.to_lowercase() }
    }
}

impl Verifier for Exact {
    fn name(&self) -> &str {
        "exact"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let gold = sample.text("exact", &self.answer)?;
        let (gold, found) = (self.plain(&gold), self.plain(sample.completion));
        let right = if self.within {
            found.contains(&gold)
        } else {
            found == gold
        };
        let sign = if right { '=' } else { '≠' };
        Ok(Verdict::of(
            right,
            format!("{} {sign} {}", short(&found), short(&gold)),
        ))
    }
}

/// Whether a regular expression (the `regex` crate's syntax: linear time, no back-references) is found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pattern {
    /// The expression.
    pub pattern: String,
    /// Whether the whole completion must match.
    #[serde(default)]
    pub whole: bool,
    /// Whether it must not be found.
    #[serde(default)]
    pub forbidden: bool,
}

#[derive(Debug)]
struct Compiled {
    regex: Regex,
    forbidden: bool,
}

impl Pattern {
    pub(crate) fn build(&self) -> Result<impl Verifier + use<>> {
        let pattern = if self.whole {
            format!(r"\A(?:{})\z", self.pattern)
        } else {
            self.pattern.clone()
        };
        let regex = RegexBuilder::new(&pattern).size_limit(REGEX_BYTES).build();
        Ok(Compiled {
            regex: regex.map_err(|e| bad("regex", format!("`pattern`: {e}")))?,
            forbidden: self.forbidden,
        })
    }
}

impl Verifier for Compiled {
    fn name(&self) -> &str {
        "regex"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let found = self.regex.find(sample.completion);
        let reason = found.map_or("not found".into(), |m| {
            format!("found: {}", short(m.as_str()))
        });
        Ok(Verdict::of(found.is_some() != self.forbidden, reason))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn verdict(v: &dyn Verifier, text: &str) -> f64 {
        let fields = json!({"answer": "New  York"});
        let sample = Sample::new("", text, fields.as_object().unwrap());
        v.verify(&sample).unwrap().score
    }

    #[test]
    fn exact_text() {
        let exact = Exact::default();
        assert_eq!(verdict(&exact, " New York\n"), 1.0);
        assert_eq!(verdict(&exact, "new york"), 0.0);
        let loose = Exact {
            case: false,
            within: true,
            ..Exact::default()
        };
        assert_eq!(verdict(&loose, "in new york city"), 1.0);
        let strict = Exact {
            spaces: true,
            ..Exact::default()
        };
        assert_eq!(verdict(&strict, "New York"), 0.0);
        assert_eq!(verdict(&strict, "New  York"), 1.0);
    }

    #[test]
    fn a_missing_field_names_those_that_are_there() {
        let exact = Exact {
            answer: "gold".into(),
            ..Exact::default()
        };
        let fields = json!({"answer": 1});
        let sample = Sample::new("", "", fields.as_object().unwrap());
        let e = exact.verify(&sample).unwrap_err().to_string();
        assert!(e.contains("no field `gold`; they have `answer`"), "{e}");
    }

    #[test]
    fn patterns() {
        let build = |pattern: &str, whole, forbidden| {
            Pattern {
                pattern: pattern.into(),
                whole,
                forbidden,
            }
            .build()
        };
        assert_eq!(verdict(&build("a|b", false, false).unwrap(), "xbx"), 1.0);
        assert_eq!(verdict(&build("a|b", true, false).unwrap(), "xbx"), 0.0);
        assert_eq!(verdict(&build("a|b", true, false).unwrap(), "b"), 1.0);
        assert_eq!(verdict(&build("sorry", false, true).unwrap(), "sorry"), 0.0);
        // Catastrophic elsewhere.
        let hostile = build("(a*)*b", false, false).unwrap();
        assert_eq!(verdict(&hostile, &"a".repeat(100_000)), 0.0);
        for pattern in ["(", r"(\w{1000}){1000}"] {
            let e = build(pattern, false, false).err().unwrap().to_string();
            assert!(e.contains("`pattern`"), "{e}");
        }
    }
}
