//! `rlhf data`: import, check, stats, render.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these commands speak to the terminal"
)]

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use rlhf_data::check::{Purpose, check};
use rlhf_data::group::PromptGroup;
use rlhf_data::record::{self, PreferenceRecord, PromptRecord, SftRecord};
use rlhf_data::source::{self, ParquetOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome};
use serde_json::json;

use crate::args::{DataCommand, PurposeArg};
use crate::terminal::escape;
use crate::usage::usage;

pub(crate) fn run(command: &DataCommand) -> anyhow::Result<ExitCode> {
    match command {
        DataCommand::Import {
            input,
            out,
            purpose,
        } => import(input, out, *purpose),
        DataCommand::Check {
            input,
            purpose,
            tokenizer,
            max_prompt,
            max_completion,
            json,
        } => {
            let tokenizer = tokenizer.as_deref().map(ChatTokenizer::load).transpose()?;
            let limits = Limits::new(*max_prompt, *max_completion);
            let report = check(
                input,
                purpose.purpose(),
                tokenizer.as_ref().map(|t| (t, limits)),
            );
            if *json {
                println!("{}", serde_json::to_string_pretty(&report)?);
            } else {
                println!("{report}");
            }
            Ok(ExitCode::from(if report.failed { 2 } else { 0 }))
        }
        DataCommand::Stats {
            input,
            purpose,
            tokenizer,
            json,
        } => {
            let tokenizer = tokenizer.as_deref().map(ChatTokenizer::load).transpose()?;
            stats(input, *purpose, tokenizer.as_ref(), *json)
        }
        DataCommand::Render {
            input,
            purpose,
            tokenizer,
            row,
            json,
        } => render(input, *purpose, tokenizer, *row, *json),
    }
}

impl PurposeArg {
    fn purpose(self) -> Purpose {
        match self {
            Self::Sft => Purpose::Sft,
            Self::Preference => Purpose::Preference,
            Self::Prompts => Purpose::Prompts,
        }
    }
}

fn import(input: &Path, out: &Path, purpose: PurposeArg) -> anyhow::Result<ExitCode> {
    const CHUNK: usize = 1024;
    fn copy<R>(
        rows: impl Iterator<Item = rlhf_data::Result<R>>,
        mut file: ParquetOut,
        batch: impl Fn(&[R]) -> Result<arrow_array::RecordBatch, arrow_schema::ArrowError>,
        input: &Path,
    ) -> anyhow::Result<usize> {
        let mut rows = rows;
        let mut n = 0;
        loop {
            let chunk = rows
                .by_ref()
                .take(CHUNK)
                .collect::<rlhf_data::Result<Vec<R>>>()?;
            if chunk.is_empty() {
                break;
            }
            n += chunk.len();
            file.write(&batch(&chunk)?)?;
        }
        if n == 0 {
            return Err(usage(
                "no rows",
                input.display().to_string(),
                "give a file with at least one row",
            )
            .into());
        }
        file.finish()?;
        Ok(n)
    }
    let n = match purpose {
        PurposeArg::Sft => copy(
            source::read_sft(input)?,
            ParquetOut::create(out, record::sft_schema())?,
            record::sft_batch,
            input,
        )?,
        PurposeArg::Preference => copy(
            source::read_preference(input)?,
            ParquetOut::create(out, record::preference_schema())?,
            record::preference_batch,
            input,
        )?,
        PurposeArg::Prompts => copy(
            source::read_prompts(input)?,
            ParquetOut::create(out, record::prompt_schema())?,
            record::prompt_batch,
            input,
        )?,
    };
    eprintln!("{n} rows written to {}", out.display());
    Ok(ExitCode::SUCCESS)
}

/// Lengths of one column.
#[derive(Default)]
struct Lengths(Vec<usize>);

impl Lengths {
    fn json(&self) -> serde_json::Value {
        let mut sorted = self.0.clone();
        sorted.sort_unstable();
        let at = |q: f64| {
            sorted
                .get((q * (sorted.len().saturating_sub(1)) as f64).round() as usize)
                .copied()
                .unwrap_or(0)
        };
        let mean = sorted.iter().sum::<usize>() as f64 / sorted.len().max(1) as f64;
        json!({"mean": (mean * 10.0).round() / 10.0, "min": at(0.0), "median": at(0.5), "p95": at(0.95), "max": at(1.0)})
    }
}

fn stats(
    input: &Path,
    purpose: PurposeArg,
    tokenizer: Option<&ChatTokenizer>,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let size = |text: &str| -> anyhow::Result<usize> {
        Ok(match tokenizer {
            Some(t) => t.encode(text)?.len(),
            None => text.chars().count(),
        })
    };
    let mut columns: Vec<(&str, Lengths)> = Vec::new();
    let mut rows = 0usize;
    let mut extra = json!({});
    match purpose {
        PurposeArg::Sft => {
            let mut lengths = Lengths::default();
            for r in source::read_sft(input)? {
                let r: SftRecord = r?;
                rows += 1;
                lengths.0.push(size(&r.completion.joined())?);
            }
            columns.push(("completion", lengths));
        }
        PurposeArg::Prompts => {
            let mut lengths = Lengths::default();
            for r in source::read_prompts(input)? {
                let r: PromptRecord = r?;
                rows += 1;
                lengths.0.push(size(&r.prompt.joined())?);
            }
            columns.push(("prompt", lengths));
        }
        PurposeArg::Preference => {
            let (mut p, mut c, mut j, mut longer) = (
                Lengths::default(),
                Lengths::default(),
                Lengths::default(),
                0.0,
            );
            for r in source::read_preference(input)? {
                let r: PreferenceRecord = r?;
                rows += 1;
                p.0.push(size(&r.prompt.joined())?);
                let (a, b) = (size(&r.chosen.joined())?, size(&r.rejected.joined())?);
                longer += if a > b {
                    1.0
                } else if a == b {
                    0.5
                } else {
                    0.0
                };
                c.0.push(a);
                j.0.push(b);
            }
            columns.extend([("prompt", p), ("chosen", c), ("rejected", j)]);
            extra = json!({"chosen_is_longer": longer / rows.max(1) as f64});
        }
    }
    let unit = if tokenizer.is_some() {
        "tokens"
    } else {
        "characters"
    };
    if as_json {
        let lengths: serde_json::Map<_, _> = columns
            .iter()
            .map(|(n, l)| ((*n).to_owned(), l.json()))
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(
                &json!({"rows": rows, "unit": unit, "lengths": lengths, "more": extra})
            )?
        );
        return Ok(ExitCode::SUCCESS);
    }
    println!("{rows} rows; lengths in {unit}:");
    let mut table = vec![vec![
        String::new(),
        "mean".into(),
        "min".into(),
        "median".into(),
        "p95".into(),
        "max".into(),
    ]];
    for (name, l) in &columns {
        let j = l.json();
        table.push(
            std::iter::once((*name).to_owned())
                .chain(["mean", "min", "median", "p95", "max"].map(|k| j[k].to_string()))
                .collect(),
        );
    }
    println!("{}", crate::terminal::table(&table));
    if let Some(x) = extra["chosen_is_longer"].as_f64() {
        println!(
            "the chosen completion is the longer one in {:.1}% of pairs",
            100.0 * x
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn render(
    input: &Path,
    purpose: PurposeArg,
    folder: &Path,
    row: usize,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let t = ChatTokenizer::load(folder)?;
    let limits = Limits::new(usize::MAX, usize::MAX);
    let absent = |rows: usize| {
        usage(
            format!("there is no row {row}; the file has {rows} rows"),
            input.display().to_string(),
            "rows count from 0",
        )
    };
    let outcome: Outcome<PromptGroup> = match purpose {
        PurposeArg::Sft => {
            let records = source::read_sft(input)?
                .take(row + 1)
                .collect::<rlhf_data::Result<Vec<_>>>()?;
            t.sft_group(
                row as u64,
                records.get(row).ok_or_else(|| absent(records.len()))?,
                &limits,
            )?
        }
        PurposeArg::Preference => {
            let records = source::read_preference(input)?
                .take(row + 1)
                .collect::<rlhf_data::Result<Vec<_>>>()?;
            t.preference_group(
                row as u64,
                records.get(row).ok_or_else(|| absent(records.len()))?,
                &limits,
            )?
        }
        PurposeArg::Prompts => {
            let records = source::read_prompts(input)?
                .take(row + 1)
                .collect::<rlhf_data::Result<Vec<_>>>()?;
            let prompt = t.prompt_ids(
                &records
                    .get(row)
                    .ok_or_else(|| absent(records.len()))?
                    .prompt,
            )?;
            Outcome::Kept(PromptGroup {
                row: row as u64,
                prompt,
                completions: Vec::new(),
            })
        }
    };
    let group = match outcome {
        Outcome::Kept(g) | Outcome::Truncated(g) => g,
        Outcome::Dropped(reason) => {
            return Err(usage(
                format!("the row would not be used: {reason}"),
                format!("{}, row {row}", input.display()),
                "choose another row",
            )
            .into());
        }
    };
    if as_json {
        let completions: Vec<_> = group
            .completions
            .iter()
            .map(|c| json!({"ids": c.ids, "pieces": t.pieces(&c.ids), "trained": c.trained.iter().map(|r| [r.start, r.end]).collect::<Vec<_>>(), "finish": c.finish}))
            .collect();
        println!(
            "{}",
            serde_json::to_string_pretty(
                &json!({"row": row, "prompt_ids": group.prompt, "prompt": t.pieces(&group.prompt), "completions": completions})
            )?
        );
        return Ok(ExitCode::SUCCESS);
    }
    let colour = std::io::stdout().is_terminal();
    println!("prompt, {} tokens:", group.prompt.len());
    println!("{}", escape(&t.pieces(&group.prompt).concat()));
    for (i, c) in group.completions.iter().enumerate() {
        println!(
            "\ncompletion {i}, {} tokens, {} trained{}:",
            c.ids.len(),
            c.trained_tokens(),
            if colour {
                " (green)"
            } else {
                " (between «»)"
            }
        );
        let mut line = String::new();
        for (at, piece) in t.pieces(&c.ids).iter().enumerate() {
            let trained = c.trained.iter().any(|r| r.contains(&at));
            line += &match (trained, colour) {
                (true, true) => format!("\u{1b}[32m{}\u{1b}[0m", escape(piece)),
                (true, false) => format!("«{}»", escape(piece)),
                (false, _) => escape(piece),
            };
        }
        println!("{line}");
        println!(
            "{}",
            c.ids
                .iter()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(" ")
        );
    }
    Ok(ExitCode::SUCCESS)
}
