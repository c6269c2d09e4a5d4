//! The page of a reward model's evaluation: one self-contained HTML file.
//!
//! Invariant: as the report of a run, it is made of the results alone, has no script and no outside address,
//! and escapes what data sets wrote.

use std::fmt::Write as _;
use std::path::Path;

use super::html::{escape, figure, number, percent, table};
use super::page::{Section, document};
use super::plot::{self, Axis, LARGE, Mark};
use super::rewards::calibration;
use crate::files::write;
use crate::interval::Interval;
use crate::reward_results::{Members, RewardEvaluation};

/// Writes the page.
///
/// # Errors
/// When a plot cannot be drawn or the file cannot be written.
pub fn reward_page(e: &RewardEvaluation, path: &Path) -> anyhow::Result<()> {
    let mut sections = vec![accuracy(e)?];
    let mut figures = String::new();
    histogram(&e.margins, &mut figures)?;
    if e.calibration_error.is_some() {
        calibration(&e.margins, &mut figures)?;
    }
    if !figures.is_empty() {
        let body = format!("<div class=\"plots two\">\n{figures}</div>\n");
        sections.push(Section::new("margins", "Margins", body));
    }
    if let Some(section) = length(e)? {
        sections.push(section);
    }
    if let Some(m) = &e.members {
        sections.push(members(m)?);
    }
    if let Some(section) = best_of(e)? {
        sections.push(section);
    }
    let title = format!("Reward model {}", e.model);
    let head = format!(
        "<header>\n<p class=\"eyebrow\">rlhf</p>\n<h1>{}</h1>\n<p class=\"lead\">{} of {} pairs of {} in the right order (95 % interval {} to {}; a coin gets 50 %).</p>\n</header>\n",
        escape(&title),
        percent(e.accuracy.value),
        e.accuracy.n,
        escape(&e.data),
        percent(e.accuracy.low),
        percent(e.accuracy.high)
    );
    write(path, document(&title, &head, &sections).as_bytes())
}

/// A share's cells: value, interval, count.
fn cells(name: &str, i: &Interval) -> Vec<String> {
    vec![
        escape(name),
        percent(i.value),
        format!("{} to {}", percent(i.low), percent(i.high)),
        i.n.to_string(),
    ]
}

fn shares(rows: &[Vec<String>], out: &mut String) -> anyhow::Result<()> {
    let headings = ["", "share", "95 % interval", "pairs"].map(String::from);
    Ok(table(&headings, rows, out)?)
}

fn accuracy(e: &RewardEvaluation) -> anyhow::Result<Section> {
    let mut body = String::new();
    if let Some(mean) = e.sections_mean {
        writeln!(
            body,
            "<p>The mean of RewardBench's sections is <b>{}</b>.</p>",
            percent(mean)
        )?;
    }
    let mut rows = vec![cells("all pairs", &e.accuracy)];
    rows.extend(
        e.sections
            .iter()
            .chain(&e.categories)
            .map(|s| cells(&s.name, &s.share)),
    );
    shares(&rows, &mut body)?;
    Ok(Section::new("accuracy", "Pairs right", body))
}

/// How many pairs have which margin, as the outline of bars.
fn histogram(margins: &[f64], out: &mut String) -> anyhow::Result<()> {
    let mut sorted: Vec<f64> = margins.iter().copied().filter(|x| x.is_finite()).collect();
    sorted.sort_by(f64::total_cmp);
    let (Some(&low), Some(&high)) = (sorted.first(), sorted.last()) else {
        return Ok(());
    };
    if low == high {
        return Ok(());
    }
    let bars = (sorted.len() as f64).sqrt().ceil().clamp(4.0, 40.0);
    let width = (high - low) / bars;
    let mut counts = vec![0.0f64; bars as usize];
    for x in &sorted {
        let at = (((x - low) / width) as usize).min(counts.len() - 1);
        counts[at] += 1.0;
    }
    let mut outline = vec![(low, 0.0)];
    for (i, count) in counts.iter().enumerate() {
        let left = low + width * i as f64;
        outline.extend([(left, *count), (left + width, *count)]);
    }
    outline.push((high, 0.0));
    let most = counts.iter().copied().fold(0.0, f64::max);
    let marks = [
        Mark::Bold(outline, 1),
        Mark::Reference((0.0, 0.0), (0.0, most)),
    ];
    let (x, y) = (
        Axis::named("score of the chosen less that of the rejected"),
        Axis::named("pairs"),
    );
    if let Some(svg) = plot::draw(&marks, LARGE, x, y, "how many pairs have which margin")? {
        let note = "right of the dashed line the chosen is ahead";
        figure("Margins", &[], &svg, note, out)?;
    }
    Ok(())
}

fn length(e: &RewardEvaluation) -> anyhow::Result<Option<Section>> {
    let Some(l) = &e.length else { return Ok(None) };
    let mut body = String::new();
    writeln!(
        body,
        "<p>Where both completions are equally long the model would be right in <b>{}</b> of pairs (logistic regression of its choices on the difference of lengths). The differences of scores and of lengths correlate by {}; one standard deviation of length brings {} log-odds ({} to {}).</p>",
        percent(l.at_equal_length.value),
        number(l.correlation),
        number(l.slope.value),
        number(l.slope.low),
        number(l.slope.high)
    )?;
    shares(
        &[
            cells("right at equal length", &l.at_equal_length),
            cells("the longer one is the chosen", &l.longer_chosen),
            cells("the model prefers the longer one", &l.prefers_longer),
        ],
        &mut body,
    )?;
    Ok(Some(Section::new("length", "How much is length", body)))
}

fn members(m: &Members) -> anyhow::Result<Section> {
    let mut rows: Vec<Vec<String>> = m
        .accuracy
        .iter()
        .enumerate()
        .map(|(i, a)| cells(&format!("member {i} right"), a))
        .collect();
    rows.extend([
        cells("two members order a pair alike", &m.alike),
        cells("all members do", &m.unanimous),
        cells("right where all agree", &m.when_unanimous),
        cells("right where they do not", &m.when_divided),
    ]);
    let mut body = String::new();
    shares(&rows, &mut body)?;
    Ok(Section::new("members", "Members of the ensemble", body))
}

fn best_of(e: &RewardEvaluation) -> anyhow::Result<Option<Section>> {
    if e.best_of.is_empty() {
        return Ok(None);
    }
    let line = |value: fn(&crate::reward_results::BestOfRow) -> f64| -> Vec<(f64, f64)> {
        e.best_of.iter().map(|b| (b.kl, value(b))).collect()
    };
    let mut marks = vec![
        Mark::Thin(line(|b| b.ceiling), 2),
        Mark::Bold(line(|b| b.gold.value), 1),
    ];
    for b in &e.best_of {
        marks.push(Mark::Whisker {
            x: b.kl,
            low: b.gold.low,
            high: b.gold.high,
            colour: 1,
        });
        marks.push(Mark::Dots(vec![(b.kl, b.gold.value)], 1, 4));
    }
    let mut body = String::new();
    let (x, y) = (
        Axis::named("KL of best-of-n, log n − (n−1)/n nats"),
        Axis::named("gold score"),
    );
    if let Some(svg) = plot::draw(
        &marks,
        LARGE,
        x,
        y,
        "gold score of the best of n against KL",
    )? {
        let mut figures = String::new();
        let note = "thick: the best by the model, with its 95 % interval; thin: the best by gold";
        figure("Best of n", &[], &svg, note, &mut figures)?;
        writeln!(body, "<div class=\"plots two\">\n{figures}</div>")?;
    }
    let rows: Vec<Vec<String>> = e
        .best_of
        .iter()
        .map(|b| {
            vec![
                b.n.to_string(),
                number(b.kl),
                number(b.gold.value),
                format!("{} to {}", number(b.gold.low), number(b.gold.high)),
                number(b.ceiling),
                number(b.proxy),
            ]
        })
        .collect();
    let headings = [
        "n",
        "KL, nats",
        "gold score",
        "95 % interval",
        "best by gold",
        "the model's score",
    ];
    table(&headings.map(String::from), &rows, &mut body)?;
    Ok(Some(Section::new("bestof", "Best of n", body)))
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_page_shows_everything_and_escapes_names() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("reward.html");
        let e = crate::reward_results::tests::example();
        super::reward_page(&e, &path).unwrap();
        let page = std::fs::read_to_string(&path).unwrap();
        for id in ["accuracy", "margins", "length", "members", "bestof"] {
            assert!(page.contains(&format!("<section id=\"{id}\">")), "{id}");
        }
        assert!(page.contains("&lt;b&gt;") && !page.contains("<b></b>"));
        assert!(page.contains("71.0 %") && page.contains("<svg") && !page.contains("<script"));
        // Nothing but an accuracy is a page too.
        let bare = crate::reward_results::RewardEvaluation {
            categories: vec![],
            sections: vec![],
            sections_mean: None,
            margins: vec![],
            bins: vec![],
            calibration_error: None,
            length: None,
            best_of: vec![],
            members: None,
            ..e
        };
        super::reward_page(&bare, &path).unwrap();
        let page = std::fs::read_to_string(&path).unwrap();
        assert!(!page.contains("id=\"length\"") && page.contains("75.0 %"));
    }
}
