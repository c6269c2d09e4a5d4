//! Arrow's own files: with a footer (Feather), or as a stream, as the Hugging Face cache keeps them.
//!
//! Invariant: as for Parquet, a damaged file is an error, never a panic. A stream without its end mark
//! counts as cut off.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use arrow_ipc::reader::{FileReader, StreamReader};

use super::parquet::{Batches, Rows, from_batches, guarded};
use crate::error::{Error, Result};

/// What a stream ends with.
const END: [u8; 8] = [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0];

pub(super) fn rows(path: &Path) -> Result<Rows> {
    let file = File::open(path).map_err(Error::io(path))?;
    let opened = guarded(|| open(file)).and_then(|r| r);
    let batches = opened.map_err(|e| {
        Error::file(
            path,
            format!("no readable Arrow file: {e}"),
            "get the file again",
        )
    })?;
    Ok(from_batches(path, batches))
}

fn open(mut file: File) -> std::result::Result<Batches, String> {
    let mut magic = Vec::new();
    let io = |e: std::io::Error| e.to_string();
    file.by_ref().take(6).read_to_end(&mut magic).map_err(io)?;
    if magic.is_empty() {
        return Err("0 bytes".into());
    }
    let footer = magic == b"ARROW1";
    if !footer {
        let mut end = [0; END.len()];
        file.seek(SeekFrom::End(-(END.len() as i64))).map_err(io)?;
        file.read_exact(&mut end).map_err(io)?;
        if end != END {
            return Err("neither ARROW1 at its begin nor the end mark of a stream".into());
        }
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let reader = BufReader::new(file);
    Ok(if footer {
        Box::new(FileReader::try_new(reader, None).map_err(|e| e.to_string())?)
    } else {
        Box::new(StreamReader::try_new(reader, None).map_err(|e| e.to_string())?)
    })
}
