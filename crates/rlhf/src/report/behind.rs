//! What stands behind the results: time, configuration, data, hashes.

use std::fmt::Write as _;

use serde_json::Value;

use super::Material;
use super::html::{escape, number, table};
use super::page::Section;
use crate::terminal;

/// Time and throughput of each stage.
pub(crate) fn time(m: &Material) -> Result<Section, std::fmt::Error> {
    let mut out = String::new();
    let total: f64 = m.run.stages.iter().map(|s| s.seconds).sum();
    let mut rows = Vec::new();
    for s in &m.run.stages {
        let share = if total > 0.0 {
            100.0 * s.seconds / total
        } else {
            0.0
        };
        let per = |n: f64| {
            if n > 0.0 && s.seconds > 0.0 {
                terminal::count(n / s.seconds)
            } else {
                "–".into()
            }
        };
        let a_step = if s.steps > 0 {
            format!("{} s", number(s.seconds / s.steps as f64))
        } else {
            "–".into()
        };
        rows.push(vec![
            m.palette.key(&s.name),
            escape(&s.kind),
            terminal::seconds(s.seconds),
            format!("<span class=\"bar\"><i style=\"width:{share:.1}%;background:var(--c{})\"></i></span>", m.palette.of(&s.name)),
            if s.steps > 0 { s.steps.to_string() } else { "–".into() },
            a_step,
            if s.tokens > 0 { terminal::count(s.tokens as f64) } else { "–".into() },
            per(s.tokens as f64),
        ]);
    }
    table(
        &[
            "",
            "kind",
            "time",
            "",
            "steps",
            "a step",
            "tokens learned from",
            "tokens a second",
        ]
        .map(String::from),
        &rows,
        &mut out,
    )?;
    let memory = m
        .run
        .peak_memory
        .map_or_else(|| "unknown".into(), terminal::bytes);
    writeln!(
        out,
        "<p class=\"muted\">{} in all on {}; most memory held: {memory}. A stage that draws completions spends part of its time on drawing.</p>",
        terminal::seconds(m.run.seconds),
        escape(&m.run.device)
    )?;
    Ok(Section::new("time", "Time", out))
}

/// Everything needed to repeat the run.
pub(crate) fn repeat(m: &Material) -> Result<Section, std::fmt::Error> {
    let mut out = String::new();
    let r = &m.run;
    let revision = r.git_revision.as_deref().map_or_else(
        || "an unknown revision".into(),
        |g| format!("revision <code>{}</code>", escape(g)),
    );
    writeln!(
        out,
        "<p>rlhf {} at {revision}; recipe <b>{}</b>; {}; {} parameters.</p>",
        escape(&r.version),
        escape(&r.recipe),
        escape(&r.device),
        terminal::count(r.parameters as f64)
    )?;
    let plan: Option<Value> = m.plan.as_deref().and_then(|p| serde_json::from_str(p).ok());
    data(m, plan.as_ref(), &mut out)?;
    for (name, text) in [
        ("Recipe, as given", &m.recipe),
        ("Plan, as resolved", &m.plan),
    ] {
        match text {
            Some(text) => writeln!(
                out,
                "<details><summary>{name}</summary><pre>{}</pre></details>",
                escape(text)
            )?,
            None => writeln!(
                out,
                "<p class=\"note\">{name}: not in the run's folder.</p>"
            )?,
        }
    }
    let mut last = String::new();
    for s in r.stages.iter().filter(|s| !s.last.is_empty()) {
        writeln!(last, "{}", s.name)?;
        for (key, value) in &s.last {
            writeln!(last, "  {key:<24} {}", number(*value))?;
        }
    }
    if !last.is_empty() {
        writeln!(
            out,
            "<details><summary>Final metrics of each stage</summary><pre>{}</pre></details>",
            escape(&last)
        )?;
    }
    let mut hashes = String::new();
    for (path, hash) in &r.data {
        writeln!(hashes, "{hash}  {path}")?;
    }
    for (stage, hash) in &r.models {
        writeln!(hashes, "{hash}  weights of {stage}")?;
    }
    if hashes.is_empty() {
        writeln!(out, "<p class=\"note\">The run kept no hashes.</p>")?;
    } else {
        writeln!(
            out,
            "<details><summary>Hashes (SHA-256) of data and weights</summary><pre>{}</pre></details>",
            escape(&hashes)
        )?;
    }
    Ok(Section::new("repeat", "To repeat it", out))
}

/// A path that may break after each of its folders.
fn breakable(path: &str) -> String {
    escape(path).replace('/', "/<wbr>")
}

/// The data files: from the plan, which counts their rows, else from the hashes.
fn data(m: &Material, plan: Option<&Value>, out: &mut String) -> std::fmt::Result {
    let files = plan
        .and_then(|p| p.get("data"))
        .and_then(Value::as_array)
        .map_or(&[][..], Vec::as_slice);
    let short = |hash: &str| {
        format!(
            "<code title=\"{}\">{}</code>",
            escape(hash),
            escape(&hash.chars().take(12).collect::<String>())
        )
    };
    let mut rows = Vec::new();
    for file in files {
        let text = |key: &str| file.get(key).and_then(Value::as_str).unwrap_or_default();
        let count = |key: &str| {
            file.get(key)
                .and_then(Value::as_u64)
                .map_or_else(|| "–".into(), |n| n.to_string())
        };
        let tokens = file
            .get("tokens")
            .and_then(Value::as_f64)
            .map_or_else(|| "–".into(), terminal::count);
        rows.push(vec![
            breakable(text("path")),
            count("rows"),
            count("kept"),
            tokens,
            short(text("sha256")),
        ]);
    }
    if rows.is_empty() {
        rows.extend(m.run.data.iter().map(|(path, hash)| {
            vec![
                breakable(path),
                "–".into(),
                "–".into(),
                "–".into(),
                short(hash),
            ]
        }));
    }
    if rows.is_empty() {
        return Ok(());
    }
    table(
        &["data", "rows", "kept", "tokens", "SHA-256"].map(String::from),
        &rows,
        out,
    )
}
