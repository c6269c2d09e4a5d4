//! CSV and TSV with a header. Every cell is text.
//!
//! Invariant: a file that ends within a quoted cell, or a row with too few or too many cells, is an
//! error.

use std::io::{BufRead, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use csv::{Reader, ReaderBuilder, StringRecord};
use serde_json::{Map, Value};

use super::Row;
use super::open::MAX_LINE;
use crate::error::{Error, Result};

/// A row put after the last: where it does not come out as such, a quote was left open before it.
const END: &str = "\u{0}end of the file\u{0}";

/// The rows of a CSV file.
pub(super) struct Rows {
    path: PathBuf,
    reader: Reader<Bounded>,
    left: Arc<AtomicU64>,
    header: Vec<String>,
    row: Option<u64>,
    done: bool,
}

/// Reads no more than what is left for one row.
struct Bounded {
    inner: Box<dyn Read + Send>,
    left: Arc<AtomicU64>,
}

impl Read for Bounded {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let n = self.inner.read(into)?;
        let left = self.left.load(Ordering::Relaxed);
        let left = left.checked_sub(n as u64).ok_or_else(|| {
            std::io::Error::other(format!("a row of more than {} MiB", MAX_LINE >> 20))
        })?;
        self.left.store(left, Ordering::Relaxed);
        Ok(n)
    }
}

pub(super) fn rows(path: &Path, mut text: Box<dyn BufRead + Send>, delimiter: u8) -> Result<Rows> {
    if text
        .fill_buf()
        .map_err(Error::io(path))?
        .starts_with(b"\xef\xbb\xbf")
    {
        text.consume(3);
    }
    let left = Arc::new(AtomicU64::new(MAX_LINE));
    let end = std::io::Cursor::new(format!("\n{END}\n").into_bytes());
    let inner = Box::new(text.chain(end));
    let reader = ReaderBuilder::new()
        .delimiter(delimiter)
        .has_headers(false)
        .flexible(true)
        .from_reader(Bounded {
            inner,
            left: Arc::clone(&left),
        });
    let mut rows = Rows {
        path: path.to_owned(),
        reader,
        left,
        header: Vec::new(),
        row: None,
        done: false,
    };
    if let Some((place, header)) = rows.record()? {
        for (i, name) in header.iter().enumerate() {
            if header.iter().take(i).any(|n| n == name) {
                return Err(rows.bad(&place, name, "the column stands twice", "rename one"));
            }
        }
        rows.header = header.iter().map(str::to_owned).collect();
    }
    Ok(rows)
}

impl Rows {
    fn bad(&self, place: &str, column: &str, what: impl Into<String>, mend: &str) -> Error {
        Error::Row {
            path: self.path.clone(),
            place: place.into(),
            column: column.into(),
            what: what.into(),
            mend: mend.into(),
        }
    }

    /// The next record and its place; `None` at the end.
    fn record(&mut self) -> Result<Option<(String, StringRecord)>> {
        self.left.store(MAX_LINE, Ordering::Relaxed);
        let mut record = StringRecord::new();
        let more = self.reader.read_record(&mut record);
        // The header is no row. Lines are not counted, since a cell may hold several.
        let place = match self.row {
            None => "the header".to_owned(),
            Some(row) => format!("row {row}"),
        };
        self.row = Some(self.row.map_or(0, |row| row + 1));
        match more {
            Ok(true) if record.len() == 1 && record.get(0) == Some(END) => Ok(None),
            Ok(true) if record.iter().any(|c| c.ends_with(&format!("{END}\n"))) => Err(self.bad(
                &place,
                "",
                "the file ends within a quoted cell",
                "close the quote, or get the file again: it is cut off",
            )),
            Ok(true) => Ok(Some((place, record))),
            Ok(false) => Err(self.bad(
                &place,
                "",
                "the file ends within a row",
                "get the file again: it is cut off",
            )),
            Err(e) => Err(self.bad(
                &place,
                "",
                format!("cannot read on: {e}"),
                "correct the file, or get it again",
            )),
        }
    }

    fn row(&mut self) -> Result<Option<Row>> {
        let Some((place, record)) = self.record()? else {
            return Ok(None);
        };
        if record.len() != self.header.len() {
            let what = format!(
                "{} cells, the header has {}",
                record.len(),
                self.header.len()
            );
            return Err(self.bad(&place, "", what, "quote the cells, or correct the row"));
        }
        let columns: Map<String, Value> = self
            .header
            .iter()
            .zip(&record)
            .map(|(name, cell)| (name.clone(), Value::from(cell)))
            .collect();
        Ok(Some(Row { place, columns }))
    }
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.done || self.header.is_empty() {
            return None;
        }
        let row = self.row().transpose();
        self.done = !matches!(row, Some(Ok(_)));
        row
    }
}
