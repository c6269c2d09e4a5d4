//! A room with a heater: the smallest control problem with a memory, whose optimum one can work out by hand.

use serde::{Deserialize, Serialize};

use super::environment::{Environment, Noise, Outcome};

/// A room loses `loss` degrees a step; the heater (action 1) adds `heat`. The reward is minus the distance
/// from `target` after the step, in degrees, less `cost` where the heater was on. Episodes begin up to
/// `spread` steps of `loss` below or above the target and never end by themselves.
///
/// With `heat` = 2 · `loss` and no cost every step moves the room by ±`loss`. From k such steps away the best is
/// to go straight to the target and then to swing about it: the distances are `loss` times k − 1, …, 1, 0, 1,
/// 0, 1, ….
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thermostat {
    /// Degrees wanted.
    pub target: f64,
    /// Degrees lost a step.
    pub loss: f64,
    /// Degrees that the heater adds in a step.
    pub heat: f64,
    /// What a step with the heater on costs.
    pub cost: f64,
    /// How many times `loss` an episode begins away from the target, at most.
    pub spread: u32,
    /// Steps of an episode.
    pub time_limit: u32,
    #[serde(skip)]
    temperature: f64,
}

impl Default for Thermostat {
    fn default() -> Self {
        Self {
            target: 20.0,
            loss: 0.5,
            heat: 1.0,
            cost: 0.0,
            spread: 10,
            time_limit: 40,
            temperature: 20.0,
        }
    }
}

impl Environment for Thermostat {
    fn observation_size(&self) -> usize {
        1
    }

    fn actions(&self) -> usize {
        2
    }

    fn time_limit(&self) -> Option<u32> {
        Some(self.time_limit)
    }

    fn reset(&mut self, noise: Noise) {
        let places = f64::from(2 * self.spread + 1);
        let place = (noise.uniform(0) * places).floor() - f64::from(self.spread);
        self.temperature = self.target + place * self.loss;
    }

    fn observe(&self, into: &mut Vec<f32>) {
        into.push(((self.temperature - self.target) / (2.0 * self.loss)) as f32);
    }

    fn step(&mut self, action: usize, _: Noise) -> Outcome {
        let on = f64::from(u8::from(action == 1));
        self.temperature += self.heat * on - self.loss;
        Outcome {
            reward: -(self.temperature - self.target).abs() - self.cost * on,
            terminated: false,
        }
    }

    fn state(&self) -> Vec<f64> {
        vec![self.temperature]
    }

    fn restore(&mut self, state: &[f64]) {
        self.temperature = state[0];
    }
}
