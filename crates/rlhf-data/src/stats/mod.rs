//! What a data file is like: lengths, what the preference follows besides quality, agreement, scores.
//!
//! Invariant: one pass in bounded memory, the judgements of named annotators apart; no number is NaN or
//! infinite.

mod agreement;
mod format;
mod html;
mod length;
mod show;
mod sketch;

use std::path::Path;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::check::{Purpose, digest, values::SCORES};
use crate::conversation::Text;
use crate::error::{Error, Result};
use crate::rate::Rate;
use crate::record::{
    Fault, PreferenceRecord, PromptRecord, RankedRecord, RatedRecord, Record, SftRecord,
    StepwiseRecord, UnpairedRecord,
};
use crate::source;
use crate::text_stats::word_count;
use crate::tokenize::ChatTokenizer;

use agreement::Judgements;
use format::Format;
use sketch::Sketch;

pub use agreement::{Agreement, cohen_kappa, fleiss_kappa};
pub use format::FormatBias;
pub use length::LengthModel;
pub use sketch::{Histogram, Summary};

/// Statistics of a file.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Stats {
    /// What it was read as.
    pub purpose: Purpose,
    /// Rows.
    pub rows: u64,
    /// The unit of lengths in `preference`: `tokens`, or `characters` without a tokenizer.
    pub unit: &'static str,
    /// Lengths of each column; `turn` is one message of a conversation.
    pub lengths: Vec<Lengths>,
    /// Messages a row, prompt and completion together, where there are conversations.
    pub turns: Option<Summary>,
    /// Completions or steps a row, of rankings and solutions in steps.
    pub items: Option<Summary>,
    /// Share of good completions, of thumbs; of right steps, of solutions in steps.
    pub good: Option<Rate>,
    /// What the preference follows, for pairs; for rankings between the best and each worse completion.
    pub preference: Option<PreferenceStats>,
    /// Columns of scores, and ratings by attribute: `ratings.helpfulness`.
    pub scores: Vec<Scores>,
    /// Agreement, where rows have a column `annotator`.
    pub agreement: Option<Agreement>,
}

/// Lengths of a column.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Lengths {
    /// The column.
    pub column: String,
    /// In characters.
    pub characters: Summary,
    /// In words, as of [`crate::text_stats::words`].
    pub words: Summary,
    /// In tokens of the text alone, without the template's.
    pub tokens: Option<Summary>,
}

impl Lengths {
    /// In `unit`.
    fn of(&self, unit: &str) -> &Summary {
        self.tokens
            .as_ref()
            .filter(|_| unit == "tokens")
            .unwrap_or(&self.characters)
    }
}

/// A column of scores.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Scores {
    /// The column.
    pub column: String,
    /// Its values; those of lists one by one.
    pub values: Summary,
}

/// What the preference follows besides quality.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PreferenceStats {
    /// Share of pairs whose chosen completion is the longer, ties half.
    pub chosen_longer: Rate,
    /// Mean of log(length of chosen / length of rejected); 0 is no bias, 0.69 twice as long.
    pub mean_log_length_ratio: f64,
    /// Length as the only feature; nothing without pairs.
    pub length_model: Option<LengthModel>,
    /// Share of pairs whose chosen completion was shown first, where a column `position` (where the
    /// chosen one stood) or `first` (which one was first) says so: `a`, `0`, `first`, `chosen` against
    /// `b`, `1`, `second`, `rejected`.
    pub chosen_first: Option<Rate>,
    /// Marks of form.
    pub format: Vec<FormatBias>,
}

/// Statistics of a file read for a purpose; with a tokenizer also in tokens.
///
/// # Errors
/// When the file cannot be read, or a row is no such record.
pub fn stats(path: &Path, purpose: Purpose, tokenizer: Option<&ChatTokenizer>) -> Result<Stats> {
    let mut all = Collector::new(tokenizer);
    for row in source::rows(path)? {
        let row = row?;
        all.rows += 1;
        all.scores(&row.columns);
        let extra = Extra::of(&row.columns);
        let (place, columns) = (row.place.as_str(), row.columns);
        let at = |f: Fault| Error::Row {
            path: path.to_owned(),
            place: place.to_owned(),
            column: f.column,
            what: f.what,
            mend: f.mend,
        };
        match purpose {
            Purpose::Sft => all.sft(&SftRecord::from_row(columns).map_err(at)?, extra)?,
            Purpose::Preference => {
                all.preference(&PreferenceRecord::from_row(columns).map_err(at)?, extra)?;
            }
            Purpose::Ranked => all.ranked(&RankedRecord::from_row(columns).map_err(at)?)?,
            Purpose::Unpaired => {
                all.unpaired(&UnpairedRecord::from_row(columns).map_err(at)?, extra)?;
            }
            Purpose::Stepwise => all.stepwise(&StepwiseRecord::from_row(columns).map_err(at)?)?,
            Purpose::Rated => all.rated(&RatedRecord::from_row(columns).map_err(at)?, extra)?,
            Purpose::Prompts => {
                let r = PromptRecord::from_row(columns).map_err(at)?;
                all.texts(&[("prompt", &r.prompt)])?;
                all.judge(extra, &[&r.prompt.joined()], None);
            }
        }
    }
    Ok(all.stats(purpose))
}

/// Columns of scores that are looked at, the first ones.
const MAX_SCORES: usize = 64;

/// Columns beside the record's own.
struct Extra {
    item: Option<String>,
    annotator: Option<String>,
    label: Option<String>,
    chosen_first: Option<bool>,
}

/// A cell as text, as a person would write it.
fn cell(v: &Value) -> Option<String> {
    match v {
        Value::Null => None,
        Value::String(s) => Some(s.clone()),
        other => Some(other.to_string()),
    }
}

impl Extra {
    fn of(row: &Map<String, Value>) -> Self {
        let of = |column: &str| row.get(column).and_then(cell);
        let side = of("position").or_else(|| of("first"));
        let chosen_first = side.and_then(|s| match s.trim().to_lowercase().as_str() {
            "a" | "0" | "first" | "chosen" => Some(true),
            "b" | "1" | "second" | "rejected" => Some(false),
            _ => None,
        });
        Self {
            item: of("item"),
            annotator: of("annotator"),
            label: of("label"),
            chosen_first,
        }
    }
}

/// Lengths as they come.
#[derive(Default)]
struct LengthSketches {
    characters: Sketch,
    words: Sketch,
    tokens: Sketch,
}

/// Everything as it comes.
struct Collector<'a> {
    tokenizer: Option<&'a ChatTokenizer>,
    rows: u64,
    lengths: Vec<(&'static str, LengthSketches)>,
    turns: Sketch,
    scores: Vec<(String, Sketch)>,
    items: Sketch,
    labelled: u64,
    good: u64,
    pairs: u64,
    longer: f64,
    ratios: Sketch,
    placed: u64,
    first: u64,
    format: Format,
    judgements: Judgements,
}

impl<'a> Collector<'a> {
    fn new(tokenizer: Option<&'a ChatTokenizer>) -> Self {
        Self {
            tokenizer,
            rows: 0,
            lengths: Vec::new(),
            turns: Sketch::default(),
            scores: Vec::new(),
            items: Sketch::default(),
            labelled: 0,
            good: 0,
            pairs: 0,
            longer: 0.0,
            ratios: Sketch::default(),
            placed: 0,
            first: 0,
            format: Format::default(),
            judgements: Judgements::default(),
        }
    }

    /// Counts a text for a column and gives its length in tokens, else in characters.
    fn text(&mut self, column: &'static str, text: &str) -> Result<usize> {
        let characters = text.chars().count();
        let tokens = match self.tokenizer {
            Some(t) => Some(t.encode(text)?.len()),
            None => None,
        };
        let at = match self.lengths.iter().position(|(c, _)| *c == column) {
            Some(at) => at,
            None => {
                self.lengths.push((column, LengthSketches::default()));
                self.lengths.len() - 1
            }
        };
        if let Some((_, l)) = self.lengths.get_mut(at) {
            l.characters.add(characters as f64);
            l.words.add(word_count(text) as f64);
            if let Some(n) = tokens {
                l.tokens.add(n as f64);
            }
        }
        Ok(tokens.unwrap_or(characters))
    }

    /// Counts the columns of one row and gives their lengths.
    fn texts(&mut self, texts: &[(&'static str, &Text)]) -> Result<Vec<usize>> {
        let mut turns = 0;
        for (column, text) in texts {
            if let Text::Messages(m) = text {
                // Both completions of a pair are the same turn.
                turns += if *column == "rejected" { 0 } else { m.len() };
            }
        }
        if turns > 0 {
            self.turns.add(turns as f64);
        }
        let lengths = texts
            .iter()
            .map(|(column, text)| self.text(column, &text.joined()))
            .collect();
        for (_, text) in texts {
            if let Text::Messages(messages) = text
                && turns > 1
            {
                for m in messages {
                    self.text("turn", &m.content)?;
                }
            }
        }
        lengths
    }

    fn scores(&mut self, row: &Map<String, Value>) {
        for column in SCORES {
            let Some(value) = row.get(column).filter(|v| !v.is_null()) else {
                continue;
            };
            let mut numbers = Vec::new();
            // Parquet holds objects as JSON text.
            let read = value.as_str().and_then(|s| serde_json::from_str(s).ok());
            if let Value::Object(attributes) = read.as_ref().unwrap_or(value) {
                for (name, value) in attributes {
                    numbers.clear();
                    flatten(value, &mut numbers);
                    self.score(&format!("{column}.{name}"), &numbers);
                }
            } else {
                flatten(value, &mut numbers);
                self.score(column, &numbers);
            }
        }
    }

    /// Counts values of a column, of at most [`MAX_SCORES`] columns.
    fn score(&mut self, column: &str, numbers: &[f64]) {
        if numbers.is_empty() {
            return;
        }
        let at = match self.scores.iter().position(|(c, _)| c == column) {
            Some(at) => at,
            None if self.scores.len() == MAX_SCORES => return,
            None => {
                self.scores.push((column.to_owned(), Sketch::default()));
                self.scores.len() - 1
            }
        };
        if let Some((_, sketch)) = self.scores.get_mut(at) {
            numbers.iter().for_each(|x| sketch.add(*x));
        }
    }

    fn sft(&mut self, r: &SftRecord, extra: Extra) -> Result<()> {
        match &r.prompt {
            Some(p) => {
                self.texts(&[("prompt", p), ("completion", &r.completion)])?;
                self.judge(extra, &[&p.joined(), &r.completion.joined()], None);
            }
            None => {
                self.texts(&[("completion", &r.completion)])?;
                self.judge(extra, &[&r.completion.joined()], None);
            }
        }
        Ok(())
    }

    fn preference(&mut self, r: &PreferenceRecord, extra: Extra) -> Result<()> {
        let lengths = self.texts(&[
            ("prompt", &r.prompt),
            ("chosen", &r.chosen),
            ("rejected", &r.rejected),
        ])?;
        let [prompt, chosen, rejected] = [&r.prompt, &r.chosen, &r.rejected].map(Text::joined);
        if let [_, c, j] = lengths[..] {
            self.pair((c, &chosen), (j, &rejected));
        }
        if let Some(first) = extra.chosen_first {
            self.placed += 1;
            self.first += u64::from(first);
        }
        let (a, b) = (chosen.as_str(), rejected.as_str());
        let preferred = if a < b { "first" } else { "second" };
        self.judge(extra, &[&prompt, a.min(b), a.max(b)], Some(preferred));
        Ok(())
    }

    /// Counts a better and a worse completion, each with its length.
    fn pair(&mut self, (longer, chosen): (usize, &str), (shorter, rejected): (usize, &str)) {
        self.pairs += 1;
        self.longer += match longer.cmp(&shorter) {
            std::cmp::Ordering::Greater => 1.0,
            std::cmp::Ordering::Equal => 0.5,
            std::cmp::Ordering::Less => 0.0,
        };
        // A text may have no tokens, never no characters.
        self.ratios
            .add((longer.max(1) as f64).ln() - (shorter.max(1) as f64).ln());
        self.format.add(chosen, rejected);
    }

    fn ranked(&mut self, r: &RankedRecord) -> Result<()> {
        self.texts(&[("prompt", &r.prompt)])?;
        self.items.add(r.completions.len() as f64);
        let mut texts = Vec::with_capacity(r.completions.len());
        for c in &r.completions {
            let text = c.joined();
            texts.push((self.text("completion", &text)?, text));
        }
        let worth = r.worth();
        let Some(top) = worth.iter().copied().max_by(f64::total_cmp) else {
            return Ok(());
        };
        let best = worth.iter().position(|w| *w >= top);
        if let Some((length, text)) = best.and_then(|i| texts.get(i)) {
            for (_, (n, other)) in worth.iter().zip(&texts).filter(|(w, _)| **w < top) {
                self.pair((*length, text), (*n, other));
            }
        }
        Ok(())
    }

    fn unpaired(&mut self, r: &UnpairedRecord, extra: Extra) -> Result<()> {
        let column = if r.label {
            "completion, good"
        } else {
            "completion, bad"
        };
        self.texts(&[("prompt", &r.prompt), (column, &r.completion)])?;
        self.labelled += 1;
        self.good += u64::from(r.label);
        self.judge(extra, &[&r.prompt.joined(), &r.completion.joined()], None);
        Ok(())
    }

    fn stepwise(&mut self, r: &StepwiseRecord) -> Result<()> {
        self.texts(&[("prompt", &r.prompt)])?;
        self.items.add(r.completions.len() as f64);
        for (step, right) in r.completions.iter().zip(&r.labels) {
            self.text(if *right { "step, right" } else { "step, wrong" }, step)?;
            self.labelled += 1;
            self.good += u64::from(*right);
        }
        Ok(())
    }

    fn rated(&mut self, r: &RatedRecord, extra: Extra) -> Result<()> {
        self.texts(&[("prompt", &r.prompt), ("completion", &r.completion)])?;
        self.judge(extra, &[&r.prompt.joined(), &r.completion.joined()], None);
        Ok(())
    }

    /// Counts a judgement of an annotator: its label, else `preferred`. The item is what the column
    /// says, else the texts themselves.
    fn judge(&mut self, extra: Extra, texts: &[&str], preferred: Option<&str>) {
        let Some(annotator) = extra.annotator else {
            return;
        };
        let Some(label) = extra.label.or_else(|| preferred.map(str::to_owned)) else {
            return;
        };
        let item = match &extra.item {
            Some(item) => digest([item.as_str()]),
            None => digest(texts.iter().copied()),
        };
        let annotator = digest([annotator.as_str()]);
        self.judgements.add(item, annotator, label);
    }

    fn stats(self, purpose: Purpose) -> Stats {
        let lengths = self
            .lengths
            .iter()
            .map(|(column, l)| Lengths {
                column: (*column).to_owned(),
                characters: l.characters.summary(),
                words: l.words.summary(),
                tokens: self.tokenizer.map(|_| l.tokens.summary()),
            })
            .collect();
        let compared = matches!(purpose, Purpose::Preference | Purpose::Ranked);
        let preference = compared.then(|| {
            let ratios: Vec<(f64, u64)> = self.ratios.cells().collect();
            PreferenceStats {
                chosen_longer: Rate::wilson(self.longer, self.pairs),
                mean_log_length_ratio: self.ratios.summary().mean,
                length_model: LengthModel::fit(&ratios),
                chosen_first: (self.placed > 0)
                    .then(|| Rate::wilson(self.first as f64, self.placed)),
                format: self.format.biases(),
            }
        });
        let some = |s: Summary| (s.n > 0).then_some(s);
        Stats {
            purpose,
            rows: self.rows,
            unit: if self.tokenizer.is_some() {
                "tokens"
            } else {
                "characters"
            },
            lengths,
            turns: some(self.turns.summary()),
            items: some(self.items.summary()),
            good: (self.labelled > 0).then(|| Rate::wilson(self.good as f64, self.labelled)),
            preference,
            scores: self
                .scores
                .iter()
                .map(|(column, s)| Scores {
                    column: column.clone(),
                    values: s.summary(),
                })
                .collect(),
            agreement: self.judgements.agreement(),
        }
    }
}

/// The numbers of a cell, those of lists one by one; text that names a number counts too.
fn flatten(v: &Value, out: &mut Vec<f64>) {
    match v {
        Value::Number(n) => out.extend(n.as_f64()),
        Value::String(s) => out.extend(s.trim().parse::<f64>().ok()),
        Value::Array(list) => list.iter().for_each(|v| flatten(v, out)),
        Value::Object(map) => map.values().for_each(|v| flatten(v, out)),
        Value::Null | Value::Bool(_) => {}
    }
}
