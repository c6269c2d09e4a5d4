//! Preference, instruction and prompt data: records, chat templates, tokens, packed batches.
//!
//! Invariant: no libtorch. What is wrong with a file is said with its place and its mend before any
//! training begins.

pub mod chat_template;
pub mod check;
pub mod conversation;
pub mod error;
pub mod group;
pub mod order;
pub mod pack;
pub mod rate;
pub mod record;
pub mod rubric;
pub mod seed;
pub mod source;
pub mod stats;
pub mod synth;
pub mod text_stats;
pub mod tokenize;

pub use error::{Error, Result};
