//! Rows that also stand in another split or in an evaluation set.
//!
//! Memory: about 50 bytes a row of the other splits and about 40 bytes an n-gram of the evaluation
//! sets (one for each word, nearly); never the texts.

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::near::{run_hash, word_hash};
use super::pairs::digest;
use super::places::Places;
use super::{Ledger, Level};
use crate::conversation::{Role, Text};
use crate::error::Error;
use crate::record::{PreferenceRecord, PromptRecord, Record, SftRecord};
use crate::source;
use crate::text_stats::words;

/// Words of the n-gram for evaluation texts that are shorter than the usual one; still shorter texts
/// are not looked for.
pub const SHORT_NGRAM: usize = 8;

/// An n-gram that stands in more rows of the evaluation sets than this is their boilerplate and is not
/// looked for; Brown et al. 2020 leave out those of more than ten training documents.
const COMMON: u32 = 10;

/// Characters shown of an n-gram, so that the message still names the row.
const SHOWN: usize = 80;

/// A prompt and its answers.
#[derive(Debug, Default)]
pub(super) struct Parts {
    /// The prompt; the whole text where there is none apart.
    pub(super) prompt: String,
    /// What the prompt says without the system's message, and each answer.
    pub(super) texts: Vec<String>,
}

/// What is said, without the system's message, which whole data sets share.
fn spoken(text: &Text) -> String {
    match text {
        Text::Plain(s) => s.clone(),
        Text::Messages(m) => {
            let said: Vec<&str> = m
                .iter()
                .filter(|m| m.role != Role::System)
                .map(|m| m.content.as_str())
                .collect();
            said.join("\n")
        }
    }
}

impl Parts {
    /// A prompt and its answers.
    pub(super) fn of<'a>(prompt: &'a Text, answers: impl IntoIterator<Item = &'a Text>) -> Self {
        Self {
            prompt: prompt.joined(),
            texts: std::iter::once(prompt).chain(answers).map(spoken).collect(),
        }
    }

    pub(super) fn preference(r: &PreferenceRecord) -> Self {
        Self::of(&r.prompt, [&r.chosen, &r.rejected])
    }

    pub(super) fn sft(r: &SftRecord) -> Self {
        match (&r.prompt, &r.completion) {
            (Some(p), c) => Self::of(p, [c]),
            (None, Text::Plain(s)) => Self {
                prompt: s.clone(),
                texts: vec![s.clone()],
            },
            (None, Text::Messages(m)) => {
                let last = m.iter().rposition(|m| m.role == Role::Assistant);
                let (before, after) = m.split_at(last.unwrap_or(m.len()));
                let (p, a) = (
                    Text::Messages(before.to_vec()),
                    Text::Messages(after.to_vec()),
                );
                Self::of(&p, [&a])
            }
        }
    }

    pub(super) fn prompt(r: &PromptRecord) -> Self {
        let answers = r.fields.values().filter_map(Value::as_str);
        Self {
            prompt: r.prompt.joined(),
            texts: std::iter::once(spoken(&r.prompt))
                .chain(answers.map(str::to_owned))
                .collect(),
        }
    }

    /// A row of any kind; a kind that is unknown gives all its texts, with the first as its prompt.
    fn any(row: Map<String, Value>) -> Option<Self> {
        if row.contains_key("chosen") {
            return PreferenceRecord::from_row(row)
                .ok()
                .map(|r| Self::preference(&r));
        }
        if row.contains_key("completions") {
            let answers = row.get("completions").map(texts_of).unwrap_or_default();
            let r = PromptRecord::from_row(row).ok()?;
            return Some(Self {
                prompt: r.prompt.joined(),
                texts: std::iter::once(spoken(&r.prompt)).chain(answers).collect(),
            });
        }
        if ["messages", "completion", "text"]
            .iter()
            .any(|c| row.contains_key(*c))
        {
            return SftRecord::from_row(row).ok().map(|r| Self::sft(&r));
        }
        if row.contains_key("prompt") {
            return PromptRecord::from_row(row).ok().map(|r| Self::prompt(&r));
        }
        let texts: Vec<String> = row
            .values()
            .filter_map(Value::as_str)
            .map(str::to_owned)
            .collect();
        let named = ["question", "instruction", "query", "problem", "input"];
        let prompt = named
            .iter()
            .find_map(|c| row.get(*c).and_then(Value::as_str))
            .or(texts.first().map(String::as_str))?;
        Some(Self {
            prompt: prompt.to_owned(),
            texts,
        })
    }
}

/// The texts of a cell: itself, those of a list, the contents of messages.
fn texts_of(v: &Value) -> Vec<String> {
    match v {
        Value::String(s) => vec![s.clone()],
        Value::Array(list) => list.iter().flat_map(texts_of).collect(),
        Value::Object(message) => message.get("content").map(texts_of).unwrap_or_default(),
        _ => Vec::new(),
    }
}

/// Lower case, white space collapsed.
fn normalised(text: &str) -> String {
    let words: Vec<String> = text.split_whitespace().map(str::to_lowercase).collect();
    words.join(" ")
}

/// An n-gram's first row and how many rows it stands in.
#[derive(Clone, Copy, Debug)]
struct Gram {
    at: u64,
    rows: u32,
}

/// Prompts of other splits and n-grams of evaluation sets.
#[derive(Debug, Default)]
pub(super) struct Splits {
    /// Of rows with their files: `data/test.jsonl, line 4`.
    places: Places,
    prompts: HashMap<[u8; 16], u64>,
    /// By the number of words, the longer first.
    grams: Vec<(usize, HashMap<u64, Gram>)>,
}

impl Splits {
    /// Reads the files; one that cannot be read is a finding and an error.
    pub(super) fn load(
        against: &[PathBuf],
        eval: &[PathBuf],
        ngram: usize,
        report: &mut Ledger<'_>,
    ) -> Self {
        let mut out = Self::default();
        for path in against {
            let rows = out.each(path, |out, at, parts| {
                let prompt = normalised(&parts.prompt);
                if !prompt.is_empty() {
                    out.prompts.entry(digest([prompt.as_str()])).or_insert(at);
                }
            });
            if let Err(e) = rows {
                report.unreadable(&e);
            }
        }
        if !eval.is_empty() && ngram > 0 {
            out.grams = vec![(ngram, HashMap::new())];
            if ngram > SHORT_NGRAM {
                out.grams.push((SHORT_NGRAM, HashMap::new()));
            }
        }
        for path in eval {
            let rows = out.each(path, |out, at, parts| {
                let mut own = HashSet::new();
                for text in &parts.texts {
                    let hashes: Vec<u64> = words(text).iter().map(|w| word_hash(w)).collect();
                    let fits = out.grams.iter_mut().find(|(n, _)| *n <= hashes.len());
                    let Some((n, set)) = fits else { continue };
                    for gram in hashes.windows(*n).map(run_hash) {
                        if own.insert(gram) {
                            let first = Gram { at, rows: 0 };
                            set.entry(gram).or_insert(first).rows += 1;
                        }
                    }
                }
            });
            if let Err(e) = rows {
                report.unreadable(&e);
            }
        }
        for (_, set) in &mut out.grams {
            set.retain(|_, gram| gram.rows <= COMMON);
        }
        out.grams.retain(|(_, set)| !set.is_empty());
        out
    }

    fn each(
        &mut self,
        path: &Path,
        mut add: impl FnMut(&mut Self, u64, Parts),
    ) -> Result<(), Error> {
        for row in source::rows(path)? {
            let row = row?;
            let Some(parts) = Parts::any(row.columns) else {
                return Err(Error::Row {
                    path: path.to_owned(),
                    place: row.place,
                    column: String::new(),
                    what: "no prompt and no text to compare with".into(),
                    mend: "correct or drop the row".into(),
                });
            };
            let at = self
                .places
                .number(&format!("{}, {}", path.display(), row.place));
            add(self, at, parts);
        }
        Ok(())
    }

    /// Whether a prompt stands in another split, whether an n-gram of the texts stands in an evaluation
    /// set; each at most once a row.
    pub(super) fn judge(&self, parts: &Parts, place: &str, report: &mut Ledger<'_>) {
        if !self.prompts.is_empty() {
            let prompt = normalised(&parts.prompt);
            if let Some(at) = self.prompts.get(&digest([prompt.as_str()])) {
                let what = format!("the prompt also stands in {}", self.places.name(*at));
                report.add("leak", Level::Error, (place, "prompt"), what);
            }
        }
        if self.grams.is_empty() {
            return;
        }
        for text in &parts.texts {
            let words = words(text);
            let hashes: Vec<u64> = words.iter().map(|w| word_hash(w)).collect();
            for (n, set) in &self.grams {
                let found = hashes
                    .windows(*n)
                    .enumerate()
                    .find_map(|(i, gram)| Some((i, *set.get(&run_hash(gram))?)));
                if let Some((i, Gram { at, .. })) = found {
                    let gram = words.get(i..i + n).unwrap_or_default().join(" ");
                    let start: String = gram.chars().take(SHOWN).collect();
                    let what = format!("{start}: {n} words as in {}", self.places.name(at));
                    report.add("contamination", Level::Warning, (place, ""), what);
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_of_rows_of_any_kind() {
        let any = |v: serde_json::Value| Parts::any(v.as_object().unwrap().clone());
        let p = any(serde_json::json!({"question": "q", "answer": "a", "id": 3})).unwrap();
        assert_eq!((p.prompt.as_str(), p.texts.len()), ("q", 2));
        let turn = |role: &str, text: &str| serde_json::json!({"role": role, "content": text});
        let p = any(serde_json::json!({"messages": [turn("system", "s"), turn("user", "u"), turn("assistant", "a")]}))
            .unwrap();
        assert_eq!(
            (p.prompt.as_str(), p.texts),
            ("s\nu", vec!["u".to_owned(), "a".to_owned()])
        );
        assert!(any(serde_json::json!({"id": 3})).is_none());
        assert_eq!(normalised(" A\n  b\tC "), "a b c");
    }
}
