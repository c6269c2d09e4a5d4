//! Statistics for the terminal.

use std::fmt;

use super::{LengthModel, PreferenceStats, Stats, Summary};
use crate::check::Purpose;
use crate::rate::Rate;

/// A number in at most seven characters or so.
pub(super) fn number(x: f64) -> String {
    let size = x.abs();
    if size >= 1e7 || (size > 0.0 && size < 1e-3) {
        format!("{x:.2e}")
    } else if x.fract() == 0.0 || size >= 1e4 {
        format!("{x:.0}")
    } else if size >= 100.0 {
        format!("{x:.1}")
    } else if size >= 10.0 {
        format!("{x:.2}")
    } else {
        format!("{x:.3}")
    }
}

/// `52.3 % [50.1, 54.5]`
pub(super) fn percent(r: &Rate) -> String {
    format!(
        "{:.1} % [{:.1}, {:.1}] of {}",
        100.0 * r.share,
        100.0 * r.low,
        100.0 * r.high,
        r.n
    )
}

/// What a fitted length model says.
pub(super) fn model(m: &LengthModel) -> String {
    let weight = match m.standard_error {
        Some(e) => format!("w = {:.3} ± {:.3}", m.weight, e),
        None if m.separated => format!("w = {:.0}, without bound", m.weight),
        None => format!("w = {:.3}", m.weight),
    };
    format!(
        "{weight}, pseudo-R² {:.4}, right in {:.1} % of pairs",
        m.pseudo_r2,
        100.0 * m.accuracy
    )
}

/// The names and numbers of a distribution's row in tables.
pub(super) const HEADS: [&str; 11] = [
    "n", "mean", "sd", "min", "p05", "p25", "median", "p75", "p95", "p99", "max",
];

pub(super) fn cells(s: &Summary) -> [String; 11] {
    let x = [
        s.mean, s.sd, s.min, s.p05, s.p25, s.median, s.p75, s.p95, s.p99, s.max,
    ]
    .map(number);
    let [a, b, c, d, e, f, g, h, i, j] = x;
    [s.n.to_string(), a, b, c, d, e, f, g, h, i, j]
}

fn table(f: &mut fmt::Formatter<'_>, rows: &[(String, &Summary)]) -> fmt::Result {
    let mut lines = vec![(
        String::new(),
        HEADS.map(str::to_owned),
        "histogram".to_owned(),
    )];
    lines.extend(
        rows.iter()
            .map(|(name, s)| (name.clone(), cells(s), s.histogram.line())),
    );
    let chars = |s: &str| s.chars().count();
    let first = lines.iter().map(|(n, ..)| chars(n)).max().unwrap_or(0);
    let mut widths = [0; HEADS.len()];
    for (_, cells, _) in &lines {
        for (w, c) in widths.iter_mut().zip(cells) {
            *w = (*w).max(chars(c));
        }
    }
    for (name, cells, bars) in &lines {
        write!(f, "  {name:<first$}")?;
        for (cell, w) in cells.iter().zip(widths) {
            write!(f, "  {cell:>w$}")?;
        }
        writeln!(f, "  {}", bars.trim_end())?;
    }
    Ok(())
}

impl fmt::Display for PreferenceStats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "  chosen is longer    {}", percent(&self.chosen_longer))?;
        writeln!(
            f,
            "  mean log ratio      {:+.3} (chosen is {:.2} times as long)",
            self.mean_log_length_ratio,
            self.mean_log_length_ratio.exp()
        )?;
        if let Some(m) = &self.length_model {
            writeln!(f, "  length alone        {}", model(m))?;
        }
        if let Some(r) = &self.chosen_first {
            writeln!(f, "  chosen shown first  {}", percent(r))?;
        }
        for b in &self.format {
            writeln!(
                f,
                "  {:<19} {:.1} % of chosen, {:.1} % of rejected, {:+.1} [{:+.1}, {:+.1}]",
                b.mark,
                100.0 * b.chosen,
                100.0 * b.rejected,
                100.0 * b.difference,
                100.0 * b.low,
                100.0 * b.high
            )?;
        }
        Ok(())
    }
}

impl Stats {
    /// What `items` counts.
    pub(super) fn items_name(&self) -> &'static str {
        match self.purpose {
            Purpose::Stepwise => "steps a row",
            _ => "completions a row",
        }
    }

    /// What `good` is the share of.
    pub(super) fn good_name(&self) -> &'static str {
        match self.purpose {
            Purpose::Stepwise => "right steps",
            _ => "good completions",
        }
    }
}

impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{} rows; lengths in {}:", self.rows, self.unit)?;
        let mut rows: Vec<(String, &Summary)> = self
            .lengths
            .iter()
            .map(|l| (l.column.clone(), l.of(self.unit)))
            .collect();
        rows.extend(
            self.lengths
                .iter()
                .map(|l| (format!("{}, words", l.column), &l.words)),
        );
        if let Some(t) = &self.turns {
            rows.push(("turns a row".into(), t));
        }
        if let Some(n) = &self.items {
            rows.push((self.items_name().into(), n));
        }
        table(f, &rows)?;
        if let Some(r) = &self.good {
            writeln!(f, "{}: {}", self.good_name(), percent(r))?;
        }
        if let Some(p) = &self.preference {
            write!(f, "preference (95 % intervals):\n{p}")?;
        }
        if !self.scores.is_empty() {
            writeln!(f, "scores:")?;
            let rows: Vec<(String, &Summary)> = self
                .scores
                .iter()
                .map(|s| (s.column.clone(), &s.values))
                .collect();
            table(f, &rows)?;
            for s in self.scores.iter().filter(|s| s.values.not_finite > 0) {
                writeln!(
                    f,
                    "  {} values of {} are no finite numbers",
                    s.values.not_finite, s.column
                )?;
            }
        }
        if let Some(a) = &self.agreement {
            writeln!(
                f,
                "agreement: {} annotators, {} items with at least two",
                a.annotators, a.items
            )?;
            if let Some(k) = a.cohen {
                writeln!(f, "  Cohen's kappa   {k:.3} over {} items", a.cohen_items)?;
            }
            if let Some(k) = a.fleiss {
                writeln!(
                    f,
                    "  Fleiss' kappa   {k:.3} over {} items of {} annotators",
                    a.fleiss_items, a.fleiss_raters
                )?;
            }
        }
        Ok(())
    }
}
