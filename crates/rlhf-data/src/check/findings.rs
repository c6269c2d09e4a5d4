//! Findings as a Parquet file: `rule`, `level`, `place`, `column`, `what`.

use std::path::Path;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, Schema, SchemaRef};

use super::Finding;
use crate::error::{Error, Result};
use crate::source::ParquetOut;

/// Findings held before they are written.
const BATCH: usize = 4096;

/// The columns of a file of findings, all of them text.
#[must_use]
pub fn findings_schema() -> SchemaRef {
    let fields = ["rule", "level", "place", "column", "what"];
    Arc::new(Schema::new(
        fields
            .map(|name| Field::new(name, DataType::Utf8, false))
            .to_vec(),
    ))
}

/// Writes findings as they come; the file appears on [`FindingsOut::finish`].
#[derive(Debug)]
pub struct FindingsOut {
    file: ParquetOut,
    batch: Vec<Finding>,
    failed: Option<Error>,
}

impl FindingsOut {
    /// Begins a file.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            file: ParquetOut::create(path, findings_schema())?,
            batch: Vec::new(),
            failed: None,
        })
    }

    /// Adds a finding. What goes wrong is said by [`FindingsOut::finish`].
    pub fn write(&mut self, finding: &Finding) {
        if self.failed.is_none() {
            self.batch.push(finding.clone());
            if self.batch.len() >= BATCH {
                self.failed = self.flush().err();
            }
        }
    }

    /// Syncs and renames the file into place.
    ///
    /// # Errors
    /// When the disk is full; the file then does not appear.
    pub fn finish(mut self) -> Result<()> {
        if let Some(e) = self.failed.take() {
            return Err(e);
        }
        self.flush()?;
        self.file.finish()
    }

    fn flush(&mut self) -> Result<()> {
        let column = |of: fn(&Finding) -> &str| -> ArrayRef {
            Arc::new(StringArray::from_iter_values(self.batch.iter().map(of)))
        };
        let batch = RecordBatch::try_new(
            findings_schema(),
            vec![
                column(|f| f.rule),
                column(|f| f.level.name()),
                column(|f| &f.place),
                column(|f| &f.column),
                column(|f| &f.what),
            ],
        )
        .map_err(|e| Error::Invalid {
            what: format!("the findings cannot be written: {e}"),
            mend: "report this as a fault of the program".into(),
        })?;
        self.file.write(&batch)?;
        self.batch.clear();
        Ok(())
    }
}

/// Writes findings to a Parquet file.
///
/// # Errors
/// When the folder cannot be written or the disk is full; the file then does not appear.
pub fn write_findings_parquet<'a>(
    path: &Path,
    findings: impl IntoIterator<Item = &'a Finding>,
) -> Result<()> {
    let mut out = FindingsOut::create(path)?;
    findings.into_iter().for_each(|f| out.write(f));
    out.finish()
}
