//! Code: a command of the user's looks at the completion, under [`Limits`].

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::part::Part;
use super::sandbox::{self, Limits, Run};
use super::{FailureKind, Sample, Verdict, Verifier, bad, short};
use crate::error::Result;

const NAME: &str = "code";

/// How the command gets the completion.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Input {
    /// On its standard input.
    #[default]
    Stdin,
    /// In a file of this name in its folder.
    File(String),
}

/// What of the command's end is the score.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ScoreFrom {
    /// 1 when its exit code is 0, else 0.
    #[default]
    Exit,
    /// The last line that it prints, a number; 0 when its exit code is not 0 or the line is none.
    Stdout,
}

/// What a command says of a completion.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Code {
    /// The program and its arguments, as in `["python3", "tests.py"]`. Nothing is handed to a shell.
    pub command: Vec<String>,
    /// How it gets the completion: `"stdin"`, or `{ file = "solution.py" }`.
    #[serde(default)]
    pub input: Input,
    /// What it gets of it.
    #[serde(default)]
    pub part: Part,
    /// Files that are put beside it, and the fields that hold their text: `{ "tests.py" = "tests" }`.
    #[serde(default)]
    pub files: BTreeMap<String, String>,
    /// What the score is.
    #[serde(default)]
    pub score: ScoreFrom,
    /// Its environment, otherwise empty.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// What it may take.
    #[serde(default)]
    pub limits: Limits,
}

impl Code {
    pub(crate) fn build(&self) -> Result<impl Verifier + use<>> {
        let Some(name) = self.command.first() else {
            return Err(bad(
                NAME,
                "`command` is empty; write it like [\"python3\", \"check.py\"]",
            ));
        };
        if sandbox::program(name).is_none() {
            let places = sandbox::PATH.join(", ");
            return Err(bad(
                NAME,
                format!("there is no `{name}` in {places}; give the program's whole path"),
            ));
        }
        if let Some(problem) = self.limits.problem() {
            return Err(bad(NAME, problem));
        }
        let plain =
            |f: &str| !f.is_empty() && !f.starts_with('.') && !f.contains(['/', '\\', '\0']);
        let input = match &self.input {
            Input::File(f) => Some(f),
            Input::Stdin => None,
        };
        for file in self.files.keys().chain(input) {
            if !plain(file) {
                return Err(bad(
                    NAME,
                    format!("`{file}` is no plain file name: no folders, no dot in front"),
                ));
            }
        }
        if cfg!(not(unix)) {
            return Err(bad(NAME, "commands are run on Unix only"));
        }
        Ok(Runner(self.clone()))
    }
}

#[derive(Debug)]
struct Runner(Code);

impl Verifier for Runner {
    fn name(&self) -> &str {
        NAME
    }

    fn own_limit(&self) -> Option<Duration> {
        Some(self.0.limits.wall())
    }

    fn verify(&self, sample: &Sample<'_>) -> Result<Verdict> {
        let code = &self.0;
        let folder =
            tempfile::tempdir().map_err(|e| bad(NAME, format!("no folder can be made: {e}")))?;
        let write = |name: &str, text: &str| -> Result<()> {
            let path = folder.path().join(name);
            std::fs::File::create(&path)
                .and_then(|mut f| f.write_all(text.as_bytes()))
                .map_err(|e| bad(NAME, format!("{}: {e}", path.display())))
        };
        let text = code.part.of(sample.completion);
        for (file, field) in &code.files {
            write(file, &sample.text(NAME, field)?)?;
        }
        let stdin = folder.path().join(".stdin");
        let (name, given) = match &code.input {
            Input::Stdin => (".stdin", true),
            Input::File(f) => (f.as_str(), false),
        };
        write(name, text)?;
        let run = Run {
            command: &code.command,
            folder: folder.path(),
            stdin: if given {
                &stdin
            } else {
                Path::new("/dev/null")
            },
            env: &code.env,
            limits: &code.limits,
        };
        let ended = sandbox::run(&run).map_err(|e| {
            bad(
                NAME,
                format!("`{}` cannot be run: {e}", code.command.join(" ")),
            )
        })?;
        if let Some(kind) = ended.killed {
            return Ok(Verdict::failed(kind, why(kind, &code.limits)));
        }
        if ended.code != 0 {
            let said = if ended.stderr.trim().is_empty() {
                &ended.stdout
            } else {
                &ended.stderr
            };
            let last = said.trim().lines().next_back().unwrap_or("");
            return Ok(Verdict::of(
                false,
                format!("exit code {}: {}", ended.code, short(last)),
            ));
        }
        Ok(match code.score {
            ScoreFrom::Exit => Verdict::of(true, "exit code 0"),
            ScoreFrom::Stdout => {
                let last = ended.stdout.trim().lines().next_back().unwrap_or("").trim();
                match last.parse::<f64>() {
                    Ok(score) if score.is_finite() => {
                        Verdict::scored(score, format!("printed {last}"))
                    }
                    _ => Verdict::of(false, format!("printed no number: {}", short(last))),
                }
            }
        })
    }
}

fn why(kind: FailureKind, limits: &Limits) -> String {
    match kind {
        FailureKind::Deadline => format!("not through in {} s", limits.wall_s),
        FailureKind::Cpu => format!("took more than {} s of processor time", limits.cpu_s),
        FailureKind::Memory => format!("took more than {} MiB", limits.memory_mib),
        FailureKind::Output => format!("printed more than {} bytes", limits.output_bytes),
        FailureKind::Processes => format!("started more than {} processes", limits.processes),
        other => other.name().into(),
    }
}
