//! The command line of RLHF post-training: what needs no libtorch.
//!
//! The commands that compute are in `rlhf-engine`; [`front`] hands over to it. What both sides share
//! is here: arguments, recipes' texts, the formats of results, the [`report`], messages and exit codes.

pub mod args;
pub mod calibration;
mod data;
pub mod exit;
pub mod files;
pub mod front;
pub mod interval;
pub mod report;
pub mod results;
pub mod reward_results;
pub mod shipped;
mod show;
pub mod terminal;
mod usage;

pub use usage::{Usage, usage};
