//! Optimisers that step one parameter at a time: their slots, and state by name.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::adafactor::{self, AdafactorConfig};
use super::adamw8;
use super::muon::{self, MuonConfig};
use super::rmsprop::{self, RmsPropConfig};
use super::{AdamWConfig, decays};
use crate::error::{Error, Result, ensure};
use crate::ffi;

#[derive(Clone, Copy, Debug)]
pub(super) enum Rule {
    AmsGrad(AdamWConfig),
    AdamW8bit(AdamWConfig),
    Adafactor(AdafactorConfig),
    RmsProp(RmsPropConfig),
    Muon(MuonConfig),
}

/// A parameter with what its rule remembers.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) name: String,
    pub(super) parameter: Tensor,
    state: Vec<(&'static str, Tensor)>,
}

impl Slot {
    /// A tensor of the state, if its rule has it for this parameter.
    pub(super) fn find(&self, kind: &str) -> Option<Tensor> {
        let found = self.state.iter().find(|(k, _)| *k == kind);
        found.map(|(_, t)| t.shallow_clone())
    }

    pub(super) fn get(&self, kind: &str) -> Result<Tensor> {
        self.find(kind).ok_or_else(|| Error::Argument {
            op: "optimizer",
            what: format!("`{}` has no `{kind}`", self.name),
        })
    }

    /// Counts this step: 1 at the first.
    pub(super) fn count(&self) -> Result<f64> {
        let mut steps = self.get("step")?;
        Ok(steps.f_add_scalar_(1)?.f_double_value(&[0])?)
    }
}

/// The parameter's value or gradient in the type that a rule computes in.
pub(super) fn wide(t: &Tensor) -> Tensor {
    match t.kind() {
        Kind::Half | Kind::BFloat16 => t.detach().to_kind(Kind::Float),
        _ => t.detach(),
    }
}

/// Zeros of the parameter's size in the type that a rule computes in. A vocabulary's table takes memory for the rows
/// that a step writes.
pub(super) fn zeros(parameter: &Tensor) -> Tensor {
    let like = wide(parameter);
    // Without room for them there is no training at all, and libtorch's own zeros say so.
    ffi::zeros_like(&like).unwrap_or_else(|_| like.zeros_like())
}

/// AdamW's two moments.
pub(super) fn moments(parameter: &Tensor) -> Vec<(&'static str, Tensor)> {
    vec![
        ("exp_avg", zeros(parameter)),
        ("exp_avg_sq", zeros(parameter)),
    ]
}

/// One step of AdamW for one parameter.
pub(super) fn adamw(slot: &Slot, grad: &Tensor, lr: f64, c: &AdamWConfig) -> Result<()> {
    slot.count()?;
    let (m, v) = (slot.get("exp_avg")?, slot.get("exp_avg_sq")?);
    let steps = slot.get("step")?.f_to_device(slot.parameter.device())?;
    let weight_decay = if decays(&slot.parameter) {
        c.weight_decay
    } else {
        0.0
    };
    // The fused kernel wants one type.
    let wide_parameter = wide(&slot.parameter);
    let list = [&wide_parameter, &wide(grad), &m, &v, &steps];
    ffi::adamw(&list, lr, 1.0, (c.beta1, c.beta2), weight_decay, c.eps)?;
    if wide_parameter.kind() != slot.parameter.kind() {
        slot.parameter.shallow_clone().f_copy_(&wide_parameter)?;
    }
    Ok(())
}

fn amsgrad(slot: &Slot, grad: &Tensor, lr: f64, c: &AdamWConfig) -> Result<()> {
    let step = slot.count()?;
    let (mut m, mut v, mut top) = (
        slot.get("exp_avg")?,
        slot.get("exp_avg_sq")?,
        slot.get("max_exp_avg_sq")?,
    );
    let g = wide(grad);
    m.f_copy_(&(&m * c.beta1 + &g * (1.0 - c.beta1)))?;
    v.f_copy_(&(&v * c.beta2 + g.square() * (1.0 - c.beta2)))?;
    top.f_copy_(&top.maximum(&v))?;
    let decay = if decays(&slot.parameter) {
        c.weight_decay
    } else {
        0.0
    };
    let root = top.sqrt() / (1.0 - c.beta2.powf(step)).sqrt() + c.eps;
    let next =
        wide(&slot.parameter) * (1.0 - lr * decay) - &m / root * (lr / (1.0 - c.beta1.powf(step)));
    slot.parameter.shallow_clone().f_copy_(&next)?;
    Ok(())
}

#[derive(Debug)]
pub(super) struct Each {
    rule: Rule,
    slots: Vec<Slot>,
}

/// What a rule remembers of a parameter before the first step.
fn beginning(rule: &Rule, name: &str, parameter: &Tensor) -> Vec<(&'static str, Tensor)> {
    let mut state = match rule {
        Rule::AmsGrad(_) => {
            let mut all = moments(parameter);
            all.push(("max_exp_avg_sq", zeros(parameter)));
            all
        }
        Rule::AdamW8bit(_) => adamw8::state(parameter),
        Rule::Adafactor(_) => adafactor::state(parameter),
        Rule::RmsProp(c) => rmsprop::state(parameter, c),
        Rule::Muon(_) => muon::state(name, parameter),
    };
    state.push((
        "step",
        // On the host, which reads it at every step.
        Tensor::zeros([1], (Kind::Float, Device::Cpu)),
    ));
    state
}

impl Each {
    pub(super) fn new(parameters: Vec<(String, Tensor)>, rule: Rule) -> Self {
        let slots = parameters
            .into_iter()
            .filter(|(_, p)| p.requires_grad())
            .map(|(name, parameter)| Slot {
                state: beginning(&rule, &name, &parameter),
                name,
                parameter,
            })
            .collect();
        Self { rule, slots }
    }

    pub(super) fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.slots.iter().map(|s| (s.name.as_str(), &s.parameter))
    }

    pub(super) fn forget_moments(&mut self) {
        for slot in &mut self.slots {
            slot.state = beginning(&self.rule, &slot.name, &slot.parameter);
        }
    }

    pub(super) fn step_by(&mut self, lr: f64, factor: f64) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for slot in &self.slots {
            let grad = slot.parameter.grad();
            if !grad.defined() {
                continue;
            }
            let grad = if factor == 1.0 { grad } else { grad * factor };
            match &self.rule {
                Rule::AmsGrad(c) => amsgrad(slot, &grad, lr, c)?,
                Rule::AdamW8bit(c) => adamw8::step(slot, &grad, lr, c)?,
                Rule::Adafactor(c) => adafactor::step(slot, &grad, lr, c)?,
                Rule::RmsProp(c) => rmsprop::step(slot, &grad, lr, c)?,
                Rule::Muon(c) => muon::step(slot, &grad, lr, c)?,
            }
        }
        Ok(())
    }

    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let named = |s: &Slot| {
            let of = |(kind, t): &(&'static str, Tensor)| {
                (format!("{kind}.{}", s.name), t.shallow_clone())
            };
            s.state.iter().map(of).collect::<Vec<_>>()
        };
        self.slots.iter().flat_map(named).collect()
    }

    pub(super) fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let mut copies = Vec::new();
        for (name, own) in self.state() {
            let saved = state.get(&name).ok_or_else(|| Error::Argument {
                op: "optimizer",
                what: format!("the state has no `{name}`"),
            })?;
            let codes = own.kind() == Kind::Uint8 || saved.kind() == Kind::Uint8;
            ensure(
                saved.size() == own.size() && (!codes || saved.kind() == own.kind()),
                "optimizer",
                || {
                    format!(
                        "`{name}` is {:?} {:?}, expected {:?} {:?}",
                        saved.kind(),
                        saved.size(),
                        own.kind(),
                        own.size()
                    )
                },
            )?;
            copies.push((own, saved));
        }
        let _guard = tch::no_grad_guard();
        for (mut own, saved) in copies {
            own.f_copy_(saved)?;
        }
        Ok(())
    }
}
