//! The commands that need no libtorch, as their users meet them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "tests"
)]

mod bad;
mod cli;
mod kinds;
mod report;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The project's root: recipes name their data relative to it.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

fn rlhf() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_rlhf"));
    c.current_dir(root());
    c
}

/// Runs a command; gives exit code, stdout and stderr.
fn run(args: &[&str]) -> (i32, String, String) {
    text(rlhf().args(args).output().unwrap())
}

fn text(o: Output) -> (i32, String, String) {
    let t = |b: Vec<u8>| String::from_utf8(b).unwrap();
    (o.status.code().unwrap_or(-1), t(o.stdout), t(o.stderr))
}
