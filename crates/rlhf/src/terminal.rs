//! Text for terminals: numbers a person reads, tables, harmless text.

use crate::results::{Evaluation, MEASURES};

/// 1234567 as `1.2M`.
#[must_use]
pub fn count(n: f64) -> String {
    match n {
        n if n >= 999.95e6 => format!("{:.1}G", n / 1e9),
        n if n >= 999.5e3 => format!("{:.1}M", n / 1e6),
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

/// Seconds as `12.3 s`, `3 min 05 s` or `2 h 03 min`.
#[must_use]
pub fn seconds(s: f64) -> String {
    let whole = s.round();
    match s {
        _ if s < 59.95 => format!("{s:.1} s"),
        _ if whole < 3600.0 => format!("{:.0} min {:02.0} s", (whole / 60.0).floor(), whole % 60.0),
        _ => {
            let minutes = (s / 60.0).round();
            format!(
                "{:.0} h {:02.0} min",
                (minutes / 60.0).floor(),
                minutes % 60.0
            )
        }
    }
}

/// Makes characters visible that would steer a terminal, turn text around or hide in it.
#[must_use]
pub fn escape(text: &str) -> String {
    let steers = |c: char| {
        (c.is_control() && c != '\n' && c != '\t')
            || matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}')
            || matches!(c, '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e007f}')
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

/// Columns that a text takes on a terminal: most East Asian characters and pictures take two, marks
/// that join the character before none.
#[must_use]
pub fn width(text: &str) -> usize {
    let of = |c: char| match c {
        '\u{300}'..='\u{36f}'
        | '\u{200b}'..='\u{200f}'
        | '\u{20d0}'..='\u{20ff}'
        | '\u{fe00}'..='\u{fe0f}' => 0,
        '\u{1100}'..='\u{115f}'
        | '\u{2e80}'..='\u{303e}'
        | '\u{3041}'..='\u{a4cf}'
        | '\u{ac00}'..='\u{d7a3}' => 2,
        '\u{f900}'..='\u{faff}'
        | '\u{fe30}'..='\u{fe6f}'
        | '\u{ff00}'..='\u{ff60}'
        | '\u{ffe0}'..='\u{ffe6}' => 2,
        '\u{1f300}'..='\u{1f64f}'
        | '\u{1f680}'..='\u{1f6ff}'
        | '\u{1f900}'..='\u{1faff}'
        | '\u{20000}'..='\u{3fffd}' => 2,
        _ => 1,
    };
    text.chars().map(of).sum()
}

/// Rows of cells as aligned columns, two blanks between. Columns of numbers are aligned right, their
/// heading (the first row) with them.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cells = |c: usize| rows.iter().filter_map(move |r| r.get(c));
    let widths: Vec<usize> = (0..columns)
        .map(|c| cells(c).map(|x| width(x)).max().unwrap_or(0))
        .collect();
    let numeric = |x: &String| {
        x.is_empty()
            || x == "–"
            || x.starts_with(|c: char| c.is_ascii_digit() || "-−+±".contains(c))
    };
    let right: Vec<bool> = (0..columns)
        .map(|c| cells(c).count() > 1 && cells(c).skip(1).all(numeric))
        .collect();
    let line = |row: &Vec<String>| {
        let mut out = String::new();
        for (c, x) in row.iter().enumerate() {
            let blanks = " ".repeat(widths[c] - width(x));
            let pad = if c > 0 { "  " } else { "" };
            out += &if right[c] {
                format!("{pad}{blanks}{x}")
            } else {
                format!("{pad}{x}{blanks}")
            };
        }
        out.trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

/// An evaluation as a table with its checks: a row a measure, so that it fits a terminal.
#[must_use]
pub fn evaluation(e: &Evaluation) -> String {
    let shown = MEASURES
        .iter()
        .filter(|m| e.models.iter().any(|r| r.measures.contains_key(m.key)));
    let mut rows = vec![
        std::iter::once(String::new())
            .chain(e.models.iter().map(|r| escape(&r.name)))
            .collect::<Vec<_>>(),
    ];
    for m in shown {
        let cell = |r: &crate::results::ModelRow| match r.measures.get(m.key) {
            Some(i) if m.percent => {
                format!("{:.1}% ±{:.1}", 100.0 * i.value, 50.0 * (i.high - i.low))
            }
            Some(i) => format!("{:.3} ±{:.3}", i.value, 0.5 * (i.high - i.low)),
            None => "–".into(),
        };
        rows.push(
            std::iter::once(m.heading.to_owned())
                .chain(e.models.iter().map(cell))
                .collect(),
        );
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
            escape(&c.what),
            escape(&c.found)
        );
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::interval::Interval;
    use crate::results::{Check, ModelRow};

    fn rows(text: &[&[&str]]) -> Vec<Vec<String>> {
        text.iter()
            .map(|r| r.iter().map(|x| (*x).to_owned()).collect())
            .collect()
    }

    #[test]
    fn numbers_a_person_reads() {
        let counts = [0.0, 950.0, 12_345.0, 999_700.0, 1.26e6, 999.96e6, 3e9].map(count);
        assert_eq!(counts, ["0", "950", "12k", "1.0M", "1.3M", "1.0G", "3.0G"]);
        let times = [5.25, 59.96, 185.0, 119.7, 3599.6, 7380.0].map(seconds);
        assert_eq!(
            times,
            [
                "5.2 s",
                "1 min 00 s",
                "3 min 05 s",
                "2 min 00 s",
                "1 h 00 min",
                "2 h 03 min"
            ]
        );
        assert_eq!(
            (bytes(5 << 20), bytes(3 << 29)),
            ("5 MiB".into(), "1.5 GiB".into())
        );
    }

    #[test]
    fn tables_align_words_left_and_numbers_right() {
        assert_eq!(
            table(&rows(&[&["a", "bb"], &["ccc", "d"]])),
            "a    bb\nccc  d"
        );
        assert_eq!(
            table(&rows(&[&["", "rows"], &["x", "7"], &["longer", "–"]])),
            "        rows\nx          7\nlonger     –"
        );
        // 注文 takes four columns.
        assert_eq!(
            table(&rows(&[&["注文", "x"], &["abcd", "y"], &["e\u{301}", "z"]])),
            "注文  x\nabcd  y\ne\u{301}     z"
        );
        assert_eq!(table(&[]), "");
    }

    #[test]
    fn what_steers_or_hides_becomes_visible() {
        assert_eq!(
            escape("a\u{1b}[31m\u{202e}\r\n\t"),
            "a\\u{1b}[31m\\u{202e}\\u{d}\n\t"
        );
        assert_eq!(
            escape("\u{2066}x\u{ad}\u{e0041}"),
            "\\u{2066}x\\u{ad}\\u{e0041}"
        );
        assert_eq!(escape("Grüße, 注文"), "Grüße, 注文");
    }

    #[test]
    fn an_evaluation_has_a_column_a_model() {
        let row = |name: &str, gold: f64| ModelRow {
            name: name.into(),
            measures: [(
                "gold".to_owned(),
                Interval {
                    value: gold,
                    low: gold - 0.1,
                    high: gold + 0.1,
                    n: 4,
                },
            )]
            .into(),
        };
        let e = Evaluation {
            models: vec![row("sft", 0.5), row("grpo", 0.75)],
            checks: vec![Check {
                what: "better".into(),
                found: "yes".into(),
                ok: true,
            }],
            ..Evaluation::default()
        };
        let text = evaluation(&e);
        assert_eq!(
            text,
            "                     sft          grpo\ngold score  0.500 ±0.100  0.750 ±0.100\nok   better: yes"
        );
    }
}
