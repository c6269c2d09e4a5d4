//! `config.json` of a Hugging Face folder: read strictly, written so that `transformers` and vLLM
//! read it back.
//!
//! Invariant: a [`Config`] that came through [`Config::parse`] or [`Config::validate`] has positive,
//! consistent sizes, so that nothing behind it divides by zero or overflows. A key that would change
//! the arithmetic and is not supported is an error, never ignored.

mod read;

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::error::{Error, Result};
use crate::family::Family;
use crate::transformer::num_parameters;
pub(crate) use read::Reader;

/// A model with more layers than this does not exist; a file that says so is damaged.
const MAX_LAYERS: i64 = 1 << 16;
/// No single dimension of a real model reaches this.
const MAX_DIM: i64 = 1 << 31;

/// What stands on top of the trunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A language model: logits over the vocabulary.
    CausalLm,
    /// One number or several (`AutoModelForSequenceClassification`).
    Scalar,
}

/// The non-linearity of the feed-forward blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Activation {
    /// x · σ(x).
    Silu,
    /// GELU by its tanh approximation.
    GeluTanh,
    /// x · Φ(x).
    Gelu,
    /// max(x, 0).
    Relu,
}

impl Activation {
    /// As `config.json` spells it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu_pytorch_tanh",
            Self::Gelu => "gelu",
            Self::Relu => "relu",
        }
    }
}

/// How the rotary frequencies are stretched for longer contexts.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    Default,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f64,
    },
    /// Llama 3: low frequencies divided by `factor`, high ones kept, a ramp between.
    Llama3 {
        /// The divisor of the low frequencies.
        factor: f64,
        /// Wavelengths above `original_max_position_embeddings / low_freq_factor` are divided.
        low_freq_factor: f64,
        /// Wavelengths below `original_max_position_embeddings / high_freq_factor` are kept.
        high_freq_factor: f64,
        /// The context length of pre-training.
        original_max_position_embeddings: f64,
    },
    /// YaRN (Peng et al., arXiv 2309.00071): dimensions that turn often within the original context
    /// are kept, those that turn rarely divided by `factor`, a ramp between; queries and keys grow by
    /// `attention_factor` each.
    Yarn {
        /// The divisor.
        factor: f64,
        /// Dimensions with more turns than this are kept.
        beta_fast: f64,
        /// Dimensions with fewer turns than this are divided.
        beta_slow: f64,
        /// What cos and sin are multiplied by.
        attention_factor: f64,
        /// The context length of pre-training.
        original_max_position_embeddings: f64,
        /// Whether the ramp begins and ends at whole dimensions.
        truncate: bool,
    },
}

/// The shape and constants of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    /// Which family of models it belongs to.
    pub family: Family,
    /// Rows of the embedding.
    pub vocab_size: i64,
    /// Width of the residual stream, H.
    pub hidden_size: i64,
    /// Width inside the feed-forward block.
    pub intermediate_size: i64,
    /// Number of layers.
    pub num_hidden_layers: i64,
    /// Number of query heads.
    pub num_attention_heads: i64,
    /// Number of key and value heads; divides the query heads.
    pub num_key_value_heads: i64,
    /// Width of a head, D; even.
    pub head_dim: i64,
    /// Context length in tokens.
    pub max_position_embeddings: i64,
    /// Added to the mean square (the variance) before its root.
    pub norm_eps: f64,
    /// Non-linearity of the feed-forward blocks.
    pub activation: Activation,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Base of the rotary frequencies in layers with a sliding window, where it differs (Gemma 3);
    /// those are never stretched.
    pub local_rope_theta: Option<f64>,
    /// The part of every head that rotates, from its beginning.
    pub partial_rotary_factor: f64,
    /// Which layers rotate; all where this is empty.
    pub rope_layers: Vec<bool>,
    /// A token sees itself and the `sliding_window − 1` before it.
    pub sliding_window: Option<i64>,
    /// In which layers the window holds; in all where this is empty.
    pub sliding_layers: Vec<bool>,
    /// Whether the projections to queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output projection has a bias.
    pub output_bias: bool,
    /// Whether the feed-forward projections have biases.
    pub mlp_bias: bool,
    /// Scores are multiplied by `query_scalar^-½` instead of D^-½.
    pub query_scalar: Option<f64>,
    /// The cap c of attention scores squashed as c·tanh(x/c).
    pub attention_softcap: Option<f64>,
    /// The cap c of logits squashed as c·tanh(x/c).
    pub logit_softcap: Option<f64>,
    /// Whether the output matrix is the embedding.
    pub tie_word_embeddings: bool,
    /// Standard deviation of random initial weights.
    pub initializer_range: f64,
    /// Beginning-of-sequence token.
    pub bos_token_id: Option<u32>,
    /// End-of-sequence tokens; may be empty.
    pub eos_token_ids: Vec<u32>,
    /// Padding token (never used here, carried for others).
    pub pad_token_id: Option<u32>,
    /// The type that the weights are stored in.
    pub dtype: Kind,
}

impl Config {
    /// A configuration with the given shape and the Llama family's usual constants: tied embeddings,
    /// no biases, rope base 10000, f32.
    #[must_use]
    pub fn new(vocab_size: i64, hidden_size: i64, layers: i64, heads: i64, context: i64) -> Self {
        Self {
            family: Family::Llama,
            vocab_size,
            hidden_size,
            // Two thirds of 4H, rounded up to a multiple of 32: the family's convention.
            intermediate_size: (hidden_size.saturating_mul(8) / 3 + 31) / 32 * 32,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: if heads > 0 { hidden_size / heads } else { 0 },
            max_position_embeddings: context,
            norm_eps: 1e-5,
            activation: Activation::Silu,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            local_rope_theta: None,
            partial_rotary_factor: 1.0,
            rope_layers: Vec::new(),
            sliding_window: None,
            sliding_layers: Vec::new(),
            qkv_bias: false,
            output_bias: false,
            mlp_bias: false,
            query_scalar: None,
            attention_softcap: None,
            logit_softcap: None,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            dtype: Kind::Float,
        }
    }

    /// The same shape in another family, with what that family prescribes (biases, activation,
    /// windows, caps, the rope's base).
    ///
    /// # Errors
    /// [`Error::Config`] when the family cannot have this shape.
    pub fn in_family(mut self, family: Family) -> Result<Self> {
        let shape = family.shape();
        let map = Map::new();
        let reader = Reader {
            map: &map,
            file: "config",
            aliases: shape.aliases,
        };
        self.family = family;
        self.activation = shape.activation;
        self.rope_theta = shape.rope_theta;
        (shape.read)(&reader, &mut self)?;
        // Scores keep the scale of this shape's heads.
        self.query_scalar = self.query_scalar.map(|_| self.head_dim as f64);
        self.validate()?;
        Ok(self)
    }

    /// Reads `dir/config.json`.
    ///
    /// # Errors
    /// [`Error::Io`] when it cannot be read, else as [`Config::parse`].
    pub fn load(dir: &Path) -> Result<Self> {
        Ok(Self::load_with_head(dir)?.0)
    }

    pub(crate) fn load_with_head(dir: &Path) -> Result<(Self, Head, Map<String, Value>)> {
        let path = dir.join("config.json");
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
        let file = path.display().to_string();
        let map = object(&text, &file)?;
        let (config, head) = Self::from_map(&map, &file)?;
        Ok((config, head, map))
    }

    /// Where `dir/generation_config.json` names end-of-sequence tokens, they are the ones that end a
    /// text, as in `transformers`; `config.json` often names fewer.
    pub(crate) fn take_generation_eos(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join("generation_config.json");
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(e) => return Err(Error::io(&path)(e)),
        };
        let file = path.display().to_string();
        let map = object(&text, &file)?;
        let ids = Reader {
            map: &map,
            file: &file,
            aliases: &[],
        }
        .token_ids("eos_token_id")?;
        if !ids.is_empty() {
            self.eos_token_ids = ids;
        }
        Ok(())
    }

    /// Reads a configuration from the text of a `config.json`; `file` is named in errors.
    ///
    /// # Errors
    /// [`Error::Config`] naming the key, or [`Error::Format`] with line and column when the text is
    /// no JSON object.
    pub fn parse(text: &str, file: &str) -> Result<Self> {
        Ok(Self::from_map(&object(text, file)?, file)?.0)
    }

    fn from_map(map: &Map<String, Value>, file: &str) -> Result<(Self, Head)> {
        let bare = Reader {
            map,
            file,
            aliases: &[],
        };
        let (family, head) = bare.architecture()?;
        let shape = family.shape();
        let r = Reader {
            aliases: shape.aliases,
            ..bare
        };
        r.refuse_quantised()?;
        let hidden_size = r.size("hidden_size")?;
        let num_attention_heads = r.size("num_attention_heads")?;
        let num_key_value_heads = r
            .optional_size("num_key_value_heads")?
            .or(shape.key_value_heads)
            .unwrap_or(num_attention_heads);
        let head_dim = match r.optional_size("head_dim")?.or(shape.head_dim) {
            Some(d) => d,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(r.bad(
                    "num_attention_heads",
                    format!("{num_attention_heads} does not divide hidden_size {hidden_size}, and there is no head_dim"),
                ));
            }
        };
        let intermediate_size = match (r.optional_size("intermediate_size")?, family) {
            (Some(size), _) => size,
            (None, Family::Gpt2) => hidden_size.saturating_mul(4),
            (None, _) => r.size("intermediate_size")?,
        };
        let max_position_embeddings = r
            .optional_size("max_position_embeddings")?
            .unwrap_or(shape.context);
        // Positions that are learnt are not turned, whatever the file says of it.
        let learnt = family == Family::Gpt2;
        let (rope_theta, rope_scaling) = if learnt {
            (shape.rope_theta, RopeScaling::Default)
        } else {
            r.rope(shape.rope_theta, max_position_embeddings)?
        };
        let mut config = Self {
            family,
            vocab_size: r.size("vocab_size")?,
            hidden_size,
            intermediate_size,
            num_hidden_layers: r.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings,
            norm_eps: r.number("rms_norm_eps")?.unwrap_or(shape.norm_eps),
            activation: r.activation("hidden_act", shape.activation)?,
            rope_theta,
            rope_scaling,
            partial_rotary_factor: if learnt { 1.0 } else { r.rotary_factor()? },
            tie_word_embeddings: r.flag("tie_word_embeddings")?.unwrap_or(shape.tied),
            initializer_range: r.number("initializer_range")?.unwrap_or(0.02),
            bos_token_id: r.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: r.token_ids("eos_token_id")?,
            pad_token_id: r.token_ids("pad_token_id")?.first().copied(),
            dtype: r.dtype()?,
            ..Self::new(1, 1, 1, 1, 1)
        };
        // Sizes first: what a family reads may be a list as long as there are layers.
        config.validate_as(file)?;
        (shape.read)(&r, &mut config)?;
        config.validate_as(file)?;
        Ok((config, head))
    }

    /// Checks that the sizes are positive and fit together.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field.
    pub fn validate(&self) -> Result<()> {
        self.validate_as("config")
    }

    fn validate_as(&self, file: &str) -> Result<()> {
        let bad = |key: &str, message: String| {
            Err(Error::Config {
                file: file.into(),
                key: key.into(),
                message,
            })
        };
        for (key, value, limit) in [
            ("vocab_size", self.vocab_size, MAX_DIM),
            ("hidden_size", self.hidden_size, MAX_DIM),
            ("intermediate_size", self.intermediate_size, MAX_DIM),
            ("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS),
            ("num_attention_heads", self.num_attention_heads, 1 << 16),
            ("num_key_value_heads", self.num_key_value_heads, 1 << 16),
            ("head_dim", self.head_dim, 1 << 16),
            (
                "max_position_embeddings",
                self.max_position_embeddings,
                MAX_DIM,
            ),
        ] {
            if value < 1 {
                return bad(key, format!("{value} is not positive"));
            }
            if value > limit {
                return bad(
                    key,
                    format!("{value} is beyond anything real (limit {limit})"),
                );
            }
        }
        let (heads, kv) = (self.num_attention_heads, self.num_key_value_heads);
        if heads % kv != 0 {
            return bad(
                "num_attention_heads",
                format!("{heads} is not divisible by num_key_value_heads {kv}"),
            );
        }
        if self.head_dim % 2 != 0 {
            return bad(
                "head_dim",
                format!("{} is odd; rotary positions need pairs", self.head_dim),
            );
        }
        if self.family == Family::Gpt2 && heads.saturating_mul(self.head_dim) != self.hidden_size {
            return bad(
                "n_head",
                format!("{heads} heads do not divide n_embd {}", self.hidden_size),
            );
        }
        if self.family == Family::Gpt2 && heads != kv {
            return bad("num_key_value_heads", "GPT-2 has as many as heads".into());
        }
        if !(self.norm_eps >= 0.0 && self.norm_eps.is_finite()) {
            return bad(
                "rms_norm_eps",
                format!("{} is not a small positive number", self.norm_eps),
            );
        }
        let factor = self.partial_rotary_factor;
        if !(factor > 0.0 && factor <= 1.0) {
            return bad(
                "partial_rotary_factor",
                format!("{factor} is not above 0 and at most 1"),
            );
        }
        if factor != 1.0 && self.family != Family::Phi3 {
            return bad(
                "partial_rotary_factor",
                format!("{factor} is not supported (only 1)"),
            );
        }
        if self.rotary_dim() < 2 || self.rotary_dim() % 2 != 0 {
            return bad(
                "partial_rotary_factor",
                format!("{} rotating dimensions are no pairs", self.rotary_dim()),
            );
        }
        let positive = |x: f64| x > 0.0 && x.is_finite();
        for (key, x) in [
            ("query_pre_attn_scalar", self.query_scalar),
            ("attn_logit_softcapping", self.attention_softcap),
            ("final_logit_softcapping", self.logit_softcap),
            ("rope_local_base_freq", self.local_rope_theta),
        ] {
            if let Some(x) = x.filter(|&x| !positive(x)) {
                return bad(key, format!("{x} is not positive"));
            }
        }
        if let Some(w) = self.sliding_window.filter(|&w| w < 1) {
            return bad("sliding_window", format!("{w} is not positive"));
        }
        for (key, list) in [
            ("layer_types", &self.sliding_layers),
            ("no_rope_layers", &self.rope_layers),
        ] {
            if !list.is_empty() && list.len() as i64 != self.num_hidden_layers {
                return bad(
                    key,
                    format!(
                        "{} entries for {} layers",
                        list.len(),
                        self.num_hidden_layers
                    ),
                );
            }
        }
        if !(self.rope_theta > 0.0 && self.rope_theta.is_finite()) {
            return bad("rope_theta", format!("{} is not positive", self.rope_theta));
        }
        if !(self.initializer_range >= 0.0 && self.initializer_range.is_finite()) {
            return bad(
                "initializer_range",
                format!("{} is not positive", self.initializer_range),
            );
        }
        if !is_float(self.dtype) {
            return bad(
                "dtype",
                format!("{:?} is not a floating-point type", self.dtype),
            );
        }
        match self.rope_scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                original_max_position_embeddings,
                ..
            } => {
                let all = [
                    factor,
                    beta_fast,
                    beta_slow,
                    attention_factor,
                    original_max_position_embeddings,
                ];
                if all.into_iter().all(positive) && beta_fast >= beta_slow && self.rope_theta > 1.0
                {
                    Ok(())
                } else {
                    bad(
                        "rope_scaling",
                        "factors must be positive, beta_fast at least beta_slow, and rope_theta above 1"
                            .into(),
                    )
                }
            }
            RopeScaling::Linear { factor } if factor > 0.0 && factor.is_finite() => Ok(()),
            RopeScaling::Linear { factor } => {
                bad("rope_scaling.factor", format!("{factor} is not positive"))
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let positive = [factor, low_freq_factor, original_max_position_embeddings]
                    .iter()
                    .all(|x| *x > 0.0 && x.is_finite());
                if positive && high_freq_factor > low_freq_factor && high_freq_factor.is_finite() {
                    Ok(())
                } else {
                    bad(
                        "rope_scaling",
                        "factors must be positive and high_freq_factor above low_freq_factor"
                            .into(),
                    )
                }
            }
        }
    }

    /// The window of layer `n`, where it has one.
    #[must_use]
    pub fn window(&self, n: i64) -> Option<i64> {
        self.sliding_window
            .filter(|_| self.sliding_layers.get(n as usize).copied().unwrap_or(true))
    }

    /// Whether layer `n` has rotary positions.
    #[must_use]
    pub fn rotates(&self, n: i64) -> bool {
        self.family.shape().positions.is_none()
            && self.rope_layers.get(n as usize).copied().unwrap_or(true)
    }

    /// The dimensions of a head that rotate.
    pub(crate) fn rotary_dim(&self) -> i64 {
        (self.head_dim as f64 * self.partial_rotary_factor) as i64
    }

    /// What scores are multiplied by.
    pub(crate) fn attention_scale(&self) -> f64 {
        1.0 / self.query_scalar.unwrap_or(self.head_dim as f64).sqrt()
    }

    /// The layers' kinds as newer versions of `transformers` list them.
    pub(crate) fn layer_types(&self) -> Value {
        let kind = |n| match self.window(n) {
            Some(_) => "sliding_attention",
            None => "full_attention",
        };
        (0..self.num_hidden_layers).map(kind).collect()
    }

    /// Number of weights of the language model (tied matrices counted once).
    #[must_use]
    pub fn num_parameters(&self) -> i64 {
        num_parameters(self)
    }

    /// The `config.json` of the language model, in the spellings of both current major versions of
    /// `transformers` (`rope_theta` + `rope_scaling` + `torch_dtype`, and `rope_parameters` + `dtype`).
    #[must_use]
    pub fn to_json(&self) -> Value {
        let shape = self.family.shape();
        let dtype = dtype_name(self.dtype);
        let (scaling, parameters) = self.rope_json();
        let json = json!({
            "architectures": [shape.causal_lm],
            "model_type": shape.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": self.activation.name(),
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "attention_dropout": 0.0,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "use_cache": true,
            "torch_dtype": dtype,
            "dtype": dtype,
        });
        let Value::Object(mut json) = json else {
            return json;
        };
        for (common, own) in shape.aliases {
            let value = json.remove(*common).unwrap_or(Value::Null);
            json.insert((*own).into(), value);
        }
        (shape.write)(self, &mut json);
        Value::Object(json)
    }

    /// The `generation_config.json` that goes with it.
    #[must_use]
    pub fn generation_json(&self) -> Value {
        json!({
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
        })
    }

    /// `rope_scaling` and `rope_parameters`.
    fn rope_json(&self) -> (Value, Value) {
        let mut scaling = match self.rope_scaling {
            RopeScaling::Default => json!({"rope_type": "default"}),
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original_max_position_embeddings as i64,
            }),
            RopeScaling::Yarn {
                factor,
                beta_fast,
                beta_slow,
                attention_factor,
                original_max_position_embeddings,
                truncate,
            } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "attention_factor": attention_factor,
                "original_max_position_embeddings": original_max_position_embeddings as i64,
                "truncate": truncate,
            }),
        };
        let mut parameters = scaling.clone();
        parameters["rope_theta"] = json!(self.rope_theta);
        if self.partial_rotary_factor != 1.0 {
            parameters["partial_rotary_factor"] = json!(self.partial_rotary_factor);
        }
        if self.rope_scaling == RopeScaling::Default {
            scaling = Value::Null;
        }
        (scaling, parameters)
    }
}

fn eos_json(ids: &[u32]) -> Value {
    match ids {
        [] => Value::Null,
        [one] => json!(one),
        many => json!(many),
    }
}

/// Whether `kind` can hold weights.
pub(crate) fn is_float(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16
    )
}

fn dtype_name(kind: Kind) -> &'static str {
    match kind {
        Kind::Double => "float64",
        Kind::Half => "float16",
        Kind::BFloat16 => "bfloat16",
        _ => "float32",
    }
}

fn object(text: &str, file: &str) -> Result<Map<String, Value>> {
    match serde_json::from_str(text) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err(Error::Format {
            file: file.into(),
            message: "not a JSON object".into(),
        }),
        Err(e) => Err(Error::Format {
            file: file.into(),
            message: format!("not JSON: {e}"),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Value {
        let mut c = Config::new(32, 16, 1, 2, 64);
        c.eos_token_ids = vec![2];
        c.to_json()
    }

    fn parse(v: &Value) -> Result<Config> {
        Config::parse(&v.to_string(), "config.json")
    }

    fn message(v: &Value) -> String {
        parse(v).unwrap_err().to_string()
    }

    #[test]
    fn json_round_trip() {
        let mut c = Config::new(384, 64, 2, 4, 256);
        c.num_key_value_heads = 2;
        c.rope_scaling = RopeScaling::Llama3 {
            factor: 4.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 64.0,
        };
        c.eos_token_ids = vec![1, 2];
        c.dtype = Kind::BFloat16;
        assert_eq!(parse(&c.to_json()).unwrap(), c);
        c.rope_scaling = RopeScaling::Linear { factor: 2.5 };
        c.eos_token_ids = vec![];
        assert_eq!(parse(&c.to_json()).unwrap(), c);
    }

    #[test]
    fn every_family_survives_its_own_file() {
        for family in Family::ALL {
            let mut c = Config::new(384, 64, 5, 4, 256).in_family(family).unwrap();
            assert_eq!(parse(&c.to_json()).unwrap(), c, "{family:?}");
            c.sliding_window = c.sliding_window.map(|_| 7);
            c.tie_word_embeddings = false;
            c.pad_token_id = Some(3);
            assert_eq!(parse(&c.to_json()).unwrap(), c, "{family:?}");
        }
    }

    /// GPT-2 learns its positions: what a file says of rope means nothing, and is not kept.
    #[test]
    fn learnt_positions_are_not_turned() {
        let json = json!({"model_type": "gpt2", "vocab_size": 32, "n_embd": 16, "n_layer": 2, "n_head": 2,
            "rope_theta": 5e4, "partial_rotary_factor": 0.5});
        let c = parse(&json).unwrap();
        assert_eq!((c.rope_theta, c.partial_rotary_factor), (1e4, 1.0));
        assert_eq!(parse(&c.to_json()).unwrap(), c);
    }

    /// Keys that a published file leaves out mean what the family's authors meant.
    #[test]
    fn absent_keys_are_the_familys() {
        let of = |more: Value| {
            let mut json = json!({"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
                "num_hidden_layers": 12, "num_attention_heads": 8});
            for (key, value) in more.as_object().unwrap() {
                json[key] = value.clone();
            }
            parse(&json).unwrap()
        };
        let c = of(json!({"architectures": ["MistralForCausalLM"]}));
        assert_eq!((c.num_key_value_heads, c.window(0)), (8, Some(4096)));
        let c = of(json!({"architectures": ["MistralForCausalLM"], "sliding_window": null}));
        assert_eq!(c.window(0), None);
        let c = of(json!({"model_type": "qwen3"}));
        assert_eq!((c.head_dim, c.qkv_bias, c.window(0)), (128, false, None));
        let c =
            of(json!({"model_type": "qwen2", "use_sliding_window": true, "max_window_layers": 7}));
        assert_eq!((c.qkv_bias, c.output_bias), (true, false));
        assert_eq!((c.window(6), c.window(7)), (None, Some(4096)));
        let c = of(json!({"model_type": "gemma2"}));
        assert_eq!(
            (c.attention_softcap, c.logit_softcap),
            (Some(50.0), Some(30.0))
        );
        assert_eq!((c.window(0), c.window(1)), (Some(4096), None));
        assert!(c.tie_word_embeddings && c.activation == Activation::GeluTanh);
        let c = of(json!({"model_type": "gemma3_text"}));
        assert_eq!((c.rope_theta, c.local_rope_theta), (1e6, Some(1e4)));
        assert_eq!(
            (c.window(4), c.window(5), c.logit_softcap),
            (Some(4096), None, None)
        );
        let c = of(json!({"model_type": "smollm3"}));
        assert_eq!(
            (c.rotates(2), c.rotates(3), c.rope_theta),
            (true, false, 2e6)
        );
    }

    #[test]
    fn each_wrong_key_is_named() {
        for (key, value, expect) in [
            ("hidden_size", json!(null), "hidden_size: missing"),
            (
                "hidden_size",
                json!("16"),
                "hidden_size: \"16\" is not a positive integer",
            ),
            ("num_hidden_layers", json!(-1), "num_hidden_layers: -1"),
            (
                "num_hidden_layers",
                json!(1_000_000_000),
                "num_hidden_layers: 1000000000",
            ),
            ("num_attention_heads", json!(0), "num_attention_heads: 0"),
            ("num_attention_heads", json!(3), "not divisible"),
            ("head_dim", json!(7), "head_dim: 7 is odd"),
            ("hidden_act", json!("swoosh"), "\"swoosh\" is not supported"),
            (
                "rope_scaling",
                json!({"rope_type": "warp"}),
                "\"warp\" is not supported",
            ),
            (
                "rope_scaling",
                json!({"type": "linear"}),
                "rope_scaling.factor: missing",
            ),
            (
                "rope_scaling",
                json!({"type": "linear", "factor": 2}),
                "disagrees",
            ),
            ("rope_theta", json!(1.0), "disagrees"),
            (
                "architectures",
                json!(["MambaForCausalLM"]),
                "LlamaForCausalLM",
            ),
            ("dtype", json!("float8"), "\"float8\" is not supported"),
            ("quantization_config", json!({"bits": 4}), "quantised"),
            ("partial_rotary_factor", json!(0.5), "0.5 is not supported"),
            (
                "rope_scaling",
                json!({"type": "yarn", "factor": "big"}),
                "rope_scaling.factor: \"big\" is not a number",
            ),
        ] {
            let mut v = base();
            v[key] = value;
            let m = message(&v);
            assert!(
                m.starts_with("config.json: ") && m.contains(expect),
                "{key}: {m}"
            );
        }
        assert!(
            Config::parse("{\"a\": // no\n", "f")
                .unwrap_err()
                .to_string()
                .contains("line 1")
        );
        assert!(
            Config::parse("[]", "f")
                .unwrap_err()
                .to_string()
                .contains("not a JSON object")
        );
    }

    #[test]
    fn counts_parameters() {
        // V=32, H=16, I=64 (8*16/3=42 -> 64), one layer of 2 heads of 8:
        // 32*16 + (2*16 + 4*16*16 + 3*16*64) + 16 = 512 + 4128 + 16.
        assert_eq!(Config::new(32, 16, 1, 2, 64).num_parameters(), 4656);
    }
}
