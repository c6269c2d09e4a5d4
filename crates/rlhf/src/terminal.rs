//! Text for terminals: numbers a person reads, tables, harmless text.

use crate::results::{Evaluation, MEASURES};

/// 1234567 as `1.2M`.
#[must_use]
pub fn count(n: f64) -> String {
    match n {
        n if n >= 1e9 => format!("{:.1}G", n / 1e9),
        n if n >= 1e6 => format!("{:.1}M", n / 1e6),
        n if n >= 1e4 => format!("{:.0}k", n / 1e3),
        n => format!("{n:.0}"),
    }
}

/// Bytes in binary units.
#[must_use]
pub fn bytes(n: u64) -> String {
    let n = n as f64;
    if n >= 1024f64.powi(3) {
        format!("{:.1} GiB", n / 1024f64.powi(3))
    } else {
        format!("{:.0} MiB", n / 1024f64.powi(2))
    }
}

/// Seconds as `12.3 s` or `3 min 05 s`.
#[must_use]
pub fn seconds(s: f64) -> String {
    if s < 60.0 {
        format!("{s:.1} s")
    } else {
        format!(
            "{:.0} min {:02.0} s",
            (s / 60.0).floor(),
            (s % 60.0).floor()
        )
    }
}

/// Makes characters visible that would steer a terminal or turn text around.
#[must_use]
pub fn escape(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) {
            out.extend(c.escape_unicode())
        } else {
            out.push(c)
        }
    }
    out
}

/// Rows of cells as aligned columns, two blanks between.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |c: usize| {
        rows.iter()
            .filter_map(|r| r.get(c))
            .map(|x| x.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    rows.iter()
        .map(|row| {
            let cells: Vec<String> = row
                .iter()
                .zip(&widths)
                .map(|(x, w)| format!("{x:<w$}"))
                .collect();
            cells.join("  ").trim_end().to_owned()
        })
        .collect::<Vec<_>>()
        .join("\n")
}

/// An evaluation as a table with its checks.
#[must_use]
pub fn evaluation(e: &Evaluation) -> String {
    let shown: Vec<_> = MEASURES
        .iter()
        .filter(|m| e.models.iter().any(|r| r.measures.contains_key(m.key)))
        .collect();
    let mut rows = vec![
        std::iter::once(String::new())
            .chain(shown.iter().map(|m| m.heading.to_owned()))
            .collect::<Vec<_>>(),
    ];
    for r in &e.models {
        let mut row = vec![r.name.clone()];
        for m in &shown {
            row.push(match r.measures.get(m.key) {
                Some(i) if m.percent => {
                    format!("{:.1}% ±{:.1}", 100.0 * i.value, 50.0 * (i.high - i.low))
                }
                Some(i) => format!("{:.3} ±{:.3}", i.value, 0.5 * (i.high - i.low)),
                None => "–".into(),
            });
        }
        rows.push(row);
    }
    let mut out = table(&rows);
    if let Some(a) = &e.reward_model_accuracy {
        out += &format!(
            "\n\nreward model: {:.1}% ±{:.1} of {} held-out pairs right",
            100.0 * a.value,
            50.0 * (a.high - a.low),
            a.n
        );
    }
    for c in &e.checks {
        out += &format!(
            "\n{} {}: {}",
            if c.ok { "ok  " } else { "FAIL" },
            c.what,
            c.found
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_tables() {
        assert_eq!(
            (count(950.0), count(12_345.0), count(1.26e6)),
            ("950".into(), "12k".into(), "1.3M".into())
        );
        assert_eq!(
            (seconds(5.25), seconds(185.0)),
            ("5.2 s".into(), "3 min 05 s".into())
        );
        let t = table(&[
            vec!["a".into(), "bb".into()],
            vec!["ccc".into(), "d".into()],
        ]);
        assert_eq!(t, "a    bb\nccc  d");
        assert_eq!(escape("a\u{1b}[31m\u{202e}"), "a\\u{1b}[31m\\u{202e}");
    }
}
