//! Integration tests of `rlhf-model`: golden files of `transformers`, exactness of packing,
//! generation, files good and bad.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stderr,
    reason = "tests"
)]

mod adapter;
mod bad;
#[path = "../../../rlhf-kernels/tests/it/device.rs"]
mod device;
mod exact;
mod files;
mod generation;
mod gguf;
mod golden;
#[cfg(feature = "hub")]
mod hub;
mod props;
mod sampling;
mod scalar;
#[cfg(feature = "endpoint")]
mod server;
mod smollm2;
mod steering;
mod support;
mod tabular;
