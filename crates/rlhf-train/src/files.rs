//! Files: synced writes, hashes, memory.

use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::path::Path;

use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

/// Writes and syncs a file.
pub(crate) fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = File::create(path).map_err(Error::write(path))?;
    file.write_all(bytes).map_err(Error::write(path))?;
    file.sync_all().map_err(Error::write(path))
}

/// Writes a file under a temporary name, syncs it, and puts it in place: it appears whole or not at all.
///
/// # Errors
/// When it cannot be written.
pub fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(format!(".{}.tmp", std::process::id()));
    let work = path.with_file_name(name);
    write_synced(&work, bytes)?;
    std::fs::rename(&work, path).map_err(Error::write(path))?;
    match path.parent().filter(|d| !d.as_os_str().is_empty()) {
        Some(dir) => sync_dir(dir),
        None => Ok(()),
    }
}

/// Makes what was written to a file durable.
pub(crate) fn sync_file(path: &Path) -> Result<()> {
    OpenOptions::new()
        .write(true)
        .open(path)
        .and_then(|f| f.sync_all())
        .map_err(Error::write(path))
}

/// Makes the names in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> Result<()> {
    File::open(dir)
        .and_then(|d| d.sync_all())
        .map_err(Error::write(dir))
}

/// SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// When it cannot be read.
pub fn hash_file(path: &Path) -> Result<String> {
    let mut file = File::open(path).map_err(Error::read(path))?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer).map_err(Error::read(path))? {
            0 => {
                return Ok(hasher
                    .finalize()
                    .iter()
                    .map(|b| format!("{b:02x}"))
                    .collect());
            }
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// The most memory that this process has held, in bytes; `None` where the system does not tell.
#[must_use]
pub fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|l| l.starts_with("VmHWM:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()? * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hash_known_answer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_synced(&path, b"abc").unwrap();
        // FIPS 180-2, appendix B.1.
        assert_eq!(
            hash_file(&path).unwrap(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn peak_memory_counts_what_was_freed() {
        let before = peak_memory().unwrap();
        let block = vec![1u8; (before + (64 << 20)) as usize];
        assert!(block.iter().step_by(4096).all(|&b| b == 1));
        drop(block);
        assert!(peak_memory().unwrap() >= before + (60 << 20));
    }
}
