//! What is known about well-known public datasets: a TOML file each, shipped with the crate.

use std::collections::BTreeMap;

use serde::Deserialize;

use super::Format;
use crate::error::{Error, Result};

macro_rules! manifests {
    ($($name:literal),* $(,)?) => {
        &[$((
            $name,
            include_str!(concat!("../../../../datasets/manifests/", $name, ".toml")),
        )),*]
    };
}

/// A dataset: where it lives and how it is read.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Manifest {
    /// The name, as in [`shipped`].
    pub name: String,
    /// A hub id or a URL.
    pub source: String,
    /// The licence, as its makers name it.
    pub licence: String,
    /// The name of the importer.
    pub importer: String,
    /// The columns of the source.
    pub columns: Vec<String>,
    /// The splits by name.
    #[serde(default)]
    pub splits: BTreeMap<String, Split>,
    /// What else to know.
    #[serde(default)]
    pub notes: String,
}

/// A part of a dataset.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
#[non_exhaustive]
pub struct Split {
    /// Its rows, where they are known.
    pub rows: Option<u64>,
    /// Its bytes, where they are known.
    pub bytes: Option<u64>,
}

impl Manifest {
    /// Reads a manifest.
    ///
    /// # Errors
    /// When it is no such TOML, or names an importer that does not exist.
    pub fn parse(text: &str) -> Result<Self> {
        let manifest: Self = toml::from_str(text).map_err(|e| Error::Invalid {
            what: format!("no manifest: {e}"),
            mend: "correct the file".into(),
        })?;
        manifest.format()?;
        Ok(manifest)
    }

    /// The manifest of a name among [`shipped`], or in a file `….toml`.
    ///
    /// # Errors
    /// When there is none, or the file cannot be read or is no manifest.
    pub fn named(name: &str) -> Result<Self> {
        if name.ends_with(".toml") {
            let path = std::path::Path::new(name);
            let text = std::fs::read_to_string(path).map_err(Error::io(path))?;
            return Self::parse(&text).map_err(|e| Error::file(path, e.to_string(), "correct it"));
        }
        match shipped().iter().find(|(n, _)| *n == name) {
            Some((_, text)) => Self::parse(text),
            None => {
                let names: Vec<&str> = shipped().iter().map(|(n, _)| *n).collect();
                Err(Error::Invalid {
                    what: format!("there is no dataset `{name}`"),
                    mend: format!("name one of {}, or a manifest's file", names.join(", ")),
                })
            }
        }
    }

    /// The importer.
    ///
    /// # Errors
    /// When there is none of its name.
    pub fn format(&self) -> Result<Format> {
        Format::parse(&self.importer).ok_or_else(|| Error::Invalid {
            what: format!("{}: there is no importer `{}`", self.name, self.importer),
            mend: format!("name one of {}", Format::ALL.map(Format::name).join(", ")),
        })
    }
}

/// The manifests that come with the crate: names and texts.
#[must_use]
pub fn shipped() -> &'static [(&'static str, &'static str)] {
    manifests![
        "alpaca",
        "gsm8k",
        "helpsteer2",
        "hh-rlhf",
        "ifeval",
        "nectar",
        "no-robots",
        "oasst1",
        "prm800k",
        "shp",
        "tldr-comparisons",
        "tulu-3-sft-mixture",
        "ultrafeedback",
        "ultrafeedback-binarized",
        "webgpt-comparisons",
    ]
}
