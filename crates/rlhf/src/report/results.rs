//! The tables of results with their 95 % intervals.

use std::fmt::Write as _;

use super::Material;
use super::html::{escape, number, percent, table};
use super::page::Section;
use super::verdict::{Change, change};
use crate::interval::Interval;
use crate::results::{Evaluation, MEASURES, ModelRow};

/// A measure as a column.
#[derive(Clone, Debug)]
struct Column<'a> {
    key: &'a str,
    heading: &'a str,
    percent: bool,
    /// Whether more is better, less is, or neither.
    wanted: Option<Change>,
}

/// Tables: heading, and the keys in it.
const TABLES: [(&str, &[&str]); 2] = [
    (
        "How good",
        &[
            "return",
            "gold",
            "win_rate",
            "reward",
            "likelier",
            "pair_accuracy",
            "margin",
        ],
    ),
    (
        "What it costs, and how the text changed",
        &[
            "kl",
            "length",
            "stopped",
            "distinct1",
            "distinct2",
            "distinct_words",
        ],
    ),
];

/// What the keys mean.
const MEANING: [(&str, &str); 13] = [
    (
        "return",
        "mean sum of an episode's rewards, over episodes that no training has seen",
    ),
    (
        "gold",
        "score of the gold judge, which no model was trained on",
    ),
    (
        "win_rate",
        "share of prompts where the gold judge prefers this model's reply to the baseline's; ties count half",
    ),
    (
        "kl",
        "mean of log π − log π₀ over whole completions drawn from π, where π₀ is the baseline",
    ),
    ("reward", "score of the reward model: what training saw"),
    ("length", "tokens a completion"),
    (
        "stopped",
        "share of completions that end by themselves before the limit",
    ),
    (
        "distinct1",
        "different words as a share of all words written",
    ),
    (
        "distinct2",
        "different pairs of neighbouring words as a share of all",
    ),
    (
        "distinct_words",
        "share of a completion's own words that differ, on average",
    ),
    (
        "likelier",
        "share of held-out pairs whose chosen completion has the higher log-probability; a longer one has less of it",
    ),
    (
        "pair_accuracy",
        "share of held-out pairs where the chosen completion gains more log-probability over the baseline than the rejected one",
    ),
    ("margin", "by how many nats, on average"),
];

/// A section for each evaluation.
pub(crate) fn sections(m: &Material) -> Result<Vec<Section>, std::fmt::Error> {
    m.evaluations
        .iter()
        .enumerate()
        .map(|(i, (stage, e))| {
            let title = if m.evaluations.len() == 1 {
                "Results".to_owned()
            } else {
                format!("Results of {stage}")
            };
            Ok(Section::new(
                if i == 0 {
                    "results".into()
                } else {
                    format!("results-{}", i + 1)
                },
                title,
                tables(m, e)?,
            ))
        })
        .collect()
}

fn column(key: &str) -> Column<'_> {
    let up = [
        "return",
        "gold",
        "win_rate",
        "reward",
        "stopped",
        "likelier",
        "pair_accuracy",
    ];
    let wanted = up.contains(&key).then_some(Change::Above);
    match MEASURES.iter().find(|x| x.key == key) {
        Some(x) => Column {
            key,
            heading: x.heading,
            percent: x.percent,
            wanted,
        },
        None => Column {
            key,
            heading: key,
            percent: false,
            wanted,
        },
    }
}

fn tables(m: &Material, e: &Evaluation) -> Result<String, std::fmt::Error> {
    let mut out = String::new();
    let mut keys: Vec<&str> = e
        .models
        .iter()
        .flat_map(|r| r.measures.keys().map(String::as_str))
        .collect();
    keys.sort_unstable();
    keys.dedup();
    if keys.is_empty() {
        return Ok("<p class=\"note\">This evaluation measured nothing.</p>\n".into());
    }
    writeln!(
        out,
        "<p>On held-out data, compared with {}. Small numbers and bars are 95 % intervals; the dotted line is {} (for win rates: even). Coloured: better or worse with intervals apart.</p>",
        m.palette.key(&e.baseline),
        escape(&e.baseline)
    )?;
    let known: Vec<&str> = TABLES.iter().flat_map(|t| t.1).copied().collect();
    let others: Vec<&str> = keys
        .iter()
        .copied()
        .filter(|k| !known.contains(k))
        .collect();
    for (heading, wanted) in TABLES
        .iter()
        .copied()
        .chain([("Other measures", others.as_slice())])
    {
        let columns: Vec<Column<'_>> = wanted
            .iter()
            .filter(|k| keys.contains(*k))
            .map(|k| column(k))
            .collect();
        if columns.is_empty() {
            continue;
        }
        writeln!(out, "<h3>{heading}</h3>")?;
        one(m, e, &columns, &mut out)?;
    }
    writeln!(out, "<details><summary>What the columns mean</summary><dl>")?;
    for (key, text) in MEANING.iter().filter(|x| keys.contains(&x.0)) {
        writeln!(out, "<dt>{}</dt><dd>{text}</dd>", column(key).heading)?;
    }
    writeln!(out, "</dl></details>")?;
    Ok(out)
}

fn one(m: &Material, e: &Evaluation, columns: &[Column<'_>], out: &mut String) -> std::fmt::Result {
    let headings: Vec<String> = std::iter::once(String::new())
        .chain(columns.iter().map(|c| {
            format!(
                "{}{}",
                escape(c.heading),
                if c.wanted.is_some() {
                    " <small>↑ better</small>"
                } else {
                    ""
                }
            )
        }))
        .collect();
    let base = e.models.iter().find(|r| r.name == e.baseline);
    let mut rows = Vec::new();
    for row in &e.models {
        let mut cells = vec![m.palette.key(&row.name)];
        for c in columns {
            cells.push(cell(e, c, row, base, m.palette.of(&row.name))?);
        }
        rows.push(cells);
    }
    table(&headings, &rows, out)
}

fn cell(
    e: &Evaluation,
    c: &Column<'_>,
    row: &ModelRow,
    base: Option<&ModelRow>,
    colour: usize,
) -> Result<String, std::fmt::Error> {
    let Some(own) = row.measures.get(c.key) else {
        return Ok("<span class=\"muted\">–</span>".into());
    };
    let show = if c.percent { percent } else { number };
    let against = match c.key {
        // Even odds.
        "win_rate" | "pair_accuracy" => Some(Interval {
            value: 0.5,
            low: 0.5,
            high: 0.5,
            n: own.n,
        }),
        key => base.and_then(|b| b.measures.get(key)).copied(),
    };
    let class = match (c.wanted, against.map(|a| change(own, &a))) {
        _ if row.name == e.baseline => "",
        (Some(wanted), Some(found)) if found == wanted => " class=\"good\"",
        (Some(_), Some(Change::Above | Change::Below)) => " class=\"poor\"",
        _ => "",
    };
    let mut out = format!(
        "<b{class}>{}</b><small title=\"n = {}\">{} to {}</small>",
        show(own.value),
        own.n,
        show(own.low).trim_end_matches(" %"),
        show(own.high)
    );
    // One scale a column, so that rows can be compared by eye.
    let all = e
        .models
        .iter()
        .filter_map(|r| r.measures.get(c.key))
        .chain(&against);
    let (low, high) = all
        .filter(|i| i.low.is_finite() && i.high.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |a, i| {
            (a.0.min(i.low), a.1.max(i.high))
        });
    if ![high - low, own.low, own.high, own.value]
        .iter()
        .all(|x| x.is_finite())
    {
        return Ok(out);
    }
    let at = |x: f64| {
        if high > low {
            5.0 + 100.0 * (x - low) / (high - low)
        } else {
            55.0
        }
    };
    write!(
        out,
        "<svg class=\"whisker\" viewBox=\"0 0 110 12\" aria-hidden=\"true\">"
    )?;
    if let Some(a) = against.filter(|a| a.value.is_finite()) {
        write!(out, "<path class=\"base\" d=\"M{:.1} 0V12\"/>", at(a.value))?;
    }
    write!(
        out,
        "<path style=\"stroke:var(--c{colour})\" d=\"M{:.1} 6H{:.1}\"/><circle style=\"fill:var(--c{colour})\" cx=\"{:.1}\" cy=\"6\" r=\"3.5\"/></svg>",
        at(own.low),
        at(own.high),
        at(own.value)
    )?;
    Ok(out)
}
