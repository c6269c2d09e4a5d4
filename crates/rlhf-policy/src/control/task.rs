//! The environments that a recipe can name.

use serde::{Deserialize, Serialize};

use super::cart_pole::CartPole;
use super::environment::{Environment, Noise, Outcome};
use super::grid_world::GridWorld;
use super::thermostat::Thermostat;
use crate::error::{Result, ensure};

/// An environment by its name.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case")]
#[non_exhaustive]
pub enum Task {
    /// [`CartPole`].
    CartPole(CartPole),
    /// [`Thermostat`].
    Thermostat(Thermostat),
    /// [`GridWorld`].
    GridWorld(GridWorld),
}

impl Task {
    /// Checks the settings.
    ///
    /// # Errors
    /// When one is outside its range.
    pub fn check(&self) -> Result<()> {
        let limit = self.time_limit();
        ensure(limit != Some(0), "environment", || {
            "time_limit is 0, expected at least 1".into()
        })?;
        if let Self::Thermostat(t) = self {
            let finite = [t.target, t.cost].iter().all(|x| x.is_finite());
            let moves = [t.loss, t.heat].iter().all(|x| *x > 0.0 && x.is_finite());
            ensure(finite && moves, "thermostat", || {
                "loss and heat must be above 0, target and cost finite".into()
            })?;
        }
        Ok(())
    }
}

/// Passes a call on to the environment that it is.
macro_rules! pass_on {
    ($self:ident, $e:ident => $call:expr) => {
        match $self {
            Task::CartPole($e) => $call,
            Task::Thermostat($e) => $call,
            Task::GridWorld($e) => $call,
        }
    };
}

impl Environment for Task {
    fn observation_size(&self) -> usize {
        pass_on!(self, e => e.observation_size())
    }

    fn actions(&self) -> usize {
        pass_on!(self, e => e.actions())
    }

    fn time_limit(&self) -> Option<u32> {
        pass_on!(self, e => e.time_limit())
    }

    fn reset(&mut self, noise: Noise) {
        pass_on!(self, e => e.reset(noise));
    }

    fn observe(&self, into: &mut Vec<f32>) {
        pass_on!(self, e => e.observe(into));
    }

    fn step(&mut self, action: usize, noise: Noise) -> Outcome {
        pass_on!(self, e => e.step(action, noise))
    }

    fn state(&self) -> Vec<f64> {
        pass_on!(self, e => e.state())
    }

    fn restore(&mut self, state: &[f64]) {
        pass_on!(self, e => e.restore(state));
    }
}
