//! Small parts of the page: harmless text, numbers, figures, legends.

use std::fmt::Write as _;

use super::plot::COLOURS;
use crate::terminal;

/// Text as HTML; characters that steer are made visible.
pub(crate) fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 8);
    for c in terminal::escape(text).chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\'' => out.push_str("&#39;"),
            c => out.push(c),
        }
    }
    out
}

/// A number with three or four significant digits.
pub(crate) fn number(x: f64) -> String {
    let a = x.abs();
    let text = match x {
        _ if x.is_nan() => return "–".into(),
        _ if x.is_infinite() => {
            return if x > 0.0 {
                "∞".into()
            } else {
                "−∞".into()
            };
        }
        _ if x == 0.0 => "0".into(),
        _ if a < 5e-4 => format!("{x:.1e}"),
        _ if a < 1.0 => format!("{x:.3}"),
        _ if a < 10.0 => format!("{x:.2}"),
        _ if a < 1000.0 => format!("{x:.1}"),
        _ if a < 1e5 => format!("{x:.0}"),
        _ => format!("{x:.2e}"),
    };
    text.replace('-', "−")
}

/// A share in percent.
pub(crate) fn percent(x: f64) -> String {
    if x.is_finite() {
        format!("{:.1} %", 100.0 * x).replace('-', "−")
    } else {
        "–".into()
    }
}

/// Names joined as in a sentence: `a, b and c`.
pub(crate) fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [one] => one.clone(),
        [most @ .., last] => format!("{} and {last}", most.join(", ")),
    }
}

/// Which colour stands for which model or stage, on the whole page. The baseline is grey.
#[derive(Clone, Debug, Default)]
pub(crate) struct Palette(Vec<String>);

impl Palette {
    /// Colours in the order of `names`; the first is the baseline's.
    pub(crate) fn new(names: impl IntoIterator<Item = String>) -> Self {
        let mut seen = Vec::new();
        for name in names {
            if !seen.contains(&name) {
                seen.push(name);
            }
        }
        Self(seen)
    }

    /// The number of a name's colour.
    pub(crate) fn of(&self, name: &str) -> usize {
        let at = self
            .0
            .iter()
            .position(|n| n == name)
            .unwrap_or(self.0.len());
        if at == 0 {
            0
        } else {
            1 + (at - 1) % (COLOURS - 1)
        }
    }

    /// A dot in the name's colour, then the name.
    pub(crate) fn key(&self, name: &str) -> String {
        key(self.of(name), name)
    }
}

/// A dot in a colour, then a name.
pub(crate) fn key(colour: usize, name: &str) -> String {
    format!(
        "<span class=\"key\"><i style=\"background:var(--c{colour})\"></i>{}</span>",
        escape(name)
    )
}

/// A plot with its heading and, if any, legend and note (already HTML).
pub(crate) fn figure(
    heading: &str,
    legend: &[String],
    svg: &str,
    note: &str,
    out: &mut String,
) -> std::fmt::Result {
    write!(out, "<figure><figcaption><b>{}</b>", escape(heading))?;
    if !legend.is_empty() {
        write!(out, "<span class=\"legend\">{}</span>", legend.concat())?;
    }
    if !note.is_empty() {
        write!(out, "<small>{note}</small>")?;
    }
    writeln!(out, "</figcaption>{svg}</figure>")
}

/// A table: headings (HTML), rows of cells (HTML); the first column holds names and stays in view.
pub(crate) fn table(
    headings: &[String],
    rows: &[Vec<String>],
    out: &mut String,
) -> std::fmt::Result {
    write!(out, "<div class=\"wide\"><table><thead><tr>")?;
    for h in headings {
        write!(out, "<th scope=\"col\">{h}</th>")?;
    }
    writeln!(out, "</tr></thead><tbody>")?;
    for row in rows {
        write!(out, "<tr>")?;
        for (i, cell) in row.iter().enumerate() {
            if i == 0 {
                write!(out, "<th scope=\"row\">{cell}</th>")?
            } else {
                write!(out, "<td>{cell}</td>")?
            }
        }
        writeln!(out, "</tr>")?;
    }
    writeln!(out, "</tbody></table></div>")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_harmless() {
        assert_eq!(
            escape("<a href='x'>\"&\u{1b}\u{202e}"),
            "&lt;a href=&#39;x&#39;&gt;&quot;&amp;\\u{1b}\\u{202e}"
        );
    }

    #[test]
    fn numbers_are_short() {
        let shown: Vec<String> = [
            0.0,
            -0.25,
            1.234_5,
            12.34,
            123.4,
            12_345.6,
            1e-5,
            3e7,
            f64::NAN,
            f64::NEG_INFINITY,
        ]
        .map(number)
        .into();
        assert_eq!(
            shown,
            [
                "0", "−0.250", "1.23", "12.3", "123.4", "12346", "1.0e−5", "3.00e7", "–", "−∞"
            ]
        );
        assert_eq!(
            (percent(0.1234), percent(f64::NAN)),
            ("12.3 %".into(), "–".into())
        );
        assert_eq!(listed(&["a".into(), "b".into(), "c".into()]), "a, b and c");
    }

    #[test]
    fn colours_repeat_but_grey_is_the_baseline_s_alone() {
        let palette = Palette::new((0..20).map(|i| i.to_string()));
        assert_eq!(
            (
                palette.of("0"),
                palette.of("1"),
                palette.of("6"),
                palette.of("7")
            ),
            (0, 1, 6, 1)
        );
        assert!((1..20).all(|i| palette.of(&i.to_string()) != 0) && palette.of("new") != 0);
    }
}
