//! The crate's error.

/// What can go wrong in a kernel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape, type or value.
    #[error("{op}: {what}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// What was got and what was expected.
        what: String,
    },
    /// libtorch refused.
    #[error("{op}: {message}")]
    Shim {
        /// The operation.
        op: &'static str,
        /// libtorch's message.
        message: String,
    },
    /// Other processes did not come in time.
    #[error("{op}: no answer within {after:?}: {message}")]
    Timeout {
        /// The operation.
        op: &'static str,
        /// How long was waited.
        after: std::time::Duration,
        /// What c10d says.
        message: String,
    },
    /// libtorch refused, through tch.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
}

fn first_line(e: &tch::TchError) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

/// An [`Error::Argument`] unless `ok`.
pub(crate) fn ensure(ok: bool, op: &'static str, what: impl FnOnce() -> String) -> Result<()> {
    if ok {
        Ok(())
    } else {
        Err(Error::Argument { op, what: what() })
    }
}
