//! Classic control without a language model: the same losses and advantages on problems that are solved
//! in seconds, and whose right answers are known.
//!
//! An episode is a completion, a step is a token: [`Batch`] lays episodes end to end in a
//! [`Ragged`](rlhf_kernels::Ragged), and [`generalized`](crate::advantage::generalized),
//! [`clipped::surrogate`](crate::loss::clipped::surrogate) and [`value_loss`](crate::loss::ppo::value_loss)
//! are those of language models. [`train()`] learns from an environment's own rewards, [`preferences`] from
//! comparisons of clips alone.
//!
//! Invariants: noise is a function of (seed, environment, episode, step), so a run has no generator to save;
//! an episode that *ended* and one that was *cut* are never the same: values bootstrap through cuts.
//!
//! ```
//! use rlhf_policy::control::{Act, CartPole, Mlp, evaluate};
//! use tch::Kind;
//!
//! # fn main() -> Result<(), rlhf_policy::Error> {
//! let cart_pole = CartPole::default();
//! let policy = Mlp::new(&[4, 32, 2], 0.01, 7, Kind::Float)?;
//! let returns = evaluate(&cart_pole, &policy, Act::Sampled, 7, 20)?;
//! let mean = returns.iter().sum::<f64>() / 20.0;
//! assert!(mean > 10.0 && mean < 60.0); // a policy that knows nothing lets the pole fall at once
//! # Ok(()) }
//! ```

mod batch;
mod cart_pole;
mod environment;
mod grid_world;
mod lanes;
mod mlp;
pub mod preferences;
mod task;
mod thermostat;
mod train;

pub use batch::{Batch, Part, advantages, losses};
pub use cart_pole::CartPole;
pub use environment::{Environment, Noise, Outcome};
pub use grid_world::GridWorld;
pub use lanes::{Act, Collect, Drawn, Ends, Finished, Lane, Lanes};
pub use mlp::Mlp;
pub use task::Task;
pub use thermostat::Thermostat;
pub use train::{Agent, Algorithm, ControlConfig, Learner, evaluate, train};
