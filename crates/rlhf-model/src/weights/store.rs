//! The weights of a folder, in one file or in shards.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path, PathBuf};

use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use super::safetensors::{Entry, TensorInfo, WeightFile, write_safetensors};
use super::staging::{Staging, sync_write};
use crate::error::{Error, Result, TensorProblem};

pub(super) const SINGLE: &str = "model.safetensors";
pub(super) const INDEX: &str = "model.safetensors.index.json";
/// Beyond this many, missing tensors are counted instead of named.
const MAX_NAMED: usize = 4096;

/// The mapped weights of a Hugging Face folder.
#[derive(Debug)]
pub struct WeightStore {
    dir: PathBuf,
    files: Vec<WeightFile>,
    /// Tensor name to index into `files`.
    place: BTreeMap<String, usize>,
}

impl WeightStore {
    /// Opens `model.safetensors`, or the shards that `model.safetensors.index.json` names.
    ///
    /// # Errors
    /// [`Error::Io`] naming the file that is absent; [`Error::Format`] when a file is damaged, a
    /// shard's name is not a plain file name, or index and shards disagree.
    pub fn open(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        if dir.join(SINGLE).exists() || !index.exists() {
            let file = WeightFile::open(&dir.join(SINGLE))?;
            let place = file.tensors().keys().map(|n| (n.clone(), 0)).collect();
            return Ok(Self {
                dir: dir.to_owned(),
                files: vec![file],
                place,
            });
        }
        let named = read_index(&index)?;
        let shards: BTreeSet<&str> = named.values().map(String::as_str).collect();
        let mut files = Vec::new();
        let mut place = BTreeMap::new();
        for (i, shard) in shards.iter().enumerate() {
            let file = WeightFile::open(&dir.join(shard))?;
            for name in file.tensors().keys() {
                if place.insert(name.clone(), i).is_some() {
                    return Err(Error::format(
                        &index,
                        format!("{name} stands in two shards"),
                    ));
                }
            }
            files.push(file);
        }
        for (name, shard) in &named {
            let found = place.get(name).map(|&i| files[i].path());
            if found.and_then(Path::file_name) != Some(shard.as_ref()) {
                return Err(Error::format(&index, format!("{name} is not in {shard}")));
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            files,
            place,
        })
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.place.keys().map(String::as_str)
    }

    /// What the header says about a tensor.
    #[must_use]
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        let i = *self.place.get(name)?;
        self.files[i].tensors().get(name)
    }

    /// Copies a tensor to `device`, converted to `kind`.
    ///
    /// # Errors
    /// As [`WeightFile::read`].
    pub fn read(&self, name: &str, device: Device, kind: Kind) -> Result<Tensor> {
        match self.place.get(name) {
            Some(&i) => self.files[i].read(name, device, kind),
            None => Err(Error::format(&self.dir, format!("no tensor {name}"))),
        }
    }

    /// The file to name in messages: the only one, or the folder.
    fn shown(&self) -> String {
        match self.files.as_slice() {
            [one] => one.path().display().to_string(),
            _ => self.dir.display().to_string(),
        }
    }
}

pub(super) fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let text = std::fs::read_to_string(index).map_err(Error::io(index))?;
    let value: Value =
        serde_json::from_str(&text).map_err(|e| Error::format(index, format!("not JSON: {e}")))?;
    let Some(map) = value.get("weight_map").and_then(Value::as_object) else {
        return Err(Error::format(index, "no object \"weight_map\""));
    };
    let mut named = BTreeMap::new();
    for (name, shard) in map {
        let Some(shard) = shard.as_str() else {
            return Err(Error::format(
                index,
                format!("{name}: its shard is not text"),
            ));
        };
        let mut parts = Path::new(shard).components();
        let plain = matches!(
            (parts.next(), parts.next()),
            (Some(Component::Normal(_)), None)
        );
        if !plain || shard.contains(['/', '\\', '\0']) {
            return Err(Error::format(
                index,
                format!("{name}: shard {shard:?} is not a plain file name"),
            ));
        }
        named.insert(name.clone(), shard.to_owned());
    }
    if named.is_empty() {
        return Err(Error::format(index, "\"weight_map\" is empty"));
    }
    Ok(named)
}

/// Compares what a model asks for with a store, collecting every disagreement.
pub(crate) struct Load<'a> {
    store: &'a WeightStore,
    taken: BTreeSet<String>,
    problems: Vec<TensorProblem>,
    uncounted: u64,
}

impl<'a> Load<'a> {
    pub(crate) fn new(store: &'a WeightStore) -> Self {
        Self {
            store,
            taken: BTreeSet::new(),
            problems: Vec::new(),
            uncounted: 0,
        }
    }

    /// Checks that the tensor is there with the shape wanted; reads nothing yet.
    pub(crate) fn expect(&mut self, name: &str, shape: &[i64]) {
        let Some(info) = self.store.info(name) else {
            if self.problems.len() < MAX_NAMED {
                self.problems
                    .push(TensorProblem::Missing { name: name.into() });
            } else {
                self.uncounted += 1;
            }
            return;
        };
        self.taken.insert(name.into());
        if !matches!(info.dtype.as_str(), "F64" | "F32" | "F16" | "BF16") {
            self.problems.push(TensorProblem::Dtype {
                name: name.into(),
                found: info.dtype.clone(),
            });
        } else if !info
            .shape
            .iter()
            .map(|&d| d as i64)
            .eq(shape.iter().copied())
        {
            self.problems.push(TensorProblem::Shape {
                name: name.into(),
                expected: shape.to_vec(),
                found: info.shape.clone(),
            });
        }
    }

    /// Fails with every disagreement; else the names of tensors that nobody asked for.
    pub(crate) fn finish(mut self) -> Result<Vec<String>> {
        let unexpected = |name: &&str| !self.taken.contains(*name);
        let names = self.store.names().filter(unexpected).map(str::to_owned);
        let unexpected: Vec<String> = names.collect();
        if self.problems.is_empty() {
            return Ok(unexpected);
        }
        let as_problem = |name| TensorProblem::Unexpected { name };
        self.problems.extend(unexpected.into_iter().map(as_problem));
        if self.uncounted > 0 {
            self.problems.push(TensorProblem::More {
                missing: self.uncounted,
            });
        }
        Err(Error::Tensors {
            file: self.store.shown(),
            problems: self.problems,
        })
    }
}

/// Writes tensors into a folder under construction: one file, or shards of at most
/// `max_shard_bytes` with their index.
pub(crate) fn save_tensors(
    staging: &Staging,
    tensors: &[(String, Tensor)],
    kind: Kind,
    max_shard_bytes: u64,
) -> Result<()> {
    let mut shards: Vec<Vec<Entry<'_>>> = vec![Vec::new()];
    let (mut filled, mut total) = (0_u64, 0_u64);
    for (name, tensor) in tensors {
        let entry = Entry::of_tensor(name, tensor, kind)?;
        if filled > 0 && filled + entry.num_bytes > max_shard_bytes {
            shards.push(Vec::new());
            filled = 0;
        }
        filled += entry.num_bytes;
        total += entry.num_bytes;
        if let Some(last) = shards.last_mut() {
            last.push(entry);
        }
    }
    if let [single] = shards.as_slice() {
        return write_safetensors(&staging.path(SINGLE), single);
    }
    let mut weight_map = Map::new();
    for (i, shard) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", i + 1, shards.len());
        write_safetensors(&staging.path(&file), shard)?;
        for entry in shard {
            weight_map.insert(entry.name.into(), json!(file));
        }
    }
    let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    sync_write(&staging.path(INDEX), format!("{index:#}\n").as_bytes())
}
