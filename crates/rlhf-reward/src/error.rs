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
    /// A number is not finite.
    #[error("{what} is not finite")]
    NotFinite {
        /// Which.
        what: String,
    },
    /// A row's label does not fit.
    #[error("row {row}: {what}\n  do: correct or drop the row")]
    Row {
        /// The row of the data, from 0.
        row: u64,
        /// What was found and what was expected.
        what: String,
    },
    /// A file is not what was expected.
    #[error("{what}\n  in: {}\n  do: {mend}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        what: String,
        /// What to do.
        mend: String,
    },
    /// Groups do not hold exactly two completions.
    #[error("expected groups of exactly two completions: chosen and rejected")]
    NotPairs,
    /// A verifier cannot work with its settings or with the data.
    #[cfg(feature = "verify")]
    #[error("verifier `{verifier}`: {what}")]
    Verifier {
        /// Which.
        verifier: String,
        /// What is wrong.
        what: String,
    },
    /// A judge cannot work with its settings or with the data.
    #[cfg(feature = "judge")]
    #[error("judge: {what}")]
    Judge {
        /// What is wrong.
        what: String,
    },
    /// A judge's server cannot be asked.
    #[cfg(feature = "judge")]
    #[error(transparent)]
    Endpoint(#[from] rlhf_endpoint::Error),
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
    /// A step, a log or a checkpoint failed.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Train(#[from] rlhf_train::Error),
}

impl Error {
    /// Whether what was given is at fault, not the program or the machine.
    #[must_use]
    pub fn is_input(&self) -> bool {
        match self {
            Self::Row { .. } | Self::File { .. } => true,
            #[cfg(feature = "verify")]
            Self::Verifier { .. } => true,
            #[cfg(feature = "judge")]
            Self::Judge { .. } => true,
            #[cfg(feature = "train")]
            Self::Data(e) => e.is_input(),
            #[cfg(feature = "train")]
            Self::Model(e) => e.is_input(),
            _ => false,
        }
    }
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
