//! What the fuzz targets share: a scratch folder, and reading all that a folder of weights holds.

use std::path::{Path, PathBuf};

use rlhf_model::weights::WeightStore;
use tch::{Device, Kind};

/// A folder of this process among the temporary ones, which ought to lie in memory.
///
/// # Panics
/// When it cannot be made.
#[must_use]
pub fn scratch() -> PathBuf {
    let dir = std::env::temp_dir().join(format!("rlhf-fuzz-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("a temporary folder");
    dir
}

/// Opens the folder and reads every tensor; an error names a file of the folder.
///
/// # Panics
/// When an error names none, or a tensor has another shape than its header says.
pub fn read_all(dir: &Path) {
    let store = match WeightStore::open(dir) {
        Ok(store) => store,
        Err(e) => return named(&e, dir),
    };
    for name in store.names() {
        let shape = &store.info(name).expect("a named tensor").shape;
        match store.read(name, Device::Cpu, Kind::Float) {
            Ok(t) => assert!(t.size().iter().map(|&d| d as usize).eq(shape.iter().copied())),
            Err(e) => named(&e, dir),
        }
    }
}

/// An error says which file.
///
/// # Panics
/// When it does not.
pub fn named(e: &rlhf_model::Error, dir: &Path) {
    let text = e.to_string();
    assert!(text.contains(&*dir.to_string_lossy()), "{text}");
}
