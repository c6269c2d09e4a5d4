//! Pairs: HH-RLHF, UltraFeedback binarized, SHP, WebGPT, TL;DR.

use serde_json::Value;

use super::cell::{Cell, Columns, assistant, cell, optional, provenance, row, user};
use super::chat::{answer, messages, openai_message, transcript};
use crate::record::Fault;

const MEND: &str = "give both the same prompt, or drop the row";

pub(super) fn hh_rlhf(from: &Columns) -> Result<Columns, Fault> {
    let chosen = cell(from, "chosen")?;
    let rejected = cell(from, "rejected")?;
    let (prompt, good) = split(&chosen)?;
    let (other, bad) = split(&rejected)?;
    if prompt != other {
        return Err(Fault {
            mend: MEND.into(),
            ..rejected.fault(
                "prompt_not_shared",
                "the turns before its last answer are not those of `chosen`",
            )
        });
    }
    Ok(row([
        ("prompt", messages(&transcript(&chosen, prompt)?)),
        ("chosen", assistant(good)),
        ("rejected", assistant(bad)),
    ]))
}

/// What stands before the last answer, and the answer.
fn split<'a>(c: &Cell<'a>) -> Result<(&'a str, &'a str), Fault> {
    let text = c.filled()?;
    let (prompt, answer) = text
        .rsplit_once("\n\nAssistant:")
        .ok_or_else(|| c.fault("malformed", "no `\\n\\nAssistant:` in it"))?;
    if answer.contains("\n\nHuman:") {
        return Err(c.fault("no_assistant_turn", "it does not end with an answer"));
    }
    if answer.trim().is_empty() {
        return Err(c.fault("empty", "the last answer is empty"));
    }
    Ok((prompt, answer.trim()))
}

pub(super) fn ultrafeedback_binarized(from: &Columns) -> Result<Columns, Fault> {
    let margin = cell(from, "score_chosen")?.number()? - cell(from, "score_rejected")?.number()?;
    let (prompt, chosen) = conversation(&cell(from, "chosen")?)?;
    let rejected = cell(from, "rejected")?;
    let (other, bad) = conversation(&rejected)?;
    if prompt != other {
        return Err(Fault {
            mend: MEND.into(),
            ..rejected.fault(
                "prompt_not_shared",
                "the turns before its last answer are not those of `chosen`",
            )
        });
    }
    let mut to = row([
        ("prompt", Value::Array(prompt)),
        ("chosen", Value::Array(vec![chosen])),
        ("rejected", Value::Array(vec![bad])),
        ("margin", Value::from(margin)),
    ]);
    provenance(
        &mut to,
        from,
        &[
            ("source", "dataset"),
            ("prompt_id", "id"),
            ("chosen_model", "chosen_model"),
            ("rejected_model", "rejected_model"),
        ],
    );
    Ok(to)
}

/// The turns before the last one, which is an answer, and it.
fn conversation(c: &Cell<'_>) -> Result<(Vec<Value>, Value), Fault> {
    let mut turns = c
        .items()?
        .iter()
        .map(openai_message)
        .collect::<Result<Vec<_>, _>>()?;
    let last = turns
        .pop()
        .filter(|m| m["role"] == "assistant")
        .ok_or_else(|| c.fault("no_assistant_turn", "it does not end with an answer"))?;
    if turns.is_empty() {
        return Err(c.fault("prompt_not_shared", "no turn before the answer"));
    }
    if last["content"].as_str().is_none_or(|t| t.trim().is_empty())
        && last.get("tool_calls").is_none()
    {
        return Err(c.fault("empty", "the last answer is empty"));
    }
    Ok((turns, last))
}

pub(super) fn shp(from: &Columns) -> Result<Columns, Fault> {
    let (a, b) = (cell(from, "human_ref_A")?, cell(from, "human_ref_B")?);
    let (chosen, rejected) = match cell(from, "labels")?.index(2)? {
        1 => (a, b),
        _ => (b, a),
    };
    let mut to = row([
        ("prompt", user(cell(from, "history")?.filled()?)),
        ("chosen", answer(&chosen)?),
        ("rejected", answer(&rejected)?),
    ]);
    provenance(
        &mut to,
        from,
        &[
            ("domain", "domain"),
            ("post_id", "id"),
            ("score_ratio", "score_ratio"),
        ],
    );
    Ok(to)
}

pub(super) fn webgpt(from: &Columns) -> Result<Vec<Columns>, Fault> {
    let question = cell(from, "question")?;
    let asked = question.field("full_text")?.filled()?;
    let margin = cell(from, "score_0")?.number()? - cell(from, "score_1")?.number()?;
    let (first, second) = (cell(from, "answer_0")?, cell(from, "answer_1")?);
    let (chosen, rejected) = if margin > 0.0 {
        (first, second)
    } else {
        (second, first)
    };
    let (chosen, rejected) = (answer(&chosen)?, answer(&rejected)?);
    if margin == 0.0 {
        return Ok(Vec::new());
    }
    let mut to = row([
        ("prompt", user(asked)),
        ("chosen", chosen),
        ("rejected", rejected),
        ("margin", Value::from(margin.abs())),
    ]);
    if let Value::Object(question) = question.value() {
        provenance(&mut to, question, &[("dataset", "dataset"), ("id", "id")]);
    }
    Ok(vec![to])
}

pub(super) fn tldr(from: &Columns) -> Result<Columns, Fault> {
    let info = cell(from, "info")?;
    let Some(post) = info.maybe("post") else {
        return Err(Fault {
            mend: "leave the files about news articles out".into(),
            ..info.fault(
                "no_post",
                "no `post` in it: only Reddit posts are understood",
            )
        });
    };
    let prompt = format!(
        "SUBREDDIT: r/{}\n\nTITLE: {}\n\nPOST: {}\n\nTL;DR:",
        info.field("subreddit")?.text()?,
        info.field("title")?.text()?,
        post.filled()?
    );
    let summaries = cell(from, "summaries")?;
    let pair = summaries.items()?;
    let [first, second] = pair.as_slice() else {
        return Err(summaries.fault(
            "wrong_length",
            format!("{} summaries, expected 2", pair.len()),
        ));
    };
    let (chosen, rejected) = match cell(from, "choice")?.index(2)? {
        0 => (first, second),
        _ => (second, first),
    };
    let mut to = row([
        ("prompt", prompt.into()),
        ("chosen", chosen.field("text")?.filled()?.into()),
        ("rejected", rejected.field("text")?.filled()?.into()),
    ]);
    provenance(
        &mut to,
        from,
        &[("worker", "annotator"), ("batch", "batch")],
    );
    for (summary, name) in [(chosen, "chosen_model"), (rejected, "rejected_model")] {
        if let Some(policy) = summary.maybe("policy") {
            let one = row([(name, policy.value().clone())]);
            provenance(&mut to, &one, &[(name, name)]);
        }
    }
    if let Some(Value::Object(info)) = optional(from, "info").map(|c| c.value()) {
        provenance(&mut to, info, &[("id", "id")]);
    }
    Ok(to)
}
