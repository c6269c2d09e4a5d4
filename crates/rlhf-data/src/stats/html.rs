//! Statistics as a self-contained fragment of HTML with bars as SVG; light and dark.

use std::fmt::Write as _;

use super::show::{HEADS, cells, model, number, percent};
use super::{Histogram, Stats, Summary};

const STYLE: &str = "<style>\
.rlhf-stats{--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--paper:#ffffff;--bar:#3b6fb6;--other:#c0702b;\
color:var(--ink);background:var(--paper);font:14px/1.5 system-ui,sans-serif;padding:1em}\
@media(prefers-color-scheme:dark){.rlhf-stats{--ink:#e6edf3;--soft:#9198a1;--line:#3d444d;--paper:#0d1117;--bar:#6ea8fe;--other:#f0a35e}}\
.rlhf-stats h3{margin:1em 0 .3em;font-size:1.05em}\
.rlhf-stats table{border-collapse:collapse;font-variant-numeric:tabular-nums}\
.rlhf-stats .wide{overflow-x:auto}\
.rlhf-stats th,.rlhf-stats td{padding:.15em .6em;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}\
.rlhf-stats th:first-child,.rlhf-stats td:first-child{text-align:left}\
.rlhf-stats th{color:var(--soft);font-weight:600}\
.rlhf-stats figure{display:inline-block;margin:.5em 1em .5em 0}\
.rlhf-stats figcaption,.rlhf-stats svg text{color:var(--soft);fill:var(--soft);font-size:11px}\
.rlhf-stats .bar{fill:var(--bar)}.rlhf-stats .other{fill:var(--other)}.rlhf-stats .axis{fill:var(--line)}\
</style>";

/// Text that means nothing to HTML.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c if c.is_control() && c != '\n' => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}

/// Bars of a histogram with its name and its ends.
fn bars(out: &mut String, name: &str, h: &Histogram) {
    const WIDTH: f64 = 260.0;
    const HEIGHT: f64 = 70.0;
    let most = h.counts.iter().copied().max().unwrap_or(0).max(1) as f64;
    let step = WIDTH / h.counts.len().max(1) as f64;
    let name = escape(name);
    let _ = write!(
        out,
        "<figure><svg width=\"{WIDTH}\" height=\"{:.0}\" viewBox=\"0 0 {WIDTH} {:.0}\" role=\"img\" aria-label=\"{name}\">",
        HEIGHT + 16.0,
        HEIGHT + 16.0
    );
    for (i, n) in h.counts.iter().enumerate() {
        let height = HEIGHT * *n as f64 / most;
        let (low, high) = (
            h.edges.get(i).copied().unwrap_or(0.0),
            h.edges.get(i + 1).copied().unwrap_or(0.0),
        );
        let _ = write!(
            out,
            "<rect class=\"bar\" x=\"{:.2}\" y=\"{:.2}\" width=\"{:.2}\" height=\"{height:.2}\"><title>{} to {}: {n}</title></rect>",
            i as f64 * step,
            HEIGHT - height,
            (step - 1.0).max(0.5),
            number(low),
            number(high)
        );
    }
    let _ = write!(
        out,
        "<rect class=\"axis\" x=\"0\" y=\"{HEIGHT}\" width=\"{WIDTH}\" height=\"1\"/>"
    );
    if let (Some(low), Some(high)) = (h.edges.first(), h.edges.last()) {
        let y = HEIGHT + 13.0;
        let _ = write!(
            out,
            "<text x=\"0\" y=\"{y}\">{}</text><text x=\"{WIDTH}\" y=\"{y}\" text-anchor=\"end\">{}</text>",
            number(*low),
            number(*high)
        );
    }
    let _ = write!(out, "</svg><figcaption>{name}</figcaption></figure>");
}

fn distributions(out: &mut String, rows: &[(String, &Summary)]) {
    out.push_str("<div class=\"wide\"><table><tr><th></th>");
    for h in HEADS {
        let _ = write!(out, "<th>{h}</th>");
    }
    out.push_str("</tr>");
    for (name, s) in rows {
        let _ = write!(out, "<tr><td>{}</td>", escape(name));
        for c in cells(s) {
            let _ = write!(out, "<td>{c}</td>");
        }
        out.push_str("</tr>");
    }
    out.push_str("</table></div>");
    for (name, s) in rows.iter().filter(|(_, s)| s.n > 0) {
        bars(out, name, &s.histogram);
    }
}

fn pairs(out: &mut String, rows: &[(String, String)]) {
    out.push_str("<table>");
    for (name, value) in rows {
        let _ = write!(
            out,
            "<tr><td>{}</td><td>{}</td></tr>",
            escape(name),
            escape(value)
        );
    }
    out.push_str("</table>");
}

impl Stats {
    /// A fragment for a page: its own style, tables, bars; no script, nothing from elsewhere.
    #[must_use]
    pub fn html(&self) -> String {
        let mut out = format!(
            "<section class=\"rlhf-stats\">{STYLE}<h3>{} rows</h3>",
            self.rows
        );
        let mut lengths: Vec<(String, &Summary)> = Vec::new();
        for l in &self.lengths {
            let name = |unit: &str| format!("{}, {unit}", l.column);
            lengths.extend(l.tokens.as_ref().map(|t| (name("tokens"), t)));
            lengths.push((name("characters"), &l.characters));
            lengths.push((name("words"), &l.words));
        }
        if let Some(t) = &self.turns {
            lengths.push(("turns a row".into(), t));
        }
        if let Some(n) = &self.items {
            lengths.push((self.items_name().into(), n));
        }
        if !lengths.is_empty() {
            out.push_str("<h3>Lengths</h3>");
            distributions(&mut out, &lengths);
        }
        if let Some(r) = &self.good {
            out.push_str("<h3>Labels</h3>");
            pairs(&mut out, &[(self.good_name().to_owned(), percent(r))]);
        }
        if let Some(p) = &self.preference {
            let unit = self.unit;
            let _ = write!(
                out,
                "<h3>Preference (95 % intervals; lengths in {unit})</h3>"
            );
            let mut rows = vec![
                ("chosen is longer".to_owned(), percent(&p.chosen_longer)),
                (
                    "mean log length ratio".to_owned(),
                    format!("{:+.3}", p.mean_log_length_ratio),
                ),
            ];
            rows.extend(
                p.length_model
                    .map(|m| ("length alone".to_owned(), model(&m))),
            );
            rows.extend(
                p.chosen_first
                    .map(|r| ("chosen shown first".to_owned(), percent(&r))),
            );
            pairs(&mut out, &rows);
            if !p.format.is_empty() {
                out.push_str("<h3>Form</h3>");
                self.format(&mut out);
            }
        }
        if !self.scores.is_empty() {
            out.push_str("<h3>Scores</h3>");
            let rows: Vec<(String, &Summary)> = self
                .scores
                .iter()
                .map(|s| (s.column.clone(), &s.values))
                .collect();
            distributions(&mut out, &rows);
        }
        if let Some(a) = &self.agreement {
            out.push_str("<h3>Agreement</h3>");
            let mut rows = vec![
                ("annotators".to_owned(), a.annotators.to_string()),
                ("items with at least two".to_owned(), a.items.to_string()),
                ("labels".to_owned(), a.labels.join(", ")),
            ];
            rows.extend(a.cohen.map(|k| {
                let over = format!("{k:.3} over {} items", a.cohen_items);
                ("Cohen's kappa".to_owned(), over)
            }));
            rows.extend(a.fleiss.map(|k| {
                let over = format!("{k:.3} over {} items", a.fleiss_items);
                ("Fleiss' kappa".to_owned(), over)
            }));
            pairs(&mut out, &rows);
        }
        out.push_str("</section>");
        out
    }

    fn format(&self, out: &mut String) {
        const WIDTH: f64 = 120.0;
        out.push_str(
            "<table><tr><th></th><th>chosen</th><th>rejected</th><th>difference</th><th></th></tr>",
        );
        for b in self.preference.iter().flat_map(|p| &p.format) {
            let _ = write!(
                out,
                "<tr><td>{}</td><td>{:.1} %</td><td>{:.1} %</td><td>{:+.1} [{:+.1}, {:+.1}]</td><td><svg width=\"{WIDTH}\" height=\"14\" role=\"img\" aria-label=\"chosen above, rejected below\"><rect class=\"bar\" x=\"0\" y=\"0\" width=\"{:.2}\" height=\"6\"/><rect class=\"other\" x=\"0\" y=\"7\" width=\"{:.2}\" height=\"6\"/></svg></td></tr>",
                escape(b.mark),
                100.0 * b.chosen,
                100.0 * b.rejected,
                100.0 * b.difference,
                100.0 * b.low,
                100.0 * b.high,
                WIDTH * b.chosen,
                WIDTH * b.rejected
            );
        }
        out.push_str("</table>");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_the_data_is_markup() {
        assert_eq!(
            escape("<b a='1'>&\"\u{1b}"),
            "&lt;b a=&#39;1&#39;&gt;&amp;&quot;\u{fffd}"
        );
    }
}
