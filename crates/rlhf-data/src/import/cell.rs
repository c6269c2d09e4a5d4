//! A value of a source row with its name, so that what is wrong with it can be said.

use serde_json::{Map, Value, json};

use crate::record::Fault;

/// A source row.
pub(super) type Columns = Map<String, Value>;

/// A value and where it stands in its row: `info`, `answers[2].rank`.
#[derive(Clone, Debug)]
pub(super) struct Cell<'a> {
    value: &'a Value,
    name: String,
}

/// The value of a column that must be there.
pub(super) fn cell<'a>(row: &'a Columns, column: &str) -> Result<Cell<'a>, Fault> {
    optional(row, column).ok_or_else(|| {
        let have: Vec<&str> = row.keys().map(String::as_str).collect();
        fault(
            "missing_column",
            column,
            format!("it is absent or null; there are {}", have.join(", ")),
            "correct the row, or name another importer",
        )
    })
}

/// The value of a column, unless it is absent or null.
pub(super) fn optional<'a>(row: &'a Columns, column: &str) -> Option<Cell<'a>> {
    let value = row.get(column).filter(|v| !v.is_null())?;
    Some(Cell {
        value,
        name: column.into(),
    })
}

/// A fault.
pub(super) fn fault(
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

impl<'a> Cell<'a> {
    /// The value itself.
    pub(super) fn value(&self) -> &'a Value {
        self.value
    }

    /// A fault of this value.
    pub(super) fn fault(&self, rule: &'static str, what: impl Into<String>) -> Fault {
        fault(rule, &self.name, what, "correct or drop the row")
    }

    fn expected(&self, wanted: &str) -> Fault {
        let what = format!("{}, expected {wanted}", kind_of(self.value));
        self.fault("wrong_type", what)
    }

    /// A field that must be there.
    pub(super) fn field(&self, key: &str) -> Result<Cell<'a>, Fault> {
        if !self.value.is_object() {
            return Err(self.expected("an object"));
        }
        self.maybe(key)
            .ok_or_else(|| self.fault("missing_column", format!("there is no `{key}` in it")))
    }

    /// A field, unless it is absent or null.
    pub(super) fn maybe(&self, key: &str) -> Option<Cell<'a>> {
        let value = self.value.get(key).filter(|v| !v.is_null())?;
        Some(Cell {
            value,
            name: format!("{}.{key}", self.name),
        })
    }

    /// The items of a list.
    pub(super) fn items(&self) -> Result<Vec<Cell<'a>>, Fault> {
        let Value::Array(list) = self.value else {
            return Err(self.expected("a list"));
        };
        Ok(list
            .iter()
            .enumerate()
            .map(|(i, value)| Cell {
                value,
                name: format!("{}[{i}]", self.name),
            })
            .collect())
    }

    /// Text, which may be empty.
    pub(super) fn text(&self) -> Result<&'a str, Fault> {
        self.value.as_str().ok_or_else(|| self.expected("text"))
    }

    /// Text with more than white space.
    pub(super) fn filled(&self) -> Result<&'a str, Fault> {
        let text = self.text()?;
        if text.trim().is_empty() {
            return Err(self.fault("empty", "empty text"));
        }
        Ok(text)
    }

    /// A finite number; as text too, since CSV has nothing else.
    pub(super) fn number(&self) -> Result<f64, Fault> {
        let number = match self.value {
            Value::Number(n) => n.as_f64(),
            Value::String(s) => s.trim().parse().ok(),
            _ => return Err(self.expected("a number")),
        };
        number
            .filter(|n| n.is_finite())
            .ok_or_else(|| self.fault("not_finite", format!("{} is no finite number", self.value)))
    }

    /// An index below `len`.
    pub(super) fn index(&self, len: usize) -> Result<usize, Fault> {
        let n = self.number()?;
        (0..len).find(|i| *i as f64 == n).ok_or_else(|| {
            self.fault(
                "out_of_range",
                format!("{n}, expected a whole number below {len}"),
            )
        })
    }
}

/// A message.
pub(super) fn message(role: &str, content: &str) -> Value {
    json!({"role": role, "content": content})
}

/// A prompt of one message of the user.
pub(super) fn user(content: &str) -> Value {
    Value::Array(vec![message("user", content)])
}

/// A completion of one message of the assistant.
pub(super) fn assistant(content: &str) -> Value {
    Value::Array(vec![message("assistant", content)])
}

/// A row from its columns.
pub(super) fn row<const N: usize>(columns: [(&str, Value); N]) -> Columns {
    columns
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// A name as text: of several, one after the other.
fn text_of(v: &Value) -> String {
    match v {
        Value::String(s) => s.clone(),
        Value::Array(names) => names.iter().map(text_of).collect::<Vec<_>>().join(", "),
        other => other.to_string(),
    }
}

/// Adds to the row's `source`, which says where it comes from, the columns of the original that it has.
pub(super) fn provenance(to: &mut Columns, from: &Columns, columns: &[(&str, &str)]) {
    let mut source = match to.remove("source") {
        Some(Value::Object(source)) => source,
        _ => Map::new(),
    };
    for (column, name) in columns {
        if let Some(c) = optional(from, column) {
            let value = match *name {
                "dataset" | "annotator" | "model" => text_of(c.value()).into(),
                _ => c.value().clone(),
            };
            source.insert((*name).to_owned(), value);
        }
    }
    if !source.is_empty() {
        to.insert("source".into(), Value::Object(source));
    }
}

/// A whole number as such, so that ranks and ratings look as they did.
pub(super) fn tidy(n: f64) -> Value {
    if n.fract() == 0.0 && n.abs() < 9e15 {
        Value::from(n as i64)
    } else {
        Value::from(n)
    }
}
