//! A `config.json`: refused with a message that names it, or the same again after it was written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlhf_model::Config;

fuzz_target!(|data: &str| {
    match Config::parse(data, "config.json") {
        Ok(config) => {
            let text = config.to_json().to_string();
            let again = Config::parse(&text, "again").map_err(|e| e.to_string());
            assert_eq!(again.as_ref(), Ok(&config), "{text}");
            assert!(config.num_parameters() > 0);
        }
        Err(e) => assert!(e.to_string().starts_with("config.json: "), "{e}"),
    }
});
