//! Marks of form in completions: how often in the chosen one and in the rejected one.

use serde::Serialize;

use crate::rate::Z;

/// A mark's name and its test.
type Mark = (&'static str, fn(&str) -> bool);

/// Marks of form.
const MARKS: [Mark; 8] = [
    ("list", has_list),
    ("heading", has_heading),
    ("bold", has_bold),
    ("code block", |t| t.contains("```")),
    ("question at the end", |t| t.trim_end().ends_with('?')),
    ("exclamation", |t| t.contains('!')),
    ("refusal", has_refusal),
    ("apology", |t| {
        let t = t.to_lowercase();
        ["sorry", "apolog"].iter().any(|p| t.contains(p))
    }),
];

/// Phrases with which assistants refuse, in lower case with a straight apostrophe.
const REFUSALS: [&str; 14] = [
    "i cannot",
    "i can't",
    "i am unable",
    "i'm unable",
    "i am not able to",
    "i'm not able to",
    "i won't",
    "i will not",
    "as an ai",
    "as a language model",
    "i must decline",
    "i'm sorry, but",
    "i am sorry, but",
    "against my guidelines",
];

fn has_list(text: &str) -> bool {
    text.lines().any(|line| {
        let line = line.trim_start();
        let number = line.trim_start_matches(|c: char| c.is_ascii_digit());
        ["- ", "* ", "+ ", "• "].iter().any(|m| line.starts_with(m))
            || (number.len() < line.len() && (number.starts_with(". ") || number.starts_with(") ")))
    })
}

fn has_heading(text: &str) -> bool {
    text.lines().any(|line| {
        let rest = line.trim_start_matches('#');
        let level = line.len() - rest.len();
        (1..=6).contains(&level) && rest.starts_with(' ')
    })
}

fn has_bold(text: &str) -> bool {
    ["**", "__"].iter().any(|m| {
        text.split_once(m)
            .and_then(|(_, rest)| rest.split_once(m))
            .is_some_and(|(inside, _)| !inside.trim().is_empty() && !inside.contains('\n'))
    })
}

fn has_refusal(text: &str) -> bool {
    let text = text.to_lowercase().replace('’', "'");
    REFUSALS.iter().any(|p| text.contains(p))
}

/// How often a mark stands in the chosen and in the rejected completion of the same pair.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct FormatBias {
    /// The mark.
    pub mark: &'static str,
    /// Share of chosen completions with it.
    pub chosen: f64,
    /// Share of rejected completions with it.
    pub rejected: f64,
    /// Pairs with it in the chosen completion only.
    pub only_chosen: u64,
    /// Pairs with it in the rejected completion only.
    pub only_rejected: u64,
    /// `chosen − rejected`.
    pub difference: f64,
    /// Lower end of the difference's 95 % interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// Paired counts of the marks.
#[derive(Debug, Default)]
pub(super) struct Format {
    n: u64,
    /// Both, only chosen, only rejected.
    counts: [[u64; 3]; MARKS.len()],
}

impl Format {
    pub(super) fn add(&mut self, chosen: &str, rejected: &str) {
        self.n += 1;
        for (count, (_, has)) in self.counts.iter_mut().zip(MARKS) {
            match (has(chosen), has(rejected)) {
                (true, true) => count[0] += 1,
                (true, false) => count[1] += 1,
                (false, true) => count[2] += 1,
                (false, false) => {}
            }
        }
    }

    /// The marks that occur at all. Of n pairs b have the mark in the chosen one only (those that
    /// McNemar 1947 counts) and c in the rejected one only: d = (b − c)/n. The interval is that of
    /// Agresti and Min 2005, "Simple improved confidence intervals for comparing matched proportions":
    /// Wald's with half a pair more in each of the four cells.
    pub(super) fn biases(&self) -> Vec<FormatBias> {
        let n = self.n as f64;
        let of = |(mark, _): Mark, [both, b, c]: [u64; 3]| {
            let m = n + 2.0;
            let (only, other) = (b as f64 + 0.5, c as f64 + 0.5);
            let middle = (only - other) / m;
            let half = Z * (only + other - (only - other).powi(2) / m).max(0.0).sqrt() / m;
            let difference = (b as f64 - c as f64) / n;
            FormatBias {
                mark,
                chosen: (both + b) as f64 / n,
                rejected: (both + c) as f64 / n,
                only_chosen: b,
                only_rejected: c,
                difference,
                low: (middle - half).clamp(-1.0, difference),
                high: (middle + half).clamp(difference, 1.0),
            }
        };
        MARKS
            .into_iter()
            .zip(self.counts)
            .filter(|(_, c)| c.iter().sum::<u64>() > 0)
            .map(|(m, c)| of(m, c))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn marks_are_seen_and_plain_text_has_none() {
        let marks = |t: &str| -> Vec<&str> {
            MARKS
                .iter()
                .filter(|(_, has)| has(t))
                .map(|(m, _)| *m)
                .collect()
        };
        assert_eq!(
            marks("Plain text - with a dash, 3.5 and #1, 2 * 3 ** x"),
            [""; 0]
        );
        assert_eq!(marks("a\n  - b"), ["list"]);
        assert_eq!(marks("12. b"), ["list"]);
        assert_eq!(marks("## A\nb"), ["heading"]);
        assert_eq!(marks("a **b** c"), ["bold"]);
        assert_eq!(marks("```\nx\n```"), ["code block"]);
        assert_eq!(marks("Really?\n"), ["question at the end"]);
        assert_eq!(marks("I can’t do it!"), ["exclamation", "refusal"]);
        assert_eq!(marks("My apologies."), ["apology"]);
    }

    #[test]
    fn the_interval_by_hand() {
        let mut f = Format::default();
        (0..30).for_each(|_| f.add("a!", "a"));
        (0..10).for_each(|_| f.add("a", "a!"));
        (0..60).for_each(|_| f.add("a", "a"));
        let b = &f.biases()[0];
        assert_eq!(
            (b.mark, b.chosen, b.rejected, b.difference),
            ("exclamation", 0.3, 0.1, 0.2)
        );
        // (30.5 − 10.5)/102 = 0.19608; √(41 − 400/102)/102 = 0.059699.
        assert!((b.low - (0.196_078 - Z * 0.059_699)).abs() < 1e-5, "{b:?}");
        assert!((b.high - (0.196_078 + Z * 0.059_699)).abs() < 1e-5, "{b:?}");
        assert!(Format::default().biases().is_empty());
    }
}
