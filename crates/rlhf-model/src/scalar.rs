//! A trunk with a head of one number, or of several: reward models and value functions.
//!
//! Files follow `AutoModelForSequenceClassification` (`model.*`, `score.weight`, a label an output), so
//! reward models travel both ways. A [`RewardNorm`] is kept beside the weights in `config.json` under
//! `rlhf_reward_norm`, what else its user wants to keep under `rlhf_reward`; other tools ignore both and
//! see the raw head.
//!
//! Invariant: a norm is of the one output; what several outputs mean is known elsewhere (`rlhf-reward`).

use std::path::Path;

use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::Ragged;
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::adapter::AdapterConfig;
use crate::batch::DeviceBatch;
use crate::config::{Config, Head};
use crate::error::{Error, Result};
use crate::transformer::{
    LoadOptions, SaveOptions, Transformer, copies, copy_tensors, load_tensors, normal, save_folder,
    trainable,
};
use crate::trunk::{Spec, Start, Trunk, trunk_specs};

const SCORE: &str = "score.weight";
const NORM_KEY: &str = "rlhf_reward_norm";
const NOTE_KEY: &str = "rlhf_reward";

/// What scores are shifted and divided by, so that a reference set has mean 0 and deviation 1.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct RewardNorm {
    /// Subtracted.
    pub mean: f64,
    /// The divisor; positive.
    pub std: f64,
}

impl Default for RewardNorm {
    /// Leaves scores as they are.
    fn default() -> Self {
        Self {
            mean: 0.0,
            std: 1.0,
        }
    }
}

/// One number for each hidden state of a trunk that has another head as well: the value function of a policy that
/// shares its trunk.
#[derive(Debug)]
pub struct ValueHead {
    /// `[1, H]`.
    weight: Tensor,
}

impl ValueHead {
    /// A head for `model`'s hidden states that gives 0 everywhere, so that the first values say nothing.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn new(model: &Transformer) -> Result<Self> {
        let kind = if model.kind() == Kind::Double {
            Kind::Double
        } else {
            Kind::Float
        };
        let zeros = Tensor::f_zeros([1, model.config().hidden_size], (kind, model.device()))?;
        Ok(Self {
            weight: trainable(&zeros),
        })
    }

    /// Values `[M]` of hidden states `[M, H]`, in f32 (f64 for an f64 model). Differentiable.
    pub fn of(&self, hidden: &Tensor) -> Tensor {
        hidden
            .to_kind(self.weight.kind())
            .linear(&self.weight, None::<Tensor>)
            .squeeze_dim(1)
    }

    /// What is trained; it shares storage with the head's.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        vec![("value_head.weight".to_owned(), self.weight.shallow_clone())]
    }
}

/// A transformer that gives one number for a state, or O of them.
#[derive(Debug)]
pub struct ScalarModel {
    trunk: Trunk,
    /// `[O, H]`.
    head: Tensor,
    norm: RewardNorm,
    note: Value,
    notices: Vec<String>,
}

impl ScalarModel {
    /// Puts a fresh head on a language model's trunk; its own head is dropped. The new head is
    /// normal with deviation 1/√(H + 1), so that first scores have unit size.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn from_trunk(model: Transformer, seed: u64) -> Result<Self> {
        Self::with_outputs(model, 1, seed)
    }

    /// [`ScalarModel::from_trunk`] with a head of `outputs` numbers.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice; [`Error::Argument`] for no outputs.
    pub fn with_outputs(model: Transformer, outputs: usize, seed: u64) -> Result<Self> {
        if outputs == 0 {
            return Err(Error::Argument("a head of 0 outputs".into()));
        }
        let trunk = model.into_trunk();
        let h = trunk.config.hidden_size;
        let stream = Stream::new(seed, Purpose::Init);
        let head = normal(
            &stream,
            SCORE,
            &[outputs as i64, h],
            1.0 / ((h + 1) as f64).sqrt(),
        )?
        .f_to_kind(trunk.kind())?
        .f_to_device(trunk.device())?;
        Ok(Self {
            trunk,
            head: trainable(&head),
            norm: RewardNorm::default(),
            note: Value::Null,
            notices: Vec::new(),
        })
    }

    /// Loads a folder in the layout of `AutoModelForSequenceClassification`.
    ///
    /// # Errors
    /// As [`Transformer::load`]; [`Error::Config`] when the folder holds a language model.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self> {
        let (mut config, head, map) = Config::load_with_head(dir)?;
        let bad = |key: &str, message: String| Error::Config {
            file: dir.join("config.json").display().to_string(),
            key: key.into(),
            message,
        };
        if head != Head::Scalar {
            return Err(bad(
                "architectures",
                "this folder holds a language model, not a scalar model".into(),
            ));
        }
        let labels = map.get("num_labels").and_then(Value::as_u64);
        let named = map
            .get("id2label")
            .and_then(Value::as_object)
            .map(|m| m.len() as u64);
        // A head larger than any real one is a damaged file, and would overflow the count of its bytes.
        let outputs = match labels.or(named).unwrap_or(1) {
            n @ 1..=65_536 => n as i64,
            n => return Err(bad("num_labels", format!("{n}, expected 1 to 65536"))),
        };
        let norm = match map.get(NORM_KEY) {
            None | Some(Value::Null) => RewardNorm::default(),
            Some(v) => {
                let number = |k: &str| v.get(k).and_then(Value::as_f64);
                match (number("mean"), number("std")) {
                    (Some(mean), Some(std)) if std > 0.0 => RewardNorm { mean, std },
                    _ => return Err(bad(NORM_KEY, format!("{v} has no mean and positive std"))),
                }
            }
        };
        config.take_generation_eos(dir)?;
        let h = config.hidden_size;
        let specs = || {
            trunk_specs(&config).chain(std::iter::once(Spec::new(
                SCORE,
                vec![outputs, h],
                Start::Zeros,
            )))
        };
        let (mut tensors, notices) = load_tensors(dir, options, specs)?;
        let head = tensors
            .remove(SCORE)
            .ok_or_else(|| Error::format(dir, format!("no tensor {SCORE}")))?;
        let trunk = Trunk::assemble(config, &mut tensors)?;
        let note = map.get(NOTE_KEY).cloned().unwrap_or_default();
        Ok(Self {
            trunk,
            head,
            norm,
            note,
            notices,
        })
    }

    /// Writes the folder, all or nothing, as [`Transformer::save`].
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_with(dir, &SaveOptions::default())
    }

    /// [`ScalarModel::save`] with a shard size and type of one's choice.
    ///
    /// # Errors
    /// As [`ScalarModel::save`]; [`Error::Argument`] for a type that is not floating-point.
    pub fn save_with(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        let amend = |json: &mut Value| {
            json["architectures"] = json!([self.trunk.config.family.shape().scalar]);
            let label = |i: usize| format!("LABEL_{i}");
            let outputs = self.num_outputs();
            json["num_labels"] = json!(outputs);
            json["id2label"] = (0..outputs)
                .map(|i| (i.to_string(), json!(label(i))))
                .collect();
            json["label2id"] = (0..outputs).map(|i| (label(i), json!(i))).collect();
            json[NORM_KEY] = json!({"mean": self.norm.mean, "std": self.norm.std});
            if !self.note.is_null() {
                json[NOTE_KEY] = self.note.clone();
            }
        };
        let config = &self.trunk.config;
        let mut tensors = self.trunk.stored();
        tensors.push((SCORE.to_owned(), self.head.shallow_clone()));
        save_folder(dir, config, &tensors, options, self.trunk.kind(), amend)
    }

    /// One score a completion, f32 (f64 for an f64 model) `[S]`: the head at its last token, shifted
    /// and divided by the norm. Differentiable.
    ///
    /// # Errors
    /// As [`crate::CausalLm::hidden`]; also when the head has several outputs.
    pub fn scores(&self, batch: &DeviceBatch) -> Result<Tensor> {
        self.at_rows(batch, &batch.last_rows)
    }

    /// One value a trained token: the head at the row that the token is predicted from, M values in
    /// S segments. Differentiable.
    ///
    /// # Errors
    /// As [`crate::CausalLm::hidden`]; also when the head has several outputs.
    pub fn values(&self, batch: &DeviceBatch) -> Result<Ragged> {
        Ok(Ragged::new(
            self.at_rows(batch, &batch.target_rows)?,
            batch.offsets.clone(),
        )?)
    }

    fn at_rows(&self, batch: &DeviceBatch, rows: &Tensor) -> Result<Tensor> {
        if self.num_outputs() != 1 {
            return Err(Error::Argument(format!(
                "a head of {} outputs gives no single number; take `outputs`, or a model with one",
                self.num_outputs()
            )));
        }
        let raw = self.outputs(batch, rows)?.squeeze_dim(1);
        if self.norm == RewardNorm::default() {
            return Ok(raw);
        }
        Ok((raw - self.norm.mean) / self.norm.std)
    }

    /// The head's numbers at `rows` (i64 `[R]`) of the batch, as they are: `[R, O]`, f32 (f64 for an f64
    /// model), not normalised. Differentiable.
    ///
    /// # Errors
    /// As [`crate::CausalLm::hidden`]; also when a row is outside the batch.
    pub fn outputs(&self, batch: &DeviceBatch, rows: &Tensor) -> Result<Tensor> {
        let hidden = self.trunk.hidden(batch, Some(rows), false)?;
        let kind = if self.trunk.kind() == Kind::Double {
            Kind::Double
        } else {
            Kind::Float
        };
        Ok(hidden
            .to_kind(kind)
            .linear(&self.head.to_kind(kind), None::<Tensor>))
    }

    /// O, the numbers that the head gives.
    #[must_use]
    pub fn num_outputs(&self) -> usize {
        self.head.size()[0] as usize
    }

    /// What is kept beside the weights for the model's user; null where nothing is.
    #[must_use]
    pub fn note(&self) -> &Value {
        &self.note
    }

    /// Keeps something beside the weights (`rlhf_reward` in `config.json`).
    pub fn set_note(&mut self, note: Value) {
        self.note = note;
    }

    /// Freezes the trunk and starts an adapter on it; adapter and head are what is trained.
    ///
    /// # Errors
    /// As [`Transformer::adapt`].
    pub fn adapt(mut self, config: &AdapterConfig, seed: u64) -> Result<Self> {
        self.trunk.adapt(config, seed)?;
        Ok(self)
    }

    /// As [`Transformer::into_int8`]; the head stays as it is.
    ///
    /// # Errors
    /// As [`Transformer::into_int8`].
    pub fn into_int8(self) -> Result<Self> {
        let trunk = self.trunk.quantise()?;
        trunk.freeze();
        Ok(Self { trunk, ..self })
    }

    /// As [`Transformer::set_recompute`].
    pub fn set_recompute(&mut self, every: usize) {
        self.trunk.recompute_every = every;
    }

    /// The normalisation in force.
    #[must_use]
    pub fn norm(&self) -> RewardNorm {
        self.norm
    }

    /// Sets the normalisation; it replaces the one in force, it does not compose with it.
    ///
    /// # Errors
    /// [`Error::Argument`] when a number is not finite or `std` is not positive.
    pub fn set_norm(&mut self, norm: RewardNorm) -> Result<()> {
        if !(norm.mean.is_finite() && norm.std.is_finite() && norm.std > 0.0) {
            return Err(Error::Argument(format!("{norm:?} cannot normalise")));
        }
        self.norm = norm;
        Ok(())
    }

    /// The configuration of the trunk.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.trunk.config
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.trunk.device()
    }

    /// The type of the weights.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.trunk.kind()
    }

    /// What was odd but harmless when the model was loaded.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// Every weight that is trained, by its name in the folder; the tensors share storage with the
    /// model's. Of an adapted trunk these are the adapter and the head.
    #[must_use]
    pub fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = self.trunk.trainable();
        all.push((SCORE.to_owned(), self.head.shallow_clone()));
        all
    }

    /// A copy with weights of its own, which require gradients; the norm goes along.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn duplicate(&self) -> Result<Self> {
        let mut head = copies(&[(SCORE.to_owned(), self.head.shallow_clone())])?;
        Ok(Self {
            trunk: self.trunk.duplicate()?,
            head: head
                .remove(SCORE)
                .ok_or_else(|| Error::Argument(format!("no tensor {SCORE}")))?,
            norm: self.norm,
            note: self.note.clone(),
            notices: Vec::new(),
        })
    }

    /// Overwrites weights and norm by those of a model of the same shape.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first tensor that differs in name or shape.
    pub fn copy_from(&mut self, other: &Self) -> Result<()> {
        copy_tensors(&self.parameters(), &other.parameters())?;
        self.norm = other.norm;
        self.note = other.note.clone();
        Ok(())
    }
}
