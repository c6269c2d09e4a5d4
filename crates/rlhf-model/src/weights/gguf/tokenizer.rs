//! `tokenizer.json` and `tokenizer_config.json` out of the metadata.
//!
//! Byte-level BPE is rebuilt where its way of cutting text into words is known; anything else has to
//! lie in the folder already.

use serde_json::{Map, Value, json};

use super::file::Meta;
use super::meta::MetaReader;
use crate::error::Result;

/// A control token, and one that a user added.
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// What `tokenizer.ggml.pre` may say. The patterns are those of the families' own `tokenizer.json`.
const KNOWN: [&str; 4] = ["smollm", "gpt-2", "llama-bpe", "qwen2"];

/// How a tokenizer cuts text into words.
struct Words {
    normalizer: Value,
    pre_tokenizer: Value,
    /// A word that is a token needs no merges.
    ignore_merges: bool,
}

fn byte_level(use_regex: bool) -> Value {
    json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
        "use_regex": use_regex})
}

/// Words by a pattern in which a run of digits has at most `digits`.
fn by_pattern(digits: &str) -> Value {
    let pattern = format!(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    );
    json!({"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false},
        byte_level(false),
    ]})
}

impl Words {
    fn of(name: &str) -> Option<Self> {
        let plain = |pre_tokenizer| Self {
            normalizer: Value::Null,
            pre_tokenizer,
            ignore_merges: false,
        };
        Some(match name {
            "smollm" => plain(json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true},
                byte_level(true),
            ]})),
            "gpt-2" => plain(byte_level(true)),
            "llama-bpe" => Self {
                ignore_merges: true,
                ..plain(by_pattern(r"\p{N}{1,3}"))
            },
            "qwen2" => Self {
                normalizer: json!({"type": "NFC"}),
                ..plain(by_pattern(r"\p{N}"))
            },
            _ => return None,
        })
    }
}

/// What stands in the way of rebuilding the tokenizer, if anything: the key and what it says.
pub(super) fn obstacle(r: &MetaReader<'_>) -> Result<Option<String>> {
    let (model, pre) = ("tokenizer.ggml.model", "tokenizer.ggml.pre");
    Ok(match (r.maybe_text(model)?, r.maybe_text(pre)?) {
        (None, _) => Some(format!("{model} is missing")),
        (Some("gpt2"), None) => Some(format!("{pre} is missing")),
        (Some("gpt2"), Some(p)) if KNOWN.contains(&p) => None,
        (Some("gpt2"), Some(p)) => Some(format!(
            "{pre}: {p:?} is not supported; supported: {}",
            KNOWN.join(", ")
        )),
        (Some(m), _) => Some(format!(
            "{model}: {m:?} is not supported; supported: \"gpt2\""
        )),
    })
}

/// `tokenizer.json` and `tokenizer_config.json` of a file without an [`obstacle`].
pub(super) fn tokenizer(r: &MetaReader<'_>, context: i64) -> Result<(Value, Value)> {
    let tokens = r.texts("tokenizer.ggml.tokens")?;
    let kinds = r.list("tokenizer.ggml.token_type")?;
    if kinds.len() != tokens.len() {
        return Err(r.bad("tokenizer.ggml.token_type", "not one type a token"));
    }
    let kind = |meta: &Meta| match meta {
        Meta::Unsigned(k) => Some(*k),
        Meta::Signed(k) => u64::try_from(*k).ok(),
        _ => None,
    };
    let added: Vec<Value> = tokens
        .iter()
        .zip(kinds)
        .enumerate()
        .filter_map(|(id, (token, meta))| {
            let special = match kind(meta) {
                Some(CONTROL) => true,
                Some(USER_DEFINED) => false,
                _ => return None,
            };
            Some(
                json!({"id": id, "content": token, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false, "special": special}),
            )
        })
        .collect();
    let vocab: Map<String, Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, t)| ((*t).to_owned(), json!(id)))
        .collect();
    let token = |name: &str| -> Result<Option<&str>> {
        let Some(id) = r.token_id(name)? else {
            return Ok(None);
        };
        let found = tokens.get(id as usize).copied();
        let key = format!("tokenizer.ggml.{name}_token_id");
        found
            .map(Some)
            .ok_or_else(|| r.bad(&key, format!("{id} is not in the vocabulary")))
    };
    let (bos, eos) = (token("bos")?, token("eos")?);
    let first = r.maybe_flag("tokenizer.ggml.add_bos_token")? == Some(true);
    let Some(words) = Words::of(r.text("tokenizer.ggml.pre")?) else {
        return Err(r.bad("tokenizer.ggml.pre", "not supported"));
    };
    let json = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": words.normalizer,
        "pre_tokenizer": words.pre_tokenizer,
        "post_processor": bos.zip(r.token_id("bos")?).filter(|_| first).map(begin_with),
        "decoder": {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true,
            "use_regex": true},
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": words.ignore_merges,
            "vocab": vocab,
            "merges": r.texts("tokenizer.ggml.merges")?,
        },
    });
    let special: Vec<&str> = bos.into_iter().chain(eos).collect();
    let config = [
        ("add_prefix_space", Some(json!(false))),
        ("bos_token", bos.map(Value::from)),
        ("eos_token", eos.map(Value::from)),
        ("unk_token", token("unknown")?.map(Value::from)),
        ("pad_token", token("padding")?.map(Value::from)),
        ("additional_special_tokens", Some(json!(special))),
        (
            "chat_template",
            r.maybe_text("tokenizer.chat_template")?.map(Value::from),
        ),
        ("clean_up_tokenization_spaces", Some(json!(false))),
        ("model_max_length", Some(json!(context))),
        ("tokenizer_class", Some(json!("GPT2Tokenizer"))),
    ];
    let config: Map<String, Value> = config
        .into_iter()
        .filter_map(|(k, v)| Some((k.to_owned(), v?)))
        .collect();
    Ok((json, Value::Object(config)))
}

/// Puts the beginning-of-sequence token first.
fn begin_with((token, id): (&str, u32)) -> Value {
    let piece = |name: &str| json!({"Sequence": {"id": name, "type_id": 0}});
    let bos = json!({"SpecialToken": {"id": token, "type_id": 0}});
    json!({
        "type": "TemplateProcessing",
        "single": [bos, piece("A")],
        "pair": [bos, piece("A"), bos, piece("B")],
        "special_tokens": {token: {"id": token, "ids": [id], "tokens": [token]}},
    })
}
