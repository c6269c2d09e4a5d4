//! From records to token ids: templates, prompts as exact prefixes, trained ranges, limits.
//!
//! Invariants: a prompt's ids are a prefix of its conversation's ids; the name of a special token inside
//! a message never becomes that token; truncation never invents an end-of-sequence token and never
//! leaves a completion empty; every row that is dropped or shortened is counted.
//!
//! Where a template is used, a prompt that is no prefix drops its row. Plain text has no such seam: a
//! token that spans prompt and completion (`"? "` and `"The"`) belongs to the completion, as in TRL, and
//! such rows are counted.
//!
//! A special token's name in a message is cut in two before tokenising ([`crate::chat_template`]), and
//! plain text is read by a copy of the tokenizer that knows no special tokens. Without such a name the
//! ids are those of `apply_chat_template`.

mod labelled;
mod limits;
mod load;
mod stream;

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use tokenizers::Tokenizer;

use crate::chat_template::{ChatTemplate, Rendered};
use crate::conversation::{Message, Role, Text};
use crate::error::{Error, Result};
use crate::group::{Completion, Finish, PromptGroup};
use crate::record::{PreferenceRecord, RankedRecord, SftRecord, UnpairedRecord};
use limits::{fit_prompt, too_long};
use load::{eos_ids, has_parts, hash_files, json, today};

pub use labelled::Steps;
pub use limits::{
    DropReason, Dropped, Limits, LongCompletion, LongPrompt, Outcome, TokenizeReport, Truncation,
};
pub use stream::GroupStream;

/// What of a demonstration is trained. `Last` and `All` speak of whole conversations whose template does
/// not say it by `{% generation %}`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Turns {
    /// The assistant's last turn.
    #[default]
    Last,
    /// Every turn of the assistant.
    All,
    /// Every token, prompts and the template's own included, as TRL does unless it is told otherwise.
    /// A group then has no prompt, and the limit of completions holds for all of it.
    Everything,
}

/// A tokenizer with its chat template.
#[derive(Clone, Debug)]
pub struct ChatTokenizer {
    tokenizer: Tokenizer,
    /// Reads the names of special tokens as plain text.
    literal: Tokenizer,
    template: Option<ChatTemplate>,
    place: String,
    special: Vec<String>,
    eos_ids: Vec<u32>,
    vocab_size: usize,
    turns: Turns,
    /// Whether ids do not depend on what stands before a special token.
    parts: bool,
    /// A hash of the folder's files, and of the date where a template asks for it.
    files: [u8; 32],
}

/// A prompt and what follows it, for each completion.
struct Split {
    prompt: Vec<u32>,
    completions: Vec<Answer>,
    /// Whether a token spans prompt and completion.
    shared_boundary: bool,
}

impl Split {
    /// Makes the prompt a part of what is trained.
    fn merge(&mut self) {
        let prompt = std::mem::take(&mut self.prompt);
        for answer in &mut self.completions {
            *answer = Answer::whole([&prompt[..], &answer.ids].concat());
        }
    }
}

/// A completion's ids and which of them are trained.
struct Answer {
    ids: Vec<u32>,
    trained: Vec<Range<usize>>,
}

/// A prompt's ids, and of its rendered text the beginning that ends with its last special token.
#[derive(Default)]
struct Head {
    ids: Vec<u32>,
    text: String,
    cuts: Vec<usize>,
    /// Those of `ids` that `text` gives, and where each begins, if that is asked for.
    text_ids: usize,
    starts: Option<Vec<usize>>,
}

type Parted<T> = std::result::Result<T, DropReason>;

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
        let mut tokenizer = Tokenizer::from_bytes(&bytes).map_err(|e| {
            Error::file(
                &file,
                format!("no readable tokenizer: {e}"),
                "get the file again",
            )
        })?;
        // Settings of whoever saved it, which transformers does not apply to conversations either.
        tokenizer
            .with_padding(None)
            .with_truncation(None)
            .map_err(|e| Error::file(&file, e.to_string(), "get the file again"))?;
        let config = json(&dir.join("tokenizer_config.json"))?;
        let generation = json(&dir.join("generation_config.json"))?;
        let added = tokenizer.get_added_tokens_decoder();
        let mut special: Vec<String> = added
            .values()
            .filter(|t| t.special)
            .map(|t| t.content.clone())
            .collect();
        special.sort_by_key(|t| std::cmp::Reverse(t.len()));
        let template = ChatTemplate::of_folder(dir, &config, special.clone(), date)?;
        let vocab_size = tokenizer
            .get_vocab(true)
            .values()
            .max()
            .map_or(0, |m| *m as usize + 1);
        let eos_ids = eos_ids(&tokenizer, &config, &generation);
        let parts = has_parts(&tokenizer);
        let mut literal = tokenizer.clone();
        literal.set_encode_special_tokens(true);
        Ok(Self {
            tokenizer,
            literal,
            template,
            place: dir.display().to_string(),
            special,
            eos_ids,
            vocab_size,
            turns: Turns::default(),
            parts,
            files: hash_files(dir, date)?,
        })
    }

    /// Chooses what of demonstrations is trained.
    #[must_use]
    pub fn with_turns(mut self, turns: Turns) -> Self {
        self.turns = turns;
        self
    }

    /// A hash of everything that ids depend on: the tokenizer's files, the template, the date where the
    /// template asks for it, the trained turns.
    #[must_use]
    pub fn fingerprint(&self) -> [u8; 32] {
        let mut hash = Sha256::new();
        hash.update(self.files);
        hash.update(format!("{:?}", self.turns));
        hash.finalize().into()
    }

    /// Names of the special tokens, longest first.
    #[must_use]
    pub fn special_tokens(&self) -> &[String] {
        &self.special
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
            Text::Messages(m) => Ok(self.before(m, false)?.ids),
        }
    }

    /// A demonstration as a group with one completion.
    ///
    /// With a template that marks what the model generates, those parts are trained; otherwise the last
    /// assistant turn is, or all ([`ChatTokenizer::with_turns`]). What follows the last trained
    /// end-of-sequence token is left out.
    ///
    /// # Errors
    /// When the template or the tokenizer fails.
    pub fn sft_group(
        &self,
        row: u64,
        record: &SftRecord,
        limits: &Limits,
    ) -> Result<Outcome<PromptGroup>> {
        Ok(outcome(row, self.sft(record, limits)?))
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
        Ok(outcome(row, self.preference(record, limits)?))
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
        collect(records, |r| self.sft(r, limits))
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
        collect(records, |r| self.preference(r, limits))
    }

    /// All thumbs, in order, in parallel: groups of one completion.
    ///
    /// # Errors
    /// The first row's error.
    pub fn unpaired_groups(
        &self,
        records: &[UnpairedRecord],
        limits: &Limits,
    ) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
        collect(records, |r| {
            self.answered(&r.prompt, &[&r.completion], limits)
        })
    }

    /// All rankings, in order, in parallel: groups of K completions, best first; those of one score stay in the
    /// data's order.
    ///
    /// # Errors
    /// The first row's error.
    pub fn ranked_groups(
        &self,
        records: &[RankedRecord],
        limits: &Limits,
    ) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
        collect(records, |r| {
            let worth = r.worth();
            let mut order: Vec<usize> = (0..r.completions.len()).collect();
            order.sort_by(|&a, &b| worth[b].total_cmp(&worth[a]));
            let best_first: Vec<&Text> = order.iter().map(|&i| &r.completions[i]).collect();
            self.answered(&r.prompt, &best_first, limits)
        })
    }

    /// The groups of demonstrations that come one by one, in bounded memory: while a chunk of them is
    /// tokenised on all threads, the next one is read.
    pub fn sft_stream<I: Iterator<Item = Result<SftRecord>> + Send>(
        &self,
        records: I,
        limits: &Limits,
    ) -> GroupStream<'_, SftRecord, I> {
        GroupStream::new(self, Self::sft, records, limits)
    }

    /// The same for preference pairs.
    pub fn preference_stream<I: Iterator<Item = Result<PreferenceRecord>> + Send>(
        &self,
        records: I,
        limits: &Limits,
    ) -> GroupStream<'_, PreferenceRecord, I> {
        GroupStream::new(self, Self::preference, records, limits)
    }

    fn sft(&self, record: &SftRecord, limits: &Limits) -> Result<Parted<Made>> {
        let made = self.sft_whole(record, limits)?;
        if !lacks_room(&made, limits) {
            return Ok(made);
        }
        let mut shorter = record.clone();
        self.by_turns(limits, |limits| {
            // A whole conversation loses turns before its last answer.
            let text = shorter.prompt.as_mut().unwrap_or(&mut shorter.completion);
            Ok(if drop_oldest_turn(text) {
                Some(self.sft_whole(&shorter, limits)?)
            } else {
                None
            })
        })
    }

    fn sft_whole(&self, record: &SftRecord, limits: &Limits) -> Result<Parted<Made>> {
        if record.completion.is_blank() {
            return Ok(Err(DropReason::EmptyCompletion));
        }
        let split = match (&record.prompt, &record.completion) {
            (Some(prompt), completion) => self.split(prompt, &[completion])?,
            (None, Text::Plain(text)) => {
                let mut ids = self.encode(text)?;
                self.close(&mut ids);
                Ok(Split {
                    prompt: Vec::new(),
                    completions: vec![Answer::whole(ids)],
                    shared_boundary: false,
                })
            }
            (None, Text::Messages(messages)) => self.demonstration(messages)?,
        };
        split.map_or_else(
            |e| Ok(Err(e)),
            |mut s| {
                if self.turns == Turns::Everything {
                    s.merge();
                }
                self.limited(s, limits)
            },
        )
    }

    fn preference(&self, record: &PreferenceRecord, limits: &Limits) -> Result<Parted<Made>> {
        let both = [&record.chosen, &record.rejected];
        let made = self.answered(&record.prompt, &both, limits)?;
        Ok(made.and_then(|made| match made.completions.as_slice() {
            [chosen, rejected] if chosen.ids == rejected.ids => Err(DropReason::Identical),
            _ => Ok(made),
        }))
    }

    /// A prompt with its completions.
    fn answered(
        &self,
        prompt: &Text,
        completions: &[&Text],
        limits: &Limits,
    ) -> Result<Parted<Made>> {
        let made = self.answered_whole(prompt, completions, limits)?;
        if !lacks_room(&made, limits) {
            return Ok(made);
        }
        let mut shorter = prompt.clone();
        self.by_turns(limits, |limits| {
            Ok(if drop_oldest_turn(&mut shorter) {
                Some(self.answered_whole(&shorter, completions, limits)?)
            } else {
                None
            })
        })
    }

    /// Repeats `shorter`, which drops a turn each time and says when there is none left, until the
    /// prompt fits.
    fn by_turns(
        &self,
        limits: &Limits,
        mut shorter: impl FnMut(&Limits) -> Result<Option<Parted<Made>>>,
    ) -> Result<Parted<Made>> {
        while let Some(made) = shorter(limits)? {
            if !lacks_room(&made, limits) {
                return Ok(made.map(|m| Made {
                    shortened: true,
                    ..m
                }));
            }
        }
        Ok(Err(DropReason::PromptTooLong))
    }

    /// The ids of a prompt within the limits.
    ///
    /// # Errors
    /// As [`ChatTokenizer::prompt_ids`]; also where the limits refuse a long prompt.
    pub fn prompt_within(&self, prompt: &Text, limits: &Limits) -> Result<Outcome<Vec<u32>>> {
        let mut prompt = std::borrow::Cow::Borrowed(prompt);
        let mut shortened = false;
        loop {
            let ids = self.prompt_ids(&prompt)?;
            if ids.len() > limits.max_prompt
                && limits.truncation.prompt == LongPrompt::DropTurns
                && drop_oldest_turn(prompt.to_mut())
            {
                shortened = true;
                continue;
            }
            return Ok(match fit_prompt(ids, limits)? {
                Err(reason) => Outcome::Dropped(reason),
                Ok((ids, cut)) if cut || shortened => Outcome::Truncated(ids),
                Ok((ids, _)) => Outcome::Kept(ids),
            });
        }
    }

    fn answered_whole(
        &self,
        prompt: &Text,
        completions: &[&Text],
        limits: &Limits,
    ) -> Result<Parted<Made>> {
        if completions.iter().any(|c| c.is_blank()) {
            return Ok(Err(DropReason::EmptyCompletion));
        }
        let split = self.split(prompt, completions)?;
        split.map_or_else(|e| Ok(Err(e)), |s| self.limited(s, limits))
    }

    /// A whole conversation, parted where the training begins.
    fn demonstration(&self, messages: &[Message]) -> Result<Parted<Split>> {
        if self.template()?.marks_generation() {
            return self.marked(messages);
        }
        let is_answer = |m: &Message| m.role == Role::Assistant;
        let (Some(first), Some(last)) = (
            messages.iter().position(is_answer),
            messages.iter().rposition(is_answer),
        ) else {
            return Ok(Err(DropReason::NothingTrained));
        };
        let first = match self.turns {
            Turns::Last => last,
            Turns::All | Turns::Everything => first,
        };
        let head = self.before(&messages[..first], false)?;
        Ok(self
            .conversation(&messages[..first], &messages[first..=last], &head)?
            .map(|answer| Split {
                prompt: head.ids,
                completions: vec![answer],
                shared_boundary: false,
            }))
    }

    /// A prompt and its completions, the prompt's ids a prefix of each conversation's ids.
    fn split(&self, prompt: &Text, completions: &[&Text]) -> Result<Parted<Split>> {
        let before = match prompt {
            Text::Messages(before) => before,
            Text::Plain(text) => return self.plain(text, completions),
        };
        // Where tokens begin is asked only for turns whose trained parts the template marks.
        let marks = self.template()?.marks_generation();
        let several = |c: &&Text| matches!(c, Text::Messages(m) if m.len() > 1);
        let head = self.before(before, marks && completions.iter().any(several))?;
        let mut answers = Vec::with_capacity(completions.len());
        for completion in completions {
            let Text::Messages(turns) = completion else {
                return Err(mixed_forms());
            };
            match self.conversation(before, turns, &head)? {
                Ok(answer) => answers.push(answer),
                Err(reason) => return Ok(Err(reason)),
            }
        }
        Ok(Ok(Split {
            prompt: head.ids,
            completions: answers,
            shared_boundary: false,
        }))
    }

    /// Plain text: the prompt is what its ids and those of every whole text have in common.
    fn plain(&self, prompt: &str, completions: &[&Text]) -> Result<Parted<Split>> {
        let alone = self.encode(prompt)?;
        let mut wholes = Vec::with_capacity(completions.len());
        let mut common = alone.len();
        for completion in completions {
            let Text::Plain(text) = completion else {
                return Err(mixed_forms());
            };
            let mut whole = self.encode(&format!("{prompt}{text}"))?;
            common = common.min(alone.iter().zip(&whole).take_while(|(a, b)| a == b).count());
            self.close(&mut whole);
            wholes.push(whole);
        }
        if common == 0 && !alone.is_empty() {
            return Ok(Err(DropReason::NoPrefix));
        }
        Ok(Ok(Split {
            completions: wholes
                .into_iter()
                .map(|w| Answer::whole(w[common..].to_vec()))
                .collect(),
            shared_boundary: common < alone.len(),
            prompt: alone[..common].to_vec(),
        }))
    }

    /// A conversation up to where the assistant begins; `offsets` asks for where tokens begin.
    fn before(&self, messages: &[Message], offsets: bool) -> Result<Head> {
        let rendered = self.template()?.render(messages, true)?;
        let seam = self.seam(&rendered);
        let mut ids = Vec::new();
        let mut starts = offsets.then(Vec::new);
        self.encode_part(&rendered, 0..seam, &mut ids, starts.as_mut())?;
        let text_ids = ids.len();
        self.encode_part(&rendered, seam..rendered.text.len(), &mut ids, None)?;
        Ok(Head {
            ids,
            text: rendered.text[..seam].to_owned(),
            cuts: rendered.cuts.into_iter().filter(|c| *c < seam).collect(),
            text_ids,
            starts,
        })
    }

    /// Where the last special token of the text ends, if ids may be made from there on alone; else 0.
    fn seam(&self, rendered: &Rendered) -> usize {
        let piece = rendered.cuts.last().copied().unwrap_or(0);
        let ends = self
            .special
            .iter()
            .filter_map(|s| Some(rendered.text[piece..].rfind(s.as_str())? + s.len()));
        match ends.max() {
            Some(end) if self.parts => piece + end,
            _ => 0,
        }
    }

    /// What follows `head`, which `before` gives, in the conversation that `turns` continue.
    fn conversation(
        &self,
        before: &[Message],
        turns: &[Message],
        head: &Head,
    ) -> Result<Parted<Answer>> {
        let prompt = head.ids.as_slice();
        if !turns.iter().any(|m| m.role == Role::Assistant) {
            return Ok(Err(DropReason::NothingTrained));
        }
        let template = self.template()?;
        let all: Vec<Message> = before.iter().chain(turns).cloned().collect();
        let rendered = template.render(&all, false)?;
        let (ids, starts) = self.encode_after(head, &rendered)?;
        let Some(rest) = ids.strip_prefix(prompt) else {
            return Ok(Err(DropReason::NoPrefix));
        };
        let trained = match turns {
            [only] if only.role == Role::Assistant => vec![self.up_to_end(rest, 0)],
            _ if template.marks_generation() => {
                let marked: Vec<bool> = starts
                    .iter()
                    .skip(prompt.len())
                    .map(|s| rendered.generated.iter().any(|r| r.contains(s)))
                    .collect();
                ranges(&marked)
            }
            _ => match self.answers(&all, before.len(), prompt.len(), &ids)? {
                Ok(trained) => trained,
                Err(reason) => return Ok(Err(reason)),
            },
        };
        let Some(end) = trained.last().map(|r| r.end) else {
            return Ok(Err(DropReason::NothingTrained));
        };
        Ok(Ok(Answer {
            ids: rest[..end].to_vec(),
            trained,
        }))
    }

    /// Ranges, counted from `skip`, of the assistant's turns from message `first` on: each lies between
    /// the conversation up to it, with a generation prompt, and the conversation with it.
    fn answers(
        &self,
        all: &[Message],
        first: usize,
        skip: usize,
        ids: &[u32],
    ) -> Result<Parted<Vec<Range<usize>>>> {
        let template = self.template()?;
        let mut trained = Vec::new();
        for (i, _) in all
            .iter()
            .enumerate()
            .skip(first)
            .filter(|(_, m)| m.role == Role::Assistant)
        {
            let begin = self.before(&all[..i], false)?.ids;
            let rendered = template.render(&all[..=i], false)?;
            let end = self.encode_after(&Head::default(), &rendered)?.0;
            if !ids.starts_with(&begin) || !ids.starts_with(&end) || begin.len() < skip {
                return Ok(Err(DropReason::NoPrefix));
            }
            let turn = self.up_to_end(&end, begin.len());
            if !turn.is_empty() {
                trained.push(turn.start - skip..turn.end - skip);
            }
        }
        Ok(Ok(trained))
    }

    /// From `start` to after the last end-of-sequence token, or to the end where there is none.
    fn up_to_end(&self, ids: &[u32], start: usize) -> Range<usize> {
        let end = ids
            .iter()
            .skip(start)
            .rposition(|id| self.eos_ids.contains(id))
            .map_or(ids.len().max(start), |i| start + i + 1);
        start..end
    }

    /// A conversation parted before the first token inside `{% generation %}`.
    fn marked(&self, messages: &[Message]) -> Result<Parted<Split>> {
        let rendered = self.template()?.render(messages, false)?;
        let (mut ids, mut starts) = (Vec::new(), Vec::new());
        self.encode_part(
            &rendered,
            0..rendered.text.len(),
            &mut ids,
            Some(&mut starts),
        )?;
        let inside = |at: &usize| rendered.generated.iter().any(|r| r.contains(at));
        let trained: Vec<bool> = starts.iter().map(inside).collect();
        let (Some(first), Some(last)) = (
            trained.iter().position(|&t| t),
            trained.iter().rposition(|&t| t),
        ) else {
            return Ok(Err(DropReason::NothingTrained));
        };
        Ok(Ok(Split {
            prompt: ids[..first].to_vec(),
            completions: vec![Answer {
                ids: ids[first..=last].to_vec(),
                trained: ranges(&trained[first..=last]),
            }],
            shared_boundary: false,
        }))
    }

    /// Applies the limits.
    fn limited(&self, split: Split, limits: &Limits) -> Result<Parted<Made>> {
        let (prompt, shortened) = match fit_prompt(split.prompt, limits)? {
            Ok(fits) => fits,
            Err(reason) => return Ok(Err(reason)),
        };
        let longest = limits.max_completion.max(1);
        // Without a prompt nothing predicts the first token.
        let unpredicted = usize::from(prompt.is_empty());
        let mut made = Made {
            prompt,
            completions: Vec::with_capacity(split.completions.len()),
            cut: false,
            shortened,
            shared_boundary: split.shared_boundary,
        };
        for Answer { mut ids, trained } in split.completions {
            if ids.len() > longest {
                match limits.truncation.completion {
                    LongCompletion::KeepStart => made.cut = true,
                    LongCompletion::Drop => return Ok(Err(DropReason::CompletionTooLong)),
                    LongCompletion::Refuse => {
                        return Err(too_long("completion", ids.len(), longest));
                    }
                }
            }
            ids.truncate(longest);
            let trained: Vec<Range<usize>> = trained
                .into_iter()
                .map(|r| r.start.min(ids.len())..r.end.min(ids.len()))
                .filter(|r| !r.is_empty())
                .collect();
            if trained.last().is_none_or(|r| r.end <= unpredicted) {
                return Ok(Err(DropReason::NothingTrained));
            }
            let ends = ids.last().is_some_and(|id| self.eos_ids.contains(id));
            made.completions.push(Completion {
                ids,
                trained,
                finish: if ends { Finish::Stop } else { Finish::Cut },
                sampler: None,
            });
        }
        Ok(Ok(made))
    }

    /// Ends plain text with the first end-of-sequence token, where it has none.
    fn close(&self, ids: &mut Vec<u32>) {
        if let Some(&eos) = self.eos_ids.first()
            && ids.last().is_none_or(|id| !self.eos_ids.contains(id))
        {
            ids.push(eos);
        }
    }

    /// Ids of rendered text that may begin as `head` does, of which what is known is not made again.
    /// Also where each begins, if the head says so.
    fn encode_after(&self, head: &Head, rendered: &Rendered) -> Result<(Vec<u32>, Vec<usize>)> {
        let end = head.text.len();
        let cuts = rendered.cuts.iter().filter(|c| **c < end);
        let known = rendered.text.starts_with(&head.text) && cuts.eq(&head.cuts);
        let (mut ids, mut starts, from) = if known {
            (head.ids[..head.text_ids].to_vec(), head.starts.clone(), end)
        } else {
            (Vec::new(), head.starts.as_ref().map(|_| Vec::new()), 0)
        };
        self.encode_part(
            rendered,
            from..rendered.text.len(),
            &mut ids,
            starts.as_mut(),
        )?;
        Ok((ids, starts.unwrap_or_default()))
    }

    /// Adds the ids of a part of the text, and the byte offset at which each begins.
    fn encode_part(
        &self,
        rendered: &Rendered,
        part: Range<usize>,
        ids: &mut Vec<u32>,
        mut starts: Option<&mut Vec<usize>>,
    ) -> Result<()> {
        let inside = rendered
            .cuts
            .iter()
            .filter(|c| part.contains(c) && **c > part.start);
        let mut bounds = vec![part.start];
        bounds.extend(inside);
        bounds.push(part.end);
        for w in bounds.windows(2).filter(|w| w[0] < w[1]) {
            let text = &rendered.text[w[0]..w[1]];
            let encoding = match starts {
                None => self.tokenizer.encode_fast(text, false),
                Some(_) => self.tokenizer.encode(text, false),
            }
            .map_err(|e| self.failed(&e))?;
            ids.extend_from_slice(encoding.get_ids());
            let Some(starts) = &mut starts else { continue };
            // Offsets may leave out a token's white space; where the token before ends is where this
            // one begins, unless both are parts of one character.
            let mut before = w[0];
            for &(start, end) in encoding.get_offsets() {
                starts.push(before.min(w[0] + start));
                before = before.max(w[0] + end);
            }
        }
        Ok(())
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

impl Answer {
    #[allow(
        clippy::single_range_in_vec_init,
        reason = "a list of one range is meant"
    )]
    fn whole(ids: Vec<u32>) -> Self {
        Self {
            trained: vec![0..ids.len()],
            ids,
        }
    }
}

/// Whether a row was left out for its long prompt, and turns may go instead.
fn lacks_room(made: &Parted<Made>, limits: &Limits) -> bool {
    limits.truncation.prompt == LongPrompt::DropTurns
        && matches!(made, Err(DropReason::PromptTooLong))
}

/// Drops what comes before the second question, but for the system message. Says whether there was one.
fn drop_oldest_turn(text: &mut Text) -> bool {
    let Text::Messages(m) = text else {
        return false;
    };
    let first = m.iter().take_while(|m| m.role == Role::System).count();
    let questions: Vec<usize> = (first..m.len())
        .filter(|&i| m[i].role == Role::User)
        .collect();
    let keep_from = match questions.as_slice() {
        [] | [_] => return false,
        // Where an answer opens the talk, it goes first.
        [q, ..] if *q > first => *q,
        [_, q, ..] => *q,
    };
    m.drain(first..keep_from);
    true
}

fn mixed_forms() -> Error {
    Error::Invalid {
        what: "a prompt and a completion differ in form: one is plain text, the other messages"
            .into(),
        mend: "use one form for both".into(),
    }
}

/// A row within the limits.
struct Made {
    prompt: Vec<u32>,
    completions: Vec<Completion>,
    /// Whether a completion was.
    cut: bool,
    /// Whether the prompt was.
    shortened: bool,
    shared_boundary: bool,
}

fn outcome(row: u64, made: Parted<Made>) -> Outcome<PromptGroup> {
    match made {
        Err(reason) => Outcome::Dropped(reason),
        Ok(m) => {
            let group = PromptGroup {
                row,
                prompt: m.prompt,
                completions: m.completions,
            };
            if m.cut || m.shortened {
                Outcome::Truncated(group)
            } else {
                Outcome::Kept(group)
            }
        }
    }
}

fn collect<R: Sync>(
    records: &[R],
    one: impl Fn(&R) -> Result<Parted<Made>> + Sync + Send,
) -> Result<(Vec<PromptGroup>, TokenizeReport)> {
    let rows: Vec<Result<Parted<Made>>> = records.par_iter().map(one).collect();
    let mut report = TokenizeReport::default();
    let mut kept = Vec::with_capacity(rows.len());
    for (row, made) in (0u64..).zip(rows) {
        kept.extend(report.count(row, made.map_err(|e| e.at_row(row))?));
    }
    Ok((kept, report))
}

impl TokenizeReport {
    /// Counts a row; its group, if it is kept.
    fn count(&mut self, row: u64, made: Parted<Made>) -> Option<PromptGroup> {
        match &made {
            Err(reason) => self.drop(row, *reason),
            Ok(m) => {
                self.shared_boundary += usize::from(m.shared_boundary);
                self.truncated += usize::from(m.cut);
                self.shortened_prompts += usize::from(m.shortened);
            }
        }
        match outcome(row, made) {
            Outcome::Kept(group) | Outcome::Truncated(group) => Some(group),
            Outcome::Dropped(_) => None,
        }
    }
}
