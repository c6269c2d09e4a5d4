//! The curves of each stage as small plots.

use std::fmt::Write as _;

use super::Material;
use super::html::{escape, figure, key, number};
use super::metrics::Metrics;
use super::page::Section;
use super::plot::{self, Series};
use crate::results::StageSummary;
use crate::terminal;

/// What stands in a small plot: heading, and its keys with their names in the legend.
type Group = (&'static str, &'static [(&'static str, &'static str)]);

/// What a reader looks at first.
const MAIN: &[Group] = &[
    ("mean return of the last 100 episodes", &[("return", "")]),
    ("loss", &[("loss", "")]),
    ("reward", &[("reward", "")]),
    ("KL, nats a completion", &[("kl", "")]),
    ("gold score", &[("gold", "")]),
    ("share of pairs right", &[("accuracy", "")]),
    ("margin", &[("margin", "")]),
    (
        "log-probs",
        &[
            ("chosen_logprobs", "chosen"),
            ("rejected_logprobs", "rejected"),
        ],
    ),
    (
        "implicit rewards",
        &[
            ("chosen_rewards", "chosen"),
            ("rejected_rewards", "rejected"),
        ],
    ),
    ("length, tokens", &[("length", "")]),
    ("entropy, nats a token", &[("entropy", "")]),
    ("gradient norm", &[("grad_norm", "")]),
];

/// What is looked at when something is wrong. Keys in neither list follow by their own names.
const MORE: &[Group] = &[
    ("learning rate", &[("lr", "")]),
    ("value loss", &[("value_loss", "")]),
    (
        "explained variance of the value",
        &[("explained_variance", "")],
    ),
    (
        "clipped share",
        &[("clip_fraction_low", "low"), ("clip_fraction_high", "high")],
    ),
    ("clipped share of the value", &[("value_clip_fraction", "")]),
    (
        "ratio to the old policy, quantiles",
        &[("ratio_p01", "1 %"), ("ratio_p99", "99 %")],
    ),
    (
        "length by end",
        &[("length_stopped", "ends itself"), ("length_cut", "cut off")],
    ),
    (
        "advantage",
        &[("advantage_min", "least"), ("advantage_max", "largest")],
    ),
    (
        "share of completions that end themselves",
        &[("stopped", "")],
    ),
    ("share of groups without contrast", &[("no_contrast", "")]),
    ("spread of the reward", &[("reward_std", "")]),
    ("mean ratio to the old policy", &[("ratio_mean", "")]),
    ("KL to the old policy", &[("approx_kl", "")]),
    ("KL coefficient", &[("kl_coef", "")]),
    ("comparisons asked so far", &[("comparisons", "")]),
    ("share of ties among them", &[("ties", "")]),
    ("loss of the reward predictors", &[("reward_loss", "")]),
    ("steps in environments so far", &[("environment_steps", "")]),
    ("episodes so far", &[("episodes", "")]),
    ("gap between sampler and learner", &[("sampler_gap", "")]),
];

/// The section: one block a stage that logs.
pub(crate) fn section(m: &Material) -> anyhow::Result<Section> {
    let mut out = String::new();
    let mut silent = Vec::new();
    for (stage, metrics) in m.run.stages.iter().zip(&m.metrics) {
        if metrics.is_empty() {
            if stage.steps > 0 {
                silent.push(escape(&stage.name));
            }
            continue;
        }
        block(m, stage, metrics, &mut out)?;
    }
    if !out.is_empty() {
        out.insert_str(0, "<p>Against the step: each value thin, the moving average bold. The number is the mean of the last tenth.</p>\n");
    }
    if !silent.is_empty() || out.is_empty() {
        let of = if silent.is_empty() {
            String::new()
        } else {
            format!(" of {}", silent.join(", "))
        };
        writeln!(
            out,
            "<p class=\"note\">There are no metrics{of}: metrics.jsonl is missing or empty.</p>"
        )?;
    }
    Ok(Section::new("training", "Training", out))
}

fn block(
    m: &Material,
    stage: &StageSummary,
    metrics: &Metrics,
    out: &mut String,
) -> anyhow::Result<()> {
    let kind = if stage.kind == stage.name {
        String::new()
    } else {
        format!("{} · ", escape(&stage.kind))
    };
    writeln!(
        out,
        "<h3>{} <small>{kind}{} steps · {}</small></h3>",
        m.palette.key(&stage.name),
        stage.steps,
        terminal::seconds(stage.seconds)
    )?;
    if metrics.unreadable > 0 {
        writeln!(
            out,
            "<p class=\"note\">Lines of metrics.jsonl that could not be read: {}.</p>",
            metrics.unreadable
        )?;
    }
    let colour = m.palette.of(&stage.name);
    writeln!(out, "<div class=\"plots\">")?;
    for (heading, keys) in MAIN {
        one(metrics, heading, keys, colour, out)?;
    }
    writeln!(out, "</div>")?;
    let mut more = String::new();
    for (heading, keys) in MORE {
        one(metrics, heading, keys, colour, &mut more)?;
    }
    let listed = |key: &str| {
        MAIN.iter()
            .chain(MORE)
            .any(|g| g.1.iter().any(|k| k.0 == key))
    };
    for key in metrics.keys().filter(|k| !listed(k)) {
        one(metrics, key, &[(key, "")], colour, &mut more)?;
    }
    if !more.is_empty() {
        writeln!(
            out,
            "<details><summary>More curves of {}</summary><div class=\"plots\">\n{more}</div></details>",
            escape(&stage.name)
        )?;
    }
    Ok(())
}

fn one(
    metrics: &Metrics,
    heading: &str,
    keys: &[(&str, &str)],
    colour: usize,
    out: &mut String,
) -> anyhow::Result<()> {
    let logged: Vec<(&str, &[(f64, f64)])> = keys
        .iter()
        .filter_map(|k| Some((k.1, metrics.get(k.0)?)))
        .collect();
    // The first curve has the stage's colour, the other is grey (or not, beside a grey one).
    let other = usize::from(colour == 0);
    let series: Vec<Series<'_>> = logged
        .iter()
        .enumerate()
        .map(|(i, l)| Series {
            points: l.1,
            colour: if i == 0 { colour } else { other },
        })
        .collect();
    let lost: usize = logged
        .iter()
        .map(|l| l.1.iter().filter(|p| !p.1.is_finite()).count())
        .sum();
    let Some(drawn) = plot::curves(&series, heading)? else {
        if lost > 0 {
            figure(heading, &[], "", "no value is finite", out)?;
        }
        return Ok(());
    };
    let legend: Vec<String> = logged
        .iter()
        .zip(&series)
        .map(|((name, points), s)| {
            let end = number(end_of(points));
            if name.is_empty() {
                format!("<span class=\"key\">{end}</span>")
            } else {
                key(s.colour, &format!("{name} {end}"))
            }
        })
        .collect();
    let mut notes = Vec::new();
    if lost > 0 {
        notes.push(format!("values that are not finite: {lost}"));
    }
    if let Some((low, high)) = drawn.beyond {
        notes.push(format!(
            "axis cut; values from {} to {}",
            number(low),
            number(high)
        ));
    }
    figure(heading, &legend, &drawn.svg, &notes.join("; "), out)?;
    Ok(())
}

/// The mean of the last tenth of the finite values.
fn end_of(points: &[(f64, f64)]) -> f64 {
    let finite: Vec<f64> = points
        .iter()
        .map(|p| p.1)
        .filter(|v| v.is_finite())
        .collect();
    let tail = &finite[finite.len() - finite.len().div_ceil(10)..];
    tail.iter().sum::<f64>() / tail.len() as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_tenth() {
        let points: Vec<(f64, f64)> = (0..20)
            .map(|i| (f64::from(i), f64::from(i)))
            .chain([(20.0, f64::NAN)])
            .collect();
        assert_eq!(end_of(&points), 18.5);
        assert_eq!(end_of(&points[..1]), 0.0);
        assert!(end_of(&[]).is_nan());
    }
}
