//! What every training loop needs around its steps: resume, log, checkpoint, stop.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use crate::checkpoint::CheckpointStore;
use crate::error::{Error, Result};
use crate::files::write_synced;
use crate::metrics::MetricsLog;
use crate::progress::Progress;
use crate::stepper::Stepper;
use crate::stop::{Signal, StopFlag};
use crate::tensors;

/// Settings of a [`Session`].
#[derive(Clone, Debug)]
pub struct SessionConfig {
    /// The stage's folder.
    pub dir: PathBuf,
    /// The stage's name: a prefix of its metrics.
    pub stage: String,
    /// Steps in all.
    pub total_steps: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints kept.
    pub keep: usize,
    /// Where signals arrive.
    pub stop: StopFlag,
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Go on.
    Continue,
    /// A checkpoint was saved; leave.
    Stop(Signal),
}

/// Where a run goes on.
#[derive(Clone, Debug, PartialEq)]
pub struct Restored<E> {
    /// The next step.
    pub step: u64,
    /// What the trainer saved besides.
    pub extra: E,
}

/// What a stage ends with.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Summary {
    /// Steps done.
    pub steps: u64,
    /// Tokens learned from, since the last resume included.
    pub tokens: u64,
    /// Mean of each metric over the last steps (at most 10).
    pub last: BTreeMap<String, f64>,
}

/// The files and signals around a training loop.
#[derive(Debug)]
pub struct Session {
    config: SessionConfig,
    store: CheckpointStore,
    metrics: Option<MetricsLog>,
    progress: Option<Progress>,
    began: Instant,
    seconds_before: f64,
    tokens: u64,
    steps: u64,
    recent: std::collections::VecDeque<Vec<(String, f64)>>,
}

/// Steps that a [`Summary`] averages over.
const RECENT: usize = 10;

impl Session {
    /// Opens the stage's folder.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn open(config: SessionConfig) -> Result<Self> {
        std::fs::create_dir_all(&config.dir).map_err(Error::write(&config.dir))?;
        let store = CheckpointStore::new(config.dir.join("checkpoints"), config.keep);
        Ok(Self {
            config,
            store,
            metrics: None,
            progress: None,
            began: Instant::now(),
            seconds_before: 0.0,
            tokens: 0,
            steps: 0,
            recent: std::collections::VecDeque::new(),
        })
    }

    /// Loads the latest checkpoint into the steppers, each under its own name, and opens the log where
    /// it left off. Call it once, before the first step.
    ///
    /// # Errors
    /// When a checkpoint is not one of this training, or a file cannot be written.
    pub fn resume<E: DeserializeOwned>(
        &mut self,
        steppers: &mut [(&str, &mut Stepper)],
    ) -> Result<Option<Restored<E>>> {
        let restored = match self.store.latest()? {
            None => None,
            Some((dir, manifest)) => {
                for (name, stepper) in steppers {
                    stepper
                        .load_state(&tensors::load(&dir.join(format!("{name}.safetensors")))?)?;
                }
                let path = dir.join("state.json");
                let text = std::fs::read_to_string(&path).map_err(Error::read(&path))?;
                let bad = |e: serde_json::Error| Error::Checkpoint {
                    path: path.clone(),
                    what: e.to_string(),
                };
                let saved: serde_json::Value = serde_json::from_str(&text).map_err(bad)?;
                self.tokens = saved["tokens"].as_u64().unwrap_or(0);
                self.seconds_before = saved["seconds"].as_f64().unwrap_or(0.0);
                self.recent = serde_json::from_value(saved["recent"].clone()).map_err(bad)?;
                let extra = serde_json::from_value(saved["extra"].clone()).map_err(bad)?;
                Some(Restored {
                    step: manifest.step,
                    extra,
                })
            }
        };
        let step = restored.as_ref().map_or(0, |r| r.step);
        self.steps = step;
        self.metrics = Some(MetricsLog::open(
            &self.config.dir,
            &self.config.stage,
            step,
        )?);
        self.progress = Some(Progress::new(
            &self.config.stage,
            step,
            self.config.total_steps,
        ));
        self.began = Instant::now();
        Ok(restored)
    }

    /// Logs a step that learned from `tokens` tokens.
    ///
    /// # Errors
    /// When the disk is full.
    pub fn log(&mut self, step: u64, tokens: usize, values: &[(&str, f64)]) -> Result<()> {
        self.tokens += tokens as u64;
        let seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        if let Some(m) = &mut self.metrics {
            m.write(step, tokens as u64, seconds, values)?;
        }
        if let Some(p) = &mut self.progress {
            p.advance(step + 1, tokens as u64, values);
        }
        self.recent.push_back(
            values
                .iter()
                .filter(|v| v.1.is_finite())
                .map(|(k, v)| ((*k).to_owned(), *v))
                .collect(),
        );
        if self.recent.len() > RECENT {
            self.recent.pop_front();
        }
        Ok(())
    }

    /// After a step: saves a checkpoint when one is due, or a signal came. `extra` is whatever else the
    /// trainer needs to go on.
    ///
    /// # Errors
    /// When the checkpoint cannot be written; earlier ones stay.
    pub fn after_step<E: Serialize>(
        &mut self,
        step: u64,
        steppers: &[(&str, &Stepper)],
        extra: &E,
    ) -> Result<Flow> {
        self.steps = step + 1;
        let signal = self.config.stop.get();
        let due = self
            .steps
            .is_multiple_of(self.config.checkpoint_every.max(1))
            || self.steps == self.config.total_steps;
        if due || signal.is_some() {
            self.save(steppers, extra)?;
        }
        Ok(signal.map_or(Flow::Continue, Flow::Stop))
    }

    fn save<E: Serialize>(&mut self, steppers: &[(&str, &Stepper)], extra: &E) -> Result<()> {
        if let Some(m) = &mut self.metrics {
            m.sync()?;
        }
        let state = json!({
            "tokens": self.tokens,
            "seconds": self.seconds_before + self.began.elapsed().as_secs_f64(),
            "recent": self.recent,
            "extra": serde_json::to_value(extra).map_err(|e| Error::write(&self.config.dir)(e.into()))?,
        });
        self.store.save(self.steps, |dir| {
            for (name, stepper) in steppers {
                tensors::save(&dir.join(format!("{name}.safetensors")), &stepper.state())?;
            }
            write_synced(&dir.join("state.json"), state.to_string().as_bytes())
        })?;
        Ok(())
    }

    /// Ends the stage.
    ///
    /// # Errors
    /// When the log cannot be synced.
    pub fn finish(mut self) -> Result<Summary> {
        if let Some(m) = &mut self.metrics {
            m.sync()?;
        }
        if let Some(p) = &self.progress {
            p.finish();
        }
        let mut sums: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for (key, value) in self.recent.iter().flatten() {
            let entry = sums.entry(key.clone()).or_default();
            entry.0 += value;
            entry.1 += 1.0;
        }
        let last = sums.into_iter().map(|(k, (sum, n))| (k, sum / n)).collect();
        Ok(Summary {
            steps: self.steps,
            tokens: self.tokens,
            last,
        })
    }
}
