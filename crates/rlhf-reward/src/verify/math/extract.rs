//! Where a completion says its answer.

use std::sync::LazyLock;

use regex::Regex;
use serde::{Deserialize, Serialize};

use crate::verify::fixed;

/// Answers stand at the end: no more than so many bytes of it are read.
const TAIL: usize = 256 * 1024;
/// Longer ones are no answers.
const LONGEST: usize = 4096;

/// A place where an answer may stand. The last one of its kind counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Extract {
    /// `\boxed{…}` or `\fbox{…}`.
    Boxed,
    /// `<answer>…</answer>`.
    Tag,
    /// `#### …`, as in GSM8K.
    Hashes,
    /// "answer is …", "answer: …".
    Phrase,
    /// The last number.
    LastNumber,
}

impl Extract {
    /// Every place, in the order of the enum.
    #[must_use]
    pub fn all() -> Vec<Self> {
        vec![
            Self::Boxed,
            Self::Tag,
            Self::Hashes,
            Self::Phrase,
            Self::LastNumber,
        ]
    }
}

/// What `text` gives as its answer: the first of `places` that has one. After a phrase there may be two
/// readings, the whole clause and the first number in it; otherwise there is one.
#[must_use]
pub fn extract(text: &str, places: &[Extract]) -> Vec<String> {
    let text = tail(text, TAIL);
    for place in places {
        let found = match place {
            Extract::Boxed => boxed(text).into_iter().collect(),
            Extract::Tag => tag(text).into_iter().collect(),
            Extract::Hashes => hashes(text).into_iter().collect(),
            Extract::Phrase => phrase(text),
            Extract::LastNumber => last_number(text).into_iter().collect(),
        };
        let mut found: Vec<String> = found.into_iter().map(tidy).collect();
        found.retain(|f| !f.is_empty());
        if !found.is_empty() {
            return found;
        }
    }
    Vec::new()
}

fn tail(text: &str, most: usize) -> &str {
    let mut from = text.len().saturating_sub(most);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

fn tidy(found: &str) -> String {
    if found.len() > LONGEST {
        return String::new();
    }
    found.trim().trim_matches('*').trim().to_owned()
}

/// What stands in the last `\boxed{…}` that is closed; braces nest, `\{` and `\}` are none.
fn boxed(text: &str) -> Option<&str> {
    let bytes = text.as_bytes();
    // For each open brace whether it opens a box, and where.
    let mut open: Vec<Option<usize>> = Vec::new();
    let mut last = None;
    let mut bare = None;
    let mut at = 0;
    while at < bytes.len() {
        match bytes[at] {
            b'\\' => {
                let rest = &text[at..];
                let command = ["\\boxed", "\\fbox"]
                    .into_iter()
                    .find(|c| rest.starts_with(c));
                let Some(command) = command else {
                    // A command's first character, which may be an escaped brace.
                    at += 2;
                    continue;
                };
                at += command.len();
                let after = text[at..].trim_start();
                let brace = text.len() - after.len();
                if after.starts_with('{') {
                    open.push(Some(brace + 1));
                    at = brace + 1;
                } else {
                    bare = Some(brace);
                }
            }
            b'{' => {
                open.push(None);
                at += 1;
            }
            b'}' => {
                if let Some(Some(from)) = open.pop() {
                    last = Some((from, at));
                }
                at += 1;
            }
            _ => at += 1,
        }
    }
    // `\boxed 5` ends where the word does.
    let word = |from: usize| {
        let rest = &text[from..];
        let end = rest.find(|c: char| c.is_whitespace() || c == '$' || c == '}');
        &rest[..end.unwrap_or(rest.len())]
    };
    match (last, bare) {
        (Some((from, to)), b) if b.is_none_or(|b| b < to) => Some(&text[from..to]),
        (_, b) => b.map(word),
    }
}

fn tag(text: &str) -> Option<&str> {
    let end = text.rfind("</answer>")?;
    let start = text[..end].rfind("<answer>")? + "<answer>".len();
    Some(&text[start..end])
}

fn hashes(text: &str) -> Option<&str> {
    let start = text.rfind("####")? + "####".len();
    text[start..].trim_start_matches([' ', '\t']).lines().next()
}

static PHRASE: LazyLock<Regex> = LazyLock::new(|| {
    fixed(
        r"(?i)\banswer(?:\s*\*{0,2}\s*:\s*\*{0,2}|\s+(?:is|was|equals|=)\b\s*:?\s*\*{0,2}|\s*=\s*)",
    )
});
static NUMBER: LazyLock<Regex> = LazyLock::new(|| {
    // A minus after a digit, a letter or a bracket is a subtraction or a hyphen.
    fixed(
        r"(?:^|[^\w)\]}.])([-−+]?[$€£]?[-−]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d+)?(?:\s?/\s?\d+)?(?:\s?\\?%)?)",
    )
});

fn phrase(text: &str) -> Vec<&str> {
    let Some(said) = PHRASE.find_iter(text).last() else {
        return Vec::new();
    };
    let line = text[said.end()..].trim_start();
    let line = line.lines().next().unwrap_or("");
    // A sentence ends at a full stop that a space follows.
    let clause = line.split(". ").next().unwrap_or(line);
    let mut found = vec![clause];
    found.extend(
        NUMBER
            .captures(clause)
            .and_then(|c| c.get(1))
            .map(|m| m.as_str()),
    );
    found
}

fn last_number(text: &str) -> Option<&str> {
    // Groups are dear: only the last match is asked for its own.
    let last = NUMBER.find_iter(text).last()?;
    let groups = NUMBER.captures_at(text, last.start())?;
    groups.get(1).map(|m| m.as_str())
}
