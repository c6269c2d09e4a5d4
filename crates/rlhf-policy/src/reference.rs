//! The reference while the policy learns: fixed, drawn after it, or none; and how far the policy may go.
//!
//! Invariant: what a reference becomes is a function of the steps done, so with its weights in the checkpoint a
//! resumed training is the same.

use rlhf_model::{CausalLm as _, Transformer};
use rlhf_train::Stepper;
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::error::{Result, ensure};

/// What becomes of the reference π₀ during training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ReferencePolicy {
    /// The policy as it began.
    Fixed {},
    /// There is none: no KL is measured, and its forward pass is saved.
    None {},
    /// π₀ ← mix·π + (1 − mix)·π₀ after every so many steps (Gorbatovski et al. 2024, arXiv 2404.09656; TRL's
    /// `sync_ref_model`). A mix of 1 takes the policy itself.
    Sync {
        /// Steps between.
        every: u64,
        /// The policy's share, above 0 to 1.
        mix: f64,
    },
    /// π₀ ← π after every so many steps, and the optimiser's moments begin anew (Liu et al. 2025, ProRL, arXiv
    /// 2505.24864).
    Reset {
        /// Steps between.
        every: u64,
    },
    /// π₀ ← decay·π₀ + (1 − decay)·π after every step.
    Ema {
        /// What is kept of π₀, 0 to below 1.
        decay: f64,
    },
}

impl Default for ReferencePolicy {
    fn default() -> Self {
        Self::Fixed {}
    }
}

impl ReferencePolicy {
    /// Checks the settings.
    ///
    /// # Errors
    /// When one is outside its range.
    pub fn check(&self) -> Result<()> {
        let op = "reference";
        match *self {
            Self::Fixed {} | Self::None {} => Ok(()),
            Self::Sync { every, mix } => {
                ensure(every > 0, op, || "every is 0, expected 1 or more".into())?;
                ensure(mix > 0.0 && mix <= 1.0, op, || {
                    format!("mix is {mix}, expected above 0 to 1")
                })
            }
            Self::Reset { every } => {
                ensure(every > 0, op, || "every is 0, expected 1 or more".into())
            }
            Self::Ema { decay } => ensure((0.0..1.0).contains(&decay), op, || {
                format!("decay is {decay}, expected 0 to below 1")
            }),
        }
    }

    /// Whether the reference has weights that change.
    #[must_use]
    pub fn moves(&self) -> bool {
        !matches!(self, Self::Fixed {} | Self::None {})
    }

    /// Brings the reference to where it belongs after `done` steps.
    ///
    /// # Errors
    /// When libtorch fails.
    pub fn after_step(
        &self,
        done: u64,
        reference: &Transformer,
        policy: &Transformer,
        stepper: &mut Stepper,
    ) -> Result<()> {
        let share = match *self {
            Self::Fixed {} | Self::None {} => return Ok(()),
            Self::Sync { every, mix } if done.is_multiple_of(every) => mix,
            Self::Reset { every } if done.is_multiple_of(every) => {
                stepper.forget_moments()?;
                1.0
            }
            Self::Sync { .. } | Self::Reset { .. } => return Ok(()),
            Self::Ema { decay } => 1.0 - decay,
        };
        let _guard = tch::no_grad_guard();
        for ((_, mut to), (_, from)) in reference.parameters().into_iter().zip(policy.parameters())
        {
            if share == 1.0 {
                to.f_copy_(&from)?;
            } else {
                let mixed = to
                    .to_kind(at_least_float(to.kind()))
                    .f_lerp(&from.to_kind(at_least_float(from.kind())), share)?;
                to.f_copy_(&mixed)?;
            }
        }
        Ok(())
    }
}

fn at_least_float(kind: Kind) -> Kind {
    if kind == Kind::Double {
        Kind::Double
    } else {
        Kind::Float
    }
}

#[cfg(test)]
mod tests {
    use rlhf_kernels::optim::AdamWConfig;
    use rlhf_model::Config;
    use rlhf_train::StepperConfig;
    use rlhf_train::lr_schedule::LrSchedule;
    use tch::Device;

    use super::*;

    fn model(seed: u64) -> Transformer {
        Transformer::init(Config::new(16, 8, 1, 2, 16), seed, Device::Cpu, Kind::Float).unwrap()
    }

    fn first(m: &Transformer) -> f64 {
        m.parameters()[0].1.double_value(&[3, 2])
    }

    #[test]
    fn each_kind_by_hand() {
        let policy = model(2);
        let config = StepperConfig {
            lr: 0.1,
            schedule: LrSchedule::Constant {},
            warmup_steps: 0,
            total_steps: 1,
            max_grad_norm: None,
            max_bad_steps: 1,
        };
        let after = |how: ReferencePolicy, done: u64| {
            let reference = model(1);
            let mut stepper = Stepper::new(policy.parameters(), AdamWConfig::default(), config);
            how.after_step(done, &reference, &policy, &mut stepper)
                .unwrap();
            first(&reference)
        };
        let (old, new) = (first(&model(1)), first(&policy));
        assert!((old - new).abs() > 1e-3);
        assert_eq!(after(ReferencePolicy::Fixed {}, 4), old);
        let sync = ReferencePolicy::Sync { every: 4, mix: 0.6 };
        assert_eq!(after(sync, 3), old);
        assert!((after(sync, 8) - (0.6 * new + 0.4 * old)).abs() < 1e-7);
        assert_eq!(after(ReferencePolicy::Reset { every: 2 }, 2), new);
        let ema = ReferencePolicy::Ema { decay: 0.9 };
        assert!((after(ema, 1) - (0.1 * new + 0.9 * old)).abs() < 1e-7);
        assert!(ReferencePolicy::Ema { decay: 1.0 }.check().is_err());
        assert!(
            ReferencePolicy::Sync { every: 1, mix: 0.0 }
                .check()
                .is_err()
        );
    }
}
