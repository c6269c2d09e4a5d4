//! The head of the page: what was run, did it get better, by how much.

use std::fmt::Write as _;

use super::Material;
use super::html::{escape, listed, number, percent};
use crate::interval::Interval;
use crate::results::{Check, Evaluation, MEASURES, ModelRow};
use crate::terminal;

/// The measures that decide, the most telling first.
const DECIDING: [&str; 4] = ["return", "gold", "likelier", "reward"];

/// How a model compares with the baseline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Above it, intervals apart.
    Above,
    /// Below it, intervals apart.
    Below,
    /// The intervals overlap.
    Unclear,
}

/// Compares two intervals.
pub(crate) fn change(own: &Interval, base: &Interval) -> Change {
    match () {
        () if own.low > base.high => Change::Above,
        () if own.high < base.low => Change::Below,
        () => Change::Unclear,
    }
}

/// A model with its value of the deciding measure.
type Own<'a> = (&'a ModelRow, Interval);

/// An evaluation by its deciding measure: its key, the baseline's value, the other models with theirs.
fn deciding(e: &Evaluation) -> Option<(&'static str, Interval, Vec<Own<'_>>)> {
    let base = e.models.iter().find(|r| r.name == e.baseline)?;
    DECIDING.iter().find_map(|key| {
        let before = base.measures.get(*key)?;
        let others: Vec<Own<'_>> = e
            .models
            .iter()
            .filter(|r| r.name != e.baseline)
            .filter_map(|r| Some((r, *r.measures.get(*key)?)))
            .collect();
        (!others.is_empty()).then_some((*key, *before, others))
    })
}

/// Title, verdict, a card for each model, checks.
pub(crate) fn header(m: &Material) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    writeln!(
        out,
        "<header>\n<p class=\"eyebrow\">{}</p>",
        escape(&m.run.title)
    )?;
    let verdicts: Vec<_> = m
        .evaluations
        .iter()
        .filter_map(|(_, e)| Some((e, deciding(e)?)))
        .collect();
    if verdicts.is_empty() {
        writeln!(
            out,
            "<h1>Trained, but not compared</h1>\n<p class=\"note\">No evaluation of this run compares its models: whether they got better is not known.</p>"
        )?;
    }
    for (i, (e, (key, before, others))) in verdicts.iter().enumerate() {
        let tag = if i == 0 { "h1" } else { "h2" };
        writeln!(
            out,
            "<{tag}>{}</{tag}>",
            headline(&e.baseline, before, others)
        )?;
        lead(e, key, before, others, &mut out)?;
        writeln!(out, "<div class=\"cards\">")?;
        for (row, own) in others {
            card(m, e, (key, before), (row, *own), &mut out)?;
        }
        writeln!(out, "</div>")?;
    }
    flow(m, &mut out)?;
    let checks: Vec<&Check> = m.evaluations.iter().flat_map(|e| &e.1.checks).collect();
    if !checks.is_empty() {
        list(&checks, &mut out)?;
    }
    writeln!(out, "</header>")?;
    Ok(out)
}

/// One sentence: which models are better than the baseline.
fn headline(baseline: &str, before: &Interval, others: &[Own<'_>]) -> String {
    let names = |wanted: Change| -> Vec<String> {
        others
            .iter()
            .filter(|o| change(&o.1, before) == wanted)
            .map(|o| escape(&o.0.name))
            .collect()
    };
    let (better, unclear, worse) = (
        names(Change::Above),
        names(Change::Unclear),
        names(Change::Below),
    );
    let baseline = escape(baseline);
    let are = |n: &[String]| if n.len() == 1 { "is" } else { "are" };
    if better.len() == others.len() {
        return match better.len() {
            1 => format!("{} is better than {baseline}", better[0]),
            2 => format!("Both {} are better than {baseline}", listed(&better)),
            n => format!("All {n} aligned models are better than {baseline}"),
        };
    }
    let mut parts = Vec::new();
    if !better.is_empty() {
        parts.push(format!(
            "{} {} better than {baseline}",
            listed(&better),
            are(&better)
        ));
    }
    if !unclear.is_empty() {
        parts.push(format!(
            "{} {} not clearly different{}",
            listed(&unclear),
            are(&unclear),
            if parts.is_empty() {
                format!(" from {baseline}")
            } else {
                String::new()
            }
        ));
    }
    if !worse.is_empty() {
        parts.push(format!(
            "{} {} worse{}",
            listed(&worse),
            are(&worse),
            if parts.is_empty() {
                format!(" than {baseline}")
            } else {
                String::new()
            }
        ));
    }
    parts.join("; ")
}

/// A measure's heading and how its numbers are shown.
fn named(key: &str) -> (&str, fn(f64) -> String) {
    MEASURES
        .iter()
        .find(|x| x.key == key)
        .map_or((key, number), |x| {
            (x.heading, if x.percent { percent } else { number })
        })
}

/// What the headline rests on, in numbers.
fn lead(
    e: &Evaluation,
    key: &str,
    before: &Interval,
    others: &[Own<'_>],
    out: &mut String,
) -> std::fmt::Result {
    let (heading, show) = named(key);
    let Some((row, own)) = others.iter().max_by(|a, b| a.1.value.total_cmp(&b.1.value)) else {
        return Ok(());
    };
    write!(
        out,
        "<p class=\"lead\">Measured by {heading} on {} held-out {}. Highest: {} with <b>{}</b> (95 % interval {} to {}), against <b>{}</b> ({} to {}) for {}",
        own.n,
        match key {
            "likelier" => "pairs",
            "return" => "episodes",
            _ => "prompts",
        },
        escape(&row.name),
        show(own.value),
        show(own.low),
        show(own.high),
        show(before.value),
        show(before.low),
        show(before.high),
        escape(&e.baseline),
    )?;
    if let Some(win) = row.measures.get("win_rate") {
        write!(
            out,
            "; its reply is the better one on {} of the prompts",
            percent(win.value)
        )?;
    }
    if let Some(kl) = row.measures.get("kl") {
        write!(
            out,
            ", at a distance (KL) of {} nats a completion",
            number(kl.value)
        )?;
    }
    writeln!(out, ".</p>")
}

fn card(
    m: &Material,
    e: &Evaluation,
    (key, before): (&str, &Interval),
    (row, own): Own<'_>,
    out: &mut String,
) -> std::fmt::Result {
    let (heading, show) = named(key);
    let (class, word) = match change(&own, before) {
        Change::Above => ("good", "better, intervals apart"),
        Change::Below => ("poor", "worse, intervals apart"),
        Change::Unclear => ("", "intervals overlap"),
    };
    let gain = own.value - before.value;
    let gain = if gain > 0.0 {
        format!("+{}", show(gain))
    } else {
        show(gain)
    };
    writeln!(
        out,
        "<div class=\"card\">{}<p><b class=\"big\">{}</b> <span class=\"{class}\">{gain}</span></p><p class=\"muted\">{heading}; {} has {}<br>{word}</p></div>",
        m.palette.key(&row.name),
        show(own.value),
        escape(&e.baseline),
        show(before.value)
    )
}

/// The stages as a chain, then size, machine and time.
fn flow(m: &Material, out: &mut String) -> std::fmt::Result {
    let r = &m.run;
    let chain: Vec<String> = r
        .stages
        .iter()
        .map(|s| format!("<span>{}</span>", escape(&s.name)))
        .collect();
    let memory = r.peak_memory.map_or_else(String::new, |b| {
        format!(" · {} of memory at most", terminal::bytes(b))
    });
    writeln!(
        out,
        "<p class=\"flow\">{}</p>\n<p class=\"muted\">Recipe {} · {} parameters · {} · {}{memory}</p>",
        chain.join(" → "),
        escape(&r.recipe),
        terminal::count(r.parameters as f64),
        escape(&r.device),
        terminal::seconds(r.seconds)
    )
}

fn list(checks: &[&Check], out: &mut String) -> std::fmt::Result {
    let failed = checks.iter().filter(|c| !c.ok).count();
    let (open, mark, text) = match (failed, checks.len()) {
        (0, 1) => (
            "",
            "<i class=\"ok\">✓</i>",
            "The one check holds".to_owned(),
        ),
        (0, n) => ("", "<i class=\"ok\">✓</i>", format!("All {n} checks hold")),
        (f, n) => (
            " open",
            "<i class=\"bad\">✗</i>",
            format!(
                "{f} of {n} checks {}",
                if f == 1 { "fails" } else { "fail" }
            ),
        ),
    };
    writeln!(
        out,
        "<details class=\"checks\"{open}><summary>{mark}{text}</summary>\n<ul>"
    )?;
    // What fails comes first.
    for c in checks
        .iter()
        .filter(|c| !c.ok)
        .chain(checks.iter().filter(|c| c.ok))
    {
        let (class, mark) = if c.ok { ("ok", "✓") } else { ("bad", "✗") };
        writeln!(
            out,
            "<li><i class=\"{class}\">{mark}</i><div>{}<br><span class=\"muted\">{}</span></div></li>",
            escape(&c.what),
            escape(&c.found)
        )?;
    }
    writeln!(out, "</ul></details>")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn the_headline_says_what_the_intervals_say() {
        let at = |value: f64| Interval {
            value,
            low: value - 0.1,
            high: value + 0.1,
            n: 9,
        };
        let rows: Vec<ModelRow> = ["a", "b", "<c>"]
            .iter()
            .map(|n| ModelRow {
                name: (*n).into(),
                measures: BTreeMap::new(),
            })
            .collect();
        let say = |values: &[f64]| {
            let others: Vec<_> = rows.iter().zip(values).map(|(r, v)| (r, at(*v))).collect();
            headline("sft", &at(0.5), &others)
        };
        assert_eq!(
            say(&[0.8, 0.9, 0.9]),
            "All 3 aligned models are better than sft"
        );
        assert_eq!(say(&[0.8, 0.9]), "Both a and b are better than sft");
        assert_eq!(
            say(&[0.8, 0.6, 0.2]),
            "a is better than sft; b is not clearly different; &lt;c&gt; is worse"
        );
        assert_eq!(
            say(&[0.2, 0.2, 0.2]),
            "a, b and &lt;c&gt; are worse than sft"
        );
        assert_eq!(say(&[0.5]), "a is not clearly different from sft");
        assert_eq!(say(&[f64::NAN]), "a is not clearly different from sft");
    }
}
