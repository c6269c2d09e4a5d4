//! Solutions in steps whose labels are more than right or wrong.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::kinds::{StepwiseRecord, as_row, number};
use super::{Fault, PreferenceRecord, Record, Row, fault, kind_of};
use crate::conversation::Text;

/// What is said of a step.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Grade {
    /// Right or wrong.
    Flag(bool),
    /// A number: −1, 0 or 1 for wrong, neutral and right, or the probability of being right. Which of
    /// them, and so what 0 means, is for the reader to know.
    Number(f64),
}

/// A solution in steps, each with a grade. Reads what a [`StepwiseRecord`] reads too.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GradedStepsRecord {
    /// The prompt.
    pub prompt: Text,
    /// The steps.
    pub completions: Vec<String>,
    /// The grade of each.
    pub labels: Vec<Grade>,
}

impl Record for GradedStepsRecord {
    const KIND: &'static str = "stepwise";

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        // Everything but the labels' kind is as in a stepwise row, and checked there.
        let mut labels = Vec::new();
        if let Some(Value::Array(list)) = row.get_mut("labels") {
            for label in list {
                labels.push(match &*label {
                    Value::Bool(flag) => Grade::Flag(*flag),
                    other => match number(Some(other.clone()), "labels")? {
                        Some(x) => Grade::Number(x),
                        None => {
                            return Err(fault(
                                "wrong_type",
                                "labels",
                                format!("{}, expected a truth value or a number", kind_of(other)),
                                "correct or drop the row",
                            ));
                        }
                    },
                });
                *label = Value::Bool(true);
            }
        }
        let StepwiseRecord {
            prompt,
            completions,
            ..
        } = StepwiseRecord::from_row(row)?;
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

/// Two completions of one prompt with all that may be said of them: a probability instead of a certain
/// label, and what kind of pair it is. Reads what a [`PreferenceRecord`] reads too.
#[derive(Clone, Debug, PartialEq)]
pub struct JudgedPairRecord {
    /// The pair.
    pub pair: PreferenceRecord,
    /// Column `preference`: the probability that the chosen is the better one, ½ for a tie; 1 where absent.
    pub preference: Option<f64>,
    /// Column `subset` or `category`.
    pub subset: Option<String>,
}

impl From<PreferenceRecord> for JudgedPairRecord {
    fn from(pair: PreferenceRecord) -> Self {
        Self {
            pair,
            preference: None,
            subset: None,
        }
    }
}

impl Record for JudgedPairRecord {
    const KIND: &'static str = "preference";

    fn from_row(mut row: Row) -> Result<Self, Fault> {
        let preference = number(row.remove("preference"), "preference")?;
        if let Some(p) = preference.filter(|p| !(0.0..=1.0).contains(p)) {
            return Err(fault(
                "off_scale",
                "preference",
                format!("{p}, expected a probability, 0 to 1"),
                "correct or drop the row",
            ));
        }
        let subset = match row.remove("subset").or_else(|| row.remove("category")) {
            Some(Value::String(name)) => Some(name),
            _ => None,
        };
        Ok(Self {
            pair: PreferenceRecord::from_row(row)?,
            preference,
            subset,
        })
    }

    fn to_row(&self) -> Row {
        let mut row = self.pair.to_row();
        if let Some(p) = self.preference {
            row.insert("preference".into(), p.into());
        }
        if let Some(name) = &self.subset {
            row.insert("subset".into(), name.clone().into());
        }
        row
    }
}
