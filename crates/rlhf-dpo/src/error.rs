//! The crate's error.

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has the wrong shape or value.
    #[error("{op}: {what}")]
    Argument {
        /// The operation.
        op: &'static str,
        /// What was got and what was expected.
        what: String,
    },
    /// A kernel failed.
    #[error(transparent)]
    Kernel(#[from] rlhf_kernels::Error),
    /// libtorch failed.
    #[error("libtorch: {0}")]
    Torch(#[from] tch::TchError),
    /// The data do not fit.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Data(#[from] rlhf_data::Error),
    /// The model failed.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Model(#[from] rlhf_model::Error),
    /// Who scores completions failed.
    #[cfg(feature = "train")]
    #[error("scoring completions: {0}")]
    Scorer(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// A step, a log or a checkpoint failed.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Train(#[from] rlhf_train::Error),
}

/// The crate's result.
pub type Result<T> = std::result::Result<T, Error>;

pub(crate) fn ensure(ok: bool, op: &'static str, what: impl FnOnce() -> String) -> Result<()> {
    if ok {
        Ok(())
    } else {
        Err(Error::Argument { op, what: what() })
    }
}
