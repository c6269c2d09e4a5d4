//! What is kept is given back; what it depends on is in its key; damage is noticed.

use std::path::Path;

use proptest::prelude::*;
use rlhf_data::cache::{CacheKey, TokenCache};
use rlhf_data::group::{Completion, Finish, PromptGroup};
use rlhf_data::record::SftRecord;
use rlhf_data::source;
use rlhf_data::tokenize::{ChatTokenizer, Limits, LongPrompt, TokenizeReport, Truncation, Turns};

fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer"))
        .unwrap()
}

/// A file of two demonstrations, and the key of its rows.
fn data(dir: &Path) -> std::path::PathBuf {
    let path = dir.join("a.jsonl");
    let row = |a: &str| {
        format!(
            r#"{{"messages": [{{"role": "user", "content": "hi"}}, {{"role": "assistant", "content": "{a}"}}]}}"#
        )
    };
    std::fs::write(&path, format!("{}\n{}\n", row("one"), row("two words"))).unwrap();
    path
}

fn key(path: &Path) -> CacheKey {
    CacheKey::new(path, "sft", None, &tokenizer(), &Limits::new(9, 9)).unwrap()
}

fn groups() -> impl Strategy<Value = Vec<PromptGroup>> {
    let finish = prop::sample::select(vec![Finish::Stop, Finish::Length, Finish::Cut]);
    let completion = (
        prop::collection::vec(any::<u32>(), 1..9),
        finish,
        any::<bool>(),
    )
        .prop_map(|(ids, finish, split)| {
            let n = ids.len();
            Completion {
                trained: if split && n > 2 {
                    vec![0..1, 2..n]
                } else {
                    std::iter::once(0..n).collect()
                },
                ids,
                finish,
                sampler: None,
            }
        });
    let group = (
        any::<u64>(),
        prop::collection::vec(any::<u32>(), 0..9),
        prop::collection::vec(completion, 1..4),
    )
        .prop_map(|(row, prompt, completions)| PromptGroup {
            row,
            prompt,
            completions,
        });
    prop::collection::vec(group, 0..20)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn what_is_put_is_got(all in groups(), truncated in 0usize..9) {
        let dir = tempfile::tempdir().unwrap();
        let cache = TokenCache::new(dir.path().join("cache"));
        let key = key(&data(dir.path()));
        prop_assert!(cache.get(&key).unwrap().is_none());
        let report = TokenizeReport { truncated, ..TokenizeReport::default() };
        cache.put(&key, &all, &report).unwrap();
        let (back, said) = cache.get(&key).unwrap().unwrap();
        prop_assert_eq!(said, report);
        prop_assert_eq!(back.map(Result::unwrap).collect::<Vec<_>>(), all.clone());
        // Log-probs of a reference, one a token.
        let values: Vec<Vec<f32>> = all
            .iter()
            .flat_map(|g| &g.completions)
            .map(|c| c.ids.iter().map(|i| -(*i as f32) / 7.0).collect())
            .collect();
        prop_assert!(cache.get_column(&key, "ref-1").unwrap().is_none());
        cache.put_column(&key, "ref-1", &values).unwrap();
        prop_assert_eq!(cache.get_column(&key, "ref-1").unwrap().unwrap(), values);
        prop_assert!(cache.put_column(&key, "../x", &[]).is_err());
    }
}

#[test]
fn a_key_holds_all_that_tokens_depend_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = data(dir.path());
    let t = tokenizer();
    let l = Limits::new(9, 9);
    let of = |t: &ChatTokenizer, kind, limit, l: &Limits| {
        CacheKey::new(&path, kind, limit, t, l).unwrap()
    };
    let base = of(&t, "sft", None, &l);
    assert_eq!(base, of(&tokenizer(), "sft", None, &l), "the same again");
    let other_tokenizer = ChatTokenizer::load(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer_bos"),
    )
    .unwrap();
    let policy = Limits {
        truncation: Truncation {
            prompt: LongPrompt::KeepEnd,
            ..Truncation::default()
        },
        ..l
    };
    let mut keys = vec![
        base,
        of(&other_tokenizer, "sft", None, &l),
        of(&t.clone().with_turns(Turns::All), "sft", None, &l),
        of(&t, "preference", None, &l),
        of(&t, "sft", Some(1), &l),
        of(&t, "sft", None, &Limits::new(9, 8)),
        of(&t, "sft", None, &policy),
    ];
    // One byte of the data.
    let mut bytes = std::fs::read(&path).unwrap();
    let at = bytes.len() - 8;
    bytes[at] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    keys.push(of(&t, "sft", None, &l));
    // The template alone.
    let own = dir.path().join("tokenizer");
    std::fs::create_dir(&own).unwrap();
    for name in [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ] {
        let from = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/golden/tokenizer")
            .join(name);
        std::fs::copy(from, own.join(name)).unwrap();
    }
    let copy = of(&ChatTokenizer::load(&own).unwrap(), "sft", None, &l);
    assert_eq!(copy, keys[7], "a copied folder is the same");
    let template = own.join("chat_template.jinja");
    let text = std::fs::read_to_string(&template).unwrap();
    std::fs::write(&template, text + "{# #}").unwrap();
    keys.push(of(&ChatTokenizer::load(&own).unwrap(), "sft", None, &l));
    // A date is part of it only where the template asks for the day.
    let dated = |day| {
        ChatTokenizer::load_dated(&own, (2024, 7, day))
            .unwrap()
            .fingerprint()
    };
    assert_eq!(dated(1), dated(2));
    std::fs::write(&template, "{{ strftime_now('%d') }}").unwrap();
    assert_ne!(dated(1), dated(2));
    for i in 0..keys.len() {
        for j in 0..i {
            assert_ne!(keys[i], keys[j], "{i} and {j}");
        }
    }
}

#[test]
fn damage_is_a_miss_or_an_error_and_never_other_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let path = data(dir.path());
    let cache = TokenCache::new(dir.path());
    let key = key(&path);
    let records: Vec<SftRecord> = source::read_sft(&path)
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let (groups, report) = tokenizer()
        .sft_groups(&records, &Limits::new(99, 99))
        .unwrap();
    cache.put(&key, &groups, &report).unwrap();
    let file = dir.path().join(format!("{}.parquet", key.as_str()));
    let whole = std::fs::read(&file).unwrap();
    let (mut missed, mut refused) = (0, 0);
    for at in 0..whole.len() {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x15;
        // A new file, as our writers make one: a mapped file must not change.
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, bytes).unwrap();
        match cache.get(&key).unwrap() {
            None => missed += 1,
            Some((back, _)) => match back.collect::<rlhf_data::Result<Vec<_>>>() {
                Ok(back) => assert_eq!(back, groups, "byte {at}"),
                Err(e) => {
                    refused += 1;
                    assert!(e.to_string().contains("remove the file"), "{e}");
                }
            },
        }
    }
    assert!(missed > 0 && refused > 0, "{missed} {refused}");
    std::fs::remove_file(&file).unwrap();
    std::fs::write(&file, &whole[..whole.len() / 2]).unwrap();
    assert!(cache.get(&key).unwrap().is_none());
}

/// What is written as it is made is what is written at once.
#[test]
fn streamed_groups_are_the_same_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = data(dir.path());
    let (key, t, limits) = (key(&path), tokenizer(), Limits::new(9, 9));
    let records: Vec<SftRecord> = source::read_sft(&path)
        .unwrap()
        .collect::<Result<_, _>>()
        .unwrap();
    let (groups, report) = t.sft_groups(&records, &limits).unwrap();
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    TokenCache::new(&whole).put(&key, &groups, &report).unwrap();

    let cache = TokenCache::new(&parts);
    let mut stream = t.sft_stream(source::read_sft(&path).unwrap(), &limits);
    let mut writer = cache.writer(&key).unwrap();
    for group in stream.by_ref() {
        writer.push(group.unwrap()).unwrap();
    }
    assert!(cache.get(&key).unwrap().is_none(), "before it is finished");
    writer.finish(stream.report()).unwrap();
    let (cached, said) = cache.get(&key).unwrap().unwrap();
    assert_eq!(cached.collect::<Result<Vec<_>, _>>().unwrap(), groups);
    assert_eq!(said, report);
    let name = format!("{}.parquet", key.as_str());
    let read = |dir: &Path| std::fs::read(dir.join(&name)).unwrap();
    assert_eq!(read(&whole), read(&parts));
}
