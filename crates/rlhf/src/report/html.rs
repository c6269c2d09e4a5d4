//! The page: plain HTML and CSS.

use std::fmt::Write as _;

use super::plot::{self, Marked, Series};
use super::{Curves, Material};
use crate::results::{Answer, Evaluation, MEASURES};
use crate::terminal;

const STYLE: &str = include_str!("style.css");

/// Which curves stand in one small plot, per kind of stage: (heading, keys).
const PLOTS: &[(&str, &[&str])] = &[
    ("loss", &["loss"]),
    ("value loss", &["value_loss"]),
    ("reward", &["reward"]),
    ("KL to the reference, nats a completion", &["kl"]),
    ("accuracy on the batch", &["accuracy"]),
    ("margin", &["margin"]),
    (
        "log-probs: chosen, rejected",
        &["chosen_logprobs", "rejected_logprobs"],
    ),
    (
        "rewards: chosen, rejected",
        &["chosen_rewards", "rejected_rewards"],
    ),
    ("length, tokens", &["length"]),
    ("entropy, nats a token", &["entropy"]),
    (
        "clipped share: low, high",
        &["clip_fraction_low", "clip_fraction_high"],
    ),
    ("explained variance of the value", &["explained_variance"]),
    ("gradient norm", &["grad_norm"]),
    ("learning rate", &["lr"]),
];

/// The whole page.
pub(crate) fn page(m: &Material) -> anyhow::Result<String> {
    let mut body = String::new();
    head(m, &mut body)?;
    for (stage, e) in &m.evaluations {
        results(stage, e, &mut body)?;
    }
    reward_against_kl(m, &mut body)?;
    for (stage, e) in &m.evaluations {
        if !e.samples.is_empty() {
            samples(stage, e, &mut body)?;
        }
    }
    for (stage, curves) in &m.curves {
        stage_curves(stage, curves, &mut body)?;
    }
    stages(m, &mut body)?;
    details(m, &mut body)?;
    let title = escape(&m.run.title);
    Ok(format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n<meta name=\"color-scheme\" content=\"light dark\">\n<title>{title}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    ))
}

/// Text as HTML; characters that steer are made visible.
fn escape(text: &str) -> String {
    terminal::escape(text)
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

fn head(m: &Material, out: &mut String) -> std::fmt::Result {
    let r = &m.run;
    writeln!(out, "<header><h1>{}</h1>", escape(&r.title))?;
    let memory = r.peak_memory.map_or_else(String::new, |b| {
        format!(" · {} of memory at most", terminal::bytes(b))
    });
    writeln!(
        out,
        "<p class=\"muted\">recipe {} · {} parameters · {} · {}{memory}</p></header>",
        escape(&r.recipe),
        terminal::count(r.parameters as f64),
        escape(&r.device),
        terminal::seconds(r.seconds)
    )?;
    let checks: Vec<_> = m.evaluations.iter().flat_map(|e| &e.1.checks).collect();
    if checks.is_empty() {
        return Ok(());
    }
    let held = checks.iter().filter(|c| c.ok).count();
    let verdict = if held == checks.len() {
        "Every check holds."
    } else {
        "Some checks fail."
    };
    writeln!(out, "<section><h2>{verdict}</h2>\n<ul class=\"checks\">")?;
    for c in checks {
        let (class, mark) = if c.ok { ("ok", "✓") } else { ("bad", "✗") };
        writeln!(
            out,
            "<li class=\"{class}\"><span>{mark}</span><div>{}<br><span class=\"muted\">{}</span></div></li>",
            escape(&c.what),
            escape(&c.found)
        )?;
    }
    writeln!(out, "</ul></section>")
}

fn results(stage: &str, e: &Evaluation, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "<section><h2>Results</h2>\n<p>On held-out data, against <b>{}</b> (stage {}). Whiskers and brackets are 95 % intervals.</p>",
        escape(&e.baseline),
        escape(stage)
    )?;
    let shown: Vec<_> = MEASURES
        .iter()
        .filter(|m| e.models.iter().any(|r| r.measures.contains_key(m.key)))
        .collect();
    writeln!(out, "<div class=\"wide\"><table><thead><tr><th></th>")?;
    for m in &shown {
        writeln!(out, "<th>{}</th>", m.heading)?;
    }
    writeln!(out, "</tr></thead><tbody>")?;
    // One scale a column, so that rows can be compared by eye.
    let scale = |key: &str| {
        let all: Vec<_> = e
            .models
            .iter()
            .filter_map(|r| r.measures.get(key))
            .collect();
        let low = all.iter().map(|i| i.low).fold(f64::INFINITY, f64::min);
        let high = all.iter().map(|i| i.high).fold(f64::NEG_INFINITY, f64::max);
        (low, (high - low).max(1e-12))
    };
    for row in &e.models {
        writeln!(out, "<tr><th>{}</th>", escape(&row.name))?;
        for m in &shown {
            let Some(i) = row.measures.get(m.key) else {
                writeln!(out, "<td class=\"muted\">–</td>")?;
                continue;
            };
            let number = |x: f64| {
                if m.percent {
                    format!("{:.1}%", 100.0 * x)
                } else {
                    format!("{x:.3}")
                }
            };
            let (low, span) = scale(m.key);
            let at = |x: f64| 2.0 + 96.0 * (x - low) / span;
            writeln!(
                out,
                "<td><b>{}</b><br><span class=\"muted\">{} – {}</span><svg viewBox=\"0 0 100 8\" class=\"whisker\" preserveAspectRatio=\"none\"><line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"4\" y2=\"4\"/><circle cx=\"{:.1}\" cy=\"4\" r=\"3\"/></svg></td>",
                number(i.value),
                number(i.low),
                number(i.high),
                at(i.low),
                at(i.high),
                at(i.value)
            )?;
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</tbody></table></div>")?;
    if let Some(a) = &e.reward_model_accuracy {
        writeln!(
            out,
            "<p>The reward model prefers the right completion in <b>{:.1}%</b> ({:.1} – {:.1}) of {} held-out pairs.</p>",
            100.0 * a.value,
            100.0 * a.low,
            100.0 * a.high,
            a.n
        )?;
    }
    writeln!(out, "</section>")
}

/// Training paths (reward against KL) of the stages that sample, and gold against KL at the end.
fn reward_against_kl(m: &Material, out: &mut String) -> anyhow::Result<()> {
    let sampled: Vec<(&String, Vec<(f64, f64)>)> = m
        .curves
        .iter()
        .filter_map(|(name, c)| {
            let (kl, reward) = (c.get("kl")?, c.get("reward")?);
            Some((
                name,
                kl.iter().zip(reward).map(|(k, r)| (k.1, r.1)).collect(),
            ))
        })
        .collect();
    if sampled.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<section><h2>Reward against KL</h2>\n<div class=\"plots\">"
    )?;
    let series: Vec<Series<'_>> = sampled
        .iter()
        .enumerate()
        .map(|(i, s)| Series {
            points: &s.1,
            colour: i,
        })
        .collect();
    let svg = plot::paths(&series, &[], ("KL, nats a completion", "reward"))?;
    let names: Vec<String> = sampled
        .iter()
        .enumerate()
        .map(|(i, s)| legend(i, s.0))
        .collect();
    figure("in training: what the reward model says", &names, &svg, out)?;
    for (_, e) in &m.evaluations {
        let mut marked = Vec::new();
        let mut names = Vec::new();
        for (i, row) in e.models.iter().enumerate() {
            if let (Some(kl), Some(gold)) = (row.measures.get("kl"), row.measures.get("gold")) {
                marked.push(Marked {
                    x: kl.value,
                    y: gold.value,
                    low: gold.low,
                    high: gold.high,
                    colour: i,
                });
                names.push(legend(i, &row.name));
            }
        }
        let svg = plot::paths(&[], &marked, ("KL, nats a completion", "gold score"))?;
        figure(
            "on held-out prompts: what the gold judge says",
            &names,
            &svg,
            out,
        )?;
    }
    writeln!(out, "</div></section>")?;
    Ok(())
}

fn legend(colour: usize, name: &str) -> String {
    format!(
        "<span class=\"key\" style=\"background:var(--s{})\"></span>{}",
        colour % 5,
        escape(name)
    )
}

fn figure(heading: &str, legend: &[String], svg: &str, out: &mut String) -> std::fmt::Result {
    if svg.is_empty() {
        return Ok(());
    }
    writeln!(
        out,
        "<figure><figcaption>{} <span class=\"legend\">{}</span></figcaption>{svg}</figure>",
        escape(heading),
        legend.join(" ")
    )
}

fn stage_curves(stage: &str, curves: &Curves, out: &mut String) -> anyhow::Result<()> {
    writeln!(
        out,
        "<section><h2>Training: {}</h2>\n<div class=\"plots\">",
        escape(stage)
    )?;
    for (heading, keys) in PLOTS {
        let series: Vec<Series<'_>> = keys
            .iter()
            .enumerate()
            .filter_map(|(i, k)| {
                Some(Series {
                    points: curves.get(k)?,
                    colour: i,
                })
            })
            .collect();
        let flat = series.iter().all(|s| s.points.iter().all(|p| p.1 == 0.0));
        if !series.is_empty() && !flat {
            figure(heading, &[], &plot::lines(&series)?, out)?;
        }
    }
    writeln!(out, "</div></section>")?;
    Ok(())
}

fn samples(stage: &str, e: &Evaluation, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "<section><h2>Samples</h2>\n<p>Held-out prompts of stage {}. A token is shaded where its model finds it <span class=\"up\">likelier</span> or <span class=\"down\">less likely</span> than {} does; hover for the numbers.</p>",
        escape(stage),
        escape(&e.baseline)
    )?;
    for s in &e.samples {
        writeln!(
            out,
            "<article><p class=\"prompt\">{}</p><div class=\"answers\">",
            escape(&s.prompt)
        )?;
        for a in &s.answers {
            answer(a, out)?;
        }
        writeln!(out, "</div></article>")?;
    }
    writeln!(out, "</section>")
}

fn answer(a: &Answer, out: &mut String) -> std::fmt::Result {
    let score =
        |label: &str, x: Option<f64>| x.map_or_else(String::new, |x| format!(" · {label} {x:.2}"));
    write!(
        out,
        "<div><h4>{}<span class=\"muted\">{}{}</span></h4><p>",
        escape(&a.model),
        score("gold", a.gold),
        score("reward", a.reward)
    )?;
    for t in &a.tokens {
        let gap = t.logprob - t.baseline;
        let strength = (gap.abs() / 4.0).min(1.0) * 60.0;
        let title = format!("log p {:.2}, baseline {:.2}", t.logprob, t.baseline);
        if strength < 3.0 {
            write!(out, "<span title=\"{title}\">{}</span>", escape(&t.text))?;
        } else {
            let side = if gap > 0.0 { "up" } else { "down" };
            write!(
                out,
                "<span title=\"{title}\" style=\"background:color-mix(in srgb, var(--{side}) {strength:.0}%, transparent)\">{}</span>",
                escape(&t.text)
            )?;
        }
    }
    writeln!(out, "</p></div>")
}

fn stages(m: &Material, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "<section><h2>Stages</h2><div class=\"wide\"><table><thead><tr><th>stage</th><th>kind</th><th>steps</th><th>time</th><th>tokens</th><th>tokens/s</th></tr></thead><tbody>"
    )?;
    for s in &m.run.stages {
        let rate = if s.tokens > 0 {
            terminal::count(s.tokens as f64 / s.seconds.max(1e-9))
        } else {
            "–".into()
        };
        writeln!(
            out,
            "<tr><th>{}</th><td>{}</td><td>{}</td><td>{}</td><td>{}</td><td>{rate}</td></tr>",
            escape(&s.name),
            escape(&s.kind),
            s.steps,
            terminal::seconds(s.seconds),
            terminal::count(s.tokens as f64)
        )?;
    }
    writeln!(out, "</tbody></table></div></section>")
}

fn details(m: &Material, out: &mut String) -> std::fmt::Result {
    let revision = m.run.git_revision.as_deref().unwrap_or("unknown");
    writeln!(
        out,
        "<section><h2>How to repeat it</h2>\n<p>rlhf {} at revision {}.</p>",
        escape(&m.run.version),
        escape(revision)
    )?;
    writeln!(
        out,
        "<details><summary>Recipe</summary><pre>{}</pre></details>",
        escape(&m.recipe)
    )?;
    writeln!(
        out,
        "<details><summary>Plan</summary><pre>{}</pre></details>",
        escape(&m.plan)
    )?;
    let mut hashes = String::new();
    for (path, hash) in &m.run.data {
        writeln!(hashes, "{hash}  {path}")?;
    }
    for (stage, hash) in &m.run.models {
        writeln!(hashes, "{hash}  weights of {stage}")?;
    }
    writeln!(
        out,
        "<details><summary>Hashes (SHA-256)</summary><pre>{}</pre></details></section>",
        escape(&hashes)
    )
}
