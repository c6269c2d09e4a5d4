//! AdamW, all parameters in one call.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use super::each::{wide, zeros};
use super::forget_grads;
use crate::error::{Error, Result, ensure};
use crate::{ffi, reference};

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
    /// How [`AdamW`] steps parameters of 16 bits.
    pub narrow: NarrowStep,
}

/// How parameters in bf16 or f16 are stepped. Moments are f32 and the step is computed in f32 either way;
/// but a step of a thousandth of a parameter is less than half the distance to its neighbour in bf16, and
/// to nearest it would be lost each time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NarrowStep {
    /// An f32 copy of every parameter is stepped; the parameter is that copy, rounded to nearest.
    #[default]
    Masters,
    /// No copy: the stepped number is rounded to one of its two neighbours in bf16, with chances by nearness
    /// (Gupta et al. 2015, arXiv 1502.02551), so that it is right on average. f16 is rounded to nearest.
    Stochastic,
}

impl Default for AdamWConfig {
    /// PyTorch's defaults, without weight decay.
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            narrow: NarrowStep::default(),
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
    /// The f32 copy of a parameter of 16 bits.
    master: Option<Tensor>,
    /// The first of this parameter's places among those of all.
    place: u32,
}

impl Moments {
    fn new(name: String, parameter: Tensor, place: u32, narrow: NarrowStep) -> Self {
        let master = is_narrow(&parameter) && narrow == NarrowStep::Masters;
        Self {
            first: zeros(&parameter),
            second: zeros(&parameter),
            steps: Tensor::zeros([1], (Kind::Float, parameter.device())),
            master: master.then(|| wide(&parameter)),
            name,
            parameter,
            place,
        }
    }

    /// What is remembered beside the parameter, with its kind.
    fn state(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        [
            ("exp_avg", &self.first),
            ("exp_avg_sq", &self.second),
            ("step", &self.steps),
        ]
        .into_iter()
        .chain(self.master.iter().map(|m| ("master", m)))
    }

    /// Steps a parameter of 16 bits.
    fn step_narrow(&self, grad: &Tensor, lr: f64, decay: f64, c: &AdamWConfig) -> Result<()> {
        let stepped = self
            .master
            .as_ref()
            .map_or_else(|| wide(&self.parameter), Tensor::shallow_clone);
        let list = [
            &stepped,
            &wide(grad),
            &self.first,
            &self.second,
            &self.steps,
        ];
        ffi::adamw(&list, lr, 1.0, (c.beta1, c.beta2), decay, c.eps)?;
        let mut parameter = self.parameter.detach();
        if self.master.is_some() || parameter.kind() != Kind::BFloat16 {
            parameter.f_copy_(&stepped)?;
            return Ok(());
        }
        let step = self.steps.f_double_value(&[0])? as u32;
        let salt = self.place.wrapping_add(step.wrapping_mul(0x9e37_79b9));
        let fused = parameter.device() == Device::Cpu || ffi::has_kernels(&parameter);
        if fused && parameter.is_contiguous() {
            return ffi::round_to_bf16(&stepped.f_contiguous()?, &parameter, salt);
        }
        parameter.f_copy_(&reference::round_to_bf16(&stepped, salt))?;
        Ok(())
    }
}

fn is_narrow(parameter: &Tensor) -> bool {
    matches!(parameter.kind(), Kind::Half | Kind::BFloat16)
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
        let mut place = 0u32;
        let slots = parameters
            .into_iter()
            .filter(|(_, p)| p.requires_grad())
            .map(|(name, parameter)| {
                let first = place;
                place = place.wrapping_add(parameter.numel() as u32);
                Moments::new(name, parameter, first, config.narrow)
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

    /// Begins the moments and their counts anew at 0.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forget_moments(&mut self) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for slot in &self.slots {
            for tensor in [&slot.first, &slot.second, &slot.steps] {
                let _ = tensor.shallow_clone().f_zero_()?;
            }
        }
        Ok(())
    }

    /// One step with the learning rate `lr`. A parameter without a gradient is left alone.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn step(&mut self, lr: f64) -> Result<()> {
        self.step_by(lr, 1.0)
    }

    /// As [`AdamW::step`] with gradients times `factor`.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn step_by(&mut self, lr: f64, factor: f64) -> Result<()> {
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
            // The fused kernel expects the counts of this step.
            let _guard = tch::no_grad_guard();
            let counts: Vec<&Tensor> = chosen.iter().map(|(slot, _)| &slot.steps).collect();
            ffi::count(&counts)?;
            let weight_decay = if decay { self.config.weight_decay } else { 0.0 };
            let (narrow, whole): (Vec<_>, Vec<_>) = chosen
                .into_iter()
                .partition(|(slot, _)| is_narrow(&slot.parameter));
            for (slot, grad) in narrow {
                slot.step_narrow(&(grad * factor), lr, weight_decay, &self.config)?;
            }
            if whole.is_empty() {
                continue;
            }
            let mut list: Vec<&Tensor> = Vec::with_capacity(whole.len() * 5);
            list.extend(whole.iter().map(|(s, _)| &s.parameter));
            list.extend(whole.iter().map(|(_, g)| g));
            list.extend(whole.iter().map(|(s, _)| &s.first));
            list.extend(whole.iter().map(|(s, _)| &s.second));
            list.extend(whole.iter().map(|(s, _)| &s.steps));
            let betas = (self.config.beta1, self.config.beta2);
            ffi::adamw(&list, lr, factor, betas, weight_decay, self.config.eps)?;
        }
        Ok(())
    }

    /// Forgets all gradients.
    pub fn zero_grad(&mut self) {
        forget_grads(self.slots.iter().map(|s| &s.parameter));
    }

    /// The moments and step counts by name: `exp_avg.NAME`, `exp_avg_sq.NAME`, `step.NAME`, and
    /// `master.NAME` of parameters of 16 bits.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let named = |s: &Moments| {
            let of = |(kind, t): (&str, &Tensor)| (format!("{kind}.{}", s.name), t.shallow_clone());
            s.state().map(of).collect::<Vec<_>>()
        };
        self.slots.iter().flat_map(named).collect()
    }

    /// Takes over a state that [`AdamW::state`] gave.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape; nothing is changed then.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let mut copies = Vec::new();
        for slot in &self.slots {
            for (kind, own) in slot.state() {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Shim and composition round alike, to neighbours only, and on average not at all.
    #[test]
    fn rounding_with_chances() {
        let n = 200_000i64;
        let x = Tensor::arange(n, (Kind::Float, Device::Cpu));
        let wide = (&x * 0.37).sin() * ((&x * 0.0011).cos() * 20.0).exp();
        let odd = Tensor::from_slice(&[
            0.0f32,
            -0.0,
            f32::INFINITY,
            f32::NEG_INFINITY,
            f32::NAN,
            f32::from_bits(0x7f80_0001),
            1e-40,
            -1e-40,
            f32::MAX,
            1.0,
        ]);
        let x = Tensor::cat(&[wide, odd], 0);
        for salt in [0, 7, u32::MAX] {
            let fused = x.to_kind(Kind::BFloat16).zeros_like();
            ffi::round_to_bf16(&x, &fused, salt).unwrap();
            let plain = reference::round_to_bf16(&x, salt);
            let bits = |t: &Tensor| t.view_dtype(Kind::Int16);
            let alike = bits(&fused).eq_tensor(&bits(&plain));
            let both_nan = fused.isnan().logical_and(&plain.isnan());
            assert!(bool::try_from(alike.logical_or(&both_nan).all()).unwrap());
            let places = fused.isnan().sum(Kind::Int64).int64_value(&[]);
            assert_eq!(places, 2);
            let near = x.narrow(0, 0, n);
            let moved = fused.narrow(0, 0, n).to_kind(Kind::Float) - &near;
            // The distance of neighbours is at most 2⁻⁷ of the number.
            let share = &moved / near.abs().clamp_min(1e-30);
            assert!(share.abs().max().double_value(&[]) <= 1.0 / 128.0);
            assert!(share.mean(Kind::Double).double_value(&[]).abs() < 3e-5);
        }
    }
}
