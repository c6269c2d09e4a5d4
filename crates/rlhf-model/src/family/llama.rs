//! Llama, and Mistral, which adds a sliding window.

use serde_json::{Map, Value, json};

use super::{LLAMA_PARTS, NormKind, Shape};
use crate::config::{Activation, Config, Reader};
use crate::error::Result;

pub(super) const LLAMA: Shape = Shape {
    model_type: "llama",
    causal_lm: "LlamaForCausalLM",
    scalar: "LlamaForSequenceClassification",
    embedding: "model.embed_tokens",
    positions: None,
    layers: "model.layers",
    final_norm: "model.norm",
    parts: &LLAMA_PARTS,
    norm: NormKind::Rms,
    transposed: false,
    whole_qk_norm: false,
    aliases: &[],
    key_value_heads: None,
    head_dim: None,
    norm_eps: 1e-6,
    context: 2048,
    rope_theta: 10_000.0,
    tied: false,
    activation: Activation::Silu,
    scaled_embedding: false,
    read: |r, c| {
        let attention_bias = r.flag("attention_bias")?.unwrap_or(false);
        (c.qkv_bias, c.output_bias) = (attention_bias, attention_bias);
        c.mlp_bias = r.flag("mlp_bias")?.unwrap_or(false);
        Ok(())
    },
    write: |c, json| {
        json.insert("attention_bias".into(), json!(c.qkv_bias));
        json.insert("mlp_bias".into(), json!(c.mlp_bias));
    },
};

pub(super) const MISTRAL: Shape = Shape {
    model_type: "mistral",
    causal_lm: "MistralForCausalLM",
    scalar: "MistralForSequenceClassification",
    key_value_heads: Some(8),
    context: 131_072,
    read: read_mistral,
    write: |c: &Config, json: &mut Map<String, Value>| {
        json.insert("sliding_window".into(), json!(c.sliding_window));
    },
    ..LLAMA
};

fn read_mistral(r: &Reader<'_>, c: &mut Config) -> Result<()> {
    // `null` is no window; an absent key is the family's default.
    c.sliding_window = r.window(4096)?;
    Ok(())
}
