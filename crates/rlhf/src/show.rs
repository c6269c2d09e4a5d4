//! Commands that only show something: recipes, reports.
#![allow(clippy::print_stdout, reason = "these commands' output is stdout")]

use std::process::ExitCode;

use crate::args::{RecipesAction, RecipesArgs, ReportArgs};
use crate::shipped::{self, SHIPPED};
use crate::usage;

/// As much of a recipe as a list shows; `rlhf-engine` reads it whole.
#[derive(serde::Deserialize)]
struct Outline {
    run: OutlineRun,
    stages: Vec<OutlineStage>,
}

#[derive(serde::Deserialize)]
struct OutlineRun {
    title: String,
}

#[derive(serde::Deserialize)]
struct OutlineStage {
    name: String,
}

/// `rlhf recipes`
pub(crate) fn recipes(args: &RecipesArgs) -> anyhow::Result<ExitCode> {
    if let Some(RecipesAction::Presets) = &args.action {
        print!("{}", shipped::PRESETS);
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(RecipesAction::Show { name }) = &args.action {
        let unknown = || {
            usage(
                format!("no recipe named `{name}`"),
                "the command line",
                format!("use one of {}", shipped::names()),
            )
        };
        print!("{}", shipped::find(name).ok_or_else(unknown)?.text);
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = Vec::new();
    for shipped in SHIPPED {
        let recipe: Outline = toml::from_str(shipped.text)?;
        let stages: Vec<String> = recipe.stages.into_iter().map(|s| s.name).collect();
        rows.push((shipped.name, recipe.run.title, stages));
    }
    if args.json {
        let list: Vec<_> = rows
            .iter()
            .map(|(name, title, stages)| serde_json::json!({"name": name, "title": title, "stages": stages}))
            .collect();
        println!("{}", serde_json::to_string_pretty(&list)?);
    } else {
        for (name, title, stages) in rows {
            println!("{name:<18} {title}\n{:<18} {}", "", stages.join(" → "));
        }
        println!(
            "\nrlhf recipes show NAME   prints one; rlhf run NAME runs it; rlhf recipes presets prints the algorithms by name"
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// `rlhf report`
pub(crate) fn report(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    if !args.run.is_dir() {
        return Err(usage(
            "no such folder",
            args.run.display().to_string(),
            "name the folder of a run, as in runs/quickstart",
        )
        .into());
    }
    let path = crate::report::build(&args.run)?;
    println!("report: {}", path.display());
    Ok(ExitCode::SUCCESS)
}
