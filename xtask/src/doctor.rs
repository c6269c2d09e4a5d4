//! `cargo xtask doctor`: what is there, what is missing, what to do.

use anyhow::{Result, bail};

use crate::libtorch::{VERSION, cache_dir, link, python_torch, usable, version};
use crate::shell::{Run, has, root};

enum Finding {
    Ok(String),
    Warn(String),
    Fail(String),
}

use Finding::{Fail, Ok as Good, Warn};

pub(crate) fn run() -> Result<()> {
    let mut failed = 0;
    for (name, finding) in findings() {
        let (mark, text) = match finding {
            Good(t) => ("ok  ", t),
            Warn(t) => ("warn", t),
            Fail(t) => {
                failed += 1;
                ("FAIL", t)
            }
        };
        println!("{mark}  {name:<14} {text}");
    }
    if failed > 0 {
        bail!("{failed} of these must be mended first");
    }
    Ok(())
}

fn findings() -> Vec<(&'static str, Finding)> {
    let mut all = vec![("rust", tool("rustc", "install it by rustup"))];
    all.push(("gcc", tool("gcc", "apt-get install gcc")));
    all.push(("g++", tool("g++", "apt-get install g++")));
    all.push(("nm", tool("nm", "apt-get install binutils")));
    all.push((
        "python3",
        tool("python3", "apt-get install python3 python3-pip"),
    ));
    all.push((
        "pip",
        match Run::new("python3")
            .args(["-m", "pip", "--version"])
            .output()
        {
            Some(v) => Good(first_line(&v)),
            None => Warn(
                "python3 has no pip: setup cannot download libtorch; apt-get install python3-pip"
                    .into(),
            ),
        },
    ));
    all.push(("libtorch", libtorch()));
    all.push((
        "Python's torch",
        match python_torch() {
            Some(d) => Good(format!(
                "{} in {}",
                version(&d).unwrap_or_default(),
                d.display()
            )),
            None => Good("not installed; needed for CUDA only".into()),
        },
    ));
    all.push(("disk", disk()));
    all.push(("memory", memory()));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    all.push(("cores", Good(cores.to_string())));
    for (program, what) in [
        ("cargo-nextest", "faster tests"),
        ("typos", "spelling in `check`"),
        ("cargo-deny", "licences in `check`"),
        ("cargo-machete", "unused dependencies in `check`"),
    ] {
        let text = if has(program) {
            "installed".to_owned()
        } else {
            format!("not installed; optional: {what}")
        };
        all.push((program, Good(text)));
    }
    all
}

fn first_line(text: &str) -> String {
    text.lines().next().unwrap_or_default().to_owned()
}

fn tool(program: &str, mend: &str) -> Finding {
    match Run::new(program).args(["--version"]).output() {
        Some(v) => Good(first_line(&v)),
        None => Fail(format!("not found; {mend}")),
    }
}

fn libtorch() -> Finding {
    let link = link();
    if usable(&link) {
        let real = link.canonicalize().unwrap_or(link);
        return Good(format!("{VERSION} in {}", real.display()));
    }
    if let Some(v) = version(&link) {
        return Fail(format!(
            ".libtorch leads to version {v}, expected {VERSION}; run `cargo xtask setup`"
        ));
    }
    if usable(&cache_dir()) {
        return Warn(
            "in the cache, but .libtorch does not lead to it; run `cargo xtask setup`".into(),
        );
    }
    Warn("not there yet; run `cargo xtask setup`".into())
}

fn disk() -> Finding {
    let Some(text) = Run::new("df").args(["-Pk"]).args([root()]).output() else {
        return Warn("unknown".into());
    };
    let free = text
        .lines()
        .nth(1)
        .and_then(|l| l.split_whitespace().nth(3))
        .and_then(|k| k.parse::<u64>().ok());
    match free.map(|k| k >> 20) {
        Some(g) if g < 6 => Warn(format!("{g} GiB free; setup and build need about 6")),
        Some(g) => Good(format!("{g} GiB free")),
        None => Warn("unknown".into()),
    }
}

fn memory() -> Finding {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find(|l| l.starts_with("MemAvailable"))
        .and_then(|l| l.split_whitespace().nth(1))
        .and_then(|k| k.parse::<u64>().ok());
    match kib.map(|k| k >> 20) {
        Some(g) if g < 3 => Warn(format!("{g} GiB available; the build needs about 3")),
        Some(g) => Good(format!("{g} GiB available")),
        None => Good("unknown".into()),
    }
}
