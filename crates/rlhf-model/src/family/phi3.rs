//! Phi-3: queries, keys and values in one matrix, gate and up in another.

use serde_json::json;

use super::{Part, Shape, llama};

pub(super) const PHI3: Shape = Shape {
    model_type: "phi3",
    causal_lm: "Phi3ForCausalLM",
    scalar: "Phi3ForSequenceClassification",
    norm_eps: 1e-5,
    context: 4096,
    parts: &[
        (Part::InputNorm, "input_layernorm"),
        (Part::Qkv, "self_attn.qkv_proj"),
        (Part::O, "self_attn.o_proj"),
        (Part::MlpNorm, "post_attention_layernorm"),
        (Part::GateUp, "mlp.gate_up_proj"),
        (Part::Down, "mlp.down_proj"),
    ],
    read: |r, c| {
        c.sliding_window = r.optional_size("sliding_window")?;
        Ok(())
    },
    write: |c, json| {
        json.insert("sliding_window".into(), json!(c.sliding_window));
        json.insert(
            "original_max_position_embeddings".into(),
            json!(c.max_position_embeddings),
        );
        // The defaults lie outside small vocabularies, which its embedding refuses.
        let pad = c.pad_token_id.or(c.eos_token_ids.first().copied());
        json.insert("pad_token_id".into(), json!(pad));
    },
    ..llama::LLAMA
};
