//! Several files as one: a folder, or a glob.

use std::path::{Path, PathBuf};

use super::{Kind, Row, Rows, one_file};
use crate::error::{Error, Result};

/// The files that a path means; `None` where it is one file.
pub(super) fn of(path: &Path) -> Result<Option<Vec<PathBuf>>> {
    let files = if path.is_dir() {
        in_folder(path)?
    } else if let Some(pattern) = pattern(path) {
        matching(path, pattern)?
    } else {
        return Ok(None);
    };
    if files.is_empty() {
        return Err(Error::file(
            path,
            "no file of a known kind there",
            format!("give a folder or a pattern with {}", super::KINDS),
        ));
    }
    Ok(Some(files))
}

/// The path as a pattern, if it names no file and has a wildcard.
fn pattern(path: &Path) -> Option<&str> {
    let text = path.to_str()?;
    (text.contains(['*', '?', '[']) && !path.exists()).then_some(text)
}

/// The files of known kinds directly in a folder, sorted; hidden ones are no data.
fn in_folder(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in std::fs::read_dir(dir).map_err(Error::io(dir))? {
        let path = entry.map_err(Error::io(dir))?.path();
        let name = super::lower_name(&path);
        if !name.starts_with('.') && Kind::of(&name).is_some() && path.is_file() {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// The files that a pattern matches, sorted: each must be of a known kind.
fn matching(path: &Path, pattern: &str) -> Result<Vec<PathBuf>> {
    // As in a shell: a `*` names no hidden file.
    let options = glob::MatchOptions {
        require_literal_leading_dot: true,
        ..glob::MatchOptions::new()
    };
    let found = glob::glob_with(pattern, options)
        .map_err(|e| Error::file(path, format!("no pattern: {e}"), "correct the pattern"))?;
    let mut files = Vec::new();
    for file in found {
        let file = file.map_err(|e| {
            let of = e.path().to_owned();
            Error::io(&of)(e.into())
        })?;
        if file.is_file() {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// The rows of files, one after the other; their places name the file, within `base` where it is there.
pub(super) fn rows(files: Vec<PathBuf>, base: &Path) -> impl Iterator<Item = Result<Row>> + use<> {
    let base = base.to_owned();
    let mut files = files.into_iter();
    let mut current: Option<(String, Rows)> = None;
    let mut done = false;
    std::iter::from_fn(move || {
        while !done {
            if let Some((name, rows)) = &mut current {
                match rows.next() {
                    Some(Ok(mut row)) => {
                        row.place = format!("{name}, {}", row.place);
                        return Some(Ok(row));
                    }
                    Some(Err(e)) => {
                        done = true;
                        return Some(Err(e));
                    }
                    None => {}
                }
            }
            let path = files.next()?;
            match one_file(&path) {
                Ok(rows) => {
                    let name = path.strip_prefix(&base).unwrap_or(&path);
                    current = Some((name.display().to_string(), rows));
                }
                Err(e) => {
                    done = true;
                    return Some(Err(e));
                }
            }
        }
        None
    })
}
