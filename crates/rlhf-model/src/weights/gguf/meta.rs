//! Reading the metadata, with errors that name file and key.

use std::path::Path;

use super::file::{GgufFile, Meta};
use crate::error::{Error, Result};

pub(super) struct MetaReader<'a> {
    pub(super) gguf: &'a GgufFile,
    pub(super) file: &'a Path,
}

impl<'a> MetaReader<'a> {
    pub(super) fn bad(&self, key: &str, message: impl std::fmt::Display) -> Error {
        Error::format(self.file, format!("{key}: {message}"))
    }

    pub(super) fn maybe(&self, key: &str) -> Option<&'a Meta> {
        self.gguf.meta().get(key)
    }

    fn needed<T>(&self, key: &str, found: Option<T>) -> Result<T> {
        found.ok_or_else(|| self.bad(key, "missing in the metadata"))
    }

    pub(super) fn maybe_unsigned(&self, key: &str) -> Result<Option<u64>> {
        match self.maybe(key) {
            None => Ok(None),
            Some(Meta::Unsigned(n)) => Ok(Some(*n)),
            Some(Meta::Signed(n)) if *n >= 0 => Ok(Some(n.unsigned_abs())),
            Some(_) => Err(self.bad(key, "not a non-negative integer")),
        }
    }

    /// A number that fits in the sizes of a configuration.
    pub(super) fn maybe_size(&self, key: &str) -> Result<Option<i64>> {
        self.maybe_unsigned(key)?
            .map(|n| i64::try_from(n).map_err(|_| self.bad(key, format!("{n} is too large"))))
            .transpose()
    }

    pub(super) fn size(&self, key: &str) -> Result<i64> {
        self.needed(key, self.maybe_size(key)?)
    }

    pub(super) fn maybe_float(&self, key: &str) -> Result<Option<f64>> {
        match self.maybe(key) {
            None => Ok(None),
            Some(Meta::Float(x)) if x.is_finite() => Ok(Some(*x)),
            Some(_) => Err(self.bad(key, "not a finite number")),
        }
    }

    pub(super) fn float(&self, key: &str) -> Result<f64> {
        self.needed(key, self.maybe_float(key)?)
    }

    pub(super) fn maybe_flag(&self, key: &str) -> Result<Option<bool>> {
        match self.maybe(key) {
            None => Ok(None),
            Some(Meta::Bool(b)) => Ok(Some(*b)),
            Some(_) => Err(self.bad(key, "not true or false")),
        }
    }

    pub(super) fn maybe_text(&self, key: &str) -> Result<Option<&'a str>> {
        match self.maybe(key) {
            None => Ok(None),
            Some(Meta::Text(t)) => Ok(Some(t)),
            Some(_) => Err(self.bad(key, "not text")),
        }
    }

    pub(super) fn text(&self, key: &str) -> Result<&'a str> {
        self.needed(key, self.maybe_text(key)?)
    }

    pub(super) fn list(&self, key: &str) -> Result<&'a [Meta]> {
        match self.needed(key, self.maybe(key))? {
            Meta::List(list) => Ok(list),
            _ => Err(self.bad(key, "not a list")),
        }
    }

    pub(super) fn texts(&self, key: &str) -> Result<Vec<&'a str>> {
        self.list(key)?
            .iter()
            .map(|m| match m {
                Meta::Text(t) => Ok(t.as_str()),
                _ => Err(self.bad(key, "not a list of texts")),
            })
            .collect()
    }

    /// The token of `tokenizer.ggml.NAME_token_id`, where there is one.
    pub(super) fn token_id(&self, name: &str) -> Result<Option<u32>> {
        let key = format!("tokenizer.ggml.{name}_token_id");
        self.maybe_unsigned(&key)?
            .map(|n| u32::try_from(n).map_err(|_| self.bad(&key, format!("{n} is no token"))))
            .transpose()
    }
}
