//! Reading the keys of a `config.json`, with errors that name file and key.

use serde_json::{Map, Value};
use tch::Kind;

use super::{Activation, Head, RopeScaling};
use crate::error::{Error, Result};
use crate::family::Family;

/// Reads keys with errors that name file and key. A `null` counts as absent.
pub(crate) struct Reader<'a> {
    pub(super) map: &'a Map<String, Value>,
    pub(super) file: &'a str,
    /// What a family calls the common keys.
    pub(super) aliases: &'static [(&'static str, &'static str)],
}

impl<'a> Reader<'a> {
    /// The key as the family spells it.
    fn own<'k>(&self, key: &'k str) -> &'k str {
        let alias = self.aliases.iter().find(|(common, _)| *common == key);
        alias.map_or(key, |(_, own)| own)
    }

    pub(crate) fn bad(&self, key: &str, message: impl Into<String>) -> Error {
        Error::Config {
            file: self.file.into(),
            key: self.own(key).into(),
            message: message.into(),
        }
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(self.own(key)).filter(|v| !v.is_null())
    }

    pub(super) fn size(&self, key: &str) -> Result<i64> {
        self.optional_size(key)?
            .ok_or_else(|| self.bad(key, "missing; it must be a positive integer"))
    }

    pub(crate) fn optional_size(&self, key: &str) -> Result<Option<i64>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        match v.as_i64() {
            Some(n) if n > 0 => Ok(Some(n)),
            _ => Err(self.bad(key, format!("{v} is not a positive integer"))),
        }
    }

    pub(crate) fn number(&self, key: &str) -> Result<Option<f64>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        v.as_f64()
            .map(Some)
            .ok_or_else(|| self.bad(key, format!("{v} is not a number")))
    }

    pub(crate) fn flag(&self, key: &str) -> Result<Option<bool>> {
        let Some(v) = self.get(key) else {
            return Ok(None);
        };
        v.as_bool()
            .map(Some)
            .ok_or_else(|| self.bad(key, format!("{v} is not true or false")))
    }

    pub(super) fn token_ids(&self, key: &str) -> Result<Vec<u32>> {
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

    /// `sliding_window`: `null` is none, an absent key the family's default.
    pub(crate) fn window(&self, default: i64) -> Result<Option<i64>> {
        if self.map.contains_key("sliding_window") {
            self.optional_size("sliding_window")
        } else {
            Ok(Some(default))
        }
    }

    /// A soft cap: `null` is none, an absent key the family's default.
    pub(crate) fn cap(&self, key: &str, default: Option<f64>) -> Result<Option<f64>> {
        if self.map.contains_key(key) {
            self.number(key)
        } else {
            Ok(default)
        }
    }

    pub(crate) fn activation(&self, key: &str, default: Activation) -> Result<Activation> {
        let Some(v) = self.get(key) else {
            return Ok(default);
        };
        match v.as_str() {
            Some("silu" | "swish") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_new") => Ok(Activation::GeluTanh),
            Some("gelu") => Ok(Activation::Gelu),
            Some("relu") => Ok(Activation::Relu),
            _ => Err(self.bad(
                key,
                format!(
                    "{v} is not supported; supported: silu, gelu_pytorch_tanh, gelu_new, gelu, relu"
                ),
            )),
        }
    }

    /// A list with one entry a layer.
    pub(crate) fn list(&self, key: &str, layers: i64) -> Result<Option<&'a [Value]>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Array(list)) if list.len() as i64 == layers => Ok(Some(list)),
            Some(Value::Array(list)) => {
                Err(self.bad(key, format!("{} entries for {layers} layers", list.len())))
            }
            Some(v) => Err(self.bad(key, format!("{v} is not a list"))),
        }
    }

    /// Which layers slide: by `layer_types`, else as `default` says.
    pub(crate) fn sliding_layers(
        &self,
        layers: i64,
        default: impl Fn(i64) -> bool,
    ) -> Result<Vec<bool>> {
        let Some(list) = self.list("layer_types", layers)? else {
            return Ok((0..layers).map(default).collect());
        };
        list.iter()
            .map(|v| match v.as_str() {
                Some("sliding_attention") => Ok(true),
                Some("full_attention") => Ok(false),
                _ => Err(self.bad(
                    "layer_types",
                    format!("{v} is not supported; supported: full_attention, sliding_attention"),
                )),
            })
            .collect()
    }

    /// The family and what stands on its trunk.
    pub(super) fn architecture(&self) -> Result<(Family, Head)> {
        let supported = || {
            let names: Vec<&str> = Family::ALL.iter().map(|f| f.architecture()).collect();
            format!(
                "supported: {} and their …ForSequenceClassification",
                names.join(", ")
            )
        };
        let named = match self.get("architectures") {
            Some(Value::Array(list)) if !list.is_empty() => Some(
                list[0]
                    .as_str()
                    .ok_or_else(|| self.bad("architectures", format!("{} is not text", list[0])))?,
            ),
            Some(v) => return Err(self.bad("architectures", format!("{v} is not a list of names"))),
            None => None,
        };
        let model_type = self.get("model_type").and_then(Value::as_str);
        if let Some(name) = named {
            let found = Family::ALL.iter().find_map(|f| {
                let shape = f.shape();
                match name {
                    n if n == shape.causal_lm => Some((*f, Head::CausalLm)),
                    n if n == shape.scalar => Some((*f, Head::Scalar)),
                    _ => None,
                }
            });
            return found.ok_or_else(|| {
                self.bad(
                    "architectures",
                    format!("{name} is not supported; {}", supported()),
                )
            });
        }
        let Some(model_type) = model_type else {
            return Err(self.bad("architectures", format!("missing; {}", supported())));
        };
        let found = Family::ALL.iter().find(|f| f.model_type() == model_type);
        found.map(|f| (*f, Head::CausalLm)).ok_or_else(|| {
            self.bad(
                "model_type",
                format!("{model_type} is not supported; {}", supported()),
            )
        })
    }

    pub(super) fn refuse_quantised(&self) -> Result<()> {
        if self.get("quantization_config").is_some() {
            return Err(self.bad(
                "quantization_config",
                "quantised folders are not supported; use the unquantised weights",
            ));
        }
        Ok(())
    }

    pub(super) fn dtype(&self) -> Result<Kind> {
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

    /// `rope_parameters`, or its part for full attention where it has parts (Gemma 3).
    fn rope_parameters(&self) -> Option<&'a Value> {
        let all = self.get("rope_parameters")?;
        Some(all.get("full_attention").unwrap_or(all))
    }

    /// Rope base and scaling from `rope_parameters` (version 5) or `rope_theta` + `rope_scaling`.
    /// Where both spellings stand, both must be understood and must agree.
    pub(super) fn rope(&self, default: f64, context: i64) -> Result<(f64, RopeScaling)> {
        let old_theta = self.number("rope_theta")?;
        let old = match self.get("rope_scaling") {
            Some(v) => Some(self.rope_scaling("rope_scaling", v, context)?),
            None => None,
        };
        let Some(new) = self.rope_parameters() else {
            return Ok((
                old_theta.unwrap_or(default),
                old.unwrap_or(RopeScaling::Default),
            ));
        };
        let scaling = self.rope_scaling("rope_parameters", new, context)?;
        let theta = match new.get("rope_theta") {
            None | Some(Value::Null) => old_theta.unwrap_or(default),
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

    /// The base of sliding layers: `rope_local_base_freq`, or in `rope_parameters`' part for them.
    pub(crate) fn local_rope_theta(&self, default: f64) -> Result<f64> {
        let old = self.number("rope_local_base_freq")?;
        const KEY: &str = "rope_parameters.sliding_attention";
        let Some(new) = self
            .get("rope_parameters")
            .and_then(|v| v.get("sliding_attention"))
        else {
            return Ok(old.unwrap_or(default));
        };
        if self.rope_scaling(KEY, new, 1)? != RopeScaling::Default {
            return Err(self.bad(KEY, "only rope_type default is supported"));
        }
        let new = new.get("rope_theta").and_then(Value::as_f64);
        match (old, new) {
            (Some(a), Some(b)) if a != b => {
                Err(self.bad("rope_local_base_freq", format!("disagrees with {KEY}")))
            }
            (a, b) => Ok(b.or(a).unwrap_or(default)),
        }
    }

    /// `partial_rotary_factor`, which version 5 keeps in `rope_parameters`.
    pub(super) fn rotary_factor(&self) -> Result<f64> {
        let old = self.number("partial_rotary_factor")?;
        let new = self
            .rope_parameters()
            .and_then(|p| p.get("partial_rotary_factor"))
            .and_then(Value::as_f64);
        Ok(old.or(new).unwrap_or(1.0))
    }

    fn rope_scaling(&self, key: &str, v: &Value, context: i64) -> Result<RopeScaling> {
        let Some(map) = v.as_object() else {
            return Err(self.bad(key, format!("{v} is not an object")));
        };
        let maybe = |name: &str| -> Result<Option<f64>> {
            match map.get(name) {
                None | Some(Value::Null) => Ok(None),
                Some(v) => v.as_f64().map(Some).ok_or_else(|| {
                    self.bad(&format!("{key}.{name}"), format!("{v} is not a number"))
                }),
            }
        };
        let number = |name: &str| -> Result<f64> {
            maybe(name)?
                .ok_or_else(|| self.bad(&format!("{key}.{name}"), "missing; it must be a number"))
        };
        let kind = map
            .get("rope_type")
            .or_else(|| map.get("type"))
            .filter(|v| !v.is_null());
        let plain = |k: &String| k == "rope_theta" || k == "partial_rotary_factor";
        match kind.map(|k| k.as_str().unwrap_or_default()) {
            None if map.keys().all(plain) => Ok(RopeScaling::Default),
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
            Some("yarn") => {
                let factor = number("factor")?;
                let scale = |m: f64| {
                    if factor <= 1.0 {
                        1.0
                    } else {
                        0.1 * m * factor.ln() + 1.0
                    }
                };
                let attention_factor = match (
                    maybe("attention_factor")?,
                    maybe("mscale")?,
                    maybe("mscale_all_dim")?,
                ) {
                    (Some(given), _, _) => given,
                    (None, Some(a), Some(b)) if a != 0.0 && b != 0.0 => scale(a) / scale(b),
                    _ => scale(1.0),
                };
                let truncate = match map.get("truncate") {
                    None | Some(Value::Null) => true,
                    Some(v) => v.as_bool().ok_or_else(|| {
                        self.bad(
                            &format!("{key}.truncate"),
                            format!("{v} is not true or false"),
                        )
                    })?,
                };
                Ok(RopeScaling::Yarn {
                    factor,
                    beta_fast: maybe("beta_fast")?.unwrap_or(32.0),
                    beta_slow: maybe("beta_slow")?.unwrap_or(1.0),
                    attention_factor,
                    original_max_position_embeddings: maybe("original_max_position_embeddings")?
                        .unwrap_or(context as f64),
                    truncate,
                })
            }
            Some(_) => Err(self.bad(
                &format!("{key}.rope_type"),
                format!(
                    "{} is not supported; supported: default, linear, llama3, yarn",
                    kind.unwrap_or(&Value::Null)
                ),
            )),
        }
    }
}
