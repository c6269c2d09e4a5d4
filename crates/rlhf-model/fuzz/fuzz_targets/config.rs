//! A `config.json`: refused with a message that names it, or the same again after it was written. (Where it has
//! no padding token, one is written for readers that ask for it.)
#![no_main]

use libfuzzer_sys::fuzz_target;
use rlhf_model::Config;

fuzz_target!(|data: &str| {
    match Config::parse(data, "config.json") {
        Ok(config) => {
            let text = config.to_json().to_string();
            let again = Config::parse(&text, "again").map_err(|e| e.to_string());
            let again = again.expect("what was written");
            assert_eq!(again.to_json().to_string(), text);
            let filled = Config {
                pad_token_id: config.pad_token_id.or(again.pad_token_id),
                ..config.clone()
            };
            assert_eq!(again, filled, "{text}");
            assert!(config.num_parameters() > 0);
        }
        Err(e) => assert!(e.to_string().starts_with("config.json: "), "{e}"),
    }
});
