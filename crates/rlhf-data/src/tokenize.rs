//! From records to token ids: templates, prompts as exact prefixes, trained ranges, limits.
//!
//! Invariants: a prompt's ids are a prefix of its conversation's ids; the name of a special token inside
//! a message never becomes that token; truncation never invents an end-of-sequence token and never
//! leaves a completion empty; every row that is dropped or truncated is counted.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use tokenizers::Tokenizer;

use crate::chat_template::{ChatTemplate, Rendered, split_last_answer};
use crate::conversation::{Message, Text};
use crate::error::{Error, Result};
use crate::group::{Completion, Finish, PromptGroup};
use crate::record::{PreferenceRecord, SftRecord};

/// Lengths in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// A row with a longer prompt is dropped.
    pub max_prompt: usize,
    /// A longer completion is truncated at its end.
    pub max_completion: usize,
}

/// Why a row is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DropReason {
    /// The prompt is longer than the limit.
    PromptTooLong,
    /// A completion has no trained token.
    NothingTrained,
    /// Chosen and rejected have the same ids (perhaps after truncation).
    Identical,
    /// The prompt's ids are no prefix of the conversation's ids.
    NoPrefix,
}

impl fmt::Display for DropReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PromptTooLong => "prompt too long",
            Self::NothingTrained => "nothing to train",
            Self::Identical => "chosen equals rejected",
            Self::NoPrefix => "the prompt is no token prefix",
        })
    }
}

/// A row that is kept, perhaps truncated, or dropped.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome<T> {
    /// Used.
    Kept(T),
    /// Used, with a completion cut to the limit.
    Truncated(T),
    /// Not used.
    Dropped(DropReason),
}

/// Counts of a tokenised table.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct TokenizeReport {
    /// Rows with a truncated completion.
    pub truncated: usize,
    /// Dropped rows by reason: how many, and the first few.
    pub dropped: BTreeMap<DropReason, Dropped>,
}

/// Dropped rows of one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// How many.
    pub count: usize,
    /// The first few.
    pub first_rows: Vec<u64>,
}

impl TokenizeReport {
    /// Counts a dropped row.
    pub fn drop(&mut self, row: u64, reason: DropReason) {
        let d = self.dropped.entry(reason).or_default();
        d.count += 1;
        if d.first_rows.len() < 5 {
            d.first_rows.push(row);
        }
    }
}

impl fmt::Display for TokenizeReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        if self.truncated > 0 {
            parts.push(format!("{} truncated", self.truncated));
        }
        for (reason, d) in &self.dropped {
            parts.push(format!(
                "{} dropped ({reason}; first rows {:?})",
                d.count, d.first_rows
            ));
        }
        f.write_str(&if parts.is_empty() {
            "all rows kept".to_owned()
        } else {
            parts.join(", ")
        })
    }
}

/// A tokenizer with its chat template.
#[derive(Clone, Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    /// Reads the names of special tokens as plain text.
    literal: Tokenizer,
    template: Option<ChatTemplate>,
    place: String,
    eos_ids: Vec<u32>,
    vocab_size: usize,
}

impl ChatTokenizer {
    /// Loads `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja` and
    /// `generation_config.json` of a folder, those that exist; only the first must. `strftime_now` of
    /// the template gives today's date (UTC).
    ///
    /// # Errors
    /// When a file is unreadable, damaged, or has wrong content.
    pub fn load(dir: &Path) -> Result<Self> {
        Self::load_dated(dir, today())
    }

    /// [`ChatTokenizer::load`] with the date, as (year, month, day), that templates ask for.
    ///
    /// # Errors
    /// As [`ChatTokenizer::load`].
    pub fn load_dated(dir: &Path, date: (i32, u32, u32)) -> Result<Self> {
        let file = dir.join("tokenizer.json");
        if !file.is_file() {
            return Err(Error::file(
                &file,
                "no such file",
                "name a folder with tokenizer.json",
            ));
        }
        let bytes = std::fs::read(&file).map_err(Error::io(&file))?;
        let tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| {
            Error::file(
                &file,
                format!("no readable tokenizer: {e}"),
                "get the file again",
            )
        })?;
        let config = json(&dir.join("tokenizer_config.json"))?;
        let generation = json(&dir.join("generation_config.json"))?;
        let added = tokenizer.get_added_tokens_decoder();
        let mut special: Vec<String> = added
            .values()
            .filter(|t| t.special)
            .map(|t| t.content.clone())
            .collect();
        special.sort_by_key(|t| std::cmp::Reverse(t.len()));
        let template = ChatTemplate::of_folder(dir, &config, special, date)?;
        let vocab_size = tokenizer
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |m| *m as usize + 1);
        let eos_ids = eos_ids(&tokenizer, &config, &generation);
        let mut literal = tokenizer.clone();
        literal.set_encode_special_tokens(true);
        Ok(Self {
            tokenizer,
            literal,
            template,
            place: dir.display().to_string(),
            eos_ids,
            vocab_size,
        })
    }

    /// The largest id plus one.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The ids that end a completion.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// Whether there is a chat template.
    #[must_use]
    pub fn has_template(&self) -> bool {
        self.template.is_some()
    }

    /// The template.
    ///
    /// # Errors
    /// When there is none.
    pub fn template(&self) -> Result<&ChatTemplate> {
        self.template.as_ref().ok_or_else(|| Error::Template {
            place: self.place.clone(),
            what: "there is none, and the data holds messages".into(),
            mend: "add chat_template.jinja to the folder, or use plain text".into(),
        })
    }

    /// Ids of plain text, with whatever the tokenizer itself puts around it (a beginning-of-sequence
    /// token, say). Names of special tokens stay plain text.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        Ok(self
            .literal
            .encode_fast(text, true)
            .map_err(|e| self.failed(&e))?
            .get_ids()
            .to_vec())
    }

    /// Text of ids; special tokens are left out if `skip_special`.
    ///
    /// # Errors
    /// When the tokenizer fails.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String> {
        self.tokenizer
            .decode(ids, skip_special)
            .map_err(|e| self.failed(&e))
    }

    /// The text of each id by itself, special tokens by name; for display.
    #[must_use]
    pub fn pieces(&self, ids: &[u32]) -> Vec<String> {
        // A piece is what an id adds to the text so far, so that spaces and split characters are right.
        let mut pieces = Vec::with_capacity(ids.len());
        let mut before = String::new();
        for end in 1..=ids.len() {
            let start = end.saturating_sub(8);
            let base = if start == 0 {
                before.clone()
            } else {
                self.tokenizer
                    .decode(&ids[start..end - 1], false)
                    .unwrap_or_default()
            };
            let all = self
                .tokenizer
                .decode(&ids[start..end], false)
                .unwrap_or_default();
            pieces.push(all.strip_prefix(base.as_str()).unwrap_or(&all).to_owned());
            before = all;
        }
        pieces
    }

    /// Ids of a prompt: a conversation up to where the assistant begins, or plain text.
    ///
    /// # Errors
    /// When there are messages and no template, or the template refuses them.
    pub fn prompt_ids(&self, prompt: &Text) -> Result<Vec<u32>> {
        match prompt {
            Text::Plain(s) => self.encode(s),
            Text::Messages(m) => Ok(self.encode_rendered(&self.template()?.render(m, true)?)?.0),
        }
    }

    /// A demonstration as a group with one completion.
    ///
    /// With a template that marks what the model generates, those parts are trained; otherwise the last
    /// assistant turn is. What follows the last end-of-sequence token is left out.
    ///
    /// # Errors
    /// When the template or the tokenizer fails.
    pub fn sft_group(
        &self,
        row: u64,
        record: &SftRecord,
        limits: &Limits,
    ) -> Result<Outcome<PromptGroup>> {
        let split = match (&record.prompt, &record.completion) {
            (Some(prompt), completion) => self.prompt_and_completion(prompt, completion)?,
            (None, Text::Plain(text)) => {
                let mut ids = self.encode(text)?;
                self.close(&mut ids);
                Some((Vec::new(), ids))
            }
            (None, Text::Messages(messages)) => {
                if self.template()?.marks_generation() {
                    return self.marked_group(row, messages, limits);
                }
                match split_last_answer(messages) {
                    Some((before, from)) => self.conversation(before, &from[..1])?,
                    None => return Ok(Outcome::Dropped(DropReason::NothingTrained)),
                }
            }
        };
        let Some((prompt, ids)) = split else {
            return Ok(Outcome::Dropped(DropReason::NoPrefix));
        };
        if prompt.len() > limits.max_prompt {
            return Ok(Outcome::Dropped(DropReason::PromptTooLong));
        }
        let (completion, cut) = self.completion(ids, limits);
        // Without a prompt nothing predicts the first token.
        if completion.ids.len() < 1 + usize::from(prompt.is_empty()) {
            return Ok(Outcome::Dropped(DropReason::NothingTrained));
        }
        let group = PromptGroup {
            row,
            prompt,
            completions: vec![completion],
        };
        Ok(if cut {
            Outcome::Truncated(group)
        } else {
            Outcome::Kept(group)
        })
    }

    /// A preference pair as a group: completion 0 chosen, 1 rejected.
    ///
    /// # Errors
    /// When the template or the tokenizer fails.
    pub fn preference_group(
        &self,
        row: u64,
        record: &PreferenceRecord,
        limits: &Limits,
    ) -> Result<Outcome<PromptGroup>> {
        let chosen = self.prompt_and_completion(&record.prompt, &record.chosen)?;
        let rejected = self.prompt_and_completion(&record.prompt, &record.rejected)?;
        let (Some((prompt, chosen)), Some((other, rejected))) = (chosen, rejected) else {
            return Ok(Outcome::Dropped(DropReason::NoPrefix));
        };
        if prompt != other {
            return Ok(Outcome::Dropped(DropReason::NoPrefix));
        }
        if prompt.len() > limits.max_prompt {
            return Ok(Outcome::Dropped(DropReason::PromptTooLong));
        }
        let ((chosen, cut_c), (rejected, cut_r)) = (
            self.completion(chosen, limits),
            self.completion(rejected, limits),
        );
        if chosen.ids.is_empty() || rejected.ids.is_empty() {
            return Ok(Outcome::Dropped(DropReason::NothingTrained));
        }
        if chosen.ids == rejected.ids {
            return Ok(Outcome::Dropped(DropReason::Identical));
        }
        let group = PromptGroup {
            row,
            prompt,
            completions: vec![chosen, rejected],
        };
        Ok(if cut_c || cut_r {
            Outcome::Truncated(group)
        } else {
            Outcome::Kept(group)
        })
    }

    /// All demonstrations, in order, in parallel.
    ///
    /// # Errors
    /// The first row's error.
    pub fn sft_groups(
        &self,
        records: &[SftRecord],
        limits: &Limits,
    ) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
        collect(records, |row, r| self.sft_group(row, r, limits))
    }

    /// All preference pairs, in order, in parallel.
    ///
    /// # Errors
    /// The first row's error.
    pub fn preference_groups(
        &self,
        records: &[PreferenceRecord],
        limits: &Limits,
    ) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
        collect(records, |row, r| self.preference_group(row, r, limits))
    }

    /// Ids of a prompt and of its completion, or `None` when the prompt is no prefix of both together.
    fn prompt_and_completion(
        &self,
        prompt: &Text,
        completion: &Text,
    ) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
        match (prompt, completion) {
            (Text::Messages(p), Text::Messages(c)) => self.conversation(p, c),
            (p, c) => {
                let (p, c) = (p.joined(), c.joined());
                let prompt = self.encode(&p)?;
                let whole = self.encode(&(p + &c))?;
                Ok(whole
                    .strip_prefix(prompt.as_slice())
                    .map(<[u32]>::to_vec)
                    .map(|mut completion| {
                        self.close(&mut completion);
                        (prompt, completion)
                    }))
            }
        }
    }

    fn conversation(
        &self,
        before: &[Message],
        answer: &[Message],
    ) -> Result<Option<(Vec<u32>, Vec<u32>)>> {
        let template = self.template()?;
        let prompt = self.encode_rendered(&template.render(before, true)?)?.0;
        let all: Vec<Message> = before.iter().chain(answer).cloned().collect();
        let whole = self.encode_rendered(&template.render(&all, false)?)?.0;
        Ok(whole.strip_prefix(prompt.as_slice()).map(|rest| {
            let end = rest
                .iter()
                .rposition(|id| self.eos_ids.contains(id))
                .map_or(rest.len(), |i| i + 1);
            (prompt.clone(), rest[..end].to_vec())
        }))
    }

    fn marked_group(
        &self,
        row: u64,
        messages: &[Message],
        limits: &Limits,
    ) -> Result<Outcome<PromptGroup>> {
        let rendered = self.template()?.render(messages, false)?;
        let (ids, starts) = self.encode_rendered(&rendered)?;
        let inside = |at: usize| rendered.generated.iter().any(|r| r.contains(&at));
        let trained: Vec<bool> = starts.iter().map(|&s| inside(s)).collect();
        let (Some(first), Some(last)) = (
            trained.iter().position(|&t| t),
            trained.iter().rposition(|&t| t),
        ) else {
            return Ok(Outcome::Dropped(DropReason::NothingTrained));
        };
        if first > limits.max_prompt {
            return Ok(Outcome::Dropped(DropReason::PromptTooLong));
        }
        let (mut completion, cut) = self.completion(ids[first..=last].to_vec(), limits);
        completion.trained = ranges(&trained[first..first + completion.ids.len()]);
        let group = PromptGroup {
            row,
            prompt: ids[..first].to_vec(),
            completions: vec![completion],
        };
        Ok(if cut {
            Outcome::Truncated(group)
        } else {
            Outcome::Kept(group)
        })
    }

    /// Cuts to the limit; never adds an end-of-sequence token.
    fn completion(&self, mut ids: Vec<u32>, limits: &Limits) -> (Completion, bool) {
        let cut = ids.len() > limits.max_completion.max(1);
        ids.truncate(limits.max_completion.max(1));
        let ends = ids.last().is_some_and(|id| self.eos_ids.contains(id));
        (
            Completion::whole(ids, if ends { Finish::Stop } else { Finish::Cut }),
            cut,
        )
    }

    /// Ends plain text with the first end-of-sequence token, where it has none.
    fn close(&self, ids: &mut Vec<u32>) {
        if let Some(&eos) = self.eos_ids.first()
            && ids.last().is_none_or(|id| !self.eos_ids.contains(id))
        {
            ids.push(eos);
        }
    }

    /// Ids of rendered text and the byte offset at which each begins.
    fn encode_rendered(&self, rendered: &Rendered) -> Result<(Vec<u32>, Vec<usize>)> {
        let mut bounds = vec![0];
        bounds.extend(&rendered.cuts);
        bounds.push(rendered.text.len());
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        for w in bounds.windows(2) {
            let part = &rendered.text[w[0]..w[1]];
            let encoding = self
                .tokenizer
                .encode(part, false)
                .map_err(|e| self.failed(&e))?;
            ids.extend_from_slice(encoding.get_ids());
            starts.extend(encoding.get_offsets().iter().map(|o| w[0] + o.0));
        }
        Ok((ids, starts))
    }

    fn failed(&self, e: &tokenizers::Error) -> Error {
        Error::Invalid {
            what: format!("the tokenizer of {} failed: {e}", self.place),
            mend: "look at the text and at tokenizer.json".into(),
        }
    }
}

#[allow(clippy::single_range_in_vec_init, reason = "a list of ranges is meant")]
fn ranges(trained: &[bool]) -> Vec<Range<usize>> {
    let mut all: Vec<Range<usize>> = Vec::new();
    for (i, _) in trained.iter().enumerate().filter(|(_, t)| **t) {
        match all.last_mut() {
            Some(r) if r.end == i => r.end = i + 1,
            _ => all.push(i..i + 1),
        }
    }
    all
}

fn collect<R: Sync>(
    records: &[R],
    one: impl Fn(u64, &R) -> Result<Outcome<PromptGroup>> + Sync,
) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
    let outcomes: Vec<Outcome<PromptGroup>> = records
        .par_iter()
        .enumerate()
        .map(|(row, r)| one(row as u64, r))
        .collect::<Result<_>>()?;
    let mut report = TokenizeReport::default();
    let mut kept = Vec::with_capacity(outcomes.len());
    for (row, outcome) in outcomes.into_iter().enumerate() {
        match outcome {
            Outcome::Kept(g) => kept.push(g),
            Outcome::Truncated(g) => {
                report.truncated += 1;
                kept.push(g);
            }
            Outcome::Dropped(reason) => report.drop(row as u64, reason),
        }
    }
    Ok((kept, report))
}

fn json(path: &Path) -> Result<serde_json::Value> {
    if !path.is_file() {
        return Ok(serde_json::Value::Null);
    }
    let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
    serde_json::from_str(&text).map_err(|e| {
        Error::file(
            path,
            format!("no readable JSON: {e}"),
            "correct or remove the file",
        )
    })
}

/// `eos_token_id` of the generation settings (one or several), then the tokenizer's `eos_token`.
fn eos_ids(
    tokenizer: &Tokenizer,
    config: &serde_json::Value,
    generation: &serde_json::Value,
) -> Vec<u32> {
    let mut ids: Vec<u32> = Vec::new();
    let token = match config.get("eos_token") {
        Some(serde_json::Value::String(s)) => Some(s.as_str()),
        Some(v) => v.get("content").and_then(|c| c.as_str()),
        None => None,
    };
    ids.extend(token.and_then(|t| tokenizer.token_to_id(t)));
    match generation.get("eos_token_id") {
        Some(serde_json::Value::Array(list)) => {
            ids.extend(list.iter().filter_map(|v| v.as_u64()).map(|v| v as u32))
        }
        Some(v) => ids.extend(v.as_u64().map(|v| v as u32)),
        None => {}
    }
    let mut seen = HashSet::new();
    ids.retain(|id| seen.insert(*id));
    ids
}

/// Today in UTC (days to a civil date after Howard Hinnant's public-domain algorithm).
fn today() -> (i32, u32, u32) {
    let seconds = std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    let z = (seconds / 86_400) as i64 + 719_468;
    let era = z.div_euclid(146_097);
    let day_of_era = z.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let mp = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * mp + 2) / 5 + 1;
    let month = if mp < 10 { mp + 3 } else { mp - 9 };
    (
        (year_of_era + era * 400 + i64::from(month <= 2)) as i32,
        month as u32,
        day as u32,
    )
}
