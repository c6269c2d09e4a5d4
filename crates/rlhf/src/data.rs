//! `rlhf data`: import, check, stats, render.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these commands speak to the terminal"
)]

use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use rlhf_data::check::{CheckOptions, FindingsOut, Purpose, check_each};
use rlhf_data::group::PromptGroup;
use rlhf_data::record;
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
            against,
            eval,
            ngram,
            near_duplicate,
            max_characters,
            findings,
            json,
        } => {
            let tokenizer = tokenizer.as_deref().map(ChatTokenizer::load).transpose()?;
            if !(0.0..=1.0).contains(near_duplicate) {
                let what = format!("a similarity of {near_duplicate}");
                return Err(usage(what, "--near-duplicate", "give a number from 0 to 1").into());
            }
            let limits = Limits::new(*max_prompt, *max_completion);
            let options = CheckOptions {
                tokens: tokenizer.as_ref().map(|t| (t, limits)),
                against: against.clone(),
                eval: eval.clone(),
                ngram: *ngram,
                near_duplicate: Some(*near_duplicate).filter(|x| *x > 0.0),
                max_characters: *max_characters,
            };
            check(input, *purpose, &options, findings.as_deref(), *json)
        }
        DataCommand::Stats {
            input,
            purpose,
            tokenizer,
            html,
            json,
        } => {
            let tokenizer = tokenizer.as_deref().map(ChatTokenizer::load).transpose()?;
            stats(input, *purpose, tokenizer.as_ref(), html.as_deref(), *json)
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

fn check(
    input: &Path,
    purpose: PurposeArg,
    options: &CheckOptions<'_>,
    findings: Option<&Path>,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let mut file = findings.map(FindingsOut::create).transpose()?;
    let report = check_each(input, purpose.purpose(), options, &mut |f| {
        if let Some(file) = &mut file {
            file.write(f);
        }
    });
    if as_json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        println!("{report}");
    }
    if let Some(file) = file {
        file.finish()?;
    }
    Ok(ExitCode::from(if report.failed { 2 } else { 0 }))
}

fn stats(
    input: &Path,
    purpose: PurposeArg,
    tokenizer: Option<&ChatTokenizer>,
    html: Option<&Path>,
    as_json: bool,
) -> anyhow::Result<ExitCode> {
    let stats = rlhf_data::stats::stats(input, purpose.purpose(), tokenizer)?;
    if let Some(path) = html {
        let page = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"color-scheme\" content=\"light dark\"><title>rlhf data stats</title></head><body>{}</body></html>\n",
            stats.html()
        );
        crate::files::write(path, page.as_bytes())?;
    }
    if as_json {
        println!("{}", serde_json::to_string_pretty(&stats)?);
    } else {
        print!("{stats}");
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
