//! A lint of a data file before any training: every rule, every row, nothing changed.
//!
//! Invariant: fail-closed. What cannot be read is an error; what would be dropped or mistrained is
//! reported with its row.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::path::Path;

use serde::Serialize;

use crate::conversation::{Message, Role, Text};
use crate::error::Error;
use crate::record::{Fault, PreferenceRecord, PromptRecord, Record, SftRecord};
use crate::source;
use crate::tokenize::{ChatTokenizer, Limits, Outcome};

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Demonstrations.
    Sft,
    /// Chosen and rejected completions.
    Preference,
    /// Prompts alone.
    Prompts,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Level {
    /// Worth knowing; training goes on.
    Warning,
    /// Training would stop or be spoilt.
    Error,
}

/// A rule broken by a row.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The rule.
    pub rule: &'static str,
    /// How bad it is.
    pub level: Level,
    /// Where: `row 3` or `line 4`, or nothing for the file.
    pub place: String,
    /// What was found, control characters escaped.
    pub what: String,
}

/// What [`check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Rows read.
    pub rows: usize,
    /// Findings in the order of rows, at most [`MAX_FINDINGS`].
    pub findings: Vec<Finding>,
    /// How often each rule was broken, also beyond the listed findings.
    pub counts: std::collections::BTreeMap<&'static str, usize>,
    /// Whether any finding is an error.
    pub failed: bool,
}

/// Findings listed; the rest is only counted.
pub const MAX_FINDINGS: usize = 200;

impl CheckReport {
    fn add(&mut self, rule: &'static str, level: Level, place: &str, what: impl Into<String>) {
        *self.counts.entry(rule).or_default() += 1;
        self.failed |= level == Level::Error;
        if self.findings.len() < MAX_FINDINGS {
            self.findings.push(Finding {
                rule,
                level,
                place: place.into(),
                what: excerpt(&what.into()),
            });
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for x in &self.findings {
            let level = if x.level == Level::Error {
                "error"
            } else {
                "warning"
            };
            writeln!(f, "{level:<8} {:<18} {:<10} {}", x.rule, x.place, x.what)?;
        }
        for (rule, n) in self.counts.iter().filter(|(_, n)| **n > 1) {
            writeln!(f, "{n} × {rule}")?;
        }
        write!(
            f,
            "{} rows, {}",
            self.rows,
            if self.failed {
                "not fit for training"
            } else {
                "fit for training"
            }
        )
    }
}

/// The first characters of a text, control characters escaped.
fn excerpt(text: &str) -> String {
    let invisible = |c: char| {
        c.is_control()
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == 160 {
            out.push('…');
            break;
        }
        if invisible(c) {
            out.extend(c.escape_unicode())
        } else {
            out.push(c)
        }
    }
    out
}

/// Checks a file for a purpose; with a tokenizer also what becomes of each row in tokens.
#[must_use]
pub fn check(
    path: &Path,
    purpose: Purpose,
    tokens: Option<(&ChatTokenizer, Limits)>,
) -> CheckReport {
    let mut report = CheckReport::default();
    let rows = match source::rows(path) {
        Ok(rows) => rows,
        Err(e) => {
            report.add("unreadable", Level::Error, "", one_line(&e));
            return report;
        }
    };
    let mut seen: HashMap<String, String> = HashMap::new();
    for (index, row) in rows.enumerate() {
        let row = match row {
            Ok(row) => row,
            Err(e) => {
                report.add("unreadable", Level::Error, "", one_line(&e));
                break;
            }
        };
        report.rows += 1;
        let key = serde_json::Value::Object(row.columns.clone()).to_string();
        if let Some(first) = seen.get(&key) {
            report.add(
                "duplicate",
                Level::Warning,
                &row.place,
                format!("the same as {first}"),
            );
        } else {
            seen.insert(key, row.place.clone());
        }
        let mut one = RowCheck {
            report: &mut report,
            place: &row.place,
            row: index as u64,
            tokens,
        };
        match purpose {
            Purpose::Sft => one.judge(SftRecord::from_row(row.columns), RowCheck::sft),
            Purpose::Preference => one.judge(
                PreferenceRecord::from_row(row.columns),
                RowCheck::preference,
            ),
            Purpose::Prompts => one.judge(PromptRecord::from_row(row.columns), RowCheck::prompt),
        }
    }
    if report.rows == 0 && !report.failed {
        report.add("no_rows", Level::Error, "", "the file has no rows");
    }
    report
}

fn one_line(e: &Error) -> String {
    e.to_string().replace("\n  ", "; ")
}

struct RowCheck<'a> {
    report: &'a mut CheckReport,
    place: &'a str,
    row: u64,
    tokens: Option<(&'a ChatTokenizer, Limits)>,
}

impl RowCheck<'_> {
    fn add(&mut self, rule: &'static str, level: Level, what: impl Into<String>) {
        self.report.add(rule, level, self.place, what);
    }

    fn judge<R>(&mut self, record: Result<R, Fault>, then: fn(&mut Self, &R)) {
        match record {
            Ok(r) => then(self, &r),
            Err(f) => {
                let column = if f.column.is_empty() {
                    String::new()
                } else {
                    format!("column `{}`: ", f.column)
                };
                self.add("wrong_row", Level::Error, format!("{column}{}", f.what));
            }
        }
    }

    fn sft(&mut self, r: &SftRecord) {
        let conversation: Vec<Message> = r
            .prompt
            .iter()
            .chain([&r.completion])
            .flat_map(messages)
            .collect();
        self.order(&conversation);
        self.text(r.prompt.iter().chain([&r.completion]));
        if let Some((t, limits)) = self.tokens {
            self.outcome(t.sft_group(self.row, r, &limits));
        }
    }

    fn preference(&mut self, r: &PreferenceRecord) {
        let conversation: Vec<Message> = [&r.prompt, &r.chosen]
            .into_iter()
            .flat_map(messages)
            .collect();
        self.order(&conversation);
        self.text([&r.prompt, &r.chosen, &r.rejected].into_iter());
        if r.chosen == r.rejected {
            self.add(
                "identical",
                Level::Warning,
                "chosen equals rejected: the pair is dropped",
            );
        }
        if let Some((t, limits)) = self.tokens {
            self.outcome(t.preference_group(self.row, r, &limits));
        }
    }

    fn prompt(&mut self, r: &PromptRecord) {
        self.text([&r.prompt].into_iter());
        if let Some((t, limits)) = self.tokens {
            match t.prompt_ids(&r.prompt) {
                Ok(ids) if ids.len() > limits.max_prompt => {
                    self.add(
                        "dropped",
                        Level::Warning,
                        format!(
                            "the prompt has {} tokens, the limit is {}",
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
            Ok(Outcome::Truncated(_)) => self.add(
                "truncated",
                Level::Warning,
                "a completion is cut at the limit and loses its end",
            ),
            Ok(Outcome::Dropped(reason)) => self.add("dropped", Level::Warning, reason.to_string()),
            Err(e) => self.add("template", Level::Error, one_line(&e)),
        }
    }

    /// System first, then user and assistant in turn (tools may come anywhere after the system).
    fn order(&mut self, conversation: &[Message]) {
        let talk: Vec<Role> = conversation.iter().map(|m| m.role).collect();
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

    fn text<'t>(&mut self, texts: impl Iterator<Item = &'t Text>) {
        const MARKERS: [&str; 6] = [
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "[INST]",
            "<|eot_id|>",
            "</s>",
        ];
        let mut found: HashSet<&'static str> = HashSet::new();
        for t in texts {
            let joined = t.joined();
            if let Some(m) = MARKERS.iter().find(|m| joined.contains(**m))
                && found.insert("marker")
            {
                self.add(
                    "special_token",
                    Level::Warning,
                    format!("{m} stands in the text; it is read as plain text"),
                );
            }
            if joined
                .chars()
                .any(|c| c.is_control() && !matches!(c, '\n' | '\t' | '\r'))
                && found.insert("control")
            {
                self.add("control_character", Level::Warning, joined);
            }
        }
    }
}

fn messages(t: &Text) -> Vec<Message> {
    match t {
        Text::Messages(m) => m.clone(),
        Text::Plain(_) => Vec::new(),
    }
}
