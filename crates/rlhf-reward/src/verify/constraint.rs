//! IFEval's constraints: 25 kinds by the ids under which they were published, read from the data's columns.
//!
//! Each check does what the published one does (Zhou et al. 2023, "Instruction-Following Evaluation for Large
//! Language Models"), quirks and all, where that can be had: sentences, words in capitals and languages are
//! told by code of our own instead of NLTK's and langdetect's trained models (docs/verifiers.md).

use std::collections::HashMap;
use std::sync::LazyLock;

use regex::{Regex, RegexBuilder};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::language::Tongue;
use super::words::{sentences, words};
use super::{Sample, Verdict, Verifier, bad, fixed};
use crate::error::Result;

const NAME: &str = "ifeval";

/// How strictly constraints are checked.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// The completion as it is.
    #[default]
    Strict,
    /// Also without its first line, its last line, both, and each of these without asterisks.
    Loose,
}

/// What becomes of a prompt's several constraints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Of {
    /// 1 when all are kept, else 0.
    #[default]
    All,
    /// The share that is kept.
    Share,
}

/// Whether a completion keeps the constraints of its prompt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Ifeval {
    /// Strict or loose.
    #[serde(default)]
    pub mode: Mode,
    /// All, or the share.
    #[serde(default)]
    pub score: Of,
    /// The field with the constraints' ids: a list, or its JSON.
    #[serde(default = "ids")]
    pub ids: String,
    /// The field with the settings of each: a list of objects, or its JSON.
    #[serde(default = "kwargs")]
    pub kwargs: String,
}

fn ids() -> String {
    "instruction_id_list".into()
}

fn kwargs() -> String {
    "kwargs".into()
}

impl Default for Ifeval {
    fn default() -> Self {
        Self {
            mode: Mode::Strict,
            score: Of::All,
            ids: ids(),
            kwargs: kwargs(),
        }
    }
}

impl Ifeval {
    /// The constraints of a row.
    ///
    /// # Errors
    /// When a field is missing or malformed, an id is unknown, or a constraint lacks a setting.
    pub fn constraints(&self, fields: &Map<String, Value>) -> Result<Vec<(String, Constraint)>> {
        let ids = list(fields, &self.ids)?;
        let kwargs = list(fields, &self.kwargs)?;
        if ids.len() != kwargs.len() || ids.is_empty() {
            return Err(bad(
                NAME,
                format!(
                    "`{}` has {} entries and `{}` has {}; they must be as many, and not none",
                    self.ids,
                    ids.len(),
                    self.kwargs,
                    kwargs.len()
                ),
            ));
        }
        let none = Map::new();
        ids.iter()
            .zip(&kwargs)
            .map(|(id, kwargs)| {
                let Some(id) = id.as_str() else {
                    return Err(bad(
                        NAME,
                        format!("`{}` holds something that is no text", self.ids),
                    ));
                };
                let kwargs = match kwargs {
                    Value::Object(o) => o,
                    Value::Null => &none,
                    _ => return Err(bad(NAME, format!("{id}: its settings are no object"))),
                };
                Ok((id.to_owned(), Constraint::parse(id, kwargs)?))
            })
            .collect()
    }
}

fn list(fields: &Map<String, Value>, field: &str) -> Result<Vec<Value>> {
    let no_list = |what: &str| {
        bad(
            NAME,
            format!("the field `{field}` {what}; it holds a JSON list"),
        )
    };
    match fields.get(field) {
        Some(Value::Array(a)) => Ok(a.clone()),
        Some(Value::String(s)) => {
            serde_json::from_str(s).map_err(|e| no_list(&format!("cannot be read: {e}")))
        }
        Some(_) => Err(no_list("is no list")),
        None => Err(no_list("is missing")),
    }
}

impl Verifier for Ifeval {
    fn name(&self) -> &str {
        NAME
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let constraints = self.constraints(sample.fields)?;
        let broken: Vec<&str> = constraints
            .iter()
            .filter(|(_, c)| !c.kept(sample.completion, self.mode))
            .map(|(id, _)| id.as_str())
            .collect();
        let kept = constraints.len() - broken.len();
        let reason = if broken.is_empty() {
            format!("all {kept} kept")
        } else {
            format!("not kept: {}", broken.join(", "))
        };
        Ok(match self.score {
            Of::All => Verdict::of(broken.is_empty(), reason),
            Of::Share => Verdict::scored(kept as f64 / constraints.len() as f64, reason),
        })
    }
}

/// A number and on which side of it a count must lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    n: i64,
    less_than: bool,
}

impl Bound {
    fn holds(self, count: usize) -> bool {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        if self.less_than {
            count < self.n
        } else {
            count >= self.n
        }
    }
}

/// One constraint with its settings.
#[derive(Clone, Debug)]
#[non_exhaustive]
#[allow(missing_docs, reason = "the ids in `parse` say what each is")]
pub enum Constraint {
    Existence(Vec<Regex>),
    Frequency(Regex, Bound),
    Forbidden(Vec<Regex>),
    LetterFrequency(char, Bound),
    ResponseLanguage(String),
    Sentences(Bound),
    Paragraphs(usize),
    Words(Bound),
    NthParagraphFirstWord {
        paragraphs: usize,
        nth: usize,
        word: String,
    },
    Placeholders(usize),
    Postscript(Regex),
    BulletLists(usize),
    ConstrainedResponse,
    HighlightedSections(usize),
    MultipleSections(Regex, usize),
    JsonFormat,
    Title,
    TwoResponses,
    RepeatPrompt(String),
    EndPhrase(String),
    CapitalWords(Bound),
    EnglishCapital,
    EnglishLowercase,
    NoComma,
    Quotation,
}

/// The published ids.
pub const IDS: [&str; 25] = [
    "keywords:existence",
    "keywords:frequency",
    "keywords:forbidden_words",
    "keywords:letter_frequency",
    "language:response_language",
    "length_constraints:number_sentences",
    "length_constraints:number_paragraphs",
    "length_constraints:number_words",
    "length_constraints:nth_paragraph_first_word",
    "detectable_content:number_placeholders",
    "detectable_content:postscript",
    "detectable_format:number_bullet_lists",
    "detectable_format:constrained_response",
    "detectable_format:number_highlighted_sections",
    "detectable_format:multiple_sections",
    "detectable_format:json_format",
    "detectable_format:title",
    "combination:two_responses",
    "combination:repeat_prompt",
    "startend:end_checker",
    "change_case:capital_word_frequency",
    "change_case:english_capital",
    "change_case:english_lowercase",
    "punctuation:no_comma",
    "startend:quotation",
];

/// The settings of one constraint.
struct Settings<'a> {
    id: &'a str,
    kwargs: &'a Map<String, Value>,
}

impl<'a> Settings<'a> {
    fn get(&self, key: &str) -> Result<&'a Value> {
        match self.kwargs.get(key) {
            Some(v) if !v.is_null() => Ok(v),
            _ => Err(self.wrong(&format!("needs `{key}`"))),
        }
    }

    fn wrong(&self, what: &str) -> crate::Error {
        bad(NAME, format!("{} {what}", self.id))
    }

    fn text(&self, key: &str) -> Result<&'a str> {
        let text = self.get(key)?.as_str();
        text.ok_or_else(|| self.wrong(&format!("needs text as `{key}`")))
    }

    fn count(&self, key: &str) -> Result<i64> {
        let v = self.get(key)?;
        // Tables turn whole numbers into 3.0.
        let whole = v.as_f64().filter(|x| x.fract() == 0.0 && x.abs() < 1e15);
        let n = v.as_i64().or(whole.map(|x| x as i64)).filter(|n| *n >= 0);
        n.ok_or_else(|| self.wrong(&format!("needs a whole number as `{key}`")))
    }

    fn size(&self, key: &str) -> Result<usize> {
        Ok(usize::try_from(self.count(key)?).unwrap_or(usize::MAX))
    }

    fn bound(&self, number: &str, relation: &str) -> Result<Bound> {
        let n = self.count(number)?;
        let less_than = match self.text(relation)? {
            "less than" => true,
            "at least" => false,
            other => {
                let what =
                    format!("has `{relation}` = \"{other}\"; use \"less than\" or \"at least\"");
                return Err(self.wrong(&what));
            }
        };
        Ok(Bound { n, less_than })
    }

    fn texts(&self, key: &str) -> Result<Vec<&'a str>> {
        let list = self.get(key)?.as_array();
        let texts: Option<Vec<&str>> = list.and_then(|l| l.iter().map(Value::as_str).collect());
        texts
            .filter(|t| !t.is_empty())
            .ok_or_else(|| self.wrong(&format!("needs a list of texts as `{key}`")))
    }
}

/// A keyword is a pattern there; one that is none is taken as it stands.
fn keyword(word: &str, around: &str) -> Result<Regex> {
    let build = |word: &str| {
        RegexBuilder::new(&format!("{around}{word}{around}"))
            .case_insensitive(true)
            .size_limit(1 << 20)
            .build()
    };
    build(word)
        .or_else(|_| build(&regex::escape(word)))
        .map_err(|e| bad(NAME, format!("the keyword `{word}`: {e}")))
}

fn keywords(words: &[&str], around: &str) -> Result<Vec<Regex>> {
    words.iter().map(|w| keyword(w, around)).collect()
}

fn lines(pattern: &str) -> Result<Regex> {
    RegexBuilder::new(pattern)
        .multi_line(true)
        .size_limit(1 << 20)
        .build()
        .map_err(|e| bad(NAME, e.to_string()))
}

impl Constraint {
    /// A constraint by its id and settings.
    ///
    /// # Errors
    /// When the id is unknown, or a setting is missing or makes no sense; the message names both.
    pub fn parse(id: &str, kwargs: &Map<String, Value>) -> Result<Self> {
        let s = Settings { id, kwargs };
        Ok(match id {
            "keywords:existence" => Self::Existence(keywords(&s.texts("keywords")?, "")?),
            "keywords:frequency" => Self::Frequency(
                keyword(s.text("keyword")?.trim(), "")?,
                s.bound("frequency", "relation")?,
            ),
            "keywords:forbidden_words" => {
                Self::Forbidden(keywords(&s.texts("forbidden_words")?, r"\b")?)
            }
            "keywords:letter_frequency" => {
                let mut letters = s.text("letter")?.chars();
                let (Some(letter), None) = (letters.next(), letters.next()) else {
                    return Err(s.wrong("needs one character as `letter`"));
                };
                let letter = letter.to_lowercase().next().unwrap_or(letter);
                Self::LetterFrequency(letter, s.bound("let_frequency", "let_relation")?)
            }
            "language:response_language" => {
                let code = s.text("language")?;
                if Tongue::named(code).is_none() {
                    return Err(s.wrong(&format!(
                        "asks for a language that cannot be told: `{code}`"
                    )));
                }
                Self::ResponseLanguage(code.into())
            }
            "length_constraints:number_sentences" => {
                Self::Sentences(s.bound("num_sentences", "relation")?)
            }
            "length_constraints:number_paragraphs" => Self::Paragraphs(s.size("num_paragraphs")?),
            "length_constraints:number_words" => Self::Words(s.bound("num_words", "relation")?),
            "length_constraints:nth_paragraph_first_word" => Self::NthParagraphFirstWord {
                paragraphs: s.size("num_paragraphs")?,
                nth: s.size("nth_paragraph")?,
                word: s.text("first_word")?.to_lowercase(),
            },
            "detectable_content:number_placeholders" => {
                Self::Placeholders(s.size("num_placeholders")?)
            }
            "detectable_content:postscript" => {
                let marker = s.text("postscript_marker")?.trim();
                Self::Postscript(match marker {
                    "P.P.S" => lines(r"\s*p\.\s?p\.\s?s.*$")?,
                    "P.S." => lines(r"\s*p\.\s?s\..*$")?,
                    other => {
                        let lower = other.to_lowercase();
                        lines(&format!(r"\s*{lower}.*$"))
                            .or_else(|_| lines(&format!(r"\s*{}.*$", regex::escape(&lower))))?
                    }
                })
            }
            "detectable_format:number_bullet_lists" => Self::BulletLists(s.size("num_bullets")?),
            "detectable_format:constrained_response" => Self::ConstrainedResponse,
            "detectable_format:number_highlighted_sections" => {
                Self::HighlightedSections(s.size("num_highlights")?)
            }
            "detectable_format:multiple_sections" => {
                let mark = s.text("section_spliter")?.trim();
                let split = |mark: &str| lines(&format!(r"\s?{mark}\s?\d+\s?"));
                let split = split(mark).or_else(|_| split(&regex::escape(mark)))?;
                Self::MultipleSections(split, s.size("num_sections")?)
            }
            "detectable_format:json_format" => Self::JsonFormat,
            "detectable_format:title" => Self::Title,
            "combination:two_responses" => Self::TwoResponses,
            "combination:repeat_prompt" => {
                Self::RepeatPrompt(s.text("prompt_to_repeat")?.trim().to_lowercase())
            }
            "startend:end_checker" => Self::EndPhrase(s.text("end_phrase")?.trim().to_lowercase()),
            "change_case:capital_word_frequency" => {
                Self::CapitalWords(s.bound("capital_frequency", "capital_relation")?)
            }
            "change_case:english_capital" => Self::EnglishCapital,
            "change_case:english_lowercase" => Self::EnglishLowercase,
            "punctuation:no_comma" => Self::NoComma,
            "startend:quotation" => Self::Quotation,
            unknown => {
                return Err(bad(
                    NAME,
                    format!(
                        "`{unknown}` is no constraint of IFEval; the ids are listed in docs/verifiers.md"
                    ),
                ));
            }
        })
    }

    /// Whether a completion keeps it. An empty one keeps none.
    #[must_use]
    pub fn kept(&self, text: &str, mode: Mode) -> bool {
        let strict = |t: &str| !t.trim().is_empty() && self.follows(t);
        match mode {
            Mode::Strict => strict(text),
            Mode::Loose => loosened(text).iter().any(|t| strict(t)),
        }
    }

    fn follows(&self, text: &str) -> bool {
        match self {
            Self::Existence(all) => all.iter().all(|k| k.is_match(text)),
            Self::Frequency(k, bound) => bound.holds(k.find_iter(text).count()),
            Self::Forbidden(all) => !all.iter().any(|k| k.is_match(text)),
            Self::LetterFrequency(letter, bound) => {
                bound.holds(text.to_lowercase().chars().filter(|c| c == letter).count())
            }
            // A text without letters counts as kept, as published.
            Self::ResponseLanguage(code) => {
                Tongue::of(text).is_none_or(|found| Some(found) == Tongue::named(code))
            }
            Self::Sentences(bound) => bound.holds(sentences(text)),
            Self::Paragraphs(n) => paragraphs(text) == Some(*n),
            Self::Words(bound) => bound.holds(words(text).count()),
            Self::NthParagraphFirstWord {
                paragraphs,
                nth,
                word,
            } => nth_first_word(text, *paragraphs, *nth, word),
            Self::Placeholders(n) => PLACEHOLDER.find_iter(text).count() >= *n,
            Self::Postscript(pattern) => pattern.is_match(&text.to_lowercase()),
            Self::BulletLists(n) => {
                STAR_BULLET.find_iter(text).count() + DASH_BULLET.find_iter(text).count() == *n
            }
            Self::ConstrainedResponse => {
                let options = [
                    "My answer is yes.",
                    "My answer is no.",
                    "My answer is maybe.",
                ];
                options.iter().any(|o| text.contains(o))
            }
            Self::HighlightedSections(n) => highlights(text) >= *n,
            Self::MultipleSections(split, n) => split.find_iter(text).count() >= *n,
            Self::JsonFormat => is_json(text),
            Self::Title => TITLE.find_iter(text).any(|m| {
                !m.as_str()
                    .trim_start_matches('<')
                    .trim_end_matches('>')
                    .trim()
                    .is_empty()
            }),
            Self::TwoResponses => two_responses(text),
            Self::RepeatPrompt(prompt) => text.trim().to_lowercase().starts_with(prompt),
            Self::EndPhrase(phrase) => text
                .trim()
                .trim_matches('"')
                .to_lowercase()
                .ends_with(phrase),
            Self::CapitalWords(bound) => bound.holds(
                tokens(text)
                    .filter(|w| has_only_case(w, char::is_uppercase))
                    .count(),
            ),
            Self::EnglishCapital => has_only_case(text, char::is_uppercase) && is_english(text),
            Self::EnglishLowercase => has_only_case(text, char::is_lowercase) && is_english(text),
            Self::NoComma => !text.contains(','),
            Self::Quotation => {
                let text = text.trim();
                text.len() > 1 && text.starts_with('"') && text.ends_with('"')
            }
        }
    }
}

/// What loose checking tries: the text, and the text without its first line, last line or both; each with and
/// without asterisks.
fn loosened(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.split('\n').collect();
    let n = lines.len();
    let cut = |from: usize, to: usize| {
        lines
            .get(from..to)
            .unwrap_or(&[])
            .join("\n")
            .trim()
            .to_owned()
    };
    let kept = [
        text.to_owned(),
        cut(1, n),
        cut(0, n - 1),
        cut(1, n.saturating_sub(1)),
    ];
    let plain: Vec<String> = kept.iter().map(|t| t.replace('*', "")).collect();
    kept.into_iter().chain(plain).collect()
}

static PLACEHOLDER: LazyLock<Regex> = LazyLock::new(|| fixed(r"\[.*?\]"));
static STAR_BULLET: LazyLock<Regex> = LazyLock::new(|| fixed(r"(?m)^\s*\*[^*].*$"));
static DASH_BULLET: LazyLock<Regex> = LazyLock::new(|| fixed(r"(?m)^\s*-.*$"));
static HIGHLIGHT: LazyLock<Regex> = LazyLock::new(|| fixed(r"\*[^\n*]*\*"));
static DOUBLE_HIGHLIGHT: LazyLock<Regex> = LazyLock::new(|| fixed(r"\*\*[^\n*]*\*\*"));
static DIVIDER: LazyLock<Regex> = LazyLock::new(|| fixed(r"\s?\*\*\*\s?"));
static TITLE: LazyLock<Regex> = LazyLock::new(|| fixed(r"<<[^\n]+>>"));

/// Paragraphs between dividers; none when one in the middle is empty.
fn paragraphs(text: &str) -> Option<usize> {
    let parts: Vec<&str> = DIVIDER.split(text).collect();
    let empty = |p: &&str| p.trim().is_empty();
    let inner = parts.get(1..parts.len() - 1).unwrap_or(&[]);
    if inner.iter().any(empty) {
        return None;
    }
    Some(parts.iter().filter(|p| !empty(p)).count())
}

fn nth_first_word(text: &str, expected: usize, nth: usize, word: &str) -> bool {
    let parts: Vec<&str> = text.split("\n\n").collect();
    let full = parts.iter().filter(|p| !p.trim().is_empty()).count();
    if nth == 0 || nth > full {
        return false;
    }
    let Some(first) = parts.get(nth - 1).and_then(|p| p.split_whitespace().next()) else {
        return false;
    };
    let first = first.trim_start_matches('\'').trim_start_matches('"');
    let first = first
        .split(['.', ',', '?', '!', '\'', '"'])
        .next()
        .unwrap_or("");
    full == expected && first.to_lowercase() == word
}

fn highlights(text: &str) -> usize {
    let single = HIGHLIGHT
        .find_iter(text)
        .filter(|m| !m.as_str().trim_matches('*').trim().is_empty());
    let double = DOUBLE_HIGHLIGHT.find_iter(text).filter(|m| {
        let inside = m
            .as_str()
            .strip_prefix("**")
            .and_then(|s| s.strip_suffix("**"));
        inside.is_some_and(|s| !s.trim().is_empty())
    });
    single.count() + double.count()
}

fn is_json(text: &str) -> bool {
    let text = text.trim();
    let text = ["```json", "```Json", "```JSON", "```"]
        .iter()
        .fold(text, |t, mark| t.strip_prefix(mark).unwrap_or(t));
    let text = text.strip_suffix("```").unwrap_or(text).trim();
    serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok()
}

fn two_responses(text: &str) -> bool {
    let parts: Vec<&str> = text.split("******").collect();
    let last = parts.len() - 1;
    let mut found = Vec::new();
    for (i, part) in parts.iter().enumerate() {
        if !part.trim().is_empty() {
            found.push(part.trim());
        } else if i != 0 && i != last {
            return false;
        }
    }
    matches!(found[..], [a, b] if a != b)
}

/// Whether a text has letters with case, and all in one: Python's `isupper` and `islower`.
fn has_only_case(text: &str, wanted: fn(char) -> bool) -> bool {
    let mut cased = text
        .chars()
        .filter(|c| c.is_uppercase() || c.is_lowercase())
        .peekable();
    cased.peek().is_some() && cased.all(wanted)
}

fn is_english(text: &str) -> bool {
    Tongue::of(text).is_none_or(|t| Some(t) == Tongue::named("en"))
}

/// Words as the Penn Treebank's tokenizer splits them, as far as capitals can tell the difference: at white
/// space, at punctuation other than hyphens and full stops inside, and before contracted endings.
fn tokens(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c.is_whitespace() || ",;:@#$%&?!()[]{}<>\"“”`*".contains(c))
        .flat_map(|w| w.split("--"))
        .flat_map(|w| {
            let w = w.trim_matches('\'');
            let at = contraction(w).unwrap_or(w.len());
            let (stem, ending) = w.split_at(at);
            [stem, ending]
        })
        .filter(|w| !w.is_empty())
}

/// Where a contracted ending begins: 's, 'm, 'd, 'll, 're, 've, n't.
fn contraction(word: &str) -> Option<usize> {
    static ENDINGS: LazyLock<HashMap<&str, usize>> = LazyLock::new(|| {
        HashMap::from([
            ("s", 0),
            ("m", 0),
            ("d", 0),
            ("ll", 0),
            ("re", 0),
            ("ve", 0),
            ("t", 1),
        ])
    });
    let at = word.rfind('\'')?;
    let before = *ENDINGS.get(word[at + 1..].to_lowercase().as_str())?;
    if before == 1 && !word[..at].ends_with(['n', 'N']) {
        return None;
    }
    Some(at - before)
}
