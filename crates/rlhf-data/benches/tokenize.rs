//! Chat pairs to groups, beside the bound: the bare tokenizer on the same text.
//!
//! `RLHF_BENCH_PAIRS` names a file of pairs and `RLHF_BENCH_TOKENIZER` a tokenizer's folder, where those
//! of the benchmark are not wanted.
#![allow(missing_docs, reason = "criterion writes the entry point")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark")]

use std::path::PathBuf;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rlhf_data::cache::{CacheKey, TokenCache};
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::pack::{PackedBatch, filled_batches};
use rlhf_data::record::{PreferenceRecord, preference_batch, preference_schema};
use rlhf_data::source::{self, ParquetOut};
use rlhf_data::tokenize::{ChatTokenizer, Limits};

fn pairs(n: usize) -> Vec<PreferenceRecord> {
    let stream = rlhf_data::seed::Stream::new(1, rlhf_data::seed::Purpose::Synth);
    let words = [
        "order", "reply", "thank", "please", "number", "today", "parcel", "café", "two",
    ];
    let say = |row: u64, part: u32, length: u32| {
        (0..length)
            .map(|i| words[stream.below(words.len() as u64, row, part, i) as usize])
            .collect::<Vec<_>>()
            .join(" ")
    };
    let turn = |role, content| vec![Message::new(role, content)];
    (0..n as u64)
        .map(|row| PreferenceRecord {
            prompt: Text::Messages(turn(Role::User, say(row, 0, 40))),
            chosen: Text::Messages(turn(Role::Assistant, say(row, 1, 80))),
            rejected: Text::Messages(turn(Role::Assistant, say(row, 2, 60))),
            margin: None,
        })
        .collect()
}

/// Every conversation of the pairs as its template writes it: what a bare tokenizer would be given.
fn rendered(t: &ChatTokenizer, records: &[PreferenceRecord]) -> Vec<String> {
    let messages = |text: &Text| match text {
        Text::Messages(m) => m.clone(),
        Text::Plain(_) => Vec::new(),
    };
    records
        .iter()
        .flat_map(|r| [(&r.prompt, &r.chosen), (&r.prompt, &r.rejected)])
        .map(|(p, c)| {
            let all = [messages(p), messages(c)].concat();
            t.template().unwrap().render(&all, false).unwrap().text
        })
        .collect()
}

fn tokenize(c: &mut Criterion) {
    let shipped = concat!(env!("CARGO_MANIFEST_DIR"), "/../../datasets/help/tokenizer");
    let dir =
        std::env::var_os("RLHF_BENCH_TOKENIZER").map_or_else(|| shipped.into(), PathBuf::from);
    let t = ChatTokenizer::load(&dir).unwrap();
    let bare = tokenizers::Tokenizer::from_file(dir.join("tokenizer.json")).unwrap();
    let records = std::env::var_os("RLHF_BENCH_PAIRS").map_or_else(
        || pairs(10_000),
        |file| {
            let rows = source::read_preference(file.as_ref()).unwrap();
            rows.collect::<Result<_, _>>().unwrap()
        },
    );
    let texts = rendered(&t, &records);
    let limits = Limits::new(4096, 4096);
    let work = tempfile::tempdir().unwrap();
    let file = work.path().join("pairs.parquet");
    let mut out = ParquetOut::create(&file, preference_schema()).unwrap();
    out.write(&preference_batch(&records).unwrap()).unwrap();
    out.finish().unwrap();

    let mut group = c.benchmark_group("pairs");
    group.throughput(Throughput::Elements(records.len() as u64));
    group.sample_size(10);
    // The bound: each conversation encoded once, all threads, nothing else.
    group.bench_function("bare tokenizer, encode_batch", |b| {
        b.iter(|| bare.encode_batch_fast(texts.clone(), false).unwrap().len());
    });
    group.bench_function("templates, tokens, masks, packed", |b| {
        b.iter(|| PackedBatch::pack(&t.preference_groups(&records, &limits).unwrap().0).unwrap());
    });
    group.bench_function("the same from a Parquet file", |b| {
        b.iter(|| {
            let records = source::read_preference(&file).unwrap();
            let groups: Vec<_> = t
                .preference_stream(records, &limits)
                .collect::<Result<_, _>>()
                .unwrap();
            PackedBatch::pack(&groups).unwrap()
        });
    });
    group.bench_function("reading the Parquet file alone", |b| {
        b.iter(|| source::read_preference(&file).unwrap().count());
    });
    let cache = TokenCache::new(work.path());
    let key = CacheKey::new(&file, "preference", None, &t, &limits).unwrap();
    let (groups, report) = t.preference_groups(&records, &limits).unwrap();
    cache.put(&key, &groups, &report).unwrap();
    group.bench_function("from the cache", |b| {
        b.iter(|| {
            cache
                .get(&key)
                .unwrap()
                .unwrap()
                .0
                .map(|g| g.unwrap().num_tokens())
                .sum::<usize>()
        });
    });
    let lengths: Vec<usize> = groups.iter().map(|g| g.num_tokens()).collect();
    group.bench_function("filled batches", |b| {
        b.iter(|| filled_batches(&lengths, 8192, 4096, 1, 0).unwrap());
    });
    group.finish();
}

criterion_group!(benches, tokenize);
criterion_main!(benches);
