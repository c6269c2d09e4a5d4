//! Exit codes: 0 ok, 1 failure at run time, 2 wrong usage or input, 130/143 interrupted.

use std::process::ExitCode;

use crate::usage::Usage;

/// The run was asked to stop by a signal, after saving a checkpoint.
#[derive(Clone, Debug)]
pub struct Interrupted {
    /// The exit code: 130 or 143.
    pub code: u8,
    /// How to go on.
    pub go_on: String,
}

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "stopped after saving a checkpoint\n  do: {}", self.go_on)
    }
}

impl std::error::Error for Interrupted {}

/// Prints an error as cause, place and mend, and gives the exit code. `is_input` tells which causes
/// lie in what the user gave.
#[allow(clippy::print_stderr, reason = "this is where errors reach the user")]
pub fn code(
    result: anyhow::Result<ExitCode>,
    is_input: fn(&(dyn std::error::Error + 'static)) -> bool,
) -> ExitCode {
    let error = match result {
        Ok(code) => return code,
        Err(e) => e,
    };
    if let Some(stop) = error.downcast_ref::<Interrupted>() {
        eprintln!("{stop}");
        return ExitCode::from(stop.code);
    }
    eprintln!("error: {}", text(&error));
    let wrong_input = error.chain().any(|c| c.is::<Usage>() || is_input(c));
    ExitCode::from(if wrong_input { 2 } else { 1 })
}

/// The chain of causes, each once; of libtorch's texts the first line only.
fn text(error: &anyhow::Error) -> String {
    let mut parts: Vec<String> = Vec::new();
    for cause in error.chain() {
        let line = cause.to_string();
        let line = line
            .split("\nException raised from")
            .next()
            .unwrap_or_default()
            .trim()
            .to_owned();
        if !parts.iter().any(|p| p.contains(&line)) {
            parts.push(line);
        }
    }
    parts.join("\n  because: ")
}
