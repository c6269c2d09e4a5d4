//! A `model.safetensors.index.json`, a line of `---`, and a shard `a.safetensors`; `b.safetensors`
//! is there and sound.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_model_fuzz::{read_all, scratch};

const HEADER: &str = r#"{"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;

static DIR: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = scratch();
    let mut file = (HEADER.len() as u64).to_le_bytes().to_vec();
    file.extend(HEADER.as_bytes());
    file.extend([0; 8]);
    std::fs::write(dir.join("b.safetensors"), file).expect("a temporary file");
    dir
});

fuzz_target!(|data: &[u8]| {
    let cut = data.windows(5).position(|w| w == b"\n---\n");
    let (index, shard) = cut.map_or((data, &[][..]), |at| (&data[..at], &data[at + 5..]));
    std::fs::write(DIR.join("model.safetensors.index.json"), index).expect("a temporary file");
    std::fs::write(DIR.join("a.safetensors"), shard).expect("a temporary file");
    read_all(&DIR);
});
