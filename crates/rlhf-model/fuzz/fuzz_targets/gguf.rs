//! A GGUF file: refused by name, or its tensors are decoded; where it can be imported, the folder's
//! configuration and weights can be read.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_model::Config;
use rlhf_model::weights::gguf::{GgufFile, import};
use rlhf_model_fuzz::{named, read_all, scratch};
use tch::Kind;

static DIR: LazyLock<PathBuf> = LazyLock::new(scratch);

fuzz_target!(|data: &[u8]| {
    let file = DIR.join("m.gguf");
    std::fs::write(&file, data).expect("a temporary file");
    match GgufFile::open(&file) {
        Err(e) => return named(&e, &DIR),
        Ok(gguf) => {
            for (name, shape) in gguf.tensors() {
                let numbers = gguf.values(name).expect("a named tensor").len();
                assert_eq!(numbers, shape.iter().product::<usize>(), "{name}");
            }
        }
    }
    let out = DIR.join("out");
    match import(&file, &out, Kind::BFloat16) {
        Err(e) => named(&e, &DIR),
        Ok(_) => {
            Config::load(&out).expect("what was imported");
            read_all(&out);
            std::fs::remove_dir_all(&out).expect("a temporary folder");
        }
    }
});
