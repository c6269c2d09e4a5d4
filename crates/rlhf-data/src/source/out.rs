//! Writers: a temporary name in the same folder, sync, rename.

use std::io::{BufWriter, Write as _};
use std::path::{Path, PathBuf};

use arrow_array::RecordBatch;
use arrow_schema::SchemaRef;
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use serde::Serialize;
use tempfile::NamedTempFile;

use crate::error::{Error, Result};

/// Bytes held before a row group is written, so that memory stays bounded.
const MAX_ROW_GROUP: usize = 64 << 20;
/// The same where nothing is gained by large groups: files without compression or dictionaries.
const MAX_PLAIN_ROW_GROUP: usize = 4 << 20;

fn temporary(path: &Path) -> Result<NamedTempFile> {
    let dir = folder(path);
    let mut builder = tempfile::Builder::new();
    // A temporary file is its owner's alone; what is published has the usual permissions.
    #[cfg(unix)]
    builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    builder.tempfile_in(dir).map_err(Error::io(dir))
}

fn publish(file: NamedTempFile, path: &Path) -> Result<()> {
    file.as_file().sync_all().map_err(Error::io(path))?;
    let file = file.persist(path).map_err(|e| Error::io(path)(e.error))?;
    drop(file);
    // The name is durable once the folder is synced too.
    #[cfg(unix)]
    std::fs::File::open(folder(path))
        .and_then(|d| d.sync_all())
        .map_err(Error::io(path))?;
    Ok(())
}

fn folder(path: &Path) -> &Path {
    path.parent()
        .filter(|d| !d.as_os_str().is_empty())
        .unwrap_or(Path::new("."))
}

fn arrow(path: &Path) -> impl FnOnce(parquet::errors::ParquetError) -> Error {
    let path = path.to_owned();
    move |e| Error::Io {
        path,
        source: std::io::Error::other(e),
    }
}

/// Writes record batches to a Parquet file, which appears on [`ParquetOut::finish`].
#[derive(Debug)]
pub struct ParquetOut {
    path: PathBuf,
    writer: ArrowWriter<NamedTempFile>,
    max_row_group: usize,
}

impl ParquetOut {
    /// Begins a file of `schema`.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn create(path: &Path, schema: SchemaRef) -> Result<Self> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .set_created_by("rlhf".into());
        Self::begin(path, schema, properties.build(), MAX_ROW_GROUP)
    }

    /// Begins a file that is quick to read: not compressed, without dictionaries and statistics.
    pub(crate) fn create_plain(path: &Path, schema: SchemaRef) -> Result<Self> {
        let properties = WriterProperties::builder()
            .set_compression(Compression::UNCOMPRESSED)
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .set_created_by("rlhf".into());
        Self::begin(path, schema, properties.build(), MAX_PLAIN_ROW_GROUP)
    }

    fn begin(
        path: &Path,
        schema: SchemaRef,
        properties: WriterProperties,
        max_row_group: usize,
    ) -> Result<Self> {
        let writer = ArrowWriter::try_new(temporary(path)?, schema, Some(properties))
            .map_err(arrow(path))?;
        Ok(Self {
            path: path.to_owned(),
            writer,
            max_row_group,
        })
    }

    /// Adds rows.
    ///
    /// # Errors
    /// When the disk is full or the batch has another schema; the file then never appears.
    pub fn write(&mut self, batch: &RecordBatch) -> Result<()> {
        self.writer.write(batch).map_err(arrow(&self.path))?;
        if self.writer.in_progress_size() > self.max_row_group {
            self.writer.flush().map_err(arrow(&self.path))?;
        }
        Ok(())
    }

    /// Adds to the file's metadata.
    pub(crate) fn note(&mut self, key: &str, value: String) {
        self.writer
            .append_key_value_metadata(KeyValue::new(key.to_owned(), value));
    }

    /// Syncs and renames the file into place.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn finish(self) -> Result<()> {
        publish(
            self.writer.into_inner().map_err(arrow(&self.path))?,
            &self.path,
        )
    }
}

/// Writes values as JSON Lines to a file, which appears on [`JsonlOut::finish`].
#[derive(Debug)]
pub struct JsonlOut {
    path: PathBuf,
    writer: BufWriter<NamedTempFile>,
}

impl JsonlOut {
    /// Begins a file.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn create(path: &Path) -> Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            writer: BufWriter::new(temporary(path)?),
        })
    }

    /// Adds a line.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write<T: Serialize>(&mut self, value: &T) -> Result<()> {
        serde_json::to_writer(&mut self.writer, value)
            .map_err(|e| Error::io(&self.path)(e.into()))?;
        self.writer.write_all(b"\n").map_err(Error::io(&self.path))
    }

    /// Syncs and renames the file into place.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn finish(self) -> Result<()> {
        let file = self
            .writer
            .into_inner()
            .map_err(|e| Error::io(&self.path)(e.into_error()))?;
        publish(file, &self.path)
    }
}
