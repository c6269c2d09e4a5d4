//! Every rule of the lint that looks beyond a row: found when planted, silent on a clean file.

use std::path::{Path, PathBuf};

use rlhf_data::check::{
    CheckOptions, CheckReport, Finding, FindingsOut, Level, MAX_FINDINGS, Purpose, check,
    check_each, check_with, write_findings_parquet,
};
use rlhf_data::source;
use serde_json::{Value, json};

fn write(dir: &Path, name: &str, rows: &[Value]) -> PathBuf {
    let path = dir.join(name);
    let lines: Vec<String> = rows.iter().map(|r| format!("{r}\n")).collect();
    std::fs::write(&path, lines.concat()).unwrap();
    path
}

fn found(r: &CheckReport) -> Vec<(&str, &str, &str)> {
    r.findings
        .iter()
        .map(|f| (f.rule, f.place.as_str(), f.column.as_str()))
        .collect()
}

/// `n` words that no other `seed` has in this order.
fn prose(seed: usize, n: usize) -> String {
    let words: Vec<String> = (0..n)
        .map(|i| format!("w{}", (seed * 7919 + i * 104_729 + i * i * seed) % 9973))
        .collect();
    words.join(" ")
}

fn pair(seed: usize) -> Value {
    // The longer one is chosen in every second row.
    let (a, b) = (20 + seed % 2, 21 - seed % 2);
    json!({"prompt": prose(seed, 30), "chosen": prose(seed + 1000, a), "rejected": prose(seed + 2000, b)})
}

fn clean() -> Vec<Value> {
    (0..40).map(pair).collect()
}

#[test]
fn a_clean_file_has_no_findings() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", &clean());
    let other: Vec<Value> = (100..140).map(pair).collect();
    let other = write(dir.path(), "b.jsonl", &other);
    let options = CheckOptions {
        against: vec![other.clone()],
        eval: vec![other],
        ..CheckOptions::default()
    };
    let r = check_with(&path, Purpose::Preference, &options);
    assert_eq!((found(&r), r.rows, r.failed), (vec![], 40, false));
}

#[test]
fn near_duplicates_name_the_earlier_row() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = clean();
    // One word of 50 differs: 5 of 46 shingles, Jaccard 41 / 51 = 0.80; the last word: 45 / 47.
    let mut like = rows[7].clone();
    like["chosen"] = format!("{} other", like["chosen"].as_str().unwrap()).into();
    rows.push(like);
    // Half the text: far from it.
    let mut unlike = rows[3].clone();
    unlike["chosen"] = prose(77_777, 60).into();
    rows.push(unlike);
    rows.push(rows[5].clone());
    let path = write(dir.path(), "a.jsonl", &rows);
    let r = check(&path, Purpose::Preference, None);
    assert_eq!(
        found(&r),
        [
            ("near_duplicate", "line 41", ""),
            ("duplicate", "line 43", "")
        ]
    );
    assert!(r.findings[0].what.contains("line 8"), "{:?}", r.findings[0]);
    assert!(!r.failed);
    let options = CheckOptions {
        near_duplicate: None,
        ..CheckOptions::default()
    };
    let r = check_with(&path, Purpose::Preference, &options);
    assert_eq!(found(&r), [("duplicate", "line 43", "")]);
}

#[test]
fn a_prompt_of_another_split_is_a_leak() {
    let dir = tempfile::tempdir().unwrap();
    let path = write(dir.path(), "a.jsonl", &clean());
    // The same prompt in other words' case and spacing, in another kind of file.
    let prompt = pair(9)["prompt"].as_str().unwrap().to_uppercase();
    let turns = json!([{"role": "user", "content": format!("  {} ", prompt.replace(' ', "\n "))},
        {"role": "assistant", "content": "yes"}]);
    let test = write(
        dir.path(),
        "test.jsonl",
        &[
            json!({"messages": [{"role": "user", "content": "else"}, {"role": "assistant", "content": "x"}]}),
            json!({"messages": turns}),
        ],
    );
    let options = CheckOptions {
        against: vec![test.clone()],
        ..CheckOptions::default()
    };
    let r = check_with(&path, Purpose::Preference, &options);
    assert_eq!(found(&r), [("leak", "line 10", "prompt")]);
    assert!(
        r.failed && r.findings[0].what.ends_with(".jsonl, line 2"),
        "{:?}",
        r.findings
    );
    // What cannot be read is an error, never silence.
    for (name, text) in [("broken.jsonl", "{"), ("empty.jsonl", "{\"id\": 3}\n")] {
        let bad = dir.path().join(name);
        std::fs::write(&bad, text).unwrap();
        for options in [
            CheckOptions {
                against: vec![bad.clone()],
                ..CheckOptions::default()
            },
            CheckOptions {
                eval: vec![bad.clone()],
                ..CheckOptions::default()
            },
        ] {
            let r = check_with(&path, Purpose::Preference, &options);
            assert_eq!(r.counts["unreadable"], 1);
            assert!(r.failed && r.rows == 40);
            assert!(r.findings[0].what.contains(name), "{:?}", r.findings);
        }
    }
}

#[test]
fn words_of_an_evaluation_set_are_contamination() {
    let dir = tempfile::tempdir().unwrap();
    let long = prose(500_000, 40);
    let short = prose(600_000, 9);
    let tiny = prose(700_000, 7);
    let eval = write(
        dir.path(),
        "eval.jsonl",
        &[
            json!({"question": long, "answer": short}),
            json!({"question": tiny, "answer": "B"}),
        ],
    );
    let words: Vec<&str> = long.split(' ').collect();
    let with = |text: &str| {
        let mut row = pair(50);
        row["rejected"] = format!("{} {text} {}", prose(1, 9), prose(2, 9)).into();
        row
    };
    let mut rows = clean();
    rows.push(with(&words[5..18].join(" ").to_uppercase()));
    rows.push(with(&words[5..17].join(" ")));
    rows.push(with(&short));
    rows.push(with(&tiny));
    let path = write(dir.path(), "a.jsonl", &rows);
    let options = CheckOptions {
        eval: vec![eval],
        near_duplicate: None,
        ..CheckOptions::default()
    };
    let r = check_with(&path, Purpose::Preference, &options);
    assert_eq!(
        found(&r),
        [
            ("contamination", "line 41", ""),
            ("contamination", "line 43", "")
        ]
    );
    assert!(!r.failed);
    let what = &r.findings[0].what;
    assert!(what.contains("13 words as in /"), "{what}");
    assert!(
        r.findings[1].what.contains("8 words as in /"),
        "{:?}",
        r.findings
    );
    let options = CheckOptions {
        ngram: 12,
        ..options
    };
    let r = check_with(&path, Purpose::Preference, &options);
    assert_eq!(r.counts["contamination"], 3);
}

#[test]
fn what_many_evaluation_rows_share_is_no_contamination() {
    let dir = tempfile::tempdir().unwrap();
    let boilerplate = prose(500_000, 20);
    let mut row = pair(50);
    row["chosen"] = boilerplate.clone().into();
    let path = write(dir.path(), "a.jsonl", &[row]);
    for (n, wanted) in [(10, 1), (11, 0)] {
        // Twice in a row counts once.
        let eval: Vec<Value> = (0..n)
            .map(|i| json!({"question": format!("{boilerplate} {}", prose(i, 9)), "answer": boilerplate}))
            .collect();
        let options = CheckOptions {
            eval: vec![write(dir.path(), "eval.jsonl", &eval)],
            ..CheckOptions::default()
        };
        let r = check_with(&path, Purpose::Preference, &options);
        assert_eq!(r.findings.len(), wanted, "{:?}", r.findings);
    }
}

#[test]
fn contradictions_of_pairs_and_labels() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = clean();
    let p = rows[4].clone();
    rows.push(json!({"prompt": p["prompt"], "chosen": p["rejected"], "rejected": p["chosen"]}));
    let path = write(dir.path(), "a.jsonl", &rows);
    let r = check(&path, Purpose::Preference, None);
    assert_eq!(found(&r), [("contradiction", "line 41", "")]);
    assert!(r.findings[0].what.contains("line 5"));

    let row = |p: &str, label: bool| json!({"prompt": p, "completion": "c", "label": label});
    let rows = [
        row("p", true),
        row("q", true),
        row("p", true),
        row("p", false),
    ];
    let path = write(dir.path(), "b.jsonl", &rows);
    let r = check(&path, Purpose::Sft, None);
    let mut rules: Vec<&str> = r.findings.iter().map(|f| f.rule).collect();
    rules.sort_unstable();
    assert_eq!(rules, ["contradiction", "duplicate", "label_ignored"]);
    let f = r
        .findings
        .iter()
        .find(|f| f.rule == "contradiction")
        .unwrap();
    assert_eq!((f.place.as_str(), f.column.as_str()), ("line 4", "label"));
    assert!(
        f.what.contains("line 1") && f.what.contains("true"),
        "{f:?}"
    );
}

#[test]
fn length_bias_once_a_file() {
    let dir = tempfile::tempdir().unwrap();
    for (longer, wanted) in [(50, 0), (60, 0), (90, 1), (10, 1)] {
        let rows: Vec<Value> = (0..100)
            .map(|i| {
                let (c, r) = if i % 100 < longer { (30, 20) } else { (20, 30) };
                json!({"prompt": prose(i, 20), "chosen": "x".repeat(c), "rejected": "y".repeat(r)})
            })
            .collect();
        let path = write(dir.path(), "a.jsonl", &rows);
        let r = check(&path, Purpose::Preference, None);
        assert!(r.findings.iter().all(|f| f.place.is_empty()));
        let n = r.counts.get("length_bias").copied().unwrap_or(0);
        assert_eq!(n, wanted, "{longer}: {:?}", r.findings);
        assert_eq!(r.findings.len(), wanted);
    }
}

#[test]
fn scores_that_are_none_and_texts_without_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = clean();
    rows[2]["score_chosen"] = "NaN".into();
    rows[3]["margin"] = "Infinity".into();
    rows[4]["scores"] = json!([1.0, 2.0]);
    let path = write(dir.path(), "a.jsonl", &rows);
    let r = check(&path, Purpose::Preference, None);
    assert_eq!(
        found(&r),
        [
            ("not_finite", "line 3", "score_chosen"),
            ("not_finite", "line 4", "margin")
        ]
    );
    assert!(r.failed && r.findings[0].level == Level::Warning);
    let options = CheckOptions {
        max_characters: 400,
        ..CheckOptions::default()
    };
    let rows = [
        json!({"prompt": "p", "completion": "ä".repeat(400)}),
        json!({"prompt": "p", "completion": "ä".repeat(401)}),
    ];
    let path = write(dir.path(), "b.jsonl", &rows);
    let r = check_with(&path, Purpose::Sft, &options);
    assert_eq!(found(&r), [("over_long", "line 2", "completion")]);
}

#[test]
fn every_finding_reaches_the_sink_and_the_file_and_errors_are_never_hidden() {
    let dir = tempfile::tempdir().unwrap();
    let mut rows = vec![json!({"prompt": "a", "chosen": "b", "rejected": "b"}); 300];
    let mut odd = json!({"prompt": "a", "chosen": 3, "rejected": "b"});
    odd["\u{1b}[2J"] = "x".repeat(1_000_001).into();
    rows.push(odd);
    let path = write(dir.path(), "a.jsonl", &rows);
    let out = dir.path().join("findings.parquet");
    let mut file = FindingsOut::create(&out).unwrap();
    let mut all: Vec<Finding> = Vec::new();
    let r = check_each(
        &path,
        Purpose::Preference,
        &CheckOptions::default(),
        &mut |f| {
            all.push(f.clone());
            file.write(f);
        },
    );
    file.finish().unwrap();
    assert_eq!(r.findings.len(), MAX_FINDINGS);
    assert_eq!(r.findings.last().unwrap().rule, "wrong_type");
    assert_eq!(all.len(), 300 + 299 + 2);
    assert_eq!(
        (all[599].rule, all[599].column.as_str()),
        ("over_long", "\\u{1b}[2J")
    );
    assert_eq!(all.len(), r.counts.values().sum::<usize>());
    let read: Vec<_> = source::rows(&out).unwrap().map(Result::unwrap).collect();
    assert_eq!(read.len(), all.len());
    for (row, f) in read.iter().zip(&all) {
        let of = |c: &str| row.columns[c].as_str().unwrap().to_owned();
        assert_eq!(
            [
                of("rule"),
                of("level"),
                of("place"),
                of("column"),
                of("what")
            ],
            [f.rule, f.level.name(), &f.place, &f.column, &f.what]
        );
    }
    let again = dir.path().join("again.parquet");
    write_findings_parquet(&again, &all).unwrap();
    assert_eq!(std::fs::read(&out).unwrap(), std::fs::read(&again).unwrap());
    assert!(write_findings_parquet(&dir.path().join("no/such.parquet"), &all).is_err());
}

#[test]
fn every_kind_of_row_has_its_rules() {
    let dir = tempfile::tempdir().unwrap();
    let of = |rows: &[Value], purpose| {
        let path = write(dir.path(), "kind.jsonl", rows);
        check(&path, purpose, None)
    };
    let turn = |role: &str, text: &str| json!([{"role": role, "content": text}]);
    let r = of(
        &[
            json!({"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}),
            json!({"prompt": "p", "completions": ["a", "b"], "scores": [2, 2]}),
            json!({"prompt": "p", "completions": ["a", "b", "a"], "scores": [1, 2, 3]}),
            json!({"prompt": "p", "completions": ["a", "b", "b"]}),
            json!({"prompt": "p", "completions": ["a"]}),
            json!({"prompt": "p", "completions": ["a", "b"], "scores": [1]}),
        ],
        Purpose::Ranked,
    );
    assert_eq!(
        found(&r),
        [
            ("no_contrast", "line 2", "scores"),
            ("identical", "line 3", "completions"),
            ("identical", "line 4", "completions"),
            ("too_few", "line 5", "completions"),
            ("wrong_length", "line 6", "scores"),
        ]
    );
    assert!(r.findings[1].what.contains("0 and 2") && r.findings[1].what.contains("better"));
    let r = of(
        &[
            json!({"prompt": "p", "completion": "a", "label": true}),
            json!({"prompt": "p", "completion": "a", "label": false}),
            json!({"prompt": "p", "completion": "</s>", "label": false}),
            json!({"prompt": turn("assistant", "p"), "completion": turn("assistant", "a"), "label": true}),
            json!({"prompt": "p", "completion": "a", "label": 1}),
        ],
        Purpose::Unpaired,
    );
    assert_eq!(
        found(&r),
        [
            ("contradiction", "line 2", "label"),
            ("special_token", "line 3", "completion"),
            ("role_order", "line 4", ""),
            ("role_order", "line 4", ""),
            ("wrong_type", "line 5", "label"),
        ]
    );
    let r = of(
        &[
            json!({"prompt": "p", "completions": ["a", "b\u{7}"], "labels": [true, false]}),
            json!({"prompt": turn("user", "p"), "completions": ["a"], "labels": [true]}),
            json!({"prompt": "p", "completions": ["a", "b"], "labels": [true]}),
        ],
        Purpose::Stepwise,
    );
    assert_eq!(
        found(&r),
        [
            ("control_character", "line 1", "completions"),
            ("wrong_length", "line 3", "labels"),
        ]
    );
    let r = of(
        &[
            json!({"prompt": "p", "completion": "a", "ratings": {"helpfulness": 3}}),
            json!({"prompt": "p", "completion": " ", "ratings": {"helpfulness": 3}}),
            json!({"prompt": "p", "completion": "a", "ratings": {}}),
        ],
        Purpose::Rated,
    );
    assert_eq!(
        found(&r),
        [
            ("empty", "line 2", "completion"),
            ("empty", "line 3", "ratings")
        ]
    );
}

#[test]
fn judgements_by_several_people_are_no_near_duplicates() {
    let dir = tempfile::tempdir().unwrap();
    let row = |who: Option<&str>, label: bool| json!({"prompt": "p", "completion": prose(3, 30), "label": label, "annotator": who});
    let of = |rows: &[Value]| {
        let path = write(dir.path(), "a.jsonl", rows);
        check(&path, Purpose::Unpaired, None)
    };
    let r = of(&[row(Some("anna"), true), row(Some("ben"), true)]);
    assert_eq!(found(&r), []);
    let r = of(&[row(None, true), row(None, false)]);
    assert_eq!(
        found(&r),
        [
            ("contradiction", "line 2", "label"),
            ("near_duplicate", "line 2", "")
        ]
    );
    // Every column that is there is named, whichever is missing.
    let path = write(dir.path(), "a.jsonl", &[row(None, true)]);
    let what = check(&path, Purpose::Ranked, None).findings[0].what.clone();
    for column in ["annotator", "completion", "label", "prompt"] {
        assert!(what.contains(column), "{what}");
    }
}

#[test]
fn tokens_of_answers_are_looked_at_for_every_kind() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer");
    let t = rlhf_data::tokenize::ChatTokenizer::load(&folder).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let options = CheckOptions {
        tokens: Some((&t, rlhf_data::tokenize::Limits::new(200, 8))),
        ..CheckOptions::default()
    };
    let long = "word ".repeat(50);
    for (purpose, row) in [
        (
            Purpose::Unpaired,
            json!({"prompt": "p", "completion": long, "label": true}),
        ),
        (
            Purpose::Rated,
            json!({"prompt": "p", "completion": long, "ratings": {"a": 1}}),
        ),
        (
            Purpose::Ranked,
            json!({"prompt": "p", "completions": ["a", long]}),
        ),
        (
            Purpose::Stepwise,
            json!({"prompt": "p", "completions": [long], "labels": [true]}),
        ),
    ] {
        let path = write(dir.path(), "long.jsonl", &[row]);
        let r = check_with(&path, purpose, &options);
        assert_eq!(found(&r), [("truncated", "line 1", "")], "{purpose:?}");
    }
}

#[test]
fn rows_of_several_files_are_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let rows = clean();
    write(dir.path(), "a.jsonl", &rows[..3]);
    write(dir.path(), "b.jsonl", &rows[1..5]);
    let mut swapped = rows[4].clone();
    swapped["chosen"] = rows[4]["rejected"].clone();
    swapped["rejected"] = rows[4]["chosen"].clone();
    write(dir.path(), "c.jsonl", &[swapped]);
    let r = check(dir.path(), Purpose::Preference, None);
    let said: Vec<_> = r
        .findings
        .iter()
        .map(|f| (f.rule, f.place.as_str(), f.what.as_str()))
        .collect();
    assert_eq!(
        said,
        [
            (
                "duplicate",
                "b.jsonl, line 1",
                "the same as a.jsonl, line 2"
            ),
            (
                "duplicate",
                "b.jsonl, line 2",
                "the same as a.jsonl, line 3"
            ),
            (
                "contradiction",
                "c.jsonl, line 1",
                "b.jsonl, line 4 prefers the other completion"
            ),
        ]
    );
    // The same of a folder given as another split.
    let path = write(
        dir.path().parent().unwrap(),
        "rlhf-lint-one.jsonl",
        &rows[4..5],
    );
    let options = CheckOptions {
        against: vec![dir.path().to_owned()],
        ..CheckOptions::default()
    };
    let r = check_with(&path, Purpose::Preference, &options);
    std::fs::remove_file(path).unwrap();
    let what = &r.findings[0].what;
    assert!(what.ends_with(", b.jsonl, line 4"), "{what}");
}

#[test]
fn long_paths_are_shown_whole() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("d".repeat(120)).join("e".repeat(120));
    std::fs::create_dir_all(&deep).unwrap();
    let broken = write(&deep, "broken.jsonl", &[json!(3)]);
    let path = write(dir.path(), "a.jsonl", &clean());
    let options = CheckOptions {
        against: vec![broken],
        ..CheckOptions::default()
    };
    let r = check_with(&path, Purpose::Preference, &options);
    assert_eq!(r.findings[0].rule, "unreadable");
    let what = &r.findings[0].what;
    assert!(
        what.contains("broken.jsonl, line 1") && what.contains("do: "),
        "{what}"
    );
    // What the data say is still cut.
    let path = write(
        dir.path(),
        "b.jsonl",
        &[json!({"prompt": "p", "chosen": format!("\u{7}{}", "x".repeat(500)), "rejected": "b"})],
    );
    let r = check(&path, Purpose::Preference, None);
    assert_eq!(
        r.findings[0].what.chars().count(),
        "\\u{7}".len() - 1 + 160 + 1
    );
}
