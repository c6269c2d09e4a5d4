//! Integration tests: golden values, gradients by finite differences, exact optimum, properties.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

#[allow(dead_code, reason = "shared by several crates; each uses a part")]
#[path = "../../../rlhf-kernels/tests/it/device.rs"]
mod device;
mod every;
mod exact;
mod golden;
#[allow(
    dead_code,
    reason = "shared by the crates that have losses; each uses a part"
)]
#[path = "../../../rlhf-policy/tests/it/golden_io.rs"]
mod golden_io;
mod golden_pref;
mod gradcheck;
mod online;
mod props;
mod sums;
mod thumbs;
mod train;
