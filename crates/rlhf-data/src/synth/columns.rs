//! Parquet bytes from columns of messages and texts, without anything that changes from day to day.

use super::encoding;
use arrow_array::{ArrayRef, ListArray, RecordBatch, StringArray, StructArray};
use arrow_buffer::OffsetBuffer;
use arrow_schema::{DataType, Field, Fields, Schema};
use parquet::arrow::ArrowWriter;
use parquet::basic::{Compression, ZstdLevel};
use parquet::errors::ParquetError;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use std::sync::Arc;

/// One row's messages: pairs of role and content.
pub(super) type Messages<'a> = Vec<(&'static str, &'a str)>;

/// A column of a data file.
pub(super) enum Column<'a> {
    /// `list<struct<role: string, content: string>>`
    Messages(&'static str, Vec<Messages<'a>>),
    /// `string`, null where the fact is absent
    Text(&'static str, Vec<Option<&'a str>>),
}

impl Column<'_> {
    fn into_arrow(self) -> Result<(Field, ArrayRef), ParquetError> {
        match self {
            Self::Messages(name, rows) => {
                let fields = Fields::from(vec![
                    Field::new("role", DataType::Utf8, false),
                    Field::new("content", DataType::Utf8, false),
                ]);
                let offsets = OffsetBuffer::from_lengths(rows.iter().map(Vec::len));
                let roles = StringArray::from_iter_values(rows.iter().flatten().map(|m| m.0));
                let contents = StringArray::from_iter_values(rows.iter().flatten().map(|m| m.1));
                let message = StructArray::try_new(
                    fields.clone(),
                    vec![Arc::new(roles), Arc::new(contents)],
                    None,
                )?;
                let item = Arc::new(Field::new("element", DataType::Struct(fields), false));
                let list = ListArray::try_new(Arc::clone(&item), offsets, Arc::new(message), None)?;
                Ok((
                    Field::new(name, DataType::List(item), false),
                    Arc::new(list),
                ))
            }
            Self::Text(name, rows) => {
                let array = StringArray::from(rows);
                Ok((Field::new(name, DataType::Utf8, true), Arc::new(array)))
            }
        }
    }
}

/// The bytes of a Parquet file with these columns.
pub(super) fn parquet_bytes(columns: Vec<Column<'_>>) -> crate::Result<Vec<u8>> {
    encode(columns).map_err(|error| encoding("parquet", error))
}

fn encode(columns: Vec<Column<'_>>) -> Result<Vec<u8>, ParquetError> {
    let (fields, arrays): (Vec<Field>, Vec<ArrayRef>) = columns
        .into_iter()
        .map(Column::into_arrow)
        .collect::<Result<Vec<_>, ParquetError>>()?
        .into_iter()
        .unzip();
    let schema = Arc::new(Schema::new(fields));
    let batch = RecordBatch::try_new(Arc::clone(&schema), arrays)?;
    let properties = WriterProperties::builder()
        .set_created_by("rlhf-data".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(9)?))
        .set_statistics_enabled(EnabledStatistics::None)
        .build();
    let mut bytes = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut bytes, schema, Some(properties))?;
    writer.write(&batch)?;
    writer.close()?;
    Ok(bytes)
}
