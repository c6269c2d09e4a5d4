//! The other kinds of rows: ranked, unpaired, stepwise, rated; and what may stand beside any row.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{Fault, Record, Row, fault, kind_of, missing, not_blank, same_form, take, text};
use crate::conversation::Text;

/// K completions of one prompt, of which some are better.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankedRecord {
    /// The prompt.
    pub prompt: Text,
    /// At least two completions.
    pub completions: Vec<Text>,
    /// A score of each, more is better; without scores the completions stand best first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scores: Option<Vec<f64>>,
}

impl RankedRecord {
    /// The score of each completion; without scores those of its place, from K−1 down to 0.
    #[must_use]
    pub fn worth(&self) -> Vec<f64> {
        let k = self.completions.len();
        self.scores
            .clone()
            .unwrap_or_else(|| (0..k).map(|i| (k - 1 - i) as f64).collect())
    }
}

/// A completion with a thumb up or down.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnpairedRecord {
    /// The prompt.
    pub prompt: Text,
    /// The completion.
    pub completion: Text,
    /// Whether it is good.
    pub label: bool,
}

/// A solution in steps, each right or wrong.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct StepwiseRecord {
    /// The prompt.
    pub prompt: Text,
    /// The steps.
    pub completions: Vec<String>,
    /// Whether each step is right.
    pub labels: Vec<bool>,
}

/// A completion with a number for each of several attributes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RatedRecord {
    /// The prompt.
    pub prompt: Text,
    /// The completion.
    pub completion: Text,
    /// The attributes: `helpfulness`, `correctness`, …
    pub ratings: BTreeMap<String, f64>,
}

/// Where a row comes from.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Source {
    /// The data set.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dataset: Option<String>,
    /// Who labelled it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotator: Option<String>,
    /// Which model wrote the completions.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// The optimiser step of that model's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy_version: Option<u64>,
    /// How it sampled: temperature and the like.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sampler: Option<serde_json::Map<String, Value>>,
    /// Whatever else is known: a row's id, a thread's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other: Option<serde_json::Map<String, Value>>,
}

/// A record with a weight and its provenance, columns `weight` and `source`.
#[derive(Clone, Debug, PartialEq)]
pub struct Annotated<R> {
    /// The record.
    pub record: R,
    /// Its weight, at least 0; `None` is 1.
    pub weight: Option<f64>,
    /// Its provenance.
    pub source: Option<Source>,
}

impl<R> From<R> for Annotated<R> {
    fn from(record: R) -> Self {
        Self {
            record,
            weight: None,
            source: None,
        }
    }
}

impl<R: Record> Record for Annotated<R> {
    const KIND: &'static str = R::KIND;

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        let weight = number(row.remove("weight"), "weight")?;
        if weight.is_some_and(|w| w < 0.0) {
            return Err(fault(
                "negative_weight",
                "weight",
                "a weight below 0",
                "correct the weight or drop the column",
            ));
        }
        let source = match row.remove("source") {
            None | Some(Value::Null) => None,
            // Many files name their source by a word.
            Some(Value::String(name)) => Some(Source {
                dataset: Some(name),
                ..Source::default()
            }),
            Some(v) => Some(serde_json::from_value(provenance(v)).map_err(|e| {
                fault(
                    "wrong_type",
                    "source",
                    format!("no provenance: {e}"),
                    "give dataset, annotator, model, policy_version, sampler, or drop the column",
                )
            })?),
        };
        Ok(Self {
            record: R::from_row(row)?,
            weight,
            source,
        })
    }

    fn to_row(&self) -> Row {
        let mut row = self.record.to_row();
        if let Some(w) = self.weight {
            row.insert("weight".into(), w.into());
        }
        if let Some(s) = &self.source {
            row.insert("source".into(), serde_json::to_value(s).unwrap_or_default());
        }
        row
    }
}

/// The fields of a [`Source`]: without nulls, JSON text read, unknown ones under `other`.
fn provenance(v: Value) -> Value {
    const KNOWN: [&str; 5] = ["dataset", "annotator", "model", "policy_version", "sampler"];
    let Value::Object(fields) = v else {
        return v;
    };
    let mut out = Row::new();
    let mut other = Row::new();
    for (key, value) in fields.into_iter().filter(|(_, v)| !v.is_null()) {
        // Parquet holds objects as JSON text.
        let value = match value {
            Value::String(s) if matches!(key.as_str(), "sampler" | "other") => {
                serde_json::from_str(&s).unwrap_or(Value::String(s))
            }
            value => value,
        };
        match value {
            Value::Object(more) if key == "other" => other.extend(more),
            value if KNOWN.contains(&key.as_str()) => {
                out.insert(key, value);
            }
            value => {
                other.insert(key, value);
            }
        }
    }
    if !other.is_empty() {
        out.insert("other".into(), Value::Object(other));
    }
    Value::Object(out)
}

impl Record for RankedRecord {
    const KIND: &'static str = "ranked";

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        has(&row, &["prompt", "completions"])?;
        let prompt = not_blank(text(&take(&mut row, "prompt")?, "prompt")?, "prompt")?;
        let completions = list(take(&mut row, "completions")?, "completions")?
            .iter()
            .map(|c| {
                let c = not_blank(text(c, "completions")?, "completions")?;
                same_form(&prompt, &c, "completions")?;
                Ok(c)
            })
            .collect::<Result<Vec<Text>, Fault>>()?;
        if completions.len() < 2 {
            return Err(fault(
                "too_few",
                "completions",
                format!("{} completion, expected at least 2", completions.len()),
                "drop the row",
            ));
        }
        let scores = match row.remove("scores") {
            None | Some(Value::Null) => None,
            Some(v) => {
                let scores = list(v, "scores")?
                    .into_iter()
                    .map(|v| {
                        number(Some(v), "scores")?.ok_or_else(|| {
                            fault(
                                "wrong_type",
                                "scores",
                                "null, expected a number",
                                "drop the row",
                            )
                        })
                    })
                    .collect::<Result<Vec<f64>, Fault>>()?;
                same_length("scores", scores.len(), completions.len())?;
                Some(scores)
            }
        };
        Ok(Self {
            prompt,
            completions,
            scores,
        })
    }

    fn to_row(&self) -> Row {
        as_row(self)
    }
}

impl Record for UnpairedRecord {
    const KIND: &'static str = "unpaired";

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        has(&row, &["label", "prompt", "completion"])?;
        let label = match take(&mut row, "label")? {
            Value::Bool(b) => b,
            other => {
                return Err(fault(
                    "wrong_type",
                    "label",
                    format!("{}, expected true or false", kind_of(&other)),
                    "convert the column to truth values",
                ));
            }
        };
        let (prompt, completion) = answered(&mut row)?;
        Ok(Self {
            prompt,
            completion,
            label,
        })
    }

    fn to_row(&self) -> Row {
        as_row(self)
    }
}

impl Record for StepwiseRecord {
    const KIND: &'static str = "stepwise";

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        has(&row, &["prompt", "completions", "labels"])?;
        let prompt = not_blank(text(&take(&mut row, "prompt")?, "prompt")?, "prompt")?;
        let completions = list(take(&mut row, "completions")?, "completions")?
            .into_iter()
            .map(|step| match step {
                Value::String(s) if !s.trim().is_empty() => Ok(s),
                Value::String(_) => Err(fault(
                    "empty",
                    "completions",
                    "an empty step",
                    "drop the row",
                )),
                other => Err(fault(
                    "wrong_type",
                    "completions",
                    format!("{} as a step, expected text", kind_of(&other)),
                    "correct or drop the row",
                )),
            })
            .collect::<Result<Vec<String>, Fault>>()?;
        if completions.is_empty() {
            return Err(fault("empty", "completions", "no steps", "drop the row"));
        }
        let labels = list(take(&mut row, "labels")?, "labels")?
            .into_iter()
            .map(|l| {
                l.as_bool().ok_or_else(|| {
                    fault(
                        "wrong_type",
                        "labels",
                        format!("{}, expected true or false", kind_of(&l)),
                        "convert the labels to truth values",
                    )
                })
            })
            .collect::<Result<Vec<bool>, Fault>>()?;
        same_length("labels", labels.len(), completions.len())?;
        Ok(Self {
            prompt,
            completions,
            labels,
        })
    }

    fn to_row(&self) -> Row {
        as_row(self)
    }
}

impl Record for RatedRecord {
    const KIND: &'static str = "rated";

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        has(&row, &["ratings", "prompt", "completion"])?;
        let ratings = match take(&mut row, "ratings")? {
            Value::Object(o) => o,
            // Parquet holds it as JSON text.
            Value::String(json) => serde_json::from_str(&json).map_err(|e| {
                fault(
                    "wrong_type",
                    "ratings",
                    format!("no JSON object: {e}"),
                    "give an object of numbers",
                )
            })?,
            other => {
                return Err(fault(
                    "wrong_type",
                    "ratings",
                    format!("{}, expected an object of numbers", kind_of(&other)),
                    "give an object of numbers",
                ));
            }
        };
        let ratings = ratings
            .into_iter()
            .filter_map(|(k, v)| {
                number(Some(v), "ratings")
                    .map(|n| Some((k, n?)))
                    .transpose()
            })
            .collect::<Result<BTreeMap<String, f64>, Fault>>()?;
        if ratings.is_empty() {
            return Err(fault("empty", "ratings", "no ratings", "drop the row"));
        }
        let (prompt, completion) = answered(&mut row)?;
        Ok(Self {
            prompt,
            completion,
            ratings,
        })
    }

    fn to_row(&self) -> Row {
        as_row(self)
    }
}

/// A record whose serde form has its columns.
pub(super) fn as_row(record: &impl Serialize) -> Row {
    match serde_json::to_value(record) {
        Ok(Value::Object(row)) => row,
        _ => Row::new(),
    }
}

/// Names the first column that is not there, while all others still are.
fn has(row: &Row, columns: &[&str]) -> Result<(), Fault> {
    match columns.iter().find(|c| !row.contains_key(**c)) {
        Some(c) => Err(missing(&format!("`{c}`"), row)),
        None => Ok(()),
    }
}

fn answered(row: &mut Row) -> Result<(Text, Text), Fault> {
    let prompt = not_blank(text(&take(row, "prompt")?, "prompt")?, "prompt")?;
    let completion = not_blank(text(&take(row, "completion")?, "completion")?, "completion")?;
    same_form(&prompt, &completion, "completion")?;
    Ok((prompt, completion))
}

fn list(v: Value, column: &str) -> Result<Vec<Value>, Fault> {
    match v {
        Value::Array(a) => Ok(a),
        other => Err(fault(
            "wrong_type",
            column,
            format!("{}, expected a list", kind_of(&other)),
            "correct or drop the row",
        )),
    }
}

/// A finite number, or nothing.
pub(super) fn number(v: Option<Value>, column: &str) -> Result<Option<f64>, Fault> {
    match v {
        None | Some(Value::Null) => Ok(None),
        Some(v) => match v.as_f64() {
            Some(x) if x.is_finite() => Ok(Some(x)),
            _ => Err(fault(
                "not_finite",
                column,
                format!("{v} is no finite number"),
                format!("correct the {column} or drop the column"),
            )),
        },
    }
}

fn same_length(column: &str, found: usize, expected: usize) -> Result<(), Fault> {
    if found == expected {
        return Ok(());
    }
    Err(fault(
        "wrong_length",
        column,
        format!("{found} for {expected} completions"),
        "give one for each completion",
    ))
}
