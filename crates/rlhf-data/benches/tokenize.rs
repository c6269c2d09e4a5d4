//! Chat pairs to groups, beside the bound: the bare tokenizer on the same text.
#![allow(missing_docs, reason = "criterion writes the entry point")]
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a benchmark")]

use std::path::Path;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::pack::PackedBatch;
use rlhf_data::record::PreferenceRecord;
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

fn tokenize(c: &mut Criterion) {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer");
    let t = ChatTokenizer::load(&dir).unwrap();
    let records = pairs(1000);
    let limits = Limits::new(4096, 4096);
    let mut group = c.benchmark_group("pairs");
    group.throughput(Throughput::Elements(records.len() as u64));
    group.sample_size(10);
    group.bench_function("bare tokenizer, one thread", |b| {
        b.iter(|| {
            records
                .iter()
                .flat_map(|r| [&r.prompt, &r.chosen, &r.rejected])
                .map(|text| t.encode(&text.joined()).unwrap().len())
                .sum::<usize>()
        });
    });
    group.bench_function("one by one", |b| {
        b.iter(|| {
            (0..)
                .zip(&records)
                .map(|(row, r)| t.preference_group(row, r, &limits).unwrap())
                .collect::<Vec<_>>()
        });
    });
    group.bench_function("in parallel, packed", |b| {
        b.iter(|| PackedBatch::pack(&t.preference_groups(&records, &limits).unwrap().0).unwrap());
    });
    group.finish();
}

criterion_group!(benches, tokenize);
criterion_main!(benches);
