//! Checkpoints: folders that appear whole or not at all.
//!
//! Invariant: a checkpoint is written under a temporary name with a manifest of its files' sizes and
//! hashes, synced, then renamed. The latest is found by reading manifests, never by a link; one that
//! does not match its manifest is passed over.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{hash_file, sync_dir, write_synced};

const MANIFEST: &str = "manifest.json";
const FORMAT: u32 = 1;

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// Steps finished.
    pub step: u64,
    /// Size and SHA-256 of each file.
    pub files: BTreeMap<String, (u64, String)>,
}

/// The checkpoints of a stage.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
    keep: usize,
}

impl CheckpointStore {
    /// Checkpoints in `dir`, of which the last `keep` stay.
    #[must_use]
    pub fn new(dir: PathBuf, keep: usize) -> Self {
        Self {
            dir,
            keep: keep.max(1),
        }
    }

    /// Saves a checkpoint after `step` finished steps: `write` fills the folder that it is given.
    ///
    /// # Errors
    /// When the disk is full, say; nothing of the failed checkpoint stays, earlier ones do.
    pub fn save(&self, step: u64, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        std::fs::create_dir_all(&self.dir).map_err(Error::write(&self.dir))?;
        let temporary = tempfile::Builder::new()
            .prefix(".new-")
            .tempdir_in(&self.dir)
            .map_err(Error::write(&self.dir))?;
        write(temporary.path())?;
        let mut files = BTreeMap::new();
        for path in list(temporary.path())? {
            let size = path.metadata().map_err(Error::read(&path))?.len();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            files.insert(name, (size, hash_file(&path)?));
        }
        let manifest = Manifest {
            format: FORMAT,
            step,
            files,
        };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| Error::write(temporary.path())(e.into()))?;
        write_synced(&temporary.path().join(MANIFEST), &text)?;
        sync_dir(temporary.path())?;
        let target = self.dir.join(format!("step-{step:08}"));
        if target.exists() {
            std::fs::remove_dir_all(&target).map_err(Error::write(&target))?;
        }
        std::fs::rename(temporary.path(), &target).map_err(Error::write(&target))?;
        // The folder has another name now: there is nothing left for the guard to remove.
        let _renamed = temporary.keep();
        sync_dir(&self.dir)?;
        self.prune()?;
        Ok(target)
    }

    /// The newest checkpoint that matches its manifest.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn latest(&self) -> Result<Option<(PathBuf, Manifest)>> {
        let mut all = self.folders()?;
        all.sort();
        Ok(all
            .into_iter()
            .rev()
            .find_map(|dir| verify(&dir).ok().map(|m| (dir, m))))
    }

    fn folders(&self) -> Result<Vec<PathBuf>> {
        if !self.dir.exists() {
            return Ok(Vec::new());
        }
        let name = |p: &PathBuf| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with("step-"))
        };
        Ok(list(&self.dir)?.into_iter().filter(name).collect())
    }

    /// Removes all but the last `keep`, and what a killed process left half written.
    fn prune(&self) -> Result<()> {
        let mut all = self.folders()?;
        all.sort();
        let old = all.len().saturating_sub(self.keep);
        let leftovers = list(&self.dir)?.into_iter().filter(|p| {
            p.file_name()
                .is_some_and(|n| n.to_string_lossy().starts_with(".new-"))
        });
        for dir in all.into_iter().take(old).chain(leftovers) {
            std::fs::remove_dir_all(&dir).map_err(Error::write(&dir))?;
        }
        Ok(())
    }
}

fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    std::fs::read_dir(dir)
        .and_then(|entries| entries.map(|e| e.map(|e| e.path())).collect())
        .map_err(Error::read(dir))
}

/// Reads a checkpoint's manifest and compares every file with it.
fn verify(dir: &Path) -> Result<Manifest> {
    let bad = |what: String| Error::Checkpoint {
        path: dir.to_owned(),
        what,
    };
    let path = dir.join(MANIFEST);
    let text = std::fs::read_to_string(&path).map_err(Error::read(&path))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|e| bad(e.to_string()))?;
    if manifest.format != FORMAT {
        return Err(bad(format!(
            "format {}, expected {FORMAT}",
            manifest.format
        )));
    }
    for (name, (size, hash)) in &manifest.files {
        let file = dir.join(name);
        let real = file.metadata().map_err(Error::read(&file))?.len();
        if real != *size || hash_file(&file)? != *hash {
            return Err(bad(format!("{name} does not match the manifest")));
        }
    }
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |dir| write_synced(&dir.join("a.txt"), text.as_bytes())
    }

    #[test]
    fn the_latest_whole_one_is_found_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().join("c"), 2);
        assert!(store.latest().unwrap().is_none());
        for (step, text) in [(1, "one"), (2, "two"), (3, "three")] {
            store.save(step, write(text)).unwrap();
        }
        assert_eq!(store.folders().unwrap().len(), 2);
        let (newest, manifest) = store.latest().unwrap().unwrap();
        assert_eq!(manifest.step, 3);
        // A torn file is noticed by its hash; the one before is taken.
        std::fs::write(newest.join("a.txt"), "thref").unwrap();
        assert_eq!(store.latest().unwrap().unwrap().1.step, 2);
    }

    #[test]
    fn a_failed_save_leaves_the_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().to_owned(), 2);
        store.save(1, write("one")).unwrap();
        let full = |d: &Path| -> Result<()> {
            write_synced(&d.join("a.txt"), b"half")?;
            Err(Error::write(d)(std::io::Error::from(
                std::io::ErrorKind::StorageFull,
            )))
        };
        let e = store.save(2, full).unwrap_err().to_string();
        assert!(e.contains("free space"), "{e}");
        assert_eq!(store.latest().unwrap().unwrap().1.step, 1);
        assert_eq!(
            list(dir.path()).unwrap().len(),
            1,
            "nothing half written stays"
        );
    }
}
