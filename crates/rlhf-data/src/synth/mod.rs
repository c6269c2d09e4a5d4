//! Generators of the shipped data sets: seed in, files out, byte for byte the same everywhere.
//!
//! Invariant: the files are a function of [`SEED`] and of the texts in [`grammar`] and [`lexicon`];
//! no clock, no thread order, no hash order gets in. Knows nothing of models and training.

mod card;
mod columns;
pub mod grammar;
pub mod help;
pub mod lexicon;
pub mod tasks;
pub mod vocabulary;

use crate::error::{Error, Result};
use std::path::{Path, PathBuf};

/// The seed of the shipped files.
pub const SEED: u64 = 20;

/// An encoder's complaint: with the shipped seed and texts it is a fault of this program.
fn encoding(what: &str, error: impl std::fmt::Display) -> Error {
    Error::Invalid {
        what: format!("{what}: {error}"),
        mend: "this is a fault of the generator; please report it".to_owned(),
    }
}

/// One file of a data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DataFile {
    /// Path below the `datasets` folder, with `/` between the parts.
    pub path: String,
    /// The content.
    pub bytes: Vec<u8>,
}

impl DataFile {
    /// Hexadecimal SHA-256 of the content.
    #[must_use]
    pub fn sha256(&self) -> String {
        use sha2::{Digest, Sha256};
        Sha256::digest(&self.bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    /// Writes the file below `root`, under a temporary name first.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file.
    pub fn write(&self, root: &Path) -> Result<()> {
        let path = root.join(&self.path);
        let folder = path.parent().unwrap_or(root);
        let place = |source| Error::Io {
            path: path.clone(),
            source,
        };
        std::fs::create_dir_all(folder).map_err(place)?;
        let mut part = path.clone().into_os_string();
        part.push(".part");
        let part = PathBuf::from(part);
        std::fs::write(&part, &self.bytes).map_err(place)?;
        std::fs::rename(&part, &path).map_err(place)
    }

    /// Whether the file below `root` has exactly this content; false where it is absent.
    ///
    /// # Errors
    /// [`Error::Io`] where it exists but cannot be read.
    pub fn is_written(&self, root: &Path) -> Result<bool> {
        let path = root.join(&self.path);
        match std::fs::read(&path) {
            Ok(bytes) => Ok(bytes == self.bytes),
            Err(source) if source.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Error::Io { path, source }),
        }
    }
}

/// All files of `datasets/`: Parquet, tokenizer and card.
///
/// # Errors
/// [`crate::Error::Invalid`] where an encoder fails; the shipped seed does not.
pub fn build(seed: u64) -> Result<Vec<DataFile>> {
    let task = help::Task::generate(seed)?;
    let texts = task.sft_texts();
    let tokenizer = vocabulary::train(&texts)?;
    let mut files = task.files()?;
    files.extend(vocabulary::files("help", &tokenizer)?);
    files.extend(tasks::Tasks::generate(seed).files()?);
    files.extend(vocabulary::files("tasks", &vocabulary::bytes()?)?);
    let card = card::render(&task, &tokenizer, &files)?;
    files.push(DataFile {
        path: "README.md".to_owned(),
        bytes: card.into_bytes(),
    });
    Ok(files)
}
