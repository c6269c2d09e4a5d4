//! Integration tests: golden schedules, split invariance, exact resume, kills, full disks, signals.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "tests"
)]

#[allow(dead_code, reason = "shared by several crates; each uses a part")]
#[path = "../../../rlhf-kernels/tests/it/device.rs"]
mod device;
mod disk;
mod exact;
mod golden;
#[allow(dead_code, reason = "shared by several crates; each uses a part")]
#[path = "../../../rlhf-policy/tests/it/golden_io.rs"]
mod golden_io;
mod kill;
mod props;
mod resume;
mod signal;
mod trainer;
