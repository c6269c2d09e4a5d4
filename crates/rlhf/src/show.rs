//! Commands that only show something: recipes, reports.
#![allow(clippy::print_stdout, reason = "these commands' output is stdout")]

use std::process::ExitCode;

use crate::args::{RecipesAction, RecipesArgs, ReportArgs};
use crate::recipe::{SHIPPED, Source};
use crate::usage::usage;

/// `rlhf recipes`
pub(crate) fn recipes(args: &RecipesArgs) -> anyhow::Result<ExitCode> {
    if let Some(RecipesAction::Show { name }) = &args.action {
        print!("{}", Source::find(name)?.text);
        return Ok(ExitCode::SUCCESS);
    }
    let mut rows = Vec::new();
    for shipped in SHIPPED {
        let recipe = Source::find(shipped.name)?.parse(false, &[])?;
        let stages: Vec<String> = recipe.stages.iter().map(|s| s.name.clone()).collect();
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
        println!("\nrlhf recipes show NAME   prints one; rlhf run NAME runs it");
    }
    Ok(ExitCode::SUCCESS)
}

/// `rlhf report`
pub(crate) fn report(args: &ReportArgs) -> anyhow::Result<ExitCode> {
    if !args.run.is_dir() {
        return Err(usage("no such folder", args.run.display().to_string(), "name the folder of a run, as in runs/quickstart").into());
    }
    let path = crate::report::build(&args.run)?;
    println!("report: {}", path.display());
    Ok(ExitCode::SUCCESS)
}
