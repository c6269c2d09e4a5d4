//! The report of a run: one self-contained HTML file.
//!
//! Invariant: it is made of the run's files alone (`run.json`, `eval.json`, `metrics.jsonl`), so it can
//! be built again at any time; no script, no outside address; whatever a model wrote is escaped.

mod html;
mod plot;

use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::de::DeserializeOwned;

use crate::files::write;
use crate::results::{Evaluation, RunSummary};
use crate::usage::usage;

/// A stage's metrics: for each key (without the stage's name) its points (step, value).
#[derive(Clone, Debug, Default)]
pub(crate) struct Curves {
    pub(crate) keys: Vec<(String, Vec<(f64, f64)>)>,
}

impl Curves {
    /// The points of a key, if it was logged.
    pub(crate) fn get(&self, key: &str) -> Option<&[(f64, f64)]> {
        self.keys
            .iter()
            .find(|k| k.0 == key)
            .map(|k| k.1.as_slice())
    }

    fn read(path: &Path) -> anyhow::Result<Self> {
        let Ok(text) = std::fs::read_to_string(path) else {
            return Ok(Self::default());
        };
        let mut curves = Self::default();
        for (i, line) in text.lines().enumerate() {
            let row: serde_json::Map<String, serde_json::Value> = serde_json::from_str(line)
                .with_context(|| format!("{}, line {}", path.display(), i + 1))?;
            let Some(step) = row.get("step").and_then(serde_json::Value::as_f64) else {
                continue;
            };
            for (key, value) in &row {
                let (Some((_, name)), Some(value)) = (key.split_once('/'), value.as_f64()) else {
                    continue;
                };
                match curves.keys.iter_mut().find(|k| k.0 == name) {
                    Some(k) => k.1.push((step, value)),
                    None => curves.keys.push((name.to_owned(), vec![(step, value)])),
                }
            }
        }
        Ok(curves)
    }
}

/// Everything that a report shows.
pub(crate) struct Material {
    pub(crate) run: RunSummary,
    pub(crate) evaluations: Vec<(String, Evaluation)>,
    pub(crate) curves: Vec<(String, Curves)>,
    pub(crate) recipe: String,
    pub(crate) plan: String,
}

/// Builds `report.html` in a run's folder and gives its path.
///
/// # Errors
/// When the folder holds no finished run, or a file is damaged.
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
    let mut material = Material {
        evaluations: Vec::new(),
        curves: Vec::new(),
        recipe: std::fs::read_to_string(dir.join("recipe.toml")).unwrap_or_default(),
        plan: std::fs::read_to_string(dir.join("plan.json")).unwrap_or_default(),
        run,
    };
    for stage in &material.run.stages {
        let folder = dir.join(&stage.name);
        if folder.join("eval.json").is_file() {
            material
                .evaluations
                .push((stage.name.clone(), read(&folder.join("eval.json"))?));
        }
        let curves = Curves::read(&folder.join("metrics.jsonl"))?;
        if !curves.keys.is_empty() {
            material.curves.push((stage.name.clone(), curves));
        }
    }
    let path = dir.join("report.html");
    write(&path, html::page(&material)?.as_bytes())?;
    Ok(path)
}

fn read<T: DeserializeOwned>(path: &Path) -> anyhow::Result<T> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("{} is damaged", path.display()))
}
