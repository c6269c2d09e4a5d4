//! Integration tests of `rlhf-data`.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests"
)]

mod bad;
mod cache;
mod formats;
mod golden;
mod hostile;
mod hostile_templates;
#[cfg(feature = "hub")]
mod hub;
mod import;
mod import_files;
mod limits;
mod lint;
mod oasst;
mod order;
mod props;
mod records;
mod stats;
mod stream;
mod synth;
mod synthetic;
mod templates;
mod tokenizers;

/// The folder that several projects share, which may be absent.
fn shared() -> std::path::PathBuf {
    std::env::var_os("RLHF_SHARED").map_or_else(
        || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared"),
        std::path::PathBuf::from,
    )
}
