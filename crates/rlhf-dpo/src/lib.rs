//! Direct alignment: DPO and kin.
//!
//! The losses ([`loss`]) need only tensors: use them with a model of your own by turning the default
//! feature `train` off. The trainers are the modules `train` (fixed data) and `online`.
//!
//! ```
//! use rlhf_dpo::loss::{PairLogprobs, PreferenceLoss};
//! use tch::Tensor;
//!
//! # fn main() -> Result<(), rlhf_dpo::Error> {
//! let chosen = Tensor::from_slice(&[-4.0, -6.0]).set_requires_grad(true);
//! let pairs = PairLogprobs {
//!     chosen: chosen.shallow_clone(),
//!     rejected: Tensor::from_slice(&[-5.0, -5.0]),
//!     ref_chosen: Tensor::from_slice(&[-5.0, -5.0]),
//!     ref_rejected: Tensor::from_slice(&[-5.0, -5.0]),
//! };
//! let out = PreferenceLoss::Sigmoid { beta: 0.1, label_smoothing: 0.0 }.compute(&pairs.into())?;
//! (out.loss.sum / out.loss.weight).backward();
//! assert!(chosen.grad().double_value(&[0]) < 0.0); // descending makes the chosen likelier
//! # Ok(()) }
//! ```

mod error;
pub mod loss;
#[cfg(feature = "train")]
pub mod online;
#[cfg(feature = "train")]
pub mod train;

pub use error::{Error, Result};
