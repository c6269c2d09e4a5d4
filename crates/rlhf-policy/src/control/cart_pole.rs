//! A pole hinged to a cart: Barto, Sutton and Anderson 1983, "Neuronlike adaptive elements that can solve
//! difficult learning control problems", IEEE Trans. SMC 13(5), appendix.

use serde::{Deserialize, Serialize};

use super::environment::{Environment, Noise, Outcome};

const GRAVITY: f64 = 9.8;
const CART_MASS: f64 = 1.0;
const POLE_MASS: f64 = 0.1;
/// Half of the pole's length, in metres.
const HALF_LENGTH: f64 = 0.5;
const FORCE: f64 = 10.0;
/// Seconds a step, by Euler's method.
const TAU: f64 = 0.02;
/// The ends of the track, in metres from its middle.
const TRACK: f64 = 2.4;
/// The pole has fallen: 12 degrees.
const FALLEN: f64 = 12.0 * std::f64::consts::TAU / 360.0;
/// Friction of the cart on the track, and of the pole on the cart.
const FRICTION: (f64, f64) = (0.0005, 0.000_002);

/// The cart-pole: observe position, speed, angle and angular speed; push left (0) or right (1) with 10 N;
/// 1 for every step. The episode ends when the cart leaves ±2.4 m or the pole ±12°.
///
/// The start is uniform in ±0.05 in each of the four and 500 steps are the limit, as in Gymnasium's
/// CartPole-v1, which leaves out the paper's friction.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CartPole {
    /// Steps after which an episode is cut.
    #[serde(default = "limit")]
    pub time_limit: u32,
    /// Whether there is the paper's friction.
    #[serde(default)]
    pub friction: bool,
    #[serde(skip)]
    state: [f64; 4],
}

fn limit() -> u32 {
    500
}

impl Default for CartPole {
    fn default() -> Self {
        Self {
            time_limit: limit(),
            friction: false,
            state: [0.0; 4],
        }
    }
}

impl CartPole {
    /// (ẍ, θ̈) under a force.
    fn accelerations(&self, force: f64) -> (f64, f64) {
        let [_, speed, angle, spin] = self.state;
        let (cart_friction, pole_friction) = if self.friction { FRICTION } else { (0.0, 0.0) };
        let (sin, cos) = angle.sin_cos();
        let mass = CART_MASS + POLE_MASS;
        let drag = if speed == 0.0 {
            0.0
        } else {
            cart_friction * speed.signum()
        };
        let pole = POLE_MASS * HALF_LENGTH;
        let turn = (GRAVITY * sin + cos * (drag - force - pole * spin * spin * sin) / mass
            - pole_friction * spin / pole)
            / (HALF_LENGTH * (4.0 / 3.0 - POLE_MASS * cos * cos / mass));
        let push = (force + pole * (spin * spin * sin - turn * cos) - drag) / mass;
        (push, turn)
    }
}

impl Environment for CartPole {
    fn observation_size(&self) -> usize {
        4
    }

    fn actions(&self) -> usize {
        2
    }

    fn time_limit(&self) -> Option<u32> {
        Some(self.time_limit)
    }

    fn reset(&mut self, noise: Noise) {
        self.state = [0, 1, 2, 3].map(|i| 0.1 * noise.uniform(i) - 0.05);
    }

    fn observe(&self, into: &mut Vec<f32>) {
        into.extend(self.state.map(|x| x as f32));
    }

    fn step(&mut self, action: usize, _: Noise) -> Outcome {
        let (push, turn) = self.accelerations(if action == 1 { FORCE } else { -FORCE });
        let [x, speed, angle, spin] = self.state;
        self.state = [
            x + TAU * speed,
            speed + TAU * push,
            angle + TAU * spin,
            spin + TAU * turn,
        ];
        Outcome {
            reward: 1.0,
            terminated: self.state[0].abs() > TRACK || self.state[2].abs() > FALLEN,
        }
    }

    fn state(&self) -> Vec<f64> {
        self.state.to_vec()
    }

    fn restore(&mut self, state: &[f64]) {
        self.state.copy_from_slice(state);
    }
}

#[cfg(test)]
mod tests {
    use rlhf_data::seed::Purpose;

    use super::*;

    fn noise() -> Noise {
        Noise::new(1, Purpose::Noise, 0, 0, 0)
    }

    fn at(state: [f64; 4], friction: bool) -> CartPole {
        CartPole {
            friction,
            state,
            ..CartPole::default()
        }
    }

    #[test]
    fn a_push_from_rest_by_hand() {
        // θ̈ = −(10/1.1) / (.5 (4/3 − .1/1.1)) = −14.634146…; ẍ = (10 + .05·14.634146)/1.1 = 9.756097….
        let mut pole = at([0.0; 4], false);
        assert!(!pole.step(1, noise()).terminated);
        let [x, speed, angle, spin] = pole.state;
        assert_eq!((x, angle), (0.0, 0.0));
        assert!((speed - 0.02 * 400.0 / 41.0).abs() < 1e-14, "{speed}");
        assert!((spin + 0.02 * 600.0 / 41.0).abs() < 1e-14, "{spin}");
        // The next step moves by those speeds.
        pole.step(1, noise());
        assert_eq!((pole.state[0], pole.state[2]), (0.02 * speed, 0.02 * spin));
    }

    /// Energy of cart and rod; the equations of motion must change it by the power of what acts.
    fn energy([_, v, a, w]: [f64; 4]) -> f64 {
        let (m, l) = (POLE_MASS, HALF_LENGTH);
        0.5 * (CART_MASS + m) * v * v
            + m * l * v * w * a.cos()
            + 2.0 / 3.0 * m * l * l * w * w
            + m * GRAVITY * l * a.cos()
    }

    #[test]
    fn energy_changes_by_the_power_of_the_force_and_of_friction() {
        for (state, force) in [
            ([0.3, 0.7, 0.15, -1.1], 10.0),
            ([-1.0, -0.4, -0.2, 0.9], -10.0),
            ([0.0, 1.5, 0.7, 2.0], 0.0),
        ] {
            for friction in [false, true] {
                let pole = at(state, friction);
                let (push, turn) = pole.accelerations(force);
                let [_, v, _, w] = state;
                let h = 1e-6;
                let moved = |h: f64| {
                    [
                        state[0] + h * v,
                        v + h * push,
                        state[2] + h * w,
                        w + h * turn,
                    ]
                };
                let rate = (energy(moved(h)) - energy(moved(-h))) / (2.0 * h);
                let lost = if friction {
                    FRICTION.0 * v.abs() + FRICTION.1 * w * w
                } else {
                    0.0
                };
                assert!(
                    (rate - force * v + lost).abs() < 1e-8,
                    "{rate} {force} {v} {lost}"
                );
            }
        }
    }

    #[test]
    fn it_ends_at_the_published_limits() {
        let ends = |state: [f64; 4]| at(state, false).step(0, noise()).terminated;
        assert!(!ends([2.399, 0.0, 0.0, 0.0]) && ends([2.399, 0.1, 0.0, 0.0]));
        // 12 degrees are 0.20944.
        assert!(!ends([0.0, 0.0, 0.2094, 0.0]) && ends([0.0, 0.0, -0.2094, -0.1]));
    }
}
