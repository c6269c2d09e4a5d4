//! Message trees whose messages are rows: what they become, and what is refused.

use std::path::PathBuf;

use rlhf_data::import::{Format, OnBad, Skipped, read};
use rlhf_data::record::{Annotated, RankedRecord, Record};
use serde_json::{Value, json};

fn file(rows: &[Value]) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("messages.jsonl");
    let lines: Vec<String> = rows.iter().map(Value::to_string).collect();
    std::fs::write(&path, lines.join("\n")).unwrap();
    (dir, path)
}

/// A message of a tree; its parent is empty at the root.
fn said(tree: &str, id: &str, parent: &str, role: &str, rank: Option<u32>) -> Value {
    let parent = Some(parent).filter(|p| !p.is_empty());
    json!({"message_tree_id": tree, "message_id": id, "parent_id": parent, "role": role,
           "text": format!("says {id}"), "rank": rank, "lang": "en", "deleted": false,
           "review_result": null})
}

/// Two trees; in the first there are replies at two levels.
fn trees() -> Vec<Value> {
    let (p, a) = ("prompter", "assistant");
    vec![
        said("t1", "t1", "", p, None),
        said("t1", "a1", "t1", a, Some(2)),
        said("t1", "a2", "t1", a, Some(0)),
        // Its parent comes later.
        said("t1", "b2", "q", a, Some(1)),
        said("t1", "a3", "t1", a, Some(1)),
        said("t1", "q", "a2", p, None),
        said("t1", "b1", "q", a, Some(0)),
        said("t2", "t2", "", p, None),
        said("t2", "c1", "t2", a, Some(0)),
        said("t2", "c2", "t2", a, None),
    ]
}

fn import(rows: &[Value], bad: OnBad) -> Result<(Vec<(String, Value)>, Skipped), String> {
    let (_dir, path) = file(rows);
    let mut import = read(&path, None, bad).unwrap();
    let rows = import
        .by_ref()
        .map(|r| {
            let (format, row) = r.map_err(|e| e.to_string())?;
            assert_eq!(format, Format::Oasst1);
            Annotated::<RankedRecord>::from_row(row.columns.clone()).unwrap();
            Ok((row.place, Value::Object(row.columns)))
        })
        .collect::<Result<Vec<_>, String>>()?;
    let skipped = Skipped {
        count: import.skipped().count,
        nothing: import.skipped().nothing,
        ..Skipped::default()
    };
    Ok((rows, skipped))
}

fn texts(list: &Value) -> Vec<&str> {
    list.as_array()
        .unwrap()
        .iter()
        .map(|m| m["content"].as_str().unwrap())
        .collect()
}

#[test]
fn sibling_replies_become_rankings() {
    let (rows, skipped) = import(&trees(), OnBad::Refuse).unwrap();
    assert_eq!((rows.len(), skipped.nothing), (2, 1), "{rows:?}");
    let (place, first) = &rows[0];
    assert_eq!(place, "line 1");
    assert_eq!(texts(&first["prompt"]), ["says t1"]);
    assert_eq!(first["ranks"], json!([2, 0, 1]));
    assert_eq!(first["scores"], json!([-2.0, 0.0, -1.0]));
    assert_eq!(texts(&first["completions"][1]), ["says a2"]);
    assert_eq!(
        first["source"],
        json!({"id": "t1", "tree": "t1", "lang": "en"})
    );
    let (_, second) = &rows[1];
    assert_eq!(texts(&second["prompt"]), ["says t1", "says a2", "says q"]);
    assert_eq!(second["prompt"][1]["role"], "assistant");
    assert_eq!(second["ranks"], json!([1, 0]));
}

#[test]
fn what_is_deleted_or_bad_is_left_out_with_what_follows() {
    let mut rows = trees();
    rows[2]["deleted"] = json!(true);
    let (kept, _) = import(&rows, OnBad::Refuse).unwrap();
    assert_eq!(kept.len(), 1, "the second level follows a deleted answer");
    assert_eq!(kept[0].1["ranks"], json!([2, 1]));
    // As CSV has it.
    rows[1]["review_result"] = json!("False");
    let (kept, skipped) = import(&rows, OnBad::Refuse).unwrap();
    assert_eq!((kept.len(), skipped.nothing), (0, 2));
}

#[test]
fn malformed_trees_are_refused_with_their_place() {
    let with = |i: usize, key: &str, v: Value| {
        let mut rows = trees();
        rows[i][key] = v;
        rows
    };
    let mut scattered = trees();
    scattered.push(said("t1", "late", "t1", "assistant", Some(3)));
    let mut cycle = trees();
    cycle[2]["parent_id"] = json!("q");
    let deep: Vec<Value> = (0..200)
        .map(|i| {
            let parent = if i == 0 {
                String::new()
            } else {
                format!("m{}", i - 1)
            };
            let role = if i % 2 == 0 { "prompter" } else { "assistant" };
            said("t", &format!("m{i}"), &parent, role, Some(0))
        })
        .chain([said("t", "more", "m198", "assistant", Some(1))])
        .collect();
    for (rows, words) in [
        (with(4, "role", json!("wizard")), ["line 5", "wizard"]),
        (with(4, "parent_id", json!("nobody")), ["line 5", "nobody"]),
        (with(4, "message_id", json!("a1")), ["line 5", "twice"]),
        (with(4, "rank", json!("first")), ["line 5", "rank"]),
        (with(4, "text", json!(7)), ["line 5", "text"]),
        (with(4, "role", json!("prompter")), ["line 5", "same role"]),
        (
            with(0, "role", json!("assistant")),
            ["line 1", "begins with an answer"],
        ),
        (
            with(7, "message_tree_id", json!(null)),
            ["line 8", "message_tree_id"],
        ),
        (scattered, ["line 11", "other trees stand between"]),
        (cycle, ["line 6", "128"]),
        (deep, ["line 199", "128"]),
    ] {
        let e = import(&rows, OnBad::Refuse).unwrap_err();
        assert!(words.iter().all(|w| e.contains(w)), "{words:?}: {e}");
        let (_, skipped) = import(&rows, OnBad::Skip).unwrap();
        assert!(skipped.count > 0, "{words:?}");
    }
}

#[test]
fn one_message_says_nothing_alone() {
    let row = trees()[1].as_object().unwrap().clone();
    let e = rlhf_data::import::convert(Format::Oasst1, row).unwrap_err();
    assert!(e.what.contains("alone"), "{e:?}");
}
