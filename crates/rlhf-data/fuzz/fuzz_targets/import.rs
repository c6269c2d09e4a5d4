//! One importer, named by `FORMAT`: a JSON row becomes canonical rows, or is refused.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_data::import::{Format, convert, sniff};
use rlhf_data_fuzz::{Row, every_kind, told};

static FORMAT: LazyLock<Format> =
    LazyLock::new(|| Format::parse(&told("FORMAT")).expect("FORMAT is no importer"));

fuzz_target!(|data: &[u8]| {
    let Ok(row) = serde_json::from_slice::<Row>(data) else {
        return;
    };
    let _ = sniff(&row);
    for row in convert(*FORMAT, row).unwrap_or_default() {
        every_kind(&row);
    }
});
