//! Gemma 2 and Gemma 3 (text).

use serde_json::{Map, Value, json};

use super::{NormKind, Part, Shape, llama};
use crate::config::{Activation, Config, Reader};
use crate::error::Result;

const GEMMA2_PARTS: [(Part, &str); 11] = [
    (Part::InputNorm, "input_layernorm"),
    (Part::Q, "self_attn.q_proj"),
    (Part::K, "self_attn.k_proj"),
    (Part::V, "self_attn.v_proj"),
    (Part::O, "self_attn.o_proj"),
    (Part::AttentionNorm, "post_attention_layernorm"),
    (Part::MlpNorm, "pre_feedforward_layernorm"),
    (Part::Gate, "mlp.gate_proj"),
    (Part::Up, "mlp.up_proj"),
    (Part::Down, "mlp.down_proj"),
    (Part::MlpOutNorm, "post_feedforward_layernorm"),
];

pub(super) const GEMMA2: Shape = Shape {
    model_type: "gemma2",
    causal_lm: "Gemma2ForCausalLM",
    scalar: "Gemma2ForSequenceClassification",
    aliases: &[("hidden_act", "hidden_activation")],
    key_value_heads: Some(4),
    head_dim: Some(256),
    context: 8192,
    tied: true,
    activation: Activation::GeluTanh,
    parts: &GEMMA2_PARTS,
    norm: NormKind::RmsPlusOne,
    scaled_embedding: true,
    read: |r, c| {
        // Even layers slide.
        common(r, c, |n| n % 2 == 0)?;
        c.attention_softcap = r.cap("attn_logit_softcapping", Some(50.0))?;
        c.logit_softcap = r.cap("final_logit_softcapping", Some(30.0))?;
        Ok(())
    },
    write,
    ..llama::LLAMA
};

pub(super) const GEMMA3: Shape = Shape {
    model_type: "gemma3_text",
    causal_lm: "Gemma3ForCausalLM",
    scalar: "Gemma3TextForSequenceClassification",
    context: 131_072,
    rope_theta: 1_000_000.0,
    parts: &[
        GEMMA2_PARTS[0],
        GEMMA2_PARTS[1],
        GEMMA2_PARTS[2],
        GEMMA2_PARTS[3],
        (Part::QNorm, "self_attn.q_norm"),
        (Part::KNorm, "self_attn.k_norm"),
        GEMMA2_PARTS[4],
        GEMMA2_PARTS[5],
        GEMMA2_PARTS[6],
        GEMMA2_PARTS[7],
        GEMMA2_PARTS[8],
        GEMMA2_PARTS[9],
        GEMMA2_PARTS[10],
    ],
    read: |r, c| {
        // All but every sixth layer slide.
        let pattern = r
            .optional_size("sliding_window_pattern")?
            .or(r.optional_size("_sliding_window_pattern")?)
            .unwrap_or(6);
        common(r, c, |n| (n + 1) % pattern != 0)?;
        c.attention_softcap = r.cap("attn_logit_softcapping", None)?;
        c.logit_softcap = r.cap("final_logit_softcapping", None)?;
        c.local_rope_theta = Some(r.local_rope_theta(10_000.0)?);
        Ok(())
    },
    write: |c, json| {
        write(c, json);
        let local = c.local_rope_theta.unwrap_or(10_000.0);
        json.insert("rope_local_base_freq".into(), json!(local));
        let full = json["rope_parameters"].take();
        json["rope_parameters"] = json!({
            "full_attention": full,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        });
    },
    ..GEMMA2
};

fn common(r: &Reader<'_>, c: &mut Config, slides: impl Fn(i64) -> bool) -> Result<()> {
    if r.flag("use_bidirectional_attention")?.unwrap_or(false) {
        return Err(r.bad("use_bidirectional_attention", "true is not supported"));
    }
    let bias = r.flag("attention_bias")?.unwrap_or(false);
    (c.qkv_bias, c.output_bias) = (bias, bias);
    c.query_scalar = Some(r.number("query_pre_attn_scalar")?.unwrap_or(256.0));
    c.sliding_window = r.window(4096)?;
    if c.sliding_window.is_some() {
        c.sliding_layers = r.sliding_layers(c.num_hidden_layers, slides)?;
    }
    Ok(())
}

fn write(c: &Config, json: &mut Map<String, Value>) {
    json.insert("attention_bias".into(), json!(c.qkv_bias));
    json.insert("query_pre_attn_scalar".into(), json!(whole(c.query_scalar)));
    json.insert("sliding_window".into(), json!(c.sliding_window));
    json.insert("layer_types".into(), c.layer_types());
    json.insert("attn_logit_softcapping".into(), json!(c.attention_softcap));
    json.insert("final_logit_softcapping".into(), json!(c.logit_softcap));
}

/// 256, not 256.0: `transformers` declares an integer.
fn whole(x: Option<f64>) -> Value {
    match x {
        Some(x) if x.fract() == 0.0 && x.abs() < 1e15 => json!(x as i64),
        x => json!(x),
    }
}
