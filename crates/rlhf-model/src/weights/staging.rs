//! A folder that appears complete or not at all.
//!
//! Files are written into a hidden sibling of the target and moved into place at the end; whatever
//! fails before that leaves the target as it was and removes the sibling.

use std::io::Write;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A folder under construction.
pub(crate) struct Staging {
    target: PathBuf,
    work: PathBuf,
    done: bool,
}

impl Staging {
    /// Starts one for `target`, whose missing parents are made.
    pub(crate) fn new(target: &Path) -> Result<Self> {
        let absolute = std::path::absolute(target).map_err(Error::io(target))?;
        let (Some(parent), Some(name)) = (absolute.parent(), absolute.file_name()) else {
            return Err(Error::Argument(format!(
                "{}: not a folder's name",
                target.display()
            )));
        };
        std::fs::create_dir_all(parent).map_err(Error::io(parent))?;
        let work = parent.join(format!(
            ".{}.{}.tmp",
            name.to_string_lossy(),
            std::process::id()
        ));
        if work.exists() {
            // Left by a process of the same number that was killed.
            std::fs::remove_dir_all(&work).map_err(Error::io(&work))?;
        }
        std::fs::create_dir(&work).map_err(Error::io(&work))?;
        Ok(Self {
            target: absolute,
            work,
            done: false,
        })
    }

    /// Where to write a file of the folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.work.join(name)
    }

    /// Puts the folder in place. An existing target keeps its other files, except weights that the
    /// new ones replace.
    pub(crate) fn commit(mut self) -> Result<()> {
        if !self.target.exists() {
            std::fs::rename(&self.work, &self.target).map_err(Error::io(&self.target))?;
            self.done = true;
            return sync_dir(self.target.parent().unwrap_or(&self.target));
        }
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.work).map_err(Error::io(&self.work))? {
            names.push(entry.map_err(Error::io(&self.work))?.file_name());
        }
        for name in &names {
            let to = self.target.join(name);
            std::fs::rename(self.work.join(name), &to).map_err(Error::io(&to))?;
        }
        if !names.iter().any(|n| is_weights(&n.to_string_lossy())) {
            return sync_dir(&self.target);
        }
        for entry in std::fs::read_dir(&self.target).map_err(Error::io(&self.target))? {
            let name = entry.map_err(Error::io(&self.target))?.file_name();
            if is_weights(&name.to_string_lossy()) && !names.contains(&name) {
                let stale = self.target.join(&name);
                std::fs::remove_file(&stale).map_err(Error::io(&stale))?;
            }
        }
        sync_dir(&self.target)
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if !self.done {
            // Best effort: an error is already on its way, or only an empty folder is left.
            let _ = std::fs::remove_dir_all(&self.work);
        }
    }
}

fn is_weights(name: &str) -> bool {
    name == "model.safetensors.index.json"
        || name == "model.safetensors"
        || (name.starts_with("model-") && name.ends_with(".safetensors"))
}

/// Writes a small file and syncs it.
pub(crate) fn sync_write(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut file = std::fs::File::create(path).map_err(Error::io(path))?;
    file.write_all(bytes).map_err(Error::io(path))?;
    file.sync_all().map_err(Error::io(path))
}

fn sync_dir(dir: &Path) -> Result<()> {
    // Only Unix can sync a folder; elsewhere the rename is as durable as the system makes it.
    if cfg!(unix) {
        let handle = std::fs::File::open(dir).map_err(Error::io(dir))?;
        handle.sync_all().map_err(Error::io(dir))?;
    }
    Ok(())
}
