//! JSON Lines.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, Visitor};
use serde_json::{Map, Value};

use super::Row;
use super::open::MAX_LINE;
use crate::error::{Error, Result};

pub(super) fn rows(path: &Path, reader: Box<dyn BufRead + Send>) -> Lines {
    Lines {
        path: path.to_owned(),
        reader,
        line: 0,
        done: false,
    }
}

/// The rows of a JSON Lines file.
pub(super) struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    line: usize,
    done: bool,
}

impl Iterator for Lines {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        while !self.done {
            let mut bytes = Vec::new();
            self.line += 1;
            match self
                .reader
                .by_ref()
                .take(MAX_LINE)
                .read_until(b'\n', &mut bytes)
            {
                Ok(0) => return None,
                Ok(_) => {}
                Err(e) => {
                    self.done = true;
                    return Some(Err(self.bad(
                        format!("cannot read on: {e}"),
                        "get the file again: it is damaged",
                    )));
                }
            }
            if bytes.len() as u64 == MAX_LINE {
                self.done = true;
                return Some(Err(self.bad(
                    format!("a line of more than {} MiB", MAX_LINE >> 20),
                    "split or drop the row",
                )));
            }
            let row = self.parse(&bytes);
            match row {
                Ok(None) => {}
                Ok(Some(columns)) => {
                    return Some(Ok(Row {
                        place: format!("line {}", self.line),
                        columns,
                    }));
                }
                Err(e) => {
                    self.done = true;
                    return Some(Err(e));
                }
            }
        }
        None
    }
}

impl Lines {
    fn bad(&self, what: impl Into<String>, mend: &str) -> Error {
        Error::Row {
            path: self.path.clone(),
            place: format!("line {}", self.line),
            column: String::new(),
            what: what.into(),
            mend: mend.into(),
        }
    }

    fn parse(&self, bytes: &[u8]) -> Result<Option<Map<String, Value>>> {
        let bytes = if self.line == 1 {
            bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes)
        } else {
            bytes
        };
        let text = std::str::from_utf8(bytes)
            .map_err(|e| {
                self.bad(
                    format!("invalid UTF-8 at byte {}", e.valid_up_to()),
                    "convert the file to UTF-8",
                )
            })?
            .trim();
        if text.is_empty() {
            return Ok(None);
        }
        if text.starts_with('[') {
            return Err(self.bad(
                "a JSON array, expected one object a line",
                "write each element on a line of its own",
            ));
        }
        let object: Object = serde_json::from_str(text).map_err(|e| {
            // The place names the line; serde_json counts it as the first.
            let what = format!("no JSON object: {e}").replace(" at line 1 column ", " at column ");
            self.bad(what, "correct or drop the line")
        })?;
        Ok(Some(object.0))
    }
}

/// A JSON object whose keys are all different.
pub(super) struct Object(pub(super) Map<String, Value>);

impl<'de> Deserialize<'de> for Object {
    fn deserialize<D: Deserializer<'de>>(d: D) -> std::result::Result<Self, D::Error> {
        struct Keys;
        impl<'de> Visitor<'de> for Keys {
            type Value = Object;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(
                self,
                mut access: A,
            ) -> std::result::Result<Object, A::Error> {
                let mut map = Map::new();
                while let Some((key, value)) = access.next_entry::<String, Value>()? {
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format!("the key `{key}` stands twice")));
                    }
                    map.insert(key, value);
                }
                Ok(Object(map))
            }
        }
        d.deserialize_map(Keys)
    }
}
