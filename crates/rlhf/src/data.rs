//! `rlhf data`: import, check, stats, render.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "these commands speak to the terminal"
)]

use std::cell::Cell;
use std::io::IsTerminal as _;
use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use arrow_array::RecordBatch;
use arrow_schema::{ArrowError, SchemaRef};
use rlhf_data::check::{CheckOptions, FindingsOut, Purpose, check_each};
use rlhf_data::group::PromptGroup;
use rlhf_data::import::{self, Format, OnBad};
use rlhf_data::record::{
    self, Annotated, Fault, Pairing, PreferenceRecord, PromptRecord, RankedRecord, RatedRecord,
    Record, SftRecord, StepwiseRecord, UnpairedRecord, pair_to_unpaired, ranked_to_pairs,
};
use rlhf_data::source::{self, JsonlOut, ParquetOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome};
use serde_json::{Map, Value, json};

use crate::args::{DataCommand, KindArg, PairsArg, PurposeArg};
use crate::terminal::escape;
use crate::usage::usage;

pub(crate) fn run(command: &DataCommand) -> anyhow::Result<ExitCode> {
    match command {
        DataCommand::Import {
            input,
            out,
            purpose,
            from,
            skip_bad,
            pairs,
            seed,
        } => {
            let from = from
                .as_deref()
                .map(|name| {
                    Format::parse(name).ok_or_else(|| {
                        let known: Vec<&str> = Format::ALL.iter().map(|f| f.name()).collect();
                        let mend = format!("use one of {}", known.join(", "));
                        usage(format!("no format named `{name}`"), "--from", mend)
                    })
                })
                .transpose()?;
            let options = ImportOptions {
                from,
                bad: if *skip_bad {
                    OnBad::Skip
                } else {
                    OnBad::Refuse
                },
                pairing: match pairs {
                    PairsArg::All => Pairing::All,
                    PairsArg::BestVsRandom => Pairing::BestVsRandom,
                    PairsArg::Adjacent => Pairing::Adjacent,
                },
                seed: *seed,
            };
            import(input, out, *purpose, &options)
        }
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

impl KindArg {
    fn purpose(self) -> Purpose {
        match self {
            Self::Sft => Purpose::Sft,
            Self::Preference => Purpose::Preference,
            Self::Prompts => Purpose::Prompts,
            Self::Ranked => Purpose::Ranked,
            Self::Unpaired => Purpose::Unpaired,
            Self::Stepwise => Purpose::Stepwise,
            Self::Rated => Purpose::Rated,
        }
    }
}

/// What `import` is told beside its files.
struct ImportOptions {
    from: Option<Format>,
    bad: OnBad,
    pairing: Pairing,
    seed: u64,
}

/// Makes a batch of records.
type ToBatch<R> = fn(&[R]) -> Result<RecordBatch, ArrowError>;

/// The columns of a Parquet file.
enum Layout<R> {
    /// Those that TRL reads.
    Trl(SchemaRef, ToBatch<R>),
    /// All that the records hold, in the form of the first.
    Whole,
}

/// A file of records to be written, which begins with the first of them.
enum Out<R> {
    Parquet(Layout<R>, Option<Box<(SchemaRef, ParquetOut)>>),
    Jsonl(Option<JsonlOut>),
}

impl<R: Record> Out<R> {
    fn of(path: &Path, layout: Layout<R>) -> anyhow::Result<Self> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("parquet") => Ok(Self::Parquet(layout, None)),
            Some("jsonl") => Ok(Self::Jsonl(None)),
            _ => {
                let place = path.display().to_string();
                Err(usage("unknown kind of file", place, "name it .parquet or .jsonl").into())
            }
        }
    }

    fn write(&mut self, path: &Path, rows: &[R]) -> anyhow::Result<()> {
        let Some(first) = rows.first() else {
            return Ok(());
        };
        match self {
            Self::Parquet(layout, file) => {
                let (schema, file) = &mut **match file {
                    Some(begun) => begun,
                    None => {
                        let schema = match layout {
                            Layout::Trl(schema, _) => schema.clone(),
                            Layout::Whole => record::schema_of(first),
                        };
                        let begun = (schema.clone(), ParquetOut::create(path, schema)?);
                        file.insert(Box::new(begun))
                    }
                };
                let batch = match layout {
                    Layout::Trl(_, batch) => batch(rows)?,
                    Layout::Whole => record::batch(schema, rows)?,
                };
                file.write(&batch)?;
            }
            Self::Jsonl(file) => {
                let file = match file {
                    Some(begun) => begun,
                    None => file.insert(JsonlOut::create(path)?),
                };
                for row in rows {
                    file.write(&row.to_row())?;
                }
            }
        }
        Ok(())
    }

    fn finish(self) -> anyhow::Result<()> {
        match self {
            Self::Parquet(_, Some(begun)) => begun.1.finish()?,
            Self::Jsonl(Some(file)) => file.finish()?,
            Self::Parquet(_, None) | Self::Jsonl(None) => {}
        }
        Ok(())
    }
}

/// Copies the rows of `input` to `out`; `records` gives those of a row, whose number it is told.
fn copy<R: Record>(
    input: &Path,
    out: &Path,
    options: &ImportOptions,
    layout: Layout<R>,
    records: impl Fn(u64, Map<String, Value>) -> Result<Vec<R>, Fault>,
) -> anyhow::Result<ExitCode> {
    const CHUNK: usize = 1024;
    let mut file = Out::of(out, layout)?;
    let mut rows = import::read(input, options.from, options.bad)?;
    let (mut n, mut chunk) = (0, Vec::new());
    let (mut skipped, mut first) = (0, None);
    let mut write = |n: &mut usize, chunk: &mut Vec<R>| {
        let from = *n;
        *n += chunk.len();
        let written = file.write(out, chunk);
        chunk.clear();
        written.with_context(|| format!("{}: the records from {from} on", out.display()))
    };
    for (number, row) in (0..).zip(rows.by_ref()) {
        let (_, row) = row?;
        match records(number, row.columns) {
            Ok(some) => chunk.extend(some),
            Err(f) => {
                let e = rlhf_data::Error::Row {
                    path: input.to_owned(),
                    place: row.place,
                    column: f.column,
                    what: f.what,
                    mend: f.mend,
                };
                if options.bad == OnBad::Refuse {
                    return Err(e.into());
                }
                skipped += 1;
                first.get_or_insert(e);
            }
        }
        if chunk.len() >= CHUNK {
            write(&mut n, &mut chunk)?;
        }
    }
    write(&mut n, &mut chunk)?;
    let bad = rows.skipped();
    if let Some(e) = bad.first.first().or(first.as_ref()) {
        let e = e.to_string().replace("\n  ", "; ");
        eprintln!("{} bad rows left out; the first: {e}", skipped + bad.count);
    }
    if bad.nothing > 0 {
        eprintln!("{} rows give nothing, such as ties", bad.nothing);
    }
    if n == 0 {
        return Err(usage(
            "no rows",
            input.display().to_string(),
            "give a file with at least one good row",
        )
        .into());
    }
    file.finish()?;
    let format = rows.format().map_or("", Format::name);
    eprintln!(
        "{n} rows of the format {format} written to {}",
        out.display()
    );
    Ok(ExitCode::SUCCESS)
}

/// The rows as they are, each with its weight and source.
fn whole<R: Record>(input: &Path, out: &Path, options: &ImportOptions) -> anyhow::Result<ExitCode> {
    copy(input, out, options, Layout::Whole, |_, row| {
        Ok(vec![Annotated::<R>::from_row(row)?])
    })
}

/// Whether the pairs of one ranking fit into memory: each repeats the prompt.
fn pairs_fit(ranked: &RankedRecord, pairing: Pairing) -> Result<(), Fault> {
    const MAX_BYTES: usize = 256 << 20;
    let k = ranked.completions.len();
    let pairs = match pairing {
        Pairing::All => k.saturating_mul(k.saturating_sub(1)) / 2,
        Pairing::Adjacent => k.saturating_sub(1),
        Pairing::BestVsRandom => 1,
    };
    let longest = ranked.completions.iter().map(|c| c.joined().len()).max();
    let bytes = ranked.prompt.joined().len() + 2 * longest.unwrap_or_default();
    if pairs.saturating_mul(bytes.max(64)) <= MAX_BYTES {
        return Ok(());
    }
    Err(Fault {
        rule: "over_long",
        column: "completions".into(),
        what: format!("{pairs} pairs of up to {bytes} bytes each"),
        mend: "drop the row, or make fewer pairs of it with --pairs".into(),
    })
}

/// A thumb as it is, or the two of a pair.
fn thumbs(row: Map<String, Value>) -> Result<Vec<Annotated<UnpairedRecord>>, Fault> {
    if row.contains_key("label") || !row.contains_key("chosen") {
        return Ok(vec![Annotated::from_row(row)?]);
    }
    let pair = Annotated::<PreferenceRecord>::from_row(row)?;
    let thumbs = pair_to_unpaired(&pair.record).map(|record| Annotated {
        record,
        weight: pair.weight,
        source: pair.source.clone(),
    });
    Ok(thumbs.into())
}

fn import(
    input: &Path,
    out: &Path,
    purpose: KindArg,
    options: &ImportOptions,
) -> anyhow::Result<ExitCode> {
    match purpose {
        KindArg::Sft => copy(
            input,
            out,
            options,
            Layout::Trl(record::sft_schema(), record::sft_batch),
            |_, row| Ok(vec![SftRecord::from_row(row)?]),
        ),
        KindArg::Preference => copy(
            input,
            out,
            options,
            Layout::Trl(record::preference_schema(), record::preference_batch),
            |number, row| {
                if row.contains_key("completions") && !row.contains_key("chosen") {
                    let ranked = RankedRecord::from_row(row)?;
                    pairs_fit(&ranked, options.pairing)?;
                    let pairs = ranked_to_pairs(&ranked, options.pairing, options.seed, number);
                    return Ok(pairs.collect());
                }
                Ok(vec![PreferenceRecord::from_row(row)?])
            },
        ),
        KindArg::Prompts => copy(
            input,
            out,
            options,
            Layout::Trl(record::prompt_schema(), record::prompt_batch),
            |_, row| Ok(vec![PromptRecord::from_row(row)?]),
        ),
        KindArg::Ranked => whole::<RankedRecord>(input, out, options),
        KindArg::Unpaired => {
            let seen = [Cell::new(false), Cell::new(false)];
            let code = copy(input, out, options, Layout::Whole, |_, row| {
                let thumbs = thumbs(row)?;
                for thumb in &thumbs {
                    seen[usize::from(thumb.record.label)].set(true);
                }
                Ok(thumbs)
            })?;
            for (label, seen) in ["false", "true"].into_iter().zip(&seen) {
                if !seen.get() {
                    eprintln!("warning: no row has the label {label}");
                }
            }
            Ok(code)
        }
        KindArg::Stepwise => whole::<StepwiseRecord>(input, out, options),
        KindArg::Rated => whole::<RatedRecord>(input, out, options),
    }
}

fn check(
    input: &Path,
    purpose: KindArg,
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
    purpose: KindArg,
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
