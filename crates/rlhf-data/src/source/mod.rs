//! Files in and out: Parquet, Arrow, JSON Lines, JSON arrays, CSV, streaming, in bounded memory.
//!
//! Invariant: a damaged file is refused, never read in part as if it were whole; what is written
//! appears whole or not at all.

mod array;
mod csv;
mod files;
mod ipc;
mod jsonl;
mod open;
mod out;
pub(crate) mod parquet;
mod parquet_pages;

use std::io::BufRead as _;
use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::record::{PreferenceRecord, PromptRecord, Record, SftRecord};

use open::Packing;

pub use out::{JsonlOut, ParquetOut};

/// A row of a file with its place: `row 3` (from 0) in Parquet, Arrow and CSV, `line 4` (from 1) in
/// JSON Lines, `element 3` (from 0) in a JSON array; of several files `part.jsonl, line 4`.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where it stands.
    pub place: String,
    /// Its columns.
    pub columns: Map<String, Value>,
}

/// What a file is, by its ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Parquet,
    Arrow,
    Lines(Packing),
    /// One object a line, or an array.
    Json(Packing),
    Separated(Packing, u8),
}

/// The endings, for messages.
const KINDS: &str =
    ".parquet, .arrow, .jsonl, .json, .csv or .tsv, the text files also with .gz or .zst";

impl Kind {
    /// The kind of a file name in lower case.
    fn of(name: &str) -> Option<Self> {
        let ends = |endings: &[&str], name: &str| endings.iter().any(|e| name.ends_with(e));
        if name.ends_with(".parquet") {
            return Some(Self::Parquet);
        }
        if ends(&[".arrow", ".arrows", ".feather", ".ipc"], name) {
            return Some(Self::Arrow);
        }
        let (packing, plain) = Packing::of(name);
        if ends(&[".jsonl", ".ndjson"], plain) {
            Some(Self::Lines(packing))
        } else if plain.ends_with(".json") {
            Some(Self::Json(packing))
        } else if plain.ends_with(".csv") {
            Some(Self::Separated(packing, b','))
        } else if plain.ends_with(".tsv") {
            Some(Self::Separated(packing, b'\t'))
        } else {
            None
        }
    }
}

/// Whether a file of this name is one that [`rows`] reads.
#[cfg(feature = "hub")]
pub(crate) fn is_known(name: &str) -> bool {
    Kind::of(&name.to_lowercase()).is_some()
}

fn lower_name(path: &Path) -> String {
    path.file_name()
        .map(|n| n.to_string_lossy().to_lowercase())
        .unwrap_or_default()
}

/// The rows of a file by its ending: `.parquet`; `.arrow`, `.feather`, `.ipc`; `.jsonl`, `.ndjson`;
/// `.json` (one object a line, or an array of objects); `.csv`, `.tsv` (with a header; every cell is
/// text). Text files may also end with `.gz` or `.zst`.
///
/// A folder means the files of these kinds directly in it, and a name with `*`, `?` or `[…]` those that
/// it matches, in sorted order.
///
/// # Errors
/// When the file cannot be opened, its ending is unknown, or it is not what its ending says. Errors of
/// later rows come from the iterator.
pub fn rows(path: &Path) -> Result<Box<dyn Iterator<Item = Result<Row>> + Send>> {
    match files::of(path)? {
        Some(files) => Ok(Box::new(files::rows(files, path))),
        None => one_file(path),
    }
}

/// Rows, whatever they come from.
type Rows = Box<dyn Iterator<Item = Result<Row>> + Send>;

fn one_file(path: &Path) -> Result<Rows> {
    let Some(kind) = Kind::of(&lower_name(path)) else {
        let mend = format!("give {KINDS}");
        return Err(Error::file(path, "unknown kind of file", mend));
    };
    Ok(match kind {
        Kind::Parquet => Box::new(parquet::rows(path)?),
        Kind::Arrow => Box::new(ipc::rows(path)?),
        Kind::Lines(packing) => Box::new(jsonl::rows(path, open::text(path, packing)?)),
        Kind::Json(packing) => {
            let mut text = open::text(path, packing)?;
            let start = text.fill_buf().map_err(Error::io(path))?;
            let array = start
                .strip_prefix(b"\xef\xbb\xbf")
                .unwrap_or(start)
                .trim_ascii_start()
                .starts_with(b"[");
            if array {
                Box::new(array::rows(path, text))
            } else {
                Box::new(jsonl::rows(path, text))
            }
        }
        Kind::Separated(packing, delimiter) => {
            Box::new(csv::rows(path, open::text(path, packing)?, delimiter)?)
        }
    })
}

/// The rows of a file as records of one kind.
///
/// # Errors
/// As [`rows`]; a row that is no such record is an error of the iterator that names its place.
pub fn read<R: Record + 'static>(
    path: &Path,
) -> Result<impl Iterator<Item = Result<R>> + Send + use<R>> {
    let owned = path.to_owned();
    Ok(rows(path)?.map(move |row| {
        let row = row?;
        R::from_row(row.columns).map_err(|f| Error::Row {
            path: owned.clone(),
            place: row.place,
            column: f.column,
            what: f.what,
            mend: f.mend,
        })
    }))
}

/// Demonstrations of a file.
///
/// # Errors
/// As [`read`].
pub fn read_sft(path: &Path) -> Result<impl Iterator<Item = Result<SftRecord>> + Send + use<>> {
    read(path)
}

/// Preferences of a file.
///
/// # Errors
/// As [`read`].
pub fn read_preference(
    path: &Path,
) -> Result<impl Iterator<Item = Result<PreferenceRecord>> + Send + use<>> {
    read(path)
}

/// Prompts of a file.
///
/// # Errors
/// As [`read`].
pub fn read_prompts(
    path: &Path,
) -> Result<impl Iterator<Item = Result<PromptRecord>> + Send + use<>> {
    read(path)
}
