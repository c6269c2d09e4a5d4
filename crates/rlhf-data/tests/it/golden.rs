//! Tokens, trained ranges and truncation against TRL's own, read from a folder of golden files.
//!
//! What differs on purpose, and is checked to differ in this way only:
//! - a blank completion drops its row (TRL trains a lone end-of-sequence token);
//! - what follows the last trained end-of-sequence token (ChatML's line end) is no part of a completion;
//! - names of special tokens in plain text stay text;
//! - a pair that is equal after truncation drops its row;
//! - truncation from the start (`keep_end`) cuts the prompt alone: where TRL goes on to cut the
//!   completion's start, the completion loses its end instead, or the row is dropped.
//!
//! Cases without their batches say nothing of what a truncation leaves (six in each file).

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rlhf_data::conversation::{Message, Text};
use rlhf_data::group::{Finish, PromptGroup};
use rlhf_data::record::{PreferenceRecord, Record, SftRecord, pair_to_unpaired};
use rlhf_data::tokenize::{
    ChatTokenizer, DropReason, Limits, LongPrompt, Outcome, Truncation, Turns,
};
use serde_json::{Value, json};

const NO_LIMITS: Limits = Limits::new(usize::MAX, usize::MAX);

fn folder() -> PathBuf {
    std::env::var_os("RLHF_GOLDEN").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden"),
        PathBuf::from,
    )
}

struct Golden {
    file: &'static str,
    data: Value,
    tokenizer: ChatTokenizer,
}

fn files() -> Vec<Golden> {
    let dir = folder();
    assert!(
        dir.join("manifest.json").is_file(),
        "{} has no manifest.json",
        dir.display()
    );
    [
        ("g_tokenization.json", "tokenizer"),
        ("g_tokenization_bos.json", "tokenizer_bos"),
    ]
    .into_iter()
    .filter(|(file, _)| dir.join(file).is_file())
    .map(|(file, tokenizer)| Golden {
        file,
        data: serde_json::from_str(&std::fs::read_to_string(dir.join(file)).unwrap()).unwrap(),
        tokenizer: ChatTokenizer::load(&dir.join(tokenizer)).unwrap(),
    })
    .collect()
}

fn ids(v: &Value) -> Vec<u32> {
    serde_json::from_value(v.clone()).unwrap()
}

/// A data row as the reader sees it, except that blank completions are let through.
fn pair(row: &Value) -> PreferenceRecord {
    let filled = |key: &str| match &row[key] {
        Value::String(s) if s.is_empty() => json!("BLANK"),
        Value::Array(a) => {
            let mut a = a.clone();
            let last = a.last_mut().unwrap();
            if last["content"] == "" {
                last["content"] = json!("BLANK");
            }
            Value::Array(a)
        }
        other => other.clone(),
    };
    let mut map = row.as_object().unwrap().clone();
    for key in ["chosen", "rejected"] {
        map.insert(key.into(), filled(key));
    }
    let mut record = PreferenceRecord::from_row(map).unwrap();
    for text in [&mut record.chosen, &mut record.rejected] {
        match text {
            Text::Plain(s) if s == "BLANK" => s.clear(),
            Text::Messages(m) => {
                for m in m.iter_mut().filter(|m| m.content == "BLANK") {
                    m.content.clear();
                }
            }
            Text::Plain(_) => {}
        }
    }
    record
}

fn names_special(t: &ChatTokenizer, text: &Text) -> bool {
    let text = text.joined();
    t.special_tokens().iter().any(|s| text.contains(s.as_str()))
}

/// Each completion of plain text has one end-of-sequence token, at its end.
fn assert_only_the_end(t: &ChatTokenizer, group: &PromptGroup) {
    for c in &group.completions {
        let ends: Vec<usize> = (0..c.ids.len())
            .filter(|i| t.eos_ids().contains(&c.ids[*i]))
            .collect();
        assert_eq!(ends, [c.ids.len() - 1], "row {}", group.row);
    }
}

/// Up to the last end-of-sequence token.
fn ended<'a>(t: &ChatTokenizer, ids: &'a [u32]) -> &'a [u32] {
    let end = ids.iter().rposition(|i| t.eos_ids().contains(i));
    &ids[..end.map_or(ids.len(), |e| e + 1)]
}

fn row_of(case: &Value, row: usize) -> Option<&Value> {
    case["rows"]
        .as_array()
        .unwrap()
        .iter()
        .find(|r| r["row"].as_u64() == Some(row as u64))
}

fn dropped(case: &Value, row: usize) -> bool {
    case["dropped_rows"]
        .as_array()
        .unwrap()
        .contains(&json!(row))
}

/// One side of a pair as it stands in the peer's batch of four, without padding: ids, and which are
/// trained. The first half of a batch are chosen, the others rejected.
fn in_batch(case: &Value, row: usize, side: usize) -> (Vec<u32>, Vec<bool>) {
    let batch = &case["batches_of_4"][row / 4];
    let half = batch["input_ids"].as_array().unwrap().len() / 2;
    let at = row % 4 + side * half;
    let column = |name: &str| serde_json::from_value::<Vec<u32>>(batch[name][at].clone()).unwrap();
    let real = column("attention_mask").iter().sum::<u32>() as usize;
    let trained = column("completion_mask").into_iter().take(real);
    (
        column("input_ids")[..real].to_vec(),
        trained.map(|m| m == 1).collect(),
    )
}

/// A row that the peer cuts from the start, to `limit` tokens of prompt and completion together.
struct Cut<'a> {
    whole: &'a PromptGroup,
    side: usize,
    /// The peer's completion, with what follows its end.
    completion: usize,
    limit: usize,
}

impl Cut<'_> {
    fn check(
        &self,
        t: &ChatTokenizer,
        (peer, trained): &(Vec<u32>, Vec<bool>),
        group: impl Fn(&Limits) -> Outcome<PromptGroup>,
    ) {
        let limits = |prompt: usize, completion: usize| Limits {
            truncation: Truncation {
                prompt: LongPrompt::KeepEnd,
                ..Truncation::default()
            },
            ..Limits::new(prompt, completion)
        };
        let row = self.whole.row;
        let own = &self.whole.completions[self.side].ids;
        if self.completion < self.limit || self.whole.prompt.len() + self.completion <= self.limit {
            // Room for the completion and some of the prompt: the same tokens.
            let room = self.limit.saturating_sub(self.completion);
            let (Outcome::Kept(got) | Outcome::Truncated(got)) = group(&limits(room, usize::MAX))
            else {
                panic!("row {row}: dropped")
            };
            let c = &got.completions[self.side];
            let all = [got.prompt.clone(), c.ids.clone()].concat();
            assert_eq!(all, peer[..all.len()], "row {row}");
            let mut own = vec![false; all.len()];
            for at in c.trained.iter().cloned().flatten() {
                own[got.prompt.len() + at] = true;
            }
            assert_eq!(own, trained[..all.len()], "row {row}");
            let beyond = &peer[all.len()..];
            assert!(
                beyond.len() <= 1 && beyond.iter().all(|b| !t.eos_ids().contains(b)),
                "row {row}: {beyond:?} is missing"
            );
            return;
        }
        // The peer trains the end of a completion after no prompt at all; here its start stays, after
        // the prompt's end.
        assert!(
            peer.len() == self.limit && !own.starts_with(peer),
            "row {row}"
        );
        let half = self.limit / 2;
        if let Outcome::Kept(got) | Outcome::Truncated(got) = group(&limits(half, half)) {
            let prompt = &self.whole.prompt;
            let kept = prompt.len().min(half);
            assert_eq!(got.prompt, prompt[prompt.len() - kept..], "row {row}");
            assert_eq!(
                got.completions[self.side].ids,
                own[..own.len().min(half)],
                "row {row}"
            );
        }
    }
}

/// DPO and reward rows; `false` when the case asks for something not offered.
fn preference(t: &ChatTokenizer, case: &Value, data: &Value) -> bool {
    let limit = case["max_length"].as_u64().map(|n| n as usize);
    let keeps_end = case["truncation_mode"] == "keep_end";
    // Only the batches show what is left of a pair.
    if limit.is_some() && keeps_end && case.get("batches_of_4").is_none() {
        return false;
    }
    for (i, row) in data.as_array().unwrap().iter().enumerate() {
        let record = pair(row);
        if record.chosen.is_blank() || record.rejected.is_blank() {
            let outcome = t.preference_group(i as u64, &record, &NO_LIMITS).unwrap();
            assert_eq!(outcome, Outcome::Dropped(DropReason::EmptyCompletion));
            continue;
        }
        let Outcome::Kept(whole) = t.preference_group(i as u64, &record, &NO_LIMITS).unwrap()
        else {
            panic!("row {i} is not kept")
        };
        if [&record.prompt, &record.chosen, &record.rejected]
            .iter()
            .any(|x| names_special(t, x))
        {
            assert_only_the_end(t, &whole);
            continue;
        }
        if let Some(l) = limit.filter(|_| keeps_end) {
            let want = row_of(case, i).unwrap();
            for (side, key) in ["chosen_ids", "rejected_ids"].iter().enumerate() {
                let cut = Cut {
                    whole: &whole,
                    side,
                    completion: ids(&want[*key]).len(),
                    limit: l,
                };
                let peer = in_batch(case, i, side);
                cut.check(t, &peer, |limits| {
                    t.preference_group(i as u64, &record, limits).unwrap()
                });
            }
            continue;
        }
        let limits = limit.map_or(NO_LIMITS, |l| {
            Limits::new(l - 1, l.saturating_sub(whole.prompt.len()).max(1))
        });
        let got = t.preference_group(i as u64, &record, &limits).unwrap();
        if dropped(case, i) {
            // TRL's reward trainer drops what is too long; here it is cut, unless it is the prompt.
            let fine = match case["trainer"].as_str() {
                Some("reward") => !matches!(got, Outcome::Kept(_)),
                _ => got == Outcome::Dropped(DropReason::PromptTooLong),
            };
            assert!(fine, "row {i}: {got:?}");
            continue;
        }
        let want = row_of(case, i).unwrap();
        if case["trainer"] == "reward" {
            for (c, key) in whole.completions.iter().zip(["chosen_ids", "rejected_ids"]) {
                let full = [whole.prompt.clone(), c.ids.clone()].concat();
                assert_eq!(full, ended(t, &ids(&want[key])), "row {i} {key}");
            }
            continue;
        }
        assert_eq!(whole.prompt, ids(&want["prompt_ids"]), "row {i} prompt");
        let completions: Vec<Vec<u32>> = ["chosen_ids", "rejected_ids"]
            .iter()
            .map(|key| {
                let mut c = ended(t, &ids(&want[*key])).to_vec();
                c.truncate(limits.max_completion);
                c
            })
            .collect();
        if completions[0] == completions[1] {
            assert_eq!(got, Outcome::Dropped(DropReason::Identical));
            continue;
        }
        let (Outcome::Kept(group) | Outcome::Truncated(group)) = got else {
            panic!("row {i}: {got:?}")
        };
        for (c, want) in group.completions.iter().zip(&completions) {
            assert_eq!(&c.ids, want, "row {i}");
            let ends = t.eos_ids().contains(want.last().unwrap());
            assert_eq!(c.finish == Finish::Stop, ends);
        }
    }
    true
}

/// A group as TRL's `input_ids` and `labels`.
fn labelled(group: &PromptGroup) -> (Vec<u32>, Vec<i64>) {
    let c = &group.completions[0];
    let mut labels = vec![-100; group.prompt.len() + c.ids.len()];
    for at in c.trained.iter().cloned().flatten() {
        labels[group.prompt.len() + at] = i64::from(c.ids[at]);
    }
    ([group.prompt.clone(), c.ids.clone()].concat(), labels)
}

/// SFT rows; `false` when the case asks for something not offered.
fn sft(t: &ChatTokenizer, case: &Value, data: &Value) -> bool {
    let flag = |key: &str| case[key].as_bool().unwrap();
    let (completion_only, assistant_only) =
        (flag("completion_only_loss"), flag("assistant_only_loss"));
    let variant = case["variant"].as_str().unwrap();
    let chat = matches!(variant, "prompt_completion_chat" | "messages");
    let limit = case["max_length"].as_u64().map(|n| n as usize);
    let everything = chat && !completion_only && !assistant_only;
    let turns = if everything {
        Turns::Everything
    } else {
        Turns::Last
    };
    let t = &t.clone().with_turns(turns);
    let keeps_end = case["truncation_mode"] == "keep_end";
    let source = if chat {
        &data["conversational_explicit"]
    } else {
        &data["plain"]
    };
    for (i, row) in source.as_array().unwrap().iter().enumerate() {
        let pair = pair(row);
        let whole = match (&pair.prompt, &pair.chosen) {
            (Text::Messages(p), Text::Messages(c)) => {
                Text::Messages([p.clone(), c.clone()].concat())
            }
            (Text::Plain(p), Text::Plain(c)) => Text::Plain(format!("{p}{c}")),
            _ => panic!("forms differ"),
        };
        let record = if completion_only {
            SftRecord {
                prompt: Some(pair.prompt),
                completion: pair.chosen,
            }
        } else {
            SftRecord {
                prompt: None,
                completion: whole,
            }
        };
        let Outcome::Kept(whole) = t.sft_group(i as u64, &record, &NO_LIMITS).unwrap() else {
            panic!("row {i} is not kept")
        };
        if record
            .prompt
            .iter()
            .chain([&record.completion])
            .any(|x| names_special(t, x))
        {
            assert_only_the_end(t, &whole);
            continue;
        }
        if let Some(l) = limit.filter(|_| keeps_end) {
            let want = row_of(case, i).unwrap();
            let peer = ids(&want["input_ids"]);
            let trained: Vec<i64> = serde_json::from_value(want["labels"].clone()).unwrap();
            let trained = trained.iter().map(|l| *l != -100).collect();
            let cut = Cut {
                whole: &whole,
                side: 0,
                completion: whole.completions[0].ids.len() + peer.len() - ended(t, &peer).len(),
                limit: l,
            };
            cut.check(t, &(peer, trained), |limits| {
                t.sft_group(i as u64, &record, limits).unwrap()
            });
            continue;
        }
        let limits = limit.map_or(NO_LIMITS, |l| {
            Limits::new(l - 1, l.saturating_sub(whole.prompt.len()).max(1))
        });
        let got = t.sft_group(i as u64, &record, &limits).unwrap();
        if dropped(case, i) {
            assert_eq!(got, Outcome::Dropped(DropReason::PromptTooLong), "row {i}");
            continue;
        }
        let (Outcome::Kept(group) | Outcome::Truncated(group)) = got else {
            panic!("row {i}: {got:?}")
        };
        let want = row_of(case, i).unwrap();
        let (want_ids, want_labels) = (ids(&want["input_ids"]), &want["labels"]);
        let want_labels: Vec<i64> = serde_json::from_value(want_labels.clone()).unwrap();
        let (got_ids, got_labels) = labelled(&group);
        let n = got_ids.len();
        assert_eq!(got_ids, want_ids[..n], "row {i} ids");
        assert_eq!(got_labels, want_labels[..n], "row {i} labels");
        let beyond = &want_ids[n..];
        assert!(
            beyond.len() <= 1 && beyond.iter().all(|b| !t.eos_ids().contains(b)),
            "row {i}: {beyond:?} is missing"
        );
    }
    true
}

/// KTO's rows: the chosen completions, then the rejected ones.
fn kto(t: &ChatTokenizer, case: &Value, data: &Value) -> bool {
    let data = data.as_array().unwrap();
    for (i, want) in case["rows"].as_array().unwrap().iter().enumerate() {
        let [up, down] = pair_to_unpaired(&pair(&data[i % data.len()]));
        let thumb = if i < data.len() { up } else { down };
        assert_eq!(want["label"], thumb.label, "row {i}");
        let (prompt, completion) = (ids(&want["prompt_ids"]), ids(&want["completion_ids"]));
        let special = names_special(t, &thumb.prompt) || names_special(t, &thumb.completion);
        let record = SftRecord {
            prompt: Some(thumb.prompt),
            completion: thumb.completion,
        };
        let got = t.sft_group(i as u64, &record, &NO_LIMITS).unwrap();
        if record.completion.is_blank() {
            assert_eq!(got, Outcome::Dropped(DropReason::EmptyCompletion));
            continue;
        }
        let Outcome::Kept(got) = got else {
            panic!("row {i} is not kept")
        };
        if special {
            assert_only_the_end(t, &got);
            continue;
        }
        assert_eq!(got.prompt, prompt, "row {i} prompt");
        assert_eq!(got.completions[0].ids, ended(t, &completion), "row {i}");
        let all = 0..got.completions[0].ids.len();
        assert_eq!(got.completions[0].trained, [all], "row {i}");
    }
    true
}

#[test]
fn g_tokenization_cases() {
    let (mut ran, mut unknown) = (0, BTreeMap::<String, usize>::new());
    for g in files() {
        for case in g.data["cases"].as_array().unwrap() {
            let name = [
                "trainer",
                "strategy",
                "data",
                "variant",
                "truncation_mode",
                "max_length",
            ]
            .iter()
            .filter_map(|k| case.get(*k).filter(|v| !v.is_null()).map(Value::to_string))
            .chain(
                ["completion_only_loss", "assistant_only_loss"]
                    .iter()
                    .filter(|k| case[**k] == true)
                    .map(|k| (*k).to_owned()),
            )
            .collect::<Vec<_>>()
            .join(" ");
            let known = match case["trainer"].as_str().unwrap() {
                "dpo" | "reward" => {
                    let data = &g.data["data"][case["data"].as_str().unwrap()];
                    preference(&g.tokenizer, case, data)
                }
                "sft" => sft(&g.tokenizer, case, &g.data["data"]),
                "kto" => {
                    let data = &g.data["data"][case["data"].as_str().unwrap()];
                    kto(&g.tokenizer, case, data)
                }
                _ => false,
            };
            if known {
                ran += 1;
            } else {
                *unknown.entry(format!("{}: {name}", g.file)).or_default() += 1;
            }
        }
    }
    println!(
        "{ran} cases ran; {} unknown:",
        unknown.values().sum::<usize>()
    );
    unknown
        .iter()
        .for_each(|(name, n)| println!("  {n} × {name}"));
    assert!(ran > 0);
    // TRL's packing joins rows into sequences; here a pack keeps its rows apart (docs/data.md).
    let expected = |name: &String| name.contains("\"packing\"") || name.contains("\"keep_end\"");
    assert!(unknown.keys().all(expected), "{unknown:?}");
}

#[test]
fn g_tokenization_texts() {
    let mut ran = 0;
    for g in files() {
        let t = &g.tokenizer;
        for case in g.data["raw_tokenization"].as_array().unwrap() {
            let text = case["text"].as_str().unwrap();
            let got = t.encode(text).unwrap();
            if t.special_tokens().iter().any(|s| text.contains(s.as_str())) {
                let begin = t.encode("").unwrap().len();
                let special = g.data["special"].as_object().unwrap();
                assert!(
                    special
                        .values()
                        .all(|id| !got[begin..].contains(&(id.as_u64().unwrap() as u32))),
                    "{text:?} is plain text"
                );
            } else {
                assert_eq!(got, ids(&case["ids"]), "{text:?}");
                assert_eq!(t.decode(&got, false).unwrap(), case["decoded"], "{text:?}");
            }
            ran += 1;
        }
        for case in g.data["chat_rendered"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(case["messages"].clone()).unwrap();
            let add = case["add_generation_prompt"].as_bool().unwrap();
            let rendered = t.template().unwrap().render(&messages, add).unwrap();
            assert_eq!(rendered.text, case["text"].as_str().unwrap());
            if add {
                assert_eq!(
                    t.prompt_ids(&Text::Messages(messages)).unwrap(),
                    ids(&case["ids"])
                );
            }
            ran += 1;
        }
    }
    println!("{ran} texts");
    assert!(ran > 0);
}
