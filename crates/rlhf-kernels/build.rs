//! Compiles the shim over libtorch. torch-sys (`links = "tch"`) says where libtorch is.

use std::path::PathBuf;

/// The inner loops, once per instruction set: their table's name and the compiler's flags.
const INSTRUCTION_SETS: [(&str, &[&str]); 3] = [
    ("cpu_plain", &[]),
    ("cpu_avx2", &["-mavx2", "-mfma"]),
    (
        "cpu_avx512",
        &[
            "-mavx2",
            "-mfma",
            "-mavx512f",
            "-mavx512dq",
            "-mavx512bw",
            "-mavx512vl",
        ],
    ),
];

fn main() {
    println!("cargo:rerun-if-changed=csrc");
    let Ok(lib) = std::env::var("DEP_TCH_LIBTORCH_LIB").map(PathBuf::from) else {
        println!("cargo:warning=torch-sys did not say where libtorch is; run `cargo xtask setup`");
        std::process::exit(1);
    };
    let target = |name: &str| std::env::var(format!("CARGO_CFG_TARGET_{name}")).unwrap_or_default();
    let linux = target("OS") == "linux";
    let x86_64 = target("ARCH") == "x86_64";

    let include = lib.join("../include");
    let out = PathBuf::from(std::env::var("OUT_DIR").unwrap_or_default());
    let made = std::fs::read_to_string("csrc/kernels.cu").and_then(|source| {
        let text = format!("static const char kSource[] = R\"cuda({source})cuda\";\n");
        std::fs::write(out.join("kernels_cu.h"), text)
    });
    if let Err(e) = made {
        println!("cargo:warning=csrc/kernels.cu: {e}");
        std::process::exit(1);
    }
    let mut shim = compiler();
    shim.define("_GLIBCXX_USE_CXX11_ABI", "1")
        .include(&out)
        .include(&include)
        .include(include.join("torch/csrc/api/include"));
    if linux {
        shim.flag("-fopenmp"); // ATen's parallel_for is a header
    }
    shim.files(
        [
            "attention",
            "attention_parts",
            "cpu_dispatch",
            "cuda",
            "decode",
            "layer",
            "linear_kl",
            "linear_logprobs",
            "linear_tiles",
            "memory",
            "optim",
            "optim8",
            "panels",
            "product",
            "ragged",
            "recompute",
            "round",
            "surrogate",
            "table",
        ]
        .map(|f| format!("csrc/{f}.cpp")),
    );
    shim.compile("rlhf_kernels");
    // libtorch holds Gloo but not its headers: csrc/compat has the names.
    let mut groups = compiler();
    groups
        .define("_GLIBCXX_USE_CXX11_ABI", "1")
        .define("USE_DISTRIBUTED", None)
        .define("USE_C10D_GLOO", None)
        .include("csrc/compat")
        .include(&include)
        .include(include.join("torch/csrc/api/include"))
        .file("csrc/collective.cpp")
        .compile("rlhf_collective");
    for (name, flags) in INSTRUCTION_SETS
        .iter()
        .filter(|(_, flags)| x86_64 || flags.is_empty())
    {
        let mut loops = compiler();
        loops
            .define("RLHF_ISA", *name)
            .flag("-ffp-contract=fast")
            .flag("-fno-math-errno")
            .flag_if_supported("-Wno-psabi");
        for flag in *flags {
            loops.flag(flag);
        }
        loops
            .files(
                [
                    "cpu_kernels",
                    "loss_kernels",
                    "product_kernels",
                    "row_kernels",
                ]
                .map(|f| format!("csrc/{f}.cpp")),
            )
            .compile(&format!("rlhf_{name}"));
    }

    println!("cargo:rustc-link-search=native={}", lib.display());
    println!("cargo:rustc-link-lib=torch_cpu");
    println!("cargo:rustc-link-lib=c10");
    if linux {
        println!("cargo:rustc-link-lib=dl");
        // The one that libtorch brings along; a second one would be a second pool of threads.
        println!("cargo:rustc-link-lib=dylib:+verbatim=libgomp.so.1");
    }
}

/// Optimised in every profile: unoptimised kernels would make the tests slow and tell nothing more.
fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .pic(true)
        .warnings(false)
        .opt_level(3)
        .debug(false)
        .flag("-fvisibility=hidden");
    build
}
