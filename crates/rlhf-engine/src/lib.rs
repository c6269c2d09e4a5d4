//! What computes behind the `rlhf` command.
//!
//! Two layers of configuration: [`recipe`] is what the user typed, `plan` what it means. `stage` runs
//! the plan.

mod author;
pub mod engine;
mod inputs;
mod logprobs;
pub mod memory;
mod plan;
pub mod recipe;
mod reward_eval;
mod run;
mod server;
mod stage;
