//! Statistics of whole files: planted biases are recovered, nothing is ever NaN.

use std::path::{Path, PathBuf};

use proptest::prelude::*;
use rlhf_data::check::Purpose;
use rlhf_data::seed::{Purpose as Use, Stream};
use rlhf_data::stats::{LengthModel, Stats, stats};
use rlhf_data::tokenize::ChatTokenizer;
use serde_json::{Value, json};

fn of(rows: &[Value], purpose: Purpose) -> Stats {
    let dir = tempfile::tempdir().unwrap();
    stats(&write(dir.path(), rows), purpose, None).unwrap()
}

fn write(dir: &Path, rows: &[Value]) -> PathBuf {
    let path = dir.join("a.jsonl");
    let lines: Vec<String> = rows.iter().map(|r| format!("{r}\n")).collect();
    std::fs::write(&path, lines.concat()).unwrap();
    path
}

/// No number is missing because it was NaN or infinite: each `null` is one that may be.
fn sound(s: &Stats) {
    fn walk(v: &Value, at: &str) {
        match v {
            Value::Null => assert!(
                [
                    "tokens",
                    "turns",
                    "items",
                    "good",
                    "preference",
                    "agreement",
                    "length_model",
                    "chosen_first"
                ]
                .contains(&at)
                    || ["standard_error", "cohen", "fleiss"].contains(&at),
                "{at} is null"
            ),
            Value::Array(l) => l.iter().for_each(|v| walk(v, at)),
            Value::Object(m) => m.iter().for_each(|(k, v)| walk(v, k)),
            _ => {}
        }
    }
    walk(&serde_json::to_value(s).unwrap(), "");
    for text in [s.to_string(), s.html()] {
        for bad in ["NaN", "inf"] {
            assert!(!text.contains(bad), "{bad}: {text}");
        }
    }
}

#[test]
fn empty_one_row_and_constant_files() {
    let pair =
        json!({"prompt": "p", "chosen": "c", "rejected": "r", "annotator": "x", "margin": 1});
    let sft = json!({"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "x"}]});
    for n in [0, 1, 5] {
        sound(&of(&vec![pair.clone(); n], Purpose::Preference));
        sound(&of(&vec![sft.clone(); n], Purpose::Sft));
        sound(&of(&vec![json!({"prompt": "p"}); n], Purpose::Prompts));
    }
    let s = of(&[sft], Purpose::Sft);
    assert_eq!(s.turns.unwrap().mean, 2.0);
    let columns: Vec<&str> = s.lengths.iter().map(|l| l.column.as_str()).collect();
    assert_eq!(columns, ["completion", "turn"]);
    assert_eq!(s.lengths[1].characters.n, 2);
    let hard = json!({"prompt": "p", "chosen": "c", "rejected": "r", "scores": ["NaN", 1e300, -1e300, "x"], "rating": "inf"});
    let s = of(&[hard], Purpose::Preference);
    sound(&s);
    let scores: Vec<_> = s
        .scores
        .iter()
        .map(|s| (s.column.as_str(), s.values.n, s.values.not_finite))
        .collect();
    assert_eq!(scores, [("scores", 0, 3), ("rating", 0, 1)]);
    let dir = tempfile::tempdir().unwrap();
    let path = write(
        dir.path(),
        &[json!({"prompt": "p", "chosen": 3, "rejected": "r"})],
    );
    let e = stats(&path, Purpose::Preference, None).unwrap_err();
    assert!(
        e.is_input() && e.to_string().contains("line 1, column `chosen`"),
        "{e}"
    );
}

#[test]
fn a_planted_length_bias_is_recovered() {
    // P(chosen ≻ rejected) = σ(w·(log len_a − log len_b)) with w = 1.5.
    let draw = Stream::new(3, Use::Noise);
    let mut exact: Vec<(f64, u64)> = Vec::new();
    let rows: Vec<Value> = (0..4000)
        .map(|i| {
            let length = |k: u32| (20.0 * (1.2 * draw.uniform(i, k, 0)).exp()).round() as usize;
            let (a, b) = (length(0), length(1));
            let x = (a as f64).ln() - (b as f64).ln();
            let p = 1.0 / (1.0 + (-1.5 * x).exp());
            let (c, r) = if draw.uniform(i, 2, 0) < p { (a, b) } else { (b, a) };
            exact.push(((c as f64).ln() - (r as f64).ln(), 1));
            let mut chosen = "c".repeat(c);
            // A mark of form in 3 of 10 chosen and 1 of 10 rejected ones; the first is shown first in 6 of 10.
            chosen.replace_range(c - 1.., if i % 10 < 3 { "!" } else { "." });
            let mut rejected = "r".repeat(r);
            rejected.replace_range(r - 1.., if i % 10 == 9 { "!" } else { "." });
            json!({"prompt": "p", "chosen": chosen, "rejected": rejected,
                "position": if i % 10 < 6 { "a" } else { "b" }, "score_chosen": (i % 5) as f64 / 2.0})
        })
        .collect();
    let s = of(&rows, Purpose::Preference);
    sound(&s);
    let p = s.preference.as_ref().unwrap();
    let m = p.length_model.unwrap();
    let se = m.standard_error.unwrap();
    assert!((m.weight - 1.5).abs() < 3.0 * se && se < 0.1, "{m:?}");
    assert!(
        m.pseudo_r2 > 0.03 && m.pseudo_r2 < 0.2 && m.accuracy > 0.6,
        "{m:?}"
    );
    assert_eq!(m.accuracy, p.chosen_longer.share);
    // An independent fit: bisection of the score equation on the exact differences.
    let score = |w: f64| -> f64 { exact.iter().map(|(x, _)| x / (1.0 + (w * x).exp())).sum() };
    let (mut low, mut high) = (0.0, 10.0);
    for _ in 0..100 {
        let middle = f64::midpoint(low, high);
        if score(middle) > 0.0 {
            low = middle
        } else {
            high = middle
        }
    }
    assert!((m.weight - low).abs() < 1e-4, "{} {low}", m.weight);
    // Fisher's information at the optimum.
    let information: f64 = exact
        .iter()
        .map(|(x, _)| {
            let q = 1.0 / (1.0 + (-low * x).exp());
            x * x * q * (1.0 - q)
        })
        .sum();
    assert!((se - 1.0 / information.sqrt()).abs() < 1e-4);
    let first = p.chosen_first.unwrap();
    assert!((first.share - 0.6).abs() < 1e-12 && first.low < 0.6 && first.high > 0.6);
    let marks: Vec<_> = p.format.iter().map(|f| f.mark).collect();
    assert_eq!(marks, ["exclamation"]);
    let f = &p.format[0];
    assert!(
        (f.difference - 0.2).abs() < 1e-12 && f.low > 0.17 && f.high < 0.23,
        "{f:?}"
    );
    let scores = &s.scores[0];
    assert_eq!(
        (scores.column.as_str(), scores.values.max),
        ("score_chosen", 2.0)
    );
    assert!((scores.values.mean - 1.0).abs() < 1e-12);
}

#[test]
fn annotators_of_pairs_agree_whatever_side_was_chosen() {
    let row = |who: &str, item: usize, first: bool| {
        let (a, b) = (format!("a{item}"), format!("b{item}"));
        let (c, r) = if first { (a, b) } else { (b, a) };
        json!({"prompt": "p", "chosen": c, "rejected": r, "annotator": who})
    };
    // The judgements of the unit test: κ = 0.5.
    let rows: Vec<Value> = [(true, true), (true, true), (false, false), (false, true)]
        .iter()
        .enumerate()
        .flat_map(|(i, (a, b))| [row("anna", i, *a), row("ben", i, *b)])
        .collect();
    let s = of(&rows, Purpose::Preference);
    let a = s.agreement.as_ref().unwrap();
    assert_eq!((a.annotators, a.items), (2, 4));
    assert!((a.cohen.unwrap() - 0.5).abs() < 1e-12);
    assert!(
        s.to_string().contains("Cohen's kappa   0.500 over 4 items"),
        "{s}"
    );
    // The same with items and labels by name.
    let rows: Vec<Value> = [("y", "y"), ("y", "y"), ("n", "n"), ("n", "y")]
        .iter()
        .enumerate()
        .flat_map(|(i, (a, b))| {
            [("anna", a), ("ben", b)].map(|(who, label)| {
                json!({"prompt": format!("{who} {i}"), "item": i, "annotator": who, "label": label})
            })
        })
        .collect();
    let a = of(&rows, Purpose::Prompts).agreement.unwrap();
    assert!((a.cohen.unwrap() - 0.5).abs() < 1e-12);
    assert_eq!(a.labels, ["n", "y"]);
}

#[test]
fn text_and_html_are_harmless_and_whole() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer");
    let t = ChatTokenizer::load(&dir).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let rows: Vec<Value> = (0..30)
        .map(|i| json!({"prompt": "<script>\u{1b}[2J", "chosen": "word ".repeat(i + 1), "rejected": "x", "annotator": format!("<{}>", i % 2), "item": i / 2, "label": "<b>\u{1b}"}))
        .collect();
    let s = stats(&write(folder.path(), &rows), Purpose::Preference, Some(&t)).unwrap();
    sound(&s);
    assert_eq!(s.unit, "tokens");
    let chosen = &s.lengths[1];
    assert_eq!(
        (chosen.words.min, chosen.words.median, chosen.words.max),
        (1.0, 16.0, 30.0)
    );
    assert!(chosen.tokens.as_ref().unwrap().max >= 30.0);
    let html = s.html();
    assert!(html.starts_with("<section") && html.ends_with("</section>"));
    assert!(html.contains("&lt;b&gt;") && !html.contains("<b>") && !html.contains('\u{1b}'));
    assert!(html.contains("prefers-color-scheme:dark") && html.contains("<rect class=\"bar\""));
    for tag in [
        "section", "table", "tr", "td", "th", "svg", "figure", "div", "h3", "title",
    ] {
        let (open, close) = (
            html.matches(&format!("<{tag}>")).count() + html.matches(&format!("<{tag} ")).count(),
            html.matches(&format!("</{tag}>")).count(),
        );
        assert_eq!(open, close, "{tag}");
    }
    let text = s.to_string();
    assert!(!text.contains('\u{1b}') && text.contains("█"), "{text}");
    assert!(text.contains("w = 50, without bound"), "{text}");
}

proptest! {
    #[test]
    fn the_fit_is_finite_symmetric_and_a_maximum(
        data in prop::collection::vec((-8.0f64..8.0, 0u64..5), 0..40)
    ) {
        let Some(m) = LengthModel::fit(&data) else {
            prop_assert_eq!(data.iter().map(|(_, n)| n).sum::<u64>(), 0);
            return Ok(());
        };
        prop_assert!(m.weight.is_finite() && m.weight.abs() <= 50.0);
        prop_assert!((0.0..=1.0).contains(&m.pseudo_r2) && (0.0..=1.0).contains(&m.accuracy));
        let mirrored: Vec<(f64, u64)> = data.iter().map(|(x, n)| (-x, *n)).collect();
        let r = LengthModel::fit(&mirrored).unwrap();
        prop_assert!((r.weight + m.weight).abs() < 1e-6, "{} {}", m.weight, r.weight);
        let ll = |w: f64| -> f64 {
            data.iter().map(|(x, n)| -(*n as f64) * (-w * x).exp().ln_1p()).sum::<f64>()
                - 0.5e-6 * w * w
        };
        if !m.separated {
            for d in [-0.01, 0.01] {
                prop_assert!(ll(m.weight + d) <= ll(m.weight) + 1e-9);
            }
        }
    }
}

#[test]
fn rankings_thumbs_steps_and_ratings() {
    let s = of(
        &[
            json!({"prompt": "p", "completions": ["aaaa", "a", "aa"], "scores": [3, 1, 2]}),
            json!({"prompt": "p", "completions": ["a", "aaa"], "scores": [2, 2]}),
            json!({"prompt": "p", "completions": ["aa", "a"]}),
        ],
        Purpose::Ranked,
    );
    sound(&s);
    let items = s.items.as_ref().unwrap();
    assert_eq!((items.n, items.min, items.max), (3, 2.0, 3.0));
    // The best against each worse one: 2 pairs, none, 1.
    let p = s.preference.as_ref().unwrap();
    assert_eq!((p.chosen_longer.n, p.chosen_longer.share), (3, 1.0));
    assert!((p.mean_log_length_ratio - (4f64.ln() + 2f64.ln() + 2f64.ln()) / 3.0).abs() < 1e-12);
    let thumb = |completion: &str, label: bool, who: &str| json!({"prompt": "p", "completion": completion, "label": label, "annotator": who});
    let s = of(
        &[
            thumb("a", true, "anna"),
            thumb("a", true, "ben"),
            thumb("bb", false, "anna"),
            thumb("bb", true, "ben"),
        ],
        Purpose::Unpaired,
    );
    sound(&s);
    let good = s.good.as_ref().unwrap();
    assert_eq!((good.share, good.n), (0.75, 4));
    let columns: Vec<&str> = s.lengths.iter().map(|l| l.column.as_str()).collect();
    assert_eq!(columns, ["prompt", "completion, good", "completion, bad"]);
    // They agree on one of two: p_o = ½ = p_e.
    assert_eq!(s.agreement.as_ref().unwrap().cohen, Some(0.0));
    assert!(s.to_string().contains("good completions: 75.0 %"), "{s}");
    let s = of(
        &[
            json!({"prompt": "p", "completions": ["one", "two", "three"], "labels": [true, true, false]}),
        ],
        Purpose::Stepwise,
    );
    sound(&s);
    assert!(s.to_string().contains("right steps: 66.7 %"), "{s}");
    assert!(s.html().contains("steps a row"));
    let s = of(
        &[
            json!({"prompt": "p", "completion": "c", "ratings": {"help": 1, "style": 4}}),
            // As Parquet holds it.
            json!({"prompt": "p", "completion": "c", "ratings": "{\"help\": 3}"}),
        ],
        Purpose::Rated,
    );
    sound(&s);
    let scores: Vec<_> = s
        .scores
        .iter()
        .map(|s| (s.column.as_str(), s.values.n, s.values.mean))
        .collect();
    assert_eq!(
        scores,
        [("ratings.help", 2, 2.0), ("ratings.style", 1, 4.0)]
    );
}
