//! One optimiser step out of any number of micro-batches.
//!
//! Invariant: the gradient of a step is that of Σ sum / Σ weight over its micro-batches, so it does not
//! depend on how the step was split. A step that is not finite changes nothing.

use std::collections::HashMap;

use rlhf_kernels::LossSum;
use rlhf_kernels::optim::{AdamW, AdamWConfig, clip_grad_norm, global_norm, scale};
use tch::{Kind, Tensor};

use crate::error::{Error, Result};
use crate::lr_schedule::LrSchedule;

/// Settings of a [`Stepper`].
#[derive(Clone, Copy, Debug)]
pub struct StepperConfig {
    /// Peak learning rate.
    pub lr: f64,
    /// Its course.
    pub schedule: LrSchedule,
    /// Steps of linear warm-up.
    pub warmup_steps: u64,
    /// Steps in all, for the schedule.
    pub total_steps: u64,
    /// Gradients of a larger global norm are scaled down to it.
    pub max_grad_norm: Option<f64>,
    /// After so many steps in a row that are not finite the run stops.
    pub max_bad_steps: u32,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepReport {
    /// The step, from 0.
    pub step: u64,
    /// Σ sum / Σ weight.
    pub loss: f64,
    /// Σ weight.
    pub weight: f64,
    /// The global norm before clipping.
    pub grad_norm: f64,
    /// The learning rate.
    pub lr: f64,
    /// Whether the step was applied: false when something was not finite.
    pub applied: bool,
}

/// Accumulates losses and steps AdamW.
#[derive(Debug)]
pub struct Stepper {
    optimizer: AdamW,
    config: StepperConfig,
    step: u64,
    sum: Option<Tensor>,
    weight: f64,
    bad: u32,
}

impl Stepper {
    /// A stepper of named parameters, which share storage with the model's.
    #[must_use]
    pub fn new(
        parameters: Vec<(String, Tensor)>,
        adamw: AdamWConfig,
        config: StepperConfig,
    ) -> Self {
        Self {
            optimizer: AdamW::new(parameters, adamw),
            config,
            step: 0,
            sum: None,
            weight: 0.0,
            bad: 0,
        }
    }

    /// The next step.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Adds a micro-batch: backward of its sum, and its weight.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn accumulate(&mut self, loss: LossSum) -> Result<()> {
        if loss.sum.requires_grad() {
            loss.sum.f_backward()?;
        }
        let sum = loss.sum.detach().to_kind(Kind::Double);
        self.sum = Some(match self.sum.take() {
            Some(before) => before + sum,
            None => sum,
        });
        self.weight += loss.weight;
        Ok(())
    }

    /// Divides by the weight, clips, steps, forgets the gradients.
    ///
    /// # Errors
    /// [`Error::EmptyStep`] without a loss; [`Error::NotFinite`] after too many bad steps in a row.
    pub fn apply(&mut self) -> Result<StepReport> {
        let step = self.step;
        let (sum, weight) = (self.sum.take(), std::mem::take(&mut self.weight));
        let Some(sum) = sum.filter(|_| weight > 0.0) else {
            return Err(Error::EmptyStep(step));
        };
        let loss = sum.double_value(&[]) / weight;
        let grads = self.optimizer.grads();
        let _guard = tch::no_grad_guard();
        scale(&grads, 1.0 / weight)?;
        let grad_norm = match self.config.max_grad_norm {
            Some(max) => clip_grad_norm(&grads, max)?,
            None => global_norm(&grads)?,
        };
        let lr = self.lr();
        let applied = loss.is_finite() && grad_norm.is_finite();
        if applied {
            self.optimizer.step(lr)?;
            self.bad = 0;
        } else {
            self.bad += 1;
        }
        self.optimizer.zero_grad();
        self.step += 1;
        if self.bad > self.config.max_bad_steps {
            return Err(Error::NotFinite {
                count: self.bad,
                step,
                loss,
                grad_norm,
            });
        }
        Ok(StepReport {
            step,
            loss,
            weight,
            grad_norm,
            lr,
            applied,
        })
    }

    /// The learning rate of the next step. Warm-up counts from 1, so that the first step moves.
    #[must_use]
    pub fn lr(&self) -> f64 {
        let c = &self.config;
        let at = (self.step + 1).min(c.warmup_steps).max(self.step);
        c.lr * c.schedule.factor(at, c.warmup_steps, c.total_steps)
    }

    /// Parameters, moments and counters by name.
    #[must_use]
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let mut all: Vec<(String, Tensor)> = self
            .optimizer
            .parameters()
            .map(|(n, p)| (format!("param.{n}"), p.detach()))
            .collect();
        all.extend(self.optimizer.state());
        all.push((
            "stepper".into(),
            Tensor::from_slice(&[self.step as i64, i64::from(self.bad)]),
        ));
        all
    }

    /// Takes over what [`Stepper::state`] gave; parameters are written in place.
    ///
    /// # Errors
    /// When a tensor is missing or has another shape.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let missing = |name: &str| Error::Checkpoint {
            path: "(tensors)".into(),
            what: format!("`{name}` is missing or has another shape"),
        };
        let counters = state
            .get("stepper")
            .filter(|t| t.size() == [2])
            .ok_or_else(|| missing("stepper"))?;
        let mut copies = Vec::new();
        for (name, p) in self.optimizer.parameters() {
            let key = format!("param.{name}");
            let saved = state
                .get(&key)
                .filter(|t| t.size() == p.size())
                .ok_or_else(|| missing(&key))?;
            copies.push((p.shallow_clone(), saved));
        }
        self.optimizer.load_state(state)?;
        let _guard = tch::no_grad_guard();
        for (mut p, saved) in copies {
            p.f_copy_(saved)?;
        }
        self.step = counters.int64_value(&[0]) as u64;
        self.bad = counters.int64_value(&[1]) as u32;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tch::Device;

    fn config() -> StepperConfig {
        StepperConfig {
            lr: 0.1,
            schedule: LrSchedule::Constant {},
            warmup_steps: 0,
            total_steps: 10,
            max_grad_norm: Some(1.0),
            max_bad_steps: 1,
        }
    }

    /// A linear model's weights after one step whose rows are split as given.
    fn after(split: &[usize]) -> Vec<f64> {
        let w = (Tensor::arange(3, (Kind::Double, Device::Cpu)) * 0.1).set_requires_grad(true);
        let x = (Tensor::arange(21, (Kind::Double, Device::Cpu)) * 0.7)
            .sin()
            .view([7, 3]);
        let mut stepper = Stepper::new(
            vec![("w".into(), w.shallow_clone())],
            AdamWConfig::default(),
            config(),
        );
        let mut at = 0;
        for &n in split {
            let part = x.narrow(0, at, n as i64);
            at += n as i64;
            let error = part.matmul(&w) - 1.0;
            stepper
                .accumulate(LossSum {
                    sum: (&error * &error).sum(None),
                    weight: n as f64,
                })
                .unwrap();
        }
        let report = stepper.apply().unwrap();
        assert!(report.applied && report.weight == 7.0);
        Vec::<f64>::try_from(&w).unwrap()
    }

    #[test]
    fn a_step_does_not_depend_on_its_split() {
        let whole = after(&[7]);
        for split in [vec![1, 6], vec![3, 3, 1], vec![1; 7]] {
            for (a, b) in whole.iter().zip(after(&split)) {
                assert!((a - b).abs() < 1e-12, "{split:?}: {a} {b}");
            }
        }
    }

    #[test]
    fn bad_steps_change_nothing_and_then_stop() {
        let w = Tensor::from_slice(&[1f64]).set_requires_grad(true);
        let mut stepper = Stepper::new(
            vec![("w".into(), w.shallow_clone())],
            AdamWConfig::default(),
            config(),
        );
        assert!(matches!(stepper.apply(), Err(Error::EmptyStep(0))));
        stepper
            .accumulate(LossSum {
                sum: (&w * f64::NAN).sum(None),
                weight: 1.0,
            })
            .unwrap();
        assert!(!stepper.apply().unwrap().applied);
        assert_eq!(w.double_value(&[0]), 1.0);
        stepper
            .accumulate(LossSum {
                sum: (&w * f64::INFINITY).sum(None),
                weight: 1.0,
            })
            .unwrap();
        assert!(matches!(
            stepper.apply(),
            Err(Error::NotFinite { count: 2, .. })
        ));
    }
}
