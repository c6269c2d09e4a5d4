//! Writing files whole: temporary name, sync, rename.

use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;
use serde::Serialize;

/// Writes `bytes` to `path`: either the whole file appears, or nothing changes.
///
/// # Errors
/// When the disk is full or the folder cannot be written.
pub fn write(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let dir = path
        .parent()
        .filter(|d| !d.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let place = || format!("cannot write {}", path.display());
    let mut file = tempfile::NamedTempFile::new_in(dir).with_context(place)?;
    file.write_all(bytes).with_context(place)?;
    // A temporary file is for its owner alone; what we leave behind is for everybody.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        let mode = std::fs::Permissions::from_mode(0o644);
        file.as_file().set_permissions(mode).with_context(place)?;
    }
    file.as_file().sync_all().with_context(place)?;
    file.persist(path)
        .map_err(|e| e.error)
        .with_context(place)?;
    Ok(())
}

/// Writes `value` as indented JSON.
///
/// # Errors
/// As `write`.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec_pretty(value)?;
    text.push(b'\n');
    write(path, &text)
}
