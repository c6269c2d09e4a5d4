//! Records as Arrow: one versioned schema for each kind, in the form of its rows.
//!
//! Version 2. Columns are those of [`Record::to_row`]; a text column is `utf8` for plain text and
//! `list<struct<role, content, name?, tool_calls?>>` for messages. JSON values without a fixed shape
//! (`tool_calls`, `ratings`, `fields`, `sampler`) are JSON text.

use std::collections::HashMap;
use std::sync::Arc;

use arrow_array::builder::{BooleanBuilder, Float64Builder, StringBuilder, UInt64Builder};
use arrow_array::{Array as _, ArrayRef, ListArray, RecordBatch, StructArray};
use arrow_buffer::{NullBuffer, OffsetBuffer};
use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};
use serde_json::Value;

use super::{Record, Row};
use crate::error::{Error, Result};

/// The version written to the metadata key `rlhf.schema`.
pub const SCHEMA_VERSION: &str = "2";

/// The Arrow schema of a kind of record whose rows look like `first`: plain text or messages, and for
/// demonstrations a prompt and completion, a conversation, or text.
#[must_use]
pub fn schema_of<R: Record>(first: &R) -> SchemaRef {
    let row = first.to_row();
    let mut fields: Vec<Field> = row
        .iter()
        .filter(|(name, _)| !matches!(name.as_str(), "weight" | "source" | "margin" | "scores"))
        .filter(|(name, _)| R::KIND != "prompt" || *name == "prompt")
        .map(|(name, v)| Field::new(name, column_type(name, v), false))
        .collect();
    match R::KIND {
        "prompt" => fields.push(Field::new("fields", DataType::Utf8, false)),
        "preference" => fields.push(Field::new("margin", DataType::Float64, true)),
        "ranked" => fields.push(Field::new("scores", list_of(DataType::Float64), true)),
        _ => {}
    }
    fields.push(Field::new("weight", DataType::Float64, true));
    fields.push(Field::new("source", source_type(), true));
    let metadata = HashMap::from([
        ("rlhf.schema".to_owned(), SCHEMA_VERSION.to_owned()),
        ("rlhf.kind".to_owned(), R::KIND.to_owned()),
    ]);
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// Records as one batch of `schema`, which [`schema_of`] made.
///
/// # Errors
/// [`Error::Invalid`] when a record has another form than the schema; the row counts from 0.
pub fn batch<R: Record>(schema: &SchemaRef, records: &[R]) -> Result<RecordBatch> {
    let mut rows = Vec::with_capacity(records.len());
    for (i, r) in records.iter().enumerate() {
        let row = columns(r, schema);
        if let Some(name) = row.keys().find(|k| schema.field_with_name(k).is_err()) {
            return Err(other_form(i, format!("it has a column `{name}`")));
        }
        rows.push(row);
    }
    let mut arrays = Vec::with_capacity(schema.fields().len());
    for field in schema.fields() {
        let cells: Vec<Option<&Value>> = rows.iter().map(|r| r.get(field.name())).collect();
        if let Some(i) = cells
            .iter()
            .position(|c| c.is_none() && !field.is_nullable())
        {
            return Err(other_form(
                i,
                format!("it has no column `{}`", field.name()),
            ));
        }
        if let Some(i) = cells.iter().position(|c| is_other_form(field, *c)) {
            let what = format!("column `{}`: messages, not plain text", field.name());
            return Err(other_form(i, what));
        }
        arrays
            .push(array(&cells, field.data_type()).map_err(|(i, what)| {
                other_form(i, format!("column `{}`: {what}", field.name()))
            })?);
    }
    RecordBatch::try_new(schema.clone(), arrays).map_err(|e| Error::Invalid {
        what: format!("Arrow refuses the rows: {e}"),
        mend: "write rows of one form to a file".into(),
    })
}

/// Whether plain text was to stand here, and a list does: only values without a fixed shape become JSON
/// text.
fn is_other_form(field: &Field, cell: Option<&Value>) -> bool {
    match (field.data_type(), cell) {
        (DataType::Utf8, Some(v)) => v.is_array(),
        (DataType::List(item), Some(Value::Array(list))) if *item.data_type() == DataType::Utf8 => {
            list.iter().any(Value::is_array)
        }
        _ => false,
    }
}

fn other_form(row: usize, what: String) -> Error {
    Error::Invalid {
        what: format!("record {row} has another form than the first: {what}"),
        mend: "write rows of one form to a file".into(),
    }
}

/// The row as the schema's columns.
fn columns<R: Record>(r: &R, schema: &Schema) -> Row {
    let mut row = r.to_row();
    if R::KIND == "prompt" && schema.field_with_name("fields").is_ok() {
        let mut known = Row::new();
        for name in ["prompt", "weight", "source"] {
            if let Some(v) = row.remove(name) {
                known.insert(name.into(), v);
            }
        }
        known.insert(
            "fields".into(),
            Value::String(Value::Object(row).to_string()),
        );
        return known;
    }
    row
}

fn list_of(item: DataType) -> DataType {
    DataType::List(Arc::new(Field::new("item", item, false)))
}

fn message_type() -> DataType {
    DataType::Struct(Fields::from(vec![
        Field::new("role", DataType::Utf8, false),
        Field::new("content", DataType::Utf8, false),
        Field::new("name", DataType::Utf8, true),
        Field::new("tool_calls", DataType::Utf8, true),
    ]))
}

fn source_type() -> DataType {
    DataType::Struct(Fields::from(vec![
        Field::new("dataset", DataType::Utf8, true),
        Field::new("annotator", DataType::Utf8, true),
        Field::new("model", DataType::Utf8, true),
        Field::new("policy_version", DataType::UInt64, true),
        Field::new("sampler", DataType::Utf8, true),
        Field::new("other", DataType::Utf8, true),
    ]))
}

/// The type of a column by its name and the form of its value.
fn column_type(name: &str, v: &Value) -> DataType {
    match (name, v) {
        ("label", _) => DataType::Boolean,
        ("labels", _) => list_of(DataType::Boolean),
        ("completions", Value::Array(items)) => list_of(match items.first() {
            Some(Value::Array(_)) => list_of(message_type()),
            _ => DataType::Utf8,
        }),
        (_, Value::Array(_)) => list_of(message_type()),
        _ => DataType::Utf8,
    }
}

/// Values as an array of a type; the error names the value's index.
fn array(cells: &[Option<&Value>], t: &DataType) -> std::result::Result<ArrayRef, (usize, String)> {
    let wrong = |i: usize, wanted: &str| (i, format!("expected {wanted}"));
    Ok(match t {
        DataType::Utf8 => {
            let mut b = StringBuilder::new();
            for c in cells {
                match present(*c) {
                    None => b.append_null(),
                    Some(Value::String(s)) => b.append_value(s),
                    // A value without a fixed shape.
                    Some(v @ (Value::Object(_) | Value::Array(_))) => b.append_value(v.to_string()),
                    Some(v) => b.append_value(v.to_string()),
                }
            }
            Arc::new(b.finish())
        }
        DataType::Boolean => {
            let mut b = BooleanBuilder::new();
            for (i, c) in cells.iter().enumerate() {
                b.append_option(match present(*c) {
                    None => None,
                    Some(v) => Some(v.as_bool().ok_or_else(|| wrong(i, "true or false"))?),
                });
            }
            Arc::new(b.finish())
        }
        DataType::Float64 => {
            let mut b = Float64Builder::new();
            for (i, c) in cells.iter().enumerate() {
                b.append_option(match present(*c) {
                    None => None,
                    Some(v) => Some(v.as_f64().ok_or_else(|| wrong(i, "a number"))?),
                });
            }
            Arc::new(b.finish())
        }
        DataType::UInt64 => {
            let mut b = UInt64Builder::new();
            for (i, c) in cells.iter().enumerate() {
                b.append_option(match present(*c) {
                    None => None,
                    Some(v) => Some(v.as_u64().ok_or_else(|| wrong(i, "a whole number"))?),
                });
            }
            Arc::new(b.finish())
        }
        DataType::List(item) => {
            let (mut items, mut lengths, mut owner) = (Vec::new(), Vec::new(), Vec::new());
            for (i, c) in cells.iter().enumerate() {
                let list = match present(*c) {
                    None => &[][..],
                    Some(Value::Array(a)) => a.as_slice(),
                    Some(_) => return Err(wrong(i, "a list")),
                };
                lengths.push(list.len());
                items.extend(list.iter().map(Some));
                owner.extend(std::iter::repeat_n(i, list.len()));
            }
            let values = array(&items, item.data_type())
                .map_err(|(i, what)| (owner.get(i).copied().unwrap_or_default(), what))?;
            if !item.is_nullable() && values.null_count() > 0 {
                let i = (0..values.len())
                    .find(|i| values.is_null(*i))
                    .unwrap_or_default();
                return Err(wrong(
                    owner.get(i).copied().unwrap_or_default(),
                    "no null in a list",
                ));
            }
            Arc::new(ListArray::new(
                item.clone(),
                OffsetBuffer::from_lengths(lengths),
                values,
                nulls(cells),
            ))
        }
        DataType::Struct(fields) => {
            let mut arrays = Vec::with_capacity(fields.len());
            for f in fields {
                let mut inner = Vec::with_capacity(cells.len());
                for (i, c) in cells.iter().enumerate() {
                    inner.push(match present(*c) {
                        None => None,
                        Some(Value::Object(o)) => o.get(f.name()),
                        Some(_) => return Err(wrong(i, "an object")),
                    });
                }
                arrays.push(array(&inner, f.data_type())?);
            }
            let length = cells.len();
            Arc::new(
                StructArray::try_new_with_length(fields.clone(), arrays, nulls(cells), length)
                    .map_err(|e| (0, e.to_string()))?,
            )
        }
        other => return Err((0, format!("a column of the type {other}"))),
    })
}

fn present(c: Option<&Value>) -> Option<&Value> {
    c.filter(|v| !v.is_null())
}

fn nulls(cells: &[Option<&Value>]) -> Option<NullBuffer> {
    let valid: Vec<bool> = cells.iter().map(|c| present(*c).is_some()).collect();
    valid.contains(&false).then(|| NullBuffer::from(valid))
}
