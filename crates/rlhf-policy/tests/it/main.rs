//! Integration tests: golden values, gradients by finite differences, exact expectations, properties.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

mod control;
mod control_exact;
#[allow(dead_code, reason = "shared by several crates; each uses a part")]
#[path = "../../../rlhf-kernels/tests/it/device.rs"]
mod device;
mod environment;
mod exact;
mod golden;
#[allow(
    dead_code,
    reason = "shared by the crates that have losses; each uses a part"
)]
mod golden_io;
mod gradcheck;
mod opd;
mod props;
mod rejection;
mod sft;
