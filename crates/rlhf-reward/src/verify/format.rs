//! Tags: `<think>…</think><answer>…</answer>`, each once and in order.

use serde::{Deserialize, Serialize};

use super::{Sample, Verdict, Verifier, bad};
use crate::error::Result;

/// Which tags a completion is made of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Format {
    /// The tags' names, in order.
    #[serde(default = "tags")]
    pub tags: Vec<String>,
    /// Whether text may stand outside of the tags.
    #[serde(default)]
    pub outside: bool,
    /// Whether a tag may be empty.
    #[serde(default)]
    pub empty: bool,
    /// Whether the first tag was opened by the prompt already.
    #[serde(default)]
    pub opened: bool,
}

fn tags() -> Vec<String> {
    vec!["think".into(), "answer".into()]
}

impl Default for Format {
    fn default() -> Self {
        Self {
            tags: tags(),
            outside: false,
            empty: false,
            opened: false,
        }
    }
}

impl Format {
    pub(crate) fn check(&self) -> Result<&Self> {
        let plain = |t: &String| {
            !t.is_empty()
                && t.chars()
                    .all(|c| c.is_alphanumeric() || c == '_' || c == '-')
        };
        if self.tags.is_empty() || !self.tags.iter().all(plain) {
            return Err(bad(
                "format",
                "`tags` are names of letters, digits, - and _, as in [\"think\", \"answer\"]",
            ));
        }
        Ok(self)
    }

    /// What is wrong with a text, if anything.
    fn wrong(&self, text: &str) -> Option<String> {
        let mut rest = text;
        for (i, tag) in self.tags.iter().enumerate() {
            let (open, close) = (format!("<{tag}>"), format!("</{tag}>"));
            let opened = self.opened && i == 0;
            let expected = usize::from(!opened);
            if text.matches(&open).count() != expected || text.matches(&close).count() != 1 {
                return Some(format!("{open} and {close} do not stand there once"));
            }
            if !opened {
                let Some((before, after)) = rest.split_once(&open) else {
                    return Some(format!("{open} is not in its place"));
                };
                if !self.outside && !before.trim().is_empty() {
                    return Some(format!("text before {open}"));
                }
                rest = after;
            }
            let Some((inside, after)) = rest.split_once(&close) else {
                return Some(format!("{close} is not in its place"));
            };
            if !self.empty && inside.trim().is_empty() {
                return Some(format!("{open} is empty"));
            }
            rest = after;
        }
        (!self.outside && !rest.trim().is_empty()).then(|| "text after the last tag".into())
    }
}

impl Verifier for Format {
    fn name(&self) -> &str {
        "format"
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let wrong = self.wrong(sample.completion);
        Ok(Verdict::of(
            wrong.is_none(),
            wrong.unwrap_or("as it should be".into()),
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_in_order_and_once() {
        let f = Format::default();
        let right = |f: &Format, t: &str| f.wrong(t).is_none();
        assert!(right(&f, "<think>a</think>\n<answer>b</answer>\n"));
        for wrong in [
            "",
            "b",
            "<answer>b</answer><think>a</think>",
            "<think>a<answer>b</answer></think>",
            "<think>a</think><think>a</think><answer>b</answer>",
            "<think>a</think><answer></answer>",
            "so <think>a</think><answer>b</answer>",
            "<think>a</think><answer>b</answer> so",
            "<think>a</think><answer>b",
            "a</think><answer>b</answer>",
        ] {
            assert!(!right(&f, wrong), "{wrong}");
        }
        let opened = Format {
            opened: true,
            ..Format::default()
        };
        assert!(right(&opened, "a</think><answer>b</answer>"));
        assert!(!right(&opened, "<think>a</think><answer>b</answer>"));
        let outside = Format {
            outside: true,
            empty: true,
            ..Format::default()
        };
        assert!(right(
            &outside,
            "so <think></think> and <answer>b</answer> end"
        ));
        for tags in [vec![], vec!["a b".to_owned()], vec![String::new()]] {
            let f = Format {
                tags,
                ..Format::default()
            };
            assert!(f.check().is_err());
        }
    }
}
