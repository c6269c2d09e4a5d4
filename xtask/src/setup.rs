//! `cargo xtask setup`: a libtorch for the build, once for all clones.
//!
//! Looked for in order: `$LIBTORCH`, the prepared folder in the user's cache, Python's torch (which
//! brings CUDA), and at last pip, which downloads the wheel. What is downloaded is unpacked under a
//! temporary name and renamed, under a lock, so an interrupted or a second setup does no harm.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use indicatif::{ProgressBar, ProgressStyle};

use crate::libtorch::{Origin, Place, VERSION, cache_dir, link, python_torch, usable, version};
use crate::shell::{Run, has, root};
use crate::{shell, standin};

/// The wheel of this platform: pip's platform tag and the wheel's SHA-256.
struct Wheel {
    platform: &'static str,
    sha256: &'static str,
}

fn wheel() -> Result<Wheel> {
    if cfg!(all(target_os = "linux", target_arch = "x86_64")) {
        return Ok(Wheel {
            platform: "manylinux_2_28_x86_64",
            sha256: "7aa2f9bbc6d4595ba72138026b2074be1233186150e9292865e04b7a63b8c67a",
        });
    }
    bail!(
        "no libtorch {VERSION} was found, and none is downloaded for this platform yet\n  do: install torch=={VERSION} for python3, or unpack libtorch {VERSION} and set LIBTORCH to its folder"
    )
}

/// Makes sure that `.libtorch` leads to a libtorch; says what it does if `loud`.
pub(crate) fn run(loud: bool) -> Result<Place> {
    let began = Instant::now();
    let place = match find()? {
        Some(place) => place,
        None => install()?,
    };
    point_link(&place.dir)?;
    if loud {
        eprintln!(
            "libtorch {VERSION} from {}: {} ({:.2} s)",
            place.origin.text(),
            place.dir.display(),
            began.elapsed().as_secs_f64()
        );
    }
    Ok(place)
}

/// A libtorch that is there already.
fn find() -> Result<Option<Place>> {
    if let Some(dir) = std::env::var_os("LIBTORCH").map(PathBuf::from) {
        // cargo's own configuration sets LIBTORCH to the link for what it runs.
        if dir != link() && dir.canonicalize().ok() != link().canonicalize().ok() {
            if usable(&dir) {
                return Ok(Some(Place {
                    dir,
                    origin: Origin::Variable,
                }));
            }
            let found =
                version(&dir).map_or_else(|| "no libtorch".to_owned(), |v| format!("libtorch {v}"));
            bail!(
                "LIBTORCH={} holds {found}, expected {VERSION}\n  do: unset LIBTORCH, or point it at libtorch {VERSION}",
                dir.display()
            );
        }
    }
    if usable(&cache_dir()) {
        return Ok(Some(Place {
            dir: cache_dir(),
            origin: Origin::Cache,
        }));
    }
    Ok(python_torch().filter(|d| usable(d)).map(|dir| Place {
        dir,
        origin: Origin::Python,
    }))
}

/// Downloads and prepares a libtorch in the cache.
fn install() -> Result<Place> {
    let wheel = wheel()?;
    for (program, mend) in [
        (
            "python3",
            "install Python 3 with pip (Debian: apt-get install python3 python3-pip)",
        ),
        ("gcc", "install gcc (Debian: apt-get install gcc g++)"),
    ] {
        if !has(program) {
            bail!("{program} is not installed\n  do: {mend}");
        }
    }
    if Run::new("python3")
        .args(["-m", "pip", "--version"])
        .output()
        .is_none()
    {
        bail!("python3 has no pip\n  do: install it (Debian: apt-get install python3-pip)");
    }
    let target = cache_dir();
    let parent = target
        .parent()
        .context("the cache folder has no parent")?
        .to_owned();
    std::fs::create_dir_all(&parent)
        .with_context(|| format!("cannot make {}", parent.display()))?;
    let lock = File::create(parent.join("setup.lock"))
        .with_context(|| format!("cannot write in {}", parent.display()))?;
    if lock.try_lock().is_err() {
        eprintln!("another setup is at work; waiting for it …");
        lock.lock().context("waiting for another setup")?;
    }
    if usable(&target) {
        return Ok(Place {
            dir: target,
            origin: Origin::Cache,
        });
    }
    // Whoever held the lock before and died left its folder behind.
    for entry in std::fs::read_dir(&parent)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(".new-") {
            std::fs::remove_dir_all(entry.path()).ok();
        }
    }
    let work = tempfile::Builder::new()
        .prefix(".new-")
        .tempdir_in(&parent)?;
    let wheel = download(&wheel, work.path())?;
    let staged = work.path().join("libtorch");
    unpack(&wheel, &staged)
        .context("unpacking the wheel (is the disk full? it needs 1.1 GB for a moment)")?;
    standin::build(&staged.join("lib"))?;
    std::fs::write(staged.join("build-version"), format!("{VERSION}\n"))?;
    if !usable(&staged) {
        bail!(
            "the wheel does not hold what was expected\n  do: run the setup again; if it fails again, set LIBTORCH by hand"
        );
    }
    if target.exists() {
        std::fs::remove_dir_all(&target)
            .with_context(|| format!("cannot remove the damaged {}", target.display()))?;
    }
    std::fs::rename(&staged, &target)
        .with_context(|| format!("cannot write {}", target.display()))?;
    Ok(Place {
        dir: target,
        origin: Origin::Cache,
    })
}

/// Lets pip fetch the wheel, whose hash it checks; 530 MB.
fn download(wheel: &Wheel, work: &Path) -> Result<PathBuf> {
    eprintln!("downloading libtorch {VERSION} with pip (530 MB, once) …");
    let requirements = work.join("requirements.txt");
    std::fs::write(
        &requirements,
        format!("torch=={VERSION} --hash=sha256:{}\n", wheel.sha256),
    )?;
    let platform = format!("--platform={}", wheel.platform);
    let pip = Run::new("python3")
        .args([
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--implementation=cp",
            "--python-version=3.11",
            "--abi=cp311",
        ])
        .args([
            "--require-hashes",
            "--disable-pip-version-check",
            "-q",
            "--progress-bar=on",
            &platform,
        ])
        .args([
            "-r".as_ref(),
            requirements.as_os_str(),
            "-d".as_ref(),
            work.as_os_str(),
        ]);
    if let Err(e) = pip.run() {
        if e.downcast_ref::<shell::Failed>()
            .is_some_and(|f| f.code == 130)
        {
            return Err(e);
        }
        bail!(
            "pip could not download torch {VERSION} (its message stands above)\n  do: check the network, or install torch=={VERSION} yourself, or set LIBTORCH to a libtorch {VERSION}"
        );
    }
    let found = std::fs::read_dir(work)?
        .flatten()
        .map(|e| e.path())
        .find(|p| p.extension().is_some_and(|e| e == "whl"));
    found.context("pip downloaded nothing")
}

/// The libraries that the CPU part needs.
const LIBRARIES: [&str; 3] = [
    "torch/lib/libtorch_cpu.so",
    "torch/lib/libc10.so",
    "torch/lib/libgomp.so.1",
];

/// Unpacks headers and the CPU libraries of the wheel.
fn unpack(wheel: &Path, to: &Path) -> Result<()> {
    let mut zip = zip::ZipArchive::new(File::open(wheel)?)?;
    let wanted: Vec<usize> = (0..zip.len())
        .filter(|&i| {
            let name = zip.name_for_index(i).unwrap_or_default();
            !name.ends_with('/')
                && (name.starts_with("torch/include/") || LIBRARIES.contains(&name))
        })
        .collect();
    let bar = ProgressBar::new(wanted.len() as u64);
    if let Ok(style) = ProgressStyle::with_template("unpacking {bar:30} {pos}/{len} files") {
        bar.set_style(style);
    }
    for i in wanted {
        let mut file = zip.by_index(i)?;
        let path = file
            .enclosed_name()
            .context("a path in the wheel leads outside")?;
        let target = to.join(path.strip_prefix("torch")?);
        if let Some(dir) = target.parent() {
            std::fs::create_dir_all(dir)?;
        }
        let mut out =
            File::create(&target).with_context(|| format!("cannot write {}", target.display()))?;
        std::io::copy(&mut file, &mut out)
            .with_context(|| format!("cannot write {}", target.display()))?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    Ok(())
}

/// Points `.libtorch` at `dir`, whatever it pointed at before.
fn point_link(dir: &Path) -> Result<()> {
    let link = link();
    if link.canonicalize().ok() == dir.canonicalize().ok() {
        return Ok(());
    }
    let place = || format!("cannot make the link {}", link.display());
    let new = root().join(".libtorch.new");
    std::fs::remove_file(&new).ok();
    #[cfg(unix)]
    std::os::unix::fs::symlink(dir, &new).with_context(place)?;
    #[cfg(windows)]
    std::os::windows::fs::symlink_dir(dir, &new).with_context(place)?;
    std::fs::rename(&new, &link).with_context(place)
}
