//! A stage's `metrics.jsonl` as curves.

use std::io::BufRead as _;
use std::path::Path;

use anyhow::Context as _;
use serde_json::{Map, Value};

/// A stage's metrics: for each key (without the stage's name) its points (step, value), in the order
/// of the file. What was logged as null (not finite) is NaN.
#[derive(Clone, Debug, Default)]
pub(crate) struct Metrics {
    keys: Vec<(String, Vec<(f64, f64)>)>,
    /// Lines that could not be read: a torn one, say.
    pub(crate) unreadable: usize,
}

impl Metrics {
    /// Reads a file; one that is not there has no metrics.
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let mut metrics = Self::default();
        if !path.is_file() {
            return Ok(metrics);
        }
        let place = || format!("reading {}", path.display());
        let file = std::fs::File::open(path).with_context(place)?;
        for line in std::io::BufReader::new(file).split(b'\n') {
            let line = line.with_context(place)?;
            if line.trim_ascii().is_empty() {
                continue;
            }
            let row: Option<Map<String, Value>> = serde_json::from_slice(&line).ok();
            let step = row
                .as_ref()
                .and_then(|r| r.get("step"))
                .and_then(Value::as_f64);
            match (row, step) {
                (Some(row), Some(step)) => metrics.add(step, &row),
                _ => metrics.unreadable += 1,
            }
        }
        Ok(metrics)
    }

    fn add(&mut self, step: f64, row: &Map<String, Value>) {
        for (key, value) in row {
            let Some((_, name)) = key.split_once('/') else {
                continue;
            };
            let value = match value {
                Value::Null => f64::NAN,
                other => match other.as_f64() {
                    Some(v) => v,
                    None => continue,
                },
            };
            match self.keys.iter_mut().find(|k| k.0 == name) {
                Some(k) => k.1.push((step, value)),
                None => self.keys.push((name.to_owned(), vec![(step, value)])),
            }
        }
    }

    /// The points of a key, if it was logged.
    pub(crate) fn get(&self, key: &str) -> Option<&[(f64, f64)]> {
        self.keys
            .iter()
            .find(|k| k.0 == key)
            .map(|k| k.1.as_slice())
    }

    /// All keys that were logged.
    pub(crate) fn keys(&self) -> impl Iterator<Item = &str> {
        self.keys.iter().map(|k| k.0.as_str())
    }

    /// Whether nothing was logged.
    pub(crate) fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Two keys' values at the steps that have both.
    pub(crate) fn pairs(&self, x: &str, y: &str) -> Vec<(f64, f64)> {
        let (Some(xs), Some(ys)) = (self.get(x), self.get(y)) else {
            return Vec::new();
        };
        let mut at = 0;
        let mut out = Vec::new();
        for (step, value) in ys {
            while at < xs.len() && xs[at].0 < *step {
                at += 1;
            }
            if at < xs.len() && xs[at].0 == *step && xs[at].1.is_finite() && value.is_finite() {
                out.push((xs[at].1, *value));
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn torn_lines_and_nulls_are_kept_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(
            &path,
            "{\"step\":0,\"a/kl\":1,\"a/reward\":10}\n{\"step\":1,\"a/kl\":null,\"a/reward\":20,\"a/word\":\"x\"}\n\n{\"step\":2,\"a/kl\":3}\n{\"step\":3,\"a/kl\":4,\"a/reward\":40}\n{\"step\":4,\"a/",
        )
        .unwrap();
        let m = Metrics::read(&path).unwrap();
        assert_eq!(m.unreadable, 1);
        assert_eq!(m.keys().collect::<Vec<_>>(), ["kl", "reward"]);
        assert!(m.get("kl").unwrap()[1].1.is_nan() && m.get("word").is_none());
        assert_eq!(m.pairs("kl", "reward"), [(1.0, 10.0), (4.0, 40.0)]);
        assert!(Metrics::read(&dir.path().join("none")).unwrap().is_empty());
    }
}
