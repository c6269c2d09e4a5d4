//! Arrow's own files: with a footer (Feather), or as a stream, as the Hugging Face cache keeps them.
//!
//! Invariant: as for Parquet, a damaged file is an error, never a panic. A stream without its end mark
//! counts as cut off.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use arrow_ipc::reader::{FileReader, StreamReader};
use arrow_ipc::{Block, root_as_footer};

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
    if footer {
        blocks_inside(&mut file)?;
    }
    file.seek(SeekFrom::Start(0)).map_err(io)?;
    let reader = BufReader::new(file);
    Ok(if footer {
        Box::new(FileReader::try_new(reader, None).map_err(|e| e.to_string())?)
    } else {
        Box::new(StreamReader::try_new(reader, None).map_err(|e| e.to_string())?)
    })
}

/// Checks that a footer speaks of blocks inside the file: the reader allocates what it says.
fn blocks_inside(file: &mut File) -> std::result::Result<(), String> {
    let io = |e: std::io::Error| e.to_string();
    // The footer's length and the magic.
    let mut end = [0; 10];
    let size = file.seek(SeekFrom::End(0)).map_err(io)?;
    file.seek(SeekFrom::Start(size.saturating_sub(10)))
        .map_err(io)?;
    file.read_exact(&mut end).map_err(io)?;
    let length = u64::from(u32::from_le_bytes([end[0], end[1], end[2], end[3]]));
    let start = size
        .checked_sub(10 + length)
        .ok_or("its footer is longer than the file")?;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(start)).map_err(io)?;
    file.take(length).read_to_end(&mut bytes).map_err(io)?;
    let footer = root_as_footer(&bytes).map_err(|e| format!("its footer: {e}"))?;
    let inside = |b: &Block| {
        let end = (b.offset().checked_add(b.bodyLength()))
            .and_then(|end| end.checked_add(i64::from(b.metaDataLength())));
        b.offset() >= 0
            && b.bodyLength() >= 0
            && b.metaDataLength() >= 0
            && end.is_some_and(|end| end as u64 <= start)
    };
    let blocks = footer
        .recordBatches()
        .into_iter()
        .chain(footer.dictionaries());
    for block in blocks.flatten() {
        if !inside(block) {
            return Err("a block lies outside the file".into());
        }
    }
    Ok(())
}
