//! Errors that the user can mend: wrong usage or input, exit code 2.
//!
//! Every one has three lines: the cause, the place, the mend.

use std::fmt;

/// Wrong usage or input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Usage {
    /// One line of cause.
    pub cause: String,
    /// One line of where.
    pub place: String,
    /// One line of what to do.
    pub mend: String,
}

/// Makes a [`Usage`] error.
#[must_use]
pub fn usage(cause: impl Into<String>, place: impl Into<String>, mend: impl Into<String>) -> Usage {
    Usage {
        cause: cause.into(),
        place: place.into(),
        mend: mend.into(),
    }
}

impl fmt::Display for Usage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}\n  in: {}\n  do: {}",
            self.cause, self.place, self.mend
        )
    }
}

impl std::error::Error for Usage {}
