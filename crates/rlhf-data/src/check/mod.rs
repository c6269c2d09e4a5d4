//! A lint of a data file before any training: every rule, every row, nothing changed.
//!
//! Invariant: fail-closed. What cannot be read is an error; what would be dropped or mistrained is
//! reported with its row.

mod findings;
pub(crate) mod near;
mod pairs;
mod places;
mod row;
mod splits;
pub(crate) mod values;

use std::borrow::Cow;
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::Error;
use crate::record::{
    PreferenceRecord, PromptRecord, RankedRecord, RatedRecord, Record, SftRecord, StepwiseRecord,
    UnpairedRecord,
};
use crate::source;
use crate::tokenize::{ChatTokenizer, Limits};

use near::NearDuplicates;
use pairs::{Contradictions, LengthBias};
use places::Places;
use row::RowCheck;
use splits::Splits;

pub(crate) use pairs::digest;

pub use findings::{FindingsOut, findings_schema, write_findings_parquet};
pub use splits::SHORT_NGRAM;

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Purpose {
    /// Demonstrations.
    Sft,
    /// Chosen and rejected completions.
    Preference,
    /// Several completions of a prompt, in order or with scores.
    Ranked,
    /// Completions with a thumb up or down.
    Unpaired,
    /// Solutions in steps, each right or wrong.
    Stepwise,
    /// Completions with a number for each attribute.
    Rated,
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

impl Level {
    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
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
    /// The column, or nothing.
    pub column: String,
    /// What was found, control characters escaped.
    pub what: String,
}

/// What [`check`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct CheckReport {
    /// Rows read.
    pub rows: usize,
    /// Findings in the order of rows, at most [`MAX_FINDINGS`]; where there are more, errors go before
    /// warnings.
    pub findings: Vec<Finding>,
    /// How often each rule was broken, also beyond the listed findings.
    pub counts: std::collections::BTreeMap<&'static str, usize>,
    /// Whether any finding is an error.
    pub failed: bool,
}

/// Findings listed; the rest is only counted.
pub const MAX_FINDINGS: usize = 200;

/// What to look for.
#[derive(Clone, Debug)]
pub struct CheckOptions<'a> {
    /// A tokenizer and limits, to see what becomes of each row in tokens.
    pub tokens: Option<(&'a ChatTokenizer, Limits)>,
    /// Other splits, whose prompts must not stand in the file (rule `leak`): about 50 bytes a row.
    pub against: Vec<PathBuf>,
    /// Evaluation sets, whose text should not stand in the file (rule `contamination`), without what
    /// more than ten of their rows share: about 40 bytes a word.
    pub eval: Vec<PathBuf>,
    /// Words that must agree in a row for `contamination`, 13 as in Brown et al. 2020, "Language Models
    /// are Few-Shot Learners", appendix C; [`SHORT_NGRAM`] for shorter texts.
    pub ngram: usize,
    /// The Jaccard similarity of 5-word shingles from which rows are near-duplicates, or `None` to look
    /// for none. Pairs below about 0.7 are rarely compared. About 600 bytes a row.
    pub near_duplicate: Option<f64>,
    /// More characters than this in a column are a finding (rule `over_long`).
    pub max_characters: usize,
}

impl Default for CheckOptions<'_> {
    fn default() -> Self {
        Self {
            tokens: None,
            against: Vec::new(),
            eval: Vec::new(),
            ngram: 13,
            near_duplicate: Some(0.8),
            max_characters: 1_000_000,
        }
    }
}

/// The report as it grows, and who else hears of findings.
struct Ledger<'a> {
    report: CheckReport,
    sink: &'a mut dyn FnMut(&Finding),
}

impl Ledger<'_> {
    fn unreadable(&mut self, e: &Error) {
        let (place, column) = match e {
            Error::Row { place, column, .. } => (place.as_str(), column.as_str()),
            _ => ("", ""),
        };
        self.add("unreadable", Level::Error, (place, column), one_line(e));
    }

    fn add(
        &mut self,
        rule: &'static str,
        level: Level,
        (place, column): (&str, &str),
        what: impl Into<String>,
    ) {
        let finding = Finding {
            rule,
            level,
            place: place.into(),
            column: excerpt(column),
            what: shown(&what.into(), MAX_MESSAGE),
        };
        (self.sink)(&finding);
        let r = &mut self.report;
        *r.counts.entry(rule).or_default() += 1;
        r.failed |= level == Level::Error;
        if r.findings.len() >= MAX_FINDINGS && (level == Level::Error || place.is_empty()) {
            // An error, or what concerns the whole file, is never hidden behind warnings.
            if let Some(i) = r.findings.iter().rposition(|f| f.level == Level::Warning) {
                r.findings.remove(i);
            }
        }
        if r.findings.len() < MAX_FINDINGS {
            r.findings.push(finding);
        }
    }
}

impl fmt::Display for CheckReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for x in &self.findings {
            let level = x.level.name();
            writeln!(
                f,
                "{level:<8} {:<18} {:<10} {:<10} {}",
                x.rule, x.place, x.column, x.what
            )?;
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

fn invisible(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200b}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2060}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
}

/// Characters of a message: enough for a path with the longest name there is.
const MAX_MESSAGE: usize = 1_000;

/// The beginning of a text of the data, control characters escaped.
fn excerpt(text: &str) -> String {
    shown(text, 160)
}

/// The first `limit` characters of a text, control characters escaped.
fn shown(text: &str, limit: usize) -> String {
    let mut out = String::new();
    for (i, c) in text.chars().enumerate() {
        if i == limit {
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
    let options = CheckOptions {
        tokens,
        ..CheckOptions::default()
    };
    check_with(path, purpose, &options)
}

/// [`check`] with every choice.
#[must_use]
pub fn check_with(path: &Path, purpose: Purpose, options: &CheckOptions<'_>) -> CheckReport {
    check_each(path, purpose, options, &mut |_| {})
}

/// [`check_with`]; `sink` hears of every finding, also beyond [`MAX_FINDINGS`].
pub fn check_each(
    path: &Path,
    purpose: Purpose,
    options: &CheckOptions<'_>,
    sink: &mut dyn FnMut(&Finding),
) -> CheckReport {
    let mut report = Ledger {
        report: CheckReport::default(),
        sink,
    };
    let rows = match source::rows(path) {
        Ok(rows) => rows,
        Err(e) => {
            report.unreadable(&e);
            return report.report;
        }
    };
    // A digest a row, so that memory does not grow with the texts.
    let mut seen: HashMap<[u8; 16], u64> = HashMap::new();
    let mut places = Places::default();
    let mut memory = Memory {
        splits: Splits::load(&options.against, &options.eval, options.ngram, &mut report),
        ..Memory::default()
    };
    for (index, row) in rows.enumerate() {
        let row = match row {
            Ok(row) => row,
            Err(e) => {
                report.unreadable(&e);
                break;
            }
        };
        report.report.rows += 1;
        let here = places.number(&row.place);
        let mut duplicate = false;
        match seen.entry(digest_of(&row.columns)) {
            Entry::Occupied(first) => {
                duplicate = true;
                report.add(
                    "duplicate",
                    Level::Warning,
                    (&row.place, ""),
                    format!("the same as {}", places.name(*first.get())),
                );
            }
            Entry::Vacant(v) => {
                v.insert(here);
            }
        }
        let mut one = RowCheck {
            report: &mut report,
            memory: &mut memory,
            options,
            places: &places,
            place: &row.place,
            here,
            row: index as u64,
            // Judgements of one text by several people are alike on purpose.
            look_alike: !duplicate && row.columns.get("annotator").is_none_or(Value::is_null),
        };
        one.columns(&row.columns, purpose);
        match purpose {
            Purpose::Sft => one.judge(SftRecord::from_row(row.columns), RowCheck::sft),
            Purpose::Preference => one.judge(
                PreferenceRecord::from_row(row.columns),
                RowCheck::preference,
            ),
            Purpose::Ranked => one.judge(RankedRecord::from_row(row.columns), RowCheck::ranked),
            Purpose::Unpaired => {
                one.judge(UnpairedRecord::from_row(row.columns), RowCheck::unpaired)
            }
            Purpose::Stepwise => {
                one.judge(StepwiseRecord::from_row(row.columns), RowCheck::stepwise)
            }
            Purpose::Rated => one.judge(RatedRecord::from_row(row.columns), RowCheck::rated),
            Purpose::Prompts => one.judge(PromptRecord::from_row(row.columns), RowCheck::prompt),
        }
    }
    if let Some(what) = memory.lengths.finding() {
        report.add("length_bias", Level::Warning, ("", ""), what);
    }
    if report.report.rows == 0 && !report.report.failed {
        report.add("no_rows", Level::Error, ("", ""), "the file has no rows");
    }
    report.report
}

/// What is remembered of earlier rows and other files.
#[derive(Default)]
struct Memory {
    near: NearDuplicates,
    contradictions: Contradictions,
    lengths: LengthBias,
    splits: Splits,
}

fn digest_of(row: &Map<String, Value>) -> [u8; 16] {
    digest(
        row.iter()
            .flat_map(|(name, value)| [Cow::Borrowed(name.as_str()), value.to_string().into()]),
    )
}

fn one_line(e: &Error) -> String {
    e.to_string().replace("\n  ", "; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(lines: &str, purpose: Purpose) -> CheckReport {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.jsonl");
        std::fs::write(&path, lines).unwrap();
        check(&path, purpose, None)
    }

    fn seen(r: &CheckReport) -> Vec<(&str, &str, &str)> {
        r.findings
            .iter()
            .map(|f| (f.rule, f.place.as_str(), f.column.as_str()))
            .collect()
    }

    #[test]
    fn findings_name_rule_line_and_column() {
        let r = of(
            "{\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"b\"}\n\
             {\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\" \"}\n\
             {\"prompt\":\"a\",\"chosen\":\"b\",\"rejected\":\"b\"}\n\
             {\"prompt\":\"a\",\"chosen\":3,\"rejected\":\"b\"}\n\
             {\"prompt\":\"a\",\"chosen\":\"</s>\\u0007\",\"rejected\":\"b\"}\n",
            Purpose::Preference,
        );
        assert_eq!(
            seen(&r),
            [
                ("identical", "line 1", ""),
                ("empty", "line 2", "rejected"),
                ("duplicate", "line 3", ""),
                ("identical", "line 3", ""),
                ("wrong_type", "line 4", "chosen"),
                ("special_token", "line 5", "chosen"),
                ("control_character", "line 5", "chosen"),
            ]
        );
        assert_eq!(r.findings[2].what, "the same as line 1");
        assert!(r.findings[6].what.contains("\\u{7}"), "{:?}", r.findings[6]);
        assert!(r.failed && r.rows == 5 && r.counts["identical"] == 2);
        let text = r.to_string();
        assert!(
            text.contains("2 × identical") && text.ends_with("not fit for training"),
            "{text}"
        );
        assert!(
            serde_json::to_string(&r)
                .unwrap()
                .contains("\"rule\":\"empty\"")
        );
    }

    #[test]
    fn roles_and_labels() {
        let turn = |role: &str| format!("{{\"role\":\"{role}\",\"content\":\"x\"}}");
        let row = |roles: &[&str]| {
            let turns: Vec<String> = roles.iter().map(|r| turn(r)).collect();
            format!("{{\"messages\":[{}]}}\n", turns.join(","))
        };
        let r = of(
            &[
                row(&["system", "user", "assistant"]),
                row(&["assistant", "user", "assistant"]),
                row(&["user", "user", "assistant"]),
                row(&["user", "system", "assistant"]),
                row(&["user"]),
                row(&["robot", "assistant"]),
            ]
            .concat(),
            Purpose::Sft,
        );
        assert_eq!(
            seen(&r),
            [
                ("role_order", "line 2", ""),
                ("role_order", "line 3", ""),
                ("role_order", "line 4", ""),
                ("no_assistant_turn", "line 5", "messages"),
                ("unknown_role", "line 6", "messages"),
            ]
        );
        let r = of(
            "{\"prompt\":\"a\",\"completion\":\"b\",\"label\":false}\n",
            Purpose::Sft,
        );
        assert_eq!(seen(&r), [("label_ignored", "line 1", "label")]);
        assert!(!r.failed);
    }

    #[test]
    fn a_broken_line_is_named_and_ends_the_check() {
        let r = of("{\"prompt\":\"a\"}\n{\"prompt\n", Purpose::Prompts);
        assert_eq!(seen(&r), [("unreadable", "line 2", "")]);
        assert!(r.failed && r.rows == 1);
        let r = of("", Purpose::Prompts);
        assert_eq!(seen(&r), [("no_rows", "", "")]);
    }
}
