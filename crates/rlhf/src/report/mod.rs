//! The report of a run: one self-contained HTML file.
//!
//! Invariant: it is made of the run's files alone (`run.json`, `plan.json`, `recipe.toml`, each stage's
//! `metrics.jsonl`, `samples.parquet` and `eval.json`), so it can be built again at any time; no script, no outside
//! address; whatever a model or a data set wrote is escaped. It knows no model and computes no metric.

mod behind;
mod html;
mod metrics;
mod page;
mod plot;
mod results;
mod reward_page;
mod rewards;
mod samples;
mod training;
mod training_samples;
mod verdict;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::de::DeserializeOwned;

use crate::files::write;
use crate::results::{Evaluation, RunSummary};
use crate::usage::usage;
use html::Palette;
use metrics::Metrics;
use training_samples::Written;

pub use reward_page::reward_page;

/// Everything that a report shows.
#[derive(Debug)]
pub(crate) struct Material {
    pub(crate) run: RunSummary,
    /// The evaluating stages with what they found.
    pub(crate) evaluations: Vec<(String, Evaluation)>,
    /// Each stage's metrics, in the order of `run.stages`.
    pub(crate) metrics: Vec<Metrics>,
    /// What stages wrote while they were trained, by their names.
    pub(crate) written: Vec<(String, Vec<Written>)>,
    /// `recipe.toml` and `plan.json` as they are, where they are.
    pub(crate) recipe: Option<String>,
    pub(crate) plan: Option<String>,
    pub(crate) palette: Palette,
}

/// Builds `report.html` in a run's folder and gives its path.
///
/// Only `run.json` must be there; of what else is missing the report says so.
///
/// # Errors
/// When the folder holds no finished run, a file is damaged, or the report cannot be written.
pub fn build(dir: &Path) -> anyhow::Result<PathBuf> {
    let run_file = dir.join("run.json");
    if !run_file.is_file() {
        return Err(usage(
            "no finished run: there is no run.json",
            dir.display().to_string(),
            "finish the run with `rlhf run … --resume`, or name another folder",
        )
        .into());
    }
    let run: RunSummary = read(&run_file)?;
    let (mut evaluations, mut metrics) = (Vec::<(String, Evaluation)>::new(), Vec::new());
    let mut written = Vec::new();
    for stage in &run.stages {
        let folder = dir.join(&stage.name);
        if folder.join("eval.json").is_file() {
            evaluations.push((stage.name.clone(), read(&folder.join("eval.json"))?));
        }
        metrics.push(Metrics::read(&folder.join("metrics.jsonl"))?);
        let samples = folder.join("samples.parquet");
        if samples.is_file() {
            written.push((stage.name.clone(), training_samples::read(&samples)?));
        }
    }
    let names = evaluations.iter().map(|e| e.1.baseline.clone());
    let names = names.chain(
        evaluations
            .iter()
            .flat_map(|e| e.1.models.iter().map(|m| m.name.clone())),
    );
    let palette = Palette::new(names.chain(run.stages.iter().map(|s| s.name.clone())));
    let text = |name: &str| std::fs::read_to_string(dir.join(name)).ok();
    let material = Material {
        evaluations,
        metrics,
        written,
        recipe: text("recipe.toml"),
        plan: text("plan.json"),
        palette,
        run,
    };
    let path = dir.join("report.html");
    write(&path, page::page(&material)?.as_bytes())?;
    Ok(path)
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
}
