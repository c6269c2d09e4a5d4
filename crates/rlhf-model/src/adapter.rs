//! Low-rank adapters on frozen weights, in the folder layout of PEFT.
//!
//! An adapted model trains its adapter only ([`crate::CausalLm::parameters`] lists nothing else); its
//! frozen weights are shared with [`Transformer::base`], the reference policy that costs nothing.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use rlhf_data::seed::{Purpose, Stream};
use serde_json::{Value, json};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result, TensorProblem};
use crate::linear::{Linear, LowRank};
use crate::transformer::{Transformer, normal, trainable};
use crate::trunk::Trunk;
use crate::weights::{Entry, Staging, WeightFile, sync_write, write_safetensors};

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// What PEFT writes before a module's path.
const PREFIX: &str = "base_model.model.";

/// Which matrices get an adapter, and of what kind.
#[derive(Clone, Debug, PartialEq)]
pub struct AdapterConfig {
    /// The rank r.
    pub rank: i64,
    /// α: the product of the two matrices is scaled by α/r, or by α/√r where that is stabilised.
    pub alpha: f64,
    /// Scale by α/√r (rsLoRA, Kalajdzievski, arXiv 2312.03732).
    pub rank_stabilized: bool,
    /// Learn each row's length apart from its direction (DoRA, Liu et al., arXiv 2402.09353).
    pub dora: bool,
    /// The ends of the modules' names, such as `q_proj`; all matrices of the layers where empty.
    pub targets: Vec<String>,
}

impl Default for AdapterConfig {
    /// LoRA of rank 16 with α 32 on every matrix of the layers.
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            rank_stabilized: false,
            dora: false,
            targets: Vec::new(),
        }
    }
}

impl AdapterConfig {
    fn validate(&self) -> Result<()> {
        let bad = |what: String| Err(Error::Argument(format!("adapter: {what}")));
        if self.rank < 1 {
            return bad(format!("rank is {}, expected at least 1", self.rank));
        }
        if !(self.alpha.is_finite() && self.alpha > 0.0) {
            return bad(format!(
                "alpha is {}, expected a positive number",
                self.alpha
            ));
        }
        Ok(())
    }

    fn scale(&self) -> f64 {
        let r = self.rank as f64;
        self.alpha / if self.rank_stabilized { r.sqrt() } else { r }
    }

    fn hits(&self, module: &str) -> bool {
        let ends = |t: &String| {
            module
                .strip_suffix(t.as_str())
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        self.targets.is_empty() || self.targets.iter().any(ends)
    }

    /// Every target must be some module's.
    fn check_targets(&self, trunk: &Trunk) -> Result<()> {
        for target in &self.targets {
            let one = Self {
                targets: vec![target.clone()],
                ..self.clone()
            };
            if !trunk.linears().any(|l| one.hits(&l.name)) {
                let mut names: Vec<&str> = trunk
                    .linears()
                    .filter_map(|l| l.name.rsplit('.').next())
                    .collect();
                names.sort_unstable();
                names.dedup();
                return Err(Error::Argument(format!(
                    "adapter: no matrix is called {target}; there are {}",
                    names.join(", ")
                )));
            }
        }
        Ok(())
    }

    fn to_json(&self, trunk: &Trunk, base: Option<&str>) -> Value {
        let targets = match self.targets.as_slice() {
            [] => json!("all-linear"),
            list => json!(list),
        };
        json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "use_rslora": self.rank_stabilized,
            "use_dora": self.dora,
            "target_modules": targets,
            "fan_in_fan_out": trunk.config.family.shape().transposed,
            "lora_dropout": 0.0,
            "bias": "none",
            "inference_mode": true,
        })
    }

    fn parse(text: &str, file: &Path) -> Result<Self> {
        let json: Value = serde_json::from_str(text)
            .map_err(|e| Error::format(file, format!("not JSON: {e}")))?;
        let bad = |key: &str, message: String| Error::Config {
            file: file.display().to_string(),
            key: key.into(),
            message,
        };
        let get = |key: &str| json.get(key).filter(|v| !v.is_null());
        let number = |key: &str| {
            get(key)
                .map(|v| {
                    v.as_f64()
                        .ok_or_else(|| bad(key, format!("{v} is not a number")))
                })
                .transpose()
        };
        let flag = |key: &str| {
            get(key).map_or(Ok(false), |v| {
                v.as_bool()
                    .ok_or_else(|| bad(key, format!("{v} is not true or false")))
            })
        };
        match get("peft_type").and_then(Value::as_str) {
            Some("LORA") => {}
            other => {
                return Err(bad(
                    "peft_type",
                    format!("{other:?} is not supported; supported: LORA"),
                ));
            }
        }
        if get("bias").is_some_and(|v| v != "none") {
            return Err(bad("bias", "only none is supported".into()));
        }
        for key in [
            "modules_to_save",
            "rank_pattern",
            "alpha_pattern",
            "layers_to_transform",
            "trainable_token_indices",
            "target_parameters",
            "exclude_modules",
            "layer_replication",
            "lora_bias",
        ] {
            let empty = |v: &Value| {
                v == &json!(false)
                    || v.as_array().is_some_and(Vec::is_empty)
                    || v.as_object().is_some_and(serde_json::Map::is_empty)
            };
            if let Some(v) = get(key).filter(|v| !empty(v)) {
                return Err(bad(key, format!("{v} is not supported")));
            }
        }
        let targets = match get("target_modules") {
            Some(Value::String(s)) if s == "all-linear" => Vec::new(),
            Some(Value::Array(list)) if !list.is_empty() => list
                .iter()
                .map(|v| v.as_str().map(str::to_owned))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| bad("target_modules", "holds something that is no name".into()))?,
            other => {
                return Err(bad(
                    "target_modules",
                    format!("{other:?} is not supported; expected a list of names or all-linear"),
                ));
            }
        };
        let rank = number("r")?.ok_or_else(|| bad("r", "missing".into()))?;
        if !(rank >= 1.0 && rank.fract() == 0.0 && rank < 1e6) {
            return Err(bad("r", format!("{rank} is not a rank")));
        }
        let config = Self {
            rank: rank as i64,
            alpha: number("lora_alpha")?.ok_or_else(|| bad("lora_alpha", "missing".into()))?,
            rank_stabilized: flag("use_rslora")?,
            dora: flag("use_dora")?,
            targets,
        };
        config
            .validate()
            .map_err(|e| bad("lora_alpha", e.to_string()))?;
        Ok(config)
    }
}

/// A tensor of an adapter, by its name in PEFT's file.
pub(crate) fn adapter_tensors(linear: &Linear) -> Vec<(String, Tensor)> {
    let Some(l) = &linear.adapter else {
        return Vec::new();
    };
    let name = |part: &str| format!("{PREFIX}{}.{part}", linear.name);
    let mut all = vec![
        (name("lora_A.weight"), l.a.shallow_clone()),
        (name("lora_B.weight"), l.b.shallow_clone()),
    ];
    if let Some(m) = &l.magnitude {
        all.push((name("lora_magnitude_vector"), m.shallow_clone()));
    }
    all
}

impl Trunk {
    /// Freezes every weight and puts a fresh adapter on the matrices that `config` names: A normal
    /// with deviation 1/√(3·in), as wide as PEFT's uniform start, B zero. Adapters are f32 at least.
    pub(crate) fn adapt(&mut self, config: &AdapterConfig, seed: u64) -> Result<()> {
        config.validate()?;
        config.check_targets(self)?;
        self.freeze();
        let (kind, device) = (adapter_kind(self.kind()), self.device());
        let stream = Stream::new(seed, Purpose::Init);
        self.each_linear(&mut |linear| {
            if !config.hits(&linear.name) {
                linear.adapter = None;
                return Ok(());
            }
            let (_, from) = linear.size();
            let std = 1.0 / (3.0 * from as f64).sqrt();
            let name = format!("{}.lora_A", linear.name);
            let a = normal(&stream, &name, &[config.rank, from], std)?
                .f_to_kind(kind)?
                .f_to_device(device)?;
            linear.adapt(a, config.scale(), config.dora)
        })?;
        self.adapter = Some(config.clone());
        Ok(())
    }

    /// Freezes every weight and puts on the adapter that `tensors` hold, by PEFT's names.
    fn attach(
        &mut self,
        config: &AdapterConfig,
        tensors: &mut HashMap<String, Tensor>,
    ) -> Result<()> {
        self.freeze();
        self.each_linear(&mut |linear| {
            linear.adapter = None;
            let mut take = |part: &str| tensors.remove(&format!("{PREFIX}{}.{part}", linear.name));
            if let (Some(a), Some(b)) = (take("lora_A.weight"), take("lora_B.weight")) {
                let magnitude = take("lora_magnitude_vector");
                linear.adapter = Some(LowRank {
                    a: trainable(&a),
                    b: trainable(&b),
                    scale: config.scale(),
                    magnitude: magnitude.as_ref().map(trainable),
                });
            }
            Ok(())
        })?;
        self.adapter = Some(config.clone());
        Ok(())
    }

    /// The same trunk with adapters of its own, the frozen weights shared.
    pub(crate) fn duplicate_adapted(&self, config: &AdapterConfig) -> Result<Self> {
        let mut trunk = self.base()?;
        let mut copies = crate::transformer::copies(&self.trainable())?;
        trunk.attach(config, &mut copies)?;
        Ok(trunk)
    }
}

fn adapter_kind(weights: Kind) -> Kind {
    match weights {
        Kind::Double => Kind::Double,
        _ => Kind::Float,
    }
}

impl Transformer {
    /// Freezes the weights and starts an adapter, which is all that is trained from then on. It
    /// changes nothing until its first step. An adapter already there is replaced.
    ///
    /// # Errors
    /// [`Error::Argument`] when the rank or α is not positive or a target is no matrix of the layers.
    pub fn adapt(mut self, config: &AdapterConfig, seed: u64) -> Result<Self> {
        self.freeze_head();
        self.trunk_mut().adapt(config, seed)?;
        Ok(self)
    }

    /// Puts on the adapter of a PEFT folder (`adapter_config.json`, `adapter_model.safetensors`).
    ///
    /// # Errors
    /// [`Error::Config`] naming a key that is not supported; [`Error::Tensors`] listing every tensor
    /// that is missing or misshaped; [`Error::Format`] when the file holds one that fits no matrix.
    pub fn load_adapter(mut self, dir: &Path) -> Result<Self> {
        let file = dir.join(CONFIG);
        let text = std::fs::read_to_string(&file).map_err(Error::io(&file))?;
        let config = AdapterConfig::parse(&text, &file)?;
        config.check_targets(self.trunk())?;
        let mut tensors = read_adapter(&config, self.trunk(), &dir.join(TENSORS))?;
        self.freeze_head();
        self.trunk_mut().attach(&config, &mut tensors)?;
        Ok(self)
    }

    /// Writes the adapter as a PEFT folder, all or nothing. `base` is what PEFT will say it belongs to.
    ///
    /// # Errors
    /// [`Error::Argument`] when there is no adapter; [`Error::Io`] when the folder cannot be written.
    pub fn save_adapter(&self, dir: &Path, base: Option<&str>) -> Result<()> {
        let trunk = self.trunk();
        let Some(config) = &trunk.adapter else {
            return Err(Error::Argument("this model has no adapter to save".into()));
        };
        let tensors = trunk.trainable();
        let entries = tensors
            .iter()
            .map(|(name, t)| Entry::of_tensor(name, t, t.kind()))
            .collect::<Result<Vec<_>>>()?;
        let staging = Staging::new(dir)?;
        write_safetensors(&staging.path(TENSORS), &entries)?;
        let json = config.to_json(trunk, base);
        sync_write(&staging.path(CONFIG), format!("{json:#}\n").as_bytes())?;
        staging.commit()
    }

    /// The adapter's settings, where there is one.
    #[must_use]
    pub fn adapter(&self) -> Option<&AdapterConfig> {
        self.trunk().adapter.as_ref()
    }
}

/// Reads the tensors of an adapter, every disagreement with the model collected first.
fn read_adapter(
    config: &AdapterConfig,
    trunk: &Trunk,
    path: &Path,
) -> Result<HashMap<String, Tensor>> {
    let file = WeightFile::open(path)?;
    let mut wanted = BTreeMap::new();
    for linear in trunk.linears().filter(|l| config.hits(&l.name)) {
        let (out, from) = linear.size();
        let mut want = |part: &str, shape: Vec<i64>| {
            wanted.insert(format!("{PREFIX}{}.{part}", linear.name), shape);
        };
        want("lora_A.weight", vec![config.rank, from]);
        want("lora_B.weight", vec![out, config.rank]);
        if config.dora {
            want("lora_magnitude_vector", vec![out]);
        }
    }
    let mut problems = Vec::new();
    for (name, shape) in &wanted {
        match file.tensors().get(name) {
            None => problems.push(TensorProblem::Missing { name: name.clone() }),
            Some(info)
                if !info
                    .shape
                    .iter()
                    .map(|&d| d as i64)
                    .eq(shape.iter().copied()) =>
            {
                problems.push(TensorProblem::Shape {
                    name: name.clone(),
                    expected: shape.clone(),
                    found: info.shape.clone(),
                });
            }
            Some(_) => {}
        }
    }
    if !problems.is_empty() {
        return Err(Error::Tensors {
            file: path.display().to_string(),
            problems,
        });
    }
    if let Some(name) = file.tensors().keys().find(|n| !wanted.contains_key(*n)) {
        return Err(Error::format(
            path,
            format!("tensor {name} belongs to no matrix that {CONFIG} names"),
        ));
    }
    let (kind, device): (Kind, Device) = (adapter_kind(trunk.kind()), trunk.device());
    wanted
        .into_keys()
        .map(|name| {
            let tensor = file.read(&name, device, kind)?;
            Ok((name, tensor))
        })
        .collect()
}
