//! AdamW, all parameters in one call.

use std::collections::HashMap;

use tch::{Kind, Tensor};

use crate::error::{Error, Result, ensure};
use crate::ffi;

/// AdamW's settings (Loshchilov & Hutter 2019, algorithm 2), but for the learning rate, which each
/// step brings along.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWConfig {
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay of tensors with two or more dimensions; biases and norms have none.
    pub weight_decay: f64,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults, without weight decay.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
        }
    }
}

/// Whether weight decay applies to a parameter.
#[must_use]
pub fn decays(parameter: &Tensor) -> bool {
    parameter.dim() >= 2
}

#[derive(Debug)]
struct Moments {
    name: String,
    parameter: Tensor,
    first: Tensor,
    second: Tensor,
    steps: Tensor,
}

/// AdamW over named parameters: m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g²,
/// θ ← θ − lr·(λθ + m̂ / (√v̂ + ε)).
#[derive(Debug)]
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Moments>,
}

impl AdamW {
    /// An optimiser of `parameters`, whose moments begin at 0. Parameters that want no gradient are
    /// left alone.
    #[must_use]
    pub fn new(parameters: Vec<(String, Tensor)>, config: AdamWConfig) -> Self {
        let slots = parameters
            .into_iter()
            .filter(|(_, p)| p.requires_grad())
            .map(|(name, parameter)| Moments {
                first: parameter.detach().zeros_like(),
                second: parameter.detach().zeros_like(),
                steps: Tensor::zeros([1], (Kind::Float, parameter.device())),
                name,
                parameter,
            })
            .collect();
        Self { config, slots }
    }

    /// The parameters in their order.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.slots.iter().map(|s| (s.name.as_str(), &s.parameter))
    }

    /// The gradients that are defined, in the parameters' order.
    #[must_use]
    pub fn grads(&self) -> Vec<Tensor> {
        self.slots
            .iter()
            .map(|s| s.parameter.grad())
            .filter(Tensor::defined)
            .collect()
    }

    /// One step with the learning rate `lr`. A parameter without a gradient is left alone.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        for decay in [true, false] {
            let chosen: Vec<(&Moments, Tensor)> = self
                .slots
                .iter()
                .filter(|s| decays(&s.parameter) == decay)
                .map(|s| (s, s.parameter.grad()))
                .filter(|(_, g)| g.defined())
                .collect();
            if chosen.is_empty() {
                continue;
            }
            let mut list: Vec<&Tensor> = Vec::with_capacity(chosen.len() * 5);
            list.extend(chosen.iter().map(|(s, _)| &s.parameter));
            list.extend(chosen.iter().map(|(_, g)| g));
            list.extend(chosen.iter().map(|(s, _)| &s.first));
            list.extend(chosen.iter().map(|(s, _)| &s.second));
            list.extend(chosen.iter().map(|(s, _)| &s.steps));
            // The fused kernel expects the counts of this step.
            let _guard = tch::no_grad_guard();
            for (slot, _) in &chosen {
                let _ = slot.steps.shallow_clone().f_add_scalar_(1)?;
            }
            let weight_decay = if decay { self.config.weight_decay } else { 0.0 };
            ffi::adamw(
                &list,
                lr,
                (self.config.beta1, self.config.beta2),
                weight_decay,
                self.config.eps,
            )?;
        }
        Ok(())
    }

    /// Forgets all gradients.
    pub fn zero_grad(&mut self) {
        for slot in &mut self.slots {
            slot.parameter.zero_grad();
        }
    }

    /// The moments and step counts by name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.slots
            .iter()
            .flat_map(|s| {
                [
                    (format!("exp_avg.{}", s.name), s.first.shallow_clone()),
                    (format!("exp_avg_sq.{}", s.name), s.second.shallow_clone()),
                    (format!("step.{}", s.name), s.steps.shallow_clone()),
                ]
            })
            .collect()
    }

    /// Takes over a state that [`AdamW::state`] gave.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape; nothing is changed then.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let mut copies = Vec::new();
        for slot in &self.slots {
            for (kind, own) in [
                ("exp_avg", &slot.first),
                ("exp_avg_sq", &slot.second),
                ("step", &slot.steps),
            ] {
                let name = format!("{kind}.{}", slot.name);
                let saved = state.get(&name).ok_or_else(|| Error::Argument {
                    op: "adamw",
                    what: format!("the state has no `{name}`"),
                })?;
                ensure(saved.size() == own.size(), "adamw", || {
                    format!("`{name}` is {:?}, expected {:?}", saved.size(), own.size())
                })?;
                copies.push((own.shallow_clone(), saved));
            }
        }
        let _guard = tch::no_grad_guard();
        for (mut own, saved) in copies {
            own.f_copy_(saved)?;
        }
        Ok(())
    }
}
