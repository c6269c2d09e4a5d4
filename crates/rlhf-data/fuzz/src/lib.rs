//! What the fuzz targets share: the records that are made of a row, written and read again.

use std::fmt::Debug;
use std::path::{Path, PathBuf};

use rlhf_data::record::{
    self, Annotated, PreferenceRecord, PromptRecord, RankedRecord, RatedRecord, Record, SftRecord,
    StepwiseRecord, UnpairedRecord,
};
use rlhf_data::source::{self, ParquetOut};
use serde_json::{Map, Value};

/// A row of a file.
pub type Row = Map<String, Value>;

/// What a run is told by a variable of the environment: `FORMAT` or `ENDING`.
///
/// # Panics
/// When it is not set.
#[must_use]
pub fn told(name: &str) -> String {
    std::env::var(name).unwrap_or_else(|_| panic!("set {name}; see README.md"))
}

/// A file of this process in the folder for temporary files, which ought to lie in memory.
#[must_use]
pub fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("rlhf-fuzz-{}-{name}", std::process::id()))
}

/// Every kind of record that the row gives; each must survive writing and reading.
pub fn every_kind(row: &Row) {
    same::<SftRecord>(row);
    same::<PreferenceRecord>(row);
    same::<PromptRecord>(row);
    same::<RankedRecord>(row);
    same::<UnpairedRecord>(row);
    same::<StepwiseRecord>(row);
    same::<RatedRecord>(row);
}

/// The record that the row gives, if any, after it survived.
pub fn same<R: Record + Debug + PartialEq + 'static>(row: &Row) -> Option<R> {
    let r = Annotated::<R>::from_row(row.clone()).ok()?;
    let line = Value::Object(r.to_row()).to_string();
    let again = serde_json::from_str::<Row>(&line).map(Annotated::<R>::from_row);
    assert_eq!(again.ok().and_then(Result::ok).as_ref(), Some(&r), "{line}");
    R::from_row(row.clone()).ok()
}

/// As [`same`], through Parquet.
pub fn same_in_parquet<R: Record + Debug + PartialEq + 'static>(row: &Row, path: &Path) {
    let Ok(r) = Annotated::<R>::from_row(row.clone()) else {
        return;
    };
    let schema = record::schema_of(&r);
    let Ok(batch) = record::batch(&schema, std::slice::from_ref(&r)) else {
        return;
    };
    let mut out = ParquetOut::create(path, schema).expect("a temporary file");
    out.write(&batch).expect("a batch of the schema");
    out.finish().expect("a temporary file");
    let read: Vec<_> = source::read::<Annotated<R>>(path)
        .expect("what was written")
        .collect::<Result<_, _>>()
        .expect("what was written");
    assert_eq!(read, [r]);
}
