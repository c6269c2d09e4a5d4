//! One token for every live sequence: weights laid out for it, and the key-value cache.
//!
//! All sequences share a timeline: the newest token of every one stands in the same column of the
//! cache, whatever its length, so a step writes one column and reads one contiguous window. A
//! sequence owns the columns from its start on; what lies before is masked. Rotary positions are in
//! the keys already, so columns carry no meaning of their own and may be shifted together.
//!
//! In f32 on the CPU the columns hold completions alone: the keys and values of a prompt lie once beside the
//! cache, and all of its samples read them there. Elsewhere every sample has a copy before its own columns.

use rlhf_kernels::decode::{DecodeCache, Prefix, decode_attention, decodes, silu_gate};
use rlhf_kernels::{AttentionLayout, AttentionOptions, Panels, shared_prefix_attention};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::causal_lm::CausalLm;
use crate::config::{Activation, Config};
use crate::error::{Error, Result};
use crate::layers::{First, Layer, Norm, Qkv, activate, normed};
use crate::linear::Linear;
use crate::rope::Angles;
use crate::transformer::Transformer;
use crate::trunk::Trunk;

/// Models up to this size are copied into fused matrices; a larger one is used as it stands.
const MAX_FUSED_PARAMETERS: i64 = 1 << 29;

/// How a [`Decoder`](crate::Decoder) keeps the weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecoderWeights {
    /// In the model's own type: what is sampled is the model's own distribution, to rounding.
    #[default]
    AsLoaded,
    /// The matrices rounded to bf16, products and all else in f32 (f32 models on the CPU): half the bytes
    /// to read for a token, and log-probabilities that differ from the model's by that rounding.
    Bf16,
}

/// How a matrix is laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// The model's own memory.
    Shared,
    /// A fused copy in the model's type.
    Fused,
    /// A fused copy in bf16.
    Bf16,
}

/// Projections that read the same input.
#[derive(Debug)]
enum Projection {
    Fused {
        matrix: Matrix,
        bias: Option<Tensor>,
    },
    Parts(Vec<(Tensor, Option<Tensor>)>),
}

impl Projection {
    fn new(parts: &[&Linear], layout: Layout) -> Result<Self> {
        if layout == Layout::Shared {
            let parts = parts.iter().map(|l| (l.matrix(), l.bias()));
            return Ok(Self::Parts(parts.collect()));
        }
        let weights: Vec<Tensor> = parts.iter().map(|l| l.matrix()).collect();
        let biases: Vec<Tensor> = parts.iter().filter_map(|l| l.bias()).collect();
        Ok(Self::Fused {
            matrix: Matrix::new(&Tensor::cat(&weights, 0), layout)?,
            bias: (!biases.is_empty()).then(|| Tensor::cat(&biases, 0)),
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Fused { matrix, bias: None } => matrix.product(x)?,
            Self::Fused {
                matrix,
                bias: Some(bias),
            } => matrix.product(x)? + bias,
            Self::Parts(parts) => {
                let outs: Vec<Tensor> =
                    parts.iter().map(|(w, b)| x.linear(w, b.as_ref())).collect();
                Tensor::cat(&outs, 1)
            }
        })
    }
}

/// A weight laid out for products with few rows.
#[derive(Debug)]
enum Matrix {
    /// On the CPU: f32 or bf16, products in f32.
    Panels(Panels),
    /// `[in, out]`; on other devices and in other types.
    Transposed(Tensor),
}

impl Matrix {
    /// From a weight `[out, in]`.
    fn new(weight: &Tensor, layout: Layout) -> Result<Self> {
        let kind = weight.kind();
        let packed = weight.device() == Device::Cpu && matches!(kind, Kind::Float | Kind::BFloat16);
        Ok(match layout {
            Layout::Shared => Self::Transposed(weight.tr()),
            Layout::Bf16 => Self::Panels(Panels::pack(&weight.to_kind(Kind::BFloat16))?),
            Layout::Fused if packed => Self::Panels(Panels::pack(weight)?),
            Layout::Fused => Self::Transposed(weight.tr().contiguous()),
        })
    }

    fn product(&self, x: &Tensor) -> Result<Tensor> {
        Ok(match self {
            Self::Panels(panels) => panels.product(&x.to_kind(Kind::Float))?.to_kind(x.kind()),
            Self::Transposed(t) => x.mm(t),
        })
    }
}

/// `x` through a norm that may not be there.
fn norm(norm: Option<&Norm>, x: &Tensor) -> Result<Tensor> {
    norm.map_or_else(|| Ok(x.shallow_clone()), |n| n.decode(x))
}

/// A projection whose result is added to the residual stream, after a norm in some families.
#[derive(Debug)]
struct Residual {
    product: Projection,
    norm: Option<Norm>,
}

impl Residual {
    fn new(linear: &Linear, norm: Option<&Norm>, layout: Layout) -> Result<Self> {
        Ok(Self {
            product: Projection::new(&[linear], layout)?,
            norm: norm.map(Norm::frozen),
        })
    }

    fn add(&self, residual: &Tensor, x: &Tensor) -> Result<Tensor> {
        Ok(norm(self.norm.as_ref(), &self.product.forward(x)?)? + residual)
    }
}

#[derive(Debug)]
struct DecodeLayer {
    input_norm: Option<Norm>,
    qkv: Projection,
    q_norm: Option<Norm>,
    k_norm: Option<Norm>,
    o: Residual,
    mlp_norm: Option<Norm>,
    /// The gate's outputs before the other half's, where there is a gate.
    up: Projection,
    gated: bool,
    activation: Activation,
    down: Residual,
    options: AttentionOptions,
    rope: Option<usize>,
}

impl DecodeLayer {
    fn new(l: &Layer, layout: Layout) -> Result<Self> {
        let frozen = |norm: &Option<Norm>| norm.as_ref().map(Norm::frozen);
        let qkv = match &l.qkv {
            Qkv::Apart(three) => Projection::new(&three.each_ref(), layout)?,
            Qkv::Together(all) => Projection::new(&[all], layout)?,
        };
        let (up, gated) = match &l.mlp.first {
            First::Gated { gate, up } => (Projection::new(&[gate, up], layout)?, true),
            First::GateUp(both) => (Projection::new(&[both], layout)?, true),
            First::Plain(up) => (Projection::new(&[up], layout)?, false),
        };
        Ok(Self {
            input_norm: frozen(&l.input_norm),
            qkv,
            q_norm: frozen(&l.q_norm),
            k_norm: frozen(&l.k_norm),
            o: Residual::new(&l.o, l.attention_norm.as_ref(), layout)?,
            mlp_norm: frozen(&l.mlp_norm),
            up,
            gated,
            activation: l.mlp.activation,
            down: Residual::new(&l.mlp.down, l.mlp_out_norm.as_ref(), layout)?,
            options: l.options,
            rope: l.rope,
        })
    }

    /// Queries and keys `[n, Hq + Hkv, D]`, normed and not yet rotated, and values `[n, Hkv, D]`.
    fn heads(&self, c: &Config, x: &Tensor) -> Result<(Tensor, Tensor)> {
        let (n, d) = (x.size()[0], c.head_dim);
        let (hq, hkv) = (c.num_attention_heads, c.num_key_value_heads);
        let all = self.qkv.forward(x)?;
        let values = all.narrow(1, (hq + hkv) * d, hkv * d).reshape([n, hkv, d]);
        let qk = if self.q_norm.is_none() && self.k_norm.is_none() {
            all.narrow(1, 0, (hq + hkv) * d).reshape([n, hq + hkv, d])
        } else {
            let part = |from: i64, heads: i64, norm: &Option<Norm>| {
                let flat = all.narrow(1, from * d, heads * d);
                let split = |t: Tensor| t.reshape([n, heads, d]);
                if c.family.shape().whole_qk_norm {
                    split(normed(norm.as_ref(), flat))
                } else {
                    normed(norm.as_ref(), split(flat))
                }
            };
            Tensor::cat(&[part(0, hq, &self.q_norm), part(hq, hkv, &self.k_norm)], 1)
        };
        Ok((qk, values))
    }

    /// Attention of the model's layer `index`: heads, the cache, and what is mixed of it, `[n, Hq · D]`.
    fn attend(
        &self,
        index: usize,
        c: &Config,
        x: &Tensor,
        angles: &[Angles],
        cache: &KvCache,
        window: &Window<'_>,
    ) -> Result<Tensor> {
        let (keys, values) = (&cache.keys[index], &cache.values[index]);
        let (n, d) = (window.starts.len() as i64, c.head_dim);
        let (hq, hkv) = (c.num_attention_heads, c.num_key_value_heads);
        let (qk, v) = self.heads(c, x)?;
        let angles = self.rope.map(|which| &angles[which]);
        if decodes(&qk) {
            let mut prefixes = Vec::with_capacity(window.prompts.len());
            for prompt in window.prompts {
                prefixes.push(prompt.map(|p| Prefix {
                    keys: &p.keys[index],
                    values: &p.values[index],
                }));
            }
            let cache = DecodeCache {
                keys,
                values,
                starts: window.starts,
                prefixes: &prefixes,
                now: window.now,
            };
            let (q, k) = (qk.narrow(1, 0, hq), qk.narrow(1, hq, hkv));
            let rope = angles.map(Angles::parts);
            return Ok(decode_attention(&q, &k, &v, rope, &cache, &self.options)?);
        }
        let qk = angles.map_or_else(|| Ok(qk.shallow_clone()), |a| a.rotate(&qk))?;
        let now = |t: &Tensor| t.narrow(0, 0, n).select(2, window.now);
        now(keys).copy_(&qk.narrow(1, hq, hkv));
        now(values).copy_(&v);
        // All of a sequence stands without gaps before the newest column: a sliding window of
        // tokens is one of columns.
        let slid = self.options.window.map_or(0, |w| window.now + 1 - w);
        let from = window.from.max(slid);
        let width = window.now + 1 - from;
        let seen = |t: &Tensor| t.narrow(0, 0, n).narrow(2, from, width);
        let bias = window.bias.map(|b| {
            b.narrow(3, from, width)
                .expand([n, hkv, hq / hkv, width], false)
        });
        // The query heads that share a key head stand where tokens would: one product serves them.
        let q = qk.narrow(1, 0, hq).reshape([n, hkv, hq / hkv, d]);
        let mixed = attend(&q, &seen(keys), &seen(values), bias.as_ref(), &self.options);
        Ok(mixed.reshape([n, hq * d]))
    }
}

impl DecodeLayer {
    /// The residual stream after what attention mixed and the feed-forward block.
    fn after(&self, c: &Config, x: &Tensor, mixed: &Tensor) -> Result<Tensor> {
        let x = self.o.add(x, mixed)?;
        let input = norm(self.mlp_norm.as_ref(), &x)?;
        let up = self.up.forward(&input)?;
        let inner = match (self.gated, self.activation) {
            (true, Activation::Silu) if decodes(&up) => silu_gate(&up)?,
            (true, activation) => {
                let half = c.intermediate_size;
                activate(activation, &up.narrow(1, 0, half)) * up.narrow(1, half, half)
            }
            (false, activation) => activate(activation, &up),
        };
        self.down.add(&x, &inner)
    }
}

/// A model's weights as a decoding step wants them.
#[derive(Debug)]
pub(crate) struct DecodeWeights {
    layers: Vec<DecodeLayer>,
    norm: Norm,
    head: Matrix,
    softcap: Option<f64>,
    /// Everything is f32 on the CPU, the matrices are in panels.
    panels: bool,
}

impl DecodeWeights {
    pub(crate) fn new(model: &Transformer, weights: DecoderWeights) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let trunk: &Trunk = model.trunk();
        let layout = match weights {
            DecoderWeights::Bf16 => {
                let (kind, device) = (trunk.kind(), trunk.device());
                let fits = matches!(kind, Kind::Float | Kind::BFloat16) && device == Device::Cpu;
                if !fits {
                    return Err(Error::Argument(format!(
                        "decoding weights in bf16 are for f32 models on the CPU, this one is {kind:?} on {device:?}; load it in bf16"
                    )));
                }
                Layout::Bf16
            }
            DecoderWeights::AsLoaded if trunk.config.num_parameters() <= MAX_FUSED_PARAMETERS => {
                Layout::Fused
            }
            DecoderWeights::AsLoaded => Layout::Shared,
        };
        Ok(Self {
            layers: trunk
                .layers
                .iter()
                .map(|l| DecodeLayer::new(l, layout))
                .collect::<Result<_>>()?,
            norm: trunk.norm.frozen(),
            head: Matrix::new(&model.lm_head().detach(), layout)?,
            softcap: model.logit_softcap(),
            panels: layout != Layout::Shared
                && trunk.kind() == Kind::Float
                && trunk.device() == Device::Cpu,
        })
    }

    /// Logits `[P, V]` of hidden states `[P, H]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        let logits = self.head.product(hidden)?;
        Ok(match self.softcap {
            Some(cap) => (logits / cap).tanh() * cap,
            None => logits,
        })
    }
}

/// What a step sees of the cache.
pub(crate) struct Window<'a> {
    /// The first column of every row in use.
    pub(crate) starts: &'a [i64],
    /// What each row's sequence began with, where prompts are shared; else nothing.
    pub(crate) prompts: &'a [Option<&'a PromptCache>],
    /// The first column that anybody owns.
    pub(crate) from: i64,
    /// The column that the step writes.
    pub(crate) now: i64,
    /// 0 or −inf `[rows, 1, 1, columns]`; `None` when every row owns the whole window.
    pub(crate) bias: Option<&'a Tensor>,
}

/// Keys and values of every layer, `[rows, Hkv, columns, D]`.
#[derive(Debug)]
pub(crate) struct KvCache {
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
}

impl KvCache {
    pub(crate) fn new(trunk: &Trunk, rows: i64, columns: i64) -> Result<Self> {
        let c = &trunk.config;
        // Zeros: a masked column has weight 0, and 0 times stray bits could be NaN.
        let one = || {
            Tensor::f_zeros(
                [rows, c.num_key_value_heads, columns, c.head_dim],
                (trunk.kind(), trunk.device()),
            )
        };
        let make = || {
            trunk
                .layers
                .iter()
                .map(|_| one())
                .collect::<std::result::Result<Vec<_>, _>>()
        };
        Ok(Self {
            keys: make()?,
            values: make()?,
        })
    }

    fn all(&self) -> impl Iterator<Item = &Tensor> {
        self.keys.iter().chain(&self.values)
    }

    /// Writes prompts into `rows` new rows from row `first` on, ending before column `now`.
    /// `index` i64 `[rows · length]` names the packed row of every cell.
    pub(crate) fn place(
        &self,
        prompts: &PromptCache,
        index: &Tensor,
        first: i64,
        rows: i64,
        now: i64,
    ) {
        let length = index.size()[0] / rows;
        for (cache, packed) in self.all().zip(prompts.keys.iter().chain(&prompts.values)) {
            let size = packed.size();
            let cells = packed
                .index_select(0, index)
                .view([rows, length, size[1], size[2]]);
            let mut target = cache.narrow(0, first, rows).narrow(2, now - length, length);
            target.copy_(&cells.transpose(1, 2));
        }
    }

    /// Copies rows `from` onto rows `to` (i64 lists), within columns `start..end`.
    pub(crate) fn move_rows(&self, from: &Tensor, to: &Tensor, start: i64, end: i64) {
        for cache in self.all() {
            let mut window = cache.narrow(2, start, end - start);
            let moved = window.index_select(0, from);
            let _ = window.index_copy_(0, to, &moved);
        }
    }

    /// Moves columns `start..end` of the first `rows` rows so that they end at `new_end`.
    pub(crate) fn shift(&self, rows: i64, start: i64, end: i64, new_end: i64) {
        let width = end - start;
        for cache in self.all() {
            let cache = cache.narrow(0, 0, rows);
            let copy = cache.narrow(2, start, width).copy();
            cache.narrow(2, new_end - width, width).copy_(&copy);
        }
    }
}

/// Keys and values a layer: of packed prompts `[N, Hkv, D]`, of one that is shared `[Hkv, N, D]`.
#[derive(Debug, Default)]
pub(crate) struct PromptCache {
    pub(crate) keys: Vec<Tensor>,
    pub(crate) values: Vec<Tensor>,
}

impl PromptCache {
    /// The rows of one prompt, on their own.
    pub(crate) fn slice(&self, start: i64, length: i64) -> Self {
        self.cut(|t| t.narrow(0, start, length).copy())
    }

    /// The rows of one prompt as decoding shares them.
    pub(crate) fn shared(&self, start: i64, length: i64) -> Self {
        self.cut(|t| t.narrow(0, start, length).transpose(0, 1).contiguous())
    }

    fn cut(&self, cut: impl Fn(&Tensor) -> Tensor) -> Self {
        Self {
            keys: self.keys.iter().map(&cut).collect(),
            values: self.values.iter().map(&cut).collect(),
        }
    }
}

/// Logits `[rows, V]` after one more token a row; its keys and values go into the cache.
///
/// # Shapes
/// `ids` and `positions` i64 `[rows]`, `angles` those of the positions, one for each of the trunk's
/// ropes.
pub(crate) fn step(
    trunk: &Trunk,
    weights: &DecodeWeights,
    cache: &KvCache,
    ids: &Tensor,
    positions: &Tensor,
    angles: &[Angles],
    window: &Window<'_>,
) -> Result<Tensor> {
    let c = &trunk.config;
    let mut x = trunk.embed(ids, positions, trunk.config.tie_word_embeddings)?;
    for (i, layer) in weights.layers.iter().enumerate() {
        let input = norm(layer.input_norm.as_ref(), &x)?;
        let mixed = layer.attend(i, c, &input, angles, cache, window)?;
        x = layer.after(c, &x, &mixed)?;
    }
    weights.logits(&weights.norm.decode(&x)?)
}

/// Hidden states `[N, H]` of packed prompts, and their keys and values. In f32 on the CPU panels serve
/// many rows as well as few, and a row's result does not depend on the others; in other types and on other
/// devices the model's own pass is made.
pub(crate) fn prompts(
    trunk: &Trunk,
    weights: &DecodeWeights,
    ids: &Tensor,
    positions: &Tensor,
    layout: &AttentionLayout,
) -> Result<(Tensor, PromptCache)> {
    let mut cache = PromptCache::default();
    if !weights.panels {
        let hidden = trunk.forward(ids, positions, layout, &mut |k, v| {
            cache.keys.push(k.shallow_clone());
            cache.values.push(v.shallow_clone());
        })?;
        return Ok((hidden, cache));
    }
    let c = &trunk.config;
    let (hq, hkv) = (c.num_attention_heads, c.num_key_value_heads);
    let angles = trunk.angles(positions);
    let mut x = trunk.embed(ids, positions, trunk.config.tie_word_embeddings)?;
    for layer in &weights.layers {
        let (qk, v) = layer.heads(c, &norm(layer.input_norm.as_ref(), &x)?)?;
        let qk = match layer.rope {
            Some(which) => angles[which].rotate(&qk)?,
            None => qk,
        };
        // Copies: the cache must not hold on to the queries.
        let (k, v) = (qk.narrow(1, hq, hkv).copy(), v.copy());
        let q = qk.narrow(1, 0, hq);
        let mixed = shared_prefix_attention(&q, &k, &v, layout, &layer.options)?;
        x = layer.after(c, &x, &mixed.flatten(1, 2))?;
        cache.keys.push(k);
        cache.values.push(v);
    }
    Ok((weights.norm.decode(&x)?, cache))
}

/// Attention of one token a sequence: `q` `[n, Hkv, Hq / Hkv, D]` over `[n, Hkv, columns, D]`.
fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    bias: Option<&Tensor>,
    options: &AttentionOptions,
) -> Tensor {
    let scale = options.scale;
    let Some(cap) = options.softcap else {
        // On a GPU libtorch's kernel wants a bias that begins at 16 bytes, and does not ask: a slice may not.
        let copied = bias.filter(|_| q.device() != Device::Cpu).map(Tensor::copy);
        let bias = copied.as_ref().or(bias);
        return Tensor::scaled_dot_product_attention(q, k, v, bias, 0.0, false, scale, false);
    };
    let scores = q.matmul(&k.transpose(2, 3)).to_kind(wide(q.kind())) * (scale / cap);
    let mut scores = scores.tanh() * cap;
    if let Some(bias) = bias {
        scores += bias;
    }
    scores.softmax(-1, None::<Kind>).to_kind(q.kind()).matmul(v)
}

/// The wide type in which probabilities are computed for weights of `kind`.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}
