//! What becomes of rows beyond the limits, policy by policy.

use std::path::Path;

use proptest::prelude::*;
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::group::{Finish, PromptGroup};
use rlhf_data::record::{PreferenceRecord, SftRecord};
use rlhf_data::tokenize::{
    ChatTokenizer, DropReason, Limits, LongCompletion, LongPrompt, Outcome, Truncation,
};

fn tokenizer() -> ChatTokenizer {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/tokenizer");
    ChatTokenizer::load(&dir).unwrap()
}

fn limits(max_prompt: usize, max_completion: usize, prompt: LongPrompt) -> Limits {
    Limits {
        truncation: Truncation {
            prompt,
            ..Truncation::default()
        },
        ..Limits::new(max_prompt, max_completion)
    }
}

fn turn(role: Role, content: &str) -> Message {
    Message::new(role, content)
}

/// A system message, `n` questions with answers, and a last question.
fn talk(n: usize) -> Vec<Message> {
    let mut m = vec![turn(Role::System, "be kind")];
    for i in 0..n {
        m.push(turn(Role::User, &format!("question {i}")));
        m.push(turn(Role::Assistant, &format!("answer {i}")));
    }
    m.push(turn(Role::User, "the last question"));
    m
}

fn pair(prompt: Vec<Message>) -> PreferenceRecord {
    let answer = |t: &str| Text::Messages(vec![turn(Role::Assistant, t)]);
    PreferenceRecord {
        prompt: Text::Messages(prompt),
        chosen: answer("yes, gladly"),
        rejected: answer("no, never"),
        margin: None,
    }
}

fn group(o: Outcome<PromptGroup>) -> PromptGroup {
    match o {
        Outcome::Truncated(g) => g,
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_oldest_turns_go_first_and_whole() {
    let t = tokenizer();
    let whole = Text::Messages(talk(4));
    let ids = |n: usize| {
        let mut m = talk(4);
        m.drain(1..1 + 2 * (4 - n));
        t.prompt_ids(&Text::Messages(m)).unwrap()
    };
    for n in 0..4 {
        // Room for n turns and not for one more.
        let l = limits(ids(n).len(), 50, LongPrompt::DropTurns);
        let g = group(t.preference_group(0, &pair(talk(4)), &l).unwrap());
        assert_eq!(g.prompt, ids(n), "{n} turns");
        assert_eq!(
            t.prompt_within(&whole, &l).unwrap(),
            Outcome::Truncated(ids(n))
        );
        // The same for a demonstration, whose last answer stays.
        let mut messages = talk(4);
        messages.push(turn(Role::Assistant, "yes, gladly"));
        let sft = SftRecord {
            prompt: None,
            completion: Text::Messages(messages),
        };
        let s = t.sft_group(0, &sft, &l).unwrap();
        // The template marks every answer, so training begins at the first one that is left.
        match s {
            Outcome::Kept(s) | Outcome::Truncated(s) => assert!(s.prompt.len() <= l.max_prompt),
            Outcome::Dropped(r) => panic!("{r}"),
        }
    }
    let none = limits(ids(0).len() - 1, 50, LongPrompt::DropTurns);
    assert_eq!(
        t.preference_group(0, &pair(talk(4)), &none).unwrap(),
        Outcome::Dropped(DropReason::PromptTooLong)
    );
    let plain = Text::Plain("word ".repeat(50));
    let few = limits(5, 5, LongPrompt::DropTurns);
    assert_eq!(
        t.prompt_within(&plain, &few).unwrap(),
        Outcome::Dropped(DropReason::PromptTooLong)
    );
}

#[test]
fn every_policy_does_what_its_name_says_and_is_counted() {
    let t = tokenizer();
    let records = [pair(talk(3)), pair(talk(0))];
    let whole = t.prompt_ids(&Text::Messages(talk(3))).unwrap();
    let short = t.prompt_ids(&Text::Messages(talk(0))).unwrap();
    let n = short.len();
    let run = |policy| t.preference_groups(&records, &limits(n, 50, policy));

    let (groups, report) = run(LongPrompt::KeepStart).unwrap();
    assert_eq!(groups[0].prompt, whole[..n]);
    assert_eq!(
        (groups[1].prompt.as_slice(), report.shortened_prompts),
        (&short[..], 1)
    );
    let (groups, report) = run(LongPrompt::KeepEnd).unwrap();
    assert_eq!(groups[0].prompt, whole[whole.len() - n..]);
    assert_eq!(report.shortened_prompts, 1);
    let (groups, report) = run(LongPrompt::DropTurns).unwrap();
    assert_eq!(
        (groups[0].prompt.as_slice(), report.shortened_prompts),
        (&short[..], 1)
    );
    let (groups, report) = run(LongPrompt::Drop).unwrap();
    assert_eq!(
        (
            groups.len(),
            report.dropped[&DropReason::PromptTooLong].count
        ),
        (1, 1)
    );
    let e = run(LongPrompt::Refuse).unwrap_err().to_string();
    assert!(e.contains("row 0") && e.contains("max_prompt"), "{e}");

    let completion = |policy| {
        let l = Limits {
            truncation: Truncation {
                completion: policy,
                ..Truncation::default()
            },
            ..Limits::new(500, 2)
        };
        t.preference_groups(&records, &l)
    };
    let (groups, report) = completion(LongCompletion::KeepStart).unwrap();
    assert_eq!(report.truncated, 2);
    assert!(
        groups
            .iter()
            .flat_map(|g| &g.completions)
            .all(|c| c.ids.len() == 2 && c.finish == Finish::Cut)
    );
    let (groups, report) = completion(LongCompletion::Drop).unwrap();
    assert_eq!(
        (
            groups.len(),
            report.dropped[&DropReason::CompletionTooLong].count
        ),
        (0, 2)
    );
    let e = completion(LongCompletion::Refuse).unwrap_err().to_string();
    assert!(e.contains("row 0") && e.contains("max_completion"), "{e}");
}

fn any_limits() -> impl Strategy<Value = Limits> {
    let prompt = prop::sample::select(vec![
        LongPrompt::Drop,
        LongPrompt::KeepStart,
        LongPrompt::KeepEnd,
        LongPrompt::DropTurns,
    ]);
    let completion = prop::sample::select(vec![LongCompletion::KeepStart, LongCompletion::Drop]);
    (0usize..60, 0usize..12, prompt, completion).prop_map(|(p, c, prompt, completion)| Limits {
        truncation: Truncation { prompt, completion },
        ..Limits::new(p, c)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever the policy: within the limits, no empty completion, no end that was not in the data, and
    /// every row is kept or counted.
    #[test]
    fn no_policy_breaks_a_row(turns in 0usize..5, l in any_limits(), words in 1usize..9) {
        let t = tokenizer();
        let mut record = pair(talk(turns));
        record.chosen = Text::Messages(vec![turn(Role::Assistant, &"word ".repeat(words))]);
        let free = match t.preference_group(0, &record, &Limits::new(9999, 9999)).unwrap() {
            Outcome::Kept(g) => g,
            other => panic!("{other:?}"),
        };
        let (groups, report) = t.preference_groups(&[record], &l).unwrap();
        let dropped: usize = report.dropped.values().map(|d| d.count).sum();
        prop_assert_eq!(groups.len() + dropped, 1);
        for g in &groups {
            g.validate().unwrap();
            prop_assert!(g.prompt.len() <= l.max_prompt);
            for (c, whole) in g.completions.iter().zip(&free.completions) {
                prop_assert!(!c.ids.is_empty() && c.ids.len() <= l.max_completion.max(1));
                prop_assert!(whole.ids.starts_with(&c.ids));
                prop_assert!(c.trained_tokens() > 0);
                let ends = c.ids.last().is_some_and(|id| t.eos_ids().contains(id));
                prop_assert_eq!(c.finish == Finish::Stop, ends);
            }
            prop_assert_eq!(report.truncated == 1, g.completions != free.completions);
            prop_assert_eq!(report.shortened_prompts == 1, g.prompt != free.prompt);
        }
    }
}
