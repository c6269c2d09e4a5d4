//! What is asked of the sampler, and what is refused before anything is computed.

use crate::error::{Error, Result};
use crate::sampling::Filters;

/// Which log-probabilities a completion carries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RecordedLogprobs {
    /// Those of the distribution that each token was drawn from: after temperature and filters. A
    /// greedy token is certain, 0.
    #[default]
    Sampled,
    /// Those of the model at temperature 1 without filters.
    Model,
}

/// How to sample.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingConfig {
    /// Divides the logits; 0 takes the likeliest token.
    pub temperature: f64,
    /// Keeps the k likeliest tokens.
    pub top_k: Option<usize>,
    /// Keeps the likeliest tokens that together reach this probability.
    pub top_p: Option<f64>,
    /// Keeps tokens at least this fraction as likely as the likeliest.
    pub min_p: Option<f64>,
    /// The longest completion, end-of-sequence token included.
    pub max_new_tokens: usize,
    /// Until a completion has this many tokens it may not end by itself.
    pub min_new_tokens: usize,
    /// Tokens that end a completion; each belongs to it.
    pub eos_ids: Vec<u32>,
    /// Divides positive logits of tokens that prompt or completion hold, and multiplies negative
    /// ones; 1 changes nothing (Keskar et al., arXiv 1909.05858).
    pub repetition_penalty: f64,
    /// Subtracted from the logit of every token that the completion holds.
    pub presence_penalty: f64,
    /// Subtracted from a token's logit as often as the completion holds it.
    pub frequency_penalty: f64,
    /// Added to the logits of these tokens; −∞ forbids one.
    pub logit_bias: Vec<(u32, f64)>,
    /// How many of the likeliest tokens to record at each place.
    pub top_logprobs: usize,
    /// The seed of all draws.
    pub seed: u64,
    /// Goes into the completions' records: which policy drew them.
    pub policy_version: u64,
    /// Which log-probabilities to record.
    pub record: RecordedLogprobs,
}

impl Default for SamplingConfig {
    /// Plain sampling at temperature 1, up to 256 tokens, no end-of-sequence token.
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: None,
            top_p: None,
            min_p: None,
            max_new_tokens: 256,
            min_new_tokens: 0,
            eos_ids: Vec::new(),
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            logit_bias: Vec::new(),
            top_logprobs: 0,
            seed: 0,
            policy_version: 0,
            record: RecordedLogprobs::Sampled,
        }
    }
}

impl SamplingConfig {
    /// Whether what was said changes what is said next.
    pub(super) fn penalises(&self) -> bool {
        (
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
        ) != (1.0, 0.0, 0.0)
    }

    /// The filters, or `None` for greedy.
    pub(super) fn filters(&self) -> Result<Option<Filters>> {
        let greedy = self.temperature == 0.0;
        let filters = Filters {
            temperature: if greedy { 1.0 } else { self.temperature },
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
        };
        filters.validate()?;
        if self.max_new_tokens == 0 {
            return Err(Error::Argument("max_new_tokens must be at least 1".into()));
        }
        let penalty = self.repetition_penalty;
        if !(penalty > 0.0 && penalty.is_finite()) {
            return Err(Error::Argument(format!(
                "repetition_penalty {penalty} is not positive"
            )));
        }
        for (name, x) in [
            ("presence_penalty", self.presence_penalty),
            ("frequency_penalty", self.frequency_penalty),
        ] {
            if !x.is_finite() {
                return Err(Error::Argument(format!("{name} {x} is not finite")));
            }
        }
        if let Some((id, x)) = self
            .logit_bias
            .iter()
            .find(|(_, x)| x.is_nan() || *x == f64::INFINITY)
        {
            return Err(Error::Argument(format!(
                "logit_bias {x} of token {id} is neither finite nor −∞"
            )));
        }
        Ok((!greedy).then_some(filters))
    }
}

/// A prompt to be completed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerateRequest {
    /// Its token ids; at least one.
    pub prompt: Vec<u32>,
    /// The key of its noise, usually the row of the data; becomes [`rlhf_data::group::PromptGroup::row`].
    pub prompt_key: u64,
    /// How many completions.
    pub samples: usize,
    /// The longest completion of this prompt, where that is less than the setting for all.
    pub max_new_tokens: Option<usize>,
}

/// Texts that end a completion.
#[derive(Clone, Copy)]
pub struct StopStrings<'a> {
    /// Any of these ends it, with the token that completes it.
    pub strings: &'a [String],
    /// The text of some tokens.
    pub decode: &'a dyn Fn(&[u32]) -> String,
}

impl std::fmt::Debug for StopStrings<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("StopStrings").field(&self.strings).finish()
    }
}

impl StopStrings<'_> {
    /// Whether the last of `ids` completes a stop string.
    pub(super) fn hit(&self, ids: &[u32]) -> bool {
        let longest = self.strings.iter().map(String::len).max().unwrap_or(0);
        // A token is a byte at least; the slack keeps a character whole whose first bytes are cut.
        let from = ids.len().saturating_sub(longest + 4);
        let text = (self.decode)(&ids[from..]);
        self.strings.iter().any(|s| text.contains(s.as_str()))
    }
}

/// How much to compute at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerateLimits {
    /// Sequences that are decoded together.
    pub max_batch_sequences: usize,
    /// Tokens that the key-value cache may hold (rows times columns); fewer sequences run together
    /// when they are long.
    pub max_cache_tokens: usize,
    /// Prompt tokens that are computed together.
    pub max_prefill_tokens: usize,
}

impl Default for GenerateLimits {
    /// 256 sequences, a million cached tokens, 16 Ki prompt tokens.
    fn default() -> Self {
        Self {
            max_batch_sequences: 256,
            max_cache_tokens: 1 << 20,
            max_prefill_tokens: 1 << 14,
        }
    }
}

/// Refuses what cannot be generated, before anything is computed.
pub(super) fn check(
    requests: &[GenerateRequest],
    config: &SamplingConfig,
    limits: &GenerateLimits,
    vocab: i64,
    context: i64,
) -> Result<()> {
    if limits.max_batch_sequences == 0 {
        return Err(Error::Argument(
            "max_batch_sequences must be at least 1".into(),
        ));
    }
    if let Some(id) = config.eos_ids.iter().find(|&&id| i64::from(id) >= vocab) {
        return Err(Error::Argument(format!(
            "end-of-sequence token {id} is outside the model's vocabulary of {vocab}"
        )));
    }
    if let Some((id, _)) = config
        .logit_bias
        .iter()
        .find(|(id, _)| i64::from(*id) >= vocab)
    {
        return Err(Error::Argument(format!(
            "token {id} of logit_bias is outside the model's vocabulary of {vocab}"
        )));
    }
    for (i, r) in requests.iter().enumerate() {
        let bad = |what: String| Err(Error::Argument(format!("request {i}: {what}")));
        if r.prompt.is_empty() {
            return bad(
                "the prompt is empty; give it at least a beginning-of-sequence token".into(),
            );
        }
        if r.prompt.len() as i64 >= context {
            return bad(format!(
                "the prompt has {} tokens, the model's context holds {context}; shorten it",
                r.prompt.len()
            ));
        }
        if let Some(id) = r.prompt.iter().find(|&&id| i64::from(id) >= vocab) {
            return bad(format!(
                "token id {id} is outside the model's vocabulary of {vocab}; tokenizer and model do not belong together"
            ));
        }
        if r.max_new_tokens == Some(0) {
            return bad("max_new_tokens must be at least 1".into());
        }
        if u32::try_from(r.samples).is_err() {
            return bad(format!("{} samples", r.samples));
        }
    }
    Ok(())
}
