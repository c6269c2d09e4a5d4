//! Builds or checks the shipped data sets: `rlhf-datasets [--out DIR] [--check]`.

use rlhf_data::synth;
use std::io::Write;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "usage: rlhf-datasets [--out DIR] [--check]

Builds the shipped data sets below DIR (default: datasets).
  --check   write nothing; exit 1 where a file is absent or differs
";

struct Arguments {
    out: PathBuf,
    check: bool,
}

enum Asked {
    Help,
    Work(Arguments),
}

fn parse(mut words: impl Iterator<Item = String>) -> Result<Asked, String> {
    let mut arguments = Arguments {
        out: PathBuf::from("datasets"),
        check: false,
    };
    while let Some(word) = words.next() {
        match word.as_str() {
            "--out" => {
                arguments.out = words.next().ok_or("--out needs a folder")?.into();
            }
            "--check" => arguments.check = true,
            "--help" | "-h" => return Ok(Asked::Help),
            other => return Err(format!("unknown argument `{other}`")),
        }
    }
    Ok(Asked::Work(arguments))
}

/// The number of files that differ; 0 after writing.
fn work(arguments: &Arguments) -> Result<usize, Box<dyn std::error::Error>> {
    let mut out = std::io::stdout().lock();
    let (mut total, mut different) = (0, 0);
    for file in synth::build(synth::SEED)? {
        let mut state = "";
        if arguments.check {
            if !file.is_written(&arguments.out)? {
                different += 1;
                state = "  differs";
            }
        } else {
            file.write(&arguments.out)?;
        }
        total += file.bytes.len();
        writeln!(
            out,
            "{}  {:>8}  {}{state}",
            file.sha256(),
            file.bytes.len(),
            file.path
        )?;
    }
    writeln!(out, "{total} bytes in all")?;
    Ok(different)
}

fn main() -> ExitCode {
    let mut errors = std::io::stderr();
    let arguments = match parse(std::env::args().skip(1)) {
        Ok(Asked::Work(arguments)) => arguments,
        Ok(Asked::Help) => {
            return match std::io::stdout().write_all(USAGE.as_bytes()) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            };
        }
        Err(error) => {
            // A closed stderr leaves nowhere to say anything.
            let _ = write!(errors, "error: {error}\n{USAGE}");
            return ExitCode::from(2);
        }
    };
    match work(&arguments) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(different) => {
            let _ = writeln!(
                errors,
                "error: {different} files differ from what the generator builds\n  in {}\n  run `cargo xtask datasets` and commit the result",
                arguments.out.display()
            );
            ExitCode::FAILURE
        }
        Err(error) => {
            let _ = writeln!(errors, "error: {error}\n  in {}", arguments.out.display());
            ExitCode::FAILURE
        }
    }
}
