//! Which part of a completion is looked at.

use serde::{Deserialize, Serialize};

/// What of a completion is looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// All of it.
    #[default]
    Whole,
    /// The last block between lines of three backticks; all of it where there is none.
    Fenced,
}

impl Part {
    /// This part of `text`.
    #[must_use]
    pub fn of(self, text: &str) -> &str {
        match self {
            Self::Whole => text,
            Self::Fenced => fenced(text).unwrap_or(text),
        }
    }
}

/// The last block between lines that begin with three backticks.
fn fenced(text: &str) -> Option<&str> {
    let (mut found, mut begun, mut at) = (None, None, 0);
    for line in text.split_inclusive('\n') {
        if line.trim_start().starts_with("```") {
            match begun.take() {
                Some(from) => found = Some(&text[from..at]),
                None => begun = Some(at + line.len()),
            }
        }
        at += line.len();
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_fenced_block() {
        let text = "So:\n```python\na = 1\n```\nor\n```\nb = 2\nc\n```\nend ``` x";
        assert_eq!(Part::Fenced.of(text), "b = 2\nc\n");
        assert_eq!(fenced("```\nopen"), None);
        assert_eq!(Part::Fenced.of("plain"), "plain");
    }
}
