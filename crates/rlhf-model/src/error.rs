//! What can go wrong in this crate.

use std::path::{Path, PathBuf};

/// The result of this crate's functions.
pub type Result<T> = std::result::Result<T, Error>;

/// One disagreement between a configuration and a file of weights.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum TensorProblem {
    /// The configuration asks for a tensor that no file holds.
    Missing {
        /// Its name.
        name: String,
    },
    /// The tensor has another shape.
    Shape {
        /// Its name.
        name: String,
        /// The shape that the configuration asks for.
        expected: Vec<i64>,
        /// The shape found.
        found: Vec<usize>,
    },
    /// The tensor's numbers are of a type that is no weight.
    Dtype {
        /// Its name.
        name: String,
        /// The type found, as safetensors spells it.
        found: String,
    },
    /// A file holds a tensor that the configuration has no place for. Listed where something else is wrong too: it
    /// may be what is missing, under another name.
    Unexpected {
        /// Its name.
        name: String,
    },
    /// More layers are missing than it is useful to name.
    More {
        /// How many further tensors are missing.
        missing: u64,
    },
}

impl std::fmt::Display for TensorProblem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Missing { name } => write!(f, "missing {name}"),
            Self::Shape {
                name,
                expected,
                found,
            } => {
                write!(
                    f,
                    "{name} has shape {found:?}, the configuration says {expected:?}"
                )
            }
            Self::Dtype { name, found } => {
                write!(
                    f,
                    "{name} has type {found}; weights are F64, F32, F16 or BF16"
                )
            }
            Self::Unexpected { name } => write!(f, "unexpected {name}"),
            Self::More { missing } => write!(f, "{missing} further tensors are missing"),
        }
    }
}

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A configuration says something that this crate cannot follow.
    #[error("{file}: {key}: {message}")]
    Config {
        /// The file (or `config` for one made in memory).
        file: String,
        /// The key.
        key: String,
        /// What is wrong with it, and what would be right.
        message: String,
    },
    /// A file is not what its name says.
    #[error("{file}: {message}")]
    Format {
        /// The file.
        file: String,
        /// What is wrong with it.
        message: String,
    },
    /// Weights and configuration disagree.
    #[error("{file}: the weights do not fit config.json: {}", list(problems))]
    Tensors {
        /// The file or folder of the weights.
        file: String,
        /// Every disagreement.
        problems: Vec<TensorProblem>,
    },
    /// An argument is out of its range.
    #[error("{0}")]
    Argument(String),
    /// A tensor has another shape than the operation needs.
    #[error("{op}: expected {expected}, got {found:?}")]
    Shape {
        /// The operation.
        op: &'static str,
        /// What it needs.
        expected: String,
        /// The shape given.
        found: Vec<i64>,
    },
    /// A number that must be finite is not.
    #[error("non-finite {what}")]
    NonFinite {
        /// What it is and where.
        what: String,
    },
    /// A kernel refused.
    #[error(transparent)]
    Kernel(#[from] rlhf_kernels::Error),
    /// The data crate refused.
    #[error(transparent)]
    Data(#[from] rlhf_data::Error),
    /// A server could not be asked.
    #[cfg(feature = "endpoint")]
    #[error(transparent)]
    Endpoint(#[from] rlhf_endpoint::Error),
    /// libtorch refused.
    #[error("libtorch: {}", first_line(.0))]
    Torch(#[from] tch::TchError),
}

impl Error {
    /// Whether the user's input is at fault, rather than the machine.
    #[must_use]
    pub fn is_input(&self) -> bool {
        match self {
            Self::Io { source, .. } => {
                matches!(
                    source.kind(),
                    std::io::ErrorKind::NotFound | std::io::ErrorKind::InvalidData
                )
            }
            Self::Data(e) => e.is_input(),
            Self::Config { .. }
            | Self::Format { .. }
            | Self::Tensors { .. }
            | Self::Argument(_)
            | Self::NonFinite { .. } => true,
            #[cfg(feature = "endpoint")]
            Self::Endpoint(e) => matches!(e, rlhf_endpoint::Error::Config(_)),
            Self::Shape { .. } | Self::Kernel(_) | Self::Torch(_) => false,
        }
    }

    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io {
            path: path.to_owned(),
            source,
        }
    }

    pub(crate) fn format(file: &Path, message: impl Into<String>) -> Self {
        Self::Format {
            file: file.display().to_string(),
            message: message.into(),
        }
    }
}

/// libtorch appends a C++ backtrace; the first line is the message.
fn first_line(e: &tch::TchError) -> String {
    let text = e.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn list(problems: &[TensorProblem]) -> String {
    let all: Vec<String> = problems.iter().map(ToString::to_string).collect();
    all.join("; ")
}
