//! A `config.json`: refused with a message that names it, or the same model again after it was written, and
//! from then on the same text.
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
            for layer in 0..config.num_hidden_layers {
                assert_eq!(again.window(layer), config.window(layer), "{text}");
                assert_eq!(again.rotates(layer), config.rotates(layer), "{text}");
            }
            assert_eq!(again.num_parameters(), config.num_parameters(), "{text}");
            assert!(config.num_parameters() > 0);
        }
        Err(e) => assert!(e.to_string().starts_with("config.json: "), "{e}"),
    }
});
