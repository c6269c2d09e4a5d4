//! Which libtorch there is.

use std::path::{Path, PathBuf};

use crate::shell::{Run, root};

/// The version that `tch` 0.24 needs, exactly.
pub(crate) const VERSION: &str = "2.11.0";

/// Where a libtorch came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// `$LIBTORCH`.
    Variable,
    /// The user's cache, prepared by an earlier setup.
    Cache,
    /// Python's torch.
    Python,
}

impl Origin {
    pub(crate) fn text(self) -> &'static str {
        match self {
            Self::Variable => "$LIBTORCH",
            Self::Cache => "the cache",
            Self::Python => "Python's torch",
        }
    }
}

/// A libtorch folder.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) dir: PathBuf,
    pub(crate) origin: Origin,
}

/// The folder in the user's cache, shared by all clones.
pub(crate) fn cache_dir() -> PathBuf {
    let base = std::env::var_os("XDG_CACHE_HOME")
        .filter(|d| !d.is_empty())
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|h| PathBuf::from(h).join(".cache")))
        .unwrap_or_else(std::env::temp_dir);
    base.join("rlhf").join(format!("libtorch-{VERSION}-cpu"))
}

/// The link in the workspace that the build follows.
pub(crate) fn link() -> PathBuf {
    root().join(".libtorch")
}

/// The version of a libtorch folder, without `+cu130` and the like.
pub(crate) fn version(dir: &Path) -> Option<String> {
    let text = std::fs::read_to_string(dir.join("build-version"))
        .ok()
        .or_else(|| {
            // Python's package says it in version.py.
            let text = std::fs::read_to_string(dir.join("version.py")).ok()?;
            let line = text.lines().find(|l| l.starts_with("__version__"))?;
            Some(line.split(['\'', '"']).nth(1)?.to_owned())
        })?;
    Some(text.trim().split('+').next().unwrap_or_default().to_owned())
}

/// Whether a folder is a whole libtorch of the right version.
pub(crate) fn usable(dir: &Path) -> bool {
    let library = if cfg!(target_os = "macos") {
        "libtorch_cpu.dylib"
    } else {
        "libtorch_cpu.so"
    };
    version(dir).as_deref() == Some(VERSION)
        && dir.join("lib").join(library).is_file()
        && dir.join("include/ATen/ATen.h").is_file()
}

/// The folder of Python's torch, if it is installed.
pub(crate) fn python_torch() -> Option<PathBuf> {
    let script = "import importlib.util as u; s = u.find_spec('torch'); print(s.submodule_search_locations[0] if s else '')";
    let text = Run::new("python3").args(["-c", script]).output()?;
    let dir = PathBuf::from(text.trim());
    (!text.trim().is_empty() && dir.is_dir()).then_some(dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_from_either_file() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(version(dir.path()), None);
        std::fs::write(
            dir.path().join("version.py"),
            "__version__ = '2.11.0+cu130'\n",
        )
        .unwrap();
        assert_eq!(version(dir.path()).as_deref(), Some("2.11.0"));
        std::fs::write(dir.path().join("build-version"), "2.12.0\n").unwrap();
        assert_eq!(version(dir.path()).as_deref(), Some("2.12.0"));
        assert!(!usable(dir.path()));
    }
}
