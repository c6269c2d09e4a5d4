//! Importers: each format's rows, what is refused and what is recognised.

use proptest::prelude::*;
use rlhf_data::import::{Format, convert, sniff};
use rlhf_data::record::{PreferenceRecord, PromptRecord, Record, SftRecord};
use serde_json::{Map, Value, json};

fn map(v: Value) -> Map<String, Value> {
    v.as_object().unwrap().clone()
}

fn u(text: &str) -> Value {
    json!({"role": "user", "content": text})
}

fn a(text: &str) -> Value {
    json!({"role": "assistant", "content": text})
}

/// A row of each format, and the canonical rows that it becomes.
fn examples() -> Vec<(Format, Value, Vec<Value>)> {
    let rating = |n: &str| json!({"Rating": n, "Rationale": "so"});
    let aspects = |h: &str, o: &str| {
        json!({"helpfulness": rating(h), "honesty": rating(o),
               "instruction_following": rating("4"), "truthfulness": rating("N/A")})
    };
    vec![
        (
            Format::Canonical,
            json!({"prompt": "p", "chosen": "c", "rejected": "r", "margin": "0.5", "other": null}),
            vec![
                json!({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5, "other": null}),
            ],
        ),
        (
            Format::Canonical,
            json!({"messages": "[{\"role\":\"user\",\"content\":\"x\"}, {\"role\":\"assistant\",\"content\":\"[y\"}]",
                   "source": "made", "weight": "2", "label": "True"}),
            vec![
                json!({"messages": [u("x"), a("[y")], "source": {"dataset": "made"}, "weight": 2.0, "label": true}),
            ],
        ),
        (
            Format::HhRlhf,
            json!({"chosen": "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Tea or\ncoffee?\n\nAssistant: Tea.",
                   "rejected": "\n\nHuman: Hi?\n\nAssistant: Yes?\n\nHuman: Tea or\ncoffee?\n\nAssistant: Mud. "}),
            vec![
                json!({"prompt": [u("Hi?"), a("Yes?"), u("Tea or\ncoffee?")],
                        "chosen": [a("Tea.")], "rejected": [a("Mud.")]}),
            ],
        ),
        (
            Format::Alpaca,
            json!({"instruction": "Add.", "input": "2 and 3", "output": "5", "text": "Below is …"}),
            vec![json!({"messages": [u("Add.\n\n2 and 3"), a("5")]})],
        ),
        (
            Format::Alpaca,
            json!({"instruction": "Greet.", "input": "", "output": "Hello", "system": "Be kind.",
                   "history": [["Who?", "Me."]]}),
            vec![
                json!({"messages": [{"role": "system", "content": "Be kind."}, u("Who?"), a("Me."),
                                     u("Greet."), a("Hello")]}),
            ],
        ),
        (
            Format::ShareGpt,
            json!({"id": "s1", "conversations": [
                {"from": "system", "value": "Short."}, {"from": "human", "value": "Time?"},
                {"from": "function_call", "value": "now()"}, {"from": "observation", "value": "12:00"},
                {"from": "gpt", "value": "Noon."}]}),
            vec![
                json!({"messages": [{"role": "system", "content": "Short."}, u("Time?"), a("now()"),
                                     {"role": "tool", "content": "12:00"}, a("Noon.")],
                        "source": {"id": "s1"}}),
            ],
        ),
        (
            Format::OpenAiMessages,
            json!({"source": "made/up", "id": "m1", "prompt": "Time", "ground_truth": [12], "messages": [
                {"role": "developer", "content": "Short."},
                {"role": "user", "content": [{"type": "text", "text": "Time "}, {"type": "text", "text": "now?"}]},
                {"role": "assistant", "content": null, "name": null,
                 "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
                {"role": "tool", "content": "12:00", "tool_call_id": "c1"},
                {"role": "assistant", "content": "Noon.", "tool_calls": []}]}),
            vec![json!({"messages": [
                {"role": "system", "content": "Short."}, u("Time now?"),
                {"role": "assistant", "content": "",
                 "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "now", "arguments": "{}"}}]},
                {"role": "tool", "content": "12:00", "tool_call_id": "c1"}, a("Noon.")],
                "source": {"dataset": "made/up", "id": "m1"}, "ground_truth": [12]})],
        ),
        (
            Format::Gsm8k,
            json!({"question": "What is 900 + 100?", "answer": "It is <<900+100=1000>>1000.\n#### 1,000"}),
            vec![json!({"prompt": [u("What is 900 + 100?")],
                        "messages": [u("What is 900 + 100?"), a("It is <<900+100=1000>>1000.\n#### 1,000")],
                        "answer": "1,000"})],
        ),
        (
            Format::UltraFeedback,
            json!({"source": "made", "instruction": "Name a bird.", "models": ["x", "y", "z"],
                "completions": [
                    {"model": "x", "response": "A wren.", "overall_score": 1.0, "annotations": aspects("5", "3")},
                    {"model": "y", "response": "A bat.", "overall_score": 3.5, "annotations": {}},
                    {"model": "z", "response": "A cat.", "overall_score": 9.0, "fine-grained_score": 2.0}]}),
            vec![json!({"prompt": [u("Name a bird.")],
                        "completions": [[a("A wren.")], [a("A bat.")], [a("A cat.")]],
                        "scores": [4.0, 3.5, 2.0],
                        "source": {"dataset": "made", "models": ["x", "y", "z"]}})],
        ),
        (
            Format::UltraFeedbackBinarized,
            json!({"prompt": "Hi", "prompt_id": "7", "messages": [u("Hi"), a("Hello!")],
                   "chosen": [u("Hi"), a("Hello!")], "rejected": [u("Hi"), a("No.")],
                   "score_chosen": 8.5, "score_rejected": 6.0}),
            vec![
                json!({"prompt": [u("Hi")], "chosen": [a("Hello!")], "rejected": [a("No.")],
                        "margin": 2.5, "source": {"id": "7"}}),
            ],
        ),
        (
            Format::HelpSteer2,
            json!({"prompt": "Hi\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nA joke!", "response": "Knock.",
                   "helpfulness": 3, "correctness": 4, "coherence": "4", "complexity": 1, "verbosity": 0.5}),
            vec![
                json!({"prompt": [u("Hi"), a("Yes?"), u("A joke!")], "completion": [a("Knock.")],
                        "ratings": {"helpfulness": 3, "correctness": 4, "coherence": 4,
                                    "complexity": 1, "verbosity": 0.5}}),
            ],
        ),
        (
            Format::Nectar,
            json!({"prompt": "\n\nHuman: Name a fish.\n\nAssistant: ", "turns": 1, "source": ["made"],
                   "answers": [{"answer": "Cod.", "model": "x", "rank": 2.0},
                               {"answer": "A carp.", "model": "y", "rank": 1.0}]}),
            vec![
                json!({"prompt": [u("Name a fish.")], "completions": [[a("Cod.")], [a("A carp.")]],
                        "scores": [-2.0, -1.0], "ranks": [2, 1],
                        "source": {"dataset": "made", "models": ["x", "y"]}}),
            ],
        ),
        (
            Format::Shp,
            json!({"post_id": "q1", "domain": "asktea_train", "history": "Milk first?",
                   "human_ref_A": "Never.", "human_ref_B": "Always.", "labels": 0, "score_ratio": 2.0}),
            vec![
                json!({"prompt": [u("Milk first?")], "chosen": [a("Always.")], "rejected": [a("Never.")],
                        "source": {"domain": "asktea_train", "id": "q1", "score_ratio": 2.0}}),
            ],
        ),
        (
            Format::WebGptComparisons,
            json!({"question": {"dataset": "made", "id": "w", "full_text": "Why is tea brown?"},
                   "answer_0": "Dye.", "answer_1": "Tannins.", "score_0": -0.5, "score_1": 0.5}),
            vec![
                json!({"prompt": [u("Why is tea brown?")], "chosen": [a("Tannins.")],
                        "rejected": [a("Dye.")], "margin": 1.0,
                        "source": {"dataset": "made", "id": "w"}}),
            ],
        ),
        (
            Format::WebGptComparisons,
            json!({"question": {"full_text": "Why?"}, "answer_0": "So.", "answer_1": "Or so.",
                   "score_0": 0, "score_1": 0}),
            vec![],
        ),
        (
            Format::TldrComparisons,
            json!({"info": {"id": "t1", "post": "I lost my tea.", "title": "Help", "subreddit": "tea"},
                   "summaries": [{"text": " Tea gone.", "policy": "p0"}, {"text": " Coffee.", "policy": "p1"}],
                   "choice": 0, "worker": "w1", "batch": "b2"}),
            vec![
                json!({"prompt": "SUBREDDIT: r/tea\n\nTITLE: Help\n\nPOST: I lost my tea.\n\nTL;DR:",
                        "chosen": " Tea gone.", "rejected": " Coffee.",
                        "source": {"annotator": "w1", "batch": "b2", "chosen_model": "p0",
                                   "rejected_model": "p1", "id": "t1"}}),
            ],
        ),
        (
            Format::Prm800k,
            json!({"labeler": "l1", "question": {"problem": "1+1+1?", "ground_truth_answer": "3"},
                   "label": {"finish_reason": "solution", "steps": [
                       {"completions": [{"text": "1+1=2.", "rating": 1}, {"text": "1+1=3.", "rating": -1}],
                        "human_completion": null, "chosen_completion": 0},
                       {"completions": [{"text": "Hm.", "rating": null}],
                        "human_completion": {"text": "Add one."}, "chosen_completion": null},
                       {"completions": [{"text": "So 3.", "rating": 0}], "chosen_completion": 0}]}}),
            vec![
                json!({"prompt": "1+1+1?", "completions": ["1+1=3."], "labels": [false],
                       "source": {"annotator": "l1"}, "answer": "3"}),
                json!({"prompt": "1+1+1?", "completions": ["1+1=2.", "Add one.", "So 3."],
                       "labels": [true, true, true], "source": {"annotator": "l1"}, "answer": "3"}),
            ],
        ),
        (
            Format::IfEval,
            json!({"key": 5, "prompt": "Write two words.", "instruction_id_list": ["a:b", "c:d"],
                   "kwargs": [{"num_words": 2, "relation": null}, {}]}),
            vec![
                json!({"prompt": [u("Write two words.")], "instruction_id_list": ["a:b", "c:d"],
                        "kwargs": [{"num_words": 2}, {}], "key": 5}),
            ],
        ),
        (
            Format::Oasst1,
            json!({"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": {
                "message_id": "t", "role": "prompter", "text": "Tea?", "lang": "en", "replies": [
                    {"message_id": "a", "role": "assistant", "text": "Green.", "rank": 1, "replies": [
                        {"message_id": "c", "role": "prompter", "text": "Why?", "replies": [
                            {"message_id": "d", "role": "assistant", "text": "So.", "rank": 0}]}]},
                    {"message_id": "b", "role": "assistant", "text": "Black.", "rank": 0}]}}),
            vec![
                json!({"prompt": [u("Tea?")], "completions": [[a("Green.")], [a("Black.")]],
                       "scores": [-1.0, 0.0], "ranks": [1, 0], "source": {"id": "t", "tree": "t"}}),
            ],
        ),
    ]
}

#[test]
fn every_format_becomes_canonical_rows() {
    let examples = examples();
    for (format, row, want) in &examples {
        let got = convert(*format, map(row.clone()));
        let got = got.map(|rows| rows.into_iter().map(Value::Object).collect::<Vec<_>>());
        assert_eq!(got.as_ref(), Ok(want), "{format}");
    }
    for format in Format::ALL {
        assert!(examples.iter().any(|(f, ..)| *f == format), "{format}");
        assert_eq!(Format::parse(format.name()), Some(format));
    }
    assert_eq!(Format::parse("no-such"), None);
}

#[test]
fn canonical_rows_are_the_records_that_training_reads() {
    for (format, row, _) in examples() {
        for row in convert(format, map(row)).unwrap() {
            match format {
                Format::Canonical if row.contains_key("messages") => {
                    SftRecord::from_row(row.clone()).unwrap();
                }
                Format::Alpaca | Format::ShareGpt | Format::OpenAiMessages | Format::Gsm8k => {
                    SftRecord::from_row(row.clone()).unwrap();
                }
                Format::Canonical
                | Format::HhRlhf
                | Format::UltraFeedbackBinarized
                | Format::Shp
                | Format::WebGptComparisons
                | Format::TldrComparisons => {
                    PreferenceRecord::from_row(row.clone()).unwrap();
                }
                _ => {}
            }
            if row.contains_key("prompt") {
                PromptRecord::from_row(row).unwrap();
            }
        }
    }
}

#[test]
fn every_format_is_recognised() {
    for (format, row, _) in examples() {
        assert_eq!(sniff(&map(row)), Some(format));
    }
    let sniffed = |v| sniff(&map(v));
    assert_eq!(sniffed(json!({"a": 1})), None);
    assert_eq!(sniffed(json!({})), None);
    // A question with an answer that ends otherwise could be anything.
    assert_eq!(sniffed(json!({"question": "q", "answer": "a"})), None);
    // Scores beside pairs in messages are not UltraFeedback's, whose prompt is text.
    let pair = json!({"prompt": [u("p")], "chosen": [a("c")], "rejected": [a("r")],
                      "score_chosen": 1, "score_rejected": 0});
    assert_eq!(sniffed(pair), Some(Format::Canonical));
    let whole = json!({"chosen": [u("p"), a("c")], "rejected": [u("p"), a("r")]});
    assert_eq!(sniffed(whole), Some(Format::Canonical));
}

#[test]
fn malformed_rows_are_refused_by_column() {
    let hh = |c: &str, r: &str| json!({"chosen": c, "rejected": r});
    let good = "\n\nHuman: a\n\nAssistant: b";
    let message = |m: Value| json!({"messages": [u("x"), m]});
    let step = |c: Value, chosen: Value| {
        json!({"question": {"problem": "p"},
               "label": {"steps": [{"completions": c, "chosen_completion": chosen}]}})
    };
    let cases = [
        (Format::Canonical, json!({"margin": "much"}), "margin"),
        (Format::Canonical, json!({"label": "perhaps"}), "label"),
        (Format::Canonical, json!({"messages": "[{"}), "messages"),
        (Format::HhRlhf, hh("none", good), "chosen"),
        (Format::HhRlhf, hh(good, "\n\nHuman: a b"), "rejected"),
        (
            Format::HhRlhf,
            hh(good, "\n\nHuman: c\n\nAssistant: b"),
            "rejected",
        ),
        (
            Format::HhRlhf,
            hh(good, "\n\nHuman: a\n\nAssistant: "),
            "rejected",
        ),
        (
            Format::HhRlhf,
            hh(good, "\n\nHuman: a\n\nAssistant: b\n\nHuman: c"),
            "rejected",
        ),
        (
            Format::HhRlhf,
            hh("\n\nAssistant: b", "\n\nAssistant: b"),
            "chosen",
        ),
        (Format::HhRlhf, json!({"chosen": good}), "rejected"),
        (
            Format::Alpaca,
            json!({"instruction": "i", "output": " "}),
            "output",
        ),
        (
            Format::Alpaca,
            json!({"instruction": "i", "input": 3, "output": "o"}),
            "input",
        ),
        (
            Format::Alpaca,
            json!({"instruction": "i", "output": "o", "history": [["q"]]}),
            "history[0]",
        ),
        (
            Format::ShareGpt,
            json!({"conversations": []}),
            "conversations",
        ),
        (
            Format::ShareGpt,
            json!({"conversations": [{"from": "cat", "value": "m"}]}),
            "conversations[0].from",
        ),
        (
            Format::OpenAiMessages,
            message(json!({"role": "assistant"})),
            "messages[1]",
        ),
        (
            Format::OpenAiMessages,
            message(json!({"role": "assistant", "content": [{"type": "image"}]})),
            "messages[1].content[0]",
        ),
        (Format::OpenAiMessages, message(json!(3)), "messages[1]"),
        (
            Format::Gsm8k,
            json!({"question": "q", "answer": "no mark"}),
            "answer",
        ),
        (
            Format::Gsm8k,
            json!({"question": "q", "answer": "#### "}),
            "answer",
        ),
        (
            Format::UltraFeedback,
            json!({"instruction": "i", "completions": [{"response": "r", "overall_score": "good"}]}),
            "completions[0].overall_score",
        ),
        (
            Format::UltraFeedbackBinarized,
            json!({"chosen": [u("a"), a("b")], "rejected": [u("c"), a("b")], "score_chosen": 1, "score_rejected": 0}),
            "rejected",
        ),
        (
            Format::UltraFeedbackBinarized,
            json!({"chosen": [u("a")], "rejected": [u("a")], "score_chosen": 1, "score_rejected": 0}),
            "chosen",
        ),
        (
            Format::HelpSteer2,
            json!({"prompt": "p", "response": "r"}),
            "helpfulness",
        ),
        (
            Format::Nectar,
            json!({"prompt": "\n\nHuman: p\n\nAssistant: ", "answers": [{"answer": "x"}]}),
            "answers[0]",
        ),
        (
            Format::Nectar,
            json!({"prompt": "p", "answers": []}),
            "prompt",
        ),
        (
            Format::Shp,
            json!({"history": "h", "human_ref_A": "a", "human_ref_B": "b", "labels": 2}),
            "labels",
        ),
        (
            Format::WebGptComparisons,
            json!({"question": "q"}),
            "question",
        ),
        (
            Format::TldrComparisons,
            json!({"info": {"article": "news"}}),
            "info",
        ),
        (
            Format::TldrComparisons,
            json!({"info": {"post": "p", "title": "t", "subreddit": "s"}, "summaries": [{"text": "x"}], "choice": 0}),
            "summaries",
        ),
        (
            Format::Prm800k,
            step(json!([{"text": "t", "rating": 7}]), json!(0)),
            "label.steps[0].completions[0].rating",
        ),
        (
            Format::Prm800k,
            step(json!([]), json!(0)),
            "label.steps[0].chosen_completion",
        ),
        (
            Format::IfEval,
            json!({"prompt": "p", "instruction_id_list": ["a"], "kwargs": []}),
            "kwargs",
        ),
    ];
    for (format, row, column) in cases {
        let fault = convert(format, map(row.clone())).unwrap_err();
        assert_eq!(fault.column, column, "{format} {row}: {fault:?}");
        assert!(!fault.what.is_empty() && !fault.mend.is_empty());
    }
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC{0,6}".prop_map(Value::from),
        Just(Value::from("\n\nHuman: é\n\nAssistant: ")),
        Just(Value::from("x#### 1")),
        Just(Value::from("<extra_id_1>User")),
        Just(Value::from("assistant")),
        Just(Value::from("user")),
    ];
    let key = prop::sample::select(vec![
        "role",
        "content",
        "from",
        "value",
        "text",
        "type",
        "rating",
        "steps",
        "completions",
        "chosen_completion",
        "human_completion",
        "problem",
        "full_text",
        "post",
        "title",
        "subreddit",
        "response",
        "annotations",
        "helpfulness",
        "Rating",
        "overall_score",
        "answer",
        "rank",
        "model",
        "tool_calls",
    ]);
    leaf.prop_recursive(5, 40, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((key.clone(), inner), 0..5).prop_map(|m| Value::Object(
                m.into_iter().map(|(k, v)| (k.to_owned(), v)).collect()
            )),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any columns at all: rows or a fault, never a panic.
    #[test]
    fn no_row_makes_an_importer_panic(
        base in 0..18_usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), json_value()), 0..4),
        other in json_value(),
    ) {
        let (_, row, _) = examples().swap_remove(base);
        let mut row = map(row);
        for (at, value) in changes {
            let key = row.keys().nth(at.index(row.len())).unwrap().clone();
            row.insert(key, value);
        }
        row.insert("source".into(), other);
        let _ = sniff(&row);
        for format in Format::ALL {
            let _ = convert(format, row.clone());
        }
    }
}
