//! Integration tests of `rlhf-data`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "tests"
)]

mod bad;
mod golden;
mod hostile;
mod lint;
mod props;
mod stats;
mod synth;
mod templates;

/// The folder that several projects share, which may be absent.
fn shared() -> std::path::PathBuf {
    std::env::var_os("RLHF_SHARED").map_or_else(
        || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        std::path::PathBuf::from,
    )
}
