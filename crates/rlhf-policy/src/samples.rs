//! `samples.parquet`: what a policy wrote while it was trained.
//!
//! Invariant: rows are in order of steps; a training that resumes replaces the rows of the steps that it does again.

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, BooleanArray, Float64Array, RecordBatch, StringArray, UInt64Array};
use arrow_schema::{Field, Schema};
use rlhf_data::source::{self, ParquetOut};
use serde_json::Value;

use crate::error::{Error, Result};

/// A completion of a step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Sample {
    pub(crate) step: u64,
    pub(crate) prompt: String,
    pub(crate) completion: String,
    pub(crate) reward: f64,
    pub(crate) advantage: f64,
    pub(crate) kl: f64,
    pub(crate) length: u64,
    pub(crate) ended: bool,
}

/// Keeps the rows of steps before `step` and adds `new`.
pub(crate) fn append(path: &Path, step: u64, new: Vec<Sample>) -> Result<()> {
    let mut rows = if path.is_file() {
        read(path)?
    } else {
        Vec::new()
    };
    rows.retain(|s| s.step < step);
    rows.extend(new);
    let numbers = |of: fn(&Sample) -> f64| -> ArrayRef {
        let finite = |x: f64| x.is_finite().then_some(x);
        Arc::new(Float64Array::from_iter(rows.iter().map(|s| finite(of(s)))))
    };
    let counts = |of: fn(&Sample) -> u64| -> ArrayRef {
        Arc::new(UInt64Array::from_iter_values(rows.iter().map(of)))
    };
    let texts = |of: fn(&Sample) -> &str| -> ArrayRef {
        Arc::new(StringArray::from_iter_values(rows.iter().map(of)))
    };
    let ended: BooleanArray = rows.iter().map(|s| Some(s.ended)).collect();
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("step", counts(|s| s.step)),
        ("prompt", texts(|s| &s.prompt)),
        ("completion", texts(|s| &s.completion)),
        ("reward", numbers(|s| s.reward)),
        ("advantage", numbers(|s| s.advantage)),
        ("kl", numbers(|s| s.kl)),
        ("length", counts(|s| s.length)),
        ("ended", Arc::new(ended)),
    ];
    let fields: Vec<Field> = columns
        .iter()
        .map(|(name, a)| Field::new(*name, a.data_type().clone(), true))
        .collect();
    let schema = Arc::new(Schema::new(fields));
    let arrays = columns.into_iter().map(|c| c.1).collect();
    let batch = RecordBatch::try_new(schema.clone(), arrays).map_err(|e| bad(path, &e))?;
    let mut out = ParquetOut::create(path, schema)?;
    out.write(&batch)?;
    out.finish()?;
    Ok(())
}

fn bad(path: &Path, what: &dyn std::fmt::Display) -> Error {
    Error::Recording {
        path: path.to_owned(),
        what: what.to_string(),
        mend: "remove the file",
    }
}

fn read(path: &Path) -> Result<Vec<Sample>> {
    let mut rows = Vec::new();
    for row in source::rows(path)? {
        let row = row?;
        let get = |name: &str| row.columns.get(name).unwrap_or(&Value::Null);
        let text = |name: &str| get(name).as_str().map(str::to_owned);
        let number = |name: &str| get(name).as_f64().unwrap_or(f64::NAN);
        let sample = || {
            Some(Sample {
                step: get("step").as_u64()?,
                prompt: text("prompt")?,
                completion: text("completion")?,
                reward: number("reward"),
                advantage: number("advantage"),
                kl: number("kl"),
                length: get("length").as_u64()?,
                ended: get("ended").as_bool()?,
            })
        };
        rows.push(sample().ok_or_else(|| bad(path, &format!("{} is no sample", row.place)))?);
    }
    Ok(rows)
}
