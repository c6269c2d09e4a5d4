//! Preference, instruction and prompt data: records, chat templates, tokens, packed batches.
//!
//! Invariant: no libtorch. What is wrong with a file is said with its place and its mend before any
//! training begins.

pub mod cache;
pub mod chat_template;
pub mod check;
pub mod conversation;
pub mod error;
#[allow(
    unsafe_code,
    reason = "memory-mapping a file is unsafe by nature; this is its only place"
)]
mod ffi;
pub mod group;
pub mod import;
pub mod order;
pub mod pack;
pub mod rate;
pub mod record;
pub mod rubric;
pub mod seed;
pub mod source;
pub mod stats;
pub mod synth;
pub mod synthetic;
pub mod text_stats;
pub mod tokenize;

pub use error::{Error, Result};
