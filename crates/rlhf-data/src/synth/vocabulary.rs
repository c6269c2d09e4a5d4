//! The shipped tokenizer: byte-level BPE trained on the demonstrations, single digits, and a chat
//! template that marks what is trained.

use super::lexicon::{CITIES, CLOTHES, DAYS, NAMES, THINGS};
use super::{DataFile, encoding};
use crate::error::{Error, Result};
use serde_json::json;
use std::collections::BTreeMap;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, PreTokenizerWrapper, Tokenizer, TokenizerBuilder};

/// Largest size of the vocabulary, special tokens included.
pub const VOCABULARY: usize = 1024;

/// How often the slot words are repeated beside the texts. At this size of vocabulary their counts
/// in the texts are too small for whole words, and a fact of one token is copied more easily.
const LEXICON_REPEATS: usize = 200;

/// First token of every conversation.
pub const BOS: &str = "<|bos|>";
/// Last token of every message; generation stops here.
pub const END: &str = "<|end|>";

/// The special tokens; each one's id is its place.
pub const SPECIAL_TOKENS: [&str; 5] = [BOS, END, "<|system|>", "<|user|>", "<|assistant|>"];

/// The chat template. The `generation` block holds what a model is trained to write: an assistant's
/// content and the end token.
pub const CHAT_TEMPLATE: &str = "\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {{- '<|assistant|>' }}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- elif message['role'] == 'user' or message['role'] == 'system' %}
        {{- '<|' + message['role'] + '|>' + message['content'] + eos_token }}
    {%- else %}
        {{- raise_exception('unknown role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}";

fn failed(error: tokenizers::Error) -> Error {
    encoding("tokenizer", error)
}

/// Trains the tokenizer on `texts` and on the words that fill slots; each of these becomes one token.
///
/// # Errors
/// [`crate::Error::Invalid`] where the trainer fails.
pub fn train(texts: &[&str]) -> Result<Tokenizer> {
    let lexicon: String = [NAMES, THINGS, CLOTHES, CITIES, DAYS]
        .concat()
        .iter()
        .map(|word| format!(" {word}"))
        .collect();
    let lexicon = std::iter::repeat_n(lexicon.as_str(), LEXICON_REPEATS);
    trained(texts.iter().copied().chain(lexicon), VOCABULARY)
}

/// A tokenizer of bytes: a letter a token.
///
/// # Errors
/// [`crate::Error::Invalid`] where the trainer fails.
pub fn bytes() -> Result<Tokenizer> {
    trained(std::iter::empty(), SPECIAL_TOKENS.len() + 256)
}

fn trained<'a>(texts: impl Iterator<Item = &'a str> + Send, size: usize) -> Result<Tokenizer> {
    let byte_level = ByteLevel::new(false, true, true);
    let pre_tokenizer = PreTokenizerWrapper::Sequence(Sequence::new(vec![
        PreTokenizerWrapper::Digits(Digits::new(true)),
        PreTokenizerWrapper::ByteLevel(byte_level),
    ]));
    let mut tokenizer = TokenizerBuilder::default()
        .with_model(BPE::default())
        .with_normalizer(None::<tokenizers::NormalizerWrapper>)
        .with_pre_tokenizer(Some(pre_tokenizer))
        .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
        .with_decoder(Some(tokenizers::DecoderWrapper::ByteLevel(byte_level)))
        .build()
        .map_err(failed)?;
    let special = SPECIAL_TOKENS
        .map(|token| AddedToken::from(token, true))
        .to_vec();
    let mut trainer = BpeTrainer::builder()
        .show_progress(false)
        .vocab_size(size)
        .min_frequency(2)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .special_tokens(special)
        .build();
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    Ok(tokenizer.into())
}

/// `tokenizer.json`, `tokenizer_config.json` and `generation_config.json` of `task`.
///
/// # Errors
/// [`crate::Error::Invalid`] where the tokenizer cannot be written as JSON.
pub fn files(task: &str, tokenizer: &Tokenizer) -> Result<Vec<DataFile>> {
    let decoder: BTreeMap<String, serde_json::Value> = SPECIAL_TOKENS
        .iter()
        .enumerate()
        .map(|(id, token)| {
            let entry = json!({
                "content": token, "lstrip": false, "normalized": false, "rstrip": false,
                "single_word": false, "special": true,
            });
            (id.to_string(), entry)
        })
        .collect();
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": decoder,
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": END,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": false,
        "chat_template": CHAT_TEMPLATE,
    });
    let generation = json!({ "bos_token_id": 0, "eos_token_id": 1 });
    let pretty = |value: &serde_json::Value| -> Result<Vec<u8>> {
        let mut text = serde_json::to_string_pretty(value).map_err(|e| encoding("json", e))?;
        text.push('\n');
        Ok(text.into_bytes())
    };
    let mut text = tokenizer.to_string(true).map_err(failed)?;
    text.push('\n');
    let file = |name: &str, bytes| DataFile {
        path: format!("{task}/tokenizer/{name}"),
        bytes,
    };
    Ok(vec![
        file("tokenizer.json", text.into_bytes()),
        file("tokenizer_config.json", pretty(&config)?),
        file("generation_config.json", pretty(&generation)?),
    ])
}
