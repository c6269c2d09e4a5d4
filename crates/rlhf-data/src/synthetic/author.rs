//! Who writes, and what was written, kept on disk.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::conversation::Message;
use crate::error::{Error, Result};

/// Something to be written.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Ask {
    /// The conversation so far; the assistant is to go on.
    pub messages: Vec<Message>,
    /// The longest answer in tokens.
    pub max_tokens: usize,
    /// 0 is greedy.
    pub temperature: f64,
    /// The key of the answer's noise: equal asks of different keys get answers of their own.
    pub key: u64,
}

/// An answer, or what kept it from coming.
pub type Answer = std::result::Result<String, String>;

/// A writer of text: a model here, or one behind an endpoint.
pub trait Author {
    /// Who it is, in such detail that another name means that it may answer otherwise.
    fn name(&self) -> &str;

    /// One answer for each ask, in their order. What fails fails alone: the row is left out and counted.
    fn write(&self, asks: &[Ask]) -> Vec<Answer>;
}

/// An author whose answers are kept in a folder, one file each, by a digest of name and ask. Failures are not kept.
pub struct Kept<'a> {
    author: &'a dyn Author,
    folder: PathBuf,
    asked: Cell<u64>,
    found: Cell<u64>,
}

#[derive(Serialize, Deserialize)]
struct Written {
    text: String,
}

impl std::fmt::Debug for Kept<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Kept")
            .field("author", &self.author.name())
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

impl<'a> Kept<'a> {
    /// Keeps what `author` writes in `folder`.
    ///
    /// # Errors
    /// When the folder cannot be made.
    pub fn new(author: &'a dyn Author, folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        Ok(Self {
            author,
            folder: folder.to_owned(),
            asked: Cell::new(0),
            found: Cell::new(0),
        })
    }

    /// Asks that went to the author, and asks that the folder answered.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.asked.get(), self.found.get())
    }

    fn file(&self, ask: &Ask) -> PathBuf {
        let ask = serde_json::to_vec(ask).unwrap_or_default();
        let digest = Sha256::new()
            .chain_update(self.author.name())
            .chain_update([0])
            .chain_update(ask)
            .finalize();
        self.folder.join(format!("{digest:x}.json"))
    }

    fn find(&self, ask: &Ask) -> Option<String> {
        // A damaged file is asked for again.
        let bytes = std::fs::read(self.file(ask)).ok()?;
        let written: Written = serde_json::from_slice(&bytes).ok()?;
        Some(written.text)
    }

    fn keep(&self, ask: &Ask, text: &str) -> std::result::Result<(), String> {
        let mut out =
            crate::source::JsonlOut::create(&self.file(ask)).map_err(|e| e.to_string())?;
        let written = Written { text: text.into() };
        out.write(&written)
            .and_then(|()| out.finish())
            .map_err(|e| e.to_string())
    }
}

impl Author for Kept<'_> {
    fn name(&self) -> &str {
        self.author.name()
    }

    fn write(&self, asks: &[Ask]) -> Vec<Answer> {
        let mut answers: Vec<Option<Answer>> = asks.iter().map(|a| self.find(a).map(Ok)).collect();
        let open: Vec<usize> = (0..asks.len()).filter(|&i| answers[i].is_none()).collect();
        self.found
            .set(self.found.get() + (asks.len() - open.len()) as u64);
        self.asked.set(self.asked.get() + open.len() as u64);
        let new: Vec<Ask> = open.iter().map(|&i| asks[i].clone()).collect();
        if !new.is_empty() {
            for (&i, answer) in open.iter().zip(self.author.write(&new)) {
                let kept = answer.and_then(|text| self.keep(&asks[i], &text).map(|()| text));
                answers[i] = Some(kept);
            }
        }
        answers
            .into_iter()
            .map(|a| a.unwrap_or_else(|| Err("the author gave no answer".into())))
            .collect()
    }
}
