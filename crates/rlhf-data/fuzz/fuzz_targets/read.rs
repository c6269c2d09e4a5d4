//! The readers: a file whose name has the ending `ENDING`, through the importer that its rows tell.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_data::import::{OnBad, read};
use rlhf_data_fuzz::{every_kind, scratch, told};

static FILE: LazyLock<PathBuf> = LazyLock::new(|| scratch(&format!("file.{}", told("ENDING"))));

fuzz_target!(
    init: {
        // The Parquet and Arrow crates panic on some damaged files, which the readers catch; a panic
        // that leaves them still ends the run.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |data: &[u8]| {
        std::fs::write(&*FILE, data).expect("a temporary file");
        let Ok(rows) = read(&FILE, None, OnBad::Skip) else {
            return;
        };
        for row in rows {
            match row {
                Ok((_, row)) => every_kind(&row.columns),
                Err(e) => assert!(e.to_string().contains("rlhf-fuzz"), "{e}"),
            }
        }
    }
);
