//! Reward models: Bradley-Terry and kin, training, reward sources.
//!
//! The losses need only tensors: use them with a model of your own by turning the default features off.
//!
//! | labels | loss |
//! | --- | --- |
//! | pairs, with margins, ties, weights | [`bradley_terry`]; all pairs of a prompt: [`pairs`] |
//! | pairs with a difference of scores | [`difference`] |
//! | rankings | [`plackett_luce`] |
//! | Likert scales, of completions or pairs | [`ordinal`] |
//! | ratings of attributes | [`regression`] |
//! | right or wrong answers | [`outcome`] |
//! | right or wrong steps | [`process`] |
//! | labels that disagree | [`distributional`] |
//! | comparisons of clips, rewards of steps | [`segments`] |
//!
//! `verify` has rules that look at completions, `judge` models that do; both are sources of rewards.
//!
//! With the feature `train` (on by default) also models ([`model`]), their training for any kind of label
//! ([`objective`], [`labels`], [`train`](mod@train)) and sources of rewards ([`source`]).
//!
//! ```
//! use rlhf_reward::bradley_terry::{self, BradleyTerry};
//! use tch::Tensor;
//!
//! # fn main() -> Result<(), rlhf_reward::Error> {
//! let scores = Tensor::from_slice(&[0.3, -0.2, 0.9]).set_requires_grad(true);
//! let (chosen, rejected) = (Tensor::from_slice(&[0i64, 2]), Tensor::from_slice(&[1i64, 1]));
//! let loss = bradley_terry::loss_of_pairs(&scores, &chosen, &rejected, &BradleyTerry::default())?;
//! (loss.sum / loss.weight).backward();
//! assert!(scores.grad().double_value(&[1]) > 0.0); // descending lowers the rejected one
//! # Ok(()) }
//! ```

pub mod bradley_terry;
mod checks;
pub mod difference;
pub mod distributional;
mod error;
pub mod eval;
#[cfg(feature = "judge")]
pub mod judge;
#[cfg(feature = "train")]
pub mod labels;
pub mod logistic;
#[cfg(feature = "train")]
pub mod model;
#[cfg(feature = "train")]
pub mod objective;
pub mod ordinal;
pub mod outcome;
pub mod pairs;
pub mod plackett_luce;
pub mod process;
pub mod regression;
pub mod segments;
#[cfg(feature = "train")]
pub mod source;
#[cfg(feature = "train")]
pub mod train;
#[cfg(feature = "verify")]
pub mod verify;

pub use error::{Error, Result};
