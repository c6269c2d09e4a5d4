//! Groups that come one by one are those that come at once; errors come after what was good.

use std::path::Path;

use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::error::Error;
use rlhf_data::group::PromptGroup;
use rlhf_data::record::{PreferenceRecord, RankedRecord, pair_to_unpaired};
use rlhf_data::tokenize::{ChatTokenizer, Limits};

fn tokenizer() -> ChatTokenizer {
    ChatTokenizer::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer"))
        .unwrap()
}

/// Every seventh row is dropped, every fifth is cut.
fn records(n: usize) -> Vec<PreferenceRecord> {
    let say = |role, text: String| Text::Messages(vec![Message::new(role, text)]);
    (0..n)
        .map(|i| PreferenceRecord {
            prompt: say(Role::User, format!("question {i}")),
            chosen: say(
                Role::Assistant,
                "yes ".repeat(if i % 5 == 0 { 60 } else { 3 }),
            ),
            rejected: say(
                Role::Assistant,
                if i % 7 == 0 {
                    "  ".into()
                } else {
                    format!("no {i}")
                },
            ),
            margin: None,
        })
        .collect()
}

fn refused() -> Error {
    Error::Invalid {
        what: "a bad row".into(),
        mend: "none".into(),
    }
}

#[test]
fn the_stream_gives_what_the_whole_gives() {
    let (t, limits) = (tokenizer(), Limits::new(64, 40));
    // Around the sizes of a chunk.
    for n in [0, 1, 255, 256, 257, 512, 700] {
        let records = records(n);
        let (groups, report) = t.preference_groups(&records, &limits).unwrap();
        let mut stream = t.preference_stream(records.into_iter().map(Ok), &limits);
        let streamed: Vec<PromptGroup> = stream.by_ref().collect::<Result<_, _>>().unwrap();
        assert_eq!(streamed, groups);
        assert_eq!(*stream.report(), report);
        assert_eq!(stream.rows(), n as u64);
        assert!(stream.next().is_none());
        if n > 7 {
            assert!(report.truncated > 0 && !report.dropped.is_empty());
        }
    }
}

#[test]
fn an_error_comes_after_the_groups_before_it() {
    let (t, limits) = (tokenizer(), Limits::new(64, 40));
    for bad in [0, 10, 256, 300] {
        let good = records(400);
        let (before, _) = t.preference_groups(&good[..bad], &limits).unwrap();

        // One that the reader finds.
        let rows = good.iter().cloned().enumerate();
        let read = rows.map(|(i, r)| if i == bad { Err(refused()) } else { Ok(r) });
        let mut stream = t.preference_stream(read, &limits);
        let given: Vec<_> = stream.by_ref().map_while(Result::ok).collect();
        assert_eq!(given, before);
        assert_eq!(stream.rows(), bad as u64);
        assert!(stream.next().is_none());

        // One that the tokenizer finds.
        let mut rows = good.clone();
        rows[bad].chosen = Text::Plain("another form".into());
        rows[bad].rejected = Text::Plain("and another".into());
        let mut stream = t.preference_stream(rows.into_iter().map(Ok), &limits);
        let mut given = Vec::new();
        let e = loop {
            match stream.next().unwrap() {
                Ok(group) => given.push(group),
                Err(e) => break e.to_string(),
            }
        };
        assert_eq!(given, before);
        assert!(e.contains(&format!("row {bad}")), "{e}");
        assert!(stream.next().is_none());
    }
}

#[test]
fn thumbs_and_rankings_are_the_sides_of_pairs() {
    let (t, limits) = (tokenizer(), Limits::new(64, 40));
    let records = records(20);
    let (pairs, _) = t.preference_groups(&records, &limits).unwrap();
    let thumbs: Vec<_> = records.iter().flat_map(pair_to_unpaired).collect();
    let (singles, report) = t.unpaired_groups(&thumbs, &limits).unwrap();
    // Only the blank half of a pair goes.
    assert_eq!((singles.len(), report.truncated), (37, 4));
    let ranking = |r: &PreferenceRecord| RankedRecord {
        prompt: r.prompt.clone(),
        completions: vec![r.rejected.clone(), r.chosen.clone()],
        scores: Some(vec![-1.0, 0.5]),
    };
    let rankings: Vec<_> = records.iter().map(ranking).collect();
    assert_eq!(t.ranked_groups(&rankings, &limits).unwrap().0, pairs);
    for pair in &pairs {
        for (side, completion) in (0u64..).zip(&pair.completions) {
            let of_row = singles.iter().find(|g| g.row == 2 * pair.row + side);
            let single = of_row.unwrap();
            assert_eq!(
                (&single.prompt, &single.completions[0]),
                (&pair.prompt, completion)
            );
        }
    }
}
