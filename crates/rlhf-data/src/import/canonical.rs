//! Rows that are canonical already.

use serde_json::Value;

use super::cell::{Columns, optional};
use crate::record::Fault;

/// The row as it is; numbers and truth values that stand as text, as they do in CSV, are read.
pub(super) fn canonical(mut row: Columns) -> Result<Columns, Fault> {
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
