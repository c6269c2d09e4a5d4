//! GPT-2.

use serde_json::json;

use super::{NormKind, Part, Shape, llama};
use crate::config::Activation;

pub(super) const GPT2: Shape = Shape {
    model_type: "gpt2",
    causal_lm: "GPT2LMHeadModel",
    scalar: "GPT2ForSequenceClassification",
    embedding: "transformer.wte",
    positions: Some("transformer.wpe"),
    layers: "transformer.h",
    final_norm: "transformer.ln_f",
    parts: &[
        (Part::InputNorm, "ln_1"),
        (Part::Qkv, "attn.c_attn"),
        (Part::O, "attn.c_proj"),
        (Part::MlpNorm, "ln_2"),
        (Part::Up, "mlp.c_fc"),
        (Part::Down, "mlp.c_proj"),
    ],
    norm: NormKind::Layer,
    transposed: true,
    aliases: &[
        ("hidden_size", "n_embd"),
        ("intermediate_size", "n_inner"),
        ("num_hidden_layers", "n_layer"),
        ("num_attention_heads", "n_head"),
        ("max_position_embeddings", "n_positions"),
        ("rms_norm_eps", "layer_norm_epsilon"),
        ("hidden_act", "activation_function"),
    ],
    norm_eps: 1e-5,
    context: 1024,
    tied: true,
    activation: Activation::GeluTanh,
    read: |r, c| {
        (c.qkv_bias, c.output_bias, c.mlp_bias) = (true, true, true);
        for (key, only) in [
            ("scale_attn_weights", true),
            ("scale_attn_by_inverse_layer_idx", false),
            ("add_cross_attention", false),
        ] {
            if r.flag(key)?.unwrap_or(only) != only {
                return Err(r.bad(key, format!("{} is not supported", !only)));
            }
        }
        Ok(())
    },
    write: |c, json| {
        for key in [
            "num_key_value_heads",
            "head_dim",
            "rope_theta",
            "rope_scaling",
            "rope_parameters",
            "attention_dropout",
        ] {
            json.remove(key);
        }
        if c.activation == Activation::GeluTanh {
            // The name that GPT-2's own files give it.
            json.insert("activation_function".into(), json!("gelu_new"));
        }
        // Dropout is never applied here, and would disturb whoever trains the model further.
        for key in ["attn_pdrop", "embd_pdrop", "resid_pdrop"] {
            json.insert(key.into(), json!(0.0));
        }
    },
    ..llama::LLAMA
};
