//! Integration tests: golden values, gradients by finite differences, exact recovery, properties.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

#[allow(dead_code, reason = "shared by several crates; each uses a part")]
#[path = "../../../rlhf-kernels/tests/it/device.rs"]
mod device;
mod exact;
mod golden;
#[allow(
    dead_code,
    reason = "shared by the crates that have losses; each uses a part"
)]
#[path = "../../../rlhf-policy/tests/it/golden_io.rs"]
mod golden_io;
mod gradcheck;
#[cfg(all(feature = "judge", feature = "train"))]
mod judge;
mod models;
mod props;
mod training;
#[cfg(feature = "verify")]
mod verify;
