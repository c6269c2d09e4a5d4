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
    /// A step, a log or a checkpoint failed.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Train(#[from] rlhf_train::Error),
    /// Recorded rollouts or samples cannot be read or written.
    #[cfg(feature = "train")]
    #[error("{}: {what}\n  do: {mend}", path.display())]
    Recording {
        /// The file.
        path: std::path::PathBuf,
        /// What is wrong.
        what: String,
        /// What to do.
        mend: &'static str,
    },
    /// A reward failed.
    #[cfg(feature = "train")]
    #[error(transparent)]
    Reward(#[from] rlhf_reward::Error),
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

/// The values in f32, or in f64 when they are f64.
pub(crate) fn at_least_f32(x: &rlhf_kernels::Ragged) -> tch::Tensor {
    let kind = if x.values().kind() == tch::Kind::Double {
        tch::Kind::Double
    } else {
        tch::Kind::Float
    };
    x.values().to_kind(kind)
}

/// An error unless all `others` have the sequences of `first`.
pub(crate) fn same_offsets(
    op: &'static str,
    first: &rlhf_kernels::Ragged,
    others: &[(&str, &rlhf_kernels::Ragged)],
) -> Result<()> {
    for (name, other) in others {
        ensure(other.offsets() == first.offsets(), op, || {
            format!("the {name} belong to other sequences than the log-probs")
        })?;
    }
    Ok(())
}
