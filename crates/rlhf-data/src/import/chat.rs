//! Demonstrations and prompts: Alpaca, ShareGPT, OpenAI messages, GSM8K, IFEval.

use serde_json::{Map, Value};

use super::cell::{Cell, Columns, assistant, cell, message, optional, provenance, row, user};
use crate::record::Fault;

/// Columns by which many datasets say where a row comes from.
const USUAL: [(&str, &str); 6] = [
    ("source", "dataset"),
    ("dataset", "dataset"),
    ("id", "id"),
    ("prompt_id", "id"),
    ("category", "category"),
    ("model", "model"),
];

/// A row of messages with what the original says of its origin.
fn demonstration(from: &Columns, messages: Vec<Value>) -> Columns {
    let mut to = row([("messages", Value::Array(messages))]);
    for kept in ["tools", "weight"] {
        if let Some(c) = optional(from, kept) {
            to.insert(kept.into(), c.value().clone());
        }
    }
    match optional(from, "source").map(|c| c.value()) {
        Some(source @ Value::Object(_)) => {
            to.insert("source".into(), source.clone());
            provenance(&mut to, from, &USUAL[1..]);
        }
        _ => provenance(&mut to, from, &USUAL),
    }
    to
}

/// The message of a `system` column, where there is one.
fn system(from: &Columns) -> Result<Option<Value>, Fault> {
    let Some(c) = optional(from, "system") else {
        return Ok(None);
    };
    let text = c.text()?;
    Ok((!text.trim().is_empty()).then(|| message("system", text)))
}

pub(super) fn alpaca(from: &Columns) -> Result<Columns, Fault> {
    let mut prompt = cell(from, "instruction")?.filled()?.to_owned();
    if let Some(input) = optional(from, "input") {
        let input = input.text()?;
        if !input.trim().is_empty() {
            prompt.push_str("\n\n");
            prompt.push_str(input);
        }
    }
    let output = cell(from, "output")?.filled()?;
    let mut messages: Vec<Value> = system(from)?.into_iter().collect();
    if let Some(history) = optional(from, "history") {
        for pair in history.items()? {
            let turns = pair.items()?;
            let [asked, said] = turns.as_slice() else {
                return Err(pair.fault("wrong_type", "no pair of a question and an answer"));
            };
            messages.push(message("user", asked.text()?));
            messages.push(message("assistant", said.text()?));
        }
    }
    messages.push(message("user", &prompt));
    messages.push(message("assistant", output));
    Ok(demonstration(from, messages))
}

pub(super) fn sharegpt(from: &Columns) -> Result<Columns, Fault> {
    let list = cell(from, "conversations")?;
    let turns = list.items()?;
    if turns.is_empty() {
        return Err(list.fault("empty", "an empty conversation"));
    }
    let mut messages: Vec<Value> = system(from)?.into_iter().collect();
    for turn in turns {
        let (speaker, said) = match turn.maybe("role") {
            Some(role) => (role, turn.field("content")?),
            None => (turn.field("from")?, turn.field("value")?),
        };
        let role = match speaker.text()? {
            "human" | "user" => "user",
            "gpt" | "assistant" | "chatgpt" | "bing" | "bard" | "function_call" => "assistant",
            "system" => "system",
            "tool" | "observation" | "function_response" | "tool_response" => "tool",
            other => {
                return Err(speaker.fault("unknown_role", format!("the unknown speaker `{other}`")));
            }
        };
        messages.push(message(role, said.text()?));
    }
    Ok(demonstration(from, messages))
}

pub(super) fn openai(mut from: Columns) -> Result<Columns, Fault> {
    let list = cell(&from, "messages")?;
    let turns = list.items()?;
    if turns.is_empty() {
        return Err(list.fault("empty", "an empty list of messages"));
    }
    let messages = turns.iter().map(openai_message).collect::<Result<_, _>>()?;
    let mut to = demonstration(&from, messages);
    let told = ["messages", "prompt"];
    let told = told.into_iter().chain(USUAL.map(|(column, _)| column));
    for column in told {
        from.remove(column);
    }
    for (column, value) in from {
        to.entry(column).or_insert(value);
    }
    Ok(to)
}

/// One message in the way of OpenAI: parts joined, null only beside tool calls.
pub(super) fn openai_message(turn: &Cell<'_>) -> Result<Value, Fault> {
    let role = turn.field("role")?;
    let role = match role.text()? {
        "system" | "developer" => "system",
        "user" => "user",
        "assistant" => "assistant",
        "tool" | "function" => "tool",
        other => return Err(role.fault("unknown_role", format!("the unknown role `{other}`"))),
    };
    let calls = turn
        .maybe("tool_calls")
        .filter(|c| c.value().as_array().is_none_or(|a| !a.is_empty()));
    let content = match turn.maybe("content") {
        None if calls.is_some() || turn.maybe("function_call").is_some() => String::new(),
        None => turn.field("content")?.text()?.to_owned(),
        Some(c) if c.value().is_array() => c
            .items()?
            .iter()
            .map(|part| match part.field("type")?.text()? {
                "text" => part.field("text")?.text(),
                other => Err(part.fault("wrong_type", format!("a part of the type `{other}`"))),
            })
            .collect::<Result<String, _>>()?,
        Some(c) => c.text()?.to_owned(),
    };
    let mut to: Map<String, Value> = row([("role", role.into()), ("content", content.into())]);
    if let Some(calls) = calls {
        calls.items()?;
        to.insert("tool_calls".into(), calls.value().clone());
    }
    for kept in ["function_call", "tool_call_id", "name"] {
        if let Some(c) = turn.maybe(kept) {
            to.insert(kept.into(), c.value().clone());
        }
    }
    Ok(Value::Object(to))
}

pub(super) fn gsm8k(from: &Columns) -> Result<Columns, Fault> {
    let question = cell(from, "question")?.filled()?;
    let worked = cell(from, "answer")?;
    let text = worked.filled()?;
    let answer = text
        .rsplit_once("####")
        .map(|(_, a)| a.trim())
        .filter(|a| !a.is_empty())
        .ok_or_else(|| worked.fault("no_final_answer", "no final answer after `####`"))?;
    let mut to = row([
        ("prompt", user(question)),
        (
            "messages",
            Value::Array(vec![message("user", question), message("assistant", text)]),
        ),
        ("answer", answer.into()),
    ]);
    provenance(&mut to, from, &[("id", "id")]);
    Ok(to)
}

pub(super) fn ifeval(from: &Columns) -> Result<Columns, Fault> {
    let prompt = cell(from, "prompt")?.filled()?;
    let ids = cell(from, "instruction_id_list")?;
    let kwargs = cell(from, "kwargs")?;
    let names = ids.items()?;
    for name in &names {
        name.filled()?;
    }
    let arguments = kwargs.items()?;
    if arguments.len() != names.len() {
        return Err(kwargs.fault(
            "wrong_length",
            format!(
                "{} entries for {} instructions",
                arguments.len(),
                names.len()
            ),
        ));
    }
    // Tables hold a null for every argument that an instruction does not have.
    let arguments = arguments
        .iter()
        .map(|a| match a.value() {
            Value::Object(map) => Ok(Value::Object(
                map.iter()
                    .filter(|(_, v)| !v.is_null())
                    .map(|(k, v)| (k.clone(), v.clone()))
                    .collect(),
            )),
            Value::Null => Ok(Value::Object(Map::new())),
            _ => Err(a.fault("wrong_type", "no object of arguments")),
        })
        .collect::<Result<Vec<_>, _>>()?;
    let mut to = row([
        ("prompt", user(prompt)),
        ("instruction_id_list", ids.value().clone()),
        ("kwargs", Value::Array(arguments)),
    ]);
    if let Some(key) = optional(from, "key") {
        to.insert("key".into(), key.value().clone());
    }
    Ok(to)
}

/// The turns of a text with `\n\nHuman:` and `\n\nAssistant:`, each stripped of white space around it.
pub(super) fn transcript(
    whole: &Cell<'_>,
    text: &str,
) -> Result<Vec<(&'static str, String)>, Fault> {
    const HUMAN: &str = "\n\nHuman:";
    const ASSISTANT: &str = "\n\nAssistant:";
    let mut turns = Vec::new();
    let mut rest = text;
    while !rest.is_empty() {
        let (role, after) = if let Some(after) = rest.strip_prefix(HUMAN) {
            ("user", after)
        } else if let Some(after) = rest.strip_prefix(ASSISTANT) {
            ("assistant", after)
        } else {
            return Err(whole.fault("malformed", "it does not begin with `\\n\\nHuman:`"));
        };
        let end = [HUMAN, ASSISTANT]
            .iter()
            .filter_map(|m| after.find(m))
            .min()
            .unwrap_or(after.len());
        turns.push((role, after[..end].trim().to_owned()));
        rest = &after[end..];
    }
    if turns.first().is_none_or(|(role, _)| *role != "user") {
        return Err(whole.fault("malformed", "it does not begin with `\\n\\nHuman:`"));
    }
    Ok(turns)
}

/// Turns as messages.
pub(super) fn messages(turns: &[(&'static str, String)]) -> Value {
    Value::Array(turns.iter().map(|(r, c)| message(r, c)).collect())
}

/// An answer as a completion.
pub(super) fn answer(c: &Cell<'_>) -> Result<Value, Fault> {
    Ok(assistant(c.filled()?))
}
