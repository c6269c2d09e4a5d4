//! The rules that look at one row, and at what is remembered of earlier ones.

use std::collections::HashMap;
use std::collections::hash_map::Entry;

use serde_json::{Map, Value};

use super::places::Places;
use super::splits::Parts;
use super::{CheckOptions, Ledger, Level, Memory, Purpose, excerpt, invisible, one_line, values};
use crate::conversation::{Message, Role, Text};
use crate::record::{
    Fault, PreferenceRecord, PromptRecord, RankedRecord, RatedRecord, SftRecord, StepwiseRecord,
    UnpairedRecord,
};
use crate::tokenize::{DropReason, Outcome};

/// Names that templates in the wild give a meaning.
const MARKERS: [&str; 6] = [
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "[INST]",
    "<|eot_id|>",
    "</s>",
];

/// A row as it is checked.
pub(super) struct RowCheck<'a, 'b> {
    pub(super) report: &'a mut Ledger<'b>,
    pub(super) memory: &'a mut Memory,
    pub(super) options: &'a CheckOptions<'a>,
    pub(super) places: &'a Places,
    pub(super) place: &'a str,
    /// The place's number.
    pub(super) here: u64,
    /// How many rows stand before it.
    pub(super) row: u64,
    /// Whether to look for earlier rows that are much like it.
    pub(super) look_alike: bool,
}

impl RowCheck<'_, '_> {
    /// The rules that need no record.
    pub(super) fn columns(&mut self, row: &Map<String, Value>, purpose: Purpose) {
        let label = row.get("label").and_then(Value::as_bool);
        if purpose == Purpose::Sft && label == Some(false) {
            self.report.add(
                "label_ignored",
                Level::Warning,
                (self.place, "label"),
                "a completion labelled as bad would be trained like a good one",
            );
        }
        if let (Some(label), Some(completion)) = (label, row.get("completion")) {
            let prompt = row.get("prompt").map(Value::to_string).unwrap_or_default();
            let earlier = self.memory.contradictions.label(
                self.here,
                &prompt,
                &completion.to_string(),
                label,
            );
            if let Some(n) = earlier {
                let what = format!(
                    "{} labels the same completion {}",
                    self.places.name(n),
                    !label
                );
                self.report
                    .add("contradiction", Level::Warning, (self.place, "label"), what);
            }
        }
        for (column, value) in values::not_finite_columns(row) {
            // A record refuses such a margin itself.
            if column != "margin" || purpose != Purpose::Preference {
                let what = format!("{} is no finite number", excerpt(&value));
                self.report
                    .add("not_finite", Level::Warning, (self.place, column), what);
            }
        }
        let limit = self.options.max_characters;
        for (column, n) in values::over_long(row, limit) {
            let what = format!("{n} characters, the limit is {limit}");
            self.report
                .add("over_long", Level::Warning, (self.place, &column), what);
        }
    }

    /// The rules that compare with earlier rows and other files.
    fn compare(&mut self, parts: &Parts, near: &str) {
        self.memory.splits.judge(parts, self.place, self.report);
        let Some(threshold) = self.options.near_duplicate.filter(|_| self.look_alike) else {
            return;
        };
        if let Some((n, s)) = self.memory.near.find(near, self.here, threshold) {
            let what = format!(
                "much like {} (estimated Jaccard similarity {s:.2})",
                self.places.name(n)
            );
            self.add("near_duplicate", Level::Warning, what);
        }
    }

    fn add(&mut self, rule: &'static str, level: Level, what: impl Into<String>) {
        self.report.add(rule, level, (self.place, ""), what);
    }

    pub(super) fn judge<R>(&mut self, record: Result<R, Fault>, then: fn(&mut Self, &R)) {
        match record {
            Ok(r) => then(self, &r),
            Err(f) => {
                self.report.add(
                    f.rule,
                    Level::Error,
                    (self.place, &f.column),
                    excerpt(&f.what),
                );
            }
        }
    }

    pub(super) fn sft(&mut self, r: &SftRecord) {
        self.order(r.prompt.iter().chain([&r.completion]));
        match (&r.prompt, &r.completion) {
            (Some(p), c) => self.text(&[("prompt", p), ("completion", c)]),
            (None, c @ Text::Messages(_)) => self.text(&[("messages", c)]),
            (None, c @ Text::Plain(_)) => self.text(&[("text", c)]),
        }
        let whole: Vec<String> = r
            .prompt
            .iter()
            .chain([&r.completion])
            .map(Text::joined)
            .collect();
        self.compare(&Parts::sft(r), &whole.join("\n"));
        if let Some((t, limits)) = self.options.tokens {
            self.outcome(t.sft_group(self.row, r, &limits));
        }
    }

    pub(super) fn preference(&mut self, r: &PreferenceRecord) {
        self.order([&r.prompt, &r.chosen]);
        self.text(&[
            ("prompt", &r.prompt),
            ("chosen", &r.chosen),
            ("rejected", &r.rejected),
        ]);
        // With a tokenizer the ids are compared, which finds these pairs and more.
        if self.options.tokens.is_none() && r.chosen == r.rejected {
            self.add(
                "identical",
                Level::Warning,
                "chosen equals rejected: the pair is dropped",
            );
        }
        let [prompt, chosen, rejected] = [&r.prompt, &r.chosen, &r.rejected].map(Text::joined);
        self.compare(&Parts::preference(r), &format!("{prompt}\n{chosen}"));
        let earlier = self
            .memory
            .contradictions
            .pair(self.here, &prompt, &chosen, &rejected);
        if let Some(n) = earlier {
            let what = format!("{} prefers the other completion", self.places.name(n));
            self.add("contradiction", Level::Warning, what);
        }
        self.memory.lengths.add(&chosen, &rejected);
        if let Some((t, limits)) = self.options.tokens {
            self.outcome(t.preference_group(self.row, r, &limits));
        }
    }

    pub(super) fn unpaired(&mut self, r: &UnpairedRecord) {
        self.answer(&r.prompt, &r.completion, "completion");
    }

    pub(super) fn rated(&mut self, r: &RatedRecord) {
        self.answer(&r.prompt, &r.completion, "completion");
    }

    pub(super) fn stepwise(&mut self, r: &StepwiseRecord) {
        let steps = r.completions.join("\n");
        let whole = match &r.prompt {
            Text::Plain(_) => Text::Plain(steps),
            Text::Messages(_) => Text::Messages(vec![Message::new(Role::Assistant, steps)]),
        };
        self.answer(&r.prompt, &whole, "completions");
    }

    /// A prompt and one answer to it.
    fn answer(&mut self, prompt: &Text, completion: &Text, column: &str) {
        self.order([prompt, completion]);
        self.text(&[("prompt", prompt), (column, completion)]);
        let near = format!("{}\n{}", prompt.joined(), completion.joined());
        self.compare(&Parts::of(prompt, [completion]), &near);
        self.tokens(prompt, [completion]);
    }

    pub(super) fn ranked(&mut self, r: &RankedRecord) {
        let worth = r.worth();
        let best = (0..worth.len()).max_by(|&a, &b| worth[a].total_cmp(&worth[b]).then(b.cmp(&a)));
        let best = best.unwrap_or_default();
        let worst = (0..worth.len()).min_by(|&a, &b| worth[a].total_cmp(&worth[b]));
        let worst = worst.unwrap_or_default();
        let (first, last) = (&r.completions[best], &r.completions[worst]);
        self.order([&r.prompt, first]);
        let mut texts = vec![("prompt", &r.prompt)];
        texts.extend(r.completions.iter().map(|c| ("completions", c)));
        self.text(&texts);
        if worth[best] <= worth[worst] {
            let what = "all scores are equal: no completion is better than another";
            self.report
                .add("no_contrast", Level::Warning, (self.place, "scores"), what);
        }
        let mut before: HashMap<&Text, usize> = HashMap::new();
        let mut same = None;
        for (i, c) in r.completions.iter().enumerate() {
            match before.entry(c) {
                Entry::Occupied(first) if same.is_none() => same = Some((*first.get(), i)),
                Entry::Occupied(_) => {}
                Entry::Vacant(v) => {
                    v.insert(i);
                }
            }
        }
        if let Some((a, b)) = same {
            let what = if worth[a] == worth[b] {
                format!("completions {a} and {b} are the same")
            } else {
                format!("completions {a} and {b} are the same, and one is called better")
            };
            self.report.add(
                "identical",
                Level::Warning,
                (self.place, "completions"),
                what,
            );
        }
        let near = format!("{}\n{}", r.prompt.joined(), first.joined());
        self.compare(&Parts::of(&r.prompt, &r.completions), &near);
        if worth[best] > worth[worst] {
            self.memory.lengths.add(&first.joined(), &last.joined());
        }
        self.tokens(&r.prompt, &r.completions);
    }

    /// What becomes of each answer in tokens, until one of them is not as it was.
    fn tokens<'c>(&mut self, prompt: &Text, answers: impl IntoIterator<Item = &'c Text>) {
        let Some((t, limits)) = self.options.tokens else {
            return;
        };
        for completion in answers {
            let demonstration = SftRecord {
                prompt: Some(prompt.clone()),
                completion: completion.clone(),
            };
            let outcome = t.sft_group(self.row, &demonstration, &limits);
            let kept = matches!(outcome, Ok(Outcome::Kept(_)));
            self.outcome(outcome);
            if !kept {
                break;
            }
        }
    }

    pub(super) fn prompt(&mut self, r: &PromptRecord) {
        self.text(&[("prompt", &r.prompt)]);
        self.compare(&Parts::prompt(r), &r.prompt.joined());
        if let Some((t, limits)) = self.options.tokens {
            match t.prompt_ids(&r.prompt) {
                Ok(ids) if ids.len() > limits.max_prompt => {
                    self.add(
                        "prompt_too_long",
                        Level::Warning,
                        format!(
                            "dropped: the prompt has {} tokens, the limit is {}",
                            ids.len(),
                            limits.max_prompt
                        ),
                    );
                }
                Ok(_) => {}
                Err(e) => self.add("template", Level::Error, one_line(&e)),
            }
        }
    }

    fn outcome<T>(&mut self, outcome: crate::Result<Outcome<T>>) {
        match outcome {
            Ok(Outcome::Kept(_)) => {}
            Ok(Outcome::Truncated(_)) => {
                self.add("truncated", Level::Warning, "shortened to the limits")
            }
            Ok(Outcome::Dropped(reason)) => {
                let rule = match reason {
                    DropReason::PromptTooLong => "prompt_too_long",
                    DropReason::CompletionTooLong => "completion_too_long",
                    DropReason::EmptyCompletion => "empty",
                    DropReason::NothingTrained => "nothing_trained",
                    DropReason::Identical => "identical",
                    DropReason::NoPrefix => "no_prefix",
                };
                self.add(rule, Level::Warning, format!("dropped: {reason}"));
            }
            Err(e) => self.add("template", Level::Error, one_line(&e)),
        }
    }

    /// System first, then user and assistant in turn (tools may come anywhere after the system).
    fn order<'t>(&mut self, texts: impl IntoIterator<Item = &'t Text>) {
        let messages = texts.into_iter().flat_map(|t| match t {
            Text::Messages(m) => m.as_slice(),
            Text::Plain(_) => &[],
        });
        let talk: Vec<Role> = messages.map(|m| m.role).collect();
        if talk.iter().skip(1).any(|r| *r == Role::System) {
            self.add(
                "role_order",
                Level::Warning,
                "a system message after the first",
            );
        }
        let turns: Vec<Role> = talk
            .iter()
            .copied()
            .filter(|r| matches!(r, Role::User | Role::Assistant))
            .collect();
        if turns.first() == Some(&Role::Assistant) {
            self.add("role_order", Level::Warning, "the assistant speaks first");
        }
        if !talk.contains(&Role::Tool) && turns.windows(2).any(|w| w[0] == w[1]) {
            self.add("role_order", Level::Warning, "the same role twice in a row");
        }
    }

    /// Special tokens' names and characters that do not show, once a row each.
    fn text(&mut self, texts: &[(&str, &Text)]) {
        let own = self
            .options
            .tokens
            .map_or(&[][..], |(t, _)| t.special_tokens());
        let markers = || {
            MARKERS
                .iter()
                .copied()
                .chain(own.iter().map(String::as_str))
        };
        let (mut marker, mut control) = (false, false);
        for (column, text) in texts {
            let joined = text.joined();
            if !marker && let Some(m) = markers().find(|m| joined.contains(m)) {
                marker = true;
                self.report.add(
                    "special_token",
                    Level::Warning,
                    (self.place, column),
                    format!("{m} stands in the text; it is read as plain text"),
                );
            }
            let shown = |c: char| !invisible(c) || matches!(c, '\n' | '\t' | '\r');
            if !control && !joined.chars().all(shown) {
                control = true;
                self.report.add(
                    "control_character",
                    Level::Warning,
                    (self.place, column),
                    excerpt(&joined),
                );
            }
        }
    }
}
