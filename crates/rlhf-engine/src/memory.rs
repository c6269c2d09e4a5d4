//! How a stage saves memory: adapters on frozen weights, eight-bit weights, recomputed layers.

use rlhf_model::{AdapterConfig, ScalarModel, Transformer};
use serde::{Deserialize, Serialize};

/// What of a model is trained, and what is kept for backward. By default all of it, and everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// Train a low-rank adapter; the reference is then the model without it, at no cost.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lora: Option<Lora>,
    /// Keep the frozen matrices of the layers in eight bits (with `lora` only).
    #[serde(default)]
    pub int8_base: bool,
    /// Keep for backward only the input of every so many layers and run them again; 0 keeps all.
    #[serde(default)]
    pub recompute: usize,
}

/// A low-rank adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// The rank r.
    pub rank: i64,
    /// The product is scaled by α/r, or α/√r where stabilised.
    pub alpha: f64,
    /// rsLoRA's scale.
    pub rank_stabilized: bool,
    /// DoRA: each row's length apart from its direction.
    pub dora: bool,
    /// Ends of module names; every matrix of the layers where empty.
    pub targets: Vec<String>,
}

impl Default for Lora {
    fn default() -> Self {
        let c = AdapterConfig::default();
        Self {
            rank: c.rank,
            alpha: c.alpha,
            rank_stabilized: c.rank_stabilized,
            dora: c.dora,
            targets: c.targets,
        }
    }
}

impl Lora {
    fn config(&self) -> AdapterConfig {
        AdapterConfig {
            rank: self.rank,
            alpha: self.alpha,
            rank_stabilized: self.rank_stabilized,
            dora: self.dora,
            targets: self.targets.clone(),
        }
    }
}

impl Memory {
    /// What is wrong with it, if anything.
    pub(crate) fn problem(&self) -> Option<&'static str> {
        match &self.lora {
            None if self.int8_base => {
                Some("memory.int8_base needs memory.lora: eight-bit weights cannot be trained")
            }
            Some(l) if l.rank < 1 => Some("memory.lora.rank must be at least 1"),
            Some(l) if !(l.alpha > 0.0 && l.alpha.is_finite()) => {
                Some("memory.lora.alpha must be above 0")
            }
            _ => None,
        }
    }

    /// Readies a policy for its training.
    pub(crate) fn policy(
        &self,
        mut model: Transformer,
        seed: u64,
    ) -> rlhf_model::Result<Transformer> {
        if let Some(lora) = &self.lora {
            if self.int8_base {
                model = model.into_int8()?;
            }
            model = model.adapt(&lora.config(), seed)?;
        }
        model.set_recompute(self.recompute);
        Ok(model)
    }

    /// Readies a reward or value model for its training; its head is trained in any case.
    pub(crate) fn scalar(
        &self,
        mut model: ScalarModel,
        seed: u64,
    ) -> rlhf_model::Result<ScalarModel> {
        if let Some(lora) = &self.lora {
            if self.int8_base {
                model = model.into_int8()?;
            }
            model = model.adapt(&lora.config(), seed)?;
        }
        model.set_recompute(self.recompute);
        Ok(model)
    }
}

/// For serde: leaves the table out where nothing in it is set.
pub(crate) fn is_default(memory: &Memory) -> bool {
    *memory == Memory::default()
}
