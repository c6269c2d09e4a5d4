//! The front of the program: parses the command line and does what needs no libtorch.
//!
//! Loading libtorch takes a third of a second, so `rlhf` itself is not linked to it: a command that
//! computes is handed to `rlhf-engine`, which lies beside it. A test asserts that it stays so.

use std::path::PathBuf;
use std::process::{Command as Process, ExitCode};

use anyhow::Context as _;
use clap::Parser as _;

use crate::args::{Cli, Command};
use crate::exit;

/// `main` of `rlhf`.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Recipes(a) => crate::show::recipes(&a),
        Command::Data(c) => crate::data::run(&c),
        Command::Report(a) => crate::show::report(&a),
        _ => hand_over(),
    };
    exit::code(result, |cause| {
        cause
            .downcast_ref::<rlhf_data::Error>()
            .is_some_and(rlhf_data::Error::is_input)
    })
}

/// Replaces this process by the engine, with the same arguments.
fn hand_over() -> anyhow::Result<ExitCode> {
    let engine = engine_path()?;
    let mut process = Process::new(&engine);
    process.args(std::env::args_os().skip(1));
    let place = format!(
        "cannot start {}; build it with `cargo build --release -p rlhf`",
        engine.display()
    );
    #[cfg(unix)]
    {
        use std::os::unix::process::CommandExt as _;
        Err(process.exec()).context(place)
    }
    #[cfg(not(unix))]
    {
        let status = process.status().context(place)?;
        Ok(ExitCode::from(status.code().unwrap_or(1) as u8))
    }
}

fn engine_path() -> anyhow::Result<PathBuf> {
    let me = std::env::current_exe().context("cannot find this program's own path")?;
    Ok(me.with_file_name(format!("rlhf-engine{}", std::env::consts::EXE_SUFFIX)))
}
