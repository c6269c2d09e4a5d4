//! Rows that are canonical already.

use serde_json::{Value, json};

use super::cell::{Columns, optional};
use crate::record::Fault;

/// Columns that hold a list or an object: as text, which is all that CSV has, they are JSON.
const STRUCTURED: [&str; 10] = [
    "messages",
    "completions",
    "scores",
    "ranks",
    "labels",
    "ratings",
    "source",
    "tools",
    "instruction_id_list",
    "kwargs",
];

/// The row as it is; numbers, truth values, lists and objects that stand as text, as they do in CSV, are
/// read, and a `source` that is a mere name becomes the name of a dataset.
pub(super) fn canonical(mut row: Columns) -> Result<Columns, Fault> {
    for column in STRUCTURED {
        let Some(c) = optional(&row, column) else {
            continue;
        };
        let Some(text) = c.value().as_str() else {
            continue;
        };
        let value = if text.trim_start().starts_with(['[', '{']) {
            serde_json::from_str(text)
                .map_err(|e| c.fault("wrong_type", format!("text that is no JSON: {e}")))?
        } else if column == "source" {
            json!({"dataset": text})
        } else {
            continue;
        };
        row.insert(column.into(), value);
    }
    for column in ["margin", "weight"] {
        if let Some(c) = optional(&row, column)
            && c.value().is_string()
        {
            let n = c.number()?;
            row.insert(column.into(), Value::from(n));
        }
    }
    if let Some(c) = optional(&row, "label")
        && let Some(text) = c.value().as_str()
    {
        let label = match text.trim().to_ascii_lowercase().as_str() {
            "true" | "1" => true,
            "false" | "0" => false,
            _ => return Err(c.fault("wrong_type", "text that is neither true nor false")),
        };
        row.insert("label".into(), Value::Bool(label));
    }
    Ok(row)
}
