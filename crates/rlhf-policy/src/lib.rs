//! Policy optimisation: advantages, KL control and surrogate losses, and the trainers over them.
//!
//! The losses are free functions of per-token log-probabilities ([`rlhf_kernels::Ragged`]); they see
//! no model, file, device or random number, and need only `tch` and `rlhf-kernels`
//! (`default-features = false`).
//!
//! ```
//! use rlhf_kernels::{Offsets, Ragged};
//! use rlhf_policy::advantage::AdvantageEstimator;
//! use rlhf_policy::loss::{Clip, PolicyInputs, PolicyLoss, RatioLevel, Reduction};
//! use tch::Tensor;
//!
//! # fn main() -> Result<(), rlhf_policy::Error> {
//! // One prompt, two completions of two tokens and one.
//! let logprobs = Tensor::from_slice(&[-0.7, -1.1, -0.4]).set_requires_grad(true);
//! let policy = Ragged::new(logprobs.shallow_clone(), Offsets::new(vec![0, 2, 3])?)?;
//! let sampled = policy.with_values(logprobs.detach())?;
//! let per_completion = AdvantageEstimator::GroupCentered {}.advantages(&[1.0, 0.0], &[2])?;
//! let advantages = policy.with_values(policy.broadcast(&Tensor::from_slice(&per_completion)))?;
//! let loss = PolicyLoss::Clipped {
//!     clip: Clip { epsilon_low: 0.2, epsilon_high: 0.28, dual: None },
//!     ratio: RatioLevel::Token,
//!     reduction: Reduction::Token {},
//! };
//! let out = loss.compute(&PolicyInputs::new(&policy, &sampled, &advantages))?;
//! (out.loss.sum / out.loss.weight).backward();
//! assert!(logprobs.grad().double_value(&[0]) < 0.0); // descending makes the better one likelier
//! # Ok(()) }
//! ```

pub mod advantage;
#[cfg(feature = "train")]
pub mod collect;
#[cfg(feature = "train")]
pub mod control;
#[cfg(feature = "train")]
pub mod environment;
mod error;
#[cfg(feature = "train")]
pub mod grpo;
pub mod kl;
#[cfg(feature = "train")]
mod learner;
pub mod loss;
#[cfg(feature = "train")]
pub mod opd;
#[cfg(feature = "train")]
pub mod ppo;
#[cfg(feature = "train")]
pub mod reference;
pub mod rejection;
#[cfg(feature = "train")]
pub mod replay;
#[cfg(feature = "train")]
pub mod rollout;
#[cfg(feature = "train")]
mod samples;
#[cfg(feature = "train")]
pub mod sft;
#[cfg(feature = "train")]
pub mod steps;

pub use error::{Error, Result};
