//! The Llama-family transformer over packed batches, its files and its random start.
//!
//! Invariant: the weights stand under their Hugging Face names, untouched (nothing fused, nothing
//! permuted), so that files, optimiser state and gradients speak of the same tensors. Layouts made
//! for speed live in `decode` and are copies.

use std::collections::HashMap;
use std::path::Path;

use rayon::prelude::*;
use rlhf_data::seed::{Purpose, Stream};
use rlhf_kernels::{AttentionLayout, shared_prefix_attention};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use crate::batch::DeviceBatch;
use crate::causal_lm::CausalLm;
use crate::config::{Config, Head, is_float};
use crate::error::{Error, Result};
use crate::rope::{Angles, inverse_frequencies};
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

/// How a tensor starts in a model trained from scratch.
#[derive(Clone, Copy, Debug)]
enum Start {
    Normal,
    Zeros,
    Ones,
}

/// A tensor that a model consists of.
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) shape: Vec<i64>,
    start: Start,
}

impl Spec {
    /// A tensor that starts as zeros.
    pub(crate) fn zeros(name: String, shape: Vec<i64>) -> Self {
        Self {
            name,
            shape,
            start: Start::Zeros,
        }
    }
}

/// y = x·Wᵀ + b.
#[derive(Debug)]
pub(crate) struct Linear {
    pub(crate) weight: Tensor,
    pub(crate) bias: Option<Tensor>,
}

impl Linear {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

#[derive(Debug)]
pub(crate) struct Layer {
    pub(crate) input_norm: Tensor,
    pub(crate) q: Linear,
    pub(crate) k: Linear,
    pub(crate) v: Linear,
    pub(crate) o: Linear,
    pub(crate) post_norm: Tensor,
    pub(crate) gate: Linear,
    pub(crate) up: Linear,
    pub(crate) down: Linear,
}

/// Everything below the head.
#[derive(Debug)]
pub(crate) struct Trunk {
    pub(crate) config: Config,
    pub(crate) embedding: Tensor,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Tensor,
    pub(crate) inverse_frequencies: Tensor,
}

/// The tensors of a trunk, in the order of [`CausalLm::parameters`].
pub(crate) fn trunk_specs(config: &Config) -> impl Iterator<Item = Spec> + '_ {
    let (h, i) = (config.hidden_size, config.intermediate_size);
    let q = config.num_attention_heads * config.head_dim;
    let kv = config.num_key_value_heads * config.head_dim;
    let spec = |name: String, shape: Vec<i64>, start| Spec { name, shape, start };
    let linear = move |name: String, out: i64, from: i64, bias: bool| {
        let weight = spec(format!("{name}.weight"), vec![out, from], Start::Normal);
        let bias = bias.then(|| spec(format!("{name}.bias"), vec![out], Start::Zeros));
        std::iter::once(weight).chain(bias)
    };
    let layer = move |n: i64| {
        let at = |part: &str| format!("model.layers.{n}.{part}");
        let norm = |part: &str| {
            std::iter::once(spec(format!("{}.weight", at(part)), vec![h], Start::Ones))
        };
        let (ab, mb) = (config.attention_bias, config.mlp_bias);
        norm("input_layernorm")
            .chain(linear(at("self_attn.q_proj"), q, h, ab))
            .chain(linear(at("self_attn.k_proj"), kv, h, ab))
            .chain(linear(at("self_attn.v_proj"), kv, h, ab))
            .chain(linear(at("self_attn.o_proj"), h, q, ab))
            .chain(norm("post_attention_layernorm"))
            .chain(linear(at("mlp.gate_proj"), i, h, mb))
            .chain(linear(at("mlp.up_proj"), i, h, mb))
            .chain(linear(at("mlp.down_proj"), h, i, mb))
    };
    std::iter::once(spec(
        EMBEDDING.into(),
        vec![config.vocab_size, h],
        Start::Normal,
    ))
    .chain((0..config.num_hidden_layers).flat_map(layer))
    .chain(std::iter::once(spec(NORM.into(), vec![h], Start::Ones)))
}

pub(crate) const EMBEDDING: &str = "model.embed_tokens.weight";
const NORM: &str = "model.norm.weight";
const LM_HEAD: &str = "lm_head.weight";

impl Trunk {
    /// Builds a trunk from its tensors, taken out of `tensors`.
    pub(crate) fn assemble(config: Config, tensors: &mut HashMap<String, Tensor>) -> Result<Self> {
        let mut take = |name: String| {
            tensors
                .remove(&name)
                .ok_or_else(|| Error::Argument(format!("no tensor {name}")))
        };
        let mut linear = |name: String, bias: bool| -> Result<Linear> {
            Ok(Linear {
                weight: take(format!("{name}.weight"))?,
                bias: if bias {
                    Some(take(format!("{name}.bias"))?)
                } else {
                    None
                },
            })
        };
        let mut layers = Vec::new();
        for n in 0..config.num_hidden_layers {
            let at = |part: &str| format!("model.layers.{n}.{part}");
            let (ab, mb) = (config.attention_bias, config.mlp_bias);
            layers.push(Layer {
                input_norm: linear(at("input_layernorm"), false)?.weight,
                q: linear(at("self_attn.q_proj"), ab)?,
                k: linear(at("self_attn.k_proj"), ab)?,
                v: linear(at("self_attn.v_proj"), ab)?,
                o: linear(at("self_attn.o_proj"), ab)?,
                post_norm: linear(at("post_attention_layernorm"), false)?.weight,
                gate: linear(at("mlp.gate_proj"), mb)?,
                up: linear(at("mlp.up_proj"), mb)?,
                down: linear(at("mlp.down_proj"), mb)?,
            });
        }
        let embedding = take(EMBEDDING.into())?;
        let norm = take(NORM.into())?;
        let inverse_frequencies =
            inverse_frequencies(&config, embedding.kind(), embedding.device());
        Ok(Self {
            config,
            embedding,
            layers,
            norm,
            inverse_frequencies,
        })
    }

    pub(crate) fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    pub(crate) fn device(&self) -> Device {
        self.embedding.device()
    }

    /// Hidden states `[N, H]` after the last norm. `capture` sees every layer's rotated keys and
    /// values, `[N, Hkv, D]` each.
    pub(crate) fn forward(
        &self,
        token_ids: &Tensor,
        positions: &Tensor,
        layout: &AttentionLayout,
        capture: &mut dyn FnMut(usize, &Tensor, &Tensor),
    ) -> Result<Tensor> {
        let c = &self.config;
        let (d, eps) = (c.head_dim, c.rms_norm_eps);
        let scale = 1.0 / (d as f64).sqrt();
        let angles = Angles::new(&self.inverse_frequencies, positions, self.kind());
        let mut x = Tensor::f_embedding(&self.embedding, token_ids, -1, false, false)?;
        for (i, layer) in self.layers.iter().enumerate() {
            let normed = x.rms_norm(c.hidden_size, Some(&layer.input_norm), eps);
            let heads = |l: &Linear| l.forward(&normed).view([-1, l.weight.size()[0] / d, d]);
            let q = angles.rotate(&heads(&layer.q));
            let k = angles.rotate(&heads(&layer.k));
            let v = heads(&layer.v);
            capture(i, &k, &v);
            let seen = shared_prefix_attention(&q, &k, &v, layout, scale)?;
            // A new tensor each time: the backward pass still needs the old one.
            x = layer.o.forward(&seen.flatten(1, 2)) + x;
            let normed = x.rms_norm(c.hidden_size, Some(&layer.post_norm), eps);
            let gated = layer.gate.forward(&normed).silu() * layer.up.forward(&normed);
            x = layer.down.forward(&gated) + x;
        }
        Ok(x.rms_norm(c.hidden_size, Some(&self.norm), eps))
    }

    /// [`Trunk::forward`] of a batch, checked against vocabulary and context.
    pub(crate) fn hidden(&self, batch: &DeviceBatch) -> Result<Tensor> {
        batch.check(self.config.vocab_size, self.config.max_position_embeddings)?;
        self.forward(
            &batch.token_ids,
            &batch.positions,
            &batch.layout,
            &mut |_, _, _| {},
        )
    }

    pub(crate) fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut tensors = vec![&self.embedding];
        for l in &self.layers {
            tensors.push(&l.input_norm);
            for linear in [&l.q, &l.k, &l.v, &l.o] {
                tensors.push(&linear.weight);
                tensors.extend(&linear.bias);
            }
            tensors.push(&l.post_norm);
            for linear in [&l.gate, &l.up, &l.down] {
                tensors.push(&linear.weight);
                tensors.extend(&linear.bias);
            }
        }
        tensors.push(&self.norm);
        let names = trunk_specs(&self.config).map(|s| s.name);
        names
            .zip(tensors)
            .map(|(n, t)| (n, t.shallow_clone()))
            .collect()
    }
}

/// A language model of the Llama family.
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
    /// [`Error::Config`] when the configuration is inconsistent, [`Error::Argument`] when `kind` is
    /// no floating-point type, [`Error::Torch`] when memory does not suffice.
    pub fn init(config: Config, seed: u64, device: Device, kind: Kind) -> Result<Self> {
        config.validate()?;
        if !is_float(kind) {
            return Err(Error::Argument(format!(
                "{kind:?} is not a floating-point type"
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
    /// of an existing folder (a tokenizer) stay.
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
        save_folder(
            dir,
            &self.trunk.config,
            &self.parameters(),
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

    /// A copy with weights of its own, which require gradients.
    ///
    /// # Errors
    /// [`Error::Torch`] when memory does not suffice.
    pub fn duplicate(&self) -> Result<Self> {
        let mut tensors = copies(&self.parameters())?;
        Self::assemble(self.trunk.config.clone(), &mut tensors)
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
        Ok(self.hidden(batch)?.linear(&self.lm_head(), None::<Tensor>))
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
        self.trunk.hidden(batch)
    }

    fn lm_head(&self) -> Tensor {
        self.lm_head
            .as_ref()
            .unwrap_or(&self.trunk.embedding)
            .shallow_clone()
    }

    fn parameters(&self) -> Vec<(String, Tensor)> {
        let mut all = self.trunk.parameters();
        all.extend(
            self.lm_head
                .as_ref()
                .map(|t| (LM_HEAD.to_owned(), t.shallow_clone())),
        );
        all
    }
}

fn specs(config: &Config) -> impl Iterator<Item = Spec> + '_ {
    let head = (!config.tie_word_embeddings).then(|| Spec {
        name: LM_HEAD.into(),
        shape: vec![config.vocab_size, config.hidden_size],
        start: Start::Normal,
    });
    trunk_specs(config).chain(head)
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
    let mut load = Load::new(&store);
    for spec in specs() {
        load.expect(&spec.name, &spec.shape);
    }
    let unexpected = load.finish()?;
    let notices = unexpected
        .iter()
        .map(|n| format!("{}: tensor {n} is not used", dir.display()))
        .collect();
    let mut tensors = HashMap::new();
    for spec in specs() {
        let tensor = store.read(&spec.name, options.device, options.kind)?;
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
