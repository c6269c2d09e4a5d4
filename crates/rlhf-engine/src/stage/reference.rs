//! The reference's sums of log-probabilities, kept in the run's folder: `reference/KEY.parquet`.
//!
//! Invariant: the key is a digest of all that the sums depend on (the model's files, the type of its
//! weights, the pairs' tokens, how they were batched). So a file is right whoever wrote it: a resumed stage
//! and other stages with the same model and pairs read it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use arrow_array::{ArrayRef, Float64Array, RecordBatch, UInt64Array};
use arrow_schema::{DataType, Field, Schema};
use rlhf_data::group::PromptGroup;
use rlhf_data::source::{self, ParquetOut};
use sha2::{Digest as _, Sha256};

use crate::memory::Memory;

/// What the sums depend on.
pub(super) struct Asked<'a> {
    /// The reference's folder.
    pub(super) model: &'a Path,
    /// How its weights are kept.
    pub(super) memory: &'a Memory,
    /// The groups whose completions are summed.
    pub(super) groups: &'a [PromptGroup],
    /// Packed tokens a batch.
    pub(super) micro_tokens: usize,
    /// Which of the groups are met, where not all are.
    pub(super) met: Option<(u64, u64)>,
}

/// Hashes of the files of a model folder on which its answers depend.
fn file_hashes(model: &Path) -> anyhow::Result<Vec<String>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(model)
        .and_then(|all| all.map(|e| e.map(|e| e.path())).collect())
        .with_context(|| format!("reading {}", model.display()))?;
    files.sort();
    let weighs = |f: &&PathBuf| {
        f.extension().is_some_and(|e| e == "safetensors") || f.ends_with("config.json")
    };
    let weighty = files.iter().filter(weighs);
    weighty.map(|f| Ok(rlhf_train::hash_file(f)?)).collect()
}

/// A digest of a model folder.
pub(super) fn model_digest(model: &Path) -> anyhow::Result<String> {
    let mut digest = Sha256::new();
    for hash in file_hashes(model)? {
        digest.update(hash);
    }
    Ok(format!("{:x}", digest.finalize()))
}

impl Asked<'_> {
    fn key(&self) -> anyhow::Result<String> {
        let mut digest = Sha256::new();
        // Of a sum for each completion; the first form had a row for each pair.
        digest.update("completions");
        for hash in file_hashes(self.model)? {
            digest.update(hash);
        }
        let m = self.memory;
        let settings = (m.weights, m.int8_base, self.micro_tokens, self.met);
        digest.update(format!("{settings:?}"));
        for group in self.groups {
            digest.update((group.prompt.len() as u64).to_le_bytes());
            group
                .prompt
                .iter()
                .for_each(|id| digest.update(id.to_le_bytes()));
            for c in &group.completions {
                digest.update((c.ids.len() as u64).to_le_bytes());
                c.ids.iter().for_each(|id| digest.update(id.to_le_bytes()));
                digest.update(format!("{:?}", c.trained));
            }
        }
        Ok(format!("{:x}", digest.finalize()))
    }
}

/// The sums of all completions, group after group: those kept under `run`, else what `compute` gives, which is
/// kept then. Completions that are never met have NaN.
pub(super) fn sums(
    run: &Path,
    asked: &Asked<'_>,
    compute: impl FnOnce() -> anyhow::Result<Vec<f64>>,
) -> anyhow::Result<Vec<f64>> {
    let folder = run.join("reference");
    let path = folder.join(format!("{}.parquet", asked.key()?));
    if path.is_file() {
        return read(
            &path,
            asked.groups.iter().map(|g| g.completions.len()).sum(),
        );
    }
    let sums = compute()?;
    std::fs::create_dir_all(&folder)
        .with_context(|| format!("cannot make {}", folder.display()))?;
    write(&path, &sums)?;
    Ok(sums)
}

fn write(path: &Path, sums: &[f64]) -> anyhow::Result<()> {
    let met: Vec<(u64, f64)> = (0u64..)
        .zip(sums.iter().copied())
        .filter(|(_, sum)| !sum.is_nan())
        .collect();
    let column = |name: &str, kind: DataType| Field::new(name, kind, false);
    let schema = Arc::new(Schema::new(vec![
        column("completion", DataType::UInt64),
        column("logprobs", DataType::Float64),
    ]));
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt64Array::from_iter_values(met.iter().map(|m| m.0))),
        Arc::new(Float64Array::from_iter_values(met.iter().map(|m| m.1))),
    ];
    let mut file = ParquetOut::create(path, schema.clone())?;
    file.write(&RecordBatch::try_new(schema, columns)?)?;
    file.finish()?;
    Ok(())
}

fn read(path: &Path, completions: usize) -> anyhow::Result<Vec<f64>> {
    let mut sums = vec![f64::NAN; completions];
    for row in source::rows(path)? {
        let row = row?;
        let value = |name: &str| row.columns.get(name);
        let sum = value("logprobs").and_then(serde_json::Value::as_f64);
        let at = value("completion").and_then(serde_json::Value::as_u64);
        let slot = at.and_then(|i| sums.get_mut(usize::try_from(i).ok()?));
        let (Some(slot), Some(sum)) = (slot, sum) else {
            anyhow::bail!(
                "{}: {} is no row of sums; delete the file, it will be computed again",
                path.display(),
                row.place
            );
        };
        *slot = sum;
    }
    Ok(sums)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]
    use rlhf_data::group::{Completion, Finish};

    use super::*;
    use crate::memory::WeightsKind;

    #[test]
    fn computed_once_for_all_that_they_depend_on() {
        let dir = tempfile::tempdir().unwrap();
        let model = dir.path().join("model");
        std::fs::create_dir(&model).unwrap();
        std::fs::write(model.join("model.safetensors"), "weights").unwrap();
        std::fs::write(model.join("config.json"), "{}").unwrap();
        let pair = |id: u32| PromptGroup {
            row: 0,
            prompt: vec![1, id],
            completions: [3, 4]
                .map(|id| Completion::whole(vec![id], Finish::Stop))
                .into(),
        };
        let pairs = [pair(1), pair(2), pair(3)];
        let memory = Memory::default();
        let asked = || Asked {
            model: &model,
            memory: &memory,
            groups: &pairs,
            micro_tokens: 64,
            met: None,
        };
        let given = vec![-1.0 / 3.0, -1e-300, f64::NAN, f64::NAN, -7.25, 0.0];
        let made = std::cell::Cell::new(0);
        let ask = |asked: &Asked<'_>| {
            let seen = sums(dir.path(), asked, || {
                made.set(made.get() + 1);
                Ok(given.clone())
            })
            .unwrap();
            // NaN is not itself: compare the bits.
            let bits = |s: &[f64]| -> Vec<u64> { s.iter().map(|x| x.to_bits()).collect() };
            assert_eq!(bits(&seen), bits(&given));
            made.get()
        };
        assert_eq!((ask(&asked()), ask(&asked())), (1, 1));
        let narrow = Memory {
            weights: WeightsKind::Bf16,
            ..Memory::default()
        };
        let other = [pair(1), pair(2), pair(4)];
        let different = [
            Asked {
                memory: &narrow,
                ..asked()
            },
            Asked {
                micro_tokens: 65,
                ..asked()
            },
            Asked {
                met: Some((3, 4)),
                ..asked()
            },
            Asked {
                groups: &other,
                ..asked()
            },
        ];
        for (n, asked) in different.iter().enumerate() {
            assert_eq!(ask(asked), n + 2);
        }
        std::fs::write(model.join("model.safetensors"), "others").unwrap();
        assert_eq!((ask(&asked()), ask(&asked())), (6, 6));
        // A file that is not of sums says so.
        let key = asked().key().unwrap();
        let path = dir.path().join(format!("reference/{key}.parquet"));
        write(&path, &[0.0; 9]).unwrap();
        let e = sums(dir.path(), &asked(), || unreachable!()).unwrap_err();
        assert!(e.to_string().contains("delete the file"), "{e}");
    }
}
