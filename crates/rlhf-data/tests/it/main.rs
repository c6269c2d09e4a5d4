//! Integration tests of `rlhf-data`.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "tests")]

mod bad;
mod synth;
mod templates;
