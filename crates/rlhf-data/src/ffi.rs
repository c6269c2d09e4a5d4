//! The crate's only unsafe code: mapping a file into memory.

use std::path::Path;

use memmap2::Mmap;

use crate::error::{Error, Result};

/// Maps a whole file for reading.
pub(crate) fn map(path: &Path) -> Result<Mmap> {
    let file = std::fs::File::open(path).map_err(Error::io(path))?;
    if !file.metadata().map_err(Error::io(path))?.is_file() {
        return Err(Error::file(path, "no plain file", "remove it"));
    }
    // SAFETY: the map is read-only and private. Another process that shortens the file while it is
    // mapped would raise SIGBUS; our own writers never touch a finished file (they write a new one
    // and rename it), so the inode behind the map does not change.
    unsafe { Mmap::map(&file) }.map_err(Error::io(path))
}
