//! One token for every live sequence: weights laid out for it, and the key-value cache.
//!
//! All sequences share a timeline: the newest token of every one stands in the same column of the
//! cache, whatever its length, so a step writes one column and reads one contiguous window. A
//! sequence owns the columns from its start on; what lies before is masked. Rotary positions are in
//! the keys already, so columns carry no meaning of their own and may be shifted together.

use tch::{Kind, Tensor};

use crate::causal_lm::CausalLm;
use crate::rope::Angles;
use crate::transformer::{Layer, Linear, Transformer, Trunk};

/// Models up to this size are copied into fused matrices; a larger one is used as it stands.
const MAX_FUSED_PARAMETERS: i64 = 1 << 29;

/// Projections that read the same input.
#[derive(Debug)]
enum Projection {
    Fused {
        transposed: Tensor,
        bias: Option<Tensor>,
    },
    Parts(Vec<(Tensor, Option<Tensor>)>),
}

impl Projection {
    fn new(parts: &[&Linear], fuse: bool) -> Self {
        let bias = |l: &Linear| l.bias.as_ref().map(Tensor::detach);
        if !fuse {
            return Self::Parts(parts.iter().map(|l| (l.weight.detach(), bias(l))).collect());
        }
        let weights: Vec<Tensor> = parts.iter().map(|l| l.weight.detach()).collect();
        let biases: Vec<Tensor> = parts.iter().filter_map(|l| bias(l)).collect();
        Self::Fused {
            transposed: Tensor::cat(&weights, 0).tr().contiguous(),
            bias: (!biases.is_empty()).then(|| Tensor::cat(&biases, 0)),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        match self {
            Self::Fused {
                transposed,
                bias: None,
            } => x.mm(transposed),
            Self::Fused {
                transposed,
                bias: Some(bias),
            } => bias.addmm(x, transposed),
            Self::Parts(parts) => {
                let outs: Vec<Tensor> =
                    parts.iter().map(|(w, b)| x.linear(w, b.as_ref())).collect();
                Tensor::cat(&outs, 1)
            }
        }
    }
}

/// A projection whose result is added to the residual stream.
#[derive(Debug)]
struct Residual {
    transposed: Tensor,
    bias: Option<Tensor>,
}

impl Residual {
    fn new(linear: &Linear, copy: bool) -> Self {
        let t = linear.weight.detach().tr();
        Self {
            transposed: if copy { t.contiguous() } else { t },
            bias: linear.bias.as_ref().map(Tensor::detach),
        }
    }

    fn add(&self, residual: &Tensor, x: &Tensor) -> Tensor {
        let sum = residual.addmm(x, &self.transposed);
        match &self.bias {
            None => sum,
            Some(bias) => sum + bias,
        }
    }
}

#[derive(Debug)]
struct DecodeLayer {
    input_norm: Tensor,
    qkv: Projection,
    o: Residual,
    post_norm: Tensor,
    gate_up: Projection,
    down: Residual,
}

impl DecodeLayer {
    fn new(l: &Layer, fuse: bool) -> Self {
        Self {
            input_norm: l.input_norm.detach(),
            qkv: Projection::new(&[&l.q, &l.k, &l.v], fuse),
            o: Residual::new(&l.o, fuse),
            post_norm: l.post_norm.detach(),
            gate_up: Projection::new(&[&l.gate, &l.up], fuse),
            down: Residual::new(&l.down, fuse),
        }
    }
}

/// A model's weights as a decoding step wants them.
#[derive(Debug)]
pub(crate) struct DecodeWeights {
    embedding: Tensor,
    layers: Vec<DecodeLayer>,
    norm: Tensor,
    /// `[V, H]`.
    head: Tensor,
}

impl DecodeWeights {
    pub(crate) fn new(model: &Transformer) -> Self {
        let _no_grad = tch::no_grad_guard();
        let trunk: &Trunk = model.trunk();
        let fuse = trunk.config.num_parameters() <= MAX_FUSED_PARAMETERS;
        Self {
            embedding: trunk.embedding.detach(),
            layers: trunk
                .layers
                .iter()
                .map(|l| DecodeLayer::new(l, fuse))
                .collect(),
            norm: trunk.norm.detach(),
            head: model.lm_head().detach(),
        }
    }

    /// Logits `[P, V]` of hidden states `[P, H]`.
    pub(crate) fn logits(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.head, None::<Tensor>)
    }
}

/// What a step sees of the cache.
pub(crate) struct Window<'a> {
    /// Rows in use.
    pub(crate) rows: i64,
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
    columns: i64,
}

impl KvCache {
    pub(crate) fn new(trunk: &Trunk, rows: i64, columns: i64) -> crate::Result<Self> {
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
                .collect::<Result<Vec<_>, _>>()
        };
        Ok(Self {
            keys: make()?,
            values: make()?,
            columns,
        })
    }

    pub(crate) fn columns(&self) -> i64 {
        self.columns
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

/// Keys and values of packed prompts, `[N, Hkv, D]` a layer.
#[derive(Debug, Default)]
pub(crate) struct PromptCache {
    pub(crate) keys: Vec<Tensor>,
    pub(crate) values: Vec<Tensor>,
}

impl PromptCache {
    /// The rows of one prompt, on their own.
    pub(crate) fn slice(&self, start: i64, length: i64) -> Self {
        let cut = |list: &[Tensor]| {
            list.iter()
                .map(|t| t.narrow(0, start, length).copy())
                .collect()
        };
        Self {
            keys: cut(&self.keys),
            values: cut(&self.values),
        }
    }
}

/// Logits `[rows, V]` after one more token a row; its keys and values go into the cache.
///
/// # Shapes
/// `ids` i64 `[rows]`, `angles` those of the rows' positions.
pub(crate) fn step(
    trunk: &Trunk,
    weights: &DecodeWeights,
    cache: &KvCache,
    ids: &Tensor,
    angles: &Angles,
    window: &Window<'_>,
) -> Tensor {
    let c = &trunk.config;
    let (n, d, eps) = (window.rows, c.head_dim, c.rms_norm_eps);
    let (hq, hkv) = (c.num_attention_heads, c.num_key_value_heads);
    let width = window.now + 1 - window.from;
    let scale = 1.0 / (d as f64).sqrt();
    let seen = |t: &Tensor| t.narrow(0, 0, n).narrow(2, window.from, width);
    let bias = window.bias.map(|b| {
        b.narrow(3, window.from, width)
            .expand([n, hkv, hq / hkv, width], false)
    });
    let mut x = weights.embedding.index_select(0, ids);
    for (i, layer) in weights.layers.iter().enumerate() {
        let normed = x.rms_norm(c.hidden_size, Some(&layer.input_norm), eps);
        let qkv = layer.qkv.forward(&normed).view([n, hq + 2 * hkv, d]);
        let qk = angles.rotate(&qkv.narrow(1, 0, hq + hkv));
        let (keys, values) = (&cache.keys[i], &cache.values[i]);
        keys.narrow(0, 0, n)
            .select(2, window.now)
            .copy_(&qk.narrow(1, hq, hkv));
        values
            .narrow(0, 0, n)
            .select(2, window.now)
            .copy_(&qkv.narrow(1, hq + hkv, hkv));
        // The query heads that share a key head stand where tokens would: one product serves them.
        let q = qk.narrow(1, 0, hq).view([n, hkv, hq / hkv, d]);
        let mixed = Tensor::scaled_dot_product_attention(
            &q,
            &seen(keys),
            &seen(values),
            bias.as_ref(),
            0.0,
            false,
            scale,
            false,
        );
        x = layer.o.add(&x, &mixed.reshape([n, hq * d]));
        let normed = x.rms_norm(c.hidden_size, Some(&layer.post_norm), eps);
        let gate_up = layer.gate_up.forward(&normed);
        let gated = gate_up.narrow(1, 0, c.intermediate_size).silu()
            * gate_up.narrow(1, c.intermediate_size, c.intermediate_size);
        x = layer.down.add(&x, &gated);
    }
    weights.logits(&x.rms_norm(c.hidden_size, Some(&weights.norm), eps))
}

/// The wide type in which probabilities are computed for weights of `kind`.
pub(crate) fn wide(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}
