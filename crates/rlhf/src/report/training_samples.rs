//! What policies wrote while they were trained, step by step.

use std::fmt::Write as _;
use std::path::Path;

use serde_json::Value;

use super::Material;
use super::html::{escape, number};
use super::page::Section;

/// A completion of a step.
#[derive(Debug)]
pub(crate) struct Written {
    step: u64,
    prompt: String,
    completion: String,
    /// Reward, advantage, KL: those that are known, by name.
    numbers: Vec<(&'static str, f64)>,
    length: u64,
    ended: bool,
}

/// Reads a stage's `samples.parquet`.
pub(crate) fn read(path: &Path) -> anyhow::Result<Vec<Written>> {
    let mut all = Vec::new();
    for row in rlhf_data::source::rows(path)? {
        let row = row?;
        let get = |name: &str| row.columns.get(name).unwrap_or(&Value::Null);
        let text = |name: &str| get(name).as_str().unwrap_or_default().to_owned();
        let known = |name: &'static str| get(name).as_f64().map(|x| (name, x));
        all.push(Written {
            step: get("step").as_u64().unwrap_or_default(),
            prompt: text("prompt"),
            completion: text("completion"),
            numbers: ["reward", "advantage", "kl"]
                .into_iter()
                .filter_map(known)
                .collect(),
            length: get("length").as_u64().unwrap_or_default(),
            ended: get("ended").as_bool().unwrap_or_default(),
        });
    }
    Ok(all)
}

/// The section, if a stage kept samples.
pub(crate) fn section(m: &Material) -> Result<Option<Section>, std::fmt::Error> {
    let mut out = String::new();
    for (stage, written) in m.written.iter().filter(|w| !w.1.is_empty()) {
        writeln!(out, "<h3>{}</h3>", m.palette.key(stage))?;
        for step in written.chunk_by(|a, b| a.step == b.step) {
            writeln!(
                out,
                "<details class=\"sample\"><summary>step {}</summary>",
                step[0].step
            )?;
            for w in step {
                let mut facts: Vec<String> = w
                    .numbers
                    .iter()
                    .map(|(name, x)| format!("{name} {}", number(*x)))
                    .collect();
                let end = if w.ended { "" } else { ", cut off" };
                facts.push(format!("{} tokens{end}", w.length));
                writeln!(
                    out,
                    "<p><q>{}</q></p><div class=\"answer\"><p class=\"facts\">{}</p><p class=\"text\">{}</p></div>",
                    escape(&w.prompt),
                    facts.join(" · "),
                    escape(&w.completion)
                )?;
            }
            writeln!(out, "</details>")?;
        }
    }
    Ok((!out.is_empty()).then(|| Section::new("written", "Samples of the training", out)))
}
