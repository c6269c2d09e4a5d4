//! The crate's error.

use std::path::{Path, PathBuf};

/// What can go wrong in training.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder cannot be read or written.
    #[error("cannot {act} {}: {source}\n  do: {mend}", path.display())]
    Io {
        /// What was tried.
        act: &'static str,
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
        /// What to do.
        mend: &'static str,
    },
    /// A checkpoint is damaged or belongs to something else.
    #[error("checkpoint {}: {what}\n  do: remove the folder to go on from the one before", path.display())]
    Checkpoint {
        /// Its folder.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The loss or the gradient was not finite for too many steps in a row.
    #[error(
        "loss or gradient not finite in {count} steps in a row, up to step {step} (loss {loss}, gradient norm {grad_norm})\n  do: lower the learning rate, or look at the rows of these steps; the last good checkpoint is kept"
    )]
    NotFinite {
        /// How many steps.
        count: u32,
        /// The last of them.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its gradient norm.
        grad_norm: f64,
    },
    /// A step was applied without a loss.
    #[error("step {0} has no loss: nothing was accumulated, or its weight is 0")]
    EmptyStep(u64),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] rlhf_kernels::Error),
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn write(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Io {
            act: "write",
            path,
            source,
            mend: "free space on the disk or correct the folder's permissions; what was written before is intact",
        }
    }

    pub(crate) fn read(path: &Path) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.to_owned();
        |source| Self::Io {
            act: "read",
            path,
            source,
            mend: "correct the path or the permissions",
        }
    }
}
