//! How a stage saves memory: weights of 16 bits, adapters on frozen weights, eight-bit weights, recomputed
//! layers.

use rlhf_kernels::optim::NarrowStep;
use rlhf_model::{AdapterConfig, ScalarModel, Transformer};
use serde::{Deserialize, Serialize};
use tch::Kind;

/// What of a model is trained, and what is kept for backward. By default all of it, and everything.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Memory {
    /// How the weights are kept and stepped.
    #[serde(default, skip_serializing_if = "is_default")]
    pub weights: WeightsKind,
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

/// The type of a stage's weights, gradients and activations. Log-softmax, losses and the optimiser's moments
/// are f32 whatever it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightsKind {
    /// f32.
    #[default]
    F32,
    /// bf16, stepped on copies in f32.
    Bf16,
    /// bf16 without copies, each step rounded with chances by nearness.
    Bf16Stochastic,
}

impl WeightsKind {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 | Self::Bf16Stochastic => Kind::BFloat16,
        }
    }

    pub(crate) fn step(self) -> NarrowStep {
        match self {
            Self::F32 | Self::Bf16 => NarrowStep::Masters,
            Self::Bf16Stochastic => NarrowStep::Stochastic,
        }
    }
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
            Some(_) if self.int8_base && self.weights != WeightsKind::F32 => Some(
                "memory.int8_base keeps the frozen weights in eight bits; leave memory.weights out",
            ),
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

/// For serde: leaves out what nobody set.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
