//! The commands that compute, as their users meet them: messages, exit codes, whole runs.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "tests"
)]

mod algorithms;
mod align;
mod cli;
mod control;
mod judged;
mod recipes;
mod rejection;
mod rewards;
mod runs;
mod synthetic;

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// The project's root: recipes name their data relative to it.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../..")
        .canonicalize()
        .unwrap()
}

/// Where the shared folder of test material would be.
fn shared() -> Option<PathBuf> {
    let dir = PathBuf::from(
        std::env::var_os("RLHF_SHARED").unwrap_or_else(|| root().join("../shared").into()),
    );
    dir.is_dir().then_some(dir)
}

fn rlhf() -> Command {
    let mut c = Command::new(env!("CARGO_BIN_EXE_rlhf-engine"));
    // One thread: several tests run at once, and threads that wait for each other would crawl.
    c.current_dir(root()).env("OMP_NUM_THREADS", "1");
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
