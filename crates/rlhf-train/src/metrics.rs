//! Metrics: one JSON object a step, and TensorBoard events beside it.
//!
//! Invariant: after a resume the file continues exactly where the checkpoint stands; lines of steps
//! that were lost are cut off. A number that is not finite is written as null.

use std::fs::{File, OpenOptions};
use std::io::{BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::error::{Error, Result};
use crate::tensorboard::EventWriter;

/// Writes the metrics of a stage.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    file: File,
    events: EventWriter,
    stage: String,
}

impl MetricsLog {
    /// Opens `metrics.jsonl` in `dir`, keeping the lines of steps below `next_step`.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn open(dir: &Path, stage: &str, next_step: u64) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(Error::write(dir))?;
        let path = dir.join("metrics.jsonl");
        let keep = kept_bytes(&path, next_step)?;
        let mut file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .map_err(Error::write(&path))?;
        file.set_len(keep).map_err(Error::write(&path))?;
        file.seek(SeekFrom::End(0)).map_err(Error::write(&path))?;
        let events = EventWriter::create(&dir.join("tensorboard"), next_step)?;
        Ok(Self {
            path,
            file,
            events,
            stage: stage.to_owned(),
        })
    }

    /// Writes a step: `{"stage", "step", "tokens", "seconds", "STAGE/NAME": …}`.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn write(
        &mut self,
        step: u64,
        tokens: u64,
        seconds: f64,
        values: &[(&str, f64)],
    ) -> Result<()> {
        let mut line = Map::new();
        line.insert("stage".into(), self.stage.clone().into());
        line.insert("step".into(), step.into());
        line.insert("tokens".into(), tokens.into());
        line.insert("seconds".into(), ((seconds * 1e6).round() / 1e6).into());
        for (name, value) in values {
            let key = format!("{}/{name}", self.stage);
            self.events.scalar(step, &key, *value)?;
            line.insert(
                key,
                serde_json::Number::from_f64(*value).map_or(Value::Null, Value::Number),
            );
        }
        let mut text = Value::Object(line).to_string();
        text.push('\n');
        self.file
            .write_all(text.as_bytes())
            .map_err(Error::write(&self.path))?;
        self.events.flush()
    }

    /// Syncs the file: what was logged before a checkpoint is as durable as the checkpoint.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(Error::write(&self.path))
    }
}

/// The length of the lines whose step lies below `next_step`; a torn last line is not counted.
fn kept_bytes(path: &Path, next_step: u64) -> Result<u64> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(0),
        Err(e) => return Err(Error::read(path)(e)),
    };
    // A device has no length, and some never end.
    let length = file.metadata().map_err(Error::read(path))?.len();
    let mut reader = BufReader::new(file).take(length);
    let (mut kept, mut line) = (0, Vec::new());
    loop {
        line.clear();
        let length = reader
            .read_until(b'\n', &mut line)
            .map_err(Error::read(path))?;
        let step = serde_json::from_slice::<Value>(&line)
            .ok()
            .and_then(|v| v.get("step").and_then(Value::as_u64));
        match step {
            Some(s) if s < next_step && line.ends_with(b"\n") => kept += length as u64,
            _ => return Ok(kept),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_resumed_log_drops_what_was_lost() {
        let dir = tempfile::tempdir().unwrap();
        let mut log = MetricsLog::open(dir.path(), "sft", 0).unwrap();
        for step in 0..4 {
            log.write(
                step,
                10,
                0.5,
                &[("loss", 1.0 / (step + 1) as f64), ("bad", f64::NAN)],
            )
            .unwrap();
        }
        drop(log);
        let path = dir.path().join("metrics.jsonl");
        let mut torn = std::fs::read_to_string(&path).unwrap();
        torn.push_str("{\"stage\":");
        std::fs::write(&path, torn).unwrap();
        let mut log = MetricsLog::open(dir.path(), "sft", 2).unwrap();
        log.write(2, 10, 0.5, &[("loss", 9.0)]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 3);
        assert_eq!(
            lines[1],
            r#"{"stage":"sft","step":1,"tokens":10,"seconds":0.5,"sft/loss":0.5,"sft/bad":null}"#
        );
        assert!(lines[2].contains("9.0"));
    }

    #[test]
    fn a_line_without_its_end_is_torn() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        std::fs::write(&path, "{\"step\":0}\n{\"step\":1}").unwrap();
        assert_eq!(kept_bytes(&path, 5).unwrap(), 11);
        drop(MetricsLog::open(dir.path(), "sft", 5).unwrap());
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{\"step\":0}\n");
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_device_is_not_read_without_end() {
        assert_eq!(kept_bytes(Path::new("/dev/zero"), 5).unwrap(), 0);
        assert_eq!(kept_bytes(Path::new("/dev/full"), 5).unwrap(), 0);
    }

    #[test]
    fn a_log_that_cannot_be_read_is_not_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("metrics.jsonl")).unwrap();
        let e = MetricsLog::open(dir.path(), "sft", 5)
            .unwrap_err()
            .to_string();
        assert!(e.contains("metrics.jsonl"), "{e}");
    }
}
