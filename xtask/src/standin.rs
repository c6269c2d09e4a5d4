//! Stand-ins for the CUDA libraries that the CPU part of libtorch still names.
//!
//! `libtorch_cpu.so` of the wheel needs `libcudart.so.13` and `libcupti.so.13` for a few versioned
//! symbols. A stand-in defines each of them as a function that returns an error, under the version
//! node that the symbol names, so that loading works also under LD_BIND_NOW.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result, bail};

use crate::shell::Run;

/// Undefined CUDA symbols by the library (and version node) that is to define them.
fn missing(nm: &str) -> BTreeMap<String, Vec<String>> {
    let mut all: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for line in nm.lines() {
        let Some(symbol) = line.trim().strip_prefix("U ") else {
            continue;
        };
        let Some((name, library)) = symbol.split_once('@') else {
            continue;
        };
        let library = library.trim_start_matches('@');
        if name.starts_with("cu") && library.starts_with("libcu") {
            all.entry(library.to_owned())
                .or_default()
                .push(name.to_owned());
        }
    }
    all
}

/// C code of a stand-in.
fn source(symbols: &[String]) -> String {
    let mut c = String::new();
    for s in symbols {
        let _ = match s.as_str() {
            // No device; 100 is cudaErrorNoDevice.
            "cudaGetDeviceCount" => writeln!(
                c,
                "int {s}(int *count) {{ if (count) *count = 0; return 100; }}"
            ),
            "cudaGetErrorString" => writeln!(
                c,
                "const char *{s}(int code) {{ (void)code; return \"no CUDA in this libtorch\"; }}"
            ),
            _ => writeln!(c, "int {s}(void) {{ return 100; }}"),
        };
    }
    c
}

/// Builds every stand-in that `lib/libtorch_cpu.so` needs, and the empty `libtorch.so`, into `lib`.
pub(crate) fn build(lib: &Path) -> Result<()> {
    let library = lib.join("libtorch_cpu.so");
    let nm = Run::new("nm")
        .args(["-D", "--undefined-only"])
        .args([&library])
        .output()
        .context("cannot read libtorch's symbols: install gcc and binutils (Debian: apt-get install gcc binutils)")?;
    let work = tempfile::tempdir()?;
    for (name, symbols) in missing(&nm) {
        let (c, map) = (
            work.path().join("standin.c"),
            work.path().join("standin.map"),
        );
        std::fs::write(&c, source(&symbols))?;
        std::fs::write(
            &map,
            format!("{name} {{ global: {}; }};\n", symbols.join("; ")),
        )?;
        let script = format!("-Wl,--version-script={}", map.display());
        compile(
            &[&c],
            &lib.join(&name),
            &[&format!("-Wl,-soname,{name}"), &script],
        )?;
    }
    let empty = work.path().join("empty.c");
    std::fs::write(&empty, "")?;
    let here = format!("-L{}", lib.display());
    let there = format!("-Wl,-rpath-link,{}", lib.display());
    compile(
        &[&empty],
        &lib.join("libtorch.so"),
        &[
            "-Wl,-soname,libtorch.so",
            "-Wl,--no-as-needed",
            &here,
            "-ltorch_cpu",
            "-lc10",
            &there,
        ],
    )
}

fn compile(sources: &[&Path], out: &Path, flags: &[&str]) -> Result<()> {
    let gcc = Run::new("gcc")
        .args(["-shared", "-fPIC", "-O1", "-o"])
        .args([out])
        .args(sources)
        .args(flags);
    if gcc.output().is_none() {
        bail!(
            "gcc could not build {}; is gcc installed? (Debian: apt-get install gcc)",
            out.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn symbols_are_grouped_by_library() {
        let nm = "                 U cudaGetDeviceCount@libcudart.so.13\n                 U malloc@GLIBC_2.2.5\n                 U cuptiFinalize@@libcupti.so.13\n                 w foo\n                 U cudaGetErrorString@libcudart.so.13\n";
        let m = missing(nm);
        assert_eq!(
            m["libcudart.so.13"],
            ["cudaGetDeviceCount", "cudaGetErrorString"]
        );
        assert_eq!(m["libcupti.so.13"], ["cuptiFinalize"]);
        assert_eq!(m.len(), 2);
        let c = source(&m["libcudart.so.13"]);
        assert!(
            c.contains("*count = 0; return 100;") && c.contains("const char *cudaGetErrorString")
        );
    }
}
