//! The crate's error: every one says where it is and what to do.

use std::path::{Path, PathBuf};

/// What can go wrong with data.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be opened, read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A whole file is wrong.
    #[error("{what}\n  in: {}\n  do: {mend}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What to do.
        mend: String,
    },
    /// A row is wrong.
    #[error("{what}\n  in: {}, {place}{}\n  do: {mend}", path.display(), column_text(column))]
    Row {
        /// The file.
        path: PathBuf,
        /// `row 3` (from 0) or `line 4` (from 1).
        place: String,
        /// The column, or nothing.
        column: String,
        /// What was found and what was expected.
        what: String,
        /// What to do.
        mend: String,
    },
    /// A chat template cannot be read or does not work on a conversation.
    #[error("chat template: {what}\n  in: {place}\n  do: {mend}")]
    Template {
        /// Where the template comes from.
        place: String,
        /// What is wrong.
        what: String,
        /// What to do.
        mend: String,
    },
    /// A value breaks an invariant.
    #[error("{what}\n  do: {mend}")]
    Invalid {
        /// What is wrong.
        what: String,
        /// What to do.
        mend: String,
    },
}

fn column_text(column: &str) -> String {
    if column.is_empty() {
        String::new()
    } else {
        format!(", column `{column}`")
    }
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    /// Whether the user's input is at fault, rather than the machine.
    #[must_use]
    pub fn is_input(&self) -> bool {
        match self {
            Self::Io { source, .. } => matches!(
                source.kind(),
                std::io::ErrorKind::NotFound
                    | std::io::ErrorKind::InvalidData
                    | std::io::ErrorKind::UnexpectedEof
                    | std::io::ErrorKind::IsADirectory
            ),
            _ => true,
        }
    }

    /// Adds the row (from 0) to an error that knows none.
    #[must_use]
    pub(crate) fn at_row(mut self, row: u64) -> Self {
        match &mut self {
            Self::Template { place, .. } => place.push_str(&format!("; data row {row}")),
            Self::Invalid { what, .. } => *what = format!("row {row}: {what}"),
            Self::Io { .. } | Self::File { .. } | Self::Row { .. } => {}
        }
        self
    }

    pub(crate) fn file(path: &Path, what: impl Into<String>, mend: impl Into<String>) -> Self {
        Self::File {
            path: path.to_owned(),
            what: what.into(),
            mend: mend.into(),
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::Io { path, source }
    }
}
