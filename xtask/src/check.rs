//! `cargo xtask check`: formatting, lints, docs, and the layers of the crates.

use anyhow::{Result, bail};

use crate::shell::{Run, cargo, has, program};

pub(crate) fn run(interop: bool) -> Result<()> {
    eprintln!("fmt");
    cargo("fmt", &["--all", "--check"]).run()?;
    eprintln!("clippy");
    cargo("clippy", &["--workspace", "--all-targets", "--quiet"])
        .args(crate::FEATURES)
        .args(["--", "-D", "warnings"])
        .run()?;
    eprintln!("docs");
    cargo("doc", &["--workspace", "--no-deps", "--quiet"])
        .args(crate::FEATURES)
        .env("RUSTDOCFLAGS", "-D warnings")
        .run()?;
    eprintln!("layers");
    layers()?;
    for (name, tool, args) in [
        ("typos", "typos", &[][..]),
        ("deny", "cargo-deny", &["check", "licenses", "bans"]),
        ("machete", "cargo-machete", &[]),
    ] {
        if has(tool) {
            eprintln!("{name}");
            Run::new(tool).args(args).run()?;
        } else {
            eprintln!("{name}: skipped, {tool} is not installed");
        }
    }
    if interop { check_interop() } else { Ok(()) }
}

/// These crates must not reach libtorch.
const WITHOUT_TORCH: [&str; 4] = ["rlhf-data", "rlhf-endpoint", "rlhf", "xtask"];

fn layers() -> Result<()> {
    let tree = |package: &str| {
        cargo(
            "tree",
            &["-p", package, "-e", "normal,build", "--prefix", "none"],
        )
        .output()
    };
    let reaches = |package: &str, other: &str| {
        tree(package).is_none_or(|t| t.lines().any(|l| l.split(' ').next() == Some(other)))
    };
    for package in WITHOUT_TORCH {
        if reaches(package, "torch-sys") {
            bail!("{package} depends on libtorch; it must not (docs/ARCHITECTURE.md)");
        }
    }
    for (a, b) in [("rlhf-dpo", "rlhf-policy"), ("rlhf-policy", "rlhf-dpo")] {
        if reaches(a, b) {
            bail!("{a} depends on {b}; it must not (docs/ARCHITECTURE.md)");
        }
    }
    Ok(())
}

/// Saves models and lets Python's transformers load them.
fn check_interop() -> Result<()> {
    eprintln!("interop");
    if Run::new("python3")
        .args(["-c", "import transformers, torch, safetensors"])
        .output()
        .is_none()
    {
        eprintln!("interop: skipped, python3 has no transformers, torch and safetensors");
        return Ok(());
    }
    cargo(
        "build",
        &[
            "--release",
            "-p",
            "rlhf-model",
            "--example",
            "save_for_transformers",
        ],
    )
    .run()?;
    let work = tempfile::tempdir()?;
    program("examples/save_for_transformers")
        .args([work.path()])
        .run()?;
    Run::new("python3")
        .args(["docs/interop/check_transformers.py"])
        .args([work.path()])
        .run()
}
