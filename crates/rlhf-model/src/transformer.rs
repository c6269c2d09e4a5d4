//! A trunk with the head of a language model, its files and its random start.
//!
//! Invariant: the weights stand under their Hugging Face names, untouched (nothing fused, nothing
//! permuted), so that files, optimiser state and gradients speak of the same tensors. Layouts made
//! for speed live in `decode` and are copies.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;
use rlhf_data::seed::{Purpose, Stream};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::batch::DeviceBatch;
use crate::causal_lm::CausalLm;
use crate::config::{Config, Head, is_float};
use crate::error::{Error, Result};
use crate::trunk::{self, Spec, Start, Trunk, trunk_specs};
use crate::weights::{Load, Staging, WeightStore, save_tensors, sync_write};

/// Where to put a loaded model and in which type.
#[derive(Clone, Copy, Debug)]
pub struct LoadOptions {
    /// The device.
    pub device: Device,
    /// The type of weights and activations; files of another type are converted.
    pub kind: Kind,
}

impl Default for LoadOptions {
    /// f32 on the CPU.
    fn default() -> Self {
        Self {
            device: Device::Cpu,
            kind: Kind::Float,
        }
    }
}

/// How to save.
#[derive(Clone, Copy, Debug)]
pub struct SaveOptions {
    /// Files larger than this are split.
    pub max_shard_bytes: u64,
    /// The type to store; the model's own when `None`.
    pub kind: Option<Kind>,
}

impl Default for SaveOptions {
    /// 5 GB a file, stored as computed.
    fn default() -> Self {
        Self {
            max_shard_bytes: 5_000_000_000,
            kind: None,
        }
    }
}

const LM_HEAD: &str = "lm_head.weight";

/// A language model.
#[derive(Debug)]
pub struct Transformer {
    trunk: Trunk,
    /// `None` when the embedding serves.
    lm_head: Option<Tensor>,
    notices: Vec<String>,
}

impl Transformer {
    /// Loads `config.json` and the weights of a Hugging Face folder. The weights require gradients.
    ///
    /// # Errors
    /// [`Error::Config`], [`Error::Format`] and [`Error::Io`] naming file and key;
    /// [`Error::Tensors`] listing every tensor that is missing, misshaped or of a wrong type.
    pub fn load(dir: &Path, options: &LoadOptions) -> Result<Self> {
        let (mut config, head, _) = Config::load_with_head(dir)?;
        if head == Head::Scalar {
            return Err(Error::Config {
                file: dir.join("config.json").display().to_string(),
                key: "architectures".into(),
                message: "this folder holds a scalar (reward or value) model, not a language model"
                    .into(),
            });
        }
        config.take_generation_eos(dir)?;
        let specs = || specs(&config);
        let (mut tensors, notices) = load_tensors(dir, options, specs)?;
        let mut model = Self::assemble(config, &mut tensors)?;
        model.notices = notices;
        Ok(model)
    }

    /// A model with random weights: matrices normal with `initializer_range`, norms one, biases
    /// zero. Equal seeds give equal weights on every machine, each tensor drawn by its name.
    ///
    /// # Errors
    /// [`Error::Config`] when the configuration is inconsistent, [`Error::Argument`] when its family
    /// cannot express it or `kind` is no floating-point type, [`Error::Torch`] when memory does not suffice.
    pub fn init(config: Config, seed: u64, device: Device, kind: Kind) -> Result<Self> {
        config.validate()?;
        if !is_float(kind) {
            return Err(Error::Argument(format!(
                "{kind:?} is not a floating-point type"
            )));
        }
        if Config::parse(&config.to_json().to_string(), "config")? != config {
            return Err(Error::Argument(format!(
                "this configuration does not survive its own config.json: it has what {} cannot express; start from Config::in_family",
                config.family.architecture()
            )));
        }
        let stream = Stream::new(seed, Purpose::Init);
        let mut tensors = HashMap::new();
        for spec in specs(&config) {
            let t = match spec.start {
                Start::Normal => {
                    normal(&stream, &spec.name, &spec.shape, config.initializer_range)?
                }
                Start::Zeros => Tensor::f_zeros(&spec.shape, (Kind::Float, Device::Cpu))?,
                Start::Ones => Tensor::f_ones(&spec.shape, (Kind::Float, Device::Cpu))?,
            };
            tensors.insert(
                spec.name,
                trainable(&t.f_to_kind(kind)?.f_to_device(device)?),
            );
        }
        Self::assemble(config, &mut tensors)
    }

    fn assemble(config: Config, tensors: &mut HashMap<String, Tensor>) -> Result<Self> {
        let trunk = Trunk::assemble(config, tensors)?;
        Ok(Self {
            trunk,
            lm_head: tensors.remove(LM_HEAD),
            notices: Vec::new(),
        })
    }

    /// Writes `config.json`, `generation_config.json` and the weights, all or nothing. Other files
    /// of an existing folder (a tokenizer) stay. An adapter is merged into the weights that are
    /// written; [`Transformer::save_adapter`] writes it alone.
    ///
    /// # Errors
    /// [`Error::Io`] when the folder cannot be written; what stood there before is then untouched.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.save_with(dir, &SaveOptions::default())
    }

    /// [`Transformer::save`] with a shard size and type of one's choice.
    ///
    /// # Errors
    /// As [`Transformer::save`]; [`Error::Argument`] for a type that is not floating-point.
    pub fn save_with(&self, dir: &Path, options: &SaveOptions) -> Result<()> {
        let mut tensors = self.trunk.stored();
        tensors.extend(self.head());
        save_folder(
            dir,
            &self.trunk.config,
            &tensors,
            options,
            self.kind(),
            |_| {},
        )
    }

    /// The configuration.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.trunk.config
    }

    /// The type of the weights.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.trunk.kind()
    }

    /// Where the weights are.
    #[must_use]
    pub fn device(&self) -> Device {
        self.trunk.device()
    }

    /// What was odd but harmless when the model was loaded, such as a tensor that nothing uses.
    #[must_use]
    pub fn notices(&self) -> &[String] {
        &self.notices
    }

    /// A copy with weights of its own, which require gradients. Of an adapted model only the adapter
    /// is copied; the frozen weights are shared.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn duplicate(&self) -> Result<Self> {
        let lm_head = match &self.lm_head {
            Some(head) if self.adapter().is_none() => {
                copies(&[(LM_HEAD.to_owned(), head.shallow_clone())])?.remove(LM_HEAD)
            }
            head => head.as_ref().map(Tensor::shallow_clone),
        };
        Ok(Self {
            trunk: self.trunk.duplicate()?,
            lm_head,
            notices: Vec::new(),
        })
    }

    /// The model without its adapter, sharing the frozen weights: the reference of a policy that
    /// trains an adapter. A model without one is shared as it is: train only one of the two.
    ///
    /// # Errors
    /// [`Error::Torch`] when libtorch fails.
    pub fn base(&self) -> Result<Self> {
        Ok(Self {
            trunk: self.trunk.base()?,
            lm_head: self.lm_head.as_ref().map(Tensor::shallow_clone),
            notices: Vec::new(),
        })
    }

    /// The reference π₀ as the policy begins: its [`base`](Self::base) where it has an adapter, which
    /// takes no memory, else a copy.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn reference(&self) -> Result<Self> {
        match self.adapter() {
            Some(_) => self.base(),
            None => self.duplicate(),
        }
    }

    /// The model with its adapter merged into the matrices that it is on: these are new and frozen,
    /// all others shared.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn merged(&self) -> Result<Self> {
        let mut tensors: HashMap<String, Tensor> = self.trunk.stored().into_iter().collect();
        tensors.extend(self.head());
        Self::assemble(self.config().clone(), &mut tensors)
    }

    /// Keeps of every `every` layers only the input for backward, and runs them again there: less
    /// memory for a third more time. 0 keeps everything.
    pub fn set_recompute(&mut self, every: usize) {
        self.trunk.recompute_every = every;
    }

    /// The model with the matrices of its layers in eight bits and a scale for every row, all of it
    /// frozen: a base for an adapter at a quarter of f32's memory (half of bf16's). No weight moves
    /// by more than 1/254 of its row's largest. An adapter is merged first.
    ///
    /// # Errors
    /// [`Error::NonFinite`] naming a matrix that holds NaN or infinities.
    pub fn into_int8(self) -> Result<Self> {
        self.freeze_head();
        let trunk = self.trunk.quantise()?;
        trunk.freeze();
        Ok(Self { trunk, ..self })
    }

    fn head(&self) -> Option<(String, Tensor)> {
        let head = self.lm_head.as_ref()?;
        Some((LM_HEAD.to_owned(), head.shallow_clone()))
    }

    pub(crate) fn freeze_head(&self) {
        if let Some(head) = &self.lm_head {
            freeze(head);
        }
    }

    pub(crate) fn trunk_mut(&mut self) -> &mut Trunk {
        &mut self.trunk
    }

    /// Overwrites the weights by those of a model of the same shape.
    ///
    /// # Errors
    /// [`Error::Argument`] naming the first tensor that differs in name or shape.
    pub fn copy_from(&self, other: &Self) -> Result<()> {
        copy_tensors(&self.parameters(), &other.parameters())
    }

    /// Logits `[N, V]` of every packed row. For tests and inspection; training and generation never
    /// make this tensor.
    ///
    /// # Errors
    /// As [`CausalLm::hidden`].
    pub fn logits(&self, batch: &DeviceBatch) -> Result<Tensor> {
        let logits = self.hidden(batch)?.linear(&self.lm_head(), None::<Tensor>);
        Ok(match self.logit_softcap() {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        })
    }

    pub(crate) fn trunk(&self) -> &Trunk {
        &self.trunk
    }

    pub(crate) fn into_trunk(self) -> Trunk {
        self.trunk
    }
}

impl CausalLm for Transformer {
    fn hidden(&self, batch: &DeviceBatch) -> Result<Tensor> {
        self.trunk.hidden(batch, None, self.lm_head.is_none())
    }

    fn hidden_at(&self, batch: &DeviceBatch, rows: &Tensor) -> Result<Tensor> {
        self.trunk.hidden(batch, Some(rows), self.lm_head.is_none())
    }

    fn lm_head(&self) -> Tensor {
        self.lm_head
            .as_ref()
            .unwrap_or(&self.trunk.embedding)
            .shallow_clone()
    }

    fn logit_softcap(&self) -> Option<f64> {
        self.trunk.config.logit_softcap
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = self.trunk.trainable();
        if self.adapter().is_none() {
            all.extend(self.head());
        }
        all
    }
}

fn specs(config: &Config) -> impl Iterator<Item = Spec> + '_ {
    let size = vec![config.vocab_size, config.hidden_size];
    let head = (!config.tie_word_embeddings).then(|| Spec::new(LM_HEAD, size, Start::Normal));
    trunk_specs(config).chain(head)
}

/// Number of weights of a language model, tied matrices counted once.
pub(crate) fn num_parameters(config: &Config) -> i64 {
    let head = i128::from(config.vocab_size) * i128::from(config.hidden_size);
    let head = if config.tie_word_embeddings { 0 } else { head };
    i64::try_from(trunk::num_parameters(config) + head).unwrap_or(i64::MAX)
}

/// Checks all of `specs` against the files of a folder, then reads them, ready to be trained.
/// Returns notices beside.
pub(crate) fn load_tensors<I: Iterator<Item = Spec>>(
    dir: &Path,
    options: &LoadOptions,
    specs: impl Fn() -> I,
) -> Result<(HashMap<String, Tensor>, Vec<String>)> {
    if !is_float(options.kind) {
        return Err(Error::Argument(format!(
            "{:?} is not a floating-point type",
            options.kind
        )));
    }
    let store = WeightStore::open(dir)?;
    // Some folders hold the trunk alone, its names without their first word.
    let first = specs().next().map(|s| s.name).unwrap_or_default();
    let base = first.split_once('.').map_or("", |(base, _)| base);
    let bare = store.info(&first).is_none()
        && store
            .info(first.trim_start_matches(base).trim_start_matches('.'))
            .is_some();
    let stored = |name: &str| match name.strip_prefix(base).and_then(|n| n.strip_prefix('.')) {
        Some(rest) if bare => rest.to_owned(),
        _ => name.to_owned(),
    };
    let mut load = Load::new(&store);
    for spec in specs() {
        load.expect(&stored(&spec.name), &spec.shape);
    }
    let unexpected = load.finish()?;
    let notices = unexpected
        .iter()
        // GPT-2's causal mask, which old versions stored along.
        .filter(|n| !n.ends_with(".attn.bias") && !n.ends_with(".attn.masked_bias"))
        .map(|n| format!("{}: tensor {n} is not used", dir.display()))
        .collect();
    let mut tensors = HashMap::new();
    for spec in specs() {
        let tensor = store.read(&stored(&spec.name), options.device, options.kind)?;
        tensors.insert(spec.name, trainable(&tensor));
    }
    Ok((tensors, notices))
}

/// Writes a model folder, all or nothing.
pub(crate) fn save_folder(
    dir: &Path,
    config: &Config,
    tensors: &[(String, Tensor)],
    options: &SaveOptions,
    kind: Kind,
    amend: impl FnOnce(&mut Value),
) -> Result<()> {
    let kind = options.kind.unwrap_or(kind);
    if !is_float(kind) {
        return Err(Error::Argument(format!(
            "{kind:?} is not a floating-point type"
        )));
    }
    let mut config = config.clone();
    config.dtype = kind;
    let mut json = config.to_json();
    amend(&mut json);
    let staging = Staging::new(dir)?;
    save_tensors(&staging, tensors, kind, options.max_shard_bytes)?;
    let text = |v: &Value| format!("{v:#}\n").into_bytes();
    sync_write(
        &staging.path("generation_config.json"),
        &text(&config.generation_json()),
    )?;
    sync_write(&staging.path("config.json"), &text(&json))?;
    staging.commit()
}

/// Copies the tokenizer's files from one model folder to another: `tokenizer.json`,
/// `tokenizer_config.json` and, where they exist, the chat template and the vocabulary files.
///
/// # Errors
/// [`Error::Io`] when `tokenizer.json` is absent or a file cannot be copied.
pub fn copy_tokenizer(from: &Path, to: &Path) -> Result<()> {
    const FILES: [&str; 9] = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "chat_template.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "merges.txt",
        "tokenizer.model",
    ];
    std::fs::create_dir_all(to).map_err(Error::io(to))?;
    for (i, name) in FILES.iter().enumerate() {
        let source = from.join(name);
        if i > 0 && !source.exists() {
            continue;
        }
        let bytes = std::fs::read(&source).map_err(Error::io(&source))?;
        let part = to.join(format!(".{name}.tmp"));
        sync_write(&part, &bytes)?;
        let target = to.join(name);
        std::fs::rename(&part, &target).map_err(Error::io(&target))?;
    }
    Ok(())
}

/// A leaf that requires gradients.
pub(crate) fn trainable(t: &Tensor) -> Tensor {
    t.detach().set_requires_grad(true)
}

/// Stops gradients to a leaf.
pub(crate) fn freeze(t: &Tensor) {
    if t.is_leaf() && is_float(t.kind()) {
        let _ = t.shallow_clone().requires_grad_(false);
    }
}

/// Deep copies by name.
pub(crate) fn copies(parameters: &[(String, Tensor)]) -> Result<HashMap<String, Tensor>> {
    let _no_grad = tch::no_grad_guard();
    parameters
        .iter()
        .map(|(name, t)| {
            let mut copy = t.f_detach()?.f_empty_like()?;
            copy.f_copy_(t)?;
            Ok((name.clone(), trainable(&copy)))
        })
        .collect()
}

/// Copies `from` into `to`, tensor by tensor.
pub(crate) fn copy_tensors(to: &[(String, Tensor)], from: &[(String, Tensor)]) -> Result<()> {
    let _no_grad = tch::no_grad_guard();
    if to.len() != from.len() {
        return Err(Error::Argument(format!(
            "copying weights: {} tensors into {}",
            from.len(),
            to.len()
        )));
    }
    let mismatch = to
        .iter()
        .zip(from)
        .find(|((an, a), (bn, b))| an != bn || a.size() != b.size());
    if let Some(((an, a), (bn, b))) = mismatch {
        return Err(Error::Argument(format!(
            "copying weights: {bn} {:?} into {an} {:?}",
            b.size(),
            a.size()
        )));
    }
    for ((_, a), (_, b)) in to.iter().zip(from) {
        a.f_detach()?.f_copy_(b)?;
    }
    Ok(())
}

/// A normal matrix, f32, keyed by the tensor's name.
pub(crate) fn normal(stream: &Stream, name: &str, shape: &[i64], std: f64) -> Result<Tensor> {
    // FNV-1a: the same name is the same key wherever the tensor stands.
    let key = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| {
        (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    let numel = usize::try_from(shape.iter().product::<i64>())
        .map_err(|_| Error::Argument(format!("{name}: shape {shape:?} is too large")))?;
    let mut values = Vec::new();
    values
        .try_reserve_exact(numel)
        .map_err(|_| Error::Argument(format!("{name}: no memory for {shape:?} weights")))?;
    values.resize(numel, 0.0_f32);
    values
        .par_chunks_mut(1 << 12)
        .enumerate()
        .for_each(|(chunk, values)| {
            for (i, pair) in values.chunks_mut(2).enumerate() {
                let index = (chunk << 11) as u64 + i as u64;
                let (a, b) = stream.normal_pair(key, index as u32, (index >> 32) as u32);
                for (value, z) in pair.iter_mut().zip([a, b]) {
                    *value = (z * std) as f32;
                }
            }
        });
    Ok(Tensor::f_from_slice(&values)?.f_reshape(shape)?)
}
