//! Answers on disk: one file each, by a digest of the question.
//!
//! Invariant: a file appears whole or not at all; one that cannot be read is asked for again.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha256};

use crate::error::{Error, Result};

#[derive(Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

fn failed(path: &Path) -> impl FnOnce(std::io::Error) -> Error + '_ {
    move |source| Error::Cache {
        path: path.into(),
        source,
    }
}

impl Cache {
    pub(crate) fn new(folder: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&folder).map_err(failed(&folder))?;
        Ok(Self { folder })
    }

    fn file(&self, url: &str, body: &str) -> PathBuf {
        let digest = Sha256::new()
            .chain_update(url)
            .chain_update([0])
            .chain_update(body)
            .finalize();
        self.folder.join(format!("{digest:x}.json"))
    }

    pub(crate) fn find(&self, url: &str, body: &str) -> Result<Option<Value>> {
        let path = self.file(url, body);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(failed(&path)(e)),
        }
    }

    pub(crate) fn keep(&self, url: &str, body: &str, answer: &Value) -> Result<()> {
        let path = self.file(url, body);
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            file.write_all(answer.to_string().as_bytes())?;
            file.as_file().sync_all()?;
            file.persist(&path)?;
            Ok(())
        };
        write().map_err(failed(&path))
    }
}
