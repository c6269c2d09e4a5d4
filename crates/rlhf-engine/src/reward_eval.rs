//! `rlhf eval reward`, and what a reward stage says of its held-out pairs.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command speaks to the terminal"
)]

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use rlhf::args::EvalRewardArgs;
use rlhf::calibration::{bins, calibration_error};
use rlhf::files::write_json;
use rlhf::interval::{Interval, share};
use rlhf::report::reward_page;
use rlhf::reward_results::{BestOfRow, LengthShare, Members, Named, RewardEvaluation};
use rlhf::usage;
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::group::PromptGroup;
use rlhf_data::record::{Annotated, JudgedPairRecord, RankedRecord, Record};
use rlhf_data::source;
use rlhf_data::tokenize::{ChatTokenizer, Limits};
use rlhf_model::LoadOptions;
use rlhf_reward::eval::{self, Count, Estimate, ScoredPair};
use rlhf_reward::labels::{self, Label, Labelled};
use rlhf_reward::model::{Readout, RewardModel};
use tch::Kind;

use crate::engine::device;

/// The normal distribution's 97.5 % quantile.
const Z: f64 = 1.959_963_984_540_054;

/// `rlhf eval reward`
pub(crate) fn command(args: &EvalRewardArgs) -> anyhow::Result<ExitCode> {
    let device = device(args.device)?;
    for (path, what, mend) in [
        (
            &args.model,
            "no such model folder",
            "name a reward model's folder",
        ),
        (&args.pairs, "no such file", "name a file of pairs"),
    ] {
        if !path.exists() {
            return Err(usage(what, path.display().to_string(), mend).into());
        }
    }
    let tokenizer = ChatTokenizer::load(&args.model)
        .with_context(|| format!("loading the tokenizer of {}", args.model.display()))?;
    let options = LoadOptions {
        device,
        kind: Kind::Float,
    };
    let model = RewardModel::load(&args.model, &options)
        .with_context(|| format!("loading {}", args.model.display()))?;
    let limits = Limits::new(args.max_prompt, args.max_completion);
    let chat = tokenizer.has_template() && !args.plain;

    let mut records: Vec<Annotated<JudgedPairRecord>> = read(&args.pairs, args.limit)?;
    if chat {
        for r in &mut records {
            let pair = &mut r.record.pair;
            as_chat(
                &mut pair.prompt,
                &mut [&mut pair.chosen, &mut pair.rejected],
            );
        }
    }
    let (pairs, report) = labels::pairs(&tokenizer, &records, &limits)?;
    if pairs.is_empty() {
        return Err(usage(
            format!("no pairs left of {}: {report}", records.len()),
            args.pairs.display().to_string(),
            "look at the file with `rlhf data check`, or raise the limits",
        )
        .into());
    }
    if pairs.len() < records.len() {
        eprintln!("{} of {} pairs: {report}", pairs.len(), records.len());
    }
    let category = |row: u64| records[row as usize].record.subset.clone();
    let mut found = measure(&model, &pairs, category, args.micro_tokens)?;
    found.model = args.model.display().to_string();
    found.data = args.pairs.display().to_string();
    if let Some(path) = &args.best_of {
        found.best_of = best_of(&model, &tokenizer, path, chat, &limits, args)?;
    }
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make {}", out.display()))?;
        write_all(&found, out)?;
        eprintln!("written to {}", out.display());
    }
    if args.json {
        println!("{}", serde_json::to_string_pretty(&found)?);
    } else {
        println!("{}", found.text());
    }
    Ok(ExitCode::SUCCESS)
}

/// `reward_eval.json` and `reward_eval.html`.
pub(crate) fn write_all(found: &RewardEvaluation, dir: &Path) -> anyhow::Result<()> {
    write_json(&dir.join("reward_eval.json"), found)?;
    reward_page(found, &dir.join("reward_eval.html"))
}

fn read<R: Record + Send + 'static>(
    path: &Path,
    limit: Option<usize>,
) -> rlhf_data::Result<Vec<R>> {
    source::read(path)?
        .take(limit.unwrap_or(usize::MAX))
        .collect()
}

/// Plain text as what a user asks and an assistant answers.
fn as_chat(prompt: &mut Text, completions: &mut [&mut Text]) {
    let Text::Plain(asked) = prompt else { return };
    *prompt = Text::Messages(vec![Message::new(Role::User, std::mem::take(asked))]);
    for c in completions {
        if let Text::Plain(answer) = c {
            **c = Text::Messages(vec![Message::new(Role::Assistant, std::mem::take(answer))]);
        }
    }
}

/// Everything that pairs say of a model.
pub(crate) fn measure(
    model: &RewardModel,
    pairs: &[Labelled],
    category: impl Fn(u64) -> Option<String>,
    micro_tokens: usize,
) -> anyhow::Result<RewardEvaluation> {
    let certain =
        |r: &&Labelled| matches!(r.label, Label::Pair { preference, .. } if preference > 0.5);
    let rows: Vec<&Labelled> = pairs.iter().filter(certain).collect();
    let groups: Vec<&PromptGroup> = rows.iter().map(|r| &r.group).collect();
    let raw = model.raw_scores(&groups, micro_tokens)?;
    let members = model.normalized(&raw);
    let scores = model.combined(&members);
    let two = |scores: &[f64], i: usize| (scores[2 * i], scores[2 * i + 1]);
    let tokens = |g: &PromptGroup, i: usize| g.completions[i].ids.len();
    let scored: Vec<ScoredPair> = rows
        .iter()
        .enumerate()
        .map(|(i, r)| ScoredPair {
            scores: two(&scores, i),
            tokens: (tokens(&r.group, 0), tokens(&r.group, 1)),
            category: category(r.group.row),
            members: if members.len() > 1 {
                members.iter().map(|m| two(m, i)).collect()
            } else {
                Vec::new()
            },
        })
        .collect();
    // Where the one output was trained on pairs its difference is log-odds; of several members, their mean.
    let odds = matches!(model.readout(), Readout::First { outputs: 1 });
    let lead = |scores: &[f64], i: usize| {
        let (c, r) = two(scores, i);
        c - r
    };
    let margins: Vec<f64> = (0..rows.len())
        .map(|i| {
            if odds {
                raw.iter().map(|m| lead(m, i)).sum::<f64>() / raw.len() as f64
            } else {
                lead(&scores, i)
            }
        })
        .collect();
    let bins = if odds { bins(&margins) } else { Vec::new() };
    let categories = eval::by_category(&scored);
    let sections = eval::sections(&categories);
    let mean_of = |all: &[(&str, Count)]| {
        (!all.is_empty()).then(|| all.iter().map(|s| s.1.share()).sum::<f64>() / all.len() as f64)
    };
    let length = eval::length_control(&scored)?.map(|l| LengthShare {
        longer_chosen: of(l.longer_chosen),
        prefers_longer: of(l.prefers_longer),
        at_equal_length: within(around(l.at_equal_length, scored.len())),
        slope: around(l.slope, scored.len()),
        correlation: l.correlation,
    });
    Ok(RewardEvaluation {
        model: String::new(),
        data: String::new(),
        accuracy: of(eval::accuracy(&scored)),
        sections_mean: mean_of(&sections),
        sections: sections.iter().map(|s| named(s.0, s.1)).collect(),
        categories: categories.iter().map(|c| named(&c.0, c.1)).collect(),
        calibration_error: odds.then(|| calibration_error(&bins)),
        bins,
        margins,
        length,
        best_of: Vec::new(),
        members: eval::agreement(&scored).map(|a| Members {
            accuracy: a.members.iter().map(|c| of(*c)).collect(),
            alike: of(a.alike),
            unanimous: of(a.unanimous),
            when_unanimous: of(a.when_unanimous),
            when_divided: of(a.when_divided),
        }),
    })
}

fn best_of(
    model: &RewardModel,
    tokenizer: &ChatTokenizer,
    path: &Path,
    chat: bool,
    limits: &Limits,
    args: &EvalRewardArgs,
) -> anyhow::Result<Vec<BestOfRow>> {
    let mut records: Vec<Annotated<RankedRecord>> = read(path, args.limit)?;
    for (i, r) in records.iter_mut().enumerate() {
        let r = &mut r.record;
        if r.scores.is_none() {
            return Err(usage(
                format!("row {i} has no gold scores"),
                path.display().to_string(),
                "give a column `scores`, one number for each completion",
            )
            .into());
        }
        if chat {
            as_chat(
                &mut r.prompt,
                &mut r.completions.iter_mut().collect::<Vec<_>>(),
            );
        }
    }
    let (rows, _) = labels::rankings(tokenizer, &records, limits)?;
    let groups: Vec<&PromptGroup> = rows.iter().map(|r| &r.group).collect();
    let mut scores = model.scores(&groups, args.micro_tokens)?.into_iter();
    let prompts: Vec<Vec<(f64, f64)>> = rows
        .iter()
        .map(|r| match &r.label {
            Label::Ranking { scores: Some(gold) } => {
                // Gold first: when it ends, no score has been taken too many.
                let both = gold.iter().copied().zip(scores.by_ref());
                both.map(|(gold, score)| (score, gold)).collect()
            }
            _ => Vec::new(),
        })
        .collect();
    let curve = eval::best_of(&prompts)?;
    Ok(curve
        .iter()
        .map(|b| BestOfRow {
            n: b.n,
            kl: b.kl,
            gold: around(b.gold, prompts.len()),
            ceiling: b.ceiling,
            proxy: b.proxy,
        })
        .collect())
}

fn of(count: Count) -> Interval {
    share(count.right, count.of)
}

fn named(name: &str, count: Count) -> Named {
    Named {
        name: name.to_owned(),
        share: of(count),
    }
}

fn around(e: Estimate, n: usize) -> Interval {
    Interval {
        value: e.value,
        low: e.value - Z * e.error,
        high: e.value + Z * e.error,
        n,
    }
}

/// A share's interval ends at 0 and 1.
fn within(i: Interval) -> Interval {
    Interval {
        low: i.low.max(0.0),
        high: i.high.min(1.0),
        ..i
    }
}
