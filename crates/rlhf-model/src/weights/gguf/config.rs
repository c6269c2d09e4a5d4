//! The metadata's shape and constants as a [`Config`], and its `config.json`.
//!
//! What GGUF has no key for is what llama.cpp has built in for the architecture (which layers slide
//! or lack rotary positions, the scale of Gemma's scores). What would be computed wrongly is refused.

use serde_json::{Map, Value};
use tch::Kind;

use super::architecture::Architecture;
use super::file::Meta;
use super::meta::MetaReader;
use crate::config::{Config, RopeScaling};
use crate::error::{Error, Result};
use crate::family::Family;

/// Keys that change the arithmetic in a way that no family here knows.
const REFUSED: [&str; 8] = [
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attention.output_scale",
    "attention.temperature_length",
    "embedding_scale",
    "logit_scale",
    "residual_scale",
];
/// The factors by which Llama 3 stretches the rope.
const ROPE_FREQS: &str = "rope_freqs.weight";

pub(super) fn config(r: &MetaReader<'_>, arch: &Architecture, kind: Kind) -> Result<Config> {
    let key = |k: &str| format!("{}.{k}", arch.name);
    if let Some(n) = r.maybe_unsigned("split.count")?.filter(|&n| n > 1) {
        let message = format!("one part of {n}; merge them with `llama-gguf-split --merge`");
        return Err(r.bad("split.count", message));
    }
    for k in REFUSED.map(key) {
        if r.maybe(&k).is_some() {
            return Err(r.bad(&k, "not supported: it would change what the model computes"));
        }
    }
    let embedding = r.gguf.place("token_embd.weight");
    let vocab_size = match embedding.map(|t| t.shape.as_slice()) {
        Some([rows, _]) => *rows as i64,
        _ => return Err(r.bad("token_embd.weight", "no such matrix in the file")),
    };
    let named = key("vocab_size");
    if let Some(n) = r.maybe_size(&named)?.filter(|&n| n != vocab_size) {
        let message = format!("{n}, but token_embd.weight has {vocab_size} rows");
        return Err(r.bad(&named, message));
    }
    let hidden = r.size(&key("embedding_length"))?;
    let heads = r.size(&key("attention.head_count"))?;
    let mut c = Config::new(
        vocab_size,
        hidden,
        r.size(&key("block_count"))?,
        heads,
        r.size(&key("context_length"))?,
    );
    c.intermediate_size = r.size(&key("feed_forward_length"))?;
    let kv_heads = r.maybe_size(&key("attention.head_count_kv"))?;
    c.num_key_value_heads = kv_heads.unwrap_or(heads);
    if let Some(d) = r.maybe_size(&key("attention.key_length"))? {
        c.head_dim = d;
    }
    let value_length = key("attention.value_length");
    if let Some(d) = r.maybe_size(&value_length)?.filter(|&d| d != c.head_dim) {
        let message = format!("{d} is not supported, only the keys' {}", c.head_dim);
        return Err(r.bad(&value_length, message));
    }
    let fits = |e: Error| Error::format(r.file, e.to_string());
    // Sizes first: a family may make a list as long as there are layers.
    c.validate().map_err(fits)?;
    let mut c = c.in_family(arch.family).map_err(fits)?;
    c.norm_eps = match arch.family {
        Family::Gpt2 => epsilon(r, &key("attention.layer_norm_epsilon"))?,
        _ => epsilon(r, &key("attention.layer_norm_rms_epsilon"))?,
    };
    let has = |name: &str| r.gguf.place(name).is_some();
    c.tie_word_embeddings = !has("output.weight");
    if !matches!(arch.family, Family::Gpt2 | Family::Qwen2) {
        c.qkv_bias = has("blk.0.attn_q.bias");
        c.output_bias = c.qkv_bias;
    }
    if matches!(arch.family, Family::Llama | Family::SmolLm3) {
        c.mlp_bias = has("blk.0.ffn_up.bias");
    }
    rope(r, arch, &mut c)?;
    attention(r, arch, &mut c)?;
    c.bos_token_id = r.token_id("bos")?;
    c.eos_token_ids = r.token_id("eos")?.into_iter().collect();
    // What ends a turn of a conversation.
    let eot = r.token_id("eot")?;
    c.eos_token_ids
        .extend(eot.filter(|id| !c.eos_token_ids.contains(id)));
    c.pad_token_id = r.token_id("padding")?;
    if r.maybe_text("tokenizer.ggml.pre")? == Some("smollm") {
        // What the SmolLM2 family was started with; the metadata does not say.
        c.initializer_range = 1.0 / 24.0;
    }
    c.dtype = kind;
    c.validate().map_err(fits)?;
    Ok(c)
}

/// Stored as f32; six digits give back the decimal number that was meant.
fn epsilon(r: &MetaReader<'_>, key: &str) -> Result<f64> {
    let eps = r.float(key)?;
    format!("{eps:.5e}")
        .parse()
        .map_err(|_| r.bad(key, "not a number"))
}

/// Windows, scales and caps.
fn attention(r: &MetaReader<'_>, arch: &Architecture, c: &mut Config) -> Result<()> {
    let key = |k: &str| format!("{}.{k}", arch.name);
    let window_key = key("attention.sliding_window");
    // Zero is none.
    let given = r.maybe_size(&window_key)?;
    let window = given.filter(|&n| n > 0);
    match arch.family {
        Family::Gemma2 | Family::Gemma3 => {
            c.sliding_window = if given.is_some() {
                window
            } else {
                c.sliding_window
            };
            if c.sliding_window.is_none() {
                c.sliding_layers = Vec::new();
            }
            pattern(r, &key("attention.sliding_window_pattern"), c)?;
            // The largest of each family divide by the width that a head would have.
            let largest = if arch.family == Family::Gemma2 {
                46
            } else {
                62
            };
            let scalar = if c.num_hidden_layers == largest {
                c.hidden_size / c.num_attention_heads
            } else {
                c.head_dim
            };
            c.query_scalar = Some(scalar as f64);
            let cap = |k: &str, default| Ok::<_, Error>(r.maybe_float(&key(k))?.or(default));
            c.attention_softcap = cap("attn_logit_softcapping", c.attention_softcap)?;
            c.logit_softcap = cap("final_logit_softcapping", c.logit_softcap)?;
            return Ok(());
        }
        Family::Phi3 => c.sliding_window = window,
        Family::Llama if window.is_some() => {
            let mut mistral = c.clone().in_family(Family::Mistral)?;
            (mistral.norm_eps, mistral.sliding_window) = (c.norm_eps, window);
            (mistral.rope_theta, mistral.rope_scaling) = (c.rope_theta, c.rope_scaling);
            *c = mistral;
            if c.qkv_bias || c.mlp_bias {
                return Err(r.bad(&window_key, "not supported beside biases"));
            }
        }
        _ if window.is_some() => {
            let message = format!("not supported in the architecture {}", arch.name);
            return Err(r.bad(&window_key, message));
        }
        _ => {}
    }
    for k in ["attn_logit_softcapping", "final_logit_softcapping"].map(key) {
        if r.maybe_float(&k)?.is_some_and(|x| x != 0.0) {
            let message = format!("not supported in the architecture {}", arch.name);
            return Err(r.bad(&k, message));
        }
    }
    Ok(())
}

/// Which layers slide: all but every n-th, or a list.
fn pattern(r: &MetaReader<'_>, key: &str, c: &mut Config) -> Result<()> {
    let Some(meta) = r.maybe(key).filter(|_| c.sliding_window.is_some()) else {
        return Ok(());
    };
    let layers = c.num_hidden_layers;
    c.sliding_layers = match meta {
        Meta::List(list) if list.len() as i64 == layers => list
            .iter()
            .map(|m| match m {
                Meta::Bool(slides) => Ok(*slides),
                _ => Err(r.bad(key, "not a list of true and false")),
            })
            .collect::<Result<_>>()?,
        Meta::List(list) => {
            return Err(r.bad(key, format!("{} entries for {layers} layers", list.len())));
        }
        _ => {
            // A period of nought: all of them.
            let n = r.size(key)?;
            (0..layers)
                .map(|layer| n == 0 || (layer + 1) % n != 0)
                .collect()
        }
    };
    Ok(())
}

fn rope(r: &MetaReader<'_>, arch: &Architecture, c: &mut Config) -> Result<()> {
    let key = |k: &str| format!("{}.rope.{k}", arch.name);
    if arch.family == Family::Gpt2 {
        return Ok(());
    }
    if let Some(theta) = r.maybe_float(&key("freq_base"))? {
        c.rope_theta = theta;
    }
    if arch.family == Family::Gemma3 {
        let local = r.maybe_float(&key("freq_base_swa"))?;
        c.local_rope_theta = local.or(c.local_rope_theta);
    }
    let dims_key = key("dimension_count");
    if let Some(dims) = r.maybe_size(&dims_key)?.filter(|&d| d != c.head_dim) {
        c.partial_rotary_factor = dims as f64 / c.head_dim as f64;
        if arch.family != Family::Phi3 || c.rotary_dim() != dims {
            let message = format!("{dims} of a head's {} is not supported", c.head_dim);
            return Err(r.bad(&dims_key, message));
        }
    }
    for name in ["rope_factors_long.weight", "rope_factors_short.weight"] {
        if r.gguf.place(name).is_some() {
            return Err(r.bad(name, "longrope is not supported"));
        }
    }
    let factor = || r.float(&key("scaling.factor"));
    let type_key = key("scaling.type");
    c.rope_scaling = match r.maybe_text(&type_key)? {
        None | Some("none") => RopeScaling::Default,
        Some("linear") => RopeScaling::Linear { factor: factor()? },
        Some("yarn") => yarn(r, &key, factor()?)?,
        Some(other) => {
            let message = format!("{other:?} is not supported; supported: none, linear, yarn");
            return Err(r.bad(&type_key, message));
        }
    };
    if r.gguf.place(ROPE_FREQS).is_some() {
        c.rope_scaling = llama3(r, c)?;
    }
    Ok(())
}

fn yarn(r: &MetaReader<'_>, key: &dyn Fn(&str) -> String, factor: f64) -> Result<RopeScaling> {
    for k in [
        "scaling.attn_factor",
        "scaling.yarn_attn_factor",
        "scaling.yarn_ext_factor",
        "scaling.yarn_log_multiplier",
    ]
    .map(key)
    {
        if r.maybe(&k).is_some() {
            return Err(r.bad(&k, "not supported: programs disagree on what it means"));
        }
    }
    let beta = |k: &str, default| Ok::<_, Error>(r.maybe_float(&key(k))?.unwrap_or(default));
    Ok(RopeScaling::Yarn {
        factor,
        beta_fast: beta("scaling.yarn_beta_fast", 32.0)?,
        beta_slow: beta("scaling.yarn_beta_slow", 1.0)?,
        // As the paper has it.
        attention_factor: if factor > 1.0 {
            0.1 * factor.ln() + 1.0
        } else {
            1.0
        },
        original_max_position_embeddings: r.size(&key("scaling.original_context_length"))? as f64,
        truncate: true,
    })
}

/// The file has only what every frequency is divided by. The constants that all Llama 3 have give
/// it back, or else it is refused.
fn llama3(r: &MetaReader<'_>, c: &Config) -> Result<RopeScaling> {
    let factors = r.gguf.values(ROPE_FREQS).unwrap_or_default();
    let factor = f64::from(factors.iter().copied().fold(1.0, f32::max));
    let (low, high, context) = (1.0, 4.0, 8192.0);
    let half = c.head_dim / 2;
    let wanted = (0..half).map(|i| {
        let wavelength =
            std::f64::consts::TAU * c.rope_theta.powf(2.0 * i as f64 / c.head_dim as f64);
        if wavelength < context / high {
            1.0
        } else if wavelength > context / low {
            factor
        } else {
            let smooth = (context / wavelength - low) / (high - low);
            1.0 / ((1.0 - smooth) / factor + smooth)
        }
    });
    let close = |(x, wanted): (&f32, f64)| (f64::from(*x) - wanted).abs() <= 1e-4 * wanted;
    if c.rope_scaling != RopeScaling::Default
        || factors.len() as i64 != half
        || !factors.iter().zip(wanted).all(close)
    {
        return Err(r.bad(
            ROPE_FREQS,
            "only Llama 3's factors are supported (low 1, high 4, context 8192)",
        ));
    }
    Ok(RopeScaling::Llama3 {
        factor,
        low_freq_factor: low,
        high_freq_factor: high,
        original_max_position_embeddings: context,
    })
}

/// What the published Llama folders have, in their order.
const LLAMA_KEYS: [&str; 23] = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "vocab_size",
    "tie_word_embeddings",
    "hidden_act",
    "attention_bias",
    "mlp_bias",
    "attention_dropout",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "use_cache",
];

/// `config.json`: what a Llama without a stretched rope was published with, else as this crate saves.
pub(super) fn config_json(c: &Config) -> Value {
    let json = c.to_json();
    if c.family != Family::Llama || c.rope_scaling != RopeScaling::Default {
        return json;
    }
    let kept: Map<String, Value> = LLAMA_KEYS
        .iter()
        .filter_map(|k| Some(((*k).to_owned(), json.get(*k)?.clone())))
        .collect();
    Value::Object(kept)
}
