//! `config.json` of a Hugging Face folder: read strictly, written so that `transformers` and vLLM
//! read it back.
//!
//! Invariant: a [`Config`] that came through [`Config::parse`] or [`Config::validate`] has positive,
//! consistent sizes, so that nothing behind it divides by zero or overflows. A key that would change
//! the arithmetic and is not supported is an error, never ignored.

use std::path::Path;

use serde_json::{Map, Value, json};
use tch::Kind;

use crate::error::{Error, Result};

/// The architectures that can be loaded, as `config.json` spells them.
pub const SUPPORTED_ARCHITECTURES: [&str; 2] =
    ["LlamaForCausalLM", "LlamaForSequenceClassification"];

/// A model with more layers than this does not exist; a file that says so is damaged.
const MAX_LAYERS: i64 = 1 << 16;
/// No single dimension of a real model reaches this.
const MAX_DIM: i64 = 1 << 31;

/// What stands on top of the trunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// A language model: logits over the vocabulary.
    CausalLm,
    /// One number (`AutoModelForSequenceClassification`, `num_labels` 1).
    Scalar,
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
}

/// The shape and constants of a Llama-family model.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
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
    /// Added to the mean square before its root.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// Their stretching.
    pub rope_scaling: RopeScaling,
    /// Whether the four attention projections have biases.
    pub attention_bias: bool,
    /// Whether the three feed-forward projections have biases.
    pub mlp_bias: bool,
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
            vocab_size,
            hidden_size,
            // Two thirds of 4H, rounded up to a multiple of 32: the family's convention.
            intermediate_size: (hidden_size.saturating_mul(8) / 3 + 31) / 32 * 32,
            num_hidden_layers: layers,
            num_attention_heads: heads,
            num_key_value_heads: heads,
            head_dim: if heads > 0 { hidden_size / heads } else { 0 },
            max_position_embeddings: context,
            rms_norm_eps: 1e-5,
            rope_theta: 10_000.0,
            rope_scaling: RopeScaling::Default,
            attention_bias: false,
            mlp_bias: false,
            tie_word_embeddings: true,
            initializer_range: 0.02,
            bos_token_id: None,
            eos_token_ids: Vec::new(),
            pad_token_id: None,
            dtype: Kind::Float,
        }
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
        let r = Reader { map, file };
        let head = r.head()?;
        r.refuse_unsupported()?;
        let hidden_size = r.size("hidden_size")?;
        let num_attention_heads = r.size("num_attention_heads")?;
        let num_key_value_heads = r
            .optional_size("num_key_value_heads")?
            .unwrap_or(num_attention_heads);
        let head_dim = match r.optional_size("head_dim")? {
            Some(d) => d,
            None if hidden_size % num_attention_heads == 0 => hidden_size / num_attention_heads,
            None => {
                return Err(r.bad(
                    "num_attention_heads",
                    format!("{num_attention_heads} does not divide hidden_size {hidden_size}, and there is no head_dim"),
                ));
            }
        };
        let (rope_theta, rope_scaling) = r.rope()?;
        let config = Self {
            vocab_size: r.size("vocab_size")?,
            hidden_size,
            intermediate_size: r.size("intermediate_size")?,
            num_hidden_layers: r.size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            max_position_embeddings: r.optional_size("max_position_embeddings")?.unwrap_or(2048),
            rms_norm_eps: r.number("rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta,
            rope_scaling,
            attention_bias: r.flag("attention_bias")?.unwrap_or(false),
            mlp_bias: r.flag("mlp_bias")?.unwrap_or(false),
            tie_word_embeddings: r.flag("tie_word_embeddings")?.unwrap_or(false),
            initializer_range: r.number("initializer_range")?.unwrap_or(0.02),
            bos_token_id: r.token_ids("bos_token_id")?.first().copied(),
            eos_token_ids: r.token_ids("eos_token_id")?,
            pad_token_id: r.token_ids("pad_token_id")?.first().copied(),
            dtype: r.dtype()?,
        };
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
        if !(self.rms_norm_eps >= 0.0 && self.rms_norm_eps.is_finite()) {
            return bad(
                "rms_norm_eps",
                format!("{} is not a small positive number", self.rms_norm_eps),
            );
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

    /// Number of weights of the language model (tied matrices counted once).
    #[must_use]
    pub fn num_parameters(&self) -> i64 {
        // In i128: the largest sizes that pass validation would overflow an i64.
        let [v, h, i, d, l] = [
            self.vocab_size,
            self.hidden_size,
            self.intermediate_size,
            self.head_dim,
            self.num_hidden_layers,
        ]
        .map(i128::from);
        let q = i128::from(self.num_attention_heads) * d;
        let kv = i128::from(self.num_key_value_heads) * d;
        let mut layer = 2 * h + 2 * h * q + 2 * h * kv + 3 * h * i;
        if self.attention_bias {
            layer += q + 2 * kv + h;
        }
        if self.mlp_bias {
            layer += 2 * i + h;
        }
        let matrices = if self.tie_word_embeddings { 1 } else { 2 };
        i64::try_from(v * h * matrices + layer * l + h).unwrap_or(i64::MAX)
    }

    /// The `config.json` of the language model, in the spellings of both current major versions of
    /// `transformers` (`rope_theta` + `rope_scaling` + `torch_dtype`, and `rope_parameters` + `dtype`).
    #[must_use]
    pub fn to_json(&self) -> Value {
        let dtype = dtype_name(self.dtype);
        let (scaling, parameters) = self.rope_json();
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "rope_parameters": parameters,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "initializer_range": self.initializer_range,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos_json(&self.eos_token_ids),
            "pad_token_id": self.pad_token_id,
            "use_cache": true,
            "torch_dtype": dtype,
            "dtype": dtype,
        })
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

    fn rope_json(&self) -> (Value, Value) {
        match self.rope_scaling {
            RopeScaling::Default => (
                Value::Null,
                json!({"rope_type": "default", "rope_theta": self.rope_theta}),
            ),
            RopeScaling::Linear { factor } => (
                json!({"rope_type": "linear", "factor": factor}),
                json!({"rope_type": "linear", "factor": factor, "rope_theta": self.rope_theta}),
            ),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            } => {
                let scaling = json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_max_position_embeddings as i64,
                });
                let mut parameters = scaling.clone();
                parameters["rope_theta"] = json!(self.rope_theta);
                (scaling, parameters)
            }
        }
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

/// Reads keys with errors that name file and key. A `null` counts as absent.
struct Reader<'a> {
    map: &'a Map<String, Value>,
    file: &'a str,
}

impl Reader<'_> {
    fn bad(&self, key: &str, message: impl Into<String>) -> Error {
        Error::Config {
            file: self.file.into(),
            key: key.into(),
            message: message.into(),
        }
    }

    fn get(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|v| !v.is_null())
    }

    fn size(&self, key: &str) -> Result<i64> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(key, "missing; it must be a positive integer"))
    }

    fn optional_size(&self, key: &str) -> Result<Option<i64>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        match v.as_i64() {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(self.bad(key, format!("{v} is not a positive integer"))),
        }
    }

    fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        v.as_f64()
            .map(Some)
            .ok_or_else(|| self.bad(key, format!("{v} is not a number")))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        v.as_bool()
            .map(Some)
            .ok_or_else(|| self.bad(key, format!("{v} is not true or false")))
    }

    fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
        let Some(v) = self.get(key) else {
            return Ok(Vec::new());
        };
        let one = |v: &Value| {
            v.as_u64()
                .and_then(|n| u32::try_from(n).ok())
                .ok_or_else(|| self.bad(key, format!("{v} is not a token id or a list of them")))
        };
        match v {
            Value::Array(list) => list.iter().map(one).collect(),
            // Some folders write -1 for "none".
            v if v.as_i64() == Some(-1) => Ok(Vec::new()),
            v => Ok(vec![one(v)?]),
        }
    }

    fn head(&self) -> Result<Head> {
        let supported = || format!("supported: {}", SUPPORTED_ARCHITECTURES.join(", "));
        let named = match self.get("architectures") {
            Some(Value::Array(list)) if !list.is_empty() => Some(
                list[0]
                    .as_str()
                    .ok_or_else(|| self.bad("architectures", format!("{} is not text", list[0])))?,
            ),
            Some(v) => return Err(self.bad("architectures", format!("{v} is not a list of names"))),
            None => None,
        };
        match (named, self.get("model_type").and_then(Value::as_str)) {
            (Some("LlamaForCausalLM"), _) => Ok(Head::CausalLm),
            (Some("LlamaForSequenceClassification"), _) => Ok(Head::Scalar),
            (Some(other), _) => Err(self.bad(
                "architectures",
                format!("{other} is not supported; {}", supported()),
            )),
            (None, Some("llama")) => Ok(Head::CausalLm),
            (None, Some(other)) => Err(self.bad(
                "model_type",
                format!(
                    "{other} is not supported; supported: llama ({})",
                    supported()
                ),
            )),
            (None, None) => Err(self.bad("architectures", format!("missing; {}", supported()))),
        }
    }

    /// Keys that change the arithmetic of a Llama and are not implemented.
    fn refuse_unsupported(&self) -> Result<()> {
        if let Some(act) = self
            .get("hidden_act")
            .or_else(|| self.get("hidden_activation"))
            && !matches!(act.as_str(), Some("silu" | "swish"))
        {
            return Err(self.bad(
                "hidden_act",
                format!("{act} is not supported; supported: silu"),
            ));
        }
        if let Some(f) = self.number("partial_rotary_factor")?
            && f != 1.0
        {
            return Err(self.bad(
                "partial_rotary_factor",
                format!("{f} is not supported (only 1)"),
            ));
        }
        if self.get("quantization_config").is_some() {
            return Err(self.bad(
                "quantization_config",
                "quantised folders are not supported; use the unquantised weights",
            ));
        }
        Ok(())
    }

    fn dtype(&self) -> Result<Kind> {
        let (key, v) = match (self.get("dtype"), self.get("torch_dtype")) {
            (Some(v), _) => ("dtype", v),
            (None, Some(v)) => ("torch_dtype", v),
            (None, None) => return Ok(Kind::Float),
        };
        match v.as_str().map(|s| s.trim_start_matches("torch.")) {
            Some("float32" | "float" | "auto") => Ok(Kind::Float),
            Some("float64" | "double") => Ok(Kind::Double),
            Some("float16" | "half") => Ok(Kind::Half),
            Some("bfloat16") => Ok(Kind::BFloat16),
            _ => Err(self.bad(
                key,
                format!("{v} is not supported; supported: float32, bfloat16, float16, float64"),
            )),
        }
    }

    /// Rope base and scaling from `rope_parameters` (version 5) or `rope_theta` + `rope_scaling`.
    /// Where both spellings stand, both must be understood and must agree.
    fn rope(&self) -> Result<(f64, RopeScaling)> {
        let old_theta = self.number("rope_theta")?;
        let old = match self.get("rope_scaling") {
            Some(v) => Some(self.rope_scaling("rope_scaling", v)?),
            None => None,
        };
        let Some(new) = self.get("rope_parameters") else {
            return Ok((
                old_theta.unwrap_or(10_000.0),
                old.unwrap_or(RopeScaling::Default),
            ));
        };
        let scaling = self.rope_scaling("rope_parameters", new)?;
        let theta = match new.get("rope_theta") {
            None | Some(Value::Null) => old_theta.unwrap_or(10_000.0),
            Some(v) => v.as_f64().ok_or_else(|| {
                self.bad("rope_parameters.rope_theta", format!("{v} is not a number"))
            })?,
        };
        if old_theta.is_some_and(|t| t != theta) {
            return Err(self.bad("rope_theta", "disagrees with rope_parameters.rope_theta"));
        }
        if old.is_some_and(|s| s != scaling) {
            return Err(self.bad("rope_scaling", "disagrees with rope_parameters"));
        }
        Ok((theta, scaling))
    }

    fn rope_scaling(&self, key: &str, v: &Value) -> Result<RopeScaling> {
        let Some(map) = v.as_object() else {
            return Err(self.bad(key, format!("{v} is not an object")));
        };
        let number = |name: &str| -> Result<f64> {
            map.get(name)
                .and_then(Value::as_f64)
                .ok_or_else(|| self.bad(&format!("{key}.{name}"), "missing; it must be a number"))
        };
        let kind = map
            .get("rope_type")
            .or_else(|| map.get("type"))
            .filter(|v| !v.is_null());
        match kind.map(|k| k.as_str().unwrap_or_default()) {
            None if map.keys().all(|k| k == "rope_theta") => Ok(RopeScaling::Default),
            None => Err(self.bad(&format!("{key}.rope_type"), "missing")),
            Some("default") => Ok(RopeScaling::Default),
            Some("linear") => Ok(RopeScaling::Linear {
                factor: number("factor")?,
            }),
            Some("llama3") => Ok(RopeScaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            }),
            Some(_) => Err(self.bad(
                &format!("{key}.rope_type"),
                format!(
                    "{} is not supported; supported: default, linear, llama3",
                    kind.unwrap_or(&Value::Null)
                ),
            )),
        }
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
