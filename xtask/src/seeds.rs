//! One recipe with several seeds, and their evaluations side by side.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::setup;
use crate::shell::{cargo, program, root};

/// Runs `recipe` once for each seed into `runs/RECIPE-seeds/SEED` (a run that is there goes on, or is read) and prints
/// the gold score of every model in every evaluation.
pub(crate) fn run(recipe: &str, seeds: &[u64], flags: &[String]) -> Result<()> {
    setup::run(true)?;
    cargo("build", &["--release", "-p", "rlhf", "-p", "rlhf-engine"]).run()?;
    let mut scores: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (column, seed) in seeds.iter().enumerate() {
        let out = root().join(format!("runs/{recipe}-seeds/{seed}"));
        let mut run = program("rlhf").args(["run", recipe, "--set"]);
        run = run
            .args([format!("run.seed={seed}"), "--out".into()])
            .args([&out]);
        run.args(flags).run()?;
        for (model, score) in golds(&out)? {
            let row = scores.entry(model).or_default();
            row.resize(column, "–".into());
            row.push(score);
        }
    }
    let heads: Vec<String> = seeds.iter().map(|s| format!("seed {s}")).collect();
    println!("| evaluation: model | {} |", heads.join(" | "));
    println!("| --- |{}", " --- |".repeat(seeds.len()));
    for (model, row) in scores {
        println!("| {model} | {} |", row.join(" | "));
    }
    Ok(())
}

/// The gold score with its interval of each model of each evaluation of a run.
fn golds(run: &Path) -> Result<Vec<(String, String)>> {
    let mut found = Vec::new();
    let folders = std::fs::read_dir(run).with_context(|| format!("reading {}", run.display()))?;
    for folder in folders {
        let folder = folder?.path();
        let Ok(text) = std::fs::read_to_string(folder.join("eval.json")) else {
            continue;
        };
        let stage = folder
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let read: Value = serde_json::from_str(&text)
            .with_context(|| format!("{}/eval.json is damaged", folder.display()))?;
        for model in read["models"].as_array().into_iter().flatten() {
            let gold = &model["measures"]["gold"];
            let (Some(name), Some(value)) = (model["name"].as_str(), gold["value"].as_f64()) else {
                continue;
            };
            let end = |key: &str| gold[key].as_f64().unwrap_or(f64::NAN);
            let score = format!("{value:.3} ({:.3}–{:.3})", end("low"), end("high"));
            found.push((format!("{stage}: {name}"), score));
        }
    }
    Ok(found)
}
