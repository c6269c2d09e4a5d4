//! What can go wrong between here and a server.

use std::path::PathBuf;
use std::time::Duration;

/// The result of asking.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The endpoint cannot be asked like this.
    #[error("endpoint: {0}")]
    Config(String),
    /// No answer came: no connection, or one that broke.
    #[error("{url}: {what}; check that the server runs and the address is right")]
    Unreachable {
        /// Where.
        url: String,
        /// The transport's words.
        what: String,
    },
    /// The answer did not come in time.
    #[error("{url}: no answer in {:.1} s; give it more time, or ask for fewer tokens", after.as_secs_f64())]
    TimedOut {
        /// Where.
        url: String,
        /// How long the try took.
        after: Duration,
    },
    /// The server refused.
    #[error("{url}: status {status}: {said}{}", advice(*status))]
    Status {
        /// Where.
        url: String,
        /// The status.
        status: u16,
        /// The beginning of what it said.
        said: String,
        /// When to come again, if it said so.
        retry_after: Option<Duration>,
    },
    /// The answer is not what it should be.
    #[error("{url}: an answer that cannot be used: {what}: {said}")]
    Malformed {
        /// Where.
        url: String,
        /// What is wrong.
        what: String,
        /// The beginning of the answer.
        said: String,
    },
    /// The cache's folder.
    #[error("{}: {source}", path.display())]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
}

fn advice(status: u16) -> &'static str {
    match status {
        401 | 403 => "; check the key",
        404 => "; check the address (it ends in /v1) and the model's name",
        429 => "; ask for less at once",
        _ => "",
    }
}

impl Error {
    pub(crate) fn transport(url: &str, e: &ureq::Error, after: Duration) -> Self {
        let url = url.to_owned();
        match e {
            ureq::Error::Timeout(_) => Self::TimedOut { url, after },
            e => Self::Unreachable {
                url,
                what: e.to_string(),
            },
        }
    }

    /// Whether another try may succeed.
    #[must_use]
    pub fn passes(&self) -> bool {
        match self {
            Self::Unreachable { .. } | Self::TimedOut { .. } | Self::Malformed { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 425 | 429 | 500..=599),
            Self::Config(_) | Self::Cache { .. } => false,
        }
    }

    pub(crate) fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }
}
