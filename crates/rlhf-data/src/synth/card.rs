//! The data card, with its statistics counted from the data it describes.

use super::grammar::INTENTS;
use super::help::{Pair, Task};
use super::{DataFile, encoding};
use crate::error::Result;
use crate::rubric::{Facts, Rubric, judge_facts};
use crate::text_stats::{distinct_n, word_count};
use std::fmt::Write as _;
use tokenizers::Tokenizer;

const TEMPLATE: &str = include_str!("card.md");

fn mean(values: impl Iterator<Item = f64>) -> f64 {
    let (sum, count) = values.fold((0.0, 0usize), |(sum, count), x| (sum + x, count + 1));
    if count == 0 { 0.0 } else { sum / count as f64 }
}

fn mean_tokens<'a>(
    tokenizer: &Tokenizer,
    texts: impl Iterator<Item = &'a str>,
) -> Result<(f64, usize)> {
    let mut lengths = Vec::new();
    for text in texts {
        let encoding = tokenizer
            .encode(text, false)
            .map_err(|e| encoding("tokenizer", e))?;
        lengths.push(encoding.len());
    }
    let longest = lengths.iter().copied().max().unwrap_or(0);
    Ok((mean(lengths.iter().map(|&n| n as f64)), longest))
}

/// The share of pairs whose chosen reply the rubric likes less than the rejected one.
fn noise(pairs: &[Pair]) -> f64 {
    mean(pairs.iter().map(|pair| {
        let score = |text| judge_facts(&pair.prompt.text, text, &pair.prompt.facts).score;
        f64::from(u8::from(score(&pair.chosen) < score(&pair.rejected)))
    }))
}

fn example(prompt: &str, reply: &str, facts: &Facts) -> String {
    let r = judge_facts(prompt, reply, facts);
    format!(
        "> {reply}\n>\n> score {:.2}: answers {:.2}, slot {:.2}, polite {:.2}, concise {:.2}\n",
        r.score, r.answers, r.slot, r.polite, r.concise
    )
}

pub(super) fn render(task: &Task, tokenizer: &Tokenizer, files: &[DataFile]) -> Result<String> {
    let demos = &task.sft.train;
    let ratings: Vec<Rubric> = demos
        .iter()
        .map(|d| judge_facts(&d.prompt.text, &d.reply, &d.prompt.facts))
        .collect();
    let (prompt_tokens, prompt_longest) =
        mean_tokens(tokenizer, demos.iter().map(|d| d.prompt.text.as_str()))?;
    let (reply_tokens, reply_longest) =
        mean_tokens(tokenizer, demos.iter().map(|d| d.reply.as_str()))?;
    let replies: Vec<&str> = demos.iter().take(400).map(|d| d.reply.as_str()).collect();

    let mut statistics = String::new();
    let mut row = |what: &str, value: String| {
        let _ = writeln!(statistics, "| {what} | {value} |");
    };
    row(
        "tokens of a prompt's text, mean (longest)",
        format!("{prompt_tokens:.1} ({prompt_longest})"),
    );
    row(
        "tokens of a reply's text, mean (longest)",
        format!("{reply_tokens:.1} ({reply_longest})"),
    );
    row(
        "words of a reply, mean",
        format!(
            "{:.1}",
            mean(demos.iter().map(|d| word_count(&d.reply) as f64))
        ),
    );
    row("vocabulary", tokenizer.get_vocab_size(true).to_string());
    row(
        "rubric score of a demonstration, mean",
        format!("{:.3}", mean(ratings.iter().map(|r| r.score))),
    );
    row(
        "parts: answers, slot, polite, concise",
        format!(
            "{:.2}, {:.2}, {:.2}, {:.2}",
            mean(ratings.iter().map(|r| r.answers)),
            mean(ratings.iter().map(|r| r.slot)),
            mean(ratings.iter().map(|r| r.polite)),
            mean(ratings.iter().map(|r| r.concise))
        ),
    );
    row(
        "demonstrations with full marks",
        format!(
            "{:.1} %",
            100.0 * mean(ratings.iter().map(|r| f64::from(u8::from(r.score > 0.999))))
        ),
    );
    row(
        "distinct-2 of the first 400 demonstrations",
        format!("{:.3}", distinct_n(&replies, 2)),
    );
    row(
        "labels turned around, preference/train",
        format!("{:.1} %", 100.0 * noise(&task.preference.train)),
    );
    row(
        "labels turned around, preference/test",
        format!("{:.1} %", 100.0 * noise(&task.preference.test)),
    );

    let mut sizes = String::new();
    for file in files {
        let _ = writeln!(
            sizes,
            "| `{}` | {} | `{}` |",
            file.path,
            file.bytes.len(),
            file.sha256()
        );
    }

    let mut intents = String::new();
    for intent in INTENTS {
        let needs: Vec<&str> = intent.needs.iter().map(|slot| slot.name()).collect();
        let keys: Vec<String> = intent.keys.iter().map(|key| format!("\"{key}\"")).collect();
        let _ = writeln!(
            intents,
            "| `{}` | {} | {} |",
            intent.id,
            needs.join(", "),
            keys.join(" or ")
        );
    }

    let mut examples = String::new();
    for pair in task.preference.test.iter().take(3) {
        let (prompt, facts) = (&pair.prompt.text, &pair.prompt.facts);
        let _ = writeln!(examples, "Prompt (`{}`): {prompt}\n", facts.intent().id);
        let _ = writeln!(
            examples,
            "Chosen:\n\n{}",
            example(prompt, &pair.chosen, facts)
        );
        let _ = writeln!(
            examples,
            "Rejected:\n\n{}",
            example(prompt, &pair.rejected, facts)
        );
    }

    Ok(TEMPLATE
        .replace("<!-- statistics -->\n", &statistics)
        .replace("<!-- files -->\n", &sizes)
        .replace("<!-- intents -->\n", &intents)
        .replace("<!-- examples -->", examples.trim_end()))
}
