//! The crate's error.

use std::path::{Path, PathBuf};

use crate::stepper::BadStep;

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
    #[error("checkpoint {}: {what}\n  do: {mend}", path.display())]
    Checkpoint {
        /// Its folder or file.
        path: PathBuf,
        /// What is wrong.
        what: String,
        /// What to do.
        mend: &'static str,
    },
    /// A saved state does not fit the parameters that it is loaded into.
    #[error("the saved state is of another training: {0}")]
    State(String),
    /// The loss or the gradient was not finite for too many steps in a row.
    #[error(
        "loss or gradient not finite in {count} steps in a row, up to step {step} (loss {loss}, gradient norm {grad_norm}){}\n  do: lower the learning rate, or look at the rows of these steps; the last good checkpoint is kept",
        bad_steps(.bad)
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
        /// The steps, those before the last resume excepted.
        bad: Vec<BadStep>,
    },
    /// A step was applied without a loss.
    #[error("step {0} has no loss: nothing was accumulated, or its weight is 0")]
    EmptyStep(u64),
    /// A step was applied whose loss depends on no parameter.
    #[error(
        "the loss of step {0} has no gradient: it was computed without one, or from frozen parameters"
    )]
    NoGradient(u64),
    /// A step was logged or saved before [`Session::resume`](crate::Session::resume).
    #[error(
        "the session of stage `{0}` was not resumed: call `resume` once, before the first step"
    )]
    NotResumed(String),
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] rlhf_kernels::Error),
    /// libtorch failed.
    #[error("libtorch: {}", first_line(.0))]
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

    /// A file that is not what it should be.
    pub(crate) fn damaged(path: &Path, what: impl ToString) -> Self {
        Self::Checkpoint {
            path: path.to_owned(),
            what: what.to_string(),
            mend: "remove it, to go on from the one before",
        }
    }
}

/// libtorch appends a C++ backtrace.
fn first_line(e: &tch::TchError) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Rows that a message names for each step.
const NAMED: usize = 8;

fn bad_steps(bad: &[BadStep]) -> String {
    bad.iter()
        .filter(|b| !b.rows.is_empty())
        .map(|b| {
            let rows: Vec<String> = b.rows.iter().take(NAMED).map(u64::to_string).collect();
            let more = match b.rows.len().saturating_sub(NAMED) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            format!("\n  step {}: rows {}{more}", b.step, rows.join(", "))
        })
        .collect()
}
