//! Reading a file, folder or glob through an importer, streaming.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::oasst::{Tree, Trees};
use super::{Format, convert, sniff};
use crate::error::{Error, Result};
use crate::record::{Fault, Pairing, PreferenceRecord, RankedRecord, Record, ranked_to_pairs};
use crate::source::{self, Row};

/// How many places of skipped rows are remembered.
const MAX_PLACES: usize = 20;

/// What to do with a row that is not what its format says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnBad {
    /// Stop with an error that names it.
    #[default]
    Refuse,
    /// Leave it out and count it. A file that cannot be read on is an error all the same.
    Skip,
}

/// What was left out.
#[derive(Debug, Default)]
pub struct Skipped {
    /// How many rows were bad.
    pub count: u64,
    /// What was wrong with the first of them, at most 20.
    pub first: Vec<Error>,
    /// How many rows are well formed and yet give nothing, such as ties.
    pub nothing: u64,
}

/// The rows of a source in canonical columns, each with the place of the source row.
pub struct Import {
    path: PathBuf,
    rows: Box<dyn Iterator<Item = Result<Row>> + Send>,
    format: Option<Format>,
    bad: OnBad,
    skipped: Skipped,
    ready: VecDeque<Row>,
    /// Of a format whose rows make sense together.
    trees: Trees,
    done: bool,
}

impl std::fmt::Debug for Import {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Import")
            .field("path", &self.path)
            .field("format", &self.format)
            .field("bad", &self.bad)
            .field("skipped", &self.skipped)
            .finish_non_exhaustive()
    }
}

/// Reads what [`source::rows`] reads, through the importer of `format`; without one, the first row's
/// columns tell it.
///
/// # Errors
/// As [`source::rows`]. Errors of later rows come from the iterator: with [`OnBad::Refuse`] the first
/// bad row ends it.
pub fn read(path: &Path, format: Option<Format>, bad: OnBad) -> Result<Import> {
    Ok(Import {
        path: path.to_owned(),
        rows: source::rows(path)?,
        format,
        bad,
        skipped: Skipped::default(),
        ready: VecDeque::new(),
        trees: Trees::default(),
        done: false,
    })
}

/// The rows of a source as records of one kind; the first that is none ends it.
///
/// # Errors
/// As [`read()`].
pub fn records<R: Record + Send + 'static>(
    path: &Path,
    format: Format,
) -> Result<impl Iterator<Item = Result<R>> + Send + use<R>> {
    made(path, format, |row| R::from_row(row).map(|r| vec![r]))
}

/// The pairs of a source; a ranking gives all that it holds.
///
/// # Errors
/// As [`read()`].
pub fn preferences(
    path: &Path,
    format: Format,
) -> Result<impl Iterator<Item = Result<PreferenceRecord>> + Send + use<>> {
    made(path, format, |row| {
        if row.contains_key("completions") {
            let ranked = RankedRecord::from_row(row)?;
            return Ok(ranked_to_pairs(&ranked, Pairing::All, 0, 0).collect());
        }
        PreferenceRecord::from_row(row).map(|r| vec![r])
    })
}

fn made<R: Send + 'static>(
    path: &Path,
    format: Format,
    of: fn(Map<String, Value>) -> std::result::Result<Vec<R>, Fault>,
) -> Result<impl Iterator<Item = Result<R>> + Send + use<R>> {
    let owned = path.to_owned();
    let rows = read(path, Some(format), OnBad::Refuse)?;
    Ok(rows.flat_map(move |row| {
        let made = row.and_then(|(_, row)| {
            of(row.columns).map_err(|f| Error::Row {
                path: owned.clone(),
                place: row.place,
                column: f.column,
                what: f.what,
                mend: f.mend,
            })
        });
        let (records, error) = match made {
            Ok(records) => (records, None),
            Err(e) => (Vec::new(), Some(Err(e))),
        };
        records.into_iter().map(Ok).chain(error)
    }))
}

impl Import {
    /// The format, once it is known: from the beginning, or after the first row.
    #[must_use]
    pub fn format(&self) -> Option<Format> {
        self.format
    }

    /// What was left out so far.
    #[must_use]
    pub fn skipped(&self) -> &Skipped {
        &self.skipped
    }

    fn known(&mut self, row: &Row) -> Result<Format> {
        if let Some(format) = self.format {
            return Ok(format);
        }
        let Some(format) = sniff(&row.columns) else {
            let have: Vec<&str> = row.columns.keys().map(String::as_str).collect();
            return Err(Error::Row {
                path: self.path.clone(),
                place: row.place.clone(),
                column: String::new(),
                what: format!("no known format has the columns {}", have.join(", ")),
                mend: format!(
                    "name the importer, one of {}, or rename the columns",
                    Format::ALL.map(Format::name).join(", ")
                ),
            });
        };
        self.format = Some(format);
        Ok(format)
    }

    /// Converts one row into `ready`; a row to be skipped is counted.
    fn take(&mut self, row: Row) -> Result<()> {
        let format = self.known(&row)?;
        if format == Format::Oasst1 && row.columns.contains_key("message_id") {
            let ended = self.trees.ended_by(&row.columns);
            self.close(ended)?;
            return match self.trees.add(&row.place, &row.columns) {
                Ok(()) => Ok(()),
                Err(f) => self.bad(row.place, f),
            };
        }
        match convert(format, row.columns) {
            Ok(rows) => {
                self.give(&row.place, rows);
                Ok(())
            }
            Err(f) => self.bad(row.place, f),
        }
    }

    /// Converts a tree, whose messages have all been read.
    fn close(&mut self, tree: Option<Tree>) -> Result<()> {
        let Some(tree) = tree else { return Ok(()) };
        match tree.rows() {
            Ok(rows) => {
                self.give(tree.place(), rows);
                Ok(())
            }
            Err((place, f)) => self.bad(place, f),
        }
    }

    fn give(&mut self, place: &str, rows: Vec<Map<String, Value>>) {
        self.skipped.nothing += u64::from(rows.is_empty());
        self.ready.extend(rows.into_iter().map(|columns| Row {
            place: place.to_owned(),
            columns,
        }));
    }

    /// Refuses or counts a bad row.
    fn bad(&mut self, place: String, f: Fault) -> Result<()> {
        let error = Error::Row {
            path: self.path.clone(),
            place,
            column: f.column,
            what: f.what,
            mend: f.mend,
        };
        if self.bad == OnBad::Refuse {
            return Err(error);
        }
        self.skipped.count += 1;
        if self.skipped.first.len() < MAX_PLACES {
            self.skipped.first.push(error);
        }
        Ok(())
    }
}

impl Iterator for Import {
    type Item = Result<(Format, Row)>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let (Some(format), Some(row)) = (self.format, self.ready.pop_front()) {
                return Some(Ok((format, row)));
            }
            if self.done {
                return None;
            }
            let taken = match self.rows.next() {
                Some(row) => row.and_then(|row| self.take(row)),
                None => {
                    self.done = true;
                    let last = self.trees.end();
                    self.close(last)
                }
            };
            if let Err(e) = taken {
                self.done = true;
                return Some(Err(e));
            }
        }
    }
}
