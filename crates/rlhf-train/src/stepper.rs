//! One optimiser step out of any number of micro-batches.
//!
//! Invariant: the gradient of a step is that of Σ sum / Σ weight over its micro-batches, so it does not
//! depend on how the step was split. A step that is not finite changes nothing.

use std::collections::HashMap;

use rlhf_kernels::LossSum;
use rlhf_kernels::optim::{Optimizer, OptimizerConfig, global_norm};
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
    /// After so many steps in a row that are not finite the run stops; 0 and 1 both stop at the first.
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

/// A step that was not applied because it was not finite.
#[derive(Clone, Debug, PartialEq)]
pub struct BadStep {
    /// The step.
    pub step: u64,
    /// Its loss.
    pub loss: f64,
    /// Its gradient's norm.
    pub grad_norm: f64,
    /// The rows of data in it, as the trainer named them with [`Stepper::note_rows`].
    pub rows: Vec<u64>,
}

/// Accumulates losses and steps an optimiser.
#[derive(Debug)]
pub struct Stepper {
    optimizer: Optimizer,
    config: StepperConfig,
    step: u64,
    pending: Pending,
    /// Steps in a row that were not finite.
    bad: u32,
    /// The same by name, but for those before a resume.
    bad_steps: Vec<BadStep>,
}

/// What was accumulated for the step to come.
#[derive(Debug, Default)]
struct Pending {
    /// Σ sum, in f64 on the loss's device.
    sum: Option<Tensor>,
    weight: f64,
    has_gradient: bool,
    rows: Vec<u64>,
}

impl Stepper {
    /// A stepper of named parameters, which share storage with the model's. AdamW's settings alone mean AdamW.
    #[must_use]
    pub fn new(
        parameters: Vec<(String, Tensor)>,
        optimizer: impl Into<OptimizerConfig>,
        config: StepperConfig,
    ) -> Self {
        Self {
            optimizer: Optimizer::new(parameters, optimizer.into()),
            config,
            step: 0,
            pending: Pending::default(),
            bad: 0,
            bad_steps: Vec::new(),
        }
    }

    /// The next step.
    #[must_use]
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Names the rows of data in the step to come, for the message should it not be finite.
    pub fn note_rows(&mut self, rows: impl IntoIterator<Item = u64>) {
        self.pending.rows.extend(rows);
    }

    /// Adds a micro-batch: backward of its sum, and its weight.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn accumulate(&mut self, loss: LossSum) -> Result<()> {
        if loss.sum.requires_grad() {
            loss.sum.f_backward()?;
            self.pending.has_gradient = true;
        }
        let sum = loss.sum.detach().to_kind(Kind::Double);
        self.pending.sum = Some(match self.pending.sum.take() {
            Some(before) => before + sum,
            None => sum,
        });
        self.pending.weight += loss.weight;
        Ok(())
    }

    /// Divides by the weight, clips, steps, forgets the gradients. A step whose loss, weight or
    /// gradient is not finite (or whose weight is negative) is counted and reported, not applied.
    ///
    /// # Errors
    /// [`Error::EmptyStep`] without a loss; [`Error::NoGradient`] when no loss had one;
    /// [`Error::NotFinite`] after too many bad steps in a row. The gradients are forgotten all the same.
    pub fn apply(&mut self) -> Result<StepReport> {
        let report = self.try_apply();
        self.optimizer.zero_grad();
        report
    }

    fn try_apply(&mut self) -> Result<StepReport> {
        let step = self.step;
        let Pending {
            sum,
            weight,
            has_gradient,
            rows,
        } = std::mem::take(&mut self.pending);
        let Some(sum) = sum.filter(|_| weight != 0.0) else {
            return Err(Error::EmptyStep(step));
        };
        if !has_gradient {
            return Err(Error::NoGradient(step));
        }
        let grads = self.optimizer.grads();
        let _guard = tch::no_grad_guard();
        // One pass for the norm; what the gradients are divided by goes into the step.
        let grad_norm = global_norm(&grads)? / weight.abs();
        let clip = match self.config.max_grad_norm {
            Some(max) => (max / (grad_norm + 1e-6)).min(1.0),
            None => 1.0,
        };
        // The norm has waited for the device: the loss is there by now.
        let loss = sum.double_value(&[]) / weight;
        let lr = self.lr();
        let applied = loss.is_finite() && grad_norm.is_finite() && weight > 0.0;
        self.step += 1;
        if applied {
            self.optimizer.step_by(lr, clip / weight)?;
            self.bad = 0;
            self.bad_steps.clear();
        } else {
            self.bad += 1;
            self.bad_steps.push(BadStep {
                step,
                loss,
                grad_norm,
                rows,
            });
            if self.bad >= self.config.max_bad_steps {
                return Err(Error::NotFinite {
                    count: self.bad,
                    step,
                    loss,
                    grad_norm,
                    bad: std::mem::take(&mut self.bad_steps),
                });
            }
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

    /// Begins the optimiser's moments anew, as at the start of a training; the schedule goes on.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn forget_moments(&mut self) -> Result<()> {
        Ok(self.optimizer.forget_moments()?)
    }

    /// Parameters, moments and counters by name, between two steps. The tensors share storage with the
    /// live ones.
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

    /// Takes over what [`Stepper::state`] gave; parameters are written in place. What was accumulated is
    /// forgotten.
    ///
    /// # Errors
    /// [`Error::State`] when a tensor is missing, or of another shape or type, or there are parameters
    /// that this stepper does not have; nothing is changed then.
    pub fn load_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let find = |key: &str, size: &[i64], kind: Kind| {
            let saved = state
                .get(key)
                .ok_or_else(|| Error::State(format!("`{key}` is missing")))?;
            if saved.size() != size || saved.kind() != kind {
                return Err(Error::State(format!(
                    "`{key}` is {:?} {:?}, expected {kind:?} {size:?}",
                    saved.kind(),
                    saved.size()
                )));
            }
            Ok(saved)
        };
        let parameters: Vec<(String, Tensor)> = self
            .optimizer
            .parameters()
            .map(|(name, p)| (format!("param.{name}"), p.shallow_clone()))
            .collect();
        let mut copies = Vec::new();
        for (key, p) in &parameters {
            copies.push((p.shallow_clone(), find(key, &p.size(), p.kind())?));
        }
        let own = |key: &&String| parameters.iter().any(|(k, _)| k == *key);
        let mut others = state.keys().filter(|k| k.starts_with("param."));
        if let Some(key) = others.find(|k| !own(k)) {
            return Err(Error::State(format!("there is no parameter for `{key}`")));
        }
        let counters = find("stepper", &[2], Kind::Int64)?;
        self.optimizer.load_state(state)?;
        {
            let _guard = tch::no_grad_guard();
            for (mut p, saved) in copies {
                p.f_copy_(saved)?;
            }
        }
        self.optimizer.zero_grad();
        self.pending = Pending::default();
        self.bad_steps.clear();
        self.step = counters.int64_value(&[0]) as u64;
        self.bad = counters.int64_value(&[1]) as u32;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::optim::AdamWConfig;

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

    fn one(value: f64, max_bad_steps: u32) -> (Tensor, Stepper) {
        let w = Tensor::from_slice(&[value]).set_requires_grad(true);
        let stepper = Stepper::new(
            vec![("w".into(), w.shallow_clone())],
            AdamWConfig::default(),
            StepperConfig {
                max_bad_steps,
                ..config()
            },
        );
        (w, stepper)
    }

    fn loss(w: &Tensor, factor: f64, weight: f64) -> LossSum {
        LossSum {
            sum: (w * factor).sum(None),
            weight,
        }
    }

    #[test]
    fn bad_steps_change_nothing_and_then_stop() {
        let (w, mut stepper) = one(1.0, 2);
        assert!(matches!(stepper.apply(), Err(Error::EmptyStep(0))));
        // One bad step, then a good one: the count begins anew.
        stepper.accumulate(loss(&w, f64::NAN, 1.0)).unwrap();
        assert!(!stepper.apply().unwrap().applied);
        assert_eq!(w.double_value(&[0]), 1.0);
        stepper.accumulate(loss(&w, 3.0, 2.0)).unwrap();
        let report = stepper.apply().unwrap();
        // AdamW's first step is lr · sign: 1 − 0.1.
        assert!(report.applied && report.step == 1 && report.loss == 1.5);
        assert_eq!((report.grad_norm, report.weight), (1.5, 2.0));
        assert!((w.double_value(&[0]) - 0.9).abs() < 1e-7);
        // Infinity in the loss alone, then in the weight alone: two in a row end the run by name.
        let before = w.double_value(&[0]);
        stepper.note_rows([4, 5]);
        let sum = (&w * 1.0).sum(None) + f64::INFINITY;
        stepper.accumulate(LossSum { sum, weight: 1.0 }).unwrap();
        assert!(!stepper.apply().unwrap().applied);
        stepper.note_rows(0..10);
        stepper.accumulate(loss(&w, 1.0, f64::NAN)).unwrap();
        let e = stepper.apply().unwrap_err();
        assert!(matches!(
            e,
            Error::NotFinite {
                count: 2,
                step: 3,
                ..
            }
        ));
        let e = e.to_string();
        assert!(e.contains("step 2: rows 4, 5\n"), "{e}");
        assert!(
            e.contains("step 3: rows 0, 1, 2, 3, 4, 5, 6, 7 and 2 more"),
            "{e}"
        );
        assert_eq!(w.double_value(&[0]), before);
        assert!(!w.grad().defined());
    }

    #[test]
    fn bad_steps_before_a_resume_count() {
        let (w, mut stepper) = one(1.0, 2);
        stepper.accumulate(loss(&w, f64::NAN, 1.0)).unwrap();
        stepper.apply().unwrap();
        let state = stepper.state().into_iter().collect();
        let (v, mut resumed) = one(1.0, 2);
        resumed.load_state(&state).unwrap();
        resumed.accumulate(loss(&v, f64::NAN, 1.0)).unwrap();
        let e = resumed.apply().unwrap_err();
        assert!(matches!(
            e,
            Error::NotFinite {
                count: 2,
                step: 1,
                ..
            }
        ));
    }

    #[test]
    fn the_first_bad_step_may_be_the_last() {
        let (w, mut stepper) = one(1.0, 1);
        stepper.accumulate(loss(&w, f64::INFINITY, 1.0)).unwrap();
        assert!(matches!(
            stepper.apply(),
            Err(Error::NotFinite { count: 1, .. })
        ));
    }

    #[test]
    fn a_step_without_weight_or_gradient_leaves_nothing_behind() {
        let (w, mut stepper) = one(1.0, 2);
        stepper.accumulate(loss(&w, 5.0, 0.0)).unwrap();
        assert!(matches!(stepper.apply(), Err(Error::EmptyStep(0))));
        stepper.accumulate(loss(&w.detach(), 5.0, 1.0)).unwrap();
        assert!(matches!(stepper.apply(), Err(Error::NoGradient(0))));
        stepper.accumulate(loss(&w, 1.0, 1.0)).unwrap();
        let report = stepper.apply().unwrap();
        assert_eq!((report.grad_norm, report.step), (1.0, 0));
    }

    #[test]
    fn gradients_are_clipped_by_their_norm() {
        // Gradient (3, 4) / 1 of norm 5, clipped to 1: the first moment is 0.1 · (0.6, 0.8).
        let w = Tensor::from_slice(&[0f64, 0.0]).set_requires_grad(true);
        let mut stepper = Stepper::new(
            vec![("w".into(), w.shallow_clone())],
            AdamWConfig::default(),
            config(),
        );
        let g = Tensor::from_slice(&[3f64, 4.0]);
        stepper
            .accumulate(LossSum {
                sum: (&w * g).sum(None),
                weight: 1.0,
            })
            .unwrap();
        assert_eq!(stepper.apply().unwrap().grad_norm, 5.0);
        let state: HashMap<_, _> = stepper.state().into_iter().collect();
        let first = Vec::<f64>::try_from(&state["exp_avg.w"]).unwrap();
        assert!((first[0] - 0.06).abs() < 1e-6 && (first[1] - 0.08).abs() < 1e-6);
    }

    #[test]
    fn warm_up_begins_above_zero() {
        // Four steps of warm-up: 1/4, 2/4, 3/4, 1 of 0.1, then constant.
        let w = Tensor::from_slice(&[1f64]).set_requires_grad(true);
        let config = StepperConfig {
            warmup_steps: 4,
            ..config()
        };
        let mut stepper = Stepper::new(
            vec![("w".into(), w.shallow_clone())],
            AdamWConfig::default(),
            config,
        );
        for expected in [0.025, 0.05, 0.075, 0.1, 0.1, 0.1] {
            stepper.accumulate(loss(&w, 1.0, 1.0)).unwrap();
            assert!((stepper.apply().unwrap().lr - expected).abs() < 1e-12);
        }
    }

    #[test]
    fn states_of_another_training_change_nothing() {
        let (w, mut stepper) = one(1.0, 1);
        stepper.accumulate(loss(&w, 1.0, 1.0)).unwrap();
        stepper.apply().unwrap();
        let good = || {
            let copies = stepper.state().into_iter().map(|(n, t)| (n, t.copy()));
            copies.collect::<HashMap<String, Tensor>>()
        };
        let (mut missing, mut kind, mut more) = (good(), good(), good());
        missing.remove("exp_avg_sq.w");
        let single = kind["param.w"].to_kind(Kind::Float);
        kind.insert("param.w".into(), single);
        more.insert("param.v".into(), Tensor::from_slice(&[1f64]));
        let good = good();
        let (v, mut other) = one(7.0, 1);
        for (state, word) in [
            (missing, "exp_avg_sq.w"),
            (kind, "Float"),
            (more, "param.v"),
        ] {
            let e = other.load_state(&state).unwrap_err().to_string();
            assert!(e.contains(word), "{e}");
            assert_eq!((v.double_value(&[0]), other.step()), (7.0, 0));
        }
        other.load_state(&good).unwrap();
        assert_eq!(v.double_value(&[0]), w.double_value(&[0]));
        assert_eq!(other.step(), 1);
    }
}
