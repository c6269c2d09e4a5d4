//! Tokenised rows kept on disk, so that a second run, or a second epoch, tokenises nothing.
//!
//! A file is found by a key of everything that its tokens depend on: the data's bytes, the tokenizer's
//! folder with its template, the limits and the trained turns. Change one and the key is another, so a
//! file is never stale. Beside the tokens lie columns of numbers, one a token of each completion: the
//! log-probs of a reference model, say.
//!
//! Files are Parquet, not compressed, read through a memory map. A row is a group: `row`; `prompt` and
//! `ids` (all completions, one after the other), little-endian u32 in binary; `layout`, likewise: for each
//! completion its length, how it ends, how many trained ranges it has, and their bounds; `check`, the
//! CRC-32 of the three.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::RecordBatch;
use arrow_array::builder::{BinaryBuilder, UInt32Builder, UInt64Builder};
use arrow_array::cast::AsArray as _;
use arrow_array::types::{UInt32Type, UInt64Type};
use arrow_schema::{DataType, Field, Schema, SchemaRef};
use bytes::Bytes;
use parquet::arrow::arrow_reader::ParquetRecordBatchReader;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};
use crate::ffi;
use crate::group::{Completion, Finish, PromptGroup};
use crate::source::{self, ParquetOut};
use crate::tokenize::{ChatTokenizer, Limits, TokenizeReport};

/// Part of the key: another layout is another file.
const VERSION: &str = "rlhf token cache 1";
const CHUNK: usize = 4096;

/// What the tokens of a table depend on, as one hash.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CacheKey(String);

impl CacheKey {
    /// The key of the rows of `data` read as records of `kind` (`Record::KIND`), of which the first
    /// `limit` are used.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn new(
        data: &Path,
        kind: &str,
        limit: Option<usize>,
        tokenizer: &ChatTokenizer,
        limits: &Limits,
    ) -> Result<Self> {
        let mut file = std::fs::File::open(data).map_err(Error::io(data))?;
        let mut bytes = Sha256::new();
        std::io::copy(&mut file, &mut bytes).map_err(Error::io(data))?;
        let mut all = Sha256::new();
        all.update(VERSION);
        all.update(bytes.finalize());
        all.update(tokenizer.fingerprint());
        all.update(format!("{kind} {limit:?} {limits:?}"));
        Ok(Self(hex(&all.finalize())))
    }

    /// As text, 64 hexadecimal digits.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A folder of tokenised tables.
#[derive(Clone, Debug)]
pub struct TokenCache {
    dir: PathBuf,
}

impl TokenCache {
    /// The cache in `dir`, which is made when something is put into it.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    fn path(&self, key: &CacheKey, column: Option<&str>) -> PathBuf {
        self.dir.join(match column {
            None => format!("{}.parquet", key.0),
            Some(name) => format!("{}.{name}.parquet", key.0),
        })
    }

    /// The groups of a key and the report of their making; `None` when there are none, or their file is
    /// not whole: then they are to be made and put again.
    ///
    /// # Errors
    /// When the file is there and may not be read.
    pub fn get(&self, key: &CacheKey) -> Result<Option<(CachedGroups, TokenizeReport)>> {
        let Some((reader, metadata, path)) = self.open(key, None)? else {
            return Ok(None);
        };
        let Some(report) = metadata
            .get("rlhf.report")
            .and_then(|r| serde_json::from_str(r).ok())
        else {
            return Ok(None);
        };
        let groups = CachedGroups {
            path,
            reader,
            batch: None,
            at: 0,
            done: false,
        };
        Ok(Some((groups, report)))
    }

    /// Keeps the groups of a key; the file appears whole or not at all.
    ///
    /// # Errors
    /// When the folder cannot be written, or the disk is full.
    pub fn put(
        &self,
        key: &CacheKey,
        groups: &[PromptGroup],
        report: &TokenizeReport,
    ) -> Result<()> {
        let mut writer = self.writer(key)?;
        for groups in groups.chunks(CHUNK) {
            writer.write(groups)?;
        }
        writer.finish(report)
    }

    /// Keeps the groups of a key as they are made, in bounded memory. The file appears, whole, with
    /// [`CacheWriter::finish`], and not at all without.
    ///
    /// # Errors
    /// When the folder cannot be written.
    pub fn writer(&self, key: &CacheKey) -> Result<CacheWriter> {
        let fields = vec![
            Field::new("row", DataType::UInt64, false),
            Field::new("prompt", DataType::Binary, false),
            Field::new("ids", DataType::Binary, false),
            Field::new("layout", DataType::Binary, false),
            Field::new("check", DataType::UInt32, false),
        ];
        let path = self.path(key, None);
        let schema = marked(fields);
        std::fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))?;
        Ok(CacheWriter {
            out: ParquetOut::create_plain(&path, schema.clone())?,
            path,
            schema,
            waiting: Vec::new(),
        })
    }

    /// A column of numbers beside the groups of a key: for each group, for each of its completions, one a
    /// token. `None` when there is none or its file is not whole.
    ///
    /// # Errors
    /// When the file is there and may not be read.
    pub fn get_column(&self, key: &CacheKey, name: &str) -> Result<Option<Vec<Vec<f32>>>> {
        let Some((mut reader, _, _)) = self.open(key, Some(name))? else {
            return Ok(None);
        };
        let mut all = Vec::new();
        loop {
            let batch = match source::parquet::next(&mut reader) {
                Ok(Some(batch)) => batch,
                Ok(None) => return Ok(Some(all)),
                Err(_) => return Ok(None),
            };
            let (Some(values), Some(check)) = (
                batch.column(0).as_binary_opt::<i32>(),
                batch.column(1).as_primitive_opt::<UInt32Type>(),
            ) else {
                return Ok(None);
            };
            for i in 0..batch.num_rows() {
                let bytes = values.value(i);
                if crc32fast::hash(bytes) != check.value(i) {
                    return Ok(None);
                }
                all.push(
                    bytes
                        .chunks_exact(4)
                        .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
                        .collect(),
                );
            }
        }
    }

    /// Keeps a column of numbers, one list a completion; `name` says what they are (a model's hash and
    /// `logprobs`, say) and may hold letters, digits, `-` and `_`.
    ///
    /// # Errors
    /// As [`TokenCache::put`]; also for another `name`.
    pub fn put_column(&self, key: &CacheKey, name: &str, values: &[Vec<f32>]) -> Result<()> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_');
        if name.is_empty() || !name.chars().all(plain) {
            return Err(Error::Invalid {
                what: format!("`{name}` is no name of a column"),
                mend: "use letters, digits, - and _".into(),
            });
        }
        let fields = vec![
            Field::new("values", DataType::Binary, false),
            Field::new("check", DataType::UInt32, false),
        ];
        let schema = marked(fields);
        self.write(
            &self.path(key, Some(name)),
            schema,
            values,
            |schema, rows| {
                let (mut bytes, mut check) = (BinaryBuilder::new(), UInt32Builder::new());
                for row in rows {
                    let le: Vec<u8> = row.iter().flat_map(|x| x.to_le_bytes()).collect();
                    check.append_value(crc32fast::hash(&le));
                    bytes.append_value(le);
                }
                RecordBatch::try_new(
                    schema,
                    vec![Arc::new(bytes.finish()), Arc::new(check.finish())],
                )
            },
        )
    }

    fn write<T>(
        &self,
        path: &Path,
        schema: SchemaRef,
        rows: &[T],
        batch: impl Fn(SchemaRef, &[T]) -> std::result::Result<RecordBatch, arrow_schema::ArrowError>,
    ) -> Result<()> {
        std::fs::create_dir_all(&self.dir).map_err(Error::io(&self.dir))?;
        let mut out = ParquetOut::create_plain(path, schema.clone())?;
        for rows in rows.chunks(CHUNK) {
            let batch = batch(schema.clone(), rows)
                .map_err(|e| Error::io(path)(std::io::Error::other(e)))?;
            out.write(&batch)?;
        }
        out.finish()
    }

    #[allow(clippy::type_complexity, reason = "used twice, here")]
    fn open(
        &self,
        key: &CacheKey,
        column: Option<&str>,
    ) -> Result<Option<(ParquetRecordBatchReader, HashMap<String, String>, PathBuf)>> {
        let path = self.path(key, column);
        if !path.exists() {
            return Ok(None);
        }
        let bytes = Bytes::from_owner(ffi::map(&path)?);
        let size = bytes.len() as u64;
        let Ok((reader, schema)) = source::parquet::open(bytes, size, CHUNK) else {
            return Ok(None);
        };
        let metadata: HashMap<String, String> = schema.metadata().clone().into();
        let columns = if column.is_some() { 2 } else { 5 };
        if metadata.get("rlhf.cache").map(String::as_str) != Some(VERSION)
            || schema.fields().len() != columns
        {
            return Ok(None);
        }
        Ok(Some((reader, metadata, path)))
    }
}

fn marked(fields: Vec<Field>) -> SchemaRef {
    let metadata = HashMap::from([("rlhf.cache".to_owned(), VERSION.to_owned())]);
    Arc::new(Schema::new_with_metadata(fields, metadata))
}

/// A table of groups that is being written.
#[derive(Debug)]
pub struct CacheWriter {
    path: PathBuf,
    schema: SchemaRef,
    out: ParquetOut,
    waiting: Vec<PromptGroup>,
}

impl CacheWriter {
    /// Adds a group.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn push(&mut self, group: PromptGroup) -> Result<()> {
        self.waiting.push(group);
        if self.waiting.len() < CHUNK {
            return Ok(());
        }
        let waiting = std::mem::take(&mut self.waiting);
        self.write(&waiting)
    }

    fn write(&mut self, groups: &[PromptGroup]) -> Result<()> {
        let batch = group_batch(self.schema.clone(), groups)
            .map_err(|e| Error::io(&self.path)(std::io::Error::other(e)))?;
        self.out.write(&batch)
    }

    /// Puts the file in its place, with what became of the rows.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn finish(mut self, report: &TokenizeReport) -> Result<()> {
        if !self.waiting.is_empty() {
            let waiting = std::mem::take(&mut self.waiting);
            self.write(&waiting)?;
        }
        let report = serde_json::to_string(report).map_err(|e| Error::Invalid {
            what: format!("the report cannot be written: {e}"),
            mend: "report this".into(),
        })?;
        self.out.note("rlhf.report", report);
        self.out.finish()
    }
}

fn finish_code(f: Finish) -> u32 {
    match f {
        Finish::Stop => 0,
        Finish::Length => 1,
        Finish::Cut => 2,
    }
}

fn group_batch(
    schema: SchemaRef,
    groups: &[PromptGroup],
) -> std::result::Result<RecordBatch, arrow_schema::ArrowError> {
    let le = |ids: &[u32]| {
        ids.iter()
            .flat_map(|i| i.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let (mut row, mut check) = (UInt64Builder::new(), UInt32Builder::new());
    let mut bytes = [(); 3].map(|()| BinaryBuilder::new());
    for g in groups {
        let mut layout = Vec::new();
        let mut ids = Vec::new();
        for c in &g.completions {
            ids.extend_from_slice(&c.ids);
            layout.extend([
                c.ids.len() as u32,
                finish_code(c.finish),
                c.trained.len() as u32,
            ]);
            layout.extend(
                c.trained
                    .iter()
                    .flat_map(|r| [r.start as u32, r.end as u32]),
            );
        }
        let cells = [le(&g.prompt), le(&ids), le(&layout)];
        row.append_value(g.row);
        check.append_value(checksum(g.row, [&cells[0], &cells[1], &cells[2]]));
        for (b, cell) in bytes.iter_mut().zip(&cells) {
            b.append_value(cell);
        }
    }
    let [mut prompt, mut ids, mut layout] = bytes;
    RecordBatch::try_new(
        schema,
        vec![
            Arc::new(row.finish()),
            Arc::new(prompt.finish()),
            Arc::new(ids.finish()),
            Arc::new(layout.finish()),
            Arc::new(check.finish()),
        ],
    )
}

fn checksum(row: u64, cells: [&[u8]; 3]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&row.to_le_bytes());
    for cell in cells {
        crc.update(cell);
    }
    crc.finalize()
}

/// The groups of a cached table, in order.
pub struct CachedGroups {
    path: PathBuf,
    reader: ParquetRecordBatchReader,
    batch: Option<RecordBatch>,
    at: usize,
    done: bool,
}

impl std::fmt::Debug for CachedGroups {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CachedGroups")
            .field("path", &self.path)
            .finish_non_exhaustive()
    }
}

impl Iterator for CachedGroups {
    type Item = Result<PromptGroup>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if self.done {
                return None;
            }
            if let Some(batch) = self.batch.as_ref().filter(|b| self.at < b.num_rows()) {
                let group = group_of(batch, self.at);
                self.at += 1;
                return Some(group.ok_or_else(|| {
                    self.done = true;
                    self.damaged()
                }));
            }
            match source::parquet::next(&mut self.reader) {
                Ok(None) => self.done = true,
                Ok(batch) => (self.batch, self.at) = (batch, 0),
                Err(_) => {
                    self.done = true;
                    return Some(Err(self.damaged()));
                }
            }
        }
    }
}

impl CachedGroups {
    fn damaged(&self) -> Error {
        Error::file(
            &self.path,
            "the tokenised rows are damaged",
            "remove the file: it is made again",
        )
    }
}

/// A group of a batch, unless its checksum or its layout is wrong.
fn group_of(batch: &RecordBatch, at: usize) -> Option<PromptGroup> {
    let row = batch.column(0).as_primitive_opt::<UInt64Type>()?.value(at);
    let cell = |c: usize| Some(batch.column(c).as_binary_opt::<i32>()?.value(at));
    let cells = [cell(1)?, cell(2)?, cell(3)?];
    let check = batch.column(4).as_primitive_opt::<UInt32Type>()?.value(at);
    if checksum(row, cells) != check {
        return None;
    }
    let ints = |b: &[u8]| -> Vec<u32> {
        b.chunks_exact(4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()
    };
    let (ids, layout) = (ints(cells[1]), ints(cells[2]));
    let (mut ids, mut layout) = (ids.as_slice(), layout.as_slice());
    let mut completions = Vec::with_capacity(2);
    while let [length, finish, ranges, rest @ ..] = layout {
        let (own, more) = ids.split_at_checked(*length as usize)?;
        let (bounds, next) = rest.split_at_checked(*ranges as usize * 2)?;
        completions.push(Completion {
            ids: own.to_vec(),
            trained: bounds
                .chunks_exact(2)
                .map(|b| b[0] as usize..b[1] as usize)
                .collect(),
            finish: match finish {
                0 => Finish::Stop,
                1 => Finish::Length,
                _ => Finish::Cut,
            },
            sampler: None,
        });
        (ids, layout) = (more, next);
    }
    let group = PromptGroup {
        row,
        prompt: ints(cells[0]),
        completions,
    };
    group.validate().ok()?;
    Some(group)
}
