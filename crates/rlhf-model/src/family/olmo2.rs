//! OLMo 2: norms stand after the blocks, and over all of the queries and of the keys.

use serde_json::json;

use super::{Part, Shape, llama};

pub(super) const OLMO2: Shape = Shape {
    model_type: "olmo2",
    causal_lm: "Olmo2ForCausalLM",
    scalar: "Olmo2ForSequenceClassification",
    whole_qk_norm: true,
    norm_eps: 1e-5,
    parts: &[
        (Part::Q, "self_attn.q_proj"),
        (Part::K, "self_attn.k_proj"),
        (Part::V, "self_attn.v_proj"),
        (Part::QNorm, "self_attn.q_norm"),
        (Part::KNorm, "self_attn.k_norm"),
        (Part::O, "self_attn.o_proj"),
        (Part::AttentionNorm, "post_attention_layernorm"),
        (Part::Gate, "mlp.gate_proj"),
        (Part::Up, "mlp.up_proj"),
        (Part::Down, "mlp.down_proj"),
        (Part::MlpOutNorm, "post_feedforward_layernorm"),
    ],
    read: |r, c| {
        let bias = r.flag("attention_bias")?.unwrap_or(false);
        (c.qkv_bias, c.output_bias) = (bias, bias);
        Ok(())
    },
    write: |c, json| {
        json.insert("attention_bias".into(), json!(c.qkv_bias));
    },
    ..llama::LLAMA
};
