//! Properties: what is written is read back; tokens keep the text, the prefix and the trained turns.

use std::path::Path;

use proptest::prelude::*;
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::record::{
    PreferenceRecord, PromptRecord, SftRecord, preference_batch, prompt_batch, sft_batch,
};
use rlhf_data::source::{self, JsonlOut, ParquetOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits, Outcome};
use serde_json::{Map, Value};

const LIMITS: Limits = Limits::new(usize::MAX, usize::MAX);

/// Text with whatever Unicode has, the names of special tokens, and white space; never blank.
fn text() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Z ,.?!]{1,12}",
        1 => any::<String>(),
        1 => Just("<|im_end|>".to_owned()),
        1 => Just("<|im_start|>assistant\n".to_owned()),
        1 => Just("<|endoftext|>".to_owned()),
        1 => Just(" \n\t".to_owned()),
    ];
    prop::collection::vec(piece, 1..6)
        .prop_map(|v| v.concat())
        .prop_filter("blank, or a reserved mark", |s| {
            !s.trim().is_empty() && !s.contains(['\u{f0a11}', '\u{f0a12}', '\u{f0a13}'])
        })
}

fn message(role: Role) -> impl Strategy<Value = Message> {
    text().prop_map(move |content| Message::new(role, content))
}

fn prompt() -> impl Strategy<Value = Vec<Message>> {
    (
        prop::option::of(message(Role::System)),
        prop::collection::vec((message(Role::User), message(Role::Assistant)), 0..3),
        message(Role::User),
    )
        .prop_map(|(system, turns, last)| {
            let turns = turns.into_iter().flat_map(|(u, a)| [u, a]);
            system.into_iter().chain(turns).chain([last]).collect()
        })
}

fn form(plain: bool, role: Role) -> BoxedStrategy<Text> {
    if plain {
        text().prop_map(Text::Plain).boxed()
    } else if role == Role::User {
        prompt().prop_map(Text::Messages).boxed()
    } else {
        message(role).prop_map(|m| Text::Messages(vec![m])).boxed()
    }
}

fn preference(plain: bool) -> impl Strategy<Value = PreferenceRecord> {
    (
        form(plain, Role::User),
        form(plain, Role::Assistant),
        form(plain, Role::Assistant),
        prop::option::of(-1e6..1e6f64),
    )
        .prop_map(|(prompt, chosen, rejected, margin)| PreferenceRecord {
            prompt,
            chosen,
            rejected,
            margin,
        })
}

fn fields() -> impl Strategy<Value = Map<String, Value>> {
    let value = prop_oneof![
        any::<i64>().prop_map(Value::from),
        any::<bool>().prop_map(Value::from),
        any::<String>().prop_map(Value::from),
        Just(Value::Null),
    ];
    prop::collection::vec(("[a-z]{1,6}", value), 0..4).prop_map(|v| {
        v.into_iter()
            .filter(|(k, _)| k != "prompt" && k != "fields")
            .collect()
    })
}

fn tokenizer(name: &str) -> ChatTokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    ChatTokenizer::load(&dir.join(name)).unwrap()
}

fn through_jsonl<R: rlhf_data::record::Record + serde::Serialize + 'static>(rows: &[R]) -> Vec<R> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.jsonl");
    let mut out = JsonlOut::create(&path).unwrap();
    rows.iter().for_each(|r| out.write(r).unwrap());
    out.finish().unwrap();
    source::read(&path).unwrap().map(Result::unwrap).collect()
}

fn through_parquet<R: rlhf_data::record::Record + 'static>(
    batch: &arrow_array::RecordBatch,
) -> Vec<R> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.parquet");
    let mut out = ParquetOut::create(&path, batch.schema()).unwrap();
    out.write(batch).unwrap();
    out.finish().unwrap();
    source::read(&path).unwrap().map(Result::unwrap).collect()
}

fn folder(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// What a conversation shares with its prompt is tokenised once; the ids are those of the whole text,
    /// encoded piece by piece by a tokenizer that knows nothing of this.
    #[test]
    fn shared_beginnings_change_no_id(p in prompt(), a in message(Role::Assistant), b in message(Role::Assistant)) {
        for dir in ["tests/golden/tokenizer", "tests/golden/tokenizer_bos", "../../datasets/help/tokenizer"] {
            let t = ChatTokenizer::load(&folder(dir)).unwrap();
            let bare = tokenizers::Tokenizer::from_file(folder(dir).join("tokenizer.json")).unwrap();
            let ids = |messages: &[Message], open: bool| {
                let r = t.template().unwrap().render(messages, open).unwrap();
                let mut bounds = vec![0];
                bounds.extend(&r.cuts);
                bounds.push(r.text.len());
                bounds
                    .windows(2)
                    .flat_map(|w| bare.encode(&r.text[w[0]..w[1]], false).unwrap().get_ids().to_vec())
                    .collect::<Vec<u32>>()
            };
            let record = PreferenceRecord {
                prompt: Text::Messages(p.clone()),
                chosen: Text::Messages(vec![a.clone()]),
                rejected: Text::Messages(vec![b.clone()]),
                margin: None,
            };
            prop_assert_eq!(t.prompt_ids(&record.prompt).unwrap(), ids(&p, true));
            if let Outcome::Kept(g) = t.preference_group(0, &record, &LIMITS).unwrap() {
                for (c, m) in g.completions.iter().zip([&a, &b]) {
                    let whole = ids(&[p.clone(), vec![m.clone()]].concat(), false);
                    let own = [g.prompt.clone(), c.ids.clone()].concat();
                    prop_assert!(whole.starts_with(&own), "{:?} {:?}", whole, own);
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn preferences_survive_files(
        plain in prop::collection::vec(preference(true), 1..5),
        chat in prop::collection::vec(preference(false), 1..5),
    ) {
        prop_assert_eq!(&through_jsonl(&plain), &plain);
        prop_assert_eq!(&through_jsonl(&chat), &chat);
        prop_assert_eq!(&through_parquet::<PreferenceRecord>(&preference_batch(&chat).unwrap()), &chat);
    }

    #[test]
    fn demonstrations_survive_files(p in prompt(), a in message(Role::Assistant), t in text()) {
        let whole = [p.clone(), vec![a.clone()]].concat();
        let rows = [
            SftRecord { prompt: None, completion: Text::Messages(whole) },
            SftRecord { prompt: None, completion: Text::Plain(t.clone()) },
            SftRecord { prompt: Some(Text::Plain(t.clone())), completion: Text::Plain(t) },
            SftRecord { prompt: Some(Text::Messages(p)), completion: Text::Messages(vec![a]) },
        ];
        prop_assert_eq!(&through_jsonl(&rows)[..], &rows[..]);
        prop_assert_eq!(&through_parquet::<SftRecord>(&sft_batch(&rows[..1]).unwrap())[..], &rows[..1]);
    }

    #[test]
    fn prompts_survive_files(p in prompt(), fields in fields()) {
        let rows = [PromptRecord { prompt: Text::Messages(p), fields }];
        prop_assert_eq!(&through_jsonl(&rows)[..], &rows[..]);
        prop_assert_eq!(&through_parquet::<PromptRecord>(&prompt_batch(&rows).unwrap())[..], &rows[..]);
    }

    #[test]
    fn tokens_keep_text_prefix_and_turns(r in preference(false), bos in any::<bool>()) {
        let t = tokenizer(if bos { "tokenizer_bos" } else { "tokenizer" });
        let end = t.eos_ids()[0];
        let Text::Messages(turns) = &r.prompt else { unreachable!() };
        let prompt = t.prompt_ids(&r.prompt).unwrap();
        // One end a turn, whatever the turns say.
        prop_assert_eq!(prompt.iter().filter(|i| **i == end).count(), turns.len());
        // The other tokenizer has no decoder.
        if !bos {
            let text = t.decode(&prompt, false).unwrap();
            for m in turns {
                prop_assert!(text.contains(&m.content));
            }
        }
        match t.preference_group(3, &r, &LIMITS).unwrap() {
            Outcome::Kept(g) => {
                g.validate().unwrap();
                prop_assert_eq!(&g.prompt, &prompt);
                for (c, want) in g.completions.iter().zip([&r.chosen, &r.rejected]) {
                    if !bos {
                        prop_assert_eq!(t.decode(&c.ids, false).unwrap(), want.joined() + "<|im_end|>");
                    }
                    prop_assert_eq!(c.ids.iter().filter(|i| **i == end).count(), 1);
                    prop_assert_eq!(c.trained_tokens(), c.ids.len());
                }
            }
            Outcome::Dropped(reason) => {
                // A completion that begins with a line end may join the prompt's last token.
                let joins = [&r.chosen, &r.rejected].iter().any(|c| c.joined().starts_with(char::is_whitespace));
                prop_assert!(r.chosen == r.rejected || joins, "{}", reason);
            }
            Outcome::Truncated(_) => prop_assert!(false, "nothing is too long"),
        }
    }

    #[test]
    fn cut_completions_keep_a_token_and_no_false_end(r in preference(true), longest in 1usize..8) {
        let t = tokenizer("tokenizer");
        let limits = Limits { max_completion: longest, ..LIMITS };
        let (Outcome::Kept(whole) | Outcome::Truncated(whole)) = t.preference_group(0, &r, &LIMITS).unwrap() else {
            return Ok(());
        };
        if let Outcome::Kept(g) | Outcome::Truncated(g) = t.preference_group(0, &r, &limits).unwrap() {
            g.validate().unwrap();
            for (c, w) in g.completions.iter().zip(&whole.completions) {
                prop_assert!(!c.ids.is_empty() && c.ids.len() <= longest);
                prop_assert_eq!(&c.ids[..], &w.ids[..c.ids.len()]);
            }
        }
    }
}
