//! The kinds of rows: demonstrations, preferences, rankings, thumbs, steps, ratings, prompts; from JSON
//! values to Arrow and back.
//!
//! Columns follow TRL's conventions. [`schema_of`] and [`batch`] write every kind with all that it holds
//! (version 2). [`sft_schema`], [`preference_schema`] and [`prompt_schema`] (version 1) are what TRL
//! reads: messages of role and content alone, plain text as one message of its role. Reading takes both,
//! and keeps plain text plain.

mod convert;
mod graded;
mod kinds;
mod table;

use std::sync::Arc;

use arrow_array::builder::{Float64Builder, ListBuilder, StringBuilder, StructBuilder};
use arrow_array::{ArrayRef, RecordBatch};
use arrow_schema::{ArrowError, DataType, Field, Fields, Schema, SchemaRef};
use serde::de::Error as _;
use serde::ser::SerializeMap as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

pub use convert::{
    Likert, Pairing, likert_to_pair, pair_to_unpaired, ranked_to_pairs, rated_to_ranked,
    rated_to_unpaired, unpaired_to_pairs,
};
pub use graded::{Grade, GradedStepsRecord, JudgedPairRecord};
pub use kinds::{Annotated, RankedRecord, RatedRecord, Source, StepwiseRecord, UnpairedRecord};
pub use table::{SCHEMA_VERSION, batch, schema_of};

use crate::conversation::{Message, Role, Text, ToolCall};

/// A demonstration. As JSON it has the columns that it is read from.
#[derive(Clone, Debug, PartialEq)]
pub struct SftRecord {
    /// What is not trained; `None` when `completion` holds the whole conversation or plain text.
    pub prompt: Option<Text>,
    /// What is trained: an answer, or a whole conversation whose last assistant turn is trained.
    pub completion: Text,
}

/// Two completions of one prompt, of which the first is preferred.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PreferenceRecord {
    /// The prompt.
    pub prompt: Text,
    /// The preferred completion.
    pub chosen: Text,
    /// The other one.
    pub rejected: Text,
    /// By how much it is preferred, where the data says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
}

/// A prompt with whatever else the data says about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PromptRecord {
    /// The prompt.
    pub prompt: Text,
    /// Every other column.
    #[serde(flatten)]
    pub fields: Map<String, Value>,
}

impl Serialize for SftRecord {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        match (&self.prompt, &self.completion) {
            (Some(prompt), completion) => {
                map.serialize_entry("prompt", prompt)?;
                map.serialize_entry("completion", completion)?;
            }
            (None, Text::Messages(messages)) => map.serialize_entry("messages", messages)?,
            (None, Text::Plain(text)) => map.serialize_entry("text", text)?,
        }
        map.end()
    }
}

impl<'de> Deserialize<'de> for SftRecord {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let row = Row::deserialize(deserializer)?;
        Self::from_row(row).map_err(|f| D::Error::custom(format!("{}: {}", f.column, f.what)))
    }
}

/// What is wrong with a row: the column, what was found, what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The rule that it breaks, a short name.
    pub rule: &'static str,
    /// The column, or nothing.
    pub column: String,
    /// What was found and what was expected.
    pub what: String,
    /// What to do.
    pub mend: String,
}

fn fault(
    rule: &'static str,
    column: &str,
    what: impl Into<String>,
    mend: impl Into<String>,
) -> Fault {
    Fault {
        rule,
        column: column.into(),
        what: what.into(),
        mend: mend.into(),
    }
}

/// A row as a kind of record.
pub trait Record: Sized {
    /// The kind's name.
    const KIND: &'static str;

    /// Reads a row.
    ///
    /// # Errors
    /// What is wrong with it.
    fn from_row(row: Map<String, Value>) -> Result<Self, Fault>;

    /// The record as a row, which [`Record::from_row`] reads.
    fn to_row(&self) -> Map<String, Value>;
}

type Row = Map<String, Value>;

impl Record for SftRecord {
    const KIND: &'static str = "sft";

    fn to_row(&self) -> Row {
        kinds::as_row(self)
    }

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        if row.contains_key("messages") {
            let messages = messages(&take(&mut row, "messages")?, "messages")?;
            if !messages.iter().any(|m| m.role == Role::Assistant) {
                return Err(fault(
                    "no_assistant_turn",
                    "messages",
                    "no assistant turn to train on",
                    "drop the row or add the answer",
                ));
            }
            return Ok(Self {
                prompt: None,
                completion: not_blank(Text::Messages(messages), "messages")?,
            });
        }
        if row.contains_key("completion") {
            let prompt = text(&take(&mut row, "prompt")?, "prompt")?;
            let completion = not_blank(
                text(&take(&mut row, "completion")?, "completion")?,
                "completion",
            )?;
            same_form(&prompt, &completion, "completion")?;
            return Ok(Self {
                prompt: Some(prompt),
                completion,
            });
        }
        if row.contains_key("text") {
            let t = not_blank(text(&take(&mut row, "text")?, "text")?, "text")?;
            return Ok(Self {
                prompt: None,
                completion: t,
            });
        }
        Err(missing(
            "`messages`, or `prompt` and `completion`, or `text`",
            &row,
        ))
    }
}

impl Record for PreferenceRecord {
    const KIND: &'static str = "preference";

    fn to_row(&self) -> Row {
        kinds::as_row(self)
    }

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        for column in ["chosen", "rejected"] {
            if !row.contains_key(column) {
                return Err(missing(&format!("`{column}`"), &row));
            }
        }
        let chosen = not_blank(text(&take(&mut row, "chosen")?, "chosen")?, "chosen")?;
        let rejected = not_blank(text(&take(&mut row, "rejected")?, "rejected")?, "rejected")?;
        let margin = kinds::number(row.remove("margin"), "margin")?;
        let (prompt, chosen, rejected) = if row.contains_key("prompt") {
            (
                not_blank(text(&take(&mut row, "prompt")?, "prompt")?, "prompt")?,
                chosen,
                rejected,
            )
        } else {
            implicit_prompt(chosen, rejected)?
        };
        same_form(&prompt, &chosen, "chosen")?;
        same_form(&prompt, &rejected, "rejected")?;
        Ok(Self {
            prompt,
            chosen,
            rejected,
            margin,
        })
    }
}

impl Record for PromptRecord {
    const KIND: &'static str = "prompt";

    fn to_row(&self) -> Row {
        kinds::as_row(self)
    }

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        if !row.contains_key("prompt") {
            return Err(missing("`prompt`", &row));
        }
        let prompt = not_blank(text(&take(&mut row, "prompt")?, "prompt")?, "prompt")?;
        // The column `fields` of our own schemas holds the others as a JSON object.
        let alone = row.iter().all(|(k, v)| k == "fields" || v.is_null());
        let packed = match row.get("fields") {
            Some(Value::String(json)) if alone => serde_json::from_str(json).ok(),
            _ => None,
        };
        Ok(Self {
            prompt,
            fields: packed.unwrap_or(row),
        })
    }
}

fn missing(wanted: &str, row: &Row) -> Fault {
    let have: Vec<&str> = row.keys().map(String::as_str).collect();
    fault(
        "missing_column",
        "",
        format!("there is no column {wanted}; there are {}", have.join(", ")),
        "rename the columns, or name another purpose",
    )
}

fn take(row: &mut Row, column: &str) -> Result<Value, Fault> {
    row.remove(column)
        .ok_or_else(|| missing(&format!("`{column}`"), row))
}

fn kind_of(v: &Value) -> &'static str {
    match v {
        Value::Null => "null",
        Value::Bool(_) => "a truth value",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn text(v: &Value, column: &str) -> Result<Text, Fault> {
    match v {
        Value::String(s) => Ok(Text::Plain(s.clone())),
        Value::Array(_) => Ok(Text::Messages(messages(v, column)?)),
        other => Err(fault(
            "wrong_type",
            column,
            format!("{}, expected text or a list of messages", kind_of(other)),
            "correct or drop the row",
        )),
    }
}

fn messages(v: &Value, column: &str) -> Result<Vec<Message>, Fault> {
    let Value::Array(list) = v else {
        return Err(fault(
            "wrong_type",
            column,
            format!("{}, expected a list of messages", kind_of(v)),
            "correct or drop the row",
        ));
    };
    if list.is_empty() {
        return Err(fault(
            "empty",
            column,
            "an empty list of messages",
            "drop the row",
        ));
    }
    list.iter()
        .enumerate()
        .map(|(i, m)| {
            message(m, i)
                .map_err(|(rule, what)| fault(rule, column, what, "correct or drop the row"))
        })
        .collect()
}

fn message(v: &Value, i: usize) -> Result<Message, (&'static str, String)> {
    let wrong = |what: String| ("wrong_type", format!("message {i} {what}"));
    let tool_calls = tool_calls(v.get("tool_calls")).map_err(wrong)?;
    let text = |key: &str| match v.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(s)) => Ok(Some(s.as_str())),
        Some(other) => Err(wrong(format!(
            "has {} as its {key}, expected text",
            kind_of(other)
        ))),
    };
    let must = |key: &str| match v.get(key) {
        None => Err(wrong(format!("has no {key}"))),
        Some(Value::Null) => Err(wrong(format!("has null as its {key}, expected text"))),
        Some(_) => Ok(text(key)?.unwrap_or_default()),
    };
    let name = must("role")?;
    let role = Role::parse(name).ok_or_else(|| {
        let known = Role::ALL.map(Role::name).join(", ");
        (
            "unknown_role",
            format!("message {i} has the unknown role `{name}`; the roles are {known}"),
        )
    })?;
    if !tool_calls.is_empty() && role != Role::Assistant {
        return Err(wrong("calls a tool, and is not the assistant's".into()));
    }
    Ok(Message {
        // Beside tool calls OpenAI writes null.
        content: if tool_calls.is_empty() {
            must("content")?
        } else {
            text("content")?.unwrap_or_default()
        }
        .to_owned(),
        role,
        name: text("name")?.map(str::to_owned),
        tool_calls,
    })
}

/// A list of calls, or one as JSON text, as Parquet holds it.
fn tool_calls(v: Option<&Value>) -> Result<Vec<ToolCall>, String> {
    match v {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Array(calls)) => calls.iter().map(ToolCall::from_json).collect(),
        Some(Value::String(json)) => {
            let calls: Value = serde_json::from_str(json)
                .map_err(|e| format!("has tool calls that are no JSON: {e}"))?;
            match calls {
                Value::Array(_) => tool_calls(Some(&calls)),
                other => Err(format!("has {} as its tool calls", kind_of(&other))),
            }
        }
        Some(other) => Err(format!("has {} as its tool calls", kind_of(other))),
    }
}

fn not_blank(t: Text, column: &str) -> Result<Text, Fault> {
    if t.is_blank() {
        Err(fault(
            "empty",
            column,
            "empty text",
            "drop the row, or fill it",
        ))
    } else {
        Ok(t)
    }
}

fn same_form(prompt: &Text, completion: &Text, column: &str) -> Result<(), Fault> {
    match (prompt, completion) {
        (Text::Plain(_), Text::Plain(_)) | (Text::Messages(_), Text::Messages(_)) => Ok(()),
        _ => Err(fault(
            "mixed_forms",
            column,
            "the prompt and this column differ in form: one is plain text, the other messages",
            "use one form in all columns",
        )),
    }
}

/// Splits chosen and rejected conversations into the prompt they share and their last turns.
fn implicit_prompt(chosen: Text, rejected: Text) -> Result<(Text, Text, Text), Fault> {
    let (Text::Messages(mut c), Text::Messages(mut r)) = (chosen, rejected) else {
        return Err(fault(
            "missing_column",
            "chosen",
            "plain text without a `prompt` column",
            "add the prompt, or use messages",
        ));
    };
    let mend = "give both the same prompt, or drop the row";
    match (c.pop(), r.pop()) {
        (Some(cl), Some(rl)) if cl.role == Role::Assistant && rl.role == Role::Assistant => {
            if c != r {
                return Err(fault(
                    "prompt_not_shared",
                    "rejected",
                    "the prompt in it is not the prompt in `chosen`",
                    mend,
                ));
            }
            if c.is_empty() {
                return Err(fault(
                    "prompt_not_shared",
                    "chosen",
                    "no turn before the answer: there is no prompt",
                    mend,
                ));
            }
            Ok((
                Text::Messages(c),
                Text::Messages(vec![cl]),
                Text::Messages(vec![rl]),
            ))
        }
        _ => Err(fault(
            "no_assistant_turn",
            "chosen",
            "chosen and rejected must both end with an assistant turn",
            mend,
        )),
    }
}

fn message_list(name: &str) -> Field {
    let message = Fields::from(vec![
        Field::new("role", DataType::Utf8, false),
        Field::new("content", DataType::Utf8, false),
    ]);
    Field::new(
        name,
        DataType::List(Arc::new(Field::new(
            "item",
            DataType::Struct(message),
            true,
        ))),
        false,
    )
}

fn schema(fields: Vec<Field>) -> SchemaRef {
    let version = std::collections::HashMap::from([("rlhf.schema".to_owned(), "1".to_owned())]);
    Arc::new(Schema::new_with_metadata(fields, version))
}

/// `messages: list<{role, content}>`.
#[must_use]
pub fn sft_schema() -> SchemaRef {
    schema(vec![message_list("messages")])
}

/// `prompt`, `chosen`, `rejected`: `list<{role, content}>`; `margin: f64?`.
#[must_use]
pub fn preference_schema() -> SchemaRef {
    schema(vec![
        message_list("prompt"),
        message_list("chosen"),
        message_list("rejected"),
        Field::new("margin", DataType::Float64, true),
    ])
}

/// `prompt: list<{role, content}>`, `fields: utf8` (the other columns as JSON).
#[must_use]
pub fn prompt_schema() -> SchemaRef {
    schema(vec![
        message_list("prompt"),
        Field::new("fields", DataType::Utf8, false),
    ])
}

/// Plain text becomes one message of `role`.
fn as_messages(t: &Text, role: Role) -> Vec<Message> {
    match t {
        Text::Messages(m) => m.clone(),
        Text::Plain(s) => vec![Message::new(role, s)],
    }
}

fn message_column<'a>(
    rows: impl Iterator<Item = Vec<Message>> + 'a,
) -> Result<ArrayRef, ArrowError> {
    let fields = Fields::from(vec![
        Field::new("role", DataType::Utf8, false),
        Field::new("content", DataType::Utf8, false),
    ]);
    let item = Field::new("item", DataType::Struct(fields.clone()), true);
    let mut list = ListBuilder::new(StructBuilder::from_fields(fields, 0)).with_field(item);
    for row in rows {
        for m in row {
            if m.name.is_some() || !m.tool_calls.is_empty() {
                return Err(ArrowError::InvalidArgumentError(
                    "a message names a tool, which this schema does not hold; use schema_of".into(),
                ));
            }
            let s = list.values();
            for (i, text) in [m.role.name(), m.content.as_str()].into_iter().enumerate() {
                if let Some(b) = s.field_builder::<StringBuilder>(i) {
                    b.append_value(text);
                }
            }
            s.append(true);
        }
        list.append(true);
    }
    Ok(Arc::new(list.finish()))
}

/// Demonstrations as one batch of [`sft_schema`]: the prompt's messages and then the completion's; plain
/// text becomes a message of the user or the assistant.
///
/// # Errors
/// When Arrow refuses.
pub fn sft_batch(records: &[SftRecord]) -> Result<RecordBatch, ArrowError> {
    let rows = records.iter().map(|r| {
        let mut m = r
            .prompt
            .as_ref()
            .map(|p| as_messages(p, Role::User))
            .unwrap_or_default();
        m.extend(as_messages(&r.completion, Role::Assistant));
        m
    });
    RecordBatch::try_new(sft_schema(), vec![message_column(rows)?])
}

/// Preferences as one batch of [`preference_schema`]; plain text becomes a message of the user or the
/// assistant.
///
/// # Errors
/// When Arrow refuses.
pub fn preference_batch(records: &[PreferenceRecord]) -> Result<RecordBatch, ArrowError> {
    let mut margins = Float64Builder::new();
    records.iter().for_each(|r| margins.append_option(r.margin));
    RecordBatch::try_new(
        preference_schema(),
        vec![
            message_column(records.iter().map(|r| as_messages(&r.prompt, Role::User)))?,
            message_column(
                records
                    .iter()
                    .map(|r| as_messages(&r.chosen, Role::Assistant)),
            )?,
            message_column(
                records
                    .iter()
                    .map(|r| as_messages(&r.rejected, Role::Assistant)),
            )?,
            Arc::new(margins.finish()),
        ],
    )
}

/// Prompts as one batch of [`prompt_schema`]; plain text becomes a message of the user.
///
/// # Errors
/// When Arrow refuses.
pub fn prompt_batch(records: &[PromptRecord]) -> Result<RecordBatch, ArrowError> {
    let mut fields = StringBuilder::new();
    records
        .iter()
        .for_each(|r| fields.append_value(Value::Object(r.fields.clone()).to_string()));
    RecordBatch::try_new(
        prompt_schema(),
        vec![
            message_column(records.iter().map(|r| as_messages(&r.prompt, Role::User)))?,
            Arc::new(fields.finish()),
        ],
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(v: Value) -> Row {
        v.as_object().unwrap().clone()
    }

    #[test]
    fn implicit_prompts_are_split_off() {
        let u = json!({"role": "user", "content": "hi"});
        let a = |t: &str| json!({"role": "assistant", "content": t});
        let r = PreferenceRecord::from_row(row(
            json!({"chosen": [u, a("yes")], "rejected": [u, a("no")]}),
        ))
        .unwrap();
        assert_eq!(r.prompt.joined(), "hi");
        assert_eq!(
            (r.chosen.joined().as_str(), r.rejected.joined().as_str()),
            ("yes", "no")
        );
        let other = json!({"role": "user", "content": "bye"});
        let f = PreferenceRecord::from_row(row(
            json!({"chosen": [u, a("yes")], "rejected": [other, a("no")]}),
        ))
        .unwrap_err();
        assert!(f.what.contains("not the prompt"), "{f:?}");
    }

    #[test]
    fn faults_name_the_column_and_the_role() {
        let f = SftRecord::from_row(row(
            json!({"messages": [{"role": "wizard", "content": "x"}]}),
        ))
        .unwrap_err();
        assert!(
            f.column == "messages" && f.what.contains("`wizard`") && f.what.contains("assistant"),
            "{f:?}"
        );
        let f = PreferenceRecord::from_row(row(json!({"prompt": "p", "chosen": "c", "notes": 1})))
            .unwrap_err();
        assert!(
            f.what.contains("`rejected`") && f.what.contains("notes"),
            "{f:?}"
        );
        let f =
            PreferenceRecord::from_row(row(json!({"prompt": "p", "chosen": 3, "rejected": "r"})))
                .unwrap_err();
        assert_eq!(
            (f.column.as_str(), f.what.as_str()),
            ("chosen", "a number, expected text or a list of messages")
        );
        assert!(
            PreferenceRecord::from_row(row(json!({"prompt": "p", "chosen": " ", "rejected": "r"})))
                .is_err()
        );
        assert!(PreferenceRecord::from_row(row(json!({"prompt": "p", "chosen": [{"role": "assistant", "content": "x"}], "rejected": "r"}))).is_err());
    }
}
