//! Checkpoints: folders that appear whole or not at all.
//!
//! Invariant: a checkpoint is written under a temporary name with a manifest of its files' sizes and
//! hashes, synced, then renamed. The latest is found by reading manifests, never by a link; one that
//! does not match its manifest is passed over, and said. At no instant is there no whole checkpoint
//! where there was one before.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::files::{hash_file, sync_dir, sync_file, write_synced};

const MANIFEST: &str = "manifest.json";
const FORMAT: u32 = 1;
/// Checkpoints.
const STEP: &str = "step-";
/// Ends the name of one that is about to be replaced by another of the same step. It counts until then.
const REPLACED: &str = ".replaced";
/// Not finished yet.
const NEW: &str = ".new-";
/// On its way out.
const OLD: &str = ".old-";

/// What a checkpoint holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this layout.
    pub format: u32,
    /// Steps finished.
    pub step: u64,
    /// Size and SHA-256 of each file, by its path within the checkpoint.
    pub files: BTreeMap<String, (u64, String)>,
}

/// What [`CheckpointStore::find`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The newest checkpoint that matches its manifest.
    pub newest: Option<(PathBuf, Manifest)>,
    /// Those that were passed over on the way to it, and why.
    pub damaged: Vec<(PathBuf, Error)>,
}

/// The checkpoints of a stage.
#[derive(Clone, Debug)]
pub struct CheckpointStore {
    dir: PathBuf,
    keep: usize,
}

impl CheckpointStore {
    /// Checkpoints in `dir`, of which the last `keep` (at least 1) stay.
    #[must_use]
    pub fn new(dir: PathBuf, keep: usize) -> Self {
        Self {
            dir,
            keep: keep.max(1),
        }
    }

    /// Saves a checkpoint after `step` finished steps: `write` fills the folder that it is given, with
    /// files and folders of files. Checkpoints that are too many or damaged are removed then.
    ///
    /// # Errors
    /// When the disk is full, say; nothing of the failed checkpoint stays, earlier ones do.
    pub fn save(&self, step: u64, write: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
        self.make_dir()?;
        let temporary = temporary_in(&self.dir)?;
        write(temporary.path())?;
        let mut files = BTreeMap::new();
        record(temporary.path(), "", &mut files)?;
        let manifest = Manifest {
            format: FORMAT,
            step,
            files,
        };
        let text = serde_json::to_vec_pretty(&manifest)
            .map_err(|e| Error::write(temporary.path())(e.into()))?;
        write_synced(&temporary.path().join(MANIFEST), &text)?;
        sync_dir(temporary.path())?;

        let target = self.dir.join(format!("{STEP}{step:08}"));
        let replaced = self.dir.join(format!("{STEP}{step:08}{REPLACED}"));
        if target.exists() {
            self.discard(&replaced)?;
            rename(&target, &replaced)?;
        }
        rename(temporary.path(), &target)?;
        // The folder has another name now: there is nothing left for the guard to remove.
        let _renamed = temporary.keep();
        sync_dir(&self.dir)?;
        self.discard(&replaced)?;
        self.prune(step)?;
        Ok(target)
    }

    /// The newest checkpoint that matches its manifest.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn latest(&self) -> Result<Option<(PathBuf, Manifest)>> {
        Ok(self.find()?.newest)
    }

    /// Like [`CheckpointStore::latest`], and what was passed over.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn find(&self) -> Result<Found> {
        self.find_up_to(u64::MAX)
    }

    /// Like [`CheckpointStore::find`], among those of at most `step` finished steps.
    ///
    /// # Errors
    /// When the folder cannot be listed.
    pub fn find_up_to(&self, step: u64) -> Result<Found> {
        let mut found = Found::default();
        let mut candidates = Vec::new();
        for path in self.named(STEP)? {
            match read_manifest(&path) {
                Ok(manifest) if manifest.step > step => {}
                Ok(manifest) => candidates.push((path, manifest)),
                Err(e) => found.damaged.push((path, e)),
            }
        }
        // By step; of one step, that which was to be replaced comes last.
        candidates.sort_by_key(|(path, m)| (m.step, !is_replaced(path)));
        while let Some((path, manifest)) = candidates.pop() {
            match verify(&path, &manifest) {
                Ok(()) => {
                    found.newest = Some((path, manifest));
                    break;
                }
                Err(e) => found.damaged.push((path, e)),
            }
        }
        Ok(found)
    }

    fn make_dir(&self) -> Result<()> {
        if self.dir.is_dir() {
            return Ok(());
        }
        std::fs::create_dir_all(&self.dir).map_err(Error::write(&self.dir))?;
        match self.dir.parent().filter(|p| p.is_dir()) {
            Some(parent) => sync_dir(parent),
            None => Ok(()),
        }
    }

    /// What lies in the folder under names that begin so.
    fn named(&self, prefix: &str) -> Result<Vec<PathBuf>> {
        let begins = |p: &PathBuf| name(p).is_some_and(|n| n.starts_with(prefix));
        Ok(list(&self.dir)?.into_iter().filter(begins).collect())
    }

    /// Removes all but the last `keep`, now that `saved` is there: older ones, damaged ones, and what
    /// killed processes left behind. A whole checkpoint of a later step is none of ours and stays.
    fn prune(&self, saved: u64) -> Result<()> {
        let mut whole = Vec::new();
        for path in self.named(STEP)? {
            match read_manifest(&path) {
                Ok(m) if m.step <= saved && sizes_match(&path, &m) => whole.push((m.step, path)),
                Ok(m) if m.step > saved && verify(&path, &m).is_ok() => {}
                _ => self.discard(&path)?,
            }
        }
        whole.sort();
        let old = whole.len().saturating_sub(self.keep);
        for (_, path) in whole.into_iter().take(old) {
            self.discard(&path)?;
        }
        for path in self.named(NEW)?.into_iter().chain(self.named(OLD)?) {
            remove(&path)?;
        }
        Ok(())
    }

    /// Removes a checkpoint, if it is there, by a name that no longer counts.
    fn discard(&self, path: &Path) -> Result<()> {
        if std::fs::symlink_metadata(path).is_err() {
            return Ok(());
        }
        let out = self
            .dir
            .join(format!("{OLD}{}", name(path).unwrap_or_default()));
        remove(&out)?;
        rename(path, &out)?;
        remove(&out)
    }
}

/// A folder that goes with its guard, with the permissions that any new folder has.
fn temporary_in(dir: &Path) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(NEW);
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt as _;
        builder.permissions(std::fs::Permissions::from_mode(0o777));
    }
    builder.tempdir_in(dir).map_err(Error::write(dir))
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    std::fs::rename(from, to).map_err(Error::write(to))
}

/// Removes a file or a folder, if it is there.
fn remove(path: &Path) -> Result<()> {
    let removed = match std::fs::symlink_metadata(path) {
        Err(_) => return Ok(()),
        Ok(m) if m.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
    };
    removed.map_err(Error::write(path))
}

fn name(path: &Path) -> Option<&str> {
    path.file_name().and_then(|n| n.to_str())
}

fn is_replaced(path: &Path) -> bool {
    name(path).is_some_and(|n| n.ends_with(REPLACED))
}

/// What lies in a folder; nothing where there is none.
fn list(dir: &Path) -> Result<Vec<PathBuf>> {
    match std::fs::read_dir(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(e) => Err(Error::read(dir)(e)),
        Ok(entries) => entries
            .map(|e| e.map(|e| e.path()))
            .collect::<std::io::Result<_>>()
            .map_err(Error::read(dir)),
    }
}

/// Syncs and hashes every file below `dir`, whose own path within the checkpoint is `prefix`.
fn record(dir: &Path, prefix: &str, files: &mut BTreeMap<String, (u64, String)>) -> Result<()> {
    for path in list(dir)? {
        let bad = |what: &str| Error::Checkpoint {
            path: path.clone(),
            what: what.to_owned(),
            mend: "this is a mistake in the program that saves it",
        };
        let own = name(&path).ok_or_else(|| bad("the name is not UTF-8"))?;
        let full = format!("{prefix}{own}");
        if full == MANIFEST {
            return Err(bad("this name is the manifest's"));
        }
        let kind = std::fs::symlink_metadata(&path).map_err(Error::read(&path))?;
        if kind.is_dir() {
            record(&path, &format!("{full}/"), files)?;
            sync_dir(&path)?;
        } else if kind.is_file() {
            sync_file(&path)?;
            files.insert(full, (kind.len(), hash_file(&path)?));
        } else {
            return Err(bad("neither a file nor a folder"));
        }
    }
    Ok(())
}

fn read_manifest(dir: &Path) -> Result<Manifest> {
    let path = dir.join(MANIFEST);
    let text = std::fs::read_to_string(&path).map_err(Error::read(&path))?;
    let manifest: Manifest = serde_json::from_str(&text).map_err(|e| Error::damaged(dir, e))?;
    if manifest.format != FORMAT {
        let what = format!("format {}, expected {FORMAT}", manifest.format);
        return Err(Error::damaged(dir, what));
    }
    Ok(manifest)
}

fn sizes_match(dir: &Path, manifest: &Manifest) -> bool {
    let size = |name: &String| dir.join(name).metadata().map(|m| m.len()).ok();
    manifest
        .files
        .iter()
        .all(|(n, (len, _))| size(n) == Some(*len))
}

/// Compares every file with the manifest.
fn verify(dir: &Path, manifest: &Manifest) -> Result<()> {
    for (name, (size, hash)) in &manifest.files {
        let file = dir.join(name);
        let real = file.metadata().map_err(Error::read(&file))?.len();
        if real != *size || hash_file(&file)? != *hash {
            let what = format!("{name} does not match the manifest");
            return Err(Error::damaged(dir, what));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |dir| write_synced(&dir.join("a.txt"), text.as_bytes())
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut all: Vec<String> = list(dir)
            .unwrap()
            .iter()
            .map(|p| name(p).unwrap().into())
            .collect();
        all.sort();
        all
    }

    fn latest(store: &CheckpointStore) -> (u64, String) {
        let (dir, manifest) = store.latest().unwrap().unwrap();
        (
            manifest.step,
            std::fs::read_to_string(dir.join("a.txt")).unwrap(),
        )
    }

    #[test]
    fn the_latest_whole_one_is_found_and_old_ones_go() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().join("c"), 2);
        assert!(store.latest().unwrap().is_none());
        for (step, text) in [(1, "one"), (2, "two"), (3, "three")] {
            store.save(step, write(text)).unwrap();
        }
        assert_eq!(names(&store.dir), ["step-00000002", "step-00000003"]);
        let (newest, manifest) = store.latest().unwrap().unwrap();
        assert_eq!(manifest.step, 3);
        // A torn file is noticed by its hash; the one before is taken, and the damage said.
        std::fs::write(newest.join("a.txt"), "thref").unwrap();
        let found = store.find().unwrap();
        assert_eq!(found.newest.unwrap().1.step, 2);
        assert_eq!(found.damaged.len(), 1);
        let e = found.damaged[0].1.to_string();
        assert!(e.contains("step-00000003") && e.contains("a.txt"), "{e}");
        // So is one without a manifest, or of a format to come.
        std::fs::remove_file(newest.join(MANIFEST)).unwrap();
        assert_eq!(latest(&store), (2, "two".into()));
        std::fs::write(
            newest.join(MANIFEST),
            r#"{"format": 2, "step": 3, "files": {}}"#,
        )
        .unwrap();
        let found = store.find().unwrap();
        assert!(found.damaged[0].1.to_string().contains("format 2"));
        assert_eq!(found.newest.unwrap().1.step, 2);
    }

    #[test]
    fn what_was_just_saved_outlives_a_damaged_later_one() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().to_owned(), 1);
        store.save(20, write("twenty")).unwrap();
        for damage in ["twentz", "short"] {
            std::fs::write(dir.path().join("step-00000020/a.txt"), damage).unwrap();
            store.save(15, write("fifteen")).unwrap();
            assert_eq!(latest(&store), (15, "fifteen".into()));
            assert_eq!(names(dir.path()), ["step-00000015"]);
            store.save(20, write("twenty")).unwrap();
            assert_eq!(names(dir.path()), ["step-00000020"]);
        }
        // A whole one of a later step is not ours to remove.
        store.save(7, write("seven")).unwrap();
        assert_eq!(names(dir.path()), ["step-00000007", "step-00000020"]);
    }

    #[test]
    fn steps_are_compared_as_numbers() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().to_owned(), 1);
        for (step, text) in [(99_999_999, "before"), (100_000_000, "after")] {
            store.save(step, write(text)).unwrap();
        }
        assert_eq!(latest(&store), (100_000_000, "after".into()));
    }

    #[test]
    fn replacing_one_is_safe_at_every_instant() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().to_owned(), 1);
        let (one, put_aside) = (
            dir.path().join("step-00000001"),
            dir.path().join("step-00000001.replaced"),
        );
        store.save(1, write("old")).unwrap();
        // Killed between the two renames: the old one counts.
        std::fs::rename(&one, &put_aside).unwrap();
        assert_eq!(latest(&store), (1, "old".into()));
        // Killed after the second: the new one does.
        let other = tempfile::tempdir().unwrap();
        CheckpointStore::new(other.path().to_owned(), 1)
            .save(1, write("new"))
            .unwrap();
        std::fs::rename(other.path().join("step-00000001"), &one).unwrap();
        assert_eq!(latest(&store), (1, "new".into()));
        store.save(1, write("newer")).unwrap();
        assert_eq!(latest(&store), (1, "newer".into()));
        assert_eq!(names(dir.path()), ["step-00000001"]);
    }

    #[test]
    fn folders_are_part_of_a_checkpoint_and_links_are_not() {
        let dir = tempfile::tempdir().unwrap();
        let store = CheckpointStore::new(dir.path().to_owned(), 1);
        let nested = |d: &Path| {
            std::fs::create_dir_all(d.join("b/c")).map_err(Error::write(d))?;
            write_synced(&d.join("b/c/deep.txt"), b"deep")
        };
        let path = store.save(1, nested).unwrap();
        let (_, manifest) = store.latest().unwrap().unwrap();
        assert_eq!(manifest.files.keys().collect::<Vec<_>>(), ["b/c/deep.txt"]);
        std::fs::write(path.join("b/c/deep.txt"), "DEEP").unwrap();
        assert!(store.latest().unwrap().is_none());
        let e = store
            .save(2, |d| write_synced(&d.join(MANIFEST), b"{}"))
            .unwrap_err();
        assert!(e.to_string().contains("manifest's"), "{e}");
        #[cfg(unix)]
        {
            let link = |d: &Path| {
                std::os::unix::fs::symlink("/dev/null", d.join("l")).map_err(Error::write(d))
            };
            assert!(store.save(2, link).is_err());
            use std::os::unix::fs::PermissionsExt as _;
            std::fs::create_dir(dir.path().join("plain")).unwrap();
            let mode = |p: PathBuf| p.metadata().unwrap().permissions().mode();
            assert_eq!(mode(path), mode(dir.path().join("plain")));
        }
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
        assert_eq!(latest(&store), (1, "one".into()));
        assert_eq!(
            names(dir.path()),
            ["step-00000001"],
            "nothing half written stays"
        );
    }
}
