//! Several completions of one prompt, and rated ones: UltraFeedback, Nectar, HelpSteer2.

use serde_json::{Map, Value};

use super::cell::{Cell, Columns, cell, message, provenance, row, tidy, user};
use super::chat::{answer, messages, transcript};
use crate::record::Fault;

pub(super) fn ultrafeedback(from: &Columns) -> Result<Vec<Columns>, Fault> {
    let prompt = cell(from, "instruction")?.filled()?;
    let list = cell(from, "completions")?.items()?;
    let mut completions = Vec::new();
    let mut scores = Vec::new();
    let mut models = Vec::new();
    for c in &list {
        completions.push(answer(&c.field("response")?)?);
        scores.push(Value::from(score(c)?));
        models.push(c.maybe("model").map_or(Value::Null, |m| m.value().clone()));
    }
    if completions.len() < 2 {
        return Ok(Vec::new());
    }
    let mut to = row([
        ("prompt", user(prompt)),
        ("completions", Value::Array(completions)),
        ("scores", Value::Array(scores)),
    ]);
    provenance(&mut to, from, &[("source", "dataset")]);
    let models = row([("models", Value::Array(models))]);
    provenance(&mut to, &models, &[("models", "models")]);
    Ok(vec![to])
}

/// The mean of the aspects' ratings, else the score over all.
fn score(completion: &Cell<'_>) -> Result<f64, Fault> {
    let mut ratings = Vec::new();
    if let Some(annotations) = completion.maybe("annotations") {
        for aspect in [
            "helpfulness",
            "honesty",
            "instruction_following",
            "truthfulness",
        ] {
            let rating = annotations.maybe(aspect).and_then(|a| a.maybe("Rating"));
            // An aspect that could not be judged is `N/A`.
            if let Some(rating) = rating.filter(|r| r.value() != "N/A") {
                ratings.push(rating.number()?);
            }
        }
    }
    if !ratings.is_empty() {
        return Ok(ratings.iter().sum::<f64>() / ratings.len() as f64);
    }
    match completion.maybe("fine-grained_score") {
        Some(score) => score.number(),
        None => completion.field("overall_score")?.number(),
    }
}

pub(super) fn nectar(from: &Columns) -> Result<Columns, Fault> {
    let whole = cell(from, "prompt")?;
    let text = whole.filled()?;
    let mut turns = transcript(&whole, text)?;
    // The prompt ends where the answer begins.
    if turns
        .last()
        .is_some_and(|(role, said)| *role == "assistant" && said.is_empty())
    {
        turns.pop();
    }
    if turns.last().is_none_or(|(role, _)| *role != "user") {
        return Err(whole.fault("malformed", "it does not end where an answer begins"));
    }
    let list = cell(from, "answers")?;
    let items = list.items()?;
    if items.is_empty() {
        return Err(list.fault("empty", "no answers"));
    }
    let mut completions = Vec::new();
    let mut ranks = Vec::new();
    let mut scores = Vec::new();
    let mut models = Vec::new();
    for item in &items {
        completions.push(answer(&item.field("answer")?)?);
        let rank = item.field("rank")?.number()?;
        ranks.push(tidy(rank));
        scores.push(Value::from(-rank));
        models.push(
            item.maybe("model")
                .map_or(Value::Null, |m| m.value().clone()),
        );
    }
    let mut to = row([
        ("prompt", messages(&turns)),
        ("completions", Value::Array(completions)),
        ("scores", Value::Array(scores)),
        ("ranks", Value::Array(ranks)),
    ]);
    provenance(&mut to, from, &[("source", "dataset")]);
    let models = row([("models", Value::Array(models))]);
    provenance(&mut to, &models, &[("models", "models")]);
    Ok(to)
}

pub(super) fn helpsteer2(from: &Columns) -> Result<Columns, Fault> {
    let mut ratings = Map::new();
    for attribute in [
        "helpfulness",
        "correctness",
        "coherence",
        "complexity",
        "verbosity",
    ] {
        let rating = cell(from, attribute)?.number()?;
        ratings.insert(attribute.into(), tidy(rating));
    }
    Ok(row([
        ("prompt", turns_of(&cell(from, "prompt")?)?),
        ("completion", answer(&cell(from, "response")?)?),
        ("ratings", Value::Object(ratings)),
    ]))
}

/// The turns of a prompt, which `<extra_id_1>` and a name part where there are several.
fn turns_of(c: &Cell<'_>) -> Result<Value, Fault> {
    let mut parts = c.filled()?.split("<extra_id_1>");
    let mut turns = vec![message("user", parts.next().unwrap_or_default().trim_end())];
    for part in parts {
        let (role, said) = if let Some(said) = part.strip_prefix("Assistant") {
            ("assistant", said)
        } else if let Some(said) = part.strip_prefix("User") {
            ("user", said)
        } else {
            return Err(c.fault("unknown_role", "`<extra_id_1>` without Assistant or User"));
        };
        turns.push(message(role, said.trim()));
    }
    Ok(Value::Array(turns))
}
