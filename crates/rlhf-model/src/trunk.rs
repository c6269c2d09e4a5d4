//! Everything of a model below its head: which tensors it has, and its pass over packed batches.

use std::collections::HashMap;
use std::rc::Rc;

use rlhf_kernels::{AttentionLayout, recompute};
use tch::{Device, Kind, Tensor};

use crate::adapter::{AdapterConfig, adapter_tensors};
use crate::batch::DeviceBatch;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::family::{NormKind, Part};
use crate::layers::{Layer, Norm, SCALES, at, take_norm};
use crate::linear::{Linear, quantise};
use crate::rope::{Angles, Rope};
use crate::transformer::{copies, freeze};

/// How a tensor starts in a model trained from scratch.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Start {
    Normal,
    Zeros,
    Ones,
}

/// A tensor that a model consists of.
pub(crate) struct Spec {
    pub(crate) name: String,
    pub(crate) shape: Vec<i64>,
    pub(crate) start: Start,
}

impl Spec {
    pub(crate) fn new(name: impl Into<String>, shape: Vec<i64>, start: Start) -> Self {
        Self {
            name: name.into(),
            shape,
            start,
        }
    }
}

/// The tensors of a norm over `size` numbers.
fn norm_specs(config: &Config, name: &str, size: i64) -> Vec<Spec> {
    let kind = config.family.shape().norm;
    let start = match kind {
        NormKind::RmsPlusOne => Start::Zeros,
        NormKind::Rms | NormKind::Layer => Start::Ones,
    };
    let mut all = vec![Spec::new(format!("{name}.weight"), vec![size], start)];
    if kind == NormKind::Layer {
        all.push(Spec::new(format!("{name}.bias"), vec![size], Start::Zeros));
    }
    all
}

/// The tensors of one part of layer `n`.
fn part_specs(c: &Config, n: i64, part: Part, name: &str) -> Vec<Spec> {
    let shape = c.family.shape();
    let name = format!("{}.{n}.{name}", shape.layers);
    let (h, i, d) = (c.hidden_size, c.intermediate_size, c.head_dim);
    let (q, kv) = (c.num_attention_heads * d, c.num_key_value_heads * d);
    let (out, from, bias) = match part {
        Part::InputNorm | Part::AttentionNorm | Part::MlpNorm | Part::MlpOutNorm => {
            return norm_specs(c, &name, h);
        }
        Part::QNorm => return norm_specs(c, &name, if shape.whole_qk_norm { q } else { d }),
        Part::KNorm => return norm_specs(c, &name, if shape.whole_qk_norm { kv } else { d }),
        Part::Q => (q, h, c.qkv_bias),
        Part::K | Part::V => (kv, h, c.qkv_bias),
        Part::Qkv => (q + 2 * kv, h, c.qkv_bias),
        Part::O => (h, q, c.output_bias),
        Part::Gate | Part::Up => (i, h, c.mlp_bias),
        Part::GateUp => (2 * i, h, c.mlp_bias),
        Part::Down => (h, i, c.mlp_bias),
    };
    let size = if shape.transposed {
        vec![from, out]
    } else {
        vec![out, from]
    };
    let mut all = vec![Spec::new(format!("{name}.weight"), size, Start::Normal)];
    if bias {
        all.push(Spec::new(format!("{name}.bias"), vec![out], Start::Zeros));
    }
    all
}

fn layer_specs(c: &Config, n: i64) -> impl Iterator<Item = Spec> + '_ {
    let parts = c.family.shape().parts.iter();
    parts.flat_map(move |(part, name)| part_specs(c, n, *part, name))
}

/// What stands before the layers.
fn embedding_specs(c: &Config) -> impl Iterator<Item = Spec> {
    let shape = c.family.shape();
    let table = |name: &str, rows| {
        Spec::new(
            format!("{name}.weight"),
            vec![rows, c.hidden_size],
            Start::Normal,
        )
    };
    let positions = shape.positions.map(|p| table(p, c.max_position_embeddings));
    std::iter::once(table(shape.embedding, c.vocab_size)).chain(positions)
}

/// The tensors of a trunk, in the order of [`crate::CausalLm::parameters`].
pub(crate) fn trunk_specs(config: &Config) -> impl Iterator<Item = Spec> + '_ {
    let layers = (0..config.num_hidden_layers).flat_map(|n| layer_specs(config, n));
    let last = norm_specs(config, config.family.shape().final_norm, config.hidden_size);
    embedding_specs(config).chain(layers).chain(last)
}

/// Number of weights of a trunk, without making a list of a billion layers.
pub(crate) fn num_parameters(config: &Config) -> i128 {
    // In i128: the largest sizes that pass validation would overflow an i64.
    let count = |specs: &mut dyn Iterator<Item = Spec>| -> i128 {
        specs
            .map(|s| s.shape.iter().map(|&d| i128::from(d)).product::<i128>())
            .sum()
    };
    let last = norm_specs(config, config.family.shape().final_norm, config.hidden_size);
    count(&mut embedding_specs(config).chain(last))
        + count(&mut layer_specs(config, 0)) * i128::from(config.num_hidden_layers)
}

/// Everything below the head.
#[derive(Debug)]
pub(crate) struct Trunk {
    pub(crate) config: Config,
    pub(crate) embedding: Tensor,
    /// Learned positions.
    pub(crate) positions: Option<Tensor>,
    pub(crate) layers: Vec<Layer>,
    pub(crate) norm: Norm,
    ropes: Vec<Rope>,
    /// All tensors but adapters, by their names; eight-bit weights as codes and scales.
    weights: Vec<(String, Tensor)>,
    pub(crate) adapter: Option<AdapterConfig>,
    /// So many layers are run again together in backward instead of being kept; 0 keeps all.
    pub(crate) recompute_every: usize,
}

impl Trunk {
    /// Builds a trunk from its tensors, taken out of `tensors`.
    pub(crate) fn assemble(config: Config, tensors: &mut HashMap<String, Tensor>) -> Result<Self> {
        let shape = config.family.shape();
        let mut weights = Vec::new();
        for spec in trunk_specs(&config) {
            let tensor = tensors
                .get(&spec.name)
                .ok_or_else(|| Error::Argument(format!("no tensor {}", spec.name)))?;
            let scales = spec.name.strip_suffix(".weight").and_then(|module| {
                let name = format!("{module}{SCALES}");
                let scales = tensors.get(&name)?.shallow_clone();
                Some((name, scales))
            });
            weights.push((spec.name, tensor.shallow_clone()));
            weights.extend(scales);
        }
        let embedding = weights[0].1.shallow_clone();
        let positions = shape.positions.map(|_| weights[1].1.shallow_clone());
        let layers = (0..config.num_hidden_layers)
            .map(|n| Layer::assemble(&config, n, tensors))
            .collect::<Result<_>>()?;
        let norm = take_norm(&config, shape.final_norm, tensors)?;
        let ropes = Rope::of(&config, embedding.kind(), embedding.device());
        Ok(Self {
            config,
            embedding,
            positions,
            layers,
            norm,
            ropes,
            weights,
            adapter: None,
            recompute_every: 0,
        })
    }

    pub(crate) fn kind(&self) -> Kind {
        self.embedding.kind()
    }

    pub(crate) fn device(&self) -> Device {
        self.embedding.device()
    }

    /// The rotations of `positions` (i64 `[N]`), one for each rope.
    pub(crate) fn angles(&self, positions: &Tensor) -> Vec<Angles> {
        self.ropes
            .iter()
            .map(|rope| Angles::new(rope, positions, self.kind()))
            .collect()
    }

    /// What enters the first layer, `[N, H]`. With `tied` the embedding is the output matrix as well.
    pub(crate) fn embed(
        &self,
        token_ids: &Tensor,
        positions: &Tensor,
        tied: bool,
    ) -> Result<Tensor> {
        let mut x = if tied {
            // Its gradient has all rows anyway, and adding to them row by row would only cost pages.
            Tensor::f_embedding(&self.embedding, token_ids, -1, false, false)?
        } else {
            rlhf_kernels::layer::embedding(&self.embedding, token_ids)?
        };
        if self.config.family.shape().scaled_embedding {
            // Rounded to the weights' type, as the models were trained.
            let root = Tensor::from((self.config.hidden_size as f64).sqrt()).to_kind(self.kind());
            x *= root.to_device(self.device());
        }
        if let Some(table) = &self.positions {
            x += Tensor::f_embedding(table, positions, -1, false, false)?;
        }
        Ok(x)
    }

    /// Hidden states `[N, H]` after the last norm. `capture` sees every layer's rotated keys and values, `[N, Hkv, D]`
    /// each.
    pub(crate) fn forward(
        &self,
        token_ids: &Tensor,
        positions: &Tensor,
        layout: &AttentionLayout,
        capture: &mut dyn FnMut(&Tensor, &Tensor),
    ) -> Result<Tensor> {
        let x = self.embed(token_ids, positions, self.config.tie_word_embeddings)?;
        self.above(x, positions, layout, None, capture)
    }

    /// [`Trunk::forward`] of rows that are embedded already, or of it `rows` alone.
    fn above(
        &self,
        mut x: Tensor,
        positions: &Tensor,
        layout: &AttentionLayout,
        rows: Option<&Tensor>,
        capture: &mut dyn FnMut(&Tensor, &Tensor),
    ) -> Result<Tensor> {
        let angles = self.angles(positions);
        if self.recompute_every > 0 && grad_enabled() {
            let x = at(self.recomputed(x, angles, layout)?, rows)?;
            return Ok(self.norm.forward(&x));
        }
        let Some((last, layers)) = self.layers.split_last() else {
            return Ok(self.norm.forward(&at(x, rows)?));
        };
        for layer in layers {
            x = layer.forward(&self.config, x, &angles, layout, None, capture)?;
        }
        x = last.forward(&self.config, x, &angles, layout, rows, capture)?;
        Ok(self.norm.forward(&x))
    }

    /// The layers, of which only every n-th input is kept for backward.
    fn recomputed(
        &self,
        x: Tensor,
        angles: Vec<Angles>,
        layout: &AttentionLayout,
    ) -> Result<Tensor> {
        // Adapters get gradients through an input that wants one; a frozen embedding's does not.
        let mut x = if x.requires_grad() {
            x
        } else {
            x.detach().set_requires_grad(true)
        };
        let shared = Rc::new((self.config.clone(), angles, layout.clone()));
        for block in self.layers.chunks(self.recompute_every) {
            let layers: Vec<Layer> = block.iter().map(Layer::share).collect();
            let shared = shared.clone();
            x = recompute(&[&x], move |x| {
                let (config, angles, layout) = &*shared;
                let forward = layers.iter().try_fold(x[0].shallow_clone(), |x, layer| {
                    layer.forward(config, x, angles, layout, None, &mut |_, _| {})
                });
                // `recompute` turns this into an error.
                forward.unwrap_or_else(|e| panic!("{e}"))
            })?;
        }
        Ok(x)
    }

    /// [`Trunk::forward`] of a batch, or of it `rows` alone, checked against vocabulary and context; `tied` as in
    /// [`Trunk::embed`].
    pub(crate) fn hidden(
        &self,
        batch: &DeviceBatch,
        rows: Option<&Tensor>,
        tied: bool,
    ) -> Result<Tensor> {
        batch.check(self.config.vocab_size, self.config.max_position_embeddings)?;
        let mut x = self.embed(&batch.token_ids, &batch.positions, tied)?;
        if let Some(noise) = &batch.embedding_noise {
            if noise.size() != x.size() {
                return Err(Error::Shape {
                    op: "embedding noise",
                    expected: format!("{:?}", x.size()),
                    found: noise.size(),
                });
            }
            x += noise.to_kind(self.kind());
        }
        self.above(x, &batch.positions, &batch.layout, rows, &mut |_, _| {})
    }

    /// The matrices of all layers.
    pub(crate) fn linears(&self) -> impl Iterator<Item = &Linear> {
        self.layers.iter().flat_map(Layer::linears)
    }

    pub(crate) fn each_linear(
        &mut self,
        change: &mut dyn FnMut(&mut Linear) -> Result<()>,
    ) -> Result<()> {
        self.layers
            .iter_mut()
            .flat_map(Layer::linears_mut)
            .try_for_each(change)
    }

    /// What is trained: the adapter where there is one, else every tensor by its name in the files.
    pub(crate) fn trainable(&self) -> Vec<(String, Tensor)> {
        if self.adapter.is_some() {
            return self.linears().flat_map(adapter_tensors).collect();
        }
        let list = self.weights.iter();
        list.map(|(n, t)| (n.clone(), t.shallow_clone())).collect()
    }

    /// What a file holds: every tensor by its name, adapters merged, eight bits widened.
    pub(crate) fn stored(&self) -> Vec<(String, Tensor)> {
        let changed: HashMap<String, Tensor> = self
            .linears()
            .filter_map(|l| Some((format!("{}.weight", l.name), l.stored()?)))
            .collect();
        let list = self.weights.iter().filter(|(n, _)| !n.ends_with(SCALES));
        list.map(|(n, t)| (n.clone(), changed.get(n).unwrap_or(t).shallow_clone()))
            .collect()
    }

    /// The same trunk without adapters, its tensors shared.
    pub(crate) fn base(&self) -> Result<Self> {
        let list = self.weights.iter();
        let mut tensors = list.map(|(n, t)| (n.clone(), t.shallow_clone())).collect();
        self.rebuilt(&mut tensors)
    }

    /// A trunk with these tensors and the settings of this one.
    fn rebuilt(&self, tensors: &mut HashMap<String, Tensor>) -> Result<Self> {
        Ok(Self {
            recompute_every: self.recompute_every,
            ..Self::assemble(self.config.clone(), tensors)?
        })
    }

    /// A copy: of everything, or of the adapter alone where the rest is frozen.
    pub(crate) fn duplicate(&self) -> Result<Self> {
        if let Some(adapter) = &self.adapter {
            return self.duplicate_adapted(adapter);
        }
        self.rebuilt(&mut copies(&self.trainable())?)
    }

    /// Nothing but adapters will get gradients.
    pub(crate) fn freeze(&self) {
        for (_, t) in &self.weights {
            freeze(t);
        }
    }

    /// Keeps the matrices of the layers in eight bits, frozen like everything else.
    pub(crate) fn quantise(&self) -> Result<Self> {
        let mut tensors: HashMap<String, Tensor> = HashMap::new();
        for (name, t) in &self.weights {
            tensors.insert(name.clone(), t.detach());
        }
        for linear in self.linears() {
            let (codes, scales) = quantise(&linear.name, &linear.matrix())?;
            tensors.insert(format!("{}.weight", linear.name), codes);
            tensors.insert(format!("{}{SCALES}", linear.name), scales);
        }
        self.rebuilt(&mut tensors)
    }
}

/// Whether operations are recorded for a backward pass.
fn grad_enabled() -> bool {
    let probe = Tensor::zeros(0, (Kind::Float, Device::Cpu)).set_requires_grad(true);
    (probe * 1.0).requires_grad()
}
