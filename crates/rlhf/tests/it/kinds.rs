//! `rlhf data import`: every kind of row, from the formats that give it, to both kinds of file.

use std::path::PathBuf;

use rlhf_data::record::{
    Annotated, RankedRecord, RatedRecord, Record, StepwiseRecord, UnpairedRecord,
};
use rlhf_data::source;

use super::run;

/// Imports rows of JSON; gives the code, the file and what was said.
fn import(dir: &tempfile::TempDir, rows: &str, kind: &str, ending: &str) -> (i32, PathBuf, String) {
    let input = dir.path().join("in.jsonl");
    std::fs::write(&input, rows).unwrap();
    let out = dir.path().join(format!("{kind}.{ending}"));
    let (input, to) = (input.to_str().unwrap(), out.to_str().unwrap());
    let (code, _, err) = run(&["data", "import", input, "--out", to, "--purpose", kind]);
    (code, out, err)
}

/// The rows as Parquet and as JSON Lines, which must be the same.
fn both<R: Record + PartialEq + std::fmt::Debug + 'static>(rows: &str) -> Vec<Annotated<R>> {
    let dir = tempfile::tempdir().unwrap();
    let [parquet, jsonl] = ["parquet", "jsonl"].map(|ending| {
        let (code, out, err) = import(&dir, rows, R::KIND, ending);
        assert_eq!(code, 0, "{err}");
        let read = source::read::<Annotated<R>>(&out).unwrap();
        read.collect::<Result<Vec<_>, _>>().unwrap()
    });
    assert_eq!(parquet, jsonl);
    parquet
}

const RANKED: &str = r#"{"prompt": "\n\nHuman: hi\n\nAssistant: ", "source": ["made"], "answers": [{"answer": "b", "model": "m", "rank": 2}, {"answer": "a", "model": "n", "rank": 1}]}"#;
const PAIR: &str =
    r#"{"prompt": "p", "chosen": "c", "rejected": "r", "weight": 2, "source": "made"}"#;

#[test]
fn rankings() {
    let rows = both::<RankedRecord>(RANKED);
    assert_eq!(rows[0].record.scores, Some(vec![-2.0, -1.0]));
    let source = rows[0].source.as_ref().unwrap();
    assert_eq!(source.dataset.as_deref(), Some("made"));
    let trees = [
        r#"{"message_tree_id": "t", "message_id": "t", "parent_id": null, "role": "prompter", "text": "q"}"#,
        r#"{"message_tree_id": "t", "message_id": "a", "parent_id": "t", "role": "assistant", "text": "x", "rank": 1}"#,
        r#"{"message_tree_id": "t", "message_id": "b", "parent_id": "t", "role": "assistant", "text": "y", "rank": 0}"#,
    ];
    let rows = both::<RankedRecord>(&trees.join("\n"));
    assert_eq!(rows[0].record.scores, Some(vec![-1.0, 0.0]));
    let dir = tempfile::tempdir().unwrap();
    let (code, out, err) = import(&dir, &trees.join("\n"), "preference", "jsonl");
    assert_eq!(code, 0, "{err}");
    let pair: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(out).unwrap()).unwrap();
    assert_eq!(pair["chosen"][0]["content"], "y");
}

#[test]
fn pairs_of_a_ranking_without_end_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let many = vec!["\"x\""; 20_000].join(", ");
    let row = format!(r#"{{"prompt": "p", "completions": [{many}]}}"#);
    let (code, out, err) = import(&dir, &row, "preference", "jsonl");
    assert!(code == 2 && err.contains("199990000 pairs"), "{err}");
    assert!(!out.exists());
}

#[test]
fn thumbs_as_they_are_and_out_of_pairs() {
    let rows = both::<UnpairedRecord>(
        "{\"prompt\": \"p\", \"completion\": \"c\", \"label\": true}\n{\"prompt\": \"p\", \"completion\": \"d\", \"label\": \"false\"}",
    );
    assert_eq!((rows[0].record.label, rows[1].record.label), (true, false));
    let rows = both::<UnpairedRecord>(PAIR);
    let seen: Vec<_> = rows
        .iter()
        .map(|r| (r.record.completion.joined(), r.record.label, r.weight))
        .collect();
    assert_eq!(
        seen,
        [
            ("c".to_owned(), true, Some(2.0)),
            ("r".to_owned(), false, Some(2.0))
        ]
    );
}

#[test]
fn thumbs_of_one_kind_are_a_warning() {
    let dir = tempfile::tempdir().unwrap();
    let row = r#"{"prompt": "p", "completion": "c", "label": true}"#;
    let (code, _, err) = import(&dir, row, "unpaired", "jsonl");
    assert!(
        code == 0 && err.contains("no row has the label false"),
        "{err}"
    );
    let (_, _, err) = import(&dir, PAIR, "unpaired", "jsonl");
    assert!(!err.contains("warning"), "{err}");
}

#[test]
fn steps_and_ratings() {
    let steps = r#"{"labeler": "l", "question": {"problem": "1+1?"}, "label": {"steps": [{"completions": [{"text": "2.", "rating": 1}, {"text": "3.", "rating": -1}], "chosen_completion": 0}]}}"#;
    let rows = both::<StepwiseRecord>(steps);
    let labels: Vec<_> = rows.iter().map(|r| r.record.labels.clone()).collect();
    assert_eq!(labels, [[false], [true]]);
    let rated = r#"{"prompt": "Hi", "response": "Yo", "helpfulness": 3, "correctness": 4, "coherence": 4, "complexity": 1, "verbosity": 0.5}"#;
    let rows = both::<RatedRecord>(rated);
    assert_eq!(rows[0].record.ratings["verbosity"], 0.5);
}

#[test]
fn what_does_not_fit_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let plain = r#"{"prompt": "p", "completions": ["a", "b"]}"#;
    let chat = r#"{"prompt": [{"role": "user", "content": "p"}], "completions": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]}"#;
    for (rows, kind, words) in [
        (PAIR.to_owned(), "ranked", "completions"),
        (PAIR.to_owned(), "rated", "ratings"),
        (RANKED.to_owned(), "stepwise", "completions"),
        (RANKED.to_owned(), "unpaired", "label"),
        // A Parquet file has one form.
        (format!("{plain}\n{chat}"), "ranked", "another form"),
    ] {
        let (code, out, err) = import(&dir, &rows, kind, "parquet");
        assert_eq!(code, 2, "{kind}: {err}");
        assert!(err.contains(words) && !out.exists(), "{kind}: {err}");
        // The input alone is there.
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "{kind}");
    }
}
