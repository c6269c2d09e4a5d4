//! A JSON array of objects in one file, as Alpaca's are: element by element.
//!
//! Invariant: no more than one element is held, however long the array is.

use std::io::BufRead;
use std::path::{Path, PathBuf};

use super::Row;
use super::jsonl::Object;
use super::open::MAX_LINE;
use crate::error::{Error, Result};

/// The elements of an array.
pub(super) struct Elements {
    path: PathBuf,
    reader: Box<dyn BufRead + Send>,
    element: usize,
    state: State,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum State {
    Before,
    Within,
    Done,
}

/// The elements of an array that begins at the reader's next byte that is no white space.
pub(super) fn rows(path: &Path, reader: Box<dyn BufRead + Send>) -> Elements {
    Elements {
        path: path.to_owned(),
        reader,
        element: 0,
        state: State::Before,
    }
}

impl Elements {
    fn bad(&self, what: impl Into<String>, mend: &str) -> Error {
        Error::Row {
            path: self.path.clone(),
            place: format!("element {}", self.element),
            column: String::new(),
            what: what.into(),
            mend: mend.into(),
        }
    }

    fn io(&self, e: &std::io::Error) -> Error {
        self.bad(
            format!("cannot read on: {e}"),
            "get the file again: it is damaged",
        )
    }

    /// The next byte that is no white space, left in place.
    fn peek(&mut self) -> Result<Option<u8>> {
        loop {
            let (skip, found) = match self.reader.fill_buf() {
                Ok([]) => return Ok(None),
                Ok(buffer) => {
                    let skip = buffer
                        .iter()
                        .take_while(|b| b.is_ascii_whitespace())
                        .count();
                    (skip, buffer.get(skip).copied())
                }
                Err(e) => return Err(self.io(&e)),
            };
            self.reader.consume(skip);
            if found.is_some() {
                return Ok(found);
            }
        }
    }

    fn expect(&mut self, wanted: &str) -> Result<u8> {
        self.peek()?.ok_or_else(|| {
            self.bad(
                format!("the file ends, expected {wanted}"),
                "get the file again: it is cut off",
            )
        })
    }

    /// The bytes of the object that begins at the next byte.
    fn object(&mut self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let (mut depth, mut quoted, mut escaped) = (0_usize, false, false);
        loop {
            let (used, whole) = match self.reader.fill_buf() {
                Ok([]) => {
                    return Err(self.bad(
                        "the file ends within it",
                        "get the file again: it is cut off",
                    ));
                }
                Ok(buffer) => {
                    let mut end = None;
                    for (i, b) in buffer.iter().enumerate() {
                        match b {
                            _ if escaped => escaped = false,
                            b'\\' if quoted => escaped = true,
                            b'"' => quoted = !quoted,
                            b'{' | b'[' if !quoted => depth += 1,
                            b'}' | b']' if !quoted => depth = depth.saturating_sub(1),
                            _ => {}
                        }
                        if depth == 0 {
                            end = Some(i + 1);
                            break;
                        }
                    }
                    let used = end.unwrap_or(buffer.len());
                    bytes.extend_from_slice(&buffer[..used]);
                    (used, end.is_some())
                }
                Err(e) => return Err(self.io(&e)),
            };
            self.reader.consume(used);
            if whole {
                return Ok(bytes);
            }
            if bytes.len() as u64 > MAX_LINE {
                return Err(self.bad(
                    format!("an element of more than {} MiB", MAX_LINE >> 20),
                    "split or drop the row",
                ));
            }
        }
    }

    fn read(&mut self) -> Result<Option<Row>> {
        let mend = "correct the file";
        if self.state == State::Before {
            let start = self.reader.fill_buf();
            if start.is_ok_and(|b| b.starts_with(b"\xef\xbb\xbf")) {
                self.reader.consume(3);
            }
            self.expect("`[`")?;
            self.reader.consume(1);
            self.state = State::Within;
            if self.expect("`]`")? == b']' {
                return self.end();
            }
        } else {
            match self.expect("`]`")? {
                b']' => return self.end(),
                b',' => self.reader.consume(1),
                _ => return Err(self.bad("no `,` before it", mend)),
            }
        }
        if self.expect("an object")? != b'{' {
            return Err(self.bad("no object", mend));
        }
        let bytes = self.object()?;
        let object: Object = serde_json::from_slice(&bytes)
            .map_err(|e| self.bad(format!("no JSON object: {e}"), "correct or drop the row"))?;
        let place = format!("element {}", self.element);
        self.element += 1;
        Ok(Some(Row {
            place,
            columns: object.0,
        }))
    }

    fn end(&mut self) -> Result<Option<Row>> {
        self.reader.consume(1);
        match self.peek()? {
            None => Ok(None),
            Some(_) => Err(self.bad("more follows after the array", "correct the file")),
        }
    }
}

impl Iterator for Elements {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.state == State::Done {
            return None;
        }
        let row = self.read().transpose();
        if !matches!(row, Some(Ok(_))) {
            self.state = State::Done;
        }
        row
    }
}
