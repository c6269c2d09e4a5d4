//! A safetensors file: refused by name, or every tensor is read.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_model_fuzz::{read_all, scratch};

static DIR: LazyLock<PathBuf> = LazyLock::new(scratch);

fuzz_target!(|data: &[u8]| {
    std::fs::write(DIR.join("model.safetensors"), data).expect("a temporary file");
    read_all(&DIR);
});
