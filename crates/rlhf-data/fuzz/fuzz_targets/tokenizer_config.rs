//! A model folder's `tokenizer_config.json`, with its template, beside a tokenizer of 32 tokens.
#![no_main]

use std::path::PathBuf;
use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;
use rlhf_data::conversation::{Message, Role, Text};
use rlhf_data::record::{PreferenceRecord, SftRecord};
use rlhf_data::tokenize::{ChatTokenizer, Limits};
use rlhf_data_fuzz::scratch;

const TOKENIZER: &str = include_str!("../tokenizer.json");

static FOLDER: LazyLock<PathBuf> = LazyLock::new(|| {
    let dir = scratch("model");
    std::fs::create_dir_all(&dir).expect("a temporary folder");
    std::fs::write(dir.join("tokenizer.json"), TOKENIZER).expect("a temporary file");
    dir
});

fuzz_target!(
    init: {
        // As in `template`.
        std::panic::set_hook(Box::new(|_| {}));
    },
    |data: &[u8]| {
    std::fs::write(FOLDER.join("tokenizer_config.json"), data).expect("a temporary file");
    let Ok(t) = ChatTokenizer::load_dated(&FOLDER, (2024, 7, 9)) else {
        return;
    };
    let prompt = Text::Messages(vec![Message::new(Role::User, "a question <s> </s>")]);
    let answer = |s: &str| Text::Messages(vec![Message::new(Role::Assistant, s)]);
    let limits = Limits::new(16, 8);
    let _ = t.prompt_ids(&prompt);
    let _ = t.sft_group(
        0,
        &SftRecord {
            prompt: Some(prompt.clone()),
            completion: answer("an answer"),
        },
        &limits,
    );
    let _ = t.preference_group(
        0,
        &PreferenceRecord {
            prompt,
            chosen: answer("yes"),
            rejected: answer("no </s> never"),
            margin: None,
        },
        &limits,
    );
}
);
