//! RLHF post-training for language models: recipes, stages, reports and the command line.
//!
//! Two layers of configuration: [`recipe`] is what the user typed, `plan` what it means. `stage` runs
//! the plan, [`report`] shows what came of it.

pub mod args;
mod data;
pub mod engine;
mod exit;
#[allow(unsafe_code, reason = "the binary's calls into the C library")]
mod ffi;
mod files;
pub mod front;
mod inputs;
pub mod interval;
mod logprobs;
mod plan;
pub mod recipe;
pub mod report;
pub mod results;
mod run;
mod show;
mod stage;
pub mod terminal;
mod usage;

pub use usage::Usage;
