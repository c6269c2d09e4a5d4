//! The families of models, each described by a table: how its files name the tensors, where its norms
//! stand, and which keys of `config.json` are its own. One [`crate::transformer`] runs them all.

mod gemma;
mod gpt2;
mod llama;
mod olmo2;
mod phi3;
mod qwen;
mod smollm3;

use serde_json::{Map, Value};

use crate::config::{Activation, Config, Reader};
use crate::error::Result;

/// A family of models.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Family {
    /// Llama 2 and 3, SmolLM and whoever calls itself so.
    #[default]
    Llama,
    /// Mistral: Llama with a sliding window.
    Mistral,
    /// Qwen 2 and 2.5: biases on queries, keys and values.
    Qwen2,
    /// Qwen 3: a norm on every query and key head.
    Qwen3,
    /// GPT-2: learned positions, layer norms with biases, transposed matrices.
    Gpt2,
    /// Gemma 2: soft caps, alternating windows, norms before and after each block.
    Gemma2,
    /// Gemma 3, text only: two rotary bases, norms on queries and keys.
    Gemma3,
    /// OLMo 2: norms after each block only, and over all of queries and keys.
    Olmo2,
    /// Phi-3: fused projections.
    Phi3,
    /// SmolLM 3: every fourth layer without rotary positions.
    SmolLm3,
}

/// A tensor's role within a layer, in the order that parameters are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    InputNorm,
    Q,
    K,
    V,
    /// The three above, one under the other.
    Qkv,
    QNorm,
    KNorm,
    O,
    /// Of the attention's result, before it joins the residual stream.
    AttentionNorm,
    /// Of the feed-forward block's input.
    MlpNorm,
    Gate,
    Up,
    /// The two above, one under the other.
    GateUp,
    Down,
    /// Of the feed-forward block's result.
    MlpOutNorm,
}

/// What a norm computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NormKind {
    /// w · x / rms(x).
    Rms,
    /// (1 + w) · x / rms(x).
    RmsPlusOne,
    /// w · (x − mean) / std + b.
    Layer,
}

/// What tells a family from the others.
#[derive(Debug)]
pub(crate) struct Shape {
    /// `model_type` in `config.json`.
    pub(crate) model_type: &'static str,
    /// `architectures` of a language model.
    pub(crate) causal_lm: &'static str,
    /// `architectures` of a model with one number as its head.
    pub(crate) scalar: &'static str,
    pub(crate) embedding: &'static str,
    /// Learned positions.
    pub(crate) positions: Option<&'static str>,
    /// Before the layer's number.
    pub(crate) layers: &'static str,
    pub(crate) final_norm: &'static str,
    pub(crate) parts: &'static [(Part, &'static str)],
    pub(crate) norm: NormKind,
    /// Matrices are stored `[in, out]`.
    pub(crate) transposed: bool,
    /// The norms of queries and keys run over all heads together, not over each.
    pub(crate) whole_qk_norm: bool,
    /// The embedding is multiplied by √H.
    pub(crate) scaled_embedding: bool,
    /// What it calls the common keys of `config.json`, where it differs.
    pub(crate) aliases: &'static [(&'static str, &'static str)],
    /// What absent keys mean.
    pub(crate) key_value_heads: Option<i64>,
    pub(crate) head_dim: Option<i64>,
    pub(crate) norm_eps: f64,
    pub(crate) context: i64,
    pub(crate) rope_theta: f64,
    pub(crate) tied: bool,
    pub(crate) activation: Activation,
    /// Reads what is the family's own into a configuration that holds the common keys.
    pub(crate) read: fn(&Reader<'_>, &mut Config) -> Result<()>,
    /// Adds the family's own keys.
    pub(crate) write: fn(&Config, &mut Map<String, Value>),
}

impl Shape {
    /// The name of a part, below its layer.
    pub(crate) fn name(&self, part: Part) -> Option<&'static str> {
        self.parts.iter().find(|(p, _)| *p == part).map(|(_, n)| *n)
    }
}

/// The parts of a Llama, which most families start from.
const LLAMA_PARTS: [(Part, &str); 9] = [
    (Part::InputNorm, "input_layernorm"),
    (Part::Q, "self_attn.q_proj"),
    (Part::K, "self_attn.k_proj"),
    (Part::V, "self_attn.v_proj"),
    (Part::O, "self_attn.o_proj"),
    (Part::MlpNorm, "post_attention_layernorm"),
    (Part::Gate, "mlp.gate_proj"),
    (Part::Up, "mlp.up_proj"),
    (Part::Down, "mlp.down_proj"),
];

impl Family {
    /// All of them.
    pub const ALL: [Self; 10] = [
        Self::Llama,
        Self::Mistral,
        Self::Qwen2,
        Self::Qwen3,
        Self::Gpt2,
        Self::Gemma2,
        Self::Gemma3,
        Self::Olmo2,
        Self::Phi3,
        Self::SmolLm3,
    ];

    pub(crate) fn shape(self) -> &'static Shape {
        match self {
            Self::Llama => &llama::LLAMA,
            Self::Mistral => &llama::MISTRAL,
            Self::Qwen2 => &qwen::QWEN2,
            Self::Qwen3 => &qwen::QWEN3,
            Self::Gpt2 => &gpt2::GPT2,
            Self::Gemma2 => &gemma::GEMMA2,
            Self::Gemma3 => &gemma::GEMMA3,
            Self::Olmo2 => &olmo2::OLMO2,
            Self::Phi3 => &phi3::PHI3,
            Self::SmolLm3 => &smollm3::SMOLLM3,
        }
    }

    /// The name of its language models in `config.json`'s `architectures`.
    #[must_use]
    pub fn architecture(self) -> &'static str {
        self.shape().causal_lm
    }

    /// Its `model_type`.
    #[must_use]
    pub fn model_type(self) -> &'static str {
        self.shape().model_type
    }
}
