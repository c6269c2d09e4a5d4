//! Starting other programs.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result};

/// A child ended with this exit code; it has said why itself.
#[derive(Debug)]
pub(crate) struct Failed {
    pub(crate) code: u8,
}

impl std::fmt::Display for Failed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "a command ended with exit code {}", self.code)
    }
}

impl std::error::Error for Failed {}

/// The workspace's root.
pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .map_or_else(|| PathBuf::from("."), Path::to_owned)
}

/// A command that runs in the workspace's root.
pub(crate) struct Run(Command);

impl Run {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut c = Command::new(program);
        c.current_dir(root());
        Self(c)
    }

    pub(crate) fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.0.args(args);
        self
    }

    pub(crate) fn env(mut self, key: &str, value: &str) -> Self {
        self.0.env(key, value);
        self
    }

    /// Runs it to its end; its exit code becomes ours.
    pub(crate) fn run(mut self) -> Result<()> {
        let name = self.0.get_program().to_string_lossy().into_owned();
        let status = self
            .0
            .status()
            .with_context(|| format!("cannot start {name}"))?;
        if status.success() {
            return Ok(());
        }
        // No code: a signal ended it.
        Err(Failed {
            code: status.code().map_or(130, |c| c as u8),
        }
        .into())
    }

    /// Its standard output, when it succeeds.
    pub(crate) fn output(mut self) -> Option<String> {
        let o = self.0.stderr(Stdio::null()).output().ok()?;
        o.status
            .success()
            .then(|| String::from_utf8_lossy(&o.stdout).into_owned())
    }
}

/// `cargo COMMAND ARGS`, the cargo that runs us.
///
/// Cargo's configuration has put LIBTORCH into our environment. Handed on it would look like a change
/// to torch-sys, which would then be built anew whenever cargo is called directly in between.
pub(crate) fn cargo(command: &str, args: &[&str]) -> Run {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut run = Run::new(cargo).args([command]).args(args);
    if std::env::var_os("LIBTORCH").is_some_and(|l| Path::new(&l) == crate::libtorch::link()) {
        run.0.env_remove("LIBTORCH");
    }
    run
}

/// A release binary of the workspace. Its rpath finds `.libtorch` beside `target`; elsewhere the
/// runner's variable does.
pub(crate) fn program(name: &str) -> Run {
    let target =
        std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from);
    Run::new(root().join("xtask/run.sh")).args([target.join("release").join(name)])
}

/// Whether a program is on the path.
pub(crate) fn has(program: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&paths).any(|d| {
        d.join(format!("{program}{}", std::env::consts::EXE_SUFFIX))
            .is_file()
    })
}
