//! Parquet, row group by row group.
//!
//! Invariant: a damaged file is an error, never a panic. The Parquet crate asserts in places that only a
//! damaged file reaches: what can be checked beforehand is, and the rest is caught. Page checksums are
//! compared where a file has them; without them, a changed letter in a page cannot be noticed.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use arrow_array::cast::AsArray;
use arrow_array::types::{Float64Type, Int64Type};
use arrow_array::{Array, RecordBatch};
use arrow_cast::cast;
use arrow_schema::{ArrowError, DataType, SchemaRef};
use parquet::arrow::arrow_reader::{
    ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReader,
    ParquetRecordBatchReaderBuilder,
};
use parquet::file::reader::ChunkReader;
use serde_json::{Map, Number, Value};

use super::Row;
use crate::error::{Error, Result};

/// Rows decoded at once.
const BATCH_ROWS: usize = 256;

pub(super) fn rows(path: &Path) -> Result<Rows> {
    let mut file = File::open(path).map_err(Error::io(path))?;
    let damaged = |e: String| {
        Error::file(
            path,
            format!("no readable Parquet: {e}"),
            "get the file again",
        )
    };
    let size = file.metadata().map_err(Error::io(path))?;
    if size.len() == 0 {
        return Err(damaged("0 bytes".into()));
    }
    let mut magic = [0; 4];
    if file.read_exact(&mut magic).is_err() || &magic != b"PAR1" {
        return Err(damaged("it does not begin with PAR1".into()));
    }
    file.seek(SeekFrom::Start(0)).map_err(Error::io(path))?;
    let reader = open(file, size.len(), BATCH_ROWS).map(|(reader, _)| reader);
    Ok(from_batches(path, Box::new(reader.map_err(damaged)?)))
}

/// Batches as they are read.
pub(super) type Batches =
    Box<dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>> + Send>;

/// The rows of batches of a file.
pub(super) fn from_batches(path: &Path, reader: Batches) -> Rows {
    Rows {
        path: path.to_owned(),
        reader,
        batch: None,
        at: 0,
        row: 0,
        done: false,
    }
}

/// Reads the footer, and checks that it speaks of pages inside the file.
pub(crate) fn open<R: ChunkReader + 'static>(
    input: R,
    size: u64,
    batch_rows: usize,
) -> std::result::Result<(ParquetRecordBatchReader, SchemaRef), String> {
    guarded(|| open_unguarded(input, size, batch_rows)).and_then(|r| r)
}

fn open_unguarded<R: ChunkReader + 'static>(
    input: R,
    size: u64,
    batch_rows: usize,
) -> std::result::Result<(ParquetRecordBatchReader, SchemaRef), String> {
    let metadata = ArrowReaderMetadata::load(&input, ArrowReaderOptions::default())
        .map_err(|e| e.to_string())?;
    for (i, group) in metadata.metadata().row_groups().iter().enumerate() {
        let inside = group.num_rows() >= 0
            && group.columns().iter().all(|c| {
                let start = c.dictionary_page_offset().unwrap_or(c.data_page_offset());
                let end = start.checked_add(c.compressed_size());
                start >= 0
                    && c.data_page_offset() >= 0
                    && c.compressed_size() >= 0
                    && c.num_values() >= 0
                    && end.is_some_and(|e| e as u64 <= size)
            });
        if !inside {
            return Err(format!("row group {i} lies outside the file"));
        }
        for column in group.columns() {
            let (start, length) = column.byte_range();
            super::parquet_pages::check(&input, start, start + length)?;
        }
    }
    let schema = metadata.schema().clone();
    let input = super::parquet_pages::Ending(input);
    let reader = ParquetRecordBatchReaderBuilder::new_with_metadata(input, metadata)
        .with_batch_size(batch_rows)
        .build()
        .map_err(|e| e.to_string())?;
    Ok((reader, schema))
}

/// The next batch; the Parquet crate panics on some damaged files.
pub(crate) fn next(
    reader: &mut dyn Iterator<Item = std::result::Result<RecordBatch, ArrowError>>,
) -> std::result::Result<Option<RecordBatch>, String> {
    guarded(|| reader.next().transpose().map_err(|e| e.to_string())).and_then(|batch| batch)
}

/// Turns a panic of the Parquet crate into an error.
pub(super) fn guarded<T>(f: impl FnOnce() -> T) -> std::result::Result<T, String> {
    catch_unwind(AssertUnwindSafe(f)).map_err(|panic| {
        let said = panic
            .downcast_ref::<String>()
            .map(String::as_str)
            .or_else(|| panic.downcast_ref::<&str>().copied())
            .unwrap_or_default();
        format!("the reader gave up: {said}")
    })
}

/// The rows of a file of record batches.
pub(super) struct Rows {
    path: PathBuf,
    reader: Batches,
    batch: Option<RecordBatch>,
    at: usize,
    row: usize,
    done: bool,
}

impl Iterator for Rows {
    type Item = Result<Row>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.done {
                return None;
            }
            if let Some(batch) = self.batch.as_ref().filter(|b| self.at < b.num_rows()) {
                let columns = row_of(batch, self.at);
                let place = format!("row {}", self.row);
                self.at += 1;
                self.row += 1;
                return Some(
                    columns
                        .map(|columns| Row {
                            place: place.clone(),
                            columns,
                        })
                        .map_err(|(column, what)| {
                            self.done = true;
                            Error::Row {
                                path: self.path.clone(),
                                place,
                                column,
                                what,
                                mend: "convert the column".into(),
                            }
                        }),
                );
            }
            match next(&mut self.reader) {
                Ok(None) => {
                    self.done = true;
                    return None;
                }
                Ok(batch) => (self.batch, self.at) = (batch, 0),
                Err(e) => {
                    self.done = true;
                    let what = format!("the data after row {} cannot be read: {e}", self.row);
                    return Some(Err(Error::file(
                        &self.path,
                        what,
                        "get the file again: it is damaged",
                    )));
                }
            }
        }
    }
}

fn row_of(
    batch: &RecordBatch,
    at: usize,
) -> std::result::Result<Map<String, Value>, (String, String)> {
    let schema = batch.schema();
    let mut columns = Map::new();
    for (field, array) in schema.fields().iter().zip(batch.columns()) {
        let value = value(array.as_ref(), at).map_err(|what| (field.name().clone(), what))?;
        columns.insert(field.name().clone(), value);
    }
    Ok(columns)
}

/// One cell as JSON.
fn value(array: &dyn Array, at: usize) -> std::result::Result<Value, String> {
    if array.is_null(at) {
        return Ok(Value::Null);
    }
    let one = || array.slice(at, 1);
    let casted = |to: &DataType| cast(&one(), to).map_err(|e| e.to_string());
    Ok(match array.data_type() {
        DataType::Utf8 => Value::String(array.as_string::<i32>().value(at).to_owned()),
        DataType::LargeUtf8 | DataType::Utf8View => Value::String(
            casted(&DataType::Utf8)?
                .as_string::<i32>()
                .value(0)
                .to_owned(),
        ),
        DataType::Dictionary(_, inner) => value(casted(inner)?.as_ref(), 0)?,
        DataType::Boolean => Value::Bool(array.as_boolean().value(at)),
        t if t.is_integer() => match casted(&DataType::Int64)?.as_primitive::<Int64Type>() {
            a if a.is_null(0) => return Err("an integer too large".into()),
            a => a.value(0).into(),
        },
        t if t.is_floating() => {
            let x = casted(&DataType::Float64)?
                .as_primitive::<Float64Type>()
                .value(0);
            // JSON has no NaN or infinity; as text they are refused by whoever wants a number.
            Number::from_f64(x).map_or_else(|| Value::String(x.to_string()), Value::Number)
        }
        DataType::List(_) => list(&array.as_list::<i32>().value(at))?,
        DataType::LargeList(_) => list(&array.as_list::<i64>().value(at))?,
        DataType::Struct(fields) => {
            let s = array.as_struct();
            let mut map = Map::new();
            for (f, c) in fields.iter().zip(s.columns()) {
                map.insert(f.name().clone(), value(c.as_ref(), at)?);
            }
            Value::Object(map)
        }
        DataType::Null => Value::Null,
        other => casted(&DataType::Utf8)
            .ok()
            .map(|a| Value::String(a.as_string::<i32>().value(0).to_owned()))
            .ok_or_else(|| format!("the type {other} is not supported"))?,
    })
}

fn list(items: &arrow_array::ArrayRef) -> std::result::Result<Value, String> {
    (0..items.len())
        .map(|i| value(items.as_ref(), i))
        .collect::<std::result::Result<Vec<_>, _>>()
        .map(Value::Array)
}
