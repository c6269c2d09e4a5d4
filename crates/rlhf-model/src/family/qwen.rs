//! Qwen 2 (biases on queries, keys and values) and Qwen 3 (a norm on every query and key head).

use serde_json::{Map, Value, json};

use super::{LLAMA_PARTS, Part, Shape, llama};
use crate::config::{Config, Reader};
use crate::error::Result;

pub(super) const QWEN2: Shape = Shape {
    model_type: "qwen2",
    causal_lm: "Qwen2ForCausalLM",
    scalar: "Qwen2ForSequenceClassification",
    context: 32_768,
    read: |r, c| {
        c.qkv_bias = true;
        windows(r, c)
    },
    write: write_windows,
    ..llama::LLAMA
};

pub(super) const QWEN3: Shape = Shape {
    model_type: "qwen3",
    causal_lm: "Qwen3ForCausalLM",
    scalar: "Qwen3ForSequenceClassification",
    head_dim: Some(128),
    context: 32_768,
    parts: &[
        LLAMA_PARTS[0],
        LLAMA_PARTS[1],
        LLAMA_PARTS[2],
        LLAMA_PARTS[3],
        (Part::QNorm, "self_attn.q_norm"),
        (Part::KNorm, "self_attn.k_norm"),
        LLAMA_PARTS[4],
        LLAMA_PARTS[5],
        LLAMA_PARTS[6],
        LLAMA_PARTS[7],
        LLAMA_PARTS[8],
    ],
    read: |r, c| {
        let bias = r.flag("attention_bias")?.unwrap_or(false);
        (c.qkv_bias, c.output_bias) = (bias, bias);
        windows(r, c)
    },
    write: |c, json| {
        json.insert("attention_bias".into(), json!(c.qkv_bias));
        write_windows(c, json);
    },
    ..llama::LLAMA
};

/// `use_sliding_window`, off by default; then the layers from `max_window_layers` on slide.
fn windows(r: &Reader<'_>, c: &mut Config) -> Result<()> {
    if !r.flag("use_sliding_window")?.unwrap_or(false) {
        return Ok(());
    }
    let first = r.number("max_window_layers")?.unwrap_or(28.0);
    c.sliding_window = r.window(4096)?;
    c.sliding_layers = r.sliding_layers(c.num_hidden_layers, |n| n as f64 >= first)?;
    Ok(())
}

fn write_windows(c: &Config, json: &mut Map<String, Value>) {
    json.insert(
        "use_sliding_window".into(),
        json!(c.sliding_window.is_some()),
    );
    json.insert("sliding_window".into(), json!(c.sliding_window));
    // Only read where `layer_types` is absent.
    json.insert("max_window_layers".into(), json!(c.num_hidden_layers));
    json.insert("layer_types".into(), c.layer_types());
}
