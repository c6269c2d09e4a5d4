//! Developer tasks: `cargo xtask COMMAND`.
//!
//! Invariant: depends on none of the project's crates and never on libtorch; it finds libtorch, and
//! starts cargo and `rlhf`.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "a command-line tool"
)]

mod check;
mod doctor;
mod fetch;
mod libtorch;
mod seeds;
mod setup;
mod shell;
mod standin;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::shell::{cargo, has};

/// What is off by default and must work as well.
pub(crate) const FEATURES: [&str; 2] = [
    "--features",
    "rlhf-data/hub,rlhf-model/hub,rlhf-model/endpoint",
];

/// Developer tasks of the rlhf workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", disable_help_subcommand = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Find or install libtorch; does nothing when it is there
    Setup,
    /// Explain what is there and what is missing
    Doctor,
    /// Print the exports for a shell
    Env,
    /// Set up, build, run a recipe [default: quickstart], make the report
    #[command(disable_help_flag = true)]
    Pipeline {
        /// A recipe, then the flags of `rlhf run`
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run a recipe with several seeds and put their evaluations side by side
    Seeds {
        /// A recipe
        recipe: String,
        /// The seeds
        #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 3])]
        seeds: Vec<u64>,
        /// Flags of `rlhf run`
        #[arg(last = true)]
        flags: Vec<String>,
    },
    /// Run the tests: by cargo-nextest where it is installed, else by cargo
    #[command(disable_help_flag = true)]
    Test {
        /// A filter and flags of the test runner
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run the benchmarks
    #[command(disable_help_flag = true)]
    Bench {
        /// A filter and flags of criterion
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Check formatting, lints, docs and the crates' layers
    Check {
        /// Compare a saved model with Python's transformers too
        #[arg(long)]
        interop: bool,
    },
    /// Rebuild the shipped data sets byte for byte
    Datasets {
        /// Flags of the generator
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Fetch a model
    Fetch {
        /// smollm2
        model: String,
        /// The folder to write
        #[arg(long, value_name = "DIR")]
        out: Option<std::path::PathBuf>,
    },
}

fn main() -> ExitCode {
    let result = match Cli::parse().command {
        Command::Setup => setup::run(true).map(|_| ()),
        Command::Doctor => doctor::run(),
        Command::Env => env(),
        Command::Pipeline { args } => pipeline(&args),
        Command::Seeds {
            recipe,
            seeds,
            flags,
        } => seeds::run(&recipe, &seeds, &flags),
        Command::Test { args } => test(&args),
        Command::Bench { args } => setup::run(false).and_then(|_| {
            cargo("bench", &["--workspace"])
                .args(["--benches", "--"])
                .args(&args)
                .run()
        }),
        Command::Check { interop } => setup::run(false).and_then(|_| check::run(interop)),
        Command::Datasets { args } => cargo(
            "run",
            &[
                "--quiet",
                "--release",
                "-p",
                "rlhf-data",
                "--bin",
                "rlhf-datasets",
                "--",
            ],
        )
        .args(&args)
        .run(),
        Command::Fetch { model, out } => fetch::run(&model, out),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            // A child that ended with a code of its own has said why.
            if let Some(code) = e.downcast_ref::<shell::Failed>() {
                return ExitCode::from(code.code);
            }
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn env() -> anyhow::Result<()> {
    let place = setup::run(false)?;
    println!("export LIBTORCH={}", place.dir.display());
    println!(
        "export LD_LIBRARY_PATH=\"${{LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}}{}/lib\"",
        place.dir.display()
    );
    Ok(())
}

/// The recipe is the first argument unless that is a flag.
fn recipe_and_flags(args: &[String]) -> (String, &[String]) {
    match args.split_first() {
        Some((first, rest)) if !first.starts_with('-') => (first.clone(), rest),
        _ => ("quickstart".into(), args),
    }
}

fn pipeline(args: &[String]) -> anyhow::Result<()> {
    let (recipe, flags) = recipe_and_flags(args);
    setup::run(true)?;
    eprintln!("building (release) …");
    cargo("build", &["--release", "-p", "rlhf", "-p", "rlhf-engine"]).run()?;
    shell::program("rlhf")
        .args(["run", &recipe])
        .args(flags)
        .run()
}

fn test(args: &[String]) -> anyhow::Result<()> {
    setup::run(false)?;
    // The tests run side by side: one libtorch thread each, or they would crawl.
    let quiet = |run: shell::Run| run.env("OMP_NUM_THREADS", "1").args(args);
    if has("cargo-nextest") {
        let kinds = ["run", "--workspace", "--no-fail-fast"];
        quiet(cargo("nextest", &kinds).args(FEATURES)).run()?;
    } else {
        let kinds = [
            "--workspace",
            "--lib",
            "--bins",
            "--tests",
            "--no-fail-fast",
        ];
        quiet(cargo("test", &kinds).args(FEATURES)).run()?;
    }
    // nextest has no doc tests; with a filter only what was asked for runs.
    if args.is_empty() {
        cargo("test", &["--workspace", "--doc"]).run()
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn flags_pass_through_to_the_recipe() {
        let args = |a: &[&str]| a.iter().map(|s| (*s).to_owned()).collect::<Vec<_>>();
        let a = args(&["stories", "--smoke"]);
        assert_eq!(recipe_and_flags(&a), ("stories".into(), &a[1..]));
        let b = args(&["--smoke"]);
        assert_eq!(recipe_and_flags(&b), ("quickstart".into(), &b[..]));
        let Cli {
            command: Command::Pipeline { args },
        } = Cli::try_parse_from(["x", "pipeline", "stories", "--set", "a=1", "--json"]).unwrap()
        else {
            panic!("another command")
        };
        assert_eq!(args, ["stories", "--set", "a=1", "--json"]);
    }
}
