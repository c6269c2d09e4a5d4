//! Reward against KL, and how far the reward model can be trusted.

use std::fmt::Write as _;

use super::Material;
use super::html::{escape, figure, key, number, percent, table};
use super::page::Section;
use super::plot::{self, Axis, LARGE, Mark};
use crate::calibration::{bins, calibration_error};
use crate::results::Evaluation;

const KL: &str = "KL, nats a completion";

/// Training paths of the stages that sample, and the finished models by the gold judge.
pub(crate) fn against_kl(m: &Material) -> anyhow::Result<Option<Section>> {
    let mut figures = String::new();
    let (mut marks, mut names) = (Vec::new(), Vec::new());
    for (stage, metrics) in m.run.stages.iter().zip(&m.metrics) {
        let points = metrics.pairs("kl", "reward");
        let Some(end) = path(&points).last().copied() else {
            continue;
        };
        let colour = m.palette.of(&stage.name);
        marks.extend([
            Mark::Dots(sparse(&points), colour, 2),
            Mark::Bold(path(&points), colour),
            Mark::Dots(vec![end], colour, 5),
        ]);
        names.push(m.palette.key(&stage.name));
    }
    let about = "reward against KL over training";
    if let Some(svg) = plot::draw(&marks, LARGE, Axis::named(KL), Axis::named("reward"), about)? {
        figure(
            "In training: the reward that was maximised",
            &names,
            &svg,
            "small dots are steps, the line their moving average, the large dot the end",
            &mut figures,
        )?;
    }
    for (_, e) in &m.evaluations {
        let (mut marks, mut names) = (Vec::new(), Vec::new());
        for row in &e.models {
            let (Some(kl), Some(gold)) = (row.measures.get("kl"), row.measures.get("gold")) else {
                continue;
            };
            let colour = m.palette.of(&row.name);
            marks.push(Mark::Whisker {
                x: kl.value,
                low: gold.low,
                high: gold.high,
                colour,
            });
            marks.push(Mark::Dots(vec![(kl.value, gold.value)], colour, 4));
            names.push(m.palette.key(&row.name));
        }
        if let Some(svg) = plot::draw(
            &marks,
            LARGE,
            Axis::named(KL),
            Axis::named("gold score"),
            "gold score against KL of the finished models",
        )? {
            figure(
                "On held-out prompts: what the gold judge finds",
                &names,
                &svg,
                "each finished model with its 95 % interval",
                &mut figures,
            )?;
        }
    }
    if figures.is_empty() {
        return Ok(None);
    }
    let text = "<p>A policy buys reward with distance from where it began. If the reward goes on rising with KL while the gold score does not, the reward model is being exploited.</p>";
    Ok(Some(Section::new(
        "kl",
        "Reward against KL",
        format!("{text}\n<div class=\"plots two\">\n{figures}</div>\n"),
    )))
}

/// Both coordinates' moving averages, in the order of training.
fn path(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    if points.is_empty() {
        return Vec::new();
    }
    let average = |pick: fn(&(f64, f64)) -> f64| {
        plot::smooth(&points.iter().map(|p| (0.0, pick(p))).collect::<Vec<_>>())
    };
    sparse(
        &average(|p| p.0)
            .into_iter()
            .zip(average(|p| p.1))
            .map(|(x, y)| (x.1, y.1))
            .collect::<Vec<_>>(),
    )
}

fn sparse(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let stride = points.len().div_ceil(400).max(1);
    let mut out: Vec<_> = points.iter().rev().step_by(stride).copied().collect();
    out.reverse();
    out
}

/// Accuracy, calibration, agreement with the gold judge.
pub(crate) fn reward_model(m: &Material) -> anyhow::Result<Option<Section>> {
    let mut out = String::new();
    let mut rows = Vec::new();
    for s in m.run.stages.iter().filter(|s| s.kind == "reward") {
        let get = |k: &str| s.last.get(k).copied();
        let show = |x: Option<f64>| x.map_or_else(|| "–".into(), percent);
        rows.push(vec![
            m.palette.key(&s.name),
            show(get("test_accuracy")),
            show(get("accuracy")),
            get("loss").map_or_else(|| "–".into(), number),
        ]);
    }
    for (_, e) in &m.evaluations {
        if let Some(a) = &e.reward_model_accuracy {
            writeln!(
                out,
                "<p class=\"lead\">The reward model prefers the right completion in <b>{}</b> of {} held-out pairs (95 % interval {} to {}; a coin gets 50 %).</p>",
                percent(a.value),
                a.n,
                percent(a.low),
                percent(a.high)
            )?;
        }
    }
    if !rows.is_empty() {
        table(
            &[
                "",
                "held-out pairs right",
                "training pairs right, last steps",
                "training loss, last steps",
            ]
            .map(String::from),
            &rows,
            &mut out,
        )?;
    }
    let mut figures = String::new();
    for (_, e) in &m.evaluations {
        calibration(&e.reward_margins, &mut figures)?;
        agreement(m, e, &mut figures)?;
    }
    if !figures.is_empty() {
        writeln!(out, "<div class=\"plots two\">\n{figures}</div>")?;
    }
    Ok((!out.is_empty()).then(|| Section::new("rm", "Reward model", out)))
}

/// How often the model is right against how sure it is, from margins in log-odds.
pub(crate) fn calibration(margins: &[f64], out: &mut String) -> anyhow::Result<()> {
    let bins = bins(margins);
    let mut marks = vec![Mark::Reference((0.5, 0.5), (1.0, 1.0))];
    for b in &bins {
        marks.push(Mark::Whisker {
            x: b.sure,
            low: b.right.low,
            high: b.right.high,
            colour: 1,
        });
        marks.push(Mark::Dots(vec![(b.sure, b.right.value)], 1, 4));
    }
    let lowest = bins.iter().map(|b| b.right.low).fold(0.5, f64::min);
    let x = Axis {
        label: "how sure it is",
        range: Some((0.48, 1.01)),
    };
    let y = Axis {
        label: "how often it is right",
        range: Some(((lowest - 0.03).max(0.0), 1.02)),
    };
    if let Some(svg) = plot::draw(&marks, LARGE, x, y, "calibration of the reward model")? {
        let note = format!(
            "{} held-out pairs in {} bins; on the dashed line it is as right as it is sure; mean gap {}",
            margins.len(),
            bins.len(),
            percent(calibration_error(&bins))
        );
        figure("Calibration", &[], &svg, &note, out)?;
    }
    Ok(())
}

/// Reward against gold score of the samples that the report shows.
fn agreement(m: &Material, e: &Evaluation, out: &mut String) -> anyhow::Result<()> {
    let mut marks = Vec::new();
    let (mut all, mut names) = (Vec::new(), Vec::new());
    for row in &e.models {
        let answers = e
            .samples
            .iter()
            .flat_map(|s| &s.answers)
            .filter(|a| a.model == row.name);
        let points: Vec<(f64, f64)> = answers
            .filter_map(|a| Some((a.reward?, a.gold?)))
            .filter(|p| p.0.is_finite() && p.1.is_finite())
            .collect();
        if !points.is_empty() {
            all.extend_from_slice(&points);
            let colour = m.palette.of(&row.name);
            names.push(key(colour, &row.name));
            marks.push(Mark::Dots(points, colour, 3));
        }
    }
    let Some(r) = correlation(&all) else {
        return Ok(());
    };
    if let Some(svg) = plot::draw(
        &marks,
        LARGE,
        Axis::named("reward"),
        Axis::named("gold score"),
        "gold score against reward of the samples",
    )? {
        let note = format!(
            "the {} sampled replies of {}; correlation {}",
            all.len(),
            escape(
                &e.models
                    .iter()
                    .map(|r| r.name.clone())
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
            number(r)
        );
        figure("Does reward mean quality?", &names, &svg, &note, out)?;
    }
    Ok(())
}

/// Pearson's correlation of at least five points that vary.
fn correlation(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.len() as f64;
    let (mx, my) = (
        points.iter().map(|p| p.0).sum::<f64>() / n,
        points.iter().map(|p| p.1).sum::<f64>() / n,
    );
    let sum =
        |f: &dyn Fn(f64, f64) -> f64| points.iter().map(|p| f(p.0 - mx, p.1 - my)).sum::<f64>();
    let (xx, yy, xy) = (sum(&|x, _| x * x), sum(&|_, y| y * y), sum(&|x, y| x * y));
    (points.len() >= 5 && xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn correlation_by_hand() {
        // x = 1..5, y = 1, 2, 3, 4, 10: Σxy = 20 about the means, Σxx = 10, Σyy = 50: 20/√500 = 0.8944.
        let points = [(1.0, 1.0), (2.0, 2.0), (3.0, 3.0), (4.0, 4.0), (5.0, 10.0)];
        assert!((correlation(&points).unwrap() - 0.894_427_19).abs() < 1e-8);
        assert_eq!(correlation(&points[..4]), None);
        assert_eq!(correlation(&[(1.0, 2.0); 9]), None);
    }
}
