//! Files in and out: Parquet and JSON Lines (also gzipped), streaming, in bounded memory.
//!
//! Invariant: a damaged file is refused, never read in part as if it were whole; what is written
//! appears whole or not at all.

mod jsonl;
mod out;
pub(crate) mod parquet;

use std::path::Path;

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::record::{PreferenceRecord, PromptRecord, Record, SftRecord};

pub use out::{JsonlOut, ParquetOut};

/// A row of a file with its place: `row 3` (from 0) in Parquet, `line 4` (from 1) in JSON Lines.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Where it stands.
    pub place: String,
    /// Its columns.
    pub columns: Map<String, Value>,
}

/// The rows of a file by its ending: `.parquet`, `.jsonl`, `.ndjson`, `.json` (one object a line), each
/// of the latter also with `.gz`.
///
/// # Errors
/// When the file cannot be opened, its ending is unknown, or it is not what its ending says. Errors of
/// later rows come from the iterator.
pub fn rows(path: &Path) -> Result<Box<dyn Iterator<Item = Result<Row>>>> {
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().to_lowercase())
        .unwrap_or_default();
    let plain = name.strip_suffix(".gz").unwrap_or(&name);
    if name.ends_with(".parquet") {
        return Ok(Box::new(parquet::rows(path)?));
    }
    if [".jsonl", ".ndjson", ".json"]
        .iter()
        .any(|e| plain.ends_with(e))
    {
        return Ok(Box::new(jsonl::rows(path, name.ends_with(".gz"))?));
    }
    Err(Error::file(
        path,
        "unknown kind of file",
        "give .parquet, .jsonl or .jsonl.gz",
    ))
}

/// The rows of a file as records of one kind.
///
/// # Errors
/// As [`rows`]; a row that is no such record is an error of the iterator that names its place.
pub fn read<R: Record + 'static>(path: &Path) -> Result<impl Iterator<Item = Result<R>> + use<R>> {
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
pub fn read_sft(path: &Path) -> Result<impl Iterator<Item = Result<SftRecord>> + use<>> {
    read(path)
}

/// Preferences of a file.
///
/// # Errors
/// As [`read`].
pub fn read_preference(
    path: &Path,
) -> Result<impl Iterator<Item = Result<PreferenceRecord>> + use<>> {
    read(path)
}

/// Prompts of a file.
///
/// # Errors
/// As [`read`].
pub fn read_prompts(path: &Path) -> Result<impl Iterator<Item = Result<PromptRecord>> + use<>> {
    read(path)
}
