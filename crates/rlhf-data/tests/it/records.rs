//! Every kind of record: written and read back whole; conversions between them.

use std::collections::BTreeMap;

use proptest::prelude::*;
use rlhf_data::conversation::{Message, Role, Text, ToolCall};
use rlhf_data::record::{
    Annotated, Likert, Pairing, PreferenceRecord, PromptRecord, RankedRecord, RatedRecord, Record,
    SftRecord, Source, StepwiseRecord, UnpairedRecord, batch, likert_to_pair, pair_to_unpaired,
    ranked_to_pairs, rated_to_ranked, rated_to_unpaired, schema_of, sft_batch, unpaired_to_pairs,
};
use rlhf_data::source::{self, JsonlOut, ParquetOut};
use serde_json::{Map, Value, json};

fn word() -> impl Strategy<Value = String> {
    prop_oneof!["[a-z]{1,8}( [a-z]{1,8}){0,3}", "[\\PC]{1,6}x"]
}

fn call() -> impl Strategy<Value = ToolCall> {
    (
        prop::option::of("[a-z0-9]{1,5}"),
        "[a-z]{1,6}",
        word(),
        -5i64..5,
    )
        .prop_map(|(id, name, text, n)| {
            let mut arguments = Map::new();
            arguments.insert("q".into(), text.into());
            arguments.insert("n".into(), json!([n, {"deep": null}]));
            ToolCall::new(id, name, arguments)
        })
}

fn messages(last: Role) -> impl Strategy<Value = Text> {
    let turn = (
        word(),
        prop::option::of("[a-z]{1,4}"),
        prop::collection::vec(call(), 0..2),
    );
    prop::collection::vec(turn, 1..3).prop_map(move |turns| {
        let n = turns.len();
        let all = turns
            .into_iter()
            .enumerate()
            .map(|(i, (content, name, tool_calls))| {
                let role = if i + 1 == n { last } else { Role::Assistant };
                Message {
                    role,
                    // Beside a call nothing needs to be said.
                    content: if role == Role::Assistant && !tool_calls.is_empty() {
                        String::new()
                    } else {
                        content
                    },
                    name,
                    tool_calls: if role == Role::Assistant {
                        tool_calls
                    } else {
                        Vec::new()
                    },
                }
            });
        Text::Messages(all.collect())
    })
}

fn text(plain: bool, last: Role) -> BoxedStrategy<Text> {
    if plain {
        word().prop_map(Text::Plain).boxed()
    } else {
        messages(last).boxed()
    }
}

fn source() -> impl Strategy<Value = Source> {
    (
        prop::option::of(word()),
        prop::option::of(word()),
        prop::option::of(0u64..9),
        prop::option::of(0.0f64..2.0),
    )
        .prop_map(|(dataset, annotator, policy_version, temperature)| Source {
            dataset,
            annotator,
            model: None,
            policy_version,
            other: policy_version
                .map(|v| json!({"id": v, "of": ["a"]}).as_object().unwrap().clone()),
            sampler: temperature.map(|t| json!({"temperature": t}).as_object().unwrap().clone()),
        })
}

fn annotated<R: std::fmt::Debug>(
    record: impl Strategy<Value = R>,
) -> impl Strategy<Value = Annotated<R>> {
    (
        record,
        prop::option::of(0.0f64..3.0),
        prop::option::of(source()),
    )
        .prop_map(|(record, weight, source)| Annotated {
            record,
            weight,
            // Nothing known is no provenance.
            source: source.filter(|s| *s != Source::default()),
        })
}

fn rows<R, S>(one: fn(bool) -> S) -> impl Strategy<Value = Vec<Annotated<R>>>
where
    R: std::fmt::Debug + 'static,
    S: Strategy<Value = R> + 'static,
{
    any::<bool>().prop_flat_map(move |plain| prop::collection::vec(annotated(one(plain)), 1..5))
}

/// Writes and reads `records` as Parquet and as JSON Lines.
fn round_trip<R: Record + PartialEq + std::fmt::Debug + 'static>(records: &[R]) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let schema = schema_of(&records[0]);
    let mut out = ParquetOut::create(&path, schema.clone()).unwrap();
    out.write(&batch(&schema, records).unwrap()).unwrap();
    out.finish().unwrap();
    let back: Vec<R> = source::read(&path).unwrap().map(Result::unwrap).collect();
    assert_eq!(back, records);
    let path = dir.path().join("a.jsonl");
    let mut out = JsonlOut::create(&path).unwrap();
    for r in records {
        out.write(&r.to_row()).unwrap();
    }
    out.finish().unwrap();
    let back: Vec<R> = source::read(&path).unwrap().map(Result::unwrap).collect();
    assert_eq!(back, records);
}

fn preference(plain: bool) -> impl Strategy<Value = PreferenceRecord> {
    let t = move |r| text(plain, r);
    (
        t(Role::User),
        t(Role::Assistant),
        t(Role::Assistant),
        prop::option::of(-2.0f64..2.0),
    )
        .prop_map(|(prompt, chosen, rejected, margin)| PreferenceRecord {
            prompt,
            chosen,
            rejected,
            margin,
        })
}

fn ranked(plain: bool) -> impl Strategy<Value = RankedRecord> {
    (
        text(plain, Role::User),
        prop::collection::vec((text(plain, Role::Assistant), -3i32..3), 2..5),
        any::<bool>(),
    )
        .prop_map(|(prompt, completions, scored)| RankedRecord {
            prompt,
            scores: scored.then(|| completions.iter().map(|c| c.1.into()).collect()),
            completions: completions.into_iter().map(|c| c.0).collect(),
        })
}

fn unpaired(plain: bool) -> impl Strategy<Value = UnpairedRecord> {
    (
        text(plain, Role::User),
        text(plain, Role::Assistant),
        any::<bool>(),
    )
        .prop_map(|(prompt, completion, label)| UnpairedRecord {
            prompt,
            completion,
            label,
        })
}

fn stepwise(plain: bool) -> impl Strategy<Value = StepwiseRecord> {
    (
        text(plain, Role::User),
        prop::collection::vec((word(), any::<bool>()), 1..5),
    )
        .prop_map(|(prompt, steps)| StepwiseRecord {
            prompt,
            labels: steps.iter().map(|s| s.1).collect(),
            completions: steps.into_iter().map(|s| s.0).collect(),
        })
}

fn rated(plain: bool) -> impl Strategy<Value = RatedRecord> {
    (
        text(plain, Role::User),
        text(plain, Role::Assistant),
        prop::collection::btree_map("[a-z]{1,6}", 0.0f64..4.0, 1..4),
    )
        .prop_map(|(prompt, completion, ratings)| RatedRecord {
            prompt,
            completion,
            ratings,
        })
}

fn sft(plain: bool) -> impl Strategy<Value = SftRecord> {
    (text(plain, Role::User), text(plain, Role::Assistant)).prop_map(|(prompt, completion)| {
        SftRecord {
            prompt: Some(prompt),
            completion,
        }
    })
}

fn prompt(plain: bool) -> impl Strategy<Value = PromptRecord> {
    (text(plain, Role::User), word(), -9i64..9).prop_map(|(prompt, answer, n)| PromptRecord {
        prompt,
        fields: json!({"answer": answer, "kwargs": [{"n": n}]})
            .as_object()
            .unwrap()
            .clone(),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_kind_is_written_and_read_whole(
        a in rows(preference), b in rows(ranked), c in rows(unpaired), d in rows(stepwise),
        e in rows(rated), f in rows(sft), g in rows(prompt),
    ) {
        round_trip(&a);
        round_trip(&b);
        round_trip(&c);
        round_trip(&d);
        round_trip(&e);
        round_trip(&f);
        round_trip(&g);
    }

    /// A pair of thumbs is a pair again.
    #[test]
    fn thumbs_are_pairs_again(pairs in prop::collection::vec(preference(true), 1..6)) {
        // Pairs of one prompt may exchange their halves, so prompts are made distinct.
        let pairs: Vec<PreferenceRecord> = pairs
            .into_iter()
            .enumerate()
            .map(|(i, p)| PreferenceRecord {
                prompt: Text::Plain(format!("{i} {}", p.prompt.joined())),
                margin: None,
                ..p
            })
            .collect();
        let thumbs: Vec<UnpairedRecord> = pairs.iter().flat_map(pair_to_unpaired).collect();
        prop_assert_eq!(unpaired_to_pairs(&thumbs), pairs);
    }

    /// Every pair of a ranking is in its order, and all pairs together give the order back.
    #[test]
    fn pairs_keep_the_ranking(r in ranked(true), seed in any::<u64>()) {
        let worth = r.worth();
        let place = |t: &Text| r.completions.iter().position(|c| c == t).unwrap();
        let distinct = {
            let mut texts: Vec<String> = r.completions.iter().map(Text::joined).collect();
            texts.sort();
            texts.windows(2).all(|w| w[0] != w[1])
        };
        prop_assume!(distinct);
        for pairing in [Pairing::All, Pairing::BestVsRandom, Pairing::Adjacent] {
            let pairs: Vec<_> = ranked_to_pairs(&r, pairing, seed, 3).collect();
            for p in &pairs {
                let (c, j) = (worth[place(&p.chosen)], worth[place(&p.rejected)]);
                prop_assert!(c > j);
                prop_assert_eq!(p.margin, r.scores.as_ref().map(|_| c - j));
            }
            let unequal = (0..worth.len())
                .flat_map(|i| (0..i).map(move |j| (i, j)))
                .filter(|&(i, j)| worth[i] != worth[j])
                .count();
            match pairing {
                Pairing::All => prop_assert_eq!(pairs.len(), unequal),
                Pairing::BestVsRandom => prop_assert_eq!(pairs.len(), usize::from(unequal > 0)),
                Pairing::Adjacent => {
                    let mut levels = worth.clone();
                    levels.sort_by(f64::total_cmp);
                    levels.dedup();
                    prop_assert_eq!(pairs.len(), levels.len() - 1);
                }
            }
            prop_assert!(pairs.into_iter().eq(ranked_to_pairs(&r, pairing, seed, 3)));
        }
    }
}

fn plain(s: &str) -> Text {
    Text::Plain(s.into())
}

#[test]
fn a_scale_gives_pairs_with_its_strength() {
    let pair = |scale, v| likert_to_pair(&plain("p"), &plain("a"), &plain("b"), scale, v);
    let of = |scale, v| pair(scale, v).map(|p| (p.chosen.joined(), p.margin.unwrap()));
    assert_eq!(of(Likert::Five, 1), Some(("a".into(), 2.0)));
    assert_eq!(of(Likert::Five, 3), None);
    assert_eq!(of(Likert::Five, 4), Some(("b".into(), 1.0)));
    assert_eq!(of(Likert::Five, 6), None);
    assert_eq!(of(Likert::Eight, 4), Some(("a".into(), 0.5)));
    assert_eq!(of(Likert::Eight, 8), Some(("b".into(), 3.5)));
    assert_eq!(of(Likert::Eight, 0), None);
    assert!((1..=8).all(|v| pair(Likert::Eight, v).is_some()));
}

#[test]
fn the_random_mate_is_drawn_evenly() {
    let r = RankedRecord {
        prompt: plain("p"),
        completions: ["a", "b", "c", "d"].map(plain).to_vec(),
        scores: Some(vec![1.0, 4.0, 2.0, 3.0]),
    };
    let mut seen = BTreeMap::new();
    for row in 0..3000 {
        let pairs: Vec<_> = ranked_to_pairs(&r, Pairing::BestVsRandom, 7, row).collect();
        assert_eq!(pairs[0].chosen, plain("b"));
        *seen.entry(pairs[0].rejected.joined()).or_insert(0) += 1;
    }
    // 1000 each, standard deviation 26.
    assert!(
        seen.len() == 3 && seen.values().all(|n| (880..1120).contains(n)),
        "{seen:?}"
    );
}

#[test]
fn ratings_become_rankings_and_thumbs() {
    let rated = |p: &str, c: &str, score: f64| RatedRecord {
        prompt: plain(p),
        completion: plain(c),
        ratings: BTreeMap::from([("helpfulness".to_owned(), score)]),
    };
    let rows = [
        rated("p", "a", 1.0),
        rated("q", "b", 3.0),
        rated("p", "c", 4.0),
    ];
    let ranked = rated_to_ranked(&rows, "helpfulness");
    assert_eq!(ranked.len(), 1);
    assert_eq!(ranked[0].scores.as_deref(), Some(&[1.0, 4.0][..]));
    assert!(rated_to_ranked(&rows, "coherence").is_empty());
    assert!(
        rated_to_unpaired(&rows[1], "helpfulness", 3.0)
            .unwrap()
            .label
    );
    assert!(
        !rated_to_unpaired(&rows[0], "helpfulness", 3.0)
            .unwrap()
            .label
    );
    assert!(rated_to_unpaired(&rows[0], "coherence", 3.0).is_none());
}

fn fault<R: Record>(v: Value) -> (&'static str, String) {
    let f = R::from_row(v.as_object().unwrap().clone()).err().unwrap();
    (f.rule, f.column)
}

#[test]
fn wrong_rows_are_named() {
    let is =
        |f: (&'static str, String), rule, column: &str| assert_eq!(f, (rule, column.to_owned()));
    is(
        fault::<RankedRecord>(json!({"prompt": "p", "completions": ["a"]})),
        "too_few",
        "completions",
    );
    is(
        fault::<RankedRecord>(json!({"prompt": "p", "completions": ["a", "b"], "scores": [1]})),
        "wrong_length",
        "scores",
    );
    is(
        fault::<RankedRecord>(
            json!({"prompt": "p", "completions": ["a", "b"], "scores": [1, "NaN"]}),
        ),
        "not_finite",
        "scores",
    );
    is(
        fault::<RankedRecord>(
            json!({"prompt": "p", "completions": ["a", [{"role": "assistant", "content": "x"}]]}),
        ),
        "mixed_forms",
        "completions",
    );
    is(
        fault::<UnpairedRecord>(json!({"prompt": "p", "completion": "a", "label": "yes"})),
        "wrong_type",
        "label",
    );
    is(
        fault::<UnpairedRecord>(json!({"prompt": "p", "completion": " ", "label": true})),
        "empty",
        "completion",
    );
    is(
        fault::<StepwiseRecord>(
            json!({"prompt": "p", "completions": ["a", "b"], "labels": [true]}),
        ),
        "wrong_length",
        "labels",
    );
    is(
        fault::<StepwiseRecord>(
            json!({"prompt": "p", "completions": ["a", 3], "labels": [true, true]}),
        ),
        "wrong_type",
        "completions",
    );
    is(
        fault::<RatedRecord>(json!({"prompt": "p", "completion": "a", "ratings": {"x": "good"}})),
        "not_finite",
        "ratings",
    );
    is(
        fault::<RatedRecord>(json!({"prompt": "p", "completion": "a", "ratings": {}})),
        "empty",
        "ratings",
    );
    is(
        fault::<Annotated<UnpairedRecord>>(
            json!({"prompt": "p", "completion": "a", "label": true, "weight": -1}),
        ),
        "negative_weight",
        "weight",
    );
    is(
        fault::<Annotated<UnpairedRecord>>(
            json!({"prompt": "p", "completion": "a", "label": true, "source": {"dataset": 1}}),
        ),
        "wrong_type",
        "source",
    );
    is(
        fault::<SftRecord>(
            json!({"messages": [{"role": "assistant", "content": null, "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}),
        ),
        "wrong_type",
        "messages",
    );
    is(
        fault::<SftRecord>(
            json!({"messages": [{"role": "user", "content": "x", "tool_calls": [{"name": "f"}]}]}),
        ),
        "wrong_type",
        "messages",
    );
}

#[test]
fn tool_calls_are_read_as_openai_writes_them_and_never_lost() {
    let r = SftRecord::from_row(
        json!({"messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": null, "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{\"city\": \"Oslo\"}"}}]},
            {"role": "tool", "name": "weather", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ]})
        .as_object()
        .unwrap()
        .clone(),
    )
    .unwrap();
    let Text::Messages(m) = &r.completion else {
        panic!("plain")
    };
    assert_eq!(m[1].tool_calls[0].arguments(), r#"{"city":"Oslo"}"#);
    assert_eq!(m[2].name.as_deref(), Some("weather"));
    // TRL's plain columns do not hold them, so they are refused there.
    assert!(sft_batch(std::slice::from_ref(&r)).is_err());
    round_trip(&[r]);
}

#[test]
fn a_file_has_rows_of_one_form() {
    let a = PreferenceRecord {
        prompt: plain("p"),
        chosen: plain("c"),
        rejected: plain("r"),
        margin: None,
    };
    let turn = |role| Text::Messages(vec![Message::new(role, "x")]);
    let b = PreferenceRecord {
        prompt: turn(Role::User),
        chosen: turn(Role::Assistant),
        rejected: turn(Role::Assistant),
        margin: None,
    };
    for rows in [[a.clone(), b.clone()], [b, a]] {
        let e = batch(&schema_of(&rows[0]), &rows).unwrap_err().to_string();
        assert!(e.contains("record 1") && e.contains("another form"), "{e}");
    }
    let ranked = |prompt: Text, completion: Text| RankedRecord {
        prompt,
        completions: vec![completion.clone(), completion],
        scores: None,
    };
    // Messages where plain text was to stand, in one column or within a list.
    let plain_first = ranked(plain("p"), plain("c"));
    for other in [
        ranked(turn(Role::User), turn(Role::Assistant)),
        ranked(plain("p"), turn(Role::Assistant)),
    ] {
        let rows = [plain_first.clone(), other];
        let e = batch(&schema_of(&rows[0]), &rows).unwrap_err().to_string();
        assert!(e.contains("record 1") && e.contains("another form"), "{e}");
    }
}
