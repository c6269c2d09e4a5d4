//! SmolLM 3: Llama, with layers that have no rotary positions.

use serde_json::json;

use super::{Shape, llama};

pub(super) const SMOLLM3: Shape = Shape {
    model_type: "smollm3",
    causal_lm: "SmolLM3ForCausalLM",
    scalar: "SmolLM3ForSequenceClassification",
    key_value_heads: Some(4),
    context: 32_768,
    rope_theta: 2_000_000.0,
    tied: true,
    read: |r, c| {
        (llama::LLAMA.read)(r, c)?;
        let every = r.optional_size("no_rope_layer_interval")?.unwrap_or(4);
        // The key says 1 where a layer does rotate.
        c.rope_layers = match r.list("no_rope_layers", c.num_hidden_layers)? {
            Some(list) => list
                .iter()
                .map(|v| match v.as_i64() {
                    Some(n @ (0 | 1)) => Ok(n == 1),
                    _ => Err(r.bad("no_rope_layers", format!("{v} is neither 0 nor 1"))),
                })
                .collect::<Result<_, _>>()?,
            None => (0..c.num_hidden_layers)
                .map(|n| (n + 1) % every != 0)
                .collect(),
        };
        if r.flag("use_sliding_window")?.unwrap_or(false) {
            c.sliding_window = r.optional_size("sliding_window")?;
            if c.sliding_window.is_some() {
                let rotates = c.rope_layers.clone();
                let slides = |n: i64| !rotates[n as usize];
                c.sliding_layers = r.sliding_layers(c.num_hidden_layers, slides)?;
            }
        }
        Ok(())
    },
    write: |c, json| {
        (llama::LLAMA.write)(c, json);
        let rotates = (0..c.num_hidden_layers).map(|n| i64::from(c.rotates(n)));
        json.insert("no_rope_layers".into(), rotates.collect());
        json.insert(
            "use_sliding_window".into(),
            json!(c.sliding_window.is_some()),
        );
        json.insert("sliding_window".into(), json!(c.sliding_window));
        json.insert("layer_types".into(), c.layer_types());
    },
    ..llama::LLAMA
};
