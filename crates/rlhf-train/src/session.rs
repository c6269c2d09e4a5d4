//! What every training loop needs around its steps: resume, log, checkpoint, stop.

use std::collections::{BTreeMap, VecDeque};
use std::path::{Path, PathBuf};
use std::time::Instant;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tch::Tensor;

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
    recent: VecDeque<Vec<(String, f64)>>,
    held: Vec<(String, Vec<(String, Tensor)>)>,
    /// The step that [`Session::due`] was asked for, and the signal it saw.
    noticed: Option<(u64, Option<Signal>)>,
}

/// `state.json` of a checkpoint.
#[derive(Serialize, Deserialize)]
struct Saved<E> {
    tokens: u64,
    seconds: f64,
    recent: VecDeque<Vec<(String, f64)>>,
    extra: E,
}

/// An error without its mend.
fn first_line(e: &Error) -> String {
    e.to_string().lines().next().unwrap_or_default().to_owned()
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
            recent: VecDeque::new(),
            held: Vec::new(),
            noticed: None,
        })
    }

    /// Tensors that belong to the training beside the steppers' (those of a reference that moves): they are
    /// saved with each checkpoint under `name`, and written in place when one is loaded. Call it before
    /// [`Session::resume`].
    pub fn hold(&mut self, name: &str, tensors: Vec<(String, Tensor)>) {
        self.held.push((name.to_owned(), tensors));
    }

    /// The stage's folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.config.dir
    }

    /// Loads the latest whole checkpoint into the steppers, each under its own name, and opens the log
    /// where it left off. Call it once, before the first step. A damaged checkpoint is passed over and
    /// said on stderr.
    ///
    /// # Errors
    /// When a checkpoint is not one of this training, when there are checkpoints but none is whole
    /// (beginning anew would cut off the log), or a file cannot be written.
    pub fn resume<E: DeserializeOwned>(
        &mut self,
        steppers: &mut [(&str, &mut Stepper)],
    ) -> Result<Option<Restored<E>>> {
        let found = self.store.find()?;
        if let (None, Some((path, _))) = (&found.newest, found.damaged.first()) {
            let whats: Vec<String> = found.damaged.iter().map(|(_, e)| first_line(e)).collect();
            return Err(Error::Checkpoint {
                path: path.parent().unwrap_or(path).to_owned(),
                what: format!("none is whole: {}", whats.join("; ")),
                mend: "put back a copy, or remove the stage's folder to start over",
            });
        }
        let restored = match &found.newest {
            None => None,
            Some((dir, manifest)) => Some(Restored {
                step: manifest.step,
                extra: self.load(dir, steppers)?,
            }),
        };
        let step = restored.as_ref().map_or(0, |r| r.step);
        self.steps = step;
        self.metrics = Some(MetricsLog::open(
            &self.config.dir,
            &self.config.stage,
            step,
        )?);
        let progress = Progress::new(&self.config.stage, step, self.config.total_steps);
        for (_, e) in &found.damaged {
            progress.note(&format!("passed over: {}", first_line(e)));
        }
        self.progress = Some(progress);
        self.began = Instant::now();
        Ok(restored)
    }

    /// Goes back to the newest whole checkpoint of at most `step` finished steps, for a training that ends itself
    /// because what came after is not wanted. The log keeps its lines; [`Summary`] is that of the checkpoint.
    ///
    /// # Errors
    /// When there is no such checkpoint, or it is not one of this training.
    pub fn rewind<E: DeserializeOwned>(
        &mut self,
        step: u64,
        steppers: &mut [(&str, &mut Stepper)],
    ) -> Result<Restored<E>> {
        let found = self.store.find_up_to(step)?;
        let Some((dir, manifest)) = &found.newest else {
            return Err(Error::Checkpoint {
                path: self.config.dir.join("checkpoints"),
                what: format!("none of at most {step} steps is whole"),
                mend: "begin again with a smaller checkpoint_every",
            });
        };
        let extra = self.load(dir, steppers)?;
        self.steps = manifest.step;
        self.began = Instant::now();
        Ok(Restored {
            step: manifest.step,
            extra,
        })
    }

    /// Saves a checkpoint before the first step, so that there is one to go back to.
    ///
    /// # Errors
    /// As [`Session::after_step`].
    pub fn before_first<E: Serialize>(
        &mut self,
        steppers: &[(&str, &Stepper)],
        extra: &E,
    ) -> Result<()> {
        self.save(steppers, extra)
    }

    /// Takes over what [`Session::save`] saved in `dir`.
    fn load<E: DeserializeOwned>(
        &mut self,
        dir: &Path,
        steppers: &mut [(&str, &mut Stepper)],
    ) -> Result<E> {
        let other = |path: &Path, what: &dyn std::fmt::Display| Error::Checkpoint {
            path: path.to_owned(),
            what: what.to_string(),
            mend: "go on with the recipe and the model that wrote it, or choose another folder",
        };
        let path = dir.join("state.json");
        let text = std::fs::read_to_string(&path).map_err(Error::read(&path))?;
        let saved: Saved<E> = serde_json::from_str(&text).map_err(|e| other(&path, &e))?;
        for (name, stepper) in steppers {
            let path = dir.join(format!("{name}.safetensors"));
            stepper
                .load_state(&tensors::load(&path)?)
                .map_err(|e| other(&path, &e))?;
        }
        for (name, tensors) in &self.held {
            let path = dir.join(format!("{name}.safetensors"));
            let saved = tensors::load(&path)?;
            let _guard = tch::no_grad_guard();
            for (key, tensor) in tensors {
                let from = saved
                    .get(key)
                    .filter(|s| s.size() == tensor.size() && s.kind() == tensor.kind())
                    .ok_or_else(|| {
                        other(&path, &format!("`{key}` is missing or of another shape"))
                    })?;
                tensor.shallow_clone().f_copy_(from)?;
            }
        }
        self.tokens = saved.tokens;
        self.seconds_before = saved.seconds;
        self.recent = saved.recent;
        Ok(saved.extra)
    }

    /// Logs a step that learned from `tokens` tokens.
    ///
    /// # Errors
    /// [`Error::NotResumed`] before [`Session::resume`], or when the disk is full.
    pub fn log(&mut self, step: u64, tokens: usize, values: &[(&str, f64)]) -> Result<()> {
        self.tokens += tokens as u64;
        let seconds = self.seconds_before + self.began.elapsed().as_secs_f64();
        self.metrics()?
            .write(step, tokens as u64, seconds, values)?;
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

    fn metrics(&mut self) -> Result<&mut MetricsLog> {
        self.metrics
            .as_mut()
            .ok_or_else(|| Error::NotResumed(self.config.stage.clone()))
    }

    /// Whether [`Session::after_step`] of `step` will save a checkpoint, for trainings that have to gather what is
    /// saved. A signal that comes later waits for the next step.
    pub fn due(&mut self, step: u64) -> bool {
        let signal = self.config.stop.get();
        self.noticed = Some((step, signal));
        signal.is_some()
            || (step + 1).is_multiple_of(self.config.checkpoint_every.max(1))
            || step + 1 == self.config.total_steps
    }

    /// After a step: saves a checkpoint when one is due, or a signal came. `extra` is whatever else the
    /// trainer needs to go on; it goes through JSON, bit by bit, so its numbers must be finite.
    ///
    /// # Errors
    /// [`Error::NotResumed`] before [`Session::resume`], or when the checkpoint cannot be written;
    /// earlier ones stay.
    pub fn after_step<E: Serialize>(
        &mut self,
        step: u64,
        steppers: &[(&str, &Stepper)],
        extra: &E,
    ) -> Result<Flow> {
        self.steps = step + 1;
        if !matches!(self.noticed, Some((asked, _)) if asked == step) {
            self.due(step);
        }
        let signal = self.noticed.and_then(|n| n.1);
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
        self.metrics()?.sync()?;
        let state = serde_json::to_string(&Saved {
            tokens: self.tokens,
            seconds: self.seconds_before + self.began.elapsed().as_secs_f64(),
            recent: self.recent.clone(),
            extra,
        })
        .map_err(|e| Error::write(&self.config.dir)(e.into()))?;
        self.store.save(self.steps, |dir| {
            for (name, stepper) in steppers {
                tensors::save(&dir.join(format!("{name}.safetensors")), &stepper.state())?;
            }
            for (name, held) in &self.held {
                tensors::save(&dir.join(format!("{name}.safetensors")), held)?;
            }
            write_synced(&dir.join("state.json"), state.as_bytes())
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

#[cfg(test)]
mod tests {
    use super::*;

    fn open(dir: &Path) -> Session {
        Session::open(SessionConfig {
            dir: dir.to_owned(),
            stage: "sft".into(),
            total_steps: 100,
            checkpoint_every: 1,
            keep: 1,
            stop: StopFlag::default(),
        })
        .unwrap()
    }

    #[test]
    fn a_session_that_was_not_resumed_says_so() {
        let dir = tempfile::tempdir().unwrap();
        let mut session = open(dir.path());
        let e = session.log(0, 1, &[]).unwrap_err().to_string();
        assert!(e.contains("`sft`") && e.contains("resume"), "{e}");
        assert!(session.after_step(0, &[], &()).is_err());
    }

    #[test]
    fn what_else_is_saved_comes_back_bit_by_bit() {
        let dir = tempfile::tempdir().unwrap();
        // Numbers whose shortest decimals a hasty parser gets wrong by a unit in the last place.
        let mut bits = 0x3fe5_5555_5555_5555u64;
        let extra: Vec<f64> = (0..2_000)
            .map(|_| {
                bits = bits
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                f64::from_bits(bits)
            })
            .filter(|x| x.is_finite())
            .collect();
        let mut session = open(dir.path());
        assert!(session.resume::<Vec<f64>>(&mut []).unwrap().is_none());
        for step in 0..12 {
            session
                .log(step, 3, &[("loss", step as f64), ("nan", f64::NAN)])
                .unwrap();
            assert_eq!(
                session.after_step(step, &[], &extra).unwrap(),
                Flow::Continue
            );
        }
        drop(session);
        let mut session = open(dir.path());
        let restored = session.resume::<Vec<f64>>(&mut []).unwrap().unwrap();
        assert_eq!(restored.step, 12);
        assert_eq!(restored.extra.len(), extra.len());
        assert!(
            restored
                .extra
                .iter()
                .zip(&extra)
                .all(|(a, b)| a.to_bits() == b.to_bits())
        );
        // Of the steps 2…11 the mean is 6.5; what was not finite is in no mean.
        let summary = session.finish().unwrap();
        assert_eq!((summary.steps, summary.tokens), (12, 36));
        assert_eq!(summary.last, BTreeMap::from([("loss".to_owned(), 6.5)]));
    }

    #[test]
    fn a_training_goes_back_with_all_that_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let held = Tensor::from_slice(&[0.1f32, 0.2]);
        let mut session = open(dir.path());
        session.config.keep = 2;
        session.store = CheckpointStore::new(dir.path().join("checkpoints"), 2);
        session.hold("reference", vec![("w".into(), held.shallow_clone())]);
        session.resume::<u64>(&mut []).unwrap();
        let e = session.rewind::<u64>(3, &mut []).unwrap_err().to_string();
        assert!(e.contains("at most 3 steps"), "{e}");
        session.before_first(&[], &7u64).unwrap();
        for step in 0..3u64 {
            let _ = held.shallow_clone().fill_(step as f64);
            session.log(step, 5, &[("loss", step as f64)]).unwrap();
            session.after_step(step, &[], &step).unwrap();
        }
        // After steps 0 … 2 the last two checkpoints are of 2 and 3 finished steps.
        let back = session.rewind::<u64>(2, &mut []).unwrap();
        assert_eq!((back.step, back.extra), (2, 1));
        assert_eq!(Vec::<f32>::try_from(&held).unwrap(), [1.0, 1.0]);
        let summary = session.finish().unwrap();
        assert_eq!((summary.steps, summary.tokens), (2, 10));
        // Another shape is refused by name.
        let mut session = open(dir.path());
        session.hold("reference", vec![("w".into(), Tensor::from_slice(&[0f32]))]);
        let e = session.resume::<u64>(&mut []).unwrap_err().to_string();
        assert!(e.contains("`w`"), "{e}");
    }

    #[test]
    fn another_kind_of_state_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut session = open(dir.path());
        session.resume::<()>(&mut []).unwrap();
        session.log(0, 1, &[]).unwrap();
        session.after_step(0, &[], &"a word").unwrap();
        let e = open(dir.path())
            .resume::<f64>(&mut [])
            .unwrap_err()
            .to_string();
        assert!(e.contains("state.json") && e.contains("do: "), "{e}");
    }
}
